"""Small words that findings are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST_PLACES = 8
"""A finding names at most this many places; the evidence says how many there are."""


def number(value: float) -> str:
    """A number with two significant digits, as a person writes it."""
    return f"{value:.2g}" if abs(value) < 1e4 else f"{value:.1e}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """A few names in a sentence: `a, b, c and 4 more`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """Names without repetition, in order, at most `MOST_PLACES` of them."""
    return tuple(dict.fromkeys(names))[:MOST_PLACES]


def confidence(samples: int, least: int = 3) -> str:
    """`"low"` where fewer than `least` sampled steps carry the finding."""
    return "high" if samples >= least else "low"
