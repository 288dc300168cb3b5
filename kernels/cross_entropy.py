"""Cross entropy of logits (outer, classes, inner), and its gradients; rows are taken as in softmax.py.

Forward reads the logits once, twice where the loss has terms of every class and a row fills no tile; backward reads
them once and writes the gradient. Three numbers of each row go from one to the other. Everything but logits and
probabilities is float32, float64 for float64. A target that is no class makes its row's loss and gradient NaN.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, Plan, device_limits
from .softmax import LOWEST, PROGRAMS_WARPS, TARGET_VIEWS, choose_rows, row_arguments, row_sums, rows_of, tile_at


@triton.jit
def target_of(target, weight, row, inside, ignore_index, size, COMPUTE: tl.constexpr):
    """Of rows' targets, each (LANES, 1): a class to read, the weight (NaN if there is no such class), if ignored."""
    index = tl.load(target + row, mask=inside, other=0)
    known = (index >= 0) & (index < size)
    ignored = index == ignore_index
    place = tl.where(known, index, 0)
    if weight is not None:
        own = tl.load(weight + place)
    else:
        own = tl.full(place.shape, 1.0, COMPUTE)
    return place, tl.where(ignored, 0.0, tl.where(known, own, float("nan"))), ignored


@triton.jit
def shares_at(
    target, weight, offsets, mask, start, size,
    INDEX: tl.constexpr, SMOOTHING: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What the logarithms of a tile's classes are weighted by, without an index's own class; 0 outside."""
    share = tl.full(offsets.shape, SMOOTHING, COMPUTE) / tl.full((), size, COMPUTE)
    if not INDEX:
        share += tl.load(target + offsets, mask=mask, other=0.0).to(COMPUTE) * (1 - SMOOTHING)
    if weight is not None:
        step = (start + tl.arange(0, STEP))[None, :]
        share *= tl.load(weight + step, mask=step < size, other=0.0)
    return tl.where(mask, share, 0.0)


@triton.jit
def cross_entropy_kernel(
    input, target, weight, loss, divisors, statistics,
    rows, ignore_index, lanes, size, lane_stride, step_stride, plane_stride, blocks,
    INDEX: tl.constexpr, SMOOTHING: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """loss (rows,); divisors (rows,) or None: parts of the mean's denominator; statistics (3, rows): the largest logit,
    logsumexp less this, the mass. Launches a 1D grid where each program takes LANES rows."""
    COMPUTE: tl.constexpr = loss.dtype.element_ty
    DENSE: tl.constexpr = (not INDEX) or SMOOTHING > 0
    base, row, inside = rows_of(lanes, lane_stride, plane_stride, blocks, LANES)
    mass = tl.zeros((LANES, 1), COMPUTE)
    dense = tl.zeros((LANES, 1), COMPUTE)
    if WHOLE:
        offsets, mask = tile_at(0, base, inside, size, step_stride, STEP)
        x = tl.load(input + offsets, mask=mask, other=LOWEST).to(COMPUTE)
        top = tl.max(x, 1, keep_dims=True)
        total = tl.sum(tl.exp(x - top), 1, keep_dims=True)
        if DENSE:
            share = shares_at(target, weight, offsets, mask, 0, size, INDEX, SMOOTHING, STEP, COMPUTE)
            dense = tl.sum(tl.where(mask, share * (top - x), 0.0), 1, keep_dims=True)
            mass = tl.sum(share, 1, keep_dims=True)
    else:
        top, total = row_sums(input, base, inside, size, step_stride, LANES, STEP, COMPUTE)
        if DENSE:
            terms = tl.zeros((LANES, STEP), COMPUTE)
            shares = tl.zeros((LANES, STEP), COMPUTE)
            for start in range(0, size, STEP):
                offsets, mask = tile_at(start, base, inside, size, step_stride, STEP)
                share = shares_at(target, weight, offsets, mask, start, size, INDEX, SMOOTHING, STEP, COMPUTE)
                difference = top - tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
                terms += tl.where(mask, share * difference, 0.0)
                shares += share
            dense = tl.sum(terms, 1, keep_dims=True)
            mass = tl.sum(shares, 1, keep_dims=True)
    logarithm = tl.log(total)
    value = dense
    if DENSE:
        value += mass * logarithm
    divisor = tl.full((LANES, 1), 1.0, COMPUTE)
    if INDEX:
        place, divisor, ignored = target_of(target, weight, row, inside, ignore_index, size, COMPUTE)
        logit = tl.load(input + base + place * step_stride, mask=inside, other=0.0).to(COMPUTE)
        value = tl.where(ignored, 0.0, value + divisor * (1 - SMOOTHING) * ((top - logit) + logarithm))
        mass = tl.where(ignored, 0.0, mass + divisor * (1 - SMOOTHING))
    tl.store(loss + row, value, mask=inside)
    if divisors is not None:
        tl.store(divisors + row, divisor, mask=inside)
    tl.store(statistics + row, top, mask=inside)
    tl.store(statistics + rows + row, logarithm, mask=inside)
    tl.store(statistics + 2 * rows + row, mass, mask=inside)


@triton.jit
def reduce_kernel(sums, loss, denominator, rows, BLOCK: tl.constexpr):
    """loss, denominator = the sums of sums (2, rows) along its rows. Launches one program: its order is fixed."""
    COMPUTE: tl.constexpr = sums.dtype.element_ty
    total = tl.zeros((BLOCK,), COMPUTE)
    divisor = tl.zeros((BLOCK,), COMPUTE)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(sums + row, mask=row < rows, other=0.0)
        divisor += tl.load(sums + rows + row, mask=row < rows, other=0.0)
    tl.store(loss, tl.sum(total))
    tl.store(denominator, tl.sum(divisor))


@triton.jit
def cross_entropy_backward_kernel(
    input, grad_loss, target, weight, denominator, statistics, grad_input, grad_target,
    rows, ignore_index, lanes, size, lane_stride, step_stride, plane_stride, blocks,
    BY_ROW: tl.constexpr, INDEX: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grad_input and grad_target, of which each may be None; grad_loss (rows,) if BY_ROW, else one for all of them.

    Launches a 2D grid where program (b, c) takes the tile of LANES rows and the c-th STEP classes.
    """
    COMPUTE: tl.constexpr = statistics.dtype.element_ty
    DENSE: tl.constexpr = (not INDEX) or SMOOTHING > 0
    base, row, inside = rows_of(lanes, lane_stride, plane_stride, blocks, LANES)
    start = tl.program_id(1) * STEP
    offsets, mask = tile_at(start, base, inside, size, step_stride, STEP)
    x = tl.load(input + offsets, mask=mask, other=0.0).to(COMPUTE)
    top = tl.load(statistics + row, mask=inside, other=0.0)
    logarithm = tl.load(statistics + rows + row, mask=inside, other=0.0)
    mass = tl.load(statistics + 2 * rows + row, mask=inside, other=0.0)
    factor = tl.load(grad_loss + (row if BY_ROW else row * 0), mask=inside, other=0.0)
    if denominator is not None:
        factor /= tl.load(denominator)
    logarithms = (x - top) - logarithm
    if grad_input is not None:
        grad = factor * mass * tl.exp(logarithms)
        if DENSE:
            grad -= factor * shares_at(target, weight, offsets, mask, start, size, INDEX, SMOOTHING, STEP, COMPUTE)
        if INDEX:
            place, own, ignored = target_of(target, weight, row, inside, ignore_index, size, COMPUTE)
            step = (start + tl.arange(0, STEP))[None, :]
            grad = tl.where(step == place, grad - factor * own * (1 - SMOOTHING), grad)
            grad = tl.where(ignored, 0.0, grad)
        tl.store(grad_input + offsets, grad.to(grad_input.dtype.element_ty), mask=mask)
    if grad_target is not None:
        grad = logarithms * factor * (SMOOTHING - 1)
        if weight is not None:
            step = (start + tl.arange(0, STEP))[None, :]
            grad *= tl.load(weight + step, mask=step < size, other=0.0)
        tl.store(grad_target + offsets, grad.to(grad_target.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------- launches

REDUCE_BLOCK = 4096
REDUCE_WARPS = 16


def forward_launches(
    view, input, target, weight, loss, denominator, statistics, ignore_index, label_smoothing, device=None
):  # fmt: skip
    """The launches of cross_entropy, not yet run."""
    device = device or device_limits(input.device)
    count = view[0] * view[2]
    sums = torch.empty((2, count), dtype=loss.dtype, device=loss.device) if denominator is not None else None
    rows = choose_rows(*view, input.element_size())
    sizes, constants = row_arguments(rows)
    arguments = {
        "input": input, "target": target, "weight": weight,
        "loss": loss if sums is None else sums[0], "divisors": None if sums is None else sums[1],
        "statistics": statistics, "rows": count, "ignore_index": ignore_index, **sizes,
    }  # fmt: skip
    constants |= {"INDEX": not target.is_floating_point(), "SMOOTHING": float(label_smoothing), "WHOLE": rows.whole}
    plan = Plan(PROGRAMS_WARPS // rows.warps)
    grid = (rows.planes * rows.blocks,)
    launches = [Launch(cross_entropy_kernel, grid, arguments, constants, device, rows.warps, plan=plan)]
    if sums is not None:
        arguments = {"sums": sums, "loss": loss, "denominator": denominator, "rows": count}
        launches.append(Launch(reduce_kernel, (1,), arguments, {"BLOCK": REDUCE_BLOCK}, device, REDUCE_WARPS))
    return launches


def backward_launch(
    view, input, grad_loss, target, weight, denominator, statistics, grad_input, grad_target,
    ignore_index, label_smoothing, device=None,
):  # fmt: skip
    """The launch of cross_entropy_backward, not yet run."""
    device = device or device_limits(input.device)
    rows = choose_rows(*view, input.element_size(), looped=False)
    sizes, constants = row_arguments(rows)
    arguments = {
        "input": input, "grad_loss": grad_loss, "target": target, "weight": weight, "denominator": denominator,
        "statistics": statistics, "grad_input": grad_input, "grad_target": grad_target,
        "rows": view[0] * view[2], "ignore_index": ignore_index, **sizes,
    }  # fmt: skip
    constants |= {"BY_ROW": grad_loss.dim() > 0, "INDEX": not target.is_floating_point()}
    constants |= {"SMOOTHING": float(label_smoothing)}
    grid = (rows.planes * rows.blocks, triton.cdiv(rows.size, rows.tile_step))
    plan = Plan(PROGRAMS_WARPS // rows.warps)
    return Launch(cross_entropy_backward_kernel, grid, arguments, constants, device, rows.warps, plan=plan)


def cross_entropy(view, input, target, weight, loss, denominator, statistics, ignore_index, label_smoothing):
    """loss (rows,) or, with a denominator, their sum and the mean's denominator, both (); statistics (3, rows).

    view: (outer, classes, inner) of the logits, none 0. target: (rows,) int64, or probabilities like the logits.
    """
    arguments = (input, target, weight, loss, denominator, statistics, ignore_index, label_smoothing)
    for launch in forward_launches(view, *arguments):
        launch.run()


def cross_entropy_backward(
    view, input, grad_loss, target, weight, denominator, statistics, grad_input, grad_target,
    ignore_index, label_smoothing,
):  # fmt: skip
    """The gradients that are not None, of grad_loss, () or (rows,), over the denominator, () or None."""
    arguments = (input, grad_loss, target, weight, denominator, statistics, grad_input, grad_target)
    backward_launch(view, *arguments, ignore_index, label_smoothing).run()


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: indices, and with every also
    smoothed ones with weights, and probabilities."""
    launches = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64) if every else (torch.bfloat16,):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for name, view in TARGET_VIEWS.items():
            outer, classes, inner = view
            logits = torch.empty(view, dtype=dtype, device="meta")
            index = torch.empty(outer * inner, dtype=torch.int64, device="meta")
            weight = torch.empty(classes, dtype=compute, device="meta")
            statistics = torch.empty((3, outer * inner), dtype=compute, device="meta")
            one = torch.empty((), dtype=compute, device="meta")
            kinds = {"index": (index, None, 0.0)}
            if every:
                kinds |= {"smoothed": (index, weight, 0.1), "probabilities": (logits, None, 0.0)}
            for kind, (target, weights, smoothing) in kinds.items():
                label = f"{name} {str(dtype).removeprefix('torch.')} {kind}"
                forward = forward_launches(view, logits, target, weights, one, one, statistics, -100, smoothing, device)
                for position, launch in enumerate(forward):
                    launches[f"forward {label} {position}"] = launch
                grad_target = logits if kind == "probabilities" else None
                launches[f"backward {label}"] = backward_launch(
                    view, logits, one, target, weights, one, statistics, logits, grad_target, -100, smoothing, device
                )
    return launches
