"""The ledgers of a pass: what part of a stream's end, and of the gradient at its start, came through each branch.

Over a piece of a stream in which x_L = x_0 + Σ f holds exactly, share(f) = ⟨f, x_L⟩/⟨x_L, x_L⟩; with that of x_0, they
add up to 1. Backwards g_0 = g_L + Σ Δ with Δ what came back through a branch, share = ⟨Δ, g_0⟩/⟨g_0, g_0⟩ and, with
that of g_L, they add up to 1. Norms between joins, and skips that are scaled or dropped out, cut a stream into pieces
(`Stream.segments`) with a ledger each; over a piece of one join g_L is what came back along the skip.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from gradflow import geometry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from gradflow.recorder.buffer import Buffer
    from gradflow.recorder.hooks import Edge, Hooks
    from gradflow.recorder.join_gradients import JoinGradients
    from gradflow.recorder.join_taps import JoinTaps
    from gradflow.records import Join, Node, Stream

SEPARATOR = "\0"
"""Between a stream's name and a point's in the name of a row; no module path can hold it."""


@dataclass(slots=True)
class _Piece:
    """Gradients of one piece of a stream on the row sample: at its ends, and what came back through each branch."""

    end_point: str
    joins: list[Join]
    first: Tensor | None = None
    last: Tensor | None = None
    through: dict[int, list[Tensor | None]] = field(default_factory=dict)


class Ledgers:
    """The ledgers of all streams of one pass."""

    def __init__(self, buffer: Buffer, hooks: Hooks, rows: int) -> None:
        self._buffer = buffer
        self._hooks = hooks
        self._rows = rows
        self._pieces: list[_Piece] = []

    def open(
        self, stream: Stream, by_node: Mapping[int, Join], taps: JoinTaps, gradients: Mapping[int, JoinGradients],
        edges: Mapping[int, Edge], nodes: Sequence[Node],
    ) -> None:  # fmt: skip
        """Put the signal shares of a stream into the buffer, and place the hooks for its gradient shares."""
        points = [stream.name + SEPARATOR + point for point in stream.points]
        for _, places in groupby(range(len(stream.segments)), key=lambda place: stream.segments[place]):
            depths = list(places)
            joins = [by_node[stream.nodes[depth + 1]] for depth in depths]
            mapped = any(branch.kind == "projection" for join in joins for branch in join.branches)
            if mapped or any(join.node not in taps.sums for join in joins):
                continue  # over a projection the stream does not go on: it is mapped
            self._signal(points[depths[0]], joins, taps)
            if all(join.node in gradients and gradients[join.node].fork is not None for join in joins):
                self._watch(_Piece(points[depths[-1] + 1], joins), gradients, edges, nodes[joins[0].fork])

    def _signal(self, start_point: str, joins: list[Join], taps: JoinTaps) -> None:
        """Shares of the piece's start and of every branch in the piece's end."""
        start, _, _ = taps.samples(joins[0])
        _, _, end = taps.samples(joins[-1])
        branches = [
            (branch.name, sample) for join in joins
            for branch, sample in zip(join.branches, taps.samples(join)[1], strict=True)
        ]  # fmt: skip
        parts = [part for part in (start, *(sample for _, sample in branches)) if part is not None]
        if end is None or len(parts) <= len(branches) or any(part.shape != end.shape for part in parts):
            return
        shares = geometry.shares(parts, end)
        self._buffer.put("streams", start_point, {"signal_share": shares[0]})
        for i, (name, _) in enumerate(branches, start=1):
            self._buffer.put("branches", name, {"signal_share": shares[i]})

    def _watch(
        self, piece: _Piece, gradients: Mapping[int, JoinGradients], edges: Mapping[int, Edge], fork: Node
    ) -> None:
        """Sample the gradients that the backward ledger is made of, as they arrive."""
        start = gradients[piece.joins[0].node]
        if start.fork is None or not start.in_order:
            return
        self._hooks.gradient(start.fork, lambda gradient: setattr(piece, "first", self._sampled(gradient, fork)))
        if len(piece.joins) > 1 and piece.joins[-1].node in edges:
            end = edges[piece.joins[-1].node]
            self._hooks.gradient(end, lambda gradient: setattr(piece, "last", self._sampled(gradient, fork)))
        for join in piece.joins:
            gradients[join.node].on_return = self._returned(piece, join.node, fork)
        self._pieces.append(piece)

    def _returned(
        self, piece: _Piece, node: int, fork: Node
    ) -> Callable[[Tensor | None, list[Tensor | None]], None]:
        def use(along: Tensor | None, through: list[Tensor | None]) -> None:
            piece.through[node] = [self._sampled(part, fork) for part in through]
            if len(piece.joins) == 1:
                piece.last = self._sampled(along, fork)

        return use

    def _sampled(self, gradient: Tensor | None, fork: Node) -> Tensor | None:
        if gradient is None or gradient.numel() != torch.Size(fork.shape).numel():
            return None
        return geometry.sample_rows(gradient.reshape(fork.shape), fork.channel_dim, self._rows)

    def close(self) -> None:
        """The backward pass is over: gradient shares of every piece whose gradients all arrived."""
        for piece in self._pieces:
            whole = piece.first
            if whole is None or len(piece.through) < len(piece.joins):
                continue
            names = [branch.name for join in piece.joins for branch in join.branches]
            through = [part for join in piece.joins for part in piece.through[join.node]]
            parts = [piece.last if piece.last is not None else torch.zeros_like(whole), *through]
            known = [(i, part) for i, part in enumerate(parts) if part is not None]
            if any(part.shape != whole.shape for _, part in known):
                continue
            shares = geometry.shares([part for _, part in known], whole)
            for (i, _), share in zip(known, shares, strict=True):
                if i == 0:
                    self._buffer.put("streams", piece.end_point, {"gradient_share": share})
                else:
                    self._buffer.put("branches", names[i - 1], {"gradient_share": share})
        self._pieces.clear()
