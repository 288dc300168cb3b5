"""The CUDA kernels of the cross entropy, emulated: every order, every path; sanitized, with those beside it."""

from __future__ import annotations

import re

import emulation
import pytest
import torch
import torch.nn.functional as F
from test_kernels import DTYPES, Placed, assert_close, dtypes, kernels
from test_softmax_kernels import SHAPES

__all__ = ["kernels"]  # a fixture
pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

SHAPES = [shape for shape in SHAPES if shape[1] > 1]


def compute(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@dtypes
@pytest.mark.parametrize("kind", ["index", "smoothed", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(kernels, shape, kind, dtype):
    outer, classes, inner = shape
    rows, code, wide = outer * inner, DTYPES[dtype], compute(dtype)
    smoothing = 0.1 if kind == "smoothed" else 0.0
    for offset in (0, 1):  # aligned for vectors or not
        x = Placed(torch.randn(shape) * 2, dtype, offset)
        weight = Placed(torch.rand(classes) + 0.5, wide)
        if kind == "probabilities":
            target = Placed(torch.randn(shape).softmax(1), dtype, offset)
            exact_target, address = target.tensor.double(), target.address
        else:
            exact_target = torch.randint(0, classes, (outer, inner))
            exact_target[0, 0] = -100
            address = exact_target.data_ptr()
        options = (-100, smoothing)
        loss, denominator = Placed((rows,), wide), Placed((1,), wide)
        statistics, sums = Placed((3, rows), wide), Placed((2, rows), wide)
        head = code, *shape, x.address
        shared = address, kind != "probabilities", weight.address
        kernels.cross_entropy(*head, *shared, loss.address, 0, statistics.address, 0, *options, 0)

        leaf = x.tensor.double().requires_grad_()
        expected = F.cross_entropy(
            leaf, exact_target, weight.tensor.double(), reduction="none", label_smoothing=smoothing
        )
        expected = expected.reshape(rows)
        assert_close(loss, expected.detach(), scale=20)
        kept = statistics.tensor.double()
        torch.testing.assert_close(kept[0], leaf.detach().amax(1).reshape(rows))
        total = Placed((1,), wide)
        kernels.cross_entropy(
            *head, *shared, total.address, denominator.address, statistics.address, sums.address, *options, 0
        )
        assert_close(total, expected.detach().sum()[None], scale=20 * rows)
        if kind != "probabilities":
            own = weight.tensor.double()[exact_target.clamp(min=0)]
            assert_close(denominator, own[exact_target >= 0].sum()[None], scale=rows)
        else:
            assert denominator.tensor.item() == rows

        grad, gradient = Placed(torch.randn(rows), wide), Placed(shape, dtype, offset)
        kernels.cross_entropy_backward(
            *head, grad.address, True, *shared, 0, statistics.address, gradient.address, 0, *options, 0
        )
        (exact,) = torch.autograd.grad(expected, leaf, grad.tensor.double(), retain_graph=True)
        assert_close(gradient, exact, scale=10)
        gradient, divisor = Placed(shape, dtype, offset), Placed(torch.tensor([4.0]), wide)
        of_target = Placed(shape, dtype, offset) if kind == "probabilities" else None
        kernels.cross_entropy_backward(
            *head,
            grad.address,
            False,
            *shared,
            divisor.address,
            statistics.address,
            gradient.address,
            of_target.address if of_target else 0,
            *options,
            0,
        )
        factor = grad.tensor[0].double() / 4
        (exact,) = torch.autograd.grad(expected.sum() * factor, leaf)
        assert_close(gradient, exact, scale=10)
        if of_target:
            w = weight.tensor.double()[None, :, None]
            assert_close(of_target, -factor * w * leaf.detach().log_softmax(1), scale=20)


@pytest.mark.parametrize("shape", [(3, 40, 1), (2, 2048, 1), (2, 5, 3)], ids=str)
def test_a_target_that_is_no_class_is_not_read(kernels, shape):
    outer, classes, inner = shape
    rows = outer * inner
    x, statistics = Placed(torch.randn(shape), torch.float32), Placed((3, rows), torch.float32)
    for bad in (-1, classes, 2**60):
        target = torch.zeros(rows, dtype=torch.int64)
        target[1] = bad
        loss, gradient = Placed((rows,), torch.float32), Placed(shape, torch.float32)
        head, options = (0, *shape, x.address), (-100, 0.0, 0)
        shared = target.data_ptr(), True, 0
        kernels.cross_entropy(*head, *shared, loss.address, 0, statistics.address, 0, *options)
        assert loss.tensor.isnan().tolist() == [row == 1 for row in range(rows)]
        one = torch.ones(1).data_ptr()
        kernels.cross_entropy_backward(*head, one, False, *shared, 0, statistics.address, gradient.address, 0, *options)
        bad_rows = gradient.tensor.isnan().movedim(1, 2).reshape(rows, classes)
        assert bad_rows.all(1).tolist() == bad_rows.any(1).tolist() == [row == 1 for row in range(rows)]


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(16).data_ptr()

    def call(dtype=0, shape=(1, 2, 1), input=one, target=one, loss=one, denominator=one, statistics=one):
        arguments = dtype, *shape, input, target, True, 0, loss, denominator, statistics, one, -100, 0.0, 0
        return lambda: kernels.cross_entropy(*arguments)

    for message, bad in {
        "cross_entropy: dtype must be .* got 4": call(dtype=4),
        "cross_entropy: classes must be at least 1, got 0": call(shape=(1, 0, 1)),
        "cross_entropy: input must be an address": call(input=0),
        "cross_entropy: target must be an address": call(target=0),
        "cross_entropy: loss must be an address": call(loss=0),
        "cross_entropy: denominator must be an address": call(denominator=0),
        "cross_entropy: statistics must be an address": call(statistics=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(mode, [emulation.HERE / "sanitized_losses.py", emulation.module(mode), full]).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
