"""Multi-head attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import functional


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Attention of several heads between linear layers (Vaswani et al., 2017); :class:`torch.nn.MultiheadAttention`.

    Shape: query (L, N, E), key (S, N, kdim), value (S, N, vdim), with ``batch_first`` (N, L, E) and so on, or without
    N; returns the output, of query's shape, and the weights (N, L, S), by head (N, H, L, S), or None. Same constructor,
    state_dict, masks (True: not seen) and errors. Without ``need_weights`` no L x S matrix is made.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched, batch_first = query.dim() == 3, self.batch_first or query.dim() == 2
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        q, k, v = [t if batched else t[None] for t in self._project(query, key, value)]
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        # (N, H, length, size), views
        q, k, v = [
            t.unflatten(-1, (self.num_heads, self.head_dim)).permute(*((0, 2, 1, 3) if batch_first else (1, 2, 0, 3)))
            for t in (q, k, v)
        ]
        k, v, more = self._more_keys(k, v)
        causal = is_causal and not need_weights and not (more and key_padding_mask is not None)
        mask = self._mask(q, None if causal else attn_mask, key_padding_mask, more)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * (1 / math.sqrt(self.head_dim))) @ k.mT
            if mask is not None:
                scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            weights = functional.dropout(functional.softmax(scores, -1), dropout, dropout > 0)
            output = weights @ v
        else:
            window = (-1, 0) if causal else (-1, -1)
            mask = ~mask if mask is not None and mask.dtype == torch.bool else mask
            output = functional.scaled_dot_product_attention(q, k, v, mask, dropout, window_size=window)
        output = output.permute(*((0, 2, 1, 3) if batch_first else (2, 0, 1, 3))).flatten(2)
        output = functional.linear(output, self.out_proj.weight, self.out_proj.bias)
        output = output if batched else output[0]
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        name = "MultiheadAttention"
        dims = query.dim()
        for argument, tensor in (("query", query), ("key", key), ("value", value)):
            if dims not in (2, 3) or tensor.dim() != dims:
                raise AssertionError(
                    f"{name}: {argument} has shape {tuple(tensor.shape)}, allowed: 2 or 3 dimensions, as query's {dims}"
                )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"{name}: query has size {query.shape[-1]}, allowed: embed_dim {self.embed_dim}")
        length, keys = (t.shape[1 if self.batch_first and dims == 3 else 0] for t in (query, key))
        batch = query.shape[0 if self.batch_first else 1] if dims == 3 else 1
        if key.shape[:-1] != value.shape[:-1] or (self._qkv_same_embed_dim and key.shape != value.shape):
            raise AssertionError(
                f"{name}: value has shape {tuple(value.shape)}, allowed: key's shape {tuple(key.shape)}, but for vdim"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError(f"{name}: attn_mask is None, allowed with the hint is_causal: the causal mask")
        padding_shape = (batch, keys) if dims == 3 else (keys,)
        masks: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
            ("key_padding_mask", key_padding_mask, [padding_shape]),
            ("attn_mask", attn_mask, [(length, keys), (batch * self.num_heads, length, keys)]),
        ]
        for argument, mask, allowed in masks:
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"{name}: {argument} has dtype {mask.dtype}, allowed: bool or floating-point")
            if tuple(mask.shape) not in allowed:
                kind = RuntimeError if mask is attn_mask else AssertionError
                raise kind(
                    f"{name}: {argument} has shape {tuple(mask.shape)}, allowed: {' or '.join(map(str, allowed))}"
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if bias is None else bias.chunk(3)
            inputs = zip((query, key, value), weights, biases, strict=True)
            return tuple(functional.linear(input, weight, bias) for input, weight, bias in inputs)
        if query is key and key is value:
            return functional.linear(query, weight, bias).chunk(3, -1)
        same = key is value
        sizes = [self.embed_dim, 2 * self.embed_dim] if same else [self.embed_dim] * 3
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        inputs = zip((query, key) if same else (query, key, value), weight.split(sizes), biases, strict=True)
        q, *rest = [functional.linear(input, weight, bias) for input, weight, bias in inputs]
        return q, *(rest[0].chunk(2, -1) if same else rest)

    def _more_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with the ones of add_bias_kv and add_zero_attn at their end, and how many those are."""
        batch, heads, _, size = k.shape
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for parts, more in ((keys, self.bias_k), (values, self.bias_v)):
                parts.append(more.to(k.dtype).view(1, heads, 1, size).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            for parts in (keys, values):
                parts.append(k.new_zeros(()).expand(batch, heads, 1, size))
        if len(keys) == 1:
            return k, v, 0
        return torch.cat(keys, 2), torch.cat(values, 2), len(keys) - 1

    def _mask(self, q: Tensor, attn: Tensor | None, padding: Tensor | None, more: int) -> Tensor | None:
        """Both masks as one (1 or N, 1 or H, 1 or L, S): boolean, True where nothing is seen, or to add to scores."""
        masks = []
        if attn is not None:
            masks.append(attn[None, None] if attn.dim() == 2 else attn.unflatten(0, (-1, self.num_heads)))
        if padding is not None:
            masks.append(padding[:, None, None])
        if not masks:
            return None
        masks = [F.pad(mask, (0, more)) for mask in masks] if more else masks
        if len(masks) == 1:
            return masks[0]
        if all(mask.dtype == torch.bool for mask in masks):
            return masks[0] | masks[1]
        first, second = [
            torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
            for mask in masks
        ]
        return first + second
