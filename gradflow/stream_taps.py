"""Measures streams and trunks of a pass: their points' sizes and geometry, and the ledgers of signal and gradient."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from gradflow import geometry, statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gradflow.buffer import Buffer
    from gradflow.hooks import Edge, Hooks
    from gradflow.join_taps import JoinGradients, JoinTaps
    from gradflow.records import Join, Stream, Structure

Use: TypeAlias = "Callable[[Tensor], None]"

SEPARATOR = "\0"
"""Between a stream's name and a point's in the name of a row; no module path can hold it."""
_LEARNING_BYTES = 128 * 2**20
"""Row samples kept while it is not yet known which modules make a trunk."""
_RANK_ROWS = 128
"""Rows of the sample that the effective rank is computed from: a decomposition costs their cube."""


@dataclass(frozen=True, slots=True)
class Point:
    """A measured point: elements, Σ x², a sample of rows, and whether rows are positions of a sequence."""

    n: int
    square: Tensor
    sample: Tensor | None
    tokens: bool


@dataclass(slots=True)
class _Ledger:
    """Gradients of one exact stream, on the row sample: at its ends, and what came back through each branch."""

    stream: Stream
    joins: list[Join]
    ends: dict[str, Tensor] = field(default_factory=dict)
    through: dict[int, Tensor] = field(default_factory=dict)


class StreamTaps:
    """The streams and trunks of one pass."""

    def __init__(self, buffer: Buffer, hooks: Hooks, rows: int) -> None:
        self._buffer = buffer
        self._hooks = hooks
        self._rows = rows
        self._outputs: dict[int, Point] = {}
        self._bytes = 0
        self._ledgers: list[_Ledger] = []

    def module(self, path: str, node: int, out: Tensor, axis: int, wanted: frozenset[str] | None) -> None:
        """Measure a module's output if it may be a point of a trunk; `wanted` holds the points, None while unknown."""
        if (wanted is not None and path not in wanted) or out.dim() < 2:
            return
        sample = geometry.sample_rows(out, axis, self._rows)
        if sample is not None and wanted is None:
            self._bytes += sample.numel() * sample.element_size()
            if self._bytes > _LEARNING_BYTES:
                return
        square = statistics.sum_squares(out)
        self._outputs[node] = Point(out.numel(), square, sample, geometry.has_tokens(tuple(out.shape)))

    def finish(
        self, structure: Structure, joins: JoinTaps, gradients: dict[int, JoinGradients], edges: dict[int, Edge]
    ) -> None:
        """The pass is understood: put its points into the buffer and place the hooks for their gradients."""
        by_node = {join.node: join for join in structure.joins}
        measured: list[tuple[str, Point]] = []
        for stream in structure.streams:
            for depth, (point, node) in enumerate(zip(stream.points, stream.nodes, strict=True)):
                found = self._point(stream, depth, node, joins, by_node)
                if found is None:
                    continue
                name = stream.name + SEPARATOR + point
                self._buffer.put("streams", name, {"depth": float(depth), "n": float(found.n), "out_sq": found.square})
                measured.append((name, found))
                if node in edges:
                    self._hooks.gradient(edges[node], self._gradient_of(name))
            if stream.exact and stream.kind == "stream":
                chain = [by_node[node] for node in stream.nodes[1:] if node in by_node]
                self._ledger(stream, chain, joins, gradients, edges)
        self._geometry(measured)

    def _gradient_of(self, name: str) -> Use:
        def use(gradient: Tensor) -> None:
            self._buffer.put("streams", name, {"grad_sq": self._hooks.square(gradient)})

        return use

    def _point(
        self, stream: Stream, depth: int, node: int, joins: JoinTaps, by_node: dict[int, Join]
    ) -> Point | None:
        """What was measured at a point. A stream's start is measured as the skip of its first join, as it enters."""
        if stream.kind == "trunk":
            return self._outputs.get(node)
        if depth == 0 and len(stream.nodes) > 1 and stream.nodes[1] in by_node:
            entry = joins.sums.get(stream.nodes[1])
            if entry is None:
                return None
            skip = by_node[stream.nodes[1]].skip
            term = entry.terms.get((skip.addition, skip.position))
            if term is None:
                return None
            n = torch.Size(entry.shape).numel()
            return Point(n, term.square, term.sample, geometry.has_tokens(entry.shape))
        entry = joins.sums.get(node)
        if entry is None:
            return None
        square = entry.out["out_sq"]
        assert not isinstance(square, float)
        n = torch.Size(entry.shape).numel()
        return Point(n, square, entry.sample, geometry.has_tokens(entry.shape))

    def _geometry(self, measured: list[tuple[str, Point]]) -> None:
        """Geometry of all points, those of one shape together."""
        groups: dict[tuple[object, ...], list[tuple[str, Tensor, bool]]] = defaultdict(list)
        for name, point in measured:
            if point.sample is not None:
                key = (tuple(point.sample.shape), point.sample.dtype, point.sample.device, point.tokens)
                groups[key].append((name, point.sample, point.tokens))
        for group in groups.values():
            names = [name for name, _, _ in group]
            samples = torch.stack([sample for _, sample, _ in group])
            columns = {"kurtosis": geometry.kurtosis(samples), "max_over_median": geometry.max_over_median(samples)}
            if group[0][2]:
                columns["token_cosine"] = geometry.token_cosine(samples)
            for i, name in enumerate(names):
                self._buffer.put("streams", name, {column: values[i] for column, values in columns.items()})
            flat = samples.flatten(1, 2)
            step = -(-flat.shape[1] // _RANK_ROWS)
            wide = flat[:, ::step].unsqueeze(1)
            wide = wide if wide.device.type == "mps" else wide.double()
            self._buffer.put_grams("streams", names, "effective_rank", geometry.gram(wide))

    # ------------------------------------------------------------------ ledgers

    def _ledger(
        self, stream: Stream, joins: list[Join], taps: JoinTaps, gradients: dict[int, JoinGradients],
        edges: dict[int, Edge],
    ) -> None:  # fmt: skip
        """Signal shares now, and hooks for the gradient shares."""
        if not joins or any(join.node not in taps.sums or join.node not in gradients for join in joins):
            return
        start, _, _ = taps.samples(joins[0])
        _, _, end = taps.samples(joins[-1])
        branches = [
            (branch.name, sample) for join in joins
            for branch, sample in zip(join.branches, taps.samples(join)[1], strict=True)
        ]  # fmt: skip
        parts = [start, *(sample for _, sample in branches)]
        if end is None or any(part is None or part.shape != end.shape for part in parts):
            return
        shares = geometry.shares(torch.stack([part for part in parts if part is not None]), end)
        self._buffer.put("streams", stream.name + SEPARATOR + stream.points[0], {"signal_share": shares[0]})
        for i, (name, _) in enumerate(branches, start=1):
            self._buffer.put("branches", name, {"signal_share": shares[i]})
        if joins[0].fork in edges and joins[-1].node in edges:
            self._watch(_Ledger(stream, joins), taps, gradients, edges)

    def _watch(
        self, ledger: _Ledger, taps: JoinTaps, gradients: dict[int, JoinGradients], edges: dict[int, Edge]
    ) -> None:
        """Sample the gradients that the backward ledger is made of, as they arrive."""
        axis = taps.sums[ledger.joins[0].node].channel_dim

        def sampled(gradient: Tensor) -> Tensor:
            rows = geometry.sample_rows(gradient, axis, self._rows)
            assert rows is not None
            return rows

        def end(which: str) -> Use:
            def use(gradient: Tensor) -> None:
                ledger.ends[which] = sampled(gradient)

            return use

        def through(node: int) -> Use:
            def use(difference: Tensor) -> None:
                ledger.through[node] = sampled(difference)

            return use

        self._hooks.gradient(edges[ledger.joins[0].fork], end("first"))
        self._hooks.gradient(edges[ledger.joins[-1].node], end("last"))
        for join in ledger.joins:
            gradients[join.node].on_difference = through(join.node)
        self._ledgers.append(ledger)

    def gradients(self) -> None:
        """The backward pass is over: gradient shares of every exact stream whose gradients all arrived."""
        for ledger in self._ledgers:
            if len(ledger.ends) < 2 or len(ledger.through) < len(ledger.joins):
                continue
            whole = ledger.ends["first"]
            parts = [ledger.ends["last"], *(ledger.through[join.node] for join in ledger.joins)]
            if any(part.shape != whole.shape for part in parts):
                continue
            shares = geometry.shares(torch.stack([part.to(whole.dtype) for part in parts]), whole)
            last = ledger.stream.name + SEPARATOR + ledger.stream.points[-1]
            self._buffer.put("streams", last, {"gradient_share": shares[0]})
            for i, join in enumerate(ledger.joins, start=1):
                self._buffer.put("branches", join.branches[0].name, {"gradient_share": shares[i]})
        self._ledgers.clear()
