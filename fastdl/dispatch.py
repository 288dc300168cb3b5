"""Backends: what each op has, which one a call gets, and why."""

from __future__ import annotations

import functools
import importlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "cuda", "cpu", "torch")
# The order in which auto tries backends for tensors of a device. Interpreter and emulator are never its choice.
AUTO_ORDER = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}


class UnsupportedError(NotImplementedError):
    """A named backend cannot do what was asked; the message says what is missing."""


@dataclass(frozen=True)
class Support:
    """What a backend's implementation of an op takes: the one statement that dispatch, errors and documents read.

    Attributes:
        dtypes: of the tensors.
        limit: a further limit: called with the op's arguments, returns the reason or None.
        note: the limit in words, for the support table.
    """

    dtypes: tuple[torch.dtype, ...]
    limit: Callable[..., str | None] | None = None
    note: str = ""


class Call(NamedTuple):
    """One call of an op, as :func:`trace` records it."""

    op: str
    backend: str
    reason: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    shape_class: tuple[str, tuple[int, ...]] | None  # by which speed records are compared
    code_path: str  # the machine code that ran; empty for torch's
    layer: str | None = None

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        where = f"{self.layer}: " if self.layer else ""
        return f"{where}{self.op} [{shapes} {str(self.dtype).removeprefix('torch.')}] -> {self.backend}: {self.reason}"


@dataclass
class Selection:
    """The backend that a call gets, and why; ``unproven`` asks for a comparison with the reference."""

    backend: str
    reason: str
    implementation: Callable[..., Any]
    unproven: bool = False
    lasting: bool = True  # whether it may be cached


@dataclass
class _State:
    requested: str = "auto"
    traces: list[list[Call]] = field(default_factory=list)
    layer: str | None = None  # the module that is running, while explain() watches
    emulator: Any = None  # the module that stands in for _C.cuda on CPU tensors, in tests


state = _State()
OPS: dict[str, Op] = {}


class Op:
    """An op: its schema for torch, its shapes, its reference and its implementations by backend.

    Args:
        schema: as for ``torch.library.Library.define``; the last argument is ``str backend``.
        fake: output shapes for tracing, with the schema's arguments.
        reference: the same function by torch's operators (the ``torch`` backend); takes all arguments but ``backend``.
        tensors: how many of the leading arguments are tensors.
        multiple: how many times torch's own error a kernel may have (see :mod:`fastdl.accuracy`).
        shape_class: the label and the sizes that speed records are compared by, from the arguments; None for a
            backward, which follows its forward's decision.
        check: raises, naming the argument, if the arguments are wrong.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        tensors: int,
        multiple: float,
        shape_class: Callable[..., tuple[str, tuple[int, ...]]] | None = None,
        check: Callable[..., None] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.tensors = tensors
        self.multiple = multiple
        self.shape_class = shape_class
        self.check = check
        self.variant: Callable[..., str] | None = None  # what of the code path depends on the arguments
        self.support: dict[str, Support] = {}
        self.implementations: dict[str, Callable[..., Any]] = {"torch": reference}
        self._selections: dict[Any, Selection] = {}
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        _LIBRARY.impl(self.name, self._call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastdl::{self.name}", fake, lib=_LIBRARY)
        self._overload = getattr(torch.ops.fastdl, self.name).default
        OPS[self.name] = self

    def implement(self, backend: str, support: Support) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: adds a backend's implementation with its statement of support."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self.support[backend] = support
            self.implementations[backend] = function
            return function

        return add

    def __call__(self, requested: str, *arguments: Any, selection: Selection | None = None) -> Any:
        """Runs the op on the requested backend, or on one that :meth:`select` gave for these arguments."""
        # The dispatcher costs microseconds and is needed only where somebody watches it.
        if (selection is None and torch.compiler.is_compiling()) or _watched():
            return self._overload(*arguments, requested)
        return self._run(selection or self.select(requested, arguments), arguments)

    def _call(self, *args: Any) -> Any:
        *arguments, requested = args
        return self._run(self.select(requested, arguments), arguments)

    def _run(self, selection: Selection, arguments: Sequence[Any]) -> Any:
        if state.traces:
            self.record(selection, arguments)
        if selection.unproven:
            from fastdl import proof

            return proof.first_call(self, selection, arguments)
        return selection.implementation(*arguments)

    def select(self, requested: str, arguments: Sequence[Any], training: bool = False) -> Selection:
        """The backend for a call; raises UnsupportedError if the named one can't do it."""
        key = (requested, training, *[_key(argument) for argument in arguments])
        return self._selections.get(key) or self._select(key, requested, arguments, training)

    def select_by(
        self, key: tuple[Any, ...], requested: str, arguments: Callable[[], Sequence[Any]], training: bool
    ) -> Selection:
        """As :meth:`select`, for a caller that has a short key of its own and makes the arguments only if need be."""
        key = (requested, training, key)
        return self._selections.get(key) or self._select(key, requested, arguments(), training)

    def _select(self, key: tuple[Any, ...], requested: str, arguments: Sequence[Any], training: bool) -> Selection:
        if self.check is not None:  # a call like one that has passed need not be checked again
            self.check(*arguments)
        selection = self._choose(requested, arguments, training)
        if len(self._selections) >= 4096:  # sizes that vary without end
            self._selections.clear()
        if selection.lasting:
            self._selections[key] = selection
        return selection

    def code_path(self, backend: str, arguments: Sequence[Any]) -> str:
        """The machine code that a call runs on a backend; empty for torch's, the interpreter's and the emulator's."""
        from fastdl import proof

        first = first_tensor(arguments)
        if backend == "torch" or (backend != "cpu" and not first.is_cuda):
            return ""
        path = proof.code_path(backend, first.device)
        return path if self.variant is None else path + self.variant(backend, *arguments)

    def record(self, selection: Selection, arguments: Sequence[Any]) -> None:
        """Adds a call to every open trace."""
        tensors = [a for a in arguments[: self.tensors] if a is not None]
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        shape_class = None if self.shape_class is None else self.shape_class(*arguments)
        call = Call(
            op=self.name,
            backend=selection.backend,
            reason=selection.reason,
            shapes=shapes,
            dtype=tensors[0].dtype,
            shape_class=shape_class,
            code_path=self.code_path(selection.backend, arguments),
            layer=state.layer,
        )
        for calls in state.traces:
            calls.append(call)

    def _choose(self, requested: str, arguments: Sequence[Any], training: bool) -> Selection:
        if requested == "torch":
            return Selection("torch", "named by use_backend", self.reference)
        if requested != "auto":
            reason = self.why_not(requested, arguments)
            if reason is not None:
                raise UnsupportedError(f"fastdl.{self.name}: backend {requested!r} cannot do this call: {reason}")
            return Selection(requested, "named by use_backend", self.implementations[requested])
        from fastdl import proof

        reasons, lasting = [], True
        for backend in AUTO_ORDER.get(first_tensor(arguments).device.type, ()):
            reason = self.why_not(backend, arguments)
            if reason is None:
                verdict = proof.verdict(self, backend, arguments, training)
                if verdict.usable:
                    implementation = self.implementations[backend]
                    return Selection(backend, verdict.reason, implementation, verdict.unknown, verdict.lasting)
                reason = verdict.reason
                lasting &= verdict.lasting
            reasons.append(f"{backend}: {reason}")
        reason = "; ".join(reasons) or "fastdl has no kernels for this device"
        return Selection("torch", reason, self.reference, lasting=lasting)

    def why_not(self, backend: str, arguments: Sequence[Any]) -> str | None:
        """Why a backend can't do a call, or None if it can."""
        support = self.support.get(backend)
        if support is None:
            return f"it has no {self.name}; backends that have: {', '.join([*self.support, 'torch'])}"
        first = first_tensor(arguments)
        missing = why_unavailable(backend, first.device.type)
        if missing is not None:
            return missing
        if first.dtype not in support.dtypes:
            allowed = ", ".join(_dtype_name(d) for d in support.dtypes)
            return f"dtype is {_dtype_name(first.dtype)}, allowed: {allowed}"
        return support.limit(*arguments) if support.limit is not None else None

    def forget(self) -> None:
        """Drops the cached selections: what they were based on has changed."""
        self._selections.clear()


def forget_selections() -> None:
    """Drops every op's cached selections."""
    for op in OPS.values():
        op.forget()


_LIBRARY = torch.library.Library("fastdl", "DEF")


def first_tensor(arguments: Sequence[Any]) -> Tensor:
    """The tensor that tells a call's device and dtype: the first that is given."""
    return next(argument for argument in arguments if isinstance(argument, Tensor))


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        # Kernels for images differ in speed between memory formats.
        strides = argument.stride() if argument.dim() == 4 else None
        return argument.shape, argument.dtype, argument.device, strides
    return tuple(argument) if isinstance(argument, list) else argument


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _watched() -> bool:
    """Whether a mode, a profiler or a tracer has to see the op itself."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain(compiling: bool, *tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors outside torch.func; all else takes the reference, in this one place.

    Tensor subclasses (DTensor, ...), sparse layouts, vmap, grad and jvp of torch.func, forward-mode duals: torch's own
    formulas know all of them, a kernel knows none.
    """
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.layout is not torch.strided):
            return False
    return compiling or not (
        in_transform() or (torch._C._is_torch_function_mode_enabled() and _foreign_function_mode())
    )


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _foreign_function_mode() -> bool:
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


# ------------------------------------------------------------------------------------------------- availability


def native() -> Any:
    """The compiled extension fastdl._C, or None; :func:`native_error` says why."""
    return _native()[0]


def native_error() -> str | None:
    """Why the compiled extension is not there."""
    return _native()[1]


@functools.cache
def _native() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("fastdl._C"), None
    except ModuleNotFoundError:
        root = pathlib.Path(__file__).parent.parent
        if (root / "setup.py").exists():
            return None, f"{root} is fastdl's source folder: leave it, or install it by: pip install -e {root}"
        return None, "fastdl was installed without compiled kernels: reinstall it where a C++ compiler is on the PATH"
    except ImportError as error:
        return None, f"fastdl._C does not load ({error}): reinstall fastdl"


def cuda_kernels() -> Any:
    """The CUDA kernels: compiled for the GPU, or the emulator's in tests."""
    return state.emulator if state.emulator is not None else getattr(native(), "cuda", None)


@functools.cache
def triton_error() -> str | None:
    """Why Triton can't be used, or None."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken Triton fails in many ways
        return f"Triton is not installed or does not import ({error}); install it by: pip install triton"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    if triton_error() is not None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Why a backend has no kernels at all for tensors of a device type, or None if it has."""
    if backend == "torch":
        return None
    if backend == "triton":
        if (error := triton_error()) is not None:
            return error
        if device_type == "cpu" and not interpreting():
            return (
                "input is on the CPU, allowed: cuda (on CPU tensors only in Triton's interpreter: TRITON_INTERPRET=1)"
            )
        if device_type not in ("cuda", "cpu"):
            return f"input is on device {device_type!r}, allowed: cuda"
        return None
    if backend == "cuda":
        if device_type == "cpu" and state.emulator is not None:
            return None
        if device_type != "cuda":
            return f"input is on device {device_type!r}, allowed: cuda"
        if cuda_kernels() is None:
            missing = "fastdl was built without CUDA: reinstall it with nvcc on the PATH and FASTDL_CUDA=1"
            return native_error() or missing
        return None
    if device_type != "cpu":
        return f"input is on device {device_type!r}, allowed: cpu"
    if getattr(native(), "cpu", None) is None:
        return native_error() or "fastdl was built without a C++ compiler; install g++ and reinstall"
    return None


# ------------------------------------------------------------------------------------------------------ use, trace


class use_backend:  # noqa: N801  a function to its users: setter and context manager in one
    """Chooses the backend for calls from now on; as a context manager, until the end of the block.

    Naming a backend is strict: a call that it can't do raises :class:`UnsupportedError` with the reason.
    ``"auto"``, the default, takes the best proven kernel and falls back to torch. The choice holds for the whole
    process; the backward of a call uses what its forward was told.

    Args:
        backend: ``"triton"``, ``"cuda"``, ``"cpu"``, ``"torch"`` or ``"auto"``.

    Raises:
        ValueError: if the name is none of these.
    """

    def __init__(self, backend: str) -> None:
        if backend not in (*BACKENDS, "auto"):
            raise ValueError(f"backend must be one of {', '.join((*BACKENDS, 'auto'))}; got {backend!r}")
        self._previous = state.requested
        state.requested = backend

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        state.requested = self._previous


@contextmanager
def trace() -> Iterator[list[Call]]:
    """Records the calls made inside the block, as they happen: op, backend, reason, shapes and dtype of each."""
    calls: list[Call] = []
    state.traces.append(calls)
    try:
        yield calls
    finally:
        # By identity: two traces that have seen the same calls are equal lists.
        state.traces[:] = [open_trace for open_trace in state.traces if open_trace is not calls]
