"""Sufficient statistics of tensors: sums, dot products, maxima and counts that add up over batches, ranks and time.

Every function is pure, takes detached tensors of any shape and returns 0-d tensors on the input's device without a
host synchronisation. Reductions run in float32 inside rows of `ROW` elements and in float64 across rows (float64
throughout for float64 input), so a sum over millions of float32 elements is right to about 1e-7 relative; half
precision is widened first, which is exact. A complex number counts as its two parts. Empty tensors give 0. NaN and
infinity are excluded from nothing: they show in the sums, and `count_nonfinite` counts them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ROW = 4096
"""Elements summed in the input's own precision before the sum continues in float64."""

SATURATED_TANH = 0.97
"""|tanh| beyond which a unit counts as saturated: its derivative is below 0.06."""
SATURATED_SIGMOID = 0.03
"""Distance of a sigmoid from 0 or 1 below which a unit counts as saturated: its derivative is below 0.03."""


def wide(x: Tensor) -> Tensor:
    """The tensor as reals in float32, or float64 where it is float64 already; a sparse tensor as its stored values."""
    x = x.detach()
    if x.is_sparse:
        x = x.coalesce().values()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _final(x: Tensor) -> torch.dtype:
    """Precision of the sum across rows: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements as rows of `ROW`, and the rest."""
    flat = x.reshape(-1)
    cut = flat.numel() - flat.numel() % ROW
    return flat[:cut].view(-1, ROW), flat[cut:]


def total(x: Tensor) -> Tensor:
    """Sum of the elements, Σ x; unit of x."""
    body, rest = _rows(wide(x))
    return body.sum(1).to(_final(x)).sum() + rest.sum().to(_final(x))


def sum_squares(x: Tensor) -> Tensor:
    """Sum of the squared elements, Σ x². A float32 x above 1e19 or below 1e-22 has a square outside of float32.

    A row's root is taken before it is squared in float64, so the sum itself neither overflows nor underflows.
    """
    body, rest = _rows(wide(x))
    squares: Tensor = torch.linalg.vector_norm(body, dim=1).to(_final(x)).square().sum()
    return squares + torch.linalg.vector_norm(rest).to(_final(x)).square()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Dot product Σ x·y of two tensors of one shape (broadcast first where they differ)."""
    x, y = wide(x), wide(y)
    if x.shape != y.shape:
        shape = broadcast_shape(tuple(x.shape), tuple(y.shape))
        x, y = x.expand(shape), y.expand(shape)
    if x.dtype != y.dtype:
        x, y = x.double(), y.double()
    (body_x, rest_x), (body_y, rest_y) = _rows(x), _rows(y)
    products: Tensor = torch.linalg.vecdot(body_x, body_y).to(_final(x)).sum()
    return products + torch.dot(rest_x, rest_y).to(_final(x))


def max_abs(x: Tensor) -> Tensor:
    """Largest absolute value, max |x|; NaN if there is one."""
    x = wide(x)
    if x.numel() == 0:
        return torch.zeros((), dtype=_final(x), device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).to(_final(x))


def count_zeros(x: Tensor) -> Tensor:
    """Number of elements that are exactly zero (of either sign). NaN is not zero."""
    x = x.detach()
    if x.is_sparse:
        values = x.coalesce().values()
        return count_zeros(values) + (x.numel() - values.numel())
    if x.device.type == "cpu":  # numpy counts booleans ten times faster, and a CPU tensor has no device to wait for
        return torch.tensor(x.numel() - np.count_nonzero(x.bool().numpy()), dtype=torch.float64)
    return (x.numel() - torch.count_nonzero(x)).to(_final(x))


def count_nonfinite(x: Tensor, largest: Tensor | None = None) -> Tensor:
    """Number of NaN and infinite elements. `largest`, max |x| if it is known, spares a CPU the count when finite."""
    x = wide(x)
    if x.device.type == "cpu" and largest is not None and bool(np.isfinite(largest.numpy())):
        return torch.zeros((), dtype=torch.float64)
    return torch.count_nonzero(x * 0).to(_final(x))  # 0·x is NaN, hence not zero, exactly where x is not finite


def count_saturated(x: Tensor, kind: str) -> Tensor | None:
    """Elements at the ends of a bounded activation: |y| > 0.97 for tanh, y outside [0.03, 0.97] for sigmoid.

    `kind` is the lower-case name of the function; None for an activation without such ends.
    """
    x = wide(x)
    if kind in {"tanh", "hardtanh", "softsign"}:
        return torch.count_nonzero(x.abs() > SATURATED_TANH).to(_final(x))
    if kind in {"sigmoid", "hardsigmoid"}:
        return torch.count_nonzero((x - 0.5).abs() > 0.5 - SATURATED_SIGMOID).to(_final(x))
    return None


def live_units(x: Tensor, channel_dim: int) -> Tensor:
    """Which channels are not zero on some position: a boolean vector as long as the channel axis."""
    flags = x.detach().bool().movedim(channel_dim, -1)
    flags = flags.reshape(-1, flags.shape[-1])
    if flags.device.type == "cpu":
        return torch.from_numpy(np.logical_or.reduce(flags.numpy(), axis=0))
    return flags.any(0)


def broadcast_shape(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the sum of two tensors that broadcast."""
    if one == other:
        return one
    padded = [(1,) * (max(len(one), len(other)) - len(shape)) + shape for shape in (one, other)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))


def broadcast_factor(shape: tuple[int, ...], target: tuple[int, ...]) -> float:
    """How often each element of a tensor of `shape` enters a sum of shape `target`, for sums over the join."""
    return math.prod(target) / max(math.prod(shape), 1)
