"""Which tensor is which node: identities, overwrites through views, and what only autograd knows.

Tensors are held by weak reference, so the register keeps no activation alive. For tensors that autograd follows it
holds their autograd nodes, and with them what those save for a backward that has not run yet, until it is cleared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from gradflow.records import Lineage, Node, Problem
from gradflow.tracing.axes import features_axis

_WALK_LIMIT = 20_000
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "dropout", "pow", "tanh", "relu", "gelu", "silu", "contiguous"})
_FLOATING: dict[torch.dtype, bool] = {}

# op, parents, scope, call, shape, dtype, requires_grad, inplace, detail
_Row = tuple[str, tuple[int, ...], str, int, torch.Size, torch.dtype, bool, bool, dict[str, Any]]


def is_signal(dtype: torch.dtype) -> bool:
    """Whether a dtype can carry a signal: floating point or complex."""
    known = _FLOATING.get(dtype)
    if known is None:
        known = _FLOATING[dtype] = dtype.is_floating_point or dtype.is_complex
    return known


class Register(Sequence[Node]):
    """The nodes of a pass, as rows, and the tensors that they stand for.

    As a sequence it makes its nodes on demand. `scope` and `call` are where operations run at present; `names` the
    parameters and buffers by identity; `edges` the autograd node and output number of every node that has them;
    `entries` the known tensors by `id`: weak reference, node, version, whether autograd follows.
    """

    def __init__(self, names: dict[int, tuple[str, bool]]) -> None:
        self.names = names
        self.scope = ""
        self.call = -1
        self.problems: list[Problem] = []
        self.rows: list[_Row] = []
        self._lineage = Lineage(_Parents(self.rows))
        self._refs: list[weakref.ref[Tensor]] = []
        self.entries: dict[int, tuple[weakref.ref[Tensor], int, int, bool]] = {}
        self.overwrites = False  # versions need no look while nothing was overwritten
        self._writers: dict[int, list[int]] = {}  # by id of the tensor that owns a storage: nodes that overwrote it
        self.edges: dict[int, tuple[Any, int]] = {}
        self._by_edge: dict[tuple[Any, int], int] = {}
        self._filed = 0
        self._axes: list[int] = []
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
        if tensor.grad_fn is not None:
            return self._resolved(tensor)
        return self._outside(tensor, kind or ("constant" if self.call >= 0 else "input"))

    def handed_on(self, tensor: Tensor) -> bool:
        """Whether an operation's result is a known tensor that it did not change."""
        entry = self.entries.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return False
        try:
            return entry[2] == tensor._version  # noqa: SLF001
        except RuntimeError:
            return True

    # ---------------------------------------------------------------- new nodes

    def add(
        self, tensor: Tensor, op: str, parents: tuple[int, ...], detail: dict[str, Any], *, inplace: bool = False
    ) -> int:
        """Make a node for a tensor (runs at every operation)."""
        index = len(self.rows)
        grad = tensor.requires_grad
        self.rows.append((op, parents, self.scope, self.call, tensor.shape, tensor.dtype, grad, inplace, detail))
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
        if self.rows[writers[-1]][4].numel() == tensor.numel():
            return self.add(tensor, "view", (writers[-1],), {})
        return self.add(tensor, "update", (node, *writers), {})

    # ---------------------------------------------------------------- what only autograd knows

    def _resolved(self, tensor: Tensor) -> int:
        """Node of a tensor that autograd knows and the register does not, by its autograd graph."""
        function = tensor.grad_fn
        edges = self._filed_edges()
        known = edges.get((function, tensor.output_nr))
        if known is not None:
            self.entries[id(tensor)] = (weakref.ref(tensor), known, tensor._version, True)  # noqa: SLF001
            return known
        name = function.name() if function is not None else "tensor"
        parents, learned = self._walk(function, edges)
        if len(parents) == 1 and not learned and self._only_handed_on(tensor, parents[0]):
            return self.add(tensor, "alias", tuple(parents), {})
        reason = "made where the trace cannot see, followed by its autograd graph" if parents else "unknown origin"
        return self.opaque(tensor, tuple(parents), name, reason, learned=learned)

    def _adopted(self, tensor: Tensor, node: int) -> int:
        """Node of a tensor that autograd took over after it was made: a custom function's or a checkpoint's output."""
        parents, _ = self._walk(tensor.grad_fn, self._filed_edges())
        new = [parent for parent in parents if not self._lineage.ancestors(node) >> parent & 1]
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
        """Hash of the rows so far: operations, parents, scopes, and whether autograd follows."""
        for op, parents, scope, _, _, _, grad, _, _ in self.rows[self._hashed :]:
            self._hash = hash((self._hash, op, parents, scope, grad))
        self._hashed = len(self.rows)
        return self._hash

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Node, ...]: ...
    def __getitem__(self, index: int | slice) -> Node | tuple[Node, ...]:
        """A row as a node."""
        if isinstance(index, slice):
            return self._between(*index.indices(len(self)))
        return self._between(index, index + 1, 1)[0]

    def _between(self, start: int, stop: int, step: int) -> tuple[Node, ...]:
        """The nodes of a range of rows."""
        if stop > start:
            self._axis(stop - 1)
        axes, rows, lineage = self._axes, self.rows, self._lineage
        nodes = []
        for index in range(start, stop, step):
            op, parents, scope, call, shape, dtype, grad, inplace, detail = rows[index]
            sizes, signal = _sizes(shape), is_signal(dtype)
            nodes.append(
                Node(index, op, parents, scope, call, sizes, signal, grad, axes[index], inplace, detail, lineage)
            )
        return tuple(nodes)

    def _axis(self, index: int) -> int:
        """Axis of the features in a row's tensor."""
        axes, rows = self._axes, self.rows
        for op, parents, _, _, shape, _, _, _, detail in rows[len(axes) : index + 1]:
            if not parents:
                axes.append(-1)
                continue
            first = parents[0]
            before = rows[first][4]
            kept = op in _ELEMENTWISE and shape == before
            axes.append(axes[first] if kept else features_axis(op, detail.get("axes", ()), before, axes[first], shape))
        return axes[index]


class _Parents(Sequence[tuple[int, ...]]):
    """The parents column of the rows."""

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index][1]


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """A shape as integers; 0 for a ragged dimension of a nested tensor, which has no one size."""
    return tuple([size if type(size) is int else 0 for size in shape])


def _owner(tensor: Tensor) -> Tensor:
    """The tensor whose storage a view looks at."""
    base = tensor._base if tensor._is_view() else None  # noqa: SLF001
    return tensor if base is None else base
