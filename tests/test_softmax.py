"""Softmax and its logarithm: every backend against float64 and torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from suite import FLOATING, assert_repeats, backends, compare, device_of, name_of
from torch import nn

import fastdl
from fastdl import dispatch, functional
from fastdl.ops import softmax as ops

KERNELS = [name for name in ("cpu", "triton", "cuda") if name in dispatch.OPS["softmax"].support]
BACKENDS = backends("torch", *KERNELS)
NATIVE = backends(*KERNELS)
LOG = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
# Rows shorter and longer than a vector, a warp and a tile; one element; sums across rows of few and many neighbours.
SHAPES = [
    ((5, 1), 1),
    ((3, 7), -1),
    ((4, 33), 1),
    ((2, 130), 1),
    ((2, 1000), 1),
    ((1, 9000), 1),
    ((11,), 0),
    ((6, 3), 0),
    ((2, 9, 5), 1),
    ((2, 40, 150), 1),
    ((3, 2, 4, 70), 2),
    ((), 0),
]


def pair(log, dim):
    function, theirs = ("log_softmax" if log else "softmax",) * 2
    return (
        lambda input: getattr(functional, function)(input, dim),
        lambda input: getattr(F, theirs)(input, dim),
    )


def check(backend, log, input, dim, grad_output=None):
    return compare(backend, *pair(log, dim), {"input": input}, grad_output, multiple=4)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@LOG
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradient(backend, log, shape, dim, dtype):
    input = (torch.randn(shape) * 3).to(dtype)
    if input.numel() > 1 and input.shape[dim] > 1:
        check(backend, log, input, dim)
        return
    with fastdl.use_backend(backend):  # a constant, without gradient
        x = input.to(device_of(backend)).requires_grad_()
        y = pair(log, dim)[0](x)
        assert torch.equal(y, torch.full_like(y, float(not log)))
        assert not torch.autograd.grad(y.sum(), x)[0].any()


LAYOUTS = {
    "channels last": lambda: torch.randn(2, 5, 4, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 4, 5, 6).transpose(1, 3),
    "batch last": lambda: torch.randn(5, 4, 6, 3).movedim(0, -1),
    "narrowed": lambda: torch.randn(2, 5, 4, 9)[..., 1:7],
    "every second": lambda: torch.randn(2, 5, 4, 12)[..., ::2],
    "unaligned": lambda: torch.randn(241)[1:].view(2, 5, 4, 6),
    "expanded": lambda: torch.randn(1, 5, 4, 6).expand(2, 5, 4, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, dim, layout):
    input = LAYOUTS[layout]()
    if dim == 0 and layout == "expanded":
        pytest.skip("equal values: the gradient is nothing but rounding")
    for log in (False, True):
        results = check(backend, log, input, dim)
        if backend != "torch" and layout in ("channels last", "transposed", "batch last"):
            assert results["output"].stride() == input.stride() == results["gradient of input"].stride()


GRADIENTS = {
    "expanded row": lambda y: torch.randn(1, *y.shape[1:]).expand(y.shape),
    "expanded column": lambda y: torch.randn(*y.shape[:-1], 1).expand(y.shape) + torch.randn(y.shape[-1]),
    "transposed": lambda y: torch.randn(y.transpose(-1, -2).shape).transpose(-1, -2),
    "narrowed": lambda y: torch.randn(*y.shape[:-1], y.shape[-1] + 3)[..., 2:-1],
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@LOG
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, log, gradient):
    for dim in (1, 2):
        check(backend, log, torch.randn(3, 6, 20), dim, GRADIENTS[gradient])


@LOG
@pytest.mark.parametrize("backend", NATIVE)
def test_the_gradient_of_a_constant_is_zero(backend, log):
    x = torch.randn(4, 9, device=device_of(backend), requires_grad=True)
    with fastdl.use_backend(backend):
        y = pair(False, 1)[0](x)
        assert torch.autograd.grad(y, x, torch.ones(()).to(y).expand(y.shape))[0].abs().max() < 1e-6


@LOG
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, log, shape):
    check(backend, log, torch.randn(shape), 1)


@LOG
@pytest.mark.parametrize("backend", NATIVE)
def test_special_values(backend, log):
    nan, inf = float("nan"), float("inf")
    rows = [
        [1e4, 1e4 - 3, -1e4],
        [-inf, 0.0, 1.0],
        [-inf, -inf, -inf],
        [inf, 0.0, 1.0],
        [nan, 0.0, 1.0],
        [nan, -inf, -inf],
        [3e38, -3e38, 0.0],
        [-200.0, 0.0, -90.0],
    ]
    # The same among many, which wide vectors see.
    for x in (torch.tensor(rows), torch.tensor(rows).repeat(1, 30), torch.tensor(rows).t().contiguous()):
        dim = 1 if len(x) == len(rows) else 0
        ours, theirs = pair(log, dim)
        with fastdl.use_backend(backend):
            actual = ours(x.to(device_of(backend))).cpu()
        torch.testing.assert_close(actual, theirs(x), rtol=1e-5, atol=1e-38, equal_nan=True)


@LOG
@pytest.mark.parametrize("backend", NATIVE)
def test_large_logits(backend, log):
    check(backend, log, torch.randn(5, 300) * 3 + 1e4, 1)
    check(backend, log, torch.randn(5, 300) * 1e4, 1, lambda y: torch.randn(y.shape))


@pytest.mark.parametrize("backend", NATIVE)
def test_repeats(backend):
    for dim in (0, 1):
        assert_repeats(
            backend, lambda input, dim=dim: functional.softmax(input, dim).square(), {"input": torch.randn(70, 90)}
        )


@pytest.mark.parametrize("backend", backends("torch", *[name for name in KERNELS if name != "triton"]))
@LOG
def test_gradcheck_twice(backend, log):
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    with fastdl.use_backend(backend):
        for dim in (1, 2):
            assert torch.autograd.gradcheck(pair(log, dim)[0], (x,))
            assert torch.autograd.gradgradcheck(pair(log, dim)[0], (x,))


@pytest.mark.parametrize("backend", NATIVE)
def test_saves_the_output_alone(backend):
    x = torch.randn(3, 4, device=device_of(backend), requires_grad=True)
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = functional.softmax(x, 1)
    assert len(saved) == 1 and torch.equal(saved[0], y)


def test_torch_func_takes_the_reference():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for log in (False, True):
        ours, theirs = pair(log, -1)
        with fastdl.trace() as calls:
            actual = torch.func.vmap(torch.func.grad(lambda t, f=ours: f(t).square().sum()))(x)
            dual = torch.func.jvp(ours, (x,), (x,))
        assert {call.backend for call in calls} == {"torch"}
        torch.testing.assert_close(actual, torch.func.vmap(torch.func.grad(lambda t, f=theirs: f(t).square().sum()))(x))
        torch.testing.assert_close(dual, torch.func.jvp(theirs, (x,), (x,)))


@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
@LOG
def test_compiles_without_graph_breaks(backend, log):
    torch._dynamo.reset()
    ours, theirs = pair(log, 1)
    x = torch.randn(3, 4, 5, requires_grad=True)
    with fastdl.use_backend(backend):
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
        gradient = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs(x).square().sum(), x))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    for x in (torch.randn(3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        for log in (False, True):
            torch.library.opcheck(torch.ops.fastdl.softmax.default, (x, 1, log, backend))
            torch.library.opcheck(torch.ops.fastdl.softmax_backward.default, (x, x.softmax(1), 1, log, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype(backend):
    for x in (torch.randn(4, 9).bfloat16(), torch.randint(0, 5, (4, 9))):
        with fastdl.use_backend(backend):
            actual = functional.softmax(x.to(device_of(backend)), 1, dtype=torch.float32)
        torch.testing.assert_close(actual.cpu(), F.softmax(x, 1, dtype=torch.float32))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_autocast(backend):
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16), fastdl.use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            assert functional.softmax(x.to(dtype), 1).dtype == F.softmax(x.to(dtype), 1).dtype


def test_dimension_by_torchs_rule():
    for shape in ((3,), (3, 4), (2, 3, 4)):
        x = torch.randn(shape)
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            actual = functional.softmax(x)
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            torch.testing.assert_close(actual, F.softmax(x))


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_modules(name):
    ours, theirs = getattr(fastdl.nn, name)(dim=1), getattr(nn, name)(dim=1)
    assert isinstance(ours, getattr(nn, name)) and repr(ours) == repr(theirs)
    x = torch.randn(6, 5)
    for module in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(module(x), theirs(x))


@pytest.mark.parametrize("backend", [*backends("torch", *KERNELS), "auto"])
def test_bad_input_names_argument_value_and_what_is_allowed(backend):
    x = torch.zeros(2, 3, device=device_of(backend))
    with fastdl.use_backend(backend):
        with pytest.raises(TypeError, match="softmax: input must be a tensor; got list"):
            functional.softmax([1.0], 0)
        with pytest.raises(IndexError, match="log_softmax: dim is 2, allowed: -2 to 1"):
            functional.log_softmax(x, 2)
        with pytest.raises(NotImplementedError, match="softmax.*int64|Long"):
            functional.softmax(x.long(), 1)


def test_every_op_is_registered_with_torch():
    for op in (ops.SOFTMAX, ops.SOFTMAX_BACKWARD):
        assert hasattr(torch.ops.fastdl, op.name)
