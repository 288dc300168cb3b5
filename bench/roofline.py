"""The ceilings of this device, measured in this run: memory bandwidth by a copy, arithmetic by torch's best matmul."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence

import torch


def measure(device: torch.device, dtypes: Sequence[torch.dtype]) -> tuple[float, dict[str, float]]:
    """Bytes a second, and operations a second by dtype: the best of several runs, since a ceiling is reached once."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randn(size // 4, device=device)
    bandwidth = 2 * size / _fastest(functools.partial(torch.empty_like(source).copy_, source), device)
    flops = {str(dtype).removeprefix("torch."): _matmul_rate(device, dtype) for dtype in dtypes}
    if device.type == "cpu" and "float16" in flops:
        # torch multiplies float16 one by one on many CPUs; whoever widens it to float32 can have that rate.
        flops["float16"] = max(flops["float16"], _matmul_rate(device, torch.float32))
    return bandwidth, flops


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 256 if dtype == torch.float16 else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    ways: list[Callable[[], object]] = [lambda: a @ b, lambda: a @ b.t()]
    if device.type == "cpu" and dtype != torch.float16 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * n**3 / min(_fastest(way, device) for way in ways)


def _fastest(call: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    best, end = math.inf, time.perf_counter() + budget
    call()
    for done in range(1000):
        if done >= 3 and time.perf_counter() > end:
            break
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            elapsed = float(start.elapsed_time(stop)) / 1e3
        else:
            began = time.perf_counter()
            call()
            elapsed = time.perf_counter() - began
        best = min(best, elapsed)
    return best
