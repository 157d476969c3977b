"""`module:function` on a command line, as a model and the inputs of one forward pass."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradflow.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from torch import nn


class Subject(NamedTuple):
    """A model with the arguments of one forward pass."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def build(factory: str, inputs: str | None = None, *, size: int | None = None) -> Subject:
    """Call the factory and return the model with its inputs.

    Args:
        factory: `module:function` or `file.py:function`. The function takes no arguments and returns a module, or a
            tuple (module, args) or (module, args, kwargs). `args` that is no tuple or list counts as the only argument,
            or, if it is a dict, as keyword arguments.
        size: Depth or width, handed to the function as its only argument; none by default.
        inputs: `module:function` returning the arguments alone: args, or (args, kwargs).

    Without inputs, a Lightning module's `example_input_array` and a Hugging Face model's `dummy_inputs` are taken.

    Raises:
        UsageError: The path does not import, the function fails, or it does not return what is needed.
    """
    from torch import nn

    made = _call(factory) if size is None else _call(factory, size)
    model, *rest = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(rest) > 2:
        raise UsageError(
            f"expected {factory} to return a torch.nn.Module, (module, args) or (module, args, kwargs), "
            f"got {_described(made)}; return the model first"
        )
    if inputs is not None:
        given = _call(inputs)
        pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)
        rest = list(given) if pair and isinstance(given[0], (tuple, list)) else [given]
    if not rest:
        return Subject(model, *_own_inputs(model, factory))
    args, kwargs = _arguments(rest[0])
    if len(rest) == 2:
        if not isinstance(rest[1], Mapping):
            raise UsageError(f"expected a dict of keyword arguments as the third item, got {_described(rest[1])}")
        kwargs = {**kwargs, **rest[1]}
    return Subject(model, args, kwargs)


def _arguments(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(value, Mapping):
        return (), dict(value)
    return (tuple(value) if isinstance(value, (tuple, list)) else (value,)), {}


def _own_inputs(model: nn.Module, factory: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs that the model itself offers, or none where its forward needs none."""
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return _arguments(example)
    parameters = inspect.signature(model.forward).parameters
    offered = getattr(model, "dummy_inputs", None)
    if isinstance(offered, Mapping) and set(offered) <= set(parameters):
        return (), dict(offered)
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind not in free]
    if needed:
        raise UsageError(
            f"expected inputs for one forward pass, got {type(model).__name__} alone, whose forward needs "
            f"{', '.join(needed)}; return (model, inputs) from {factory}, or pass --input module:function"
        )
    return (), {}


def _call(target: str, *args: int) -> Any:
    """Import `module:function` and call it; whatever goes wrong becomes one `UsageError` that says where."""
    module_name, separator, path = target.rpartition(":")
    if not separator or not module_name or not path:
        raise UsageError(f"expected module:function, got {target!r}; for example train:make_model")
    try:
        function: Any = _module(module_name)
        for name in path.split("."):
            function = getattr(function, name)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"expected {module_name} to import and to hold {path}, got {reason(error)}; "
            "modules are looked for from the current directory"
        ) from error
    if not callable(function):
        wanted = "a function of one number" if args else "a function without arguments"
        raise UsageError(f"expected {target} to be {wanted}, got {_described(function)}")
    return _result(target, function, args)


def _result(target: str, function: Callable[..., Any], args: tuple[int, ...]) -> Any:
    try:
        return function(*args)
    except (Exception, SystemExit) as error:
        raise UsageError(f"expected {target}({', '.join(map(str, args))}) to run, got {reason(error)}") from error


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if not name.endswith(".py"):
        return import_module(name)
    file = Path(name).resolve()
    spec = spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"no file {os.fspath(file)}")
    module = module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    return module


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


def reason(error: BaseException) -> str:
    """What was raised and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {error}{where}"
