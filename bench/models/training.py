"""Trains a model with this package's layers beside the same model with torch's, and compares the curves."""

from __future__ import annotations

import abc
import contextlib
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdl
from fastdl import accuracy, dispatch

TORCH, EXACT = "torch", "torch float64"


class Task(abc.ABC):
    """A model of plain torch.nn modules, its data, and how it is trained.

    Attributes:
        title: for people.
        file: name of the plot, without its suffix.
        epochs: how often all batches are seen.
        accuracy: the share that it must get right of what it was not trained on.
        clip: the largest norm of all gradients together, or None.
    """

    title: str
    file: str
    epochs: int
    accuracy: float
    clip: float | None = None

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """A new model, in float32 on the CPU."""

    @abc.abstractmethod
    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """A new optimizer."""

    @abc.abstractmethod
    def batches(self, epoch: int) -> Sequence[Any]:
        """What is seen in an epoch, in this order: the same at each call."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, batch: Any, state: Any) -> tuple[Tensor, Any]:
        """The loss of a batch, and what the next one is given as ``state``; an epoch begins with None."""

    @abc.abstractmethod
    def score(self, model: nn.Module) -> float:
        """The share that a model in eval mode gets right."""

    def replace(self, model: nn.Module) -> nn.Module:
        """Puts this package's layers into a model."""
        return fastdl.replace_layers(model)

    def show(self, model: nn.Module) -> str:
        """Something that a trained model made, for people."""
        return ""


def run(task: Task, device: torch.device, out: Path) -> list[dict[str, Any]]:
    """Trains on torch, on each backend of this device and on auto, all from one state_dict; draws a PNG.

    Each loss curve may differ from torch's by no more than a small multiple of what torch's own differs from float64,
    plus one rounding a step. Returns a dictionary for each backend: times, accuracies, differences, ``passed``.
    """
    torch.manual_seed(0)
    start = task.model()
    runs = {TORCH: _Contender(task, start, device), EXACT: _Contender(task, start.double(), device)}
    start.float()
    for backend in (*dispatch.AUTO_ORDER[device.type], "auto"):
        candidate = _Contender(task, start, device, backend)
        with contextlib.suppress(fastdl.UnsupportedError), fastdl.use_backend(backend), fastdl.trace() as calls:
            task.loss(copy.deepcopy(candidate.model), task.batches(0)[0], None)[0].backward()
            candidate.ran = "+".join(dict.fromkeys(call.backend for call in calls))
            runs[backend] = candidate

    for epoch in range(task.epochs):
        first = epoch % len(runs)  # who goes first changes, so that a disturbance meets all alike
        for contender in [*runs.values()][first:] + [*runs.values()][:first]:
            contender.epoch(epoch)

    losses = {name: contender.losses() for name, contender in runs.items()}
    rounding = float((losses[TORCH] - losses[EXACT]).abs().max())
    one_a_step = len(losses[TORCH]) * torch.finfo(torch.float32).eps * float(losses[TORCH].max())
    bound = accuracy.MULTIPLE_LONG_REDUCTION * rounding + one_a_step
    torch_accuracy = runs[TORCH].score()
    found = []
    for name, contender in runs.items():
        if name in (TORCH, EXACT):
            continue
        difference = float((losses[name] - losses[TORCH]).abs().max())
        score = contender.score()
        found.append(
            {
                "model": f"{task.title}, float32",
                "backend": name,
                "ran": contender.ran,
                "steps": len(losses[name]),
                "seconds": contender.seconds,
                "torch seconds": runs[TORCH].seconds,
                "accuracy": score,
                "torch accuracy": torch_accuracy,
                "accuracy bound": task.accuracy,
                "loss difference": difference,
                "loss difference bound": bound,
                "final loss": float(losses[name][-1]),
                "shown": contender.show(),
                "passed": difference <= bound and min(score, torch_accuracy) >= task.accuracy,
            }
        )
    _draw(task.title, losses, bound, out / f"{task.file}.png")
    return found


class _Contender:
    """One model in training; with this package's layers if it is given a backend."""

    def __init__(self, task: Task, start: nn.Module, device: torch.device, backend: str | None = None) -> None:
        self.task = task
        self.model = copy.deepcopy(start).to(device)
        if backend is not None:
            self.model = task.replace(self.model)
        self.backend = backend or "torch"
        self.seconds = 0.0
        self.ran = ""
        self.optimizer = task.optimizer(self.model.parameters())
        self._losses: list[Tensor] = []

    def epoch(self, epoch: int) -> None:
        """All batches once."""
        batches, state = self.task.batches(epoch), None
        self._synchronize()
        began = time.perf_counter()
        with fastdl.use_backend(self.backend):
            for batch in batches:
                loss, state = self.task.loss(self.model, batch, state)
                self.optimizer.zero_grad()
                loss.backward()
                if self.task.clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip)
                self.optimizer.step()
                self._losses.append(loss.detach())
        self._synchronize()
        self.seconds += time.perf_counter() - began

    def losses(self) -> Tensor:
        """The loss of every step, in float64."""
        return torch.stack(self._losses).double().cpu()

    @torch.no_grad()
    def score(self) -> float:
        """The share that the model gets right."""
        with fastdl.use_backend(self.backend):
            return self.task.score(self.model.eval())

    @torch.no_grad()
    def show(self) -> str:
        """What the model made."""
        with fastdl.use_backend(self.backend):
            return self.task.show(self.model.eval())

    def _synchronize(self) -> None:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _draw(title: str, losses: dict[str, Tensor], bound: float, path: Path) -> None:
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
    curves.set(title=f"{title}: trained from the same weights", ylabel="loss", yscale="log")
    differences.set(xlabel="step", ylabel="difference of loss", yscale="log")
    for axes in (curves, differences):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
