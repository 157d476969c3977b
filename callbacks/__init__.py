"""Adapters that attach gradflow to a trainer: Lightning's here; each is imported on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightning import GradientFlowMonitor

__all__ = ["GradientFlowMonitor"]


def __getattr__(name: str) -> Any:
    if name == "GradientFlowMonitor":
        from .lightning import GradientFlowMonitor  # Lightning takes seconds to import

        return GradientFlowMonitor
    raise AttributeError(f"module 'gradflow.callbacks' has no attribute {name!r}; public names: {', '.join(__all__)}")
