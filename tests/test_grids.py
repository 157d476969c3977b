"""Grids: columns as matrices of step by name."""

import numpy as np
import pyarrow as pa
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.store import Run
from gradflow.store.grids import Grid, View, run_starts


def small_run(rows, order=("a", "b", "c")):
    """A run whose `branches` table has the given (step, branch, branch_sq) rows and nothing else."""
    frame = runs.table("branches", len(rows), step=[r[0] for r in rows], branch=[r[1] for r in rows], n=1)
    at = frame.schema.get_field_index("branch_sq")
    frame = frame.set_column(at, "branch_sq", pa.array([r[2] for r in rows], pa.float64()))
    branches = [{"name": name, "join": name, "module": "", "kind": "identity", "occurrence": 0, "depth": i + 1, "placement": "none", "stream": "s"} for i, name in enumerate(order)]
    return Run({"branches": branches}, {"branches": frame})


def test_each_value_stands_at_its_step_and_name_whatever_the_order_of_rows():
    grid = View(small_run([(5, "c", 9.0), (0, "b", 4.0), (5, "a", 1.0)])).grid("branches", "branch_sq")
    assert grid.steps.tolist() == [0, 5]
    assert grid.labels == ["a", "b", "c"]
    np.testing.assert_array_equal(grid.values, [[np.nan, 4.0, np.nan], [1.0, np.nan, 9.0]])


def test_null_is_absent_and_a_measured_nan_is_broken():
    grid = View(small_run([(0, "a", None), (0, "b", float("nan")), (0, "c", float("inf"))])).grid("branches", "branch_sq")
    assert np.isnan(grid.values).all()
    assert grid.broken.tolist() == [[False, True, True]]
    assert grid.recorded_steps() == [0]


def test_a_column_that_does_not_exist_gives_an_empty_grid():
    view = View(small_run([(0, "a", 1.0)]))
    assert not view.has("branches", "gain")
    assert view.grid("branches", "gain").empty
    assert view.grid("layers", "out_rms").empty


def test_points_of_several_streams_keep_their_stream():
    run = runs.prenorm(blocks=2, last=4)
    grid = View(run).grid("streams", "out_rms")
    assert grid.names[0] == ("blocks", "embed")
    table = run.table("streams").to_pylist()
    expected = {(row["step"], row["stream"], row["point"]): row["out_rms"] for row in table}
    for i, step in enumerate(grid.steps):
        for j, (stream, point) in enumerate(grid.names):
            assert grid.values[i, j] == expected[int(step), stream, point]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_thinning_keeps_the_mean_of_each_run_and_never_exceeds_the_limit(steps, names, most_steps, most_names, seed):
    random = np.random.default_rng(seed)
    values = np.where(random.random((steps, names)) < 0.2, np.nan, random.normal(size=(steps, names)))
    grid = Grid(np.arange(steps), tuple((str(i),) for i in range(names)), values, np.zeros((steps, names), bool))
    thin, broken = grid.thinned(most_steps, names)
    assert thin.shape == broken.shape == (min(steps, most_steps), names)
    starts = [*run_starts(steps, most_steps), steps]
    for i, (start, stop) in enumerate(zip(starts, starts[1:])):
        for j in range(names):
            known = [v for v in values[start:stop, j] if not np.isnan(v)]
            assert np.isnan(thin[i, j]) if not known else thin[i, j] == pytest.approx(np.mean(known))
    assert grid.thinned(most_steps, most_names)[0].shape == (min(steps, most_steps), min(names, most_names))


def test_a_broken_value_stays_visible_after_thinning():
    broken = np.zeros((1000, 3), bool)
    broken[501, 1] = True
    grid = Grid(np.arange(1000), (("a",), ("b",), ("c",)), np.ones((1000, 3)), broken)
    assert grid.thinned(50, 3)[1].sum() == 1


def test_a_view_of_a_view_is_itself_and_reads_each_column_once(monkeypatch):
    run = runs.prenorm(blocks=1, last=2)
    view = View(run)
    asked = []
    real = run.columns
    monkeypatch.setattr(run, "columns", lambda name, wanted, **since: asked.append((name, *wanted)) or real(name, wanted, **since))
    for column in ("gain", "cosine", "gain", "cosine"):
        View.of(view).grid("branches", column)
    assert asked == [("branches", "gain"), ("branches", "step", "branch"), ("branches", "cosine")]
