"""Calls the emulated matmul on heap blocks of exact size: python sanitized_linear.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes and layouts, and for the large tiles.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys

from sanitized_calls import array, libc


def matrix(rows: int, columns: int, dtype: int, layout: str) -> tuple[int, int, int]:
    """Address and strides."""
    if layout == "expanded":
        return array(1, dtype), 0, 0
    address = array(rows * columns, dtype, layout == "offset")
    return (address, 1, rows) if layout == "columns" else (address, columns, 1)


def call(kernels, dtype: int, tf32: bool, M: int, N: int, K: int, kind: int, layouts: tuple[str, str, str]) -> None:
    """Forward and both gradients."""
    x, w, g = (
        matrix(rows, columns, dtype, layout)
        for (rows, columns), layout in zip(((M, K), (N, K), (M, N)), layouts, strict=True)
    )
    bias, grad_bias = array(N, dtype), array(N, dtype)
    y, z, saved = (array(M * N, dtype) for _ in range(3))
    dx, dw = array(M * K, dtype), array(N * K, dtype)
    first, second = (
        libc.malloc(max(kernels.linear_workspace(product, dtype, M, N, K, 0, True), 1)) for product in (1, 2)
    )
    saved = saved if kind else 0
    kernels.linear(dtype, *x, *w, bias, y, z, M, N, K, kind, 0.5, tf32, 0, 0)
    kernels.linear_input_gradient(dtype, *g, saved, *w, dx, M, N, K, kind, 0.5, tf32, first, 0)
    kernels.linear_weight_gradient(dtype, *g, saved, *x, dw, grad_bias, M, N, K, kind, 0.5, tf32, True, second, 0)
    kernels.linear_weight_gradient(dtype, *g, saved, *x, 0, grad_bias, M, N, K, kind, 0.5, tf32, True, second, 0)


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    arithmetics = [(1, False), (2, False), (0, True), (0, False), (3, False)]
    if full:
        layouts = list(itertools.product(("rows", "columns"), repeat=3))
        layouts += [("offset", "rows", "offset"), ("rows", "offset", "expanded")]
        for (dtype, tf32), each, kind in itertools.product(arithmetics, layouts, (0, 8)):
            call(kernels, dtype, tf32, 72, 80, 24, kind, each)
        for (dtype, tf32), sizes in itertools.product(arithmetics, ((5, 7, 9), (67, 33, 129), (1, 1, 1), (3, 5, 0))):
            call(kernels, dtype, tf32, *sizes, 1, ("rows", "rows", "rows"))
        for dtype, tf32 in arithmetics:
            call(kernels, dtype, tf32, 136, 520, 264, 0, ("rows", "columns", "rows"))
            call(kernels, dtype, tf32, 900, 40, 48, 1, ("rows", "rows", "rows"))  # split
    else:
        for dtype, tf32 in arithmetics:
            call(kernels, dtype, tf32, 72, 40, 264, 0, ("rows", "rows", "rows"))
        call(kernels, 1, False, 67, 33, 70, 6, ("rows", "offset", "rows"))
        call(kernels, 1, False, 264, 40, 72, 8, ("rows", "columns", "rows"))
        call(kernels, 1, False, 136, 264, 200, 0, ("rows", "rows", "rows"))
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
