"""Recurrent layers along time: the part that cannot be done for all steps at once.

The product of the input is given for all steps, biases included (`gates`); the ops run the steps and keep what their
gradients read. Shapes: gates[T, B, G * H], w[G * H, H], states [B, H], results [T, B, H]; G is 1 for `rnn`, 4 for
`lstm` (input, forget, cell, output gate), 3 for `gru` (reset, update, new). The order of gates, and where the GRU's
hidden bias b[3 * H] enters, are those of PyTorch and cuDNN.

The ops with `_grad` behind their name are the gradients, step by step from the last; those in `w`, `b` and the input are
products for all steps again, and made by the rules. What they read beside the operands of the forward op (`h`, `c`,
`kept`) follows from these operands, so nothing is differentiated in it: gradients of higher order are those of the
steps written out in primitives (`_unrolled`). They alone read some operands, such as the gates, which so need no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import ops
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.ir.graph import Graph, GraphBuilder
from jitgrad.ir.op import Op, register
from jitgrad.ir.replay import replay
from jitgrad.ir.types import TensorType
from jitgrad.ops.builders import broadcast
from jitgrad.ops.gradient import continue_graph, reverse
from jitgrad.ops.record import in_float32, require_category

__all__ = ["gru", "gru_grad", "lstm", "lstm_grad", "rnn", "rnn_grad"]

GATES = {"rnn": 1, "lstm": 4, "gru": 3}


# --- types ----------------------------------------------------------------------------------------------------------


def _check(name: str, xs: Sequence[TensorType], shapes: Sequence[tuple[int, ...]]) -> None:
    shown = ", ".join(map(str, xs))
    if len(xs) != len(shapes):
        raise complain(ShapeError, name, f"takes {len(shapes)} operands, got {shown}")
    if any(x.dtype is not xs[0].dtype for x in xs):
        raise complain(DTypeError, name, f"operands differ in dtype: {shown}")
    require_category(name, xs[0].dtype, "f")
    if [x.shape for x in xs] != list(shapes):
        raise complain(ShapeError, name, f"operands do not fit: {shown}; they should be {list(shapes)}")


def _sizes(name: str, gates: TensorType) -> tuple[int, int, int]:
    """(T, B, H) by the gates."""
    count = GATES[name.removesuffix("_grad")]
    if gates.ndim != 3 or gates.shape[2] % count:
        raise complain(ShapeError, name, f"gates are [steps, batch, {count} * hidden], got {gates}")
    return gates.shape[0], gates.shape[1], gates.shape[2] // count


def _operands(kind: str, t: int, b: int, h: int) -> list[tuple[int, ...]]:
    g = GATES[kind] * h
    state = (b, h)
    shapes: dict[str, list[tuple[int, ...]]] = {"rnn": [(t, b, g), (g, h), state], "lstm": [(t, b, g), (g, h), state, state],
            "gru": [(t, b, g), (g, h), (g,), state]}
    return shapes[kind]


def _kept(kind: str, t: int, b: int, h: int) -> list[tuple[int, ...]]:
    """Shapes of the results: h, for an LSTM c, and what else the gradient reads."""
    steps, four = (t, b, h), (t, b, 4 * h)
    shapes: dict[str, list[tuple[int, ...]]] = {"rnn": [steps], "lstm": [steps, steps, four], "gru": [steps, four]}
    return shapes[kind]


def _infer(kind: str) -> Callable[..., Any]:
    def infer(*xs: TensorType, **_: Any) -> Any:
        sizes = _sizes(kind, xs[0])
        _check(kind, xs, _operands(kind, *sizes))
        found = tuple([xs[0].with_shape(shape) for shape in _kept(kind, *sizes)])
        return found if len(found) > 1 else found[0]

    return infer


def _infer_grad(kind: str) -> Callable[..., Any]:
    name, incoming = f"{kind}_grad", 2 if kind == "lstm" else 1

    def infer(*xs: TensorType, **_: Any) -> tuple[TensorType, ...]:
        t, b, h = _sizes(name, xs[incoming] if len(xs) > incoming else xs[0])
        _check(name, xs, [(t, b, h)] * incoming + _operands(kind, t, b, h) + _kept(kind, t, b, h))
        x = xs[0].with_shape
        wide, state = x((t, b, GATES[kind] * h)), x((b, h))
        return (wide, wide, state) if kind == "gru" else (wide, state, state) if kind == "lstm" else (wide, state)

    return infer


# --- NumPy ----------------------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (0.5 * np.tanh(0.5 * x) + 0.5).astype(x.dtype, copy=False)


@in_float32
def _rnn(gates: np.ndarray, w: np.ndarray, h0: np.ndarray, *, relu: bool) -> np.ndarray:
    out, h = np.empty((*gates.shape[:2], w.shape[1]), gates.dtype), h0
    for t, x in enumerate(gates):
        total = x + h @ w.T
        h = out[t] = np.maximum(total, 0) if relu else np.tanh(total)
    return out


@in_float32
def _rnn_grad(dh: np.ndarray, gates: np.ndarray, w: np.ndarray, h0: np.ndarray, h: np.ndarray, *,
              relu: bool) -> tuple[np.ndarray, ...]:
    d_gates, carried = np.empty_like(gates), np.zeros_like(h0)
    for t in reversed(range(len(gates))):
        total = dh[t] + carried
        d_gates[t] = np.where(h[t] > 0, total, 0) if relu else total * (1 - h[t] * h[t])
        carried = d_gates[t] @ w
    return d_gates, carried


@in_float32
def _lstm(gates: np.ndarray, w: np.ndarray, h0: np.ndarray, c0: np.ndarray) -> tuple[np.ndarray, ...]:
    shape = (*gates.shape[:2], w.shape[1])
    hs, cs, kept = np.empty(shape, gates.dtype), np.empty(shape, gates.dtype), np.empty_like(gates)
    h, c = h0, c0
    for t, x in enumerate(gates):
        i, f, g, o = parts = np.split(x + h @ w.T, 4, 1)
        for k, part in enumerate(parts):
            part[...] = np.tanh(part) if k == 2 else _sigmoid(part)
        c = cs[t] = f * c + i * g
        h = hs[t] = o * np.tanh(c)
        kept[t] = np.concatenate(parts, 1)
    return hs, cs, kept


@in_float32
def _lstm_grad(dh: np.ndarray, dc: np.ndarray, gates: np.ndarray, w: np.ndarray, h0: np.ndarray, c0: np.ndarray,
               h: np.ndarray, c: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, ...]:
    d_gates, carried_h, carried_c = np.empty_like(gates), np.zeros_like(h0), np.zeros_like(c0)
    for t in reversed(range(len(gates))):
        i, f, g, o = np.split(kept[t], 4, 1)
        squashed, total = np.tanh(c[t]), dh[t] + carried_h
        cell = dc[t] + carried_c + total * o * (1 - squashed * squashed)
        before = c[t - 1] if t else c0
        d_gates[t] = np.concatenate([cell * g * i * (1 - i), cell * before * f * (1 - f), cell * i * (1 - g * g),
                                     total * squashed * o * (1 - o)], 1)
        carried_h, carried_c = d_gates[t] @ w, cell * f
    return d_gates, carried_h, carried_c


@in_float32
def _gru(gates: np.ndarray, w: np.ndarray, b: np.ndarray, h0: np.ndarray) -> tuple[np.ndarray, ...]:
    n = w.shape[1]
    hs, kept = np.empty((*gates.shape[:2], n), gates.dtype), np.empty((*gates.shape[:2], 4 * n), gates.dtype)
    h = h0
    for t, x in enumerate(gates):
        hidden = h @ w.T + b
        r, z = np.split(_sigmoid(x[:, :2 * n] + hidden[:, :2 * n]), 2, 1)
        new = np.tanh(x[:, 2 * n:] + r * hidden[:, 2 * n:])
        kept[t] = np.concatenate([r, z, new, hidden[:, 2 * n:]], 1)
        h = hs[t] = new + z * (h - new)
    return hs, kept


@in_float32
def _gru_grad(dh: np.ndarray, gates: np.ndarray, w: np.ndarray, b: np.ndarray, h0: np.ndarray, h: np.ndarray,
              kept: np.ndarray) -> tuple[np.ndarray, ...]:
    d_gates, d_hidden, carried = np.empty_like(gates), np.empty_like(gates), np.zeros_like(h0)
    for t in reversed(range(len(gates))):
        r, z, new, hidden = np.split(kept[t], 4, 1)
        total, before = dh[t] + carried, h[t - 1] if t else h0
        d_new = total * (1 - z) * (1 - new * new)
        d_reset, d_update = d_new * hidden * r * (1 - r), total * (before - new) * z * (1 - z)
        d_gates[t] = np.concatenate([d_reset, d_update, d_new], 1)
        d_hidden[t] = np.concatenate([d_reset, d_update, d_new * r], 1)
        carried = total * z + d_hidden[t] @ w
    return d_gates, d_hidden, carried


# --- the steps written out -------------------------------------------------------------------------------------------


def _columns(x: Any, k: int, width: int) -> Any:
    return ops.slice(x, start=(0, k * width), stop=(x.shape[0], (k + 1) * width), step=(1, 1))


def _step(x: Any, t: int) -> Any:
    one = ops.slice(x, start=(t, 0, 0), stop=(t + 1, *x.shape[1:]), step=(1, 1, 1))
    return ops.reshape(one, shape=tuple(x.shape[1:]))


def _stacked(steps: Sequence[Any]) -> Any:
    return ops.concat(*[ops.reshape(x, shape=(1, *x.shape)) for x in steps], axis=0)


def _unrolled(kind: str, attrs: dict[str, Any], gates: Any, w: Any, *others: Any) -> list[Any]:
    """The differentiable results in primitives: h, of an LSTM also c."""
    turned, width = ops.permute(w, axes=(1, 0)), w.shape[1]
    bias, (h, *c) = (others[0], others[1:]) if kind == "gru" else (None, others)
    hs, cs = [], []
    for t in range(gates.shape[0]):
        x, hidden = _step(gates, t), ops.matmul(h, turned)
        if kind == "rnn":
            total = ops.add(x, hidden)
            h = ops.relu(total) if attrs["relu"] else ops.tanh(total)
        elif kind == "lstm":
            i, f, g, o = [_columns(ops.add(x, hidden), k, width) for k in range(4)]
            c = [ops.add(ops.mul(ops.sigmoid(f), c[0]), ops.mul(ops.sigmoid(i), ops.tanh(g)))]
            h = ops.mul(ops.sigmoid(o), ops.tanh(c[0]))
            cs.append(c[0])
        else:
            hidden = ops.add(hidden, broadcast(bias, hidden.shape))
            r, z = [ops.sigmoid(ops.add(_columns(x, k, width), _columns(hidden, k, width))) for k in range(2)]
            new = ops.tanh(ops.add(_columns(x, 2, width), ops.mul(r, _columns(hidden, 2, width))))
            h = ops.add(new, ops.mul(z, ops.sub(h, new)))
        hs.append(h)
    if not hs:
        nothing = ops.slice(gates, start=(0, 0, 0), stop=(0, gates.shape[1], width), step=(1, 1, 1))
        return [nothing] * (2 if kind == "lstm" else 1)
    return [_stacked(hs), *([_stacked(cs)] if cs else [])]


@lru_cache(maxsize=64)
def _second_order(kind: str, attrs: tuple[tuple[str, Any], ...], types: tuple[TensorType, ...]) -> Graph:
    """Operands of the gradient op (without what was kept), then a gradient for each of its results -> a gradient for
    each of those operands."""
    incoming = 2 if kind == "lstm" else 1
    builder = GraphBuilder(f"{kind}_grad")
    seeds, xs = [builder.input(t) for t in types[:incoming]], [builder.input(t) for t in types[incoming:]]
    with builder:
        results = _unrolled(kind, dict(attrs), *xs)
        forward = builder.build(results)
    builder = continue_graph(forward)
    with builder:
        wanted = [xs[0], *xs[2:]]                     # all but w: gates, of a GRU its hidden bias, states
        found = reverse(forward.nodes, dict(zip(results, seeds)), wanted)
        if kind == "gru" and xs[0] in found:          # step by step, as the op gives it
            found[xs[2]] = _hidden_gradients(found[xs[0]], xs, results[0])
        first = [found.get(v, ops.zeros_like(v)) for v in wanted]
    backward = builder.build(first)
    builder = continue_graph(backward)
    with builder:
        gs = [builder.input(v.type) for v in backward.outputs]
        second = reverse(backward.nodes, dict(zip(backward.outputs, gs)), [*seeds, *xs])
        return builder.build([second.get(v, ops.zeros_like(v)) for v in [*seeds, *xs]])


def _hidden_gradients(d_gates: Any, xs: Sequence[Any], hs: Any) -> Any:
    """The gradient of a GRU's hidden products: that of the gates, times the reset gate in the last third."""
    gates, w, b, h0 = xs
    t, batch, width = hs.shape
    hidden = ops.add(ops.matmul(_earlier(hs, h0), ops.permute(w, axes=(1, 0))), broadcast(b, (t * batch, 3 * width)))
    reset = ops.sigmoid(ops.add(_columns(ops.reshape(gates, shape=hidden.shape), 0, width), _columns(hidden, 0, width)))
    flat = ops.reshape(d_gates, shape=hidden.shape)
    parts = [_columns(flat, 0, width), _columns(flat, 1, width), ops.mul(_columns(flat, 2, width), reset)]
    return ops.reshape(ops.concat(*parts, axis=1), shape=d_gates.shape)


# --- gradients ------------------------------------------------------------------------------------------------------


def _earlier(h: Any, h0: Any) -> Any:
    """The state that each step started from, [T * B, H]."""
    t, b, width = h.shape
    first = ops.reshape(h0, shape=(1, b, width))
    if t < 2:
        return ops.reshape(h, shape=(0, width)) if t == 0 else h0
    return ops.reshape(ops.concat(first, ops.slice(h, start=(0, 0, 0), stop=(t - 1, b, width), step=(1, 1, 1)), axis=0),
                       shape=(t * b, width))


def _weight_gradient(d_gates: Any, h: Any, h0: Any) -> Any:
    flat = ops.reshape(d_gates, shape=(d_gates.shape[0] * d_gates.shape[1], d_gates.shape[2]))
    return ops.matmul(ops.permute(flat, axes=(1, 0)), _earlier(h, h0))


def _lstm_rule(gs: Any, xs: Any, outs: Any) -> tuple[Any, ...]:
    d_gates, dh0, dc0 = ops.lstm_grad(*gs[:2], *xs, *outs)
    return d_gates, _weight_gradient(d_gates, outs[0], xs[2]), dh0, dc0


def _gru_rule(gs: Any, xs: Any, outs: Any) -> tuple[Any, ...]:
    d_gates, d_hidden, dh0 = ops.gru_grad(gs[0], *xs, *outs)
    return d_gates, _weight_gradient(d_hidden, outs[0], xs[3]), ops.sum(d_hidden, axes=(0, 1)), dh0


def _rnn_rule(gs: Any, xs: Any, outs: Any, relu: bool) -> tuple[Any, ...]:
    d_gates, dh0 = ops.rnn_grad(gs[0], *xs, outs[0], relu=relu)
    return d_gates, _weight_gradient(d_gates, outs[0], xs[2]), dh0


def _rule_of_gradient(kind: str, count: int) -> Callable[..., Any]:
    """`count` operands take part in it."""

    def rule(gs: Any, xs: Any, xs_types: Any, **attrs: Any) -> tuple[Any, ...]:
        graph = _second_order(kind, tuple(attrs.items()), tuple(xs_types[:count]))
        return (*replay(graph, [*xs[:count], *gs]), *[None] * (len(xs) - count))

    def rule_of_rnn(gs: Any, xs: Any, xs_types: Any, relu: bool) -> tuple[Any, ...]:
        return rule(gs, xs, xs_types, relu=relu)

    def rule_of_others(gs: Any, xs: Any, xs_types: Any) -> tuple[Any, ...]:
        return rule(gs, xs, xs_types)

    return rule_of_rnn if kind == "rnn" else rule_of_others


def _entry(kind: str, eager: Callable[..., Any], rule: Callable[..., Any], outputs: int, doc: str) -> Op:
    return register(Op(kind, ("xs",), _infer(kind), eager, "scan", vjp=rule, variadic=True, outputs=outputs, doc=doc))


def _gradient_entry(kind: str, eager: Callable[..., Any], count: int, outputs: int, unread: set[int], doc: str) -> Op:
    return register(Op(f"{kind}_grad", ("xs",), _infer_grad(kind), eager, "scan", vjp=_rule_of_gradient(kind, count),
                       variadic=True, outputs=outputs, unread=frozenset(unread), doc=doc))


rnn: Op = _entry("rnn", _rnn, _rnn_rule, 1, "gates, w, h0 -> h: h = tanh (or relu) of gates + w h before.")
rnn_grad: Op = _gradient_entry("rnn", _rnn_grad, 4, 2, {1, 3}, "dh, operands of rnn, h -> gradients of gates and h0.")
lstm: Op = _entry("lstm", _lstm, _lstm_rule, 3, "gates, w, h0, c0 -> h, c, kept: a long short-term memory.")
lstm_grad: Op = _gradient_entry("lstm", _lstm_grad, 6, 3, {2, 4, 6},
                                "dh, dc, operands and results of lstm -> gradients of gates, h0 and c0.")
gru: Op = _entry("gru", _gru, _gru_rule, 2, "gates, w, b, h0 -> h, kept: a gated recurrent unit.")
gru_grad: Op = _gradient_entry("gru", _gru_grad, 5, 3, {1, 3},
                               "dh, operands and results of gru -> gradients of gates, of hidden products, and of h0.")

GRADIENTS = (rnn_grad, lstm_grad, gru_grad)

OPERANDS = {
    "rnn": ("gates", "w", "h0"), "lstm": ("gates", "w", "h0", "c0"), "gru": ("gates", "w", "b", "h0"),
    "rnn_grad": ("dh", "gates", "w", "h0", "h"), "lstm_grad": ("dh", "dc", "gates", "w", "h0", "c0", "h", "c", "kept"),
    "gru_grad": ("dh", "gates", "w", "b", "h0", "h", "kept")}
"""What the operands of each op are called in its kernels."""

RESULTS = {
    "rnn": ("h",), "lstm": ("h", "c", "kept"), "gru": ("h", "kept"), "rnn_grad": ("d_gates", "dh0"),
    "lstm_grad": ("d_gates", "dh0", "dc0"), "gru_grad": ("d_gates", "d_hidden", "dh0")}
"""And its results. Those that begin with d_ are gradients of gates, [steps, batch, wide]."""
