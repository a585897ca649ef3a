"""Recurrent layers and cells: Elman's network, LSTM, GRU.

A sequence is [steps, batch, inputs], or [batch, steps, inputs] with ``batch_first``, or [steps, inputs] without a batch,
or a `nn.utils.rnn.PackedSequence`. All steps of a layer and direction are one operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jitgrad import functional
from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional import nn as F, recurrent
from jitgrad.nn import init
from jitgrad.nn.module import Module
from jitgrad.nn.parameter import Parameter, new_parameter
from jitgrad.nn.utils.rnn import PackedSequence, packed_like, padded_steps
from jitgrad.tensor import Tensor, tensor_on

_GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}


class RNNBase(Module):
    """What `RNN`, `LSTM` and `GRU` share: weights by layer and direction, and the walk over them.

    Parameters of layer k are ``weight_ih_lk`` [gates * hidden, inputs], ``weight_hh_lk`` [gates * hidden, hidden],
    ``bias_ih_lk``, ``bias_hh_lk`` and, with `proj_size`, ``weight_hr_lk`` [proj_size, hidden]; those of the backward
    direction have ``_reverse`` behind their names."""

    def __init__(self, mode: str, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
                 device: Any = None, dtype: DType | None = None):
        super().__init__()
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError(f"{type(self).__name__}: input_size={input_size}, hidden_size={hidden_size} and "
                             f"num_layers={num_layers} must be at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"{type(self).__name__}: dropout must be between 0 and 1, got {dropout}")
        if proj_size and (mode != "LSTM" or not 0 < proj_size < hidden_size):
            raise ValueError(f"{type(self).__name__}: proj_size={proj_size} must be less than hidden_size, and only an LSTM "
                             "has one")
        self.mode, self.input_size, self.hidden_size, self.num_layers = mode, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, float(dropout), bidirectional
        self.proj_size, self.num_directions = proj_size, 2 if bidirectional else 1
        wide, state = _GATES[mode] * hidden_size, proj_size or hidden_size
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else state * self.num_directions
            for suffix in self._suffixes(layer):
                self.register_parameter(f"weight_ih{suffix}", new_parameter((wide, inputs), dtype, device))
                self.register_parameter(f"weight_hh{suffix}", new_parameter((wide, state), dtype, device))
                if bias:
                    self.register_parameter(f"bias_ih{suffix}", new_parameter((wide,), dtype, device))
                    self.register_parameter(f"bias_hh{suffix}", new_parameter((wide,), dtype, device))
                if proj_size:
                    self.register_parameter(f"weight_hr{suffix}", new_parameter((proj_size, hidden_size), dtype, device))
        self.reset_parameters()

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}", f"_l{layer}_reverse"][:self.num_directions]

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Nothing: weights are packed where they are used."""

    def _weights(self, suffix: str) -> list[Any]:
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        found = [getattr(self, name + suffix, None) for name in names]
        return found if self.proj_size else found[:4]

    @property
    def all_weights(self) -> list[list[Parameter]]:
        """The parameters of each layer and direction."""
        return [[w for w in self._weights(suffix) if w is not None]
                for layer in range(self.num_layers) for suffix in self._suffixes(layer)]

    def forward(self, input: Any, hx: Any = None) -> Any:
        packed = input if isinstance(input, PackedSequence) else None
        batched = packed is not None or input.dim() == 3
        if packed is not None:
            x, order = padded_steps(packed), packed.sorted_indices
        else:
            if input.dim() not in (2, 3):
                raise complain(ShapeError, type(self).__name__, f"the input is [steps, batch, {self.input_size}] or "
                                                                f"[steps, {self.input_size}], got {input.tensor_type}")
            x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
            order = None
        if x.shape[-1] != self.input_size:
            raise complain(ShapeError, type(self).__name__, f"input_size={self.input_size}, but the input is "
                                                            f"{(packed.data if packed else input).tensor_type}")
        if not x.shape[0]:
            raise complain(ShapeError, type(self).__name__, f"the sequence has no steps: {input.tensor_type}")
        states = [self._in_order(s, order) for s in self._initial(hx, x, batched)]
        out, finals = self._layers(x, states, _Ends(packed) if packed is not None else None)
        finals = [self._in_order(s, packed.unsorted_indices if packed else None) for s in finals]
        if packed is not None:
            return packed_like(out, packed), self._hidden(finals)
        if not batched:
            return out.squeeze(1), self._hidden([s.squeeze(1) for s in finals])
        return out.transpose(0, 1) if self.batch_first else out, self._hidden(finals)

    def _initial(self, hx: Any, x: Tensor, batched: bool) -> list[Tensor]:
        """The states that a call starts from, each [layers * directions, batch, its width]."""
        count, batch = self.num_layers * self.num_directions, x.shape[1]
        widths = [self.proj_size or self.hidden_size] + [self.hidden_size] * (self.mode == "LSTM")
        if hx is None:
            return [tensor_on(np.zeros((count, batch, width), x.dtype.numpy), x.device) for width in widths]
        given = list(hx) if self.mode == "LSTM" else [hx]
        if not batched:
            given = [s.unsqueeze(1) if s.dim() == 2 else s for s in given]
        wanted = [(count, batch, width) for width in widths]
        if [tuple(s.shape) for s in given] != wanted:
            raise complain(ShapeError, type(self).__name__, f"the state must be {wanted if len(wanted) > 1 else wanted[0]}, "
                                                            f"got {[tuple(s.shape) for s in given]}")
        return given

    @staticmethod
    def _in_order(state: Tensor, order: Tensor | None) -> Tensor:
        return state if order is None else functional.index_select(state, 1, order)

    def _hidden(self, finals: list[Tensor]) -> Any:
        return tuple(finals) if self.mode == "LSTM" else finals[0]

    def _layers(self, x: Tensor, states: Sequence[Tensor], ends: _Ends | None) -> tuple[Tensor, list[Tensor]]:
        finals: list[list[Tensor]] = [[] for _ in states]
        for layer in range(self.num_layers):
            outs = []
            for direction, suffix in enumerate(self._suffixes(layer)):
                at = layer * self.num_directions + direction
                steps = x if direction == 0 else ends.turned(x) if ends else x.flip(0)
                results = self._direction(steps, [s[at] for s in states], self._weights(suffix))
                for found, result in zip(finals, results):
                    found.append(ends.last(result) if ends else result[-1])
                outs.append(results[0] if direction == 0 else ends.turned(results[0]) if ends else results[0].flip(0))
            x = outs[0] if len(outs) == 1 else functional.cat(outs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, [functional.stack(found) for found in finals]

    def _direction(self, x: Tensor, states: list[Tensor], weights: list[Any]) -> tuple[Tensor, ...]:
        """The states of all steps."""
        if self.mode == "LSTM":
            layer = recurrent.projected_lstm_layer if self.proj_size else recurrent.lstm_layer
            return layer(x, *states, *weights)
        if self.mode == "GRU":
            return (recurrent.gru_layer(x, states[0], *weights),)
        return (recurrent.rnn_layer(self.mode[4:].lower(), x, states[0], *weights),)

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}"
        defaults = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
                    "bidirectional": False}
        return shown + "".join(f", {k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v)


class _Ends:
    """Where sequences of different lengths end, in [steps, sequences]."""

    def __init__(self, packed: PackedSequence):
        lengths, count = packed.lengths, len(packed.lengths)
        steps = np.arange(lengths.max())[:, None]
        turned = np.where(steps < lengths, lengths - 1 - steps, steps)
        self._turned = Tensor((turned * count + np.arange(count)).reshape(-1))
        self._last = Tensor((lengths - 1) * count + np.arange(count))

    def turned(self, x: Tensor) -> Tensor:
        """Each sequence from its end to its beginning."""
        return functional.index_select(x.reshape(-1, x.shape[2]), 0, self._turned).reshape(x.shape)

    def last(self, x: Tensor) -> Tensor:
        """The last step of each."""
        return functional.index_select(x.reshape(-1, x.shape[2]), 0, self._last)


class RNN(RNNBase):
    """Elman's network: ``h = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu as `nonlinearity`."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
                 bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
                 device: Any = None, dtype: DType | None = None):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"RNN: nonlinearity is 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
                         bidirectional, 0, device, dtype)
        self.nonlinearity = nonlinearity


class LSTM(RNNBase):
    """Long short-term memory (Hochreiter and Schmidhuber 1997): (output, (h_n, c_n)). With `proj_size` the output of a
    step is projected (Sak et al. 2014); such a layer runs step by step."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
                 device: Any = None, dtype: DType | None = None):
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
                         device, dtype)


class GRU(RNNBase):
    """Gated recurrent unit (Cho et al. 2014), in the form of cuDNN: (output, h_n)."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
                 batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, device: Any = None,
                 dtype: DType | None = None):
        super().__init__("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device,
                         dtype)


class RNNCellBase(Module):
    """What the cells share: weights of one step."""

    bias_ih: Parameter | None
    bias_hh: Parameter | None

    def __init__(self, input_size: int, hidden_size: int, bias: bool, num_chunks: int, device: Any = None,
                 dtype: DType | None = None):
        super().__init__()
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        wide = num_chunks * hidden_size
        self.weight_ih = new_parameter((wide, input_size), dtype, device)
        self.weight_hh = new_parameter((wide, hidden_size), dtype, device)
        self.bias_ih = new_parameter((wide,), dtype, device) if bias else None
        self.bias_hh = new_parameter((wide,), dtype, device) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size else 0
        for weight in self.parameters():
            init.uniform_(weight, -bound, bound)

    def _state(self, input: Tensor) -> Tensor:
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise complain(ShapeError, type(self).__name__, f"the input is [batch, {self.input_size}] or "
                                                            f"[{self.input_size}], got {input.tensor_type}")
        return tensor_on(np.zeros((*input.shape[:-1], self.hidden_size), input.dtype.numpy), input.device)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class RNNCell(RNNCellBase):
    """One step of `RNN`: [batch, input_size], the state [batch, hidden_size] -> the next state."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
                 device: Any = None, dtype: DType | None = None):
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"RNNCell: nonlinearity is 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        zero = self._state(input)
        return recurrent.rnn_cell(input, zero if hx is None else hx, self.weight_ih, self.weight_hh, self.bias_ih,
                                  self.bias_hh, self.nonlinearity)


class LSTMCell(RNNCellBase):
    """One step of `LSTM`: [batch, input_size], (h, c) -> (h, c), each [batch, hidden_size]."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None,
                 dtype: DType | None = None):
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        zero = self._state(input)
        h, c = (zero, zero) if hx is None else hx
        return recurrent.lstm_cell(input, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class GRUCell(RNNCellBase):
    """One step of `GRU`: [batch, input_size], the state [batch, hidden_size] -> the next state."""

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None,
                 dtype: DType | None = None):
        super().__init__(input_size, hidden_size, bias, 3, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        zero = self._state(input)
        return recurrent.gru_cell(input, zero if hx is None else hx, self.weight_ih, self.weight_hh, self.bias_ih,
                                  self.bias_hh)
