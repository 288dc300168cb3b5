"""Pooling layers: torch.nn's constructors on this package's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdl import functional


class MaxPool2d(torch.nn.MaxPool2d):
    """The maximum of each window; (N, C, H, W) or (C, H, W), in any memory format."""

    def forward(self, input: Tensor) -> Any:
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """The average of each window; (N, C, H, W) or (C, H, W), in any memory format."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """Averages of windows chosen so that the output has a given size; (N, C, H, W) or (C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(input, self.output_size)


class FractionalMaxPool2d(torch.nn.FractionalMaxPool2d):
    """The maximum of windows at random steps (Graham, 2014); (N, C, H, W) or (C, H, W)."""

    def forward(self, input: Tensor) -> Any:
        return functional.fractional_max_pool2d(
            input,
            self.kernel_size,
            self.output_size,
            self.output_ratio,  # type: ignore[arg-type]  # the constructor makes it a pair
            self.return_indices,
            _random_samples=self._random_samples,  # type: ignore[arg-type]  # a buffer
        )
