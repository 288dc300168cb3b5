"""Calls every emulated kernel once on heap blocks of exact size: python sanitized_calls.py MODULE FULL.

The sanitizer that MODULE was built with, and that is preloaded, finds accesses out of bounds, undefined behaviour and
races. No torch here: it is slow under a sanitizer; numbers are checked elsewhere. FULL: 1 for all kinds and dtypes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys

SIZES = (4, 2, 2, 8)  # bytes of each dtype code
ONES = 0x3C  # every byte: a small positive number in each dtype
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def array(elements: int, dtype: int, offset: int = 0) -> int:
    """The address of a heap block with `elements` after an offset, and not a byte more."""
    size = (elements + offset) * SIZES[dtype]
    address = libc.malloc(max(size, 1))
    libc.memset(address, ONES, size)
    return address + offset * SIZES[dtype]


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    shapes = [(5, 7), (130, 24), (67, 300), (0, 3)] if full else [(130, 24), (67, 33)]
    calls = itertools.product(range(4), range(9)) if full else [(0, 1), (1, 6)]
    for (dtype, kind), offset in itertools.product(calls, (0, 1)):
        for count in (33, 9001) if full else (9001,):
            x, y, g = (array(count, dtype, offset) for _ in range(3))
            kernels.activation(dtype, x, y, count, kind, 0.5, 0)
            kernels.activation_backward(dtype, g, y, g, count, kind, 0.5, 0)
        for rows, columns in shapes:
            x, z, y, g, dz = (array(rows * columns, dtype, offset) for _ in range(5))
            bias, grad_bias = array(columns, dtype), array(columns, dtype)
            workspace = libc.malloc(max(kernels.bias_activation_backward_workspace(rows, columns), 1))
            kernels.bias_activation(dtype, x, bias, y, z, rows, columns, kind, 0.5, 0)
            kernels.bias_activation_backward(dtype, g, z, dz, grad_bias, rows, columns, kind, 0.5, workspace, 0)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
