"""The command line: python -m fastdl info | check | bench | tune | report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastdl", description="Hand-written kernels for PyTorch layers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, what was compiled, what is missing and how to get it")
    _without_gpu()
    try:
        from fastdl.bench import runner
    except ModuleNotFoundError as error:
        if error.name != "fastdl.bench":  # missing where the source folder shadows the package: info says so
            raise
    else:
        runner.add_commands(commands)
    options = parser.parse_args(arguments)
    if options.command == "info":
        from fastdl.information import info

        print(info())
        return 0
    return int(options.run(options))


def _without_gpu() -> None:
    """Where there is no GPU, Triton kernels are checked in the interpreter, which wants to know before its import."""
    import torch

    from fastdl.testing import interpret_triton

    if not torch.cuda.is_available():
        interpret_triton()


if __name__ == "__main__":
    sys.exit(main())
