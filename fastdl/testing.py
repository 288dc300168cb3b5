"""What tests and checks of Triton kernels need on a machine without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys


def interpret_triton() -> None:
    """Lets Triton kernels run on CPU tensors, in the interpreter; call it before Triton is imported.

    The interpreter computes with NumPy, which has no bfloat16: ``tl.dot`` would multiply bit patterns. So operands are
    widened to float32, which is exact, before the interpreter's dot.
    """
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("interpret_triton must be called before Triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        fix_interpreter()


@functools.cache
def fix_interpreter() -> None:
    """Makes the interpreter's ``tl.dot`` right for bfloat16."""
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.view(numpy.uint16).astype(numpy.uint32) << 16
        return TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_wide_dot(self, a, b, *arguments):  # type: ignore[no-untyped-def]
        return create_dot(self, widen(a), widen(b), *arguments)

    InterpreterBuilder.create_dot = create_wide_dot
