"""Measures streams and trunks of a pass: the sizes and the geometry of their points."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradflow import geometry, statistics
from gradflow.recorder.ledgers import SEPARATOR, Ledgers
from gradflow.residuals import families

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.recorder.hooks import Edge, Hooks, Use
    from gradflow.recorder.join_gradients import JoinGradients
    from gradflow.recorder.join_taps import JoinTaps
    from gradflow.records import Call, Graph, Join, Node, Stream, Structure
    from gradflow.statistics import Number

_LEARNING_BYTES = 128 * 2**20
"""Row samples kept while it is not yet known which modules make a trunk."""
_RANK_ROWS = 128
"""Rows that the effective rank is computed from where the width is larger too: a decomposition costs their cube."""


@dataclass(frozen=True, slots=True)
class Point:
    """A measured point: elements, Σ x², a sample of rows, and whether rows are positions of a sequence."""

    n: int
    square: Number
    sample: Tensor | None
    tokens: bool

    def swapped(self) -> Point:
        """The same point with the first two axes of its sample exchanged."""
        return self if self.sample is None else replace(self, sample=self.sample.transpose(0, 1))


class StreamTaps:
    """The streams and trunks of one pass."""

    def __init__(self, buffer: Buffer, hooks: Hooks, rows: int) -> None:
        self._buffer = buffer
        self._hooks = hooks
        self._rows = rows
        self._outputs: dict[int, Point] = {}
        self._bytes = 0
        self._sequence_first: set[int] = set()
        self.ledgers = Ledgers(buffer, hooks, rows)

    def entered(self, call: int, module: nn.Module) -> None:
        """Note modules that take sequences as (position, sequence, width)."""
        if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first:
            self._sequence_first.add(call)

    def module(self, node: Node, out: Tensor, square: Number | None, *, learning: bool) -> None:
        """Measure a module's output, which is a point, or may be one while the taps are `learning` which are.

        `square` is Σ x² where it is known.
        """
        if out.dim() < 2:
            return
        sample = geometry.sample_rows(out, node.channel_dim, self._rows)
        if sample is not None and learning:
            self._bytes += sample.numel() * sample.element_size()
            if self._bytes > _LEARNING_BYTES:
                return
        if square is None:
            square = statistics.sum_squares(out)
        self._outputs[node.index] = Point(out.numel(), square, sample, geometry.has_tokens(tuple(out.shape)))

    def finish(
        self, structure: Structure, joins: JoinTaps, gradients: dict[int, JoinGradients], edges: dict[int, Edge],
        graph: Graph,
    ) -> None:  # fmt: skip
        """The pass is understood: put its points into the buffer and place the hooks for their gradients."""
        by_node = {join.node: join for join in structure.joins}
        swapped = [graph.calls[call] for call in self._sequence_first]
        measured: list[tuple[str, Point]] = []
        for stream in structure.streams:
            sequence_first = _takes_sequences_second(stream, swapped, graph.nodes)
            for depth, (point, node) in enumerate(zip(stream.points, stream.nodes, strict=True)):
                name = stream.name + SEPARATOR + point
                found = self._point(stream, depth, node, joins, by_node, graph.nodes)
                if found is None and node not in edges:
                    continue
                self._buffer.put("streams", name, {"depth": float(depth)})
                if found is not None:
                    self._buffer.put("streams", name, {"n": float(found.n), "out_sq": found.square})
                    measured.append((name, found.swapped() if sequence_first else found))
                edge = edges.get(node)
                if depth == 0 and stream.kind == "stream" and stream.nodes[1] in gradients:
                    edge = gradients[stream.nodes[1]].fork or edge
                if edge is not None:
                    self._hooks.gradient(edge, self._gradient_of(name))
            if stream.kind == "stream":
                self.ledgers.open(stream, by_node, joins, gradients, edges, graph.nodes)
        self._geometry(measured)

    def _gradient_of(self, name: str) -> Use:
        def use(gradient: Tensor) -> None:
            self._buffer.put("streams", name, {"grad_sq": self._hooks.square(gradient)})

        return use

    def _point(
        self, stream: Stream, depth: int, node: int, joins: JoinTaps, by_node: dict[int, Join], nodes: Sequence[Node]
    ) -> Point | None:
        """What was measured at a point: a module's output, a join's output, or the skip that has the fork's values."""
        if node in self._outputs:
            return self._outputs[node]
        if stream.kind == "trunk":
            return None
        if depth == 0:
            join = by_node.get(stream.nodes[1]) if len(stream.nodes) > 1 else None
            return None if join is None else _fork_point(join, joins, nodes)
        entry = joins.sums.get(node)
        if entry is None:
            return None
        n = torch.Size(entry.shape).numel()
        return Point(n, entry.out["out_sq"], entry.sample, geometry.has_tokens(entry.shape))

    def _geometry(self, measured: list[tuple[str, Point]]) -> None:
        """Geometry of all points, those of one shape together."""
        groups: dict[tuple[object, ...], list[tuple[str, Tensor, bool]]] = defaultdict(list)
        for name, point in measured:
            if point.sample is not None:
                key = (tuple(point.sample.shape), point.sample.dtype, point.sample.device, point.tokens)
                groups[key].append((name, point.sample, point.tokens))
        for group in groups.values():
            names = [name for name, _, _ in group]
            samples = [sample for _, sample, _ in group]
            figures = geometry.figures(samples, tokens=group[0][2])
            for i, name in enumerate(names):
                self._buffer.put("streams", name, {column: values[i] for column, values in figures.items()})
            self._buffer.put_grams("streams", names, "effective_rank", geometry.gram(_rank_rows(samples)))


def points_besides(structure: Structure, nodes: Sequence[Node], calls: Iterable[Call]) -> frozenset[str]:
    """Modules whose outputs have to be measured: the points of trunks, and forks that no join's skip shows."""
    paths = {point for stream in structure.streams if stream.kind == "trunk" for point in stream.points}
    by_node = {join.node: join for join in structure.joins}
    firsts = (by_node[s.nodes[1]] for s in structure.streams if s.kind == "stream" and s.nodes[1] in by_node)
    hidden = {join.fork for join in firsts if not _has_values_of(nodes, join.skip.node, join.fork)}
    return frozenset(paths | {call.module for call in calls if not hidden.isdisjoint(call.outputs)})


def _fork_point(join: Join, joins: JoinTaps, nodes: Sequence[Node]) -> Point | None:
    """A fork as its join's skip shows it, where that has the same values but for a factor of the addition."""
    entry = joins.sums.get(join.node)
    term = entry.terms.get((join.skip.addition, join.skip.position)) if entry is not None else None
    if entry is None or term is None or not term.scale or not _has_values_of(nodes, join.skip.node, join.fork):
        return None
    term = term.scaled(1 / term.scale)
    return Point(torch.Size(entry.shape).numel(), term.square, term.sample, geometry.has_tokens(entry.shape))


def _has_values_of(nodes: Sequence[Node], index: int, origin: int) -> bool:
    """Whether a tensor holds the elements of another, in whatever shape."""
    size = torch.Size(nodes[index].shape).numel()
    while index != origin:
        if nodes[index].op not in families.VIEWS or not nodes[index].parents:
            return False
        index = nodes[index].parents[0]
    return torch.Size(nodes[origin].shape).numel() == size


def _takes_sequences_second(stream: Stream, calls: Iterable[Call], nodes: Sequence[Node]) -> bool:
    """Whether a stream runs through modules that take it as (position, sequence, width)."""
    for call in calls:
        if not call.inputs:
            continue
        taken = nodes[call.inputs[0]]
        for index in stream.nodes:
            reaches = index == taken.index or taken.ancestors >> index & 1
            if reaches and len(taken.shape) == 3 and nodes[index].shape == taken.shape:
                return True
    return False


def _rank_rows(samples: Sequence[Tensor]) -> Tensor:
    """The rows that the effective rank is computed from, in float64 where the device has it: (k, 1, rows, width)."""
    each = [sample.flatten(0, 1) for sample in samples]
    if min(each[0].shape) > _RANK_ROWS:
        each = [rows[:: -(-len(rows) // _RANK_ROWS)] for rows in each]
    flat = torch.stack(each)
    return (flat if flat.device.type == "mps" else flat.double()).unsqueeze(1)
