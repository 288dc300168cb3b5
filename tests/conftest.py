"""The one suite's fixtures: backends, isolation from the user's cache, poisoned memory."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

os.environ["FASTDL_CACHE"] = tempfile.mkdtemp(prefix="fastdl-test-")  # never the user's own verdicts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fastdl
from fastdl import dispatch
from fastdl.testing import interpret_triton

if not torch.cuda.is_available():
    interpret_triton()


@pytest.fixture(autouse=True)
def isolation():
    """Each test starts at auto, with its own random numbers, and torch.empty gives NaN."""
    fastdl.use_backend("auto")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    fastdl.use_backend("auto")
    dispatch.forget_selections()
