"""Cases of dropout: bound by memory and by the making of random numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(4096, 1024), (256, 256)]
RAGGED = [(7, 131), (1023,)]
# So small that nothing is dropped: all the work is done, and results can be compared with torch's, which draws others.
P = 1e-12


def timed(device: str) -> Iterator[Case]:
    """A large tensor and one that fits in a cache."""
    for shape in SHAPES + ([(16384, 4096)] if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, *([HALF] if device == "cuda" else [])):
            for direction in (FORWARD, TRAINING):
                yield _case(shape, dtype, direction, quick=shape == SHAPES[0] and dtype == FLOAT)


def checks() -> Iterator[Case]:
    """Ragged sizes, with gradients."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            yield _case(shape, dtype, TRAINING, quick=True)


def _case(shape: tuple[int, ...], dtype: torch.dtype, direction: str, quick: bool) -> Case:
    import fastdl

    count, training = torch.Size(shape).numel(), direction == TRAINING
    return Case(
        family="dropout",
        name="x".join(map(str, shape)),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=functools.partial(fastdl.functional.dropout, p=P),
        eager=functools.partial(F.dropout, p=P),
        flops=count * (2 if training else 1),  # by convention one an element and direction
        bytes=count * dtype.itemsize * (4 if training else 2),
        quick=quick,
    )


def _inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input": normal(generator, shape, dtype)}
