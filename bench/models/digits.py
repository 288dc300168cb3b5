"""Networks for scikit-learn's 1,797 handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdl

from . import networks, training


@dataclass
class Digits(training.Task):
    """A network that names digits; the images are [N, 1, 8, 8]."""

    title: str
    network: Callable[[], nn.Module]
    epochs: int
    accuracy: float
    learning_rate: float
    batch: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def file(self) -> str:  # type: ignore[override]
        return f"digits-{self.network.__name__}"

    def model(self) -> nn.Module:
        return self.network()

    def replace(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) is networks.LinearReLU:
                module.__class__ = fastdl.nn.LinearReLU
        return super().replace(model)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)

    def batches(self, epoch: int) -> list[Tensor]:
        images = self.train[0]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        return list(order.to(images.device).split(self.batch))

    def loss(self, model: nn.Module, batch: Tensor, state: Any) -> tuple[Tensor, None]:
        images, labels = self.train
        return F.cross_entropy(model(_as(model, images[batch])), labels[batch]), None

    def score(self, model: nn.Module) -> float:
        images, labels = self.test
        return float((model(_as(model, images)).argmax(1) == labels).double().mean())


def tasks(device: torch.device) -> Iterator[Digits]:
    """A perceptron, a VGG and a ResNet; none without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        return
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 8 - 1, labels, test_size=0.25, random_state=0, stratify=labels)
    pixels = [torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 8, 8) for part in parts[:2]]
    digits = [torch.tensor(part, dtype=torch.int64, device=device) for part in parts[2:]]
    train, test = (pixels[0], digits[0]), (pixels[1], digits[1])
    yield Digits("digits: 64-256-128-10", networks.perceptron, 20, 0.96, 0.1, 128, train, test)
    # With batch normalisation, at twice these rates float32 and float64 already part ways.
    yield Digits("digits: VGG, 4 convolutions", networks.vgg, 12, 0.975, 0.02, 128, train, test)
    yield Digits("digits: ResNet, 3 blocks", networks.resnet, 20, 0.975, 0.04, 225, train, test)


def _as(model: nn.Module, images: Tensor) -> Tensor:
    return images.to(next(model.parameters()).dtype)
