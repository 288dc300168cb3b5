"""Embedding: rows of a table by their indices, and the table's gradient.

The gradient's row v is the sum of the output's gradients at the places that hold v. Their indices are sorted first, so
each row is summed by one thread or in a fixed tree, in one order: the result is the same in every run.
An index that is no row raises on a CPU; on a GPU its output is NaN, and it has no part in the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native
from fastdl.ops.attention import compute_dtype

NAME = "embedding"


def reference(weight: Tensor, indices: Tensor) -> Tensor:
    """weight[indices] by torch's operators; weight (V, D), indices of any shape."""
    return F.embedding(indices, weight)


def reference_backward(
    grad_output: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient (V, D) by torch's operators, so that double backward follows by autograd.

    Args:
        grad_output: (*, D); indices: (*); rows: V.
        padding_idx: the row whose gradient is 0; -1 for none.
        scale_grad_by_freq: whether each row's sum is divided by the number of its terms.
    """
    flat = indices.reshape(-1).long()
    grad = grad_output.reshape(flat.numel(), grad_output.shape[-1]).to(compute_dtype(grad_output))
    if scale_grad_by_freq:
        grad = grad / torch.zeros(rows, dtype=grad.dtype, device=grad.device).index_add(
            0, flat, torch.ones_like(flat, dtype=grad.dtype)
        )[flat].unsqueeze(1)
    if padding_idx >= 0:
        grad = grad.masked_fill((flat == padding_idx)[:, None], 0)
    return grad.new_zeros((rows, grad.shape[1])).index_add(0, flat, grad).to(grad_output.dtype)


def _check(weight: Tensor, indices: Tensor) -> None:
    for name, tensor in (("weight", weight), ("input", indices)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor; got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise RuntimeError(f"{NAME}: weight has shape {tuple(weight.shape)}, allowed: (rows, columns)")
    if indices.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{NAME}: input has dtype {indices.dtype}, allowed: torch.int64 or torch.int32")
    if indices.device != weight.device:
        raise RuntimeError(f"{NAME}: input is on {indices.device}, allowed: {weight.device}, the device of weight")


def _shape_class(weight: Tensor, indices: Tensor) -> tuple[str, tuple[int, ...]]:
    return "rows", (indices.numel(), *weight.shape)


EMBEDDING = Op(
    "embedding(Tensor weight, Tensor indices, str backend) -> Tensor",
    fake=lambda weight, indices, backend: weight.new_empty((*indices.shape, weight.shape[1])),
    reference=reference,
    tensors=2,
    multiple=accuracy.MULTIPLE,
    shape_class=_shape_class,
    check=_check,
)
EMBEDDING_BACKWARD = Op(
    "embedding_backward(Tensor grad_output, Tensor indices, SymInt rows, SymInt padding_idx, bool scale_grad_by_freq, "
    "str backend) -> Tensor",
    fake=lambda grad_output, indices, rows, *_: grad_output.new_empty((rows, grad_output.shape[-1])),
    reference=reference_backward,
    tensors=2,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


# ---------------------------------------------------------------------------------------- native: cpu, cuda and triton


def _implement(backend: str, forward: Any, backward: Any) -> None:
    """Adds a backend that has both directions for contiguous tensors that are not empty."""

    @EMBEDDING.implement(backend, Support(_native.FLOATING))
    def embedding(weight: Tensor, indices: Tensor) -> Tensor:
        output = _native.empty((*indices.shape, weight.shape[1]), weight)
        if output.numel():
            forward(weight.contiguous(), indices.long().contiguous(), output)
        return output

    @EMBEDDING_BACKWARD.implement(backend, Support(_native.FLOATING))
    def embedding_backward(
        grad_output: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
    ) -> Tensor:
        columns = grad_output.shape[-1]
        if grad_output.numel() == 0 or rows == 0:
            return grad_output.new_zeros((rows, columns))
        flat = indices.long().reshape(-1)
        grad: Tensor = backward(grad_output.contiguous(), flat, rows, padding_idx, scale_grad_by_freq)
        return grad


def _cpu_forward(weight: Tensor, indices: Tensor, output: Tensor) -> None:
    _native.kernels("cpu").embedding(
        weight.data_ptr(),
        indices.data_ptr(),
        output.data_ptr(),
        indices.numel(),
        weight.shape[0],
        weight.shape[1] * weight.element_size(),
        _native.context(weight),
    )


def _cpu_backward(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    count, columns = indices.numel(), grad.shape[-1]
    grad_weight = _native.empty((rows, columns), grad)
    workspace = torch.empty(rows + 1 + count, dtype=torch.int64)
    _native.kernels("cpu").embedding_backward(
        _native.DTYPE_CODES[grad.dtype],
        grad.data_ptr(),
        indices.data_ptr(),
        grad_weight.data_ptr(),
        workspace.data_ptr(),
        count,
        rows,
        columns,
        padding_idx,
        scale_grad_by_freq,
        _native.context(grad),
    )
    return grad_weight


_implement("cpu", _cpu_forward, _cpu_backward)


def _sorted_backward(kernel: Any) -> Any:
    """A GPU's backward: kernel(grad, sorted indices, their places, scales, gradient, padding_idx)."""

    def backward(grad: Tensor, indices: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
        index, order = torch.sort(indices, stable=True)
        scale = None
        if scale_grad_by_freq:
            ends = [torch.searchsorted(index, index, right=right) for right in (False, True)]
            scale = (ends[1] - ends[0]).to(compute_dtype(grad)).reciprocal()
        grad_weight = grad.new_zeros((rows, grad.shape[-1]))
        kernel(grad, index, order, scale, grad_weight, padding_idx)
        return grad_weight

    return backward


def _triton_forward(weight: Tensor, indices: Tensor, output: Tensor) -> None:
    from fastdl.kernels import embedding as kernels

    kernels.embedding(weight, indices, output)


def _triton_runs(*arguments: Any) -> None:
    from fastdl.kernels import embedding as kernels

    kernels.embedding_backward(*arguments)


def _cuda_forward(weight: Tensor, indices: Tensor, output: Tensor) -> None:
    _native.kernels("cuda").embedding(
        _native.DTYPE_CODES[weight.dtype],
        weight.data_ptr(),
        indices.data_ptr(),
        output.data_ptr(),
        indices.numel(),
        *weight.shape,
        _native.context(weight),
    )


def _cuda_runs(
    grad: Tensor, index: Tensor, order: Tensor, scale: Tensor | None, grad_weight: Tensor, padding_idx: int
) -> None:
    kernels, code = _native.kernels("cuda"), _native.DTYPE_CODES[grad.dtype]
    workspace = _native.workspace(kernels.embedding_workspace(code, index.numel(), grad.shape[-1]), grad)
    kernels.embedding_backward(
        code,
        grad.data_ptr(),
        index.data_ptr(),
        order.data_ptr(),
        _native.address(scale),
        grad_weight.data_ptr(),
        index.numel(),
        *grad_weight.shape,
        padding_idx,
        _native.address(workspace),
        _native.context(grad),
    )


_implement("cuda", _cuda_forward, _sorted_backward(_cuda_runs))
_implement("triton", _triton_forward, _sorted_backward(_triton_runs))


# ---------------------------------------------------------------------------------------------------------- autograd


class EmbeddingFunction(torch.autograd.Function):
    """Autograd of embedding: saves the indices."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        indices: Tensor,
        padding_idx: int,
        scale_grad_by_freq: bool,
        requested: str,
        selection: Any,
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.arguments = weight.shape[0], padding_idx, scale_grad_by_freq
        ctx.requested = requested
        output: Tensor = EMBEDDING(requested, weight, indices, selection=selection)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
            grad = reference_backward(grad_output, indices, *ctx.arguments)
        else:
            grad = EMBEDDING_BACKWARD(ctx.requested, grad_output, indices, *ctx.arguments)
        return grad, None, None, None, None, None
