"""Graph of one pass -> its residual joins, branches and streams. Pure: no torch, the graph alone decides.

An addition is a join where one operand is identity-like to a tensor (the fork) that the other operand depends on
through a learned operation. What makes an addition look like one without being one (masks, positions, gates, LoRA) is
told apart by where the supposed fork enters the branch; no class and no library is known by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradflow import families
from gradflow.ancestry import Ancestry, size, wide_dims
from gradflow.naming import name_branches
from gradflow.paths import begins_with_norm, enters_by_itself, is_learned_twice
from gradflow.records import Addend, Branch, Join, Structure
from gradflow.streams import find_streams, is_post_norm

if TYPE_CHECKING:
    from gradflow.records import Graph, Kind, Node

_GATE_DEPTH = 12
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class _Match:
    """A join before it has names: its output, fork, skip and branches, and the partial sums it swallowed."""

    node: int
    fork: int
    skip: Addend
    addends: tuple[Addend, ...]
    kind: Kind
    partials: frozenset[int]


def analyse(graph: Graph) -> Structure:
    """Joins in order of execution, the streams that they form, and what could not be understood."""
    facts = Ancestry(graph)
    matches = _Finder(graph, facts).run()
    names = name_branches(graph, facts, [(m.node, m.fork, m.addends) for m in matches])
    depths = _depths(graph, {m.node for m in matches})
    joins = []
    for match, (join_name, labels) in zip(matches, names, strict=True):
        post = is_post_norm(graph, facts, match.node, [m.fork for m in matches])
        branches = tuple(
            Branch(
                name=label.name,
                join=join_name,
                module=graph.nodes[match.node].scope,
                kind=match.kind,
                occurrence=label.occurrence,
                depth=depths[match.node],
                placement="pre-norm"
                if begins_with_norm(facts, match.fork, addend.node)
                else ("post-norm" if post else "none"),
            )
            for label, addend in zip(labels, match.addends, strict=True)
        )
        joins.append(Join(match.node, match.fork, match.skip, match.addends, branches))
    joins, streams = find_streams(graph, facts, joins)
    return Structure(tuple(joins), streams, graph.problems)


def _depths(graph: Graph, joins: set[int]) -> list[int]:
    """Joins on the longest path to every node, itself included."""
    depths: list[int] = []
    for node in graph.nodes:
        depth = 0
        for parent in node.parents:
            depth = max(depth, depths[parent])
        depths.append(depth + (node.index in joins))
    return depths


class _Finder:
    """Decides addition by addition, in order of execution, since a join changes what the later ones depend on."""

    def __init__(self, graph: Graph, facts: Ancestry) -> None:
        self.nodes = graph.nodes
        self.facts = facts
        self.returned = {index for call in graph.calls for index in call.outputs}
        self.not_joins: set[int] = set()
        self.uses = self._addend_uses()

    def run(self) -> list[_Match]:
        """Joins in order; additions that turn out to be part of something else are ruled out, and all is redone."""
        for _ in range(_ROUNDS):
            self.joins: dict[int, _Match] = {}
            self.join_bits = 0
            self.direct = [0] * len(self.nodes)
            for node in self.nodes:
                self._visit(node)
            ruled_out = self.not_joins | self._carried_past()
            if not ruled_out & self.joins.keys():
                break
            self.not_joins = ruled_out
        return [self.joins[index] for index in sorted(self.joins)]

    def _addend_uses(self) -> dict[int, int]:
        """In how many additions a tensor, or something identity-like to it, is an operand."""
        uses: dict[int, int] = {}
        for node in self.nodes:
            if self._is_sum(node):
                for index in {c for p in node.parents[:2] for c in self.facts.chain(p)}:
                    uses[index] = uses.get(index, 0) + 1
        return uses

    def _is_sum(self, node: Node) -> bool:
        if node.op not in families.ADDITIONS or len(node.parents) < 2 or not node.floating or not node.shape:
            return False
        return all(self.nodes[p].floating for p in node.parents[:2]) and not self._is_error(node)

    def _is_error(self, node: Node) -> bool:
        """Whether a difference is only ever squared or the like: the error term of a loss."""
        readers = self.facts.consumers[node.index]
        if node.op != "sub" or not readers or node.index in self.returned:
            return False
        squares = [self.nodes[r].op == "mul" and set(self.nodes[r].parents) == {node.index} for r in readers]
        return all(square or self.nodes[r].op in families.ERRORS for square, r in zip(squares, readers, strict=True))

    def _visit(self, node: Node) -> None:
        """Decide on a node, then set the mask of ancestors that reach it directly.

        Directly: through no join's branch alone, as masks, positions and what lies inside the branch do.
        """
        facts, direct = self.facts, self.direct
        match = self._match(node) if self._is_sum(node) and node.index not in self.not_joins else None
        if match is None:
            twin = facts.twins.get(node.index)
            for parent in node.parents if twin is None else (*node.parents, twin):
                if self.nodes[parent].floating:
                    direct[node.index] |= direct[parent] | 1 << parent
            return
        self.joins[node.index] = match
        self.join_bits |= 1 << node.index
        for partial in match.partials:
            self.joins.pop(partial, None)
        skip = match.skip.node
        direct[node.index] = direct[skip] | 1 << skip

    # ---------------------------------------------------------------- operands

    def _leaves(self, node: Node, scale: float = 1.0) -> tuple[list[Addend], set[int]]:
        """Operands of a sum with its partial sums opened, and those partial sums."""
        leaves: list[Addend] = []
        partials: set[int] = set()
        for addend in self._operands(node, scale):
            partial = self._partial(addend.node, node)
            if partial is None:
                leaves.append(addend)
                continue
            more, opened = self._leaves(partial, addend.scale)
            leaves += more
            partials |= opened | {partial.index}
        return leaves, partials

    def _operands(self, node: Node, scale: float = 1.0) -> list[Addend]:
        alpha = float(node.detail.get("alpha", 1))
        second = -alpha if node.op == "sub" else alpha
        first, other = node.parents[:2]
        return [Addend(first, scale, node.index, 0), Addend(other, scale * second, node.index, 1)]

    def _partial(self, index: int, total: Node) -> Node | None:
        """The sum behind an operand, if it is evaluated in the same call and used for this alone."""
        while True:
            node = self.nodes[index]
            if len(self.facts.consumers[index]) != 1 or index in self.returned or node.shape != total.shape:
                return None
            if self._is_sum(node):
                return node if node.call == total.call and node.index not in self.not_joins else None
            if node.op not in families.DROPOUT:
                return None
            index = node.parents[0]

    # ---------------------------------------------------------------- matching

    def _match(self, node: Node) -> _Match | None:
        leaves, partials = self._leaves(node)
        if len(leaves) > 2:
            match = self._among(node, leaves, frozenset(partials))
            if match is not None:
                return match
        operands = self._operands(node)
        match = self._among(node, operands, frozenset())
        return match if match is not None or not partials else self._with_offset(node, operands)

    def _among(self, node: Node, leaves: list[Addend], partials: frozenset[int]) -> _Match | None:
        """The join with one of the leaves as its skip and all others as branches."""
        for find in (self._identity_fork, self._projection_fork):
            for skip in leaves:
                others = [leaf for leaf in leaves if leaf is not skip]
                fork = find(node, skip.node, [other.node for other in others])
                if fork is not None:
                    kind: Kind = "identity" if find == self._identity_fork else "projection"
                    return _Match(node.index, fork, skip, tuple(others), kind, partials)
        return None

    def _with_offset(self, node: Node, operands: list[Addend]) -> _Match | None:
        """A skip that another tensor was added to on its way: `(x + c) + f(x)`; the sum of both enters the join."""
        for skip, other in (operands, operands[::-1]):
            partial = self._partial(skip.node, node)
            if partial is None or partial.index in self.joins:
                continue
            for leaf in self._leaves(partial)[0]:
                fork = self._identity_fork(node, leaf.node, [other.node])
                if fork is not None:
                    return _Match(node.index, fork, skip, (other,), "identity", frozenset({partial.index}))
        return None

    def _identity_fork(self, node: Node, skip: int, branches: list[int]) -> int | None:
        """The first tensor on the skip's identity-like way back that every branch depends on through a weight."""
        facts = self.facts
        for fork in facts.chain(skip):
            if all(facts.through_weight[b] >> fork & 1 for b in branches):
                sound = self._covers(skip, node, fork) and all(self._is_main(fork, b) for b in branches)
                return fork if sound and not any(self._is_gate(skip, fork, b) for b in branches) else None
        return None

    def _covers(self, skip: int, node: Node, fork: int) -> bool:
        """Whether the skip has the sum's shape: what is broadcast into a sum is a bias, unless the batch is all it lacks."""
        shape = self.nodes[skip].shape
        if size(shape) == size(node.shape):
            return True
        return not self.facts.data[fork] and len(shape) > 1 and node.shape[-len(shape) :] == shape

    def _is_main(self, fork: int, branch: int) -> bool:
        """Whether a supposed fork feeds the branch itself, rather than from the side as masks and positions do."""
        carried = (self.facts.ancestors[fork] | 1 << fork) & self.join_bits
        if not self.facts.data[fork] and not carried and not enters_by_itself(self.facts, fork, branch):
            return False
        if self.direct[branch] >> fork & 1 or branch == fork:
            return True
        return self.facts.data[fork] and self.uses.get(fork, 0) <= 1

    def _is_gate(self, skip: int, fork: int, branch: int) -> bool:
        """Whether the sum is h + z·(n − h): a gate between h and n if z or what passes it depends on the data."""
        same = set(self.facts.chain(skip))
        same = {index for index in same if index >= fork}
        stack = [(branch, False, 0)]
        while stack:
            index, modulated, depth = stack.pop()
            node = self.nodes[index]
            if depth > _GATE_DEPTH:
                continue
            if self._is_sum(node) and node.op == "sub" and self._loses(node, same):
                self.not_joins.add(index)
                return modulated
            if node.op in {"mul", "div"} and len(node.parents) > 1:
                left, right = node.parents[:2]
                stack.append((left, modulated or self.facts.data[right], depth + 1))
                stack.append((right, modulated or self.facts.data[left], depth + 1))
                continue
            parent = self.facts.identity_parent(index)
            if parent is not None:
                stack.append((parent, modulated or node.op == "detach", depth + 1))
        return False

    def _loses(self, node: Node, same: set[int]) -> bool:
        """Whether the skip's own tensor is an operand of a difference."""
        return any(not same.isdisjoint(self.facts.chain(p)) for p in node.parents[:2])

    def _projection_fork(self, node: Node, skip: int, branches: list[int]) -> int | None:
        """The fork of a skip that passes one linear map, while the branches pass two with a nonlinearity between."""
        facts, nodes = self.facts, self.nodes
        if any(nodes[index].shape != node.shape for index in (skip, *branches)):
            return None
        index, mapped = skip, False
        while True:
            if mapped and facts.data[index] and all(self._projects(index, b) for b in branches):
                return index
            current = nodes[index]
            before = facts.identity_parent(index)
            if before is None and current.op in families.NORMS:
                before = current.parents[0]
            if before is None and not mapped and current.op in families.LINEAR_MAPS and facts.learned[index]:
                signals = [p for p in current.parents if nodes[p].floating and not facts.weighty[p]]
                before, mapped = (signals[0] if len(signals) == 1 else None), True
            if before is None or not nodes[before].floating:
                return None
            index = before

    def _projects(self, fork: int, branch: int) -> bool:
        direct = self.facts.through_weight[branch] & self.direct[branch]
        return bool(direct >> fork & 1) and is_learned_twice(self.facts, fork, branch)

    def _carried_past(self) -> set[int]:
        """Joins whose sum serves one sublayer alone, while an operand is carried on as the skip of a later join.

        A branch that is carried on itself had a side input put onto it, such as a query's position. A fork that is
        carried on makes the sum a side input only if a fixed pattern (a position, scaled by the fork) is the branch.
        """
        found: set[int] = set()
        forks: dict[int, list[_Match]] = {}
        for join in self.joins.values():
            forks.setdefault(join.fork, []).append(join)
        for join in self.joins.values():
            branches = [c for addend in join.addends for c in self.facts.chain(addend.node)]
            carried = list(branches)
            if any(self._is_pattern(c) for c in branches):
                carried.append(join.fork)
            if any(self._serves(join.node, later) for c in carried for later in forks.get(c, ())):
                found.add(join.node)
        return found

    def _serves(self, index: int, later: _Match) -> bool:
        """Whether a node is in a join's branch and not on its skip."""
        within = [a.node == index or self.facts.ancestors[a.node] >> index & 1 for a in later.addends]
        skip = later.skip.node
        return any(within) and skip != index and not self.facts.ancestors[skip] >> index & 1

    def _is_pattern(self, index: int) -> bool:
        """Whether a node is the product of something with a fixed tensor of two or more dimensions."""
        node = self.nodes[index]
        factors = node.parents if node.op == "mul" else ()
        return any(not self.facts.data[p] and wide_dims(self.nodes[p].shape) > 1 for p in factors)
