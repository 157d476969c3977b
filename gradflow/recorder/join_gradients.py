"""Measures the gradients of residual joins as they come back: at the output, the fork, along the skip, the branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gradflow import statistics
from gradflow.recorder.hooks import Edge, Hooks, Use, behind_views, inputs_reaching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.records import Addend, Join, Node, Structure
    from gradflow.statistics import Number

_SKIP = -1


class JoinGradients:
    """What comes back to one join: at its output, at the fork, along the skip, and through the branches.

    The gradient of a branch is added up from what its operations send to the fork, so that a branch with a thousandth
    of the gradient is as exact as any. Where something else reads the fork too (`closed` is False), it is the
    difference between the gradient at the fork and what came back along the skip, as the definition has it.
    """

    def __init__(self, join: Join, buffer: Buffer, hooks: Hooks, *, closed: bool) -> None:
        self.join = join
        self.fork: Edge | None = None
        self.in_order = True
        self.on_return: Callable[[Tensor | None, list[Tensor | None]], None] | None = None
        self._buffer = buffer
        self._hooks = hooks
        self._closed = closed
        self._known = False
        self._groups: frozenset[int] = frozenset()  # _SKIP, 0 for all branches or the first, 1, ... for the others
        self._back: dict[int, Tensor] = {}

    def attach(self, edges: Mapping[int, Edge], nodes: Sequence[Node]) -> None:
        """Place the hooks; a tensor without an edge is one that autograd does not follow."""
        join = self.join
        if join.node in edges:
            self._hooks.gradient(edges[join.node], self._at_output)
        if join.fork not in edges:
            return
        self.fork = edges[join.fork]
        skip = _ends(join.skip, edges, nodes, self.fork)
        if not skip:
            for behind, ordered in behind_views(self.fork):
                ends = _ends(join.skip, edges, nodes, behind)
                if ends:
                    self.fork, self.in_order, skip = behind, ordered, ends
                    break
        if skip or (skip is not None and _is_cut(join, nodes)):
            self._known = True
            self._group([_ends(addend, edges, nodes, self.fork) for addend in join.addends], skip)
        self._hooks.gradient(self.fork, self._at_fork)

    def _group(self, branches: list[list[Edge] | None], skip: list[Edge]) -> None:
        """Collect what comes back along the skip and through each branch, or all branches where they share a start."""
        together = {edge for ends in branches for edge in ends or ()}
        self._closed = self._closed and None not in branches and together.isdisjoint(skip)
        groups = {_SKIP: set(skip)}
        if None not in branches and len(together) == sum(len(ends or ()) for ends in branches):
            groups.update({number: set(ends or ()) for number, ends in enumerate(branches)})
        else:
            groups[0] = together
        self._groups = frozenset(groups)
        for number, ends in groups.items():
            if number > 0 or number == _SKIP or self._closed:
                for node, position in ends:
                    self._hooks.returned(node, position, self._collector(number))

    def _collector(self, number: int) -> Use:
        def use(gradient: Tensor) -> None:
            known = self._back.get(number)
            self._back[number] = gradient if known is None else statistics.wide(known) + statistics.wide(gradient)

        return use

    def _put(self, **values: Number) -> None:
        for branch in self.join.branches:
            self._buffer.put("branches", branch.name, dict(values))

    def _at_output(self, gradient: Tensor) -> None:
        self._put(grad_out_sq=self._hooks.square(gradient))

    def _at_fork(self, gradient: Tensor) -> None:
        back, self._back = self._back, {}
        self._put(grad_fork_sq=self._hooks.square(gradient))
        if not self._known:
            return
        along = back.get(_SKIP)
        through = _sum(back, range(len(self.join.branches))) if self._closed else _less(gradient, along)
        if through is None:
            self._put(grad_branch_sq=0.0, grad_dot=0.0)
        elif along is None:
            self._put(grad_branch_sq=statistics.sum_squares(through))
        else:
            dot, square = statistics.dot_and_square(through, along)
            self._put(grad_branch_sq=square, grad_dot=dot)
        if self.on_return is not None:
            self.on_return(along, self._parts(gradient, through, back))

    def _parts(self, gradient: Tensor, through: Tensor | None, back: dict[int, Tensor]) -> list[Tensor | None]:
        """What came back through each branch: zeros if nothing did, None if the first one's holds it."""
        numbers = range(1, len(self.join.branches))
        parts: list[Tensor | None] = [back.get(number) for number in numbers]
        first = back.get(0)
        if not self._closed and through is not None:
            first = _less(through, _sum(back, numbers))
        return [
            torch.zeros_like(gradient) if part is None and number in self._groups else part
            for number, part in enumerate([first, *parts])
        ]


def _sum(back: Mapping[int, Tensor], numbers: Iterable[int]) -> Tensor | None:
    total = None
    for part in (back[number] for number in numbers if number in back):
        total = part if total is None else statistics.wide(total) + statistics.wide(part)
    return total


def _less(whole: Tensor, part: Tensor | None) -> Tensor:
    return whole if part is None else statistics.wide(whole) - statistics.wide(part)


def closed_joins(structure: Structure, nodes: Sequence[Node]) -> frozenset[int]:
    """Joins whose fork nothing reads but their own skip and branches."""
    readers: dict[int, int] = {join.fork: 0 for join in structure.joins}
    for node in nodes:
        for parent in node.parents:
            if parent in readers:
                readers[parent] |= 1 << node.index
    return frozenset(
        join.node for join in structure.joins
        if not readers[join.fork] & ~(nodes[join.node].ancestors | 1 << join.node)
    )  # fmt: skip


def _ends(addend: Addend, edges: Mapping[int, Edge], nodes: Sequence[Node], fork: Edge) -> list[Edge] | None:
    """Where the path of an operand arrives at the fork; empty if autograd does not follow it."""
    reader, count, *inputs = nodes[addend.addition].detail.get("inputs", (-1, 2, (0,), (1,)))
    addition = edges.get(addend.addition if reader < 0 else reader)
    return [] if addition is None else inputs_reaching(addition[0], inputs[addend.position], fork, of=count)


def _is_cut(join: Join, nodes: Sequence[Node]) -> bool:
    """Whether the skip leaves the fork by something that stops gradients."""
    index = join.skip.node
    while index != join.fork:
        node = nodes[index]
        if node.op in {"detach", "data"} or not node.requires_grad:
            return True
        before = [p for p in node.parents if p == join.fork or nodes[p].ancestors >> join.fork & 1]
        if not before:
            return False
        index = before[0]
    return not nodes[index].requires_grad
