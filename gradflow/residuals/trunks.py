"""The trunk: where a model, or a part of it, has no joins, the longest chain of modules takes the stream's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.records import Stream
from gradflow.residuals.naming import common_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Graph, Join
    from gradflow.residuals.roles import Roles

# Beside joins a chain must be a stack of its own, not the few modules between two blocks.
_LEAST, _LEAST_LEARNED = 4, 4


def find_trunk(graph: Graph, roles: Roles, joins: Sequence[Join]) -> tuple[Stream, ...]:
    """The longest chain of sibling calls, each reading what the one before made, outside all joins and branches."""
    apart, inside = _calls_with_joins(graph, joins), _branch_nodes(roles, joins)
    ends = {join.node for join in joins}
    groups: dict[int, list[int]] = {}
    for call in graph.calls:
        made = call.outputs[0] if call.outputs else -1
        handed_on = made in call.inputs  # by `nn.Identity`, by dropout in eval mode: no point of its own
        usable = made >= 0 and not handed_on and graph.nodes[made].floating
        if usable and call.index not in apart and made not in inside:
            groups.setdefault(call.parent, []).append(call.index)
    best: list[int] = []
    for siblings in sorted(groups.values(), key=len, reverse=True):
        if len(siblings) <= len(best):
            break
        chain = _longest(graph, siblings, ends)
        best = chain if len(chain) > len(best) else best
    least = _LEAST if joins else 2
    if len(best) < least or (joins and _learned(graph, roles, best) < _LEAST_LEARNED):
        return ()
    return (_stream(graph, best),)


def _stream(graph: Graph, chain: Sequence[int]) -> Stream:
    paths = [graph.calls[call].module for call in chain]
    seen: dict[str, int] = {}
    points = []
    for path in paths:
        occurrence = seen[path] = seen.get(path, -1) + 1
        points.append(f"{path}@{occurrence}" if occurrence else path)
    name = common_path(paths)
    return Stream(name or "trunk", "trunk", tuple(points), tuple(graph.calls[call].outputs[0] for call in chain))


def _calls_with_joins(graph: Graph, joins: Sequence[Join]) -> set[int]:
    """Calls in whose forward, or in a forward below it, a join is evaluated."""
    found: set[int] = set()
    for join in joins:
        call = graph.nodes[join.node].call
        while call >= 0 and call not in found:
            found.add(call)
            call = graph.calls[call].parent
    return found


def _branch_nodes(roles: Roles, joins: Sequence[Join]) -> set[int]:
    return {n for join in joins for addend in join.addends for n in roles.between(join.fork, addend.node)}


def _learned(graph: Graph, roles: Roles, chain: Sequence[int]) -> int:
    """How many calls of a chain run a learned operation."""
    members = set(chain)
    found = set()
    for index, weights in enumerate(roles.weights):
        call = graph.nodes[index].call if weights is not None else -1
        while call >= 0 and call not in members:
            call = graph.calls[call].parent
        found.add(call)
    return len(found - {-1})


def _longest(graph: Graph, siblings: Sequence[int], stops: set[int]) -> list[int]:
    """The longest chain of calls by which each call's output comes from the one before, not by way of a join."""
    made = {graph.calls[call].outputs[0]: call for call in siblings}
    length: dict[int, int] = {}
    reached: dict[int, int] = {}  # by node: the call that ends the longest chain on the way to it
    previous: dict[int, int] = {}
    for node in graph.nodes[min(made) :]:
        call = made.get(node.index)
        sources = graph.calls[call].inputs if call is not None else node.parents
        longest, before = 0, -1
        for source in sources:
            end = reached.get(source, -1)
            if end >= 0 and length[end] > longest and source not in stops:
                longest, before = length[end], end
        if call is not None:
            length[call], previous[call] = 1 + longest, before
            reached[node.index] = call
        elif before >= 0:
            reached[node.index] = before
    chain = []
    step = max(length, key=length.__getitem__)
    while step >= 0:
        chain.append(step)
        step = previous[step]
    return chain[::-1]
