"""Cross entropy of logits and of a linear layer's: ops, gradients and implementations by backend.

A row of C logits x has the loss -sum over c of q[c] (x[c] - logsumexp(x)). For a class index t, with class weights w,
q[c] = (1 - s) w[t] [c = t] + s / C w[c], or 0 if t is ignored; for class probabilities p, q[c] = w[c] ((1 - s) p[c] +
s / C). s: label smoothing (Szegedy et al., 2016). The gradient of x is mass * softmax(x) - q, mass being the sum of q.

The mean's denominator is the sum of w[t] over the rows that are not ignored, or the number of rows for probabilities.
A target that is no class raises on a CPU; on a GPU it makes its row's loss and gradient NaN.

Kernels see logits as (outer, C, inner): row (o, i) has its logit c at (o * C + c) * inner + i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native
from fastdl.ops.activation import like_layout
from fastdl.ops.attention import compute_dtype
from fastdl.ops.linear import LINEAR, LINEAR_BACKWARD

NAME = "cross_entropy"


# --------------------------------------------------------------------------------------------------------- reference


def _is_index(target: Tensor) -> bool:
    return not target.is_floating_point()


def _distribution(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """q (N, C, *) and its part that is not the target's own, in the dtype of computation; and the rows' weights."""
    dtype, classes = compute_dtype(logits), logits.shape[1]
    uniform = torch.full((classes,), label_smoothing / classes, dtype=dtype, device=logits.device)
    if weight is not None:
        uniform = uniform * weight.to(dtype)
    uniform = uniform.view(-1, *[1] * (logits.dim() - 2))
    if not _is_index(target):
        own = target.to(dtype) * (1 - label_smoothing)
        if weight is not None:
            own = own * weight.to(dtype).view_as(uniform)
        return own + uniform, logits.new_ones(target[:, 0].shape, dtype=dtype)
    ignored = target == ignore_index
    place = target.masked_fill(ignored, 0)
    rows = (torch.ones_like(place, dtype=dtype) if weight is None else weight.to(dtype)[place]).masked_fill(ignored, 0)
    q = uniform.expand(logits.shape).masked_fill(ignored[:, None], 0)
    return q.scatter_add(1, place[:, None], (rows * (1 - label_smoothing))[:, None]), rows


def reference(
    input: Tensor, target: Tensor, weight: Tensor | None, reduce: bool, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the mean's denominator and statistics of the rows by torch's operators, in the dtype of computation.

    Args:
        input: (N, C, *), logits; target: (N, *) of class indices, or (N, C, *) of probabilities; weight: (C,).
        reduce: whether the rows' losses are summed.

    Returns:
        loss: (), or (N, *) if not ``reduce``; denominator: (), or (0,) if not ``reduce``.
        statistics: (3, N, *): the rows' largest logits, logsumexp less these, and masses.
    """
    x = input.to(compute_dtype(input))
    q, rows = _distribution(x, target, weight, ignore_index, label_smoothing)
    largest = x.detach().amax(1)
    difference = x - largest[:, None]
    logarithm = difference.exp().sum(1).log()
    # By an index, what has no part in the loss may be infinite.
    sharp = _is_index(target) and label_smoothing == 0
    terms = q * (logarithm[:, None] - difference)
    loss = (terms.masked_fill(q == 0, 0) if sharp else terms).sum(1)
    if _is_index(target):
        loss = loss.masked_fill(target == ignore_index, 0)
    statistics = torch.stack([largest, logarithm, q.sum(1)])
    if not reduce:
        return loss, loss.new_empty(0), statistics
    return loss.sum(), rows.sum(), statistics


def reference_backward(
    input: Tensor,
    grad_loss: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of input and of target's probabilities, in this order.

    By torch's operators from the inputs alone, so that double backward follows by autograd.

    Args:
        grad_loss: () or (N, *), of the loss or, if ``denominator`` is given, of their quotient.
    """
    x = input.to(compute_dtype(input))
    q, _ = _distribution(x, target, weight, ignore_index, label_smoothing)
    factor = grad_loss if denominator is None else grad_loss / denominator
    factor = factor[:, None] if factor.dim() else factor
    logarithms = torch.log_softmax(x, 1)
    gradients = []
    if needs[0]:
        gradient = (logarithms.exp() * q.sum(1, keepdim=True) - q) * factor
        if _is_index(target):
            gradient = gradient.masked_fill((target == ignore_index)[:, None], 0)
        gradients.append(gradient.to(input.dtype))
    if needs[1]:
        gradient = logarithms * factor * (label_smoothing - 1)
        if weight is not None:
            gradient = gradient * weight.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
        gradients.append(gradient.to(target.dtype))
    return gradients


# ------------------------------------------------------------------------------------------------------- checks, ops


def check_tensors(name: str, named: dict[str, Any]) -> None:
    """All of them tensors, of the first one's device and, unless integers, of its floating-point dtype."""
    (first_name, first), *_ = named.items()
    for argument, tensor in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a tensor; got {type(tensor).__name__}")
        if tensor.device != first.device:
            raise RuntimeError(
                f"{name}: {argument} is on {tensor.device}, allowed: {first.device}, the device of {first_name}"
            )
        if argument != "target" and tensor.dtype != first.dtype:
            raise RuntimeError(
                f"{name}: {argument} has dtype {tensor.dtype}, allowed: {first.dtype}, the dtype of {first_name}"
            )
    if not first.is_floating_point():
        raise NotImplementedError(f"{name}: {first_name} has dtype {first.dtype}, allowed: floating-point dtypes")


def _check_loss(name: str, logits: tuple[int, ...], target: Tensor, weight: Tensor | None, smoothing: float) -> None:
    """``logits``: the shape (N, C, *)."""
    rows = (logits[0], *logits[2:])
    if target.is_floating_point():
        if tuple(target.shape) != logits:
            raise RuntimeError(
                f"{name}: target has dtype {target.dtype} and shape {tuple(target.shape)}, allowed: class indices of "
                f"shape {rows}, or probabilities of shape {logits}"
            )
    elif target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"{name}: target has dtype {target.dtype}, allowed: torch.int64 or a floating-point dtype")
    elif target.dim() and len(target) != logits[0]:
        raise ValueError(f"{name}: target has {len(target)} rows, allowed: {logits[0]}, the rows of input")
    elif tuple(target.shape) != rows:
        raise RuntimeError(f"{name}: target has shape {tuple(target.shape)}, allowed: {rows}, or probabilities")
    if weight is not None and tuple(weight.shape) != logits[1:2]:
        raise RuntimeError(f"{name}: weight has shape {tuple(weight.shape)}, allowed: ({logits[1]},), the classes")
    if not 0 <= smoothing <= 1:
        raise RuntimeError(f"{name}: label_smoothing is {smoothing}, allowed: 0 to 1")


def _check(
    input: Tensor, target: Tensor, weight: Tensor | None, reduce: bool, ignore_index: int, label_smoothing: float
) -> None:
    check_tensors(NAME, {"input": input, "target": target, "weight": weight})
    if input.dim() < 2:
        raise RuntimeError(f"{NAME}: input has shape {tuple(input.shape)}, allowed: (C,) or (N, C, *)")
    _check_loss(NAME, tuple(input.shape), target, weight, label_smoothing)
    if not _is_index(target) and ignore_index >= 0:
        raise RuntimeError(f"{NAME}: ignore_index is {ignore_index}, allowed with probabilities: less than 0")


def _limit(input: Tensor, target: Tensor, *_: Any) -> str | None:
    if target.is_floating_point() and target.dtype != input.dtype:
        return f"target has dtype {target.dtype}, allowed: {input.dtype}, the dtype of input, or torch.int64"
    return None


def _limit_backward(input: Tensor, grad_loss: Tensor, target: Tensor, *_: Any) -> str | None:
    return _limit(input, target)


def _shape_class(input: Tensor, target: Tensor, *_: Any) -> tuple[str, tuple[int, ...]]:
    kind = "indices" if _is_index(target) else "probabilities"
    return kind, (input.shape[0] * math.prod(input.shape[2:]), input.shape[1])


def _fake(input: Tensor, target: Tensor, weight: Tensor | None, reduce: bool, *_: Any) -> tuple[Tensor, ...]:
    rows, dtype = (input.shape[0], *input.shape[2:]), compute_dtype(input)
    loss = input.new_empty(() if reduce else rows, dtype=dtype)
    denominator = input.new_empty(() if reduce else 0, dtype=dtype)
    return loss, denominator, input.new_empty((3, *rows), dtype=dtype)


def _fake_backward(input: Tensor, grad_loss: Tensor, target: Tensor, *arguments: Any) -> list[Tensor]:
    return [empty_gradient(input) for need in arguments[-2] if need]


def _laid_out_backward(*arguments: Any) -> list[Tensor]:
    """The reference's gradients in the kernels' memory format."""
    input = arguments[0]
    return [like_layout(gradient, empty_gradient(input)) for gradient in reference_backward(*arguments)]


def classes_last(input: Tensor) -> bool:
    """Whether the classes are the innermost dimension of (N, C, *), the others being in order."""
    return input.dim() > 2 and not input.is_contiguous() and input.movedim(1, -1).is_contiguous()


def empty_gradient(input: Tensor) -> Tensor:
    """An uninitialised gradient of the logits: in their memory format if kernels read that, else contiguous."""
    return torch.empty_like(
        input, memory_format=torch.preserve_format if classes_last(input) else torch.contiguous_format
    )


CROSS_ENTROPY = Op(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, bool reduce, SymInt ignore_index, "
    "float label_smoothing, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    tensors=3,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check,
)
CROSS_ENTROPY_BACKWARD = Op(
    "cross_entropy_backward(Tensor input, Tensor grad_loss, Tensor target, Tensor? weight, Tensor? denominator, "
    "Tensor statistics, SymInt ignore_index, float label_smoothing, bool[2] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    reference=_laid_out_backward,
    tensors=6,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


# ---------------------------------------------------------------------------------------- native: cpu, cuda and triton


def _laid_out(input: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The logits, copied if they must be, and (outer, C, inner) of their memory; rows come in target's order."""
    classes = input.shape[1]
    if classes_last(input):
        return input, (input.numel() // classes, classes, 1)
    return input.contiguous(), (input.shape[0], classes, math.prod(input.shape[2:]))


def _computed(weight: Tensor | None, input: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(compute_dtype(input)).contiguous()


def _implement(backend: str, forward: Any, backward: Any) -> None:
    """Adds a backend that has both directions for logits that are not empty, seen by :func:`_laid_out`."""

    @CROSS_ENTROPY.implement(backend, Support(_native.FLOATING, _limit))
    def cross_entropy(
        input: Tensor, target: Tensor, weight: Tensor | None, reduce: bool, ignore_index: int, label_smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if input.numel() == 0:
            return reference(input, target, weight, reduce, ignore_index, label_smoothing)
        loss, denominator, statistics = _fake(input, target, weight, reduce)
        input, view = _laid_out(input)
        target = target.contiguous() if _is_index(target) else like_layout(target, input)
        weight = _computed(weight, input)
        forward(view, input, target, weight, loss, denominator, statistics, ignore_index, label_smoothing)
        return loss, denominator, statistics

    @CROSS_ENTROPY_BACKWARD.implement(backend, Support(_native.FLOATING, _limit_backward))
    def cross_entropy_backward(
        input: Tensor,
        grad_loss: Tensor,
        target: Tensor,
        weight: Tensor | None,
        denominator: Tensor | None,
        statistics: Tensor,
        ignore_index: int,
        label_smoothing: float,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        input, view = _laid_out(input)
        gradients = [_native.huge_pages(empty_gradient(input)) if need else None for need in needs]
        if input.numel():
            # A gradient that is the same for all rows needs no copy for each.
            grad_loss = grad_loss.contiguous() if any(grad_loss.stride()) else grad_loss.as_strided((), ())
            target = target.contiguous() if _is_index(target) else like_layout(target, input)
            backward(
                view,
                input,
                grad_loss,
                target,
                _computed(weight, input),
                denominator,
                statistics.contiguous(),
                *gradients,
                ignore_index,
                label_smoothing,
            )
        return [gradient for gradient in gradients if gradient is not None]


def _native_functions(backend: str) -> tuple[Any, Any]:
    def forward(
        view: tuple[int, int, int],
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        loss: Tensor,
        denominator: Tensor,
        statistics: Tensor,
        *options: Any,
    ) -> None:
        kernels = _native.kernels(backend)
        reduce = denominator.numel() > 0
        rows = torch.empty(view[0] * view[2] * 2, dtype=loss.dtype, device=loss.device) if reduce else None
        kernels.cross_entropy(
            _native.DTYPE_CODES[input.dtype],
            *view,
            input.data_ptr(),
            target.data_ptr(),
            _is_index(target),
            _native.address(weight),
            loss.data_ptr(),
            denominator.data_ptr() if reduce else 0,
            statistics.data_ptr(),
            _native.address(rows),
            *options,
            _native.context(input),
        )

    def backward(
        view: tuple[int, int, int],
        input: Tensor,
        grad_loss: Tensor,
        target: Tensor,
        weight: Tensor | None,
        denominator: Tensor | None,
        statistics: Tensor,
        grad_input: Tensor | None,
        grad_target: Tensor | None,
        *options: Any,
    ) -> None:
        _native.kernels(backend).cross_entropy_backward(
            _native.DTYPE_CODES[input.dtype],
            *view,
            input.data_ptr(),
            grad_loss.data_ptr(),
            grad_loss.dim() > 0,
            target.data_ptr(),
            _is_index(target),
            _native.address(weight),
            _native.address(denominator),
            statistics.data_ptr(),
            _native.address(grad_input),
            _native.address(grad_target),
            *options,
            _native.context(input),
        )

    return forward, backward


_implement("cpu", *_native_functions("cpu"))
_implement("cuda", *_native_functions("cuda"))


def _triton_forward(
    view: tuple[int, int, int],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    *rest: Any,
) -> None:
    from fastdl.kernels import cross_entropy as kernels

    kernels.cross_entropy(view, input, target, weight, loss, denominator if denominator.numel() else None, *rest)


def _triton_backward(*arguments: Any) -> None:
    from fastdl.kernels import cross_entropy as kernels

    kernels.cross_entropy_backward(*arguments)


_implement("triton", _triton_forward, _triton_backward)


# ---------------------------------------------------------------------------------------------------------- autograd


def finished(loss: Tensor, denominator: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The loss, or with a denominator the mean, rounded."""
    return (loss if denominator is None else loss / denominator).to(dtype)


class CrossEntropyFunction(torch.autograd.Function):
    """Autograd of the cross entropy, reduced or of each row: saves its inputs and three numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
        requested: str,
        selection: Any,
    ) -> Tensor:
        loss, denominator, statistics = CROSS_ENTROPY(
            requested, input, target, weight, reduction != "none", ignore_index, label_smoothing, selection=selection
        )
        divisor = denominator if reduction == "mean" else None
        ctx.save_for_backward(input, target, weight, divisor, statistics)
        ctx.arguments = ignore_index, label_smoothing, requested
        return finished(loss, divisor, dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        ignore_index, label_smoothing, requested = ctx.arguments
        input, *saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        arguments = input, grad_loss.to(compute_dtype(input)), *saved, ignore_index, label_smoothing, needs
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
            gradients = reference_backward(*arguments)
        else:
            gradients = CROSS_ENTROPY_BACKWARD(requested, *arguments)
        rest = iter(gradients)
        return *(next(rest) if need else None for need in needs), *(None,) * 7


# --------------------------------------------------------------------------------------------- of a linear layer

LINEAR_NAME = "linear_cross_entropy"


def linear_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """By torch's operators: input (N, K), weight (C, K), bias (C,), target (N,) or (N, C)."""
    logits = F.linear(input, weight, bias)
    return F.cross_entropy(
        logits,
        target,
        class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _check_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduce: bool,
    ignore_index: int,
    label_smoothing: float,
    needs: Sequence[bool],
) -> None:
    named = {"input": input, "linear_weight": weight, "linear_bias": bias, "target": target, "weight": class_weight}
    check_tensors(LINEAR_NAME, named)
    if weight.dim() != 2:
        raise RuntimeError(f"{LINEAR_NAME}: linear_weight has shape {tuple(weight.shape)}, allowed: (C, in_features)")
    if input.dim() != 2 or input.shape[1] != weight.shape[1]:
        raise RuntimeError(
            f"{LINEAR_NAME}: input has shape {tuple(input.shape)}, allowed: (*, {weight.shape[1]}), since "
            f"linear_weight has shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"{LINEAR_NAME}: linear_bias has shape {tuple(bias.shape)}, allowed: ({weight.shape[0]},)")
    _check_loss(LINEAR_NAME, (input.shape[0], weight.shape[0]), target, class_weight, label_smoothing)
    if not _is_index(target) and ignore_index >= 0:
        raise RuntimeError(f"{LINEAR_NAME}: ignore_index is {ignore_index}, allowed with probabilities: less than 0")


# Of the logits of a chunk of rows: enough for matrix products, and for what is done once a chunk to the gradient of
# weight; few beside a large vocabulary's logits.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 128 << 20}
LEAST_ROWS = 128


def chunk_rows(input: Tensor, classes: int) -> int:
    """Rows of a chunk of input (N, K): as equal as can be."""
    rows, bytes_ = input.shape[0], CHUNK_BYTES.get(input.device.type, CHUNK_BYTES["cpu"])
    most = max(bytes_ // max(classes * input.dtype.itemsize, 1) // LEAST_ROWS * LEAST_ROWS, LEAST_ROWS)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks), 1)


def _summed_dtype(input: Tensor, classes: int) -> torch.dtype:
    """Of the gradients of weight and bias before they are scaled: of several chunks, that of computation."""
    return compute_dtype(input) if chunk_rows(input, classes) < input.shape[0] else input.dtype


class _Sum:
    """A sum of chunks' gradients, as :func:`_summed_dtype` says."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.own = False

    def add(self, term: Tensor) -> None:
        if self.total is None:
            self.total = term
        elif self.own:
            self.total += term
        else:
            self.total, self.own = self.total.to(compute_dtype(term)) + term, True


def _chunked(
    backend: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    reduce: bool,
    ignore_index: int,
    label_smoothing: float,
    grad_loss: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Loss and denominator, and the needed gradients of input, weight, bias and target, chunk by chunk of rows.

    ``grad_loss``: (N,), or None for 1.
    """
    linear, linear_backward = LINEAR.implementations[backend], LINEAR_BACKWARD.implementations[backend]
    entropy, entropy_backward = CROSS_ENTROPY.implementations[backend], CROSS_ENTROPY_BACKWARD.implementations[backend]
    rows, classes = input.shape[0], weight.shape[0]
    step = chunk_rows(input, classes)
    options = ignore_index, label_smoothing
    losses, denominators = [], []
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format) if needs[0] else None
    grad_target = torch.empty_like(target, memory_format=torch.contiguous_format) if needs[3] else None
    grad_weight, grad_bias = _Sum(), _Sum()
    ones = input.new_ones((), dtype=compute_dtype(input))
    for first in range(0, max(rows, 1), step):
        part = slice(first, first + step)
        logits = linear(input[part], weight, bias, 0, 0.0)
        loss, denominator, statistics = entropy(logits, target[part], class_weight, reduce, *options)
        losses.append(loss)
        denominators.append(denominator)
        if not any(needs):
            continue
        grad = ones if grad_loss is None else grad_loss[part]
        grads = entropy_backward(
            logits, grad, target[part], class_weight, None, statistics, *options, [any(needs[:3]), needs[3]]
        )
        if grad_target is not None:
            grad_target[part] = grads.pop()
        del logits
        if any(needs[:3]):
            x, w = input[part] if needs[1] else None, weight if needs[0] else None
            grads = linear_backward(grads[0], x, w, None, 0, 0.0, needs[2])
            if grad_input is not None:
                grad_input[part] = grads.pop(0)
            if needs[1]:
                grad_weight.add(grads.pop(0))
            if needs[2]:
                grad_bias.add(grads.pop(0))
    if reduce:
        total, denominator = torch.stack(losses).sum(0), torch.stack(denominators).sum(0)
    else:
        total, denominator = torch.cat(losses), denominators[0]
    return total, denominator, [grad_input, grad_weight.total, grad_bias.total, grad_target]


def _linear_forward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    input, weight, bias, target, class_weight, reduce, ignore_index, label_smoothing, needs = arguments
    options = reduce, ignore_index, label_smoothing
    loss, denominator, gradients = _chunked(backend, input, weight, bias, target, class_weight, *options, None, needs)
    return loss, denominator, *(input.new_empty(0) if g is None else g for g in gradients)


def _linear_backward(backend: str, *arguments: Any) -> list[Tensor]:
    input, grad_loss, weight, bias, target, class_weight, ignore_index, label_smoothing, needs = arguments
    inputs, options = (input, weight, bias, target), (False, ignore_index, label_smoothing)
    _, _, gradients = _chunked(backend, *inputs, class_weight, *options, grad_loss, needs)
    return [g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True) if g is not None]


def _fake_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Any, reduce: bool, *rest: Any
) -> tuple[Tensor, ...]:
    dtype, summed, needs = compute_dtype(input), _summed_dtype(input, weight.shape[0]), rest[2]
    loss = input.new_empty(() if reduce else input.shape[:1], dtype=dtype)
    denominator = input.new_empty(() if reduce else 0, dtype=dtype)
    tensors = (input, input.dtype), (weight, summed), (bias, summed), (target, target.dtype)
    shapes = [t.shape if need and t is not None else (0,) for (t, _), need in zip(tensors, needs, strict=True)]
    dtypes = [d if need else input.dtype for (_, d), need in zip(tensors, needs, strict=True)]
    return loss, denominator, *(input.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))


def _fake_linear_backward(*arguments: Any) -> list[Tensor]:
    tensors = arguments[0], arguments[2], arguments[3], arguments[4]
    return [t.new_empty(t.shape) for t, need in zip(tensors, arguments[-2], strict=True) if need]


def _linear_shape_class(input: Tensor, weight: Tensor, *_: Any) -> tuple[str, tuple[int, ...]]:
    return "rows", (*input.shape, weight.shape[0])


_LINEAR_TENSORS = "Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight"
_LINEAR_OPTIONS = "SymInt ignore_index, float label_smoothing, bool[4] needs, str backend"
LINEAR_CROSS_ENTROPY = Op(
    f"linear_cross_entropy(Tensor input, {_LINEAR_TENSORS}, bool reduce, {_LINEAR_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_linear,
    reference=lambda *arguments: _linear_forward("torch", *arguments),
    tensors=5,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_linear_shape_class,
    check=_check_linear,
)
LINEAR_CROSS_ENTROPY_BACKWARD = Op(
    f"linear_cross_entropy_backward(Tensor input, Tensor grad_loss, {_LINEAR_TENSORS}, {_LINEAR_OPTIONS}) -> Tensor[]",
    fake=_fake_linear_backward,
    reference=lambda *arguments: _linear_backward("torch", *arguments),
    tensors=6,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


def _linear_limit(input: Tensor, weight: Tensor, bias: Any, target: Tensor, *_: Any) -> str | None:
    return _limit(input, target)


def _implement_linear(backend: str) -> None:
    @LINEAR_CROSS_ENTROPY.implement(backend, Support(_native.FLOATING, _linear_limit))
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _linear_forward(backend, *arguments)

    @LINEAR_CROSS_ENTROPY_BACKWARD.implement(backend, Support(_native.FLOATING))
    def backward(*arguments: Any) -> list[Tensor]:
        return _linear_backward(backend, *arguments)


for _backend in ("cpu", "cuda", "triton"):
    _implement_linear(_backend)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, which is () and in the dtype of computation."""
    if not gradient.is_cuda and not torch.compiler.is_compiling():
        return (gradient * float(factor)).to(dtype)  # in one pass; there is nobody to wait for
    return (gradient.to(factor.dtype) * factor).to(dtype)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Autograd of the linear layer's cross entropy.

    Reduced, the gradients are made with the loss, before the logits of a chunk are gone (Hsu et al., 2024), and scaled
    in the backward: so a small mean does not underflow in 16 bits. Else the backward makes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
        requested: str,
        selection: Any,
    ) -> Tensor:
        reduce = reduction != "none"
        needs = list(ctx.needs_input_grad[:4])
        loss, denominator, *gradients = LINEAR_CROSS_ENTROPY(
            requested,
            input,
            weight,
            bias,
            target,
            class_weight,
            reduce,
            ignore_index,
            label_smoothing,
            needs if reduce else [False] * 4,
            selection=selection,
        )
        divisor = denominator if reduction == "mean" else None
        ctx.save_for_backward(input, weight, bias, target, class_weight, divisor, *gradients)
        ctx.arguments = reduction, ignore_index, label_smoothing, requested
        return finished(loss, divisor, dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        reduction, ignore_index, label_smoothing, requested = ctx.arguments
        input, weight, bias, target, class_weight, divisor, *made = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        inputs, options = (input, weight, bias, target), (reduction, ignore_index, label_smoothing)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # double backward
            needed = [t for t, need in zip(inputs, needs, strict=True) if need]
            loss = linear_reference(*inputs, class_weight, *options).to(grad_loss.dtype)
            gradients = list(torch.autograd.grad(loss, needed, grad_loss, create_graph=True))
        elif reduction == "none":
            grad_loss = grad_loss.to(compute_dtype(input))
            gradients = LINEAR_CROSS_ENTROPY_BACKWARD(
                requested, input, grad_loss, *inputs[1:], class_weight, *options[1:], needs
            )
        else:
            factor = grad_loss.to(compute_dtype(input))
            factor = factor if divisor is None else factor / divisor
            made = [g for g, need in zip(made, needs, strict=True) if need]
            needed = [t for t, need in zip(inputs, needs, strict=True) if need]
            gradients = [_scaled(g, factor, t.dtype) for g, t in zip(made, needed, strict=True)]
        rest = iter(gradients)
        return *(next(rest) if need else None for need in needs), *(None,) * 7
