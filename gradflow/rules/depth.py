"""Signal and gradient along the depth of a stream, a trunk, or (where there is neither) the weight layers in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradflow.rules.view import window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.records import Branch, Severity
    from gradflow.rules.view import Bools, Floats, View

WEIGHT_LAYERS = re.compile(r"linear|conv|dense|bilinear", re.IGNORECASE)
ATTENTION = re.compile(r"att(?:n|ention)", re.IGNORECASE)
LEAST_POINTS = 4
"""A profile over fewer points is no depth: two or three layers may differ by anything."""


YOUNG = 30
"""Steps up to which a plain stack may still grow out of a poor initialisation, as healthy ones of 8 layers do."""
YOUNG_FACTOR = 1e-2
"""How much worse than its threshold a young run must be to be alarming."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One stream or trunk, point by point.

    Attributes:
        name: Of the stream or trunk.
        kind: `"stream"`, `"trunk"`, or `"layers"` where the layers stand in for it.
        points: Names of the points, from the input.
        joins: Branches of the join behind each point; empty at a stream's start and along a trunk.
        steps: Sampled steps, shape (step,).
        rms: Root mean square of the signal, shape (step, point).
        grad: L2 norm of the gradient, shape (step, point).
        grad_rms: The same per element.
        reached: Whether a gradient was recorded there at all (zero counts, null does not), shape (step, point).
        cosine: Token cosine, shape (step, point).
    """

    name: str
    kind: str
    points: tuple[str, ...]
    joins: tuple[tuple[Branch, ...], ...]
    steps: NDArray[np.int64]
    rms: Floats
    grad: Floats
    grad_rms: Floats
    reached: Bools
    cosine: Floats

    def names(self, point: int) -> tuple[str, ...]:
        """What to call a point in a finding: the branches of its join, or the point itself."""
        return tuple(branch.name for branch in self.joins[point]) or (self.points[point],)

    @property
    def placement(self) -> str:
        """Placement of most joins: `"pre-norm"`, `"post-norm"`, `"none"`; `"plain"` without joins."""
        placements = [branch.placement for join in self.joins for branch in join]
        return max(sorted(set(placements)), key=placements.count) if placements else "plain"

    @property
    def recent(self) -> slice:
        """The last part of the run."""
        return window(len(self.steps))

    def attention_share(self, first: int, last: int) -> Floats:
        """For each join in (first, last]: 1 where it is attention, 0 where not, 1/2 where no name tells."""
        marks = np.array([float(any(ATTENTION.search(b.name) for b in join)) for join in self.joins])
        joined = np.array([bool(join) for join in self.joins])
        return np.asarray((marks if marks.any() else np.where(joined, 0.5, 0.0))[first + 1 : last + 1])


def profiles(view: View) -> list[Profile]:
    """Every stream and trunk that was recorded with at least `LEAST_POINTS` points, else the weight layers in order."""
    if view.profiles is None:
        view.profiles = _stream_profiles(view) or _layer_profile(view)
    return view.profiles


def _stream_profiles(view: View) -> list[Profile]:
    grid = view.grid("streams")
    found = []
    kinds = {stream.name: stream.kind for stream in view.run.streams}
    joins: dict[str, list[Branch]] = {}
    for branch in view.run.branches:
        joins.setdefault(branch.join, []).append(branch)
    for name in dict.fromkeys(key[0] for key in grid.keys):
        columns = [i for i, key in enumerate(grid.keys) if key[0] == name]
        depth = np.nan_to_num(grid["depth"][:, columns].max(axis=0, initial=-1.0, where=grid.present[:, columns]))
        columns = [columns[i] for i in np.argsort(depth, kind="stable")]
        if len(columns) < LEAST_POINTS:
            continue
        points = tuple(grid.keys[i][1] for i in columns)
        members = tuple(tuple(joins.get(point, ())) for point in points)
        n = grid["n"][:, columns]
        n = np.where(n > 0, n, np.nan)
        signal, gradient = grid["out_sq"][:, columns], grid["grad_sq"][:, columns]
        reached = grid.raw("grad_sq")[1][:, columns]
        cosine = grid["token_cosine"][:, columns]
        kind = kinds.get(name) or ("stream" if any(members) else "trunk")
        found.append(
            Profile(
                name, kind, points, members, grid.steps,
                np.sqrt(signal / n), np.sqrt(gradient), np.sqrt(gradient / n), reached, cosine,
            )
        )  # fmt: skip
    return found


def _layer_profile(view: View) -> list[Profile]:
    """A profile over the outputs of the weight layers in order of execution, each called once in a pass."""
    grid = view.grid("layers")
    kinds = grid.text("kind")
    repeated = {layer.module for layer in view.run.layers if layer.occurrence > 0}
    modules = {layer.name: layer.module for layer in view.run.layers}
    columns = [
        i
        for i, name in enumerate(grid.names)
        if WEIGHT_LAYERS.search(kinds[i]) and modules.get(name, name) not in repeated
    ]
    if len(columns) < LEAST_POINTS or any(stream.kind == "stream" for stream in view.run.streams):
        return []
    n = grid["n"][:, columns]
    n = np.where(n > 0, n, np.nan)
    signal, gradient = grid["out_sq"][:, columns], grid["grad_out_sq"][:, columns]
    reached = grid.raw("grad_out_sq")[1][:, columns]
    empty = np.full(signal.shape, np.nan)
    points = tuple(grid.names[i] for i in columns)
    return [
        Profile(
            "layers", "layers", points, ((),) * len(points), grid.steps,
            np.sqrt(signal / n), np.sqrt(gradient), np.sqrt(gradient / n), reached, empty,
        )
    ]  # fmt: skip


def grave(view: View, severity: Severity, *, certain: bool) -> Severity:
    """The severity, but info where the run is young and things are not so bad that they cannot heal."""
    return severity if certain or view.steps[-1] >= YOUNG else "info"


def ends(values: Floats) -> tuple[int, int] | None:
    """First and last point with a positive value at most steps; None if fewer than `LEAST_POINTS` lie between."""
    known = np.flatnonzero((values > 0).mean(axis=0) >= 0.5)
    if not len(known) or known[-1] - known[0] + 1 < LEAST_POINTS:
        return None
    return int(known[0]), int(known[-1])
