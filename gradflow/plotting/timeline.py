"""Pictures over training steps: loss and gradient norm with the findings marked, and the ledgers of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.transforms import offset_copy

from gradflow.plotting import style
from gradflow.store.grids import Tables, View, run_starts
from gradflow.store.readings import ledger, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from gradflow.records import Finding
    from gradflow.store.readings import Piece

    Floats = NDArray[np.float64]

MOST_MARKED = 6


def mark_findings(ax: Axes, findings: Sequence[Finding], first: float, last: float) -> None:
    """Numbered bars along the top: from the first to the last step at which each finding holds."""
    shown = [(i, f) for i, f in enumerate(findings, 1) if f.severity != "info"][:MOST_MARKED]
    for row, (at, finding) in enumerate(shown):
        # In points above the axes, not in parts of their height: the layout cannot settle what grows with the axes.
        place = offset_copy(ax.get_xaxis_transform(), ax.get_figure(root=True), y=6 + 9 * row, units="points")
        start, stop = (min(max(step, first), last) for step in finding.steps)
        ax.plot(
            (start, stop), (1, 1), color=style.SEVERITY[finding.severity], linewidth=3, solid_capstyle="butt",
            marker="|", markersize=7, markeredgewidth=3, transform=place, clip_on=False,
        )  # fmt: skip
        ax.annotate(
            str(at), (start, 1), xycoords=place, xytext=(-5, 0), textcoords="offset points", ha="right", va="center",
            fontsize=8, color=style.INK, annotation_clip=False,
        )  # fmt: skip


def _over_steps(run: Tables, ax: Axes, column: str, *, unit: str, log: bool, findings: Sequence[Finding]) -> Axes:
    view = View.of(run)
    steps, values = view.series(column)
    if not len(steps) or np.isnan(values).all():
        return style.nothing(ax, f"No {unit} was recorded")
    style.dress(ax, x="optimizer step", y=unit)
    style.draw_series(ax, steps, values)
    broken = ~np.isfinite(values) & view.columns("steps", [column])[column].is_valid().to_numpy()
    style.marks(ax, steps.astype(np.float64), broken, at=0.97, marker="X", color=style.BROKEN, text="not finite")
    if log and np.nanmin(values) > 0:
        style.log_axis(ax.yaxis, values)
    else:
        style.linear_axis(ax.yaxis)
    style.linear_axis(ax.xaxis, integer=True)
    mark_findings(ax, findings, float(steps[0]), float(steps[-1]))
    if broken.any() and not findings:
        style.legend(ax)
    return ax


def plot_loss(run: Tables, ax: Axes, *, findings: Sequence[Finding] = ()) -> Axes:
    """Loss over steps, with the findings' spans above it, numbered as in the report.

    Read it: the numbered bars above run from the first to the last step at which each finding holds. Did the trouble
    hurt?
    """
    return _over_steps(run, ax, "loss", unit="loss", log=False, findings=findings)


def plot_grad_norm(run: Tables, ax: Axes, *, findings: Sequence[Finding] = ()) -> Axes:
    """Global L2 norm of all parameter gradients.

    Read it: taken before clipping. Level is healthy; spikes and climbs are not.
    """
    return _over_steps(run, ax, "grad_norm", unit="gradient norm (L2)", log=True, findings=findings)


def plot_learning_rate(run: Tables, ax: Axes, *, findings: Sequence[Finding] = ()) -> Axes:
    """Learning rate of the first parameter group.

    Read it: beside the loss, to see warm-up and decay.
    """
    return _over_steps(run, ax, "learning_rate", unit="learning rate", log=False, findings=findings)


def _plot_ledger(run: Tables, ax: Axes, column: str, piece: Piece | None, own_name: str, unit: str) -> Axes:
    view = View.of(run)
    piece = piece or next(iter(pieces(view, column)), None)
    if piece is None:
        return style.nothing(ax, f"No ledger ({column}) was recorded")
    own, grid = ledger(view, column, piece)
    seen = np.isfinite(grid.values).any(axis=1)
    steps, own, values = grid.steps[seen].astype(np.float64), np.nan_to_num(own[seen]), np.nan_to_num(grid.values[seen])
    style.dress(ax, x="optimizer step", y=unit)
    if len(steps) == 1:
        steps, own, values = steps + np.array([-0.5, 0.5]), np.repeat(own, 2), np.repeat(values, 2, axis=0)
    starts = run_starts(values.shape[1], 6)
    entries = [(own_name, own, style.RULE)]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], values.shape[1]], strict=True)):
        name = f"branch {start + 1}" if stop - start == 1 else f"branches {start + 1} to {stop}"
        shade = mpl.colors.to_hex(mpl.colormaps[style.SEQUENTIAL](0.12 + 0.82 * number / max(1, len(starts) - 1)))
        entries.append((name, values[:, start:stop].sum(axis=1), shade))
    _stack(ax, steps, entries)
    ax.axhline(1.0, color=style.INK, linewidth=0.8)
    ax.set_xlim(steps[0], steps[-1])
    style.linear_axis(ax.xaxis, integer=True)
    style.linear_axis(ax.yaxis)
    style.legend(ax)
    return ax


def _stack(ax: Axes, steps: Floats, entries: Sequence[tuple[str, Floats, str]]) -> None:
    """Positive shares pile up from 0, negative ones (a branch that erases) hang down from it."""
    if len(steps) > style.MOST_POINTS:
        starts = run_starts(len(steps), style.MOST_POINTS)
        count = np.diff(np.append(starts, len(steps)))
        entries = [(name, np.add.reduceat(share, starts) / count, color) for name, share, color in entries]
        steps = steps[starts]
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    for name, share, color in entries:
        up, down = np.maximum(share, 0), np.minimum(share, 0)
        ax.fill_between(steps, above, above + up, color=color, linewidth=0, label=name)
        if (down < 0).any():
            ax.fill_between(steps, below, below + down, color=color, linewidth=0, alpha=0.75)
        above, below = above + up, below + down
    ax.set_ylim(min(0.0, 1.05 * float(below.min())), max(1.02, 1.05 * float(above.max())))


def plot_signal_ledger(run: Tables, ax: Axes, *, piece: Piece | None = None) -> Axes:
    """Shares of x_0 and of the branches in the stream's end, by step (the forward ledger of a piece).

    Read it: the shares sum to 1. A wide grey band means that the output is still mostly the input; what hangs below 0
    erases.
    """
    return _plot_ledger(run, ax, "signal_share", piece, "x₀, the stream's start", "share of the stream's end")


def plot_gradient_ledger(run: Tables, ax: Axes, *, piece: Piece | None = None) -> Axes:
    """Shares of the pure skip path and of the branches in the gradient at the stream's start, by step.

    Read it: the shares sum to 1. The grey band came back through additions alone, untouched by any branch.
    """
    return _plot_ledger(run, ax, "gradient_share", piece, "pure skip path", "share of the gradient at the start")
