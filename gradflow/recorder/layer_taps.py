"""Measures leaf modules with parameters, and activation functions, in a running pass: outputs and their gradients."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from gradflow import statistics
from gradflow.recorder.measurable import measurable
from gradflow.records import Layer

if TYPE_CHECKING:
    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.recorder.hooks import Hooks
    from gradflow.records import Node
    from gradflow.statistics import Number

ACTIVATIONS = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
    "softplus", "hardtanh", "hardsigmoid", "hardswish", "softsign", "logsigmoid",
    "log_sigmoid", "glu", "threshold", "tanhshrink",
    "softshrink", "hardshrink", "special_expit", "clamp", "clamp_min",
})  # fmt: skip
"""Functions that are activations, by canonical name; a module without parameters that calls one is one too."""
_BOUNDED_BELOW = {"clamp": "min", "clamp_min": "min"}
"""Functions that are an activation where they cut at zero."""


def is_activation(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is an activation function: one of `ACTIVATIONS`, and if it clamps, at zero from below."""
    if op not in _BOUNDED_BELOW:
        return op in ACTIVATIONS
    low = args[1] if len(args) > 1 else kwargs.get("min")
    return isinstance(low, (int, float)) and low == 0


@dataclass(slots=True)
class _Running:
    """A module's forward that is running."""

    path: str
    module: nn.Module
    grad: bool
    has_calls: bool = False
    has_activation: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is no more than a function in the form of a module."""
        own = self.module
        return (isinstance(own, nn.PReLU) or not _learns(own)) and next(own.children(), None) is None


class Occurrences:
    """Names of the layers of a step: they count occurrences within a pass, passes without gradient by themselves."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, bool]] = Counter()
        self.layers: dict[str, Layer] = {}

    def new_pass(self) -> None:
        """Occurrences count from 0 again."""
        self._seen.clear()

    def name(self, layer: Layer, *, grad: bool) -> str:
        """Name of the next occurrence of a layer, entered into the list of layers."""
        occurrence = self._seen[layer.name, grad]
        self._seen[layer.name, grad] += 1
        name = f"{layer.name}@{occurrence}" if occurrence else layer.name
        name = name if grad else f"{name}@nograd"
        if name not in self.layers:
            self.layers[name] = replace(layer, name=name, occurrence=occurrence, depth=len(self.layers))
        return name


def _learns(module: nn.Module) -> bool:
    """Whether a module has parameters; the search through those inside it is spared where it has some itself."""
    own = module._parameters.values()  # noqa: SLF001
    return any(parameter is not None for parameter in own) or next(module.parameters(), None) is not None


def module_layer(path: str, module: nn.Module) -> Layer:
    """A module as a layer."""
    kind = type(module).__name__
    return Layer(path or kind, path, kind, 0, 0)


class LayerTaps:
    """The layers of one sampled step."""

    def __init__(self, buffer: Buffer, hooks: Hooks) -> None:
        self._buffer = buffer
        self._hooks = hooks
        self._running: dict[int, _Running] = {}
        self._stack: list[int] = []
        self._occurrences = Occurrences()
        self._live: dict[str, Tensor] = {}

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers met, by name."""
        return self._occurrences.layers

    def new_pass(self) -> None:
        """Occurrences count from 0 again."""
        self._occurrences.new_pass()
        self._running.clear()
        self._stack.clear()

    def entered(self, call: int, path: str, module: nn.Module, *, grad: bool) -> None:
        """Note that a module's forward begins."""
        if self._stack:
            self._running[self._stack[-1]].has_calls = True
        self._running[call] = _Running(path, module, grad)
        self._stack.append(call)

    def activation(self, op: str, node: Node, out: Tensor, *, grad: bool) -> None:
        """Measure the result of an activation function, unless the module that calls it is one and will be measured."""
        running, scope = self._running.get(node.call), node.scope
        if running is not None and running.plain:
            running.has_activation = True
            return
        layer = Layer(f"{scope}.{op}" if scope else op, scope, op, 0, 0)
        self._measure(layer, out, node, activation=True, grad=grad)

    def exited(self, call: int, out: Tensor | None, node: Node | None) -> Number | None:
        """Measure the output of a module's forward that has ended, if it is a leaf; Σ y² if it was measured."""
        running = self._running.pop(call, None)
        if running is None:
            return None
        while self._stack and self._stack[-1] != call:  # an exception jumped out of forwards inside
            self._running.pop(self._stack.pop(), None)
        if self._stack:
            self._stack.pop()
        if out is None or running.has_calls or not (out.is_floating_point() or out.is_complex()):
            return None
        if _learns(running.module) or running.has_activation:
            layer = module_layer(running.path, running.module)
            return self._measure(layer, out, node, activation=running.has_activation, grad=running.grad)
        return None

    def _measure(
        self, layer: Layer, result: Tensor, node: Node | None, *, activation: bool, grad: bool
    ) -> Number | None:
        out = measurable(result)
        if out is None:
            return None
        name = self._occurrences.name(layer, grad=grad)
        values = self._values(layer, name, out, node, activation=activation)
        self._buffer.put("layers", name, values)
        if result.grad_fn is not None:
            self._hooks.gradient((result.grad_fn, result.output_nr), lambda gradient: self._gradient(name, gradient))
        return values["out_sq"]

    def _values(
        self, layer: Layer, name: str, out: Tensor, node: Node | None, *, activation: bool
    ) -> dict[str, Number | None]:
        """All forward columns."""
        found = statistics.measure(out, ("total", "square", "largest", "zeros", "nonfinite"))
        values: dict[str, Number | None] = {
            "n": float(out.numel()), "out_sum": found["total"], "out_sq": found["square"], "out_max": found["largest"],
            "zeros": found["zeros"], "nonfinite": found["nonfinite"],
        }  # fmt: skip
        if activation:
            values["saturated"] = statistics.count_saturated(out, layer.kind.lower())
            axis = -1 if node is None else node.channel_dim
            live = statistics.live_units(out, axis, found["zeros"]) if out.dim() and out.numel() else None
            if live is not None:
                old = self._live.get(name)
                self._live[name] = live if old is None or old.shape != live.shape else old | live
        return values

    def _gradient(self, name: str, gradient: Tensor) -> None:
        found = self._hooks.measure(gradient, "square", "zeros")
        self._buffer.put("layers", name, {"grad_out_sq": found["square"], "grad_zeros": found["zeros"]})

    def finish(self) -> None:
        """Count the units that were zero on every position of the whole step."""
        for name, live in self._live.items():
            dead = (~live).sum()
            self._buffer.put("layers", name, {"units": float(live.numel()), "dead_units": dead})
        self._live.clear()
