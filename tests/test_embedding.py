"""Embedding: every backend against float64 and torch."""

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
from fastdl.ops import embedding as ops

KERNELS = [name for name in ("cpu", "triton", "cuda") if name in dispatch.OPS["embedding"].support]
BACKENDS = backends("torch", *KERNELS)
NATIVE = backends(*KERNELS)


def pair(indices, **options):
    return [
        lambda weight, f=f: f(indices.to(weight.device), weight, **options) for f in (functional.embedding, F.embedding)
    ]


def check(backend, indices, weight, grad_output=None, **options):
    return compare(backend, *pair(indices, **options), {"weight": weight}, grad_output, multiple=4)


OPTIONS = {"plain": {}, "padding": {"padding_idx": 3}, "padding from the end": {"padding_idx": -2}}
OPTIONS["frequency"] = {"scale_grad_by_freq": True}
OPTIONS["all of it"] = {"padding_idx": 0, "scale_grad_by_freq": True}


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradient(backend, option, dtype):
    """Rows that come never, once and often."""
    for rows, columns in ((11, 6), (300, 33)):
        check(backend, torch.randint(0, rows, (7, 9)), torch.randn(rows, columns).to(dtype), **OPTIONS[option])


@pytest.mark.parametrize("shape", [(), (1,), (130,), (2, 3, 4), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("columns", [1, 4, 40, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, shape, columns):
    for dtype in (torch.float32, torch.bfloat16):
        check(backend, torch.randint(0, 5, shape), torch.randn(5, columns).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_that_comes_often(backend, dtype):
    """Longer than what one block sums, alone and between others."""
    for indices in (torch.full((700,), 2), torch.cat([torch.full((300,), 1), torch.arange(5), torch.full((200,), 3)])):
        check(backend, indices, torch.randn(5, 24).to(dtype))
        check(backend, indices[torch.randperm(len(indices))], torch.randn(5, 24).to(dtype), scale_grad_by_freq=True)


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 9).t(),
    "narrowed": lambda: torch.randn(9, 10)[:, 2:8],
    "every second": lambda: torch.randn(18, 6)[::2],
    "unaligned": lambda: torch.randn(55)[1:].view(9, 6),
    "expanded": lambda: torch.randn(1, 6).expand(9, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, layout):
    indices = torch.randint(0, 9, (4, 10)).t()[:, ::2]
    check(backend, indices, LAYOUTS[layout]())
    check(backend, indices.int(), LAYOUTS[layout]())


GRADIENTS = {
    "expanded scalar": lambda y: torch.ones(()).expand(y.shape),
    "expanded row": lambda y: torch.randn(1, *y.shape[1:]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.transpose(-1, -2).shape).transpose(-1, -2),
    "narrowed": lambda y: torch.randn(*y.shape[:-1], y.shape[-1] + 3)[..., 2:-1],
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, gradient):
    check(backend, torch.randint(0, 5, (3, 7)), torch.randn(5, 8), GRADIENTS[gradient])


@pytest.mark.parametrize("backend", NATIVE)
def test_special_values_stay_in_their_rows(backend):
    weight = torch.randn(4, 3)
    weight[1] = torch.tensor([float("nan"), float("inf"), -0.0])
    x = weight.to(device_of(backend)).requires_grad_()
    indices = torch.tensor([0, 1, 2, 1], device=x.device)
    grad = torch.randn(4, 3, device=x.device)
    grad[2, 0], grad[1, 1] = float("nan"), float("inf")
    with fastdl.use_backend(backend):
        y = functional.embedding(indices, x)
    expected = F.embedding(indices, x)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    actual, theirs = [torch.autograd.grad(t, x, grad)[0] for t in (y, expected)]
    torch.testing.assert_close(actual, theirs, equal_nan=True)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_table_without_rows_or_columns(backend):
    for shape in ((0, 4), (4, 0), (0, 0)):
        check(backend, torch.zeros(0, dtype=torch.int64), torch.randn(shape))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_an_index_that_is_no_row_raises_on_a_cpu(backend):
    for bad in (5, -1, 2**40):
        with fastdl.use_backend(backend), pytest.raises(IndexError, match="index"):
            functional.embedding(torch.tensor([0, bad]), torch.randn(5, 3))
    with fastdl.use_backend("cpu"), pytest.raises(IndexError, match="index 1 of input is 5, allowed: 0 to 4"):
        functional.embedding(torch.tensor([0, 5]), torch.randn(5, 3))


@pytest.mark.parametrize("backend", backends(*[name for name in KERNELS if name != "cpu"]))
def test_an_index_that_is_no_row_gives_nan_on_a_gpu(backend):
    for bad in (5, -1, 2**40):
        x = torch.randn(5, 3, device=device_of(backend), requires_grad=True)
        with fastdl.use_backend(backend):
            y = functional.embedding(torch.tensor([0, bad, 1], device=x.device), x)
        assert y.isnan().all(1).tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_norm_scales_rows_in_place_as_torch(backend):
    indices, weight = torch.tensor([1, 3, 1]), torch.randn(5, 6)
    expected_weight = weight.clone()
    expected = F.embedding(indices, expected_weight, max_norm=0.7, norm_type=1.5)
    own = weight.clone().to(device_of(backend)).requires_grad_()
    with fastdl.use_backend(backend):
        y = functional.embedding(indices.to(own.device), own, max_norm=0.7, norm_type=1.5)
    torch.testing.assert_close(y.cpu(), expected)
    torch.testing.assert_close(own.detach().cpu(), expected_weight)
    torch.autograd.grad(y.sum(), own)


def test_sparse_gradients_are_torchs_business():
    weight, indices = torch.randn(5, 6, requires_grad=True), torch.tensor([1, 3, 1])
    (gradient,) = torch.autograd.grad(functional.embedding(indices, weight, sparse=True).sum(), weight)
    assert gradient.is_sparse
    with fastdl.use_backend("cpu"):
        with pytest.raises(fastdl.UnsupportedError, match="sparse is True, allowed.*False"):
            functional.embedding(indices, weight, sparse=True)
        with torch.no_grad():
            torch.testing.assert_close(functional.embedding(indices, weight, sparse=True), weight[indices])


@pytest.mark.parametrize("backend", NATIVE)
def test_repeats(backend):
    indices = torch.randint(0, 9, (400,), device=device_of(backend))
    assert_repeats(backend, lambda weight: functional.embedding(indices, weight), {"weight": torch.randn(9, 20)})


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", backends(*[name for name in KERNELS if name != "triton"]))
def test_gradcheck_twice(backend, option):
    weight = torch.randn(5, 3, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    indices = torch.tensor([[0, 4, 0], [1, 4, 4]], device=weight.device)

    def backward(grad):  # what padding and frequencies do to a gradient is no derivative of the output
        y = functional.embedding(indices, weight, **OPTIONS[option])
        return torch.autograd.grad(y, weight, grad, create_graph=True)[0]

    grad = torch.randn(2, 3, 3, dtype=torch.float64, device=weight.device, requires_grad=True)
    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(backward, (grad,))
        if option == "plain":
            assert torch.autograd.gradcheck(lambda w: functional.embedding(indices, w).sin(), (weight,))
            assert torch.autograd.gradgradcheck(lambda w: functional.embedding(indices, w).sin(), (weight,))


def test_torch_func_takes_the_reference():
    weight, indices = torch.randn(5, 3), torch.tensor([[0, 4, 0], [1, 4, 4]])
    with fastdl.trace() as calls:
        actual = torch.func.vmap(lambda i: functional.embedding(i, weight))(indices)
        gradient = torch.func.grad(lambda w: functional.embedding(indices, w).square().sum())(weight)
    assert {call.backend for call in calls} == {"torch"}
    torch.testing.assert_close(actual, weight[indices])
    torch.testing.assert_close(gradient, torch.func.grad(lambda w: w[indices].square().sum())(weight))


@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend):
    torch._dynamo.reset()
    ours, theirs = pair(torch.randint(0, 5, (3, 4)), padding_idx=1)
    weight = torch.randn(5, 6, requires_grad=True)
    with fastdl.use_backend(backend):
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(weight)
        gradient = torch.autograd.grad(y.square().sum(), weight)
    torch.testing.assert_close(y, theirs(weight))
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs(weight).square().sum(), weight))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    indices, weight = torch.randint(0, 5, (3, 4)), torch.randn(5, 6)
    torch.library.opcheck(torch.ops.fastdl.embedding.default, (weight, indices, backend))
    grad = torch.randn(3, 4, 6)
    torch.library.opcheck(torch.ops.fastdl.embedding_backward.default, (grad, indices, 5, 1, True, backend))


W, INDEX = torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
BAD = {
    "not a tensor": (dict(input=[1], weight=W), TypeError, "input must be a tensor; got list"),
    "weight": (dict(input=INDEX, weight=W[0]), RuntimeError, r"weight has shape \(3,\), allowed: \(rows, columns\)"),
    "dtype": (dict(input=INDEX.float(), weight=W), RuntimeError, "input has dtype torch.float32, allowed: torch.int64"),
    "device": (dict(input=INDEX.to("meta"), weight=W), RuntimeError, "input is on meta, allowed: cpu"),
    "padding": (dict(input=INDEX, weight=W, padding_idx=5), AssertionError, "padding_idx is 5, allowed: -5 to 4"),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        functional.embedding(**arguments)


def test_module():
    torch.manual_seed(1)
    ours = fastdl.nn.Embedding(7, 4, padding_idx=2, max_norm=1.0)
    torch.manual_seed(1)
    theirs = nn.Embedding(7, 4, padding_idx=2, max_norm=1.0)
    assert isinstance(ours, nn.Embedding) and repr(ours) == repr(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randint(0, 7, (3, 5))
    for module in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(module(x), theirs(x))
    assert type(fastdl.nn.Embedding.from_pretrained(torch.randn(3, 4))) is fastdl.nn.Embedding


def test_every_op_is_registered_with_torch():
    for op in (ops.EMBEDDING, ops.EMBEDDING_BACKWARD):
        assert hasattr(torch.ops.fastdl, op.name)
