"""What gradflow raises on purpose: every message says what was expected, what was got and what to do."""

from __future__ import annotations


class GradflowError(Exception):
    """Base of everything that gradflow raises deliberately."""


class UsageError(GradflowError, ValueError):
    """An argument does not fit: a model that is no module, a cadence below one, an unknown table."""


class RunError(GradflowError):
    """A run directory cannot be read or written."""


class SchemaVersionError(RunError):
    """A run was written by a newer gradflow than the one that reads it."""
