"""`dead-units` and `saturated-activation`: activations that no longer pass a gradient."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import listed, unique
from gradflow.rules.view import LEARNED, lasting, median, settled, spell, window

if TYPE_CHECKING:
    from gradflow.records import Severity
    from gradflow.rules.view import Bools, Floats, Grid, View

DEAD = Threshold(
    "dead-units.share",
    "units zero on every position",
    0.4,
    "1",
    "healthy ReLU layers of small networks reach 0.2 to 0.3",
)
DEAD_FROM_THE_START = Threshold(
    "dead-units.share-from-the-start", "the same where a fifth was so at the first step", 0.6, "1",
    "inputs that all look alike to a layer leave half of its units off by the sign of their weights, a coin each: "
    "in narrow layers three standard deviations above half count instead",
)  # fmt: skip
DEAD_ERROR = Threshold(
    "dead-units.error",
    "the same, error",
    0.8,
    "1",
    "four of five units gone: the layer is a bottleneck of what is left",
)
POSITIONS = Threshold(
    "dead-units.positions",
    "positions a sampled step", 32, "position", "a unit that fires on a tenth of them is zero on 32 by chance in 3 %"
)  # fmt: skip
SATURATED = Threshold(
    "saturated-activation.share",
    "elements at the ends of a tanh or sigmoid",
    0.5,
    "1",
    "normal inputs of unit size give 0.04 and 0",
)
SATURATED_ERROR = Threshold("saturated-activation.error", "the same, error", 0.9, "1", "the layer is a step function")
PATIENCE = 500
"""Steps that the loss may take to halve: at 100 half of the zoo's healthy runs have, and nine in ten keep this pace."""
GATE = re.compile(r"gate|(?:^|\.)se(?:\.|$)|excit|scale", re.IGNORECASE)
RELU = re.compile(r"^(?:relu|relu6|threshold)$", re.IGNORECASE)


def dead(view: View) -> list[Finding]:
    """Find ReLU layers most of whose units are zero everywhere, at every recent sampled step."""
    grid = view.grid("layers")
    if not grid.keys or not len(grid.steps):
        return []
    units = np.where(grid["units"] > 0, grid["units"], np.nan)
    share = grid["dead_units"] / units
    enough = grid["n"] / units >= POSITIONS.value
    relu = np.array([bool(RELU.match(kind)) for kind in grid.text("kind")])
    relu &= np.array([not name.endswith("@nograd") for name in grid.names])
    known = np.isfinite(share) & enough & relu
    began = np.array([column[np.isfinite(column)][0] if np.isfinite(column).any() else 0.0 for column in share.T])
    by_chance = 0.5 + 3 * 0.5 / np.sqrt(np.fmax(np.nan_to_num(settled(units)), 1.0))
    alike = np.fmin(np.fmax(DEAD_FROM_THE_START.value, by_chance), DEAD_ERROR.value)
    limit = np.where(began > 0.5 * DEAD.value, alike, DEAD.value)
    bad = known & (share > limit)
    ranked = _ranked(grid, share, bad, known)
    if ranked is None:
        return []
    names, worst, start = ranked.names, ranked.worst, ranked.start
    severity = _severity(view, worst, start, DEAD_ERROR.value)
    positions = float(np.nanmedian((grid["n"] / units)[:, ranked.at]))
    return [
        Finding(
            code="dead-units",
            severity=severity,
            where=unique(names),
            steps=ranked.steps,
            claim=(
                f"{worst:.0%} of the units of {names[0]} are zero on all of about {positions:.0f} positions a step"
                f"{f', and many in {len(names) - 1} more layers' if len(names) > 1 else ''} "
                f"({start:.0%} at the first sampled step)."
            ),
            evidence={
                "quantity": "share of a layer's units that are zero on every position of a step",
                "measured": worst,
                "expected": 0.0,
                "expected_from": "half of the elements of a ReLU are zero, but of hardly any unit all",
                "threshold": float(limit[ranked.at]),
                "threshold_from": (DEAD_FROM_THE_START if limit[ranked.at] > DEAD.value else DEAD).origin,
                "at_the_first_step": start,
                "positions": positions,
                "loss_fall": view.loss_fall,
                "layers": len(names),
                "sampled_steps": int(known[:, ranked.at].sum()),
            },
            why=(
                "A unit that is zero everywhere gets no gradient and stays so until what it reads moves: the layer is "
                "narrower than it looks (Lu et al. 2019, arXiv:1903.06733)."
            ),
            remedy=_remedy(
                severity,
                "Lower the learning rate by a factor of 3 to 10 and start the layer's biases at zero."
                if start < 0.5 * worst
                else "Initialise the layer anew: He weights and zero biases; check that its inputs are centred.",
            ),
            remedy_2="Use GELU or leaky ReLU there, or a norm before the activation.",
            confidence="high" if positions >= 1000 and known[:, ranked.at].sum() >= 3 else "low",
        )
    ]


def _severity(view: View, now: float, start: float, error: float) -> Severity:
    """Error above `error`; a note where training itself went there and learns, else a warning.

    It learns if the loss, beyond its jitter, has halved or falls at a pace to halve within `PATIENCE` steps.
    """
    if now > error:
        return "error"
    age = float(view.steps[-1] - view.steps[0])
    return "info" if start < 0.5 * now and view.falls(LEARNED * min(1.0, age / PATIENCE)) else "warning"


def _remedy(severity: Severity, remedy: str) -> str:
    """The remedy, of a note the one for a training that gets stuck."""
    return f"Nothing, unless the loss stops falling: {remedy[0].lower()}{remedy[1:]}" if severity == "info" else remedy


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Layers whose share has lasted, the worst first: that one's column `at`, its share now and at the start."""

    names: list[str]
    at: int
    worst: float
    start: float
    steps: tuple[int, int]


def _ranked(grid: Grid, share: Floats, bad: Bools, known: Bools) -> _Ranked | None:
    """The layers that are bad at every recent sampled step; None if there is none."""
    lasted = np.flatnonzero(lasting(bad, known, least=1.0))
    if not len(lasted):
        return None
    now = median(share[window(len(share))])
    lasted = lasted[np.argsort(-now[lasted], kind="stable")]
    at = int(lasted[0])
    spells = [spell(bad[:, i], known[:, i], grid.steps) for i in lasted]
    steps = min(first for first, _ in spells), max(last for _, last in spells)
    start = float(share[np.isfinite(share[:, at]), at][0])
    return _Ranked([grid.names[i] for i in lasted], at, float(now[at]), start, steps)


def saturated(view: View) -> list[Finding]:
    """Find tanh and sigmoid layers that sit at their ends; the model's output and gates are meant to."""
    grid = view.grid("layers")
    if not grid.keys or not len(grid.steps):
        return []
    n = np.where(grid["n"] > 0, grid["n"], np.nan)
    share = grid["saturated"] / n
    trained = [not name.endswith("@nograd") for name in grid.names]
    inner = np.array([kept and not GATE.search(name) for kept, name in zip(trained, grid.names, strict=True)])
    inner[len(trained) - 1 - trained[::-1].index(True) if any(trained) else -1] = False
    known = np.isfinite(share) & inner
    bad = known & (share > SATURATED.value)
    ranked = _ranked(grid, share, bad, known)
    if ranked is None:
        return []
    names, worst, start = ranked.names, ranked.worst, ranked.start
    severity = _severity(view, worst, start, SATURATED_ERROR.value)
    return [
        Finding(
            code="saturated-activation",
            severity=severity,
            where=unique(names),
            steps=ranked.steps,
            claim=(
                f"{worst:.0%} of the elements of {names[0]} sit at the ends of its range ({start:.0%} at the first "
                f"sampled step){f'; so do most of {listed(names[1:])}' if len(names) > 1 else ''}."
            ),
            evidence={
                "quantity": "share of elements beyond 0.97 of the activation's range",
                "measured": worst,
                "expected": 0.04,
                "expected_from": "tanh of a normal input of unit variance; 0.0005 for a sigmoid",
                "threshold": SATURATED.value,
                "threshold_from": SATURATED.origin,
                "at_the_first_step": start,
                "loss_fall": view.loss_fall,
                "layers": len(names),
                "sampled_steps": int(known[:, ranked.at].sum()),
            },
            why="Its slope there is under a twentieth, so gradients end at it (Glorot & Bengio 2010).",
            remedy=_remedy(
                severity,
                "Lower the learning rate by a factor of 3 to 10."
                if start < 0.5 * worst
                else "Initialise the weights before it smaller (Glorot, gain 5/3 for tanh) and normalise its inputs.",
            ),
            remedy_2="Put a norm before it, or use ReLU or GELU.",
            confidence="high" if known[:, ranked.at].sum() >= 3 else "low",
        )
    ]


DEAD_UNITS: Rule = Rule(
    code="dead-units",
    says="units never fire",
    severities=("error", "warning", "info"),
    criterion=(
        "Over the threshold of a ReLU layer's units zero on every position, at every recent sampled step of at least "
        "32 positions; half of all elements zero is natural and does not count; info where training turned them off "
        "and the loss, beyond its jitter, halved or falls at a pace to halve within 500 steps."
    ),
    thresholds=(DEAD, DEAD_FROM_THE_START, DEAD_ERROR, POSITIONS),
    source="Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733",
    picture="units",
    check=dead,
)
SATURATION: Rule = Rule(
    code="saturated-activation",
    says="tanh or sigmoid layers sit at their ends",
    severities=("error", "warning", "info"),
    criterion=(
        "Over half of the elements of an inner tanh or sigmoid beyond 0.97 of its range at every recent sampled step; "
        "gates and the model's last layer are left out; info where training went there and the loss, beyond its "
        "jitter, halved or falls at a pace to halve within 500 steps."
    ),
    thresholds=(SATURATED, SATURATED_ERROR),
    source="Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks",
    picture="units",
    check=saturated,
)
