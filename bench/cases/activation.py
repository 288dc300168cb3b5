"""Cases of the activations on their own: bound by memory, so the roofline is the peer to watch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

ALL = ("relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "silu")
LARGE, SMALL = (4096, 4096), (256, 256)
RAGGED = [(7, 131), (1023,)]
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16

QUICK = {
    ("relu", FLOAT, FORWARD),
    ("gelu", FLOAT, TRAINING),
    ("gelu", BFLOAT, FORWARD),
    ("silu", FLOAT, FORWARD),
    ("silu", BFLOAT, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Each activation on a large tensor and on one that fits in a cache."""
    for shape in (LARGE, SMALL):
        for name in ALL:
            for dtype in (FLOAT, BFLOAT, *([HALF] if device == "cuda" else [])):
                for direction in (FORWARD, TRAINING):
                    quick = shape == LARGE and (name, dtype, direction) in QUICK
                    yield _case(name, shape, dtype, direction, quick)


def checks() -> Iterator[Case]:
    """Every activation on ragged sizes, with its gradient."""
    for name in ALL:
        for shape in RAGGED:
            for dtype in (FLOAT, BFLOAT, HALF):
                yield _case(name, shape, dtype, TRAINING, quick=True)


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, direction: str, quick: bool) -> Case:
    import fastdl

    count = torch.Size(shape).numel()
    training = direction == TRAINING
    return Case(
        family="activation",
        name=f"{'x'.join(map(str, shape))} {name}",
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=getattr(fastdl.functional, name),
        eager=getattr(torch, name) if name in ("sigmoid", "tanh") else getattr(F, name),
        flops=count * (2 if training else 1),  # by convention one an element and direction
        bytes=count * dtype.itemsize * (5 if training else 2),  # backward reads two tensors and writes one
        quick=quick,
    )


def _inputs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input": normal(generator, shape, dtype, 2.0)}
