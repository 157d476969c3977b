"""The operation that broke numbers first is named, forwards and backwards, the same at sampled and at guarded steps."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trainings import Task, batches, fit, monitor, same, seed, trainer

import gradflow

WIDTH = 8
GUARDED, SAMPLED = 5, 8
"""Steps at which faults are set: of a cadence of 100, the second is sampled and the first is not."""


class InfiniteSlope(torch.autograd.Function):
    """Finite forwards, infinite backwards."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient / torch.zeros_like(ctx.saved_tensors[0])


class Reciprocal(torch.autograd.Function):
    """Infinite forwards at 0."""

    @staticmethod
    def forward(ctx, x):
        return x.reciprocal()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Inner(nn.Module):
    """A module without parameters, which computes whatever it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.does = None

    def forward(self, x):
        return x if self.does is None else self.does(x)


class Net(nn.Module):
    """Layers before, around and after the code that breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner, self.norm = Inner(), nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.dropout(torch.relu(self.first(x)))
        return self.last(self.norm(self.inner(x) + x))


def masked(x):
    """A softmax over keys that are all masked."""
    return x.masked_fill(torch.ones_like(x, dtype=torch.bool), -torch.inf).softmax(-1)


def masked_in_part(x):
    """The same with a good mask, then a fault of another kind."""
    half = torch.arange(WIDTH) < WIDTH // 2
    return (x + torch.where(half, 0.0, -torch.inf)).softmax(-1).log().sum(-1, keepdim=True) * 0 + x


def overflows(x):
    with torch.autocast("cpu", torch.float16):
        return F.linear(x.detach() * 0 + 6e4, torch.full((WIDTH, WIDTH), 6e4)).float() * 0 + x


def in_place(x):
    y = x * 1.0
    y[..., 0] /= 0.0
    return y


def slope_at_zero(f):
    return lambda x: x + f(x * 0.0)


def behind_where(f):
    """Of `f` at zero no value is used, but its derivative is multiplied by the zero gradient that comes."""
    return lambda x: torch.where(x == x, x, f(x * 0))  # noqa: PLR0124


FORWARD = {
    "zero by zero": (lambda x: (x * 0) / (x * 0), "div"),
    "a number over zero": (lambda x: 1.0 / (x * 0), "div"),
    "log of zero": (lambda x: (x * 0).log(), "log"),
    "root of a negative": (lambda x: torch.sqrt(-x.abs() - 1), "sqrt"),
    "exp that overflows": (lambda x: torch.exp(x.abs() + 100), "exp"),
    "a power that overflows": (lambda x: (x.abs() + 1e20) ** 3, "pow"),
    "a product that overflows": (lambda x: (x.abs() + 1e30) * 1e30 * 0, "mul"),
    "a row of masked keys": (masked, "softmax"),
    "a log behind a good mask": (masked_in_part, "log"),
    "half precision": (overflows, "linear"),
    "in place": (in_place, "div"),
    "a custom function": (lambda x: Reciprocal.apply(x * 0), "reciprocal"),
}
BACKWARD = {
    "root at zero": (lambda x: x + (x * 0).sqrt(), "sqrt"),
    "power at zero": (lambda x: x + (x * 0).abs() ** 0.5, "pow"),
    "arc cosine of one": (lambda x: x + torch.acos(x * 0 + 1), "acos"),
    "log behind where": (behind_where(torch.log), "log"),
    "division behind where": (behind_where(lambda x: 1 / x), "div"),
    "root in place": (lambda x: x + (x * 0).sqrt_(), "sqrt"),
    "norm of roots": (lambda x: x + torch.linalg.vector_norm((x * 0).abs().sqrt(), dim=-1, keepdim=True), "sqrt"),
    "a custom function": (InfiniteSlope.apply, "InfiniteSlope"),
}
FAULTS = {
    **{f"forward, {name}": ("forward", *fault) for name, fault in FORWARD.items()},
    **{f"backward, {name}": ("backward", *fault) for name, fault in BACKWARD.items()},
}


def trained(directory, at, does=None, *, body=None, net=None, steps=10, **options):
    """Train by hand; at one step the net's inner module does something else, and `body(net, at)` is what a step does."""
    seed()
    net = net or Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    options = {"every_n_steps": 100, "strict": True, "nan_guard": True, **options}
    with gradflow.Recorder(net, optimizer, directory, **options) as recorder:
        for step in range(steps):
            before = [p.detach().clone() for p in net.parameters()]
            with recorder.step():
                optimizer.zero_grad()
                net.inner.does = does if step == at else None
                if body is None or step != at:
                    net(torch.randn(4, 5, WIDTH)).square().mean().backward()
                else:
                    body(net)
                optimizer.step()
            for parameter, value in zip(net.parameters(), before, strict=True):
                if not torch.isfinite(parameter).all():
                    parameter.data.copy_(value)
    return recorder.run


def told(run):
    (finding,) = [f for f in gradflow.diagnose(run) if f.code == "nonfinite"]
    return finding


@pytest.mark.parametrize("at", [GUARDED, SAMPLED], ids=["guarded", "sampled"])
@pytest.mark.parametrize("name", FAULTS)
def test_the_operation_is_named_the_same_whether_the_step_is_sampled_or_not(tmp_path, name, at):
    direction, does, operation = FAULTS[name]
    run = trained(tmp_path / "run", at, does)
    assert run.steps == sorted({0, 1, 2, 4, 8, at})
    (row,) = run.table("faults").to_pylist()
    assert (row["step"], row["direction"], row["operation"], row["module"]) == (at, direction, operation, "inner")
    assert row["reason"] == ""
    assert 0 < row["nonfinite"] <= row["n"]
    finding = told(run)
    assert finding.where[0] == f"inner.{operation}"
    assert (finding.evidence["direction"], finding.evidence["operation"]) == (direction, operation)
    assert f"{operation.lower()}, in the forward of inner, " in finding.claim.lower()


LOSSES = {
    "log of zero": ("forward", lambda out: (out.relu() * 0).log().mean(), "log"),
    "cross entropy of masked logits": (
        "forward", lambda out: F.cross_entropy(out[:, 0] - torch.inf, torch.zeros(4, dtype=torch.long)), "cross_entropy",
    ),
    "mean of nothing": ("forward", lambda out: F.cross_entropy(out[:, 0], torch.full((4,), -100)), "cross_entropy"),
    "root of zero": ("backward", lambda out: (out - out).square().mean().sqrt(), "sqrt"),
}  # fmt: skip


@pytest.mark.parametrize("at", [GUARDED, SAMPLED], ids=["guarded", "sampled"])
@pytest.mark.parametrize("name", LOSSES)
def test_operations_of_a_loss_function_are_named_as_such(tmp_path, name, at):
    direction, loss, operation = LOSSES[name]
    run = trained(tmp_path / "run", at, body=lambda net: loss(net(torch.randn(4, 5, WIDTH))).backward())
    (row,) = run.table("faults").to_pylist()
    assert (row["direction"], row["operation"], row["module"]) == (direction, operation, "training step")
    finding = told(run)
    assert f"{operation}, outside of the model, " in finding.claim.lower()
    assert finding.evidence["direction"] == ("loss" if direction == "forward" else "backward")


def of(batch):
    """A step on a batch that was made outside of it."""
    return lambda net: net(batch).square().mean().backward()


def test_a_layer_that_breaks_is_named_with_its_own_operation(tmp_path):
    run = trained(tmp_path / "run", GUARDED, body=of(torch.randn(4, 5, WIDTH).sign() * 3e38))
    (row,) = run.table("faults").to_pylist()
    assert (row["operation"], row["module"]) == ("linear", "first")
    finding = told(run)
    assert finding.where[0] == "first"
    assert "first appeared in the output of first (linear)" in finding.claim


def test_a_batch_that_holds_nan_is_told_from_an_operation(tmp_path):
    run = trained(tmp_path / "run", GUARDED, body=of(torch.full((4, 5, WIDTH), torch.nan)))
    assert run.table("faults")["operation"].to_pylist() == ["input"]
    assert "came in with the batch of step 5" in told(run).claim


def test_a_weight_that_is_broken_already_is_told_from_an_operation(tmp_path):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with gradflow.Recorder(net, optimizer, tmp_path / "run", every_n_steps=100, nan_guard=True, strict=True) as recorder:
        recorder.count = GUARDED
        net.last.weight.data.fill_(torch.nan)
        with recorder.step():
            of(torch.randn(4, 5, WIDTH))(net)
            optimizer.step()
    (row,) = recorder.run.table("faults").to_pylist()
    assert (row["operation"], row["module"]) == ("parameter", "last")
    assert told(recorder.run).where[0] == "last"


@pytest.mark.parametrize("at", [GUARDED, SAMPLED], ids=["guarded", "sampled"])
@pytest.mark.parametrize("name", ["forward, log of zero", "backward, root at zero"])
def test_looking_for_the_operation_changes_nothing_of_the_training(tmp_path, name, at):
    """Dropout, batch norm and a counter: computing a pass again draws, updates and counts nothing."""

    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(5)
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            return super().forward(self.batch_norm(x))

    ends = []
    for guarded in (True, False):
        seed()
        net = Counting()
        optimizer = torch.optim.SGD(net.parameters(), 0.01)
        recorder = gradflow.Recorder(
            net, optimizer, tmp_path / f"{guarded}", every_n_steps=100 if guarded else 10**9, nan_guard=guarded, strict=True
        )
        recorder.count = 0 if guarded else 1000
        for step in range(at + 1):
            with recorder.step():
                optimizer.zero_grad()
                net.inner.does = FAULTS[name][1] if step == at else None
                net(torch.randn(4, 5, WIDTH)).square().mean().backward()
                if step < at:
                    optimizer.step()
        gradients = [p.grad for p in net.parameters()]
        ends.append((copy.deepcopy(net.state_dict()), gradients, torch.get_rng_state(), net.passes))
        recorder.close()
    assert same(ends[0], ends[1])
    assert gradflow.load(tmp_path / "True").table("faults").num_rows == 1


def test_nothing_of_a_pass_is_kept_alive(tmp_path):
    """What autograd does not keep is gone when it is used up; what it keeps, and the batch, after the backward pass."""
    seen = {}

    def watch(name, tensor):
        seen[name] = weakref.ref(tensor)
        return tensor

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    recorder = gradflow.Recorder(net, optimizer, tmp_path / "run", every_n_steps=100, nan_guard=True, strict=True)
    recorder.count = 3
    net.inner.does = lambda x: x + watch("kept", torch.sin(watch("dropped", x + 1.0) * 2.0)).square()
    gc.disable()
    try:
        with recorder.step():
            loss = net(watch("batch", torch.randn(4, 5, WIDTH))).square().mean()
            assert seen["dropped"]() is None
            assert seen["kept"]() is not None
            loss.backward()
            assert [name for name, tensor in seen.items() if tensor() is not None] == []
            optimizer.step()
    finally:
        gc.enable()


def test_an_operation_that_cannot_be_run_again_leaves_the_rest_to_be_told(tmp_path):
    """A generator of the model's own is not drawn from again."""
    generator = torch.Generator()

    def noisy(x):
        return x + torch.empty_like(x).normal_(generator=generator).log()

    run = trained(tmp_path / "run", GUARDED, noisy)
    (row,) = run.table("faults").to_pylist()
    assert row["operation"] == ""
    assert "not seen" in row["reason"]
    assert f"Which operation it was could not be told: {row['reason']}." in told(run).claim


@pytest.mark.parametrize("micro", [0, 1])
@pytest.mark.parametrize("name", ["forward, log of zero", "backward, root at zero"])
def test_the_micro_batch_that_broke_is_found_where_gradients_are_accumulated(tmp_path, name, micro):
    class Accumulates(Task):
        def training_step(self, batch, batch_idx):
            self.net.inner.does = FAULTS[name][1] if batch_idx == 2 * 3 + micro else None
            return super().training_step(batch, batch_idx)

    watching = monitor(tmp_path, 100, nan_guard=True)
    made = trainer(tmp_path, watching, max_steps=5, accumulate_grad_batches=2)
    fit(made, Accumulates(Net()), batches(10))
    row = watching.run.table("faults").to_pylist()[0]  # the steps after it have broken weights
    assert (row["step"], row["direction"], row["operation"]) == (3, FAULTS[name][0], FAULTS[name][2])


@pytest.mark.parametrize("at", [GUARDED, SAMPLED], ids=["guarded", "sampled"])
def test_overflows_that_a_loss_scaler_skips_are_no_fault(tmp_path, at):
    seed()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with gradflow.Recorder(
        net, optimizer, tmp_path / "run", every_n_steps=100, nan_guard=True, strict=True, scaler=scaler
    ) as recorder:
        for step in range(10):
            with recorder.step():
                optimizer.zero_grad()
                net.inner.does = FAULTS["backward, root at zero"][1] if step == at else None
                scaler.scale(net(torch.randn(4, 5, WIDTH)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
    assert scaler.get_scale() == 2.0**7  # it did overflow
    assert recorder.run.steps == [0, 1, 2, 4, 8]
    assert recorder.run.table("faults").num_rows == 0
    assert not [f for f in gradflow.diagnose(recorder.run) if f.code == "nonfinite"]


def test_numbers_drawn_from_a_generator_of_the_model_are_taken_as_they_were(tmp_path):
    generator = torch.Generator()
    run = trained(tmp_path / "run", GUARDED, lambda x: x + torch.randn(x.shape, generator=generator).log())
    assert run.table("faults")["operation"].to_pylist() == ["log"]


def test_a_compiled_model_says_that_no_operation_can_be_told(tmp_path):
    torch._dynamo.reset()
    net = Net()
    net.compile(backend="eager")

    def body(net):
        (net(torch.randn(4, 5, WIDTH)).square().mean() * torch.nan).backward()

    run = trained(tmp_path / "run", GUARDED, net=net, body=body)
    torch._dynamo.reset()
    assert run.table("faults")["reason"].to_pylist() == ["compiled code is seen as a whole"]
    assert told(run).steps[0] == GUARDED


def test_a_run_without_faults_has_no_row(tmp_path):
    assert trained(tmp_path / "run", None).table("faults").num_rows == 0
