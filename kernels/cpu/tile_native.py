"""Teaches Numba what `kernels.cpu.tile` means in machine code.

Like `kernels.cpu.native`, importing it is all there is to do, and only the compiler of kernels imports it. The
micro-kernel is one LLVM function for each of a few heights and widths (`tile_text`); the text's call becomes a loop that
takes the highest one that fits until no rows are left, so that a short last tile costs little more than its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import lower_builtin, type_callable

from jitgrad.kernels.cpu import tile, tile_dot, tile_lines, tile_text, tile_transform
from jitgrad.kernels.cpu.tile import Tile
from jitgrad.kernels.cpu.tile_text import MicroKernel

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = I8.as_pointer()


def _constant(n: int) -> ir.Constant:
    return ir.Constant(I64, n)


def _declare(module: ir.Module, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, ir.FunctionType(result, arguments), name)


def _suffix(element: ir.Type, lanes: int) -> str:
    """How the name of a vector intrinsic ends."""
    return f"v{lanes}{'f32' if element == ir.FloatType() else 'f64'}"


def _masked_load(module: ir.Module, vector: ir.VectorType) -> ir.Function:
    return _declare(module, f"llvm.masked.load.{_suffix(vector.element, vector.count)}.p0", vector,
                    [POINTER, I32, ir.VectorType(I1, vector.count), vector])


def _masked_store(module: ir.Module, vector: ir.VectorType) -> ir.Function:
    return _declare(module, f"llvm.masked.store.{_suffix(vector.element, vector.count)}.p0", ir.VoidType(),
                    [vector, POINTER, I32, ir.VectorType(I1, vector.count)])


# --- the tile -----------------------------------------------------------------------------------------------------------


def element_bytes(element: ir.Type) -> int:
    return 4 if element == ir.FloatType() else 8


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A vector with `value` in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), None))


def _integers(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> list[ir.Value]:
    """All arguments, integers as int64."""
    return [context.cast(builder, v, t, types.int64) if isinstance(t, types.Integer) else v
            for v, t in zip(values, signature.args, strict=True)]


def _emit_multiply(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[3].dtype)
    shape = tile.tile_for(element_bytes(element))
    (rows, columns, depth, a, a_offset, a_row, a_step, b, b_offset, b_step, c, c_offset, c_row,
     accumulate) = _integers(context, builder, signature, values)

    def place(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return builder.bitcast(builder.gep(pointer, [offset]), POINTER)

    def stride(value: ir.Value) -> ir.Value:
        return builder.mul(value, _constant(element_bytes(element)))

    a_row, c_row = stride(a_row), stride(c_row)
    tail = [_odd_multiples(builder, a_row, shape.rows), stride(a_step), place(b, b_offset), stride(b_step)]
    form = _form(builder, shape, columns)

    def call(kernel: MicroKernel, a: ir.Value, c: ir.Value) -> None:
        kinds = [POINTER if p in tile_text.POINTERS else I64 for p in tile_text.PARAMETERS]
        function = _declare(builder.module, kernel.name, ir.VoidType(), kinds)      # defined by `tile_text`
        builder.call(function, [columns, depth, a, *tail, c, c_row, accumulate])

    bits = 8 * element_bytes(element)
    beside = {"rows": a_row, "steps": stride(a_step)}
    adjacent = {name: builder.icmp_signed("==", beside[name], _constant(bits // 8)) for name in shape.layouts if name}
    families = [[MicroKernel(n, vectors, shape.lanes, bits, masked, layout) for n in heights
                 for layout in (shape.layouts if n >= tile.HIGH else ("",))] for vectors, masked, heights in shape.forms]
    _for_pieces(builder, rows, (place(a, a_offset), a_row), (place(c, c_offset), c_row), form, families, adjacent, call)
    return context.get_dummy_value()


def _odd_multiples(builder: ir.IRBuilder, stride: ir.Value, rows: int) -> ir.Value:
    """A table of stride * 1, 3, 5, … below `rows`, on the stack."""
    with builder.goto_entry_block():
        table = builder.alloca(I64, rows // 2 + 1)
    for odd in range(1, rows, 2):
        builder.store(builder.mul(stride, _constant(odd)), builder.gep(table, [_constant(odd // 2)]))
    return builder.bitcast(table, POINTER)


def _form(builder: ir.IRBuilder, shape: Tile, columns: ir.Value) -> ir.Value:
    """Which of `Tile.forms`."""
    form = builder.sdiv(builder.sub(columns, _constant(1)), _constant(shape.lanes))
    full = builder.icmp_signed("==", columns, _constant(shape.columns))
    return builder.add(form, builder.zext(full, I64))


Walk = tuple[ir.Value, ir.Value]                # a place, and the bytes to the next row


def _for_pieces(builder: ir.IRBuilder, rows: ir.Value, a: Walk, c: Walk, form: ir.Value,
                kernels: list[list[MicroKernel]], adjacent: dict[str, ir.Value],
                call: Callable[[MicroKernel, ir.Value, ir.Value], None]) -> None:
    """The loop that calls the highest kernel of the form that fits, until no rows are left; `adjacent`: which layouts A
    has."""
    before = builder.block
    head, advance, end = [builder.append_basic_block(f"tile.{name}") for name in ("head", "advance", "end")]
    builder.cbranch(builder.icmp_signed(">", rows, _constant(0)), head, end)
    builder.position_at_end(head)
    left, place_a, place_c = builder.phi(I64), builder.phi(POINTER), builder.phi(POINTER)
    pieces: dict[ir.Block, int] = {}
    choose = builder.switch(form, end)
    for number, family in enumerate(kernels):
        block = builder.append_basic_block(f"tile.form{number}")
        choose.add_case(_constant(number), block)
        for kernel in family:
            fits, smaller = [builder.append_basic_block(f"tile.{name}") for name in ("fits", "smaller")]
            builder.position_at_end(block)
            enough = builder.icmp_signed(">=", left, _constant(kernel.rows))
            builder.cbranch(builder.and_(enough, adjacent[kernel.adjacent]) if kernel.adjacent else enough, fits, smaller)
            builder.position_at_end(fits)
            call(kernel, place_a, place_c)
            builder.branch(advance)
            pieces[fits], block = kernel.rows, smaller
        builder.position_at_end(block)
        builder.branch(end)
    builder.position_at_end(advance)
    taken = builder.phi(I64)
    for block, count in pieces.items():
        taken.add_incoming(_constant(count), block)
    rest = builder.sub(left, taken)
    for phi, start, following in ((left, rows, rest), *[
            (phi, start, builder.gep(phi, [builder.mul(taken, row)], source_etype=I8))
            for phi, (start, row) in ((place_a, a), (place_c, c))]):
        phi.add_incoming(start, before)
        phi.add_incoming(following, advance)
    builder.cbranch(builder.icmp_signed(">", rest, _constant(0)), head, end)
    builder.position_at_end(end)


# --- transposing a block --------------------------------------------------------------------------------------------


Lines = tuple[ir.Value, ir.Value, ir.Value]     # pointer, offset, and elements from row to row


def _emit_transpose(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    rows, *lines, _ = _integers(context, builder, signature, values)
    _call_transpose(builder, context.get_value_type(signature.args[1].dtype), rows, (lines[0], lines[1], lines[2]),
                    (lines[3], lines[4], lines[5]))
    return context.get_dummy_value()


def _call_transpose(builder: ir.IRBuilder, element: ir.Type, rows: ir.Value, x: Lines, o: Lines) -> None:
    size = element_bytes(element)
    name = f"transpose_{_suffix(element, tile.tile_for(size).lanes)}"
    function = _declare(builder.module, name, ir.VoidType(), [I64, POINTER, I64, POINTER, I64])
    arguments = [value for pointer, offset, row in (x, o) for value in (
        builder.bitcast(builder.gep(pointer, [offset]), POINTER), builder.mul(row, _constant(size)))]
    builder.call(function, [rows, *arguments])


def _emit_transpose_block(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """Square blocks, and element by element what is left of them."""
    element = context.get_value_type(signature.args[2].dtype)
    lanes = _constant(tile.tile_for(element_bytes(element)).lanes)
    rows, columns, x, x_offset, x_row, o, o_offset, o_row = _integers(context, builder, signature, values)

    def place(offset: ir.Value, row: ir.Value, i: ir.Value, j: ir.Value) -> ir.Value:
        return builder.add(offset, builder.add(builder.mul(i, row), j))

    with cgutils.for_range_slice(builder, _constant(0), rows, lanes, intp=I64) as (i, _):
        left = builder.sub(rows, i)
        whole = builder.select(builder.icmp_signed("<", left, lanes), _constant(0),
                               builder.sub(columns, builder.srem(columns, lanes)))
        with cgutils.for_range_slice(builder, _constant(0), whole, lanes, intp=I64) as (j, _):
            _call_transpose(builder, element, lanes, (x, place(x_offset, x_row, i, j), x_row),
                            (o, place(o_offset, o_row, j, i), o_row))
        end = builder.select(builder.icmp_signed("<", left, lanes), rows, builder.add(i, lanes))
        with (cgutils.for_range_slice(builder, whole, columns, _constant(1), intp=I64) as (j, _),
              cgutils.for_range_slice(builder, i, end, _constant(1), intp=I64) as (one, _)):
            value = builder.load(builder.gep(x, [place(x_offset, x_row, one, j)]))
            builder.store(value, builder.gep(o, [place(o_offset, o_row, j, one)]))
    return context.get_dummy_value()


# --- Winograd's maps -------------------------------------------------------------------------------------------------


def _transform(name: str) -> Callable[..., ir.Value]:
    """What writes the call of the map `name`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        element = context.get_value_type(signature.args[1].dtype)
        size = element_bytes(element)
        (count, x, x_offset, x_row, x_column, o, o_offset, o_row, o_column, *edges, spare) = _integers(
            context, builder, signature, values)
        ragged = x if tile_transform.MAPS[name][1] == "x" else o
        places = [builder.bitcast(builder.gep(p, [offset]), POINTER)
                  for p, offset in ((x, x_offset), (o, o_offset), (ragged, spare))]
        strides = [builder.mul(stride, _constant(size)) for stride in (x_row, x_column, o_row, o_column)]
        kinds = [POINTER if p in tile_transform.POINTERS else I64 for p in tile_transform.PARAMETERS]
        function = _declare(builder.module, f"{name}_{_suffix(element, tile.tile_for(size).lanes)}", ir.VoidType(), kinds)
        builder.call(function, [count, places[0], *strides[:2], places[1], *strides[2:], *edges, places[2]])
        return context.get_dummy_value()

    return emit


# --- gathering a run of elements, with zeros around it --------------------------------------------------------------


def _emit_gather_run(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[3].dtype)
    lanes = tile.tile_for(element_bytes(element)).lanes
    vector = ir.VectorType(element, lanes)
    suffix, alignment = _suffix(element, lanes), ir.Constant(I32, element_bytes(element))
    count, low, high, x, x_offset, x_step, o, o_offset = _integers(context, builder, signature, values)
    contiguous = builder.icmp_signed("==", x_step, _constant(1))
    first = builder.gep(x, [builder.sub(x_offset, builder.mul(low, x_step))])
    gather = _declare(builder.module, f"llvm.masked.gather.{suffix}.v{lanes}p0", vector,
                      [ir.VectorType(POINTER, lanes), I32, ir.VectorType(I1, lanes), vector])
    load, store = _masked_load(builder.module, vector), _masked_store(builder.module, vector)
    zero = ir.Constant(vector, None)
    with cgutils.for_range_slice(builder, _constant(0), count, _constant(lanes), intp=I64) as (start, _):
        places = builder.add(splat(builder, start, lanes), ir.Constant(ir.VectorType(I64, lanes), list(range(lanes))))
        inside = builder.and_(builder.icmp_signed(">=", places, splat(builder, low, lanes)),
                              builder.icmp_signed("<", places, splat(builder, high, lanes)))
        with builder.if_else(contiguous) as (then, otherwise):
            with then:
                line = builder.bitcast(builder.gep(first, [start]), POINTER)
                near, block_near = builder.call(load, [line, alignment, inside, zero]), builder.block
            with otherwise:
                steps = builder.mul(places, splat(builder, builder.mul(x_step, _constant(alignment.constant)), lanes))
                base = splat(builder, builder.ptrtoint(first, I64), lanes)
                lines = builder.inttoptr(builder.add(base, steps), ir.VectorType(POINTER, lanes))
                far, block_far = builder.call(gather, [lines, alignment, inside, zero]), builder.block
        value = builder.phi(vector)
        value.add_incoming(near, block_near)
        value.add_incoming(far, block_far)
        target = builder.bitcast(builder.gep(o, [builder.add(o_offset, start)]), POINTER)
        wanted = builder.icmp_signed("<", places, splat(builder, count, lanes))
        builder.call(store, [value, target, alignment, wanted])
    return context.get_dummy_value()


# --- windows: the largest element, a weighted sum, a sum of products -----------------------------------------------------


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
        self.close = builder.icmp_signed("==", across, _constant(1))
        self.pairs = builder.icmp_signed("==", across, _constant(2))
        self.alignment, self.nothing = ir.Constant(I32, self.bytes), ir.Constant(self.vector, None)
        self.load, self.store = _masked_load(builder.module, self.vector), _masked_store(builder.module, self.vector)
        mask = ir.VectorType(I1, self.lanes)
        self.gather = _declare(builder.module, f"llvm.masked.gather.{_suffix(element, self.lanes)}.v{self.lanes}p0",
                               self.vector, [ir.VectorType(POINTER, self.lanes), I32, mask, self.vector])

    def address(self, base: ir.Value, offset: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(base, [offset]), POINTER)

    def left(self, count: ir.Value, start: ir.Value) -> ir.Value:
        """Which lanes there are for `count` windows, of which the first is number `start`."""
        many = self.builder.trunc(self.builder.sub(count, start), I32)
        return self.builder.icmp_signed("<", self.numbers, splat(self.builder, many, self.lanes))

    def read(self, x: ir.Value, place: ir.Value, column: ir.Value, last: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The elements from `place` on, in `column` and behind it, up to column `last`; and which of them there are."""
        builder, lanes = self.builder, self.lanes
        end = builder.add(last, _constant(1))
        stop = builder.select(builder.icmp_signed("<", end, self.high), end, self.high)
        stop = builder.select(builder.icmp_signed("<", stop, self.low), self.low, stop)
        inside = self._within(column, self.spaced, stop)
        with builder.if_else(self.close) as (then, otherwise):
            with then:
                beside = builder.call(self.load, [self.address(x, place), self.alignment, inside, self.nothing])
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
        inside = self._within(builder.add(column, _constant(first)), self.numbers, stop)
        return builder.call(self.load, [self.address(x, builder.add(place, _constant(first))), self.alignment, inside,
                                        self.nothing])

    def _far(self, x: ir.Value, place: ir.Value, inside: ir.Value) -> ir.Value:
        builder, lanes = self.builder, self.lanes
        spaced = builder.zext(self.spaced, ir.VectorType(I64, lanes))
        steps = builder.mul(spaced, splat(builder, _constant(self.bytes), lanes))
        base = splat(builder, builder.ptrtoint(self.address(x, place), I64), lanes)
        lines = builder.inttoptr(builder.add(base, steps), ir.VectorType(POINTER, lanes))
        return builder.call(self.gather, [lines, self.alignment, inside, self.nothing])


def _emit_largest_run(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[10].dtype)
    (count, across, deep, deep_step, tall, tall_step, wide, wide_step, low, high, x, x_offset, origin, o, o_offset, index,
     index_offset) = _integers(context, builder, signature, values)
    run = _Run(builder, element, across, low, high)
    lanes, places = run.lanes, run.places
    store_places = _declare(builder.module, f"llvm.masked.store.v{lanes}i64.p0", ir.VoidType(),
                            [ir.VectorType(I64, lanes), POINTER, I32, ir.VectorType(I1, lanes)])
    with builder.goto_entry_block():
        best, at = builder.alloca(run.vector), builder.alloca(places)
    with cgutils.for_range_slice(builder, _constant(0), count, _constant(lanes), intp=I64) as (start, _):
        builder.store(ir.Constant(run.vector, [float("-inf")] * lanes), best)
        builder.store(ir.Constant(places, [-1] * lanes), at)
        with (cgutils.for_range(builder, deep, intp=I64) as i, cgutils.for_range(builder, tall, intp=I64) as j,
              cgutils.for_range(builder, wide, intp=I64) as k):
            shift = builder.mul(k.index, wide_step)
            column, last = [builder.add(builder.mul(n, across), shift) for n in (start, builder.sub(count, _constant(1)))]
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
        builder.call(run.store, [builder.load(best), run.address(o, builder.add(o_offset, start)), run.alignment, wanted])
        wide_places = builder.sext(builder.load(at), ir.VectorType(I64, lanes))
        builder.call(store_places, [wide_places, run.address(index, builder.add(index_offset, start)),
                                    ir.Constant(I32, 8), wanted])
    return context.get_dummy_value()


def _fused(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z in one rounding."""
    name = f"llvm.fma.{_suffix(x.type.element, x.type.count)}"
    return builder.call(_declare(builder.module, name, x.type, [x.type] * 3), [x, y, z])


def _emit_weighted_run(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[10].dtype)
    (count, across, deep, deep_step, tall, tall_step, wide, wide_step, low, high, x, x_offset, w, w_offset, w_deep, w_tall,
     w_wide, o, o_offset) = _integers(context, builder, signature, values)
    run = _Run(builder, element, across, low, high)
    with builder.goto_entry_block():
        total = builder.alloca(run.vector)
    with cgutils.for_range_slice(builder, _constant(0), count, _constant(run.lanes), intp=I64) as (start, _):
        builder.store(run.nothing, total)
        with (cgutils.for_range(builder, deep, intp=I64) as i, cgutils.for_range(builder, tall, intp=I64) as j,
              cgutils.for_range(builder, wide, intp=I64) as k):
            shift = builder.mul(k.index, wide_step)
            column, last = [builder.add(builder.mul(n, across), shift) for n in (start, builder.sub(count, _constant(1)))]
            line = builder.add(builder.mul(i.index, deep_step), builder.mul(j.index, tall_step))
            value, _ = run.read(x, builder.add(builder.add(x_offset, line), column), column, last)
            tap = w_offset
            for loop, step in ((i, w_deep), (j, w_tall), (k, w_wide)):
                tap = builder.add(tap, builder.mul(loop.index, step))
            weight = splat(builder, builder.load(builder.gep(w, [tap])), run.lanes)
            builder.store(_fused(builder, value, weight, builder.load(total)), total)
        builder.call(run.store, [builder.load(total), run.address(o, builder.add(o_offset, start)), run.alignment,
                                 run.left(count, start)])
    return context.get_dummy_value()


def _emit_dot_rows(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = context.get_value_type(signature.args[5].dtype)
    rows, count, across, low, high, x, x_offset, x_row, g, g_offset, g_row = _integers(context, builder, signature, values)
    run = _Run(builder, element, across, low, high)
    last = builder.mul(builder.sub(count, _constant(1)), across)
    with builder.goto_entry_block():
        total = builder.alloca(run.vector)
    builder.store(run.nothing, total)
    with (cgutils.for_range(builder, rows, intp=I64) as y,
          cgutils.for_range_slice(builder, _constant(0), count, _constant(run.lanes), intp=I64) as (start, _)):
        column = builder.mul(start, across)
        place = builder.add(builder.add(x_offset, builder.mul(y.index, x_row)), column)
        value, inside = run.read(x, place, column, last)
        beside = builder.add(builder.add(g_offset, builder.mul(y.index, g_row)), start)
        other = builder.call(run.load, [run.address(g, beside), run.alignment, inside, run.nothing])
        builder.store(_fused(builder, value, other, builder.load(total)), total)
    add = _declare(builder.module, f"llvm.vector.reduce.fadd.{_suffix(element, run.lanes)}", element, [element, run.vector])
    return builder.call(add, [ir.Constant(element, -0.0), builder.load(total)], fastmath=("reassoc",))


# --- products of narrow numbers ---------------------------------------------------------------------------------------


def _emit_piece(name: str, context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """A call of the function of `tile_dot_text` with this name: a pointer and the offset behind it become an address, and
    the strides behind that bytes."""
    arguments: list[ir.Value] = []
    numbers = iter(_integers(context, builder, signature, values))
    size = 0
    for value in numbers:
        if isinstance(value.type, ir.PointerType):
            size = value.type.pointee.width // 8 if isinstance(value.type.pointee, ir.IntType) else 4
            arguments.append(builder.bitcast(builder.gep(value, [next(numbers)]), POINTER))
        else:
            arguments.append(builder.mul(value, _constant(size)) if size else value)
    function = _declare(builder.module, name, ir.VoidType(), [a.type for a in arguments])
    builder.call(function, arguments)
    return context.get_dummy_value()


def _emit_move(name: str, context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    element = signature.args[5].dtype
    group = 32 // context.get_value_type(element).width
    full_name = f"{name}_{group}{'_biased' if element == types.uint8 else ''}"
    return _emit_piece(full_name, context, builder, signature, values)


# --- products of few rows ---------------------------------------------------------------------------------------------


def _emit_lines(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """The function of `tile_lines` for so many rows."""
    element = context.get_value_type(signature.args[3].dtype)
    size, line = element_bytes(element), signature.args[6].dtype
    kind = {types.float32: "f32", types.float64: "f64", types.int8: "i8"}.get(line) or line.name
    (rows, columns, depth, a, a_offset, a_row, b, b_offset, b_line, c, c_offset, c_row, more, *scale) = _integers(
        context, builder, signature, values)

    def place(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return builder.bitcast(builder.gep(pointer, [offset]), POINTER)

    def stride(value: ir.Value, size: int = size) -> ir.Value:
        return builder.mul(value, _constant(size))

    factors = [place(*scale[:2]), stride(scale[2])] if scale else [ir.Constant(POINTER, None), _constant(0)]
    arguments = [columns, depth, place(a, a_offset), stride(a_row), place(b, b_offset),
                 stride(b_line, tile_lines.KINDS[kind][1]), place(c, c_offset), stride(c_row), more, *factors]
    lanes, registers = tile.tile_for(size).lanes, tile.vector_unit()[1]
    end = builder.append_basic_block("lines.end")
    choose = builder.switch(rows, end)
    for height in range(1, tile_lines.HIGHEST + 1):
        kernel = tile_lines.LineKernel(height, tile_lines.lines_at_once(height, registers), lanes, 8 * size, kind,
                                       bool(scale))
        block = builder.append_basic_block(f"lines.{height}")
        choose.add_case(_constant(height), block)
        builder.position_at_end(block)
        builder.call(_declare(builder.module, kernel.name, ir.VoidType(), [v.type for v in arguments]), arguments)
        builder.branch(end)
    builder.position_at_end(end)
    return context.get_dummy_value()


# --- calling other kernels, and panels on the stack -----------------------------------------------------------------


def _emit_invoke(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    args, place, *items = _integers(context, builder, signature, values)
    block = builder.gep(args, [place])
    kind = ir.FunctionType(ir.VoidType(), [args.type, I64, I64, I64])
    builder.call(builder.inttoptr(builder.load(block), kind.as_pointer()), [block, *items])
    return context.get_dummy_value()


def _emit_make_panel(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    with builder.goto_entry_block():
        buffer = builder.alloca(ir.ArrayType(I8, tile.PANEL_BYTES))
    buffer.align = 64
    return builder.bitcast(buffer, values[0].type)


def _emit_multiply_block(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    (args, place, rows, columns, depth, depth_block, panel_rows, a, a_offset, a_panel, a_row, a_step, b, b_offset, b_panel,
     b_step, c, c_offset, c_row, more) = _integers(context, builder, signature, values)
    pointers = [builder.ptrtoint(builder.gep(p, [offset]), I64)
                for p, offset in ((a, a_offset), (b, b_offset), (c, c_offset))]
    numbers = tile.core_block(rows, columns, depth, depth_block, panel_rows, a_panel, a_row, a_step, b_panel, b_step, c_row,
                              more)
    words = [_constant(0), *pointers, *[_constant(n) if isinstance(n, int) else n for n in numbers]]
    with builder.goto_entry_block():
        block = builder.alloca(I64, len(words))
    for k, word in enumerate(words):
        builder.store(word, builder.gep(block, [_constant(k)]))
    core = builder.load(builder.gep(args, [place]))
    kind = ir.FunctionType(ir.VoidType(), [args.type, I64, I64, I64])
    builder.call(builder.inttoptr(core, kind.as_pointer()), [block, _constant(0), _constant(1), _constant(0)])
    return context.get_dummy_value()


def _teach(function: Callable[..., Any], emit: Callable[..., ir.Value], result: Any = None) -> None:
    """`emit` writes the code of `function`, which returns nothing, or what ``result(*types)`` says."""
    count = function.__code__.co_argcount
    names = ", ".join(function.__code__.co_varnames[:count])
    namespace: dict[str, Any] = {"result": result or (lambda *_: types.none)}
    exec(f"def typing(context):\n def typer({names}):\n  return result({names})\n return typer", namespace)
    type_callable(function)(namespace["typing"])
    lower_builtin(function, *[types.Any] * count)(emit)


_teach(tile.multiply_tile, _emit_multiply)
_teach(tile.transpose_tile, _emit_transpose)
_teach(tile.transpose_block, _emit_transpose_block)
_teach(tile.gather_run, _emit_gather_run)
_teach(tile.largest_run, _emit_largest_run)
_teach(tile.weighted_run, _emit_weighted_run)
_teach(tile.dot_rows, _emit_dot_rows, lambda *given: given[5].dtype)
for _name, _function in tile_transform.NAMES.items():
    _teach(_function, _transform(_name))
_teach(tile.invoke, _emit_invoke)
_teach(tile.make_panel, _emit_make_panel, lambda like: like)
_teach(tile.multiply_block, _emit_multiply_block)
_teach(tile_dot.multiply_pairs, partial(_emit_piece, "multiply_pairs"))
_teach(tile_dot.multiply_quads, partial(_emit_piece, "multiply_quads"))
_teach(tile_dot.balance_panel, partial(_emit_piece, "balance_panel"))
_teach(tile_dot.interleave_steps, partial(_emit_move, "interleave_steps"))
_teach(tile_dot.transpose_groups, partial(_emit_move, "transpose_groups"))
_teach(tile_lines.multiply_lines, _emit_lines)
_teach(tile_lines.multiply_scaled_lines, _emit_lines)
