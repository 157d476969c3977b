"""`silent-branch`: branches that add nothing and, by now, should."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import listed, number, unique
from gradflow.rules.view import lasting, median, settled, spell, window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.records import Branch
    from gradflow.rules.view import Floats, View

SILENT = Threshold(
    "silent-branch.ratio",
    "branch over skip",
    1e-3,
    "1",
    "a thousandth of the stream; healthy trained branches stay above 1e-2",
)
PATIENCE = Threshold(
    "silent-branch.patience", "steps that a branch started at or near zero may take", 1000, "step",
    "ReZero, LayerScale and zero-initialised last layers grow past it within a few hundred steps",
)  # fmt: skip
STILL = 20
"""Steps after which a branch that started at zero and still is exactly zero, without gradient, will stay so."""
GATE_RMS = 0.1
"""A vector inside the branch's block smaller than this is a gate that was initialised small on purpose."""


def check(view: View) -> list[Finding]:
    """Find branches that stay under a thousandth of the skip past the time that their initialisation excuses."""
    grid = view.grid("branches")
    if not grid.keys or not len(grid.steps):
        return []
    ratio = _ratio(view)
    known = np.isfinite(ratio)
    silent = known & (ratio < SILENT.value)
    candidates = np.flatnonzero(lasting(silent, known, least=0.95) & (known[window(len(ratio))].sum(axis=0) >= 3))
    branches = {branch.name: branch for branch in view.run.branches}
    stuck = [
        int(i) for i in candidates if _overdue(view, ratio[:, i], int(i), branches.get(grid.names[i]), silent[:, i])
    ]
    return [_finding(view, ratio, silent, known, stuck)] if stuck else []


def _ratio(view: View) -> Floats:
    """Branch over skip, shape (step, branch); 0 for a branch that is exactly zero."""
    grid = view.grid("branches")
    ratio = grid["branch_ratio"].copy()
    ratio[(grid["branch_sq"] == 0) & (grid["skip_sq"] > 0)] = 0.0
    return ratio


def _overdue(view: View, ratio: Floats, index: int, branch: Branch | None, silent: NDArray[np.bool_]) -> bool:
    """Whether a branch that is silent at the end ought not to be: it fell silent, or had its time to grow."""
    steps = view.grid("branches").steps
    seen = np.flatnonzero(np.isfinite(ratio))
    if not silent[seen[0]] or steps[-1] >= PATIENCE.value:
        return True
    if steps[seen[-1]] - steps[seen[0]] < STILL:
        return False
    values = ratio[seen]
    if (values == 0).all():
        return _without_gradient(view, index)
    grew = values[-1] > 2 * values[values > 0][0] and at_pace(ratio[:, None], steps)[0] > SILENT.value
    return not grew and not _gated(view, branch)


def at_pace(ratio: Floats, steps: NDArray[np.int64]) -> Floats:
    """Branch over skip at `PATIENCE` steps or twice the run, if it goes on as in the run's second half; (branch,)."""
    half = len(ratio) // 2
    now, before = settled(ratio), median(ratio[max(0, half - 1) : half + 2])
    pace = (now - before) / max(1.0, float(median(steps[window(len(steps))].astype(np.float64))) - float(steps[half]))
    return np.asarray(now + pace * max(PATIENCE.value - float(steps[-1]), float(steps[-1])))


def _without_gradient(view: View, index: int) -> bool:
    """Whether no gradient at all came back through a branch: a zero gate on a zero layer holds it for ever."""
    gradient = view.grid("branches")["grad_branch_sq"][:, index]
    gradient = gradient[np.isfinite(gradient)]
    return bool(len(gradient) and (gradient == 0).all())


def _gated(view: View, branch: Branch | None) -> bool:
    """Whether the branch's block holds a small vector or scalar parameter: a gate that is still growing."""
    if branch is None:
        return False
    prefix = f"{branch.module}." if branch.module else ""
    names = {
        p.name for p in view.run.parameters if (p.name.startswith(prefix) and len(p.shape) <= 1) or sum(p.shape) == 1
    }
    grid = view.grid("parameters")
    if not len(grid.steps):
        return False
    weights = grid["weight_rms"][0]
    return any(
        name in names and not name.endswith("bias") and 0 <= weights[i] < GATE_RMS for i, name in enumerate(grid.names)
    )


def _finding(
    view: View, ratio: Floats, silent: NDArray[np.bool_], known: NDArray[np.bool_], stuck: list[int]
) -> Finding:
    grid = view.grid("branches")
    now = median(ratio[window(len(ratio))])
    stuck = sorted(stuck, key=lambda i: float(now[i]))
    names = [grid.names[i] for i in stuck]
    spells = [spell(silent[:, i], known[:, i], grid.steps) for i in stuck]
    others = [float(value) for i, value in enumerate(now) if i not in set(stuck) and np.isfinite(value)]
    started = [i for i in stuck if silent[np.flatnonzero(known[:, i])[0], i]]
    worst = float(now[stuck[0]])
    many = 2 * len(stuck) > len(grid.keys)
    history = "since the first step" if len(started) == len(stuck) else f"since step {min(s[0] for s in spells)}"
    return Finding(
        code="silent-branch",
        severity="error" if many and len(grid.keys) > 1 else "warning",
        where=unique(names),
        steps=(min(s[0] for s in spells), max(s[1] for s in spells)),
        claim=(
            f"{len(stuck)} of {len(grid.keys)} branches add nothing {history}: {listed(names)} "
            f"{'is' if len(names) == 1 else 'are'} {number(worst)} of the skip"
            f"{f', the others {number(float(np.median(others)))}' if others else ''}."
        ),
        evidence={
            "quantity": "branch over skip, RMS",
            "measured": worst,
            "expected": float(np.median(others)) if others else 1.0 / max(1, len(grid.keys)) ** 0.5,
            "expected_from": "median of the other branches" if others else "1/√L, pre-norm at initialisation",
            "threshold": SILENT.value,
            "threshold_from": SILENT.origin,
            "silent_branches": len(stuck),
            "branches": len(grid.keys),
            "depth": min((branch.depth for branch in view.run.branches if branch.name in names), default=0),
            "silent_from_the_start": len(started),
            "gradient_through_the_branch": "none" if all(_without_gradient(view, i) for i in stuck) else "some",
        },
        why=(
            "The block computes for nothing and the network is shallower than it looks; a branch that is zero and "
            "gets no gradient never recovers (Bachlechner et al. 2020, arXiv:2003.04887)."
        ),
        remedy=(
            "Let exactly one factor of the branch start at zero (a gate or the last layer, not both) and check that "
            "it is in the optimizer with a learning rate above zero."
            if started
            else "Look at what happened at the first step named: lower the learning rate there, and exclude gains and "
            "norms from weight decay."
        ),
        remedy_2="Initialise the branch's last layer as its other layers, or raise the gate's learning rate.",
        confidence="high" if len(grid.steps) >= 5 else "low",
    )


RULE: Rule = Rule(
    code="silent-branch",
    says="a branch adds nothing",
    severities=("error", "warning"),
    criterion=(
        "Branch over skip under the threshold at every recent sampled step (three or more), and it was above before, "
        "or 1,000 steps have passed, or it is exactly zero without any gradient, or it is neither gated nor growing at "
        "a pace that would bring it there in 1,000 steps."
    ),
    thresholds=(SILENT, PATIENCE),
    source="Bachlechner et al. 2020, arXiv:2003.04887; Touvron et al. 2021, arXiv:2103.17239",
    picture="ratio-depth",
    check=check,
)
