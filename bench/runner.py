"""Runs the benchmark: correctness gate, timing, roofline, a model on real data; and its commands."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastdl
from fastdl import dispatch

from . import cases, machine_code, report, roofline, timing
from .cases import Case
from .correctness import Gate, Sample, draw, step
from .outcome import BACKEND, CHECK, PEER, Results, Row, provenance

EAGER, COMPILE = "torch eager", "torch.compile"
QUICK, FULL = 0.3, 5.0  # seconds of measuring, a case
TRIES = 2  # measurements of a case that other processes disturb
QUICK_RETRIES = 20.0  # seconds after which the quick set repeats no more
INTERPRETED = "no GPU here: the Triton kernels were checked in Triton's interpreter on small ragged shapes, not timed"


def add_commands(commands: Any) -> None:
    """Adds ``bench``, ``check``, ``tune``, ``report`` to argparse's subparsers; each sets ``run``."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--family", action="append", choices=cases.families(), help="only this family; may be repeated")
    common.add_argument("--device", help="cuda, cuda:1, cpu; default: the GPU if there is one")
    measuring = argparse.ArgumentParser(add_help=False, parents=[common])
    measuring.add_argument("--quick", action="store_true", help="a small set of cases: under four minutes on two cores")
    measuring.add_argument("--budget", type=float, metavar="SECONDS", help="of measuring, for each case")

    bench = commands.add_parser("bench", parents=[measuring], help="check every kernel, then time it beside torch")
    bench.add_argument("--compile", action="store_true", help="torch.compile as one more peer (slow to start)")
    bench.add_argument("--out", type=Path, help="folder for the results; default: bench-results/<time>-<device>")
    bench.set_defaults(run=_bench_command)
    check = commands.add_parser("check", parents=[common], help="correctness only, on small ragged shapes")
    check.set_defaults(run=_check_command)
    tune = commands.add_parser("tune", parents=[measuring], help="measure this machine, for auto's choices here")
    tune.set_defaults(run=_tune_command)
    show = commands.add_parser("report", help="tables, plots and one HTML file from a run's results.json")
    show.add_argument("results", type=Path, nargs="?", help="results.json")
    show.add_argument("--machine-code", action="store_true", help="registers, spills, occupancy of every GPU kernel")
    show.add_argument("--out", type=Path, help="folder for the plots and the HTML file; default: beside results.json")
    show.set_defaults(run=_report_command)


def run(
    quick: bool = False,
    families: list[str] | None = None,
    device: str | None = None,
    out: Path | None = None,
    compile: bool = False,
    budget: float | None = None,
    models: bool = True,
    console: Console | None = None,
) -> Results:
    """The whole benchmark; prints tables, writes results.json, plots and report.html.

    Args:
        quick: the small set of cases.
        families: which ones; None for all.
        device: such as ``"cuda"``; None for the GPU if there is one, else the CPU.
        out: folder for the files; None for ``bench-results/<UTC time>-<device>``.
        compile: ``torch.compile`` as one more peer.
        budget: seconds of measuring for each case.
        models: whether to end with the models on real data.
        console: where to print.
    """
    target = _device(device)
    console = console or _console()
    results = Results(provenance(target, " ".join(sys.argv[1:])))
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    out = out or Path("bench-results") / f"{stamp}-{_slug(results.provenance['device'])}"
    out.mkdir(parents=True, exist_ok=True)
    report.print_provenance(results, console)

    _check_all(results, families, target, console)
    time_cases(results, quick, families, target, compile, budget, console)
    if models:
        from . import models as real

        with console.status("training models on real data"):
            results.models += real.run(target, out)
    results.save(out / "results.json")
    report.print_all(results, console)
    report.write_files(results, out)
    console.print(f"\nwritten: {out}/results.json, report.html and plots")
    return results


def check(families: list[str] | None = None, device: str | None = None, console: Console | None = None) -> Results:
    """Correctness alone: small ragged shapes on every backend; without a GPU, Triton's in its interpreter."""
    target = _device(device)
    console = console or _console()
    results = Results(provenance(target, " ".join(sys.argv[1:])))
    _check_all(results, families, target, console)
    report.print_all(results, console)
    return results


def time_cases(
    results: Results,
    quick: bool,
    families: list[str] | None,
    device: torch.device,
    compile: bool,
    budget: float | None,
    console: Console,
) -> None:
    """Checks and times every case of the set; adds the rows and the device's ceilings to ``results``."""
    chosen = [case for family in families or cases.families() for case in cases.timed(family, device.type)]
    chosen = [case for case in chosen if case.quick or not quick]
    retries_end = time.monotonic() + (QUICK_RETRIES if quick else math.inf)
    with console.status("measuring the roofline: a large copy, torch's best matmul"):
        results.bandwidth, results.flops = roofline.measure(device, list(dict.fromkeys(case.dtype for case in chosen)))
    for case in _progress(chosen, "measuring", console):
        tries = TRIES if time.monotonic() < retries_end else 1
        results.rows += _time_case(case, device, compile, budget or (QUICK if quick else FULL), tries, results.notes)
    for row in results.of(PEER):  # a ceiling is what was reached once, by whatever call of torch's
        results.flops[row.dtype] = max(results.flops[row.dtype], row.flops_rate or 0)
    for row in results.rows:
        if row.flops_rate and row.bytes_rate:
            row.roofline = max(row.flops_rate / results.flops[row.dtype], row.bytes_rate / results.bandwidth)


def _time_case(
    case: Case, device: torch.device, compile: bool, budget: float, tries: int, notes: list[str]
) -> list[Row]:
    sample = draw(case, device)
    gate = Gate(case, sample)
    peers = {EAGER: case.eager, **{f"torch {name}": call for name, call in case.fused.items()}}
    if compile:
        peers[COMPILE] = torch.compile(case.eager, dynamic=False)
    rows = []
    for label, call in peers.items():
        row = _judge(case, gate, sample, label, PEER, call, notes)
        if row is not None and row.passed:
            rows.append(row)
        elif row is not None:
            notes.append(f"{case}: {label} left out: {row.problem}")
    backends = (*dispatch.AUTO_ORDER[device.type], "auto")
    judged = [_judge(case, gate, sample, backend, BACKEND, case.call, notes) for backend in backends]
    ours = {row.backend: row for row in judged if row is not None}
    for row in ours.values():
        row.auto = ours["auto"].runs
    if ours["auto"].runs in ours and ours["auto"].passed:
        del ours["auto"]  # the same kernels: one row tells both
    rows += ours.values()
    calls = {row.backend: peers.get(row.backend, case.call) for row in rows if row.passed}
    contenders = {
        row.backend: timing.Contender(row.backend, step(case, calls[row.backend]), _context(row))
        for row in rows
        if row.backend in calls
    }
    del gate
    timed = timing.measure([*contenders.values()], timing.rotation(sample, case.overhead), budget, case.overhead, tries)
    fused = [f"torch {name}" for name in case.fused if f"torch {name}" in contenders]
    best = min(fused, key=lambda label: timed.time(label).median, default="")
    for row in rows:
        if row.backend not in contenders:
            continue
        row.time, row.method, row.others, row.fused = (
            timed.time(row.backend),
            timed.method,
            timed.others,
            best.removeprefix("torch "),
        )
        if row.kind == BACKEND:
            measured = {"eager": EAGER, "fused": best, "compile": COMPILE}
            row.over = {k: timed.ratio(peer, row.backend) for k, peer in measured.items() if peer in contenders}
        row.peak_bytes = timing.peak_memory(contenders[row.backend], sample)
        if not case.overhead:
            row.flops_rate, row.bytes_rate = case.flops / row.time.median, case.bytes / row.time.median
    return rows


def _check_all(results: Results, families: list[str] | None, device: torch.device, console: Console) -> None:
    backends = [backend for backend in (*dispatch.BACKENDS, "auto") if backend != "torch"]
    chosen = [case for family in families or cases.families() for case in cases.checks(family)]
    for case in _progress(chosen, "checking", console):
        sample = draw(case, device, seed=1)
        gate = Gate(case, sample)
        rows = [_judge(case, gate, sample, backend, CHECK, case.call, results.notes) for backend in backends]
        results.rows += [row for row in rows if row is not None]
    if device.type == "cpu" and any(row.backend == "triton" for row in results.of(CHECK)):
        results.notes.insert(0, INTERPRETED)


def _judge(
    case: Case, gate: Gate, sample: Sample, label: str, kind: str, call: Callable[..., Any], notes: list[str]
) -> Row | None:
    """A row with errors and what ran; None, and a note of the reason, where the backend can't do the call."""
    row = Row(case.family, case.name, case.dtype_name, case.direction, label, kind)
    with _context(row)():
        try:
            row.errors = gate.judge(call)
            with fastdl.trace() as calls:  # the second call: in the first, auto may still have proved a kernel
                step(case, call)(sample)
        except fastdl.UnsupportedError as error:
            reason = str(error).rpartition("cannot do this call: ")[2]
            note = f"{label} not run for {case.family}: {reason}"
            notes += [] if note in notes else [note]
            return None
        except Exception as error:  # a kernel that raises has failed, and the rest goes on
            row.problem = f"{type(error).__name__}: {error}"
            return row
    if not row.passed:
        worst = max(row.errors, key=lambda error: error.share)
        row.problem = f"{worst.tensor} has error {worst.norm:.2g}, allowed {worst.norm_bound:.2g}"
        row.problem += f", at worst {worst.worst:.2g}, allowed {worst.worst_bound:.2g}"
    row.runs = "+".join(dict.fromkeys(call.backend for call in calls))
    row.reason = "; ".join(dict.fromkeys(call.reason for call in calls))
    calls = sorted(calls, key=lambda call: call.op != case.op)  # a record's speed is that of the first
    row.calls = [{"op": c.op, "dtype": str(c.dtype), "class": c.shape_class, "path": c.code_path} for c in calls]
    return row


def _context(row: Row) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The backend that a row is about."""
    return contextlib.nullcontext if row.kind == PEER else functools.partial(fastdl.use_backend, row.backend)


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text).split()).lower()


def _progress(items: Iterable[Case], doing: str, console: Console) -> Iterator[Case]:
    """The items, with a bar and the name of the one in hand."""
    items = list(items)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own calls; failures are rows, not warnings
        task = bar.add_task(doing, total=len(items))
        for item in items:
            bar.update(task, description=f"{doing} {item}")
            yield item
            bar.advance(task)


# --------------------------------------------------------------------------------------------------------- commands


def _bench_command(options: argparse.Namespace) -> int:
    results = run(options.quick, options.family, options.device, options.out, options.compile, options.budget)
    return 0 if results.passed else 1


def _check_command(options: argparse.Namespace) -> int:
    return 0 if check(options.family, options.device).passed else 1


def _tune_command(options: argparse.Namespace) -> int:
    from . import tune

    tune.run(options.quick, options.family, _device(options.device), options.budget, _console())
    return 0


def _report_command(options: argparse.Namespace) -> int:
    if options.machine_code:
        return machine_code.show(_console())
    if options.results is None:
        raise SystemExit("fastdl report: name a results.json, or take --machine-code")
    results = Results.load(options.results)
    out = options.out or options.results.parent
    out.mkdir(parents=True, exist_ok=True)
    report.print_all(results, _console())
    report.write_files(results, out)
    return 0 if results.passed else 1
