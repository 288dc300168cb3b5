"""What only a GPU can show: races, streams, CUDA graphs, several devices, tensors past 2^31 elements."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastdl.bench import gpu
from fastdl.bench.correctness import Sample, step
from suite import backends

import fastdl
from fastdl import accuracy

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not ON_GPU, reason=gpu.NO_GPU)
CUDA = torch.device("cuda")
CASES = list(gpu.small_cases())
FEW = [case for case in CASES if "relu" in case.name or "gelu" in case.name]
BACKENDS = backends("triton", "cuda")
REPEATS = 250
NEEDED = 48 << 30  # bytes that the largest tests take


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """use_backend; a case that the backend has no kernel for is skipped."""
    try:
        with fastdl.use_backend(backend):
            yield
    except fastdl.UnsupportedError as error:
        pytest.skip(str(error))


def refill(target: Sample, source: Sample) -> None:
    """Copies values into a sample's own memory, on the current stream."""
    with torch.no_grad():
        for name, tensor in target.inputs.items():
            tensor.copy_(source.inputs[name])
        for tensor, values in zip(target.grad_outputs, source.grad_outputs, strict=True):
            tensor.copy_(values)


def poisoned(sample: Sample) -> Sample:
    """A copy whose values are all NaN."""
    copy = sample.copy()
    with torch.no_grad():
        for tensor in [*copy.inputs.values(), *copy.grad_outputs]:
            tensor.fill_(torch.nan)
    return copy


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns: NaN equals NaN, and 0 does not equal -0."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert [name for name in expected if not torch.equal(bits(actual[name]), bits(expected[name]))] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_are_bit_equal(case, backend):
    """In torch's deterministic mode, which the suite is in, a result that moves is a race."""
    sample, run = gpu.small_sample(case, CUDA), step(case, case.call)
    with using(backend):
        first = run(sample)
        moved = torch.zeros(len(first), dtype=torch.bool, device=CUDA)
        for _ in range(REPEATS - 1):  # no synchronisation: calls follow each other as closely as they can
            pairs = zip(run(sample).values(), first.values(), strict=True)
            moved |= torch.stack([(bits(a) != bits(b)).any() for a, b in pairs])
    assert [name for name, wrong in zip(first, moved.tolist(), strict=True) if wrong] == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_agree_where_order_is_free(case, backend):
    """Outside deterministic mode sums may be taken in any order: they differ by rounding and no more."""
    torch.use_deterministic_algorithms(False)
    sample, run = gpu.small_sample(case, CUDA), step(case, case.call)
    exact = {k: v.detach() for k, v in step(case, case.eager)(sample.copy(torch.float64)).items()}
    torchs = {k: accuracy.error(v, exact[k]) for k, v in step(case, case.eager)(sample).items()}
    with using(backend):
        for _ in range(REPEATS // 10):
            for name, value in run(sample).items():
                bound = accuracy.bound(torchs[name], value.dtype, accuracy.MULTIPLE_LONG_REDUCTION)
                assert accuracy.error(value, exact[name]) <= bound, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_side_stream(case, backend):
    """Inputs that come late on the caller's stream: a kernel on any other would read NaN."""
    sample, run = gpu.small_sample(case, CUDA), step(case, case.call)
    with using(backend):
        expected = run(sample)
        late, side = poisoned(sample), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)  # clock cycles, some milliseconds
            refill(late, sample)
            actual = run(late)
        side.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_graph_replays_with_new_values(case, backend):
    sample, run = gpu.small_sample(case, CUDA), step(case, case.call)
    with using(backend):
        expected = run(sample)
        static, side = sample.copy(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(static)  # compiles and allocates what is made once
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(static)
        refill(static, poisoned(sample))
        graph.replay()
        refill(static, sample)
        graph.replay()
        torch.cuda.synchronize()
    assert_same(results, expected)


def test_auto_in_a_graph_takes_what_is_proven():
    x, w = torch.randn(64, 64, device=CUDA), torch.randn(64, 64, device=CUDA)
    expected = F.linear(x, w).relu()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fastdl.functional.linear(x, w, activation="relu")
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_device_that_is_not_the_current_one(case, backend):
    other = torch.device("cuda:1")
    run = step(case, case.call)
    with using(backend):
        actual = run(gpu.small_sample(case, other))
        with torch.cuda.device(other):
            expected = run(gpu.small_sample(case, other))
    assert torch.cuda.current_device() == 0
    assert_same(actual, expected)


@pytest.fixture
def large_memory():
    """One test at a time, of all processes that share the GPU; skips where there is not enough."""
    with (Path(tempfile.gettempdir()) / "fastdl-large-memory").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        free = torch.cuda.mem_get_info()[0]
        if free < NEEDED:
            pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
        yield
        torch.cuda.empty_cache()


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_past_2_31_elements(backend, large_memory):
    torch.use_deterministic_algorithms(False)  # filling such outputs takes longer than the kernels
    x = torch.randn(2**31 + 1003, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    with using(backend):
        y = fastdl.functional.relu(x)
        (grad,) = torch.autograd.grad(y, x, y.detach())
    for start in range(0, len(x), 2**28):
        part = slice(start, start + 2**28)
        assert torch.equal(y[part], F.relu(x[part])), start
        assert torch.equal(grad[part], y[part]), start  # the gradient given was relu's output


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_past_2_31_elements(backend, large_memory):
    """More rows than a grid's second axis has blocks, and offsets of more than 32 bits in inputs and outputs."""
    torch.use_deterministic_algorithms(False)
    rows, features = 2**25 + 77, 64
    x = torch.randn(rows, features, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(features, features, device=CUDA) / 8).bfloat16().requires_grad_()
    b = torch.randn(features, device=CUDA).bfloat16().requires_grad_()
    with using(backend):
        y = fastdl.functional.linear(x, w, b, activation="relu")
        given = torch.randn(features, device=CUDA).bfloat16().expand(rows, features)
        grad_x, grad_w, grad_b = torch.autograd.grad(y, (x, w, b), given)
    x, w, b, y = (tensor.detach() for tensor in (x, w, b, y))
    exact_w, exact_b = torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    bound = accuracy.bound(2**-8, torch.bfloat16)  # as wrong as one rounding to bfloat16, or twice
    for start in range(0, rows, 2**22):
        part = slice(start, start + 2**22)
        exact = F.relu(F.linear(x[part].float(), w.float(), b.float())).double()
        assert accuracy.error(y[part], exact) <= bound, start
        dz = torch.where(y[part] > 0, given[part], 0).float()
        assert accuracy.error(grad_x[part], (dz @ w.float()).double()) <= bound, start
        exact_w += (dz.t() @ x[part].float()).double()
        exact_b += dz.double().sum(0)
    assert accuracy.error(grad_w, exact_w) <= bound
    assert accuracy.error(grad_b, exact_b) <= bound
