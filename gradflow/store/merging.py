"""Rows of several ranks into one row, later records over earlier ones, in the order of the model. No torch here.

One stable sort brings equal rows together; sums, maxima and the rest are then reductions over segments, so that
millions of rows take a second and no Python loop runs over rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gradflow.schema import TABLES, Column

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Integers = npt.NDArray[np.int64]
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the rows of a table are sorted and merged; found from its keys, applied to any of its columns.

    Attributes:
        table: Name of the table; `schema.TABLES` says how each of its columns merges.
        sorting: Rows to take, in order; None where they stand as they shall.
        starts: First row of each group that becomes one, after sorting; None where each row stays one.
        merges: Whether ranks are merged.
        world_size: Ranks of the run: merged sums of activation gradients are divided by its square.
    """

    table: str
    sorting: Integers | None
    starts: Integers | None
    merges: bool
    world_size: int

    def apply(self, rows: pa.Table) -> pa.Table:
        """Return the rows, of any raw columns of the table, sorted and merged."""
        if self.sorting is not None:
            rows = rows.take(pa.array(self.sorting))
        if not self.merges:
            return rows
        known = {column.name: column for column in TABLES[self.table]}
        merged = [self._merged(known[name], rows[name]) for name in rows.column_names]
        return pa.table(merged, names=rows.column_names)

    def _merged(self, column: Column, values: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
        if column.name == "rank":
            return pa.array(np.zeros(len(values) if self.starts is None else len(self.starts), dtype=np.int64))
        if self.starts is not None:
            is_key = column.merge == "key"
            values = values.take(pa.array(self.starts)) if is_key else _reduce(column, values, self.starts)
        if column.merge == "grad_sum" and self.world_size > 1:
            values = pc.divide(values, float(self.world_size) ** 2)
        return values


def plan(
    table: str, keys: pa.Table, order: Sequence[Key], *, world_size: int = 1, per_rank: bool = False
) -> Arrangement:
    """Return how the rows of a table are sorted by step, then by `order`, and merged over ranks unless `per_rank`.

    Args:
        table: Name of the table.
        keys: Its columns `step`, `rank` and those of its keys; where they are equal the later row wins.
        order: The keys (`(branch,)`, `(stream, point)`, ...) in the order wanted; keys not listed follow in the order
            in which they appear.
        world_size: Ranks of the run.
        per_rank: Keep one row a rank (sorted by rank last) with the sums as that rank measured them.
    """
    ranks = _integers(keys["rank"])
    group = _combine([_integers(keys["step"]), key_codes(table, keys, order)])
    row = group
    if len(ranks) and (ranks != ranks[0]).any():
        row = _combine([group, np.unique(ranks, return_inverse=True)[1].astype(np.int64)])
    sorting = None
    if len(row) > 1 and not (row[1:] > row[:-1]).all():
        sorting = np.argsort(row, kind="stable")
        same_as_next = np.append(row[sorting][1:] == row[sorting][:-1], False)
        sorting = sorting[~same_as_next]
        group = group[sorting]
    starts = None if per_rank else np.flatnonzero(np.append(True, group[1:] != group[:-1])[: len(group)])
    return Arrangement(
        table, sorting, None if starts is None or len(starts) == len(group) else starts, not per_rank, world_size
    )


def arrange(
    table: str, rows: pa.Table, order: Sequence[Key], *, world_size: int = 1, per_rank: bool = False
) -> pa.Table:
    """Return the rows of a table as its `plan` has them."""
    return plan(table, rows, order, world_size=world_size, per_rank=per_rank).apply(rows)


def key_codes(table: str, rows: pa.Table, order: Sequence[Key]) -> Integers:
    """Return the place of each row's key in `order`; keys not listed get the numbers after it as they appear."""
    names = [column.name for column in TABLES[table] if column.merge == "key" and column.name != "step"]
    if not names or not rows.num_rows:
        return np.zeros(rows.num_rows, dtype=np.int64)
    flat = np.zeros(rows.num_rows, dtype=np.int64)
    dictionaries: list[list[str]] = []
    for name in names:
        column = _encoded(rows[name])
        dictionaries.append(column.dictionary.to_pylist())
        flat = flat * len(dictionaries[-1]) + column.indices.to_numpy().astype(np.int64)
    if len(names) == 1:  # the dictionary is already the list of distinct keys, as they appear
        present, inverse = np.arange(len(dictionaries[0])), flat
    else:
        present, first, inverse = distinct(flat, int(np.prod([len(one) for one in dictionaries])))
        appearance = np.argsort(first)
        present, inverse = present[appearance], np.argsort(appearance)[inverse]
    return _places(present, dictionaries, order)[inverse]


def distinct(codes: Integers, size: int) -> tuple[Integers, Integers, Integers]:
    """Distinct codes below `size`, where each stands first, and which of them each row has, as `numpy.unique` does."""
    if size > 4 * len(codes) + 1_000_000:  # a table of all codes would be larger than the rows
        found, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
        return found, first, inverse
    first = np.full(size, len(codes), dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last write wins: each code's first row
    found = np.flatnonzero(first < len(codes))
    place = np.zeros(size, dtype=np.int64)
    place[found] = np.arange(len(found))
    return found, first[found], place[codes]


def _places(present: Integers, dictionaries: list[list[str]], order: Sequence[Key]) -> Integers:
    """Place in `order` of each distinct key, given as the mixed-radix number of its dictionary indices."""
    sizes = [len(dictionary) for dictionary in dictionaries]
    indices = np.unravel_index(present, sizes)
    found = [
        tuple(dictionary[i] for dictionary, i in zip(dictionaries, key, strict=True))
        for key in zip(*indices, strict=True)
    ]
    place: dict[Key, int] = {}
    for key in (*order, *found):
        place.setdefault(key, len(place))
    return np.array([place[key] for key in found], dtype=np.int64)


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    return encoded.unify_dictionaries().combine_chunks()


def _integers(column: pa.ChunkedArray) -> Integers:
    return np.asarray(pc.fill_null(column, 0).to_numpy(), dtype=np.int64)


def _combine(columns: Sequence[Integers]) -> Integers:
    """One integer a row that sorts as the tuple of columns does; columns are made dense where the product overflows."""
    result = columns[0]
    for column in columns[1:]:
        spread = int(column.max() - column.min()) + 1 if len(column) else 1
        if len(result) and (int(np.abs(result).max()) + 1) * spread > np.iinfo(np.int64).max:
            result = np.unique(result, return_inverse=True)[1].astype(np.int64)
        result = result * spread + (column - (column.min() if len(column) else 0))
    return result


def _reduce(column: Column, values: pa.ChunkedArray, starts: Integers) -> pa.Array:
    """Reduce segments of a column; null is left out, a segment of nulls stays null, NaN and infinity stay."""
    valid = values.is_valid().to_numpy()
    counts = np.add.reduceat(valid.astype(np.int64), starts)
    if column.merge == "first":
        places = np.where(valid, np.arange(len(valid)), len(valid))
        first = np.minimum.reduceat(places, starts)
        return values.take(pa.array(first, mask=counts == 0)).combine_chunks()
    neutral: dict[str, float] = {"max": -np.inf, "min": np.inf}
    numbers = pc.fill_null(values, neutral.get(column.merge, 0)).to_numpy()
    if column.merge == "norm":
        return pa.array(_norms(numbers, starts), mask=counts == 0, from_pandas=False)
    operation: Callable[..., npt.NDArray[np.float64]] = {
        "max": np.maximum.reduceat,
        "min": np.minimum.reduceat,
    }.get(column.merge, np.add.reduceat)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        reduced = operation(numbers, starts)
        if column.merge == "mean":
            reduced = reduced / counts
    return pa.array(reduced, mask=counts == 0, from_pandas=False)


def _norms(numbers: npt.NDArray[np.float64], starts: Integers) -> npt.NDArray[np.float64]:
    """Roots of the sums of squares over segments, scaled so that no square overflows."""
    largest = np.maximum.reduceat(np.abs(numbers), starts)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = numbers / np.repeat(scale, np.diff(np.append(starts, len(numbers))))
        return np.asarray(scale * np.sqrt(np.add.reduceat(scaled**2, starts)), dtype=np.float64)
