"""The callback in a real Trainer: what it records, when, where, and what it leaves behind."""

from __future__ import annotations

import copy
import logging
import pickle

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from trainings import (
    WIDTH,
    ResidualMLP,
    Task,
    Transformer,
    batches,
    fit,
    half,
    monitor,
    seed,
    traces,
    trained,
    trainer,
)

import gradflow
from gradflow.callbacks import GradientFlowMonitor
from gradflow.errors import UsageError


def column(run, table, name, **where):
    rows = run.table(table).to_pylist()
    return [row[name] for row in rows if all(row[key] == value for key, value in where.items())]


# ---------------------------------------------------------------- what is recorded


def test_cadence_is_powers_of_two_and_then_multiples(tmp_path):
    done = trained(tmp_path, lambda: Task(ResidualMLP()), every=8, data=lambda: batches(26))
    assert done.monitor.run.steps == [0, 1, 2, 4, 8, 16, 24]


def test_every_table_is_filled_and_named(tmp_path):
    run = trained(tmp_path, lambda: Task(Transformer()), every=1).monitor.run
    assert [branch.name for branch in run.branches] == [f"net.blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    for table in ("steps", "branches", "layers", "parameters", "streams"):
        assert len(set(column(run, table, "step"))) == 6, table
    assert all(value > 0 for name in ("grad_fork_sq", "grad_branch_sq", "gain") for value in column(run, "branches", name))
    assert run.meta["model"] == "Task"
    assert run.meta["optimizers"][0]["class"] == "AdamW"
    assert run.meta["started"].startswith("20")


def test_loss_gradient_norm_and_rate_are_those_of_training(tmp_path):
    class Watched(Task):
        def on_before_optimizer_step(self, optimizer):
            squares = [p.grad.double().square().sum() for p in self.parameters() if p.grad is not None]
            self.norms = [*getattr(self, "norms", []), float(sum(squares).sqrt())]

    done = trained(tmp_path, lambda: Watched(Transformer()), every=1, gradient_clip_val=1e-3)
    run = done.monitor.run
    assert column(run, "steps", "loss") == pytest.approx([float(x) for x in done.losses], rel=1e-6)
    assert column(run, "steps", "grad_norm") == pytest.approx(done.module.norms, rel=1e-5)
    assert column(run, "steps", "learning_rate") == [1e-2] * 6


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_loss_scale_is_divided_out(scaled, optimizer, tmp_path):
    plain = trained(tmp_path / "a", lambda: Task(ResidualMLP(), optimizer), every=1, data=lambda: batches(1)).monitor.run
    mixed = trained(tmp_path / "b", lambda: Task(ResidualMLP(), optimizer), every=1, data=lambda: batches(1), **(half() if scaled else {})).monitor.run
    assert column(mixed, "steps", "loss_scale") == [65536.0 if scaled else 1.0]
    for table, name in [("steps", "grad_norm"), ("steps", "loss"), ("branches", "grad_fork_sq"), ("parameters", "grad_max"), ("layers", "grad_out_sq")]:
        assert column(mixed, table, name) == pytest.approx(column(plain, table, name), rel=0.05), name


def test_micro_batches_add_up_in_one_step(tmp_path):
    whole = trained(tmp_path / "a", lambda: Task(ResidualMLP(), "sgd"), every=1, data=lambda: batches(3, batch=8)).monitor.run
    parts = trained(tmp_path / "b", lambda: Task(ResidualMLP(), "sgd"), every=1, data=lambda: batches(6, batch=4), accumulate_grad_batches=2).monitor.run
    assert parts.steps == whole.steps == [0, 1, 2]
    assert column(parts, "steps", "microbatches") == [2, 2, 2]
    for table, names in {"branches": ["n", "skip_sq", "branch_sq", "dot", "out_sq"], "parameters": ["weight_sq", "update_sq"], "layers": ["out_sum", "zeros"]}.items():
        for name in names:
            assert column(parts, table, name) == pytest.approx(column(whole, table, name), rel=1e-3), name


def test_closures_of_lbfgs_are_counted(tmp_path):
    run = trained(tmp_path, lambda: Task(ResidualMLP(), "lbfgs"), every=1).monitor.run
    evaluations = column(run, "steps", "microbatches")
    assert all(2 <= count <= 4 for count in evaluations)
    n = column(run, "branches", "n", branch="net.layers.0")
    assert n == [count * 4 * 5 * WIDTH for count in evaluations]


class Two(Task):
    """Two optimizers a batch: `global_step` rises by two."""

    def __init__(self) -> None:
        super().__init__(ResidualMLP())
        self.other = nn.Linear(WIDTH, 1)
        self.automatic_optimization = False
        self.norms = []

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.net, self.other), strict=True):
            loss = net(batch).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)))
            optimizer.step()
            self.losses.append(loss.detach())
        optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.net, self.other)]


def test_two_optimizers_by_hand_are_one_step_measured_before_clipping(tmp_path):
    done = trained(tmp_path, Two, every=2)
    run = done.monitor.run
    assert run.steps == [0, 2, 4, 8]
    assert column(run, "steps", "microbatches") == [2] * 4
    squares = {}
    for row in run.table("parameters").to_pylist():
        key = row["step"], row["parameter"].split(".")[0]
        squares[key] = squares.get(key, 0) + row["grad_sq"]
    for step in run.steps:
        assert squares[step, "net"] ** 0.5 == pytest.approx(done.module.norms[step], rel=1e-5)
        assert squares[step, "other"] ** 0.5 == pytest.approx(done.module.norms[step + 1], rel=1e-5)


def test_teacher_without_gradient_is_its_own_occurrence(tmp_path):
    class Student(Task):
        def computed(self, batch):
            with torch.no_grad():
                target = self.net(batch)
            return (self.net(batch * 2) - target).square().mean()

    run = trained(tmp_path, lambda: Student(ResidualMLP()), every=1, data=lambda: batches(1)).monitor.run
    rows = {row["branch"]: row for row in run.table("branches").to_pylist()}
    without = [name for name, row in rows.items() if row["grad_fork_sq"] is None]
    assert len(rows) == 4
    assert len(without) == 2
    assert column(run, "steps", "microbatches") == [1]


@pytest.mark.parametrize("checkpointing", ["yes", "reentrant"])
def test_recomputation_counts_nothing_twice(checkpointing, tmp_path):
    make = lambda how: lambda: Task(Transformer(checkpointing=how, dropout=0.0))
    plain = trained(tmp_path / "a", make("no"), every=1, data=lambda: batches(2)).monitor.run
    saved = trained(tmp_path / "b", make(checkpointing), every=1, data=lambda: batches(2)).monitor.run
    for table in ("branches", "layers", "streams", "parameters"):
        expected, found = plain.table(table).to_pylist(), saved.table(table).to_pylist()
        assert len(found) == len(expected), table
        for a, b in zip(expected, found, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                if key == "gradient_share" and checkpointing == "reentrant":
                    assert b[key] is None  # the gradients of a whole stream never stand together
                    continue
                expected = a[key] if isinstance(a[key], (str, type(None))) else pytest.approx(a[key], rel=1e-4, abs=1e-9)
                assert b[key] == expected, (table, key, a, b)


class Skips(Task):
    def training_step(self, batch, batch_idx):
        return None if batch_idx in {0, 3} else super().training_step(batch, batch_idx)


def test_batch_without_loss_adds_nothing(tmp_path):
    run = trained(tmp_path, lambda: Skips(ResidualMLP()), every=1).monitor.run
    assert run.steps == [1, 2, 4, 5]


def test_validation_inside_an_epoch_is_not_recorded(tmp_path):
    plain = trained(tmp_path / "a", lambda: Task(ResidualMLP()), every=1).monitor.run
    checked = trained(tmp_path / "b", lambda: Task(ResidualMLP()), every=1, validation=batches, val_check_interval=1).monitor.run
    assert checked.table("branches").equals(plain.table("branches"))
    assert checked.table("layers").equals(plain.table("layers"))


def test_evaluation_alone_records_nothing(tmp_path):
    module, watching = Task(ResidualMLP()), monitor(tmp_path)
    made = trainer(tmp_path, watching)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.validate(module, batches(), verbose=False)
        made.test(module, batches(), verbose=False)
        made.predict(module, batches())
    assert watching.run.steps == []
    assert not (tmp_path / "gradflow").exists()


@pytest.mark.parametrize("option", [{"fast_dev_run": True}, {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}])
def test_trial_runs_write_nothing(option, tmp_path):
    watching = monitor(tmp_path)
    fit(trainer(tmp_path, watching, **option), Task(ResidualMLP()))
    assert watching.run.steps == []
    assert watching.findings == []
    assert list(tmp_path.iterdir()) == []


def test_tuners_write_nothing(tmp_path):
    import warnings

    class Tuned(Task):
        def __init__(self) -> None:
            super().__init__(ResidualMLP())
            self.lr, self.batch_size = 1e-3, 2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(32, 5, WIDTH), batch_size=self.batch_size)

        val_dataloader = train_dataloader

    module, watching = Tuned(), monitor(tmp_path)
    made = trainer(tmp_path, watching, max_epochs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = pl.tuner.Tuner(made)
        tuner.scale_batch_size(module, max_trials=2, steps_per_trial=1)
        tuner.lr_find(module, num_training=6)
    assert module.batch_size > 2
    assert not (tmp_path / "gradflow").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module)
    assert watching.run.steps[:3] == [0, 1, 2]


# ---------------------------------------------------------------- the model is left as found


class Fails(Task):
    """Raises at a place, in a sampled step."""

    def __init__(self, place: str, error: BaseException) -> None:
        super().__init__(ResidualMLP())
        self.place, self.error = place, error
        self.net.head.register_forward_pre_hook(self._in_forward)
        self.net.inner.weight.register_hook(self._in_backward)

    def _fail(self, place):
        if place == self.place and self.trainer.global_step >= 2:
            raise self.error

    def _in_forward(self, module, args):
        self._fail("forward")

    def _in_backward(self, gradient):
        self._fail("backward")

    def training_step(self, batch, batch_idx):
        self._fail("training_step")
        loss = super().training_step(batch, batch_idx)
        self._fail("after forward")
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self._fail("optimizer")

    def on_train_batch_start(self, batch, batch_idx):
        self._fail("batch start")

    def on_train_batch_end(self, *args):
        self._fail("batch end")

    def on_before_zero_grad(self, optimizer):
        self._fail("zero grad")


PLACES = ["forward", "backward", "training_step", "after forward", "optimizer", "batch start", "batch end", "zero grad"]


@pytest.mark.parametrize("error", [ValueError("theirs"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_of_ours_remains_after_an_exception(place, error, tmp_path):
    module, watching = Fails(place, error), monitor(tmp_path)
    before = traces(module)
    expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)  # Lightning exits on an interrupt
    with pytest.raises(expected) as caught:
        fit(trainer(tmp_path, watching), module)
    if expected is ValueError:
        assert caught.value is error
    after = traces(module)
    for state in (before, after):
        for key in [k for k in state if k.endswith("__dict__")]:
            state.pop(key)
    assert after == before
    assert watching.run.steps == [0, 1]
    assert watching.run.meta["stopped"] is None


def test_nothing_of_ours_remains_between_steps(tmp_path):
    module = Task(Transformer())
    seen = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):  # stands before the monitor
            seen.append(traces(pl_module.net, *trainer.optimizers))

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(traces(pl_module.net, *trainer.optimizers))

    fit(trainer(tmp_path, Looks(), monitor(tmp_path, 1)), module)
    without = []
    fit(trainer(tmp_path, Looks()), Task(Transformer()))
    assert len(seen) == 14
    assert all(state == seen[0] for state in seen)
    assert seen[0]["modes"] == 0
    assert not [key for key in seen[0] if key.endswith("_hooks")]
    assert seen[0]["optimizer 0"] == seen[7]["optimizer 0"]
    assert without == []


def test_steps_that_are_not_sampled_carry_nothing(tmp_path):
    seen = []

    class Looks(Task):
        def training_step(self, batch, batch_idx):
            seen.append((len(self.net.inner._forward_hooks), torch._C._len_torch_function_stack()))
            return super().training_step(batch, batch_idx)

    trained(tmp_path, lambda: Looks(ResidualMLP()), every=4)
    assert seen == [(1, 1), (1, 1), (1, 1), (0, 0), (1, 1), (0, 0)]


def test_epoch_that_a_hook_ends_leaves_no_step_open(tmp_path):
    class Ends(Task):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def on_train_epoch_end(self):
            self.seen = [*getattr(self, "seen", []), torch._C._len_torch_function_stack()]

    done = trained(tmp_path, lambda: Ends(ResidualMLP()), every=1, max_epochs=2)
    assert done.module.seen == [0, 0]
    assert done.monitor.run.steps == [0, 1, 2, 3]


def test_training_that_is_told_to_stop_is_recorded_to_its_end(tmp_path):
    class Stops(Task):
        def training_step(self, batch, batch_idx):
            self.trainer.should_stop = self.trainer.should_stop or batch_idx == 2
            return super().training_step(batch, batch_idx)

    done = trained(tmp_path, lambda: Stops(ResidualMLP()), every=1, max_epochs=-1)
    assert done.monitor.run.steps == [0, 1, 2]
    assert torch._C._len_torch_function_stack() == 0


def test_copies_made_inside_a_step_carry_nothing_of_ours(tmp_path):
    class Copies(Task):
        def computed(self, batch):
            loss = super().computed(batch)
            self.twin = [copy.deepcopy(self.net), pickle.loads(pickle.dumps(self.net))]
            return loss

    done = trained(tmp_path, lambda: Copies(ResidualMLP()), every=1, data=lambda: batches(1))
    for twin in done.module.twin:
        twin(torch.randn(2, 5, WIDTH))
        hooks = [hook for m in twin.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert all(hook.__name__ == "_nothing" for hook in hooks)
    assert len(done.monitor.run.branches) == 2


def test_modes_of_the_model_may_begin_and_end_across_ours(tmp_path):
    class Contexts(Task):
        def __init__(self) -> None:
            super().__init__(ResidualMLP())
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            with torch.device("cpu"):
                loss = self.net(batch).square().mean()
                self.manual_backward(loss)
            with torch.device("meta"):
                made = torch.ones(2)
            assert made.device.type == "meta"
            self.optimizers().step()
            self.losses.append(torch.ones(2).device.type)

    done = trained(tmp_path, Contexts, every=1)
    assert done.losses == ["cpu"] * 6
    assert done.monitor.run.steps == [0, 1, 2, 3, 4, 5]
    assert torch._C._len_torch_function_stack() == 0


# ---------------------------------------------------------------- findings, loggers, options


def test_findings_reach_a_callable_and_one_that_raises_changes_nothing(tmp_path, caplog):
    heard = []

    def listen(finding):
        heard.append(finding)
        raise RuntimeError("theirs")

    class Blocked(Task):
        def computed(self, batch):
            return self.net(batch).square().mean() * float("nan")

    done = trained(tmp_path, lambda: Blocked(ResidualMLP()), every=None)
    seed()
    watching = monitor(tmp_path, 1, on_finding=listen, strict=False)
    fit(trainer(tmp_path, watching), Blocked(ResidualMLP()), batches(12))
    assert heard
    assert watching.run.meta["stopped"] is None
    assert len(watching.run.steps) == 12
    assert "the on_finding callable failed" in caplog.text
    assert done.monitor is None


def test_error_stops_training_cleanly_if_asked(tmp_path):
    class Broken(Task):
        def computed(self, batch):
            return self.net(batch).square().mean() * float("nan")

    watching = monitor(tmp_path, 1, on_finding="stop")
    made = trainer(tmp_path, watching, max_epochs=50)
    fit(made, Broken(ResidualMLP()))
    assert made.state.finished
    assert 8 <= made.global_step < 100
    assert any(finding.code == "nonfinite" for finding in watching.findings)


def test_loggers_get_figures_at_the_step_they_were_measured(tmp_path):
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    seed()
    watching = monitor(tmp_path, 2)
    fit(trainer(tmp_path, watching, logger=loggers), Task(Transformer()))
    import csv

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("gradflow/grad_norm")]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 4]
    assert [float(row["gradflow/grad_norm"]) for row in rows] == pytest.approx(column(watching.run, "steps", "grad_norm"), rel=1e-5)
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("gradflow/branch_ratio_median")] == [0, 1, 2, 4]


def test_logger_that_raises_is_reported_and_recording_goes_on(tmp_path, caplog):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith("gradflow/") for name in metrics):
                raise OSError("theirs")

    watching = monitor(tmp_path, strict=False)
    fit(trainer(tmp_path, watching, logger=Broken(tmp_path)), Task(ResidualMLP()))
    assert watching.run.meta["stopped"] is None
    assert len(watching.run.steps) == 6
    assert "a logger did not take gradflow's figures" in caplog.text


def test_report_is_written_into_the_run(tmp_path):
    watching = monitor(tmp_path, 2, report=True, log=False)
    fit(trainer(tmp_path, watching), Task(ResidualMLP()))
    assert "<html" in (tmp_path / "gradflow" / "report.html").read_text()


def test_run_goes_beside_the_logs_by_default(tmp_path):
    watching = GradientFlowMonitor(report=False)
    made = trainer(tmp_path, watching, logger=CSVLogger(tmp_path))
    fit(made, Task(ResidualMLP()))
    assert gradflow.load(f"{made.log_dir}/gradflow").steps == [0, 1, 2, 4]


def test_run_can_be_read_while_training_goes_on(tmp_path):
    seen = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.callbacks[0].run.steps)

    watching = monitor(tmp_path)
    fit(trainer(tmp_path, watching, Reads()), Task(ResidualMLP()))
    assert seen == [list(range(i + 1)) for i in range(6)]


@pytest.mark.parametrize(
    "options",
    [{"every_n_steps": 0}, {"every_n_steps": 2.5}, {"rows": True}, {"tables": ["nothing"]}, {"on_finding": "panic"}],
)
def test_option_that_cannot_be_is_refused_at_once(options):
    with pytest.raises(UsageError):
        GradientFlowMonitor(**options)


def test_only_the_tables_asked_for_are_recorded(tmp_path):
    watching = monitor(tmp_path, tables=["branches"])
    fit(trainer(tmp_path, watching), Task(ResidualMLP()))
    assert watching.run.table("branches").num_rows == 12
    assert watching.run.table("steps").num_rows == 6
    assert [watching.run.table(name).num_rows for name in ("layers", "parameters", "streams")] == [0, 0, 0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_callback_copies_and_pickles_before_training(copied, tmp_path):
    watching = copied(GradientFlowMonitor(tmp_path / "gradflow", every_n_steps=3, report=False, tables=["layers"]))
    assert isinstance(watching, (pl.Callback, unified.Callback))
    fit(trainer(tmp_path, watching), Task(ResidualMLP()))
    assert watching.run.steps == [0, 1, 2, 3]
    assert copied(watching).every_n_steps == 3


def test_copied_callback_starts_its_own_recording(tmp_path):
    watching = monitor(tmp_path)
    fit(trainer(tmp_path, watching), Task(ResidualMLP()))
    twin = copy.deepcopy(watching)
    assert twin.run.steps == []
    fit(trainer(tmp_path, twin), Task(ResidualMLP()))
    assert (tmp_path / "gradflow-1" / "run.json").exists()


def test_logging_is_quiet_in_a_healthy_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "gradflow"):
        fit(trainer(tmp_path, GradientFlowMonitor(tmp_path / "gradflow", report=False)), Task(Transformer()))
    assert [record for record in caplog.records if record.name == "gradflow"] == []
