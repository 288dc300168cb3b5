"""Layer normalisation with dropout and residual before it: ops, gradients and implementations by backend.

h = residual + dropout(input), rounded to input's dtype; output = (h - mean) * rstd * weight + bias with rstd =
1 / sqrt(variance + eps) by row (Ba et al., 2016), a row being all that normalized_shape covers. Or, ``rms``: output =
h * rstd * weight with rstd = 1 / sqrt(mean of h^2 + eps) (Zhang and Sennrich, 2019). Dropout is that of
fastdl/ops/dropout.py on contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native
from fastdl.ops import dropout as dropping

# --------------------------------------------------------------------------------------------------------- reference


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of statistics and sums: float32 for 16-bit tensors."""
    return torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype


def _rows(tensor: Tensor, normalized_shape: Sequence[int]) -> tuple[int, int]:
    """How many rows, and how long they are."""
    lead = tensor.shape[: tensor.dim() - len(normalized_shape)]
    return math.prod(lead), math.prod(normalized_shape)


def statistics(h: Tensor, normalized_shape: Sequence[int], eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Mean (none of it for rms) and rstd, (rows,), by torch's operators."""
    x = h.to(compute_dtype(h)).reshape(_rows(h, normalized_shape))
    if x.numel() == 0:
        zeros = x.new_zeros(len(x))
        return (zeros[:0] if rms else zeros), zeros.clone()
    if rms:
        return x.new_empty(0), torch.rsqrt(x.square().mean(1) + eps)
    variance, mean = torch.var_mean(x, 1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def reference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
    dropout: float,
    rms: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, h, mean and rstd by torch's operators.

    Args:
        input, residual: (*, *normalized_shape); weight, bias: normalized_shape, of input's dtype or float32.
        seed: () int64, with dropout.
        keep: whether h is wanted.

    Returns:
        output and h of input's shape and dtype, mean and rstd (rows,) in the dtype of computation; empty are h where it
        is input itself or not wanted, and mean for rms.
    """
    dtype = compute_dtype(input)
    h = input
    if residual is not None or seed is not None:
        total = input.to(dtype)
        if seed is not None:
            total = total * dropping.factors(seed, dropout, input.numel(), dtype).view(input.shape)
        h = (total if residual is None else total + residual).to(input.dtype)
    mean, rstd = statistics(h, normalized_shape, eps, rms)
    y = _normal(h, mean, rstd, normalized_shape, rms)
    for tensor, operation in ((weight, torch.mul), (bias, torch.add)):
        y = y if tensor is None else operation(y, tensor.to(dtype).flatten())
    output = y.to(input.dtype).view(input.shape)
    return output, h.contiguous() if keep and h is not input else input.new_empty(0), mean, rstd


def _normal(h: Tensor, mean: Tensor, rstd: Tensor, normalized_shape: Sequence[int], rms: bool) -> Tensor:
    """The normalised rows, (rows, columns), in the dtype of computation."""
    x = h.to(rstd.dtype).reshape(_rows(h, normalized_shape))
    return (x if rms else x - mean[:, None]) * rstd[:, None]


def reference_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normalized_shape: Sequence[int],
    dropout: float,
    rms: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of input, residual (which is that of h), weight and bias, in this order.

    By torch's operators: double backward follows by autograd if mean and rstd are differentiable functions of h.

    Args:
        grad_output, grad_sum: the gradients of output and h, of h's shape.
        needs: whether the gradient of input, residual, weight, bias is needed; those of the last two are given in the
            dtype of computation.
    """
    dtype = rstd.dtype
    normal = _normal(h, mean, rstd, normalized_shape, rms)
    grad = grad_output.to(dtype).reshape(normal.shape)
    gradients = []
    if needs[0] or needs[1]:
        scaled = grad if weight is None else grad * weight.to(dtype).flatten()
        inner = scaled - normal * (scaled * normal).mean(1, keepdim=True)
        if not rms:
            inner = inner - scaled.mean(1, keepdim=True)
        grad_h = (rstd[:, None] * inner).view(h.shape)
        grad_h = grad_h if grad_sum is None else grad_h + grad_sum
        if needs[0]:
            own = None if seed is None else dropping.factors(seed, dropout, h.numel(), dtype).view(h.shape)
            gradients.append((grad_h if own is None else grad_h * own).to(h.dtype))
        if needs[1]:
            gradients.append(grad_h.to(h.dtype))
    if needs[2]:
        gradients.append((grad * normal).sum(0).view(tuple(normalized_shape)))
    if needs[3]:
        gradients.append(grad.sum(0).view(tuple(normalized_shape)))
    return gradients


# -------------------------------------------------------------------------------------------------------- checks, ops


def _check(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
    dropout: float,
    rms: bool,
    keep: bool,
) -> None:
    name = "rms_norm" if rms else "layer_norm"
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor; got {type(input).__name__}")
    if not input.is_floating_point():
        raise NotImplementedError(f"{name}: input has dtype {input.dtype}, allowed: floating-point dtypes")
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{name}: normalized_shape is (), allowed: one size or more")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{name}: input has shape {tuple(input.shape)}, allowed: (*, {', '.join(map(str, shape))}), since "
            f"normalized_shape is {shape}"
        )
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor or None; got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape:
            raise RuntimeError(
                f"{name}: {argument} has shape {tuple(tensor.shape)}, allowed: {shape}, the normalized_shape"
            )
        if tensor.dtype not in (input.dtype, compute_dtype(input)):
            allowed = " or ".join(dict.fromkeys((str(input.dtype), str(compute_dtype(input)))))
            raise RuntimeError(
                f"{name}: {argument} has dtype {tensor.dtype}, allowed: {allowed}, since input has {input.dtype}"
            )
        if tensor.device != input.device:
            raise RuntimeError(f"{name}: {argument} is on {tensor.device}, allowed: {input.device}, input's device")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(f"{name}: bias has dtype {bias.dtype}, allowed: {weight.dtype}, the dtype of weight")
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"{name}: residual must be a tensor or None; got {type(residual).__name__}")
        if residual.shape != input.shape:
            raise RuntimeError(
                f"{name}: residual has shape {tuple(residual.shape)}, allowed: {tuple(input.shape)}, that of input"
            )
        if residual.dtype != input.dtype:
            raise RuntimeError(f"{name}: residual has dtype {residual.dtype}, allowed: {input.dtype}, input's dtype")
        if residual.device != input.device:
            raise RuntimeError(f"{name}: residual is on {residual.device}, allowed: {input.device}, input's device")
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"{name}: dropout_p is {dropout}, allowed: 0 to 1")


def _shape_class(
    input: Tensor,
    residual: Tensor | None,
    weight: Any,
    bias: Any,
    seed: Any,
    normalized_shape: Sequence[int],
    eps: float,
    dropout: float,
    rms: bool,
    keep: bool,
) -> tuple[str, tuple[int, ...]]:
    label = "dropout" if dropout else "residual" if residual is not None else "rms" if rms else "plain"
    return label, _rows(input, normalized_shape)


def _empty_rows(like: Tensor, rows: int) -> Tensor:
    return like.new_empty(rows, dtype=compute_dtype(like))


def _empty_results(
    input: Tensor, keep: bool, normalized_shape: Sequence[int], rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The uninitialised results of the forward; keep: whether h is one of them."""
    rows, _ = _rows(input, normalized_shape)
    output, h = [_native.empty(shape, input) for shape in (input.shape, input.shape if keep else (0,))]
    return output, h, _empty_rows(input, 0 if rms else rows), _empty_rows(input, rows)


def _fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Any,
    bias: Any,
    seed: Tensor | None,
    normalized_shape: Sequence[int],
    eps: float,
    dropout: float,
    rms: bool,
    keep: bool,
    _: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(input, keep and (residual is not None or seed is not None), normalized_shape, rms)


def _empty_gradients(h: Tensor, normalized_shape: Sequence[int], needs: Sequence[bool]) -> list[Tensor | None]:
    like_weight = h.new_empty(0, dtype=compute_dtype(h))
    made = [(h.shape, h), (h.shape, h), (tuple(normalized_shape), like_weight), (tuple(normalized_shape), like_weight)]
    return [_native.empty(shape, like) if need else None for (shape, like), need in zip(made, needs, strict=True)]


def _fake_backward(grad_output: Tensor, grad_sum: Any, h: Tensor, *rest: Any) -> list[Tensor]:
    normalized_shape, _, _, needs, _ = rest[-5:]
    return [t for t in _empty_gradients(h, normalized_shape, needs) if t is not None]


LAYER_NORM = Op(
    "layer_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, SymInt[] normalized_shape, "
    "float eps, float dropout, bool rms, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    tensors=5,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check,
)
LAYER_NORM_BACKWARD = Op(
    "layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor h, Tensor? weight, Tensor? seed, Tensor mean, "
    "Tensor rstd, SymInt[] normalized_shape, float dropout, bool rms, bool[4] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    reference=reference_backward,
    tensors=7,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


# ---------------------------------------------------------------------------------------------------- implementations


def _is_wide(input: Tensor, *parameters: Tensor | None) -> bool:
    """Whether weight and bias are in the dtype of computation, not in input's."""
    return any(t is not None and t.dtype == compute_dtype(input) for t in parameters)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _implement(backend: str, launchers: Callable[[], Any]) -> None:
    """Adds a backend, given its two kernel launchers, ``layer_norm`` and ``layer_norm_backward``.

    A launcher takes (rows, columns), then contiguous tensors, and outputs to fill; None where there is nothing to read
    or write.

    Args:
        launchers: gives the object with the launchers, at the first call.
    """

    @LAYER_NORM.implement(backend, Support(_native.FLOATING))
    def forward(
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        dropout: float,
        rms: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if input.numel() == 0:
            return reference(input, residual, weight, bias, seed, normalized_shape, eps, dropout, rms, keep)
        keep = keep and (residual is not None or seed is not None)
        output, h, mean, rstd = _empty_results(input, keep, normalized_shape, rms)
        given = _contiguous(input, residual, weight, bias)
        results = output, h if keep else None, None if rms else mean, rstd
        launchers().layer_norm(_rows(input, normalized_shape), *given, seed, *results, eps, dropout)
        return output, h, mean, rstd

    @LAYER_NORM_BACKWARD.implement(backend, Support(_native.FLOATING))
    def backward(
        grad_output: Tensor,
        grad_sum: Tensor | None,
        h: Tensor,
        weight: Tensor | None,
        seed: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        normalized_shape: Sequence[int],
        dropout: float,
        rms: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        arguments = grad_output, grad_sum, h, weight, seed, mean, rstd
        if h.numel() == 0:
            return reference_backward(*arguments, normalized_shape, dropout, rms, needs)
        gradients = _empty_gradients(h, normalized_shape, needs)
        if any(needs):
            given = _contiguous(grad_output, grad_sum, h, weight)
            of_rows = seed, None if rms else mean, rstd
            launchers().layer_norm_backward(_rows(h, normalized_shape), *given, *of_rows, *gradients, dropout)
        return [gradient for gradient in gradients if gradient is not None]


# ------------------------------------------------------------------------------------------------ native: cpu and cuda


class _NativeLaunchers:
    """The launchers of a backend of native kernels: the same calls on addresses."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def layer_norm(
        self,
        rows: tuple[int, int],
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        *rest: Any,
    ) -> None:
        """Forward."""
        *results, eps, dropout = rest
        _native.kernels(self.backend).layer_norm(
            _native.DTYPE_CODES[input.dtype],
            _is_wide(input, weight, bias),
            *rows,
            *map(_native.address, (input, residual, weight, bias, *results)),
            eps,
            dropout,
            dropping.seed_of(self.backend, seed),
            _native.context(input),
        )

    def layer_norm_backward(
        self,
        rows: tuple[int, int],
        grad_output: Tensor,
        grad_sum: Tensor | None,
        h: Tensor,
        weight: Tensor | None,
        seed: Tensor | None,
        *rest: Any,
    ) -> None:
        """Backward."""
        *tensors, dropout = rest
        kernels, code = _native.kernels(self.backend), _native.DTYPE_CODES[h.dtype]
        workspace: tuple[int, ...] = ()
        if self.backend == "cuda":
            size = kernels.layer_norm_backward_workspace(code, *rows)
            memory = _native.workspace(size, h)
            workspace = (_native.address(memory),)
        kernels.layer_norm_backward(
            code,
            _is_wide(h, weight),
            *rows,
            *map(_native.address, (grad_output, grad_sum, h, weight, *tensors)),
            dropout,
            dropping.seed_of(self.backend, seed),
            *workspace,
            _native.context(h),
        )


_CPU, _CUDA = _NativeLaunchers("cpu"), _NativeLaunchers("cuda")

_implement("cpu", lambda: _CPU)
_implement("cuda", lambda: _CUDA)


# ----------------------------------------------------------------------------------------------------------- triton


def _triton() -> Any:
    from fastdl.kernels import layer_norm

    return layer_norm


_implement("triton", _triton)


# ---------------------------------------------------------------------------------------------------------- autograd


class LayerNormFunction(torch.autograd.Function):
    """Autograd of layer_norm: gives the output, and h besides where that is not input itself.

    Saves h, which is input or an output, and the statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        normalized_shape: Sequence[int],
        eps: float,
        dropout: float,
        rms: bool,
        requested: str,
        selection: Any,
    ) -> Any:
        ctx.set_materialize_grads(False)
        arguments = normalized_shape, eps, dropout, rms
        output, h, mean, rstd = LAYER_NORM(
            requested, input, residual, weight, bias, seed, *arguments, True, selection=selection
        )
        separate = residual is not None or seed is not None
        through = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        ctx.save_for_backward(h if separate else input, weight if through else None, seed, mean, rstd)
        ctx.arguments = arguments, requested
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        return (output, h) if separate else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None = None) -> Any:
        (normalized_shape, eps, dropout, rms), requested = ctx.arguments
        h, weight, seed, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        results: list[Tensor | None] = [None] * 4
        if grad_output is None:
            if grad_sum is not None:
                if needs[0]:
                    contiguous = grad_sum.contiguous()
                    results[0] = contiguous if seed is None else dropping.again(requested, contiguous, seed, dropout)
                results[1] = grad_sum if needs[1] else None
            return *results, *(None,) * 7
        shared = seed is None and needs[0] and needs[1]  # one gradient for both
        if shared:
            needs[1] = False
        double = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if double:  # the gradient of the gradient flows through the statistics
            mean, rstd = statistics(h, normalized_shape, eps, rms)
        arguments = grad_output, grad_sum, h, weight, seed, mean, rstd, normalized_shape, dropout, rms, needs
        gradients = reference_backward(*arguments) if double else LAYER_NORM_BACKWARD(requested, *arguments)
        rest = iter(gradients)
        results = [next(rest) if need else None for need in needs]
        for i, dtype in enumerate(ctx.dtypes, 2):
            result = results[i]
            results[i] = None if result is None else result.to(dtype)
        if shared:
            results[1] = results[0]
        return *results, *(None,) * 7
