"""Attention read from a sample of its queries: entropy, largest logit, keys. The whole matrix is never computed again.

Pure functions of tensors. A sample has the shape (sequence, head, query, key): everything where that is little, else 16
queries a head, and at most `HEADS` heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradflow import geometry, statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.statistics import Number

QUERIES = 64
"""Queries sampled a head where all logits of the sample are at most `LOGITS`."""
FEWEST_QUERIES = 16
"""Queries sampled a head otherwise, and taken from each sequence before fewer sequences are taken."""
HEADS = 32
"""Heads sampled."""
LOGITS = 2**14
"""Logits of a sample: they are computed again, and their softmax with them."""
MASKED = -1e4
"""Logits and mask values below this shut a key out: masks are -inf, the smallest number of a type, or about -1e4."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Indices of a sample of attention of shape (sequence, head, query, key), on the device of the tensors."""

    sequences: Tensor
    heads: Tensor
    queries: Tensor

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, shape: tuple[int, ...], device: torch.device) -> Sample:
        """The sample of attention of `shape` (sequences, heads, queries, keys)."""
        sequences, heads, queries, keys = shape
        heads_taken = min(heads, HEADS)
        most = QUERIES if QUERIES * heads_taken * keys <= LOGITS else FEWEST_QUERIES
        take = queries
        if sequences * queries > most:
            take = min(queries, max(most // sequences, FEWEST_QUERIES))
        return cls(
            geometry.spread(sequences, min(sequences, max(most // max(take, 1), 1)), device),
            geometry.spread(heads, heads_taken, device), geometry.spread(queries, take, device),
        )  # fmt: skip

    def rows(self, x: Tensor) -> Tensor:
        """Sampled rows of x (sequence, head, query, any), where axes of length one stand for all: (s, h, q, any)."""
        for axis, index in enumerate((self.sequences, self.heads, self.queries)):
            x = _taken(x, axis, index)
        return x.expand(len(self.sequences), len(self.heads), len(self.queries), -1)


def _taken(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Places of an axis, evenly spread; a view where that is all of them, or the first."""
    length = x.shape[axis]
    if length == 1 or len(index) == length:
        return x
    return x.narrow(axis, 0, 1) if len(index) == 1 else x.index_select(axis, index)


@dataclass(frozen=True, slots=True)
class Logits:
    """Sampled logits (sequence, head, query, key) as they enter the softmax, and where a key may be attended to.

    `allowed` broadcasts to them; None allows all.
    """

    values: Tensor
    allowed: Tensor | None = None


def columns(of: Sequence[Logits]) -> list[dict[str, Number]]:
    """Columns of the `attention` table of several samples, those of one shape together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, each in enumerate(of):
        key = (each.values.shape, each.values.dtype, each.values.device, each.allowed is None)
        groups.setdefault(key, []).append(i)
    found: dict[int, dict[str, Number]] = {}
    for places in groups.values():
        logits = torch.stack([of[i].values for i in places])
        masks = [mask for i in places if (mask := of[i].allowed) is not None]
        allowed = masks[0] if masks else None
        if any(mask is not allowed for mask in masks):
            allowed = torch.stack([mask.expand(logits.shape[1:]) for mask in masks])
        figures = {name: statistics.numbers(values) for name, values in attention_columns(logits, allowed).items()}
        found.update((i, {name: values[at] for name, values in figures.items()}) for at, i in enumerate(places))
    return [found[i] for i in range(len(of))]


def attention_columns(logits: Tensor, allowed: Tensor | None = None) -> dict[str, Tensor]:
    """Columns of the `attention` table from sampled logits (..., sequence, head, query, key) → (...).

    entropy: mean over heads and queries of −Σ p ln p, nat, from 0 (one key) to ln(keys). entropy_min: the smallest
    mean of one head. logit_max: largest logit among the keys that are not masked. keys: mean number of those. Queries
    without any key are left out; NaN where none is left. `allowed` is True where a key may be attended to; logits below
    `MASKED` are masked besides.
    """
    logits = statistics.wide(logits)
    kept = logits > MASKED
    if allowed is not None:
        kept = kept & allowed
    shown = logits.masked_fill(~kept, -math.inf)
    count = kept.sum(-1)
    none = count == 0
    weights = torch.softmax(shown, -1)
    entropy = (0 - torch.xlogy(weights, weights).sum(-1)).masked_fill(none, 0)
    by_head, keys, queries = entropy.sum((-3, -1)), count.sum((-3, -2, -1)), (~none).sum((-3, -1))
    lowest = (by_head / queries).masked_fill(queries == 0, math.inf).amin(-1)
    largest, valid = shown.amax((-4, -3, -2, -1)), queries.sum(-1)
    return {
        "entropy": by_head.sum(-1) / valid, "entropy_min": lowest.masked_fill(valid == 0, math.nan),
        "logit_max": largest.masked_fill(valid == 0, math.nan), "keys": keys.to(logits.dtype) / valid,
    }  # fmt: skip


@lru_cache(maxsize=256)
def _causal(queries: int, taken: int, keys: int, device: torch.device) -> Tensor:
    """Which keys come no later than each sampled query: (query, key), one tensor for all layers of one shape."""
    return torch.arange(keys, device=device) <= geometry.spread(queries, taken, device)[:, None]


def of_products(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Logits:
    """A sample of `scaled_dot_product_attention`.

    query (..., head, query, width), key (..., head, key, width) with as many heads or fewer (grouped queries). mask
    broadcasts to (..., query, key): boolean, True where a key may be attended to, or added to the logits.
    """
    query, key = _four(query), _four(key)
    count, heads, length = query.shape[:3]
    sample = Sample.of((count, heads, length, key.shape[2]), query.device)
    groups = heads // max(key.shape[1], 1)
    taken = _taken(key, 0, sample.sequences)
    taken = taken.index_select(1, sample.heads // groups) if groups > 1 else _taken(taken, 1, sample.heads)
    rows = statistics.wide(sample.rows(query))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = rows @ statistics.wide(taken).to(rows.dtype).mT * factor
    allowed = None
    if causal:
        allowed = _causal(length, len(sample.queries), key.shape[2], key.device)
    if mask is not None:
        shown = sample.rows(_four(mask.detach()).expand(-1, -1, length, -1))
        if mask.dtype == torch.bool:
            allowed = shown if allowed is None else shown & allowed
        else:
            logits = logits + shown.to(logits.dtype)
    return Logits(logits, allowed)


def of_logits(logits: Tensor) -> Logits:
    """A sample, in memory of its own, of logits (..., head, query, key) that a softmax over the last axis took."""
    logits = _four(logits)
    return Logits(Sample.of(tuple(logits.shape), logits.device).rows(logits).clone())


def of_projections(call: dict[str, Any]) -> Logits:
    """A sample of `torch.nn.functional.multi_head_attention_forward`, from its arguments by name.

    Sampled queries, and the keys of the sampled sequences, are projected again.
    """
    query, key = (x.detach() if x.dim() == 3 else x.detach().unsqueeze(1) for x in (call["query"], call["key"]))
    length, count, width = query.shape
    heads = call["num_heads"]
    sample = Sample.of((count, heads, length, key.shape[0]), query.device)
    (query_weight, query_bias), (key_weight, key_bias) = _projections(call, width)
    rows = _mapped(query[sample.queries][:, sample.sequences], query_weight, query_bias)
    keys = _mapped(key[:, sample.sequences], key_weight, key_bias)
    extra = 0
    if call.get("bias_k") is not None:
        keys = torch.cat([keys, statistics.wide(call["bias_k"]).to(keys.dtype).expand(1, keys.shape[1], -1)])
        extra += 1
    if call.get("add_zero_attn"):
        keys = torch.cat([keys, torch.zeros_like(keys[:1])])
        extra += 1
    rows, keys = (x.view(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)[:, sample.heads] for x in (rows, keys))
    logits = rows @ keys.mT * rows.shape[-1] ** -0.5
    allowed = None
    for mask in _masks(call, count, heads):
        shown = sample.rows(mask)
        shut = torch.nn.functional.pad(shown, (0, extra))
        if shown.dtype == torch.bool:
            allowed = ~shut if allowed is None else allowed & ~shut
        else:
            logits = logits + shut.to(logits.dtype)
    return Logits(logits, allowed)


def _projections(call: dict[str, Any], width: int) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    bias = call["in_proj_bias"]
    biases = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    if call.get("use_separate_proj_weight"):
        return (call["q_proj_weight"], biases[0]), (call["k_proj_weight"], biases[1])
    weight = call["in_proj_weight"]
    return (weight[:width], biases[0]), (weight[width : 2 * width], biases[1])


def _mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = statistics.wide(x), statistics.wide(weight)
    out = x.to(weight.dtype) @ weight.mT
    return out if bias is None else out + statistics.wide(bias)


def _masks(call: dict[str, Any], count: int, heads: int) -> list[Tensor]:
    """Masks as (sequence, head, query, key); True shuts a key out."""
    found = []
    mask, padding = call.get("attn_mask"), call.get("key_padding_mask")
    if mask is not None:
        mask = mask.detach()
        each = mask.dim() == 3 and mask.shape[0] == count * heads
        found.append(mask.view(count, heads, *mask.shape[1:]) if each else _four(mask))
    if padding is not None:
        padding = padding.detach() if padding.dim() == 2 else padding.detach().unsqueeze(0)
        found.append(padding[:, None, None, :])
    return [mask != 0 if not mask.is_floating_point() else mask for mask in found]


def _four(x: Tensor) -> Tensor:
    """(..., head, query, any) as four axes: the first counts sequences, all between it and the last two are heads."""
    x = x.detach()
    if x.dim() > 4:
        return x.flatten(1, -3)
    while x.dim() < 4:
        x = x.unsqueeze(0)
    return x
