"""Teaches Numba the rows of maxima of `kernels.cpu.tile`, and those of their gradient.

Masked vectors cost more than whole ones, most of all where stores miss the caches. So vectors are whole wherever what is
read too much lies inside of the memory, and what is written too much is written again, since rows come one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from jitgrad.kernels.cpu import tile
from jitgrad.kernels.cpu.tile_vectors import I32, I64, constant, integers, splat, teach
from jitgrad.kernels.cpu.tile_window_native import Run, choose_run


def _emit_largest_rows(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[12].dtype)
    (rows, count, down, across, deep, deep_step, tall, tall_step, wide, wide_step, low, high, x, x_offset, x_end, first_tap,
     deep_taps, o, o_offset, o_end, taps, taps_offset) = integers(context, builder, signature, values)
    masked, free = [Run(builder, element, across, low, high, float("-inf"), free) for free in (False, True)]
    with builder.goto_entry_block():
        numbers = masked.taps(taps)[0]
        best, at = builder.alloca(masked.vector), builder.alloca(numbers)

    def everywhere(number: ir.Value) -> ir.Value:
        return splat(builder, builder.trunc(number, numbers.element), numbers.count)

    def improve(value: ir.Value, number: ir.Value) -> None:
        """Take the elements at the tap of this number where they are larger than those up to now."""
        old = builder.load(best)
        better = builder.or_(builder.fcmp_ordered(">", value, old), builder.fcmp_unordered("uno", value, value))
        builder.store(builder.select(better, value, old), best)
        builder.store(builder.select(better, everywhere(number), builder.load(at)), at)

    def begin(run: Run, column: ir.Value) -> None:
        """No element is larger than -inf: where all are this, it is the first that there is."""
        builder.store(run.fill, best)
        builder.store(everywhere(first_tap), at)
        if run.all:
            return
        with builder.if_then(builder.icmp_signed("<", column, low)), cgutils.for_range(builder, wide, intp=I64) as k:
            missing = builder.sub(low, builder.add(column, builder.mul(k.index, wide_step)))
            before = builder.icmp_signed("<", run.spaced, splat(builder, builder.trunc(missing, I32), run.lanes))
            builder.store(builder.add(builder.load(at), builder.zext(before, numbers)), at)

    def line(run: Run, start: ir.Value, place: ir.Value, number: ir.Value) -> None:
        """What windows from `start` on have at one line of taps, of which the first is at `place`."""
        def columns(k: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            shift, more = builder.mul(k, wide_step), builder.mul(last, wide_step)
            return (builder.add(place, shift), builder.add(builder.mul(start, across), shift),
                    builder.add(builder.mul(builder.sub(count, constant(1)), across), more))

        together = builder.and_(run.pairs, builder.icmp_signed("==", wide_step, constant(1)))
        with builder.if_else(together) as (then, otherwise):
            with then, cgutils.for_range_slice(builder, constant(0), wide, constant(2), intp=I64) as (k, _):
                next_k = builder.add(k, constant(1))
                both = builder.icmp_signed("<", next_k, wide)
                first, second = run.read_pairs(x, *columns(k, builder.select(both, next_k, k)))
                improve(first, builder.add(number, k))
                with builder.if_then(both):
                    improve(second, builder.add(number, next_k))
            with otherwise, cgutils.for_range(builder, wide, intp=I64) as k:
                improve(run.read(x, *columns(k.index, k.index))[0], builder.add(number, k.index))

    def windows(run: Run, y: ir.Value, start: ir.Value) -> None:
        """Those of row y from `start` on, a vector of them."""
        begin(run, builder.mul(start, across))
        with cgutils.for_range(builder, deep, intp=I64) as i, cgutils.for_range(builder, tall, intp=I64) as j:
            place = builder.add(builder.add(x_offset, builder.mul(y, down)), builder.mul(start, across))
            place = builder.add(place, builder.add(builder.mul(i.index, deep_step), builder.mul(j.index, tall_step)))
            number = builder.add(builder.mul(i.index, deep_taps), builder.mul(j.index, wide))
            line(run, start, place, builder.add(first_tap, number))
        if run.all:
            finish(run, y, start)
        else:
            choose_run(builder, may_write(y, start), free, masked, lambda run: finish(run, y, start))

    def finish(run: Run, y: ir.Value, start: ir.Value) -> None:
        wanted, window = run.left(count, start), builder.add(builder.mul(y, count), start)
        run.put(builder.load(best), run.address(o, builder.add(o_offset, window)), wanted)
        run.put_taps(builder.load(at), taps, builder.add(taps_offset, window), wanted)

    reach = builder.mul(builder.sub(wide, constant(1)), wide_step)
    furthest = builder.add(x_offset, builder.add(reach, builder.mul(across, constant(masked.lanes))))
    for size, step in ((deep, deep_step), (tall, tall_step)):
        furthest = builder.add(furthest, builder.mul(builder.sub(size, constant(1)), step))

    def may_write(y: ir.Value, start: ir.Value) -> ir.Value:
        """A whole vector of windows of row y from `start` on."""
        behind = builder.add(builder.add(start, constant(masked.lanes)), builder.mul(y, count))
        return builder.icmp_signed("<=", builder.add(o_offset, behind), o_end)

    def may_read(y: ir.Value, start: ir.Value) -> ir.Value:
        """The windows of row y from `start` on have all of their elements, and whole vectors may be read."""
        column, behind = builder.mul(start, across), builder.add(start, constant(masked.lanes))
        end = builder.select(builder.icmp_signed("<", behind, count), behind, count)
        last = builder.add(builder.mul(builder.sub(end, constant(1)), across), reach)
        inside = builder.and_(builder.icmp_signed(">=", column, low), builder.icmp_signed("<", last, high))
        there = builder.icmp_signed("<=", builder.add(builder.add(furthest, column), builder.mul(y, down)), x_end)
        return builder.and_(builder.or_(free.close, free.pairs), builder.and_(inside, there))

    with (cgutils.for_range(builder, rows, intp=I64) as y,
          cgutils.for_range_slice(builder, constant(0), count, constant(masked.lanes), intp=I64) as (here, _)):
        start = masked.whole(count, here)
        is_free = builder.and_(may_read(y.index, start), may_write(y.index, start))
        choose_run(builder, is_free, free, masked, lambda run: windows(run, y.index, start))
    return context.get_dummy_value()


def _emit_largest_grad_row(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[16].dtype)
    (z, y, layers, rows, count, deep, tall, wide, onward, down, across, behind, apart, beside, left, width, g, g_offset,
     taps, taps_offset, o, o_offset, o_end) = integers(context, builder, signature, values)
    run, free = [Run(builder, element, across, constant(0), count, free=free) for free in (False, True)]
    with builder.goto_entry_block():
        totals = [builder.alloca(run.vector) for _ in range(2)]

    @contextlib.contextmanager
    def windows(place: ir.Value, size: ir.Value, stride: ir.Value, apart: ir.Value, many: ir.Value) -> Iterator[Any]:
        """For each of `size` taps, the last one first: it, and which of `many` windows has it at `place`, if one has."""
        with cgutils.for_range(builder, size, intp=I64) as loop:
            tap = builder.sub(builder.sub(size, constant(1)), loop.index)
            distance = builder.sub(place, builder.mul(tap, apart))
            window, rest = builder.sdiv(distance, stride), builder.srem(distance, stride)
            inside = builder.and_(builder.icmp_signed(">=", distance, constant(0)), builder.icmp_signed("<", window, many))
            with builder.if_then(builder.and_(inside, builder.icmp_signed("==", rest, constant(0)))):
                yield tap, window

    def add_up(start: ir.Value, phase: ir.Value, total: ir.Value, line: ir.Value, first_tap: ir.Value) -> None:
        """What windows of a line give to the columns ``(start + lane) * across + phase``: the first window first."""
        with cgutils.for_range(builder, wide, intp=I64) as loop:
            k = builder.sub(builder.sub(wide, constant(1)), loop.index)
            distance = builder.sub(builder.add(phase, left), builder.mul(k, beside))
            with builder.if_then(builder.icmp_signed("==", builder.srem(distance, across), constant(0))):
                first = builder.add(start, builder.sdiv(distance, across))
                inside, place = run.within(first, run.numbers, count), builder.add(line, first)
                found = run.some_taps(taps, builder.add(taps_offset, place), inside)
                number = builder.trunc(builder.add(first_tap, k), found.type.element)
                chosen = builder.and_(inside, builder.icmp_signed("==", found, splat(builder, number, run.lanes)))
                value = run.some(run.load, run.address(g, builder.add(g_offset, place)), inside)
                old = builder.load(total)
                builder.store(builder.select(chosen, builder.fadd(old, value), old), total)

    def put(value: ir.Value, column: ir.Value) -> None:
        """Store a vector from this column on."""
        place = builder.add(o_offset, column)
        whole = builder.icmp_signed("<=", builder.add(place, constant(run.lanes)), o_end)
        choose_run(builder, whole, free, run, lambda run: run.put(value, run.address(o, place), run.left(width, column)))

    def each(columns: ir.Value, phases: list[ir.Value], finish: Callable[[ir.Value], None]) -> None:
        """Sums of so many columns of each of `phases`, `finish`ed a vector at a time."""
        with cgutils.for_range_slice(builder, constant(0), columns, constant(run.lanes), intp=I64) as (here, _):
            start = run.whole(columns, here)
            for total in totals:
                builder.store(run.nothing, total)
            with (windows(z, deep, onward, behind, layers) as (i, layer), windows(y, tall, down, apart, rows) as (j, row)):
                line = builder.mul(builder.add(builder.mul(layer, rows), row), count)
                first_tap = builder.mul(builder.add(builder.mul(i, tall), j), wide)
                for phase, total in zip(phases, totals):
                    add_up(start, phase, total, line, first_tap)
            finish(start)

    def finish_close(start: ir.Value) -> None:
        put(builder.load(totals[0]), start)

    def finish_pairs(start: ir.Value) -> None:
        for half in range(2):
            column = builder.add(builder.mul(start, constant(2)), constant(half * run.lanes))
            with builder.if_then(builder.icmp_signed("<", column, width)):
                put(run.interleaved([builder.load(total) for total in totals], half), column)

    with builder.if_else(run.close) as (then, otherwise):
        with then:
            each(width, [constant(0)], finish_close)
        with otherwise:
            each(builder.sdiv(builder.add(width, constant(1)), constant(2)), [constant(0), constant(1)], finish_pairs)
    return context.get_dummy_value()


def _emit_spread_rows(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[6].dtype)
    (rows, height, width, count, tall, wide, g, g_offset, g_end, taps, taps_offset, first_tap, o, o_offset,
     o_end) = integers(context, builder, signature, values)
    masked, free = [Run(builder, element, constant(1), constant(0), count, free=free) for free in (False, True)]
    lanes, numbers = masked.lanes, masked.taps(taps)[0]

    def spread(x: ir.Value, k: int, across: int) -> ir.Value:
        """The elements of x, each as many times as a window is wide, of these vector k."""
        owners = [(k * lanes + lane) // across for lane in range(lanes)]
        return builder.shuffle_vector(x, x, ir.Constant(masked.places, owners))

    def windows(run: Run, y: ir.Value, start: ir.Value, across: int) -> None:
        """Those of row y from `start` on, a vector of them, in each of their rows as many vectors as they are wide."""
        there, window = masked.left(count, start), builder.add(builder.mul(y, count), start)
        loaded = run.some(run.load, run.address(g, builder.add(g_offset, window)), there)
        given = builder.select(there, loaded, run.nothing) if run.all else loaded
        found = run.some_taps(taps, builder.add(taps_offset, window), there)
        column, first = builder.mul(start, wide), builder.mul(y, tall)
        with cgutils.for_range(builder, tall, intp=I64) as i:
            row, number = builder.add(first, i.index), builder.add(first_tap, builder.mul(i.index, wide))
            target = builder.add(o_offset, builder.add(builder.mul(row, width), column))
            with builder.if_then(builder.icmp_signed("<", row, height)):
                for k in range(across):
                    phases = ir.Constant(numbers, [(k * lanes + lane) % across for lane in range(lanes)])
                    own = builder.add(splat(builder, builder.trunc(number, numbers.element), lanes), phases)
                    chosen = builder.icmp_signed("==", spread(found, k, across), own)
                    value = builder.select(chosen, spread(given, k, across), run.nothing)
                    place = run.address(o, builder.add(target, constant(k * lanes)))
                    run.put(value, place, run.left(width, builder.add(column, constant(k * lanes))))

    def is_free(y: ir.Value, start: ir.Value) -> ir.Value:
        """Whole vectors may be read and written for the windows of row y from `start` on."""
        behind = builder.add(start, constant(lanes))
        lines = builder.sub(builder.mul(builder.add(y, constant(1)), tall), constant(1))
        room = [builder.icmp_signed("<=", builder.add(builder.add(offset, more), builder.mul(line, row)), end)
                for offset, more, line, row, end in ((g_offset, behind, y, count, g_end),
                                                     (o_offset, builder.mul(behind, wide), lines, width, o_end))]
        return builder.and_(*room)

    def vectors(across: int) -> None:
        """All windows, in each row the last vector first: it may write where the next row begins."""
        reach = across * lanes
        many = builder.sdiv(builder.add(width, constant(reach - 1)), constant(reach))
        with cgutils.for_range(builder, rows, intp=I64) as y, cgutils.for_range(builder, many, intp=I64) as loop:
            start = builder.mul(builder.sub(builder.sub(many, constant(1)), loop.index), constant(lanes))
            choose_run(builder, is_free(y.index, start), free, masked, lambda run: windows(run, y.index, start, across))

    end = builder.append_basic_block("spread.end")
    choose = builder.switch(wide, end)
    for across in range(1, tile.WIDEST + 1):
        block = builder.append_basic_block(f"spread.{across}")
        choose.add_case(constant(across), block)
        builder.position_at_end(block)
        vectors(across)
        builder.branch(end)
    builder.position_at_end(end)
    return context.get_dummy_value()


teach(tile.largest_rows, _emit_largest_rows)
teach(tile.largest_grad_row, _emit_largest_grad_row)
teach(tile.spread_rows, _emit_spread_rows)
