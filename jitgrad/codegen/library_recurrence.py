"""Lowering of recurrent layers: pack the recurrent weights, then all steps of a few sequences per item.

A gradient comes alone or as a region of the template "recurrence": with sums over all steps and sequences of its results,
with a gradient of the states of an LSTM's cells that is one number, or without the gradients of the first states.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from jitgrad import dtypes, ops
from jitgrad.codegen.call import IN_PLACE, Call, launch, lowers
from jitgrad.codegen.kernel import Buffer, Lowered
from jitgrad.ir.graph import Graph
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.strides import follow
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm, gemm_pack, recurrence
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.ops.recurrence import GRADIENTS, OPERANDS, RESULTS

WEIGHTS = {op: names.index("w") for op, names in OPERANDS.items()}
"""Which operand of each op is the recurrent weights."""

OVER = {"rnn": ("h", "gates"), "rnn_grad": ("d_gates", "dh"), "lstm": ("kept", "gates"), "lstm_grad": ("d_gates", "kept")}
"""Which result of an op is made where which operand lies, if nobody needs that any more. What a GRU keeps is wider than its
gates."""

GATED = {op: sum(name.startswith("d_") for name in names) for op, names in RESULTS.items()}
"""How many results of each op are gradients of gates: the first ones."""


def rows_per_item(batch: int) -> int:
    """Sequences of an item: enough to use what is loaded of the weights several times, few enough for two threads."""
    return 8 if batch >= 16 else 4 if batch > 4 else -(-batch // 2)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node on its way: its op, the types of weights and states, and the memory of its operands and results (None: a
    gradient of the first states that nobody needs), and of sums of results (by their numbers). Scratch memory begins with
    buffer number `scratch`. `number`: the gradient of the cells' states is one number. `in_place`: operand and result of
    `OVER` are one memory."""

    op: str
    weights: TensorType
    states: TensorType
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer | None, ...]
    scratch: int
    relu: bool = False
    number: bool = False
    in_place: bool = False
    sums: tuple[tuple[int, Buffer], ...] = ()


def lower(layer: Layer) -> Lowered | None:
    """The launches of a layer, for float32 and float64."""
    weights = layer.weights
    if weights.dtype not in (dtypes.float32, dtypes.float64) or not weights.size:
        return None
    if not layer.states.size:                         # no steps, or no sequences: states go through unchanged
        return None
    (wide, hidden), (steps, batch) = weights.shape, layer.states.shape[:2]
    short, gradient = weights.dtype.short, layer.op.endswith("_grad")
    depth, columns = (wide, hidden) if gradient else (hidden, wide)
    row, step = (1, hidden) if gradient else (hidden, 1)             # strides between columns, and along the depth
    rows = rows_per_item(batch)
    items = -(-batch // rows)
    width = recurrence.tile_of(short, rows).columns
    packing, _, _ = gemm.pack(Matrices((), row, step), (), columns, depth, width, width, row, step)
    products = [batch * wide] if layer.op == "gru" else []
    sums = [items * wide] * GATED[layer.op]
    unneeded = [batch * hidden for output in layer.outputs if output is None]
    scratch = [packing.elements, *unneeded, *products, *sums]
    packed, *more = [Buffer(layer.scratch + k) for k in range(len(scratch))]
    outputs = [more.pop(0) if output is None else output for output in layer.outputs]
    pack = launch(gemm_pack.pack_source(short, packing.kind), packing.items, layer.inputs[WEIGHTS[layer.op]], packed,
                  *packing.integers)
    operands = [packed if k == WEIGHTS[layer.op] else x for k, x in enumerate(layer.inputs)
                if k not in REGISTRY[layer.op].unread]
    source = recurrence.source(layer.op, short, rows, layer.relu, layer.number, layer.in_place)
    run = launch(source, items, *operands, *outputs, *more, steps, batch, hidden, rows,
                 *([steps - (layer.outputs[GATED[layer.op]] is None)] if gradient else []))
    totals = [launch(recurrence.sum_source(short), wide, more[k], total, items, wide) for k, total in layer.sums]
    return Lowered((pack, run, *totals), tuple([count * weights.dtype.itemsize for count in scratch]))


def lower_alone(call: Call, op: str) -> Lowered | None:
    """An op that is no part of a region."""
    inputs = tuple([call.input(k) for k in range(len(call.inputs))])
    outputs = tuple([call.output(k) for k in range(len(call.outputs))])
    states = call.inputs[0] if op.endswith("_grad") else call.outputs[0]
    return lower(Layer(op, call.inputs[WEIGHTS[op]], states, inputs, outputs, len(inputs) + len(outputs),
                       bool(call.attrs.get("relu")), in_place=bool(call.shared)))


def lower_with_sums(body: Graph, shared: tuple[tuple[int, int], ...]) -> Lowered | None:
    """The template "recurrence"."""
    (node,) = [n for n in body.nodes if n.op in GRADIENTS]
    producers, first = body.producers(), len(body.inputs)
    sources = [follow(producers, v)[1] for v in node.inputs]
    inputs = tuple([Buffer(body.inputs.index(v)) for v in sources])
    places = [body.outputs.index(v) if v in body.outputs else None for v in node.outputs]
    outputs = tuple([None if k is None else Buffer(dict(shared).get(k, first + k)) for k in places])
    sums = tuple([(node.outputs.index(n.inputs[0]), Buffer(first + body.outputs.index(n.output)))
                  for n in body.nodes if n.op is ops.sum])
    number = node.op is ops.lstm_grad and sources[1].type.size == 1 < node.inputs[1].type.size
    return lower(Layer(node.op.name, node.inputs[WEIGHTS[node.op.name]].type, node.inputs[0].type, inputs, outputs,
                       first + len(body.outputs), bool(node.attrs.get("relu")), number, bool(shared), sums))


def best_in_place(body: Graph) -> tuple[int, int] | None:
    """The output of such a region that had best lie in the memory of an input, and that input."""
    (node,) = [n for n in body.nodes if n.op in GRADIENTS]
    pair = IN_PLACE.get(node.op.name)
    if pair is None:
        return None
    read = node.inputs[pair[1]]
    return (body.outputs.index(node.outputs[pair[0]]), body.inputs.index(read)) if read in body.inputs else None


for _name in WEIGHTS:
    _pair = OVER.get(_name)
    _places = (RESULTS[_name].index(_pair[0]), OPERANDS[_name].index(_pair[1])) if _pair else None
    lowers(_name, in_place=_places)(partial(lower_alone, op=_name))
