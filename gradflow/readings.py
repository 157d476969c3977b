"""Single figures read off a run: what a stream does from end to end, at the last sampled step that has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.grids import Grid, View

    Floats = NDArray[np.float64]


def first_and_last(values: Any) -> tuple[float, float] | None:
    """First and last finite value of a series, or None where there is none."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return (float(known[0]), float(known[-1])) if known.size else None


def last_row(view: View, table: str, column: str, *, stream: str | None = None) -> tuple[list[str], Floats]:
    """(names, values) of a column at the last step that holds any finite value; empty where none does."""
    grid = view.grid(table, column)
    if stream is not None:
        grid = grid.named(first=stream)
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


def ledger_streams(view: View, column: str) -> list[str]:
    """Streams whose ledger was recorded, that of the most branches first."""
    shares = view.grid("branches", column)
    seen = np.flatnonzero(np.isfinite(shares.values).any(axis=0))
    known = {shares.labels[i] for i in seen}
    streams = [branch.stream for branch in view.branches if branch.name in known]
    return sorted(dict.fromkeys(streams), key=lambda name: -streams.count(name))


def stream_ledger(view: View, column: str, stream: str) -> tuple[Floats, Grid]:
    """(share of the stream's own end entry, shape (step,); shares of its branches, a grid)."""
    shares = view.grid("branches", column)
    inside = {branch.name for branch in view.branches if branch.stream == stream}
    ends = view.grid("streams", column).named(first=stream)
    with np.errstate(invalid="ignore"):
        own = np.where(np.isfinite(ends.values).any(axis=1), np.nansum(ends.values, axis=1), np.nan)
    return own, shares.select([i for i, label in enumerate(shares.labels) if label in inside])


def ledger_error(view: View) -> float | None:
    """Largest distance from 1 of a ledger's sum, over streams, directions and sampled steps; None without a ledger."""
    worst: list[float] = []
    for column in ("signal_share", "gradient_share"):
        for stream in ledger_streams(view, column):
            own, shares = stream_ledger(view, column, stream)
            seen = np.isfinite(own) & np.isfinite(shares.values).any(axis=1)
            if seen.any():
                worst.append(float(np.abs(own + np.nansum(shares.values, axis=1) - 1.0)[seen].max()))
    return max(worst) if worst else None
