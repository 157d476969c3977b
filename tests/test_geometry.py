"""Geometry of the row sample against plain loops, closed forms, and what is taken into the sample."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow import geometry as g


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 6, 8), (4, 2, 30), (2, 40, 6)])
def test_geometry_is_that_of_the_oracle(shape):
    x = sample(*shape)
    wanted = oracle.geometry(x)
    got = {
        "token_cosine": g.token_cosine(x), "kurtosis": g.kurtosis(x), "max_over_median": g.max_over_median(x),
        "effective_rank": g.effective_rank(g.gram(x)),
    }  # fmt: skip
    assert {k: float(v) for k, v in got.items()} == pytest.approx(wanted, rel=1e-10)


def test_several_samples_at_once_are_those_one_by_one():
    x = sample(5, 2, 6, 8)
    for function in (g.token_cosine, g.kurtosis, g.max_over_median, lambda y: g.effective_rank(g.gram(y))):
        assert torch.allclose(function(x), torch.stack([function(y) for y in x]))


def test_equal_tokens_have_cosine_one_and_rank_one():
    x = sample(2, 1, 8).expand(2, 5, 8)
    assert float(g.token_cosine(x)) == pytest.approx(1)
    assert float(g.effective_rank(g.gram(x[:1]))) == pytest.approx(1)


def test_orthogonal_tokens_have_cosine_zero_and_full_rank():
    x = torch.eye(6, dtype=torch.float64)[None] * 3
    assert float(g.token_cosine(x)) == pytest.approx(0)
    assert float(g.effective_rank(g.gram(x))) == pytest.approx(6)


def test_normal_values_have_kurtosis_three_and_a_huge_one_shows():
    x = sample(1, 500, 100)
    assert float(g.kurtosis(x)) == pytest.approx(3, rel=0.03)
    x[0, 0, 0] = 1e4
    assert float(g.max_over_median(x)) == pytest.approx(1e4 / 0.6745, rel=0.02)


def test_zeros_and_not_finite_values_give_nan():
    zero = torch.zeros(2, 3, 4)
    for function in (g.token_cosine, g.kurtosis, g.max_over_median, lambda y: g.effective_rank(g.gram(y))):
        assert math.isnan(function(zero))
    bad = sample(2, 3, 4)
    bad[0, 0, 0] = float("nan")
    for function in (g.token_cosine, g.kurtosis, g.max_over_median, lambda y: g.effective_rank(g.gram(y))):
        assert math.isnan(function(bad))


def test_zero_positions_are_left_out_of_the_cosine():
    x = sample(1, 6, 4)
    padded = torch.cat([x, torch.zeros(1, 3, 4)], 1)
    assert float(g.token_cosine(padded)) == pytest.approx(float(g.token_cosine(x)))


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(0, 100))
def test_scale_and_order_of_tokens_change_nothing(factor, seed):
    x = sample(2, 7, 5, seed=seed)
    y = factor * x[:, torch.randperm(7, generator=torch.Generator().manual_seed(seed))]
    for function in (g.token_cosine, g.kurtosis, g.max_over_median):
        assert float(function(y)) == pytest.approx(float(function(x)), rel=1e-9)
    assert float(g.effective_rank(g.gram(y))) == pytest.approx(float(g.effective_rank(g.gram(x))), rel=1e-7)


def test_shares_of_parts_that_make_up_a_whole_add_up_to_one():
    parts = sample(4, 3, 5, 6)
    whole = parts.sum(0)
    got = g.shares(list(parts), whole)
    assert sum(got) == pytest.approx(1)
    assert got[2] == pytest.approx(float((parts[2] * whole).sum() / (whole * whole).sum()))


def test_shares_in_nothing_are_not_numbers():
    assert all(math.isnan(share) for share in g.shares([torch.ones(1, 2, 3)] * 2, torch.zeros(1, 2, 3)))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_cosines_and_shares_do_not_depend_on_the_precision_that_the_training_multiplies_with(precision):
    """`torch.set_float32_matmul_precision("medium")` lets a CPU multiply matrices in bfloat16."""
    rows = sample(1, 256, 384).float() + 3
    usual = float(g.token_cosine(rows)), g.shares([rows * 0.3, rows * 0.7], rows)
    assert usual[0] == pytest.approx(float(g.token_cosine(rows.double())), rel=1e-6)
    torch.set_float32_matmul_precision(precision)
    try:
        assert (float(g.token_cosine(rows)), g.shares([rows * 0.3, rows * 0.7], rows)) == usual
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("shape", "axis", "taken"), [
    ((4, 8), -1, (1, 4, 8)), ((3, 5, 8), -1, (3, 5, 8)), ((2, 8, 3, 4), 1, (2, 12, 8)), ((8,), -1, (1, 1, 8)),
    ((64, 32, 8), -1, (16, 16, 8)), ((2, 1000, 8), -1, (2, 128, 8)), ((1000, 8), -1, (1, 256, 8)),
    ((8, 16, 64, 64), 1, (8, 32, 16)), ((1000, 4, 8), -1, (64, 4, 8)),
])  # fmt: skip
def test_a_sample_is_everything_or_spread_over_positions(shape, axis, taken):
    x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    rows = g.sample_rows(x, axis, 256)
    assert rows.shape == taken
    assert rows.shape[0] * rows.shape[1] <= 256
    flat = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    assert torch.equal(rows[0, 0], flat[0])
    assert rows.data_ptr() != x.data_ptr()


def test_the_places_of_a_sample_are_fixed():
    x = torch.randn(40, 100, 6)
    assert torch.equal(g.sample_rows(x, -1, 64), g.sample_rows(x.clone(), -1, 64))
    assert g.sample_rows(torch.zeros(0, 4, 5), -1, 64) is None
    assert g.sample_rows(torch.zeros(()), -1, 64) is None


def by_oracle(x):
    """The figures of a sample of float32 from its numbers in float64."""
    x = x.double()
    return {name: float(f(x)) for name, f in (("kurtosis", g.kurtosis), ("max_over_median", g.max_over_median), ("token_cosine", g.token_cosine))}


def check_figures(samples):
    found = g.figures(samples)
    for i, x in enumerate(samples):
        got = {name: float(values[i]) for name, values in found.items()}
        assert got == pytest.approx(by_oracle(x), rel=1e-5, abs=1e-6, nan_ok=True)


SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-41, 1e30, 1e-30]


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)), st.integers(1, 5), st.integers(0, 99),
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL)), max_size=4),
)  # fmt: skip
def test_figures_of_several_samples_are_those_of_each_in_float64(shape, count, seed, special):
    samples = [sample(*shape, seed=seed + i).float() for i in range(count)]
    for place, value in special:
        samples[place % count].view(-1)[place % samples[0].numel()] = value
    with_huge = any(abs(value) == 1e30 for _, value in special)  # its fourth power is no float32 number, and no matter here
    if not with_huge or g.compiled.SAMPLES:
        check_figures(samples)


@pytest.mark.parametrize("order", ["as drawn", "sorted", "reversed", "every 16th is large", "all equal", "nearly all zero", "two values"])
def test_median_of_many_numbers_is_found_in_any_order(order):
    x = sample(4, 32, 128).float()
    flat = x.view(-1)
    if order == "sorted":
        flat.copy_(flat.abs().sort().values)
    elif order == "reversed":
        flat.copy_(flat.abs().sort(descending=True).values)
    elif order == "every 16th is large":
        flat[::16] += 100
    elif order == "all equal":
        flat.fill_(-3)
    elif order == "nearly all zero":
        flat[1:] = 0
    elif order == "two values":
        flat.copy_(torch.where(flat > 0, 1.0, 2.0))
    check_figures([x, sample(4, 32, 128, seed=1).float()])


def test_figures_are_the_same_where_nothing_was_compiled(monkeypatch):
    samples = [sample(3, 20, 64, seed=i).float() for i in range(3)]
    usual = g.figures(samples)
    monkeypatch.setattr(g.compiled, "SAMPLES", None)
    for name, values in g.figures(samples).items():
        assert [float(value) for value in values] == pytest.approx(usual[name], rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 128, 12), (3, 200, 7), (300, 5, 6), (700, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_taken_from_the_same_places_where_nothing_was_compiled(shape, dtype, monkeypatch):
    x = sample(*shape).to(dtype)
    usual = g.sample_rows(x, -1, 256)
    monkeypatch.setattr(g.compiled, "SAMPLES", None)
    assert torch.equal(g.sample_rows(x, -1, 256), usual)
