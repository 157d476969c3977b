"""Where the files of a run live: a local folder or any fsspec URL, behind eight operations.

What they promise: a reader sees whole files only, nothing but regular files is opened, and no path leads out of the
folder. Failures are `OSError`; callers say what they were doing. No other module touches the file system of a run.
"""

from __future__ import annotations

import io
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

Produce = Callable[[IO[bytes]], object]
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Storage(Protocol):
    """The files of one run; `name` is relative, with `/` between folder and file."""

    path: str

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of what is in a folder, none where it is missing; `OSError` where it is no real folder."""

    def read(self, name: str) -> bytes:
        """Content of a regular file; `FileNotFoundError` where it is gone, another `OSError` where it is no file."""

    def open(self, name: str) -> IO[bytes]:
        """A regular file to read pieces of, likewise; the caller closes it."""

    def write(self, name: str, produce: Produce) -> None:
        """Write a whole file: no reader ever sees part of it, and a failure leaves what was there before."""

    def remove(self, name: str) -> None:
        """Remove a file; it may be gone already."""

    def sweep(self, start: str) -> None:
        """Remove what writes that a kill cut short have left, of files whose name begins with `start`."""

    def exists(self, name: str) -> bool:
        """Whether anything of that name is there."""

    def claim(self, folder: str) -> bool:
        """Make a folder and say whether it was this call that made it; something in its way is a no."""


class LocalStorage:
    """A folder on this machine. Files are written under a hidden name and renamed; links are never followed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = Path(path)
        self.path = str(self.root)

    def names(self, folder: str = "") -> list[str]:
        """See `Storage`."""
        place = self.root / folder
        if folder and place.is_symlink():
            raise NotADirectoryError(f"{folder} is a link, which is not followed")
        try:
            return sorted(os.listdir(place))  # noqa: PTH208 (names alone: nothing is opened or followed)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        """See `Storage`."""
        # O_NONBLOCK: opening a fifo that nobody writes to would wait for ever.
        descriptor = os.open(self.root / name, os.O_RDONLY | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0))
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise OSError(f"{name} is not a regular file")
        return file

    def write(self, name: str, produce: Produce) -> None:
        """See `Storage`."""
        final = self.root / name
        final.parent.mkdir(parents=True, exist_ok=True)
        # Beside the table's folder, not in it: Polars refuses a folder that holds anything but Parquet files.
        beside = self.root / f"{_unfinished(name)}{uuid.uuid4().hex[:8]}.tmp"
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW, 0o666), "wb") as file:
                produce(file)
            beside.replace(final)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See `Storage`."""
        (self.root / name).unlink(missing_ok=True)

    def sweep(self, start: str) -> None:
        """See `Storage`."""
        for name in self.names():
            if name.startswith(_unfinished(start)) and name.endswith(".tmp"):
                self.remove(name)

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        return os.path.lexists(self.root / name)

    def claim(self, folder: str) -> bool:
        """See `Storage`."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / folder).mkdir()
        except FileExistsError:
            return False
        return True


class RemoteStorage:
    """A folder behind an fsspec URL, where an object appears whole or not at all."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.path = url.rstrip("/")
        files, self.root = fsspec.core.url_to_fs(self.path)
        self._fs: Any = files

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else str(self.root)

    def names(self, folder: str = "") -> list[str]:
        """See `Storage`."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._at(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def read(self, name: str) -> bytes:
        """See `Storage`."""
        if self._fs.isdir(self._at(name)):
            raise OSError(f"{name} is not a file")
        return bytes(self._fs.cat_file(self._at(name)))

    def open(self, name: str) -> IO[bytes]:
        """See `Storage`."""
        if self._fs.isdir(self._at(name)):
            raise OSError(f"{name} is not a file")
        file: IO[bytes] = self._fs.open(self._at(name), "rb")
        return file

    def write(self, name: str, produce: Produce) -> None:
        """See `Storage`."""
        whole = io.BytesIO()
        produce(whole)
        self._fs.makedirs(self._at(name).rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(self._at(name), whole.getvalue())

    def remove(self, name: str) -> None:
        """See `Storage`."""
        if self.exists(name):
            self._fs.rm_file(self._at(name))

    def sweep(self, start: str) -> None:
        """See `Storage`. An object appears whole or not at all: nothing is ever left."""

    def exists(self, name: str) -> bool:
        """See `Storage`."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._at(name)))

    def claim(self, folder: str) -> bool:
        """See `Storage`. Object stores have no folders: whatever is below the name decides."""
        if self.exists(folder):
            return False
        self._fs.makedirs(self._at(folder), exist_ok=True)
        return True


def _unfinished(name: str) -> str:
    """First part of the hidden name under which a file is written."""
    return f".{name.replace('/', '.')}"


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """Return the storage behind a path or URL; `file://` is the local folder."""
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStorage(text)
    if scheme in {"file", "local"}:
        return LocalStorage(rest)
    return RemoteStorage(text)
