"""Choosing a backend, by name and by auto, and telling which one it was."""

from __future__ import annotations

import threading

import pytest
import torch
from suite import backends

import fastdl
from fastdl import dispatch
from fastdl.ops.linear import LINEAR


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend.*triton.*auto.*'metal'"):
        fastdl.use_backend("metal")


def test_use_backend_sets_and_restores():
    fastdl.use_backend("torch")
    assert dispatch.state.requested == "torch"
    with fastdl.use_backend("auto"):
        assert dispatch.state.requested == "auto"
    assert dispatch.state.requested == "torch"
    with pytest.raises(KeyError), fastdl.use_backend("auto"):
        raise KeyError
    assert dispatch.state.requested == "torch"


def test_a_named_backend_is_strict():
    x = torch.zeros(2, 3, dtype=torch.complex64)
    for name in ("cpu", "triton", "cuda"):
        with fastdl.use_backend(name), pytest.raises(fastdl.UnsupportedError, match=f"linear.*{name!r}"):
            fastdl.functional.linear(x, x)


def test_a_backend_without_its_device_says_so():
    x = torch.zeros(2, 3, device="meta")
    with fastdl.use_backend("cpu"), pytest.raises(fastdl.UnsupportedError, match="device 'meta', allowed: cpu"):
        fastdl.functional.relu(x)


def test_trace_lists_calls_with_backend_and_reason():
    x = torch.randn(2, 3)
    with fastdl.trace() as outer:
        fastdl.functional.relu(x.to(torch.complex64).real.to_sparse().to_dense())
        with fastdl.trace() as inner, fastdl.use_backend("torch"):
            fastdl.functional.linear(x, x)
    assert [call.op for call in outer] == ["activation", "linear"]
    assert [(call.op, call.backend, call.reason) for call in inner] == [("linear", "torch", "named by use_backend")]
    assert inner[0].shapes == ((2, 3), (2, 3)) and inner[0].dtype == torch.float32
    assert "linear" in str(inner[0])
    fastdl.functional.relu(x)
    assert len(outer) == 2


def test_auto_gives_its_reason():
    x = torch.zeros(2, 3, dtype=torch.complex64)
    with fastdl.trace() as calls:
        fastdl.functional.linear(x, x)
    (call,) = calls
    assert call.backend == "torch" and "complex64" in call.reason


@pytest.mark.parametrize("backend", backends("cpu"))
def test_a_selection_is_made_once_for_a_shape(backend, monkeypatch):
    x = torch.randn(2, 3)
    with fastdl.use_backend(backend):
        fastdl.functional.linear(x, x)
        monkeypatch.setattr(LINEAR, "_choose", lambda *_: pytest.fail("chosen again"))
        fastdl.functional.linear(x.clone(), x)


@pytest.mark.parametrize("backend", backends("cpu"))
def test_threads_may_call_at_once(backend):
    x, w = torch.randn(64, 128), torch.randn(96, 128)
    expected = torch.relu(x @ w.t())
    failures = []

    def work():
        for _ in range(50):
            y = fastdl.functional.linear(x, w, activation="relu")
            if not torch.allclose(y, expected, rtol=1e-4, atol=1e-4):
                failures.append((y - expected).abs().max())

    with fastdl.use_backend(backend):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_support_is_stated_for_every_implementation():
    for op in dispatch.OPS.values():
        for backend in op.implementations:
            assert backend == "torch" or op.support[backend].dtypes
