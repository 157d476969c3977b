"""The rows of a report's tables: branches, points, layers and parameters with their last recorded figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradflow.wording import MISSING, Fact, number, plain, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.records import Finding
    from gradflow.store.grids import Grid, View

BRANCH_COLUMNS = (
    ("skip_rms", "skip RMS"), ("branch_rms", "branch RMS"), ("branch_ratio", "branch / skip"), ("cosine", "cosine"),
    ("gain", "gradient gain"), ("signal_share", "signal share"), ("gradient_share", "gradient share"),
)  # fmt: skip
POINT_COLUMNS = (
    ("out_rms", "RMS"),
    ("grad_rms", "gradient RMS"),
    ("token_cosine", "token cosine"),
    ("effective_rank", "effective rank"),
)
LAYER_COLUMNS = (
    ("out_rms", "RMS"),
    ("grad_out_rms", "gradient RMS"),
    ("zero_fraction", "zeros"),
    ("dead_fraction", "dead units"),
    ("saturated_fraction", "saturated"),
)
PARAMETER_COLUMNS = (("weight_rms", "weight RMS"), ("grad_rms", "gradient RMS"), ("update_ratio", "update / weight"))


DECIDING = (
    ("measured", "measured", "quantity"),
    ("threshold", "threshold", "threshold_from"),
    ("expected", "expected", "expected_from"),
)
"""Keys of the evidence that every rule writes: key, title, and the key that explains it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: number in order of execution, name, a few words on it, figures, numbers of its findings."""

    number: int
    name: str
    kind: str
    figures: tuple[str, ...]
    findings: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Inventory:
    """A table: `groups` are (heading, rows), `left_out` rows did not fit, `step` is when it was measured."""

    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    step: int | None
    left_out: int = 0

    @property
    def count(self) -> int:
        """Rows shown."""
        return sum(len(rows) for _, rows in self.groups)


def evidence(finding: Finding) -> tuple[list[Fact], list[Fact]]:
    """A finding's numbers: those that decide (measured, threshold, expected), then the rest; nulls are left out."""
    left = {key: value for key, value in finding.evidence.items() if value is not None}
    main = []
    for key, title, note in DECIDING:
        if key in left:
            main.append(Fact(title, plain(left.pop(key)), plain(left.pop(note, ""))))
    return main, [Fact(words(key), plain(value)) for key, value in left.items()]


def branches(view: View, findings: Sequence[Finding], *, most: int = 2000) -> Inventory:
    """Every branch under its stream, with the numbers of the findings that name it."""
    figures, step = _figures(view, "branches", BRANCH_COLUMNS)
    groups: dict[str, list[Row]] = {}
    for at, branch in enumerate(view.branches[:most], 1):
        words: list[str] = [branch.placement if branch.placement != "none" else "no norm"]
        if branch.kind == "projection":
            words.append("projection")
        if branch.occurrence:
            words.append(f"call {branch.occurrence + 1}")
        row = Row(
            at,
            branch.name,
            ", ".join(words),
            figures.get((branch.name,), _blank(BRANCH_COLUMNS)),
            _named(branch.name, findings),
        )
        groups.setdefault(branch.stream, []).append(row)
    return _inventory(BRANCH_COLUMNS, groups, step, len(view.branches))


def points(view: View, findings: Sequence[Finding], *, most: int = 2000) -> Inventory:
    """The points of each stream and trunk."""
    figures, step = _figures(view, "streams", POINT_COLUMNS)
    groups: dict[str, list[Row]] = {}
    for stream in view.streams:
        for at, point in enumerate(stream.points[:most]):
            row = Row(at, point, "", figures.get((stream.name, point), _blank(POINT_COLUMNS)), _named(point, findings))
            groups.setdefault(f"{stream.name} ({stream.kind})", []).append(row)
    return _inventory(POINT_COLUMNS, groups, step, sum(len(stream.points) for stream in view.streams))


def layers(view: View, findings: Sequence[Finding], *, most: int = 400) -> Inventory:
    """Layers in order of execution."""
    figures, step = _figures(view, "layers", LAYER_COLUMNS)
    rows = [
        Row(at, layer.name, layer.kind, figures.get((layer.name,), _blank(LAYER_COLUMNS)), _named(layer.name, findings))
        for at, layer in enumerate(view.layers[:most], 1)
    ]
    return _inventory(LAYER_COLUMNS, {"": rows} if rows else {}, step, len(view.layers))


def parameters(view: View, findings: Sequence[Finding], *, most: int = 400) -> Inventory:
    """Parameters in the order of the model."""
    figures, step = _figures(view, "parameters", PARAMETER_COLUMNS)
    rows = []
    for at, parameter in enumerate(view.parameters[:most], 1):
        words = "×".join(map(str, parameter.shape)) or "scalar"
        words += "" if parameter.requires_grad else ", frozen"
        values = figures.get((parameter.name,), _blank(PARAMETER_COLUMNS))
        rows.append(Row(at, parameter.name, words, values, _named(parameter.name, findings)))
    return _inventory(PARAMETER_COLUMNS, {"": rows} if rows else {}, step, len(view.parameters))


def _inventory(
    columns: tuple[tuple[str, str], ...], groups: dict[str, list[Row]], step: int | None, total: int
) -> Inventory:
    frozen = tuple((name, tuple(rows)) for name, rows in groups.items())
    shown = sum(len(rows) for _, rows in frozen)
    return Inventory(tuple(title for _, title in columns), frozen, step, total - shown)


def _figures(
    view: View, table: str, columns: tuple[tuple[str, str], ...]
) -> tuple[dict[tuple[str, ...], tuple[str, ...]], int | None]:
    """Figures of each thing at the table's last step, as text, by key."""
    rows = [view.last(table, column) for column, _ in columns]
    last = max((int(row.steps[0]) for row in rows if len(row.steps)), default=None)
    if last is None:
        return {}, None
    # The names of a table may be more over the whole run than at its last step.
    figures: dict[tuple[str, ...], list[str]] = {}
    for place, row in enumerate(rows):
        if len(row.steps) and row.steps[0] == last:
            for name, text in zip(row.names, _texts(row), strict=True):
                figures.setdefault(name, [MISSING] * len(rows))[place] = text
    return {name: tuple(texts) for name, texts in figures.items()}, last


def _texts(row: Grid) -> tuple[str, ...]:
    """The figures of a grid of one step."""
    return tuple(
        "not finite" if broken else MISSING if np.isnan(value) else number(float(value))
        for value, broken in zip(row.values[0], row.broken[0], strict=True)
    )


def _blank(columns: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return (MISSING,) * len(columns)


def _named(name: str, findings: Sequence[Finding]) -> tuple[int, ...]:
    return tuple(i for i, finding in enumerate(findings, 1) if name in finding.where)
