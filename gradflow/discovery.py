"""Find a model's residual branches: one forward pass traced, analysed, and the model left as found."""

from __future__ import annotations

import contextlib
import gc
import inspect
import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradflow.errors import UsageError
from gradflow.residuals import analyse
from gradflow.tracing import Tracer
from gradflow.tracing.modules import named_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from gradflow.records import Branch, Graph, Structure


def find_branches(model: nn.Module, /, *args: Any, **kwargs: Any) -> list[Branch]:
    """Residual branches that one forward pass `model(*args, **kwargs)` executes, in order of execution.

    The pass runs in the model's current mode (train or eval) and under the caller's gradient mode. The model is left
    as found: random state, buffers, training flags, hooks, gradients, `requires_grad`. What the forward raises comes
    through unchanged.

    Example::

        for branch in gradflow.find_branches(model, input_ids):
            print(branch.depth, branch.name, branch.placement)
    """
    return discover(model, *args, **kwargs)[1].branches


def discover(model: nn.Module, /, *args: Any, **kwargs: Any) -> tuple[Graph, Structure]:
    """The traced graph of one forward pass, and the joins, streams and problems found in it."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__} itself" if inspect.isclass(model) else f"a {type(model).__name__}"
        raise UsageError(
            f"expected a torch.nn.Module and what its forward takes, as in find_branches(model, batch); got {kind}"
        )
    tracer = Tracer(model)
    with _collection_paused():
        with preserved(model), eager(), tracer:
            model(*args, **kwargs)
        graph = tracer.take()
        return graph, analyse(graph)


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """No garbage collection: thousands of small records would set off collections of the whole heap."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Random state, buffers, training flags, gradients and `requires_grad` are afterwards what they were before."""
    modules = [module for _, module in named_modules(model)]
    flags = [module.training for module in modules]
    buffers = [(m, name, b, _copied(b)) for m in modules for name, b in m._buffers.items()]  # noqa: SLF001
    owned = {id(p): p for m in modules for p in m._parameters.values() if p is not None}  # noqa: SLF001
    parameters = [(p, p.requires_grad, p.grad) for p in owned.values()]
    with _random_state():
        try:
            yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                if module.training != flag:
                    module.training = flag
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer  # noqa: SLF001
                if buffer is not None and copy is not None and not _equal(buffer, copy):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.data.copy_(copy)
            for parameter, requires_grad, grad in parameters:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
                if parameter.grad is not grad:
                    parameter.grad = grad


def _copied(buffer: Tensor | None) -> Tensor | None:
    """A buffer's values; None where there are no values to keep."""
    if buffer is None or buffer.is_meta or isinstance(buffer, nn.UninitializedBuffer):
        return None
    return buffer.detach().clone()


def _equal(buffer: Tensor, copy: Tensor) -> bool:
    """Whether nothing changed. Version counters do not tell: batch norm updates its statistics past them."""
    return buffer.layout == torch.strided and torch.equal(buffer, copy)


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Random state of torch on every device in use, of Python and of NumPy is afterwards what it was before."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    device = torch.accelerator.current_accelerator()
    kind = device.type if device is not None else "cuda"
    in_use = device is not None and getattr(torch.get_device_module(device), "is_initialized", lambda: True)()
    devices = list(range(torch.accelerator.device_count())) if in_use else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiled parts of a model run eagerly, without recompilation before or after."""
    if "torch._dynamo" not in sys.modules:
        yield  # nothing is compiled, and importing the compiler takes seconds
        return
    with torch.compiler.set_stance("force_eager"):
        yield
