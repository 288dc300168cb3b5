"""The Triton kernels' ways to go over an array: chosen as planned, and each right, with tiles so small that tests fill
them."""

from __future__ import annotations

import itertools

import pytest
import torch
from suite import backends, compare
from test_batch_norm import make, ours, theirs

from fastdl.ops.batch_norm import BATCH_NORM_STATISTICS

kernels = pytest.importorskip("fastdl.kernels.batch_norm")
from fastdl.kernels.common import H100, INTERPRETER  # noqa: E402  after it is known to be there


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", {2: 256, 4: 256, 8: 256})
    monkeypatch.setattr(kernels, "WHOLE_TILE", {2: 0, 4: 0, 8: 0})
    monkeypatch.setattr(kernels, "LEAST_STEPS", 2)
    monkeypatch.setattr(kernels, "PARTIAL_BLOCK", 16)
    kernels.choose_view.cache_clear()
    yield
    kernels.choose_view.cache_clear()


# By planes, in parts; odd planes by themselves and across channels; columns, and more of them than a block has.
SHAPES = [(5, 3, 16, 13), (5, 3, 7, 7), (9, 16, 5, 5), (150, 3), (40, 70), (19, 3, 15)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", backends("triton"))
def test_many_tiles(small_tiles, backend, shape, training, residual):
    for activation, dtype in (("relu", torch.float32), ("silu", torch.bfloat16), ("tanh", torch.float64)):
        inputs = make(shape, dtype, residual=residual)
        compare(backend, ours(activation, training), theirs(activation, training), inputs, multiple=4)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e5, 1e4])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("backend", backends("triton"))
def test_statistics_of_many_tiles(small_tiles, backend, shape, value):
    """A channel with one infinite or far value, which spoils no digits of the others; or all far from zero."""
    x = torch.randn(shape)
    if value == 1e4:
        x += value
    else:
        x[0, 1] = value
    if torch.cuda.is_available():
        x = x.cuda()
    mean, squares = BATCH_NORM_STATISTICS.implementations["triton"](x)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    exact = x.double().mean(dims)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-5, equal_nan=True)
    variance = x.double().var(dims, correction=0)
    torch.testing.assert_close(squares.double() * x.shape[1] / x.numel(), variance, rtol=3e-6, atol=0, equal_nan=True)


def test_views():
    """A view's tiles cover the array, and its blocks the channels; parts cover a block's tiles."""
    sizes = (1, 3, 8, 700), (1, 3, 16, 24), (1, 7, 49, 64, 3136), (2, 4, 8), (1, 2)
    for outer, channels, inner, element_size, operands in itertools.product(*sizes):
        view = kernels.choose_view(outer, channels, inner, element_size, operands)
        elements = view.tile_rows * view.tile_columns
        assert view.width == channels * view.spread and elements & (elements - 1) == 0
        assert view.rows * view.columns * (channels if view.planes else 1) == outer * channels * inner
        assert elements <= (kernels.WHOLE_TILE if view.whole else kernels.TILE)[element_size]
        assert not view.whole or (view.steps == 1 and view.spread == 1)
        for device, least in itertools.product((H100, INTERPRETER), (1, 4)):
            parts, part_steps = kernels.partition(view, least, device)
            assert (parts - 1) * part_steps < view.steps <= parts * part_steps
            assert part_steps >= min(least, view.steps)


def test_few_channels_fill_the_device():
    view = kernels.choose_view(32, 3, 224 * 224, 2, 1)
    assert view.blocks == 3 and kernels.partition(view, kernels.LEAST_STEPS, H100)[0] * 3 > 8 * H100.multiprocessors
