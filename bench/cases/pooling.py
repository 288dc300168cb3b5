"""Cases of the pooling family, in both memory formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# name: the function's name, its arguments, outputs of a plane of h x w
POOLS: dict[str, tuple[str, tuple[Any, ...], Callable[[int, int], int]]] = {
    "max 2x2": ("max_pool2d", (2,), lambda h, w: (h // 2) * (w // 2)),
    "max 3x3 stride 2": ("max_pool2d", (3, 2, 1), lambda h, w: ((h + 1) // 2) * ((w + 1) // 2)),
    "average 2x2": ("avg_pool2d", (2,), lambda h, w: (h // 2) * (w // 2)),
    "mean": ("adaptive_avg_pool2d", (1,), lambda h, w: 1),
    "adaptive 7x7": ("adaptive_avg_pool2d", (7,), lambda h, w: 49),
}
FORMATS = {"": torch.contiguous_format, " channels_last": torch.channels_last}
# A ResNet's, and that of a model for the digits.
SHAPES = [(32, 64, 56, 56), (64, 32, 8, 8)]
GPU_SHAPES = [(128, 64, 112, 112)]
RAGGED = [(2, 5, 9, 11), (1, 19, 7, 8)]

QUICK = {
    ((32, 64, 56, 56), FLOAT, "max 2x2", "", TRAINING),
    ((32, 64, 56, 56), BFLOAT, "max 3x3 stride 2", " channels_last", FORWARD),
    ((32, 64, 56, 56), FLOAT, "average 2x2", "", TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape, pool, format and direction; float16 on a GPU only."""
    for shape in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, HALF) if device == "cuda" else (FLOAT, BFLOAT):
            for pool in POOLS:
                for format in FORMATS:
                    for direction in (FORWARD, TRAINING):
                        quick = (shape, dtype, pool, format, direction) in QUICK
                        yield _case(shape, dtype, pool, format, direction, quick)


def checks() -> Iterator[Case]:
    """Ragged shapes, with gradients."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            for pool in POOLS:
                for format in FORMATS:
                    yield _case(shape, dtype, pool, format, TRAINING, quick=True)


def _case(shape: tuple[int, ...], dtype: torch.dtype, pool: str, format: str, direction: str, quick: bool) -> Case:
    import fastdl

    n, c, h, w = shape
    name, arguments, outputs = POOLS[pool]
    pooled = n * c * outputs(h, w)
    moved = n * c * h * w + pooled
    return Case(
        family="pooling",
        name=f"{pool} of {'x'.join(map(str, shape))}{format}",
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype, format=FORMATS[format]),
        call=_call(getattr(fastdl.functional, name), arguments),
        eager=_call(getattr(F, name), arguments),
        flops=n * c * h * w * (2 if direction == TRAINING else 1),
        bytes=moved * dtype.itemsize * (2 if direction == TRAINING else 1),
        quick=quick,
        long_reduction=name == "adaptive_avg_pool2d",
        overhead=n * c * h * w < 4096,
    )


def _call(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[..., Tensor]:
    return lambda input: function(input, *arguments)


def _inputs(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format
) -> dict[str, Tensor]:
    return {"input": normal(generator, shape, dtype).contiguous(memory_format=format)}
