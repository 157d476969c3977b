"""What rules see of a run: tables as arrays of step by thing, up to the first step that went non-finite.

A rule works on float64 arrays of shape (sampled step, thing), NaN where nothing was recorded. Nulls, missing tables and
measured NaN or infinity all become NaN there, so that one broken number never breaks a rule; `Grid.raw` keeps the
difference for the rule that looks for broken numbers.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.rules.depth import Profile
    from gradflow.rules.faults import Fault
    from gradflow.store import Run

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

KEYS = {
    "steps": (),
    "branches": ("branch",),
    "layers": ("layer",),
    "parameters": ("parameter",),
    "attention": ("layer",),
    "streams": ("stream", "point"),
}
Key = tuple[str, ...]

LEARNED = 0.5
"""Fall of the loss from which units that training turned off, or branches that it left small, are no trouble."""
MOST_KEPT = 150_000_000
"""Bytes of columns of a table that are kept for the next rule; a column of 5 million rows has 40 million."""


class Grid:
    """A table of a run as arrays: `steps` (int64, sorted), `keys` in the order of the table, columns on demand."""

    def __init__(self, run: Run, name: str, until: int | None) -> None:
        self._run, self._name = run, name
        table = run.columns(name, ["step", *KEYS[name]])
        if until is not None:  # a table is sorted by step
            table = table.slice(0, int(np.searchsorted(table["step"].to_numpy(), until, side="right")))
        self._rows = table.num_rows
        self.steps, self._row = _sorted_unique(table["step"].to_numpy())
        self.keys, self._place = _places(table, KEYS[name])
        shape = (len(self.steps), len(self.keys))
        # Every thing at every step, in order, is the usual case: columns are then only reshaped.
        self._full = self._rows == shape[0] * shape[1] and bool(
            (self._place.reshape(shape) == np.arange(shape[1])).all()
        )
        if self._full:
            self._row = self._place = np.empty(0, dtype=np.int64)
        self._columns: dict[str, Floats] = {}

    @property
    def names(self) -> list[str]:
        """The last part of each key: the branch, layer, parameter or point."""
        return [key[-1] for key in self.keys]

    @cached_property
    def present(self) -> Bools:
        """Shape (step, thing): whether the table has a row there."""
        present = np.full((len(self.steps), len(self.keys)), self._full)
        present[self._row, self._place] = True
        return present

    def raw(self, column: str) -> tuple[Floats, Bools]:
        """Values as measured, NaN and infinity included, and where they are not null; both (step, thing)."""
        shape = (len(self.steps), len(self.keys))
        chunked = self._run.columns(self._name, [column])[column].slice(0, self._rows)
        known = np.array(chunked.is_valid().to_numpy())
        measured = chunked.cast(pa.float64()).to_numpy()
        if self._full:
            return np.array(measured).reshape(shape), known.reshape(shape)
        values, valid = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        values[self._row, self._place] = measured
        valid[self._row, self._place] = known
        return values, valid

    def __getitem__(self, column: str) -> Floats:
        """A column of shape (step, thing), NaN where not recorded or not finite. It is kept: do not write to it."""
        if column not in self._columns:
            values, _ = self.raw(column)
            values[~np.isfinite(values)] = np.nan
            while self._columns and (len(self._columns) + 1) * values.nbytes > MOST_KEPT:
                del self._columns[next(iter(self._columns))]
            self._columns[column] = values
        return self._columns[column]

    def text(self, column: str) -> list[str]:
        """First known value of a string column of each thing, `""` where there is none."""
        found = [""] * len(self.keys)
        values = self._run.columns(self._name, [column])[column]
        first = np.unique(self._place, return_index=True) if not self._full else (range(len(found)),) * 2
        for place, row in zip(*first, strict=True):
            found[place] = values[int(row)].as_py() or ""
        return found


def _places(table: pa.Table, keys: tuple[str, ...]) -> tuple[list[Key], NDArray[np.int64]]:
    """Distinct keys in order of first appearance, and each row's index among them."""
    place = np.zeros(len(table), dtype=np.int64)
    if not keys:
        return [()], place
    encoded = [_encoded(table[key]) for key in keys]
    for column in encoded:
        place = place * max(1, len(column.dictionary)) + column.indices.to_numpy(zero_copy_only=False)
    first = np.full(int(place.max(initial=-1)) + 1, len(place))
    first[place[::-1]] = np.arange(len(place))[::-1]  # the last write wins: each key's first row
    found = np.flatnonzero(first < len(place))
    found = found[np.argsort(first[found])]
    rank = np.zeros(len(first), dtype=np.int64)
    rank[found] = np.arange(len(found))
    words = [column.dictionary.to_pylist() for column in encoded]
    rows = first[found]
    columns = [
        [word[i] for i in column.indices.to_numpy(zero_copy_only=False)[rows]]
        for word, column in zip(words, encoded, strict=True)
    ]
    return list(zip(*columns, strict=True)), rank[place]


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Names as numbers and a list of the distinct ones; they are keys, and so never null."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    whole = encoded.unify_dictionaries().combine_chunks()
    return whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole


def _sorted_unique(steps: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Distinct values and each row's index among them; tables come sorted by step, so that no sort is needed."""
    rises = np.diff(steps, prepend=steps[:1]) > 0
    if len(steps) and (np.diff(steps) < 0).any():
        return np.unique(steps, return_inverse=True)
    keep = rises.copy()
    keep[:1] = True
    return steps[keep], np.cumsum(rises)


class View:
    """A run as the rules see it.

    Args:
        run: The run.
        fault: Where the run first went non-finite, if it did (`faults.view_of` finds out).
        until: Last step that counts: what comes after a fault that broke the training says nothing about its cause.
    """

    def __init__(self, run: Run, fault: Fault | None = None, until: int | None = None) -> None:
        self.run = run
        self.fault = fault
        self.until = until
        self.profiles: list[Profile] | None = None  # filled by depth.profiles, once
        self._grids: dict[str, Grid] = {}

    def grid(self, name: str) -> Grid:
        """A table as arrays; empty arrays where the run has no such table."""
        if name not in self._grids:
            self._grids[name] = Grid(self.run, name, self.until)
        return self._grids[name]

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Every sampled step up to `until`, sorted."""
        steps = np.asarray(self.run.steps, dtype=np.int64)
        return steps if self.until is None else steps[steps <= self.until]

    def series(self, column: str) -> Floats:
        """A column of the `steps` table, one value for each of `self.steps`, NaN where unknown."""
        grid = self.grid("steps")
        values = np.full(len(self.steps), np.nan)
        if len(grid.steps):
            values[np.searchsorted(self.steps, grid.steps)] = grid[column][:, 0]
        return values

    @cached_property
    def loss_fall(self) -> float | None:
        """Share of the loss that training took away: 1 - late/early, medians; None where the run is too short."""
        loss = self._losses
        if len(loss) < 4 or not len(self.steps):
            return None
        late = float(np.median(loss[-max(2, len(loss) // 4) :]))
        return (self._early - late) / max(abs(self._early), 1e-12)

    @cached_property
    def loss_jitter(self) -> float:
        """Mean change of the loss from one sampled step to the next, over its early level."""
        return float(np.mean(np.abs(np.diff(self._losses)))) / max(abs(self._early), 1e-12)

    def falls(self, least: float) -> bool:
        """Whether the loss fell by more than `least`, and than two medians differ by when it only jitters."""
        return self.loss_fall is not None and self.loss_fall > max(least, 2 * self.loss_jitter)

    @cached_property
    def _losses(self) -> Floats:
        loss = self.series("loss")
        return np.asarray(loss[np.isfinite(loss)])

    @cached_property
    def _early(self) -> float:
        return float(np.median(self._losses[: max(2, len(self._losses) // 6)]))


def window(count: int, share: float = 1 / 3, least: int = 3) -> slice:
    """The last `share` of `count` sampled steps, `least` of them if there are as many: what the run has come to."""
    return slice(max(0, count - max(least, round(count * share))), count)


def settled(values: Floats, share: float = 1 / 3) -> Floats:
    """Median of each thing over the last steps of the run; NaN where it was never measured there."""
    return median(values[window(len(values), share)])


def median(values: Floats) -> Floats:
    """Median over the first axis that ignores NaN and is NaN (without a warning) where there is nothing else."""
    result = np.full(values.shape[1:], np.nan)
    if values.ndim == 1:
        kept = values[~np.isnan(values)]
        return np.asarray(np.median(kept)) if len(kept) else result
    full = ~np.isnan(values).all(axis=0)
    if values.shape[0] and full.any():
        result[full] = np.nanmedian(values[:, full], axis=0)
    return result


def half_precision(view: View) -> bool:
    """Whether gradients may be of float16."""
    precision = str(view.run.meta.get("precision") or "")
    halves = any(p.dtype.endswith("float16") and "bfloat16" not in p.dtype for p in view.run.parameters)
    return ("16" in precision and "bf16" not in precision) or halves


def lasting(mask: Bools, known: Bools, share: float = 1 / 3, least: float = 0.8) -> Bools:
    """Things for which `mask` holds on at least `least` of the known steps of the last part, the very last included."""
    part = window(len(mask), share)
    mask, known = mask[part] & known[part], known[part]
    seen = known.sum(axis=0)
    if not len(mask):
        return np.zeros(mask.shape[1:], dtype=bool)
    final = len(known) - 1 - np.argmax(known[::-1], axis=0)
    last = np.take_along_axis(mask, final[None], axis=0)[0]
    return np.asarray((seen > 0) & last & (mask.sum(axis=0) >= least * seen))


def spell(mask: Bools, known: Bools, steps: NDArray[np.int64]) -> tuple[int, int]:
    """First and last step of the unbroken time, unknown steps bridged, for which `mask` held to the end of the run."""
    held = np.flatnonzero(mask & known)
    if not len(held):
        return int(steps[0]), int(steps[-1])
    broken = np.flatnonzero(known & ~mask)
    broken = broken[broken < held[-1]]
    begin = held[held > broken[-1]][0] if len(broken) else held[0]
    return int(steps[begin]), int(steps[held[-1]])
