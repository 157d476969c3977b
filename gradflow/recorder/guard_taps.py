"""What watches a guarded step from inside: the outputs of modules with parameters, and where a backward pass begins.

It traces nothing and places no hook on gradients: those of the parameters tell where a backward pass broke. Compiled
modules stay compiled and are seen as a whole, by what they give.

On a CPU the loss is at hand before the backward pass: outputs are kept until then, which is what autograd does with
most of them anyway, and looked at only if it is not finite. On a device nothing may wait for the loss, and each output
is asked for its largest element.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradflow import statistics
from gradflow.recorder.hooks import undisturbed
from gradflow.recorder.layer_taps import Occurrences, module_layer
from gradflow.recorder.measurable import measurable
from gradflow.tracing.attachment import FUSED, Attachment
from gradflow.tracing.modules import survey, tensors_in
from gradflow.tracing.reentrant import current_backward, follows_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradflow.recorder.buffer import Buffer
    from gradflow.records import Layer
    from gradflow.statistics import Number

_is_compiling = torch.compiler.is_compiling
_saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks  # noqa: SLF001  what autograd saves goes elsewhere


def _compiled_frames() -> int:
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["frames"]["total"])


@dataclass
class Known:
    """What guarded steps have learned about a training.

    Attributes:
        at_once: Paths of modules whose output the model overwrites in place: it is looked at before.
        frames: Pieces of code that dynamo had compiled when the training began.
    """

    at_once: set[str] = field(default_factory=set)
    frames: int = field(default_factory=_compiled_frames)


class GuardTaps:
    """The observer of one guarded step; has of `Taps` what a step in progress asks for."""

    structures = ()
    checkpointed = False

    def __init__(
        self, model: nn.Module, buffer: Buffer, *, known: Known, on_error: Callable[[Exception], None],
        on_backward: Callable[[Tensor | None], None], after_backward: Callable[[], None],
    ) -> None:  # fmt: skip
        self.points: dict[str, str] = {}
        self._paths, compiled = _useful(model, known)
        mode = None if compiled else _Backwards(on_backward, after_backward, on_error)
        self.layers = Outputs(buffer, known, keeps=not compiled)
        self._on_error = on_error
        self._running: list[int] = []
        self._calls = 0
        self._attachment = Attachment(mode, self._entered, self._exited, aside=True)

    def open(self) -> None:
        """Place the hooks on the modules."""
        self._attachment.open(self._paths)

    def shut(self) -> None:
        """Take them off."""
        self._attachment.close()
        self._running.clear()

    def _entered(self, _path: str, _module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        """Runs before every forward of a module with parameters."""
        if not _is_compiling() and current_backward() == -1:
            self._calls += 1
            self._running.append(self._calls)

    def _exited(self, path: str, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Runs after every forward of a module with parameters."""
        if _is_compiling() or current_backward() != -1 or not self._running:
            return
        try:
            if self._running.pop() == self._calls:  # no other ran inside
                with torch._C.DisableTorchFunction():  # noqa: SLF001
                    self.layers.take(path, module, output)
        except Exception as error:  # noqa: BLE001 (whatever it is, training goes on)
            self._on_error(error)

    def judge(self, *, sound: bool) -> None:
        """A backward pass is about to run; `sound` if its loss is known to be finite."""
        self.layers.judge(sound=sound)

    def close_pass(self) -> None:
        """Whatever has run so far is a pass."""
        self.layers.new_pass()
        self._running.clear()

    def finish(self) -> None:
        """The step is over."""
        self.close()

    def close(self) -> None:
        """Take every hook off and let go of the pass."""
        self.shut()
        self.close_pass()


class Outputs:
    """Whether the outputs of layers are finite. With `keeps` they may be kept until the loss is known."""

    def __init__(self, buffer: Buffer, known: Known, *, keeps: bool) -> None:
        self._buffer = buffer
        self._known = known
        self._keeps = keeps
        self._pass: list[tuple[str, nn.Module, bool, Tensor | dict[str, Number], int]] = []
        self._occurrences = Occurrences()

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers looked at, by name."""
        return self._occurrences.layers

    def new_pass(self) -> None:
        """Occurrences count from 0 again, and what was kept is let go of."""
        self._pass.clear()
        self._occurrences.new_pass()

    def take(self, path: str, module: nn.Module, output: Any) -> None:
        """Keep the output of a module, or look at it at once."""
        given = output if isinstance(output, Tensor) else next(iter(tensors_in(output, 3)), None)
        if given is None or not given.is_floating_point():
            return
        if self._keeps and path not in self._known.at_once and _lives_on(given):
            self._pass.append((path, module, True, given, given._version))  # noqa: SLF001
            return
        grad = follows_gradients()
        with undisturbed():
            out = measurable(given)
            if out is not None:
                self._pass.append((path, module, grad, _finiteness(out), 0))

    def judge(self, *, sound: bool) -> None:
        """Look at what was kept, unless all is `sound`, and hand on what was found."""
        for path, module, grad, found, version in self._pass:
            name = self._occurrences.name(module_layer(path, module), grad=grad)
            if isinstance(found, dict):
                self._buffer.put("layers", name, {**found})
                continue
            intact = found._version == version  # noqa: SLF001
            if not intact:
                self._known.at_once.add(path)
            elif not sound:
                out = measurable(found)
                if out is not None:
                    self._buffer.put("layers", name, {**_finiteness(out)})
        self._pass.clear()


def _lives_on(given: Tensor) -> bool:
    """Whether autograd lets most outputs live until the backward pass: not without gradient, not when checkpointing."""
    return given.grad_fn is not None and given.device.type == "cpu" and _saving_hooks(True) is None


def _finiteness(out: Tensor) -> dict[str, Number]:
    """The columns that cost least: a count on the host, where finite sums settle it, the maximum on a device."""
    n = float(out.numel())
    if out.device.type == "cpu":
        return {"n": n, "nonfinite": statistics.measure(out, ("square", "nonfinite"))["nonfinite"]}
    return {"n": n, "out_max": statistics.max_abs(out)}


class _Backwards(TorchFunctionMode):
    """Notices `loss.backward()`; every other operation passes."""

    def __init__(
        self, before: Callable[[Tensor | None], None], after: Callable[[], None], on_error: Callable[[Exception], None]
    ) -> None:
        super().__init__()
        self._before, self._after, self._on_error = before, after, on_error

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation (runs at every operation of a guarded step)."""
        if func is not _backward or current_backward() != -1:
            return func(*args, **kwargs) if kwargs else func(*args)
        self._told(lambda: self._before(args[0]))
        out = func(*args, **(kwargs or {}))
        self._told(self._after)
        return out

    def _told(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001
            self._on_error(error)


_backward: Any = Tensor.backward


def _useful(model: nn.Module, known: Known) -> tuple[dict[nn.Module, str], bool]:
    """Modules with parameters of their own, with their paths, and whether any are out of reach, being compiled.

    Besides them those on whose account hooks may have to stand aside. What `torch.compile` wrapped gets its hook on the
    wrapper, outside of the compiled code; a module that was compiled in place (`module.compile()`) has none. Hooks
    inside a compiled function would be compiled with it, again at every step: once that is noticed there are none.
    """
    paths, _ = survey(model)
    useful = {m: path for m, path in paths.items() if m._parameters or isinstance(m, FUSED)}  # noqa: SLF001
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return useful, False
    inside: set[nn.Module] = set()
    wrappers: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, dynamo.OptimizedModule):
            inside.update(module._orig_mod.modules())  # noqa: SLF001
            wrappers[module] = paths.get(module._orig_mod, "")  # noqa: SLF001
        elif module._compiled_call_impl is not None:  # noqa: SLF001
            inside.update(module.modules())
    if not inside and _compiled_frames() > known.frames:
        return {}, True
    return {m: path for m, path in {**useful, **wrappers}.items() if m not in inside}, bool(inside)
