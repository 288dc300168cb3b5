"""The activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdl.activations import Activation
from fastdl.dispatch import UnsupportedError, state
from fastdl.functional._call import unary
from fastdl.ops.activation import ACTIVATION, ActivationFunction


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), elementwise; as :func:`torch.nn.functional.relu`."""
    return _activation("relu", input, 1, 0.0, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where positive, else negative_slope * input; as :func:`torch.nn.functional.leaky_relu`."""
    return _activation("leaky_relu", input, 2, float(negative_slope), inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """input where positive, else alpha * (exp(input) - 1) (Clevert et al., 2015).

    As :func:`torch.nn.functional.elu`.
    """
    return _activation("elu", input, 3, float(alpha), inplace)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input)), elementwise; as :func:`torch.sigmoid`."""
    return _activation("sigmoid", input, 4, 0.0)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent, elementwise; as :func:`torch.tanh`."""
    return _activation("tanh", input, 5, 0.0)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input) (Hendrycks and Gimpel, 2016); as :func:`torch.nn.functional.gelu`.

    Args:
        approximate: ``"none"``, by erf, or ``"tanh"``.

    Raises:
        ValueError: another ``approximate``.
    """
    return _activation("gelu", input, Activation("gelu", approximate=approximate).kind, 0.0)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input * sigmoid(input), elementwise; as :func:`torch.nn.functional.silu`."""
    return _activation("silu", input, 8, 0.0, inplace)


def _activation(name: str, input: Tensor, kind: int, parameter: float, inplace: bool = False) -> Tensor:
    requested = state.requested
    if inplace:
        if requested not in ("auto", "torch"):
            raise UnsupportedError(f"fastdl.{name}: inplace is True, allowed on backend {requested!r}: False")
        return _IN_PLACE[name](input, parameter)
    return unary(ACTIVATION, ActivationFunction.apply, requested, input, kind, parameter)  # type: ignore[no-any-return]


_IN_PLACE = {
    "relu": lambda input, _: F.relu(input, inplace=True),
    "leaky_relu": lambda input, slope: F.leaky_relu(input, slope, inplace=True),
    "elu": lambda input, alpha: F.elu(input, alpha, inplace=True),
    "silu": lambda input, _: F.silu(input, inplace=True),
}
