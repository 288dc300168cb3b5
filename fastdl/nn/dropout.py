"""Dropout layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import functional


class Dropout(torch.nn.Dropout):
    """In training, input with elements set to 0 with probability p, the others divided by 1 - p; any shape.

    :class:`torch.nn.Dropout` on this package's kernels: same constructor and errors, reproducible from torch's seed.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)
