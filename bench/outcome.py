"""What a run found: one row a case and backend, with where it came from; kept as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastdl

from .correctness import Error
from .timing import Quartiles

PEER, BACKEND, CHECK = "peer", "backend", "check"


@dataclass
class Row:
    """One case on one backend (or by one of torch's own calls).

    Attributes:
        kind: PEER, BACKEND (timed) or CHECK (small, not timed).
        runs: the backends that the call's ops ran on.
        reason: why those.
        auto: the backends that ``auto`` chose in this case.
        problem: what went wrong in the correctness gate, or "".
        over: how many times as fast as each peer, by "eager", "fused" (torch's fastest fused call) and "compile".
        roofline: the least time that the device's ceilings allow, as a share of the time taken.
        others: share of the machine that other processes took meanwhile.
    """

    family: str
    case: str
    dtype: str
    direction: str
    backend: str
    kind: str
    runs: str = ""
    reason: str = ""
    auto: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    errors: list[Error] = field(default_factory=list)
    time: Quartiles | None = None
    over: dict[str, Quartiles] = field(default_factory=dict)
    fused: str = ""
    flops_rate: float | None = None
    bytes_rate: float | None = None
    roofline: float | None = None
    peak_bytes: int | None = None
    method: str = ""
    others: float | None = None

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.family} {self.case} {self.dtype} {self.direction}"

    @property
    def passed(self) -> bool:
        """Whether every output and gradient is within its bound."""
        return not self.problem and all(error.passed for error in self.errors)

    @property
    def share(self) -> float:
        """The error nearest to its bound, or furthest beyond, as a share of the bound."""
        return max((error.share for error in self.errors), default=0.0)


@dataclass
class Results:
    """A whole run."""

    provenance: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    bandwidth: float | None = None
    flops: dict[str, float] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind, in the order measured."""
        return [row for row in self.rows if row.kind == kind]

    @property
    def failures(self) -> list[Row]:
        """Rows of ours that did not pass the gate."""
        return [row for row in self.rows if row.kind != PEER and not row.passed]

    @property
    def passed(self) -> bool:
        """Whether all is right: every row of ours and every model."""
        return not self.failures and all(model["passed"] for model in self.models)

    def losses(self) -> list[tuple[Row, str, Quartiles]]:
        """Every comparison that a backend of ours lost: row, peer and ratio."""
        rows = self.of(BACKEND)
        return [(row, peer, ratio) for row in rows for peer, ratio in row.over.items() if ratio.median < 1]

    def save(self, path: Path) -> None:
        """Writes JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads what :meth:`save` wrote."""
        content = json.loads(path.read_text())
        for row in content["rows"]:
            row["errors"] = [Error(**error) for error in row["errors"]]
            row["time"] = row["time"] and Quartiles(**row["time"])
            row["over"] = {peer: Quartiles(**ratio) for peer, ratio in row["over"].items()}
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})


def provenance(device: torch.device, arguments: str) -> dict[str, Any]:
    """Where results come from: device, driver, versions, commit, threads, settings."""
    commit, dirty = _commit()
    on_gpu = device.type == "cuda"
    information = fastdl.info()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arguments": arguments,
        "device": torch.cuda.get_device_name(device) if on_gpu else information["devices"]["cpu"].rpartition(", ")[0],
        "device type": device.type,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, Python {sys.version.split()[0]}",
        "commit": commit,
        "dirty": dirty,
        "fastdl": dict(information),
    }


def _run(*command: str) -> str | None:
    """What a command prints; None if there is none such or it fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return result.stdout.strip() if result.returncode == 0 else None


def _driver() -> str | None:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> tuple[str | None, bool | None]:
    """The commit that fastdl runs from and whether files differ from it; None for an installed copy."""
    folder = Path(fastdl.__file__).parent
    git = ("git", "-C", str(folder))
    if _run(*git, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    return _run(*git, "rev-parse", "HEAD"), bool(_run(*git, "status", "--porcelain"))
