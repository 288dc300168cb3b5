"""Dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import UnsupportedError, is_plain, state
from fastdl.functional._call import select, select_reference
from fastdl.ops._philox import new_seed
from fastdl.ops.dropout import DROPOUT, DropoutFunction


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """input with elements set to 0 with probability p, the others divided by 1 - p (Srivastava et al., 2014).

    As :func:`torch.nn.functional.dropout`; what is dropped follows from a seed that torch's generator gives, so that
    the backward makes the mask again instead of reading it.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64.
        p: from 0 to 1.
        training: if False, the result is input itself.
        inplace: by torch, whatever the device.

    Raises:
        TypeError: an input that is no tensor.
        ValueError: another p.
        RuntimeError: an input of integers.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is {p}, allowed: 0 to 1")
    requested = state.requested
    if inplace:
        if requested not in ("auto", "torch"):
            raise UnsupportedError(f"fastdl.dropout: inplace is True, allowed on backend {requested!r}: False")
        return F.dropout(input, p, training, inplace)
    if not training or p == 0:
        return F.dropout(input, p, training)  # input itself
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input):
        select_reference(DROPOUT, requested, input, None, p)
        return F.dropout(input, p)
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    selection = select(DROPOUT, requested, needs_gradient, compiling, input, None, p)
    if selection is not None and selection.backend == "torch":
        return F.dropout(input, p)
    seed = new_seed(input)
    if not needs_gradient:
        return DROPOUT(requested, input, seed, p, selection=selection)  # type: ignore[no-any-return]
    return DropoutFunction.apply(input, seed, p, requested, selection)  # type: ignore[no-any-return]
