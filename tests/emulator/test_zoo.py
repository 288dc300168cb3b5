"""The emulator itself: right kernels stay clean in every build, and each planted bug is caught where it should be."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import emulation
import plant
import pytest

ORDERS = [f"{schedule}/{completion}" for schedule in ("forward", "reverse") for completion in ("early", "late")]
EARLY = [order for order in ORDERS if order.endswith("early")]
LATE = [order for order in ORDERS if order.endswith("late")]
RANDOM = [f"random/random/{seed}" for seed in range(1, 11)]
REPORTS = {"asan": r"ERROR: AddressSanitizer|runtime error:", "tsan": r"WARNING: ThreadSanitizer"}

RIGHT = ["syncwarp", "shared memory", "shared index", "shared dimension", "dynamic shared index", "ldmatrix address"]
RIGHT += ["last block", "grid barrier", "histogram", "early exit", "votes", "mbarrier, bar.arrive", "tf32 rounding"]
RIGHT += ["exp2, anew"]
RIGHT += ["mma bf16", "mma f16", "mma tf32", "mma bf16 reals", "mma f16 reals", "mma tf32 reals", "cp.async"]
RIGHT += ["shuffles, votes", "arrivals", "ldmatrix x1", "ldmatrix x2", "ldmatrix x4"]
RIGHT += ["ldmatrix x1.trans", "ldmatrix x2.trans", "ldmatrix x4.trans"]
RIGHT += [f"ldmatrix banks, pitch {pitch}" for pitch in (8, 32, 40, 64, 72)]
RIGHT += [f"matmul {shape}" for shape in ("64x64x32", "1x1x1", "65x63x33", "65x63x96", "100x70x200", "7x130x40")]
RIGHT += ["matmul 129x1x24", "matmul misaligned", "matmul conflicts"]
RIGHT += [f"batch statistics {shape}" for shape in ("4x3x49", "2x5x1", "3x2x500")]
RIGHT += [f"hopper narrow {shape}" for shape in ("1x1x1", "130x129x65", "tiles", "long")]
RIGHT += [f"hopper wide {shape}" for shape in ("1x8x1", "257x40x31", "tiles", "preactivation")]
RIGHT += ["tma 2d swizzled", "tma 2d plain", "tma 3d swizzled", "tma 3d plain", "cluster, dsmem, multicast", "stmatrix"]
RIGHT += [f"wgmma {form}" for form in ("bf16 n64 ss", "bf16 n128 ss", "bf16 n256 ss", "f16 n64 ss", "bf16 n64 rs")]
RIGHT += [f"wgmma {form}" for form in ("f16 n128 rs", "bf16 n128 mn-major", "f16 n256 mn-major")]
RIGHT += [f"conv {name}" for name in ("image", "image, wide window", "weight", "weight, odd channels")]
RIGHT += [f"recurrence {name}" for name in ("bf16", "float32", "float32, by steps", "of many rows", "gradient")]
RIGHT += [f"attention {name}" for name in ("bf16", "float32", "gradient bf16", "gradient float32")]
# Kernels that are wrong as they stand.
WRONG = ["divergent barrier", "divergent shuffle", "mask of absent lanes", "race between blocks", "race within a block"]
WRONG += ["misaligned vector", "integer overflow", "exit with copies in flight"]

# Where a bug is caught. (case, bug): (by the plain build's own checks, "error", or by wrong "numbers", or None; the
# settings in which it must be; the sanitizer that must report it, if any).
MATMUL, STATISTICS = "matmul 65x63x96", "batch statistics 4x3x49"
NARROW, WIDE, CLUSTER = "hopper narrow tiles", "hopper wide tiles", "cluster, dsmem, multicast"
IMAGE, WEIGHT = "conv image, wide window", "conv weight"
LAYER, GRADIENT = "recurrence bf16", "recurrence gradient"
ATTENTION, ATTENTION_GRADIENT = "attention bf16", "attention gradient bf16"
ALWAYS = [*ORDERS, *RANDOM]
BUGS = {
    ("divergent barrier", "none"): ("error", ALWAYS, None),
    ("divergent shuffle", "none"): ("error", ALWAYS, None),
    ("mask of absent lanes", "none"): ("error", ALWAYS, None),
    ("race between blocks", "none"): (None, [], "tsan"),
    ("race within a block", "none"): (None, [], "tsan"),
    ("misaligned vector", "none"): (None, [], "asan"),
    ("integer overflow", "none"): (None, [], "asan"),
    ("exit with copies in flight", "none"): ("error", LATE, None),
    ("syncwarp", "no __syncwarp"): ("numbers", ALWAYS, "tsan"),
    ("shared memory", "uninitialised shared memory"): ("numbers", ALWAYS, None),
    ("shared index", "shared array index"): (None, [], "asan"),
    ("shared dimension", "shared dimension index"): (None, [], "asan"),
    ("dynamic shared index", "dynamic shared index"): (None, [], "asan"),
    ("ldmatrix address", "misaligned ldmatrix"): ("error", ALWAYS, None),
    ("last block", "last block without fence"): (None, [], "tsan"),
    ("grid barrier", "no grid barrier"): ("numbers", ALWAYS, "tsan"),
    (MATMUL, "no cp.async wait"): ("numbers", LATE, None),
    (MATMUL, "no barrier before compute"): ("numbers", ALWAYS, "tsan"),
    (MATMUL, "no barrier before reuse"): ("numbers", ORDERS, "tsan"),
    (MATMUL, "shared out of bounds"): ("error", ALWAYS, None),
    (MATMUL, "global out of bounds"): (None, [], "asan"),
    (STATISTICS, "no barrier between warps"): ("numbers", ["forward/early", "forward/late"], "tsan"),
    (STATISTICS, "a warp too many"): (None, [], "asan"),
    (NARROW, "no wgmma wait"): ("error", ALWAYS, None),
    (NARROW, "wait one group too few"): ("error", ALWAYS, None),
    (NARROW, "no wgmma.fence"): ("error", ALWAYS, None),
    (NARROW, "no wgmma.commit"): ("error", ALWAYS, None),
    (NARROW, "wrong consumer parity"): ("error", ALWAYS, None),
    (NARROW, "wrong producer parity"): ("error", ALWAYS, None),
    (WIDE, "wrong producer parity"): ("error", ALWAYS, None),
    (NARROW, "expect_tx too small"): ("error", ALWAYS, None),
    (NARROW, "expect_tx too large"): ("error", ALWAYS, None),
    (NARROW, "no expect_tx"): ("error", ALWAYS, None),
    (WIDE, "stage released before the wait"): ("numbers", [*LATE, *RANDOM], "tsan"),
    (WIDE, "current stage released"): ("numbers", [*LATE, *RANDOM], "tsan"),
    (NARROW, "producer skips empty wait"): ("error", ALWAYS, None),
    (WIDE, "producer skips empty wait"): ("error", ALWAYS, None),
    (NARROW, "no fence.proxy.async"): ("numbers", ALWAYS, "tsan"),
    (WIDE, "no barrier before the TMA store"): ("numbers", ["forward/early", "forward/late", *RANDOM], "tsan"),
    (WIDE, "no barrier after the store wait"): ("numbers", LATE, "tsan"),
    (NARROW, "epilogue not swizzled"): ("numbers", ALWAYS, None),
    (NARROW, "map not swizzled"): ("numbers", ALWAYS, None),
    (NARROW, "wrong descriptor stride"): ("numbers", ALWAYS, None),
    (NARROW, "store buffer reused"): ("numbers", [*LATE, *RANDOM], "tsan"),
    ("hopper wide preactivation", "preactivation's buffer reused"): ("numbers", [*LATE, *RANDOM], "tsan"),
    (NARROW, "exit before the store read"): ("error", LATE, None),
    (NARROW, "no mbarrier init fence"): ("error", ALWAYS, None),
    (NARROW, "consumer skips a tile"): ("error", ALWAYS, None),
    (WIDE, "consumer skips a tile"): ("error", ALWAYS, None),
    ("hopper narrow long", "no turns"): ("error", ALWAYS, None),
    ("hopper narrow long", "turn handed over too early"): ("error", ORDERS, None),
    (NARROW, "turn not handed over"): ("error", ALWAYS, None),
    (NARROW, "the other's stages not skipped"): ("error", ALWAYS, None),
    (WIDE, "stage released to one block"): ("error", ALWAYS, None),
    (WIDE, "weight not shared"): ("error", ALWAYS, None),
    (WIDE, "no cluster sync after init"): ("error", EARLY, None),
    (WIDE, "no cluster sync at exit"): ("error", ORDERS, None),
    ("stmatrix", "no __syncwarp after stmatrix"): (None, [], "tsan"),
    ("wgmma bf16 n64 ss", "wgmma operand not fenced"): ("numbers", ALWAYS, "tsan"),
    (CLUSTER, "no cluster sync after init"): ("error", ALWAYS, None),
    (CLUSTER, "no cluster sync at exit"): ("error", ALWAYS, None),
    (CLUSTER, "too few cluster bytes"): ("error", ALWAYS, None),
    (IMAGE, "padding counts as image"): ("numbers", ALWAYS, None),
    (IMAGE, "no left border"): ("numbers", ALWAYS, None),
    (IMAGE, "taps in the wrong order"): ("numbers", ALWAYS, None),
    (IMAGE, "rows of other dilation"): ("numbers", ALWAYS, None),
    (IMAGE, "no wait for copies"): ("numbers", LATE, None),
    (IMAGE, "waits for one stage too few"): ("numbers", LATE, None),
    (WEIGHT, "no wait for copies"): ("numbers", LATE, None),
    (WEIGHT, "no barrier before positions are read"): ("numbers", ["forward/early", "forward/late"], None),
    (WEIGHT, "one table of positions"): ("numbers", ORDERS, None),
    ("conv weight, odd channels", "channels beyond the group"): (None, [], "asan"),
    (LAYER, "no barrier between steps"): ("numbers", ALWAYS, "tsan"),
    (GRADIENT, "no barrier between steps"): ("numbers", ALWAYS, "tsan"),
    (LAYER, "barrier of one block"): ("numbers", ORDERS, "tsan"),
    (LAYER, "arrival before the block is done"): ("numbers", ["forward/early", "forward/late"], "tsan"),
    (LAYER, "threads do not wait for the barrier"): ("numbers", ["reverse/early", "reverse/late"], "tsan"),
    (LAYER, "one buffer for h"): ("numbers", ALWAYS, "tsan"),
    (LAYER, "sums read before they are there"): ("numbers", ALWAYS, "tsan"),
    ("recurrence of many rows", "sums not reused in turn"): ("numbers", ALWAYS, "tsan"),
    ("recurrence float32, by steps", "exchange overwritten"): ("numbers", ALWAYS, None),
    ("recurrence float32", "exchange read too early"): ("numbers", ALWAYS, "tsan"),
    (LAYER, "no wait for the weights"): ("error", LATE, None),
    (LAYER, "a row ends a step late"): ("numbers", ALWAYS, None),
    (ATTENTION, "keys not waited for"): ("numbers", LATE, None),
    (ATTENTION, "values not waited for"): ("error", LATE, None),
    (ATTENTION, "no barrier before keys are read"): ("numbers", ALWAYS, "tsan"),
    (ATTENTION, "no barrier before values are read"): ("numbers", ALWAYS, "tsan"),
    (ATTENTION, "edge not masked"): ("numbers", ALWAYS, None),
    (ATTENTION, "sums not corrected"): ("numbers", ALWAYS, None),
    (ATTENTION_GRADIENT, "keys' stage not waited for"): ("error", LATE, None),
    (ATTENTION_GRADIENT, "queries' stage not waited for"): ("error", LATE, None),
    (ATTENTION_GRADIENT, "no barrier before keys' stage is read"): ("numbers", ALWAYS, "tsan"),
    (ATTENTION_GRADIENT, "no barrier before queries' stage is read"): ("numbers", ALWAYS, "tsan"),
    (ATTENTION_GRADIENT, "statistics of no query missing"): ("numbers", ALWAYS, None),
    (ATTENTION_GRADIENT, "one head of the group"): ("numbers", ALWAYS, None),
    (ATTENTION_GRADIENT, "one stage"): ("numbers", ALWAYS, "tsan"),
}


@functools.cache
def reason(mode: str) -> str | None:
    return emulation.why_unavailable(mode)


def run(mode: str, case: str, bug: str, settings: list[str]) -> str:
    if why := reason(mode):
        pytest.skip(why)
    return emulation.run(mode, [emulation.zoo(mode), case, bug, *settings]).stdout


def verdicts(output: str) -> list[str]:
    """Each setting's "ok", "wrong" or "error"; a deadlock report's further lines are indented."""
    return re.findall(r"^(ok|wrong|error) ", output, re.MULTILINE)


def test_every_case_is_used():
    if why := reason("plain"):
        pytest.skip(why)
    listed = emulation.run("plain", [emulation.zoo(), "list"]).stdout.split("\n")[:-1]
    assert sorted(listed) == sorted([*RIGHT, *WRONG])
    assert {case for case, _ in BUGS} <= set(listed)
    assert {bug for bugs in plant.BUGS.values() for bug in bugs} <= {bug for _, bug in BUGS}


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_pass(case):
    assert verdicts(run("plain", case, "none", ALWAYS)) == ["ok"] * len(ALWAYS)


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_pass_asan(case):
    output = run("asan", case, "none", ["forward/early", "reverse/late", "random/random/5"])
    assert verdicts(output) == ["ok"] * 3, output
    assert not re.search(REPORTS["asan"], output), output


@pytest.mark.parametrize("case", [case for case in RIGHT if "banks" not in case and "tf32 r" not in case])
def test_right_kernels_pass_tsan(case):
    settings = ["forward/early/1/0", "random/late/5/1"]
    output = run("tsan", case, "none", settings)
    assert verdicts(output) == ["ok"] * len(settings), output
    assert not re.search(REPORTS["tsan"], output), output


@pytest.mark.parametrize(("case", "bug"), [key for key, (plain, _, _) in BUGS.items() if plain])
def test_planted_bug_is_caught(case, bug):
    plain, settings, _ = BUGS[case, bug]
    output = run("plain", case, bug, settings)
    found = verdicts(output)
    assert len(found) == len(settings) and "ok" not in found, output
    assert ("error" if plain == "error" else "wrong") in found, output
    if plain == "error":
        assert re.search(r"\.(cu|cuh):\d+|cp.async", output), "the message names no place in the source"


@pytest.mark.parametrize(("case", "bug"), [key for key, (_, _, sanitizer) in BUGS.items() if sanitizer])
def test_planted_bug_is_reported(case, bug):
    sanitizer = BUGS[case, bug][2]
    output = run(sanitizer, case, bug, ["forward/late/1/1"])
    assert re.search(REPORTS[sanitizer], output), output


def test_every_bug_has_its_place():
    for header, bugs in plant.BUGS.items():
        planted = plant.plant((emulation.KERNELS / header).read_text(), bugs)
        assert all(f'BUG("{bug}")' in planted for bug in bugs)
        with pytest.raises(ValueError, match="no occurrence"):
            plant.plant("nothing of it", bugs)


def test_the_probes_pass_here_too():
    """What a Hopper GPU will be asked, the library's whole forward included."""
    if why := reason("plain"):
        pytest.skip(why)
    output = emulation.run("plain", [emulation.confirm()]).stdout
    assert output.endswith("0 failed\n"), output
    assert len(re.findall(r"^forward .* ok ", output, re.MULTILINE)) == 6


def test_the_probes_compile_for_hopper(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    command = [
        "nvcc",
        "-std=c++20",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Werror=all-warnings",
        f"-I{emulation.KERNELS}",
    ]
    command += [emulation.HERE / "zoo" / "confirm_sm90.cu", "-o", tmp_path / "confirm_sm90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
