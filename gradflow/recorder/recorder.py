"""Records a training run: which steps are sampled, where their figures go, and what happens when something fails."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

from torch import Tensor, nn

from gradflow.errors import GradflowError, UsageError
from gradflow.headline import headline
from gradflow.recorder.description import Description
from gradflow.recorder.guard import TABLES as GUARDED
from gradflow.recorder.guard import Guard
from gradflow.recorder.options import absolute, chosen_tables, is_sampled, listed, positive
from gradflow.recorder.plans import Plans
from gradflow.recorder.recording import Finished, StepInProgress
from gradflow.recorder.scaling import is_scaled, loss_scale
from gradflow.recorder.sharding import owned_by
from gradflow.recorder.stepping import OptimizerHooks
from gradflow.schema import TABLES
from gradflow.store import Run, load
from gradflow.store.directories import new_directory
from gradflow.store.writer import RunWriter

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    from torch.optim import Optimizer

log = logging.getLogger("gradflow")

ALWAYS = frozenset({"steps", "faults"})
"""Tables that are written whatever is asked for."""
FLUSH_STEPS = 20
"""Sampled steps after which measured rows are written."""
FLUSH_SECONDS = 30.0
"""Seconds after which measured rows are written."""


class Recorder:
    """Records how signal and gradient flow through a model while any training loop trains it.

    ```python
    recorder = gradflow.Recorder(model, optimizer, "runs/gradflow")
    for batch in data:
        with recorder.step():
            loss = model(batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.close()
    ```

    On steps that are not sampled the model carries nothing of ours (but for `nan_guard`). A fault of ours never stops
    training: it is logged once, recording stops, and `run.json` says from when.

    Args:
        model: The module that is trained.
        optimizer: Its optimizer, or several: their gradients are measured before clipping where `loss.backward()` is
            called inside `step()`, else as they stand when the optimizer steps.
        dirpath: Directory of the run, local or an fsspec URL; `gradflow` in the working directory by default. A run
            that is already there is left alone: the next free `<dirpath>-<n>` is taken.
        every_n_steps: Cadence: steps 0, 1, 2, 4, 8, ... are sampled up to it, then its multiples.
        rows: Positions in the fixed sample that geometry and ledgers are computed on.
        tables: `"all"`, or the names of the tables to record.
        scaler: The `torch.amp.GradScaler` in use, so that its scale can be divided out.
        nan_guard: Watch the steps between sampled ones too, for NaN and infinity alone: the first step with any is
            recorded, so that the finding names its operation, layer and direction. What that costs is in the README,
            Cost. Compiled models stay compiled; of them the step is told, and their inside is not. On a device the
            operation is not told.
        strict: Raise on a fault of ours instead of switching recording off.
        info: What `run.json` should say besides (`precision`, `world_size`, ...).

    Raises:
        UsageError: An argument does not fit.
        RunError: The directory cannot be made.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None,
        dirpath: str | os.PathLike[str] | None = None, *, every_n_steps: int = 50, rows: int = 256,
        tables: Literal["all"] | Iterable[str] = "all", scaler: Any = None, strict: bool = False, rank: int = 0,
        claim: bool = True, run_id: str | None = None, info: dict[str, Any] | None = None,
        nan_guard: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model that is trained")
        self.model = model
        self.optimizers = listed(optimizer)
        self.every_n_steps = positive("every_n_steps", every_n_steps)
        self.rows = positive("rows", rows)
        self.tables = chosen_tables(tables)
        self.scaler = scaler
        self.strict = strict
        self._rank = rank
        self.count = 0
        self.written = 0
        self.on_rows: Callable[[int, dict[str, float]], None] | None = None
        self.stopped: dict[str, Any] | None = None
        self.nan_guard = nan_guard
        self._guard = Guard() if nan_guard else None
        path = "gradflow" if dirpath is None else dirpath
        self.dirpath = new_directory(absolute(path)) if claim else absolute(path)
        self.description = Description(run_id or uuid4().hex, _config(self), dict(info or {}))
        self._writer = RunWriter(self.dirpath, rank=rank)
        self._plans = Plans()
        self._rooms: dict[str, Tensor] = {}
        self._current: StepInProgress | None = None
        self._open = False
        self._finished: list[Finished] = []
        self._flushed_at = time.monotonic()
        self._error: Exception | None = None
        self._hooks: OptimizerHooks | None = None
        self._again = True
        if run_id is not None:
            self.description.resume(self.dirpath)
        self._writer.write_meta(self._meta())

    # ------------------------------------------------------------------ any training loop

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step: forward, backward and `optimizer.step()` run inside."""
        self.begin(self.count)
        try:
            yield
        except BaseException:
            self.abort()
            raise
        self.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ one call an event, for adapters

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._open

    @property
    def sampling(self) -> StepInProgress | None:
        """The sampled step in progress, None between steps and in steps that are not sampled."""
        return self._current

    def begin(self, step: int, *, again: bool = True) -> None:
        """An optimizer step begins; `step` is the number its rows will carry.

        `again` says that another pass may follow when an optimizer has stepped (loops by hand, several optimizers).
        """
        self._open = True
        sampled = is_sampled(self.count, self.every_n_steps)
        if self.stopped is not None or not (sampled or self._guard):
            return
        with self._faults(step):
            self._again = again
            self._current = StepInProgress(
                self.model, step, self._plans, rows=self.rows, tables=self.tables,
                guard=None if sampled or self._guard is None else self._guard.known, on_error=self._noted,
                scale=lambda: loss_scale(self.scaler), owned=owned_by(self.model, self._rank), rooms=self._rooms,
            )  # fmt: skip
            self._hooks = OptimizerHooks(
                self.optimizers, before=self._before_step, after=self._after_step, watch=self.watch, rest=self.rest
            )
            self._current.start(self._learning_rate())

    def _before_step(self, optimizer: Optimizer, has_closure: bool) -> None:
        """An optimizer's arithmetic is no pass, and the gradients that it is given stand."""
        self.rest()
        if not has_closure:
            self._settle(optimizer)

    def _after_step(self, optimizer: Optimizer) -> None:
        self._settle(optimizer)
        if self._again:
            self.watch()

    def _settle(self, optimizer: Optimizer) -> None:
        if self._current is not None and self._again:
            with self._faults():
                self._current.settle(_parameters_of(optimizer), scaled=is_scaled(self.scaler, optimizer))

    def watch(self) -> None:
        """What runs from here belongs to a pass (another micro-batch of the step)."""
        if self._current is not None:
            with self._faults():
                self._current.watch()

    def rest(self) -> None:
        """What runs from here is not part of a pass."""
        if self._current is not None:
            with self._faults():
                self._current.rest()

    def backward(self, loss: Tensor | None) -> None:
        """The backward pass of `loss` is about to run."""
        if self._current is not None:
            with self._faults():
                self._current.backward(loss, loss_scale(self.scaler))

    def zeroed(self) -> None:
        """The gradients were set to zero."""
        if self._current is not None:
            self._current.zeroed()

    def gradients(self, optimizer: Optimizer | None = None) -> None:
        """The gradients stand as backward left them (of one optimizer's parameters, or of all)."""
        if self._current is not None:
            with self._faults():
                parameters = None if optimizer is None else _parameters_of(optimizer)
                self._current.gradients(parameters, scaled=is_scaled(self.scaler, optimizer))

    def end(self, *, trained: bool = True) -> None:
        """The optimizer step is over. A step without a backward pass (`trained` is False) leaves nothing."""
        self._open = False
        current = self._current
        if current is None:
            self.count += trained
            return
        with self._faults():
            self._unhook()
            if current.microbatches == 0:
                current.abandon()
                self._raise_noted()
            else:
                finished = current.finish()
                self._raise_noted()
                self._take(finished)
        self.count += trained if current.guard else current.microbatches > 0
        leeway, self._current = current.leeway, None
        del current
        leeway.close()
        full = len(self._finished) >= FLUSH_STEPS or any(step.guard for step in self._finished)
        due = full or time.monotonic() - self._flushed_at > FLUSH_SECONDS
        if self._finished and due:
            self.flush()

    def _take(self, finished: Finished | None) -> None:
        """Keep a sampled step; of the guarded ones that at which something broke. None: no step is to come for now."""
        if self._guard is not None:
            hit = self._guard.judged(finished if finished is not None and finished.guard else None)
            if hit is not None:
                self._finished.append(hit)
        if finished is not None and not finished.guard:
            self._finished.append(finished)

    @property
    def alarms(self) -> int:
        """How often the guard has noticed that numbers stopped being finite."""
        return 0 if self._guard is None else self._guard.hits

    def abort(self) -> None:
        """The step failed: nothing of it is kept, nothing of ours stays on the model."""
        self._open = False
        current, self._current = self._current, None
        self._error = None
        if current is not None:
            with self._faults(current.step):
                try:
                    self._unhook()
                finally:
                    current.abandon()

    def flush(self) -> None:
        """Write what was measured."""
        self._flushed_at = time.monotonic()
        finished, self._finished = self._finished, []
        if not finished or self.stopped is not None:
            return
        with self._faults(finished[0].step):
            self._write(finished)

    def _write(self, finished: list[Finished]) -> None:
        """Write measured steps, in one part a table, and what the run says of itself."""
        tables: dict[str, list[dict[str, Any]]] = {}
        for step in finished:
            self.description.add(step.structures, step.layers)
            rows_by_table = step.rows()
            self.description.note(step.problems(rows_by_table))
            if self.on_rows is not None:
                self.on_rows(step.step, headline(rows_by_table))
            for table, rows in rows_by_table.items():
                if table in ALWAYS or table in (self.tables | GUARDED if step.guard else self.tables):
                    tables.setdefault(table, []).extend(rows)
        for table, rows in tables.items():
            columns = [column.name for column in TABLES[table] if column.name != "rank"]
            self._writer.append(table, {name: [row.get(name) for row in rows] for name in columns})
        self._writer.write_meta(self._meta())
        self._writer.flush()
        self.written += len(finished)

    def close(self) -> None:
        """Write everything; the recorder can go on afterwards."""
        self.abort()
        if self.stopped is None:
            with self._faults():
                self._take(None)
        self.flush()

    @property
    def run(self) -> Run:
        """What has been recorded so far."""
        self.flush()
        try:
            return load(self.dirpath)
        except (GradflowError, OSError):
            return Run(self._meta(), {})

    # ------------------------------------------------------------------ inside

    def _meta(self) -> dict[str, Any]:
        return self.description.meta(self.model, self.optimizers, stopped=self.stopped)

    def _learning_rate(self) -> Any:
        return self.optimizers[0].param_groups[0].get("lr") if self.optimizers else None

    def _unhook(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.remove()

    def _noted(self, error: Exception) -> None:
        """Keep the first fault that a hook reported until the step ends: inside the pass nothing may be torn down."""
        if self._error is None:
            self._error = error

    def _raise_noted(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextmanager
    def _faults(self, step: int | None = None) -> Iterator[None]:
        """A fault of ours ends the recording, not the training. `step` is the first step that it costs."""
        try:
            yield
        except Exception as error:
            if step is None:
                step = self.count if self._current is None else self._current.step
            self._stop(error, step)
            if self.strict:
                raise

    def _stop(self, error: Exception, step: int) -> None:
        """Recording is off for good: say so, once, and leave the model as it was found."""
        if self.stopped is not None:
            return
        current, self._current = self._current, None
        waiting, self._finished = self._finished, []
        self.stopped = {"step": step, "error": f"{type(error).__name__}: {error}"}
        if not self.strict:
            log.warning("gradflow stopped recording at step %d; training goes on", step, exc_info=error)
        _quietly(self._unhook)
        if current is not None:
            _quietly(current.abandon)
        if waiting and not _quietly(lambda: self._write(waiting)):  # measured before the fault
            self.stopped["step"] = waiting[0].step
        _quietly(lambda: self._writer.write_meta(self._meta()))


def _quietly(action: Callable[[], object]) -> bool:
    """Do what can still be done after a fault; whether it could."""
    try:
        action()
    except Exception:
        log.debug("not possible after a fault", exc_info=True)
        return False
    return True


def _config(recorder: Recorder) -> dict[str, Any]:
    return {
        "every_n_steps": recorder.every_n_steps, "rows": recorder.rows, "tables": sorted(recorder.tables),
        "nan_guard": recorder.nan_guard,
    }  # fmt: skip


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
