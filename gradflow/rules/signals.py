"""`signal-explosion` and `signal-collapse`: the size of the signal over depth, against what each kind of stack does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.depth import WEIGHT_LAYERS, YOUNG_FACTOR, Profile, grave, profiles
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import number, unique
from gradflow.rules.view import lasting, median, spell

if TYPE_CHECKING:
    from gradflow.rules.view import Floats, View

LEAST_DEPTH = 6
GROWTH = Threshold(
    "signal-explosion.growth", "growth of the variance a point, in the deeper half", 0.2, "nat",
    "between pre-norm's ln((l+1)/l), which falls with depth, and ln 2 of an un-normalised residual stack",
)  # fmt: skip
TOTAL_GROWTH = Threshold(
    "signal-explosion.total",
    "growth of the variance over the whole depth",
    50.0,
    "1",
    "a pre-norm stream of 24 joins reaches 25 (1 + L)",
)
TOTAL_GROWTH_NORMED = Threshold(
    "signal-explosion.total-normed", "the same in a pre-norm stream that began sound", 1e4, "1",
    "trained pre-norm models with small embeddings grow by hundreds, late layers adding most",
)  # fmt: skip
SHRINK = Threshold(
    "signal-collapse.gain",
    "gain of the variance a layer",
    0.9,
    "1",
    "He initialisation gives 1; the usual wrong ones 1/2 and 1/6",
)
TOTAL_SHRINK = Threshold(
    "signal-collapse.total",
    "variance left after the whole depth",
    1e-2,
    "1",
    "a tenth of the amplitude: below it biases outweigh the signal",
)
OUTGROWN = Threshold(
    "signal-explosion.time",
    "growth of the stream's size since the first step",
    100.0,
    "1",
    "healthy streams grow 2 to 10 times",
)


def prenorm_deep_growth(joins: int) -> float:
    """Growth of the variance a join over the deeper half of a pre-norm stream of unit branches, in nat."""
    half = joins // 2
    return math.log((joins + 1) / (joins - half + 1)) / max(1, half)


def _log_variance(rms: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = 2.0 * np.log(rms)
    logs[~np.isfinite(logs)] = np.nan
    return logs


def explosion(view: View) -> list[Finding]:
    """Find streams whose variance grows exponentially with depth, or keeps growing with time."""
    found = []
    for profile in profiles(view):
        finding = _grows_with_depth(view, profile) or _grows_with_time(view, profile)
        if finding is not None:
            found.append(finding)
    return found


def _grows_with_depth(view: View, profile: Profile) -> Finding | None:
    logs = _log_variance(profile.rms)
    points = np.flatnonzero(np.isfinite(logs).any(axis=0))
    if profile.kind != "stream":
        points = np.intersect1d(points, _weighted(view, profile))
    if len(points) < LEAST_DEPTH + 1:
        return None
    logs = logs[:, points]
    joins = len(points) - 1
    middle = joins - joins // 2
    limit = max(GROWTH.value, 2 * prenorm_deep_growth(joins))
    deep = np.diff(logs[:, middle:], axis=1)
    typical = median(deep.T)
    mean = (logs[:, -1] - logs[:, middle]) / (joins - middle)
    total = logs[:, -1] - logs[:, 1]
    known = np.isfinite(total) & np.isfinite(mean)
    mask = known & (np.fmin(mean, typical) > limit) & (total > math.log(TOTAL_GROWTH.value))
    if profile.placement == "pre-norm" and not (len(mask) and mask[0]):
        # Branches that read a norm cannot compound: only weights that training itself grew make it look like this.
        mask &= total > math.log(TOTAL_GROWTH_NORMED.value)
    if not lasting(mask[:, None], known[:, None])[0]:
        return None
    recent = profile.recent
    rate, grown = float(median(mean[recent])), float(median(total[recent]))
    steepest = np.argsort(-np.nan_to_num(median(np.diff(logs[recent], axis=1))))
    stream = profile.kind == "stream"
    doubling = abs(rate - math.log(2)) < 0.1
    return Finding(
        code="signal-explosion",
        severity="error" if grown > math.log(1e6) else "warning",
        where=unique(name for step in steepest for name in profile.names(int(points[step + 1]))),
        steps=spell(mask, known, profile.steps),
        claim=(
            f"The signal's variance grows by {number(rate)} nat a {'join' if stream else 'layer'} in the deeper half "
            f"of {profile.name}, {number(math.exp(min(grown, 700.0)))} times over {joins} of them: exponentially with "
            f"depth{', doubling as un-normalised residual branches of unit gain do' if doubling else ''}."
        ),
        evidence={
            "quantity": "mean growth of the variance a point in the deeper half, nat",
            "stream": profile.name,
            "measured": rate,
            "expected": prenorm_deep_growth(joins) if stream else 0.0,
            "expected_from": "pre-norm, 1 + l" if stream else "He initialisation, gain 1 a layer",
            "threshold": limit,
            "threshold_from": GROWTH.origin,
            "total_growth_of_variance": math.exp(min(grown, 700.0)),
            "points": joins + 1,
            "sampled_steps": int(known[recent].sum()),
        },
        why=(
            "The last blocks drown all others, the loss sees one path, and gradients grow by the same factor "
            "(De & Smith 2020, arXiv:2002.10444)."
        ),
        remedy=(
            "Normalise each branch's input, x + f(norm(x)), so that the variance grows linearly."
            if stream
            else "Initialise the stack's weights for unit gain: torch.nn.init.kaiming_normal_(w, nonlinearity='relu')."
        ),
        remedy_2=(
            "Scale each branch by 1/√L, or start it at zero (arXiv:2003.04887)."
            if stream
            else "Add a norm to each layer."
        ),
        confidence="high" if known[recent].sum() >= 3 else "low",
    )


def _grows_with_time(view: View, profile: Profile) -> Finding | None:
    end = profile.rms[:, -1]
    known = np.isfinite(end) & (end > 0)
    if known.sum() < 4:
        return None
    start = float(np.max(end[known][:2]))
    mask = known & (end > OUTGROWN.value * start)
    tail = end[known][-3:]
    learned = view.loss_fall is not None and view.loss_fall > 0.05
    if learned or not (np.diff(tail) > 0).all() or not mask[known][-2:].all():
        return None
    times = float(tail[-1] / start)
    return Finding(
        code="signal-explosion",
        severity="error",
        where=profile.names(len(profile.points) - 1),
        steps=spell(mask, known, profile.steps),
        claim=f"The signal at the end of {profile.name} grew {number(times)} times since the start and still grows.",
        evidence={
            "quantity": "RMS at the stream's end over that at the first steps",
            "stream": profile.name,
            "measured": times,
            "over": "time",
            "expected": 1.0,
            "expected_from": "the size at the first sampled steps",
            "threshold": OUTGROWN.value,
            "threshold_from": OUTGROWN.origin,
            "sampled_steps": int(mask.sum()),
        },
        why="Weights run away: outputs saturate the loss, and the run ends in overflow (Chowdhery et al. 2022, PaLM).",
        remedy="Lower the learning rate by a factor of 3 to 10.",
        remedy_2="Add weight decay or a norm before the head, and clip the gradient's norm at 1.0.",
        confidence="high" if mask.sum() >= 3 else "low",
    )


def collapse(view: View) -> list[Finding]:
    """Find plain stacks whose signal dies with depth."""
    plain = [profile for profile in profiles(view) if profile.kind != "stream"]
    return [finding for profile in plain if (finding := _collapse(view, profile)) is not None]


def _weighted(view: View, profile: Profile) -> list[int]:
    """Points that are weight layers, if the stack tells, else all; without the last, a head of any scale."""
    grid = view.grid("layers")
    kinds = dict(zip(grid.names, grid.text("kind"), strict=True))
    weighted = [i for i, point in enumerate(profile.points) if WEIGHT_LAYERS.search(kinds.get(point, ""))]
    return (weighted or list(range(len(profile.points))))[:-1]


def _collapse(view: View, profile: Profile) -> Finding | None:
    points = _weighted(view, profile)
    logs = _log_variance(profile.rms)[:, points]
    if len(points) < LEAST_DEPTH:
        return None
    drops = np.diff(logs, axis=1)
    # Biases may restore a size that the signal has lost: what died halfway has died.
    total = np.nanmin(logs[:, 1:], axis=1, initial=np.inf) - logs[:, 0]
    known = np.isfinite(total)
    shrinking = (drops < math.log(SHRINK.value)).sum(axis=1) >= 3
    spread = np.nanmin(drops, axis=1, initial=0.0) > 0.5 * total
    mask = known & (total < math.log(TOTAL_SHRINK.value)) & shrinking & spread
    if not lasting(mask[:, None], known[:, None])[0]:
        return None
    recent = profile.recent
    change = np.nan_to_num(median(drops[recent]))
    falling = change[change < math.log(SHRINK.value)]
    gain, left = math.exp(float(np.median(falling))) if len(falling) else 1.0, math.exp(float(median(total[recent])))
    init = _signature(profile, drops)
    steepest = np.argsort(change)[: max(1, len(falling))]
    return Finding(
        code="signal-collapse",
        severity=grave(view, "error" if left < 1e-6 else "warning", certain=left < YOUNG_FACTOR * TOTAL_SHRINK.value),
        where=unique(profile.points[points[int(step) + 1]] for step in sorted(steepest)),
        steps=spell(mask, known, profile.steps),
        claim=(
            f"The signal's variance falls to {number(left)} of what it was within {len(points)} layers of "
            f"{profile.name}, by a factor of {number(gain)} a layer where it "
            f"falls{f', the signature of {init}' if init else ''}."
        ),
        evidence={
            "quantity": "variance at the stack's lowest point over that at its start",
            "stream": profile.name,
            "measured": left,
            "expected": 1.0,
            "expected_from": "He initialisation: gain 1 a layer",
            "threshold": TOTAL_SHRINK.value,
            "threshold_from": TOTAL_SHRINK.origin,
            "gain_per_layer": gain,
            "initialisation": init,
            "points": len(points),
            "sampled_steps": int(known[recent].sum()),
        },
        why=(
            "The output hardly depends on the input any more, biases outweigh it, and gradients shrink by the same "
            "factor (Glorot & Bengio 2010; He et al. 2015, arXiv:1502.01852)."
        ),
        remedy=(
            "Initialise the stack's weights with torch.nn.init.kaiming_normal_(w, nonlinearity='relu') and zero biases."
        ),
        remedy_2="Add residual connections with norms: x = x + f(norm(x)).",
        confidence="high" if known[recent].sum() >= 3 else "low",
    )


def _signature(profile: Profile, drops: Floats) -> str | None:
    """The initialisation that the first layers' gain gives away at the first sampled step."""
    if not len(profile.steps) or profile.steps[0] > 1:
        return None
    first = drops[0][np.isfinite(drops[0])][:3]
    name = theory.initialisation_of(math.exp(float(np.median(first)))) if len(first) else None
    return None if name == theory.KNOWN_GAINS[0][0] else name


EXPLOSION: Rule = Rule(
    code="signal-explosion",
    says="the signal grows exponentially with depth, or with time",
    severities=("error", "warning"),
    criterion=(
        "Over 6 points or more, mean and median growth a point in the deeper half above the threshold and above twice "
        "pre-norm's, and the whole above the total; or the stream's end a hundred times its start and growing while "
        "the loss does not fall."
    ),
    thresholds=(GROWTH, TOTAL_GROWTH, TOTAL_GROWTH_NORMED, OUTGROWN),
    source="De & Smith 2020, arXiv:2002.10444; Zhang et al. 2019, Fixup, arXiv:1901.09321",
    picture="signal-depth",
    check=explosion,
)
COLLAPSE: Rule = Rule(
    code="signal-collapse",
    says="the signal dies with depth",
    severities=("error", "warning", "info"),
    criterion=(
        "In a plain stack of 6 weight layers or more, variance at its lowest point under the total threshold of that "
        "at the start, three layers or more under the gain a layer, and no single layer that accounts for half of the "
        "loss; before step 30 a hundred times worse, else info."
    ),
    thresholds=(SHRINK, TOTAL_SHRINK),
    source="Glorot & Bengio 2010; He et al. 2015, arXiv:1502.01852",
    picture="signal-depth",
    check=collapse,
)
