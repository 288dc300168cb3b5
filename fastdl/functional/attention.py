"""Scaled dot product attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl.dispatch import AUTO_ORDER, is_plain, state
from fastdl.functional._call import autocast, call_reference, select, select_reference
from fastdl.ops import attention as ops
from fastdl.ops._philox import new_seed


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Any:
    """dropout(softmax(query @ key^T * scale + mask)) @ value (Vaswani et al., 2017).

    As :func:`torch.nn.functional.scaled_dot_product_attention`, with autocast, any batch dimensions and any strides,
    and without a matrix of scores in memory.

    Args:
        query: (*, H, L, D); float32, float16, bfloat16 or float64.
        key: (*, H, S, D); value: (*, H, S, E), of the same dtype and device. Batch dimensions broadcast.
        attn_mask: broadcastable to (*, H, L, S): boolean, True where a key is seen, or float, added to the scores.
        dropout_p: of the probabilities; applied whenever it is not 0.
        is_causal: query i sees keys up to i; not together with ``attn_mask``.
        scale: of the products; None for 1 / sqrt(D).
        enable_gqa: key and value may have fewer heads, which neighbouring heads of query share.
        window_size: how many keys before and after its own position a query sees; -1 for all of them.
        alibi_slopes: (H,) or (batch, H): score i, j is lowered by slope * abs(i - j) (Press et al., 2022).
        return_logsumexp: whether to return the logsumexp of the scores, too.

    Returns:
        (*, H, L, E), 0 for a query that sees no key; with ``return_logsumexp`` a pair of it and (*, H, L), in float32
        for 16-bit tensors.

    Raises:
        TypeError: an argument that is not a tensor.
        RuntimeError: shapes, dtypes, devices or options that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError(f"{ops.NAME}: attn_mask is given, allowed with is_causal: None")
    left, right = _window(ops.NAME, window_size, is_causal)
    plain_torch = tuple(window_size) == (-1, -1) and alibi_slopes is None and not return_logsumexp
    original = query, key, value, attn_mask, dropout_p, is_causal
    if not (_is_regular(query, key, value, attn_mask, enable_gqa) and alibi_slopes is None):
        numbers = None, None, None, 0, 0, scale, left, right, False, dropout_p, enable_gqa
        ops.check(query, key, value, attn_mask, alibi_slopes, *numbers)
    inputs, batch = _four_dimensions(query, key, value, attn_mask, enable_gqa)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]

    def torchs() -> Tensor:
        return F.scaled_dot_product_attention(*original, scale=scale, enable_gqa=enable_gqa)

    options = query.shape[-2], key.shape[-2], _scale(query, scale), left, right, False, dropout_p
    output, logsumexp = _attention([*inputs, alibi_slopes, None, None], options, torchs if plain_torch else None)
    if len(batch) != 2 and logsumexp is not None:
        output, logsumexp = [t.reshape(*batch, *t.shape[2:]) for t in (output, logsumexp)]
    return (output, logsumexp) if return_logsumexp else output


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Any:
    """Attention of sequences that are packed one after the other, as :func:`torch.nn.attention.varlen.varlen_attn`.

    A query's position counts from the end of its sequence's keys: the last query stands at the last key.

    Args:
        query: (T, H, D); key: (Tk, H, D); value: (Tk, H, E): all sequences' positions.
        cu_seq_q: (N + 1) integers: sequence n has the queries from cu_seq_q[n] up to cu_seq_q[n + 1].
        cu_seq_k: the same for keys and values; None for the queries'.
        max_q, max_k: the longest sequences' lengths; None for T and Tk. On a GPU they save work.
        alibi_slopes: (H,) or (N, H).
        dropout_p, is_causal, scale, enable_gqa, window_size, return_logsumexp: as for
            :func:`scaled_dot_product_attention`.

    Returns:
        (T, H, E); with ``return_logsumexp`` a pair of it and (T, H).

    Raises:
        TypeError: an argument that is not a tensor.
        ValueError: on a CPU, offsets that do not go from 0 to the number of positions, or fall.
        RuntimeError: shapes, dtypes, devices or options that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    name = "varlen_attention"
    cu_seq_k = cu_seq_q if cu_seq_k is None else cu_seq_k
    left, right = _window(name, window_size, is_causal)
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if isinstance(tensor, Tensor) and tensor.dim() != 3:
            raise RuntimeError(f"{name}: {argument} has shape {tuple(tensor.shape)}, allowed: (positions, heads, size)")
    for argument, offsets in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: {argument} must be a tensor of int32 or int64")
        if offsets.dim() != 1 or offsets.shape != cu_seq_q.shape or len(offsets) < 2:
            raise RuntimeError(
                f"{name}: {argument} has shape {tuple(offsets.shape)}, allowed: (sequences + 1,), the same for both"
            )
        if offsets.device != query.device:
            raise RuntimeError(f"{name}: {argument} is on {offsets.device}, allowed: {query.device}, query's device")
    query, key, value = [t.transpose(0, 1) if isinstance(t, Tensor) else t for t in (query, key, value)]
    numbers = None, 0, 0, scale, left, right, True, dropout_p, enable_gqa
    ops.check(query, key, value, None, alibi_slopes, cu_seq_q, cu_seq_k, *numbers)
    inputs, _ = _four_dimensions(query, key, value, None, enable_gqa)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
    longest = [t.shape[1] if most is None else most for t, most in ((query, max_q), (key, max_k))]
    options = *longest, _scale(query, scale), left, right, True, dropout_p
    output, logsumexp = _attention([*inputs, alibi_slopes, cu_seq_q, cu_seq_k], options, None)
    output, logsumexp = output[0].transpose(0, 1), logsumexp[0].t()
    return (output, logsumexp) if return_logsumexp else output


def _attention(
    tensors: list[Tensor | None], options: tuple[Any, ...], torchs: Callable[[], Tensor] | None
) -> tuple[Tensor, Any]:
    """Output and logsumexp, (B, H, L, E) and (B, H, L).

    Args:
        tensors, options: the op's arguments before and after the seed.
        torchs: torch's own function, where it can do the call; its output is returned as it is, without logsumexp.
    """
    requested, compiling = state.requested, torch.compiler.is_compiling()
    query, key, value, mask, slopes = tensors[:5]
    assert query is not None
    dropout = options[-1]
    if not is_plain(compiling, *tensors):
        if torchs is not None:
            select_reference(ops.ATTENTION, requested, *tensors, None, *options)
            return torchs(), None
        return call_reference(ops.ATTENTION, requested, *tensors, _seed(query, dropout), *options)  # type: ignore[no-any-return]
    if query.device.type in AUTO_ORDER and torch.is_autocast_enabled(query.device.type):
        query, key, value, mask = autocast(query, key, value, mask)
        tensors[:4] = query, key, value, mask
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[:4])
    if torch.is_grad_enabled() and slopes is not None and slopes.requires_grad:
        raise RuntimeError(f"{ops.NAME}: alibi_slopes requires a gradient, allowed: a tensor that does not")
    selection = select(ops.ATTENTION, requested, training, compiling, *tensors, None, *options)
    if selection is not None and selection.backend == "torch":
        if torchs is not None:
            return torchs(), None
        return ops.ATTENTION.reference(*tensors, _seed(query, dropout), *options)  # type: ignore[no-any-return]
    seed = _seed(query, dropout)
    if training:
        return ops.AttentionFunction.apply(*tensors, seed, *options, requested, selection)  # type: ignore[no-any-return]
    return ops.ATTENTION(requested, *tensors, seed, *options, selection=selection)  # type: ignore[no-any-return]


def _seed(query: Tensor, dropout: float) -> Tensor | None:
    return new_seed(query) if dropout > 0 else None


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale


def _window(name: str, window_size: tuple[int, int], is_causal: bool) -> tuple[int, int]:
    """How many keys before and after its own a query sees; -1 for all."""
    pair = isinstance(window_size, tuple | list) and len(window_size) == 2
    if not pair or not all(isinstance(side, int | torch.SymInt) for side in window_size):
        raise TypeError(f"{name}: window_size is {window_size!r}, allowed: a pair of integers")
    left, right = [max(side, -1) for side in window_size]
    return left, 0 if is_causal else right


def _is_regular(query: Any, key: Any, value: Any, mask: Any, enable_gqa: bool) -> bool:
    """Whether these need no more checks than the op's."""
    tensors = all(isinstance(t, Tensor) and t.dim() == 4 for t in (query, key, value))
    return tensors and mask is None and not enable_gqa and query.shape[:2] == key.shape[:2] == value.shape[:2]


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """query, key, value and mask with four dimensions each, and the batch dimensions that they stand for."""
    if _is_regular(query, key, value, mask, enable_gqa):
        return [query, key, value, mask], tuple(query.shape[:2])
    tensors = [query, key, value]
    if enable_gqa and query.dim() > 2:
        heads = query.shape[-3]
        if key.shape[-3] != value.shape[-3]:
            tensors[1:] = [t.repeat_interleave(heads // t.shape[-3], -3) for t in tensors[1:]]
        lead = torch.broadcast_shapes(*[t.shape[:-3] for t in tensors])
        tensors = [t.expand(*lead, *t.shape[-3:]) for t in tensors]
        batch = (*lead, heads)
    else:
        batch = torch.broadcast_shapes(*[t.shape[:-2] for t in tensors])
        tensors = [t.expand(*batch, *t.shape[-2:]) for t in tensors]
    if mask is not None:
        if len(batch) > 2 and mask.dim() > 3:  # of several batch dimensions, all or none
            mask = mask.expand(*batch[:-1], *mask.shape[-3:])
        mask = _flatten(mask)
    return [*map(_flatten, tensors), mask], tuple(batch)


def _flatten(tensor: Tensor) -> Tensor:
    """(B, H, L, D) of (*, H, L, D), or of fewer dimensions with ones in front."""
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - tensor.dim())]
