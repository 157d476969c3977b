"""The rows of a table, read from its parts: all of them at once, or of a large table the columns that are asked for.

A small table is read whole, so that a run is a snapshot that nothing can change. A table of millions of rows would fill
the memory with columns that nobody looks at: of it only step, rank and names are held, and the rest is read when it is
asked for, from the same parts or from those that they have been merged into meanwhile.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradflow.errors import RunError
from gradflow.store import parts

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy.typing as npt

    from gradflow.store.parts import Part, Steps
    from gradflow.store.storage import Storage

ATTEMPTS = 10
"""Listings tried while a run that is still being written merges its parts under the reader."""

WHOLE = 400_000
"""Rows up to which a table is read and kept whole: some 50 MB with all its columns."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A part whose rows are read later: its last step, and which rows count (None: all)."""

    part: Part
    last: int
    kept: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class _Found:
    """Parts to read from: how many rows they hold, the distinct steps of each rank, a checksum of the rows' steps."""

    held: list[_Held]
    rows: int
    steps: dict[int, Steps]
    check: int


class PartRows:
    """The rows of a large table. As a `pyarrow.Table` it has `num_rows` and `select`, which reads what is asked for.

    Attributes:
        num_rows: Rows of the table.
        steps: Its distinct steps, sorted.
        problems: What could not be read, in words; grows if a part turns out to be broken in the middle.
    """

    def __init__(self, storage: Storage, table: str, found: _Found) -> None:
        self.num_rows = found.rows
        self.steps = np.unique(np.concatenate(list(found.steps.values())))
        self.problems: list[str] = []
        self._storage, self._table, self._found = storage, table, found

    def select(self, names: Sequence[str], *, since: int | None = None) -> pa.Table:
        """Return some of the columns, of all rows or of those from a step on.

        Raises:
            RunError: The parts were replaced by others with other rows.
        """
        for _ in range(ATTEMPTS):
            try:
                held = [held for held in self._found.held if since is None or held.last >= since]
                return pa.concat_tables([self._read_part(one, names, since) for one in held]).unify_dictionaries()
            except FileNotFoundError:
                self._follow()
        raise self._changed()

    def _read_part(self, held: _Held, names: Sequence[str], since: int | None) -> pa.Table:
        only = list(dict.fromkeys(("step", *names)))
        try:
            rows = parts.read_part(self._storage, self._table, held.part, only=only)[0].select(only)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException, ValueError) as error:
            rows = self._blank(held, names, error)
        if held.kept is not None:
            rows = rows.filter(pa.array(held.kept))
        return (rows if since is None else rows.filter(pc.greater_equal(rows["step"], since))).select(list(names))

    def _blank(self, held: _Held, names: Sequence[str], error: Exception) -> pa.Table:
        """Nulls in the place of what is broken; without steps and names nothing can be said of the rows at all."""
        sound = ["step", *(name for name in ("rank", *parts.keys(self._table)) if name in names)]
        lost = [name for name in names if name not in sound]
        try:
            rows = parts.read_part(self._storage, self._table, held.part, only=sound)[0]
        except (OSError, pa.ArrowException, ValueError):
            raise self._changed() from error
        problem = f"{held.part.path(self._table)}: {', '.join(lost)} left out: {error!s:.300}"
        if problem not in self.problems:
            self.problems.append(problem)
        schema = parts.conform(self._table, parts.arrow_schema(self._table).empty_table())[0].schema
        for name in lost:
            rows = rows.append_column(name, pa.nulls(rows.num_rows, schema.field(name).type))
        return rows

    def _follow(self) -> None:
        """Find the same rows in the parts that have taken the place of those that are gone."""
        found, _ = _hold(self._storage, self._table, self._found.steps)
        if (found.rows, found.check) != (self._found.rows, self._found.check):
            raise self._changed()
        self._found = found

    def _changed(self) -> RunError:
        return RunError(
            f"expected the rows of {self._table} as they were when {self._storage.path} was loaded, got others; "
            "load the run again"
        )


def read_table(storage: Storage, table: str) -> tuple[pa.Table | PartRows, list[str]]:
    """Return all rows of a table, each step of a rank once, and what was left out and why.

    The rows come in order of rank and part. A listing that is overtaken by a merge of parts is tried again.
    """
    for attempt in range(ATTEMPTS):
        last = attempt == ATTEMPTS - 1
        try:
            tables, problems, is_large = _read_listing(storage, table, last=last)
            if is_large:
                found, problems = _hold(storage, table, last=last)
                return PartRows(storage, table, found), problems
        except FileNotFoundError:
            continue
        empty = parts.conform(table, parts.arrow_schema(table).empty_table())[0]
        return pa.concat_tables([empty, *parts.latest(tables)]).unify_dictionaries(), problems
    raise AssertionError("the last attempt names missing parts instead of raising")


def _hold(
    storage: Storage, table: str, within: dict[int, Steps] | None = None, *, last: bool = False
) -> tuple[_Found, list[str]]:
    """Look which rows of which parts count; `within` are the steps wanted, by rank, where not all are."""
    tables, problems, _ = _read_listing(storage, table, only=["step"], last=last)
    wanted = parts.steps_to_keep([(part, _distinct(rows)) for part, rows in tables])
    found = _Found([], 0, {}, 0)
    held, count, check, seen = found.held, 0, 0, found.steps
    for (part, rows), (steps, some_are_left_out) in zip(tables, wanted, strict=True):
        numbers, kept = rows["step"].to_numpy(), None
        if some_are_left_out or within is not None:
            steps = steps if within is None else np.intersect1d(steps, within.get(part.rank, steps[:0]))  # noqa: PLW2901
            kept = np.isin(numbers, steps)
            numbers = numbers[kept]
        if len(steps):
            held.append(_Held(part, int(steps[-1]), kept))
            seen[part.rank] = np.union1d(seen.get(part.rank, steps[:0]), steps)
            count, check = count + len(numbers), zlib.crc32(numbers.tobytes(), check)
    return _Found(held, count, seen, check), problems


def _distinct(rows: pa.Table) -> Steps:
    return np.sort(rows["step"].unique().to_numpy())


def _read_listing(
    storage: Storage, table: str, *, only: Collection[str] | None = None, last: bool
) -> tuple[list[tuple[Part, pa.Table]], list[str], bool]:
    """The rows of each part, what was left out, and whether reading stopped since there are too many to hold whole."""
    try:
        listed, others = parts.list_parts(storage, table)
    except OSError as error:
        listed, others = [], []
        problems = [f"{table}: left out: {error}"]
    else:
        problems = [f"{table}/{name!r} left out: not the name of a part" for name in others]
    tables: list[tuple[Part, pa.Table]] = []
    lacking: dict[str, int] = {}
    room = parts.MAX_ROWS
    for part in listed:
        try:
            rows, missing = parts.read_part(storage, table, part, room=room, only=only)
        except (OSError, pa.ArrowException, ValueError) as error:
            if isinstance(error, FileNotFoundError) and not last:
                raise
            problems.append(f"{part.path(table)} left out: {str(error) or type(error).__name__:.300}")
            continue
        tables.append((part, rows))
        room -= rows.num_rows
        # Of many parts the first one tells; otherwise it is seen when there are too many.
        if only is None and max(parts.MAX_ROWS - room, rows.num_rows * len(listed) // 2) > WHOLE:
            return tables, problems, True
        for name in missing:
            lacking[name] = lacking.get(name, 0) + 1
    problems += [
        f"{table}: column {name} is missing in {n} of {len(tables)} parts, read as null" for name, n in lacking.items()
    ]
    return tables, problems, False
