"""Single figures read off a run: what a stream does from end to end, at the last sampled step that has it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.store.grids import Grid, View

    Floats = NDArray[np.float64]


def first_and_last(values: Any) -> tuple[float, float] | None:
    """First and last finite value of a series, or None where there is none."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return (float(known[0]), float(known[-1])) if known.size else None


def last_row(view: View, table: str, column: str, *, stream: str | None = None) -> tuple[list[str], Floats]:
    """(names, values) of a column at the last step that holds any finite value; empty where none does."""
    grid = view.last(table, column)
    if stream is not None:
        grid = grid.named(first=stream)
    if not np.isfinite(grid.values).any():
        grid = view.grid(table, column)
        grid = grid if stream is None else grid.named(first=stream)
    seen = np.flatnonzero(np.isfinite(grid.values).any(axis=1))
    return (grid.labels, grid.values[seen[-1]]) if seen.size else ([], np.empty(0))


def last_loss(view: View) -> float | None:
    """Loss at the last sampled steps: the median of up to 5 of them, since single batches scatter."""
    _, values = view.series("loss")
    known = values[np.isfinite(values)]
    return float(np.median(known[-min(5, max(1, len(known) // 5)) :])) if known.size else None


def median_of(view: View, table: str, column: str) -> float | None:
    """Median of a column over things, at the last step that holds any finite value."""
    _, row = last_row(view, table, column)
    known = row[np.isfinite(row)]
    return float(np.median(known)) if known.size else None


def main_stream(view: View) -> str | None:
    """The stream (or trunk) of the most points."""
    return max(view.streams, key=lambda stream: len(stream.points)).name if view.streams else None


def gradient_ratio(view: View) -> float | None:
    """Gradient at the first point of the main stream over that at its last, at the last sampled step."""
    _, row = last_row(view, "streams", "grad_rms", stream=main_stream(view))
    ends = first_and_last(row)
    return ends[0] / ends[1] if ends and ends[1] > 0 and len(row) > 1 else None


def output_cosine(view: View) -> float | None:
    """Token cosine at the end of the main stream, at the last sampled step."""
    _, row = last_row(view, "streams", "token_cosine", stream=main_stream(view))
    ends = first_and_last(row)
    return ends[1] if ends else None


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a stream over which x_L = x_0 + Σ f holds exactly, so that it has a ledger of its own.

    `start` and `end` are its first and last point, `branches` the names of its branches; `name` is the stream's, with
    the ends where the stream has several pieces.
    """

    stream: str
    name: str
    start: str
    end: str
    branches: tuple[str, ...]


def pieces(view: View, column: str) -> list[Piece]:
    """Pieces of streams whose ledger was recorded, that of the most branches first.

    `column` is `"signal_share"` (forwards) or `"gradient_share"` (backwards).
    """
    shares = view.grid("branches", column)
    known = {shares.labels[i] for i in np.flatnonzero(np.isfinite(shares.values).any(axis=0))}
    found: list[Piece] = []
    for stream in view.streams:
        joins = stream.points[1:]
        numbers = stream.segments if len(stream.segments) == len(joins) else (0,) * len(joins)
        for number, group in groupby(range(len(joins)), key=lambda at: numbers[at]):
            places = list(group)
            inside = {joins[at] for at in places}
            names = tuple(b.name for b in view.branches if b.stream == stream.name and b.join in inside)
            start, end = stream.points[places[0]], joins[places[-1]]
            name = stream.name if len(set(numbers)) == 1 else f"{stream.name}, piece {number + 1}"
            if known.intersection(names):
                found.append(Piece(stream.name, name, start, end, names))
    return sorted(found, key=lambda piece: -len(piece.branches))


def ledger(view: View, column: str, piece: Piece) -> tuple[Floats, Grid]:
    """(share of the piece's own end entry, shape (step,); shares of its branches, a grid).

    The entry of x_0 stands at the piece's first point, that of the pure skip path at its last.
    """
    shares, inside = view.grid("branches", column), set(piece.branches)
    points = view.grid("streams", column)
    own = (piece.stream, piece.start if column == "signal_share" else piece.end)
    column_of_own = (
        points.values[:, points.names.index(own)] if own in points.names else np.full(len(points.steps), np.nan)
    )
    return column_of_own, shares.select([i for i, label in enumerate(shares.labels) if label in inside])


def ledger_error(view: View) -> float | None:
    """Largest distance from 1 of a ledger's sum, over pieces, directions and sampled steps; None without a ledger."""
    worst: list[float] = []
    for column in ("signal_share", "gradient_share"):
        for piece in pieces(view, column):
            own, shares = ledger(view, column, piece)
            seen = np.isfinite(own) & np.isfinite(shares.values).all(axis=1)
            if seen.any():
                worst.append(float(np.abs(own + shares.values.sum(axis=1) - 1.0)[seen].max()))
    return max(worst) if worst else None
