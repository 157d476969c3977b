"""`attention-entropy-collapse` and `attention-logit-growth`: heads that look at one token, logits that run away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import number, unique
from gradflow.rules.view import lasting, settled, spell

if TYPE_CHECKING:
    from gradflow.rules.view import View

ENTROPY = Threshold(
    "attention-entropy-collapse.entropy",
    "entropy over ln(keys), mean over a layer's heads",
    0.1,
    "1",
    "trained layers stay above 0.2",
)
SHARP = Threshold(
    "attention-entropy-collapse.logit",
    "largest logit of such a layer",
    30.0,
    "1",
    "the weight of the second key is then under 1e-13",
)
GROWN = Threshold(
    "attention-logit-growth.logit",
    "largest logit",
    50.0,
    "1",
    "Dehghani et al. 2023 saw divergence beyond; healthy layers stay under 30",
)
RUNAWAY = Threshold(
    "attention-logit-growth.error", "largest logit, error", 1e4, "1", "softmax is one-hot in every precision"
)
GREW = 3.0
"""Times its first value that a logit has grown by to be running away."""
LEAST_KEYS = 4


def entropy_collapse(view: View) -> list[Finding]:
    """Find layers whose heads look at one token, with logits so large that they cannot look elsewhere."""
    grid = view.grid("attention")
    if not grid.keys or not len(grid.steps):
        return []
    keys = np.where(grid["keys"] >= LEAST_KEYS, grid["keys"], np.nan)
    share, logit = grid["entropy"] / np.log(keys), grid["logit_max"]
    known = np.isfinite(share)
    low = known & (share < ENTROPY.value)
    found = lasting(low, known)
    sharp = settled(logit) > SHARP.value
    found &= sharp | (2 * found.sum() > len(grid.keys))
    chosen = np.flatnonzero(found)
    if not len(chosen):
        return []
    now = settled(share)
    chosen = chosen[np.argsort(now[chosen], kind="stable")]
    names = [grid.names[i] for i in chosen]
    spells = [spell(low[:, i], known[:, i], grid.steps) for i in chosen]
    worst = int(chosen[0])
    count = float(settled(keys)[worst])
    return [
        Finding(
            code="attention-entropy-collapse",
            severity="warning",
            where=unique(names),
            steps=(min(s[0] for s in spells), max(s[1] for s in spells)),
            claim=(
                f"Attention in {names[0]} has an entropy of {number(float(settled(grid['entropy'])[worst]))} nat over "
                f"{count:.0f} keys, {float(now[worst]):.1%} of ln(keys): its heads look at one token"
                f"{f', and so in {len(names) - 1} more layers' if len(names) > 1 else ''}."
            ),
            evidence={
                "quantity": "entropy over ln(keys)",
                "measured": float(now[worst]),
                "expected": theory.softmax_entropy(count, 1.0) / float(np.log(count)),
                "expected_from": "unit logits: ln n - 1/2",
                "threshold": ENTROPY.value,
                "threshold_from": ENTROPY.origin,
                "largest_logit": float(settled(logit)[worst]) if np.isfinite(settled(logit)[worst]) else None,
                "layers": len(names),
                "sampled_steps": int(known[:, worst].sum()),
            },
            why="A one-hot softmax passes no gradient to queries and keys (Zhai et al. 2023, arXiv:2303.06296).",
            remedy="Normalise queries and keys before the product (QK norm), scaled by 1/√(head width).",
            remedy_2="Lower the learning rate and lengthen warm-up; σReparam (arXiv:2303.06296).",
            confidence="high" if known[:, worst].sum() >= 3 and bool(sharp[worst]) else "low",
        )
    ]


def logit_growth(view: View) -> list[Finding]:
    """Find layers whose largest logit is beyond what softmax can use and has grown there, or is absurd."""
    grid = view.grid("attention")
    if not grid.keys or not len(grid.steps):
        return []
    logit = grid["logit_max"]
    known = np.isfinite(logit)
    first = np.array([column[k][0] if k.any() else np.nan for column, k in zip(logit.T, known.T, strict=True)])
    with np.errstate(invalid="ignore"):
        high = known & (logit > GROWN.value) & ((logit > GREW * first) | (logit > 10 * GROWN.value))
    # A logit that grows crosses the threshold late: the last two samples say that it did.
    chosen = np.flatnonzero(lasting(high, known, least=0.5) & (high | ~known)[-2:].all(axis=0))
    if not len(chosen):
        return []
    now = settled(logit)
    chosen = chosen[np.argsort(-now[chosen], kind="stable")]
    worst = int(chosen[0])
    names = [grid.names[i] for i in chosen]
    spells = [spell(high[:, i], known[:, i], grid.steps) for i in chosen]
    return [
        Finding(
            code="attention-logit-growth",
            severity="error" if now[worst] > RUNAWAY.value else "warning",
            where=unique(names),
            steps=(min(s[0] for s in spells), max(s[1] for s in spells)),
            claim=(
                f"The largest attention logit of {names[0]} is {number(float(now[worst]))}, from "
                f"{number(float(first[worst]))} at the first sampled step."
            ),
            evidence={
                "quantity": "largest |logit| on the sample",
                "measured": float(now[worst]),
                "expected": "1 to 5",
                "expected_from": "queries and keys of unit size over √(head width)",
                "threshold": GROWN.value,
                "threshold_from": GROWN.origin,
                "first": float(first[worst]),
                "layers": len(names),
                "sampled_steps": int(known[:, worst].sum()),
            },
            why="Softmax becomes one-hot and large models diverge (Dehghani et al. 2023, arXiv:2302.05442).",
            remedy="Normalise queries and keys before the product (QK norm).",
            remedy_2="Lower the learning rate, decay query and key weights, or cap the logits (tanh soft cap).",
            confidence="high" if known[:, worst].sum() >= 3 else "low",
        )
    ]


ENTROPY_COLLAPSE: Rule = Rule(
    code="attention-entropy-collapse",
    says="heads look at one token",
    severities=("warning",),
    criterion="Entropy under a tenth of ln(keys) at recent sampled steps; logits above 30, or half of the layers.",
    thresholds=(ENTROPY, SHARP),
    source="Zhai et al. 2023, arXiv:2303.06296",
    picture="attention-entropy",
    check=entropy_collapse,
)
LOGIT_GROWTH: Rule = Rule(
    code="attention-logit-growth",
    says="attention logits run away",
    severities=("error", "warning"),
    criterion="Largest logit above 50 and three times its first value, or above 500, at recent sampled steps.",
    thresholds=(GROWN, RUNAWAY),
    source="Dehghani et al. 2023, arXiv:2302.05442",
    picture="attention-logits",
    check=logit_growth,
)
