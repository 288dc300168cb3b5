"""A network trained on scikit-learn's 1,797 handwritten digits, with this package's layers and with torch's."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdl
from fastdl import accuracy, dispatch

EPOCHS, BATCH, LEARNING_RATE, MOMENTUM = 20, 128, 0.1, 0.9
ACCURACY = 0.96  # of the test images, at least
TORCH, EXACT = "torch", "torch float64"


class TorchLinearReLU(nn.Linear):
    """What :class:`fastdl.nn.LinearReLU` replaces."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.relu(super().forward(input))


def network(hidden: type[nn.Linear], last: type[nn.Linear]) -> nn.Sequential:
    """64 pixels -> 256 -> 128 -> 10 digits; the same parameter names whatever the layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        first=hidden(64, 256), second=hidden(256, 128), digits=last(128, 10)
    )
    return nn.Sequential(layers)


def run(device: torch.device, out: Path) -> list[dict[str, Any]]:
    """Trains on torch, on each backend of this device and on auto, all from one state_dict; draws digits.png.

    Each loss curve may differ from torch's by no more than a small multiple of what torch's own differs from float64,
    plus one rounding a step. Returns a dictionary for each backend: times, accuracies, differences, ``passed``.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        return []
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 8 - 1, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32, device=device) for part in parts[:2])
    train_y, test_y = (torch.tensor(part, dtype=torch.int64, device=device) for part in parts[2:])

    torch.manual_seed(0)
    start = network(TorchLinearReLU, nn.Linear).state_dict()
    runs = {
        TORCH: _Run(TorchLinearReLU, nn.Linear, start, device),
        EXACT: _Run(TorchLinearReLU, nn.Linear, start, device),
    }
    runs[EXACT].model.double()
    for backend in (*dispatch.AUTO_ORDER[device.type], "auto"):
        candidate = _Run(fastdl.nn.LinearReLU, fastdl.nn.Linear, start, device, backend)
        with contextlib.suppress(fastdl.UnsupportedError), fastdl.use_backend(backend), fastdl.trace() as calls:
            candidate.model(train_x[:BATCH]).sum().backward()
            candidate.model.zero_grad(set_to_none=True)
            candidate.ran = "+".join(dict.fromkeys(call.backend for call in calls))
            runs[backend] = candidate

    generator = torch.Generator().manual_seed(0)
    for epoch in range(EPOCHS):
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
                "model": "digits: 64-256-128-10, float32",
                "backend": name,
                "ran": contender.ran,
                "steps": len(losses[name]),
                "seconds": contender.seconds,
                "torch seconds": runs[TORCH].seconds,
                "accuracy": test_accuracy,
                "torch accuracy": torch_accuracy,
                "accuracy bound": ACCURACY,
                "loss difference": difference,
                "loss difference bound": bound,
                "final loss": float(losses[name][-1]),
                "passed": difference <= bound and min(test_accuracy, torch_accuracy) >= ACCURACY,
            }
        )
    _draw(losses, bound, out / "digits.png")
    return found


class _Run:
    """One model in training."""

    def __init__(
        self,
        hidden: type[nn.Linear],
        last: type[nn.Linear],
        start: dict[str, Tensor],
        device: torch.device,
        backend: str = "auto",
    ) -> None:
        self.model = network(hidden, last)
        self.model.load_state_dict(start)
        self.model.to(device)
        self.backend = backend
        self.seconds = 0.0
        self.ran = ""
        self.optimizer: torch.optim.Optimizer | None = None
        self._losses: list[Tensor] = []

    def epoch(self, images: Tensor, labels: Tensor, order: Tensor) -> None:
        """Every image once, in a given order."""
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        images = images.to(next(self.model.parameters()).dtype)
        _synchronize(images)
        began = time.perf_counter()
        with fastdl.use_backend(self.backend):
            for batch in order.split(BATCH):
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
        with fastdl.use_backend(self.backend):
            return float((self.model(images).argmax(1) == labels).double().mean())


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _draw(losses: dict[str, Tensor], bound: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, values in losses.items():
        if name != EXACT:
            ours = name != TORCH
            curves.plot(
                values, label=f"fastdl, {name}" if ours else name, lw=1 if ours else 3, alpha=1 if ours else 0.4
            )
        if name != TORCH:
            label = f"fastdl, {name}, to torch" if name != EXACT else "float64 to torch: rounding"
            differences.plot((values - losses[TORCH]).abs().clamp_min(1e-12), label=label, lw=1)
    differences.axhline(bound, color="black", ls="--", lw=1, label="bound")
    curves.set(title="handwritten digits, trained from the same weights", ylabel="loss", yscale="log")
    differences.set(xlabel="step", ylabel="difference of loss", yscale="log")
    for axes in (curves, differences):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
