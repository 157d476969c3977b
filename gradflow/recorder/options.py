"""What a recorder is asked for, checked: tables, numbers, optimizers, directory, and which steps are sampled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from gradflow.errors import UsageError
from gradflow.schema import TABLES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer


def is_sampled(count: int, every_n_steps: int) -> bool:
    """Whether the training step number `count` is sampled: 0, 1, 2, 4, 8, ... below the cadence, then its multiples."""
    return count % every_n_steps == 0 or (count < every_n_steps and count & (count - 1) == 0)


def chosen_tables(tables: Literal["all"] | Iterable[str]) -> frozenset[str]:
    """The tables asked for, checked."""
    names = set(TABLES) if tables == "all" else {tables} if isinstance(tables, str) else set(tables)
    unknown = names - set(TABLES)
    if unknown:
        raise UsageError(f"expected tables among {', '.join(TABLES)}, got {', '.join(sorted(map(str, unknown)))}")
    return frozenset(names)


def listed(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """The optimizers of a training: none, one, or several."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)


def positive(name: str, value: int) -> int:
    """`value`, which must be an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"expected {name} to be an integer of at least 1, got {value!r}")
    return value


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that stays the same when the process changes its working directory; URLs as they are."""
    text = os.fspath(path)
    return text if "://" in text else str(Path(text).absolute())
