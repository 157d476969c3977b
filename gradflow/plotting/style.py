"""How gradflow's pictures look: colours for light and dark, axes, labels. Nothing here knows what is drawn.

Every helper takes and changes the `Axes` it is given: no pyplot, no global setting is touched.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from gradflow.store.grids import run_starts
from gradflow.wording import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis, YAxis
    from numpy.typing import NDArray

    from gradflow.store.grids import Grid, View

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

THEME: dict[str, tuple[str, str]] = {
    "ink": ("#1c2430", "#e6e9ef"),
    "muted": ("#586474", "#a6b0be"),
    "grid": ("#dde2e9", "#323b48"),
    "early": ("#5e9ac5", "#4a7fa8"),
    "middle": ("#2178b5", "#79bdec"),
    "late": ("#08306b", "#e2f0fb"),
    "theory": ("#8a5a00", "#e9b44c"),
    "blue": ("#0072b2", "#56b4e9"),
    "vermillion": ("#d05a00", "#ff9a4d"),
    "green": ("#008a64", "#3fcf9f"),
    "purple": ("#a4508b", "#e0a0cc"),
    "sky": ("#3b8fc4", "#8fd0f5"),
    "amber": ("#b07800", "#f0c04a"),
    "broken": ("#e3007d", "#ff5fb3"),
}
"""Colour of each role on light and on dark: Okabe and Ito's palette, darkened or lightened to stand out on either."""

INK, MUTED, RULE = THEME["ink"][0], THEME["muted"][0], THEME["grid"][0]
BLUE, VERMILLION, GREEN, PURPLE = (THEME[name][0] for name in ("blue", "vermillion", "green", "purple"))
THEORY, BROKEN = THEME["theory"][0], THEME["broken"][0]
STAGES = (
    {"color": THEME["early"][0], "linestyle": (0, (1, 1.4)), "linewidth": 1.6},
    {"color": THEME["middle"][0], "linestyle": (0, (4, 1.6)), "linewidth": 1.5},
    {"color": THEME["late"][0], "linestyle": "-", "linewidth": 1.8},
)
"""Line of the first, the middle and the last sampled step: told apart by dashes as well as by colour."""
SEVERITY = {"error": VERMILLION, "warning": THEME["amber"][0], "info": BLUE}
SERIES = tuple(THEME[name][0] for name in ("blue", "vermillion", "green", "purple", "ink", "amber", "sky"))
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
SIZE = (4.7, 3.1)  # inches, 72 units each: at the full width of a phone the type keeps its size
REFERENCE = (0, (5, 2, 1, 2))
MOST_POINTS = 400  # of a line over steps

SETTINGS: dict[str, object] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "gradflow",
    "text.usetex": False,
    "path.simplify": True,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
"""matplotlib settings under which the report draws, applied for the time of a drawing only."""


def css_color(light: str) -> str:
    """A colour as a page writes it: the CSS variable of its role, so that a dark page gets the dark one."""
    return next((f"var(--{name},{pair[0]})" for name, pair in THEME.items() if pair[0] == light), light)


def dress(ax: Axes, *, x: str, y: str) -> Axes:
    """Axis names, quiet frame, horizontal rules behind the data."""
    ax.set_facecolor("none")
    ax.set_xlabel(x, color=MUTED, fontsize=9)
    ax.set_ylabel(y, color=MUTED, fontsize=9)
    ax.tick_params(colors=INK, labelsize=8.5, length=3, color=MUTED, width=0.7)
    for side, spine in ax.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(MUTED)
        spine.set_linewidth(0.7)
    ax.grid(visible=True, axis="y", color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    return ax


def nothing(ax: Axes, reason: str) -> Axes:
    """An empty picture that says why it is empty."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, reason, ha="center", va="center", color=MUTED, transform=ax.transAxes, wrap=True)
    return ax


def legend(ax: Axes) -> None:
    """A legend above the data, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        longest = max(len(text) for text in labels)
        columns = 3 if longest <= 13 else (2 if longest <= 26 else 1)
        named = any(text.get_gid() == "stream" for text in ax.texts)  # names of streams stand right above the axes
        ax.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(len(labels), columns),
            frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2.2, columnspacing=1.4,
            borderaxespad=1.5 if named else 0.2,
        )  # fmt: skip


def log_axis(axis: YAxis, values: Floats | Sequence[float], *, least_span: float = 4.0) -> None:
    """A logarithmic axis that fits the positive values, at least a factor `least_span` wide, with plain labels."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.1, 10.0)
    bottom, top = math.log10(low), math.log10(high)
    spare = max(0.0, math.log10(least_span) - (top - bottom)) / 2 + 0.06 * max(top - bottom, 0.3)
    low, high = 10 ** max(bottom - spare, -307.0), 10 ** min(top + spare, 308.0)  # within float64
    axis.axes.set_yscale("log")
    axis.axes.set_ylim(low, high)
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends: powers of ten, with 2 and 5 or finer steps where the ends are close."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high) - math.log10(low)
    if decades > 2:
        every = max(1, math.ceil(decades / 6))
        exponents = [e for e in range(first, last + 1) if e % every == 0]
        ticks = [10.0**e for e in exponents]
    else:
        multiples = (1, 2, 5) if decades > 0.7 else (1, 1.5, 2, 3, 4, 5, 6, 8)
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in multiples]
    return [tick for tick in ticks if low <= tick <= high]


def linear_axis(axis: Axis, *, integer: bool = False, most: int = 6) -> None:
    """A linear axis with few, plain ticks."""
    axis.set_major_locator(MaxNLocator(most, integer=integer))
    if not integer:
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(round(value, 12))))


def stages(grid: Grid) -> list[tuple[int, dict[str, Any]]]:
    """First, middle and last step at which the grid holds anything (or as many as there are), each with its line."""
    steps = grid.recorded_steps()
    if len(steps) < 3:
        return list(zip(steps, STAGES[2:] if len(steps) == 1 else (STAGES[0], STAGES[2]), strict=False))
    middle = min(steps[1:-1], key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    return list(zip((steps[0], middle, steps[-1]), STAGES, strict=True))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Names that are drawn as one line: a stream, `x` holding their places on the depth axis."""

    name: str
    index: NDArray[np.int64]
    x: Floats


def stretches(view: View, grid: Grid, table: str) -> list[Stretch]:
    """The streams of a grid, one behind the other: points are numbered from 0 in each, all else from 1 throughout."""
    if table == "streams":
        groups = [name[0] for name in grid.names]
    elif table == "branches":
        stream_of = {branch.name: branch.stream for branch in view.branches}
        groups = [stream_of.get(name[0], "") for name in grid.names]
    else:
        groups = [""] * len(grid.names)
    gap = 1.0 if table == "streams" else 0.0
    result, start, count = [], 0.0 if table == "streams" else 1.0, Counter(groups)
    for group in dict.fromkeys(groups):
        index = np.array([i for i, name in enumerate(groups) if name == group], dtype=np.int64)
        result.append(Stretch(group, index, start + np.arange(float(count[group]))))
        start += count[group] - 1 + max(gap, 1.0)
    return result


def draw_series(
    ax: Axes, steps: Ints, values: Floats, *, color: str = BLUE, name: str = "_", dashes: Any = "-"
) -> None:
    """A line over steps; of a long run the mean of neighbouring steps, within the band that they span."""
    known = np.isfinite(values)
    x, y = steps[known].astype(np.float64), values[known]
    if len(x) > MOST_POINTS:
        starts = run_starts(len(x), MOST_POINTS)
        count = np.diff(np.append(starts, len(x)))
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        x, y = x[starts], np.add.reduceat(y, starts) / count
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    dot: dict[str, Any] = {"marker": ".", "markersize": 5} if len(x) < 25 else {}
    ax.plot(x, y, color=color, linewidth=1.6, linestyle=dashes, label=name, **dot)


def reference(ax: Axes, y: float, text: str = "_") -> None:
    """A dashed level that the data are to be compared with."""
    ax.axhline(y, color=THEORY, linestyle=REFERENCE, linewidth=1.2, label=text, zorder=1.5)


def marks(ax: Axes, x: Floats, flags: NDArray[np.bool_], *, at: float, marker: str, color: str, text: str) -> None:
    """Marks along the edge of the picture for values that have no place on its axis: zero, or not finite."""
    if flags.any():
        ax.plot(
            x[flags], np.full(int(flags.sum()), at), linestyle="none", marker=marker, color=color, markersize=4.5,
            transform=ax.get_xaxis_transform(), clip_on=False, label=text, zorder=5,
        )  # fmt: skip
