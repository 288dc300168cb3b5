"""Attention: every backend against float64 and torch, and every promise of its API."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suite import FLOATING, assert_repeats, backends, compare, device_of, name_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdl
from fastdl import accuracy, dispatch
from fastdl.functional import scaled_dot_product_attention, varlen_attention
from fastdl.ops import attention as ops

KERNELS = [name for name in ("cpu", "triton", "cuda") if name in dispatch.OPS["attention"].support]
BACKENDS = backends("torch", *KERNELS)
NATIVE = backends(*KERNELS) if KERNELS else []
NAMES = ("query", "key", "value")


def theirs(query, key, value, attn_mask=None, **options):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)


def ours(query, key, value, attn_mask=None, **options):
    return scaled_dot_product_attention(query, key, value, attn_mask, **options)


def pair(**options):
    """Ours and theirs with these options."""
    return [
        lambda query, key, value, attn_mask=None, f=f: f(query, key, value, attn_mask, **options)
        for f in (ours, theirs)
    ]


def make(batch=(2, 3), queries=9, keys=11, size=8, value_size=None, dtype=torch.float32, key_heads=None):
    key_batch = batch if key_heads is None else (*batch[:-1], key_heads)
    shapes = (*batch, queries, size), (*key_batch, keys, size), (*key_batch, keys, value_size or size)
    return {name: torch.randn(shape).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}


def skip_dtype(backend, dtype):
    if backend == "torch" or dtype in dispatch.OPS["attention"].support[backend].dtypes:
        return False
    with fastdl.use_backend(backend), pytest.raises(fastdl.UnsupportedError, match=name_of(dtype)):
        ours(*[t.to(device_of(backend)) for t in make(dtype=dtype).values()])
    return True


def formula(query, key, value, mask=None, slopes=None, left=-1, right=-1, bottom_right=False, scale=None, gqa=1):
    """What torch has no function for, by its operators; with the logsumexp."""
    key, value = [t.repeat_interleave(gqa, -3) for t in (key, value)]
    z = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    j = torch.arange(key.shape[-2])
    p = torch.arange(query.shape[-2])[:, None] + (key.shape[-2] - query.shape[-2] if bottom_right else 0)
    if slopes is not None:
        z = z - slopes[..., None, None] * (p - j).abs().to(z.dtype)
    if mask is not None:
        z = z + mask
    seen = torch.ones(z.shape[-2:], dtype=torch.bool)
    if left >= 0:
        seen &= j >= p - left
    if right >= 0:
        seen &= j <= p + right
    z = z.masked_fill(~seen, -math.inf)
    return torch._safe_softmax(z, -1) @ value, z.logsumexp(-1)


# ------------------------------------------------------------------------------------------------------- numerics

SEES = ["full", "causal", "boolean", "float", "row mask"]


def masked(sees, inputs, dtype):
    """The inputs with a mask, and the options."""
    lengths = inputs["query"].shape[-2], inputs["key"].shape[-2]
    batch = inputs["query"].shape[:-2]
    if sees == "boolean":
        mask = torch.rand(*batch, *lengths) > 0.4
        mask[..., 0, :] = False
        return inputs | {"attn_mask": mask}, {}
    if sees == "float":
        mask = torch.randn(1, *batch[1:], *lengths).masked_fill(torch.rand(lengths) > 0.7, -math.inf)
        return inputs | {"attn_mask": mask.to(dtype)}, {}
    if sees == "row mask":
        return inputs | {"attn_mask": torch.randn(batch[0], 1, 1, lengths[1]).to(dtype)}, {}
    return inputs, {"is_causal": sees == "causal"}


def gradients_of(inputs, mask=None, is_causal=False):
    """Those whose gradient is not 0 but for rounding.

    Value alone where no query sees two keys that differ, in score and value; no mask that is the same for all keys.
    """
    seen = torch.ones(inputs["query"].shape[-2], inputs["key"].shape[-2], dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    equal = any(inputs[name].stride(-2) == 0 for name in ("key", "value"))
    if seen.numel() == 0 or seen.sum(-1).max() <= 1 or equal:
        return ["value"]
    return [name for name, t in inputs.items() if name in NAMES or (t.is_floating_point() and t.shape[-1] > 1)]


def check(backend, sees, inputs, grad_output=None, **options):
    """Compares; a boolean mask must stay boolean in the comparison's float64."""
    inputs, more = masked(sees, inputs, inputs["query"].dtype)
    mask = inputs.get("attn_mask")
    needs = gradients_of(inputs, mask, **more)
    both = pair(**options, **more)
    if mask is not None and mask.dtype == torch.bool:
        del inputs["attn_mask"]
        both = [lambda query, key, value, f=f: f(query, key, value, mask.to(query.device)) for f in both]
    return compare(backend, *both, inputs, grad_output, needs, multiple=4)


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend, sees, dtype):
    if not skip_dtype(backend, dtype):
        check(backend, sees, make(queries=19, keys=37, size=24, value_size=17, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("sees", ["full", "causal", "float"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks(backend, sees, dtype):
    """Longer than a block of queries and one of keys, in every direction."""
    if not skip_dtype(backend, dtype):
        check(backend, sees, make(batch=(1, 1), queries=150, keys=300, size=16, dtype=dtype))
        check(backend, sees, make(batch=(1, 1), queries=260, keys=70, size=16, dtype=dtype))


@pytest.mark.parametrize("size", [1, 2, 3, 15, 33, 64, 96, 100, 128, 193, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dimensions(backend, size):
    check(backend, "causal", make(batch=(1, 2), queries=5, keys=6, size=size))
    check(backend, "causal", make(batch=(1, 2), queries=5, keys=6, size=size, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", NATIVE)
def test_a_head_dimension_that_is_too_large(backend):
    inputs = [t.to(device_of(backend)) for t in make(size=257).values()]
    with fastdl.use_backend(backend), pytest.raises(fastdl.UnsupportedError, match="query has head dimension 257"):
        ours(*inputs)
    inputs = [t.to(device_of(backend)) for t in make(size=8, value_size=300).values()]
    with fastdl.use_backend(backend), pytest.raises(fastdl.UnsupportedError, match="value has head dimension 300"):
        ours(*inputs)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (7, 20), (20, 7)], ids=str)
@pytest.mark.parametrize("sees", ["full", "causal", "boolean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unequal_lengths(backend, sees, lengths):
    check(backend, sees, make(queries=lengths[0], keys=lengths[1]))


@pytest.mark.parametrize("backend", NATIVE)
def test_one_key_has_no_gradient_but_its_values(backend):
    inputs = [t.to(device_of(backend)).requires_grad_() for t in make(queries=20, keys=1).values()]
    with fastdl.use_backend(backend):
        gradients = torch.autograd.grad(ours(*inputs).sum(), inputs)
    assert all(g.abs().max() < 1e-5 for g in gradients[:2]) and torch.equal(
        gradients[2], torch.full_like(inputs[2], 20)
    )


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3), (2, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_dimensions(backend, batch):
    compare(backend, *pair(is_causal=True), make(batch), multiple=4)


@pytest.mark.parametrize(
    "shape", [(9, 11), (1, 11), (9, 1), (3, 9, 11), (2, 1, 9, 11), (2, 3, 1, 1), (1, 3, 9, 1)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_broadcast(backend, shape):
    inputs = make() | {"attn_mask": torch.randn(shape)}
    compare(backend, *pair(), inputs, needs=gradients_of(inputs), multiple=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_float32(backend, dtype):
    inputs = make(dtype=dtype) | {"attn_mask": torch.randn(9, 11)}
    compare(backend, *pair(), inputs, needs=NAMES, multiple=4)
    # The gradient of the mask is made of the output, which has the dtype of query: so has its error.
    tensors = [t.to(device_of(backend)).requires_grad_() for t in inputs.values()]
    exact = [t.double().requires_grad_() for t in inputs.values()]
    with fastdl.use_backend(backend):
        (gradient,) = torch.autograd.grad(ours(*tensors).sum(), tensors[3])
    (expected,) = torch.autograd.grad(theirs(*exact).sum(), exact[3])
    assert gradient.dtype == torch.float32
    assert accuracy.error(gradient.cpu(), expected) <= max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_more_batch_dimensions(backend):
    for shape in [(9, 11), (3, 9, 11), (2, 1, 9, 11), (2, 1, 1, 9, 11)]:
        compare(backend, *pair(), make((2, 2, 3)) | {"attn_mask": torch.randn(shape)}, multiple=4)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend, key_heads):
    inputs = make((2, 4), key_heads=key_heads)
    compare(backend, *pair(enable_gqa=True), inputs, multiple=4)
    inputs = make((4,), key_heads=key_heads)
    compare(backend, *pair(enable_gqa=True, is_causal=True), inputs, multiple=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_broadcast(backend):
    inputs = make() | {"key": torch.randn(1, 3, 11, 8), "value": torch.randn(2, 1, 11, 8)}
    compare(backend, *pair(), inputs, multiple=4)
    inputs = make((2, 4), key_heads=2) | {"value": torch.randn(2, 4, 11, 8)}
    compare(backend, *pair(enable_gqa=True), inputs, multiple=4)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.7, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, scale):
    compare(backend, *pair(scale=scale), make(), multiple=4)


LAYOUTS = {
    "heads inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda t: t.mT.contiguous().mT,
    "narrowed": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "every second row": lambda t: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "expanded rows": lambda t: t[:, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_inputs(backend, layout):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {name: LAYOUTS[layout](tensor) for name, tensor in make(dtype=dtype).items()}
        compare(backend, *pair(is_causal=True), inputs, needs=gradients_of(inputs), multiple=4)
    mask = LAYOUTS[layout](torch.randn(2, 3, 9, 11))
    compare(backend, *pair(), make() | {"attn_mask": mask}, multiple=4)


@pytest.mark.parametrize("backend", NATIVE)
def test_output_and_gradients_are_laid_out_as_the_inputs(backend):
    for layout in (lambda t: t, LAYOUTS["heads inside"]):
        inputs = [layout(t.to(device_of(backend))).requires_grad_() for t in make().values()]
        with fastdl.use_backend(backend):
            output = ours(*inputs)
        gradients = torch.autograd.grad(output.sum(), inputs)
        expected = F.scaled_dot_product_attention(*inputs)
        assert output.stride() == expected.stride()
        assert [g.stride() for g in gradients] == [t.stride() for t in inputs]


def test_projections_side_by_side():
    """query, key and value as views of one tensor, as a self-attention layer makes them."""
    x = torch.randn(2, 7, 3, 4, 8)
    for backend in ("cpu", "torch"):
        if not dispatch.why_unavailable(backend, "cpu"):
            q, k, v = x.unbind(2)
            inputs = {name: t.transpose(1, 2) for name, t in zip(NAMES, (q, k, v), strict=True)}
            compare(backend, *pair(is_causal=True), inputs, multiple=4)


GRADIENTS = {
    "expanded scalar": lambda y: torch.ones((), dtype=torch.float32).expand(y.shape),
    "expanded row": lambda y: torch.randn(1, y.shape[-1]).expand(y.shape),
    "transposed": lambda y: torch.randn(*y.shape[:2], y.shape[3], y.shape[2]).mT,
    "heads inside": lambda y: torch.randn(y.shape[0], y.shape[2], y.shape[1], y.shape[3]).transpose(1, 2),
    "narrowed": lambda y: torch.randn(*y.shape[:-1], y.shape[-1] + 3)[..., 2:-1],
    "unaligned": lambda y: torch.randn(y.numel() + 1)[1:].view(y.shape),
    "zero": lambda y: torch.zeros(y.shape),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adversarial_gradients(backend, gradient):
    compare(backend, *pair(is_causal=True), make(), GRADIENTS[gradient], multiple=4)
    compare(backend, *pair(), make() | {"attn_mask": torch.randn(9, 11)}, GRADIENTS[gradient], multiple=4)


FOUR = (*NAMES, "attn_mask")


@pytest.mark.parametrize("which", [c for r in range(5) for c in itertools.combinations(FOUR, r)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_combination_of_needed_gradients(backend, which):
    inputs = make() | {"attn_mask": torch.randn(3, 9, 11)}
    compare(backend, *pair(), inputs, needs=which, multiple=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    for factor in (30, 3e3, 1e10):
        inputs = make(queries=20, keys=30)
        inputs["query"] *= factor
        compare(backend, *pair(is_causal=True), inputs, needs=["value"], multiple=4)
    half = make(queries=20, keys=30, dtype=torch.float16)
    half["query"] *= 2e3
    compare(backend, *pair(), half, needs=["value"], multiple=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing(backend, dtype):
    mask = torch.rand(9, 11) > 0.5
    mask[2], mask[8] = False, False
    for given_mask in (mask, torch.zeros(9, 11).masked_fill(~mask, -math.inf).to(dtype), torch.zeros_like(mask)):
        inputs = make(dtype=dtype)
        both = [
            lambda query, key, value, f=f, m=given_mask: f(
                query, key, value, (m if m.dtype == torch.bool else m.to(query.dtype)).to(query.device)
            )
            for f in (ours, theirs)
        ]
        results = compare(backend, *both, inputs, multiple=4)
        assert not results["output"][:, :, 2].any() and not results["gradient of query"][:, :, 8].any()
    device = device_of(backend)
    with fastdl.use_backend(backend):
        inputs = [t.to(device) for t in make(dtype=dtype).values()]
        _, logsumexp = ours(*inputs, mask.to(device), return_logsumexp=True)
    assert torch.equal(logsumexp == -math.inf, (~mask.any(1)).to(device).expand(2, 3, 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_the_lowest_number(backend):
    """A row masked by finfo.min, as transformers do it, is a mean, not zeros."""
    mask = torch.zeros(9, 11)
    mask[:, 5:] = torch.finfo(torch.float32).min
    mask[4] = torch.finfo(torch.float32).min
    inputs = make()
    device = device_of(backend)
    expected = theirs(*inputs.values(), mask)
    with fastdl.use_backend(backend):
        actual = ours(*[t.to(device) for t in inputs.values()], mask.to(device))
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("backend", NATIVE)
def test_special_values_spread_as_in_torch(backend):
    device = device_of(backend)
    for name, value in itertools.product(NAMES, (math.nan, math.inf, -math.inf)):
        inputs = make()
        inputs[name][0, 1, 3, 2] = value
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernel loses some of them
            expected = theirs(*inputs.values())
        with fastdl.use_backend(backend):
            actual = ours(*[t.to(device) for t in inputs.values()])
        torch.testing.assert_close(actual.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_sizes(backend, shape):
    batch, heads, queries, keys, size = shape
    compare(backend, *pair(scale=1.0), make((batch, heads), queries, keys, size, 7))
    compare(backend, *pair(scale=1.0, is_causal=True), make((batch, heads), queries, keys, size, 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_number_of_threads_and_one_agree(backend):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            check(backend, "causal", make((1, 5), 70, 70, 16))
            check(backend, "causal", make((1, 1), 70, 600, 16))  # fewer heads than threads
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", NATIVE)
def test_repeats_are_bit_equal(backend):
    inputs = make((2, 4), 70, 90, 24, key_heads=2) | {"attn_mask": torch.randn(70, 90)}
    assert_repeats(backend, pair(enable_gqa=True)[0], inputs)


# rowsum(O dO) is made of the rounded output, which tells in sums of one or two; gradients are 0 where one key is seen.
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 80), st.integers(4, 300), st.integers(3, 70))


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=shapes, sees=st.sampled_from(SEES), dtype=st.sampled_from(FLOATING), density=st.floats(0.4, 1), data=st.data()
)
def test_any_shape_and_mask_on_the_cpu(shape, sees, dtype, density, data):
    if "cpu" not in KERNELS or dispatch.why_unavailable("cpu", "cpu"):
        pytest.skip("no compiled CPU kernels")
    torch.manual_seed(0)  # an example means the same numbers each time
    batch, heads, queries, keys, size = shape
    batch = max(batch, 64 // (heads * queries), 400 // (heads * queries * size))  # of few numbers the error is luck
    inputs = make((batch, heads), queries, keys, size, dtype=dtype)
    layouts = data.draw(st.tuples(*[st.sampled_from([*LAYOUTS, None])] * 3))
    for name, layout in zip(NAMES, layouts, strict=True):
        inputs[name] = inputs[name] if layout is None else LAYOUTS[layout](inputs[name])
    options = {"is_causal": True} if sees == "causal" else {}
    mask = None
    if sees not in ("full", "causal"):
        ones = data.draw(st.tuples(*[st.booleans()] * 4))
        sizes = [1 if one else n for one, n in zip(ones, (batch, heads, queries, keys), strict=True)]
        mask = torch.rand(sizes) < density
        if sees == "float":
            inputs["attn_mask"] = torch.randn(sizes).masked_fill(~mask, -math.inf).to(dtype)
        elif sees == "row mask":
            inputs["attn_mask"] = torch.randn(sizes).to(dtype)
        else:
            options["attn_mask"] = mask
    needs = gradients_of(inputs, inputs.get("attn_mask", mask), sees == "causal")
    if dtype.itemsize == 2 and "attn_mask" in needs:  # for it torch takes another kernel, which rounds nothing between
        needs.remove("attn_mask")
    compare("cpu", *pair_of(options), inputs, needs=needs, multiple=4)


def pair_of(options):
    options = dict(options)
    mask = options.pop("attn_mask", None)
    return [
        lambda query, key, value, attn_mask=None, f=f: f(
            query, key, value, mask if attn_mask is None else attn_mask, **options
        )
        for f in (ours, theirs)
    ]


@pytest.mark.skipif(bool(dispatch.why_unavailable("cpu", "cpu")), reason="no compiled CPU kernels")
@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
def test_every_instruction_set_of_this_processor(dtype):
    cpu = dispatch.native().cpu
    chosen = cpu.isa()
    try:
        for isa in cpu.available():
            cpu.use(isa)
            for sees in SEES:
                check("cpu", sees, make((1, 2), 31, 70, 33, 20, dtype=dtype))
            check("cpu", "causal", make((1, 1), 150, 300, 40, dtype=dtype))
    finally:
        cpu.use(chosen)


# ------------------------------------------------------------------------------------------------- beyond torch's own

WINDOWS = [(-1, -1), (3, -1), (-1, 2), (3, 0), (0, 0), (2, 4), (100, 100)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window(backend, window):
    for queries, keys in ((9, 11), (20, 7), (70, 300)):
        compare(
            backend,
            lambda query, key, value: ours(query, key, value, window_size=window, return_logsumexp=True)[0],
            lambda query, key, value: formula(query, key, value, left=window[0], right=window[1])[0],
            make((1, 2), queries, keys),
            needs=["value"] if window == (0, 0) else None,
            multiple=4,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_with_causality_and_mask(backend):
    mask = torch.randn(9, 11)
    compare(
        backend,
        lambda query, key, value: ours(query, key, value, is_causal=True, window_size=(4, 4)),
        lambda query, key, value: formula(query, key, value, left=4, right=0)[0],
        make(),
        multiple=4,
    )
    compare(
        backend,
        lambda query, key, value, attn_mask: ours(query, key, value, attn_mask, window_size=(4, 4)),
        lambda query, key, value, attn_mask: formula(query, key, value, attn_mask, left=4, right=4)[0],
        make() | {"attn_mask": mask},
        multiple=4,
    )


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi(backend, shape):
    slopes = torch.rand(shape)
    for dtype in (torch.float32, torch.bfloat16):
        compare(
            backend,
            lambda query, key, value: ours(query, key, value, is_causal=True, alibi_slopes=slopes.to(query.device)),
            lambda query, key, value: formula(query, key, value, slopes=slopes.to(query.device, query.dtype), right=0)[
                0
            ],
            make(dtype=dtype),
            multiple=4,
        )


@pytest.mark.parametrize("dtype", FLOATING, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp_and_its_gradient(backend, dtype):
    if skip_dtype(backend, dtype):
        return
    inputs = make(dtype=dtype)
    exact = [t.double().requires_grad_() for t in inputs.values()]
    expected = formula(*exact, right=0)
    device = device_of(backend)
    actual_inputs = [t.to(device).requires_grad_() for t in inputs.values()]
    with fastdl.use_backend(backend):
        actual = ours(*actual_inputs, is_causal=True, return_logsumexp=True)
        gradients = torch.autograd.grad(actual[0].double().sum() + actual[1].sin().sum(), actual_inputs)
        alone = torch.autograd.grad(ours(*actual_inputs, return_logsumexp=True)[1].sum(), actual_inputs[:2])
    assert actual[1].dtype == ops.compute_dtype(inputs["query"])
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual[1].cpu().double(), expected[1], rtol=tolerance, atol=tolerance)
    of_exact = torch.autograd.grad(expected[0].sum() + expected[1].sin().sum(), exact)
    for ours_, exact_ in zip(gradients, of_exact, strict=True):
        assert accuracy.error(ours_.cpu(), exact_) < 4 * torch.finfo(dtype).eps
    of_exact = torch.autograd.grad(formula(*exact)[1].sum(), exact[:2])
    for ours_, exact_ in zip(alone, of_exact, strict=True):
        assert accuracy.error(ours_.cpu(), exact_) < 4 * torch.finfo(dtype).eps


LENGTHS = [([5, 3, 8], [5, 3, 8]), ([1, 4], [7, 2]), ([0, 6, 0, 2], [3, 0, 0, 9]), ([40], [300])]


def offsets(lengths, device="cpu", dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype, device=device)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (2, 1)}, {"alibi": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend, options, lengths):
    heads, key_heads = 4, 2
    inputs = {
        "query": torch.randn(sum(lengths[0]), heads, 8),
        "key": torch.randn(sum(lengths[1]), key_heads, 8),
        "value": torch.randn(sum(lengths[1]), key_heads, 6),
    }
    slopes = torch.rand(len(lengths[0]), heads) if options.get("alibi") else None
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("is_causal") else right
    given_options = {name: value for name, value in options.items() if name != "alibi"}

    def packed(query, key, value):
        return varlen_attention(
            query,
            key,
            value,
            offsets(lengths[0], query.device, torch.int32),
            offsets(lengths[1], query.device),
            alibi_slopes=None if slopes is None else slopes.to(query.device),
            enable_gqa=True,
            **given_options,
        )

    def one_by_one(query, key, value):
        outputs = []
        parts = [t.split(n) for t, n in zip((query, key, value), (*lengths, lengths[1]), strict=True)]
        for b, some in enumerate(zip(*parts, strict=True)):
            q, k, v = [t.transpose(0, 1) for t in some]
            slope = None if slopes is None else slopes[b].to(q.device, q.dtype)
            outputs.append(formula(q, k, v, None, slope, left, right, True, gqa=2)[0].transpose(0, 1))
        return torch.cat(outputs)

    compare(backend, packed, one_by_one, inputs, multiple=4)
    compare(backend, packed, one_by_one, {n: t.bfloat16() for n, t in inputs.items()}, multiple=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logsumexp_of_packed_sequences(backend):
    device = device_of(backend)
    q, k, v = [torch.randn(9, 2, 8) for _ in range(3)]
    with fastdl.use_backend(backend):
        output, logsumexp = varlen_attention(
            *[t.to(device) for t in (q, k, v)], offsets([4, 5], device), return_logsumexp=True
        )
    assert output.shape == (9, 2, 8) and logsumexp.shape == (9, 2)
    expected = formula(*[t[4:].transpose(0, 1) for t in (q, k, v)])[1].t()
    torch.testing.assert_close(logsumexp[4:].cpu(), expected)


# ------------------------------------------------------------------------------------------------------------ dropout


def with_dropout(backend, inputs, p=0.3, seed=1, **options):
    torch.manual_seed(seed)
    with fastdl.use_backend(backend):
        return ours(*[t.to(device_of(backend)) for t in inputs], dropout_p=p, **options)


def kept(backend, p, seed=1, shape=(2, 3, 64, 80), **options):
    """What dropout leaves of each probability, as factors: values that are one-hot show them."""
    zeros = torch.zeros(*shape[:3], 8), torch.zeros(*shape[:2], shape[3], 8)
    value = torch.eye(shape[3]).expand(*shape[:2], -1, -1)
    return with_dropout(backend, (*zeros, value), p, seed, **options).cpu() * shape[3]


@pytest.mark.parametrize("backend", NATIVE)
def test_dropout_statistics(backend):
    for p in (0.1, 0.5):
        factors = kept(backend, p, shape=(2, 2, 64, 200))
        close = torch.isclose(factors, torch.tensor(1 / (1 - p)), rtol=1e-4)
        assert (close | (factors == 0)).all()
        n = factors.numel()
        assert abs(close.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        for dim in range(4):  # no pattern along any dimension
            a, b = close.double() - (1 - p), close.roll(1, dim).double() - (1 - p)
            assert abs((a * b).mean()) < 5 * p * (1 - p) / math.sqrt(n)


@pytest.mark.parametrize("backend", NATIVE)
def test_dropout_is_that_of_the_reference_and_of_the_seed(backend):
    shape = 2, 2, 70, 200
    torch.manual_seed(5)
    seed = torch.randint(0, 2**63 - 1, ())
    expected = ops.dropout_factors(seed, 0.3, 0, shape, torch.float32)
    query, key = torch.zeros(*shape[:3], 8), torch.zeros(*shape[:2], shape[3], 8)
    for part in range(0, shape[3], 100):
        value = torch.eye(shape[3])[:, part : part + 100].expand(*shape[:2], -1, -1)
        actual = with_dropout(backend, (query, key, value), 0.3, seed=5, return_logsumexp=True)[0].cpu() * shape[3]
        torch.testing.assert_close(actual, expected[..., part : part + 100], rtol=1e-4, atol=1e-5)
    assert torch.equal(kept(backend, 0.3, 4), kept(backend, 0.3, 4))
    assert not torch.equal(kept(backend, 0.3, 4), kept(backend, 0.3, 5))
    assert not kept(backend, 1.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend", NATIVE)
def test_gradients_with_dropout(backend, dtype):
    inputs = list(make(queries=30, keys=70, dtype=dtype).values())
    device, p = device_of(backend), 0.4
    torch.manual_seed(1)
    factors = ops.dropout_factors(torch.randint(0, 2**63 - 1, ()), p, 0, (2, 3, 30, 70), torch.float64)
    exact = [t.double().requires_grad_() for t in inputs]
    weights = (exact[0] @ exact[1].mT * 8**-0.5).softmax(-1)
    expected = (weights * factors) @ exact[2]
    mine = [t.to(device).requires_grad_() for t in inputs]
    actual = with_dropout(backend, mine, p)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(actual, mine, grad.to(device, dtype))
    results = zip((actual, *gradients), (expected, *torch.autograd.grad(expected, exact, grad)), strict=True)
    for a, e in results:
        assert accuracy.error(a.cpu(), e) < 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", NATIVE)
def test_dropout_of_packed_sequences(backend):
    """Each sequence has random numbers of its own, the same in the backward."""
    device = device_of(backend)
    inputs = [torch.randn(6, 2, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]

    def run(*inputs):
        torch.manual_seed(0)
        with fastdl.use_backend(backend):
            return varlen_attention(*inputs, offsets([1, 5], device), dropout_p=0.5)

    assert torch.autograd.gradcheck(run, inputs)


# --------------------------------------------------------------------------------------------------- autograd's edges


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (2, 1)}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("backend", backends(*[name for name in KERNELS if name != "triton"]) if KERNELS else [])
def test_gradcheck_twice(backend, options):
    inputs = [t.to(device_of(backend)).requires_grad_() for t in make((1, 2), 3, 4, 2, 3, torch.float64).values()]

    def run(*inputs):
        torch.manual_seed(0)
        return ours(*inputs, return_logsumexp=True, **options)

    with fastdl.use_backend(backend):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", NATIVE)
def test_double_backward(backend):
    inputs = make() | {"attn_mask": torch.randn(9, 11)}

    def penalty(function, device):
        tensors = [t.detach().to(device).requires_grad_() for t in inputs.values()]
        (grad,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[0], create_graph=True)
        return [g.cpu() for g in torch.autograd.grad(grad.square().sum(), tensors)]

    with fastdl.use_backend(backend):
        actual = penalty(ours, device_of(backend))
    torch.testing.assert_close(actual, penalty(theirs, "cpu"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", NATIVE)
def test_saves_inputs_and_outputs_alone(backend):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make().items()}
    saved: list[torch.Tensor] = []
    with (
        fastdl.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        ours(**inputs)
    shapes = [(2, 3, 9, 8), (2, 3, 11, 8), (2, 3, 11, 8), (2, 3, 9, 8), (2, 3, 9)]
    assert sorted(tuple(t.shape) for t in saved) == sorted(shapes)


@pytest.mark.parametrize("backend", NATIVE)
def test_backward_keeps_the_backend_of_its_forward(backend):
    inputs = {name: t.to(device_of(backend)).requires_grad_() for name, t in make().items()}
    with fastdl.use_backend(backend):
        y = ours(**inputs)
    with fastdl.use_backend("torch"), fastdl.trace() as calls:
        y.sum().backward()
    assert [(call.op, call.backend) for call in calls] == [("attention_backward", backend)]


def test_torch_func_takes_the_reference():
    q, k, v = make((2,), dtype=torch.float64).values()
    with fastdl.trace() as calls:
        actual = torch.func.vmap(lambda q: torch.func.grad(lambda x: ours(x, k, v).sum())(q))(torch.stack([q, q]))
        ours_, theirs_ = [torch.func.jvp(lambda x, f=f: f(x, k, v), (q,), (q,)) for f in (ours, theirs)]
    assert {call.backend for call in calls} == {"torch"}
    expected = torch.func.grad(lambda x: theirs(x, k, v).sum())(q)
    torch.testing.assert_close(actual, torch.stack([expected, expected]))
    torch.testing.assert_close(ours_, theirs_)
    actual = torch.func.vmap(lambda q: ours(q, k, v, window_size=(2, 2)))(torch.stack([q, q]))
    torch.testing.assert_close(actual[0], formula(q, k, v, left=2, right=2)[0])


# ------------------------------------------------------------------------------------------ the compiler's and torch's


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (2, 1)}], ids=str)
@pytest.mark.parametrize("backend", backends("torch", "cpu", "auto"))
def test_compiles_without_graph_breaks(backend, options):
    torch._dynamo.reset()
    inputs = {name: tensor.requires_grad_() for name, tensor in make().items()}
    with fastdl.use_backend(backend):
        compiled = torch.compile(pair(**options)[0], fullgraph=True, backend="aot_eager")
        actual = compiled(**inputs)
        gradients = torch.autograd.grad(actual.square().sum(), list(inputs.values()))
        other = compiled(**make(queries=13, keys=17))
    left, right = options.get("window_size", (-1, 0 if options.get("is_causal") else -1))
    expected = formula(**inputs, left=left, right=right)[0]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), list(inputs.values())))
    assert other.shape == (2, 3, 13, 8)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_opcheck(backend):
    inputs = tuple(make().values())
    mask, slopes = torch.randn(1, 3, 9, 11), torch.rand(1, 3)
    output, logsumexp = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9)
    for tensors, options in (
        ((mask, slopes, None, None, None), (9, 11, 0.3, -1, 0, False, 0.0)),
        ((None, None, None, None, torch.tensor(7)), (9, 11, 0.3, 2, 2, True, 0.5)),
    ):
        torch.library.opcheck(torch.ops.fastdl.attention.default, (*inputs, *tensors, *options, backend))
        needs = [True, True, True, tensors[0] is not None]
        arguments = (output, None, *inputs, *tensors, output, logsumexp, *options, needs, backend)
        torch.library.opcheck(torch.ops.fastdl.attention_backward.default, arguments)


@pytest.mark.parametrize("backend", backends("torch", "cpu"))
def test_autocast(backend):
    inputs = {name: tensor.requires_grad_() for name, tensor in make().items()}
    mask = torch.randn(9, 11)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*inputs.values(), mask)
        with fastdl.use_backend(backend):
            actual = ours(**inputs, attn_mask=mask)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert [g.dtype for g in torch.autograd.grad(actual.float().sum(), list(inputs.values()))] == [torch.float32] * 3


# ------------------------------------------------------------------------------------------------------------ bad input

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8)
BAD = {
    "not a tensor": (dict(query=[1.0], key=K, value=K), TypeError, "query.*list"),
    "one dimension": (dict(query=torch.zeros(8), key=K, value=K), RuntimeError, r"query.*\(8,\).*length, size"),
    "mixed dtypes": (dict(query=Q, key=K.double(), value=K), RuntimeError, "key.*float64.*float32"),
    "mixed devices": (dict(query=Q, key=K, value=K.to("meta")), RuntimeError, "value.*meta.*cpu"),
    "integers": (dict(query=Q.long(), key=K.long(), value=K.long()), RuntimeError, "query.*int64.*floating"),
    "sizes": (dict(query=Q, key=K[..., :7], value=K), RuntimeError, r"key.*7\).*\(\*, 8\)"),
    "lengths": (dict(query=Q, key=K, value=K[..., :5, :]), RuntimeError, r"value.*5, 8\).*\(\*, 6, size\)"),
    "heads": (dict(query=Q, key=K[:, :2], value=K[:, :2]), RuntimeError, "shapes.*broadcast"),
    "grouped heads": (
        dict(query=Q, key=K[:, :3], value=K[:, :3], enable_gqa=True),
        RuntimeError,
        "key has 3 heads.*divisor.*4",
    ),
    "mask and causal": (
        dict(query=Q, key=K, value=K, attn_mask=torch.zeros(5, 6), is_causal=True),
        RuntimeError,
        "attn_mask.*is_causal",
    ),
    "mask's dtype": (
        dict(query=Q, key=K, value=K, attn_mask=torch.zeros(5, 6, dtype=torch.int32)),
        RuntimeError,
        "attn_mask.*int32.*bool.*float32",
    ),
    "mask's shape": (
        dict(query=Q, key=K, value=K, attn_mask=torch.zeros(5, 7)),
        RuntimeError,
        r"attn_mask.*\(5, 7\).*\(2, 4, 5, 6\)",
    ),
    "mask's dimensions": (dict(query=Q, key=K, value=K, attn_mask=torch.zeros(6)), IndexError, r"attn_mask.*\(6,\)"),
    "mask's device": (
        dict(query=Q, key=K, value=K, attn_mask=torch.zeros(5, 6, device="meta")),
        RuntimeError,
        "attn_mask.*meta",
    ),
    "dropout": (dict(query=Q, key=K, value=K, dropout_p=1.5), RuntimeError, "dropout probability is 1.5.*0 to 1"),
    "window": (dict(query=Q, key=K, value=K, window_size=3.0), TypeError, "window_size.*3.0.*pair"),
    "slopes": (
        dict(query=Q, key=K, value=K, alibi_slopes=torch.zeros(3)),
        RuntimeError,
        r"alibi_slopes.*\(3,\).*\(4,\)",
    ),
    "slopes' gradient": (
        dict(query=Q, key=K, value=K, alibi_slopes=torch.zeros(4, requires_grad=True)),
        RuntimeError,
        "alibi_slopes requires a gradient",
    ),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        scaled_dot_product_attention(**arguments)


P = torch.zeros(7, 4, 8)
BAD_PACKED = {
    "dimensions": (dict(query=Q, key=P, value=P, cu_seq_q=offsets([3, 4])), RuntimeError, "query.*positions, heads"),
    "offsets' dtype": (dict(query=P, key=P, value=P, cu_seq_q=torch.zeros(3)), TypeError, "cu_seq_q.*int32"),
    "offsets' shapes": (
        dict(query=P, key=P, value=P, cu_seq_q=offsets([3, 4]), cu_seq_k=offsets([7])),
        RuntimeError,
        r"cu_seq_k.*\(2,\).*same",
    ),
    "offsets' end": (dict(query=P, key=P, value=P, cu_seq_q=offsets([3, 3])), ValueError, "cu_seq_q.*6.*"),
    "offsets' start": (dict(query=P, key=P, value=P, cu_seq_q=offsets([3, 4])[1:]), ValueError, "cu_seq_q.*3.*"),
    "offsets fall": (
        dict(query=P, key=P, value=P, cu_seq_q=offsets([3, 4]), cu_seq_k=torch.tensor([0, 9, 7])[[0, 1, 2]]),
        ValueError,
        "cu_seq_k.*7.*fall",
    ),
}


@pytest.mark.parametrize("backend", [*backends("torch", "cpu"), "auto"])
@pytest.mark.parametrize("case", BAD_PACKED)
def test_bad_packed_input_names_argument_value_and_what_is_allowed(case, backend):
    arguments, exception, message = BAD_PACKED[case]
    with fastdl.use_backend(backend), pytest.raises(exception, match=message):
        varlen_attention(**arguments)


def test_what_torch_allows_auto_allows():
    inputs = make(size=300)
    torch.testing.assert_close(ours(*inputs.values()), theirs(*inputs.values()))
    with torch.device("meta"):
        assert ours(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6)).shape == (2, 3, 6)
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(*inputs.values(), dropout_p=0.5)
    torch.manual_seed(3)
    with fastdl.use_backend("torch"):
        assert torch.equal(ours(*inputs.values(), dropout_p=0.5), expected)


def test_every_op_is_registered_with_torch():
    for op in (ops.ATTENTION, ops.ATTENTION_BACKWARD):
        assert hasattr(torch.ops.fastdl, op.name)
