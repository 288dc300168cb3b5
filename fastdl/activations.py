"""The activation functions that every family can fuse: their names, parameters and reference formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Saved = Literal["nothing", "output", "preactivation"]

# The numbers that the kernels know the activations by; gelu's two forms are two kernels.
KINDS = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "elu": 3,
    "sigmoid": 4,
    "tanh": 5,
    "gelu": 6,
    "gelu_tanh": 7,
    "silu": 8,
}
NAMES = tuple(name for name in KINDS if name not in ("none", "gelu_tanh"))

_KIND_NAMES = {kind: name for name, kind in KINDS.items()}
_FROM_OUTPUT = frozenset(KINDS[name] for name in ("relu", "leaky_relu", "elu", "sigmoid", "tanh"))


@dataclass(frozen=True)
class Activation:
    """An activation function with its parameter, for the ``activation=`` argument of the layers.

    Args:
        name: ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"sigmoid"``, ``"tanh"``, ``"gelu"`` or ``"silu"``.
        negative_slope: of leaky_relu.
        alpha: of elu.
        approximate: of gelu: ``"none"`` (by erf) or ``"tanh"``.

    Raises:
        ValueError: if ``name`` or ``approximate`` is none of these.
    """

    name: str
    negative_slope: float = 0.01
    alpha: float = 1.0
    approximate: str = "none"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"activation must be None or one of {', '.join(NAMES)}; got {self.name!r}")
        if self.approximate not in ("none", "tanh"):
            raise ValueError(f"approximate must be 'none' or 'tanh'; got {self.approximate!r}")

    @property
    def kind(self) -> int:
        """The number by which kernels know this activation."""
        return KINDS["gelu_tanh" if self.name == "gelu" and self.approximate == "tanh" else self.name]

    @property
    def parameter(self) -> float:
        """The number that the kernels take besides the kind."""
        if self.name == "leaky_relu":
            return float(self.negative_slope)
        return float(self.alpha) if self.name == "elu" else 0.0


def resolve(activation: str | Activation | None) -> tuple[int, float]:
    """(kind, parameter) of what a caller gave as ``activation=``."""
    if activation is None:
        return 0, 0.0
    if isinstance(activation, str):
        activation = _BY_NAME.get(activation) or Activation(activation)
    elif not isinstance(activation, Activation):
        raise TypeError(
            f"activation must be None, a name ({', '.join(NAMES)}) or a fastdl.Activation; got {activation!r}"
        )
    return activation.kind, activation.parameter


_BY_NAME = {name: Activation(name) for name in NAMES}


def kind_name(kind: int) -> str:
    """The name of an activation kind, for messages and records."""
    return _KIND_NAMES[kind]


def saves(kind: int, parameter: float) -> Saved:
    """What the backward of an activation needs: its output where that determines the gradient, else its input."""
    if kind == 0:
        return "nothing"
    # With a negative slope or alpha, the output's sign no longer tells the input's.
    return "output" if kind in _FROM_OUTPUT and not (kind in (2, 3) and parameter < 0) else "preactivation"


def reference(z: Tensor, kind: int, parameter: float) -> Tensor:
    """The activation by torch's own operators; ``z`` of any shape."""
    match _KIND_NAMES[kind]:
        case "none":
            return z
        case "relu":
            return F.relu(z)
        case "leaky_relu":
            return F.leaky_relu(z, parameter)
        case "elu":
            return F.elu(z, parameter)
        case "sigmoid":
            return torch.sigmoid(z)
        case "tanh":
            return torch.tanh(z)
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case _:
            return F.silu(z)


def reference_gradient(grad_output: Tensor, saved: Tensor | None, kind: int, parameter: float) -> Tensor:
    """grad_output times the activation's derivative, by torch's operators: differentiable, for double backward.

    Args:
        grad_output, saved: of one shape; ``saved`` is what :func:`saves` names for this kind.
    """
    if saved is None:
        return grad_output
    match _KIND_NAMES[kind]:
        case "relu":
            return torch.where(saved <= 0, 0, grad_output)  # a NaN output passes the gradient on, as in torch
        case "leaky_relu":
            return torch.where(saved > 0, grad_output, grad_output * parameter)
        case "elu":
            slope = saved + parameter if parameter >= 0 else parameter * torch.exp(saved)
            return torch.where(saved <= 0, grad_output * slope, grad_output)
        case "sigmoid":
            return grad_output * ((1 - saved) * saved)
        case "tanh":
            return grad_output * (1 - saved * saved)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad_output, saved)  # type: ignore[no-any-return]
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad_output, saved, approximate="tanh")  # type: ignore[no-any-return]
        case _:
            if not torch.is_grad_enabled():
                return torch.ops.aten.silu_backward(grad_output, saved)  # type: ignore[no-any-return]
            sigmoid = torch.sigmoid(saved)  # torch's own operator is not differentiable
            return grad_output * (sigmoid * (1 + saved * (1 - sigmoid)))


def accepts(dtype: torch.dtype, kind: int) -> bool:
    """Whether torch's own activation takes this dtype: integers only where it keeps or promotes them."""
    return dtype.is_floating_point or dtype.is_complex or _KIND_NAMES[kind] in ("none", "relu", "sigmoid", "tanh")


def limit(kind: int, parameter: float) -> str | None:
    """What no kernel does: elu with a negative alpha, whose gradient its output does not tell."""
    if _KIND_NAMES[kind] == "elu" and parameter < 0:
        return f"alpha of elu is {parameter}, allowed: alpha >= 0"
    return None
