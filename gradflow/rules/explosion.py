"""`exploding-gradient` over depth and over time, and `gradient-spike`: the global norm against its own past."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.depth import Profile, ends, profiles
from gradflow.rules.gradients import activations, both_ends, losses, places
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import number
from gradflow.rules.view import lasting, median, spell

if TYPE_CHECKING:
    from gradflow.rules.view import Floats, View

EXPLODED = Threshold(
    "exploding-gradient.depth", "gradient at the first point over the last, over theory", 100.0, "1",
    "healthy plain stacks with norms reach 9, pre-norm ones stay within a factor 3 of theory",
)  # fmt: skip
OUTGROWN = Threshold(
    "exploding-gradient.time", "global gradient norm over the running median of its past", 100.0, "1",
    "healthy runs stay within a factor 10 of it once warm; sustained, and with a loss that got worse",
)  # fmt: skip
SPIKE = Threshold(
    "gradient-spike.ratio",
    "the same at a single step, then back",
    20.0,
    "1",
    "10 alarms on healthy first steps; twice that does not",
)
FIRST_STEPS = 8
"""Steps within which norms over a stream that began small, whose slope is one over its size, give way by themselves."""
JUMP = 3.0
"""Times its median that an update may be: clipping at twice the usual norm allows twice."""
DAMPED = 0.6
"""Part of its median that updates after a spike keep; less says that it filled Adam's second moment."""
UNHARMED = 0.2
"""Rise of the loss after a spike, over its level before, that is within noise."""
PAST = 20
"""Sampled steps that a running median looks back on."""


def expected_growth(profile: Profile, first: int, last: int) -> Floats:
    """Gradient that theory predicts at the first point, 1 at the last, at each step: √(v_L/v_0) in a pre-norm stream.

    Elsewhere only the first step may rescale (a small embedding that a norm blows up by design).
    """
    until = last if profile.placement == "pre-norm" else first + 1
    growth = profile.rms[:, until] / np.where(profile.rms[:, first] > 0, profile.rms[:, first], np.nan)
    return np.asarray(np.fmax(np.nan_to_num(growth, nan=1.0), 1.0))


def exploding(view: View) -> list[Finding]:
    """Find streams in which the gradient grows beyond theory towards the input, and runs in which it grew with time."""
    deep = [finding for profile in profiles(view) if (finding := _exploding(view, profile)) is not None]
    return deep + _in_time(view)


def _exploding(view: View, profile: Profile) -> Finding | None:
    span = ends(profile.grad[profile.recent])
    if span is None:
        return None
    first, last = span
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = both_ends(profile, first, last, largest=False)
    expected = expected_growth(profile, first, last)
    known = np.isfinite(grown)
    mask = known & (grown > EXPLODED.value * expected)
    if not lasting(mask[:, None], known[:, None])[0]:
        return None
    recent = profile.recent
    now, theirs = float(median(grown[recent])), float(median(expected[recent]))
    samples = int(known[recent].sum())
    gain = now ** (1 / (last - first))
    return Finding(
        code="exploding-gradient",
        severity=(
            "info" if view.steps[-1] < FIRST_STEPS
            else "error" if now > 100 * EXPLODED.value * theirs
            else "warning"
        ),
        where=places(profile, first, losses(profile, first, last)),
        steps=spell(mask, known, profile.steps),
        claim=(
            f"The gradient at {profile.points[first]} is {number(now)} times that at {profile.points[last]}, "
            f"{last - first} points nearer to the loss (theory: {number(theirs)}); each point multiplies it by "
            f"{number(gain)} on average."
        ),
        evidence={
            "quantity": "gradient norm at the first point over that at the last",
            "stream": profile.name,
            "measured": now,
            "expected": theirs,
            "expected_from": "√(Var x_L/Var x_0) in a pre-norm stream, 1 elsewhere",
            "threshold": EXPLODED.value * theirs,
            "threshold_from": EXPLODED.origin,
            "gain_per_point": gain,
            "first_point": profile.points[first],
            "last_point": profile.points[last],
            "points": last - first + 1,
            "sampled_steps": samples,
        },
        why=(
            "Weights near the input take steps that are far too long for the rest; one learning rate cannot serve both "
            "ends, and training diverges or crawls (Pascanu et al. 2013, arXiv:1211.5063)."
        ),
        remedy=_tame(view, profile),
        remedy_2="Clip the gradient's norm at 1.0 and warm the learning rate up; that treats the symptom.",
        confidence="high" if samples >= 3 else "low",
    )


def _tame(view: View, profile: Profile) -> str:
    """First remedy of an exploding gradient, by what the stack is made of."""
    if profile.kind == "stream":
        return "Normalise each branch's input (x + f(norm(x))) or scale each branch by 1/√L (arXiv:2206.03126)."
    if any("batchnorm" in kind for kind in activations(view)):
        return (
            "Add residual connections: a plain stack of batch norm and ReLU multiplies the gradient by 1.21 a layer at "
            "any initialisation (arXiv:1902.08129)."
        )
    return "Initialise for unit gain: torch.nn.init.kaiming_normal_ for ReLU, orthogonal_ with gain 5/3 for tanh."


def running_median(values: Floats, past: int = PAST) -> Floats:
    """Median of up to `past` known values before each one; NaN with fewer than three."""
    result = np.full(len(values), np.nan)
    for i in range(len(values)):
        before = values[max(0, i - past) : i]
        before = before[np.isfinite(before)]
        if len(before) >= 3:
            result[i] = np.median(before)
    return result


def _risen(view: View, begin: int, end: int) -> tuple[str, ...]:
    """Parameters whose gradient rose most between the sampled steps before `begin` and those of [begin, end]."""
    grid = view.grid("parameters")
    size = np.sqrt(grid["grad_sq"])
    inside = (grid.steps >= begin) & (grid.steps <= end)
    growth = median(size[inside]) / median(size[grid.steps < begin])
    order = np.argsort(-np.nan_to_num(growth, posinf=0.0), kind="stable")
    return tuple(grid.names[i] for i in order[:3] if np.isfinite(growth[i]) and growth[i] > 1) or ("loss",)


def _in_time(view: View) -> list[Finding]:
    """Find a global norm that left its past behind, several steps long or right before the run went non-finite."""
    norm, loss = view.series("grad_norm"), view.series("loss")
    known = np.isfinite(norm)
    if known.sum() < 4:
        return []
    outgrown = np.zeros(len(norm), dtype=bool)
    base = np.nan
    for i, usual in enumerate(running_median(norm)):
        base = base if outgrown[:i].any() and norm[i] > OUTGROWN.value * base else usual
        outgrown[i] = known[i] and norm[i] > OUTGROWN.value * base
    tail = np.flatnonzero(known)[-3:] if view.until is None else np.flatnonzero(known)[-1:]
    if not outgrown[tail].all():
        return []
    steps = spell(outgrown, known, view.steps)
    inside = view.steps >= steps[0]
    worse = float(median(loss[inside])) > float(median(loss[~inside]))
    if not worse and view.until is None:
        return []
    usual, peak = float(median(norm[~inside])), float(np.nanmax(norm[inside]))
    return [
        Finding(
            code="exploding-gradient",
            severity="error",
            where=_risen(view, *steps),
            steps=steps,
            claim=(
                f"The global gradient norm rose to {number(peak)} from step {steps[0]} on, {number(peak / usual)} "
                f"times its usual {number(usual)}, and did not come back{' while the loss got worse' if worse else ''}."
            ),
            evidence={
                "quantity": "global gradient norm",
                "measured": peak,
                "expected": usual,
                "expected_from": "median over the sampled steps before",
                "threshold": OUTGROWN.value * usual,
                "threshold_from": OUTGROWN.origin,
                "loss_before": float(median(loss[~inside])),
                "loss_since": float(median(loss[inside])),
                "sampled_steps": int(inside.sum()),
            },
            why=(
                "Updates of that size leave the region where the gradient means anything; the run diverges "
                "(Pascanu et al. 2013, arXiv:1211.5063)."
            ),
            remedy="Lower the peak learning rate by a factor of 3 to 10.",
            remedy_2="Warm the learning rate up over more steps and clip the gradient's norm at 1.0.",
            confidence="high" if inside.sum() >= 3 else "low",
        )
    ]


def _tamed(view: View, at: int) -> bool:
    """Whether a spike left no trace: that step's update, and updates and losses after it, as usual (clipping)."""
    grid = view.grid("parameters")
    sizes = dict(zip(grid.steps.tolist(), np.sqrt(np.nansum(grid["update_sq"], axis=1)).tolist(), strict=True))
    update = np.array([sizes.get(step, np.nan) for step in view.steps.tolist()]) / view.series("learning_rate")
    loss, after = view.series("loss"), slice(at + 1, at + 4)
    then = float(median(update[after]))
    usual = float(np.fmin(running_median(update)[at], running_median(update, past=5)[at]))
    level = float(running_median(loss)[at])
    recovered = float(median(loss[after])) < level + UNHARMED * abs(level)
    return usual > 0 and float(update[at]) < JUMP * usual and then > DAMPED * usual and recovered


def spikes(view: View) -> list[Finding]:
    """Find single steps whose global norm stands far out of what came before and of the start of training."""
    norm, loss = view.series("grad_norm"), view.series("loss")
    usual = running_median(norm)
    start = float(median(norm[:5]))
    with np.errstate(invalid="ignore"):
        high = (norm > SPIKE.value * usual) & (norm > start) & (view.steps >= 10)
    lone = [i for i in np.flatnonzero(high[:-1]) if np.nanmin(norm[i + 1 : i + 4], initial=np.inf) < 0.2 * norm[i]]
    if not lone:
        return []
    harmful = [i for i in lone if not _tamed(view, int(i))]
    worst = max(harmful or lone, key=lambda i: float(norm[i] / usual[i]))
    times = float(norm[worst] / usual[worst])
    lifted = float(loss[worst]) > 1.5 * float(median(loss[max(0, worst - 3) : worst]))
    return [
        Finding(
            code="gradient-spike",
            severity="warning" if harmful and (lifted or times > 5 * SPIKE.value) else "info",
            where=_risen(view, int(view.steps[worst]), int(view.steps[worst])),
            steps=(int(view.steps[lone[0]]), int(view.steps[lone[-1]])),
            claim=(
                f"At step {int(view.steps[worst])} the global gradient norm was {number(float(norm[worst]))}, "
                f"{number(times)} times the median before, and came back soon after"
                f"{'; the loss jumped with it' if lifted else ''}"
                f"{'; the updates did not: clipping held it' if not harmful else ''}."
            ),
            evidence={
                "quantity": "global gradient norm over its running median",
                "measured": times,
                "expected": 1.0,
                "expected_from": f"median of the {PAST} sampled steps before",
                "threshold": SPIKE.value,
                "threshold_from": SPIKE.origin,
                "spikes": len(lone),
                "steps": [int(view.steps[i]) for i in lone[:20]],
            },
            why=(
                "One such step undoes many good ones and fills Adam's second moment, which then holds the learning "
                "rate down for 1/(1-β₂) steps (Takase et al. 2023, arXiv:2312.16903)."
            ),
            remedy=f"Clip the gradient's norm at {number(2 * float(usual[worst]))}, twice its median.",
            remedy_2="Look at the batch of that step; filter broken or mislabelled samples.",
            confidence="low" if len(lone) == 1 else "high",
        )
    ]


EXPLODING: Rule = Rule(
    code="exploding-gradient",
    says="the gradient grows on its way to the input, or with time",
    severities=("error", "warning", "info"),
    criterion=(
        "Gradient at the first point of a stream or trunk over that at the last above the threshold times theory over "
        "the last third of the sampled steps (before step 8: info); or the global norm far above its running median "
        "for three sampled steps or up to the first non-finite one, with a worse loss."
    ),
    thresholds=(EXPLODED, OUTGROWN),
    source="Pascanu et al. 2013, arXiv:1211.5063; Yang et al. 2019, arXiv:1902.08129",
    picture="gradient-depth",
    check=exploding,
)
SPIKES: Rule = Rule(
    code="gradient-spike",
    says="single steps stand far out",
    severities=("warning", "info"),
    criterion=(
        "From step 10 on, a global norm above the threshold times the median of the 20 sampled steps before and "
        "above that of the first steps, back to a fifth within three sampled steps; a warning if the loss jumped too, "
        "or at five times the threshold; info if updates and losses show no trace of it."
    ),
    thresholds=(SPIKE,),
    source="Takase et al. 2023, Spike No More, arXiv:2312.16903",
    picture="grad-norm",
    check=spikes,
)
