"""The page on findings, `docs/findings.md`: every rule in its own words, with its record on the labelled zoo.

`gradflow rules --markdown` prints it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, TypedDict

from gradflow.rules import RULES

if TYPE_CHECKING:
    from gradflow.rules import Rule

HEAD = """# What gradflow finds

Written by `gradflow rules --markdown > docs/findings.md`; change the rules, not this page.

A finding says what is wrong, where, since when, on what evidence, why it matters and what to try first. Thresholds are
set per project in `pyproject.toml`:

```toml
[tool.gradflow]
ignore = ["massive-activation"]

[tool.gradflow.thresholds]
"dead-units.share" = 0.6
```
"""


class Example(TypedDict):
    """A finding of the zoo in its own words."""

    run: str
    claim: str
    why: str
    remedy: str
    remedy_2: str


class Record(TypedDict):
    """How a rule did on the labelled zoo: sick runs with its code, found, placed; cures tried, cured; false alarms."""

    sick: int
    found: int
    placed: int
    cures: int
    cured: int
    false: int
    example: Example | None


@cache
def records() -> dict[str, Record]:
    """Return each rule's record on the labelled zoo, as `make zoo` last wrote it."""
    text = files("gradflow.rules").joinpath("record.json").read_text("utf-8")
    found: dict[str, Record] = json.loads(text)["rules"]
    return found


@cache
def healthy_runs() -> int:
    """Return how many healthy runs the zoo has."""
    text = files("gradflow.rules").joinpath("record.json").read_text("utf-8")
    return int(json.loads(text)["healthy"])


def told(code: str) -> str:
    """Return a rule's record in one sentence."""
    record = records().get(code)
    if record is None:
        return "not tried"
    cured = f"; the first remedy cured {record['cured']} of {record['cures']}" if record["cures"] else ""
    return (
        f"found in {record['found']} of {record['sick']} sick runs, at the right place in {record['placed']}{cured}; "
        f"{record['false']} false alarms, {healthy_runs()} healthy runs among those tried"
    )


def page() -> str:
    """Return the page as Markdown."""
    index = [f"- [{code}](#{code}): {rule.says}" for code, rule in RULES.items()]
    return "\n".join([HEAD, *index, "", *(_section(rule) for rule in RULES.values())])


def _section(rule: Rule) -> str:
    record = records().get(rule.code)
    example = record["example"] if record else None
    rows = [f"| `{t.key}` | {t.name} | {t.default:g} {t.unit} | {t.origin} |" for t in rule.thresholds]
    lines = [f"## {rule.code}", "", f"{rule.says[0].upper()}{rule.says[1:]} ({', '.join(rule.severities)}).", ""]
    if example:
        lines += [
            f"**Looks like this** (run `{example['run']}` of the zoo): {example['claim']}",
            "",
            f"**Why it matters.** {example['why']}",
            "",
            f"**Try first.** {example['remedy']}",
            "",
            f"**Then.** {example['remedy_2']}",
            "",
        ]
    lines += [f"**When it is reported.** {rule.criterion}", ""]
    lines += ["| threshold | of | value | where it comes from |", "| --- | --- | --- | --- |", *rows, ""]
    lines += [f"**Record on the zoo.** {told(rule.code)[0].upper()}{told(rule.code)[1:]}.", ""]
    return "\n".join([*lines, f"**Source.** {rule.source}", ""])
