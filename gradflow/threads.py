"""Keeps PyTorch's operations of one thread on that thread, where waking others takes longer than the work."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class _Counts(NamedTuple):
    """How many threads operations of the calling thread use, by library: `torch.set_num_threads` tells every thread."""

    openmp: Callable[[], int]
    set_openmp: Callable[[int], None]
    set_mkl: Callable[[int], int]
    """Returns what it was; 0 stands for the number that holds for all threads."""


@cache
def _counts() -> _Counts | None:
    """None where PyTorch is built on other libraries."""
    try:
        everything = ctypes.CDLL(None)
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        openmp = everything.omp_get_max_threads, everything.omp_set_num_threads
        return _Counts(*openmp, torch_cpu.MKL_Set_Num_Threads_Local)
    except (OSError, AttributeError, TypeError):
        return None


class alone:  # noqa: N801 (a context manager)
    """What runs inside, on a CPU, uses the calling thread alone. Other threads notice nothing."""

    __slots__ = ("_counts", "_mkl", "_openmp")

    def __enter__(self) -> None:
        self._counts = counts = _counts()
        if counts is not None:
            self._openmp = counts.openmp()
            counts.set_openmp(1)
            self._mkl = counts.set_mkl(1)

    def __exit__(self, *_: object) -> None:
        if self._counts is not None:
            self._counts.set_mkl(self._mkl)
            self._counts.set_openmp(self._openmp)
