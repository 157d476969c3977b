"""What the optimizer makes of gradients: `update-too-large` and `-small`, `below-epsilon`, `gradient-underflow`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import listed, number, unique
from gradflow.rules.view import lasting, median, settled, spell, window

if TYPE_CHECKING:
    from gradflow.rules.view import Bools, Floats, View

LARGE = Threshold(
    "update over weight, median over matrices", 0.1, "1", "healthy small models stay under 0.05 once warm"
)
REPLACED = Threshold("update over weight of one matrix", 1.0, "1", "every step replaces the weights")
SMALL = Threshold("update over weight, median over matrices", 1e-5, "1", "a per cent in a thousand aligned steps")
EPSILON = Threshold("gradient RMS over the optimizer's eps", 1.0, "1", "Adam's step is halved where √v equals eps")
UNDERFLOW = Threshold("exact zeros in a weight gradient", 0.5, "1", "dense weights have none unless units are dead")
FP16_SMALLEST = 2.0**-24
"""Smallest positive half-precision number, 6e-8: anything under half of it becomes 0."""
WARM = 50
"""Steps before which updates are judged by nothing: warm-up, Adam's first steps."""
ALIVE = 1e-3
"""Weight RMS under which a matrix counts as started at zero: its first updates exceed it by design."""


def _matrices(view: View) -> Bools:
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
    matrices = _matrices(view)
    ratio = grid["update_ratio"]
    late = grid.steps >= WARM
    known = np.isfinite(ratio) & late[:, None] & matrices
    replaced = np.flatnonzero(lasting(known & (ratio > REPLACED.value), known) & (known.sum(axis=0) >= 3))
    typical = _typical(ratio, matrices)
    large = np.isfinite(typical) & late & (typical > LARGE.value)
    stuck = view.loss_fall is not None and view.loss_fall < 0.05
    everywhere = stuck and bool(lasting(large[:, None], (np.isfinite(typical) & late)[:, None])[0])
    if not everywhere and not len(replaced):
        return []
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
            remedy="Lower the learning rate by a factor of 3 to 10.",
            remedy_2="Warm the learning rate up over more steps.",
            confidence="high" if late.sum() >= 3 else "low",
        )
    ]


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
    matrices = _matrices(view)
    if not matrices.any() or grid.steps[-1] < 2 * WARM or view.loss_fall is None or view.loss_fall > 0.01:
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
                f"{view.loss_fall:.1%} over the run: it hardly trains."
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
            remedy="Raise the learning rate by a factor of 10, up to where the loss falls.",
            remedy_2="Check the schedule (an endless warm-up, a decay that ended), clipping, and loss reduction.",
            confidence="high" if known.sum() >= 3 else "low",
        )
    ]


def below_epsilon(view: View) -> list[Finding]:
    """Find Adam runs in which eps outweighs the gradient of most weights."""
    eps = _adam_eps(view)
    grid = view.grid("parameters")
    matrices = _matrices(view)
    loss = view.series("loss")
    if eps is None or not matrices.any() or _learned(loss):
        return []
    rms = grid["grad_rms"]
    known = np.isfinite(rms) & (rms > 0) & matrices
    bad = lasting(known & (rms < EPSILON.value * eps), known)
    size = np.nan_to_num(grid["n"].max(axis=0, initial=0.0, where=np.isfinite(grid["n"])))
    share = float(size[bad].sum() / max(1.0, size[matrices].sum()))
    if share <= 0.5 or known[window(len(rms))].any(axis=1).sum() < 3:
        return []
    names = [grid.names[i] for i in np.flatnonzero(bad)]
    typical = float(np.nanmedian(settled(rms)[bad]))
    return [
        Finding(
            code="below-epsilon",
            severity="warning",
            where=unique(names),
            steps=(int(grid.steps[window(len(rms))][0]), int(grid.steps[-1])),
            claim=(
                f"The gradient of {share:.0%} of the matrices' weights has an RMS of {number(typical)}, under Adam's "
                f"eps of {number(eps)}: their steps are a fraction of the learning rate."
            ),
            evidence={
                "quantity": "gradient RMS of the matrices below eps, median",
                "measured": typical,
                "expected": f"well above eps = {eps:g}",
                "expected_from": "Adam's step is lr·m/(√v + eps)",
                "threshold": EPSILON.value * eps,
                "threshold_from": EPSILON.origin,
                "share_of_weights": share,
                "sampled_steps": int(known.any(axis=1).sum()),
            },
            why="Adam loses its scale-free step there and becomes SGD with a tiny rate (Kingma & Ba 2015, section 2).",
            remedy="Lower the optimizer's eps a thousandfold (1e-11), or sum the loss over fewer terms.",
            remedy_2="Find what shrinks the gradient: a loss divided twice, or a vanishing-gradient finding.",
            confidence="high",
        )
    ]


def _learned(loss: Floats) -> bool:
    """Whether the loss fell to a hundredth: small gradients are then what success looks like."""
    loss = loss[np.isfinite(loss)]
    return len(loss) >= 4 and float(np.median(loss[-3:])) < 0.01 * float(np.max(loss[:3]))


def _adam_eps(view: View) -> float | None:
    for optimizer in view.run.meta.get("optimizers") or []:
        for group in optimizer.get("groups", []):
            if "adam" in str(optimizer.get("class")).lower() and group.get("eps"):
                return float(group["eps"])
    return None


def underflow(view: View) -> list[Finding]:
    """Find half-precision runs without loss scaling whose weight gradients are mostly exact zeros."""
    precision = str(view.run.meta.get("precision") or "")
    halves = {p.name for p in view.run.parameters if p.dtype.endswith("float16") and "bfloat16" not in p.dtype}
    if ("16" not in precision or "bf16" in precision) and not halves:
        return []
    grid = view.grid("parameters")
    matrices = _matrices(view)
    n = np.where(grid["n"] > 0, grid["n"], np.nan)
    zeros, largest = grid["grad_zeros"] / n, grid["grad_max"]
    known = np.isfinite(zeros) & np.isfinite(largest) & matrices
    bad = lasting(known & (zeros > UNDERFLOW.value) & (largest < 1000 * FP16_SMALLEST), known)
    if not bad.any():
        return []
    now = settled(zeros)
    found = np.flatnonzero(bad)
    found = found[np.argsort(-now[found], kind="stable")]
    names = [grid.names[i] for i in found]
    scale = view.series("loss_scale")
    return [
        Finding(
            code="gradient-underflow",
            severity="error" if 2 * len(found) > matrices.sum() else "warning",
            where=unique(names),
            steps=(int(grid.steps[window(len(zeros))][0]), int(grid.steps[-1])),
            claim=(
                f"{now[found[0]]:.0%} of the gradient of {names[0]} is exactly zero in half precision"
                f"{f', and likewise in {listed(names[1:])}' if len(names) > 1 else ''}: it is smaller than float16 "
                "can hold."
            ),
            evidence={
                "quantity": "share of exact zeros in a weight's gradient",
                "measured": float(now[found[0]]),
                "expected": 0.0,
                "expected_from": "a dense weight's gradient in float32",
                "threshold": UNDERFLOW.value,
                "threshold_from": UNDERFLOW.origin,
                "largest_gradient": float(settled(largest)[found[0]]),
                "smallest_float16": FP16_SMALLEST,
                "loss_scale": float(median(scale)) if np.isfinite(scale).any() else None,
                "parameters": len(names),
            },
            why="Weights whose gradient rounds to zero do not train (Micikevicius et al. 2018, arXiv:1710.03740).",
            remedy="Scale the loss with torch.amp.GradScaler (precision='16-mixed' in Lightning).",
            remedy_2="Use bf16, which has float32's range.",
            confidence="high",
        )
    ]


TOO_LARGE: Rule = Rule(
    code="update-too-large",
    says="steps are too long for the weights",
    severities=("error", "warning"),
    criterion=(
        "From step 50 on: a matrix that changes by its own size at every step; or a median matrix above the threshold "
        "while the loss does not fall by 5 %."
    ),
    thresholds=(LARGE, REPLACED),
    source="Kosson et al. 2023, arXiv:2305.17212",
    check=too_large,
)
TOO_SMALL: Rule = Rule(
    code="update-too-small",
    says="steps are too short for the weights",
    severities=("warning",),
    criterion="From step 50 on, a median matrix under the threshold and a loss that fell by less than 1 %.",
    thresholds=(SMALL,),
    source="Karpathy, A Recipe for Training Neural Networks, 2019",
    check=too_small,
)
BELOW_EPSILON: Rule = Rule(
    code="below-epsilon",
    says="Adam's epsilon swallows the update",
    severities=("warning",),
    criterion="Gradient RMS under eps for over half of the matrices' weights, unless the loss fell to a hundredth.",
    thresholds=(EPSILON,),
    source="Kingma & Ba 2015, arXiv:1412.6980",
    check=below_epsilon,
)
UNDERFLOWS: Rule = Rule(
    code="gradient-underflow",
    says="gradients vanish in half precision",
    severities=("error", "warning"),
    criterion=(
        "In float16 (not bfloat16), over half of a matrix's gradient exactly zero and the largest element within a "
        "thousand of float16's smallest number."
    ),
    thresholds=(UNDERFLOW,),
    source="Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740",
    check=underflow,
)
