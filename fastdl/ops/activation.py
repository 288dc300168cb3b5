"""Standalone activations: one op forward, one backward, for every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdl import accuracy, activations
from fastdl.dispatch import Op, Support
from fastdl.ops import _native


def _check(input: Tensor, kind: int, parameter: float) -> None:
    name = activations.kind_name(kind)
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor; got {type(input).__name__}")
    if not activations.accepts(input.dtype, kind):
        raise RuntimeError(f"{name}: input has dtype {input.dtype}, allowed: floating-point dtypes")


def _limit(first: Tensor, *arguments: Any) -> str | None:
    return activations.limit(*arguments[-2:])


def _shape_class(input: Tensor, kind: int, parameter: float) -> tuple[str, tuple[int, ...]]:
    return activations.kind_name(kind), (input.numel(),)


ACTIVATION = Op(
    "activation(Tensor input, int kind, float parameter, str backend) -> Tensor",
    fake=lambda input, kind, parameter, backend: torch.empty_like(input),
    reference=activations.reference,
    tensors=1,
    multiple=accuracy.MULTIPLE,
    shape_class=_shape_class,
    check=_check,
)
ACTIVATION_BACKWARD = Op(
    "activation_backward(Tensor grad_output, Tensor saved, int kind, float parameter, str backend) -> Tensor",
    fake=lambda grad_output, saved, kind, parameter, backend: torch.empty_like(saved),
    reference=activations.reference_gradient,
    tensors=2,
    multiple=accuracy.MULTIPLE,
)


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself if its elements fill memory without gaps or overlap, in any order; else a contiguous copy."""
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.contiguous()


def _native_activation(backend: str) -> None:
    @ACTIVATION.implement(backend, Support(_native.FLOATING, _limit))
    def forward(input: Tensor, kind: int, parameter: float) -> Tensor:
        input = dense(input)
        output = torch.empty_like(input)
        _native.kernels(backend).activation(
            _native.DTYPE_CODES[input.dtype],
            input.data_ptr(),
            output.data_ptr(),
            input.numel(),
            kind,
            parameter,
            _native.context(input),
        )
        return output

    @ACTIVATION_BACKWARD.implement(backend, Support(_native.FLOATING, _limit))
    def backward(grad_output: Tensor, saved: Tensor, kind: int, parameter: float) -> Tensor:
        saved = dense(saved)
        grad_output = like_layout(grad_output, saved)
        grad_input = torch.empty_like(saved)
        _native.kernels(backend).activation_backward(
            _native.DTYPE_CODES[saved.dtype],
            grad_output.data_ptr(),
            saved.data_ptr(),
            grad_input.data_ptr(),
            saved.numel(),
            kind,
            parameter,
            _native.context(saved),
        )
        return grad_input


def like_layout(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor with the strides of ``other``, which is dense and of the same shape; a copy only where they differ."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other).copy_(tensor)


_native_activation("cpu")
_native_activation("cuda")


@ACTIVATION.implement("triton", Support(_native.FLOATING, _limit))
def _triton_forward(input: Tensor, kind: int, parameter: float) -> Tensor:
    from fastdl.kernels import activation as kernels

    input = dense(input)
    output = torch.empty_like(input)
    kernels.activation(input, output, kind, parameter)
    return output


@ACTIVATION_BACKWARD.implement("triton", Support(_native.FLOATING, _limit))
def _triton_backward(grad_output: Tensor, saved: Tensor, kind: int, parameter: float) -> Tensor:
    from fastdl.kernels import activation as kernels

    saved = dense(saved)
    grad_input = torch.empty_like(saved)
    kernels.activation_backward(like_layout(grad_output, saved), saved, grad_input, kind, parameter)
    return grad_input


class ActivationFunction(torch.autograd.Function):
    """Autograd of a standalone activation: saves its output, or its input where only that tells the gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, kind: int, parameter: float, requested: str, selection: Any) -> Tensor:
        output: Tensor = ACTIVATION(requested, input, kind, parameter, selection=selection)
        ctx.save_for_backward(output if activations.saves(kind, parameter) == "output" else input)
        ctx.arguments = kind, parameter, requested
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kind, parameter, requested = ctx.arguments
        (saved,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
            grad_input = activations.reference_gradient(grad_output, saved, kind, parameter)
        else:
            grad_input = ACTIVATION_BACKWARD(requested, grad_output, saved, kind, parameter)
        return grad_input, None, None, None, None
