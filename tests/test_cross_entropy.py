"""Cross entropy of logits and of a linear layer's: every backend against float64 and torch."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from suite import FLOATING, assert_repeats, backends, compare, device_of, name_of
from torch import nn

import fastdl
from fastdl import dispatch, functional
from fastdl.ops import cross_entropy as ops

KERNELS = [name for name in ("cpu", "triton", "cuda") if name in dispatch.OPS["cross_entropy"].support]
BACKENDS = backends("torch", *KERNELS)
NATIVE = backends(*KERNELS)
REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
OPTIONS = {
    "plain": {},
    "weight": {"weighted": True},
    "ignored": {"ignore_index": 2},
    "smoothing": {"label_smoothing": 0.2},
    "all of it": {"weighted": True, "ignore_index": 1, "label_smoothing": 0.1},
}
# (N, C, *): few classes and many, one row, neighbouring rows of few and many.
SHAPES = [(5, 7), (3, 130), (2, 3000), (1, 9000), (70, 3), (3, 5, 4), (2, 9, 5, 40)]


def make(shape, dtype=torch.float32, probabilities=False, ignored=None):
    """Logits and target."""
    input = (torch.randn(shape) * 2).to(dtype)
    if probabilities:
        return input, torch.randn(shape).softmax(1).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    if ignored is not None:
        target.view(-1)[:: max(target.numel() // 3, 1)] = ignored
        target.view(-1)[-1] = 0 if ignored else 1
    return input, target


def weights(shape, dtype):
    return (torch.rand(shape[1]) + 0.5).to(dtype)


def on(function, target, weight=None, **options):
    """The function of logits, with all else on their device and in their dtype."""

    def call(input):
        own = target.to(input.device)
        own = own.to(input.dtype) if own.is_floating_point() else own
        w = None if weight is None else weight.to(input)
        return function(input, own, w, **options)

    return call


def check(backend, input, target, weight=None, grad_output=None, **options):
    both = [on(f, target, weight, **options) for f in (functional.cross_entropy, F.cross_entropy)]
    return compare(backend, *both, {"input": input}, grad_output, multiple=4)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
@REDUCTION
@pytest.mark.parametrize("backend", BACKENDS)
def test_indices(backend, reduction, option, dtype):
    options = dict(OPTIONS[option])
    weighted = options.pop("weighted", False)
    for shape in ((9, 40), (2, 6, 11)):
        input, target = make(shape, dtype, ignored=options.get("ignore_index"))
        weight = weights(shape, dtype) if weighted else None
        check(backend, input, target, weight, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("option", ["plain", "weight", "smoothing"])
@REDUCTION
@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities(backend, reduction, option, dtype):
    """With the gradient of the probabilities."""
    options = dict(OPTIONS[option])
    weighted = options.pop("weighted", False)
    for shape in ((9, 40), (2, 6, 11)):
        input, target = make(shape, dtype, probabilities=True)
        weight = weights(shape, dtype) if weighted else None

        both = [
            lambda input, target, f=f, w=weight: f(
                input, target, None if w is None else w.to(input), reduction=reduction, **options
            )
            for f in (functional.cross_entropy, F.cross_entropy)
        ]
        for needs in (["input", "target"], ["input"], ["target"]):
            compare(backend, *both, {"input": input, "target": target}, needs=needs, multiple=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, shape, dtype):
    input, target = make(shape, dtype, ignored=-100 if shape[0] > 1 else None)
    check(backend, input, target)
    check(backend, input, target, weights(shape, dtype), reduction="none", label_smoothing=0.1)
    check(backend, *make(shape, dtype, probabilities=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_without_a_batch(backend):
    for reduction in ("mean", "none"):
        check(backend, torch.randn(7), torch.tensor(3), reduction=reduction)
        check(backend, torch.randn(7), torch.randn(7).softmax(0), reduction=reduction)


LAYOUTS = {
    "channels last": lambda: torch.randn(2, 5, 4, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 4, 5, 6).transpose(1, 2),
    "sequence": lambda: torch.randn(2, 7, 5).transpose(1, 2),
    "narrowed": lambda: torch.randn(2, 5, 4, 9)[..., 1:7],
    "unaligned": lambda: torch.randn(241)[1:].view(2, 5, 4, 6),
    "expanded": lambda: torch.randn(1, 5, 4, 6).expand(2, 5, 4, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, layout):
    input = LAYOUTS[layout]()
    target = torch.randint(0, 5, (*input.shape[2:], input.shape[0])).movedim(-1, 0)
    results = check(backend, input, target)
    check(backend, input, input.detach().softmax(1), reduction="none")
    if backend != "torch" and layout in ("channels last", "sequence"):
        assert results["gradient of input"].stride() == input.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend):
    input, target = make((6, 5, 4), ignored=-100)
    for gradient in (
        lambda y: torch.ones(()).expand(y.shape),
        lambda y: torch.randn(1, y.shape[1]).expand(y.shape),
        lambda y: torch.randn(y.shape[0], 1).expand(y.shape),
        lambda y: torch.randn(y.t().shape).t(),
        lambda y: torch.randn(y.shape[0], 2 * y.shape[1])[:, ::2],
        lambda y: torch.zeros(y.shape),
    ):
        check(backend, input, target, grad_output=gradient, reduction="none")
    check(backend, input, target, grad_output=lambda y: torch.tensor(-3.5))


@pytest.mark.parametrize("backend", NATIVE)
def test_special_values(backend):
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor(
        [
            [1e4, 1e4 - 3, -1e4],
            [1e4, -1e4, 0.0],
            [-inf, 0.0, 1.0],
            [0.0, -inf, 1.0],
            [-inf, -inf, -inf],
            [inf, 0.0, 1.0],
            [nan, 0.0, 1.0],
        ]
    )
    target = torch.tensor([1, 2, 0, 0, 0, 1, 1])
    for options in ({}, {"label_smoothing": 0.1}, {"probabilities": True}):
        t = F.one_hot(target, 3).float() if options.pop("probabilities", False) else target
        results = []
        for function, name in ((functional.cross_entropy, backend), (F.cross_entropy, "torch")):
            x = rows.to(device_of(backend)).requires_grad_()
            with fastdl.use_backend(name):
                loss = function(x, t.to(x.device), reduction="none", **options)
            results.append([loss.detach().cpu(), torch.autograd.grad(loss.sum(), x)[0].cpu()])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", NATIVE)
def test_large_logits(backend):
    check(backend, torch.randn(5, 300) * 3 + 1e4, torch.randint(0, 300, (5,)))
    check(backend, torch.randn(5, 300) * 3 - 1e4, torch.randint(0, 300, (5,)), label_smoothing=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_but_ignored_rows(backend):
    device = device_of(backend)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    x.data[0, 0] = float("inf")
    target = torch.full((3,), -100, device=device)
    with fastdl.use_backend(backend):
        assert functional.cross_entropy(x, target).isnan()
        loss = functional.cross_entropy(x, target, reduction="none")
        assert torch.equal(loss, torch.zeros_like(loss))
        assert functional.cross_entropy(x, target, reduction="sum") == 0
        if backend != "torch":
            for reduction in ("mean", "sum"):
                (gradient,) = torch.autograd.grad(functional.cross_entropy(x, target, reduction=reduction), x)
                assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend, shape):
    input, target = make(shape)
    for reduction, probabilities in itertools.product(("mean", "sum", "none"), (False, True)):
        t = input.softmax(1) if probabilities else target
        x = input.to(device_of(backend)).requires_grad_()
        with fastdl.use_backend(backend):
            loss = functional.cross_entropy(x, t.to(x.device), reduction=reduction)
        torch.testing.assert_close(loss.cpu(), F.cross_entropy(x.cpu(), t, reduction=reduction), equal_nan=True)
        assert torch.autograd.grad(loss.sum(), x)[0].shape == shape


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_a_target_that_is_no_class_raises_on_a_cpu(backend):
    for bad in (5, -1, 2**40):
        for shape in ((3, 5), (3, 5, 2)):
            target = torch.zeros(3, *shape[2:], dtype=torch.int64)
            target.view(-1)[-1] = bad
            with fastdl.use_backend(backend), pytest.raises(IndexError, match=f"(?i)target.*{bad}"):
                functional.cross_entropy(torch.randn(shape), target)


@pytest.mark.parametrize("backend", backends(*[name for name in KERNELS if name != "cpu"]))
def test_a_target_that_is_no_class_gives_nan_on_a_gpu(backend):
    device = device_of(backend)
    for bad in (5, -1, 2**40):
        x = torch.randn(3, 5, device=device, requires_grad=True)
        with fastdl.use_backend(backend):
            loss = functional.cross_entropy(x, torch.tensor([1, bad, 2], device=device), reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", NATIVE)
def test_repeats(backend):
    target = torch.randint(0, 90, (70,), device=device_of(backend))
    assert_repeats(backend, lambda input: functional.cross_entropy(input, target), {"input": torch.randn(70, 90)})


@pytest.mark.parametrize("backend", backends("torch", *[name for name in KERNELS if name != "triton"]))
@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck_twice(backend, option):
    options = dict(OPTIONS[option])
    device = device_of(backend)
    weight = torch.rand(4, dtype=torch.float64, device=device) + 0.5 if options.pop("weighted", False) else None
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.randint(0, 4, (3, 2), device=device)
    target[0] = 3
    inputs = [(x, target)]
    if "ignore_index" not in options:
        inputs.append((x, torch.rand(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)))
    for reduction, arguments in itertools.product(("mean", "none"), inputs):

        def run(x, target, reduction=reduction):
            return functional.cross_entropy(x, target, weight, reduction=reduction, **options)

        with fastdl.use_backend(backend):
            assert torch.autograd.gradcheck(run, arguments)
            assert torch.autograd.gradgradcheck(run, arguments)


@pytest.mark.parametrize("backend", NATIVE)
def test_saves_inputs_and_three_numbers_a_row(backend):
    x = torch.randn(3, 4, device=device_of(backend), requires_grad=True)
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        functional.cross_entropy(x, torch.tensor([0, 1, 2], device=x.device))
    assert sorted(tuple(t.shape) for t in saved) == [(), (3,), (3, 3), (3, 4)]


@pytest.mark.parametrize("backend", NATIVE)
def test_backward_keeps_the_backend_of_its_forward(backend):
    x = torch.randn(3, 4, device=device_of(backend), requires_grad=True)
    with fastdl.use_backend(backend):
        y = functional.cross_entropy(x, torch.tensor([0, 1, 2], device=x.device))
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.backward()
    assert [(call.op, call.backend) for call in calls] == [("cross_entropy_backward", backend)]


def test_torch_func_takes_the_reference():
    x, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(0, 5, (4,))
    ours, theirs = [lambda t, f=f: f(t, target) for f in (functional.cross_entropy, F.cross_entropy)]
    with fastdl.trace() as calls:
        actual = torch.func.vmap(torch.func.grad(ours))(x)
        dual = torch.func.jvp(ours, (x[0],), (x[0],))
    assert {call.backend for call in calls} == {"torch"}
    torch.testing.assert_close(actual, torch.func.vmap(torch.func.grad(theirs))(x))
    torch.testing.assert_close(dual, torch.func.jvp(theirs, (x[0],), (x[0],)))


@REDUCTION
@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend, reduction):
    torch._dynamo.reset()
    x, target = torch.randn(6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    ours, theirs = [
        lambda t, f=f: f(t, target, reduction=reduction) for f in (functional.cross_entropy, F.cross_entropy)
    ]
    with fastdl.use_backend(backend):
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
        gradient = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs(x).square().sum(), x))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    target, weight = torch.randint(0, 5, (2, 3, 4)), torch.rand(5)
    op, backward = torch.ops.fastdl.cross_entropy.default, torch.ops.fastdl.cross_entropy_backward.default
    for x in (torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)):
        for reduce, w, smoothing in ((True, weight, 0.1), (False, None, 0.0)):
            torch.library.opcheck(op, (x, target, w, reduce, -100, smoothing, backend))
            loss, denominator, statistics = op(x, target, w, reduce, -100, smoothing, backend)
            arguments = x, torch.randn_like(loss), target, w, denominator if reduce else None, statistics
            torch.library.opcheck(backward, (*arguments, -100, smoothing, [True, False], backend))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_autocast(backend):
    target = torch.randint(0, 4, (3,))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 4, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), fastdl.use_backend(backend):
            loss = functional.cross_entropy(x, target)
            expected = F.cross_entropy(x, target)
        assert loss.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
        assert torch.autograd.grad(loss, x)[0].dtype == dtype


def test_class_weights_with_a_gradient_are_torchs_business():
    x, target = torch.randn(3, 4), torch.randn(3, 4).softmax(1)
    weight = torch.rand(4, requires_grad=True)
    options = {"weight": weight, "label_smoothing": 0.1}
    actual = torch.autograd.grad(functional.cross_entropy(x, target, **options), weight)
    torch.testing.assert_close(actual, torch.autograd.grad(F.cross_entropy(x, target, **options), weight))
    with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="weights of the classes.*gradient"):
        functional.cross_entropy(x, target, **options)


def test_old_names_of_reductions():
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for old in ({"size_average": False}, {"reduce": False}):
        with pytest.warns(UserWarning, match="deprecated"):
            actual = functional.cross_entropy(x, target, **old)
        with pytest.warns(UserWarning, match="deprecated"):
            torch.testing.assert_close(actual, F.cross_entropy(x, target, **old))
    torch.testing.assert_close(functional.cross_entropy(x, target.byte()), F.cross_entropy(x, target))


X, T = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
BAD = {
    "not a tensor": (dict(input=[1.0], target=T), TypeError, "input must be a tensor; got list"),
    "target is not a tensor": (dict(input=X, target=1), TypeError, "target must be a tensor; got int"),
    "rows": (dict(input=X, target=T[:2]), ValueError, "target has 2 rows, allowed: 3"),
    "shape": (
        dict(input=X[..., None], target=T[:, None].expand(3, 2)),
        RuntimeError,
        r"target has shape \(3, 2\), allowed: \(3, 1\)",
    ),
    "probabilities": (dict(input=X, target=X[:, :3]), RuntimeError, r"target.*\(3, 3\).*probabilities of shape \(3, 4"),
    "dtype": (dict(input=X, target=T.int()), RuntimeError, "target has dtype torch.int32, allowed: torch.int64"),
    "integers": (dict(input=X.long(), target=T), NotImplementedError, "input has dtype torch.int64.*floating"),
    "weight": (
        dict(input=X, target=T, weight=torch.ones(3)),
        RuntimeError,
        r"weight has shape \(3,\), allowed: \(4,\)",
    ),
    "weight's dtype": (
        dict(input=X, target=T, weight=torch.ones(4).double()),
        RuntimeError,
        "weight.*float64.*float32",
    ),
    "device": (dict(input=X, target=T.to("meta")), RuntimeError, "target is on meta, allowed: cpu"),
    "smoothing": (
        dict(input=X, target=T, label_smoothing=1.5),
        RuntimeError,
        "label_smoothing is 1.5, allowed: 0 to 1",
    ),
    "reduction": (dict(input=X, target=T, reduction="all"), ValueError, "reduction is 'all', allowed: mean, sum, none"),
    "ignored": (dict(input=X, target=X, ignore_index=1), RuntimeError, "ignore_index is 1, allowed with probabilities"),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        functional.cross_entropy(**arguments)


def test_module():
    x, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 1])
    options = dict(weight=torch.rand(5), ignore_index=1, label_smoothing=0.1)
    ours, theirs = fastdl.nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert repr(ours) == repr(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    for module in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(module(x, target), theirs(x, target))


# ----------------------------------------------------------------------------------------------- of a linear layer


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of a few rows, the last one smaller."""
    monkeypatch.setattr(ops, "LEAST_ROWS", 4)
    monkeypatch.setattr(ops, "CHUNK_BYTES", {"cpu": 0, "cuda": 0})


def eager(input, linear_weight, target, *, linear_bias=None, weight=None, **options):
    lead = input.shape[:-1]
    logits = F.linear(input, linear_weight, linear_bias).reshape(-1, linear_weight.shape[0])
    target = target.reshape(logits.shape if target.is_floating_point() else -1)
    loss = F.cross_entropy(logits, target, weight, **options)
    return loss.reshape(lead) if loss.dim() else loss


def make_linear(lead=(10,), features=6, classes=13, dtype=torch.float32, bias=True):
    inputs = {
        "input": torch.randn(*lead, features).to(dtype),
        "linear_weight": torch.randn(classes, features).to(dtype),
    }
    if bias:
        inputs["linear_bias"] = torch.randn(classes).to(dtype)
    return inputs


def linear_pair(target, class_weight=None, **options):
    def of(function):
        def call(input, linear_weight, linear_bias=None):
            own = target.to(input.device)
            own = own.to(input.dtype) if own.is_floating_point() else own
            w = None if class_weight is None else class_weight.to(input)
            return function(input, linear_weight, own, linear_bias=linear_bias, weight=w, **options)

        return call

    return of(functional.linear_cross_entropy), of(eager)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
@REDUCTION
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_chunks")
def test_linear(backend, reduction, option, dtype):
    options = dict(OPTIONS[option])
    class_weight = (torch.rand(13) + 0.5).to(dtype) if options.pop("weighted", False) else None
    target = torch.randint(0, 13, (10,))
    target[3] = options.get("ignore_index", -100)
    both = linear_pair(target, class_weight, reduction=reduction, **options)
    compare(backend, *both, make_linear(dtype=dtype), multiple=4)


@pytest.mark.parametrize("lead", [(), (1,), (2, 5), (3, 2, 2)], ids=str)
@REDUCTION
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_chunks")
def test_linear_leading_dimensions(backend, reduction, lead):
    for target in (torch.randint(0, 13, lead), torch.randn(*lead, 13).softmax(-1)):
        compare(backend, *linear_pair(target, reduction=reduction), make_linear(lead, bias=False), multiple=4)


@pytest.mark.parametrize(
    "needs", [c for r in (1, 2) for c in itertools.combinations(("input", "linear_weight", "linear_bias"), r)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_chunks")
def test_linear_needs(backend, reduction, needs):
    both = linear_pair(torch.randint(0, 13, (10,)), reduction=reduction)
    compare(backend, *both, make_linear(), needs=needs, multiple=4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.usefixtures("small_chunks")
def test_linear_gradient_of_probabilities(backend, reduction):
    inputs = make_linear() | {"target": torch.randn(10, 13).softmax(1)}
    both = [
        lambda input, linear_weight, linear_bias, target, f=f: f(
            input, linear_weight, target, linear_bias=linear_bias, reduction=reduction
        )
        for f in (functional.linear_cross_entropy, eager)
    ]
    compare(backend, *both, inputs, multiple=4)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.usefixtures("small_chunks")
def test_linear_makes_no_more_logits_than_a_chunks(backend):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make_linear((40,)).items()}
    target = torch.randint(0, 13, (40,), device=device_of(backend))
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        for reduction in ("mean", "none"):
            functional.linear_cross_entropy(**inputs, target=target, reduction=reduction)
    assert (40, 13) not in {tuple(t.shape) for t in saved}


@pytest.mark.parametrize("backend", NATIVE)
def test_linear_small_means_do_not_underflow(backend):
    """A gradient's scale comes after its 16-bit products."""
    inputs = {n: t.half().to(device_of(backend)).requires_grad_() for n, t in make_linear((512,)).items()}
    target = torch.randint(0, 13, (512,), device=device_of(backend))
    with fastdl.use_backend(backend):
        loss = functional.linear_cross_entropy(**inputs, target=target)
        (gradient,) = torch.autograd.grad(loss * 32768.0, inputs["input"])
    exact = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    (expected,) = torch.autograd.grad(eager(**exact, target=target) * 32768, exact["input"])
    torch.testing.assert_close(gradient.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.usefixtures("small_chunks")
def test_linear_backward_twice(backend):
    """The gradients that were made with the loss stay as they are."""
    inputs = {n: t.to(device_of(backend)).requires_grad_() for n, t in make_linear().items()}
    target = torch.randint(0, 13, (10,), device=device_of(backend))
    with fastdl.use_backend(backend):
        loss = functional.linear_cross_entropy(**inputs, target=target)
    first, second = [
        torch.autograd.grad(loss, list(inputs.values()), torch.full_like(loss, g), retain_graph=True) for g in (1, 2)
    ]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", backends("torch", *[name for name in KERNELS if name != "triton"]))
@pytest.mark.usefixtures("small_chunks")
def test_linear_gradcheck_twice(backend, reduction):
    inputs = [t.to(device_of(backend)).requires_grad_() for t in make_linear((5,), 2, 3, torch.float64).values()]
    target = torch.tensor([0, 1, 2, 0, -100], device=device_of(backend))

    def run(input, weight, bias):
        return functional.linear_cross_entropy(input, weight, target, linear_bias=bias, reduction=reduction)

    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
@REDUCTION
@pytest.mark.usefixtures("small_chunks")
def test_linear_compiles_without_graph_breaks(backend, reduction):
    torch._dynamo.reset()
    inputs = {name: t.requires_grad_() for name, t in make_linear().items()}
    ours, theirs = linear_pair(torch.randint(0, 13, (10,)), reduction=reduction)
    with fastdl.use_backend(backend):
        y = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs)
        gradients = torch.autograd.grad(y.square().sum(), list(inputs.values()))
    expected = theirs(**inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), list(inputs.values())))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
@pytest.mark.usefixtures("small_chunks")
def test_linear_opcheck(backend):
    x, w, b = make_linear().values()
    target, op = torch.randint(0, 13, (10,)), torch.ops.fastdl.linear_cross_entropy.default
    torch.library.opcheck(op, (x, w, b, target, None, True, -100, 0.0, [True, True, True, False], backend))
    torch.library.opcheck(op, (x, w, None, target, None, False, -100, 0.0, [False] * 4, backend))
    arguments = x, torch.randn(10), w, b, target, None, -100, 0.0, [True, True, True, False], backend
    torch.library.opcheck(torch.ops.fastdl.linear_cross_entropy_backward.default, arguments)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_linear_autocast(backend):
    inputs = {name: t.requires_grad_() for name, t in make_linear().items()}
    ours, theirs = linear_pair(torch.randint(0, 13, (10,)))
    with torch.autocast("cpu", torch.bfloat16), fastdl.use_backend(backend):
        loss, expected = ours(**inputs), theirs(**inputs)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    assert {g.dtype for g in torch.autograd.grad(loss, list(inputs.values()))} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_empty(backend):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make_linear((0,)).items()}
    target = torch.zeros(0, dtype=torch.int64, device=device_of(backend))
    with fastdl.use_backend(backend):
        assert functional.linear_cross_entropy(**inputs, target=target).isnan()
        loss = functional.linear_cross_entropy(**inputs, target=target, reduction="sum")
        gradients = torch.autograd.grad(loss, list(inputs.values()))
    assert loss == 0 and [tuple(g.shape) for g in gradients] == [(0, 6), (13, 6), (13,)]
    assert not any(g.any() for g in gradients)


def test_chunks_cover_the_rows_and_are_few():
    for rows, classes, dtype in itertools.product((1, 127, 4096, 50000), (10, 50257), (torch.bfloat16, torch.float32)):
        input = torch.empty(rows, 4, dtype=dtype)
        step, row_bytes = ops.chunk_rows(input, classes), classes * dtype.itemsize
        assert 1 <= step <= rows and step * row_bytes <= max(ops.CHUNK_BYTES["cpu"], ops.LEAST_ROWS * row_bytes)


LX, LW, LT = torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, dtype=torch.int64)
BAD_LINEAR = {
    "not a tensor": (dict(input=[1.0], linear_weight=LW, target=LT), TypeError, "input must be a tensor; got list"),
    "weight": (
        dict(input=LX, linear_weight=LW[0], target=LT),
        RuntimeError,
        r"linear_weight has shape \(2,\), allowed: \(C",
    ),
    "features": (
        dict(input=LX[:, :1], linear_weight=LW, target=LT),
        RuntimeError,
        r"input has shape \(3, 1\).*\(\*, 2\)",
    ),
    "bias": (
        dict(input=LX, linear_weight=LW, target=LT, linear_bias=torch.zeros(4)),
        RuntimeError,
        r"linear_bias.*\(4,\), allowed: \(5,\)",
    ),
    "rows": (dict(input=LX, linear_weight=LW, target=LT[:2]), ValueError, r"target has shape \(2,\), allowed: \(3,\)"),
    "dtypes": (
        dict(input=LX, linear_weight=LW.double(), target=LT),
        RuntimeError,
        "linear_weight has dtype torch.float64",
    ),
    "class weights": (
        dict(input=LX, linear_weight=LW, target=LT, weight=torch.ones(4)),
        RuntimeError,
        r"weight has shape \(4,\), allowed: \(5,\)",
    ),
    "reduction": (dict(input=LX, linear_weight=LW, target=LT, reduction="max"), ValueError, "reduction is 'max'"),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD_LINEAR)
def test_linear_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD_LINEAR[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=f"linear_cross_entropy: {message}"):
        functional.linear_cross_entropy(**arguments)


def test_linear_module():
    torch.manual_seed(1)
    ours = fastdl.nn.LinearCrossEntropyLoss(6, 13, bias=True, weight=torch.rand(13), label_smoothing=0.1)
    torch.manual_seed(1)
    linear = nn.Linear(6, 13)
    x, target = torch.randn(4, 6), torch.tensor([1, 2, -100, 3])
    expected = F.cross_entropy(linear(x), target, ours.weight * 0 + ours.weight, label_smoothing=0.1)
    assert not torch.equal(ours.linear.weight, torch.zeros(()))
    ours.linear.load_state_dict(linear.state_dict())
    for module in (ours, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(module(x, target), expected)
    assert sorted(ours.state_dict()) == ["linear.bias", "linear.weight", "weight"]


def test_every_op_is_registered_with_torch():
    for op in (
        ops.CROSS_ENTROPY,
        ops.CROSS_ENTROPY_BACKWARD,
        ops.LINEAR_CROSS_ENTROPY,
        ops.LINEAR_CROSS_ENTROPY_BACKWARD,
    ):
        assert hasattr(torch.ops.fastdl, op.name)
