"""Part files of a table: their names, their columns, and how they are read without trusting what is there.

A part is `<table>/rank-<r>-<n>.parquet`. Numbers rise with time within a rank, and where two parts of a rank hold rows
of the same step, the higher number wins: so a step recorded again after a resume replaces the first record, and a part
that was merged from older ones stands beside them without counting anything twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradflow.errors import UsageError
from gradflow.schema import TABLES, Column

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from gradflow.store.storage import Storage

Steps: TypeAlias = npt.NDArray[np.int64]

MAX_ROWS = 50_000_000
"""Rows of one table that are read at most: a crafted part of a few kilobytes may promise billions."""

ROW_GROUP = 131_072
"""Rows of a row group that are written at least, where a part has as many: small groups cost more than they hold."""

_TYPES = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string()}
_NAME = re.compile(r"rank-(0|[1-9]\d{0,8})-(0|[1-9]\d{0,8})\.parquet", re.ASCII)


class ForeignPartError(ValueError):
    """A file among the parts that does not hold rows of this table; it never leaves the reader."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A part of a table; parts sort by rank, then by time."""

    rank: int
    number: int

    def path(self, table: str) -> str:
        """Return the part's file name below the run."""
        return f"{table}/rank-{self.rank}-{self.number}.parquet"


def columns(table: str) -> tuple[Column, ...]:
    """Return the raw columns of a table; a table that does not exist is a `UsageError` that lists those that do."""
    if table not in TABLES:
        raise UsageError(f"expected one of the tables {', '.join(TABLES)}, got {table!r}")
    return TABLES[table]


def arrow_schema(table: str) -> pa.Schema:
    """Return the Arrow schema of a table's raw columns."""
    return pa.schema([(column.name, _TYPES[column.type]) for column in columns(table)])


def keys(table: str) -> list[str]:
    """Return the columns that name the thing a row is about, `step` left out."""
    return [column.name for column in columns(table) if column.merge == "key" and column.name != "step"]


def list_parts(storage: Storage, table: str) -> tuple[list[Part], list[str]]:
    """Return the parts of a table by rank and time, and the names of other files (temporary ones left out)."""
    parts, others = [], []
    for name in storage.names(table):
        match = _NAME.fullmatch(name)
        if match:
            parts.append(Part(int(match[1]), int(match[2])))
        elif not name.startswith("."):
            others.append(name)
    return sorted(parts), others


def conform(
    table: str, rows: pa.Table, *, rank: int = 0, only: Collection[str] | None = None
) -> tuple[pa.Table, list[str]]:
    """Return `rows` with exactly the raw columns of a table in their types, and the names of those that were missing.

    A missing column is filled with null, a missing `rank` with `rank`. Strings come back dictionary-encoded. `only`
    names the columns wanted; by default all are.

    Raises:
        ForeignPartError: A column is unknown, has another type, or a key is missing or null.
    """
    wanted = [column for column in columns(table) if only is None or column.name in only]
    known = {column.name for column in wanted}
    foreign = [name for name in rows.column_names if name not in known]
    if foreign or len(set(rows.column_names)) < rows.num_columns:
        raise ForeignPartError(f"expected the columns of the table {table}, got also {', '.join(map(repr, foreign))}")
    arrays, missing = [], []
    for column in wanted:
        if column.name in rows.column_names:
            arrays.append(_typed(column, rows[column.name]))
        elif column.name == "rank":
            arrays.append(pa.chunked_array([pa.array(np.full(rows.num_rows, rank))]))
        elif column.merge == "key":
            raise ForeignPartError(f"expected a column {column.name!r}, got none")
        else:
            missing.append(column.name)
            arrays.append(_typed(column, pa.chunked_array([pa.nulls(rows.num_rows)])))
    return pa.table(arrays, names=[column.name for column in wanted]), missing


def _typed(column: Column, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cast within a kind (float32 to float64, any integer to int64, dictionary to dictionary); refuse anything else."""
    found = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    fits = {
        "float64": pa.types.is_floating(found) or pa.types.is_integer(found) or pa.types.is_null(found),
        "int64": pa.types.is_integer(found) or pa.types.is_null(found),
        "string": pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found),
    }[column.type]
    if not fits:
        raise ForeignPartError(f"expected {column.type} in column {column.name!r}, got {values.type}")
    if column.merge == "key" and values.null_count:
        raise ForeignPartError(f"expected a value in every row of column {column.name!r}, got null")
    if column.type != "string":
        return values.cast(_TYPES[column.type])
    encoded = values if pa.types.is_dictionary(values.type) else values.cast(pa.string()).dictionary_encode()
    return encoded.cast(pa.dictionary(pa.int32(), pa.string())).unify_dictionaries()


def read_part(
    storage: Storage, table: str, part: Part, *, room: int = MAX_ROWS, only: Collection[str] | None = None
) -> tuple[pa.Table, list[str]]:
    """Return the rows of one part, all columns or `only` some, and the names of all columns that it lacks.

    Raises:
        FileNotFoundError: The part is gone (merged into another by the run that is being written).
        OSError, pyarrow.ArrowException, ValueError: It is no regular file, no Parquet, or foreign.
    """
    strings = [column.name for column in columns(table) if column.type == "string"]
    with storage.open(part.path(table)) as data:
        try:
            file = pq.ParquetFile(data, read_dictionary=strings)
        except KeyError as error:
            raise ForeignPartError(f"expected a column {error}, got none") from error
        if file.metadata.num_rows > room:
            raise ForeignPartError(f"expected at most {MAX_ROWS} rows in a table, got {file.metadata.num_rows} more")
        # Foreign columns are refused before they are decoded.
        _, missing = conform(table, file.schema_arrow.empty_table())
        rows = file.read() if only is None else file.read([n for n in file.schema_arrow.names if n in only])
    rows.validate(full=True)
    return conform(table, rows, rank=part.rank, only=only)[0], missing


def latest(parts: Iterable[tuple[Part, pa.Table]]) -> Iterator[pa.Table]:
    """Yield the rows of each part, without the steps that a later part of the same rank holds."""
    parts = list(parts)
    wanted = steps_to_keep([(part, np.sort(rows["step"].unique().to_numpy())) for part, rows in parts])
    for (_, rows), (steps, some_are_left_out) in zip(parts, wanted, strict=True):
        yield rows.filter(pc.is_in(rows["step"], value_set=pa.array(steps))) if some_are_left_out else rows


def steps_to_keep(parts: list[tuple[Part, Steps]]) -> list[tuple[Steps, bool]]:
    """For each part with its distinct steps: the steps that no later part of its rank holds, and whether some fell out.

    `parts` are sorted. The steps of a run number thousands where its rows number millions: this stays cheap.
    """
    kept: list[tuple[Steps, bool]] = []
    seen = np.empty(0, dtype=np.int64)
    rank = -1
    for part, steps in reversed(parts):
        if part.rank != rank:
            seen, rank = np.empty(0, dtype=np.int64), part.rank
        new = steps[~np.isin(steps, seen)]
        kept.append((new, len(new) < len(steps)))
        seen = np.concatenate([seen, new])
    return kept[::-1]


def write_rows(file: IO[bytes], tables: Iterable[pa.Table]) -> None:
    """Write rows of one table as Parquet: zstd, names dictionary-encoded, row groups of `ROW_GROUP` rows or more."""
    waiting: list[pa.Table] = []
    writer: pq.ParquetWriter | None = None
    for rows in tables:
        waiting.append(rows)
        if writer is None:
            writer = _parquet(file, rows.schema)
        if sum(table.num_rows for table in waiting) >= ROW_GROUP:
            writer.write_table(pa.concat_tables(waiting).unify_dictionaries())
            waiting = []
    if writer is not None:
        if waiting:
            writer.write_table(pa.concat_tables(waiting).unify_dictionaries())
        writer.close()


def _parquet(file: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    # Statistics and dictionaries of measured floats would be as large as the floats. Without the Arrow schema in the
    # footer, every reader sees the types of the format itself, names as strings.
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        use_dictionary=[name for name in schema.names if name not in floats],
        write_statistics=["step"],
        store_schema=False,
    )
