"""Graph of one pass -> its residual joins, branches and streams. Pure: no torch, the graph alone decides."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gradflow.records import Branch, Join, Problem, Structure
from gradflow.residuals.joins import JoinFinder
from gradflow.residuals.naming import name_branches
from gradflow.residuals.paths import begins_with_norm
from gradflow.residuals.roles import Roles
from gradflow.residuals.streams import find_streams, is_post_norm
from gradflow.residuals.trunks import find_trunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Graph, Placement
    from gradflow.residuals.joins import Match
    from gradflow.residuals.naming import Label


def analyse(graph: Graph) -> Structure:
    """Joins in order of execution, the streams that they form, and what could not be understood."""
    roles = Roles(graph.nodes)
    finder = JoinFinder(graph, roles)
    matches = finder.run()
    names = name_branches(graph, roles, finder.ancestry, [(m.node, m.fork, m.addends) for m in matches])
    depths = _depths(graph, {m.node for m in matches})
    forks = [m.fork for m in matches]
    joins = [
        _join(graph, roles, match, labels, join=name, depth=depths[match.node], forks=forks)
        for match, (name, labels) in zip(matches, names, strict=True)
    ]
    joins, streams = find_streams(graph, roles, joins)
    names_taken = {stream.name for stream in streams}
    streams += tuple(
        replace(trunk, name=f"{trunk.name}@trunk") if trunk.name in names_taken else trunk
        for trunk in find_trunk(graph, roles, joins)
    )
    problems = [*graph.problems]
    if roles.exhausted:
        problems.append(Problem("long ways", "", "so many sums reach far back that not all could be looked into"))
    return Structure(tuple(joins), streams, tuple(problems))


def _join(
    graph: Graph, roles: Roles, match: Match, labels: Sequence[Label], *, join: str, depth: int, forks: Sequence[int]
) -> Join:
    """A join with its branches' records, the stream still open."""
    after: Placement = "post-norm" if is_post_norm(graph, roles, match.node, forks) else "none"
    branches = []
    for label, addend in zip(labels, match.addends, strict=True):
        placement: Placement = "pre-norm" if begins_with_norm(roles, match.fork, addend.node) else after
        module = graph.nodes[match.node].scope
        branches.append(Branch(label.name, join, module, match.kind, label.occurrence, depth, placement))
    return Join(match.node, match.fork, match.skip, match.addends, tuple(branches))


def _depths(graph: Graph, joins: set[int]) -> list[int]:
    """Joins on the longest path to every node, itself included."""
    depths: list[int] = []
    for node in graph.nodes:
        depths.append(max(map(depths.__getitem__, node.parents), default=0) + (node.index in joins))
    return depths
