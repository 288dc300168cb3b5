"""Recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastdl import functional
from fastdl.ops import rnn as _rnn

_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": functional.lstm,
    "GRU": functional.gru,
    "RNN_TANH": functional.rnn_tanh,
    "RNN_RELU": functional.rnn_relu,
}


class _Layer(torch.nn.RNNBase):
    """What the three layers share: torch's checks and layouts around one function."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        self._update_flat_weights()
        lstm, packed = self.mode == "LSTM", isinstance(input, PackedSequence)
        data, batch_sizes, sorted_indices, unsorted_indices = input if packed else (input, None, None, None)
        batch_axis = 0 if self.batch_first else 1
        unbatched = not packed and data.dim() == 2
        if not packed:
            self._check_dimensions(data, hx)
        if unbatched:
            data = data.unsqueeze(batch_axis)
        if hx is None:
            hx = self._zeros(data, batch_sizes)
        elif unbatched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1)) if lstm else hx.unsqueeze(1)
        hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(data, hx, batch_sizes)
        output, *states = self._run(data, hx, batch_sizes)
        if unbatched:
            output, states = output.squeeze(batch_axis), [state.squeeze(1) for state in states]
        if packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)  # type: ignore[assignment]
        return output, self.permute_hidden(tuple(states) if lstm else states[0], unsorted_indices)  # type: ignore[arg-type]

    def _check_dimensions(self, input: Tensor, hx: Any) -> None:
        dimensions = input.dim()
        if dimensions not in (2, 3):
            name = self.mode.partition("_")[0]
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dimensions}D instead")
        states = () if hx is None else hx if self.mode == "LSTM" else (hx,)
        if any(state.dim() != dimensions for state in states):
            batched, names = ("unbatched", "batched")[dimensions - 2], ("hx", "hx and cx")[len(states) - 1]
            got = ", ".join(f"{state.dim()}-D" for state in states)
            raise RuntimeError(
                f"For {batched} {dimensions}-D input, {names} should also be {dimensions}-D but got {got} tensors"
            )

    def _zeros(self, data: Tensor, batch_sizes: Tensor | None) -> Any:
        h = data.new_zeros(self.get_expected_hidden_size(data, batch_sizes))
        if self.mode != "LSTM":
            return h
        return h, data.new_zeros((*h.shape[:2], self.hidden_size))

    def _run(self, data: Tensor, hx: Any, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
        """The output and the last states."""
        return _FUNCTIONS[self.mode](
            data,
            hx,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes=batch_sizes,
        )


class LSTM(_Layer, torch.nn.LSTM):
    """A stack of LSTM layers; :class:`torch.nn.LSTM` on this package's kernels.

    Constructor, shapes, state_dict and errors are torch's: padded, unbatched and packed input, projections, dropout
    between layers, both directions. Keyword-only options beyond torch's, which run step by step:

    Args:
        layer_norm: layer normalisation (Ba et al., 2016): all four gates are LN(W_ih x) + LN(W_hh h) + b_ih + b_hh, and
            h = o * tanh(LN(c)), each LN with a weight and a bias of its own. They are parameters after torch's:
            ``weight_norm_ih_l0``, ``bias_norm_ih_l0`` and ``..._hh_l0`` (4 * hidden_size,), ``..._c_l0``
            (hidden_size,), for every layer and, with ``_reverse``, direction.
        zoneout: zoneout (Krueger et al., 2016): the probability with which each number of c and of h keeps its value of
            the step before, at each step of training; in eval mode the two are mixed by it. One for both, or (c, h).
        recurrent_dropout: variational dropout (Gal and Ghahramani, 2016) of h on its way into the gates: one mask a
            sequence, layer and direction, the same at all of its steps.

    Raises:
        ValueError: a probability outside [0, 1); else as torch's.
    """

    # In the class: a layer that replace_layers has taken over has them too.
    layer_norm: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    recurrent_dropout: float = 0.0

    def __init__(
        self,
        *args: Any,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        zoneout_c, zoneout_h = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
        for name, probability in (
            ("zoneout", zoneout_c),
            ("zoneout", zoneout_h),
            ("recurrent_dropout", recurrent_dropout),
        ):
            if not 0 <= probability < 1:
                raise ValueError(f"LSTM: {name} is {probability}, allowed: 0 <= {name} < 1")
        self.zoneout = float(zoneout_c), float(zoneout_h)
        self.recurrent_dropout = float(recurrent_dropout)
        self.layer_norm = layer_norm
        if layer_norm:
            like = next(self.parameters())
            for suffix in self._suffixes():
                for name, size in (("ih", 4), ("hh", 4), ("c", 1)):
                    for kind in ("weight", "bias"):
                        start = like.new_full((size * self.hidden_size,), float(kind == "weight"))
                        self.register_parameter(f"{kind}_norm_{name}_{suffix}", torch.nn.Parameter(start))

    def reset_parameters(self) -> None:
        """As torch's; the layer norms start at weight 1 and bias 0."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if "_norm_" in name:
                torch.nn.init.constant_(parameter, float(name.startswith("weight")))

    def extra_repr(self) -> str:
        """As torch's, with the options that are on."""
        options = [("layer_norm", False), ("zoneout", (0.0, 0.0)), ("recurrent_dropout", 0.0)]
        changed = [f"{name}={getattr(self, name)}" for name, default in options if getattr(self, name) != default]
        return ", ".join([super().extra_repr(), *changed])

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _run(self, data: Tensor, hx: Any, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
        if not (self.layer_norm or any(self.zoneout) or self.recurrent_dropout):
            return super()._run(data, hx, batch_sizes)
        transposed = self.batch_first and batch_sizes is None
        time_major = data.transpose(0, 1) if transposed else data
        steps = len(time_major) if batch_sizes is None else len(batch_sizes)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        suffixes = self._suffixes()

        def run(index: int, rows: Tensor, hx: Tensor, cx: Tensor, reverse: bool) -> tuple[Tensor, ...]:
            spans = _rnn.spans(hx.shape[0], batch_sizes, steps, reverse)
            return self._regularized(suffixes[index], rows, hx, cx, spans, reverse)

        rows, dropout = time_major.reshape(-1, data.shape[-1]), self.dropout if self.training else 0.0
        output, h_n, c_n = _rnn.stack(run, rows, hx[0], hx[1], self.num_layers, self.bidirectional, dropout)
        if batch_sizes is None:
            output = output.view(*time_major.shape[:2], output.shape[-1])
        return output.transpose(0, 1) if transposed else output, h_n, c_n

    def _regularized(
        self, suffix: str, rows: Tensor, h: Tensor, c: Tensor, spans: list[tuple[int, int]], reverse: bool
    ) -> tuple[Tensor, ...]:
        """One layer in one direction with the options that are on; output (rows, P), h_n and c_n."""

        def parameter(name: str) -> Tensor | None:
            return getattr(self, f"{name}_{suffix}", None)

        def normalize(tensor: Tensor, name: str) -> Tensor:
            if not self.layer_norm:
                return tensor
            return F.layer_norm(
                tensor, tensor.shape[-1:], parameter(f"weight_norm_{name}"), parameter(f"bias_norm_{name}")
            )

        weight_ih, weight_hh, weight_hr = parameter("weight_ih"), parameter("weight_hh"), parameter("weight_hr")
        assert weight_ih is not None and weight_hh is not None
        projected = normalize(functional.linear(rows, weight_ih), "ih")
        if self.bias:
            projected = projected + (parameter("bias_ih") + parameter("bias_hh"))  # type: ignore[operator]
        mask = F.dropout(torch.ones_like(h), self.recurrent_dropout, self.training)
        outputs = []
        for start, size in spans:
            old_h, old_c = h[:size], c[:size]
            hidden = functional.linear(old_h * mask[:size] if self.recurrent_dropout else old_h, weight_hh)
            i, f, g, o = (projected[start : start + size] + normalize(hidden, "hh")).chunk(4, 1)
            new_c = functional.sigmoid(f) * old_c + functional.sigmoid(i) * functional.tanh(g)
            new_h = functional.sigmoid(o) * functional.tanh(normalize(new_c, "c"))
            if weight_hr is not None:
                new_h = functional.linear(new_h, weight_hr)
            new_c, new_h = self._zone_out(new_c, old_c, 0), self._zone_out(new_h, old_h, 1)
            outputs.append(new_h)
            h, c = _rnn.merge(new_h, h), _rnn.merge(new_c, c)
        return _rnn.in_row_order(outputs, reverse, h), h, c

    def _zone_out(self, new: Tensor, old: Tensor, which: int) -> Tensor:
        probability = self.zoneout[which]
        if not probability:
            return new
        if not self.training:
            return new + probability * (old - new)
        return torch.where(torch.rand_like(new) < probability, old, new)


class GRU(_Layer, torch.nn.GRU):
    """A stack of gated recurrent layers; :class:`torch.nn.GRU` on this package's kernels.

    Constructor, shapes, state_dict and errors are torch's.
    """


class RNN(_Layer, torch.nn.RNN):
    """A stack of simple recurrent layers, tanh or relu; :class:`torch.nn.RNN` on this package's kernels.

    Constructor, shapes, state_dict and errors are torch's.
    """


class LSTMCell(torch.nn.LSTMCell):
    """One step of an LSTM; :class:`torch.nn.LSTMCell` on this package's kernels.

    Shape: (B, input_size) or (input_size,), and h and c (B, hidden_size) or (hidden_size,), zeros if not given -> the
    new h and c. Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = _cell(self, "LSTMCell", input, hx, functional.lstm_cell)
        return h, c


class GRUCell(torch.nn.GRUCell):
    """One step of a gated recurrent unit; :class:`torch.nn.GRUCell` on this package's kernels.

    Shape: as :class:`LSTMCell`, without c. Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell(self, "GRUCell", input, hx, functional.gru_cell)  # type: ignore[no-any-return]


class RNNCell(torch.nn.RNNCell):
    """One step of a simple recurrent layer; :class:`torch.nn.RNNCell` on this package's kernels.

    Shape: as :class:`LSTMCell`, without c. Same constructor, state_dict and errors.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}, allowed: tanh, relu")
        function = functional.rnn_tanh_cell if self.nonlinearity == "tanh" else functional.rnn_relu_cell
        return _cell(self, "RNNCell", input, hx, function)  # type: ignore[no-any-return]


def _cell(cell: torch.nn.RNNCellBase, name: str, input: Tensor, hx: Any, function: Callable[..., Any]) -> Any:
    """One step for a batch or for a single sequence, with torch's checks."""
    lstm = name == "LSTMCell"
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for index, state in enumerate(() if hx is None else hx if lstm else (hx,)):
        if state.dim() not in (1, 2):
            what = f"hx[{index}]" if lstm else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
    single = input.dim() == 1
    if single:
        input = input.unsqueeze(0)
    if hx is None:
        shape = input.shape[0], cell.hidden_size
        hx = (input.new_zeros(shape), input.new_zeros(shape)) if lstm else input.new_zeros(shape)
    elif single:
        hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0)) if lstm else hx.unsqueeze(0)
    result = function(input, hx, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    if not single:
        return result
    return tuple(state.squeeze(0) for state in result) if lstm else result.squeeze(0)
