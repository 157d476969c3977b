"""Which axis of a tensor holds its features, followed through the operations that move axes. Pure arithmetic on shapes.

Linear maps put the features last, convolutions at axis 1; everything else hands the axis on. -1 stands for the last.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

Shape = tuple[int, ...]

_LAST = frozenset({
    "linear", "layer_norm", "rms_norm", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu", "bilinear",
    "scaled_dot_product_attention", "multi_head_attention_forward", "addmm",
})  # fmt: skip
_SECOND = frozenset({"conv", "batch_norm", "group_norm", "instance_norm"})
_SWAPS = frozenset({"transpose", "T", "mT"})
_REGROUPS = frozenset({
    "flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze", "expand", "getitem", "select",
})  # fmt: skip
_REDUCTIONS = frozenset({
    "mean", "sum", "amax", "amin", "max", "min", "prod", "logsumexp", "median", "std", "var", "norm",
})  # fmt: skip


def features_axis(op: str, args: tuple[Any, ...], before: Shape, axis: int, after: Shape) -> int:  # noqa: PLR0911
    """Axis of the features in the result of `op`.

    Args:
        op: Canonical name of the operation.
        args: Its positional arguments behind the first operand (axes, where it takes some).
        before: Shape of the first operand.
        axis: Axis of the features in the first operand.
        after: Shape of the result.
    """
    if op in _LAST or len(after) < 2:
        return -1
    if op in _SECOND:
        return _short(1, len(after))
    axis %= max(len(before), 1)
    if op in _SWAPS:
        return _short(_swapped(args, axis, len(before)), len(after))
    if op == "permute":
        return _short(_permuted(args, axis, len(before)), len(after))
    if op in _REDUCTIONS and len(after) < len(before):
        return _short(_reduced(before, axis, after), len(after))
    if op in _REGROUPS:
        return _short(_regrouped(before, axis, after), len(after))
    return _short(axis, len(after)) if len(before) == len(after) else -1


def _short(axis: int, dims: int) -> int:
    return -1 if axis >= dims - 1 else axis


def _swapped(args: tuple[Any, ...], axis: int, dims: int) -> int:
    pair = [a % dims for a in args if isinstance(a, int)] if dims else []
    one, other = pair if len(pair) == 2 else (dims - 1, max(dims - 2, 0))
    return other if axis == one else one if axis == other else axis


def _permuted(args: tuple[Any, ...], axis: int, dims: int) -> int:
    order = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    places = [a % dims for a in order if isinstance(a, int)]
    return places.index(axis) if axis in places else dims - 1


def _reduced(before: Shape, axis: int, after: Shape) -> int:
    """The axis where others were summed away: the last ones whose absence gives the new shape; else the last axis."""
    others = [i for i in range(len(before)) if i != axis]
    for kept in combinations(others, len(after) - 1):
        left = sorted((*kept, axis))
        if tuple(before[i] for i in left) == after:
            return left.index(axis)
    return len(after) - 1


def _regrouped(before: Shape, axis: int, after: Shape) -> int:
    """The axis in the new shape that has the features' size and as many elements before it; else the last."""
    ahead, size = math.prod(before[:axis]), before[axis] if before else 1
    fits = [i for i, n in enumerate(after) if n == size and math.prod(after[:i]) == ahead]
    if fits:
        return fits[-1]
    same = [i for i, n in enumerate(after) if n == size]
    return same[-1] if same and size > 1 else len(after) - 1
