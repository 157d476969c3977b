"""Pictures over depth: what the signal, the gradient and the tokens look like from the input to the output.

Each takes an `Axes`, draws the first, the middle and the last sampled step into it and returns it. Branches are
numbered in order of execution, as in the report's list of branches.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradflow import theory
from gradflow.plotting import style
from gradflow.store.grids import Grid, Tables, View
from gradflow.wording import label

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from gradflow.records import Finding

    Floats = NDArray[np.float64]

LETTERS = 52  # of stream names that fit over a picture
MARKERS = ("o", "s", "^")


def roles_of(labels: Sequence[str]) -> list[str]:
    """What each branch is in its block (`attn`, `mlp`), where two or three kinds alternate; else all the same."""
    last = [label.rsplit(".", 1)[-1].rstrip("0123456789") for label in labels]
    count = Counter(last)
    if 2 <= len(count) <= 3 and min(count.values()) >= 3:
        return last
    return [""] * len(labels)


def draw_stages(view: View, ax: Axes, table: str, column: str, *, split: bool = False) -> Grid:
    """The column over depth as one line a stage (and role), and marks where a value is zero or not finite."""
    grid = view.grid(table, column)
    parts, stages = style.stretches(view, grid, table), style.stages(grid)
    roles = np.array(roles_of(grid.labels) if split else [""] * len(grid.names))
    for step, look in stages:
        values, last, text = grid.row(step), step == stages[-1][0], f"step {step:,}"
        for part in parts:
            for kind, role in enumerate(dict.fromkeys(roles)):
                keep = roles[part.index] == role
                x, y = part.x[keep], values[part.index][keep]
                marked = (
                    {"marker": MARKERS[kind], "markevery": max(1, len(x) // 10), "markersize": 4}
                    if role and last
                    else {}
                )
                dot = {"marker": ".", "markersize": 4} if (len(x) < 3 or np.isnan(y).any()) and not marked else {}
                ax.plot(x, y, label=text, **{**look, **marked, **dot})
                text = "_"
    _role_legend(ax, [role for role in dict.fromkeys(roles) if role])
    _breaks(ax, parts)
    if stages:
        _edge_marks(ax, grid, parts, stages[-1][0])
    return grid


def _role_legend(ax: Axes, roles: list[str]) -> None:
    for marker, role in zip(MARKERS, roles, strict=False):
        ax.plot([], [], marker, markersize=4, color=style.STAGES[2]["color"], label=label(role, 16))


def _breaks(ax: Axes, parts: list[style.Stretch]) -> None:
    """A rule between streams, and their names where there is room."""
    for before, part in pairwise(parts):
        ax.axvline((before.x[-1] + part.x[0]) / 2, color=style.RULE, linewidth=0.9, zorder=0)
    span = parts[-1].x[-1] - parts[0].x[0] if parts else 0.0
    for part in parts if len(parts) > 1 else []:
        room = int(LETTERS * (part.x[-1] - part.x[0]) / span) if span else 0
        if room >= 4:
            ax.text(
                float(part.x.mean()), 1.0, label(part.name, room), transform=ax.get_xaxis_transform(), gid="stream",
                ha="center", va="bottom", fontsize=7.5, color=style.MUTED, clip_on=False,
            )  # fmt: skip


def _edge_marks(ax: Axes, grid: Grid, parts: list[style.Stretch], step: int) -> None:
    index = np.concatenate([part.index for part in parts])
    x = np.concatenate([part.x for part in parts])
    values, broken = grid.row(step)[index], grid.broken[int(np.searchsorted(grid.steps, step))][index]
    style.marks(ax, x, broken, at=0.98, marker="X", color=style.BROKEN, text=f"not finite at step {step:,}")
    if ax.get_yscale() == "log":
        style.marks(ax, x, values == 0, at=0.02, marker="v", color=style.VERMILLION, text=f"exactly 0 at step {step:,}")


def mark_findings(view: View, ax: Axes, grid: Grid, table: str, findings: Iterable[Finding]) -> None:
    """Triangles on the depth axis under what a finding names."""
    join_of = {branch.name: branch.join for branch in view.branches}
    for severity in ("error", "warning"):
        named = {name for finding in findings if finding.severity == severity for name in finding.where}
        named |= {join_of[name] for name in named & join_of.keys()}
        flags = np.array([label in named for label in grid.labels], dtype=np.bool_)
        x = np.zeros(len(flags))
        for part in style.stretches(view, grid, table):
            x[part.index] = part.x
        style.marks(
            ax, x, flags, at=-0.012, marker="^", color=style.SEVERITY[severity], text=f"named by a finding ({severity})"
        )


def over_depth(
    run: Tables, ax: Axes, table: str, column: str, *, unit: str, scale: Literal["log", "linear"] = "log",
    split: bool = False, findings: Iterable[Finding] = (),
) -> tuple[View, Grid]:  # fmt: skip
    """Dress the axes and draw the column over depth; the figure's own additions follow, then `finish`."""
    view = View.of(run)
    style.dress(ax, x=depth_axis(view, table), y=unit)
    ax.set_yscale(scale)
    if not view.has(table, column):
        style.nothing(ax, f"No {unit} was recorded")
    grid = draw_stages(view, ax, table, column, split=split)
    mark_findings(view, ax, grid, table, findings)
    return view, grid


def depth_axis(view: View, table: str) -> str:
    """What the depth axis of a table counts."""
    if table == "branches":
        return "branch, in order of execution"
    if table == "streams":
        trunk = any(stream.kind == "trunk" for stream in view.streams)
        return "position along the trunk" if trunk else "joins passed (0: start of the stream)"
    return {"attention": "attention call", "parameters": "parameter"}.get(table, "layer") + ", in order of execution"


def finish(ax: Axes, grid: Grid, *, least_span: float = 4.0, also: Sequence[float] | Floats = ()) -> Axes:
    """Scale the axes to the drawn steps and `also`, and add the legend; an axes without data is left with its note."""
    if not ax.axison:
        return ax
    rows = [grid.row(step) for step, _ in style.stages(grid)]
    values = np.concatenate([*rows, np.asarray(also, dtype=np.float64)]) if rows else np.asarray(also, dtype=np.float64)
    if ax.get_yscale() == "log":
        style.log_axis(ax.yaxis, values, least_span=least_span)
    else:
        style.linear_axis(ax.yaxis)
    style.linear_axis(ax.xaxis, integer=True, most=8)
    style.legend(ax)
    return ax


def _placement(view: View, stream: str) -> str:
    found = Counter(branch.placement for branch in view.branches if branch.stream == stream)
    return found.most_common(1)[0][0] if found else "none"


def _theory(ax: Axes, x: Floats, y: Floats, text: str) -> None:
    ax.plot(x, y, color=style.THEORY, linestyle=style.REFERENCE, linewidth=1.3, label=text, zorder=1.5)


def plot_signal_depth(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """RMS of the stream (or trunk) at each of its points.

    Read it: a pre-norm stream grows slowly, like √depth. A straight climb on this logarithmic axis is exponential
    growth; a fall means that the signal dies.
    """
    _, grid = over_depth(run, ax, "streams", "out_rms", unit="RMS of the stream", findings=findings)
    return finish(ax, grid)


def plot_branch_depth(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """RMS of what each branch adds to the stream.

    Read it: even sizes are healthy; a branch near 0 adds nothing.
    """
    _, grid = over_depth(run, ax, "branches", "branch_rms", unit="RMS of the branch", split=True, findings=findings)
    return finish(ax, grid)


def plot_ratio_depth(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Branch over skip, with 1/√l, its value in a pre-norm stack of equal branches at initialisation.

    Read it: under 10⁻³ a branch is silent, above 1 it outweighs the stream. In a pre-norm stack of equal branches it
    starts as 1/√l.
    """
    view, grid = over_depth(
        run, ax, "branches", "branch_ratio", unit="branch RMS / skip RMS", split=True, findings=findings
    )
    drawn: list[float] = []
    for part in style.stretches(view, grid, "branches"):
        if _placement(view, part.name) == "pre-norm":
            depth = np.arange(1.0, len(part.x) + 1)
            curve = np.sqrt(theory.prenorm_branch_share(depth))
            _theory(ax, part.x, np.asarray(curve), "_" if drawn else "theory at init: 1/√l")
            drawn += [float(value) for value in np.asarray(curve)]
    return finish(ax, grid, also=drawn)


def plot_gradient_depth(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """RMS of the loss's gradient at each point of the stream (or trunk), with theory at initialisation.

    Theory is tied to the first step's last point: √((L+1)/(l+1)) for pre-norm, flat for post-norm.

    Read it from the right, where the gradient starts: a fall towards the left is a vanishing gradient, a climb an
    exploding one.
    """
    view, grid = over_depth(run, ax, "streams", "grad_rms", unit="RMS of the gradient ∂L/∂x", findings=findings)
    drawn: list[float] = []
    stages = style.stages(grid)
    for part in style.stretches(view, grid, "streams") if stages else []:
        placement, end = _placement(view, part.name), grid.row(stages[0][0])[part.index][-1]
        if placement == "none" or not end > 0:
            continue
        depth = np.arange(float(len(part.x)))
        growth = (
            np.sqrt(theory.prenorm_gradient_growth(depth, depth[-1]))
            if placement == "pre-norm"
            else np.ones_like(depth)
        )
        _theory(ax, part.x, end * growth, "_" if drawn else f"theory at init ({placement})")
        drawn += [float(value) for value in end * growth]
    return finish(ax, grid, also=drawn)


def plot_gain_depth(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Gain of each join: gradient norm at its fork over that at its output.

    Read it: 1 passes the gradient on as it is. Gains multiply: 0.9 at each of 50 joins leaves 0.5 % of the gradient.
    """
    _, grid = over_depth(run, ax, "branches", "gain", unit="gain of the gradient", split=True, findings=findings)
    if ax.axison:
        style.reference(ax, 1.0)
    return finish(ax, grid, also=[1.0], least_span=3.0)


def plot_signal_share(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Share of each branch in the end of its piece of the stream, where pieces are short (a norm after each join).

    Read it: of the sum right behind the branch, this part came from the branch, the rest from the skip. Near 0 it adds
    nothing; above a half it outweighs the stream.
    """
    return _shares(run, ax, "signal_share", "share of the sum", findings)


def plot_gradient_share(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Share of the gradient at the start of its piece of the stream that came back through each branch.

    Read it: this part of the gradient came back through the branch, the rest along the skip, untouched. At 0 the branch
    passes nothing on.
    """
    return _shares(run, ax, "gradient_share", "share of the gradient", findings)


def _shares(run: Tables, ax: Axes, column: str, unit: str, findings: Iterable[Finding]) -> Axes:
    _, grid = over_depth(run, ax, "branches", column, unit=unit, scale="linear", split=True, findings=findings)
    return finish(ax, grid)
