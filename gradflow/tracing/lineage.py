"""The nodes of a running pass as bare rows, and what follows from them together: ancestors, features axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradflow.records import Lineage
from gradflow.tracing.axes import features_axis

_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "dropout", "pow", "tanh", "relu", "gelu", "silu", "contiguous"})

# index, op, parents, scope, call, shape, floating, requires_grad, inplace, detail: a `Node` without its lineage
Row = tuple[int, str, tuple[int, ...], str, int, tuple[int, ...], bool, bool, bool, dict[str, Any]]


class RowLineage(Lineage):
    """Ancestors and features axes of a register's rows."""

    __slots__ = ("_axes", "_rows")

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(_Parents(rows))
        self._rows = rows
        self._axes: list[int] = []

    def channel_dim(self, index: int) -> int:
        """Axis of the features in a row's tensor."""
        axes, rows = self._axes, self._rows
        for _, op, parents, _, _, shape, _, _, _, detail in rows[len(axes) : index + 1]:
            if not parents:
                axes.append(-1)
                continue
            first = parents[0]
            before = rows[first][5]
            kept = op in _ELEMENTWISE and shape == before
            axes.append(axes[first] if kept else features_axis(op, detail.get("axes", ()), before, axes[first], shape))
        return axes[index]


class _Parents(Sequence[tuple[int, ...]]):
    """The parents column of the rows."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index][2]
