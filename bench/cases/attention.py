"""Cases of the attention family: softmax(query @ key^T / sqrt(D)) @ value, full, causal, masked, windowed, packed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Heads:
    """One shape of attention: sizes and what a query sees."""

    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    sees: str = "full"  # full, causal, masked: a float mask for all heads; window: 128 keys before it; packed: causal
    key_heads: int = 0  # of keys, if fewer

    def __str__(self) -> str:
        lengths = [self.queries] if self.queries == self.keys else [self.queries, self.keys]
        grouped = f" {self.key_heads} key heads" if self.key_heads else ""
        return "x".join(map(str, [self.batch, self.heads, *lengths, self.size])) + f" {self.sees}{grouped}"

    def pairs(self) -> int:
        """Scores of one head of one sequence that are not known to be unseen."""
        if self.sees in ("causal", "packed"):
            return sum(min(i + 1, self.keys) for i in range(self.queries))
        if self.sees == "window":
            return sum(max(0, min(i + 1, self.keys) - max(0, i - WINDOW)) for i in range(self.queries))
        return self.queries * self.keys


WINDOW = 128

SHAPES = [
    Heads(2, 8, 1024, 1024, 64),
    Heads(2, 8, 1024, 1024, 64, "causal"),
    Heads(2, 8, 1024, 1024, 64, "masked"),
    Heads(8, 12, 128, 128, 64),
    Heads(8, 12, 128, 128, 64, "causal"),
    Heads(1, 8, 2048, 2048, 128, "causal"),
    Heads(1, 8, 2048, 2048, 64, "window"),
    Heads(1, 8, 1024, 1024, 64, "causal", key_heads=2),
    Heads(4, 8, 512, 512, 64, "packed"),
]
GPU_SHAPES = [
    *(
        Heads(batch, heads, length, length, size, sees)
        for batch, heads, length, size in ((4, 16, 4096, 128), (4, 32, 4096, 64), (1, 16, 16384, 128))
        for sees in ("full", "causal")
    ),
    Heads(4, 32, 4096, 4096, 128, "causal", key_heads=8),
    Heads(4, 16, 4096, 4096, 128, "packed"),
]
RAGGED = [
    Heads(2, 3, 37, 45, 24),
    Heads(1, 2, 50, 50, 17, "causal"),
    Heads(2, 2, 19, 70, 40, "masked"),
    Heads(1, 2, 300, 300, 16, "window"),
    Heads(1, 4, 33, 40, 24, "causal", key_heads=2),
    Heads(3, 2, 20, 20, 24, "packed"),
]
QUICK = {
    (Heads(2, 8, 1024, 1024, 64), FLOAT, FORWARD),
    (Heads(2, 8, 1024, 1024, 64, "causal"), FLOAT, TRAINING),
    (Heads(2, 8, 1024, 1024, 64, "causal"), BFLOAT, FORWARD),
    (Heads(8, 12, 128, 128, 64), FLOAT, FORWARD),
    (Heads(4, 16, 4096, 4096, 128, "causal"), BFLOAT, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every shape, dtype and direction; float16 on a GPU alone."""
    for shape in SHAPES + (GPU_SHAPES if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, HALF) if device == "cuda" else (FLOAT, BFLOAT):
            for direction in (FORWARD, TRAINING):
                yield _case(shape, dtype, direction, (shape, dtype, direction) in QUICK)


def checks() -> Iterator[Case]:
    """Ragged shapes, with gradients."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            yield _case(shape, dtype, TRAINING, quick=True)


def _case(shape: Heads, dtype: torch.dtype, direction: str, quick: bool) -> Case:
    training = direction == TRAINING
    heads, key_heads = shape.batch * shape.heads, shape.batch * (shape.key_heads or shape.heads)
    rows = 2 * heads * shape.queries + 2 * key_heads * shape.keys  # query, output; key, value
    # Two products of every pair forward; backward makes the scores again and four products more.
    return Case(
        family="attention",
        name=str(shape),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=functools.partial(_run, shape),
        eager=functools.partial(_eager, shape),
        flops=2 * heads * shape.pairs() * shape.size * (7 if training else 2),
        bytes=rows * shape.size * dtype.itemsize * (3 if training else 1),
        quick=quick,
        long_reduction=shape.keys >= 1024,
    )


def _inputs(generator: torch.Generator, shape: Heads, dtype: torch.dtype) -> dict[str, Tensor]:
    key_heads = shape.key_heads or shape.heads
    if shape.sees == "packed":
        q, k = [(shape.batch * shape.queries, heads, shape.size) for heads in (shape.heads, key_heads)]
    else:
        q = (shape.batch, shape.heads, shape.queries, shape.size)
        k = (shape.batch, key_heads, shape.keys, shape.size)
    inputs = {name: normal(generator, size, dtype) for name, size in (("query", q), ("key", k), ("value", k))}
    if shape.sees == "masked":
        inputs["attn_mask"] = normal(generator, (shape.batch, 1, 1, shape.keys), dtype)
    return inputs


def _offsets(shape: Heads, device: torch.device) -> Tensor:
    """Of sequences whose lengths differ: the first has half of the mean, the last one and a half."""
    total, n = shape.batch * shape.queries, shape.batch
    weights = torch.linspace(0.5, 1.5, n, dtype=torch.float64) if n > 1 else torch.ones(1, dtype=torch.float64)
    ends = (weights.cumsum(0) / weights.sum() * total).round().long()
    return torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(device)


def _run(shape: Heads, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    import fastdl

    if shape.sees == "packed":
        output: Tensor = fastdl.functional.varlen_attention(
            query, key, value, _offsets(shape, query.device), is_causal=True
        )
        return output
    options = dict(attn_mask=attn_mask, is_causal=shape.sees == "causal", enable_gqa=bool(shape.key_heads))
    if shape.sees == "window":
        options["window_size"] = (WINDOW, 0)
    return fastdl.functional.scaled_dot_product_attention(query, key, value, **options)  # type: ignore[no-any-return]


def _eager(shape: Heads, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """torch's own function, which takes its best backend itself; sequence by sequence where they are packed."""
    attention: Callable[..., Any] = F.scaled_dot_product_attention
    if shape.sees == "packed":
        ends = _offsets(shape, query.device).tolist()
        parts = []
        for first, last in itertools.pairwise(ends):
            q, k, v = [t[first:last].transpose(0, 1)[None] for t in (query, key, value)]
            parts.append(attention(q, k, v, is_causal=True)[0].transpose(0, 1))
        return torch.cat(parts)
    if shape.sees == "window":
        i = torch.arange(shape.queries, device=query.device)[:, None]
        j = torch.arange(shape.keys, device=query.device)
        attn_mask = (j <= i) & (j >= i - WINDOW)
    options = dict(is_causal=shape.sees == "causal", enable_gqa=bool(shape.key_heads))
    return attention(query, key, value, attn_mask=attn_mask, **options)  # type: ignore[no-any-return]
