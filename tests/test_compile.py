"""Compiled models: sampled steps run eagerly by stance, nothing is compiled again, other steps stay compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from trainings import BATCH, TOKENS, WIDTH, ResidualMLP, Task, fit, monitor, seed, traces, trainer

import gradflow


class Halves(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.outer = nn.Linear(3, 3)

    def forward(self, x):
        return self.outer(self.inner(x))


def _method(backend):
    model = ResidualMLP()
    model.compile(backend=backend)
    return model


WAYS = {
    "module": lambda backend: torch.compile(ResidualMLP(), backend=backend),
    "method": _method,
    "submodule": lambda backend: Halves(torch.compile(ResidualMLP(), backend=backend)),
    "fullgraph": lambda backend: torch.compile(ResidualMLP(), backend=backend, fullgraph=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _train(model, steps: int, root=None, every: int = 4):
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    recorder = None if root is None else gradflow.Recorder(model, optimizer, root, every_n_steps=every, strict=True)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator)
        if recorder is not None:
            recorder.begin(recorder.count)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if recorder is not None:
            recorder.end()
    if recorder is not None:
        recorder.close()
    return losses, recorder


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS)
def test_sampled_steps_compile_nothing(way, tmp_path):
    seed()
    counter = CompileCounter()
    expected, _ = _train(WAYS[way](counter), 12)
    compiled = counter.frame_count
    assert compiled >= 1
    torch._dynamo.reset()
    seed()
    counter = CompileCounter()
    model = WAYS[way](counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses, recorder = _train(model, 12, tmp_path / "run")
    assert counter.frame_count == compiled
    assert losses == pytest.approx(expected, rel=1e-5)
    assert recorder.run.steps == [0, 1, 2, 4, 8]
    assert len(recorder.run.branches) == 2
    assert all(value is not None for value in recorder.run.table("branches")["gain"].to_pylist())
    assert not any("_orig_mod" in branch.name or "_orig_mod" in branch.module for branch in recorder.run.branches)
    assert not any("_orig_mod" in parameter.name for parameter in recorder.run.parameters)
    assert traces(model)["stance"] == "default"


def test_other_steps_run_compiled_code(tmp_path):
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(len(args))
            return graph.forward(*args)

        return run

    seed()
    _train(torch.compile(ResidualMLP(), backend=backend), 12, tmp_path / "run")
    assert len(calls) == 12 - 5


def test_names_are_those_of_the_plain_model(tmp_path):
    seed()
    plain = _train(ResidualMLP(), 1, tmp_path / "a")[1].run
    seed()
    compiled = _train(torch.compile(ResidualMLP(), backend="eager"), 1, tmp_path / "b")[1].run
    for kind in ("branches", "layers", "streams", "parameters"):
        assert [thing.name for thing in getattr(plain, kind)] == [thing.name for thing in getattr(compiled, kind)]
    for table in ("branches", "parameters"):
        assert plain.table(table).equals(compiled.table(table))


@pytest.mark.parametrize("compiles", ["the task", "a part"])
def test_compiled_lightning_module_is_recorded(compiles, tmp_path):
    seed()
    module = Task(ResidualMLP())
    if compiles == "a part":
        module.net = torch.compile(module.net, backend="eager")
    watching = monitor(tmp_path, 2)
    fit(trainer(tmp_path, watching), torch.compile(module, backend="eager") if compiles == "the task" else module)
    run = watching.run
    assert run.steps == [0, 1, 2, 4]
    assert [branch.name for branch in run.branches] == ["net.layers.0", "net.layers.1"]
    assert all(parameter.name.startswith("net.") and "_orig" not in parameter.name for parameter in run.parameters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inside the compiler
def test_default_compiler_is_left_alone(tmp_path):
    seed()
    model = torch.compile(ResidualMLP())
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses, recorder = _train(model, 12, tmp_path / "run")
    torch._dynamo.reset()
    seed()
    expected, _ = _train(torch.compile(ResidualMLP()), 12)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert recorder.run.steps == [0, 1, 2, 4, 8]
