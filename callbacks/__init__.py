"""Adapters that attach gradflow to a trainer, Lightning's or transformers'; each is imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .huggingface import GradientFlowCallback
    from .lightning import GradientFlowMonitor

__all__ = ["GradientFlowCallback", "GradientFlowMonitor"]
_HOMES = {"GradientFlowCallback": ".huggingface", "GradientFlowMonitor": ".lightning"}  # both take seconds to import


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'gradflow.callbacks' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    return getattr(import_module(_HOMES[name], __name__), name)
