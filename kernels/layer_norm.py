"""Layer and RMS normalisation of rows, with dropout and a residual before it, and the gradients.

All tensors are (rows, columns), contiguous; weight and bias (columns,) in any floating dtype; mean, which is None for
RMS normalisation, and rstd (rows,) in the dtype of computation. A program keeps a tile of whole rows in registers: one
pass over memory. Longer rows go in chunks, whose moments are joined, and are read twice, with dropout made again.

The backward's programs take so many rows each that they fill the device once, and keep their part of the sums over
rows; a second launch adds the parts up, in an order that no timing changes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .batch_norm import inverse_deviation
from .common import Launch, Plan, device_limits
from .dropout import constants_of, factors_of_elements, factors_of_groups

# ------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def dropout_factors(
    seed, row, start, columns,
    COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The factors of rows (ROWS, 1) at the COLUMNS columns from `start`. GROUPS: four columns share a counter."""
    if GROUPS:
        group = row * (columns // 4) + (start // 4 + tl.arange(0, COLUMNS // 4))[None, :]
        factors = factors_of_groups(seed, group, COMPUTE, THRESHOLD, KEPT)
    else:
        element = row * columns + (start + tl.arange(0, COLUMNS))[None, :]
        factors = factors_of_elements(seed, element, COMPUTE, THRESHOLD, KEPT)
    return factors


@triton.jit
def load_h(
    input, residual, seed, h, row, start, columns, mask,
    COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """residual + dropout(input), rounded to input's dtype, in that of computation; stored to h unless that is None."""
    offsets = row * columns + (start + tl.arange(0, COLUMNS))[None, :]
    x = tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
    if seed is not None:
        x *= dropout_factors(seed, row, start, columns, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS)
    if residual is not None:
        x += tl.load(residual + offsets, mask=mask, other=0.0).to(COMPUTE)
    rounded = x.to(input.dtype.element_ty)
    if h is not None:
        tl.store(h + offsets, rounded, mask=mask)
    return tl.where(mask, rounded.to(COMPUTE), 0.0)  # what is dropped beyond the row's end may be NaN


@triton.jit
def moments(x, mask, size, COMPUTE: tl.constexpr, RMS: tl.constexpr):
    """Mean and sum of squared differences from it of rows of `size` values, (ROWS, 1); for RMS 0 and sum of squares."""
    if RMS:
        mean = tl.zeros((x.shape[0], 1), COMPUTE)
        squares = tl.sum(x * x, 1)[:, None]
    else:
        origin = tl.sum(x, 1)[:, None] / size
        difference = tl.where(mask, x - origin, 0.0)
        rest = tl.sum(difference, 1)[:, None] / size  # what rounding has left of the mean
        squares = tl.sum(difference * difference, 1)[:, None] - rest * rest * size
        mean = origin + rest
    return mean, squares


@triton.jit
def store_normal(
    x, mean, rstd, weight, bias, output, row, start, columns, mask, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr
):
    """output = (x - mean) * rstd * weight + bias."""
    column = (start + tl.arange(0, COLUMNS))[None, :]
    y = (x - mean) * rstd
    if weight is not None:
        y *= tl.load(weight + column, mask=column < columns, other=0.0).to(COMPUTE)
    if bias is not None:
        y += tl.load(bias + column, mask=column < columns, other=0.0).to(COMPUTE)
    tl.store(output + row * columns + column, y.to(output.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit
def forward_kernel(
    input, residual, weight, bias, seed, output, h, mean, rstd, rows, columns,
    EPS: tl.constexpr, COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h = residual + dropout(input), output = (h - mean) * rstd * weight + bias.

    Launches a 1D grid where each program takes ROWS rows; WHOLE if COLUMNS columns hold all of a row.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    if WHOLE:
        mask = inside & (column < columns)
        x = load_h(
            input, residual, seed, h, row, 0, columns, mask, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS
        )  # fmt: skip
        own_mean, squares = moments(x, mask, columns, COMPUTE, mean is None)
    else:
        own_mean, squares = tl.zeros((ROWS, 1), COMPUTE), tl.zeros((ROWS, 1), COMPUTE)
        for start in range(0, columns, COLUMNS):
            mask = inside & (start + column < columns)
            x = load_h(
                input, residual, seed, h, row, start, columns, mask, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS
            )  # fmt: skip
            size = tl.minimum(columns - start, COLUMNS)
            chunk_mean, chunk_squares = moments(x, mask, size, COMPUTE, mean is None)
            # Chan, Golub and LeVeque, 1983
            share = size.to(COMPUTE) / (start + size)
            delta = chunk_mean - own_mean
            squares += chunk_squares + delta * delta * (start * share)
            own_mean += delta * share
    own_rstd = inverse_deviation(squares / columns, EPS)
    if mean is not None:
        tl.store(mean + row, own_mean, mask=inside)
    tl.store(rstd + row, own_rstd, mask=inside)
    if WHOLE:
        store_normal(x, own_mean, own_rstd, weight, bias, output, row, 0, columns, mask, COMPUTE, COLUMNS)
    else:
        for start in range(0, columns, COLUMNS):
            mask = inside & (start + column < columns)
            x = load_h(
                input, residual, seed, None, row, start, columns, mask, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS
            )  # fmt: skip
            store_normal(x, own_mean, own_rstd, weight, bias, output, row, start, columns, mask, COMPUTE, COLUMNS)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def load_gradient(grad_output, h, weight, mean, rstd, offsets, column, columns, mask, COMPUTE: tl.constexpr):
    """The gradient of the output, of the normalised row, and that row."""
    grad = tl.load(grad_output + offsets, mask=mask, other=0.0).to(COMPUTE)
    normal = tl.where(mask, (tl.load(h + offsets, mask=mask, other=0.0).to(COMPUTE) - mean) * rstd, 0.0)
    scaled = grad
    if weight is not None:
        scaled = grad * tl.load(weight + column, mask=column < columns, other=0.0).to(COMPUTE)
    return grad, scaled, normal


@triton.jit
def store_gradients(
    scaled, normal, mean_gradient, mean_product, own_rstd, grad_sum, seed, grad_input, grad_residual,
    row, start, offsets, columns, mask,
    COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_residual, the gradient of h, and grad_input, that through dropout; those that are not None."""
    grad = own_rstd * (scaled - mean_gradient - normal * mean_product)
    if grad_sum is not None:
        grad += tl.load(grad_sum + offsets, mask=mask, other=0.0).to(COMPUTE)
    if grad_residual is not None:
        tl.store(grad_residual + offsets, grad.to(grad_residual.dtype.element_ty), mask=mask)
    if grad_input is not None:
        if seed is not None:
            grad *= dropout_factors(seed, row, start, columns, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS)
        tl.store(grad_input + offsets, grad.to(grad_input.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_output, grad_sum, h, weight, seed, mean, rstd, grad_input, grad_residual, partial,
    rows, columns, part_steps,
    COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_input and grad_residual; partial (parts, 2, columns): each part's sums of grad_output * normal and of
    grad_output. Each may be None.

    Launches a 1D grid where program p takes the steps p * part_steps to (p + 1) * part_steps of ROWS rows each; WHOLE
    if COLUMNS columns hold all of a row, else ROWS is 1.
    """
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    weight_sums, bias_sums = tl.zeros((ROWS, COLUMNS), COMPUTE), tl.zeros((ROWS, COLUMNS), COMPUTE)
    first = part * part_steps
    for step in range(first, tl.minimum(first + part_steps, tl.cdiv(rows, ROWS))):
        row = (step * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        inside = row < rows
        own_rstd = tl.load(rstd + row, mask=inside, other=0.0)
        own_mean = own_rstd * 0.0
        if mean is not None:
            own_mean = tl.load(mean + row, mask=inside, other=0.0)
        if WHOLE:
            mask = inside & (column < columns)
            offsets = row * columns + column
            grad, scaled, normal = load_gradient(
                grad_output, h, weight, own_mean, own_rstd, offsets, column, columns, mask, COMPUTE
            )  # fmt: skip
            weight_sums += grad * normal
            bias_sums += grad
            mean_gradient = tl.sum(scaled, 1)[:, None] / columns
            mean_product = tl.sum(scaled * normal, 1)[:, None] / columns
        else:
            mean_gradient, mean_product = tl.zeros((ROWS, 1), COMPUTE), tl.zeros((ROWS, 1), COMPUTE)
            for start in range(0, columns, COLUMNS):
                mask = inside & (start + column < columns)
                grad, scaled, normal = load_gradient(
                    grad_output, h, weight, own_mean, own_rstd, row * columns + start + column, start + column,
                    columns, mask, COMPUTE,
                )  # fmt: skip
                mean_gradient += tl.sum(scaled, 1)[:, None]
                mean_product += tl.sum(scaled * normal, 1)[:, None]
                if partial is not None:  # too long a row for registers: its sums stay in the cache
                    target = partial + part * 2 * columns + start + column
                    own = mask & (step > first)
                    weight_sums = grad * normal + tl.load(target, mask=own, other=0.0)
                    bias_sums = grad + tl.load(target + columns, mask=own, other=0.0)
                    tl.store(target, weight_sums, mask=mask)
                    tl.store(target + columns, bias_sums, mask=mask)
            tl.debug_barrier()  # the next row reads what this one's threads have written
            mean_gradient /= columns
            mean_product /= columns
        if mean is None:
            mean_gradient *= 0.0
        if WHOLE:
            store_gradients(
                scaled, normal, mean_gradient, mean_product, own_rstd, grad_sum, seed, grad_input, grad_residual,
                row, 0, offsets, columns, mask, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS,
            )  # fmt: skip
        elif grad_input is not None or grad_residual is not None:
            for start in range(0, columns, COLUMNS):
                mask = inside & (start + column < columns)
                offsets = row * columns + start + column
                grad, scaled, normal = load_gradient(
                    grad_output, h, weight, own_mean, own_rstd, offsets, start + column, columns, mask, COMPUTE
                )  # fmt: skip
                store_gradients(
                    scaled, normal, mean_gradient, mean_product, own_rstd, grad_sum, seed, grad_input, grad_residual,
                    row, start, offsets, columns, mask, COMPUTE, THRESHOLD, KEPT, GROUPS, COLUMNS,
                )  # fmt: skip
    if WHOLE and partial is not None:
        target = partial + part * 2 * columns + tl.arange(0, COLUMNS)
        tl.store(target, tl.sum(weight_sums, 0), mask=tl.arange(0, COLUMNS) < columns)
        tl.store(target + columns, tl.sum(bias_sums, 0), mask=tl.arange(0, COLUMNS) < columns)


@triton.jit
def finish_kernel(
    partial, grad_weight, grad_bias, parts, columns, COMPUTE: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    """grad_weight and grad_bias (columns,), those that are not None, from partial (parts, 2, columns).

    Launches a 1D grid where each program takes COLUMNS columns.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight_sums, bias_sums = tl.zeros((PARTS, COLUMNS), COMPUTE), tl.zeros((PARTS, COLUMNS), COMPUTE)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        offsets = part.to(tl.int64)[:, None] * 2 * columns + column[None, :]
        mask = (part < parts)[:, None] & (column < columns)[None, :]
        weight_sums += tl.load(partial + offsets, mask=mask, other=0.0)
        bias_sums += tl.load(partial + offsets + columns, mask=mask, other=0.0)
    if grad_weight is not None:
        tl.store(grad_weight + column, tl.sum(weight_sums, 0), mask=column < columns)
    if grad_bias is not None:
        tl.store(grad_bias + column, tl.sum(bias_sums, 0), mask=column < columns)


# ------------------------------------------------------------------------------------------------------------- choices


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program takes at once, by so many warps; whole: the columns hold all of a row."""

    rows: int
    columns: int
    warps: int
    whole: bool


# The longest row that a program keeps, by bytes of an element: 32 values a thread of 512, half of its registers in 32
# bits. The backward keeps five tensors' values, of which those of 16 bits take less.
FORWARD_COLUMNS = {2: 16384, 4: 16384, 8: 4096}
BACKWARD_COLUMNS = {2: 8192, 4: 4096, 8: 2048}
# Short rows share a program: eight values a thread of 128, 16 bytes of each tensor in 16 bits.
TILE = 1024
WARPS = 4
THREADS_AT_ONCE = 512  # of a multiprocessor, with 128 registers each


def choose_tile(columns, most, device):
    """The tile for rows of so many columns, where a program keeps `most` values."""
    width, lanes = triton.next_power_of_2(columns), _lanes(device)
    if width > most:
        return Tile(1, most // 2, 256 // lanes, False)  # chunks of half of it: the loops' addresses take registers, too
    rows = max(1, TILE // width)
    threads = min(max(rows * width // 16, 128), 512)  # 16 values a thread, and more only where threads run out
    return Tile(rows, width, threads // lanes, True)


def _lanes(device):
    """Threads of a warp."""
    return 32 if device.capability else 64


def _programs(tile, device):
    return THREADS_AT_ONCE // (tile.warps * _lanes(device))


# ------------------------------------------------------------------------------------------------------------ launches


def _is_wide(columns, tile, device, *tensors):
    """Whether all accesses are of 16 bytes."""
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    values = tile.rows * tile.columns // (tile.warps * _lanes(device))
    return aligned and columns % 16 == 0 and all(t is None or values * t.element_size() >= 16 for t in tensors)


def forward_launch(columns, input, residual, weight, bias, seed, output, h, mean, rstd, eps, dropout, device):
    """The launch of layer_norm, not yet run."""
    rows = input.numel() // columns
    tile = choose_tile(columns, FORWARD_COLUMNS[input.element_size()], device)
    arguments = {
        "input": input, "residual": residual, "weight": weight, "bias": bias, "seed": seed,
        "output": output, "h": h, "mean": mean, "rstd": rstd, "rows": rows, "columns": columns,
    }  # fmt: skip
    constants = _constants(dropout, input, columns, tile) | {"EPS": eps}
    access = 16 if _is_wide(columns, tile, device, input, residual, output, h) else 0
    plan = Plan(_programs(tile, device), access_bytes=access)
    grid = (triton.cdiv(rows, tile.rows),)
    return Launch(forward_kernel, grid, arguments, constants, device, tile.warps, plan=plan)


def backward_launches(
    columns, grad_output, grad_sum, h, weight, seed, mean, rstd,
    grad_input, grad_residual, grad_weight, grad_bias, dropout, device,
):  # fmt: skip
    """The launches of layer_norm_backward, not yet run."""
    rows = h.numel() // columns
    tile = choose_tile(columns, BACKWARD_COLUMNS[h.element_size()], device)
    programs = max(1, _programs(tile, device) * 4 // max(h.element_size(), 4))  # 64 bits take two registers
    steps = triton.cdiv(rows, tile.rows)
    part_steps = triton.cdiv(steps, min(steps, programs * device.multiprocessors))
    parts = triton.cdiv(steps, part_steps)
    partial = None
    if grad_weight is not None or grad_bias is not None:
        partial = torch.empty((parts, 2, columns), dtype=rstd.dtype, device=rstd.device)
    arguments = {
        "grad_output": grad_output, "grad_sum": grad_sum, "h": h, "weight": weight, "seed": seed, "mean": mean,
        "rstd": rstd, "grad_input": grad_input, "grad_residual": grad_residual, "partial": partial,
        "rows": rows, "columns": columns, "part_steps": part_steps,
    }  # fmt: skip
    constants = _constants(dropout, h, columns, tile)
    wide = _is_wide(columns, tile, device, grad_output, grad_sum, h, grad_input, grad_residual)
    plan = Plan(programs, access_bytes=16 if wide else 0)
    launches = [Launch(backward_kernel, (parts,), arguments, constants, device, tile.warps, plan=plan)]
    if partial is not None:
        arguments = {
            "partial": partial, "grad_weight": grad_weight, "grad_bias": grad_bias, "parts": parts, "columns": columns,
        }  # fmt: skip
        constants = {"COMPUTE": constants["COMPUTE"], "PARTS": 32, "COLUMNS": 32}
        launches.append(Launch(finish_kernel, (triton.cdiv(columns, 32),), arguments, constants, device, WARPS))
    return launches


def _constants(dropout, tensor, columns, tile):
    groups = columns % 4 == 0 and tile.columns >= 4
    tiles = {"GROUPS": groups, "WHOLE": tile.whole, "ROWS": tile.rows, "COLUMNS": tile.columns}
    return constants_of(dropout, tensor.dtype) | tiles


# -------------------------------------------------------------------------------------------------------------- calls


def layer_norm(rows, input, residual, weight, bias, seed, output, h, mean, rstd, eps, dropout):
    """h = residual + dropout(input), output = (h - mean) * rstd * weight + bias. rows: their number and length.

    residual, weight, bias, seed and h may be None; mean is None for RMS normalisation.
    """
    tensors = (input, residual, weight, bias, seed, output, h, mean, rstd)
    forward_launch(rows[1], *tensors, eps, dropout, device_limits(input.device)).run()


def layer_norm_backward(
    rows, grad_output, grad_sum, h, weight, seed, mean, rstd,
    grad_input, grad_residual, grad_weight, grad_bias, dropout,
):  # fmt: skip
    """The gradients that are not None; grad_residual is that of h."""
    tensors = (grad_output, grad_sum, h, weight, seed, mean, rstd, grad_input, grad_residual, grad_weight, grad_bias)
    for launch in backward_launches(rows[1], *tensors, dropout, device_limits(h.device)):
        launch.run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: short and long rows, plain and with
    all that is fused; with every, all dtypes and lengths."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    launches = {}

    def add(columns, dtype, fused):
        rows, wide = 4096, torch.float64 if dtype == torch.float64 else torch.float32
        values = torch.empty((rows, columns), dtype=dtype, device="meta")
        column = torch.empty(columns, dtype=dtype, device="meta")
        row = torch.empty(rows, dtype=wide, device="meta")
        extra, own_seed, p = (values, seed, 0.1) if fused else (None, None, 0.0)
        name = f"{columns} {str(dtype).removeprefix('torch.')}" + " dropout residual" * fused
        launches[f"forward {name}"] = forward_launch(
            columns, values, extra, column, column, own_seed, values, extra, row, row, 1e-5, p, device
        )
        backward = backward_launches(
            columns, values, extra, values, column, own_seed, row, row,
            values, extra, column.to(wide), column.to(wide), p, device,
        )  # fmt: skip
        for position, launch in enumerate(backward):
            launches[f"backward {name} {position}"] = launch

    for columns in (256, 1024, 4096, 32768):
        add(columns, torch.bfloat16, columns == 1024)
    if every:
        for columns in (256, 1024, 8192, 16384):
            for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
                add(columns, dtype, True)
                add(columns, dtype, False)
    return launches
