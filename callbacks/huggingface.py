"""transformers' Trainer events -> Recorder: the same monitor for `transformers.Trainer`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from gradflow.errors import RunError
from gradflow.recorder import Recorder
from gradflow.recorder.options import chosen_tables
from gradflow.watch import Reaction, Watch

from .common import Recorded, checked, chosen_directory, live_report, shielded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from gradflow.live import LiveReport
    from gradflow.records import Finding


class GradientFlowCallback(Recorded, TrainerCallback, ExportableState):
    """Records how signal and gradient flow through the residual branches of the model that a `Trainer` trains.

    Training ends in the same parameters, bit for bit, as without it. Sampled steps are 0, 1, 2, 4, 8, ... and then
    every `every_n_steps`.

    Args:
        dirpath: Directory of the run; `<output_dir>/gradflow` by default. Training that resumes from its checkpoint
            goes on there; any other that finds a run there takes a numbered directory beside it.
        every_n_steps: Cadence in optimizer steps.
        rows: Positions in the fixed sample that geometry and ledgers are computed on.
        tables: `"all"` or the names of the tables to record.
        on_finding: `"ignore"`, `"warn"`, `"stop"` (end training cleanly at an error), or a callable.
        report: Write `report.html` into the run's directory when training ends.
        nan_guard: Watch every step for NaN and infinity, not only sampled ones; README, Cost, has its price.
        strict: Raise on a fault of gradflow instead of switching recording off (for tests).

    Example:
        >>> from gradflow.callbacks import GradientFlowCallback
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[GradientFlowCallback()])  # doctest: +SKIP
    """

    def __init__(
        self, dirpath: str | Path | None = None, *, every_n_steps: int = 50, rows: int = 256,
        tables: Literal["all"] | Iterable[str] = "all", on_finding: Reaction | Callable[[Finding], object] = "warn",
        report: bool = True, nan_guard: bool = False, strict: bool = False,
    ) -> None:  # fmt: skip
        checked("GradientFlowCallback", every_n_steps=every_n_steps, rows=rows)
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.tables = tables if tables == "all" else tuple(sorted(chosen_tables(tables)))
        self.report = report
        self.nan_guard = nan_guard
        self.strict = strict
        self._watch = Watch(on_finding)
        self._recorder: Recorder | None = None
        self._live: LiveReport | None = None
        self._trainer: Any = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the trainer says about the run."""
        recorder = self._recorder
        known = {} if recorder is None else {"run_id": recorder.description.run_id, "count": recorder.count}
        return {"args": {}, "attributes": known}

    # ------------------------------------------------------------------ trainer events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Choose the directory, make the recorder, and stand around the trainer's training step."""
        callbacks: Any = state.stateful_callbacks or {}
        saved = callbacks.get(type(self).__name__, {}) if isinstance(callbacks, dict) else {}
        attributes = saved.get("attributes", {}) if isinstance(saved, dict) and state.global_step else {}
        self._trainer = _calling_trainer()
        self._recorder = self._guarded(lambda: self._made(args, given, attributes))
        if self._recorder is not None:
            self._recorder.count = int(attributes.get("count", 0))
            self._recorder.scaler = getattr(getattr(self._trainer, "accelerator", None), "scaler", None)
            self._surround(self._recorder)
        self._live = live_report(self._recorder, report=self.report)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An optimizer step begins; passes are watched while the trainer's training step runs."""
        if self._recorder is not None:
            self._recorder.begin(state.global_step, again=True)
            self._recorder.rest()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The optimizer has stepped."""
        recorder = self._recorder
        if recorder is None:
            return
        recorder.end()
        if state.is_world_process_zero and self._watch.due(recorder.written, recorder.alarms):
            stop = self._guarded(lambda: self._watch.react(recorder.run))
            control.should_training_stop = control.should_training_stop or (bool(stop) and args.world_size == 1)
        live = self._live
        if live is not None and live.due and state.is_world_process_zero:
            self._guarded(lambda: live.rewrite(lambda: recorder.run, state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what is left, judge it, and write the report."""
        self._release()
        recorder = self._recorder
        if recorder is None:
            return
        recorder.close()
        if state.is_world_process_zero:
            self._guarded(lambda: self._watch.react(recorder.run, final=True))
            live = self._live
            if live is not None:
                self._guarded(lambda: live.rewrite(lambda: recorder.run, state.global_step))

    # ------------------------------------------------------------------ inside

    def _made(self, args: TrainingArguments, given: dict[str, Any], saved: dict[str, Any]) -> Recorder:
        """The recorder of this training, in the directory that rank 0 chooses."""
        path = os.fspath(self.dirpath) if self.dirpath is not None else f"{args.output_dir}/gradflow"
        directory, run_id = _shared(args, lambda: chosen_directory(path, saved.get("run_id")))
        optimizer = given.get("optimizer")
        return Recorder(
            given["model"], getattr(optimizer, "optimizer", optimizer), directory, every_n_steps=self.every_n_steps,
            rows=self.rows, tables=self.tables, nan_guard=self.nan_guard, strict=self.strict,
            rank=args.process_index, claim=False, run_id=run_id,
            info={"world_size": args.world_size, "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "32"},
        )  # fmt: skip

    def _surround(self, recorder: Recorder) -> None:
        """Watch while the trainer's own training step runs, and leave the model as found whatever it raises."""
        trainer = self._trainer
        if trainer is None:
            return
        original = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            recorder.watch()
            try:
                return original(*args, **kwargs)
            except BaseException:
                self._release()
                recorder.close()
                raise
            finally:
                recorder.rest()

        trainer.training_step = training_step

    def _release(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            vars(trainer).pop("training_step", None)

    def _guarded(self, make: Callable[[], Any]) -> Any:
        return shielded(make, strict=self.strict, recorder=self._recorder)


def _calling_trainer() -> Any:
    """The Trainer whose event this is: events do not say."""
    frame = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _shared(args: TrainingArguments, choose: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """What rank 0 chooses, on every rank; its failure is everybody's."""
    chosen: list[Any] = [None]
    if args.process_index == 0:
        try:
            chosen = [choose()]
        except Exception as error:  # noqa: BLE001 (the other ranks wait for the answer)
            chosen = [f"{error}"]
    if args.world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)
    if not isinstance(chosen[0], tuple):
        raise RunError(str(chosen[0]))
    return chosen[0]
