"""The linear layer's forward on Hopper, emulated: against float64 in every order of execution, and under sanitizers."""

from __future__ import annotations

import emulation
import pytest
import torch
from test_kernels import DTYPES, NAMES, PARAMETER, SETTINGS, Placed, apply, assert_close
from torch import Tensor

pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting["schedule"])
def kernels(request):
    module = emulation.load()
    module.configure(**request.param)
    yield module
    module.configure()


def padded(values: Tensor, padding: int) -> Tensor:
    """The same matrix with NaN between its rows."""
    rows, columns = values.shape
    memory = torch.full((rows, columns + padding), torch.nan, dtype=values.dtype)
    memory[:, :columns] = values
    return memory[:, :columns]


def linear(kernels, x: Tensor, w: Tensor, bias: Tensor | None, kind: int, with_z: bool) -> tuple[Placed, Placed | None]:
    shape = (x.shape[0], w.shape[0])
    y, z = Placed(shape, x.dtype), Placed(shape, x.dtype) if with_z else None
    operands = (x.data_ptr(), *x.stride(), w.data_ptr(), *w.stride())
    addresses = (bias.data_ptr() if bias is not None else 0, y.address, z.address if z else 0)
    sizes = (*shape, x.shape[1])
    kernels.linear(DTYPES[x.dtype], *operands, *addresses, *sizes, kind, PARAMETER.get(kind, 0.0), False, 1, 0)
    return y, z


@dtypes
@pytest.mark.parametrize("kind", range(9), ids=NAMES)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 8, 1), (130, 136, 65), (257, 264, 200)])
def test_forward(kernels, dtype, kind, rows, columns, depth):
    x = padded(torch.randn(rows, depth).to(dtype), -depth % 8 + 8)
    w = padded((torch.randn(columns, depth) / depth**0.5).to(dtype), -depth % 8)
    bias = torch.randn(columns).to(dtype) if kind != 1 else None
    y, z = linear(kernels, x, w, bias, kind, with_z=kind in (1, 6, 7, 8))
    exact = x.double() @ w.double().T + (bias.double() if bias is not None else 0)
    sizes = x.double().abs() @ w.double().abs().T + 1
    assert_close(y, apply(exact, kind), sizes)
    if z:
        assert_close(z, exact, sizes)


@dtypes
@pytest.mark.parametrize(("rows", "columns", "depth"), [(200, 264, 1096), (504, 504, 1096)], ids=["narrow", "wide"])
def test_long(kernels, dtype, rows, columns, depth):
    x, w, bias = (
        torch.randn(rows, depth).to(dtype),
        (torch.randn(columns, depth) / depth**0.5).to(dtype),
        torch.randn(columns).to(dtype),
    )
    y, z = linear(kernels, x, w, bias, 8, with_z=True)
    exact = x.double() @ w.double().T + bias.double()
    sizes = x.double().abs() @ w.double().abs().T + 1
    assert_close(y, apply(exact, 8), sizes)
    assert_close(z, exact, sizes)


def test_supports():
    kernels = emulation.load()
    good = {"dtype": 1, "x": 16, "x_row": 64, "x_column": 1, "w": 32, "w_row": 72, "w_column": 1, "y": 48, "z": 0}
    good |= {"M": 5, "N": 16, "K": 64}

    def supports(**changes: int) -> bool:
        return kernels.hopper_supports(*(good | changes).values())

    assert supports() and supports(dtype=2) and supports(z=64) and supports(M=1, x_row=3) and supports(K=61)
    for change in [{"dtype": 0}, {"dtype": 3}, {"x": 8}, {"w": 2}, {"y": 8}, {"z": 8}, {"x_row": 65}, {"x_row": 56}]:
        assert not supports(**change), change
    for change in [
        {"w_row": 0},
        {"x_column": 2},
        {"w_column": 5},
        {"M": 0},
        {"N": 0},
        {"K": 0},
        {"N": 12},
        {"M": 1 << 31},
    ]:
        assert not supports(**change), change
