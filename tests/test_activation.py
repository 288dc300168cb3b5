"""Standalone activations: every backend against float64 and torch."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from suite import FLOATING, assert_special_values, backends, compare, device_of, dtypes, name_of
from torch import nn

import fastdl
from fastdl import functional

FUNCTIONS = {
    "relu": (functional.relu, F.relu),
    "leaky_relu": (lambda input: functional.leaky_relu(input, 0.2), lambda input: F.leaky_relu(input, 0.2)),
    "leaky_relu, slope -0.2": (
        lambda input: functional.leaky_relu(input, -0.2),
        lambda input: F.leaky_relu(input, -0.2),
    ),
    "elu": (functional.elu, F.elu),
    "elu, alpha 0.3": (lambda input: functional.elu(input, 0.3), lambda input: F.elu(input, 0.3)),
    "sigmoid": (functional.sigmoid, torch.sigmoid),
    "tanh": (functional.tanh, torch.tanh),
    "gelu": (functional.gelu, F.gelu),
    "gelu, tanh": (lambda input: functional.gelu(input, "tanh"), lambda input: F.gelu(input, approximate="tanh")),
    "silu": (functional.silu, F.silu),
}


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", backends())
def test_output_and_gradient(backend, function, dtype):
    if dtype not in dtypes("activation", backend):
        pytest.skip(f"{backend} has no {dtype}: stated, and dispatch refuses it")
    # Many values over the whole range; few where no cancellation makes torch's own error a matter of luck.
    for size, scale in ((1030, 3), (1, 0.5), (7, 0.5)):
        compare(backend, *FUNCTIONS[function], {"input": (scale * torch.randn(size)).to(dtype)})


LAYOUTS = {
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "transposed": lambda: torch.randn(5, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "every second": lambda: torch.randn(40)[::2],
    "unaligned": lambda: torch.randn(41)[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends())
def test_layouts(backend, layout):
    x = LAYOUTS[layout]()
    for function in ("relu", "gelu"):
        results = compare(backend, *FUNCTIONS[function], {"input": x})
        expected = FUNCTIONS[function][1](x)
        assert results["output"].stride() == expected.stride()
        if x.numel():
            compare(backend, *FUNCTIONS[function], {"input": x}, torch.ones(()).expand(x.shape))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", backends())
def test_special_values(backend, function):
    """As torch; where torch's gelu overflows to NaN or infinity, the limit is as good."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 100.0, -100.0, 3e38, -3e38, -9.0])
    ours, theirs = FUNCTIONS[function]
    limits = x.double().clamp(-1e38, 1e38)  # infinity's stand-in, far from float64's own
    inputs = [x.to(device_of(backend)), x, limits]
    results = []
    for run, tensor in zip((ours, theirs, theirs), inputs, strict=True):
        with fastdl.use_backend(backend if run is ours else "torch"):
            y = run(tensor.requires_grad_())
            results.append([y.detach().cpu(), torch.autograd.grad(y.sum(), tensor)[0].cpu()])
    for actual, expected, limit in zip(*results, strict=True):
        assert_special_values(actual, expected, limit)


def exact(function, x):
    """The activation in float64 without the cancellation that torch's gelu has in its tail."""
    if function == "gelu":
        return x * torch.erfc(-x * 0.5**0.5) / 2
    if function == "gelu, tanh":
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return FUNCTIONS[function][1](x)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", backends("cpu", "cuda"))
def test_small_values_and_tails_keep_their_relative_accuracy(backend, function):
    ours, theirs = FUNCTIONS[function]
    x = torch.cat([torch.logspace(-30, 1, 400), -torch.logspace(-30, 1, 400)])
    with fastdl.use_backend(backend):
        actual = ours(x.to(device_of(backend))).cpu().double()
    expected, torchs = exact(function, x.double()), theirs(x).double()
    bound = 2 * (torchs - expected).abs() + 1e-6 * expected.abs() + 1e-37
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", backends("cpu", "cuda"))
def test_gradcheck_twice(backend, function):
    x = torch.randn(7, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(FUNCTIONS[function][0], (x,))
        assert torch.autograd.gradgradcheck(FUNCTIONS[function][0], (x,))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    x = torch.randn(3, 4)
    for kind in (1, 6):
        torch.library.opcheck(torch.ops.fastdl.activation.default, (x, kind, 0.0, backend))
        torch.library.opcheck(torch.ops.fastdl.activation_backward.default, (x, x, kind, 0.0, backend))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_without_graph_breaks(function):
    torch._dynamo.reset()
    x = torch.randn(5, requires_grad=True)
    ours, theirs = FUNCTIONS[function]
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(theirs(x).sum(), x))


MODULES = {
    "ReLU": {},
    "LeakyReLU": {"negative_slope": 0.2},
    "ELU": {"alpha": 0.5},
    "Sigmoid": {},
    "Tanh": {},
    "GELU": {"approximate": "tanh"},
    "SiLU": {},
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    ours, theirs = getattr(fastdl.nn, name)(**MODULES[name]), getattr(nn, name)(**MODULES[name])
    assert isinstance(ours, getattr(nn, name)) and repr(ours) == repr(theirs)
    x = torch.randn(6, 5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(x), theirs(x))


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "ELU", "SiLU"])
def test_in_place(name):
    x = torch.randn(10)
    expected = getattr(nn, name)()(x)
    assert getattr(fastdl.nn, name)(inplace=True)(x) is x
    torch.testing.assert_close(x, expected)
    with fastdl.use_backend("triton"), pytest.raises(fastdl.UnsupportedError, match="inplace is True.*False"):
        getattr(fastdl.nn, name)(inplace=True)(x)


def test_integers():
    x = torch.tensor([-1, 2])
    assert torch.equal(functional.relu(x), F.relu(x))
    torch.testing.assert_close(functional.sigmoid(x), torch.sigmoid(x))  # torch promotes
    with pytest.raises(RuntimeError, match="input.*int64"):
        functional.gelu(x)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"approximate.*'none' or 'tanh'.*'erf'"):
        functional.gelu(torch.zeros(2), "erf")
    with pytest.raises(TypeError, match="input"):
        functional.relu(3.0)
