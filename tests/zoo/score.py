"""Train (or read) the labelled zoo, judge every run, print the score, and keep it: `make zoo`.

`python -m zoo.score [WORD ...]` judges only the runs whose name holds a word, `--part 2/5` the second fifth of them: with
`ZOO_RUNS` set, what is trained in parts is scored in one go afterwards. `--write` keeps the score in tests/ZOO.md and
gradflow/rules/record.json. `--fresh SEED EVERY` scores with a seed and a cadence that no run was labelled with; `--keep NAME`
keeps a first score in tests/zoo/fresh.json under that name, from where tests/ZOO.md tells it.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path

from zoo import judging
from zoo.judging import HEALTHY, SICK
from zoo.table import keep_fresh, page, record, summary

ROOT = Path(__file__).parents[2]


def judge(names, draw):
    """Judge the runs; one that cannot be trained is told and counts as missed."""
    judged = {"sick": [], "healthy": []}
    for kind, name in names:
        begun = time.time()
        try:
            one = (judging.judge_sick if kind == "sick" else judging.judge_healthy)(name, draw)
        except Exception:
            traceback.print_exc(limit=-2)
            one = judging.Judged(name, SICK[name].code if kind == "sick" else "", false=["failed"])
        judged[kind].append(one)
        print(line(one), f"[{time.time() - begun:.1f} s]", flush=True)
    return judged["sick"], judged["healthy"]


def chosen(words, part):
    """The runs whose name holds a word (all without words), of which `part`, as in "2/5", takes every fifth."""
    names = [("sick", name) for name in SICK] + [("healthy", name) for name in HEALTHY]
    names = [(kind, name) for kind, name in names if not words or any(word in f"{kind}/{name}" for word in words)]
    which, of = map(int, part.split("/"))
    return names[which - 1 :: of]


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


def keep(sick, healthy):
    """Write the score where the pages and the rules read it."""
    (ROOT / "tests" / "ZOO.md").write_text(page(sick, healthy), "utf-8")
    text = json.dumps(record(sick, healthy), indent=1)
    (ROOT / "gradflow" / "rules" / "record.json").write_text(text + "\n", "utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--part", default="1/1", metavar="K/N")
    parser.add_argument("--fresh", nargs=2, type=int, default=(None, None), metavar=("SEED", "EVERY"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", metavar="NAME")
    given = parser.parse_args(arguments)
    sick, healthy = judge(chosen(given.words, given.part), judging.Draw(*given.fresh))
    print()
    print(summary(sick, healthy))
    if given.keep:
        keep_fresh(given.keep, sick, healthy)
    elif given.write and not given.words and given.part == "1/1" and given.fresh[0] is None:
        keep(sick, healthy)


if __name__ == "__main__":
    main()
