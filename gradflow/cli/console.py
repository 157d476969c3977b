"""What the command line prints: tables and findings, coloured on a terminal, plain and uncut anywhere else."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from gradflow.cli import handbook
from gradflow.metrics import DERIVED
from gradflow.schema import TABLES
from gradflow.store import manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gradflow.records import Finding
    from gradflow.rules.registry import Rule
    from gradflow.store import Run

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def safe(text: object) -> str:
    """Return text with control characters spelled out: names come from the user's model and from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(text: str, *, style: str = "", error: bool = False) -> None:
    """Print a line; line breaks stay, other control characters are spelled out."""
    stream = sys.stderr if error else sys.stdout
    lines = [safe(line) for line in text.split("\n")]
    _console(stream).print(Text("\n".join(lines), style=style), soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr while something long goes on, on a terminal only; it takes the part done and what comes next."""
    if not sys.stderr.isatty():
        yield lambda _part, _what: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=1.0, what="")
        yield lambda part, what: bar.update(task, completed=part, what=safe(what))


def print_json(value: Any) -> None:
    """Print a value as strict JSON; NaN and infinity become null."""
    sys.stdout.write(json.dumps(manifest.plain(value), indent=2, ensure_ascii=False) + "\n")


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: fitted to a terminal, else one line a row with aligned columns."""
    cells = [[safe(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        table = Table(*headers, title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for row in cells:
            table.add_row(*map(Text, row))
        _console(sys.stdout).print(table)
    else:
        widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
        sys.stdout.write(f"{title}\n")
        for row in (list(headers), *cells):
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write(f"  {line.rstrip()}\n")
    sys.stdout.write("\n")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print each finding: what, where, when, on what evidence, and what to try."""
    for finding in findings:
        say(f"{finding.severity}: {finding.code}", style=STYLES.get(finding.severity, ""))
        first, last = finding.steps
        more = f" and {len(finding.where) - 3} more" if len(finding.where) > 3 else ""
        sure = "" if finding.confidence == "high" else " (few samples: not sure)"
        print_facts(
            ("", finding.claim + sure),
            ("where", ", ".join(finding.where[:3]) + more),
            ("steps", f"{first} to {last}"),
            *(("evidence", f"{name}: {number(value)}") for name, value in finding.evidence.items()),
            ("why", finding.why),
            *(("try", remedy) for remedy in (finding.remedy, finding.remedy_2) if remedy),
        )


def print_facts(*facts: tuple[str, str]) -> None:
    """Print lines of a label and a text, and an empty line after them."""
    for label, text in facts:
        say(f"  {label:<10}{safe(text)}" if label else f"  {safe(text)}")
    say("")


def verdict(run: Run, findings: Sequence[Finding]) -> str:
    """Return one line: how much was found, on how much evidence."""
    steps = run.steps
    counts = [(sum(f.severity == severity for f in findings), severity) for severity in STYLES]
    found = ", ".join(f"{count} x {severity}" for count, severity in counts if count) or "no findings"
    seen = f"{_count(len(steps), 'sampled step')} ({steps[0]} to {steps[-1]})" if steps else "no sampled steps"
    return f"{found} in {seen}, {_count(len(run.branches), 'branch', 'es')}, {_count(len(run.layers), 'layer')}"


def _count(number: int, thing: str, ending: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else ending}"


def rule_facts(rule: Rule) -> dict[str, Any]:
    """Return what a rule says of itself, and how it did on the labelled zoo."""
    facts = {item.name: getattr(rule, item.name) for item in fields(rule) if item.name != "check"}
    thresholds = [
        {"key": t.key, "name": t.name, "value": t.value, "unit": t.unit, "origin": t.origin} for t in rule.thresholds
    ]
    return {**facts, "thresholds": thresholds, "record": handbook.records().get(rule.code)}


def print_rule(rule: Rule) -> None:
    """Print a rule: what it says, when, by which thresholds, and its source."""
    say(f"{rule.code} ({', '.join(rule.severities)})", style="bold")
    print_facts(
        ("says", rule.says),
        ("when", rule.criterion),
        *(("threshold", f"{t.key} = {number(t.value)} {t.unit}, {t.name}: {t.origin}") for t in rule.thresholds),
        ("source", rule.source),
        ("record", handbook.told(rule.code)),
    )


def schema_rows() -> dict[str, list[dict[str, str]]]:
    """Return every column of every table: raw ones as they merge over ranks, derived ones with their formula."""
    return {
        table: [
            *(
                {"name": c.name, "type": c.type, "unit": c.unit, "merge": c.merge, "formula": "", "doc": c.doc}
                for c in raw
            ),
            *(
                {"name": d.name, "type": "float64", "unit": d.unit, "merge": "", "formula": d.formula, "doc": d.doc}
                for d in DERIVED[table]
            ),
        ]
        for table, raw in TABLES.items()
    }


def number(value: Any) -> str:
    """Return a value as text, floats with four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(number, value))
    return str(value)


def _console(stream: TextIO) -> Console:
    return Console(file=stream, markup=False, highlight=False, emoji=False)
