"""The NaN guard: what breaks between sampled steps is recorded at its step, with its layer and direction."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from trainings import BATCH, TOKENS, WIDTH, ResidualMLP, Task, batches, fit, monitor, same, seed, trained, trainer

import gradflow
from gradflow import device_sums
from gradflow.statistics import sum_squares_each

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


@pytest.mark.parametrize(("how", "operation"), [("forward", "div"), ("backward", "InfiniteSlope")])
def test_a_step_that_breaks_between_sampled_ones_is_named_with_operation_layer_and_direction(tmp_path, how, operation):
    (finding,) = [f for f in gradflow.diagnose(run(Breaks(how), tmp_path / "run")) if f.code == "nonfinite"]
    assert finding.severity == "error"
    assert finding.steps[0] == BREAK
    assert (finding.evidence["direction"], finding.evidence["operation"]) == (how, operation)
    assert finding.where[:2] == (operation, "middle")
    assert f"{operation.lower()}, in the model's own forward, " in finding.claim.lower()


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


def guarded(model, directory, body, *, steps=8, **options):
    """Train by hand with the guard on; `body(model, step)` is what a step does."""
    seed()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    options = {"strict": True, **options}
    with gradflow.Recorder(model, optimizer, directory, every_n_steps=CADENCE, nan_guard=True, **options) as recorder:
        for step in range(steps):
            with recorder.step():
                optimizer.zero_grad()
                body(model, step)
                optimizer.step()
    return recorder


def nonfinite(run):
    (finding,) = [f for f in gradflow.diagnose(run) if f.code == "nonfinite"]
    return finding


def loss_of(model):
    return model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean()


def test_the_branch_around_the_broken_layer_is_named_too(tmp_path):
    run_ = run(Breaks("backward"), tmp_path / "run")
    branch = next(b.name for b in run_.branches if b.name.startswith("middle"))
    assert branch in nonfinite(run_).where


def test_gradients_of_parameters_tell_the_layer_and_the_finite_one_behind_it(tmp_path, monkeypatch):
    monkeypatch.setattr("gradflow.recorder.recording.Pass.backwards", lambda _: None)  # no operation is told
    claim = nonfinite(run(Breaks("backward"), tmp_path / "run")).claim
    assert "the gradient of the parameters of middle was the first" in claim
    assert "that of last, right before it, was finite" in claim


def test_the_second_micro_batch_of_a_step_can_be_the_broken_one(tmp_path):
    def body(model, _step):
        for _ in range(2):
            loss_of(model).backward()

    found = nonfinite(guarded(Breaks("forward"), tmp_path / "run", body).run)  # pass 5 is the second one of step 2
    assert found.steps[0] == BREAK // 2
    model = Breaks("forward")
    model.passes = -2  # pass 5 is then the second one of step 3, which is not sampled
    found = nonfinite(guarded(model, tmp_path / "other", body).run)
    assert (found.steps[0], found.where[:2], found.evidence["direction"]) == (3, ("div", "middle"), "forward")


def test_a_loss_that_breaks_by_itself_is_named_as_the_loss(tmp_path):
    def body(model, step):
        (loss_of(model) + (torch.inf if step == BREAK else 0.0)).backward()

    found = nonfinite(guarded(Breaks("never"), tmp_path / "run", body).run)
    assert (found.steps[0], found.where, found.evidence["direction"]) == (BREAK, ("loss",), "loss")


def test_weights_that_an_update_broke_are_told_from_a_broken_operation(tmp_path):
    def body(model, step):
        if step == BREAK:
            with torch.no_grad():
                model.middle.weight.fill_(torch.nan)
        loss_of(model).backward()

    found = nonfinite(guarded(Breaks("never"), tmp_path / "run", body).run)
    assert found.steps[0] == BREAK
    assert found.where[0] == "middle"
    assert "Weights were broken before that step, by the update of the step before it." in found.claim


class InPlace(nn.Module):
    """A layer whose output is overwritten by an activation, and by a residual sum that breaks at step `BREAK`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.passes = 0

    def forward(self, x):
        x = self.first(x)
        scale = torch.nan if self.passes == BREAK else 1.0
        self.passes += 1
        x += self.middle(torch.sin(x * scale))
        return self.last(x)


def test_an_output_that_is_overwritten_by_what_broke_later_is_not_blamed(tmp_path):
    found = nonfinite(guarded(InPlace(), tmp_path / "run", lambda model, _: loss_of(model).backward()).run)
    assert (found.steps[0], found.where[:2]) == (BREAK, ("mul", "middle"))
    assert found.evidence["last_finite_layer"] == "first"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_named_as_well(tmp_path, reentrant):
    class Checkpointed(Breaks):
        def forward(self, x):
            return checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)

    found = nonfinite(guarded(Checkpointed("forward"), tmp_path / "run", passes_of_checkpoint).run)
    assert found.where[:2] == ("div", "middle")
    assert found.evidence["direction"] == "forward"


def passes_of_checkpoint(model, step):
    """Each step runs the forward pass twice, the second time inside the backward pass."""
    model.passes = step
    loss = loss_of(model)
    model.passes = step
    loss.backward()


@pytest.mark.parametrize("way", ["module", "method", "function"])
def test_a_compiled_model_stays_compiled_and_its_broken_step_is_found(tmp_path, way):
    torch._dynamo.reset()
    compiled = CompileCounter()
    inner = ResidualMLP()
    model = torch.compile(inner, backend=compiled) if way == "module" else inner
    if way == "method":
        model.compile(backend=compiled)
    call = torch.compile(lambda x: inner(x), backend=compiled) if way == "function" else model
    def body(_model, step):
        x = torch.randn(BATCH, TOKENS, WIDTH) * (torch.nan if step == 6 else 1.0)
        call(x).square().mean().backward()

    recorder = guarded(model, tmp_path / "run", body, steps=8)
    torch._dynamo.reset()
    assert compiled.frame_count == (2 if way == "function" else 1)  # a compiled function shows when it has run
    assert nonfinite(recorder.run).steps[0] == 6


def test_without_a_place_the_finding_names_none(tmp_path):
    """A model compiled in place hides its layers and its backward pass: only the step can be told."""
    torch._dynamo.reset()
    model = ResidualMLP()
    model.compile(backend="eager")

    def body(model, step):
        (loss_of(model) * (torch.nan if step == 6 else 1.0)).backward()

    found = nonfinite(guarded(model, tmp_path / "run", body).run)
    torch._dynamo.reset()
    assert (found.steps[0], found.where, found.confidence) == (6, (), "low")


def test_a_fault_of_the_guard_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("gradflow.recorder.guard_taps.follows_gradients", fails)
    model = Breaks("never")
    recorder = guarded(model, tmp_path / "run", lambda model, _: loss_of(model).backward(), strict=False)
    assert recorder.stopped["step"] == 3
    assert model.passes == 8
    assert "training goes on" in caplog.text


def test_nothing_of_the_guard_stays_on_the_model_or_on_torch(tmp_path):
    model = Breaks("never")

    def body(model, step):
        hooked = len(model.middle._forward_hooks)
        assert hooked == 1, step
        loss_of(model).backward()

    guarded(model, tmp_path / "run", body)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_hugging_face_training_is_guarded_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    from gradflow.callbacks import GradientFlowCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Breaks("backward")

        def forward(self, x, labels=None):
            return {"loss": self.body(x).square().mean()}

    told = []
    callback = GradientFlowCallback(
        str(tmp_path / "run"), every_n_steps=CADENCE, nan_guard=True, report=False, on_finding=told.append, strict=True
    )
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        max_grad_norm=1.0, disable_tqdm=True,
    )  # fmt: skip
    data = [{"x": torch.randn(TOKENS, WIDTH), "labels": 0} for _ in range(32)]
    transformers.Trainer(Model(), options, train_dataset=data, callbacks=[callback]).train()
    (online,) = [f for f in told if f.code == "nonfinite"]
    assert (online.steps[0], online.evidence["direction"]) == (BREAK, "backward")
    assert online.where[:2] == ("body.InfiniteSlope", "body.middle")
    assert nonfinite(gradflow.load(tmp_path / "run")).where == online.where


def test_a_backward_fault_behind_a_mask_of_infinities_is_still_a_backward_one(tmp_path):
    class MaskedBreaks(Breaks):
        def __init__(self) -> None:
            super().__init__("backward")
            self.masked = Masked()

        def forward(self, x):
            return super().forward(self.masked(x))

    model = MaskedBreaks()
    model.passes = BREAK - 8  # a sampled step, at which the mask is measured
    found = nonfinite(run(model, tmp_path / "run"))
    assert (found.steps[0], found.evidence["direction"]) == (8, "backward")
    assert found.where


def test_the_fused_norms_of_a_device_are_those_of_the_host():
    tensors = [torch.randn(3, 5), torch.randn(7, dtype=torch.float64), torch.tensor([1.0, torch.nan]), torch.zeros(4)]
    fused = [float(device_sums.measure_each([x], ("square",))[0]["square"]) for x in tensors]
    assert fused == pytest.approx([float(x) for x in sum_squares_each(tensors)], rel=1e-6, nan_ok=True)
