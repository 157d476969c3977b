"""Write the handbook of findings with its pictures into `docs/`: `make docs`.

A finding's picture is the one that its rule names, drawn from the sick run of the zoo whose words the page quotes, beside
its cured (or a healthy) twin.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from gradflow.cli import handbook
from gradflow.plotting import gallery, style
from gradflow.plotting.svg import quiet
from gradflow.rules import RULES
from gradflow.store.grids import View
from zoo import judging

DOCS = Path(__file__).parents[2] / "docs"
WIDTH, HEIGHT = 9.4, 3.6  # inches


def twins(picture, sick, sound, findings, *, titles) -> Figure:
    """A picture of a sick run beside that of its sound twin, on one scale."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 0.93)), facecolor="white")
    axes = figure.subplots(1, 2)
    for ax, run, found in zip(axes, (sick, sound), (findings, ()), strict=True):
        picture.paint(View.of(run), ax, found)
    on_one_scale(axes)
    figure.draw_without_rendering()
    for ax, title in zip(axes, titles, strict=True):
        figure.text(ax.get_position().x0, 0.99, title, va="top", fontsize=10, color=style.INK)
    return figure


def on_one_scale(axes):
    """Give pictures of the same quantity the same scale."""
    if any(ax.patches for ax in axes):
        right = max(ax.get_xlim()[1] for ax in axes)
        for ax in axes:
            ax.set_xlim(0, right)
        return
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        if ax.get_yscale() == "log":
            style.log_axis(ax.yaxis, [min(low), max(high)])
        else:
            ax.set_ylim(min(low), max(high))


def draw(code):
    """The picture of a finding."""
    example = handbook.records()[code]["example"]
    judged = judging.judge_sick(example["run"])
    sound = f"healthy: {example['twin']}" if example["twin"] else "with the first remedy"
    findings = [finding for finding in judged.findings if finding.code == code]
    titles = (f"{code}: {example['run']}", sound)
    return twins(gallery.BY_KEY[RULES[code].picture], judged.run, judged.twin, findings, titles=titles)


def main(codes):
    (DOCS / "findings").mkdir(exist_ok=True)
    for name, text in handbook.pages().items():
        (DOCS / name).write_text(text, "utf-8")
    for code in codes or RULES:
        with matplotlib.style.context(["default", style.SETTINGS]), quiet():
            draw(code).savefig(DOCS / "findings" / f"{code}.svg", metadata={"Date": None}, facecolor="white")
        print(code, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
