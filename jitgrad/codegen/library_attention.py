"""Lowering of attention and its gradient: pack what products read transposed, then blocks of queries and keys."""

from __future__ import annotations

from jitgrad import dtypes
from jitgrad.codegen.call import BLOCK, Call, launch, lowers, product_core
from jitgrad.codegen.kernel import Buffer, Launch, Lowered
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import attention, conv, gemm
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.ops.attention import mask_runs, operands

ITEMS = 8                                       # of the gradient, for balance: heads are cut into parts where they are fewer


def pack_rows(operand: Buffer, x: TensorType, panels: Buffer) -> tuple[Launch, int]:
    """Pack x[G, S, E] as the right operand of a product with its transpose; the launch, and the bytes that it takes."""
    groups, rows, depth = x.shape
    columns, short = gemm.element_tile(x.dtype.short).columns, x.dtype.short
    packing, _, _ = gemm.pack(Matrices((rows * depth,), depth, 1), (groups,), rows, depth, columns, columns, depth, 1)
    text = gemm.pack_source(short, packing.kind)
    return launch(text, packing.items, operand, panels, *packing.integers), packing.elements * x.dtype.itemsize


def integers(call: Call, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None,
             dropped: bool) -> tuple[int, ...]:
    """`attention.ARGUMENTS`."""
    runs, period = mask_runs(mask.shape) if mask else (1, 1)
    row = 0 if mask is None or mask.shape[-2] == 1 else mask.shape[-1]
    block = attention.block_of_queries(q.dtype.short, k.shape[1])
    return (q.shape[1], k.shape[1], q.shape[2], v.shape[2], q.shape[0] // k.shape[0], int(mask is not None),
            q.shape[0] // runs, period, row, int(call.attrs["causal"]), int(call.attrs["zero"]), int(dropped), block,
            -(-q.shape[1] // block))


def takes(call: Call) -> bool:
    """float32 and float64 that are not empty."""
    return call.inputs[0].dtype in (dtypes.float32, dtypes.float64) and all(t.size for t in (*call.inputs, *call.outputs))


def mask_and_draw(call: Call, first: int, last: int) -> tuple[TensorType | None, bool, list[Buffer]]:
    """What stands behind v, in inputs `first` to `last`: the mask, whether there is dropout, and the kernel's operands
    for both. What is not there is never read; the query stands in its place."""
    _, _, _, mask, draw = operands(call.inputs[first - 3:last])
    behind = [call.input(i) for i in range(first, last)]
    unused = call.input(first - 3)
    return mask, bool(draw), [behind.pop(0) if mask else unused, *(behind if draw else [unused] * 4)]


@lowers("attention")
def lower_attention(call: Call) -> Lowered | None:
    if not takes(call):
        return None
    q, k, v = call.inputs[:3]
    mask, dropped, extra = mask_and_draw(call, 3, len(call.inputs))
    pack, nbytes = pack_rows(call.input(1), k, call.scratch(0))
    sizes = integers(call, q, k, v, mask, dropped)
    run = launch(attention.source("attention", q.dtype.short), q.shape[0] * sizes[-1], call.input(0), call.scratch(0),
                 call.input(2), *extra, call.output(0), call.output(1), *sizes, product_core(q.dtype.short))
    return Lowered((pack, run), (nbytes,))


@lowers("attention_grad")
def lower_attention_grad(call: Call) -> Lowered | None:
    if not takes(call):
        return None
    _, q, k, v = call.inputs[:4]
    out, lse = len(call.inputs) - 2, len(call.inputs) - 1
    mask, dropped, extra = mask_and_draw(call, 4, out)
    short, itemsize, block = q.dtype.short, q.dtype.itemsize, attention.block_of_keys(q.dtype.short)
    blocks = -(-k.shape[1] // block)
    per_part = -(-blocks // min(-(-ITEMS // k.shape[0]), blocks))
    parts = -(-blocks // per_part)
    pack_k, bytes_k = pack_rows(call.input(2), k, call.scratch(0))
    pack_v, bytes_v = pack_rows(call.input(3), v, call.scratch(1))
    dots = launch(attention.source("attention_dots", short), q.shape[0] * q.shape[1], call.input(0), call.input(out),
                  call.scratch(2), v.shape[2])
    dq = call.output(0) if parts == 1 else call.scratch(3)
    run = launch(attention.source("attention_grad", short), k.shape[0] * parts, call.input(0), call.input(1), call.input(2),
                 *extra, call.input(lse), call.scratch(2), call.scratch(0), call.scratch(1), dq, call.output(1),
                 call.output(2), *integers(call, q, k, v, mask, dropped), parts, per_part * block, q.shape[0],
                 product_core(short))
    scratch = bytes_k, bytes_v, q.shape[0] * q.shape[1] * itemsize
    if parts == 1:
        return Lowered((pack_k, pack_v, dots, run), scratch)
    add = launch(conv.add_parts_source(short), -(-q.size // BLOCK), call.scratch(3), call.output(0), q.size, parts, BLOCK)
    return Lowered((pack_k, pack_v, dots, run, add), (*scratch, parts * q.nbytes))
