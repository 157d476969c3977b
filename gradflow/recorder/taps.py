"""What watches a sampled step from inside: joins, layers, streams and trunks measured as the training's own pass runs.

One `Taps` lives for one sampled step. Each pass (what runs up to a backward) is measured while it runs, analysed when
it is complete (the analysis of a pass with the same operations is remembered in `Plans`), and then the hooks for its
gradients are placed on autograd nodes that already exist. Nothing here waits for the device.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow.recorder.addition_taps import ADDITIONS, AdditionTaps
from gradflow.recorder.attention_taps import ATTENTION, AttentionTaps
from gradflow.recorder.hooks import Hooks, undisturbed
from gradflow.recorder.join_gradients import JoinGradients
from gradflow.recorder.layer_taps import ACTIVATIONS, LayerTaps, is_activation
from gradflow.recorder.ledgers import SEPARATOR
from gradflow.recorder.measurable import measurable
from gradflow.recorder.stream_taps import StreamTaps
from gradflow.residuals import analyse
from gradflow.tracing import Tracer
from gradflow.tracing.modules import tensors_in
from gradflow.tracing.reentrant import follows_gradients, in_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gradflow.recorder.buffer import Buffer
    from gradflow.recorder.plans import Plans
    from gradflow.records import Node, Structure
    from gradflow.tracing.modules import Survey
    from gradflow.tracing.tape import Tape

_when_done = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001  runs when a backward is over


class Taps:
    """The observer of one sampled step (see `tracing.observation.Observer`)."""

    watches = ADDITIONS | ACTIVATIONS | ATTENTION

    def __init__(
        self, model: nn.Module, buffer: Buffer, plans: Plans, *, rows: int, tables: frozenset[str],
        on_error: Callable[[Exception], None], on_backward: Callable[[Tensor | None], None],
        after_backward: Callable[[], None], tape: Tape | None = None, known: Survey | None = None,
    ) -> None:  # fmt: skip
        self._on_backward = on_backward
        self._after_backward = after_backward
        self.tape = tape
        self.tracer = Tracer(model, self, tape, known)
        self.hooks = Hooks(on_error)
        self.buffer = buffer
        self.structures: list[Structure] = []
        self.attention = AttentionTaps(buffer) if "attention" in tables else None
        self.layers = LayerTaps(buffer, self.hooks) if "layers" in tables else None
        self._plans = plans
        self._rows = rows
        self._tables = tables
        self._on_error = on_error
        self._passes: list[StreamTaps] = []
        self._number = 0
        self.checkpointed = False  # whether a reentrant checkpoint ran: its gradients come when it is computed again
        self.points: dict[str, str] = {}
        self._stance: Any = None
        self._new_pass()

    def _new_pass(self) -> None:
        if self.tape is not None:
            self.tape.clear()
        self._additions = AdditionTaps(self.tracer, self._plans, self._rows)
        self._joins = self._additions.joins
        self._streams = StreamTaps(self.buffer, self.hooks, self._rows)
        self._number += 1
        self.hooks.live = True
        if self.layers is not None:
            self.layers.new_pass()

    def open(self) -> None:
        """Open the mode; compiled code runs eagerly meanwhile."""
        if "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")
        self.tracer.__enter__()

    def shut(self) -> None:
        """Close it."""
        try:
            self.tracer.__exit__(None, None, None)
        finally:
            stance, self._stance = self._stance, None
            if stance is not None:
                stance.__exit__(None, None, None)

    # ------------------------------------------------------------------ operations

    def before(
        self, op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: tuple[int | None, ...]
    ) -> Any:
        """Measure the operands of an addition that may be a join (runs at every addition of a sampled step)."""
        if op not in ADDITIONS or not self._tables & {"branches", "streams"}:
            return None
        try:
            return self._additions.before(op, func, args, kwargs, operands)
        except Exception as error:  # noqa: BLE001 (whatever it is, training goes on)
            self._on_error(error)
            return None

    def after(
        self, node: int, op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, token: Any
    ) -> None:
        """Measure the result of a watched operation (runs at every one of a sampled step)."""
        try:
            made = self.tracer.nodes[node]
            grad = follows_gradients()
            with undisturbed():
                if token is not None:
                    self._additions.after(token, node, made.call, out)
                elif self.layers is not None and is_activation(op, args, kwargs):
                    self.layers.activation(op, made, out, grad=grad)
                elif op in ATTENTION and self.attention is not None and _all_measurable(args, kwargs):
                    self.attention.call(op, node, self.tracer.nodes, args, kwargs, grad=grad)
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    # ------------------------------------------------------------------ modules

    def entered(self, call: int, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module's forward begins."""
        self._streams.entered(call, module)
        self.checkpointed = self.checkpointed or in_checkpoint()
        if self.layers is not None:
            self.layers.entered(call, path, module, grad=follows_gradients())

    def exited(self, call: int, path: str, module: nn.Module, output: Any) -> None:
        """Measure the output of a module's forward that has ended."""
        try:
            with undisturbed():
                self._joins.release(call)
                if self.tracer.depth == 1:
                    self._await_backward(output)
                tensors = [output] if type(output) is Tensor else tensors_in(output, 3)
                out = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
                number = self.tracer.node_of(out) if out is not None else None
                node = None if number is None else self.tracer.nodes[number]
                if self.layers is not None:
                    square = self.layers.exited(call, out, node)
                    if square is not None and number is not None:
                        self._joins.squares[number] = square
                points = self._plans.points  # None until a pass has been analysed
                if out is None or node is None or (points is not None and path not in points):
                    return
                seen = measurable(out)
                if seen is not None and "streams" in self._tables:
                    self._streams.module(node, seen, self._joins.squares.get(node.index), learning=points is None)
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    # ------------------------------------------------------------------ passes

    def backward(self, name: str, args: tuple[Any, ...]) -> None:
        """A backward pass starts while the mode is open (a loop that calls `loss.backward()` itself)."""
        if name == "grad" and not any(isinstance(x, nn.Parameter) for x in tensors_in(args[1:2], 2)):
            self.hooks.live = False  # the model asks for a derivative of its own: a gradient penalty, a physical law
            return
        loss = args[0] if args and isinstance(args[0], Tensor) else None
        self._on_backward(loss)

    def backward_done(self, name: str) -> None:
        """That backward pass is over."""
        if self.hooks.live:
            self._after_backward()
        self.hooks.live = True

    def _await_backward(self, output: Any) -> None:
        """Notice a backward pass that nobody announces (`torch.autograd.backward`) when it reaches the output."""
        number = self._number

        def began(tensor: Tensor) -> Callable[[Tensor], None]:
            loss = tensor.detach() if tensor.numel() == 1 else None

            def use(_gradient: Tensor) -> None:
                if self._number == number:
                    self._on_backward(loss)
                    # twice, so that it comes after what data-parallel wrappers queue in the same backward pass
                    _when_done(lambda: _when_done(self._measured))

            return use

        for tensor in tensors_in(output, 3):
            if tensor.grad_fn is not None:
                self.hooks.gradient((tensor.grad_fn, tensor.output_nr), began(tensor))

    def _measured(self) -> None:
        try:
            self._after_backward()
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    def fault(self, error: Exception) -> None:
        """The trace itself failed."""
        self._on_error(error)

    def close_pass(self) -> None:
        """The pass is complete: understand it, and place the hooks for its gradients."""
        try:
            with undisturbed():
                self._finish_pass()
        except Exception as error:  # noqa: BLE001
            self._on_error(error)

    def _finish_pass(self) -> None:
        fingerprint = self.tracer.fingerprint()
        edges = self.tracer.edges
        graph = self.tracer.take()
        if not graph.nodes or (self.structures and not graph.calls):  # what runs behind a backward is no pass
            if self.attention is not None:
                self.attention.drop()
            self._new_pass()
            return
        if self.attention is not None:
            self.attention.finish(graph.nodes)
        plan = self._plans.structures.get(fingerprint)
        if plan is None:
            plan = self._plans.remember(fingerprint, graph, analyse(graph), self._additions.fingerprints)
        structure, closed = plan
        self.structures.append(structure)
        gradients: dict[int, JoinGradients] = {}
        for join in structure.joins:
            if "branches" in self._tables and self._joins.emit(join, self.buffer):
                taken = JoinGradients(join, self.buffer, self.hooks, closed=join.node in closed)
                again = self.checkpointed and not graph.nodes[join.node].requires_grad
                taken.attach({} if again else edges, graph.nodes)
                gradients[join.node] = taken
        if "streams" in self._tables:
            if self.checkpointed:
                self.points |= _points_computed_again(structure, graph.nodes, edges)
            self._streams.finish(structure, self._joins, gradients, edges, graph)
            self._passes.append(self._streams)
        self._new_pass()

    def finish(self) -> None:
        """The step is over: what is left to compute from gradients, and every hook off."""
        with undisturbed():
            self._finish_pass()
            for streams in self._passes:
                streams.ledgers.close()
            if self.layers is not None:
                self.layers.finish()
        self.close()

    def close(self) -> None:
        """Take every hook off and let go of the pass, of the tracer and of who is told: the step is over for good."""
        self.hooks.remove()
        self.tracer.take()
        self.tracer.release()
        self._on_backward, self._after_backward = lambda _loss: None, lambda: None
        self._passes.clear()
        if self.tape is not None:
            self.tape.clear()


def _all_measurable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(measurable(tensor) is tensor for tensor in tensors_in((args, kwargs), 2))


def _points_computed_again(structure: Structure, nodes: Sequence[Node], edges: dict[int, Any]) -> dict[str, str]:
    """Rows of the stream points that a reentrant checkpoint hides from autograd, by the branch whose join they are."""
    joins = {join.node: join for join in structure.joins}
    hidden = {node: join for node, join in joins.items() if not nodes[node].requires_grad and node not in edges}
    return {
        hidden[node].branches[0].name: stream.name + SEPARATOR + point
        for stream in structure.streams
        for point, node in zip(stream.points, stream.nodes, strict=True)
        if node in hidden
    }
