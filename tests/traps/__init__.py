"""Every trap by name: tiny models, one structural trap each (`traps.base`), by what they are about."""

from traps import attention, calls, convolutions, fused, not_joins, sequence, skips, sums, vision
from traps.base import TRAPS, D, Net, mlp

__all__ = ["TRAPS", "D", "Net", "attention", "calls", "convolutions", "fused", "mlp", "not_joins", "sequence", "skips", "sums", "vision"]
