"""The form of a rule: its code, what it checks, its thresholds with their origin, and how it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gradflow.rules import faults
from gradflow.rules.texts import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradflow.records import Finding, Severity
    from gradflow.rules.view import View
    from gradflow.store import Run


@dataclass(frozen=True, slots=True)
class Threshold:
    """A number that a rule compares with: `origin` says where it comes from."""

    name: str
    value: float
    unit: str
    origin: str


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
        check: From the view of a run (up to its first non-finite step) to findings.
    """

    code: str
    says: str
    severities: tuple[Severity, ...]
    criterion: str
    thresholds: tuple[Threshold, ...]
    source: str
    check: Callable[[View], list[Finding]] = field(repr=False)

    def __call__(self, run: Run) -> list[Finding]:
        """Return this rule's findings for a run."""
        return self.judge(faults.view_of(run))

    def judge(self, view: View) -> list[Finding]:
        """Return its findings for a view; broken numbers in the run may overflow or divide by zero, and stay NaN."""
        with np.errstate(all="ignore"):
            return [plain(finding) for finding in self.check(view)]
