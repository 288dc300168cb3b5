"""Linear layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import functional


class Linear(torch.nn.Linear):
    """input @ weight.T + bias; :class:`torch.nn.Linear` on this package's kernels.

    Shape: (*, in_features) -> (*, out_features). Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class LinearReLU(torch.nn.Linear):
    """relu(input @ weight.T + bias) in one kernel; constructor and state_dict of :class:`torch.nn.Linear`.

    Shape: (*, in_features) -> (*, out_features). The name is that of torch.ao.nn.intrinsic.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, activation="relu")
