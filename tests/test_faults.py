"""Faults of ours or of the machine never stop training: one warning, recording off, and the run says from when."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from trainings import (
    BATCH,
    TOKENS,
    WIDTH,
    ResidualMLP,
    Task,
    Transformer,
    batches,
    fit,
    monitor,
    same,
    seed,
    traces,
    trained,
    trainer,
)

import gradflow
from gradflow import tracing
from gradflow.errors import GradflowError
from gradflow.recorder import recording, taps
from gradflow.store.storage import LocalStorage
from gradflow.tracing import frames

ROOT = Path(__file__).parent.parent


def warnings_in(caplog):
    return [record for record in caplog.records if record.name == "gradflow" and record.levelno >= logging.WARNING]


def survives(tmp_path, caplog, *, stopped=True, make=lambda: Task(Transformer()), watching=None, **options):
    """Train with and without the monitor while something is broken: same bits, one warning with a traceback."""
    without = trained(tmp_path / "without", make, **options)
    seed()
    module, watching = make(), watching or monitor(tmp_path, strict=False)
    fit(trainer(tmp_path, watching, **options), module)
    assert same(without.state, module.state_dict())
    assert same(without.losses, module.losses)
    assert [k for k in traces(module) if k.endswith("_hooks")] == []
    assert traces(module)["modes"] == 0
    found = warnings_in(caplog)
    if stopped:
        assert len(found) == 1, [record.getMessage() for record in found]
        assert found[0].exc_info is not None
    return watching


LAYERS = {
    "operations of the trace": (tracing.Tracer, "_record"),
    "operands of the trace": (tracing.Tracer, "_parents"),
    "module calls": (frames.Frames, "begin"),
    "ends of module calls": (frames.Frames, "end"),
    "additions": (taps.AdditionTaps, "before"),
    "the end of a pass": (taps.Taps, "_finish_pass"),
    "the analysis": (taps, "analyse"),
    "a module's output": (taps.Taps, "_await_backward"),
    "weights": (recording.ParameterTaps, "start"),
    "gradients": (recording.ParameterTaps, "gradients"),
    "updates": (recording.ParameterTaps, "finish"),
    "the transfer": (recording.Buffer, "transfer"),
    "the rows": (recording.Finished, "rows"),
    "a statistic": (taps.LayerTaps, "_measure"),
    "a gradient": (taps.LayerTaps, "_gradient"),
    "the start of a step": (recording.StepInProgress, "start"),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_bug_of_ours_never_reaches_training(layer, tmp_path, caplog, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("ours")

    where, name = LAYERS[layer]
    monkeypatch.setattr(where, name, broken)
    watching = survives(tmp_path, caplog)
    assert watching.run.meta["stopped"]["step"] == 0
    assert "ZeroDivisionError" in watching.run.meta["stopped"]["error"]
    assert json.loads((tmp_path / "gradflow" / "run.json").read_text())["stopped"]["step"] == 0


def test_report_of_a_run_that_stopped_is_written(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(recording.StepInProgress, "start", lambda *_: 1 / 0)
    survives(tmp_path, caplog, watching=monitor(tmp_path, strict=False, report=True))
    assert "ZeroDivisionError" in (tmp_path / "gradflow" / "report.html").read_text()


@pytest.mark.parametrize("layer", LAYERS)
def test_strict_raises_a_bug_of_ours(layer, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(*LAYERS[layer], broken)
    module = Task(Transformer())
    with pytest.raises(ZeroDivisionError, match="ours"):
        fit(trainer(tmp_path, monitor(tmp_path)), module)
    assert traces(module)["modes"] == 0


@pytest.mark.parametrize("flush", [1, 20])
def test_bug_that_comes_late_costs_only_what_comes_after(flush, tmp_path, caplog, monkeypatch):
    original, calls = recording.StepInProgress.finish, []

    def broken(self):
        calls.append(self.step)
        if self.step == 4:
            raise ZeroDivisionError("ours")
        return original(self)

    monkeypatch.setattr(recording.StepInProgress, "finish", broken)
    monkeypatch.setattr("gradflow.recorder.recorder.FLUSH_STEPS", flush)
    watching = survives(tmp_path, caplog)
    assert watching.run.steps == [0, 1, 2, 3]
    assert watching.run.meta["stopped"]["step"] == 4
    assert calls == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- disks


def _full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def test_disk_that_fills_up(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("gradflow.recorder.recorder.FLUSH_STEPS", 2)
    writes, original = [], LocalStorage.write

    def write(self, name, produce):
        writes.append(name)
        return original(self, name, produce) if len(writes) < 10 else _full()

    monkeypatch.setattr(LocalStorage, "write", write)
    watching = survives(tmp_path, caplog)
    assert watching.run.meta["stopped"] is None or watching.run.meta["stopped"]["step"] == 2
    assert watching.run.steps == [0, 1]


def test_directory_that_is_removed_is_made_again_or_given_up(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("gradflow.recorder.recorder.FLUSH_STEPS", 1)

    class Removes(Task):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                shutil.rmtree(tmp_path / "gradflow", ignore_errors=True)
            return super().training_step(batch, batch_idx)

    watching = survives(tmp_path, caplog, stopped=False, make=lambda: Removes(ResidualMLP()))
    assert watching.run.steps in ([3, 4, 5], [])
    assert len(warnings_in(caplog)) <= 1


def test_file_in_the_way_of_the_directory(tmp_path, caplog):
    (tmp_path / "gradflow").write_text("a file")
    watching = survives(tmp_path, caplog, stopped=False)
    assert (tmp_path / "gradflow").read_text() == "a file"
    assert len(warnings_in(caplog)) <= 1
    assert len(watching.run.steps) in {0, 6}


def test_directory_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("a file")
    watching = survives(tmp_path, caplog, watching=gradflow.callbacks.GradientFlowMonitor(tmp_path / "file" / "run"))
    assert watching.run.steps == []
    assert watching.findings == []


def test_permission_that_is_lost(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("gradflow.recorder.recorder.FLUSH_STEPS", 1)
    original = os.open

    def denied(path, flags, *rest, **options):
        if flags & os.O_CREAT and "steps" in str(path) and len(os.listdir(tmp_path / "gradflow" / "steps")) >= 2:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", denied)
    watching = survives(tmp_path, caplog)
    assert watching.run.meta["stopped"]["step"] == 2
    assert watching.run.steps[:2] == [0, 1]


def child(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """Run a training in a process of its own."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *arguments],
        env=environment, capture_output=True, text=True, timeout=240, check=False, **options,
    )  # fmt: skip


def test_size_limit_of_the_process(tmp_path):
    done = child(
        """
        import resource, sys, signal
        from trainings import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        module = Task(Transformer(4))
        watching = monitor(Path := __import__("pathlib").Path(sys.argv[1]), strict=False)
        import gradflow.recorder.recorder
        gradflow.recorder.recorder.FLUSH_STEPS = 2
        class Limits(pl.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == 4:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        fit(trainer(sys.argv[1], watching, Limits()), module, batches(8))
        print("trained", len(module.losses), watching.run.meta["stopped"])
        """,
        str(tmp_path),
    )
    assert "trained 8" in done.stdout, done.stderr
    assert done.stderr.count("gradflow stopped recording") == 1
    assert "Traceback" in done.stderr
    assert gradflow.load(tmp_path / "gradflow").steps == [0, 1, 2, 3]


# ---------------------------------------------------------------- tensors and modules that nobody knows


class Labelled(torch.Tensor):
    """A plain subclass, as image libraries make."""


class Logged(torch.Tensor):
    """A subclass that handles every function itself."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A wrapper that intercepts at dispatch and refuses what it does not know."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in {"detach", "add", "mul", "_to_copy", "view", "t", "addmm", "alias"}:
            raise NotImplementedError(f"{func} on a Wrapped")
        unwrap = lambda x: x.inner if isinstance(x, Wrapped) else x
        out = func(*(unwrap(a) for a in args), **(kwargs or {}))
        return Wrapped(out) if isinstance(out, torch.Tensor) else out


class Odd(Task):
    """Something unusual takes part in the step."""

    def __init__(self, kind: str) -> None:
        super().__init__(ResidualMLP())
        self.kind = kind
        self.table = nn.EmbeddingBag(16, WIDTH, sparse=kind == "sparse gradient", mode="sum")
        self.scripted = torch.jit.trace(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), torch.ones(1, WIDTH)) if kind == "scripted" else None

    def computed(self, batch):
        kind = self.kind
        if kind == "subclass":
            return self.net(batch.as_subclass(Labelled)).square().mean().as_subclass(torch.Tensor)
        if kind == "handler":
            return self.net(batch.as_subclass(Logged)).square().mean().as_subclass(torch.Tensor)
        if kind == "wrapper":
            odd = Wrapped(batch) + Wrapped(batch)
            return self.net(batch + odd.inner).square().mean()
        if kind == "sparse":
            rows = batch.reshape(-1, WIDTH)[:4].to_sparse() + torch.eye(4, WIDTH).to_sparse()
            return self.net(torch.sparse.mm(rows.coalesce(), torch.ones(WIDTH, WIDTH))).square().mean()
        if kind == "sparse gradient":
            return self.net(self.table(torch.arange(4).reshape(2, 2))).square().mean()
        if kind == "nested":
            nested = torch.nested.nested_tensor([batch[0], batch[1][:2]], layout=torch.jagged)
            nested = nested + self.net.inner(nested)
            return self.net(batch).square().mean() + nested.values().mean()
        if kind == "meta":
            meta = torch.ones(3, WIDTH, device="meta")
            assert (meta + meta * 2).is_meta
            return self.net(batch).square().mean()
        if kind == "quantised":
            q = torch.quantize_per_tensor(batch, 0.1, 0, torch.qint8)
            return self.net(q.dequantize() + batch).square().mean()
        if kind == "complex":
            z = torch.fft.fft(self.net.inner(batch))
            return (z + torch.fft.fft(torch.relu(self.net.inner(batch)))).abs().square().mean()
        if kind == "integers":
            return self.net(batch + (batch * 3).long()).square().mean()
        if kind == "empty":
            return self.net(batch[:0]).sum() + self.net(batch).square().mean()
        if kind == "scalar":
            return (self.net.inner(batch).mean() + self.net(batch).mean()).square()
        if kind == "scripted":
            return self.net(batch + self.scripted(batch)).square().mean()
        if kind == "checkpointed functions":
            return torch.utils.checkpoint.checkpoint(lambda x: self.net(x).square().mean(), batch, use_reentrant=False)
        if kind == "function transforms":
            return torch.func.vmap(self.net)(batch).square().mean()
        if kind == "functional call":
            weights = {name: p * 1.0 for name, p in self.net.named_parameters()}
            return torch.func.functional_call(self.net, weights, (batch,)).square().mean()
        if kind == "gradient penalty":
            x = batch.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return self.net(batch).square().mean() + slope.square().mean()
        if kind == "half":
            return self.net(batch).half().float().square().mean()
        if kind == "inference":
            with torch.inference_mode():
                target = self.net(batch)
            return (self.net(batch) - target.clone()).square().mean()
        if kind == "objects":
            return self.net(dict(x=batch)["x"]).square().mean()
        raise AssertionError(kind)


KINDS = [
    "subclass", "handler", "wrapper", "sparse", "sparse gradient", "nested", "meta", "quantised", "complex", "integers", "empty",
    "scalar", "scripted", "checkpointed functions", "function transforms", "functional call", "gradient penalty", "half", "inference",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_unusual_tensors_and_modules_train_to_the_same_bits(kind, tmp_path, caplog):
    make = lambda: Odd(kind)
    if kind == "sparse gradient":
        make = lambda: _sgd(Odd(kind))
    watching = survives(tmp_path, caplog, stopped=False, make=make)
    assert warnings_in(caplog) == []
    assert watching.run.meta["stopped"] is None
    assert watching.run.steps == [0, 1, 2, 3, 4, 5]


def _sgd(module):
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    return module


# ---------------------------------------------------------------- kills

TRAINING = """
    import sys
    from pathlib import Path
    from trainings import *
    import gradflow.recorder.recorder
    gradflow.recorder.recorder.FLUSH_STEPS = 3
    module = Task(Transformer())
    root = Path(sys.argv[1])
    class Tells(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            (root / "progress").write_text(str(trainer.global_step))
    fit(trainer(root, monitor(root, strict=False), Tells(), max_epochs=100_000), module)
"""


@pytest.mark.parametrize("extra", [0.0, pytest.param(0.37, marks=pytest.mark.slow), pytest.param(0.81, marks=pytest.mark.slow)])
def test_killed_training_leaves_a_run_that_opens(extra, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(TRAINING), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    progress = tmp_path / "progress"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (progress.exists() and int(progress.read_text() or 0) > 20):
        time.sleep(0.05)
    time.sleep(extra)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = int(progress.read_text() or 21)
    run = gradflow.load(tmp_path / "gradflow")
    assert run.problems == []
    assert run.steps == list(range(len(run.steps)))
    assert len(run.steps) >= last - 4
    assert len(run.branches) == 4
    parts = sorted((tmp_path / "gradflow").rglob("*.parquet"))
    assert all(pq.read_table(part).num_rows for part in parts)
    assert len(parts) < 5 * 60


# ---------------------------------------------------------------- long runs


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_steps(tmp_path):
    seed()
    model = ResidualMLP()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    peaks = []
    with gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=1, strict=True) as recorder:
        for step in range(10_000):
            with recorder.step():
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            if step % 1000 == 999:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[2] < 60_000, peaks  # kilobytes; merging 256 parts takes 30 MB once
    assert len(recorder.run.steps) == 10_000
    for table in ("branches", "layers", "parameters", "streams", "steps"):
        assert len(list((tmp_path / "run" / table).iterdir())) <= 64


@pytest.mark.slow
def test_memory_stays_flat_where_every_step_takes_another_path(tmp_path):
    seed()

    class Wanders(ResidualMLP):
        def forward(self, x):
            for choice in torch.randint(0, 2, (12,)).tolist():
                x = x + torch.relu(self.layers[choice](x))
            return self.head(x)

    model = Wanders()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    peaks = []
    with gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=1, strict=True) as recorder:
        for step in range(600):
            with recorder.step():
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            if step % 100 == 99:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[-1] - peaks[1] < 30_000, peaks


def test_error_of_the_recorder_is_a_gradflow_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GradflowError, match="directory"):
        gradflow.Recorder(ResidualMLP(), None, tmp_path / "file" / "run")


def test_training_data_is_what_the_fixtures_say():
    assert next(iter(batches())).shape == (BATCH, TOKENS, WIDTH)
