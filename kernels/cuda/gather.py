"""Neighbours of a column of a convolution, for the text of GPU kernels: `NAMES` is a part of the vocabulary.

What a column is, and what the numbers mean, says `codegen.cuda_columns`. It is a word of its own, since spelled out in
kernel text it takes several times as long to compile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from jitgrad.kernels.cpu.frontend import intrinsic
from jitgrad.kernels.cpu.intrinsics import from_memory, kept


@partial(intrinsic, literal=True)
def gather(typing: Any, p: Any, count: Any, line: Any, element: Any, axes: Any) -> Any:
    """``gather(p, n, (base, plane, limit), (channel, i …), (at, tap, end, size, pitch …))``: n elements of a line from
    `element` on, zeros where there are none, and then the numbers of the element behind them. `element` and `axes` have
    1 and 5 numbers for every axis. All numbers have one type. Memory at p[0] is read in place of what is not there."""
    kind, rank, lanes = line.dtype, len(element) - 1, count.literal_value
    value = kept(p.dtype)
    result = types.Tuple((value,) * lanes + (kind,) * (1 + rank))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        base, plane, limit = _numbers(builder, arguments[2], 3)
        state, fixed = _numbers(builder, arguments[3], 1 + rank), _numbers(builder, arguments[4], 5 * rank)
        zero, loaded = ir.Constant(base.type, 0), []
        for _ in range(lanes):
            there, place = builder.icmp_signed("<", state[0], limit), builder.add(base, builder.mul(state[0], plane))
            for k in range(rank):
                _, _, _, size, pitch = fixed[5 * k:5 * k + 5]
                there = builder.and_(there, builder.icmp_unsigned("<", state[1 + k], size))
                place = builder.add(place, builder.mul(state[1 + k], pitch))
            where = context.cast(builder, builder.select(there, place, zero), kind, types.int64)
            raw = builder.load(builder.gep(arguments[0], [where]))
            taken = builder.select(there, raw, ir.Constant(raw.type, 0))
            loaded.append(from_memory(context, builder, p.dtype, taken))
            state = _behind(builder, state, fixed)
        return context.make_tuple(builder, result, [*loaded, *state])

    return result(p, count, types.unliteral(line), types.unliteral(element), types.unliteral(axes)), codegen


def _numbers(builder: ir.IRBuilder, value: ir.Value, count: int) -> list[ir.Value]:
    return [builder.extract_value(value, k) for k in range(count)]


def _behind(builder: ir.IRBuilder, state: list[ir.Value], fixed: list[ir.Value]) -> list[ir.Value]:
    """The next element: the next place along the last axis, and from its end back to where it begins, while the axis before
    goes on."""
    made, carry = list[ir.Value](), ir.Constant(ir.IntType(1), 1)
    for k in reversed(range(len(state) - 1)):
        at, tap, end, _, _ = fixed[5 * k:5 * k + 5]
        place = builder.select(carry, builder.add(state[1 + k], tap), state[1 + k])
        carry = builder.icmp_signed("==", place, end)
        made = [builder.select(carry, at, place), *made]
    return [builder.add(state[0], builder.zext(carry, state[0].type)), *made]


NAMES: dict[str, Any] = {"gather": gather}
