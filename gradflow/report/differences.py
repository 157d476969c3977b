"""What sets several runs apart, in words with numbers: loss, gradient, tokens, branches, findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradflow.store.readings import gradient_ratio, last_loss, median_of, output_cosine
from gradflow.wording import MISSING, number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gradflow.records import Finding
    from gradflow.store.grids import View

Line = tuple[tuple[str, bool], ...]
"""A sentence in pieces: (text, whether it is a name)."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure of a run that is compared: column title, how it is read, when a difference is worth a sentence.

    `gap` is the least difference that is, as a part of the larger of the two where `relative`.
    """

    title: str
    of: Callable[[View], float | None]
    sentence: str
    gap: float
    relative: bool = True

    def matters(self, low: float, high: float) -> bool:
        """Whether two values lie far enough apart to say so."""
        return high - low >= self.gap * (max(abs(low), abs(high)) if self.relative else 1.0)


MEASURES = (
    Measure("loss, last", last_loss, "The loss ends at", gap=0.03),
    Measure(
        "gradient, input over output",
        gradient_ratio,
        "The gradient at the input, over that at the output, is",
        gap=0.8,
    ),
    Measure(
        "token cosine, output",
        output_cosine,
        "The cosine between tokens at the output is",
        gap=0.1,
        relative=False,
    ),
    Measure(
        "branch over skip, median",
        lambda view: median_of(view, "branches", "branch_ratio"),
        "Branch over skip, by the median branch, is",
        gap=0.5,
    ),
    Measure(
        "update over weight, median",
        lambda view: median_of(view, "parameters", "update_ratio"),
        "Update over weight, by the median parameter, is",
        gap=0.67,
    ),
)


def table(views: Mapping[str, View]) -> dict[str, tuple[str, ...]]:
    """The measures of each run as text, in the order of `MEASURES`."""
    return {name: tuple(_text(measure.of(view)) for measure in MEASURES) for name, view in views.items()}


def _text(value: float | None) -> str:
    return MISSING if value is None else number(value)


def in_words(views: Mapping[str, View], findings: Mapping[str, Sequence[Finding]]) -> list[Line]:
    """A sentence for each measure that sets runs apart, from the lowest run to the highest, then one on findings."""
    lines: list[Line] = []
    for measure in MEASURES:
        known = {name: value for name, view in views.items() if (value := measure.of(view)) is not None}
        if len(known) > 1 and measure.matters(min(known.values()), max(known.values())):
            lines.append(_ranked(measure.sentence, known))
    return lines + _only_in_some(findings)


def _ranked(sentence: str, known: dict[str, float]) -> Line:
    order = sorted(known, key=lambda name: known[name])
    pieces: list[tuple[str, bool]] = [(f"{sentence} ", False)]
    shown = order if len(order) <= 6 else [*order[:3], *order[-3:]]
    for at, name in enumerate(shown):
        if at == 3 and len(order) > 6:
            pieces.append((f"… ({len(order) - 6} runs between) …, ", False))
        pieces += [(f"{number(known[name])} in ", False), (name, True), (", " if at < len(shown) - 1 else ".", False)]
    return tuple(pieces)


def _only_in_some(findings: Mapping[str, Sequence[Finding]]) -> list[Line]:
    """Which errors and warnings some runs have and others lack."""
    lines: list[Line] = []
    codes = dict.fromkeys(f.code for found in findings.values() for f in found if f.severity != "info")
    for code in codes:
        runs = [name for name, found in findings.items() if any(f.code == code and f.severity != "info" for f in found)]
        if len(runs) < len(findings):
            pieces: list[tuple[str, bool]] = [(code, True), (" was found in ", False)]
            for at, name in enumerate(runs[:6]):
                pieces += [(", " if at else "", False), (name, True)]
            more = f" and {len(runs) - 6} more" if len(runs) > 6 else ""
            rest = len(findings) - len(runs)
            pieces.append((f"{more}, and not in the other{f' {rest}' if rest > 1 else ''}.", False))
            lines.append(tuple(pieces))
    return lines
