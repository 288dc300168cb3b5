"""Multi-head attention and Transformers: torch.nn's results, gradients, state_dict, masks, hooks and errors."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from suite import backends
from torch import Tensor
from torch.nn import Module

import fastdl

BATCH, LENGTH, KEYS, SIZE, HEADS = 4, 6, 5, 12, 3
BACKENDS = ["auto", *backends("torch", "cpu")]


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding(keys: int) -> Tensor:
    mask = torch.zeros(BATCH, keys, dtype=torch.bool)
    mask[1, 2:] = mask[3, -1:] = True
    return mask


def some(*shape: int) -> Tensor:
    """A mask that leaves something for every query."""
    mask = torch.rand(shape) > 0.6
    mask[..., 0] = False
    return mask


MASKS: dict[str, Any] = {
    "none": lambda length, keys: {},
    "padding": lambda length, keys: {"key_padding_mask": padding(keys)},
    "by position": lambda length, keys: {"attn_mask": some(length, keys)},
    "by head": lambda length, keys: {"attn_mask": some(BATCH * HEADS, length, keys)},
    "both": lambda length, keys: {"attn_mask": some(length, keys), "key_padding_mask": padding(keys)},
    "added": lambda length, keys: {
        "attn_mask": torch.randn(length, keys),
        "key_padding_mask": torch.randn(BATCH, keys),
    },
    "causal": lambda length, keys: {"attn_mask": causal(length)[:, :keys], "is_causal": True},
    "causal and padding": lambda length, keys: {
        "attn_mask": causal(length)[:, :keys],
        "is_causal": True,
        "key_padding_mask": padding(keys),
    },
}


def check(theirs: Module, ours: Module, inputs: list[Tensor], backend: str, **options: Any) -> None:
    """The same outputs and gradients of inputs and parameters."""
    results = []
    for module, name in ((theirs, "torch"), (ours, backend)):
        # what is one tensor in several places stays one
        leaves = {id(t): t.detach().clone().requires_grad_() for t in inputs}
        with fastdl.use_backend(name):
            output = module(*[leaves[id(t)] for t in inputs], **options)
            outputs = [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
            weights = torch.manual_seed(1) and [torch.randn(t.shape) for t in outputs]
            wanted = [*leaves.values(), *module.parameters()]
            loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append([*outputs, *gradients])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, atol=3e-5, rtol=3e-5)


def attention(**options: Any) -> tuple[Module, Module]:
    theirs = torch.nn.MultiheadAttention(SIZE, HEADS, **options)
    for parameter in theirs.parameters():  # biases are zeros at first
        torch.nn.init.normal_(parameter, std=0.3)
    ours = fastdl.nn.MultiheadAttention(SIZE, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("weights", [False, True], ids=["output", "output and weights"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False, "batch_first": True},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "batch_first": True},
        {"kdim": 7, "vdim": 5},
        {"kdim": 7, "vdim": 5, "bias": False, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_torchs(backend, options, masks, weights):
    theirs, ours = attention(**options)
    query = torch.randn(LENGTH, BATCH, SIZE)
    key = torch.randn(LENGTH, BATCH, options.get("kdim", SIZE))
    value = torch.randn(LENGTH, BATCH, options.get("vdim", SIZE))
    inputs = [query, key, value]
    if options.get("batch_first"):
        inputs = [t.transpose(0, 1).contiguous() for t in inputs]
    check(theirs, ours, inputs, backend, need_weights=weights, **MASKS[masks](LENGTH, LENGTH))


@pytest.mark.parametrize("same", ["all", "key and value", "none"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_one_tensor_and_of_several(backend, batch_first, same):
    theirs, ours = attention(batch_first=batch_first)
    query, key = torch.randn(LENGTH, BATCH, SIZE), torch.randn(KEYS, BATCH, SIZE)
    inputs = {"all": [query] * 3, "key and value": [query, key, key], "none": [query, key, torch.randn_like(key)]}[same]
    if batch_first:
        made = {id(t): t.transpose(0, 1).contiguous() for t in inputs}
        inputs = [made[id(t)] for t in inputs]
    for weights in (False, True):
        check(theirs, ours, inputs, backend, need_weights=weights, average_attn_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_without_a_batch(backend, batch_first):
    theirs, ours = attention(batch_first=batch_first)
    inputs = [torch.randn(LENGTH, SIZE), torch.randn(KEYS, SIZE), torch.randn(KEYS, SIZE)]
    options = {"key_padding_mask": padding(KEYS)[1], "attn_mask": some(HEADS, LENGTH, KEYS)}
    for weights in (False, True):
        check(theirs, ours, inputs, backend, need_weights=weights, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_is_torchs(backend):
    theirs, ours = attention()
    x, mask = torch.randn(LENGTH, BATCH, SIZE), torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    mask[2] = True
    for weights in (False, True):
        with fastdl.use_backend(backend):
            torch.testing.assert_close(
                ours(x, x, x, attn_mask=mask, need_weights=weights),
                theirs(x, x, x, attn_mask=mask, need_weights=weights),
                equal_nan=True,
            )


def test_attention_drops_in_training_alone():
    _, ours = attention(dropout=0.5)
    x = torch.randn(LENGTH, BATCH, SIZE)
    for weights in (False, True):
        torch.manual_seed(0)
        first, _ = ours(x, x, x, need_weights=weights)
        torch.manual_seed(0)
        torch.testing.assert_close(ours(x, x, x, need_weights=weights)[0], first, atol=0, rtol=0)
        assert not torch.allclose(first, ours(x, x, x, need_weights=weights)[0])
        ours.eval()
        torch.testing.assert_close(ours(x, x, x, need_weights=weights)[0], ours(x, x, x, need_weights=weights)[0])
        ours.train()


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (AssertionError, {"query": torch.zeros(2, 3, 4, SIZE)}, "query"),
        (AssertionError, {"query": torch.zeros(LENGTH, BATCH, SIZE + 1)}, "embed_dim"),
        (AssertionError, {"key": torch.zeros(KEYS, SIZE)}, "key"),
        (AssertionError, {"value": torch.zeros(KEYS + 1, BATCH, SIZE)}, "value"),
        (AssertionError, {"key_padding_mask": torch.zeros(BATCH, KEYS + 1)}, "key_padding_mask"),
        (AssertionError, {"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.int64)}, "key_padding_mask"),
        (RuntimeError, {"attn_mask": torch.zeros(LENGTH, KEYS + 1)}, "attn_mask"),
        (RuntimeError, {"is_causal": True}, "is_causal"),
    ],
)
def test_attention_refuses_what_does_not_fit(error, arguments, words):
    theirs, ours = attention()
    key = torch.zeros(KEYS, BATCH, SIZE)
    arguments = {"query": torch.zeros(LENGTH, BATCH, SIZE), "key": key, "value": key, **arguments}
    with pytest.raises((AssertionError, RuntimeError)):
        theirs(**arguments)
    with pytest.raises(error, match=words):
        ours(**arguments)


# -------------------------------------------------------------------------------------------------------- Transformers


def like(theirs: Module) -> Module:
    """The same with this package's layers."""
    ours = fastdl.replace_layers(copy.deepcopy(theirs))
    assert all(type(m).__module__.startswith("fastdl.nn") for m in ours.modules() if "Layer" in type(m).__name__)
    return ours


def varied(module: Module) -> Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "plain"


LAYERS = [
    {},
    {"norm_first": True},
    {"batch_first": True, "activation": "gelu"},
    {"norm_first": True, "bias": False, "activation": F.silu},
    {"batch_first": True, "activation": torch.nn.GELU(), "layer_norm_eps": 1e-3},
]


@pytest.mark.parametrize("options", LAYERS, ids=words)
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder_layers_are_torchs(backend, options):
    theirs = varied(torch.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.0, **options))
    x = torch.randn(BATCH, LENGTH, SIZE) if options.get("batch_first") else torch.randn(LENGTH, BATCH, SIZE)
    for masks in (
        {},
        {"src_mask": some(LENGTH, LENGTH), "src_key_padding_mask": padding(LENGTH)},
        {"src_mask": causal(LENGTH), "is_causal": True},
    ):
        check(theirs, like(theirs), [x], backend, **masks)
        with torch.no_grad(), fastdl.use_backend(backend):  # where torch takes its fast path
            expected = copy.deepcopy(theirs).eval()(x, **masks)
            torch.testing.assert_close(like(theirs).eval()(x, **masks), expected, atol=3e-5, rtol=3e-5)


# torch's decoder layer forgets an activation that is a module when it is copied.
@pytest.mark.parametrize("options", LAYERS[:-1], ids=words)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoder_layers_are_torchs(backend, options):
    theirs = varied(torch.nn.TransformerDecoderLayer(SIZE, HEADS, 20, 0.0, **options))
    inputs = [torch.randn(LENGTH, BATCH, SIZE), torch.randn(KEYS, BATCH, SIZE)]
    if options.get("batch_first"):
        inputs = [t.transpose(0, 1).contiguous() for t in inputs]
    for masks in (
        {},
        {"tgt_mask": causal(LENGTH), "tgt_is_causal": True, "memory_key_padding_mask": padding(KEYS)},
        {"memory_mask": some(LENGTH, KEYS), "tgt_key_padding_mask": padding(LENGTH)},
    ):
        check(theirs, like(theirs), inputs, backend, **masks)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_transformers_are_torchs(backend, norm_first):
    theirs = varied(torch.nn.Transformer(SIZE, HEADS, 2, 2, 20, 0.0, batch_first=True, norm_first=norm_first))
    inputs = [torch.randn(BATCH, KEYS, SIZE), torch.randn(BATCH, LENGTH, SIZE)]
    masks = {
        "tgt_mask": causal(LENGTH),
        "src_key_padding_mask": padding(KEYS),
        "memory_key_padding_mask": padding(KEYS),
    }
    check(theirs, like(theirs), inputs, backend, **masks)
    check(theirs, like(theirs), [torch.randn(KEYS, SIZE), torch.randn(LENGTH, SIZE)], backend)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_causal_mask_is_found(kind, monkeypatch):
    seen = []
    encoder = fastdl.nn.TransformerEncoder(fastdl.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.0), 1)
    monkeypatch.setattr(encoder.layers[0], "forward", lambda src, **options: seen.append(options["is_causal"]) or src)
    x = torch.randn(LENGTH, BATCH, SIZE)
    masks = [causal(LENGTH), causal(LENGTH) ^ torch.eye(LENGTH, dtype=torch.bool), some(LENGTH, LENGTH)]
    for mask in masks:
        encoder(x, mask if kind == "bool" else torch.zeros(LENGTH, LENGTH).masked_fill(mask, -torch.inf))
    encoder(x)
    encoder(x, masks[2], is_causal=True)
    assert seen == [True, False, False, False, True]


def test_constructors_draw_torchs_parameters():
    for name in ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"):
        torch.manual_seed(0)
        theirs = getattr(torch.nn, name)(SIZE, HEADS)
        torch.manual_seed(0)
        ours = getattr(fastdl.nn, name)(SIZE, HEADS)
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), atol=0, rtol=0)
        assert not any(type(m).__module__.startswith("torch.nn.modules.normalization") for m in ours.modules())
    torch.manual_seed(0)
    theirs = torch.nn.Transformer(SIZE, HEADS, 1, 1, 20)
    torch.manual_seed(0)
    ours = fastdl.nn.Transformer(SIZE, HEADS, 1, 1, 20)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), atol=0, rtol=0)
    assert type(ours.decoder.layers[0].multihead_attn) is fastdl.nn.MultiheadAttention
    custom = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(SIZE, HEADS, 20), 1)
    kept = fastdl.nn.Transformer(SIZE, HEADS, 1, 1, 20, custom_encoder=custom)
    assert type(kept.encoder) is torch.nn.TransformerEncoder and type(kept.encoder.layers[0].linear1) is torch.nn.Linear


def test_hooks_and_other_layers_inside_are_called():
    layer = fastdl.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.0)
    called = []
    for name in ("linear1", "norm1", "dropout1"):
        getattr(layer, name).register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    x = torch.randn(LENGTH, BATCH, SIZE)
    plain = copy.deepcopy(layer)
    for name in ("linear1", "norm1", "dropout1"):
        getattr(plain, name)._forward_hooks.clear()
    torch.testing.assert_close(layer(x), plain(x))
    assert called == ["dropout1", "norm1", "linear1"]
    layer.norm2 = torch.nn.Identity()
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    layer = fastdl.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.0, norm_first=True)
    x, mask = torch.randn(LENGTH, BATCH, SIZE), causal(LENGTH)
    encoder = fastdl.nn.TransformerEncoder(layer, 2)
    with fastdl.use_backend(backend):
        expected = encoder(x, mask)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), expected)


def test_dropout_of_a_layer_follows_torchs_generator():
    layer = fastdl.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.5)
    x = torch.randn(LENGTH, BATCH, SIZE)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(layer(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=0, rtol=0)
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    theirs = varied(torch.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.0))
    ours, x = like(theirs), torch.randn(LENGTH, BATCH, SIZE)
    with torch.autocast("cpu", dtype):
        a, b = theirs(x), ours(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(b, a, atol=0.05, rtol=0.05)


def test_replacement_is_undone():
    theirs = torch.nn.Transformer(SIZE, HEADS, 1, 1, 20)
    classes = [type(m) for m in theirs.modules()]
    fastdl.replace_layers(theirs)
    left = {type(m).__name__ for m in theirs.modules() if type(m).__module__.startswith("torch")}
    assert left == {"Transformer", "TransformerDecoder", "ModuleList", "NonDynamicallyQuantizableLinear"}
    fastdl.restore_layers(theirs)
    assert [type(m) for m in theirs.modules()] == classes


def test_explain_names_the_kernels_of_a_layer():
    layer = fastdl.nn.TransformerEncoderLayer(SIZE, HEADS, 20, 0.0)
    ops = {row.op for row in itertools.chain(fastdl.explain(layer, torch.randn(LENGTH, BATCH, SIZE)))}
    assert {"attention", "layer_norm", "linear"} <= ops
