"""The CUDA kernels, emulated: against float64 in every order of execution, and under sanitizers.

Everything that the package does with them is tested elsewhere; here is what only raw addresses show.
"""

from __future__ import annotations

import itertools
import math
import re

import emulation
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NAMES = ("none", "relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu")
PARAMETER = {2: 0.2, 3: 0.7}
SETTINGS = [
    {"schedule": "forward", "completion": "early"},
    {"schedule": "reverse", "completion": "late"},
    {"schedule": "random", "completion": "random", "seed": 5, "resident": 3},
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
kinds = pytest.mark.parametrize("kind", range(9), ids=NAMES)
# Where the activation is the same code, one that saves nothing, one its output and one its input.
some_kinds = pytest.mark.parametrize("kind", [0, 1, 8], ids=["none", "relu", "silu"])


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting["schedule"])
def kernels(request):
    module = emulation.load()
    module.configure(**request.param)
    yield module
    module.configure()


def apply(x: Tensor, kind: int) -> Tensor:
    parameter = PARAMETER.get(kind, 0.0)
    functions = (
        lambda: x.clone(),
        lambda: torch.relu(x),
        lambda: F.leaky_relu(x, parameter),
        lambda: F.elu(x, parameter),
        lambda: torch.sigmoid(x),
        lambda: torch.tanh(x),
        lambda: F.gelu(x),
        lambda: F.gelu(x, approximate="tanh"),
        lambda: F.silu(x),
    )
    return functions[kind]()


def gradient(grad: Tensor, saved: Tensor, kind: int) -> Tensor:
    """In float64, from what the kernel is given."""
    grad, saved = grad.double(), saved.double()
    parameter = PARAMETER.get(kind, 0.0)
    if kind >= 6:
        leaf = saved.clone().requires_grad_()
        return torch.autograd.grad(apply(leaf, kind), leaf, grad)[0] if leaf.numel() else grad
    one = torch.ones_like(saved)
    slopes = (
        lambda: one,
        lambda: torch.where(saved <= 0, 0 * one, one),
        lambda: torch.where(saved > 0, one, parameter * one),
        lambda: torch.where(saved <= 0, saved + parameter, one),
        lambda: saved * (1 - saved),
        lambda: 1 - saved * saved,
    )
    return grad * slopes[kind]()


class Placed:
    """An array at an offset from 16-byte alignment, NaN before and after it; NaN itself if only a shape is given."""

    def __init__(self, values: Tensor | tuple[int, ...], dtype: torch.dtype, offset: int = 0):
        shape = values if isinstance(values, tuple) else values.shape
        count = math.prod(shape)
        self.memory = torch.full((count + 16,), math.nan, dtype=dtype)
        size = self.memory.element_size()
        self.start = -(self.memory.data_ptr() // size) % (16 // size) + offset
        self.tensor = self.memory[self.start : self.start + count].view(shape)
        if isinstance(values, Tensor):
            self.tensor.copy_(values)
        self.address = self.tensor.data_ptr()

    def untouched_around(self) -> bool:
        around = (self.memory[: self.start], self.memory[self.start + self.tensor.numel() :])
        return all(bool(part.isnan().all()) for part in around)


def assert_close(got: Placed, expected: Tensor, scale: Tensor | float = 1.0) -> None:
    """Rounding to the dtype once, and a few roundings of arithmetic on values of size `scale`."""
    assert got.untouched_around()
    dtype = got.tensor.dtype
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    info = torch.finfo(dtype)
    bound = 0.505 * info.eps * expected.abs() + 32 * arithmetic * scale + info.smallest_normal * info.eps
    values = got.tensor.double()
    assert torch.equal(values.isnan(), expected.isnan())
    wrong = ((values - expected).abs() > bound) & (values != expected.to(dtype).double())
    where = wrong.nonzero()
    assert not len(where), f"{len(where)} wrong, first at {where[0].tolist()}: {values[wrong][0]} {expected[wrong][0]}"


@dtypes
@kinds
@pytest.mark.parametrize(("count", "offset"), [(0, 0), (1, 0), (7, 0), (33, 1), (1003, 0), (1003, 3), (20011, 0)])
def test_activation(kernels, dtype, kind, count, offset):
    values = torch.randn(count, dtype=torch.float64) * 3
    if count > 100:
        special = [math.nan, 0.0, -0.0, 1e20, -1e20, 3e38, -3e38, 88.5, -88.5, 100.0, -100.0, 1e-6, -20.0]
        values[5 : 5 + len(special)] = torch.tensor(special, dtype=torch.float64)
    values = values.to(dtype)
    if dtype == torch.float16 or kind == 8:  # infinities are no part of this
        values = values.clamp(-6e4, 6e4)
    code, parameter = DTYPES[dtype], PARAMETER.get(kind, 0.0)
    x, y = Placed(values, dtype, offset), Placed((count,), dtype)
    kernels.activation(code, x.address, y.address, count, kind, parameter, 0)
    assert_close(y, apply(values.double(), kind))
    assert torch.equal(x.tensor.nan_to_num(), values.nan_to_num()), "the input has changed"

    grads = torch.randn(count, dtype=torch.float64).to(dtype)
    saved = Placed(values if kind >= 6 else y.tensor, dtype, offset)
    g, dx = Placed(grads, dtype, offset), Placed((count,), dtype)
    kernels.activation_backward(code, g.address, saved.address if kind else 0, dx.address, count, kind, parameter, 0)
    expected = gradient(grads, saved.tensor, kind)
    if kind == 7:  # torch's own formula overflows
        huge = saved.tensor.double().abs() > 1e15
        expected = torch.where(huge, torch.where(saved.tensor > 0, grads.double(), 0.0).double(), expected)
    assert_close(dx, expected, grads.double().abs() + 1)

    kernels.activation(code, x.address, x.address, count, kind, parameter, 0)
    kernels.activation_backward(code, g.address, saved.address if kind else 0, g.address, count, kind, parameter, 0)
    assert torch.equal(x.tensor.nan_to_num(), y.tensor.nan_to_num()), "in place differs"
    assert torch.equal(g.tensor.nan_to_num(), dx.tensor.nan_to_num()), "in place differs"


SHAPES = [(1, 1), (3, 8), (5, 7), (130, 24), (65, 260), (17, 1030), (700, 16), (900, 3), (0, 5), (5, 0)]


@dtypes
@some_kinds
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bias_activation(kernels, dtype, kind, rows, columns):
    code, parameter = DTYPES[dtype], PARAMETER.get(kind, 0.0)
    offset = rows % 2
    values, shift = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    bias = Placed(shift, dtype)
    results = []
    for with_bias, with_z, in_place in itertools.product((True, False), (True, False), (None, "y", "z")):
        x = Placed(values, dtype, offset)
        y = x if in_place == "y" else Placed((rows, columns), dtype)
        z = x if in_place == "z" else Placed((rows, columns), dtype)
        addresses = (x.address, bias.address * with_bias, y.address, z.address * with_z)
        kernels.bias_activation(code, *addresses, rows, columns, kind, parameter, 0)
        exact = values.double() + shift.double() * with_bias
        assert_close(y, apply(exact, kind), exact.abs() + 1)
        if with_z:
            assert_close(z, exact)
        results.append(y.tensor)
    assert all(torch.equal(result, results[0]) for result in results[:6]), "the result depends on where it is stored"


@dtypes
@some_kinds
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bias_activation_backward(kernels, dtype, kind, rows, columns):
    code, parameter = DTYPES[dtype], PARAMETER.get(kind, 0.0)
    offset = rows % 2
    grads = (torch.randn(rows, columns) + 0.3).to(dtype)
    values = torch.randn(rows, columns).to(dtype)
    saved = Placed(values if kind >= 6 else apply(values, kind), dtype)
    expected = gradient(grads, saved.tensor, kind)
    workspace_bytes = kernels.bias_activation_backward_workspace(rows, columns)
    assert workspace_bytes % 8 == 0
    sums = []
    for with_dz, with_sums, in_place in [(1, 1, 0), (0, 1, 0), (1, 1, 1), (1, 0, 0), (0, 0, 0)]:
        workspace = Placed((workspace_bytes // 8,), torch.float64)
        g = Placed(grads, dtype, offset)
        dz = g if in_place else Placed((rows, columns), dtype, offset)
        grad_bias = Placed((columns,), dtype)
        addresses = (g.address, saved.address if kind else 0, dz.address * with_dz, grad_bias.address * with_sums)
        scratch = workspace.address if with_sums and workspace_bytes else 0
        kernels.bias_activation_backward(code, *addresses, rows, columns, kind, parameter, scratch, 0)
        assert workspace.untouched_around()
        if with_dz:
            assert_close(dz, expected, grads.double().abs() + 1)
        if with_sums:
            sizes = (grads.double().abs() + expected.abs()).sum(0)
            assert_close(grad_bias, expected.sum(0), sizes)
            sums.append(grad_bias.tensor)
    assert all(torch.equal(sums[0], other) for other in sums[1:]), "not deterministic"


def test_sums_of_many_rows():
    kernels = emulation.load()
    rows, columns = 1_000_000, 4
    grads = torch.rand(rows, columns) + 0.5
    result = torch.empty(columns)
    size = kernels.bias_activation_backward_workspace(rows, columns)
    workspace = torch.full((size,), 255, dtype=torch.uint8)
    addresses = (grads.data_ptr(), 0, 0, result.data_ptr())
    kernels.bias_activation_backward(0, *addresses, rows, columns, 0, 0.0, workspace.data_ptr(), 0)
    exact = grads.double().sum(0)
    assert ((result.double() - exact).abs() / exact).max() < 1e-6


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(4).data_ptr()
    for message, call in {
        r"activation: dtype must be .* got 4": lambda: kernels.activation(4, one, one, 1, 0, 0.0, 0),
        r"activation: kind must be .* got 9": lambda: kernels.activation(0, one, one, 1, 9, 0.0, 0),
        r"activation: count must be .* got -1": lambda: kernels.activation(0, one, one, -1, 0, 0.0, 0),
        r"activation: input must be an address": lambda: kernels.activation(0, 0, one, 1, 0, 0.0, 0),
        r"bias_activation: rows must be": lambda: kernels.bias_activation(0, one, 0, one, 0, -1, 1, 0, 0.0, 0),
        r"preactivation must be an array other": lambda: kernels.bias_activation(0, one, 0, one, one, 1, 1, 0, 0.0, 0),
        r"backward: workspace must be": lambda: kernels.bias_activation_backward(
            0, one, 0, 0, one, 1000, 1, 0, 0.0, 0, 0
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_build_describes_itself():
    kernels = emulation.load()
    assert kernels.targets() == ["emulated"]
    assert re.fullmatch(r"\d+\.\d+", kernels.version())
    assert kernels.device_count() == 0


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(mode, [emulation.HERE / "sanitized_calls.py", emulation.module(mode), full]).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
