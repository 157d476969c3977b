import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.metrics import DERIVED, derive, quotient
from gradflow.schema import TABLES

COLUMNS = [(table, column) for table, columns in DERIVED.items() for column in columns]
IDS = [f"{table}.{column.name}" for table, column in COLUMNS]


def raw(table, **values):
    """One row of a table; what is not given is null."""
    types = {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string()}
    given = {c.name: pa.array([values.get(c.name)], types[c.type]) for c in TABLES[table]}
    return pa.table(given)


def value(table, column, **values):
    return derive(table, raw(table, **values))[column][0].as_py()


def test_branch_columns_are_those_of_the_vectors_themselves():
    rng = np.random.default_rng(0)
    a, f, gy, gf = rng.normal(size=(4, 5000)) * np.array([[3.0], [0.5], [1e-4], [2e-4]])
    y, gb = a + f, gf - gy
    row = {
        "n": a.size, "skip_sq": a @ a, "branch_sq": f @ f, "dot": a @ f, "out_sq": y @ y,
        "grad_out_sq": gy @ gy, "grad_fork_sq": gf @ gf, "grad_branch_sq": gb @ gb,
    }  # fmt: skip
    expected = {
        "skip_rms": np.sqrt(np.mean(a**2)),
        "branch_rms": np.sqrt(np.mean(f**2)),
        "out_rms": np.sqrt(np.mean(y**2)),
        "branch_ratio": np.linalg.norm(f) / np.linalg.norm(a),
        "cosine": np.sum(a / np.linalg.norm(a) * f / np.linalg.norm(f)),
        "grad_out_rms": np.sqrt(np.mean(gy**2)),
        "grad_fork_rms": np.sqrt(np.mean(gf**2)),
        "gain": np.linalg.norm(gf) / np.linalg.norm(gy),
        "grad_branch_ratio": np.linalg.norm(gf - gy) / np.linalg.norm(gy),
    }
    derived = derive("branches", raw("branches", **row)).to_pylist()[0]
    assert {name: derived[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert set(expected) == {column.name for column in DERIVED["branches"]}


def test_update_ratio_is_the_length_of_the_update_over_that_of_the_weights():
    before = np.linspace(-1, 1, 40)
    after = before * 0.99
    got = value("parameters", "update_ratio", weight_sq=before @ before, update_sq=np.sum((after - before) ** 2))
    assert got == pytest.approx(0.01)


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=IDS)
def test_formula_as_text_is_the_formula_as_code(table, column):
    rng = np.random.default_rng(1)
    row = {c.name: int(rng.integers(1, 100)) for c in TABLES[table] if c.type != "string"}
    expression = column.formula.replace("√", "sqrt").replace("·", "*")
    assert value(table, column.name, **row) == pytest.approx(eval(expression, {"sqrt": math.sqrt}, row))


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=IDS)
def test_nothing_is_made_up_where_everything_is_zero_or_null(table, column):
    zeros = {c.name: 0 for c in TABLES[table] if c.type != "string"}
    assert value(table, column.name, **zeros) is None
    assert value(table, column.name) is None


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=IDS)
def test_what_was_measured_as_nan_stays_nan(table, column):
    nans = {c.name: float("nan") for c in TABLES[table] if c.type == "float64"}
    counts = {c.name: 7 for c in TABLES[table] if c.type == "int64"}
    got = value(table, column.name, **nans, **counts)
    inputs = {c.name for c in TABLES[table] if c.type == "float64" and c.name in column.formula}
    assert math.isnan(got) if inputs else got == 1.0


def test_infinite_sums_stay_infinite():
    assert value("branches", "skip_rms", skip_sq=math.inf, n=4) == math.inf
    assert value("branches", "branch_ratio", skip_sq=1.0, branch_sq=math.inf) == math.inf


def test_ratios_hold_where_sums_are_near_the_ends_of_float64():
    assert value("branches", "gain", grad_fork_sq=1e300, grad_out_sq=1e-300) == pytest.approx(1e300)
    assert value("branches", "cosine", dot=-1e-300, skip_sq=1e-300, branch_sq=1e-300) == pytest.approx(-1.0)
    assert value("branches", "cosine", dot=1e300, skip_sq=1e300, branch_sq=1e300) == pytest.approx(1.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(1e-3, 1e3))
def test_ratios_and_cosine_do_not_depend_on_the_scale(values, scale):
    a, f = np.array(values), np.array(values[::-1]) + 1.0

    def sums(a, f):
        return {"n": a.size, "skip_sq": a @ a, "branch_sq": f @ f, "dot": a @ f}

    if min(a @ a, f @ f) < 1e-12:
        return
    for name in ("branch_ratio", "cosine"):
        here, there = (value("branches", name, **sums(a * s, f * s)) for s in (1.0, scale))
        assert here == pytest.approx(there, rel=1e-9, abs=1e-12)
    assert abs(value("branches", "cosine", **sums(a, f))) <= 1 + 1e-12


def test_quotient_is_null_over_zero_only():
    over = pa.chunked_array([pa.array([0, 2, None, 4])])
    under = pa.chunked_array([pa.array([0.0, 0.0, 1.0, 2.0])])
    assert quotient(over, under).to_pylist() == [None, None, None, 2.0]


def test_derived_columns_have_names_of_their_own_a_unit_and_a_meaning():
    for table, columns in DERIVED.items():
        names = [c.name for c in (*TABLES[table], *columns)]
        assert len(names) == len(set(names))
        assert all(c.unit and c.doc and c.formula for c in columns)


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_gains_its_derived_columns(table):
    empty = raw(table).slice(0, 0)
    assert derive(table, empty).column_names == [c.name for c in (*TABLES[table], *DERIVED[table])]
