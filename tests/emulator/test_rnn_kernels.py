"""The CUDA kernels of recurrent layers, emulated: against float64 in every order of execution, by both paths."""

from __future__ import annotations

import itertools
import re

import emulation
import pytest
import torch
from test_kernels import DTYPES, Placed, dtypes, kernels
from torch import Tensor

from fastdl.ops import rnn

__all__ = ["kernels"]  # a fixture
pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

MODES = pytest.mark.parametrize("mode", range(4), ids=rnn.MODES)
PATHS = {"steps": 1, "persistent": 2}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
# (hidden, projection, sizes of the batch at each step): several blocks of units, of rows, and a ragged rest of both.
CASES = {
    "one block": (5, 0, [3, 3, 2, 1]),
    "blocks of units": (36, 0, [2, 2, 2]),
    "blocks of rows": (7, 0, [19, 17, 9, 8, 1]),
    "teams of warps": (3, 0, [150, 40, 33]),
    "several passes": (2, 0, [1030, 20]),
    "projection": (20, 9, [5, 4, 1]),
    "wide projection": (9, 20, [3, 3]),
}
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-14}


class Case:
    """Arrays of a recurrence, NaN around each, and what float64 makes of them."""

    def __init__(self, mode, hidden, projection, sizes, dtype, reverse, seed=0):
        torch.manual_seed(seed)
        self.mode, self.hidden, self.reverse, self.dtype = mode, hidden, reverse, dtype
        self.code = DTYPES[dtype]
        self.gates = rnn.GATES[mode] * hidden
        self.state, self.batch, self.rows, self.steps = projection or hidden, sizes[0], sum(sizes), len(sizes)
        self.packed = len(set(sizes)) > 1
        self.sizes = torch.tensor(sizes) if self.packed else None
        scale = self.state**-0.5
        self.projected, self.hx = self.place(self.rows, self.gates), self.place(self.batch, self.state)
        self.cx = self.place(self.batch, hidden) if mode == rnn.LSTM else None
        self.weight_hh = self.place(self.gates, self.state, scale=scale).tensor
        self.bias_hn = self.place(hidden) if mode == rnn.GRU else None
        self.weight_hr = self.place(projection, hidden, scale=hidden**-0.5).tensor if projection else None
        inputs = self.projected, self.hx, self.cx, self.weight_hh, self.bias_hn, self.weight_hr
        self.inputs = [None if each is None else getattr(each, "tensor", each).double() for each in inputs]
        self.results = rnn.reference(*self.inputs, self.sizes, self.steps, mode, reverse, True)

    def place(self, *shape, scale=1.0):
        return Placed(torch.randn(shape, dtype=torch.float64) * scale, self.dtype, 1)

    def empty(self, like: Tensor) -> Placed:
        return Placed(tuple(like.shape), self.dtype, 1)

    def arguments(self, size):
        workspace = Placed((size // 8,), torch.float64)
        sizes = [0 if self.sizes is None else self.sizes.data_ptr()] * 2
        return workspace, sizes

    def check(self, got: dict[str, Placed], expected: tuple[Tensor, ...], allowed: float) -> None:
        for (name, placed), exact in zip(got.items(), expected, strict=True):
            assert placed.untouched_around(), name
            error, scale = (torch.linalg.vector_norm(each) for each in (placed.tensor.double() - exact, exact))
            assert error <= allowed * scale, (name, float(error), float(scale))

    def forward(self, kernels, path, save=True, tf32=False, allowed=None):
        code, projection = self.code, self.weight_hr is not None
        size = kernels.recurrence_workspace(code, self.mode, self.batch, self.hidden, self.state, projection)
        workspace, sizes = self.arguments(size)
        expected = list(self.results)
        if not save:
            expected[3:] = [torch.empty(0), torch.empty(0)]
        got = dict(zip(("output", "h_n", "c_n", "gates", "cells"), map(self.empty, expected), strict=True))
        weights = [rnn._whole_rows(weight) for weight in (self.weight_hh, self.weight_hr)]
        addresses = [each.address if each.tensor.numel() else 0 for each in got.values()]
        kernels.recurrence(
            code,
            self.mode,
            *(0 if each is None else each.address for each in (self.projected, self.hx, self.cx)),
            weights[0][1],
            0 if self.bias_hn is None else self.bias_hn.address,
            weights[1][1],
            *sizes,
            *addresses,
            self.rows,
            self.batch,
            self.steps,
            self.hidden,
            self.state,
            self.reverse,
            tf32,
            path,
            workspace.address,
            0,
        )
        assert workspace.untouched_around()
        self.check(got, tuple(expected), allowed or ALLOWED[self.dtype])
        return got

    def backward(self, kernels, path, given=(True, True, True), allowed=None):
        code, projection = self.code, self.weight_hr is not None
        shapes = [*self.results[:2], *([self.results[2]] if self.mode == rnn.LSTM else [])]
        grads = [self.place(*like.shape) if need else None for like, need in zip(shapes, given, strict=False)]
        grads += [None] * (3 - len(grads))
        saved = [Placed(each, self.dtype, 1) for each in (self.results[0], *self.results[3:])]
        hx, cx, weights = self.inputs[1], self.inputs[2], (self.inputs[3], self.inputs[5])
        doubles = [None if each is None else each.tensor.double() for each in grads]
        exact = saved[0].tensor.double(), hx, cx, *weights, *(each.tensor.double() for each in saved[1:])
        expected = rnn.reference_backward(*doubles, *exact, self.sizes, self.steps, self.mode, self.reverse)
        size = kernels.recurrence_backward_workspace(code, self.mode, self.batch, self.hidden, self.state, projection)
        workspace, sizes = self.arguments(size)
        names = "grad_projected", "grad_hidden_n", "grad_hx", "grad_cx", "grad_projection"
        got = dict(zip(names, map(self.empty, expected), strict=True))
        kept = [rnn._whole_rows(None if each is None else each.t()) for each in (self.weight_hh, self.weight_hr)]
        kernels.recurrence_backward(
            code,
            self.mode,
            *(0 if each is None else each.address for each in (*grads, saved[0], self.hx, self.cx)),
            kept[0][1],
            kept[1][1],
            *(each.address for each in saved[1:]),
            *sizes,
            *(each.address for each in got.values()),
            self.rows,
            self.batch,
            self.steps,
            self.hidden,
            self.state,
            self.reverse,
            False,
            path,
            workspace.address,
            0,
        )
        assert workspace.untouched_around()
        self.check(got, expected, allowed or 2 * ALLOWED[self.dtype])
        return got


@MODES
@paths
@pytest.mark.parametrize("name", CASES)
def test_recurrence(kernels, name, path, mode):
    hidden, projection, sizes = CASES[name]
    if projection and mode != rnn.LSTM:
        return
    dtype = (torch.float32, torch.bfloat16)[mode % 2]
    for reverse in (False, True):
        case = Case(mode, hidden, projection, sizes, dtype, reverse)
        case.forward(kernels, path)
        case.backward(kernels, path)


@dtypes
@paths
@MODES
def test_dtypes(dtype, path, mode):
    module = emulation.load()
    case = Case(mode, 11, 0, [9, 9, 4], dtype, False)
    case.forward(module, path)
    case.forward(module, path, save=False)
    for given in itertools.product((True, False), repeat=3):
        case.backward(module, path, given)


@paths
def test_tf32_has_its_own_error(path):
    case = Case(rnn.LSTM, 20, 0, [3, 3], torch.float32, False)
    case.forward(emulation.load(), path, tf32=True, allowed=1e-3)
    with pytest.raises(AssertionError):
        case.forward(emulation.load(), path, tf32=True)


@dtypes
def test_both_paths_and_all_orders_give_the_same_bits(dtype):
    """What is summed in which order depends on the plan's sizes alone, and the plans of this shape are alike."""
    module, results = emulation.load(), []
    for setting, path in itertools.product(({}, {"schedule": "random", "seed": 3}), PATHS.values()):
        module.configure(**setting)
        case = Case(rnn.LSTM, 12, 0, [5, 5, 2], dtype, False)
        results.append([*case.forward(module, path).values(), *case.backward(module, path).values()])
    module.configure()
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first.tensor, second.tensor)


def cell(case, x, weight_ih, biases, tf32=False):
    """A cell's h, c and gates, and what float64 makes of its inputs."""
    tensors = [None if each is None else getattr(each, "tensor", each) for each in (x, case.hx, case.cx, weight_ih)]
    tensors += [case.weight_hh, *(each.tensor for each in biases)]
    doubles = [None if each is None else each.double() for each in tensors]
    expected = rnn.reference_cell(*doubles, case.mode, True)
    got = dict(zip(("h", "c", "gates"), map(case.empty, expected), strict=True))
    kept = [rnn._whole_rows(each) for each in (x, case.hx.tensor, weight_ih, case.weight_hh)]
    emulation.load().recurrent_cell(
        case.code,
        case.mode,
        kept[0][1],
        kept[1][1],
        0 if case.cx is None else case.cx.address,
        kept[2][1],
        kept[3][1],
        *(each.address for each in biases),
        *(each.address if each.tensor.numel() else 0 for each in got.values()),
        *x.shape,
        case.hidden,
        tf32,
        0,
    )
    return got, expected


def cell_case(mode, dtype, rows):
    """Input and state of different depths; rows and weights of ragged lengths."""
    case = Case(mode, 10, 0, [rows], dtype, False)
    x, weight_ih = case.place(rows, 37).tensor, case.place(case.gates, 37, scale=0.2).tensor
    return case, x, weight_ih, [case.place(case.gates), case.place(case.gates)]


@pytest.mark.parametrize("rows", [1, 9, 200])
@dtypes
@MODES
def test_cells(mode, dtype, rows):
    case, *inputs = cell_case(mode, dtype, rows)
    case.check(*cell(case, *inputs), ALLOWED[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@MODES
def test_infinities_in_cells(mode, dtype):
    """Saturated gates are finite; where a group lacks a weight for one of the products, 0 * infinity does no harm."""
    case, x, weight_ih, biases = cell_case(mode, dtype, 4)
    x[0, 3], x[1, 5], case.hx.tensor[2, 2] = torch.inf, -torch.inf, torch.inf
    got, expected = cell(case, x, weight_ih, biases)
    torch.testing.assert_close(
        got["h"].tensor.double(), expected[0], rtol=4 * ALLOWED[dtype], atol=4 * ALLOWED[dtype], equal_nan=True
    )


def test_bad_arguments_are_named():
    module, one = emulation.load(), torch.zeros(256).data_ptr()
    good = dict(dtype=0, mode=2, batch=2, steps=1, hidden=4, state=4, rows=2, weight=(one, 4), path=0, projected=one)

    def call(**changes):
        a = good | changes
        pointers = a["projected"], one, one, a["weight"], 0, (0, 0), a.get("sizes", 0), a.get("device", 0)
        sizes = a["rows"], a["batch"], a["steps"], a["hidden"], a["state"], False, False, a["path"], one, 0
        return lambda: module.recurrence(a["dtype"], a["mode"], *pointers, one, one, one, 0, 0, *sizes)

    grows, shrinks = torch.tensor([2, 3]), torch.tensor([2, 1])
    for message, bad in {
        r"recurrence: mode must be .* got 4": call(mode=4),
        r"recurrence: dtype must be .* got 7": call(dtype=7),
        r"recurrence: batch must be at least 1, got 0": call(batch=0),
        r"recurrence: steps must be at least 1, got 0": call(steps=0),
        r"recurrence: hidden must be .* got 0": call(hidden=0),
        r"recurrence: state must be hidden, without weight_hr, got 3": call(state=3),
        r"recurrence: rows must be the sum .* got 3": call(rows=3),
        r"recurrence: batch_sizes must be .* got 3": call(sizes=grows.data_ptr(), device=one, steps=2, rows=5),
        r"recurrence: device_batch_sizes must be an address": call(sizes=shrinks.data_ptr(), steps=2, rows=3, path=2),
        r"recurrence: projected must be an address": call(projected=0),
        r"recurrence: weight_hh must be 16-byte aligned": call(weight=(one + 4, 4)),
        r"recurrence: weight_hh must be of a stride .* got 6": call(weight=(one, 6)),
        r"recurrence: weight_hh must be an address": call(weight=(0, 4)),
        r"recurrence: path must be 0 or 1: .* got 2": call(
            path=2, hidden=4096, state=4096, weight=(one, 4096), batch=1, rows=1
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            bad()


# (arithmetic, products, batch, multiprocessors, shared memory) -> what the plan must be.
LSTM_1024 = [(4, 1024, 1024)]
H100 = 132, 227 * 1024


@pytest.mark.parametrize("batch", [1, 8, 17, 64, 300])
@pytest.mark.parametrize("arithmetic", range(4))
@pytest.mark.parametrize("products", [LSTM_1024, [(1, 512, 2048)], [(3, 100, 100)], [(4, 600, 200), (1, 200, 600)]])
@pytest.mark.parametrize("persistent", [True, False])
def test_plans_cover_all_work_within_limits(persistent, products, arithmetic, batch):
    most = 4 if arithmetic == 3 else 8
    plan = emulation.load().recurrent_plan(arithmetic, products, batch, persistent, *H100)
    if not plan["unit_blocks"]:
        assert persistent and arithmetic == 3
        return
    assert plan["shared_bytes"] <= H100[1]
    assert plan["rows"] % 8 == 0 and plan["rows"] * plan["row_blocks"] >= batch > plan["rows"] * (
        plan["row_blocks"] - 1
    )
    assert 8 % plan["depth_warps"] == 0
    for groups, (slots, units, _) in zip(plan["groups"], products, strict=True):
        assert 1 <= groups * slots <= most
        assert not persistent or groups * 8 * plan["unit_blocks"] >= units
    if persistent:
        assert plan["unit_blocks"] * plan["row_blocks"] <= H100[0]


def test_plans_by_shape():
    plan = emulation.load().recurrent_plan
    # 8 units of 4 gates in each of 128 blocks, which all read all of h; more rows are shared by fewer blocks of units.
    assert plan(0, LSTM_1024, 8, True, *H100)["unit_blocks"] == 128
    assert plan(0, LSTM_1024, 64, True, *H100)["row_blocks"] == 2
    # A small layer goes to many blocks by its rows.
    small = plan(0, [(4, 256, 256)], 32, True, *H100)
    assert small["unit_blocks"] * small["row_blocks"] >= 64
    # Weights that all multiprocessors together don't hold.
    assert plan(0, [(4, 4096, 4096)], 8, True, *H100)["unit_blocks"] == 0
    assert plan(0, LSTM_1024, 8, True, 20, 163 * 1024)["unit_blocks"] == 0
    assert plan(0, [(4, 4096, 4096)], 8, False, *H100)["unit_blocks"] > 0


@pytest.mark.parametrize(
    ("mode", "full", "report"), [("asan", "1", "AddressSanitizer|runtime error"), ("tsan", "0", "Thread")]
)
def test_sanitized(mode, full, report):
    if why := emulation.why_unavailable(mode):
        pytest.skip(why)
    output = emulation.run(mode, [emulation.HERE / "sanitized_rnn.py", emulation.module(mode), full]).stdout
    assert "finished" in output, output
    assert not re.search(report, output), output
