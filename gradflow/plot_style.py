"""How gradflow's pictures look: colours for light and dark, axes, labels. Nothing here knows what is drawn.

Every helper takes and changes the `Axes` it is given: no pyplot, no global setting is touched.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from gradflow.grids import run_starts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

    from gradflow.grids import Grid

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
SIZE = (5.2, 3.3)  # inches; at 72 units an inch the type is legible on a phone at full width
REFERENCE = (0, (5, 2, 1, 2))
MOST_POINTS = 400  # of a line over steps
HEIGHT_OF_NAMES = 14  # labels that fit beside a heat map

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


def printable(text: str) -> str:
    r"""The text with what cannot be seen (control and format characters, lone surrogates) written as `\u202e`."""
    return "".join(_visible(char) for char in text)


def _visible(char: str) -> str:
    if unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}:
        return char
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def label(text: str, limit: int = 34) -> str:
    """A name for a figure: printable, shortened in the middle, and never read as mathematics."""
    text = printable(text)
    if len(text) > limit:
        text = text[: limit // 2 - 1] + "…" + text[-(limit - limit // 2) :]
    return text.replace("$", r"\$")


def number(value: float) -> str:
    """A number as a person writes it: three digits, 12 500 as 12.5k, tiny ones as 3.2×10⁻⁷."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    size = abs(value)
    if size == 0:
        return "0"
    if 1e-3 <= size < 1e4:
        text = f"{value:.3g}" if size < 1e3 else f"{value:,.0f}"
        if size < 1 and text.lstrip("-") == "1":  # 0.9998 is not 1 where a cosine is meant
            text = f"{value:.6f}".rstrip("0")
        return text.replace("-", "−")
    exponent = math.floor(math.log10(size))
    mantissa = f"{value / 10.0**exponent:.2g}".replace("-", "−")
    power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if mantissa == "1" else f"{mantissa}×10{power}"


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
    ax.text(0.5, 0.5, label(reason, 80), ha="center", va="center", color=MUTED, transform=ax.transAxes, wrap=True)
    return ax


def legend(ax: Axes) -> None:
    """A legend above the data, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = 3 if max(len(text) for text in labels) < 18 else 2
        ax.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=min(len(labels), columns),
            frameon=False, fontsize=8.5, labelcolor=INK, handlelength=2.2, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip


def log_axis(axis: Axis, values: Floats | Sequence[float], *, least_span: float = 4.0) -> None:
    """A logarithmic axis that fits the positive values, never narrower than a factor `least_span`, with plain labels."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.1, 10.0)
    spare = max(0.0, math.log(least_span) - math.log(high / low)) / 2 + 0.06 * math.log(max(high / low, 2.0))
    low, high = low / math.exp(spare), high * math.exp(spare)
    setter = axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale
    setter("log")
    (axis.axes.set_ylim if axis.axis_name == "y" else axis.axes.set_xlim)(low, high)
    axis.set_minor_locator(NullLocator())
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends: powers of ten, with 2 and 5 or finer steps where the ends are close."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = math.log10(high / low)
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
    """First, middle and last step at which the grid holds anything (fewer where there are fewer), each with its line."""
    steps = grid.recorded_steps()
    if len(steps) < 3:
        return list(zip(steps, STAGES[2:] if len(steps) == 1 else (STAGES[0], STAGES[2]), strict=False))
    middle = min(steps[1:-1], key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    return list(zip((steps[0], middle, steps[-1]), STAGES, strict=True))


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
    dot = {"marker": ".", "markersize": 5} if len(x) < 25 else {}
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


def rows_of_names(labels: Sequence[str], limit: int = HEIGHT_OF_NAMES) -> tuple[str, list[int], list[str]]:
    """What most names have in common, and a few of them to show: (common prefix, positions, short names).

    All are shown where they fit. Otherwise one a module (the first of `h.3.attn`, `h.3.mlp` as `h.3`), then every
    second module, and so on; never two so close that they would touch.
    """
    parts = [name.split(".") for name in labels]
    common = _shared_start(parts)
    short = [part[len(common) :] if part[: len(common)] == common else part for part in parts]
    positions, drop = list(range(len(short))), 0
    while len(positions) > limit and drop < 3:
        drop += 1
        keys = [tuple(part[: max(1, len(part) - drop)]) for part in short]
        positions = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    if len(positions) > limit:
        positions = [positions[i] for i in run_starts(len(positions), limit)]
    least = 0.8 * len(short) / limit
    apart: list[int] = []
    for position in reversed(positions):  # from below, so that of two the deeper one stays: `h.0` rather than `embed`
        if not apart or apart[-1] - position >= least:
            apart.append(position)
    names = [".".join(short[i][: max(1, len(short[i]) - drop)]) for i in reversed(apart)]
    return ".".join(common), apart[::-1], names


def _shared_start(parts: list[list[str]]) -> list[str]:
    """The longest dotted start that nine names of ten share (not `embed`, at the head of a stream) and none is all of."""
    common: list[str] = []
    while parts:
        following = Counter(part[len(common)] for part in parts if len(part) > len(common) + 1 and part[: len(common)] == common)
        best = following.most_common(1)
        if not best or best[0][1] < 0.9 * len(parts):
            break
        common.append(best[0][0])
    return common
