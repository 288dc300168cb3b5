"""Cases of softmax and its logarithm, over rows and across them: bound by memory where rows fit in a cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# Attention's scores, classes of images, a vocabulary, classes of pixels.
SHAPES = [((96, 512, 512), 2), ((4096, 1000), 1), ((256, 50257), 1), ((8, 21, 128, 128), 1)]
GPU_SHAPES = [((65536, 1024), 1), ((8192, 50304), 1), ((32, 150, 256, 256), 1)]
RAGGED = [((5, 33), 1), ((3, 1025), 1), ((2, 7, 9), 1), ((4, 130, 3), 1)]
QUICK = {
    ((96, 512, 512), FLOAT, False, FORWARD),
    ((96, 512, 512), BFLOAT, False, TRAINING),
    ((256, 50257), FLOAT, True, TRAINING),
    ((8, 21, 128, 128), FLOAT, False, FORWARD),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape, with the logarithm and without; float16 on a GPU alone."""
    for shape, dim in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, *([HALF] if device == "cuda" else [])):
            for log in (False, True):
                for direction in (FORWARD, TRAINING):
                    yield _case(shape, dim, dtype, log, direction, (shape, dtype, log, direction) in QUICK)


def checks() -> Iterator[Case]:
    """Ragged shapes, with gradients."""
    for shape, dim in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            for log in (False, True):
                yield _case(shape, dim, dtype, log, TRAINING, quick=True)


def _case(shape: tuple[int, ...], dim: int, dtype: torch.dtype, log: bool, direction: str, quick: bool) -> Case:
    import fastdl

    count = torch.Size(shape).numel()
    training = direction == TRAINING
    name = "log_softmax" if log else "softmax"
    return Case(
        family="softmax",
        name=f"{'x'.join(map(str, shape))} dim {dim}{' log' if log else ''}",
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=functools.partial(getattr(fastdl.functional, name), dim=dim),
        eager=functools.partial(getattr(F, name), dim=dim),
        flops=count * (4 if training else 2),  # by convention two an element and direction
        bytes=count * dtype.itemsize * (5 if training else 2),  # backward reads two tensors and writes one
        quick=quick,
        long_reduction=shape[dim] >= 1024,
        overhead=count < 4096,
    )


def _inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input": normal(generator, shape, dtype, 2.0)}
