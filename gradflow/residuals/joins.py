"""Which additions are residual joins, and what each one's fork is.

An addition is a join where one operand is identity-like to a tensor (the fork) that the other operand depends on
through a learned operation. What looks like one without being one is told apart by where the supposed fork enters the
branch: masks, positions and biases enter from the side, gates lose the skip again, updates lack a nonlinearity. No
class and no library is known by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradflow.residuals import families
from gradflow.residuals.ancestry import Ancestry
from gradflow.residuals.likeness import size, wide_dims
from gradflow.residuals.paths import enters_by_itself, enters_otherwise, is_learned_twice
from gradflow.residuals.sums import Sums, all_but_one

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradflow.records import Addend, Graph, Kind
    from gradflow.residuals.roles import Roles

_GATE_DEPTH = 12
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Match:
    """A join before it has names: its output, fork, skip and branches, and the partial sums that it swallowed."""

    node: int
    fork: int
    skip: Addend
    addends: tuple[Addend, ...]
    kind: Kind
    partials: frozenset[int]


class JoinFinder:
    """Decides addition by addition, in order of execution, since a join changes what the later ones depend on."""

    def __init__(self, graph: Graph, roles: Roles) -> None:
        self._nodes = graph.nodes
        self._roles = roles
        self._sums = Sums(graph, roles)
        self._entered: dict[tuple[int, frozenset[int]], bool] = {}
        self.ancestry = Ancestry(roles, self._possible_forks())

    def run(self) -> list[Match]:
        """Joins in order; additions that turn out to be part of something else are set apart, and all is redone."""
        for _ in range(_ROUNDS):
            self._joins: dict[int, Match] = {}
            self._direct = [0] * len(self._nodes)
            self._past_join = [False] * len(self._nodes)
            self._visit_all()
            apart = self._sums.apart | self._carried_past()
            if not apart & self._joins.keys():
                break
            self._sums.apart = apart
        return [self._joins[index] for index in sorted(self._joins)]

    def _possible_forks(self) -> set[int]:
        """Tensors on an operand's way back that something beside this way reads too."""
        roles = self._roles
        repeated = set(roles.twins.values())
        forks: set[int] = set()
        operands = [p for index in self._sums.all for p in self._nodes[index].parents[:2]]
        for operand in dict.fromkeys(operands):
            if self._nodes[operand].floating:
                ways = (*roles.like.chain(operand), *(fork for fork, _ in self._behind_one_map(operand)))
                forks.update(c for c in ways if len(roles.consumers[c]) > 1 or c in repeated)
        return forks

    def _visit_all(self) -> None:
        """Decide on every node in order, and set the mask of possible forks that reach it directly.

        Directly: through no join's branch alone, as masks, positions and what lies inside a branch do.
        """
        bit, direct, past, sums = self.ancestry.bit, self._direct, self._past_join, self._sums
        for index, sources in enumerate(self._roles.sources):
            if index in sums.members and index not in sums.apart and self._joined(index):
                continue
            mask, after = 0, False
            for source in sources:
                mask |= direct[source]
                if source in bit:
                    mask |= bit[source]
                after = after or past[source]
            direct[index], past[index] = mask, after

    def _joined(self, index: int) -> bool:
        """Whether an addition is a join; it is noted, and what reaches it directly is what reaches its skip."""
        match = self._match(index)
        if match is None:
            return False
        self._joins[index] = match
        for partial in match.partials:
            self._joins.pop(partial, None)
        skip = match.skip.node
        self._direct[index] = self._direct[skip] | self.ancestry.bit.get(skip, 0)
        self._past_join[index] = True
        return True

    # ---------------------------------------------------------------- matching

    def _match(self, index: int) -> Match | None:
        leaves, partials = self._sums.leaves(index)
        if len(leaves) > 2:
            match = self._among(index, leaves, partials)
            if match is not None:
                return match
        operands = self._sums.operands(index)
        match = self._among(index, operands, frozenset())
        if match is None:
            return self._with_offset(index, operands) if partials else None
        # A further operand that is identity-like to the fork makes no second join of the same sum.
        part = (self._joins.get(p) for p in partials)
        return None if any(p is not None and p.fork == match.fork for p in part) else match

    def _among(self, index: int, leaves: list[Addend], partials: frozenset[int]) -> Match | None:
        """The join with one of the leaves as its skip and all others as branches."""
        others = all_but_one(self.ancestry.through_weight[leaf.node] for leaf in leaves)
        for kind in ("identity", "projection"):
            find = self._identity_fork if kind == "identity" else self._projection_fork
            for place, skip in enumerate(leaves):
                if not others[place]:
                    continue
                rest = [leaf for leaf in leaves if leaf is not skip]
                fork = find(index, skip.node, [leaf.node for leaf in rest])
                if fork is not None:
                    return Match(index, fork, skip, tuple(rest), kind, partials)
        return None

    def _with_offset(self, index: int, operands: list[Addend]) -> Match | None:
        """A skip that another tensor was added to on its way: `(x + c) + f(x)`; the sum of both enters the join."""
        for skip, other in (operands, operands[::-1]):
            partial = self._sums.partial(skip, index)
            if partial is None or partial in self._joins:
                continue
            for leaf in self._sums.leaves(partial)[0]:
                fork = self._identity_fork(index, leaf.node, [other.node])
                if fork is not None:
                    return Match(index, fork, skip, (other,), "identity", frozenset({partial}))
        return None

    def _weighed(self, fork: int, branches: Sequence[int]) -> bool:
        """Whether every branch depends on the fork through a weight."""
        bit = self.ancestry.bit.get(fork, 0)
        return bool(bit) and all(self.ancestry.through_weight[b] & bit for b in branches)

    def _identity_fork(self, index: int, skip: int, branches: list[int]) -> int | None:
        """The first tensor on the skip's identity-like way back that every branch depends on through a weight."""
        for fork in self._roles.like.chain(skip):
            if self._weighed(fork, branches):
                sound = self._covers(skip, index, fork) and all(self._is_main(fork, b) for b in branches)
                return fork if sound and not any(self._is_gate(skip, fork, b) for b in branches) else None
        return None

    def _covers(self, skip: int, total: int, fork: int) -> bool:
        """Whether the skip has the sum's shape: what is broadcast is a bias, unless the batch is all that it lacks."""
        shape, whole = self._nodes[skip].shape, self._nodes[total].shape
        if size(shape) == size(whole):
            return True
        return not self._roles.data[fork] and len(shape) > 1 and whole[-len(shape) :] == shape

    def _is_main(self, fork: int, branch: int) -> bool:
        """Whether a supposed fork feeds the branch itself, rather than from the side as masks and positions do."""
        direct = bool(self._direct[branch] & self.ancestry.bit[fork])
        if self._roles.data[fork]:
            return direct or self._sums.uses.get(fork, 0) <= 1
        return direct and (self._past_join[fork] or enters_by_itself(self._roles, fork, branch))

    # ---------------------------------------------------------------- projections

    def _behind_one_map(self, skip: int) -> Iterator[tuple[int, int]]:
        """What a skip comes from by one linear map, and the map; besides it only norms and identity-like operations."""
        roles, nodes = self._roles, self._nodes
        index, mapped = skip, -1
        while True:
            if mapped >= 0 and roles.data[index]:
                yield index, mapped
            node = nodes[index]
            before = roles.like.identity_parent(index)
            if before is None and node.op in families.NORMS:
                before = node.parents[0]
            if before is None and mapped < 0 and node.op in families.LINEAR_MAPS and roles.weights[index] is not None:
                signals = [p for p in node.parents if nodes[p].floating and not roles.weighty[p]]
                before, mapped = (signals[0] if len(signals) == 1 else None), index
            if before is None or not nodes[before].floating:
                return
            index = before

    def _projection_fork(self, index: int, skip: int, branches: list[int]) -> int | None:
        """The fork of a skip that passes one linear map, while the branches pass two with a nonlinearity between."""
        shape = self._nodes[index].shape
        if any(self._nodes[operand].shape != shape for operand in (skip, *branches)):
            return None
        for fork, mapped in self._behind_one_map(skip):
            if self._weighed(fork, branches) and all(self._projects(fork, b, mapped) for b in branches):
                return fork
        return None

    def _projects(self, fork: int, branch: int, mapped: int) -> bool:
        if not self._direct[branch] & self.ancestry.bit[fork]:
            return False
        weights = fork, self._roles.roots(self._roles.weights[mapped] or ())
        if weights not in self._entered:
            self._entered[weights] = enters_otherwise(self._roles, fork, mapped)
        return self._entered[weights] and is_learned_twice(self._roles, fork, branch, mapped)

    # ---------------------------------------------------------------- what is no join after all

    def _is_gate(self, skip: int, fork: int, branch: int) -> bool:
        """Whether the sum is h + z·(n - h): a gate between h and n if z, or what passes it, depends on the data.

        The difference in it is no join of its own in any case.
        """
        roles = self._roles
        same = {tensor for tensor in roles.like.chain(skip) if tensor >= fork}
        stack = [(branch, False, 0)]
        while stack:
            index, modulated, depth = stack.pop()
            node = self._nodes[index]
            if depth > _GATE_DEPTH:
                continue
            if index in self._sums.members and node.op == "sub" and self._loses(index, same):
                self._sums.apart.add(index)
                return modulated
            if node.op in {"mul", "div"} and len(node.parents) > 1:
                left, right = node.parents[:2]
                stack.append((left, modulated or roles.data[right], depth + 1))
                stack.append((right, modulated or roles.data[left], depth + 1))
                continue
            parent = roles.like.identity_parent(index)
            if parent is not None:
                stack.append((parent, modulated or node.op == "detach", depth + 1))
        return False

    def _loses(self, index: int, same: set[int]) -> bool:
        """Whether the skip's own tensor is an operand of a difference."""
        return any(not same.isdisjoint(self._roles.like.chain(p)) for p in self._nodes[index].parents[:2])

    def _carried_past(self) -> set[int]:
        """Joins whose sum serves one sublayer alone, while an operand is carried on as the skip of a later join.

        A branch that is carried on itself had a side input put onto it, such as a query's position. A fork that is
        carried on makes the sum a side input only if a fixed pattern (a position, scaled by the fork) is the branch.
        """
        found: set[int] = set()
        forks: dict[int, list[Match]] = {}
        for join in self._joins.values():
            forks.setdefault(join.fork, []).append(join)
        for join in self._joins.values():
            carried = [c for addend in join.addends for c in self._roles.like.chain(addend.node)]
            if any(self._is_pattern(c) for c in carried):
                carried.append(join.fork)
            if any(self._serves(join.node, later) for c in carried for later in forks.get(c, ())):
                found.add(join.node)
        return found

    def _serves(self, index: int, later: Match) -> bool:
        """Whether a node is in a join's branch and not on its skip."""
        on = [
            operand for operand in (a.node for a in later.addends) if operand == index or self._depends(operand, index)
        ]
        skip = later.skip.node
        return bool(on) and skip != index and not self._depends(skip, index)

    def _depends(self, index: int, on: int) -> bool:
        return index > on and self._roles.depends(index, on)

    def _is_pattern(self, index: int) -> bool:
        """Whether a node is the product of something with a fixed tensor of two or more dimensions."""
        node = self._nodes[index]
        factors = node.parents if node.op == "mul" else ()
        return any(not self._roles.data[p] and wide_dims(self._nodes[p].shape) > 1 for p in factors)
