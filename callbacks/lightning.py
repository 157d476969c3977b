"""Lightning's Trainer hooks -> Recorder: one callback for every Lightning namespace that is installed."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from gradflow.errors import RunError
from gradflow.recorder import Recorder
from gradflow.recorder.options import chosen_tables
from gradflow.watch import Reaction, Watch

from .common import Recorded, checked, chosen_directory, live_report, shielded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from pytorch_lightning import Callback as _Callback
    from pytorch_lightning import LightningModule, Trainer
    from torch import Tensor
    from torch.optim import Optimizer

    from gradflow.live import LiveReport
    from gradflow.records import Finding

log = logging.getLogger("gradflow")


def _bases() -> tuple[type, ...]:
    """`Callback` of every installed namespace: the classes are unrelated, and LightningCLI checks for its own."""
    found: list[type] = []
    for name in ("pytorch_lightning", "lightning.pytorch"):
        try:
            found.append(import_module(name).Callback)
        except ImportError:  # it is not installed, or not whole: the other one may be
            continue
    if not found:
        raise ImportError("expected pytorch-lightning or lightning to be installed, got neither; pip install lightning")
    return tuple(found)


if not TYPE_CHECKING:
    _Callback = type("_Callback", _bases(), {})


class GradientFlowMonitor(Recorded, _Callback):
    """Records how signal and gradient flow through the residual branches of the model that a Trainer trains.

    The model needs no change: branches are found in the training's own forward passes. Training ends in the same
    parameters, bit for bit, as without the monitor. Sampled steps are 0, 1, 2, 4, 8, ... and then every
    `every_n_steps`; on other steps the model carries nothing of ours.

    Logged to the trainer's loggers (`log=True`), once a sampled step: `gradflow/grad_norm` (L2 norm before clipping),
    `gradflow/branch_ratio_median` and `_min` (branch RMS over skip RMS, 1), `gradflow/gradient_first_over_last`
    (gradient RMS at the start of the longest stream over its end, 1), `gradflow/token_cosine_end` (1 means all tokens
    are the same), `gradflow/update_ratio_median` (update over weight, 1), `gradflow/nonfinite` (elements).

    Args:
        dirpath: Directory of the run; `<trainer.log_dir or default_root_dir>/gradflow` by default. A run that is there
            already is left alone and a numbered directory beside it is taken, unless training goes on from its
            checkpoint.
        every_n_steps: Cadence in training steps.
        rows: Positions in the fixed sample that geometry and ledgers are computed on.
        tables: `"all"` or the names of the tables to record (`"branches"`, `"streams"`, `"layers"`, `"parameters"`).
        on_finding: What to do about a finding: `"ignore"`, `"warn"` (once each on the logger `gradflow`), `"stop"`
            (warn, and end training cleanly at a severity of error), or a callable that is given the finding.
        report: Write `report.html` into the run's directory: at the end, and before it as often as it takes no more
            than a hundredth of the training time.
        log: Send summary figures to the trainer's loggers, and the overview of pictures to those that take images.
        nan_guard: Watch every step for NaN and infinity, not only sampled ones; README, Cost, has its price.
        strict: Raise on a fault of gradflow instead of switching recording off (for tests).

    Raises:
        UsageError: An option has a value that it cannot have.

    Example:
        >>> from gradflow.callbacks import GradientFlowMonitor
        >>> trainer = Trainer(callbacks=[GradientFlowMonitor()])  # doctest: +SKIP
    """

    def __init__(
        self, dirpath: str | Path | None = None, *, every_n_steps: int = 50, rows: int = 256,
        tables: Literal["all"] | Iterable[str] = "all", on_finding: Reaction | Callable[[Finding], object] = "warn",
        report: bool = True, log: bool = True, nan_guard: bool = False, strict: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        checked("GradientFlowMonitor", every_n_steps=every_n_steps, rows=rows)
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.tables = tables if tables == "all" else tuple(sorted(chosen_tables(tables)))
        self.report = report
        self.log = log
        self.nan_guard = nan_guard
        self.strict = strict
        self._watch = Watch(on_finding)
        self._recorder: Recorder | None = None
        self._live: LiveReport | None = None
        self._resumed: dict[str, Any] = {}
        self._stepped = False
        self._trained = False
        self._stop = False

    # ------------------------------------------------------------------ trainer hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What an earlier checkpoint said is not about this training; its own, if any, is loaded after this."""
        self._resumed = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the directory and make the recorder."""
        if self._idle(trainer):
            self._recorder = None
            return
        run_id = self._resumed.get("run_id")
        old = self._recorder
        if old is None or old.model is not pl_module or run_id not in {None, old.description.run_id}:
            self._recorder = self._guarded(lambda: self._made(trainer, pl_module))
        if self._recorder is not None:
            self._recorder.count = int(self._resumed.get("count", self._recorder.count))
            self._recorder.optimizers = list(trainer.optimizers)
            self._recorder.scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._recorder.on_rows = self._logger(trainer) if self.log else None
            self._stepped = self._trained = self._stop = False
        loggers = trainer.loggers if self.log else []
        self._live = self._guarded(lambda: live_report(self._recorder, report=self.report, loggers=loggers))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin an optimizer step, or go on with one that has several micro-batches."""
        recorder = self._recorder
        if recorder is None:
            return
        if recorder.in_step:
            recorder.watch()
        else:
            recorder.begin(trainer.global_step, again=not pl_module.automatic_optimization)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The pass is complete."""
        self._trained = True
        if self._recorder is not None:
            self._recorder.backward(loss)
            self._recorder.rest()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With manual optimization clipping may come next, and another pass in the same batch."""
        if self._recorder is not None and not pl_module.automatic_optimization:
            self._recorder.gradients()
            self._recorder.watch()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients stand as backward left them; clipping comes after this hook."""
        self._stepped = True
        if self._recorder is not None and pl_module.automatic_optimization:
            self._recorder.rest()
            self._recorder.gradients(optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """A closure that runs again starts from zero."""
        if self._recorder is not None:
            self._recorder.zeroed()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step if an optimizer has stepped."""
        recorder = self._recorder
        if recorder is None:
            return
        if self._stepped:
            recorder.end(trained=self._trained)
            self._stepped = self._trained = False
            self._judge(trainer)
            live = self._live
            if live is not None and live.due and trainer.is_global_zero:
                self._guarded(lambda: live.rewrite(lambda: recorder.run, trainer.global_step))
        else:
            recorder.rest()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluation is no part of a pass."""
        if self._recorder is not None:
            self._recorder.rest()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A place that all ranks reach: stop together."""
        self._stop_together(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A batch that was skipped from inside leaves a step open."""
        if self._recorder is not None and self._recorder.in_step:
            self._recorder.rest()
            if not self._trained:
                self._recorder.abort()
        self._stop_together(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left, judge it, and write the report."""
        recorder = self._recorder
        if recorder is not None:
            recorder.close()
        if trainer.world_size > 1 and not self._idle(trainer):
            trainer.strategy.barrier("gradflow")  # the report is about what all ranks have written
        if recorder is not None and trainer.is_global_zero:
            self._guarded(lambda: self._watch.react(recorder.run, final=True))
            live = self._live
            if live is not None:
                self._guarded(lambda: live.rewrite(lambda: recorder.run, trainer.global_step))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found; what was measured is written."""
        if self._recorder is not None:
            self._recorder.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Whatever ended training, nothing of ours stays on the model."""
        if self._recorder is not None and stage == "fit":
            self._recorder.abort()
            self._recorder.on_rows = None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The run's id and how far it is, so that resumed training goes on in the same directory."""
        if self._recorder is None:
            return dict(self._resumed)
        return {"run_id": self._recorder.description.run_id, "count": self._recorder.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember which run the checkpoint belongs to."""
        self._resumed = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the options, not the recording."""
        return {**self.__dict__, "_recorder": None, "_live": None}

    # ------------------------------------------------------------------ inside

    def _made(self, trainer: Trainer, pl_module: LightningModule) -> Recorder:
        """The recorder of this training, in the directory that rank 0 chooses."""
        root = trainer.log_dir or trainer.default_root_dir  # asks all ranks
        path = os.fspath(self.dirpath) if self.dirpath is not None else f"{os.fspath(root).rstrip('/')}/gradflow"
        chosen: tuple[str, str, str] = ("", "", "")
        if trainer.is_global_zero:
            try:
                chosen = (*chosen_directory(path, self._resumed.get("run_id")), "")
            except Exception as error:  # noqa: BLE001 (the other ranks wait for the answer)
                chosen = ("", "", f"{error}")
        directory, run_id, problem = trainer.strategy.broadcast(chosen)
        if problem:
            raise RunError(problem)
        return Recorder(
            pl_module, trainer.optimizers, directory, every_n_steps=self.every_n_steps, rows=self.rows,
            tables=self.tables, nan_guard=self.nan_guard, strict=self.strict,
            rank=trainer.global_rank, claim=False, run_id=run_id,
            info={"world_size": trainer.world_size, "precision": str(trainer.precision)},
        )  # fmt: skip

    def _judge(self, trainer: Trainer) -> None:
        """Look for findings while training goes on, ever more rarely, on rank 0."""
        recorder = self._recorder
        if recorder is None or not trainer.is_global_zero or not self._watch.due(recorder.written, recorder.alarms):
            return
        self._stop = bool(self._guarded(lambda: self._watch.react(recorder.run))) or self._stop
        if self._stop and trainer.world_size == 1:
            trainer.should_stop = True

    def _stop_together(self, trainer: Trainer) -> None:
        """With several ranks rank 0's wish to stop is shared where all ranks come by, and acted on by all at once."""
        if self._watch.reaction != "stop" or trainer.world_size == 1 or trainer.sanity_checking or self._idle(trainer):
            return
        stop = trainer.strategy.reduce_boolean_decision(self._stop, all=False)
        trainer.should_stop = trainer.should_stop or stop

    @staticmethod
    def _idle(trainer: Trainer) -> bool:
        """Whether this is no training that is recorded, by what all ranks know alike."""
        trial = bool(getattr(trainer, "fast_dev_run", False)) or bool(trainer.barebones)
        return trial or trainer.state.fn != "fit"

    def _logger(self, trainer: Trainer) -> Callable[[int, dict[str, float]], None]:
        def send(step: int, figures: dict[str, float]) -> None:
            for logger in trainer.loggers:
                try:
                    logger.log_metrics({f"gradflow/{name}": value for name, value in figures.items()}, step=step)
                except Exception:
                    log.warning("a logger did not take gradflow's figures", exc_info=True)

        return send

    def _guarded(self, make: Callable[[], Any]) -> Any:
        return shielded(make, strict=self.strict, recorder=self._recorder)
