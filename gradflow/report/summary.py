"""The words and numbers of a report's first screen: verdict, key figures, where in depth, how it was recorded.

Plain records for a template or a card; no HTML here. Rules decide what is wrong, pictures show it; this says it
briefly.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gradflow.store.grids import run_starts
from gradflow.store.readings import first_and_last, gradient_ratio, last_row, ledger_error, output_cosine
from gradflow.wording import Fact, number, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gradflow.records import Finding
    from gradflow.store import Run
    from gradflow.store.grids import Tables, View

State = Literal["error", "warning", "healthy", "empty"]
RANK = {"error": 0, "warning": 1, "info": 2}
MOST_CELLS = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to "is it healthy": `headline` in a few words, `lead` with the evidence."""

    state: State
    headline: str
    lead: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of the depth strip: the names in it, the worst severity among them (`""`: none)."""

    first: str
    last: str
    severity: str


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then the rest; within each as the rules gave them."""
    return sorted(findings, key=lambda finding: RANK[finding.severity])


def plural(count: int, noun: str) -> str:
    """`1 branch`, `2 branches`, `1,200 steps`."""
    ending = "es" if noun.endswith(("ch", "s")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def make_verdict(run: Tables, findings: Sequence[Finding], checks: int) -> Verdict:
    """What the page opens with; `checks` is how many rules were asked."""
    count = Counter(finding.severity for finding in findings)
    seen = _evidence(run, checks)
    if not run.steps:
        return Verdict(
            "empty", "Nothing was recorded", "The run holds no sampled step, so nothing can be said about it."
        )
    serious = [plural(count[severity], severity) for severity in ("error", "warning") if count[severity]]
    if serious:
        state: State = "error" if count["error"] else "warning"
        return Verdict(
            state, f"{'Not healthy' if count['error'] else 'Look here'}: {' and '.join(serious)}", f"From {seen}."
        )
    note = f" {plural(count['info'], 'note')} below." if count["info"] else ""
    return Verdict("healthy", "Healthy: nothing is wrong", f"On the evidence of {seen}.{note}")


def _evidence(run: Tables, checks: int) -> str:
    steps = run.steps
    if not steps:
        return "no sampled step"
    between = f" ({steps[0]:,} to {steps[-1]:,})" if len(steps) > 1 else f" (step {steps[0]:,})"
    parts = [f"{plural(len(steps), 'sampled step')}{between}", plural(len(run.branches), "residual branch")]
    if not run.branches:
        parts[-1] = "no residual branch (there is none in this model)"
    if checks:
        parts.append(plural(checks, "check"))
    return ", ".join(parts)


def key_figures(view: View) -> list[Fact]:
    """The handful of figures that say how a run is doing, at its last sampled step; those that were recorded."""
    facts = [_loss(view), _gradient(view), _tokens(view), _ratios(view), _updates(view), _ledger(view)]
    return [fact for fact in facts if fact]


def _loss(view: View) -> Fact | None:
    _, values = view.series("loss")
    ends = first_and_last(values)
    if ends is None:
        return None
    broken = not np.isfinite(values[-1])
    return Fact("Loss, first → last", f"{number(ends[0])} → {'not finite' if broken else number(ends[1])}")


def _gradient(view: View) -> Fact | None:
    ratio = gradient_ratio(view)
    return (
        None
        if ratio is None
        else Fact("Gradient, input over output", number(ratio), "of the main stream; near 1 to √depth is healthy")
    )


def _tokens(view: View) -> Fact | None:
    cosine = output_cosine(view)
    return (
        None
        if cosine is None
        else Fact("Likeness of tokens at the output", number(cosine), "cosine; at 1 all are the same")
    )


def _spread(view: View, table: str, column: str, label: str, note: str) -> Fact | None:
    _, row = last_row(view, table, column)
    known = row[np.isfinite(row)]
    if not known.size:
        return None
    return Fact(
        label,
        f"{number(float(np.median(known)))}",
        f"{note}; {number(float(known.min()))} to {number(float(known.max()))}",
    )


def _ratios(view: View) -> Fact | None:
    return _spread(view, "branches", "branch_ratio", "Branch over skip, median", "range over branches")


def _updates(view: View) -> Fact | None:
    return _spread(view, "parameters", "update_ratio", "Update over weight, median", "usual is 10⁻³")


def _ledger(view: View) -> Fact | None:
    error = ledger_error(view)
    return (
        None
        if error is None
        else Fact("Ledger, furthest from 1", number(error), "shares must sum to 1; checked at every step")
    )


def depth_strip(run: Run, findings: Sequence[Finding]) -> list[Cell]:
    """Depth from input to output in at most 60 pieces, each with the worst that a finding says of it.

    Empty where no finding names a place in depth.
    """
    names = [branch.name for branch in run.branches]
    if not names and run.streams:
        names = list(max(run.streams, key=lambda stream: len(stream.points)).points)
    severity = {name: _severity_of(name, findings) for name in names}
    if not any(severity.values()):
        return []
    starts = [*(int(i) for i in run_starts(len(names), MOST_CELLS)), len(names)]
    cells = []
    for start, stop in pairwise(starts):
        worst = min((severity[name] for name in names[start:stop]), key=lambda s: RANK.get(s, 9))
        cells.append(Cell(names[start], names[stop - 1], worst))
    return cells


def _severity_of(name: str, findings: Sequence[Finding]) -> str:
    """Worst severity of the findings that name the branch or point, something inside it, or its addition."""
    for finding in ordered(findings):
        if finding.severity != "info" and any(
            place == name or place.startswith((f"{name}.", f"{name}:")) for place in finding.where
        ):
            return finding.severity
    return ""


def recording(run: Run, view: View) -> list[Fact]:
    """What was recorded, of what, how, and at what cost; `view` is the run's."""
    meta, steps = run.meta, view.steps
    config = dict(meta.get("config") or {})
    started = str(meta.get("started") or config.pop("started", "") or "unknown")
    parts = (("branch", run.branches), ("stream", run.streams), ("layer", run.layers), ("parameter", run.parameters))
    facts = [
        Fact("Model", str(meta.get("model") or "unnamed")),
        Fact("Structure", ", ".join(plural(len(things), noun) for noun, things in parts)),
        Fact("Sampled steps", f"{len(steps):,}" + (f", {steps[0]:,} to {steps[-1]:,}" if steps else "")),
        Fact("Settings", ", ".join(f"{key} = {_plain(value)}" for key, value in config.items()) or "unknown"),
        Fact("Optimizer", "; ".join(_optimizer(o) for o in meta.get("optimizers") or []) or "none known"),
        Fact("Precision", str(meta.get("precision") or "unknown")),
        Fact("Processes", str(meta.get("world_size") or 1)),
        Fact("Started", started.replace("T", " ", 1).replace("+00:00", " UTC")),
        Fact("Versions", f"gradflow {meta.get('gradflow') or '?'}, torch {meta.get('torch') or '?'}"),
    ]  # fmt: skip
    _, seconds = view.series("seconds")
    if np.isfinite(seconds).any():
        facts.append(
            Fact("Time of a sampled step", f"{number(float(np.nanmedian(seconds)))} s (median, measuring included)")
        )
    return facts


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _optimizer(optimizer: dict[str, Any]) -> str:
    group = (optimizer.get("groups") or [{}])[0]
    settings = ", ".join(
        f"{key} {_plain(value)}" for key, value in group.items() if value is not None and key != "params"
    )
    return f"{optimizer.get('class', '?')} ({settings})"


def troubles(run: Run) -> list[str]:
    """What could not be followed at discovery or read back, and whether recording stopped early."""
    lines = []
    stopped = run.meta.get("stopped")
    if isinstance(stopped, dict):
        lines.append(
            f"Recording stopped at step {stopped.get('step')}: {stopped.get('error')}. What follows is from before."
        )
    elif stopped:
        lines.append(f"Recording stopped: {stopped}")
    for problem in run.meta.get("problems") or []:
        fields = problem if isinstance(problem, dict) else {"what": problem}
        lines.append(": ".join(str(fields[key]) for key in ("what", "where", "reason") if fields.get(key)))
    return [printable(line) for line in [*lines, *run.problems]]
