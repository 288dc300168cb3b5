"""Embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdl import functional


class Embedding(torch.nn.Embedding):
    """Rows of a table by their indices; :class:`torch.nn.Embedding` on this package's kernels.

    Shape: (*) of integers -> (*, embedding_dim). Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
