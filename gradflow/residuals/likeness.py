"""What a node is the same thing as: identity-like operations, and norms written by name or by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.residuals import families

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradflow.records import Node
    from gradflow.residuals.roles import Roles

_KEEPING = families.DROPOUT | families.VIEWS | families.RESAMPLING | {"neg"}
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


class Likeness:
    """Identity-like relations between the nodes of a graph, worked out on demand once `roles` is filled."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles
        self._nodes = roles.nodes
        self._identity: dict[int, int | None] = {}
        self._chains: dict[int, tuple[int, ...]] = {}
        self._rules: dict[str, Callable[[Node], int | None]] = {
            "mul": self._scaled, "div": self._scaled, "add": self._shifted, "sub": self._shifted, "cat": self._joined,
            "masked_fill": self._masked, "setitem": self._masked, "copy": self._copied, "where": self._chosen,
            "conv": self._filtered, **dict.fromkeys(families.SLICES, self._sliced),
            **dict.fromkeys(families.POOLED, self._pooled),
        }  # fmt: skip

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
            parent = self._looked_up(self._nodes[index])
            self._identity[index] = parent if parent is not None and self._nodes[parent].floating else None
        return self._identity[index]

    def _looked_up(self, node: Node) -> int | None:
        if not node.parents or not node.floating:
            return None
        if node.op in _KEEPING:
            return node.parents[0]
        rule = self._rules.get(node.op)
        return None if rule is None else rule(node)

    def _masked(self, node: Node) -> int | None:
        """A tensor some of whose elements were overwritten by a number."""
        return node.parents[0] if all(not self._nodes[p].floating for p in node.parents[1:]) else None

    def _sliced(self, node: Node) -> int | None:
        """A slice that takes everything, or one that repeats an earlier one."""
        first = node.parents[0]
        whole = size(node.shape) == size(self._nodes[first].shape) and node.detail.get("outputs", 1) == 1
        return first if whole and len(node.parents) == 1 else self._roles.twins.get(node.index)

    def _pooled(self, node: Node) -> int | None:
        """A mean or a maximum over some dimensions."""
        some = node.shape and node.detail.get("output", 0) == 0 and len(node.parents) == 1
        return node.parents[0] if some else None

    def _joined(self, node: Node) -> int | None:
        """A concatenation that is padding, puts a few tokens in front, or puts the pieces of a split together again."""
        whole = self._reassembled(node)
        if whole is not None:
            return whole
        most = max(node.parents, key=lambda p: size(self._nodes[p].shape))
        return most if 2 * size(self._nodes[most].shape) > size(node.shape) else None

    def _reassembled(self, node: Node) -> int | None:
        """The tensor whose pieces, each identity-like to itself, are concatenated in their order."""
        ends = [self._nodes[self.chain(p)[-1]] for p in node.parents]
        pieces = [(end.parents[:1], end.detail.get("output"), end.detail.get("outputs")) for end in ends]
        first = pieces[0][0]
        if first and pieces == [(first, place, len(pieces)) for place in range(len(pieces))]:
            return first[0] if all(end.op in families.SLICES for end in ends) else None
        return None

    def _copied(self, node: Node) -> int | None:
        """What was copied, if it fills the tensor."""
        source = node.parents[-1]
        return source if size(node.shape) == size(self._nodes[source].shape) else None

    def _chosen(self, node: Node) -> int | None:
        """The one tensor that a mask lets through or replaces by a constant."""
        floats = [p for p in node.parents if self._nodes[p].floating and self._nodes[p].op != "constant"]
        return floats[0] if len(floats) == 1 else None

    def _filtered(self, node: Node) -> int | None:
        """What a fixed filter blurs or resamples."""
        return node.parents[0] if self._roles.is_fixed_filter(node) else None

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
        return size(self._nodes[left].shape) >= size(self._nodes[right].shape)

    def _gain(self, index: int, product: Node) -> bool:
        node = self._nodes[index]
        if self._roles.data[index]:
            return False
        if self._roles.from_input[index] or not self._roles.weighty[index]:
            return not self._roles.parametric[index]  # a mask, a constant, dropout's noise
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
        node = self._nodes[index]
        static = not self._roles.from_input[index]
        return static and wide_dims(node.shape) <= 1 and size(node.shape) < max(2, size(self._nodes[other].shape))

    # ---------------------------------------------------------------- norms

    def is_norm(self, index: int) -> bool:
        """Whether a node is a norm's output, or the product that completes a hand-written one."""
        return self.norm_source(index) is not None

    def norm_source(self, index: int) -> int | None:
        """What a norm normalises, None if the node is no norm's output."""
        node = self._nodes[index]
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
        node = self._nodes[index]
        centred = node.op == "sub" and len(node.parents) > 1 and self._nodes[node.parents[1]].op == "mean"
        return node.parents[0] if centred else index

    def _root(self, index: int, others: set[int]) -> bool:
        """Whether a factor is one over a root mean square (or the like) of what the other factor comes from."""
        for _ in range(_ROOT_STEPS):
            node = self._nodes[index]
            if node.op in families.ROOTS or (node.op == "pow" and abs(node.detail.get("scalar", 0)) == 0.5):
                return any(
                    self._roles.depends(index, source) for other in others for source in self.chain(other)[:_ROOT_STEPS]
                )
            if node.op not in families.BESIDE_ROOTS or not node.parents:
                return False
            index = node.parents[0]
        return False
