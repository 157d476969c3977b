"""A run as its readers see it: tables merged over ranks, in the order of the model, with derived columns. No torch."""

from __future__ import annotations

from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradflow import metrics
from gradflow.errors import RunError, UsageError
from gradflow.schema import TABLES
from gradflow.store import manifest, merging, parts
from gradflow.store.reading import WHOLE, PartRows, read_table
from gradflow.store.storage import open_storage

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from gradflow.records import Branch, Layer, Parameter, Stream
    from gradflow.store.storage import Storage


class Run:
    """What was recorded of one training: a snapshot that does not change while the training goes on.

    Args:
        meta: Content of `run.json`; what is missing has a default.
        tables: Raw rows by table (the columns of `schema.TABLES`); missing tables are empty, missing columns null.
        problems: What was left out at reading, in words.
        path: Where the run was read from; None for a run in memory.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        tables: Mapping[str, pa.Table | PartRows] | None = None,
        problems: Sequence[str] = (),
        *,
        path: str | None = None,
    ) -> None:
        self.path = path
        self.problems: list[str] = list(problems)
        self.meta: dict[str, Any] = manifest.complete(meta, self.problems)
        self.branches: list[Branch] = manifest.branches(self.meta, self.problems)
        self.layers: list[Layer] = manifest.layers(self.meta, self.problems)
        self.streams: list[Stream] = manifest.streams(self.meta, self.problems)
        self.parameters: list[Parameter] = manifest.parameters(self.meta, self.problems)
        self._raw: dict[str, pa.Table | PartRows] = {}
        for name, rows in (tables or {}).items():
            if isinstance(rows, PartRows):
                rows.problems = self.problems
                self._raw[name] = rows
            else:
                self._raw[name] = _conformed(name, rows)
        self._steps: list[int] | None = None
        self._tables: dict[tuple[str, bool], pa.Table] = {}
        self._arrangements: dict[tuple[str, bool, int | None], merging.Arrangement] = {}

    @property
    def steps(self) -> list[int]:
        """The sampled steps, sorted: every step that any table has a row of."""
        if self._steps is None:
            distinct = [_steps_of(rows) for rows in self._raw.values()]
            self._steps = np.unique(np.concatenate(distinct)).tolist() if distinct else []
        return list(self._steps)

    def table(self, name: str, *, per_rank: bool = False) -> pa.Table:
        """Return a table with its raw and its derived columns, sorted by step and then as the model is ordered.

        A value is null where it does not exist for a row. Rows of several ranks are merged (`schema.Column.merge`)
        unless `per_rank`; a step that was recorded twice appears once, as recorded last. The result is kept.
        """
        parts.columns(name)  # a table that does not exist is refused
        if (name, per_rank) not in self._tables:
            self._tables[name, per_rank] = _plain(self._made(name, metrics.names(name), per_rank=per_rank))
        return self._tables[name, per_rank]

    def columns(
        self, name: str, wanted: Sequence[str], *, per_rank: bool = False, since: int | None = None
    ) -> pa.Table:
        """Return some columns of a table, row by row as `table` has them, for a fraction of its memory.

        A large table is not kept, and of its file only what the columns are made of is read. Names may come
        dictionary-encoded. `since` leaves out the rows of earlier steps.
        """
        parts.columns(name)  # a table that does not exist is refused
        known = metrics.names(name)
        unknown = [column for column in wanted if column not in known]
        if unknown:
            raise UsageError(f"expected columns of {name}: {', '.join(known)}; got {', '.join(map(repr, unknown))}")
        if (name, per_rank) not in self._tables and self._rows(name).num_rows > WHOLE:
            return self._made(name, wanted, per_rank=per_rank, since=since)
        rows = self.table(name, per_rank=per_rank)
        if since is not None:  # sorted by step
            rows = rows.slice(int(np.searchsorted(rows["step"].to_numpy(), since)))
        return rows.select(list(wanted))

    def _made(self, name: str, wanted: Sequence[str], *, per_rank: bool, since: int | None = None) -> pa.Table:
        raw = self._selected(name, metrics.inputs(name, wanted), since)
        rows = metrics.derive(name, self._arrangement(name, since, per_rank=per_rank).apply(raw), wanted)
        return rows.select(list(wanted))

    def _arrangement(self, name: str, since: int | None, *, per_rank: bool) -> merging.Arrangement:
        if (name, per_rank, since) not in self._arrangements:
            keys = self._selected(name, ["step", "rank", *parts.keys(name)], since)
            world = self.meta["world_size"]
            arrangement = merging.plan(name, keys, self._order(name), world_size=world, per_rank=per_rank)
            self._arrangements[name, per_rank, since] = arrangement
        return self._arrangements[name, per_rank, since]

    def _selected(self, name: str, raw: Sequence[str], since: int | None) -> pa.Table:
        rows = self._rows(name)
        if isinstance(rows, PartRows):
            return rows.select(raw, since=since)
        rows = rows if since is None else rows.filter(pc.greater_equal(rows["step"], since))
        return rows.select(list(raw))

    def _rows(self, name: str) -> pa.Table | PartRows:
        if name not in self._raw:
            self._raw[name] = _conformed(name, parts.arrow_schema(name).empty_table())
        return self._raw[name]

    def _order(self, name: str) -> list[merging.Key]:
        """Keys of a table in the order of the model."""
        if name == "streams":
            return [(stream.name, point) for stream in self.streams for point in stream.points]
        if name == "branches":
            return [(branch.name,) for branch in self.branches]
        if name == "parameters":
            return [(parameter.name,) for parameter in self.parameters]
        return [(layer.name,) for layer in self.layers]

    def pandas(self, name: str, *, per_rank: bool = False) -> Any:
        """Return a table as a `pandas.DataFrame`.

        Raises:
            RunError: pandas is not installed.
        """
        _imported("pandas")
        return self.table(name, per_rank=per_rank).to_pandas()

    def polars(self, name: str, *, per_rank: bool = False) -> Any:
        """Return a table as a `polars.DataFrame`.

        Raises:
            RunError: Polars is not installed.
        """
        return _imported("polars").from_arrow(self.table(name, per_rank=per_rank))

    def plot(self) -> Any:
        """Return the pictures that say most in one `matplotlib.figure.Figure`, which a notebook shows."""
        from gradflow.plotting import gallery  # the way up, for the notebook's sake: nothing below needs matplotlib

        return gallery.overview(self)

    def summary(self) -> dict[str, str]:
        """Return what fits on a card: the model, how much was recorded, and whether anything is amiss."""
        steps = self.steps
        between = f" ({steps[0]} to {steps[-1]})" if steps else ""
        stopped = self.meta["stopped"]
        return {
            "model": str(self.meta["model"]) or "(unnamed)",
            "steps": f"{len(steps)}{between}",
            "branches": str(len(self.branches)),
            "streams": str(len(self.streams)),
            "layers": str(len(self.layers)),
            "parameters": str(len(self.parameters)),
            "ranks": str(self.meta["world_size"]),
            "problems": str(len(self.problems) + len(self.meta["problems"])),
            "recording": "complete" if stopped is None else f"stopped: {stopped}",
            "path": self.path or "(in memory)",
        }

    def __repr__(self) -> str:
        facts = ", ".join(f"{key}={value!r}" for key, value in self.summary().items())
        return f"Run({facts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(key)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
            for key, value in self.summary().items()
        )
        return f"<table><caption>gradflow run</caption>{rows}</table>"


def load(path: str | os.PathLike[str]) -> Run:
    """Read a run directory (a local path or an fsspec URL), also while its training goes on.

    Only `run.json` and the part files are opened, and only if they are regular files; nothing in them is executed.
    Parts that are broken or foreign are left out and named in `Run.problems`.

    Raises:
        RunError: There is no run, or its `run.json` cannot be read.
        SchemaVersionError: A newer gradflow wrote it.
    """
    storage = open_storage(path)
    meta = _read_manifest(storage)
    tables, problems = {}, []
    for name in TABLES:
        tables[name], left_out = read_table(storage, name)
        problems += left_out
    return Run(meta, tables, problems, path=storage.path)


def _read_manifest(storage: Storage) -> manifest.Meta:
    where = f"{storage.path}/{manifest.FILE}"
    try:
        data = storage.read(manifest.FILE)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"expected a run directory with a {manifest.FILE}, got no such file at {where}; "
            "pass the directory that a gradflow callback or recorder wrote, usually called gradflow"
        ) from error
    except OSError as error:
        raise RunError(
            f"expected a regular, readable file at {where}, got {error}; links are not followed, copy the file instead"
        ) from error
    return manifest.parse(data, where)


def _conformed(name: str, rows: pa.Table) -> pa.Table:
    """Rows of an in-memory run with exactly the raw columns of their table."""
    try:
        return parts.conform(name, rows)[0]
    except parts.ForeignPartError as error:
        raise UsageError(f"{error} (table {name!r} of a run in memory)") from error


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise RunError(
            f"expected {package} to be installed, got {error}; run: pip install {package}, "
            "or use Run.table, which returns a pyarrow.Table"
        ) from error


def _steps_of(rows: pa.Table | PartRows) -> npt.NDArray[np.int64]:
    return rows.steps if isinstance(rows, PartRows) else rows["step"].unique().to_numpy()


def _plain(rows: pa.Table) -> pa.Table:
    """Rows with dictionary-encoded names as plain strings, as the schema says and any reader understands them."""
    plain = [pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in rows.schema]
    return rows.cast(pa.schema(plain))
