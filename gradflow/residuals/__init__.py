"""Graph of one pass -> its residual joins, branches and streams. No torch."""

from gradflow.residuals.analysis import analyse

__all__ = ["analyse"]
