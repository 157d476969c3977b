"""Measures the additions of a running pass, those inside other operations too: what is added, and what comes of it.

A product that an operation adds without giving it out (`addcmul`, `addmm`) is computed once more, in the operands' own
precision, autocast or not. The partial sums of a sum over a stack are computed as Python's `sum` would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradflow.recorder.hooks import undisturbed
from gradflow.recorder.join_taps import JoinTaps
from gradflow.recorder.measurable import measurable
from gradflow.tracing.composites import COMPOSITES, PRODUCTS, factors
from gradflow.tracing.operations import operation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.recorder.join_taps import Sum
    from gradflow.recorder.plans import Plans
    from gradflow.tracing import Tracer

_PLAIN = frozenset({"add", "sub"})
ADDITIONS = _PLAIN | COMPOSITES
Token = tuple[int, "Sum"]


class AdditionTaps:
    """The additions of one pass.

    Attributes:
        joins: Their figures.
        fingerprints: By addition, the tracer's fingerprint of the pass before it.
    """

    def __init__(self, tracer: Tracer, plans: Plans, rows: int) -> None:
        self.joins = JoinTaps(rows)
        self.fingerprints: dict[int, int] = {}
        self._tracer = tracer
        self._plans = plans

    def before(
        self, op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: tuple[int | None, ...]
    ) -> Token | None:
        """Measure what an addition that may be a join is about to add (runs at every one of a sampled step)."""
        one, other, *stack = operands if len(operands) > 1 else (None, None)
        if one is None or other is None or not _summable(op, args):
            return None
        before = self._tracer.fingerprint()
        if op == "sum":
            with undisturbed():
                return self._before_sum(args[0], stack[0] or 0, before)
        role = self._role(before, (one, other))
        if role == "other":
            return None
        self._renew_edges(args, operands if op in _PLAIN else None)
        with undisturbed():
            added = _added(op, args)
            if added is None:
                return None
            scales = _scales(op, args, kwargs)
            addition = len(self._tracer.nodes)
            inplace = operation(func).inplace
            return before, self._measured(added, (one, other), role, addition, scales=scales, inplace=inplace)

    def after(self, token: Token, node: int, call: int, out: Tensor) -> None:
        """Measure the result of an addition."""
        self.fingerprints[node], entry = token
        total = measurable(out)
        if total is not None:
            self.joins.after(entry, node, call, total)

    def _renew_edges(self, args: tuple[Any, ...], nodes: tuple[int | None, ...] | None) -> None:
        """Ask once more what made the arguments: a custom function gives its result another node when it is done."""
        for place, value in enumerate(args):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                node = self._tracer.node_of(value) if nodes is None else nodes[place]
                if node is not None:
                    self._tracer.edges[node] = (value.grad_fn, value.output_nr)

    def _role(self, before: int, numbers: tuple[int, int]) -> str:
        """What earlier passes know of an addition of two nodes, by the fingerprint of the pass `before` it."""
        nodes = self._tracer.nodes
        if "parameter" in (nodes[numbers[0]].op, nodes[numbers[1]].op):
            return "other"
        return self._plans.roles.get(before, "new")

    def _measured(
        self, added: tuple[Tensor, Tensor], numbers: tuple[int, int], role: str, addition: int, *,
        scales: tuple[float, float] = (1.0, 1.0), inplace: bool = False, stack: int = -1,
    ) -> Sum:  # fmt: skip
        keep = role in {"new", "partial"} and not any(x.is_inference() for x in added)
        return self.joins.before(
            added, numbers, scales, self._tracer.nodes, addition=addition, inplace=inplace, keep=keep, stack=stack
        )

    def _before_sum(self, stacked: Tensor, stack: int, fingerprint: int) -> Token | None:
        """Measure the additions of a sum over a stack, of which all but the last one happen nowhere but here."""
        nodes, whole = self._tracer.nodes, measurable(stacked)
        if whole is None:
            return None
        parts, values = nodes[stack].parents, whole.detach().unbind(nodes[stack].detail["dim"])
        number, total, addition = parts[0], values[0], len(nodes) - (len(parts) - 2)
        for part, value in zip(parts[1:], values[1:], strict=True):
            before = hash((fingerprint, addition))
            role = self._role(before, (number, part))
            entry = None
            if role != "other":
                entry = self._measured((total, value), (number, part), role, addition, stack=stack)
            if addition == len(nodes):
                return None if entry is None else (before, entry)
            total = total + value
            if entry is not None:
                self.after((before, entry), addition, nodes[addition].call, total)
            number, addition = addition, addition + 1
        return None


def _summable(op: str, args: Sequence[Any]) -> bool:
    """Whether the operands can be parts of a join: real tensors with features."""
    tensors = [x for x in (args[:2] if op in _PLAIN else args) if isinstance(x, Tensor)]
    real = all(x.is_floating_point() and x.layout == torch.strided for x in tensors)
    return real and all(x.dim() > 0 for x in tensors[:2])


def _scales(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float]:
    """What the addition multiplies its operands by."""
    if op in _PLAIN:
        return 1.0, float(kwargs.get("alpha", 1)) * (-1 if op == "sub" else 1)
    return factors(op, args, kwargs) or (1.0, 1.0)


def _added(op: str, args: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """The two operands without their factors; None if they cannot be measured."""
    if op in _PLAIN:
        x, y = measurable(args[0]), measurable(args[1])
        return None if x is None or y is None else (x, y)
    tensors = [x for x in args if isinstance(x, Tensor)]
    if any(measurable(x) is not x for x in tensors):
        return None
    x, *others = (x.detach() for x in tensors)
    if op == "lerp":
        y, *weight = others
        return (x * (1 - weight[0]), y * weight[0]) if weight else (x, y)
    kind = torch.promote_types(others[0].dtype, others[1].dtype)
    product: Tensor = getattr(torch, PRODUCTS[op])(*(factor.to(kind) for factor in others))
    return x, product.sum(0) if op == "addbmm" else product
