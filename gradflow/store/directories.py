"""Which directory a run goes into: a new one is claimed, an old one is found again by the run's id. No torch here."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING

from gradflow.errors import RunError
from gradflow.schema import TABLES
from gradflow.store import manifest, parts
from gradflow.store.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradflow.store.storage import Storage

CLAIM = "steps"
"""The folder whose making claims a run directory: every run has it, and making a folder cannot happen twice."""

REPORT = "report.html"


def new_directory(path: str | os.PathLike[str], *, force: bool = False) -> str:
    """Return a directory for a new run: `path` itself where no run is there, else the next free `path-1`, `path-2`, ...

    The directory is claimed: of two trainings that start at once each gets its own. `force` removes the run that
    stands at `path` (its `run.json`, parts and report, nothing else) and returns `path`.

    Raises:
        RunError: The directory cannot be made.
    """
    for candidate in _candidates(path):
        storage = open_storage(candidate)
        try:
            if force:
                _remove_run(storage)
                storage.claim(CLAIM)
                return candidate
            if not storage.exists(manifest.FILE) and storage.claim(CLAIM):
                return candidate
        except OSError as error:
            raise RunError(
                f"expected a directory that can be written at {storage.path}, got {type(error).__name__}: {error}; "
                "pass another path, or make room there"
            ) from error
    raise AssertionError("unreachable: count() does not end")


def resume(path: str | os.PathLike[str], run_id: str) -> str | None:
    """Return the directory of the run `run_id`: `path` or a numbered one beside it; None where there is none."""
    for candidate in _candidates(path):
        storage = open_storage(candidate)
        try:
            meta = manifest.parse(storage.read(manifest.FILE), candidate)
        except OSError:
            if not storage.exists(CLAIM):
                return None
            continue
        except RunError:
            continue
        if run_id and meta.get("run_id") == run_id:
            return candidate
    raise AssertionError("unreachable: count() does not end")


def _candidates(path: str | os.PathLike[str]) -> Iterator[str]:
    """`path`, `path-1`, `path-2`, ..."""
    bare = os.fspath(path).rstrip("/") or "/"
    yield bare
    for number in count(1):
        yield f"{bare}-{number}"


def _remove_run(storage: Storage) -> None:
    """Remove what gradflow writes into a run directory."""
    for table in TABLES:
        for part in parts.list_parts(storage, table)[0]:
            storage.remove(part.path(table))
    for name in (manifest.FILE, REPORT):
        storage.remove(name)
