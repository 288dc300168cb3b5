"""Layer normalisation, with dropout and residual before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import is_plain, state
from fastdl.functional._call import select, select_reference
from fastdl.ops import layer_norm as ops
from fastdl.ops._philox import new_seed


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Any:
    """(h - mean) / sqrt(variance + eps) * weight + bias with h = residual + dropout(input), fused (Ba et al., 2016).

    As :func:`torch.nn.functional.layer_norm`: mean and (biased) variance are those of the last dimensions.

    Args:
        input: (*, *normalized_shape), any strides; float32, float16, bfloat16 or float64.
        normalized_shape: the sizes of the dimensions to normalise over.
        weight, bias: normalized_shape or None; of input's dtype, or float32 for 16-bit input.
        residual: of input's shape and dtype.
        dropout_p: with which elements of input are dropped, as :func:`dropout` does; applied whenever it is not 0.
        return_sum: whether to return h, too, which the next residual is made of.

    Returns:
        Of input's shape and dtype, contiguous; with ``return_sum`` a pair of it and h.

    Raises:
        TypeError: an argument that is not a tensor, or a normalized_shape that is no sequence of integers.
        NotImplementedError: an input of integers.
        RuntimeError: shapes, dtypes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    return _norm(input, normalized_shape, weight, bias, eps, residual, dropout_p, return_sum, False)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Any:
    """h / sqrt(mean of h^2 + eps) * weight with h = residual + dropout(input), fused (Zhang and Sennrich, 2019).

    As :func:`torch.nn.functional.rms_norm`; arguments, results and errors are those of :func:`layer_norm`.

    Args:
        eps: None for the machine epsilon of the dtype of computation: float32 for 16-bit input.
    """
    if eps is None and isinstance(input, Tensor) and input.is_floating_point():
        eps = torch.finfo(ops.compute_dtype(input)).eps
    return _norm(input, normalized_shape, weight, None, eps, residual, dropout_p, return_sum, True)


def _norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    residual: Tensor | None,
    dropout_p: float,
    return_sum: bool,
    rms: bool,
) -> Any:
    requested, compiling = state.requested, torch.compiler.is_compiling()
    shape = _shape("rms_norm" if rms else "layer_norm", normalized_shape)
    tensors = input, residual, weight, bias
    options = shape, 0.0 if eps is None else eps, dropout_p, rms  # None comes with an input that the check refuses
    if not is_plain(compiling, *tensors):
        select_reference(ops.LAYER_NORM, requested, *tensors, None, *options, return_sum)
        return _torchs(*tensors, *options, return_sum)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):  # as torch does there
        tensors = [_float32(t) for t in tensors]  # type: ignore[assignment]
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    selection = select(ops.LAYER_NORM, requested, needs_gradient, compiling, *tensors, None, *options, return_sum)
    if selection is not None and selection.backend == "torch":
        return _torchs(*tensors, *options, return_sum)
    seed = new_seed(input) if dropout_p > 0 else None
    if needs_gradient:
        result: Any = ops.LayerNormFunction.apply(*tensors, seed, *options, requested, selection)
        output, h = result if isinstance(result, tuple) else (result, tensors[0])
    else:
        output, h, _, _ = ops.LAYER_NORM(requested, *tensors, seed, *options, return_sum, selection=selection)
        h = tensors[0] if residual is None and seed is None else h
    return (output, h) if return_sum else output


def _torchs(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
    dropout_p: float,
    rms: bool,
    return_sum: bool,
) -> Any:
    """The same by torch's functions."""
    h = F.dropout(input, dropout_p) if dropout_p > 0 else input
    h = h if residual is None else residual + h
    output = F.rms_norm(h, list(shape), weight, eps) if rms else F.layer_norm(h, list(shape), weight, bias, eps)
    return (output, h) if return_sum else output


def _float32(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype.itemsize != 2 else tensor.float()


def _shape(name: str, normalized_shape: Any) -> tuple[int, ...]:
    sizes = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if not isinstance(normalized_shape, Sequence) or not all(isinstance(size, int | torch.SymInt) for size in sizes):
        raise TypeError(f"{name}: normalized_shape is {normalized_shape!r}, allowed: a sequence of integers")
    return sizes
