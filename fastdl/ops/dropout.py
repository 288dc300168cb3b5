"""Dropout: the op, its gradient and implementations by backend.

output = input * factor, where factor is 0 with probability p, else 1 / (1 - p) (Srivastava et al., 2014). Element e of
a dense tensor, counted as memory lies, takes word e % 4 of the random words (fastdl/ops/_philox.py) of the counter (the
low 32 bits of e // 4, the high ones, 0, 1). The gradient is the same function of the output's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native, _philox
from fastdl.ops.activation import dense


def factors(seed: Tensor, p: float, count: int, dtype: torch.dtype) -> Tensor:
    """(count,) of 0 and 1 / (1 - p)."""
    group = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(group)
    words = _philox.words((group & 0xFFFFFFFF, group >> 32, zero, zero + 1), seed)
    return _philox.factors(torch.stack(words, 1).flatten()[:count], p, dtype)


def reference(input: Tensor, seed: Tensor, p: float) -> Tensor:
    """The output by torch's operators.

    Args:
        input: of any shape and strides; a copy of it counts where its elements do not fill memory.
        seed: () int64, on the device of input.
    """
    input = dense(input)
    dtype = torch.float32 if input.dtype.itemsize == 2 else input.dtype
    own = factors(seed, p, input.numel(), dtype).as_strided(input.shape, input.stride())
    return (input * own).to(input.dtype)


def _check(input: Tensor, seed: Tensor | None, p: float) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"dropout: input must be a tensor; got {type(input).__name__}")
    if not input.is_floating_point():
        raise RuntimeError(f"dropout: input has dtype {input.dtype}, allowed: floating-point dtypes")


DROPOUT = Op(
    "dropout(Tensor input, Tensor seed, float p, str backend) -> Tensor",
    fake=lambda input, *_: torch.empty_like(dense(input)),
    reference=reference,
    tensors=2,
    multiple=accuracy.MULTIPLE,
    shape_class=lambda input, *_: ("dropout", (input.numel(),)),
    check=_check,
)


def seed_of(backend: str, seed: Tensor | None) -> int:
    """What native kernels take as the seed: its bits or, on a GPU, which reads it itself, its address."""
    if seed is None:
        return 0
    return seed.data_ptr() if backend == "cuda" else int(seed) & 0xFFFFFFFFFFFFFFFF


def _implement_native(backend: str) -> None:
    @DROPOUT.implement(backend, Support(_native.FLOATING))
    def dropout(input: Tensor, seed: Tensor, p: float) -> Tensor:
        input = dense(input)
        output = _native.huge_pages(torch.empty_like(input))
        if input.numel():
            _native.kernels(backend).dropout(
                _native.DTYPE_CODES[input.dtype],
                input.data_ptr(),
                output.data_ptr(),
                input.numel(),
                p,
                seed_of(backend, seed),
                _native.context(input),
            )
        return output


_implement_native("cpu")
_implement_native("cuda")


@DROPOUT.implement("triton", Support(_native.FLOATING))
def _triton(input: Tensor, seed: Tensor, p: float) -> Tensor:
    from fastdl.kernels import dropout as kernels

    input = dense(input)
    output = torch.empty_like(input)
    kernels.dropout(input, output, seed, p)
    return output


def with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """The tensor, or a copy, with the strides of a dense tensor of its shape."""
    if tensor.stride() == tuple(strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class DropoutFunction(torch.autograd.Function):
    """Autograd of dropout: saves the seed alone, of which the backward makes the mask again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, seed: Tensor, p: float, requested: str, selection: Any) -> Tensor:
        output: Tensor = DROPOUT(requested, input, seed, p, selection=selection)
        ctx.save_for_backward(seed)
        ctx.arguments = output.stride(), p, requested
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        strides, p, requested = ctx.arguments
        (seed,) = ctx.saved_tensors
        grad_output = with_strides(grad_output, strides)
        return again(requested, grad_output, seed, p), None, None, None, None


def again(requested: str, gradient: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout of a gradient that lies in memory as the forward's tensor; differentiable where that is asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
        return reference(gradient, seed, p)
    return DROPOUT(requested, gradient, seed, p)  # type: ignore[no-any-return]
