"""Whether the ledgers add up: over each piece of a stream the shares of its end and of all its branches make 1.

Read from recorded rows, so that whoever opens a run can check it again. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gradflow.records import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradflow.records import Branch, Stream
    from gradflow.store.run import Run

_TOLERANCE = 0.01
"""Part of Σ|share| by which a sum may miss 1: ten times what half precision makes of some dozens of joins."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Balance:
    """The ledger of one piece of a stream at one step.

    Attributes:
        step: The sampled step.
        stream: Name of the stream.
        points: First and last point of the piece.
        signal: Sum of the signal shares; None where a share is missing.
        gradient: Sum of the gradient shares, likewise.
        sound: Whether both are 1 as far as their precision goes.
    """

    step: int
    stream: str
    points: tuple[str, str]
    signal: float | None
    gradient: float | None
    sound: bool


def conservation(run: Run) -> list[Balance]:
    """The sums of every ledger at every sampled step of a run."""
    points: list[Row] = run.table("streams").to_pylist()
    branches: list[Row] = run.table("branches").to_pylist()
    return balances(run.streams, run.branches, points, branches)


def balances(
    streams: Iterable[Stream], branches: Sequence[Branch], point_rows: Iterable[Row], branch_rows: Iterable[Row]
) -> list[Balance]:
    """The sums of every ledger in rows of the tables `streams` and `branches`."""
    ends = {(row["step"], row["stream"], row["point"]): row for row in point_rows}
    shares = {(row["step"], row["branch"]): row for row in branch_rows}
    by_join: dict[tuple[str, str], list[str]] = {}
    for branch in branches:
        by_join.setdefault((branch.stream, branch.join), []).append(branch.name)
    found = []
    for stream in streams:
        steps = sorted({step for step, name, _ in ends if name == stream.name})
        for _, places in groupby(range(len(stream.segments)), key=stream.segments.__getitem__):
            depths = list(places)
            first, last = stream.points[depths[0]], stream.points[depths[-1] + 1]
            joins = [by_join.get((stream.name, stream.points[depth + 1]), []) for depth in depths]
            for step in steps:
                rows = [[shares.get((step, name), {}) for name in names] for names in joins]
                signal = _sum(ends.get((step, stream.name, first)), rows, "signal_share")
                gradient = _sum(ends.get((step, stream.name, last)), rows, "gradient_share")
                sound = all(total is None or abs(total - 1) <= _TOLERANCE * size for total, size in (signal, gradient))
                found.append(Balance(step, stream.name, (first, last), signal[0], gradient[0], sound))
    return found


def unbalanced(found: Iterable[Balance]) -> list[Problem]:
    """What does not add up, as problems of the run."""
    return [
        Problem(
            "ledger", f"{balance.stream}: {balance.points[0]} to {balance.points[1]}",
            f"its shares do not make 1 (step {balance.step}: signal {balance.signal}, gradient {balance.gradient})",
        )
        for balance in found if not balance.sound
    ]  # fmt: skip


def _sum(end: Row | None, joins: list[list[Row]], column: str) -> tuple[float | None, float]:
    """Sum of a piece's shares and of their sizes; branches that share their start have theirs on the first."""
    values = [None if end is None else end.get(column)]
    for rows in joins:
        known = [row[column] for row in rows if row.get(column) is not None]
        values += known or [None]
    if any(value is None for value in values):
        return None, 0.0
    numbers = [value for value in values if value is not None]
    return sum(numbers), sum(map(abs, numbers))
