"""What watches a guarded step from inside: the outputs of modules with parameters, and where a backward pass begins.

On a CPU the loss is at hand before the backward pass: operations are noted on a tape (which keeps no result alive), and
outputs are looked at only if it is not finite. On a device nothing may wait for the loss, and each output is asked for
its largest element. Compiled modules stay compiled and are seen as a whole, by what they give.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradflow import statistics
from gradflow.recorder.hooks import undisturbed
from gradflow.recorder.layer_taps import Occurrences, module_layer
from gradflow.recorder.measurable import measurable
from gradflow.recorder.origins import Output
from gradflow.tracing.attachment import Attachment
from gradflow.tracing.modules import tensors_in
from gradflow.tracing.reentrant import current_backward, follows_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradflow.recorder.buffer import Buffer
    from gradflow.records import Layer
    from gradflow.statistics import Number
    from gradflow.tracing.tape import Tape

_is_compiling = torch.compiler.is_compiling


def _compiled_frames() -> int:
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["frames"]["total"])


@dataclass
class Known:
    """What guarded steps know about a training.

    Attributes:
        frames: Pieces of code that dynamo had compiled when the training began.
    """

    frames: int = field(default_factory=_compiled_frames)


class GuardTaps:
    """The observer of one guarded step; has of `Taps` what a step in progress asks for."""

    structures = ()
    checkpointed = False

    def __init__(
        self, model: nn.Module, buffer: Buffer, *, known: Known, paths: dict[nn.Module, str],
        on_error: Callable[[Exception], None], on_backward: Callable[[Tensor | None], None],
        after_backward: Callable[[], None], tape: Tape | None,
    ) -> None:  # fmt: skip
        self.points: dict[str, str] = {}
        self._paths, compiled = _useful(model, paths, known)
        self.tape = None if compiled else tape
        mode = None if compiled else _Operations(on_backward, after_backward, on_error, tape)
        self.layers = Outputs(buffer, self.tape)
        self._on_error = on_error
        self._running: list[tuple[str, int]] = []
        self._calls = 0
        self._attachment = Attachment(mode, self._entered, self._exited, aside=True)

    def open(self) -> None:
        """Place the hooks on the modules."""
        self._attachment.open(self._paths)

    def shut(self) -> None:
        """Take them off."""
        self._attachment.close()
        self._running.clear()
        self._placed()

    def _entered(self, path: str, module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        """Runs before every forward."""
        if not _is_compiling() and current_backward() == -1:
            self._calls += bool(module._parameters)  # noqa: SLF001
            self._running.append((path, self._calls))
            self._placed()

    def _exited(self, path: str, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Runs after every forward."""
        if _is_compiling() or current_backward() != -1 or not self._running:
            return
        try:
            _, call = self._running.pop()
            self._placed()
            if module._parameters and call == self._calls:  # noqa: SLF001  no other ran inside
                with torch._C.DisableTorchFunction():  # noqa: SLF001
                    self.layers.take(path, module, output)
        except Exception as error:  # noqa: BLE001 (whatever it is, training goes on)
            self._on_error(error)

    def _placed(self) -> None:
        if self.tape is not None:
            self.tape.scope = self._running[-1][0] if self._running else None

    def judge(self, *, sound: bool) -> list[Output]:
        """A backward pass is about to run, of a loss that is finite if `sound`; outputs that are to be looked at."""
        return self.layers.judge(sound=sound)

    def close_pass(self) -> None:
        """Whatever has run so far is a pass."""
        self.layers.new_pass()
        if self.tape is not None:
            self.tape.clear()

    def finish(self) -> None:
        """The step is over."""
        self.close()

    def close(self) -> None:
        """Take every hook off and let go of the pass and of the mode, which tells the step: it is over for good."""
        self.shut()
        self._attachment.release()
        self.close_pass()


class Outputs:
    """Whether the outputs of layers are finite. Where a tape runs they are looked at once the loss is known."""

    def __init__(self, buffer: Buffer, tape: Tape | None) -> None:
        self._buffer = buffer
        self._tape = tape
        self._pass: list[tuple[str, nn.Module, bool, tuple[ref[Tensor], int] | dict[str, Number]]] = []
        self._occurrences = Occurrences()

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers looked at, by name."""
        return self._occurrences.layers

    def new_pass(self) -> None:
        """Occurrences count from 0 again."""
        self._pass.clear()
        self._occurrences.new_pass()

    def take(self, path: str, module: nn.Module, output: Any) -> None:
        """Remember the output of a module, or look at it at once."""
        given = output if isinstance(output, Tensor) else next(iter(tensors_in(output, 3)), None)
        if given is None or not given.is_floating_point():
            return
        grad = follows_gradients()
        if self._tape is not None:
            self._pass.append((path, module, grad, (ref(given), len(self._tape))))
            return
        with undisturbed():
            out = measurable(given)
            if out is not None:
                self._pass.append((path, module, grad, _finiteness(out)))

    def judge(self, *, sound: bool) -> list[Output]:
        """Hand on what was found; what was remembered is to be looked at unless all is `sound`."""
        wanted = []
        for path, module, grad, found in self._pass:
            name = self._occurrences.name(module_layer(path, module), grad=grad)
            if isinstance(found, dict):
                self._buffer.put("layers", name, {**found})
            elif not sound:
                wanted.append(Output(id(found[0]), found[1], partial(self._use, name)))
        self._remembered = [*self._pass]  # the keys stand for these references
        self._pass.clear()
        return wanted

    def _use(self, name: str, output: Tensor) -> None:
        out = measurable(output)
        if out is not None:
            self._buffer.put("layers", name, {**_finiteness(out)})


def _finiteness(out: Tensor) -> dict[str, Number]:
    """The columns that cost least: a count on the host, where finite sums settle it, the maximum on a device."""
    n = float(out.numel())
    if out.device.type == "cpu":
        return {"n": n, "nonfinite": statistics.measure(out, ("square", "nonfinite"))["nonfinite"]}
    return {"n": n, "out_max": statistics.max_abs(out)}


class _Operations(TorchFunctionMode):
    """Notices `loss.backward()`, and has every other operation noted if there is a tape."""

    def __init__(
        self, before: Callable[[Tensor | None], None], after: Callable[[], None], on_error: Callable[[Exception], None],
        tape: Tape | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._before, self._after, self._on_error = before, after, on_error
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation (runs at every operation of a guarded step)."""
        kwargs = kwargs or {}
        if _is_compiling() or current_backward() != -1:
            return func(*args, **kwargs)
        if func is not _backward:
            return func(*args, **kwargs) if self._tape is None else self._tape.run(func, args, kwargs)
        self._told(lambda: self._before(args[0]))
        out = func(*args, **kwargs)
        self._told(self._after)
        return out

    def _told(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001
            self._on_error(error)


_backward: Any = Tensor.backward


def _useful(model: nn.Module, paths: dict[nn.Module, str], known: Known) -> tuple[dict[nn.Module, str], bool]:
    """Modules that are seen, with their paths, and whether any are out of reach, being compiled.

    What `torch.compile` wrapped gets its hook on the wrapper, outside of the compiled code; a module that was compiled
    in place (`module.compile()`) has none. Hooks inside a compiled function would be compiled with it, again at every
    step: once that is noticed there are none.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return paths, False
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
    return {m: path for m, path in {**paths, **wrappers}.items() if m not in inside}, bool(inside)
