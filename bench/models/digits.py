"""Networks trained on scikit-learn's 1,797 handwritten digits, with this package's layers and with torch's."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdl
from fastdl import accuracy, dispatch

from . import networks

TORCH, EXACT = "torch", "torch float64"


@dataclass(frozen=True)
class Task:
    """A network, how it is trained, and the share of test images that it must name right."""

    name: str
    network: Callable[[], nn.Module]
    epochs: int
    accuracy: float
    learning_rate: float
    batch: int = 128
    momentum: float = 0.9


# Of a network with batch normalisation the rate and the batch are such that roundings grow little: at twice the rate,
# float32 and float64 already part ways.
TASKS = (
    Task("perceptron, 64-256-128-10", networks.perceptron, epochs=20, accuracy=0.96, learning_rate=0.1),
    Task("VGG, 4 convolutions", networks.vgg, epochs=12, accuracy=0.975, learning_rate=0.02),
    Task("ResNet, 3 blocks", networks.resnet, epochs=20, accuracy=0.975, learning_rate=0.04, batch=225),
)


def run(device: torch.device, out: Path) -> list[dict[str, Any]]:
    """Trains each network on torch, on each backend of this device and on auto; draws a PNG for each.

    All start from one state_dict and see the same batches. Each loss curve may differ from torch's by no more than a
    small multiple of what torch's own differs from float64, plus one rounding a step. Returns a dictionary for each
    network and backend: times, accuracies, differences, ``passed``.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        return []
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 8 - 1, labels, test_size=0.25, random_state=0, stratify=labels)
    pixels = [torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 8, 8) for part in parts[:2]]
    digits = [torch.tensor(part, dtype=torch.int64, device=device) for part in parts[2:]]
    return [row for task in TASKS for row in _run_task(task, *pixels, *digits, out)]


def _run_task(
    task: Task, train_x: Tensor, test_x: Tensor, train_y: Tensor, test_y: Tensor, out: Path
) -> list[dict[str, Any]]:
    device = train_x.device
    torch.manual_seed(0)
    start = task.network()
    runs = {TORCH: _Run(task, start, device), EXACT: _Run(task, start.double(), device)}
    start.float()
    for backend in (*dispatch.AUTO_ORDER[device.type], "auto"):
        candidate = _Run(task, start, device, backend)
        with contextlib.suppress(fastdl.UnsupportedError), fastdl.use_backend(backend), fastdl.trace() as calls:
            copy.deepcopy(candidate.model)(train_x[: task.batch]).sum().backward()
            candidate.ran = "+".join(dict.fromkeys(call.backend for call in calls))
            runs[backend] = candidate

    generator = torch.Generator().manual_seed(0)
    for epoch in range(task.epochs):
        order = torch.randperm(len(train_x), generator=generator).to(device)
        first = epoch % len(runs)  # who goes first changes, so that a disturbance meets all alike
        for contender in [*runs.values()][first:] + [*runs.values()][:first]:
            contender.epoch(train_x, train_y, order)

    losses = {name: contender.losses() for name, contender in runs.items()}
    rounding = float((losses[TORCH] - losses[EXACT]).abs().max())
    one_a_step = len(losses[TORCH]) * torch.finfo(torch.float32).eps * float(losses[TORCH].max())
    bound = accuracy.MULTIPLE_LONG_REDUCTION * rounding + one_a_step
    torch_accuracy = runs[TORCH].accuracy(test_x, test_y)
    found = []
    for name, contender in runs.items():
        if name in (TORCH, EXACT):
            continue
        difference = float((losses[name] - losses[TORCH]).abs().max())
        test_accuracy = contender.accuracy(test_x, test_y)
        found.append(
            {
                "model": f"digits: {task.name}, float32",
                "backend": name,
                "ran": contender.ran,
                "steps": len(losses[name]),
                "seconds": contender.seconds,
                "torch seconds": runs[TORCH].seconds,
                "accuracy": test_accuracy,
                "torch accuracy": torch_accuracy,
                "accuracy bound": task.accuracy,
                "loss difference": difference,
                "loss difference bound": bound,
                "final loss": float(losses[name][-1]),
                "passed": difference <= bound and min(test_accuracy, torch_accuracy) >= task.accuracy,
            }
        )
    _draw(task.name, losses, bound, out / f"digits-{task.network.__name__}.png")
    return found


class _Run:
    """One model in training."""

    def __init__(self, task: Task, start: nn.Module, device: torch.device, backend: str | None = None) -> None:
        """A copy of ``start``; with this package's layers if ``backend`` names one."""
        self.task = task
        self.model = copy.deepcopy(start).to(device)
        if backend is not None:
            fastdl.replace_layers(self.model)
            for module in self.model.modules():
                if type(module) is networks.LinearReLU:
                    module.__class__ = fastdl.nn.LinearReLU
        self.backend = backend or "torch"
        self.seconds = 0.0
        self.ran = ""
        self.optimizer: torch.optim.Optimizer | None = None
        self._losses: list[Tensor] = []

    def epoch(self, images: Tensor, labels: Tensor, order: Tensor) -> None:
        """Every image once, in a given order."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(
                self.model.parameters(), lr=self.task.learning_rate, momentum=self.task.momentum
            )
        images = images.to(next(self.model.parameters()).dtype)
        _synchronize(images)
        began = time.perf_counter()
        with fastdl.use_backend(self.backend):
            for batch in order.split(self.task.batch):
                loss = F.cross_entropy(self.model(images[batch]), labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self._losses.append(loss.detach())
        _synchronize(images)
        self.seconds += time.perf_counter() - began

    def losses(self) -> Tensor:
        """The loss of every step, in float64."""
        return torch.stack(self._losses).double().cpu()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images that the model names right."""
        images = images.to(next(self.model.parameters()).dtype)
        self.model.eval()
        with fastdl.use_backend(self.backend):
            return float((self.model(images).argmax(1) == labels).double().mean())


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _draw(name: str, losses: dict[str, Tensor], bound: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for label, values in losses.items():
        if label != EXACT:
            ours = label != TORCH
            curves.plot(
                values, label=f"fastdl, {label}" if ours else label, lw=1 if ours else 3, alpha=1 if ours else 0.4
            )
        if label != TORCH:
            what = f"fastdl, {label}, to torch" if label != EXACT else "float64 to torch: rounding"
            differences.plot((values - losses[TORCH]).abs().clamp_min(1e-12), label=what, lw=1)
    differences.axhline(bound, color="black", ls="--", lw=1, label="bound")
    curves.set(title=f"handwritten digits by a {name}, trained from the same weights", ylabel="loss", yscale="log")
    differences.set(xlabel="step", ylabel="difference of loss", yscale="log")
    for axes in (curves, differences):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
