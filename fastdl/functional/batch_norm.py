"""Batch normalisation with residual and activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import activations
from fastdl.activations import Activation
from fastdl.dispatch import is_plain, state
from fastdl.functional._call import select, select_reference
from fastdl.ops import batch_norm as ops


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation((input - mean) / sqrt(variance + eps) * weight + bias + residual), fused (Ioffe and Szegedy, 2015).

    As :func:`torch.nn.functional.batch_norm`. In training mean and (biased) variance are those of each channel over the
    batch, and the running statistics move by ``momentum`` towards mean and unbiased variance; in evaluation the running
    statistics are mean and variance.

    Args:
        input: (N, C, *), any strides; float32, float16, bfloat16 or float64.
        running_mean, running_var: (C,); both None in training that keeps no running statistics.
        weight, bias: (C,) or None. These and the running statistics have input's dtype, or float32 for 16-bit input.
        activation: as for :func:`linear`.
        residual: of input's shape and dtype, added before the activation.

    Returns:
        Of input's shape and dtype; channels_last where input is, else contiguous.

    Raises:
        TypeError: an argument that is not a tensor, or an activation that is neither name nor Activation.
        ValueError: one value a channel in training, an eps that is not positive, one running statistic of two, or an
            unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit, or no running statistics in evaluation.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    kind, parameter = activations.resolve(activation)
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    op = ops.BATCH_NORM if training else ops.BATCH_NORM_INFERENCE
    statistics = () if training else (running_mean, running_var)
    arguments = (input, weight, bias, residual, *statistics, eps, kind, parameter)
    plain = is_plain(compiling, input, running_mean, running_var, weight, bias, residual)
    if plain:
        ops.check_running(input, running_mean, running_var, training)
        needs_gradient = torch.is_grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
        selection = select(op, requested, needs_gradient, compiling, *arguments)
    else:
        selection = select_reference(op, requested, *arguments)
    if selection is not None and selection.backend == "torch":
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return activations.reference(y if residual is None else y + residual, kind, parameter)
    if not needs_gradient:
        result: Any = op(requested, *arguments, selection=selection)
        if not training:
            return result  # type: ignore[no-any-return]
        output, mean, _, variance = result
    else:
        statistics = (None, None) if training else statistics
        result = ops.BatchNormFunction.apply(
            input, weight, bias, residual, *statistics, eps, kind, parameter, requested, selection
        )
        if not training:
            return result  # type: ignore[no-any-return]
        output, mean, variance = result
    if running_mean is not None and running_var is not None and input.numel():
        ops.update_running(running_mean, running_var, mean, variance, momentum)
    return output  # type: ignore[no-any-return]
