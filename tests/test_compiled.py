"""The sums that are compiled where gradflow is installed, against numpy's float64 and exhaustively where that is possible."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradflow import compiled, statistics, threads

pytestmark = pytest.mark.skipif(not compiled.SUMS, reason="gradflow was installed without a C compiler")

SHARED = 2**15
LIBRARY = ctypes.CDLL(str(next(Path(compiled.__file__).parent.glob("_sums*.so")))) if compiled.SUMS else None


@pytest.fixture(params=[512, 256, 0], ids="{} bits".format)
def _vectors(request):
    """Every kind of vectors that the processor has."""
    if LIBRARY.widest_vectors(ctypes.c_int64(request.param)) != request.param:
        pytest.skip("not on this processor")
    yield
    LIBRARY.widest_vectors(ctypes.c_int64(512))
NARROW = {torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}


def wide(x):
    return x.double().numpy()


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_of_half_precision_is_widened_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    sums = compiled.SUMS[dtype]
    for value, true in zip(every.split(1), wide(every), strict=True):
        total, _, largest, zeros = sums.measure(value)
        assert (total == true and largest == abs(true)) or (np.isnan(true) and np.isnan(total) and np.isnan(largest))
        assert zeros == (true == 0)


@pytest.mark.usefixtures("_vectors")
@given(arrays.arrays(np.float32, st.integers(1, 700), elements=st.floats(width=32)), st.randoms())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_float32_numbers_are_measured_as_float64_measures_them(values, random):
    x = torch.from_numpy(values)
    y = x[torch.tensor(random.sample(range(len(values)), len(values)))]
    a, b = values.astype(np.float64), wide(y)
    sums = compiled.SUMS[torch.float32]
    with np.errstate(all="ignore"):
        expected = {
            "total": (a.sum(), np.abs(a).sum()), "square": ((a * a).sum(),) * 2,
            "dot": ((a * b).sum(), np.abs(a * b).sum()), "beside it": ((a * a).sum(),) * 2, "distance": (((a - b) ** 2).sum(),) * 2,
        }  # fmt: skip
    total, square, largest, zeros = sums.measure(x)
    found = {"total": total, "square": square, "dot": sums.dot(x, y)[0], "beside it": sums.dot(x, y)[1], "distance": sums.distance_each([x], [y])[0]}
    for name, (value, size) in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-13 * size if np.isfinite(size) else 0, err_msg=name)
    np.testing.assert_equal(largest, np.abs(a).max())
    assert zeros == np.count_nonzero(a == 0)


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 255, 256, 257, SHARED - 1, SHARED, SHARED + 1, 3 * SHARED + 77])
def test_no_element_is_missed_or_read_twice_where_vectors_are_cut(n, dtype):
    x = torch.arange(1, n + 1, dtype=dtype)
    sums = compiled.SUMS[dtype]
    assert sums.measure(x) == (n * (n + 1) / 2, pytest.approx(float(x.double().square().sum()), rel=1e-14), n, 0)
    assert sums.dot(torch.ones_like(x), x) == (n * (n + 1) / 2, n)
    assert sums.distance_each([x], [x - 1]) == [n]
    for offset in (1, 2):  # where memory is copied wide, and where it does not stand for that
        room = torch.full((n + 2 * offset,), -1.0, dtype=dtype)
        assert sums.copy_each([room[offset:-offset]], [x]) == [pytest.approx(float(x.double().square().sum()), rel=1e-14)]
        assert torch.equal(room[offset:-offset], x)
        assert room[offset - 1] == room[-offset] == -1


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("dtype", compiled.SUMS, ids=str)
def test_several_vectors_at_once_are_measured_as_each_by_itself(dtype):
    sizes = [1, 300, SHARED + 5, 7, 2 * SHARED, *range(2, 72)]
    ones, others = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(2))
    ones[1][0], ones[3][6], ones[4][-1] = float("nan"), float("inf"), float("nan")
    sums, rooms = compiled.SUMS[dtype], [torch.empty_like(x) for x in ones]
    np.testing.assert_equal(sums.measure_each(ones), [sums.measure(x) for x in ones])
    each = [sums.distance_each([x], [y])[0] for x, y in zip(ones, others, strict=True)]
    np.testing.assert_equal(sums.distance_each(ones, others), each)
    np.testing.assert_allclose(sums.copy_each(rooms, ones), [sums.measure(x)[1] for x in ones], rtol=1e-14)
    for room, x in zip(rooms, ones, strict=True):
        assert torch.equal(room.view(torch.uint8), x.view(torch.uint8))
    assert sums.measure_each([]) == []


@pytest.mark.usefixtures("_vectors")
@pytest.mark.parametrize("place", [0, SHARED // 2, 2 * SHARED - 1])
def test_one_nan_anywhere_makes_the_largest_nan_and_infinity_makes_it_infinite(place):
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.ones(2 * SHARED)
        x[place] = value
        np.testing.assert_equal(compiled.SUMS[torch.float32].measure(x)[2], abs(value))


@pytest.mark.parametrize("dtype", compiled.SUMS, ids=str)
def test_sums_are_bit_for_bit_the_same_on_any_number_of_threads(dtype):
    x, y = torch.randn(2, 2 * SHARED + 1001).to(dtype)
    sums, before = compiled.SUMS[dtype], torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            pair = sums.distance_each([x], [y]), sums.copy_each([torch.empty_like(x), torch.empty_like(y)], [x, y])
            found.append((sums.measure(x), sums.dot(x, y), sums.measure_each([x, y]), *pair))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("_vectors")
def test_subnormal_numbers_count_and_stay_what_they_are_for_everybody_else():
    tiny = torch.tensor([1e-41, 0.0, -3e-43])
    total, square, largest, zeros = compiled.SUMS[torch.float32].measure(tiny)
    a = wide(tiny)
    assert (total, square, largest, zeros) == (a.sum(), (a * a).sum(), a[0], 1)
    assert float(tiny[0] * 0.5) > 0


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(12.0)[::2], torch.arange(12.0).view(3, 4).t(), torch.empty(0, 3), torch._efficientzerotensor(5),
        torch.ones(3, dtype=torch.float8_e5m2), torch.ones(3, dtype=torch.complex64), torch.eye(3).to_sparse(),
        torch.arange(3.0).mul(1j).conj().imag, torch._neg_view(torch.arange(3.0)), torch.ones(3, device="meta"),
    ],
    ids=["strided", "transposed", "empty", "without memory", "another type", "complex", "sparse", "conjugate", "negative", "meta"],
)  # fmt: skip
def test_what_does_not_lie_in_memory_as_numbers_of_a_known_type_is_not_read_as_it_lies(x):
    assert compiled.sums(x) is None


def test_a_negative_view_is_measured_by_its_values_not_its_memory():
    x = torch._neg_view(torch.arange(5.0))
    assert statistics.measure(x, ("total", "square")) == {"total": -10, "square": 30}
    assert statistics.dot(x, torch.ones(5)) == -10
    assert statistics.sum_squared_differences(x, torch.zeros(5)) == 30
    assert statistics.copy_each([x], [None])[0][0].tolist() == [0, -1, -2, -3, -4]


def test_a_strided_vector_is_measured_by_its_own_elements():
    x = torch.arange(2.0 * SHARED)[::2]
    assert statistics.measure(x, ("total", "largest")) == {"total": float(x.double().sum()), "largest": 2 * SHARED - 2}


def test_what_runs_alone_uses_one_thread_and_nobody_else_notices():
    if threads._counts() is None:
        pytest.skip("this PyTorch is built on other libraries")
    before, elsewhere = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), threads.alone():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
            other.start()
            other.join()
            1 / 0
        assert torch.get_num_threads() == 2
        assert elsewhere == [2]
    finally:
        torch.set_num_threads(before)


def test_library_that_was_built_from_other_sources_is_not_called(monkeypatch):
    assert compiled._load()[0].keys() == compiled.SUMS.keys()
    monkeypatch.setattr(compiled, "_EDITION", compiled._EDITION + 1)
    assert compiled._load() == ({}, None)


HELP = """
import os, signal, sys, threading, time
import torch
from gradflow import compiled
torch.set_num_threads({threads})
sums, x = compiled.SUMS[torch.float32], torch.arange(2.0**21) % 1024
true = sums.measure(x[: 2**10])[0] * 2**11
def helpers():
    return sum(open(f"/proc/self/task/{{task}}/comm").read() == "gradflow\\n" for task in os.listdir("/proc/self/task"))
"""


def alone(code, threads=2, *, processors=None):
    """What a new process prints."""
    start = None if processors is None else lambda: os.sched_setaffinity(0, processors)
    command = [sys.executable, "-W", "error", "-c", HELP.format(threads=threads) + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, preexec_fn=start)  # noqa: PLW1509
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_threads = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one processor, or not Linux"
)


@needs_threads
def test_no_more_threads_help_than_pytorch_may_use():
    code = "print(sums.measure(x)[0] == true, helpers())"
    assert alone(code, threads=1) == ["True", "0"]
    assert alone(code, threads=2) == ["True", "1"]


@needs_threads
def test_process_that_may_use_one_processor_reads_alone():
    assert alone("print(sums.measure(x)[0] == true, helpers())", processors={next(iter(os.sched_getaffinity(0)))}) == ["True", "0"]


@needs_threads
def test_forked_child_gets_helpers_of_its_own():
    code = """
sums.measure(x)
if os.fork() == 0:
    print("child", helpers(), sums.measure(x)[0] == true, helpers(), flush=True)
    os._exit(0)
os.wait()
print("parent", sums.measure(x)[0] == true, helpers())
"""
    assert alone(code) == ["child", "0", "True", "1", "parent", "True", "1"]


@needs_threads
def test_threads_of_the_program_that_read_at_once_all_get_their_own_sums():
    code = """
vectors = [x + i for i in range(4)]
trues = [true + i * x.numel() for i in range(4)]
wrong = []
def read(i):
    for _ in range(300):
        if sums.measure(vectors[i])[0] != trues[i] or sums.measure(vectors[i][: 2**16])[0] != trues[i] / 2**5:
            wrong.append(i)
threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(wrong), helpers())
"""
    assert alone(code) == ["0", "1"]


@needs_threads
def test_helpers_leave_signals_to_the_program():
    code = """
seen = []
signal.signal(signal.SIGALRM, lambda *_: seen.append(threading.current_thread() is threading.main_thread()))
sums.measure(x)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for _ in range(200):
    assert sums.measure(x)[0] == true
time.sleep(0.05)
signal.setitimer(signal.ITIMER_REAL, 0)
masks = [line.split()[1] for task in os.listdir("/proc/self/task") if open(f"/proc/self/task/{task}/comm").read() == "gradflow\\n"
         for line in open(f"/proc/self/task/{task}/status") if line.startswith("SigBlk")]
print(len(seen) > 10, all(seen), [int(mask, 16) >> signal.SIGALRM - 1 & 1 for mask in masks])
"""
    assert alone(code) == ["True", "True", "[1]"]
