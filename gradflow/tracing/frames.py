"""Which module's forward is running: the stack of calls, what went into each and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow.records import Call
from gradflow.tracing.modules import tensors_in
from gradflow.tracing.reentrant import in_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradflow.tracing.register import Register

# At the outermost call inputs may hide in objects; between modules only containers are looked into.
_OUTER_DEPTH, _INNER_DEPTH = 5, 2
_NUMBERS = (int, float, str)


@dataclass(slots=True)
class _Frame:
    """A module's forward, and its row in the graph's calls."""

    index: int
    path: str
    parent: int
    kind: str
    enabled: bool
    grad: bool
    first_node: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()


class Frames:
    """The calls of a pass, and the stack of those that are running; the register is told where operations run."""

    def __init__(self, register: Register) -> None:
        self._register = register
        self._all: list[_Frame] = []
        self._stack: list[_Frame] = []

    def __len__(self) -> int:
        return len(self._stack)

    def calls(self) -> tuple[Call, ...]:
        """Every call so far."""
        return tuple(Call(f.index, f.path, f.parent, f.kind, f.grad, f.outputs, f.inputs) for f in self._all)

    def begin(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """A forward begins; the number of its call."""
        register, stack = self._register, self._stack
        values = (*args, *kwargs.values()) if kwargs else args
        inputs = self._inputs(values) if stack else self._outermost_inputs(values)
        enabled = torch.is_grad_enabled()
        frame = _Frame(
            len(self._all), path, stack[-1].index if stack else -1, type(module).__name__, enabled,
            enabled or self._is_computed_again(), len(register.nodes), inputs,
        )  # fmt: skip
        self._all.append(frame)
        stack.append(frame)
        register.scope, register.call = path, frame.index
        return frame.index

    def _is_computed_again(self) -> bool:
        """Whether a reentrant checkpoint runs the forward that begins without gradient; if so, it began with some."""
        return in_checkpoint() if not self._stack or self._stack[-1].enabled else self._stack[-1].grad

    def _inputs(self, values: Iterable[Any]) -> tuple[int, ...]:
        """Nodes of what one module hands to another."""
        register, nodes = self._register, []
        for value in values:
            if type(value) is Tensor:
                tensors = [value]
            elif value is None or isinstance(value, _NUMBERS):
                continue
            else:
                tensors = tensors_in(value, _INNER_DEPTH, objects=False)
            for tensor in tensors:
                node = register.node_of(tensor)
                if node is not None:
                    nodes.append(node)
                    if tensor.grad_fn is not None:  # a custom function gives its result another node when it is done
                        register.edges[node] = (tensor.grad_fn, tensor.output_nr)
        return tuple(nodes)

    def _outermost_inputs(self, values: Iterable[Any]) -> tuple[int, ...]:
        """Nodes of what the model is called with."""
        register, nodes = self._register, []
        for value in values:
            for tensor in tensors_in(value, _OUTER_DEPTH):
                node = register.node_for(tensor, "input")
                nodes.append(node)
                if tensor.grad_fn is not None:
                    register.edges[node] = (tensor.grad_fn, tensor.output_nr)
                elif tensor.requires_grad and node not in register.edges:
                    edge = torch.autograd.graph.get_gradient_edge(tensor)  # a leaf made by `detach`
                    register.edges[node] = (edge.node, edge.output_nr)
        return tuple(nodes)

    def running(self, path: str) -> int | None:
        """Place in the stack of the innermost running forward of a module; None if the pass began inside it."""
        stack = self._stack
        if stack and stack[-1].path == path:
            return len(stack) - 1
        return next((i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i].path == path), None)

    def call_at(self, place: int) -> int:
        """Number of the call at a place in the stack."""
        return self._stack[place].index

    def end(self, place: int, module: nn.Module, output: Any) -> None:
        """The forward at a place in the stack has ended, and with it any that an exception jumped out of."""
        frame = self._stack[place]
        outputs = []
        for tensor in [output] if type(output) is Tensor else tensors_in(output, objects=False):
            node = self._register.node_of(tensor)
            outputs.append(self._unknown_output(tensor, frame, module) if node is None else node)
        frame.outputs = tuple(outputs)
        self.leave(place)

    def leave(self, place: int) -> None:
        """Drop the running forwards from a place in the stack on."""
        del self._stack[place:]
        top = self._stack[-1] if self._stack else None
        self._register.scope, self._register.call = (top.path, top.index) if top is not None else ("", -1)

    def _unknown_output(self, tensor: Tensor, frame: _Frame, module: nn.Module) -> int:
        """Node for a module's output that no traced operation made."""
        register = self._register
        silent = len(register.nodes) == frame.first_node
        known = id(tensor) in register.names or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point()
        if known or not frame.inputs or (not silent and tensor.grad_fn is not None):
            return register.node_for(tensor)
        learned = any(p.dim() > 1 for p in (*module.parameters(), *module.buffers()))
        reason = "nothing inside it could be traced" if silent else "its last operations could not be traced"
        return register.opaque(tensor, frame.inputs, frame.kind, reason, learned=learned)
