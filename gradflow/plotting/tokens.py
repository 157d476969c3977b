"""Pictures of tokens and attention over depth: are rows alike, how many directions do they use, where do heads look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradflow.plotting import style
from gradflow.plotting.depth import depth_axis, finish, mark_findings, over_depth
from gradflow.store.grids import Grid, Tables, View

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

    from gradflow.records import Finding


def plot_token_cosine(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Mean cosine between positions of one sequence.

    Read it: at 1 all tokens are the same, and nothing can tell them apart.
    """
    _, grid = over_depth(
        run, ax, "streams", "token_cosine", unit="cosine between tokens", scale="linear", findings=findings
    )
    finish(ax, grid)
    ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.03)
    return ax


def plot_effective_rank(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Effective rank of the sampled rows.

    Read it: how many directions the rows really use. Near 1 they all lie along one.
    """
    _, grid = over_depth(run, ax, "streams", "effective_rank", unit="effective rank (directions)", findings=findings)
    return finish(ax, grid, least_span=10.0)


def plot_outliers(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Largest over median absolute value.

    Read it: about 5 is ordinary; over 1,000 a few elements carry the norm.
    """
    _, grid = over_depth(run, ax, "streams", "max_over_median", unit="largest / median |x|", findings=findings)
    return finish(ax, grid)


def plot_attention_entropy(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Entropy of attention over its largest value, ln(keys).

    Read it: 1 looks at all tokens alike, 0 at a single one.
    """
    view = View.of(run)
    if not view.has("attention", "entropy"):
        return style.nothing(ax, "No entropy of attention was recorded")
    style.dress(ax, x=depth_axis(view, "attention"), y="entropy / ln(keys)")
    entropy, keys = view.grid("attention", "entropy"), view.grid("attention", "keys")
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.where(keys.values > 1, entropy.values / np.log(keys.values), np.nan)
    grid = Grid(entropy.steps, entropy.names, part, entropy.broken)
    x = np.arange(1.0, len(grid.names) + 1)
    for step, look in style.stages(grid):
        ax.plot(x, grid.row(step), label=f"step {step:,}", marker=".", markersize=3.5, **look)
    mark_findings(view, ax, grid, "attention", findings)
    finish(ax, grid)
    ax.set_ylim(0.0, 1.05)
    return ax


def plot_attention_logits(run: Tables, ax: Axes, *, findings: Iterable[Finding] = ()) -> Axes:
    """Largest attention logit, in absolute value.

    Read it: tens are usual; growth into the hundreds comes before instability.
    """
    _, grid = over_depth(run, ax, "attention", "logit_max", unit="largest |logit|", findings=findings)
    return finish(ax, grid)
