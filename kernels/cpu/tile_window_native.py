"""Teaches Numba the rows of windows of `kernels.cpu.tile`: the largest element, a weighted sum, a sum of products."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from jitgrad.kernels.cpu import tile
from jitgrad.kernels.cpu.tile_vectors import (
    I1,
    I32,
    I64,
    POINTER,
    constant,
    declare,
    element_bytes,
    integers,
    masked_load,
    masked_store,
    splat,
    suffix,
    teach,
    where_all,
)


class _Run:
    """Reads what windows side by side have at one tap: `lanes` elements, `across` from each other, of those whose column is
    from `low` on and before `high`."""

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, across: ir.Value, low: ir.Value, high: ir.Value):
        self.builder, self.across, self.low, self.high = builder, across, low, high
        self.bytes = element_bytes(element)
        self.lanes = tile.tile_for(self.bytes).lanes
        self.vector, self.places = ir.VectorType(element, self.lanes), ir.VectorType(I32, self.lanes)
        self.numbers = ir.Constant(self.places, list(range(self.lanes)))
        self.spaced = builder.mul(self.numbers, splat(builder, builder.trunc(across, I32), self.lanes))
        self.close = builder.icmp_signed("==", across, constant(1))
        self.pairs = builder.icmp_signed("==", across, constant(2))
        self.alignment, self.nothing = ir.Constant(I32, self.bytes), ir.Constant(self.vector, None)
        self.load, self.store = masked_load(builder.module, self.vector), masked_store(builder.module, self.vector)
        mask = ir.VectorType(I1, self.lanes)
        self.gather = declare(builder.module, f"llvm.masked.gather.{suffix(element, self.lanes)}.v{self.lanes}p0",
                               self.vector, [ir.VectorType(POINTER, self.lanes), I32, mask, self.vector])

    def address(self, base: ir.Value, offset: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(base, [offset]), POINTER)

    def some(self, load: ir.Function, place: ir.Value, mask: ir.Value) -> ir.Value:
        """The elements of `mask` at `place`, by `load`; else zeros."""
        return where_all(self.builder, mask,
                         lambda lanes: self.builder.call(load, [place, self.alignment, lanes, self.nothing]))

    def put(self, value: ir.Value, place: ir.Value, mask: ir.Value) -> None:
        """Store the elements of `mask`."""
        where_all(self.builder, mask,
                  lambda lanes: self.builder.call(self.store, [value, place, self.alignment, lanes]))

    def left(self, count: ir.Value, start: ir.Value) -> ir.Value:
        """Which lanes there are for `count` windows, of which the first is number `start`."""
        many = self.builder.trunc(self.builder.sub(count, start), I32)
        return self.builder.icmp_signed("<", self.numbers, splat(self.builder, many, self.lanes))

    def read(self, x: ir.Value, place: ir.Value, column: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The elements from `place` on, in `column` and behind it, up to column `last`; and which of them there are."""
        builder, lanes = self.builder, self.lanes
        end = builder.add(last, constant(1))
        stop = builder.select(builder.icmp_signed("<", end, self.high), end, self.high)
        stop = builder.select(builder.icmp_signed("<", stop, self.low), self.low, stop)
        inside = self._within(column, self.spaced, stop)
        with builder.if_else(self.close) as (then, otherwise):
            with then:
                beside = self.some(self.load, self.address(x, place), inside)
                from_close = builder.block
            with otherwise:
                with builder.if_else(self.pairs) as (two, more):
                    with two:
                        halves = [self._half(x, place, column, stop, first) for first in (0, lanes)]
                        even = ir.Constant(self.places, list(range(0, 2 * lanes, 2)))
                        every_second = builder.shuffle_vector(*halves, even)
                        from_two = builder.block
                    with more:
                        far = self._far(x, place, inside)
                        from_more = builder.block
                apart = builder.phi(self.vector)
                apart.add_incoming(every_second, from_two)
                apart.add_incoming(far, from_more)
                from_apart = builder.block
        value = builder.phi(self.vector)
        value.add_incoming(beside, from_close)
        value.add_incoming(apart, from_apart)
        return value, inside

    def _within(self, first: ir.Value, steps: ir.Value, stop: ir.Value) -> ir.Value:
        """Which of the columns first + steps are from `low` on and before `stop`."""
        builder, lanes = self.builder, self.lanes
        beyond = builder.add(splat(builder, builder.trunc(builder.sub(first, self.low), I32), lanes), steps)
        return builder.icmp_unsigned("<", beyond, splat(builder, builder.trunc(builder.sub(stop, self.low), I32), lanes))

    def _half(self, x: ir.Value, place: ir.Value, column: ir.Value, stop: ir.Value, first: int) -> ir.Value:
        builder = self.builder
        inside = self._within(builder.add(column, constant(first)), self.numbers, stop)
        return self.some(self.load, self.address(x, builder.add(place, constant(first))), inside)

    def _far(self, x: ir.Value, place: ir.Value, inside: ir.Value) -> ir.Value:
        builder, lanes = self.builder, self.lanes
        spaced = builder.zext(self.spaced, ir.VectorType(I64, lanes))
        steps = builder.mul(spaced, splat(builder, constant(self.bytes), lanes))
        base = splat(builder, builder.ptrtoint(self.address(x, place), I64), lanes)
        lines = builder.inttoptr(builder.add(base, steps), ir.VectorType(POINTER, lanes))
        return self.some(self.gather, lines, inside)


def _emit_largest_run(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[10].dtype)
    (count, across, deep, deep_step, tall, tall_step, wide, wide_step, low, high, x, x_offset, origin, o, o_offset, index,
     index_offset) = integers(context, builder, signature, values)
    run = _Run(builder, element, across, low, high)
    lanes, places = run.lanes, run.places
    store_places = declare(builder.module, f"llvm.masked.store.v{lanes}i64.p0", ir.VoidType(),
                            [ir.VectorType(I64, lanes), POINTER, I32, ir.VectorType(I1, lanes)])
    with builder.goto_entry_block():
        best, at = builder.alloca(run.vector), builder.alloca(places)
    with cgutils.for_range_slice(builder, constant(0), count, constant(lanes), intp=I64) as (start, _):
        builder.store(ir.Constant(run.vector, [float("-inf")] * lanes), best)
        builder.store(ir.Constant(places, [-1] * lanes), at)
        with (cgutils.for_range(builder, deep, intp=I64) as i, cgutils.for_range(builder, tall, intp=I64) as j,
              cgutils.for_range(builder, wide, intp=I64) as k):
            shift = builder.mul(k.index, wide_step)
            column, last = [builder.add(builder.mul(n, across), shift) for n in (start, builder.sub(count, constant(1)))]
            line = builder.add(builder.mul(i.index, deep_step), builder.mul(j.index, tall_step))
            place = builder.add(builder.add(x_offset, line), column)
            value, inside = run.read(x, place, column, last)
            old, older = builder.load(best), builder.load(at)
            better = builder.or_(builder.fcmp_ordered(">", value, old), builder.fcmp_unordered("uno", value, value))
            better = builder.or_(better, builder.icmp_signed("<", older, ir.Constant(places, [0] * lanes)))
            better = builder.and_(better, inside)
            here = builder.add(splat(builder, builder.trunc(builder.sub(place, origin), I32), lanes), run.spaced)
            builder.store(builder.select(better, value, old), best)
            builder.store(builder.select(better, here, older), at)
        wanted = run.left(count, start)
        run.put(builder.load(best), run.address(o, builder.add(o_offset, start)), wanted)
        wide_places = builder.sext(builder.load(at), ir.VectorType(I64, lanes))
        there = run.address(index, builder.add(index_offset, start))
        where_all(builder, wanted, lambda mask: builder.call(store_places, [wide_places, there, ir.Constant(I32, 8), mask]))
    return context.get_dummy_value()


def _fused(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, in one rounding where the processor has an instruction for it."""
    name = f"llvm.fmuladd.{suffix(x.type.element, x.type.count)}"
    return builder.call(declare(builder.module, name, x.type, [x.type] * 3), [x, y, z])


def _emit_weighted_run(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[10].dtype)
    (count, across, deep, deep_step, tall, tall_step, wide, wide_step, low, high, x, x_offset, w, w_offset, w_deep, w_tall,
     w_wide, o, o_offset) = integers(context, builder, signature, values)
    run = _Run(builder, element, across, low, high)
    with builder.goto_entry_block():
        total = builder.alloca(run.vector)
    with cgutils.for_range_slice(builder, constant(0), count, constant(run.lanes), intp=I64) as (start, _):
        builder.store(run.nothing, total)
        with (cgutils.for_range(builder, deep, intp=I64) as i, cgutils.for_range(builder, tall, intp=I64) as j,
              cgutils.for_range(builder, wide, intp=I64) as k):
            shift = builder.mul(k.index, wide_step)
            column, last = [builder.add(builder.mul(n, across), shift) for n in (start, builder.sub(count, constant(1)))]
            line = builder.add(builder.mul(i.index, deep_step), builder.mul(j.index, tall_step))
            value, _ = run.read(x, builder.add(builder.add(x_offset, line), column), column, last)
            tap = w_offset
            for loop, step in ((i, w_deep), (j, w_tall), (k, w_wide)):
                tap = builder.add(tap, builder.mul(loop.index, step))
            weight = splat(builder, builder.load(builder.gep(w, [tap])), run.lanes)
            builder.store(_fused(builder, value, weight, builder.load(total)), total)
        run.put(builder.load(total), run.address(o, builder.add(o_offset, start)), run.left(count, start))
    return context.get_dummy_value()


def _emit_dot_rows(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[5].dtype)
    rows, count, across, low, high, x, x_offset, x_row, g, g_offset, g_row = integers(context, builder, signature, values)
    run = _Run(builder, element, across, low, high)
    last = builder.mul(builder.sub(count, constant(1)), across)
    with builder.goto_entry_block():
        total = builder.alloca(run.vector)
    builder.store(run.nothing, total)
    with (cgutils.for_range(builder, rows, intp=I64) as y,
          cgutils.for_range_slice(builder, constant(0), count, constant(run.lanes), intp=I64) as (start, _)):
        column = builder.mul(start, across)
        place = builder.add(builder.add(x_offset, builder.mul(y.index, x_row)), column)
        value, inside = run.read(x, place, column, last)
        beside = builder.add(builder.add(g_offset, builder.mul(y.index, g_row)), start)
        other = run.some(run.load, run.address(g, beside), inside)
        builder.store(_fused(builder, value, other, builder.load(total)), total)
    add = declare(builder.module, f"llvm.vector.reduce.fadd.{suffix(element, run.lanes)}", element, [element, run.vector])
    return builder.call(add, [ir.Constant(element, -0.0), builder.load(total)], fastmath=("reassoc",))


teach(tile.largest_run, _emit_largest_run)
teach(tile.weighted_run, _emit_weighted_run)
teach(tile.dot_rows, _emit_dot_rows, lambda *given: given[5].dtype)
