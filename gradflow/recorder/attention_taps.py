"""Reads attention in a running pass: `scaled_dot_product_attention`, `MultiheadAttention`, and attention by hand."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow import attention
from gradflow.residuals import families

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.recorder.buffer import Buffer
    from gradflow.records import Node
    from gradflow.statistics import Number

ATTENTION = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward", "softmax"})
"""Operations that are attention, or may be its softmax."""
_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})
_BETWEEN = families.VIEWS | families.DROPOUT | frozenset({
    "mul", "div", "add", "sub", "masked_fill", "where", "tanh", "clamp", "clamp_min", "clamp_max", "maximum", "max",
    "masked_fill_", "getitem", "neg", "nan_to_num", "cat",
})  # fmt: skip
"""What stands between the product of queries and keys and its softmax, or between the softmax and the values."""
_FARTHEST = 16
_HELD = 2**22
"""Logits that are kept until the pass is complete: those of layers of one shape are measured together."""
_PROJECTIONS = inspect.signature(nn.functional.multi_head_attention_forward)
_PRODUCT = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(slots=True)
class _Call:
    """One call: the softmax that may turn out to be none, and the logits until they are measured."""

    name: str
    softmax: int | None
    logits: attention.Logits | None
    values: dict[str, Number] | None = None


class AttentionTaps:
    """The attention calls of one pass; names count occurrences."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._seen: Counter[str] = Counter()
        self._calls: list[_Call] = []
        self._held = 0

    def call(
        self, op: str, node: int, nodes: Sequence[Node], args: tuple[Any, ...], kwargs: dict[str, Any], *, grad: bool
    ) -> None:
        """Read a call of one of `ATTENTION`, which made `node` (runs at every one of a sampled step)."""
        softmax = node if op == "softmax" else None
        if op == "softmax":
            counts = _over_last_axis(args, kwargs) and _is_score(nodes, nodes[node].parents[0])
            logits = attention.of_logits(args[0]) if counts else None
        elif op == "scaled_dot_product_attention":
            logits = _of_products({**dict(zip(_PRODUCT, args, strict=False)), **kwargs})
        else:
            logits = attention.of_projections(dict(_PROJECTIONS.bind(*args, **kwargs).arguments))
        if logits is None:
            return
        self._calls.append(_Call(self._name(nodes[node], grad=grad), softmax, logits))
        self._held += logits.values.numel()
        if self._held > _HELD:
            self._measure()

    def _measure(self) -> None:
        """Measure the logits that are held, and let go of them."""
        held = [(call, call.logits) for call in self._calls if call.logits is not None]
        for (call, _), values in zip(held, attention.columns([logits for _, logits in held]), strict=True):
            call.values, call.logits = values, None
        self._held = 0

    def finish(self, nodes: Sequence[Node]) -> None:
        """The pass is complete: of the softmaxes, those whose result weights values are attention."""
        self._measure()
        reached = _weights(nodes, {call.softmax for call in self._calls if call.softmax is not None})
        for call in self._calls:
            if call.values is not None and (call.softmax is None or call.softmax in reached):
                self._buffer.put("attention", call.name, call.values)
        self.drop()

    def drop(self) -> None:
        """Forget the calls so far: they were part of no pass."""
        self._calls.clear()
        self._seen.clear()
        self._held = 0

    def _name(self, node: Node, *, grad: bool) -> str:
        """The module that calls, with an occurrence where it calls several times in the pass."""
        base = node.scope or node.op
        key = base if grad else f"{base}@nograd"
        count = self._seen[key]
        self._seen[key] += 1
        name = f"{base}@{count}" if count else base
        return name if grad else f"{name}@nograd"


def _of_products(call: dict[str, Any]) -> attention.Logits | None:
    query, key, mask = call["query"], call["key"], call.get("attn_mask")
    readable = all(x.layout == torch.strided and x.numel() for x in (query, key))
    if not readable or query.dim() < 2:
        return None
    scale = call.get("scale")
    return attention.of_products(
        query, key, mask=mask, causal=bool(call.get("is_causal")), scale=None if scale is None else float(scale)
    )


def _over_last_axis(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    x = args[0] if args else None
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel() or not isinstance(axis, int):
        return False
    return axis % x.dim() == x.dim() - 1


def _is_score(nodes: Sequence[Node], index: int) -> bool:
    """Whether a tensor is a product of two signals, up to scaling, masks and the like."""
    queue, seen = [(index, 0)], set()
    while queue:
        current, far = queue.pop()
        node = nodes[current]
        if current in seen or far > _FARTHEST or not node.floating:
            continue
        seen.add(current)
        if node.op in _PRODUCTS:
            signals = [p for p in node.parents if nodes[p].floating and not _is_weight(nodes, p)]
            if len(signals) > 1:
                return True
        elif node.op in _BETWEEN:
            queue.extend((parent, far + 1) for parent in node.parents)
    return False


def _is_weight(nodes: Sequence[Node], index: int) -> bool:
    """Whether a tensor is a parameter in another shape."""
    while nodes[index].op in families.VIEWS and nodes[index].parents:
        index = nodes[index].parents[0]
    return nodes[index].op in {"parameter", "constant"}


def _weights(nodes: Sequence[Node], softmaxes: set[int]) -> set[int]:
    """Those of the nodes that are multiplied with values."""
    if not softmaxes:
        return set()
    origins: dict[int, int] = {node: node for node in softmaxes}
    found = set()
    for node in nodes[min(softmaxes) :]:
        for parent in node.parents:
            if parent not in origins:
                continue
            if node.op in _PRODUCTS:
                found.add(origins[parent])
            elif node.op in _BETWEEN and node.index not in origins:
                origins[node.index] = origins[parent]
    return found
