"""Streams: chains of joins in which each join's output becomes the next one's fork."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from gradflow.records import Stream
from gradflow.residuals import families
from gradflow.residuals.naming import common_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Graph, Join
    from gradflow.residuals.roles import Roles

_LINKS = frozenset(
    {"relu", "gelu", "silu", "leaky_relu", "elu", "relu6", "hardswish", "mish", "tanh", "clamp", "prelu"}
)
# What changes the order of elements or cuts the gradient breaks the sums of a ledger.
_EXACT = families.VIEWS - {
    "detach", "data", "flip", "fliplr", "flipud", "roll", "rot90", "transpose", "t", "permute", "movedim", "adjoint",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "swapaxes", "expand", "expand_as", "broadcast_to",
    "view_as_real", "view_as_complex",
}  # fmt: skip


def is_post_norm(graph: Graph, roles: Roles, join: int, forks: Sequence[int]) -> bool:
    """Whether a join's output goes on through a norm alone, one of the join's own module or the next fork's."""
    norms = _only_norms(roles, join)
    if not norms:
        return False
    own = any(_runs_within(graph, graph.nodes[n].call, graph.nodes[join].call) for n in norms)
    later = [fork for fork in forks if fork > join]
    return own or any(n in roles.like.chain(fork) for fork in later for n in norms)


def _only_norms(roles: Roles, index: int) -> list[int]:
    """The norms that are all that reads a tensor (for hand-written ones, with their statistics), else nothing."""
    found: list[int] = []
    queue = [index]
    while queue:
        current = queue.pop()
        for consumer in roles.consumers[current]:
            node = roles.nodes[consumer]
            if roles.like.is_norm(consumer):
                found.append(consumer)
            elif roles.like.identity_parent(consumer) == current:
                queue.append(consumer)
            elif node.op not in {"pow", "mean", "var", "std", "square", "sub", "var_mean", "norm", "vector_norm"}:
                return []
            elif node.op == "sub":
                queue.append(consumer)
    return found


def _runs_within(graph: Graph, call: int, outer: int) -> bool:
    if outer < 0:
        return False
    while call >= 0 and call != outer:
        call = graph.calls[call].parent
    return call == outer


def find_streams(graph: Graph, roles: Roles, joins: list[Join]) -> tuple[list[Join], tuple[Stream, ...]]:
    """The joins with the name of their stream filled in, and the streams."""
    chains = _chains(roles, joins)
    names = _names(graph, joins, chains)
    named = list(joins)
    streams = []
    for name, chain in zip(names, chains, strict=True):
        for position in chain:
            join = joins[position]
            named[position] = replace(join, branches=tuple(replace(b, stream=name) for b in join.branches))
        segments = _segments(roles, [joins[position] for position in chain])
        exact = len(set(segments)) == 1 and _keeps(roles, joins[chain[0]])
        first = joins[chain[0]]
        points = (_origin(graph, first.fork), *(joins[p].branches[0].join for p in chain))
        nodes = (first.fork, *(joins[p].node for p in chain))
        streams.append(Stream(name, "stream", points, nodes, exact, segments))
    return named, tuple(streams)


def _chains(roles: Roles, joins: list[Join]) -> list[list[int]]:
    """Positions of the joins of each stream. Where several joins leave from one, the outermost goes on with it."""
    at = {join.node: position for position, join in enumerate(joins)}
    successor: dict[int, int] = {}
    for position, join in enumerate(joins):
        source = _source(roles, join.fork, at)
        if source is not None:
            successor[source] = position  # later joins overwrite: the last one encloses the others
    before = {position: source for source, position in successor.items()}
    chains = []
    for position in range(len(joins)):
        if position in before:
            continue
        chain = [position]
        while chain[-1] in successor:
            chain.append(successor[chain[-1]])
        chains.append(chain)
    return chains


def _source(roles: Roles, fork: int, at: dict[int, int]) -> int | None:
    """The join whose output becomes a fork by identity-like operations, norms, activations, or with something added."""
    index: int | None = fork
    while index is not None:
        if index in at:
            return at[index]
        node = roles.nodes[index]
        before = roles.like.identity_parent(index)
        if before is None and node.op in _LINKS:
            before = node.parents[0]
        elif before is None and node.op in families.ADDITIONS:  # a position or a condition put onto the stream
            before = _added_to(roles, node.parents[:2], at)
        elif before is None:
            before = roles.like.norm_source(index)
        index = before
    return None


def _added_to(roles: Roles, operands: Sequence[int], at: dict[int, int]) -> int | None:
    """The operand of an addition that is the stream: the only one with data, else the one that a join's output is."""
    signals = [operand for operand in operands if roles.data[operand]]
    if len(signals) < 2:
        return signals[0] if signals else None
    return next((operand for operand in signals if any(c in at for c in roles.like.chain(operand))), None)


def _segments(roles: Roles, chain: list[Join]) -> tuple[int, ...]:
    """Number of the piece that each join of a stream belongs to: within one, x_L = x_0 + Σ f holds exactly."""
    numbers = [0]
    for previous, join in pairwise(chain):
        goes_on = _keeps(roles, previous) and _keeps(roles, join) and _same(roles, join.fork, previous.node)
        numbers.append(numbers[-1] + (not goes_on))
    return tuple(numbers)


def _keeps(roles: Roles, join: Join) -> bool:
    """Whether the skip is the fork itself but for views."""
    return join.skip.scale == 1 and _same(roles, join.skip.node, join.fork)


def _same(roles: Roles, index: int, origin: int) -> bool:
    while index != origin:
        node = roles.nodes[index]
        whole = node.op in families.SLICES and roles.like.identity_parent(index) is not None
        if node.op not in _EXACT and not whole and not (node.op == "add" and node.detail.get("scalar") == 0):
            return False
        index = node.parents[0]
    return True


def _origin(graph: Graph, fork: int) -> str:
    node = graph.nodes[fork]
    return "input" if node.op == "input" else node.scope or node.op


def _names(graph: Graph, joins: list[Join], chains: list[list[int]]) -> list[str]:
    """The joins' common path, with an occurrence where several streams share it."""
    seen: Counter[str] = Counter()
    names = []
    for chain in chains:
        name = common_path([graph.nodes[joins[p].node].scope for p in chain]) or "stream"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}@{seen[name] - 1}")
    return names
