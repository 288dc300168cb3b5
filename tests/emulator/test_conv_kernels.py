"""The CUDA convolution, emulated: every dtype, tile and path against float64, in every order of execution.

Everything that the package does with it is tested elsewhere; here is what only raw addresses show.
"""

from __future__ import annotations

import math
import re

import emulation
import pytest
import torch
import torch.nn.functional as F
from test_kernels import DTYPES, PARAMETER, Placed, apply, kernels  # noqa: F401
from test_matmul import ARITHMETICS, LARGE, MEDIUM, arithmetics, assert_close
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))
DEVICE = (4, 163 * 1024)  # what the emulator says it is


class Image:
    """Values (or, of a shape, NaN) in memory, and their view: contiguous, channels last, or expanded of one value."""

    def __init__(self, values: Tensor | tuple[int, ...], dtype: torch.dtype, layout: str, offset: int = 0):
        poisoned = isinstance(values, tuple)
        values = torch.full(values, math.nan, dtype=dtype) if poisoned else values.to(dtype)
        if layout == "expanded":
            values = values[:1, :1, :1, :1].expand(values.shape)
        order = (0, 2, 3, 1) if layout == "last" else (0, 1, 2, 3)
        stored = values.permute(order)
        kept = stored[:1, :1, :1, :1] if layout == "expanded" else stored
        self.placed = Placed(tuple(kept.shape) if poisoned else kept, dtype, offset)
        self.tensor = self.placed.tensor.expand(stored.shape).permute([order.index(i) for i in range(4)])
        self.values = values.double()
        self.argument = (self.placed.address, tuple(self.tensor.shape), self.tensor.stride())
        self.untouched_around = self.placed.untouched_around


def none(shape: tuple[int, ...]) -> tuple:
    return 0, tuple(shape), (0, 0, 0, 0)


def check(kernels, arithmetic: str, x_shape, w_shape, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
          kind=0, layout="last", weight="last", grad=None, offset=0, every_need=True) -> list[Tensor]:  # fmt: skip
    """Forward and all gradients; returns them."""
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    code, geometry = DTYPES[dtype], (stride, padding, dilation, groups)
    torch.manual_seed(math.prod(x_shape) + 7 * math.prod(w_shape) + kind)
    x = Image(torch.randn(x_shape), dtype, layout, offset)
    w = Image(torch.randn(w_shape), dtype, weight, offset)
    bias = Placed(torch.randn(w_shape[0], dtype=torch.float64).to(dtype), dtype)
    exact = F.conv2d(x.values, w.values, bias.tensor.double(), *geometry)
    size = F.conv2d(x.values.abs(), w.values.abs(), bias.tensor.double().abs(), *geometry)
    y, z = Image(tuple(exact.shape), dtype, layout, offset), Image(tuple(exact.shape), dtype, layout, offset)
    bytes_needed = kernels.conv_workspace(code, x.argument, w.argument, y.argument, *geometry, tf32)
    space = Placed((bytes_needed // 8,), torch.float64)
    kernels.conv(code, x.argument, w.argument, bias.address, y.argument, z.placed.address, *geometry, kind,
                 PARAMETER.get(kind, 0.0), tf32, space.address if bytes_needed else 0, 0)  # fmt: skip
    assert space.untouched_around()
    depth = math.prod(w_shape[1:])
    assert_close(z, exact, size, 0, depth, tf32)
    assert_close(y, apply(exact, kind), size * 1.2, 0, depth, tf32)

    g = Image(torch.randn(exact.shape), dtype, grad or layout, offset)

    def gradients(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        bias_sizes = [w_shape[0]]
        return torch.ops.aten.convolution_backward(
            g, x, w, bias_sizes, stride, padding, dilation, False, [0, 0], groups, [True] * 3
        )

    expected = gradients(g.values, x.values, w.values)
    sizes = gradients(g.values.abs(), x.values.abs(), w.values.abs())
    depths = (w_shape[0] * w_shape[2] * w_shape[3], exact.shape[0] * exact[0, 0].numel())
    for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1))[: 4 if every_need else 1]:
        dx, dw = Image(tuple(x_shape), dtype, layout, offset), Image(tuple(w_shape), dtype, weight)
        db = Placed((w_shape[0],), dtype)
        arguments = (
            code, g.argument, x.argument if needs[1] else none(x_shape), w.argument if needs[0] else none(w_shape),
            dx.argument if needs[0] else none(x_shape), dw.argument if needs[1] else none(w_shape),
            db.address * needs[2], *geometry, tf32,
        )  # fmt: skip
        bytes_needed = kernels.conv_backward_workspace(*arguments)
        space = Placed((bytes_needed // 8,), torch.float64)
        kernels.conv_backward(*arguments, space.address if bytes_needed else 0, 0)
        assert space.untouched_around()
        for need, got, exact_, size_, depth in zip(needs, (dx, dw), expected, sizes, depths, strict=False):
            if need:
                assert_close(got, exact_, size_, 0, depth, tf32)
            else:
                assert got.tensor.isnan().all()
        if needs[2]:
            assert_close(db, expected[2], sizes[2], 0, depths[1], False)
        if all(needs):
            results = [y.tensor, dx.tensor, dw.tensor, db.tensor]
    return results


# Input, weight, stride, padding, dilation, groups.
CASES = {
    "3x3": ((2, 16, 7, 9), (24, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": ((1, 16, 10, 9), (16, 16, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "uneven": ((1, 8, 11, 12), (16, 8, 5, 2), (2, 3), (3, 1), (1, 2), 1),
    "few channels": ((2, 3, 9, 8), (10, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "grouped": ((1, 32, 6, 7), (48, 16, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "odd groups": ((1, 9, 6, 7), (15, 3, 3, 3), (2, 1), (1, 0), (1, 1), 3),
    "1x1 strided": ((2, 16, 7, 6), (8, 16, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "patches": ((1, 8, 9, 12), (8, 8, 4, 4), (4, 4), (0, 0), (1, 1), 1),
    "dilation and stride": ((1, 8, 13, 13), (8, 8, 3, 3), (3, 2), (2, 4), (2, 4), 1),
    "a line": ((2, 16, 1, 40), (16, 16, 1, 9), (1, 3), (0, 4), (1, 1), 1),
    "wide padding": ((1, 8, 2, 3), (8, 8, 2, 2), (1, 1), (4, 5), (1, 1), 1),
    "depthwise": ((2, 16, 7, 8), (16, 1, 3, 3), (1, 1), (1, 1), (1, 1), 16),
    "depthwise strided": ((2, 8, 9, 10), (8, 1, 5, 3), (2, 3), (2, 1), (1, 2), 8),
    "depthwise multiplier": ((2, 6, 7, 5), (12, 1, 3, 3), (2, 1), (1, 1), (1, 1), 6),
}
cases = pytest.mark.parametrize("case", CASES)


@arithmetics
@cases
@pytest.mark.parametrize("layout", ["last", "contiguous"])
def test_cases(arithmetic, case, layout):
    kind = list(CASES).index(case) % 9
    check(emulation.load(), arithmetic, *CASES[case], kind, layout=layout, weight=layout)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32", "float32"])
@cases
def test_every_order(kernels, arithmetic, case):
    check(kernels, arithmetic, *CASES[case], 1)


@arithmetics
@pytest.mark.parametrize(
    ("layout", "weight", "grad"),
    [("last", "contiguous", "contiguous"), ("contiguous", "last", "expanded"), ("last", "last", "expanded")],
)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("case", ["3x3", "depthwise"])
def test_layouts(arithmetic, layout, weight, grad, offset, case):
    check(emulation.load(), arithmetic, *CASES[case], 2, layout=layout, weight=weight, grad=grad, offset=offset)


@arithmetics
@pytest.mark.parametrize("case", ["3x3", "depthwise"])
def test_expanded_operands(arithmetic, case):
    x_shape, w_shape, *geometry = CASES[case]
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    x, w = Image(torch.randn(x_shape), dtype, "expanded"), Image(torch.randn(w_shape), dtype, "expanded")
    exact = F.conv2d(x.values, w.values, None, *geometry)
    size = F.conv2d(x.values.abs(), w.values.abs(), None, *geometry)
    y, kernels = Image(tuple(exact.shape), dtype, "last"), emulation.load()
    bytes_needed = kernels.conv_workspace(DTYPES[dtype], x.argument, w.argument, y.argument, *geometry, tf32)
    space = torch.full((bytes_needed // 8,), math.nan, dtype=torch.float64)
    arguments = (x.argument, w.argument, 0, y.argument, 0, *geometry, 0, 0.0, tf32, space.data_ptr(), 0)
    kernels.conv(DTYPES[dtype], *arguments)
    assert_close(y, exact, size, 0, math.prod(w_shape[1:]), tf32)


@pytest.mark.parametrize("kind", range(9))
@pytest.mark.parametrize("case", ["few channels", "depthwise"])
def test_activations(kind, case):
    check(emulation.load(), "float16", *CASES[case], kind)
    check(emulation.load(), "float32", *CASES[case], kind, layout="contiguous")


@pytest.mark.parametrize(
    ("arithmetic", "x_shape", "w_shape", "tile"),
    [
        ("bfloat16", (2, 16, 12, 11), (256, 16, 3, 3), LARGE),
        ("float16", (2, 8, 24, 10), (520, 8, 3, 3), MEDIUM),
        ("tf32", (2, 8, 12, 11), (256, 8, 3, 3), LARGE),
        ("tf32", (2, 4, 24, 10), (520, 4, 3, 3), MEDIUM),
        ("float32", (2, 4, 24, 10), (520, 4, 3, 3), MEDIUM),
        ("bfloat16", (1, 64, 3, 700), (128, 64, 3, 3), LARGE),  # the weight's gradient
    ],
)
def test_large_tiles(kernels, arithmetic, x_shape, w_shape, tile):
    n, _, h, w = x_shape
    code = ARITHMETICS[arithmetic][2]
    products = [(n * h * w, w_shape[0], math.prod(w_shape[1:])), (w_shape[0], math.prod(w_shape[1:]), n * h * w)]
    assert tile in [kernels.choose_plan(code, *product, False, False, True, *DEVICE)[:2] for product in products]
    before = kernels.statistics()["ldmatrix_conflicts"]
    check(kernels, arithmetic, x_shape, w_shape, padding=(1, 1), kind=1)
    assert kernels.statistics()["ldmatrix_conflicts"] == before, "bank conflicts"


@arithmetics
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "groups"),
    [((1, 8, 24, 25), (16, 8, 3, 3), 1), ((1, 16, 24, 25), (16, 8, 1, 3), 2), ((1, 64, 3, 3), (16, 64, 3, 3), 1)],
    ids=["weight", "groups", "image"],
)
def test_split_depth_is_deterministic(arithmetic, x_shape, w_shape, groups):
    kernels, results = emulation.load(), []
    dtype, tf32, _ = ARITHMETICS[arithmetic]
    x, w = Image(torch.zeros(x_shape), dtype, "last"), Image(torch.zeros(w_shape), dtype, "last")
    y = Image((x_shape[0], w_shape[0], *x_shape[2:]), dtype, "last")
    padding = (w_shape[2] // 2, w_shape[3] // 2)
    geometry = ((1, 1), padding, (1, 1), groups, tf32)
    if x_shape[1] < 64:
        arguments = (y.argument, x.argument, w.argument, none(x_shape), w.argument, 0, *geometry)
        bytes_needed = kernels.conv_backward_workspace(DTYPES[dtype], *arguments)
    else:
        bytes_needed = kernels.conv_workspace(DTYPES[dtype], x.argument, w.argument, y.argument, *geometry)
    assert bytes_needed > 0, "the test is to split, which alone needs a workspace here"
    for setting in ({"schedule": "forward"}, {"schedule": "reverse"}, {"schedule": "random", "resident": 0}):
        kernels.configure(**setting)
        results.append(check(kernels, arithmetic, x_shape, w_shape, padding=padding, groups=groups, every_need=False))
    kernels.configure()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_plan_counts_groups():
    """A ResNeXt's weight gradient: one group would split its depth further than 32 that run together."""
    plan = emulation.load().choose_plan
    sizes = (0, 8, 72, 50176, False, False, True, 132, 227 * 1024)
    splits = [plan(*sizes, batch)[2] for batch in (1, 32, 128)]
    assert splits[0] > splits[1] > splits[2] == 1


@arithmetics
def test_matrix_instructions(arithmetic):
    kernels = emulation.load()
    before = kernels.statistics()
    for case in ("3x3", "grouped", "strided"):
        check(kernels, arithmetic, *CASES[case])
    after = kernels.statistics()
    uses_tensor_cores = ARITHMETICS[arithmetic][2] < 2
    assert (after["mma"] > before["mma"]) == uses_tensor_cores
    assert (after["ldmatrix"] > before["ldmatrix"]) == uses_tensor_cores
    assert after["ldmatrix_conflicts"] == before["ldmatrix_conflicts"]
    assert after["cp_async"] > before["cp_async"]


def test_only_what_must_is_packed():
    """With channels innermost in whole chunks nothing is copied; a weight or gradient that lies otherwise is."""
    kernels = emulation.load()

    def workspace(channels: int, layout: str, weight: str) -> int:
        x = Image((8, channels, 32, 32), torch.bfloat16, layout)
        w = Image((64, channels, 3, 3), torch.bfloat16, weight)
        y = Image((8, 64, 32, 32), torch.bfloat16, layout)
        return kernels.conv_workspace(1, x.argument, w.argument, y.argument, (1, 1), (1, 1), (1, 1), 1, False)

    assert workspace(64, "last", "last") == 0
    assert workspace(64, "last", "contiguous") == 64 * 64 * 9 * 2
    assert workspace(64, "contiguous", "last") == 8 * 64 * 32 * 32 * 2
    assert workspace(3, "last", "last") == (8 * 32 * 32 + 64 * 9) * 8 * 2  # 3 channels as 8


def test_nan_stays_in_its_window():
    kernels = emulation.load()
    x, w = (
        Image(torch.randn(1, 8, 9, 9), torch.bfloat16, "last"),
        Image(torch.randn(8, 8, 3, 3), torch.bfloat16, "last"),
    )
    x.tensor[0, 3, 4, 5] = math.nan
    y = Image((1, 8, 9, 9), torch.bfloat16, "last")
    kernels.conv(1, x.argument, w.argument, 0, y.argument, 0, (1, 1), (1, 1), (1, 1), 1, 0, 0.0, False, 0, 0)
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 4:7] = True
    assert torch.equal(y.tensor[0, 0].isnan(), expected)


@pytest.mark.parametrize("n", [0, 1])
def test_zero_sizes(n):
    """No images; and no channels, whose empty sum is the bias."""
    kernels = emulation.load()
    x, w = Image((n, 0, 5, 5), torch.float32, "last"), Image((4, 0, 3, 3), torch.float32, "last")
    y, bias = Image((n, 4, 3, 3), torch.float32, "last"), torch.arange(4.0)
    geometry = (1, 1), (0, 0), (1, 1), 1
    size = kernels.conv_workspace(0, x.argument, w.argument, y.argument, *geometry, False)
    space = torch.empty(size + 1)
    kernels.conv(
        0, x.argument, w.argument, bias.data_ptr(), y.argument, 0, *geometry, 0, 0.0, False, space.data_ptr(), 0
    )
    assert torch.equal(y.tensor, bias[:, None, None].expand(n, 4, 3, 3))
    arguments = (0, y.argument, x.argument, w.argument, x.argument, w.argument, 0, *geometry, False)
    kernels.conv_backward(*arguments, space.data_ptr(), 0)


def test_bad_arguments_are_named():
    kernels = emulation.load()

    def conv(x=(1, 8, 5, 5), w=(8, 8, 3, 3), y=(1, 8, 3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
             dtype=0, kind=0):  # fmt: skip
        images = [Image(torch.zeros(shape), torch.float32, "contiguous") for shape in (x, w, y)]
        kernels.conv(dtype, *(image.argument for image in images[:2]), 0, images[2].argument, 0, stride, padding,
                     dilation, groups, kind, 0.0, False, 0, 0)  # fmt: skip

    def backward(**changes):
        shapes = {"g": (1, 8, 3, 3), "x": (1, 8, 5, 5), "w": (8, 8, 3, 3), "dx": (1, 8, 5, 5), "dw": (8, 8, 3, 3)}
        arguments = [(0, shape, (0, 0, 0, 0)) for shape in (shapes | changes).values()]
        kernels.conv_backward(0, *arguments, 0, (1, 1), (0, 0), (1, 1), 1, False, 0, 0)

    for message, call in {
        r"conv: dtype must be .* got 4": lambda: conv(dtype=4),
        r"conv: kind must be .* got 9": lambda: conv(kind=9),
        r"conv: groups must be .* got 0": lambda: conv(groups=0),
        r"conv: stride must be .* got 0": lambda: conv(stride=(0, 1)),
        r"conv: padding must be .* got -1": lambda: conv(padding=(0, -1)),
        r"conv: dilation must be .* got 0": lambda: conv(dilation=(0, 1)),
        r"the output's extent must be .* got 4": lambda: conv(y=(1, 8, 4, 3)),
        r"the output's channels must be .* got 7": lambda: conv(y=(1, 7, 3, 3)),
        r"the output's batch must be .* got 2": lambda: conv(y=(2, 8, 3, 3)),
        r"the input's channels must be .* got 8": lambda: conv(groups=2),
        r"conv: workspace must be an address": conv,  # there is something to pack
        r"grad_input's batch must be": lambda: backward(dx=(2, 8, 5, 5)),
        r"grad_weight's first size must be": lambda: backward(dw=(4, 8, 3, 3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    command = [emulation.HERE / "sanitized_conv.py", emulation.module(mode), full]
    output = emulation.run(mode, command, timeout=600).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
