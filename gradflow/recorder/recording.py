"""One sampled step in progress: taps and parameters feed one buffer, which becomes rows once it is on the host."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradflow import geometry
from gradflow.recorder.buffer import Buffer, Row
from gradflow.recorder.guard import is_broken
from gradflow.recorder.guard_taps import GuardTaps, Known
from gradflow.recorder.hooks import undisturbed
from gradflow.recorder.ledgers import SEPARATOR
from gradflow.recorder.leeway import Leeway
from gradflow.recorder.origins import Origin, Pass
from gradflow.recorder.parameter_taps import ParameterTaps
from gradflow.recorder.recomputation import Recomputations
from gradflow.recorder.taps import Taps
from gradflow.store.conservation import balances, unbalanced
from gradflow.tracing.modules import survey
from gradflow.tracing.tape import Tape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradflow.recorder.buffer import Transfer
    from gradflow.recorder.plans import Plans
    from gradflow.records import Layer, Problem, Structure

_NAME_COLUMN = {"branches": "branch", "layers": "layer", "parameters": "parameter", "attention": "layer"}
_COUNTS = frozenset({"n", "zeros", "saturated", "dead_units", "units", "nonfinite", "grad_zeros", "depth"})
_RATIOS = frozenset({
    "entropy", "entropy_min", "logit_max", "keys", "token_cosine", "effective_rank", "kurtosis", "max_over_median",
    "signal_share", "gradient_share",
})  # fmt: skip


@dataclass(slots=True)
class Finished:
    """A step that has been measured and whose figures are on their way to the host.

    Not `placed` are gradients of a guarded step that were measured after clipping may have mixed them. `origin` is the
    operation that broke numbers first, where any were seen to break; `blind` says why none can be named.
    """

    step: int
    transfer: Transfer
    microbatches: int
    windows: int
    seconds: float
    scaled: frozenset[str]
    guard: bool = False
    placed: bool = True
    origin: Origin | None = None
    blind: str = ""
    structures: list[Structure] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)

    def rows(self) -> dict[str, list[Row]]:
        """Rows by table. Waits for the transfer; the loss scale is divided out here."""
        cells, grams = self.transfer.values()
        for (table, name, column), value in _ranks(grams):
            cells.setdefault((table, name), {})[column] = value
        head = cells.pop(("steps", ""), {})
        scale = head.get("loss_scale", 1.0) or 1.0
        rows: dict[str, list[Row]] = {"branches": [], "layers": [], "parameters": [], "streams": [], "attention": []}
        for (table, name), row in cells.items():
            unscaled = scale if table != "parameters" or name in self.scaled else 1.0
            rows[table].append({"step": self.step, **_named(table, name), **_settled(row, unscaled)})
        for row in rows["layers"]:
            known = self.layers.get(row["layer"])
            row["kind"] = known.kind if known is not None else ""
        rows["steps"] = [{
            "step": self.step, "microbatches": self.microbatches, "seconds": self.seconds,
            **_head(head, rows["parameters"], scale, self.windows),
        }]  # fmt: skip
        if not self.placed:
            rows["parameters"] = []
        origin = self.origin or (Origin("", "", "", reason=self.blind) if self.blind and is_broken(rows) else None)
        rows["faults"] = [] if origin is None else [{"step": self.step, **asdict(origin)}]
        return rows

    def problems(self, rows: dict[str, list[Row]]) -> list[Problem]:
        """Ledgers of the step that do not add up."""
        streams = {stream.name: stream for structure in self.structures for stream in structure.streams}
        branches = {branch.name: branch for structure in self.structures for branch in structure.branches}
        points, shares = rows["streams"], rows["branches"]
        return unbalanced(balances(streams.values(), list(branches.values()), points, shares))


def _named(table: str, name: str) -> Row:
    if table == "streams":
        stream, point = name.split(SEPARATOR, 1)
        return {"stream": stream, "point": point}
    return {_NAME_COLUMN[table]: name}


def _settled(row: Row, scale: float) -> Row:
    """Counts as integers, gradients with the loss scale divided out, null where a ratio has no meaning."""
    settled: Row = {}
    for column, value in row.items():
        if column in _COUNTS:
            settled[column] = int(value)
        elif column in _RATIOS:
            settled[column] = None if math.isnan(value) else value
        elif column.startswith("grad"):
            settled[column] = value / (scale if column == "grad_max" else scale * scale)
        else:
            settled[column] = value
    return settled


def _head(head: Row, parameters: list[Row], scale: float, windows: int) -> Row:
    """Columns of the `steps` table that come from measured figures."""
    squares = [row["grad_sq"] for row in parameters if row.get("grad_sq") is not None]
    loss = head.get("loss")
    return {
        "loss": None if loss is None else loss / scale / max(windows, 1), "learning_rate": head.get("learning_rate"),
        "loss_scale": scale, "grad_norm": math.sqrt(sum(squares)) if squares else None,
    }  # fmt: skip


def _ranks(grams: list[tuple[tuple[str, str, str], Tensor]]) -> list[tuple[tuple[str, str, str], float]]:
    """Effective ranks, those of matrices of one size together; several of one cell are averaged."""
    values: dict[tuple[str, str, str], list[float]] = {}
    sizes: dict[tuple[int, ...], list[tuple[tuple[str, str, str], Tensor]]] = {}
    for key, matrix in grams:
        sizes.setdefault(tuple(matrix.shape), []).append((key, matrix))
    for group in sizes.values():
        found = geometry.effective_rank(torch.stack([matrix for _, matrix in group])).tolist()
        for (key, _), value in zip(group, found, strict=True):
            values.setdefault(key, []).append(value)
    return [(key, sum(several) / len(several)) for key, several in values.items()]


def _known_finite(loss: Tensor) -> bool:
    """Whether a loss is at hand, on the host, and finite."""
    return loss.device.type == "cpu" and bool(torch.isfinite(loss.detach()).all())


class StepInProgress:
    """Records one sampled step. `watch` and `rest` open and close the tracing mode around the parts that are traced."""

    def __init__(
        self, model: nn.Module, step: int, plans: Plans, *, rows: int, tables: frozenset[str],
        on_error: Callable[[Exception], None], scale: Callable[[], Tensor | float | None], trains: bool = True,
        guard: Known | None = None, owned: Callable[[nn.Parameter], bool] = lambda _: True,
        rooms: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.step = step
        self.guard = guard is not None
        self.scale = scale
        self.microbatches = 0
        self._began = time.perf_counter()
        self._buffer = Buffer()
        self._watching = False
        self._windows = 0
        self._fresh_window = True
        self._loss: Tensor | None = None
        self._scaled: set[str] = set()
        self._settled: set[str] = set()
        self._placed = True
        self._origin: Origin | None = None
        self._passes: list[Pass] = []
        self._model = model
        self._on_error = on_error
        wants_taps = bool(tables & {"branches", "streams", "layers", "attention"})
        found = survey(model)
        self._parameters = ParameterTaps(
            found.parameters, self._buffer, updates=trains, owned=owned,
            norm_only=self.guard or "parameters" not in tables, rooms=rooms,
        )  # fmt: skip
        tape = Tape(on_error) if self._parameters.on_host else None
        self._taps: Taps | GuardTaps | None = None
        if guard is not None:
            self._taps = GuardTaps(
                model, self._buffer, known=guard, paths=found.paths, on_error=on_error,
                on_backward=self._seen_backward, after_backward=self._seen_gradients, tape=tape,
            )  # fmt: skip
        elif wants_taps:
            self._taps = Taps(
                model, self._buffer, plans, rows=rows, tables=tables, on_error=on_error,
                on_backward=self._seen_backward, after_backward=self._seen_gradients, tape=tape,
                known=found,
            )  # fmt: skip
        self._recomputed = Recomputations(model, self._buffer, rows=rows, tables=tables, on_error=on_error)
        self.leeway = Leeway()
        self._modules = len(found.paths)

    def start(self, learning_rate: Any) -> None:
        """Measure the weights, and begin to watch."""
        self.leeway.open(self._modules)
        with undisturbed():
            self._parameters.start()
            if learning_rate is not None:
                value = learning_rate.detach().double() if isinstance(learning_rate, Tensor) else float(learning_rate)
                self._buffer.put("steps", "", {"learning_rate": value})
        self.watch()

    def watch(self) -> None:
        """Open the taps: what runs from here is part of a pass."""
        if self._watching or self._taps is None:
            return
        self._watching = True  # first: an interrupt in what follows must find something to close
        self._taps.open()

    def rest(self) -> None:
        """Close the taps."""
        if not self._watching or self._taps is None:
            return
        try:
            self._taps.shut()
        finally:
            self._watching = False

    def backward(self, loss: Tensor | None, scale: Tensor | float | None) -> None:
        """A backward pass of `loss` is about to run: the pass is complete. `scale` is the AMP scale that is in it."""
        self.microbatches += 1
        if self._fresh_window:
            self._windows += 1
            self._fresh_window = False
        with undisturbed():
            if loss is not None and loss.numel() == 1:
                value = loss.detach().reshape(())
                value = value.float() if value.device.type == "mps" else value.double()
                self._loss = value if self._loss is None else self._loss + value
            if scale is not None and self.microbatches == 1:
                self._buffer.put("steps", "", {"loss_scale": scale.clone() if isinstance(scale, Tensor) else scale})
            self._judge(loss)
        self.close_pass()
        if self._taps is not None and self._taps.checkpointed and loss is not None and loss.grad_fn is not None:
            self._recomputed.expect(loss.grad_fn, self._taps.points)

    def _judge(self, loss: Tensor | None) -> None:
        """Ask what was not finite if the loss is not, or is not at hand; else remember the pass for its gradients."""
        taps = self._taps
        sound = loss is not None and _known_finite(loss)
        outputs = taps.judge(sound=sound) if isinstance(taps, GuardTaps) else []
        if taps is not None and taps.tape is not None and loss is not None and loss.device.type == "cpu":
            done = Pass(taps.tape, loss, self._on_error)
            if sound:
                done.watch()
                self._passes.append(done)
            elif self._origin is None:
                self._origin = done.forwards(self._owners(), outputs)
        if self.guard and not sound:
            self._parameters.weights()

    def _owners(self) -> dict[int, str]:
        """Paths of the modules that own parameters and buffers, by identity."""
        return {at: name.rpartition(".")[0] for at, (name, _) in survey(self._model).names.items()}

    def _follow_back(self, *, broken: bool) -> None:
        """Gradients stand: the passes that made them are let go of, or, if some are `broken`, looked at again."""
        passes, self._passes = self._passes, []
        for done in passes:
            done.close()
            if broken and (self._origin is None or not self._origin.operation):
                self._origin = done.backwards()

    def _seen_backward(self, loss: Tensor | None) -> None:
        """A backward pass of a training loop that is not ours and tells nothing."""
        if self._parameters.cleared():
            self.zeroed()
        self.backward(loss, self.scale())

    def _seen_gradients(self) -> None:
        self.gradients(None, scaled=self.scale() is not None)

    def close_pass(self) -> None:
        """Whatever has run so far is a pass."""
        if self._taps is not None:
            self._taps.close_pass()

    def zeroed(self) -> None:
        """Gradients were set to zero: what comes is a new attempt at the step (a closure of LBFGS)."""
        self._fresh_window = True

    def gradients(self, parameters: Iterable[Tensor] | None, *, scaled: bool) -> None:
        """Gradients stand as backward left them, before clipping; `scaled` if the loss scale is still in them."""
        with undisturbed():
            names = self._parameters.gradients(parameters, besides=self._settled)
            self._follow_back(broken=not scaled and self._parameters.broken)
        self._scaled = (self._scaled | names) if scaled else (self._scaled - names)

    def settle(self, parameters: Iterable[Tensor], *, scaled: bool) -> None:
        """An optimizer is about to use these gradients: what was measured of them before now stays.

        Those that no backward pass was seen for are measured as they stand.
        """
        names = self._parameters.names(parameters)
        self._settled |= names & self._parameters.measured
        self.gradients(self._parameters.of(names - self._settled), scaled=scaled)
        self._settled |= names & self._parameters.measured
        if self.guard and self.microbatches == 0 and self._settled:  # a compiled model's backward pass shows nowhere
            self.microbatches, self._placed = 1, False

    def finish(self) -> Finished:
        """The optimizer has stepped: measure the updates and send everything to the host.

        `leeway` stays open: who holds the step closes it when the step's records are gone, for what is still there then
        is what the garbage collector would go through.
        """
        self.rest()
        structures: list[Structure] = []
        layers: dict[str, Layer] = {}
        self._recomputed.close()
        if self._taps is not None:
            self._taps.finish()
            structures = list(self._taps.structures)
            layers = self._taps.layers.layers if self._taps.layers is not None else {}
        with undisturbed():
            self._parameters.finish()
            self._buffer.put("steps", "", {"loss": self._loss})
            transfer = self._buffer.transfer()
        seconds = time.perf_counter() - self._began
        return Finished(
            self.step, transfer, self.microbatches, self._windows, seconds, frozenset(self._scaled), self.guard,
            self._placed, self._origin, self._blind(), structures, layers,
        )  # fmt: skip

    def _blind(self) -> str:
        """Why no operation of this step could be named; empty if it could."""
        if not self._parameters.on_host:
            return "on a device it is known too late whether a loss is finite"
        if self._taps is None or self._taps.tape is None:
            return "compiled code is seen as a whole" if self.guard else "only tables of parameters are recorded"
        return ""

    def abandon(self) -> None:
        """Stop measuring at once; nothing of ours stays on the model."""
        self.leeway.close()
        self.rest()
        self._follow_back(broken=False)
        self._recomputed.close()
        if self._taps is not None:
            self._taps.close()
