"""The logic of bench/gpu.sh, without a GPU: time limits, failures that must not stop the rest, verdicts, merging."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from fastdl.bench import gpu
from fastdl.bench.gpu import FAILED, PASSED, SKIPPED, Finished, Outcome, Run, Step

ROOT = Path(gpu.__file__).resolve().parent.parent
FAKE = {"devices": [{"name": "Fake GPU 1", "capability": "9.0"}], "packages": {}, "nvcc": "13.0"}
if not (ROOT / "setup.py").exists():
    pytest.skip("an installed package without its sources", allow_module_level=True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setenv("FASTDL_COMMIT", "c0ffee" * 7)
    run = Run(tmp_path / "results", tmp_path / "work")
    run.machine = dict(FAKE)
    return run


def step(name, action, limit=10.0, least=0.0, on_gpu=True):
    return Step(name, action, limit, least, on_gpu)


def passes(run, seconds):
    return Outcome(PASSED, f"{seconds:.0f}")


# -------------------------------------------------------------------------------------------------------- processes


def test_output_and_status_of_a_command(run):
    done = run.execute(["sh", "-c", "echo out; echo err >&2; exit 3"], 10)
    assert (done.status, done.output, done.timed_out) == (3, "out\nerr\n", False)
    assert done.problem == "exit status 3: err"
    assert "out\nerr\n" in (run.work / ".log").read_text()


def test_a_missing_program_is_a_failure(run):
    assert run.execute(["no-such-program"], 10).status == 127


def test_a_process_that_runs_too_long_ends_with_its_children(run, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.3)
    began = time.monotonic()
    done = run.execute(["sh", "-c", "trap '' INT; echo started; sleep 60 & echo child $!; wait; sleep 60"], 0.5)
    assert time.monotonic() - began < 10
    assert done.timed_out and done.problem == "ran too long" and done.output.startswith("started")
    child = int(re.search(r"child (\d+)", done.output)[1])
    for _ in range(50):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child is alive")


def test_triton_is_not_interpreted_and_pytest_starts_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    done = Run(tmp_path / "results", tmp_path / "work").execute(["env"], 10)
    assert "TRITON_INTERPRET" not in done.output and "PYTEST" not in done.output and "FASTDL_CACHE=" in done.output


# ------------------------------------------------------------------------------------------------------------ steps


def test_a_failed_step_does_not_stop_the_rest(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def breaks(run, seconds):
        raise RuntimeError("broken")

    def fails(run, seconds):
        return Outcome(FAILED, "1 of 2", {"worst": ["the worst"]})

    gpu.run_steps(run, [step("one", breaks), step("two", fails), step("three", passes)])
    assert [outcome.verdict for outcome in run.outcomes.values()] == [FAILED, FAILED, PASSED]
    result = json.loads((run.folder / "result.json").read_text())
    assert result["name"] == run.name and run.name.startswith("fake-gpu-1/") and run.name.endswith("-c0ffeec0ffee")
    assert result["steps"]["one"]["detail"] == "RuntimeError: broken" and not result["dirty"]
    assert (tmp_path / "out" / "result.json").read_text() == (run.folder / "result.json").read_text()
    assert (tmp_path / "out" / "log.txt").exists()
    lines = gpu.table(run).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["one", FAILED], ["two", FAILED]]
    assert lines[3].strip() == "the worst"
    assert "== three" in capsys.readouterr().out


def test_steps_leave_time_for_the_later_ones(run):
    steps = [step("one", passes, 50), step("two", passes, 80, least=5), step("three", passes, 80, least=70)]
    gpu.run_steps(run, steps, total=100)
    assert [int(outcome.detail) for outcome in run.outcomes.values()] == pytest.approx([25, 30, 80], abs=1)


def test_a_step_without_enough_time_is_skipped(run):
    gpu.run_steps(run, [step("long", passes, limit=50, least=40)], total=10)
    assert run.outcomes["long"].verdict == SKIPPED and "it needs 40" in run.outcomes["long"].detail


def test_without_a_gpu_its_steps_are_skipped(run):
    run.machine = dict(FAKE, devices=[])
    gpu.run_steps(run, [step("gpu", passes), step("cpu", passes, on_gpu=False)])
    assert [outcome.verdict for outcome in run.outcomes.values()] == [SKIPPED, PASSED]


def test_the_whole_run_fits_into_nine_minutes():
    assert gpu.TOTAL + gpu.PATIENCE < 9 * 60
    assert sum(step.least for step in gpu.STEPS) < gpu.TOTAL / 2
    assert all(step.least <= step.limit for step in gpu.STEPS)
    names = {step.name for step in gpu.STEPS}
    assert {*gpu.CORRECTNESS, *gpu.OPTIONAL} <= names


def test_environment_of_this_machine(run, monkeypatch):
    monkeypatch.setattr(run, "compile", lambda *_: None)
    outcome = gpu.environment(run, 120)
    assert run.machine["torch"] == torch.__version__
    assert outcome.verdict == (PASSED if torch.cuda.is_available() else FAILED)


def test_build_falls_back(run, monkeypatch):
    tried = []

    def fake(*arguments, limit, FASTDL_CUDA=None, **_):
        tried.append((arguments[1] if arguments[0] == "-m" else arguments[0], FASTDL_CUDA))
        wrong = FASTDL_CUDA == "1"
        return Finished(int(wrong), "nvcc: error\n" if wrong else "fine\n")

    monkeypatch.setattr(run, "run_python", fake)
    monkeypatch.setattr(gpu, "_dump_machine_code", lambda run: None)
    outcome = gpu.build(run, 100)
    assert tried == [("pip", "1"), ("setup.py", "1"), ("setup.py", "0"), ("fastdl", None)]
    assert outcome.verdict == FAILED and outcome.detail.startswith("in place, no CUDA kernels; pip: exit status 1")
    package = Path(run.environment["PYTHONPATH"].split(os.pathsep)[0]) / "fastdl"
    assert (package / "kernels" / "linear.py").samefile(ROOT / "kernels" / "linear.py")
    done = Run.run_python(run, "-c", "import fastdl.bench.gpu as g; print(g.__file__)", limit=60)
    assert done.output.strip().startswith(str(package))


# -------------------------------------------------------------------------------------------------------------- pytest

TESTS = """
import pytest

@pytest.mark.parametrize("text", ["a b", "[c]"])
def test_passes(text): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_breaks(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.skip(reason="no such thing")
def test_skipped(): pass
@pytest.fixture
def bad(): raise ValueError("bad fixture")
def test_setup(bad): pass
def test_last(): pass
"""


@pytest.mark.parametrize("xdist", [False, True])
def test_tests_are_counted_and_failures_named(run, tmp_path, xdist):
    if xdist:
        pytest.importorskip("xdist")
        run.machine["packages"] = {"pytest-xdist": "3"}
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unimportable.py").write_text("import no_such_module\n")
    run.step = "tests"
    arguments = (str(tmp_path / "test_some.py"), str(tmp_path / "test_unimportable.py"), "-c", os.devnull)
    outcome = gpu._pytest(run, 240, 1, *arguments)
    failed = {line["test"].rpartition("::")[2].rpartition("/")[2]: line["message"] for line in outcome.data["failed"]}
    assert outcome.verdict == FAILED and outcome.data["finished"]
    assert set(failed) == {"test_fails", "test_breaks", "test_setup", "test_unimportable.py"}
    assert "one is not two" in failed["test_fails"] and "CUDA error" in failed["test_breaks"]
    assert "bad fixture" in failed["test_setup"] and "no_such_module" in failed["test_unimportable.py"]
    assert outcome.data["passed"] == 3  # test_last too: a worker whose context is broken is replaced
    assert sum(outcome.data["skipped"].values()) == 1 and "no such thing" in next(iter(outcome.data["skipped"]))


def test_tests_that_run_too_long_leave_what_they_have(run, tmp_path):
    source = "import time\ndef test_one(): pass\ndef test_two(): assert False\ndef test_three(): time.sleep(100)\n"
    (tmp_path / "test_slow.py").write_text(source)
    run.step = "tests"
    outcome = gpu._pytest(run, gpu.PATIENCE + 15, 1, str(tmp_path / "test_slow.py"), "-c", os.devnull)
    assert outcome.verdict == FAILED and "stopped before the end" in outcome.detail
    assert outcome.data["passed"] == 1 and len(outcome.data["failed"]) == 1 and not outcome.data["finished"]
    assert "assert False" in (run.work / "tests.failures.log").read_text()


def test_no_tests_is_no_pass(tmp_path):
    assert gpu.judge_tests(tmp_path / "none", Finished(5, "no tests ran")).verdict == FAILED
    (tmp_path / "skips").write_text(json.dumps({"test": "t", "when": "setup", "outcome": "skipped", "message": "m"}))
    assert gpu.judge_tests(tmp_path / "skips", Finished(0, "1 skipped")).verdict == FAILED


# ----------------------------------------------------------------------------------------- probes, sanitizer, benchmark


def test_probes_are_read():
    text = "mma bf16                     ok 0 \ntma, 2d  FAIL -1 cudaErrorX (what)\n1 failed\n"
    outcome = gpu.judge_probes(Finished(1, text))
    assert outcome.verdict == FAILED and outcome.data["probes"] == {"mma bf16": "ok", "tma, 2d": "FAIL"}
    assert outcome.data["worst"] == ["tma, 2d: error -1 cudaErrorX (what)"]
    assert gpu.judge_probes(Finished(0, "a b  ok 0 \n0 failed\n")).verdict == PASSED
    assert gpu.judge_probes(Finished(0, "")).verdict == FAILED
    assert gpu.judge_probes(Finished(-11, "a  ok 0 \n")).verdict == FAILED


def test_every_ptx_function_has_a_probe():
    """Whoever adds an instruction to ptx.cuh adds a probe: without one its twin is trusted blindly."""
    source = (ROOT / "csrc/cuda/ptx.cuh").read_text().partition("#else")[0]
    functions = set(re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", source)) - {"shared_address"}
    probed = set(re.findall(r"ptx::(\w+)", (ROOT / "tests/emulator/zoo/ptx_probes.cuh").read_text()))
    assert functions and functions <= probed


def test_programs_of_probes_compile(run):
    if run.execute(["nvcc", "--version"], 20).problem:
        pytest.skip("no nvcc")
    run.machine = dict(FAKE, devices=[])
    run.compile("confirm_ptx", "80")
    run.compile("confirm_sm90", "90a")
    for program in ("confirm_ptx", "confirm_sm90"):
        outcome = gpu.probes(program, run, gpu.COMPILE)
        assert (outcome.verdict, outcome.detail) == (SKIPPED, f"compiles; {gpu.NO_GPU}"), outcome.data
    assert gpu.probes("confirm_other", run, 10).verdict == SKIPPED


CLEAN = "138 calls on cuda\n========= ERROR SUMMARY: 0 errors\n"
INVALID = "========= Invalid __global__ read of size 4 bytes\n1 calls\n========= ERROR SUMMARY: 1 error\n"


def test_sanitizer_is_read():
    good = {"memcheck cuda": Finished(0, CLEAN), "racecheck cuda": Finished(0, CLEAN.replace("ERROR", "RACECHECK"))}
    assert gpu.judge_sanitizer(good).verdict == PASSED
    outcome = gpu.judge_sanitizer(good | {"memcheck triton": Finished(86, INVALID)})
    assert outcome.verdict == FAILED and "Invalid __global__ read" in outcome.data["verdicts"]["memcheck triton"]
    assert gpu.judge_sanitizer({"a": Finished(0, "========= ERROR SUMMARY: 0 errors\n")}).verdict == FAILED
    assert gpu.judge_sanitizer({"a": Finished(-9, CLEAN, True)}).verdict == FAILED
    refused = Finished(1, "========= Error: Device not supported. Please refer to the release notes\n")
    assert gpu.judge_sanitizer({"a": refused, "b": refused}).verdict == SKIPPED


def test_sanitizer_runs_every_tool_and_backend(run, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "compute-sanitizer"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\necho '{CLEAN}'\n")
    fake.chmod(0o755)
    run.environment["PATH"] = f"{fake.parent}:{run.environment['PATH']}"
    outcome = gpu.sanitizer(run, 60)
    assert outcome.verdict == PASSED and len(outcome.data["verdicts"]) == 4
    assert len(list(run.work.glob("sanitizer-*.log"))) == 4


def test_calls_reach_every_family(monkeypatch, capsys):
    from fastdl.bench import cases

    for family in cases.families():
        assert any(case.family == family for case in gpu.small_cases())
    some = {family: cases.checks(family)[:2] for family in cases.families()}
    monkeypatch.setattr(cases, "checks", some.__getitem__)
    assert gpu.calls("cpu") == 0
    assert capsys.readouterr().out == f"{2 * len(some)} calls on cpu\n"


@pytest.fixture
def measured(run, monkeypatch):
    """A benchmark of a few small cases on the CPU."""
    from fastdl.bench import cases, models, roofline

    def timed(family, device):
        some = {"128x128x128 relu", "256x256 relu"}
        return [case for case in real(family, device) if case.name in some and case.dtype == torch.float32]

    real = cases.timed
    monkeypatch.setattr(cases, "timed", timed)
    monkeypatch.setattr(roofline, "measure", lambda device, dtypes: (1e10, {str(d)[6:]: 1e11 for d in dtypes}))
    monkeypatch.setattr(models, "run", lambda *_: [])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # seconds a case
    run.folder.mkdir(parents=True)
    return run


def test_benchmark_ends_in_time_and_keeps_what_it_has(measured):
    folder = measured.folder
    assert gpu.bench(10.001, folder, "cpu", 0.01) == 0  # ten seconds are for the end
    notes = json.loads((folder / "results.json").read_text())["notes"]
    assert any("were not measured, beside 0 that were" in note for note in notes)


def test_benchmark_gives_records(measured):
    folder = measured.folder
    assert gpu.bench(60, folder, "cpu", 0.01) == 0
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert len({(row["case"], row["dtype"], row["direction"]) for row in rows}) >= 4
    measured.record()
    assert gpu.write_records(folder, "cpu") == 0
    found = json.loads((folder / "records.json").read_text())["records"]
    assert {record["op"] for record in found} >= {"linear", "linear_backward", "activation"}
    assert {record["source"] for record in found} == {f"bench/results/{measured.name}"}
    outcome = gpu.judge_benchmark(rows, Finished(0, ""))
    assert outcome.verdict == PASSED and f"{sum(row['kind'] == 'backend' for row in rows)} rows" in outcome.detail
    rows[-1] |= {"kind": "backend", "problem": "wrong"}
    assert gpu.judge_benchmark(rows, Finished(1, "")).verdict == FAILED


# --------------------------------------------------------------------------------------------------------------- merge


@pytest.fixture
def result(tmp_path):
    """A run's files as they come from $OUT, and a repository to merge them into."""
    folder, root = tmp_path / "out", tmp_path / "repository"
    folder.mkdir()
    (root / "fastdl").mkdir(parents=True)
    steps = {name: {"verdict": PASSED} for name in gpu.CORRECTNESS} | {"sanitizer": {"verdict": SKIPPED}}
    steps["hopper"] = {"verdict": SKIPPED}
    write(folder / "result.json", {"name": "gpu/1-abc", "steps": steps})
    write(folder / "records.json", {"records": [record("linear", 2.0), record("activation", 1.0)]})
    write(root / "fastdl" / "records.json", {"records": [record("linear", 1.0), record("other", 3.0)]})
    return folder, root


def write(path, content):
    path.write_text(json.dumps(content))


def record(op, ratio):
    return {"op": op, "backend": "cuda", "dtype": "float32", "code_path": "sm_90a", "passed": True} | {
        "source": f"bench/results/gpu/{ratio}",
        "speed": {"inference": {"fused": [[1, ratio]]}},
    }


def test_merge_replaces_and_keeps(result):
    folder, root = result
    gpu.merge(folder, root=root)
    merged = json.loads((root / "fastdl" / "records.json").read_text())["records"]
    assert merged == [record("activation", 1.0), record("linear", 2.0), record("other", 3.0)]
    place = root / "bench" / "results" / "gpu" / "1-abc"
    assert (place / "records.json").exists()
    gpu.merge(place, root=root)  # from its place as well


@pytest.mark.parametrize("change", [{"races": FAILED}, {"tests": SKIPPED}, {"hopper": FAILED}, {"ptx": None}])
def test_merge_refuses_what_is_not_proven(result, change):
    folder, root = result
    run = json.loads((folder / "result.json").read_text())
    ((name, verdict),) = change.items()
    run["steps"][name] = {"verdict": verdict}
    if verdict is None:
        del run["steps"][name]
    write(folder / "result.json", run)
    before = (root / "fastdl" / "records.json").read_text()
    with pytest.raises(SystemExit, match=f"{name} {verdict or 'not run'}"):
        gpu.merge(folder, root=root)
    assert (root / "fastdl" / "records.json").read_text() == before
    gpu.merge(folder, [name], root)


def test_the_shell_script_runs_the_steps_asked_for(tmp_path):
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT / "bench")!r})
        import gpu
        from pathlib import Path
        gpu.ROOT = Path({str(tmp_path)!r})
        assert "torch" not in sys.modules
        gpu.STEPS = (gpu.Step("environment", lambda run, s: gpu.Outcome("passed"), 1, 0, False),)
        sys.exit(gpu.main(["--only", "environment"]))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^environment +passed", done.stdout, re.MULTILINE)
    told = subprocess.run(["bash", ROOT / "bench" / "gpu.sh", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "merge" in told.stdout


def test_an_op_called_on_the_way_to_others_keeps_the_record_of_its_speed(tmp_path):
    record = {"op": "linear", "backend": "cpu", "dtype": "float32", "code_path": "avx2", "passed": True, "source": "a"}
    known, by_the_way = record | {"speed": {"inference": {}}}, record | {"source": "b", "speed": {}}
    target = tmp_path / "records.json"
    for new, kept in ((by_the_way, known), (by_the_way | {"passed": False}, by_the_way | {"passed": False})):
        target.write_text(json.dumps({"records": [known]}))
        assert gpu.merge_records([new], target) == 1
        assert json.loads(target.read_text())["records"] == [kept]
