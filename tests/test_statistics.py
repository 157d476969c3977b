"""Each statistic against a plain float64 computation, and the properties that make sums add up."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradflow import compiled, shapes
from gradflow import statistics as s


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def reader(request, monkeypatch):
    """Every test of this file sums with the compiled functions, where there are any, and with numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled, "SUMS", {})
    elif not compiled.SUMS:
        pytest.skip("gradflow was installed without a C compiler")


SIZES = [(), (1,), (7,), (0,), (3, 0, 2), (5, 7, 11), (4096,), (4097,), (2, 4096), (70_000,), (3, 100_000), (270_001,)]


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        x = torch.randn(size, generator=generator).to(dtype)
        yield torch.where(x.abs() < 0.3, torch.zeros_like(x), x)


def expected(x):
    x = x.double()
    return {
        "total": float(x.sum()), "square": float(x.square().sum()), "zeros": int((x == 0).sum()),
        "largest": float(x.abs().max()) if x.numel() else 0.0, "nonfinite": int((~torch.isfinite(x)).sum()),
    }  # fmt: skip


NAMES = ("total", "square", "largest", "zeros", "nonfinite")
REL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@pytest.mark.parametrize("dtype", REL, ids=str)
def test_statistics_are_those_of_a_float64_sum(dtype):
    for x in tensors(dtype):
        found, wanted = s.measure(x, NAMES), expected(x)
        for name in NAMES:
            scale = math.sqrt(x.numel()) if name == "total" else 0.0
            assert float(found[name]) == pytest.approx(wanted[name], rel=REL[dtype], abs=REL[dtype] * scale), (name, x.shape)
            assert isinstance(found[name], float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dot_products_are_those_of_a_float64_sum(dtype):
    for x in tensors(dtype):
        y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        wanted = float((x.double() * y.double()).sum())
        scale = float(x.double().norm() * y.double().norm())
        assert float(s.dot(x, y)) == pytest.approx(wanted, abs=REL[dtype] * scale + 1e-300)
        wanted = float((x.double() - y.double()).square().sum())
        assert float(s.sum_squared_differences(x, y)) == pytest.approx(wanted, rel=REL[dtype])


@pytest.mark.parametrize("value", [0.1, 3.3e-7, 7.7e5])
def test_a_constant_does_not_add_up_its_rounding(value):
    x = torch.full((300_000,), value)
    exact = float(x[0].double())
    assert float(s.sum_squares(x)) == pytest.approx(300_000 * exact**2, rel=6e-6)
    assert float(s.dot(x, x)) == pytest.approx(300_000 * exact**2, rel=2e-6)
    assert float(s.total(x)) == pytest.approx(300_000 * exact, rel=2e-6)


def test_each_function_gives_its_own_part_of_measure():
    x = torch.randn(40, 50)
    x[3] = 0
    found = s.measure(x, NAMES)
    assert s.total(x) == found["total"]
    assert s.sum_squares(x) == found["square"]
    assert s.max_abs(x) == found["largest"]
    assert s.count_zeros(x) == found["zeros"] == 50
    assert s.count_nonfinite(x) == found["nonfinite"] == 0


def test_tensors_measured_together_have_the_figures_of_each_by_itself():
    plain = [x for dtype in REL for x in tensors(dtype)]
    xs = [*plain, torch.randn(6, 7).T, torch.randn(4, 5, dtype=torch.complex64), torch.tensor([1.0, math.nan, math.inf])]
    ys = [(x * 0.75).to(torch.float64 if i % 5 == 0 and not x.is_complex() else x.dtype) for i, x in enumerate(xs)]
    np.testing.assert_equal(s.measure_each(xs, NAMES), [s.measure(x, NAMES) for x in xs])
    each = [s.sum_squared_differences(x, y) for x, y in zip(xs, ys, strict=True)]
    np.testing.assert_equal(s.sum_squared_differences_each(xs, ys), each)
    assert s.measure_each([], NAMES) == s.sum_squared_differences_each([], []) == s.copy_each([], []) == []


def test_copies_are_those_tensors_and_earlier_copies_of_the_same_kind_are_overwritten():
    xs = [*tensors(), *tensors(torch.bfloat16), torch.randn(6, 7).T, torch.randn(4, 5, dtype=torch.complex64)]
    first = s.copy_each(xs, [None] * len(xs))
    rooms = [room for room, _ in first]
    others = [x * 3 for x in xs]
    again = s.copy_each(others, [*rooms[:-1], torch.empty(4, 5)])
    for x, (room, square), other, (room_then, _) in zip(xs, first, others, again, strict=True):
        assert square == pytest.approx(float(x.abs().double().square().sum()), rel=2e-6)
        assert torch.equal(room_then, other)
        assert room_then is room or x is xs[-1]


def test_small_differences_of_large_numbers_keep_their_digits():
    x = torch.full((10_000,), 1e4)
    y = x + 2.0**-6
    assert float(s.sum_squared_differences(y, x)) == pytest.approx(10_000 * 2.0**-12, rel=1e-7)


@pytest.mark.parametrize("layout", ["transposed", "permuted", "sliced", "expanded", "channels_last"])
def test_the_order_in_memory_does_not_matter(layout):
    x = torch.randn(6, 8, 10, 12)
    y = {
        "transposed": x.transpose(0, 3), "permuted": x.permute(2, 0, 3, 1), "sliced": x[:, ::2, 1:],
        "expanded": x[:1].expand(6, -1, -1, -1), "channels_last": x.to(memory_format=torch.channels_last),
    }[layout]  # fmt: skip
    wanted = expected(y.contiguous())
    for name, value in s.measure(y, NAMES).items():
        assert float(value) == pytest.approx(wanted[name], rel=1e-5, abs=1e-3), name
    other = torch.randn(y.shape)
    assert float(s.dot(y, other)) == pytest.approx(float((y.double() * other.double()).sum()), abs=1e-3)


def test_not_finite_elements_are_counted_and_excluded_from_nothing():
    x = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0])
    found = s.measure(x, NAMES)
    assert int(found["nonfinite"]) == 3
    assert int(found["zeros"]) == 1
    assert math.isnan(found["square"])
    assert math.isnan(found["largest"])
    assert math.isinf(s.sum_squares(torch.tensor([float("inf")])))
    for at in (0, 299_999):
        x = torch.ones(300_000)
        x[at] = float("nan")
        assert math.isnan(s.max_abs(x))
        x[at] = -float("inf")
        assert float(s.max_abs(x)) == math.inf


def test_sparse_and_complex_tensors_count_as_what_they_hold():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 1.0]])
    rows = torch.sparse_coo_tensor([[0, 2, 2]], torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 1.0], [2.0, 0.0, 0.0]]), (3, 3), check_invariants=True)
    for name, value in s.measure(rows, NAMES).items():
        assert float(value) == expected(dense)[name], name
    z = torch.randn(5, 7, dtype=torch.complex64)
    assert float(s.sum_squares(z)) == pytest.approx(float(z.abs().square().sum()), rel=1e-6)


@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "relu"])
def test_saturated_elements_are_those_at_the_ends(kind):
    x = torch.linspace(-6, 6, 1001)
    if kind == "tanh":
        assert int(s.count_saturated(x.tanh(), kind)) == int((x.tanh().abs() > 0.97).sum())
    elif kind == "sigmoid":
        y = x.sigmoid()
        assert int(s.count_saturated(y, kind)) == int(((y < 0.03) | (y > 0.97)).sum())
    else:
        assert s.count_saturated(x.relu(), kind) is None


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_live_units_are_those_that_are_somewhere_not_zero(dim):
    x = torch.relu(torch.randn(4, 3, 5) - 1.5)
    others = [d for d in range(3) if d != dim % 3]
    assert torch.equal(s.live_units(x, dim), (x != 0).any(others[1]).any(others[0]))
    assert torch.equal(s.live_units(x + 1, dim, torch.zeros(())), torch.ones(x.shape[dim], dtype=torch.bool))


floats = st.floats(-1e3, 1e3, width=32)


@settings(max_examples=40, deadline=None)
@given(st.lists(floats, min_size=1, max_size=60), st.floats(-8, 8, width=32), st.integers(1, 5), st.randoms())
def test_scale_permutation_and_parts(values, factor, parts, random):
    x = torch.tensor(values, dtype=torch.float64)
    found = s.measure(x, NAMES)
    scaled = s.measure(x * factor, NAMES)
    assert float(scaled["square"]) == pytest.approx(factor**2 * float(found["square"]), rel=1e-9, abs=1e-9)
    assert float(scaled["largest"]) == pytest.approx(abs(factor) * float(found["largest"]), rel=1e-9)
    order = list(range(len(values)))
    random.shuffle(order)
    shuffled = s.measure(x[order], NAMES)
    split = [s.measure(part, NAMES) for part in x.chunk(parts)]
    for name in ("total", "square", "zeros", "nonfinite"):
        assert float(shuffled[name]) == pytest.approx(float(found[name]), rel=1e-9, abs=1e-6)
        assert sum(float(part[name]) for part in split) == pytest.approx(float(found[name]), rel=1e-9, abs=1e-6)
    assert max(float(part["largest"]) for part in split) == float(found["largest"])


def test_shapes_broadcast_as_numpy_says():
    for one, other in [((3, 1), (4,)), ((2, 3), (2, 3)), ((1,), (5, 6)), ((), (2,))]:
        assert shapes.broadcast(one, other) == np.broadcast_shapes(one, other)
    assert shapes.broadcast_factor((3, 1), (2, 3, 4)) == 8


@pytest.mark.parametrize("value", [3e38, 1e30, math.inf, math.nan, 1e-30])
def test_numbers_at_the_ends_of_float32_warn_nobody_and_are_summed_where_float64_can(value):
    x = torch.full((5_000,), value)
    found = s.measure(x, NAMES)
    exact = float(x[0].double())
    assert float(found["square"]) == pytest.approx(5_000 * exact**2, rel=1e-9, nan_ok=True)
    assert float(found["largest"]) == pytest.approx(exact, nan_ok=True)
    assert float(s.dot(x, -x)) == pytest.approx(-5_000 * exact**2, rel=1e-9, nan_ok=True)
    assert float(s.sum_squared_differences(x, x / 2)) == pytest.approx(
        5_000 * (exact - exact / 2) ** 2, rel=1e-6, nan_ok=True
    )
