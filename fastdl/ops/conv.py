"""Fused 2-D convolution, activation(conv2d(input, weight) + bias): ops, gradients and implementations by backend.

A 1-D convolution is one of height 1; :mod:`fastdl.functional` adds and takes away that dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastdl import accuracy, activations
from fastdl.dispatch import Op, Support
from fastdl.ops import _native, linear
from fastdl.ops.activation import ACTIVATION_BACKWARD

Pair = Sequence[int]  # of height and width


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
) -> Tensor:
    """activation(conv2d(input, weight) + bias) by torch's operators."""
    return activations.reference(F.conv2d(input, weight, bias, stride, padding, dilation, groups), kind, parameter)


def _reference_with_preactivation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return activations.reference(z, kind, parameter) if kind else z.clone(), z


def reference_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    needs: Sequence[bool],
    grad_preactivation: Tensor | None = None,
) -> list[Tensor]:
    """Those gradients of input, weight and bias that are needed, by torch's operators, so differentiable again.

    Args:
        grad_output, saved: (N, K, P, Q); input: (N, C, H, W), of which only the shape is read unless the gradient of
            the weight is needed; weight: (K, C / groups, R, S).
        grad_preactivation: (N, K, P, Q), added to the pre-activation's gradient.
    """
    dz = activations.reference_gradient(grad_output, saved, kind, parameter)
    if grad_preactivation is not None:
        dz = dz + grad_preactivation
    channels = [weight.shape[0]] if needs[2] else None
    gradients = torch.ops.aten.convolution_backward(
        dz, input, weight, channels, stride, padding, dilation, False, [0, 0], groups, needs
    )
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many positions a kernel takes along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise RuntimeError(f"conv: {name} has dtype {tensor.dtype}, allowed: {input.dtype}, the dtype of input")
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"conv: {name} is on {tensor.device}, allowed: {input.device}, the device of input")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if min(values) < least:
            raise RuntimeError(f"conv: {name} is {tuple(values)}, allowed: {least} or more")
    if groups < 1:
        raise RuntimeError(f"conv: groups is {groups}, allowed: 1 or more")
    if weight.dim() != 4:
        raise RuntimeError(
            f"conv: weight has shape {tuple(weight.shape)}, allowed: (out_channels, channels / groups, height, width)"
        )
    if input.dim() != 4:
        raise RuntimeError(f"conv: input has shape {tuple(input.shape)}, allowed: (N, channels, height, width)")
    if weight.shape[0] < 1 or weight.shape[0] % groups:
        raise RuntimeError(
            f"conv: weight has shape {tuple(weight.shape)}, allowed: {groups} or a multiple of it as its first size, "
            f"since groups is {groups}"
        )
    if min(weight.shape[2:]) < 1:
        raise RuntimeError(f"conv: weight has shape {tuple(weight.shape)}, allowed: a kernel of 1 x 1 or more")
    if input.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"conv: input has shape {tuple(input.shape)}, allowed: {weight.shape[1] * groups} channels, since weight "
            f"has shape {tuple(weight.shape)} and groups is {groups}"
        )
    if min(input.shape[2:]) < 1:
        raise RuntimeError(f"conv: input has shape {tuple(input.shape)}, allowed: a height and width of 1 or more")
    for size, kernel, p, d in zip(input.shape[2:], weight.shape[2:], padding, dilation, strict=True):
        if size + 2 * p < d * (kernel - 1) + 1:
            raise RuntimeError(
                f"conv: input has shape {tuple(input.shape)}, allowed: with padding {tuple(padding)} at least the "
                f"kernel's size, {tuple(d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"conv: bias has shape {tuple(bias.shape)}, allowed: ({weight.shape[0]},)")
    if not activations.accepts(input.dtype, kind):
        raise RuntimeError(f"conv: input has dtype {input.dtype}, allowed with an activation: floating-point dtypes")


def _limit(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> str | None:
    return activations.limit(*arguments[-2:])


def _limit_with_preactivation(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> str | None:
    kind, parameter = arguments[-2:]
    return activations.limit(kind, parameter) or (None if kind else "kind is none, allowed: an activation")


def _shape_class(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
) -> tuple[str, tuple[int, ...]]:
    out_channels, channels, *kernel = weight.shape
    if groups > 1:
        sort = "depthwise" if channels == 1 else "grouped"
    else:
        sort = "1x1" if kernel == [1, 1] else "dense"
    layout = "channels last" if memory_format(input, weight) is torch.channels_last else "contiguous"
    _, _, p, q = _output_shape(input, weight, stride, padding, dilation)
    label = f"{sort} {'fused' if kind else 'plain'}, {layout}"
    return label, (input.shape[0] * p * q, channels * kernel[0] * kernel[1], out_channels)


def _output_shape(input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, ...]:
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    # torch gives no channels where the input has none
    return (input.shape[0], weight.shape[0] if weight.shape[1] else 0, *(output_size(*size) for size in sizes))


def memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of the output and all gradients, by torch's rule: channels last if input or weight is."""
    return torch.channels_last if _is_channels_last(input) or _is_channels_last(weight) else torch.contiguous_format


def _is_channels_last(tensor: Tensor) -> bool:
    # These settle most tensors; torch's rule in full costs some microseconds.
    channels, _, columns = tensor.stride()[1:]
    if channels > columns:
        return False
    if channels < columns and tensor.is_contiguous(memory_format=torch.channels_last):
        return True
    return suggest_memory_format(tensor) is torch.channels_last


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, d: Pair, *_: Any) -> Tensor:
    shape = _output_shape(input, weight, stride, padding, d)
    return input.new_empty(shape).to(memory_format=memory_format(input, weight))


def _fake_backward(grad_output: Tensor, input: Tensor, weight: Tensor, *arguments: Any) -> list[Tensor]:
    *_, needs, _ = arguments
    gradients = [
        grad_output.new_empty(tensor.shape).to(memory_format=memory_format(input, weight))
        for tensor, need in zip((input, weight), needs, strict=False)
        if need
    ]
    return [*gradients, grad_output.new_empty(weight.shape[:1])] if needs[2] else gradients


_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups, int kind, float parameter"
_ARGUMENTS = f"Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, str backend"
CONV = Op(
    f"conv({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=reference,
    tensors=3,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check,
)
CONV_WITH_PREACTIVATION = Op(
    f"conv_with_preactivation({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda *args: (_fake(*args), _fake(*args)),
    reference=_reference_with_preactivation,
    tensors=3,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check,
)
CONV_BACKWARD = Op(
    f"conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? saved, {_GEOMETRY}, bool[3] needs, "
    "str backend) -> Tensor[]",
    fake=_fake_backward,
    reference=reference_backward,
    tensors=4,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


def _add(backend: str, forward: Callable[..., Any], backward: Callable[..., list[Tensor]], note: str = "") -> None:
    """Adds a backend's implementation of the three ops.

    Args:
        forward: of (input, weight, bias, stride, padding, dilation, groups, kind, parameter, preactivation: bool);
            returns the output, and the activation's argument or None, both in :func:`memory_format`.
        backward: of CONV_BACKWARD's arguments; the same list as that op. ``input`` may be a stand-in of stride 0 that
            has only the shape, unless the weight's gradient is needed.

    Neither is called with an empty output or no channels; ``bias`` is contiguous, ``saved`` in the output's format.
    """

    def run(preactivation: bool, *arguments: Any) -> Any:
        input, weight, bias, *rest = arguments
        if input.numel() == 0:
            empty = _fake(*arguments)
            return empty, torch.empty_like(empty)
        return forward(input, weight, None if bias is None else bias.contiguous(), *rest, preactivation)

    @CONV.implement(backend, Support(_native.FLOATING, _limit, note))
    def conv(*arguments: Any) -> Tensor:
        return run(False, *arguments)[0]  # type: ignore[no-any-return]

    @CONV_WITH_PREACTIVATION.implement(backend, Support(_native.FLOATING, _limit_with_preactivation, note))
    def conv_with_preactivation(*arguments: Any) -> tuple[Tensor, Tensor]:
        return run(True, *arguments)  # type: ignore[no-any-return]

    @CONV_BACKWARD.implement(backend, Support(_native.FLOATING, note=note))
    def conv_backward(
        grad_output: Tensor, input: Tensor, weight: Tensor, saved: Tensor | None, *arguments: Any
    ) -> list[Tensor]:
        if grad_output.numel() == 0:
            return reference_backward(grad_output, input, weight, saved, *arguments)
        if saved is not None:
            saved = saved.contiguous(memory_format=_format_of(saved))
        return backward(grad_output, input, weight, saved, *arguments)


def _format_of(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format


def _empty(shape: Sequence[int], like: Tensor, format: torch.memory_format) -> Tensor:
    """An uninitialised tensor of ``like``'s dtype and device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)


def _pixels(tensor: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C): a view of a tensor that is channels last."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def _image(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------- cpu


def _cpu_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    preactivation: bool,
) -> tuple[Tensor, Tensor | None]:
    format = memory_format(input, weight)
    if _is_1x1(weight, stride, padding, groups):
        x = input.contiguous(memory_format=format)
        if _takes_1x1(x, format):
            return _cpu_1x1(x, weight.flatten(1), bias, kind, parameter, preactivation, format)
    elif _takes_depthwise(weight, groups, stride, format, input.dtype, backward=False):
        x, shape = input.contiguous(), _output_shape(input, weight, stride, padding, dilation)
        options = (stride, padding, dilation, (1, 1), False, kind, parameter)
        y, z = _depthwise(x, weight, bias, shape, *options, preactivation)
        return y.contiguous(memory_format=format), None if z is None else z.contiguous(memory_format=format)
    z = _library(input, weight, bias, stride, padding, dilation, groups)
    if not kind:
        return z, None
    # The library's own fused relu would turn NaN into 0.
    y = torch.empty_like(z) if preactivation else z
    _native.kernels("cpu").activation(
        _native.DTYPE_CODES[z.dtype], z.data_ptr(), y.data_ptr(), z.numel(), kind, parameter, _native.context(z)
    )
    return y, z if preactivation else None


def _cpu_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    format = memory_format(input, weight)
    dz, grad_bias = grad_output.contiguous(memory_format=format), None
    if saved is not None or needs[2]:
        dz, grad_bias = _activation_and_bias_gradient(dz, saved, kind, parameter, needs[2], format)
    geometry = (stride, padding, dilation)
    gradients: list[Tensor] = []
    if not (needs[0] or needs[1]):
        pass
    elif _is_1x1(weight, stride, padding, groups):
        gradients = _cpu_1x1_backward(dz, input, weight, needs, format)
    elif _takes_depthwise(weight, groups, stride, format, dz.dtype, backward=True):
        gradients = _depthwise_backward(dz, input, weight, *geometry, needs)
        gradients = [gradient.contiguous(memory_format=format) for gradient in gradients]
    else:
        gradients = _library_backward(dz, input, weight, *geometry, groups, needs)
    return gradients if grad_bias is None else [*gradients, grad_bias]


def _activation_and_bias_gradient(
    grad: Tensor, saved: Tensor | None, kind: int, parameter: float, bias: bool, format: torch.memory_format
) -> tuple[Tensor, Tensor | None]:
    """dz = grad * activation'(saved), and its sums by channel if ``bias``, in one pass; both dense in ``format``."""
    if format is torch.channels_last:
        rows = None if saved is None else _pixels(saved)
        dz, grad_bias = linear.activation_and_bias_gradient("cpu", _pixels(grad), rows, kind, parameter, bias)
        return _image(dz, grad.shape), grad_bias
    n, channels, height, width = grad.shape
    dz = grad if saved is None else _native.empty(grad.shape, grad)
    grad_bias = grad.new_empty(channels) if bias else None
    _native.kernels("cpu").channel_gradient(
        _native.DTYPE_CODES[grad.dtype],
        grad.data_ptr(),
        _native.address(saved),
        0 if saved is None else dz.data_ptr(),
        _native.address(grad_bias),
        n,
        channels,
        height * width,
        kind,
        parameter,
        _native.context(grad),
    )
    return dz, grad_bias


def _library(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """conv2d by torch's libraries; float16, for which they have no fast kernels, in float32."""
    if input.dtype != torch.float16:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.float()
    return torch.conv2d(input.float(), weight.float(), bias, stride, padding, dilation, groups).half()


def _library_backward(
    dz: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of input and weight by torch's libraries."""
    if dz.dtype == torch.float16:
        x = input.float() if needs[1] else input
        arguments = dz.float(), x, weight.float(), stride, padding, dilation, groups, needs
        return [gradient.half() for gradient in _library_backward(*arguments)]
    if needs[1]:
        mask = [needs[0], True, False]
        gradients = torch.ops.aten.convolution_backward(
            dz, input, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return [gradient for gradient in gradients if gradient is not None]
    # The same as a transposed convolution, which does not ask for the input.
    lost = [
        (size + 2 * p - d * (kernel - 1) - 1) % s
        for size, kernel, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return [torch.ops.aten.convolution(dz, weight, None, stride, padding, dilation, True, lost, groups)]


def _is_1x1(weight: Tensor, stride: Pair, padding: Pair, groups: int) -> bool:
    return weight.shape[2] == weight.shape[3] == groups == max(stride) == 1 and max(padding) == 0


def _takes_1x1(x: Tensor, format: torch.memory_format) -> bool:
    """Whether a 1x1 convolution takes the package's GEMM."""
    # In channels_last, packing many pixels costs a pass over memory that oneDNN saves, where it has kernels.
    pixels = x.numel() // x.shape[1]
    return format is torch.contiguous_format or pixels <= 4096 or x.dtype not in (torch.float32, torch.bfloat16)


def _cpu_1x1(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kind: int,
    parameter: float,
    preactivation: bool,
    format: torch.memory_format,
) -> tuple[Tensor, Tensor | None]:
    """activation(w @ each pixel + bias); x (N, C, H, W) dense in ``format``, w (K, C) of any strides."""
    n, channels, height, width = x.shape
    shape = (n, w.shape[0], height, width)
    if format is torch.channels_last:
        rows = _pixels(x)
        z = _native.empty((rows.shape[0], w.shape[0]), x) if preactivation else None
        y = linear.packed(rows, w, bias, kind, parameter, z)
        return _image(y, shape), None if z is None else _image(z, shape)
    w, row_stride, column_stride = linear.operand(w)
    y = _native.empty(shape, x)
    z = _native.empty(shape, x) if preactivation else None
    _native.kernels("cpu").conv_1x1(
        _native.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        w.data_ptr(),
        row_stride,
        column_stride,
        _native.address(bias),
        y.data_ptr(),
        _native.address(z),
        n,
        channels,
        w.shape[0],
        height * width,
        kind,
        parameter,
        _native.context(x),
    )
    return y, z


def _cpu_1x1_backward(
    dz: Tensor, input: Tensor, weight: Tensor, needs: Sequence[bool], format: torch.memory_format
) -> list[Tensor]:
    """The needed gradients of input and weight of a 1x1 convolution; dz dense in ``format``."""
    gradients = []
    if needs[0] and _takes_1x1(dz, format):
        gradients = [_cpu_1x1(dz, weight.flatten(1).t(), None, 0, 0.0, False, format)[0]]
    elif needs[0]:
        gradients = [torch.conv2d(dz, weight.transpose(0, 1))]
    if not needs[1]:
        return gradients
    out_channels, channels = weight.shape[:2]
    x = input.contiguous(memory_format=format)
    if format is torch.channels_last:
        gradient = linear.packed(_pixels(dz).t(), _pixels(x).t())
        return [*gradients, _image(gradient, weight.shape)]
    gradient = _native.empty(weight.shape, weight)
    _native.kernels("cpu").conv_1x1_weight_gradient(
        _native.DTYPE_CODES[x.dtype],
        dz.data_ptr(),
        x.data_ptr(),
        gradient.data_ptr(),
        x.shape[0],
        channels,
        out_channels,
        x.shape[2] * x.shape[3],
        _native.context(x),
    )
    return [*gradients, gradient]


def _takes_depthwise(
    weight: Tensor, groups: int, stride: Pair, format: torch.memory_format, dtype: torch.dtype, backward: bool
) -> bool:
    """Whether the package's depthwise kernels, made for NCHW, do better than oneDNN's, made for channels_last."""
    if weight.shape[1] != 1 or weight.shape[0] != groups or groups == 1:
        return False
    strided = max(stride) > 1
    if dtype == torch.float32:
        return format is torch.contiguous_format and not strided
    if dtype == torch.bfloat16:  # of strided gradients oneDNN makes nothing better than a loop
        return format is torch.contiguous_format or (strided and backward)
    return True


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    upsample: Pair,
    flip: bool,
    kind: int,
    parameter: float,
    preactivation: bool,
) -> tuple[Tensor, Tensor | None]:
    """A depthwise convolution of x, NCHW, with upsample - 1 zeros between its neighbours, to an output of ``shape``."""
    y = _native.empty(tuple(shape), x)
    z = _native.empty(tuple(shape), x) if preactivation else None
    weight = weight.contiguous()
    _native.kernels("cpu").depthwise(
        _native.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        _native.address(bias),
        y.data_ptr(),
        _native.address(z),
        x.shape[0],
        x.shape[1],
        x.shape[2:],
        shape[2:],
        weight.shape[2:],
        stride,
        padding,
        dilation,
        upsample,
        flip,
        kind,
        parameter,
        _native.context(x),
    )
    return y, z


def _depthwise_backward(
    dz: Tensor, input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, needs: Sequence[bool]
) -> list[Tensor]:
    """The needed gradients of input and weight of a depthwise convolution, NCHW."""
    dz, gradients = dz.contiguous(), []
    if needs[0]:
        # The flipped kernel over the gradients, which lie as far apart as the stride.
        sizes = zip(weight.shape[2:], padding, dilation, strict=True)
        around = [d * (kernel - 1) - p for kernel, p, d in sizes]
        options = ((1, 1), around, dilation, stride, True, 0, 0.0, False)
        gradients = [_depthwise(dz, weight, None, input.shape, *options)[0]]
    if not needs[1]:
        return gradients
    x, gradient = input.contiguous(), _native.empty(weight.shape, weight)
    _native.kernels("cpu").depthwise_weight_gradient(
        _native.DTYPE_CODES[x.dtype],
        dz.data_ptr(),
        x.data_ptr(),
        gradient.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.shape[2:],
        dz.shape[2:],
        weight.shape[2:],
        stride,
        padding,
        dilation,
        _native.context(x),
    )
    return [*gradients, gradient]


_CPU_NOTE = "own kernels for 1x1, depthwise and all activations; other products by oneDNN, float64's by ATen"
_add("cpu", _cpu_forward, _cpu_backward, _CPU_NOTE)


# ------------------------------------------------------------------------------------------------------------- triton


def _triton_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    preactivation: bool,
) -> tuple[Tensor, Tensor | None]:
    from fastdl.kernels import conv as kernels

    shape = _output_shape(input, weight, stride, padding, dilation)
    y = _empty(shape, input, memory_format(input, weight))
    z = torch.empty_like(y) if preactivation else None
    arguments = stride, padding, dilation, groups, kind, parameter
    kernels.conv(input, weight, bias, y, z, *arguments, allow_tf32=_native.allow_tf32(input, "conv"))
    return y, z


def _triton_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    from fastdl.kernels import conv as kernels

    if saved is not None:  # once: inside the products each tap would take the activation's gradient again
        grad_output = ACTIVATION_BACKWARD.implementations["triton"](grad_output, saved, kind, parameter)
    format, geometry = memory_format(input, weight), (stride, padding, dilation, groups)
    tf32 = _native.allow_tf32(grad_output, "conv")
    grad_input = _empty(input.shape, grad_output, format) if needs[0] else None
    grad_weight = _empty(weight.shape, grad_output, format) if needs[1] else None
    grad_bias = grad_output.new_empty(weight.shape[:1]) if needs[2] else None
    if grad_input is not None:
        kernels.conv_input_gradient(grad_output, weight, grad_input, *geometry, allow_tf32=tf32)
    if needs[1] or needs[2]:
        kernels.conv_weight_gradient(grad_output, input, grad_weight, grad_bias, *geometry, allow_tf32=tf32)
    return [gradient for gradient in (grad_input, grad_weight, grad_bias) if gradient is not None]


_add("triton", _triton_forward, _triton_backward)


# --------------------------------------------------------------------------------------------------------------- cuda


def _strided(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """A tensor as the CUDA kernels take it."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _is_product(pixels: Tensor, input: Tensor, weight: Tensor, stride: Pair, padding: Pair, groups: int) -> bool:
    """Whether a convolution is the linear layer of ``pixels`` (input or output), which lie as a matrix."""
    last = torch.channels_last
    is_1x1 = _is_1x1(weight, stride, padding, groups) and memory_format(input, weight) is last
    return is_1x1 and pixels.is_contiguous(memory_format=last)


def _cuda_variant(
    backend: str, input: Tensor, weight: Tensor, bias: Any, stride: Pair, padding: Pair, *rest: Any
) -> str:
    """The part of the code path that depends on the arguments: a 1x1 convolution takes the linear layer's."""
    if backend != "cuda" or not input.numel() or not _is_product(input, input, weight, stride, padding, rest[1]):
        return ""
    return linear.cuda_variant(backend, _pixels(input), weight.flatten(1))


CONV.variant = CONV_WITH_PREACTIVATION.variant = _cuda_variant


def _cuda_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    preactivation: bool,
) -> tuple[Tensor, Tensor | None]:
    format, shape = memory_format(input, weight), _output_shape(input, weight, stride, padding, dilation)
    tf32 = _native.allow_tf32(input, "conv")
    if _is_product(input, input, weight, stride, padding, groups):
        rows, z = linear.cuda_forward(_pixels(input), weight.flatten(1), bias, kind, parameter, preactivation, tf32)
        return _image(rows, shape), None if z is None else _image(z, shape)
    y = _empty(shape, input, format)
    z = torch.empty_like(y) if preactivation else None
    kernels, dtype = _native.kernels("cuda"), _native.DTYPE_CODES[input.dtype]
    x, w, out = _strided(input), _strided(weight), _strided(y)
    geometry = (stride, padding, dilation, groups)
    workspace = _native.workspace(kernels.conv_workspace(dtype, x, w, out, *geometry, tf32), input)
    kernels.conv(
        dtype,
        x,
        w,
        _native.address(bias),
        out,
        _native.address(z),
        *geometry,
        kind,
        parameter,
        tf32,
        _native.address(workspace),
        _native.context(input),
    )
    return y, z


def _cuda_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    kind: int,
    parameter: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    format, tf32 = memory_format(input, weight), _native.allow_tf32(grad_output, "conv")
    is_product = _is_product(grad_output, input, weight, stride, padding, groups)
    if is_product and (not needs[1] or _is_product(input, input, weight, stride, padding, groups)):
        x, w = _pixels(input) if needs[1] else None, weight.flatten(1) if needs[0] else None
        rows = None if saved is None else _pixels(saved)
        gradients = linear.cuda_backward(_pixels(grad_output), x, w, rows, kind, parameter, needs[2], tf32)
        shapes = [tensor.shape for tensor, need in zip((input, weight), needs, strict=False) if need]
        images = [_image(gradient, shape) for gradient, shape in zip(gradients, shapes, strict=False)]
        return [*images, *gradients[len(images) :]]
    if saved is not None:
        grad_output = ACTIVATION_BACKWARD.implementations["cuda"](grad_output, saved, kind, parameter)
    wanted = [
        _empty(tensor.shape, grad_output, format) if need else None
        for tensor, need in zip((input, weight), needs, strict=False)
    ]
    outputs = [
        (0, tuple(tensor.shape), (0, 0, 0, 0)) if gradient is None else _strided(gradient)
        for tensor, gradient in zip((input, weight), wanted, strict=True)
    ]
    grad_bias = grad_output.new_empty(weight.shape[:1]) if needs[2] else None
    kernels, dtype = _native.kernels("cuda"), _native.DTYPE_CODES[grad_output.dtype]
    arguments = (
        dtype,
        *(_strided(each) for each in (grad_output, input, weight)),
        *outputs,
        _native.address(grad_bias),
        stride,
        padding,
        dilation,
        groups,
        tf32,
    )
    workspace = _native.workspace(kernels.conv_backward_workspace(*arguments), grad_output)
    kernels.conv_backward(*arguments, _native.address(workspace), _native.context(grad_output))
    return [gradient for gradient in (*wanted, grad_bias) if gradient is not None]


_add("cuda", _cuda_forward, _cuda_backward)


# ---------------------------------------------------------------------------------------------------------- autograd


class ConvFunction(torch.autograd.Function):
    """Autograd of the fused convolution.

    Saves the input if the weight's gradient is needed, the weight, and the output or the pre-activation, whichever the
    activation's gradient is made of. The pre-activation is an output of the Function, so that double backward flows
    through it like through any other.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Any:
        *geometry, kind, parameter, requested, selection = arguments
        needs = ctx.needs_input_grad[:3]
        ctx.set_materialize_grads(False)
        ctx.arguments = *geometry, kind, parameter, needs
        ctx.requested = requested
        # Without the weight's gradient only the input's shape and memory format matter; the weight brings the latter.
        x, w = input, weight
        if not needs[1]:
            w = weight.to(memory_format=memory_format(input, weight))
            x = input.new_empty(()).expand(input.shape)
        op_arguments = input, weight, bias, *geometry, kind, parameter
        if activations.saves(kind, parameter) == "preactivation":
            output, z = CONV_WITH_PREACTIVATION(requested, *op_arguments, selection=selection)
            ctx.save_for_backward(x, w, z)
            return output, z
        output = CONV(requested, *op_arguments, selection=selection)
        ctx.save_for_backward(x, w, output if kind else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_preactivation: Tensor | None = None) -> Any:
        input, weight, saved = ctx.saved_tensors
        double = grad_preactivation is not None or torch.is_grad_enabled()
        if grad_output is None:
            if grad_preactivation is None:
                return (None,) * 11
            grad_output = torch.zeros_like(grad_preactivation)
        if double and not torch.compiler.is_compiling():
            arguments = (grad_output, input, weight, saved, *ctx.arguments, grad_preactivation)
            gradients = reference_backward(*arguments)
        else:
            gradients = CONV_BACKWARD(ctx.requested, grad_output, input, weight, saved, *ctx.arguments)
        rest = iter(gradients)
        return *(next(rest) if need else None for need in ctx.arguments[-1]), *(None,) * 8
