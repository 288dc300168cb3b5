"""Scaled dot product attention: ops, gradients and implementations by backend.

output = dropout(softmax(scores)) value (Vaswani et al., 2017). The score of query i for key j is scale * q_i . k_j +
mask[i, j] - slope * |p - j| (slopes: Press et al., 2022) for p - left <= j <= p + right, and -infinity elsewhere and
where a boolean mask is False. p = i, or i + keys - queries with ``bottom_right``. A row of nothing but -infinity has
the output 0 and the logsumexp -infinity.

Tensors are (B, H, L, D); H heads of queries share Hk heads of keys, H / Hk neighbours each. With offsets B is 1 and a
batch of sequences is packed: sequence b has the rows from offsets[b] up to offsets[b + 1].

Dropout takes, for a probability, word i % 4 of the random words (fastdl/ops/_philox.py) of the counter
(j, i // 4, b * H + h, 0).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native, _philox

MAX_HEAD_DIM = 256


# --------------------------------------------------------------------------------------------------------- reference


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of scores, logsumexp and an additive mask inside a kernel: float32 for 16-bit tensors."""
    return torch.float32 if tensor.dtype.itemsize == 2 else tensor.dtype


class _Span(NamedTuple):
    """The part of a batch that is computed at once: all of it, or one of its packed sequences."""

    first: int  # in the batch
    queries: slice
    keys: slice


def _spans(query: Tensor, key: Tensor, query_offsets: Tensor | None, key_offsets: Tensor | None) -> Iterator[_Span]:
    if query_offsets is None or key_offsets is None:
        yield _Span(0, slice(0, query.shape[2]), slice(0, key.shape[2]))
        return
    q, k = query_offsets.tolist(), key_offsets.tolist()
    for name, offsets, rows in (("cu_seq_q", q, query.shape[2]), ("cu_seq_k", k, key.shape[2])):
        if offsets[0] != 0 or offsets[-1] != rows or any(b < a for a, b in itertools.pairwise(offsets)):
            raise ValueError(
                f"attention: {name} is {offsets}, allowed: from 0 to {rows} rows, numbers that do not fall"
            )
    for b in range(len(q) - 1):
        yield _Span(b, slice(q[b], q[b + 1]), slice(k[b], k[b + 1]))


def dropout_factors(seed: Tensor, p: float, first: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """(B, H, L, S) of 0 and 1 / (1 - p), for the batch entries from ``first``."""
    batch, heads, queries, keys = shape
    device = seed.device
    i = torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)
    head = torch.arange(first * heads, (first + batch) * heads, device=device).view(batch, heads, 1, 1)
    zero = torch.zeros_like(j)
    words = torch.stack(torch.broadcast_tensors(*_philox.words((j, i // 4, head, zero), seed)))
    random = words.gather(0, (i % 4).expand(1, batch, heads, queries, keys))[0]
    return _philox.factors(random, p, dtype)


def _probabilities(
    span: _Span,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For a span's query and key: the softmax (B, H, L, S), the logsumexp (B, H, L), and dropout's factors."""
    z = query @ key.mT * scale
    queries, keys = z.shape[-2:]
    j = torch.arange(keys, device=z.device)
    p = torch.arange(queries, device=z.device)[:, None] + (keys - queries if bottom_right else 0)
    if slopes is not None:
        z = z - slopes[span.first if len(slopes) > 1 and len(z) == 1 else slice(None), :, None, None] * (p - j).abs()
    if mask is not None:
        z = z.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else z + mask
    if left >= 0:
        z = z.masked_fill(j < p - left, -math.inf)
    if right >= 0:
        z = z.masked_fill(j > p + right, -math.inf)
    if keys == 0:
        return z, z.new_full(z.shape[:-1], -math.inf), None
    top = z.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0)
    exponentials = (z - top).exp()
    total = exponentials.sum(-1, keepdim=True)
    unseen = total == 0
    total = total.masked_fill(unseen, 1)
    logsumexp = (top + total.log()).masked_fill(unseen, -math.inf).squeeze(-1)
    factors = None
    if seed is not None:
        factors = dropout_factors(seed, dropout, span.first, tuple(z.shape), z.dtype)  # type: ignore[arg-type]
    return exponentials / total, logsumexp, factors


def _computed(query: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype of computation; boolean masks stay."""
    dtype = compute_dtype(query)
    return [t if t is None or t.dtype == torch.bool else t.to(dtype) for t in tensors]


def _grouped(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values with a head for each of query's."""
    group = query.shape[1] // max(tensor.shape[1], 1)
    return tensor if group == 1 else tensor.repeat_interleave(group, 1)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    seed: Tensor | None,
    max_query: int,
    max_key: int,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp by torch's operators.

    Args:
        query: (B, H, L, D); key: (B, Hk, S, D); value: (B, Hk, S, E), of any strides.
        mask: (1 or B, 1 or H, 1 or L, 1 or S), boolean or additive; slopes: (1 or B, H).
        query_offsets, key_offsets: (sequences + 1) integers; seed: () int64, with dropout.
        max_query, max_key: the longest sequences' lengths.

    Returns:
        (B, H, L, E), laid out as query, and (B, H, L) in the dtype of computation.
    """
    q, k, v, mask, slopes = _computed(query, query, key, value, mask, slopes)
    k, v = _grouped(q, k), _grouped(q, v)
    outputs, sums = [], []
    options = scale, left, right, bottom_right, dropout
    for span in _spans(q, k, query_offsets, key_offsets):
        rows, columns = span.queries, span.keys
        p, logsumexp, factors = _probabilities(span, q[:, :, rows], k[:, :, columns], mask, slopes, seed, *options)
        outputs.append((p if factors is None else p * factors) @ v[:, :, columns])
        sums.append(logsumexp)
    output, logsumexp = (torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in (outputs, sums))
    return _as_laid_out(output.to(query.dtype), query), logsumexp.contiguous()


def reference_backward(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    max_query: int,
    max_key: int,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of query, key, value and mask, in this order.

    By torch's operators from the inputs alone, so that double backward follows by autograd.
    """
    q, k, v, bias, slopes, grad = _computed(query, query, key, value, mask, slopes, grad_output)
    k, v = _grouped(q, k), _grouped(q, v)
    options = scale, left, right, bottom_right, dropout
    parts: tuple[list[Tensor], ...] = ([], [], [], [])
    for span in _spans(q, k, query_offsets, key_offsets):
        rows, columns = span.queries, span.keys
        some_q, some_k, some_grad = q[:, :, rows], k[:, :, columns], grad[:, :, rows]
        p, _, factors = _probabilities(span, some_q, some_k, bias, slopes, seed, *options)
        dp = some_grad @ v[:, :, columns].mT
        remains = p
        if factors is not None:
            remains, dp = p * factors, dp * factors
        delta = (p * dp).sum(-1, keepdim=True)
        if grad_logsumexp is not None:
            delta = delta - grad_logsumexp[:, :, rows, None]
        ds = p * (dp - delta)
        gradients = ds @ some_k * scale, ds.mT @ some_q * scale, remains.mT @ some_grad, ds
        for part, gradient in zip(parts, gradients, strict=True):
            part.append(gradient)
    results = []
    for need, tensor, part in zip(needs, (query, key, value, mask), parts, strict=True):
        if not need or tensor is None:
            continue
        gradient = torch.cat(part, 2) if len(part) > 1 else part[0]
        if tensor is mask:
            gradient = gradient.sum_to_size(tensor.shape)
        elif gradient.shape[1] != tensor.shape[1]:
            gradient = gradient.unflatten(1, (tensor.shape[1], -1)).sum(2)
        results.append(gradient.to(tensor.dtype))
    return results


def _laid_out_backward(*arguments: Any) -> list[Tensor]:
    """The reference's gradients in the kernels' memory formats."""
    gradients = reference_backward(*arguments)
    needed = [t for t, need in zip(arguments[2:6], arguments[-1], strict=True) if need]
    return [empty_gradient(t).copy_(gradient) for t, gradient in zip(needed, gradients, strict=True)]


# ----------------------------------------------------------------------------------------------------------- layouts


def _order(query: Tensor) -> list[int]:
    """Batch, heads and positions, the outermost in memory first."""
    strides = query.stride()
    return sorted(range(3), key=lambda i: -strides[i] if query.shape[i] > 1 and strides[i] else -math.inf)


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """An uninitialised (B, H, L, E), dense, with query's order of batch, heads and positions."""
    order = _order(query)
    output = query.new_empty(*[query.shape[i] for i in order], value.shape[3])
    return output.permute(*[order.index(i) for i in range(3)], 3)


def _as_laid_out(output: Tensor, query: Tensor) -> Tensor:
    order = _order(query)
    return output.permute(*order, 3).contiguous().permute(*[order.index(i) for i in range(3)], 3)


def empty_gradient(tensor: Tensor) -> Tensor:
    """An uninitialised gradient of a tensor: dense in its order of dimensions, with rows that are contiguous."""
    contiguous = torch.preserve_format if tensor.stride(-1) == 1 else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=contiguous)


# ------------------------------------------------------------------------------------------------------- checks, ops

NAME = "scaled_dot_product_attention"


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    seed: Tensor | None,
    max_query: int,
    max_key: int,
    scale: float | None,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
    enable_gqa: bool = True,
) -> None:
    """Raises, naming the argument; query, key and value may have any number of batch dimensions, or none."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype != query.dtype:
            raise RuntimeError(f"{NAME}: {name} has dtype {tensor.dtype}, allowed: {query.dtype}, the dtype of query")
        if tensor.device != query.device:
            raise RuntimeError(f"{NAME}: {name} is on {tensor.device}, allowed: {query.device}, the device of query")
        if tensor.dim() < 2:
            raise RuntimeError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, allowed: (*, length, size)")
    if not query.is_floating_point():
        raise RuntimeError(f"{NAME}: query has dtype {query.dtype}, allowed: floating-point dtypes")
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(
            f"{NAME}: key has shape {tuple(key.shape)}, allowed: (*, {query.shape[-1]}), the last size of query"
        )
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            f"{NAME}: value has shape {tuple(value.shape)}, allowed: (*, {key.shape[-2]}, size), key's length"
        )
    batch = _check_batch(query, key, value, enable_gqa)
    if mask is not None:
        _check_mask(mask, query, (*batch, query.shape[-2], key.shape[-2]))
    if slopes is not None:
        heads = batch[-1] if batch else 1
        allowed = [(heads,), (1, heads), (batch[-2] if len(batch) > 1 else 1, heads)]
        if query_offsets is not None:
            allowed.append((len(query_offsets) - 1, heads))
        if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
            raise TypeError(f"{NAME}: alibi_slopes must be a floating-point tensor")
        if tuple(slopes.shape) not in allowed:
            raise RuntimeError(
                f"{NAME}: alibi_slopes has shape {tuple(slopes.shape)}, allowed: ({heads},) or (batch, {heads})"
            )
        if slopes.device != query.device:
            raise RuntimeError(f"{NAME}: alibi_slopes is on {slopes.device}, allowed: {query.device}, query's device")
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"{NAME}: dropout probability is {dropout}, allowed: 0 to 1")


def _check_batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The batch dimensions of the output, heads included."""
    shapes = [tuple(t.shape[:-2]) for t in (query, key, value)]
    if enable_gqa and all(shapes):
        heads = [shape[-1] for shape in shapes]
        for name, number in zip(("key", "value"), heads[1:], strict=True):
            if number != heads[0] and (number == 0 or heads[0] % number):
                raise RuntimeError(f"{NAME}: {name} has {number} heads, allowed: a divisor of query's {heads[0]}")
        shapes = [(*shape[:-1], heads[0]) for shape in shapes]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise RuntimeError(
            f"{NAME}: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}, allowed: batch dimensions that broadcast"
        ) from None


def _check_mask(mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{NAME}: attn_mask must be a tensor or None; got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"{NAME}: attn_mask has dtype {mask.dtype}, allowed: torch.bool, torch.float32 or {query.dtype}, query's"
        )
    if mask.device != query.device:
        raise RuntimeError(f"{NAME}: attn_mask is on {mask.device}, allowed: {query.device}, the device of query")
    if mask.dim() < 2:
        raise IndexError(f"{NAME}: attn_mask has shape {tuple(mask.shape)}, allowed: two dimensions or more")
    given = tuple(mask.shape)
    fits = len(given) <= len(shape) and all(
        a in (1, b) for a, b in zip(given[::-1], shape[::-1][: len(given)], strict=True)
    )
    if not fits:
        raise RuntimeError(f"{NAME}: attn_mask has shape {given}, allowed: one that broadcasts to {shape}")


def _limit(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > MAX_HEAD_DIM:
            return f"{name} has head dimension {tensor.shape[-1]}, allowed: up to {MAX_HEAD_DIM}"
    return None


def _limit_backward(grad_output: Tensor, grad_logsumexp: Any, *arguments: Any) -> str | None:
    return _limit(*arguments)


def _shape_class(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    slopes: Any,
    query_offsets: Any,
    key_offsets: Any,
    seed: Any,
    max_query: int,
    max_key: int,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
) -> tuple[str, tuple[int, ...]]:
    label = (
        "dropout"
        if dropout
        else "packed"
        if query_offsets is not None
        else "masked"
        if mask is not None or slopes is not None
        else "window"
        if left >= 0 or right > 0
        else "causal"
        if right == 0
        else "full"
    )
    return label, (query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3])


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=compute_dtype(query))


def _fake_backward(grad_output: Tensor, grad_logsumexp: Tensor | None, *arguments: Any) -> list[Tensor]:
    return [empty_gradient(t) for t, need in zip(arguments[:4], arguments[-2], strict=True) if need]


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? slopes, Tensor? query_offsets, Tensor? key_offsets, "
    "Tensor? seed"
)
_NUMBERS = "SymInt max_query, SymInt max_key, float scale, SymInt left, SymInt right, bool bottom_right, float dropout"
ATTENTION = Op(
    f"attention({_TENSORS}, {_NUMBERS}, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    tensors=8,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=check,
)
ATTENTION_BACKWARD = Op(
    f"attention_backward(Tensor grad_output, Tensor? grad_logsumexp, {_TENSORS}, Tensor output, Tensor logsumexp, "
    f"{_NUMBERS}, bool[4] needs, str backend) -> Tensor[]",
    fake=_fake_backward,
    reference=_laid_out_backward,
    tensors=12,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)


# ------------------------------------------------------------------------------------------------ native: cpu and cuda


def _with_rows(tensor: Tensor) -> Tensor:
    """A tensor whose rows are contiguous: itself or a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _place(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """The address, and the strides of batch, position and head."""
    if tensor is None:
        return 0, 0, 0, 0
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch if tensor.shape[0] > 1 else 0, row, head


class _Arguments(NamedTuple):
    """What forward and backward pass to the kernels, and what has to live as long."""

    shape: Any
    scores: Any
    kept: tuple[Tensor | None, ...]


def _arguments(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    seed: Tensor | None,
    max_query: int,
    max_key: int,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
) -> _Arguments:
    kernels, on_cpu = _native.kernels(backend), backend == "cpu"
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    if query_offsets is not None and key_offsets is not None:
        batch = len(query_offsets) - 1
        query_offsets, key_offsets = [t.to(torch.int64).contiguous() for t in (query_offsets, key_offsets)]
    kind, mask_strides = 0, [0] * 4
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2 if mask.dtype == query.dtype else 3
        mask = mask.to(compute_dtype(query)) if kind == 3 else mask
        if on_cpu:
            mask = _with_rows(mask.expand(*mask.shape[:3], keys))
        mask_strides = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
    if slopes is not None:
        slopes = slopes.to(compute_dtype(query)).contiguous()
    longest = () if on_cpu else (min(max_query, queries), min(max_key, keys))  # a CPU's kernels look at the offsets
    shape = kernels.AttentionShape(
        batch,
        heads,
        heads // key.shape[1],
        queries,
        keys,
        size,
        value.shape[3],
        _native.address(query_offsets),
        _native.address(key_offsets),
        *longest,
    )
    number = 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF if on_cpu else _native.address(seed)
    scores = kernels.AttentionScores(
        scale,
        left,
        right,
        bottom_right,
        kind,
        _native.address(mask),
        *(mask_strides[:3] if on_cpu else [mask_strides]),
        _native.address(slopes),
        heads if slopes is not None and len(slopes) > 1 else 0,
        dropout,
        number,
    )
    return _Arguments(shape, scores, (mask, slopes, query_offsets, key_offsets))


def _add(backend: str) -> None:
    """Adds the kernels of a backend, whose bindings differ in what a GPU has to be told besides."""

    def more() -> tuple[bool, ...]:
        return () if backend == "cpu" else (_native.matmul_allows_tf32(),)

    @ATTENTION.implement(backend, Support(_native.FLOATING, _limit, f"head dimensions up to {MAX_HEAD_DIM}"))
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        query_offsets: Tensor | None,
        key_offsets: Tensor | None,
        seed: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        tensors = mask, slopes, query_offsets, key_offsets, seed
        if 0 in (query.numel(), key.numel(), value.numel()):
            return reference(query, key, value, *tensors, *options)
        output = _native.huge_pages(empty_output(query, value))
        logsumexp = query.new_empty(query.shape[:3], dtype=compute_dtype(query))
        query, key, value = [_with_rows(t) for t in (query, key, value)]
        arguments = _arguments(backend, query, key, value, *tensors, *options)
        _native.kernels(backend).attention(
            _native.DTYPE_CODES[query.dtype],
            arguments.shape,
            arguments.scores,
            *map(_place, (query, key, value, output)),
            logsumexp.data_ptr(),
            *more(),
            _native.context(query),
        )
        return output, logsumexp

    @ATTENTION_BACKWARD.implement(backend, Support(_native.FLOATING, _limit_backward))
    def attention_backward(
        grad_output: Tensor,
        grad_logsumexp: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        query_offsets: Tensor | None,
        key_offsets: Tensor | None,
        seed: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        *options_and_needs: Any,
    ) -> list[Tensor]:
        *options, needs = options_and_needs
        inputs, tensors = (query, key, value), (mask, slopes, query_offsets, key_offsets, seed)
        if 0 in (query.numel(), key.numel(), value.numel()):
            saved = *inputs, *tensors, output, logsumexp
            return _laid_out_backward(grad_output, grad_logsumexp, *saved, *options, needs)
        gradients = [
            _native.huge_pages(empty_gradient(t)) if need else None for t, need in zip(inputs, needs, strict=False)
        ]
        scores_gradient = None
        if needs[3]:  # the whole of it, before the sum over what the mask is broadcast over; 0 where nothing is seen
            shape = *query.shape[:3], key.shape[2]
            scores_gradient = query.new_zeros(shape, dtype=compute_dtype(query))
        grad_output, query, key, value, output = [_with_rows(t) for t in (grad_output, *inputs, output)]
        grad_logsumexp = None if grad_logsumexp is None else grad_logsumexp.contiguous()
        kernels, code, context = _native.kernels(backend), _native.DTYPE_CODES[query.dtype], _native.context(query)
        arguments = _arguments(backend, query, key, value, *tensors, *options)
        threads = (context,) if backend == "cpu" else ()
        workspace = _native.workspace(kernels.attention_backward_workspace(code, arguments.shape, *threads), query)
        kernels.attention_backward(
            code,
            arguments.shape,
            arguments.scores,
            *map(_place, (grad_output, query, key, value, output)),
            logsumexp.data_ptr(),
            _native.address(grad_logsumexp),
            *map(_place, gradients),
            _native.address(scores_gradient),
            *more(),
            _native.address(workspace),
            context,
        )
        results = [gradient for gradient in gradients if gradient is not None]
        if scores_gradient is not None and mask is not None:
            results.append(empty_gradient(mask).copy_(scores_gradient.sum_to_size(mask.shape)))
        return results


_add("cpu")
_add("cuda")


# ------------------------------------------------------------------------------------------------------------ triton


def _triton_options(
    max_query: int,
    max_key: int,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
) -> Any:
    from fastdl.kernels.attention import Options

    random = _philox.threshold(dropout), _philox.kept_factor(dropout)
    tf32 = _native.matmul_allows_tf32()
    return Options(max_query, max_key, scale, left, right, bottom_right, dropout, *random, tf32)


@ATTENTION.implement("triton", Support(_native.FLOATING, _limit, f"head dimensions up to {MAX_HEAD_DIM}"))
def _attention_triton(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    tensors, options = rest[:5], rest[5:]
    if 0 in (query.numel(), key.numel(), value.numel()):
        return reference(query, key, value, *rest)
    from fastdl.kernels import attention as kernels

    output = empty_output(query, value)
    logsumexp = query.new_empty(query.shape[:3], dtype=compute_dtype(query))
    kernels.attention(query, key, value, *tensors, output, logsumexp, options=_triton_options(*options))
    return output, logsumexp


@ATTENTION_BACKWARD.implement("triton", Support(_native.FLOATING, _limit_backward))
def _attention_backward_triton(
    grad_output: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    tensors, options, needs = rest[:6], rest[6:-1], rest[-1]
    if 0 in (query.numel(), key.numel(), value.numel()):
        return _laid_out_backward(grad_output, grad_logsumexp, query, key, value, mask, *rest)
    from fastdl.kernels import attention as kernels

    inputs = query, key, value
    gradients = [empty_gradient(t) if need else None for t, need in zip(inputs, needs, strict=False)]
    scores_gradient = None
    if needs[3]:
        shape = *query.shape[:3], key.shape[2]
        scores_gradient = torch.zeros(shape, dtype=compute_dtype(query), device=query.device)
    grad_logsumexp = None if grad_logsumexp is None else grad_logsumexp.contiguous()
    kernels.attention_backward(
        grad_output,
        grad_logsumexp,
        *inputs,
        mask,
        *tensors,
        *gradients,
        scores_gradient,
        options=_triton_options(*options),
    )
    results = [gradient for gradient in gradients if gradient is not None]
    if scores_gradient is not None and mask is not None:
        results.append(empty_gradient(mask).copy_(scores_gradient.sum_to_size(mask.shape)))
    return results


# ---------------------------------------------------------------------------------------------------------- autograd


class AttentionFunction(torch.autograd.Function):
    """Autograd of attention: saves its inputs and outputs; the logsumexp is an output with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *arguments, requested, selection = arguments  # type: ignore[assignment]
        ctx.set_materialize_grads(False)
        output, logsumexp = ATTENTION(requested, *arguments, selection=selection)
        ctx.save_for_backward(*arguments[:8], output, logsumexp)
        ctx.options = arguments[8:], requested
        return output, logsumexp

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> Any:
        options, requested = ctx.options
        needs = list(ctx.needs_input_grad[:4])
        saved = ctx.saved_tensors
        if grad_output is None:
            if grad_logsumexp is None:
                return (None,) * 17
            grad_output = torch.zeros_like(saved[8])
        arguments = grad_output, grad_logsumexp, *saved, *options, needs
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            gradients = reference_backward(*arguments)
        else:
            gradients = ATTENTION_BACKWARD(requested, *arguments)
        rest = iter(gradients)
        return *(next(rest) if need else None for need in needs), *(None,) * 13
