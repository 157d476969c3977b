"""Gradients inside reentrant activation checkpoints: they exist only while the backward pass computes a part again.

The values were measured in the first forward, which runs without gradient. When the backward pass comes to such a part,
it is traced a second time as it is computed, and hooks for its gradients are placed before they arrive; of what this
second trace measures, the gradients alone are kept, under the names of the first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradflow.recorder.buffer import Buffer
from gradflow.recorder.plans import Plans
from gradflow.recorder.taps import Taps
from gradflow.tracing.reentrant import checkpoints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from gradflow.statistics import Number


class _Gradients(Buffer):
    """Hands on the gradient columns of branches and layers, and those of the stream points that joins are."""

    def __init__(self, whole: Buffer, points: Mapping[str, str]) -> None:
        super().__init__()
        self._whole = whole
        self._points = points

    def put(self, table: str, name: str, values: Mapping[str, Number | None]) -> None:
        """See `Buffer.put`."""
        kept = {column: value for column, value in values.items() if column.startswith("grad_")}
        if not kept or table not in {"branches", "layers"}:
            return
        self._whole.put(table, name, kept)
        if table == "branches" and "grad_out_sq" in kept and name in self._points:
            self._whole.put("streams", self._points[name], {"grad_sq": kept["grad_out_sq"]})


class Recomputations:
    """The reentrant checkpoints of one sampled step."""

    def __init__(
        self, model: nn.Module, buffer: Buffer, *, rows: int, tables: frozenset[str],
        on_error: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self._model, self._buffer, self._rows = model, buffer, rows
        self._plans = Plans()
        self._tables = tables & {"branches", "layers"}
        self._on_error = on_error
        self._handles: list[RemovableHandle] = []
        self._traced: list[Taps] = []
        self._open: list[Taps] = []

    def expect(self, root: Any, points: Mapping[str, str]) -> None:
        """A backward pass from the autograd node `root` is about to run; `points` names stream points by branch."""
        for node in checkpoints(root):
            self._handles.append(node.register_prehook(lambda _grads: self._guarded(lambda: self._begin(points))))
            self._handles.append(node.register_hook(lambda _sent, _received: self._guarded(self._end)))

    def _begin(self, points: Mapping[str, str]) -> None:
        taps = Taps(
            self._model, _Gradients(self._buffer, points), self._plans, rows=self._rows, tables=self._tables,
            on_error=self._on_error, on_backward=lambda _loss: None, after_backward=lambda: None,
        )  # fmt: skip
        taps.tracer.recomputes = True
        taps.tracer.when_outermost_ends = taps.close_pass
        self._traced.append(taps)
        self._open.append(taps)
        taps.tracer.__enter__()

    def _end(self) -> None:
        if self._open:
            self._open.pop().tracer.__exit__(None, None, None)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever it is, the backward pass goes on)
            self._on_error(error)

    def close(self) -> None:
        """Take everything off again, also in the middle of a part."""
        while self._handles:
            self._handles.pop().remove()
        while self._open:
            self._end()
        while self._traced:
            self._traced.pop().close()
