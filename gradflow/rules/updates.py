"""`update-too-large` and `update-too-small`: steps against the size of weights, and what came of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import number, unique
from gradflow.rules.view import lasting, median, settled, spell

if TYPE_CHECKING:
    from gradflow.rules.view import Bools, Floats, View

LARGE = Threshold(
    "update-too-large.median",
    "update over weight, median over matrices",
    0.1,
    "1",
    "healthy small models stay under 0.05 once warm",
)
EARLY = Threshold(
    "update-too-large.first-steps",
    "the same at its largest in the first steps",
    0.3,
    "1",
    "37 healthy runs stay under 0.06",
)
BLOWN_UP = Threshold(
    "update-too-large.growth", "growth of the weights since", 3.0, "1", "healthy weights grow up to 1.9 times"
)
REPLACED = Threshold(
    "update-too-large.matrix", "update over weight of one matrix", 1.0, "1", "every step replaces the weights"
)
SMALL = Threshold(
    "update-too-small.median",
    "update over weight, median over matrices",
    1e-5,
    "1",
    "a per cent in a thousand aligned steps",
)
WARM = 50
"""Steps before which updates are judged by nothing: warm-up, Adam's first steps."""
GOOD = 3e-3
"""Update over weight to aim at: between the 1e-3 of the rule of thumb and the 1e-2 of healthy small models."""
ALIVE = 1e-3
"""Weight RMS under which a matrix counts as started at zero: its first updates exceed it by design."""


def matrices_of(view: View) -> Bools:
    """Which parameters are trained matrices that did not start at zero; embeddings, rows of which rest, left out."""
    grid = view.grid("parameters")
    shapes = {p.name: p.shape for p in view.run.parameters if p.requires_grad}
    mask = np.array([len(shapes.get(name, ())) >= 2 and "embed" not in name for name in grid.names], dtype=bool)
    if len(grid.steps):
        mask &= np.nan_to_num(grid["weight_rms"][0]) > ALIVE
    return mask


def too_large(view: View) -> list[Finding]:
    """Find updates that replace the weights, or are large on the whole while the loss does not fall."""
    grid = view.grid("parameters")
    if not len(grid.steps) or grid.steps[-1] < WARM:
        return []
    matrices = matrices_of(view)
    ratio = grid["update_ratio"]
    late = grid.steps >= WARM
    known = np.isfinite(ratio) & late[:, None] & matrices
    replaced = np.flatnonzero(lasting(known & (ratio > REPLACED.value), known) & (known.sum(axis=0) >= 3))
    typical = _typical(ratio, matrices)
    large = np.isfinite(typical) & late & (typical > LARGE.value)
    stuck = view.loss_fall is not None and view.loss_fall < 0.05
    everywhere = stuck and bool(lasting(large[:, None], (np.isfinite(typical) & late)[:, None])[0])
    if not everywhere and not len(replaced):
        return _blown_up(view, typical, matrices)
    now = settled(ratio)
    chosen = np.flatnonzero(matrices & (now > LARGE.value)) if everywhere else replaced
    chosen = chosen[np.argsort(-now[chosen], kind="stable")]
    names = [grid.names[i] for i in chosen] or ["the model"]
    overall = float(settled(typical[:, None])[0])
    worst = float(now[chosen[0]]) if len(chosen) else overall
    steps = (
        spell(large, np.isfinite(typical), grid.steps)
        if everywhere
        else (int(grid.steps[late][0]), int(grid.steps[-1]))
    )
    threshold = LARGE if everywhere else REPLACED
    return [
        Finding(
            code="update-too-large",
            severity="error" if everywhere and overall > REPLACED.value else "warning",
            where=unique(names),
            steps=steps,
            claim=(
                f"A step changes {names[0]} by {number(worst)} of its size, the median matrix by {number(overall)}"
                f"{', and the loss does not fall' if stuck else ''}."
            ),
            evidence={
                "quantity": "update over weight, RMS",
                "measured": worst,
                "expected": _equilibrium(view),
                "expected_from": "AdamW's equilibrium √(2·lr·λ·(1-β₁)/(1+β₁)), where the run has weight decay",
                "threshold": threshold.value,
                "threshold_from": threshold.origin,
                "median_of_matrices": overall,
                "loss_fall": view.loss_fall,
                "matrices": len(names),
                "sampled_steps": int(late.sum()),
            },
            why="Steps that long overshoot: each undoes what the last one learned (arXiv:2305.17212).",
            remedy=rate_remedy(view, "Lower", float(np.nanmax(np.fmax(typical, 0.0))) / GOOD),
            remedy_2="Warm the learning rate up over more steps.",
            confidence="high" if late.sum() >= 3 else "low",
        )
    ]


def _blown_up(view: View, typical: Floats, matrices: Bools) -> list[Finding]:
    """Find first steps so long that the weights they left behind are several times as large as those that began."""
    grid = view.grid("parameters")
    weights = grid["weight_rms"][:, matrices]
    early = typical[:4]
    if not matrices.any() or not np.isfinite(early).any():
        return []
    growth = settled(weights) / np.fmax(weights[0], _natural(view)[matrices])
    grown = float(np.nanmedian(growth)) if np.isfinite(growth).any() else 1.0
    largest = float(np.nanmax(early))
    if largest < EARLY.value or grown < BLOWN_UP.value:
        return []
    names = np.array(grid.names)[matrices][np.argsort(-np.nan_to_num(growth), kind="stable")]
    return [
        Finding(
            code="update-too-large",
            severity="warning",
            where=unique(names.tolist()),
            steps=(int(grid.steps[0]), int(grid.steps[-1])),
            claim=(
                f"The first steps changed the median matrix by {number(largest)} of its size, and the weights have "
                f"grown {number(grown)} times since: what initialisation gave them is gone."
            ),
            evidence={
                "quantity": "update over weight, RMS, median over matrices, at its largest in the first steps",
                "measured": largest,
                "expected": _equilibrium(view),
                "expected_from": "AdamW's equilibrium √(2·lr·λ·(1-β₁)/(1+β₁)), where the run has weight decay",
                "threshold": EARLY.value,
                "threshold_from": EARLY.origin,
                "growth_of_weights": grown,
                "loss_fall": view.loss_fall,
                "sampled_steps": len(grid.steps),
            },
            why="Weights that large shrink every later step in proportion and saturate the rest (arXiv:2305.17212).",
            remedy=rate_remedy(view, "Lower", largest / GOOD),
            remedy_2="Warm the learning rate up from zero over some hundred steps.",
            confidence="high" if len(grid.steps) >= 5 else "low",
        )
    ]


def _natural(view: View) -> Floats:
    """RMS of a weight that keeps a signal's size, 1/√fan_in: one that began smaller has to grow, to no harm."""
    shapes = {p.name: p.shape for p in view.run.parameters}
    fans = [np.prod(shapes.get(name, ())[1:], dtype=np.float64) for name in view.grid("parameters").names]
    return np.asarray(1 / np.sqrt(np.fmax(fans, 1.0)))


def rate_remedy(view: View, verb: str, factor: float) -> str:
    """What to do with the learning rate, in numbers: `factor` times lower or higher, from its peak."""
    rate = view.series("learning_rate")
    peak = float(np.nanmax(rate)) if np.isfinite(rate).any() else 0.0
    aim = peak / factor if verb == "Lower" else peak * factor
    target = f", to about {aim:.0e} from {peak:.0e}" if aim > 0 else ""
    return f"{verb} the learning rate about {number(max(factor, 1.0))} times{target}."


def _typical(ratio: Floats, matrices: Bools) -> Floats:
    """Median update ratio over the matrices at each step."""
    return median(ratio[:, matrices].T) if matrices.any() else np.full(len(ratio), np.nan)


def _equilibrium(view: View) -> float | None:
    """Update ratio at which the first AdamW group would settle, None without one."""
    for optimizer in view.run.meta.get("optimizers") or []:
        for group in optimizer.get("groups", []):
            rate, decay = group.get("lr"), group.get("weight_decay")
            if rate and decay and "AdamW" in str(optimizer.get("class")):
                return theory.adamw_equilibrium_ratio(float(rate), float(decay))
    return None


def too_small(view: View) -> list[Finding]:
    """Find runs whose matrices hardly move while the loss does not fall."""
    grid = view.grid("parameters")
    matrices = matrices_of(view)
    if not matrices.any() or grid.steps[-1] < WARM * (2 if _warming(view) else 1):
        return []
    if view.loss_fall is None or view.falls(0.01):
        return []
    typical = _typical(grid["update_ratio"], matrices)
    late = grid.steps >= WARM
    known = np.isfinite(typical) & late
    small = known & (typical < SMALL.value) & (typical > 0)
    if not lasting(small[:, None], known[:, None], share=0.5, least=1.0)[0]:
        return []
    now = float(settled(typical[:, None])[0])
    ratio = settled(grid["update_ratio"])
    names = [grid.names[i] for i in np.flatnonzero(matrices & (ratio < SMALL.value))]
    return [
        Finding(
            code="update-too-small",
            severity="warning",
            where=unique(names),
            steps=spell(small, known, grid.steps),
            claim=(
                f"A step changes the median matrix by {number(now)} of its size, and the loss fell by "
                f"{view.loss_fall or 0.0:.1%} over the run: it hardly trains."
            ),
            evidence={
                "quantity": "update over weight, RMS, median over matrices",
                "measured": now,
                "expected": 1e-3,
                "expected_from": "rule of thumb for Adam and SGD alike",
                "threshold": SMALL.value,
                "threshold_from": SMALL.origin,
                "loss_fall": view.loss_fall,
                "matrices": len(names),
                "sampled_steps": int(known.sum()),
            },
            why="At that pace a weight needs over ten thousand steps to change at all.",
            remedy=rate_remedy(view, "Raise", GOOD / now),
            remedy_2="Check the schedule (an endless warm-up, a decay that ended), clipping, and loss reduction.",
            confidence="high" if known.sum() >= 3 else "low",
        )
    ]


def _warming(view: View) -> bool:
    """Whether the learning rate still rises."""
    rate = view.series("learning_rate")
    rate = rate[np.isfinite(rate)]
    return len(rate) > 1 and bool(rate[-1] > rate[len(rate) // 2])


TOO_LARGE: Rule = Rule(
    code="update-too-large",
    says="steps are too long for the weights",
    severities=("error", "warning"),
    criterion=(
        "From step 50 on: a matrix that changes by its own size at every step; or a median matrix above the threshold "
        "while the loss does not fall by 5 %; or first steps above the early threshold after which weights blew up."
    ),
    thresholds=(LARGE, REPLACED, EARLY, BLOWN_UP),
    source="Kosson et al. 2023, arXiv:2305.17212",
    picture="update-ratio",
    check=too_large,
)
TOO_SMALL: Rule = Rule(
    code="update-too-small",
    says="steps are too short for the weights",
    severities=("warning",),
    criterion=(
        "From step 50 on (100 while the learning rate rises), a median matrix under the threshold and a loss that fell "
        "by less than 1 %, or than twice its jitter from one sampled step to the next."
    ),
    thresholds=(SMALL,),
    source="Karpathy, A Recipe for Training Neural Networks, 2019",
    picture="update-ratio",
    check=too_small,
)
