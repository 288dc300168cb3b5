"""Fused linear layer, activation(input @ weight.T + bias): ops, gradients and implementations by backend."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import accuracy, activations, proof
from fastdl.dispatch import Op, Support
from fastdl.ops import _native
from fastdl.ops.activation import ACTIVATION_BACKWARD


def reference(input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float) -> Tensor:
    """activation(input @ weight.T + bias) by torch's operators."""
    return activations.reference(F.linear(input, weight, bias), kind, parameter)


def _reference_with_preactivation(
    input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float
) -> tuple[Tensor, Tensor]:
    z = F.linear(input, weight, bias)
    return activations.reference(z, kind, parameter) if kind else z.clone(), z


def reference_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    kind: int,
    parameter: float,
    bias: bool,
    grad_preactivation: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of input (if ``weight`` is given), weight (if ``input`` is) and bias (if ``bias``), in this order.

    By torch's operators, so that double backward follows by autograd.

    Args:
        grad_output, saved: (*, N); input: (*, K); weight: (N, K).
        grad_preactivation: (*, N), added to the pre-activation's gradient.
    """
    dz = activations.reference_gradient(grad_output, saved, kind, parameter)
    if grad_preactivation is not None:
        dz = dz + grad_preactivation
    dz_rows = _rows(dz)
    gradients = []
    if weight is not None:
        gradients.append(dz @ weight)
    if input is not None:
        gradients.append(dz_rows.t() @ _rows(input))
    if bias:
        gradients.append(dz_rows.sum(0))
    return gradients


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float) -> None:
    named = [("input", input), ("weight", weight)] + ([("bias", bias)] if bias is not None else [])
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"linear: {name} must be a tensor; got {type(tensor).__name__}")
    for name, tensor in named[1:]:
        if tensor.dtype != input.dtype:
            raise RuntimeError(f"linear: {name} has dtype {tensor.dtype}, allowed: {input.dtype}, the dtype of input")
        if tensor.device != input.device:
            raise RuntimeError(f"linear: {name} is on {tensor.device}, allowed: {input.device}, the device of input")
    if weight.dim() not in (1, 2):
        raise RuntimeError(f"linear: weight has shape {tuple(weight.shape)}, allowed: (out_features, in_features)")
    in_features = weight.shape[-1]
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise RuntimeError(
            f"linear: input has shape {tuple(input.shape)}, allowed: (*, {in_features}), since weight has shape "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.dim() == 1 and weight.dim() == 2 and bias.shape[0] not in (1, weight.shape[0]):
        raise RuntimeError(f"linear: bias has shape {tuple(bias.shape)}, allowed: ({weight.shape[0]},)")
    if not activations.accepts(input.dtype, kind):
        raise RuntimeError(f"linear: input has dtype {input.dtype}, allowed with an activation: floating-point dtypes")


def _limit(input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float) -> str | None:
    if weight.dim() != 2:
        return f"weight has shape {tuple(weight.shape)}, allowed: (out_features, in_features)"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias has shape {tuple(bias.shape)}, allowed: ({weight.shape[0]},)"
    return activations.limit(kind, parameter)


def _limit_with_preactivation(input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float) -> Any:
    return _limit(input, weight, bias, kind, parameter) or (None if kind else "kind is none, allowed: an activation")


def _shape_class(input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, *_: Any) -> Any:
    return "fused" if kind else "plain", (math.prod(input.shape[:-1]), input.shape[-1], weight.shape[0])


def _fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _fake_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    saved: Any,
    kind: int,
    p: float,
    bias: bool,
    _: str,
) -> list[Tensor]:
    gradients = []
    if weight is not None:
        gradients.append(grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1])))
    if input is not None:
        gradients.append(grad_output.new_empty((grad_output.shape[-1], input.shape[-1])))
    if bias:
        gradients.append(grad_output.new_empty((grad_output.shape[-1],)))
    return gradients


_ARGUMENTS = "Tensor input, Tensor weight, Tensor? bias, int kind, float parameter, str backend"
LINEAR = Op(
    f"linear({_ARGUMENTS}) -> Tensor",
    fake=_fake,
    reference=reference,
    tensors=3,
    multiple=accuracy.MULTIPLE,
    shape_class=_shape_class,
    check=_check,
)
LINEAR_WITH_PREACTIVATION = Op(
    f"linear_with_preactivation({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=lambda *args: (_fake(*args), _fake(*args)),
    reference=_reference_with_preactivation,
    tensors=3,
    multiple=accuracy.MULTIPLE,
    shape_class=_shape_class,
    check=_check,
)
LINEAR_BACKWARD = Op(
    "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, Tensor? saved, int kind, float parameter, "
    "bool bias, str backend) -> Tensor[]",
    fake=_fake_backward,
    reference=reference_backward,
    tensors=4,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


def _rows(tensor: Tensor) -> Tensor:
    """(*, K) as (rows, K), a view where the strides allow one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _add(backend: str, forward: Any, backward: Any) -> None:
    """Adds a backend that has the forward and the backward of matrices that are not empty."""

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float, preactivation: bool
    ) -> tuple[Tensor, Any]:
        shape = (*input.shape[:-1], weight.shape[0])
        if 0 in shape:
            return input.new_empty(shape), input.new_empty(shape)
        bias = None if bias is None else bias.contiguous()
        y, z = forward(_rows(input), weight, bias, kind, parameter, preactivation)
        return y.view(shape), None if z is None else z.view(shape)

    @LINEAR.implement(backend, Support(_native.FLOATING, _limit))
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float) -> Tensor:
        return run(input, weight, bias, kind, parameter, False)[0]

    @LINEAR_WITH_PREACTIVATION.implement(backend, Support(_native.FLOATING, _limit_with_preactivation))
    def linear_with_preactivation(
        input: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float
    ) -> tuple[Tensor, Tensor]:
        return run(input, weight, bias, kind, parameter, True)

    @LINEAR_BACKWARD.implement(backend, Support(_native.FLOATING))
    def linear_backward(
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        saved: Tensor | None,
        kind: int,
        parameter: float,
        bias: bool,
    ) -> list[Tensor]:
        if grad_output.numel() == 0:
            return reference_backward(grad_output, input, weight, saved, kind, parameter, bias)
        x = None if input is None else _rows(input)
        rows = None if saved is None else _rows(saved)
        gradients: list[Tensor] = backward(_rows(grad_output), x, weight, rows, kind, parameter, bias)
        if weight is not None:
            gradients[0] = gradients[0].view(*grad_output.shape[:-1], weight.shape[1])
        return gradients


# ---------------------------------------------------------------------------------------------------------------- cpu


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x @ w.T + bias by the library, where that is at the machine's limit; x (M, K), w (N, K), any strides."""
    if _onednn_is_better(x.shape[0], w.shape[0], x.shape[1], x.dtype):
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
        return output
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())


def _onednn_is_better(m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether to call oneDNN itself: for float32 addmm takes MKL, which on some processors runs at half rate."""
    # A call costs 10 us more than addmm's, and a vector is bound by memory in both.
    large = m > 1 and m * n * k >= 1 << 20
    return large and dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _packed_is_better(m: int, n: int, k: int, dtype: torch.dtype, fused: bool) -> bool:
    """Whether the package's own packed GEMM beats the library, for (M, K) x (K, N)."""
    if dtype == torch.float64:
        return True
    # A vector times a matrix is bound by reading the matrix: packing it first reads it twice.
    if m == 1:
        return False
    # The same for a few rows, and for a short sum: packing costs as much as multiplying, unless a fused epilogue pays.
    few = 64 if dtype == torch.bfloat16 else 32
    return fused or dtype == torch.float16 or min(m, k) > few or m * n * k <= 1 << 21


def operand(matrix: Tensor) -> tuple[Tensor, int, int]:
    """A matrix with stride 1 along one axis, as the packed GEMM wants it: itself or a copy, and its two strides."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    # The stride of an axis of length 1 may be anything.
    column_stride = column_stride if columns > 1 else 1
    row_stride = row_stride if rows > 1 else columns if column_stride == 1 else 1
    if row_stride and column_stride and 1 in (row_stride, column_stride):
        return matrix, row_stride, column_stride
    return matrix.contiguous(), max(columns, 1), 1


def packed(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    kind: int = 0,
    parameter: float = 0.0,
    preactivation: Tensor | None = None,
) -> Tensor:
    """activation(x @ w.T + bias), (M, N), by the packed GEMM; ``preactivation`` (M, N) receives its argument."""
    (m, k), n = x.shape, w.shape[0]
    x, x_row_stride, x_column_stride = operand(x)
    w, w_row_stride, w_column_stride = operand(w)
    output = _native.empty((m, n), x)
    _native.kernels("cpu").linear(
        _native.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        x_row_stride,
        x_column_stride,
        w.data_ptr(),
        w_row_stride,
        w_column_stride,
        _native.address(bias),
        output.data_ptr(),
        _native.address(preactivation),
        m,
        n,
        k,
        kind,
        parameter,
        _native.context(x),
    )
    return output


def _cpu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float, preactivation: bool
) -> tuple[Tensor, Tensor | None]:
    (m, k), n = x.shape, weight.shape[0]
    if _packed_is_better(m, n, k, x.dtype, fused=True):
        z = _native.empty((m, n), x) if preactivation else None
        return packed(x, weight, bias, kind, parameter, z), z
    # In 16 bits the product would be rounded before a bias added later: then the library adds it.
    later = None if kind == 0 or x.dtype.itemsize == 2 else bias
    y, z = _product(x, weight, bias if later is None else None), None
    if kind:
        z = y if preactivation else None
        y = torch.empty_like(y) if preactivation else y
        _native.kernels("cpu").bias_activation(
            _native.DTYPE_CODES[x.dtype],
            y.data_ptr() if z is None else z.data_ptr(),
            _native.address(later),
            y.data_ptr(),
            _native.address(z) if later is not None else 0,
            m,
            n,
            kind,
            parameter,
            _native.context(x),
        )
    return y, z


def _cpu_matmul(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T for a gradient; x (M, K), w (N, K), any strides."""
    (m, k), n = x.shape, w.shape[0]
    if m * n and _packed_is_better(m, n, k, x.dtype, fused=False):
        return packed(x, w)
    return _product(x, w, None)


def _cpu_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    kind: int,
    parameter: float,
    bias: bool,
) -> list[Tensor]:
    grad_bias = None
    if saved is not None or bias:
        grad, grad_bias = activation_and_bias_gradient("cpu", grad, saved, kind, parameter, bias)
    gradients = [] if weight is None else [_cpu_matmul(grad, weight.t())]
    if x is not None:
        gradients.append(_cpu_matmul(grad.t(), x.t()))
    return gradients if grad_bias is None else [*gradients, grad_bias]


# ------------------------------------------------------------------------------------------------ native: cpu and cuda


def activation_and_bias_gradient(
    backend: str, grad: Tensor, saved: Tensor | None, kind: int, parameter: float, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """dz = grad * activation'(saved), and the sums of its columns if ``bias``, in one pass; grad, saved (M, N)."""
    kernels = _native.kernels(backend)
    grad = grad.contiguous()
    m, n = grad.shape
    dz = grad if saved is None else _native.empty((m, n), grad)
    grad_bias = grad.new_empty(n) if bias else None
    workspace = _native.workspace(kernels.bias_activation_backward_workspace(m, n) if bias else 0, grad)
    kernels.bias_activation_backward(
        _native.DTYPE_CODES[grad.dtype],
        grad.data_ptr(),
        _native.address(None if saved is None else saved.contiguous()),
        0 if saved is None else dz.data_ptr(),
        _native.address(grad_bias),
        m,
        n,
        kind,
        parameter,
        _native.address(workspace),
        _native.context(grad),
    )
    return dz, grad_bias


_add("cpu", _cpu_forward, _cpu_backward)


# --------------------------------------------------------------------------------------------------------------- cuda

# Above so many elements of the output, the activation's gradient is taken once, not by every tile that reads it.
_FUSED_GRADIENT_ELEMENTS = 1 << 18


def _takes_hopper(x: Tensor, weight: Tensor) -> bool:
    """Whether the forward takes Hopper's path: on that chip, for what TMA can reach, and not where it has failed."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    (m, k), n = x.shape, weight.shape[0]
    supported = _native.kernels("cuda").hopper_supports(
        _native.DTYPE_CODES[x.dtype], x.data_ptr(), *x.stride(), weight.data_ptr(), *weight.stride(), 0, 0, m, n, k
    )
    return bool(supported) and not proof.has_failed(LINEAR, "cuda", x, HOPPER)


HOPPER = "+hopper"


def cuda_variant(backend: str, input: Tensor, weight: Tensor, *_: Any) -> str:
    """The part of the CUDA kernels' code path that depends on the arguments: Hopper's is proven on its own."""
    plain = backend == "cuda" and input.numel() and weight.numel() and weight.dim() == 2
    return HOPPER if plain and _takes_hopper(_rows(input), weight) else ""


LINEAR.variant = LINEAR_WITH_PREACTIVATION.variant = cuda_variant


def cuda_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: int,
    parameter: float,
    preactivation: bool,
    allow_tf32: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """activation(x @ weight.T + bias), (M, N), and its argument; x (M, K), weight (N, K), any strides.

    ``allow_tf32``: None for matmul's switch.
    """
    allow_tf32 = _native.matmul_allows_tf32() if allow_tf32 is None else allow_tf32
    (m, k), n = x.shape, weight.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if preactivation else None
    _native.kernels("cuda").linear(
        _native.DTYPE_CODES[x.dtype],
        x.data_ptr(),
        *x.stride(),
        weight.data_ptr(),
        *weight.stride(),
        _native.address(bias),
        y.data_ptr(),
        _native.address(z),
        m,
        n,
        k,
        kind,
        parameter,
        allow_tf32,
        int(k > 0 and _takes_hopper(x, weight)),
        _native.context(x),
    )
    return y, z


def cuda_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    kind: int,
    parameter: float,
    bias: bool,
    allow_tf32: bool | None = None,
) -> list[Tensor]:
    """The gradients of x (if ``weight`` is given), weight (if ``x`` is) and bias (if ``bias``); all are matrices."""
    allow_tf32 = _native.matmul_allows_tf32() if allow_tf32 is None else allow_tf32
    kernels, dtype, (m, n) = _native.kernels("cuda"), _native.DTYPE_CODES[grad.dtype], grad.shape
    grad_bias = None
    if saved is not None and grad.numel() > _FUSED_GRADIENT_ELEMENTS:
        grad, grad_bias = activation_and_bias_gradient("cuda", grad, saved, kind, parameter, bias)
        saved, kind = None, 0
    saved = None if saved is None else saved.contiguous()
    gradients = []
    if weight is not None:
        k = weight.shape[1]
        grad_input = grad.new_empty((m, k))
        if k:
            workspace = _native.workspace(kernels.linear_workspace(1, dtype, m, n, k, 0, True), grad)
            kernels.linear_input_gradient(
                dtype,
                grad.data_ptr(),
                *grad.stride(),
                _native.address(saved),
                weight.data_ptr(),
                *weight.stride(),
                grad_input.data_ptr(),
                m,
                n,
                k,
                kind,
                parameter,
                allow_tf32,
                _native.address(workspace),
                _native.context(grad),
            )
        gradients.append(grad_input)
    k = 0 if x is None else x.shape[1]
    sums = grad.new_empty(n) if bias and grad_bias is None else None
    grad_weight = grad.new_empty((n, k))
    if k or sums is not None:
        workspace = _native.workspace(kernels.linear_workspace(2, dtype, m, n, k, 0, True), grad)
        kernels.linear_weight_gradient(
            dtype,
            grad.data_ptr(),
            *grad.stride(),
            _native.address(saved),
            x.data_ptr() if x is not None and k else 0,
            *(x.stride() if x is not None else (0, 0)),
            grad_weight.data_ptr() if k else 0,
            _native.address(sums),
            m,
            n,
            k,
            kind,
            parameter,
            allow_tf32,
            True,
            _native.address(workspace),
            _native.context(grad),
        )
    if x is not None:
        gradients.append(grad_weight)
    grad_bias = sums if grad_bias is None else grad_bias
    return gradients if grad_bias is None else [*gradients, grad_bias]


_add("cuda", cuda_forward, cuda_backward)


# ----------------------------------------------------------------------------------------------------------- triton


def _triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: int, parameter: float, preactivation: bool
) -> tuple[Tensor, Tensor | None]:
    from fastdl.kernels import linear as kernels

    y = x.new_empty((x.shape[0], weight.shape[0]))
    z = torch.empty_like(y) if preactivation else None
    kernels.linear(x, weight, bias, y, z, kind, parameter, allow_tf32=_native.matmul_allows_tf32())
    return y, z


def _triton_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    saved: Tensor | None,
    kind: int,
    parameter: float,
    bias: bool,
) -> list[Tensor]:
    from fastdl.kernels import linear as kernels

    if saved is not None and not kernels.fuses_gradient(*grad.shape, grad.element_size()):
        grad = ACTIVATION_BACKWARD.implementations["triton"](grad, saved, kind, parameter)
        kind, saved = 0, None
    gradients = []
    if weight is not None:
        grad_input = grad.new_empty((grad.shape[0], weight.shape[1]))
        if grad_input.numel():
            kernels.linear_input_gradient(
                grad, saved, weight, grad_input, kind, parameter, allow_tf32=_native.matmul_allows_tf32()
            )
        gradients.append(grad_input)
    if x is None and not bias:
        return gradients
    grad_weight = None if x is None else grad.new_empty((grad.shape[1], x.shape[1]))
    grad_bias = grad.new_empty(grad.shape[1]) if bias else None
    some = grad_weight is not None and grad_weight.numel() > 0
    if some or bias:
        x, out = (x, grad_weight) if some else (None, None)
        kernels.linear_weight_gradient(
            grad, saved, x, out, grad_bias, kind, parameter, allow_tf32=_native.matmul_allows_tf32()
        )
    gradients.extend(g for g in (grad_weight, grad_bias) if g is not None)
    return gradients


_add("triton", _triton_forward, _triton_backward)


# ---------------------------------------------------------------------------------------------------------- autograd


class LinearFunction(torch.autograd.Function):
    """Autograd of the fused linear layer.

    Saves input and weight as far as a gradient needs them, and the output or the pre-activation, whichever the
    activation's gradient is made of. The pre-activation is an output of the Function, so that double backward flows
    through it like through any other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: int,
        parameter: float,
        requested: str,
        selection: Any,
    ) -> Any:
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        ctx.set_materialize_grads(False)
        ctx.arguments = kind, parameter, requested, needs_bias
        x, w = input if needs_weight else None, weight if needs_input else None
        if activations.saves(kind, parameter) == "preactivation":
            output, z = LINEAR_WITH_PREACTIVATION(requested, input, weight, bias, kind, parameter, selection=selection)
            ctx.save_for_backward(x, w, z)
            return output, z
        output = LINEAR(requested, input, weight, bias, kind, parameter, selection=selection)
        ctx.save_for_backward(x, w, output if kind else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_preactivation: Tensor | None = None) -> Any:
        kind, parameter, requested, needs_bias = ctx.arguments
        input, weight, saved = ctx.saved_tensors
        double = grad_preactivation is not None or torch.is_grad_enabled()
        if grad_output is None:
            if grad_preactivation is None:
                return (None,) * 7
            grad_output = torch.zeros_like(grad_preactivation)
        if double and not torch.compiler.is_compiling():
            gradients = reference_backward(
                grad_output, input, weight, saved, kind, parameter, needs_bias, grad_preactivation
            )
        else:
            gradients = LINEAR_BACKWARD(requested, grad_output, input, weight, saved, kind, parameter, needs_bias)
        rest = iter(gradients)
        needed = (weight is not None, input is not None, needs_bias)
        return *(next(rest) if need else None for need in needed), None, None, None, None
