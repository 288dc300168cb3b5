"""Calls emulated layer norms and dropout on heap blocks of exact size: python sanitized_layer_norm.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes and for rows that no thread keeps.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys

from sanitized_calls import array, libc


def call(kernels, dtype: int, rows: int, columns: int, offset: int, fused: bool, wide: bool) -> None:
    """Forward, backward, and dropout over as many elements."""
    count, compute = rows * columns, 3 if dtype == 3 else 0
    x, residual, y, h, g, dx, dr = (array(count, dtype, offset) for _ in range(7))
    weight, bias = (array(columns, compute if wide else dtype) for _ in range(2))
    mean, rstd, dw, db = (array(n, compute) for n in (rows, rows, columns, columns))
    seed = array(1, 3)
    size = kernels.layer_norm_backward_workspace(dtype, rows, columns)
    workspace = libc.malloc(size)
    p = 0.3 * fused
    given = (x, residual * fused, weight, bias)
    kernels.layer_norm(dtype, wide, rows, columns, *given, y, h * fused, mean, rstd, 1e-5, p, seed, 0)
    kernels.layer_norm(dtype, wide, rows, columns, x, 0, 0, 0, y, 0, 0, rstd, 1e-5, 0.0, 0, 0)
    for grads in ((dx, dr * fused, dw, db), (0, 0, dw, 0), (dx, 0, 0, 0)):
        arguments = (g, residual * fused, x, weight, mean, rstd, *grads, p, seed, workspace, 0)
        kernels.layer_norm_backward(dtype, wide, rows, columns, *arguments)
    kernels.dropout(dtype, x, y, count, 0.3, seed, 0)


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    shapes = [(3, 64), (7, 33), (2, 520), (30, 40)] if full else [(3, 33), (5, 520)]
    for shape, dtype in itertools.product(shapes, range(4) if full else (1,)):
        for offset, fused, wide in ((0, True, False), (1, False, True)):
            call(kernels, dtype, *shape, offset, fused, wide or dtype in (0, 3))
    for shape, dtype in itertools.product([(3, 2064), (2, 17000)], (0, 1)) if full else [((2, 2064), 1)]:
        call(kernels, dtype, *shape, 0, True, dtype == 0)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
