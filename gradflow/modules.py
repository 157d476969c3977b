"""Names of a model's modules, stable under wrapping, and the tensors nested in what they take and give."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_FLAT = (str, bytes, int, float, nn.Module, type, torch.dtype, torch.device)


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """Dotted path of every module, the first name for a shared one, without the segments that wrappers add.

    Left out: wrappers themselves (DDP, compiled, checkpointed, FSDP), which add nothing of their own, and what is
    inside a scripted module, where Python hooks do not run.
    """
    paths: dict[nn.Module, str] = {}
    parallel: set[str] = set()
    scripted: list[str] = []
    for name, module in model.named_modules():
        if scripted and any(name.startswith(prefix) for prefix in scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(f"{name}." if name else "")
        if isinstance(module, _PARALLEL):
            parallel.add(name)
        elif _WRAPPER_SEGMENTS.isdisjoint(module._modules):  # noqa: SLF001
            paths[module] = _stripped(name, parallel)
    return paths


def _stripped(name: str, parallel: set[str]) -> str:
    """`name` without wrapper segments; `parallel` holds the raw names of data-parallel wrappers met so far."""
    if not parallel and not any(segment in name for segment in _WRAPPER_SEGMENTS):
        return name
    kept: list[str] = []
    raw = ""
    for segment in name.split(".") if name else []:
        wrapped = segment in _WRAPPER_SEGMENTS or (segment == "module" and raw in parallel)
        raw = f"{raw}.{segment}" if raw else segment
        if not wrapped:
            kept.append(segment)
    return ".".join(kept)


def stripped_names(model: nn.Module) -> dict[int, tuple[str, bool]]:
    """By identity: the stripped name of every parameter and buffer, and whether it is a buffer."""
    parallel = {name for name, module in model.named_modules() if isinstance(module, _PARALLEL)}
    names = {id(b): (_stripped(n, parallel), True) for n, b in model.named_buffers()}
    names.update({id(p): (_stripped(n, parallel), False) for n, p in model.named_parameters()})
    return names


def tensors_in(value: Any, depth: int = 4, *, objects: bool = True) -> list[Tensor]:
    """Tensors nested in tuples, lists, mappings, dataclasses and (with `objects`) plain objects, in order."""
    found: list[Tensor] = []
    _collect(value, depth, found, objects)
    return found


def _collect(value: Any, depth: int, found: list[Tensor], objects: bool) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif value is None or depth == 0 or isinstance(value, _FLAT):
        return
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, depth - 1, found, objects)
    elif isinstance(value, (dict, Mapping)):
        for item in value.values():
            _collect(item, depth - 1, found, objects)
    elif isinstance(value, (set, frozenset)):
        for item in value:
            _collect(item, depth - 1, found, objects)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _collect(getattr(value, field.name, None), depth - 1, found, objects)
    elif objects and hasattr(value, "__dict__") and not callable(value):
        for item in list(vars(value).values()):
            _collect(item, depth - 1, found, objects)
