"""Which tensor is which node: identities, overwrites through views, and what only autograd knows.

Tensors are held by weak reference, so the register keeps no activation alive. For tensors that autograd follows it
holds their autograd nodes, and with them what those save for a backward that has not run yet, until it is cleared.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow.records import Node, Problem
from gradflow.tracing.lineage import RunningLineage
from gradflow.tracing.modules import tensors_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_WALK_LIMIT = 20_000
_node: Any = tuple.__new__  # a NamedTuple's own constructor takes three times as long
_ORDINARY = frozenset({Tensor, nn.Parameter})
_ATOMS = frozenset({
    int, float, bool, complex, str, type(None), type(...), slice, torch.Size, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
})  # fmt: skip

class _Signals(dict[torch.dtype, bool]):
    """Whether a dtype can carry a signal: floating point or complex."""

    def __missing__(self, dtype: torch.dtype) -> bool:
        self[dtype] = known = dtype.is_floating_point or dtype.is_complex
        return known


_SIGNALS = _Signals()


class Register:
    """The nodes of a pass, and the tensors that they stand for.

    `scope` and `call` are where operations run at present; `names` the parameters and buffers by identity; `lineage`
    what follows from the nodes together; `edges` the autograd node and output number of every node that has them;
    `entries` the known tensors by `id`: weak reference, node, version, whether autograd follows.
    """

    def __init__(self, names: dict[int, tuple[str, bool]]) -> None:
        self.names = names
        self.scope = ""
        self.call = -1
        self.problems: list[Problem] = []
        self.nodes: list[Node] = []
        self.lineage = RunningLineage(self.nodes)
        self._refs: list[Callable[[], Tensor | None]] = []
        self.entries: dict[int, tuple[weakref.ref[Tensor], int, int, bool]] = {}
        self.overwrites = False  # versions need no look while nothing was overwritten
        self._writers: dict[int, list[int]] = {}  # by id of the tensor that owns a storage: nodes that overwrote it
        self.edges: dict[int, tuple[Any, int]] = {}
        self._by_edge: dict[tuple[Any, int], int] = {}
        self._filed = 0
        self._hash = 0
        self._hashed = 0

    # ---------------------------------------------------------------- tensors to nodes

    def node_of(self, tensor: Tensor) -> int | None:
        """Node of a tensor that the register knows, None otherwise (runs at every operand)."""
        entry = self.entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return None
        try:
            version = tensor._version  # noqa: SLF001
        except RuntimeError:  # inference tensors keep no version
            return entry[1]
        if version != entry[2]:
            return self._renewed(tensor, entry[1], version)
        if not entry[3] and tensor.requires_grad and tensor.grad_fn is not None:
            return self._adopted(tensor, entry[1])
        return entry[1]

    def node_for(self, tensor: Tensor, kind: str = "") -> int:
        """Node of an operand, made on the spot for a tensor from outside (`kind`: what such a tensor is)."""
        node = self.node_of(tensor)
        if node is not None:
            return node
        kind = kind or ("constant" if self.call >= 0 else "input")
        return self._outside(tensor, kind) if tensor.grad_fn is None else self._resolved(tensor, kind)

    def parents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Nodes of the tensors among an operation's arguments (runs at every operation)."""
        entries, unchanged = self.entries, not self.overwrites
        found = []
        for value in args:
            kind = type(value)
            if kind in _ORDINARY:
                entry = entries.get(id(value))
                if entry and unchanged and (entry[3] or not value.requires_grad) and entry[0]() is value:
                    found.append(entry[1])
                elif entry is None and kind is nn.Parameter:
                    found.append(self._outside(value, ""))
                else:
                    found.append(self.node_for(value))
            elif kind not in _ATOMS:
                found += self._nested(value)
        if kwargs:
            for key, value in kwargs.items():
                if type(value) not in _ATOMS and key != "out":
                    found += self._nested(value)
        return tuple(found)

    def _nested(self, value: Any) -> list[int]:
        """Nodes of the tensors in an argument that is a tensor of some kind, or a container."""
        if not isinstance(value, (Tensor, tuple, list)):
            return []
        return [self.node_for(tensor) for tensor in tensors_in(value, 3, objects=False)]

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor stands for a node (runs at every result)."""
        entry = self.entries.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def handed_on(self, tensor: Tensor) -> bool:
        """Whether an operation's result, a known tensor, was not changed by it."""
        try:
            return self.entries[id(tensor)][2] == tensor._version  # noqa: SLF001
        except RuntimeError:
            return True

    # ---------------------------------------------------------------- new nodes

    def add(
        self, tensor: Tensor, op: str, parents: tuple[int, ...], detail: dict[str, Any], *, inplace: bool = False
    ) -> int:
        """Make a node for a tensor (runs at every operation)."""
        index = len(self.nodes)
        grad = tensor.requires_grad
        shape = tuple(tensor.shape) if type(tensor) in _ORDINARY else _sizes(tensor.shape)
        floating = _SIGNALS[tensor.dtype]
        self.nodes.append(_node(Node, (
            index, op, parents, self.scope, self.call, shape, floating, grad, inplace, detail, self.lineage,
        )))  # fmt: skip
        reference = weakref.ref(tensor)
        self._refs.append(reference)
        try:
            version = tensor._version  # noqa: SLF001
        except RuntimeError:
            version = 0
        self.entries[id(tensor)] = (reference, index, version, grad)
        if inplace:
            self.overwrites = True
            self._writers.setdefault(id(_owner(tensor)), []).append(index)
        if grad:
            function = tensor.grad_fn
            if function is not None:
                self.edges[index] = (function, tensor.output_nr)
        return index

    def virtual(self, op: str, parents: tuple[int, ...], shape: tuple[int, ...], detail: dict[str, Any]) -> int:
        """Make a node for something that an operation computes on the way and no tensor holds."""
        nodes, index = self.nodes, len(self.nodes)
        floating = all(nodes[parent].floating for parent in parents)
        grad = torch.is_grad_enabled() and any(nodes[parent].requires_grad for parent in parents)
        nodes.append(
            Node(index, op, parents, self.scope, self.call, shape, floating, grad, detail=detail, lineage=self.lineage)
        )
        self._refs.append(_nothing)
        return index

    def share_edge(self, node: int, others: Iterable[int]) -> None:
        """Give nodes the gradient of a later one, which is theirs too."""
        edge = self.edges.pop(node, None)
        if edge is not None:
            self.edges.update(dict.fromkeys((*others, node), edge))  # an autograd edge stands for the last of them

    def _outside(self, tensor: Tensor, kind: str) -> int:
        """Node of a tensor that no operation made: a parameter, a buffer, an input, a constant."""
        name = self.names.get(id(tensor))
        if isinstance(tensor, nn.Parameter):
            return self.add(tensor, "parameter", (), {"name": name[0] if name else "", "buffer": False})
        if name is not None:
            return self.add(tensor, "parameter", (), {"name": name[0], "buffer": name[1]})
        index = self.add(tensor, kind, (), {"source": "outside"})
        if kind == "input" and tensor.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(tensor)
            self.edges[index] = (edge.node, edge.output_nr)
        return index

    def opaque(self, tensor: Tensor, parents: tuple[int, ...], what: str, reason: str, *, learned: bool) -> int:
        """Node of a tensor whose making could not be traced; counted among the problems."""
        self.problems.append(Problem(what, self.scope, reason))
        return self.add(tensor, "opaque", parents, {"learned": learned, "what": what})

    def _renewed(self, tensor: Tensor, node: int, version: int) -> int:
        """Node of a tensor that was overwritten through another view of its storage since it was last seen."""
        writers = [n for n in self._writers.get(id(_owner(tensor)), ()) if n > node]
        if not writers:  # an operation updated it on its own (batch-norm statistics)
            self.entries[id(tensor)] = (weakref.ref(tensor), node, version, tensor.requires_grad)
            return node
        if math.prod(self.nodes[writers[-1]].shape) == tensor.numel():
            return self.add(tensor, "view", (writers[-1],), {})
        return self.add(tensor, "update", (node, *writers), {})

    # ---------------------------------------------------------------- what only autograd knows

    def _resolved(self, tensor: Tensor, kind: str) -> int:
        """Node of a tensor that autograd knows and the register does not, by its autograd graph.

        What a model is given (`kind` is `"input"`) and comes from parameters alone was made of data before the pass.
        """
        function = tensor.grad_fn
        edges = self._filed_edges()
        known = edges.get((function, tensor.output_nr))
        if known is not None:
            self.entries[id(tensor)] = (weakref.ref(tensor), known, tensor._version, True)  # noqa: SLF001
            return known
        name = function.name() if function is not None else "tensor"
        parents, learned = self._walk(function, edges)
        if kind == "input" and all(self.nodes[parent].op == "parameter" for parent in parents):
            return self._outside(tensor, kind)
        if len(parents) == 1 and not learned and self._only_handed_on(tensor, parents[0]):
            return self.add(tensor, "alias", tuple(parents), {})
        reason = "made where the trace cannot see, followed by its autograd graph" if parents else "unknown origin"
        return self.opaque(tensor, tuple(parents), name, reason, learned=learned)

    def _adopted(self, tensor: Tensor, node: int) -> int:
        """Node of a tensor that autograd took over after it was made: a custom function's or a checkpoint's output."""
        parents, _ = self._walk(tensor.grad_fn, self._filed_edges())
        new = [parent for parent in parents if not self.lineage.ancestors(node) >> parent & 1]
        return self.add(tensor, "alias", (node, *new), {})

    def _walk(self, start: Any, edges: dict[tuple[Any, int], int]) -> tuple[list[int], bool]:
        """Nodes that an unknown tensor depends on, and whether a weight of two or more dimensions is among them."""
        parents: set[int] = set()
        seen, queue = {start}, [start]
        learned = False
        while queue and len(seen) < _WALK_LIMIT:
            for function, number in queue.pop().next_functions:
                if function is None or function in seen:
                    continue
                known = edges.get((function, number))
                variable = getattr(function, "variable", None)
                if known is not None:
                    parents.add(known)
                elif isinstance(variable, Tensor):
                    parents.add(self.node_for(variable))
                    learned = learned or variable.dim() > 1
                else:
                    seen.add(function)
                    queue.append(function)
        return sorted(parents), learned

    def _filed_edges(self) -> dict[tuple[Any, int], int]:
        """Nodes by autograd edge; filed only when something asks."""
        for index in list(self.edges)[self._filed :]:
            self._by_edge[self.edges[index]] = index
        self._filed = len(self.edges)
        return self._by_edge

    def _only_handed_on(self, tensor: Tensor, node: int) -> bool:
        """Whether a tensor is another one in another wrapping: a sharding wrapper's input, a distributed tensor."""
        other = self._refs[node]()
        if other is None or isinstance(other, nn.Parameter):
            return False
        if type(other) is not type(tensor):
            return True
        try:
            same = other.data_ptr() == tensor.data_ptr() and other.stride() == tensor.stride()
        except RuntimeError:  # no storage: a tensor inside a function transform
            return False
        return same and other.shape == tensor.shape

    # ---------------------------------------------------------------- results

    def fingerprint(self) -> int:
        """Hash of the nodes so far: operations, parents, scopes, and whether autograd follows."""
        for _, op, parents, scope, _, _, _, grad, _, _, _ in self.nodes[self._hashed :]:
            self._hash = hash((self._hash, op, parents, scope, grad))
        self._hashed = len(self.nodes)
        return self._hash


def _nothing() -> None:
    """What is left of a tensor that there never was."""


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """A shape as integers; 0 for a ragged dimension of a nested tensor, which has no one size."""
    return tuple([size if type(size) is int else 0 for size in shape])


def _owner(tensor: Tensor) -> Tensor:
    """The tensor whose storage a view looks at."""
    base = tensor._base if tensor._is_view() else None  # noqa: SLF001
    return tensor if base is None else base
