"""The form of a rule: its code, what it checks, its thresholds with their origin, and how it finds."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from gradflow.rules import faults
from gradflow.rules.texts import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gradflow.records import Finding, Severity
    from gradflow.rules.view import View
    from gradflow.store import Run


@dataclass(frozen=True, slots=True)
class Threshold:
    """A number that a rule compares with.

    Attributes:
        key: By which a project sets it, `<code>.<what>`.
        name: Of the quantity.
        default: The number, unless it is set.
        unit: Of the quantity.
        origin: Where the number comes from.
    """

    key: str
    name: str
    default: float
    unit: str
    origin: str

    @property
    def value(self) -> float:
        """The number in force: what was set with `chosen`, else the default."""
        return _CHOSEN.get().get(self.key, self.default)


_CHOSEN: ContextVar[Mapping[str, float]] = ContextVar("thresholds", default=MappingProxyType({}))


@contextmanager
def chosen(thresholds: Mapping[str, float] | None) -> Iterator[None]:
    """Inside, the thresholds with these keys have these values."""
    token = _CHOSEN.set(thresholds or {})
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule. Calling it with a run gives its findings.

    Attributes:
        code: The code of its findings.
        says: What a finding says, in one line.
        severities: Severities it can give.
        criterion: When it fires, in words.
        thresholds: The numbers it compares with.
        source: Where the effect is described.
        picture: Key of the picture in `gradflow.plotting.gallery` that shows it best.
        check: From the view of a run (up to its first non-finite step) to findings.
    """

    code: str
    says: str
    severities: tuple[Severity, ...]
    criterion: str
    thresholds: tuple[Threshold, ...]
    source: str
    picture: str
    check: Callable[[View], list[Finding]] = field(repr=False)

    def __call__(self, run: Run) -> list[Finding]:
        """Return this rule's findings for a run."""
        return self.judge(faults.view_of(run))

    def judge(self, view: View) -> list[Finding]:
        """Return its findings for a view; broken numbers in the run may overflow or divide by zero, and stay NaN."""
        with np.errstate(all="ignore"):
            return [plain(finding) for finding in self.check(view)]
