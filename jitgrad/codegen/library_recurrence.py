"""Lowering of recurrent layers: pack the recurrent weights, then all steps of a few sequences per item.

A gradient comes alone or as a region of the template "recurrence": with sums over all steps and sequences of its results,
and with a gradient of the states of an LSTM's cells that is one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jitgrad import dtypes, ops
from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.kernel import Buffer, Launch, Lowered
from jitgrad.ir.graph import Graph
from jitgrad.ir.strides import follow
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm, recurrence
from jitgrad.kernels.cpu.gemm import Matrices

WEIGHTS = {"rnn": 1, "lstm": 1, "gru": 1, "rnn_grad": 2, "lstm_grad": 3, "gru_grad": 2}
"""Which operand of each op is the recurrent weights."""

READ = {"rnn": (0, 1, 2), "rnn_grad": (0, 2, 4), "lstm": (0, 1, 2, 3), "lstm_grad": (0, 1, 3, 5, 7, 8),
        "gru": (0, 1, 2, 3), "gru_grad": (0, 2, 4, 5, 6)}
"""Which operands each kernel reads."""


def rows_per_item(batch: int) -> int:
    """Sequences of an item: enough to use what is loaded of the weights several times, few enough for two threads."""
    return 8 if batch >= 16 else 4 if batch > 4 else -(-batch // 2)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node on its way: its op, the types of weights and states, and the memory of its operands and results, and of sums
    of results (by their numbers). Scratch memory begins with buffer number `scratch`. `number`: the gradient of the
    cells' states is one number."""

    op: str
    weights: TensorType
    states: TensorType
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    scratch: int
    relu: bool = False
    number: bool = False
    sums: tuple[tuple[int, Buffer], ...] = ()


def lower(layer: Layer) -> Lowered | None:
    """The launches of a layer, for float32 and float64."""
    weights = layer.weights
    if weights.dtype not in (dtypes.float32, dtypes.float64) or not weights.size:
        return None
    if not layer.states.size:                         # no steps, or no sequences: states go through unchanged
        return None
    (wide, hidden), (steps, batch) = weights.shape, layer.states.shape[:2]
    short, gradient, itemsize = weights.dtype.short, layer.op.endswith("_grad"), weights.dtype.itemsize
    depth, columns = (wide, hidden) if gradient else (hidden, wide)
    row, step = (1, hidden) if gradient else (hidden, 1)             # strides between columns, and along the depth
    rows = rows_per_item(batch)
    items = -(-batch // rows)
    width = recurrence.tile_of(short, rows).columns
    packing, _, _ = gemm.pack(Matrices((), row, step), (), columns, depth, width, width, row, step)
    packed, which = Buffer(layer.scratch), WEIGHTS[layer.op]
    text = gemm.pack_source(short, packing.kind)
    pack = launch(text, packing.items, layer.inputs[which], packed, *packing.integers)
    arguments = [packed if k == which else layer.inputs[k] for k in READ[layer.op]]
    arguments += layer.outputs
    scratch, more = [packing.elements * itemsize], list[Launch]()
    if layer.op in ("lstm", "gru"):
        arguments.append(Buffer(layer.scratch + 1))
        scratch.append(batch * wide * itemsize)
    for k in range(GATED.get(layer.op, 0)):
        arguments.append(Buffer(layer.scratch + 1 + k))
        scratch.append(items * wide * itemsize if layer.sums else 0)
    for k, total in layer.sums:
        parts = Buffer(layer.scratch + 1 + k)
        more.append(launch(recurrence.sum_source(short), wide, parts, total, items, wide))
    source = recurrence.source(layer.op, short, rows, layer.relu, layer.number)
    summed = [int(bool(layer.sums))] if gradient else []
    run = launch(source, items, *arguments, steps, batch, hidden, rows, *summed)
    return Lowered((pack, run, *more), tuple(scratch))


GATED = {"rnn_grad": 1, "lstm_grad": 1, "gru_grad": 2}
"""How many results of each gradient are gradients of gates, the first ones."""


def lower_alone(call: Call, op: str) -> Lowered | None:
    inputs = tuple([call.input(k) for k in range(len(call.inputs))])
    outputs = tuple([call.output(k) for k in range(len(call.outputs))])
    states = call.inputs[0] if op.endswith("_grad") else call.outputs[0]
    return lower(Layer(op, call.inputs[WEIGHTS[op]], states, inputs, outputs, len(inputs) + len(outputs),
                       bool(call.attrs.get("relu"))))


def lower_with_sums(body: Graph, shared: tuple[tuple[int, int], ...]) -> Lowered | None:
    """The template "recurrence"."""
    (node,) = [n for n in body.nodes if n.op.name in GATED]
    producers, first = body.producers(), len(body.inputs)
    places = [Buffer(body.inputs.index(follow(producers, v)[1])) for v in node.inputs]
    outputs = tuple([Buffer(first + body.outputs.index(v)) for v in node.outputs])
    sums = tuple([(node.outputs.index(n.inputs[0]), Buffer(first + body.outputs.index(n.output)))
                  for n in body.nodes if n.op is ops.sum])
    return lower(Layer(node.op.name, node.inputs[WEIGHTS[node.op.name]].type, node.inputs[0].type, tuple(places), outputs,
                       first + len(body.outputs), bool(node.attrs.get("relu")),
                       follow(producers, node.inputs[1])[1].type.size == 1 < node.inputs[1].type.size, sums))


for _name in WEIGHTS:
    lowers(_name)(partial(lower_alone, op=_name))
