"""How the labelled zoo trains: one setup, one recorded run and what plain PyTorch measured of it, kept on disk.

`ZOO_RUNS` names the directory of the runs (a temporary one by default); what is there is not trained again, so that
changed rules are scored in seconds.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradflow
from zoo.losses import classify

warnings.filterwarnings("ignore", message=".*lr_scheduler.*")


@dataclass(frozen=True)
class Setup:
    """Everything that a training is made of; a cure is a setup with some of it replaced."""

    model: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Any]
    loss: Callable[..., torch.Tensor] = classify
    steps: int = 100
    lr: float = 1e-3
    optimizer: Any = torch.optim.Adam
    options: Mapping[str, Any] = field(default_factory=dict)
    parameters: Callable[[nn.Module], list[Any]] | None = None
    every: int = 20
    warmup: int = 0
    accumulate: int = 1
    autocast: Any = None
    clip: float | None = None
    scaler: float = 0.0
    """What the loss scale starts at; none at 0."""
    factor: float | Callable[[int], float] = 1.0
    corrupt: Callable[[int, Any], Any] | None = None
    rate: Callable[[int], float] | None = None
    precision: str | None = None
    seed: int = 0

    def but(self, **changes: Any) -> Setup:
        return replace(self, **changes)

    def scale(self, step: int) -> float:
        """What the loss of a step is multiplied by."""
        return self.factor(step) if callable(self.factor) else self.factor


@dataclass
class Trained:
    """A finished training as plain PyTorch saw it."""

    setup: Setup
    initial: nn.Module
    model: nn.Module
    batches: list[Any]
    losses: list[float]
    norms: list[float]
    update: float
    """Median over matrices of the last step's change over the weight."""

    def loss(self, model, batch):
        with torch.autocast("cpu", dtype=self.setup.autocast, enabled=self.setup.autocast is not None):
            return self.setup.loss(model, batch)


def root() -> Path:
    return Path(os.environ.get("ZOO_RUNS") or Path(tempfile.gettempdir()) / "gradflow-zoo")


def train(
    name: str, setup: Setup, proof: Callable[[Trained], tuple[float, bool]] | None = None
) -> tuple[Any, dict[str, Any]]:
    """The run of a setup and what was measured of it beside, from disk where they are there already."""
    folder = root() / name
    if not (folder / "result.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        result = _train(folder, setup, proof)
        (folder / "result.json").write_text(json.dumps(result))
    return gradflow.load(folder / "run"), json.loads((folder / "result.json").read_text())


def pretrained(model: nn.Module, data: Callable[[torch.Generator], Any], *, steps: int = 100) -> nn.Module:
    """The model after some steps of Adam."""
    generator, opt = torch.Generator().manual_seed(0), torch.optim.Adam(model.parameters())
    for _ in range(steps):
        opt.zero_grad()
        classify(model, data(generator)).backward()
        opt.step()
    return model


def _train(folder: Path, setup: Setup, proof) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(setup.seed)
    model = setup.model()
    initial = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(setup.seed + 1)
    held = torch.Generator().manual_seed(999)
    batches = [setup.data(held) for _ in range(4)]
    before = evaluate(initial, setup, batches)
    trained = Trained(setup, initial, model, batches, [], [], math.nan)
    torch.manual_seed(setup.seed + 2)
    _loop(folder, trained, generator)
    result = {"before": before, "after": evaluate(model, setup, batches), "losses": trained.losses}
    if proof is not None:
        value, holds = proof(trained)
        result |= {"proof": float(value), "holds": bool(holds)}
    return result


def _loop(folder: Path, trained: Trained, generator: torch.Generator) -> None:
    setup, model = trained.setup, trained.model
    wanted = setup.parameters(model) if setup.parameters else [p for p in model.parameters() if p.requires_grad]
    opt = setup.optimizer(wanted, lr=setup.lr, **setup.options)
    bases = [group["lr"] for group in opt.param_groups]
    scaler = torch.amp.GradScaler("cpu", setup.scaler or 1.0, enabled=bool(setup.scaler))
    info = {"precision": setup.precision} if setup.precision else None
    recorder = gradflow.Recorder(
        model,
        getattr(opt, "all", opt),
        folder / "run",
        every_n_steps=setup.every,
        strict=True,
        info=info,
        scaler=scaler if setup.scaler else None,
    )
    for step in range(setup.steps + 1):
        factor = min(1.0, (step + 1) / setup.warmup) if setup.warmup else 1.0
        factor *= setup.rate(step) if setup.rate else 1.0
        for group, base in zip(opt.param_groups, bases, strict=True):
            group["lr"] = base * factor
        last = {n: p.detach().clone() for n, p in model.named_parameters()} if step == setup.steps else {}
        with recorder.step():
            opt.zero_grad()
            total = 0.0
            for _ in range(setup.accumulate):
                batch = setup.data(generator)
                batch = setup.corrupt(step, batch) if setup.corrupt else batch
                with torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None):
                    loss = setup.loss(model, batch)
                    total += loss.item() / setup.accumulate
                    loss = loss * (setup.scale(step) / setup.accumulate)
                scaler.scale(loss).backward()
            trained.losses.append(total)
            trained.norms.append(_norm(model) / (scaler.get_scale() if setup.scaler else 1.0))
            if setup.clip:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
            scaler.step(opt)
            scaler.update()
        if last:
            trained.update = _moved(last, model)
    recorder.close()


def _norm(model: nn.Module) -> float:
    grads = [p.grad.double().pow(2).sum() for p in model.parameters() if p.grad is not None]
    return math.sqrt(max(0.0, float(sum(grads)))) if grads and bool(torch.isfinite(sum(grads))) else math.nan


def _moved(last: dict[str, torch.Tensor], model: nn.Module) -> float:
    ratios = [
        float((p.detach() - last[n]).norm() / last[n].norm().clamp_min(1e-30))
        for n, p in model.named_parameters()
        if p.requires_grad and p.dim() > 1 and "embed" not in n
    ]
    return float(torch.tensor(ratios or [math.nan]).median())


def evaluate(model: nn.Module, setup: Setup, batches: list[Any]) -> float:
    """Mean loss of a model on held-out batches, without gradients; infinite where it is not a number."""
    model = copy.deepcopy(model)
    with (
        torch.no_grad(),
        torch.random.fork_rng(),
        torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None),
    ):
        torch.manual_seed(7)
        values = [float(setup.loss(model, batch)) for batch in batches]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else math.inf
