"""The CUDA kernels of softmax, emulated: every order of execution, every path, and what lies around the arrays."""

from __future__ import annotations

import emulation
import pytest
import torch
from test_kernels import DTYPES, Placed, assert_close, dtypes, kernels

__all__ = ["kernels"]  # a fixture
pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

# (outer, size, inner): warps, in vectors and not, more than a grid's; blocks; columns, more than a strip of lanes.
SHAPES = [(11, 40, 1), (70, 33, 1), (3, 1, 1), (7, 2048, 1), (2, 1301, 1), (2, 19, 5), (3, 7, 70)]


@dtypes
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(kernels, shape, log, dtype):
    function = torch.log_softmax if log else torch.softmax
    for offset in (0, 1):  # aligned for vectors or not
        x = Placed(torch.randn(shape), dtype, offset)
        y, dx = Placed(shape, dtype, offset), Placed(shape, dtype, offset)
        kernels.softmax(DTYPES[dtype], *shape, x.address, y.address, log, 0)
        exact = x.tensor.double()
        assert_close(y, function(exact, 1), scale=1 + exact.abs())
        grad = Placed(torch.randn(shape), dtype, offset)
        kernels.softmax_backward(DTYPES[dtype], *shape, grad.address, y.address, dx.address, log, 0)
        g, saved = grad.tensor.double(), y.tensor.double()
        if log:
            expected = g - saved.exp() * g.sum(1, keepdim=True)
        else:
            expected = saved * (g - (g * saved).sum(1, keepdim=True))
        scale = 1 + g.abs() + g.abs().sum(1, keepdim=True) * (saved.exp() if log else saved)
        assert_close(dx, expected, scale=scale)


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(16).data_ptr()
    for message, arguments in {
        "softmax: dtype must be .* got 4": (4, 1, 2, 1, one, one, False, 0),
        "softmax: outer must be at least 1, got 0": (0, 0, 2, 1, one, one, False, 0),
        "softmax: size must be at least 1, got 0": (0, 1, 0, 1, one, one, False, 0),
        "softmax: inner must be at least 1, got -1": (0, 1, 2, -1, one, one, False, 0),
        "softmax: input must be an address": (0, 1, 2, 1, 0, one, False, 0),
        "softmax: output must be an address": (0, 1, 2, 1, one, 0, False, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            kernels.softmax(*arguments)
    with pytest.raises(ValueError, match="softmax_backward: grad_input must be an address"):
        kernels.softmax_backward(0, 1, 2, 1, one, one, 0, False, 0)
