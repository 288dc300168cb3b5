"""Recurrent layers and their cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdl.dispatch import AUTO_ORDER, Selection, in_transform, is_plain, state
from fastdl.functional._call import autocast, call_reference, select
from fastdl.functional.linear import linear
from fastdl.ops import rnn as ops


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber, 1997; Gers et al., 2000), as :func:`torch.lstm_cell`.

    i, f, o = sigmoid(W_i x + U_i h + b), and so on, g = tanh(...); c' = f * c + i * g; h' = o * tanh(c').

    Args:
        input: (B, I); float32, float16, bfloat16 or float64.
        hx: h (B, H) and c (B, H), of the same dtype and device, like all that follows.
        w_ih: (4 * H, I); w_hh: (4 * H, H); the rows of i, f, g and o in this order.
        b_ih, b_hh: (4 * H,) or None.

    Returns:
        h' (B, H) and c' (B, H).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    h, c = _cell(ops.LSTM, input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh)
    return h, c


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """One step of a gated recurrent unit (Cho et al., 2014), as :func:`torch.gru_cell`.

    r, z = sigmoid(...); n = tanh(W_n x + b_ih + r * (U_n h + b_hh)); h' = (1 - z) * n + z * h.

    Args, errors: as :func:`lstm_cell`, with three gates, r, z and n, and no c.
    """
    return _cell(ops.GRU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """tanh(input @ w_ih.T + b_ih + hx @ w_hh.T + b_hh) (Elman, 1990), as :func:`torch.rnn_tanh_cell`.

    Args, errors: as :func:`lstm_cell`, with one gate and no c.
    """
    return _cell(ops.RNN_TANH, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """relu(input @ w_ih.T + b_ih + hx @ w_hh.T + b_hh), as :func:`torch.rnn_relu_cell`.

    Args, errors: as :func:`lstm_cell`, with one gate and no c.
    """
    return _cell(ops.RNN_RELU, input, hx, None, w_ih, w_hh, b_ih, b_hh)[0]


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers over a batch of sequences, as :func:`torch.lstm`.

    Args:
        input: (T, B, I); (B, T, I) with ``batch_first``; with ``batch_sizes`` (rows, I), the data of a PackedSequence.
        hx: the first h (num_layers * D, B, P) and c (num_layers * D, B, H) of every layer and of its D directions.
        params: for every layer and direction weight_ih (4 * H, I), weight_hh (4 * H, P), with ``has_biases`` bias_ih
            and bias_hh (4 * H,), with a projection (Sak et al., 2014) weight_hr (P, H).
        dropout: between layers, if ``train``.
        bidirectional: whether each layer also runs backwards: D = 2.
        batch_sizes: (T) int64 on the CPU, decreasing: the sequences that have each step, as in a PackedSequence.

    Returns:
        The last layer's h at every step, shaped as the input, (..., D * P); the last h and c, shaped as hx.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        fastdl.UnsupportedError: a backend named by ``use_backend`` that can't do this call.
    """
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    output, h_n, c_n = _layers(ops.LSTM, input, hx[0], hx[1], params, *options, batch_sizes)
    return output, h_n, c_n


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers over a batch of sequences, as :func:`torch.gru`; see :func:`lstm`, without c."""
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    output, h_n, *_ = _layers(ops.GRU, input, hx, None, params, *options, batch_sizes)
    return output, h_n


def rnn_tanh(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of tanh layers over a batch of sequences, as :func:`torch.rnn_tanh`; see :func:`lstm`, without c."""
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    output, h_n, *_ = _layers(ops.RNN_TANH, input, hx, None, params, *options, batch_sizes)
    return output, h_n


def rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of relu layers over a batch of sequences, as :func:`torch.rnn_relu`; see :func:`lstm`, without c."""
    options = has_biases, num_layers, dropout, train, bidirectional, batch_first
    output, h_n, *_ = _layers(ops.RNN_RELU, input, hx, None, params, *options, batch_sizes)
    return output, h_n


_TORCH_CELLS: tuple[Callable[..., Any], ...] = (
    torch.rnn_tanh_cell,
    torch.rnn_relu_cell,
    torch.lstm_cell,
    torch.gru_cell,
)
_TORCH_LAYERS: tuple[Callable[..., Any], ...] = (torch.rnn_tanh, torch.rnn_relu, torch.lstm, torch.gru)


def _cell(
    mode: int,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    """h and, for LSTM, c."""
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    tensors = input, hx, cx, w_ih, w_hh, b_ih, b_hh
    if not is_plain(compiling, *tensors):
        return call_reference(ops.RECURRENT_CELL, requested, *tensors, mode, False)[:2]  # type: ignore[no-any-return]
    casts = input.device.type in AUTO_ORDER and torch.is_autocast_enabled(input.device.type)
    given = tensors
    if casts:
        tensors = autocast(*tensors)
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    selection = select(ops.RECURRENT_CELL, requested, training, compiling, *tensors, mode, training)
    if selection is not None and selection.backend == "torch":
        result = _TORCH_CELLS[mode](given[0], hx if cx is None else (hx, cx), *given[3:])
        return result if isinstance(result, tuple) else (result,)
    results: tuple[Tensor, ...]
    if training:
        results = ops.RecurrentCellFunction.apply(*tensors, mode, requested, selection)
    else:
        results = ops.RECURRENT_CELL(requested, *tensors, mode, False, selection=selection)
    h, c, _ = results
    if casts and input.device.type == "cpu" and mode >= ops.LSTM:
        h, c = h.to(hx.dtype), c.to(hx.dtype)  # as torch's, which casts the products alone there
    return h, c


def _layers(
    mode: int,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """The last layer's output, h_n and c_n: a stack of recurrences, or torch's own function as a whole."""
    packed = batch_sizes is not None
    steps = len(batch_sizes) if batch_sizes is not None else input.shape[1 if batch_first else 0]
    if steps == 0 or _torch_is_better(mode, input, hx, cx, params, has_biases, batch_sizes, steps):
        states = hx if cx is None else (hx, cx)
        options = params, has_biases, num_layers, dropout, train, bidirectional
        if packed:
            return _TORCH_LAYERS[mode](input, batch_sizes, states, *options)  # type: ignore[no-any-return]
        return _TORCH_LAYERS[mode](input, states, *options, batch_first)  # type: ignore[no-any-return]
    dtypes = hx.dtype, None if cx is None else cx.dtype
    casts = input.device.type in AUTO_ORDER and torch.is_autocast_enabled(input.device.type)
    if casts:
        input, hx, cx, *params = autocast(input, hx, cx, *params)
    per_direction = len(params) // hx.shape[0]
    projection = per_direction == (5 if has_biases else 3)

    def run(index: int, rows: Tensor, hx: Tensor, cx: Tensor | None, reverse: bool) -> tuple[Tensor, ...]:
        w_ih, w_hh, *rest = params[index * per_direction : (index + 1) * per_direction]
        w_hr = rest[-1] if projection else None
        bias, bias_hn = ops.biases(mode, *rest[:2]) if has_biases else (None, None)
        projected = linear(rows, w_ih, bias)
        return _recurrence(projected, hx, cx, w_hh, bias_hn, w_hr, batch_sizes, steps, mode, reverse)

    time_major = input.transpose(0, 1) if batch_first and not packed else input
    rows = time_major.reshape(-1, input.shape[-1])
    output, h_n, c_n = ops.stack(run, rows, hx, cx, num_layers, bidirectional, dropout if train else 0.0)
    if casts and input.device.type == "cpu":  # as torch's, where oneDNN does not take the whole layer
        if mode == ops.GRU:
            output, h_n = output.to(dtypes[0]), h_n.to(dtypes[0])
        if projection:
            c_n = c_n.to(dtypes[1])
    if not packed:
        output = output.view(*time_major.shape[:2], output.shape[-1])
    return output.transpose(0, 1) if batch_first and not packed else output, h_n, c_n


def _torch_is_better(
    mode: int,
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    batch_sizes: Tensor | None,
    steps: int,
) -> bool:
    """Whether torch's own function takes a whole stack of layers: one decision for all of them, by the first one."""
    requested = state.requested
    if torch.compiler.is_compiling():
        return False  # the ops choose at run time; torch's own function has no graph for training
    plain = is_plain(False, input, hx, cx, *params)
    if requested not in ("auto", "torch") and plain:
        return False
    w_hh, dtype, device = params[1], input.dtype, input.device
    if device.type in AUTO_ORDER and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)

    def arguments() -> tuple[Any, ...]:
        """The first recurrence's, as far as a decision asks: one number stands for what is not there yet."""
        one = torch.empty((), dtype=dtype, device=device)
        (gates, state_size), batch = w_hh.shape, hx.shape[1]
        size = gates // ops.GATES[mode]
        return (
            one.expand(len(input) if batch_sizes is not None else steps * batch, gates),
            one.expand(batch, state_size),
            None if cx is None else one.expand(batch, size),
            one.expand(gates, state_size),
            one.expand(size) if has_biases and mode == ops.GRU else None,
            None if state_size == size else one.expand(state_size, size),
            batch_sizes,
            steps,
            mode,
            False,
            False,
        )

    if not plain:
        if requested not in ("auto", "torch"):
            call_reference(ops.RECURRENCE, requested, *arguments())
        if in_transform():
            return False  # torch's own function has no rule for vmap and forward mode, its operators have
        selection = Selection("torch", "tensor subclass or a function mode", torch.lstm)
    else:
        training = torch.is_grad_enabled() and (input.requires_grad or w_hh.requires_grad or params[0].requires_grad)
        key = mode, dtype, device, input.shape, w_hh.shape, hx.shape[1], has_biases, batch_sizes is None, steps
        selection = ops.RECURRENCE.select_by(key, requested, arguments, training)
    if selection.backend == "torch" and state.traces:
        ops.RECURRENCE.record(selection, arguments())
    return selection.backend == "torch"


def _recurrence(
    projected: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    steps: int,
    mode: int,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """One layer in one direction: output, h_n and c_n; the arguments are those of :func:`fastdl.ops.rnn.reference`."""
    requested = state.requested
    compiling = torch.compiler.is_compiling()
    tensors = projected, hx, cx, weight_hh, bias_hn, weight_hr
    arguments = *tensors, batch_sizes, steps, mode, reverse
    if not is_plain(compiling, *tensors):
        return call_reference(ops.RECURRENCE, requested, *arguments, False)[:3]  # type: ignore[no-any-return]
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    selection = select(ops.RECURRENCE, requested, training, compiling, *arguments, training)
    selection = None if compiling else selection
    results: tuple[Tensor, ...]
    if training:
        results = ops.RecurrenceFunction.apply(*arguments, requested, selection)
    else:
        results = ops.RECURRENCE(requested, *arguments, False, selection=selection)
    return results[:3]
