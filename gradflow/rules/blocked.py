"""`blocked-gradient` and `frozen-parameter`: signal without gradient, weights that never move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.depth import profiles
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import listed, unique
from gradflow.rules.view import lasting, median, window

if TYPE_CHECKING:
    from gradflow.rules.depth import Profile
    from gradflow.rules.view import Bools, View

ZERO = Threshold(
    "blocked-gradient.zero",
    "gradient energy through the branch over what its signal predicts", 1e-10, "1", "float32 rounding of a zero"
)  # fmt: skip
LIVE = 1e-3
"""Branch over skip from which a branch counts as live."""
SHARE = Threshold(
    "frozen-parameter.share",
    "trainable weights without gradient",
    0.01,
    "1",
    "below it: mask tokens and the like, unused on purpose",
)
ROUNDING = 2.0**-24
"""Half of the distance between 1 and the next float32: a smaller update over weight leaves it as it is."""
EXPECTED_UNUSED = ("pooler", "expert", "mask_token", "masked_spec")
WHY_BLOCKED = (
    "A detach, a no_grad block or a conversion to numpy cuts the graph there: what lies before keeps its initial "
    "weights or learns through other paths only."
)


def blocked(view: View) -> list[Finding]:
    """Find branches and stretches of depth that pass a live signal and no gradient."""
    return _blocked_branches(view) + _blocked_depth(view)


def blocked_branches(view: View) -> list[int]:
    """Indices of branches that are live and let no gradient through, past step 0, to the end of the run."""
    grid = view.grid("branches")
    if not grid.keys or not len(grid.steps):
        return []
    through, out = grid["grad_branch_sq"], grid["grad_out_sq"]
    ratio = grid["branch_ratio"]
    with np.errstate(invalid="ignore"):
        known = np.isfinite(through) & (out > 0) & (ratio > LIVE)
        exact = known & (through == 0)
        none = known & ((through == 0) | (through <= ZERO.value * np.fmin(ratio**2, 1.0) * out))
    found = np.flatnonzero(lasting(none, known, least=1.0))
    certain = lasting(exact, known, least=1.0)
    # What is left by rounding is a zero if the weights inside get nothing either, else a branch of hardly any slope.
    starved = _without_gradient(view)
    names = grid.names
    return [int(i) for i in found if certain[i] or any(name.startswith(f"{names[i]}.") for name in starved)]


def _blocked_branches(view: View) -> list[Finding]:
    grid = view.grid("branches")
    found = blocked_branches(view)
    if not found:
        return []
    names = [grid.names[i] for i in found]
    starved = [name for name in _without_gradient(view) if any(name.startswith(f"{n}.") for n in names)]
    ratio = float(np.nanmax(grid["branch_ratio"][-1, found], initial=0.0))
    samples = len(grid.steps[window(len(grid.steps))])
    return [
        Finding(
            code="blocked-gradient",
            severity="error" if starved else "warning",
            where=unique(names),
            steps=(int(grid.steps[0]), int(grid.steps[-1])),
            claim=(
                f"{listed(names)} {'adds' if len(names) == 1 else 'add'} up to {ratio:.2g} of the skip to the stream, "
                f"but no gradient comes back through {'it' if len(names) == 1 else 'them'}"
                f"{f': {len(starved)} trainable parameters inside get none' if starved else ''}."
            ),
            evidence={
                "quantity": "gradient that came back through the branch, Σ of squares",
                "measured": 0.0,
                "expected": "about the square of branch over skip times the gradient at the join",
                "expected_from": "b = f for linear and ReLU branches, gradflow.theory.prenorm_gradient_growth",
                "threshold": ZERO.value,
                "threshold_from": ZERO.origin,
                "branch_ratio": ratio,
                "parameters_without_gradient": starved[:8],
                "sampled_steps": samples,
            },
            why=WHY_BLOCKED,
            remedy=f"Look for .detach(), torch.no_grad(), .data or .item() in the forward of {names[0]} and remove it.",
            remedy_2="If it is meant (a frozen teacher, a stop-gradient), set requires_grad=False there to say so.",
            confidence="high" if samples >= 3 else "low",
        )
    ]


def _without_gradient(view: View) -> list[str]:
    """Trainable parameters in an optimizer that had no gradient at all (not even zero) at the end of the run."""
    grid = view.grid("parameters")
    if not len(grid.steps):
        return []
    _, known = grid.raw("grad_sq")
    dead = np.asarray(~known[window(len(grid.steps))].any(axis=0))
    trainable = {p.name for p in view.run.parameters if p.requires_grad and p.group is not None}
    return [name for name, none in zip(grid.names, dead, strict=True) if none and name in trainable]


def _blocked_depth(view: View) -> list[Finding]:
    starved = [name for name in _without_gradient(view) if not _expected(name)]
    cuts = [_cut(view, profile, starved) for profile in profiles(view)] if starved else []
    return [finding for finding in cuts if finding is not None]


def _end(view: View, profile: Profile, starved: list[str]) -> tuple[int, int, list[str]] | None:
    """First point with a gradient, the last before it with a signal alone, and the trainable weights on that side."""
    recent = profile.recent
    alive = np.asarray(profile.reached[recent].any(axis=0))
    signal = np.asarray((profile.rms[recent] > 0).any(axis=0))
    if not alive.any() or not signal[: int(np.argmax(alive))].any():
        return None
    first = int(np.argmax(alive))
    before = [point for point in range(first) if signal[point]]
    if not before or not alive[first:].all():
        return None
    inside = _before(view, profile.points[first], starved)
    return (first, before[-1], inside) if inside else None


def _cut(view: View, profile: Profile, starved: list[str]) -> Finding | None:
    """A point behind which the gradient is gone while the signal passed, with trainable weights on the starved side."""
    found = _end(view, profile, starved)
    if found is None:
        return None
    first, before, inside = found
    recent = profile.recent
    samples = len(profile.steps[recent])
    return Finding(
        code="blocked-gradient",
        severity="error",
        where=unique([*profile.names(first), *profile.names(before)]),
        steps=(int(profile.steps[0]), int(profile.steps[-1])),
        claim=(
            f"The gradient ends between {profile.points[before]} and {profile.points[first]}: the signal passes, "
            f"but nothing comes back before it, and {len(inside)} trainable parameters there have no gradient."
        ),
        evidence={
            "quantity": "gradient at the points before the cut",
            "stream": profile.name,
            "measured": 0.0,
            "expected": float(median(profile.grad[recent, first])),
            "expected_from": "the gradient at the first point that has one",
            "threshold": 0.0,
            "threshold_from": "a connected graph has some",
            "parameters_without_gradient": inside[:8],
            "sampled_steps": samples,
        },
        why=WHY_BLOCKED,
        remedy=f"Look for .detach(), torch.no_grad() or .data right before {profile.points[first]} and remove it.",
        remedy_2="If what comes before is frozen on purpose, set requires_grad=False there to say so.",
        confidence="high" if samples >= 3 else "low",
    )


def _before(view: View, point: str, names: list[str]) -> list[str]:
    """Those of the parameters whose layer runs before the point's; all of them where the order is not known."""
    grid = view.grid("layers")
    modules = {layer.name: layer.module for layer in view.run.layers}
    order = {modules.get(name, name): i for i, name in reversed(list(enumerate(grid.names)))}
    at = [i for module, i in order.items() if module == point or module.startswith(f"{point}.")]
    if not at:
        return names if not order else [name for name in names if _place(name, order) is not None]
    return [name for name in names if (place := _place(name, order)) is not None and place < max(at)]


def _place(parameter: str, order: dict[str, int]) -> int | None:
    """When the layer that owns a parameter ran; else the first one beside it, or the nearest module around it."""
    path = parameter.rpartition(".")[0]
    while path not in order:
        beside = [place for module, place in order.items() if module.startswith(f"{path}." if path else "")]
        if beside or not path:
            return min(beside, default=None)
        path = path.rpartition(".")[0]
    return order[path]


def _expected(name: str) -> bool:
    """Whether a parameter is known to go unused on purpose: a pooler, an expert that no token chose, a mask token."""
    return any(word in name for word in EXPECTED_UNUSED)


def frozen(view: View) -> list[Finding]:
    """Find parameters that should train and do not: no optimizer, no gradient, or no update."""
    grid = view.grid("parameters")
    if len(grid.steps) < 2 or not view.run.parameters:
        return []
    starved = [name for name in _without_gradient(view) if not _expected(name)]
    ends = [_end(view, profile, starved) for profile in profiles(view)] if starved else []
    told = {name for end in ends if end is not None for name in end[2]}
    blocked_names = [name for finding in blocked(view) for name in finding.where]
    known = {p.name: p for p in view.run.parameters if p.requires_grad and p.name not in told}
    groups: dict[str, list[str]] = {"optimizer": [], "graph": [], "update": []}
    stopped = _never_updated(view) & ~_rounded_away(view)
    gradient = np.asarray(grid.raw("grad_sq")[1].any(axis=0))
    some = np.asarray((grid["grad_sq"] > 0).any(axis=0))
    optimizers = bool(view.run.meta.get("optimizers"))
    for i, name in enumerate(grid.names):
        if name not in known or any(name.startswith(f"{place}.") for place in blocked_names):
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
    harmless = cause == "graph" and (share < SHARE.value or all(_expected(name) for name in names))
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


BLOCKED: Rule = Rule(
    code="blocked-gradient",
    says="signal passes, gradient does not",
    severities=("error", "warning"),
    criterion=(
        "A branch over a thousandth of the skip whose gradient is zero at every recent sampled step; or a point of a "
        "stream before which there is signal, no gradient, and trainable weights."
    ),
    thresholds=(ZERO,),
    source="PyTorch, Autograd mechanics: locally disabling gradient computation",
    picture="gain-depth",
    check=blocked,
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
