"""Canonical names of torch operations: one name for a function, its method, its operator and its in-place forms.

Pure bookkeeping on the callables that `__torch_function__` receives; nothing here touches a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_SYNONYMS = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub",
    "absolute": "abs", "negative": "neg", "concat": "cat", "concatenate": "cat",
    "conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "convolution": "conv", "_convolution": "conv",
    "conv_transpose1d": "conv", "conv_transpose2d": "conv", "conv_transpose3d": "conv", "swapaxes": "transpose",
    "swapdims": "transpose", "moveaxis": "movedim", "_softmax": "softmax", "special_softmax": "softmax",
}  # fmt: skip
_REFLECTED = {
    "radd": "add", "rsub": "sub", "rmul": "mul", "rdiv": "rdiv", "rtruediv": "rdiv", "rmatmul": "matmul", "rpow": "pow",
    "rfloordiv": "floordiv", "rmod": "mod", "rand": "and", "ror": "or", "rxor": "xor",
}  # fmt: skip
# Dunder names whose leading letter is not an in-place or reflected mark.
_PLAIN_DUNDERS = frozenset({"index", "invert", "int", "rshift", "round", "reversed", "repr", "reduce", "reduce_ex"})
_TENSOR_PROPERTIES = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
_UNSEEN = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "data_ptr", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "is_nonzero", "element_size", "item", "tolist", "numpy",
    "len", "bool", "float_scalar", "int", "index", "format", "repr", "str", "hash", "contains", "set", "delete",
    "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "is_same_size", "get_device", "type_str",
    "untyped_storage", "storage", "is_shared", "is_pinned", "is_inference", "_is_view", "dim_order", "equal",
    "allclose", "is_tensor", "is_storage", "_fix_weakref", "share_memory", "has_names", "reduce_ex", "deepcopy", "dir",
})  # fmt: skip
# Their values depend on no operand, only on shapes and dtypes.
_FACTORIES = frozenset({
    "zeros", "ones", "full", "empty", "rand", "randn", "randint", "randperm", "arange", "linspace", "logspace", "eye",
    "tensor", "scalar_tensor", "from_numpy", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like",
    "randn_like", "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "tril_indices",
    "triu_indices", "empty_strided", "new_empty_strided", "hann_window", "hamming_window", "bartlett_window",
    "blackman_window", "kaiser_window", "range", "empty_permuted", "complex_empty", "frombuffer",
})  # fmt: skip
# The analysis needs more of them than their tensors.
_DETAILED = frozenset({"add", "sub", "pow", "transpose", "permute", "getitem", "narrow", "select", "stack"})
# Only the first operand's values enter; the others lend a shape or a dtype.
_LIKE_FIRST = frozenset({"type_as", "to", "expand_as", "view_as", "reshape_as"})


@dataclass(frozen=True, slots=True)
class Operation:
    """What a callable is: `name` (canonical), and how it treats its operands.

    Attributes:
        name: Canonical name, `add` for `torch.add`, `Tensor.__iadd__`, `Tensor.add_`, `aten.add.Tensor` alike.
        inplace: It overwrites its first operand.
        reflected: Operator form with the operands swapped (`__rsub__`).
        unseen: It gives no tensor that could carry a signal (`shape`, `size()`, `requires_grad`, ...).
        factory: It makes a tensor that depends on no operand's values.
        first_only: Only its first operand's values count.
        detailed: Its numbers matter (axes moved, a factor, a power), not its tensors alone.
        plain: None of these.
    """

    name: str
    inplace: bool = False
    reflected: bool = False
    unseen: bool = False
    factory: bool = False
    first_only: bool = False
    detailed: bool = False
    plain: bool = False


def _split(raw: str) -> tuple[str, bool, bool]:
    """Name, in-place, reflected of a raw function name."""
    raw = raw.split(".", 1)[0]
    if raw.startswith("__") and raw.endswith("__"):
        core = raw.strip("_")
        if core in _REFLECTED:
            return _REFLECTED[core], False, True
        if core in {"setitem", "delitem"}:
            return core, True, False
        if core.startswith("i") and core not in _PLAIN_DUNDERS:
            return core[1:], True, False
        return core, False, False
    if raw.endswith("_") and not raw.endswith("__"):
        return raw[:-1], True, False
    return raw, False, False


@lru_cache(maxsize=4096)
def operation(func: Any) -> Operation:
    """The `Operation` that a callable seen by `__torch_function__` performs (runs at every operation; cached)."""
    raw = getattr(func, "__name__", "")
    if raw in {"__get__", "__set__", "__delete__"}:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if raw == "__get__" and attribute in _TENSOR_PROPERTIES:
            moved = attribute in {"T", "mT", "H", "mH"}
            return Operation("transpose" if moved else attribute, detailed=moved)
        return Operation(attribute, unseen=True)
    name, inplace, reflected = _split(raw or "unknown")
    name = _SYNONYMS.get(name, name)
    if name in {"requires_grad", "resize_as", "rename", "names"} and inplace:
        return Operation(name, unseen=True)
    factory, first_only, detailed = name in _FACTORIES and not inplace, name in _LIKE_FIRST, name in _DETAILED
    plain = not (inplace or reflected or factory or first_only or detailed)
    return Operation(name, inplace, reflected, name in _UNSEEN, factory, first_only, detailed, plain)
