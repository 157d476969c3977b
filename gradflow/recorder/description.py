"""What a run says about itself in `run.json`: model, branches, layers, parameters, optimizers, configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow import __version__
from gradflow.errors import RunError
from gradflow.records import Branch, Layer, Parameter, Problem, Stream
from gradflow.store import manifest
from gradflow.store.storage import open_storage
from gradflow.tracing.modules import survey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.optim import Optimizer

    from gradflow.records import Structure

_GROUP_SETTINGS = ("lr", "eps", "betas", "weight_decay", "momentum")


class Description:
    """Gathers the branches, streams and layers that sampled steps meet, in the order in which they are first met."""

    def __init__(self, run_id: str, config: dict[str, Any], info: dict[str, Any]) -> None:
        self.run_id = run_id
        self.config = config
        self.info = info
        self.branches: dict[str, Branch] = {}
        self.streams: dict[str, Stream] = {}
        self.layers: dict[str, Layer] = {}
        self.problems: dict[tuple[str, str, str], Problem] = {}
        self.started = datetime.now(UTC).isoformat(timespec="seconds")

    def resume(self, path: str) -> None:
        """Go on with what `run.json` of the run at `path` says; where it cannot be read, start afresh."""
        try:
            meta = manifest.complete(manifest.parse(open_storage(path).read(manifest.FILE), path), [])
        except (OSError, RunError):
            return
        if meta["run_id"] != self.run_id:
            return
        self.branches = {branch.name: branch for branch in manifest.branches(meta, [])}
        self.streams = {stream.name: stream for stream in manifest.streams(meta, [])}
        self.layers = {layer.name: layer for layer in manifest.layers(meta, [])}
        for found in meta["problems"]:
            self._problem(Problem(*(str(found.get(key, "")) for key in ("what", "where", "reason"))))
        if isinstance(meta["stopped"], Mapping):
            before = meta["stopped"]
            reason = f"stopped at step {before.get('step')} ({before.get('error')}), and went on when training resumed"
            self._problem(Problem("recording", "", reason))
        self.started = str(meta["started"] or self.started)

    def _problem(self, problem: Problem) -> None:
        self.problems.setdefault((problem.what, problem.where, problem.reason), problem)

    def add(self, structures: Iterable[Structure], layers: dict[str, Layer]) -> None:
        """Enter what one sampled step met; what is known already stays as it was."""
        for structure in structures:
            for branch in structure.branches:
                self.branches.setdefault(branch.name, branch)
            for stream in structure.streams:
                known = self.streams.get(stream.name)
                if known is None or len(known.points) < len(stream.points):
                    self.streams[stream.name] = stream
            for problem in structure.problems:
                self._problem(problem)
        for name, layer in layers.items():
            self.layers.setdefault(name, layer)

    def note(self, problems: Iterable[Problem]) -> None:
        """Enter what went wrong, the first time at each place."""
        for problem in problems:
            self.problems.setdefault((problem.what, problem.where, ""), problem)

    def meta(
        self, model: nn.Module, optimizers: Sequence[Optimizer], *, stopped: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The content of `run.json`."""
        return {
            "run_id": self.run_id, "gradflow": __version__, "torch": torch.__version__,
            "model": type(model).__name__, "world_size": 1, "precision": "32-true", **self.info,
            "branches": _plainly(self.branches), "streams": _plainly(self.streams), "layers": _plainly(self.layers),
            "parameters": [asdict(parameter) for parameter in _parameters(model, optimizers)],
            "optimizers": [_optimizer(optimizer) for optimizer in optimizers], "config": self.config,
            "started": self.started,
            "stopped": stopped, "problems": _plainly(self.problems),
        }  # fmt: skip


def _plainly(records: Mapping[Any, Branch | Stream | Layer | Problem]) -> list[dict[str, Any]]:
    return [asdict(record) for record in records.values()]


def _parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Parameter]:
    groups = {
        id(parameter): f"{i}.{j}"
        for i, optimizer in enumerate(optimizers)
        for j, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    return [
        Parameter(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad, groups.get(id(p)))
        for name, p in survey(model).parameters.items()
        if not nn.parameter.is_lazy(p)
    ]


def _optimizer(optimizer: Optimizer) -> dict[str, Any]:
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {key: _plain(group[key]) for key in _GROUP_SETTINGS if key in group} for group in optimizer.param_groups
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
