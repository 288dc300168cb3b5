"""Activation layers: torch.nn's constructors on this package's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import functional


class ReLU(torch.nn.ReLU):
    """max(input, 0), elementwise, any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """input where positive, else negative_slope * input, any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(torch.nn.ELU):
    """input where positive, else alpha * (exp(input) - 1), any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.elu(input, self.alpha, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """1 / (1 + exp(-input)), elementwise, any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """The hyperbolic tangent, elementwise, any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


class GELU(torch.nn.GELU):
    """input * Phi(input), elementwise, any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """input * sigmoid(input), elementwise, any shape."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)
