"""How a tracer sits in a model: hooks on every module, a place in the stack of modes, and no trace of it afterwards.

Three things keep training as it is. The mode lies below all others on the stack, so that a `with torch.device(...)` of
the model's own may begin and end while ours is open. Hooks do not survive a copy or a pickle of the model. And what
PyTorch would run on its fused inference path (an encoder of its own in eval mode, as a teacher), which any hook or mode
switches off and which rounds differently, runs without hooks and mode.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import _pop_mode, _push_mode
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.overrides import TorchFunctionMode

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that PyTorch may run on its fused inference path."""


def _nothing(*_: object, **__: object) -> None:
    """What a hook of ours becomes in a copy of the model."""


def _harmless() -> Callable[..., None]:
    return _nothing


class _Hook(partial[None]):
    """A hook that a copied or pickled model does not carry on."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _harmless, ()


def _registries(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where a module keeps its pre-hooks, that they take keywords, its hooks, that they always run."""
    return (
        module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks,  # noqa: SLF001
        module._forward_hooks_always_called,  # noqa: SLF001
    )  # fmt: skip


class Attachment:
    """The hooks of one tracer on the modules of a model, and its mode on the stack, while it is open.

    Args:
        mode: The mode to keep on the stack, if any.
        entered: Called with path, module, arguments and keyword arguments when a module's forward begins.
        exited: Called with path, module, arguments and output when it has ended, also by an exception (output None).
        aside: Leave PyTorch's fused inference path alone (training goes on in the same bits); otherwise it is switched
            off by our presence, and what is inside is seen.
    """

    def __init__(
        self, mode: TorchFunctionMode | None, entered: Callable[..., None], exited: Callable[..., None], *, aside: bool
    ) -> None:
        self._aside = aside
        self._mode = mode
        self._entered = entered
        self._exited = exited
        self._key = RemovableHandle(OrderedDict()).id  # among all hooks of a module, ours
        self._hooked: set[nn.Module] = set()
        self._paths: Mapping[nn.Module, str] = {}
        self._waiting: RemovableHandle | None = None

    def open(self, paths: Mapping[nn.Module, str]) -> None:
        """Place the hooks and the mode; if that fails, nothing stays."""
        self._paths = paths
        try:
            for module in paths:
                self._hook(module)
            _push_below(self._mode)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take everything off again."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None
        _take_off(self._mode)
        for module in list(self._hooked):
            self._unhook(module)
        self._paths = {}

    def release(self) -> None:
        """Let go of mode and observers, which know us: closed for good."""
        self.close()
        self._mode, self._entered, self._exited = None, _nothing, _nothing

    def _hook(self, module: nn.Module) -> None:
        """Register both hooks, as `register_forward_hook` and its like do, without a handle for each."""
        path = self._paths[module]
        pre_hooks, with_keywords, hooks, always = _registries(module)
        pre_hooks[self._key] = _Hook(self._before if self._aside else self._entered, path)
        hooks[self._key] = _Hook(self._exited, path)
        with_keywords[self._key] = always[self._key] = True
        self._hooked.add(module)

    def _unhook(self, module: nn.Module) -> None:
        for hooks in _registries(module):
            hooks.pop(self._key, None)
        self._hooked.discard(module)

    def _before(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered(path, module, args, kwargs)
        if isinstance(module, FUSED) and self._waiting is None and may_fuse(module, args, kwargs):
            self._stand_aside(path, module)

    def _stand_aside(self, path: str, fused: nn.Module) -> None:
        """No hook in `fused` and no mode until its forward ends; a global hook, which it does not look at, waits."""
        inside = [module for module in fused.modules() if module in self._hooked]

        def back(module: nn.Module, args: Any, output: Any) -> None:
            if module is not fused or self._waiting is None:
                return
            self._waiting.remove()
            self._waiting = None
            _push_below(self._mode)
            for each in inside:
                self._hook(each)
            self._exited(path, module, args, output)

        for module in inside:
            self._unhook(module)
        _take_off(self._mode)
        self._waiting = register_module_forward_hook(back, always_call=True)


def may_fuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether PyTorch may run an encoder or attention module on its fused inference path (eval mode, no gradient)."""
    if all(m.training for m in module.modules() if isinstance(m, FUSED)):
        return False
    if torch._C._len_torch_function_stack() > 1 or torch.is_autocast_enabled():  # noqa: SLF001
        return False  # it is off anyway
    if not torch.is_grad_enabled():
        return True
    tensors = (value for value in (*args, *kwargs.values(), *module.parameters()) if isinstance(value, Tensor))
    return not any(tensor.requires_grad for tensor in tensors)


def _push_below(mode: TorchFunctionMode | None) -> None:
    """Put a mode under all others that are open."""
    if mode is None:
        return
    others = _popped()
    _push_mode(mode)  # type: ignore[no-untyped-call]
    for other in others:
        _push_mode(other)  # type: ignore[no-untyped-call]


def _take_off(mode: TorchFunctionMode | None) -> None:
    """Take a mode off the stack, wherever it lies."""
    if mode is None:
        return
    for other in _popped():
        if other is not mode:
            _push_mode(other)  # type: ignore[no-untyped-call]


def _popped() -> list[TorchFunctionMode]:
    """Empty the stack; what was on it, bottom first."""
    count = torch._C._len_torch_function_stack()  # noqa: SLF001
    return [_pop_mode() for _ in range(count)][::-1]  # type: ignore[no-untyped-call]
