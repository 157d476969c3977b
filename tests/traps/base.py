"""Tiny models, one structural trap each, with the joins that are there written by hand.

`TRAPS[name]` builds (model, arguments); its docstring names the trap; `joins` counts the joins by the module in whose
forward they are evaluated, `branches` and `projections` are totals.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

D = 8


@dataclass
class Trap:
    build: Callable
    joins: dict
    branches: int
    projections: int = 0
    kwargs: dict = field(default_factory=dict)


TRAPS: dict[str, Trap] = {}


def trap(joins=None, branches=None, projections=0):
    """Register a builder with its truth."""
    joins = joins or {}

    def register(build):
        assert build.__doc__, build.__name__
        assert build.__name__ not in TRAPS, build.__name__
        total = sum(joins.values())
        TRAPS[build.__name__] = Trap(build, joins, total if branches is None else branches, projections)
        return build

    return register


class Net(nn.Module):
    """A module from a forward function and its parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def mlp(i=D, h=16, o=None):
    return nn.Sequential(nn.Linear(i, h), nn.GELU(), nn.Linear(h, o or i))


def blocks(function, n=2, **parts):
    """A stem and n blocks with the same forward and parts of their own."""
    return nn.Sequential(
        nn.Linear(D, D), *[Net(function, **{k: make() for k, make in parts.items()}) for _ in range(n)]
    )


def vectors(n=4, d=D):
    return (torch.randn(n, d),)


def tokens(t=5, d=D):
    return (torch.randn(2, t, d),)
