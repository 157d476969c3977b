"""Sufficient statistics of tensors: sums, dot products, maxima and counts that add up over batches, ranks and time.

Every function is pure, takes detached tensors of any shape and returns numbers: 0-d tensors on the input's device
without a host synchronisation, or plain floats where the input is in a CPU's memory. Sums run in float64; where nothing
could be compiled a CPU's run in float32 inside rows of a few thousand elements and in float64 across rows, which is
right to about 1e-7 relative. Half precision is widened first, which is exact. A complex number counts as its two parts.
Empty tensors give 0. NaN and infinity are excluded from nothing: they show in the sums, and `count_nonfinite` counts
them.

What a CPU holds is read by `host_sums`, several statistics in one pass over memory; what an accelerator holds by
`device_sums`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from gradflow import compiled, device_sums, host_sums
from gradflow.shapes import broadcast

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

Number: TypeAlias = "Tensor | float"
"""A figure: on its way on a device, or, of a tensor in a CPU's memory, at hand."""

SATURATED_TANH = 0.97
"""|tanh| beyond which a unit counts as saturated: its derivative is below 0.06."""
SATURATED_SIGMOID = 0.03
"""Distance of a sigmoid from 0 or 1 below which a unit counts as saturated: its derivative is below 0.03."""


def numbers(x: Tensor) -> list[Number]:
    """The elements of a vector: plain floats of a CPU's, tensors of any other device's, which nobody waits for."""
    return x.tolist() if x.device.type == "cpu" else list(x.unbind(0))


def wide(x: Tensor) -> Tensor:
    """The tensor as reals in float32, or float64 where it is float64 already; a sparse tensor as its stored values."""
    return _widened(_real(x))


def _real(x: Tensor) -> Tensor:
    """The tensor as reals in its own precision; a sparse tensor as its stored values."""
    x = x.detach()
    if x.is_sparse:
        x = x.coalesce().values()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _readable(x: Tensor) -> Tensor:
    """The tensor, if its numbers lie in a CPU's memory as they are, else its elements as reals."""
    return x if compiled.lies_plain(x) else _flat(_real(x))


def _flat(x: Tensor) -> Tensor:
    """The elements in whatever order needs no copy."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def measure(x: Tensor, wanted: Collection[str]) -> dict[str, Number]:
    """Several statistics of one tensor in one pass over it.

    `wanted` holds names among `total` (Σ x), `square` (Σ x²), `largest` (max |x|; NaN if there is one), `zeros`
    (elements that are exactly zero, of either sign) and `nonfinite` (NaN and infinite). Others may come along.
    """
    if sums := compiled.sums(x):
        return _completed(x, x, wanted, dict(zip(compiled.NAMES, sums.measure(x), strict=True)))
    flat = _readable(x)
    if flat.device.type == "cpu":
        return _completed(x, flat, wanted, host_sums.measure(flat, _summed(wanted)))
    return _completed(x, flat, wanted, device_sums.measure(flat, [*wanted]))


def _summed(wanted: Collection[str]) -> list[str]:
    """What a CPU has to read for them."""
    names = [name for name in wanted if name != "nonfinite"]
    if "nonfinite" in wanted and not {"largest", "square"} & set(wanted):
        names.append("largest")
    return names


def _completed(x: Tensor, flat: Tensor, wanted: Collection[str], sums: Mapping[str, Number]) -> dict[str, Number]:
    """With what follows from the sums."""
    found = {**sums}
    if "nonfinite" in wanted and "nonfinite" not in found:
        found["nonfinite"] = count_nonfinite(x, found["largest"] if "largest" in found else found["square"])
    if "zeros" in found and x.is_sparse:
        found["zeros"] = found["zeros"] + (x.numel() - flat.numel())
    return found


def total(x: Tensor) -> Number:
    """Sum of the elements, Σ x; unit of x."""
    return measure(x, ("total",))["total"]


def sum_squares(x: Tensor) -> Number:
    """Sum of the squared elements, Σ x², of any float32 x, though beyond 1e19 and 1e-22 it has no square in float32."""
    return measure(x, ("square",))["square"]


def copy_each(tensors: Sequence[Tensor], rooms: Sequence[Tensor | None]) -> list[tuple[Tensor, Number]]:
    """A copy of each tensor, and its Σ x², in one pass where a CPU holds it. Rooms are earlier copies to overwrite."""
    copies = [
        room if room is not None and _alike(room, x) else torch.empty_like(x)
        for x, room in zip(tensors, rooms, strict=True)
    ]
    squares: dict[int, Number] = {}
    for sums, places in compiled.together(copies, tensors):
        squares.update(zip(places, sums.copy_each(*_columns(places, copies, tensors)), strict=True))
    for i, (room, x) in enumerate(zip(copies, tensors, strict=True)):
        if i not in squares:
            squares[i] = sum_squares(room.copy_(x))
    return [(room, squares[i]) for i, room in enumerate(copies)]


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device


def sum_squares_each(tensors: Sequence[Tensor]) -> list[Number]:
    """Σ x² of each of several tensors; those on a device in one fused call."""
    return [found["square"] for found in measure_each(tensors, ("square",))]


def measure_each(tensors: Sequence[Tensor], wanted: Collection[str]) -> list[dict[str, Number]]:
    """`measure` of each of several tensors; those of a CPU together, and those of a device, in few calls."""
    found: dict[int, dict[str, Number]] = {}
    for sums, places in compiled.together(tensors):
        for i, figures in zip(places, sums.measure_each([tensors[i] for i in places]), strict=True):
            found[i] = _completed(tensors[i], tensors[i], wanted, dict(zip(compiled.NAMES, figures, strict=True)))
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        if i in found:
            continue
        if x.device.type == "cpu" or x.is_sparse:
            found[i] = measure(x, wanted)
        else:
            together.setdefault((x.device, x.dtype), []).append(i)
    for places in together.values():
        on_device = device_sums.measure_each([_flat(_real(tensors[i])) for i in places], wanted)
        found.update(zip(places, ({**row} for row in on_device), strict=True))
    return [found[i] for i in range(len(tensors))]


def sum_squared_differences(x: Tensor, y: Tensor) -> Number:
    """Σ (x − y)² of two tensors of one shape: differences are squared, sums are not subtracted."""
    x, y = _real(x).reshape(-1), _real(y).reshape(-1)
    if x.device.type != "cpu":
        return device_sums.distance(x, y)
    return host_sums.distance(x, y) if x.dtype == y.dtype else host_sums.distance(x.double(), y.double())


def sum_squared_differences_each(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Number]:
    """Σ (x − y)² of several pairs. `before` is used up: on a device the differences take its memory."""
    found: dict[int, Number] = {}
    for sums, places in compiled.together(before, after):
        found.update(zip(places, sums.distance_each(*_columns(places, before, after)), strict=True))
    pairs = list(zip(before, after, strict=True))
    fused = [
        i for i, (x, y) in enumerate(pairs)
        if x.dtype == y.dtype and x.device.type != "cpu" and x.element_size() > 2
    ]  # fmt: skip
    if fused:
        ours, theirs = _columns(fused, before, after)
        torch._foreach_sub_(ours, theirs)
        found.update(zip(fused, sum_squares_each(ours), strict=True))
    return [found[i] if i in found else sum_squared_differences(*pair) for i, pair in enumerate(pairs)]


def _columns(places: Sequence[int], *columns: Sequence[Tensor]) -> list[list[Tensor]]:
    return [[column[i] for i in places] for column in columns]


def dot(x: Tensor, y: Tensor) -> Number:
    """Dot product Σ x·y of two tensors of one shape (broadcast first where they differ)."""
    if x.shape == y.shape and (sums := compiled.sums(x, y)):
        return sums.dot(x, y)[0]
    x, y = _real(x), _real(y)
    if x.shape != y.shape:
        shape = broadcast(tuple(x.shape), tuple(y.shape))
        x, y = x.expand(shape), y.expand(shape)
    x, y = (_flat(x), _flat(y)) if x.stride() == y.stride() else (x.reshape(-1), y.reshape(-1))
    if x.device.type == "cpu":
        return host_sums.dot(x, y) if x.dtype == y.dtype else host_sums.dot(x.double(), y.double())
    return device_sums.dot(x, y)


def dot_and_square(x: Tensor, y: Tensor) -> tuple[Number, Number]:
    """Dot product Σ x·y of two tensors (broadcast first where their shapes differ), and Σ x²."""
    if x.shape == y.shape and (sums := compiled.sums(x, y)):
        return sums.dot(x, y)
    return dot(x, y), sum_squares(x)


def max_abs(x: Tensor) -> Number:
    """Largest absolute value, max |x|; NaN if there is one."""
    return measure(x, ("largest",))["largest"]


def count_zeros(x: Tensor) -> Number:
    """Number of elements that are exactly zero (of either sign). NaN is not zero."""
    return measure(x, ("zeros",))["zeros"]


def count_nonfinite(x: Tensor, known: Number | None = None) -> Number:
    """Number of NaN and infinite elements. `known`, max |x| or Σ x², spares a CPU the count when finite."""
    if isinstance(known, float) and math.isfinite(known):
        return 0.0
    if x.device.type != "cpu":
        return measure(x, ("nonfinite",))["nonfinite"]
    return float(torch.count_nonzero(wide(x) * 0))  # 0·x is NaN, hence not zero, exactly where x is not finite


def count_saturated(x: Tensor, kind: str) -> Number | None:
    """Elements at the ends of a bounded activation: |y| > 0.97 for tanh, y outside [0.03, 0.97] for sigmoid.

    `kind` is the lower-case name of the function; None for an activation without such ends.
    """
    if kind in {"tanh", "hardtanh", "softsign"}:
        centre, distance = 0.0, SATURATED_TANH
    elif kind in {"sigmoid", "hardsigmoid"}:
        centre, distance = 0.5, 0.5 - SATURATED_SIGMOID
    else:
        return None
    flat = _flat(_real(x))
    if x.device.type == "cpu":
        return float(host_sums.beyond(flat, centre, distance))
    return device_sums.beyond(flat, centre, distance)


def live_units(x: Tensor, channel_dim: int, zeros: Number | None = None) -> Tensor:
    """Which channels are not zero on some position: a boolean vector as long as the channel axis.

    `zeros`, the number of zeros if it is known, spares a CPU the search where there are none.
    """
    x = x.detach()
    if x.device.type == "cpu":
        if zeros is not None and float(zeros) == 0:
            return torch.ones(x.shape[channel_dim], dtype=torch.bool)
        return torch.from_numpy(host_sums.live(x, channel_dim))
    return device_sums.live(x, channel_dim)
