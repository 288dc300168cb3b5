"""The CUDA matmul, emulated: every dtype, tile and memory layout against float64, in every order of execution.

Everything that the package does with it is tested elsewhere; here is what only raw addresses show.
"""

from __future__ import annotations

import math
import re

import emulation
import pytest
import torch
from test_kernels import DTYPES, PARAMETER, Placed, apply, gradient, kernels  # noqa: F401
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

# dtype, allow_tf32, and the code of choose_plan's arithmetic.
ARITHMETICS = {
    "bfloat16": (torch.bfloat16, False, 0),
    "float16": (torch.float16, False, 0),
    "tf32": (torch.float32, True, 1),
    "float32": (torch.float32, False, 2),
    "float64": (torch.float64, False, 3),
}
arithmetics = pytest.mark.parametrize("arithmetic", ARITHMETICS)
DEVICE = (4, 163 * 1024)  # what the emulator says it is
LARGE, MEDIUM, SMALL = (128, 256), (128, 128), (64, 64)


class Matrix:
    """Random values and their place: by rows, by columns, in wider rows, or one value with strides 0."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, layout: str = "rows", offset: int = 0):
        values = torch.randn(rows, columns, dtype=torch.float64).to(dtype)
        if layout == "rows":
            self.placed, self.strides = Placed(values, dtype, offset), (columns, 1)
        elif layout == "columns":
            self.placed, self.strides = Placed(values.t().contiguous(), dtype, offset), (1, rows)
        elif layout == "padded":
            wide = torch.full((rows, columns + 8), math.nan, dtype=dtype)
            wide[:, :columns] = values
            self.placed, self.strides = Placed(wide, dtype, offset), (columns + 8, 1)
        else:
            assert layout == "expanded"
            values = torch.randn(1, 1, dtype=torch.float64).to(dtype)
            self.placed, self.strides = Placed(values, dtype, offset), (0, 0)
            values = values.expand(rows, columns)
        self.values = values.double()
        self.arguments = (self.placed.address, *self.strides)


def assert_close(got: Placed, expected: Tensor, size: Tensor, error: Tensor | float, depth: int, tf32: bool) -> None:
    """size: sums of the products' sizes; error: what the operands' own errors make."""
    assert got.untouched_around()
    info = torch.finfo(got.tensor.dtype)
    arithmetic = torch.finfo(torch.float64 if got.tensor.dtype == torch.float64 else torch.float32).eps
    bound = 0.505 * info.eps * expected.abs() + info.smallest_normal * info.eps + error
    bound += size * (arithmetic * (8 + math.sqrt(depth)) + (2**-10 if tf32 else 0))
    values = got.tensor.double()
    wrong = ~((values - expected).abs() <= bound)
    where = wrong.nonzero()
    assert not len(where), f"{len(where)} wrong, first at {where[0].tolist()}: {values[wrong][0]} {expected[wrong][0]}"


def check(kernels, arithmetic: str, M: int, N: int, K: int, kind: int = 0, *, input="rows", weight="rows",
          grad="rows", offset: int = 0, split: bool = True) -> list[Tensor]:  # fmt: skip
    """Forward and both gradients; returns all results."""
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    code, parameter = DTYPES[dtype], PARAMETER.get(kind, 0.0)
    torch.manual_seed(M * 10007 + N * 101 + K + kind)
    x, w = Matrix(M, K, dtype, input, offset), Matrix(N, K, dtype, weight, offset)
    bias = Placed(torch.randn(N, dtype=torch.float64).to(dtype), dtype)
    output, z = Placed((M, N), dtype), Placed((M, N), dtype)
    kernels.linear(code, *x.arguments, *w.arguments, bias.address, output.address, z.address, M, N, K, kind, parameter,
                   tf32, 0, 0)  # fmt: skip
    b = bias.tensor.double()
    expected, size = x.values @ w.values.t() + b, x.values.abs() @ w.values.abs().t() + b.abs()
    assert_close(z, expected, size, 0, K, tf32)
    assert_close(output, apply(expected, kind), size * 1.2, 0, K, tf32)

    saved = Placed((z if kind >= 6 else output).tensor.clone(), dtype, offset)
    g = Matrix(M, N, dtype, grad, offset)
    exact = gradient(g.values, saved.tensor, kind) if M * N else g.values
    dz = exact.to(dtype).double()
    small = 32 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    dz_error = torch.zeros_like(dz)
    if kind:
        dz_error = torch.finfo(dtype).eps * dz.abs() + small * (g.values.abs() + dz.abs())
        dz_error += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    workspaces = []
    for product in (1, 2):
        bytes_needed = kernels.linear_workspace(product, code, M, N, K, 0, True) if split else 0
        workspaces.append(Placed((bytes_needed // 8,), torch.float64))
    first, second = (w_.address if w_.tensor.numel() else 0 for w_ in workspaces)
    saved_address = saved.address if kind else 0
    dx, dw = Placed((M, K), dtype), Placed((N, K), dtype)
    kernels.linear_input_gradient(code, *g.arguments, saved_address, *w.arguments, dx.address, M, N, K, kind,
                                  parameter, tf32, first, 0)  # fmt: skip
    assert_close(dx, dz @ w.values, dz.abs() @ w.values.abs(), dz_error @ w.values.abs(), N, tf32)
    sums = []
    for with_weight, with_bias in ((1, 1), (1, 0), (0, 1), (0, 0)):
        db = Placed((N,), dtype)
        dw = Placed((N, K), dtype)
        kernels.linear_weight_gradient(
            code, *g.arguments, saved_address, *x.arguments, dw.address * with_weight, db.address * with_bias,
            M, N, K, kind, parameter, tf32, True, second, 0,
        )  # fmt: skip
        if with_weight:
            dw_error = dz_error.t() @ x.values.abs()
            assert_close(dw, dz.t() @ x.values, dz.abs().t() @ x.values.abs(), dw_error, M, tf32)
            weight_gradient = dw.tensor
        if with_bias:
            assert_close(db, dz.sum(0), dz.abs().sum(0), dz_error.sum(0), M, False)
            sums.append(db.tensor)
    assert all(w_.untouched_around() for w_ in workspaces)
    return [output.tensor, dx.tensor, weight_gradient, sums[0]]


@arithmetics
@pytest.mark.parametrize(
    ("M", "N", "K", "kind"),
    [(1, 1, 1, 1), (67, 33, 129, 8), (5, 300, 7, 2), (1, 72, 136, 3), (72, 1, 40, 4), (130, 72, 200, 6)],
)
def test_sizes(kernels, arithmetic, M, N, K, kind):
    check(kernels, arithmetic, M, N, K, kind)


@arithmetics
@pytest.mark.parametrize("kind", range(9))
def test_activations(arithmetic, kind):
    check(emulation.load(), arithmetic, 40, 72, 24, kind)
    check(emulation.load(), arithmetic, 40, 72, 24, kind, offset=1)


@arithmetics
@pytest.mark.parametrize("input", ["rows", "columns", "expanded"])
@pytest.mark.parametrize("weight", ["rows", "columns", "padded"])
@pytest.mark.parametrize(("grad", "kind"), [("rows", 0), ("columns", 0), ("expanded", 1), ("padded", 7)])
def test_layouts(arithmetic, input, weight, grad, kind):
    check(emulation.load(), arithmetic, 72, 80, 104, kind, input=input, weight=weight, grad=grad)


@pytest.mark.parametrize(
    ("arithmetic", "sizes", "tile"),
    [
        ("bfloat16", (264, 256, 200), LARGE),
        ("float16", (256, 260, 72), LARGE),
        ("tf32", (264, 256, 72), LARGE),
        ("bfloat16", (256, 520, 136), MEDIUM),
        ("float16", (300, 520, 72), MEDIUM),
        ("tf32", (300, 520, 72), MEDIUM),
        ("float32", (300, 520, 72), MEDIUM),
    ],
)
def test_large_tiles(kernels, arithmetic, sizes, tile):
    """In all four layouts: the forward's operands have each, and so have the gradients'."""
    M, N, K = sizes
    code = ARITHMETICS[arithmetic][2]
    assert kernels.choose_plan(code, M, N, K, False, False, False, *DEVICE)[:2] == tile
    before = kernels.statistics()["ldmatrix_conflicts"]
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    for input, weight in (("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("columns", "columns")):
        x, w = Matrix(M, K, dtype, input), Matrix(N, K, dtype, weight)
        output = Placed((M, N), dtype)
        kernels.linear(DTYPES[dtype], *x.arguments, *w.arguments, 0, output.address, 0, M, N, K, 1, 0.0, tf32, 0, 0)
        expected, size = x.values @ w.values.t(), x.values.abs() @ w.values.abs().t()
        assert_close(output, expected.relu(), size, 0, K, tf32)
    # A weight gradient of this size, with its bias's: A by rows, whose sums are taken.
    g, x = Matrix(K, M, dtype), Matrix(K, N, dtype)
    dw, db = Placed((M, N), dtype), Placed((M,), dtype)
    kernels.linear_weight_gradient(DTYPES[dtype], *g.arguments, 0, *x.arguments, dw.address, db.address, K, M, N, 0,
                                   0.0, tf32, True, 0, 0)  # fmt: skip
    assert_close(dw, g.values.t() @ x.values, g.values.abs().t() @ x.values.abs(), 0, K, tf32)
    assert_close(db, g.values.sum(0), g.values.abs().sum(0), 0, K, False)
    assert kernels.statistics()["ldmatrix_conflicts"] == before, "bank conflicts"


@arithmetics
def test_split_depth_is_deterministic(arithmetic):
    kernels = emulation.load()
    _, _, code = ARITHMETICS[arithmetic]
    M, N, K = 2000, 40, 48
    splits = kernels.choose_plan(code, N, K, M, False, False, True, *DEVICE)[2]
    assert splits > 1, "the test is to split"
    results = []
    for setting in ({"schedule": "forward"}, {"schedule": "reverse"}, {"schedule": "random", "resident": 0}):
        kernels.configure(**setting)
        results.append(check(kernels, arithmetic, M, N, K, 1))
    kernels.configure()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    check(kernels, arithmetic, M, N, K, 1, split=False)
    check(kernels, arithmetic, M, N - 1, K - 1, 6, grad="columns", offset=1)


@arithmetics
def test_no_bank_conflicts(arithmetic):
    kernels = emulation.load()
    before = kernels.statistics()
    for input, weight, grad in (("rows", "rows", "rows"), ("columns", "rows", "columns"), ("rows", "columns", "rows")):
        check(kernels, arithmetic, 136, 72, 264, 1, input=input, weight=weight, grad=grad)
    check(kernels, arithmetic, 67, 33, 129, 1, offset=1)
    after = kernels.statistics()
    assert after["ldmatrix_conflicts"] == before["ldmatrix_conflicts"]
    uses_tensor_cores = ARITHMETICS[arithmetic][2] < 2
    assert (after["ldmatrix"] > before["ldmatrix"]) == uses_tensor_cores
    assert (after["mma"] > before["mma"]) == uses_tensor_cores
    assert after["cp_async"] > before["cp_async"]


@arithmetics
@pytest.mark.parametrize(("M", "N", "K"), [(5, 7, 0), (0, 7, 5), (5, 0, 7), (0, 0, 0)])
def test_zero_sizes(arithmetic, M, N, K):
    """An empty sum is 0: the activation of the bias remains."""
    check(emulation.load(), arithmetic, M, N, K, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype):
    kernels = emulation.load()
    x, w = Matrix(70, 72, dtype), Matrix(66, 72, dtype)
    x.placed.tensor[3, 5] = math.nan
    x.placed.tensor[68, 71] = math.inf
    output = Placed((70, 66), dtype)
    kernels.linear(DTYPES[dtype], *x.arguments, *w.arguments, 0, output.address, 0, 70, 66, 72, 0, 0.0, False, 0, 0)
    finite = output.tensor.isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [3, 68]
    assert output.tensor[3].isnan().all()


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(64).data_ptr()
    operands = (one, 8, 1, one, 8, 1)

    def linear(dtype=0, M=1, kind=0, path=0, output=one, preactivation=0):
        kernels.linear(dtype, *operands, 0, output, preactivation, M, 8, 8, kind, 0.0, False, path, 0)

    def weight_gradient(saved, kind):
        kernels.linear_weight_gradient(0, one, 8, 1, saved, one, 8, 1, one, 0, 1, 8, 8, kind, 0.0, False, True, 0, 0)

    for message, call in {
        r"linear: dtype must be .* got 4": lambda: linear(dtype=4),
        r"linear: M must be .* got -1": lambda: linear(M=-1),
        r"linear: kind must be .* got 9": lambda: linear(kind=9),
        r"linear: path must be .* got 2": lambda: linear(path=2),
        r"linear: path must be 0 for operands": lambda: linear(path=1),  # float32
        r"linear: output must be an address": lambda: linear(output=0),
        r"preactivation must be an array other": lambda: linear(preactivation=one),
        r"weight_gradient: saved must be": lambda: weight_gradient(0, 1),
        r"input_gradient: weight must be": lambda: kernels.linear_input_gradient(
            0, one, 8, 1, 0, 0, 8, 1, one, 1, 8, 8, 0, 0.0, False, 0, 0
        ),
        r"workspace: product must be .* got 3": lambda: kernels.linear_workspace(3, 0, 1, 1, 1, 0, True),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


A100, H100, RTX = (108, 163 * 1024), (132, 227 * 1024), (84, 99 * 1024)


@pytest.mark.parametrize(
    ("arithmetic", "sizes", "options", "device", "tile", "splits"),
    [
        (0, (4096, 4096, 4096), "", H100, LARGE, 1),  # 512 large tiles: 3.9 a multiprocessor
        (0, (4096, 4096, 4096), "", A100, LARGE, 1),
        (1, (4096, 4096, 4096), "", H100, LARGE, 1),
        (0, (4096, 4096, 4096), "", RTX, MEDIUM, 1),  # the large tile needs 144 KiB of shared memory
        (0, (2048, 1024, 1024), "", H100, MEDIUM, 1),  # 64 large tiles would leave half of the device idle
        (0, (512, 512, 512), "", H100, SMALL, 1),  # 64 small tiles, 16 medium
        (0, (16, 4096, 4096), "", H100, SMALL, 1),  # few rows
        (0, (1024, 1024, 65536), "split", H100, LARGE, 4),  # 32 tiles of a deep weight gradient
        (0, (1024, 1024, 65536), "", H100, SMALL, 1),  # the same with no workspace: 256 small tiles
        (0, (4096, 4096, 4096), "flexible", H100, SMALL, 1),  # any strides
        (0, (64, 64, 100), "split", H100, SMALL, 1),  # too shallow to be split
        (0, (768, 0, 100000), "flexible split", H100, SMALL, 32),  # only sums of rows
        (2, (4096, 4096, 4096), "", H100, MEDIUM, 1),  # CUDA cores: 128 x 128
        (2, (256, 256, 256), "", H100, SMALL, 1),
        (3, (4096, 4096, 4096), "", H100, SMALL, 1),  # float64 has one tile
    ],
)
def test_plan(arithmetic, sizes, options, device, tile, splits):
    flexible, split = "flexible" in options, "split" in options
    plan = emulation.load().choose_plan(arithmetic, *sizes, flexible, False, split, *device)
    assert (plan[:2], plan[2]) == (tile, splits)


@pytest.mark.parametrize("device", [A100, H100, RTX])
def test_every_plan_covers_the_depth_once(device):
    kernels = emulation.load()
    for arithmetic in range(4):
        for rows, columns, depth in (
            (1, 1, 1),
            (64, 64, 4099),
            (4096, 512, 777),
            (300, 0, 10**6),
            (8, 8, 2**31 - 2048),
        ):
            _, _, splits, split_depth = kernels.choose_plan(
                arithmetic, rows, columns, depth, False, False, True, *device
            )
            assert (splits - 1) * split_depth < depth <= splits * split_depth


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(
        mode, [emulation.HERE / "sanitized_linear.py", emulation.module(mode), full], timeout=600
    ).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
