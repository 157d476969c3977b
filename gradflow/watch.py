"""Looks at a run while it grows: new findings are reported once, and again if they get worse."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeAlias

from gradflow.errors import UsageError
from gradflow.rules import diagnose

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradflow.records import Finding
    from gradflow.store import Run

log = logging.getLogger("gradflow")

Reaction: TypeAlias = Literal["ignore", "warn", "stop"]
_RANK = {"info": 0, "warning": 1, "error": 2}
_GROWTH = 1.25
"""A run is judged again when it has a quarter more sampled steps: the work adds up to a few passes over the run."""


class Watch:
    """What to do about findings: `"ignore"`, `"warn"`, `"stop"`, or a callable that is given each one."""

    def __init__(self, reaction: Reaction | Callable[[Finding], object]) -> None:
        if not callable(reaction) and reaction not in {"ignore", "warn", "stop"}:
            raise UsageError(f'expected on_finding to be "ignore", "warn", "stop" or a callable, got {reaction!r}')
        self.reaction = reaction
        self._told: dict[tuple[str, str], int] = {}
        self._judged_at = 0
        self._alarms = 0

    def due(self, sampled: int, alarms: int = 0) -> bool:
        """Whether enough sampled steps have been written since the run was last judged, or the guard saw a NaN."""
        if self.reaction == "ignore":
            return False
        alarmed, self._alarms = alarms > self._alarms, alarms
        return alarmed or (sampled >= max(8, self._judged_at * _GROWTH) and sampled > self._judged_at)

    def judge(self, run: Run) -> list[Finding]:
        """Findings of the run as it is."""
        return diagnose(run)

    def react(self, run: Run, *, final: bool = False) -> bool:
        """Report what is new; True if training should stop. A fault in here stops nothing."""
        self._judged_at = len(run.steps)
        if self.reaction == "ignore":
            return False
        try:
            findings = diagnose(run)
        except Exception:
            log.warning("gradflow could not look for findings", exc_info=True)
            return False
        stop = False
        for finding in findings:
            key = (finding.code, finding.where[0] if finding.where else "")
            if _RANK[finding.severity] <= self._told.get(key, -1):
                continue
            self._told[key] = _RANK[finding.severity]
            self._tell(finding)
            stop = stop or finding.severity == "error"
        return stop and self.reaction == "stop" and not final

    def _tell(self, finding: Finding) -> None:
        if callable(self.reaction):
            try:
                self.reaction(finding)
            except Exception:
                log.warning("the on_finding callable failed", exc_info=True)
        elif finding.severity != "info":
            log.warning("%s: %s Try: %s", finding.code, finding.claim, finding.remedy)
