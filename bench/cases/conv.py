"""Cases of the conv family: activation(conv2d(input, weight) + bias)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


class Shape(NamedTuple):
    """A convolution of square images and kernels with padding that keeps their size."""

    images: int
    channels: int
    size: int
    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        name = f"{self.images}x{self.channels}x{self.size}x{self.size} {self.kernel}x{self.kernel}"
        depthwise = self.groups == self.channels == self.out_channels
        name += " depthwise" if depthwise else f" to {self.out_channels}"
        return name + (f" stride {self.stride}" if self.stride > 1 else "")


# A network for digits; ResNet's and VGG's middle; a bottleneck's 1x1; MobileNet's depthwise; an image's first layer.
SMALL = Shape(64, 16, 8, 16, 3)
MIDDLE, DEEP = Shape(32, 64, 56, 64, 3), Shape(8, 256, 14, 256, 3)
POINT, WIDE_POINT = Shape(32, 64, 56, 64, 1), Shape(8, 256, 28, 512, 1)
STRIDED = Shape(8, 128, 28, 256, 3, 2)
DEPTHWISE, DEPTHWISE_STRIDED = Shape(16, 96, 56, 96, 3, 1, 96), Shape(16, 96, 56, 96, 3, 2, 96)
FIRST = Shape(8, 3, 224, 64, 7, 2)
SHAPES = [SMALL, MIDDLE, DEEP, POINT, WIDE_POINT, STRIDED, DEPTHWISE, DEPTHWISE_STRIDED, FIRST]
GPU_SHAPES = [
    Shape(64, 64, 224, 64, 3),
    Shape(64, 128, 112, 128, 3),
    Shape(64, 256, 56, 256, 3),
    Shape(128, 512, 14, 512, 3),
    Shape(128, 256, 56, 64, 1),
    Shape(128, 64, 56, 256, 1),
    Shape(128, 144, 56, 144, 3, 1, 144),
    Shape(128, 3, 224, 64, 7, 2),
]
RAGGED = [
    Shape(2, 5, 9, 7, 3),
    Shape(2, 19, 7, 33, 1),
    Shape(1, 6, 11, 8, 3, 2, 2),
    Shape(2, 7, 9, 7, 3, 1, 7),
    Shape(2, 3, 12, 4, 5, 2),
]

QUICK = {
    (SMALL, FLOAT, False, "relu", TRAINING),
    (MIDDLE, FLOAT, True, "relu", FORWARD),
    (DEEP, BFLOAT, True, "relu", TRAINING),
    (POINT, BFLOAT, False, "relu", FORWARD),
    (WIDE_POINT, FLOAT, False, "relu", TRAINING),
    (DEPTHWISE, BFLOAT, False, None, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape, dtype, memory format and direction, with ReLU and without; float16 on a GPU only."""
    for shape in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, HALF) if device == "cuda" else (FLOAT, BFLOAT):
            for channels_last in (False, True):
                for activation in (None, "relu"):
                    for direction in (FORWARD, TRAINING):
                        quick = (shape, dtype, channels_last, activation, direction) in QUICK
                        yield _case(shape, dtype, channels_last, activation, direction, device, quick)


def checks() -> Iterator[Case]:
    """Ragged shapes in both memory formats, with gradients."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            for channels_last, activation in ((False, "relu"), (True, "gelu"), (True, None)):
                yield _case(shape, dtype, channels_last, activation, TRAINING, "cpu", quick=True)


def _case(
    shape: Shape,
    dtype: torch.dtype,
    channels_last: bool,
    activation: str | None,
    direction: str,
    device: str,
    quick: bool,
) -> Case:
    import fastdl

    training = direction == TRAINING
    out_size = (shape.size - 1) // shape.stride + 1
    pixels = shape.images * out_size**2
    terms = shape.channels // shape.groups * shape.kernel**2
    operands = shape.images * shape.channels * shape.size**2 + shape.out_channels * (terms + 1)
    outputs = pixels * shape.out_channels
    # Backward reads the output's gradient, what the activation saved, input and weight, and writes three gradients.
    backward = 2 * operands + outputs * (1 if activation is None else 2)
    options = (shape.stride, shape.kernel // 2, 1, shape.groups)
    return Case(
        family="conv",
        name=f"{shape}{' channels_last' if channels_last else ''}{f' {activation}' if activation else ''}",
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype, channels_last=channels_last),
        call=functools.partial(_call, fastdl.functional.conv2d, options, activation),
        eager=functools.partial(_eager, options, activation),
        fused={} if training else _fused(options, activation, device),
        flops=2 * pixels * shape.out_channels * terms * (3 if training else 1),
        bytes=(operands + outputs + (backward if training else 0)) * dtype.itemsize,
        quick=quick,
        long_reduction=max(terms, pixels if training else 0) >= 1024,
    )


def _inputs(generator: torch.Generator, shape: Shape, dtype: torch.dtype, channels_last: bool) -> dict[str, Tensor]:
    format = torch.channels_last if channels_last else torch.contiguous_format
    channels = shape.channels // shape.groups
    scale = (channels * shape.kernel**2) ** -0.5
    weight = normal(generator, (shape.out_channels, channels, shape.kernel, shape.kernel), dtype, scale)
    return {
        "input": normal(generator, (shape.images, shape.channels, shape.size, shape.size), dtype).to(
            memory_format=format
        ),
        "weight": weight.to(memory_format=format),
        "bias": normal(generator, (shape.out_channels,), dtype),
    }


def _call(
    function: Callable[..., Tensor],
    options: tuple[int, ...],
    activation: str | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    return function(input, weight, bias, *options, activation=activation)


def _eager(options: tuple[int, ...], activation: str | None, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    z = F.conv2d(input, weight, bias, *options)
    return z if activation is None else getattr(F, activation)(z)


def _fused(options: tuple[int, ...], activation: str | None, device: str) -> dict[str, Callable[..., Any]]:
    """torch's calls that do convolution, bias and activation in one."""
    stride, padding, dilation, groups = options
    pairs = [padding] * 2, [stride] * 2, [dilation] * 2, groups
    if device == "cuda":
        if activation != "relu":
            return {}
        return {
            "cudnn_convolution_relu": lambda input, weight, bias: torch.cudnn_convolution_relu(
                input, weight, bias, pairs[1], pairs[0], pairs[2], groups
            )
        }
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return {}
    return {
        "mkldnn._convolution_pointwise": lambda input, weight, bias: torch.ops.mkldnn._convolution_pointwise(
            input, weight, bias, *pairs, activation or "none", [], ""
        )
    }
