"""The package's functions: torch.nn.functional's names and signatures, plus keyword-only options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import activations
from fastdl.activations import Activation
from fastdl.dispatch import AUTO_ORDER, Op, Selection, UnsupportedError, is_plain, state
from fastdl.ops import batch_norm as _batch_norm
from fastdl.ops import conv as _conv
from fastdl.ops import linear as _linear
from fastdl.ops import pooling as _pooling
from fastdl.ops.activation import ACTIVATION, ActivationFunction

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "elu",
    "fractional_max_pool2d",
    "gelu",
    "leaky_relu",
    "linear",
    "max_pool2d",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation((input - mean) / sqrt(variance + eps) * weight + bias + residual), fused (Ioffe and Szegedy, 2015).

    As :func:`torch.nn.functional.batch_norm`. In training mean and (biased) variance are those of each channel over the
    batch, and the running statistics move by ``momentum`` towards mean and unbiased variance; in evaluation the running
    statistics are mean and variance.

    Args:
        input: (N, C, *), any strides; float32, float16, bfloat16 or float64.
        running_mean, running_var: (C,); both None in training that keeps no running statistics.
        weight, bias: (C,) or None. These and the running statistics have input's dtype, or float32 for 16-bit input.
        activation: as for :func:`linear`.
        residual: of input's shape and dtype, added before the activation.

    Returns:
        Of input's shape and dtype; channels_last where input is, else contiguous.

    Raises:
        TypeError: an argument that is not a tensor, or an activation that is neither name nor Activation.
        ValueError: one value a channel in training, an eps that is not positive, one running statistic of two, or an
            unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit, or no running statistics in evaluation.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    kind, parameter = activations.resolve(activation)
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    op = _batch_norm.BATCH_NORM if training else _batch_norm.BATCH_NORM_INFERENCE
    statistics = () if training else (running_mean, running_var)
    arguments = (input, weight, bias, residual, *statistics, eps, kind, parameter)
    plain = is_plain(compiling, input, running_mean, running_var, weight, bias, residual)
    if plain:
        _batch_norm.check_running(input, running_mean, running_var, training)
        needs_gradient = torch.is_grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
        selection = _select(op, requested, needs_gradient, compiling, *arguments)
    else:
        selection = _select_reference(op, requested, *arguments)
    if selection is not None and selection.backend == "torch":
        y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return activations.reference(y if residual is None else y + residual, kind, parameter)
    if not needs_gradient:
        result: Any = op(requested, *arguments, selection=selection)
        if not training:
            return result  # type: ignore[no-any-return]
        output, mean, _, variance = result
    else:
        statistics = (None, None) if training else statistics
        result = _batch_norm.BatchNormFunction.apply(
            input, weight, bias, residual, *statistics, eps, kind, parameter, requested, selection
        )
        if not training:
            return result  # type: ignore[no-any-return]
        output, mean, variance = result
    if running_mean is not None and running_var is not None and input.numel():
        _batch_norm.update_running(running_mean, running_var, mean, variance, momentum)
    return output  # type: ignore[no-any-return]


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | Activation | None = None
) -> Tensor:
    """activation(input @ weight.T + bias), fused.

    As :func:`torch.nn.functional.linear`, with autocast, any leading dimensions and any strides.

    Args:
        input: (*, in_features); float32, float16, bfloat16 or float64.
        weight: (out_features, in_features), of the same dtype and device.
        bias: (out_features,) or None.
        activation: a name (``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"sigmoid"``, ``"tanh"``, ``"gelu"``,
            ``"silu"``), an :class:`fastdl.Activation`, or None.

    Returns:
        (*, out_features).

    Raises:
        TypeError: an argument that is not a tensor, or an activation that is neither name nor Activation.
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    kind, parameter = activations.resolve(activation)
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input, weight, bias):
        return _reference(_linear.LINEAR, requested, input, weight, bias, kind, parameter)  # type: ignore[no-any-return]
    if input.device.type in AUTO_ORDER and torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    training = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    two_outputs = training and activations.saves(kind, parameter) == "preactivation"
    op = _linear.LINEAR_WITH_PREACTIVATION if two_outputs else _linear.LINEAR
    selection = _select(op, requested, training, compiling, input, weight, bias, kind, parameter)
    if selection is not None and selection.backend == "torch":
        return _linear.reference(input, weight, bias, kind, parameter)
    if not training:
        return op(requested, input, weight, bias, kind, parameter, selection=selection)  # type: ignore[no-any-return]
    result: Any = _linear.LinearFunction.apply(input, weight, bias, kind, parameter, requested, selection)
    return result[0] if two_outputs else result  # type: ignore[no-any-return]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | Activation | None = None,
) -> Tensor:
    """activation(conv2d(input, weight) + bias), fused.

    As :func:`torch.nn.functional.conv2d`, with autocast; output and gradients are channels_last where torch's are.

    Args:
        input: (N, in_channels, H, W) or (in_channels, H, W); float32, float16, bfloat16 or float64.
        weight: (out_channels, in_channels / groups, R, S), of the same dtype and device.
        bias: (out_channels,) or None.
        stride, dilation: one number, or two.
        padding: the same, or ``"valid"`` (none) or ``"same"`` (as much as keeps H and W; stride 1 only).
        groups: into which channels are divided, each with kernels of its own.
        activation: as for :func:`linear`.

    Returns:
        (N, out_channels, P, Q) or (out_channels, P, Q).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown activation.
        RuntimeError: shapes, dtypes, devices, strides or paddings that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups, activation)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    activation: str | Activation | None = None,
) -> Tensor:
    """activation(conv1d(input, weight) + bias), fused; as :func:`torch.nn.functional.conv1d`.

    Args:
        input: (N, in_channels, L) or (in_channels, L).
        weight: (out_channels, in_channels / groups, S).
        bias, stride, padding, dilation, groups, activation: as for :func:`conv2d`.

    Returns:
        (N, out_channels, Q) or (out_channels, Q).

    Raises:
        As :func:`conv2d`.
    """
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups, activation)


def _convolution(
    name: str,
    dimensions: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    activation: str | Activation | None,
) -> Tensor:
    kind, parameter = activations.resolve(activation)
    if not (isinstance(input, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))):
        named = {"input": input, "weight": weight, "bias": bias}
        argument, given = next(item for item in named.items() if not isinstance(item[1], Tensor))
        raise TypeError(f"{name}: {argument} must be a tensor; got {type(given).__name__}")
    if type(groups) is not int and not isinstance(groups, torch.SymInt):
        raise TypeError(f"{name}: groups must be an integer; got {groups!r}")
    rank = dimensions + 2
    sizes = "height, width" if dimensions == 2 else "length"
    if weight.dim() != rank:
        raise RuntimeError(
            f"{name}: weight has shape {tuple(weight.shape)}, allowed: (out_channels, in_channels / groups, {sizes})"
        )
    batched = input.dim() == rank
    if not batched and input.dim() != rank - 1:
        raise RuntimeError(
            f"{name}: input has shape {tuple(input.shape)}, allowed: (N, channels, {sizes}) or (channels, {sizes})"
        )
    stride = _numbers(name, "stride", stride, dimensions, 1)
    dilation = _numbers(name, "dilation", dilation, dimensions, 1)
    if not batched:
        input = input.unsqueeze(0)
    if dimensions == 1:  # torch, too, makes these contiguous
        input, weight = input.contiguous().unsqueeze(2), weight.unsqueeze(2)
    if isinstance(padding, str):
        input, padding = _named_padding(name, padding, input, weight, stride, dilation)
    else:
        padding = _numbers(name, "padding", padding, dimensions, 0)
    output = _convolution_2d(input, weight, bias, (stride, padding, dilation, groups, kind, parameter))
    if dimensions == 1:
        output = output.squeeze(2)
    return output if batched else output.squeeze(0)


def _convolution_2d(input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input, weight, bias):
        return _reference(_conv.CONV, requested, input, weight, bias, *options)  # type: ignore[no-any-return]
    if input.device.type in AUTO_ORDER and torch.is_autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input, weight, bias)
    training = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    two_outputs = training and activations.saves(*options[-2:]) == "preactivation"
    op = _conv.CONV_WITH_PREACTIVATION if two_outputs else _conv.CONV
    selection = _select(op, requested, training, compiling, input, weight, bias, *options)
    if selection is not None and selection.backend == "torch":
        return _conv.reference(input, weight, bias, *options)
    if not training:
        return op(requested, input, weight, bias, *options, selection=selection)  # type: ignore[no-any-return]
    result: Any = _conv.ConvFunction.apply(input, weight, bias, *options, requested, selection)
    return result[0] if two_outputs else result  # type: ignore[no-any-return]


def _numbers(name: str, argument: str, value: Any, dimensions: int, alone: int) -> tuple[int, int]:
    """One number for each of height and width; ``alone`` is for the height of a 1-D convolution."""
    if type(value) is int:
        return (alone, value) if dimensions == 1 else (value, value)
    numbers = value if isinstance(value, tuple | list | torch.Size) else (value,)
    if not all(isinstance(number, int | torch.SymInt) for number in numbers):
        raise TypeError(f"{name}: {argument} must be an integer or {dimensions} of them; got {value!r}")
    if len(numbers) not in (1, dimensions):
        raise RuntimeError(f"{name}: {argument} is {value!r}, allowed: one number or {dimensions}")
    return (alone, numbers[0]) if dimensions == 1 else (numbers[0], numbers[-1])


def _named_padding(
    name: str, padding: str, input: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """The input, padded at its end where "same" needs more there than at the beginning, and the padding of both."""
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"{name}: padding is {padding!r}, allowed: 'same', 'valid' or numbers")
    if max(stride) > 1:
        raise RuntimeError(f"{name}: padding is 'same' and stride is {max(stride)}, allowed: stride 1")
    height, width = [d * (kernel - 1) for d, kernel in zip(dilation, weight.shape[2:], strict=True)]
    if height % 2 or width % 2:
        input = F.pad(input, (0, width % 2, 0, height % 2))
    return input, (height // 2, width // 2)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), elementwise; as :func:`torch.nn.functional.relu`."""
    return _activation("relu", input, 1, 0.0, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where positive, else negative_slope * input; as :func:`torch.nn.functional.leaky_relu`."""
    return _activation("leaky_relu", input, 2, float(negative_slope), inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """input where positive, else alpha * (exp(input) - 1) (Clevert et al., 2015).

    As :func:`torch.nn.functional.elu`.
    """
    return _activation("elu", input, 3, float(alpha), inplace)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input)), elementwise; as :func:`torch.sigmoid`."""
    return _activation("sigmoid", input, 4, 0.0)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise; as :func:`torch.tanh`."""
    return _activation("tanh", input, 5, 0.0)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input) (Hendrycks and Gimpel, 2016); as :func:`torch.nn.functional.gelu`.

    Args:
        approximate: ``"none"``, by erf, or ``"tanh"``.

    Raises:
        ValueError: another ``approximate``.
    """
    return _activation("gelu", input, Activation("gelu", approximate=approximate).kind, 0.0)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input * sigmoid(input), elementwise; as :func:`torch.nn.functional.silu`."""
    return _activation("silu", input, 8, 0.0, inplace)


def _activation(name: str, input: Tensor, kind: int, parameter: float, inplace: bool = False) -> Tensor:
    requested = state.requested
    if inplace:
        if requested not in ("auto", "torch"):
            raise UnsupportedError(f"fastdl.{name}: inplace is True, allowed on backend {requested!r}: False")
        return _IN_PLACE[name](input, parameter)
    return _unary(ACTIVATION, ActivationFunction.apply, requested, input, kind, parameter)  # type: ignore[no-any-return]


_IN_PLACE = {
    "relu": lambda input, _: F.relu(input, inplace=True),
    "leaky_relu": lambda input, slope: F.leaky_relu(input, slope, inplace=True),
    "elu": lambda input, alpha: F.elu(input, alpha, inplace=True),
    "silu": lambda input, _: F.silu(input, inplace=True),
}


# ----------------------------------------------------------------------------------------------------------- pooling


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The maximum of each window of an image; as :func:`torch.nn.functional.max_pool2d`.

    The gradient goes to the first maximum of a window, and is the same in every run.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        kernel_size, stride, padding, dilation: a number, or one for H and one for W; stride: kernel_size by default;
            padding: at most half of kernel_size.
        ceil_mode: whether a window may reach over the right and lower edge.
        return_indices: whether to return where the maxima are too.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's memory format; with return_indices also int64 places in H x W.

    Raises:
        TypeError: an argument that is not of its type.
        RuntimeError: sizes that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    name, requested = "max_pool2d", state.requested
    kernel_size = _pair(name, "kernel_size", kernel_size)
    stride = _pair(name, "stride", kernel_size if stride is None else stride, kernel_size)
    windows = kernel_size, stride, _pair(name, "padding", padding), _pair(name, "dilation", dilation), bool(ceil_mode)
    plain = _pooling.MAX_POOL2D, _pooling.MAX_POOL2D_WITH_INDICES
    # A gradient needs to know where the maxima are.
    if not return_indices and not (isinstance(input, Tensor) and input.requires_grad and torch.is_grad_enabled()):
        return _unary(plain[0], None, requested, input, *windows)
    compact = not return_indices and kernel_size[0] * kernel_size[1] <= _pooling.COMPACT_WINDOW
    result = _unary(
        plain[1],
        _pooling.MaxPool2dFunction.apply,
        requested,
        input,
        *windows,
        compact,
        reference=_max_pool2d_of_torch if not return_indices else None,
    )
    return result[0] if isinstance(result, tuple) and not return_indices else result


def _max_pool2d_of_torch(input: Tensor, *arguments: Any) -> Tensor:
    """By torch, which keeps the places for its gradient itself."""
    *windows, _ = arguments
    return F.max_pool2d(input, *windows)  # type: ignore[no-any-return]


def avg_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average of each window of an image; as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        kernel_size, stride, padding, ceil_mode: as for :func:`max_pool2d`.
        count_include_pad: whether the padding's zeros count.
        divisor_override: by what to divide each window's sum, if not by its size.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's memory format.

    Raises:
        As :func:`max_pool2d`.
    """
    name = "avg_pool2d"
    kernel_size = _pair(name, "kernel_size", kernel_size)
    stride = _pair(name, "stride", kernel_size if stride is None else stride, kernel_size)
    windows = kernel_size, stride, _pair(name, "padding", padding), bool(ceil_mode), bool(count_include_pad)
    return _unary(  # type: ignore[no-any-return]
        _pooling.AVG_POOL2D, _pooling.AvgPool2dFunction.apply, state.requested, input, *windows, divisor_override
    )


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Averages of OH x OW windows that cover an image; as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides.
        output_size: a number, or one for H and one for W; None: the input's.

    Returns:
        (N, C, OH, OW) or (C, OH, OW), in the input's memory format.

    Raises:
        As :func:`max_pool2d`.
    """
    name = "adaptive_avg_pool2d"
    if isinstance(output_size, Sequence) and isinstance(input, Tensor) and input.dim() >= 2:
        if len(output_size) != 2:
            raise RuntimeError(f"{name}: output_size is {tuple(output_size)}, allowed: a number or two")
        output_size = [n if o is None else o for o, n in zip(output_size, input.shape[-2:], strict=True)]
    size = _pair(name, "output_size", output_size)
    return _unary(  # type: ignore[no-any-return]
        _pooling.ADAPTIVE_AVG_POOL2D, _pooling.AdaptiveAvgPool2dFunction.apply, state.requested, input, size
    )


def fractional_max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    output_size: int | Sequence[int] | None = None,
    output_ratio: Sequence[float] | None = None,
    return_indices: bool = False,
    _random_samples: Tensor | None = None,
) -> Any:
    """The maximum of windows at random steps (Graham, 2014); as :func:`torch.nn.functional.fractional_max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size: a number, or one for H and one for W.
        output_size: OH and OW, a number or two; or instead
        output_ratio: OH / H and OW / W.
        return_indices: whether to return where the maxima are too.
        _random_samples: (N, C, 2) in [0, 1); drawn as torch draws them if None.

    Returns:
        (N, C, OH, OW) or (C, OH, OW); with return_indices also int64 places in H x W.

    Raises:
        ValueError: neither output_size nor output_ratio.
        As :func:`max_pool2d`.
    """
    name = "fractional_max_pool2d"
    kernel_size = _pair(name, "kernel_size", kernel_size)
    if not isinstance(input, Tensor) or input.dim() not in (3, 4):
        _pooling.check_input(name, input)
    if output_size is None:
        if output_ratio is None:
            raise ValueError(f"{name}: output_size and output_ratio are None, allowed: one of them")
        if len(output_ratio) != 2:
            raise ValueError(f"{name}: output_ratio is {tuple(output_ratio)}, allowed: two numbers")
        output_size = [int(n * ratio) for n, ratio in zip(input.shape[-2:], output_ratio, strict=True)]
    if _random_samples is None:
        batch = 1 if input.dim() == 3 else input.shape[0]
        _random_samples = torch.rand(batch, input.shape[-3], 2, dtype=input.dtype, device=input.device)
    arguments = _random_samples, kernel_size, _pair(name, "output_size", output_size)
    op, function = _pooling.FRACTIONAL_MAX_POOL2D, _pooling.FractionalMaxPool2dFunction.apply
    result = _unary(op, function, state.requested, input, *arguments)
    return result if return_indices else result[0]


def _pair(name: str, argument: str, value: Any, empty: Sequence[int] = ()) -> Sequence[int]:
    """A number, or a number for each axis, as two; an empty sequence, where torch takes one, is ``empty``."""
    values = value if isinstance(value, Sequence) else (value,)
    if not all(isinstance(v, int | torch.SymInt) for v in values):
        raise TypeError(f"{name}: {argument} is {value!r}, allowed: a whole number or two")
    if len(values) == 0 and len(empty) > 0:
        return empty
    if len(values) not in (1, 2):
        raise RuntimeError(f"{name}: {argument} is {tuple(values)}, allowed: a number or two")
    return [values[0], values[-1]]


# ------------------------------------------------------------------------------------------- shared by all functions


def _unary(
    op: Op,
    function: Callable[..., Any] | None,
    requested: str,
    input: Tensor,
    *arguments: Any,
    reference: Callable[..., Any] | None = None,
) -> Any:
    """A function of one tensor that may need a gradient: op(input, *arguments), by ``function`` where it does.

    ``reference``: where torch itself does it otherwise than the op.
    """
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input):
        return _reference(op, requested, input, *arguments, reference=reference)
    training = function is not None and torch.is_grad_enabled() and input.requires_grad
    selection = _select(op, requested, training, compiling, input, *arguments)
    if selection is not None and selection.backend == "torch":
        return (reference or op.reference)(input, *arguments)
    if not training or function is None:
        return op(requested, input, *arguments, selection=selection)
    return function(input, *arguments, requested, selection)


def _reference(op: Op, requested: str, *arguments: Any, reference: Callable[..., Any] | None = None) -> Any:
    """Calls the reference for what is no kernel's business: see :func:`fastdl.dispatch.is_plain`."""
    _select_reference(op, requested, *arguments)
    return (reference or op.reference)(*arguments)


def _select_reference(op: Op, requested: str, *arguments: Any) -> Selection:
    """The reference's selection, unless a kernel was named."""
    if requested not in ("auto", "torch"):
        if op.check is not None:
            op.check(*arguments)
        raise UnsupportedError(
            f"fastdl.{op.name}: backend {requested!r} takes plain tensors outside torch.func, allowed: auto, torch"
        )
    if state.traces and not torch.compiler.is_compiling():
        reason = "named by use_backend" if requested == "torch" else "tensor subclass, torch.func or a function mode"
        op.record(Selection("torch", reason, op.reference), arguments)
    return _TORCH


def _select(op: Op, requested: str, training: bool, compiling: bool, *arguments: Any) -> Selection | None:
    """The backend of a call, after the check of its arguments; None while compiling: the op will choose at run time."""
    if compiling:
        if op.check is not None:
            op.check(*arguments)
        return _TORCH if requested == "torch" else None
    selection = op.select(requested, arguments, training)
    if selection.backend == "torch" and state.traces:
        op.record(selection, arguments)
    return selection


_TORCH = Selection("torch", "named by use_backend", lambda *_: None)


def _autocast(*tensors: Tensor | None) -> Any:
    """The tensors in autocast's dtype, as torch casts them for a linear layer: float64 and integers stay."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)  # type: ignore[union-attr]
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]
