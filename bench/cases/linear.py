"""Cases of the linear family: activation(input @ weight^T + bias)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu}
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

# (M, K, N): wide output from little work; small; compute-bound; few rows; the cost of a call.
SHAPES = [(4096, 64, 4096), (128, 128, 128), (1024,) * 3, (2048,) * 3, (64, 1024, 1024), (1, 8, 8)]
GPU_SHAPES = [(4096,) * 3, (8192,) * 3, (8192, 256, 8192), (16384, 1024, 4096)]
RAGGED = [(37, 29, 41), (1, 8, 8), (130, 70, 65)]

QUICK = {
    ((1, 8, 8), FLOAT, None, FORWARD),
    ((1, 8, 8), FLOAT, "relu", TRAINING),
    ((128, 128, 128), FLOAT, "relu", FORWARD),
    ((128, 128, 128), HALF, "relu", FORWARD),
    ((64, 1024, 1024), FLOAT, "relu", FORWARD),
    ((64, 1024, 1024), BFLOAT, "relu", FORWARD),
    ((4096, 64, 4096), FLOAT, "relu", FORWARD),
    ((4096, 64, 4096), BFLOAT, "relu", FORWARD),
    ((4096, 64, 4096), BFLOAT, "gelu", FORWARD),
    ((4096, 64, 4096), FLOAT, "relu", TRAINING),
    ((4096, 64, 4096), BFLOAT, "relu", TRAINING),
    ((1024, 1024, 1024), FLOAT, "relu", FORWARD),
    ((1024, 1024, 1024), BFLOAT, "relu", FORWARD),
    ((1024, 1024, 1024), FLOAT, "gelu", TRAINING),
    ((2048, 2048, 2048), FLOAT, None, FORWARD),
    ((4096, 4096, 4096), BFLOAT, "relu", FORWARD),
    ((4096, 4096, 4096), BFLOAT, "gelu", TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape, dtype, activation and direction; float16 on a CPU once, where torch has no fast kernel for it."""
    for shape in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, HALF):
            for activation in ACTIVATIONS:
                for direction in (FORWARD, TRAINING):
                    quick = (shape, dtype, activation, direction) in QUICK
                    if dtype != HALF or device == "cuda" or quick:
                        yield _case(shape, dtype, activation, direction, device, quick)


def checks() -> Iterator[Case]:
    """Ragged shapes and every activation, with gradients."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            for activation in ACTIVATIONS:
                yield _case(shape, dtype, activation, TRAINING, "cpu", quick=True)


def _case(
    shape: tuple[int, ...], dtype: torch.dtype, activation: str | None, direction: str, device: str, quick: bool
) -> Case:
    import fastdl

    m, k, n = shape
    training = direction == TRAINING
    # Forward reads input, weight and bias and writes the output; backward reads the output's gradient, what the
    # activation saved, input and weight, and writes three gradients.
    operands, outputs = m * k + n * k + n, m * n
    backward = (2 * operands - n) + outputs * (1 if activation is None else 2)
    return Case(
        family="linear",
        name=f"{m}x{k}x{n}" + (f" {activation}" if activation else ""),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=functools.partial(fastdl.functional.linear, activation=activation),
        eager=_eager(activation),
        fused=_fused(activation, training, device),
        flops=2 * m * k * n * (3 if training else 1),
        bytes=(operands + outputs + (backward if training else 0)) * dtype.itemsize,
        quick=quick,
        long_reduction=max(k, m if training else 0, n if training else 0) >= 1024,
        overhead=m * k * n < 4096,
    )


def _inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    m, k, n = shape
    return {
        "input": normal(generator, (m, k), dtype),
        "weight": normal(generator, (n, k), dtype, 1 / math.sqrt(k)),
        "bias": normal(generator, (n,), dtype),
    }


def _eager(activation: str | None) -> Callable[..., Tensor]:
    function = ACTIVATIONS[activation]
    return lambda input, weight, bias: function(F.linear(input, weight, bias))


def _fused(activation: str | None, training: bool, device: str) -> dict[str, Callable[..., Any]]:
    """torch's calls that do matmul, bias and activation in one, or as much of it as torch can."""
    fused: dict[str, Callable[..., Any]] = {}
    if activation is not None:
        gelu = activation == "gelu"  # on a GPU its tanh form: the correctness gate leaves it out where that differs
        fused["_addmm_activation"] = lambda input, weight, bias: torch._addmm_activation(
            bias, input, weight.t(), use_gelu=gelu
        )
    if device == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        attribute = activation or "none"
        fused["mkldnn._linear_pointwise"] = lambda input, weight, bias: torch.ops.mkldnn._linear_pointwise(
            input, weight, bias, attribute, [], "none" if attribute == "gelu" else ""
        )
    if not training:
        return fused
    if activation != "relu":  # no fused call of torch's returns the pre-activation that these gradients need
        return {}
    training_calls = {f"{name} + formula": functools.partial(_fused_relu, function) for name, function in fused.items()}
    return {
        "linear, relu_ in place": lambda input, weight, bias: F.linear(input, weight, bias).relu_()
    } | training_calls


def _fused_relu(forward: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    output: Tensor = _FusedReLU.apply(forward, input, weight, bias)
    return output


class _FusedReLU(torch.autograd.Function):
    """What a torch user can write by hand: a fused forward with the gradients in torch's own calls."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = forward(input, weight, bias)
        ctx.save_for_backward(input, weight, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, output = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(grad_output, output, 0)
        return None, gradient @ weight, gradient.t() @ input, gradient.sum(0)
