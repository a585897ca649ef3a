"""Lowering of recurrent layers: pack the recurrent weights, then all steps of a few sequences per item."""

from __future__ import annotations

from jitgrad import dtypes
from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.kernel import Buffer, Lowered
from jitgrad.kernels.cpu import gemm, recurrence
from jitgrad.kernels.cpu.gemm import Matrices


def rows_per_item(batch: int) -> int:
    """Sequences of an item: enough to use what is loaded of the weights several times, few enough for two threads."""
    return 8 if batch >= 16 else 4 if batch > 4 else -(-batch // 2)


def lower(call: Call, kind: str, w: int, operands: tuple[int, ...], transposed: bool) -> Lowered | None:
    """`kind`'s kernel on these `operands` (`w` among them packed) and all results, for float32 and float64."""
    weights, result = call.inputs[w], call.outputs[0]
    if weights.dtype not in (dtypes.float32, dtypes.float64) or not weights.size:
        return None
    if not result.size:                               # no steps, or no sequences: states go through unchanged
        return None
    wide, hidden = weights.shape
    short = weights.dtype.short
    depth, columns = (hidden, wide) if transposed else (wide, hidden)
    row, step = (hidden, 1) if transposed else (1, hidden)           # strides between columns, and along the depth
    steps, batch = result.shape[:2]
    rows = rows_per_item(batch)
    width = recurrence.tile_of(short, rows).columns
    packing, _, _ = gemm.pack(Matrices((), row, step), (), columns, depth, width, width, row, step)
    packed = call.scratch(0)
    text = gemm.pack_source(short, packing.kind)
    pack = launch(text, packing.items, call.input(w), packed, *packing.integers)
    arguments: list[Buffer] = [packed if k == w else call.input(k) for k in operands]
    arguments += [call.output(k) for k in range(len(call.outputs))]
    scratch = [packing.elements * weights.dtype.itemsize]
    if kind in ("lstm", "gru"):
        arguments.append(call.scratch(1))
        scratch.append(batch * wide * weights.dtype.itemsize)
    source = recurrence.source(kind, short, rows, bool(call.attrs.get("relu")))
    run = launch(source, -(-batch // rows), *arguments, steps, batch, hidden, rows)
    return Lowered((pack, run), tuple(scratch))


@lowers("rnn")
def lower_rnn(call: Call) -> Lowered | None:
    return lower(call, "rnn", 1, (0, 1, 2), transposed=True)


@lowers("rnn_grad")
def lower_rnn_grad(call: Call) -> Lowered | None:
    """Operands: dh, gates, w, h0, h."""
    return lower(call, "rnn_grad", 2, (0, 2, 4), transposed=False)


@lowers("lstm")
def lower_lstm(call: Call) -> Lowered | None:
    return lower(call, "lstm", 1, (0, 1, 2, 3), transposed=True)


@lowers("lstm_grad")
def lower_lstm_grad(call: Call) -> Lowered | None:
    """Operands: dh, dc, gates, w, h0, c0, h, c, kept."""
    return lower(call, "lstm_grad", 3, (0, 1, 3, 5, 7, 8), transposed=False)


@lowers("gru")
def lower_gru(call: Call) -> Lowered | None:
    return lower(call, "gru", 1, (0, 1, 2, 3), transposed=True)


@lowers("gru_grad")
def lower_gru_grad(call: Call) -> Lowered | None:
    """Operands: dh, gates, w, b, h0, h, kept."""
    return lower(call, "gru_grad", 2, (0, 2, 4, 5, 6), transposed=False)
