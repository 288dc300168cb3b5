"""The benchmark's small cases under pytest-benchmark: ``pytest bench`` (correctness is asserted before timing)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdl

from . import cases
from .correctness import Gate, draw, step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = [
    case
    for family in cases.families()
    for case in cases.timed(family, DEVICE.type)
    if case.quick and case.flops <= 5e8 and case.bytes <= 2**25
]
CONTENDERS = ("torch eager", "auto", *fastdl.dispatch.AUTO_ORDER[DEVICE.type])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_case(benchmark: Any, case: cases.Case, contender: str) -> None:
    """One case on one contender."""
    benchmark.group = str(case)
    sample = draw(case, DEVICE)
    call = case.eager if contender == "torch eager" else case.call
    run = step(case, call)

    def timed() -> None:
        run(sample)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with fastdl.use_backend("auto" if contender == "torch eager" else contender):
        try:
            errors = Gate(case, sample).judge(call)
        except fastdl.UnsupportedError as error:
            pytest.skip(str(error))
        assert all(error.passed for error in errors), errors
        benchmark(timed)
