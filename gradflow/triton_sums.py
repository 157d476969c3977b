"""The sums of `device_sums` in one pass over memory: kernels for Triton, which comes with PyTorch for CUDA on Linux.

Every element is widened to float64, which is exact. What a program of a kernel reads depends on the number of elements
alone, so figures do not change from run to run. Imported by `device_sums` where it is wanted: Triton is slow to import.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_SPAN = 8 * _BLOCK
"""Elements a program reads, where that makes at most `_PROGRAMS` programs."""
_PROGRAMS = 1024
NAMES = ("total", "square", "largest", "zeros", "nonfinite")


@triton.jit(do_not_specialize=["n", "span", "stride"])
def _measure(x, found, n, span, stride, BLOCK: tl.constexpr):
    """Figures of one span: number k goes to found[k * stride + program]."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * span
    total = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.int64)
    nonfinite = tl.zeros([BLOCK], tl.int64)
    for offset in range(0, span, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        inside = at < n
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
        size = tl.abs(v)
        total += v
        square += v * v
        largest = tl.where(size > largest, size, largest)  # not where v is NaN: its square says so
        zeros += ((v == 0) & inside).to(tl.int64)
        nonfinite += ((size == float("inf")) | (v != v)).to(tl.int64)
    squares = tl.sum(square, 0)
    most = tl.max(largest, 0)
    tl.store(found + program, tl.sum(total, 0))
    tl.store(found + stride + program, squares)
    tl.store(found + 2 * stride + program, tl.where(squares != squares, squares, most))
    tl.store(found + 3 * stride + program, tl.sum(zeros, 0).to(tl.float64))
    tl.store(found + 4 * stride + program, tl.sum(nonfinite, 0).to(tl.float64))


@triton.jit(do_not_specialize=["count"])
def _combine(parts, found, count, stride: tl.constexpr):
    """The figures of all spans."""
    at = tl.arange(0, stride)
    inside = at < count
    squares = tl.sum(tl.load(parts + stride + at, mask=inside, other=0.0), 0)
    most = tl.max(tl.load(parts + 2 * stride + at, mask=inside, other=0.0), 0)
    tl.store(found, tl.sum(tl.load(parts + at, mask=inside, other=0.0), 0))
    tl.store(found + 1, squares)
    tl.store(found + 2, tl.where(squares != squares, squares, most))
    tl.store(found + 3, tl.sum(tl.load(parts + 3 * stride + at, mask=inside, other=0.0), 0))
    tl.store(found + 4, tl.sum(tl.load(parts + 4 * stride + at, mask=inside, other=0.0), 0))


@triton.jit(do_not_specialize=["n", "span"])
def _pairs(x, y, found, n, span, APART: tl.constexpr, BLOCK: tl.constexpr):
    """Σ (x − y)² of one span if `APART`, else Σ x·y."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * span
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, span, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        inside = at < n
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(y + at, mask=inside, other=0.0).to(tl.float64)
        if APART:
            total += (v - w) * (v - w)
        else:
            total += v * w
    tl.store(found + program, tl.sum(total, 0))


def _spans(n: int) -> tuple[int, int]:
    """How many programs read how many elements each."""
    span = max(_SPAN, triton.cdiv(triton.cdiv(n, _PROGRAMS), _BLOCK) * _BLOCK)
    return triton.cdiv(n, span), span


def measure(flat: Tensor) -> dict[str, Tensor]:
    """Every statistic of a tensor of one axis that is not empty."""
    n = flat.numel()
    programs, span = _spans(n)
    found = torch.empty(len(NAMES), dtype=torch.float64, device=flat.device)
    if programs == 1:
        _measure[(1,)](flat, found, n, span, 1, BLOCK=_BLOCK)
    else:
        parts = torch.empty(len(NAMES) * _PROGRAMS, dtype=torch.float64, device=flat.device)
        _measure[(programs,)](flat, parts, n, span, _PROGRAMS, BLOCK=_BLOCK)
        _combine[(1,)](parts, found, programs, stride=_PROGRAMS)
    return dict(zip(NAMES, found.unbind(), strict=True))


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y."""
    return _of_pairs(x, y, apart=False)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Σ (x − y)²."""
    return _of_pairs(x, y, apart=True)


def _of_pairs(x: Tensor, y: Tensor, *, apart: bool) -> Tensor:
    programs, span = _spans(x.numel())
    parts = torch.empty(programs, dtype=torch.float64, device=x.device)
    _pairs[(programs,)](x, y, parts, x.numel(), span, APART=apart, BLOCK=_BLOCK)
    return parts[0] if programs == 1 else parts.sum()
