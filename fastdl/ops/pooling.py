"""Pooling over windows of images, (N, C, H, W) or (C, H, W): ops, gradients and implementations by backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native

Pair = Sequence[int]

# A window with more elements does not fit a byte: then the place of its maximum is kept as torch's index in the plane.
COMPACT_WINDOW = 256
# What a CPU thread may keep of one window while it pools: a tile of this many positions, times the planes of a vector.
_MOST_WINDOW = 1 << 18


# ------------------------------------------------------------------------------------------------ shapes and formats


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """The number of windows along an axis of ``size`` positions, by torch's rule."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    windows = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window must start inside the image or its left padding.
    return windows - 1 if ceil_mode and (windows - 1) * stride >= size + padding else windows


def _output_sizes(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[int, ...]:
    return tuple(
        output_size(*axis, ceil_mode)
        for axis in zip(input.shape[-2:], kernel_size, stride, padding, dilation, strict=True)
    )


def suggests_channels_last(tensor: Tensor) -> bool:
    """Whether torch's pooling answers a tensor of these strides in channels_last."""
    if tensor.dim() != 4:
        return False
    shape, strides, least = tensor.shape, tensor.stride(), 0
    for axis in (1, 3, 2, 0):
        # An image of one pixel, or a batch of them, is in both formats: then torch takes the contiguous one.
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * shape[axis]
    return True


def _empty(shape: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=format)


def _allocated(shape: Sequence[int], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    return _native.huge_pages(_empty(shape, like, channels_last, dtype))


def _dense(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------ checks


def check_input(name: str, input: Tensor, channels: bool = True) -> None:
    """Raises unless the input is a batch of images or one image; with ``channels``, unless its C, H and W are there."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: input must be a tensor; got {type(input).__name__}")
    shape = tuple(input.shape)
    if len(shape) not in (3, 4) or 0 in (shape[-3:] if channels else ()):
        raise RuntimeError(f"{name}: input has shape {shape}, allowed: (N, C, H, W) or (C, H, W), none but N zero")


def _check_windows(
    name: str, input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> None:
    check_input(name, input)
    for argument, values in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if min(values) < 1:
            raise RuntimeError(f"{name}: {argument} is {tuple(values)}, allowed: 1 or more")
    if min(padding) < 0 or any(p > k // 2 for p, k in zip(padding, kernel_size, strict=True)):
        raise RuntimeError(
            f"{name}: padding is {tuple(padding)}, allowed: 0 to half of kernel_size, which is {tuple(kernel_size)}"
        )
    size = _output_sizes(input, kernel_size, stride, padding, dilation, ceil_mode)
    if min(size) < 1:
        raise RuntimeError(
            f"{name}: kernel_size is {tuple(kernel_size)}, allowed: what fits into the padded input, which has shape "
            f"{tuple(input.shape)}; the output would be {size[0]} x {size[1]}"
        )


def _check_max(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool, *_: Any
) -> None:
    _check_windows("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)


def _check_average(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool, _: bool, divisor: int | None
) -> None:
    _check_windows("avg_pool2d", input, kernel_size, stride, padding, (1, 1), ceil_mode)
    if divisor == 0:
        raise RuntimeError("avg_pool2d: divisor_override is 0, allowed: None or a number other than 0")


def _check_adaptive(input: Tensor, size: Pair) -> None:
    name = "adaptive_avg_pool2d"
    check_input(name, input, channels=False)
    if min(size) < 0:
        raise RuntimeError(f"{name}: output_size is {tuple(size)}, allowed: 0 or more")
    if 0 in input.shape[-2:] and tuple(size) != (1, 1):
        raise RuntimeError(f"{name}: input has shape {tuple(input.shape)}, allowed: (N, C, H, W) with H and W not zero")


def _check_fractional(input: Tensor, random_samples: Tensor, kernel_size: Pair, size: Pair, *_: Any) -> None:
    name = "fractional_max_pool2d"
    check_input(name, input)
    samples = (*(input.shape[:-2] if input.dim() == 4 else (1, input.shape[0])), 2)
    if not isinstance(random_samples, Tensor):
        raise TypeError(f"{name}: _random_samples must be a tensor; got {type(random_samples).__name__}")
    if random_samples.dtype != input.dtype or random_samples.device != input.device:
        raise RuntimeError(
            f"{name}: _random_samples has dtype {random_samples.dtype} on {random_samples.device}, allowed: "
            f"{input.dtype} on {input.device}, as input"
        )
    if tuple(random_samples.shape) != samples:
        raise RuntimeError(f"{name}: _random_samples has shape {tuple(random_samples.shape)}, allowed: {samples}")
    for axis, kernel, windows in zip(input.shape[-2:], kernel_size, size, strict=True):
        if windows + kernel - 1 > axis:
            raise RuntimeError(
                f"{name}: kernel_size is {tuple(kernel_size)} with output_size {tuple(size)}, allowed: "
                f"kernel_size + output_size - 1 up to the input's {tuple(input.shape[-2:])}"
            )


# -------------------------------------------------------------------------------------------------------- references


def _origins(size: Pair, stride: Pair, padding: Pair, device: torch.device) -> list[Tensor]:
    """The first row (OH, 1) and column (OW) of every window, padding counted."""
    rows, columns = (torch.arange(n, device=device) * s - p for n, s, p in zip(size, stride, padding, strict=True))
    return [rows.unsqueeze(1), columns]


def _places_in_windows(
    indices: Tensor, width: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """torch's indices, places in a plane of this width, as places in the window: uint8, row by row."""
    rows, columns = _origins(indices.shape[-2:], stride, padding, indices.device)
    row = (indices // width - rows) // dilation[0]
    return (row * kernel_size[1] + (indices % width - columns) // dilation[1]).to(torch.uint8)


def _places_in_planes(
    codes: Tensor, width: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The inverse: int64."""
    rows, columns = _origins(codes.shape[-2:], stride, padding, codes.device)
    codes = codes.long()
    return (rows + codes // kernel_size[1] * dilation[0]) * width + columns + codes % kernel_size[1] * dilation[1]


def _reference_max_with_indices(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    windows = kernel_size, stride, padding, dilation
    output, indices = torch.ops.aten.max_pool2d_with_indices(input, *windows, ceil_mode)
    return output, _places_in_windows(indices, input.shape[-1], *windows) if compact else indices


def _reference_max_backward(
    grad_output: Tensor,
    indices: Tensor,
    input_shape: Sequence[int],
    channels_last: bool,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Tensor:
    windows = kernel_size, stride, padding, dilation
    if indices.dtype == torch.uint8:
        indices = _places_in_planes(indices, input_shape[-1], *windows)
    input = _empty(input_shape, grad_output, channels_last)  # only its shape and format are read
    return torch.ops.aten.max_pool2d_with_indices_backward(  # type: ignore[no-any-return]
        grad_output, input, *windows, ceil_mode, _dense(indices, channels_last)
    )


def _reference_average_backward(
    grad_output: Tensor, input_shape: Sequence[int], channels_last: bool, *arguments: Any
) -> Tensor:
    input = _empty(input_shape, grad_output, channels_last)
    return torch.ops.aten.avg_pool2d_backward(grad_output, input, *arguments)  # type: ignore[no-any-return]


def _reference_adaptive_backward(grad_output: Tensor, input_shape: Sequence[int], channels_last: bool) -> Tensor:
    if tuple(grad_output.shape[-2:]) == (1, 1):  # torch takes the mean, also of nothing
        return (grad_output / math.prod(input_shape[-2:])).expand(tuple(input_shape)).contiguous()
    input = _empty(input_shape, grad_output, channels_last)
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad_output, input)  # type: ignore[no-any-return]


def _reference_fractional(
    input: Tensor, random_samples: Tensor, kernel_size: Pair, size: Pair
) -> tuple[Tensor, Tensor]:
    return F.fractional_max_pool2d_with_indices(input, list(kernel_size), list(size), _random_samples=random_samples)


def _reference_fractional_backward(
    grad_output: Tensor, indices: Tensor, random_samples: Tensor, input_shape: Sequence[int], kernel_size: Pair
) -> Tensor:
    planes = (*input_shape[:-2], -1)
    flat = grad_output.new_zeros((*input_shape[:-2], math.prod(input_shape[-2:])))
    flat = flat.scatter_add(-1, indices.reshape(planes), grad_output.reshape(planes))
    return flat.view(tuple(input_shape))


# --------------------------------------------------------------------------------------------------------------- ops


def _limit_max(input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, *_: Any) -> str | None:
    span = math.prod((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    return _limit_window(input, span)


def _limit_average(input: Tensor, kernel_size: Pair, *_: Any) -> str | None:
    return _limit_window(input, math.prod(kernel_size))


def _limit_adaptive(input: Tensor, size: Pair) -> str | None:
    if 0 in input.shape[-2:]:
        return f"input has shape {tuple(input.shape)}, allowed: H and W not zero"
    return _limit_window(input, math.prod(-(-n // max(o, 1)) + 1 for n, o in zip(input.shape[-2:], size, strict=True)))


def _limit_fractional(input: Tensor, random_samples: Tensor, kernel_size: Pair, *_: Any) -> str | None:
    if min(kernel_size) < 1:
        return f"kernel_size is {tuple(kernel_size)}, allowed: 1 or more"
    return _limit_window(input, 1)


def _limit_window(input: Tensor, elements: int) -> str | None:
    if math.prod(input.shape[-2:]) >= 1 << 31:
        return f"input has shape {tuple(input.shape)}, allowed: planes of less than 2^31 elements"
    if elements > _MOST_WINDOW:
        return f"a window spans {elements} elements, allowed: up to {_MOST_WINDOW}"
    return None


def _shape_class(input: Tensor, windows: int, outputs: Pair) -> tuple[str, tuple[int, ...]]:
    """By memory format: planes, elements of one, elements of a window, outputs of a plane."""
    label = "channels_last" if suggests_channels_last(input) else "contiguous"
    return label, (math.prod(input.shape[:-2]), math.prod(input.shape[-2:]), windows, math.prod(outputs))


def _class_of_max(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool, *_: Any
) -> tuple[str, tuple[int, ...]]:
    size = _output_sizes(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _shape_class(input, math.prod(kernel_size), size)


def _class_of_average(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool, *_: Any
) -> tuple[str, tuple[int, ...]]:
    return _class_of_max(input, kernel_size, stride, padding, (1, 1), ceil_mode)


def _class_of_adaptive(input: Tensor, size: Pair) -> tuple[str, tuple[int, ...]]:
    return _shape_class(input, math.prod(input.shape[-2:]) // max(math.prod(size), 1), size)


def _fake_windows(
    input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Tensor:
    size = _output_sizes(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _empty((*input.shape[:-2], *size), input, suggests_channels_last(input))


def _fake_max_with_indices(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *windows, compact, _ = arguments
    output = _fake_windows(input, *windows)
    return output, torch.empty_like(output, dtype=torch.uint8 if compact else torch.int64)


def _fake_fractional(
    input: Tensor, random_samples: Tensor, kernel_size: Pair, size: Pair, _: str
) -> tuple[Tensor, Tensor]:
    output = input.new_empty((*input.shape[:-2], *size))
    return output, torch.empty_like(output, dtype=torch.int64)


_WINDOWS = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode"
_AVERAGES = "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor"
_FORMAT = "SymInt[] input_shape, bool channels_last"
MAX_POOL2D = Op(
    f"max_pool2d(Tensor input, {_WINDOWS}, str backend) -> Tensor",
    fake=lambda input, *arguments: _fake_windows(input, *arguments[:-1]),
    reference=F.max_pool2d,
    tensors=1,
    multiple=accuracy.MULTIPLE,
    shape_class=_class_of_max,
    check=_check_max,
)
# indices: torch's, int64 places in the plane; compact: uint8 places in the window.
MAX_POOL2D_WITH_INDICES = Op(
    f"max_pool2d_with_indices(Tensor input, {_WINDOWS}, bool compact, str backend) -> (Tensor, Tensor)",
    fake=_fake_max_with_indices,
    reference=_reference_max_with_indices,
    tensors=1,
    multiple=accuracy.MULTIPLE,
    shape_class=_class_of_max,
    check=_check_max,
)
MAX_POOL2D_BACKWARD = Op(
    f"max_pool2d_backward(Tensor grad_output, Tensor indices, {_FORMAT}, {_WINDOWS}, str backend) -> Tensor",
    fake=lambda grad_output, indices, shape, channels_last, *_: _empty(shape, grad_output, channels_last),
    reference=_reference_max_backward,
    tensors=2,
    multiple=accuracy.MULTIPLE,
)
AVG_POOL2D = Op(
    f"avg_pool2d(Tensor input, {_AVERAGES}, str backend) -> Tensor",
    fake=lambda input, kernel_size, stride, padding, ceil_mode, *_: _fake_windows(
        input, kernel_size, stride, padding, (1, 1), ceil_mode
    ),
    reference=F.avg_pool2d,
    tensors=1,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_class_of_average,
    check=_check_average,
)
AVG_POOL2D_BACKWARD = Op(
    f"avg_pool2d_backward(Tensor grad_output, {_FORMAT}, {_AVERAGES}, str backend) -> Tensor",
    fake=lambda grad_output, shape, channels_last, *_: _empty(shape, grad_output, channels_last),
    reference=_reference_average_backward,
    tensors=1,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)
ADAPTIVE_AVG_POOL2D = Op(
    "adaptive_avg_pool2d(Tensor input, SymInt[2] output_size, str backend) -> Tensor",
    fake=lambda input, size, _: _empty((*input.shape[:-2], *size), input, suggests_channels_last(input)),
    reference=F.adaptive_avg_pool2d,
    tensors=1,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_class_of_adaptive,
    check=_check_adaptive,
)
ADAPTIVE_AVG_POOL2D_BACKWARD = Op(
    f"adaptive_avg_pool2d_backward(Tensor grad_output, {_FORMAT}, str backend) -> Tensor",
    fake=lambda grad_output, shape, channels_last, _: _empty(shape, grad_output, channels_last),
    reference=_reference_adaptive_backward,
    tensors=1,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)
FRACTIONAL_MAX_POOL2D = Op(
    "fractional_max_pool2d(Tensor input, Tensor random_samples, int[2] kernel_size, SymInt[2] output_size, "
    "str backend) -> (Tensor, Tensor)",
    fake=_fake_fractional,
    reference=_reference_fractional,
    tensors=2,
    multiple=accuracy.MULTIPLE,
    shape_class=lambda input, samples, kernel_size, size: _shape_class(input, math.prod(kernel_size), size),
    check=_check_fractional,
)
FRACTIONAL_MAX_POOL2D_BACKWARD = Op(
    "fractional_max_pool2d_backward(Tensor grad_output, Tensor indices, Tensor random_samples, SymInt[] input_shape, "
    "int[2] kernel_size, str backend) -> Tensor",
    fake=lambda grad_output, indices, samples, shape, *_: grad_output.new_empty(shape),
    reference=_reference_fractional_backward,
    tensors=3,
    multiple=accuracy.MULTIPLE,
)


def window_starts(random_samples: Tensor, size: Sequence[int], kernel_size: Pair, windows: Pair) -> list[Tensor]:
    """The first row (planes, OH) and the first column (planes, OW) of every window of fractional_max_pool2d, int32.

    Torch's formula (Graham, 2014), in the arithmetic of its kernels: the samples' dtype on a CPU, float32 on a GPU.
    """
    samples = random_samples.reshape(-1, 2)
    if samples.is_cuda and samples.dtype.itemsize == 2:
        samples = samples.float()
    starts = []
    # Torch draws a plane's column first.
    for axis, sample in enumerate(samples.flip(-1).unbind(-1)):
        last, count = size[axis] - kernel_size[axis], windows[axis]
        sample = sample.unsqueeze(1)
        step = samples.new_full((), last) / samples.new_full((), max(count - 1, 1))
        steps = torch.arange(count, device=samples.device).to(samples.dtype)
        start = ((steps + sample) * step).to(torch.int32) - (sample * step).to(torch.int32)
        start[:, count - 1 :] = last
        starts.append(start.clamp(0, last).contiguous())  # samples outside [0, 1) may point anywhere
    return starts


# ----------------------------------------------------------------------------------------------------- implementations


def _add(backend: str, kernels: Callable[[], Any], *, only_max: bool = False) -> None:
    """Adds a backend to the ops, or to max_pool2d's only; ``kernels()`` has the functions that run on dense tensors."""

    def with_indices(
        input: Tensor,
        dtype: torch.dtype | None,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    ) -> tuple[Tensor, Tensor | None]:
        windows = kernel_size, stride, padding, dilation
        channels_last = suggests_channels_last(input)
        shape = (*input.shape[:-2], *_output_sizes(input, *windows, ceil_mode))
        output = _allocated(shape, input, channels_last)
        indices = None if dtype is None else _allocated(shape, input, channels_last, dtype)
        if output.numel():
            kernels().max_pool2d(_dense(input, channels_last), output, indices, channels_last, *windows)
        return output, indices

    @MAX_POOL2D.implement(backend, Support(_native.FLOATING, _limit_max))
    def max_pool2d(input: Tensor, *windows: Any) -> Tensor:
        return with_indices(input, None, *windows)[0]

    @MAX_POOL2D_WITH_INDICES.implement(backend, Support(_native.FLOATING, _limit_max))
    def max_pool2d_with_indices(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *windows, compact = arguments
        return with_indices(input, torch.uint8 if compact else torch.int64, *windows)

    @MAX_POOL2D_BACKWARD.implement(backend, Support(_native.FLOATING))
    def max_pool2d_backward(
        grad_output: Tensor, indices: Tensor, input_shape: Sequence[int], channels_last: bool, *windows: Any
    ) -> Tensor:
        grad_input = _allocated(input_shape, grad_output, channels_last)
        if grad_input.numel():
            dense = _dense(grad_output, channels_last), _dense(indices, channels_last)
            kernels().max_pool2d_backward(*dense, grad_input, channels_last, *windows[:4])
        return grad_input

    if only_max:
        return

    @AVG_POOL2D.implement(backend, Support(_native.FLOATING, _limit_average))
    def avg_pool2d(
        input: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, ceil_mode: bool, count: bool, divisor: int | None
    ) -> Tensor:
        channels_last = suggests_channels_last(input)
        size = _output_sizes(input, kernel_size, stride, padding, (1, 1), ceil_mode)
        output = _allocated((*input.shape[:-2], *size), input, channels_last)
        if output.numel():
            dense = _dense(input, channels_last)
            kernels().avg_pool2d(dense, output, channels_last, kernel_size, stride, padding, count, divisor or 0)
        return output

    @AVG_POOL2D_BACKWARD.implement(backend, Support(_native.FLOATING))
    def avg_pool2d_backward(
        grad_output: Tensor,
        input_shape: Sequence[int],
        channels_last: bool,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count: bool,
        divisor: int | None,
    ) -> Tensor:
        grad_input = _allocated(input_shape, grad_output, channels_last)
        if grad_input.numel():
            dense, windows = _dense(grad_output, channels_last), (kernel_size, stride, padding, count, divisor or 0)
            kernels().avg_pool2d_backward(dense, grad_input, channels_last, *windows)
        return grad_input

    @ADAPTIVE_AVG_POOL2D.implement(backend, Support(_native.FLOATING, _limit_adaptive))
    def adaptive_avg_pool2d(input: Tensor, size: Pair) -> Tensor:
        channels_last = suggests_channels_last(input)
        output = _allocated((*input.shape[:-2], *size), input, channels_last)
        if output.numel():
            kernels().avg_pool2d(_dense(input, channels_last), output, channels_last, *_ADAPTIVE)
        return output

    @ADAPTIVE_AVG_POOL2D_BACKWARD.implement(backend, Support(_native.FLOATING))
    def adaptive_avg_pool2d_backward(grad_output: Tensor, input_shape: Sequence[int], channels_last: bool) -> Tensor:
        grad_input = _allocated(input_shape, grad_output, channels_last)
        if grad_input.numel():
            kernels().avg_pool2d_backward(_dense(grad_output, channels_last), grad_input, channels_last, *_ADAPTIVE)
        return grad_input

    @FRACTIONAL_MAX_POOL2D.implement(backend, Support(_native.FLOATING, _limit_fractional))
    def fractional_max_pool2d(
        input: Tensor, random_samples: Tensor, kernel_size: Pair, size: Pair
    ) -> tuple[Tensor, Tensor]:
        output = _allocated((*input.shape[:-2], *size), input, False)
        indices = _allocated(output.shape, input, False, torch.int64)
        if output.numel():
            starts = window_starts(random_samples, input.shape[-2:], kernel_size, size)
            kernels().fractional_max_pool2d(input.contiguous(), *starts, output, indices, kernel_size)
        return output, indices

    @FRACTIONAL_MAX_POOL2D_BACKWARD.implement(backend, Support(_native.FLOATING))
    def fractional_max_pool2d_backward(
        grad_output: Tensor, indices: Tensor, random_samples: Tensor, input_shape: Sequence[int], kernel_size: Pair
    ) -> Tensor:
        grad_input = _allocated(input_shape, grad_output, False)
        if grad_output.numel() == 0:
            return grad_input.zero_()
        if grad_input.numel():
            starts = window_starts(random_samples, input_shape[-2:], kernel_size, grad_output.shape[-2:])
            dense = grad_output.contiguous(), indices.contiguous()
            kernels().fractional_max_pool2d_backward(*dense, *starts, grad_input, kernel_size)
        return grad_input


# Windows of size 0 mean adaptive ones: kernel_size, stride, padding, count_include_pad, divisor.
_ADAPTIVE = (0, 0), (1, 1), (0, 0), True, 0


# ------------------------------------------------------------------------------------------------ native: cpu and cuda


class _Native:
    """The functions of the native kernels of a backend on dense tensors, with the signatures of kernels/pooling.py."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def _call(self, name: str, first: Tensor, *arguments: Any) -> None:
        function = getattr(_native.kernels(self.backend), name)
        function(_native.DTYPE_CODES[first.dtype], first.data_ptr(), *arguments, _native.context(first))

    def max_pool2d(
        self, input: Tensor, output: Tensor, indices: Tensor | None, channels_last: bool, *windows: Pair
    ) -> None:
        """Maxima, and their places: uint8 in the window, int64 in the plane, or none."""
        size = 0 if indices is None else indices.element_size()
        addresses = output.data_ptr(), _native.address(indices), size
        self._call("max_pool2d", input, *addresses, *_shapes(input, output), *windows, channels_last)

    def max_pool2d_backward(
        self, grad_output: Tensor, indices: Tensor, grad_input: Tensor, channels_last: bool, *windows: Pair
    ) -> None:
        """The gradient, by such places."""
        addresses = indices.data_ptr(), indices.element_size(), grad_input.data_ptr()
        shapes = _shapes(grad_input, grad_output)
        self._call("max_pool2d_backward", grad_output, *addresses, *shapes, *windows, channels_last)

    def avg_pool2d(self, input: Tensor, output: Tensor, channels_last: bool, *windows: Any) -> None:
        """Averages; kernel_size (0, 0) is adaptive."""
        self._call("avg_pool2d", input, output.data_ptr(), *_shapes(input, output), *windows, channels_last)

    def avg_pool2d_backward(self, grad_output: Tensor, grad_input: Tensor, channels_last: bool, *windows: Any) -> None:
        """The gradient."""
        shapes = _shapes(grad_input, grad_output)
        self._call("avg_pool2d_backward", grad_output, grad_input.data_ptr(), *shapes, *windows, channels_last)

    def fractional_max_pool2d(
        self, input: Tensor, rows: Tensor, columns: Tensor, output: Tensor, indices: Tensor, kernel_size: Pair
    ) -> None:
        """Maxima of the windows that start at rows (planes, OH), columns (planes, OW), and their places."""
        addresses = [tensor.data_ptr() for tensor in (rows, columns, output, indices)]
        shapes = math.prod(input.shape[:-2]), input.shape[-2:], output.shape[-2:]
        self._call("fractional_max_pool2d", input, *addresses, *shapes, kernel_size)

    def fractional_max_pool2d_backward(
        self, grad_output: Tensor, indices: Tensor, rows: Tensor, columns: Tensor, grad_input: Tensor, kernel_size: Pair
    ) -> None:
        """The gradient: a thread has whole planes, so it need not know where windows are."""
        shapes = math.prod(grad_input.shape[:-2]), grad_input.shape[-2:], grad_output.shape[-2:]
        addresses = indices.data_ptr(), grad_input.data_ptr()
        self._call("fractional_max_pool2d_backward", grad_output, *addresses, *shapes)


def _shapes(image: Tensor, pooled: Tensor) -> tuple[list[int], torch.Size]:
    """(N, C, H, W) and (OH, OW)."""
    shape = list(image.shape)
    return [1] * (4 - len(shape)) + shape, pooled.shape[-2:]


def _triton() -> Any:
    from fastdl.kernels import pooling

    return pooling


_CPU, _CUDA = _Native("cpu"), _Native("cuda")
_add("cpu", lambda: _CPU)
_add("triton", _triton)
_add("cuda", lambda: _CUDA, only_max=True)


# ---------------------------------------------------------------------------------------------------------- autograd


def _gradient(op: Op, requested: str, *arguments: Any) -> Tensor:
    """The gradient by the op, or, for double backward, by its reference, which autograd follows."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return op.reference(*arguments)  # type: ignore[no-any-return]
    return op(requested, *arguments)  # type: ignore[no-any-return]


class MaxPool2dFunction(torch.autograd.Function):
    """Autograd of max_pool2d: saves where the maxima are, a byte each where that can tell, and not the input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
        compact: bool,
        requested: str,
        selection: Any,
    ) -> tuple[Tensor, Tensor]:
        windows = kernel_size, stride, padding, dilation, ceil_mode
        output, indices = MAX_POOL2D_WITH_INDICES(requested, input, *windows, compact, selection=selection)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.arguments = input.shape, suggests_channels_last(input), *windows
        ctx.requested = requested
        return output, indices

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        if grad_output is None:
            return (None,) * 9
        grad = _gradient(MAX_POOL2D_BACKWARD, ctx.requested, grad_output, indices, *ctx.arguments)
        return grad, *(None,) * 8


class AvgPool2dFunction(torch.autograd.Function):
    """Autograd of avg_pool2d: saves nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
        requested: str,
        selection: Any,
    ) -> Tensor:
        windows = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor
        ctx.arguments = input.shape, suggests_channels_last(input), *windows
        ctx.requested = requested
        output: Tensor = AVG_POOL2D(requested, input, *windows, selection=selection)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad = _gradient(AVG_POOL2D_BACKWARD, ctx.requested, grad_output, *ctx.arguments)
        return grad, *(None,) * 8


class AdaptiveAvgPool2dFunction(torch.autograd.Function):
    """Autograd of adaptive_avg_pool2d: saves nothing."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, size: Pair, requested: str, selection: Any) -> Tensor:
        # The gradient of one mean a plane is contiguous in torch, whatever the input's format.
        ctx.arguments = input.shape, suggests_channels_last(input) and tuple(size) != (1, 1)
        ctx.requested = requested
        output: Tensor = ADAPTIVE_AVG_POOL2D(requested, input, size, selection=selection)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad = _gradient(ADAPTIVE_AVG_POOL2D_BACKWARD, ctx.requested, grad_output, *ctx.arguments)
        return grad, None, None, None


class FractionalMaxPool2dFunction(torch.autograd.Function):
    """Autograd of fractional_max_pool2d: saves where the maxima are."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        random_samples: Tensor,
        kernel_size: Pair,
        size: Pair,
        requested: str,
        selection: Any,
    ) -> tuple[Tensor, Tensor]:
        arguments = input, random_samples, kernel_size, size
        output, indices = FRACTIONAL_MAX_POOL2D(requested, *arguments, selection=selection)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices, random_samples)
        ctx.arguments = input.shape, kernel_size
        ctx.requested = requested
        return output, indices

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        indices, random_samples = ctx.saved_tensors
        if grad_output is None:
            return (None,) * 6
        arguments = grad_output, indices, random_samples, *ctx.arguments
        grad = _gradient(FRACTIONAL_MAX_POOL2D_BACKWARD, ctx.requested, *arguments)
        return grad, *(None,) * 5
