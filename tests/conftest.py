"""The one suite's fixtures: backends, isolation from the user's cache, poisoned memory."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

os.environ["FASTDL_CACHE"] = tempfile.mkdtemp(prefix="fastdl-test-")  # never the user's own verdicts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fastdl
from fastdl import dispatch
from fastdl.testing import interpret_triton


def load_emulator() -> None:
    """Lets the CUDA kernels run on CPU tensors, where there is no GPU."""
    folder = Path(__file__).parent / "emulator"
    if not (folder / "emulation.py").is_file():
        return
    sys.path.insert(0, str(folder))
    import emulation

    if emulation.why_unavailable() is None:
        dispatch.state.emulator = emulation.load()


if not torch.cuda.is_available():
    interpret_triton()
    load_emulator()


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
