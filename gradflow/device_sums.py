"""Sums over a tensor on an accelerator: nothing waits for it, and little memory is taken for them in passing.

Everything runs in float64, where the device has it, so that no square overflows or underflows and no product of
matrices in TF32 is used. The kernels of `triton_sums` do it in one pass where there is Triton, PyTorch's operations
elsewhere: those would copy a whole tensor to widen it, so `PIECE` elements are widened at a time.
"""

from __future__ import annotations

import importlib
import logging
import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from types import ModuleType

_log = logging.getLogger("gradflow")
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
PIECE = 2**22
"""Elements widened at once: 32 MiB in float64."""


def wide(x: Tensor) -> torch.dtype:
    """Precision of sums: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _kernels(*flats: Tensor) -> ModuleType | None:
    """What reads tensors in one pass, if anything does."""
    able = all(flat.device.type == "cuda" and flat.dtype in _DTYPES for flat in flats)
    return _loaded() if able else None


@cache
def _loaded() -> ModuleType | None:
    """`triton_sums`, if it can be imported and compiled: Triton needs a C compiler, and not every system has Triton."""
    try:
        module = importlib.import_module("gradflow.triton_sums")
        one = torch.ones(1, device="cuda")
        module.measure(one)
        module.dot(one, one)
    except Exception as error:  # noqa: BLE001 (whatever it is, PyTorch's own operations are as right)
        _log.info("sums on the device run as PyTorch's operations, since Triton does not: %s", error)
        return None
    return module


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    dtype = wide(flat)
    return (piece.to(dtype) for piece in torch.split(flat, PIECE))


_OF_PIECE: dict[str, Callable[[Tensor], Tensor]] = {
    "total": lambda piece: piece.sum(),
    "square": lambda piece: torch.linalg.vector_norm(piece).square(),
    "zeros": lambda piece: piece.numel() - torch.linalg.vector_norm(piece, 0),
    "nonfinite": lambda piece: torch.linalg.vector_norm(piece * 0, 0),  # 0·x is NaN, hence not zero, exactly there
}


def measure(flat: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
    """`statistics.measure` of a tensor of one axis."""
    if not flat.numel():
        return dict.fromkeys(wanted, flat.new_zeros((), dtype=wide(flat)))
    names = [name for name in wanted if name != "largest"]
    if names and (kernels := _kernels(flat)):
        figures = kernels.measure(flat)
        return {name: figures[name] for name in wanted}
    found: dict[str, Tensor] = {}
    if "largest" in wanted:
        found["largest"] = torch.linalg.vector_norm(flat, math.inf).to(wide(flat))
    if names:
        pieces = [torch.stack([_OF_PIECE[name](piece) for name in names]) for piece in _pieces(flat)]
        sums = pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)
        found.update(zip(names, sums.unbind(), strict=True))
    return found


def measure_each(flats: Sequence[Tensor], wanted: Collection[str]) -> list[dict[str, Tensor]]:
    """`measure` of tensors of one axis, one device and one dtype, sizes in fused calls."""
    counts = [name for name in ("total", "zeros", "nonfinite") if name in wanted]
    if counts and _kernels(*flats):
        return [measure(flat, [*wanted]) for flat in flats]
    found = [measure(flat, counts) if counts else {} for flat in flats]
    some = [flat if flat.numel() else flat.new_zeros(1) for flat in flats]  # of nothing there is no maximum
    for name, order in (("square", 2), ("largest", math.inf)):
        if name in wanted:
            norms = torch._foreach_norm(some, order, dtype=wide(some[0]))  # noqa: SLF001  what `clip_grad_norm_` uses
            figures = torch.stack(list(norms))
            figures = figures.square() if name == "square" else figures
            for row, figure in zip(found, figures.unbind(), strict=True):
                row[name] = figure
    return found


def beyond(flat: Tensor, centre: float, distance: float) -> Tensor:
    """Number of elements farther than `distance` from `centre`. NaN is not."""
    own = torch.promote_types(flat.dtype, torch.float32)  # as the host compares
    pieces = (piece.to(own) for piece in torch.split(flat, PIECE))
    return _summed(((piece - centre).abs() > distance).to(wide(flat)).sum() for piece in pieces)


def live(x: Tensor, channel_dim: int) -> Tensor:
    """Which channels are not zero on some position. NaN is not zero."""
    x = x.movedim(channel_dim, -1)
    x = x.unsqueeze(0) if x.dim() == 1 else x
    largest: Tensor = torch.linalg.vector_norm(x, math.inf, dim=tuple(range(x.dim() - 1)))
    return largest != 0


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y of two tensors of one axis and one length."""
    if x.numel() and (kernels := _kernels(x, y)):
        found: Tensor = kernels.dot(x, y)
        return found
    return _summed((one * other).sum() for one, other in zip(_pieces(x), _pieces(y), strict=True))


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Σ (x − y)² of two tensors of one axis and one length."""
    if x.numel() and (kernels := _kernels(x, y)):
        found: Tensor = kernels.distance(x, y)
        return found
    pairs = zip(_pieces(x), _pieces(y), strict=True)
    return _summed(torch.linalg.vector_norm(one - other).square() for one, other in pairs)


def _summed(figures: Iterator[Tensor]) -> Tensor:
    found = list(figures)
    return found[0] if len(found) == 1 else torch.stack(found).sum()
