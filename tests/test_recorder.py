"""`Recorder` in training loops by hand, in every way that people write them."""

from __future__ import annotations

import contextlib
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from trainings import BATCH, TOKENS, WIDTH, ResidualMLP, Transformer, same, seed, traces

import gradflow
from gradflow.errors import UsageError
from gradflow.recorder.options import is_sampled


def batch(number: int = 0) -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(number))


def loop(root, step, *, steps=3, make=ResidualMLP, optimizer=torch.optim.SGD, **options):
    """Train with `step(model, optimizer, batch)` inside `recorder.step()`; the run, and the norm of each step's gradients."""
    seed()
    model = make()
    optimizer = optimizer(model.parameters(), lr=0.1)
    with gradflow.Recorder(model, optimizer, root, every_n_steps=1, strict=True, **options) as recorder:
        for number in range(steps):
            with recorder.step():
                step(model, optimizer, batch(number))
            assert traces(model, optimizer)["modes"] == 0
            assert traces(model, optimizer)["optimizer 0"] == (0, 0)
            assert not [key for key in traces(model) if key.endswith("hooks") and "." in key and traces(model)[key]]
    return recorder.run, model


def usual(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def zero_after(model, optimizer, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def functional_backward(model, optimizer, x):
    optimizer.zero_grad()
    torch.autograd.backward([model(x).square().mean()])
    optimizer.step()


def gradients_by_hand(model, optimizer, x):
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(model(x).square().mean(), parameters), strict=True):
        p.grad = g
    optimizer.step()


def clipped(model, optimizer, x):
    usual_loss(model, x).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
    optimizer.step()
    optimizer.zero_grad()


def usual_loss(model, x):
    return model(x).square().mean()


def closure(model, optimizer, x):
    def evaluate():
        optimizer.zero_grad()
        loss = usual_loss(model, x)
        loss.backward()
        return loss

    optimizer.step(evaluate)


def micro_batches(model, optimizer, x):
    for part in x.chunk(2):
        (usual_loss(model, part) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def set_to_zero(model, optimizer, x):
    usual_loss(model, x).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


STYLES = [usual, zero_after, functional_backward, gradients_by_hand, clipped, closure, micro_batches, set_to_zero]


@pytest.mark.parametrize("style", STYLES)
def test_loop_of_any_style_gives_the_same_figures(style, tmp_path):
    expected, _ = loop(tmp_path / "a", usual, steps=1)
    found, _ = loop(tmp_path / "b", style, steps=1)
    assert [branch.name for branch in found.branches] == ["net"[:0] + "layers.0", "layers.1"]
    parts = 2 if style is micro_batches else 1
    scale = 4.0 if parts == 2 else 1.0  # each micro-batch's loss is halved, and its mean is over half of the elements
    for table, names in {"branches": ["skip_sq", "branch_sq", "out_sq", "grad_out_sq", "grad_fork_sq", "grad_branch_sq"], "parameters": ["grad_sq", "weight_sq"], "steps": ["grad_norm"]}.items():
        for name in names:
            a, b = (run.table(table)[name].to_pylist() for run in (expected, found))
            assert b == pytest.approx(a, rel=1e-4), (name, scale)
    assert found.table("steps")["microbatches"].to_pylist() == [parts]
    if style not in (gradients_by_hand, micro_batches):
        assert found.table("steps")["loss"].to_pylist() == pytest.approx(expected.table("steps")["loss"].to_pylist(), nan_ok=True) or style is functional_backward


@pytest.mark.parametrize("style", STYLES)
def test_loop_of_any_style_trains_to_the_same_bits(style, tmp_path):
    seed()
    model = Transformer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        style(model, optimizer, batch(number))
    _, watched = loop(tmp_path / "run", style, make=Transformer)
    assert same(model.state_dict(), watched.state_dict())


def test_lbfgs_evaluates_several_passes(tmp_path):
    run, _ = loop(tmp_path / "run", closure, optimizer=lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=3))
    counts = run.table("steps")["microbatches"].to_pylist()
    assert all(2 <= count <= 4 for count in counts)
    assert [n / (BATCH * TOKENS * WIDTH) for n in run.table("branches")["n"].to_pylist()[::2]] == counts


def test_gradient_penalty_is_not_taken_for_the_loss(tmp_path):
    def penalised(model, optimizer, x):
        optimizer.zero_grad()
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (usual_loss(model, x) + 0 * slope.sum()).backward()
        optimizer.step()

    run, _ = loop(tmp_path / "a", penalised, steps=1)
    plain, _ = loop(tmp_path / "b", usual, steps=1)
    assert run.table("steps")["microbatches"].to_pylist() == [1]
    assert run.table("steps")["grad_norm"].to_pylist() == pytest.approx(plain.table("steps")["grad_norm"].to_pylist())
    penalty = [row["grad_out_sq"] for row in run.table("branches").to_pylist() if "@" in row["branch"]]
    assert penalty == pytest.approx(plain.table("branches")["grad_out_sq"].to_pylist(), rel=1e-3)


def test_two_networks_with_their_own_optimizers(tmp_path):
    seed()
    nets = nn.ModuleList([ResidualMLP(), ResidualMLP()])
    optimizers = [torch.optim.Adam(net.parameters(), 1e-2) for net in nets]
    norms = []
    with gradflow.Recorder(nets, optimizers, tmp_path / "run", every_n_steps=1, strict=True) as recorder:
        for number in range(3):
            with recorder.step():
                for net, optimizer in zip(nets, optimizers, strict=True):
                    optimizer.zero_grad()
                    usual_loss(net, batch(number)).backward()
                    norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)))
                    optimizer.step()
    run = recorder.run
    assert run.table("steps")["microbatches"].to_pylist() == [2, 2, 2]
    expected = [math.hypot(a, b) for a, b in zip(norms[::2], norms[1::2], strict=True)]
    assert run.table("steps")["grad_norm"].to_pylist() == pytest.approx(expected, rel=1e-5)
    assert [o["class"] for o in run.meta["optimizers"]] == ["Adam", "Adam"]


def test_loss_scale_of_a_grad_scaler_is_divided_out(tmp_path):
    def step(scaler, clip):
        def run(model, optimizer, x):
            optimizer.zero_grad()
            loss = usual_loss(model, x)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()

        return run

    plain, _ = loop(tmp_path / "plain", usual)
    for clip in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run, _ = loop(tmp_path / f"scaled-{clip}", step(scaler, clip), scaler=scaler)
        assert run.table("steps")["loss_scale"].to_pylist() == [1024.0] * 3
        for table, name in [("steps", "loss"), ("steps", "grad_norm"), ("branches", "grad_fork_sq"), ("layers", "grad_out_sq")]:
            found, expected = (r.table(table)[name].to_pylist()[0] for r in (run, plain))
            assert found == pytest.approx(expected, rel=1e-4), name


def test_exception_inside_a_step_leaves_nothing(tmp_path):
    seed()
    model = Transformer()
    before = traces(model)
    recorder = gradflow.Recorder(model, None, tmp_path / "run", every_n_steps=1, strict=True)
    with pytest.raises(KeyboardInterrupt), recorder.step():
        model(batch())
        raise KeyboardInterrupt
    assert traces(model) == before
    with recorder.step():
        usual_loss(model, batch()).backward()
    assert recorder.run.steps == [0]


@pytest.mark.parametrize("checkpointing", ["no", "yes", "reentrant"])
@pytest.mark.parametrize("how", ["sampled", "guarded", "without a backward pass", "stopped by an exception"])
def test_a_model_goes_with_its_last_reference_though_it_was_recorded(how, checkpointing, tmp_path):
    gc.collect()
    gc.disable()  # nothing of ours may wait for a collection, and hold a model's memory until then
    try:
        model = Transformer(checkpointing=checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with gradflow.Recorder(
            model, optimizer, tmp_path / "run", every_n_steps=100 if how == "guarded" else 1, strict=True, nan_guard=how == "guarded"
        ) as recorder:
            for _ in range(4):
                with contextlib.suppress(KeyboardInterrupt), recorder.step():
                    loss = model(batch()).square().mean()
                    if how == "stopped by an exception":
                        raise KeyboardInterrupt
                    if how != "without a backward pass":
                        loss.backward()
                        optimizer.step()
                        optimizer.zero_grad()
        gone = weakref.ref(model)
        del model, optimizer, recorder, loss
        assert gone() is None
    finally:
        gc.enable()


def test_step_without_a_backward_pass_leaves_no_row(tmp_path):
    model = ResidualMLP()
    with gradflow.Recorder(model, None, tmp_path / "run", every_n_steps=1, strict=True) as recorder:
        with recorder.step():
            model(batch())
        with recorder.step():
            usual_loss(model, batch()).backward()
    assert recorder.run.steps == [0]


def test_run_without_an_optimizer_has_gradients_and_no_rate(tmp_path):
    model = ResidualMLP()
    with gradflow.Recorder(model, dirpath=tmp_path / "run", strict=True) as recorder, recorder.step():
        usual_loss(model, batch()).backward()
    row = recorder.run.table("steps").to_pylist()[0]
    assert row["learning_rate"] is None
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("every", [1, 3, 50])
def test_cadence(every):
    sampled = [step for step in range(200) if is_sampled(step, every)]
    powers = {2**k for k in range(10) if 2**k < every}
    assert sampled == sorted({*range(0, 200, every), *powers})


def test_relative_directory_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = gradflow.Recorder(ResidualMLP(), every_n_steps=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with recorder.step():
        usual_loss(recorder.model, batch()).backward()
    recorder.close()
    assert gradflow.load(tmp_path / "gradflow").steps == [0]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_second_recorder_takes_a_directory_of_its_own(tmp_path):
    first, second = (gradflow.Recorder(ResidualMLP(), None, tmp_path / "run") for _ in range(2))
    assert (first.dirpath, second.dirpath) == (str(tmp_path / "run"), str(tmp_path / "run-1"))
    assert gradflow.load(first.dirpath).steps == []


@pytest.mark.parametrize("url", ["memory://gradflow/{name}", "file://{path}/run"])
def test_run_may_lie_on_any_file_system(url, tmp_path):
    target = url.format(name=tmp_path.name, path=tmp_path)
    run, _ = loop(target, usual)
    assert run.steps == [0, 1, 2]
    assert gradflow.load(target).table("branches").equals(run.table("branches"))
    gradflow.report(run, tmp_path / "report.html")


def test_recorded_run_is_read_by_other_programs(tmp_path):
    import duckdb
    import pandas
    import polars

    run, _ = loop(tmp_path / "run", usual)
    rows = run.table("branches").num_rows
    folder = tmp_path / "run" / "branches"
    assert len(pandas.read_parquet(folder)) == rows
    assert polars.read_parquet(folder / "*.parquet").height == rows
    assert duckdb.sql(f"select count(*) from '{folder}/*.parquet'").fetchall() == [(rows,)]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((len,), {}), ((ResidualMLP(),), {"every_n_steps": 0}), ((ResidualMLP(),), {"rows": -1}), ((ResidualMLP(),), {"tables": ["x"]})],
)
def test_argument_that_does_not_fit_is_said_at_once(arguments, options, tmp_path):
    with pytest.raises(UsageError, match="expected"):
        gradflow.Recorder(*arguments, None, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_fault_in_a_loop_by_hand_stops_the_recording_alone(tmp_path, caplog, monkeypatch):
    from gradflow.recorder import recording

    seed()
    model = ResidualMLP()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=1)
    for number in range(4):
        if number == 2:
            monkeypatch.setattr(recording.ParameterTaps, "finish", lambda self: 1 / 0)
        with recorder.step():
            usual(model, optimizer, batch(number))
    recorder.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert recorder.run.meta["stopped"]["step"] <= 2
    assert traces(model, optimizer)["optimizer 0"] == (0, 0)


class Parallel(nn.Module):
    """Attention's and the feed-forward's place taken by two maps that read the same tensor: `g(x) + f(x) + x`."""

    def __init__(self):
        super().__init__()
        self.stem, self.f, self.g = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))

    def forward(self, x):
        x = self.stem(x.double())
        return self.g(x).tanh() + self.f(x).tanh() + x


def test_every_branch_of_a_merged_join_is_measured_at_every_sampled_step(tmp_path):
    expected = []

    def step(model, optimizer, x):
        with torch.no_grad():
            skip = model.stem(x.double())
            f, g = model.f(skip).tanh(), model.g(skip).tanh()
            expected.extend((float(skip.square().sum()), float(b.square().sum()), float((skip * b).sum())) for b in (f, g))
        usual(model, optimizer, x)

    run, _ = loop(tmp_path, step, make=Parallel)
    rows = [r for r in run.table("branches").to_pylist() if r["grad_out_sq"] is not None]
    rows.sort(key=lambda row: (row["step"], row["branch"]))
    assert [(row["step"], row["branch"]) for row in rows] == [(n, b) for n in range(3) for b in ("f", "g")]
    for row, figures in zip(rows, expected, strict=True):
        assert (row["skip_sq"], row["branch_sq"], row["dot"]) == pytest.approx(figures, rel=1e-10)
        assert None not in (row["grad_branch_sq"], row["signal_share"], row["gradient_share"])
