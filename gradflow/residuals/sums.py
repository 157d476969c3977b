"""Additions: their operands as they enter the sum, and the partial sums that chain into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.records import Addend
from gradflow.residuals import families

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradflow.records import Graph, Node
    from gradflow.residuals.roles import Roles


class Sums:
    """The additions of a graph that could be joins.

    Attributes:
        all: Their indices, in order.
        members: The same, as a set.
        uses: In how many of them a tensor, or something identity-like to it, is an operand.
        apart: Additions that are part of something else (a gate, a side input) and so neither joins nor partial sums.
    """

    def __init__(self, graph: Graph, roles: Roles) -> None:
        self._nodes = graph.nodes
        self._roles = roles
        self._returned = {index for call in graph.calls for index in call.outputs}
        self.apart: set[int] = set()
        self.all = [node.index for node in graph.nodes if node.op in families.ADDITIONS and self._is_sum(node)]
        self.members = set(self.all)
        self.uses: dict[int, int] = {}
        for index in self.all:
            for tensor in {c for p in graph.nodes[index].parents[:2] for c in roles.like.chain(p)}:
                self.uses[tensor] = self.uses.get(tensor, 0) + 1

    def _is_sum(self, node: Node) -> bool:
        if len(node.parents) < 2 or not node.floating or not node.shape:
            return False
        return all(self._nodes[p].floating for p in node.parents[:2]) and not self._is_error(node)

    def _is_error(self, node: Node) -> bool:
        """Whether a difference is only ever squared or the like: the error term of a loss."""
        readers = [self._nodes[r] for r in self._roles.consumers[node.index]]
        if node.op != "sub" or not readers or node.index in self._returned:
            return False
        return all(r.op in families.ERRORS or (r.op == "mul" and set(r.parents) == {node.index}) for r in readers)

    def operands(self, index: int, scale: float = 1.0) -> list[Addend]:
        """The two operands of an addition, with the sign and factor that they enter with, times `scale`."""
        node = self._nodes[index]
        alpha, beta = float(node.detail.get("alpha", 1)), float(node.detail.get("beta", 1))
        first, other = node.parents[:2]
        return [
            Addend(first, scale * beta, index, 0),
            Addend(other, scale * (-alpha if node.op == "sub" else alpha), index, 1),
        ]

    def leaves(self, index: int) -> tuple[list[Addend], frozenset[int]]:
        """Operands of a sum with its partial sums opened, in the order they are written, and those partial sums."""
        opened: set[int] = set()
        found: list[Addend] = []
        queue = self.operands(index)
        while queue:
            addend = queue.pop(0)
            partial = self.partial(addend, index)
            if partial is None:
                found.append(addend)
            else:
                opened.add(partial)
                queue = self.operands(partial, addend.scale) + queue
        return found, frozenset(opened)

    def partial(self, addend: Addend, total: int) -> int | None:
        """The sum behind an operand, if it is evaluated in the same call as the total and used for it alone.

        None where an operation scales both its operands before it adds them: written out, products would stand between.
        """
        if "beta" in self._nodes[addend.addition].detail:
            return None
        index, whole = addend.node, self._nodes[total]
        while True:
            node = self._nodes[index]
            if len(self._roles.consumers[index]) != 1 or index in self._returned or node.shape != whole.shape:
                return None
            if index in self.members:
                return index if node.call == whole.call and index not in self.apart else None
            if node.op not in families.DROPOUT:
                return None
            index = node.parents[0]


def all_but_one(masks: Iterable[int]) -> list[int]:
    """For every mask the intersection of all the others."""
    masks = list(masks)
    before, after = [-1], [-1]
    for mask in masks[:-1]:
        before.append(before[-1] & mask)
    for mask in masks[:0:-1]:
        after.append(after[-1] & mask)
    return [b & a for b, a in zip(before, reversed(after), strict=True)]
