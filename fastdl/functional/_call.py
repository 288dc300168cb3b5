"""What all functions share: the choice of a call's backend, and numbers for each dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.dispatch import Op, Selection, UnsupportedError, is_plain, state


def unary(
    op: Op,
    function: Callable[..., Any] | None,
    requested: str,
    input: Tensor,
    *arguments: Any,
    reference: Callable[..., Any] | None = None,
) -> Any:
    """A function of one tensor that may need a gradient: op(input, *arguments), by ``function`` where it does.

    ``reference``: where torch itself does it otherwise than the op.
    """
    compiling = torch.compiler.is_compiling()
    if not is_plain(compiling, input):
        return call_reference(op, requested, input, *arguments, reference=reference)
    training = function is not None and torch.is_grad_enabled() and input.requires_grad
    selection = select(op, requested, training, compiling, input, *arguments)
    if selection is not None and selection.backend == "torch":
        return (reference or op.reference)(input, *arguments)
    if not training or function is None:
        return op(requested, input, *arguments, selection=selection)
    return function(input, *arguments, requested, selection)


def call_reference(op: Op, requested: str, *arguments: Any, reference: Callable[..., Any] | None = None) -> Any:
    """Calls the reference for what is no kernel's business: see :func:`fastdl.dispatch.is_plain`."""
    select_reference(op, requested, *arguments)
    return (reference or op.reference)(*arguments)


def select_reference(op: Op, requested: str, *arguments: Any) -> Selection:
    """The reference's selection, unless a kernel was named."""
    if requested not in ("auto", "torch"):
        if op.check is not None:
            op.check(*arguments)
        raise UnsupportedError(
            f"fastdl.{op.name}: backend {requested!r} takes plain tensors outside torch.func, allowed: auto, torch"
        )
    if state.traces and not torch.compiler.is_compiling():
        reason = "named by use_backend" if requested == "torch" else "tensor subclass, torch.func or a function mode"
        op.record(Selection("torch", reason, op.reference), arguments)
    return TORCH


def select(op: Op, requested: str, training: bool, compiling: bool, *arguments: Any) -> Selection | None:
    """The backend of a call, after the check of its arguments; None while compiling: the op will choose at run time."""
    if compiling:
        if op.check is not None:
            op.check(*arguments)
        return TORCH if requested == "torch" else None
    selection = op.select(requested, arguments, training)
    if selection.backend == "torch" and state.traces:
        op.record(selection, arguments)
    return selection


TORCH = Selection("torch", "named by use_backend", lambda *_: None)


def autocast(*tensors: Tensor | None) -> Any:
    """The tensors in autocast's dtype, as torch casts them for a linear layer: float64 and integers stay."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)  # type: ignore[union-attr]
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def numbers(
    name: str, argument: str, value: Any, dimensions: int = 2, *, alone: int = 1, empty: Sequence[int] = ()
) -> Sequence[int]:
    """A number, or one for each dimension, as those of height and width.

    ``alone``: of the height, where there is one dimension; ``empty``: what an empty sequence says, where it may.
    """
    if type(value) is int:
        return (alone, value) if dimensions == 1 else (value, value)
    given = value if isinstance(value, Sequence) else (value,)
    if not all(isinstance(number, int | torch.SymInt) for number in given):
        raise TypeError(f"{name}: {argument} is {value!r}, allowed: an integer or {dimensions} of them")
    if not given and empty:
        return empty
    if len(given) not in (1, dimensions):
        raise RuntimeError(f"{name}: {argument} is {value!r}, allowed: an integer or {dimensions} of them")
    return (alone, given[0]) if dimensions == 1 else (given[0], given[-1])
