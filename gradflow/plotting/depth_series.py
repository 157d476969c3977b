"""How signal and gradient at initialisation scale with a model's depth or width, with theory beside it. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from gradflow import theory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradflow.records import Stream
    from gradflow.store import Run


@dataclass(frozen=True, slots=True)
class Scaling:
    """What one probed model of a series shows.

    Attributes:
        size: Its depth or width, as the factory was asked for.
        steps: Joins of its longest stream, or members of its trunk after the first.
        signal: E x² at the end of the stream over that at its start.
        gradient: E g² at the start of the stream over that at its end.
        token_cosine: Mean cosine between tokens at the end; None where there are no tokens.
        loss: The loss.
        grad_norm: Norm of all parameter gradients.
        expected_signal: `signal` in theory, from the branches of the smallest model; None where none applies.
        expected_gradient: `gradient` in theory, likewise.
    """

    size: int
    steps: int
    signal: float | None
    gradient: float | None
    token_cosine: float | None
    loss: float | None
    grad_norm: float | None
    expected_signal: float | None
    expected_gradient: float | None


@dataclass(frozen=True, slots=True)
class _Branches:
    """Of the smallest model, means over its branches: placement, variance over the start's, f, b; or trunk gains."""

    placement: str
    variance: float
    f: float
    b: float


def scaling(runs: Mapping[int, Run]) -> list[Scaling]:
    """The series of probed models by size, smallest first.

    Theory takes from the smallest model what a branch adds, and says what stacking more of them does: pre-norm streams
    grow linearly and their gradients as (L+1)/(l+1), un-normalised ones exponentially in both, post-norm ones stay; a
    plain stack keeps its gain a layer.
    """
    sizes = sorted(runs)
    base = _base(runs[sizes[0]]) if sizes else None
    return [_measured(size, runs[size], base) for size in sizes]


def _measured(size: int, run: Run, base: _Branches | None) -> Scaling:
    points = _points(run)
    head = run.table("steps").to_pylist()[0]
    first, last = (points[0], points[-1]) if points else ({}, {})
    steps = max(len(points) - 1, 0)
    signal, gradient = _expected(base, steps)
    return Scaling(
        size, steps, _ratio(last.get("out_rms"), first.get("out_rms")),
        _ratio(first.get("grad_rms"), last.get("grad_rms")), last.get("token_cosine"), head["loss"], head["grad_norm"],
        signal, gradient,
    )  # fmt: skip


def _points(run: Run) -> list[dict[str, Any]]:
    """The measured points of the longest stream."""
    longest = _longest(run)
    rows: list[dict[str, Any]] = run.table("streams").to_pylist()
    return [] if longest is None else [row for row in rows if row["stream"] == longest.name]


def _longest(run: Run) -> Stream | None:
    return max(run.streams, key=lambda stream: len(stream.points), default=None)


def _ratio(over: float | None, under: float | None) -> float | None:
    """Square of a ratio of root mean squares."""
    return (over / under) ** 2 if over is not None and under else None


def _base(run: Run) -> _Branches | None:
    stream, points = _longest(run), _points(run)
    if stream is None or len(points) < 2 or not points[0]["out_rms"]:
        return None
    if stream.kind == "trunk":
        steps = len(points) - 1
        gains = (
            _ratio(points[-1]["out_rms"], points[0]["out_rms"]), _ratio(points[0]["grad_rms"], points[-1]["grad_rms"]),
        )  # fmt: skip
        if not all(gains):
            return None
        signal, gradient = (math.exp(math.log(gain) / steps) for gain in gains if gain)
        return _Branches("trunk", 0.0, signal, gradient)
    mine = {branch.name: branch.placement for branch in run.branches if branch.stream == stream.name}
    rows = [row for row in run.table("branches").to_pylist() if row["branch"] in mine]
    placements = list(mine.values())
    ratios = [(row["branch_ratio"], row["grad_branch_ratio"]) for row in rows]
    if not rows or any(f is None or b is None for f, b in ratios):
        return None
    variance = fmean(row["branch_rms"] ** 2 for row in rows) / points[0]["out_rms"] ** 2
    return _Branches(
        max(set(placements), key=placements.count), variance,
        fmean(f**2 for f, _ in ratios), fmean(b**2 for _, b in ratios),
    )  # fmt: skip


def _expected(base: _Branches | None, steps: int) -> tuple[float | None, float | None]:
    if base is None:
        return None, None
    if base.placement == "pre-norm":
        return (
            float(theory.prenorm_variance(steps, branch=base.variance)),
            float(theory.prenorm_gradient_growth(0.0, steps, branch=base.variance)),
        )
    try:
        if base.placement == "post-norm":
            return 1.0, float(theory.sublayer_gain_squared(base.b, base.f)) ** steps
        if base.placement == "trunk":
            return base.f**steps, base.b**steps
        return float(1 + base.f) ** steps, float(theory.join_gain_squared(base.b)) ** steps
    except OverflowError:
        return math.inf, math.inf
