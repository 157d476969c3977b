"""Columns of a run turned into arrays of step by name, and thinned to what a picture can show. No torch, no matplotlib.

A table of a run has a row a step and thing; a picture needs a matrix. `View` makes these matrices and keeps what is
costly (a table, the position of each row) from one picture to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradflow.store.merging import distinct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gradflow.records import Branch, Layer, Parameter, Stream

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

KEYS = {
    "branches": ("branch",),
    "layers": ("layer",),
    "parameters": ("parameter",),
    "attention": ("layer",),
    "streams": ("stream", "point"),
}

MOST_KEPT = 100_000_000
"""Bytes of columns that a view keeps for the next picture; a column of 5 million rows has 40 million."""


class Tables(Protocol):
    """What a picture needs of a run; `gradflow.Run` is one."""

    branches: list[Branch]
    layers: list[Layer]
    streams: list[Stream]
    parameters: list[Parameter]

    @property
    def steps(self) -> list[int]:
        """Sampled steps, sorted."""

    def columns(self, name: str, wanted: Sequence[str], /, *, since: int | None = None) -> pa.Table:
        """Some columns of one table, of the steps from `since` on, sorted by step; names may come encoded."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A column as a matrix.

    Attributes:
        steps: Sampled steps, sorted, shape (step,).
        names: Key of each thing: one string, or a pair (stream, point), in the order of the model.
        values: Shape (step, name); NaN where nothing was recorded and where it is not finite.
        broken: Shape (step, name); True where a value was recorded that is NaN or infinite.
    """

    steps: Ints
    names: tuple[tuple[str, ...], ...]
    values: Floats
    broken: NDArray[np.bool_]

    @property
    def labels(self) -> list[str]:
        """The last part of each key: the branch, the layer, the point."""
        return [name[-1] for name in self.names]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not (np.isfinite(self.values).any() or self.broken.any())

    def row(self, step: int) -> Floats:
        """Values at one sampled step, shape (name,)."""
        row: Floats = self.values[int(np.searchsorted(self.steps, step))]
        return row

    def select(self, keep: Sequence[int] | Ints) -> Grid:
        """The same with some of the names only, in the given order."""
        index = np.asarray(keep, dtype=np.int64)
        return Grid(self.steps, tuple(self.names[i] for i in index), self.values[:, index], self.broken[:, index])

    def at(self, steps: slice) -> Grid:
        """The same at some of the steps only."""
        return Grid(self.steps[steps], self.names, self.values[steps], self.broken[steps])

    def named(self, **key: str) -> Grid:
        """The names whose first part is `first`, such as the points of one stream."""
        return self.select([i for i, name in enumerate(self.names) if name[0] == key["first"]])

    def recorded_steps(self) -> list[int]:
        """Steps at which anything was recorded."""
        seen = (np.isfinite(self.values) | self.broken).any(axis=1)
        return [int(step) for step in self.steps[seen]]

    def thinned(self, steps: int, names: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Means over runs of neighbouring steps and names, so that at most (steps, names) cells are left."""
        values, broken = self.values, self.broken
        for axis, limit in ((0, steps), (1, names)):
            values, broken = _mean_of_runs(values, limit, axis), _any_of_runs(broken, limit, axis)
        return values, broken


def run_starts(length: int, limit: int) -> Ints:
    """First index of each of at most `limit` runs of nearly equal length that cover `length` items."""
    count = max(1, min(length, limit))
    return np.unique(np.linspace(0, length, count, endpoint=False).astype(np.int64))


def _mean_of_runs(values: Floats, limit: int, axis: int) -> Floats:
    if values.shape[axis] <= limit:
        return values
    starts = run_starts(values.shape[axis], limit)
    known = np.isfinite(values)
    count = np.add.reduceat(known.astype(np.float64), starts, axis=axis)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = np.where(count > 0, total / count, np.nan)
    return mean


def _any_of_runs(flags: NDArray[np.bool_], limit: int, axis: int) -> NDArray[np.bool_]:
    if flags.shape[axis] <= limit:
        return flags
    any_of: NDArray[np.bool_] = np.logical_or.reduceat(flags, run_starts(flags.shape[axis], limit), axis=axis)
    return any_of


class View:
    """A run seen as grids. It is a `Tables` itself, so that pictures that share one read each table once."""

    def __init__(self, run: Tables) -> None:
        self.run = run
        self.branches, self.layers = run.branches, run.layers
        self.streams, self.parameters = run.streams, run.parameters
        self.steps = run.steps  # found anew at each reading
        self._columns: dict[tuple[str, str], pa.ChunkedArray] = {}
        self._known: dict[tuple[str, str], bool] = {}
        self._places: dict[tuple[str, int | None], tuple[Ints | None, tuple[tuple[str, ...], ...]]] = {}

    @classmethod
    def of(cls, run: Tables) -> View:
        """The run's view: `run` itself where it is one."""
        return run if isinstance(run, View) else cls(run)

    def columns(self, name: str, wanted: Sequence[str], /, *, since: int | None = None) -> pa.Table:
        """The run's columns, those that were read last without reading them again."""
        if since is not None:
            return self.run.columns(name, wanted, since=since)
        return pa.table([self._column(name, column) for column in wanted], names=list(wanted))

    def _column(self, table: str, column: str) -> pa.ChunkedArray:
        key = (table, column)
        found = self._columns.pop(key, None)
        if found is None:
            found = self.run.columns(table, [column])[column]
            while self._columns and sum(kept.nbytes for kept in self._columns.values()) + found.nbytes > MOST_KEPT:
                del self._columns[next(iter(self._columns))]
        self._columns[key] = found  # those read last stand last
        return found

    def has(self, table: str, column: str) -> bool:
        """Whether the column holds anything."""
        if (table, column) not in self._known:
            values = self._column(table, column)
            self._known[table, column] = values.null_count < len(values)
        return self._known[table, column]

    def grid(self, table: str, column: str) -> Grid:
        """The column as a matrix of step by name; empty where nothing of it was recorded."""
        if not self.has(table, column):
            return self._grid(table, None, None)
        return self._grid(table, self._column(table, column), None)

    def last(self, table: str, column: str) -> Grid:
        """The last step at which anything of the column was recorded: a grid of one row, of none where nothing was."""
        if self.steps:  # the rows of one step are read in no time, and mostly hold it
            since = self.steps[-1]
            grid = self._grid(table, self.run.columns(table, [column], since=since)[column], since)
            if not grid.empty:
                return grid
        grid = self.grid(table, column)
        seen = np.flatnonzero((np.isfinite(grid.values) | grid.broken).any(axis=1))
        return grid.at(slice(seen[-1], seen[-1] + 1) if seen.size else slice(0, 0))

    def _grid(self, table: str, data: pa.ChunkedArray | None, since: int | None) -> Grid:
        place, names = self._place(table, since)
        steps = np.asarray([step for step in self.steps if since is None or step >= since], dtype=np.int64)
        shape = (len(steps), len(names))
        if data is None:
            return Grid(steps, names, np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_))
        numbers = data.to_numpy().astype(np.float64, copy=False)
        finite = np.isfinite(numbers)
        broken = ~finite & data.is_valid().to_numpy() if not finite.all() else ~finite
        numbers = np.where(broken, np.nan, numbers) if broken.any() else numbers
        if place is None:
            return Grid(steps, names, numbers.reshape(shape), broken.reshape(shape))
        values, flags = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)
        values.reshape(-1)[place], flags.reshape(-1)[place] = numbers, broken
        return Grid(steps, names, values, flags)

    def series(self, column: str) -> tuple[Ints, Floats]:
        """A column of the `steps` table against the step, shapes (step,) both; NaN where it is null."""
        frame = self.columns("steps", ["step", column])
        return frame["step"].to_numpy().astype(np.int64), frame[column].to_numpy().astype(np.float64)

    def _place(self, table: str, since: int | None) -> tuple[Ints | None, tuple[tuple[str, ...], ...]]:
        """(cell of each row, counted row by row; names). None for the cells where the rows fill the grid in order."""
        if (table, since) not in self._places:
            frame = self.run.columns(table, ["step", *KEYS[table]], since=since)
            known = np.asarray([step for step in self.steps if since is None or step >= since], dtype=np.int64)
            codes, names = _codes([frame[key] for key in KEYS[table]])
            order = self._in_order(table, names)
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order))
            place = np.searchsorted(known, frame["step"].to_numpy()) * len(order) + rank[codes]
            whole = len(place) == len(known) * len(order) and bool((place == np.arange(len(place))).all())
            self._places[table, since] = (None if whole else place, tuple(names[i] for i in order))
        return self._places[table, since]

    def _in_order(self, table: str, names: tuple[tuple[str, ...], ...]) -> list[int]:
        """The keys in the order of the model; what `run.json` does not list follows as it appeared."""
        listed: list[tuple[str, ...]]
        if table == "streams":
            listed = [(stream.name, point) for stream in self.streams for point in stream.points]
        else:
            things: Sequence[Branch | Parameter | Layer] = self.layers
            if table in {"branches", "parameters"}:
                things = self.branches if table == "branches" else self.parameters
            listed = [(thing.name,) for thing in things]
        rank = {key: i for i, key in enumerate(listed)}
        return sorted(range(len(names)), key=lambda i: rank.get(names[i], len(rank)))


def _codes(columns: list[pa.ChunkedArray]) -> tuple[Ints, tuple[tuple[str, ...], ...]]:
    """A number for each row's key, counted in order of first appearance, and the keys."""
    rows = len(columns[0])
    code, width = np.zeros(rows, dtype=np.int64), 1
    dictionaries: list[list[str]] = []
    for column in columns:
        encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
        encoded = encoded.unify_dictionaries().combine_chunks()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.chunk(0) if encoded.num_chunks else pa.array([], pa.string()).dictionary_encode()
        values = encoded.dictionary.to_pylist()
        code = code * max(1, len(values)) + encoded.indices.to_numpy().astype(np.int64)
        width *= max(1, len(values))
        dictionaries.append(values)
    seen, first, inverse = distinct(code, width)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse], tuple(_decode(int(seen[i]), dictionaries) for i in order)


def _decode(code: int, dictionaries: list[list[str]]) -> tuple[str, ...]:
    parts = []
    for values in reversed(dictionaries):
        code, at = divmod(code, len(values))
        parts.append(values[at])
    return tuple(reversed(parts))
