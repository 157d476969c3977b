"""`dominant-branch`, `inert-depth` and `massive-activation`: how branches and elements share the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.silence import PATIENCE as SILENCE_PATIENCE
from gradflow.rules.silence import at_pace
from gradflow.rules.texts import listed, number, unique
from gradflow.rules.view import LEARNED, lasting, median, settled, spell, window

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.rules.view import Bools, Floats, View

DROWNS = Threshold(
    "dominant-branch.ratio",
    "branch over skip beyond the first block",
    3.0,
    "1",
    "theory gives 1/√l; trained branches stay under 2",
)
OUTLIES = Threshold(
    "dominant-branch.outlier",
    "the same over the median of the others",
    5.0,
    "1",
    "one branch, not a scale that all share",
)
INERT = Threshold(
    "inert-depth.cosine", "cosine between a join's skip and its output", 0.9995, "1", "branch over skip under 0.03"
)
NEARLY_INERT = Threshold(
    "inert-depth.note",
    "the same, for a note",
    0.995,
    "1",
    "branch over skip under 0.1: pre-norm reaches it at 100 joins",
)
PATIENCE = 300
"""Steps after which branches that are still this small count as inert; 1,000 for those that started at zero."""
STARTED = 1e-3
"""Branch over skip at the first sampled step under which a branch was started at or near zero."""
MASSIVE = Threshold(
    "massive-activation.ratio",
    "largest over median element",
    1000.0,
    "1",
    "Sun et al. 2024 call 1,000 times the median massive",
)


def _identity(view: View) -> tuple[Bools, NDArray[np.int64]]:
    """Which branches of the table sit on an identity skip of a stream that no norm replaces, and all depths."""
    branches = {branch.name: branch for branch in view.run.branches}
    found = [branches.get(name) for name in view.grid("branches").names]
    free = np.array([b is not None and b.kind == "identity" and b.placement != "post-norm" for b in found], dtype=bool)
    return free, np.array([b.depth if b is not None else 0 for b in found], dtype=np.int64)


def _first_block(names: list[str], depth: NDArray[np.int64]) -> Bools:
    """The first two joins, or only the first where the second one's name counts on: `blocks.0`, `blocks.1`."""
    counts = [[part for part in name.split("@")[0].split(".") if part.isdigit()] for name in names]
    first = [count for count, at in zip(counts, depth, strict=True) if at == 1]
    same = np.array([not count or count in first for count in counts], dtype=bool)
    return np.asarray((depth == 1) | ((depth == 2) & same))


def dominant(view: View) -> list[Finding]:
    """Find branches beyond the first block that are several times the stream, unlike their neighbours, and stay."""
    grid = view.grid("branches")
    if not grid.keys or not len(grid.steps):
        return []
    free, depth = _identity(view)
    ratio = grid["branch_ratio"]
    deep = free & ~_first_block(grid.names, depth)
    known = np.isfinite(ratio) & deep
    now = settled(ratio)
    # Without the largest: is it of another kind? Where few are deep, those of the first block are asked too.
    others = np.sort(now[deep if deep.sum() > 2 else free])[:-1]
    if len(others) < 2 or not np.isfinite(now[deep]).any():
        return []
    usual = float(median(others))
    bad = known & (ratio > DROWNS.value) & (ratio > OUTLIES.value * usual)
    found = np.flatnonzero(lasting(bad, known) & (known[window(len(ratio))].sum(axis=0) >= 3))
    part = ratio[window(len(ratio))]
    left = part[-1, found] / part[0, found]
    in_time = part[-1, found] * left**3 < DROWNS.value  # if it goes on like that for as long again as the run has been
    found = found[(left > 0.8) | ~in_time]
    if not len(found):
        return []
    found = found[np.argsort(-now[found], kind="stable")]
    names = [grid.names[i] for i in found]
    spells = [spell(bad[:, i], known[:, i], grid.steps) for i in found]
    expected = 1 / float(depth[found[0]]) ** 0.5
    return [
        Finding(
            code="dominant-branch",
            severity="warning",
            where=unique(names),
            steps=(min(s[0] for s in spells), max(s[1] for s in spells)),
            claim=(
                f"{listed(names)} {'is' if len(names) == 1 else 'are'} {number(float(now[found[0]]))} times the "
                f"stream it is added to; the median branch beyond the first block is {number(usual)} of it."
            ),
            evidence={
                "quantity": "branch over skip, RMS",
                "measured": float(now[found[0]]),
                "expected": expected,
                "expected_from": "1/√l for unit branches of a pre-norm stream",
                "threshold": DROWNS.value,
                "threshold_from": DROWNS.origin,
                "median_of_the_others": usual,
                "depth": int(depth[found[0]]),
                "sampled_steps": int(known[:, found[0]].sum()),
            },
            why="It overwrites what the blocks before wrote, and their gradient has to pass through it alone.",
            remedy=f"Check the initialisation and any gain of {names[0]}: scale its last layer by 1/√(2L).",
            remedy_2="Put a norm at its input, or a LayerScale gate at its output.",
            confidence="high" if known[:, found[0]].sum() >= 5 else "low",
        )
    ]


def kept_cosine(view: View) -> Floats:
    """Cosine between a join's skip and its output, (Σa² + Σa·f)/√(Σa²·Σy²), shape (step, branch)."""
    grid = view.grid("branches")
    skip, out = grid["skip_sq"], grid["out_sq"]
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (skip + grid["dot"]) / (np.sqrt(skip) * np.sqrt(out))
    return np.where(np.isfinite(cosine), cosine, np.nan)


def inert(view: View) -> list[Finding]:
    """Find streams that most blocks leave as they are, long after they should have grown."""
    grid = view.grid("branches")
    if not grid.keys or not len(grid.steps) or grid.steps[-1] < PATIENCE:
        return []
    free, depth = _identity(view)
    cosine, ratio = kept_cosine(view), grid["branch_ratio"]
    known = np.isfinite(cosine) & free
    dull = lasting(known & (cosine > NEARLY_INERT.value), known)
    natural = 0.5 * np.sqrt(np.asarray(theory.prenorm_branch_share(np.maximum(depth, 1).astype(np.float64))))
    dead = lasting(known & (cosine > INERT.value) & (ratio < natural), known)
    first = np.array([column[np.isfinite(column)][0] if np.isfinite(column).any() else 0.0 for column in ratio.T])
    growing = settled(ratio) > 1.2 * median(ratio[: max(1, len(ratio) // 2)])
    in_time = at_pace(ratio, grid.steps) > (2 * (1 - INERT.value)) ** 0.5
    learned = view.loss_fall is not None and view.loss_fall > LEARNED
    dead &= (first > STARTED) | ((grid.steps[-1] >= SILENCE_PATIENCE.value) & ~growing) | ~(in_time | learned)
    joins = int(free.sum())
    serious = joins >= 6 and 2 * dead.sum() > joins
    if not serious and (joins < 6 or 3 * dull.sum() <= joins):
        return []
    chosen, threshold = (dead, INERT) if serious else (dull, NEARLY_INERT)
    names = [grid.names[i] for i in np.flatnonzero(chosen)]
    typical = float(np.nanmedian(settled(cosine)[chosen]))
    return [
        Finding(
            code="inert-depth",
            severity="warning" if serious else "info",
            where=unique(names),
            steps=(int(grid.steps[window(len(grid.steps))][0]), int(grid.steps[-1])),
            claim=(
                f"{len(names)} of {joins} branches leave the stream as it is: the cosine between what enters and what "
                f"leaves their joins is {typical:.4f}."
            ),
            evidence={
                "quantity": "cosine between a join's skip and its output, median of the inert branches",
                "measured": typical,
                "expected": float(theory.step_cosine(1.0 / max(1, joins // 2))),
                "expected_from": "√(l/(l+1)) in the middle of a pre-norm stream of unit branches",
                "threshold": threshold.value,
                "threshold_from": threshold.origin,
                "inert_branches": len(names),
                "branches": joins,
                "sampled_steps": int(known.any(axis=1).sum()),
            },
            why="Depth is paid for and not used: such blocks can be removed with little harm (arXiv:2502.05795).",
            remedy="Raise the branches' output scale: initialise their last layers larger, start gates higher.",
            remedy_2="Scale the norm's output by 1/√l (arXiv:2502.05795), or use fewer, wider blocks.",
            confidence="low",
        )
    ]


def massive(view: View) -> list[Finding]:
    """Note streams with a few huge elements."""
    grid = view.grid("streams")
    if not grid.keys or not len(grid.steps):
        return []
    peak = grid["max_over_median"]
    known = np.isfinite(peak)
    found = np.flatnonzero(lasting(known & (peak > MASSIVE.value), known))
    if not len(found):
        return []
    now = settled(peak)
    found = found[np.argsort(-now[found], kind="stable")]
    names = [grid.names[i] for i in found]
    return [
        Finding(
            code="massive-activation",
            severity="info",
            where=unique(names),
            steps=(int(grid.steps[window(len(grid.steps))][0]), int(grid.steps[-1])),
            claim=f"A few elements of {names[0]} are {number(float(now[found[0]]))} times the median element.",
            evidence={
                "quantity": "largest over median |x| on the row sample",
                "measured": float(now[found[0]]),
                "expected": theory.max_over_median(10_000),
                "expected_from": "normal values",
                "threshold": MASSIVE.value,
                "threshold_from": MASSIVE.origin,
                "points": len(names),
            },
            why=(
                "Often benign: language models use such elements as a constant bias for attention. They do hurt "
                "low-precision formats (Sun et al. 2024, arXiv:2402.17762)."
            ),
            remedy="Nothing, unless you quantise or train in float16; then use bf16.",
            remedy_2="Give attention an explicit sink (a learned bias key).",
            confidence="low",
        )
    ]


DOMINANT: Rule = Rule(
    code="dominant-branch",
    says="a branch drowns the stream",
    severities=("warning",),
    criterion=(
        "Beyond the first block of a stream that no norm replaces: branch over skip above 3 and 5 times the median "
        "branch, lasting and not shrinking so fast that it will be under it when the run is twice as long."
    ),
    thresholds=(DROWNS, OUTLIES),
    source="De & Smith 2020, arXiv:2002.10444",
    picture="ratio-depth",
    check=dominant,
)
INERT_DEPTH: Rule = Rule(
    code="inert-depth",
    says="deep blocks hardly change the stream",
    severities=("warning", "info"),
    criterion=(
        "After 300 steps (1,000 for branches that started near zero and are on their way out of it or whose loss has "
        "halved, and none while they grow), over half of the joins above the threshold and under half of 1/√l: "
        "warning; over a third above 0.995: info."
    ),
    thresholds=(INERT, NEARLY_INERT),
    source="Sun et al. 2025, The Curse of Depth, arXiv:2502.05795",
    picture="ratio-depth",
    check=inert,
)
MASSIVE_ACTIVATION: Rule = Rule(
    code="massive-activation",
    says="a few elements are huge",
    severities=("info",),
    criterion="Largest over median element of a stream's point above the threshold at recent sampled steps.",
    thresholds=(MASSIVE,),
    source="Sun et al. 2024, Massive Activations in Large Language Models, arXiv:2402.17762",
    picture="outliers",
    check=massive,
)
