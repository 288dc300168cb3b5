"""What is measured: each family states its cases as data, in one file here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class Case:
    """One thing to measure: the call under test, its peers, its inputs and the least work it takes.

    Attributes:
        family: file name in this folder.
        name: shape and activation, for people.
        dtype: of every floating input.
        direction: FORWARD (no gradients) or TRAINING (forward, then the gradient of every floating input).
        make: draws the inputs by name from a generator, on its device: random normal, never zeros.
        call: the call under test, through :mod:`fastdl.functional`.
        eager: the same by torch's plain operators; in float64 it is the reference.
        fused: torch's candidates for its best fused call, by name; one that raises or is wrong is left out.
        flops: floating-point operations that the case must do.
        bytes: the fewest bytes it must move: each input read once, each output written once.
        quick: part of the quick set.
        op: the op that auto decides the call by, and whose record the speed is; default: the first that the call makes.
        long_reduction: some output sums over more than about a thousand terms.
        overhead: so small that only the cost of the call is measured.
    """

    family: str
    name: str
    dtype: torch.dtype
    direction: str
    make: Callable[[torch.Generator], dict[str, Tensor]]
    call: Callable[..., Any]
    eager: Callable[..., Any]
    fused: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    quick: bool = False
    op: str = ""
    long_reduction: bool = False
    overhead: bool = False

    @property
    def dtype_name(self) -> str:
        """Such as ``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.family} {self.name} {self.dtype_name} {self.direction}"


def normal(generator: torch.Generator, shape: Iterable[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A tensor of random normal values, drawn in float32 so that every dtype sees the same numbers."""
    return (torch.randn(tuple(shape), generator=generator, device=generator.device) * scale).to(dtype)


def families() -> list[str]:
    """The names of the families that have a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def timed(family: str, device: str) -> list[Case]:
    """The cases of a family to check and time on a device type."""
    return list(importlib.import_module(f"{__name__}.{family}").timed(device))


def checks(family: str) -> list[Case]:
    """Small ragged cases of a family, for correctness alone, in every backend and in Triton's interpreter."""
    return list(importlib.import_module(f"{__name__}.{family}").checks())
