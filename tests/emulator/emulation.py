"""Builds what the emulator's tests run: the module _emulated and the zoo of test kernels, plain or under a sanitizer.

Objects are kept under build/emulator by a hash of all that went into them, so a second run compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import plant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "emulator"

COMMON = ["-std=c++20", "-DFDL_EMULATE", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall", "-Wextra"]
COMMON += ["-Wno-unknown-pragmas"]  # "unroll"
# For each mode: what kernels are compiled with (from -O1 on GCC may remove a bad access before ASan sees it), what the
# runtime is compiled with (never a sanitizer; under TSan it must not call memcpy for a thread), and what is linked.
MODES = {
    "plain": (["-O1"], ["-O2"], []),
    "asan": (
        ["-Og", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
        ["-O2", "-DEMU_ASAN"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": (
        ["-Og", "-fno-omit-frame-pointer", "-fsanitize=thread"],
        ["-O2", "-DEMU_TSAN", "-fno-builtin", "-fno-tree-loop-distribute-patterns"],
        ["-fsanitize=thread"],
    ),
}


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


@functools.cache
def cuda_include() -> Path | None:
    """The CUDA toolkit's headers, or None: CUDA's types are needed, its compiler and libraries are not."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    if nvcc := shutil.which("nvcc"):  # it may be a script that starts the real one
        plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        homes += [Path(line.partition("TOP=")[2].strip()) for line in plan.splitlines() if "TOP=" in line]
        homes.append(Path(nvcc).resolve().parent.parent)
    return next((home / "include" for home in homes if (home / "include" / "cuda_bf16.h").is_file()), None)


def why_unavailable(mode: str = "plain") -> str | None:
    """Why this machine can't build or run a mode; None if it can."""
    if platform.system() != "Linux":
        return "the emulator needs Linux"
    if compiler() is None:
        return "no C++ compiler"
    if cuda_include() is None:
        return "no CUDA headers: set CUDA_HOME"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11: pip install pybind11"
    if mode != "plain" and not runtime_library(mode):
        return f"the compiler has no library for {mode}"
    if mode == "tsan" and not shutil.which("setarch"):
        return "no setarch: TSan needs a fixed address layout"
    return None


def runtime_library(mode: str) -> Path | None:
    """The sanitizer's own library, which Python must preload; None if the compiler has none."""
    name = f"lib{mode}.so"
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return Path(found) if found != name else None


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")


@functools.cache
def _contents(source: Path, *folders: Path) -> tuple[tuple[Path, bytes], ...]:
    """A source and all of ours that it includes from beside it or these folders, with their bytes."""
    found: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = path.read_bytes()
            names = re.findall(rb'^\s*#\s*include\s+"([^"]+)"', found[path], re.MULTILINE)
            places = (path.parent, *folders)
            waiting += [file for name in names for place in places if (file := place / name.decode()).is_file()]
    return tuple(sorted(found.items()))


@functools.cache
def _compiler_version() -> bytes:
    return subprocess.run([compiler(), "--version"], capture_output=True).stdout


def _object(source: Path, flags: list[str]) -> Path:
    """Compiles one source, unless that has been done."""
    # Relative to ROOT, where it runs: a copy of the tree finds the same objects.
    include = [f"-I{folder.relative_to(ROOT)}" for folder in (HERE, KERNELS)]
    command = [compiler(), *COMMON, *flags, *include, "-isystem", str(cuda_include())]
    folders = [ROOT / flag.removeprefix("-I") for flag in (*flags, *include) if flag.startswith("-I")]
    contents = [part for path, text in _contents(source, *folders) for part in (path.name.encode(), text)]
    key = hashlib.sha256(b"\0".join([_compiler_version(), *contents, "\0".join(command).encode()])).hexdigest()
    target = CACHE / "objects" / f"{source.stem}-{key[:20]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")  # another process may be building the same
        _run([*command, "-x", "c++", "-c", str(source.relative_to(ROOT)), "-o", str(unfinished)])
        unfinished.replace(target)
    return target


def _link(name: str, mode: str, sources: dict[Path, list[str]], flags: list[str]) -> Path:
    kernel_flags, runtime_flags, link_flags = MODES[mode]
    jobs = {
        HERE / "cuda_emu.cpp": runtime_flags,
        **{source: [*kernel_flags, *extra] for source, extra in sources.items()},
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(_object, jobs, jobs.values())]
    names = [Path(path).name for path in objects]  # made of their contents
    key = hashlib.sha256("\0".join([*names, *link_flags, *flags]).encode()).hexdigest()
    target = CACHE / f"{mode}-{key[:20]}" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{name}.{os.getpid()}")
        _run([compiler(), *link_flags, *flags, *objects, "-o", str(unfinished)])
        unfinished.replace(target)
    return target


def zoo(mode: str = "plain") -> Path:
    """The executable of test kernels."""
    sources = {source: [] for source in [HERE / "zoo" / "main.cpp", *_zoo_kernels()]}
    planted = (("hopper", "matmul_sm90.cuh"), ("conv", "conv.cuh"), ("rnn", "rnn.cuh"))
    planted += (("attention", "attention.cu"), ("attention", "attention_backward.cu"))
    for name, source in planted:
        sources[HERE / "zoo" / f"{name}.cu"].append(f"-I{_planted(source).relative_to(ROOT)}")
    return _link("zoo", mode, sources, [])


def confirm(mode: str = "plain") -> Path:
    """The probes that a GPU runs, and the library's Hopper kernels, as an executable for the emulator."""
    return _link("confirm_sm90", mode, {HERE / "zoo" / "confirm_sm90.cu": []}, [])


def _planted(header: str) -> Path:
    """The folder of planted_{header}: a kernel's source with bugs to choose from."""
    text = plant.plant((KERNELS / header).read_text(), plant.BUGS[header])
    folder = CACHE / "planted" / hashlib.sha256(text.encode()).hexdigest()[:20]
    target = folder / f"planted_{header}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(target)
    return folder


def _zoo_kernels() -> list[Path]:
    return [path for path in sorted(HERE.glob("zoo/*.cu")) if not path.stem.startswith("confirm")]


def module(mode: str = "plain") -> Path:
    """The extension module _emulated: csrc/cuda with its own bindings."""
    import pybind11

    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    sources = {source: python if source.suffix == ".cpp" else [] for source in sorted(KERNELS.glob("*.c*"))}
    sources = {source: extra for source, extra in sources.items() if source.suffix in (".cu", ".cpp")}
    sources[HERE / "module.cpp"] = python
    return _link(f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}", mode, sources, ["-shared"])


@functools.cache
def load(mode: str = "plain") -> ModuleType:
    """Builds and imports _emulated."""
    spec = importlib.util.spec_from_file_location("_emulated", module(mode))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def run(mode: str, command: list[str | Path], timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Runs an executable of this mode, or Python if it is a script; all output is in the result's stdout."""
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "report_bugs=1 exitcode=0",
    }
    if Path(command[0]).suffix == ".py":
        command = [sys.executable, *command]
        libraries = [runtime_library(mode)] if mode != "plain" else []
        stdcxx = subprocess.run([compiler(), "-print-file-name=libstdc++.so"], capture_output=True, text=True).stdout
        environment["LD_PRELOAD"] = " ".join(
            map(str, [*libraries, stdcxx.strip()])
        )  # libstdc++: else ASan misses throws
    if mode == "tsan":
        command = ["setarch", "-R", *command]
    return subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or MODES:
        print(module(name), zoo(name), sep="\n")
