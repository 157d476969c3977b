"""From a run to findings: what is wrong, where, since when, on what evidence, why it matters and what to try.

`RULES` holds every rule by its code; a rule is called with a run and returns its findings. `diagnose` calls them all.
Nothing here needs torch, and a finding is made of the run's own numbers, theory's (`gradflow.theory`) and a threshold
whose origin is written beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.rules import (
    attention,
    balance,
    blocked,
    explosion,
    faults,
    frozen,
    gradients,
    grouping,
    nonfinite,
    precision,
    signals,
    silence,
    tokens,
    units,
    updates,
)
from gradflow.rules.registry import Rule, Threshold, chosen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gradflow.records import Finding
    from gradflow.store import Run

__all__ = ["RULES", "Rule", "Threshold", "diagnose"]

RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        nonfinite.RULE,
        gradients.VANISHING,
        explosion.EXPLODING,
        explosion.SPIKES,
        blocked.BLOCKED,
        precision.UNDERFLOWS,
        precision.BELOW_EPSILON,
        signals.EXPLOSION,
        signals.COLLAPSE,
        silence.RULE,
        balance.DOMINANT,
        balance.INERT_DEPTH,
        tokens.RULE,
        attention.ENTROPY_COLLAPSE,
        attention.LOGIT_GROWTH,
        units.DEAD_UNITS,
        units.SATURATION,
        balance.MASSIVE_ACTIVATION,
        updates.TOO_LARGE,
        updates.TOO_SMALL,
        frozen.FROZEN,
    )
}
_ORDER = {"error": 0, "warning": 1, "info": 2}


def diagnose(run: Run, *, thresholds: Mapping[str, float] | None = None) -> list[Finding]:
    """Return everything that is wrong with a run, or worth knowing, the most severe and then the earliest first.

    An empty run has no findings; neither, as a rule, has a healthy one at warning or error.

    Args:
        run: The run.
        thresholds: Values by `Threshold.key` that take the place of the rules' own.
    """
    view = faults.view_of(run)
    with chosen(thresholds):
        findings = [finding for rule in RULES.values() for finding in rule.judge(view)]
    return sorted(
        grouping.grouped(findings), key=lambda finding: (_ORDER[finding.severity], finding.steps[0], finding.code)
    )
