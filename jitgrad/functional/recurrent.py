"""Recurrent layers in one direction, as functions of their weights.

x is [steps, batch, inputs], states are [batch, hidden]; weights are PyTorch's: w_ih [gates * hidden, inputs], w_hh
[gates * hidden, hidden], biases [gates * hidden] or None.
"""

from __future__ import annotations

from jitgrad import ops
from jitgrad.functional.activation import relu
from jitgrad.functional.autocast import casts
from jitgrad.functional.core import Tensor, cast, wide_on_cpu
from jitgrad.functional.linalg import linear, matmul
from jitgrad.functional.shape import chunk, stack, unbind

__all__ = ["gru_cell", "gru_layer", "lstm_cell", "lstm_layer", "projected_lstm_layer", "rnn_cell", "rnn_layer"]


def _input_gates(x: Tensor, w_ih: Tensor, *biases: Tensor | None) -> Tensor:
    known = [b for b in biases if b is not None]
    return linear(x, w_ih, sum(known[1:], known[0]) if known else None)


@casts(cpu="lower", cuda="lower")
def rnn_layer(nonlinearity: str, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
              b_hh: Tensor | None) -> Tensor:
    """Elman's network: h of all steps, [steps, batch, hidden]."""
    gates = _input_gates(x, w_ih, b_ih, b_hh)
    found: Tensor = wide_on_cpu(ops.rnn, gates, w_hh, h, relu=nonlinearity == "relu")
    return found


@casts(cpu="lower", cuda="lower")
def lstm_layer(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
               b_hh: Tensor | None) -> tuple[Tensor, Tensor]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with forget gates): h and c of all steps."""
    hs, cs, _ = wide_on_cpu(ops.lstm, _input_gates(x, w_ih, b_ih, b_hh), w_hh, h, c)
    return hs, cs


@casts(cuda="lower")
def gru_layer(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """Gated recurrent unit (Cho et al. 2014, the reset gate behind the product): h of all steps."""
    bias = b_hh if b_hh is not None else ops.zeros_like(ops.sum(w_hh, axes=(1,)))
    hs, _ = wide_on_cpu(ops.gru, cast(_input_gates(x, w_ih, b_ih), h.dtype), w_hh, bias, h)
    return hs


@casts(cpu="lower", cuda="lower")
def projected_lstm_layer(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
                         b_hh: Tensor | None, w_hr: Tensor) -> tuple[Tensor, Tensor]:
    """An LSTM whose output is ``w_hr @ h`` (Sak et al. 2014): h [batch, projected], w_hr [projected, hidden]."""
    hs, cs = [], []
    for gates in unbind(_input_gates(x, w_ih, b_ih, b_hh)):
        h, c = _lstm_step(gates + matmul(h, w_hh.transpose(0, 1)), c)
        h = matmul(h, w_hr.transpose(0, 1))
        hs.append(h)
        cs.append(c)
    return stack(hs), stack(cs)


def _lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = chunk(gates, 4, -1)
    c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
    return ops.sigmoid(o) * ops.tanh(c), c


@casts(cuda="lower")
def lstm_cell(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
              b_hh: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of an LSTM: the next h and c."""
    return _lstm_step(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh), c)


@casts(cuda="lower")
def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """One step of a GRU: the next h."""
    x_r, x_z, x_n = chunk(linear(x, w_ih, b_ih), 3, -1)
    h_r, h_z, h_n = chunk(linear(h, w_hh, b_hh), 3, -1)
    new = ops.tanh(x_n + ops.sigmoid(x_r + h_r) * h_n)
    return new + ops.sigmoid(x_z + h_z) * (h - new)


@casts(cuda="lower")
def rnn_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
             nonlinearity: str = "tanh") -> Tensor:
    """One step of Elman's network: the next h."""
    total = linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)
    return relu(total) if nonlinearity == "relu" else ops.tanh(total)
