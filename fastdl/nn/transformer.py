"""Transformers: torch.nn's encoder and decoder on this package's attention, layer normalisation and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from fastdl import functional
from fastdl.nn.activation import GELU, ReLU
from fastdl.nn.attention import MultiheadAttention
from fastdl.nn.dropout import Dropout
from fastdl.nn.layer_norm import LayerNorm
from fastdl.nn.linear import Linear


def _is_plain(module: Module, *kinds: type[Module]) -> bool:
    """Whether a module is one of these and does nothing more, so that a fused function may stand for it."""
    return type(module) in kinds and not module._forward_hooks and not module._forward_pre_hooks


def _add_norm(residual: Tensor, x: Tensor, dropout: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(x)) and the sum, in one kernel."""
    plain = _is_plain(norm, LayerNorm, torch.nn.LayerNorm) and _is_plain(dropout, Dropout, torch.nn.Dropout)
    if plain and x.dtype == residual.dtype:
        shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
        p = dropout.p if dropout.training else 0.0
        options: dict[str, Any] = {"residual": residual, "dropout_p": p, "return_sum": True}
        return functional.layer_norm(x, shape, weight, bias, eps, **options)  # type: ignore[no-any-return]
    total = residual + dropout(x)
    return norm(total), total


def _activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    if isinstance(activation, Module):
        exact = getattr(activation, "approximate", "none") == "none"
        if _is_plain(activation, ReLU, torch.nn.ReLU):
            return "relu"
        return "gelu" if exact and _is_plain(activation, GELU, torch.nn.GELU) else None
    names: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}
    return names.get(activation)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), the first two in one kernel."""
    name = _activation_name(layer.activation)
    if name is not None and _is_plain(layer.linear1, Linear, torch.nn.Linear):
        x = functional.linear(x, layer.linear1.weight, layer.linear1.bias, activation=name)
    else:
        x = layer.activation(layer.linear1(x))
    return layer.linear2(layer.dropout(x))  # type: ignore[no-any-return]


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network; :class:`torch.nn.TransformerEncoderLayer`.

    Shape: (L, N, E), with ``batch_first`` (N, L, E), or (L, E); returns the same. Same constructor, state_dict, masks
    (True: not seen) and hooks of the layers inside.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        _adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(  # type: ignore[no-any-return]
                x,
                x,
                x,
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )[0]

        if self.norm_first:
            normal, x = _add_norm(src, attend(self.norm1(src)), self.dropout1, self.norm2)
            return x + self.dropout2(_feed_forward(self, normal))  # type: ignore[no-any-return]
        x, _ = _add_norm(src, attend(src), self.dropout1, self.norm1)
        return _add_norm(x, _feed_forward(self, x), self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to the encoder's output, a feed-forward network.

    Shape: tgt (L, N, E) and memory (S, N, E), with ``batch_first`` (N, L, E) and (N, S, E), or without N; returns tgt's
    shape. Constructor, state_dict and masks of :class:`torch.nn.TransformerDecoderLayer`.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        _adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            options = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
            return self.self_attn(x, x, x, need_weights=False, **options)[0]  # type: ignore[no-any-return]

        def attend_memory(x: Tensor) -> Tensor:
            options = {
                "attn_mask": memory_mask,
                "key_padding_mask": memory_key_padding_mask,
                "is_causal": memory_is_causal,
            }
            attention = self.multihead_attn
            return attention(x, memory, memory, need_weights=False, **options)[0]  # type: ignore[no-any-return]

        if self.norm_first:
            normal, x = _add_norm(tgt, attend(self.norm1(tgt)), self.dropout1, self.norm2)
            normal, x = _add_norm(x, attend_memory(normal), self.dropout2, self.norm3)
            return x + self.dropout3(_feed_forward(self, normal))  # type: ignore[no-any-return]
        x, _ = _add_norm(tgt, attend(tgt), self.dropout1, self.norm1)
        x, _ = _add_norm(x, attend_memory(x), self.dropout2, self.norm2)
        return _add_norm(x, _feed_forward(self, x), self.dropout3, self.norm3)[0]


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of encoder layers; :class:`torch.nn.TransformerEncoder`, never by nested tensors.

    Shape: (L, N, E), with ``batch_first`` (N, L, E), or (L, E); returns the same.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if is_causal is None:
            is_causal = mask is not None and not torch.compiler.is_compiling() and _is_causal(mask)
        for layer in self.layers:
            options = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
            src = layer(src, **options)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """A stack of decoder layers, which do all the work; :class:`torch.nn.TransformerDecoder`."""


class Transformer(torch.nn.Transformer):
    """An encoder and a decoder (Vaswani et al., 2017); :class:`torch.nn.Transformer`.

    Shape: src (S, N, E) and tgt (L, N, E), with ``batch_first`` (N, S, E) and (N, L, E), or without N; returns tgt's
    shape. Same constructor, state_dict and masks.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        custom = [*arguments, *keywords.values()]
        for part in (self.encoder, self.decoder):
            if not any(part is given for given in custom):
                _adopt(part)


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask is the causal one."""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    seen = ~mask if mask.dtype == torch.bool else mask == 0
    unseen = mask if mask.dtype == torch.bool else mask == float("-inf")
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return bool(torch.where(above, unseen, seen).all())


_LAYERS: dict[type[Module], type[Module]] = {
    torch.nn.Linear: Linear,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Dropout: Dropout,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
}


def _adopt(model: Module) -> None:
    """Makes the torch layers of a module that was just built, with its parameters drawn as torch's, this package's."""
    for module in model.modules():
        module.__class__ = _LAYERS.get(type(module), type(module))
