"""Pictures of how signal and gradient at initialisation scale with depth or width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from gradflow.plotting import style

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from gradflow.plotting.depth_series import Scaling

TITLES = {
    "signal": "signal: E x² at the end over the start",
    "gradient": "gradient: E g² at the start over the end",
}


def plot_scaling(rows: Sequence[Scaling], ax: Axes, *, quantity: Literal["signal", "gradient"], by: str) -> Axes:
    """A ratio over size, theory beside it, both axes logarithmic.

    A straight flat line trains at any depth; a straight rising one grows as a power; a curve that bends upwards grows
    exponentially and will not train when it is deep.
    """
    sizes = np.array([row.size for row in rows], dtype=float)
    for name, look in (
        (quantity, {"color": style.BLUE, "marker": "o", "label": "measured"}),
        (f"expected_{quantity}", {"color": style.THEORY, "linestyle": style.REFERENCE, "label": "theory"}),
    ):
        values = np.array([getattr(row, name) for row in rows], dtype=float)
        shown = np.isfinite(values) & (values > 0)
        if shown.any():
            ax.plot(sizes[shown], values[shown], **look)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
    ax.set_xlabel(by)
    ax.set_title(TITLES[quantity], fontsize=9)
    ax.grid(visible=True, color=style.RULE)
    if ax.get_lines():
        ax.legend(frameon=False)
    return ax


def write_scaling(rows: Sequence[Scaling], path: Path, *, by: str) -> None:
    """Write signal and gradient side by side into one file; its suffix says the format."""
    settings = {**style.SETTINGS, "figure.facecolor": "white", "savefig.facecolor": "white"}
    with matplotlib.style.context(["default", settings]):
        figure = Figure(figsize=(2 * style.SIZE[0], style.SIZE[1]), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_scaling(rows, left, quantity="signal", by=by)
        plot_scaling(rows, right, quantity="gradient", by=by)
        figure.savefig(path)
