"""`vanishing-gradient`: the gradient over depth, compared with what placement and depth predict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.depth import WEIGHT_LAYERS, YOUNG_FACTOR, Profile, ends, grave, profiles
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import number, unique
from gradflow.rules.view import lasting, median, spell

if TYPE_CHECKING:
    from gradflow.rules.view import Floats, View

VANISHED = Threshold(
    "vanishing-gradient.left", "gradient left at the first point, over theory", 1e-2, "1",
    "an eighth of what the worst healthy stack of 31 kept (0.08, post-norm, 12 blocks, before it left its plateau)",
)  # fmt: skip
VANISHED_ALIGNED = Threshold(
    "vanishing-gradient.left-aligned", "the same where tokens have become equal", 0.1, "1",
    "two signals agree: with token cosine above 0.99 the gradient of what tokens differ by has nowhere to go",
)  # fmt: skip
ALIGNED = 0.99


def both_ends(profile: Profile, first: int, last: int, *, largest: bool) -> Floats:
    """Gradient at the first over the last point at each step; of norm and per-element size, the one nearer to health.

    Where widths or resolutions change along the depth one of the two changes without anything being wrong.
    """
    total = profile.grad[:, first] / profile.grad[:, last]
    element = profile.grad_rms[:, first] / profile.grad_rms[:, last]
    return np.asarray(np.fmax(total, element) if largest else np.fmin(total, element))


def expected_loss(profile: Profile, first: int, last: int) -> Floats:
    """Gradient that theory leaves at the first point, 1 at the last, at each step.

    1 for plain stacks that keep their gradient, pre-norm streams (which gain) and linear or ReLU sublayers of post-norm
    ones; a post-norm attention sublayer keeps 1/√(1+ρ), ρ the token cosine that it reads.
    """
    if profile.placement != "post-norm":
        return np.ones(len(profile.steps))
    rho = np.clip(np.nan_to_num(profile.cosine[:, first:last]), 0.0, 1.0)
    gain = np.sqrt(theory.attention_gain_squared(rho))
    return np.asarray(np.prod(gain ** profile.attention_share(first, last), axis=1))


def _weight_layers(view: View, profile: Profile, first: int, last: int) -> int:
    """How many weight layers a plain stack passes between two points; 0 where norms or joins make the count moot."""
    if profile.kind == "stream":
        return 0
    grid = view.grid("layers")
    kinds = dict(zip(grid.names, grid.text("kind"), strict=True))
    if any("norm" in kind.lower() for kind in kinds.values()):
        return 0
    return sum(bool(WEIGHT_LAYERS.search(kinds.get(point, ""))) for point in profile.points[first + 1 : last + 1])


def _initialisation(view: View, profile: Profile, first: int, last: int) -> str | None:
    """The wrong initialisation that the gain a layer at the first sampled step gives away, or None."""
    layers = _weight_layers(view, profile, first, last)
    if layers < 3 or not len(profile.steps) or profile.steps[0] > 1:
        return None
    ratio = profile.grad_rms[0, first] / profile.grad_rms[0, last]
    name = theory.initialisation_of(float(ratio ** (2 / layers))) if ratio > 0 else None
    return None if name == theory.KNOWN_GAINS[0][0] else name


def losses(profile: Profile, first: int, last: int) -> Floats:
    """Natural logarithm of the gradient's change at each step of depth, going back, medians over the end of the run."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.log(profile.grad[:, first:last]) - np.log(profile.grad[:, first + 1 : last + 1])
    gains[~np.isfinite(gains)] = np.nan
    return np.nan_to_num(median(gains[profile.recent]))


def places(profile: Profile, first: int, change: Floats) -> tuple[str, ...]:
    """Where it happens: the few points that carry over half of the change, else the stack from its first point on.

    `change` is the logarithm at each step of depth, positive in the direction of the sickness.
    """
    order = np.argsort(-change)
    carried = np.cumsum(change[order]) / max(change.sum(), 1e-12)
    few = order[: int(np.argmax(carried > 0.5)) + 1]
    if len(few) <= max(1, len(change) // 6):
        return unique(name for step in few for name in profile.names(first + 1 + int(step)))
    points = range(first + (1 if profile.joins[first + 1] else 0), first + 1 + len(change))
    return unique(name for point in points for name in profile.names(point))


def vanishing(view: View) -> list[Finding]:
    """Find streams and trunks in which the gradient dies on its way to the input."""
    return [finding for profile in profiles(view) if (finding := _vanishing(view, profile)) is not None]


def _vanishing(view: View, profile: Profile) -> Finding | None:
    span = ends(profile.grad[profile.recent])
    if span is None:
        return None
    first, last = span
    with np.errstate(divide="ignore", invalid="ignore"):
        left = both_ends(profile, first, last, largest=True)
    expected = expected_loss(profile, first, last)
    middle = (first + last) // 2
    aligned = np.nan_to_num(np.nanmax(profile.cosine[:, middle : last + 1], axis=1, initial=0.0)) > ALIGNED
    limit = np.where(aligned, VANISHED_ALIGNED.value, VANISHED.value)
    known = np.isfinite(left)
    mask = known & (left < limit * expected)
    if not lasting(mask[:, None], known[:, None])[0]:
        return None
    recent = profile.recent
    now, theirs = float(median(left[recent])), float(median(expected[recent]))
    allowed = float(limit[recent][-1])
    samples = int(known[recent].sum())
    init = _initialisation(view, profile, first, last)
    gain = now ** (1 / (last - first))
    blame = f", the signature of {init}" if init else ""
    remedy, second = _remedies(view, profile, init)
    return Finding(
        code="vanishing-gradient",
        severity=grave(
            view,
            "error" if now < 0.1 * allowed * theirs and samples >= 2 else "warning",
            certain=now < YOUNG_FACTOR * allowed * theirs,
        ),
        where=places(profile, first, -losses(profile, first, last)),
        steps=spell(mask, known, profile.steps),
        claim=(
            f"Of the gradient at {profile.points[last]}, {number(now)} is left at {profile.points[first]}, "
            f"{last - first} points nearer to the input (theory: {number(theirs)} for this placement); each point "
            f"keeps {number(gain)} of it on average{blame}."
        ),
        evidence={
            "quantity": "gradient norm at the first point over that at the last",
            "stream": profile.name,
            "measured": now,
            "expected": theirs,
            "expected_from": _origin_of_loss(profile),
            "threshold": allowed * theirs,
            "threshold_from": (VANISHED_ALIGNED if aligned[recent][-1] else VANISHED).origin,
            "gain_per_point": gain,
            "first_point": profile.points[first],
            "last_point": profile.points[last],
            "points": last - first + 1,
            "initialisation": init,
            "sampled_steps": samples,
        },
        why=(
            "Weights near the input get a gradient that is lost in noise and epsilon, so they stay as they were drawn "
            "and the layers above learn on random features (Glorot & Bengio 2010; Pascanu et al. 2013, "
            "arXiv:1211.5063)."
        ),
        remedy=remedy,
        remedy_2=second,
        confidence="high" if samples >= 3 else "low",
    )


def _origin_of_loss(profile: Profile) -> str:
    if profile.placement == "post-norm":
        return "a post-norm attention sublayer keeps 1/√(1+ρ) at token cosine ρ, others keep 1"
    return {
        "pre-norm": "pre-norm gradients grow towards the input, √((L+1)/(l+1))",
        "none": "a skip connection passes the whole gradient: gain² = 1 + b",
        "plain": "a well initialised stack keeps its gradient (He 2015)",
    }[profile.placement]


def activations(view: View) -> set[str]:
    """Lower-case kinds of every layer of the model."""
    return {kind.lower() for kind in view.grid("layers").text("kind")}


def _remedies(view: View, profile: Profile, init: str | None) -> tuple[str, str]:
    """First and second thing to try, by what the stack is made of."""
    residual = "Add a residual connection around each block: x = x + block(norm(x))."
    if profile.placement == "post-norm":
        return (
            "Move the norm to the branch's input (pre-norm: x + f(norm(x))), with one final norm.",
            (
                "Keep post-norm and warm the learning rate up over 10 times as many steps, or scale as DeepNorm does "
                "(arXiv:2203.00555)."
            ),
        )
    if profile.kind == "stream":
        return (
            "Let the skip pass unchanged: look for a gain, dropout or norm on it that is below 1.",
            "Use pre-norm blocks, x + f(norm(x)).",
        )
    if activations(view) & {"sigmoid", "logsigmoid", "hardsigmoid"}:
        return "Replace the sigmoids inside the stack by ReLU or GELU with He initialisation.", residual
    if init:
        return (
            (
                "Initialise the stack's weights with torch.nn.init.kaiming_normal_(w, nonlinearity='relu') and zero "
                "biases."
            ),
            residual,
        )
    return residual, "Initialise for unit gain (He for ReLU, gain 5/3 for tanh) and add a norm to each block."


VANISHING: Rule = Rule(
    code="vanishing-gradient",
    says="the gradient dies on its way to the input",
    severities=("error", "warning", "info"),
    criterion=(
        "Gradient at the first point of a stream or trunk over that at the last, in norm and per element, below the "
        "threshold times what placement and depth predict, over the last third of the sampled steps; before step 30 a "
        "hundred times worse, else info."
    ),
    thresholds=(VANISHED, VANISHED_ALIGNED),
    source="Glorot & Bengio 2010; He et al. 2015, arXiv:1502.01852; post-norm attention: gain² = 1/(1+ρ), derived",
    picture="gradient-depth",
    check=vanishing,
)
