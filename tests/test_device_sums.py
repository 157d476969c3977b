"""What is asked of an accelerator, asked of the host's memory, where the same operations are right or wrong as well."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradflow import device_sums, statistics

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [0, 1, 4095, 4096, 4097, 3 * 4096, 20_000]
EVERY = ("total", "square", "largest", "zeros", "nonfinite")


def numbers(size, dtype, *, broken=False):
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    x[::7] = 0
    if broken:
        x[1::100], x[2::300], x[3::300] = math.nan, math.inf, -math.inf
    return x


def expected(x):
    x = x.double()
    return {
        "total": float(x.sum()), "square": float(x.square().sum()), "largest": float(x.abs().max()) if x.numel() else 0.0,
        "zeros": float((x == 0).sum()), "nonfinite": float((~torch.isfinite(x)).sum()),
    }  # fmt: skip


@pytest.fixture(params=[device_sums.PIECE, 8192], ids=["at once", "in pieces"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(device_sums, "PIECE", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.usefixtures("pieces")
def test_figures_of_a_tensor_are_those_of_float64(size, dtype, broken):
    x = numbers(size, dtype, broken=broken)
    found = device_sums.measure(x, EVERY)
    for name, value in expected(x).items():
        assert float(found[name]) == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("pieces")
def test_figures_of_many_tensors_are_those_of_each(dtype):
    tensors = [numbers(size, dtype, broken=size == 4097) for size in SIZES]
    wanted = ("square", "largest", "zeros", "nonfinite")
    found = device_sums.measure_each(tensors, wanted)
    for i, x in enumerate(tensors):
        for name in wanted:
            assert float(found[i][name]) == pytest.approx(expected(x)[name], rel=1e-12, nan_ok=True), (name, len(x))


@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("pieces")
def test_figures_of_pairs_are_those_of_float64(size, dtypes):
    x, y = numbers(size, dtypes[0]), numbers(size, dtypes[1]).flip(0)
    product, apart = x.double() * y.double(), x.double() - y.double()
    rel = 1e-12 * float(product.abs().sum())
    assert float(device_sums.dot(x, y)) == pytest.approx(float(product.sum()), abs=rel + 1e-12)
    assert float(device_sums.distance(x, y)) == pytest.approx(float(apart.square().sum()), rel=1e-12)


@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.98, 0.97, 3.0, math.nan, -math.inf]), min_size=1, max_size=40))
def test_saturated_elements_and_live_channels_are_those_of_the_host(values):
    x = torch.tensor(values)
    assert float(device_sums.beyond(x, 0.0, 0.97)) == statistics.count_saturated(x, "tanh")
    grid = torch.stack([x, x * 0.0, -x])
    for channel in (0, 1):
        assert device_sums.live(grid, channel).tolist() == statistics.live_units(grid, channel).tolist()
    assert device_sums.live(x, 0).tolist() == statistics.live_units(x, 0).tolist()


def test_sizes_that_have_no_square_in_float32_are_squared_in_float64():
    for size in (1e30, 1e-30):
        x = torch.full((5000,), size)
        assert float(device_sums.measure(x, ("square",))["square"]) == pytest.approx(5000 * float(x[0].double()) ** 2, rel=1e-12)


def test_figures_do_not_depend_on_the_precision_that_the_training_multiplies_with():
    """`torch.set_float32_matmul_precision` lets products of matrices run in bfloat16 or TF32: these are our own."""
    x, y = torch.randn(1 << 16), torch.randn(1 << 16)
    usual = device_sums.dot(x, y), statistics.dot(x, y)
    torch.set_float32_matmul_precision("medium")
    try:
        assert (device_sums.dot(x, y), statistics.dot(x, y)) == usual
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_give_the_figures_of_the_operations():
    script = Path(__file__).with_name("interpreted_sums.py")
    done = subprocess.run([sys.executable, script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.stdout == "as wanted\n", done.stderr


def test_without_triton_the_operations_are_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradflow.triton_sums", None)
    device_sums._loaded.cache_clear()
    assert device_sums._loaded() is None
    device_sums._loaded.cache_clear()
