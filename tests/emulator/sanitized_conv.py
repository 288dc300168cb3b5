"""Calls the emulated convolution on heap blocks of exact size: python sanitized_conv.py MODULE FULL.

As sanitized_calls.py. FULL: 1 for all dtypes, layouts and geometries.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys

from sanitized_calls import array, libc


def image(shape: tuple[int, ...], dtype: int, layout: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Address, sizes and strides."""
    n, c, h, w = shape
    if layout == "expanded":
        return array(1, dtype), shape, (0, 0, 0, 0)
    strides = (c * h * w, 1, w * c, c) if layout == "last" else (c * h * w, h * w, w, 1)
    return array(n * c * h * w, dtype, layout == "offset"), shape, strides


def call(kernels, dtype: int, tf32: bool, x_shape, w_shape, geometry, kind: int, layouts: tuple[str, str, str]) -> None:
    """Forward and all gradients."""
    stride, padding, dilation, _ = geometry
    sizes = zip(x_shape[2:], w_shape[2:], stride, padding, dilation, strict=True)
    extents = ((size + 2 * p - d * (kernel - 1) - 1) // s + 1 for size, kernel, s, p, d in sizes)
    y_shape = (x_shape[0], w_shape[0], *extents)
    x, w, g = (image(*each) for each in zip((x_shape, w_shape, y_shape), (dtype,) * 3, layouts, strict=True))
    y_layout = "last" if layouts[0] == "last" else "contiguous"
    y, dx, dw = (image(shape, dtype, y_layout) for shape in (y_shape, x_shape, w_shape))
    bias, grad_bias, z = array(w_shape[0], dtype), array(w_shape[0], dtype), array(math.prod(y_shape), dtype)
    space = libc.malloc(max(kernels.conv_workspace(dtype, x, w, y, *geometry, tf32), 1))
    kernels.conv(dtype, x, w, bias, y, z, *geometry, kind, 0.5, tf32, space, 0)
    arguments = (dtype, g, x, w, dx, dw, grad_bias, *geometry, tf32)
    space = libc.malloc(max(kernels.conv_backward_workspace(*arguments), 1))
    kernels.conv_backward(*arguments, space, 0)


def main(path: str, full: bool) -> None:
    spec = importlib.util.spec_from_file_location("_emulated", path)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    kernels.configure(schedule="random", completion="random", seed=3, resident=2)
    arithmetics = [(1, False), (2, False), (0, True), (0, False), (3, False)]
    cases = [
        ((1, 8, 7, 6), (8, 8, 3, 3), ((1, 1), (1, 1), (1, 1), 1)),
        ((1, 6, 7, 6), (9, 2, 3, 2), ((2, 2), (1, 0), (1, 2), 3)),
        ((1, 8, 7, 6), (8, 1, 3, 3), ((1, 2), (1, 1), (1, 1), 8)),
    ]
    if full:
        layouts = [("last", "last", "last"), ("contiguous", "contiguous", "expanded"), ("offset", "last", "offset")]
        for (dtype, tf32), case, each in itertools.product(arithmetics, cases, layouts):
            call(kernels, dtype, tf32, *case, 8, each)
        for dtype, tf32 in arithmetics:
            call(kernels, dtype, tf32, (1, 4, 9, 20), (264, 4, 3, 3), cases[0][2], 0, layouts[0])
            call(kernels, dtype, tf32, (1, 16, 20, 20), (16, 16, 3, 3), cases[0][2], 0, layouts[0])  # split
    else:
        for (dtype, tf32), case in itertools.product(((1, False), (0, False)), cases):
            call(kernels, dtype, tf32, *case, 1, ("last", "contiguous", "last"))
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
