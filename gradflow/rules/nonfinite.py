"""`nonfinite`: the first NaN or infinity, with everything that it broke afterwards as one finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold

if TYPE_CHECKING:
    from gradflow.rules.faults import Fault
    from gradflow.rules.view import View

WHY = (
    "Every value that reads a NaN becomes NaN: the loss, then all gradients, then, after one optimizer step, all "
    "weights; nothing is learned from there on (Micikevicius et al. 2018, arXiv:1710.03740, on overflow in half "
    "precision)."
)
REMEDIES = {
    "forward": (
        (
            "Look at the operation of {first} on the batch of step {step}: add an epsilon inside divisions, logs and "
            "roots, clamp the argument of exp, and check the batch itself for NaN."
        ),
        (
            "Lower the learning rate or add warm-up and gradient clipping (1.0) if the signal grew before; in fp16, "
            "use bf16."
        ),
    ),
    "backward": (
        (
            "Look at the operations after {first} whose derivative is infinite where their value is finite: sqrt, "
            "norm and pow at 0, log near 0, where() around a division; add an epsilon inside them."
        ),
        (
            "In fp16, scale the loss (torch.amp.GradScaler) or use bf16; otherwise clip gradients and lower the "
            "learning rate."
        ),
    ),
    "loss": (
        (
            "Every layer's output was finite, so look at the loss function: log of 0 (use the fused form, "
            "cross_entropy or binary_cross_entropy_with_logits on logits), division by an empty mask (clamp the count)."
        ),
        "Look for targets that are NaN or out of range, and compute the loss in float32.",
    ),
    "update": (
        (
            "The activations were finite: look at what writes to {first} after the backward pass (clipping of a zero "
            "or infinite norm, a custom optimizer, weight decay schedules), and lower the learning rate."
        ),
        "Clip the gradient's norm with error_if_nonfinite=True to stop at the first broken gradient.",
    ),
}

INHERITED = {
    False: (
        " Weights were broken before that step, so it began after the sampled step before it; nan_guard=True records "
        "the step itself."
    ),
    True: " Weights were broken before that step, by the update of the step before it.",
}


def _first(fault: Fault) -> str:
    """The most precise name of the place where it began."""
    if fault.direction == "loss":
        return "loss"
    for names in (fault.layers, fault.branches, fault.points, fault.parameters):
        if names:
            return names[0]
    return "the model"


def _around(view: View, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The innermost branch that a layer is in, by its name; for steps at which branches were not measured."""
    names = [branch.name for branch in view.run.branches]
    around = [name for layer in layers for name in names if f"{layer.partition('@')[0]}.".startswith(f"{name}.")]
    return (max(around, key=len),) if around else ()


def _where(view: View, fault: Fault) -> tuple[str, ...]:
    """Place of origin: the layer, the branch that broke first, or the parameter; not what broke as a consequence."""
    if fault.direction == "loss":
        return ("loss",)
    branches = fault.branches or _around(view, fault.layers[:1])
    places = [names[0] for names in (fault.layers, branches) if names] or list(fault.points[:1])
    return tuple(places or fault.parameters[:1])


def _claim(fault: Fault, first: str) -> str:
    count = f"{fault.count} non-finite elements" if fault.count else "NaN or infinity"
    backward = f"the gradient that comes back to the output of {first} was the first"
    if fault.by_parameters:
        backward = f"on the way back the gradient of the parameters of {first} was the first"
    began = {
        "forward": f"{count} first appeared in the output of {first} at step {fault.step}",
        "backward": f"{backward} to be NaN or infinite, at step {fault.step}, while the forward pass was finite",
        "loss": f"the loss became NaN or infinite at step {fault.step} while every recorded layer was finite",
        "update": f"the gradient or update of {first} became NaN or infinite at step {fault.step}",
    }[fault.direction]
    if fault.before and not fault.inherited and fault.direction in {"forward", "backward"}:
        began += f" (that of {fault.before}, right before it, was finite)"
    broken = max(0, len(fault.layers) - 1)
    spread = f"; {broken} more layers and {len(fault.branches)} branches were broken at that step" if broken else ""
    return f"{began[0].upper()}{began[1:]}{spread}."


def check(view: View) -> list[Finding]:
    """Report the first non-finite number; AMP's own skipped overflows and masks of -inf are no error."""
    fault = view.fault
    if fault is None or fault.skipped:
        return []
    first = _first(fault)
    remedy, second = (text.format(first=first, step=fault.step) for text in REMEDIES[fault.direction])
    claim = _claim(fault, first)
    if fault.inherited:
        claim += INHERITED[bool(view.run.meta.get("config", {}).get("nan_guard"))]
    if fault.contained:
        claim += " Loss and gradients stayed finite, as with masks of -inf."
    return [
        Finding(
            code="nonfinite",
            severity="info" if fault.contained else "error",
            where=_where(view, fault),
            steps=(fault.step, fault.last),
            claim=claim,
            evidence={
                "direction": fault.direction,
                "measured": fault.count if fault.count is not None else "non-finite sums",
                "expected": 0,
                "threshold": 0,
                "threshold_from": "a finite computation has none",
                "sampled_steps_broken": fault.steps_broken,
                "sampled_steps_since": fault.steps_since,
                "last_finite_layer": fault.before or None,
                "consequences_layers": list(fault.layers[1:9]),
                "consequences_branches": list(fault.branches[:8]),
                "consequences_parameters": len(fault.parameters),
                "loss_scale_in_use": fault.scaled,
            },
            why=WHY,
            remedy=remedy,
            remedy_2=second,
            confidence="low" if fault.contained or fault.inherited or first == "the model" else "high",
        )
    ]


RULE: Rule = Rule(
    code="nonfinite",
    says="NaN or infinity: the first layer and step where it appeared, forwards or backwards",
    severities=("error", "info"),
    criterion=(
        "A NaN or infinite element in any recorded tensor, loss or gradient. Overflows that AMP's loss scaler skips "
        "(gradients only, on at most half of the steps since) are none; infinities that leave loss and gradients "
        "finite are info."
    ),
    thresholds=(Threshold("nonfinite.count", "non-finite elements", 0, "elements", "a finite computation has none"),),
    source="Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740",
    picture="loss",
    check=check,
)
