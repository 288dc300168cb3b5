"""How time is taken: alternating callables in one run, inputs rotated past the last-level cache, fresh outputs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .correctness import Sample

DISTURBED = 0.05  # share of the machine that others may take before a measurement is repeated
OVERHEAD_CALLS = 200  # calls a sample where the call itself is what is measured
SHORTEST_REPLAY = 500e-6  # seconds of GPU work between two events, far above their resolution
DEFAULT_CACHE = 64 * 2**20  # where the system does not say


@dataclass(frozen=True)
class Contender:
    """A callable to time; ``context`` holds while it runs and is not timed."""

    label: str
    run: Callable[[Sample], Any]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Quartiles:
    """The middle of a set of samples and where its middle half lies."""

    median: float
    first: float
    third: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of any number of samples but none."""
        first, median, third = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, first, third, len(values))


@dataclass
class Timing:
    """Seconds a call, by contender and round; ``others`` is the share of the machine that other processes took."""

    seconds: dict[str, list[float]]
    method: str
    others: float | None = None

    def time(self, label: str) -> Quartiles:
        """Of one contender."""
        return Quartiles.of(self.seconds[label])

    def ratio(self, peer: str, label: str) -> Quartiles:
        """Peer's time over the contender's, round by round: above 1 the contender is the faster."""
        return Quartiles.of([p / c for p, c in zip(self.seconds[peer], self.seconds[label], strict=True)])


def rotation(sample: Sample, overhead: bool) -> list[Sample]:
    """Copies of a sample, together more than twice the last-level cache; one for overhead, where caches are warm."""
    device = next(iter(sample.inputs.values())).device
    sets = 1 if overhead else max(2, math.ceil(2 * cache_bytes(device) / max(sample.bytes, 1)) + 1)
    return [sample, *[sample.copy() for _ in range(sets - 1)]]


def cache_bytes(device: torch.device) -> int:
    """The size of a device's last-level cache that this process can use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1)
    return DEFAULT_CACHE


def measure(
    contenders: Sequence[Contender], samples: Sequence[Sample], budget: float, overhead: bool = False, tries: int = 1
) -> Timing:
    """Times contenders side by side for about ``budget`` seconds; again where others disturbed, ``tries`` at most."""
    device = next(iter(samples[0].inputs.values())).device
    if device.type == "cuda" and not overhead:
        return _by_events(contenders, samples, budget)
    best: Timing | None = None
    for _ in range(tries):
        timing = _by_wall_clock(contenders, samples, budget, OVERHEAD_CALLS if overhead else 1)
        if best is None or (timing.others or 0) < (best.others or 0):
            best = timing
        if (best.others or 0) <= DISTURBED:
            break
    assert best is not None
    return best


def _by_wall_clock(contenders: Sequence[Contender], samples: Sequence[Sample], budget: float, calls: int) -> Timing:
    cuda = next(iter(samples[0].inputs.values())).is_cuda
    turn = 0

    def once(contender: Contender) -> float:
        nonlocal turn
        with contender.context():
            if cuda:
                torch.cuda.synchronize()
            if calls == 1:
                sample = samples[turn % len(samples)]
                start = time.perf_counter()
                result = contender.run(sample)
                elapsed = time.perf_counter() - start
                del result  # giving memory back is not part of the call
            else:
                sample, run = samples[0], contender.run
                start = time.perf_counter()
                for _ in range(calls):
                    run(sample)
                elapsed = time.perf_counter() - start
        turn += 1
        return elapsed / calls

    with _Watch() as watch:
        seconds = _rounds(contenders, once, budget)
    method = "wall clock" if calls == 1 else f"wall clock over {calls} calls" + (", host side only" if cuda else "")
    return Timing(seconds, method, watch.others)


def _by_events(contenders: Sequence[Contender], samples: Sequence[Sample], budget: float) -> Timing:
    """GPU time between events around many calls: replays of a CUDA graph, or plain calls where capture fails."""
    calls = {c.label: max(len(samples), math.ceil(SHORTEST_REPLAY / _estimate(c, samples))) for c in contenders}
    method = "CUDA graph and events"
    try:
        replays = {c.label: _capture(c, samples, calls[c.label]) for c in contenders}
    except RuntimeError as error:
        torch.cuda.synchronize()
        method = f"events, host gaps included (capture failed: {str(error).splitlines()[0]})"
        replays = {c.label: _plain(c, samples, calls[c.label]) for c in contenders}

    def once(contender: Contender) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with contender.context():
            start.record()
            replays[contender.label]()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls[contender.label]

    return Timing(_rounds(contenders, once, budget), method)


def _estimate(contender: Contender, samples: Sequence[Sample]) -> float:
    with contender.context():
        for sample in samples[:2]:
            contender.run(sample)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for sample in samples[:2]:
            contender.run(sample)
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / 2


def _capture(contender: Contender, samples: Sequence[Sample], calls: int) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), contender.context():
        contender.run(samples[0])  # workspaces of libraries are made once a stream
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), contender.context():
        for i in range(calls):
            contender.run(samples[i % len(samples)])
    return graph.replay


def _plain(contender: Contender, samples: Sequence[Sample], calls: int) -> Callable[[], None]:
    def replay() -> None:
        for i in range(calls):
            contender.run(samples[i % len(samples)])

    return replay


def _rounds(
    contenders: Sequence[Contender], once: Callable[[Contender], float], budget: float
) -> dict[str, list[float]]:
    """Every round runs each contender once, in an order that rotates; the first rounds are warm-up."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            start = time.perf_counter()
            for contender in contenders:
                once(contender)
            elapsed = time.perf_counter() - start
        rounds = max(5, min(1000, int(budget / elapsed)))
        seconds: dict[str, list[float]] = {contender.label: [] for contender in contenders}
        for i in range(rounds):
            first = i % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                seconds[contender.label].append(once(contender))
        return seconds
    finally:
        if enabled:
            gc.enable()


class _Watch:
    """How much of the machine other processes took inside the block, where the system tells (``others``, else None)."""

    others: float | None = None

    def __enter__(self) -> _Watch:
        self._start = _busy(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        (busy, began), now = self._start, _busy()
        if busy is not None and now is not None:
            whole = (time.perf_counter() - began) * (os.cpu_count() or 1)
            self.others = max(0.0, ((now[0] - busy[0]) - (now[1] - busy[1])) / whole)


def _busy() -> tuple[float, float] | None:
    """CPU seconds used on the whole machine, and by this process."""
    try:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    times = os.times()
    # user, nice, system, then (after idle and iowait) irq, softirq, steal
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK"), times.user + times.system


def peak_memory(contender: Contender, sample: Sample) -> int | None:
    """The most memory that one call holds at a time, beyond its inputs; on a CPU what torch's allocator hands out."""
    device = next(iter(sample.inputs.values())).device
    with contender.context():
        contender.run(sample)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.run(sample)
            return int(torch.cuda.max_memory_allocated() - before)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with _silence(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            contender.run(sample)
    events = profile.profiler.kineto_results.events() if profile.profiler else []
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the profiler's own messages, which C++ writes to the standard error, out of the tables."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
