"""`frozen-parameter`: weights that should move and never do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.blocked import blocked, cut_end, expected_unused, within, without_gradient
from gradflow.rules.depth import profiles
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import unique
from gradflow.rules.view import median

if TYPE_CHECKING:
    from gradflow.rules.view import Bools, View

SHARE = Threshold(
    "frozen-parameter.share",
    "trainable weights without gradient",
    0.01,
    "1",
    "below it: mask tokens and the like, unused on purpose",
)
ROUNDING = 2.0**-24
"""Half of the distance between 1 and the next float32: a smaller update over weight leaves it as it is."""


def frozen(view: View) -> list[Finding]:
    """Find parameters that should train and do not: no optimizer, no gradient, or no update."""
    grid = view.grid("parameters")
    if len(grid.steps) < 2 or not view.run.parameters:
        return []
    starved = [name for name in without_gradient(view) if not expected_unused(name)]
    ends = [cut_end(view, profile, starved) for profile in profiles(view)] if starved else []
    told = {name for end in ends if end is not None for name in end[2]}
    behind = [within(view, name) for finding in blocked(view) for name in finding.where]
    known = {p.name: p for p in view.run.parameters if p.requires_grad and p.name not in told}
    groups: dict[str, list[str]] = {"optimizer": [], "graph": [], "update": []}
    stopped = _never_updated(view) & ~_rounded_away(view)
    gradient = np.asarray(grid.raw("grad_sq")[1].any(axis=0))
    some = np.asarray((grid["grad_sq"] > 0).any(axis=0))
    optimizers = bool(view.run.meta.get("optimizers"))
    for i, name in enumerate(grid.names):
        if name not in known or any(holds(name) for holds in behind):
            continue
        if known[name].group is None:
            if optimizers and some[i]:
                groups["optimizer"].append(name)
        elif not gradient[i]:
            groups["graph"].append(name)
        elif stopped[i] and some[i]:
            groups["update"].append(name)
    return [_frozen(view, cause, names) for cause, names in groups.items() if names]


def _never_updated(view: View) -> Bools:
    """Parameters whose update is exactly zero at every sampled step with a learning rate, three steps or more."""
    grid = view.grid("parameters")
    update = grid["update_sq"]
    rate = dict(zip(view.steps.tolist(), view.series("learning_rate").tolist(), strict=True))
    moving = np.array([step > 0 and rate.get(step, np.nan) != 0 for step in grid.steps.tolist()])
    known = np.isfinite(update[moving])
    return np.asarray((known.sum(axis=0) >= 3) & ~(update[moving] > 0).any(axis=0))


def _rounded_away(view: View) -> Bools:
    """Parameters whose update, if as long for their gradient as their group's others, is under a float32's rounding.

    The gradient of a bias that a norm takes away is a rounding of zero, and at a tiny learning rate weights of size 1
    stay as they are while smaller ones move: neither is frozen.
    """
    grid = view.grid("parameters")
    pace = median(np.where(grid["update_sq"] > 0, np.sqrt(grid["update_sq"] / grid["grad_sq"]), np.nan))
    groups = {p.name: p.group for p in view.run.parameters}
    group = np.array([str(groups.get(name)) for name in grid.names])
    for name in set(group):
        pace[group == name] = median(pace[group == name])
    with np.errstate(invalid="ignore"):
        return np.asarray(pace * median(grid["grad_max"]) < ROUNDING * median(grid["weight_rms"]))


_CAUSES = {
    "optimizer": (
        "gets a gradient but is in no optimizer",
        "Give the optimizer all parameters: Optimizer(model.parameters()), after every module has been created.",
        "If it is frozen on purpose, set requires_grad=False, which saves its gradient too.",
    ),
    "graph": (
        "is in an optimizer but never got a gradient",
        "Check that its module's output reaches the loss: a forgotten call, an output that is dropped, a detach.",
        "If it is not needed, delete it or set requires_grad=False.",
    ),
    "update": (
        "gets a gradient but its weights never change",
        (
            "Check the learning rate of its parameter group (zero, or a schedule that ended), and its dtype: updates "
            "under a 256th of a weight round away in bfloat16, so keep float32 master weights."
        ),
        "Raise the learning rate of that group.",
    ),
}


def _frozen(view: View, cause: str, names: list[str]) -> Finding:
    grid = view.grid("parameters")
    size = {p.name: int(np.prod(p.shape)) if p.shape else 1 for p in view.run.parameters}
    trainable = sum(size[p.name] for p in view.run.parameters if p.requires_grad)
    names = sorted(names, key=lambda name: -size[name])
    share = sum(size[name] for name in names) / max(1, trainable)
    harmless = cause == "graph" and (share < SHARE.value or all(expected_unused(name) for name in names))
    says, remedy, second = _CAUSES[cause]
    return Finding(
        code="frozen-parameter",
        severity="info" if harmless else "warning",
        where=unique(names),
        steps=(int(grid.steps[0]), int(grid.steps[-1])),
        claim=(
            f"{names[0]} {says}"
            f"{f', and so are {len(names) - 1} more parameters' if len(names) > 1 else ''}: {share:.1%} of the "
            "trainable weights stay as they were."
        ),
        evidence={
            "quantity": "share of the trainable weights that do not train",
            "measured": share,
            "expected": 0.0,
            "expected_from": "requires_grad is set on all of them",
            "threshold": SHARE.value if cause == "graph" else 0.0,
            "threshold_from": SHARE.origin if cause == "graph" else "exactly no update",
            "cause": cause,
            "parameters": len(names),
            "sampled_steps": len(grid.steps),
        },
        why="The network trains around them: capacity is lost, and what was meant to learn stays random.",
        remedy=remedy,
        remedy_2=second,
        confidence="low" if cause == "graph" or len(grid.steps) < 3 else "high",
    )


FROZEN: Rule = Rule(
    code="frozen-parameter",
    says="a parameter that should train does not",
    severities=("warning", "info"),
    criterion=(
        "requires_grad, and: in no optimizer though it has a gradient; or in one without any gradient (under the "
        "share, poolers and unchosen experts: info); or no update at three sampled steps or more with a learning rate, "
        "though one as long for its gradient as its group's others would not round away."
    ),
    thresholds=(SHARE,),
    source="PyTorch, torch.optim: constructing it",
    picture="update-ratio",
    check=frozen,
)
