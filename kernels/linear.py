"""Fused linear layer: matmul with bias and activation, and its three gradients, by one matmul kernel."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .activation import GELU, NONE, SILU, TANH, activation_gradient, apply_activation, compiled_parameter
from .common import Launch, Plan, device_limits

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
def split_columns(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's left and right half."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def finish_halves(
    tile, bias, output, preactivation, row, column, first_row, rows, columns,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr,
    ACCESS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """finish_tile, one half after the other."""
    HALF: tl.constexpr = BLOCK_COLUMNS // 2
    first, second = split_columns(tile, BLOCK_ROWS, BLOCK_COLUMNS)
    finish_tile(
        first, bias, output, preactivation, row, column, first_row, rows, columns,
        ACTIVATION, PARAMETER, ACCESS, BLOCK_ROWS, HALF,
    )  # fmt: skip
    finish_tile(
        second, bias, output, preactivation, row, column + HALF, first_row, rows, columns,
        ACTIVATION, PARAMETER, ACCESS, BLOCK_ROWS, HALF,
    )  # fmt: skip


@triton.jit
def matmul_kernel(
    a, saved, b, bias, output, preactivation, row_sums,
    rows, columns, depth, depth_blocks_per_split, split_rows,
    a_row_stride, a_column_stride, saved_row_stride, saved_column_stride, b_row_stride, b_column_stride,
    ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr, PARAMETER: tl.constexpr,
    A_ACCESS: tl.constexpr, SAVED_ACCESS: tl.constexpr, B_ACCESS: tl.constexpr, OUTPUT_ACCESS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr,
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
            # Part after part: fewer registers, and less shared memory, which buys a deeper pipeline.
            if PARTS == 4:
                HALF: tl.constexpr = BLOCK_COLUMNS // 2
                first, second = split_columns(accumulator, BLOCK_ROWS, BLOCK_COLUMNS)
                finish_halves(
                    first, bias, output, preactivation, row, column, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, HALF,
                )  # fmt: skip
                finish_halves(
                    second, bias, output, preactivation, row, column + HALF, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, HALF,
                )  # fmt: skip
            elif PARTS == 2:
                finish_halves(
                    accumulator, bias, output, preactivation, row, column, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, BLOCK_COLUMNS,
                )  # fmt: skip
            else:
                finish_tile(
                    accumulator, bias, output, preactivation, row, column, first_row, rows, columns,
                    ACTIVATION, PARAMETER, OUTPUT_ACCESS, BLOCK_ROWS, BLOCK_COLUMNS,
                )  # fmt: skip


@triton.jit
def combine_kernel(
    partial, bias, output, preactivation, count, columns, inner, splits, split_stride,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """output = act(sum over splits of partial + bias): partial (splits, split_stride), the rest (count,) row by row.

    A row has columns, each with inner numbers that share a bias.

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
        total += tl.load(bias + offsets // inner % columns, mask=mask, other=0.0).to(total.dtype)
    if preactivation is not None:
        tl.store(preactivation + offsets, total.to(preactivation.dtype.element_ty), mask=mask)
    tl.store(output + offsets, apply_activation(total, ACTIVATION, PARAMETER).to(output.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tile:
    """The block sizes of one program, and how it runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    speed: float  # the share of the best tile's speed that it reaches when all is full

    @property
    def accumulators(self):
        """How many a thread has."""
        return self.rows * self.columns // (self.warps * 32)

    @property
    def parts(self):
        """In how many parts a tile is finished: the longest activation would spill beside 32 accumulators more."""
        return max(self.accumulators // 32, 1)

    @property
    def programs(self):
        """That a multiprocessor should hold at once, where programs run one tile each: of 8 warps, which leaves a
        thread all the registers that it can have."""
        return 8 // self.warps


TILES = {
    "half": (
        Tile(128, 256, 64, 8, 1.0),  # least shared-memory traffic a product; two groups of four warps, 64 rows each
        Tile(128, 128, 64, 8, 0.85),  # twice as many programs, for a grid that would not fill the device
        Tile(64, 128, 64, 4, 0.65),  # the smallest with full-width Hopper matrix instructions
        Tile(64, 64, 64, 4, 0.45),
        Tile(128, 16, 64, 8, 0.15),  # few columns, as in a classifier's last layer
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
        Tile(128, 64, 16, 8, 1.0),  # no tensor cores: 32 products a thread
        Tile(64, 64, 16, 4, 0.9),
        Tile(64, 16, 32, 4, 0.3),
        Tile(16, 64, 32, 4, 0.3),
    ),
    "float64": (
        Tile(64, 32, 16, 8, 1.0),  # numbers take two registers each
        Tile(32, 32, 16, 4, 0.6),
    ),
}
# By element size, where addresses or the activation's gradient take registers beside the accumulators (is_sparing).
SPARING_TILES = {
    2: (Tile(64, 64, 32, 4, 1.0), Tile(128, 16, 32, 8, 0.4), Tile(16, 64, 32, 4, 0.4)),
    4: (Tile(64, 32, 16, 8, 1.0), Tile(64, 16, 16, 8, 0.6), Tile(16, 64, 16, 4, 0.6)),
    8: (Tile(32, 32, 16, 8, 1.0),),
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
COMBINE_PROGRAMS = 4  # of 4 warps a multiprocessor: 32 bytes in flight a thread, while the splits are in L2


@dataclass(frozen=True)
class Config:
    """What choose_config decides for one product."""

    tile: Tile
    stages: int
    splits: int


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


def is_persistent(kind, device):
    """Whether each program runs many tiles, one program a multiprocessor: where the next tile's loads go on beside."""
    return kind in ("half", "tf32") and device.capability >= 90


def programs_at_once(tile, kind, device):
    """How many programs a multiprocessor should hold; AMD's has too little shared memory for two."""
    return 1 if is_persistent(kind, device) or not device.capability else tile.programs


def stages_that_fit(tile, kind, element_size, stored_size, gradient, row_sums, device):
    """How deep the pipeline can be: each stage holds the operands, and one more tile is stored at the same time."""
    stage = (tile.rows * (1 + gradient) + tile.columns) * tile.depth * element_size
    stored = tile.rows * tile.columns * stored_size // tile.parts
    reserved = stored if device.capability >= 90 else 0  # where programs run one tile, it reuses the stages' memory
    shared = (device.shared_memory + 1024) // programs_at_once(tile, kind, device) - 1024
    stages = min(MOST_STAGES, (shared - reserved - 1024) // stage)
    if row_sums and device.capability >= 100 and element_size <= 4:
        stages -= element_size // 2  # Blackwell keeps another copy of the operand that is summed, tf32 of both
    return stages


def usable_tiles(dtype, allow_tf32, wide, gradient, row_sums, device):
    """The tiles that choose_config chooses from."""
    kind = precision(dtype, allow_tf32)
    tiles = SPARING_TILES[dtype.itemsize] if is_sparing(kind, wide, gradient, row_sums, device) else TILES[kind]
    return [
        tile
        for tile in tiles
        # The gradient's temporaries would spill beside 128 accumulators a thread.
        if not (tile.accumulators >= 128 and gradient)
        and stages_that_fit(tile, kind, dtype.itemsize, dtype.itemsize, gradient, row_sums, device) >= 2
    ]


@functools.lru_cache(maxsize=4096)
def choose_config(rows, columns, depth, dtype, allow_tf32, wide, gradient, row_sums, device, only=None):
    """The tile and splits of depth with the least estimated time for a (rows, depth) @ (depth, columns) product.

    The estimate is the device's slowest multiprocessor: the number of tiles it runs one after the other, times a
    tile's products, divided by the tile's speed. Pure arithmetic. wide: all is read and written by 16 bytes;
    gradient: a third operand is loaded; row_sums: sums are taken beside the products; only: the tile to take.
    """
    kind = precision(dtype, allow_tf32)
    best = None
    for tile in (only,) if only else usable_tiles(dtype, allow_tf32, wide, gradient, row_sums, device):
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        blocks = triton.cdiv(depth, tile.depth)
        for splits in SPLITS:
            blocks_per_split = triton.cdiv(blocks, splits)
            if splits > 1 and blocks_per_split < MOST_STAGES:
                break
            stored_size = max(dtype.itemsize, 4) if splits > 1 else dtype.itemsize
            stages = stages_that_fit(tile, kind, dtype.itemsize, stored_size, gradient, row_sums, device)
            if stages < 2:
                break
            waves = triton.cdiv(tiles * splits, device.multiprocessors)
            cost = waves * (blocks_per_split * tile.depth + DEPTH_OF_A_TILE) * tile.rows * tile.columns / tile.speed
            if splits > 1:
                cost += splits * rows * columns * DEPTH_OF_A_PARTIAL / device.multiprocessors
            if best is None or cost < best[0]:
                best = cost, Config(tile, stages, splits)
    return best[1]


def plan(tile, kind, wide, device):
    """What the machine code of a product must reach on a device."""
    if not device.capability:
        instruction = "v_mfma"
    elif kind == "float64":
        instruction = "DMMA" if device.capability <= 90 else ""  # Triton has none for Blackwell
    elif kind == "float32":
        instruction = ""
    elif device.capability < 90 or tile.rows < 64:
        instruction = "HMMA"
    else:
        instruction = "HGMMA" if device.capability < 100 else "UTCHMMA"
    access_bytes = 0 if not wide else 16 if device.capability else 8  # AMD's matrix instructions scatter more
    # For Blackwell's plain cores ptxas fills whatever limit it is told with loads moved ahead, and spills.
    limits_registers = device.capability < 100 or kind in ("half", "tf32")
    return Plan(programs_at_once(tile, kind, device), instruction, limits_registers, access_bytes)


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
    activation=0, gradient=0, parameter=0.0, allow_tf32=False, device=None, tile=None,
):  # fmt: skip
    """The launches of output = act(A @ b + bias) as matmul_kernel has it: one, or with splits of depth two or three."""
    device = device or device_limits(a.device)
    (rows, depth), columns = a.shape, 1 if b is None else b.shape[1]
    kind = precision(a.dtype, allow_tf32)
    uses_tensor_cores, persistent = kind in ("half", "tf32"), is_persistent(kind, device)
    how = {name: access(matrix, uses_tensor_cores, device) for name, matrix in (("a", a), ("saved", saved), ("b", b))}
    operands = (a, how["a"]), (saved, how["saved"]), (b, how["b"]), (output, access(output, uses_tensor_cores, device))
    wide = all(matrix_access != POINTERS or is_wide(matrix) for matrix, matrix_access in operands)
    config = choose_config(
        rows, columns, depth, a.dtype, allow_tf32, wide, gradient != 0, row_sums is not None, device, tile
    )
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
    store_columns = tile.columns // tile.parts
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
                "INPUT_PRECISION": "tf32" if kind == "tf32" else "ieee",
                "BLOCK_ROWS": tile.rows,
                "BLOCK_COLUMNS": tile.columns,
                "BLOCK_DEPTH": tile.depth,
                "GROUP": 8,
                "PARTS": tile.parts,
                "FLATTEN": persistent,
            },
            device,
            tile.warps,
            config.stages,
            plan(tile, kind, wide, device) if b is not None else Plan(),
        )
    ]
    if splits > 1 and b is not None:
        combine = combine_launch(
            workspace, splits, split_rows * columns, columns, activation, parameter, device, **finish
        )
        launches.append(combine)
    if splits > 1 and row_sums is not None:
        launches.append(combine_launch(target_sums, splits, rows, rows, 0, 0.0, device, None, row_sums, None))
    return launches


def combine_launch(
    partial, splits, split_stride, columns, activation, parameter, device, bias, output, preactivation, inner=1
):  # fmt: skip
    """The launch of combine_kernel, not yet run."""
    block = 1024  # 16 bytes of float32 a thread, twice
    arguments = {
        "partial": partial,
        "bias": bias,
        "output": output,
        "preactivation": preactivation,
        "count": output.numel(),
        "columns": columns,
        "inner": inner,
        "splits": splits,
        "split_stride": split_stride,
    }
    constants = {"ACTIVATION": activation, "PARAMETER": compiled_parameter(activation, parameter), "BLOCK": block}
    grid, plan = (triton.cdiv(output.numel(), block),), Plan(COMBINE_PROGRAMS, access_bytes=8)
    return Launch(combine_kernel, grid, arguments, constants, device, 4, plan=plan)


def linear_launches(input, weight, bias, output, preactivation, kind, parameter, **options):
    """The launches of linear, not yet run; options: allow_tf32, device (common.Device), tile."""
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
    """The launches of linear_input_gradient, not yet run; options: allow_tf32, device (common.Device), tile."""
    return matmul_launches(
        grad_output, weight, grad_input, saved=saved if kind else None, gradient=kind, parameter=parameter, **options
    )


def weight_gradient_launches(grad_output, saved, input, grad_weight, grad_bias, kind, parameter, **options):
    """The launches of linear_weight_gradient, not yet run; options: allow_tf32, device (common.Device), tile."""
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


DIRECTIONS = ("forward", "input gradient", "weight gradient", "plain weight gradient")


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: the largest tile in each
    direction, dtype and way to load, all activations, splits of depth; with every all tiles and more dtypes of each."""
    launches = {}

    def add(name, direction, dtype, layout="aligned", tile=None, kind=None, allow_tf32=False, **sizes):
        name = f"{direction} {'tf32' if allow_tf32 else str(dtype).removeprefix('torch.')} {name}"
        options = {"allow_tf32": allow_tf32, "device": device}
        found = _example(direction, dtype, layout, tile, kind, **sizes, **options)
        for position, launch in enumerate(found):
            launches[f"{name} {position}" if len(found) > 1 else name] = launch

    for direction in DIRECTIONS:
        for dtype, allow_tf32 in (
            (torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False),
            (torch.float64, False),
        ):  # fmt: skip
            for layout in ("aligned", "unaligned"):
                tiles = _example_tiles(direction, dtype, allow_tf32, layout == "aligned", device)
                few = not every or dtype == torch.float16  # whose code is bfloat16's but for the conversions
                for tile in tiles[:1] if few else tiles:
                    name = f"{layout} {tile.rows}x{tile.columns}x{tile.depth}"
                    add(name, direction, dtype, layout, tile, allow_tf32=allow_tf32)
        for dtype in (torch.bfloat16, torch.float32) if every else (torch.bfloat16,):
            add("split", direction, dtype, rows=64, columns=256)
    for direction in DIRECTIONS[:2] if every else DIRECTIONS[:1]:
        tile = _example_tiles(direction, torch.bfloat16, False, True, device)[0]
        for kind in range(NONE.value, SILU.value + 1):
            add(f"activation {kind}", direction, torch.bfloat16, tile=tile, kind=kind)
    return launches


def _example_tiles(direction, dtype, allow_tf32, wide, device):
    gradient, row_sums = direction in ("input gradient", "weight gradient"), "weight" in direction
    return usable_tiles(dtype, allow_tf32, wide, gradient, row_sums, device)


def _example(direction, dtype, layout, tile, kind=None, rows=4096, columns=4096, **options):
    """The launches of a product with a tile (None: the chosen one) and, if not given, the longest activation."""

    def matrix(rows, columns):
        return torch.empty(rows, columns + (layout == "unaligned"), dtype=dtype, device="meta")[:, :columns]

    def dense(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    outputs, depth, options = columns, 4096, options | {"tile": tile}
    if direction == "forward":
        kind = TANH.value if kind is None else kind
        output = dense(rows, outputs)
        return linear_launches(
            matrix(rows, depth), matrix(outputs, depth), dense(outputs), output, output, kind, 0.5, **options
        )
    if direction == "input gradient":
        kind = GELU.value if kind is None else kind
        grad = matrix(rows, depth)
        return input_gradient_launches(grad, grad, matrix(depth, outputs), dense(rows, outputs), kind, 0.5, **options)
    kind = GELU.value if direction == "weight gradient" else 0
    grad = matrix(depth, rows)
    return weight_gradient_launches(
        grad, grad, matrix(depth, outputs), dense(rows, outputs), dense(rows), kind, 0.5, **options
    )
