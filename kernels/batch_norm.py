"""Batch normalisation of arrays (outer, channels, inner): NCHW, and channels_last with inner 1.

Training is three passes over memory forward (the input for its statistics, and again; the output) and five backward;
two and three where a program holds its channels whole. An array is seen as blocks of tiles in one of two ways: by
planes, where a block is one channel's (outer, inner), or by columns, where all channels' inner values lie side by side
and a block is a strip of them. In both, rows are channels * inner elements apart. Values for each channel of a tile
have the shape (1, 1) by planes and (1, COLUMNS) by columns. weight, bias and all else by channel are float32, float64
for float64.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .activation import ELU, NONE, SIGMOID, TANH, activation_gradient, apply_activation, compiled_parameter
from .common import Launch, Plan, device_limits

# ------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def inverse_deviation(variance, EPS: tl.constexpr):
    """1 / sqrt(variance + EPS), every step rounded correctly: who takes it again finds the same."""
    if variance.dtype == tl.float64:
        result = 1 / tl.sqrt(variance + EPS)
    else:
        result = tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
    return result


@triton.jit
def tile_at(step, block, rows, columns, row_stride, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and mask of tile number `step` of a block, whose tiles go along its columns, then down its rows."""
    column = tl.arange(0, COLUMNS)
    if PLANES:
        steps = tl.cdiv(columns, COLUMNS)
        row = (step // steps) * ROWS + tl.arange(0, ROWS)
        column += (step % steps) * COLUMNS
        start = block * columns
        mask = (row < rows)[:, None] & (column < columns)[None, :]
    else:
        row = step * ROWS + tl.arange(0, ROWS)
        start = block * COLUMNS
        mask = (row < rows)[:, None] & (start + column < columns)[None, :]
    return (start + row.to(tl.int64) * row_stride)[:, None] + column[None, :], mask


@triton.jit
def block_size(first, last, rows, columns, PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many values of a channel (of a column) the tiles `first` to `last` of a block hold."""
    if PLANES:
        size = first * 0
        steps = tl.cdiv(columns, COLUMNS)
        for step in range(first, last):
            height = tl.minimum(rows - (step // steps) * ROWS, ROWS)
            size += height * tl.minimum(columns - (step % steps) * COLUMNS, COLUMNS)
    else:
        size = tl.minimum(last * ROWS, rows) - first * ROWS
    return size


@triton.jit
def channels_of(block, columns, spread, channels, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """A block's positions in partial results, whether they are inside, and their channels (0 outside)."""
    if PLANES:
        position = tl.full((1, 1), 0, tl.int64) + block
        inside = position < channels
        channel = position
    else:
        position = (block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
        inside = position < columns
        channel = tl.where(inside, position // spread, 0)
    return position, inside, channel


@triton.jit
def sum_of(tile, PLANES: tl.constexpr):
    """The sums of a tile for each of its channels or columns."""
    result = tl.sum(tile, 0, keep_dims=True)
    if PLANES:
        result = tl.sum(result, 1, keep_dims=True)
    return result


@triton.jit
def finite(value):
    """The value, or 0 for infinity and NaN: subtracted, they would hide what they are."""
    return tl.where(value - value == 0, value, 0.0)


@triton.jit
def origin_of(input, channel, channel_stride, middle, last, COMPUTE: tl.constexpr):
    """What is subtracted from a channel's values, so that their mean is rounded only once: the middle of three of them,
    which no outlier is."""
    first = input + channel * channel_stride
    a, b, c = tl.load(first).to(COMPUTE), tl.load(first + middle).to(COMPUTE), tl.load(first + last).to(COMPUTE)
    return finite(tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c)))


@triton.jit
def affine_of(weight, bias, mean, rstd, channel):
    """scale and shift of z = (x - mean) * scale + shift."""
    scale, shift = rstd, mean * 0
    if weight is not None:
        scale = rstd * tl.load(weight + channel)
    if bias is not None:
        shift = tl.load(bias + channel)
    return scale, shift


@triton.jit
def normalise(
    x, residual, output, offsets, mask, mean, scale, shift, KIND: tl.constexpr, PARAMETER: tl.constexpr
):  # fmt: skip
    """Stores activation(z + residual) of a tile."""
    z = tl.fma(x - mean, scale, shift)
    if residual is not None:
        z += tl.load(residual + offsets, mask=mask, other=0.0).to(z.dtype)
    tl.store(output + offsets, apply_activation(z, KIND, PARAMETER).to(output.dtype.element_ty), mask=mask)


@triton.jit
def gradient_at(
    grad_output, input, saved, offsets, mask, mean, scale, shift,
    KIND: tl.constexpr, PARAMETER: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """A tile's dz = grad_output * activation'(z), and x - mean; both 0 outside.

    z is made again of input and residual (saved), exactly as in the forward, if it is not told by the output (saved).
    """
    centred = tl.where(mask, tl.load(input + offsets, mask=mask, other=0.0).to(mean.dtype) - mean, 0.0)
    grad = tl.load(grad_output + offsets, mask=mask, other=0.0).to(mean.dtype)
    if KIND == NONE:
        dz = grad
    else:
        if FROM_OUTPUT:
            made_of = tl.load(saved + offsets, mask=mask, other=0.0).to(mean.dtype)
        else:
            made_of = tl.fma(centred, scale, shift)
            if saved is not None:
                made_of += tl.load(saved + offsets, mask=mask, other=0.0).to(mean.dtype)
            if (KIND == ELU) | (KIND == SIGMOID) | (KIND == TANH):
                made_of = apply_activation(made_of, KIND, PARAMETER)
        dz = tl.where(mask, activation_gradient(grad, made_of, KIND, PARAMETER), 0.0)
    return dz, centred


@triton.jit
def store_input_gradient(grad_input, dz, centred, offsets, mask, scale, rstd, mean_gradient, mean_product):
    """grad_input = scale * (dz - mean_gradient - (x - mean) * rstd * mean_product)."""
    grad = tl.fma(dz, scale, tl.fma(centred, -scale * rstd * mean_product, -scale * mean_gradient))
    tl.store(grad_input + offsets, grad.to(grad_input.dtype.element_ty), mask=mask)


@triton.jit
def partial_at(index, channel, parts, width, spread):
    """Offsets of a channel's partial results number `index`, of parts * spread."""
    return (index // spread).to(tl.int64) * width + channel * spread + index % spread


@triton.jit
def merge_moments(partial, channel, parts, width, spread, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """A channel's count, mean and sum of squares from partial (3, parts, width): means, sums of squares, counts."""
    number, plane = parts * spread, parts * width.to(tl.int64)
    count, mean, squares = tl.zeros((), COMPUTE), tl.zeros((), COMPUTE), tl.zeros((), COMPUTE)
    for start in range(0, number, BLOCK):
        index = start + tl.arange(0, BLOCK)
        source = partial + partial_at(index, channel, parts, width, spread)
        counts = tl.load(source + 2 * plane, mask=index < number, other=0.0)
        count += tl.sum(counts)
        mean += tl.sum(counts * tl.load(source, mask=index < number, other=0.0))
    mean /= count
    for start in range(0, number, BLOCK):
        index = start + tl.arange(0, BLOCK)
        source = partial + partial_at(index, channel, parts, width, spread)
        difference = tl.load(source, mask=index < number, other=0.0) - mean
        counts = tl.load(source + 2 * plane, mask=index < number, other=0.0)
        squares += tl.sum(tl.load(source + plane, mask=index < number, other=0.0) + counts * difference * difference)
    return count, mean, squares


@triton.jit
def merge_sums(partial, channel, parts, width, spread, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """A channel's sums of dz and of dz * (x - mean) from partial (2, parts, width)."""
    number, plane = parts * spread, parts * width.to(tl.int64)
    gradient, product = tl.zeros((), COMPUTE), tl.zeros((), COMPUTE)
    for start in range(0, number, BLOCK):
        index = start + tl.arange(0, BLOCK)
        source = partial + partial_at(index, channel, parts, width, spread)
        gradient += tl.sum(tl.load(source, mask=index < number, other=0.0))
        product += tl.sum(tl.load(source + plane, mask=index < number, other=0.0))
    return gradient, product


@triton.jit
def store_statistics(mean, rstd, variance, channel, inside, new_mean, squares, count, EPS: tl.constexpr):
    """Stores a channel's statistics, the unbiased variance among them; for rstd None the sum of squares. Gives rstd."""
    tl.store(mean + channel, new_mean, mask=inside)
    if rstd is None:
        result = squares
        tl.store(variance + channel, squares, mask=inside)
    else:
        result = inverse_deviation(squares / count, EPS)
        tl.store(rstd + channel, result, mask=inside)
        tl.store(variance + channel, squares / (count - 1), mask=inside)
    return result


@triton.jit
def store_totals(grad_weight, grad_bias, channel, inside, gradient, product):
    """Stores a channel's gradients, where they are asked for."""
    if grad_weight is not None:
        tl.store(grad_weight + channel, product, mask=inside)
    if grad_bias is not None:
        tl.store(grad_bias + channel, gradient, mask=inside)


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def statistics_kernel(
    input, partial, rows, columns, channels, width, row_stride, spread, channel_stride, middle, last, steps, part_steps,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial (3, parts, width): of each channel or column the mean less its origin, sum of squares and count.

    Launches a 2D grid where program (b, p) takes the tiles p * part_steps to (p + 1) * part_steps of block b. It sums
    differences from the mean of its first tile: no value can be so far from that, that squares cancel.
    """
    COMPUTE: tl.constexpr = partial.dtype.element_ty
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, inside, channel = channels_of(block, columns, spread, channels, PLANES, COLUMNS)
    origin = origin_of(input, channel, channel_stride, middle, last, COMPUTE)
    first = part * part_steps
    last = tl.minimum(first + part_steps, steps)
    offsets, mask = tile_at(first, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
    x = tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
    size = block_size(first, first + 1, rows, columns, PLANES, ROWS, COLUMNS)
    shift = finite(sum_of(tl.where(mask, x - origin, 0.0), PLANES) / size)
    sums, squares = tl.zeros((ROWS, COLUMNS), COMPUTE), tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(first, last):
        offsets, mask = tile_at(step, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
        x = tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
        difference = tl.where(mask, (x - origin) - shift, 0.0)
        sums += difference
        squares += difference * difference
    count = block_size(first, last, rows, columns, PLANES, ROWS, COLUMNS)
    total = sum_of(sums, PLANES)
    remainder = total / count
    moment = sum_of(squares, PLANES) - total * remainder
    target = partial + part.to(tl.int64) * width + position
    plane = tl.num_programs(1).to(tl.int64) * width
    tl.store(target, shift + remainder, mask=inside)
    tl.store(target + plane, tl.where(moment < 0, 0.0, moment), mask=inside)
    tl.store(target + 2 * plane, position * 0 + count, mask=inside)


@triton.jit
def finish_statistics_kernel(
    input, partial, mean, rstd, variance, parts, width, spread, channel_stride, middle, last,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean, rstd and unbiased variance (channels,) from partial; or mean and, in variance, the sum of squares.

    Launches a 1D grid with a program for each channel.
    """
    channel = tl.program_id(0).to(tl.int64)
    count, shifted, squares = merge_moments(partial, channel, parts, width, spread, mean.dtype.element_ty, BLOCK)
    origin = origin_of(input, channel, channel_stride, middle, last, mean.dtype.element_ty)
    store_statistics(mean, rstd, variance, channel, None, shifted + origin, squares, count, EPS)


@triton.jit
def normalise_kernel(
    input, weight, bias, residual, output, mean, rstd, variance, partial,
    rows, columns, channels, width, row_stride, spread, channel_stride, middle, last, parts, steps, part_steps,
    EPS: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """output = activation((input - mean) * rstd * weight + bias + residual).

    mean, rstd and variance are results if partial is given (by planes), else read: rstd or, if that is None, variance.
    Launches a 2D grid as statistics_kernel, in reverse: what that read last is in the cache still.
    """
    COMPUTE: tl.constexpr = mean.dtype.element_ty
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    _, inside, channel = channels_of(block, columns, spread, channels, PLANES, COLUMNS)
    if partial is not None:
        count, shifted, squares = merge_moments(partial, block, parts, width, spread, COMPUTE, BLOCK)
        own_mean = shifted + origin_of(input, channel, channel_stride, middle, last, COMPUTE)
        own_rstd = store_statistics(
            mean, rstd, variance, channel, inside & (part == 0), own_mean, squares, count, EPS
        )  # fmt: skip
    else:
        own_mean = tl.load(mean + channel)
        own_rstd = tl.load(rstd + channel) if rstd is not None else inverse_deviation(tl.load(variance + channel), EPS)
    scale, shift = affine_of(weight, bias, own_mean, own_rstd, channel)
    for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, steps)):
        offsets, mask = tile_at(step, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
        x = tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
        normalise(x, residual, output, offsets, mask, own_mean, scale, shift, KIND, PARAMETER)


@triton.jit
def whole_kernel(
    input, weight, bias, residual, output, mean, rstd, variance,
    rows, columns, channels, row_stride, channel_stride, middle, last,
    EPS: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The forward where a block is one tile. Launches a 1D grid with a program for each block."""
    COMPUTE: tl.constexpr = mean.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    _, inside, channel = channels_of(block, columns, 1, channels, PLANES, COLUMNS)
    offsets, mask = tile_at(0, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
    x = tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
    count = block_size(0, 1, rows, columns, PLANES, ROWS, COLUMNS)
    origin = origin_of(input, channel, channel_stride, middle, last, COMPUTE)
    shifted = sum_of(tl.where(mask, x - origin, 0.0), PLANES) / count
    difference = tl.where(mask, (x - origin) - shifted, 0.0)
    squares = sum_of(difference * difference, PLANES)
    own_mean = shifted + origin
    own_rstd = store_statistics(mean, rstd, variance, channel, inside, own_mean, squares, count, EPS)
    scale, shift = affine_of(weight, bias, own_mean, own_rstd, channel)
    normalise(x, residual, output, offsets, mask, own_mean, scale, shift, KIND, PARAMETER)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def sums_kernel(
    grad_output, input, saved, weight, bias, mean, rstd, grad_input, grad_residual, partial,
    rows, columns, channels, width, row_stride, spread, steps, part_steps,
    KIND: tl.constexpr, PARAMETER: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial (2, parts, width): of each channel or column the sums of dz and dz * (x - mean); and what needs no sums:
    grad_residual = dz, and grad_input where the statistics are constants. Each result may be None.

    Launches a 2D grid as statistics_kernel.
    """
    COMPUTE: tl.constexpr = mean.dtype.element_ty
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, inside, channel = channels_of(block, columns, spread, channels, PLANES, COLUMNS)
    own_mean, own_rstd = tl.load(mean + channel), tl.load(rstd + channel)
    scale, shift = affine_of(weight, bias, own_mean, own_rstd, channel)
    gradient, product = tl.zeros((ROWS, COLUMNS), COMPUTE), tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, steps)):
        offsets, mask = tile_at(step, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
        dz, centred = gradient_at(
            grad_output, input, saved, offsets, mask, own_mean, scale, shift, KIND, PARAMETER, FROM_OUTPUT
        )
        if partial is not None:
            gradient += dz
            product += dz * centred
        if grad_residual is not None:
            tl.store(grad_residual + offsets, dz.to(grad_residual.dtype.element_ty), mask=mask)
        if grad_input is not None:
            tl.store(grad_input + offsets, (dz * scale).to(grad_input.dtype.element_ty), mask=mask)
    if partial is not None:
        target = partial + part.to(tl.int64) * width + position
        tl.store(target, sum_of(gradient, PLANES), mask=inside)
        tl.store(target + tl.num_programs(1).to(tl.int64) * width, sum_of(product, PLANES), mask=inside)


@triton.jit
def finish_sums_kernel(
    partial, rstd, grad_weight, grad_bias, mean_gradient, mean_product, parts, width, spread, count, BLOCK: tl.constexpr
):
    """The gradients of weight and bias from partial, and the means over a channel of dz, and of dz times the normalised
    input; each (channels,) or None. Launches a 1D grid with a program for each channel."""
    channel = tl.program_id(0).to(tl.int64)
    gradient, product = merge_sums(partial, channel, parts, width, spread, rstd.dtype.element_ty, BLOCK)
    product *= tl.load(rstd + channel)
    store_totals(grad_weight, grad_bias, channel, None, gradient, product)
    store_totals(mean_product, mean_gradient, channel, None, gradient / count, product / count)


@triton.jit
def input_gradient_kernel(
    grad_output, input, saved, weight, bias, mean, rstd, grad_input, grad_weight, grad_bias,
    mean_gradient, mean_product, partial,
    rows, columns, channels, width, row_stride, spread, count, parts, steps, part_steps,
    KIND: tl.constexpr, PARAMETER: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_input = rstd * weight * (dz - mean_gradient - (input - mean) * rstd * mean_product).

    If partial is given (by planes) the means, grad_weight and grad_bias are made of it. Launches a 2D grid as
    normalise_kernel.
    """
    COMPUTE: tl.constexpr = mean.dtype.element_ty
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    _, inside, channel = channels_of(block, columns, spread, channels, PLANES, COLUMNS)
    own_mean, own_rstd = tl.load(mean + channel), tl.load(rstd + channel)
    scale, shift = affine_of(weight, bias, own_mean, own_rstd, channel)
    if partial is not None:
        gradient, product = merge_sums(partial, block, parts, width, spread, COMPUTE, BLOCK)
        product = product * own_rstd
        store_totals(grad_weight, grad_bias, channel, inside & (part == 0), gradient, product)
        own_gradient, own_product = gradient / count, product / count
    else:
        own_gradient, own_product = tl.load(mean_gradient + channel), tl.load(mean_product + channel)
    for step in range(part * part_steps, tl.minimum((part + 1) * part_steps, steps)):
        offsets, mask = tile_at(step, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
        dz, centred = gradient_at(
            grad_output, input, saved, offsets, mask, own_mean, scale, shift, KIND, PARAMETER, FROM_OUTPUT
        )
        store_input_gradient(grad_input, dz, centred, offsets, mask, scale, own_rstd, own_gradient, own_product)


@triton.jit
def whole_backward_kernel(
    grad_output, input, saved, weight, bias, mean, rstd, grad_input, grad_weight, grad_bias, grad_residual,
    rows, columns, channels, row_stride, count,
    KIND: tl.constexpr, PARAMETER: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The backward in training where a block is one tile. Launches a 1D grid with a program for each block."""
    block = tl.program_id(0).to(tl.int64)
    _, inside, channel = channels_of(block, columns, 1, channels, PLANES, COLUMNS)
    own_mean, own_rstd = tl.load(mean + channel), tl.load(rstd + channel)
    scale, shift = affine_of(weight, bias, own_mean, own_rstd, channel)
    offsets, mask = tile_at(0, block, rows, columns, row_stride, PLANES, ROWS, COLUMNS)
    dz, centred = gradient_at(
        grad_output, input, saved, offsets, mask, own_mean, scale, shift, KIND, PARAMETER, FROM_OUTPUT
    )
    if grad_residual is not None:
        tl.store(grad_residual + offsets, dz.to(grad_residual.dtype.element_ty), mask=mask)
    gradient, product = sum_of(dz, PLANES), sum_of(dz * centred, PLANES) * own_rstd
    store_totals(grad_weight, grad_bias, channel, inside, gradient, product)
    store_input_gradient(
        grad_input, dz, centred, offsets, mask, scale, own_rstd, gradient / count, product / count
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- block sizes

WARPS = 4
WHOLE_WARPS = 8
# Elements of a tile by element size: two 16-byte accesses a thread for each operand, four of float32. Sums of a tile
# take two registers an element.
TILE = {2: 2048, 4: 2048, 8: 1024}
# Of a tile that stays in registers, for each operand.
WHOLE_TILE = {2: 8192, 4: 8192, 8: 2048}
# That a multiprocessor holds: each thread has 64 or 96 bytes in flight, so these are more than memory's latency asks.
WARPS_AT_ONCE = 16
# In all, for each multiprocessor: so many that the last wave does not count.
PROGRAMS = 32
# A reduction's program takes at least so many tiles, since it ends with work of its own.
LEAST_STEPS = 2
PARTIAL_BLOCK = 256


@dataclass(frozen=True)
class View:
    """How an array is seen: see the module. Blocks of `steps` tiles of tile_rows x tile_columns."""

    planes: bool
    rows: int
    columns: int  # of a plane, or of all
    channels: int
    row_stride: int
    spread: int  # columns of a channel that have partial results of their own
    channel_stride: int  # elements from a channel's first one to the next channel's, and to two others
    middle: int
    last: int
    tile_rows: int
    tile_columns: int
    whole: bool  # a block is one tile

    @property
    def width(self):
        """Partial results of each part."""
        return self.channels if self.planes else self.columns

    @property
    def blocks(self):
        return self.channels if self.planes else triton.cdiv(self.columns, self.tile_columns)

    @property
    def steps(self):
        across = triton.cdiv(self.columns, self.tile_columns) if self.planes else 1
        return triton.cdiv(self.rows, self.tile_rows) * across


def _power_of_two(number):
    return triton.next_power_of_2(max(number, 1))


def plane_tile(rows, columns, elements):
    """(rows, columns) of the tile of so many elements by which a plane is covered with the least waste."""

    def covered(width):
        height = elements // width
        return triton.cdiv(rows, height) * height * triton.cdiv(columns, width) * width

    widths = [2**power for power in range(elements.bit_length()) if 2**power >= min(64, elements)]
    width = min(reversed(widths), key=covered)
    return elements // width, width


@functools.lru_cache(maxsize=4096)
def choose_view(outer, channels, inner, element_size, operands):
    """The view of an array of elements of so many bytes; operands: arrays that are read at once.

    Triton proves 16-byte accesses of numbers that 16 divides. Where it does not divide inner, as in 7 x 7 planes, all
    planes side by side are columns, unless so few rows share a column that partial results would cost more.
    """
    if channels == 1:
        inner, outer = inner * outer, 1
    odd = inner % 16 != 0 and channels * inner % 16 == 0
    elements, whole = TILE[element_size], WHOLE_TILE[element_size] // operands

    def view(planes, tile_rows, tile_columns, is_whole):
        columns, stride = inner if planes else channels * inner, channels * inner
        origin = inner, outer // 2 * stride + inner // 2, (outer - 1) * stride + inner - 1
        spread = 1 if planes else inner
        return View(planes, outer, columns, channels, stride, spread, *origin, tile_rows, tile_columns, is_whole)

    if inner == 1:
        rows = _power_of_two(outer)
        if rows * 16 <= whole:  # 16 columns: 32 bytes side by side at least
            return view(False, rows, min(_power_of_two(channels), max(16, 1024 // rows)), True)
    else:
        rows, columns = _power_of_two(outer), _power_of_two(inner)
        if rows * columns <= whole:
            return view(True, rows, columns, True)
        if not odd or outer < 8:
            return view(True, *plane_tile(outer, inner, elements), False)
    # 128 bytes side by side of 16 bits, or more where there are few rows.
    columns = min(_power_of_two(channels * inner), max(64, elements // _power_of_two(outer)))
    return view(False, elements // columns, columns, False)


def partition(view, least, device):
    """(parts, steps of a part) of a view's blocks, to fill the device; a part has `least` steps or more."""
    wanted = triton.cdiv(PROGRAMS * device.multiprocessors, view.blocks)
    parts = max(min(wanted, view.steps // least, 65535), 1)
    part_steps = triton.cdiv(view.steps, parts)
    return triton.cdiv(view.steps, part_steps), part_steps


# ----------------------------------------------------------------------------------------------------------- launches


ORIGIN = ("channel_stride", "middle", "last")


def _view_of(shape, tensor, operands):
    return choose_view(*shape, tensor.element_size(), operands)


def _sizes(view, *names):
    """The kernels' arguments of these names; and the tile's constants."""
    values = {name: getattr(view, name) for name in ("rows", "columns", "channels", "row_stride", *names)}
    return values, {"PLANES": view.planes, "ROWS": view.tile_rows, "COLUMNS": view.tile_columns}


def _is_wide(view, *tensors):
    """Whether all accesses are of 16 bytes."""
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return aligned and view.columns % 16 == 0 and view.row_stride % 16 == 0


def _launch(kernel, grid, arguments, constants, device, view, *tensors):
    warps = WHOLE_WARPS if view.whole else WARPS
    access = 16 if tensors and not view.whole and _is_wide(view, *tensors) else 0
    plan = Plan(WARPS_AT_ONCE // warps, access_bytes=access)
    return Launch(kernel, grid, arguments, constants, device, warps, plan=plan)


def _reduction(view, like, numbers, device):
    """The parts of a reduction, and room for their results."""
    parts, part_steps = partition(view, LEAST_STEPS, device)
    return parts, part_steps, torch.empty((numbers, parts, view.width), dtype=like.dtype, device=like.device)


def _finish(kernel, view, parts, arguments, constants, device):
    arguments = arguments | {"parts": parts, "width": view.width, "spread": view.spread}
    return Launch(kernel, (view.channels,), arguments, constants | {"BLOCK": PARTIAL_BLOCK}, device, WARPS)


def statistics_launches(shape, input, mean, rstd, variance, eps, device=None, view=None, merged=True):
    """The launches of batch_norm_statistics, or what comes before normalise_kernel; and partial, parts."""
    device = device or device_limits(input.device)
    view = view or _view_of(shape, input, 1)
    parts, part_steps, partial = _reduction(view, mean, 3, device)
    sizes, constants = _sizes(view, "width", "spread", *ORIGIN, "steps")
    arguments = {"input": input, "partial": partial, **sizes, "part_steps": part_steps}
    launches = [_launch(statistics_kernel, (view.blocks, parts), arguments, constants, device, view)]
    if merged:
        arguments = {"input": input, "partial": partial, "mean": mean, "rstd": rstd, "variance": variance}
        arguments |= {name: getattr(view, name) for name in ORIGIN}
        launches.append(_finish(finish_statistics_kernel, view, parts, arguments, {"EPS": eps}, device))
    return launches, partial, parts


def normalise_launch(
    shape, input, weight, bias, residual, output, mean, rstd, variance, eps, kind, parameter,
    *, device, view, partial=None, partial_parts=1,
):  # fmt: skip
    """The launch of normalise_kernel."""
    parts, part_steps = partition(view, 1, device)
    sizes, constants = _sizes(view, "width", "spread", *ORIGIN, "steps")
    arguments = {
        "input": input, "weight": weight, "bias": bias, "residual": residual, "output": output,
        "mean": mean, "rstd": rstd, "variance": variance, "partial": partial,
        **sizes, "parts": partial_parts, "part_steps": part_steps,
    }  # fmt: skip
    constants |= {"EPS": eps, "KIND": kind, "PARAMETER": compiled_parameter(kind, parameter), "BLOCK": PARTIAL_BLOCK}
    tensors = (input, residual, output)
    return _launch(normalise_kernel, (view.blocks, parts), arguments, constants, device, view, *tensors)


def forward_launches(
    shape, input, weight, bias, residual, output, mean, rstd, variance, eps, kind, parameter, device=None
):
    """The launches of batch_norm, not yet run."""
    device = device or device_limits(input.device)
    view = _view_of(shape, input, 1)
    if view.whole:
        sizes, constants = _sizes(view, *ORIGIN)
        arguments = {
            "input": input, "weight": weight, "bias": bias, "residual": residual, "output": output,
            "mean": mean, "rstd": rstd, "variance": variance, **sizes,
        }  # fmt: skip
        constants |= {"EPS": eps, "KIND": kind, "PARAMETER": compiled_parameter(kind, parameter)}
        return [_launch(whole_kernel, (view.blocks,), arguments, constants, device, view)]
    launches, partial, parts = statistics_launches(
        shape, input, mean, rstd, variance, eps, device, view, merged=not view.planes
    )
    own = {"partial": partial, "partial_parts": parts} if view.planes else {}
    arguments = (input, weight, bias, residual, output, mean, rstd, variance, eps, kind, parameter)
    return [*launches, normalise_launch(shape, *arguments, device=device, view=view, **own)]


def inference_launches(
    shape, input, weight, bias, residual, mean, variance, output, eps, kind, parameter, device=None
):  # fmt: skip
    """The launch of batch_norm_inference, not yet run."""
    device = device or device_limits(input.device)
    view = _view_of(shape, input, 1)
    arguments = (input, weight, bias, residual, output, mean, None, variance, eps, kind, parameter)
    return [normalise_launch(shape, *arguments, device=device, view=view)]


def input_gradient_launch(view, operands, grads, means, count, constants, device, partial=None, partial_parts=1):
    """The launch of input_gradient_kernel."""
    parts, part_steps = partition(view, 1, device)
    sizes, tile = _sizes(view, "width", "spread", "steps")
    arguments = {
        **operands, **grads, **means, "partial": partial,
        **sizes, "count": count, "parts": partial_parts, "part_steps": part_steps,
    }  # fmt: skip
    constants = constants | tile | {"BLOCK": PARTIAL_BLOCK}
    tensors = (operands["grad_output"], operands["input"], operands["saved"], grads["grad_input"])
    return _launch(input_gradient_kernel, (view.blocks, parts), arguments, constants, device, view, *tensors)


def backward_launches(
    shape, grad_output, input, weight, bias, residual, output, mean, rstd,
    grad_input, grad_weight, grad_bias, grad_residual, training, kind, parameter, device=None,
):  # fmt: skip
    """The launches of batch_norm_backward, not yet run."""
    device = device or device_limits(input.device)
    view = _view_of(shape, input, 2)
    count = shape[0] * shape[2]
    saved = None if kind == NONE.value else residual if output is None else output
    operands = {
        "grad_output": grad_output, "input": input, "saved": saved,
        "weight": weight, "bias": bias, "mean": mean, "rstd": rstd,
    }  # fmt: skip
    constants = {"KIND": kind, "PARAMETER": compiled_parameter(kind, parameter), "FROM_OUTPUT": output is not None}
    grads = {"grad_input": grad_input, "grad_weight": grad_weight, "grad_bias": grad_bias}
    through = training and grad_input is not None  # the gradient flows through the statistics
    if view.whole and through:
        sizes, tile = _sizes(view)
        arguments = {**operands, **grads, "grad_residual": grad_residual, **sizes, "count": count}
        return [_launch(whole_backward_kernel, (view.blocks,), arguments, constants | tile, device, view)]

    sums = through or grad_weight is not None or grad_bias is not None
    parts, part_steps, partial = _reduction(view, mean, 2, device) if sums else (*partition(view, 1, device), None)
    sizes, tile = _sizes(view, "width", "spread", "steps")
    arguments = {
        **operands, "grad_input": None if training else grad_input, "grad_residual": grad_residual,
        "partial": partial, **sizes, "part_steps": part_steps,
    }  # fmt: skip
    launches = [_launch(sums_kernel, (view.blocks, parts), arguments, constants | tile, device, view)]
    if not sums:
        return launches
    means = {"mean_gradient": None, "mean_product": None}
    if not (through and view.planes):
        if through:
            means = {name: torch.empty_like(mean) for name in means}
        finished = {"partial": partial, "rstd": rstd, "grad_weight": grad_weight, "grad_bias": grad_bias}
        arguments = finished | means | {"count": count}
        launches.append(_finish(finish_sums_kernel, view, parts, arguments, {}, device))
    if through:
        if grad_residual is not None:  # what has been written need not be made again
            operands |= {"grad_output": grad_residual, "saved": None}
            constants = {"KIND": NONE.value, "PARAMETER": 0.0, "FROM_OUTPUT": False}
        own = {"partial": partial, "partial_parts": parts} if view.planes else {}
        launches.append(input_gradient_launch(view, operands, grads, means, count, constants, device, **own))
    return launches


def apply_launches(
    shape, grad_output, input, weight, mean, rstd, mean_gradient, mean_product, grad_input, device=None
):  # fmt: skip
    """The launch of batch_norm_apply, not yet run."""
    device = device or device_limits(input.device)
    operands = {
        "grad_output": grad_output, "input": input, "saved": None,
        "weight": weight, "bias": None, "mean": mean, "rstd": rstd,
    }  # fmt: skip
    grads = {"grad_input": grad_input, "grad_weight": None, "grad_bias": None}
    means = {"mean_gradient": mean_gradient, "mean_product": mean_product}
    constants = {"KIND": NONE.value, "PARAMETER": 0.0, "FROM_OUTPUT": False}
    view = _view_of(shape, input, 2)
    return [input_gradient_launch(view, operands, grads, means, shape[0] * shape[2], constants, device)]


# -------------------------------------------------------------------------------------------------------------- calls


def batch_norm(shape, input, weight, bias, residual, output, mean, rstd, variance, eps, kind, parameter):
    """output = activation((input - mean) * rstd * weight + bias + residual) with the input's own mean and rstd = 1 /
    sqrt(biased variance + eps); these and the unbiased variance (channels,) are results.

    shape: (outer, channels, inner) of input, residual (or None) and output; element (o, c, i) of each lies at (o *
    channels + c) * inner + i. No extent is 0. weight, bias (channels,) or None.
    """
    arguments = (input, weight, bias, residual, output, mean, rstd, variance, eps, kind, parameter)
    for launch in forward_launches(shape, *arguments):
        launch.run()


def batch_norm_inference(shape, input, weight, bias, residual, mean, variance, output, eps, kind, parameter):
    """The same output with given mean and variance."""
    arguments = (input, weight, bias, residual, mean, variance, output, eps, kind, parameter)
    for launch in inference_launches(shape, *arguments):
        launch.run()


def batch_norm_backward(
    shape, grad_output, input, weight, bias, residual, output, mean, rstd,
    grad_input, grad_weight, grad_bias, grad_residual, training, kind, parameter,
):  # fmt: skip
    """The gradients of batch_norm or, not training, of batch_norm_inference; each may be None, and is not computed.

    output: of the forward, where the activation's gradient is made of it, or None: then of residual.
    """
    tensors = (grad_output, input, weight, bias, residual, output, mean, rstd)
    grads = (grad_input, grad_weight, grad_bias, grad_residual)
    for launch in backward_launches(shape, *tensors, *grads, training, kind, parameter):
        launch.run()


def batch_norm_statistics(shape, input, mean, squares):
    """Mean and sum of squared differences from it, (channels,)."""
    for launch in statistics_launches(shape, input, mean, None, squares, 0.0)[0]:
        launch.run()


def batch_norm_apply(shape, grad_output, input, weight, mean, rstd, mean_gradient, mean_product, grad_input):
    """grad_input = rstd * weight * (grad_output - mean_gradient - (input - mean) * rstd * mean_product)."""
    arguments = (grad_output, input, weight, mean, rstd, mean_gradient, mean_product, grad_input)
    for launch in apply_launches(shape, *arguments):
        launch.run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: planes, columns and odd planes, one
    tile or many, forward and backward; with every all dtypes, a residual and a long activation."""
    shapes = {
        "planes": (32, 64, 3136),
        "columns": (100352, 64, 1),
        "odd planes": (256, 512, 49),
        "whole plane": (32, 512, 49),
        "whole columns": (256, 1024, 1),
    }
    launches = {}

    def add(shape_name, dtype, kind, with_residual=False, training=True):
        outer, channels, inner = shape = shapes[shape_name]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.empty(outer * channels * inner, dtype=dtype, device="meta")
        column = torch.empty(channels, dtype=compute, device="meta")
        residual = values if with_residual else None
        forward = forward_launches(
            shape, values, column, column, residual, values, column, column, column, 1e-5, kind, 0.5, device
        )
        backward = backward_launches(
            shape, values, values, column, column, residual, None, column, column,
            values, column, column, residual, training, kind, 0.5, device,
        )  # fmt: skip
        name = f"{shape_name} {str(dtype).removeprefix('torch.')} kind {kind}"
        name += " residual" * with_residual + " frozen" * (not training)
        for direction, found in (("forward", forward), ("backward", backward)):
            for position, launch in enumerate(found):
                launches[f"{direction} {name} {position}"] = launch

    for shape_name in shapes:
        add(shape_name, torch.bfloat16, 1)
    if every:
        for shape_name in shapes:
            for dtype in (torch.float16, torch.float32, torch.float64):
                add(shape_name, dtype, 1)
            add(shape_name, torch.float32, 5, with_residual=True)
            add(shape_name, torch.bfloat16, 6, training=False)
    return launches
