"""Sums over a tensor in a CPU's memory: one pass over memory.

The functions of `compiled` do it where they could be built, numpy elsewhere. Its float32 dot product runs over `ROW`
elements and goes on in float64, values other than float32 and float64 are widened piece by piece, and a piece, which
stays in a second-level cache, is asked everything that is wanted before the next one is read.

What numpy reads stays on the thread that asks, on purpose. PyTorch gives every operation of more than 32,768 elements
to its thread pool, and waking a pool for a piece takes longer than reading it (80 µs against 10 µs on two cores).
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from gradflow import compiled

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from torch import Tensor

Values: TypeAlias = "npt.NDArray[Any]"
"""Elements of a tensor, in float32 or float64."""

ROW = 2**11
"""Elements of one dot product: equal float32 numbers come out right to 1e-6, random ones to 1e-7."""
PIECE = 2**17
"""Elements read at once: 512 KiB in float32."""
WIDENED = 2**15
"""Elements widened at once: the most that PyTorch does not share out among threads."""
_SMALL = 1e-30
"""A float32 sum below may have lost products that float32 cannot hold; it is computed again in float64."""
_own = threading.local()
_quiet = np.errstate(all="ignore")  # training that diverges overflows: the figures say so, not warnings


def measure(flat: Tensor, wanted: Collection[str]) -> dict[str, float]:
    """`statistics.measure` of a tensor of one axis, or whose elements lie in order, without `nonfinite`."""
    if sums := compiled.sums(flat):
        found = dict(zip(compiled.NAMES, sums.measure(flat), strict=True))
        return {name: found[name] for name in wanted}
    return _in_pieces(flat.view(-1), wanted)


@_quiet
def _in_pieces(flat: Tensor, wanted: Collection[str]) -> dict[str, float]:
    found = dict.fromkeys(wanted, 0.0)
    for piece in _pieces(flat):
        if "square" in found:
            found["square"] += _dot(piece, piece)
        if "total" in found:
            found["total"] += _product(piece, _ones(piece.dtype)[: piece.size])
        low, high = 0.0, 0.0
        if "largest" in found:
            low, high = float(np.minimum.reduce(piece)), float(np.maximum.reduce(piece))
            found["largest"] = _larger(found["largest"], max(high, -low))
        if "zeros" in found and not (low > 0 or high < 0):
            found["zeros"] += _zeros(piece)
    return found


def _pieces(flat: Tensor) -> Iterator[Values]:
    """The elements in pieces; one is valid until the next is asked for."""
    flat = flat.detach()
    if flat.dtype in (torch.float32, torch.float64):
        # not `Tensor.numpy`: it forbids the storage's owner to resize it, which sharded training does
        values = np.from_dlpack(flat)
        yield from (values[start : start + PIECE] for start in range(0, values.size, PIECE))
        return
    room = torch.empty(min(WIDENED, flat.numel()), dtype=torch.float32, device="cpu")
    for start in range(0, flat.numel(), WIDENED):
        part = flat[start : start + WIDENED]
        yield room[: part.numel()].copy_(part).numpy()


def dot(x: Tensor, y: Tensor) -> float:
    """Σ x·y of two tensors of one axis, one length and one dtype."""
    if sums := compiled.sums(x, y):
        return sums.dot(x, y)[0]
    return sum(_dot(one, other) for one, other in zip(_pieces(x), _pieces(y), strict=True))


def distance(x: Tensor, y: Tensor) -> float:
    """Σ (x − y)² of two tensors of one length and one dtype, whose elements lie in order."""
    if sums := compiled.sums(x, y):
        return sums.distance_each([x], [y])[0]
    x, y = x.view(-1), y.view(-1)
    room = _scratch(torch.float64 if x.dtype == torch.float64 else torch.float32).numpy()
    less = (_difference(one, other, room) for one, other in zip(_pieces(x), _pieces(y), strict=True))
    return sum(_dot(piece, piece) for piece in less)


@_quiet
def _difference(x: Values, y: Values, room: Values) -> Values:
    return np.subtract(x, y, out=room[: x.size])


@_quiet
def _dot(x: Values, y: Values) -> float:
    found = _product(x, y)
    if x.dtype == np.float32 and not _SMALL < abs(found) < math.inf:
        return _product(x.astype(np.float64), y.astype(np.float64))
    return found


def _product(x: Values, y: Values) -> float:
    cut = x.size - x.size % ROW
    rows = np.vecdot(x[:cut].reshape(-1, ROW), y[:cut].reshape(-1, ROW))
    return float(rows.sum(dtype=np.float64)) + float(np.dot(x[cut:], y[cut:]))


@_quiet
def beyond(flat: Tensor, centre: float, distance: float) -> int:
    """Number of elements farther than `distance` from `centre`. NaN is not."""
    return sum(int(np.count_nonzero(np.abs(piece - centre) > distance)) for piece in _pieces(flat))


def live(x: Tensor, channel_dim: int) -> npt.NDArray[np.bool_]:
    """Which channels are not zero on some position. The search ends when all of them are known to be."""
    axis = channel_dim % x.dim()
    if axis == 0:
        x, axis = x[None], 1
    others = tuple(i for i in range(x.dim()) if i != axis)
    found = np.zeros(x.shape[axis], np.bool_)
    step = max(WIDENED // max(x[:1].numel(), 1), 1)
    for start in range(0, len(x), step):
        found |= np.logical_or.reduce(x[start : start + step].bool().numpy(), axis=others)
        if found.all():
            break
    return found


@cache
def _ones(dtype: np.dtype[Any]) -> Values:
    return np.ones(PIECE, dtype)


def _zeros(piece: Values) -> int:
    flags = np.equal(piece, 0, out=_scratch(torch.bool).numpy()[: piece.size])  # numpy counts booleans fast, floats not
    return int(np.count_nonzero(flags))


def _larger(one: float, other: float) -> float:
    return math.nan if one != one or other != other else max(one, other)  # noqa: PLR0124


def _scratch(dtype: torch.dtype) -> Tensor:
    """Memory of this thread's own for one piece: what is used again stays in the cache."""
    kept: dict[torch.dtype, Tensor] = _own.__dict__.setdefault("kept", {})
    if dtype not in kept:
        kept[dtype] = torch.empty(PIECE, dtype=dtype, device="cpu")
    return kept[dtype]
