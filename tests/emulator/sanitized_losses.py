"""Calls the emulated softmax, cross entropy and embedding on heap blocks of exact size: python ... MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys

from sanitized_calls import array, libc

SHAPES = [(11, 40, 1), (3, 33, 1), (2, 2048, 1), (2, 1301, 1), (2, 7, 5), (1, 5, 40)]
EMBEDDINGS = [(70, 5, 8), (33, 1, 9), (7, 40, 24)]  # count, rows, columns


def integers(values: list[int]) -> int:
    """The address of a heap block of 64-bit integers."""
    address = libc.malloc(8 * len(values))
    ctypes.memmove(address, (ctypes.c_int64 * len(values))(*values), 8 * len(values))
    return address


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    for dtype, shape, offset in itertools.product(range(4) if full else (1,), SHAPES, (0, 1)):
        wide = 3 if dtype == 3 else 0
        outer, classes, inner = shape
        elements, rows = outer * classes * inner, outer * inner
        x, y, dx, p, dp = (array(elements, dtype, offset) for _ in range(5))
        for log in (False, True):
            kernels.softmax(dtype, *shape, x, y, log, 0)
            kernels.softmax_backward(dtype, *shape, x, y, dx, log, 0)
        # an ignored one, two that are no class
        index = integers([(-100, -1, classes, 0, classes - 1)[row % 5] for row in range(rows)])
        weight, loss, one, grad = (array(n, wide) for n in (classes, rows, 1, rows))
        statistics, sums = array(3 * rows, wide), array(2 * rows, wide)
        for target, is_index, smoothing in ((index, True, 0.0), (index, True, 0.1), (p, False, 0.1)):
            head, tail = (dtype, *shape, x), (-100, smoothing, 0)
            kernels.cross_entropy(*head, target, is_index, weight, loss, 0, statistics, 0, *tail)
            kernels.cross_entropy(*head, target, is_index, weight, one, one, statistics, sums, *tail)
            of_target = 0 if is_index else dp
            for by_row, divisor in ((True, 0), (False, one)):
                kernels.cross_entropy_backward(
                    *head, grad, by_row, target, is_index, weight, divisor, statistics, dx, of_target, *tail
                )
    for dtype, case, offset in itertools.product(range(4) if full else (1,), EMBEDDINGS, (0, 1)):
        count, rows, columns = case
        values = [i * i % rows for i in range(count - 2)] + [-1, rows]
        index = sorted(values)
        order = sorted(range(count), key=lambda i: values[i])
        table, dtable = (array(rows * columns, dtype, offset) for _ in range(2))
        output = array(count * columns, dtype, offset)
        kernels.embedding(dtype, table, integers(values), output, *case, 0)
        workspace = libc.malloc(kernels.embedding_workspace(dtype, count, columns))
        scale = array(count, 3 if dtype == 3 else 0)
        for factor, padding in ((0, -1), (scale, 0)):
            kernels.embedding_backward(
                dtype, output, integers(index), integers(order), factor, dtable, *case, padding, workspace, 0
            )
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
