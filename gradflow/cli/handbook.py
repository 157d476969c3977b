"""The handbook of findings: every rule in its own words, with its record and an example from the labelled zoo.

`make docs` keeps it in `docs/`: an index, and a page a finding with a picture. `gradflow rules --markdown` prints it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, TypedDict

from gradflow.rules import RULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradflow.rules import Rule

HEAD = """# What gradflow finds

A finding says what is wrong, where, since when, on what evidence, why it matters and what to try first. Thresholds are
set per project in `pyproject.toml`:

```toml
[tool.gradflow]
ignore = ["massive-activation"]

[tool.gradflow.thresholds]
"dead-units.share" = 0.6
```
"""
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


class Example(TypedDict):
    """A finding of the zoo in its own words, and the sound run that stands beside it in the picture."""

    run: str
    twin: str
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
    """Return the whole handbook as one Markdown text, without pictures."""
    index = [f"- [{code}](#{code}): {rule.says}" for code, rule in RULES.items()]
    sections = ["\n".join(["", f"## {rule.code}", "", *_told_of(rule)]) for rule in RULES.values()]
    return "\n".join([HEAD, *index, *sections, ""])


def pages() -> dict[str, str]:
    """Return the handbook as Markdown by file: `findings.md`, the index, and `findings/<code>.md`, a page a finding."""
    index = [f"- [{code}](findings/{code}.md): {rule.says}" for code, rule in RULES.items()]
    return {"findings.md": "\n".join([HEAD, *index, ""])} | {
        f"findings/{code}.md": "\n".join([f"# {code}", "", *_told_of(rule, picture=_picture(rule)), "", _BACK, ""])
        for code, rule in RULES.items()
    }


_BACK = "[All findings](../findings.md)"


def _told_of(rule: Rule, *, picture: Sequence[str] = ()) -> list[str]:
    """Everything that is known of a rule, as lines."""
    record = records().get(rule.code)
    example = record["example"] if record else None
    rows = [f"| `{t.key}` | {t.name} | {t.default:g} {t.unit} | {t.origin} |" for t in rule.thresholds]
    lines = [f"{_capital(rule.says)} ({', '.join(rule.severities)}).", ""]
    if example:
        lines += [
            *picture,
            f"**Looks like this** (run `{example['run']}` of the zoo): {example['claim']}",
            "",
            f"**Why it matters.** {_linked(example['why'])}",
            "",
            f"**Try first.** {_linked(example['remedy'])}",
            "",
            f"**Then.** {_linked(example['remedy_2'])}",
            "",
        ]
    lines += [f"**When it is reported.** {rule.criterion}", ""]
    lines += ["| threshold | of | value | where it comes from |", "| --- | --- | --- | --- |", *rows, ""]
    lines += [f"**Record on the zoo.** {_capital(told(rule.code))}.", ""]
    return [*lines, f"**Source.** {_linked(rule.source)}"]


def _picture(rule: Rule) -> list[str]:
    """The picture of a finding's page, what stands in it, and how to read it."""
    from gradflow.plotting.gallery import BY_KEY  # matplotlib, for the pages alone

    record = records().get(rule.code)
    if record is None or record["example"] is None:
        return []
    run, twin = record["example"]["run"], record["example"]["twin"]
    shown = BY_KEY[rule.picture]
    beside = f"the healthy run `{twin}`" if twin else "its twin with the first remedy below and nothing else"
    caption = f"*{shown.title}: on the left the sick run `{run}` of the zoo, on the right {beside}. {shown.reading}*"
    return [f"![{shown.title} of a run with {rule.code}, and of one without]({rule.code}.svg)", "", caption, ""]


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _linked(text: str) -> str:
    """Text in which each arXiv number is a link."""
    return _PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
