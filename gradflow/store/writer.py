"""Writing a run: rows are buffered, flushed as whole Parquet parts, old parts merged into bigger ones. No torch here.

Everything a flush has written survives a kill at any moment. A part is written beside its name and renamed. A merge
replaces the last of the merged parts by the whole (one rename) and then removes the others: a reader, or a writer that
goes on after a kill, that finds some of the others still there sees steps which a later part holds as well, and the
later part wins.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from itertools import groupby, pairwise
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradflow.errors import RunError, UsageError
from gradflow.store import manifest, parts
from gradflow.store.parts import Part
from gradflow.store.storage import open_storage

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from gradflow.store.storage import Produce

FANIN = 16
"""Parts of one size that are merged into one of the next size: a row is rewritten at most log_16(flushes) times, and a
table keeps at most 15 parts a size; three sizes serve 4,096 flushes, four (60 parts) 65,536."""

MOST_PARTS = 60
"""Parts a table and rank beyond which any neighbours are merged, whatever their sizes."""


class RunWriter:
    """Writes one rank's rows into a run directory; a directory that holds parts of this rank already is continued.

    Args:
        path: Local path or fsspec URL of the run directory. Nothing is created before the first write.
        rank: This process's rank: part of every part's name, and of every row.
        write_meta: Whether `write_meta` writes; by default rank 0 alone does.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int = 0, write_meta: bool | None = None) -> None:
        self._storage = open_storage(path)
        self.path = self._storage.path
        self.rank = rank
        self._writes_meta = rank == 0 if write_meta is None else write_meta
        self._buffers: dict[str, list[pa.Table]] = {}
        self._parts: dict[str, list[Part]] = {}
        self._next: dict[str, int] = {}

    def write_meta(self, meta: Mapping[str, Any]) -> None:
        """Write `run.json` as a whole, over the one before; on ranks that do not write it, do nothing."""
        if self._writes_meta:
            data = manifest.dump(meta)
            self._write(manifest.FILE, lambda file: file.write(data))

    def append(self, table: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Buffer rows of a table: lists or arrays of one length by raw column. All rows of a step belong in one flush.

        `rank` is filled in; a column that is left out is null.

        Raises:
            UsageError: The table or a column does not exist, or values are not of the column's type.
        """
        schema = parts.arrow_schema(table)
        try:
            arrays = {name: _array(values, schema.field(name).type) for name, values in columns.items()}
            rows, _ = parts.conform(table, pa.table(arrays), rank=self.rank)
        except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
            raise UsageError(
                f"expected columns of the table {table} ({', '.join(schema.names)}), all of one length, got "
                f"{', '.join(f'{name} x {len(values)}' for name, values in columns.items())}: {error}"
            ) from error
        if rows.num_rows:
            self._buffers.setdefault(table, []).append(rows)

    def flush(self) -> None:
        """Write what is buffered, one part a table, then merge parts where there are many.

        A table whose part could not be written stays buffered: a later flush tries again.

        Raises:
            RunError: The directory cannot be written.
        """
        for table in list(self._buffers):
            held = self._held(table)
            part = Part(self.rank, self._next[table])
            rows = pa.concat_tables(self._buffers[table]).unify_dictionaries()
            self._write(part.path(table), partial(parts.write_rows, tables=[rows]))
            held.append(part)
            self._next[table] += 1
            del self._buffers[table]
            self.compact(table)

    def compact(self, table: str) -> None:
        """Merge parts of a table until no `FANIN` neighbours are of one size and at most `MOST_PARTS` stand.

        A part that cannot be read is left where it is, and merged with nothing: the reader will name it.
        """
        held = self._held(table)
        while run := mergeable([part.number for part in held]):
            old = held[slice(*run)]
            try:
                self._merge(table, old)
            except _UnreadablePartError as error:
                held.remove(error.part)
            else:
                held[slice(*run)] = old[-1:]

    def close(self) -> None:
        """Write what is still buffered."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _held(self, table: str) -> list[Part]:
        """Parts of this rank that stand in the directory, oldest first."""
        if table not in self._parts:
            with self._explained(table):
                found, _ = parts.list_parts(self._storage, table)
                self._storage.sweep(Part(self.rank, 0).path(table).removesuffix("0.parquet"))
            self._parts[table] = [part for part in found if part.rank == self.rank]
            self._next[table] = max((part.number + 1 for part in self._parts[table]), default=0)
        return self._parts[table]

    def _merge(self, table: str, old: list[Part]) -> None:
        """Replace parts by one with the name of the last."""
        steps = [np.unique(self._rows(table, part)["step"].to_numpy()) for part in old]
        keep = parts.steps_to_keep(list(zip(old, steps, strict=True)))

        def produce(file: IO[bytes]) -> None:
            # Read again, one part at a time: together they may be far bigger than the memory training can spare.
            parts.write_rows(
                file, (self._rows(table, part, only=wanted) for part, (wanted, _) in zip(old, keep, strict=True))
            )

        self._write(old[-1].path(table), produce)
        for part in old[:-1]:
            with self._explained(part.path(table)):
                self._storage.remove(part.path(table))

    def _rows(self, table: str, part: Part, *, only: parts.Steps | None = None) -> pa.Table:
        try:
            rows, _ = parts.read_part(self._storage, table, part)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise _UnreadablePartError(part) from error
        return rows if only is None else rows.filter(pc.is_in(rows["step"], value_set=pa.array(only)))

    def _write(self, name: str, produce: Produce) -> None:
        with self._explained(name):
            self._storage.write(name, produce)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turn what the file system says into a `RunError`."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"expected to write {name} in the run directory {self.path}, got {type(error).__name__}: {error}; "
                "make room or make the directory writable, or pass another dirpath"
            ) from error


class _UnreadablePartError(Exception):
    """A part that was to be merged cannot be read; it never leaves the writer."""

    def __init__(self, part: Part) -> None:
        super().__init__(part)
        self.part = part


def mergeable(numbers: Sequence[int]) -> tuple[int, int] | None:
    """Return which neighbouring parts (as a slice) to merge next; None where the parts may stay as they are.

    A part's number tells how many flushes it holds: those since the number before it. Parts are of one size where that
    count has the same whole logarithm to base `FANIN`.
    """
    spans = [number - before for before, number in pairwise([-1, *numbers])]
    first = 0
    for _, same in groupby(int(math.log(span, FANIN) + 1e-9) for span in spans):
        count = len(list(same))
        if count >= FANIN:
            return first, first + FANIN
        first += count
    if len(numbers) <= MOST_PARTS:
        return None
    cheapest = min(range(len(spans) - FANIN + 1), key=lambda start: sum(spans[start : start + FANIN]))
    return cheapest, cheapest + FANIN


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Arrow array of a column; text that is no valid Unicode (a lone surrogate in a name) loses what is not."""
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array([str(value).encode("utf-8", "replace").decode() for value in values], kind)
