"""Cases of layer and RMS normalisation: plain, with a residual, and with dropout before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-5
P = 1e-12  # see dropout.py


@dataclass(frozen=True)
class Rows:
    """One shape: rows, their length, and what is normalised."""

    rows: int
    columns: int
    kind: str = "plain"  # plain, residual, dropout: and residual; rms

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {self.kind}"


KINDS = ("plain", "residual", "dropout", "rms")
SIZES = [(1024, 768), (4096, 1024), (512, 4096), (32, 256)]
GPU_SIZES = [(32768, 1024), (16384, 4096), (8192, 8192)]
RAGGED = [Rows(*size, kind) for size in ((7, 33), (13, 130), (3, 1021)) for kind in KINDS]
QUICK = {
    (Rows(1024, 768), FLOAT, FORWARD),
    (Rows(1024, 768, "residual"), FLOAT, FORWARD),
    (Rows(1024, 768, "residual"), BFLOAT, TRAINING),
    (Rows(16384, 4096, "residual"), BFLOAT, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every size, kind, dtype and direction; float16 and large sizes on a GPU alone."""
    for size in SIZES + (GPU_SIZES if device == "cuda" else []):
        for kind in KINDS:
            for dtype in (FLOAT, BFLOAT, HALF) if device == "cuda" else (FLOAT, BFLOAT):
                for direction in (FORWARD, TRAINING):
                    shape = Rows(*size, kind)
                    yield _case(shape, dtype, direction, (shape, dtype, direction) in QUICK)


def checks() -> Iterator[Case]:
    """Ragged shapes, with gradients."""
    for shape in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            yield _case(shape, dtype, TRAINING, quick=True)


def _case(shape: Rows, dtype: torch.dtype, direction: str, quick: bool) -> Case:
    training = direction == TRAINING
    # Forward: input, residual, output. Backward: the output's gradient and h read, which the forward has then written
    # where it is not input, and one gradient written, or two that dropout makes differ.
    tensors = 2 + (shape.kind in ("residual", "dropout"))
    if training:
        tensors += 3 + (shape.kind in ("residual", "dropout")) + (shape.kind == "dropout")
    count = shape.rows * shape.columns
    return Case(
        family="layer_norm",
        name=str(shape),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, shape=shape, dtype=dtype),
        call=functools.partial(_run, shape),
        eager=functools.partial(_eager, shape),
        flops=count * (8 + 14 * training),  # by convention: sums of two kinds and the map; twice as many backward
        bytes=count * dtype.itemsize * tensors,
        quick=quick,
        long_reduction=max(shape.columns, shape.rows * training) > 1000,
    )


def _inputs(generator: torch.Generator, shape: Rows, dtype: torch.dtype) -> dict[str, Tensor]:
    size = shape.rows, shape.columns
    inputs = {"input": normal(generator, size, dtype), "weight": normal(generator, size[1:], dtype)}
    if shape.kind != "rms":
        inputs["bias"] = normal(generator, size[1:], dtype)
    if shape.kind in ("residual", "dropout"):
        inputs["residual"] = normal(generator, size, dtype)
    return inputs


def _run(
    shape: Rows, input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    from fastdl.functional import layer_norm, rms_norm

    result: Tensor
    if shape.kind == "rms":
        result = rms_norm(input, (shape.columns,), weight, EPS)
    else:
        p = P if shape.kind == "dropout" else 0.0
        result = layer_norm(input, (shape.columns,), weight, bias, EPS, residual=residual, dropout_p=p)
    return result


def _eager(
    shape: Rows, input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    h = F.dropout(input, P) if shape.kind == "dropout" else input
    h = h if residual is None else residual + h
    if shape.kind == "rms":
        return F.rms_norm(h, [shape.columns], weight, EPS)
    return F.layer_norm(h, (shape.columns,), weight, bias, EPS)
