"""All that a machine with an NVIDIA GPU can tell about this package, in under nine minutes.

``bench/gpu.sh`` (or ``python bench/gpu.py``) builds the package offline, checks every kernel and every emulation twin
against the hardware, times them, and writes it all to ``bench/results/DEVICE/TIME-COMMIT``, and to ``$OUT`` if that is
set. A step that fails or runs too long is reported, and the rest goes on. Without a GPU it does what it can.

``python -m fastdl.bench.gpu merge RESULT`` takes a run that passed into ``fastdl/records.json``, which ``auto`` reads.

FASTDL_COMMIT names the commit where there is no git (``git describe --always --abbrev=40 --dirty``).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The standard library alone: this file runs before the package is built. The steps' own processes import torch.
if TYPE_CHECKING:
    import torch
    from fastdl.bench.cases import Case
    from fastdl.bench.correctness import Sample

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "tests" / "emulator" / "zoo"
TOTAL = 530.0  # seconds that a whole run may take
PATIENCE = 5.0  # seconds from the polite end of a process that runs too long to the other one
COMPILE = 240.0  # seconds that a program of probes may take to compile, in the background
LONGEST_LOG = 1 << 20  # characters of each step's log that are kept
LARGEST_SMALL = 5e8, 1 << 25  # operations and bytes of what counts as a small case
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NO_GPU = "no NVIDIA GPU that torch can use"
# What a run must have passed before its records may be trusted; those of `optional` may have been skipped.
CORRECTNESS, OPTIONAL = ("build", "tests", "ptx", "races"), ("hopper", "sanitizer")


@dataclass
class Outcome:
    """What came of a step: PASSED, FAILED or SKIPPED, the reason or the numbers in a line, and the numbers as data."""

    verdict: str
    detail: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """A part of the run: its name, what it does within so many seconds, at most ``limit``, and the least it needs."""

    name: str
    action: Callable[[Run, float], Outcome]
    limit: float
    least: float
    on_gpu: bool = True


@dataclass
class Finished:
    """A process that has ended: its exit status and what it printed."""

    status: int
    output: str
    timed_out: bool = False

    @property
    def problem(self) -> str:
        """What went wrong in a line, or ""."""
        if self.timed_out:
            return "ran too long"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return f"exit status {self.status}: {lines[-1][:200] if lines else 'no output'}" if self.status else ""


class Run:
    """One run: where it writes, what it found out about the machine, what came of its steps."""

    def __init__(self, results: Path, work: Path, python: str = sys.executable) -> None:
        self.results, self.work, self.python = results, work, python
        self.started = time.monotonic()
        self.time = datetime.datetime.now(datetime.timezone.utc)
        self.commit = commit()
        self.machine: dict[str, Any] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.step = ""
        self.programs: dict[str, Future[Finished]] = {}
        self._pool = ThreadPoolExecutor(4)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        # Kernels are not interpreted; and pytest may be what runs this, in its tests.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))}
        paths = [*self.environment.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
        self.environment |= {"PATH": os.pathsep.join(paths), "FASTDL_CACHE": str(work / "cache")}

    @property
    def name(self) -> str:
        """Where the results lie, from the folder of results on: DEVICE/TIME-COMMIT."""
        device = self.machine["devices"][0]["name"] if self.machine.get("devices") else "no-gpu"
        return f"{_slug(device)}/{self.time:%Y%m%d-%H%M%S}-{self.commit[:12]}{'-dirty' * self.dirty}"

    @property
    def dirty(self) -> bool:
        """Whether files differ from the commit."""
        return self.commit.endswith("-dirty")

    @property
    def folder(self) -> Path:
        """Where the results lie."""
        return self.results / self.name

    def execute(self, command: Sequence[str | Path], limit: float, log: str = "", **variables: str) -> Finished:
        """Runs a command in the repository's root; its output goes to the log of the step, or of another name."""
        words = [str(part) for part in command]
        path = self.work / f"{log or self.step}.log"
        with path.open("ab") as file:
            file.write(f"$ {' '.join(words)}\n".encode())
            file.flush()
            start = file.tell()
            try:
                process = subprocess.Popen(
                    words,
                    cwd=ROOT,
                    env=self.environment | variables,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return Finished(127, str(error))
            timed_out = False
            try:
                status = process.wait(max(limit, 0.1))
            except subprocess.TimeoutExpired:
                timed_out, status = True, _stop(process)
        with path.open("rb") as file:
            file.seek(start)
            return Finished(status, file.read().decode(errors="replace"), timed_out)

    def run_python(self, *arguments: str | Path, limit: float, log: str = "", **variables: str) -> Finished:
        """Runs the machine's Python."""
        return self.execute([self.python, *arguments], limit, log, **variables)

    def compile(self, name: str, architecture: str) -> None:
        """Starts to compile a program of the zoo for a GPU, in the background."""
        command = ["nvcc", "-std=c++20", "-O2", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += [f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ZOO}", f"{ZOO / name}.cu", "-o", f"{self.work / name}"]
        self.programs[name] = self._pool.submit(self.execute, command, COMPILE, name)

    def together(self, calls: Sequence[Callable[[], Finished]]) -> list[Finished]:
        """Runs several commands at the same time."""
        return [future.result() for future in [self._pool.submit(call) for call in calls]]

    def record(self) -> None:
        """Writes result.json and log.txt, so that a run that is cut off leaves what it has; all goes to $OUT too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "name": self.name,
            "time": self.time.isoformat(timespec="seconds"),
            "commit": self.commit.removesuffix("-dirty"),
            "dirty": self.dirty,
            "machine": self.machine,
            "steps": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
        }
        (self.folder / "result.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
        logs = sorted(self.work.glob("*.log"), key=lambda path: path.stat().st_mtime)
        tails = [f"==== {path.stem}\n{path.read_text(errors='replace')[-LONGEST_LOG:]}" for path in logs]
        (self.folder / "log.txt").write_text("\n".join(tails))
        if out := os.environ.get("OUT"):
            Path(out).mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*.*"):
                if path.suffix != ".png":  # report.html has the pictures inside
                    shutil.copy(path, out)


def commit() -> str:
    """The commit, with "-dirty" where files differ from it; FASTDL_COMMIT where there is no git."""
    if given := os.environ.get("FASTDL_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def _stop(process: subprocess.Popen[bytes]) -> int:
    """Ends a process of ours and what it started, politely first."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split()).lower()


def run_steps(run: Run, steps: Sequence[Step], total: float = TOTAL) -> None:
    """Runs the steps one after the other; each leaves the later ones the time that they need at least."""
    for position, step in enumerate(steps):
        run.step = step.name
        print(f"== {step.name}", flush=True)
        left = run.started + total - time.monotonic()
        seconds = min(step.limit, left - sum(later.least for later in steps[position + 1 :]))
        began = time.monotonic()
        if step.on_gpu and run.machine and not run.machine.get("devices"):
            outcome = Outcome(SKIPPED, NO_GPU)
        elif seconds < step.least:
            outcome = Outcome(SKIPPED, f"{max(seconds, 0):.0f} s are left, it needs {step.least:.0f}")
        else:
            try:
                outcome = step.action(run, seconds)
            except Exception as error:  # the rest of the run must still happen
                outcome = Outcome(FAILED, f"{type(error).__name__}: {error}")
        outcome.seconds = round(time.monotonic() - began, 1)
        run.outcomes[step.name] = outcome
        print(f"   {outcome.verdict} in {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
        run.record()


def table(run: Run) -> str:
    """The run in a few lines: a step each."""
    machine = run.machine
    device = machine["devices"][0]["name"] if machine.get("devices") else NO_GPU
    versions = ", ".join(f"{name} {machine.get(name)}" for name in ("driver", "torch", "triton", "nvcc"))
    lines = [f"{device}; {versions}; commit {run.commit}"]
    for name, outcome in run.outcomes.items():
        lines.append(f"{name:<12} {outcome.verdict:<8} {outcome.seconds:>5.0f} s  {outcome.detail[:160]}")
        lines += [f"{'':<12} {line[:160]}" for line in outcome.data.get("worst", [])]
    seconds = time.monotonic() - run.started
    return "\n".join([*lines, f"{'':<12} {'':<8} {seconds:>5.0f} s  written: {run.folder}"])


# ---------------------------------------------------------------------------------------------------------- the steps

_MACHINE = """
import importlib.metadata, importlib.util, json, os, platform, torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
def properties(i):
    p = torch.cuda.get_device_properties(i)
    return {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": p.total_memory, "l2": p.L2_cache_size,
            "multiprocessors": p.multi_processor_count}
names = "pytest pytest-xdist pytest-timeout hypothesis pybind11 rich jinja2 matplotlib scikit-learn".split()
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "triton": version("triton"), "packages": {name: version(name) for name in names}, "cores": os.cpu_count(),
    "system": platform.platform(), "devices": [properties(i) for i in range(torch.cuda.device_count())]}))
"""


def environment(run: Run, seconds: float) -> Outcome:
    """What the machine has; starts to compile the probes."""
    done = run.run_python("-c", _MACHINE, limit=seconds)
    if done.problem:
        run.machine = {"problem": done.problem}
        return Outcome(FAILED, f"torch: {done.problem}")
    run.machine = machine = json.loads(done.output.splitlines()[-1])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver, nvcc = run.execute(query, 20), run.execute(["nvcc", "--version"], 20)
    run.execute(["nvidia-smi"], 20)
    machine["driver"] = None if driver.problem else driver.output.split("\n")[0].strip()
    machine["nvcc"] = None if nvcc.problem else nvcc.output.partition("release ")[2].partition(",")[0]
    capability = machine["devices"][0]["capability"] if machine["devices"] else "9.0"
    if machine["nvcc"]:
        run.compile("confirm_ptx", capability.replace(".", ""))
        if capability == "9.0":
            run.compile("confirm_sm90", "90a")
    missing = [name for name, version in machine["packages"].items() if version is None]
    detail = f"missing: {', '.join(missing)}" if missing else "nothing is missing"
    if not machine["devices"]:
        return Outcome(FAILED, f"{NO_GPU}; {detail}")
    return Outcome(PASSED, f"compute capability {capability}; {detail}")


def build(run: Run, seconds: float) -> Outcome:
    """The package, offline: by pip, or in place where pip can't; without CUDA so that Triton at least can be tried."""
    end = time.monotonic() + seconds
    pip = ["pip", "install", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "-e", "."]
    in_place = ["setup.py", "build_ext", "--inplace"]
    ways = {"pip": (["-m", *pip], "1"), "in place": (in_place, "1"), "in place, no CUDA kernels": (in_place, "0")}
    problems: list[str] = []
    for way, (command, cuda) in ways.items():
        done = run.run_python(*command, limit=end - time.monotonic(), FASTDL_CUDA=cuda)
        if not done.problem and way != "pip":
            _link_package(run)
        if not done.problem:
            done = run.run_python("-m", "fastdl", "info", limit=min(60, end - time.monotonic()))
        if not done.problem:
            _dump_machine_code(run)
            verdict = PASSED if cuda == "1" else FAILED
            return Outcome(verdict, "; ".join([way, *problems]), {"info": done.output})
        problems.append(f"{way}: {done.problem}")
    return Outcome(FAILED, "; ".join(problems))


def _link_package(run: Run) -> None:
    """What an editable install does, for where pip can't: the package's folders under one, first on the path."""
    package = run.work / "site" / "fastdl"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*(ROOT / "fastdl").iterdir(), ROOT / "kernels", ROOT / "bench"]:
        (package / path.name).symlink_to(path)
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The safe path: the root's own fastdl/ lacks kernels/ and bench/ and must not come first.
    run.environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _dump_machine_code(run: Run) -> None:
    """Registers, stack and shared memory of each kernel as built here, to machine_code.txt."""
    extensions = [*(ROOT / "fastdl").glob("_C*.so")]
    if extensions and shutil.which("cuobjdump", path=run.environment["PATH"]):
        done = run.execute(["cuobjdump", "--dump-resource-usage", extensions[0]], 30, "machine_code")
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "machine_code.txt").write_text(done.output)


def suite(run: Run, seconds: float) -> Outcome:
    """The whole test suite with the GPU; not the emulator's own tests, which need none and are CI's."""
    ignored = ["--ignore=tests/emulator", "--ignore=tests/test_gpu.py", "-m", "not install"]
    return _pytest(run, seconds, 8, "tests", *ignored)


def races(run: Run, seconds: float) -> Outcome:
    """What only a GPU can show: repeats, streams, graphs, other devices, large tensors."""
    return _pytest(run, seconds, 8, "tests/test_gpu.py")


def _pytest(run: Run, seconds: float, workers: int, *arguments: str) -> Outcome:
    packages = run.machine.get("packages", {})
    reports = run.work / f"{run.step}.jsonl"
    command = ["-m", "pytest", "-p", "fastdl.bench.gpu", "--tb=short", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider"]
    if packages.get("pytest-xdist"):
        command += ["-n", str(workers)]
    if packages.get("pytest-timeout"):  # a kernel that hangs must not take the rest with it
        command += ["--timeout=90", "--timeout-method=thread"]
    done = run.run_python(*command, *arguments, limit=seconds - PATIENCE, FASTDL_TEST_REPORTS=str(reports))
    outcome = judge_tests(reports, done)
    if not reports.exists() and done.problem:
        return Outcome(FAILED, done.problem)
    return outcome


def judge_tests(reports: Path, done: Finished) -> Outcome:
    """Counts, failures (in the order in which they happened) and reasons of skips, from what the plugin below wrote."""
    lines = [json.loads(line) for line in reports.read_text().splitlines()] if reports.exists() else []
    failed: dict[str, str] = {}
    passed: set[str] = set()
    skipped: dict[str, str] = {}
    for line in lines:
        if line["outcome"] == "failed":
            failed.setdefault(line["test"], line["message"])
        elif line["outcome"] == "skipped":
            skipped[line["test"]] = line["message"]
        elif line["when"] == "call":
            passed.add(line["test"])
    passed -= failed.keys()
    data = {
        "passed": len(passed),
        "failed": [{"test": test, "message": message} for test, message in failed.items()],
        "skipped": dict(Counter(skipped.values()).most_common()),
        "finished": not done.timed_out,
        "worst": [f"{test}: {message}" for test, message in [*failed.items()][:5]],
    }
    detail = f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped"
    if done.timed_out:
        detail += "; stopped before the end"
    right = passed and not failed and not done.timed_out and done.status == 0
    if not right and not failed:
        detail += f"; {done.problem or 'nothing ran'}"
    return Outcome(PASSED if right else FAILED, detail, data)


def probes(program: str, run: Run, seconds: float) -> Outcome:
    """A program of probes, compiled from the start of the run on: each a line "NAME ok|FAIL ERROR MESSAGE"."""
    if program not in run.programs:
        missing = "no nvcc" if not run.machine.get("nvcc") else "compute capability is not 9.0"
        return Outcome(SKIPPED, missing)
    end = time.monotonic() + seconds
    try:
        compiled = run.programs[program].result(timeout=seconds)
    except FutureTimeoutError:
        return Outcome(FAILED, "nvcc has not finished")
    if compiled.problem:
        return Outcome(FAILED, f"nvcc: {compiled.problem}", {"output": compiled.output[-4000:]})
    if not run.machine.get("devices"):
        return Outcome(SKIPPED, f"compiles; {NO_GPU}")
    done = run.execute([run.work / program], end - time.monotonic())
    return judge_probes(done)


def judge_probes(done: Finished) -> Outcome:
    """The verdict of each probe."""
    found = re.findall(r"^(.+?)\s+(ok|FAIL)\s+(\S+)[ \t]*(.*)$", done.output, re.MULTILINE)
    wrong = [f"{name}: error {error} {message}".strip() for name, verdict, error, message in found if verdict != "ok"]
    data = {"probes": {name: verdict for name, verdict, _, _ in found}, "worst": wrong[:5]}
    detail = f"{len(found) - len(wrong)} of {len(found)} confirmed"
    if done.problem:
        detail += f"; {done.problem}"
    return Outcome(FAILED if wrong or done.problem or not found else PASSED, detail, data)


def sanitizer(run: Run, seconds: float) -> Outcome:
    """compute-sanitizer's memcheck and racecheck over every kernel on small shapes, all at the same time."""
    if not shutil.which("compute-sanitizer", path=run.environment["PATH"]):
        return Outcome(SKIPPED, "no compute-sanitizer on the PATH")
    jobs = [(tool, backend) for tool in ("memcheck", "racecheck") for backend in ("cuda", "triton")]

    def check(tool: str, backend: str) -> Finished:
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=86", "--report-api-errors=no"]
        command += ["--print-limit=20", run.python, "-m", "fastdl.bench.gpu", "calls", backend]
        # Without torch's cache each tensor is an allocation of its own, whose ends memcheck sees.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return run.execute(command, seconds - PATIENCE, f"sanitizer-{tool}-{backend}", **variables)

    done = run.together([functools.partial(check, *job) for job in jobs])
    return judge_sanitizer({f"{tool} {backend}": one for (tool, backend), one in zip(jobs, done, strict=True)})


def judge_sanitizer(done: dict[str, Finished]) -> Outcome:
    """What compute-sanitizer found, by tool and backend."""
    if all("not supported" in one.output for one in done.values()):
        return Outcome(SKIPPED, "compute-sanitizer says that it does not support this device")
    verdicts = {}
    for name, one in done.items():
        summary = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", one.output, re.MULTILINE)
        ran = re.search(r"^\d+ calls", one.output, re.MULTILINE)
        clean = one.status == 0 and summary and ran and not one.timed_out
        first = re.search(r"^=+ ((?:Invalid|Error|Misaligned|Uninit|Race).*)$", one.output, re.MULTILINE)
        told = [one.problem, *summary[-1:], *([first[1]] if first else [])]
        verdicts[name] = "clean" if clean else "; ".join(filter(None, told)) or "no summary"
    wrong = [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict != "clean"]
    detail = f"{len(verdicts) - len(wrong)} of {len(verdicts)} runs are clean"
    return Outcome(FAILED if wrong else PASSED, detail, {"verdicts": verdicts, "worst": wrong})


def benchmark(run: Run, seconds: float) -> Outcome:
    """Every kernel beside all peers, as many cases as there is time for, the quick ones first."""
    run.folder.mkdir(parents=True, exist_ok=True)
    arguments = ("bench", "--seconds", f"{seconds - 25:.0f}", "--out", run.folder)
    done = run.run_python("-m", "fastdl.bench.gpu", *arguments, limit=seconds - PATIENCE)
    path = run.folder / "results.json"
    if not path.exists():
        return Outcome(FAILED, done.problem or "it wrote no results")
    rows = json.loads(path.read_text())["rows"]
    return judge_benchmark(rows, done)


def judge_benchmark(rows: Sequence[dict[str, Any]], done: Finished) -> Outcome:
    """How many cases were right, and how many comparisons were lost."""
    ours = [row for row in rows if row["kind"] == "backend"]
    # As Row.passed, for which torch would have to be imported.
    wrong = [f"{row['backend']}: {row['family']} {row['case']} {row['dtype']}: {row['problem']}" for row in ours]
    wrong = [text for text, row in zip(wrong, ours, strict=True) if row["problem"]]
    ratios = [ratio["median"] for row in ours for ratio in row["over"].values()]
    lost = sum(ratio < 1 for ratio in ratios)
    detail = f"{len(ours)} rows, {len(wrong)} wrong; {lost} of {len(ratios)} comparisons lost"
    if done.problem:
        detail += f"; {done.problem}"
    return Outcome(PASSED if ours and not wrong and not done.problem else FAILED, detail, {"worst": wrong[:5]})


def records(run: Run, seconds: float) -> Outcome:
    """What the benchmark found by op, backend, dtype and code path, ready for ``merge``."""
    if not (run.folder / "results.json").exists():
        return Outcome(SKIPPED, "there are no results of a benchmark")
    done = run.run_python("-m", "fastdl.bench.gpu", "records", run.folder, limit=seconds)
    return Outcome(FAILED, done.problem) if done.problem else Outcome(PASSED, done.output.splitlines()[-1])


STEPS = (
    Step("environment", environment, limit=60, least=1, on_gpu=False),
    Step("build", build, limit=240, least=20, on_gpu=False),
    Step("tests", suite, limit=170, least=30),
    Step("hopper", functools.partial(probes, "confirm_sm90"), limit=60, least=5, on_gpu=False),
    Step("ptx", functools.partial(probes, "confirm_ptx"), limit=40, least=5, on_gpu=False),
    Step("races", races, limit=80, least=25),
    Step("sanitizer", sanitizer, limit=80, least=25),
    Step("benchmark", benchmark, limit=400, least=110),
    Step("records", records, limit=30, least=15),
)


# ---------------------------------------------------------------------------------------------- pytest plugin (-p)
# Each test's verdict as it comes, since pytest tells them at the end, which a run that is cut off never reaches.


def pytest_runtest_logreport(report: Any) -> None:
    """Appends a test's verdict to FASTDL_TEST_REPORTS; ends a worker whose CUDA context an error has broken."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        if report.when == "call" or report.outcome != "passed":
            _append_report(report.nodeid, report.when, report.outcome, report)
    elif report.failed and re.search(r"CUDA error|cudaError(Illegal|Misaligned|Launch|Assert)", report.longreprtext):
        sys.stderr.flush()
        os._exit(1)  # pytest-xdist has the report and starts a new worker for the tests that remain


def pytest_collectreport(report: Any) -> None:
    """A file that can't be imported is a failure as well."""
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        _append_report(report.nodeid, "collect", "failed", report)


def _append_report(test: str, when: str, outcome: str, report: Any) -> None:
    path = os.environ.get("FASTDL_TEST_REPORTS")
    if path is None:
        return
    message = ""
    if outcome == "skipped" and isinstance(report.longrepr, tuple):
        message = report.longrepr[2]
    elif outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else report.longreprtext).strip().splitlines()
        message = (lines[0] if crash else lines[-1]) if lines else ""
    with open(path, "a") as file:
        line = {"test": test, "when": when, "outcome": outcome, "message": message[:300]}
        file.write(json.dumps(line) + "\n")
    if outcome == "failed":
        with Path(path).with_suffix(".failures.log").open("a") as file:
            file.write(f"---- {test}\n{report.longreprtext}\n")


# ------------------------------------------------------------------------------------ what the steps' processes run


def small_cases() -> Iterator[Case]:
    """The ragged cases of every family, and the small ones of its timed set: with gradients."""
    from fastdl.bench import cases

    for family in cases.families():
        yield from cases.checks(family)
        for case in cases.timed(family, "cuda"):
            flops, bytes_ = LARGEST_SMALL
            if case.direction == cases.TRAINING and case.flops <= flops and case.bytes <= bytes_ and not case.overhead:
                yield case


def small_sample(case: Case, device: torch.device) -> Sample:
    """Inputs and output gradients of a case, drawn on the CPU: on the GPU only the kernels under test run."""
    import torch
    from fastdl.bench.correctness import Sample, draw

    sample = draw(case, torch.device("cpu"))
    inputs = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in sample.inputs.items()}
    return Sample(inputs, [grad.to(device) for grad in sample.grad_outputs])


def calls(backend: str) -> int:
    """Runs every ragged case that has kernels once, with gradients, and counts: the program under compute-sanitizer."""
    import torch
    from fastdl.bench import cases
    from fastdl.bench.correctness import step

    import fastdl

    device = torch.device("cpu" if backend == "cpu" else "cuda")
    count = 0
    with fastdl.use_backend(backend):
        for case in (case for family in cases.families() for case in cases.checks(family)):
            try:
                step(case, case.call)(small_sample(case, device))
            except fastdl.UnsupportedError:  # an op that the backend has no kernel for
                continue
            count += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls on {backend}")
    return 0


def bench(seconds: float, out: Path, device: str = "cuda", budget: float = 0.3) -> int:
    """The benchmark within a time: the quick cases with torch.compile as a peer, then the others in a mixed order."""
    import random
    from unittest import mock

    import torch
    from fastdl.bench import models, report, runner
    from fastdl.bench.outcome import Results, provenance
    from rich.console import Console

    target, console = torch.device(device), Console(width=160)
    results = Results(provenance(target, " ".join(sys.argv[1:])))
    began, done, left, progress = time.monotonic(), set(), 0, runner._progress

    def until(end: float, items: Sequence[Case], doing: str, to: Console) -> Iterator[Case]:
        nonlocal left
        items = [case for case in items if str(case) not in done]
        left = len(items)
        random.Random(0).shuffle(items)  # what time is too short for is missing everywhere a little
        for case in progress(items, doing, to):
            if time.monotonic() > end:
                break
            yield case
            done.add(str(case))
            left -= 1
            results.save(out / "results.json")  # a run that is cut off leaves what it has

    for quick, share in ((True, 0.5), (False, 1.0)):
        with mock.patch.object(runner, "_progress", functools.partial(until, began + share * (seconds - 10))):
            runner.time_cases(results, quick, None, target, quick, budget, console)
    if left:
        results.notes.append(f"{left} cases were not measured, beside {len(done)} that were: the time was over")
    if time.monotonic() - began < seconds:
        results.models += models.run(target, out)
    results.save(out / "results.json")
    report.print_all(results, console)
    try:
        report.write_files(results, out)
    except ImportError as error:
        console.print(f"no plots: {error}")
    return 0 if results.passed else 1


def write_records(folder: Path, device: str = "cuda") -> int:
    """records.json of a run from its results.json; the source of each is the run's place in the repository."""
    import torch
    from fastdl.bench import tune
    from fastdl.bench.outcome import Results

    found = tune.records(Results.load(folder / "results.json"), torch.device(device))
    source = f"bench/results/{json.loads((folder / 'result.json').read_text())['name']}"
    content = {"records": [record | {"source": source} for record in found]}
    (folder / "records.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(found)} records, {sum(record['passed'] for record in found)} of kernels that passed")
    return 0


def merge_records(new: Sequence[dict[str, Any]], target: Path) -> int:
    """Takes records into a file of them, each for the one of its op, backend, dtype and code path; returns how many.

    An op that passed, and that the run only called on the way to others, keeps the record of its speed.
    """

    def keyed(records: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
        return {(r["op"], r["backend"], r["dtype"], r["code_path"]): r for r in records}

    merged = keyed(json.loads(target.read_text())["records"])
    for key, record in keyed(new).items():
        if record.get("speed") or not record["passed"] or not merged.get(key, {}).get("passed"):
            merged[key] = record
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    target.write_text(f'{{"records": [\n{lines}\n]}}\n')
    return len(merged)


def merge(folder: Path, accepted: Sequence[str] = (), root: Path = ROOT) -> int:
    """Takes a run's records into fastdl/records.json: each replaces the one of its op, backend, dtype and code path.

    A run from $OUT is copied to its place under bench/results first, to be committed with the records that name it.

    Args:
        folder: the run's results.
        accepted: steps that failed, and have been understood.
        root: the repository.

    Raises:
        SystemExit: a step on which the records' trust rests has failed, or did not run.
    """
    run = json.loads((folder / "result.json").read_text())
    verdicts = {name: run["steps"].get(name, {}).get("verdict", "not run") for name in (*CORRECTNESS, *OPTIONAL)}
    fine = {name: (PASSED, SKIPPED) if name in OPTIONAL else (PASSED,) for name in verdicts}
    wrong = {name: v for name, v in verdicts.items() if v not in fine[name] and name not in accepted}
    if wrong:
        told = ", ".join(f"{name} {verdict}" for name, verdict in wrong.items())
        raise SystemExit(f"this run's records are not to be trusted: {told} (--accept STEP if that is understood)")
    target = root / "fastdl" / "records.json"
    if not target.is_file():
        raise SystemExit(f"{target} is not there: merge needs the repository")
    place = root / "bench" / "results" / run["name"]
    if place.resolve() != folder.resolve():
        shutil.copytree(folder, place, dirs_exist_ok=True)

    new = json.loads((folder / "records.json").read_text())["records"]
    total = merge_records(new, target)
    print(f"{len(new)} records of {run['name']} are in {target}, which has {total}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """All steps, or one of the commands that they run; returns the exit status."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__, formatter_class=style)
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for the whole run; default: %(default).0f")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    one = commands.add_parser("merge", help="take a run's records into fastdl/records.json")
    one.add_argument("folder", type=Path)
    one.add_argument("--accept", nargs="+", default=[], metavar="STEP", help="steps that failed and are understood")
    one.set_defaults(command=lambda options: merge(options.folder, options.accept))
    one = commands.add_parser("calls", help="run every kernel once")
    one.add_argument("backend")
    one.set_defaults(command=lambda options: calls(options.backend))
    one = commands.add_parser("bench", help="the benchmark within a time")
    one.add_argument("--seconds", dest="bench_seconds", type=float, required=True)
    one.add_argument("--out", type=Path, required=True)
    one.set_defaults(command=lambda options: bench(options.bench_seconds, options.out))
    one = commands.add_parser("records", help="write records.json beside a run's results.json")
    one.add_argument("folder", type=Path)
    one.set_defaults(command=lambda options: write_records(options.folder))
    options = parser.parse_args(arguments)
    if options.command is not None:
        return int(options.command(options))
    run = Run(ROOT / "bench" / "results", ROOT / "build" / "gpu")
    chosen = [step for step in STEPS if not options.only or step.name in (*options.only, "environment")]
    run_steps(run, chosen, options.seconds)
    print(table(run), flush=True)
    return int(any(outcome.verdict == FAILED for outcome in run.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
