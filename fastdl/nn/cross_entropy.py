"""Cross entropy losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdl import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """The cross entropy of logits and classes; :class:`torch.nn.CrossEntropyLoss` on this package's kernels.

    Shape: input (C,) or (N, C, *), target () or (N, *) of class indices, or probabilities of input's shape. Same
    constructor, state_dict and errors.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """The cross entropy of a linear layer's output and classes, without all logits in memory; as torch 2.13's.

    Shape: input (*, in_features), target (*) of class indices, or (*, num_classes) of probabilities. Parameters and
    their initialisation are those of a :class:`torch.nn.Linear` by the name ``linear``.

    Args:
        in_features, num_classes: sizes of the linear layer.
        bias: whether it has one.
        weight: of the classes, (num_classes,), or None.
        reduction, ignore_index, label_smoothing: as for :class:`CrossEntropyLoss`.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
