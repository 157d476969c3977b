"""One forward pass -> graph of operations: a `TorchFunctionMode` that turns every operation into a `Node`.

The graph is plain data. While the mode is open the tracer holds weak references to tensors and, for operations that
autograd follows, their autograd nodes; no activation is kept alive by the trace itself.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradflow.axes import features_axis
from gradflow.operations import Operation, operation
from gradflow.records import Call, Graph, Node, Problem

if TYPE_CHECKING:
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle

_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WALK_LIMIT = 20_000
_SCALAR_ALPHA = frozenset({"add", "sub"})
_BACKWARD = frozenset({"backward", "grad"})


class Observer(Protocol):
    """What watches a traced pass from inside: the recorder."""

    watches: frozenset[str]

    def before(
        self, op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: tuple[int | None, ...]
    ) -> Any:
        """Run before a watched operation (in-place ones overwrite); the result is handed to `after`."""

    def after(
        self, node: int, op: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, token: Any
    ) -> None:
        """Run after a watched operation made `node`."""

    def entered(self, call: int, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run when a module's forward begins."""

    def exited(self, call: int, path: str, module: nn.Module, output: Any) -> None:
        """Run when a module's forward has ended (`output` is None if it raised)."""

    def backward(self, name: str, args: tuple[Any, ...]) -> None:
        """Run before a backward pass (`name` is "backward" or "grad") that starts while the mode is on."""

    def backward_done(self, name: str) -> None:
        """Run after such a backward pass."""


class _Entry(NamedTuple):
    ref: weakref.ref[Tensor]
    node: int
    version: int


@dataclasses.dataclass(slots=True)
class _Frame:
    """A module's forward that is running, and its row in the graph's calls."""

    index: int
    path: str
    parent: int
    kind: str
    grad: bool
    first_node: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors nested in tuples, lists, mappings, dataclasses and plain objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif value is None or isinstance(value, (str, bytes, int, float, nn.Module, type)) or depth == 0:
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif hasattr(value, "__dict__") and not callable(value):
        for item in list(vars(value).values()):
            yield from tensors_in(item, depth - 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None), depth - 1)


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module only hands its arguments on to the one that it wraps."""
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return True
    return any(segment in module._modules for segment in _WRAPPER_SEGMENTS)  # noqa: SLF001


def module_paths(model: nn.Module) -> dict[nn.Module, str]:
    """Dotted path of every module, the first name for a shared one, without the segments that wrappers add.

    Wrappers themselves (DDP, compiled, checkpointed, FSDP) are left out: they add nothing of their own.
    """
    paths: dict[nn.Module, str] = {}
    parallel: set[str] = set()
    scripted: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in scripted):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(name + "." if name else "")
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            parallel.add(name)
        if not _is_wrapper(module):
            paths[module] = _stripped(name, parallel)
    return paths


def _stripped(name: str, parallel: set[str]) -> str:
    """`name` without wrapper segments; `parallel` holds the raw names of data-parallel wrappers met so far."""
    kept: list[str] = []
    raw = ""
    for segment in name.split(".") if name else []:
        wrapped = segment in _WRAPPER_SEGMENTS or (segment == "module" and raw in parallel)
        raw = f"{raw}.{segment}" if raw else segment
        if not wrapped:
            kept.append(segment)
    return ".".join(kept)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version  # noqa: SLF001
    except RuntimeError:  # inference tensors keep no version
        return 0


class Tracer(TorchFunctionMode):
    """The mode that traces a pass (or several: teacher, siamese, loss) of `model` while it is open.

    `take()` hands out the graph and begins a new pass. Operations outside every submodule's forward have scope `""`
    and call -1; operations inside a backward pass (recomputation, custom backwards) are ignored.
    """

    def __init__(self, model: nn.Module, observer: Observer | None = None) -> None:
        super().__init__()
        self.model = model
        self.observer = observer
        self._watches = observer.watches if observer is not None else frozenset()
        self._handles: list[RemovableHandle] = []
        self._names: dict[int, str] = {}
        self._reset()

    def _reset(self) -> None:
        self._nodes: list[Node] = []
        self._calls: list[_Frame] = []
        self._stack: list[_Frame] = []
        self._problems: list[Problem] = []
        self._entries: dict[int, _Entry] = {}
        self._writers: dict[int, list[int]] = {}
        self._edges: dict[int, tuple[Any, int]] = {}
        self._by_edge: dict[tuple[Any, int], int] = {}
        self._hash = 0

    # ---------------------------------------------------------------- opening and closing

    def __enter__(self) -> Tracer:  # noqa: PYI034
        try:
            for module, path in module_paths(self.model).items():
                self._hook(module, path)
            self._names = {id(p): n for n, p in self.model.named_parameters()}
            self._names.update({id(b): n for n, b in self.model.named_buffers()})
            super().__enter__()
        except BaseException:
            self._unhook()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, value, trace)
        finally:
            self._unhook()
            self._stack.clear()

    def _hook(self, module: nn.Module, path: str) -> None:
        def entered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch._C._current_graph_task_id() == -1:  # noqa: SLF001
                self._enter_call(path, module, args, kwargs)

        def exited(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() == -1:  # noqa: SLF001
                self._exit_call(path, module, output)

        self._handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
        self._handles.append(module.register_forward_hook(exited, with_kwargs=True, always_call=True))

    def _unhook(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    # ---------------------------------------------------------------- what the trace knows

    @property
    def depth(self) -> int:
        """Module forwards that are running."""
        return len(self._stack)

    def take(self) -> Graph:
        """Graph of the pass so far; the tracer begins a new pass."""
        calls = tuple(
            Call(frame.index, frame.path, frame.parent, frame.kind, frame.grad, frame.outputs, frame.inputs)
            for frame in self._calls
        )
        graph = Graph(tuple(self._nodes), calls, tuple(self._problems))
        self._reset()
        return graph

    def fingerprint(self) -> int:
        """Hash of the pass so far: equal for passes with the same operations, parents and scopes."""
        return self._hash

    def node_of(self, tensor: Tensor) -> int | None:
        """Node of a tensor that the trace has seen, None otherwise."""
        entry = self._entries.get(id(tensor))
        if entry is None or entry.ref() is not tensor:
            return None
        version = _version(tensor)
        return entry.node if version == entry.version else self._renewed(tensor, entry, version)

    def edge(self, node: int) -> tuple[Any, int] | None:
        """Autograd node and output number of a traced tensor, None if autograd does not follow it."""
        return self._edges.get(node)

    # ---------------------------------------------------------------- module calls

    def _enter_call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            stack = self._stack
            outermost = not stack
            inputs: list[int] = []
            for tensor in tensors_in((args, kwargs), 6 if outermost else 3):
                node = self.node_of(tensor)
                if node is None and outermost:
                    node = self._outside(tensor, "input")
                if node is not None:
                    inputs.append(node)
            frame = _Frame(
                len(self._calls),
                path,
                stack[-1].index if stack else -1,
                type(module).__name__,
                torch.is_grad_enabled(),
                len(self._nodes),
                tuple(inputs),
            )
            self._calls.append(frame)
            stack.append(frame)
        if self.observer is not None:
            self.observer.entered(frame.index, path, module, args, kwargs)

    def _exit_call(self, path: str, module: nn.Module, output: Any) -> None:
        position = next((i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i].path == path), None)
        if position is None:  # the mode was opened, or the pass taken, inside this forward
            return
        frame = self._stack[position]
        if self.observer is not None:
            self.observer.exited(frame.index, path, module, output)
        with torch._C.DisableTorchFunction():  # noqa: SLF001
            outputs: list[int] = []
            for tensor in tensors_in(output, 4):
                node = self.node_of(tensor)
                outputs.append(node if node is not None else self._unknown_output(tensor, frame, module))
            frame.outputs = tuple(outputs)
        del self._stack[position:]

    def _unknown_output(self, tensor: Tensor, frame: _Frame, module: nn.Module) -> int:
        """Node for a module's output that no traced operation made."""
        silent = len(self._nodes) == frame.first_node
        if not silent and (tensor.requires_grad or id(tensor) in self._names or isinstance(tensor, nn.Parameter)):
            return self._node_for(tensor)
        if id(tensor) in self._names or not frame.inputs:
            return self._node_for(tensor)
        learned = any(p.dim() > 1 for p in module.parameters())
        self._problems.append(Problem(frame.kind, frame.path, "its inside could not be traced"))
        return self._register(tensor, "opaque", frame.inputs, {"learned": learned, "module": frame.kind})

    # ---------------------------------------------------------------- operations

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and put it into the graph (runs at every operation)."""
        kwargs = kwargs or {}
        what = operation(func)
        if what.unseen or torch._C._current_graph_task_id() != -1:  # noqa: SLF001
            return func(*args, **kwargs)
        if what.name in _BACKWARD:
            if self.observer is not None:
                self.observer.backward(what.name, args)
            out = func(*args, **kwargs)
            if self.observer is not None:
                self.observer.backward_done(what.name)
            return out
        parents, operands = ([], ()) if what.factory else self._operands(what, args, kwargs)
        if self.observer is None or what.name not in self._watches:
            out = func(*args, **kwargs)
            self._record(what, parents, args, kwargs, out)
            return out
        ordered, rest = _ordered(what, args, kwargs)
        numbers = operands if ordered is args else tuple(self._number(value) for value in ordered)
        token = self.observer.before(what.name, func, ordered, rest, numbers)
        out = func(*args, **kwargs)
        node = self._record(what, parents, args, kwargs, out)
        if node is not None and isinstance(out, Tensor):
            self.observer.after(node, what.name, func, ordered, rest, out, token)
        return out

    def _number(self, value: Any) -> int | None:
        return self.node_of(value) if isinstance(value, Tensor) else None

    def _operands(
        self, what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[int], tuple[int | None, ...]]:
        """Nodes of all tensors among the arguments, and of the positional ones by position."""
        parents: list[int] = []
        numbers: list[int | None] = []
        for value in args:
            number = None
            if isinstance(value, Tensor):
                number = self._node_for(value)
                parents.append(number)
            elif isinstance(value, (tuple, list)):
                parents.extend(self._node_for(tensor) for tensor in tensors_in(value, 3))
            numbers.append(number)
        for key, value in kwargs.items():
            if key != "out" and isinstance(value, (Tensor, tuple, list)):
                parents.extend(self._node_for(tensor) for tensor in tensors_in(value, 3))
        if what.reflected:
            parents.reverse()
        return (parents[:1] if what.first_only else parents), tuple(numbers)

    def _record(
        self, what: Operation, parents: list[int], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> int | None:
        """Put an operation's result into the graph; the node of a single tensor."""
        if isinstance(out, Tensor):
            return self._result(what, parents, args, kwargs, out)
        if isinstance(out, (tuple, list)):
            tensors = [tensor for tensor in out if isinstance(tensor, Tensor)]
            for position, tensor in enumerate(tensors):
                self._register(
                    tensor, what.name, tuple(parents), {"output": position, "outputs": len(tensors)}, inplace=what.inplace
                )
        elif out is None and what.inplace and args and isinstance(args[0], Tensor):
            self._register(args[0], what.name, tuple(parents), {}, inplace=True)
        return None

    def _result(
        self, what: Operation, parents: list[int], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> int | None:
        entry = self._entries.get(id(out))
        inplace = what.inplace
        if entry is not None and entry.ref() is out and not inplace:
            if entry.version == _version(out):
                return None  # handed on untouched: `contiguous()`, `to()` of what is so already
            inplace = True
        if what.factory:
            return self._register(out, "constant", (), {"factory": what.name})
        detail: dict[str, Any] = {}
        if what.name in _SCALAR_ALPHA:
            detail = _terms(parents, args, kwargs)
        moved = args[1:] or tuple(kwargs.values())
        return self._register(out, what.name, tuple(parents), detail, inplace=inplace, moved=moved)

    # ---------------------------------------------------------------- nodes

    def _node_for(self, tensor: Tensor) -> int:
        """Node of an operand, made on the spot for a tensor from outside."""
        node = self.node_of(tensor)
        if node is not None:
            return node
        if tensor.grad_fn is not None:
            return self._resolved(tensor)
        return self._outside(tensor, "constant" if self._stack else "input")

    def _outside(self, tensor: Tensor, kind: str) -> int:
        """Node of a tensor that no operation made: a parameter, a buffer, an input, a constant."""
        name = self._names.get(id(tensor))
        if isinstance(tensor, nn.Parameter):
            return self._register(tensor, "parameter", (), {"name": name or "", "buffer": False})
        if name is not None:
            return self._register(tensor, "parameter", (), {"name": name, "buffer": True})
        return self._register(tensor, kind, (), {"source": "outside"})

    def _resolved(self, tensor: Tensor) -> int:
        """Node of a tensor that autograd knows and the trace does not, by its autograd graph."""
        known = self._by_edge.get((tensor.grad_fn, tensor.output_nr))
        if known is not None:
            self._entries[id(tensor)] = _Entry(weakref.ref(tensor), known, _version(tensor))
            return known
        parents, learned, found = self._walk(tensor.grad_fn)
        reason = "made by an operation that the trace cannot see" if found else "its origin is unknown"
        name = tensor.grad_fn.name() if tensor.grad_fn is not None else "tensor"
        self._problems.append(Problem(name, self._stack[-1].path if self._stack else "", reason))
        return self._register(tensor, "opaque", tuple(parents), {"learned": learned, "function": name})

    def _walk(self, start: Any) -> tuple[list[int], bool, bool]:
        """Nodes that an unknown tensor depends on, whether a weight of two or more dimensions is among them."""
        parents: list[int] = []
        seen = {start}
        queue = [start]
        learned = False
        while queue and len(seen) < _WALK_LIMIT:
            for function, number in queue.pop().next_functions:
                if function is None or function in seen:
                    continue
                known = self._by_edge.get((function, number))
                variable = getattr(function, "variable", None)
                if known is not None:
                    parents.append(known)
                elif isinstance(variable, Tensor):
                    parents.append(self._node_for(variable))
                    learned = learned or variable.dim() > 1
                else:
                    seen.add(function)
                    queue.append(function)
        return sorted(set(parents)), learned, bool(parents)

    def _renewed(self, tensor: Tensor, entry: _Entry, version: int) -> int:
        """Node of a tensor that was overwritten through another view of its storage since the trace last saw it."""
        base = tensor._base if tensor._is_view() else tensor  # noqa: SLF001
        writers = [n for n in self._writers.get(id(base), ()) if n > entry.node]
        if not writers:  # an operation updated it on its own (batch-norm statistics)
            self._entries[id(tensor)] = entry._replace(version=version)
            return entry.node
        last = self._nodes[writers[-1]]
        count = 1
        for size in last.shape:
            count *= size
        if count == tensor.numel():
            return self._register(tensor, "view", (last.index,), {})
        return self._register(tensor, "update", (entry.node, *writers), {})

    def _register(
        self, tensor: Tensor, op: str, parents: tuple[int, ...], detail: dict[str, Any], *, inplace: bool = False,
        moved: tuple[Any, ...] = (),
    ) -> int:  # fmt: skip
        nodes = self._nodes
        index = len(nodes)
        ancestors = 0
        for parent in parents:
            ancestors |= nodes[parent].ancestors | (1 << parent)
        stack = self._stack
        scope, call = (stack[-1].path, stack[-1].index) if stack else ("", -1)
        shape = tuple(tensor.shape)
        grad = tensor.requires_grad
        source = nodes[parents[0]] if parents else None
        channel = -1 if source is None else features_axis(op, moved, source.shape, source.channel_dim, shape)
        floating = tensor.is_floating_point() or tensor.is_complex()
        nodes.append(
            Node(index, op, parents, ancestors, scope, call, shape, floating, grad, channel, inplace, detail)
        )
        self._entries[id(tensor)] = _Entry(weakref.ref(tensor), index, _version(tensor))
        if inplace:
            base = tensor._base if tensor._is_view() else tensor  # noqa: SLF001
            self._writers.setdefault(id(base), []).append(index)
        if grad and tensor.grad_fn is not None:
            edge = (tensor.grad_fn, tensor.output_nr)
            self._edges[index] = edge
            self._by_edge[edge] = index
        self._hash = hash((self._hash, op, parents, scope, grad))
        return index


def _ordered(
    what: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the operation's own order: operands given by keyword or in reflected order put right."""
    if what.reflected:
        return tuple(reversed(args)), kwargs
    if "input" in kwargs or "other" in kwargs:
        given = [kwargs[key] for key in ("input", "other") if key in kwargs]
        rest = {key: value for key, value in kwargs.items() if key not in {"input", "other"}}
        return (*args, *given), rest
    return args, kwargs


def _terms(parents: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a sum adds beside its tensors: the factor of the second operand, or a number."""
    alpha = kwargs.get("alpha", 1)
    detail = {"alpha": alpha} if alpha != 1 else {}
    if len(parents) == 1:
        numbers = [value for value in args if isinstance(value, (int, float))]
        if numbers:
            detail["scalar"] = numbers[0]
    return detail
