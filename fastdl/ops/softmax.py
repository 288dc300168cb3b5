"""Softmax and its logarithm along a dimension: ops, gradients and implementations by backend.

A dense tensor's memory is seen as (outer, size, inner) around the dimension: element (o, k, i) lies at
(o * size + k) * inner + i. So no memory format and no dimension asks for a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native
from fastdl.ops.activation import dense, like_layout


def reference(input: Tensor, dim: int, log: bool) -> Tensor:
    """softmax(input, dim) or its logarithm by torch's operators, in input's memory format where it is dense."""
    return like_layout(torchs(input, dim, log), empty_result(input))


def torchs(input: Tensor, dim: int, log: bool) -> Tensor:
    """torch's own."""
    return torch.log_softmax(input, dim) if log else torch.softmax(input, dim)


def reference_backward(grad_output: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient of the input by torch's operators, so that double backward follows by autograd."""
    function = torch._log_softmax_backward_data if log else torch._softmax_backward_data
    return function(grad_output, output, dim, output.dtype)


def empty_result(input: Tensor) -> Tensor:
    """An uninitialised output for an input: as that lies in memory if it is dense, else contiguous."""
    is_dense = input.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(input)
    return torch.empty_like(input, memory_format=torch.preserve_format if is_dense else torch.contiguous_format)


def _check(input: Tensor, dim: int, log: bool) -> None:
    name = "log_softmax" if log else "softmax"
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor; got {type(input).__name__}")
    if not input.is_floating_point():
        raise NotImplementedError(f"{name}: input has dtype {input.dtype}, allowed: floating-point dtypes")


def extents(tensor: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, size, inner) of a dense tensor that is not empty."""
    size = tensor.shape[dim] if tensor.dim() else 1
    inner = tensor.stride(dim) if size > 1 else 1  # a dimension of size 1 lies anywhere
    return tensor.numel() // (size * inner), size, inner


def _shape_class(input: Tensor, dim: int, log: bool) -> tuple[str, tuple[int, ...]]:
    size = input.shape[dim] if input.dim() else 1
    last = dim == input.dim() - 1
    return "last dimension" if last else "inner dimension", (input.numel() // max(size, 1), size)


SOFTMAX = Op(
    "softmax(Tensor input, int dim, bool log, str backend) -> Tensor",
    fake=lambda input, dim, log, backend: empty_result(input),
    reference=reference,
    tensors=1,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check,
)
SOFTMAX_BACKWARD = Op(
    "softmax_backward(Tensor grad_output, Tensor output, int dim, bool log, str backend) -> Tensor",
    fake=lambda grad_output, output, dim, log, backend: empty_result(output),
    reference=lambda grad_output, output, dim, log: like_layout(
        reference_backward(grad_output, output, dim, log), empty_result(output)
    ),
    tensors=2,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


# ---------------------------------------------------------------------------------------- native: cpu, cuda and triton


def _implement(backend: str, forward: Any, backward: Any) -> None:
    """Adds a backend that has both directions for dense tensors that are not empty, seen by :func:`extents`."""

    @SOFTMAX.implement(backend, Support(_native.FLOATING))
    def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
        input = dense(input)
        output = _native.empty_like(input, torch.preserve_format)
        if input.numel():
            forward(extents(input, dim), input, output, log)
        return output

    @SOFTMAX_BACKWARD.implement(backend, Support(_native.FLOATING))
    def softmax_backward(grad_output: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
        output = dense(output)
        grad_input = _native.empty_like(output, torch.preserve_format)
        if output.numel():
            backward(extents(output, dim), like_layout(grad_output, output), output, grad_input, log)
        return grad_input


def _native_functions(backend: str) -> tuple[Any, Any]:
    def forward(view: tuple[int, int, int], input: Tensor, output: Tensor, log: bool) -> None:
        _native.kernels(backend).softmax(
            _native.DTYPE_CODES[input.dtype], *view, input.data_ptr(), output.data_ptr(), log, _native.context(input)
        )

    def backward(
        view: tuple[int, int, int], grad_output: Tensor, output: Tensor, grad_input: Tensor, log: bool
    ) -> None:
        _native.kernels(backend).softmax_backward(
            _native.DTYPE_CODES[output.dtype],
            *view,
            grad_output.data_ptr(),
            output.data_ptr(),
            grad_input.data_ptr(),
            log,
            _native.context(output),
        )

    return forward, backward


_implement("cpu", *_native_functions("cpu"))
_implement("cuda", *_native_functions("cuda"))


def _triton(name: str) -> Any:
    def launch(*arguments: Any) -> None:
        from fastdl.kernels import softmax as kernels

        getattr(kernels, name)(*arguments)

    return launch


_implement("triton", _triton("softmax"), _triton("softmax_backward"))


# ---------------------------------------------------------------------------------------------------------- autograd


class SoftmaxFunction(torch.autograd.Function):
    """Autograd of softmax and its logarithm: saves the output."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, log: bool, requested: str, selection: Any) -> Tensor:
        output: Tensor = SOFTMAX(requested, input, dim, log, selection=selection)
        ctx.save_for_backward(output)
        ctx.arguments = dim, log, requested
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dim, log, requested = ctx.arguments
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
            grad_input = reference_backward(grad_output, output, dim, log)
        else:
            grad_input = SOFTMAX_BACKWARD(requested, grad_output, output, dim, log)
        return grad_input, None, None, None, None
