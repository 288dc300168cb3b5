"""What tests and checks of Triton kernels need on a machine without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys


def interpret_triton() -> None:
    """Lets Triton kernels run on CPU tensors, in the interpreter; call it before Triton is imported.

    The interpreter computes with NumPy, which has no bfloat16: ``tl.dot`` would multiply bit patterns and a cast would
    truncate. So operands are widened to float32, which is exact, and casts round to nearest even as on a GPU. It is
    also made faster.
    """
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("interpret_triton must be called before Triton is imported")
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        fix_interpreter()


@functools.cache
def fix_interpreter() -> None:
    """Makes the interpreter's ``tl.dot`` and its rounding right for bfloat16, and its calls of functions fast."""
    import numpy
    import torch
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    call = InterpretedFunction.__call__

    def widen(handle):  # type: ignore[no-untyped-def]
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_wide_dot(self, a, b, d, *options):  # type: ignore[no-untyped-def]
        return create_dot(self, widen(a), widen(b), d, *options)

    def cast_to_nearest(self, source, dtype):  # type: ignore[no-untyped-def]
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        wide = torch.from_numpy(numpy.ascontiguousarray(source.data))
        return TensorHandle(wide.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def call_fast(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        # Triton's own puts the interpreter in the place of the language's functions anew, which takes longer than most
        # functions that kernels call; a kernel's launch has done so, for what is called by this name.
        if self.fn.__globals__.get("tl") is not tl:
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_wide_dot, cast_to_nearest
    InterpretedFunction.__call__ = call_fast
