"""Builds fastdl._C: C++ kernels for each instruction set and, where nvcc is found, CUDA kernels. Never imports torch.

FASTDL_CUDA=auto (the default) compiles the CUDA kernels if nvcc is found, 1 makes a missing nvcc an error, 0 leaves
them out. Without a compiler the package works too; what was left out is told loudly here, and by fastdl.info().
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# No sm_103: nvcc 13.0 made wrong code for it, and sm_100's runs there. The PTX serves every other newer GPU.
CUDA_TARGETS = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100": "arch=compute_100,code=sm_100",
    "compute_80": "arch=compute_80,code=compute_80",
}
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


def say(message: str) -> None:
    """Tells the user, through pip's silence where it allows that."""
    print(f"fastdl: {message}", file=sys.stderr, flush=True)


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME, or the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    return Path(found) if found else None


def cuda_home(nvcc: Path) -> Path:
    """Where the toolkit's headers and libraries are; nvcc may be a script that starts the real one."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in plan.stderr.splitlines():
        if "TOP=" in line:
            return Path(line.partition("TOP=")[2].strip()).resolve()
    return nvcc.resolve().parent.parent


def cuda_version(nvcc: Path) -> str:
    """Such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return text.partition("release ")[2].partition(",")[0] or "unknown"


def pybind11_include() -> str:
    """pybind11's headers: its own package's or, where that is missing (an offline machine), torch's copy."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return str(pybind11.get_include())
    torch = importlib.util.find_spec("torch")  # found, not imported
    for folder in torch.submodule_search_locations or () if torch else ():
        if (include := Path(folder) / "include").joinpath("pybind11").is_dir():
            return str(include)
    raise Refusal("pybind11's headers are missing: pip install pybind11")


def _included(dependencies: Path) -> list[Path]:
    """What a compiler's dependency file names: "target: source header ...", over lines that end in a backslash."""
    text = dependencies.read_text() if dependencies.exists() else ""
    return [Path(name) for name in shlex.split(text.replace("\\\n", " ").partition(": ")[2])]


class Refusal(SystemExit):
    """Ends the build with a message. Not one of setuptools' errors: those it forgives an optional extension."""

    def __init__(self, message: str) -> None:
        super().__init__(f"fastdl: {message}")


class Build(build_ext):
    """Compiles the extension's parts in parallel, each source once per target, and only what has changed."""

    def build_extension(self, extension: Extension) -> None:
        """Builds fastdl._C, or says why there is none."""
        mode = os.environ.get("FASTDL_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            raise Refusal(f"FASTDL_CUDA must be auto, 1 or 0; got {mode!r}")
        nvcc = find_nvcc() if mode != "0" else None
        if mode == "1" and nvcc is None:
            raise Refusal("FASTDL_CUDA=1, but there is no nvcc: put it on the PATH or set CUDA_HOME")
        compiler = self._compiler()
        if compiler is None:
            if mode == "1":
                raise Refusal("FASTDL_CUDA=1, but there is no C++ compiler: install g++ or set CXX")
            say("no C++ compiler found: installing without compiled kernels. Install g++ (or set CXX) and reinstall.")
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # of a build from before
            return
        self.objects = ROOT / "build" / "objects"  # not pip's temporary folder: a change costs only what it touches
        self.objects.mkdir(parents=True, exist_ok=True)
        isas = self._instruction_sets(compiler)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self._compile, self._cpu_jobs(compiler, isas)))
            try:
                objects += pool.map(self._compile, self._cuda_jobs(compiler, nvcc) if nvcc else [])
            except Refusal as refusal:
                if mode == "1":
                    raise
                say(f"installing without CUDA kernels, since {refusal}")
                nvcc = None
        objects += map(self._compile, self._bindings_jobs(compiler, "csrc", nvcc, isas))
        self._link(compiler, objects, nvcc)
        cuda = f"CUDA kernels for {', '.join(CUDA_TARGETS)} by nvcc {cuda_version(nvcc)}" if nvcc else "no CUDA kernels"
        why = "" if nvcc else " (FASTDL_CUDA=0)" if mode == "0" else " (no nvcc on the PATH, no CUDA_HOME)"
        say(f"compiled CPU kernels for {', '.join(isas)}; {cuda}{why}")

    def _compiler(self) -> list[str] | None:
        for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
            if candidate and shutil.which(shlex.split(candidate)[0]):
                return shlex.split(candidate)
        return None

    def _instruction_sets(self, compiler: list[str]) -> dict[str, list[str]]:
        """The instruction sets that this compiler knows, with their flags."""
        flags = json.loads((ROOT / "csrc/cpu/isas.json").read_text())
        # CI insists on no warning; a user's newer compiler may have new ones.
        strict = os.environ.get("FASTDL_WERROR") == "1"
        self.common = [flag for flag in flags.pop("common") if strict or flag != "-Werror"]
        known = {}
        for isa, options in flags.items():
            probe = [*compiler, *options, "-E", "-x", "c++", os.devnull, "-o", os.devnull]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                known[isa] = options
            else:
                say(f"this compiler does not know {isa}: left out")
        return known

    def _cpu_jobs(self, compiler: list[str], isas: dict[str, list[str]]) -> list[tuple]:
        sources = [path for path in sorted(ROOT.glob("csrc/cpu/*.cpp")) if not path.name.startswith("bindings")]
        jobs = [
            (source, self.objects / f"cpu-{source.stem}-{isa}.o", [*compiler, *self.common, *options, f"-DISA={isa}"])
            for source in sources
            for isa, options in isas.items()
        ]
        return [*jobs, *self._bindings_jobs(compiler, "csrc/cpu", None, isas)]

    def _cuda_jobs(self, compiler: list[str], nvcc: Path) -> list[tuple]:
        targets = [flag for target in CUDA_TARGETS.values() for flag in ("-gencode", target)]
        werror = ["-Werror", "all-warnings"] if os.environ.get("FASTDL_WERROR") == "1" else []
        jobs = []
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            target = self.objects / f"cuda-{source.stem}.o"
            # The machine code of each architecture stays beside the object, to be looked at.
            kept = target.with_suffix("")
            kept.mkdir(exist_ok=True)
            keep = ["--keep", "--keep-dir", str(kept)]
            jobs.append((source, target, [str(nvcc), *CUDA_FLAGS, *werror, *targets, *keep]))
        return [*jobs, *self._bindings_jobs(compiler, "csrc/cuda", nvcc, {})]

    def _bindings_jobs(
        self, compiler: list[str], folder: str, nvcc: Path | None, isas: dict[str, list[str]]
    ) -> list[tuple]:
        include = [pybind11_include(), sysconfig.get_path("include")]
        defines = ["-DFASTDL_CPU", *[f"-DFASTDL_ISA_{isa.upper()}" for isa in isas]]
        if nvcc:
            defines.append("-DFASTDL_CUDA")
            include.append(str(cuda_home(nvcc) / "include"))
        flags = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
        system = [flag for path in include for flag in ("-isystem", path)]
        command = [*compiler, *flags, *defines, *system]
        sources = sorted((ROOT / folder).glob("bindings*.cpp"))
        return [(source, self.objects / f"{source.parent.name}-{source.stem}.o", command) for source in sources]

    def _compile(self, job: tuple) -> Path:
        source, target, command = job
        includes, stamp = target.with_suffix(".d"), target.with_suffix(".stamp")
        command = [*command, "-MMD", "-MF", str(includes), "-c", str(source), "-o", str(target)]
        if target.exists() and stamp.exists() and stamp.read_text() == self._stamp(command, includes):
            stamp.touch()  # bench/machine_code.py asks whether what lies here is of these sources
            return target
        began = time.time()
        self._run(command)
        for path in target.with_suffix("").glob("*"):
            if path.suffix not in (".cubin", ".ptx"):
                path.unlink()
        stamp.write_text(self._stamp(command, includes))
        if max(path.stat().st_mtime for path in _included(includes)) >= began:  # an edit came in between
            stamp.unlink()
        return target

    def _stamp(self, command: list[str], includes: Path) -> str:
        """The command, and the content of all that the source includes, by which an object is known."""
        digest = hashlib.sha256()
        for path in _included(includes):
            digest.update(path.read_bytes() if path.exists() else os.urandom(16))  # what is missing never matches
        return f"{shlex.join(command)}\n{digest.hexdigest()}\n"

    def _link(self, compiler: list[str], objects: list[Path], nvcc: Path | None) -> None:
        target = Path(self.get_ext_fullpath("fastdl._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = []
        if nvcc:
            home = cuda_home(nvcc)
            folders = [home / "lib64", *home.glob("targets/*/lib")]
            libraries = [f"-L{folder}" for folder in folders if folder.is_dir()]
            libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        command = [*compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(target), *libraries]
        self._run(command)
        # A shared object links with symbols missing; here it says which.
        self._run([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1], mode=2)", str(target)])

    def _run(self, command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise Refusal(f"this failed: {shlex.join(command)}\n{result.stderr}")


setup(ext_modules=[Extension("fastdl._C", [], optional=True)], cmdclass={"build_ext": Build})
