"""Dropout, whose gradient is the same function; and dropout's factors, which other families fuse.

Element e in the order of memory takes word e % 4 of the random words of the counter (e // 4, its high 32 bits, 0, 1),
with the seed, read on the device, as Philox's key. The threshold and the factor of what is kept are constants of the
model, so they are compiled in.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, Plan, device_limits

WARPS = 4
# A thread makes the words of four counters, 16 elements: two 16-byte accesses in 16 bits, of which arithmetic hides the
# latency.
BLOCK = WARPS * 32 * 16
PROGRAMS = 8


@triton.jit
def random_words(seed, group):
    """The four random words of groups of four elements, of group's shape, 64-bit."""
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(tl.load(seed), low, (group >> 32).to(tl.uint32), zero, zero + 1)


@triton.jit
def as_factors(random, COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr):
    """0 where random words are below the threshold, else KEPT."""
    return tl.where(random < THRESHOLD, tl.zeros(random.shape, COMPUTE), tl.full(random.shape, KEPT, COMPUTE))


@triton.jit
def factors_of_groups(seed, group, COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr):
    """The factors of the elements of groups (..., G) in order, (..., 4 * G)."""
    a, b, c, d = random_words(seed, group)
    return as_factors(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)), COMPUTE, THRESHOLD, KEPT)


@triton.jit
def factors_of_elements(seed, element, COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr):
    """The factors of any elements, which makes each word four times."""
    a, b, c, d = random_words(seed, element // 4)
    place = element % 4
    random = tl.where(place == 0, a, tl.where(place == 1, b, tl.where(place == 2, c, d)))
    return as_factors(random, COMPUTE, THRESHOLD, KEPT)


@triton.jit
def dropout_block(input, output, factors, offsets, mask, COMPUTE: tl.constexpr):
    """One program's part of dropout_kernel, masked or, with mask None, whole."""
    result = tl.load(input + offsets, mask=mask).to(COMPUTE) * factors
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def dropout_kernel(
    input, output, seed, count, COMPUTE: tl.constexpr, THRESHOLD: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    """output = input * factor; both dense, of count elements. seed: () int64.

    Launches a 1D grid where each program takes BLOCK elements. Only the last program masks, which splits accesses.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    factors = factors_of_groups(seed, start // 4 + tl.arange(0, BLOCK // 4), COMPUTE, THRESHOLD, KEPT)
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        dropout_block(input, output, factors, offsets, None, COMPUTE)
    else:
        dropout_block(input, output, factors, offsets, offsets < count, COMPUTE)


def constants_of(p, dtype):
    """The kernels' constants for a probability and tensors of a dtype."""
    return {
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "THRESHOLD": min(int(p * 2**32), 2**32 - 1),
        "KEPT": 1 / (1 - p) if p < 1 else 0.0,
    }


def dropout_launch(input, output, seed, p, device):
    """The launch of dropout, not yet run; of at least one element."""
    block = BLOCK * 4 // max(input.element_size(), 4)  # 64 bits take two registers
    arguments = {"input": input, "output": output, "seed": seed, "count": input.numel()}
    constants = {**constants_of(p, input.dtype), "BLOCK": block}
    plan = Plan(PROGRAMS, access_bytes=16 if input.element_size() < 8 else 0)
    return Launch(dropout_kernel, (triton.cdiv(input.numel(), block),), arguments, constants, device, WARPS, plan=plan)


def dropout(input, output, seed, p):
    """output = input * factor, for dense tensors of one shape, dtype and layout; output may be input."""
    if input.numel() > 0:
        dropout_launch(input, output, seed, p, device_limits(input.device)).run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code; with every, all dtypes."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    launches = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64) if every else (torch.bfloat16,):
        values = torch.empty(2**20, dtype=dtype, device="meta")
        launches[str(dtype).removeprefix("torch.")] = dropout_launch(values, values, seed, 0.1, device)
    return launches
