"""Pooling: maxima and averages of windows, and their gradients.

Tensors are (N, C, H, W) or (C, H, W), dense, all of one call in one memory format. A program takes a tile of lines and
columns of the result: in NCHW a line is a row of a plane and a column is w; with the channels last a line is a position
of an image and a column is a channel. Then the result's tile is contiguous along the columns in both, and so are the
windows' elements, or, in NCHW, as near as the stride allows. A gradient's element gathers from the windows that hold
it, so nothing is added by atomics.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, Plan, device_limits

# How windows are placed: by stride, padding and dilation; so that they cover the image; by the caller.
REGULAR = tl.constexpr(0)
ADAPTIVE = tl.constexpr(1)
GIVEN = tl.constexpr(2)
# What is kept of a maximum's place: nothing; its place in the window, row by row; in the plane.
NOTHING = tl.constexpr(0)
IN_WINDOW = tl.constexpr(1)
IN_PLANE = tl.constexpr(2)

WARPS = 4
# With the channels last a thread takes 16 bytes: a window's elements are loads in flight enough. Else so many elements,
# as neighbours do not make one access, and each needs an address.
PLANAR_ELEMENTS = 4
# A tensor of so many elements takes 64-bit offsets; less than 2^31, as a tile may reach over its end.
BIG_TENSOR = 2**31 - 2**24
PROGRAMS = 4  # 128 registers a thread: values and places of eight elements, in 64 bits where tensors are large
# A window this large is summed by the threads of a program together, so that few outputs fill the GPU too.
WIDE_WINDOW = 64


@triton.jit
def tile_position(
    lines, height, width, extent, LAST: tl.constexpr, BIG: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr
):
    """(line, column, image, h, w, channel, mask) of this program's tile, each (LINES, 1) or (1, COLUMNS).

    image: the image with the channels last, else the plane. line is 64-bit if BIG.
    """
    start = tl.program_id(0)
    if BIG:
        start = start.to(tl.int64)
    line = (start * LINES + tl.arange(0, LINES))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (line < lines) & (column < extent)
    if LAST:
        w = (line % width).to(tl.int32)
        row = line // width
        channel = column
    else:
        w = column
        row = line
        channel = column * 0
    h = (row % height).to(tl.int32)
    image = row // height
    return line, column, image, h, w, channel, mask


@triton.jit
def window_start(o, size, outputs, STRIDE: tl.constexpr, PADDING: tl.constexpr, PLACED: tl.constexpr):
    """The first position of window o along an axis of `size` positions, padding counted."""
    if PLACED == ADAPTIVE:
        start = (o.to(tl.int64) * size // outputs).to(tl.int32)
    else:
        start = o * STRIDE - PADDING
    return start


@triton.jit
def window_end(o, start, size, outputs, KERNEL: tl.constexpr, PLACED: tl.constexpr):
    """Behind the last position of an undilated window, beyond the image or not."""
    if PLACED == ADAPTIVE:
        end = (((o.to(tl.int64) + 1) * size + outputs - 1) // outputs).to(tl.int32)
    else:
        end = start + KERNEL
    return end


@triton.jit
def window_count(start, end, size, PADDING: tl.constexpr, INCLUDE_PAD: tl.constexpr):
    """An axis' factor of what an average divides by."""
    if INCLUDE_PAD:
        count = tl.minimum(end, size + PADDING) - start
    else:
        count = tl.minimum(end, size) - tl.maximum(start, 0)
    return tl.maximum(count, 1)


@triton.jit
def max_kernel(
    input,
    row_starts,
    column_starts,
    output,
    indices,
    lines,
    extent,
    height,
    width,
    output_height,
    output_width,
    channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PLACED: tl.constexpr,
    PLACES: tl.constexpr,
    LAST: tl.constexpr,
    BIG: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """output = the maxima of the input's windows; indices = their places.

    Launches a 2D grid where each program takes LINES x COLUMNS elements of the output. A maximum is replaced by what is
    larger and by NaN, so the first of equals stays, and of NaNs the last, as in torch.
    """
    COMPUTE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    line, column, image, oh, ow, channel, mask = tile_position(
        lines, output_height, output_width, extent, LAST, BIG, LINES, COLUMNS
    )
    if PLACED == GIVEN:
        top = tl.load(row_starts + line, mask=line < lines, other=0)
        left = tl.load(column_starts + image * output_width + ow, mask=mask, other=0)
    else:
        top = oh * STRIDE_H - PADDING_H
        left = ow * STRIDE_W - PADDING_W
    if BIG:
        channels = tl.cast(channels, tl.int64)
    image_start = input + image * height * width * channels + channel
    # The first element of the window that is in the image holds the place until something is larger than -inf.
    first_h = tl.maximum((DILATION_H - 1 - top) // DILATION_H, 0) * (top < 0).to(tl.int32)
    first_w = tl.maximum((DILATION_W - 1 - left) // DILATION_W, 0) * (left < 0).to(tl.int32)
    best = tl.full((LINES, COLUMNS), float("-inf"), COMPUTE)
    place = tl.zeros((LINES, COLUMNS), tl.int32)
    if PLACES == IN_WINDOW:
        place += first_h * KERNEL_W + first_w
    elif PLACES == IN_PLANE:
        place += (top + first_h * DILATION_H) * width + left + first_w * DILATION_W
    for kernel_h in range(KERNEL_H):
        h = top + kernel_h * DILATION_H
        row = image_start + h * width * channels
        row_mask = mask & (h >= 0) & (h < height)
        for kernel_w in range(KERNEL_W):
            w = left + kernel_w * DILATION_W
            value = tl.load(row + w * channels, mask=row_mask & (w >= 0) & (w < width), other=float("-inf"))
            value = value.to(COMPUTE)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            if PLACES == IN_WINDOW:
                place = tl.where(better, kernel_h * KERNEL_W + kernel_w, place)
            elif PLACES == IN_PLANE:
                place = tl.where(better, h * width + w, place)
    to = line * extent + column
    tl.store(output + to, best.to(output.dtype.element_ty), mask=mask)
    if PLACES != NOTHING:
        tl.store(indices + to, place.to(indices.dtype.element_ty), mask=mask)


@triton.jit
def average_kernel(
    input,
    output,
    divisor,
    lines,
    extent,
    height,
    width,
    output_height,
    output_width,
    channels,
    most_rows,
    most_columns,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    PLACED: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    LAST: tl.constexpr,
    BIG: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """output = the averages of the input's windows; divisor: of every window, or 0: its size.

    Launches a 2D grid where each program takes LINES x COLUMNS elements of the output. most_rows, most_columns: of an
    adaptive window.
    """
    COMPUTE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    line, column, image, oh, ow, channel, mask = tile_position(
        lines, output_height, output_width, extent, LAST, BIG, LINES, COLUMNS
    )
    top = window_start(oh, height, output_height, STRIDE_H, PADDING_H, PLACED)
    left = window_start(ow, width, output_width, STRIDE_W, PADDING_W, PLACED)
    bottom = window_end(oh, top, height, output_height, KERNEL_H, PLACED)
    right = window_end(ow, left, width, output_width, KERNEL_W, PLACED)
    if BIG:
        channels = tl.cast(channels, tl.int64)
    image_start = input + image * height * width * channels + channel
    total = tl.zeros((LINES, COLUMNS), COMPUTE)
    for kernel_h in range(KERNEL_H if PLACED == REGULAR else most_rows):
        h = top + kernel_h
        row = image_start + h * width * channels
        row_mask = mask & (h >= 0) & (h < tl.minimum(bottom, height))
        for kernel_w in range(KERNEL_W if PLACED == REGULAR else most_columns):
            w = left + kernel_w
            inside = row_mask & (w >= 0) & (w < tl.minimum(right, width))
            total += tl.load(row + w * channels, mask=inside, other=0.0).to(COMPUTE)
    count = window_count(top, bottom, height, PADDING_H, INCLUDE_PAD) * window_count(
        left, right, width, PADDING_W, INCLUDE_PAD
    )
    count = tl.where(divisor != 0, divisor, count)
    result = total / count.to(COMPUTE)
    tl.store(output + line * extent + column, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def wide_average_kernel(
    input,
    output,
    divisor,
    lines,
    height,
    width,
    output_height,
    output_width,
    channels,
    most_rows,
    most_columns,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    PLACED: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    ELEMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same for large windows: the threads of a program share one window of COLUMNS channels.

    Launches a 2D grid: x is the output's line (a position; in NCHW, where `channels` is 1, of a plane), y a block of
    COLUMNS channels. A window is taken in blocks of ELEMENTS elements, most_rows x most_columns in all.
    """
    COMPUTE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    line = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    ow = (line % output_width).to(tl.int32)
    oh = (line // output_width % output_height).to(tl.int32)
    image = line // output_width // output_height
    top = window_start(oh, height, output_height, STRIDE_H, PADDING_H, PLACED)
    left = window_start(ow, width, output_width, STRIDE_W, PADDING_W, PLACED)
    bottom = window_end(oh, top, height, output_height, KERNEL_H, PLACED)
    right = window_end(ow, left, width, output_width, KERNEL_W, PLACED)
    image_start = input + image * height * width * channels + channel
    total = tl.zeros((ELEMENTS, COLUMNS), COMPUTE)
    for start in range(0, most_rows * most_columns, ELEMENTS):
        element = (start + tl.arange(0, ELEMENTS))[:, None]
        h, w = top + element // most_columns, left + element % most_columns
        inside = (h >= 0) & (h < tl.minimum(bottom, height)) & (w >= 0) & (w < tl.minimum(right, width))
        offset = (h.to(tl.int64) * width + w) * channels
        total += tl.load(image_start + offset, mask=inside & (channel < channels), other=0.0).to(COMPUTE)
    count = window_count(top, bottom, height, PADDING_H, INCLUDE_PAD) * window_count(
        left, right, width, PADDING_W, INCLUDE_PAD
    )
    count = tl.where(divisor != 0, divisor, count)
    result = tl.sum(total, axis=0, keep_dims=True) / count.to(COMPUTE)
    tl.store(output + line * channels + channel, result.to(output.dtype.element_ty), mask=channel < channels)


@triton.jit
def windows_of(
    i, size, outputs, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    """(first, end): the windows that reach over position i; a dilated one may pass over it."""
    if PLACED == ADAPTIVE:
        first = (i.to(tl.int64) * outputs // size).to(tl.int32)
        end = (((i.to(tl.int64) + 1) * outputs + size - 1) // size).to(tl.int32)
    else:
        behind = i + PADDING - (KERNEL - 1) * DILATION
        first = tl.where(behind > 0, (behind + STRIDE - 1) // STRIDE, 0)
        end = tl.minimum((i + PADDING) // STRIDE + 1, outputs)
    return first, end


@triton.jit
def max_backward_kernel(
    grad_output,
    indices,
    row_windows,
    column_windows,
    grad_input,
    lines,
    extent,
    height,
    width,
    output_height,
    output_width,
    channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    MOST_H: tl.constexpr,
    MOST_W: tl.constexpr,
    PLACED: tl.constexpr,
    PLACES: tl.constexpr,
    LAST: tl.constexpr,
    BIG: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_input = the sums of the gradients of the windows whose maximum an element is.

    Launches a 2D grid where each program takes LINES x COLUMNS elements of grad_input. MOST_H, MOST_W: windows over a
    position; where windows are given, row_windows (2, planes, height) and column_windows (2, planes, width) hold the
    first window over a position and the end of its windows.
    """
    COMPUTE: tl.constexpr = tl.float64 if grad_output.dtype.element_ty == tl.float64 else tl.float32
    line, column, image, h, w, channel, mask = tile_position(lines, height, width, extent, LAST, BIG, LINES, COLUMNS)
    if PLACED == GIVEN:
        planes = lines // height
        first_h = tl.load(row_windows + line, mask=line < lines, other=0)
        end_h = tl.load(row_windows + lines + line, mask=line < lines, other=0)
        at = image * width + w
        first_w = tl.load(column_windows + at, mask=mask, other=0)
        end_w = tl.load(column_windows + planes * width + at, mask=mask, other=0)
        most_h, most_w = tl.max(end_h - first_h), tl.max(end_w - first_w)
    else:
        first_h, end_h = windows_of(h, height, output_height, KERNEL_H, STRIDE_H, PADDING_H, DILATION_H, PLACED)
        first_w, end_w = windows_of(w, width, output_width, KERNEL_W, STRIDE_W, PADDING_W, DILATION_W, PLACED)
        most_h, most_w = MOST_H, MOST_W
    if BIG:
        channels = tl.cast(channels, tl.int64)
    image_start = image * output_height * output_width * channels + channel
    total = tl.zeros((LINES, COLUMNS), COMPUTE)
    for window_h in range(most_h):
        oh = first_h + window_h
        offset_h = h + PADDING_H - oh * STRIDE_H
        row = image_start + oh * output_width * channels
        row_mask = mask & (oh < end_h)
        for window_w in range(most_w):
            ow = first_w + window_w
            offset_w = w + PADDING_W - ow * STRIDE_W
            inside = row_mask & (ow < end_w)
            if PLACES == IN_WINDOW:
                inside = inside & (offset_h % DILATION_H == 0) & (offset_w % DILATION_W == 0)
                wanted = offset_h // DILATION_H * KERNEL_W + offset_w // DILATION_W
            else:
                wanted = h * width + w
            place = tl.load(indices + row + ow * channels, mask=inside, other=0).to(tl.int32)
            grad = tl.load(grad_output + row + ow * channels, mask=inside, other=0.0).to(COMPUTE)
            total += tl.where(inside & (place == wanted), grad, 0.0)
    tl.store(grad_input + line * extent + column, total.to(grad_input.dtype.element_ty), mask=mask)


@triton.jit
def average_backward_kernel(
    grad_output,
    grad_input,
    divisor,
    lines,
    extent,
    height,
    width,
    output_height,
    output_width,
    channels,
    most_rows,
    most_columns,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    MOST_H: tl.constexpr,
    MOST_W: tl.constexpr,
    PLACED: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    LAST: tl.constexpr,
    BIG: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad_input = the sums of the gradients of the windows that hold an element, each over its divisor.

    Launches a 2D grid where each program takes LINES x COLUMNS elements of grad_input. MOST_H, MOST_W: windows over a
    position; of adaptive ones, most_rows and most_columns.
    """
    COMPUTE: tl.constexpr = tl.float64 if grad_output.dtype.element_ty == tl.float64 else tl.float32
    line, column, image, h, w, channel, mask = tile_position(lines, height, width, extent, LAST, BIG, LINES, COLUMNS)
    first_h, end_h = windows_of(h, height, output_height, KERNEL_H, STRIDE_H, PADDING_H, 1, PLACED)
    first_w, end_w = windows_of(w, width, output_width, KERNEL_W, STRIDE_W, PADDING_W, 1, PLACED)
    if BIG:
        channels = tl.cast(channels, tl.int64)
    image_start = grad_output + image * output_height * output_width * channels + channel
    total = tl.zeros((LINES, COLUMNS), COMPUTE)
    for window_h in range(MOST_H if PLACED == REGULAR else most_rows):
        oh = first_h + window_h
        top = window_start(oh, height, output_height, STRIDE_H, PADDING_H, PLACED)
        bottom = window_end(oh, top, height, output_height, KERNEL_H, PLACED)
        count_h = window_count(top, bottom, height, PADDING_H, INCLUDE_PAD)
        row = image_start + oh * output_width * channels
        row_mask = mask & (oh < end_h)
        for window_w in range(MOST_W if PLACED == REGULAR else most_columns):
            ow = first_w + window_w
            left = window_start(ow, width, output_width, STRIDE_W, PADDING_W, PLACED)
            right = window_end(ow, left, width, output_width, KERNEL_W, PLACED)
            count = count_h * window_count(left, right, width, PADDING_W, INCLUDE_PAD)
            count = tl.where(divisor != 0, divisor, count)
            grad = tl.load(row + ow * channels, mask=row_mask & (ow < end_w), other=0.0).to(COMPUTE)
            total += grad / count.to(COMPUTE)
    tl.store(grad_input + line * extent + column, total.to(grad_input.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------- launches


def max_pool2d(input, output, indices, channels_last, kernel_size, stride, padding, dilation):
    """output = maxima of windows of input; indices, of the output's shape: uint8 places in the window, int64 ones in
    the plane, or None."""
    device = device_limits(input.device)
    max_launch(input, None, output, indices, channels_last, kernel_size, stride, padding, dilation, device).run()


def max_pool2d_backward(grad_output, indices, grad_input, channels_last, kernel_size, stride, padding, dilation):
    """grad_input = the gradient, by such places."""
    windows = kernel_size, stride, padding, dilation
    device = device_limits(grad_input.device)
    max_backward_launch(grad_output, indices, None, grad_input, channels_last, *windows, device).run()


def avg_pool2d(input, output, channels_last, kernel_size, stride, padding, count_include_pad, divisor):
    """output = averages of windows of input; kernel_size (0, 0): adaptive. divisor: of every window, or 0: its size."""
    windows = kernel_size, stride, padding, count_include_pad, divisor
    average_launch(input, output, channels_last, *windows, device_limits(input.device)).run()


def avg_pool2d_backward(
    grad_output, grad_input, channels_last, kernel_size, stride, padding, count_include_pad, divisor
):
    """grad_input = the gradient."""
    windows = kernel_size, stride, padding, count_include_pad, divisor
    device = device_limits(grad_input.device)
    average_backward_launch(grad_output, grad_input, channels_last, *windows, device).run()


def fractional_max_pool2d(input, rows, columns, output, indices, kernel_size):
    """output = maxima of the windows that start at rows (planes, OH), columns (planes, OW), int32; indices as int64."""
    starts, device = (rows, columns), device_limits(input.device)
    max_launch(input, starts, output, indices, False, kernel_size, (1, 1), (0, 0), (1, 1), device).run()


def fractional_max_pool2d_backward(grad_output, indices, rows, columns, grad_input, kernel_size):
    """grad_input = the gradient, by such places and starts."""
    windows = []
    for starts, kernel, size in zip((rows, columns), kernel_size, grad_input.shape[-2:], strict=True):
        positions = (
            torch.arange(size, dtype=torch.int32, device=starts.device).expand(starts.shape[0], size).contiguous()
        )
        first = torch.searchsorted(starts, positions - (kernel - 1), out_int32=True)
        windows.append(torch.stack([first, torch.searchsorted(starts, positions, out_int32=True, right=True)]))
    device = device_limits(grad_input.device)
    regular = (1, 1), (0, 0), (1, 1)
    max_backward_launch(grad_output, indices, windows, grad_input, False, kernel_size, *regular, device).run()


def tile_launch(kernel, source, target, channels_last, backward, arguments, constants, device):
    """The launch over tiles of target; source and target are the image and what is pooled of it, or the other way."""
    (image, pooled) = (target, source) if backward else (source, target)
    channels = image.shape[-3] if channels_last else 1
    extent = channels if channels_last else target.shape[-1]
    lines = target.numel() // extent
    # Short lines share a tile; a long one is split.
    elements = threads(device) * (16 // target.element_size() if channels_last else PLANAR_ELEMENTS)
    columns = min(triton.next_power_of_2(extent), 128 if channels_last else 64)
    sizes = {
        "lines": lines,
        "extent": extent,
        "height": image.shape[-2],
        "width": image.shape[-1],
        "output_height": pooled.shape[-2],
        "output_width": pooled.shape[-1],
        "channels": channels,
    }
    tile = {
        "LAST": channels_last,
        "BIG": max(image.numel(), pooled.numel()) >= BIG_TENSOR,
        "LINES": max(elements // columns, 1),
        "COLUMNS": columns,
    }
    grid = (triton.cdiv(lines, tile["LINES"]), triton.cdiv(extent, columns))
    plan = Plan(PROGRAMS, access_bytes=16 if channels_last and extent % 16 == 0 else 0)
    return Launch(kernel, grid, arguments | sizes, constants | tile, device, WARPS, plan=plan)


def threads(device):
    """Of a program; an AMD warp has 64."""
    return WARPS * (32 if device.capability else 64)


def pairs(**values):
    """Constants for each axis: NAME=(a, b) as NAME_H and NAME_W."""
    return {f"{name}_{axis}": value[i] for name, value in values.items() for i, axis in enumerate("HW")}


def most_windows(kernel_size, stride, dilation):
    """How many windows reach over a position, along each axis."""
    return [triton.cdiv((k - 1) * d + 1, s) for k, s, d in zip(kernel_size, stride, dilation, strict=True)]


def places(indices):
    """What indices hold."""
    if indices is None:
        return NOTHING.value
    return (IN_WINDOW if indices.dtype == torch.uint8 else IN_PLANE).value


def max_launch(input, starts, output, indices, channels_last, kernel_size, stride, padding, dilation, device):
    """The launch of the maxima, not yet run; starts: where windows are given, of rows and columns."""
    rows, columns = starts or (None, None)
    arguments = {
        "input": input,
        "row_starts": rows,
        "column_starts": columns,
        "output": output,
        "indices": indices,
    }
    constants = pairs(KERNEL=kernel_size, STRIDE=stride, PADDING=padding, DILATION=dilation)
    constants |= {"PLACED": (GIVEN if starts else REGULAR).value, "PLACES": places(indices)}
    return tile_launch(max_kernel, input, output, channels_last, False, arguments, constants, device)


def max_backward_launch(
    grad_output, indices, windows, grad_input, channels_last, kernel_size, stride, padding, dilation, device
):
    """The launch of the maxima's gradient, not yet run; windows: where they are given, over each row and column."""
    rows, columns = windows or (None, None)
    arguments = {
        "grad_output": grad_output,
        "indices": indices,
        "row_windows": rows,
        "column_windows": columns,
        "grad_input": grad_input,
    }
    most = most_windows(kernel_size, stride, dilation)
    constants = pairs(KERNEL=kernel_size, STRIDE=stride, PADDING=padding, DILATION=dilation, MOST=most)
    constants |= {"PLACED": (GIVEN if windows else REGULAR).value, "PLACES": places(indices)}
    return tile_launch(max_backward_kernel, grad_output, grad_input, channels_last, True, arguments, constants, device)


def average_launch(input, output, channels_last, kernel_size, stride, padding, count_include_pad, divisor, device):
    """The launch of the averages, not yet run."""
    adaptive = kernel_size[0] == 0
    # An adaptive window begins and ends anywhere between two positions.
    most = [
        (n // o + (2 if n % o else 0) if adaptive else k)
        for n, o, k in zip(input.shape[-2:], output.shape[-2:], kernel_size, strict=True)
    ]
    arguments = {
        "input": input,
        "output": output,
        "divisor": divisor,
        "most_rows": most[0],
        "most_columns": most[1],
    }
    constants = pairs(KERNEL=kernel_size, STRIDE=stride, PADDING=padding)
    constants |= {"PLACED": (ADAPTIVE if adaptive else REGULAR).value, "INCLUDE_PAD": bool(count_include_pad)}
    if most[0] * most[1] < WIDE_WINDOW:
        return tile_launch(average_kernel, input, output, channels_last, False, arguments, constants, device)
    channels = input.shape[-3] if channels_last else 1
    columns = min(triton.next_power_of_2(channels), 16)
    sizes = {
        "lines": output.numel() // channels,
        "height": input.shape[-2],
        "width": input.shape[-1],
        "output_height": output.shape[-2],
        "output_width": output.shape[-1],
        "channels": channels,
    }
    elements = threads(device) * 2 * 16 // input.element_size() // columns
    constants |= {"ELEMENTS": min(elements, triton.next_power_of_2(most[0] * most[1])), "COLUMNS": columns}
    grid = (sizes["lines"], triton.cdiv(channels, columns))
    return Launch(wide_average_kernel, grid, arguments | sizes, constants, device, WARPS, plan=Plan(PROGRAMS))


def average_backward_launch(
    grad_output, grad_input, channels_last, kernel_size, stride, padding, count_include_pad, divisor, device
):
    """The launch of the averages' gradient, not yet run."""
    adaptive = kernel_size[0] == 0
    most = [o // n + (2 if o % n else 0) for n, o in zip(grad_input.shape[-2:], grad_output.shape[-2:], strict=True)]
    arguments = {
        "grad_output": grad_output,
        "grad_input": grad_input,
        "divisor": divisor,
        "most_rows": most[0],
        "most_columns": most[1],
    }
    windows = (0, 0) if adaptive else most_windows(kernel_size, stride, (1, 1))
    constants = pairs(KERNEL=kernel_size, STRIDE=stride, PADDING=padding, MOST=windows)
    constants |= {"PLACED": (ADAPTIVE if adaptive else REGULAR).value, "INCLUDE_PAD": bool(count_include_pad)}
    return tile_launch(
        average_backward_kernel, grad_output, grad_input, channels_last, True, arguments, constants, device
    )


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: 3 x 3 windows, one whole plane."""
    launches = {}
    windows = (3, 3), (2, 2), (1, 1)
    for dtype in (torch.bfloat16, torch.float32) if every else (torch.bfloat16,):
        image = torch.empty(8, 64, 56, 56, dtype=dtype, device="meta")
        pooled = torch.empty(8, 64, 28, 28, dtype=dtype, device="meta")
        mean = torch.empty(8, 64, 1, 1, dtype=dtype, device="meta")
        window_places, plane_places = (torch.empty_like(pooled, dtype=kind) for kind in (torch.uint8, torch.int64))
        for last, format in ((False, "contiguous"), (True, "channels_last")):
            name = f"{str(dtype).removeprefix('torch.')} {format}"
            average = *windows, True, 0, device
            whole = (0, 0), (1, 1), (0, 0), True, 0, device
            kinds = {"uint8": window_places, "int64": plane_places} if every else {"uint8": window_places}
            for kind, indices in kinds.items():
                launches[f"max {kind} {name}"] = max_launch(
                    image, None, pooled, indices, last, *windows, (1, 1), device
                )
                launches[f"max backward {kind} {name}"] = max_backward_launch(
                    pooled, indices, None, image, last, *windows, (1, 1), device
                )
            launches[f"average {name}"] = average_launch(image, pooled, last, *average)
            launches[f"average backward {name}"] = average_backward_launch(pooled, image, last, *average)
            launches[f"mean {name}"] = average_launch(image, mean, last, *whole)
            launches[f"mean backward {name}"] = average_backward_launch(mean, image, last, *whole)
    return launches
