"""info(): what it tells, how it prints, and that nothing that is broken keeps the package from importing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import fastdl
from fastdl import dispatch

PACKAGE = Path(fastdl.__file__).parent


def run(*arguments: str, folder: Path) -> str:
    """What a new Python prints that finds the package in ``folder``, and no other: -S leaves out editable installs."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(torch.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, "-S", *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_info_tells_versions_devices_extension_and_every_backend():
    info = fastdl.info()
    assert info["fastdl"] == fastdl.__version__
    assert info["python"] == platform.python_version()
    assert info["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in info["devices"]["cpu"]
    assert len(info["devices"]) == 1 + torch.cuda.device_count()
    assert set(info["backends"]) == set(dispatch.BACKENDS)
    assert info["backends"]["torch"] == "ready: the reference"
    assert {"triton", "extension", "backend chosen", "verdicts of this machine"} <= set(info)


def test_info_says_ready_exactly_where_a_backend_can_be_named():
    for backend, text in fastdl.info()["backends"].items():
        device = "cuda" if backend in ("triton", "cuda") else "cpu"
        usable = dispatch.why_unavailable(backend, device) is None and (device == "cpu" or torch.cuda.is_available())
        assert text.startswith("ready") == usable, backend
        if not usable:
            assert len(text.partition(": ")[2]) > 10, f"{backend}: no reason in {text!r}"


def test_info_tells_what_was_compiled():
    native = dispatch.native()
    if native is None:
        assert dispatch.native_error() in fastdl.info()["extension"]
        return
    parts = [part for part in ("cpu", "cuda") if hasattr(native, part)]
    info = fastdl.info()
    assert info["extension"] == f"compiled: {', '.join(parts)}"
    assert ("cpu kernels" in info, "cuda kernels" in info) == ("cpu" in parts, "cuda" in parts)
    if "cpu" in parts:
        assert info["cpu kernels"].startswith(native.cpu.isa())
        assert all(isa in info["cpu kernels"] for isa in native.cpu.available())
    if "cuda" in parts:
        assert all(target in info["cuda kernels"] for target in native.cuda.targets())
        assert native.cuda.version() in info["cuda kernels"]


def test_info_tells_the_backend_that_was_chosen():
    assert fastdl.info()["backend chosen"] == "auto"
    with fastdl.use_backend("torch"):
        assert fastdl.info()["backend chosen"] == "torch"


def test_info_prints_every_value_on_a_line_and_nested_ones_below_their_key():
    info = fastdl.info()
    lines = str(info).splitlines()
    expected = []
    for key, value in info.items():
        nested = value.items() if isinstance(value, dict) else ()
        expected += [f"{key}:" if nested else f"{key}: {value}", *(f"  {name}: {text}" for name, text in nested)]
    assert lines == expected and lines[0] == f"fastdl: {fastdl.__version__}"


def test_the_command_prints_info(tmp_path):
    lay_out(tmp_path)
    lines = run("-m", "fastdl", "info", folder=tmp_path).splitlines()
    assert f"fastdl: {fastdl.__version__}" in lines and f"torch: {torch.__version__}" in lines
    assert {"devices:", "backends:", "backend chosen: auto"} <= set(lines)


# --------------------------------------------------------------------------------------------------------- broken parts


WORKS_ON_TORCH = """
import torch, fastdl
with fastdl.trace() as calls:
    y = fastdl.functional.linear(torch.ones(2, 3), torch.ones(4, 3))
assert torch.equal(y, torch.full((2, 4), 3.0))
print(calls[0].backend, calls[0].reason)
print(fastdl.info())
"""


def lay_out(folder: Path) -> Path:
    """The package as an install lays it out, without its extension."""
    without = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "output", "kernels", "bench")
    package = Path(shutil.copytree(PACKAGE, folder / "fastdl", ignore=without))
    from fastdl import bench, kernels

    for part, name in ((kernels, "kernels"), (bench, "bench")):
        shutil.copytree(Path(part.__file__).parent, package / name, ignore=shutil.ignore_patterns("*cache*", "output"))
    return package


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("_C.py", "raise ImportError('libcudart.so.99: cannot open shared object file')", "libcudart.so.99"),
        ("_C" + sysconfig.get_config_var("EXT_SUFFIX"), "no machine code", "fastdl._C does not load"),
        (None, "", "installed without compiled kernels"),
    ],
    ids=["a library is missing", "a broken file", "no extension"],
)
def test_a_broken_extension_does_not_stop_the_import_and_info_says_what_is_wrong(tmp_path, file, content, told):
    package = lay_out(tmp_path)
    if file is not None:
        (package / file).write_text(content)
    first, _, info = run("-c", WORKS_ON_TORCH, folder=tmp_path).partition("\n")
    assert first.startswith("torch cpu: ") and told in first and "reinstall" in first
    (extension,) = [line for line in info.splitlines() if line.startswith("extension: ")]
    assert "not usable" in extension and told in extension and "reinstall" in extension
    assert sum(told in line for line in info.splitlines()) >= 2  # the cpu backend tells it as well
    assert "  torch: ready: the reference" in info.splitlines()


def test_a_broken_triton_does_not_stop_the_import_and_info_says_what_is_wrong(tmp_path):
    lay_out(tmp_path)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    info = run("-c", WORKS_ON_TORCH, folder=tmp_path)
    (line,) = [line for line in info.splitlines() if line.startswith("  triton: ")]
    assert "not usable" in line and "libtriton.so: undefined symbol" in line and "pip install triton" in line
