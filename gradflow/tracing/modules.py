"""Names of a model's modules, stable under wrapping, and the tensors nested in what they take and give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_FLAT = (str, bytes, int, float, nn.Module, type, torch.dtype, torch.device)


class Survey(NamedTuple):
    """A model as it stands.

    Attributes:
        paths: Paths of the modules: dotted, the first one for a shared module, without the segments that wrappers add.
            Left out are wrappers themselves (DDP, compiled, checkpointed, FSDP), which add nothing of their own, and
            what is inside a scripted module, where Python hooks do not run.
        names: By `id`: the name of every parameter and buffer, and whether it is a buffer.
        parameters: Parameters by name, the first one for a shared parameter.
    """

    paths: dict[nn.Module, str]
    names: dict[int, tuple[str, bool]]
    parameters: dict[str, nn.Parameter]


def survey(model: nn.Module) -> Survey:
    """Walk through the modules of a model."""
    paths: dict[nn.Module, str] = {}
    names: dict[int, tuple[str, bool]] = {}
    parameters: dict[str, nn.Parameter] = {}
    for module, path, hidden in _walk(model):
        if not hidden:
            paths[module] = path
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None and id(parameter) not in names:
                names[id(parameter)] = (prefix + name, False)
                parameters[prefix + name] = parameter
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                names.setdefault(id(buffer), (prefix + name, True))
    return Survey(paths, names, parameters)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `model.named_modules()` gives, in its order, without a generator inside a generator for every level."""
    seen: set[nn.Module] = set()
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            prefix = f"{path}." if path else ""
            children = reversed(list(module._modules.items()))  # noqa: SLF001
            stack += [(prefix + name, child) for name, child in children if child is not None]


def _walk(model: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Every module with its stripped path, and whether it is a wrapper or inside a scripted module."""
    parallel: set[str] = set()
    scripted: tuple[str, ...] = ()
    for name, module in named_modules(model):
        hidden = bool(scripted) and name.startswith(scripted)
        if isinstance(module, torch.jit.ScriptModule):
            scripted = (*scripted, f"{name}." if name else "")
        elif isinstance(module, _PARALLEL):
            parallel.add(name)
            hidden = True
        else:
            hidden = hidden or not _WRAPPER_SEGMENTS.isdisjoint(module._modules)  # noqa: SLF001
        yield module, _stripped(name, parallel), hidden


def _stripped(name: str, parallel: set[str]) -> str:
    """`name` without wrapper segments; `parallel` holds the raw names of data-parallel wrappers met so far."""
    if not parallel and "_" not in name:
        return name
    kept: list[str] = []
    raw = ""
    for segment in name.split(".") if name else []:
        wrapped = segment in _WRAPPER_SEGMENTS or (segment == "module" and raw in parallel)
        raw = f"{raw}.{segment}" if raw else segment
        if not wrapped:
            kept.append(segment)
    return ".".join(kept)


def tensors_in(value: Any, depth: int = 4, *, objects: bool = True) -> list[Tensor]:
    """Tensors nested in tuples, lists, mappings, dataclasses and (with `objects`) plain objects, in order."""
    found: list[Tensor] = []
    if isinstance(value, Tensor):
        found.append(value)
    else:
        _collect(value, depth, found, objects)
    return found


def _collect(value: Any, depth: int, found: list[Tensor], objects: bool) -> None:
    if value is None or depth == 0 or isinstance(value, _FLAT):
        return
    for item in _items(value, objects):
        if isinstance(item, Tensor):
            found.append(item)
        elif item is not None and not isinstance(item, _FLAT):
            _collect(item, depth - 1, found, objects)


def _items(value: Any, objects: bool) -> Iterable[Any]:
    """What a container holds; nothing for what is no container."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, (dict, Mapping)):
        return value.values()
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if objects and hasattr(value, "__dict__") and not callable(value):
        return list(vars(value).values())
    return ()
