"""What every family's tests share: the backends of this machine, and the comparison with float64 and torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import fastdl
from fastdl import accuracy, dispatch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def device_of(backend: str) -> str:
    """Where a backend's tensors live on this machine."""
    return "cuda" if torch.cuda.is_available() and backend in ("triton", "cuda") else "cpu"


def backends(*names: str) -> list:
    """pytest parameters: the named backends; one that cannot run here is skipped with its reason."""
    parameters = []
    for name in names or ("torch", "cpu", "triton", "cuda"):
        reason = dispatch.why_unavailable(name, device_of(name))
        marks = [pytest.mark.skip(reason=f"{name}: {reason}")] if reason else []
        parameters.append(pytest.param(name, marks=marks))
    return parameters


def dtypes(op: str, backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes that a backend's implementation of an op states."""
    return FLOATING if backend == "torch" else dispatch.OPS[op].support[backend].dtypes


def name_of(value: object) -> str:
    """Readable test ids."""
    return str(value).removeprefix("torch.")


def evaluate(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], grad_output: Tensor | None, needs: Sequence[str]
) -> dict[str, Tensor]:
    """The output and every gradient of function(**inputs), by name."""
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    for name in needs:
        inputs[name].requires_grad_()
    output = function(**inputs)
    results = {"output": output.detach()}
    if needs:
        grads = torch.autograd.grad(output, [inputs[name] for name in needs], grad_output)
        results.update({f"gradient of {name}": grad for name, grad in zip(needs, grads, strict=True)})
    return results


def as_double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU, with strides kept where they repeat elements."""
    return tensor.detach().cpu().double()


def compare(
    backend: str,
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    grad_output: Tensor | Callable[[Tensor], Tensor] | None = None,
    needs: Sequence[str] | None = None,
    multiple: float = accuracy.MULTIPLE,
) -> dict[str, Tensor]:
    """Asserts that ``ours`` on a backend is no worse than a multiple of torch's own error, output and gradients.

    Also: dtypes, shapes and devices are torch's, inputs stay as they were. Returns ours by name.
    """
    needs = list(inputs) if needs is None else list(needs)
    exact_inputs = {name: as_double(tensor) for name, tensor in inputs.items()}
    output = theirs(**exact_inputs)
    if grad_output is None:
        grad_output = torch.randn(output.shape, dtype=torch.float64).to(next(iter(inputs.values())).dtype)
    elif callable(grad_output):
        grad_output = grad_output(output)
    exact = evaluate(theirs, exact_inputs, as_double(grad_output), needs)
    device = device_of(backend)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    grad_output = grad_output.to(device)
    before = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    torchs = evaluate(theirs, inputs, grad_output, needs)
    with fastdl.use_backend(backend), fastdl.trace() as calls:
        results = evaluate(ours, inputs, grad_output, needs)
    assert calls and {call.backend for call in calls} == {backend}
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]) or tensor.isnan().any(), f"{name} was changed"
    for name, expected in torchs.items():
        actual = results[name]
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device), name
        error = accuracy.error(actual.cpu(), exact[name])
        bound = accuracy.bound(accuracy.error(expected.cpu(), exact[name]), actual.dtype, multiple)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"
    return results


def assert_special_values(actual: Tensor, torchs: Tensor, limit: Tensor) -> None:
    """As torch, or, where torch's own formula overflows, as the limit (float64, of finite stand-ins)."""
    close = torch.isclose(actual.cpu(), torchs.cpu(), rtol=1e-5, atol=1e-6, equal_nan=True)
    limit = torch.where(limit.abs() > 1e37, limit.sign() * float("inf"), limit)
    big = torch.where(actual.cpu().abs() > 1e37, actual.cpu().sign() * float("inf"), actual.cpu())
    close |= torch.isclose(big.double(), limit, rtol=1e-5, atol=1e-6)
    assert close.all(), (actual, torchs, limit)


def assert_repeats(backend: str, function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    """Three calls of function(**inputs) give the same bits, and so do their gradients."""
    inputs = {name: tensor.detach().to(device_of(backend)).requires_grad_() for name, tensor in inputs.items()}
    with fastdl.use_backend(backend):
        outputs = [function(**inputs) for _ in range(3)]
        first, *rest = [[y, *torch.autograd.grad(y.sum(), list(inputs.values()))] for y in outputs]
    for other in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
