"""Whole models on real data: the benchmark's last word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def run(device: torch.device, out: Path) -> list[dict[str, Any]]:
    """Trains every model beside torch; see :func:`fastdl.bench.models.training.run`."""
    from . import digits, language, training, transformer

    tasks = [*digits.tasks(device), *language.tasks(device), *transformer.tasks(device)]
    return [row for task in tasks for row in training.run(task, device, out)] + transformer.minilm(device)
