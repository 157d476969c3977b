"""Sufficient statistics of tensors: sums, dot products, maxima and counts that add up over batches, ranks and time.

Every function is pure, takes detached tensors of any shape and returns numbers: 0-d tensors on the input's device
without a host synchronisation, or plain floats where the input is in a CPU's memory. Reductions run in float32 inside
rows of a few thousand elements and in float64 across rows (float64 throughout for float64 input), so a sum over
millions of float32 elements is right to about 1e-7 relative; half precision is widened first, which is exact. A complex
number counts as its two parts. Empty tensors give 0. NaN and infinity are excluded from nothing: they show in the sums,
and `count_nonfinite` counts them.

What a CPU holds is read by `host_sums`, several statistics in one pass over memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from gradflow import host_sums

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

Number: TypeAlias = "Tensor | float"
"""A figure: on its way on a device, or, of a tensor in a CPU's memory, at hand."""
ROW = 4096
"""Elements summed in the input's own precision before the sum continues in float64."""

SATURATED_TANH = 0.97
"""|tanh| beyond which a unit counts as saturated: its derivative is below 0.06."""
SATURATED_SIGMOID = 0.03
"""Distance of a sigmoid from 0 or 1 below which a unit counts as saturated: its derivative is below 0.03."""


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


def _final(x: Tensor) -> torch.dtype:
    """Precision of the sum across rows: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _flat(x: Tensor) -> Tensor:
    """The elements in whatever order needs no copy."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1)


def _rows(flat: Tensor) -> tuple[Tensor, ...]:
    """The elements as rows of `ROW`, and the rest as a row of its own, each only where it holds anything."""
    cut = flat.numel() - flat.numel() % ROW
    rows = [flat[:cut].view(-1, ROW)] if cut else []
    return (*rows, flat[cut:].view(1, -1)) if cut < flat.numel() else tuple(rows)


def measure(x: Tensor, wanted: Collection[str]) -> dict[str, Number]:
    """Several statistics of one tensor in one pass over it.

    `wanted` holds names among `total` (Σ x), `square` (Σ x²), `largest` (max |x|; NaN if there is one), `zeros`
    (elements that are exactly zero, of either sign) and `nonfinite` (NaN and infinite; it brings `largest` along where
    there is no `square`).
    """
    flat = _flat(_real(x))
    on_host = flat.device.type == "cpu"
    names = [name for name in wanted if name != "nonfinite"]
    if "nonfinite" in wanted and not {"largest", "square"} & set(wanted):
        names.append("largest")
    found: dict[str, Number] = {}
    found.update(host_sums.measure(flat, names) if on_host else _on_device(flat, names))
    if "nonfinite" in wanted:
        found["nonfinite"] = count_nonfinite(x, found["largest"] if "largest" in found else found["square"])
    if "zeros" in found and x.is_sparse:
        found["zeros"] = found["zeros"] + (x.numel() - flat.numel())
    return found


def _on_device(flat: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Statistics on an accelerator: whole tensors at a time, nothing waits."""
    final, wide_flat = _final(flat), _widened(flat)
    rows = _rows(wide_flat)
    found = {name: torch.zeros((), dtype=final, device=flat.device) for name in names}
    if not rows:
        return found
    if "square" in found:
        norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in rows])
        found["square"] = norms.to(final).square().sum()
    if "total" in found:
        found["total"] = torch.cat([part.sum(1) for part in rows]).to(final).sum()
    if "largest" in found:
        found["largest"] = torch.linalg.vector_norm(wide_flat, math.inf).to(final)
    if "zeros" in found:
        found["zeros"] = (flat.numel() - torch.count_nonzero(flat)).to(final)
    return found


def total(x: Tensor) -> Number:
    """Sum of the elements, Σ x; unit of x."""
    return measure(x, ("total",))["total"]


def sum_squares(x: Tensor) -> Number:
    """Sum of the squared elements, Σ x², of any float32 x, though x above 1e19 or below 1e-22 has no square in float32.

    On a device a row's root is taken in float32 and squared in float64; a CPU goes over to float64 where it must.
    """
    return measure(x, ("square",))["square"]


def copy(x: Tensor, room: Tensor | None = None) -> tuple[Tensor, Number]:
    """A copy of a tensor, and its Σ x², in one pass where a CPU holds it. `room` is an earlier copy to overwrite."""
    if room is None or room.shape != x.shape or room.dtype != x.dtype or room.device != x.device:
        room = torch.empty_like(x)
    if x.device.type == "cpu" and not x.is_complex() and room.is_contiguous() and x.is_contiguous():
        return room, host_sums.copy(room.view(-1), x.detach().view(-1))
    return room.copy_(x), sum_squares(x)


def sum_squares_each(tensors: Sequence[Tensor]) -> list[Number]:
    """Σ x² of each of several tensors; those on a device in one fused call.

    There it is the square of a float32 norm (float64 for float64): infinite from a norm of 1.8e19 on.
    """
    found: dict[int, Number] = {i: sum_squares(x) for i, x in enumerate(tensors) if x.device.type == "cpu"}
    fused: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        if i not in found:
            fused.setdefault((x.device, x.dtype), []).append(i)
    for places in fused.values():
        found.update(zip(places, _squared_norms([tensors[i] for i in places]), strict=True))
    return [found[i] for i in range(len(tensors))]


def _squared_norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    values = [_real(x) for x in tensors]
    dtype = values[0].dtype if values[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(values, 2, dtype=dtype)  # noqa: SLF001  what `clip_grad_norm_` uses
    return torch.stack(list(norms)).to(_final(values[0])).square().unbind()


def sum_squared_differences(x: Tensor, y: Tensor) -> Number:
    """Σ (x − y)² of two tensors of one shape: differences are squared, sums are not subtracted."""
    x, y = _real(x).reshape(-1), _real(y).reshape(-1)
    if x.device.type != "cpu" or y.device.type != "cpu":
        return sum_squares(_widened(x) - _widened(y))
    if x.dtype != y.dtype:
        x, y = x.double(), y.double()
    return host_sums.distance(x, y)


def dot(x: Tensor, y: Tensor) -> Number:
    """Dot product Σ x·y of two tensors of one shape (broadcast first where they differ)."""
    x, y = _real(x), _real(y)
    if x.shape != y.shape:
        shape = broadcast_shape(tuple(x.shape), tuple(y.shape))
        x, y = x.expand(shape), y.expand(shape)
    if x.dtype != y.dtype:
        x, y = x.double(), y.double()
    x, y = (_flat(x), _flat(y)) if x.stride() == y.stride() else (x.reshape(-1), y.reshape(-1))
    if x.device.type == "cpu":
        return host_sums.dot(x, y)
    rows = zip(_rows(_widened(x)), _rows(_widened(y)), strict=True)
    parts = [torch.linalg.vecdot(one, other) for one, other in rows]
    return torch.cat(parts).to(_final(x)).sum() if parts else torch.zeros((), dtype=_final(x), device=x.device)


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
    x = wide(x)
    count = torch.count_nonzero(x * 0)  # 0·x is NaN, hence not zero, exactly where x is not finite
    return float(count) if x.device.type == "cpu" else count.to(_final(x))


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
    if x.device.type == "cpu":
        return float(host_sums.beyond(_flat(_real(x)), centre, distance))
    return torch.count_nonzero((wide(x) - centre).abs() > distance).to(_final(x))


def live_units(x: Tensor, channel_dim: int, zeros: Number | None = None) -> Tensor:
    """Which channels are not zero on some position: a boolean vector as long as the channel axis.

    `zeros`, the number of zeros if it is known, spares a CPU the search where there are none.
    """
    x = x.detach()
    if x.device.type == "cpu":
        if zeros is not None and float(zeros) == 0:
            return torch.ones(x.shape[channel_dim], dtype=torch.bool)
        return torch.from_numpy(host_sums.live(x, channel_dim))
    flags = x.bool().movedim(channel_dim, -1)
    return flags.reshape(-1, flags.shape[-1]).any(0)


def broadcast_shape(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the sum of two tensors that broadcast."""
    if one == other:
        return one
    padded = [(1,) * (max(len(one), len(other)) - len(shape)) + shape for shape in (one, other)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))


def broadcast_factor(shape: tuple[int, ...], target: tuple[int, ...]) -> float:
    """How often each element of a tensor of `shape` enters a sum of shape `target`, for sums over the join."""
    return math.prod(target) / max(math.prod(shape), 1)
