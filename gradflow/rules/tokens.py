"""`rank-collapse`: positions of a sequence that become the same vector on their way through the network."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.depth import ATTENTION, YOUNG, Profile, ends, profiles
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import number, unique
from gradflow.rules.view import lasting, median, spell

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradflow.rules.view import Floats, View

ALIGNED = Threshold(
    "rank-collapse.cosine", "token cosine at the end of the stream", 0.999, "1",
    "healthy stacks at initialisation: 0.97 post-norm and 0.67 pre-norm at 12 blocks; 1.0000 without residuals",
)  # fmt: skip
ALIGNED_PLAIN = Threshold(
    "rank-collapse.cosine-plain", "the same in a trunk of attention without residual connections", 0.99, "1",
    "no healthy plain stack of attention was seen; with 8 layers it has 0.998 at initialisation and 1.0000 soon after",
)  # fmt: skip
SPREAD_KEPT = Threshold(
    "rank-collapse.spread", "what is left of 1 - cosine between the first and the last point", 0.01, "1",
    "a collapse is made by the network: tokens that come in alike are no finding; 0.05 in a trunk",
)  # fmt: skip
PLATEAU = Threshold(
    "rank-collapse.plateau", "steps that a stack which collapsed in training stays so", 500, "step",
    "a healthy post-norm stack (12 blocks) sits at 0.9999 for 200 steps while it predicts single-token frequencies",
)  # fmt: skip
QUERY_KEY = re.compile(
    r"(?:^|[._])(?:q|k|query|key|q_proj|k_proj|q_lin|k_lin|qkv|in_proj|in_proj_weight|c_attn)(?:[._]|$)"
)


def check(view: View) -> list[Finding]:
    """Find streams and trunks at whose end all tokens of a sequence point the same way."""
    return [finding for profile in profiles(view) if (finding := _check(view, profile)) is not None]


def _check(view: View, profile: Profile) -> Finding | None:
    seen = np.flatnonzero(np.isfinite(profile.cosine).any(axis=0))
    if len(seen) < 3:
        return None
    end, start = profile.cosine[:, seen[-1]], profile.cosine[:, seen[0]]
    known = np.isfinite(end)
    kept = (1 - end) / np.fmax(1 - np.where(np.isfinite(start), start, 0.0), 1e-12)
    limit = _limit(view, profile, start)
    mask = known & (end > limit) & (kept < SPREAD_KEPT.value * (1 if profile.kind == "stream" else 5))
    if not lasting(mask[:, None], known[:, None])[0]:
        return None
    steps = spell(mask, known, profile.steps)
    # Attention that no skip holds up collapses within the first steps, if not at once.
    grace = YOUNG if profile.kind != "stream" and _attends(view) else 0
    from_the_start = steps[0] <= int(profile.steps[np.argmax(known)]) + grace
    if not from_the_start and not _stuck(view, profile, seen, steps):
        return None
    return _finding(view, profile, seen, mask, steps, limit=float(limit[0]), from_the_start=from_the_start)


def _limit(view: View, profile: Profile, start: Floats) -> Floats:
    """Cosine above which tokens count as the same: stricter without attention, where ReLU aligns them by nature."""
    if _attends(view):
        return np.full(len(start), ALIGNED.value if profile.kind == "stream" else ALIGNED_PLAIN.value)
    c = float(np.clip(np.nan_to_num(median(start)), 0.0, 1.0))
    natural = theory.relu_stack_correlation(c, len(profile.points))
    return np.full(len(start), max(ALIGNED.value, 1 - 0.05 * (1 - natural)))


def _attends(view: View) -> bool:
    """Whether the model has attention, by its attention table or by its names."""
    if view.grid("attention").keys:
        return True
    names = [*view.grid("layers").names, *view.grid("parameters").names, *view.grid("branches").names]
    return any(ATTENTION.search(name) or QUERY_KEY.search(name) for name in names)


def _stuck(view: View, profile: Profile, seen: NDArray[np.int64], steps: tuple[int, int]) -> bool:
    """Whether a collapse that came in training is one: long, over half of the depth, gradient and loss stuck."""
    if steps[1] - steps[0] < PLATEAU.value:
        return False
    inside = profile.steps >= steps[0]
    middle = float(median(profile.cosine[inside][:, seen[len(seen) // 2]]))
    span = ends(profile.grad[inside])
    left = float(median(profile.grad[inside, span[0]] / profile.grad[inside, span[1]])) if span else 1.0
    loss = view.series("loss")[view.steps >= steps[0]]
    half = len(loss) // 2
    early, late = float(median(loss[:half])), float(median(loss[half:]))
    falls = np.isfinite(early) and np.isfinite(late) and late < 0.98 * early
    return middle > 1 - 5 * (1 - ALIGNED.value) and left < 0.1 and not falls


def _query_key(view: View) -> float | None:
    """Query and key weights' gradient of the last attention layer over the first's, late in the run, or None."""
    grid = view.grid("parameters")
    columns = [i for i, name in enumerate(grid.names) if QUERY_KEY.search(name) and name.endswith("weight")]
    values = median(np.sqrt(grid["grad_sq"][-3:, columns])) if len(grid.steps) and columns else np.array([])
    values = values[np.isfinite(values)]
    return float(values[-1] / values[0]) if len(values) >= 4 and values[0] > 0 else None


def _finding(
    view: View, profile: Profile, seen: NDArray[np.int64], mask: NDArray[np.bool_], steps: tuple[int, int],
    *, limit: float, from_the_start: bool,
) -> Finding:  # fmt: skip
    recent = profile.recent
    now = median(profile.cosine[recent])
    first, last = float(now[seen[0]]), float(now[seen[-1]])
    gone = [int(p) for p in seen if now[p] > limit] or [int(seen[-1])]
    queries = _query_key(view)
    plain = profile.kind != "stream"
    samples = int(mask.sum())
    begun = f"step {steps[0]}" if steps[0] else "initialisation"
    return Finding(
        code="rank-collapse",
        severity="error" if from_the_start and samples >= 2 else "warning",
        where=unique(name for point in gone for name in profile.names(point)),
        steps=steps,
        claim=(
            f"The tokens of a sequence become the same vector in {profile.name}: their mean cosine rises from "
            f"{number(first)} at {profile.points[seen[0]]} to {last:.5f} at {profile.points[seen[-1]]}, above "
            f"{limit:.4g} from {profile.points[gone[0]]} on"
            f"{f', at every sampled step since {begun}' if from_the_start else ''}."
        ),
        evidence={
            "quantity": "mean cosine between the tokens of a sequence at the end of the stream",
            "stream": profile.name,
            "measured": last,
            "expected": 0.97 if profile.placement == "post-norm" else 0.7,
            "expected_from": "healthy 12-block stacks with residual connections at initialisation",
            "threshold": limit,
            "threshold_from": (ALIGNED_PLAIN if limit == ALIGNED_PLAIN.value else ALIGNED).origin,
            "cosine_at_the_first_point": first,
            "spread_left": (1 - last) / max(1 - first, 1e-12),
            "first_collapsed_point": profile.points[gone[0]],
            "query_key_gradient_last_over_first": queries,
            "slope_of_log_spread_without_skip": theory.ATTENTION_SLOPE["none"],
            "sampled_steps": samples,
        },
        why=(
            "Attention over equal tokens returns the same vector everywhere: the output no longer depends on position, "
            "query and key gradients vanish, and the loss stays at the entropy of single tokens (Dong et al. 2021, "
            "arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126)."
        ),
        remedy=(
            "Add a residual connection around each sublayer, x = x + f(norm(x)): without skips token spread dies "
            "cubically a layer."
            if plain
            else "Lower the learning rate by a factor of 3 and lengthen warm-up, then move the norms to the branches' "
            "inputs (pre-norm)."
        ),
        remedy_2=(
            "Where skips are not wanted, start attention near the identity (value-skipinit, arXiv:2302.10322)."
            if plain
            else "Scale the branches by 1/√L or as DeepNorm does (arXiv:2203.00555)."
        ),
        confidence="high" if samples >= 3 and from_the_start else "low",
    )


RULE: Rule = Rule(
    code="rank-collapse",
    says="tokens become the same",
    severities=("error", "warning"),
    criterion=(
        "Token cosine at the end of a stream or trunk above the threshold, with under a hundredth of the input's "
        "spread left, from the first sampled step (attention without residual connections: one of the first 30) to the "
        "last; or from some step on for 500 steps over half of the depth, with under a tenth of the gradient left and "
        "a loss that does not fall."
    ),
    thresholds=(ALIGNED, ALIGNED_PLAIN, SPREAD_KEPT, PLATEAU),
    source="Dong et al. 2021, arXiv:2103.03404; Noci et al. 2022, arXiv:2206.03126",
    picture="token-cosine",
    check=check,
)
