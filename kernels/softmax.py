"""Softmax and its logarithm over the middle of (outer, size, inner), and what the cross entropy shares with them.

A row is what is summed over: `size` elements `step_stride` apart. A program takes LANES rows side by side in tiles of
LANES x STEP: with inner 1 rows lie one after the other and a tile is contiguous along them, else neighbouring rows are
and a tile is contiguous across them. A row that fits in a tile is read once (WHOLE); else once for its sum of
exponentials, by an online maximum in each position of the tile (Milakov and Gimelshein, 2018), and once for the result.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import Launch, Plan, device_limits

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def rows_of(lanes, lane_stride, plane_stride, blocks, LANES: tl.constexpr):
    """A program's rows, each (LANES, 1): the offsets of their first elements, their numbers, and which there are."""
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    lane = ((program % blocks) * LANES + tl.arange(0, LANES))[:, None]
    return plane * plane_stride + lane * lane_stride, plane * lanes + lane, lane < lanes


@triton.jit
def tile_at(start, base, inside, size, step_stride, STEP: tl.constexpr):
    """Offsets and mask of the tile of rows' elements from `start`."""
    step = (start + tl.arange(0, STEP))[None, :]
    return base + step.to(tl.int64) * step_stride, inside & (step < size)


@triton.jit
def row_sums(
    input, base, inside, size, step_stride, LANES: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """(LANES, 1): rows' largest values, and their sums of exp(x - largest)."""
    largest = tl.full((LANES, STEP), LOWEST, COMPUTE)
    sums = tl.zeros((LANES, STEP), COMPUTE)
    for start in range(0, size, STEP):
        offsets, mask = tile_at(start, base, inside, size, step_stride, STEP)
        x = tl.load(input + offsets, mask=mask, other=LOWEST).to(COMPUTE)
        larger = tl.maximum(largest, x)
        origin = tl.where(larger == LOWEST, 0.0, larger)
        sums = sums * tl.exp(largest - origin) + tl.exp(x - origin)
        largest = larger
    top = tl.max(largest, 1, keep_dims=True)
    origin = tl.where(top == LOWEST, 0.0, top)
    return top, tl.sum(sums * tl.exp(largest - origin), 1, keep_dims=True)


@triton.jit
def softmax_kernel(
    input, output, lanes, size, lane_stride, step_stride, plane_stride, blocks,
    LOG: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """output = softmax(input) or its logarithm. Launches a 1D grid where each program takes LANES rows."""
    COMPUTE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    base, _, inside = rows_of(lanes, lane_stride, plane_stride, blocks, LANES)
    if WHOLE:
        offsets, mask = tile_at(0, base, inside, size, step_stride, STEP)
        x = tl.load(input + offsets, mask=mask, other=LOWEST).to(COMPUTE)
        difference = x - tl.max(x, 1, keep_dims=True)
        exponentials = tl.exp(difference)
        total = tl.sum(exponentials, 1, keep_dims=True)
        result = difference - tl.log(total) if LOG else exponentials / total
        tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)
    else:
        top, total = row_sums(input, base, inside, size, step_stride, LANES, STEP, COMPUTE)
        factor = tl.log(total) if LOG else 1 / total
        for start in range(0, size, STEP):
            offsets, mask = tile_at(start, base, inside, size, step_stride, STEP)
            difference = tl.load(input + offsets, mask=mask, other=LOWEST).to(COMPUTE) - top
            result = difference - factor if LOG else tl.exp(difference) * factor
            tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of(grad, output, total, LOG: tl.constexpr):
    """A tile's gradient of the input; total: the row's sum of the gradient, without LOG weighted by the output."""
    return grad - tl.exp(output) * total if LOG else output * (grad - total)


@triton.jit
def softmax_backward_kernel(
    grad_output, output, grad_input, lanes, size, lane_stride, step_stride, plane_stride, blocks,
    LOG: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradient of softmax or its logarithm, from the output. Launches the grid of softmax_kernel."""
    COMPUTE: tl.constexpr = tl.float64 if output.dtype.element_ty == tl.float64 else tl.float32
    base, _, inside = rows_of(lanes, lane_stride, plane_stride, blocks, LANES)
    if WHOLE:
        offsets, mask = tile_at(0, base, inside, size, step_stride, STEP)
        grad = tl.load(grad_output + offsets, mask=mask, other=0.0).to(COMPUTE)
        y = tl.load(output + offsets, mask=mask, other=0.0).to(COMPUTE)
        total = tl.sum(grad if LOG else grad * y, 1, keep_dims=True)
        tl.store(grad_input + offsets, gradient_of(grad, y, total, LOG).to(grad_input.dtype.element_ty), mask=mask)
    else:
        sums = tl.zeros((LANES, STEP), COMPUTE)
        for start in range(0, size, STEP):
            offsets, mask = tile_at(start, base, inside, size, step_stride, STEP)
            grad = tl.load(grad_output + offsets, mask=mask, other=0.0).to(COMPUTE)
            if LOG:
                sums += grad
            else:
                sums += grad * tl.load(output + offsets, mask=mask, other=0.0).to(COMPUTE)
        total = tl.sum(sums, 1, keep_dims=True)
        for start in range(0, size, STEP):
            offsets, mask = tile_at(start, base, inside, size, step_stride, STEP)
            grad = tl.load(grad_output + offsets, mask=mask, other=0.0).to(COMPUTE)
            y = tl.load(output + offsets, mask=mask, other=0.0).to(COMPUTE)
            tl.store(grad_input + offsets, gradient_of(grad, y, total, LOG).to(grad_input.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------------------------- block sizes

WARPS = 4
# Elements of a tile by element size: 16 for each thread, two to four accesses of 16 bytes.
TILE = {2: 2048, 4: 2048, 8: 512}
# Of a row that stays in registers: 32 for each thread of 8 warps, and of 16 in 16 and 32 bits.
WHOLE_TILE = {2: 8192, 4: 8192, 8: 1024}
WHOLE_WARPS = 8
# Neighbouring rows of a tile: 128 bytes side by side.
LINE_BYTES = 128
PROGRAMS_WARPS = 16  # that a multiprocessor holds at once


@dataclass(frozen=True)
class Rows:
    """How rows are seen: `lanes` of them side by side in each plane; see the module."""

    lanes: int
    size: int
    lane_stride: int
    step_stride: int
    plane_stride: int
    planes: int
    tile_lanes: int
    tile_step: int
    whole: bool
    warps: int

    @property
    def blocks(self):
        """Programs of a plane."""
        return triton.cdiv(self.lanes, self.tile_lanes)


def choose_rows(outer, size, inner, element_size, looped=True):
    """The rows of (outer, size, inner), and their tiles; not ``looped``: a program takes one tile of them."""
    along = inner == 1
    lanes, step = outer if along else inner, triton.next_power_of_2(size)
    most_lanes = triton.next_power_of_2(lanes)
    line = 1 if along else min(LINE_BYTES // element_size, most_lanes)
    whole = looped and step * line <= WHOLE_TILE[element_size]
    if whole:
        step_size = step
    else:
        step_size = min(step, (TILE[element_size] * 2 if looped else TILE[element_size]) // line)
    tile_lanes = min(max(TILE[element_size] // step_size, line), most_lanes)
    warps = WHOLE_WARPS if tile_lanes * step_size > TILE[element_size] else WARPS
    strides = (size, 1, 0, 1) if along else (1, inner, size * inner, outer)
    return Rows(lanes, size, *strides, tile_lanes, step_size, whole, warps)


def row_arguments(rows):
    """The kernels' arguments and constants of these rows."""
    names = ("lanes", "size", "lane_stride", "step_stride", "plane_stride", "blocks")
    return {name: getattr(rows, name) for name in names}, {"LANES": rows.tile_lanes, "STEP": rows.tile_step}


# ------------------------------------------------------------------------------------------------------------- launches


def _launch(kernel, view, tensors, like, log, device):
    rows = choose_rows(*view, like.element_size())
    arguments, constants = row_arguments(rows)
    constants |= {"LOG": log, "WHOLE": rows.whole}
    plan = Plan(PROGRAMS_WARPS // rows.warps)
    return Launch(kernel, (rows.planes * rows.blocks,), tensors | arguments, constants, device, rows.warps, plan=plan)


def forward_launch(view, input, output, log, device):
    """The launch of softmax, not yet run."""
    return _launch(softmax_kernel, view, {"input": input, "output": output}, input, log, device)


def backward_launch(view, grad_output, output, grad_input, log, device):
    """The launch of softmax_backward, not yet run."""
    tensors = {"grad_output": grad_output, "output": output, "grad_input": grad_input}
    return _launch(softmax_backward_kernel, view, tensors, output, log, device)


def softmax(view, input, output, log):
    """output = softmax of input, or with `log` its logarithm; view: their (outer, size, inner), none 0."""
    forward_launch(view, input, output, log, device_limits(input.device)).run()


def softmax_backward(view, grad_output, output, grad_input, log):
    """grad_input from the forward's output, all of one layout."""
    backward_launch(view, grad_output, output, grad_input, log, device_limits(output.device)).run()


TARGET_VIEWS = {"rows": (8192, 1024, 1), "long rows": (1024, 50304, 1), "columns": (64, 1024, 256)}


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: short rows, long ones, columns."""
    launches = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64) if every else (torch.bfloat16,):
        for name, view in TARGET_VIEWS.items():
            values = torch.empty(view, dtype=dtype, device="meta")
            for log in (False, True) if every else (False,):
                label = f"{name} {str(dtype).removeprefix('torch.')}{' log' if log else ''}"
                launches[f"forward {label}"] = forward_launch(view, values, values, log, device)
                launches[f"backward {label}"] = backward_launch(view, values, values, values, log, device)
    return launches
