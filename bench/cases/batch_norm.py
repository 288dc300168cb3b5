"""Cases of the batch_norm family: activation((x - mean) / sqrt(variance + eps) * weight + bias)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# A network's first planes, its middle and its last; small; fully connected ones; few channels.
SHAPES = [
    (32, 64, 56, 56),
    (32, 256, 14, 14),
    (32, 512, 7, 7),
    (8, 32, 8, 8),
    (512, 1024),
    (128, 256),
    (4, 3, 224, 224),
]
GPU_SHAPES = [(256, 64, 56, 56), (256, 512, 7, 7), (65536, 1024)]
RAGGED = [(9, 33), (3, 5, 7, 9), (2, 3, 70, 65)]

# (shape, channels_last, statistics of the batch, dtype, activation, direction)
QUICK = {
    ((32, 64, 56, 56), False, True, FLOAT, "relu", FORWARD),
    ((32, 64, 56, 56), False, True, BFLOAT, "relu", TRAINING),
    ((32, 64, 56, 56), True, True, FLOAT, "relu", TRAINING),
    ((32, 64, 56, 56), False, False, FLOAT, "relu", FORWARD),
    ((512, 1024), False, True, FLOAT, "relu", FORWARD),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape and memory format, with the batch's statistics and with given ones, with ReLU and without."""
    for shape in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for last in (False, True) if len(shape) == 4 else (False,):
            for batch in (True, False):
                for dtype in (FLOAT, BFLOAT, *([HALF] if device == "cuda" else [])):
                    for activation in ("relu", None):
                        for direction in (FORWARD, TRAINING) if batch else (FORWARD,):
                            quick = (shape, last, batch, dtype, activation, direction) in QUICK
                            yield _case(shape, last, batch, dtype, activation, direction, quick)


def checks() -> Iterator[Case]:
    """Ragged shapes in both memory formats, with gradients, and with a residual."""
    for shape in RAGGED:
        for last in (False, True) if len(shape) == 4 else (False,):
            for dtype in (FLOAT, BFLOAT, HALF):
                for batch in (True, False):
                    for residual in (False, True):
                        yield _case(shape, last, batch, dtype, "relu", TRAINING, True, residual)


def _case(
    shape: tuple[int, ...],
    last: bool,
    batch: bool,
    dtype: torch.dtype,
    activation: str | None,
    direction: str,
    quick: bool,
    residual: bool = False,
) -> Case:
    import fastdl

    count = torch.Size(shape).numel()
    training = direction == TRAINING
    # The batch's statistics take a pass of their own. Backward: gradient and input are read for two sums, then again
    # for the input's gradient, which is written.
    passes = (3 if batch else 2) + (5 if training else 0) + residual * (3 if training else 1)
    words = [
        "x".join(map(str, shape)),
        "channels_last" if last else "",
        "" if batch else "eval",
        "residual" if residual else "",
        activation or "",
    ]
    return Case(
        family="batch_norm",
        name=" ".join(word for word in words if word),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, last=last, dtype=dtype, residual=residual),
        call=_call(fastdl.functional.batch_norm, batch, activation),
        eager=_eager(batch, activation),
        fused=_fused(batch, activation, residual),
        flops=count * (5 + (10 if training else 0)),  # by convention: two for the sums, three for the result
        bytes=count * passes * dtype.itemsize,
        quick=quick,
        long_reduction=count // shape[1] >= 1024,
        overhead=count < 4096,
    )


def _inputs(
    generator: torch.Generator, shape: tuple[int, ...], last: bool, dtype: torch.dtype, residual: bool
) -> dict[str, Tensor]:
    # Parameters stay in float32, as under autocast.
    def image() -> Tensor:
        x = normal(generator, shape, dtype)
        return x.to(memory_format=torch.channels_last) if last else x

    inputs = {
        "input": image(),
        "weight": normal(generator, shape[1:2], FLOAT),
        "bias": normal(generator, shape[1:2], FLOAT),
    }
    return inputs | ({"residual": image()} if residual else {})


def _statistics(input: Tensor, batch: bool) -> tuple[Tensor | None, Tensor | None]:
    """None for the batch's own, else given ones, made once for each number of channels."""
    if batch:
        return None, None
    dtype = torch.float64 if input.dtype == torch.float64 else FLOAT
    return _given(input.shape[1], dtype, input.device)


@functools.cache
def _given(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    steps = torch.arange(channels, device=device) % 7
    return (steps / 5 - 0.5).to(dtype), (steps / 4 + 0.5).to(dtype)


def _call(function: Callable[..., Tensor], batch: bool, activation: str | None) -> Callable[..., Tensor]:
    def call(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, variance = _statistics(input, batch)
        return function(input, mean, variance, weight, bias, batch, activation=activation, residual=residual)

    return call


def _eager(batch: bool, activation: str | None) -> Callable[..., Tensor]:
    def call(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, variance = _statistics(input, batch)
        y = F.batch_norm(input, mean, variance, weight, bias, batch)
        y = y if residual is None else y + residual
        return y if activation is None else F.relu(y)

    return call


def _fused(batch: bool, activation: str | None, residual: bool) -> dict[str, Callable[..., Any]]:
    """torch has no fused call; one temporary less is the best that a user can do."""
    if activation is None or residual:
        return {}

    def call(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance = _statistics(input, batch)
        return F.batch_norm(input, mean, variance, weight, bias, batch).relu_()

    return {"batch_norm, relu_ in place": call}
