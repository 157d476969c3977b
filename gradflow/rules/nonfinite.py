"""`nonfinite`: the first NaN or infinity, with everything that it broke afterwards as one finding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradflow.records import Finding
from gradflow.rules.registry import Rule, Threshold
from gradflow.schema import OUTSIDE

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
            "Look at {first} on the batch of step {step}: add an epsilon inside divisions, logs and roots, clamp the "
            "argument of exp, and check the batch itself for NaN."
        ),
        (
            "Lower the learning rate or add warm-up and gradient clipping (1.0) if the signal grew before; in fp16, "
            "use bf16."
        ),
    ),
    "backward": (
        (
            "Look at {after} for a derivative that is infinite where the value is finite: sqrt, norm and pow at 0, log "
            "near 0, where() around a division; add an epsilon inside."
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

GIVEN = frozenset({"input", "parameter"})
"""What stands for an operation where a pass was given broken numbers: its batch, a weight."""
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
    if _is_between(fault):
        return fault.named.place
    for names in (fault.layers, fault.branches, fault.points, fault.parameters):
        if names:
            return names[0]
    return "the model"


def _is_between(fault: Fault) -> bool:
    """Whether the operation that it began in is one of code between layers, not a layer's own."""
    named = fault.named
    layers = {layer.partition("@")[0] for layer in fault.layers}
    known = bool(named.operation) and named.operation not in GIVEN and named.direction == fault.direction
    return known and named.module not in layers


def _after(fault: Fault) -> tuple[str, ...]:
    """Layers that broke in consequence."""
    return fault.layers if _is_between(fault) else fault.layers[1:]


def _around(view: View, places: tuple[str, ...]) -> tuple[str, ...]:
    """The innermost branch that a layer or operation is in, by its name; for steps without measured branches."""
    names = [branch.name for branch in view.run.branches]
    around = [name for place in places for name in names if f"{place.partition('@')[0]}.".startswith(f"{name}.")]
    return (max(around, key=len),) if around else ()


def _where(view: View, fault: Fault, first: str) -> tuple[str, ...]:
    """Place of origin: operation or layer, the branch that broke first, or the parameter; not what broke afterwards."""
    if fault.direction == "loss":
        return ("loss",)
    branches = fault.branches or _around(view, (first,)) or _around(view, fault.layers[:1])
    places = [names[0] for names in (fault.layers, branches) if names] or list(fault.points[:1])
    between = [first] if _is_between(fault) else []
    return tuple(dict.fromkeys(between + places or fault.parameters[:1]))


def _claim(fault: Fault, first: str) -> str:
    began = _began(fault, first)
    if fault.before and not fault.inherited and fault.direction in {"forward", "backward"} and not _is_between(fault):
        began += f" (that of {fault.before}, right before it, was finite)"
    after = len(_after(fault))
    more = "" if _is_between(fault) else "more "
    spread = f"; {after} {more}layers and {len(fault.branches)} branches were broken at that step" if after else ""
    untold = f" Which operation it was could not be told: {fault.named.reason}." if fault.named.reason else ""
    return f"{began[0].upper()}{began[1:]}{spread}.{untold}"


def _began(fault: Fault, first: str) -> str:
    """Where and when it began, with the operation where that is known."""
    named, step = fault.named, fault.step
    count = f"{fault.count} non-finite elements" if fault.count else "NaN or infinity"
    operation = named.operation if fault.direction in {named.direction, "loss"} else ""
    if operation == "input":
        return f"{count} came in with the batch of step {step}"
    if fault.direction == "loss" and not operation:
        return f"the loss became NaN or infinite at step {step} while every recorded layer was finite"
    if fault.direction == "loss" or _is_between(fault):
        within = f"in the forward of {named.module}" if named.module else "in the model's own forward"
        operation += ", outside of the model" if named.module == OUTSIDE else f", {within}"
        if fault.direction == "backward":
            return f"on the way back {operation}, was the first to send {count}, at step {step}, of a finite gradient"
        return f"{count} first came out of {operation}, at step {step}, from finite numbers"
    own = f" ({operation})" if operation and operation not in GIVEN else ""
    backward = f"the gradient that comes back to the output of {first}{own} was the first"
    if fault.by_parameters:
        backward = f"on the way back the gradient of the parameters of {first}{own} was the first"
    return {
        "forward": f"{count} first appeared in the output of {first}{own} at step {step}",
        "backward": f"{backward} to be NaN or infinite, at step {step}, while the forward pass was finite",
        "update": f"the gradient or update of {first} became NaN or infinite at step {step}",
    }[fault.direction]


def check(view: View) -> list[Finding]:
    """Report the first non-finite number; AMP's own skipped overflows and masks of -inf are no error."""
    fault = view.fault
    if fault is None or fault.skipped:
        return []
    first = _first(fault)
    after = first if _is_between(fault) else f"the operations after {first}"
    remedy, second = (text.format(first=first, after=after, step=fault.step) for text in REMEDIES[fault.direction])
    claim = _claim(fault, first)
    if fault.inherited:
        claim += INHERITED[bool(view.run.meta.get("config", {}).get("nan_guard"))]
    if fault.contained:
        claim += " Loss and gradients stayed finite, as with masks of -inf."
    return [
        Finding(
            code="nonfinite",
            severity="info" if fault.contained else "error",
            where=_where(view, fault, first),
            steps=(fault.step, fault.last),
            claim=claim,
            evidence={
                "direction": fault.direction,
                "operation": fault.named.operation or None,
                "module": fault.named.module if fault.named.operation else None,
                "measured": fault.count if fault.count is not None else "non-finite sums",
                "expected": 0,
                "threshold": 0,
                "threshold_from": "a finite computation has none",
                "sampled_steps_broken": fault.steps_broken,
                "sampled_steps_since": fault.steps_since,
                "last_finite_layer": fault.before or None,
                "consequences_layers": list(_after(fault)[:8]),
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
    says="NaN or infinity: the first operation, layer and step where it appeared, forwards or backwards",
    severities=("error", "info"),
    criterion=(
        "A NaN or infinite element in any recorded tensor, loss or gradient. Overflows that AMP's loss scaler skips "
        "(gradients only, on fewer than 5 sampled steps or at most half of those since) are none; infinities that "
        "leave loss and gradients finite are info."
    ),
    thresholds=(Threshold("nonfinite.count", "non-finite elements", 0, "elements", "a finite computation has none"),),
    source="Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740",
    picture="loss",
    check=check,
)
