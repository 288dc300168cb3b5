"""Calls the emulated recurrent kernels on heap blocks of exact size: python sanitized_rnn.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes, modes and shapes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys

from sanitized_calls import SIZES, array, libc

GATES = (1, 1, 4, 3)


def rows(count: int, columns: int, dtype: int) -> tuple[int, int]:
    """Whole rows of 16 bytes, as the kernels take weights."""
    width = 16 // SIZES[dtype]
    stride = -(-columns // width) * width
    return array(count * stride, dtype), stride


def call(kernels, dtype: int, mode: int, hidden: int, projection: int, sizes: list[int], path: int) -> None:
    """Forward and backward of a sequence, a cell and its gradient."""
    batch, total, steps, state = sizes[0], sum(sizes), len(sizes), projection or hidden
    lstm, gru, gates = mode == 2, mode == 3, GATES[mode] * hidden
    numbers = libc.malloc(8 * steps)
    (ctypes.c_int64 * steps).from_address(numbers)[:] = sizes
    x, y, g = array(total * gates, dtype, 1), array(total * state, dtype, 1), array(total * state, dtype)
    hx, h_n = array(batch * state, dtype, 1), array(batch * state, dtype)
    cx, c_n = (array(batch * hidden, dtype, 1) * lstm for _ in range(2))
    saved, cells = array(total * 4 * hidden, dtype) * (mode >= 2), array(total * hidden, dtype) * lstm
    bias, none = array(hidden, dtype) * gru, (0, 0)
    hh, hr = rows(gates, state, dtype), rows(projection, hidden, dtype) if projection else none
    sequence = total, batch, steps, hidden, state
    for reverse in (False, True):
        size = kernels.recurrence_workspace(dtype, mode, batch, hidden, state, projection > 0)
        end = *sequence, reverse, False, path, libc.malloc(size), 0
        kernels.recurrence(dtype, mode, x, hx, cx, hh, bias, hr, numbers, numbers, y, h_n, c_n, saved, cells, *end)
        size = kernels.recurrence_backward_workspace(dtype, mode, batch, hidden, state, projection > 0)
        end = *sequence, reverse, False, path, libc.malloc(size), 0
        hh_t, hr_t = rows(state, gates, dtype), rows(hidden, projection, dtype) if projection else none
        dx, dq, dh, dc = (array(n, dtype) for n in (total * gates, total * hidden, batch * state, batch * hidden))
        given = g, h_n, c_n, y, hx, cx, hh_t, hr_t, saved, cells, numbers, numbers
        kernels.recurrence_backward(dtype, mode, *given, dx, dq, dh, dc, array(total * state, dtype), *end)
    if projection:
        return
    input, state_rows, ih = rows(batch, 7, dtype), rows(batch, hidden, dtype), rows(gates, 7, dtype)
    biases = array(gates, dtype), array(gates, dtype)
    arguments = input, state_rows, cx, ih, hh, *biases, h_n, c_n, saved, batch, 7, hidden, False, 0
    kernels.recurrent_cell(dtype, mode, *arguments)
    dz, dq, dh = array(batch * gates, dtype), array(batch * gates, dtype), array(batch * hidden, dtype)
    kernels.recurrent_cell_backward(dtype, mode, h_n, c_n, hx, h_n, saved, dz, dq, dh, batch, hidden, 0)


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    shapes = [(19, 0, [9, 9, 2]), (5, 11, [3, 1]), (3, 0, [70, 35])] if full else [(19, 0, [9, 3])]
    modes = itertools.product(range(4), range(4)) if full else [(1, 2), (0, 3)]
    for (dtype, mode), (hidden, projection, sizes), way in itertools.product(modes, shapes, (1, 2)):
        if mode == 2 or not projection:
            call(kernels, dtype, mode, hidden, projection, sizes, way)
    if not full:
        call(kernels, 1, 2, 5, 11, [3, 1], 2)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
