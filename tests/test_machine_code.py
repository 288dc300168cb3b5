"""What nvcc and Triton make of the GPU kernels: no spills, the planned instructions and occupancy, as stored."""

from __future__ import annotations

import io
import os
import sys

import pytest
from fastdl.bench import machine_code
from fastdl.bench.machine_code import TARGETS, Code
from rich.console import Console

GOOD = Code(128, 0, 0, 1024, 256, 2, {"HGMMA": 4}, {"tma": 2}, {"16": 1}, 2, "HGMMA", 16)


def test_stored_tables_keep_their_plans():
    _, tables = machine_code.load()
    assert tables.keys() == {target.name for target in TARGETS}
    assert machine_code.problems(tables) == []


def test_sample_keeps_its_plans_and_is_as_stored():
    """The declared sample of kernels, compiled now, unless the build has left a kernel's machine code."""
    reason = machine_code.why_unavailable()
    if reason and os.environ.get("FASTDL_CUDA") != "1":
        pytest.skip(reason)
    assert reason is None
    sample = machine_code.compile_all(every=False)
    assert all(sample[target.name] for target in TARGETS if target.is_nvidia)
    assert machine_code.problems(sample) == []
    update = f"if this is meant: {machine_code.COMMAND}, and review the tables' diff"
    assert list(machine_code.differences(sample, every=False)) == [], update


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"stack": 8}, "spills"),
        ({"spills": 2}, "spills"),
        ({"matrix": {"HMMA": 4}}, "no HGMMA, but HMMA"),
        ({"blocks": 1}, "1 blocks a multiprocessor, planned 2"),
        ({"loads": {"4": 8}}, "no access of 16 bytes"),
        ({"stores": {"2": 8}}, "no access of 16 bytes"),
    ],
)
def test_missed_plans_are_found(change, problem):
    found = Code(**{**GOOD.__dict__, **change}).problems()
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"registers": 134}, 0),
        ({"registers": 140}, 1),
        ({"shared": 2048}, 1),
        ({"matrix": {"HGMMA": 8}}, 0),
        ({"matrix": {"HMMA": 4}}, 1),
        ({"loads": {"4": 1, "tma": 1}}, 1),
    ],
)
def test_differences_beyond_jitter_are_found(change, found):
    assert len(Code(**{**GOOD.__dict__, **change}).differences(GOOD)) == found


def test_sass_is_read():
    sass = """
	code for sm_80
		Function : first
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2.64] ;             /* 0x1 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.64 [R5], [R2.64] ;   /* 0x1 */
        /*0020*/                   LDG.E.U16 R4, [R2.64] ;                      /* 0x1 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R2, R8 ;         /* 0x1 */
        /*0040*/               @P1 STL.64 [R1], R4 ;                            /* 0x1 */
        /*0050*/              @UP0 UTMASTG.2D [UR4], [UR6] ;                    /* 0x1 */
		Function : second
        /*0000*/                   STG.E [R2.64], R4 ;                          /* 0x1 */
"""
    found = machine_code.read_sass(sass)
    assert found["first"] == {
        "spills": 1,
        "matrix": {"HMMA": 1},
        "loads": {"16": 1, "2": 1, "8": 1},
        "stores": {"tma": 1},
    }
    assert found["second"] == {"spills": 0, "matrix": {}, "loads": {}, "stores": {"4": 1}}


def test_ptx_states_plans():
    ptx = """
.visible .entry plain(
.param .u64 x)
{
ret;
}
.visible .entry bounded(
.param .u64 x)
.maxntid 256
.minnctapersm 2
{
	// dynamic shared memory: 4096 bytes
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
}
"""
    plans = machine_code.read_ptx(ptx)
    assert plans["plain"] == {"threads": 1024, "planned_blocks": 1, "planned_matrix": "", "dynamic_shared": 0}
    assert plans["bounded"] == {"threads": 256, "planned_blocks": 2, "planned_matrix": "HMMA", "dynamic_shared": 4096}


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 256, 128, 0, 2),  # registers
        ("sm_80", 256, 129, 0, 1),
        ("sm_80", 128, 32, 0, 16),  # threads
        ("sm_80", 32, 16, 0, 32),  # blocks
        ("sm_90a", 128, 32, 100 * 1024, 2),  # shared memory
        ("sm_90a", 256, 255, 227 * 1024, 1),
        ("gfx942", 256, 128, 0, 4),
        ("gfx942", 256, 100, 40 * 1024, 1),
    ],
)
def test_occupancy(target, threads, registers, shared, blocks):
    (found,) = (each for each in TARGETS if each.name == target)
    assert found.occupancy(threads, registers, shared) == blocks


def test_tables_are_printed():
    console = Console(record=True, width=200, file=io.StringIO())
    machine_code.print_tables({"sm_90a": {"good": GOOD, "bad": Code(128, 8, 2, 0, 256, 2)}}, console)
    text = console.export_text()
    assert "HGMMA x4" in text and "bad: spills: 8 bytes of stack" in text and "2 kernels, 1 missed plans" in text


def test_command_checks(monkeypatch, tmp_path, capsys):
    """The update writes what was found; the check then finds it so, and a change later."""
    monkeypatch.setattr(machine_code, "TABLES", tmp_path)
    monkeypatch.setattr(machine_code, "why_unavailable", lambda: None)
    monkeypatch.setattr(machine_code, "compilers", lambda: {"nvcc": "1", "triton": "2"})
    found = {"sm_90a": {"kernel": GOOD}}
    monkeypatch.setattr(machine_code, "compile_all", lambda every: found)
    monkeypatch.setattr(sys, "argv", ["machine_code"])
    assert machine_code.main() == 0
    monkeypatch.setattr(sys, "argv", ["machine_code", "--check"])
    assert machine_code.main() == 0
    found["sm_90a"]["other"] = GOOD
    assert machine_code.main() == 1
    assert "other: not in the stored table" in capsys.readouterr().out
