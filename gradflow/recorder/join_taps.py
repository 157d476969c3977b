"""Measures residual joins in a running pass: operands as they enter the sum, and the gradients that come back.

Every candidate addition is measured when it happens (an in-place one overwrites its operand), before it is known
whether it is a join; `emit` picks out the ones that the analysis of the finished pass names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gradflow import geometry, statistics
from gradflow.shapes import broadcast, broadcast_factor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.records import Addend, Join, Node
    from gradflow.statistics import Number

Place = tuple[int, int]
"""The addition an operand enters and its position there: what names an operand in a pass."""
_SILENT = frozenset({"dropout", "feature_dropout", "alpha_dropout"})
_MOST_TERMS = 8
"""Terms of a sum that are taken apart; the cross products grow with their square."""


@dataclass(frozen=True, slots=True)
class Term:
    """An operand of a sum: its factor in the sum, Σ (factor·value)², a sample of rows, the value while it is kept."""

    place: Place
    scale: float
    square: Number
    sample: Tensor | None
    value: Tensor | None = None
    version: int = 0

    def scaled(self, factor: float) -> Term:
        """The same operand where the sum that it is in enters another one with a factor."""
        if factor == 1:
            return self
        sample = None if self.sample is None else self.sample * factor
        return replace(self, scale=self.scale * factor, square=self.square * factor**2, sample=sample)

    @property
    def fresh(self) -> bool:
        """Whether the value is still there as it was."""
        return self.value is not None and self.value._version == self.version  # noqa: SLF001


@dataclass(slots=True)
class Sum:
    """A measured addition.

    `terms` holds its two operands and, where they are partial sums, the operands of those; `leaves` are the terms that
    add up to it when taken apart as far as possible; `dots` holds Σ of their products, factors included.
    """

    node: int
    shape: tuple[int, ...]
    channel_dim: int
    terms: dict[Place, Term] = field(default_factory=dict)
    leaves: list[Term] = field(default_factory=list)
    dots: dict[frozenset[Place], Number] = field(default_factory=dict)
    out: dict[str, Number] = field(default_factory=dict)
    sample: Tensor | None = None


class JoinTaps:
    """The additions of one pass."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.sums: dict[int, Sum] = {}
        self.squares: dict[int, Number] = {}  # Σ x² of nodes that were measured already, by whoever did
        self._holding: dict[int, list[Sum]] = {}  # by the module's call that they ran in: sums that keep operands

    # ------------------------------------------------------------------ while the pass runs

    def before(
        self, operands: tuple[Tensor, Tensor], numbers: tuple[int, int], factors: tuple[float, float],
        nodes: Sequence[Node], *, addition: int, inplace: bool, keep: bool, stack: int = -1,
    ) -> Sum:  # fmt: skip
        """Measure the operands of an addition beta·x + alpha·y that is about to run.

        `numbers` are the operands' nodes, `factors` beta and alpha, `addition` the node that it will be, `stack` the
        one that it sums, if any. Operands that are partial sums are taken apart; `keep` holds operands until they may
        enter a larger sum (a partial sum of a join with several branches).
        """
        x, y = (operand.detach() for operand in operands)
        shape = broadcast(tuple(x.shape), tuple(y.shape))
        entry = Sum(addition, shape, nodes[numbers[0]].channel_dim)
        kept = (x.clone() if inplace and keep else x, y) if keep else (None, None)
        squares = [self.squares.get(number) for number in numbers]
        if squares[1] is None:
            dot, squares[1] = statistics.dot_and_square(y, x)
        elif squares[0] is None:
            dot, squares[0] = statistics.dot_and_square(x, y)
        else:
            dot = statistics.dot(x, y)
        one, other = (statistics.sum_squares(v) if s is None else s for v, s in zip((x, y), squares, strict=True))
        entry.leaves = [
            self._term(entry, 0, x, one, factors[0], kept[0], numbers[0]),
            self._term(entry, 1, y, other, factors[1], kept[1], numbers[1]),
        ]
        entry.terms = {term.place: term for term in entry.leaves}
        entry.dots[frozenset(entry.terms)] = dot * (factors[0] * factors[1])
        self._expand(entry, (x, y), numbers, nodes, stack)
        return entry

    def _term(
        self, entry: Sum, position: int, value: Tensor, square: Number, scale: float, kept: Tensor | None, node: int
    ) -> Term:  # fmt: skip
        sample = None
        earlier = self.sums.get(node)
        if earlier is not None and earlier.shape == entry.shape and earlier.channel_dim == entry.channel_dim:
            sample = earlier.sample  # the stream is measured where it is made
        square = square * broadcast_factor(tuple(value.shape), entry.shape)
        if sample is None:
            whole = value if tuple(value.shape) == entry.shape else value.expand(entry.shape)
            sample = geometry.sample_rows(whole, entry.channel_dim, self.rows)
        version = 0 if kept is None else kept._version  # noqa: SLF001
        return Term((entry.node, position), 1.0, square, sample, kept, version).scaled(scale)

    def _expand(
        self, entry: Sum, operands: tuple[Tensor, Tensor], numbers: tuple[int, int], nodes: Sequence[Node], stack: int
    ) -> None:
        """Take operands that are partial sums apart into the operands of those."""
        groups: list[list[tuple[Term, Tensor]]] = []
        for term, operand, number in zip(entry.leaves, operands, numbers, strict=True):
            partial = self._partial(number, nodes, {entry.node, stack})
            parts = [] if partial is None else [(p.scaled(term.scale), p.value) for p in partial.leaves if p.fresh]
            if partial is None or len(parts) < len(partial.leaves):
                groups.append([(term, operand)])
                continue
            groups.append([(part, value) for part, value in parts if value is not None])
            entry.dots.update({pair: value * term.scale**2 for pair, value in partial.dots.items()})
        leaves = [term for group in groups for term, _ in group]
        if not 2 < len(leaves) <= _MOST_TERMS:
            return
        for one, x in groups[0]:
            for other, y in groups[1]:
                entry.dots[frozenset((one.place, other.place))] = statistics.dot(x, y) * (one.scale * other.scale)
        entry.leaves = leaves
        entry.terms.update({leaf.place: leaf for leaf in leaves})

    def _partial(self, number: int, nodes: Sequence[Node], readers: set[int]) -> Sum | None:
        """The measured sum that an operand is, looking through dropout, if nothing but `readers` has used it."""
        node, chain = nodes[number], {number, *readers}
        while node.op in _SILENT and len(node.parents) == 1:
            node = nodes[node.parents[0]]
            chain.add(node.index)
        entry = self.sums.get(node.index)
        if entry is None:
            return None
        used = any(entry.node in later.parents for later in nodes[entry.node + 1 :] if later.index not in chain)
        return None if used else entry

    def after(self, entry: Sum, node: int, call: int, out: Tensor) -> None:
        """Measure the result of an addition."""
        found = statistics.measure(out, ("square", "largest", "nonfinite"))
        entry.node = node
        entry.out = {
            "n": float(out.numel()), "out_sq": found["square"], "out_max": found["largest"],
            "nonfinite": found["nonfinite"],
        }  # fmt: skip
        entry.sample = geometry.sample_rows(out, entry.channel_dim, self.rows)
        self.sums[node] = entry
        if any(leaf.value is not None for leaf in entry.leaves):
            self._holding.setdefault(call, []).append(entry)
        self.squares[node] = found["square"]

    def release(self, call: int) -> None:
        """Let go of operands that were kept for sums in a module's forward that has ended."""
        for entry in self._holding.pop(call, ()):
            entry.leaves = [replace(leaf, value=None) for leaf in entry.leaves]
            entry.terms = {place: replace(term, value=None) for place, term in entry.terms.items()}

    # ------------------------------------------------------------------ when the pass is understood

    def emit(self, join: Join, buffer: Buffer) -> bool:
        """Put the forward columns of a join's branches into the buffer; False if the join was not measured."""
        entry = self.sums.get(join.node)
        if entry is None or _place(join.skip) not in entry.terms:
            return False
        skip = entry.terms[_place(join.skip)]
        for branch, addend in zip(join.branches, join.addends, strict=True):
            term = entry.terms.get(_place(addend))
            if term is None:
                return False
            buffer.put(
                "branches", branch.name,
                {
                    "n": entry.out["n"], "skip_sq": skip.square, "branch_sq": term.square,
                    "dot": entry.dots.get(frozenset((skip.place, term.place))), "out_sq": entry.out["out_sq"],
                    "out_max": entry.out["out_max"], "nonfinite": entry.out["nonfinite"],
                },
            )  # fmt: skip
        return True

    def samples(self, join: Join) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:
        """Row samples of a measured join: skip, branches, output; None for a term not seen as it entered the sum."""
        entry = self.sums[join.node]
        terms = [entry.terms.get(_place(addend)) for addend in (join.skip, *join.addends)]
        skip, *branches = [None if term is None else term.sample for term in terms]
        return skip, branches, entry.sample


def _place(addend: Addend) -> Place:
    return (addend.addition, addend.position)
