"""Sums inside other operations, put into the graph as if they were written out: what is added first, then an addition.

`addcmul(x, a, b)` becomes `x + a·b`, `addmm(x, a, b)` and its like `x + a @ b`, `lerp(x, y, w)` becomes
`(1 - w)·x + w·y`, and `stack([x, y, z]).sum(0)` becomes `(x + y) + z`. Whoever reads the graph knows additions alone.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from gradflow.shapes import Shape, broadcast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradflow.tracing.register import Register

_ELEMENTWISE = {"addcmul": "mul", "addcdiv": "div"}
PRODUCTS = {**_ELEMENTWISE, "addmm": "mm", "addmv": "mv", "addr": "outer", "baddbmm": "bmm", "addbmm": "bmm"}
"""By operation, the product that it adds to its first operand."""
_MATRICES = frozenset({"addmm", "baddbmm", "addbmm"})
COMPOSITES = frozenset(PRODUCTS) | {"lerp", "sum"}
"""Operations that may be a sum of several tensors and more."""
_OPERANDS = (
    "input", "tensor1", "tensor2", "mat1", "mat2", "batch1", "batch2", "mat", "vec", "vec1", "vec2", "end", "weight",
)  # fmt: skip
_SHAPES: dict[str, Callable[[Shape, Shape], Shape]] = {
    "mul": broadcast, "div": broadcast, "mm": lambda a, b: a[:-1] + b[-1:], "bmm": lambda a, b: a[:-1] + b[-1:],
    "mv": lambda a, _: a[:-1], "outer": lambda a, b: a + b,
}  # fmt: skip


class Addition(NamedTuple):
    """The addition that a composite operation ends with.

    Attributes:
        parents: Its operands, and the stack where it sums one.
        detail: Factors of the operands (`beta` and `alpha`) and `inputs`, which says where autograd reads them: the
            node whose function does (-1: the addition itself), of how many inputs, and their numbers by operand.
        partial: The partial sums of a stack, which no operation computes.
    """

    parents: tuple[int, ...]
    detail: dict[str, Any]
    partial: Sequence[int] = ()


def ordered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The operands of a composite operation and its other positional arguments, those given by keyword behind."""
    return [*args, *(kwargs[key] for key in _OPERANDS if key in kwargs)]


def factors(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """What a composite operation multiplies the operands of its addition by; None if those are no real numbers."""
    given = [value for value in args if isinstance(value, Real)]  # in signatures of old: before their tensors
    found: tuple[Any, Any] = (1, 1)
    if name == "lerp":
        weight = kwargs.get("weight", *given[:1])
        found = (1 - weight, weight) if isinstance(weight, Real) else found
    elif name in _ELEMENTWISE:
        found = (1, kwargs.get("value", *given[:1] or (1,)))
    elif name != "sum":
        scales = {"beta": 1, "alpha": 1, **dict(zip(("beta", "alpha"), given, strict=False)), **kwargs}
        found = (scales["beta"], scales["alpha"])
    # no wait of ours for a tensor: the operation itself reads it in the same way
    read = [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in found]
    return (float(read[0]), float(read[1])) if all(isinstance(value, Real) for value in read) else None


def written_out(
    register: Register, name: str, parents: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Addition | None:
    """Put into the graph what a composite operation adds up; None for one that is no sum of several tensors."""
    nodes = register.nodes
    if not parents or (name in _MATRICES and len(nodes[parents[0]].shape) < 2):
        return None  # the first operand is a bias, which is part of the linear map
    if name == "sum":
        return _stacked(register, parents, args, kwargs)
    operands = _operands(parents, kwargs)
    scales = factors(name, args, kwargs)
    numeric = name == "lerp" and not any(isinstance(value, Tensor) for value in ordered(args, kwargs)[2:])
    if scales is None or not scales[0] or len(operands) != (2 if numeric else 3):
        return None  # with a `beta` of 0 the first operand is not read
    detail: dict[str, Any] = {key: scale for key, scale in zip(("beta", "alpha"), scales, strict=True) if scale != 1}
    shapes = [nodes[operand].shape for operand in operands]
    if numeric:
        return Addition(operands, {**detail, "inputs": (-1, 2, (0,), (1,))})
    if name == "lerp":
        *ends, weight = operands
        weighed = [register.virtual("mul", (x, weight), broadcast(nodes[x].shape, shapes[2]), {}) for x in ends]
        return Addition(tuple(weighed), {**detail, "inputs": (-1, 3, (0,), (1,))})
    added, *multiplied = operands
    product = PRODUCTS[name]
    shape = _SHAPES[product](*shapes[1:])[name == "addbmm" :]
    made = register.virtual(product, tuple(multiplied), shape, {})
    return Addition((added, made), {**detail, "inputs": (-1, 3, (0,), (1, 2))})


def _operands(parents: tuple[int, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Parents in the operation's own order, however its keywords were."""
    keys = [key for key, value in kwargs.items() if isinstance(value, Tensor) and key != "out"]
    first = len(parents) - len(keys)
    given = dict(zip(keys, parents[first:], strict=True))
    return (*parents[:first], *(given[key] for key in _OPERANDS if key in given))


def _stacked(
    register: Register, parents: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Addition | None:
    """The additions of a sum over what was stacked."""
    nodes, stacked = register.nodes, register.nodes[parents[0]]
    parts = stacked.parents
    keeps = kwargs.get("keepdim", kwargs.get("keepdims", args[2] if len(args) > 2 else False))
    if stacked.op != "stack" or len(parts) < 2 or keeps:
        return None
    axes = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    axis = axes[0] if isinstance(axes, (tuple, list)) and len(axes) == 1 else axes
    if not isinstance(axis, int) or axis % len(stacked.shape) != stacked.detail["dim"] % len(stacked.shape):
        return None
    stack, count, total = stacked.index, len(parts), parts[0]
    for place, part in enumerate(parts[1:-1], start=1):
        inputs = (stack, count, tuple(range(place)), (place,))
        total = register.virtual("add", (total, part), nodes[part].shape, {"inputs": inputs})
    last = (stack, count, tuple(range(count - 1)), (count - 1,))
    partial = range(len(nodes) - (count - 2), len(nodes))
    return Addition((total, parts[-1], stack), {"inputs": last, "stack": stack}, partial)
