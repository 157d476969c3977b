"""The NaN guard: what breaks between sampled steps is recorded at its step, with its layer and direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from trainings import BATCH, TOKENS, WIDTH, ResidualMLP, Task, batches, fit, monitor, same, seed, trained, trainer

import gradflow

CADENCE = 100
BREAK = 5
"""A step that is not sampled: those are 0, 1, 2, 4, 8, ..."""


class InfiniteSlope(torch.autograd.Function):
    """Finite forwards, infinite backwards: the square root at 0, without its value."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


class Breaks(nn.Module):
    """A residual MLP whose middle layer breaks in the forward pass number `BREAK`, or in the backward pass of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.how = how
        self.passes = 0

    def forward(self, x):
        breaks = self.passes == BREAK
        self.passes += 1
        x = x + torch.relu(self.first(x))
        if breaks and self.how == "forward":
            x = x / 0.0 * 0.0
        hidden = self.middle(x)
        if breaks and self.how == "backward":
            hidden = InfiniteSlope.apply(hidden)
        return self.last(x + torch.relu(hidden))


def run(model, directory, *, nan_guard=True, steps=12, **options):
    """Train by hand; weights are put back after a step that breaks them, so that one step alone is at fault."""
    seed()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradflow.Recorder(
        model, optimizer, directory, every_n_steps=CADENCE, strict=True, nan_guard=nan_guard, **options
    ) as recorder:
        for _ in range(steps):
            before = [p.detach().clone() for p in model.parameters()]
            with recorder.step():
                optimizer.zero_grad()
                model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
                optimizer.step()
            if not all(torch.isfinite(p).all() for p in model.parameters()):
                with torch.no_grad():
                    for parameter, value in zip(model.parameters(), before, strict=True):
                        parameter.copy_(value)
    return recorder.run


@pytest.mark.parametrize(("how", "place"), [("forward", "middle"), ("backward", "middle")])
def test_a_step_that_breaks_between_sampled_ones_is_named_with_layer_and_direction(tmp_path, how, place):
    (finding,) = [f for f in gradflow.diagnose(run(Breaks(how), tmp_path / "run")) if f.code == "nonfinite"]
    assert finding.severity == "error"
    assert finding.steps[0] == BREAK
    assert finding.evidence["direction"] == how
    assert finding.where[0] == place
    assert place in finding.claim


@pytest.mark.parametrize("how", ["forward", "backward"])
def test_without_the_guard_a_step_between_sampled_ones_passes_unseen(tmp_path, how):
    assert not [f for f in gradflow.diagnose(run(Breaks(how), tmp_path / "run", nan_guard=False)) if f.code == "nonfinite"]


def test_a_healthy_run_holds_the_sampled_steps_alone(tmp_path):
    healthy = run(Breaks("never"), tmp_path / "run")
    assert healthy.table("steps")["step"].to_pylist() == [0, 1, 2, 4, 8]
    assert not [f for f in gradflow.diagnose(healthy) if f.code == "nonfinite"]


def test_the_broken_step_alone_is_added_to_the_run(tmp_path):
    broken = run(Breaks("forward"), tmp_path / "run")
    assert broken.table("steps")["step"].to_pylist() == [0, 1, 2, 4, BREAK, 8]
    assert BREAK not in broken.table("branches")["step"].to_pylist()
    rows = [row for row in broken.table("layers").to_pylist() if row["step"] == BREAK]
    assert {row["layer"]: row["nonfinite"] > 0 for row in rows}["first"] is False
    assert {row["layer"]: row["nonfinite"] for row in rows}["middle"] == BATCH * TOKENS * WIDTH


def test_training_that_stays_broken_adds_its_first_step_alone(tmp_path):
    model = Breaks("forward")
    seed()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradflow.Recorder(model, optimizer, tmp_path / "run", every_n_steps=CADENCE, nan_guard=True) as recorder:
        for _ in range(12):
            with recorder.step():
                optimizer.zero_grad()
                model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
                optimizer.step()
    assert recorder.run.table("steps")["step"].to_pylist() == [0, 1, 2, 4, BREAK, 8]


class Masked(nn.Module):
    """Scores with -inf where a key is masked, as an activation's result, made finite again by the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mask = Mask()

    def forward(self, x):
        return x + self.out(torch.softmax(self.mask(self.scores(x)), -1))


class Mask(nn.Module):
    """Shuts half of the keys out; a parameter makes it a measured layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        shut = torch.arange(x.shape[-1]) % 2 == 0
        return (x * self.scale).masked_fill(shut, -torch.inf)


def test_infinities_of_a_mask_that_leave_the_loss_finite_are_no_alarm(tmp_path):
    masked = run(Masked(), tmp_path / "run")
    assert masked.table("steps")["step"].to_pylist() == [0, 1, 2, 4, 8]


def test_an_overflow_that_the_loss_scaler_skips_is_no_alarm(tmp_path):
    seed()
    model = Breaks("backward")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with gradflow.Recorder(
        model, optimizer, tmp_path / "run", every_n_steps=CADENCE, strict=True, nan_guard=True, scaler=scaler
    ) as recorder:
        for _ in range(12):
            with recorder.step():
                optimizer.zero_grad()
                scaler.scale(model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 2.0**7  # it did overflow
    assert recorder.run.table("steps")["step"].to_pylist() == [0, 1, 2, 4, 8]


def fitted(model, directory, **options):
    watching = monitor(directory, CADENCE, nan_guard=True, **options)
    training = trainer(directory, watching, max_steps=12, max_epochs=-1)
    fit(training, Task(model), batches(12))
    return training


def test_a_trainer_is_warned_at_once_and_the_stored_run_says_the_same(tmp_path):
    told = []
    fitted(Breaks("forward"), tmp_path, on_finding=told.append)
    (online,) = [f for f in told if f.code == "nonfinite"]
    (offline,) = [f for f in gradflow.diagnose(gradflow.load(tmp_path / "gradflow")) if f.code == "nonfinite"]
    assert online.steps[0] == offline.steps[0] == BREAK
    assert online.where == offline.where


def test_a_trainer_stops_one_step_after_the_break_where_it_is_asked_to(tmp_path):
    training = fitted(Breaks("forward"), tmp_path, on_finding="stop")
    assert training.global_step == BREAK + 2


def test_training_with_the_guard_ends_in_the_same_bits(tmp_path):
    def make():
        return Task(ResidualMLP(dropout=0.1))

    plain = trained(tmp_path, make)
    guarded = trained(tmp_path, make, callbacks=[lambda: monitor(tmp_path / "guarded", CADENCE, nan_guard=True)])
    for what in ("state", "optimizers", "losses", "random", "gradients"):
        assert same(getattr(plain, what), getattr(guarded, what)), what


def test_steps_between_sampled_ones_carry_nothing_without_the_guard(tmp_path):
    model = Breaks("never")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for nan_guard in (False, True):
        recorder = gradflow.Recorder(model, optimizer, tmp_path / f"{nan_guard}", every_n_steps=CADENCE, nan_guard=nan_guard)
        recorder.count = 3
        with recorder.step():
            assert (recorder.sampling is not None) is nan_guard
