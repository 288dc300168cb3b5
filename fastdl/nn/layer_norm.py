"""Layer normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import functional


class LayerNorm(torch.nn.LayerNorm):
    """(h - mean) / sqrt(variance + eps) * weight + bias over the last dimensions; :class:`torch.nn.LayerNorm`.

    Shape: (*, *normalized_shape), the same out. h is input or, where a ``residual`` of its shape is given, their sum,
    in the same kernel. Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        result: Tensor = functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual
        )
        return result


class RMSNorm(torch.nn.RMSNorm):
    """h / sqrt(mean of h^2 + eps) * weight over the last dimensions; :class:`torch.nn.RMSNorm`.

    Shape: (*, *normalized_shape), the same out. h is input or, where a ``residual`` of its shape is given, their sum,
    in the same kernel. Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        result: Tensor = functional.rms_norm(input, self.normalized_shape, self.weight, self.eps, residual=residual)
        return result
