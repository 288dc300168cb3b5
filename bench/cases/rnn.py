"""Cases of the recurrent family: cells, and stacks of layers over a batch of sequences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import FORWARD, TRAINING, Case, normal

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Layer:
    """One shape of a stack of layers, or of a cell, which has no steps."""

    mode: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    projection: int = 0
    packed: bool = False

    def __str__(self) -> str:
        sizes = (
            [self.steps, self.batch, self.inputs, self.hidden] if self.steps else [self.batch, self.inputs, self.hidden]
        )
        words = [self.mode + ("" if self.steps else "_cell"), "x".join(map(str, sizes))]
        words += [f"{self.layers} layers"] if self.layers > 1 else []
        words += ["bidirectional"] if self.bidirectional else []
        words += [f"projected to {self.projection}"] if self.projection else []
        return " ".join(words + (["packed"] if self.packed else []))

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def state(self) -> int:
        """The size of h."""
        return self.projection or self.hidden

    def batch_sizes(self) -> list[int]:
        """The sequences that have each step: their lengths fall evenly from all steps to a quarter of them."""
        last = max(self.batch - 1, 1)
        lengths = [max(1, self.steps - self.steps * 3 * i // (4 * last)) for i in range(self.batch)]
        return [sum(length > step for length in lengths) for step in range(self.steps)]

    @property
    def rows(self) -> int:
        """Steps of all sequences together."""
        return sum(self.batch_sizes()) if self.packed else max(self.steps, 1) * self.batch

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, in torch's order."""
        shapes: dict[str, tuple[int, ...]] = {}
        gates = GATES[self.mode] * self.hidden
        for layer in range(self.layers):
            inputs = self.inputs if layer == 0 else self.state * self.directions
            for suffix in ("", "_reverse")[: self.directions]:
                end = f"_l{layer}{suffix}"
                shapes |= {f"weight_ih{end}": (gates, inputs), f"weight_hh{end}": (gates, self.state)}
                shapes |= {f"bias_ih{end}": (gates,), f"bias_hh{end}": (gates,)}
                shapes |= {f"weight_hr{end}": (self.projection, self.hidden)} if self.projection else {}
        return shapes


# Compute-bound on a CPU; a single stream; one of several kinds each.
LAYERS = [
    *(Layer(mode, 128, 32, 256, 256) for mode in ("lstm", "gru", "rnn_tanh")),
    *(Layer(mode, 100, 1, 128, 128) for mode in ("lstm", "gru", "rnn_tanh")),
    Layer("lstm", 128, 32, 256, 256, layers=2, bidirectional=True),
    Layer("lstm", 128, 32, 256, 256, packed=True),
    *(Layer(mode, 0, batch, 256, 256) for mode in ("lstm", "gru", "rnn_tanh") for batch in (1, 32)),
]
GPU_LAYERS = [
    *(Layer(mode, 256, batch, 1024, 1024) for mode in ("lstm", "gru") for batch in (1, 32)),
    *(Layer(mode, 256, 64, 512, 512) for mode in ("lstm", "gru", "rnn_tanh")),
    Layer("lstm", 256, 32, 512, 512, layers=2, bidirectional=True),
    Layer("lstm", 256, 32, 512, 512, packed=True),
    Layer("lstm", 256, 32, 1024, 1024, projection=512),
    Layer("lstm", 0, 256, 1024, 1024),
]
RAGGED = [
    *(Layer(mode, 5, 3, 7, 17) for mode in GATES),
    Layer("lstm", 4, 3, 7, 17, layers=2, bidirectional=True, projection=5, packed=True),
    *(Layer(mode, 0, 3, 7, 17) for mode in GATES),
]
QUICK = {
    (Layer("lstm", 128, 32, 256, 256), FLOAT, TRAINING),
    (Layer("lstm", 100, 1, 128, 128), FLOAT, FORWARD),
    (Layer("lstm", 0, 32, 256, 256), FLOAT, FORWARD),
    (Layer("lstm", 256, 32, 1024, 1024), BFLOAT, TRAINING),
}


def timed(device: str) -> Iterator[Case]:
    """Every layer, dtype and direction; float16 on a GPU alone."""
    for layer in LAYERS + (GPU_LAYERS if device == "cuda" else []):
        for dtype in (FLOAT, BFLOAT, HALF) if device == "cuda" else (FLOAT, BFLOAT):
            for direction in (FORWARD, TRAINING):
                yield _case(layer, dtype, direction, (layer, dtype, direction) in QUICK)


def checks() -> Iterator[Case]:
    """Ragged shapes of every mode, with gradients."""
    for layer in RAGGED:
        for dtype in (FLOAT, BFLOAT, HALF):
            yield _case(layer, dtype, TRAINING, quick=True)


def _case(layer: Layer, dtype: torch.dtype, direction: str, quick: bool) -> Case:
    from fastdl import functional

    training = direction == TRAINING
    weights = sum(math.prod(shape) for shape in layer.weights().values())
    # Each weight multiplies each row; backward does it twice more, for the gradients of input and weight.
    states = layer.rows * (layer.inputs + layer.state * layer.directions)
    call = _run_cell if layer.steps == 0 else _run_layers
    return Case(
        family="rnn",
        name=str(layer),
        dtype=dtype,
        direction=direction,
        make=functools.partial(_inputs, layer=layer, dtype=dtype),
        call=functools.partial(call, layer, functional),
        eager=functools.partial(call, layer, torch),
        flops=2 * layer.rows * weights * (3 if training else 1),
        bytes=(weights + states) * dtype.itemsize * (3 if training else 1),
        quick=quick,
        op="recurrence" if layer.steps else "recurrent_cell",
        long_reduction=max(layer.inputs, layer.hidden, layer.rows if training else 0) >= 1024,
        overhead=layer.rows * weights < 4096,
    )


def _inputs(generator: torch.Generator, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    lead = [layer.rows] if layer.packed or not layer.steps else [layer.steps, layer.batch]
    states = [layer.layers * layer.directions, layer.batch] if layer.steps else [layer.batch]
    inputs = {"input": normal(generator, (*lead, layer.inputs), dtype)}
    inputs["h0"] = normal(generator, (*states, layer.state), dtype)
    if layer.mode == "lstm":
        inputs["c0"] = normal(generator, (*states, layer.hidden), dtype)
    if layer.packed:
        inputs["batch_sizes"] = torch.tensor(layer.batch_sizes())
    scale = 1 / math.sqrt(3 * layer.hidden)  # torch's own initialisation has this deviation
    return inputs | {name: normal(generator, shape, dtype, scale) for name, shape in layer.weights().items()}


def _run_cell(
    layer: Layer, module: Any, input: Tensor, h0: Tensor, c0: Tensor | None = None, **weights: Tensor
) -> Tensor | tuple[Tensor, ...]:
    function: Callable[..., Any] = getattr(module, f"{layer.mode}_cell")
    return function(input, h0 if c0 is None else (h0, c0), *weights.values())  # type: ignore[no-any-return]


def _run_layers(
    layer: Layer,
    module: Any,
    input: Tensor,
    h0: Tensor,
    c0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    **weights: Tensor,
) -> tuple[Tensor, ...]:
    function: Callable[..., Any] = getattr(module, layer.mode)
    state = h0 if c0 is None else (h0, c0)
    options = list(weights.values()), True, layer.layers, 0.0, False, layer.bidirectional
    if batch_sizes is None:
        return function(input, state, *options, False)  # type: ignore[no-any-return]
    if module is torch:
        return function(input, batch_sizes, state, *options)  # type: ignore[no-any-return]
    return function(input, state, *options, batch_sizes=batch_sizes)  # type: ignore[no-any-return]
