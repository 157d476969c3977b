"""The sums of `_sums.c`, if they could be compiled where gradflow was installed; they need no compiler to run.

They read a tensor once, widen every element to float64, which is exact, and do not hold the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Function = Callable[[int, int | None, int, ctypes.Array[c_double]], None]

NAMES = ("total", "square", "largest", "zeros")
_Figures = c_double * len(NAMES)
_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


class Sums(NamedTuple):
    """The functions for one dtype, of contiguous tensors in a CPU's memory; two tensors have one length."""

    of_one: Function
    of_products: Function
    of_squared_differences: Function
    of_copied_squares: Function

    def measure(self, x: Tensor) -> tuple[float, ...]:
        """Σ x, Σ x², max |x| (NaN if there is one) and the number of zeros: `NAMES`."""
        found = _Figures()
        self.of_one(x.data_ptr(), None, x.numel(), found)
        return tuple(found)

    def dot(self, x: Tensor, y: Tensor) -> float:
        """Σ x·y."""
        return _sum(self.of_products, x, y)

    def distance(self, x: Tensor, y: Tensor) -> float:
        """Σ (x − y)²."""
        return _sum(self.of_squared_differences, x, y)

    def copy(self, room: Tensor, x: Tensor) -> float:
        """Copies x to `room`, and Σ x²."""
        return _sum(self.of_copied_squares, room, x)


def _sum(function: Function, x: Tensor, y: Tensor) -> float:
    found = _Figures()
    function(x.data_ptr(), y.data_ptr(), x.numel(), found)
    return found[0]


def _load() -> dict[torch.dtype, Sums]:
    folder = Path(__file__).parent
    built = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_sums{suffix}").exists()]
    if not built:
        return {}
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError:  # built for another system, or without its OpenMP: numpy is as right
        return {}
    found = {}
    for dtype, name in _DTYPES.items():
        functions = [getattr(library, f"{what}_{name}") for what in ("measure", "dot", "distance", "copy")]
        for function in functions:
            function.argtypes, function.restype = (c_void_p, c_void_p, c_int64, POINTER(c_double)), None
        found[dtype] = Sums(*functions)
    return found


SUMS = _load()
"""By dtype; empty where nothing was compiled."""


def sums(*tensors: Tensor) -> Sums | None:
    """What reads these tensors of one dtype, if anything does."""
    if not all(x.is_contiguous() and x.data_ptr() for x in tensors):  # no address: empty, or zeros without memory
        return None
    return SUMS.get(tensors[0].dtype)
