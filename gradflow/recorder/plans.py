"""What the passes of a run taught: their analyses, remembered, so that a pass with the same operations costs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gradflow.recorder.join_gradients import closed_joins
from gradflow.recorder.stream_taps import points_besides

if TYPE_CHECKING:
    from gradflow.records import Graph, Structure

_MOST_PLANS = 64
"""Analyses remembered: a model whose control flow changes at every step must not fill the memory."""


@dataclass(slots=True)
class Plans:
    """What earlier passes taught: their structures, and the role of each addition by the pass up to it.

    `roles` maps the tracer's fingerprint just before an addition to "join", "partial" or "other"; an addition that is
    not in it has never been seen at this place and is measured in case it turns out to be a join. `points` holds the
    modules that are points of a trunk, None while no pass has been analysed.
    """

    structures: dict[int, tuple[Structure, frozenset[int]]] = field(default_factory=dict)
    roles: dict[int, str] = field(default_factory=dict)
    points: frozenset[str] | None = None

    def remember(
        self, fingerprint: int, graph: Graph, structure: Structure, additions: dict[int, int]
    ) -> tuple[Structure, frozenset[int]]:
        """Keep the structure of a pass, and which of its joins are closed.

        `additions` maps its addition nodes to the fingerprints before them.
        """
        if len(self.structures) >= _MOST_PLANS:
            self.structures.clear()
            self.roles.clear()
        plan = self.structures[fingerprint] = (structure, closed_joins(structure, graph.nodes))
        self.points = (self.points or frozenset()) | points_besides(structure, graph.nodes, graph.calls)
        joins = {join.node for join in structure.joins}
        partial = {a.addition for join in structure.joins for a in (join.skip, *join.addends)} - joins
        for node, before in additions.items():
            role = "join" if node in joins else "partial" if node in partial else "other"
            self.roles[before] = role
        return plan
