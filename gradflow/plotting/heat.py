"""Heat maps of depth by step: one cell a thing and sampled step, thinned to what a screen can show.

The top row is nearest the input. A cell of a long run is the mean of several neighbouring sampled steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, to_rgba
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gradflow.plotting import style
from gradflow.store.grids import Grid, Tables, View, run_starts
from gradflow.wording import label, number, rows_of_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MOST_STEPS, MOST_NAMES = 200, 240
Scale = Literal["log", "around 1", "around 0", "linear"]


@dataclass(frozen=True, slots=True)
class Colours:
    """Colour map and normalisation of one scale."""

    map: str
    norm: Normalize
    ticks: list[float]


def colours(values: Floats, scale: Scale) -> Colours:
    """Colours that fit the bulk of the values (1st to 99th percentile); a few far ones do not wash out the rest."""
    known = values[np.isfinite(values) & ((values > 0) | (scale in {"around 0", "linear"}))]
    low, high = (float(v) for v in np.percentile(known, [1, 99])) if known.size else (0.1, 1.0)
    if scale == "around 0":
        most = _round_up(max(abs(low), abs(high)), (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0))
        return Colours(style.DIVERGING, Normalize(-most, most), [-most, -most / 2, 0.0, most / 2, most])
    if scale == "around 1":
        most = _round_up(max(high, 1 / low), (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1e3, 1e6, 1e12))
        return Colours(style.DIVERGING, LogNorm(1 / most, most), [1 / most, most**-0.5, 1.0, most**0.5, most])
    if scale == "linear":
        high = max(high, low + 0.05)
        return Colours(style.SEQUENTIAL, Normalize(low, high), [float(t) for t in np.linspace(low, high, 5)])
    if high / low < 2:
        low, high = low / 1.4, high * 1.4
    return Colours(style.SEQUENTIAL, LogNorm(low, high), style.log_ticks(low, high))


def _round_up(value: float, choices: tuple[float, ...]) -> float:
    return next((choice for choice in choices if choice >= value), choices[-1])


def draw_map(ax: Axes, grid: Grid, *, unit: str, scale: Scale) -> Axes:
    """The grid as an image with names beside it, steps below it and a colour bar."""
    values, broken = grid.thinned(MOST_STEPS, MOST_NAMES)
    look = colours(values, scale)
    pixels = mpl.colormaps[look.map](look.norm(np.ma.masked_invalid(values.T)))
    pixels[~np.isfinite(values.T)] = (0, 0, 0, 0)
    if scale in {"log", "around 1"}:  # zero has no logarithm; it is the far low end all the same
        pixels[values.T == 0] = mpl.colormaps[look.map](0.0)
    pixels[broken.T] = to_rgba(style.BROKEN)
    ax.imshow(
        (pixels * 255).astype(np.uint8),
        aspect="auto",
        interpolation="none",
        extent=(0, values.shape[0], len(grid.names), 0),
    )
    style.dress(ax, x="sampled step", y="")
    ax.grid(visible=False)
    _name_rows(ax, grid)
    _name_columns(ax, grid, values.shape[0])
    if broken.any():
        ax.plot([], [], linestyle="none", marker="s", color=style.BROKEN, label="NaN or infinite")
        style.legend(ax)
    bar = ax.figure.colorbar(ScalarMappable(look.norm, look.map), ax=ax, pad=0.02, aspect=28, fraction=0.06)
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]  # 256 paths otherwise
    bar.outline.set_visible(False)
    bar.set_label(unit, color=style.MUTED, fontsize=9)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_locator(FixedLocator(look.ticks))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    bar.ax.tick_params(colors=style.INK, labelsize=8.5, length=2, color=style.MUTED)
    return ax


def _name_rows(ax: Axes, grid: Grid) -> None:
    common, positions, names = rows_of_names(grid.labels)
    ax.yaxis.set_major_locator(FixedLocator([p + 0.5 for p in positions]))
    ax.set_yticklabels([label(name, 18) for name in names], fontsize=8)
    ax.set_ylabel(label(f"{common}. …" if common else "", 34), color=style.MUTED, fontsize=8.5)


def _name_columns(ax: Axes, grid: Grid, columns: int) -> None:
    starts = run_starts(len(grid.steps), columns)
    shown = np.unique(np.linspace(0, columns - 1, min(columns, 6)).round().astype(int))
    ax.xaxis.set_major_locator(FixedLocator([float(i) + 0.5 for i in shown]))
    ax.set_xticklabels([f"{int(grid.steps[starts[i]]):,}" for i in shown])


def _map(run: Tables, ax: Axes, table: str, column: str, *, unit: str, scale: Scale) -> Axes:
    grid = View.of(run).grid(table, column)
    if grid.empty:
        return style.nothing(ax, f"No {unit} was recorded")
    return draw_map(ax, grid, unit=unit, scale=scale)


def plot_ratio_map(run: Tables, ax: Axes) -> Axes:
    """Branch over skip, by branch and step.

    Read it: the input is at the top. Dark rows add little; a row that darkens goes silent.
    """
    return _map(run, ax, "branches", "branch_ratio", unit="branch RMS / skip RMS", scale="log")


def plot_cosine_map(run: Tables, ax: Axes) -> Axes:
    """Cosine of branch and skip, by branch and step.

    Read it: pale (0) writes something new, orange amplifies what is there, purple erases it.
    """
    return _map(run, ax, "branches", "cosine", unit="cosine of branch and skip", scale="around 0")


def plot_gain_map(run: Tables, ax: Axes) -> Axes:
    """Gain of the gradient at each join, by branch and step.

    Read it: pale (1) passes the gradient on; one colour down a whole column multiplies up.
    """
    return _map(run, ax, "branches", "gain", unit="gain of the gradient", scale="around 1")


def plot_gradient_map(run: Tables, ax: Axes) -> Axes:
    """RMS of the gradient at each point of the stream or trunk, by step.

    Read it: columns of one colour are healthy; a dark top gets no gradient.
    """
    return _map(run, ax, "streams", "grad_rms", unit="RMS of the gradient ∂L/∂x", scale="log")


def plot_signal_map(run: Tables, ax: Axes) -> Axes:
    """RMS of the stream at each of its points, by step.

    Read it: a change down a column is growth with depth, along a row growth with time.
    """
    return _map(run, ax, "streams", "out_rms", unit="RMS of the stream", scale="log")


def plot_update_map(run: Tables, ax: Axes) -> Axes:
    """Update over weight of each weight matrix, by step.

    Read it: about 10⁻³ is usual; dark rows hardly train.
    """
    view = View.of(run)
    grid = view.grid("parameters", "update_ratio")
    grid = grid.select(matrices(view, grid))
    if grid.empty:
        return style.nothing(ax, "No updates were recorded")
    return draw_map(ax, grid, unit="update / weight", scale="log")


def matrices(view: View, grid: Grid) -> list[int]:
    """Positions of the parameters with two or more dimensions; all of them where shapes are not known."""
    shapes = {parameter.name: parameter.shape for parameter in view.parameters}
    keep = [i for i, name in enumerate(grid.labels) if len(shapes.get(name, (1, 1))) >= 2]
    return keep or list(range(len(grid.names)))
