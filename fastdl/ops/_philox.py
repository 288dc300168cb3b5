"""Dropout's random numbers: Philox4x32-10 (Salmon et al., 2011) with a seed of 64 bits as its key.

They depend on the seed and a counter alone. So every backend drops the same elements, and a backward makes the mask
anew instead of storing it. An element is dropped if its word is below the probability's threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def threshold(p: float) -> int:
    """Words below it are dropped."""
    return min(int(p * 2**32), 2**32 - 1)


def kept_factor(p: float) -> float:
    """What is kept is multiplied by this."""
    return 1 / (1 - p) if p < 1 else 0.0


def factors(random: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """0 and 1 / (1 - p), for random words."""
    return (random >= threshold(p)).to(dtype) * kept_factor(p)


def new_seed(like: Tensor) -> Tensor:
    """() int64, by torch's generator of the device, so that torch.manual_seed rules dropout; it stays on the device."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=like.device)


def words(counters: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """The four random words, below 2^32 in int64, of counters that are, too."""
    c, low = list(counters), 0xFFFFFFFF
    keys = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        (high0, low0), (high1, low1) = [_multiply(c[i], m) for i, m in ((0, 0xD2511F53), (2, 0xCD9E8D57))]
        c = [high1 ^ c[1] ^ keys[0], low1, high0 ^ c[3] ^ keys[1], low0]
        keys = [(k + step) & low for k, step in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return c


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of products of 32 bits, in int64 whose products would overflow."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & 0xFFFFFFFF
