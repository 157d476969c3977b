"""Small words that findings are made of."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradflow.records import Finding

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


def plain(finding: Finding) -> Finding:
    """The finding with evidence of plain JSON types only: NaN and infinity, which JSON lacks, become None."""
    return replace(finding, evidence={key: _plain(value) for key, value in finding.evidence.items()})


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
