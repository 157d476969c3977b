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
        count = len(roles.nodes)
        self.ancestors = [0] * count
        self.through_weight = [0] * count
        for node in roles.nodes:
            if node.parents and node.floating:
                self._add(roles, node.index)

    def _add(self, roles: Roles, index: int) -> None:
        ancestors = through = 0
        weights = roles.weights[index]
        for parent in roles.sources(index):
            mask = self.ancestors[parent] | self.bit.get(parent, 0)
            ancestors |= mask
            through |= mask if weights is not None and parent not in weights else self.through_weight[parent]
        self.ancestors[index], self.through_weight[index] = ancestors, through
