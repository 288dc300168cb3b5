"""How wrong a result may be: the one bound that tests, benchmark and the proof at first call share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A kernel may be this many times as wrong as torch in the same dtype, both against float64.
MULTIPLE = 2.0
MULTIPLE_LONG_REDUCTION = 4.0
# Below so many units of rounding a comparison says nothing. In 16 bits the one rounding of the result is the error, and
# torch has it too, but for luck in small results. In 32 bits torch may be exact where a formula of several operations
# is not. In 64 bits the reference is as wrong as what it judges: a sum of 1000 terms moves by 30 units with its order.
_FLOOR_EPSILONS = {2: 0.5, 4: 4.0, 8: 64.0}


def error(actual: Tensor, exact: Tensor) -> float:
    """The norm-wise relative error ||actual - exact|| / ||exact||; inf where NaN, infinity or shape disagree.

    Args:
        actual: any dtype; exact: float64, or integers, of the same shape.
    """
    if actual.shape != exact.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    actual = actual.detach().double()
    exact = exact.detach().to(actual.device, torch.float64)  # places are integers
    # Where the exact value is beyond the range of the dtype both must overflow alike; it says so by inf or NaN.
    special = ~torch.isfinite(exact) | ~torch.isfinite(actual)
    if bool(special.any()):
        same = (actual == exact) | (actual.isnan() & exact.isnan())
        if not bool((same | ~special).all()):
            return math.inf
        actual, exact = actual.masked_fill(special, 0), exact.masked_fill(special, 0)
    difference = float(torch.linalg.vector_norm(actual - exact))
    scale = float(torch.linalg.vector_norm(exact))
    if scale == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / scale


def bound(torch_error: float, dtype: torch.dtype, multiple: float = MULTIPLE) -> float:
    """The largest error allowed where torch's own in this dtype is ``torch_error``."""
    return multiple * torch_error + _FLOOR_EPSILONS[dtype.itemsize] * torch.finfo(dtype).eps
