"""A handful of figures that sum up one sampled step, for the loggers that a training has attached."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

Row = dict[str, Any]


def headline(rows: dict[str, list[Row]]) -> dict[str, float]:
    """Summary figures of one sampled step from its raw rows; a figure that does not exist is left out.

    `grad_norm` (global L2 norm), `branch_ratio_median`, `branch_ratio_min` (branch RMS over skip RMS),
    `gradient_first_over_last` (gradient RMS at the longest stream's start over its end: 1 is even, 1e-3 vanishing),
    `token_cosine_end` (1: all tokens are the same), `update_ratio_median`, `nonfinite` (NaN and infinite elements).
    """
    figures: dict[str, float | None] = {"grad_norm": rows["steps"][0].get("grad_norm") if rows.get("steps") else None}
    ratios = sorted(r for row in rows.get("branches", ()) if (r := _root(row, "branch_sq", "skip_sq")) is not None)
    if ratios:
        figures |= {"branch_ratio_median": median(ratios), "branch_ratio_min": ratios[0]}
    points = _longest_stream(rows.get("streams", []))
    if len(points) > 1:
        first, last = points[0], points[-1]
        if first.get("n") == last.get("n"):
            figures["gradient_first_over_last"] = _root({**last, "first": first.get("grad_sq")}, "first", "grad_sq")
        figures["token_cosine_end"] = last.get("token_cosine")
    updates = [u for row in rows.get("parameters", ()) if (u := _root(row, "update_sq", "weight_sq")) is not None]
    if updates:
        figures["update_ratio_median"] = median(updates)
    figures["nonfinite"] = float(sum(row.get("nonfinite") or 0 for table in rows.values() for row in table))
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}


def _root(row: Row, above: str, below: str) -> float | None:
    """√(above/below), None where it is not defined."""
    x, y = row.get(above), row.get(below)
    if x is None or y is None or not (x >= 0 and y > 0 and math.isfinite(x) and math.isfinite(y)):
        return None
    return math.sqrt(x / y)


def _longest_stream(rows: list[Row]) -> list[Row]:
    """Points of the stream that has most, in order of depth."""
    streams: dict[str, list[Row]] = {}
    for row in rows:
        streams.setdefault(row["stream"], []).append(row)
    longest = max(streams.values(), key=len, default=[])
    return sorted(longest, key=lambda row: row.get("depth") or 0)
