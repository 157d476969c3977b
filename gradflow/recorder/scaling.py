"""What an AMP `GradScaler` has multiplied: the scale, and whether it is still in the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def loss_scale(scaler: Any) -> Tensor | float | None:
    """The scale that a GradScaler multiplies losses by, as a tensor on the device; None without one."""
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return float(scaler.get_scale()) if scale is None else scale


def is_scaled(scaler: Any, optimizer: Any) -> bool:
    """Whether the loss scale is still in the gradients of an optimizer (it unscales inside its own step)."""
    if scaler is None or not scaler.is_enabled():
        return False
    state = scaler._per_optimizer_states.get(id(optimizer)) if optimizer is not None else None  # noqa: SLF001
    return state is None or getattr(state.get("stage"), "name", "") == "READY"
