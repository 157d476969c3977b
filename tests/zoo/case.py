"""A sick run and its label: what is wrong, where, since when, how plain PyTorch proves it, and what cures it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from zoo.training import Setup


@dataclass(frozen=True)
class Case:
    """A sick run and its label."""

    code: str
    place: str
    """Pattern that one of the finding's first three places must match."""
    setup: Setup
    proof: Callable
    remedy: str = ""
    cure: dict | Callable | None = None
    also: tuple[str, ...] = ()
    since: int = 0
    twin: str = ""
    """A healthy run to set beside one that nothing can cure."""


def rate_said(remedy):
    """The learning rate that a remedy names."""
    return {"lr": float(re.search(r"to about ([0-9.e+-]+) from", remedy)[1])}


def clip_said(remedy):
    """The norm to clip at that a remedy names."""
    return {"clip": float(re.search(r"norm at ([0-9.e+-]+),", remedy)[1])}


def scale_said(remedy):
    """The loss scale to start at that a remedy names, else the scaler's default."""
    power = re.search(r"init_scale=2.0\*\*(\d+)", remedy)
    return {"scaler": 2.0 ** int(power[1]) if power else 2.0**16}


def eps_said(remedy):
    """The optimizer's eps that a remedy names."""
    return {"options": {"eps": float(re.search(r"eps to ([0-9.e+-]+),", remedy)[1])}}
