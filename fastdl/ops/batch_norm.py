"""Batch normalisation with residual and activation fused: ops, gradients and implementations by backend.

y = activation((x - mean) * rstd * weight + bias + residual) with rstd = 1 / sqrt(variance + eps) (Ioffe and Szegedy,
2015); in training mean and variance are those of a channel's values in the batch, in inference they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdl import accuracy, activations
from fastdl.dispatch import Op, Support, state
from fastdl.ops import _native

Shape3 = tuple[int, int, int]


# --------------------------------------------------------------------------------------------------------- reference


def reference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    kind: int,
    parameter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, mean, 1 / sqrt(variance + eps) and unbiased variance by torch's operators."""
    weight, bias = [_computed(t, input) for t in (weight, bias)]
    mean = torch.zeros(input.shape[1], dtype=compute_dtype(input), device=input.device)
    variance = torch.zeros_like(mean)
    if input.numel() == 0:
        y = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        return _finish(y, residual, kind, parameter), mean, mean + eps**-0.5, variance
    # With a momentum of 1 the running statistics are those of the batch.
    y, _, rstd = torch.native_batch_norm(input, weight, bias, mean, variance, True, 1.0, eps)
    return _finish(y, residual, kind, parameter), mean, rstd, variance


def reference_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    kind: int,
    parameter: float,
) -> Tensor:
    """The output with given mean and variance by torch's operators."""
    weight, bias, m, v = [_computed(t, input) for t in (weight, bias, mean, variance)]
    return _finish(F.batch_norm(input, m, v, weight, bias, False, 0.0, eps), residual, kind, parameter)


def _finish(y: Tensor, residual: Tensor | None, kind: int, parameter: float) -> Tensor:
    return activations.reference(y if residual is None else y + residual, kind, parameter)


def reference_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared differences from it, by channel; zeros for an empty batch."""
    if input.numel() == 0:
        zeros = torch.zeros(input.shape[1], dtype=compute_dtype(input), device=input.device)
        return zeros, zeros.clone()
    variance, mean = torch.var_mean(input.to(compute_dtype(input)), _reduced(input), correction=0)
    return mean, variance * (input.numel() // input.shape[1])


def reference_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    kind: int,
    parameter: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of input, weight, bias and residual, in this order.

    By torch's operators: double backward follows by autograd if mean and rstd are differentiable functions of input.

    Args:
        grad_output, input: (N, C, *); weight, bias, mean, rstd: (C,).
        output, residual: (N, C, *): what the activation's gradient is made of, see :func:`saved`.
        training: whether mean and rstd are those of input, so that the gradient flows through them.
        needs: whether the gradient of input, weight, bias, residual is needed.
    """
    dz, normal = _preactivation_gradient(
        grad_output, input, weight, bias, residual, output, mean, rstd, kind, parameter
    )
    dims, count = _reduced(input), input.numel() // max(input.shape[1], 1)
    grad_weight, grad_bias = (dz * normal).sum(dims), dz.sum(dims)
    gradients = []
    if needs[0]:
        means = [t / max(count, 1) if training else torch.zeros_like(t) for t in (grad_bias, grad_weight)]
        gradients.append(_input_gradient(dz, normal, input, weight, rstd, *means))
    gradients += [grad for grad, need in zip((grad_weight, grad_bias), needs[1:3], strict=True) if need]
    if needs[3]:
        gradients.append(dz.to(input.dtype).contiguous(memory_format=memory_format(input)))
    return gradients


def reference_apply(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    mean_gradient: Tensor,
    mean_product: Tensor,
) -> Tensor:
    """The gradient of input by torch's operators."""
    dz, normal = _preactivation_gradient(grad_output, input, weight, None, None, None, mean, rstd, 0, 0.0)
    return _input_gradient(dz, normal, input, weight, rstd, mean_gradient, mean_product)


def _preactivation_gradient(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: int,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of the activation's argument, and the normalised input."""
    dtype, shape = mean.dtype, _column(input)
    normal = (input.to(dtype) - mean.view(shape)) * rstd.view(shape)
    made_of = None if output is None else output.to(dtype)
    if kind and output is None:
        z = normal if weight is None else normal * weight.to(dtype).view(shape)
        z = z if bias is None else z + bias.to(dtype).view(shape)
        z = z if residual is None else z + residual
        made_of = activations.reference(z, kind, parameter) if activations.saves(kind, parameter) == "output" else z
    return activations.reference_gradient(grad_output.to(dtype), made_of, kind, parameter), normal


def _input_gradient(
    dz: Tensor,
    normal: Tensor,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    mean_gradient: Tensor,
    mean_product: Tensor,
) -> Tensor:
    shape = _column(input)
    scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
    gradient = scale.view(shape) * (dz - mean_gradient.view(shape) - normal * mean_product.view(shape))
    return gradient.to(input.dtype).contiguous(memory_format=memory_format(input))


def _reduced(input: Tensor) -> list[int]:
    return [dim for dim in range(input.dim()) if dim != 1]


def _column(input: Tensor) -> list[int]:
    """The shape that broadcasts a value for each channel over the input."""
    return [1, input.shape[1], *[1] * (input.dim() - 2)]


# ------------------------------------------------------------------------------------------------- dtypes and layouts


def compute_dtype(input: Tensor) -> torch.dtype:
    """Of statistics, and of weight and bias inside a kernel: float32 for 16-bit input."""
    return torch.float32 if input.dtype.itemsize == 2 else input.dtype


def _computed(tensor: Tensor | None, input: Tensor) -> Tensor | None:
    """A tensor with a value for each channel as the kernels take it: in the dtype of computation, contiguous."""
    if tensor is None or (tensor.dtype == compute_dtype(input) and tensor.is_contiguous()):
        return tensor
    return tensor.to(compute_dtype(input)).contiguous()


def memory_format(input: Tensor) -> torch.memory_format:
    """That of output and gradients, as torch's: channels_last for such an input, contiguous for all others."""
    if not input.is_contiguous():
        if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if input.dim() == 5 and input.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def inverse_deviation(variance: Tensor, eps: float, input: Tensor) -> Tensor:
    """1 / sqrt(variance + eps) with every step rounded correctly, as all kernels take it from a given variance."""
    return 1 / torch.sqrt(variance.to(compute_dtype(input)) + eps)


# -------------------------------------------------------------------------------------------------------- checks, ops


def check_running(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool) -> None:
    """Raises, as torch does, for running statistics that do not fit."""
    if not training:
        for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
            if tensor is None:
                raise RuntimeError(
                    f"batch_norm: {name} is None, allowed in evaluation: a tensor of one value a channel"
                )
    elif (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: one of running_mean and running_var is None, allowed: both or neither")
    if running_mean is None or running_var is None:
        return
    if torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):
        raise RuntimeError("batch_norm: running statistics require a gradient, allowed: buffers that do not")
    if training:  # in evaluation they are the op's arguments, checked with the rest
        _check_columns(input, running_mean=running_mean, running_var=running_var)


def _check_columns(input: Tensor, **tensors: Tensor | None) -> None:
    channels = input.shape[1:2]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"batch_norm: {name} must be a tensor or None; got {type(tensor).__name__}")
        if tensor.shape != channels:
            raise RuntimeError(
                f"batch_norm: {name} has shape {tuple(tensor.shape)}, allowed: ({input.shape[1]},), a value for each "
                f"channel of input, whose shape is {tuple(input.shape)}"
            )
        if tensor.dtype != input.dtype and tensor.dtype != compute_dtype(input):
            allowed = " or ".join(dict.fromkeys((str(input.dtype), str(compute_dtype(input)))))
            raise RuntimeError(
                f"batch_norm: {name} has dtype {tensor.dtype}, allowed: {allowed}, since input has {input.dtype}"
            )
        if tensor.device != input.device:
            raise RuntimeError(
                f"batch_norm: {name} is on {tensor.device}, allowed: {input.device}, the device of input"
            )


def _check(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm: input must be a tensor; got {type(input).__name__}")
    if not input.is_floating_point():
        raise NotImplementedError(f"batch_norm: input has dtype {input.dtype}, allowed: floating-point dtypes")
    if input.dim() < 2:
        error = IndexError if training else RuntimeError
        raise error(f"batch_norm: input has shape {tuple(input.shape)}, allowed: (N, C, *)")
    _check_columns(input, weight=weight, bias=bias, running_mean=mean, running_var=variance)
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise TypeError(f"batch_norm: residual must be a tensor or None; got {type(residual).__name__}")
        if residual.shape != input.shape:
            raise RuntimeError(
                f"batch_norm: residual has shape {tuple(residual.shape)}, allowed: {tuple(input.shape)}, that of input"
            )
        if residual.dtype != input.dtype:
            raise RuntimeError(
                f"batch_norm: residual has dtype {residual.dtype}, allowed: {input.dtype}, the dtype of input"
            )
        if residual.device != input.device:
            raise RuntimeError(f"batch_norm: residual is on {residual.device}, allowed: {input.device}, input's")


def _check_training(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, *_: Any
) -> None:
    _check(input, weight, bias, residual, None, None, True)
    if input.shape[0] * math.prod(input.shape[2:]) == 1:
        raise ValueError(
            f"batch_norm: Expected more than 1 value per channel when training, got input size {tuple(input.shape)}"
        )
    if eps <= 0:
        raise ValueError(f"batch_norm: eps is {eps}, allowed in training: positive numbers")


def _check_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    *_: Any,
) -> None:
    _check(input, weight, bias, residual, mean, variance, False)
    if eps < 0:
        raise ValueError(f"batch_norm: eps is {eps}, allowed: 0 or more")


def _limit(first: Tensor, *arguments: Any) -> str | None:
    return activations.limit(*arguments[-2:])


def _limit_backward(first: Tensor, *arguments: Any) -> str | None:
    return activations.limit(*arguments[-3:-1])


def _shape_class(input: Tensor, weight: Any, bias: Any, residual: Any, *rest: Any) -> tuple[str, tuple[int, ...]]:
    fused = bool(rest[-2]) or residual is not None
    return "fused" if fused else "plain", (input.shape[0], input.shape[1], math.prod(input.shape[2:]))


def _fake(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=memory_format(input))


def _fake_backward(grad_output: Tensor, input: Tensor, *rest: Any) -> list[Tensor]:
    needs = rest[-2]
    results = (_fake(input), _empty_column(input), _empty_column(input), _fake(input))
    return [result for result, need in zip(results, needs, strict=True) if need]


BATCH_NORM = Op(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int kind, float parameter, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda input, *_: (_fake(input), *(_empty_column(input) for _ in range(3))),
    reference=reference,
    tensors=4,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check_training,
)
BATCH_NORM_INFERENCE = Op(
    "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor variance, "
    "float eps, int kind, float parameter, str backend) -> Tensor",
    fake=lambda input, *_: _fake(input),
    reference=reference_inference,
    tensors=6,
    multiple=accuracy.MULTIPLE,
    shape_class=_shape_class,
    check=_check_inference,
)
BATCH_NORM_BACKWARD = Op(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? output, Tensor mean, Tensor rstd, bool training, int kind, float parameter, bool[4] needs, str backend) "
    "-> Tensor[]",
    fake=_fake_backward,
    reference=reference_backward,
    tensors=8,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)
# What the synchronised layer is made of besides: its statistics and gradients are joined between these.
BATCH_NORM_STATISTICS = Op(
    "batch_norm_statistics(Tensor input, str backend) -> (Tensor, Tensor)",
    fake=lambda input, _: (_empty_column(input), _empty_column(input)),
    reference=reference_statistics,
    tensors=1,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)
BATCH_NORM_APPLY = Op(
    "batch_norm_apply(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor rstd, "
    "Tensor mean_gradient, Tensor mean_product, str backend) -> Tensor",
    fake=lambda grad_output, input, *_: _fake(input),
    reference=reference_apply,
    tensors=7,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


# ---------------------------------------------------------------------------------------------------- implementations


def _view(input: Tensor, format: torch.memory_format) -> Shape3:
    """(outer, channels, inner): element (o, c, i) of a tensor of this format lies at (o * channels + c) * inner + i."""
    n, channels, inner = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    return (n, channels, inner) if format == torch.contiguous_format else (n * inner, channels, 1)


def _laid_out(tensor: Tensor | None, format: torch.memory_format) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=format)


def _empty_column(input: Tensor, _: Any = None) -> Tensor:
    """An uninitialised value for each channel, in the dtype of computation."""
    return input.new_empty(input.shape[1], dtype=compute_dtype(input))


def _implement(backend: str, launcher: Callable[[], Any]) -> None:
    """Adds a backend, given its five kernel launchers.

    A launcher takes the view (outer, channels, inner), then tensors that lie in memory as the view says, values by
    channel contiguous in the dtype of computation, and outputs to fill; None where there is nothing to read or write.

    Args:
        launcher: gives the object with the launchers, at the first call: ``batch_norm``, ``batch_norm_inference``,
            ``batch_norm_backward``, ``batch_norm_statistics``, ``batch_norm_apply``.
    """

    @BATCH_NORM.implement(backend, Support(_native.FLOATING, _limit))
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        kind: int,
        parameter: float,
    ) -> tuple[Tensor, ...]:
        if input.numel() == 0:
            return reference(input, weight, bias, residual, eps, kind, parameter)
        format = memory_format(input)
        output = _native.empty_like(input, format)
        mean, rstd, variance = _empty_column(input), _empty_column(input), _empty_column(input)
        launcher().batch_norm(
            _view(input, format),
            _laid_out(input, format),
            _computed(weight, input),
            _computed(bias, input),
            _laid_out(residual, format),
            output,
            mean,
            rstd,
            variance,
            eps,
            kind,
            parameter,
        )
        return output, mean, rstd, variance

    @BATCH_NORM_INFERENCE.implement(backend, Support(_native.FLOATING, _limit))
    def inference(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        kind: int,
        parameter: float,
    ) -> Tensor:
        format = memory_format(input)
        output = _native.empty_like(input, format)
        if input.numel():
            launcher().batch_norm_inference(
                _view(input, format),
                _laid_out(input, format),
                _computed(weight, input),
                _computed(bias, input),
                _laid_out(residual, format),
                _computed(mean, input),
                _computed(variance, input),
                output,
                eps,
                kind,
                parameter,
            )
        return output

    @BATCH_NORM_BACKWARD.implement(backend, Support(_native.FLOATING, _limit_backward))
    def backward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        output: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        training: bool,
        kind: int,
        parameter: float,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        format = memory_format(input)
        makers: Any = (_native.empty_like, _empty_column, _empty_column, _native.empty_like)
        grads = [make(input, format) if need else None for make, need in zip(makers, needs, strict=True)]
        if input.numel() == 0:
            for grad in grads:
                if grad is not None:
                    grad.zero_()
        else:
            launcher().batch_norm_backward(
                _view(input, format),
                _laid_out(grad_output, format),
                _laid_out(input, format),
                _computed(weight, input),
                _computed(bias, input),
                _laid_out(residual, format),
                _laid_out(output, format),
                mean,
                rstd,
                *grads,
                training,
                kind,
                parameter,
            )
        return [grad for grad in grads if grad is not None]

    @BATCH_NORM_STATISTICS.implement(backend, Support(_native.FLOATING))
    def statistics(input: Tensor) -> tuple[Tensor, Tensor]:
        if input.numel() == 0:
            return reference_statistics(input)
        format = memory_format(input)
        mean, squares = _empty_column(input), _empty_column(input)
        launcher().batch_norm_statistics(_view(input, format), _laid_out(input, format), mean, squares)
        return mean, squares

    @BATCH_NORM_APPLY.implement(backend, Support(_native.FLOATING))
    def apply(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        mean_gradient: Tensor,
        mean_product: Tensor,
    ) -> Tensor:
        format = memory_format(input)
        grad_input = _native.empty_like(input, format)
        if input.numel():
            launcher().batch_norm_apply(
                _view(input, format),
                _laid_out(grad_output, format),
                _laid_out(input, format),
                _computed(weight, input),
                mean,
                rstd,
                mean_gradient,
                mean_product,
                grad_input,
            )
        return grad_input


# ------------------------------------------------------------------------------------------------ native: cpu and cuda


class _NativeLaunchers:
    """The launchers of a backend of native kernels: the same calls on addresses."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Callable[..., None]:
        backend = self.backend

        def launch(view: Shape3, first: Tensor, *arguments: Any) -> None:
            addresses = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            kernel = getattr(_native.kernels(backend), name)
            kernel(_native.DTYPE_CODES[first.dtype], *view, first.data_ptr(), *addresses, _native.context(first))

        self.__dict__[name] = launch
        return launch


_CPU = _NativeLaunchers("cpu")

_implement("cpu", lambda: _CPU)


class _CudaLaunchers(_NativeLaunchers):
    """The CUDA kernels' launchers: those that reduce take a workspace besides."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        launch = super().__getattr__(name)
        if name not in ("batch_norm", "batch_norm_backward", "batch_norm_statistics"):
            return launch

        def launch_with_workspace(view: Shape3, first: Tensor, *arguments: Any) -> None:
            size = _native.kernels("cuda").batch_norm_workspace(_native.DTYPE_CODES[first.dtype], *view)
            launch(view, first, *arguments, _native.workspace(size, first))

        self.__dict__[name] = launch_with_workspace
        return launch_with_workspace


_CUDA = _CudaLaunchers("cuda")

_implement("cuda", lambda: _CUDA)


# ----------------------------------------------------------------------------------------------------------- triton


def _triton() -> Any:
    from fastdl.kernels import batch_norm

    return batch_norm


_implement("triton", _triton)


# ---------------------------------------------------------------------------------------------------------- autograd


class BatchNormFunction(torch.autograd.Function):
    """Autograd of batch_norm: in training (mean and variance None), giving the output and the batch's mean and unbiased
    variance, else with given statistics, giving the output.

    Saves the input, and for the activation's gradient nothing more where there is no residual: its argument is computed
    again. With a residual it saves the output, or the residual where the output does not tell the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        kind: int,
        parameter: float,
        requested: str,
        selection: Any,
    ) -> Any:
        training = mean is None
        ctx.set_materialize_grads(False)
        ctx.arguments = training, eps, kind, parameter, requested
        arguments = (eps, kind, parameter)
        if training:
            output, mean, rstd, unbiased = BATCH_NORM(
                requested, input, weight, bias, residual, *arguments, selection=selection
            )
            second = rstd
            ctx.mark_non_differentiable(mean, unbiased)
        else:
            output = BATCH_NORM_INFERENCE(
                requested, input, weight, bias, residual, mean, variance, *arguments, selection=selection
            )
            second = variance
        from_output = kind and residual is not None and activations.saves(kind, parameter) == "output"
        again = kind and not from_output
        ctx.save_for_backward(
            input,
            weight if ctx.needs_input_grad[0] or again else None,
            bias if again else None,
            residual if again else None,
            output if from_output else None,
            mean,
            second,
        )
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        return (output, mean, unbiased) if training else output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 11
        training, eps, kind, parameter, requested = ctx.arguments
        input, weight, bias, residual, output, mean, second = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        double = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if double and training:  # the gradient of the gradient flows through the statistics
            variance, mean = torch.var_mean(input.to(compute_dtype(input)), _reduced(input), correction=0)
            rstd = torch.rsqrt(variance + eps)
        elif training:
            rstd = second
        else:
            mean, rstd = mean.to(compute_dtype(input)), inverse_deviation(second, eps, input)
        made_of = (input, weight, bias, residual, output, mean, rstd)
        passed_on = grad_output if kind == 0 and needs[3] else None  # the gradient of a sum is that of its summands
        needs[3] = needs[3] and kind != 0
        if double:
            gradients = reference_backward(grad_output, *made_of, training, kind, parameter, needs)
        elif any(needs):
            gradients = BATCH_NORM_BACKWARD(requested, grad_output, *made_of, training, kind, parameter, needs)
        else:
            gradients = []
        rest = iter(gradients)
        results: list[Any] = [next(rest) if need else None for need in needs]
        for i, dtype in enumerate(ctx.dtypes, 1):
            if needs[i]:
                results[i] = results[i].to(dtype)
        if passed_on is not None:
            results[3] = passed_on
        return *results, *(None,) * 7


# --------------------------------------------------------------------------------------------- over several processes


def synchronised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """Batch normalisation in training over the batches of all processes of a group.

    Args:
        input: (N, C, *); N may differ between the processes, and may be 0.
        running_mean, running_var, weight, bias: (C,) or None; the running statistics move by ``momentum``.
        group: the torch.distributed process group; every process of it calls this, and the backward.
    """
    _check(input, weight, bias, None, running_mean, running_var, True)
    output: Tensor
    output, mean, variance = SynchronisedFunction.apply(input, weight, bias, eps, group, state.requested)
    if running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, variance, momentum)
    return output


def update_running(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, momentum: float) -> None:
    """Moves the running statistics, in place, towards those of a batch; none of them takes part in a gradient."""
    for running, batch in ((running_mean, mean), (running_var, variance)):
        running.lerp_(batch if batch.dtype == running.dtype else batch.to(running.dtype), momentum)


class SynchronisedFunction(torch.autograd.Function):
    """Autograd of :func:`synchronised`: one gather of the statistics forward, one sum of two gradients backward.

    Gives the output and the mean and unbiased variance over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any, requested: str
    ) -> Any:
        mean, squares = BATCH_NORM_STATISTICS(requested, input)
        channels = input.shape[1]
        # In float64, where counts are exact and the order of the processes leaves no trace.
        own = torch.cat([mean.double(), squares.double(), mean.new_tensor([input.numel() // channels]).double()])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        means, sums, counts = torch.stack(gathered).split((channels, channels, 1), 1)
        # Chan, Golub and LeVeque, 1983
        count = counts.sum()
        joint = (means * counts).sum(0) / count
        joint_squares = (sums + counts * (means - joint).square()).sum(0)
        dtype = mean.dtype
        mean, variance = joint.to(dtype), (joint_squares / count).to(dtype)
        unbiased = (joint_squares / (count - 1)).to(dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, unbiased)
        output = BATCH_NORM_INFERENCE(requested, input, weight, bias, None, mean, variance, eps, 0, 0.0)
        ctx.save_for_backward(input, weight, mean, inverse_deviation(variance, eps, input), count)
        ctx.group, ctx.requested = group, requested
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        return output, mean, unbiased

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        input, weight, mean, rstd, count = ctx.saved_tensors
        needs_input, *needs = ctx.needs_input_grad[:3]
        if grad_output is None:  # the other processes wait for this one's sums
            grad_output = torch.zeros_like(input)
        requested = ctx.requested
        sums = BATCH_NORM_BACKWARD(
            requested,
            grad_output,
            input,
            None,
            None,
            None,
            None,
            mean,
            rstd,
            False,
            0,
            0.0,
            [False, True, True, False],
        )
        grads = [grad.to(dtype) if need else None for grad, need, dtype in zip(sums, needs, ctx.dtypes, strict=True)]
        grad_input = None
        if needs_input:
            product, gradient = _joint_means(sums, count, ctx.group)
            grad_input = BATCH_NORM_APPLY(requested, grad_output, input, weight, mean, rstd, gradient, product)
        return grad_input, *grads, None, None, None


def _joint_means(sums: Sequence[Tensor], count: Tensor, group: Any) -> list[Tensor]:
    joint = torch.stack([t.double() for t in sums])
    dist.all_reduce(joint, group=group)
    return [row.to(t.dtype) for row, t in zip(joint / count, sums, strict=True)]
