"""Train (or read) the labelled zoo, judge every run, print the score, and keep it: `make zoo`.

`python -m zoo.score [WORD ...]` judges only the runs whose name holds a word, and keeps nothing. `--write` keeps the
score in tests/ZOO.md and gradflow/rules/record.json.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from zoo import judging
from zoo.judging import HEALTHY, SICK
from zoo.table import page, record, summary

ROOT = Path(__file__).parents[2]


def judge(words):
    """Judge the runs; one that cannot be trained is told and counts as missed."""
    sick, healthy = [], []
    for kind, names, function, into in (
        ("sick", SICK, judging.judge_sick, sick),
        ("healthy", HEALTHY, judging.judge_healthy, healthy),
    ):
        for name in names:
            if words and not any(word in f"{kind}/{name}" for word in words):
                continue
            begun = time.time()
            try:
                judged = function(name)
            except Exception:
                traceback.print_exc(limit=-2)
                judged = judging.Judged(name, SICK[name].code if kind == "sick" else "", false=["failed"])
            into.append(judged)
            print(line(judged), f"[{time.time() - begun:.1f} s]", flush=True)
    return sick, healthy


def line(judged):
    alarms = judging.alarms(judged.findings)
    told = "; ".join(f"{f.severity} {f.code} @ {', '.join(f.where[:2])} {f.steps}" for f in alarms)
    if not judged.code:
        return f"{'ok  ' if not alarms else 'BAD '} healthy/{judged.name}: {told}  loss {judged.losses}"
    marks = "".join(
        mark if good else "-" if good is not None else " "
        for mark, good in (
            ("F", judged.found),
            ("P", judged.placed),
            ("D", judged.dated),
            ("p", judged.proved),
            ("r", judged.remedied),
            ("C", judged.cured),
        )
    )
    good = judged.found and judged.placed and judged.proved and not judged.false and judged.cured is not False
    cure = (
        ""
        if judged.cured is not False
        else f" | CURE {judged.losses} left {[f.code for f in judged.cure_findings]} remedy: {[f.remedy for f in judged.findings if f.code == judged.code]}"
    )
    return f"{'ok  ' if good else 'BAD '} {marks} sick/{judged.name} [{judged.code}, {judged.figure:.3g}]: {told}{cure}"


def main(arguments):
    write = "--write" in arguments
    words = [word for word in arguments if not word.startswith("--")]
    sick, healthy = judge(words)
    print()
    print(summary(sick, healthy))
    if write and not words:
        (ROOT / "tests" / "ZOO.md").write_text(page(sick, healthy))
        target = ROOT / "gradflow" / "rules" / "record.json"
        target.write_text(json.dumps(record(sick, healthy), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
