"""Proven, or proves itself: which kernels `auto` may trust on which code path, and how fast they were there.

`records.json` beside this file says which kernel passed in which committed run, and its speed over torch by shape.
Where it says nothing, the first call of each (op, backend, dtype, code path) runs the reference too and compares; the
verdict is kept on disk by device and version.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastdl import accuracy, dispatch
from fastdl._version import __version__

if TYPE_CHECKING:
    from fastdl.dispatch import Op, Selection

# A ratio nearer to 1 than this is noise, not a loss.
_SLOWER = 0.97


class Verdict(NamedTuple):
    """Whether auto may take a kernel (``usable``), whether it has to prove itself first (``unknown``), and why."""

    usable: bool
    unknown: bool
    reason: str
    lasting: bool = True


# Backends that auto takes only where their speed is on record: what torch's libraries reach on a CPU differs between
# processors by more than a kernel is worth. On a GPU a proven kernel is taken unless a record shows it slower.
SPEED_ON_RECORD_ONLY = frozenset({"cpu"})

_proving = True
_verdicts: dict[str, str] | None = None  # of this machine, key -> "passed" or what went wrong


def prove_at_first_call(enabled: bool) -> None:
    """Switches the proof at first call on (the default) or off.

    Off, ``auto`` takes only kernels with a record, or with a verdict from before.
    """
    global _proving
    _proving = bool(enabled)
    dispatch.forget_selections()


def code_path(backend: str, device: torch.device) -> str:
    """The machine code that a backend runs on a device: an instruction set, or a compute capability's build."""
    if backend == "cpu":
        return str(dispatch.native().cpu.isa())
    major, minor = torch.cuda.get_device_capability(device)
    if backend == "triton":
        return f"sm_{major}{minor}"
    # The CUDA build carries machine code for these; a newer family runs the PTX.
    return {8: "sm_80", 9: "sm_90a", 10: "sm_100"}.get(major, "compute_80")


def verdict(op: Op, backend: str, arguments: Sequence[Any], training: bool) -> Verdict:
    """Whether auto may use a backend for a call."""
    first = dispatch.first_tensor(arguments)
    dtype, path = _name(first.dtype), op.code_path(backend, arguments)
    record = records().get((op.name, backend, dtype, path))
    known = None
    if record is not None:
        known = "passed" if record["passed"] else f"failed in {record['source']}"
        reason = f"proven on {path} by {record['source']}"
    else:
        known = verdicts().get(_key(op, backend, first, path))
        reason = f"proved itself on this device ({path})"
    if known not in ("passed", None):
        return Verdict(False, False, f"not trusted on {path}: {known}")
    speed = _fast_enough(op, backend, dtype, path, arguments, training, reason)
    if known == "passed" or not speed.usable:
        return speed
    if not _proving:
        return Verdict(False, False, f"no record on {path}, and the proof at first call is off")
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return Verdict(False, False, f"unproven on {path}, and a CUDA graph is being captured", lasting=False)
    reason = f"proving itself on {path}: the first call is compared with the reference"
    return Verdict(True, True, reason, lasting=False)


def has_failed(op: Op, backend: str, tensor: Tensor, variant: str) -> bool:
    """Whether a variant of a backend's code path is known to be wrong for this op, dtype and device."""
    if not tensor.is_cuda:
        return False
    path = code_path(backend, tensor.device) + variant
    record = records().get((op.name, backend, _name(tensor.dtype), path))
    if record is not None:
        return not record["passed"]
    return verdicts().get(_key(op, backend, tensor, path), "passed") != "passed"


def _fast_enough(
    op: Op, backend: str, dtype: str, path: str, arguments: Sequence[Any], training: bool, reason: str
) -> Verdict:
    if op.shape_class is None:
        return Verdict(True, False, reason)  # a backward: its forward has decided for both
    label, sizes = op.shape_class(*arguments)
    key = (op.name, backend, dtype, path)
    points: dict[tuple[int, ...], float] = {}
    for source in (records(), tuned()):  # what was measured on this very machine replaces what was shipped
        speed = source.get(key, {}).get("speed", {})
        measured = speed.get("training" if training else "inference", {}).get(label, [])
        points.update({tuple(shape): ratio for *shape, ratio in measured if len(shape) == len(sizes)})
    if not points and backend in SPEED_ON_RECORD_ONLY:
        return Verdict(False, False, f"its speed on {path} is not on record: run `fastdl tune`")
    if not points:
        return Verdict(True, False, reason)
    nearest, ratio = min(points.items(), key=lambda point: _distance(point[0], sizes))
    measured_at = f"{ratio:.2f}x of torch at {'x'.join(map(str, nearest))}"
    if ratio < _SLOWER:
        return Verdict(False, False, f"slower than torch for this class: {measured_at}")
    return Verdict(True, False, f"{reason}, {measured_at}")


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(abs(math.log2(max(x, 1) / max(y, 1))) for x, y in zip(a, b, strict=True))


def first_call(op: Op, selection: Selection, arguments: Sequence[Any]) -> Any:
    """Runs a kernel beside the reference, keeps the verdict, and returns the right result."""
    first = dispatch.first_tensor(arguments)
    expected = op.reference(*arguments)
    try:
        exact = op.reference(*[_double(argument) for argument in arguments])
        torch_error = _worst(expected, exact)
        if not (_tells(exact) and math.isfinite(torch_error)):
            return expected  # such values prove nothing
    except RuntimeError:
        return expected  # no memory for float64: a smaller call will tell
    try:
        actual = selection.implementation(*arguments)
        actual_error = _worst(actual, exact)
        bound = accuracy.bound(torch_error, first.dtype, op.multiple)
        problem = None if actual_error <= bound else f"its error is {actual_error:.3g}, allowed are {bound:.3g}"
    except torch.OutOfMemoryError:
        return expected
    except Exception as error:  # whatever a broken kernel raises, the reference has served
        problem = f"it raised {type(error).__name__}: {error}"
    key = _key(op, selection.backend, first, op.code_path(selection.backend, arguments))
    _remember(key, problem or "passed")
    if problem is None:
        return actual
    shapes = [tuple(a.shape) for a in arguments if isinstance(a, Tensor)]
    warnings.warn(
        f"fastdl: the {selection.backend} kernel of {op.name} is wrong on this device and will not be used: {problem}. "
        f"Please report this: {key}, shapes {shapes}, fastdl {__version__}, torch {torch.__version__}.",
        stacklevel=2,
    )
    return expected


def _worst(actual: Any, exact: Any) -> float:
    if isinstance(actual, Tensor):
        return accuracy.error(actual, exact)
    return max((_worst(a, e) for a, e in zip(actual, exact, strict=True)), default=0.0)


def _tells(exact: Any) -> bool:
    """Whether a result can show an error: NaN, infinity or nothing but zeros would hide one."""
    if isinstance(exact, Tensor):
        return bool(torch.isfinite(exact).all()) and bool(exact.any())
    given = [tensor for tensor in exact if tensor.numel()]  # an empty one stands for a result that this call lacks
    return bool(given) and all(_tells(tensor) for tensor in given)


def _double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------- the files


@functools.cache
def records() -> dict[tuple[str, str, str, str], Any]:
    """The shipped records by (op, backend, dtype, code path)."""
    return _index(json.loads(resources.files("fastdl").joinpath("records.json").read_text()))


@functools.cache
def tuned() -> dict[tuple[str, str, str, str], Any]:
    """What ``fastdl tune`` measured on this machine, by the same key."""
    try:
        return _index(json.loads(tuning_file().read_text()))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):  # absent, no home, damaged
        return {}


def _index(content: dict[str, Any]) -> dict[tuple[str, str, str, str], Any]:
    return {(r["op"], r["backend"], r["dtype"], r["code_path"]): r for r in content["records"]}


def cache_directory() -> Path:
    """Where verdicts and tuning results of this machine lie; FASTDL_CACHE names another place."""
    return Path(os.environ.get("FASTDL_CACHE") or Path.home() / ".cache" / "fastdl")


def tuning_file() -> Path:
    """What ``fastdl tune`` writes for this processor or GPU."""
    return cache_directory() / f"tuned-{_slug(_machine())}.json"


def verdicts() -> dict[str, str]:
    """The verdicts of this machine: "op backend dtype code-path device versions" -> "passed" or what went wrong."""
    global _verdicts
    if _verdicts is None:
        _verdicts = dict(_read_verdicts())
    return _verdicts


def _verdict_file() -> Path:
    return cache_directory() / "verdicts.jsonl"


def _read_verdicts() -> Iterator[tuple[str, str]]:
    try:
        lines = _verdict_file().read_text(errors="replace").splitlines()
    except (OSError, RuntimeError):  # absent, or no home
        return
    for line in lines:
        try:
            key, outcome = json.loads(line)
        except (ValueError, TypeError):  # damaged: that kernel proves itself again
            continue
        if isinstance(key, str) and isinstance(outcome, str):
            yield key, outcome


def _remember(key: str, outcome: str) -> None:
    verdicts()[key] = outcome
    try:
        path = _verdict_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        # One appended line: processes that write at once keep each other's. It starts anew after one that broke off.
        with path.open("a") as file:
            file.write(f"\n{json.dumps([key, outcome])}\n")
    except (OSError, RuntimeError):
        pass  # a read-only home, or none: the verdict holds for this process
    dispatch.forget_selections()


def _key(op: Op, backend: str, tensor: Tensor, path: str) -> str:
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else processor()
    version = f"fastdl {__version__} torch {torch.__version__}"
    return f"{op.name} {backend} {_name(tensor.dtype)} {path} {_slug(device)} {version}"


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


@functools.cache
def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
