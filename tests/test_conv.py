"""The fused convolution: every backend against float64 and torch, and every promise of its API."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from suite import FLOATING, assert_repeats, assert_special_values, backends, compare, device_of, dtypes, name_of
from torch import nn

import fastdl
from fastdl import Activation, activations, dispatch

BACKENDS = backends()
KERNELS = [p for p in BACKENDS if p.values[0] != "torch"]
ACTIVATIONS = [
    "relu",
    Activation("leaky_relu", negative_slope=0.3),
    "elu",
    "sigmoid",
    "tanh",
    "gelu",
    Activation("gelu", approximate="tanh"),
    "silu",
]
# input, weight, stride, padding, dilation, groups
GEOMETRIES = {
    "3x3": ((2, 5, 9, 7), (6, 5, 3, 3), 1, 1, 1, 1),
    "1x1": ((2, 19, 5, 7), (33, 19, 1, 1), 1, 0, 1, 1),
    "1x1 strided": ((2, 8, 6, 5), (7, 8, 1, 1), 2, 0, 1, 1),
    "5x3, stride 2 by 1": ((2, 4, 11, 8), (6, 4, 5, 3), (2, 1), (2, 0), 1, 1),
    "stride 3, past the end": ((1, 3, 11, 13), (4, 3, 3, 3), 3, 1, 1, 1),
    "dilation 2": ((2, 4, 9, 10), (6, 4, 3, 3), 1, 2, 2, 1),
    "dilation 1 by 3": ((1, 4, 6, 12), (5, 4, 3, 3), 1, (0, 3), (1, 3), 1),
    "groups 2": ((2, 6, 8, 7), (8, 3, 3, 3), 1, 1, 1, 2),
    "depthwise": ((2, 7, 9, 8), (7, 1, 3, 3), 1, 1, 1, 7),
    "depthwise, stride 2": ((2, 6, 9, 21), (6, 1, 3, 5), (2, 2), (1, 2), 1, 6),
    "depthwise, stride 3 by 1, dilation 2": ((2, 5, 11, 9), (5, 1, 2, 3), (3, 1), (0, 1), (1, 2), 5),
    "depthwise, multiplier 2": ((2, 4, 6, 6), (8, 1, 3, 3), 1, 1, 1, 4),
    "depthwise 1x1": ((2, 4, 5, 3), (4, 1, 1, 1), 1, 0, 1, 4),
    "one channel": ((3, 1, 8, 8), (16, 1, 3, 3), 1, 1, 1, 1),
    "whole image": ((2, 3, 4, 5), (6, 3, 4, 5), 1, 0, 1, 1),
    "valid": ((2, 3, 6, 6), (4, 3, 3, 2), 1, "valid", 1, 1),
    "same, even kernel": ((2, 3, 6, 7), (4, 3, 4, 2), 1, "same", 1, 1),
    "same, dilation 3": ((1, 3, 6, 7), (4, 3, 2, 3), 1, "same", (3, 2), 1),
}
FEW = ["3x3", "1x1", "depthwise, stride 2", "groups 2"]


def sample(geometries, fewer):
    """Pairs of backend and geometry; fewer where kernels run in the interpreter or the emulator."""
    return [
        pytest.param(backend.values[0], geometry, marks=backend.marks)
        for backend in BACKENDS
        for geometry in (fewer if backend.values[0] in ("triton", "cuda") and not GPU else geometries)
    ]


GPU = torch.cuda.is_available()
SAMPLE = sample(FEW, ["3x3", "depthwise, stride 2"])


def make(geometry, dtype=torch.float32, bias=True):
    """The inputs by name and the options of one of GEOMETRIES, or of a tuple like them."""
    input, weight, *options = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    fan_in = max(torch.Size(weight[1:]).numel(), 1)
    inputs = {"input": torch.randn(input), "weight": torch.randn(weight) / fan_in**0.5}
    if bias:
        inputs["bias"] = torch.randn(weight[0])
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}, options


def ours(options, activation=None, function=fastdl.functional.conv2d):
    return lambda input, weight, bias=None: function(input, weight, bias, *options, activation=activation)


def theirs(options, activation=None, function=F.conv2d):
    kind, parameter = activations.resolve(activation)
    return lambda input, weight, bias=None: activations.reference(
        function(input, weight, bias, *options), kind, parameter
    )


def check(backend, geometry, activation=None, dtype=torch.float32, bias=True, layout=None, **keywords):
    """suite.compare, and the memory formats of output and gradients: torch's, of the CPU."""
    inputs, options = make(geometry, dtype, bias)
    if layout is not None:
        inputs = {name: layout(tensor) for name, tensor in inputs.items()}
    return compare(backend, ours(options, activation), theirs(options, activation), inputs, multiple=4, **keywords)


def formats(tensor):
    return [tensor.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)]


def skip_dtype(backend, dtype):
    if dtype not in dtypes("conv", backend):
        with fastdl.use_backend(backend), pytest.raises(fastdl.UnsupportedError, match=name_of(dtype)):
            tensor = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device_of(backend))
            fastdl.functional.conv2d(tensor, tensor)
        return True
    return False


# ------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_geometries(backend, geometry):
    check(backend, geometry, "relu")
    check(backend, geometry, None, bias=False, layout=LAYOUTS["channels_last"])


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize(("backend", "geometry"), sample(GEOMETRIES, FEW))
def test_dtypes(backend, geometry, dtype):
    if skip_dtype(backend, dtype):
        return
    check(backend, geometry, "relu", dtype)
    check(backend, geometry, None, dtype, bias=False, layout=LAYOUTS["channels_last"])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("backend", "geometry"), sample(FEW, ["1x1"]))
def test_activations(backend, geometry, activation):
    check(backend, geometry, activation)
    check(backend, geometry, activation, layout=LAYOUTS["channels_last"])


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


LAYOUTS = {
    "channels_last": channels_last,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 4 else t,
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "narrowed channels_last": lambda t: channels_last(torch.cat([t, t], 1))[:, : t.shape[1]] if t.dim() == 4 else t,
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded pixels": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "geometry"), SAMPLE)
def test_layouts_of_inputs(backend, geometry, layout):
    dtype = torch.float32 if layout != "unaligned" else torch.bfloat16
    check(backend, geometry, "silu", dtype, layout=LAYOUTS[layout])


@pytest.mark.parametrize("last", [(), ("input",), ("weight",), ("input", "weight")], ids=str)
@pytest.mark.parametrize(("backend", "geometry"), SAMPLE)
def test_memory_formats_are_torchs(backend, geometry, last):
    inputs, options = make(geometry)
    inputs |= {name: channels_last(inputs[name]) for name in last}
    expected = F.conv2d(**inputs, stride=options[0], padding=options[1], groups=options[3])
    calls = [*itertools.product([None, "relu", "gelu"], [["input"], ["weight"], ["input", "weight"]])]
    if backend in ("triton", "cuda") and not GPU:  # interpreted
        calls = [(None, ["weight"]), ("gelu", ["input", "weight"])]
    for activation, needs in calls:
        for gradient in (torch.randn(expected.shape), channels_last(torch.randn(expected.shape))):
            results = []
            for function, device in ((ours, device_of(backend)), (theirs, "cpu")):
                leaves = {name: t.to(device).requires_grad_(name in needs) for name, t in inputs.items()}
                with fastdl.use_backend(backend):
                    y = function(options, activation)(**leaves)
                gradients = torch.autograd.grad(y, [leaves[name] for name in needs], gradient.to(device))
                results.append([formats(tensor) for tensor in (y, *gradients)])
            assert results[0] == results[1]


GRADIENTS = {
    "expanded scalar": lambda y: torch.ones(()).expand(y.shape),
    "expanded channels": lambda y: torch.randn(1, y.shape[1], 1, 1).expand(y.shape),
    "transposed": lambda y: torch.randn(y.transpose(2, 3).shape).transpose(2, 3),
    "narrowed": lambda y: torch.randn(*y.shape[:3], y.shape[3] + 3)[..., 2:-1],
    "channels_last": lambda y: channels_last(torch.randn(y.shape)),
    "contiguous": lambda y: torch.randn(y.shape),
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("backend", "geometry"), SAMPLE)
def test_adversarial_gradients(backend, geometry, gradient):
    for activation, layout in ((None, None), ("relu", LAYOUTS["channels_last"]), ("gelu", None)):
        check(backend, geometry, activation, layout=layout, grad_output=GRADIENTS[gradient])


@pytest.mark.parametrize("needs", [c for r in range(4) for c in itertools.combinations(("input", "weight", "bias"), r)])
@pytest.mark.parametrize(("backend", "geometry"), SAMPLE)
def test_every_combination_of_needed_gradients(backend, geometry, needs):
    check(backend, geometry, None, needs=needs)
    check(backend, geometry, "relu", needs=needs, layout=LAYOUTS["channels_last"])
    check(backend, geometry, "silu", needs=needs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_backward_is_not_nan(backend):
    layer = fastdl.nn.ConvReLU2d(3, 4, 3).to(device_of(backend))
    with fastdl.use_backend(backend):
        layer(torch.randn(2, 3, 5, 5, device=device_of(backend))).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("activation", [None, "sigmoid", "gelu"])
@pytest.mark.parametrize(
    "geometry",
    [((0, 3, 5, 5), (4, 3, 3, 3), 1, 1, 1, 1), ((0, 4, 5, 5), (4, 1, 3, 3), 2, 0, 1, 4)],
    ids=["empty batch", "empty batch, depthwise"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend, geometry, activation):
    check(backend, geometry, activation)
    check(backend, geometry, activation, bias=False, layout=LAYOUTS["channels_last"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels(backend):
    x, w = torch.zeros(2, 0, 4, 4), torch.zeros(5, 0, 3, 3)
    with fastdl.use_backend(backend):
        y = fastdl.functional.conv2d(x.to(device_of(backend)), w.to(device_of(backend)), activation="relu")
    assert y.shape == F.conv2d(x, w).shape


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("geometry", ["1x1", "3x3", "depthwise"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend, geometry, activation):
    """NaN, infinities, signed zeros and saturation pass through the epilogue as through torch's activation."""
    # torch's own gradient of elu at NaN depends on the tensor's size
    nan = 0.0 if str(activation) == "elu" else float("nan")
    values = torch.tensor([nan, float("inf"), -float("inf"), 0.0, -0.0, 100.0, -100.0, 1e-40, -88.5, 3e38])
    kernel, groups = (1 if geometry == "1x1" else 3), (10 if geometry == "depthwise" else 1)
    results = []
    for run, bias in (
        (ours, values.to(device_of(backend))),
        (theirs, values),
        (theirs, values.double().clamp(-1e38, 1e38)),
    ):
        x, weight = bias.new_zeros(2, 10, 4, 5), bias.new_zeros(10, 10 // groups, kernel, kernel)
        with fastdl.use_backend(backend if run is ours else "torch"):
            y = run([1, 0, 1, groups], activation)(x, weight, bias.requires_grad_())
            results.append([y.detach()[:, :, 1, 1], torch.autograd.grad(y.sum(), bias)[0]])
    for actual, expected, limit in zip(*results, strict=True):
        assert_special_values(actual, expected, limit)


@pytest.mark.parametrize("geometry", FEW)
@pytest.mark.parametrize("backend", KERNELS)
def test_repeats_are_bit_equal(backend, geometry):
    inputs, options = make(geometry)
    assert_repeats(backend, ours(options, "gelu"), inputs)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_larger_images(backend):
    """More than one tile, band or block of everything."""
    for geometry in (
        ((3, 70, 33, 35), (40, 70, 3, 3), 1, 1, 1, 1),
        ((3, 70, 33, 35), (90, 70, 1, 1), 1, 0, 1, 1),
        ((2, 6, 150, 170), (6, 1, 5, 3), (2, 1), 2, 1, 6),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            check(backend, geometry, "relu", dtype)
            check(backend, geometry, "relu", dtype, layout=LAYOUTS["channels_last"])


@st.composite
def geometries(draw, largest, most_channels):
    """Any geometry whose kernel fits the padded input; at each side less padding than the kernel is long."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.integers(0, 3)) == 0
    if depthwise:
        groups, channels, multiplier = draw(st.integers(2, most_channels)), 1, draw(st.sampled_from([1, 1, 2]))
    else:
        channels, multiplier = draw(st.integers(1, most_channels)), draw(st.integers(1, most_channels))
    kernel = (1, 1) if draw(st.integers(0, 3)) == 0 else (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    stride, dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 3)] * 2))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(draw(st.integers(0, min(extent - 1, 4))) for extent in extents)
    sizes = [max(1, e - 2 * p) + draw(st.integers(0, largest)) for e, p in zip(extents, padding, strict=True)]
    images = draw(st.integers(1, 3))
    return (
        (images, groups * channels, *sizes),
        (groups * multiplier, channels, *kernel),
        stride,
        padding,
        dilation,
        groups,
    )


def draw_and_check(backend, examples, largest, most_channels, dtypes):
    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        geometry=geometries(largest, most_channels),
        dtype=st.sampled_from(dtypes),
        activation=st.sampled_from([None, *ACTIVATIONS]),
        layouts=st.tuples(*[st.sampled_from([*LAYOUTS, None])] * 2),
    )
    def run(geometry, dtype, activation, layouts):
        inputs, options = make(geometry, dtype)
        # One number's error is a matter of luck.
        assume(min(tensor.numel() for tensor in inputs.values()) > 1)
        for name, layout in zip(("input", "weight"), layouts, strict=True):
            if layout is not None:
                inputs[name] = LAYOUTS[layout](inputs[name])
        compare(backend, ours(options, activation), theirs(options, activation), inputs, multiple=4)

    run()


@pytest.mark.parametrize("backend", KERNELS)
def test_any_geometry(backend):
    if backend == "cpu":
        draw_and_check(backend, 60, 40, 40, FLOATING)
    else:
        draw_and_check(backend, 60 if GPU else 8, 6, 5, dtypes("conv", backend))


@pytest.mark.skipif(bool(dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_every_instruction_set_of_this_processor(dtype):
    cpu = dispatch.native().cpu
    chosen = cpu.isa()
    try:
        for isa in cpu.available():
            cpu.use(isa)
            for geometry in ("1x1", "depthwise", "depthwise, stride 2", "depthwise, stride 3 by 1, dilation 2"):
                check("cpu", geometry, "gelu", dtype)
                check("cpu", geometry, "relu", dtype, layout=LAYOUTS["channels_last"])
    finally:
        cpu.use(chosen)


# -------------------------------------------------------------------------------------------------------- functions


@pytest.mark.parametrize(
    "options",
    [(1, 0, 1, 1), (2, 1, 1, 1), ((2,), [1], (2,), 2), (1, "same", 1, 1), (1, "same", 3, 1), (1, "valid", 1, 4)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_conv1d(backend, options):
    groups = options[3]
    inputs = {"input": torch.randn(2, 4, 13), "weight": torch.randn(8, 4 // groups, 4), "bias": torch.randn(8)}
    functions = ours(options, "relu", fastdl.functional.conv1d), theirs(options, "relu", F.conv1d)
    compare(backend, *functions, inputs, multiple=4)
    inputs["input"] = torch.randn(2, 13, 4).transpose(1, 2)
    results = compare(backend, *functions, inputs, multiple=4)
    assert results["output"].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_input(backend):
    inputs, options = make("3x3")
    inputs["input"] = inputs["input"][0]
    compare(backend, ours(options, "relu"), theirs(options, "relu"), inputs, multiple=4)
    inputs = {"input": torch.randn(4, 9), "weight": torch.randn(3, 4, 3)}
    options = (1, 1, 1, 1)
    compare(backend, ours(options, None, fastdl.functional.conv1d), theirs(options, None, F.conv1d), inputs, multiple=4)


# -------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("geometry", ["3x3", "1x1", "depthwise", "same, even kernel"])
@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_gradcheck_twice(backend, geometry, activation):
    shapes = {
        "3x3": ((2, 2, 4, 3), (3, 2, 3, 3), (2, 1), 1, 1, 1),
        "1x1": ((2, 2, 3, 2), (3, 2, 1, 1), 1, 0, 1, 1),
        "depthwise": ((2, 2, 4, 3), (2, 1, 3, 2), 1, 1, 1, 2),
        "same, even kernel": ((1, 2, 3, 3), (2, 2, 2, 4), 1, "same", 1, 1),
    }
    inputs, options = make(shapes[geometry], torch.float64)
    inputs = [tensor.requires_grad_() for tensor in inputs.values()]
    function = ours(options, activation)
    x, w, b = inputs
    with fastdl.use_backend(backend):
        for check_once in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check_once(function, inputs, fast_mode=True)
            # with a frozen weight the input is not saved
            assert check_once(lambda x: function(x, w.detach(), b.detach()), x, fast_mode=True)


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("backend", KERNELS)
def test_double_backward(backend, activation):
    def penalty(function, inputs):
        inputs = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs.values()]
        (grad,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    inputs, options = make("groups 2")
    with fastdl.use_backend(backend):
        actual = penalty(ours(options, activation), inputs)
    torch.testing.assert_close(actual, penalty(theirs(options, activation), inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_saves_no_more_than_it_needs(backend, frozen, activation):
    inputs, options = make("3x3")
    inputs = {
        name: t.to(device_of(backend)).requires_grad_(name == "input" or not frozen) for name, t in inputs.items()
    }
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = ours(options, activation)(**inputs)
    bytes_ = sum(t.untyped_storage().nbytes() for t in saved)
    weight, output = inputs["weight"].numel(), y.numel() if activation else 0
    assert bytes_ == 4 * (weight + output + (1 if frozen else inputs["input"].numel()))


@pytest.mark.parametrize("backend", KERNELS)
def test_backward_keeps_the_backend_of_its_forward(backend):
    inputs, options = make("3x3")
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in inputs.items()}
    with fastdl.use_backend(backend):
        y = ours(options, "relu")(**inputs)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("conv_backward", backend)]


def test_torch_func_takes_the_reference():
    inputs, options = make("3x3", torch.float64)
    x, w, b = inputs.values()
    function, expected = ours(options, "gelu"), theirs(options, "gelu")
    with fastdl.trace() as calls:
        actual = torch.func.vmap(lambda image: torch.func.grad(lambda v: function(v, w, b).sum())(image))(x)
    assert {call.backend for call in calls} == {"torch"}
    torch.testing.assert_close(
        actual, torch.func.vmap(lambda image: torch.func.grad(lambda v: expected(v, w, b).sum())(image))(x)
    )
    with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="plain tensors"):
        torch.func.jvp(lambda v: function(v, w, b), (x,), (x,))


# ------------------------------------------------------------------------------------------ the compiler's and torch's


@pytest.mark.parametrize("geometry", ["3x3", "same, even kernel", "depthwise"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend, activation, geometry):
    torch._dynamo.reset()
    inputs, options = make(geometry)
    inputs = {name: channels_last(tensor).requires_grad_() for name, tensor in inputs.items()}
    with fastdl.use_backend(backend):
        compiled = torch.compile(ours(options, activation), fullgraph=True, backend="aot_eager")
        actual = compiled(**inputs)
        gradients = torch.autograd.grad(actual.square().sum(), list(inputs.values()))
        bigger = compiled(**{**inputs, "input": torch.randn(3, *inputs["input"].shape[1:])})
    expected = theirs(options, activation)(**inputs)
    torch.testing.assert_close(actual, expected)
    assert formats(actual) == formats(expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), list(inputs.values())))
    assert bigger.shape[0] == 3


def test_inductor_trains_a_model():
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    model = nn.Sequential(fastdl.nn.ConvReLU2d(3, 8, 3, padding="same"), fastdl.nn.Conv2d(8, 4, 1, stride=2))
    x = torch.randn(2, 3, 6, 6)
    with fastdl.use_backend("cpu" if not dispatch.why_unavailable("cpu", "cpu") else "torch"):
        loss = torch.compile(model, fullgraph=True)(x).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = model(x).square().sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(model.parameters())))


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    for geometry in ("3x3", "depthwise, stride 2"):
        inputs, (stride, padding, _, groups) = make(geometry)
        inputs["input"] = channels_last(inputs["input"])
        pair = [stride, stride] if isinstance(stride, int) else list(stride)
        pads = [padding, padding] if isinstance(padding, int) else list(padding)
        for kind in (0, 6):
            arguments = (pair, pads, [1, 1], groups, kind, 0.0)
            torch.library.opcheck(torch.ops.fastdl.conv.default, (*inputs.values(), *arguments, backend))
            if kind:
                op = torch.ops.fastdl.conv_with_preactivation.default
                torch.library.opcheck(op, (*inputs.values(), *arguments, backend))
            y = F.conv2d(*inputs.values(), pair, pads, 1, groups)
            arguments = (y, inputs["input"], inputs["weight"], y if kind else None, *arguments, [True] * 3, backend)
            torch.library.opcheck(torch.ops.fastdl.conv_backward.default, arguments)


def test_exports():
    program = torch.export.export(fastdl.nn.ConvReLU2d(3, 4, 3), (torch.randn(2, 3, 6, 6),))
    assert program.module()(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_autocast(backend, activation):
    inputs, options = make("3x3")
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(options, activation)(**inputs)
        with fastdl.use_backend(backend):
            actual = ours(options, activation)(**inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(actual.float().sum(), list(inputs.values()))
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    expected = torch.autograd.grad(expected.float().sum(), list(inputs.values()))
    torch.testing.assert_close(gradients, expected, rtol=5e-2, atol=2e-1)


# ------------------------------------------------------------------------------------------------------------- modules

MODULES = {
    "plain": dict(kernel_size=3),
    "all": dict(kernel_size=3, stride=2, padding=1, dilation=2, groups=2, bias=False),
    "same": dict(kernel_size=4, padding="same"),
    "valid": dict(kernel_size=4, padding="valid"),
    "reflect": dict(kernel_size=3, padding=2, padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=1, padding_mode="replicate"),
    "circular": dict(kernel_size=4, padding="same", padding_mode="circular"),
    "float64": dict(kernel_size=3, dtype=torch.float64),
}


@pytest.mark.parametrize("case", MODULES)
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "ConvReLU2d"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_modules(backend, name, case):
    arguments, theirs_class = MODULES[case], getattr(nn, "Conv1d" if name == "Conv1d" else "Conv2d")
    torch.manual_seed(3)
    expected = theirs_class(4, 6, **arguments)
    torch.manual_seed(3)
    actual = getattr(fastdl.nn, name)(4, 6, **arguments)
    assert isinstance(actual, theirs_class)
    assert repr(actual).partition("(")[2] == repr(expected).partition("(")[2]
    assert list(actual.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value)  # the same initialisation
    other = theirs_class(4, 6, **arguments)
    actual.load_state_dict(other.state_dict())
    expected.load_state_dict(actual.state_dict())
    x = torch.randn(2, 4, 9, dtype=expected.weight.dtype)
    x = x if name == "Conv1d" else x.unsqueeze(-1) * torch.randn(7, dtype=x.dtype)
    y = expected(x)
    device = device_of(backend)
    with fastdl.use_backend(backend):
        result = actual.to(device)(x.to(device))
    torch.testing.assert_close(result.cpu(), y.relu() if name == "ConvReLU2d" else y, rtol=1e-4, atol=1e-5)


def test_replaced_layers_compute_the_same():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Conv1d(8, 4, 3, stride=2))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    fastdl.replace_layers(model)
    assert [type(layer).__module__.partition(".")[0] for layer in model] == ["fastdl", "fastdl", "torch", "fastdl"]
    torch.testing.assert_close(model(x), expected)
    with fastdl.use_backend("cpu" if not dispatch.why_unavailable("cpu", "cpu") else "torch"):
        torch.testing.assert_close(model(x), expected)
    assert "Conv2d" in str(fastdl.explain(model, x))
    fastdl.restore_layers(model)
    assert type(model[0]) is nn.Conv2d and type(model[3]) is nn.Conv1d


# ------------------------------------------------------------------------------------------------------------ bad input

X, W = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3)
BAD = {
    "channels": (dict(input=X, weight=torch.zeros(8, 3, 3, 3)), RuntimeError, r"input.*\(2, 4, 6, 6\).*3 channels"),
    "groups": (dict(input=X, weight=torch.zeros(7, 2, 3, 3), groups=2), RuntimeError, r"weight.*\(7, 2, 3, 3\).*2"),
    "no groups": (dict(input=X, weight=W, groups=0), RuntimeError, "groups is 0.*1 or more"),
    "groups by name": (dict(input=X, weight=W, groups="2"), TypeError, "groups.*'2'"),
    "weight's dimensions": (dict(input=X, weight=torch.zeros(8, 4, 3)), RuntimeError, r"weight.*\(8, 4, 3\).*height"),
    "input's dimensions": (dict(input=torch.zeros(4, 6), weight=W), RuntimeError, r"input.*\(4, 6\).*height, width"),
    "kernel too large": (
        dict(input=X, weight=torch.zeros(8, 4, 9, 3)),
        RuntimeError,
        r"input.*\(2, 4, 6, 6\).*\(9, 3\)",
    ),
    "bias": (dict(input=X, weight=W, bias=torch.zeros(7)), RuntimeError, r"bias.*\(7,\).*\(8,\)"),
    "stride 0": (dict(input=X, weight=W, stride=0), RuntimeError, r"stride is \(0, 0\).*1 or more"),
    "three strides": (dict(input=X, weight=W, stride=(1, 1, 1)), RuntimeError, r"stride is \(1, 1, 1\).*2"),
    "stride's type": (dict(input=X, weight=W, stride=1.5), TypeError, "stride.*1.5"),
    "negative padding": (dict(input=X, weight=W, padding=-1), RuntimeError, r"padding is \(-1, -1\).*0 or more"),
    "padding's name": (dict(input=X, weight=W, padding="sam"), RuntimeError, "padding is 'sam'.*'same'"),
    "same and strided": (dict(input=X, weight=W, padding="same", stride=2), RuntimeError, "'same'.*stride 1"),
    "dilation 0": (dict(input=X, weight=W, dilation=0), RuntimeError, r"dilation is \(0, 0\).*1 or more"),
    "mixed dtypes": (dict(input=X, weight=W.double()), RuntimeError, "weight.*float64.*float32"),
    "mixed devices": (dict(input=X, weight=W.to("meta")), RuntimeError, "weight.*meta.*cpu"),
    "integers": (dict(input=X.long(), weight=W.long(), activation="gelu"), RuntimeError, "input.*int64.*floating"),
    "not a tensor": (dict(input=[1.0], weight=W), TypeError, "input.*list"),
    "unknown activation": (dict(input=X, weight=W, activation="swish"), ValueError, "activation.*relu.*'swish'"),
    "no pixels": (dict(input=torch.zeros(2, 4, 0, 6), weight=W, padding=1), RuntimeError, r"input.*\(2, 4, 0, 6\)"),
    "no pixels, but padding": (
        dict(input=torch.zeros(2, 4, 0, 6), weight=torch.zeros(8, 4, 1, 1), padding=1),
        RuntimeError,
        r"input.*\(2, 4, 0, 6\).*height and width",
    ),
    "no output channels": (dict(input=X, weight=torch.zeros(0, 4, 3, 3)), RuntimeError, r"weight.*\(0, 4, 3, 3\)"),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        fastdl.functional.conv2d(**arguments)
    if "activation" not in arguments and case != "mixed devices":  # which torch takes for a meta tensor's
        with pytest.raises(exception):
            F.conv2d(**arguments)


def test_integers_work_where_torch_has_them_and_a_named_backend_says_no():
    x, w = torch.arange(16).view(1, 1, 4, 4), torch.ones(1, 1, 2, 2, dtype=torch.int64)
    assert torch.equal(fastdl.functional.conv2d(x, w), F.conv2d(x, w))
    with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="int64"):
        fastdl.functional.conv2d(x, w)


# ------------------------------------------------------------------------------------------------- triton's choices


@pytest.fixture
def triton_conv():
    if dispatch.triton_error() is not None:
        pytest.skip(dispatch.triton_error())
    from fastdl.kernels import conv

    return conv


def test_magic_numbers_divide(triton_conv):
    largest = 2**31 - 1
    for divisor in (*range(1, 300), 3136, 50176, 65535, 65536, 65537, 2**30 + 1, largest):
        magic, shift = triton_conv.magic_number(divisor)
        assert 2**31 <= magic < 2**32 and largest * magic < 2**64
        for multiple in (1, 2, 7, largest // divisor):
            for number in (multiple * divisor - 1, multiple * divisor, multiple * divisor + 1):
                if number <= largest:
                    assert number * magic >> shift == number // divisor


@pytest.mark.parametrize("device", ["A100", "H100", "B200", "MI300"])
def test_tiles_are_chosen_by_size(triton_conv, device):
    from fastdl.kernels import common

    device = getattr(common, device)

    def choose(pixels, results, channels):
        product = triton_conv.Product(pixels, results, channels, depth_runs=9)
        return triton_conv.choose_config(product, False, torch.bfloat16, False, True, False, True, device)

    tiles = triton_conv.usable_tiles(torch.bfloat16, False, True, False, device)
    large = choose(32 * 56 * 56, 256, 256)
    assert large.splits == 1 and large.tile.speed == max(tile.speed for tile in tiles)
    assert choose(7 * 7, 512, 512).splits > 1  # a few pixels fill the device by splitting the depth
    assert choose(32 * 56 * 56, 3, 256).tile.columns == 16
    assert choose(32 * 56 * 56, 64, 64).tile.columns == 64


def test_more_pixels_than_numbers_are_refused(triton_conv):
    image = torch.empty(2, 1, 2**15, 2**15, device="meta")
    weight = torch.empty(1, 1, 1, 1, device="meta")
    with pytest.raises(RuntimeError, match=r"input.*\(2, 1, 32768, 32768\).*2\*\*31"):
        triton_conv.conv_launches(image, weight, None, image, None, (1, 1), (1, 1), (1, 1), 1, 0, 0.0)
    with pytest.raises(RuntimeError, match=r"grad_output.*\(2, 1, 32768, 32768\).*2\*\*31"):
        triton_conv.weight_gradient_launches(image, image, weight, None, (1, 1), (1, 1), (1, 1), 1)
