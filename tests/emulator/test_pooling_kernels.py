"""The CUDA kernels of max_pool2d, emulated: every order of execution, what lies around the arrays, the sanitizers."""

from __future__ import annotations

import re

import emulation
import pytest
import torch
import torch.nn.functional as F
from test_kernels import DTYPES, Placed, dtypes, kernels

__all__ = ["kernels"]  # a fixture
pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

# (N, C, H, W), kernel, stride, padding, dilation, ceil_mode: ragged; vectors of channels; dilated; larger than a grid.
CASES = [
    ((2, 3, 7, 9), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ((1, 8, 9, 6), (3, 2), (2, 1), (1, 1), (1, 2), True),
    ((2, 16, 5, 11), (3, 3), (1, 2), (1, 1), (2, 1), False),
    ((3, 8, 20, 24), (3, 3), (2, 2), (1, 1), (1, 1), False),
]


@dtypes
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_max_pool2d(kernels, dtype, channels_last, case):
    shape, kernel, stride, padding, dilation, ceil_mode = CASES[case]
    code, windows = DTYPES[dtype], (kernel, stride, padding, dilation)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randint(-3, 4, shape).to(dtype)
    x[torch.rand(shape) < 0.02] = torch.nan
    leaf = x.to(memory_format=format).double().requires_grad_()
    expected, expected_places = F.max_pool2d(leaf, *windows, ceil_mode, return_indices=True)
    grad = torch.randint(-8, 9, expected.shape).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad.double())

    def placed(tensor, offset=0):
        return Placed(in_memory(tensor), dtype, offset)

    def in_memory(tensor):
        return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).contiguous()

    for offset in (0, 1):  # aligned for vectors or not
        shapes = shape, expected.shape[2:]
        input, output = placed(x, offset), Placed(tuple(in_memory(expected).shape), dtype, offset)
        arguments = *shapes, *windows, channels_last, 0
        kernels.max_pool2d(code, input.address, output.address, 0, 0, *arguments)
        assert output.untouched_around()
        assert torch.equal(output.tensor.double().nan_to_num(9), in_memory(expected.detach()).nan_to_num(9))
        for size, kind in ((1, torch.uint8), (8, torch.int64)):
            places = torch.full((expected.numel() + 32,), 99, dtype=kind)
            start = -places.data_ptr() // size % (16 // size)  # 16-byte aligned
            inside = places[start : start + expected.numel()]
            kernels.max_pool2d(code, input.address, output.address, inside.data_ptr(), size, *arguments)
            assert places[start + expected.numel() :].eq(99).all() and places[:start].eq(99).all()
            if size == 8:
                assert torch.equal(inside.view_as(in_memory(expected)), in_memory(expected_places))
            grad_output, grad_input = placed(grad, offset), Placed(tuple(in_memory(x).shape), dtype, offset)
            kernels.max_pool2d_backward(
                code, grad_output.address, inside.data_ptr(), size, grad_input.address, *arguments
            )
            assert grad_input.untouched_around()
            assert torch.equal(grad_input.tensor.double(), in_memory(expected_grad))


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(16).data_ptr()

    def call(dtype=0, input=one, output=one, size=0, shape=(1, 1, 2, 2), kernel=(2, 2), stride=(1, 1), padding=(0, 0)):
        arguments = shape, (1, 1), kernel, stride, padding, (1, 1), False, 0
        return lambda: kernels.max_pool2d(dtype, input, output, 0, size, *arguments)

    for message, bad in {
        r"max_pool2d: dtype must be .* got 4": call(dtype=4),
        r"max_pool2d: input must be an address": call(input=0),
        r"max_pool2d: output must be an address": call(output=0),
        r"max_pool2d: indices must be an address": call(size=1),
        r"max_pool2d: index_bytes must be 0, 1 or 8, got 2": call(size=2),
        r"max_pool2d: index_bytes must be 8 for a window": call(size=1, shape=(1, 1, 17, 17), kernel=(17, 17)),
        r"max_pool2d: height must be .* got 0": call(shape=(1, 1, 0, 2)),
        r"max_pool2d: stride must be at least 1, got 0": call(stride=(1, 0)),
        r"max_pool2d: padding must be 0 to half .* got 2": call(padding=(2, 0)),
    }.items():
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(mode, [emulation.HERE / "sanitized_pooling.py", emulation.module(mode), full]).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
