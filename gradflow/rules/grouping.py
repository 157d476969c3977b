"""Findings under their root cause: what follows from another finding of the same run is told there, not beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Finding

ROOTS: dict[str, tuple[str, ...]] = {
    "dead-units": ("rank-collapse", "signal-collapse", "vanishing-gradient"),
    "blocked-gradient": ("gradient-underflow",),
    "frozen-parameter": (
        "blocked-gradient",
        "gradient-underflow",
        "below-epsilon",
        "update-too-small",
        "vanishing-gradient",
        "signal-collapse",
    ),
    "update-too-small": ("gradient-underflow", "below-epsilon", "vanishing-gradient", "signal-collapse"),
    "below-epsilon": ("vanishing-gradient", "signal-collapse"),
    "massive-activation": ("signal-explosion",),
    "attention-entropy-collapse": ("signal-explosion",),
    "attention-logit-growth": ("signal-explosion",),
    "vanishing-gradient": ("dead-units",),
    "inert-depth": ("silent-branch",),
    "signal-explosion": ("dominant-branch",),
    "silent-branch": ("dominant-branch",),
}
"""Which findings a code can be a consequence of, the likeliest first."""
ALIKE_DEAD = 0.8
"""Where all inputs look alike, about half of a ReLU layer's units are off on every one of them, by nature."""


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Move every finding that follows from a more basic one into that one's evidence, under `"consequences"`."""
    serious = {finding.code: finding for finding in findings if finding.severity != "info"}
    roots: dict[str, str] = {}
    kept, moved = [], []
    for finding in findings:
        root = next((code for code in ROOTS.get(finding.code, ()) if code in serious), None)
        if root is None or not _follows(finding, serious[root]):
            kept.append(finding)
        else:
            roots[finding.code] = root
            moved.append(finding)
    standing = {finding.code for finding in kept}
    told: dict[str, list[str]] = {}
    for finding in moved:
        root = roots[finding.code]
        while root not in standing:  # its root follows from another in turn
            root = roots[root]
        told.setdefault(root, []).append(f"{finding.code}: {finding.claim}")
    return [_with(finding, told.pop(finding.code, None)) for finding in kept]


def _with(finding: Finding, consequences: list[str] | None) -> Finding:
    if not consequences:
        return finding
    return replace(finding, evidence={**finding.evidence, "consequences": consequences})


def _follows(finding: Finding, root: Finding) -> bool:
    """Whether a finding may be a consequence: not one that has a cause of its own written in its evidence."""
    mine, theirs = finding.evidence, root.evidence
    older = root.steps[0] <= finding.steps[0]
    match finding.code:
        case "dead-units":  # units without any signal fall silent by their biases: the older finding is the cause
            starved = root.code in {"signal-collapse", "vanishing-gradient"} and older
            return bool(mine["measured"] < ALIKE_DEAD) or starved
        case "vanishing-gradient":
            return root.code != "dead-units" or bool(theirs["measured"] >= ALIKE_DEAD)
        case "silent-branch":  # what comes after a branch that drowns the stream is small beside it
            return bool(mine["depth"] > theirs["depth"])
        case "signal-explosion":
            return finding.where[0] == root.where[0]
        case "frozen-parameter":
            return finding.severity == "info" or bool(mine["cause"] == "update")
        case _:
            return root.code != "signal-explosion" or older
