"""Softmax and its logarithm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import state
from fastdl.functional._call import unary
from fastdl.ops import softmax as ops


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum of exp(input) along a dimension; as :func:`torch.nn.functional.softmax`.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64.
        dim: the dimension that sums to 1; None warns and takes one by torch's rule.
        dtype: what input is converted to before.

    Returns:
        Of input's shape; in its memory format where that is dense, else contiguous.

    Raises:
        TypeError: an input that is not a tensor.
        IndexError: a dimension that input does not have.
        NotImplementedError: integers without ``dtype``.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    return _softmax("softmax", input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """input - log(sum of exp(input)) along a dimension; as :func:`torch.nn.functional.log_softmax`.

    Arguments, result and errors are those of :func:`softmax`.
    """
    return _softmax("log_softmax", input, dim, _stacklevel, dtype)


def _softmax(name: str, input: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor; got {type(input).__name__}")
    if dim is None:
        dim = F._get_softmax_dim(name, input.dim(), stacklevel + 1)  # type: ignore[attr-defined]
    dimensions = max(input.dim(), 1)
    if not -dimensions <= dim < dimensions:
        raise IndexError(f"{name}: dim is {dim}, allowed: {-dimensions} to {dimensions - 1}")
    if dtype is None and input.is_cuda and torch.is_autocast_enabled("cuda") and input.dtype != torch.float64:
        dtype = torch.float32
    if dtype is not None:
        input = input.to(dtype)
    return unary(  # type: ignore[no-any-return]
        ops.SOFTMAX,
        ops.SoftmaxFunction.apply,
        state.requested,
        input,
        dim % dimensions,
        name == "log_softmax",
        reference=ops.torchs,
    )
