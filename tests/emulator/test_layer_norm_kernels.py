"""The CUDA kernels of layer normalisation and dropout, emulated: against float64 in every order of execution."""

from __future__ import annotations

import itertools
import re

import emulation
import pytest
import torch
from test_batch_norm_kernels import assert_near, compute
from test_kernels import DTYPES, SETTINGS, Placed, dtypes
from torch import Tensor

from fastdl.ops import dropout as dropping

pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

EPS = 1e-5
# (rows, columns) by the path that aligned 16-bit data takes.
SHAPES = {
    "a warp, one vector": (5, 200),
    "a warp, four vectors": (9, 1000),
    "two warps": (3, 1032),
    "a block": (2, 5000),
    "read again": (2, 16392),
    "single elements": (13, 33),
    "long single elements": (2, 1501),
    "many rows": (140, 16),
    "one value": (3, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting["schedule"])
def kernels(request):
    module = emulation.load()
    module.configure(**request.param)
    yield module
    module.configure()


def address(placed: Placed | None) -> int:
    return 0 if placed is None else placed.address


def check(kernels, shape, dtype, *, fused=True, rms=False, wide=False, offset=0, p=0.3) -> None:
    """Forward and every gradient, against float64 formulas."""
    rows, columns = shape
    p = p if fused else 0.0
    code, wide = DTYPES[dtype], wide or compute(dtype) == dtype
    parameters = compute(dtype) if wide else dtype
    seed = torch.randint(0, 2**63 - 1, ())
    key = seed.data_ptr() if fused else 0

    def place(values, kind=dtype):
        return Placed(values, kind, offset)

    input, residual = place(torch.randn(shape) + 0.5), place(torch.randn(shape)) if fused else None
    weight = Placed(torch.rand(columns) + 0.5, parameters)
    bias = None if rms else Placed(torch.randn(columns), parameters)
    own = torch.ones(shape, dtype=torch.float64)
    if p:
        own = dropping.factors(seed, p, rows * columns, torch.float64).view(shape)
    output, h = place(shape), place(shape) if fused else None
    mean, rstd = None if rms else Placed((rows,), compute(dtype)), Placed((rows,), compute(dtype))
    results = output, h, mean, rstd
    given = map(address, (input, residual, weight, bias, *results))
    kernels.layer_norm(code, wide, rows, columns, *given, EPS, p, key, 0)
    total = input.tensor.double() * own
    if fused:
        total = total + residual.tensor.double()
        assert_near(h, total)
        total = h.tensor.double()
    x = total.clone().requires_grad_()
    w = weight.tensor.double().requires_grad_()
    centred = x if rms else x - x.mean(1, keepdim=True)
    exact_rstd = 1 / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    normal = centred * exact_rstd
    y = normal * w
    y = y if bias is None else y + bias.tensor.double()
    if not rms:
        assert_near(mean, total.mean(1), total.abs().mean(1))
    assert_near(rstd, exact_rstd.detach().flatten())
    size = (normal.abs() * w).detach() + (0 if bias is None else bias.tensor.double().abs())
    assert_near(output, y.detach(), size)

    grad, grad_sum = place(torch.randn(shape)), place(torch.randn(shape)) if fused else None
    expected_h, expected_w = torch.autograd.grad(y, (x, w), grad.tensor.double())
    scale = (grad.tensor.double() * w.detach() * exact_rstd.detach()).abs() + expected_h.abs()
    if fused:
        expected_h = expected_h + grad_sum.tensor.double()
    bytes_ = kernels.layer_norm_backward_workspace(code, rows, columns)
    saved = h if fused else input
    previous: dict[int, Tensor] = {}
    for needs in ((1, fused, 1, 1), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, fused, 1, 1)):
        kinds = dtype, dtype, compute(dtype), compute(dtype)
        sizes = shape, shape, (columns,), (columns,)
        grads = [place(n, kind) if need else None for n, kind, need in zip(sizes, kinds, needs, strict=True)]
        workspace = Placed((bytes_ // 4,), torch.float32)
        tensors = map(address, (grad, grad_sum, saved, weight, mean, rstd, *grads))
        arguments = *tensors, p, key, workspace.address, 0
        kernels.layer_norm_backward(code, wide, rows, columns, *arguments)
        assert workspace.untouched_around()
        sums = (grad.tensor.double() * normal).abs().sum(0).detach(), grad.tensor.double().abs().sum(0)
        expected = expected_h * own, expected_h, expected_w, grad.tensor.double().sum(0)
        for i, (got, exact, of) in enumerate(zip(grads, expected, (scale * own, scale, *sums), strict=True)):
            if got is not None:
                slack = 64 * torch.finfo(compute(dtype)).eps  # made of statistics that are rounded
                assert_near(got, exact.detach(), of.detach(), slack)
                assert torch.equal(previous.setdefault(i, got.tensor), got.tensor), "varies"


@shapes
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_paths(kernels, rms, shape):
    check(kernels, shape, torch.bfloat16, rms=rms or shape[1] == 1)


@dtypes
@pytest.mark.parametrize("shape", [(5, 200), (13, 33), (2, 2056)], ids=str)
def test_dtypes(dtype, shape):
    kernels = emulation.load()
    kernels.configure(schedule="random", seed=9)
    for fused, wide, offset in ((True, True, 0), (False, False, 0), (True, False, 1)):
        check(kernels, shape, dtype, fused=fused, wide=wide, offset=offset)
    kernels.configure()


@dtypes
@pytest.mark.parametrize(("count", "offset"), [(1, 0), (7, 0), (1003, 0), (1003, 1), (20_011, 0)])
def test_dropout(kernels, dtype, count, offset):
    seed = torch.randint(-(2**63), 2**63 - 1, ())
    x, y = Placed(torch.randn(count), dtype, offset), Placed((count,), dtype, offset)
    for p in (0.3, 1.0):
        kernels.dropout(DTYPES[dtype], x.address, y.address, count, p, seed.data_ptr(), 0)
        expected = x.tensor.to(compute(dtype)) * dropping.factors(seed, p, count, compute(dtype))
        assert torch.equal(y.tensor, expected.to(dtype)) and y.untouched_around()
    kernels.dropout(DTYPES[dtype], x.address, x.address, count, 1.0, seed.data_ptr(), 0)
    assert torch.equal(x.tensor, y.tensor), "in place differs"


def test_plans():
    """A plan's threads cover a row, and keep no more than they may."""
    plan_of = emulation.load().layer_norm_plan
    for full, columns, most in itertools.product(
        (1, 4, 8), (1, 8, 33, 256, 768, 1024, 4096, 8192, 16384, 50_000), (2, 4)
    ):
        plan = plan_of(full, columns, most)
        vectors = columns // plan["width"]
        assert plan["width"] in (1, full) and columns % plan["width"] == 0
        assert 32 <= plan["threads"] <= 512 and plan["threads"] * plan["block_rows"] in (128, 256, 512)
        assert plan["kept"] in (0, 1, 2, 4) and plan["kept"] <= most
        assert plan["kept"] == 0 or plan["threads"] * plan["kept"] >= vectors
        assert plan["kept"] > 0 or plan["width"] == 1 or vectors > 512 * most


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(16).data_ptr()

    def norm(dtype=0, rows=1, columns=1, input=one, p=0.0, seed=one):
        return lambda: kernels.layer_norm(dtype, True, rows, columns, input, 0, 0, 0, one, 0, one, one, EPS, p, seed, 0)

    def backward(grad=one, workspace=one):
        return lambda: kernels.layer_norm_backward(
            0, True, 1, 1, grad, 0, one, 0, one, one, 0, 0, one, 0, 0.0, 0, workspace, 0
        )

    for message, bad in {
        r"layer_norm: dtype must be .* got 4": norm(dtype=4),
        r"layer_norm: rows must be at least 1, got 0": norm(rows=0),
        r"layer_norm: columns must be at least 1, got 0": norm(columns=0),
        r"layer_norm: arrays must be addresses": norm(input=0),
        r"layer_norm: dropout must be 0 to 1, got 2": norm(p=2.0),
        r"layer_norm: seed must be an address": norm(p=0.5, seed=0),
        r"layer_norm_backward: arrays must be addresses": backward(grad=0),
        r"layer_norm_backward: workspace must be an address": backward(workspace=0),
        r"dropout: p must be 0 to 1, got 2": lambda: kernels.dropout(0, one, one, 1, 2.0, one, 0),
        r"dropout: count must be at least 0, got -1": lambda: kernels.dropout(0, one, one, -1, 0.5, one, 0),
        r"dropout: seed must be an address": lambda: kernels.dropout(0, one, one, 1, 0.5, 0, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(mode, [emulation.HERE / "sanitized_layer_norm.py", emulation.module(mode), full]).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
