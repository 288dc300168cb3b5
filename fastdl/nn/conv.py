"""Convolution layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import functional
from fastdl.activations import Activation


class Conv1d(torch.nn.Conv1d):
    """conv1d(input, weight) + bias; :class:`torch.nn.Conv1d` on this package's kernels.

    Shape: (N, in_channels, L) or (in_channels, L). Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        input, padding = _pad(self, input)
        return functional.conv1d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(torch.nn.Conv2d):
    """conv2d(input, weight) + bias; :class:`torch.nn.Conv2d` on this package's kernels.

    Shape: (N, in_channels, H, W) or (in_channels, H, W). Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _conv2d(self, input, None)


class ConvReLU2d(torch.nn.Conv2d):
    """relu(conv2d(input, weight) + bias) in one kernel; constructor and state_dict of :class:`torch.nn.Conv2d`.

    Shape: (N, in_channels, H, W) or (in_channels, H, W). The name is that of torch.ao.nn.intrinsic.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _conv2d(self, input, "relu")


def _conv2d(layer: torch.nn.Conv2d, input: Tensor, activation: str | Activation | None) -> Tensor:
    input, padding = _pad(layer, input)
    return functional.conv2d(
        input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups, activation=activation
    )


def _pad(layer: torch.nn.Conv1d | torch.nn.Conv2d, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
    """The input, padded by ``padding_mode`` unless that is by zeros, and the padding left to the kernel."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return input, (0,) * len(layer.kernel_size)
