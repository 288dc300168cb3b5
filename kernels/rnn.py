"""Recurrent layers and cells: one kernel forward and one backward through time, the same for all modes.

A program has a tile of sequences and of hidden units. It multiplies the sequences' states by the weights of these
units, all gates of a unit side by side, and finishes the units' step from the sums in its registers. The next step
needs every unit of this one. So a grid over all units is launched for each step; or, where the work of a step is less
than a launch, one program has all units of its sequences and runs all steps, its weights in shared memory if they fit.

Everywhere here: B sequences, T steps, H hidden units, P the size of h (H, or that of an LSTM's projection), G gates (1,
1, 4, 3), in torch's order; rows are time-major, packed or not, as in fastdl/ops/rnn.py. Steps are counted in the order
in which they are made, so that the last one is the first if REVERSE.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from . import linear
from .activation import RELU, TANH, activation_gradient, apply_activation, sigmoid, tanh
from .common import Launch, Plan, device_limits
from .linear import Tile, is_wide, precision

RNN_TANH = tl.constexpr(0)
RNN_RELU = tl.constexpr(1)
LSTM = tl.constexpr(2)
GRU = tl.constexpr(3)
PROJECTION = tl.constexpr(-1)  # of an LSTM's h, a product without gates

MODE_NAMES = ("rnn", "rnn relu", "lstm", "gru")

# What a launch makes of a step: a projection needs all units before, so where a step is a launch it is one of its own.
ALL = tl.constexpr(0)
GATES = tl.constexpr(1)
PROJECTIONS = tl.constexpr(2)


@triton.jit
def rows_of(starts, batch, steps, index, REVERSE: tl.constexpr):
    """(first row, rows) of a step; it has no rows before the first step and after the last."""
    inside = (index >= 0) & (index < steps)
    step = tl.cast(steps - 1 - index if REVERSE else index, tl.int64)
    if starts is None:
        row = step * batch
        count = tl.where(inside, batch, 0)
    else:
        row = tl.load(starts + step, mask=inside, other=0)
        count = (tl.load(starts + step + 1, mask=inside, other=0) - row).to(tl.int32)
    return row, count


@triton.jit
def columns_of_gates(first_unit, hidden, ABSENT: tl.constexpr, MODE: tl.constexpr, COLUMNS: tl.constexpr):
    """The row of the weights for each column of the sums, and whether there is one: unit after unit with all its gates.

    A GRU has four sums, for r, z and both parts of n: ABSENT is the one that these weights have no part in.
    """
    column = tl.arange(0, COLUMNS)
    if MODE >= LSTM:
        gate = column % 4
        unit = first_unit + column // 4
        mask = unit < hidden
        if MODE == GRU:
            mask &= gate != ABSENT
            gate = tl.minimum(gate, 2)
        row = gate * hidden + unit
    else:
        row = first_unit + column
        mask = row < hidden
    return row, mask


@triton.jit
def load_states(states, mask, k, depth, DEPTH: tl.constexpr):
    """A tile of the rows that begin at the addresses ``states``."""
    index = k + tl.arange(0, DEPTH)
    return tl.load(states[:, None] + index[None, :], mask=mask[:, None] & (index < depth)[None, :], other=0.0)


@triton.jit
def load_weights(weight, columns, mask, k, depth, stride, DEPTH: tl.constexpr):
    """A tile of the matrix whose columns begin at the offsets ``columns``, with this stride along them."""
    index = k + tl.arange(0, DEPTH)
    offsets = columns.to(tl.int64)[None, :] + index.to(tl.int64)[:, None] * stride
    return tl.load(weight + offsets, mask=(index < depth)[:, None] & mask[None, :], other=0.0)


@triton.jit
def add_products(
    sums, states, states_mask, weight, resident, columns, columns_mask, depth, stride,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """sums + states @ weights; resident: all these weights, where they are kept."""
    if resident is not None:
        left = load_states(states, states_mask, 0, depth, DEPTH)
        sums = tl.dot(left, resident, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    else:
        for k in range(0, depth, DEPTH):
            left = load_states(states, states_mask, k, depth, DEPTH)
            right = load_weights(weight, columns, columns_mask, k, depth, stride, DEPTH)
            sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit
def split_gates(sums, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """The sums (ROWS, UNITS * 4) as four (ROWS, UNITS)."""
    even, odd = tl.split(tl.reshape(sums, (ROWS, UNITS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_or_zeros(pointer, offsets, mask):
    """Numbers as they are stored; zeros where mask is not, or for None."""
    if pointer is None:
        value = tl.zeros(mask.shape, tl.float32)
    else:
        value = tl.load(pointer + offsets, mask=mask, other=0.0)
    return value


@triton.jit
def store_as(pointer, offsets, value, mask):
    """Stores numbers in the pointer's dtype; nothing where it is None."""
    if pointer is not None:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def forward_tile(
    input, weight_ih, projected, states, initial, initial_c, weight, resident, bias,
    output, last, last_c, gates, cells, carry,
    sequence, first_unit, index, row, count, output_row, previous_row, previous_count, next_count,
    batch, inputs, hidden, depth,
    MODE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One step of a tile's sequences and units.

    The state of a sequence is its row of ``states``, of those that begin at previous_row, or without a step before its
    row of ``initial``. Rows of the step begin at row, and in output at output_row; sequences from next_count on end.
    """
    GATED: tl.constexpr = MODE >= LSTM
    UNITS: tl.constexpr = COLUMNS // 4 if GATED else COLUMNS
    CELL: tl.constexpr = input is not None
    active, began = sequence < count, sequence < previous_count
    number = sequence.to(tl.int64)
    unit = first_unit + tl.arange(0, UNITS)[None, :]
    mask = active[:, None] & (unit < hidden)
    continues, ended = mask & began[:, None], mask & (sequence >= next_count)[:, None]
    at = number[:, None] * hidden + unit  # in (B, H)
    at_row = row * hidden + at
    parity = tl.cast(index % 2, tl.int64)
    read, written = (1 - parity) * batch * hidden + at, parity * batch * hidden + at

    # All of this is read before the products, beside which its latency passes.
    SUMS: tl.constexpr = 4 if MODE == LSTM else 3 if MODE == GRU else 1
    shared = tl.zeros_like(at) + unit  # a bias, which all sequences share
    terms = shared if CELL else (row + number)[:, None] * (SUMS * hidden) + unit
    common_bias = bias if CELL else None
    first_term, first_bias = load_or_zeros(projected, terms, mask), load_or_zeros(common_bias, shared, mask)
    if GATED:
        second_term = load_or_zeros(projected, terms + hidden, mask)
        third_term = load_or_zeros(projected, terms + 2 * hidden, mask)
        second_bias = load_or_zeros(common_bias, shared + hidden, mask)
        carried, initial_state = load_or_zeros(carry, read, continues), load_or_zeros(initial_c, at, mask & ~continues)
        if MODE == LSTM:
            third_bias = load_or_zeros(common_bias, shared + 2 * hidden, mask)
            fourth_term = load_or_zeros(projected, terms + 3 * hidden, mask)
            fourth_bias = load_or_zeros(common_bias, shared + 3 * hidden, mask)
        else:  # in a cell the bias is that of all gates, and the fourth part is n's
            fourth_bias = load_or_zeros(bias, shared + (2 * hidden if CELL else 0), mask)

    sums = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    if CELL:
        weight_row, columns_mask = columns_of_gates(first_unit, hidden, 3, MODE, COLUMNS)
        columns = weight_row.to(tl.int64) * inputs
        sums = add_products(
            sums, input + number * inputs, active, weight_ih, None, columns, columns_mask, inputs, 1, PRECISION, DEPTH
        )
    input_sums = sums
    if MODE == GRU:
        sums = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    weight_row, columns_mask = columns_of_gates(first_unit, hidden, 2, MODE, COLUMNS)
    columns = weight_row.to(tl.int64) * depth
    before = tl.where(began, states + (previous_row + number) * depth, initial + number * depth)
    sums = add_products(sums, before, active, weight, resident, columns, columns_mask, depth, 1, PRECISION, DEPTH)
    if MODE == GRU:  # a part without weights is no product of infinity and zero
        gate = (tl.arange(0, COLUMNS) % 4)[None, :]
        sums = tl.where(gate == 2, input_sums, tl.where(gate == 3, sums, sums + input_sums))

    if GATED:
        first, second, third, fourth = split_gates(sums, ROWS, UNITS)
        first = sigmoid(first + first_term.to(ACCUMULATOR) + first_bias.to(ACCUMULATOR))
        second = sigmoid(second + second_term.to(ACCUMULATOR) + second_bias.to(ACCUMULATOR))
        state = carried.to(ACCUMULATOR) + initial_state.to(ACCUMULATOR)
        fourth += fourth_bias.to(ACCUMULATOR)
        third += third_term.to(ACCUMULATOR)
        if MODE == LSTM:
            third = tanh(third + third_bias.to(ACCUMULATOR))
            fourth = sigmoid(fourth + fourth_term.to(ACCUMULATOR))
            state = second * state + first * third
            h = fourth * tanh(state)
            store_as(last_c, at, state, ended)
            store_as(cells, at_row, state, mask)
        else:
            third = tanh(third + first * fourth)
            h = third + second * (state - third)
            state = h
        store_as(carry, written, state, mask)
        at_gates = (row + number)[:, None] * (4 * hidden) + unit
        store_as(gates, at_gates, first, mask)
        store_as(gates, at_gates + hidden, second, mask)
        store_as(gates, at_gates + 2 * hidden, third, mask)
        store_as(gates, at_gates + 3 * hidden, fourth, mask)
    elif MODE == PROJECTION:
        h = sums
    else:
        sums += first_term.to(ACCUMULATOR) + first_bias.to(ACCUMULATOR)
        h = apply_activation(sums, TANH if MODE == RNN_TANH else RELU, 0.0)
    store_as(output, output_row * hidden + at, h, mask)
    store_as(last, at, h, ended)


@triton.jit(do_not_specialize=["step"])
def forward_kernel(
    input, weight_ih, projected, hx, cx, weight_hh, bias, weight_hr, starts,
    output, h_n, c_n, gates, cells, carry, unprojected,
    step, count, batch, steps, inputs, hidden, state,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PHASE: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """``count`` steps from ``step`` on of one layer in one direction; or, with ``input``, of a cell.

    Shapes: projected (rows, G * H), hx (B, P), cx (B, H), weight_hh (G * H, P), bias (H) of W_hn h, weight_hr (P, H),
    starts (T + 1) int64 where packed; output (rows, P), h_n (B, P), c_n (B, H), gates (rows, 4 * H), cells (rows, H).
    carry (2, B, H), of the accumulator's dtype: c, or a GRU's h, after even and odd steps; unprojected (B, H):
    o * tanh(c). A cell: input (B, I), weight_ih (G * H, I), projected and bias are bias_ih and bias_hh (G * H).
    All contiguous; what a mode does not have, and what is not asked for, is None.

    Launches a 2D grid, over tiles of ROWS sequences and over the units, COLUMNS sums at a time; for more than one step
    it is one program wide. With RESIDENT, a program's columns are all there are, and DEPTH all of P.
    """
    sequence = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    UNITS: tl.constexpr = COLUMNS // 4 if MODE >= LSTM else COLUMNS
    resident = None
    if RESIDENT:
        weight_row, mask = columns_of_gates(0, hidden, 2, MODE, COLUMNS)
        resident = load_weights(weight_hh, weight_row.to(tl.int64) * state, mask, 0, state, 1, DEPTH)
    for index in tl.range(step, step + count, num_stages=1):
        row, rows = rows_of(starts, batch, steps, index, REVERSE)
        previous_row, previous_rows = rows_of(starts, batch, steps, index - 1, REVERSE)
        _, next_rows = rows_of(starts, batch, steps, index + 1, REVERSE)
        if PHASE != PROJECTIONS:
            result = output if weight_hr is None else unprojected
            last = h_n if weight_hr is None else None
            for unit in tl.range(tl.program_id(1) * UNITS, hidden, tl.num_programs(1) * UNITS, num_stages=1):
                forward_tile(
                    input, weight_ih, projected, output, hx, cx if MODE == LSTM else hx, weight_hh, resident, bias,
                    result, last, c_n, gates, cells, carry,
                    sequence, unit, index, row, rows, row if weight_hr is None else 0,
                    previous_row, previous_rows, next_rows, batch, inputs, hidden, state,
                    MODE, ACCUMULATOR, PRECISION, ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
        if PHASE == ALL:
            tl.debug_barrier()  # what the next loads read has been stored by other threads
        if weight_hr is not None and PHASE != GATES:
            for unit in tl.range(tl.program_id(1) * COLUMNS, state, tl.num_programs(1) * COLUMNS, num_stages=1):
                forward_tile(
                    None, None, None, unprojected, unprojected, None, weight_hr, None, None,
                    output, h_n, None, None, None, None,
                    sequence, unit, index, row, rows, row, 0, rows, next_rows, batch, inputs, state, hidden,
                    PROJECTION, ACCUMULATOR, PRECISION, ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
            if PHASE == ALL:
                tl.debug_barrier()


@triton.jit
def backward_tile(
    left, weight, resident, grad_output, grad_h_n, grad_c_n, output, hx, cx, gates, cells, carry,
    grad_projected, grad_q, grad_products, grad_hx, grad_cx, grad_h,
    sequence, first_unit, index, row, count, left_row, left_count, next_count, previous_row, previous_count,
    batch, width, depth,
    OF_STATE: tl.constexpr, MODE: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One step back of a tile's sequences and units.

    The products of left's rows, which begin at left_row, and weight (depth, width) give the gradient of h by way of the
    step after, if OF_STATE, else that of an LSTM's o * tanh(c) before its projection. Sequences up to next_count came
    from the step after; those of them that are not in this one have reached their initial state. No weight: a cell.
    """
    GATED: tl.constexpr = MODE >= LSTM
    SUMS: tl.constexpr = 4 if MODE == LSTM else 3
    number = sequence.to(tl.int64)
    column = first_unit + tl.arange(0, COLUMNS)
    unit = column[None, :]
    active = (sequence < count)[:, None]
    mask, came = active & (unit < width), (sequence < next_count)[:, None] & (unit < width)
    finished = came & ~active
    at = number[:, None] * width + unit
    at_row = row * width + at
    parity = tl.cast(index % 2, tl.int64)
    read, written = (1 - parity) * batch * width + at, parity * batch * width + at

    # All of this is read before the products, beside which its latency passes.
    if OF_STATE:
        output_grad = load_or_zeros(grad_output, at_row, mask)
        last_grad = load_or_zeros(grad_h_n, at, mask & ~came)
    if GATED:
        at_gates = (row + number)[:, None] * (4 * width) + unit
        first, second = load_or_zeros(gates, at_gates, mask), load_or_zeros(gates, at_gates + width, mask)
        third = load_or_zeros(gates, at_gates + 2 * width, mask)
        fourth = load_or_zeros(gates, at_gates + 3 * width, mask)
        at_previous, has_previous = previous_row * width + at, mask & (sequence < previous_count)[:, None]
        before = load_or_zeros(cells if MODE == LSTM else output, at_previous, has_previous)
        initial = load_or_zeros(cx if MODE == LSTM else hx, at, mask & ~has_previous)
        carried = load_or_zeros(None if weight is None else carry, read, came)
        if MODE == LSTM:
            after, last_c_grad = load_or_zeros(cells, at_row, mask), load_or_zeros(grad_c_n, at, mask & ~came)
    elif MODE != PROJECTION:
        after = load_or_zeros(output, at_row, mask)

    grad = tl.zeros((ROWS, COLUMNS), ACCUMULATOR)
    if weight is not None:
        grad = add_products(
            grad, left + (left_row + number) * depth, sequence < left_count,
            weight, resident, column, column < width, depth, width, PRECISION, DEPTH,
        )  # fmt: skip
    if OF_STATE:
        if MODE == GRU:
            grad += carried.to(ACCUMULATOR)
        store_as(grad_hx, at, grad, finished)
        grad += last_grad.to(ACCUMULATOR) + output_grad.to(ACCUMULATOR)
    if GATED:
        first, second = first.to(ACCUMULATOR), second.to(ACCUMULATOR)
        third, fourth = third.to(ACCUMULATOR), fourth.to(ACCUMULATOR)
        before = before.to(ACCUMULATOR) + initial.to(ACCUMULATOR)
        at_projected = (row + number)[:, None] * (SUMS * width) + unit
        if MODE == LSTM:
            grad_c = carried.to(ACCUMULATOR) + last_c_grad.to(ACCUMULATOR)
            store_as(grad_cx, at, grad_c, finished)
            tanh_c = tanh(after.to(ACCUMULATOR))
            grad_c += grad * fourth * ((1 - tanh_c) * (1 + tanh_c))
            store_as(carry, written, grad_c * second, mask)
            store_as(grad_projected, at_projected, grad_c * third * first * (1 - first), mask)
            store_as(grad_projected, at_projected + width, grad_c * before * second * (1 - second), mask)
            store_as(grad_projected, at_projected + 2 * width, grad_c * first * ((1 - third) * (1 + third)), mask)
            store_as(grad_projected, at_projected + 3 * width, grad * tanh_c * fourth * (1 - fourth), mask)
        else:
            grad_n = grad * (1 - second) * ((1 - third) * (1 + third))
            grad_z = grad * (before - third) * second * (1 - second)
            grad_r = grad_n * fourth * first * (1 - first)
            store_as(carry, written, grad * second, mask)
            store_as(grad_q, at_row, grad_n * first, mask)
            store_as(grad_projected, at_projected, grad_r, mask)
            store_as(grad_projected, at_projected + width, grad_z, mask)
            store_as(grad_projected, at_projected + 2 * width, grad_n, mask)
            at_products = (parity * batch + number)[:, None] * (3 * width) + unit
            store_as(grad_products, at_products, grad_r, mask)
            store_as(grad_products, at_products + width, grad_z, mask)
            store_as(grad_products, at_products + 2 * width, grad_n * first, mask)
    elif MODE == PROJECTION:
        store_as(grad_h, at_row, grad, mask)
    else:
        grad = activation_gradient(grad, after.to(ACCUMULATOR), TANH if MODE == RNN_TANH else RELU, 0.0)
        store_as(grad_projected, at_row, grad, mask)


@triton.jit(do_not_specialize=["step"])
def backward_kernel(
    grad_output, grad_h_n, grad_c_n, output, hx, cx, weight_hh, weight_hr, gates, cells, starts,
    grad_projected, grad_q, grad_products, grad_hx, grad_cx, grad_h, carry,
    step, count, batch, steps, hidden, state,
    MODE: tl.constexpr, REVERSE: tl.constexpr, PHASE: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """``count`` steps of the backward of forward_kernel, from the last one on; after them one more, which makes grad_hx
    and grad_cx.

    Shapes: as there; grad_projected (rows, G * H), grad_q (rows, H) a GRU's gradient of W_hn h, grad_products (2, B,
    3 * H) that of all W_h h after even and odd steps, grad_h (rows, P) the whole gradient of h where it is projected;
    carry (2, B, H): the gradient of c, or a GRU's of h by way of z. A cell has no weight_hh, carry is its result.

    Launches a 2D grid as forward_kernel; COLUMNS are units.
    """
    sequence = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gates_hidden = hidden * (4 if MODE == LSTM else 3 if MODE == GRU else 1)
    resident = None
    if RESIDENT:
        column = tl.arange(0, COLUMNS)
        resident = load_weights(weight_hh, column, column < state, 0, gates_hidden, state, DEPTH)
    for position in tl.range(step, step + count, num_stages=1):
        index = steps - 1 - position
        row, rows = rows_of(starts, batch, steps, index, REVERSE)
        next_row, next_rows = rows_of(starts, batch, steps, index + 1, REVERSE)
        previous_row, previous_rows = rows_of(starts, batch, steps, index - 1, REVERSE)
        left, left_row = grad_projected, next_row
        if MODE == GRU:
            left, left_row = grad_products, tl.cast((position + 1) % 2, tl.int64) * batch
        if weight_hr is not None and PHASE != GATES:
            for unit in tl.range(tl.program_id(1) * COLUMNS, state, tl.num_programs(1) * COLUMNS, num_stages=1):
                backward_tile(
                    left, weight_hh, None, grad_output, grad_h_n, None, None, None, None, None, None, None,
                    None, None, None, grad_hx, None, grad_h,
                    sequence, unit, position, row, rows, left_row, next_rows, next_rows, previous_row, previous_rows,
                    batch, state, gates_hidden,
                    True, PROJECTION, ACCUMULATOR, PRECISION, ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
            if PHASE == ALL:
                tl.debug_barrier()  # what the next loads read has been stored by other threads
        if PHASE != PROJECTIONS:
            PROJECTED: tl.constexpr = weight_hr is not None
            for unit in tl.range(tl.program_id(1) * COLUMNS, hidden, tl.num_programs(1) * COLUMNS, num_stages=1):
                backward_tile(
                    grad_h if PROJECTED else left, weight_hr if PROJECTED else weight_hh, resident,
                    grad_output, grad_h_n, grad_c_n, output, hx, cx, gates, cells, carry,
                    grad_projected, grad_q, grad_products, grad_hx, grad_cx, grad_h,
                    sequence, unit, position, row, rows, row if PROJECTED else left_row,
                    rows if PROJECTED else next_rows, next_rows, previous_row, previous_rows,
                    batch, hidden, state if PROJECTED else gates_hidden,
                    not PROJECTED, MODE, ACCUMULATOR, PRECISION, ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
            if PHASE == ALL:
                tl.debug_barrier()


# -------------------------------------------------------------------------------------------------------- block sizes

# By precision, forward; a column is one gate's sum.
TILES = {
    "half": (
        Tile(16, 16, 128, 4, 0.25),  # four units: a layer of 512 fills 128 multiprocessors
        Tile(16, 32, 128, 4, 0.5),
        Tile(16, 64, 128, 4, 0.5),
        Tile(16, 256, 64, 8, 0.5),  # the most sums for states read once, where one program has all units
        Tile(64, 32, 64, 4, 0.7),  # many sequences share the weights that are read
        Tile(64, 128, 64, 8, 1.0),
    ),
    "tf32": (
        Tile(16, 16, 64, 4, 0.25),
        Tile(16, 32, 64, 4, 0.5),
        Tile(16, 128, 32, 8, 0.5),
        Tile(64, 32, 32, 4, 0.7),
        Tile(64, 128, 32, 8, 1.0),
    ),
    "float32": (
        Tile(16, 16, 32, 4, 0.25),  # no tensor cores: a product at a time for each sum
        Tile(16, 64, 32, 8, 1.0),
        Tile(64, 32, 16, 8, 1.0),
    ),
    "float64": (
        Tile(16, 16, 16, 4, 0.5),
        Tile(32, 32, 16, 8, 1.0),
    ),
}
# Backward; a column is a unit, and each has up to twelve numbers in registers.
BACKWARD_TILES = {
    "half": (
        Tile(16, 16, 128, 4, 0.25),
        Tile(16, 32, 128, 4, 0.5),
        Tile(16, 128, 64, 8, 0.5),
        Tile(64, 32, 64, 8, 0.7),
    ),
    "tf32": (
        Tile(16, 16, 64, 4, 0.25),
        Tile(16, 32, 64, 4, 0.5),
        Tile(16, 64, 32, 8, 0.5),
        Tile(64, 32, 32, 8, 0.7),
    ),
    "float32": (
        Tile(16, 16, 32, 4, 0.25),
        Tile(16, 64, 16, 8, 0.5),
        Tile(32, 32, 16, 8, 1.0),
    ),
    "float64": (
        Tile(16, 16, 16, 4, 0.5),
        Tile(16, 32, 16, 8, 1.0),
    ),
}
# Of a multiprocessor, a clock: products of one sum, and bytes from L2 and from shared memory.
RATES = {"half": 1024, "tf32": 512, "float32": 128, "float64": 64}
L2_BYTES, SHARED_BYTES = 64, 128
# Clocks: the latency of a tile, from its first load to its last store; and a launch, about 6 us.
LATENCY = 1500
LAUNCH = 10000
MOST_STAGES = 4


@dataclass(frozen=True)
class Choice:
    """How a recurrence runs: its tile, whether one program has all units and steps, with its weights kept, and the
    stages of its pipeline."""

    tile: Tile
    whole: bool
    resident: bool
    stages: int


def usable_tiles(dtype, allow_tf32, backward, wide):
    """The tiles that choose chooses from."""
    tiles = (BACKWARD_TILES if backward else TILES)[precision(dtype, allow_tf32)]
    if wide:
        return tiles
    # What is read element by element has addresses of its own in registers: so many bytes a thread.
    most = 40 if backward else 48
    tiles = [replace(tile, depth=max(tile.depth // 2, 16)) for tile in tiles if tile.rows == 16]
    return [t for t in tiles if (t.rows + t.columns) * t.depth * dtype.itemsize <= most * t.warps * 32]


def stages_that_fit(tile, element_size, device):
    """How deep the pipeline can be."""
    stage = (tile.rows + tile.columns) * tile.depth * element_size
    # A tile of sums goes through shared memory on its way to the gates.
    return min(MOST_STAGES, (device.shared_memory - tile.rows * tile.columns * 4 - 1024) // stage)


def resident_tile(columns, depth, kind, element_size, device):
    """The tile of a program that keeps all weights in shared memory; None where they do not fit, or are no operands of
    tensor cores, which alone read them from there in place."""
    if kind not in ("half", "tf32"):
        return None
    columns, depth = (max(triton.next_power_of_2(extent), 16) for extent in (columns, depth))
    tile = Tile(16, columns, depth, 4 if columns <= 128 else 8, 0.5)
    shared = (columns + tile.rows) * depth * element_size + tile.rows * columns * 2
    return tile if shared <= device.shared_memory - 4096 else None


@functools.lru_cache(maxsize=4096)
def choose(batch, columns, depth, dtype, allow_tf32, steps, backward, wide, resident, device):
    """The choice with the least estimated time for steps of (batch, depth) @ (depth, columns). Pure arithmetic.

    steps: 1 for a cell; wide: all is read by 16 bytes; resident: whether weights may be kept.
    """
    kind, size = precision(dtype, allow_tf32), dtype.itemsize
    best = None

    def consider(tile, whole, is_resident):
        nonlocal best
        stages = 1 if is_resident else stages_that_fit(tile, size, device)
        if stages < 1:
            return
        tiles, batches = triton.cdiv(columns, tile.columns), triton.cdiv(batch, tile.rows)
        products = tile.rows * tile.columns * depth / (RATES[kind] * tile.speed)
        loads = (
            tile.rows * size / L2_BYTES + tile.columns * size / (SHARED_BYTES if is_resident else L2_BYTES)
        ) * depth
        clocks = LATENCY + max(products, loads)
        if whole:
            clocks *= tiles * triton.cdiv(batches, device.multiprocessors)
        else:
            clocks = clocks * triton.cdiv(tiles * batches, device.multiprocessors) + LAUNCH
        if best is None or clocks < best[0]:
            best = clocks, Choice(tile, whole, is_resident, stages)

    for tile in usable_tiles(dtype, allow_tf32, backward, wide):
        for whole in (False, True) if steps > 1 else (False,):
            consider(tile, whole, False)
    kept = resident_tile(columns, depth, kind, size, device) if wide and resident and steps > 1 else None
    if kept:
        consider(kept, True, True)
    return best[1]


# ----------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Steps:
    """Launches that follow each other, once for each value of their argument ``step`` up to ``count``."""

    launches: list
    count: int

    def run(self):
        """Finds a launch's compiled kernel once: to find it anew takes longer than a step."""
        compiled = [launch.run() for launch in self.launches]
        repeats = [_repeat(*pair) for pair in zip(self.launches, compiled, strict=True)] if self.count > 1 else []
        for step in range(1, self.count):
            for repeat in repeats:
                repeat(step)


def _repeat(launch, compiled):
    """Runs a launch with another ``step``, for which its code is not specialised."""
    if compiled is None:  # in the interpreter
        return lambda step: replace(launch, arguments=launch.arguments | {"step": step}).run()
    names, values, run = launch.kernel.arg_names, launch.arguments | launch.constants, compiled[(*launch.grid, 1)]
    position = names.index("step")
    first, rest = [values[name] for name in names[:position]], [values[name] for name in names[position + 1 :]]
    return lambda step: run(*first, step, *rest)


def _steps(kernel, arguments, constants, phases, count, choice, allow_tf32, device):
    """The launches of ``count`` steps; phases: those of one step, and over how many tiles of units each goes."""
    tile, dtype = choice.tile, arguments["hx"].dtype
    kind = precision(dtype, allow_tf32)
    arguments = arguments | {"step": 0, "count": count if choice.whole else 1}
    constants = constants | {
        "ACCUMULATOR": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "RESIDENT": choice.resident,
    }  # fmt: skip
    multiplies = arguments["weight_hh"] is not None
    plan = (
        replace(linear.plan(tile, kind, False, device), programs=1, limits_registers=True)
        if multiplies
        else Plan(access_bytes=16 if device.capability else 8)
    )
    batches = triton.cdiv(arguments["batch"], tile.rows)
    launches = [
        Launch(
            kernel, (batches, across), arguments, constants | {"PHASE": phase},
            device, tile.warps, choice.stages, plan,
        )
        for phase, across in ([(ALL.value, 1)] if choice.whole else phases)
    ]  # fmt: skip
    return Steps(launches, 1 if choice.whole else count)


def _carry(hx, numbers, hidden):
    """Room for what a step leaves to the next beside the results, after even and odd steps."""
    dtype = torch.float64 if hx.dtype == torch.float64 else torch.float32
    return torch.empty((2, hx.shape[0], hidden), dtype=dtype, device=hx.device) if numbers else None


def forward_steps(
    projected, hx, cx, weight_hh, bias_hn, weight_hr, starts, output, h_n, c_n, gates, cells, steps, mode, reverse,
    *, allow_tf32, device=None, choice=None,
):  # fmt: skip
    """The launches of recurrence, not yet run."""
    device = device or device_limits(hx.device)
    (batch, state), gated = hx.shape, mode >= LSTM.value
    columns = weight_hh.shape[0] // (3 if mode == GRU.value else 1) * (4 if mode == GRU.value else 1)
    hidden = columns // 4 if gated else columns
    wide = all(is_wide(matrix) for matrix in (weight_hh, hx, output, weight_hr))
    options = steps, False, wide, weight_hr is None, device
    choice = choice or choose(batch, columns, state, hx.dtype, allow_tf32, *options)
    arguments = {
        "input": None, "weight_ih": None, "projected": projected, "hx": hx, "cx": cx,
        "weight_hh": weight_hh, "bias": bias_hn, "weight_hr": weight_hr, "starts": starts,
        "output": output, "h_n": h_n, "c_n": c_n, "gates": gates, "cells": cells,
        "carry": _carry(hx, gated, hidden), "unprojected": None if weight_hr is None else hx.new_empty(batch, hidden),
        "batch": batch, "steps": steps, "inputs": 0, "hidden": hidden, "state": state,
    }  # fmt: skip
    phases = [(GATES.value, triton.cdiv(columns, choice.tile.columns))]
    if weight_hr is not None:
        phases.append((PROJECTIONS.value, triton.cdiv(state, choice.tile.columns)))
    constants = {"MODE": mode, "REVERSE": reverse}
    return _steps(forward_kernel, arguments, constants, phases, steps, choice, allow_tf32, device)


def backward_steps(
    grad_output, grad_h_n, grad_c_n, output, hx, cx, weight_hh, weight_hr, gates, cells, starts,
    grad_projected, grad_q, grad_hx, grad_cx, grad_h, steps, mode, reverse,
    *, allow_tf32, device=None, choice=None,
):  # fmt: skip
    """The launches of recurrence_backward, not yet run."""
    device = device or device_limits(hx.device)
    (batch, state), depth = hx.shape, weight_hh.shape[0]
    hidden = depth // (1, 1, 4, 3)[mode]
    wide = all(is_wide(matrix) for matrix in (weight_hh, grad_projected, weight_hr))
    options = steps, True, wide, weight_hr is None, device
    choice = choice or choose(batch, state, depth, hx.dtype, allow_tf32, *options)
    arguments = {
        "grad_output": grad_output, "grad_h_n": grad_h_n, "grad_c_n": grad_c_n, "output": output, "hx": hx, "cx": cx,
        "weight_hh": weight_hh, "weight_hr": weight_hr, "gates": gates, "cells": cells, "starts": starts,
        "grad_projected": grad_projected, "grad_q": grad_q,
        "grad_products": hx.new_empty(2, batch, depth) if mode == GRU.value else None,
        "grad_hx": grad_hx, "grad_cx": grad_cx, "grad_h": grad_h, "carry": _carry(hx, mode >= LSTM.value, hidden),
        "batch": batch, "steps": steps, "hidden": hidden, "state": state,
    }  # fmt: skip
    phases = [(GATES.value, triton.cdiv(hidden, choice.tile.columns))]
    if weight_hr is not None:
        phases.insert(0, (PROJECTIONS.value, triton.cdiv(state, choice.tile.columns)))
    constants = {"MODE": mode, "REVERSE": reverse}
    return _steps(backward_kernel, arguments, constants, phases, steps + 1, choice, allow_tf32, device)


def cell_steps(
    input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, h, c, gates, mode, *, allow_tf32, device=None, choice=None
):  # fmt: skip
    """The launch of recurrent_cell, not yet run."""
    device = device or device_limits(hx.device)
    (batch, hidden), gated = hx.shape, mode >= LSTM.value
    columns = hidden * 4 if gated else hidden
    depth = hidden + input.shape[1]
    wide = all(is_wide(matrix) for matrix in (input, hx, weight_ih, weight_hh))
    choice = choice or choose(batch, columns, depth, hx.dtype, allow_tf32, 1, False, wide, False, device)
    arguments = {
        "input": input, "weight_ih": weight_ih, "projected": bias_ih, "hx": hx, "cx": cx,
        "weight_hh": weight_hh, "bias": bias_hh, "weight_hr": None, "starts": None,
        "output": h, "h_n": None, "c_n": c, "gates": gates, "cells": None, "carry": None, "unprojected": None,
        "batch": batch, "steps": 1, "inputs": input.shape[1], "hidden": hidden, "state": hidden,
    }  # fmt: skip
    phases = [(GATES.value, triton.cdiv(columns, choice.tile.columns))]
    return _steps(forward_kernel, arguments, {"MODE": mode, "REVERSE": False}, phases, 1, choice, allow_tf32, device)


# By element size, of a program that only takes the gates' gradients: 16 bytes of each array a thread.
CELL_TILES = {2: Tile(16, 64, 16, 4, 1.0), 4: Tile(8, 64, 16, 4, 1.0), 8: Tile(4, 64, 16, 4, 1.0)}


def cell_backward_steps(
    grad_h, grad_c, hx, cx, h, c, gates, grad_input, grad_hidden, direct, grad_cx, mode, *, device=None
):  # fmt: skip
    """The launch of recurrent_cell_backward, not yet run."""
    device = device or device_limits(hx.device)
    batch, hidden = hx.shape
    arguments = {
        "grad_output": grad_h, "grad_h_n": None, "grad_c_n": grad_c, "output": h, "hx": hx, "cx": cx,
        "weight_hh": None, "weight_hr": None, "gates": gates, "cells": c, "starts": None,
        "grad_projected": grad_input, "grad_q": None, "grad_products": grad_hidden, "grad_hx": None, "grad_cx": None,
        "grad_h": None, "carry": direct if mode == GRU.value else grad_cx,
        "batch": batch, "steps": 1, "hidden": hidden, "state": hidden,
    }  # fmt: skip
    choice = Choice(CELL_TILES[hx.element_size()], False, False, 1)
    phases = [(GATES.value, triton.cdiv(hidden, choice.tile.columns))]
    return _steps(backward_kernel, arguments, {"MODE": mode, "REVERSE": False}, phases, 1, choice, False, device)


# -------------------------------------------------------------------------------------------------------------- calls


def recurrence(*tensors_and_options, allow_tf32):
    """A layer in one direction: fills output, h_n, c_n, gates and cells.

    Args, as forward_steps has them: projected, hx, cx, weight_hh, bias_hn, weight_hr, starts, then the results, all
    contiguous and of one dtype, float32, bfloat16, float16 or float64 (shapes: forward_kernel); steps, mode, reverse.
    """
    forward_steps(*tensors_and_options, allow_tf32=allow_tf32).run()


def recurrence_backward(*tensors_and_options, allow_tf32):
    """Its gradients: fills grad_projected, grad_q, grad_hx, grad_cx and grad_h.

    Args, as backward_steps has them: grad_output, grad_h_n, grad_c_n, output, hx, cx, weight_hh, weight_hr, gates,
    cells, starts, then the results (shapes: backward_kernel); steps, mode, reverse.
    """
    backward_steps(*tensors_and_options, allow_tf32=allow_tf32).run()


def recurrent_cell(*tensors_and_mode, allow_tf32):
    """A cell: fills h (B, H), c (B, H) and gates (B, 4 * H).

    Args, as cell_steps has them: input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, then the results; mode.
    """
    cell_steps(*tensors_and_mode, allow_tf32=allow_tf32).run()


def recurrent_cell_backward(*tensors_and_mode):
    """Its gates' gradients: fills grad_input (B, G * H), a GRU's grad_hidden (B, 3 * H) and direct (B, H), by way of z
    alone, and an LSTM's grad_cx (B, H).

    Args, as cell_backward_steps has them: grad_h, grad_c, hx, cx, h, c, gates, then the results; mode.
    """
    cell_backward_steps(*tensors_and_mode).run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: of an LSTM in bfloat16 one step, a
    cell, and the loop over steps with its weights kept; with every that loop, which takes more registers than a step,
    with each tile, and all modes and projections, or in other dtypes the LSTM."""
    launches = {}

    def add(name, direction, dtype, mode, hidden, choice=None, kind="layer", allow_tf32=False):
        options = {"allow_tf32": allow_tf32, "device": device, "choice": choice}
        precision_name = "tf32" if allow_tf32 else str(dtype).removeprefix("torch.")
        (launch,) = _example(direction, dtype, mode, hidden, kind, options).launches
        launches[f"{direction} {precision_name} {MODE_NAMES[mode]} {name}"] = launch

    def add_kept(direction, dtype, mode, hidden, allow_tf32=False):
        extents = hidden * (4 if mode >= LSTM.value else 1), hidden
        kind = precision(dtype, allow_tf32)
        columns, depth = extents if direction == "forward" else extents[::-1]
        if tile := resident_tile(columns, depth, kind, dtype.itemsize, device):
            add(f"kept {hidden}", direction, dtype, mode, hidden, Choice(tile, True, True, 1), allow_tf32=allow_tf32)

    for direction in ("forward", "backward"):
        for dtype, allow_tf32 in (
            (torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False),
            (torch.float64, False),
        ):  # fmt: skip
            plain = dtype == torch.bfloat16
            if plain:
                add("step", direction, dtype, LSTM.value, 1024)
            if plain or every:
                add("cell", direction, dtype, LSTM.value, 1024, kind="cell", allow_tf32=allow_tf32)
                add_kept(direction, dtype, LSTM.value, 64, allow_tf32)
            for mode in (RNN_TANH.value, LSTM.value, GRU.value) if plain else (LSTM.value,):
                if not every:
                    continue
                for hidden in (32, 128, 256):
                    add_kept(direction, dtype, mode, hidden, allow_tf32)
                for aligned, hidden in ((True, 1024), (False, 1000)):
                    for tile in usable_tiles(dtype, allow_tf32, direction == "backward", aligned):
                        choice = Choice(tile, True, False, stages_that_fit(tile, dtype.itemsize, device))
                        name = f"{tile.rows}x{tile.columns}x{tile.depth}" + " unaligned" * (not aligned)
                        add(name, direction, dtype, mode, hidden, choice, allow_tf32=allow_tf32)
                        if plain and mode == LSTM.value:
                            add(f"{name} projected", direction, dtype, mode, hidden, choice, kind="projected")
                        if plain and mode == GRU.value and direction == "forward":  # it has sums for both parts of n
                            choice = replace(choice, whole=False)
                            add(f"{name} cell", direction, dtype, mode, hidden, choice, kind="cell")
    return launches


def _example(direction, dtype, mode, hidden, kind, options, batch=32, steps=16):
    """The launches of a layer, of a packed one with a projection, or of a cell."""
    rows, state = batch if kind == "cell" else batch * steps, (batch, hidden)
    is_lstm, is_gru = mode == LSTM.value, mode == GRU.value
    columns = hidden * (1, 1, 4, 3)[mode]

    def tensor(*shape, given=True):
        return torch.empty(shape, dtype=dtype, device="meta") if given else None

    h, c, grad_projected = tensor(*state), tensor(*state, given=is_lstm), tensor(rows, columns)
    weight, bias = tensor(columns, hidden), tensor(columns)
    output, gates = tensor(rows, hidden), tensor(rows, 4 * hidden, given=mode >= LSTM.value)
    cells, grad_q = tensor(rows, hidden, given=is_lstm), tensor(rows, hidden, given=is_gru)
    if kind == "cell" and direction == "forward":
        return cell_steps(h, h, c, weight, weight, bias, bias, h, c, gates, mode, **options)
    if kind == "cell":
        grads = grad_projected, tensor(rows, columns, given=is_gru), grad_q, c
        return cell_backward_steps(h, c, h, c, h, c, gates, *grads, mode, device=options["device"])
    weight_hr = tensor(hidden, hidden, given=kind == "projected")
    starts = torch.empty(steps + 1, dtype=torch.int64, device="meta") if kind == "projected" else None
    if direction == "forward":
        inputs = grad_projected, h, c, weight, tensor(hidden, given=is_gru), weight_hr, starts
        return forward_steps(*inputs, output, h, c, gates, cells, steps, mode, False, **options)
    inputs = output, h, c, output, h, c, weight, weight_hr, gates, cells, starts
    grads = grad_projected, grad_q, h, c, None if weight_hr is None else output
    return backward_steps(*inputs, *grads, steps, mode, False, **options)
