"""Attention without the matrix of scores in memory: the softmax of a block of keys is corrected when the next block has
larger scores (Milakov and Gimelshein, 2018; Dao et al., 2022), and the backward makes the scores again from their
logsumexp. What attention is: fastdl/ops/attention.py.

A program has a block of one head's queries and goes over the blocks of keys that they see; for the gradients of keys
and values it has a block of keys and goes over the queries, of all heads that share them, so that no two programs add
to one result. Blocks that the edge of what is seen cuts come before and after those that are seen whole, which are
spared the tests.

Shapes: query (B, H, L, D), key (B, Hk, S, D), value (B, Hk, S, E) of any strides; output (B, H, L, E) with contiguous
rows; logsumexp and delta (B, H, L) contiguous; mask (B, H, L, S) with strides of 0 where it is broadcast; slopes (1 or
B, H). With offsets (sequences + 1) B is 1, and each sequence has its rows of L and of S. Gradients are shaped as what
they are of, with contiguous rows.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import Launch, Plan, device_limits
from .linear import precision

LOG2E = tl.constexpr(math.log2(math.e))

# ------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def program_of(blocks, heads, together):
    """(block, head) of this program, where ``together`` heads take their blocks of one number side by side."""
    number = tl.program_id(0)
    first = number // (blocks * together) * together
    rest = number % (blocks * together)
    width = tl.minimum(heads - first, together)
    return rest // width, first + rest % width


@triton.jit
def span_of(offsets, sequence, rows):
    """(first row, rows) of a sequence."""
    if offsets is None:
        first = tl.cast(0, tl.int64)
        count = rows
    else:
        first = tl.load(offsets + sequence).to(tl.int64)
        count = (tl.load(offsets + sequence + 1).to(tl.int64) - first).to(tl.int32)
    return first, count


@triton.jit
def blocks_of(
    first, last, before, after, length, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    """Where the blocks begin that any of the positions ``first`` to ``last`` has to do with, where those that all of
    them have whole begin and end, and where the last one ends. A position has ``before`` before it and ``after``
    after it."""
    begin, whole_begin = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    end, whole_end = length, length
    if HAS_BEFORE:
        begin = tl.maximum(first - before, 0) // BLOCK * BLOCK
        whole_begin = tl.cdiv(tl.maximum(last - before, 0), BLOCK) * BLOCK
    if HAS_AFTER:
        end = tl.minimum(tl.maximum(last + after + 1, 0), length)
        whole_end = tl.minimum(tl.maximum(first + after + 1, 0), length)
    return begin, whole_begin, whole_end // BLOCK * BLOCK, end


@triton.jit
def part_of(part: tl.constexpr, begin, whole_begin, whole_end, end):
    """The bounds of the blocks cut at the start (part 0), of the whole ones (1) and of those cut at the end (2)."""
    if part == 0:
        low, high = begin, tl.minimum(whole_begin, end)
    elif part == 1:
        low, high = whole_begin, whole_end
    else:
        low, high = tl.maximum(whole_begin, whole_end), end
    return low, high


@triton.jit
def place_of(tensor, batch, head, first, batch_stride, head_stride, row_stride, DESCRIPTOR: tl.constexpr):
    """What load_rows takes: the address of a head's row ``first``, or the descriptor itself."""
    if DESCRIPTOR:
        place = tensor
    else:
        place = tensor + (
            tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride + first * row_stride
        )
    return place


@triton.jit
def load_rows(
    place, batch, head, row, rows, row_stride, column_stride,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """The rows from ``row`` on of a head, (ROWS, COLUMNS), with zeros beyond its rows and its size; INSIDE: there are
    none beyond its rows."""
    if DESCRIPTOR:
        tile = tl.reshape(place.load([batch, head, row, 0]), (ROWS, COLUMNS))
    else:
        index = tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, COLUMNS)[None, :]
        # The start moves in a loop over rows; what is added to it does not.
        start = place + tl.cast(row, tl.int64) * row_stride
        address = start + (index.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride)
        if INSIDE:
            if SIZE == COLUMNS:
                tile = tl.load(address)
            else:
                tile = tl.load(address, mask=column < SIZE, other=0.0)
        elif SIZE == COLUMNS:
            tile = tl.load(address, mask=index < rows - row, other=0.0)
        else:
            tile = tl.load(address, mask=(index < rows - row) & (column < SIZE), other=0.0)
    return tile


@triton.jit
def store_rows(
    tensor, tile, batch, head, first, row, rows, batch_stride, head_stride, row_stride,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores the rows of a head from ``row`` on."""
    index = row + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    start = tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride + first * row_stride
    mask = (index < rows) if SIZE == COLUMNS else (index < rows) & (column < SIZE)
    address = tensor + start + index.to(tl.int64) * row_stride + column
    tl.store(address, tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def change_scores(
    products, i, j, own, queries, keys, shift, left, right, slope, mask, mask_row_stride, mask_column_stride,
    EDGE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOOLEAN: tl.constexpr,
    SCALED: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The scores of queries i for keys j, with or without (SCALED) a factor left out that all of them have.

    own: which of the program's own queries or keys are there; EDGE: what it goes over may not be seen, or not be there.
    """
    z = products
    if SCALED:
        # A product of its own: contracted with a later difference it would not be what the forward rounded.
        z = tl.fma(z, tl.full((), SCALE, z.dtype), 0.0)
    if slope is not None:
        z -= slope * tl.abs(i + shift - j).to(z.dtype)
    inside = own
    if EDGE:
        inside = (i < queries) & (j < keys)
    if mask is not None:
        # Read where nothing is seen, too: what is read there is not used.
        address = mask + (i.to(tl.int64) * mask_row_stride + j.to(tl.int64) * mask_column_stride)
        given = tl.load(address, mask=inside, other=0)
        if BOOLEAN:
            z = tl.where(given != 0, z, float("-inf"))
        else:
            z += given.to(z.dtype)
    if EDGE:
        seen = inside
        if LEFT:
            seen &= j >= i + shift - left
        if RIGHT:
            seen &= j <= i + shift + right
        z = tl.where(seen, z, float("-inf"))
    return z


@triton.jit
def is_kept(
    seed, head, row, key,
    THRESHOLD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which probabilities dropout keeps, of the queries from ``row`` and the keys from ``key`` on: (QUERIES, KEYS), or
    TRANSPOSED. A call of Philox serves four queries."""
    quad = row // 4 + tl.arange(0, QUERIES // 4)
    j = key + tl.arange(0, KEYS)
    if TRANSPOSED:
        first, second, third, fourth = tl.philox(seed, j[:, None], quad[None, :], head, 0)
    else:
        first, second, third, fourth = tl.philox(seed, j[None, :], quad[:, None], head, 0)
    even = tl.join((first >= THRESHOLD).to(tl.int8), (third >= THRESHOLD).to(tl.int8))
    odd = tl.join((second >= THRESHOLD).to(tl.int8), (fourth >= THRESHOLD).to(tl.int8))
    kept = tl.join(even, odd)
    if TRANSPOSED:
        kept = tl.reshape(kept, (KEYS, QUERIES))
    else:
        kept = tl.reshape(tl.permute(kept, (0, 2, 3, 1)), (QUERIES, KEYS))
    return kept != 0


@triton.jit
def slope_of(slopes, batch, head, batch_stride, COMPUTE: tl.constexpr):
    """ALiBi's slope of a head, or None."""
    if slopes is None:
        slope = None
    else:
        slope = tl.load(slopes + batch * batch_stride + head).to(COMPUTE)
    return slope


@triton.jit
def mask_of(mask, batch, head, batch_stride, head_stride):
    """The address of a head's mask, or None."""
    if mask is None:
        place = None
    else:
        place = mask + (tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride)
    return place


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=["queries", "keys", "left", "right", "blocks", "together"])
def forward_kernel(
    query, key, value, mask, slopes, query_offsets, key_offsets, seed, output, logsumexp,
    query_batch_stride, query_head_stride, query_row_stride, query_column_stride,
    key_batch_stride, key_head_stride, key_row_stride, key_column_stride,
    value_batch_stride, value_head_stride, value_row_stride, value_column_stride,
    output_batch_stride, output_head_stride, output_row_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride, slopes_batch_stride,
    sequences, heads, group, queries, keys, left, right, blocks, together,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, SCALE: tl.constexpr, SCALED: tl.constexpr, FACTOR: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BOOLEAN: tl.constexpr,
    THRESHOLD: tl.constexpr, KEPT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """output and logsumexp.

    Launches a 1D grid with a program for each block of queries of each head of each sequence, the last ones first:
    under causality they have the most work.
    """
    block, number = program_of(blocks, sequences * heads, together)
    sequence, head = number // heads, number % heads
    row = (blocks - 1 - block) * BLOCK_QUERIES
    first_query, rows = span_of(query_offsets, sequence, queries)
    first_key, columns = span_of(key_offsets, sequence, keys)
    batch = sequence
    if query_offsets is not None:
        batch = sequence * 0
        if row >= rows:
            return
    shift = columns - rows if BOTTOM_RIGHT else 0
    key_head = head // group

    q_place = place_of(
        query, batch, head, first_query, query_batch_stride, query_head_stride, query_row_stride, DESCRIPTORS
    )
    k_place = place_of(
        key, batch, key_head, first_key, key_batch_stride, key_head_stride, key_row_stride, DESCRIPTORS
    )  # fmt: skip
    v_place = place_of(
        value, batch, key_head, first_key, value_batch_stride, value_head_stride, value_row_stride, DESCRIPTORS
    )
    head_mask = mask_of(mask, sequence, head, mask_batch_stride, mask_head_stride)
    slope = slope_of(slopes, sequence, head, slopes_batch_stride, COMPUTE)
    if seed is not None:
        own_seed = tl.load(seed)
    i = row + tl.arange(0, BLOCK_QUERIES)

    q = load_rows(
        q_place, batch, head, row, rows, query_row_stride, query_column_stride,
        SIZE, BLOCK_QUERIES, BLOCK_SIZE, DESCRIPTORS, False,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_QUERIES, BLOCK_VALUE_SIZE), COMPUTE)
    total = tl.zeros((BLOCK_QUERIES,), COMPUTE)
    top = tl.full((BLOCK_QUERIES,), float("-inf"), COMPUTE)
    begin, whole_begin, whole_end, end = blocks_of(
        row + shift, tl.minimum(row + BLOCK_QUERIES, rows) - 1 + shift, left, right, columns, LEFT, RIGHT, BLOCK_KEYS
    )
    for part in tl.static_range(0 if LEFT else 1, 3):
        low, high = part_of(part, begin, whole_begin, whole_end, end)
        for start in tl.range(low, high, BLOCK_KEYS):
            k = load_rows(
                k_place, batch, key_head, start, columns, key_row_stride, key_column_stride,
                SIZE, BLOCK_KEYS, BLOCK_SIZE, DESCRIPTORS, part == 1,
            )  # fmt: skip
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=COMPUTE)
            j = start + tl.arange(0, BLOCK_KEYS)
            z = change_scores(
                products, i[:, None], j[None, :], (i < rows)[:, None], rows, columns, shift, left, right, slope,
                head_mask, mask_row_stride, mask_column_stride, part != 1, LEFT, RIGHT, BOOLEAN, SCALED, SCALE,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(z, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that has seen nothing but masks
            # The difference first, then the factor: exact where scores are so large that a product's rounding is not.
            p = tl.exp2((z - base[:, None]) * FACTOR)
            decay = tl.exp2((top - base) * FACTOR)
            total = total * decay + tl.sum(p, 1)
            if seed is not None:
                kept = is_kept(own_seed, number, row, start, THRESHOLD, BLOCK_QUERIES, BLOCK_KEYS, False)
                p = tl.where(kept, p, 0.0)
            sums = sums * decay[:, None]
            v = load_rows(
                v_place, batch, key_head, start, columns, value_row_stride, value_column_stride,
                VALUE_SIZE, BLOCK_KEYS, BLOCK_VALUE_SIZE, DESCRIPTORS, part == 1,
            )  # fmt: skip
            sums = tl.dot(p.to(v.dtype), v, sums, input_precision=PRECISION, out_dtype=COMPUTE)
            top = new_top

    unseen = total == 0
    total = tl.where(unseen, 1.0, total)
    sums = sums * (KEPT / total)[:, None]
    store_rows(
        output, sums, batch, head, first_query, row, rows, output_batch_stride, output_head_stride, output_row_stride,
        VALUE_SIZE, BLOCK_QUERIES, BLOCK_VALUE_SIZE,
    )  # fmt: skip
    highest = top if SCALED else top * SCALE
    logarithm = tl.where(unseen, float("-inf"), highest + tl.log(total))
    at = (tl.cast(batch, tl.int64) * heads + head) * queries + first_query + i
    tl.store(logsumexp + at, logarithm, mask=i < rows)


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit
def probabilities(z, base, EXACT: tl.constexpr, FACTOR: tl.constexpr):
    """From scores and base_of's logsumexp."""
    # One operation, but beyond 2^24 its rounding is that of a whole power of two; EXACT has three.
    return tl.exp2((z - base) * FACTOR) if EXACT else tl.exp2(z * FACTOR - base)


@triton.jit
def load_numbers(address, count, NUMBERS: tl.constexpr, INSIDE: tl.constexpr):
    """Numbers that lie side by side, zeros from ``count`` on; INSIDE: all of them are there."""
    index = tl.arange(0, NUMBERS)
    if INSIDE:
        numbers = tl.load(address + index)
    else:
        numbers = tl.load(address + index, mask=index < count, other=0.0)
    return numbers


@triton.jit
def base_of(logsumexp, count, NUMBERS: tl.constexpr, INSIDE: tl.constexpr, EXACT: tl.constexpr):
    """What probabilities takes: rows that see nothing, whose scores are all -infinity, have 0 there."""
    base = load_numbers(logsumexp, count, NUMBERS, INSIDE)
    base = tl.where(base == float("-inf"), 0.0, base)
    return base if EXACT else base * LOG2E


@triton.jit(do_not_specialize=["blocks"])
def delta_kernel(
    grad_output, output, grad_logsumexp, delta,
    grad_batch_stride, grad_head_stride, grad_row_stride, grad_column_stride,
    output_batch_stride, output_head_stride, output_row_stride, output_column_stride,
    heads, rows, blocks,
    VALUE_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(grad_output * output) - grad_logsumexp, which may be None.

    Launches a 1D grid with a program for each block of each head's rows.
    """
    COMPUTE: tl.constexpr = delta.dtype.element_ty
    number, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_ROWS
    batch, head = number // heads, number % heads
    first = tl.cast(0, tl.int64)
    grad_place = place_of(
        grad_output, batch, head, first, grad_batch_stride, grad_head_stride, grad_row_stride, False
    )  # fmt: skip
    place = place_of(output, batch, head, first, output_batch_stride, output_head_stride, output_row_stride, False)
    grad = load_rows(
        grad_place, batch, head, row, rows, grad_row_stride, grad_column_stride,
        VALUE_SIZE, BLOCK_ROWS, BLOCK_VALUE_SIZE, False, False,
    )  # fmt: skip
    o = load_rows(
        place, batch, head, row, rows, output_row_stride, output_column_stride,
        VALUE_SIZE, BLOCK_ROWS, BLOCK_VALUE_SIZE, False, False,
    )  # fmt: skip
    total = tl.sum(grad.to(COMPUTE) * o.to(COMPUTE), 1)
    i = row + tl.arange(0, BLOCK_ROWS)
    at = tl.cast(number, tl.int64) * rows + i
    if grad_logsumexp is not None:
        total -= tl.load(grad_logsumexp + at, mask=i < rows, other=0.0)
    tl.store(delta + at, total, mask=i < rows)


@triton.jit(do_not_specialize=["queries", "keys", "left", "right", "blocks", "together"])
def query_gradient_kernel(
    grad_output, query, key, value, mask, slopes, query_offsets, key_offsets, seed, logsumexp, delta,
    grad_query, scores_gradient,
    grad_batch_stride, grad_head_stride, grad_row_stride, grad_column_stride,
    query_batch_stride, query_head_stride, query_row_stride, query_column_stride,
    key_batch_stride, key_head_stride, key_row_stride, key_column_stride,
    value_batch_stride, value_head_stride, value_row_stride, value_column_stride,
    grad_query_batch_stride, grad_query_head_stride, grad_query_row_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride, slopes_batch_stride,
    sequences, heads, group, queries, keys, left, right, blocks, together,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, SCALE: tl.constexpr, SCALED: tl.constexpr, FACTOR: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BOOLEAN: tl.constexpr,
    THRESHOLD: tl.constexpr, KEPT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """grad_query, and scores_gradient (B, H, L, S) of what is added to the scores, where any is seen; either may be
    None. Launches a grid as forward_kernel."""
    block, number = program_of(blocks, sequences * heads, together)
    sequence, head = number // heads, number % heads
    row = (blocks - 1 - block) * BLOCK_QUERIES
    first_query, rows = span_of(query_offsets, sequence, queries)
    first_key, columns = span_of(key_offsets, sequence, keys)
    batch = sequence
    if query_offsets is not None:
        batch = sequence * 0
        if row >= rows:
            return
    shift = columns - rows if BOTTOM_RIGHT else 0
    key_head = head // group

    grad_place = place_of(
        grad_output, batch, head, first_query, grad_batch_stride, grad_head_stride, grad_row_stride, DESCRIPTORS
    )
    q_place = place_of(
        query, batch, head, first_query, query_batch_stride, query_head_stride, query_row_stride, DESCRIPTORS
    )
    k_place = place_of(
        key, batch, key_head, first_key, key_batch_stride, key_head_stride, key_row_stride, DESCRIPTORS
    )  # fmt: skip
    v_place = place_of(
        value, batch, key_head, first_key, value_batch_stride, value_head_stride, value_row_stride, DESCRIPTORS
    )
    head_mask = mask_of(mask, sequence, head, mask_batch_stride, mask_head_stride)
    slope = slope_of(slopes, sequence, head, slopes_batch_stride, COMPUTE)
    if seed is not None:
        own_seed = tl.load(seed)
    i = row + tl.arange(0, BLOCK_QUERIES)
    at = (tl.cast(batch, tl.int64) * heads + head) * queries + first_query + row
    base = base_of(logsumexp + at, rows - row, BLOCK_QUERIES, False, EXACT)
    own_delta = load_numbers(delta + at, rows - row, BLOCK_QUERIES, False)

    q = load_rows(
        q_place, batch, head, row, rows, query_row_stride, query_column_stride,
        SIZE, BLOCK_QUERIES, BLOCK_SIZE, DESCRIPTORS, False,
    )  # fmt: skip
    grad = load_rows(
        grad_place, batch, head, row, rows, grad_row_stride, grad_column_stride,
        VALUE_SIZE, BLOCK_QUERIES, BLOCK_VALUE_SIZE, DESCRIPTORS, False,
    )  # fmt: skip
    sums = tl.zeros((BLOCK_QUERIES, BLOCK_SIZE), COMPUTE)
    begin, whole_begin, whole_end, end = blocks_of(
        row + shift, tl.minimum(row + BLOCK_QUERIES, rows) - 1 + shift, left, right, columns, LEFT, RIGHT, BLOCK_KEYS
    )
    for part in tl.static_range(0 if LEFT else 1, 3):
        low, high = part_of(part, begin, whole_begin, whole_end, end)
        for start in tl.range(low, high, BLOCK_KEYS):
            k = load_rows(
                k_place, batch, key_head, start, columns, key_row_stride, key_column_stride,
                SIZE, BLOCK_KEYS, BLOCK_SIZE, DESCRIPTORS, part == 1,
            )  # fmt: skip
            v = load_rows(
                v_place, batch, key_head, start, columns, value_row_stride, value_column_stride,
                VALUE_SIZE, BLOCK_KEYS, BLOCK_VALUE_SIZE, DESCRIPTORS, part == 1,
            )  # fmt: skip
            products = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=COMPUTE)
            j = start + tl.arange(0, BLOCK_KEYS)
            z = change_scores(
                products, i[:, None], j[None, :], (i < rows)[:, None], rows, columns, shift, left, right, slope,
                head_mask, mask_row_stride, mask_column_stride, part != 1, LEFT, RIGHT, BOOLEAN, SCALED, SCALE,
            )  # fmt: skip
            p = probabilities(z, base[:, None], EXACT, FACTOR)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=COMPUTE)
            if seed is not None:
                kept = is_kept(own_seed, number, row, start, THRESHOLD, BLOCK_QUERIES, BLOCK_KEYS, False)
                dp = tl.where(kept, dp * KEPT, 0.0)
            ds = p * (dp - own_delta[:, None])
            if scores_gradient is not None:
                address = scores_gradient + at * keys + ((i - row).to(tl.int64)[:, None] * keys + j[None, :])
                tl.store(address, ds, mask=(i < rows)[:, None] & (j < columns)[None, :])
            if grad_query is not None:
                sums = tl.dot(ds.to(k.dtype), k, sums, input_precision=PRECISION, out_dtype=COMPUTE)

    if grad_query is not None:
        store_rows(
            grad_query, sums * SCALE, batch, head, first_query, row, rows,
            grad_query_batch_stride, grad_query_head_stride, grad_query_row_stride, SIZE, BLOCK_QUERIES, BLOCK_SIZE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["queries", "keys", "left", "right", "blocks", "together"])
def key_gradient_kernel(
    grad_output, query, key, value, mask, slopes, query_offsets, key_offsets, seed, logsumexp, delta,
    grad_key, grad_value,
    grad_batch_stride, grad_head_stride, grad_row_stride, grad_column_stride,
    query_batch_stride, query_head_stride, query_row_stride, query_column_stride,
    key_batch_stride, key_head_stride, key_row_stride, key_column_stride,
    value_batch_stride, value_head_stride, value_row_stride, value_column_stride,
    grad_key_batch_stride, grad_key_head_stride, grad_key_row_stride,
    grad_value_batch_stride, grad_value_head_stride, grad_value_row_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride, slopes_batch_stride,
    sequences, heads, group, queries, keys, left, right, blocks, together,
    SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, SCALE: tl.constexpr, SCALED: tl.constexpr, FACTOR: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BOOLEAN: tl.constexpr,
    THRESHOLD: tl.constexpr, KEPT: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_VALUE_SIZE: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value; either may be None. Scores are transposed here: keys go down, queries across.

    Launches a 1D grid with a program for each block of keys of each head of keys of each sequence, the first ones
    first: under causality they have the most work.
    """
    key_heads = heads // group
    block, number = program_of(blocks, sequences * key_heads, together)
    sequence, key_head = number // key_heads, number % key_heads
    column = block * BLOCK_KEYS
    first_query, rows = span_of(query_offsets, sequence, queries)
    first_key, columns = span_of(key_offsets, sequence, keys)
    batch = sequence
    if query_offsets is not None:
        batch = sequence * 0
        if column >= columns:
            return
    shift = columns - rows if BOTTOM_RIGHT else 0

    k_place = place_of(
        key, batch, key_head, first_key, key_batch_stride, key_head_stride, key_row_stride, DESCRIPTORS
    )  # fmt: skip
    v_place = place_of(
        value, batch, key_head, first_key, value_batch_stride, value_head_stride, value_row_stride, DESCRIPTORS
    )
    if seed is not None:
        own_seed = tl.load(seed)
    j = column + tl.arange(0, BLOCK_KEYS)
    k = load_rows(
        k_place, batch, key_head, column, columns, key_row_stride, key_column_stride,
        SIZE, BLOCK_KEYS, BLOCK_SIZE, DESCRIPTORS, False,
    )  # fmt: skip
    v = load_rows(
        v_place, batch, key_head, column, columns, value_row_stride, value_column_stride,
        VALUE_SIZE, BLOCK_KEYS, BLOCK_VALUE_SIZE, DESCRIPTORS, False,
    )  # fmt: skip
    key_sums = tl.zeros((BLOCK_KEYS, BLOCK_SIZE), COMPUTE)
    value_sums = tl.zeros((BLOCK_KEYS, BLOCK_VALUE_SIZE), COMPUTE)
    begin, whole_begin, whole_end, end = blocks_of(
        column - shift, tl.minimum(column + BLOCK_KEYS, columns) - 1 - shift, right, left, rows,
        RIGHT, LEFT, BLOCK_QUERIES,
    )  # fmt: skip
    for part in tl.static_range(0 if RIGHT else 1, 3):
        low, high = part_of(part, begin, whole_begin, whole_end, end)
        steps = tl.maximum(tl.cdiv(high - low, BLOCK_QUERIES), 0)
        # One loop over heads and their blocks: the next head's first loads go on beside the last products.
        for step in tl.range(0, steps * group if GROUPED else steps):
            if GROUPED:
                head = key_head * group + step // steps
                start = low + step % steps * BLOCK_QUERIES
            else:
                head = key_head
                start = low + step * BLOCK_QUERIES
            grad_place = place_of(
                grad_output, batch, head, first_query, grad_batch_stride, grad_head_stride, grad_row_stride, DESCRIPTORS
            )
            q_place = place_of(
                query, batch, head, first_query, query_batch_stride, query_head_stride, query_row_stride, DESCRIPTORS
            )
            head_mask = mask_of(mask, sequence, head, mask_batch_stride, mask_head_stride)
            slope = slope_of(slopes, sequence, head, slopes_batch_stride, COMPUTE)
            q = load_rows(
                q_place, batch, head, start, rows, query_row_stride, query_column_stride,
                SIZE, BLOCK_QUERIES, BLOCK_SIZE, DESCRIPTORS, part == 1,
            )  # fmt: skip
            grad = load_rows(
                grad_place, batch, head, start, rows, grad_row_stride, grad_column_stride,
                VALUE_SIZE, BLOCK_QUERIES, BLOCK_VALUE_SIZE, DESCRIPTORS, part == 1,
            )  # fmt: skip
            i = start + tl.arange(0, BLOCK_QUERIES)
            at = (tl.cast(batch, tl.int64) * heads + head) * queries + first_query + start
            base = base_of(logsumexp + at, rows - start, BLOCK_QUERIES, part == 1, EXACT)
            own_delta = load_numbers(delta + at, rows - start, BLOCK_QUERIES, part == 1)
            products = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=COMPUTE)
            z = change_scores(
                products, i[None, :], j[:, None], (j < columns)[:, None], rows, columns, shift, left, right, slope,
                head_mask, mask_row_stride, mask_column_stride, part != 1, LEFT, RIGHT, BOOLEAN, SCALED, SCALE,
            )  # fmt: skip
            p = probabilities(z, base[None, :], EXACT, FACTOR)
            remaining = p
            if seed is not None:
                kept = is_kept(
                    own_seed, sequence * heads + head, start, column, THRESHOLD, BLOCK_QUERIES, BLOCK_KEYS, True
                )
                remaining = tl.where(kept, p, 0.0)
            if grad_value is not None:
                value_sums = tl.dot(
                    remaining.to(grad.dtype), grad, value_sums, input_precision=PRECISION, out_dtype=COMPUTE
                )
            if grad_key is not None:
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION, out_dtype=COMPUTE)
                if seed is not None:
                    dp = tl.where(kept, dp * KEPT, 0.0)
                ds = p * (dp - own_delta[None, :])
                key_sums = tl.dot(ds.to(q.dtype), q, key_sums, input_precision=PRECISION, out_dtype=COMPUTE)

    if grad_key is not None:
        store_rows(
            grad_key, key_sums * SCALE, batch, key_head, first_key, column, columns,
            grad_key_batch_stride, grad_key_head_stride, grad_key_row_stride, SIZE, BLOCK_KEYS, BLOCK_SIZE,
        )  # fmt: skip
    if grad_value is not None:
        store_rows(
            grad_value, value_sums * KEPT, batch, key_head, first_key, column, columns,
            grad_value_batch_stride, grad_value_head_stride, grad_value_row_stride,
            VALUE_SIZE, BLOCK_KEYS, BLOCK_VALUE_SIZE,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ choices


@dataclass(frozen=True)
class Tile:
    """The block sizes of one program, and how it runs."""

    queries: int
    keys: int
    warps: int
    stages: int
    apart: bool = False  # whether gradients of keys and of values, whose sums fill a thread's registers, are made apart


DIRECTIONS = ("forward", "query gradient", "key gradient")
L2_BYTES = 2**25  # of keys and values that programs at work together may share: what A100 and H100 have, with room

# For tensor cores, by the bytes of a row: plain attention, and where scores are changed or dropped, which takes
# registers. Hopper's and Blackwell's matrix instructions take 64 rows a group of four warps; more keys at a
# time cost registers, more queries save reads of keys. None of them spills.
TILES = {
    80: {
        "forward": {
            128: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            256: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            512: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
        "query gradient": {
            128: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
            256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
            512: (Tile(64, 32, 8, 1), Tile(32, 16, 8, 1)),
        },
        "key gradient": {
            128: (Tile(64, 128, 8, 2), Tile(32, 32, 8, 2)),
            256: (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
            512: (Tile(64, 32, 8, 1, True), Tile(32, 32, 8, 1, True)),
        },
    },
    90: {
        "forward": {
            128: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
            256: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            512: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        },
        "query gradient": {
            128: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            256: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            512: (Tile(64, 64, 8, 2), Tile(64, 16, 8, 2)),
        },
        "key gradient": {
            128: (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
            256: (Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
            512: (Tile(32, 64, 8, 2, True), Tile(16, 64, 8, 2, True)),
        },
    },
    100: {
        "forward": {
            128: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
            256: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            512: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
        "query gradient": {
            128: (Tile(128, 128, 8, 2), Tile(64, 64, 8, 2)),
            256: (Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
            512: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        },
        "key gradient": {
            128: (Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
            256: (Tile(64, 128, 8, 2), Tile(32, 64, 8, 2)),
            512: (Tile(64, 64, 8, 2, True), Tile(32, 64, 8, 2, True)),
        },
    },
    0: {
        "forward": {
            128: (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)),
            256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)),
            512: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        },
        "query gradient": {
            128: (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
            256: (Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)),
            512: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        },
        "key gradient": {
            128: (Tile(32, 64, 4, 1), Tile(32, 32, 4, 1)),
            256: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
            512: (Tile(16, 32, 4, 1, True), Tile(16, 32, 4, 1, True)),
        },
    },
}
# Without tensor cores, by the bytes of a row: a thread takes whole rows of both operands into registers. float64's
# gradients spill a few of them with head dimensions above 128.
PLAIN_TILES = {
    256: Tile(32, 32, 8, 1),
    512: Tile(16, 32, 8, 1),
    1024: Tile(16, 16, 8, 1),
    2048: Tile(16, 16, 8, 1, True),
}


def padded(size):
    """A head dimension as matrix instructions take it."""
    return max(16, triton.next_power_of_2(size))


def kind_of(dtype, allow_tf32, size, plain):
    """The class of arithmetic; TF32 only where its operands leave room in the registers for all else."""
    return precision(dtype, allow_tf32 and size <= (128 if plain else 64))


@functools.lru_cache(maxsize=4096)
def choose(direction, size, dtype, kind, plain, length, heads, device):
    """The tile for a head dimension (padded, the larger one of keys and values), pure arithmetic.

    kind: kind_of's; plain: nothing is added to scores, nothing dropped; length, heads: of the programs' queries or
    keys.
    """
    row = size * dtype.itemsize
    if kind not in ("half", "tf32"):
        return PLAIN_TILES[max(row, 256)]
    architecture = max(known for known in TILES if known <= device.capability)
    roomy = plain and (kind == "half" or architecture == 90)  # elsewhere TF32 takes copies of its operands
    tile = TILES[architecture][direction][max(row, 128)][0 if roomy else 1]
    if direction != "key gradient" and triton.cdiv(length, tile.queries) * heads < device.multiprocessors:
        # A grid that does not fill the device: half the rows, by half the warps, which have as many registers each.
        half = replace(tile, queries=tile.queries // 2, warps=tile.warps // 2)
        tile = half if half.queries >= 64 and half.warps >= 4 else tile
    return tile


# ----------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Options:
    """What is not a tensor; left, right < 0: no limit."""

    max_query: int
    max_key: int
    scale: float
    left: int
    right: int
    bottom_right: bool
    dropout: float
    threshold: int  # random words below it drop what they stand for
    kept: float  # the factor of what is kept
    allow_tf32: bool


def can_be_described(tensor, device):
    """Whether a tensor descriptor (TMA) can load blocks of rows: contiguous ones, all else at multiples of 16 bytes."""
    if device.capability < 90 or tensor.data_ptr() % 16 or tensor.stride(3) != 1:
        return False
    aligned = 16 // tensor.element_size()
    strides = [stride for n, stride in zip(tensor.shape[:3], tensor.stride(), strict=False) if n > 1]
    return all(stride > 0 and stride % aligned == 0 for stride in strides)


def _described(tensor, rows, columns):
    aligned = 16 // tensor.element_size()
    strides = [s if n > 1 else aligned for n, s in zip(tensor.shape[:3], tensor.stride(), strict=False)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def _strides(name, tensor, columns=True):
    """The kernels' arguments for a tensor's strides."""
    axes = ("batch", "head", "row", "column")[: 4 if columns else 3]
    strides = (0,) * 4 if tensor is None else tensor.stride()
    return {f"{name}_{axis}_stride": stride for axis, stride in zip(axes, strides, strict=False)}


def _launches(direction, tensors, results, options, saved, device, tile):
    """The launch of one of the three large kernels, or two where its results are made apart.

    tensors: query, key, value, mask, slopes, query_offsets, key_offsets, seed and, backward, grad_output; results: by
    name; saved: logsumexp and delta, backward.
    """
    query, value, mask, slopes, query_offsets = [
        tensors[name] for name in ("query", "value", "mask", "slopes", "query_offsets")
    ]
    _, heads, queries, size = query.shape
    key_heads, keys, value_size = value.shape[1:]
    sequences = query.shape[0] if query_offsets is None else len(query_offsets) - 1
    forward, by_keys = direction == "forward", direction == "key gradient"
    plain = mask is None and slopes is None and not options.dropout
    all_heads = sequences * (key_heads if by_keys else heads)
    longest = options.max_key if by_keys else options.max_query
    block_size, block_value_size = padded(size), padded(value_size)
    largest = max(block_size, block_value_size)
    kind = kind_of(query.dtype, options.allow_tf32, largest, plain)
    tile = tile or choose(direction, largest, query.dtype, kind, plain, longest, all_heads, device)
    if by_keys and tile.apart and all(result is not None for result in results.values()):
        arguments = options, saved, device, tile
        return [
            launch
            for name, result in results.items()
            for launch in _launches(direction, tensors, dict.fromkeys(results) | {name: result}, *arguments)
        ]
    inputs = {name: tensors[name] for name in ("grad_output", "query", "key", "value") if name in tensors}
    # Only tensor cores read what a descriptor loads in place; and packed sequences do not end where a tensor does.
    described = (
        kind in ("half", "tf32")
        and query_offsets is None
        and all(can_be_described(tensor, device) for tensor in inputs.values())
    )
    arguments = dict(tensors)
    for name, tensor in inputs.items() if described else ():
        block = (tile.queries, block_size), (tile.keys, block_size), (tile.keys, block_value_size)
        block = {"query": block[0], "key": block[1], "value": block[2], "grad_output": (tile.queries, block_value_size)}
        arguments[name] = _described(tensor, *block[name])
    for name, tensor in inputs.items():
        arguments |= _strides("grad" if name == "grad_output" else name, tensor)
    for name, tensor in results.items():
        if name not in ("logsumexp", "scores_gradient"):
            arguments |= _strides(name, tensor, columns=False)
    mask_strides = _strides("mask", mask)
    if mask is not None:
        mask_strides = {n: 0 if mask.shape[d] == 1 else s for d, (n, s) in enumerate(mask_strides.items())}
    group = heads // key_heads
    bytes_of_a_head = options.max_key * (size + value_size) * query.element_size()
    together = max(1, L2_BYTES // bytes_of_a_head) * (1 if by_keys else group)
    biased = slopes is not None or (mask is not None and mask.dtype != torch.bool)
    exact = query.element_size() > 2
    # What is added to scores is in units of scores; and only a factor above 0 leaves the largest of them the largest.
    scaled = biased or options.scale <= 0 or (exact and not forward)
    blocks = triton.cdiv(longest, tile.keys if by_keys else tile.queries)
    most = options.max_query + options.max_key
    if mask is not None and mask.dtype == torch.bool:
        arguments["mask"] = mask.view(torch.uint8)
    launch = Launch(
        KERNELS[direction],
        (blocks * all_heads,),
        arguments
        | results
        | saved
        | mask_strides
        | {
            "slopes_batch_stride": slopes.stride(0) if slopes is not None and len(slopes) > 1 else 0,
            "sequences": sequences, "heads": heads, "group": group, "queries": queries, "keys": keys,
            "left": min(options.left, most), "right": min(options.right, most),
            "blocks": blocks, "together": min(together, all_heads),
        },
        {
            "SIZE": size, "VALUE_SIZE": value_size, "SCALE": options.scale, "SCALED": scaled,
            "FACTOR": LOG2E.value * (1.0 if scaled else options.scale),
            "LEFT": options.left >= 0, "RIGHT": options.right >= 0, "BOTTOM_RIGHT": options.bottom_right,
            "BOOLEAN": mask is not None and mask.dtype == torch.bool,
            "THRESHOLD": options.threshold, "KEPT": options.kept,
            "COMPUTE": tl.float64 if query.dtype == torch.float64 else tl.float32,
            "PRECISION": "tf32" if kind == "tf32" else "ieee", "DESCRIPTORS": described,
            "BLOCK_QUERIES": tile.queries, "BLOCK_KEYS": tile.keys,
            "BLOCK_SIZE": block_size, "BLOCK_VALUE_SIZE": block_value_size,
        }
        | ({} if forward else {"EXACT": exact})
        | ({"GROUPED": group > 1} if by_keys else {}),
        device,
        tile.warps,
        tile.stages,
        plan(kind, direction, tile, device),
    )  # fmt: skip
    return [launch]


KERNELS = {"forward": forward_kernel, "query gradient": query_gradient_kernel, "key gradient": key_gradient_kernel}


def plan(kind, direction, tile, device):
    """What the machine code of a kernel must reach on a device."""
    rows = tile.keys if direction == "key gradient" else tile.queries
    if not device.capability:
        instruction = "v_mfma"
    elif kind == "float64":
        instruction = "DMMA" if device.capability <= 90 else ""  # Triton has none for Blackwell
    elif kind == "float32":
        instruction = ""
    elif device.capability < 90 or rows < 64:
        instruction = "HMMA"
    else:
        instruction = "HGMMA" if device.capability < 100 else "UTCHMMA"
    access_bytes = 16 if device.capability else 8  # AMD's matrix instructions scatter more
    return Plan(matrix_instruction=instruction, access_bytes=access_bytes)


def forward_launch(
    query, key, value, mask, slopes, query_offsets, key_offsets, seed, output, logsumexp, options,
    *, device=None, tile=None,
):  # fmt: skip
    """The launch of attention, not yet run."""
    tensors = {
        "query": query, "key": key, "value": value, "mask": mask, "slopes": slopes,
        "query_offsets": query_offsets, "key_offsets": key_offsets, "seed": seed,
    }  # fmt: skip
    results = {"output": output, "logsumexp": logsumexp}
    (launch,) = _launches("forward", tensors, results, options, {}, device or device_limits(query.device), tile)
    return launch


def backward_launches(
    grad_output, grad_logsumexp, query, key, value, mask, slopes, query_offsets, key_offsets, seed, output, logsumexp,
    grad_query, grad_key, grad_value, scores_gradient, options, *, device=None, tile=None,
):  # fmt: skip
    """The launches of attention_backward, not yet run."""
    device = device or device_limits(query.device)
    tensors = {
        "grad_output": grad_output, "query": query, "key": key, "value": value, "mask": mask, "slopes": slopes,
        "query_offsets": query_offsets, "key_offsets": key_offsets, "seed": seed,
    }  # fmt: skip
    delta = torch.empty_like(logsumexp)
    saved = {"logsumexp": logsumexp, "delta": delta}
    launches = [delta_launch(grad_output, output, grad_logsumexp, delta, device)]
    if grad_query is not None or scores_gradient is not None:
        results = {"grad_query": grad_query, "scores_gradient": scores_gradient}
        launches += _launches("query gradient", tensors, results, options, saved, device, tile)
    if grad_key is not None or grad_value is not None:
        results = {"grad_key": grad_key, "grad_value": grad_value}
        launches += _launches("key gradient", tensors, results, options, saved, device, tile)
    return launches


DELTA_BYTES = 8192  # of each operand a program of 4 warps: 64 bytes a thread in flight, twice


def delta_launch(grad_output, output, grad_logsumexp, delta, device):
    """The launch of delta_kernel, not yet run."""
    batch, heads, rows, value_size = output.shape
    columns = padded(value_size)
    block = max(1, DELTA_BYTES // (columns * output.element_size()))
    blocks = triton.cdiv(rows, block)
    arguments = {
        "grad_output": grad_output, "output": output, "grad_logsumexp": grad_logsumexp, "delta": delta,
        **_strides("grad", grad_output), **_strides("output", output), "heads": heads, "rows": rows, "blocks": blocks,
    }  # fmt: skip
    constants = {"VALUE_SIZE": value_size, "BLOCK_ROWS": block, "BLOCK_VALUE_SIZE": columns}
    return Launch(delta_kernel, (blocks * batch * heads,), arguments, constants, device, 4)


# -------------------------------------------------------------------------------------------------------------- calls


def attention(*tensors, options):
    """Fills output and logsumexp.

    Args, as forward_launch has them: query, key, value, mask, slopes, query_offsets, key_offsets, seed, then the
    results. query, key and value have one dtype: float32, bfloat16, float16 or float64; none of them is empty.
    """
    forward_launch(*tensors, options).run()


def attention_backward(*tensors, options):
    """Fills the gradients that are given; the same in every run.

    Args, as backward_launches has them: grad_output, grad_logsumexp, attention's arguments, its results, then
    grad_query, grad_key, grad_value and scores_gradient (B, H, L, S), which is left as it is where nothing is seen.
    """
    for launch in backward_launches(*tensors, options):
        launch.run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: in bfloat16, with head dimension
    128, each kernel, and with all that can change scores; with every all tiles and dtypes."""
    launches = {}

    def add(direction, dtype, size, sees, allow_tf32=False, length=4096):
        name = f"{'tf32' if allow_tf32 else str(dtype).removeprefix('torch.')} {size} {sees}" + " short" * (
            length < 4096
        )
        found = _example(direction, dtype, size, sees, length, allow_tf32, device)
        for position, launch in enumerate(found):
            launches[f"{direction} {name}" + (f" {position}" if len(found) > 1 else "")] = launch

    half, float, double = torch.bfloat16, torch.float32, torch.float64
    for direction in DIRECTIONS:
        for sees in ("causal", "changed"):
            add(direction, half, 128, sees)
        for size in (64, 128, 256) if every else ():
            for sees in ("causal", "packed", "masked", "changed"):
                add(direction, half, size, sees)
            for sees in ("causal", "changed"):
                add(direction, torch.float16, size, sees)
                for dtype, allow_tf32 in ((float, True), (float, False), (double, False)):
                    if direction != "forward" and not device.capability:
                        continue  # these spill on AMD, for which no tiles were looked for
                    if dtype != double or size <= 128:
                        add(direction, dtype, size, sees, allow_tf32)
            if direction != "key gradient":
                add(direction, half, size, "causal", length=128)
    launches["delta bfloat16 128"] = _example("delta", half, 128, "full", 4096, False, device)[0]
    return launches


def _example(direction, dtype, size, sees, length, allow_tf32, device):
    """The launches of one kernel; sees: "masked" has an additive mask, with its gradient, and "changed" a window, ALiBi
    and dropout of packed sequences, with grouped heads."""
    changed = sees == "changed"
    packed = changed or sees == "packed"
    batch, heads, key_heads = 1 if packed else 4, 16, 4 if changed else 16

    def tensor(*shape, dtype=dtype, given=True):
        return torch.empty(shape, dtype=dtype, device="meta") if given else None

    query, key = tensor(batch, heads, length, size), tensor(batch, key_heads, length, size)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    logsumexp = tensor(batch, heads, length, dtype=sums)
    offsets = tensor(9, dtype=torch.int32, given=packed)
    mask = tensor(1, heads, length, length, given=sees == "masked")
    slopes = tensor(1, heads, dtype=sums, given=changed)
    seed = tensor(dtype=torch.int64, given=changed)
    left, right = 128 if changed else -1, -1 if sees in ("full", "masked") else 0
    options = Options(
        length, length, size**-0.5, left, right, packed, 0.5 if changed else 0.0, 2**31, 2.0, allow_tf32
    )  # fmt: skip
    inputs = query, key, key, mask, slopes, offsets, offsets, seed
    if direction == "forward":
        return [forward_launch(*inputs, query, logsumexp, options, device=device)]
    scores_gradient = tensor(batch, heads, length, length, dtype=sums, given=sees == "masked")
    gradients = query, key, key, scores_gradient
    delta, query_gradient, *key_gradient = backward_launches(
        query, None, *inputs, query, logsumexp, *gradients, options, device=device
    )
    return {"delta": [delta], "query gradient": [query_gradient], "key gradient": key_gradient}[direction]
