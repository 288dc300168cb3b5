"""Batch normalisation layers, and folding them into the layer before."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastdl import functional

Layer = TypeVar("Layer", bound=torch.nn.Module)


def _statistics(layer: _BatchNorm) -> tuple[Tensor | None, Tensor | None, bool, float]:
    """What torch's forward gives the function: running mean and variance, training and momentum. Counts the batch."""
    momentum = 0.0 if layer.momentum is None else layer.momentum
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:  # the average of all batches so far
            momentum = 1.0 / float(layer.num_batches_tracked)
    if layer.training and not layer.track_running_stats:
        return None, None, True, momentum
    training = layer.training or (layer.running_mean is None and layer.running_var is None)
    return layer.running_mean, layer.running_var, training, momentum


def _normalise(
    layer: _BatchNorm, input: Tensor, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    layer._check_input_dim(input)
    mean, variance, training, momentum = _statistics(layer)
    return functional.batch_norm(
        input,
        mean,
        variance,
        layer.weight,
        layer.bias,
        training,
        momentum,
        layer.eps,
        activation=activation,
        residual=residual,
    )


class BatchNorm1d(torch.nn.BatchNorm1d):
    """Batch normalisation; :class:`torch.nn.BatchNorm1d` on this package's kernels.

    Shape: (N, C) or (N, C, L), the same out. Same constructor, state_dict, running statistics and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _normalise(self, input)


class BatchNorm2d(torch.nn.BatchNorm2d):
    """Batch normalisation; :class:`torch.nn.BatchNorm2d` on this package's kernels.

    Shape: (N, C, H, W), the same out, in the memory format of input. Same constructor, state_dict, running statistics
    and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _normalise(self, input)


class BatchNorm3d(torch.nn.BatchNorm3d):
    """Batch normalisation; :class:`torch.nn.BatchNorm3d` on this package's kernels.

    Shape: (N, C, D, H, W), the same out, in the memory format of input. Same constructor, state_dict, running
    statistics and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _normalise(self, input)


class BNReLU2d(torch.nn.BatchNorm2d):
    """relu(batch_norm(input) + residual) in one kernel; constructor and state_dict of :class:`torch.nn.BatchNorm2d`.

    Shape: (N, C, H, W), the same out; ``residual``, if given, has input's shape and dtype. The name is that of
    torch.ao.nn.intrinsic.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return _normalise(self, input, "relu", residual)


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """Batch normalisation over the batches of all processes of a group; :class:`torch.nn.SyncBatchNorm`, also on CPUs.

    Shape: (N, C, *), the same out; N may differ between the processes, and may be 0. In evaluation, without a process
    group or in a group of one, it is plain batch normalisation.
    """

    def forward(self, input: Tensor) -> Tensor:
        group = self._group()
        if group is None:
            return _normalise(self, input)
        from fastdl.ops import batch_norm as ops

        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        running_mean, running_var, _, momentum = _statistics(self)
        return ops.synchronised(input, running_mean, running_var, self.weight, self.bias, momentum, self.eps, group)

    def _group(self) -> Any:
        """The process group to join statistics over, or None."""
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replaces every batch normalisation of a module by this class; as torch's, which gives torch's class.

        Raises:
            TypeError: a :class:`BNReLU2d`, whose ReLU would be lost.
        """
        for name, layer in module.named_modules():
            if isinstance(layer, BNReLU2d):
                raise TypeError(
                    f"convert_sync_batchnorm: {name or 'module'} is a BNReLU2d, allowed: batch normalisation without a "
                    "fused ReLU, such as BatchNorm2d and ReLU"
                )
        converted: torch.nn.Module = super().convert_sync_batchnorm(module, process_group)
        for layer in converted.modules():
            if type(layer) is torch.nn.SyncBatchNorm:
                layer.__class__ = cls
        return converted


def fold_batch_norm(layer: Layer, norm: torch.nn.Module) -> Layer:
    """One layer that does what a convolution or linear layer and the batch normalisation after it do in evaluation.

    Its weight is weight * s and its bias (bias - mean) * s + beta, with s = gamma / sqrt(variance + eps) of the
    normalisation for each output channel.

    Args:
        layer: a convolution (also transposed) or linear layer, without an activation of its own; it is left as it is.
        norm: what normalises its output, in eval mode and with running statistics.

    Returns:
        A new layer of the same class, with a bias, in eval mode; for a :class:`BNReLU2d` this package's class with the
        ReLU.

    Raises:
        TypeError: layers of other classes, or a ReLU that no class here can take.
        ValueError: a normalisation in training mode or without running statistics, or of another number of channels.
    """
    name = type(layer).__name__
    convolution = isinstance(layer, torch.nn.modules.conv._ConvNd)
    if "ReLU" in name or not (convolution or isinstance(layer, torch.nn.Linear)):
        raise TypeError(
            f"fold_batch_norm: layer is a {name}, allowed: a convolution or linear layer without an activation"
        )
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f"fold_batch_norm: norm is a {type(norm).__name__}, allowed: batch normalisation")
    if norm.training:
        raise ValueError("fold_batch_norm: norm is in training mode, allowed: evaluation; call norm.eval() first")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("fold_batch_norm: norm has no running statistics, allowed: track_running_stats=True")
    folded: Any = copy.deepcopy(layer).eval()
    channels = folded.out_channels if convolution else folded.out_features
    if norm.num_features != channels:
        raise ValueError(
            f"fold_batch_norm: norm has {norm.num_features} channels, allowed: {channels}, those of the layer's output"
        )
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean.double() if folded.bias is None else folded.bias - norm.running_mean.double()
        bias = shift * scale if norm.bias is None else shift * scale + norm.bias
        if convolution and folded.transposed:  # (in_channels, out_channels / groups, *)
            grouped = folded.weight.double().unflatten(0, (folded.groups, -1))
            weight = grouped * scale.view(folded.groups, 1, -1, *[1] * (folded.weight.dim() - 2))
            weight = weight.flatten(0, 1)
        else:
            weight = folded.weight.double() * scale.view(-1, *[1] * (folded.weight.dim() - 1))
        folded.weight.copy_(weight)
        folded.bias = torch.nn.Parameter(bias.to(folded.weight.dtype), requires_grad=folded.weight.requires_grad)
    return _with_relu(folded) if isinstance(norm, BNReLU2d) else folded  # type: ignore[no-any-return]


def _with_relu(layer: Any) -> Any:
    """The layer as this package's class that ends in a ReLU."""
    from fastdl import nn

    plain = {getattr(library, "Conv2d", None) for library in (torch.nn, nn)}
    fused = getattr(nn, "ConvReLU2d", None)
    if fused is None or type(layer) not in plain:
        raise TypeError(
            f"fold_batch_norm: norm is a BNReLU2d and layer a {type(layer).__name__}, allowed with it: Conv2d"
        )
    layer.__class__ = fused
    return layer
