"""Plants bugs in kernels, of which the zoo compiles copies that can be told to have any of them.

The kernels themselves stay clean.
"""

from __future__ import annotations

import itertools

FULL, EMPTY = "&shared->full[ring.stage]", "&shared->empty[ring.stage]"
EXPECT = "mbarrier_arrive_expect(full, Plan::kStageBytes);"
BARRIER = "barrier_sync(1 + consumer, 128);"
TURN, HAND_OVER = "mbarrier_wait(&shared->turn[consumer], turn_parity);", "mbarrier_arrive(&shared->turn[other]);"
RELEASE = "release(previous);"
SWIZZLE = "swizzle128(warp * 16 + lane % 16, i * 32 + lane / 16 * 16)"

# Bug: what it replaces, which of its occurrences, by what. Text that ends in ";" is a statement, else an expression.
HOPPER: dict[str, list[tuple[str, int, str]]] = {
    "no wgmma wait": [("wgmma_wait<0>(sums);", 0, "")],
    "wait one group too few": [("wgmma_wait<0>(sums);", 0, "wgmma_wait<1>(sums);")],
    "no wgmma.fence": [("wgmma_fence(sums);", 0, "")],
    "no wgmma.commit": [("wgmma_commit();", 0, "")],
    "wrong consumer parity": [
        (f"mbarrier_wait({FULL}, ring.parity);", 0, f"mbarrier_wait({FULL}, ring.parity ^ 1);"),
    ],
    "wrong producer parity": [
        (f"mbarrier_wait({EMPTY}, ring.parity ^ 1);", 0, f"mbarrier_wait({EMPTY}, ring.parity);"),
        (f"mbarrier_wait_cluster({EMPTY}, ring.parity ^ 1);", 0, f"mbarrier_wait_cluster({EMPTY}, ring.parity);"),
    ],
    "expect_tx too small": [(EXPECT, 0, "mbarrier_arrive_expect(full, Plan::kStageBytes / 2);")],
    "expect_tx too large": [(EXPECT, 0, "mbarrier_arrive_expect(full, Plan::kStageBytes + 16);")],
    "no expect_tx": [(EXPECT, 0, "mbarrier_arrive(full);")],
    "stage released before the wait": [
        ("wgmma_commit();", 0, f"wgmma_commit(); if (step > 0) {RELEASE}"),
        (f"if (step > 0) {RELEASE}", 0, ""),
    ],
    "current stage released": [
        (f"if (step > 0) {RELEASE}", 0, "release(ring.stage);"),
        (RELEASE, 1, ""),
    ],
    "producer skips empty wait": [
        (f"mbarrier_wait({EMPTY}, ring.parity ^ 1);", 0, ""),
        (f"mbarrier_wait_cluster({EMPTY}, ring.parity ^ 1);", 0, ""),
    ],
    "no fence.proxy.async": [("fence_proxy_async_shared();", 0, "")],
    "no barrier after the store wait": [(BARRIER, 0, "")],
    "no barrier before the TMA store": [(BARRIER, 1, "")],
    "epilogue not swizzled": [(SWIZZLE, 0, "(warp * 16 + lane % 16) * 128 + i * 32 + lane / 16 * 16")],
    "wrong descriptor stride": [
        (
            "descriptor(shared_address(shared->weight[ring.stage]))",
            0,
            "descriptor(shared_address(shared->weight[ring.stage]), 16, 512)",
        )
    ],
    "store buffer reused": [("bulk_wait_read<1>();", 0, "")],
    "preactivation's buffer reused": [("bulk_wait_read<0>();", 0, "")],
    "exit before the store read": [("bulk_wait_read<0>();", 1, "")],
    "no mbarrier init fence": [("mbarrier_init_fence();", 0, "")],
    "consumer skips a tile": [
        (
            "(Plan::kPingPong ? consumer * stride : 0)",
            0,
            "(Plan::kPingPong ? 3 * consumer * stride : consumer * stride)",
        ),
    ],
    "no turns": [(TURN, 0, "")],
    "turn handed over too early": [
        (TURN, 0, f"{TURN} if (lane == 0) {HAND_OVER}"),
        (HAND_OVER, 0, ""),
    ],
    "turn not handed over": [(HAND_OVER, 0, "")],
    "the other's stages not skipped": [("ring.skip(steps);", 1, "")],
    "stage released to one block": [("lane < cluster", 0, "lane == 0")],
    "weight not shared": [("(1 << cluster) - 1", 0, "1 << rank")],
    "no cluster sync after init": [("cluster_sync();", 0, "__syncthreads();")],
    "no cluster sync at exit": [("cluster_sync();", 1, "")],
}

INSIDE = "unsigned(position.w + w) < unsigned(gather.w.image)"
CONV: dict[str, list[tuple[str, int, str]]] = {
    "padding counts as image": [(INSIDE, 0, "unsigned(position.w + w) <= unsigned(gather.w.image)")],
    "no left border": [(INSIDE, 0, "position.w + w < gather.w.image")],
    "taps in the wrong order": [("if (++w == gather.w.taps) w = 0, ++h;", 0, "if (++h == gather.h.taps) h = 0, ++w;")],
    "rows of other dilation": [("tap.h * gather.h.dilation", 0, "tap.h * gather.w.dilation")],
    "no wait for copies": [("ptx::cp_async_wait<stages - 2>();", 0, "")],
    "waits for one stage too few": [("ptx::cp_async_wait<stages - 2>();", 0, "ptx::cp_async_wait<stages - 1>();")],
    "no barrier before positions are read": [("if (step < stages - 1) __syncthreads();", 0, "")],
    "one table of positions": [
        ("step % 2 * depth_of_stage", 0, "0"),
        ("step % 2 * depth_of_stage", 1, "0"),
    ],
    "channels beyond the group": [("channel < channels", 0, "channel < int(tap_columns.divisor)")],
}
RNN: dict[str, list[tuple[str, int, str]]] = {
    "no barrier between steps": [("if (i + phase > 0) wait_for_all(task.arrived, visits);", 0, "")],
    "barrier of one block": [("visits += gridDim.x;", 0, "visits += 1;")],
    "arrival before the block is done": [("__syncthreads();", 2, "")],
    "threads do not wait for the barrier": [("__syncthreads();", 3, "")],
    "one buffer for h": [("(step & 1) * alternate", 0, "0"), ("(step & 1) * pair.alternate", 0, "0")],
    "sums read before they are there": [("__syncthreads();", 1, "")],
    "sums not reused in turn": [("if (first_row > block_end - task.rows) __syncthreads();", 0, "")],
    "exchange overwritten": [("__syncwarp();", 0, "")],
    "exchange read too early": [("__syncwarp();", 1, "")],
    "no wait for the weights": [("ptx::cp_async_wait<0>();", 0, "")],
    "a row ends a step late": [("row >= step.next_count", 0, "row > step.next_count")],
}
WAIT, BARRIER_ALL = "ptx::cp_async_wait<0>();", "__syncthreads();"
ATTENTION: dict[str, list[tuple[str, int, str]]] = {
    "keys not waited for": [(WAIT, 0, "")],
    "values not waited for": [(WAIT, 1, "")],
    "no barrier before keys are read": [(BARRIER_ALL, 1, "")],
    "no barrier before values are read": [(BARRIER_ALL, 2, "")],
    "edge not masked": [("key0 >= seen.all_begin && key0 + columns <= seen.all_end", 0, "true")],
    "sums not corrected": [("sums[i][j][half * 2] *= correction;", 0, "")],
}
ATTENTION_BACKWARD: dict[str, list[tuple[str, int, str]]] = {
    "keys' stage not waited for": [(WAIT, 0, "")],
    "queries' stage not waited for": [(WAIT, 1, "")],
    "no barrier before keys' stage is read": [(BARRIER_ALL, 1, "")],
    "no barrier before queries' stage is read": [(BARRIER_ALL, 3, "")],
    "statistics of no query missing": [("query >= filled", 0, "query >= block.queries")],
    "one head of the group": [("head + task.group", 0, "head + 1")],
    "one stage": [("stage ^= 1;", 0, "")],
}
BUGS = {
    "matmul_sm90.cuh": HOPPER,
    "conv.cuh": CONV,
    "rnn.cuh": RNN,
    "attention.cu": ATTENTION,
    "attention_backward.cu": ATTENTION_BACKWARD,
}


def plant(source: str, bugs: dict[str, list[tuple[str, int, str]]]) -> str:
    """The source with a choice by BUG(name) at each place. Raises ValueError where a bug has lost its place."""
    places: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for bug, replacements in bugs.items():
        for text, occurrence, new in replacements:
            start = -1
            for _ in range(occurrence + 1):
                start = source.find(text, start + 1)
                if start < 0:
                    raise ValueError(f"{bug!r}: the source has no occurrence {occurrence} of {text!r}")
            places.setdefault((start, start + len(text)), []).append((bug, new))
    spans = sorted(places)
    for (_, end), (start, _) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(f"bugs overlap at {source[start:end]!r}")
    for start, end in reversed(spans):
        old = source[start:end]
        if old.endswith(";"):
            chosen = "".join(f'if (BUG("{bug}")) {{ {new} }} else ' for bug, new in places[start, end])
            planted = f"{{ {chosen}{{ {old} }} }}"
        else:
            chosen = "".join(f'BUG("{bug}") ? ({new}) : ' for bug, new in places[start, end])
            planted = f"({chosen}({old}))"
        source = source[:start] + planted + source[end:]
    return source
