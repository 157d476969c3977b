"""Findings under their root cause: what follows from another finding of the same run is told there, not beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gradflow.records import Finding

ROOTS: dict[str, tuple[str, ...]] = {
    "dead-units": ("rank-collapse", "signal-collapse", "vanishing-gradient"),
    "blocked-gradient": ("dead-units", "gradient-underflow"),
    "frozen-parameter": (
        "blocked-gradient",
        "gradient-underflow",
        "below-epsilon",
        "update-too-small",
        "vanishing-gradient",
        "signal-collapse",
    ),
    "update-too-small": ("gradient-underflow", "below-epsilon", "vanishing-gradient", "signal-collapse"),
    "signal-explosion": ("update-too-large",),
    "below-epsilon": ("vanishing-gradient", "signal-collapse", "silent-branch"),
    "massive-activation": ("signal-explosion",),
    "attention-entropy-collapse": ("signal-explosion",),
    "attention-logit-growth": ("signal-explosion",),
    "vanishing-gradient": ("dead-units",),
    "rank-collapse": ("dead-units",),
    "inert-depth": ("silent-branch",),
    "dominant-branch": ("signal-explosion",),
    "gradient-spike": ("update-too-large", "signal-explosion", "exploding-gradient"),
    "silent-branch": ("dominant-branch",),
}
"""Which findings a code can be a consequence of, the likeliest first."""
ALIKE_DEAD = 0.8
"""Where all inputs look alike, about half of a ReLU layer's units are off on every one of them, by nature."""
ALL_DEAD = 0.99
"""Share of a layer's units from which the few that live make no difference between tokens."""


def grouped(findings: Sequence[Finding]) -> list[Finding]:
    """Move every finding that follows from a more basic one into that one's evidence, under `"consequences"`."""
    roots = rooted(findings, _causes(findings))
    told: dict[int, list[str]] = {}
    for place, root in enumerate(roots):
        if root != place:
            told.setdefault(root, []).append(f"{findings[place].code}: {findings[place].claim}")
    return [_with(findings[place], told.get(place)) for place, root in enumerate(roots) if root == place]


def rooted(findings: Sequence[Finding], causes: Mapping[int, int]) -> list[int]:
    """Return the place of each finding's root: where the chain of causes ends that begins at it.

    Two findings may each be a possible cause of the other. A circle has no end: its root is the finding in it that
    began first, of several the first in order.

    Args:
        findings: The findings.
        causes: Place of a finding to that of its cause; a root of its own is not in it.
    """
    return [_root(place, findings, causes) for place in range(len(findings))]


def _root(place: int, findings: Sequence[Finding], causes: Mapping[int, int]) -> int:
    chain = [place]
    while (cause := causes.get(chain[-1])) is not None:
        if cause in chain:
            return min(chain[chain.index(cause) :], key=lambda at: (findings[at].steps[0], at))
        chain.append(cause)
    return chain[-1]


def _causes(findings: Sequence[Finding]) -> dict[int, int]:
    """Return the place of the likeliest cause of each finding that has one."""
    serious = {finding.code: place for place, finding in enumerate(findings) if finding.severity != "info"}
    causes = {}
    for place, finding in enumerate(findings):
        likely = (serious[code] for code in ROOTS.get(finding.code, ()) if code in serious)
        cause = next((cause for cause in likely if _follows(finding, findings[cause])), None)
        if cause is not None:
            causes[place] = cause
    return causes


def _with(finding: Finding, consequences: list[str] | None) -> Finding:
    if not consequences:
        return finding
    return replace(finding, evidence={**finding.evidence, "consequences": consequences})


def _follows(finding: Finding, root: Finding) -> bool:  # noqa: PLR0911 - one answer for each kind of consequence
    """Whether a finding may be a consequence: not one that has a cause of its own written in its evidence."""
    mine, theirs = finding.evidence, root.evidence
    older = root.steps[0] <= finding.steps[0]
    match finding.code:
        case "dead-units":  # units without any signal fall silent by their biases: the older finding is the cause
            starved = {"signal-collapse": older, "vanishing-gradient": root.steps[0] < finding.steps[0]}
            return bool(mine["measured"] < ALIKE_DEAD) or starved.get(root.code, False)
        case "blocked-gradient":  # through units that never fire nothing comes back
            inside = [layer for place in finding.where for layer in root.where if f"{layer}.".startswith(f"{place}.")]
            return root.code != "dead-units" or (bool(theirs["measured"] >= ALIKE_DEAD) and bool(inside))
        case "rank-collapse":  # units that are all off are the same for every token
            return bool(theirs["measured"] >= ALL_DEAD)
        case "vanishing-gradient":
            return root.code != "dead-units" or bool(theirs["measured"] >= ALIKE_DEAD)
        case "signal-explosion":  # steps that are too long make it, in time, of a stream that began sound
            return mine.get("over") == "time" or root.steps[0] < finding.steps[0]
        case "silent-branch":  # what comes after a branch that drowns the stream is small beside it
            return bool(mine["depth"] > theirs["depth"])
        case "below-epsilon":  # behind branches that are nearly zero gradients are nearly zero, too
            return root.code != "silent-branch" or root.severity == "error"
        case "gradient-spike":  # steps that are too long throw the gradient about later on
            return root.steps[0] < finding.steps[0] if root.code == "update-too-large" else older
        case "frozen-parameter":
            return finding.severity == "info" or bool(mine["cause"] == "update")
        case _:
            return root.code not in {"signal-explosion", "exploding-gradient"} or older
