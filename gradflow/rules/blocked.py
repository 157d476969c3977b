"""`blocked-gradient`: signal without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.records import Finding
from gradflow.rules.depth import profiles
from gradflow.rules.registry import Rule, Threshold
from gradflow.rules.texts import listed, unique
from gradflow.rules.view import half_precision, lasting, median, window

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradflow.rules.depth import Profile
    from gradflow.rules.view import View

ZERO = Threshold(
    "blocked-gradient.zero",
    "gradient energy through the branch over what its signal predicts", 1e-10, "1", "float32 rounding of a zero"
)  # fmt: skip
LIVE = 1e-3
"""Branch over skip from which a branch counts as live."""
EXPECTED_UNUSED = ("pooler", "expert", "mask_token", "masked_spec")
WHY_BLOCKED = (
    "A detach, a no_grad block or a conversion to numpy cuts the graph there: what lies before keeps its initial "
    "weights or learns through other paths only."
)

WHY_FLAT = (
    "The derivative of a step is zero wherever there is one: what lies before it learns nothing (Bengio et al. 2013, "
    "arXiv:1308.3432)."
)
ROUNDING = 1e-12
"""RMS gradient over which a zero right before it is not one of float32's range."""
MANY = 0.5
"""Share of idle units or saturated elements of a layer that may itself leave no gradient."""


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
    starved = without_gradient(view)
    return [int(i) for i in found if certain[i] or any(map(within(view, grid.names[i]), starved))]


def within(view: View, branch: str) -> Callable[[str], bool]:
    """Whether a parameter is inside a branch, by its name: from its first layer, or the norm before, to its last."""
    first, _, last = branch.partition("@")[0].partition("-")
    grid = view.grid("layers")
    layers, kinds = [name.partition("@")[0] for name in grid.names], grid.text("kind")
    begin = next((i for i, name in enumerate(layers) if f"{name}.".startswith(f"{first}.")), len(layers))
    end = next((i for i in range(begin, len(layers)) if last and f".{layers[i]}".endswith(f".{last}")), begin)
    begin -= begin > 0 and "norm" in kinds[begin - 1].lower()
    prefixes = tuple(f"{name}." for name in (first, *layers[begin : end + 1]))
    return lambda name: name.startswith(prefixes)


def _blocked_branches(view: View) -> list[Finding]:
    grid = view.grid("branches")
    found = blocked_branches(view)
    if not found:
        return []
    names = [grid.names[i] for i in found]
    inside = [within(view, name) for name in names]
    starved = [name for name in without_gradient(view) if any(holds(name) for holds in inside)]
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


def without_gradient(view: View) -> list[str]:
    """Trainable parameters in an optimizer that had no gradient at all (not even zero) at the end of the run."""
    grid = view.grid("parameters")
    if not len(grid.steps):
        return []
    _, known = grid.raw("grad_sq")
    dead = np.asarray(~known[window(len(grid.steps))].any(axis=0))
    trainable = {p.name for p in view.run.parameters if p.requires_grad and p.group is not None}
    return [name for name, none in zip(grid.names, dead, strict=True) if none and name in trainable]


def _blocked_depth(view: View) -> list[Finding]:
    starved = [name for name in without_gradient(view) if not expected_unused(name)]
    cuts = [_cut(view, profile, starved) for profile in profiles(view)] if starved else []
    flat = _of_zero_gradient(view)
    cuts += [_cut(view, profile, flat, flat=True) for profile in profiles(view)] if flat else []
    return [finding for finding in cuts if finding is not None]


def _of_zero_gradient(view: View) -> list[str]:
    """Trainable parameters whose gradient is exactly zero at every recent step, by no rounding and no idle units."""
    grid, layers = view.grid("parameters"), view.grid("layers")
    if not len(grid.steps) or half_precision(view):
        return []
    if len(layers.steps):
        recent = window(len(layers.steps))
        with np.errstate(invalid="ignore", divide="ignore"):
            idle = (layers["dead_units"] / layers["units"] > MANY) | (layers["saturated"] / layers["n"] > MANY)
        if idle[recent].any():
            return []
    last = grid["grad_sq"][window(len(grid.steps))]
    trainable = {p.name for p in view.run.parameters if p.requires_grad and p.group is not None}
    return [name for name, zero in zip(grid.names, (last == 0).all(axis=0), strict=True) if zero and name in trainable]


def cut_end(
    view: View, profile: Profile, starved: list[str], *, flat: bool = False
) -> tuple[int, int, list[str]] | None:
    """First point with a gradient, the last before it with a signal alone, and the trainable weights on that side.

    A `flat` cut is one behind which the gradient is there and exactly zero.
    """
    recent = profile.recent
    alive = np.asarray((profile.grad_rms > ROUNDING if flat else profile.reached)[recent].any(axis=0))
    if flat and (profile.grad[recent][:, ~alive] != 0).any():
        return None
    signal = np.asarray((profile.rms[recent] > 0).any(axis=0))
    if not alive.any() or not signal[: int(np.argmax(alive))].any():
        return None
    first = int(np.argmax(alive))
    before = [point for point in range(first) if signal[point]]
    if not before or not alive[first:].all():
        return None
    inside = _before(view, profile.points[first], starved)
    return (first, before[-1], inside) if inside else None


def _cut(view: View, profile: Profile, starved: list[str], *, flat: bool = False) -> Finding | None:
    """A point behind which the gradient is gone while the signal passed, with trainable weights on the starved side."""
    found = cut_end(view, profile, starved, flat=flat)
    recent = profile.recent
    samples = len(profile.steps[recent])
    if found is not None:
        first, before, inside = found
        after, where = profile.points[first], unique([*profile.names(first), *profile.names(before)])
        expected = float(median(profile.grad[recent, first]))
    elif flat and (end := _flat_end(view, profile, starved)):
        before, (after, inside, expected) = len(profile.points) - 1, end
        where = unique([*profile.names(before), after])
    else:
        return None
    return Finding(
        code="blocked-gradient",
        severity="error",
        where=where,
        steps=(int(profile.steps[0]), int(profile.steps[-1])),
        claim=(
            f"The gradient ends between {profile.points[before]} and {after}: the signal passes, "
            f"but nothing comes back before it, and {len(inside)} trainable parameters there have "
            f"{'a gradient of exactly zero' if flat else 'no gradient'}."
        ),
        evidence={
            "quantity": "gradient at the points before the cut",
            "stream": profile.name,
            "measured": 0.0,
            "expected": expected,
            "expected_from": "the gradient at the first point that has one",
            "threshold": 0.0,
            "threshold_from": "a connected graph has some",
            "parameters_without_gradient": inside[:8],
            "sampled_steps": samples,
        },
        why=WHY_FLAT if flat else WHY_BLOCKED,
        remedy=(
            f"Look for round, sign, argmax or a comparison right before {after} and pass the gradient "
            "straight through it: x + (round(x) - x).detach()."
            if flat
            else f"Look for .detach(), torch.no_grad() or .data right before {after} and remove it."
        ),
        remedy_2="If what comes before is frozen on purpose, set requires_grad=False there to say so.",
        confidence="high" if samples >= 3 else "low",
    )


def _flat_end(view: View, profile: Profile, starved: list[str]) -> tuple[str, list[str], float] | None:
    """Where no point has a gradient: the next layer, the weights before it, and the gradient norm of those after."""
    layers, grid = view.grid("layers").names, view.grid("parameters")
    last = profile.points[-1]
    if (profile.grad[profile.recent] != 0).any() or last not in layers[:-1]:
        return None
    order = {name: i for i, name in enumerate(layers)}
    inside = [name for name in starved if (place := _place(name, order)) is not None and place <= order[last]]
    late = [i for i, name in enumerate(grid.names) if (_place(name, order) or 0) > order[last]]
    energy = grid["grad_sq"][window(len(grid.steps))][:, late]
    if not inside or not late or not (energy > ROUNDING**2).any(axis=0).all():
        return None
    return layers[order[last] + 1], inside, float(np.sqrt(median(energy.sum(axis=1))))


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


def expected_unused(name: str) -> bool:
    """Whether a parameter is known to go unused on purpose: a pooler, an expert that no token chose, a mask token."""
    return any(word in name for word in EXPECTED_UNUSED)


BLOCKED: Rule = Rule(
    code="blocked-gradient",
    says="signal passes, gradient does not",
    severities=("error", "warning"),
    criterion=(
        "A branch over a thousandth of the skip whose gradient is zero at every recent sampled step; or a point of a "
        "stream before which there is signal, no gradient (or one of exactly zero that neither rounding nor idle units "
        "explain), and trainable weights."
    ),
    thresholds=(ZERO,),
    source="PyTorch, Autograd mechanics: locally disabling gradient computation",
    picture="gain-depth",
    check=blocked,
)
