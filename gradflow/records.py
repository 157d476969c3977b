"""Frozen records that cross levels: the traced graph, the branches found in it, findings. No torch here.

A `Graph` is what one traced forward pass leaves behind; `residuals.analyse` turns it into a `Structure`; the recorder
executes the structure; a run directory stores `Branch`, `Layer` and `Stream`; rules make `Finding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Kind = Literal["identity", "projection"]
Placement = Literal["pre-norm", "post-norm", "none"]
Severity = Literal["error", "warning", "info"]


class Lineage:
    """What follows from a graph's nodes together, on demand: all masks of ancestors at once would grow with the square.

    Args:
        parents: Parents of every node, by index.
    """

    __slots__ = ("_known", "_parents")

    _KEPT = 20_000  # nodes; their masks take 50 MB

    def __init__(self, parents: Sequence[tuple[int, ...]]) -> None:
        self._parents = parents
        self._known: list[int] = []

    def ancestors(self, index: int) -> int:
        """Bit mask of every node that a node depends on, itself excluded."""
        if index < self._KEPT:
            for node in range(len(self._known), index + 1):
                mask = 0
                for parent in self._parents[node]:
                    mask |= self._known[parent] | 1 << parent
                self._known.append(mask)
            return self._known[index]
        found = bytearray(index // 8 + 1)
        queue = [index]
        while queue:
            for parent in self._parents[queue.pop()]:
                if not found[parent // 8] >> parent % 8 & 1:
                    found[parent // 8] |= 1 << parent % 8
                    queue.append(parent)
        return int.from_bytes(found, "little")

    def channel_dim(self, index: int) -> int:  # noqa: ARG002
        """Axis of the features in a node's tensor: the last one, where the graph says nothing else."""
        return -1


class Node(NamedTuple):
    """One tensor of a traced pass: a model input, a parameter, a constant, or the result of an operation.

    A tuple, since a pass makes thousands and a frozen dataclass takes several times as long to make.

    Attributes:
        index: Position in `Graph.nodes`; parents always have smaller indices.
        op: Canonical name: `"input"`, `"parameter"`, `"constant"` (a factory such as `torch.zeros`), `"opaque"` (an
            output that no operation accounts for: a scripted module, a custom kernel), else the operation's name
            without namespace and in-place underscore: `"add"`, `"linear"`, `"layer_norm"`, ...
        parents: Indices of the tensors that the operation read, in argument order.
        scope: Dotted path of the module in whose forward the operation ran, `""` for the root.
        call: Which call of a module, counted over the whole pass (index into `Graph.calls`), ran the operation.
        shape: Shape of the tensor.
        floating: Whether the tensor is floating point (or complex).
        requires_grad: Whether autograd follows it.
        inplace: Whether the operation overwrote its first operand.
        detail: What the analysis needs besides: scalar factors, `alpha`, the index of a slice, axes moved, ...
        lineage: What follows from the graph's nodes together.
    """

    index: int  # type: ignore[assignment]  # what a tuple has by this name nobody asks a node for
    op: str
    parents: tuple[int, ...]
    scope: str
    call: int
    shape: tuple[int, ...]
    floating: bool = True
    requires_grad: bool = False
    inplace: bool = False
    detail: Mapping[str, Any] = MappingProxyType({})
    lineage: Lineage | None = None

    @property
    def ancestors(self) -> int:
        """Bit mask of every node that this one depends on, itself excluded."""
        return 0 if self.lineage is None else self.lineage.ancestors(self.index)

    @property
    def channel_dim(self) -> int:
        """Axis of the features: -1 (the last) after linear maps, 1 after convolutions."""
        return -1 if self.lineage is None else self.lineage.channel_dim(self.index)


class Call(NamedTuple):
    """One call of one module's forward: `module` is its path, `parent` the index of the call it ran in (-1: none)."""

    index: int  # type: ignore[assignment]  # as for a node
    module: str
    parent: int
    kind: str
    grad: bool
    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the trace could not follow: `what` (an opaque module, an unknown tensor), `where`, and the reason."""

    what: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Graph:
    """What one traced pass leaves behind. Plain data: it holds no tensor alive."""

    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of one residual join.

    Attributes:
        name: Unique in the pass and stable from step to step, such as `transformer.h.3.attn`.
        join: Names the addition, unique to its occurrence in the pass.
        module: Dotted path of the module in whose forward the addition is evaluated, `""` for the root.
        kind: `"identity"`, or `"projection"` where the skip passes one linear or convolution.
        occurrence: Which call of a shared module, from 0.
        depth: Joins counted from the input along the longest path, from 1.
        placement: `"pre-norm"` (the branch begins with a norm), `"post-norm"` (the join is followed by a norm that
            replaces the stream), `"none"`.
        stream: Name of the stream that the join belongs to.
    """

    name: str
    join: str
    module: str
    kind: Kind
    occurrence: int
    depth: int
    placement: Placement
    stream: str = ""


@dataclass(frozen=True, slots=True)
class Addend:
    """An operand of a join as it enters the sum: node, sign or `alpha` factor, and the addition it enters.

    Attributes:
        node: The tensor's node, before `scale` is applied.
        scale: Factor the addition applies to it: -1 for a subtracted operand, else `alpha`.
        addition: Index of the addition node that the operand enters (a merged join has several).
        position: Operand position in that addition: 0 or 1.
    """

    node: int
    scale: float
    addition: int
    position: int


@dataclass(frozen=True, slots=True)
class Join:
    """A residual addition of one traced pass, with node indices of that pass's graph.

    Attributes:
        node: The node of the join's output y.
        fork: The node of the fork F.
        skip: The skip operand a.
        addends: One addend a branch, in the order of `branches`.
        branches: The records of the branches.
    """

    node: int
    fork: int
    skip: Addend
    addends: tuple[Addend, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """A chain of joins in which each join's output is the next one's fork, or the trunk of a stack without joins.

    Attributes:
        name: Such as `transformer.h`, unique in the run.
        kind: `"stream"` or `"trunk"`.
        points: Names of the points in order: the path of the module that made the fork of the first join (or
            `"input"`), then one name a join (its join name), or the members of the trunk.
        nodes: Their nodes in the traced pass, as long as `points`.
        exact: Whether the skips are pure identities throughout, so that x_L = x_0 + Σ f holds exactly.
        segments: For each join, the number of the piece of the stream it belongs to. Over a piece x_L = x_0 + Σ f holds
            exactly; a new one begins where a norm stands between joins (post-norm), and a join whose skip is scaled,
            dropped out or padded is one by itself. Empty for a trunk.
    """

    name: str
    kind: Literal["stream", "trunk"]
    points: tuple[str, ...]
    nodes: tuple[int, ...] = ()
    exact: bool = False
    segments: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Structure:
    """What `residuals.analyse` finds in a graph: joins in order of execution, streams, and what is not understood."""

    joins: tuple[Join, ...]
    streams: tuple[Stream, ...]
    problems: tuple[Problem, ...] = ()

    @property
    def branches(self) -> list[Branch]:
        """Every branch of every join, in order of execution."""
        return [branch for join in self.joins for branch in join.branches]


@dataclass(frozen=True, slots=True)
class Layer:
    """A row's worth of identity for the `layers` table: a leaf module with parameters, or an activation function.

    `name` is unique to the occurrence, `kind` the class or function name (`Linear`, `relu`), `depth` its order of
    execution in the pass, `module` the dotted path of the module that is (or that called) it.
    """

    name: str
    module: str
    kind: str
    occurrence: int
    depth: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as `run.json` lists it: `group` is its optimizer group (`"0.1"`: optimizer 0, group 1) or None."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    group: str | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (or worth knowing), where, on what evidence, and what to try.

    Attributes:
        code: Such as `"vanishing-gradient"`.
        severity: `"error"`, `"warning"` or `"info"`.
        where: Names of branches, layers, points or parameters, most important first.
        steps: First and last sampled step at which it holds.
        claim: One plain sentence with the numbers in it.
        evidence: Measured numbers, the threshold and where it comes from, what theory expects here.
        why: What it does to training, with the source.
        remedy: What to try first.
        remedy_2: What to try if the first does not help.
        confidence: `"high"`, or `"low"` where the finding rests on few samples or a heuristic.
    """

    code: str
    severity: Severity
    where: tuple[str, ...]
    steps: tuple[int, int]
    claim: str
    evidence: dict[str, Any]
    why: str
    remedy: str
    remedy_2: str = ""
    confidence: Literal["high", "low"] = "high"
