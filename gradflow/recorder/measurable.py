"""Which tensors can be measured as they are: plain ones, this rank's part of sharded ones, none that hide values."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)


def measurable(x: Tensor) -> Tensor | None:
    """`x`, or the part of it that this rank holds; None for what has no values of its own here.

    That is: fake, meta, sparse, nested and quantised tensors, tensors inside a function transform such as `vmap`,
    sharded tensors that are sums still to be reduced, and any subclass that intercepts operations at dispatch. No
    collective is started.
    """
    if type(x) not in _ORDINARY and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        part = _part(x)
        if part is None or type(part) is not Tensor:
            return None
        x = part
    hidden = x.is_meta or x.is_quantized or x.layout != torch.strided or x.is_nested
    return None if hidden or torch._C._functorch.is_functorch_wrapped_tensor(x) else x  # noqa: SLF001


def _part(x: Any) -> Tensor | None:
    """This rank's part of a `DTensor`, or the result of a collective of the model's own that is still under way."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None:
        return None
    if isinstance(x, distributed.DTensor):
        if any(placement.is_partial() for placement in x.placements):
            return None
        x = x.to_local()
    part: Tensor = x.wait() if type(x).__name__ == "AsyncCollectiveTensor" else x
    return part
