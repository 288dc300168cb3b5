"""Small networks of plain torch.nn modules for images [N, 1, 8, 8]; ``replace_layers`` puts our layers in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LinearReLU(nn.Linear):
    """What :class:`fastdl.nn.LinearReLU` replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def perceptron() -> nn.Module:
    """64 pixels -> 256 -> 128 -> 10 digits."""
    return nn.Sequential(nn.Flatten(), LinearReLU(64, 256), LinearReLU(256, 128), nn.Linear(128, 10))


def vgg() -> nn.Module:
    """Pairs of 3x3 convolutions between poolings (Simonyan and Zisserman, 2014), with batch normalisation."""

    def pair(inputs: int, outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            convolution = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        return [*layers, nn.MaxPool2d(2)]

    classifier = [nn.Flatten(), nn.Linear(32 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*pair(1, 16), *pair(16, 32), *classifier)


class Block(nn.Module):
    """relu(x + two 3x3 convolutions of x); where the shape changes, x goes through a 1x1 one."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.convolution1(x)))
        return self.relu(self.norm2(self.convolution2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """Residual blocks (He et al., 2015), 8x8 to 4x4, and a global average."""
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
