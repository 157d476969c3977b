"""Pictures: what is drawn is what was recorded, in any run, without touching anything else."""

import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pytest
import runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradflow import plotting, theory
from gradflow.errors import UsageError
from gradflow.plotting import comparison, gallery, heat, style
from gradflow.plotting.svg import _COLOUR, quiet
from gradflow.store import readings
from gradflow.store.grids import View

KINDS = {
    "pre-norm": lambda: runs.prenorm(blocks=4, last=200),
    "post-norm": lambda: runs.postnorm(blocks=4, last=200),
    "trunk": lambda: runs.trunk(blocks=4, last=200),
    "exploding": lambda: runs.exploding(blocks=4, last=200),
    "broken": lambda: runs.broken(blocks=4, last=200),
    "hostile": runs.hostile,
    "one step": lambda: runs.prenorm(blocks=4, steps=[0]),
    "two branches": lambda: runs.prenorm(blocks=1, last=50),
    "empty": runs.empty,
}


@pytest.fixture(scope="module")
def views():
    return {kind: View(make()) for kind, make in KINDS.items()}


def axes() -> Axes:
    return Figure().add_subplot()


def line(ax, text):
    """Data of the line with that legend entry."""
    found = [one for one in ax.lines if one.get_label() == text]
    assert len(found) == 1, [one.get_label() for one in ax.lines]
    return np.asarray(found[0].get_xdata(), float), np.asarray(found[0].get_ydata(), float)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("picture", gallery.PICTURES, ids=lambda picture: picture.key)
def test_a_picture_returns_its_axes_and_changes_nothing_else(picture, kind, views):
    run = views[kind]
    before = dict(mpl.rcParams)
    tables = {name: run.run.table(name) for name in ("branches", "streams", "steps")}
    ax = axes()
    with quiet():
        assert picture.plot(run, ax, **({"findings": runs.findings()} if picture.marks else {})) is ax
        ax.figure.draw_without_rendering()
    assert dict(mpl.rcParams) == before
    assert all(run.run.table(name).equals(tables[name]) or kind == "broken" for name in tables)
    if ax.axison:  # it has data: then its axes have names with units
        assert ax.get_xlabel()
        assert ax.get_ylabel() or ax.images
        assert ax.images or len(ax.lines) + len(ax.patches) > 0
    else:
        assert ax.texts[0].get_text().startswith("No ")
        assert not picture.available(run) or picture.key == "units"


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_that_is_available_draws_something(kind, views):
    run = views[kind]
    for picture in (*gallery.PICTURES, *gallery.ledgers(run)):
        if picture.available(run):
            ax = axes()
            picture.plot(run, ax)
            assert ax.axison or picture.key == "units", picture.key


def test_every_picture_says_how_to_read_it():
    for picture in (*gallery.PICTURES, *gallery.COMPARISONS, *gallery.ledgers(runs.prenorm(blocks=1, last=2))):
        assert len(picture.reading) > 20, picture.key
        assert picture.reading.endswith((".", "?")), picture.key
    keys = [picture.key for picture in (*gallery.PICTURES, *gallery.COMPARISONS)]
    assert len(keys) == len(set(keys))


def test_every_plot_function_is_public_and_in_the_gallery():
    drawn = {picture.plot.__name__ for picture in (*gallery.PICTURES, *gallery.COMPARISONS)}
    assert set(plotting.__all__) - drawn == {
        "plot_signal_ledger", "plot_gradient_ledger", "plot_signal_share", "plot_gradient_share", "plot_learning_rate",
    }  # fmt: skip
    assert all(callable(getattr(plotting, name)) for name in plotting.__all__)


def test_the_stream_is_drawn_as_recorded_first_middle_and_last():
    run = runs.prenorm(blocks=4, last=200)
    ax = plotting.plot_signal_depth(run, axes())
    rows = run.table("streams").to_pylist()
    for step in (0, 100, 200):
        x, y = line(ax, f"step {step}")
        assert y.tolist() == [row["out_rms"] for row in rows if row["step"] == step]
        assert x.tolist() == list(range(9))
    assert ax.get_yscale() == "log"


def test_branches_are_split_by_role_and_theory_stands_beside_them():
    run = runs.prenorm(blocks=8, last=200)
    ax = plotting.plot_ratio_depth(run, axes())
    rows = [row for row in run.table("branches").to_pylist() if row["step"] == 200]
    x, y = line(ax, "step 200")  # the first role carries the legend entry
    assert y.tolist() == [row["branch_ratio"] for row in rows if row["branch"].endswith("attn")]
    assert x.tolist() == list(range(1, 17, 2))
    assert {"attn", "mlp"} <= {one.get_label() for one in ax.lines}
    np.testing.assert_allclose(line(ax, "theory at init: 1/√l")[1], np.arange(1, 17) ** -0.5)
    assert not any("theory" in str(one.get_label()) for one in plotting.plot_ratio_depth(runs.postnorm(blocks=8, last=20), axes()).lines)


def test_the_theory_of_the_gradient_is_tied_to_the_first_steps_last_point():
    run = runs.prenorm(blocks=4, last=200)
    ax = plotting.plot_gradient_depth(run, axes())
    _, first = line(ax, "step 0")
    _, curve = line(ax, "theory at init (pre-norm)")
    np.testing.assert_allclose(curve, first[-1] * np.sqrt(theory.prenorm_gradient_growth(np.arange(9.0), 8.0)))
    _, flat = line(plotting.plot_gradient_depth(runs.postnorm(blocks=4, last=20), axes()), "theory at init (post-norm)")
    assert np.ptp(flat) == 0


def test_streams_lie_behind_one_another_and_are_never_joined_by_a_line():
    run = runs.prenorm(blocks=3, last=2)
    parts = [View(run)]
    grid = parts[0].grid("streams", "out_rms")
    names = tuple((("left", "right")[i >= 4], name[-1]) for i, name in enumerate(grid.names))
    two = type(grid)(grid.steps, names, grid.values, grid.broken)
    left, right = style.stretches(parts[0], two, "streams")
    assert left.x.tolist() == [0, 1, 2, 3]
    assert right.x.tolist() == [4, 5, 6]
    assert left.name == "left"


def test_what_a_log_axis_cannot_show_is_marked_at_its_edge():
    maker = runs.Maker(blocks=2, last=4)
    columns = maker.branch_columns()
    columns["branch_sq"][-1, 1] = 0.0
    columns["branch_sq"][-1, 2] = np.nan
    tables = maker.tables()
    tables["branches"] = maker.flat("branches", "branch", maker.parts, columns)
    values = tables["branches"]["branch_sq"].to_numpy().copy()
    values[-2] = np.inf  # measured, and infinite
    at = tables["branches"].schema.get_field_index("branch_sq")
    tables["branches"] = tables["branches"].set_column(at, "branch_sq", [values])
    ax = plotting.plot_branch_depth(runs.Run(maker.meta(), tables), axes())
    assert line(ax, "exactly 0 at step 4")[0].tolist() == [2.0]
    assert 3.0 in line(ax, "not finite at step 4")[0].tolist()


@pytest.mark.parametrize("value", [1e-9, 1.0, 3e5])
def test_a_log_axis_is_never_so_narrow_that_noise_looks_large(value):
    ax = axes()
    style.log_axis(ax.yaxis, [value, value * 1.01])
    low, high = ax.get_ylim()
    assert high / low >= 3.9
    assert len(ax.get_yticks()) >= 2


@pytest.mark.parametrize(("low", "high"), [(1e-300, 1e300), (0.9, 1.1), (1e-7, 3e-7), (1, 40), (2e-5, 7e3)])
def test_log_ticks_are_few_round_and_inside(low, high):
    ticks = style.log_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert len(ticks) <= 12
    assert (high / low < 2) or len(ticks) >= 2


def test_a_heat_map_shows_the_recorded_value_in_each_cell():
    run = runs.prenorm(blocks=3, last=8)
    ax = plotting.plot_ratio_map(run, axes())
    grid = View(run).grid("branches", "branch_ratio")
    look = heat.colours(grid.values, "log")
    expected = mpl.colormaps[look.map](look.norm(grid.values.T))
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()) / 255, expected, atol=1 / 254)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.attn", "2.mlp"]
    assert ax.yaxis_inverted()  # input at the top


def test_a_heat_map_of_a_huge_run_stays_small_and_its_labels_readable():
    run = runs.prenorm(blocks=300, steps=np.arange(900), last=900)
    ax = plotting.plot_cosine_map(run, axes())
    assert np.asarray(ax.images[0].get_array()).shape[:2] == (heat.MOST_NAMES, heat.MOST_STEPS)
    assert 5 <= len(ax.get_yticklabels()) <= 14
    assert [text.get_text() for text in ax.get_xticklabels()][0] == "0"


def test_broken_cells_have_a_colour_of_their_own():
    run = runs.broken(blocks=2, last=200)
    ax = plotting.plot_gain_map(run, axes())
    pixels = np.asarray(ax.images[0].get_array())
    own = (np.array(mpl.colors.to_rgba(style.BROKEN)) * 255).astype(np.uint8)
    late = np.array(run.steps) > 133
    assert (pixels[:, late] == own).all()
    assert not (pixels[:, ~late] == own).all(axis=-1).any()


@pytest.mark.parametrize(("plot", "column"), [(plotting.plot_signal_ledger, "signal_share"), (plotting.plot_gradient_ledger, "gradient_share")])
def test_the_ledger_piles_up_to_one(plot, column):
    run = runs.prenorm(blocks=4, last=200)
    ax = plot(run, axes())
    tops = [max(path.vertices[:, 1].max() for path in area.get_paths()) for area in ax.collections]
    assert max(tops) == pytest.approx(1.0)
    assert ax.get_legend_handles_labels()[1][0] == ("x₀, the stream's start" if column == "signal_share" else "pure skip path")
    own = [row[column] for row in run.table("streams").to_pylist() if row[column] is not None]
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(max(own))


def cut_into_pieces(*numbers):
    """A run of as many joins, whose stream is cut into pieces that each have a ledger which adds up to 1."""
    maker = runs.Maker(blocks=len(numbers) // 2, last=8)
    tables, meta = maker.tables(), maker.meta()
    meta["streams"][0]["segments"] = list(numbers)
    shares = {name: tables["branches"][name].to_numpy().copy().reshape(len(maker.steps), -1) for name in ("signal_share", "gradient_share")}
    own = {name: np.full((len(maker.steps), len(numbers) + 1), np.nan) for name in shares}
    for number in set(numbers):
        inside = [i for i, one in enumerate(numbers) if one == number]
        for name, values in shares.items():
            values[:, inside] *= 0.6 / values[:, inside].sum(axis=1, keepdims=True)
            own[name][:, inside[0] if name == "signal_share" else inside[-1] + 1] = 0.4
    for name, through in shares.items():
        for table, values in (("branches", through), ("streams", own[name])):
            flat = pa.array(values.reshape(-1), from_pandas=True)
            tables[table] = tables[table].set_column(tables[table].schema.get_field_index(name), name, flat)
    return runs.Run(meta, tables)


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 2, 3, 4, 5, 6, 7), (0, 0, 1, 2, 2, 2, 2, 3)])
def test_each_piece_of_a_stream_has_its_own_ledger(numbers):
    run = cut_into_pieces(*numbers)
    view = View(run)
    for column in ("signal_share", "gradient_share"):
        found = readings.pieces(view, column)
        assert sorted(len(piece.branches) for piece in found) == sorted(Counter(numbers).values())
        for piece in found:
            own, shares = readings.ledger(view, column, piece)
            np.testing.assert_allclose(own + shares.values.sum(axis=1), 1.0)
    assert readings.ledger_error(view) < 1e-12
    for picture in gallery.ledgers(view):
        if "ledger of a piece" in (picture.plot.func.__doc__ if hasattr(picture.plot, "func") else ""):
            ax = picture.plot(view, axes())
            assert max(path.vertices[:, 1].max() for area in ax.collections for path in area.get_paths()) == pytest.approx(1.0)


def test_shares_stand_over_depth_where_norms_leave_no_long_piece():
    run = cut_into_pieces(*range(8))
    pictures = gallery.ledgers(run)
    assert [picture.plot for picture in pictures] == [plotting.plot_signal_share, plotting.plot_gradient_share]
    _, y = line(plotting.plot_signal_share(run, axes()), "step 8")
    np.testing.assert_allclose(y, 0.6)
    assert [len(gallery.ledgers(cut_into_pieces(0, 0, 0, 1, 1, 1)))] == [4]


def test_a_share_below_zero_hangs_below_the_axis():
    maker = runs.Maker(blocks=1, last=8)
    tables = maker.tables()
    shares = tables["branches"]["signal_share"].to_numpy().copy()
    shares[0::2] -= 1.0
    shares[1::2] += 1.0
    at = tables["branches"].schema.get_field_index("signal_share")
    tables["branches"] = tables["branches"].set_column(at, "signal_share", [shares])
    ax = plotting.plot_signal_ledger(runs.Run(maker.meta(), tables), axes())
    assert ax.get_ylim()[0] < -0.5


def test_path_lengths_are_a_distribution():
    ax = plotting.plot_path_lengths(runs.prenorm(blocks=6, last=20), axes())
    assert all(np.sum(one.get_ydata()) == pytest.approx(100.0) for one in ax.lines)


def test_the_worst_layers_come_first_among_the_units():
    run = runs.prenorm(blocks=12, last=200)
    ax = plotting.plot_units(run, axes())
    widths = [bar.get_width() for bar in ax.patches]
    dead = [100 * row["dead_fraction"] for row in run.table("layers").to_pylist() if row["step"] == 200 and row["dead_fraction"] is not None]
    assert widths == pytest.approx(sorted(dead, reverse=True)[:12])


def test_layers_without_a_dead_unit_are_said_to_have_none():
    ax = plotting.plot_units(runs.prenorm(blocks=2, steps=[0]), axes())
    assert ax.texts[0].get_text() == "No dead unit and no saturated element at the last sampled step"


def test_only_matrices_stand_among_the_updates():
    ax = plotting.plot_update_ratio(runs.prenorm(blocks=3, last=16), axes())
    assert len(line(ax, "step 16")[0]) == 6


def test_findings_are_numbered_on_the_time_axis_and_marked_in_depth():
    run = runs.prenorm(blocks=2, last=1000)
    ax = plotting.plot_loss(run, axes(), findings=runs.findings())
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]  # the note (info) is left out
    ax = plotting.plot_signal_depth(run, axes(), findings=runs.findings())
    assert line(ax, "named by a finding (error)")[0].tolist() == [1.0, 4.0]  # blocks.0.attn and blocks.1.mlp


def test_a_long_loss_is_thinned_within_the_band_it_spans():
    steps = np.arange(5000)
    run = runs.prenorm(blocks=1, steps=steps)
    ax = plotting.plot_loss(run, axes())
    loss = run.table("steps")["loss"].to_numpy()
    assert len(ax.lines[0].get_xdata()) <= style.MOST_POINTS
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (loss.min(), loss.max())


def test_runs_of_any_depth_share_an_axis():
    pair = {"short": runs.prenorm(blocks=2, last=20), "long": runs.prenorm(blocks=30, last=20), "plain": runs.trunk(blocks=3, last=20)}
    ax = plotting.plot_compare_gradient(pair, axes())
    assert [one.get_label() for one in ax.lines] == list(pair)
    assert all((one.get_xdata()[0], one.get_xdata()[-1]) == (0.0, 1.0) for one in ax.lines)
    assert [one.get_label() for one in plotting.plot_compare_ratio(pair, axes()).lines] == ["short", "long"]


def test_many_runs_are_told_apart_by_colour_and_dashes():
    looks = [(line["color"], line["linestyle"]) for line in map(comparison.look, range(28))]
    assert len(set(looks)) == 28


def test_names_with_dollars_are_not_mathematics():
    ax = plotting.plot_compare_loss({"$\\frac{1$": runs.prenorm(blocks=1, last=8), "$x$ and $y$": runs.prenorm(blocks=1, last=8)}, axes())
    ax.figure.draw_without_rendering()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["\\$\\frac{1\\$", "\\$x\\$ and \\$y\\$"]


def svg_of(run, key="ratio-map"):
    picture = gallery.BY_KEY[key]
    return gallery.picture_svg(picture, run)


def test_a_picture_for_a_page_is_the_same_each_time():
    run = runs.prenorm(blocks=2, last=8)
    assert svg_of(run) == svg_of(run)


@pytest.mark.parametrize("kind", ["pre-norm", "hostile", "broken"])
def test_a_picture_for_a_page_is_plain_safe_svg(kind, views):
    texts = []
    for picture in gallery.PICTURES:
        root = ET.fromstring(gallery.picture_svg(picture, views[kind], findings=runs.findings()))
        assert root.tag == "svg"
        assert root.get("role") == "img"
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids))
        assert all(one.startswith(f"{picture.key}-") for one in ids)
        for element in root.iter():
            assert element.tag in {"svg", "g", "path", "text", "tspan", "use", "defs", "clipPath", "rect", "image", "title", "desc"}
            assert not any(name.lower().startswith("on") for name in element.attrib)
            reference = element.get("href", "#")
            assert reference.startswith(("#", "data:image/png;base64,"))
            if reference.startswith("#") and len(reference) > 1:
                assert reference[1:] in ids
        texts += ["".join(element.itertext()) for element in root.iter("text")]
    if kind == "hostile":
        assert any("<script>" in text for text in texts)
        assert any("\\u202e" in text for text in texts)


def test_the_colours_of_a_page_follow_its_theme():
    svg = svg_of(runs.prenorm(blocks=2, last=8), "signal-depth")
    assert "var(--ink,#1c2430)" in svg
    assert "var(--late,#08306b)" in svg
    fixed = set(_COLOUR.findall(svg)) - {light for light, _ in style.THEME.values()}
    assert fixed <= {"#000000", "#ffffff"}


def test_the_text_alternative_has_the_numbers():
    picture = gallery.PICTURES[0]
    run = runs.prenorm(blocks=2, last=8)
    text = gallery.describe(gallery.draw(picture, run))
    first = next(row["out_rms"] for row in run.table("streams").to_pylist())
    assert "RMS of the stream against joins passed" in text
    assert gallery.number(first) in text


def test_the_users_matplotlib_settings_do_not_reach_the_report():
    run = runs.prenorm(blocks=1, last=8)
    plain = svg_of(run, "loss")
    with mpl.rc_context({"text.usetex": True, "font.size": 40, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert svg_of(run, "loss") == plain
        assert mpl.rcParams["font.size"] == 40


def test_pictures_are_drawn_without_pyplot():
    code = "import sys, gradflow.plotting.gallery, gradflow.report; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("kind", "start"), [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_every_picture_can_be_exported(tmp_path, kind, start):
    run = runs.prenorm(blocks=2, last=8)
    written = gallery.export(run, tmp_path / "figures", format=kind)
    assert len(written) == len(set(written)) == len(gallery.PICTURES) + 2
    assert all(path.read_bytes().startswith(start) for path in written)


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="expected a format of pdf, png or svg, got 'gif'"):
        gallery.export(runs.prenorm(blocks=1, last=2), tmp_path / "figures", format="gif")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("kind", ["pre-norm", "trunk", "empty"])
def test_the_overview_shows_what_there_is(kind, views):
    figure = gallery.overview(views[kind], findings=runs.findings())
    with quiet():
        figure.draw_without_rendering()
    panels = [ax for ax in figure.axes if ax.get_xlabel()]
    assert len(panels) == (0 if kind == "empty" else 6)


def test_light_and_dark_colours_stand_out_from_their_page():
    for name, (light, dark) in style.THEME.items():
        least = {"ink": 7.0, "muted": 4.5, "grid": 1.1}.get(name, 2.9)
        assert contrast(light, "#ffffff") >= least, name
        assert contrast(dark, "#12161d") >= least, name


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, WCAG 2.2."""
    low, high = sorted(luminance(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))
