"""The gallery: every picture of a run, with its title and how to read it, drawn into figures, pages and files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradflow.errors import UsageError
from gradflow.plotting import comparison, depth, heat, layers, style, timeline, tokens
from gradflow.plotting.svg import new_figure, quiet, to_svg
from gradflow.store.grids import View
from gradflow.store.readings import pieces
from gradflow.wording import label, number, printable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from gradflow.records import Finding
    from gradflow.store.grids import Tables


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the gallery.

    Attributes:
        key: Short name, unique in the gallery; file name of an export.
        section: Heading that it stands under.
        title: What it shows.
        plot: The function that draws it; its docstring says how to read it.
        needs: Table and columns, as in `"layers dead_fraction saturated_fraction"`; one of them must hold something.
        marks: Whether it takes `findings` and marks them.
    """

    key: str
    section: str
    title: str
    plot: Callable[..., Axes]
    needs: str
    marks: bool = False

    @property
    def reading(self) -> str:
        """How to read it: what the docstring of its function says from "Read it" on (nothing under `python -OO`)."""
        function = self.plot.func if isinstance(self.plot, partial) else self.plot
        reading = " ".join((function.__doc__ or "").split()).partition("Read it")[2]
        if not reading.startswith(":"):
            return f"Read it{reading}" if reading else ""
        reading = reading.removeprefix(":").strip()
        return reading[:1].upper() + reading[1:]

    def paint(self, run: Tables | Mapping[str, Tables], ax: Axes, findings: Sequence[Finding] = ()) -> None:
        """Draw it into axes, with the findings where it marks them."""
        self.plot(run, ax, **({"findings": findings} if self.marks else {}))

    def available(self, run: Tables) -> bool:
        """Whether the run holds what the picture shows."""
        table, *columns = self.needs.split()
        return any(View.of(run).has(table, column) for column in columns)


SIGNAL, GRADIENT, BOTH = "Signal over depth", "Gradient over depth", "Signal and gradient over depth"
TRAINING, MAPS = "Training", "Depth by step"
TOKENS, LAYERS, ATTENTION, COMPARED = "Tokens", "Layers and parameters", "Attention", "Over relative depth"
SECTIONS = (BOTH, SIGNAL, GRADIENT, TRAINING, MAPS, TOKENS, LAYERS, ATTENTION, COMPARED)

LEAST_BRANCHES = 3  # of a piece whose ledger is worth stacking
LEDGERS = {
    "signal_share": (timeline.plot_signal_ledger, depth.plot_signal_share, "Branch in its sum"),
    "gradient_share": (timeline.plot_gradient_ledger, depth.plot_gradient_share, "Gradient through each branch"),
}

PICTURES: tuple[Picture, ...] = (
    Picture("signal-depth", SIGNAL, "Size of the stream", depth.plot_signal_depth, "streams out_rms", marks=True),
    Picture("branch-depth", SIGNAL, "Size of each branch",
            depth.plot_branch_depth, "branches branch_rms", marks=True),
    Picture("ratio-depth", SIGNAL, "Branch over skip",
            depth.plot_ratio_depth, "branches branch_ratio", marks=True),
    Picture("gradient-depth", GRADIENT, "Size of the gradient",
            depth.plot_gradient_depth, "streams grad_rms", marks=True),
    Picture("gain-depth", GRADIENT, "Gain of each join", depth.plot_gain_depth, "branches gain", marks=True),
    Picture("path-lengths", GRADIENT, "How deep the gradient goes",
            layers.plot_path_lengths, "branches grad_branch_ratio"),
    Picture("loss", TRAINING, "Loss", timeline.plot_loss, "steps loss", marks=True),
    Picture("grad-norm", TRAINING, "Gradient norm", timeline.plot_grad_norm, "steps grad_norm", marks=True),
    Picture("ratio-map", MAPS, "Branch over skip", heat.plot_ratio_map, "branches branch_ratio"),
    Picture("gradient-map", MAPS, "Gradient at each point", heat.plot_gradient_map, "streams grad_rms"),
    Picture("cosine-map", MAPS, "Angle of branch and skip", heat.plot_cosine_map, "branches cosine"),
    Picture("gain-map", MAPS, "Gain of the gradient", heat.plot_gain_map, "branches gain"),
    Picture("signal-map", MAPS, "Size of the stream", heat.plot_signal_map, "streams out_rms"),
    Picture("update-map", MAPS, "Update over weight", heat.plot_update_map, "parameters update_ratio"),
    Picture("token-cosine", TOKENS, "Likeness of tokens",
            tokens.plot_token_cosine, "streams token_cosine", marks=True),
    Picture("effective-rank", TOKENS, "Effective rank",
            tokens.plot_effective_rank, "streams effective_rank", marks=True),
    Picture("outliers", TOKENS, "Largest element", tokens.plot_outliers, "streams max_over_median", marks=True),
    Picture("units", LAYERS, "Dead and saturated units",
            layers.plot_units, "layers dead_fraction saturated_fraction"),
    Picture("update-ratio", LAYERS, "Update over weight", layers.plot_update_ratio, "parameters update_ratio"),
    Picture("attention-entropy", ATTENTION, "Entropy of attention",
            tokens.plot_attention_entropy, "attention entropy", marks=True),
    Picture("attention-logits", ATTENTION, "Largest logit",
            tokens.plot_attention_logits, "attention logit_max", marks=True),
)  # fmt: skip
"""Every picture of one run, in the order of the report; the ledgers (`ledgers`) come beside them, one a stream."""
BY_KEY = {picture.key: picture for picture in PICTURES}

COMPARISONS: tuple[Picture, ...] = (
    Picture("compare-loss", TRAINING, "Loss", comparison.plot_compare_loss, "steps loss"),
    Picture("compare-grad-norm", TRAINING, "Gradient norm", comparison.plot_compare_grad_norm, "steps grad_norm"),
    Picture("compare-gradient", COMPARED, "Size of the gradient",
            comparison.plot_compare_gradient, "streams grad_rms"),
    Picture("compare-tokens", COMPARED, "Likeness of tokens", comparison.plot_compare_tokens, "streams token_cosine"),
    Picture("compare-signal", COMPARED, "Size of the stream", comparison.plot_compare_signal, "streams out_rms"),
    Picture("compare-ratio", COMPARED, "Branch over skip", comparison.plot_compare_ratio, "branches branch_ratio"),
)  # fmt: skip
"""Pictures of several runs; their `plot` takes a mapping from name to run."""


def silent(_part: float, _what: str) -> None:
    """The progress that nobody looks at."""


def ledgers(run: Tables, most: int = 3) -> list[Picture]:
    """The forward and the backward ledger of the longest pieces of streams, those of the most branches first.

    Where a norm after each join leaves pieces of one or two branches only, the shares stand over depth instead.
    """
    view, result = View.of(run), []
    for column, key, section, title in (
        ("signal_share", "signal-ledger", SIGNAL, "Who wrote the output"),
        ("gradient_share", "gradient-ledger", GRADIENT, "Which way the gradient came"),
    ):
        stacked, over_depth, title_over_depth = LEDGERS[column]
        found, needs = pieces(view, column), f"branches {column}"
        long = [piece for piece in found if len(piece.branches) >= LEAST_BRANCHES][:most]
        for place, piece in enumerate(long):
            own = (f"{key}-{place}", f"{title} ({piece.name})") if len(found) > 1 else (key, title)
            result.append(Picture(own[0], section, own[1], partial(stacked, piece=piece), needs))
        if found and not long:
            result.append(Picture(key, section, title_over_depth, over_depth, needs, marks=True))
    return result


def draw(
    picture: Picture, run: Tables | Mapping[str, Tables], *, findings: Sequence[Finding] = (), title: bool = False
) -> Figure:
    """The picture as a figure of its own."""

    def into(ax: Axes) -> None:
        picture.paint(run, ax, findings)
        if title:
            ax.figure.suptitle(label(f"{picture.section}: {picture.title}", 80), fontsize=10, color=style.INK)

    return new_figure(into)


def picture_svg(picture: Picture, run: Tables | Mapping[str, Tables], *, findings: Sequence[Finding] = ()) -> str:
    """The picture as an `<svg>` element for a page, with a text alternative."""
    figure = draw(picture, run, findings=findings)
    return to_svg(figure, key=picture.key, title=printable(picture.title), description=describe(figure))


def describe(figure: Figure) -> str:
    """What a figure shows, in words with numbers, for those who do not see it."""
    ax = figure.axes[0]
    lines = [
        _describe_line(line.get_label(), line.get_ydata())
        for line in ax.lines
        if not str(line.get_label()).startswith("_")
    ]
    unit = ax.get_ylabel() if not ax.images else figure.axes[-1].get_ylabel()
    kind = "Heat map" if ax.images else ("Bars" if ax.patches else "Chart")
    if ax.images and len(figure.axes) > 1:
        low, high = figure.axes[-1].get_ylim()
        lines = [f"colours from {number(low)} to {number(high)}", *lines]
    return f"{kind} of {unit} against {ax.get_xlabel()}. " + "; ".join(filter(None, lines))


def _describe_line(label: object, data: object) -> str:
    values = np.asarray(data, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return ""
    first, last, low, high = (number(float(v)) for v in (values[0], values[-1], values.min(), values.max()))
    return f"{label}: {first} at the left, {last} at the right, between {low} and {high}"


def export(
    run: Tables,
    directory: str | os.PathLike[str],
    *,
    format: Literal["pdf", "png", "svg"] = "pdf",  # noqa: A002
    findings: Sequence[Finding] = (),
    progress: Callable[[float, str], object] = silent,
) -> list[Path]:
    """Write every picture that the run has data for as a file of its own into `directory`; return their paths.

    `progress` is told what part is done and what comes next.

    Raises:
        UsageError: `format` is none of pdf, png, svg.
    """
    if format not in {"pdf", "png", "svg"}:
        raise UsageError(f"expected a format of pdf, png or svg, got {format!r}")
    view, folder, written = View.of(run), Path(directory), []
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (*PICTURES, *ledgers(view))
    for place, picture in enumerate(pictures):
        progress(place / len(pictures), picture.title)
        if picture.available(view):
            path = folder / f"{picture.key}.{format}"
            _save(draw(picture, view, findings=findings, title=True), path, format)
            written.append(path)
    return written


def pixels(figure: Figure, dpi: int = 100) -> NDArray[np.uint8]:
    """The figure as an image of shape (height, width, RGB), for experiment loggers."""
    canvas: Any = FigureCanvasAgg(figure)  # parts of matplotlib come without types
    figure.set_dpi(dpi)
    with matplotlib.style.context(["default", style.SETTINGS]), quiet():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()


def _save(figure: Figure, path: Path, format: str) -> None:  # noqa: A002
    with matplotlib.style.context(["default", style.SETTINGS]), quiet():
        figure.savefig(
            path, format=format, dpi=200, facecolor="white", metadata={"Date": None} if format == "svg" else None
        )


def overview(run: Tables, *, findings: Sequence[Finding] = ()) -> Figure:
    """The six pictures that say most, in one figure: for a notebook (`run.plot()`) and for experiment loggers."""
    view = View.of(run)
    order = (
        "signal-depth",
        "ratio-depth",
        "gradient-depth",
        "loss",
        "gradient-map",
        "ratio-map",
        "token-cosine",
        "update-ratio",
        "grad-norm",
    )
    shown = [BY_KEY[key] for key in order if BY_KEY[key].available(view)][:6]
    with matplotlib.style.context(["default", style.SETTINGS]), quiet():
        figure = Figure(figsize=(12.6, 6.6), layout="constrained")
        for place, picture in enumerate(shown, 1):
            ax = figure.add_subplot(2, 3, place)
            picture.paint(view, ax, findings if picture.key != "loss" else ())
        if not shown:
            style.nothing(figure.add_subplot(), "Nothing was recorded")
    figure.set_facecolor("white")
    return figure
