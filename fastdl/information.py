"""What is installed, what was compiled, what is missing and how to get it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from typing import Any

import torch

from fastdl import dispatch, proof
from fastdl._version import __version__


class Information(dict[str, Any]):
    """The answer of :func:`info`: a dict that prints as lines."""

    def __str__(self) -> str:
        lines = []
        for key, value in self.items():
            if isinstance(value, dict):
                lines.append(f"{key}:")
                lines.extend(f"  {name}: {text}" for name, text in value.items())
            else:
                lines.append(f"{key}: {value}")
        return "\n".join(lines)


def info() -> Information:
    """Versions, devices, what each backend can do here, what is missing and how to get it; nested dicts of strings."""
    native = dispatch.native()
    answer = Information(
        fastdl=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton") or "not installed; pip install triton",
    )
    answer["devices"] = _devices()
    answer["extension"] = (
        f"not usable: {dispatch.native_error()}"
        if native is None
        else "compiled: " + ", ".join(part for part in ("cpu", "cuda") if hasattr(native, part))
    )
    cpu = getattr(native, "cpu", None)
    if cpu is not None:
        answer["cpu kernels"] = f"{cpu.isa()} (this processor runs: {', '.join(cpu.available())})"
    cuda = getattr(native, "cuda", None)
    if cuda is not None:
        answer["cuda kernels"] = f"{', '.join(cuda.targets())}, nvcc {cuda.version()}"
    answer["backends"] = {backend: _backend(backend) for backend in dispatch.BACKENDS}
    answer["backend chosen"] = dispatch.state.requested
    answer["verdicts of this machine"] = dict(proof.verdicts()) or "none yet"
    return answer


def _backend(backend: str) -> str:
    if backend == "torch":
        return "ready: the reference"
    device = "cpu" if backend == "cpu" else "cuda"
    problem = dispatch.why_unavailable(backend, device)
    if problem is None and device == "cuda" and not torch.cuda.is_available():
        problem = "no NVIDIA GPU that torch can use" if torch.version.cuda else "this torch is built without CUDA"
    if problem is not None and backend == "triton" and dispatch.interpreting():
        return f"in the interpreter only, on CPU tensors: {problem}"
    return "ready" if problem is None else f"not usable: {problem}"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{proof.processor()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return devices


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def support_table() -> str:
    """What each op has on each backend, as a Markdown table, from the ops' own statements."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    columns = [backend for backend in dispatch.BACKENDS if backend != "torch"]
    lines = ["| op | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for op in dispatch.OPS.values():
        cells = []
        for backend in columns:
            support = op.support.get(backend)
            dtypes = "" if support is None else " ".join(short[dtype] for dtype in support.dtypes)
            cells.append(f"{dtypes}; {support.note}" if support is not None and support.note else dtypes)
        lines.append(f"| {op.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
