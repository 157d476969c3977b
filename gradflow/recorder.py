"""Records a training run: which steps are sampled, where their figures go, and what happens when something fails."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

import torch
from torch import Tensor, nn

from gradflow.description import Description
from gradflow.directories import new_directory
from gradflow.errors import GradflowError, UsageError
from gradflow.headline import headline
from gradflow.recording import Finished, StepInProgress
from gradflow.schema import TABLES
from gradflow.store import Run, load
from gradflow.taps import Plans
from gradflow.writer import RunWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

log = logging.getLogger("gradflow")

FLUSH_STEPS = 20
"""Sampled steps after which measured rows are written."""
FLUSH_SECONDS = 30.0
"""Seconds after which measured rows are written."""


def is_sampled(count: int, every_n_steps: int) -> bool:
    """Whether the training step number `count` is sampled: 0, 1, 2, 4, 8, ... below the cadence, then its multiples."""
    return count % every_n_steps == 0 or (count < every_n_steps and count & (count - 1) == 0)


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

    On steps that are not sampled the model carries nothing of ours. A fault of ours never stops training: it is logged
    once, recording stops, and `run.json` says from when.

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
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the model that is trained")
        self.model = model
        self.optimizers = _listed(optimizer)
        self.every_n_steps = _positive("every_n_steps", every_n_steps)
        self.rows = _positive("rows", rows)
        self.tables = chosen_tables(tables)
        self.scaler = scaler
        self.strict = strict
        self.count = 0
        self.written = 0
        self.on_rows: Callable[[int, dict[str, float]], None] | None = None
        self.stopped: dict[str, Any] | None = None
        path = "gradflow" if dirpath is None else dirpath
        self.dirpath = new_directory(path) if claim else os.fspath(path)
        self.description = Description(run_id or uuid4().hex, _config(self), dict(info or {}))
        self._writer = RunWriter(self.dirpath, rank=rank)
        self._plans = Plans()
        self._current: StepInProgress | None = None
        self._open = False
        self._finished: list[Finished] = []
        self._flushed_at = time.monotonic()
        self._error: Exception | None = None
        self._handles: list[RemovableHandle] = []

    # ------------------------------------------------------------------ any training loop

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step: forward, backward and `optimizer.step()` run inside."""
        self.begin(self.count)
        self._hook_optimizers()
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

    def _hook_optimizers(self) -> None:
        """Their arithmetic is no pass; gradients are measured when they step if no backward pass was seen."""
        current = self._current
        if current is None:
            return

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not args and not kwargs:  # a closure runs its passes inside `step`
                current.rest()
                if current.microbatches == 0:
                    self.gradients(optimizer)

        def after(_optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            if self._current is current:
                current.watch()

        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))

    # ------------------------------------------------------------------ one call an event, for adapters

    @property
    def in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._open

    @property
    def sampling(self) -> StepInProgress | None:
        """The sampled step in progress, None between steps and in steps that are not sampled."""
        return self._current

    def begin(self, step: int) -> None:
        """An optimizer step begins; `step` is the number its rows will carry."""
        self._open = True
        if self.stopped is not None or not is_sampled(self.count, self.every_n_steps):
            return
        with self._faults():
            self._current = StepInProgress(
                self.model, step, self._plans, rows=self.rows, tables=self.tables, on_error=self._noted,
                scale=lambda: loss_scale(self.scaler),
            )  # fmt: skip
            self._current.start(self._learning_rate())

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
                parameters = None
                if optimizer is not None:
                    parameters = [p for group in optimizer.param_groups for p in group["params"]]
                self._current.gradients(parameters, scaled=is_scaled(self.scaler, optimizer))

    def end(self, *, trained: bool = True) -> None:
        """The optimizer step is over. A step without a backward pass (`trained` is False) leaves nothing."""
        self._open = False
        current, self._current = self._current, None
        if current is None:
            self.count += trained
            return
        with self._faults(current):
            self._unhook_optimizers()
            if current.microbatches == 0:
                current.abandon()
                return
            self.count += 1
            self._finished.append(current.finish())
            self._raise_noted()
            due = time.monotonic() - self._flushed_at > FLUSH_SECONDS
            if len(self._finished) >= FLUSH_STEPS or due:
                self.flush()

    def abort(self) -> None:
        """The step failed: nothing of it is kept, nothing of ours stays on the model."""
        self._open = False
        current, self._current = self._current, None
        if current is not None:
            with self._faults():
                self._unhook_optimizers()
                current.abandon()

    def flush(self) -> None:
        """Write what was measured."""
        self._flushed_at = time.monotonic()
        finished, self._finished = self._finished, []
        with self._faults():
            tables: dict[str, list[dict[str, Any]]] = {}
            for step in finished:
                self.description.add(step.structures, step.layers)
                rows_by_table = step.rows()
                if self.on_rows is not None:
                    self.on_rows(step.step, headline(rows_by_table))
                for table, rows in rows_by_table.items():
                    if table == "steps" or table in self.tables:
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
            self.flush()

    @property
    def run(self) -> Run:
        """What has been recorded so far."""
        if self.stopped is None:
            self.flush()
        try:
            return load(self.dirpath)
        except GradflowError:
            return Run(self._meta(), {})

    # ------------------------------------------------------------------ inside

    def _meta(self) -> dict[str, Any]:
        return self.description.meta(self.model, self.optimizers, stopped=self.stopped)

    def _learning_rate(self) -> Any:
        return self.optimizers[0].param_groups[0].get("lr") if self.optimizers else None

    def _unhook_optimizers(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _noted(self, error: Exception) -> None:
        """Keep the first fault that a hook reported until the step ends: inside the pass nothing may be torn down."""
        if self._error is None:
            self._error = error

    def _raise_noted(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextmanager
    def _faults(self, current: StepInProgress | None = None) -> Iterator[None]:
        """A fault of ours ends the recording, not the training."""
        try:
            yield
        except Exception as error:
            failed = current or self._current
            self._stop(error, self.count if failed is None else failed.step, failed)
            if self.strict:
                raise

    def _stop(self, error: Exception, step: int, current: StepInProgress | None) -> None:
        if self.stopped is not None:
            return
        self.stopped = {"step": step, "error": f"{type(error).__name__}: {error}"}
        self._current, self._finished = None, []
        if not self.strict:
            log.warning("gradflow stopped recording at step %d; training goes on", step, exc_info=error)
        try:
            self._unhook_optimizers()
            if current is not None:
                current.abandon()
            self._writer.write_meta(self._meta())
        except Exception:
            log.debug("run.json could not say that recording stopped", exc_info=True)


def chosen_tables(tables: Literal["all"] | Iterable[str]) -> frozenset[str]:
    """The tables asked for, checked."""
    names = set(TABLES) if tables == "all" else {tables} if isinstance(tables, str) else set(tables)
    unknown = names - set(TABLES)
    if unknown:
        raise UsageError(f"expected tables among {', '.join(TABLES)}, got {', '.join(sorted(map(str, unknown)))}")
    return frozenset(names)


def loss_scale(scaler: Any) -> Tensor | float | None:
    """The scale that a GradScaler multiplies losses by, as a tensor on the device; None without one."""
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return float(scaler.get_scale()) if scale is None else scale


def is_scaled(scaler: Any, optimizer: Any) -> bool:
    """Whether the loss scale is still in the gradients of an optimizer (it unscales inside its own step)."""
    if scaler is None or not scaler.is_enabled():
        return False
    state = scaler._per_optimizer_states.get(id(optimizer)) if optimizer is not None else None  # noqa: SLF001
    return state is None or getattr(state.get("stage"), "name", "") == "READY"


def _listed(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"expected {name} to be an integer of at least 1, got {value!r}")
    return value


def _config(recorder: Recorder) -> dict[str, Any]:
    return {
        "every_n_steps": recorder.every_n_steps, "rows": recorder.rows, "tables": sorted(recorder.tables),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
