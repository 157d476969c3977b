import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow.schema import TABLES
from gradflow.store import Run
from gradflow.store.merging import arrange
from gradflow.store.parts import conform

NUMBER = st.none() | st.sampled_from([0.0, 1.0, -2.0, 0.5, math.nan, math.inf])
ROW = st.fixed_dictionaries(
    {
        "step": st.integers(-2, 3),
        "rank": st.integers(0, 2),
        "stream": st.sampled_from(["s", "t"]),
        "point": st.sampled_from(["a", "b", "c"]),
        "depth": st.none() | st.integers(0, 5),
        "n": st.none() | st.integers(0, 5),
        "out_sq": NUMBER,
        "grad_sq": NUMBER,
        "token_cosine": NUMBER,
        "max_over_median": NUMBER,
    }
)
ORDER = [("t", "b"), ("t", "a"), ("s", "c")]


def stream_table(rows):
    schema = {"step": pa.int64(), "rank": pa.int64(), "stream": pa.string(), "point": pa.string(),
              "depth": pa.int64(), "n": pa.int64()}  # fmt: skip
    columns = list(rows[0]) if rows else list(schema)
    table = pa.table({name: pa.array([r[name] for r in rows], schema.get(name, pa.float64())) for name in columns})
    return conform("streams", table)[0]


def by_hand(rows, world_size):
    """The same merge as plain loops over rows."""
    latest = {(r["step"], r["stream"], r["point"], r["rank"]): r for r in rows}
    appearance = list(dict.fromkeys([*ORDER, *((r["stream"], r["point"]) for r in rows)]))
    groups = {}
    for (step, stream, point, _), row in sorted(latest.items(), key=lambda item: item[0][3]):
        groups.setdefault((step, appearance.index((stream, point))), []).append(row)

    def reduce(name, how):
        def of(group):
            values = [r[name] for r in group if r[name] is not None]
            return how(values) if values else None

        return of

    def largest(values):
        return math.nan if any(math.isnan(v) for v in values) else max(values)

    reducers = {
        "depth": reduce("depth", lambda v: v[0]),
        "n": reduce("n", sum),
        "out_sq": reduce("out_sq", sum),
        "grad_sq": reduce("grad_sq", lambda v: sum(v) / world_size**2),
        "token_cosine": reduce("token_cosine", lambda v: sum(v) / len(v)),
        "max_over_median": reduce("max_over_median", largest),
    }
    return [
        {"step": step, "rank": 0, "stream": appearance[at][0], "point": appearance[at][1],
         **{name: of(groups[step, at]) for name, of in reducers.items()}}
        for step, at in sorted(groups)
    ]  # fmt: skip


def same(left, right):
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return left == right or (left is not None and right is not None and left == pytest.approx(right))


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, max_size=25), st.sampled_from([1, 3]))
def test_merging_is_what_loops_over_rows_give(rows, world_size):
    expected = by_hand(rows, world_size)
    got = arrange("streams", stream_table(rows), ORDER, world_size=world_size).to_pylist()
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert all(same(one[name], other[name]) for name in other), (one, other)


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, max_size=25))
def test_rows_per_rank_are_the_latest_of_each_rank_untouched(rows):
    got = arrange("streams", stream_table(rows), ORDER, world_size=3, per_rank=True).to_pylist()
    latest = {(r["step"], r["stream"], r["point"], r["rank"]): r for r in rows}
    assert len(got) == len(latest)
    for row in got:
        original = latest[row["step"], row["stream"], row["point"], row["rank"]]
        assert all(same(row[name], original[name]) for name in original)
    assert [row["step"] for row in got] == sorted(row["step"] for row in got)


def branch_rows(**columns):
    return conform("branches", pa.table(columns))[0]


def test_gradients_of_two_ranks_are_those_of_the_mean_loss():
    # The loss of the whole is the mean of the ranks' losses: each element's gradient is half of what its rank measured.
    gradient = np.arange(1.0, 9.0)
    whole = np.sum((gradient / 2) ** 2)
    rows = branch_rows(
        step=[0, 0], rank=[0, 1], branch=["b", "b"],
        grad_out_sq=[np.sum(gradient[:4] ** 2), np.sum(gradient[4:] ** 2)],
    )  # fmt: skip
    merged = arrange("branches", rows, [("b",)], world_size=2)
    assert merged["grad_out_sq"].to_pylist() == [pytest.approx(whole)]


def test_a_rank_that_measured_alone_is_still_divided_by_the_world():
    rows = branch_rows(step=[0], rank=[0], branch=["b"], grad_out_sq=[4.0], skip_sq=[4.0])
    merged = arrange("branches", rows, [("b",)], world_size=2).to_pylist()[0]
    assert (merged["grad_out_sq"], merged["skip_sq"]) == (1.0, 4.0)


def test_rows_come_in_the_order_of_the_model_and_unknown_names_after_it():
    rows = branch_rows(step=[1, 1, 0, 0, 0], branch=["late", "b", "stray", "a", "b"])
    got = arrange("branches", rows, [("b",), ("a",)])
    assert list(zip(got["step"].to_pylist(), got["branch"].to_pylist(), strict=True)) == [
        (0, "b"), (0, "a"), (0, "stray"), (1, "b"), (1, "late"),
    ]  # fmt: skip


def test_absurd_steps_and_many_names_do_not_overflow_the_sort():
    big = 2**62
    rows = branch_rows(step=[big, -big, 0, big], rank=[0, 0, 0, 2**40], branch=["a", "b", "a", "b"])
    got = arrange("branches", rows, [("b",), ("a",)], per_rank=True)
    assert list(zip(got["step"].to_pylist(), got["branch"].to_pylist(), strict=True)) == [
        (-big, "b"), (0, "a"), (big, "b"), (big, "a"),
    ]  # fmt: skip


def test_the_kind_of_a_layer_is_that_of_the_lowest_rank():
    rows = conform("layers", pa.table({"step": [0, 0], "rank": [1, 0], "layer": ["l", "l"], "kind": ["B", "A"]}))[0]
    assert arrange("layers", rows, [], world_size=2)["kind"].to_pylist() == ["A"]


def test_smallest_entropy_over_ranks_is_the_smallest():
    rows = pa.table({"step": [0, 0], "rank": [0, 1], "layer": ["l", "l"], "entropy": [1.0, 3.0],
                     "entropy_min": [0.5, 0.25], "logit_max": [1.0, 9.0]})  # fmt: skip
    got = Run({"world_size": 2}, {"attention": rows}).table("attention").to_pylist()[0]
    assert (got["entropy"], got["entropy_min"], got["logit_max"], got["keys"]) == (2.0, 0.25, 9.0, None)


@pytest.mark.parametrize("table", TABLES)
def test_every_column_of_every_table_merges(table):
    filled = {c.name: ["x", "x"] if c.type == "string" else [1, 1] for c in TABLES[table]}
    filled["rank"] = [0, 1]
    merged = arrange(table, conform(table, pa.table(filled))[0], [], world_size=2).to_pylist()
    expected = {"sum": 2, "grad_sum": 0.5, "norm": 2**0.5, "max": 1, "min": 1, "mean": 1, "first": 1, "key": 1}
    assert len(merged) == 1
    for column in TABLES[table]:
        if column.name != "rank" and column.type != "string":
            assert merged[0][column.name] == pytest.approx(expected[column.merge]), column.name
