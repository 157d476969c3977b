"""What follows from the nodes of a running pass together: ancestors, features axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradflow.records import Lineage, Node
from gradflow.tracing.axes import features_axis

_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "dropout", "pow", "tanh", "relu", "gelu", "silu", "contiguous"})


class RunningLineage(Lineage):
    """Ancestors and features axes of nodes whose list still grows."""

    __slots__ = ("_axes", "_nodes")

    def __init__(self, nodes: list[Node]) -> None:
        super().__init__(_Parents(nodes))
        self._nodes = nodes
        self._axes: list[int] = []

    def channel_dim(self, index: int) -> int:
        """Axis of the features in a node's tensor."""
        axes, nodes = self._axes, self._nodes
        for _, op, parents, _, _, shape, _, _, _, detail, _ in nodes[len(axes) : index + 1]:
            if not parents:
                axes.append(-1)
                continue
            first = parents[0]
            before = nodes[first].shape
            kept = op in _ELEMENTWISE and shape == before
            axes.append(axes[first] if kept else features_axis(op, detail.get("axes", ()), before, axes[first], shape))
        return axes[index]

    def settle(self) -> None:
        """The list is complete: hold it no longer, so that nodes and lineage are gone without a garbage collection."""
        if self._nodes:
            self.channel_dim(len(self._nodes) - 1)
        self._parents = [node.parents for node in self._nodes]
        self._nodes = []


class _Parents(Sequence[tuple[int, ...]]):
    """The parents of every node."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes = nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, index: Any) -> Any:
        return self._nodes[index].parents
