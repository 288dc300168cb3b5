"""Recurrent layers and cells, RNN, LSTM and GRU: ops, gradients and implementations by backend.

A layer's recurrence is one op for each direction. What does not depend on the previous step stays outside of it, as
single matmuls of the linear family over all steps: the input's projection before, the weights' gradients after.

Everywhere here:
    mode: 0 RNN with tanh, 1 RNN with relu, 2 LSTM, 3 GRU; G: gates, 1, 1, 4, 3, in torch's order (i f g o; r z n).
    H: the size of the cell; P: the size of h, which is H, or that of an LSTM's projection; B: sequences; T: steps.
    rows: time-major. Unpacked, row t * B + b; packed, with ``batch_sizes`` (T), the rows of step t follow those of the
        steps before it, as in :class:`torch.nn.utils.rnn.PackedSequence`.
    reverse: from each sequence's own last step to its first; where it begins, its state is its row of hx and cx.
    (0,): the shape of what a mode does not have.
Tensors may come with any strides, and empty; outputs are contiguous and share no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdl import accuracy
from fastdl.dispatch import Op, Support
from fastdl.ops import _native
from fastdl.ops.linear import LINEAR_BACKWARD
from fastdl.ops.linear import reference_backward as linear_reference_backward

MODES = ("rnn_tanh", "rnn_relu", "lstm", "gru")
RNN_TANH, RNN_RELU, LSTM, GRU = range(4)
GATES = (1, 1, 4, 3)


# -------------------------------------------------------------------------------------------------------------- stack


def stack(
    run: Callable[..., tuple[Tensor, ...]],
    rows: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Layers on layers, each in one direction or in two: the last one's output, and h_n and c_n of all.

    Args:
        run: (index, input, hx, cx, reverse) -> output (rows, P), h_n (B, P), c_n (B, H): a layer in one direction.
        rows: (rows, I).
        hx: (num_layers * directions, B, P); cx: (num_layers * directions, B, H), LSTM only.
        dropout: between layers.
    """
    directions = 2 if bidirectional else 1
    first_h = hx.unbind(0)
    first_c = [None] * len(first_h) if cx is None else cx.unbind(0)
    last_h, last_c = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            output, h, c = run(index, rows, first_h[index], first_c[index], direction == 1)
            outputs.append(output)
            last_h.append(h)
            last_c.append(c)
        rows = outputs[0] if directions == 1 else torch.cat(outputs, 1)
        if dropout and layer + 1 < num_layers:
            rows = F.dropout(rows, dropout)
    return rows, torch.stack(last_h), torch.stack(last_c)


def biases(mode: int, bias_ih: Tensor, bias_hh: Tensor) -> tuple[Tensor, Tensor | None]:
    """What adds to the projection, (G * H), and GRU's b_hh of n (H), which does not."""
    if mode != GRU:
        return bias_ih + bias_hh, None
    size = bias_hh.shape[0] // 3
    return bias_ih + F.pad(bias_hh[: 2 * size], (0, size)), bias_hh[2 * size :]


# ---------------------------------------------------------------------------------------------------------- reference


def spans(batch: int, batch_sizes: Tensor | None, steps: int, reverse: bool) -> list[tuple[int, int]]:
    """(first row, rows) of every step, in the order of the recurrence."""
    sizes = [batch] * steps if batch_sizes is None else batch_sizes.tolist()
    spans, start = [], 0
    for size in sizes:
        spans.append((start, size))
        start += size
    return spans[::-1] if reverse else spans


def merge(new: Tensor, state: Tensor) -> Tensor:
    """``state`` with its first rows replaced: the others have ended, or not yet begun."""
    return new if new.shape[0] == state.shape[0] else torch.cat([new, state[new.shape[0] :]])


def _step(
    projected: Tensor, h: Tensor, c: Tensor | None, weight_hh: Tensor, bias_hn: Tensor | None, mode: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """One step by torch's operators: h before any projection, c, and the gates that a backward needs."""
    hidden = h @ weight_hh.t()
    if mode == LSTM:
        assert c is not None
        i, f, g, o = (projected + hidden).chunk(4, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        return o * torch.tanh(c), c, [i, f, g, o]
    if mode == GRU:
        size = hidden.shape[1] // 3
        r, z = torch.sigmoid(projected[:, : 2 * size] + hidden[:, : 2 * size]).chunk(2, 1)
        q = hidden[:, 2 * size :] if bias_hn is None else hidden[:, 2 * size :] + bias_hn
        n = torch.tanh(projected[:, 2 * size :] + r * q)
        return n + z * (h - n), None, [r, z, n, q]
    z = projected + hidden
    return (torch.tanh(z) if mode == RNN_TANH else torch.relu(z)), None, []


def reference(
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer in one direction, by torch's operators.

    Args:
        projected: (rows, G * H), input @ weight_ih.T plus every bias that adds to it: both, but for GRU's b_hh of n.
        hx: (B, P); cx: (B, H), LSTM only.
        weight_hh: (G * H, P); bias_hn: (H), GRU's b_hh of n, which r multiplies; weight_hr: (P, H), or None.
        batch_sizes: (T) int64 on the CPU, decreasing, or None: every sequence has ``steps`` steps.
        save: whether to return gates and cells, which the backward needs.

    Returns:
        output (rows, P), h_n (B, P), c_n (B, H) for LSTM, gates (rows, 4 * H): after their activation i f g o for LSTM,
        r z n and W_hn h + b_hn for GRU, cells (rows, H) for LSTM: c of every step.
    """
    h, c = hx, cx
    outputs, gates, cells = [], [], []
    for start, size in spans(hx.shape[0], batch_sizes, steps, reverse):
        previous = None if c is None else c[:size]
        new_h, new_c, step_gates = _step(projected[start : start + size], h[:size], previous, weight_hh, bias_hn, mode)
        if weight_hr is not None:
            new_h = new_h @ weight_hr.t()
        outputs.append(new_h)
        h = merge(new_h, h)
        if new_c is not None and c is not None:
            c = merge(new_c, c)
        if save and step_gates:
            gates.append(torch.cat(step_gates, 1))
        if save and new_c is not None:
            cells.append(new_c)
    return (
        in_row_order(outputs, reverse, hx),
        h.clone(),  # an op's outputs share no memory
        projected.new_empty(0) if c is None else c.clone(),
        in_row_order(gates, reverse, hx),
        in_row_order(cells, reverse, hx),
    )


def in_row_order(parts: list[Tensor], reverse: bool, like: Tensor) -> Tensor:
    """The steps' parts, made in the order of the recurrence, as rows; (0,) of none."""
    return torch.cat(parts[::-1] if reverse else parts) if parts else like.new_empty(0)


def previous_states(states: Tensor, initial: Tensor, batch_sizes: Tensor | None, reverse: bool) -> Tensor:
    """The state that each step began with: (rows, *) of ``states`` (rows, *) and ``initial`` (B, *)."""
    if batch_sizes is None:
        batch = initial.shape[0]
        if reverse:
            return torch.cat([states[batch:], initial])
        return torch.cat([initial, states[: states.shape[0] - batch]])
    sizes, starts = batch_sizes.tolist(), [0, *batch_sizes.cumsum(0).tolist()]
    if not reverse:
        parts = [states[start : start + size] for start, size in zip(starts, sizes[1:], strict=False)]
        return torch.cat([initial, *parts])
    parts = []
    for step, size in enumerate(sizes):
        later = sizes[step + 1] if step + 1 < len(sizes) else 0
        parts += [states[starts[step + 1] : starts[step + 1] + later], initial[later:size]]
    return torch.cat(parts)


def reference_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    batch_sizes: Tensor | None,
    steps: int,
    mode: int,
    reverse: bool,
    grad_gates: Tensor | None = None,
    grad_cells: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward through time by torch's operators, so that double backward follows by autograd.

    Args:
        grad_output (rows, P), grad_h_n (B, P), grad_c_n (B, H): None counts as zeros.
        output, gates, cells: what :func:`reference` returned.
        grad_gates, grad_cells: added to the gradients of gates and cells.

    Returns:
        grad_projected (rows, G * H); for GRU the gradient (rows, H) of W_hn h + b_hn; grad_hx (B, P); for LSTM grad_cx
        (B, H); with ``weight_hr`` the whole gradient (rows, P) of every step's h.
    """
    grad_h = torch.zeros_like(hx) if grad_h_n is None else grad_h_n
    grad_c = grad_c_n if grad_c_n is not None or cx is None else torch.zeros_like(cx)
    c_before = None if cx is None else previous_states(cells, cx, batch_sizes, reverse)
    h_before = previous_states(output, hx, batch_sizes, reverse) if mode == GRU else None
    projected, candidates, totals = [], [], []
    for start, size in reversed(spans(hx.shape[0], batch_sizes, steps, reverse)):
        rows = slice(start, start + size)
        gh = grad_h[:size] if grad_output is None else grad_h[:size] + grad_output[rows]
        more = None if grad_gates is None else grad_gates[rows].chunk(4, 1)
        if mode == LSTM:
            assert c_before is not None and grad_c is not None
            totals.append(gh)
            gc = grad_c[:size] if grad_cells is None else grad_c[:size] + grad_cells[rows]
            dz, gc = _lstm_gradient(
                gh if weight_hr is None else gh @ weight_hr, gc, gates[rows], cells[rows], c_before[rows], more
            )
            projected.append(dz)
            grad_c = merge(gc, grad_c)
            new = dz @ weight_hh
        elif mode == GRU:
            assert h_before is not None
            dz, dq, direct = _gru_gradient(gh, gates[rows], h_before[rows], more)
            projected.append(dz)
            candidates.append(dq)
            new = direct + torch.cat([dz[:, : 2 * dq.shape[1]], dq], 1) @ weight_hh
        else:
            dz = _rnn_gradient(gh, output[rows], mode)
            projected.append(dz)
            new = dz @ weight_hh
        grad_h = merge(new, grad_h)
    backwards = not reverse
    return (
        in_row_order(projected, backwards, hx),
        in_row_order(candidates, backwards, hx),
        grad_h.clone(),
        hx.new_empty(0) if grad_c is None else grad_c.clone(),
        hx.new_empty(0) if weight_hr is None else in_row_order(totals, backwards, hx),
    )


def _lstm_gradient(
    grad_hidden: Tensor, grad_c: Tensor, gates: Tensor, c: Tensor, c_before: Tensor, more: Any
) -> tuple[Tensor, Tensor]:
    """The gradients of the four pre-activations and of the c before, from those of o * tanh(c) and c."""
    i, f, g, o = gates.chunk(4, 1)
    tanh_c = torch.tanh(c)
    grad_c = grad_c + grad_hidden * o * (1 - tanh_c * tanh_c)
    slopes = grad_c * g, grad_c * c_before, grad_c * i, grad_hidden * tanh_c
    di, df, dg, do = slopes if more is None else [slope + extra for slope, extra in zip(slopes, more, strict=True)]
    dz = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], 1)
    return dz, grad_c * f


def _gru_gradient(grad_h: Tensor, gates: Tensor, h_before: Tensor, more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of r, z, n before their activations, of W_hn h + b_hn, and of the h before by way of z alone."""
    r, z, n, q = gates.chunk(4, 1)
    more_r, more_z, more_n, more_q = (0, 0, 0, 0) if more is None else more
    dz = (grad_h * (h_before - n) + more_z) * z * (1 - z)
    dn = (grad_h * (1 - z) + more_n) * (1 - n * n)
    dr = (dn * q + more_r) * r * (1 - r)
    return torch.cat([dr, dz, dn], 1), dn * r + more_q, grad_h * z


def _rnn_gradient(grad_h: Tensor, h: Tensor, mode: int) -> Tensor:
    """The gradient of the pre-activation, from its output."""
    return grad_h * (1 - h * h) if mode == RNN_TANH else torch.where(h <= 0, 0, grad_h)


def reference_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mode: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of one layer, by torch's operators.

    Args:
        input: (B, I); hx: (B, H); cx: (B, H), LSTM only.
        weight_ih: (G * H, I); weight_hh: (G * H, H); bias_ih, bias_hh: (G * H), or None.
        save: whether to return the gates, which the backward needs.

    Returns:
        h (B, H), c (B, H) for LSTM, gates (B, 4 * H) for LSTM and GRU, as in :func:`reference`.
    """
    bias, bias_hn = None, None
    if bias_ih is not None or bias_hh is not None:
        zeros = weight_hh.new_zeros(weight_hh.shape[0])
        bias, bias_hn = biases(mode, zeros if bias_ih is None else bias_ih, zeros if bias_hh is None else bias_hh)
    h, c, gates = _step(F.linear(input, weight_ih, bias), hx, cx, weight_hh, bias_hn, mode)
    nothing = input.new_empty(0)
    return h, nothing if c is None else c, torch.cat(gates, 1) if save and gates else nothing.clone()


def reference_cell_backward(
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    mode: int,
    grad_gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of one step's pre-activations by torch's operators, so that double backward follows by autograd.

    Args:
        grad_h, grad_c: (B, H); None counts as zeros.
        h, c, gates: what :func:`reference_cell` returned.
        grad_gates: added to the gradient of the gates.

    Returns:
        (B, G * H), the gradient of input @ weight_ih.T; for GRU, where it differs, that of hx @ weight_hh.T (B, 3 * H),
        and that of hx by way of z alone (B, H); for LSTM that of cx (B, H).
    """
    nothing = hx.new_empty(0)
    more = None if grad_gates is None else grad_gates.chunk(4, 1)
    grad_h = torch.zeros_like(hx) if grad_h is None else grad_h
    if mode == LSTM:
        assert cx is not None
        grad_c = torch.zeros_like(cx) if grad_c is None else grad_c
        dz, grad_cx = _lstm_gradient(grad_h, grad_c, gates, c, cx, more)
        return dz, nothing, nothing.clone(), grad_cx
    if mode == GRU:
        dz, dq, direct = _gru_gradient(grad_h, gates, hx, more)
        return dz, torch.cat([dz[:, : 2 * dq.shape[1]], dq], 1), direct, nothing
    return _rnn_gradient(grad_h, h, mode), nothing, nothing.clone(), nothing.clone()


# ---------------------------------------------------------------------------------------------------------------- ops


def _check_tensors(
    name: str, first: tuple[str, Tensor], expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    """Raises unless the tensors have these shapes and the first one's dtype and device."""
    first_name, like = first
    for argument, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != like.dtype:
            raise RuntimeError(
                f"{name}: {argument} has dtype {tensor.dtype}, allowed: {like.dtype}, the dtype of {first_name}"
            )
        if tensor.device != like.device:
            raise RuntimeError(
                f"{name}: {argument} is on {tensor.device}, allowed: {like.device}, the device of {first_name}"
            )
        if tensor.shape != shape:
            raise RuntimeError(f"{name}: {argument} has shape {tuple(tensor.shape)}, allowed: {tuple(shape)}")
    if not like.is_floating_point():
        raise RuntimeError(f"{name}: {first_name} has dtype {like.dtype}, allowed: floating-point dtypes")


def _check(
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
    save: bool,
) -> None:
    size = weight_hh.shape[0] // GATES[mode]
    batch, state = hx.shape[0], hx.shape[-1]
    rows = projected.shape[0] if batch_sizes is not None else steps * batch
    _check_tensors(
        MODES[mode],
        ("input", projected),
        {
            "input @ weight_ih.T": (projected, (rows, weight_hh.shape[0])),
            "hx": (hx, (batch, size if weight_hr is None else weight_hr.shape[0])),
            "cx": (cx, (batch, size)),
            "weight_hh": (weight_hh, (GATES[mode] * size, state)),
            "bias_hh": (bias_hn, (size,)),
            "weight_hr": (weight_hr, (state, size)),
        },
    )


def _check_cell(
    input: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    mode: int,
    save: bool,
) -> None:
    name = f"{MODES[mode]}_cell"
    if input.dim() != 2 or hx.dim() != 2 or weight_hh.dim() != 2:
        shapes = ", ".join(str(tuple(t.shape)) for t in (input, hx, weight_hh))
        raise RuntimeError(f"{name}: input, hx and weight_hh have shapes {shapes}, allowed: two dimensions each")
    batch, size = input.shape[0], hx.shape[1]
    gates = GATES[mode] * size
    expected = {
        "hx": (hx, (batch, size)),
        "cx": (cx, (batch, size)),
        "weight_ih": (weight_ih, (gates, input.shape[1])),
        "weight_hh": (weight_hh, (gates, size)),
        "bias_ih": (bias_ih, (gates,)),
        "bias_hh": (bias_hh, (gates,)),
    }
    _check_tensors(name, ("input", input), expected)


def _shape_class(
    projected: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    steps: int,
    mode: int,
    *_: Any,
) -> tuple[str, tuple[int, ...]]:
    label = MODES[mode] + ("" if weight_hr is None else " projected") + ("" if batch_sizes is None else " packed")
    return label, (steps, hx.shape[0], weight_hh.shape[0] // GATES[mode])


def _shape_class_cell(
    input: Tensor, hx: Tensor, cx: Any, weight_ih: Any, weight_hh: Any, b: Any, c: Any, mode: int, *_: Any
) -> tuple[str, tuple[int, ...]]:
    return MODES[mode], (input.shape[0], input.shape[1], hx.shape[1])


def _fake(
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
    save: bool,
    _: str,
) -> tuple[Tensor, ...]:
    rows, size = projected.shape[0], weight_hh.shape[0] // GATES[mode]
    return (
        projected.new_empty(rows, hx.shape[1]),
        projected.new_empty(hx.shape),
        projected.new_empty(0 if cx is None else cx.shape),
        projected.new_empty((rows, 4 * size) if save and mode >= LSTM else 0),
        projected.new_empty((rows, size) if save and mode == LSTM else 0),
    )


def _fake_backward(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    output: Tensor,
    hx: Tensor,
    cx: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    gates: Any,
    cells: Any,
    batch_sizes: Any,
    steps: int,
    mode: int,
    reverse: bool,
    _: str,
) -> tuple[Tensor, ...]:
    rows, columns = output.shape[0], weight_hh.shape[0]
    return (
        output.new_empty(rows, columns),
        output.new_empty((rows, columns // 3) if mode == GRU else 0),
        output.new_empty(hx.shape),
        output.new_empty(0 if cx is None else cx.shape),
        output.new_empty(0 if weight_hr is None else output.shape),
    )


def _fake_cell(
    input: Tensor, hx: Tensor, cx: Tensor | None, a: Any, b: Any, c: Any, d: Any, mode: int, save: bool, _: str
) -> tuple[Tensor, ...]:
    batch, size = hx.shape
    gates = (batch, 4 * size) if save and mode >= LSTM else 0
    return hx.new_empty(hx.shape), hx.new_empty(0 if cx is None else hx.shape), hx.new_empty(gates)


def _fake_cell_backward(
    grad_h: Any, grad_c: Any, hx: Tensor, cx: Any, h: Any, c: Any, gates: Any, mode: int, _: str
) -> tuple[Tensor, ...]:
    batch, size = hx.shape
    return (
        hx.new_empty(batch, GATES[mode] * size),
        hx.new_empty((batch, 3 * size) if mode == GRU else 0),
        hx.new_empty(hx.shape if mode == GRU else 0),
        hx.new_empty(hx.shape if mode == LSTM else 0),
    )


RECURRENCE = Op(
    "recurrence(Tensor projected, Tensor hx, Tensor? cx, Tensor weight_hh, Tensor? bias_hn, Tensor? weight_hr, "
    "Tensor? batch_sizes, SymInt steps, int mode, bool reverse, bool save, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    tensors=7,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
    shape_class=_shape_class,
    check=_check,
)
RECURRENCE_BACKWARD = Op(
    "recurrence_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor hx, "
    "Tensor? cx, Tensor weight_hh, Tensor? weight_hr, Tensor gates, Tensor cells, Tensor? batch_sizes, SymInt steps, "
    "int mode, bool reverse, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=reference_backward,
    tensors=11,
    multiple=accuracy.MULTIPLE_LONG_REDUCTION,
)
RECURRENT_CELL = Op(
    "recurrent_cell(Tensor input, Tensor hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh, int mode, bool save, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake_cell,
    reference=reference_cell,
    tensors=7,
    multiple=accuracy.MULTIPLE,
    shape_class=_shape_class_cell,
    check=_check_cell,
)
RECURRENT_CELL_BACKWARD = Op(
    "recurrent_cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor hx, Tensor? cx, Tensor h, Tensor c, Tensor gates, "
    "int mode, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_cell_backward,
    reference=reference_cell_backward,
    tensors=7,
    multiple=accuracy.MULTIPLE,
)


# ---------------------------------------------------------------------------------------------------- implementations


def _add(backend: str, forward: Any, backward: Any, cell: Any, cell_backward: Any) -> None:
    """Adds a backend by what fills the results of its ops, of which only those that a call does not have are empty.

    Args:
        forward, backward: called with the op's tensors, its results, (rows, B, steps, H, P), mode, reverse and whether
            there is a projection.
        cell, cell_backward: called with the op's tensors, its results and mode.
    """

    @RECURRENCE.implement(backend, Support(_native.FLOATING))
    def recurrence(
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
        save: bool,
    ) -> tuple[Tensor, ...]:
        tensors = projected, hx, cx, weight_hh, bias_hn, weight_hr, batch_sizes
        if projected.numel() == 0:
            return reference(*tensors, steps, mode, reverse, save)
        rows, (batch, state), hidden = projected.shape[0], hx.shape, weight_hh.shape[0] // GATES[mode]
        results = (
            _native.empty((rows, state), projected),
            projected.new_empty((batch, state)),
            projected.new_empty(0 if cx is None else (batch, hidden)),
            _native.empty((rows, 4 * hidden) if save and mode >= LSTM else (0,), projected),
            _native.empty((rows, hidden) if save and mode == LSTM else (0,), projected),
        )
        forward(tensors, results, (rows, batch, steps, hidden, state), mode, reverse, weight_hr is not None)
        return results

    @RECURRENCE_BACKWARD.implement(backend, Support(_native.FLOATING))
    def recurrence_backward(
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        output: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_hh: Tensor,
        weight_hr: Tensor | None,
        gates: Tensor,
        cells: Tensor,
        batch_sizes: Tensor | None,
        steps: int,
        mode: int,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        states = output, hx, cx, weight_hh, weight_hr, gates, cells, batch_sizes
        if output.numel() == 0:
            return reference_backward(grad_output, grad_h_n, grad_c_n, *states, steps, mode, reverse)
        (rows, state), batch, columns = output.shape, hx.shape[0], weight_hh.shape[0]
        hidden = columns // GATES[mode]
        results = (
            _native.empty((rows, columns), output),
            _native.empty((rows, hidden) if mode == GRU else (0,), output),
            output.new_empty((batch, state)),
            output.new_empty(0 if cx is None else (batch, hidden)),
            _native.empty((0,) if weight_hr is None else (rows, state), output),
        )
        tensors = grad_output, grad_h_n, grad_c_n, *states
        backward(tensors, results, (rows, batch, steps, hidden, state), mode, reverse, weight_hr is not None)
        return results

    @RECURRENT_CELL.implement(backend, Support(_native.FLOATING))
    def recurrent_cell(
        input: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        mode: int,
        save: bool,
    ) -> tuple[Tensor, ...]:
        batch, hidden = hx.shape
        results = (
            hx.new_empty((batch, hidden)),
            hx.new_empty((batch, hidden) if mode == LSTM else 0),
            hx.new_empty((batch, 4 * hidden) if save and mode >= LSTM else 0),
        )
        if hx.numel():
            cell((input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh), results, mode)
        return results

    @RECURRENT_CELL_BACKWARD.implement(backend, Support(_native.FLOATING))
    def recurrent_cell_backward(
        grad_h: Tensor | None,
        grad_c: Tensor | None,
        hx: Tensor,
        cx: Tensor | None,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        mode: int,
    ) -> tuple[Tensor, ...]:
        batch, hidden = hx.shape
        columns = GATES[mode] * hidden
        results = (
            hx.new_empty((batch, columns)),
            hx.new_empty((batch, columns) if mode == GRU else 0),
            hx.new_empty((batch, hidden) if mode == GRU else 0),
            hx.new_empty((batch, hidden) if mode == LSTM else 0),
        )
        if hx.numel():
            cell_backward((grad_h, grad_c, hx, cx, h, c, gates), results, mode)
        return results


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


# ------------------------------------------------------------------------------------------------ native: cpu and cuda

Tensors = tuple[Tensor | None, ...]
Prepare = Callable[[Tensors], tuple[Any, list[Any]]]  # tensors as a kernel takes them: what to keep, the arguments


def _native_recurrence(backend: str, name: str, prepare: Prepare) -> Callable[..., None]:
    """What fills the results of recurrence and recurrence_backward: the kernels have the ops' names and order."""

    def fill(
        tensors: Tensors,
        results: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        mode: int,
        reverse: bool,
        projection: bool,
    ) -> None:
        kernels, like = _native.kernels(backend), results[0]
        dtype, (_, batch, _, hidden, state) = _native.DTYPE_CODES[like.dtype], sizes
        size = getattr(kernels, f"{name}_workspace")(dtype, mode, batch, hidden, state, projection)
        workspace = _native.workspace(size, like)
        _kept, arguments = prepare(tensors)
        getattr(kernels, name)(
            dtype,
            mode,
            *arguments,
            *map(_native.address, results),
            *sizes,
            reverse,
            *((_native.allow_tf32(like, "rnn"), 0) if backend == "cuda" else ()),  # 0: the kernels choose their path
            _native.address(workspace),
            _native.context(like),
        )

    return fill


def _native_cell(backend: str, prepare: Prepare) -> Callable[..., None]:
    def fill(tensors: Tensors, results: tuple[Tensor, ...], mode: int) -> None:
        like, input = results[0], tensors[0]
        assert input is not None
        _kept, arguments = prepare(tensors)
        _native.kernels(backend).recurrent_cell(
            _native.DTYPE_CODES[like.dtype],
            mode,
            *arguments,
            *map(_native.address, results),
            like.shape[0],
            input.shape[1],
            like.shape[1],
            *((_native.matmul_allows_tf32(),) if backend == "cuda" else ()),
            _native.context(like),
        )

    return fill


def _native_cell_backward(backend: str) -> Callable[..., None]:
    def fill(tensors: Tensors, results: tuple[Tensor, ...], mode: int) -> None:
        grad_h, grad_c, hx, cx, h, c, gates = tensors
        before, after = (cx, c) if mode == LSTM else (hx, h)
        grad_input, grad_hidden, grad_hx, grad_cx = results
        inputs = _contiguous(grad_h, grad_c, before, after, gates)
        assert hx is not None
        _native.kernels(backend).recurrent_cell_backward(
            _native.DTYPE_CODES[hx.dtype],
            mode,
            *map(_native.address, inputs),
            grad_input.data_ptr(),
            grad_hidden.data_ptr(),
            (grad_cx if mode == LSTM else grad_hx).data_ptr(),
            *hx.shape,
            _native.context(hx),
        )

    return fill


# ---------------------------------------------------------------------------------------------------------------- cpu


def _dense(tensors: Tensors) -> tuple[Any, list[Any]]:
    kept = _contiguous(*tensors)
    return kept, list(map(_native.address, kept))


_add(
    "cpu",
    _native_recurrence("cpu", "recurrence", _dense),
    _native_recurrence("cpu", "recurrence_backward", _dense),
    _native_cell("cpu", _dense),
    _native_cell_backward("cpu"),
)


# --------------------------------------------------------------------------------------------------------------- cuda


def _whole_rows(matrix: Tensor | None) -> tuple[Tensor | None, tuple[int, int]]:
    """A matrix's rows as the kernels read them, (address, stride), and the tensor that holds them.

    A row begins 16-byte aligned and ends with zeros if its length is not a multiple of 16 bytes.
    """
    if matrix is None:
        return None, (0, 0)
    width = 16 // matrix.element_size()
    if missing := -matrix.shape[1] % width:
        matrix = F.pad(matrix, (0, missing))
    # A single row may come with any stride.
    stride = matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]
    if matrix.stride(1) != 1 or stride < matrix.shape[1] or stride % width or matrix.data_ptr() % 16:
        matrix, stride = matrix.clone(memory_format=torch.contiguous_format), matrix.shape[1]
    return matrix, (matrix.data_ptr(), stride)


def _batch_sizes(batch_sizes: Tensor | None, like: Tensor) -> list[Tensor | None]:
    """On the host, and on the device for a kernel of all steps; a CUDA graph can't hold such a copy."""
    if batch_sizes is None:
        return [None, None]
    host = batch_sizes.contiguous()
    capturing = like.is_cuda and torch.cuda.is_current_stream_capturing()
    return [host, None if capturing else host.to(like.device, non_blocking=True)]


def _by_rows(matrices: tuple[int, ...], tensors: Tensors, transposed: bool = False) -> tuple[Any, list[Any]]:
    """Tensors of which those at some places are matrices, that the kernels read by rows."""
    kept, arguments = [], list[Any]()
    for place, tensor in enumerate(tensors):
        if place in matrices:
            tensor, rows = _whole_rows(tensor.t() if transposed and tensor is not None else tensor)
            arguments.append(rows)
        else:
            tensor = None if tensor is None else tensor.contiguous()
            arguments.append(_native.address(tensor))
        kept.append(tensor)
    return kept, arguments


def _sequence_by_rows(matrices: tuple[int, ...], tensors: Tensors, transposed: bool = False) -> tuple[Any, list[Any]]:
    """The same where the last one is batch_sizes."""
    like = next(tensor for tensor in tensors if tensor is not None)
    sizes = _batch_sizes(tensors[-1], like)
    kept, arguments = _by_rows(matrices, tensors[:-1], transposed)
    return (kept, sizes), [*arguments, *map(_native.address, sizes)]


_add(
    "cuda",
    _native_recurrence("cuda", "recurrence", functools.partial(_sequence_by_rows, (3, 5))),
    _native_recurrence("cuda", "recurrence_backward", functools.partial(_sequence_by_rows, (6, 7), transposed=True)),
    _native_cell("cuda", functools.partial(_by_rows, (0, 1, 3, 4))),
    _native_cell_backward("cuda"),
)


# ------------------------------------------------------------------------------------------------------------- triton


def _starts(batch_sizes: Tensor | None, like: Tensor) -> Tensor | None:
    """The first row of every step of packed sequences, and the end, on the device of ``like``."""
    if batch_sizes is None:
        return None
    starts = F.pad(batch_sizes.cumsum(0), (1, 0))
    if like.is_cuda and torch.cuda.is_current_stream_capturing():  # a CUDA graph can't hold a copy, but numbers
        return torch.stack([torch.full((), start, device=like.device) for start in starts.tolist()])
    return starts.to(like.device, non_blocking=True)


def _present(results: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [result if result.numel() else None for result in results]


def _triton_recurrence(name: str) -> Callable[..., None]:
    def fill(
        tensors: Tensors,
        results: tuple[Tensor, ...],
        sizes: tuple[int, ...],
        mode: int,
        reverse: bool,
        projection: bool,
    ) -> None:
        from fastdl.kernels import rnn as kernels

        *given, batch_sizes = tensors
        like, steps = results[0], sizes[2]
        inputs = *_contiguous(*given), _starts(batch_sizes, like)
        allow_tf32 = _native.allow_tf32(like, "rnn")
        getattr(kernels, name)(*inputs, *_present(results), steps, mode, reverse, allow_tf32=allow_tf32)

    return fill


def _triton_cell(tensors: Tensors, results: tuple[Tensor, ...], mode: int) -> None:
    from fastdl.kernels import rnn as kernels

    allow_tf32 = _native.matmul_allows_tf32()  # torch's cells are made of matmuls
    kernels.recurrent_cell(*_contiguous(*tensors), *_present(results), mode, allow_tf32=allow_tf32)


def _triton_cell_backward(tensors: Tensors, results: tuple[Tensor, ...], mode: int) -> None:
    from fastdl.kernels import rnn as kernels

    kernels.recurrent_cell_backward(*_contiguous(*tensors), *_present(results), mode)


_add(
    "triton",
    _triton_recurrence("recurrence"),
    _triton_recurrence("recurrence_backward"),
    _triton_cell,
    _triton_cell_backward,
)


# ----------------------------------------------------------------------------------------------------------- autograd


class RecurrenceFunction(torch.autograd.Function):
    """Autograd of one layer in one direction.

    Saves output, gates and cells. Gates and cells are outputs of the Function, so that double backward flows through
    them like through any other.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        requested: str,
        selection: Any,
    ) -> Any:
        ctx.set_materialize_grads(False)
        arguments = projected, hx, cx, weight_hh, bias_hn, weight_hr, batch_sizes, steps, mode, reverse, True
        results = RECURRENCE(requested, *arguments, selection=selection)
        output, _, _, gates, cells = results
        ctx.save_for_backward(output, hx, cx, weight_hh, weight_hr, gates, cells, batch_sizes)
        ctx.arguments = steps, mode, reverse, requested
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        steps, mode, reverse, requested = ctx.arguments
        output, hx, _, _, _, gates, cells, batch_sizes = saved = ctx.saved_tensors
        needs_hx, needs_cx, needs_weight, needs_bias, needs_projection = ctx.needs_input_grad[1:6]
        if all(grad is None for grad in grads):
            return (None,) * 12
        double = (torch.is_grad_enabled() or grads[3] is not None or grads[4] is not None) and not (
            torch.compiler.is_compiling()
        )
        arguments = *grads[:3], *saved, steps, mode, reverse
        if double:
            results = reference_backward(*arguments, *grads[3:])
        else:
            results = RECURRENCE_BACKWARD(requested, *arguments)
        grad_projected, grad_q, grad_hx, grad_cx, grad_h = results
        grad_weight = grad_bias = grad_weight_hr = None
        if needs_weight:
            grad = grad_projected
            if mode == GRU:
                grad = torch.cat([grad[:, : 2 * grad_q.shape[1]], grad_q], 1)
            grad_weight = _weight_gradient(requested, grad, previous_states(output, hx, batch_sizes, reverse), double)
        if needs_bias:
            grad_bias = grad_q.sum(0)
        if needs_projection:
            hidden = gates[:, 3 * cells.shape[1] :] * torch.tanh(cells).to(gates.dtype)
            grad_weight_hr = _weight_gradient(requested, grad_h, hidden, double)
        return (
            grad_projected,
            grad_hx if needs_hx else None,
            grad_cx if needs_cx else None,
            grad_weight,
            grad_bias,
            grad_weight_hr,
            *(None,) * 6,
        )


def _weight_gradient(requested: str, grad: Tensor, input: Tensor, double: bool) -> Tensor:
    """grad.T @ input, of rows, by the linear family."""
    if double:
        return grad.t() @ input
    gradient: Tensor = LINEAR_BACKWARD(requested, grad, input, None, None, 0, 0.0, False)[0]
    return gradient


class RecurrentCellFunction(torch.autograd.Function):
    """Autograd of a cell: saves its inputs, its outputs and the gates, which are an output too, for double backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        mode: int,
        requested: str,
        selection: Any,
    ) -> Any:
        ctx.set_materialize_grads(False)
        arguments = input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, mode, True
        results = RECURRENT_CELL(requested, *arguments, selection=selection)
        ctx.save_for_backward(input, weight_ih, weight_hh, hx, cx, *results)
        ctx.arguments = mode, requested
        return results

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_gates: Tensor | None) -> Any:
        mode, requested = ctx.arguments
        input, weight_ih, weight_hh, hx, cx, h, c, gates = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad_h is None and grad_c is None and grad_gates is None:
            return (None,) * 10
        double = (torch.is_grad_enabled() or grad_gates is not None) and not torch.compiler.is_compiling()
        if double:
            results = reference_cell_backward(grad_h, grad_c, hx, cx, h, c, gates, mode, grad_gates)
        else:
            results = RECURRENT_CELL_BACKWARD(requested, grad_h, grad_c, hx, cx, h, c, gates, mode)
        grad, grad_hidden, direct, grad_cx = results
        grad_input, grad_weight_ih, grad_bias_ih = _product_gradients(
            requested, grad, input, weight_ih, (needs[0], needs[3], needs[5]), double
        )
        grad_hx, grad_weight_hh, grad_bias_hh = _product_gradients(
            requested, grad_hidden if mode == GRU else grad, hx, weight_hh, (needs[1], needs[4], needs[6]), double
        )
        if grad_hx is not None and mode == GRU:
            grad_hx = grad_hx + direct
        return (
            grad_input,
            grad_hx,
            grad_cx if needs[2] else None,
            grad_weight_ih,
            grad_weight_hh,
            grad_bias_ih,
            grad_bias_hh,
            *(None,) * 3,
        )


def _product_gradients(
    requested: str, grad: Tensor, input: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], double: bool
) -> list[Tensor | None]:
    """The gradients of input, weight and bias of input @ weight.T + bias, as far as they are needed."""
    if not any(needs):
        return [None] * 3
    arguments = grad, input if needs[1] else None, weight if needs[0] else None, None, 0, 0.0, needs[2]
    rest = iter(linear_reference_backward(*arguments) if double else LINEAR_BACKWARD(requested, *arguments))
    return [next(rest) if need else None for need in needs]
