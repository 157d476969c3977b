"""The functions of `_sums.c` and `_samples.c`, if they could be compiled where gradflow was installed.

They need no compiler to run, read a tensor once, on as many threads as PyTorch's operations use, widen every element to
float64, which is exact, and do not hold the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Figures = ctypes.Array[c_double]
    Function = Callable[[int, int | None, int, int, Figures], None]
    Addresses = ctypes.Array[c_void_p]
    Counts = ctypes.Array[c_int64]
    EachFunction = Callable[[Addresses, Addresses | None, Counts, int, int, Figures], None]
    RowsFunction = Callable[[int, Counts, int, int, int, int], None]
    SamplesFunction = Callable[[Addresses, int, int, int, int, int, Figures], None]

_EDITION = 4
"""What the library says of itself where it was built from the same sources as this."""
NAMES = ("total", "square", "largest", "zeros")
_OF_ONE = ("measure", "dot")
_OF_EACH = ("measure_each", "distance_each", "copy_each")
_Figures = c_double * len(NAMES)
_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


class Sums(NamedTuple):
    """The functions for one dtype, of contiguous tensors in a CPU's memory; two tensors have one number of elements."""

    of_one: Function
    of_products: Function
    of_each: EachFunction
    of_each_squared_differences: EachFunction
    of_each_copied_squares: EachFunction

    def measure(self, x: Tensor) -> tuple[float, ...]:
        """Σ x, Σ x², max |x| (NaN if there is one) and the number of zeros: `NAMES`."""
        found = _Figures()
        self.of_one(x.data_ptr(), None, x.numel(), torch.get_num_threads(), found)
        return tuple(found[:])

    def dot(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Σ x·y and Σ x²."""
        found = _Figures()
        self.of_products(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads(), found)
        return found[0], found[1]

    def measure_each(self, tensors: Sequence[Tensor]) -> list[tuple[float, ...]]:
        """`measure` of several tensors in one call, which wakes the other threads once."""
        return _each(self.of_each, tensors)

    def distance_each(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
        """Σ (x − y)² of several pairs."""
        return [found[0] for found in _each(self.of_each_squared_differences, ones, others)]

    def copy_each(self, rooms: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[float]:
        """Copies each tensor to its room, and Σ x²."""
        return [found[0] for found in _each(self.of_each_copied_squares, rooms, tensors)]


class Samples(NamedTuple):
    """The functions for samples of rows that lie in a CPU's memory in order."""

    of_rows: RowsFunction
    of_samples: SamplesFunction

    def take(self, x: Tensor, rows: Counts, room: Tensor) -> Tensor:
        """Copies rows of x, as long as the last axis of `room`, by their numbers to a `room` for them."""
        size = room.shape[-1] * x.element_size()
        self.of_rows(x.data_ptr(), rows, len(rows), size, torch.get_num_threads(), room.data_ptr())
        return room

    def figures(self, samples: Sequence[Tensor]) -> list[list[float]]:
        """Kurtosis, largest over median and cosine (see `geometry`) of samples of one shape, in float32."""
        found = (c_double * (3 * len(samples)))()
        addresses = (c_void_p * len(samples))(*(sample.data_ptr() for sample in samples))
        sequences, positions, width = samples[0].shape
        self.of_samples(addresses, len(samples), sequences, positions, width, torch.get_num_threads(), found)
        return [found[i : i + 3] for i in range(0, len(found), 3)]


def counts(numbers: Sequence[int]) -> Counts:
    """Whole numbers as the compiled functions read them."""
    return (c_int64 * len(numbers))(*numbers)


def _each(function: EachFunction, ones: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[tuple[float, ...]]:
    count = len(ones)
    addresses = c_void_p * count
    found = (c_double * (count * len(NAMES)))()
    sizes = (c_int64 * count)(*(x.numel() for x in ones))
    behind = addresses(*(y.data_ptr() for y in others)) if others else None
    function(addresses(*(x.data_ptr() for x in ones)), behind, sizes, count, torch.get_num_threads(), found)
    return [tuple(found[i : i + len(NAMES)]) for i in range(0, len(found), len(NAMES))]


def _load() -> tuple[dict[torch.dtype, Sums], Samples | None]:
    folder = Path(__file__).parent
    built = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_sums{suffix}").exists()]
    if not built:
        return {}, None
    found = {}
    try:
        library = ctypes.CDLL(str(built[0]))
        if c_int64.in_dll(library, "edition").value != _EDITION:
            return {}, None
        samples = Samples(library.take_rows, library.figures_of_samples)
        functions = {
            dtype: [[getattr(library, f"{what}_{name}") for what in names] for names in (_OF_ONE, _OF_EACH)]
            for dtype, name in _DTYPES.items()
        }
    except (OSError, AttributeError, ValueError):  # built for another system, or from other sources
        return {}, None  # numpy is as right
    addresses, numbers, figures = POINTER(c_void_p), POINTER(c_int64), POINTER(c_double)
    library.take_rows.argtypes = (c_void_p, numbers, c_int64, c_int64, c_int64, c_void_p)
    library.figures_of_samples.argtypes = (addresses, c_int64, c_int64, c_int64, c_int64, c_int64, figures)
    library.take_rows.restype = library.figures_of_samples.restype = None
    for dtype, (one, each) in functions.items():
        for function in one:
            function.argtypes, function.restype = (c_void_p, c_void_p, c_int64, c_int64, figures), None
        for function in each:
            function.argtypes, function.restype = (addresses, addresses, numbers, c_int64, c_int64, figures), None
        found[dtype] = Sums(*one, *each)
    return found, samples


SUMS, SAMPLES = _load()
"""Sums by dtype, and what is for samples; nothing where nothing was compiled."""


def lies_plain(x: Tensor) -> bool:
    """Whether the elements of a tensor of reals lie in a CPU's memory in order, as they are."""
    return x.layout is torch.strided and x.is_cpu and x.is_contiguous() and not x.is_neg() and not x.is_complex()


def sums(*tensors: Tensor) -> Sums | None:
    """What reads these tensors as they lie in memory together, if anything does: they have one dtype then."""
    dtype = tensors[0].dtype
    for x in tensors:
        if not (lies_plain(x) and x.data_ptr() and x.dtype is dtype):  # no address: empty, or zeros without memory
            return None
    return SUMS.get(dtype)


def together(*columns: Sequence[Tensor]) -> list[tuple[Sums, list[int]]]:
    """Places of what one call reads: tensors, or pairs of tensors of one length. What cannot be read so is left out."""
    groups: dict[torch.dtype, tuple[Sums, list[int]]] = {}
    for i, tensors in enumerate(zip(*columns, strict=True)):
        if found := sums(*tensors):
            groups.setdefault(tensors[0].dtype, (found, []))[1].append(i)
    return list(groups.values())
