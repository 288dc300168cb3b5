"""Recurrent layers and cells: every backend against float64 and torch, and every promise of their API."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from suite import FLOATING, as_double, backends, device_of, dtypes, name_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastdl
from fastdl import accuracy, dispatch, functional, proof
from fastdl.ops import rnn as ops

KINDS = {
    "LSTM": {},
    "LSTM projected": {"proj_size": 3},
    "GRU": {},
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
}
CELLS = {"LSTMCell": {}, "GRUCell": {}, "RNNCell": {}, "RNNCell relu": {"nonlinearity": "relu"}}
INPUT, HIDDEN = 4, 5
LENGTHS = {"packed": [4, 2, 1], "unsorted": [1, 4, 2]}
SLOW = ("triton", "cuda") if not torch.cuda.is_available() else ()  # interpreter and emulator


def implementing(op, *names):
    """pytest parameters: those of the named backends that have an op."""
    have = [name for name in names if name == "torch" or name in dispatch.OPS[op].support]
    return backends(*have) if have else []


# On "stack" a layer runs by the ops, on their references, where on "torch" it is torch's own function.
BACKENDS = [*implementing("recurrence", "torch", "cpu", "triton", "cuda"), "stack"]
CELL_BACKENDS = implementing("recurrent_cell", "torch", "cpu", "triton", "cuda")


@contextlib.contextmanager
def using(backend):
    """use_backend, where "stack" keeps torch from taking a whole layer."""
    taken = functional.rnn._torch_is_better
    if backend == "stack":
        functional.rnn._torch_is_better = lambda *_: False
    try:
        with fastdl.use_backend("torch" if backend == "stack" else backend):
            yield
    finally:
        functional.rnn._torch_is_better = taken


def device(backend):
    return device_of("torch" if backend == "stack" else backend)


def pair(kind, sizes=(INPUT, HIDDEN), dtype=torch.float32, **options):
    """torch's layer and ours, with torch's state."""
    theirs = getattr(nn, kind.split()[0])(*sizes, dtype=dtype, **KINDS.get(kind, {}), **CELLS.get(kind, {}), **options)
    ours = getattr(fastdl.nn, kind.split()[0])(
        *sizes, dtype=dtype, **KINDS.get(kind, {}), **CELLS.get(kind, {}), **options
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make(layer, form, given, steps=4, batch=3):
    """Input, and h0 and c0 if ``given``, by name, in float64; a packed form's input is padded."""
    axes = [steps] if form == "unbatched" else [batch, steps] if layer.batch_first else [steps, batch]
    tensors = {"input": torch.randn(*axes, layer.input_size, dtype=torch.float64)}
    if given:
        rows = layer.num_layers * (2 if layer.bidirectional else 1)
        lead = [rows] if form == "unbatched" else [rows, batch]
        tensors["h0"] = torch.randn(*lead, layer.proj_size or layer.hidden_size, dtype=torch.float64)
        if layer.mode == "LSTM":
            tensors["c0"] = torch.randn(*lead, layer.hidden_size, dtype=torch.float64)
    return tensors


def call(layer, form, tensors):
    """Outputs by name."""
    input, states = tensors["input"], [tensors[name] for name in ("h0", "c0") if name in tensors]
    if form in LENGTHS:
        input = pack_padded_sequence(input, LENGTHS[form], layer.batch_first, enforce_sorted=form == "packed")
    output, last = layer(input, None if not states else tuple(states) if len(states) > 1 else states[0])
    if form in LENGTHS:
        assert isinstance(output, PackedSequence)
        for ours, theirs in zip(output[1:], input[1:], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        output = output.data
    return {"output": output} | dict(zip(("h_n", "c_n"), last if isinstance(last, tuple) else (last,), strict=False))


def call_cell(layer, form, tensors):
    states = [tensors[name] for name in ("h0", "c0") if name in tensors]
    result = layer(tensors["input"], None if not states else tuple(states) if len(states) > 1 else states[0])
    return dict(zip(("h", "c"), result if isinstance(result, tuple) else (result,), strict=False))


def evaluate(run, layer, form, tensors, gradients):
    """Outputs, and the gradient of every input, state and weight, by name."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = run(layer, form, tensors)
    chosen = {name: gradients[name](outputs[name]) for name in outputs if name in gradients}
    leaves = tensors | dict(layer.named_parameters())
    found = torch.autograd.grad(
        [outputs[name] for name in chosen], list(leaves.values()), list(chosen.values()), allow_unused=True
    )
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True)}


def random_gradients(outputs):
    """The same random gradient of each output in whatever dtype and on whatever device it comes."""
    drawn = {name: torch.randn(output.shape, dtype=torch.float64) for name, output in outputs.items()}
    return {name: lambda output, name=name: drawn[name].to(output) for name in drawn}


def compare(backend, kind, form="padded", given=True, dtype=torch.float32, gradients=None, **options):
    """Asserts that our layer is no worse than a small multiple of torch's own error, everywhere and by name."""
    sizes, shape = options.pop("sizes", (INPUT, HIDDEN)), options.pop("shape", {})
    theirs, ours = pair(kind, sizes, dtype, **options)
    tensors = {name: tensor.to(dtype) for name, tensor in make(theirs, form, given, **shape).items()}
    judge(backend, call, theirs, ours, form, tensors, gradients, dtype)


def judge(backend, run, theirs, ours, form, tensors, gradients, dtype):
    exact_layer = copy.deepcopy(theirs).double()
    exact_inputs = {name: as_double(tensor) for name, tensor in tensors.items()}
    with torch.no_grad():
        gradients = gradients or random_gradients(run(exact_layer, form, exact_inputs))
    exact = evaluate(run, exact_layer, form, exact_inputs, gradients)
    theirs, ours = theirs.to(device(backend)), ours.to(device(backend))
    tensors = {name: tensor.to(device(backend)) for name, tensor in tensors.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    torchs = evaluate(run, theirs, form, tensors, gradients)
    with using(backend), fastdl.trace() as calls:
        try:
            results = evaluate(run, ours, form, tensors, gradients)
        except fastdl.UnsupportedError as error:
            pytest.skip(str(error))
    assert calls and {call.backend for call in calls} == {"torch" if backend == "stack" else backend}
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items()), "an input was changed"
    for name, expected in torchs.items():
        actual = results[name]
        if expected is None or actual is None:
            assert actual is None or not actual.any(), name
            assert expected is None or not expected.any(), name
            continue
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device), name
        if run is call and not name.startswith("gradient"):
            assert actual.stride() == expected.stride(), name
        error = accuracy.error(actual.cpu(), exact[name])
        torch_error = accuracy.error(expected.cpu(), exact[name])
        bound = accuracy.bound(torch_error, actual.dtype, accuracy.MULTIPLE_LONG_REDUCTION)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


# ------------------------------------------------------------------------------------------------------- numerics


FLAGS = list(
    itertools.product(
        KINDS, (1, 2), (True, False), (False, True), (False, True), ("padded", *LENGTHS, "unbatched"), (True, False)
    )
)


def plain(parameter):
    """The name in a pytest parameter."""
    return parameter if isinstance(parameter, str) else parameter.values[0]


def product():
    """Every combination of flags for every backend; for interpreter and emulator each 17th, which pairs them all."""
    for parameter in BACKENDS:
        name, marks = plain(parameter), () if isinstance(parameter, str) else parameter.marks
        for flags in FLAGS[:: 17 if name in SLOW else 1]:
            yield pytest.param(name, *flags, marks=marks)


@pytest.mark.parametrize("backend, kind, layers, bias, batch_first, bidirectional, form, given", list(product()))
def test_every_combination_of_flags(backend, kind, layers, bias, batch_first, bidirectional, form, given):
    options = dict(num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    compare(backend, kind, form, given, **options)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, kind, dtype):
    if backend not in ("torch", "stack") and dtype not in dtypes("recurrence", backend):
        with using(backend), pytest.raises(fastdl.UnsupportedError, match=name_of(dtype)):
            pair(kind, dtype=dtype)[1].to(device(backend))(
                torch.zeros(2, 1, INPUT, dtype=dtype, device=device(backend))
            )
        return
    compare(backend, kind, "packed", dtype=dtype, sizes=(11, 19), bidirectional=True)


@pytest.mark.parametrize(
    "steps, batch, inputs, hidden", [(1, 1, 1, 1), (5, 3, 7, 17), (3, 33, 5, 64), (2, 2, 9, 130), (40, 2, 3, 8)]
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_sizes(backend, kind, steps, batch, inputs, hidden):
    if backend in SLOW and steps * batch * hidden > 400:
        steps, batch = min(steps, 4), min(batch, 5)
    compare(backend, kind, sizes=(inputs, hidden), shape=dict(steps=steps, batch=batch))


GRADIENTS = {
    "of the output alone": {"output": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape)},
    "of h_n alone": {"h_n": torch.ones_like},
    "of c_n alone": {"c_n": torch.ones_like},
    "expanded row": {"output": lambda y: y.new_full((1, 1, y.shape[2]), 0.3).expand(y.shape)},
    "transposed": {"output": lambda y: torch.ones_like(y).transpose(0, 1).contiguous().transpose(0, 1)},
    "narrowed": {"output": lambda y: torch.cat([y, y], 2).detach()[..., 1 : 1 + y.shape[2]]},
    "unaligned": {"output": lambda y: y.new_ones(y.numel() + 1)[1:].view(y.shape), "h_n": torch.ones_like},
    "zero": {"output": torch.zeros_like, "h_n": torch.zeros_like, "c_n": torch.zeros_like},
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["LSTM", "LSTM projected", "GRU", "RNN"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, kind, gradient):
    if gradient == "of c_n alone" and not kind.startswith("LSTM"):
        return
    compare(backend, kind, gradients=GRADIENTS[gradient], bidirectional=True)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "narrowed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_inputs(backend, kind, layout):
    theirs, ours = pair(kind)
    tensors = {name: LAYOUTS[layout](tensor.float()) for name, tensor in make(theirs, "padded", True).items()}
    judge(backend, call, theirs, ours, "padded", tensors, None, torch.float32)


@pytest.mark.parametrize("needs", ["input", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "weight_hr_l0"])
@pytest.mark.parametrize("kind", ["LSTM projected", "GRU", "RNN"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_needed_gradient_alone(backend, kind, needs):
    theirs, ours = pair(kind)
    if needs not in ("input", "h0", "c0", *dict(theirs.named_parameters())) or (needs == "c0" and "LSTM" not in kind):
        return
    gradients = []
    for layer, chosen in ((theirs, "torch"), (ours, backend)):
        layer.to(device(backend))
        torch.manual_seed(1)
        tensors = {name: tensor.float().to(device(backend)) for name, tensor in make(layer, "padded", True).items()}
        for name, tensor in (tensors | dict(layer.named_parameters())).items():
            tensor.requires_grad_(name == needs)
        with using(chosen):
            sum(output.sum() for output in call(layer, "padded", tensors).values()).backward()
        leaves = tensors | dict(layer.named_parameters())
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [needs]
        gradients.append(leaves[needs].grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_gates_are_not_nan(backend, kind):
    theirs, ours = pair(kind)
    for layer in (theirs, ours):
        layer.to(device(backend))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(parameter.sign())
    x = torch.randn(4, 3, INPUT, device=device(backend)).sign() * 100
    results = []
    for layer, chosen in ((theirs, "torch"), (ours, backend)):
        leaf = x.clone().requires_grad_()
        with using(chosen):
            outputs = call(layer, "padded", {"input": leaf})
            gradient = torch.autograd.grad(sum(o.sum() for o in outputs.values()), leaf)[0]
        results.append([*outputs.values(), gradient])
    assert all(torch.isfinite(result).all() for result in results[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass_as_in_torch(backend, kind):
    """A NaN taints its own sequence, from its step on, and no other."""
    theirs, ours = pair(kind)
    x = torch.randn(4, 3, INPUT)
    x[1, 1, 0], x[2, 2, 1] = float("nan"), float("inf")
    expected = call(theirs, "padded", {"input": x})
    with using(backend):
        actual = call(ours.to(device(backend)), "padded", {"input": x.to(device(backend))})
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if plain(b) != "torch"])
def test_repeats_are_bit_equal(backend):
    _, ours = pair("LSTM", (9, 12 if backend == "triton" and backend in SLOW else 40), num_layers=2, bidirectional=True)
    ours.to(device(backend))
    x = torch.randn(5, 6, 9, device=device(backend))
    runs = []
    for _ in range(3):
        with using(backend):
            loss = ours(x)[0].square().sum()
            runs.append([loss, *torch.autograd.grad(loss, list(ours.parameters()))])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_is_as_training(backend, kind):
    """Without gradients nothing is saved, by a path of its own."""
    theirs, ours = pair(kind, num_layers=2)
    tensors = {name: tensor.float().to(device(backend)) for name, tensor in make(theirs, "padded", True).items()}
    ours.to(device(backend))
    with using(backend):
        trained = call(ours, "padded", tensors)
        with torch.no_grad():
            inferred = call(ours, "padded", tensors)
    torch.testing.assert_close(inferred, trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if device(plain(b)) == "cpu"])
def test_dropout_between_layers_draws_torchs_numbers(backend):
    theirs, ours = pair("LSTM", num_layers=3, dropout=0.5, bidirectional=True)
    x = torch.randn(4, 3, INPUT)
    results = []
    for layer, chosen in ((theirs, "torch"), (ours, backend)):
        torch.manual_seed(5)
        with using(chosen):
            results.append(layer(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    with using(backend):
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_backpropagation_carries_detached_state(backend, kind):
    theirs, ours = pair(kind)
    x = torch.randn(8, 3, INPUT, device=device(backend))
    for layer, chosen in ((theirs, "torch"), (ours, backend)):
        layer.to(device(backend))
        state = None
        for part in x.split(4):
            with using(chosen):
                output, state = layer(part, state)
                output.square().sum().backward()
            state = tuple(s.detach() for s in state) if kind == "LSTM" else state.detach()
    for (name, expected), actual in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


# ---------------------------------------------------------------------------------------------------------- the cells


def make_cell(layer, single, given, batch=3):
    lead = [] if single else [batch]
    tensors = {"input": torch.randn(*lead, layer.input_size, dtype=torch.float64)}
    if given:
        for name in ("h0", "c0")[: 2 if "LSTM" in type(layer).__name__ else 1]:
            tensors[name] = torch.randn(*lead, layer.hidden_size, dtype=torch.float64)
    return tensors


@pytest.mark.parametrize("given", [True, False], ids=["hx", "no hx"])
@pytest.mark.parametrize("single", [True, False], ids=["1-D", "2-D"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", CELL_BACKENDS)
def test_cells(backend, kind, dtype, bias, single, given):
    if backend != "torch" and dtype not in dtypes("recurrent_cell", backend):
        pytest.skip(f"{backend} has no {dtype}")
    theirs, ours = pair(kind, dtype=dtype, bias=bias)
    tensors = {name: tensor.to(dtype) for name, tensor in make_cell(theirs, single, given).items()}
    judge(backend, call_cell, theirs, ours, None, tensors, None, dtype)


@pytest.mark.parametrize("batch, inputs, hidden", [(1, 1, 1), (1, 64, 64), (7, 33, 17), (33, 5, 130)])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", CELL_BACKENDS)
def test_ragged_sizes_of_cells(backend, kind, batch, inputs, hidden):
    theirs, ours = pair(kind, (inputs, hidden))
    tensors = {name: tensor.float() for name, tensor in make_cell(theirs, False, True, batch).items()}
    judge(backend, call_cell, theirs, ours, None, tensors, None, torch.float32)


@pytest.mark.parametrize("layout", ["transposed", "narrowed", "unaligned", "expanded"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", CELL_BACKENDS)
def test_layouts_of_cells(backend, kind, layout):
    theirs, ours = pair(kind)
    tensors = {name: LAYOUTS[layout](tensor.float()) for name, tensor in make_cell(theirs, False, True).items()}
    gradients = {"h": lambda h: h.new_ones(()).expand(h.shape), "c": lambda c: torch.ones_like(c).t().contiguous().t()}
    judge(backend, call_cell, theirs, ours, None, tensors, gradients, torch.float32)


@pytest.mark.parametrize("only", ["h", "c"])
@pytest.mark.parametrize("backend", CELL_BACKENDS)
def test_one_gradient_of_a_cell_does_not_come(backend, only):
    theirs, ours = pair("LSTMCell")
    tensors = {name: tensor.float() for name, tensor in make_cell(theirs, False, True).items()}
    judge(backend, call_cell, theirs, ours, None, tensors, {only: torch.ones_like}, torch.float32)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", CELL_BACKENDS)
def test_saturated_cells_are_not_nan(backend, kind):
    _, ours = pair(kind)
    x = (torch.randn(3, INPUT).sign() * 1e4).to(device(backend)).requires_grad_()
    with using(backend):
        outputs = call_cell(ours.to(device(backend)), None, {"input": x})
        gradient = torch.autograd.grad(sum(output.sum() for output in outputs.values()), x)[0]
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs.values(), gradient))


@pytest.mark.parametrize("where", ["input", "h0", "both"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", CELL_BACKENDS)
def test_infinity_meets_no_weights_but_its_own(backend, kind, where):
    """A GRU's n has a part of the input and one of the state: neither is NaN by the other's infinity."""
    theirs, ours = pair(kind)
    tensors = {name: tensor.float() for name, tensor in make_cell(theirs, False, True).items()}
    for name in ("input", "h0") if where == "both" else (where,):
        tensors[name][1, 2] = float("inf")
    expected = call_cell(theirs, None, tensors)
    with using(backend):
        actual = call_cell(
            ours.to(device(backend)), None, {name: tensor.to(device(backend)) for name, tensor in tensors.items()}
        )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].cpu(), value, equal_nan=True, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- autograd's edges


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if plain(b) not in SLOW])
def test_gradcheck_twice(backend, kind, packed):
    if backend not in ("torch", "stack") and torch.float64 not in dtypes("recurrence", backend):
        pytest.skip(f"{backend} has no float64")
    _, ours = pair(kind, (2, 4), torch.float64, bidirectional=packed)
    tensors = make(ours, "padded", True, steps=3, batch=2)
    names, weights = list(tensors), dict(ours.named_parameters())
    leaves = [
        t.to(device(backend)).requires_grad_() for t in (*tensors.values(), *(w.detach() for w in weights.values()))
    ]

    def function(*values):
        given = dict(zip(names, values, strict=False))
        states = tuple(given[name] for name in names[1:])
        input = pack_padded_sequence(given["input"], [3, 1]) if packed else given["input"]
        replaced = dict(zip(weights, values[len(names) :], strict=True))
        arguments = input, states if len(states) > 1 else states[0]
        output, last = torch.func.functional_call(ours, replaced, arguments)
        return output.data if packed else output, *(last if isinstance(last, tuple) else (last,))

    with using(backend):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("mode", range(4), ids=ops.MODES)
@pytest.mark.parametrize("backend", implementing("recurrent_cell", "torch", "cpu", "cuda"))
def test_gradcheck_twice_of_cells(backend, mode):
    if backend != "torch" and torch.float64 not in dtypes("recurrent_cell", backend):
        pytest.skip(f"{backend} has no float64")
    shapes = [(2, 3), (2, 4), (2, 4), (4 * ops.GATES[mode], 3), (4 * ops.GATES[mode], 4)]
    shapes += [(4 * ops.GATES[mode],)] * 2
    leaves = [torch.randn(s, dtype=torch.float64, device=device(backend)).requires_grad_() for s in shapes]
    if mode != ops.LSTM:
        leaves[2] = None

    def function(*values):
        results = ops.RecurrentCellFunction.apply(*values, mode, backend, None)
        return results[: 2 if mode == ops.LSTM else 1]

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    torch.testing.assert_close(
        function(*leaves), ops.reference_cell(*leaves, mode, False)[: 2 if mode == ops.LSTM else 1]
    )


@pytest.mark.parametrize("backend", [b for b in BACKENDS if plain(b) != "torch"])
def test_backward_keeps_the_backend_of_its_forward(backend):
    _, ours = pair("GRU")
    with using(backend):
        output, _ = ours.to(device(backend))(torch.randn(4, 3, INPUT, device=device(backend)))
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        output.sum().backward()
    expected = "torch" if backend == "stack" else backend
    assert [(call.op, call.backend) for call in calls] == [
        ("recurrence_backward", expected),
        ("linear_backward", expected),
        *([("linear_backward", expected)] if backend != "stack" else []),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_takes_the_reference(kind):
    """Also where torch's own layer has no rule: vmap and forward mode."""
    _, ours = pair(kind, dtype=torch.float64)
    ours.requires_grad_(False)
    x = torch.randn(2, 4, 3, INPUT, dtype=torch.float64)

    def loss(v):
        return ours(v)[0].square().sum()

    torch.testing.assert_close(torch.func.vmap(loss)(x), torch.stack([loss(v) for v in x]))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(v) for v in leaf), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (x[0],), (x[1],))[1], (expected[0] * x[1]).sum())
    with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError):
        torch.func.vmap(loss)(x)


@pytest.mark.parametrize("kind", CELLS)
def test_torch_func_on_cells(kind):
    _, ours = pair(kind, dtype=torch.float64)
    ours.requires_grad_(False)
    x = torch.randn(2, 3, INPUT, dtype=torch.float64)

    def loss(v):
        return sum(output.square().sum() for output in call_cell(ours, None, {"input": v}).values())

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(v) for v in leaf), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (x[0],), (x[1],))[1], (expected[0] * x[1]).sum())


# ------------------------------------------------------------------------------------------ the compiler's and torch's


@pytest.fixture
def dynamo_takes_recurrent_layers():
    """By default it breaks the graph at every subclass of torch.nn's recurrent layers, and runs them as they are."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [*implementing("recurrence", "cpu", "torch"), "auto"])
def test_compiles_without_graph_breaks(backend, kind, dynamo_takes_recurrent_layers):
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, INPUT)
    with fastdl.use_backend(backend):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        actual = compiled(x)[0]
        gradients = torch.autograd.grad(actual.square().sum(), list(ours.parameters()))
        longer = compiled(torch.randn(6, 3, INPUT))[0]
    expected = theirs(x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    assert len(longer) == 6


def test_compiles_as_it_comes():
    torch._dynamo.reset()
    theirs, ours = pair("LSTM")
    x = torch.randn(4, 3, INPUT)
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x), theirs(x))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", [*implementing("recurrent_cell", "cpu", "torch"), "auto"])
def test_cells_compile_without_graph_breaks(backend, kind):
    torch._dynamo.reset()
    theirs, ours = pair(kind)
    x = torch.randn(3, INPUT)
    with fastdl.use_backend(backend):
        actual = torch.compile(lambda x: call_cell(ours, None, {"input": x})["h"], fullgraph=True, backend="aot_eager")(
            x
        )
        gradients = torch.autograd.grad(actual.square().sum(), list(ours.parameters()))
    expected = call_cell(theirs, None, {"input": x})["h"]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), list(theirs.parameters())))


@pytest.mark.parametrize("mode", range(4), ids=ops.MODES)
@pytest.mark.parametrize("backend", implementing("recurrence", "torch", "cpu"))
def test_opcheck(backend, mode):
    gates, steps, batch = ops.GATES[mode], 3, 2
    projected, hx = torch.randn(6, gates * 4), torch.randn(batch, 4)
    cx, bias_hn = torch.randn(batch, 4) if mode == ops.LSTM else None, torch.randn(4) if mode == ops.GRU else None
    w_hh = torch.randn(gates * 4, 4)
    for reverse in (False, True):
        arguments = projected, hx, cx, w_hh, bias_hn, None, None, steps, mode, reverse, True
        torch.library.opcheck(torch.ops.fastdl.recurrence.default, (*arguments, backend))
        output, _, _, saved, cells = ops.reference(*arguments)
        arguments = torch.randn_like(output), None, None, output, hx, cx, w_hh, None, saved, cells, None, steps, mode
        torch.library.opcheck(torch.ops.fastdl.recurrence_backward.default, (*arguments, reverse, backend))


@pytest.mark.parametrize("mode", range(4), ids=ops.MODES)
@pytest.mark.parametrize("backend", implementing("recurrent_cell", "torch", "cpu"))
def test_opcheck_of_cells(backend, mode):
    gates = ops.GATES[mode]
    cx = torch.randn(2, 4) if mode == ops.LSTM else None
    arguments = torch.randn(2, 3), torch.randn(2, 4), cx, torch.randn(gates * 4, 3), torch.randn(gates * 4, 4)
    arguments = *arguments, torch.randn(gates * 4), torch.randn(gates * 4), mode, True
    torch.library.opcheck(torch.ops.fastdl.recurrent_cell.default, (*arguments, backend))
    states = ops.reference_cell(*arguments)
    arguments = torch.randn(2, 4), None, arguments[1], cx, *states, mode, backend
    torch.library.opcheck(torch.ops.fastdl.recurrent_cell_backward.default, arguments)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
@pytest.mark.parametrize("backend", [*implementing("recurrence", "torch", "cpu"), "stack"])
def test_autocast(backend, kind):
    theirs, ours = pair(kind)
    cell = "Cell" in kind
    x = torch.randn(3, INPUT) if cell else torch.randn(4, 3, INPUT)
    run = call_cell if cell else call
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(theirs, "padded", {"input": x})
        with using(backend):
            actual = run(ours, "padded", {"input": x})
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        torch.testing.assert_close(actual[name], value, rtol=3e-2, atol=3e-2)
    gradients = torch.autograd.grad(sum(o.float().sum() for o in actual.values()), list(ours.parameters()))
    wanted = torch.autograd.grad(sum(o.float().sum() for o in expected.values()), list(theirs.parameters()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    torch.testing.assert_close(gradients, wanted, rtol=5e-2, atol=1e-1)


# ------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_state_dict_goes_both_ways(kind):
    options = {} if "Cell" in kind else dict(num_layers=2, bidirectional=True)
    theirs, ours = pair(kind, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    other, _ = pair(kind, **options)
    other.load_state_dict(ours.state_dict())
    for (name, a), b in zip(other.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_initialisation_is_torchs(kind):
    layers = []
    for module in (nn, fastdl.nn):
        torch.manual_seed(3)
        layers.append(getattr(module, kind.split()[0])(7, 6, **KINDS.get(kind, {}), **CELLS.get(kind, {})))
    for a, b in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(a, b)


def test_weights_as_torch_keeps_them():
    theirs, ours = pair("LSTM", num_layers=2, bidirectional=True)
    ours.flatten_parameters()
    assert [[name.shape for name in group] for group in ours.all_weights] == [
        [name.shape for name in group] for group in theirs.all_weights
    ]
    assert all(a is b for a, b in zip(itertools.chain(*ours.all_weights), ours._flat_weights, strict=True))
    x = torch.randn(4, 3, INPUT)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(x), theirs(x))
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    theirs.weight_hh_l0 = nn.Parameter(torch.zeros_like(theirs.weight_hh_l0))
    torch.testing.assert_close(ours(x), theirs(x))


def test_replaced_layers_work_and_explain_themselves():
    model = nn.ModuleDict({kind: pair(kind)[0] for kind in (*KINDS, *CELLS)})
    fastdl.replace_layers(model)
    assert all(type(layer).__module__ == "fastdl.nn.rnn" for layer in model.values())
    rows = fastdl.explain(model["LSTM"], torch.randn(4, 3, INPUT))
    assert {row.op for row in rows} <= {"recurrence", "linear"} and "recurrence" in {row.op for row in rows}
    for row in rows:
        assert row.layer == "fastdl.nn.rnn.LSTM" and row.backend in ("torch", "cpu") and row.reason
    fastdl.restore_layers(model)
    assert all(type(layer).__module__ == "torch.nn.modules.rnn" for layer in model.values())


def test_auto_decides_once_for_a_whole_layer():
    _, ours = pair("LSTM", num_layers=2, bidirectional=True)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        ours(torch.randn(4, 3, INPUT))
    assert [(call.op, call.backend, call.shape_class) for call in calls] == [
        ("recurrence", "torch", ("lstm", (4, 3, HIDDEN)))
    ]


@pytest.mark.parametrize("unknown", [False, True], ids=["on record", "unproven"])
@pytest.mark.parametrize("kind", ["LSTM", "LSTM projected", "GRU", "RNN"])
@pytest.mark.parametrize("backend", implementing("recurrence", "cpu"))
def test_auto_takes_a_kernel_that_is_faster_and_lets_it_prove_itself(backend, kind, unknown, monkeypatch):
    outcomes = {}
    monkeypatch.setattr(proof, "verdict", lambda *_: proof.Verdict(True, unknown, "as told", lasting=False))
    monkeypatch.setattr(proof, "_remember", outcomes.setdefault)
    dispatch.forget_selections()
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, INPUT)
    with fastdl.trace() as calls:
        output, _ = ours(x)
        gradients = torch.autograd.grad(output.square().sum(), list(ours.parameters()))
    names = {"linear", "linear_backward", "recurrence", "recurrence_backward"}
    assert {(call.op, call.backend) for call in calls} == {(name, backend) for name in names}
    expected = theirs(x)[0]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), list(theirs.parameters()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    assert {key.split()[0]: outcome for key, outcome in outcomes.items()} == dict.fromkeys(
        names if unknown else (), "passed"
    )


# ------------------------------------------------------------------------------------------------------- beyond torch


def plain_lstm(layer, x):
    """The options of one layer in one direction, written out by their papers' formulas in eval mode."""
    h, c = x.new_zeros(2, x.shape[1], layer.hidden_size).unbind(0)

    def norm(v, name):
        if not layer.layer_norm:
            return v
        v = (v - v.mean(1, keepdim=True)) / (v.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return v * getattr(layer, f"weight_norm_{name}_l0") + getattr(layer, f"bias_norm_{name}_l0")

    outputs = []
    for step in x:
        z = norm(step @ layer.weight_ih_l0.t(), "ih") + norm(h @ layer.weight_hh_l0.t(), "hh")
        i, f, g, o = (z + layer.bias_ih_l0 + layer.bias_hh_l0).chunk(4, 1)
        new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new_h = o.sigmoid() * norm(new_c, "c").tanh()
        zone_c, zone_h = layer.zoneout
        c, h = zone_c * c + (1 - zone_c) * new_c, zone_h * h + (1 - zone_h) * new_h
        outputs.append(h)
    return torch.stack(outputs), h, c


OPTIONS = {
    "layer norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.3, 0.1)},
    "variational": {"recurrent_dropout": 0.4},
    "all": {"layer_norm": True, "zoneout": 0.2, "recurrent_dropout": 0.3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_in_eval_mode_are_their_formulas(option):
    layer = fastdl.nn.LSTM(INPUT, HIDDEN, dtype=torch.float64, **OPTIONS[option]).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 3, INPUT, dtype=torch.float64, requires_grad=True)
    output, (h, c) = layer(x)
    expected = plain_lstm(layer, x)
    torch.testing.assert_close((output, h[0], c[0]), expected)
    leaves = [x, *layer.parameters()]  # backward works in eval mode
    actual = torch.autograd.grad(output.square().sum() + c.sum(), leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(expected[0].square().sum() + expected[2].sum(), leaves))


@pytest.mark.parametrize("form", ["padded", *LENGTHS, "unbatched"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_take_every_form_of_input(option, form):
    """With options whose effect is nothing in eval mode, the result is the plain layer's; else it is finite."""
    options = dict(num_layers=2, bidirectional=True, proj_size=3, batch_first=True)
    layer = fastdl.nn.LSTM(INPUT, HIDDEN, **options, **OPTIONS[option])
    tensors = {name: tensor.float() for name, tensor in make(layer, form, True).items()}
    for parameter_mode in (True, False):
        layer.train(parameter_mode)
        outputs = call(layer, form, tensors)
        sum(output.square().sum() for output in outputs.values()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in layer.parameters())
    if option == "variational":
        plain = fastdl.nn.LSTM(INPUT, HIDDEN, **options).eval()
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(call(layer, form, tensors), call(plain, form, tensors))


@pytest.mark.parametrize("backend", implementing("recurrence", "cpu", "torch"))
def test_variational_dropout_keeps_one_mask(backend):
    """What is dropped of h stays dropped: with an identity in place of the gates it shows in every step."""
    layer = fastdl.nn.LSTM(1, 64, recurrent_dropout=0.5)
    x = torch.randn(6, 1, 1)
    with using(backend):
        torch.manual_seed(1)
        first = layer(x)[0]
        torch.manual_seed(1)
        assert torch.equal(layer(x)[0], first)
        h0 = torch.randn(1, 1, 64, requires_grad=True)
        output, _ = layer(x, (h0, torch.zeros(1, 1, 64)))
        share = (torch.autograd.grad(output.sum(), h0)[0] == 0).float().mean()
    assert 0.2 < share < 0.8


def test_zoneout_keeps_numbers_as_often_as_told():
    layer = fastdl.nn.LSTM(2, 400, zoneout=(0.0, 0.3))
    output, _ = layer(torch.randn(2, 5, 2))
    assert abs((output[1] == output[0]).float().mean() - 0.3) < 0.05


def test_options_add_parameters_only_if_they_are_on():
    plain = nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True)
    for options in ({"zoneout": 0.1}, {"recurrent_dropout": 0.1}):
        layer = fastdl.nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, **options)
        assert list(layer.state_dict()) == list(plain.state_dict())
    layer = fastdl.nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, layer_norm=True)
    names = list(layer.state_dict())
    assert names[: len(plain.state_dict())] == list(plain.state_dict()) and len(names) == 16 + 4 * 6
    assert layer.weight_norm_c_l1_reverse.eq(1).all() and layer.bias_norm_ih_l0.eq(0).all()
    copied = pickle.loads(pickle.dumps(layer)).eval()
    x = torch.randn(4, 3, INPUT)
    torch.testing.assert_close(copied(x), layer.eval()(x))
    assert "layer_norm=True" in repr(layer)


@pytest.mark.parametrize("options", [{"zoneout": 1.0}, {"zoneout": (0.1, -0.1)}, {"recurrent_dropout": 1.5}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*allowed: 0 <="):
        fastdl.nn.LSTM(INPUT, HIDDEN, **options)


# ----------------------------------------------------------------------------------------------------------- bad input


BAD = {
    "no steps": lambda layer: layer(torch.zeros(0, 2, INPUT)),
    "four dimensions": lambda layer: layer(torch.zeros(1, 1, 2, INPUT)),
    "input size": lambda layer: layer(torch.zeros(3, 2, INPUT + 1)),
    "dtype": lambda layer: layer(torch.zeros(3, 2, INPUT, dtype=torch.float64)),
    "hidden size": lambda layer: layer(torch.zeros(3, 2, INPUT), state(layer, 1, 2, HIDDEN + 1)),
    "hidden batch": lambda layer: layer(torch.zeros(3, 2, INPUT), state(layer, 1, 3, HIDDEN)),
    "hidden of a batch for a single one": lambda layer: layer(torch.zeros(3, INPUT), state(layer, 1, 2, HIDDEN)),
    "hidden of a single one for a batch": lambda layer: layer(torch.zeros(3, 2, INPUT), state(layer, 1, HIDDEN)),
    "hidden dtype": lambda layer: layer(torch.zeros(3, 2, INPUT), state(layer, 1, 2, HIDDEN, dtype=torch.float64)),
}
BAD_CELLS = {
    "three dimensions": lambda cell: cell(torch.zeros(1, 2, INPUT)),
    "input size": lambda cell: cell(torch.zeros(2, INPUT + 1)),
    "hidden batch": lambda cell: cell(torch.zeros(2, INPUT), state(cell, 3, HIDDEN)),
    "hidden size": lambda cell: cell(torch.zeros(2, INPUT), state(cell, 2, HIDDEN + 1)),
    "hidden of three dimensions": lambda cell: cell(torch.zeros(2, INPUT), state(cell, 1, 2, HIDDEN)),
    "dtype": lambda cell: cell(torch.zeros(2, INPUT, dtype=torch.float64)),
}


def state(layer, *shape, dtype=torch.float32):
    one = torch.zeros(*shape, dtype=dtype)
    return (one, one) if isinstance(layer, nn.LSTM | nn.LSTMCell) else one


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", [*implementing("recurrence", "cpu", "torch"), "stack", "auto"])
def test_bad_input_raises_as_torch(backend, kind, case):
    theirs, ours = pair(kind)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        BAD[case](theirs)
    with using(backend), pytest.raises(expected.type):
        BAD[case](ours)


@pytest.mark.parametrize("case", BAD_CELLS)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", [*implementing("recurrent_cell", "cpu", "torch"), "auto"])
def test_bad_input_of_cells_raises_as_torch(backend, kind, case):
    theirs, ours = pair(kind)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        BAD_CELLS[case](theirs)
    with using(backend), pytest.raises(expected.type):
        BAD_CELLS[case](ours)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_no_sequences(backend, kind):
    theirs, ours = pair(kind)
    x = torch.zeros(3, 0, INPUT, device=device(backend))
    with using(backend):
        actual = call(ours.to(device(backend)), "padded", {"input": x})
    for name, value in call(theirs.to(x.device), "padded", {"input": x}).items():
        assert actual[name].shape == value.shape, name


def test_constructor_errors_are_torchs():
    for kind, arguments, options in (
        ("LSTM", (0, 3), {}),
        ("LSTM", (3, 4), {"proj_size": 4}),
        ("GRU", (3, 4), {"proj_size": 2}),
        ("RNN", (3, 4), {"nonlinearity": "selu"}),
        ("LSTM", (3, 4), {"dropout": 2}),
        ("LSTM", (3, 4), {"bias": 1}),
    ):
        with pytest.raises((ValueError, TypeError)) as expected:
            getattr(nn, kind)(*arguments, **options)
        with pytest.raises(expected.type):
            getattr(fastdl.nn, kind)(*arguments, **options)


def test_every_op_is_registered_with_torch():
    for op in (ops.RECURRENCE, ops.RECURRENCE_BACKWARD, ops.RECURRENT_CELL, ops.RECURRENT_CELL_BACKWARD):
        assert hasattr(torch.ops.fastdl, op.name)
