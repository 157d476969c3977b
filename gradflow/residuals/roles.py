"""What each node of a graph is to the signal: data or weight, learned or not, identity-like to what, a norm of what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.residuals import families
from gradflow.residuals.likeness import Likeness, wide_dims

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradflow.records import Node

_VISITS = 1_000_000
_QKV = 3  # operands of attention before its weights: query, key, value


class Roles:
    """Facts per node, filled in order of execution.

    Attributes:
        nodes: The graph's nodes.
        consumers: Nodes that read it.
        from_input: Whether any model input reaches it, integers included.
        data: Whether it carries a signal: a floating-point input, or what a learned operation made of an input.
        weighty: Whether it stems from parameters (or unnamed tensors from outside) alone: it can be a weight.
        parametric: Whether a parameter reaches it.
        weights: For a learned operation, the operands that are its weights (may be none); None for all others.
        like: What each node is the same thing as.
        twins: For a slice, an earlier slice of the same tensor by the same index: the same values.
        sources: Floating-point tensors that its values come from: its operands, and an earlier equal slice.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        count = len(nodes)
        self.nodes = nodes
        self.consumers: list[list[int]] = [[] for _ in range(count)]
        self.from_input = [False] * count
        self.data = [False] * count
        self.weighty = [False] * count
        self.parametric = [False] * count
        self.weights: list[frozenset[int] | None] = [None] * count
        self.twins: dict[int, int] = {}
        self.sources: list[tuple[int, ...]] = [()] * count
        self._slices: dict[tuple[str, int, str], int] = {}
        self.like = Likeness(self)
        self._between: dict[tuple[int, int], list[int]] = {}
        self._visits = 0
        self._stacks: list[tuple[int, int]] = []  # stacks that were summed, with the last addition of the sum
        for node in nodes:
            self._add(node)
        for stack, addition in self._stacks:
            if self.consumers[stack] == [addition]:  # what reads its parts is the sum
                for part in dict.fromkeys(nodes[stack].parents):
                    self.consumers[part].remove(stack)

    def _add(self, node: Node) -> None:
        index, parents = node.index, node.parents
        if not parents:
            self._source(node)
            return
        consumers, nodes = self.consumers, self.nodes
        from_input = parametric = weighty = data = False
        sources = []
        for parent in parents:
            readers = consumers[parent]
            if not readers or readers[-1] != index:
                readers.append(index)
            from_input = from_input or self.from_input[parent]
            parametric = parametric or self.parametric[parent]
            weighty = weighty or self.weighty[parent]
            data = data or self.data[parent]
            if nodes[parent].floating:
                sources.append(parent)
        self.from_input[index], self.parametric[index] = from_input, parametric
        self.weighty[index] = weighty and not from_input
        weights = self.weights[index] = self._weights(node)
        if node.floating:
            self.data[index] = data or (weights is not None and from_input)
            self.sources[index] = tuple(sources)
            if node.detail:
                self._note(node)

    def _source(self, node: Node) -> None:
        index = node.index
        self.from_input[index] = node.op == "input" or (node.op == "opaque" and node.floating)
        self.data[index] = self.from_input[index] and node.floating
        outside = node.op == "constant" and "factory" not in node.detail
        self.parametric[index] = node.op == "parameter" and not node.detail.get("buffer")
        self.weighty[index] = (self.parametric[index] or outside) and node.floating

    def _note(self, node: Node) -> None:
        """Remember a sum over a stack, and a slice, or the earlier one that it repeats."""
        if "stack" in node.detail:
            self._stacks.append((node.detail["stack"], node.index))
        if node.op not in families.SLICES or "index" not in node.detail:
            return
        key = node.op, node.parents[0], node.detail["index"]
        first = self._slices.setdefault(key, node.index)
        if first != node.index:
            self.twins[node.index] = first
            self.sources[node.index] += (first,)

    def between(self, start: int, end: int) -> list[int]:
        """Nodes on the ways from `start` to `end`, `end` included, in order."""
        known = self._between.get((start, end))
        if known is not None or self.exhausted:
            return known or []
        sources = self.sources
        queue, seen = [end], {end}
        for index in queue:
            for parent in sources[index]:
                if parent > start and parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        self._visits += len(seen)
        reached = {start}
        found = []
        for index in sorted(queue):
            if not reached.isdisjoint(sources[index]):
                reached.add(index)
                found.append(index)
        self._between[start, end] = found
        return found

    @property
    def exhausted(self) -> bool:
        """Whether looking further would take minutes: thousands of sums that each reach back over the whole pass."""
        return self._visits > _VISITS

    def depends(self, index: int, on: int) -> bool:
        """Whether a node's values come from another node's."""
        return index > on and index in self.between(on, index)

    # ---------------------------------------------------------------- learned operations

    def _weights(self, node: Node) -> frozenset[int] | None:
        """Operands that act as weights if the operation is learned (may be empty), None if it is not."""
        op, parents = node.op, node.parents
        if op == "opaque":
            return frozenset() if node.detail.get("learned") else None
        if op in families.NETWORKS:
            return frozenset(p for p in parents[_QKV:] if self.weighty[p] and p not in parents[:_QKV])
        if op in families.WEIGHTED:
            return None if self.is_fixed_filter(node) else frozenset(parents[1:])
        if op in families.BESIDE or len(parents) == 1:
            return None
        return self._table(node) if op in families.LOOKUPS else self._combined(node)

    def _table(self, node: Node) -> frozenset[int] | None:
        """The table of a lookup by indices from the input."""
        table = node.parents[0]
        learned = self.weighty[table] and self.from_input[node.index] and len(self.nodes[table].shape) > 1
        return frozenset({table}) if learned else None

    def _combined(self, node: Node) -> frozenset[int] | None:
        """Weights of two or more dimensions that any other operation combines with what is no weight."""
        factors = node.parents
        if node.op == families.ATTENTION:
            factors = factors[:_QKV]  # what follows is a mask or a bias
        elif node.op in families.FUSED_SUMS:
            factors = factors[1:]  # what comes first is added
        floats = [p for p in factors if self.nodes[p].floating]
        weights = frozenset(p for p in floats if self.weighty[p] and wide_dims(self.nodes[p].shape) > 1)
        return weights if weights and not all(self.weighty[p] for p in floats) else None

    def roots(self, weights: Iterable[int]) -> frozenset[int]:
        """The tensors that weights are views of."""
        found = []
        for weight in weights:
            root = weight
            while len(self.nodes[root].parents) == 1:
                root = self.nodes[root].parents[0]
            found.append(root)
        return frozenset(found)

    def is_fixed_filter(self, node: Node) -> bool:
        """A convolution with a buffer or a computed kernel: blurring, resampling; no learned operation."""
        if node.op != "conv" or len(node.parents) < 2:
            return False
        kernel = node.parents[1]
        return not self.from_input[kernel] and not self.weighty[kernel]
