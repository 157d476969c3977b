"""One forward pass -> graph of operations: a `TorchFunctionMode` that turns every operation into a `Node`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradflow.records import Graph, Node
from gradflow.tracing.attachment import Attachment
from gradflow.tracing.composites import COMPOSITES, Addition, ordered, written_out
from gradflow.tracing.frames import Frames
from gradflow.tracing.modules import Survey, survey, tensors_in
from gradflow.tracing.operations import Operation, operation
from gradflow.tracing.reentrant import current_backward
from gradflow.tracing.register import Register

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from torch import nn

    from gradflow.tracing.observation import Observer
    from gradflow.tracing.tape import Tape

_BACKWARD = frozenset({"backward", "grad"})
_WATCHED = _BACKWARD | COMPOSITES
_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


class _Pending(NamedTuple):
    """What was known before an operation ran: its parents, what it adds up, and what the observer is told."""

    what: Operation
    parents: tuple[int, ...] = ()
    addition: Addition | None = None
    watched: tuple[_Args, _Kwargs, Any] | None = None


class Tracer(TorchFunctionMode):
    """The mode that traces a pass (or several: teacher, siamese, loss) of `model` while it is open.

    `take()` hands out the graph and begins a new pass; `clear()` begins one without building the graph. Operations
    outside every submodule's forward have scope `""` and call -1. Operations and module calls inside a backward pass
    (recomputation, custom backwards) are ignored. Hooks are per module and gone when the mode closes. With a `tape`
    operations are noted on it as well. `known` is the model as it stands when the mode first opens.
    """

    def __init__(
        self, model: nn.Module, observer: Observer | None = None, tape: Tape | None = None, known: Survey | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.observer = observer
        self._tape = tape
        self._known = known
        self._run: Callable[[Any, _Args, _Kwargs], Any] = _run if tape is None else tape.run
        self._watches = _WATCHED if observer is None else _WATCHED | observer.watches
        self._attachment = Attachment(self, self._enter_call, self._exit_call, aside=observer is not None)
        self._failed = False
        self.when_outermost_ends: Callable[[], None] | None = None
        self.recomputes = False  # whether to trace inside a backward pass, which is otherwise left out
        self._names: dict[int, tuple[str, bool]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the pass so far, and with it every reference to autograd nodes."""
        self._register = Register(self._names)
        self._frames = Frames(self._register)

    # ---------------------------------------------------------------- opening and closing

    def __enter__(self) -> Tracer:  # noqa: PYI034
        found, self._known = self._known or survey(self.model), None
        self._names = self._register.names = found.names
        self._attachment.open(found.paths)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attachment.close()
        self._frames.leave(0)
        self._place()

    def release(self) -> None:
        """Let go of the pass and of whoever is told, who knows us: nothing of ours waits for a garbage collection."""
        self._attachment.release()
        self.observer = self.when_outermost_ends = None
        self.clear()

    def _fault(self, error: Exception) -> None:
        """Our own bookkeeping failed: whoever observes a training hears of it, and the training goes on."""
        if self.observer is None:
            raise error
        self._failed = True
        self.clear()
        self.observer.fault(error)

    # ---------------------------------------------------------------- what the trace knows

    @property
    def depth(self) -> int:
        """Module forwards that are running."""
        return len(self._frames)

    def take(self) -> Graph:
        """Graph of the pass so far; the tracer begins a new pass."""
        register = self._register
        graph = Graph(tuple(register.nodes), self._frames.calls(), tuple(register.problems))
        if self.observer is not None:  # a training: what a step leaves behind must not wait for a garbage collection
            register.lineage.settle()
        self.clear()
        return graph

    def fingerprint(self) -> int:
        """Hash of the pass so far: equal for passes with the same operations, parents and scopes."""
        return self._register.fingerprint()

    def node_of(self, tensor: Tensor) -> int | None:
        """Node of a tensor that the trace has seen, None otherwise."""
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            return self._register.node_of(tensor)

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes of the pass so far."""
        return self._register.nodes

    @property
    def edges(self) -> dict[int, tuple[Any, int]]:
        """`edge` of every node that has one; the dictionary stays valid after `take()`."""
        return self._register.edges

    def edge(self, node: int) -> tuple[Any, int] | None:
        """Autograd node and output number of a traced tensor, None if autograd does not follow it.

        Captured when the node was made, so that an in-place operation later does not change it; valid until `take()`.
        """
        return self._register.edges.get(node)

    # ---------------------------------------------------------------- module calls

    def _enter_call(self, path: str, module: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        if self._failed or (current_backward() != -1 and not self.recomputes):
            return
        try:
            with torch._C.DisableTorchFunction():  # noqa: SLF001
                call = self._frames.begin(path, module, args, kwargs)
            self._place()
            if self.observer is not None:
                self.observer.entered(call, path, module, args, kwargs)
        except Exception as error:  # noqa: BLE001 (whatever it is, the model's forward goes on)
            self._fault(error)

    def _exit_call(self, path: str, module: nn.Module, _args: _Args, output: Any) -> None:
        if self._failed or (current_backward() != -1 and not self.recomputes):
            return
        place = self._frames.running(path)
        if place is None:  # the mode was opened, or the pass taken, inside this forward
            return
        try:
            if self.observer is not None:
                self.observer.exited(self._frames.call_at(place), path, module, output)
            with torch._C.DisableTorchFunction():  # noqa: SLF001
                self._frames.end(place, module, output)
            self._place()
            if not place and self.when_outermost_ends is not None:
                self.when_outermost_ends()
        except Exception as error:  # noqa: BLE001
            self._fault(error)

    def _place(self) -> None:
        """Tell the tape where operations run."""
        if self._tape is not None:
            self._tape.scope = self._register.scope if self._frames else None

    # ---------------------------------------------------------------- operations

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: _Args = (), kwargs: _Kwargs | None = None
    ) -> Any:
        """Run one operation and put it into the graph (runs at every operation)."""
        what = operation(func)
        if what.unseen or self._failed or (current_backward() != -1 and not self.recomputes):
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if what.name in self._watches:
            return self._observed(what, func, args, kwargs)
        register, plain = self._register, what.plain
        try:
            parents = register.parents(args, kwargs) if plain else self._parents(what, args, kwargs)
        except Exception as error:  # noqa: BLE001 (whatever it is, the model's operation runs)
            self._fault(error)
        out = self._run(func, args, kwargs)  # once, whatever happens to us; what it raises is the model's own
        if self._failed:
            return out
        try:
            if plain and type(out) is Tensor and not register.knows(out):
                register.add(out, what.name, parents, {})
            else:
                self._record(what, parents, args, kwargs, out)
        except Exception as error:  # noqa: BLE001
            self._fault(error)
        return out

    def _observed(self, what: Operation, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        """Run an operation that is more than one node, or that the observer wants to know of."""
        pending = self._before(what, func, args, kwargs)
        out = (_run if what.name in _BACKWARD else self._run)(func, args, kwargs)
        if pending is not None:
            self._after(pending, func, args, kwargs, out)
        return out

    def _before(self, what: Operation, func: Any, args: _Args, kwargs: _Kwargs) -> _Pending | None:
        """What must be known before an observed operation runs; None if we failed."""
        name, observer, register = what.name, self.observer, self._register
        try:
            if name in _BACKWARD:
                if observer is not None:
                    observer.backward(name, args)
                return _Pending(what)
            parents = self._parents(what, args, kwargs)
            addition = written_out(register, name, parents, args, kwargs) if name in COMPOSITES else None
            if observer is None or name not in observer.watches or (name in COMPOSITES and addition is None):
                return _Pending(what, parents, addition)
            operands: tuple[int | None, ...]
            if addition is not None:
                given, rest, operands = tuple(ordered(args, kwargs)), kwargs, addition.parents
            else:
                given, rest = _ordered(what, args, kwargs)
                operands = tuple(register.node_of(value) if isinstance(value, Tensor) else None for value in given)
            token = observer.before(name, func, given, rest, operands)
        except Exception as error:  # noqa: BLE001
            self._fault(error)
            return None
        return _Pending(what, parents, addition, (given, rest, token))

    def _after(self, pending: _Pending, func: Any, args: _Args, kwargs: _Kwargs, out: Any) -> None:
        """Put an operation that has run into the graph."""
        what, parents, addition, watched = pending
        try:
            if what.name in _BACKWARD:
                if self.observer is not None:
                    self.observer.backward_done(what.name)
                return
            if addition is None:
                node = self._record(what, parents, args, kwargs, out)
            else:
                node = self._record(replace(what, name="add"), addition.parents, args, kwargs, out, addition.detail)
            if node is None:
                return
            if addition is not None and addition.partial:
                self._register.share_edge(node, addition.partial)
            if watched is not None and self.observer is not None:
                given, rest, token = watched
                first = out if isinstance(out, Tensor) else tensors_in(out, 1)[0]
                self.observer.after(node, what.name, func, given, rest, first, token)
        except Exception as error:  # noqa: BLE001
            self._fault(error)

    def _parents(self, what: Operation, args: _Args, kwargs: _Kwargs) -> tuple[int, ...]:
        """Nodes that an operation's result depends on, in the operation's own order."""
        if what.factory:
            return ()
        parents = self._register.parents(args, kwargs)
        if what.reflected:
            parents = parents[::-1]
        return parents[:1] if what.first_only else parents

    def _record(
        self, what: Operation, parents: tuple[int, ...], args: _Args, kwargs: _Kwargs, out: Any,
        detail: dict[str, Any] | None = None,
    ) -> int | None:  # fmt: skip
        """Put an operation's result into the graph; the node of its (first) tensor."""
        register = self._register
        if isinstance(out, Tensor):
            inplace = what.inplace
            if not inplace and register.knows(out):
                if register.handed_on(out):
                    return None  # `contiguous()`, `to()` of what is so already
                inplace = "out" in kwargs or any(value is out for value in args)  # `F.relu(x, inplace=True)`, `out=`
            if what.factory:
                return register.add(out, "constant", (), {"factory": what.name})
            if detail is None:
                detail = _detail(what.name, parents, args, kwargs) if what.detailed else {}
            return register.add(out, what.name, parents, detail, inplace=inplace)
        if isinstance(out, (tuple, list)):
            tensors = [tensor for tensor in out if isinstance(tensor, Tensor)]
            nodes = [
                register.add(
                    tensor, what.name, parents, {"output": position, "outputs": len(tensors)}, inplace=what.inplace
                )
                for position, tensor in enumerate(tensors)
            ]
            return nodes[0] if nodes else None
        if out is None and what.inplace and args and isinstance(args[0], Tensor):  # `x[i] = y`
            register.add(args[0], what.name, parents, {}, inplace=True)
        return None


def _run(func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    return func(*args, **kwargs)


def _ordered(what: Operation, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs]:
    """Arguments in the operation's own order: operands given by keyword or in reflected order put right."""
    if what.reflected:
        return tuple(reversed(args)), kwargs
    if "input" in kwargs or "other" in kwargs:
        given = [kwargs[key] for key in ("input", "other") if key in kwargs]
        return (*args, *given), {key: value for key, value in kwargs.items() if key not in {"input", "other"}}
    return args, kwargs


def _detail(name: str, parents: tuple[int, ...], args: _Args, kwargs: _Kwargs) -> dict[str, Any]:
    """What the analysis needs beside the tensors: the axes moved, a sum's factor or number, a power."""
    if name in {"transpose", "permute"}:
        axes = args[1:] or tuple(kwargs.values())
        return {"axes": axes[0] if axes and isinstance(axes[0], (tuple, list)) else axes}
    if name in {"getitem", "narrow", "select"}:
        return {"index": repr(args[1:])} if len(parents) == 1 else {}
    if name == "stack":
        return {"dim": kwargs.get("dim", args[1] if len(args) > 1 else 0)}
    alpha = kwargs.get("alpha", 1)
    if isinstance(alpha, Tensor):
        alpha = alpha.item()  # no wait of ours: the addition itself has just read it in the same way
    detail: dict[str, Any] = {} if alpha == 1 else {"alpha": alpha}
    if len(parents) == 1:
        numbers = [value for value in args if isinstance(value, (int, float))]
        if numbers:
            detail["scalar"] = numbers[-1]
    return detail
