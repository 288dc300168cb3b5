"""The fused linear layer: every backend against float64 and torch, and every promise of its API."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suite import FLOATING, assert_repeats, assert_special_values, backends, compare, device_of, dtypes, name_of
from torch import nn

import fastdl
from fastdl import Activation, activations
from fastdl.ops.linear import LINEAR, LINEAR_BACKWARD, LINEAR_WITH_PREACTIVATION

ACTIVATIONS = [
    None,
    "relu",
    "leaky_relu",
    Activation("leaky_relu", negative_slope=0.3),
    "elu",
    Activation("elu", alpha=0.7),
    "sigmoid",
    "tanh",
    "gelu",
    Activation("gelu", approximate="tanh"),
    "silu",
]
RAGGED = [(1, 1, 1), (3, 5, 7), (33, 130, 17), (70, 33, 129)]
BACKENDS = backends()


def ours(activation=None):
    return lambda input, weight, bias=None: fastdl.functional.linear(input, weight, bias, activation=activation)


def theirs(activation=None):
    kind, parameter = activations.resolve(activation)
    return lambda input, weight, bias=None: activations.reference(F.linear(input, weight, bias), kind, parameter)


def make(m, k, n, dtype=torch.float32, bias=True):
    inputs = {"input": torch.randn(m, k), "weight": torch.randn(n, k) / max(k, 1) ** 0.5}
    if bias:
        inputs["bias"] = torch.randn(n)
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def skip_dtype(backend, dtype):
    if dtype not in dtypes("linear", backend):
        with fastdl.use_backend(backend), pytest.raises(fastdl.UnsupportedError, match=name_of(dtype)):
            tensor = torch.zeros(1, 1, dtype=dtype, device=device_of(backend))
            fastdl.functional.linear(tensor, tensor)
        return True
    return False


# ------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend, activation, dtype):
    if skip_dtype(backend, dtype):
        return
    compare(backend, ours(activation), theirs(activation), make(37, 45, 51, dtype), multiple=4)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_sizes(backend, shape, dtype):
    if skip_dtype(backend, dtype):
        return
    compare(backend, ours("relu"), theirs("relu"), make(*shape, dtype), multiple=4)
    compare(backend, ours("gelu"), theirs("gelu"), make(*shape, dtype, bias=False), multiple=4)


@pytest.mark.parametrize("backend", backends("torch", "cpu", "cuda"))
def test_long_reductions(backend):
    compare(backend, ours("relu"), theirs("relu"), make(17, 5000, 9), multiple=4)
    compare(
        backend, ours("relu"), theirs("relu"), make(9000, 17, 9), multiple=4
    )  # of the weight's and bias's gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(backend, lead):
    inputs = make(1, 8, 6) | {"input": torch.randn(*lead, 8)}
    compare(backend, ours("tanh"), theirs("tanh"), inputs, multiple=4)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "narrowed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_inputs(backend, layout):
    dtype = torch.float32 if layout != "unaligned" else torch.bfloat16
    inputs = {name: LAYOUTS[layout](tensor) for name, tensor in make(24, 40, 32, dtype).items()}
    compare(backend, ours("silu"), theirs("silu"), inputs, multiple=4)


GRADIENTS = {
    "expanded scalar": lambda y: torch.ones((), dtype=torch.float32).expand(y.shape),
    "expanded row": lambda y: torch.randn(1, y.shape[1]).expand(y.shape),
    "transposed": lambda y: torch.randn(y.shape[1], y.shape[0]).t(),
    "narrowed": lambda y: torch.randn(y.shape[0], y.shape[1] + 3)[:, 2:-1],
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, activation, gradient):
    compare(backend, ours(activation), theirs(activation), make(21, 34, 18), GRADIENTS[gradient], multiple=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_backward_is_not_nan(backend):
    layer = fastdl.nn.LinearReLU(5, 4).to(device_of(backend))
    with fastdl.use_backend(backend):
        layer(torch.randn(3, 5, device=device_of(backend))).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("needs", [c for r in range(4) for c in itertools.combinations(("input", "weight", "bias"), r)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_needed_gradients(backend, activation, needs):
    compare(backend, ours(activation), theirs(activation), make(9, 6, 11), needs=needs, multiple=4)


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("activation", [None, "sigmoid", "gelu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_sizes(backend, activation, shape):
    compare(backend, ours(activation), theirs(activation), make(*shape))
    compare(backend, ours(activation), theirs(activation), make(*shape, bias=False))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend, activation):
    """NaN, infinities, signed zeros and saturation pass through the epilogue as through torch's activation."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 100.0, -100.0, 1e-40, -88.5, 3e38])
    device = device_of(backend)
    results = []
    for run, bias in ((ours, values.to(device)), (theirs, values), (theirs, values.double().clamp(-1e38, 1e38))):
        x, weight = bias.new_zeros(3, 4), bias.new_zeros(len(values), 4)
        with fastdl.use_backend(backend if run is ours else "torch"):
            y = run(activation)(x, weight, bias.requires_grad_())
            results.append([y.detach(), torch.autograd.grad(y.sum(), bias)[0]])
    for actual, expected, limit in zip(*results, strict=True):
        assert_special_values(actual, expected, limit)


@pytest.mark.parametrize("backend", backends("cpu", "cuda", "triton"))
def test_repeats_are_bit_equal(backend):
    assert_repeats(backend, ours("gelu"), make(130, 70, 90))


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 150),
    k=st.integers(1, 200),
    n=st.integers(1, 150),
    dtype=st.sampled_from(FLOATING),
    activation=st.sampled_from(ACTIVATIONS),
    layouts=st.tuples(*[st.sampled_from([*LAYOUTS, None])] * 2),
)
def test_any_shape_on_the_cpu(m, k, n, dtype, activation, layouts):
    if fastdl.dispatch.why_unavailable("cpu", "cpu"):
        pytest.skip("no compiled CPU kernels")
    inputs = make(m, k, n, dtype)
    for name, layout in zip(("input", "weight"), layouts, strict=True):
        if layout is not None:
            inputs[name] = LAYOUTS[layout](inputs[name])
    compare("cpu", ours(activation), theirs(activation), inputs, multiple=4)


@pytest.mark.skipif(bool(fastdl.dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_every_instruction_set_of_this_processor(dtype):
    cpu = fastdl.dispatch.native().cpu
    chosen = cpu.isa()
    try:
        for isa in cpu.available():
            cpu.use(isa)
            for shape in [(3, 5, 7), (70, 33, 129), (257, 300, 65)]:
                compare("cpu", ours("gelu"), theirs("gelu"), make(*shape, dtype), multiple=4)
    finally:
        cpu.use(chosen)


@pytest.mark.skipif(bool(fastdl.dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
def test_threads_do_not_change_the_result_beyond_rounding():
    inputs = make(300, 64, 200)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            compare("cpu", ours("relu"), theirs("relu"), inputs, multiple=4)
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------- autograd's edges


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("backend", backends("cpu", "cuda"))
def test_gradcheck_twice(backend, activation):
    inputs = [t.to(device_of(backend)).requires_grad_() for t in make(3, 4, 5, torch.float64).values()]
    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(ours(activation), inputs)
        assert torch.autograd.gradgradcheck(ours(activation), inputs)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("backend", backends("triton"))
def test_double_backward(backend, activation):
    def penalty(function, inputs):
        inputs = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs]
        (grad,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    inputs = list(make(6, 5, 4).values())
    with fastdl.use_backend(backend):
        actual = penalty(ours(activation), inputs)
    torch.testing.assert_close(actual, penalty(theirs(activation), inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("backend", backends("cpu", "triton", "cuda"))
def test_saves_no_more_than_it_needs(backend, activation):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make(8, 4, 6).items()}
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ours(activation)(**inputs)
    assert sorted(tuple(t.shape) for t in saved) == sorted([(8, 4), (6, 4), *([(8, 6)] if activation else [])])


@pytest.mark.parametrize("backend", backends("cpu", "triton", "cuda"))
def test_frozen_parameters_cost_nothing(backend):
    x, w, b = make(8, 4, 6).values()
    saved: list[torch.Tensor] = []
    x = x.to(device_of(backend)).requires_grad_()
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = ours("relu")(x, w.to(x.device), b.to(x.device))
    assert sorted(tuple(t.shape) for t in saved) == [(6, 4), (8, 6)]
    with fastdl.use_backend(backend), torch.profiler.profile() as profile:
        y.backward(torch.randn_like(y))
    (call,) = [event for event in profile.events() if event.name == "fastdl::linear_backward"]
    assert call is not None
    assert x.grad is not None


@pytest.mark.parametrize("backend", backends("cpu", "triton", "cuda"))
def test_a_gradient_that_does_not_come(backend):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make(3, 4, 5).items()}
    with fastdl.use_backend(backend):
        y = ours("gelu")(**inputs)
    assert torch.autograd.grad(y.detach().sum() + 0 * inputs["bias"].sum(), inputs["input"], allow_unused=True) == (
        None,
    )


@pytest.mark.parametrize("backend", backends("cpu", "triton", "cuda"))
def test_backward_keeps_the_backend_of_its_forward(backend):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make(3, 4, 5).items()}
    with fastdl.use_backend(backend):
        y = ours("relu")(**inputs)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("linear_backward", backend)]


def test_torch_func_takes_the_reference():
    x, w, b = make(3, 4, 5, torch.float64).values()
    function = ours("gelu")
    expected = theirs("gelu")
    with fastdl.trace() as calls:
        actual = torch.func.vmap(lambda row: torch.func.grad(lambda v: function(v, w, b).sum())(row))(x)
    assert {call.backend for call in calls} == {"torch"}
    torch.testing.assert_close(
        actual, torch.func.vmap(lambda row: torch.func.grad(lambda v: expected(v, w, b).sum())(row))(x)
    )
    actual = torch.func.jvp(lambda v: function(v, w, b), (x,), (x,))
    torch.testing.assert_close(actual, torch.func.jvp(lambda v: expected(v, w, b), (x,), (x,)))
    torch.testing.assert_close(
        torch.func.hessian(lambda v: function(v, w, b).sum())(x[0]),
        torch.func.hessian(lambda v: expected(v, w, b).sum())(x[0]),
    )


def test_forward_mode_takes_the_reference():
    x, w, b = make(3, 4, 5).values()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(ours("relu")(dual, w, b)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(theirs("relu")(dual, w, b)).tangent
    torch.testing.assert_close(tangent, expected)


def test_dtensor_takes_the_reference():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        x, w, b = [distribute_tensor(t, mesh, [Replicate()]) for t in make(3, 4, 5).values()]
        actual = ours("relu")(x, w, b)
        assert isinstance(actual, DTensor)
        torch.testing.assert_close(actual.to_local(), theirs("relu")(x.to_local(), w.to_local(), b.to_local()))
        with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="plain tensors"):
            ours("relu")(x, w, b)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ the compiler's and torch's


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend, activation):
    torch._dynamo.reset()
    inputs = {name: tensor.requires_grad_() for name, tensor in make(6, 8, 10).items()}
    with fastdl.use_backend(backend):
        compiled = torch.compile(ours(activation), fullgraph=True, backend="aot_eager")
        actual = compiled(**inputs)
        gradients = torch.autograd.grad(actual.square().sum(), list(inputs.values()))
        bigger = compiled(**{**inputs, "input": torch.randn(9, 8)})
    expected = theirs(activation)(**inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), list(inputs.values())))
    assert bigger.shape == (9, 10)


def test_compiled_graph_holds_our_op():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    inputs = make(6, 8, 10)
    if fastdl.dispatch.why_unavailable("cpu", "cpu"):
        pytest.skip("no compiled CPU kernels")
    with fastdl.use_backend("cpu"):
        torch.compile(ours("relu"), fullgraph=True, backend=keep)(**inputs)
    assert any(node.target is torch.ops.fastdl.linear.default for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_inductor_trains_a_model(activation):
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    model = nn.Sequential(fastdl.nn.Linear(8, 16), fastdl.nn.ReLU(), fastdl.nn.LinearReLU(16, 4))
    x = torch.randn(5, 8)
    loss = torch.compile(model, fullgraph=True)(x).square().sum()
    expected = model(x).square().sum()
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    x, w, b = make(4, 5, 6).values()
    y = torch.randn(4, 6)
    for kind in (0, 1, 6):
        torch.library.opcheck(torch.ops.fastdl.linear.default, (x, w, b, kind, 0.0, backend))
        if kind:
            arguments = (x, w, None, kind, 0.0, backend)
            torch.library.opcheck(torch.ops.fastdl.linear_with_preactivation.default, arguments)
        saved = y if kind else None
        arguments = (y, x, w, saved, kind, 0.0, True, backend)
        torch.library.opcheck(torch.ops.fastdl.linear_backward.default, arguments)


def test_exports():
    program = torch.export.export(fastdl.nn.LinearReLU(4, 3), (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    assert program.module()(x).shape == (2, 3)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_autocast(backend, activation):
    inputs = {name: tensor.requires_grad_() for name, tensor in make(6, 8, 10).items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(activation)(**inputs)
        with fastdl.use_backend(backend):
            actual = ours(activation)(**inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(actual.float().sum(), list(inputs.values()))
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.float().sum(), list(inputs.values())), rtol=3e-2, atol=6e-2
    )


# ------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("layer", [fastdl.nn.Linear, fastdl.nn.LinearReLU])
def test_state_dict_goes_both_ways(layer):
    ours_layer, theirs_layer = layer(6, 6), nn.Linear(6, 6)
    assert list(ours_layer.state_dict()) == list(theirs_layer.state_dict())
    ours_layer.load_state_dict(theirs_layer.state_dict())
    x = torch.randn(4, 6)
    expected = theirs_layer(x) if layer is fastdl.nn.Linear else F.relu(theirs_layer(x))
    torch.testing.assert_close(ours_layer(x), expected)
    other = nn.Linear(6, 6)
    other.load_state_dict(ours_layer.state_dict())
    assert torch.equal(other.weight, theirs_layer.weight)


def test_initialisation_is_torchs():
    torch.manual_seed(3)
    expected = nn.Linear(7, 5)
    torch.manual_seed(3)
    actual = fastdl.nn.Linear(7, 5)
    assert torch.equal(actual.weight, expected.weight) and torch.equal(actual.bias, expected.bias)
    assert isinstance(actual, nn.Linear)
    assert repr(actual) == repr(expected)
    assert fastdl.nn.Linear(7, 5, bias=False, dtype=torch.float64).bias is None


# ------------------------------------------------------------------------------------------------------------ bad input


BAD = {
    "in_features": (
        dict(input=torch.zeros(2, 3), weight=torch.zeros(4, 5)),
        RuntimeError,
        r"input.*\(2, 3\).*\(\*, 5\)",
    ),
    "bias shape": (
        dict(input=torch.zeros(2, 5), weight=torch.zeros(4, 5), bias=torch.zeros(3)),
        RuntimeError,
        r"bias.*\(3,\).*\(4,\)",
    ),
    "weight shape": (dict(input=torch.zeros(2, 5), weight=torch.zeros(1, 4, 5)), RuntimeError, r"weight.*\(1, 4, 5\)"),
    "scalar": (dict(input=torch.zeros(()), weight=torch.zeros(4, 5)), RuntimeError, r"input.*\(\).*\(\*, 5\)"),
    "mixed dtypes": (
        dict(input=torch.zeros(2, 5), weight=torch.zeros(4, 5, dtype=torch.float64)),
        RuntimeError,
        "weight.*float64.*float32",
    ),
    "mixed devices": (
        dict(input=torch.zeros(2, 5), weight=torch.zeros(4, 5, device="meta")),
        RuntimeError,
        "weight.*meta.*cpu",
    ),
    "integers": (
        dict(
            input=torch.zeros(2, 5, dtype=torch.int64), weight=torch.zeros(4, 5, dtype=torch.int64), activation="gelu"
        ),
        RuntimeError,
        "input.*int64.*floating",
    ),
    "not a tensor": (dict(input=[1.0], weight=torch.zeros(4, 5)), TypeError, "input.*list"),
    "unknown activation": (
        dict(input=torch.zeros(2, 5), weight=torch.zeros(4, 5), activation="swish"),
        ValueError,
        "activation.*relu.*silu.*'swish'",
    ),
    "no activation": (
        dict(input=torch.zeros(2, 5), weight=torch.zeros(4, 5), activation=3),
        TypeError,
        "activation.*3",
    ),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        fastdl.functional.linear(**arguments)


def test_integers_work_where_torch_has_them_and_a_named_backend_says_no():
    x, w = torch.arange(6).view(2, 3), torch.ones(4, 3, dtype=torch.int64)
    assert torch.equal(fastdl.functional.linear(x, w), F.linear(x, w))
    if not fastdl.dispatch.why_unavailable("cpu", "cpu"):
        with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="int64.*allowed.*float32"):
            fastdl.functional.linear(x, w)


def test_what_torch_allows_auto_allows():
    x = torch.randn(4, 5)
    torch.testing.assert_close(fastdl.functional.linear(x, torch.ones(5)), F.linear(x, torch.ones(5)))
    complex_ = torch.randn(3, 5, dtype=torch.complex64)
    torch.testing.assert_close(fastdl.functional.linear(complex_, complex_), F.linear(complex_, complex_))
    with torch.device("meta"):
        assert fastdl.nn.Linear(3, 4)(torch.zeros(2, 3)).is_meta
    sparse = torch.eye(5).to_sparse()
    torch.testing.assert_close(fastdl.functional.linear(x, sparse), F.linear(x, sparse))


def test_every_op_is_registered_with_torch():
    for op in (LINEAR, LINEAR_WITH_PREACTIVATION, LINEAR_BACKWARD):
        assert hasattr(torch.ops.fastdl, op.name)
