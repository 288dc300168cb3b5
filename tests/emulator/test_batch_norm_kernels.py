"""The CUDA kernels of batch normalisation, emulated: against float64 in every order of execution, on every path."""

from __future__ import annotations

import itertools
import math
import re

import emulation
import pytest
import torch
from test_kernels import DTYPES, NAMES, PARAMETER, SETTINGS, Placed, apply, dtypes
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

EPS = 1e-5
# (outer, channels, inner) by the path that aligned 16-bit data takes.
SHAPES = {
    "planes, one block a channel": (2, 3, 40),
    "planes, parts": (5, 2, 8000),
    "planes, one channel": (17, 1, 2048),
    "odd planes, one block a channel": (3, 5, 7),
    "odd planes across channels": (9, 8, 1001),
    "odd planes across channels, parts": (700, 8, 13),
    "odd planes, single elements": (3, 2, 3001),
    "columns, one block": (33, 24, 1),
    "columns, parts": (1100, 40, 1),
    "columns, many": (40, 300, 1),
    "odd columns": (70, 5, 1),
    "odd columns, parts": (2100, 3, 1),
    "two values": (2, 3, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting["schedule"])
def kernels(request):
    module = emulation.load()
    module.configure(**request.param)
    yield module
    module.configure()


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_channel(values: Tensor) -> Tensor:
    """(C,) over (outer, C, inner)."""
    return values.double()[None, :, None]


def norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double()))


def assert_near(got: Placed, expected: Tensor, scale: Tensor | None = None, slack: float | None = None) -> None:
    """By norm: rounding to the dtype, and an error of arithmetic (or `slack`) on values of size `scale`."""
    assert got.untouched_around()
    dtype = got.tensor.dtype
    if slack is None:  # in 64 bits what it is compared with is no better
        slack = (64 if dtype == torch.float64 else 8) * torch.finfo(compute(dtype)).eps
    bound = 0.6 * torch.finfo(dtype).eps * norm(expected) + slack * norm(expected if scale is None else scale)
    assert norm(got.tensor - expected) <= bound, (norm(got.tensor - expected), bound)


class Case:
    """Arrays of one call, NaN around each; and what float64 makes of them."""

    def __init__(self, kernels, shape, dtype, kind, offset=0, residual=False, affine=True):
        outer, channels, inner = shape
        self.kernels, self.shape, self.dtype, self.kind = kernels, shape, dtype, kind
        self.code, self.parameter = DTYPES[dtype], PARAMETER.get(kind, 0.0)
        self.place = lambda values: Placed(values, dtype, offset)
        self.column = lambda values=(channels,): Placed(values, compute(dtype), 1)
        self.input = self.place(torch.randn(shape) * 2 + torch.arange(channels)[:, None] % 5)
        self.grad_output = self.place(torch.randn(shape) + 0.2)
        self.weight = self.column(torch.rand(channels) + 0.5) if affine else None
        self.bias = self.column(torch.randn(channels)) if affine else None
        self.residual = self.place(torch.randn(shape)) if residual else None
        x = self.input.tensor.double()
        self.mean, self.variance = x.mean((0, 2)), x.var((0, 2), correction=0)
        self.count = outer * inner
        size = kernels.batch_norm_workspace(self.code, *shape)
        assert size % 8 == 0
        self.workspace = Placed((size // 8,), torch.float64)

    def address(self, placed: Placed | None) -> int:
        return 0 if placed is None else placed.address

    @property
    def parameters(self) -> tuple[int, ...]:
        return tuple(map(self.address, (self.input, self.weight, self.bias, self.residual)))

    def normal(self, mean: Tensor, variance: Tensor) -> Tensor:
        return (self.input.tensor.double() - by_channel(mean)) / (by_channel(variance) + EPS).sqrt()

    def preactivation(self, mean: Tensor, variance: Tensor) -> Tensor:
        z = self.normal(mean, variance)
        if self.weight is not None:
            z = z * by_channel(self.weight.tensor) + by_channel(self.bias.tensor)
        return z if self.residual is None else z + self.residual.tensor.double()

    def forward(self) -> tuple[Placed, ...]:
        results = self.place(self.shape), self.column(), self.column(), self.column()
        addresses = [*self.parameters, *(result.address for result in results)]
        self.kernels.batch_norm(
            self.code, *self.shape, *addresses, EPS, self.kind, self.parameter, self.workspace.address, 0
        )
        assert self.workspace.untouched_around()
        return results

    def backward(self, mean, rstd, training, needs=(1, 1, 1, 1), output=None):
        makers = (lambda: self.place(self.shape), self.column, self.column, lambda: self.place(self.shape))
        grads = [make() if need else None for make, need in zip(makers, needs, strict=True)]
        given = (self.grad_output, self.input, self.weight, self.bias, self.residual, output, mean, rstd, *grads)
        arguments = (*map(self.address, given), bool(training), self.kind, self.parameter, self.workspace.address, 0)
        self.kernels.batch_norm_backward(self.code, *self.shape, *arguments)
        assert self.workspace.untouched_around()
        return grads

    def expected_gradients(self, mean: Tensor, variance: Tensor, training: bool) -> tuple[Tensor, ...]:
        z = self.preactivation(mean, variance).requires_grad_()
        (dz,) = torch.autograd.grad(apply(z, self.kind), z, self.grad_output.tensor.double())
        normal = self.normal(mean, variance)
        grad_bias, grad_weight = dz.sum((0, 2)), (dz * normal).sum((0, 2))
        inner = dz
        if training:
            inner = dz - by_channel(grad_bias / self.count) - normal * by_channel(grad_weight / self.count)
        scale = by_channel(1 / (variance + EPS).sqrt())
        scale = scale if self.weight is None else scale * by_channel(self.weight.tensor)
        return scale * inner, grad_weight, grad_bias, dz


def check(kernels, shape, dtype, kind, **options) -> None:
    """Forward, inference, and every gradient."""
    case = Case(kernels, shape, dtype, kind, **options)
    output, mean, rstd, variance = results = case.forward()
    assert_near(mean, case.mean, case.mean.square() + case.variance)
    assert_near(rstd, 1 / (case.variance + EPS).sqrt())
    assert_near(variance, case.variance * case.count / (case.count - 1))
    expected = apply(case.preactivation(case.mean, case.variance), kind)
    assert_near(output, expected)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(results, case.forward(), strict=True)), "varies"

    given = case.column(case.mean + 0.1), case.column(case.variance * 1.1)
    inferred = case.place(shape)
    addresses = [*case.parameters, *(placed.address for placed in (*given, inferred))]
    kernels.batch_norm_inference(case.code, *shape, *addresses, EPS, kind, case.parameter, 0)
    assert_near(inferred, apply(case.preactivation(*(placed.tensor for placed in given)), kind))

    from_output = output if case.residual is not None and kind in (1, 2, 3, 4, 5) else None
    needs_residual = kind != 0
    for training in (True, False):
        # The gradient as it should be of the statistics that the kernel has been given.
        exact_variance = rstd.tensor.double() ** -2 - EPS
        expected = case.expected_gradients(mean.tensor.double(), exact_variance, training)
        for needs in [(1, 1, 1, needs_residual), (1, 0, 0, 0), (0, 1, 1, 0)]:
            grads = case.backward(mean, rstd, training, needs, from_output)
            sizes = by_channel(rstd.tensor if case.weight is None else rstd.tensor * case.weight.tensor)
            scales = [sizes * expected[3].abs(), *(expected[3].abs().sum((0, 2)),) * 2, expected[3].abs()]
            for grad, exact, scale in zip(grads, expected, scales, strict=True):
                if grad is not None:
                    # Made of an output that has been rounded, or of the residual's gradient that is.
                    rounded = from_output is not None or needs[3]
                    eps = torch.finfo(dtype if rounded else compute(dtype)).eps
                    assert_near(grad, exact, scale, 32 * torch.finfo(compute(dtype)).eps + 4 * eps)
        again = case.backward(mean, rstd, training, needs, from_output)
        pairs = zip(grads, again, strict=True)
        assert all(a is None or torch.equal(a.tensor, b.tensor) for a, b in pairs), "varies"


@shapes
@pytest.mark.parametrize("kind", [1, 8], ids=["relu", "silu"])
def test_paths(kernels, kind, shape):
    """Every way to go over an array, with an activation that needs no call of a function, and with one that does."""
    check(kernels, shape, torch.bfloat16, kind)


@shapes
@dtypes
def test_dtypes(dtype, shape):
    kernels = emulation.load()
    kernels.configure(schedule="random", seed=9)
    check(kernels, shape, dtype, 1, affine=False)
    kernels.configure()


SMALL = [(3, 5, 16), (40, 300, 1)]


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("kind", range(9), ids=NAMES)
def test_residual_and_kinds(kind, shape):
    """Unaligned, so that planes and columns are gone over by single elements too."""
    for dtype, offset in ((torch.float32, 0), (torch.float16, 1)):
        check(emulation.load(), shape, dtype, kind, offset=offset, residual=True)


@pytest.mark.parametrize("shape", [(5, 2, 8000), (1100, 40, 1), (9, 8, 1001)])
def test_statistics_and_apply(kernels, shape):
    """What the synchronised layer is made of: the same as the plain backward is."""
    case = Case(kernels, shape, torch.float32, 0)
    _, mean, rstd, _ = case.forward()
    own_mean, squares = case.column(), case.column()
    arguments = (case.input.address, own_mean.address, squares.address, case.workspace.address, 0)
    kernels.batch_norm_statistics(case.code, *shape, *arguments)
    assert torch.equal(own_mean.tensor, mean.tensor)
    assert_near(squares, case.variance * case.count)

    grad_input, grad_weight, grad_bias, _ = case.backward(mean, rstd, True, (1, 1, 1, 0))
    means = [case.column(sums.tensor / case.count) for sums in (grad_bias, grad_weight)]
    applied = case.place(shape)
    given = (case.grad_output, case.input, case.weight, mean, rstd, *means, applied)
    kernels.batch_norm_apply(case.code, *shape, *map(case.address, given), 0)
    assert_near(applied, grad_input.tensor.double())


@pytest.mark.parametrize("shape", [(4, 3, 16), (5, 2, 8000), (1100, 40, 1), (9, 8, 1001)])
def test_large_mean(shape):
    """Mean 1e4, variance 1: the mean is rounded once, the variance keeps all its digits."""
    case = Case(emulation.load(), shape, torch.float32, 0)
    case.input.tensor.copy_(torch.randn(shape) + 1e4)
    x = case.input.tensor.double()
    _, mean, _, variance = case.forward()
    assert ((mean.tensor - x.mean((0, 2))).abs() <= 1.01 * 2**-11).all()  # half a unit in the last place
    assert_near(variance, x.var((0, 2)))


def test_outlier_first():
    """What the others are measured from is not that."""
    case = Case(emulation.load(), (5, 2, 8000), torch.float32, 0)
    case.input.tensor[:] = torch.randn(case.shape) + 1e4
    case.input.tensor[0, :, 0] = 0
    x = case.input.tensor.double()
    _, mean, _, variance = case.forward()
    assert_near(mean, x.mean((0, 2)))
    assert_near(variance, x.var((0, 2)))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_special_values(value):
    """They stay in their channel, and the mean is as torch's."""
    for shape in ((4, 3, 16), (1100, 8, 1)):
        case = Case(emulation.load(), shape, torch.float32, 1)
        case.input.tensor[0, 1, 0] = value
        output, mean, rstd, variance = (result.tensor for result in case.forward())
        assert output[:, 1].isnan().all() and rstd[1].isnan() and variance[1].isnan()
        torch.testing.assert_close(mean[1], case.input.tensor[:, 1].mean(), equal_nan=True)
        assert output[:, [0, 2]].isfinite().all()


def test_plans():
    """The plan covers every element once, by vectors that lie in memory as they should, for any shape."""
    plan_of = emulation.load().batch_norm_plan
    for full, outer, channels, inner, operands in itertools.product(
        (1, 4, 8), (1, 3, 8, 700), (1, 3, 8, 24), (1, 7, 49, 64, 3136), (1, 2)
    ):
        plan = plan_of(full, outer, channels, inner, operands)
        width, lanes, spread = plan["width"], plan["lanes"], plan["spread"]
        row = outer * inner if channels == 1 else channels * inner
        assert plan["columns"] * plan["items"] * width == outer * channels * inner
        assert width in (1, full) and lanes in (1, width)
        assert plan["column_stride"] % width == 0 and (width == 1 or row % width == 0)
        assert plan["row_items"] == 1 or inner % width == 0 or channels == 1
        assert plan["columns"] * lanes == channels * spread
        block_columns = plan["block_columns"]
        assert block_columns & (block_columns - 1) == 0 and block_columns <= 32
        if plan["whole"]:
            assert spread == 1 and plan["items"] <= 512 // block_columns * (8 if width > 1 else 16) // operands


def test_partitions():
    partition = emulation.load().partition
    for column_blocks, items, step, most in itertools.product(
        (1, 3, 64, 5000), (1, 31, 1024, 100_000), (32, 2048), (6, 4096)
    ):
        parts, part = partition(column_blocks, items, step, most)
        assert part % step == 0 and (parts - 1) * part < items <= parts * part
        assert parts == 1 or parts * column_blocks <= most
    # ResNet's first layers at batch 32 and a few channels fill a GPU.
    assert partition(64, 32 * 3136 // 8, 2048, 4096)[0] == 7
    assert partition(3, 32 * 50176 // 8, 2048, 4096)[0] == 98


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(4).data_ptr()
    arguments = (one,) * 8
    for message, shape, dtype, kind in (
        (r"batch_norm: dtype must be .* got 4", (1, 1, 2), 4, 0),
        (r"batch_norm: kind must be .* got 9", (1, 1, 2), 0, 9),
        (r"batch_norm: channels must be at least 1, got 0", (1, 0, 2), 0, 0),
        (r"batch_norm: vectors of a channel must be less than 2\^31", (2**31, 2, 3), 0, 0),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.batch_norm(dtype, *shape, *arguments, EPS, kind, 0.0, one, 0)
    with pytest.raises(ValueError, match="batch_norm: arrays must be addresses"):
        kernels.batch_norm(0, 1, 1, 2, 0, *arguments[1:], EPS, 0, 0.0, one, 0)


@pytest.mark.parametrize(("mode", "report"), [("asan", "AddressSanitizer|runtime error"), ("tsan", "Thread")])
def test_sanitized(mode, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    full = str(int(mode == "asan"))
    output = emulation.run(mode, [emulation.HERE / "sanitized_batch_norm.py", emulation.module(mode), full], 600).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
