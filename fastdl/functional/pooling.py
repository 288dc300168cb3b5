"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import state
from fastdl.functional._call import numbers, unary
from fastdl.ops import pooling as ops


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of an image; as :func:`torch.nn.functional.max_pool2d`.

    The gradient goes to the first maximum of a window, and is the same in every run.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        kernel_size, stride, padding, dilation: a number, or one for H and one for W; stride: kernel_size by default;
            padding: at most half of kernel_size.
        ceil_mode: whether a window may reach over the right and lower edge.
        return_indices: whether to return where the maxima are too.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's memory format; with return_indices also int64 places in H x W.

    Raises:
        TypeError: an argument that is not of its type.
        RuntimeError: sizes that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    name, requested = "max_pool2d", state.requested
    kernel_size = numbers(name, "kernel_size", kernel_size)
    stride = numbers(name, "stride", kernel_size if stride is None else stride, empty=kernel_size)
    windows = (
        kernel_size,
        stride,
        numbers(name, "padding", padding),
        numbers(name, "dilation", dilation),
        bool(ceil_mode),
    )
    plain = ops.MAX_POOL2D, ops.MAX_POOL2D_WITH_INDICES
    # A gradient needs to know where the maxima are.
    if not return_indices and not (isinstance(input, Tensor) and input.requires_grad and torch.is_grad_enabled()):
        return unary(plain[0], None, requested, input, *windows)
    compact = not return_indices and kernel_size[0] * kernel_size[1] <= ops.COMPACT_WINDOW
    result = unary(
        plain[1],
        ops.MaxPool2dFunction.apply,
        requested,
        input,
        *windows,
        compact,
        reference=_max_pool2d_of_torch if not return_indices else None,
    )
    return result[0] if isinstance(result, tuple) and not return_indices else result


def _max_pool2d_of_torch(input: Tensor, *arguments: Any) -> Tensor:
    """By torch, which keeps the places for its gradient itself."""
    *windows, _ = arguments
    return F.max_pool2d(input, *windows)  # type: ignore[no-any-return]


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of each window of an image; as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        kernel_size, stride, padding, ceil_mode: as for :func:`max_pool2d`.
        count_include_pad: whether the padding's zeros count.
        divisor_override: by what to divide each window's sum, if not by its size.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's memory format.

    Raises:
        As :func:`max_pool2d`.
    """
    name = "avg_pool2d"
    kernel_size = numbers(name, "kernel_size", kernel_size)
    stride = numbers(name, "stride", kernel_size if stride is None else stride, empty=kernel_size)
    windows = kernel_size, stride, numbers(name, "padding", padding), bool(ceil_mode), bool(count_include_pad)
    return unary(  # type: ignore[no-any-return]
        ops.AVG_POOL2D, ops.AvgPool2dFunction.apply, state.requested, input, *windows, divisor_override
    )


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Averages of OH x OW windows that cover an image; as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        output_size: a number, or one for H and one for W; None: the input's.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's memory format.

    Raises:
        As :func:`max_pool2d`.
    """
    name = "adaptive_avg_pool2d"
    if isinstance(output_size, Sequence) and isinstance(input, Tensor) and input.dim() >= 2:
        if len(output_size) != 2:
            raise RuntimeError(f"{name}: output_size is {tuple(output_size)}, allowed: a number or two")
        output_size = [n if o is None else o for o, n in zip(output_size, input.shape[-2:], strict=True)]
    size = numbers(name, "output_size", output_size)
    return unary(  # type: ignore[no-any-return]
        ops.ADAPTIVE_AVG_POOL2D, ops.AdaptiveAvgPool2dFunction.apply, state.requested, input, size
    )


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    output_size: int | Sequence[int] | None = None,
    output_ratio: Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """The maximum of windows at random steps (Graham, 2014); as :func:`torch.nn.functional.fractional_max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size: a number, or one for H and one for W.
        output_size: OH and OW, a number or two; or instead
        output_ratio: OH / H and OW / W.
        return_indices: whether to return where the maxima are too.
        _random_samples: (N, C, 2) in [0, 1); drawn as torch draws them if None.

    Returns:
        (N, C, OH, OW) or (C, OH, OW); with return_indices also int64 places in H x W.

    Raises:
        ValueError: neither output_size nor output_ratio.
        As :func:`max_pool2d`.
    """
    name = "fractional_max_pool2d"
    kernel_size = numbers(name, "kernel_size", kernel_size)
    if not isinstance(input, Tensor) or input.dim() not in (3, 4):
        ops.check_input(name, input)
    if output_size is None:
        if output_ratio is None:
            raise ValueError(f"{name}: output_size and output_ratio are None, allowed: one of them")
        if len(output_ratio) != 2:
            raise ValueError(f"{name}: output_ratio is {tuple(output_ratio)}, allowed: two numbers")
        output_size = [int(n * ratio) for n, ratio in zip(input.shape[-2:], output_ratio, strict=True)]
    if _random_samples is None:
        batch = 1 if input.dim() == 3 else input.shape[0]
        _random_samples = torch.rand(batch, input.shape[-3], 2, dtype=input.dtype, device=input.device)
    arguments = _random_samples, kernel_size, numbers(name, "output_size", output_size)
    op, function = ops.FRACTIONAL_MAX_POOL2D, ops.FractionalMaxPool2dFunction.apply
    result = unary(op, function, state.requested, input, *arguments)
    return result if return_indices else result[0]
