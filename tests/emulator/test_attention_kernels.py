"""The CUDA kernels of attention, emulated: against float64 in every order of execution, and under sanitizers.

What the package does with them is tested with the other backends; here is what only raw addresses, and kernels that no
shape of those tests reaches, show.
"""

from __future__ import annotations

import itertools
import re

import emulation
import pytest
import torch
from test_kernels import DTYPES, Placed, dtypes, kernels

from fastdl.ops import attention as ops

__all__ = ["kernels"]  # a fixture
pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float64: 1e-14}
TF32 = 2e-3


class Case:
    """Arrays of a call, NaN around each, and what float64 makes of them."""

    def __init__(
        self,
        dtype,
        lengths=(37, 70),
        sizes=(24, 17),
        heads=(2, 1),
        window=(-1, -1),
        mask=None,
        slopes=None,
        dropout=0.0,
        scale=0.3,
        offset=1,
        batch=1,
        packed=None,
    ):
        torch.manual_seed(0)
        self.dtype, self.code, self.compute = dtype, DTYPES[dtype], ops.compute_dtype(torch.empty(0, dtype=dtype))
        self.window, self.scale, self.dropout, self.batch, self.heads = window, scale, dropout, batch, heads
        self.lengths, self.sizes, self.offset, self.group = lengths, sizes, offset, heads[0] // heads[1]
        shapes = [
            (batch, h, n, d)
            for h, n, d in zip(
                (heads[0], heads[1], heads[1]), (lengths[0], lengths[1], lengths[1]), (sizes[0], *sizes), strict=True
            )
        ]
        self.inputs = [self.place(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
        self.mask = None if mask is None else mask if mask.dtype == torch.bool else mask.to(dtype)
        self.slopes = None if slopes is None else slopes.to(self.compute)
        self.seed = torch.tensor(0x123456789ABCDEF) if dropout else None
        self.offsets = None if packed is None else [torch.tensor(each) for each in packed]
        self.grad = self.place(torch.randn(batch, heads[0], lengths[0], sizes[1], dtype=torch.float64))
        self.grad_logsumexp = torch.randn(batch, heads[0], lengths[0], dtype=self.compute)
        self.exact = [each.tensor.double() for each in self.inputs]
        doubles = [t if t is None or t.dtype == torch.bool else t.double() for t in (self.mask, self.slopes)]
        offsets = [None, None] if self.offsets is None else self.offsets
        self.rest = *doubles, *offsets, self.seed
        self.options = *lengths, scale, *window, packed is not None, dropout
        self.results = ops.reference(*self.exact, *self.rest, *self.options)

    def place(self, values, dtype=None):
        return Placed(values, dtype or self.dtype, self.offset)

    def of(self, placed):
        """An address and the strides of batch, row and head."""
        batch, head, row, _ = placed.tensor.stride()
        return placed.address, batch, row, head

    def arguments(self, kernels):
        def address(tensor):
            return 0 if tensor is None else tensor.data_ptr()

        offsets = [0, 0] if self.offsets is None else [address(each) for each in self.offsets]
        sequences = self.batch if self.offsets is None else len(self.offsets[0]) - 1
        shape = kernels.AttentionShape(
            sequences, self.heads[0], self.group, *self.lengths, *self.sizes, *offsets, *self.lengths
        )
        kind, strides = 0, [0] * 4
        if self.mask is not None:
            kind = 1 if self.mask.dtype == torch.bool else 2
            strides = [0 if n == 1 else s for n, s in zip(self.mask.shape, self.mask.stride(), strict=True)]
        scores = kernels.AttentionScores(
            self.scale,
            *self.window,
            self.offsets is not None,
            kind,
            address(self.mask),
            strides,
            address(self.slopes),
            0 if self.slopes is None or len(self.slopes) == 1 else self.heads[0],
            self.dropout,
            address(self.seed),
        )
        return self.code, shape, scores

    def check(self, got, exact, allowed):
        for placed, expected in zip(got, exact, strict=True):
            assert placed.untouched_around()
            finite = expected.isfinite()
            values = placed.tensor.double()
            assert torch.equal(values[~finite], expected[~finite])
            error, scale = (torch.linalg.vector_norm(each[finite]) for each in (values - expected, expected))
            assert error <= (allowed or ALLOWED[self.dtype]) * scale

    def forward(self, kernels, tf32=False, allowed=None):
        got = [self.place(tuple(self.results[0].shape)), self.place(tuple(self.results[1].shape), self.compute)]
        inputs = [self.of(each) for each in self.inputs]
        kernels.attention(*self.arguments(kernels), *inputs, self.of(got[0]), got[1].address, tf32, 0)
        self.check(got, self.results, allowed)
        return got

    def backward(self, kernels, needs=(True, True, True, False), tf32=False, allowed=None):
        exact = self.grad.tensor.double(), self.grad_logsumexp.double(), *self.exact, *self.rest
        expected = ops.reference_backward(*exact, *self.results, *self.options, needs)
        output = self.place(self.results[0])
        logsumexp = self.results[1].to(self.compute)
        got = [self.place(tuple(t.shape)) if need else None for t, need in zip(self.exact, needs, strict=False)]
        whole = torch.zeros(self.batch, self.heads[0], *self.lengths, dtype=self.compute) if needs[3] else None
        code, shape, scores = self.arguments(kernels)
        workspace = Placed((kernels.attention_backward_workspace(code, shape) // 8,), torch.float64)
        kernels.attention_backward(
            code,
            shape,
            scores,
            self.of(self.grad),
            *(self.of(each) for each in (*self.inputs, output)),
            logsumexp.data_ptr(),
            self.grad_logsumexp.data_ptr(),
            *((0, 0, 0, 0) if each is None else self.of(each) for each in got),
            0 if whole is None else whole.data_ptr(),
            tf32,
            workspace.address,
            0,
        )
        assert workspace.untouched_around()
        got = [each for each in got if each is not None]
        if whole is not None:
            got.append(Placed(whole.sum_to_size(self.mask.shape), self.compute))
        self.check(got, expected, allowed or 2 * ALLOWED[self.dtype])
        return got


WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "window": (9, 5)}


@dtypes
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_every_order(kernels, window, dtype):
    for offset in (0, 1):
        case = Case(dtype, window=window, offset=offset)
        case.forward(kernels)
        case.backward(kernels)


# One of each kernel's buckets, with sizes that differ, and a whole one.
@pytest.mark.parametrize(
    "sizes", [(32, 8), (64, 64), (40, 60), (128, 128), (90, 20), (20, 200), (256, 256), (130, 140)], ids=str
)
@dtypes
def test_sizes(sizes, dtype):
    module = emulation.load()
    for given in ({}, {"dropout": 0.3}):  # plain kernels, and others
        case = Case(dtype, (20, 70), sizes, scale=0.1, offset=0, **given)
        case.forward(module)
        case.backward(module)


@pytest.mark.parametrize("size", [24, 64, 70, 128])
def test_tf32_has_its_own_error(size):
    case = Case(torch.float32, (37, 50), (size, size - 5), window=(-1, 0), scale=0.1)
    case.forward(emulation.load(), tf32=True, allowed=TF32)
    case.backward(emulation.load(), tf32=True, allowed=TF32)
    with pytest.raises(AssertionError):
        case.forward(emulation.load(), tf32=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_blocks(kernels, dtype):
    for lengths, window in (((150, 200), (-1, 0)), ((270, 90), (20, 30)), ((270, 150), (-1, -1))):
        case = Case(dtype, lengths, (64, 64), window=window, offset=0)
        case.forward(kernels)
        case.backward(kernels)


def changes():
    torch.manual_seed(1)
    return {
        "boolean mask": {"mask": torch.rand(2, 1, 37, 70) > 0.4},
        "mask of rows": {"mask": torch.randn(1, 2, 37, 1)},
        "mask": {"mask": torch.randn(2, 2, 37, 70)},
        "transposed mask": {"mask": torch.randn(1, 2, 70, 37).mT},
        "slopes": {"slopes": torch.rand(2, 2), "window": (-1, 0)},
        "dropout": {"dropout": 0.4},
        "all": {"mask": torch.randn(70), "slopes": torch.rand(1, 2), "dropout": 0.1, "window": (30, 40)},
        "negative scale": {"scale": -0.3},
        "no scale": {"scale": 0.0},
    }


@pytest.mark.parametrize("name", changes())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_changes_scores(kernels, dtype, name):
    given = changes()[name]
    if "mask" in given and given["mask"].dim() == 1:
        given["mask"] = given["mask"].view(1, 1, 1, -1)
    for sizes in ((24, 17), (128, 100)):
        case = Case(dtype, sizes=sizes, batch=2, **given)
        case.forward(kernels)
        if name == "no scale":
            case.backward(kernels, (False, False, True, False))
            continue
        mask = given.get("mask")
        # The gradient of a mask that is the same for all keys is little but rounding.
        of_mask = mask is not None and mask.is_floating_point() and mask.shape[-1] > 1
        case.backward(kernels, (True, True, True, of_mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(kernels, dtype):
    for window in WINDOWS.values():
        case = Case(dtype, (37, 70), heads=(4, 2), window=window, packed=([0, 5, 5, 30, 37], [0, 30, 33, 33, 70]))
        case.forward(kernels)
        case.backward(kernels)


@dtypes
def test_every_combination_of_needed_gradients(dtype):
    for needs in itertools.product((True, False), repeat=4):
        for size in (24, 140):
            case = Case(dtype, (20, 30), (size, size), mask=torch.randn(1, 2, 20, 30).double())
            case.backward(emulation.load(), needs)


@dtypes
def test_all_orders_give_the_same_bits(dtype):
    module, results = emulation.load(), []
    for setting in ({}, {"schedule": "random", "seed": 3, "resident": 0}):
        module.configure(**setting)
        case = Case(dtype, heads=(4, 2), window=(-1, 0), dropout=0.2)
        results.append([*case.forward(module), *case.backward(module)])
    module.configure()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.tensor, second.tensor)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("group", 3, "group must be a divisor of heads, got 3"),
        ("sizes", (257, 8), "size must be 1 to 256, got 257"),
        ("sizes", (8, 0), "value_size must be 1 to 256, got 0"),
        ("lengths", (1 << 28, 4), "queries must be 1 to 2.28 - 1, got 268435456"),
        ("dropout", 1.5, "dropout must be 0 to 1, got 1.5"),
    ],
)
def test_bad_arguments(argument, value, message):
    case, module = Case(torch.float32, (3, 4), (5, 6)), emulation.load()
    setattr(case, argument, value)
    with pytest.raises(ValueError, match=message):
        module.attention(*case.arguments(module), *[case.of(each) for each in case.inputs], (0, 0, 0, 0), 0, False, 0)


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(mode, [emulation.HERE / "sanitized_attention.py", emulation.module(mode), full]).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
