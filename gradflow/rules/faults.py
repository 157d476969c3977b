"""Where a run first became non-finite: step, direction and place. Every other rule looks at the run up to there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradflow.rules.view import View
from gradflow.schema import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from gradflow.store import Run

    Bools = NDArray[np.bool_]

Direction = Literal["forward", "backward", "loss", "update"]
PERSISTENT = 5
"""Sampled steps with overflows that a loss scaler is forgiven less one: it begins too high and halves at each."""
COUNTED = {"branches": "nonfinite", "layers": "nonfinite"}
SUMS = {"branches": ("out_sq", "branch_sq", "skip_sq"), "layers": ("out_sq",), "streams": ("out_sq",)}
LARGEST = {"branches": "out_max", "layers": "out_max"}
"""Columns that are infinite only where an element is."""
GRADIENTS = {"branches": "grad_out_sq", "layers": "grad_out_sq", "streams": "grad_sq"}


@dataclass(frozen=True, slots=True)
class Named:
    """The operation that a step's numbers broke in: a row of `faults`. Empty texts and zeros where nothing was told."""

    direction: str = ""
    operation: str = ""
    module: str = ""
    nonfinite: int = 0
    reason: str = ""

    @property
    def place(self) -> str:
        """Name of the operation with its module, as activations are named."""
        within = "" if self.module in {"", OUTSIDE} else f"{self.module}."
        return f"{within}{self.operation}" if self.operation else ""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first NaN or infinity of a run.

    Attributes:
        step: Sampled step at which it was seen first.
        last: Last sampled step at which any was seen.
        direction: `"forward"`, `"backward"` (what ran forwards was finite, a gradient was not), `"loss"`, or
            `"update"` (only parameter gradients or weights show it).
        by_parameters: Whether only gradients of parameters tell where a backward fault began: those of outputs were not
            measured.
        layers: Broken layers of that step in the order in which the fault reached them, the first one first.
        branches: Broken branches, likewise.
        points: Broken points of streams and trunks, likewise.
        parameters: Parameters with broken gradients, in order of the model.
        before: The last layer that was still finite on the way to the first broken one, `""` if there is none.
        count: Non-finite elements at the first place, None where it was not counted.
        steps_broken: Sampled steps with any fault, and the sampled steps since the first.
        steps_since: Sampled steps from the first fault on.
        scaled: Whether an AMP loss scale was in use.
        inherited: Whether the weights were broken before that step: it began after the sampled step before.
        contained: Whether loss and gradients stayed finite: a mask of infinities, not a failure.
        named: The operation that it began in.
    """

    step: int
    last: int
    direction: Direction
    by_parameters: bool
    layers: tuple[str, ...]
    branches: tuple[str, ...]
    points: tuple[str, ...]
    parameters: tuple[str, ...]
    before: str
    count: int | None
    steps_broken: int
    steps_since: int
    scaled: bool
    inherited: bool
    contained: bool
    named: Named

    @property
    def skipped(self) -> bool:
        """Whether these are the overflows that AMP's loss scaler looks for and skips: gradients only, now and then."""
        few = self.steps_broken < PERSISTENT or 2 * self.steps_broken <= self.steps_since
        return self.scaled and self.direction in {"backward", "update"} and few


def _broken(view: View, table: str, column: str) -> Bools:
    """Where a value is known and is NaN or infinite, shape (step of `view.steps`, thing)."""
    grid = view.grid(table)
    values, known = grid.raw(column)
    return _aligned(view, grid.steps, known & ~np.isfinite(values))


def _known(view: View, table: str, column: str) -> Bools:
    """Where a value is known, of the same shape."""
    grid = view.grid(table)
    return _aligned(view, grid.steps, grid.raw(column)[1])


def _measured(view: View, columns: Mapping[str, str], at: int) -> bool:
    """Whether a column of some table was measured at a step."""
    return any(bool(_known(view, table, column)[at].any()) for table, column in columns.items())


def _fresh(mask: Bools, at: int) -> Bools:
    """What broke at a step and never before: what was broken before did no harm."""
    return np.asarray(mask[at] & ~mask[:at].any(axis=0))


def _aligned(view: View, steps: NDArray[np.int64], mask: Bools) -> Bools:
    full = np.zeros((len(view.steps), mask.shape[1]), dtype=bool)
    full[np.searchsorted(view.steps, steps)] = mask
    return full


def _forward(view: View, table: str) -> Bools:
    """Where a forward value is broken: by its count where there is one, else by NaN sums (infinite sums overflow)."""
    grid = view.grid(table)
    mask = np.zeros((len(view.steps), len(grid.keys)), dtype=bool)
    counted = np.zeros_like(mask)
    if table in COUNTED:
        values, known = grid.raw(COUNTED[table])
        mask |= _aligned(view, grid.steps, known & (values > 0))
        counted = _aligned(view, grid.steps, known)
    for column in SUMS[table]:
        values, known = grid.raw(column)
        mask |= _aligned(view, grid.steps, known & np.isnan(values)) & ~counted
    if table in LARGEST:
        mask |= _broken(view, table, LARGEST[table])
    return mask


def locate(view: View) -> Fault | None:
    """Find the first non-finite number of a run, or None."""
    if not len(view.steps):
        return None
    forward = {table: _forward(view, table) for table in SUMS}
    backward = {table: _broken(view, table, column) for table, column in GRADIENTS.items()}
    update = _broken_parameters(view)
    loss = _broken(view, "steps", "loss")
    harmed = _any([loss, _broken(view, "steps", "grad_norm"), update, *backward.values()])
    ahead = _any(list(forward.values()))
    broken = ahead | harmed
    if not broken.any():
        return None
    at = int(np.argmax(harmed)) if harmed.any() else int(np.argmax(ahead))
    backwards = not any(_fresh(mask, at).any() for mask in forward.values())
    source = backward if backwards else forward
    layers, branches, points = (
        _names(view, table, source[table], at, backwards=backwards) for table in ("layers", "branches", "streams")
    )
    order = tuple(view.grid("layers").names[:: -1 if backwards else 1])
    named = _named(view, int(view.steps[at]))
    direction = _direction(view, source, named, loss=bool(loss[at].any()), backwards=backwards, at=at)
    by_parameters = direction == "backward" and not _measured(view, GRADIENTS, at)
    if by_parameters:
        layers, order = _owners(view, _fresh(update, at)), _owners(view, _known(view, "parameters", "grad_sq")[at])
    return Fault(
        step=int(view.steps[at]),
        last=int(view.steps[np.flatnonzero(broken)[-1]]),
        direction=direction,
        by_parameters=by_parameters,
        layers=layers,
        branches=branches,
        points=points,
        parameters=_names(view, "parameters", update, at),
        before=_before(order, layers),
        count=named.nonfinite or (None if backwards else _count(view, at, layers, branches)),
        steps_broken=int(broken[at:].sum()),
        steps_since=len(view.steps) - at,
        scaled=bool(np.nanmax(view.series("loss_scale"), initial=1.0) > 1.0),
        inherited=bool(_broken(view, "parameters", "weight_sq")[at].any()),
        contained=not harmed.any() and not _reaches_the_end(view, forward, at),
        named=named,
    )


def _any(masks: list[Bools]) -> Bools:
    return np.asarray(np.any([mask.any(axis=1) for mask in masks], axis=0))


def _broken_parameters(view: View) -> Bools:
    grid = view.grid("parameters")
    counts, known = grid.raw("nonfinite")
    mask = _aligned(view, grid.steps, known & (counts > 0))
    for column in ("grad_sq", "weight_sq", "update_sq"):
        mask |= _broken(view, "parameters", column)
    return mask


def _names(view: View, table: str, mask: Bools, at: int, *, backwards: bool = False) -> tuple[str, ...]:
    """Names of what broke at a step, in the order the fault took, without what had been broken before, harmlessly."""
    names = [name for name, hit in zip(view.grid(table).names, _fresh(mask, at), strict=True) if hit]
    return tuple(reversed(names)) if backwards else tuple(names)


def _owners(view: View, parameters: Bools) -> tuple[str, ...]:
    """Layers that own some of these parameters, the last one to run first: the order in which gradients come."""
    owners: set[str] = set()
    for name, hit in zip(view.grid("parameters").names, parameters, strict=True):
        parts = name.split(".") if hit else []
        owners.update(".".join(parts[:length]) for length in range(1, len(parts)))
    return tuple(name for name in reversed(view.grid("layers").names) if name.partition("@")[0] in owners)


def _reaches_the_end(view: View, forward: dict[str, Bools], at: int) -> bool:
    """Whether, with no loss or gradient to tell, the last layer (or else branch) of the model is broken too."""
    if np.isfinite(view.series("loss")[at]):
        return False
    ends = [mask[at][-1] for mask in (forward["layers"], forward["branches"]) if mask.shape[1]]
    return bool(ends and ends[0])


def _named(view: View, step: int) -> Named:
    """What the recorder could tell of the operation, the forward pass first; several ranks may each have told."""
    rows = view.run.columns("faults", ["step", *Named.__slots__]).to_pylist()
    known = [{field: value for field, value in row.items() if value is not None} for row in rows]
    told = [Named(**row) for row in known if row.pop("step") == step]
    return max(told, key=lambda named: (bool(named.operation), named.direction == "forward"), default=Named())


def _direction(
    view: View, source: dict[str, Bools], named: Named, *, loss: bool, backwards: bool, at: int
) -> Direction:
    if not backwards or (named.direction == "forward" and named.operation and named.module != OUTSIDE):
        return "forward"
    if loss:
        return "loss"
    if any(mask[at].any() for mask in source.values()):
        return "backward"
    gradients = bool(_broken(view, "parameters", "grad_sq")[at].any()) and bool(_known(view, "steps", "loss")[at].any())
    return "backward" if gradients and not _measured(view, GRADIENTS, at) else "update"


def _before(order: Sequence[str], layers: tuple[str, ...]) -> str:
    """The layer that values, or gradients, came through right before they came to the first broken one."""
    at = order.index(layers[0]) if layers else 0
    return order[at - 1] if at else ""


def _count(view: View, at: int, layers: tuple[str, ...], branches: tuple[str, ...]) -> int | None:
    """Non-finite elements of the first broken layer, or branch, at a step."""
    for table, names in (("layers", layers), ("branches", branches)):
        grid = view.grid(table)
        row = np.searchsorted(grid.steps, view.steps[at])
        if names and row < len(grid.steps):
            value = grid["nonfinite"][row, grid.names.index(names[0])]
            return int(value) if np.isfinite(value) else None
    return None


def view_of(run: Run) -> View:
    """The view that rules work on: up to the first step at which training itself was broken."""
    view = View(run)
    view.fault = fault = locate(view)
    return view if fault is None or fault.contained or fault.skipped else View(run, fault, until=fault.step)
