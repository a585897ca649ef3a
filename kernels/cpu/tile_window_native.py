"""Teaches Numba the rows of windows of `kernels.cpu.tile`: a weighted sum, a sum of products; and how windows side by side
are read, for `tile_maxima_native`, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from jitgrad import config
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
from jitgrad.kernels.cpu.tile_window_text import TAPS, WindowKernel


class Run:
    """Reads what windows side by side have at one tap: `lanes` elements, `across` from each other, of those whose column is
    from `low` on and before `high`. Where there are none, it reads `fill`. `free`: all that it is asked for may be read and
    written, and no mask is needed."""

    def __init__(self, builder: ir.IRBuilder, element: ir.Type, across: ir.Value, low: ir.Value, high: ir.Value,
                 fill: float = 0.0, free: bool = False):
        self.builder, self.across, self.low, self.high = builder, across, low, high
        self.bytes = element_bytes(element)
        self.lanes = tile.tile_for(self.bytes).lanes
        self.vector, self.places = ir.VectorType(element, self.lanes), ir.VectorType(I32, self.lanes)
        self.numbers = ir.Constant(self.places, list(range(self.lanes)))
        self.spaced = builder.mul(self.numbers, splat(builder, builder.trunc(across, I32), self.lanes))
        self.close = builder.icmp_signed("==", across, constant(1))
        self.pairs = builder.icmp_signed("==", across, constant(2))
        self.alignment, self.nothing = ir.Constant(I32, self.bytes), ir.Constant(self.vector, None)
        self.fill = ir.Constant(self.vector, [fill] * self.lanes)
        self.load, self.store = masked_load(builder.module, self.vector), masked_store(builder.module, self.vector)
        self.mask = ir.VectorType(I1, self.lanes)
        self.all = ir.Constant(self.mask, [1] * self.lanes) if free else None
        self.gather = declare(builder.module, f"llvm.masked.gather.{suffix(element, self.lanes)}.v{self.lanes}p0",
                               self.vector, [ir.VectorType(POINTER, self.lanes), I32, self.mask, self.vector])

    def address(self, base: ir.Value, offset: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(base, [offset]), POINTER)

    def stride(self, elements: ir.Value) -> ir.Value:
        """So many elements in bytes."""
        return self.builder.mul(elements, constant(self.bytes))

    def some(self, load: ir.Function, place: ir.Value, mask: ir.Value) -> ir.Value:
        """The elements of `mask` at `place`, by `load`; else `fill`."""
        return where_all(self.builder, mask,
                         lambda lanes: self.builder.call(load, [place, self.alignment, lanes, self.fill]))

    def put(self, value: ir.Value, place: ir.Value, mask: ir.Value) -> None:
        """Store the elements of `mask`."""
        where_all(self.builder, mask,
                  lambda lanes: self.builder.call(self.store, [value, place, self.alignment, lanes]))

    def some_taps(self, taps: ir.Value, offset: ir.Value, mask: ir.Value) -> ir.Value:
        """The numbers of taps of `mask`, as they are in memory."""
        vector, name = self.taps(taps)
        load = declare(self.builder.module, f"llvm.masked.load.{name}", vector, [POINTER, I32, self.mask, vector])
        arguments = [self.address(taps, offset), ir.Constant(I32, vector.element.width // 8)]
        return where_all(self.builder, mask, lambda lanes: self.builder.call(load, [*arguments, lanes,
                                                                                   ir.Constant(vector, None)]))

    def put_taps(self, numbers: ir.Value, taps: ir.Value, offset: ir.Value, mask: ir.Value) -> None:
        """Store the numbers of taps of `mask`."""
        vector, name = self.taps(taps)
        store = declare(self.builder.module, f"llvm.masked.store.{name}", ir.VoidType(), [vector, POINTER, I32, self.mask])
        arguments = [numbers, self.address(taps, offset), ir.Constant(I32, vector.element.width // 8)]
        where_all(self.builder, mask, lambda lanes: self.builder.call(store, [*arguments, lanes]))

    def taps(self, taps: ir.Value) -> tuple[ir.VectorType, str]:
        """A vector of what `taps` points to, and how the names of its intrinsics end."""
        kind = taps.type.pointee
        return ir.VectorType(kind, self.lanes), f"v{self.lanes}i{kind.width}.p0"

    def left(self, count: ir.Value, start: ir.Value) -> ir.Value:
        """Which lanes there are for `count` windows, of which the first is number `start`."""
        if self.all:
            return self.all
        many = self.builder.trunc(self.builder.sub(count, start), I32)
        return self.builder.icmp_signed("<", self.numbers, splat(self.builder, many, self.lanes))

    def whole(self, count: ir.Value, start: ir.Value) -> ir.Value:
        """`start`, or where the last whole vector of `count` begins, if that is before it."""
        builder, last = self.builder, self.builder.sub(count, constant(self.lanes))
        late = builder.and_(builder.icmp_signed(">", start, last), builder.icmp_signed(">=", last, constant(0)))
        return builder.select(late, last, start)

    def read(self, x: ir.Value, place: ir.Value, column: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The elements from `place` on, in `column` and behind it, up to column `last`; and which of them there are."""
        builder, lanes = self.builder, self.lanes
        stop = self._stop(last)
        inside = self.within(column, self.spaced, stop)
        with builder.if_else(self.close) as (then, otherwise):
            with then:
                beside = self.some(self.load, self.address(x, place), inside)
                from_close = builder.block
            with otherwise:
                with builder.if_else(self.pairs) as (two, more):
                    with two:
                        halves = [self._half(x, place, column, stop, first) for first in (0, lanes)]
                        every_second = self._every_second(halves, 0)
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

    def read_pairs(self, x: ir.Value, place: ir.Value, column: ir.Value, last: ir.Value) -> list[ir.Value]:
        """For windows two columns from each other what `read` gives, and what it gives for the next column."""
        stop = self._stop(last)
        halves = [self._half(x, place, column, stop, first) for first in (0, self.lanes)]
        return [self._every_second(halves, first) for first in (0, 1)]

    def _stop(self, last: ir.Value) -> ir.Value:
        """Behind the columns that are read, if those behind `last` are not."""
        builder = self.builder
        end = builder.add(last, constant(1))
        stop = builder.select(builder.icmp_signed("<", end, self.high), end, self.high)
        return builder.select(builder.icmp_signed("<", stop, self.low), self.low, stop)

    def _every_second(self, halves: list[ir.Value], first: int) -> ir.Value:
        numbers = list(range(first, 2 * self.lanes, 2))
        return self.builder.shuffle_vector(*halves, ir.Constant(self.places, numbers))

    def interleaved(self, two: list[ir.Value], half: int) -> ir.Value:
        """The first elements of two vectors in turns, or of `half` 1 the last ones."""
        first = half * self.lanes // 2
        numbers = [n for k in range(first, first + self.lanes // 2) for n in (k, self.lanes + k)]
        return self.builder.shuffle_vector(*two, ir.Constant(self.places, numbers))

    def within(self, first: ir.Value, steps: ir.Value, stop: ir.Value) -> ir.Value:
        """Which of the columns first + steps are from `low` on and before `stop`."""
        if self.all:
            return self.all
        builder, lanes = self.builder, self.lanes
        beyond = builder.add(splat(builder, builder.trunc(builder.sub(first, self.low), I32), lanes), steps)
        return builder.icmp_unsigned("<", beyond, splat(builder, builder.trunc(builder.sub(stop, self.low), I32), lanes))

    def _half(self, x: ir.Value, place: ir.Value, column: ir.Value, stop: ir.Value, first: int) -> ir.Value:
        builder = self.builder
        inside = self.within(builder.add(column, constant(first)), self.numbers, stop)
        return self.some(self.load, self.address(x, builder.add(place, constant(first))), inside)

    def _far(self, x: ir.Value, place: ir.Value, inside: ir.Value) -> ir.Value:
        builder, lanes = self.builder, self.lanes
        spaced = builder.zext(self.spaced, ir.VectorType(I64, lanes))
        steps = builder.mul(spaced, splat(builder, constant(self.bytes), lanes))
        base = splat(builder, builder.ptrtoint(self.address(x, place), I64), lanes)
        lines = builder.inttoptr(builder.add(base, steps), ir.VectorType(POINTER, lanes))
        return self.some(self.gather, lines, inside)


def choose_run(builder: ir.IRBuilder, is_free: ir.Value, free: Run, masked: Run, write: Callable[[Run], None]) -> None:
    """What `write` writes, once without masks and once with them."""
    with builder.if_else(is_free) as branches:
        for branch, run in zip(branches, (free, masked), strict=True):
            with branch:
                write(run)


def _fused(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, in one rounding where the processor has an instruction for it."""
    name = f"llvm.fmuladd.{suffix(x.type.element, x.type.count)}"
    return builder.call(declare(builder.module, name, x.type, [x.type] * 3), [x, y, z])


def _by_text(builder: ir.IRBuilder, run: Run, kind: str, wide: ir.Value,
             call: Callable[[Callable[[list[ir.Value]], None], ir.Value, ir.Value], None],
             otherwise: Callable[[], None]) -> None:
    """What `call` writes, for windows that a function of `tile_window_text` knows, else `otherwise`. It gets what calls the
    function, the first of some taps, and how many these are. Without masks, the text would take lane by lane."""
    if not config.processor().masks:
        otherwise()
        return
    known = builder.or_(run.close, run.pairs)
    with builder.if_else(known) as (then, other):
        with then:
            taps = builder.select(builder.icmp_signed("<", wide, constant(1)), constant(1), wide)
            with cgutils.for_range_slice(builder, constant(0), taps, constant(TAPS), intp=I64) as (first, _):
                left = builder.sub(wide, first)
                several = builder.select(builder.icmp_signed("<", left, constant(TAPS)), left, constant(TAPS))
                call(lambda arguments: _choose(builder, run, kind, several, arguments), first, several)
        with other:
            otherwise()


def _choose(builder: ir.IRBuilder, run: Run, kind: str, wide: ir.Value, arguments: list[ir.Value]) -> None:
    """Call the function `kind` for so many taps; for none, that for one."""
    end = builder.append_basic_block("window.end")
    places = builder.add(wide, builder.select(run.pairs, constant(TAPS + 1), constant(0)))
    choose = builder.switch(places, end)
    for across in (1, 2):
        for count in range(TAPS + 1):
            kernel = WindowKernel(kind, max(count, 1), across, run.lanes, 8 * run.bytes)
            block = builder.append_basic_block(f"window.{count}x{across}")
            choose.add_case(constant(count + (across - 1) * (TAPS + 1)), block)
            builder.position_at_end(block)
            builder.call(declare(builder.module, kernel.name, ir.VoidType(), [v.type for v in arguments]), arguments)
            builder.branch(end)
    builder.position_at_end(end)


def _emit_weighted_rows(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[12].dtype)
    (rows, count, down, across, deep, deep_step, tall, tall_step, wide, wide_step, low, high, x, x_offset, w, w_offset,
     w_deep, w_tall, w_wide, o, o_offset, o_row) = integers(context, builder, signature, values)
    run = Run(builder, element, across, low, high)
    with builder.goto_entry_block():
        total = builder.alloca(run.vector)

    def call(function: Callable[[list[ir.Value]], None], first: ir.Value, several: ir.Value) -> None:
        shift = builder.mul(first, wide_step)
        some = builder.select(builder.icmp_signed(">", several, constant(0)), tall, constant(0))
        edges = [builder.sub(edge, shift) for edge in (low, high)]
        with cgutils.for_range(builder, deep, intp=I64) as i:
            image = builder.add(builder.add(x_offset, shift), builder.mul(i.index, deep_step))
            weights = builder.add(w_offset, builder.add(builder.mul(i.index, w_deep), builder.mul(first, w_wide)))
            adds = builder.zext(builder.icmp_signed("!=", builder.or_(i.index, first), constant(0)), I64)
            function([rows, count, run.stride(down), some, run.stride(tall_step), run.stride(wide_step), wide_step, *edges,
                      run.address(x, image), run.address(w, weights), run.stride(w_tall), run.stride(w_wide),
                      run.address(o, o_offset), run.stride(o_row), adds])

    def otherwise() -> None:
        with (cgutils.for_range(builder, rows, intp=I64) as y,
              cgutils.for_range_slice(builder, constant(0), count, constant(run.lanes), intp=I64) as (start, _)):
            builder.store(run.nothing, total)
            with (cgutils.for_range(builder, deep, intp=I64) as i, cgutils.for_range(builder, tall, intp=I64) as j,
                  cgutils.for_range(builder, wide, intp=I64) as k):
                shift = builder.mul(k.index, wide_step)
                column, last = [builder.add(builder.mul(n, across), shift) for n in (start, builder.sub(count, constant(1)))]
                place, tap = builder.add(builder.add(x_offset, column), builder.mul(y.index, down)), w_offset
                for loop, step, w_step in ((i, deep_step, w_deep), (j, tall_step, w_tall), (k, constant(0), w_wide)):
                    place = builder.add(place, builder.mul(loop.index, step))
                    tap = builder.add(tap, builder.mul(loop.index, w_step))
                value, inside = run.read(x, place, column, last)
                weight = splat(builder, builder.load(builder.gep(w, [tap])), run.lanes)
                before = builder.load(total)
                builder.store(builder.select(inside, _fused(builder, value, weight, before), before), total)
            target = builder.add(builder.add(o_offset, builder.mul(y.index, o_row)), start)
            run.put(builder.load(total), run.address(o, target), run.left(count, start))

    _by_text(builder, run, "weighted_rows", wide, call, otherwise)
    return context.get_dummy_value()


def _emit_dot_rows(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[8].dtype)
    (rows, count, down, across, wide, wide_step, low, high, x, x_offset, g, g_offset, g_row, o, o_offset) = integers(
        context, builder, signature, values)
    run = Run(builder, element, across, low, high)
    with builder.goto_entry_block():
        total = builder.alloca(run.vector)

    def call(function: Callable[[list[ir.Value]], None], first: ir.Value, several: ir.Value) -> None:
        shift = builder.mul(first, wide_step)
        edges = [builder.sub(edge, shift) for edge in (low, high)]
        function([rows, count, run.stride(down), run.stride(wide_step), wide_step, *edges,
                  run.address(x, builder.add(x_offset, shift)), run.address(g, g_offset), run.stride(g_row),
                  run.address(o, builder.add(o_offset, first))])

    def otherwise() -> None:
        with cgutils.for_range(builder, wide, intp=I64) as k:
            builder.store(run.nothing, total)
            shift = builder.mul(k.index, wide_step)
            last = builder.add(builder.mul(builder.sub(count, constant(1)), across), shift)
            with (cgutils.for_range(builder, rows, intp=I64) as y,
                  cgutils.for_range_slice(builder, constant(0), count, constant(run.lanes), intp=I64) as (start, _)):
                column = builder.add(builder.mul(start, across), shift)
                place = builder.add(builder.add(x_offset, builder.mul(y.index, down)), column)
                value, inside = run.read(x, place, column, last)
                beside = builder.add(builder.add(g_offset, builder.mul(y.index, g_row)), start)
                other = run.some(run.load, run.address(g, beside), inside)
                builder.store(_fused(builder, value, other, builder.load(total)), total)
            name = f"llvm.vector.reduce.fadd.{suffix(element, run.lanes)}"
            add = declare(builder.module, name, element, [element, run.vector])
            found = builder.call(add, [ir.Constant(element, -0.0), builder.load(total)], fastmath=("reassoc",))
            place = builder.gep(o, [builder.add(o_offset, k.index)])
            builder.store(builder.fadd(builder.load(place), found), place)

    _by_text(builder, run, "dot_rows", wide, call, otherwise)
    return context.get_dummy_value()


teach(tile.weighted_rows, _emit_weighted_rows)
teach(tile.dot_rows, _emit_dot_rows)
