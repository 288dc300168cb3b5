"""Calls the emulated max pooling on heap blocks of exact size: python sanitized_pooling.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys

from sanitized_calls import array, libc

# (N, C, H, W), (OH, OW), kernel, stride, padding, dilation
CASES = [
    ((2, 3, 7, 9), (3, 4), (2, 2), (2, 2), (0, 0), (1, 1)),
    ((1, 8, 9, 6), (6, 4), (3, 3), (2, 2), (1, 1), (1, 1)),  # the last windows reach over the padding
    ((2, 8, 5, 11), (3, 6), (3, 3), (1, 2), (1, 1), (2, 1)),
]


def places(elements: int, size: int) -> int:
    """The address of a heap block of so many zeros of 1 or 8 bytes."""
    address = libc.malloc(elements * size)
    libc.memset(address, 0, elements * size)
    return address


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    for dtype, case, last in itertools.product(range(4) if full else (1,), CASES, (False, True)):
        shape, size, *windows = case
        for offset, bytes_ in itertools.product((0, 1), (0, 1, 8)):
            outputs = math.prod(shape[:2]) * math.prod(size)
            x, dx = (array(math.prod(shape), dtype, offset) for _ in range(2))
            y = array(outputs, dtype, offset)
            where = places(outputs, bytes_) if bytes_ else 0
            kernels.max_pool2d(dtype, x, y, where, bytes_, shape, size, *windows, last, 0)
            if bytes_:
                kernels.max_pool2d_backward(dtype, y, where, bytes_, dx, shape, size, *windows, last, 0)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
