"""Dropout: every backend drops the same elements, by the seed alone, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from suite import FLOATING, backends, device_of, name_of
from torch import nn

import fastdl
from fastdl import dispatch
from fastdl.functional import dropout
from fastdl.ops import _philox
from fastdl.ops import dropout as ops

KERNELS = [name for name in ("cpu", "triton", "cuda") if name in dispatch.OPS["dropout"].support]
NATIVE = backends(*KERNELS) if KERNELS else []
BACKENDS = backends("torch", *KERNELS)

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "narrowed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


def run(backend, input, p, seed=1, **options):
    torch.manual_seed(seed)
    with fastdl.use_backend(backend):
        return dropout(input, p, **options)


def factors_of(seed, p, count, dtype=torch.float64):
    """What the function draws after torch.manual_seed(seed), on the CPU."""
    torch.manual_seed(seed)
    return ops.factors(_philox.new_seed(torch.empty(0)), p, count, dtype)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 63, 64, 65, 1031, 4097])
@pytest.mark.parametrize("backend", NATIVE)
def test_is_the_references(backend, count, dtype):
    x = torch.randn(count).to(dtype)
    p = 0.3
    actual = run(backend, x.to(device_of(backend)), p, seed=5)
    if not torch.cuda.is_available():  # a GPU's generator gives other seeds
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        expected = (x.to(wide) * factors_of(5, p, count, wide)).to(dtype)
        assert torch.equal(actual, expected)
    assert actual.dtype == dtype


@pytest.mark.parametrize("backend", NATIVE)
def test_is_the_references_for_any_seed(backend):
    """The op itself, whose seed may be any number of 64 bits, and beyond the first 2^34 elements' counters."""
    x = torch.randn(300, dtype=torch.float64, device=device_of(backend))
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF):
        key = torch.tensor(seed, device=x.device)
        for p in (1e-9, 0.5, 0.999999, 1.0):
            actual = ops.DROPOUT.implementations[backend](x, key, p)
            torch.testing.assert_close(actual, ops.reference(x, key, p), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, layout, dtype):
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6).to(dtype)).to(device_of(backend))
    before = x.clone()
    y = run(backend, x, 0.4)
    assert torch.equal(x, before) and y.shape == x.shape and y.dtype == x.dtype
    wide = x.double() / 0.6
    kept = y != 0
    torch.testing.assert_close(y.double()[kept], wide[kept], rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert 0.4 < kept.double().mean() < 0.8
    if layout in ("transposed", "channels_last"):
        assert y.stride() == x.stride()


GRADIENTS = {
    "contiguous": lambda y: torch.randn(y.shape),
    "expanded": lambda y: torch.ones(()).expand(y.shape),
    "transposed": lambda y: torch.randn(y.transpose(-1, -2).shape).transpose(-1, -2),
    "narrowed": lambda y: torch.randn(*y.shape[:-1], y.shape[-1] + 3)[..., 2:-1],
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_has_the_outputs_mask(backend, layout, gradient):
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6)).to(device_of(backend)).requires_grad_()
    y = run(backend, x, 0.4)
    grad = GRADIENTS[gradient](y).to(x.device)
    (actual,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(actual, torch.where(y == 0, torch.zeros_like(y), grad / 0.6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics(backend):
    for p in (0.1, 0.5, 0.9):
        y = run(backend, torch.ones(64, 1024, device=device_of(backend)), p)
        kept = (y != 0).double()
        torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - p)))
        n = y.numel()
        assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        for shift in (1, 2, 3, 4, 64, 1024):  # no pattern
            a, b = kept.flatten() - (1 - p), kept.flatten().roll(shift) - (1 - p)
            assert abs((a * b).mean()) < 5 * p * (1 - p) / math.sqrt(n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_rules(backend):
    x = torch.ones(1000, device=device_of(backend))
    assert torch.equal(run(backend, x, 0.5, 3), run(backend, x, 0.5, 3))
    assert not torch.equal(run(backend, x, 0.5, 3), run(backend, x, 0.5, 4))
    torch.manual_seed(3)
    with fastdl.use_backend(backend):
        assert not torch.equal(dropout(x), dropout(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_or_nothing(backend):
    x = torch.randn(50, device=device_of(backend))
    with fastdl.use_backend(backend):
        assert dropout(x, 0.0) is x and dropout(x, 0.5, training=False) is x
        assert not dropout(x, 1.0).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_as_torch(backend, value):
    """What is dropped is multiplied by 0, and NaN stays NaN."""
    y = run(backend, torch.full((200,), value, device=device_of(backend)), 0.5)
    assert y.isnan().any() and (y.isnan() | (y == value)).all()


@pytest.mark.parametrize("backend", backends(*[name for name in KERNELS if name != "triton"]) if KERNELS else [])
def test_gradcheck_twice(backend):
    x = torch.randn(3, 5, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: run(backend, x, 0.4), x)
    assert torch.autograd.gradgradcheck(lambda x: run(backend, x, 0.4), x)


@pytest.mark.parametrize("backend", NATIVE)
def test_saves_the_seed_alone(backend):
    x = torch.randn(30, 40, device=device_of(backend), requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(backend, x, 0.5)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.int64, ())]


@pytest.mark.parametrize("backend", NATIVE)
def test_backward_keeps_the_backend_of_its_forward(backend):
    y = run(backend, torch.randn(9, device=device_of(backend), requires_grad=True), 0.5)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("dropout", backend)]


def test_torchs_own_where_torch_is_asked_for():
    x = torch.randn(40)
    torch.manual_seed(3)
    expected = F.dropout(x, 0.3)
    assert torch.equal(run("torch", x, 0.3, 3), expected)
    y = x.clone()
    assert dropout(y, 0.3, inplace=True) is y
    with fastdl.trace() as calls:
        torch.func.vmap(lambda t: dropout(t, 0.5), randomness="different")(torch.randn(3, 4))
    assert {call.backend for call in calls} == {"torch"}


@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend):
    torch._dynamo.reset()
    x = torch.ones(40, 50, requires_grad=True)
    with fastdl.use_backend(backend):
        y = torch.compile(lambda x: dropout(x, 0.5), fullgraph=True, backend="aot_eager")(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y) and 0.3 < (y == 0).double().mean() < 0.7


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    seed = torch.tensor(7)
    for x in (torch.randn(3, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.fastdl.dropout.default, (x, seed, 0.5, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer(backend):
    layer = fastdl.nn.Dropout(0.25)
    assert repr(layer) == repr(nn.Dropout(0.25)) and isinstance(layer, nn.Dropout)
    x = torch.ones(40, 50, device=device_of(backend))
    with fastdl.use_backend(backend):
        assert 0.1 < (layer(x) == 0).double().mean() < 0.4
        assert layer.eval()(x) is x
    model = fastdl.replace_layers(nn.Sequential(nn.Dropout(0.5)))
    assert type(model[0]) is fastdl.nn.Dropout
    assert type(fastdl.restore_layers(model)[0]) is nn.Dropout


BAD = {
    "p": (dict(input=torch.zeros(3), p=1.5), ValueError, r"p is 1\.5.*0 to 1"),
    "p without training": (dict(input=torch.zeros(3), p=-0.1, training=False), ValueError, r"p is -0\.1"),
    "integers": (dict(input=torch.zeros(3, dtype=torch.int64)), RuntimeError, "input has dtype torch.int64"),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        dropout(**arguments)


def test_what_only_a_kernel_refuses():
    if dispatch.why_unavailable("cpu", "cpu"):
        pytest.skip("no compiled CPU kernels")
    with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="inplace is True"):
        dropout(torch.zeros(3), inplace=True)
    for backend in ("cpu", "auto"):
        with fastdl.use_backend(backend), pytest.raises(TypeError, match="input.*list"):
            dropout([1.0])
