"""What each node of a graph is to the signal: data or weight, learned or not, identity-like to what, a norm of what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow import families

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Node

_QKV = 3  # operands of attention before its weights: query, key, value
_ROOT_STEPS = 6


def size(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    count = 1
    for length in shape:
        count *= length
    return count


def wide_dims(shape: tuple[int, ...]) -> int:
    """Number of dimensions longer than one."""
    return sum(length > 1 for length in shape)


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
        twins: For a slice, an earlier slice of the same tensor by the same index: the same values.
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
        self._slices: dict[tuple[str, int, str], int] = {}
        self._identity: dict[int, int | None] = {}
        self._chains: dict[int, tuple[int, ...]] = {}
        self._between: dict[tuple[int, int], list[int]] = {}
        for node in nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        index, parents = node.index, node.parents
        if not parents:
            self._source(node)
            return
        from_input = parametric = weighty = data = False
        for parent in parents:
            readers = self.consumers[parent]
            if not readers or readers[-1] != index:
                readers.append(index)
            from_input = from_input or self.from_input[parent]
            parametric = parametric or self.parametric[parent]
            weighty = weighty or self.weighty[parent]
            data = data or self.data[parent]
        self.from_input[index], self.parametric[index] = from_input, parametric
        self.weighty[index] = weighty and not from_input
        weights = self.weights[index] = self._weights(node)
        if node.floating:
            self.data[index] = data or (weights is not None and from_input)
            if node.op in families.SLICES and "index" in node.detail:
                self._note_twin(node)

    def _source(self, node: Node) -> None:
        index = node.index
        self.from_input[index] = node.op == "input" or (node.op == "opaque" and node.floating)
        self.data[index] = self.from_input[index] and node.floating
        outside = node.op == "constant" and "factory" not in node.detail
        self.parametric[index] = node.op == "parameter" and not node.detail.get("buffer")
        self.weighty[index] = (self.parametric[index] or outside) and node.floating

    def _note_twin(self, node: Node) -> None:
        """Remember a slice, or the earlier one that it repeats."""
        key = node.op, node.parents[0], node.detail["index"]
        first = self._slices.setdefault(key, node.index)
        if first != node.index:
            self.twins[node.index] = first

    def sources(self, index: int) -> tuple[int, ...]:
        """Floating-point tensors that a node's values come from: its operands, and an earlier equal slice."""
        if not self.nodes[index].floating:
            return ()
        found = tuple(p for p in self.nodes[index].parents if self.nodes[p].floating)
        return found if index not in self.twins else (*found, self.twins[index])

    def between(self, start: int, end: int) -> list[int]:
        """Nodes on the ways from `start` to `end`, `end` included, in order."""
        known = self._between.get((start, end))
        if known is not None:
            return known
        queue, seen = [end], {end}
        while queue:
            for parent in self.sources(queue.pop()):
                if parent > start and parent not in seen:
                    seen.add(parent)
                    queue.append(parent)
        reached = {start}
        found = []
        for index in sorted(seen):
            if any(parent in reached for parent in self.sources(index)):
                reached.add(index)
                found.append(index)
        self._between[start, end] = found
        return found

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
            return None if self._fixed_filter(node) else frozenset(parents[1:])
        if op in families.BESIDE or len(parents) == 1:
            return None
        if op in families.LOOKUPS:
            table = self.weighty[parents[0]] and self.from_input[node.index] and len(self.nodes[parents[0]].shape) > 1
            return frozenset(parents[:1]) if table else None
        weights = frozenset(p for p in parents if self.weighty[p] and wide_dims(self.nodes[p].shape) > 1)
        if not weights or all(self.weighty[p] or not self.nodes[p].floating for p in parents):
            return None
        if any(self.nodes[p].floating and not self.weighty[p] for p in parents):
            return weights
        return None

    def _fixed_filter(self, node: Node) -> bool:
        """A convolution with a buffer or a computed kernel: blurring, resampling; no learned operation."""
        if node.op != "conv" or len(node.parents) < 2:
            return False
        kernel = node.parents[1]
        return not self.from_input[kernel] and not self.weighty[kernel]

    # ---------------------------------------------------------------- identity-like paths

    def chain(self, index: int) -> tuple[int, ...]:
        """A node and those before it that it is identity-like to, nearest first."""
        found = self._chains.get(index)
        if found is None:
            path, before = [index], self.identity_parent(index)
            while before is not None and before not in self._chains:
                path.append(before)
                before = self.identity_parent(before)
            found = self._chains[index] = (*path, *(self._chains[before] if before is not None else ()))
        return found

    def identity_parent(self, index: int) -> int | None:
        """The operand that a node is the identity-like image of, None if there is none."""
        if index not in self._identity:
            parent = self._identity_parent(self.nodes[index])
            self._identity[index] = parent if parent is not None and self.nodes[parent].floating else None
        return self._identity[index]

    def _identity_parent(self, node: Node) -> int | None:  # noqa: PLR0911
        op, parents = node.op, node.parents
        if not parents or not node.floating:
            return None
        first = parents[0]
        if op in families.DROPOUT or op in families.VIEWS or op in families.RESAMPLING or op == "neg":
            return first
        if op in {"masked_fill", "setitem"}:
            return first if all(not self.nodes[p].floating for p in parents[1:]) else None
        if op in {"mul", "div"}:
            return self._scaled(node)
        if op in families.ADDITIONS:
            return self._shifted(node)
        if op in families.SLICES:
            whole = size(node.shape) == size(self.nodes[first].shape) and node.detail.get("outputs", 1) == 1
            return first if whole and len(parents) == 1 else self.twins.get(node.index)
        if op in families.POOLED:
            return first if node.shape and node.detail.get("output", 0) == 0 and len(parents) == 1 else None
        if op == "cat":  # padding, or a few tokens put in front
            most = max(parents, key=lambda p: size(self.nodes[p].shape))
            return most if 2 * size(self.nodes[most].shape) > size(node.shape) else None
        if op == "copy":
            return parents[-1] if size(node.shape) == size(self.nodes[parents[-1]].shape) else None
        if op == "where":
            floats = [p for p in parents if self.nodes[p].floating and self.nodes[p].op != "constant"]
            return floats[0] if len(floats) == 1 else None
        if op == "conv":
            return first if self._fixed_filter(node) else None
        if op == "opaque":
            return first if node.detail.get("alias") else None
        return None

    def _scaled(self, node: Node) -> int | None:
        """The operand of a product whose other operand is a constant, a mask or a scalar or per-channel gain."""
        if len(node.parents) == 1:
            return node.parents[0]
        left, right = node.parents[:2]
        if left == right:
            return None
        if self._gain(right, node):
            return left if not self._gain(left, node) or self._bigger(left, right) else right
        return right if self._gain(left, node) and node.op == "mul" else None

    def _bigger(self, left: int, right: int) -> bool:
        return size(self.nodes[left].shape) >= size(self.nodes[right].shape)

    def _gain(self, index: int, product: Node) -> bool:
        node = self.nodes[index]
        if self.data[index]:
            return False
        if self.from_input[index] or not self.weighty[index]:
            return not self.parametric[index]  # a mask, a constant, dropout's noise
        return wide_dims(node.shape) <= 1 and size(node.shape) <= size(product.shape)

    def _shifted(self, node: Node) -> int | None:
        """The operand of a sum whose other operand is a number or a per-channel offset (hand-written affine norms)."""
        if len(node.parents) == 1:
            return node.parents[0]
        left, right = node.parents[:2]
        if self._offset(right, left):
            return left
        return right if self._offset(left, right) else None

    def _offset(self, index: int, other: int) -> bool:
        node = self.nodes[index]
        static = not self.from_input[index]
        return static and wide_dims(node.shape) <= 1 and size(node.shape) < max(2, size(self.nodes[other].shape))

    # ---------------------------------------------------------------- norms

    def is_norm(self, index: int) -> bool:
        """Whether a node is a norm's output, or the product that completes a hand-written one."""
        return self.norm_source(index) is not None

    def norm_source(self, index: int) -> int | None:
        """What a norm normalises, None if the node is no norm's output."""
        node = self.nodes[index]
        if node.op in families.NORMS and node.parents:
            return node.parents[0]
        if node.op not in {"mul", "div"} or len(node.parents) < 2:
            return None
        left, right = (self._centred(p) for p in node.parents[:2])
        if self._root(node.parents[1], {left}):
            return left
        return right if self._root(node.parents[0], {right}) else None

    def _centred(self, index: int) -> int:
        """What a tensor less its own mean comes from; the tensor itself if it is no such thing."""
        node = self.nodes[index]
        centred = node.op == "sub" and len(node.parents) > 1 and self.nodes[node.parents[1]].op == "mean"
        return node.parents[0] if centred else index

    def _root(self, index: int, others: set[int]) -> bool:
        """Whether a factor is one over a root mean square (or the like) of what the other factor comes from."""
        for _ in range(_ROOT_STEPS):
            node = self.nodes[index]
            if node.op in families.ROOTS or (node.op == "pow" and node.floating and "root" in node.detail):
                return any(self.depends(index, source) for other in others for source in self.chain(other)[:_ROOT_STEPS])
            if node.op not in families.BESIDE_ROOTS or not node.parents:
                return False
            index = node.parents[0]
        return False
