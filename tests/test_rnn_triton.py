"""The Triton kernels' ways to run a recurrence: chosen as planned, and each right, with tiles so small that tests fill
them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from suite import FLOATING, backends
from test_rnn import KINDS, compare

kernels = pytest.importorskip("fastdl.kernels.rnn")
from fastdl.kernels.common import A100, B200, H100, INTERPRETER, MI300  # noqa: E402  after it is known to be there

SMALL = kernels.Tile(16, 16, 16, 4, 1.0)
WAYS = ("a launch a step", "one launch", "weights kept")


@pytest.fixture
def way(request, monkeypatch):
    """Makes every recurrence run in one way."""

    def choose(batch, columns, depth, dtype, allow_tf32, steps, backward, wide, resident, device):
        tile = kernels.resident_tile(columns, depth, "half", 2, H100) if resident else None
        if request.param == "weights kept" and tile and steps > 1:
            return kernels.Choice(tile, True, True, 1)
        return kernels.Choice(SMALL, request.param != WAYS[0] and steps > 1, False, 1)

    monkeypatch.setattr(kernels, "choose", choose)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backends("triton"))
def test_every_way(way, backend, kind):
    compare(backend, kind, sizes=(3, 17), shape=dict(steps=3, batch=18))
    compare(backend, kind, "packed", sizes=(3, 17), bidirectional=True, dtype=torch.bfloat16)


EXTENTS = [(b, h) for b in (1, 16, 33, 4096) for h in (1, 17, 32, 64, 100, 128, 256, 512, 1024, 4096)]


@pytest.mark.parametrize("device", [A100, H100, B200, MI300, INTERPRETER], ids=lambda d: str(d.capability))
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_choices(dtype, device):
    """What is chosen fits into shared memory; all columns are there for one program only where it runs all steps."""
    flags = (False, True)
    for (batch, hidden), steps, gates, tf32, backward, resident in itertools.product(
        EXTENTS, (1, 100), (1, 4), flags, flags, flags
    ):
        columns, depth = (hidden, gates * hidden) if backward else (gates * hidden, hidden)
        wide, tf32 = hidden % 16 == 0, tf32 and dtype == torch.float32
        choice = kernels.choose(batch, columns, depth, dtype, tf32, steps, backward, wide, resident, device)
        tile = choice.tile
        assert choice.stages * (tile.rows + tile.columns) * tile.depth * dtype.itemsize < device.shared_memory
        assert choice.whole or not choice.resident
        assert not (choice.whole and steps == 1)
        if choice.resident:
            assert resident and wide and tile.columns >= columns and tile.depth >= depth
        else:
            assert tile in kernels.usable_tiles(dtype, tf32, backward, wide)


def test_small_layers_take_one_launch_and_large_ones_fill_the_device():
    options = torch.bfloat16, False, 100
    small = kernels.choose(32, 4 * 128, 128, *options, False, True, True, H100)
    assert small.whole and small.resident
    large = kernels.choose(16, 4 * 1024, 1024, *options, False, True, True, H100)
    assert not large.whole and 4 * 1024 // large.tile.columns > H100.multiprocessors * 0.9
    many = kernels.choose(1024, 4 * 1024, 1024, *options, False, True, True, H100)
    assert many.tile.rows == 64


def test_a_launch_is_looked_up_once():
    """Later steps go straight to the compiled kernel, with the same arguments but for the step."""
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: calls.append((grid, arguments))

    launches = []
    for name in ("first", "second"):
        kernel = SimpleNamespace(arg_names=["name", "step", "BLOCK"])
        launch = SimpleNamespace(kernel=kernel, grid=(2, 3), arguments={"step": 0, "name": name}, run=Compiled)
        launch.constants = {"BLOCK": 16}
        launches.append(launch)
    kernels.Steps(launches, 3).run()
    assert calls == [((2, 3, 1), (name, step, 16)) for step in (1, 2) for name in ("first", "second")]
