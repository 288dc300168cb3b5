"""Fused batch normalisation: every backend against float64 and torch, in every state of its layers."""

from __future__ import annotations

import copy
import functools
import itertools
import socket

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suite import FLOATING, assert_repeats, backends, compare, device_of, name_of
from torch import nn

import fastdl
from fastdl import Activation, accuracy, activations
from fastdl.ops import batch_norm as ops
from fastdl.ops.batch_norm import BATCH_NORM

OPS = [
    ops.BATCH_NORM,
    ops.BATCH_NORM_INFERENCE,
    ops.BATCH_NORM_BACKWARD,
    ops.BATCH_NORM_STATISTICS,
    ops.BATCH_NORM_APPLY,
]
ACTIVATIONS = [
    None,
    "relu",
    "leaky_relu",
    Activation("leaky_relu", negative_slope=-0.3),
    Activation("elu", alpha=0.7),
    "sigmoid",
    "tanh",
    "gelu",
    Activation("gelu", approximate="tanh"),
    "silu",
]
# One value a row, few channels and many, rows shorter and longer than a vector, more than one part of a plane.
SHAPES = [(64, 7), (9, 130), (5, 4, 6), (3, 5, 7, 7), (2, 3, 4, 5, 6), (4, 6, 9, 11), (2, 2, 65, 70)]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
BACKENDS = backends()
KERNELS = [parameter for parameter in BACKENDS if parameter.values[0] != "torch"]


def running(input):
    """Given statistics for an input, in the dtype of computation."""
    dtype = torch.float32 if input.dtype.itemsize == 2 else input.dtype
    steps = torch.arange(input.shape[1], device=input.device) % 7
    return (steps / 5 - 0.5).to(dtype), (steps / 4 + 0.5).to(dtype)


def ours(activation=None, training=True):
    def call(input, weight=None, bias=None, residual=None):
        statistics = (None, None) if training else running(input)
        return fastdl.functional.batch_norm(
            input, *statistics, weight, bias, training, activation=activation, residual=residual
        )

    return call


def theirs(activation=None, training=True):
    kind, parameter = activations.resolve(activation)

    def call(input, weight=None, bias=None, residual=None):
        statistics = (None, None) if training else running(input)
        y = F.batch_norm(input, *statistics, weight, bias, training)
        return activations.reference(y if residual is None else y + residual, kind, parameter)

    return call


def make(shape, dtype=torch.float32, affine=True, residual=False, parameters=None):
    inputs = {"input": (torch.randn(shape) * 1.5 + 0.5).to(dtype)}
    if affine:
        parameters = parameters or (torch.float32 if dtype.itemsize == 2 else dtype)
        inputs["weight"] = (torch.rand(shape[1]) + 0.5).to(parameters)
        inputs["bias"] = torch.randn(shape[1]).to(parameters)
    if residual:
        inputs["residual"] = torch.randn(shape).to(dtype)
    return inputs


def on_device(backend, inputs, gradients=True):
    return {name: t.to(device_of(backend)).requires_grad_(gradients) for name, t in inputs.items()}


# ------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend, training, activation, dtype):
    # All of each dtype: the gradients' sums are long and their terms of both signs, so a single sum says little.
    inputs = make((6, 40, 5, 7), dtype)
    compare(backend, ours(activation, training), theirs(activation, training), inputs, multiple=4)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("activation", [None, "relu", "tanh", "silu"], ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual(backend, training, activation, dtype):
    inputs = make((6, 40, 5, 7), dtype, residual=True)
    compare(backend, ours(activation, training), theirs(activation, training), inputs, multiple=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes(backend, training, shape, dtype):
    compare(backend, ours("relu", training), theirs("relu", training), make(shape, dtype), multiple=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 3], ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last(backend, training, shape, dtype):
    format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    inputs = make(shape, dtype, residual=True)
    inputs["input"] = inputs["input"].to(memory_format=format)
    results = compare(backend, ours("relu", training), theirs("relu", training), inputs, multiple=4)
    for name in ("output", "gradient of input"):
        assert results[name].is_contiguous(memory_format=format), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_in_16_bits(backend, training, dtype):
    statistics = [t.to(dtype) for t in running(torch.zeros(1, 24, dtype=dtype))]

    def call(function):
        def run(input, weight, bias):
            given = (None, None) if training else [t.to(input) for t in statistics]
            return function(input, *given, weight, bias, training)

        return run

    inputs = make((5, 24, 6, 6), dtype, parameters=dtype)
    compare(backend, call(fastdl.functional.batch_norm), call(F.batch_norm), inputs, multiple=4)


@pytest.mark.parametrize("affine", [("weight",), ("bias",), ()], ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight_or_bias(backend, training, affine):
    inputs = {name: t for name, t in make((6, 40, 5, 7)).items() if name == "input" or name in affine}
    compare(backend, ours("relu", training), theirs("relu", training), inputs, multiple=4)


@pytest.mark.parametrize("shape", [(40, 9), (4, 9, 6, 6), (4, 3, 40, 40)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_statistics_far_from_zero(backend, shape, last):
    """Mean 1e4, variance 1: what a sum of squares minus the square of the sum would lose entirely."""
    x = torch.randn(shape) + 1e4
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    x = x.to(device_of(backend))
    implementation = BATCH_NORM.implementations[backend]
    output, mean, rstd, variance = implementation(x, None, None, None, 1e-5, 0, 0.0)
    exact, dims = x.double(), [d for d in range(x.dim()) if d != 1]
    exact_variance, exact_mean = torch.var_mean(exact, dims, correction=0)
    exact_output = F.batch_norm(exact, None, None, None, None, True)
    half_unit = 2.0**-11  # of float32 at 1e4: the mean cannot be nearer
    assert (mean - exact_mean).abs().max() <= half_unit
    torch.testing.assert_close(variance.double(), exact.var(dims), rtol=2e-6, atol=0)
    torch.testing.assert_close(rstd.double(), torch.rsqrt(exact_variance + 1e-5), rtol=2e-6, atol=0)
    assert (output - exact_output).abs().max() <= 2 * half_unit
    torchs = accuracy.error(F.batch_norm(x, None, None, None, None, True), exact_output)
    assert accuracy.error(output, exact_output) <= accuracy.bound(torchs, x.dtype)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_an_outlier_spoils_no_statistics(backend, last):
    x = torch.randn(8, 4, 20, 20)
    x[0, :, 0, 0] = 1e5  # the first value of all, which sums of differences may start from
    if last:
        x = x.to(memory_format=torch.channels_last)
    x = x.to(device_of(backend))
    _, mean, _, variance = BATCH_NORM.implementations[backend](x, None, None, None, 1e-5, 0, 0.0)
    exact_variance, exact_mean = torch.var_mean(x.double(), (0, 2, 3))
    # An error of the mean matters by the deviation, in which outputs are measured.
    assert ((mean - exact_mean).abs() <= 1e-6 * exact_variance.sqrt()).all()
    torch.testing.assert_close(variance.double(), exact_variance, rtol=2e-6, atol=0)


LAYOUTS = {
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "narrowed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(10, 6), (4, 6, 5, 9)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_inputs(backend, shape, layout):
    inputs = make(shape, residual=True)
    changed = {name: LAYOUTS[layout](inputs[name]) for name in ("input", "residual")}
    changed |= {name: torch.stack([inputs[name], inputs[name]], 1)[:, 0] for name in ("weight", "bias")}
    # Of equal rows the variance is torch's rounding error: then only the evaluation says something.
    training = layout != "expanded" or len(shape) > 2
    results = compare(backend, ours("relu", training), theirs("relu", training), changed, multiple=4)
    assert results["output"].is_contiguous() and results["gradient of input"].is_contiguous()


GRADIENTS = {
    "expanded scalar": lambda y: torch.ones((), dtype=torch.float32).expand(y.shape),
    "expanded row": lambda y: torch.randn(1, *y.shape[1:]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.transpose(-1, -2).shape).transpose(-1, -2),
    "narrowed": lambda y: torch.randn(*y.shape[:-1], y.shape[-1] + 3)[..., 2:-1],
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "other memory format": lambda y: torch.randn(y.movedim(1, -1).shape).movedim(-1, 1),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, residual, last, gradient):
    inputs = make((5, 8, 4, 6), residual=residual)
    if last:
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    compare(backend, ours("silu"), theirs("silu"), inputs, GRADIENTS[gradient], multiple=4)


@pytest.mark.parametrize(
    "needs",
    [c for r in range(1, 5) for c in itertools.combinations(("input", "weight", "bias", "residual"), r)],
    ids=str,
)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_needed_gradients(backend, training, activation, needs):
    inputs = make((4, 6, 5, 5), residual=True)
    compare(backend, ours(activation, training), theirs(activation, training), inputs, needs=needs, multiple=4)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_sizes(backend, training, shape):
    inputs = make(shape, residual=True, affine=shape[1] > 0)  # torch fails on weights of no channels
    compare(backend, ours("relu", training), theirs("relu", training), inputs)
    mean, variance = torch.zeros(shape[1]), torch.ones(shape[1])
    with fastdl.use_backend(backend):
        fastdl.functional.batch_norm(
            *[t.to(device_of(backend)) for t in (inputs["input"], mean, variance)], None, None, True
        )
    assert torch.equal(mean, torch.zeros(shape[1]))  # an empty batch moves no running statistics


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 3e18], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 6, 7)], ids=str)
@TRAINING
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend, training, shape, value):
    """A channel with such a value is as torch's, its neighbours are not touched."""
    x = torch.randn(shape)
    x[0, 1] = value
    results = []
    for function in (fastdl.functional.batch_norm, F.batch_norm):
        input = x.to(device_of(backend)).requires_grad_()
        mean, variance = torch.zeros(3, device=input.device), torch.ones(3, device=input.device)
        with fastdl.use_backend(backend):
            y = function(input, mean, variance, None, None, training)
            (grad,) = torch.autograd.grad(y, input, torch.ones_like(y))
        results.append([t.detach().cpu() for t in (y, grad, mean, variance)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_repeats_are_bit_equal(backend, last):
    inputs = make((7, 12, 33, 31), residual=True)
    if last:
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    assert_repeats(backend, ours("gelu"), inputs)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(2, 70),
    channels=st.integers(1, 80),
    spatial=st.lists(st.integers(1, 12), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    training=st.booleans(),
    residual=st.booleans(),
    last=st.booleans(),
)
def test_any_shape_on_the_cpu(n, channels, spatial, dtype, training, residual, last):
    if fastdl.dispatch.why_unavailable("cpu", "cpu"):
        pytest.skip("no compiled CPU kernels")
    inputs = make((n, channels, *spatial), dtype, residual=residual)
    if last:
        inputs["input"] = inputs["input"].movedim(1, -1).contiguous().movedim(-1, 1)
    # A channel of two values is normalised to +-1: its gradient is all rounding error.
    needs = ["weight", "bias"] if training and n * torch.Size(spatial).numel() < 8 else None
    compare("cpu", ours("relu", training), theirs("relu", training), inputs, needs=needs, multiple=4)


@pytest.mark.skipif(bool(fastdl.dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_every_instruction_set_of_this_processor(dtype):
    cpu = fastdl.dispatch.native().cpu
    chosen = cpu.isa()
    try:
        for isa in cpu.available():
            cpu.use(isa)
            for shape in [(70, 33), (4, 5, 3, 3), (4, 20, 9, 11)]:
                compare("cpu", ours("gelu"), theirs("gelu"), make(shape, dtype), multiple=4)
    finally:
        cpu.use(chosen)


@pytest.mark.skipif(bool(fastdl.dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("shape", [(300, 200), (4, 3, 150, 150), (64, 700, 4, 4)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape):
    threads = torch.get_num_threads()
    inputs = on_device("cpu", make(shape))
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with fastdl.use_backend("cpu"):
                y = ours("relu")(**inputs)
                results.append([y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --------------------------------------------------------------------------------------------------- autograd's edges


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@TRAINING
@pytest.mark.parametrize("backend", backends(*[p.values[0] for p in KERNELS if p.values[0] != "triton"]))
def test_gradcheck_twice(backend, training, residual, activation):
    inputs = list(on_device(backend, make((4, 2, 3), torch.float64, residual=residual)).values())
    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(ours(activation, training), inputs)
        assert torch.autograd.gradgradcheck(ours(activation, training), inputs)


@pytest.mark.parametrize("activation", [None, "relu", "tanh", "gelu"])
@TRAINING
@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward(backend, training, activation):
    def penalty(function, inputs):
        inputs = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs]
        (grad,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    inputs = list(make((6, 4, 5), residual=True).values())
    with fastdl.use_backend(backend):
        actual = penalty(ours(activation, training), inputs)
    torch.testing.assert_close(actual, penalty(theirs(activation, training), inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("backend", KERNELS)
def test_saves_no_more_than_it_needs(backend, activation, residual):
    inputs = on_device(backend, make((4, 6, 5, 5), residual=residual))
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ours(activation)(**inputs)
    large = [t for t in saved if t.dim() > 1]
    assert len(large) == (2 if residual and activation else 1)  # input; with a residual the output, or the residual


@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_that_does_not_come(backend):
    inputs = on_device(backend, make((3, 4, 5)))
    with fastdl.use_backend(backend):
        y = ours("gelu")(**inputs)
    loss = y.detach().sum() + 0 * inputs["bias"].sum()
    assert torch.autograd.grad(loss, inputs["input"], allow_unused=True) == (None,)


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_keeps_the_backend_of_its_forward(backend):
    inputs = on_device(backend, make((3, 4, 5)))
    with fastdl.use_backend(backend):
        y = ours("relu")(**inputs)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("batch_norm_backward", backend)]


def test_torch_func_takes_the_reference():
    x, w, b = make((6, 3, 4), torch.float64).values()
    with fastdl.trace() as calls:
        actual = torch.func.hessian(lambda v: ours("tanh")(v, w, b).sum())(x)
    assert {call.backend for call in calls} == {"torch"}
    torch.testing.assert_close(actual, torch.func.hessian(lambda v: theirs("tanh")(v, w, b).sum())(x))
    jvp = torch.func.jvp(lambda v: ours("gelu")(v, w, b), (x,), (x,))
    torch.testing.assert_close(jvp, torch.func.jvp(lambda v: theirs("gelu")(v, w, b), (x,), (x,)))
    if not fastdl.dispatch.why_unavailable("cpu", "cpu"):
        with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="plain tensors"):
            torch.func.grad(lambda v: ours()(v, w, b).sum())(x)


# ------------------------------------------------------------------------------------------ the compiler's and torch's


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
def test_compiles_without_graph_breaks(backend, residual, activation):
    torch._dynamo.reset()
    inputs = on_device(backend, make((6, 8, 5, 5), residual=residual))
    statistics = [torch.zeros(8), torch.ones(8)], [torch.zeros(8), torch.ones(8)]

    def run(input, weight, bias, residual=None, mean=None, variance=None):
        return fastdl.functional.batch_norm(
            input, mean, variance, weight, bias, True, activation=activation, residual=residual
        )

    with fastdl.use_backend(backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        actual = compiled(**inputs, mean=statistics[0][0], variance=statistics[0][1])
        gradients = torch.autograd.grad(actual.square().sum(), list(inputs.values()))
    expected = theirs(activation)(**inputs)
    F.batch_norm(inputs["input"].detach(), *statistics[1], None, None, True)
    torch.testing.assert_close(actual, expected)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(inputs.values()))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*statistics)


@pytest.mark.parametrize("training", [True, False])
def test_inductor_runs_a_model(training):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), fastdl.nn.BatchNorm2d(6), fastdl.nn.BNReLU2d(6)).train(training)
    x = torch.randn(5, 2, 8, 8)
    twin = copy.deepcopy(model)
    loss = torch.compile(model, fullgraph=True)(x).square().sum()
    expected = twin(x).square().sum()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(out, list(m.parameters())) for out, m in ((loss, model), (expected, twin))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    x, w, b, r = make((4, 5, 6, 3), residual=True).values()
    mean, variance = running(x)
    check = torch.library.opcheck
    for input in (x, x.to(memory_format=torch.channels_last)):
        check(torch.ops.fastdl.batch_norm.default, (input, w, b, r, 1e-5, 1, 0.0, backend))
        check(torch.ops.fastdl.batch_norm_inference.default, (input, w, None, r, mean, variance, 1e-5, 6, 0.0, backend))
        for needs in ([True] * 4, [False, True, False, False]):
            arguments = (x, input, w, b, r, None, mean, variance, True, 8, 0.0, needs, backend)
            check(torch.ops.fastdl.batch_norm_backward.default, arguments)
        check(torch.ops.fastdl.batch_norm_statistics.default, (input, backend))
        check(torch.ops.fastdl.batch_norm_apply.default, (x, input, w, mean, variance, mean, mean, backend))


def test_exports():
    program = torch.export.export(fastdl.nn.BNReLU2d(3).eval(), (torch.randn(2, 3, 4, 4),))
    assert program.module()(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_autocast(backend):
    """As torch's: batch normalisation keeps its input's dtype, with parameters and statistics in float32."""
    results = []
    for layer in (fastdl.nn.BatchNorm2d(6), nn.BatchNorm2d(6)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), layer)
        with torch.autocast("cpu", torch.bfloat16), fastdl.use_backend(backend):
            y = model(torch.randn(4, 3, 9, 9))
            y.float().square().mean().backward()
        results.append([y, *[p.grad for p in layer.parameters()], *layer.buffers()])
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------------------- modules

LAYERS = [
    (fastdl.nn.BatchNorm1d, nn.BatchNorm1d, (8, 6)),
    (fastdl.nn.BatchNorm1d, nn.BatchNorm1d, (8, 6, 5)),
    (fastdl.nn.BatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 7)),
    (fastdl.nn.BatchNorm3d, nn.BatchNorm3d, (4, 6, 3, 4, 5)),
    (fastdl.nn.SyncBatchNorm, nn.SyncBatchNorm, (4, 6, 5)),
]
OPTIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.7, "eps": 1e-3},
    {"bias": False},
    {"dtype": torch.float64},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("layer", "torchs", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_state_of_a_layer(backend, layer, torchs, shape, options):
    """Training, evaluation and frozen with gradients: outputs, gradients and buffers are torch's."""
    device = device_of(backend)
    pair = [kind(6, **options).to(device) for kind in (layer, torchs)]
    assert list(pair[0].state_dict()) == list(pair[1].state_dict()) and repr(pair[0]) == repr(pair[1])
    dtype = options.get("dtype", torch.float32)
    for step in range(6):
        x = (torch.randn(shape, dtype=dtype) * (step + 1) + step).to(device)
        results = []
        for module in pair:
            module.train(step not in (2, 5))  # evaluation with gradients is what a frozen layer does
            input = x.clone().requires_grad_()
            with fastdl.use_backend(backend):
                y = module(input)
                grads = torch.autograd.grad(y.square().sum() + y.sum(), [input, *module.parameters()])
            results.append([y, *grads, *module.buffers()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    theirs_state = pair[1].state_dict()
    pair[0].load_state_dict(theirs_state)
    pair[1].load_state_dict(pair[0].state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_torchs(backend):
    device = device_of(backend)
    pairs = [[torch.zeros(24, device=device), torch.ones(24, device=device)] for _ in range(2)]
    with fastdl.use_backend(backend):
        for momentum in (0.1, 0.0, 1.0, 0.3):
            x = torch.randn(5, 24, 6, 6, device=device) * 2 + 3
            fastdl.functional.batch_norm(x, *pairs[0], None, None, True, momentum)
            F.batch_norm(x, *pairs[1], None, None, True, momentum)
            torch.testing.assert_close(*pairs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bn_relu(backend, residual):
    device = device_of(backend)
    fused, plain = fastdl.nn.BNReLU2d(6).to(device), nn.BatchNorm2d(6).to(device)
    plain.load_state_dict(fused.state_dict())
    x, r = torch.randn(2, 4, 6, 5, 5, device=device)
    for training in (True, False):
        with fastdl.use_backend(backend):
            actual = fused.train(training)(x, *[r] * residual)
        expected = plain.train(training)(x)
        torch.testing.assert_close(actual, F.relu(expected + r if residual else expected))
    assert isinstance(fused, nn.BatchNorm2d)


def test_replaced_and_restored():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.Flatten(), nn.BatchNorm1d(144))
    fastdl.replace_layers(model, skip=nn.Conv2d if nn.Conv2d in fastdl.replace.REPLACEMENTS else None)
    replaced = [fastdl.nn.BatchNorm2d, fastdl.nn.SyncBatchNorm, fastdl.nn.BatchNorm1d]
    assert [type(layer) for layer in model if isinstance(layer, nn.modules.batchnorm._BatchNorm)] == replaced
    assert str(fastdl.explain(model)).count("fastdl.nn.batch_norm") == 3
    fastdl.restore_layers(model)
    assert type(model[1]) is nn.BatchNorm2d


# ------------------------------------------------------------------------------------------------------- synchronised


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _train(layer, x, target):
    """Two steps of training; what a process ends with."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = layer(x)
        loss = ((y - target).square()).sum() + (y * 3 * target).sum()
        layer.zero_grad()
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
    return [y.detach(), grad, *[p.grad for p in layer.parameters()], *layer.buffers()]


def _process(rank, port, batches, targets, backend, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(batches))
    try:
        torch.manual_seed(5)
        layer = _layer(fastdl.nn.SyncBatchNorm, batches[0].dtype)
        with fastdl.use_backend(backend):
            results[rank] = _train(layer, batches[rank], targets[rank])
        layer.eval()(batches[rank])  # joins nobody: the other process may have left
    finally:
        dist.destroy_process_group()


def _layer(kind, dtype):
    layer = kind(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("sizes", [(4, 4), (7, 2), (6, 0)], ids=str)
@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_synchronised_over_two_processes(backend, sizes, dtype):
    """Batches of equal and unequal size, and an empty one: as one process with all of it."""
    import torch.multiprocessing as mp

    torch.use_deterministic_algorithms(False)
    x, target = torch.randn(2, sum(sizes), 5, 3, 4, dtype=dtype) + 2
    batches, targets = x.split(sizes), target.split(sizes)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_process, (_free_port(), batches, targets, backend, results), nprocs=2)
        results = [results[rank] for rank in range(2)]
    torch.manual_seed(5)
    expected = _train(_layer(nn.BatchNorm2d, dtype), x, target)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for i in (0, 1):  # output and the gradient of input, by process
        close(torch.cat([result[i] for result in results]), expected[i])
    for i in (2, 3):  # gradients of weight and bias: DistributedDataParallel adds them up
        close(results[0][i] + results[1][i], expected[i])
    for result in results:
        close(result[4:], expected[4:])


def test_without_a_group_it_is_plain_batch_normalisation():
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(fastdl.nn.SyncBatchNorm(5)(x), nn.BatchNorm1d(5)(x))


def test_conversion_gives_this_class_and_loses_no_relu():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert type(fastdl.nn.SyncBatchNorm.convert_sync_batchnorm(model)[1]) is fastdl.nn.SyncBatchNorm
    with pytest.raises(TypeError, match="1 is a BNReLU2d"):
        fastdl.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), fastdl.nn.BNReLU2d(4)))


# ------------------------------------------------------------------------------------------------------------- folding

FOLDS = {
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), nn.BatchNorm1d, (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d, (2, 6, 7, 7)),
    "padding_mode": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d, (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), nn.BatchNorm3d, (2, 6, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d, (2, 6, 5, 5)),
    "linear": (lambda: nn.Linear(6, 4), nn.BatchNorm1d, (5, 6)),
    "linear without bias": (lambda: fastdl.nn.Linear(6, 4, bias=False), fastdl.nn.BatchNorm1d, (5, 6)),
}


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("case", FOLDS)
def test_folding(case, options):
    make_layer, norm_class, shape = FOLDS[case]
    layer, norm = make_layer(), norm_class(4, **options).eval()
    with torch.no_grad():
        for tensor in [*norm.parameters(), norm.running_mean, norm.running_var]:
            tensor.uniform_(0.5, 2)
    before = copy.deepcopy(layer.state_dict())
    folded = fastdl.fold_batch_norm(layer, norm)
    assert type(folded) is type(layer) and folded.bias is not None and not folded.training
    x = torch.randn(shape)
    torch.testing.assert_close(folded(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_folding_keeps_the_relu():
    layer, norm = nn.Conv2d(3, 4, 3), fastdl.nn.BNReLU2d(4).eval()
    if not hasattr(fastdl.nn, "ConvReLU2d"):
        with pytest.raises(TypeError, match="BNReLU2d.*Conv2d"):
            fastdl.fold_batch_norm(layer, norm)
        return
    x = torch.randn(2, 3, 6, 6)
    folded = fastdl.fold_batch_norm(layer, norm)
    assert type(folded) is fastdl.nn.ConvReLU2d
    torch.testing.assert_close(folded(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="BNReLU2d.*ConvTranspose2d"):
        fastdl.fold_batch_norm(nn.ConvTranspose2d(3, 4, 3), norm)


UNFOLDABLE = {
    "training": (nn.Linear(3, 4), nn.BatchNorm1d(4), ValueError, "training mode"),
    "no statistics": (nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False).eval(), ValueError, "no running"),
    "channels": (nn.Linear(3, 4), nn.BatchNorm1d(5).eval(), ValueError, "5 channels.*4"),
    "not a layer": (nn.ReLU(), nn.BatchNorm1d(4).eval(), TypeError, "layer is a ReLU"),
    "not a norm": (nn.Linear(3, 4), nn.LayerNorm(4).eval(), TypeError, "norm is a LayerNorm"),
    "an activation between": (fastdl.nn.LinearReLU(3, 4), nn.BatchNorm1d(4).eval(), TypeError, "LinearReLU"),
}


@pytest.mark.parametrize("case", UNFOLDABLE)
def test_what_cannot_be_folded(case):
    layer, norm, exception, message = UNFOLDABLE[case]
    with pytest.raises(exception, match=message):
        fastdl.fold_batch_norm(layer, norm)


# ------------------------------------------------------------------------------------------------------------ bad input

ZEROS = torch.zeros(3, 4)
BAD = {
    "one value": (dict(input=torch.zeros(1, 4), training=True), ValueError, "more than 1 value per channel.*1, 4"),
    "eps in training": (dict(input=ZEROS, training=True, eps=0.0), ValueError, r"eps is 0\.0.*positive"),
    "eps": (
        dict(input=ZEROS, running_mean=torch.zeros(4), running_var=torch.ones(4), eps=-1.0),
        ValueError,
        "eps is -1",
    ),
    "no statistics": (dict(input=ZEROS), RuntimeError, "running_mean is None"),
    "one statistic": (dict(input=ZEROS, running_mean=torch.zeros(4)), RuntimeError, "running_var is None"),
    "one statistic in training": (
        dict(input=ZEROS, running_mean=torch.zeros(4), training=True),
        ValueError,
        "running_var.*both or neither",
    ),
    "statistics' shape": (
        dict(input=ZEROS, running_mean=torch.zeros(3), running_var=torch.ones(3), training=True),
        RuntimeError,
        r"running_mean has shape \(3,\).*\(4,\)",
    ),
    "statistics' gradient": (
        dict(input=ZEROS, running_mean=torch.zeros(4, requires_grad=True), running_var=torch.ones(4)),
        RuntimeError,
        "running statistics require a gradient",
    ),
    "weight's shape": (dict(input=ZEROS, weight=torch.ones(3), training=True), RuntimeError, r"weight.*\(3,\).*\(4,\)"),
    "bias' dtype": (
        dict(input=ZEROS, bias=torch.ones(4, dtype=torch.float64), training=True),
        RuntimeError,
        "bias.*float64.*float32",
    ),
    "weight's device": (
        dict(input=ZEROS, weight=torch.ones(4, device="meta"), training=True),
        RuntimeError,
        "weight.*meta.*cpu",
    ),
    "integers": (dict(input=torch.zeros(3, 4, dtype=torch.int64), training=True), NotImplementedError, "input.*int64"),
    "dimensions": (dict(input=torch.zeros(4), training=True), IndexError, r"input.*\(4,\).*\(N, C, \*\)"),
    "residual's shape": (
        dict(input=ZEROS, residual=torch.zeros(3, 1), training=True),
        RuntimeError,
        r"residual.*\(3, 1\).*\(3, 4\)",
    ),
    "residual's dtype": (
        dict(input=ZEROS, residual=torch.zeros(3, 4, dtype=torch.float64), training=True),
        RuntimeError,
        "residual.*float64.*float32",
    ),
    "unknown activation": (dict(input=ZEROS, activation="swish", training=True), ValueError, "activation.*'swish'"),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        fastdl.functional.batch_norm(**{"running_mean": None, "running_var": None, **arguments})


@pytest.mark.parametrize(("layer", "shape"), [(fastdl.nn.BatchNorm1d, (3, 4, 5, 6)), (fastdl.nn.BatchNorm2d, (3, 4))])
def test_layers_check_dimensions_as_torchs(layer, shape):
    with pytest.raises(ValueError, match="expected"):
        layer(4)(torch.zeros(shape))


def test_every_op_is_registered_with_torch():
    for op in OPS:
        assert hasattr(torch.ops.fastdl, op.name)
