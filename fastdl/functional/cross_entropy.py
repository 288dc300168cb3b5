"""Cross entropy of logits, and of a linear layer's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import AUTO_ORDER, UnsupportedError, is_plain, state
from fastdl.functional._call import autocast, select, select_reference
from fastdl.ops import cross_entropy as ops
from fastdl.ops.attention import compute_dtype

_REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss -log softmax(input)[target] of each row; as :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits, (C,) or (N, C, *); float32, float16, bfloat16 or float64.
        target: class indices, () or (N, *), int64, or class probabilities of input's shape.
        weight: of the classes, (C,), or None.
        ignore_index: the rows of this target have no loss and no part in the mean.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; ``size_average`` and ``reduce`` are its old names.
        label_smoothing: the part of the target, 0 to 1, that is spread over all classes (Szegedy et al., 2016).

    Returns:
        (), or with ``"none"`` the rows' shape; in input's dtype, float32 under autocast.

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: a target of other rows than input, or an unknown reduction.
        IndexError: on a CPU, a target that is no class. On a GPU its row's loss is NaN.
        RuntimeError: other shapes, dtypes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    _check_reduction("cross_entropy", reduction)
    original, requested = (input, target, weight), state.requested
    options = ignore_index, label_smoothing

    def torchs() -> Tensor:
        return F.cross_entropy(
            *original, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    for argument, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"cross_entropy: {argument} must be a tensor; got {type(tensor).__name__}")
    one = input.dim() == 1
    if one:
        input, target = input[None], target[None] if target.dim() == 0 or target.is_floating_point() else target
    if target.dtype == torch.uint8:
        target = target.long()
    arguments: tuple[Any, ...] = input, target, weight, reduction != "none", *options
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input, target, weight):
        select_reference(ops.CROSS_ENTROPY, requested, *arguments)
        return torchs()
    training = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    selection = select(ops.CROSS_ENTROPY, requested, training, compiling, *arguments)
    if selection is not None and selection.backend == "torch":
        return torchs()
    if _has_gradient("cross_entropy", requested, weight):
        return torchs()
    dtype = _result_dtype(input)
    if training:
        loss: Tensor = ops.CrossEntropyFunction.apply(
            input, target, weight, reduction, *options, dtype, requested, selection
        )
    else:
        loss, denominator, _ = ops.CROSS_ENTROPY(requested, *arguments, selection=selection)
        loss = ops.finished(loss, denominator if reduction == "mean" else None, dtype)
    return (
        loss.reshape(original[1].shape[: original[1].dim() - target.is_floating_point()])
        if one and loss.dim()
        else loss
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target) without all logits in memory.

    The signature is that of torch 2.13's function. Logits are made chunk by chunk of rows. With ``"mean"`` and
    ``"sum"`` the gradients are made with them (Hsu et al., 2024); with ``"none"`` the backward makes the logits again.

    Args:
        input: (*, in_features); float32, float16, bfloat16 or float64.
        linear_weight: (C, in_features); linear_bias: (C,) or None; of the same dtype and device.
        target: class indices, (*), int64, or class probabilities, (*, C).
        weight, ignore_index, reduction, label_smoothing: as for :func:`cross_entropy`.

    Returns:
        (), or with ``"none"`` (*); in input's dtype, float32 under autocast.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, fastdl.UnsupportedError: as :func:`cross_entropy`.
    """
    name = ops.LINEAR_NAME
    _check_reduction(name, reduction)
    for argument, tensor in (("input", input), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor; got {type(tensor).__name__}")
    if input.dim() == 0:
        raise RuntimeError(f"{name}: input has shape (), allowed: (*, in_features)")
    requested, compiling = state.requested, torch.compiler.is_compiling()
    lead = input.shape[:-1]
    shapes = [lead] if not target.is_floating_point() else [(*lead, target.shape[-1] if target.dim() else 0)]
    if tuple(target.shape) != tuple(shapes[0]):
        error = ValueError if target.dim() and lead and target.shape[0] != lead[0] else RuntimeError
        raise error(f"{name}: target has shape {tuple(target.shape)}, allowed: {tuple(lead)}, or (*, C) probabilities")
    rows = target.long() if target.dtype == torch.uint8 else target
    rows = rows.reshape(-1, target.shape[-1]) if target.is_floating_point() else rows.reshape(-1)
    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    tensors = flat, linear_weight, linear_bias, rows, weight
    options = -100 if ignore_index is None else ignore_index, label_smoothing

    def torchs() -> Tensor:
        loss = ops.linear_reference(*tensors, reduction, *options)
        return loss.reshape(lead) if reduction == "none" else loss

    if not is_plain(compiling, *tensors):
        select_reference(ops.LINEAR_CROSS_ENTROPY, requested, *tensors, reduction != "none", *options, [False] * 4)
        return torchs()
    dtype = _result_dtype(flat)
    if flat.device.type in AUTO_ORDER and torch.is_autocast_enabled(flat.device.type):
        cast = autocast(flat, linear_weight, linear_bias, rows, weight)
        dtype, (flat, linear_weight, linear_bias, rows, weight) = _result_dtype(cast[0]), cast
    tensors = flat, linear_weight, linear_bias, rows, weight
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4])
    arguments: tuple[Any, ...] = *tensors, reduction != "none", *options, [False] * 4
    selection = select(ops.LINEAR_CROSS_ENTROPY, requested, training, compiling, *arguments)
    if selection is not None and selection.backend == "torch":
        return torchs()
    if _has_gradient(name, requested, weight):
        return torchs()
    if training:
        loss: Tensor = ops.LinearCrossEntropyFunction.apply(*tensors, reduction, *options, dtype, requested, selection)
    else:
        loss, denominator, *_ = ops.LINEAR_CROSS_ENTROPY(requested, *arguments, selection=selection)
        loss = ops.finished(loss, denominator if reduction == "mean" else None, dtype)
    return loss.reshape(lead) if reduction == "none" else loss


def _check_reduction(name: str, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{name}: reduction is {reduction!r}, allowed: {', '.join(_REDUCTIONS)}")


def _result_dtype(input: Tensor) -> torch.dtype:
    """Of the loss: torch's autocast gives float32."""
    kind = input.device.type
    if kind in AUTO_ORDER and torch.is_autocast_enabled(kind):
        return compute_dtype(input)
    return input.dtype


def _has_gradient(name: str, requested: str, weight: Tensor | None) -> bool:
    """Whether the weights of the classes ask for a gradient, which is torch's business."""
    if weight is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return False
    if requested != "auto":
        raise UnsupportedError(
            f"fastdl.{name}: the weights of the classes require a gradient, allowed on backend {requested!r}: ones "
            "that do not"
        )
    return True
