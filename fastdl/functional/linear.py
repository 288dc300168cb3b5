"""The linear layer with activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdl import activations
from fastdl.activations import Activation
from fastdl.dispatch import AUTO_ORDER, is_plain, state
from fastdl.functional._call import autocast, call_reference, select
from fastdl.ops import linear as ops


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | Activation | None = None
) -> Tensor:
    """activation(input @ weight.T + bias), fused.

    As :func:`torch.nn.functional.linear`, with autocast, any leading dimensions and any strides.

    Args:
        input: (*, in_features); float32, float16, bfloat16 or float64.
        weight: (out_features, in_features), of the same dtype and device.
        bias: (out_features,) or None.
        activation: a name (``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"sigmoid"``, ``"tanh"``, ``"gelu"``,
            ``"silu"``), an :class:`fastdl.Activation`, or None.

    Returns:
        (*, out_features).

    Raises:
        TypeError: an argument that is not a tensor, or an activation that is neither name nor Activation.
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    kind, parameter = activations.resolve(activation)
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input, weight, bias):
        return call_reference(ops.LINEAR, requested, input, weight, bias, kind, parameter)  # type: ignore[no-any-return]
    if input.device.type in AUTO_ORDER and torch.is_autocast_enabled(input.device.type):
        input, weight, bias = autocast(input, weight, bias)
    training = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    two_outputs = training and activations.saves(kind, parameter) == "preactivation"
    op = ops.LINEAR_WITH_PREACTIVATION if two_outputs else ops.LINEAR
    selection = select(op, requested, training, compiling, input, weight, bias, kind, parameter)
    if selection is not None and selection.backend == "torch":
        return ops.reference(input, weight, bias, kind, parameter)
    if not training:
        return op(requested, input, weight, bias, kind, parameter, selection=selection)  # type: ignore[no-any-return]
    result: Any = ops.LinearFunction.apply(input, weight, bias, kind, parameter, requested, selection)
    return result[0] if two_outputs else result  # type: ignore[no-any-return]
