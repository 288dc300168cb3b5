"""The CUDA kernels of embedding, emulated: every order of execution, and what lies around the arrays."""

from __future__ import annotations

import emulation
import pytest
import torch
from test_kernels import DTYPES, Placed, assert_close, dtypes, kernels

__all__ = ["kernels"]  # a fixture
pytestmark = pytest.mark.skipif(emulation.why_unavailable() is not None, reason=str(emulation.why_unavailable()))

# Indices that come once, in runs of all lengths, and one run over many chunks; columns in vectors and not.
CASES = [(7, 5, 8), (300, 40, 16), (200, 3, 9), (170, 1, 24), (33, 1, 1), (32, 2, 300)]


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_embedding(kernels, case, dtype):
    count, rows, columns = case
    code, wide = DTYPES[dtype], torch.float64 if dtype == torch.float64 else torch.float32
    indices = torch.randint(0, rows, (count,))
    for offset in (0, 1):  # aligned for vectors or not
        table, output = Placed(torch.randn(rows, columns), dtype, offset), Placed((count, columns), dtype, offset)
        kernels.embedding(code, table.address, indices.data_ptr(), output.address, *case, 0)
        assert output.untouched_around() and torch.equal(output.tensor, table.tensor[indices])

        grad = Placed(torch.randn(count, columns), dtype, offset)
        index, order = torch.sort(indices, stable=True)
        for scaled, padding in ((False, -1), (True, 0)):
            gradient = Placed(torch.zeros(rows, columns), dtype, offset)
            scale = Placed(indices.bincount(minlength=rows)[index].to(wide).reciprocal(), wide)
            workspace = Placed((kernels.embedding_workspace(code, count, columns) // wide.itemsize,), wide)
            kernels.embedding_backward(
                code,
                grad.address,
                index.data_ptr(),
                order.data_ptr(),
                scale.address if scaled else 0,
                gradient.address,
                *case,
                padding,
                workspace.address,
                0,
            )
            exact = torch.zeros(rows, columns, dtype=torch.float64).index_add(0, indices, grad.tensor.double())
            if scaled:
                exact /= indices.bincount(minlength=rows).clamp(min=1)[:, None]
                exact[padding] = 0
            assert workspace.untouched_around()
            assert_close(gradient, exact, scale=count)


def test_an_index_that_is_no_row_is_not_read(kernels):
    table, output = Placed(torch.randn(5, 8), torch.float32), Placed((4, 8), torch.float32)
    indices = torch.tensor([0, -1, 5, 2**60])
    kernels.embedding(0, table.address, indices.data_ptr(), output.address, 4, 5, 8, 0)
    assert output.untouched_around() and output.tensor.isnan().all(1).tolist() == [False, True, True, True]
    index, order = torch.sort(indices, stable=True)
    grad, gradient = Placed(torch.randn(4, 8), torch.float32), Placed(torch.zeros(5, 8), torch.float32)
    workspace = Placed((kernels.embedding_workspace(0, 4, 8) // 4,), torch.float32)
    arguments = index.data_ptr(), order.data_ptr(), 0, gradient.address, 4, 5, 8, -1, workspace.address, 0
    kernels.embedding_backward(0, grad.address, *arguments)
    assert gradient.untouched_around() and torch.equal(gradient.tensor[0], grad.tensor[0])
    assert not gradient.tensor[1:].any()


def test_bad_arguments_are_named():
    kernels = emulation.load()
    one = torch.zeros(16).data_ptr()
    for message, arguments in {
        "embedding: dtype must be .* got 4": (4, one, one, one, 1, 1, 1, 0),
        "embedding: count must be at least 1, got 0": (0, one, one, one, 0, 1, 1, 0),
        "embedding: columns must be at least 1, got 0": (0, one, one, one, 1, 1, 0, 0),
        "embedding: weight must be an address": (0, 0, one, one, 1, 1, 1, 0),
        "embedding: indices must be an address": (0, one, 0, one, 1, 1, 1, 0),
        "embedding: output must be an address": (0, one, one, 0, 1, 1, 1, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            kernels.embedding(*arguments)
    with pytest.raises(ValueError, match="embedding_backward: workspace must be an address"):
        kernels.embedding_backward(0, one, one, one, 0, one, 1, 1, 1, -1, 0, 0)
