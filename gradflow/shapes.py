"""How shapes broadcast. Pure, no torch."""

from __future__ import annotations

import math
from itertools import zip_longest

Shape = tuple[int, ...]


def broadcast(one: Shape, other: Shape) -> Shape:
    """Shape of the sum of two tensors that broadcast."""
    if one == other:
        return one
    sizes = zip_longest(one[::-1], other[::-1], fillvalue=1)
    return tuple([q if p == 1 else p for p, q in sizes])[::-1]


def broadcast_factor(shape: Shape, target: Shape) -> float:
    """How often each element of a tensor of `shape` enters a sum of shape `target`, for sums over the join."""
    return math.prod(target) / max(math.prod(shape), 1)
