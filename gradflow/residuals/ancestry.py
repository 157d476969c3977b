"""Which nodes depend on which possible forks, and through a weight or not.

Only possible forks get a bit, so that a set of them is a small Python int and a fact about thousands of nodes costs an
OR each. Only floating-point tensors hand a signal on: an index, a mask or a token id ends an ancestry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradflow.residuals.roles import Roles


class Ancestry:
    """Masks of possible forks, per node.

    Attributes:
        bit: The mask of each possible fork.
        ancestors: Those that a node's values depend on.
        through_weight: Those of them that reach it through at least one learned operation.
    """

    def __init__(self, roles: Roles, forks: Iterable[int]) -> None:
        self.bit = {fork: 1 << place for place, fork in enumerate(sorted(forks))}
        reached = [0] * len(roles.nodes)  # the ancestors and the node itself
        for fork, bit in self.bit.items():
            reached[fork] = bit
        self.ancestors = reached.copy()
        self.through_weight = [0] * len(roles.nodes)
        for index, sources in enumerate(roles.sources):
            weights = roles.weights[index]
            ancestors = through = 0
            for source in sources:
                ancestors |= reached[source]
                learned = weights is not None and source not in weights
                through |= reached[source] if learned else self.through_weight[source]
            self.ancestors[index], self.through_weight[index] = ancestors, through
            reached[index] |= ancestors
