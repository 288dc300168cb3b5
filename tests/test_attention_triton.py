"""The Triton kernels' blocks: chosen as planned, skipped where nobody sees them, and right, with blocks so small that
tests have many of each kind."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from suite import FLOATING, backends, compare, device_of
from test_attention import SEES, check, formula, make, offsets, ours, with_dropout

import fastdl
from fastdl.functional import varlen_attention
from fastdl.ops import attention as ops

kernels = pytest.importorskip("fastdl.kernels.attention")
from fastdl.kernels.common import A100, B200, H100, INTERPRETER, MI300  # noqa: E402  after it is known to be there

TRITON = backends("triton")


@pytest.fixture(params=[False, True], ids=["together", "apart"])
def small_blocks(request, monkeypatch):
    """Every launch has them, and takes two heads of keys at a time."""
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Tile(16, 32, 4, 1, request.param))
    monkeypatch.setattr(kernels, "L2_BYTES", 2 * 100 * 2 * 16 * 4)


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("backend", TRITON)
def test_many_blocks(small_blocks, backend, sees):
    check(backend, sees, make((1, 3), 70, 100, 16))
    check(backend, sees, make((1, 1), 100, 40, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [(40, 0), (0, 40), (20, 20), (3, 70)], ids=str)
@pytest.mark.parametrize("backend", TRITON)
def test_many_blocks_in_a_window(small_blocks, backend, window):
    for queries, keys in ((100, 130), (130, 60)):
        compare(
            backend,
            lambda query, key, value: ours(query, key, value, window_size=window),
            lambda query, key, value: formula(query, key, value, left=window[0], right=window[1])[0],
            make((1, 1), queries, keys, 16),
            multiple=4,
        )


@pytest.mark.parametrize("backend", TRITON)
def test_many_blocks_of_packed_sequences_and_grouped_heads(small_blocks, backend):
    lengths, key_lengths = [20, 0, 65], [50, 3, 40]
    inputs = {
        "query": torch.randn(sum(lengths), 6, 16),
        "key": torch.randn(sum(key_lengths), 2, 16),
        "value": torch.randn(sum(key_lengths), 2, 9),
    }

    def packed(query, key, value):
        options = {"enable_gqa": True, "is_causal": True, "window_size": (30, -1)}
        sequences = [offsets(n, query.device) for n in (lengths, key_lengths)]
        return varlen_attention(query, key, value, *sequences, max(lengths), max(key_lengths), **options)

    def one_by_one(query, key, value):
        parts = [t.split(n) for t, n in zip((query, key, value), (lengths, key_lengths, key_lengths), strict=True)]
        heads = [[t.transpose(0, 1) for t in some] for some in zip(*parts, strict=True)]
        outputs = [formula(*some, left=30, right=0, bottom_right=True, gqa=3)[0] for some in heads]
        return torch.cat(outputs, 1).transpose(0, 1)

    compare(backend, packed, one_by_one, inputs, multiple=4)


@pytest.mark.parametrize("backend", TRITON)
def test_many_blocks_with_dropout(small_blocks, backend):
    shape, p = (1, 2, 40, 70), 0.4
    torch.manual_seed(1)
    factors = ops.dropout_factors(torch.randint(0, 2**63 - 1, ()), p, 0, shape, torch.float64)
    inputs = [t.double().requires_grad_() for t in make(shape[:2], 40, 70, 16).values()]
    expected = ((inputs[0] @ inputs[1].mT * 0.25).softmax(-1) * factors) @ inputs[2]
    mine = [t.detach().to(device_of(backend)).requires_grad_() for t in inputs]
    actual = with_dropout(backend, mine, p)
    torch.testing.assert_close(actual.cpu(), expected)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, mine, grad.to(actual.device))
    torch.testing.assert_close([g.cpu() for g in gradients], list(torch.autograd.grad(expected, inputs, grad)))


@pytest.mark.parametrize("backend", TRITON)
def test_blocks_that_nobody_sees_are_not_read(small_blocks, backend):
    """NaN there would reach the output, and the gradients, by way of 0 * NaN."""
    inputs = [t.to(device_of(backend)) for t in make((1, 1), 100, 130, 16).values()]
    query, key, value = inputs
    key[:, :, 100:], value[:, :, 100:] = math.nan, math.nan
    tensors = [t.requires_grad_() for t in inputs]
    with fastdl.use_backend(backend):
        output = ours(*tensors, is_causal=True)[:, :, :96]
        assert output.isfinite().all()
        assert torch.autograd.grad(output.sum(), query)[0][:, :, :96].isfinite().all()
        windowed = ours(*tensors, window_size=(20, -1), is_causal=True)
        assert windowed[:, :, :96].isfinite().all()


SIZES = (16, 32, 64, 128, 256)
DEVICES = (A100, H100, B200, MI300, INTERPRETER)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: str(d.capability))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_choices(dtype, device):
    """What a program keeps fits into shared memory: its own rows, and each stage those that it goes over."""
    flags = False, True
    sizes = itertools.product(kernels.DIRECTIONS, SIZES, flags, flags, (1, 100, 4096), (1, 12, 512))
    for direction, size, tf32, plain, length, heads in sizes:
        kind = kernels.kind_of(dtype, tf32, size, plain)
        tile = kernels.choose(direction, size, dtype, kind, plain, length, heads, device)
        own, other = (tile.keys, tile.queries) if direction == "key gradient" else (tile.queries, tile.keys)
        kept = own * (1 if direction == "forward" else 2) + 2 * other * tile.stages
        if kind in ("half", "tf32") and device.capability:
            assert kept * size * dtype.itemsize < device.shared_memory
        assert tile.queries % 16 == 0 and tile.keys % 16 == 0 and tile.warps in (4, 8, 16)
        assert kind == "tf32" or not (tf32 and dtype == torch.float32 and size <= 64)


def test_short_queries_fill_the_device():
    options = 128, torch.bfloat16, "half", True
    long, short = [kernels.choose("forward", *options, length, 64, H100) for length in (4096, 128)]
    assert long.queries == 128 and short.queries == 64
    assert long.queries // long.warps == short.queries // short.warps


def test_descriptors_take_what_they_can_describe():
    x = torch.randn(2, 3, 40, 64, dtype=torch.bfloat16)
    inside = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert all(kernels.can_be_described(t, H100) for t in (x, inside, x[..., 8:40], x[:, :, ::2], x[:1, :1]))
    unaligned = torch.randn(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    others = x[..., ::2], x.mT, unaligned, x[:, :1].expand(x.shape), x[..., :40].contiguous()[..., 1:33]
    assert not any(kernels.can_be_described(t, H100) for t in others)
    assert not kernels.can_be_described(x, A100) and not kernels.can_be_described(x, MI300)


def test_heads_run_side_by_side_as_far_as_their_keys_fit():
    def together(length, heads, key_heads):
        query = torch.empty(4, heads, length, 128, dtype=torch.bfloat16, device="meta")
        key, logsumexp = query[:, :key_heads], torch.empty(4, heads, length, device="meta")
        options = kernels.Options(length, length, 0.1, -1, 0, False, 0.0, 0, 1.0, False)
        tensors = query, key, key, None, None, None, None, None, query, logsumexp
        return kernels.forward_launch(*tensors, options, device=H100).arguments["together"]

    assert together(128, 16, 16) == 4 * 16
    assert together(4096, 16, 16) == kernels.L2_BYTES // (4096 * 2 * 128 * 2) == 16
    assert together(4096, 16, 4) == 4 * 16
    assert together(10**6, 16, 16) == 1
