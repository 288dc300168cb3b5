"""Convolution with activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import activations
from fastdl.activations import Activation
from fastdl.dispatch import AUTO_ORDER, is_plain, state
from fastdl.functional._call import autocast, call_reference, numbers, select
from fastdl.ops import conv as ops


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | Activation | None = None,
) -> Tensor:
    """activation(conv2d(input, weight) + bias), fused.

    As :func:`torch.nn.functional.conv2d`, with autocast; output and gradients are channels_last where torch's are.

    Args:
        input: (N, in_channels, H, W) or (in_channels, H, W); float32, float16, bfloat16 or float64.
        weight: (out_channels, in_channels / groups, R, S), of the same dtype and device.
        bias: (out_channels,) or None.
        stride, dilation: one number, or two.
        padding: the same, or ``"valid"`` (none) or ``"same"`` (as much as keeps H and W; stride 1 only).
        groups: into which channels are divided, each with kernels of its own.
        activation: as for :func:`linear`.

    Returns:
        (N, out_channels, P, Q) or (out_channels, P, Q).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes, devices, strides or paddings that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups, activation)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | Activation | None = None,
) -> Tensor:
    """activation(conv1d(input, weight) + bias), fused; as :func:`torch.nn.functional.conv1d`.

    Args:
        input: (N, in_channels, L) or (in_channels, L).
        weight: (out_channels, in_channels / groups, S).
        bias, stride, padding, dilation, groups, activation: as for :func:`conv2d`.

    Returns:
        (N, out_channels, Q) or (out_channels, Q).

    Raises:
        As :func:`conv2d`.
    """
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups, activation)


def _convolution(
    name: str,
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    activation: str | Activation | None,
) -> Tensor:
    kind, parameter = activations.resolve(activation)
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        named = {"input": input, "weight": weight, "bias": bias}
        argument, given = next(item for item in named.items() if not isinstance(item[1], Tensor))
        raise TypeError(f"{name}: {argument} must be a tensor; got {type(given).__name__}")
    if type(groups) is not int and not isinstance(groups, torch.SymInt):
        raise TypeError(f"{name}: groups must be an integer; got {groups!r}")
    rank = dimensions + 2
    sizes = "height, width" if dimensions == 2 else "length"
    if weight.dim() != rank:
        raise RuntimeError(
            f"{name}: weight has shape {tuple(weight.shape)}, allowed: (out_channels, in_channels / groups, {sizes})"
        )
    batched = input.dim() == rank
    if not batched and input.dim() != rank - 1:
        raise RuntimeError(
            f"{name}: input has shape {tuple(input.shape)}, allowed: (N, channels, {sizes}) or (channels, {sizes})"
        )
    stride = numbers(name, "stride", stride, dimensions, alone=1)
    dilation = numbers(name, "dilation", dilation, dimensions, alone=1)
    if not batched:
        input = input.unsqueeze(0)
    if dimensions == 1:  # torch, too, makes these contiguous
        input, weight = input.contiguous().unsqueeze(2), weight.unsqueeze(2)
    if isinstance(padding, str):
        input, padding = _named_padding(name, padding, input, weight, stride, dilation)
    else:
        padding = numbers(name, "padding", padding, dimensions, alone=0)
    output = _convolution_2d(input, weight, bias, (stride, padding, dilation, groups, kind, parameter))
    if dimensions == 1:
        output = output.squeeze(2)
    return output if batched else output.squeeze(0)


def _convolution_2d(input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input, weight, bias):
        return call_reference(ops.CONV, requested, input, weight, bias, *options)  # type: ignore[no-any-return]
    if input.device.type in AUTO_ORDER and torch.is_autocast_enabled(input.device.type):
        input, weight, bias = autocast(input, weight, bias)
    training = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    two_outputs = training and activations.saves(*options[-2:]) == "preactivation"
    op = ops.CONV_WITH_PREACTIVATION if two_outputs else ops.CONV
    selection = select(op, requested, training, compiling, input, weight, bias, *options)
    if selection is not None and selection.backend == "torch":
        return ops.reference(input, weight, bias, *options)
    if not training:
        return op(requested, input, weight, bias, *options, selection=selection)  # type: ignore[no-any-return]
    result: Any = ops.ConvFunction.apply(input, weight, bias, *options, requested, selection)
    return result[0] if two_outputs else result  # type: ignore[no-any-return]


def _named_padding(
    name: str, padding: str, input: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """The input, padded at its end where "same" needs more there than at the beginning, and the padding of both."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"{name}: padding is {padding!r}, allowed: 'same', 'valid' or numbers")
    if max(stride) > 1:
        raise RuntimeError(f"{name}: padding is 'same' and stride is {max(stride)}, allowed: stride 1")
    height, width = [d * (kernel - 1) for d, kernel in zip(dilation, weight.shape[2:], strict=True)]
    if height % 2 or width % 2:
        input = F.pad(input, (0, width % 2, 0, height % 2))
    return input, (height // 2, width // 2)
