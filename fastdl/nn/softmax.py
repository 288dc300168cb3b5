"""Softmax layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import functional


class Softmax(torch.nn.Softmax):
    """exp(input) / sum of exp(input) along a dimension; :class:`torch.nn.Softmax` on this package's kernels.

    Shape: (*), the same out. Same constructor and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    """The logarithm of softmax along a dimension; :class:`torch.nn.LogSoftmax` on this package's kernels.

    Shape: (*), the same out. Same constructor and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)
