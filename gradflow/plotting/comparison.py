"""Several runs in one picture: over steps, and over relative depth, so that models of any depth lie on one axis.

`runs` maps the name that the legend shows to the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradflow.plotting import style
from gradflow.store.grids import Tables, View
from gradflow.wording import label

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def look(number: int) -> dict[str, Any]:
    """Colour and dashes of the run of that number: colours first, then the same colours with other dashes."""
    turn, color = divmod(number, len(style.SERIES))
    return {"color": style.SERIES[color], "linestyle": style.DASHES[(turn + color) % len(style.DASHES)]}


def _name(name: str, runs: Mapping[str, Tables]) -> str:
    """A run's name for the legend: whole where there are few, short enough for two columns where there are many."""
    return label(name, 46 if len(runs) <= 4 else 19)


def _over_steps(runs: Mapping[str, Tables], ax: Axes, column: str, *, unit: str, log: bool) -> Axes:
    style.dress(ax, x="optimizer step", y=unit)
    seen: list[Floats] = []
    for number, (name, run) in enumerate(runs.items()):
        steps, values = View.of(run).series(column)
        if np.isfinite(values).any():
            line = look(number)
            style.draw_series(ax, steps, values, color=line["color"], dashes=line["linestyle"], name=_name(name, runs))
            seen.append(values)
    if not seen:
        return style.nothing(ax, f"No {unit} was recorded")
    style.linear_axis(ax.xaxis, integer=True)
    if log:
        style.log_axis(ax.yaxis, np.concatenate(seen))
    else:
        style.linear_axis(ax.yaxis)
    style.legend(ax)
    return ax


def _over_relative_depth(
    runs: Mapping[str, Tables], ax: Axes, table: str, column: str, *, unit: str, log: bool = True
) -> Axes:
    style.dress(ax, x="relative depth (0: input, 1: output), last sampled step", y=unit)
    seen: list[Floats] = []
    for number, (name, run) in enumerate(runs.items()):
        grid = View.of(run).grid(table, column)
        steps = [step for step in grid.recorded_steps() if np.isfinite(grid.row(step)).any()]
        if steps:
            row = grid.row(steps[-1])
            x = np.linspace(0.0, 1.0, len(row)) if len(row) > 1 else np.array([0.5])
            dot: dict[str, Any] = {"marker": ".", "markersize": 4} if len(row) < 60 else {}
            ax.plot(x, row, label=_name(name, runs), linewidth=1.6, **look(number), **dot)
            seen.append(row)
    if not seen:
        return style.nothing(ax, f"No {unit} was recorded")
    if log:
        ax.set_yscale("log")
        style.log_axis(ax.yaxis, np.concatenate(seen))
    else:
        style.linear_axis(ax.yaxis)
    style.linear_axis(ax.xaxis)
    style.legend(ax)
    return ax


def plot_compare_loss(runs: Mapping[str, Tables], ax: Axes) -> Axes:
    """Loss over steps.

    Read it: lower and earlier is better; a level line has not learned.
    """
    return _over_steps(runs, ax, "loss", unit="loss", log=False)


def plot_compare_grad_norm(runs: Mapping[str, Tables], ax: Axes) -> Axes:
    """Global gradient norm over steps.

    Read it: spikes and climbs come before trouble.
    """
    return _over_steps(runs, ax, "grad_norm", unit="gradient norm (L2)", log=True)


def plot_compare_signal(runs: Mapping[str, Tables], ax: Axes) -> Axes:
    """RMS of the stream or trunk over relative depth.

    Read it: a straight climb is exponential growth; a fall means that the signal dies.
    """
    return _over_relative_depth(runs, ax, "streams", "out_rms", unit="RMS of the stream or trunk")


def plot_compare_gradient(runs: Mapping[str, Tables], ax: Axes) -> Axes:
    """RMS of the gradient over relative depth.

    Read it from the right, where the gradient starts: a fall towards the left is a gradient that vanishes.
    """
    return _over_relative_depth(runs, ax, "streams", "grad_rms", unit="RMS of the gradient ∂L/∂x")


def plot_compare_tokens(runs: Mapping[str, Tables], ax: Axes) -> Axes:
    """Mean cosine between tokens over relative depth.

    Read it: at 1 all tokens are the same, and nothing can tell them apart.
    """
    _over_relative_depth(runs, ax, "streams", "token_cosine", unit="cosine between tokens", log=False)
    if ax.axison:
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.03)
    return ax


def plot_compare_ratio(runs: Mapping[str, Tables], ax: Axes) -> Axes:
    """Branch over skip over relative depth.

    Read it: under 10⁻³ a branch is silent, above 1 it outweighs the stream.
    """
    return _over_relative_depth(runs, ax, "branches", "branch_ratio", unit="branch RMS / skip RMS")
