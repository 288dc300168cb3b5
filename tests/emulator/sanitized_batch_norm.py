"""Calls the emulated batch normalisation on heap blocks of exact size: python sanitized_batch_norm.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes and for shapes with several parts.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys

from sanitized_calls import array, libc


def call(kernels, dtype: int, shape: tuple[int, int, int], kind: int, offset: int, with_residual: bool) -> None:
    """Forward, inference and backward, statistics and apply."""
    outer, channels, inner = shape
    count, wide = outer * channels * inner, 3 if dtype == 3 else 0
    x, residual, y, g, dx, dz = (array(count, dtype, offset) for _ in range(6))
    weight, bias, mean, rstd, variance, dw, db = (array(channels, wide) for _ in range(7))
    workspace = libc.malloc(kernels.batch_norm_workspace(dtype, *shape))
    given = (x, weight, bias, residual * with_residual)
    rest = (1e-5, kind, 0.5)
    kernels.batch_norm(dtype, *shape, *given, y, mean, rstd, variance, *rest, workspace, 0)
    kernels.batch_norm_inference(dtype, *shape, *given, mean, variance, y, *rest, 0)
    for training, output in itertools.product((True, False), (0, y)):
        arguments = (g, *given, output * with_residual, mean, rstd, dx, dw, db, dz, training, kind, 0.5, workspace, 0)
        kernels.batch_norm_backward(dtype, *shape, *arguments)
    kernels.batch_norm_statistics(dtype, *shape, x, mean, variance, workspace, 0)
    kernels.batch_norm_apply(dtype, *shape, g, x, weight, mean, rstd, db, dw, dx, 0)


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    small = [(3, 5, 16), (3, 5, 7), (33, 24, 1), (7, 5, 1), (9, 8, 131)]
    for shape, dtype, kind in itertools.product(small, range(4), (1, 8)) if full else [((3, 5, 7), 1, 8)]:
        for offset, with_residual in ((0, True), (1, False)):
            call(kernels, dtype, shape, kind, offset, with_residual)
    large = [(5, 1, 8000), (1100, 40, 1), (9, 8, 1001)]
    for shape, dtype in itertools.product(large, (0, 1)) if full else [((33, 24, 1), 1), ((1030, 8, 1), 1)]:
        call(kernels, dtype, shape, 1, 0, True)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
