"""Facts about the nodes of a graph: what each depends on, through what, and what it is the same thing as.

Sets of nodes are bit masks in Python ints, so that a fact about thousands of ancestors costs one OR. Only floating
point tensors hand a signal on: an index, a mask or a token id ends an ancestry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow import families

if TYPE_CHECKING:
    from gradflow.records import Graph, Node

_QKV = 3  # operands of attention before its weights: query, key, value


def bits(mask: int) -> list[int]:
    """Indices of the bits set in a mask, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def size(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    count = 1
    for length in shape:
        count *= length
    return count


def wide_dims(shape: tuple[int, ...]) -> int:
    """Number of dimensions longer than one."""
    return sum(length > 1 for length in shape)


class Ancestry:
    """Per node of a graph, filled in order of execution.

    Attributes:
        ancestors: Mask of the nodes that a node's values depend on, through floating-point tensors only.
        through_weight: Mask of those that reach it through at least one learned operation.
        from_input: Whether any model input reaches it, integers included.
        data: Whether it carries a signal: a floating-point input, or what a learned operation made of an input.
        weighty: Whether it stems from parameters (or unnamed tensors from outside) alone: it can be a weight.
        consumers: Nodes that read it.
        twins: For a slice, an earlier slice of the same tensor by the same index: the same values.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        count = len(graph.nodes)
        self.ancestors = [0] * count
        self.through_weight = [0] * count
        self.from_input = [False] * count
        self.data = [False] * count
        self.weighty = [False] * count
        self.parametric = [False] * count
        self.learned = [False] * count
        self.consumers: list[list[int]] = [[] for _ in range(count)]
        self.twins: dict[int, int] = {}
        self._identity: dict[int, int | None] = {}
        self._chains: dict[int, tuple[int, ...]] = {}
        for node in graph.nodes:
            self._add(node)

    def _add(self, node: Node) -> None:
        index, parents = node.index, node.parents
        for parent in dict.fromkeys(parents):
            self.consumers[parent].append(index)
        if not parents:
            self._source(node)
            return
        self.from_input[index] = any(self.from_input[p] for p in parents)
        self.parametric[index] = any(self.parametric[p] for p in parents)
        self.weighty[index] = not self.from_input[index] and any(self.weighty[p] for p in parents)
        weights = self._weights(node)
        learned = self.learned[index] = weights is not None
        if not node.floating:
            return
        self.data[index] = any(self.data[p] for p in parents) or (learned and self.from_input[index])
        ancestors = through = 0
        if node.op in families.SLICES and (twin := self._twin(node)) is not None:
            self.twins[index] = twin
            parents = (*parents, twin)
        for parent in parents:
            if not self.nodes[parent].floating:
                continue
            mask = self.ancestors[parent] | 1 << parent
            ancestors |= mask
            through |= mask if weights is not None and parent not in weights else self.through_weight[parent]
        self.ancestors[index], self.through_weight[index] = ancestors, through

    def _source(self, node: Node) -> None:
        index = node.index
        self.from_input[index] = node.op == "input" or (node.op == "opaque" and node.floating)
        self.data[index] = self.from_input[index] and node.floating
        buffer = bool(node.detail.get("buffer"))
        outside = node.op == "constant" and "factory" not in node.detail
        self.parametric[index] = node.op == "parameter" and not buffer
        self.weighty[index] = (self.parametric[index] or outside) and node.floating

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
            before = self.identity_parent(index)
            found = (index,) if before is None else (index, *self.chain(before))
            self._chains[index] = found
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

    def _twin(self, node: Node) -> int | None:
        """The earliest slice of the same tensor by the same index."""
        if "index" not in node.detail or len(node.parents) != 1:
            return None
        for other in self.consumers[node.parents[0]]:
            if other >= node.index:
                return None
            twin = self.nodes[other]
            if (twin.op, twin.parents, twin.detail) == (node.op, node.parents, node.detail):
                return other
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
        for _ in range(6):
            node = self.nodes[index]
            if node.op in families.ROOTS or (node.op == "pow" and node.floating and "root" in node.detail):
                sources = {c for other in others for c in self.chain(other)}
                return any(self.ancestors[index] >> source & 1 for source in sources)
            if node.op not in {"add", "clamp", "clamp_min", "maximum", "div", "mul", *families.VIEWS} or not node.parents:
                return False
            index = node.parents[0]
        return False
