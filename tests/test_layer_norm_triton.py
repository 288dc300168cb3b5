"""The Triton kernels' tiles: as chosen, and each way right, with limits so small that tests go all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from suite import backends, compare
from test_layer_norm import make, pair, test_sum_and_dropout

kernels = pytest.importorskip("fastdl.kernels.layer_norm")
from fastdl.kernels.common import H100, INTERPRETER, MI300  # noqa: E402  after it is known to be there


@pytest.fixture
def short_rows(monkeypatch):
    monkeypatch.setattr(kernels, "FORWARD_COLUMNS", dict.fromkeys((2, 4, 8), 32))
    monkeypatch.setattr(kernels, "BACKWARD_COLUMNS", dict.fromkeys((2, 4, 8), 32))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("columns", [33, 48, 72])
@pytest.mark.parametrize("backend", backends("triton"))
def test_chunks(short_rows, backend, columns, rms):
    """Rows in several chunks, and several of them for each part of the sums over rows."""
    for dtype in (torch.float32, torch.bfloat16):
        compare(backend, *pair(1, rms), make((70, columns), 1, dtype, rms, residual=True), multiple=4)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("backend", backends("triton"))
def test_chunks_with_dropout(short_rows, backend, residual):
    test_sum_and_dropout(backend, False, residual, 0.4, torch.float32)


def test_tiles():
    """A tile holds all of a row, or is a part of one that is too long; its threads are those that a block may have."""
    for columns, most, device in itertools.product(
        (1, 3, 64, 768, 1024, 4095, 8192, 20_000), (2048, 8192, 16384), (H100, INTERPRETER, MI300)
    ):
        tile = kernels.choose_tile(columns, most, device)
        values = tile.rows * tile.columns
        threads = tile.warps * (32 if device.capability else 64)
        assert values & (values - 1) == 0 and values <= most and 128 <= threads <= 512
        assert tile.whole == (columns <= most) and (tile.columns >= columns if tile.whole else tile.rows == 1)
        assert values <= 32 * threads
