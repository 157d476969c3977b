"""The run directory: Parquet parts written, and the run that is read from them. No torch."""

from gradflow.store.run import Run, load

__all__ = ["Run", "load"]
