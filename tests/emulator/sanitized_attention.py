"""Calls the emulated kernels of attention on heap blocks of exact size: python sanitized_attention.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes, sizes and options.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import sys

from sanitized_calls import SIZES, array, libc


def integers(*values: int) -> int:
    """The address of a heap block of int64."""
    address = libc.malloc(8 * len(values))
    (ctypes.c_int64 * len(values)).from_address(address)[:] = values
    return address


def call(kernels, dtype: int, sizes, lengths, offset: int, mask: int, window, dropout: float, packed: bool) -> None:
    """Forward and backward of one batch entry of two heads that share keys, or of two packed sequences."""
    heads, (queries, keys) = 2, lengths
    wide = 3 if dtype == 3 else 0
    offsets = (integers(0, queries // 3, queries), integers(0, keys // 2, keys)) if packed else (0, 0)
    shape = kernels.AttentionShape(1 + packed, heads, heads, queries, keys, *sizes, *offsets, queries, keys)
    at = array(queries * keys, (0, 1, dtype, wide)[mask]) if mask else 0
    slopes, strides = array(heads, wide) if dropout else 0, [0, 0, keys, 1]
    scores = kernels.AttentionScores(0.1, *window, packed, mask, at, strides, slopes, 0, dropout, integers(7))

    def rows(length: int, size: int, count: int) -> tuple[int, int, int, int]:
        return array(count * length * size, dtype, offset), 0, size, length * size

    query, key, value = rows(queries, sizes[0], heads), rows(keys, sizes[0], 1), rows(keys, sizes[1], 1)
    output, grad = rows(queries, sizes[1], heads), rows(queries, sizes[1], heads)
    logsumexp, more = array(heads * queries, wide), array(heads * queries, wide)
    kernels.attention(dtype, shape, scores, query, key, value, output, logsumexp, False, 0)
    gradients = rows(queries, sizes[0], heads), rows(keys, sizes[0], 1), rows(keys, sizes[1], 1)
    grad_mask = array(heads * queries * keys, wide) if mask > 1 else 0
    workspace = libc.malloc(kernels.attention_backward_workspace(dtype, shape))
    given = grad, query, key, value, output, logsumexp, more
    kernels.attention_backward(dtype, shape, scores, *given, *gradients, grad_mask, False, workspace, 0)


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    sizes = [(24, 17), (64, 64), (128, 100), (200, 30)] if full else [(24, 17)]
    for dtype, each, offset in itertools.product(range(4) if full else (0, 1), sizes, (0, 1)):
        assert SIZES[dtype]
        call(kernels, dtype, each, (19, 70), offset, 0, (-1, 0), 0.0, False)
        call(kernels, dtype, each, (37, 20), offset, 0, (5, 3), 0.0, True)
        for mask in (1, 2, 3) if full else (2,):
            call(kernels, dtype, each, (37, 20), offset, mask, (-1, -1), 0.3, False)
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
