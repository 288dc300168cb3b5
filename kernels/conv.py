"""Fused 2-D convolution and its gradients as implicit GEMMs: tiles are gathered from the images while they multiply."""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from . import linear
from .activation import TANH, apply_activation, compiled_parameter
from .common import Launch, Plan, device_limits
from .linear import DEPTH_OF_A_PARTIAL, DEPTH_OF_A_TILE, SPLITS, combine_launch, precision, split_columns

BEYOND = tl.constexpr(-(2**30))  # the row of a pixel that is none: no tap leads from there into an image

# A kernel's index vectors are pixels along one axis and channels along the other. Threads run along the last axis, so
# that is the axis in which memory is contiguous: PIXELS_LAST for NCHW. Of channels the compiler knows the stride.


@triton.jit
def pixel_axis(index, PIXELS_LAST: tl.constexpr):
    """A vector over pixels, as the tile's axis."""
    return index[None, :] if PIXELS_LAST else index[:, None]


@triton.jit
def channel_axis(index, PIXELS_LAST: tl.constexpr):
    """A vector over channels, as the tile's axis."""
    return index[:, None] if PIXELS_LAST else index[None, :]


@triton.jit
def aligned(number, VECTOR: tl.constexpr):
    """A multiple of VECTOR, in a form that shows the compiler that it is one."""
    return number // VECTOR * VECTOR


@triton.jit
def quotient(number, magic, shift):
    """number // divisor by the divisor's magic_number: number in [0, 2**31)."""
    return ((number.to(tl.uint32).to(tl.uint64) * magic.to(tl.uint32).to(tl.uint64)) >> shift).to(tl.int32)


@triton.jit
def split_pixel(pixel, height, width, image_magic, image_shift, row_magic, row_shift):
    """(image, row, column) of a pixel's number, by the magic_number of height * width and of width: where it is asked
    for in each block of a sum, dividing would take longer than multiplying the matrices."""
    image = quotient(pixel, image_magic, image_shift)
    rest = pixel - image * (height * width)
    row = quotient(rest, row_magic, row_shift)
    return image, row, rest - row * width


@triton.jit
def pixel_offset(image, row, column, n_stride, h_stride, w_stride, VECTOR: tl.constexpr):
    """Where a pixel's channels begin in images whose strides are multiples of VECTOR."""
    offset = image.to(tl.int64) * aligned(n_stride, VECTOR)
    return offset + row.to(tl.int64) * aligned(h_stride, VECTOR) + column.to(tl.int64) * aligned(w_stride, VECTOR)


@triton.jit
def load_pixels(
    images, offset, top, left, row_shift, column_shift, channel,
    height, width, channels, row_stride, column_stride, channel_stride,
):  # fmt: skip
    """What a tap sees of (batch, channels, height, width) images: zeros beyond their edges.

    offset (64 bits), top and left: each pixel's first tap; row_shift and column_shift: from there to the tap. Arguments
    are scalars or tensors that broadcast to the tile.
    """
    row = top + row_shift
    column = left + column_shift
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (channel < channels)
    shift = row_shift.to(tl.int64) * row_stride + column_shift.to(tl.int64) * column_stride
    return tl.load(images + (offset + (shift + channel.to(tl.int64) * channel_stride)), mask=inside, other=0.0)


@triton.jit
def reach(start, size, taps, stride, padding, dilation, step, inverse, TRANSPOSED: tl.constexpr):
    """What the outputs of one axis read: (count, pace, offset, shift, first_tap, tap_count).

    Of count outputs the v-th reads, through tap first_tap + i * step for each i in [0, tap_count), the input at
    v * pace + offset + i * shift. A convolution's outputs read all taps. TRANSPOSED, those at start + v * stride read
    the taps t with (start + padding - t * dilation) % stride == 0: each step-th, step = stride / gcd(stride, dilation);
    inverse is that of dilation / gcd modulo step.
    """
    if TRANSPOSED:
        common = stride // step
        residue = (start + padding) % stride
        first_tap = tl.where(residue % common == 0, residue // common * inverse % step, taps)
        offset = (start + padding - first_tap * dilation) // stride
        count = tl.maximum(size - start + stride - 1, 0) // stride
        tap_count = tl.maximum(taps - first_tap + step - 1, 0) // step
        return count, 1, offset, -(dilation // common), first_tap, tap_count
    return size, stride, start - padding, dilation, start, taps


@triton.jit
def split_classes(index, stride_h, stride_w, TRANSPOSED: tl.constexpr):
    """(group, first row, first column) of a grid's index, where groups have the strides' residue classes inside."""
    zero = index * 0
    if TRANSPOSED:
        return index // stride_h // stride_w, index % stride_h, index // stride_h % stride_w
    return index, zero, zero


@triton.jit
def store_part(
    tile, bias, output, preactivation, row_offset, is_pixel, column, columns, channel_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, PIXELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the bias to a (pixels, columns) tile of products, applies the activation and stores what is asked for."""
    index = column + tl.arange(0, BLOCK_COLUMNS)
    columns = aligned(columns, VECTOR)
    if bias is not None:
        tile += tl.load(bias + index, mask=index < columns, other=0.0).to(tile.dtype)[None, :]
    if PIXELS_LAST:
        tile = tl.trans(tile)
    offsets = pixel_axis(row_offset, PIXELS_LAST) + channel_axis(index.to(tl.int64) * channel_stride, PIXELS_LAST)
    mask = pixel_axis(is_pixel, PIXELS_LAST) & channel_axis(index < columns, PIXELS_LAST)
    if preactivation is not None:
        tl.store(preactivation + offsets, tile.to(preactivation.dtype.element_ty), mask=mask)
    result = apply_activation(tile, ACTIVATION, PARAMETER)
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def store_halves(
    tile, bias, output, preactivation, row_offset, is_pixel, column, columns, channel_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, PIXELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """store_part, one half of the columns after the other."""
    HALF: tl.constexpr = BLOCK_COLUMNS // 2
    first, second = split_columns(tile, BLOCK_ROWS, BLOCK_COLUMNS)
    store_part(
        first, bias, output, preactivation, row_offset, is_pixel, column, columns, channel_stride,
        ACTIVATION, PARAMETER, PIXELS_LAST, VECTOR, HALF,
    )  # fmt: skip
    store_part(
        second, bias, output, preactivation, row_offset, is_pixel, column + HALF, columns, channel_stride,
        ACTIVATION, PARAMETER, PIXELS_LAST, VECTOR, HALF,
    )  # fmt: skip


@triton.jit
def conv_kernel(
    input, weight, bias, output, preactivation,
    batch, in_channels, height, width, out_channels, out_height, out_width, kernel_height, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, step_h, step_w, inverse_h, inverse_w,
    input_n_stride, input_c_stride, input_h_stride, input_w_stride,
    weight_group_stride, weight_out_stride, weight_in_stride, weight_h_stride, weight_w_stride,
    output_n_stride, output_c_stride, output_h_stride, output_w_stride,
    blocks_per_split, split_stride,
    TRANSPOSED: tl.constexpr, FLAT: tl.constexpr, INPUT_PIXELS_LAST: tl.constexpr, OUTPUT_PIXELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr, OUT_VECTOR: tl.constexpr, ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """output = act(conv(input, weight) + bias), or, TRANSPOSED, a convolution's input gradient from input = dz.

    A matmul of (pixels, taps * in_channels) with (taps * in_channels, out_channels) for each group; channels are counts
    of one group. input (batch, groups * in_channels, height, width), output and preactivation (batch, groups *
    out_channels, out_height, out_width) and weight have any strides, bias is contiguous. With splits of depth, output
    holds split_stride elements of partial results for each. FLAT: a block of depth takes channels of several taps.

    Launches a 3D grid. Axis 0: each program takes one tile of BLOCK_ROWS pixels and BLOCK_COLUMNS channels, all
    channels of a pixel one after the other, so that programs which run together share the larger operand in L2. Axis 1:
    groups; TRANSPOSED, with the strides' residue classes of pixels inside: those of one class are reached by the same
    taps. Axis 2: splits of depth.
    """
    column_tiles = tl.cdiv(out_channels, BLOCK_COLUMNS)
    row = tl.program_id(0) // column_tiles * BLOCK_ROWS
    column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS
    group, start_h, start_w = split_classes(tl.program_id(1), stride_h, stride_w, TRANSPOSED)
    count_h, pace_h, offset_h, shift_h, first_h, taps_h = reach(
        start_h, out_height, kernel_height, stride_h, padding_h, dilation_h, step_h, inverse_h, TRANSPOSED
    )
    count_w, pace_w, offset_w, shift_w, first_w, taps_w = reach(
        start_w, out_width, kernel_width, stride_w, padding_w, dilation_w, step_w, inverse_w, TRANSPOSED
    )
    pixel = row + tl.arange(0, BLOCK_ROWS)
    is_pixel = pixel < batch * count_h * count_w
    image = pixel // tl.maximum(count_h * count_w, 1)
    pixel_row = pixel // tl.maximum(count_w, 1) % tl.maximum(count_h, 1)
    pixel_column = pixel % tl.maximum(count_w, 1)

    in_channels = aligned(in_channels, VECTOR)
    input_h_stride = aligned(input_h_stride, VECTOR)
    input_w_stride = aligned(input_w_stride, VECTOR)
    top = pixel_row * pace_h + offset_h
    left = pixel_column * pace_w + offset_w
    input_offset = pixel_offset(image, top, left, input_n_stride, input_h_stride, input_w_stride, VECTOR)
    input += group.to(tl.int64) * in_channels * input_c_stride
    input_offset = pixel_axis(input_offset, INPUT_PIXELS_LAST)
    top = pixel_axis(tl.where(is_pixel, top, BEYOND), INPUT_PIXELS_LAST)
    left = pixel_axis(left, INPUT_PIXELS_LAST)

    weight += group.to(tl.int64) * aligned(weight_group_stride, VECTOR)
    weight_h_stride = aligned(weight_h_stride, VECTOR)
    weight_w_stride = aligned(weight_w_stride, VECTOR)
    out_channel = column + tl.arange(0, BLOCK_COLUMNS)
    if TRANSPOSED:  # weight's channels, of which the compiler knows the stride, are these
        is_out_channel = out_channel < aligned(out_channels, VECTOR)
        weight_in_stride = aligned(weight_in_stride, VECTOR)
    else:
        is_out_channel = out_channel < out_channels
        weight_out_stride = aligned(weight_out_stride, VECTOR)
    weight_column = (out_channel.to(tl.int64) * weight_out_stride)[None, :]

    depth = taps_h * taps_w * in_channels
    if FLAT:
        channel_blocks = tl.cdiv(depth, BLOCK_DEPTH)
        blocks = channel_blocks
    else:
        channel_blocks = tl.cdiv(in_channels, BLOCK_DEPTH)
        blocks = channel_blocks * taps_h * taps_w
    first_block = tl.program_id(2) * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, blocks)
    # Counted on, not divided out of the block each time.
    channel_block = first_block % tl.maximum(channel_blocks, 1)
    tap = first_block // tl.maximum(channel_blocks, 1)
    tap_h = tap // tl.maximum(taps_w, 1)
    tap_w = tap % tl.maximum(taps_w, 1)
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    for block in tl.range(first_block, last_block):
        if FLAT:
            index = block * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
            is_depth = index < depth
            channel = index % in_channels
            row_tap = index // in_channels // taps_w
            column_tap = index // in_channels % taps_w
            row_shift = channel_axis(tl.where(is_depth, row_tap * shift_h, BEYOND), INPUT_PIXELS_LAST)
            column_shift = channel_axis(column_tap * shift_w, INPUT_PIXELS_LAST)
            weight_row = (first_h + row_tap * step_h)[:, None]
            weight_column_tap = (first_w + column_tap * step_w)[:, None]
        else:
            channel = channel_block * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
            is_depth = channel < in_channels
            row_shift = tap_h * shift_h
            column_shift = tap_w * shift_w
            weight_row = first_h + tap_h * step_h
            weight_column_tap = first_w + tap_w * step_w
            channel_block += 1
            tap_w = tl.where(channel_block == channel_blocks, tap_w + 1, tap_w)
            channel_block = tl.where(channel_block == channel_blocks, 0, channel_block)
            tap_h = tl.where(tap_w == taps_w, tap_h + 1, tap_h)
            tap_w = tl.where(tap_w == taps_w, 0, tap_w)
        seen = load_pixels(
            input, input_offset, top, left, row_shift, column_shift, channel_axis(channel, INPUT_PIXELS_LAST),
            height, width, in_channels, input_h_stride, input_w_stride, input_c_stride,
        )  # fmt: skip
        if INPUT_PIXELS_LAST:
            seen = tl.trans(seen)
        tap_offset = weight_row.to(tl.int64) * weight_h_stride + weight_column_tap.to(tl.int64) * weight_w_stride
        filters = tl.load(
            weight + (tap_offset + (channel.to(tl.int64) * weight_in_stride)[:, None] + weight_column),
            mask=is_depth[:, None] & is_out_channel[None, :],
            other=0.0,
        )
        accumulator = tl.dot(seen, filters, accumulator, input_precision=INPUT_PRECISION, out_dtype=ACCUMULATOR)

    output_row = start_h + pixel_row * (stride_h if TRANSPOSED else 1)
    output_column = start_w + pixel_column * (stride_w if TRANSPOSED else 1)
    output_offset = pixel_offset(
        image, output_row, output_column, output_n_stride, output_h_stride, output_w_stride, OUT_VECTOR
    )
    output_offset += tl.program_id(2).to(tl.int64) * split_stride
    output_offset += group.to(tl.int64) * aligned(out_channels, OUT_VECTOR) * output_c_stride
    if bias is not None:
        bias += group * out_channels
    # Part after part, as in linear: fewer registers.
    if PARTS == 4:
        HALF: tl.constexpr = BLOCK_COLUMNS // 2
        first, second = split_columns(accumulator, BLOCK_ROWS, BLOCK_COLUMNS)
        store_halves(
            first, bias, output, preactivation, output_offset, is_pixel, column, out_channels, output_c_stride,
            ACTIVATION, PARAMETER, OUTPUT_PIXELS_LAST, OUT_VECTOR, BLOCK_ROWS, HALF,
        )  # fmt: skip
        store_halves(
            second, bias, output, preactivation, output_offset, is_pixel, column + HALF, out_channels, output_c_stride,
            ACTIVATION, PARAMETER, OUTPUT_PIXELS_LAST, OUT_VECTOR, BLOCK_ROWS, HALF,
        )  # fmt: skip
    elif PARTS == 2:
        store_halves(
            accumulator, bias, output, preactivation, output_offset, is_pixel, column, out_channels, output_c_stride,
            ACTIVATION, PARAMETER, OUTPUT_PIXELS_LAST, OUT_VECTOR, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        store_part(
            accumulator, bias, output, preactivation, output_offset, is_pixel, column, out_channels, output_c_stride,
            ACTIVATION, PARAMETER, OUTPUT_PIXELS_LAST, OUT_VECTOR, BLOCK_COLUMNS,
        )  # fmt: skip


@triton.jit
def weight_gradient_kernel(
    grad_output, input, grad_weight, row_sums,
    batch, in_channels, height, width, out_channels, out_height, out_width, kernel_height, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    grad_n_stride, grad_c_stride, grad_h_stride, grad_w_stride,
    input_n_stride, input_c_stride, input_h_stride, input_w_stride,
    weight_group_stride, weight_out_stride, weight_in_stride, weight_h_stride, weight_w_stride,
    image_magic, image_shift, row_magic, row_shift,
    blocks_per_split, split_stride, sums_stride,
    FLAT: tl.constexpr, INPUT_PIXELS_LAST: tl.constexpr, VECTOR: tl.constexpr, GRAD_VECTOR: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_weight = a convolution's weight gradient from grad_output = dz, and row_sums = dz's sums, the bias's.

    A matmul of (out_channels, pixels) with (pixels, taps * in_channels) for each group; channels are counts of one
    group. grad_output (batch, groups * out_channels, out_height, out_width), input (batch, groups * in_channels,
    height, width) and grad_weight have any strides; row_sums (groups * out_channels,) or grad_weight and input may be
    None. With splits of the pixels, they hold split_stride and sums_stride elements of partial results for each. FLAT:
    a tile has channels of several taps.

    Launches a 3D grid. Axis 0: each program takes one tile of BLOCK_ROWS output channels and BLOCK_COLUMNS channels of
    a tap. Axis 1: groups. Axis 2: splits, so that programs which run together share their pixels in L2.
    """
    group = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    in_channels = aligned(in_channels, VECTOR)
    column_tiles = tl.cdiv(kernel_height * kernel_width * in_channels, BLOCK_COLUMNS)
    if not FLAT:
        column_tiles = tl.cdiv(in_channels, BLOCK_COLUMNS) * kernel_height * kernel_width
    column_tile = tl.program_id(0) % column_tiles
    row = tl.program_id(0) // column_tiles * BLOCK_ROWS
    if FLAT:
        column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        tap = column // in_channels
        channel = column % in_channels
        is_column = tap < kernel_height * kernel_width
        tap_h = tap // kernel_width
        tap_w = tap % kernel_width
        row_steps = channel_axis(tl.where(is_column, tap_h * dilation_h, BEYOND), INPUT_PIXELS_LAST)
        column_steps = channel_axis(tap_w * dilation_w, INPUT_PIXELS_LAST)
    else:
        tap = column_tile // tl.cdiv(in_channels, BLOCK_COLUMNS)
        channel = column_tile % tl.cdiv(in_channels, BLOCK_COLUMNS) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        is_column = channel < in_channels
        tap_h = tap // kernel_width
        tap_w = tap % kernel_width
        row_steps = tap_h * dilation_h
        column_steps = tap_w * dilation_w
    out_channel = row + tl.arange(0, BLOCK_ROWS)
    is_row = out_channel < aligned(out_channels, GRAD_VECTOR)
    grad_output += group.to(tl.int64) * aligned(out_channels, GRAD_VECTOR) * grad_c_stride
    if input is not None:
        input += group.to(tl.int64) * in_channels * input_c_stride
    input_h_stride = aligned(input_h_stride, VECTOR)
    input_w_stride = aligned(input_w_stride, VECTOR)

    pixels = batch * out_height * out_width
    first_block = tl.program_id(2) * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(pixels, BLOCK_DEPTH))
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    sums = tl.zeros((BLOCK_ROWS,), ACCUMULATOR)
    for block in tl.range(first_block, last_block):
        pixel = block * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        is_pixel = pixel < pixels
        image, pixel_row, pixel_column = split_pixel(
            pixel, out_height, out_width, image_magic, image_shift, row_magic, row_shift
        )
        grad_offset = pixel_offset(
            image, pixel_row, pixel_column, grad_n_stride, grad_h_stride, grad_w_stride, GRAD_VECTOR
        )
        grad = tl.load(
            grad_output + (grad_offset[None, :] + (out_channel.to(tl.int64) * grad_c_stride)[:, None]),
            mask=is_pixel[None, :] & is_row[:, None],
            other=0.0,
        )
        if row_sums is not None:
            if column_tile == 0:
                sums += tl.sum(grad.to(ACCUMULATOR), 1)
        if input is not None:
            top = pixel_row * stride_h - padding_h
            left = pixel_column * stride_w - padding_w
            input_offset = pixel_offset(image, top, left, input_n_stride, input_h_stride, input_w_stride, VECTOR)
            seen = load_pixels(
                input,
                pixel_axis(input_offset, INPUT_PIXELS_LAST),
                pixel_axis(tl.where(is_pixel, top, BEYOND), INPUT_PIXELS_LAST),
                pixel_axis(left, INPUT_PIXELS_LAST),
                row_steps, column_steps, channel_axis(channel, INPUT_PIXELS_LAST),
                height, width, in_channels, input_h_stride, input_w_stride, input_c_stride,
            )  # fmt: skip
            if INPUT_PIXELS_LAST:
                seen = tl.trans(seen)
            accumulator = tl.dot(grad, seen, accumulator, input_precision=INPUT_PRECISION, out_dtype=ACCUMULATOR)

    if row_sums is not None:
        if column_tile == 0:
            offsets = split * sums_stride + group * out_channels + out_channel
            tl.store(row_sums + offsets, sums.to(row_sums.dtype.element_ty), mask=is_row)
    if input is not None:
        offsets = split * split_stride + group.to(tl.int64) * weight_group_stride
        offsets += tap_h.to(tl.int64) * weight_h_stride + tap_w.to(tl.int64) * weight_w_stride
        column_offset = (offsets + channel.to(tl.int64) * weight_in_stride)[None, :]
        tl.store(
            grad_weight + (column_offset + (out_channel.to(tl.int64) * weight_out_stride)[:, None]),
            accumulator.to(grad_weight.dtype.element_ty),
            mask=is_row[:, None] & is_column[None, :],
        )


@triton.jit
def depthwise_kernel(
    input, weight, bias, output, preactivation,
    batch, multiplier, height, width, out_channels, out_height, out_width, kernel_height, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, step_h, step_w, inverse_h, inverse_w,
    input_n_stride, input_c_stride, input_h_stride, input_w_stride,
    weight_out_stride, weight_h_stride, weight_w_stride,
    output_n_stride, output_c_stride, output_h_stride, output_w_stride,
    TRANSPOSED: tl.constexpr, PIXELS_LAST: tl.constexpr, VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """conv_kernel for one channel a group: output channel k reads input channel k // multiplier alone.

    TRANSPOSED, output channel c (of out_channels, the convolution's input) gathers the multiplier input channels that
    read it. No tl.dot: bound by memory, each pixel's neighbours come from L1.

    Launches a 3D grid where each program takes a tile: axis 0 over pixels, axis 1 over channels, axis 2 over the
    strides' residue classes of pixels (1 if not TRANSPOSED).
    """
    _, start_h, start_w = split_classes(tl.program_id(2), stride_h, stride_w, TRANSPOSED)
    count_h, pace_h, offset_h, shift_h, first_h, taps_h = reach(
        start_h, out_height, kernel_height, stride_h, padding_h, dilation_h, step_h, inverse_h, TRANSPOSED
    )
    count_w, pace_w, offset_w, shift_w, first_w, taps_w = reach(
        start_w, out_width, kernel_width, stride_w, padding_w, dilation_w, step_w, inverse_w, TRANSPOSED
    )
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    is_pixel = pixel < batch * count_h * count_w
    image = pixel // tl.maximum(count_h * count_w, 1)
    pixel_row = pixel // tl.maximum(count_w, 1) % tl.maximum(count_h, 1)
    pixel_column = pixel % tl.maximum(count_w, 1)
    input_h_stride = aligned(input_h_stride, VECTOR)
    input_w_stride = aligned(input_w_stride, VECTOR)
    top = pixel_row * pace_h + offset_h
    left = pixel_column * pace_w + offset_w
    input_offset = pixel_offset(image, top, left, input_n_stride, input_h_stride, input_w_stride, VECTOR)
    input_offset = pixel_axis(input_offset, PIXELS_LAST)
    top = pixel_axis(tl.where(is_pixel, top, BEYOND), PIXELS_LAST)
    left = pixel_axis(left, PIXELS_LAST)
    channels = aligned(out_channels, VECTOR)
    channel = channel_axis(tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), PIXELS_LAST)

    accumulator = pixel_axis(tl.zeros((BLOCK_PIXELS,), ACCUMULATOR), PIXELS_LAST) + channel_axis(
        tl.zeros((BLOCK_CHANNELS,), ACCUMULATOR), PIXELS_LAST
    )
    for tap in tl.range(taps_h * taps_w):
        tap_h = tap // taps_w
        tap_w = tap % taps_w
        tap_offset = (first_h + tap_h * step_h).to(tl.int64) * weight_h_stride
        tap_offset += (first_w + tap_w * step_w).to(tl.int64) * weight_w_stride
        for member in tl.range(multiplier if TRANSPOSED else 1):
            if TRANSPOSED:
                read = channel * multiplier + member
                filtered = read
                read_channels = channels * multiplier
            else:
                read = channel // multiplier
                filtered = channel
                read_channels = channels // multiplier
            seen = load_pixels(
                input, input_offset, top, left, tap_h * shift_h, tap_w * shift_w, read,
                height, width, read_channels, input_h_stride, input_w_stride, input_c_stride,
            )  # fmt: skip
            factor = tl.load(
                weight + (tap_offset + filtered.to(tl.int64) * weight_out_stride), mask=channel < channels, other=0.0
            )
            accumulator += seen.to(ACCUMULATOR) * factor.to(ACCUMULATOR)

    if bias is not None:
        accumulator += tl.load(bias + channel, mask=channel < channels, other=0.0).to(ACCUMULATOR)
    output_row = start_h + pixel_row * (stride_h if TRANSPOSED else 1)
    output_column = start_w + pixel_column * (stride_w if TRANSPOSED else 1)
    output_offset = pixel_offset(
        image, output_row, output_column, output_n_stride, output_h_stride, output_w_stride, VECTOR
    )
    offsets = pixel_axis(output_offset, PIXELS_LAST) + channel.to(tl.int64) * output_c_stride
    mask = pixel_axis(is_pixel, PIXELS_LAST) & (channel < channels)
    if preactivation is not None:
        tl.store(preactivation + offsets, accumulator.to(preactivation.dtype.element_ty), mask=mask)
    result = apply_activation(accumulator, ACTIVATION, PARAMETER)
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_weight_gradient_kernel(
    grad_output, input, grad_weight, grad_bias,
    batch, multiplier, height, width, out_channels, out_height, out_width, kernel_height, kernel_width,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    grad_n_stride, grad_c_stride, grad_h_stride, grad_w_stride,
    input_n_stride, input_c_stride, input_h_stride, input_w_stride,
    weight_out_stride, weight_h_stride, weight_w_stride,
    image_magic, image_shift, row_magic, row_shift,
    blocks_per_split, split_stride, sums_stride,
    PIXELS_LAST: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_TAPS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """weight_gradient_kernel for one channel a group; the bias's gradient is that of one more tap, which sees ones.

    A (taps, pixels, channels) tile, its last two axes swapped with PIXELS_LAST, so that each pixel of dz is read once
    for all its taps.

    Launches a 3D grid: axis 0 over BLOCK_TAPS taps, axis 1 over BLOCK_CHANNELS channels, axis 2 over splits of the
    pixels, of which a program takes blocks_per_split * BLOCK_PIXELS.
    """
    split = tl.program_id(2).to(tl.int64)
    taps = kernel_height * kernel_width
    tap = tl.program_id(0) * BLOCK_TAPS + tl.arange(0, BLOCK_TAPS)
    row_steps = tl.where(tap < taps, tap // kernel_width * dilation_h, BEYOND)[:, None, None]
    column_steps = (tap % kernel_width * dilation_w)[:, None, None]
    channels = aligned(out_channels, VECTOR)
    out_channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel = channel_axis(out_channel, PIXELS_LAST)[None, :, :]
    input_h_stride = aligned(input_h_stride, VECTOR)
    input_w_stride = aligned(input_w_stride, VECTOR)
    pixels = batch * out_height * out_width
    first_block = tl.program_id(2) * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(pixels, BLOCK_PIXELS))
    if PIXELS_LAST:
        accumulator = tl.zeros((BLOCK_TAPS, BLOCK_CHANNELS, BLOCK_PIXELS), ACCUMULATOR)
    else:
        accumulator = tl.zeros((BLOCK_TAPS, BLOCK_PIXELS, BLOCK_CHANNELS), ACCUMULATOR)
    for block in tl.range(first_block, last_block):
        pixel = block * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        image, pixel_row, pixel_column = split_pixel(
            pixel, out_height, out_width, image_magic, image_shift, row_magic, row_shift
        )
        is_pixel = pixel < pixels
        grad_offset = pixel_offset(image, pixel_row, pixel_column, grad_n_stride, grad_h_stride, grad_w_stride, VECTOR)
        grad = tl.load(
            grad_output + (pixel_axis(grad_offset, PIXELS_LAST)[None, :, :] + channel.to(tl.int64) * grad_c_stride),
            mask=pixel_axis(is_pixel, PIXELS_LAST)[None, :, :] & (channel < channels),
            other=0.0,
        )
        top = pixel_row * stride_h - padding_h
        left = pixel_column * stride_w - padding_w
        input_offset = pixel_offset(image, top, left, input_n_stride, input_h_stride, input_w_stride, VECTOR)
        seen = load_pixels(
            input,
            pixel_axis(input_offset, PIXELS_LAST)[None, :, :],
            pixel_axis(tl.where(is_pixel, top, BEYOND), PIXELS_LAST)[None, :, :],
            pixel_axis(left, PIXELS_LAST)[None, :, :],
            row_steps, column_steps, channel // multiplier,
            height, width, channels // multiplier, input_h_stride, input_w_stride, input_c_stride,
        )  # fmt: skip
        if grad_bias is None:
            factor = seen.to(ACCUMULATOR)
        else:
            factor = tl.where((tap == taps)[:, None, None], 1.0, seen.to(ACCUMULATOR))
        accumulator += grad.to(ACCUMULATOR) * factor

    sums = tl.sum(accumulator, 2 if PIXELS_LAST else 1)
    is_channel = (out_channel < channels)[None, :]
    tap_offset = (tap // kernel_width).to(tl.int64) * weight_h_stride
    tap_offset += (tap % kernel_width).to(tl.int64) * weight_w_stride
    offsets = tap_offset[:, None] + (out_channel.to(tl.int64) * weight_out_stride)[None, :]
    tl.store(
        grad_weight + (split * split_stride + offsets),
        sums.to(grad_weight.dtype.element_ty),
        mask=(tap < taps)[:, None] & is_channel,
    )
    if grad_bias is not None:
        tl.store(
            grad_bias + (split * sums_stride + tl.zeros_like(tap)[:, None] + out_channel[None, :]),
            sums.to(grad_bias.dtype.element_ty),
            mask=(tap == taps)[:, None] & is_channel,
        )


def magic_number(divisor):
    """(magic, shift) such that number // divisor = number * magic >> shift for every number in [0, 2**31).

    Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994.
    """
    shift = 31 + (divisor - 1).bit_length()
    return -(-(2**shift) // divisor), shift


Tile = linear.Tile
TILES = linear.TILES | {
    "half": (
        Tile(128, 256, 64, 8, 1.0),  # least traffic from L2 a product; two groups of four warps, 64 rows each
        Tile(256, 128, 64, 8, 1.0),  # the same for 128 channels
        Tile(128, 128, 64, 4, 0.85),  # two programs at once, so that one multiplies while the other starts or stores
        Tile(128, 128, 64, 8, 0.8),  # the largest on Ampere
        Tile(128, 64, 64, 4, 0.65),  # 64 channels
        Tile(64, 64, 64, 4, 0.45),  # the smallest with full-width Hopper matrix instructions
        Tile(128, 64, 32, 4, 0.5),  # 64 channels and no more than 32 to sum over in each tap
        Tile(128, 16, 64, 4, 0.2),  # few channels, as in the gradient of an RGB image: bound by reading the pixels
        Tile(16, 64, 64, 4, 0.2),  # few channels in a weight's gradient
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 1.0),  # 32 deep as float32 takes twice the bytes of half
        Tile(128, 64, 32, 4, 0.75),
        Tile(64, 64, 32, 4, 0.5),
        Tile(128, 16, 32, 4, 0.2),
        Tile(16, 64, 32, 4, 0.2),
    ),
}
MOST_STAGES = 4  # hides the memory's latency at every block depth here
FLAT_CHANNELS = 16  # fewer to sum over in each tap would leave half of the shallowest block empty
FLAT_COLUMNS = 32  # the same for the columns of a weight gradient, of which the narrowest tile has 64


DEPTHWISE_WARPS = 4
DEPTHWISE_PROGRAMS = 4  # a multiprocessor: 16 warps, each with several loads on their way
DEPTHWISE_LEAST_BLOCKS = 8  # for a split of a depthwise weight gradient: fewer would cost less than adding its results


@dataclass(frozen=True)
class Config:
    """What choose_config decides for one product."""

    tile: Tile
    stages: int
    splits: int
    flat: bool


@dataclass(frozen=True)
class Product:
    """A matmul of (rows, depth) with (depth, columns), batches times; columns or depth may be runs of which no block
    takes two at once, and channels is the run that is made of an image's channels."""

    rows: int
    columns: int
    depth: int
    column_runs: int = 1
    depth_runs: int = 1
    batches: int = 1

    def flattened(self):
        """Each run of columns or depth following the last in the same block."""
        return Product(self.rows, self.columns * self.column_runs, self.depth * self.depth_runs, batches=self.batches)


def stages_that_fit(tile, element_size, device):
    """How deep the pipeline can be; the tile that is stored at the end takes the stages' memory."""
    stage = (tile.rows + tile.columns) * tile.depth * element_size
    programs = tile.programs if device.capability else 1
    return min(MOST_STAGES, ((device.shared_memory + 1024) // programs - 2048) // stage)


def usable_tiles(dtype, allow_tf32, wide, row_sums, device):
    """The tiles that choose_config chooses from."""
    kind = precision(dtype, allow_tf32)
    sparing = linear.is_sparing(kind, wide, False, row_sums, device)
    tiles = linear.SPARING_TILES[dtype.itemsize] if sparing else TILES[kind]
    return [
        tile
        for tile in tiles
        # Ampere's matrix instructions read registers: with the pixels' addresses 128 accumulators a thread would spill.
        if not (tile.accumulators >= 128 and 0 < device.capability < 90)
        and stages_that_fit(tile, dtype.itemsize, device) >= 2
    ]


@functools.lru_cache(maxsize=4096)
def choose_config(product, flat, dtype, allow_tf32, wide, row_sums, splittable, device, only=None):
    """The tile and splits of depth with the least estimated time for a product, estimated as linear's choose_config.

    Pure arithmetic. flat: blocks go over from run to run; wide: all is read by 16 bytes; row_sums: sums are taken
    beside the products; splittable: whether partial results can be stored; only: the tile to take.
    """
    product = product.flattened() if flat else product
    best = None
    for tile in (only,) if only else usable_tiles(dtype, allow_tf32, wide, row_sums, device):
        stages = stages_that_fit(tile, dtype.itemsize, device)
        columns = product.column_runs * triton.cdiv(product.columns, tile.columns)
        tiles = triton.cdiv(product.rows, tile.rows) * columns * product.batches
        blocks = product.depth_runs * triton.cdiv(product.depth, tile.depth)
        for splits in SPLITS if splittable else (1,):
            blocks_per_split = triton.cdiv(blocks, splits)
            if splits > 1 and blocks_per_split < MOST_STAGES:
                break
            waves = triton.cdiv(tiles * splits, device.multiprocessors)
            cost = waves * (blocks_per_split * tile.depth + DEPTH_OF_A_TILE) * tile.rows * tile.columns / tile.speed
            if splits > 1:
                results = product.rows * product.column_runs * product.columns * product.batches
                cost += splits * results * DEPTH_OF_A_PARTIAL / device.multiprocessors
            if best is None or cost < best[0]:
                best = cost, Config(tile, stages, splits, flat)
    return best[1]


def plan(tile, kind, wide, device):
    """What the machine code of a product must reach on a device."""
    planned = linear.plan(tile, kind, wide, device)
    # Of 8 warps' programs ptxas would spill to let two in, even where fewer warps' do better without a limit.
    limits = planned.limits_registers or tile.warps == 8
    return replace(planned, programs=tile.programs if device.capability else 1, limits_registers=limits)


def depthwise_blocks(pixels_last):
    """The block sizes of depthwise_kernel: of its channels' weights, a thread loads each once for two pixels; in NCHW a
    warp takes one row of 32 pixels after the other."""
    return {"BLOCK_PIXELS": 256, "BLOCK_CHANNELS": 4} if pixels_last else {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 64}


def depthwise_gradient_blocks(taps, pixels_last, element_size):
    """The block sizes of depthwise_weight_gradient_kernel: for 3 x 3 taps and a bias a thread has 32 sums of 16-bit
    numbers, 16 of float32, and 8 in NCHW, where each number has an address of its own."""
    pixels, channels = (32, 2) if pixels_last else (8 // element_size, 64)
    return {
        "BLOCK_TAPS": min(triton.next_power_of_2(taps), 16), "BLOCK_PIXELS": pixels, "BLOCK_CHANNELS": channels
    }  # fmt: skip


def is_dense(tensor):
    """Whether a 4-D tensor fills its memory, in either memory format."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def vector(channels, *tensors):
    """How many of a group's channels are 16 bytes, if all (N, C, H, W) tensors can be accessed by so many, else 1."""
    elements = 16 // tensors[0].element_size()
    for tensor in tensors:
        strides = [stride for axis, stride in enumerate(tensor.stride()) if axis != 1 and tensor.shape[axis] > 1]
        if tensor.stride(1) != 1 or tensor.data_ptr() % 16 or any(x % elements for x in (channels, *strides)):
            return 1
    return elements


def channels_last(tensor, channels, kind):
    """A tensor as tensor cores are fed best: copied if its channels, a multiple of 16 bytes in a group, lie apart.

    Two passes over memory, where each of the taps would read its elements one by one.
    """
    copy = kind in ("half", "tf32") and channels * tensor.element_size() % 16 == 0 and tensor.stride(1) != 1
    return tensor.contiguous(memory_format=torch.channels_last) if copy else tensor


def check_pixels(*images):
    """Raises where a pixel's number would not fit its 32 bits, a last tile included; channels are counted in 64."""
    for name, shape in images:
        if shape[0] * shape[2] * shape[3] > 2**31 - 1024:
            raise RuntimeError(f"conv: {name} has shape {tuple(shape)}, allowed: at most 2**31 - 1024 pixels")


def as_matrix(images):
    """(N, C, H, W) as a (N * H * W, C) view; None where its strides do not allow one."""
    try:
        return images.permute(0, 2, 3, 1).view(-1, images.shape[1])
    except RuntimeError:
        return None


def _pointwise(weight, stride, padding, groups, input, output):
    """The matrices that input and output are to a convolution which is a matmul, one of 1 x 1 taps; else None."""
    if groups != 1 or weight.shape[2:] != (1, 1) or tuple(stride) != (1, 1) or tuple(padding) != (0, 0):
        return None
    matrices = as_matrix(input), as_matrix(output)
    return None if any(matrix is None for matrix in matrices) else matrices


def _strides(name, tensor):
    return {f"{name}_{axis}_stride": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}


def _geometry(kernel, stride, padding, dilation):
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    found = {f"{name}_{axis}": value for name, pair in pairs.items() for axis, value in zip("hw", pair, strict=True)}
    return {"kernel_height": kernel[0], "kernel_width": kernel[1], **found}


def _residues(stride, dilation, transposed):
    """Along each axis, which taps reach an output, as reach has it."""
    found = {}
    for axis, s, d in zip("hw", stride, dilation, strict=True):
        step = s // math.gcd(s, d) if transposed else 1
        found[f"step_{axis}"] = step
        found[f"inverse_{axis}"] = pow(d * step // s, -1, step) if transposed else 0
    return found


def _magics(height, width):
    (image_magic, image_shift), (row_magic, row_shift) = magic_number(height * width), magic_number(width)
    return {
        "image_magic": image_magic, "image_shift": image_shift, "row_magic": row_magic, "row_shift": row_shift
    }  # fmt: skip


def _accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather_launches(
    input, weight, output, stride, padding, dilation, groups, transposed,
    *, bias=None, preactivation=None, activation=0, parameter=0.0, allow_tf32=False, device=None, tile=None,
):  # fmt: skip
    """The launches of conv_kernel or depthwise_kernel; in the latter's and the former's sense of input and output."""
    check_pixels(("grad_output" if transposed else "input", input.shape), ("its result", output.shape))
    device = device or device_limits(input.device)
    (batch, channels, height, width), (_, results, out_height, out_width) = input.shape, output.shape
    classes = stride[0] * stride[1] if transposed else 1
    positions = batch * math.prod(
        triton.cdiv(size, s if transposed else 1) for size, s in zip(output.shape[2:], stride, strict=True)
    )
    depthwise, kind = groups > 1 and weight.shape[1] == 1, precision(input.dtype, allow_tf32)
    if not depthwise:
        input, weight = channels_last(input, channels // groups, kind), channels_last(weight, weight.shape[1], kind)
    finish = {"bias": bias, "output": output, "preactivation": preactivation}
    common = {
        "batch": batch, "height": height, "width": width, "out_height": out_height, "out_width": out_width,
        **_geometry(weight.shape[2:], stride, padding, dilation), **_residues(stride, dilation, transposed),
        **_strides("input", input), **_strides("output", output),
        "weight_h_stride": weight.stride(2), "weight_w_stride": weight.stride(3),
    }  # fmt: skip
    accumulator = _accumulator(input.dtype)
    constants = {
        "TRANSPOSED": transposed,
        "ACTIVATION": activation,
        "PARAMETER": compiled_parameter(activation, parameter),
        "ACCUMULATOR": tl.float64 if accumulator == torch.float64 else tl.float32,
    }
    if depthwise:
        wide = vector(results, input, output) if channels == results else 1
        blocks = depthwise_blocks(output.stride(1) != 1)
        arguments = {
            "input": input, "weight": weight, **finish, **common, "multiplier": weight.shape[0] // groups,
            "out_channels": results, "weight_out_stride": weight.stride(0),
        }  # fmt: skip
        grid = triton.cdiv(positions, blocks["BLOCK_PIXELS"]), triton.cdiv(results, blocks["BLOCK_CHANNELS"]), classes
        constants |= {"PIXELS_LAST": output.stride(1) != 1, "VECTOR": wide, **blocks}
        planned = Plan(DEPTHWISE_PROGRAMS, access_bytes=16 if wide > 1 else 0)
        return [Launch(depthwise_kernel, grid, arguments, constants, device, DEPTHWISE_WARPS, plan=planned)]

    in_channels, out_channels = channels // groups, results // groups
    wide, out_wide = min(vector(in_channels, input), vector(weight.shape[1], weight)), vector(out_channels, output)
    flat = in_channels < FLAT_CHANNELS
    product = Product(
        positions, out_channels, in_channels, depth_runs=math.prod(weight.shape[2:]), batches=groups * classes
    )
    config = choose_config(product, flat, input.dtype, allow_tf32, wide > 1, False, is_dense(output), device, tile)
    tile, splits = config.tile, config.splits
    target, epilogue = finish, activation
    if splits > 1:
        workspace = torch.empty((splits, output.numel()), dtype=accumulator, device=output.device)
        target, constants["ACTIVATION"] = {"bias": None, "output": workspace, "preactivation": None}, 0
    blocks = triton.cdiv(in_channels * product.depth_runs, tile.depth)
    if not flat:
        blocks = product.depth_runs * triton.cdiv(in_channels, tile.depth)
    out_axis = 1 if transposed else 0
    arguments = {
        "input": input, "weight": weight, **target, **common, "in_channels": in_channels, "out_channels": out_channels,
        "weight_group_stride": weight.shape[0] // groups * weight.stride(0),
        "weight_out_stride": weight.stride(out_axis), "weight_in_stride": weight.stride(1 - out_axis),
        "blocks_per_split": triton.cdiv(blocks, splits), "split_stride": output.numel() if splits > 1 else 0,
    }  # fmt: skip
    constants |= {
        "FLAT": flat, "INPUT_PIXELS_LAST": input.stride(1) != 1, "OUTPUT_PIXELS_LAST": output.stride(1) != 1,
        "VECTOR": wide, "OUT_VECTOR": out_wide, "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth, "PARTS": tile.parts,
    }  # fmt: skip
    tiles = triton.cdiv(positions, tile.rows) * triton.cdiv(out_channels, tile.columns)
    planned = plan(tile, kind, wide > 1 and out_wide > 1, device)
    grid = tiles, groups * classes, splits
    launches = [Launch(conv_kernel, grid, arguments, constants, device, tile.warps, config.stages, planned)]
    if splits > 1:
        # In the order of memory: what lies inside a channel comes before the next one.
        inner = 1 if output.stride(1) == 1 else out_height * out_width
        launches.append(
            combine_launch(
                workspace, splits, output.numel(), results, epilogue, parameter, device, **finish, inner=inner
            )
        )
    return launches


def conv_launches(
    input, weight, bias, output, preactivation, stride, padding, dilation, groups, kind, parameter, **options
):  # fmt: skip
    """The launches of conv, not yet run; options: allow_tf32, device (common.Device), tile."""
    matrices = _pointwise(weight, stride, padding, groups, input, output)
    if matrices and matrices[1].is_contiguous():
        (x, y), z = matrices, None if preactivation is None else as_matrix(preactivation)
        return linear.linear_launches(x, weight[:, :, 0, 0], bias, y, z, kind, parameter, **options)
    return _gather_launches(
        input, weight, output, stride, padding, dilation, groups, False,
        bias=bias, preactivation=preactivation, activation=kind, parameter=parameter, **options,
    )  # fmt: skip


def input_gradient_launches(grad_output, weight, grad_input, stride, padding, dilation, groups, **options):
    """The launches of conv_input_gradient, not yet run; options as of conv_launches."""
    matrices = _pointwise(weight, stride, padding, groups, grad_output, grad_input)
    if matrices and matrices[1].is_contiguous():
        dz, dx = matrices
        return linear.input_gradient_launches(dz, None, weight[:, :, 0, 0], dx, 0, 0.0, **options)
    return _gather_launches(grad_output, weight, grad_input, stride, padding, dilation, groups, True, **options)


def weight_gradient_launches(
    grad_output, input, grad_weight, grad_bias, stride, padding, dilation, groups,
    *, allow_tf32=False, device=None, tile=None,
):  # fmt: skip
    """The launches of conv_weight_gradient, not yet run; options as of conv_launches."""
    check_pixels(("grad_output", grad_output.shape))
    device = device or device_limits(grad_output.device)
    batch, results, out_height, out_width = grad_output.shape
    if grad_weight is not None:
        matrices = _pointwise(grad_weight, stride, padding, groups, grad_output, input)
        if matrices and grad_weight.is_contiguous():
            dz, x = matrices
            options = {"allow_tf32": allow_tf32, "device": device, "tile": tile}
            return linear.weight_gradient_launches(dz, None, x, grad_weight[:, :, 0, 0], grad_bias, 0, 0.0, **options)
    else:  # the bias's gradient alone, of one group
        groups, stride, padding, dilation = 1, (1, 1), (0, 0), (1, 1)
    kernel, in_channels = ((1, 1), 1) if grad_weight is None else (grad_weight.shape[2:], grad_weight.shape[1])
    out_channels, pixels = results // groups, batch * out_height * out_width
    accumulator, kind = _accumulator(grad_output.dtype), precision(grad_output.dtype, allow_tf32)
    depthwise = grad_weight is not None and groups > 1 and in_channels == 1
    if not depthwise:
        grad_output = channels_last(grad_output, out_channels, kind)
        input = None if grad_weight is None else channels_last(input, in_channels, kind)
    seen = grad_output if grad_weight is None else input  # for its strides
    pixels_last = seen.stride(1) != 1
    arguments = {
        "grad_output": grad_output, "input": input, "batch": batch, "height": seen.shape[2], "width": seen.shape[3],
        "out_height": out_height, "out_width": out_width, **_geometry(kernel, stride, padding, dilation),
        **_strides("grad", grad_output), **_strides("input", seen), **_magics(out_height, out_width),
    }  # fmt: skip
    strides = (0, 0, 0, 0) if grad_weight is None else grad_weight.stride()
    arguments |= {
        f"weight_{axis}_stride": stride for axis, stride in zip(("out", "in", "h", "w"), strides, strict=True)
    }
    constants = {"VECTOR": 1, "ACCUMULATOR": tl.float64 if accumulator == torch.float64 else tl.float32}
    if depthwise:
        taps = math.prod(kernel) + (grad_bias is not None)
        blocks = depthwise_gradient_blocks(taps, pixels_last, grad_output.element_size())
        tiles = triton.cdiv(taps, blocks["BLOCK_TAPS"]), triton.cdiv(results, blocks["BLOCK_CHANNELS"])
        pixel_blocks = triton.cdiv(pixels, blocks["BLOCK_PIXELS"])
        wanted = triton.cdiv(device.multiprocessors * DEPTHWISE_PROGRAMS, math.prod(tiles))
        per_split = max(triton.cdiv(pixel_blocks, wanted), DEPTHWISE_LEAST_BLOCKS)
        splits = triton.cdiv(pixel_blocks, per_split)
        del arguments["weight_in_stride"]
        arguments |= {"multiplier": out_channels, "out_channels": results}
        if out_channels == 1 and not pixels_last:
            constants["VECTOR"] = vector(results, grad_output, input)
        constants |= {"PIXELS_LAST": pixels_last, **blocks}
        launch = depthwise_weight_gradient_kernel, (*tiles, splits)
        options = {"warps": DEPTHWISE_WARPS, "plan": Plan(DEPTHWISE_PROGRAMS)}
        names = "grad_weight", "grad_bias"
    else:
        flat = in_channels <= FLAT_COLUMNS
        wide, grad_wide = vector(in_channels, seen), vector(out_channels, grad_output)
        product = Product(out_channels, in_channels, pixels, column_runs=math.prod(kernel), batches=groups)
        all_wide, sums = min(wide, grad_wide) > 1, grad_bias is not None
        config = choose_config(product, flat, grad_output.dtype, allow_tf32, all_wide, sums, True, device, tile)
        tile, splits = config.tile, config.splits
        product = product.flattened() if flat else product
        tiles = triton.cdiv(out_channels, tile.rows) * product.column_runs * triton.cdiv(product.columns, tile.columns)
        per_split = triton.cdiv(triton.cdiv(pixels, tile.depth), splits)
        arguments |= {
            "weight_group_stride": out_channels * strides[0], "in_channels": in_channels, "out_channels": out_channels
        }  # fmt: skip
        constants |= {
            "FLAT": flat, "INPUT_PIXELS_LAST": pixels_last, "VECTOR": wide, "GRAD_VECTOR": grad_wide,
            "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
            "BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth,
        }  # fmt: skip
        launch = weight_gradient_kernel, (tiles, groups, splits)
        # In tf32 matrix instructions want operands contiguous in pixels: these are transposed while they are loaded.
        loads_wide = all_wide and strides[1] == 1 and kind != "tf32"
        planned = plan(tile, kind, loads_wide, device) if grad_weight is not None else Plan()
        options = {"warps": tile.warps, "stages": config.stages, "plan": planned}
        names = "grad_weight", "row_sums"

    gradients = [(name, each) for name, each in zip(names, (grad_weight, grad_bias), strict=True)]
    targets, combined = dict(gradients), []
    if splits > 1:
        for name, gradient in gradients:
            if gradient is not None:
                count = gradient.numel()
                targets[name] = torch.empty((splits, count), dtype=accumulator, device=gradient.device)
                combine = combine_launch(targets[name], splits, count, count, 0, 0.0, device, None, gradient, None)
                combined.append(combine)
    arguments |= targets | {
        "blocks_per_split": per_split,
        "split_stride": 0 if grad_weight is None else grad_weight.numel(),
        "sums_stride": results,
    }
    return [Launch(*launch, arguments, constants, device, **options), *combined]


def conv(input, weight, bias, output, preactivation, stride, padding, dilation, groups, kind, parameter, *, allow_tf32):
    """output = act(conv2d(input, weight) + bias), and the pre-activation where a tensor for it is given.

    Shapes: input (N, C, H, W) and weight (K, C / groups, R, S) of any strides, bias (K,) contiguous or None, output and
    preactivation (N, K, P, Q), of equal strides; all of one dtype: float32, bfloat16, float16 or float64. None is
    empty, and N * P * Q < 2**31. stride, padding and dilation are pairs.
    """
    for launch in conv_launches(
        input, weight, bias, output, preactivation, stride, padding, dilation, groups, kind, parameter,
        allow_tf32=allow_tf32,
    ):  # fmt: skip
        launch.run()


def conv_input_gradient(grad_output, weight, grad_input, stride, padding, dilation, groups, *, allow_tf32):
    """grad_input (N, C, H, W) of conv from its pre-activation's gradient, grad_output (N, K, P, Q), any strides."""
    for launch in input_gradient_launches(
        grad_output, weight, grad_input, stride, padding, dilation, groups, allow_tf32=allow_tf32
    ):
        launch.run()


def conv_weight_gradient(
    grad_output, input, grad_weight, grad_bias, stride, padding, dilation, groups, *, allow_tf32
):  # fmt: skip
    """grad_weight (K, C / groups, R, S), dense, and grad_bias (K,) of conv, from the pre-activation's gradient.

    Either may be None, and is then not computed. Shapes: grad_output (N, K, P, Q) and input (N, C, H, W), any strides.
    The same in every run: splits of the pixels are added in order, without atomics.
    """
    for launch in weight_gradient_launches(
        grad_output, input, grad_weight, grad_bias, stride, padding, dilation, groups, allow_tf32=allow_tf32
    ):
        launch.run()


DIRECTIONS = "forward", "input gradient", "weight gradient", "plain weight gradient"


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: the largest tile in each direction,
    dtype and way to load; with every all tiles and more dtypes."""
    launches = {}

    def add(name, direction, dtype, allow_tf32=False, **example):
        name = f"{direction} {'tf32' if allow_tf32 else str(dtype).removeprefix('torch.')} {name}"
        found = _example(direction, dtype, allow_tf32=allow_tf32, device=device, **example)
        for position, launch in enumerate(found):
            launches[f"{name} {position}" if len(found) > 1 else name] = launch

    for direction in DIRECTIONS:
        sums = direction == "weight gradient"
        for dtype, allow_tf32 in (
            (torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False),
            (torch.float64, False),
        ):  # fmt: skip
            for layout in ("channels last", "contiguous"):
                copied = layout == "contiguous" and precision(dtype, allow_tf32) in ("half", "tf32")
                tiles = usable_tiles(dtype, allow_tf32, copied or layout == "channels last", sums, device)
                # float16's code is bfloat16's but for the conversions, and a copy's differs in the stores.
                for tile in tiles[:1] if copied or not every or dtype == torch.float16 else tiles:
                    name = f"{layout} {tile.rows}x{tile.columns}x{tile.depth} by {tile.warps} warps"
                    add(name, direction, dtype, allow_tf32, layout=layout, tile=tile)
    for direction in DIRECTIONS if every else DIRECTIONS[:3]:
        for dtype in (torch.bfloat16, torch.float32) if every else (torch.bfloat16,):
            for layout in ("channels last", "contiguous"):
                add(f"depthwise {layout}", direction, dtype, layout=layout, groups=256)
                add(f"rgb {layout}", direction, dtype, layout=layout, channels=3, stride=2)
            add("strided", direction, dtype, stride=2)
            add("few pixels", direction, dtype, batch=1, size=7)
    return launches


def _example(direction, dtype, layout="channels last", channels=256, groups=1, stride=1, batch=32, size=56, **options):
    """The launches of a 3 x 3 convolution with a tile (None: the chosen one) and the longest activation."""
    memory_format = torch.channels_last if layout == "channels last" else torch.contiguous_format

    def images(*shape):
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    results = 256
    input, weight = images(batch, channels, size, size), images(results, channels // groups, 3, 3)
    output = images(batch, results, (size - 1) // stride + 1, (size - 1) // stride + 1)
    bias = torch.empty(results, dtype=dtype, device="meta")
    geometry = (stride, stride), (1, 1), (1, 1), groups
    if direction == "forward":
        return conv_launches(input, weight, bias, output, output, *geometry, TANH.value, 0.0, **options)
    if direction == "input gradient":
        return input_gradient_launches(output, weight, input, *geometry, **options)
    grad_bias = bias if direction == "weight gradient" else None
    return weight_gradient_launches(output, input, weight, grad_bias, *geometry, **options)
