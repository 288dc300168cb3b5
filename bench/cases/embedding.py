"""Cases of embedding and its gradient: words of a text, whose commonest come often, and positions."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# Indices, rows of the table, columns.
SHAPES = [(4096, 30522, 384), (4096, 50257, 768), (8192, 512, 768), (256, 100, 32)]
GPU_SHAPES = [(32768, 50304, 2048)]
RAGGED = [(33, 7, 20), (130, 40, 33)]
QUICK = {
    ((4096, 30522, 384), FLOAT, FORWARD),
    ((4096, 30522, 384), FLOAT, TRAINING),
    ((8192, 512, 768), BFLOAT, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape; float16 on a GPU alone."""
    for shape in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, *([HALF] if device == "cuda" else [])):
            for direction in (FORWARD, TRAINING):
                yield _case(shape, dtype, direction, (shape, dtype, direction) in QUICK)


def checks() -> Iterator[Case]:
    """Ragged shapes, with the gradient."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            yield _case(shape, dtype, TRAINING, quick=True)


def _case(shape: tuple[int, int, int], dtype: torch.dtype, direction: str, quick: bool) -> Case:
    import fastdl

    count, rows, columns = shape
    training = direction == TRAINING
    words = 2 * count * columns + (count * columns + rows * columns if training else 0)
    return Case(
        family="embedding",
        name="x".join(map(str, shape)),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=lambda weight, indices: fastdl.functional.embedding(indices, weight),
        eager=lambda weight, indices: F.embedding(indices, weight),
        flops=count * columns if training else 0,
        bytes=words * dtype.itemsize,
        quick=quick,
        long_reduction=True,  # the commonest index
        overhead=count * columns < 16384,
    )


def _inputs(generator: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    count, rows, columns = shape
    # As often as words: the k-th with a frequency of 1 / k (Zipf, 1935).
    random = torch.rand(count, generator=generator, device=generator.device)
    indices = (torch.exp(random * torch.log(torch.tensor(rows + 1.0, device=random.device))) - 1).long()
    return {"weight": normal(generator, (rows, columns), dtype), "indices": indices.clamp(0, rows - 1)}
