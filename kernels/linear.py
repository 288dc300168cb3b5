"""Fused linear layer: matmul with bias and activation, and its three gradients, by one matmul kernel."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import NONE, RELU, SILU, activation_gradient, apply_activation, compiled_parameter
from .common import Launch, device_limits

# How a kernel reaches a matrix: by pointers, any strides, or by a tensor descriptor (TMA) over its rows or columns.
POINTERS = tl.constexpr(0)
ROWS = tl.constexpr(1)
COLUMNS = tl.constexpr(2)


@triton.jit
def load_tile(
    matrix, row, column, rows, columns, row_stride, column_stride,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tile of a (rows, columns) matrix at (row, column), with zeros beyond its edges."""
    if ACCESS == ROWS:
        tile = matrix.load([row, column])
    elif ACCESS == COLUMNS:
        tile = tl.trans(matrix.load([column, row]))
    else:
        row_index = row + tl.arange(0, BLOCK_ROWS)[:, None]
        column_index = column + tl.arange(0, BLOCK_COLUMNS)[None, :]
        offsets = row_index.to(tl.int64) * row_stride + column_index.to(tl.int64) * column_stride
        tile = tl.load(matrix + offsets, mask=(row_index < rows) & (column_index < columns), other=0.0)
    return tile


@triton.jit
def store_tile(
    matrix, tile, row, column, first_row, rows, columns,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores a tile at (row, column) of the (rows, columns) contiguous matrix that starts at first_row."""
    if ACCESS == ROWS:
        matrix.store([first_row + row, column], tile.to(matrix.dtype))
    else:
        row_index = row + tl.arange(0, BLOCK_ROWS)[:, None]
        column_index = column + tl.arange(0, BLOCK_COLUMNS)[None, :]
        offsets = (first_row + row_index).to(tl.int64) * columns + column_index
        mask = (row_index < rows) & (column_index < columns)
        tl.store(matrix + offsets, tile.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def finish_tile(
    tile, bias, output, preactivation, row, column, first_row, rows, columns,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the bias to a tile of products, applies the activation and stores what is asked for."""
    if bias is not None:
        column_index = column + tl.arange(0, BLOCK_COLUMNS)
        tile += tl.load(bias + column_index, mask=column_index < columns, other=0.0).to(tile.dtype)[None, :]
    if preactivation is not None:
        store_tile(preactivation, tile, row, column, first_row, rows, columns, ACCESS, BLOCK_ROWS, BLOCK_COLUMNS)
    result = apply_activation(tile, ACTIVATION, PARAMETER)
    store_tile(output, result, row, column, first_row, rows, columns, ACCESS, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def matmul_kernel(
    a, saved, b, bias, output, preactivation, row_sums,
    rows, columns, depth, depth_blocks_per_split, split_rows,
    a_row_stride, a_column_stride, saved_row_stride, saved_column_stride, b_row_stride, b_column_stride,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, PARAMETER: tl.constexpr,
    A_ACCESS: tl.constexpr, SAVED_ACCESS: tl.constexpr, B_ACCESS: tl.constexpr, OUTPUT_ACCESS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """output = act(A @ b + bias), where A = a, or a * act'(saved); row_sums = the sums of A's rows.

    a, saved (rows, depth) and b (depth, columns) have any strides; bias (columns,), row_sums (rows,), output and
    preactivation (rows, columns) are contiguous; all but a may be None. With splits > 1, output (splits, split_rows,
    columns) and row_sums (splits, rows) hold the partial results of each range of depth.

    Launches a 1D grid where each program takes every grid-th tile of BLOCK_ROWS x BLOCK_COLUMNS; the tiles go down
    GROUP rows before they move one column on, so that those which run together share operands in L2.
    """
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    tiles = row_tiles * column_tiles
    split = tl.program_id(1)
    first_block = split * depth_blocks_per_split
    last_block = tl.minimum(first_block + depth_blocks_per_split, tl.cdiv(depth, BLOCK_DEPTH))
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        group = tile // (GROUP * column_tiles)
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row_tile = group * GROUP + tile % (GROUP * column_tiles) % group_rows
        column_tile = tile % (GROUP * column_tiles) // group_rows
        row = row_tile * BLOCK_ROWS
        column = column_tile * BLOCK_COLUMNS

        accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
        sums = tl.zeros((BLOCK_ROWS,), ACCUMULATOR)
        for block in tl.range(first_block, last_block):
            k = block * BLOCK_DEPTH
            left = load_tile(a, row, k, rows, depth, a_row_stride, a_column_stride, A_ACCESS, BLOCK_ROWS, BLOCK_DEPTH)
            if GRADIENT == NONE:
                operand = left
            else:
                activated = load_tile(
                    saved, row, k, rows, depth, saved_row_stride, saved_column_stride,
                    SAVED_ACCESS, BLOCK_ROWS, BLOCK_DEPTH,
                )  # fmt: skip
                left = activation_gradient(left.to(ACCUMULATOR), activated.to(ACCUMULATOR), GRADIENT, PARAMETER)
                operand = left.to(activated.dtype)
            if row_sums is not None:
                if column_tile == 0:
                    sums += tl.sum(left.to(ACCUMULATOR), 1)
            if b is not None:
                right = load_tile(
                    b, k, column, depth, columns, b_row_stride, b_column_stride, B_ACCESS, BLOCK_DEPTH, BLOCK_COLUMNS
                )
                accumulator = tl.dot(
                    operand, right, accumulator, input_precision=INPUT_PRECISION, out_dtype=ACCUMULATOR
                )

        if row_sums is not None:
            if column_tile == 0:
                row_index = row + tl.arange(0, BLOCK_ROWS)
                sum_offsets = split.to(tl.int64) * rows + row_index
                tl.store(row_sums + sum_offsets, sums.to(row_sums.dtype.element_ty), mask=row_index < rows)
        if b is not None:
            first_row = split * split_rows
            if HALVES:
                # One half after the other: half the registers and shared memory, which buys a deeper pipeline.
                HALF: tl.constexpr = BLOCK_COLUMNS // 2
                halves = tl.permute(tl.reshape(accumulator, (BLOCK_ROWS, 2, HALF)), (0, 2, 1))
                first, second = tl.split(halves)
                finish_tile(
                    first, bias, output, preactivation, row, column, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, HALF,
                )  # fmt: skip
                finish_tile(
                    second, bias, output, preactivation, row, column + HALF, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, HALF,
                )  # fmt: skip
            else:
                finish_tile(
                    accumulator, bias, output, preactivation, row, column, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, BLOCK_COLUMNS,
                )  # fmt: skip


@triton.jit
def combine_kernel(
    partial, bias, output, preactivation, count, columns, splits, split_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """output = act(sum over splits of partial + bias): partial (splits, split_stride), the rest (count,) row by row.

    Launches a 1D grid where each program takes BLOCK elements and adds their splits in order, so that the result is
    the same in every run.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    total = tl.zeros((BLOCK,), partial.dtype.element_ty)
    source = offsets
    for _ in range(splits):
        total += tl.load(partial + source, mask=mask, other=0.0)
        source += split_stride
    if bias is not None:
        total += tl.load(bias + offsets % columns, mask=mask, other=0.0).to(total.dtype)
    if preactivation is not None:
        tl.store(preactivation + offsets, total.to(preactivation.dtype.element_ty), mask=mask)
    tl.store(output + offsets, apply_activation(total, ACTIVATION, PARAMETER).to(output.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """The block sizes of one program, and the share of the best tile's speed that they reach when all is full."""

    rows: int
    columns: int
    depth: int
    warps: int
    speed: float


TILES = {
    "half": (
        Tile(128, 256, 64, 8, 1.0),  # the least shared-memory traffic a product; two groups of four warps, 64 rows each
        Tile(128, 128, 64, 8, 0.85),  # twice as many programs, for a grid that would not fill the device
        Tile(64, 128, 64, 4, 0.65),  # the smallest with full-width Hopper matrix instructions
        Tile(64, 64, 64, 4, 0.45),
        Tile(128, 16, 64, 4, 0.15),  # few columns, as in a classifier's last layer
        Tile(16, 64, 128, 4, 0.15),  # few rows, as in decoding: bound by reading b, so deep blocks
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 1.0),  # 32 deep as float32 takes twice the bytes of half
        Tile(64, 128, 32, 4, 0.75),
        Tile(64, 64, 32, 4, 0.5),
        Tile(128, 16, 32, 4, 0.15),
        Tile(16, 64, 64, 4, 0.15),
    ),
    "float32": (
        Tile(128, 64, 16, 8, 1.0),  # no tensor cores: 32 products a thread, with 16 warps a multiprocessor
        Tile(64, 64, 16, 4, 0.9),
        Tile(64, 16, 32, 4, 0.3),
        Tile(16, 64, 32, 4, 0.3),
    ),
    "float64": (
        Tile(64, 64, 16, 4, 1.0),  # 128 registers of a thread hold accumulators and operands of 8 bytes
        Tile(32, 32, 16, 4, 0.6),
    ),
}
# By element size, where addresses or the activation's gradient take registers beside the accumulators (is_sparing).
SPARING_TILES = {
    2: (Tile(64, 64, 32, 4, 1.0), Tile(128, 16, 32, 4, 0.4), Tile(16, 64, 32, 4, 0.4)),
    4: (Tile(64, 64, 16, 8, 1.0), Tile(64, 16, 16, 4, 0.4), Tile(16, 64, 16, 4, 0.4)),
    8: (Tile(32, 32, 16, 4, 1.0),),
}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
MOST_STAGES = 4  # hides the memory's latency at every block depth here
# Costs beside the products, in products of one output element: filling and draining the pipeline of a tile, and one
# float32 of a split's workspace written and read again (8 bytes, at the rate of 650 products in half precision).
DEPTH_OF_A_TILE = 128
DEPTH_OF_A_PARTIAL = 650
# Up to here the activation's gradient is taken inside the matmul's loads, which saves a launch; beyond, each tile's
# neighbours would take it again, and one elementwise pass first is cheaper.
FUSED_GRADIENT_BYTES = 2**21


@dataclass(frozen=True)
class Config:
    """What choose_config decides for one product."""

    tile: Tile
    stages: int
    splits: int
    halves: bool  # finish a tile in two halves, where all of it would not fit the registers


def fuses_gradient(rows, columns, element_size):
    """Whether the gradients of a linear layer with (rows, columns) outputs should take the activation's gradient
    themselves (kind given), not read it from memory (activation_backward first, then kind none)."""
    return rows * columns * element_size <= FUSED_GRADIENT_BYTES


def precision(dtype, allow_tf32):
    """The class of arithmetic that TILES is keyed by."""
    if dtype == torch.float32:
        return "tf32" if allow_tf32 else "float32"
    return "float64" if dtype == torch.float64 else "half"


def is_sparing(kind, wide, gradient, row_sums, device):
    """Whether to take SPARING_TILES: where an operand is read element by element, so that each has an address of its
    own, or goes through more registers than Hopper's tensor cores need on its way to the products."""
    if kind in ("float32", "float64"):
        return not wide or gradient or row_sums
    return not wide or (gradient and device.capability != 90) or (row_sums and device.capability < 90)


def stages_that_fit(tile, element_size, stored_size, gradient, row_sums, halves, device):
    """How deep the pipeline can be: each stage holds the operands, and one more tile is stored at the same time."""
    stage = (tile.rows * (1 + gradient) + tile.columns) * tile.depth * element_size
    stored = tile.rows * tile.columns * stored_size // (2 if halves else 1)
    reserved = stored if device.capability >= 90 else 0  # where programs run one tile, it reuses the stages' memory
    stages = min(MOST_STAGES, (device.shared_memory - reserved - 1024) // stage)
    if row_sums and device.capability >= 100 and element_size <= 4:
        stages -= element_size // 2  # Blackwell keeps another copy of the operand that is summed, tf32 of both
    return stages


@functools.lru_cache(maxsize=4096)
def choose_config(rows, columns, depth, dtype, allow_tf32, wide, gradient, row_sums, device):
    """The tile and splits of depth with the least estimated time for a (rows, depth) @ (depth, columns) product.

    The estimate is the device's slowest multiprocessor: the number of tiles it runs one after the other, times a
    tile's products, divided by the tile's speed. Pure arithmetic. wide: all is read and written by 16 bytes;
    gradient: a third operand is loaded; row_sums: sums are taken beside the products.
    """
    kind = precision(dtype, allow_tf32)
    sparing = is_sparing(kind, wide, gradient, row_sums, device)
    best = None
    for tile in SPARING_TILES[dtype.itemsize] if sparing else TILES[kind]:
        halves = tile.rows * tile.columns // (tile.warps * 32) >= 128
        if halves and gradient:
            continue  # the gradient's temporaries would spill beside 128 accumulators a thread
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        blocks = triton.cdiv(depth, tile.depth)
        for splits in SPLITS:
            blocks_per_split = triton.cdiv(blocks, splits)
            if splits > 1 and blocks_per_split < MOST_STAGES:
                break
            stored_size = max(dtype.itemsize, 4) if splits > 1 else dtype.itemsize
            stages = stages_that_fit(tile, dtype.itemsize, stored_size, gradient, row_sums, halves, device)
            if stages < 2:
                break
            waves = triton.cdiv(tiles * splits, device.multiprocessors)
            cost = waves * (blocks_per_split * tile.depth + DEPTH_OF_A_TILE) * tile.rows * tile.columns / tile.speed
            if splits > 1:
                cost += splits * rows * columns * DEPTH_OF_A_PARTIAL / device.multiprocessors
            if best is None or cost < best[0]:
                best = cost, Config(tile, stages, splits, halves)
    return best[1]


def is_wide(matrix):
    """Whether Triton can prove 16-byte accesses by pointer: it knows of each number only whether 16 divides it."""
    if matrix is None:
        return True
    for contiguous, other in ((1, 0), (0, 1)):
        if matrix.stride(contiguous) == 1:
            aligned = matrix.stride(other) % 16 == 0 and matrix.shape[contiguous] % 16 == 0
            return aligned and matrix.data_ptr() % 16 == 0
    return False


def access(matrix, uses_tensor_cores, device):
    """How to reach a 2-D tensor: a descriptor needs Hopper, 16-byte alignment and one stride of 1, not overlapping.

    Only tensor cores read what it loads in place; elsewhere it would pass through registers, and spill."""
    if device.capability < 90 or matrix is None or not uses_tensor_cores or 0 in matrix.shape or matrix.data_ptr() % 16:
        return POINTERS
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    aligned = 16 // matrix.element_size()
    if column_stride == 1 and row_stride >= columns and row_stride % aligned == 0:
        return ROWS
    if row_stride == 1 and column_stride >= rows and column_stride % aligned == 0:
        return COLUMNS
    return POINTERS


def _reach(matrix, how, block_rows, block_columns):
    """The kernel's argument for a matrix: itself, or a descriptor of it or of its transpose."""
    if matrix is None or how == POINTERS:
        return matrix
    if how == COLUMNS:
        matrix, block_rows, block_columns = matrix.t(), block_columns, block_rows
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [block_rows, block_columns])


def matmul_launches(
    a, b, output, *, saved=None, bias=None, preactivation=None, row_sums=None,
    activation=0, gradient=0, parameter=0.0, allow_tf32=False, device=None,
):  # fmt: skip
    """The launches of output = act(A @ b + bias) as matmul_kernel has it: one, or with splits of depth two or three."""
    device = device or device_limits(a.device)
    (rows, depth), columns = a.shape, 1 if b is None else b.shape[1]
    uses_tensor_cores = precision(a.dtype, allow_tf32) in ("half", "tf32")
    persistent = uses_tensor_cores and device.capability >= 90
    how = {name: access(matrix, uses_tensor_cores, device) for name, matrix in (("a", a), ("saved", saved), ("b", b))}
    operands = (a, how["a"]), (saved, how["saved"]), (b, how["b"]), (output, access(output, uses_tensor_cores, device))
    wide = all(matrix_access != POINTERS or is_wide(matrix) for matrix, matrix_access in operands)
    config = choose_config(rows, columns, depth, a.dtype, allow_tf32, wide, gradient != 0, row_sums is not None, device)
    tile, splits = config.tile, config.splits
    accumulator = torch.float64 if a.dtype == torch.float64 else torch.float32

    finish = {"bias": bias, "output": output, "preactivation": preactivation}
    target, target_sums, split_rows, epilogue = finish, row_sums, 0, activation
    if splits > 1:
        split_rows = triton.cdiv(rows, tile.rows) * tile.rows  # whole tiles: no split's descriptor writes into the next
        workspace = (
            None if b is None else torch.empty((splits * split_rows, columns), dtype=accumulator, device=a.device)
        )
        target, epilogue = {"bias": None, "output": workspace, "preactivation": None}, 0
        if row_sums is not None:
            target_sums = torch.empty((splits, rows), dtype=accumulator, device=a.device)

    stored = [matrix for matrix in (target["output"], target["preactivation"]) if matrix is not None]
    how_output = ROWS if all(access(matrix, uses_tensor_cores, device) == ROWS for matrix in stored) else POINTERS
    store_columns = tile.columns // 2 if config.halves else tile.columns
    strides = {
        f"{name}_{axis}_stride": 0 if matrix is None else matrix.stride(position)
        for name, matrix in (("a", a), ("saved", saved), ("b", b))
        for position, axis in enumerate(("row", "column"))
    }
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    programs = min(tiles, triton.cdiv(device.multiprocessors, splits)) if persistent else tiles
    launches = [
        Launch(
            matmul_kernel,
            (programs, splits),
            {
                "a": _reach(a, how["a"], tile.rows, tile.depth),
                "saved": _reach(saved, how["saved"], tile.rows, tile.depth),
                "b": _reach(b, how["b"], tile.depth, tile.columns),
                "bias": target["bias"],
                "output": _reach(target["output"], how_output, tile.rows, store_columns),
                "preactivation": _reach(target["preactivation"], how_output, tile.rows, store_columns),
                "row_sums": target_sums,
                "rows": rows,
                "columns": columns,
                "depth": depth,
                "depth_blocks_per_split": triton.cdiv(triton.cdiv(depth, tile.depth), splits),
                "split_rows": split_rows,
                **strides,
            },
            {
                "ACTIVATION": epilogue,
                "GRADIENT": gradient,
                "PARAMETER": compiled_parameter(gradient or epilogue, parameter),
                "A_ACCESS": how["a"].value,
                "SAVED_ACCESS": how["saved"].value,
                "B_ACCESS": how["b"].value,
                "OUTPUT_ACCESS": how_output.value,
                "ACCUMULATOR": tl.float64 if accumulator == torch.float64 else tl.float32,
                "INPUT_PRECISION": "tf32" if precision(a.dtype, allow_tf32) == "tf32" else "ieee",
                "BLOCK_ROWS": tile.rows,
                "BLOCK_COLUMNS": tile.columns,
                "BLOCK_DEPTH": tile.depth,
                "GROUP": 8,
                "HALVES": config.halves,
                "FLATTEN": persistent,
            },
            tile.warps,
            config.stages,
        )
    ]
    if splits > 1 and b is not None:
        launches.append(_combine(workspace, splits, split_rows * columns, columns, activation, parameter, **finish))
    if splits > 1 and row_sums is not None:
        launches.append(_combine(target_sums, splits, rows, rows, 0, 0.0, None, row_sums, None))
    return launches


def _combine(partial, splits, split_stride, columns, activation, parameter, bias, output, preactivation):
    block = 1024  # 16 bytes of float32 a thread, twice
    arguments = {
        "partial": partial,
        "bias": bias,
        "output": output,
        "preactivation": preactivation,
        "count": output.numel(),
        "columns": columns,
        "splits": splits,
        "split_stride": split_stride,
    }
    constants = {"ACTIVATION": activation, "PARAMETER": compiled_parameter(activation, parameter), "BLOCK": block}
    return Launch(combine_kernel, (triton.cdiv(output.numel(), block),), arguments, constants, 4)


def linear_launches(input, weight, bias, output, preactivation, kind, parameter, **options):
    """The launches of linear, not yet run; options are allow_tf32 and, to compile for another, device."""
    return matmul_launches(
        input,
        weight.t(),
        output,
        bias=bias,
        preactivation=preactivation,
        activation=kind,
        parameter=parameter,
        **options,
    )


def input_gradient_launches(grad_output, saved, weight, grad_input, kind, parameter, **options):
    """The launches of linear_input_gradient, not yet run; options are allow_tf32 and, to compile for another, device."""
    return matmul_launches(
        grad_output, weight, grad_input, saved=saved if kind else None, gradient=kind, parameter=parameter, **options
    )


def weight_gradient_launches(grad_output, saved, input, grad_weight, grad_bias, kind, parameter, **options):
    """The launches of linear_weight_gradient, not yet run; options are allow_tf32 and, to compile for another, device."""
    return matmul_launches(
        grad_output.t(), None if grad_weight is None else input, grad_weight, saved=saved.t() if kind else None,
        row_sums=grad_bias, gradient=kind, parameter=parameter, **options,
    )  # fmt: skip


def linear(input, weight, bias, output, preactivation, kind, parameter, *, allow_tf32):
    """output = act(input @ weight.T + bias), and the pre-activation where a tensor for it is given.

    Shapes: input (M, K) and weight (N, K) of any strides, bias (N,) or None, output and preactivation (M, N)
    contiguous; all of one dtype: float32, bfloat16, float16 or float64. M and N are at least 1; K = 0 gives act(bias).
    """
    for launch in linear_launches(input, weight, bias, output, preactivation, kind, parameter, allow_tf32=allow_tf32):
        launch.run()


def linear_input_gradient(grad_output, saved, weight, grad_input, kind, parameter, *, allow_tf32):
    """grad_input (M, K), contiguous, = (grad_output * act'(saved)) @ weight; saved is read only if kind is not none.

    Shapes: grad_output and saved (M, N), weight (N, K), of any strides, an expanded gradient's 0 included.
    """
    for launch in input_gradient_launches(
        grad_output, saved, weight, grad_input, kind, parameter, allow_tf32=allow_tf32
    ):
        launch.run()


def linear_weight_gradient(grad_output, saved, input, grad_weight, grad_bias, kind, parameter, *, allow_tf32):
    """grad_weight (N, K) = dz.T @ input and grad_bias (N,) = dz's column sums, dz = grad_output * act'(saved).

    Either result may be None, and is then not computed; both are contiguous. Shapes: grad_output and saved (M, N),
    input (M, K), of any strides. The same in every run: splits of M are added in order, without atomics.
    """
    for launch in weight_gradient_launches(
        grad_output, saved, input, grad_weight, grad_bias, kind, parameter, allow_tf32=allow_tf32
    ):
        launch.run()


def compile_targets(device):
    """By name, the launches that a machine-code test compiles for a device: every kernel, dtype and way to load."""
    cases = {}
    for dtype, allow_tf32 in (
        (torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False),
        (torch.float64, False),
    ):  # fmt: skip
        for size in (4096, 8, 1000):  # the largest tile, the smallest with splits of depth, a middling ragged one
            rows, inputs, outputs = size, 4096, max(size, 1000)
            for layout in ("aligned", "unaligned"):
                pad = 0 if layout == "aligned" else 1

                def matrix(rows, columns):
                    return torch.empty(rows, columns + pad, dtype=dtype, device="meta")[:, :columns]  # noqa: B023

                x, w, grad, dw = (
                    matrix(rows, inputs), matrix(outputs, inputs), matrix(rows, outputs), matrix(outputs, inputs)
                )  # fmt: skip
                b, y, dx = (
                    torch.empty(*s, dtype=dtype, device="meta") for s in ((outputs,), (rows, outputs), (rows, inputs))
                )
                options = {"allow_tf32": allow_tf32, "device": device}
                name = f"{precision(dtype, allow_tf32) if dtype != torch.bfloat16 else 'bfloat16'}-{size}-{layout}"
                cases[f"linear-{name}"] = linear_launches(x, w, b, y, y, SILU.value, 0.0, **options)
                cases[f"input-{name}"] = input_gradient_launches(grad, grad, w, dx, SILU.value, 0.0, **options)
                cases[f"weight-{name}"] = weight_gradient_launches(grad, grad, x, dw, b, RELU.value, 0.0, **options)
                cases[f"weight-plain-{name}"] = weight_gradient_launches(grad, None, x, dw, b, 0, 0.0, **options)
    return {f"{name}-{index}": launch for name, launches in cases.items() for index, launch in enumerate(launches)}
