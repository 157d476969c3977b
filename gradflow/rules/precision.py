"""`below-epsilon` and `gradient-underflow`: gradients too small for the optimizer or for the number format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import listed, number, unique
from gradflow.rules.updates import matrices_of
from gradflow.rules.view import half_precision, lasting, median, settled, window

if TYPE_CHECKING:
    from gradflow.rules.view import Floats, View

EPSILON = Threshold(
    "below-epsilon.ratio",
    "gradient RMS over the optimizer's eps",
    1.0,
    "1",
    "Adam's step is halved where √v equals eps",
)
UNDERFLOW = Threshold(
    "gradient-underflow.zeros",
    "exact zeros in a weight gradient",
    0.5,
    "1",
    "dense weights have none unless units are dead",
)
FP16_SMALLEST = 2.0**-24
"""Smallest positive half-precision number, 6e-8: anything under half of it becomes 0."""


FP16_ROOMY = 2.0**8
"""Where to scale the largest gradient to: a 256th of float16's largest number is left for batches to come."""
DEFAULT_SCALE = 16
"""Logarithm to base 2 of what GradScaler starts with."""


def below_epsilon(view: View) -> list[Finding]:
    """Find Adam runs in which eps outweighs the gradient of most weights."""
    eps = _adam_eps(view)
    grid = view.grid("parameters")
    matrices = matrices_of(view)
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
            remedy=f"Lower the optimizer's eps to {_power(0.01 * typical):.0e}, a hundredth of that gradient or less.",
            remedy_2="Find what shrinks the gradient: a loss divided twice, or a vanishing-gradient finding.",
            confidence="high",
        )
    ]


def _power(value: float) -> float:
    """The power of ten at or below a value, within what float32 holds."""
    return float(10.0 ** np.floor(np.log10(max(value, 1e-30))))


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
    """Find half-precision runs whose weight gradients are mostly exact zeros, for want of a large enough loss scale."""
    if not half_precision(view):
        return []
    grid = view.grid("parameters")
    matrices = matrices_of(view)
    n = np.where(grid["n"] > 0, grid["n"], np.nan)
    zeros, largest = grid["grad_zeros"] / n, grid["grad_max"]
    known = np.isfinite(zeros) & np.isfinite(largest) & matrices
    scale = np.nan_to_num(view.series("loss_scale"), nan=1.0)[np.searchsorted(view.steps, grid.steps)]
    bad = lasting(known & (zeros > UNDERFLOW.value) & (largest * scale[:, None] < 1000 * FP16_SMALLEST), known)
    if not bad.any():
        return []
    now = settled(zeros)
    found = np.flatnonzero(bad)
    found = found[np.argsort(-now[found], kind="stable")]
    names = [grid.names[i] for i in found]
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
                "loss_scale": float(median(scale)),
                "parameters": len(names),
            },
            why="Weights whose gradient rounds to zero do not train (Micikevicius et al. 2018, arXiv:1710.03740).",
            remedy=_scaler(float(np.nanmax(settled(largest), initial=0.0)), float(median(scale))),
            remedy_2="Use bf16, which has float32's range.",
            confidence="high",
        )
    ]


def _scaler(largest: float, scale: float) -> str:
    """What to scale the loss by: so that the model's largest gradient comes near the upper end of half precision."""
    power = int(np.floor(np.log2(FP16_ROOMY / largest))) if largest > 0 else DEFAULT_SCALE
    if scale > 1:
        return f"Raise the GradScaler's init_scale to 2.0**{max(power, int(np.log2(scale)) + 1)}, from {scale:g}."
    start = f"init_scale=2.0**{power}" if power > DEFAULT_SCALE else ""
    return f"Scale the loss with torch.amp.GradScaler({start}) (precision='16-mixed' in Lightning)."


BELOW_EPSILON: Rule = Rule(
    code="below-epsilon",
    says="Adam's epsilon swallows the update",
    severities=("warning",),
    criterion="Gradient RMS under eps for over half of the matrices' weights, unless the loss fell to a hundredth.",
    thresholds=(EPSILON,),
    source="Kingma & Ba 2015, arXiv:1412.6980",
    picture="update-ratio",
    check=below_epsilon,
)
UNDERFLOWS: Rule = Rule(
    code="gradient-underflow",
    says="gradients vanish in half precision",
    severities=("error", "warning"),
    criterion=(
        "In float16 (not bfloat16), over half of a matrix's gradient exactly zero and the largest element, times the "
        "loss scale, within a thousand of float16's smallest number."
    ),
    thresholds=(UNDERFLOW,),
    source="Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740",
    picture="update-ratio",
    check=underflow,
)
