"""The gate before any timing: each output and each gradient, by name, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdl import accuracy

from .cases import TRAINING, Case


@dataclass
class Sample:
    """One set of inputs and, for training, of gradients of the outputs."""

    inputs: dict[str, Tensor]
    grad_outputs: list[Tensor] = field(default_factory=list)

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The inputs whose gradients are asked for."""
        return {name: value for name, value in self.inputs.items() if value.requires_grad}

    @property
    def bytes(self) -> int:
        """Memory that the set takes."""
        return sum(t.numel() * t.element_size() for t in [*self.inputs.values(), *self.grad_outputs])

    def copy(self, dtype: torch.dtype | None = None) -> Sample:
        """The same values in memory of their own, floating ones in another dtype if given."""

        def clone(value: Tensor) -> Tensor:
            result = value.detach().clone()
            result = result.to(dtype) if dtype and value.is_floating_point() else result
            return result.requires_grad_(value.requires_grad)

        return Sample({k: clone(v) for k, v in self.inputs.items()}, [clone(g) for g in self.grad_outputs])


def draw(case: Case, device: torch.device, seed: int = 0) -> Sample:
    """Fresh random inputs for a case, and random gradients shaped as its outputs."""
    generator = torch.Generator(device).manual_seed(seed)
    sample = Sample(case.make(generator))
    if case.direction == TRAINING:
        for value in sample.inputs.values():
            value.requires_grad_(value.is_floating_point())
        outputs = [output.detach() for output in tree_leaves(case.eager(**sample.inputs))]
        sample.grad_outputs = [
            torch.randn(output.shape, generator=generator, device=device).to(output.dtype) for output in outputs
        ]
    return sample


def step(case: Case, call: Callable[..., Any]) -> Callable[[Sample], dict[str, Tensor]]:
    """One run of a case by ``call``, forward or forward and backward: its outputs and gradients by name."""

    def run(sample: Sample) -> dict[str, Tensor]:
        outputs = tree_leaves(call(**sample.inputs))
        named = {f"output{i or ''}": output for i, output in enumerate(outputs)}
        if sample.grad_outputs:
            inputs = sample.differentiable
            gradients = torch.autograd.grad(outputs, list(inputs.values()), sample.grad_outputs)
            named |= {f"grad_{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
        return named

    return run


@dataclass(frozen=True)
class Error:
    """How wrong one tensor is, beside torch in the same dtype: by norm, and at worst in units of the largest value."""

    tensor: str
    norm: float
    worst: float
    norm_bound: float
    worst_bound: float

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.norm <= self.norm_bound and self.worst <= self.worst_bound

    @property
    def share(self) -> float:
        """The error as a share of its bound; infinite for NaN."""
        share = max(self.norm / self.norm_bound, self.worst / self.worst_bound)
        return share if self.norm == self.norm and self.worst == self.worst else math.inf


class Gate:
    """The reference of a case and torch's own error, to judge any number of contenders by."""

    def __init__(self, case: Case, sample: Sample) -> None:
        self.case = case
        self.sample = sample
        self.exact = {k: v.detach() for k, v in step(case, case.eager)(sample.copy(torch.float64)).items()}
        self._before = sample.copy()
        multiple = accuracy.MULTIPLE_LONG_REDUCTION if case.long_reduction else accuracy.MULTIPLE
        self._bounds = {}
        for name, value in step(case, case.eager)(sample).items():
            torch_errors = accuracy.error(value, self.exact[name]), _worst(value, self.exact[name])
            self._bounds[name] = [accuracy.bound(e, value.dtype, multiple) for e in torch_errors]

    def judge(self, call: Callable[..., Any]) -> list[Error]:
        """The errors of every output and gradient, from memory poisoned with NaN; raises if an input is changed."""
        for exact in self.exact.values():
            torch.full_like(exact, torch.nan, dtype=self.case.dtype)  # freed at once: what the call allocates next
        results = step(self.case, call)(self.sample)
        changed = [k for k, v in self.sample.inputs.items() if not torch.equal(v, self._before.inputs[k])]
        if changed:
            raise AssertionError(f"the call changed its inputs: {', '.join(changed)}")
        errors = []
        for name, exact in self.exact.items():
            value = results[name]
            errors.append(Error(name, accuracy.error(value, exact), _worst(value, exact), *self._bounds[name]))
        return errors


def _worst(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute error in units of the largest exact value; 0 where there is none."""
    if actual.shape != exact.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    scale = float(exact.abs().max())
    return float((actual.detach().double() - exact).abs().max()) / (scale or 1.0)
