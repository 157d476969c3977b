"""The command line, `gradflow`."""

from gradflow.cli.program import app, main

__all__ = ["app", "main"]
