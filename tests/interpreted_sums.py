"""The kernels of `triton_sums` in Triton's interpreter, which needs no device, against PyTorch's own operations.

A process of its own: the interpreter is chosen, by `TRITON_INTERPRET`, when Triton is imported.
"""

from __future__ import annotations

import math

import torch

from gradflow import device_sums, triton_sums

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return math.isclose(float(got), float(wanted), rel_tol=1e-11, abs_tol=1e-9) or (math.isnan(float(got)) and math.isnan(float(wanted)))


def broken(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "finite":
        x[2::300] = math.inf
    if kind == "nan":
        x[1::700] = math.nan
    return x


def main() -> None:
    torch.manual_seed(0)
    triton_sums._PROGRAMS = 4  # several blocks a program without millions of elements
    triton_sums._SPAN = 2 * triton_sums._BLOCK
    sizes = [1, 5, 1000, 2048, 2049, 7 * 1024, 8193, 30_000]
    for dtype in DTYPES:
        for size in sizes:
            for kind in ("finite", "infinite", "nan"):
                x = broken(torch.randn(size).to(dtype), kind)
                x[::7] = 0
                found, wanted = triton_sums.measure(x), device_sums.measure(x, triton_sums.NAMES)
                assert all(same(found[name], wanted[name]) for name in triton_sums.NAMES), (dtype, size, kind, found, wanted)
            for other in (dtype, torch.float32):
                x, y = torch.randn(size).to(dtype), torch.randn(size).to(other)
                assert same(triton_sums.dot(x, y), device_sums.dot(x, y)), (dtype, size)
                assert same(triton_sums.distance(x, y), device_sums.distance(x, y)), (dtype, size)
    largest = triton_sums.measure(torch.full((3000,), -3e38))
    assert same(largest["square"], 3000 * torch.tensor(3e38).double() ** 2)
    print("as wanted")


if __name__ == "__main__":
    main()
