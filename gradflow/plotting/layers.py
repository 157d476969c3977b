"""Pictures of layers, parameters and paths: dead units, updates against weights, how deep the gradient goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow import theory
from gradflow.plotting import style
from gradflow.store.grids import Tables, View
from gradflow.wording import label, rows_of_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WORST = 12
USUAL_UPDATE = 1e-3
"""Update over weight that usually trains well (a rule of thumb; Karpathy's 2015 course notes, CS231n)."""


def plot_units(run: Tables, ax: Axes) -> Axes:
    """The layers with the most dead or saturated units at the last sampled step.

    Read it: the worst layers of the last step. Dead units are zero on every position, so nothing behind them learns;
    saturated ones pass hardly any gradient.
    """
    view = View.of(run)
    kinds = {"dead_fraction": "dead units", "saturated_fraction": "saturated elements"}
    grids = {column: view.grid("layers", column) for column in kinds}
    last = {column: grid.row(grid.recorded_steps()[-1]) for column, grid in grids.items() if not grid.empty}
    if not last:
        return style.nothing(ax, "No activation function was recorded")
    labels = grids["dead_fraction"].labels
    worst = np.fmax.reduce(list(last.values()))
    order = [int(i) for i in np.argsort(-np.nan_to_num(worst, nan=-1.0), kind="stable") if worst[i] > 0][:WORST]
    if not order:
        return style.nothing(ax, "No dead unit and no saturated element at the last sampled step")
    last = {column: values for column, values in last.items() if np.nanmax(values, initial=0.0) > 0}
    common, _, names = rows_of_names([labels[i] for i in order], limit=WORST)
    style.dress(ax, x="part of the layer (%)", y=label(f"{common}. …" if common else "", 34))
    places, height = np.arange(len(order), dtype=np.float64), 0.8 / len(last)
    for row, (column, values) in enumerate(last.items()):
        color = style.VERMILLION if column == "dead_fraction" else style.PURPLE
        offset = (row - (len(last) - 1) / 2) * height
        ax.barh(places + offset, 100 * np.nan_to_num(values[order]), height=height, color=color, label=kinds[column])
    ax.set_yticks(places, [label(name, 28) for name in names], fontsize=8)
    ax.set_ylim(max(len(order), 6) - 0.4, -0.6)  # a single layer is a bar, not a wall
    ax.grid(visible=False, axis="y")
    ax.grid(visible=True, axis="x", color=style.RULE, linewidth=0.7)
    ax.set_xlim(0, max(5.0, 108 * float(np.nanmax(worst))))
    style.legend(ax)
    return ax


def plot_update_ratio(run: Tables, ax: Axes) -> Axes:
    """Length of the update over length of the weights, a dot for each weight matrix.

    Read it: around 10⁻³ training usually goes well. Far below it a matrix hardly moves, far above it forgets.
    """
    view = View.of(run)
    grid = view.grid("parameters", "update_ratio")
    shapes = {parameter.name: parameter.shape for parameter in view.parameters}
    keep = [i for i, name in enumerate(grid.labels) if len(shapes.get(name, (1, 1))) >= 2]
    grid = grid.select(keep or range(len(grid.names)))
    if grid.empty:
        return style.nothing(ax, "No updates were recorded")
    style.dress(ax, x="weight matrix, in the order of the model", y="update / weight")
    x = np.arange(1.0, len(grid.names) + 1)
    stages = style.stages(grid)
    rows = [grid.row(step) for step, _ in stages]
    for (step, look), row in zip(stages, rows, strict=True):
        ax.plot(x, row, linestyle="none", marker="o", markersize=3, color=look["color"], label=f"step {step:,}")
    ax.set_yscale("log")
    style.marks(
        ax, x, rows[-1] == 0, at=0.02, marker="v", color=style.VERMILLION, text=f"no update at step {stages[-1][0]:,}"
    )
    style.reference(ax, USUAL_UPDATE, "rule of thumb: 10⁻³")
    style.log_axis(ax.yaxis, np.concatenate([*rows, [USUAL_UPDATE]]))
    style.linear_axis(ax.xaxis, integer=True, most=8)
    style.legend(ax)
    return ax


def plot_path_lengths(run: Tables, ax: Axes) -> Axes:
    """How much of the gradient's energy crossed k branches on its way back (`theory.path_length_distribution`).

    From what each branch returns over what the skip returns, as if the two were independent.

    Read it: most of the gradient takes short paths (Veit 2016). All of it at 0 means that the branches hardly take
    part.
    """
    view = View.of(run)
    grid = view.grid("branches", "grad_branch_ratio")
    stages = style.stages(grid)
    if not stages:
        return style.nothing(ax, "No gradients of branches were recorded")
    style.dress(ax, x="branches on the way (k)", y="part of the gradient's energy (%)")
    longest = 1
    for step, look in stages:
        energy = grid.row(step) ** 2
        if not np.isfinite(energy).any():
            continue
        lengths = 100 * theory.path_length_distribution([float(b) for b in energy if np.isfinite(b)])
        longest = max(longest, int(np.searchsorted(np.cumsum(lengths), 99.9)) + 1)
        ax.plot(np.arange(len(lengths)), lengths, marker=".", markersize=4, label=f"step {step:,}", **look)
    ax.set_xlim(-0.3, min(longest, len(grid.names)) + 0.3)
    ax.set_ylim(bottom=0)
    style.linear_axis(ax.xaxis, integer=True, most=8)
    style.linear_axis(ax.yaxis)
    style.legend(ax)
    return ax
