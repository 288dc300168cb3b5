"""Measures this machine for ``auto``: which kernels are right here, and how fast beside torch, by shape."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdl import dispatch, proof

from . import report, runner
from .gpu import merge_records
from .outcome import BACKEND, Results, provenance
from .timing import DISTURBED


def run(
    quick: bool, families: list[str] | None, device: torch.device, budget: float | None, console: Console
) -> Results:
    """Times the cases and writes what ``auto`` reads into :func:`fastdl.proof.tuning_file`."""
    results = Results(provenance(device, " ".join(sys.argv[1:])))
    runner.time_cases(results, quick, families, device, False, budget, console)
    report.print_all(results, console)
    path = proof.tuning_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"records": records(results, device)}, indent=1) + "\n")
    proof.tuned.cache_clear()
    dispatch.forget_selections()
    console.print(f"\nwritten: {path}; auto follows it from now on")
    return results


def records(results: Results, device: torch.device) -> list[dict[str, Any]]:
    """A run's rows as :mod:`fastdl.proof` reads them: each op, backend, dtype and code path with its speed by shape.

    The speed of training, forward and backward together, is kept with the forward's op: it decides for both.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in results.of(BACKEND):
        if row.backend == "auto":
            continue
        for position, call in enumerate(row.calls):
            dtype, path = call["dtype"].removeprefix("torch."), call["path"]
            record = found.setdefault(
                (call["op"], row.backend, dtype, path),
                {"op": call["op"], "backend": row.backend, "dtype": dtype, "code_path": path}
                | {"passed": True, "source": f"the run of {results.provenance['time']}", "speed": {}},
            )
            record["passed"] &= row.passed
            quiet = (row.others or 0) <= DISTURBED  # a time that others have disturbed must not decide
            if position == 0 and call["class"] is not None and row.over and quiet:
                label, sizes = call["class"]
                mode = "training" if "+" in row.direction else "inference"
                points = record["speed"].setdefault(mode, {}).setdefault(label, {})
                # Cases that differ in what the class does not tell: the slowest speaks for it.
                shape, ratio = tuple(sizes), round(row.over["eager"].median, 3)
                points[shape] = min(ratio, points.get(shape, ratio))
    for record in found.values():
        for labels in record["speed"].values():
            labels.update({label: [[*s, ratio] for s, ratio in points.items()] for label, points in labels.items()})
    return list(found.values())


def main(arguments: Sequence[str]) -> None:
    """python -m fastdl.bench.tune RESULTS.json...: takes committed CPU runs into fastdl/records.json."""
    for path in map(Path, arguments):
        results = Results.load(path)
        new = [record | {"source": path.as_posix()} for record in records(results, torch.device("cpu"))]
        print(f"{path}: {len(new)} of {merge_records(new, Path('fastdl/records.json'))} records")


if __name__ == "__main__":
    main(sys.argv[1:])
