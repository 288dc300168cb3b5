"""Layer and RMS normalisation with dropout and residual: every backend against float64 and torch."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suite import FLOATING, assert_repeats, backends, compare, device_of, name_of
from torch import nn

import fastdl
from fastdl import accuracy, dispatch
from fastdl.functional import layer_norm, rms_norm
from fastdl.ops import _philox
from fastdl.ops import dropout as dropping
from fastdl.ops import layer_norm as ops

KERNELS = [name for name in ("cpu", "triton", "cuda") if name in dispatch.OPS["layer_norm"].support]
NATIVE = backends(*KERNELS) if KERNELS else []
BACKENDS = backends("torch", *KERNELS)
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
# One value a row; rows of less than a vector, of some and a rest; more than one dimension; a long row.
SHAPES = [((5, 1), 1), ((3, 4), 1), ((7, 33), 1), ((2, 3, 130), 1), ((4, 6, 5), 2), ((2, 3, 4, 5), 3), ((3, 700), 1)]


RMS_EPS = torch.finfo(torch.float32).eps  # torch's for 16 and 32 bits, whose exact result 64 bits stand for


def ours(dims=1, rms=False, **options):
    def call(input, weight=None, bias=None, residual=None):
        shape = input.shape[-dims:]
        if rms:
            return rms_norm(input, shape, weight, RMS_EPS, residual=residual, **options)
        return layer_norm(input, shape, weight, bias, residual=residual, **options)

    return call


def theirs(dims=1, rms=False):
    def call(input, weight=None, bias=None, residual=None):
        h = input if residual is None else residual + input
        if rms:
            return F.rms_norm(h, list(input.shape[-dims:]), weight, RMS_EPS)
        return F.layer_norm(h, input.shape[-dims:], weight, bias)

    return call


def make(shape, dims=1, dtype=torch.float32, rms=False, residual=False, affine=True, parameters=None):
    inputs = {"input": (torch.randn(shape) * 1.5 + 0.5).to(dtype)}
    if affine:
        parameters = parameters or dtype
        inputs["weight"] = (torch.rand(shape[-dims:]) + 0.5).to(parameters)
        if not rms:
            inputs["bias"] = torch.randn(shape[-dims:]).to(parameters)
    if residual:
        inputs["residual"] = torch.randn(shape).to(dtype)
    return inputs


def on_device(backend, inputs):
    return {name: t.to(device_of(backend)).requires_grad_() for name, t in inputs.items()}


def pair(dims=1, rms=False):
    return ours(dims, rms), theirs(dims, rms)


# ------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@RESIDUAL
@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend, rms, residual, dtype):
    compare(backend, *pair(1, rms), make((13, 72), 1, dtype, rms, residual), multiple=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("shape", "dims"), SHAPES, ids=str)
@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, rms, shape, dims, dtype):
    inputs = make(shape, dims, dtype, rms, residual=True)
    # A row of one value is its own mean: then its gradient, and that of weight, are nothing but rounding.
    needs = ["bias"] if shape[-1] == 1 and not rms else ["weight"] if shape[-1] == 1 else None
    compare(backend, *pair(dims, rms), inputs, needs=needs, multiple=4)


@pytest.mark.parametrize("columns", [5000, 20_001])
@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_rows(backend, rms, columns):
    """Longer than what a program or a block of a thread's work holds."""
    compare(backend, *pair(1, rms), make((2, columns), 1, torch.float32, rms, residual=True), multiple=4)
    compare(backend, *pair(1, rms), make((2, columns), 1, torch.bfloat16, rms), multiple=4)


@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows(backend, rms):
    """More than one part of the sums over rows."""
    compare(backend, *pair(1, rms), make((403, 24), 1, torch.float32, rms), multiple=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_in_float32(backend, rms, dtype):
    compare(backend, *pair(1, rms), make((13, 72), 1, dtype, rms, parameters=torch.float32), multiple=4)


@pytest.mark.parametrize("affine", [("weight",), ("bias",), ()], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight_or_bias(backend, affine):
    inputs = {name: t for name, t in make((13, 72)).items() if name == "input" or name in affine}
    compare(backend, *pair(), inputs, multiple=4)
    if "bias" not in affine:
        compare(backend, *pair(rms=True), inputs, multiple=4)


@RESIDUAL
@pytest.mark.parametrize("backend", NATIVE)
def test_rows_far_from_zero(backend, residual):
    """Mean 1e4, variance 1: what a mean of squares minus the square of the mean would lose entirely."""
    for columns in (72, 5000):
        x = (torch.randn(9, columns) + 1e4).to(device_of(backend))
        x[:, 0] = 0  # which differences may start from
        other = torch.zeros_like(x) if residual else None
        output, h, mean, rstd = ops.LAYER_NORM.implementations[backend](
            x, other, None, None, None, (columns,), 1e-5, 0.0, False, True
        )
        exact = x.double()
        exact_variance, exact_mean = torch.var_mean(exact, 1, correction=0)
        assert (mean - exact_mean).abs().max() <= 1.01 * 2.0**-11  # half a unit of float32
        torch.testing.assert_close(rstd.double(), torch.rsqrt(exact_variance + 1e-5), rtol=2e-6, atol=0)
        expected = F.layer_norm(exact, (columns,))
        bound = accuracy.bound(accuracy.error(F.layer_norm(x, (columns,)), expected), x.dtype)
        assert accuracy.error(output, expected) <= bound
        assert torch.equal(h, x) if residual else h.numel() == 0


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "narrowed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_inputs(backend, layout, dtype):
    inputs = make((6, 5, 40), dtype=dtype, residual=True)
    changed = {name: LAYOUTS[layout](inputs[name]) for name in ("input", "residual")}
    changed |= {name: torch.stack([inputs[name], inputs[name]], 1)[:, 0] for name in ("weight", "bias")}
    results = compare(backend, *pair(), changed, multiple=4)
    assert results["output"].is_contiguous()


GRADIENTS = {
    "expanded scalar": lambda y: torch.ones((), dtype=torch.float32).expand(y.shape),
    "expanded row": lambda y: torch.randn(1, *y.shape[1:]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.transpose(-1, -2).shape).transpose(-1, -2),
    "narrowed": lambda y: torch.randn(*y.shape[:-1], y.shape[-1] + 3)[..., 2:-1],
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@RMS
@RESIDUAL
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, residual, rms, gradient):
    compare(backend, *pair(1, rms), make((5, 8, 40), 1, rms=rms, residual=residual), GRADIENTS[gradient], multiple=4)


@pytest.mark.parametrize(
    "needs",
    [c for r in range(1, 5) for c in itertools.combinations(("input", "weight", "bias", "residual"), r)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_needed_gradients(backend, needs):
    compare(backend, *pair(), make((9, 40), residual=True), needs=needs, multiple=4)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3, 0), (0, 0)], ids=str)
@RMS
@RESIDUAL
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_sizes(backend, residual, rms, shape):
    compare(backend, *pair(1, rms), make(shape, rms=rms, residual=residual))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, 3e18], ids=str)
@RMS
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend, rms, value):
    """A row with such a value is as torch's, its neighbours are not touched."""
    x = torch.randn(5, 40)
    x[1, 3] = value
    x[3] = 0 if value == 0 else x[3]
    results = []
    for function in pair(1, rms):
        input = x.to(device_of(backend)).requires_grad_()
        weight = torch.ones(40, device=input.device, requires_grad=True)
        with fastdl.use_backend(backend):
            y = function(input, weight)
            grads = torch.autograd.grad(y, (input, weight), torch.linspace(-1, 1, 40, device=y.device).expand(y.shape))
        results.append([t.detach().cpu() for t in (y, *grads)])
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


@RMS
@pytest.mark.parametrize("backend", NATIVE)
def test_repeats_are_bit_equal(backend, rms):
    assert_repeats(backend, ours(1, rms), make((203, 72), rms=rms, residual=True))


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(3, 90),
    columns=st.integers(4, 300),
    dtype=st.sampled_from(FLOATING),
    residual=st.booleans(),
    rms=st.booleans(),
    wide=st.booleans(),
)
def test_any_shape_on_the_cpu(rows, columns, dtype, residual, rms, wide):
    if "cpu" not in KERNELS or dispatch.why_unavailable("cpu", "cpu"):
        pytest.skip("no compiled CPU kernels")
    torch.manual_seed(0)
    parameters = torch.float32 if wide and dtype.itemsize == 2 else None
    inputs = make((max(rows, 300 // columns), columns), 1, dtype, rms, residual, parameters=parameters)
    compare("cpu", *pair(1, rms), inputs, multiple=4)


@pytest.mark.skipif(bool(dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_every_instruction_set_of_this_processor(dtype):
    cpu = dispatch.native().cpu
    chosen = cpu.isa()
    try:
        for isa in cpu.available():
            cpu.use(isa)
            for shape, rms in itertools.product([(37, 33), (5, 260), (2, 5001)], (False, True)):
                compare("cpu", *pair(1, rms), make(shape, 1, dtype, rms, residual=True), multiple=4)
    finally:
        cpu.use(chosen)


@pytest.mark.skipif(bool(dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("shape", [(300, 200), (3, 40_000), (70, 1024)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    threads = torch.get_num_threads()
    inputs = on_device("cpu", make(shape, residual=True))
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fastdl.use_backend("cpu"):
                y = ours()(**inputs)
                results.append([y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------ the sum and dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("p", [0.0, 0.4], ids=["kept", "dropout"])
@RESIDUAL
@RMS
@pytest.mark.parametrize("backend", NATIVE)
def test_sum_and_dropout(backend, rms, residual, p, dtype):
    """Output and h, and the gradients through both, are those of torch's functions with the same elements dropped."""
    for shape in ((9, 72), (7, 33)):  # rows that begin inside a group of four random words, too
        inputs = on_device(backend, make(shape, 1, dtype, rms, residual))
        device = device_of(backend)
        torch.manual_seed(4)
        with fastdl.use_backend(backend):
            output, h = ours(1, rms, dropout_p=p, return_sum=True)(**inputs)
        torch.manual_seed(4)
        seed = _philox.new_seed(torch.empty(0, device=device))
        factors = dropping.factors(seed, p, math.prod(shape), torch.float64).view(shape).cpu()

        def formula(input, weight=None, bias=None, residual=None, factors=factors, shape=shape):
            h = input * factors.to(input)
            return theirs(1, rms)(h, weight, bias, residual), h if residual is None else h + residual

        exact = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.items()}
        plain = {name: t.detach().cpu().requires_grad_() for name, t in inputs.items()}
        grads = [torch.randn(shape).to(dtype) for _ in range(2)]
        results = []
        for values, (y, total) in (
            (inputs, (output, h)),
            (exact, formula(**exact)),
            (plain, formula(**plain)),
        ):
            outputs = [y, total]
            given = [grad.to(y.device, y.dtype) for grad in grads]
            results.append([*outputs, *torch.autograd.grad(outputs, list(values.values()), given)])
        for actual, expected, torchs in zip(*results, strict=True):
            bound = accuracy.bound(accuracy.error(torchs, expected), dtype, 4)
            assert accuracy.error(actual.cpu(), expected) <= bound
            assert actual.dtype == torchs.dtype


@pytest.mark.parametrize("columns", [72, 33, 20_001])
@pytest.mark.parametrize("backend", NATIVE)
def test_output_does_not_depend_on_whether_the_sum_is_kept(backend, columns):
    inputs = {
        name: t.to(device_of(backend)) for name, t in make((5, columns), dtype=torch.bfloat16, residual=True).items()
    }
    for p in (0.0, 0.3):
        outputs = []
        for return_sum in (True, False):
            torch.manual_seed(2)
            with fastdl.use_backend(backend):
                outputs.append(ours(dropout_p=p, return_sum=return_sum)(**inputs))
        assert torch.equal(outputs[0][0], outputs[1])


@pytest.mark.parametrize("backend", NATIVE)
def test_dropout_is_that_of_dropout(backend):
    x = torch.randn(30, 50, device=device_of(backend))
    for p in (0.3, 1.0):
        with fastdl.use_backend(backend):
            torch.manual_seed(8)
            _, h = layer_norm(x, (50,), dropout_p=p, return_sum=True)
            torch.manual_seed(8)
            assert torch.equal(h, fastdl.functional.dropout(x, p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_alone_has_a_gradient(backend):
    inputs = on_device(backend, make((5, 40), residual=True))
    for p in (0.0, 0.5):
        with fastdl.use_backend(backend):
            _, h = ours(dropout_p=p, return_sum=True)(**inputs)
        grads = torch.autograd.grad(h.sum(), [inputs["input"], inputs["residual"]])
        assert torch.equal(grads[1], torch.ones_like(h))
        kept = h.detach() != inputs["residual"].detach()
        torch.testing.assert_close(grads[0], kept / (1 - p))
    with fastdl.use_backend(backend):
        x = inputs["input"]
        assert layer_norm(x, (40,), return_sum=True)[1] is x


# --------------------------------------------------------------------------------------------------- autograd's edges


@pytest.mark.parametrize("p", [0.0, 0.4], ids=["kept", "dropout"])
@RESIDUAL
@RMS
@pytest.mark.parametrize("backend", backends(*[name for name in KERNELS if name != "triton"]) if KERNELS else [])
def test_gradcheck_twice(backend, rms, residual, p):
    inputs = list(on_device(backend, make((3, 5), 1, torch.float64, rms, residual)).values())
    names = list(make((3, 5), 1, torch.float64, rms, residual))

    def run(*tensors):
        torch.manual_seed(0)
        result = ours(1, rms, dropout_p=p, return_sum=True)(**dict(zip(names, tensors, strict=True)))
        return result if residual or p else result[0]

    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@RMS
@pytest.mark.parametrize("backend", NATIVE)
def test_double_backward(backend, rms):
    def penalty(function, inputs):
        inputs = {name: t.detach().to(device_of(backend)).requires_grad_() for name, t in inputs.items()}
        (grad,) = torch.autograd.grad(function(**inputs).square().sum(), inputs["input"], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(inputs.values()), allow_unused=True)

    inputs = make((6, 40), rms=rms, residual=True)
    with fastdl.use_backend(backend):
        actual = penalty(pair(1, rms)[0], inputs)
    expected = penalty(pair(1, rms)[1], inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, rtol=1e-3, atol=1e-3)


@RESIDUAL
@pytest.mark.parametrize("backend", NATIVE)
def test_saves_one_tensor_of_inputs_size(backend, residual):
    inputs = on_device(backend, make((9, 40), residual=residual))
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ours()(**inputs)
    assert sorted(tuple(t.shape) for t in saved) == [(9,), (9,), (9, 40), (40,)]


@pytest.mark.parametrize("backend", NATIVE)
def test_a_gradient_that_does_not_come(backend):
    inputs = on_device(backend, make((3, 40)))
    with fastdl.use_backend(backend):
        y = ours()(**inputs)
    loss = y.detach().sum() + 0 * inputs["bias"].sum()
    assert torch.autograd.grad(loss, inputs["input"], allow_unused=True) == (None,)


@pytest.mark.parametrize("backend", NATIVE)
def test_backward_keeps_the_backend_of_its_forward(backend):
    inputs = on_device(backend, make((3, 40), residual=True))
    with fastdl.use_backend(backend):
        y = ours()(**inputs)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("layer_norm_backward", backend)]


@RMS
def test_torch_func_takes_the_reference(rms):
    x, w = torch.randn(3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    mine, torchs = pair(1, rms)
    with fastdl.trace() as calls:
        actual = torch.func.vmap(torch.func.hessian(lambda v: mine(v, w).square().sum()))(x)
        jvp = torch.func.jvp(lambda v: mine(v, w), (x,), (x,))
    assert {call.backend for call in calls} == {"torch"}
    expected = [torch.func.hessian(lambda v: torchs(v, w).square().sum())(row) for row in x]
    torch.testing.assert_close(actual, torch.stack(expected))
    torch.testing.assert_close(jvp, torch.func.jvp(lambda v: torchs(v, w), (x,), (x,)))


# ------------------------------------------------------------------------------------------ the compiler's and torch's


@RESIDUAL
@RMS
@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend, rms, residual):
    torch._dynamo.reset()
    inputs = on_device(backend, make((6, 40), rms=rms, residual=residual))
    with fastdl.use_backend(backend):
        compiled = torch.compile(pair(1, rms)[0], fullgraph=True, backend="aot_eager")
        actual = compiled(**inputs)
        gradients = torch.autograd.grad(actual.square().sum(), list(inputs.values()))
        other = compiled(**make((9, 40), rms=rms, residual=residual))
    expected = theirs(1, rms)(**inputs)
    torch.testing.assert_close(actual, expected)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(inputs.values()))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
    assert other.shape == (9, 40)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_compiles_with_dropout(backend):
    torch._dynamo.reset()
    inputs = on_device(backend, make((60, 40), residual=True))
    with fastdl.use_backend(backend):
        run = torch.compile(ours(dropout_p=0.5, return_sum=True), fullgraph=True, backend="aot_eager")
        y, h = run(**inputs)
        (grad,) = torch.autograd.grad(h.sum(), inputs["input"])
    dropped = h == inputs["residual"]
    assert torch.equal(grad == 0, dropped) and 0.3 < dropped.double().mean() < 0.7
    torch.testing.assert_close(y, F.layer_norm(h, (40,), inputs["weight"], inputs["bias"]))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    x, w, b, r = make((4, 6, 40), residual=True).values()
    check, shape, seed = torch.library.opcheck, (40,), torch.tensor(5)
    mean, rstd, none = torch.randn(24), torch.rand(24), torch.empty(0)
    for keep, arguments in itertools.product(
        (True, False), ((None, w, b, None, shape, 1e-5, 0.0, False), (r, w, None, seed, shape, 1e-5, 0.5, True))
    ):
        check(torch.ops.fastdl.layer_norm.default, (x, *arguments, keep, backend))
    for arguments in (
        (None, x, w, None, mean, rstd, shape, 0.0, False, [True, False, True, True]),
        (r, x, None, seed, none, rstd, shape, 0.5, True, [True, True, True, False]),
    ):
        check(torch.ops.fastdl.layer_norm_backward.default, (x, *arguments, backend))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_autocast(backend):
    """As torch's on a CPU: it keeps its input's dtype, with parameters in float32."""
    results = []
    for layer in (fastdl.nn.LayerNorm(24), nn.LayerNorm(24)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(16, 24), layer)
        with torch.autocast("cpu", torch.bfloat16), fastdl.use_backend(backend):
            y = model(torch.randn(9, 16))
            y.float().square().mean().backward()
        results.append([y, *[p.grad for p in layer.parameters()]])
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------------------- modules

OPTIONS = [
    (nn.LayerNorm, (24,), {}),
    (nn.LayerNorm, ((6, 4),), {"eps": 1e-3}),
    (nn.LayerNorm, (24,), {"elementwise_affine": False}),
    (nn.LayerNorm, (24,), {"bias": False}),
    (nn.LayerNorm, (24,), {"dtype": torch.float64}),
    (nn.RMSNorm, (24,), {}),
    (nn.RMSNorm, ((6, 4),), {"eps": 1e-3}),
    (nn.RMSNorm, (24,), {"elementwise_affine": False}),
    (nn.RMSNorm, (24,), {"dtype": torch.float64}),
]


@pytest.mark.parametrize(("kind", "arguments", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers(backend, kind, arguments, options):
    device, dtype = device_of(backend), options.get("dtype", torch.float32)
    layers = [k(*arguments, **options).to(device) for k in (getattr(fastdl.nn, kind.__name__), kind)]
    assert repr(layers[0]) == repr(layers[1]) and list(layers[0].state_dict()) == list(layers[1].state_dict())
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.uniform_(0.5, 1.5)
    layers[0].load_state_dict(layers[1].state_dict())
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, *layers[0].normalized_shape, dtype=dtype, device=device)
    r = torch.randn_like(x)
    results = []
    for layer in layers:
        input = x.clone().requires_grad_()
        with fastdl.use_backend(backend):
            y = layer(input)
            grads = torch.autograd.grad(y.square().sum() + y.sum(), [input, *layer.parameters()])
        results.append([y, *grads])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    with fastdl.use_backend(backend):
        torch.testing.assert_close(layers[0](x, residual=r), layers[1](x + r))


def test_replaced_and_restored():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.RMSNorm(6))
    twin = copy.deepcopy(model)
    fastdl.replace_layers(model, only=[nn.LayerNorm, nn.RMSNorm])
    assert [type(layer) for layer in model[1:]] == [fastdl.nn.LayerNorm, fastdl.nn.RMSNorm]
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), twin(x))
    fastdl.restore_layers(model)
    assert [type(layer) for layer in model[1:]] == [nn.LayerNorm, nn.RMSNorm]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eps_of_rms_norm_is_torchs(backend):
    for dtype in FLOATING:
        x = (torch.randn(3, 8) * 1e-4).to(device_of(backend), dtype)
        with fastdl.use_backend(backend):
            actual = rms_norm(x, (8,))
        torch.testing.assert_close(actual, F.rms_norm(x, (8,)))


# ------------------------------------------------------------------------------------------------------------ bad input

ZEROS = torch.zeros(3, 4)
BAD = {
    "normalized_shape": (dict(normalized_shape=(5,)), RuntimeError, r"input.*\(3, 4\).*\(\*, 5\).*normalized_shape"),
    "more dimensions": (dict(normalized_shape=(2, 3, 4)), RuntimeError, r"input.*\(3, 4\).*\(\*, 2, 3, 4\)"),
    "no normalized_shape": (dict(normalized_shape=()), RuntimeError, r"normalized_shape is \(\)"),
    "an integer": (dict(normalized_shape=4), TypeError, "normalized_shape is 4.*sequence"),
    "floats": (dict(normalized_shape=(4.0,)), TypeError, r"normalized_shape is \(4\.0,\)"),
    "weight's shape": (dict(weight=torch.ones(3)), RuntimeError, r"weight.*\(3,\).*\(4,\)"),
    "weight's dtype": (dict(weight=torch.ones(4, dtype=torch.float64)), RuntimeError, "weight.*float64.*float32"),
    "weight's device": (dict(weight=torch.ones(4, device="meta")), RuntimeError, "weight.*meta.*cpu"),
    "integers": (dict(input=torch.zeros(3, 4, dtype=torch.int64)), NotImplementedError, "input.*int64"),
    "residual's shape": (dict(residual=torch.zeros(3, 1)), RuntimeError, r"residual.*\(3, 1\).*\(3, 4\)"),
    "residual's dtype": (dict(residual=ZEROS.double()), RuntimeError, "residual.*float64.*float32"),
    "residual's device": (dict(residual=ZEROS.to("meta")), RuntimeError, "residual.*meta.*cpu"),
    "dropout": (dict(dropout_p=1.5), RuntimeError, r"dropout_p is 1\.5.*0 to 1"),
}


@pytest.mark.parametrize("function", [layer_norm, rms_norm], ids=["layer_norm", "rms_norm"])
@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend, function):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=f"{function.__name__}: {message}"):
        function(**{"input": ZEROS, "normalized_shape": (4,), **arguments})


def test_bias_has_weights_dtype():
    with pytest.raises(RuntimeError, match="bias has dtype torch.float32, allowed: torch.bfloat16"):
        layer_norm(ZEROS.bfloat16(), (4,), torch.ones(4, dtype=torch.bfloat16), torch.zeros(4))


def test_every_op_is_registered_with_torch():
    for op in (ops.LAYER_NORM, ops.LAYER_NORM_BACKWARD, dropping.DROPOUT):
        assert hasattr(torch.ops.fastdl, op.name)
