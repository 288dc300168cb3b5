"""What pip builds and installs, with and without nvcc, C++ compiler, Triton: in throw-away environments."""

from __future__ import annotations

import dataclasses
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastdl

build = pytest.importorskip("build")
pytestmark = pytest.mark.install

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(torch.__file__).resolve().parent.parent
HIDDEN = "fastdl", "setuptools", "pip", "_distutils_hack", "pybind11"


def environment_variables(folder: Path, **changes: str | None) -> dict[str, str]:
    """This process's variables, less what would let it shine through; None removes one."""
    own = {
        "PYTHONPATH",
        "FASTDL_CUDA",
        "FASTDL_WERROR",
        "FASTDL_CACHE",
        "TRITON_INTERPRET",
        "PYTHONHOME",
        "VIRTUAL_ENV",
        "CXX",
    }
    variables = {name: value for name, value in os.environ.items() if name not in own}
    variables |= {"FASTDL_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    for name, value in changes.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    return variables


def run(command: list, folder: Path, **changes: str | None) -> subprocess.CompletedProcess:
    """Runs a command in a folder; standard output and error are captured as text."""
    variables = environment_variables(folder, **changes)
    return subprocess.run([str(part) for part in command], cwd=folder, env=variables, capture_output=True, text=True)


def succeed(command: list, folder: Path, **changes: str | None) -> str:
    """Runs a command that must succeed; returns what it printed."""
    done = run(command, folder, **changes)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclasses.dataclass
class Workshop:
    """One environment with just what pyproject.toml requires, and one unpacked sdist in which every variant is built.

    Since setup.py compiles only what has changed, the variants share what they have in common.
    """

    folder: Path
    python: Path
    source: Path = Path()

    def build(self, kind: str, source: Path | None = None, **changes: str | None) -> tuple[Path, str]:
        """The sdist or wheel of a source folder, and what the build said; RuntimeError if it failed."""
        said = []

        def runner(command, cwd=None, extra_environ=None):
            variables = environment_variables(self.folder, **changes) | dict(extra_environ or {})
            done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
            said.append(done.stdout + done.stderr)
            done.check_returncode()

        builder = build.ProjectBuilder(source or self.source, python_executable=str(self.python), runner=runner)
        target = self.folder / f"{kind}-{len(list(self.folder.iterdir()))}"
        try:
            return Path(builder.build(kind, target)), "".join(said)
        except build.BuildBackendException:
            raise RuntimeError("".join(said)) from None

    def path_of(self, *tools: str) -> str:
        """A PATH on which there are these tools and nothing else."""
        folder = self.folder / f"path-{'-'.join(tools) or 'empty'}"
        folder.mkdir(exist_ok=True)
        for tool in tools:
            found, link = shutil.which(tool), folder / tool
            if found and not link.exists():
                link.symlink_to(found)
        return str(folder)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """The build environment and the sdist, made once."""
    folder = tmp_path_factory.mktemp("workshop")
    succeed([sys.executable, "-m", "venv", "--without-pip", folder / "environment"], folder)
    shop = Workshop(folder, folder / "environment/bin/python")
    requires = sorted(build.ProjectBuilder(ROOT).build_system_requires)
    assert [re.split(r"\W", requirement)[0] for requirement in requires] == ["pybind11", "setuptools"]
    succeed([sys.executable, "-m", "pip", "--python", shop.python, "install", "--quiet", *requires], folder)
    shop.sdist, _ = shop.build("sdist", copy_of_source(folder / "checkout"))
    with tarfile.open(shop.sdist) as archive:
        archive.extractall(folder / "unpacked")
    (shop.source,) = (folder / "unpacked").iterdir()
    (site,) = (folder / "environment/lib").glob("python*/site-packages")
    lend_objects(shop.source, site)
    return shop


def lend_objects(source: Path, site: Path) -> None:
    """Gives a source folder what this checkout's build has compiled, as if compiled there with what ``site`` holds.

    setup.py takes an object only where the command and all that its source includes are the same: what the sdist lacks
    is still missed. Warnings as errors make no difference to what comes out.
    """
    theirs, ours = source / "build/objects", ROOT / "build/objects"
    if not ours.exists():
        return
    shutil.copytree(ours, theirs)
    for path in [*theirs.glob("*.stamp"), *theirs.glob("*.d")]:
        text = path.read_text().replace(str(SITE), str(site)).replace(str(ROOT), str(source))
        path.write_text(text.replace(" -Werror all-warnings", "").replace(" -Werror", ""))


def copy_of_source(target: Path) -> Path:
    """The repository as a fresh clone would have it: nothing that was built."""
    built = shutil.ignore_patterns(".*cache*", ".venv", ".git", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, target, ignore=built)
    return target


@pytest.fixture(scope="module")
def full(workshop):
    """The wheel as a user gets it by default on this machine, and what its build said."""
    return workshop.build("wheel")


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Installs a wheel beside this environment's packages, less those named; returns the new environment's Python."""

    def install(wheel: Path, without: tuple[str, ...] = ()) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        succeed([sys.executable, "-m", "venv", "--without-pip", folder], folder)
        python = folder / "bin/python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
        succeed([*pip, wheel], folder)
        site = Path(succeed([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
        for entry in SITE.iterdir():
            name = re.split(r"[-.]", entry.name)[0]
            if name not in (*HIDDEN, *without) and entry.suffix != ".pth" and not name.startswith("__"):
                (site / entry.name).symlink_to(entry)
        return python

    return install


@pytest.fixture(scope="module")
def installed(full, install):
    """The Python of an environment with the default wheel."""
    return install(full[0])


LINEAR_BY_AUTO = """
import torch, fastdl
x, w, b = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True), torch.randn(4)
with fastdl.trace() as calls:
    y = fastdl.functional.linear(x, w, b, activation="relu")
    y.sum().backward()
torch.testing.assert_close(y, torch.relu(torch.nn.functional.linear(x, w, b)))
assert w.grad is not None
print(calls[0].backend, "|", calls[0].reason)
"""
LINEAR_BY_CPU = 'import fastdl\nfastdl.use_backend("cpu")\n' + LINEAR_BY_AUTO  # auto asks for the speed on record too


def modules_of_source() -> set[str]:
    """Every Python file of the package, by the name that the wheel gives it."""
    homes = {"fastdl": "fastdl", "kernels": "fastdl/kernels", "bench": "fastdl/bench"}
    return {
        f"{home}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, home in homes.items()
        for file in (ROOT / folder).rglob("*.py")
        if "output" not in file.parts
    }


# ----------------------------------------------------------------------------------------------------- what is packed


def test_the_sdist_holds_every_source_and_nothing_that_was_built(workshop):
    with tarfile.open(workshop.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "bench", "fastdl"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".json") and "output" not in file.parts:
                assert file.relative_to(ROOT).as_posix() in names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "fastdl/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith(("build/", ".venv"))]


def test_the_wheel_holds_the_package_and_neither_tests_nor_sources_of_kernels(full):
    wheel, _ = full
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == modules_of_source()
    assert {"fastdl/records.json", "fastdl/py.typed", "fastdl/kernels/linear.py", "fastdl/bench/runner.py"} <= names
    assert len([name for name in names if re.fullmatch(r"fastdl/_C\..*\.(so|pyd)", name)]) == 1
    assert {name.partition("/")[0] for name in names} == {"fastdl", f"fastdl-{fastdl.__version__}.dist-info"}
    assert not [name for name in names if "tests" in name or "conftest" in name or "csrc" in name]
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".cuh", ".inc", ".o"))]
    assert not wheel.name.endswith("-none-any.whl")


def test_the_version_is_stated_in_one_place(full, workshop):
    version = fastdl.__version__
    with zipfile.ZipFile(full[0]) as archive:
        metadata = email.message_from_bytes(archive.read(f"fastdl-{version}.dist-info/METADATA"))
    assert metadata["Version"] == version
    assert workshop.sdist.name == f"fastdl-{version}.tar.gz"
    stating = [
        file.relative_to(ROOT).as_posix()
        for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", *(ROOT / "fastdl").rglob("*.py"))
        if re.search(rf"""["']{re.escape(version)}["']""", file.read_text())
    ]
    assert stating == ["fastdl/_version.py"]


def test_torch_is_required_and_triton_is_not(full):
    with zipfile.ZipFile(full[0]) as archive:
        metadata = email.message_from_bytes(archive.read(f"fastdl-{fastdl.__version__}.dist-info/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert "torch>=2.10" in required and not [line for line in required if line.startswith("triton")]
    assert metadata["Requires-Python"] == ">=3.10"


# ---------------------------------------------------------------------------------------------------- what is installed


def test_the_default_install_works_from_any_folder_and_tells_what_it_compiled(full, installed, tmp_path):
    _, said = full
    has_nvcc = shutil.which("nvcc") is not None
    assert "fastdl: compiled CPU kernels for" in said and ("CUDA kernels for sm_80" in said) == has_nvcc
    info = succeed([installed, "-c", "import fastdl; print(fastdl.info())"], tmp_path)
    assert f"extension: compiled: cpu{', cuda' if has_nvcc else ''}\n" in info and "cpu kernels: " in info
    assert "\n  cpu: ready" in info
    assert succeed([installed, "-c", LINEAR_BY_CPU], tmp_path).startswith("cpu |")
    where = succeed(
        [installed, "-c", "import fastdl.kernels.common, fastdl.bench.cases as c; print(c.__file__)"], tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent.parent)


@pytest.mark.parametrize("command", [["-m", "fastdl"], None], ids=["python -m fastdl", "fastdl"])
def test_the_command_line_is_installed(installed, tmp_path, command):
    start = [installed, *command] if command else [installed.parent / "fastdl"]
    assert f"fastdl: {fastdl.__version__}\n" in succeed([*start, "info"], tmp_path)
    assert run([*start, "nonsense"], tmp_path).returncode == 2


def test_importing_is_light_and_changes_nothing(installed, tmp_path):
    code = """
import sys, threading, time, warnings, torch
warnings.simplefilter("error")
def world():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(), torch.initial_seed(), threading.active_count(),
    )
before, world_before, start = set(sys.modules), world(), time.process_time()
import fastdl
seconds = time.process_time() - start
assert world() == world_before
assert not torch.cuda.is_initialized()
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"fastdl", "torch"}, new
assert not [name for name in ("fastdl._C", "fastdl.kernels", "fastdl.bench") if name in sys.modules]
assert seconds < 1, seconds
"""
    succeed([installed, "-c", code], tmp_path)
    assert not (tmp_path / "cache").exists()


def test_from_the_repository_root_the_shadowing_source_folder_is_named(workshop, installed):
    code = """
import torch, fastdl
print(fastdl.info())
try:
    with fastdl.use_backend("cpu"):
        fastdl.functional.relu(torch.ones(1))
except fastdl.UnsupportedError as error:
    print("ERROR", error)
print(fastdl.functional.relu(torch.ones(1)))
"""
    for output in (
        succeed([installed, "-c", code], workshop.source),
        succeed([installed, "-m", "fastdl", "info"], workshop.source),
    ):
        assert f"{workshop.source} is fastdl's source folder" in output and "pip install -e" in output
    assert "source folder" in succeed([installed, "-c", code], workshop.source).partition("ERROR")[2]


def test_an_editable_install_finds_every_part_from_the_root_and_from_elsewhere(workshop, install, tmp_path):
    source = copy_of_source(tmp_path / "checkout")
    wheel, _ = workshop.build("editable", source, PATH=workshop.path_of())
    python = install(wheel)
    code = "import fastdl.kernels.linear as k, fastdl.bench.runner as r; print(k.__file__, r.__file__)"
    expected = f"{source / 'kernels/linear.py'} {source / 'bench/runner.py'}"
    for folder in (source, tmp_path):
        assert succeed([python, "-c", code], folder).strip() == expected
        assert "fastdl: " in succeed([python, "-m", "fastdl", "info"], folder)


# ------------------------------------------------------------------------------------------------------------ variants


def test_without_triton_everything_else_works(full, install, tmp_path):
    python = install(full[0], without=("triton",))
    info = succeed([python, "-c", "import fastdl; print(fastdl.info())"], tmp_path)
    assert "triton: not installed; pip install triton" in info
    assert re.search(r"\n  triton: not usable: Triton is not installed.*pip install triton", info)
    assert succeed([python, "-c", LINEAR_BY_CPU], tmp_path).startswith("cpu |")
    assert "fastdl: " in succeed([python, "-m", "fastdl", "info"], tmp_path)
    code = "import torch, fastdl; fastdl.use_backend('triton'); fastdl.functional.relu(torch.ones(1))"
    failed = run([python, "-c", code], tmp_path)
    assert failed.returncode and "UnsupportedError" in failed.stderr and "pip install triton" in failed.stderr


def test_fastdl_cuda_0_leaves_cuda_out_and_the_build_never_imports_torch(full, workshop, install, tmp_path):
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise SystemExit('torch!')\n")
    wheel, said = workshop.build("wheel", FASTDL_CUDA="0", PYTHONPATH=str(poison))
    assert not (tmp_path / "imported").exists()
    assert "no CUDA kernels (FASTDL_CUDA=0)" in said
    assert_without_cuda(install(wheel), tmp_path)


def test_without_nvcc_auto_leaves_cuda_out_and_says_how_to_get_it(full, workshop, install, tmp_path):
    path = workshop.path_of("g++", "as", "ld")
    wheel, said = workshop.build("wheel", PATH=path, CUDA_HOME=None)
    assert "no CUDA kernels (no nvcc on the PATH, no CUDA_HOME)" in said and "compiled CPU kernels for" in said
    assert_without_cuda(install(wheel), tmp_path)


def assert_without_cuda(python: Path, folder: Path) -> None:
    info = succeed([python, "-c", "import fastdl; print(fastdl.info())"], folder)
    assert "extension: compiled: cpu\n" in info and "cuda kernels:" not in info
    assert re.search(r"\n  cuda: not usable: fastdl was built without CUDA.*nvcc", info)
    assert succeed([python, "-c", LINEAR_BY_CPU], folder).startswith("cpu |")


def test_without_a_compiler_the_package_works_on_torch_and_says_what_is_missing(workshop, install, tmp_path):
    wheel, said = workshop.build("wheel", PATH=workshop.path_of(), CUDA_HOME=None)
    assert "no C++ compiler found: installing without compiled kernels" in said and "g++" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
        assert {name for name in archive.namelist() if name.endswith(".py")} == modules_of_source()
    python = install(wheel)
    info = succeed([python, "-c", "import fastdl; print(fastdl.info())"], tmp_path)
    assert re.search(r"extension: not usable: .*C\+\+ compiler", info)
    assert re.search(r"\n  cpu: not usable: .*C\+\+ compiler", info) and "\n  torch: ready" in info
    backend, _, reason = succeed([python, "-c", LINEAR_BY_AUTO], tmp_path).partition("|")
    assert backend.strip() == "torch" and "C++ compiler" in reason
    assert "fastdl: " in succeed([python, "-m", "fastdl", "info"], tmp_path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"FASTDL_CUDA": "1", "CUDA_HOME": None},
            "FASTDL_CUDA=1, but there is no nvcc: put it on the PATH or set CUDA_HOME",
        ),
        ({"FASTDL_CUDA": "1", "CUDA_HOME": "/nowhere"}, "FASTDL_CUDA=1, but there is no nvcc"),
        ({"FASTDL_CUDA": "yes"}, "FASTDL_CUDA must be auto, 1 or 0; got 'yes'"),
        ({"FASTDL_CUDA": ""}, "FASTDL_CUDA must be auto, 1 or 0; got ''"),
    ],
    ids=["no nvcc", "wrong CUDA_HOME", "yes", "empty"],
)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_what_cannot_be_done_as_asked_ends_the_build_with_its_reason(workshop, variables, message, kind):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        workshop.build(kind, PATH=workshop.path_of("g++", "as", "ld"), **variables)


def test_fastdl_cuda_1_without_a_cpp_compiler_ends_the_build(workshop):
    nvcc = workshop.folder / "nvcc-only"
    nvcc.mkdir(exist_ok=True)
    (nvcc / "nvcc").write_text("#!/bin/sh\nexit 0\n")
    (nvcc / "nvcc").chmod(0o755)
    with pytest.raises(RuntimeError, match=r"FASTDL_CUDA=1, but there is no C\+\+ compiler"):
        workshop.build("wheel", FASTDL_CUDA="1", CUDA_HOME=None, PATH=str(nvcc))


def test_a_compiler_that_fails_ends_the_build_and_is_quoted(workshop):
    compiler = workshop.folder / "failing-compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *"-E -x"*) exit 0 ;; esac\necho "the compiler is broken" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    with pytest.raises(RuntimeError, match="this failed: ") as raised:
        workshop.build("wheel", FASTDL_CUDA="0", CXX=str(compiler))
    assert "the compiler is broken" in str(raised.value) and "failing-compiler" in str(raised.value)
