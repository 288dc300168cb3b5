"""Cases of the cross entropy, of logits and of a linear layer's: gradients with the loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# Digits, classes of images, a vocabulary, classes of pixels.
SHAPES = [(128, 10), (4096, 1000), (512, 50257), (8, 21, 128, 128)]
GPU_SHAPES = [(8192, 50304), (16384, 32000), (32, 150, 256, 256)]
# Rows, features, classes of a linear layer.
LINEAR = [(1024, 256, 30522)]
GPU_LINEAR = [(8192, 4096, 50304), (16384, 2048, 32000)]
RAGGED = [(5, 33), (3, 1025), (2, 7, 9)]
RAGGED_LINEAR = [(9, 20, 33)]
SMOOTHING = 0.1
QUICK = {
    ((4096, 1000), FLOAT, 0.0, TRAINING),
    ((512, 50257), FLOAT, 0.0, TRAINING),
    ((512, 50257), BFLOAT, SMOOTHING, TRAINING),
    ((8, 21, 128, 128), FLOAT, 0.0, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape, with label smoothing and without; float16 on a GPU alone."""
    gpu = device == "cuda"
    for dtype in (FLOAT, BFLOAT, *([HALF] if gpu else [])):
        for direction in (FORWARD, TRAINING):
            for shape in SHAPES + (GPU_SHAPES if gpu else []):
                for smoothing in (0.0, SMOOTHING):
                    yield _case(shape, dtype, smoothing, direction, (shape, dtype, smoothing, direction) in QUICK)
            for sizes in LINEAR + (GPU_LINEAR if gpu else []):
                yield _linear_case(sizes, dtype, direction, quick=gpu and sizes == GPU_LINEAR[0] and dtype == BFLOAT)


def checks() -> Iterator[Case]:
    """Ragged shapes, with gradients."""
    for dtype in (FLOAT, BFLOAT, HALF):
        for shape in RAGGED:
            for smoothing in (0.0, SMOOTHING):
                yield _case(shape, dtype, smoothing, TRAINING, quick=True)
        for sizes in RAGGED_LINEAR:
            yield _linear_case(sizes, dtype, TRAINING, quick=True)


def _case(shape: tuple[int, ...], dtype: torch.dtype, smoothing: float, direction: str, quick: bool) -> Case:
    import fastdl

    count = torch.Size(shape).numel()
    training = direction == TRAINING
    return Case(
        family="cross_entropy",
        name="x".join(map(str, shape)) + (" smoothed" if smoothing else ""),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=functools.partial(fastdl.functional.cross_entropy, label_smoothing=smoothing),
        eager=functools.partial(F.cross_entropy, label_smoothing=smoothing),
        flops=count * (4 if training else 2),  # by convention two an element and direction
        bytes=count * dtype.itemsize * (3 if training else 1),  # backward reads the logits again and writes a gradient
        quick=quick,
        long_reduction=shape[1] >= 1024 or count // shape[1] >= 1024,
        overhead=count < 4096,
    )


def _inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    rows = (shape[0], *shape[2:])
    target = torch.randint(0, shape[1], rows, generator=generator, device=generator.device)
    return {"input": normal(generator, shape, dtype, 2.0), "target": target}


def _linear_case(sizes: tuple[int, int, int], dtype: torch.dtype, direction: str, quick: bool) -> Case:
    import fastdl

    rows, features, classes = sizes
    training = direction == TRAINING
    return Case(
        family="cross_entropy",
        name="linear " + "x".join(map(str, sizes)),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_linear_inputs, sizes=sizes, dtype=dtype),
        call=fastdl.functional.linear_cross_entropy,
        eager=_linear_eager,
        fused=_linear_fused(),
        flops=2 * rows * features * classes * (3 if training else 1),
        # Inputs once, and their gradients: the logits need never be in memory.
        bytes=(rows + classes) * features * dtype.itemsize * (2 if training else 1),
        quick=quick,
        op="linear_cross_entropy",
        long_reduction=max(sizes) >= 1024,
    )


def _linear_inputs(generator: torch.Generator, sizes: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    rows, features, classes = sizes
    return {
        "input": normal(generator, (rows, features), dtype),
        "linear_weight": normal(generator, (classes, features), dtype, 1 / math.sqrt(features)),
        "target": torch.randint(0, classes, (rows,), generator=generator, device=generator.device),
    }


def _linear_eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight), target)


def _linear_fused() -> dict[str, Callable[..., Any]]:
    """torch's own chunked function, which newer versions have."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return {
        "linear_cross_entropy, chunked": lambda input, linear_weight, target: F.linear_cross_entropy(
            input, linear_weight, target, options=options
        )
    }
