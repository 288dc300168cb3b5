"""Embedding: rows of a table by their indices, and the table's gradient.

The gradient takes the indices sorted, so that the terms of a row of the table, its run, lie side by side. A program
sums CHUNK of them. Runs that lie inside a chunk are finished there; the parts of those that go on are kept and summed
by the program of the chunk where a run begins. So long runs are spread over many programs, and the order is fixed.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, Plan, device_limits


@triton.jit
def gather_kernel(
    table, indices, output, count, rows, columns, LINES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """output (count, columns) = table (rows, columns) at indices, NaN where there is no such row.

    Launches a 2D grid where each program takes LINES x COLUMNS elements of the output.
    """
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    index = tl.load(indices + line, mask=line < count, other=0)
    mask = (line < count) & (column < columns)
    known = (index >= 0) & (index < rows)
    value = tl.load(table + tl.where(known, index, 0) * columns + column, mask=mask & known, other=float("nan"))
    tl.store(output + line * columns + column, value, mask=mask)


@triton.jit
def put_row(grad_table, row, value, scale, position, column, rows, columns, padding):
    """Stores a finished run's sum, unless it is of the padding row or of none."""
    if scale is not None:
        value *= tl.load(scale + position)
    wanted = (row >= 0) & (row < rows) & (row != padding)
    tl.store(grad_table + row * columns + column, value.to(grad_table.dtype.element_ty), (column < columns) & wanted)


@triton.jit
def runs_kernel(
    grad_output, index, order, scale, grad_table, partial, count, rows, columns, padding,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums the runs of a chunk. partial (chunks, 2, columns): of the run that comes from the chunk before, and of the
    one that begins here and goes on.

    index, order (count,): the sorted indices, and their places in grad_output (count, columns). scale (count,) or None:
    what a run is multiplied by. Launches a 2D grid where program (c, b) takes chunk c of the b-th COLUMNS columns.
    """
    COMPUTE: tl.constexpr = partial.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, count) - 1
    before = tl.load(index + first - 1, mask=first > 0, other=0)
    comes_from_before = (first > 0) & (before == tl.load(index + first))
    total = tl.zeros((COLUMNS,), COMPUTE)
    for position in range(first, last + 1):
        row = tl.load(index + position)
        following = tl.load(index + position + 1, mask=position + 1 < count, other=0)
        goes_on = (position + 1 < count) & (following == row)
        source = tl.load(order + position) * columns
        total += tl.load(grad_output + source + column, mask=column < columns, other=0.0).to(COMPUTE)
        if (position == last) | (goes_on == 0):
            if comes_from_before:
                tl.store(partial + chunk * 2 * columns + column, total, mask=column < columns)
            elif goes_on:
                tl.store(partial + (chunk * 2 + 1) * columns + column, total, mask=column < columns)
            else:
                put_row(grad_table, row, total, scale, position, column, rows, columns, padding)
            total = tl.zeros((COLUMNS,), COMPUTE)
            comes_from_before = first < 0


@triton.jit
def join_kernel(
    index, scale, grad_table, partial, count, rows, columns, padding, chunks,
    CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums the parts of the run that begins in a chunk and goes on. Launches the grid of runs_kernel."""
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, count)
    row = tl.load(index + end - 1)
    following = tl.load(index + end, mask=end < count, other=0)
    before = tl.load(index + first - 1, mask=first > 0, other=0)
    begins_here = (tl.load(index + first) != row) | (first == 0) | (before != row)
    if (end < count) & (following == row) & begins_here:
        total = tl.load(partial + (chunk * 2 + 1) * columns + column, mask=column < columns, other=0.0)
        other = chunk + 1
        same = following == row
        while same:
            total += tl.load(partial + other * 2 * columns + column, mask=column < columns, other=0.0)
            other += 1
            same = (other < chunks) & (tl.load(index + other * CHUNK, mask=other < chunks, other=0) == row)
        put_row(grad_table, row, total, scale, end - 1, column, rows, columns, padding)


# ------------------------------------------------------------------------------------------------------------- launches

WARPS = 4
ELEMENTS = 2048  # of a program of the forward: two accesses of 16 bytes a thread
MOST_COLUMNS = 512  # of the backward: few registers a thread, so that many rows are in flight
CHUNK = 32
PROGRAMS = 4


def forward_launch(table, indices, output, device):
    """The launch of embedding, not yet run."""
    (rows, columns), count = table.shape, indices.numel()
    width = min(triton.next_power_of_2(columns), ELEMENTS)
    lines = min(ELEMENTS // width, triton.next_power_of_2(count))
    arguments = {
        "table": table, "indices": indices, "output": output, "count": count, "rows": rows, "columns": columns
    }  # fmt: skip
    grid = (triton.cdiv(count, lines), triton.cdiv(columns, width))
    constants = {"LINES": lines, "COLUMNS": width}
    return Launch(gather_kernel, grid, arguments, constants, device, WARPS, plan=Plan(PROGRAMS))


def backward_launches(grad_output, index, order, scale, grad_table, padding, device):
    """The launches of embedding_backward, not yet run."""
    (rows, columns), count = grad_table.shape, index.numel()
    compute = torch.float64 if grad_table.dtype == torch.float64 else torch.float32
    chunks = triton.cdiv(count, CHUNK)
    width = min(triton.next_power_of_2(columns), MOST_COLUMNS)
    partial = torch.empty((chunks, 2, columns), dtype=compute, device=grad_table.device)
    shared = {
        "index": index, "scale": scale, "grad_table": grad_table, "partial": partial,
        "count": count, "rows": rows, "columns": columns, "padding": padding,
    }  # fmt: skip
    grid, constants = (chunks, triton.cdiv(columns, width)), {"CHUNK": CHUNK, "COLUMNS": width}
    runs = {"grad_output": grad_output, "order": order, **shared}
    join = {**shared, "chunks": chunks}
    return [
        Launch(kernel, grid, arguments, constants, device, WARPS, plan=Plan(PROGRAMS))
        for kernel, arguments in ((runs_kernel, runs), (join_kernel, join))
    ]


def embedding(table, indices, output):
    """output (count, columns) = table (rows, columns) at indices (count,), int64; none is empty."""
    forward_launch(table, indices, output, device_limits(table.device)).run()


def embedding_backward(grad_output, index, order, scale, grad_table, padding):
    """Adds up the rows of grad_output (count, columns) by their sorted indices in grad_table (rows, columns), zeros
    before. order (count,): where in grad_output; scale (count,) or None: what a run is multiplied by."""
    for launch in backward_launches(
        grad_output, index, order, scale, grad_table, padding, device_limits(grad_table.device)
    ):
        launch.run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code."""
    launches = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64) if every else (torch.bfloat16,):
        table = torch.empty((50304, 768), dtype=dtype, device="meta")
        values = torch.empty((8192, 768), dtype=dtype, device="meta")
        index = torch.empty(8192, dtype=torch.int64, device="meta")
        name = str(dtype).removeprefix("torch.")
        launches[f"forward {name}"] = forward_launch(table, index, values, device)
        for position, launch in enumerate(backward_launches(values, index, index, None, table, -1, device)):
            launches[f"backward {name} {position}"] = launch
    return launches
