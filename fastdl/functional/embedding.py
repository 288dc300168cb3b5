"""Embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import UnsupportedError, is_plain, state
from fastdl.functional._call import select, select_reference
from fastdl.ops import embedding as ops


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """weight[input]; as :func:`torch.nn.functional.embedding`, with a gradient that is the same in every run.

    Args:
        input: indices of any shape, int64 or int32.
        weight: (V, D); float32, float16, bfloat16 or float64.
        padding_idx: the row whose gradient is 0, from the end if negative.
        max_norm: the rows that are taken, of a larger norm, are scaled down to it before, in place.
        norm_type: of that norm.
        scale_grad_by_freq: whether a row's gradient is divided by how often its index is in ``input``.
        sparse: whether the gradient is a sparse tensor, which is torch's business.

    Returns:
        (*, D) for an input of shape (*).

    Raises:
        TypeError: an argument that is not a tensor.
        AssertionError: a ``padding_idx`` that is no row.
        IndexError: on a CPU, an index that is no row. On a GPU its output is NaN.
        RuntimeError: dtypes, shapes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    requested, compiling = state.requested, torch.compiler.is_compiling()
    for argument, tensor in (("input", input), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"embedding: {argument} must be a tensor; got {type(tensor).__name__}")
    training = torch.is_grad_enabled() and weight.requires_grad
    if is_plain(compiling, input, weight):
        if padding_idx is not None and weight.dim() > 0 and not -len(weight) <= padding_idx < len(weight):
            raise AssertionError(
                f"embedding: padding_idx is {padding_idx}, allowed: {-len(weight)} to {len(weight) - 1}, the rows"
            )
        selection = select(ops.EMBEDDING, requested, training, compiling, weight, input)
        if sparse and training and requested not in ("auto", "torch"):
            raise UnsupportedError(f"fastdl.embedding: sparse is True, allowed on backend {requested!r}: False")
        if (selection is None or selection.backend != "torch") and not (sparse and training):
            if max_norm is not None:
                with torch.no_grad():
                    torch.embedding_renorm_(weight, input.contiguous(), max_norm, norm_type)
            if not training:
                return ops.EMBEDDING(requested, weight, input, selection=selection)  # type: ignore[no-any-return]
            padding = -1 if padding_idx is None else padding_idx % max(len(weight), 1)
            return ops.EmbeddingFunction.apply(  # type: ignore[no-any-return]
                weight, input, padding, scale_grad_by_freq, requested, selection
            )
    else:
        select_reference(ops.EMBEDDING, requested, weight, input)
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
