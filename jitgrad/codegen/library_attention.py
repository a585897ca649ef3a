"""Lowering of attention and its gradient: pack what products read transposed, then blocks of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.codegen.call import BLOCK, Call, launch, lowers, product_core
from jitgrad.codegen.kernel import Buffer, Launch, Lowered
from jitgrad.ir.graph import Graph
from jitgrad.ir.strides import Heads, follow, heads_in, read_heads
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import attention, conv, gemm, gemm_pack
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.ops.attention import heads_of_moved, mask_runs, operands, pieces

ITEMS = 8                                       # of the gradient, for balance: heads are cut into parts where they are fewer


def mask_and_draw(types: Sequence[TensorType],
                  buffers: Sequence[Buffer]) -> tuple[TensorType | None, bool, list[Buffer]]:
    """Of the operands from the query on: the mask, whether there is dropout, and the kernel's operands for both. What is
    not there is never read; the query stands in its place."""
    _, _, _, mask, draw = operands(types)
    unused, _, _, *behind = buffers
    return mask, bool(draw), [behind.pop(0) if mask else unused, *(behind if draw else [unused] * 4)]


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand or a result, and where its matrices lie, if it has some."""

    type: TensorType
    buffer: Buffer
    heads: Heads


@dataclass
class Attention:
    """One node on its way: its operands and results, what multiplies the query, and scratch memory behind `buffers`."""

    attrs: Mapping[str, Any]
    inputs: list[Operand]
    outputs: list[Operand]
    factor: Buffer | None
    buffers: int
    multiplied: bool = False                    # whether the gradient of the query is, too
    launches: list[Launch] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)

    @property
    def short(self) -> str:
        return self.inputs[0].type.dtype.short

    def new_scratch(self, nbytes: int) -> Buffer:
        self.scratch.append(nbytes)
        return Buffer(self.buffers + len(self.scratch) - 1)

    def pack(self, x: Operand) -> Buffer:
        """x[G, S, E] packed as the right operand of a product with its transpose: the kernels count groups, so that those
        which read the same memory have panels of their own."""
        groups, rows, depth = x.type.shape
        columns, heads = gemm.element_tile(self.short).columns, x.heads
        matrices = Matrices((heads.outer, heads.within), heads.row, 1, heads.first)
        batch = groups // heads.inner, heads.inner
        packing, _, _ = gemm.pack(matrices, batch, rows, depth, columns, columns, heads.row, 1, once=False)
        panels = self.new_scratch(packing.elements * x.type.dtype.itemsize)
        self.launches.append(launch(gemm_pack.pack_source(self.short, packing.kind), packing.items, x.buffer, panels,
                                    *packing.integers))
        return panels

    def integers(self, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None,
                 dropped: bool) -> tuple[int, ...]:
        """`attention.ARGUMENTS`."""
        runs, period = mask_runs(mask.shape) if mask else (1, 1)
        row = 0 if mask is None or mask.shape[-2] == 1 else mask.shape[-1]
        block = attention.block_of_queries(self.short, k.shape[1], bool(self.attrs["causal"]))
        return (q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.shape[0] // k.shape[0], int(mask is not None),
                q.shape[0] // runs, period, row, int(self.attrs["causal"]), int(self.attrs["zero"]), int(dropped), block,
                -(-q.shape[1] // block))

    def forward(self) -> Lowered:
        q, k, v = self.inputs[:3]
        out, lse = self.outputs
        mask, dropped, extra = mask_and_draw([x.type for x in self.inputs], [x.buffer for x in self.inputs])
        panels = self.pack(k)
        sizes = self.integers(q.type, k.type, v.type, mask, dropped)
        self.launches.append(launch(
            attention.source("attention", self.short), q.type.shape[0] * sizes[-1], q.buffer, panels, v.buffer, *extra,
            out.buffer, lse.buffer, self.factor or q.buffer, *sizes, int(self.factor is not None), *q.heads.integers,
            *v.heads.integers, *out.heads.integers, product_core(self.short)))
        return Lowered(tuple(self.launches), tuple(self.scratch))

    def backward(self) -> Lowered:
        g, q, k, v = self.inputs[:4]
        out, lse = self.inputs[-2:]
        dq, dk, dv = self.outputs
        before = self.inputs[1:-2]
        mask, dropped, extra = mask_and_draw([x.type for x in before], [x.buffer for x in before])
        groups, keys, _ = k.type.shape
        block = attention.block_of_keys(self.short)
        blocks = -(-keys // block)
        wanted = -(-ITEMS // groups) if dq.heads == heads_in(dq.type.shape) else 1      # parts are added up in order
        per_part = -(-blocks // min(wanted, blocks))
        parts = -(-blocks // per_part)
        k_panels, v_panels = self.pack(k), self.pack(v)
        heads, queries, values = g.type.shape
        dots = self.new_scratch(heads * queries * q.type.dtype.itemsize)
        self.launches.append(launch(attention.source("attention_dots", self.short), heads * -(-queries // block), g.buffer,
                                    out.buffer, dots, queries, values, *g.heads.integers, *out.heads.integers))
        whole = dq
        if parts > 1:
            whole = Operand(dq.type, self.new_scratch(parts * dq.type.nbytes), heads_in(dq.type.shape))
        made = (g, q, k, whole, dk, dv)
        self.launches.append(launch(
            attention.source("attention_grad", self.short), groups * parts, g.buffer, q.buffer, k.buffer, *extra,
            lse.buffer, dots, k_panels, v_panels, whole.buffer, dk.buffer, dv.buffer, self.factor or q.buffer,
            *self.integers(q.type, k.type, v.type, mask, dropped), parts, per_part * block, q.type.size,
            int(self.factor is not None) + int(self.multiplied), *[n for x in made for n in x.heads.integers],
            product_core(self.short)))
        if parts > 1:
            self.launches.append(launch(conv.add_parts_source(self.short), -(-q.type.size // BLOCK), whole.buffer, dq.buffer,
                                        q.type.size, parts, BLOCK))
        return Lowered(tuple(self.launches), tuple(self.scratch))


def contiguous(type: TensorType, buffer: Buffer) -> Operand:
    return Operand(type, buffer, heads_in(type.shape if type.ndim == 3 else (1, 1, 1)))


def alone(call: Call) -> Attention | None:
    """The primitive by itself; for float32 and float64 that are not empty."""
    floats = call.inputs[0].dtype in (dtypes.float32, dtypes.float64)
    if not floats or not all(t.size for t in (*call.inputs, *call.outputs)):
        return None
    return Attention(call.attrs, [contiguous(t, call.input(i)) for i, t in enumerate(call.inputs)],
                     [contiguous(t, call.output(i)) for i, t in enumerate(call.outputs)], None,
                     len(call.inputs) + len(call.outputs))


@lowers("attention")
def lower_attention(call: Call) -> Lowered | None:
    made = alone(call)
    return made.forward() if made else None


@lowers("attention_grad")
def lower_attention_grad(call: Call) -> Lowered | None:
    made = alone(call)
    return made.backward() if made else None


def lower_in_place(body: Graph, shared: Sequence[tuple[int, int]] = ()) -> Lowered:
    """The template "attention": the primitive, or its gradient, with the movement ops that feed it
    (`jitgrad.transforms.operands`)."""
    producers = body.producers()
    (node,) = [n for n in body.nodes if n.op in (ops.attention, ops.attention_grad)]
    inputs, factors = [], []
    for value in node.inputs:
        read = read_heads(producers, value) if value in producers else None
        source = read.source if read else value
        place = Buffer(body.inputs.index(source))
        inputs.append(Operand(value.type, place, read.heads) if read else contiguous(value.type, place))
        factors += [Buffer(body.inputs.index(read.factor))] if read and read.factor else []
    first = len(body.inputs)
    made = Attention(node.attrs, inputs, [], factors[0] if factors else None, first + len(body.outputs))
    if body.outputs == node.outputs:
        made.outputs = [contiguous(v.type, Buffer(first + k)) for k, v in enumerate(node.outputs)]
    elif node.op is ops.attention:
        chain, _ = follow(producers, body.outputs[0])
        heads = heads_of_moved(chain, node.outputs[0].type, body.outputs[0].type)
        assert heads is not None
        made.outputs = [Operand(node.outputs[0].type, Buffer(first), heads),
                        contiguous(node.outputs[1].type, Buffer(first + 1))]
    else:
        found = pieces(body)
        assert found is not None
        made.outputs = [Operand(v.type, Buffer(first), found[v].heads) for v in node.outputs]
        made.multiplied = found[node.outputs[0]].multiplied
    return made.forward() if node.op is ops.attention else made.backward()
