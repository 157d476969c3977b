"""One forward pass -> graph of operations."""

from gradflow.tracing.tracer import Tracer

__all__ = ["Tracer"]
