"""Training that goes on: from a checkpoint, a second time, or beside a run that is already there."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint as UnifiedCheckpoint
from pytorch_lightning.callbacks import ModelCheckpoint
from trainings import ResidualMLP, Task, Transformer, batches, fit, monitor, same, seed, trainer

import gradflow


def saving(root):
    return ModelCheckpoint(root / "saved", save_top_k=-1, every_n_train_steps=1, filename="{step}")


def first(tmp_path, *, steps=12, every=2, make=lambda: Task(Transformer())):
    """A training of some steps with a checkpoint at each."""
    seed()
    module, watching = make(), monitor(tmp_path, every)
    fit(trainer(tmp_path, watching, saving(tmp_path), enable_checkpointing=True, max_steps=steps), module, batches(20))
    return module, watching


def resumed(tmp_path, step: int, *, steps=20, every=2, make=lambda: Task(Transformer()), root=None):
    module, watching = make(), monitor(root or tmp_path, every)
    made = trainer(tmp_path, watching, enable_checkpointing=False, max_steps=steps)
    fit(made, module, batches(20), ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"), weights_only=True)
    return module, watching


def test_resumed_training_goes_on_in_the_same_run(tmp_path):
    first(tmp_path, steps=8)
    before = gradflow.load(tmp_path / "gradflow")
    parts = {part.name for part in (tmp_path / "gradflow" / "branches").iterdir()}
    _, watching = resumed(tmp_path, 8)
    run = watching.run
    assert not (tmp_path / "gradflow-1").exists()
    assert run.steps == [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert run.meta["run_id"] == before.meta["run_id"]
    assert run.meta["started"] == before.meta["started"]
    assert parts < {part.name for part in (tmp_path / "gradflow" / "branches").iterdir()}
    assert [branch.name for branch in run.branches] == [branch.name for branch in before.branches]


def test_steps_recorded_after_the_checkpoint_are_recorded_once(tmp_path):
    first(tmp_path, steps=12)
    _, watching = resumed(tmp_path, 6)
    run = watching.run
    assert run.steps == [0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    steps = run.table("steps")["step"].to_pylist()
    assert steps == sorted(set(steps))
    assert run.table("branches").num_rows == 11 * 4


class BreaksAtLast(ResidualMLP):
    """Divides by zero in the last pass of a resumed training."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.left = passes

    def forward(self, x):
        self.left -= 1
        return super().forward(x if self.left else x / torch.zeros_like(x))


def test_the_nan_guard_goes_on_after_an_interruption(tmp_path):
    first(tmp_path, steps=6, every=100, make=lambda: Task(ResidualMLP()))
    module, watching = Task(BreaksAtLast(5)), monitor(tmp_path, 100, nan_guard=True)
    made = trainer(tmp_path, watching, enable_checkpointing=False, max_steps=11)
    fit(made, module, batches(20), ckpt_path=str(tmp_path / "saved" / "step=6.ckpt"), weights_only=True)
    assert watching.run.steps == [0, 1, 2, 4, 8, 10]
    (finding,) = [f for f in watching.findings if f.code == "nonfinite"]
    assert (finding.steps[0], finding.evidence["operation"]) == (10, "div")


def test_resumed_training_samples_as_if_it_had_not_stopped(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    _, watching = first(whole, steps=20, every=3)
    first(tmp_path, steps=7, every=3)
    _, again = resumed(tmp_path, 7, every=3)
    assert again.run.steps == watching.run.steps


def test_names_met_before_the_interruption_are_kept(tmp_path):
    class Shrinks(ResidualMLP):
        def forward(self, x):
            x = self.inner(x)
            for layer in self.layers if self.inner.weight.requires_grad else self.layers[:1]:
                x = x + torch.relu(layer(x))
            return self.head(x)

    def frozen():
        module = Task(Shrinks())
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
        return module

    first(tmp_path, steps=4, make=frozen)

    def smaller():
        module = frozen()
        module.net.inner.weight.requires_grad_(False)
        return module

    _, watching = resumed(tmp_path, 4, steps=8, make=smaller)
    assert [branch.name for branch in watching.run.branches] == ["net.layers.0", "net.layers.1"]
    assert watching.run.steps == [0, 1, 2, 4, 6]


def test_checkpoint_of_a_run_that_is_gone_starts_a_new_one(tmp_path):
    first(tmp_path, steps=4)
    _, watching = resumed(tmp_path, 4, steps=8, root=tmp_path / "elsewhere")
    assert watching.run.steps == [4, 5, 6, 8][:3] or watching.run.steps[0] == 4
    assert watching.run.meta["run_id"] != gradflow.load(tmp_path / "gradflow").meta["run_id"]


def test_checkpoint_of_another_namespace_and_weights_only(tmp_path):
    import lightning.pytorch as unified

    class UnifiedTask(unified.LightningModule):
        training_step, computed, configure_optimizers, forward = Task.training_step, Task.computed, Task.configure_optimizers, Task.forward

        def __init__(self) -> None:
            super().__init__()
            self.net, self.optimizer, self.loss, self.losses = ResidualMLP(), "sgd", None, []

    saves = UnifiedCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    watching = monitor(tmp_path, 1)
    fit(trainer(tmp_path, watching, saves, namespace=unified, enable_checkpointing=True, max_steps=3), UnifiedTask())
    state = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)["callbacks"]
    ours = next(value for key, value in state.items() if "GradientFlowMonitor" in key)
    assert ours == {"run_id": watching.run.meta["run_id"], "count": 3}


def test_second_fit_of_the_same_callback_goes_on(tmp_path):
    seed()
    module, watching = Task(ResidualMLP()), monitor(tmp_path, 1)
    made = trainer(tmp_path, watching)
    fit(made, module)
    assert watching.run.steps == list(range(6))
    made.fit_loop.max_epochs = 2
    fit(made, module)
    assert watching.run.steps == list(range(12))
    assert not (tmp_path / "gradflow-1").exists()


def test_second_fit_of_another_model_is_another_run(tmp_path):
    watching = monitor(tmp_path, 1)
    fit(trainer(tmp_path, watching), Task(ResidualMLP()))
    old = watching.run.meta["run_id"]
    fit(trainer(tmp_path, watching), Task(ResidualMLP()))
    assert watching.run.meta["run_id"] != old
    assert (tmp_path / "gradflow-1" / "run.json").exists()
    assert gradflow.load(tmp_path / "gradflow").meta["run_id"] == old


def test_training_beside_a_run_leaves_it_alone(tmp_path):
    first(tmp_path, steps=3)
    before = {path: path.read_bytes() for path in (tmp_path / "gradflow").rglob("*") if path.is_file()}
    _, watching = first(tmp_path, steps=3)
    assert watching.run.path == str(tmp_path / "gradflow-1")
    assert before == {path: path.read_bytes() for path in (tmp_path / "gradflow").rglob("*") if path.is_file()}


def test_reading_a_run_after_training_writes_nothing(tmp_path):
    _, watching = first(tmp_path, steps=3)
    import shutil

    shutil.rmtree(tmp_path / "gradflow")
    assert watching.run.steps == []
    assert not (tmp_path / "gradflow").exists()


def test_resumed_training_ends_in_the_same_bits(tmp_path):
    module, _ = first(tmp_path, steps=12)
    seed()
    bare = Task(Transformer())
    made = trainer(tmp_path, enable_checkpointing=False, max_steps=12)
    checkpoint = str(tmp_path / "saved" / "step=6.ckpt")
    fit(made, bare, batches(20), ckpt_path=checkpoint)
    seed()
    watched = Task(Transformer())
    fit(trainer(tmp_path, monitor(tmp_path, 1), enable_checkpointing=False, max_steps=12), watched, batches(20), ckpt_path=checkpoint)
    assert same(bare.state_dict(), watched.state_dict())
    assert module.losses


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 7, "tables": ["layers"]}])
def test_state_of_a_callback_that_never_trained_is_empty(options, tmp_path):
    watching = monitor(tmp_path, every=options.pop("every_n_steps", 1), **options)
    assert watching.state_dict() == {}
    copy.deepcopy(watching).load_state_dict({"run_id": "x", "count": 3})
    assert watching.state_dict() == {}
