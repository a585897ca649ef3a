"""Teaches Numba what `kernels.cpu.tile` means in machine code.

Like `kernels.cpu.native`, importing it is all there is to do, and only the compiler of kernels imports it. The
micro-kernel is one LLVM function for each of a few heights and widths (`tile_text`); the text's call becomes a loop that
takes the highest one that fits until no rows are left, so that a short last tile costs little more than its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from jitgrad.kernels.cpu import tile, tile_dot, tile_lines, tile_text, tile_transform
from jitgrad.kernels.cpu.tile import Tile
from jitgrad.kernels.cpu.tile_text import MicroKernel
from jitgrad.kernels.cpu.tile_vectors import (
    I1,
    I8,
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

# --- the tile -----------------------------------------------------------------------------------------------------------


def _emit_multiply(kind: str, context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """`tile.multiply_tile`; "placed": `multiply_placed`, where the table of places is where B's step would be; "ahead":
    `multiply_ahead`; "low": `multiply_low`."""
    placed, ahead = kind == "placed", kind == "ahead"
    element = context.get_value_type(signature.args[3].dtype)
    shape = (tile.low_tile_for if kind == "low" else tile.tile_for)(element_bytes(element))
    count = 14 + placed
    values = integers(context, builder, signature, values)
    rows, columns, depth, a, a_offset, a_row, a_step, b, b_offset, *b_steps, c, c_offset, c_row, accumulate = values[:count]

    def place(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return builder.bitcast(builder.gep(pointer, [offset]), POINTER)

    def stride(value: ir.Value) -> ir.Value:
        return builder.mul(value, constant(element_bytes(element)))

    a_row, c_row = stride(a_row), stride(c_row)
    b_step = builder.ptrtoint(builder.gep(b_steps[0], b_steps[1:]), I64) if placed else stride(b_steps[0])
    tail = [_odd_multiples(builder, a_row, shape.rows), stride(a_step), place(b, b_offset), b_step]
    form = _form(builder, shape, columns)
    fetched = [what for k in range(count, len(values), 3) for what in (
        place(values[k], values[k + 1]),
        builder.mul(values[k + 2], constant(element_bytes(context.get_value_type(signature.args[k].dtype)))))]

    def call(kernel: MicroKernel, a: ir.Value, c: ir.Value) -> None:
        kinds = [POINTER if p in tile_text.POINTERS else I64 for p in kernel.parameters]
        function = declare(builder.module, kernel.name, ir.VoidType(), kinds)      # defined by `tile_text`
        builder.call(function, [columns, depth, a, *tail, c, c_row, accumulate, *(fetched if kernel.ahead else ())])

    bits = 8 * element_bytes(element)
    beside = {"rows": a_row, "steps": stride(a_step)}
    adjacent = {name: builder.icmp_signed("==", beside[name], constant(bits // 8)) for name in shape.layouts if name}
    families = [[MicroKernel(n, vectors, shape.lanes, bits, edge, layout, placed, ahead and layout != "") for n in heights
                 for layout in (shape.layouts if n >= tile.HIGH else ("",))] for vectors, edge, heights in shape.forms]
    _for_pieces(builder, rows, (place(a, a_offset), a_row), (place(c, c_offset), c_row), form, families, adjacent, call)
    return context.get_dummy_value()


def _odd_multiples(builder: ir.IRBuilder, stride: ir.Value, rows: int) -> ir.Value:
    """A table of stride * 1, 3, 5, … below `rows`, on the stack."""
    with builder.goto_entry_block():
        table = builder.alloca(I64, rows // 2 + 1)
    for odd in range(1, rows, 2):
        builder.store(builder.mul(stride, constant(odd)), builder.gep(table, [constant(odd // 2)]))
    return builder.bitcast(table, POINTER)


def _form(builder: ir.IRBuilder, shape: Tile, columns: ir.Value) -> ir.Value:
    """Which of `Tile.forms`."""
    form = builder.sdiv(builder.sub(columns, constant(1)), constant(shape.lanes))
    full = builder.icmp_signed("==", columns, constant(shape.columns))
    return builder.add(form, builder.zext(full, I64))


Walk = tuple[ir.Value, ir.Value]                # a place, and the bytes to the next row


def _for_pieces(builder: ir.IRBuilder, rows: ir.Value, a: Walk, c: Walk, form: ir.Value,
                kernels: list[list[MicroKernel]], adjacent: dict[str, ir.Value],
                call: Callable[[MicroKernel, ir.Value, ir.Value], None]) -> None:
    """The loop that calls the highest kernel of the form that fits, until no rows are left; `adjacent`: which layouts A
    has."""
    before = builder.block
    head, advance, end = [builder.append_basic_block(f"tile.{name}") for name in ("head", "advance", "end")]
    builder.cbranch(builder.icmp_signed(">", rows, constant(0)), head, end)
    builder.position_at_end(head)
    left, place_a, place_c = builder.phi(I64), builder.phi(POINTER), builder.phi(POINTER)
    pieces: dict[ir.Block, int] = {}
    choose = builder.switch(form, end)
    for number, family in enumerate(kernels):
        block = builder.append_basic_block(f"tile.form{number}")
        choose.add_case(constant(number), block)
        for kernel in family:
            fits, smaller = [builder.append_basic_block(f"tile.{name}") for name in ("fits", "smaller")]
            builder.position_at_end(block)
            enough = builder.icmp_signed(">=", left, constant(kernel.rows))
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
        taken.add_incoming(constant(count), block)
    rest = builder.sub(left, taken)
    for phi, start, following in ((left, rows, rest), *[
            (phi, start, builder.gep(phi, [builder.mul(taken, row)], source_etype=I8))
            for phi, (start, row) in ((place_a, a), (place_c, c))]):
        phi.add_incoming(start, before)
        phi.add_incoming(following, advance)
    builder.cbranch(builder.icmp_signed(">", rest, constant(0)), head, end)
    builder.position_at_end(end)


# --- transposing a block --------------------------------------------------------------------------------------------


Lines = tuple[ir.Value, ir.Value, ir.Value]     # pointer, offset, and elements from row to row


def _emit_transpose(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    rows, *lines, _ = integers(context, builder, signature, values)
    _call_transpose(builder, context.get_value_type(signature.args[1].dtype), rows, (lines[0], lines[1], lines[2]),
                    (lines[3], lines[4], lines[5]))
    return context.get_dummy_value()


def _call_transpose(builder: ir.IRBuilder, element: ir.Type, rows: ir.Value, x: Lines, o: Lines) -> None:
    size = element_bytes(element)
    name = f"transpose_{suffix(element, tile.tile_for(size).lanes)}"
    function = declare(builder.module, name, ir.VoidType(), [I64, POINTER, I64, POINTER, I64])
    arguments = [value for pointer, offset, row in (x, o) for value in (
        builder.bitcast(builder.gep(pointer, [offset]), POINTER), builder.mul(row, constant(size)))]
    builder.call(function, [rows, *arguments])


def _emit_transpose_block(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """Square blocks, and element by element what is left of them. Of the side whose lines lie farther apart a few lines are
    followed to their ends: so many that the cache has room for, and memory comes in the order of its addresses."""
    element = context.get_value_type(signature.args[2].dtype)
    lanes = constant(tile.tile_for(element_bytes(element)).lanes)
    rows, columns, x, x_offset, x_row, o, o_offset, o_row = integers(context, builder, signature, values)
    whole_rows, whole_columns = [builder.sub(count, builder.srem(count, lanes)) for count in (rows, columns)]

    def place(offset: ir.Value, row: ir.Value, i: ir.Value, j: ir.Value) -> ir.Value:
        return builder.add(offset, builder.add(builder.mul(i, row), j))

    def square(i: ir.Value, j: ir.Value) -> None:
        _call_transpose(builder, element, lanes, (x, place(x_offset, x_row, i, j), x_row),
                        (o, place(o_offset, o_row, j, i), o_row))

    with builder.if_else(builder.icmp_signed(">", o_row, x_row)) as (far_result, far_operand):
        with (far_result, _each(builder, constant(0), whole_columns, lanes) as j,
              _each(builder, constant(0), whole_rows, lanes) as i):
            square(i, j)
        with (far_operand, _each(builder, constant(0), whole_rows, lanes) as i,
              _each(builder, constant(0), whole_columns, lanes) as j):
            square(i, j)
    with _each(builder, constant(0), rows, constant(1)) as i:
        left = builder.select(builder.icmp_signed("<", i, whole_rows), whole_columns, constant(0))
        with _each(builder, left, columns, constant(1)) as j:
            value = builder.load(builder.gep(x, [place(x_offset, x_row, i, j)]))
            builder.store(value, builder.gep(o, [place(o_offset, o_row, j, i)]))
    return context.get_dummy_value()


@contextmanager
def _each(builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, step: ir.Value) -> Iterator[ir.Value]:
    """A loop from `start` to `stop`."""
    with cgutils.for_range_slice(builder, start, stop, step, intp=I64) as (index, _):
        yield index


# --- Winograd's maps -------------------------------------------------------------------------------------------------


def _transform(name: str) -> Callable[..., ir.Value]:
    """What writes the call of the map `name`."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        element = context.get_value_type(signature.args[1].dtype)
        size = element_bytes(element)
        (count, x, x_offset, x_row, x_column, o, o_offset, o_row, o_column, *edges, spare) = integers(
            context, builder, signature, values)
        ragged = x if tile_transform.MAPS[name][1] == "x" else o
        places = [builder.bitcast(builder.gep(p, [offset]), POINTER)
                  for p, offset in ((x, x_offset), (o, o_offset), (ragged, spare))]
        strides = [builder.mul(stride, constant(size)) for stride in (x_row, x_column, o_row, o_column)]
        kinds = [POINTER if p in tile_transform.POINTERS else I64 for p in tile_transform.PARAMETERS]
        watched = name in tile_transform.WATCHED
        function = declare(builder.module, f"{name}_{suffix(element, tile.tile_for(size).lanes)}",
                           I64 if watched else ir.VoidType(), kinds)
        found = builder.call(function, [count, places[0], *strides[:2], places[1], *strides[2:], *edges, places[2]])
        return found if watched else context.get_dummy_value()

    return emit


# --- gathering rows of elements, with zeros around them -------------------------------------------------------------


def _emit_gather(several: bool, context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """`tile.gather_run`, or with `several` `tile.gather_rows`: two vectors of every row, then the next of every row, for
    they have the same masks. One load where elements are side by side, two where every second is wanted, which take a
    fraction of the time of a gather."""
    element = context.get_value_type(signature.args[6 if several else 3].dtype)
    lanes = tile.tile_for(element_bytes(element)).lanes
    vector, alignment = ir.VectorType(element, lanes), ir.Constant(I32, element_bytes(element))
    values, none = integers(context, builder, signature, values), constant(0)
    if not several:
        count, low, high, x, x_offset, x_step, o, o_offset = values
        values = [none, none, none, count, low, high, x, x_offset, none, x_step, o, o_offset, none]
    rows, top, bottom, count, low, high, x, x_offset, x_row, x_step, o, o_offset, o_row = values
    gather = declare(builder.module, f"llvm.masked.gather.{suffix(element, lanes)}.v{lanes}p0", vector,
                     [ir.VectorType(POINTER, lanes), I32, ir.VectorType(I1, lanes), vector])
    load, store = masked_load(builder.module, vector), masked_store(builder.module, vector)
    numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    span = builder.select(builder.icmp_signed(">", high, low), builder.sub(high, low), constant(0))

    def narrow(value: ir.Value) -> ir.Value:
        return splat(builder, builder.trunc(value, I32), lanes)

    def from_to(begin: ir.Value, stop: ir.Value) -> ir.Value:
        """Which of the numbers from `begin` on are from 0 on and below `stop`."""
        return builder.icmp_unsigned("<", builder.add(numbers, narrow(begin)), narrow(stop))

    def read(function: ir.Function, place: ir.Value, inside: ir.Value) -> ir.Value:
        return where_all(builder, inside, lambda mask: builder.call(
            function, [place, alignment, mask, ir.Constant(vector, None)]))

    def beside(start: ir.Value) -> Callable[[ir.Value], ir.Value]:
        inside = from_to(builder.sub(start, low), span)
        return lambda line: read(load, builder.bitcast(builder.gep(line, [start]), POINTER), inside)

    def every_second(start: ir.Value) -> Callable[[ir.Value], ir.Value]:
        begin, place = [builder.mul(value, constant(2)) for value in (builder.sub(start, low), start)]
        stop = builder.sub(builder.mul(span, constant(2)), builder.zext(builder.icmp_signed(">", span, constant(0)), I64))
        halves = [(builder.add(place, constant(half)), from_to(builder.add(begin, constant(half)), stop))
                  for half in (0, lanes)]
        wanted = ir.Constant(numbers.type, list(range(0, 2 * lanes, 2)))
        return lambda line: builder.shuffle_vector(*[
            read(load, builder.bitcast(builder.gep(line, [half]), POINTER), inside) for half, inside in halves], wanted)

    def far(start: ir.Value) -> Callable[[ir.Value], ir.Value]:
        along = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
        places = builder.add(splat(builder, start, lanes), along)
        steps = builder.mul(places, splat(builder, builder.mul(x_step, constant(alignment.constant)), lanes))
        inside = from_to(builder.sub(start, low), span)
        return lambda line: read(gather, builder.inttoptr(builder.add(
            splat(builder, builder.ptrtoint(line, I64), lanes), steps), ir.VectorType(POINTER, lanes)), inside)

    def lesser(a: ir.Value, b: ir.Value) -> ir.Value:
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    begin, stop = lesser(top, rows), lesser(bottom, rows)
    stop = builder.select(builder.icmp_signed("<", stop, begin), begin, stop)
    first = builder.gep(x, [builder.sub(builder.sub(x_offset, builder.mul(low, x_step)), builder.mul(top, x_row))])
    vectors = 2 if several else 1
    with _each(builder, constant(0), count, constant(vectors * lanes)) as start:
        starts = [builder.add(start, constant(k * lanes)) for k in range(vectors)]
        wanted = [builder.icmp_signed("<", numbers, narrow(builder.sub(count, begin))) for begin in starts]

        def put(y: ir.Value, k: int, value: ir.Value) -> None:
            place = builder.add(builder.add(o_offset, starts[k]), builder.mul(y, o_row))
            target = builder.bitcast(builder.gep(o, [place]), POINTER)
            where_all(builder, wanted[k], lambda mask: builder.call(store, [value, target, alignment, mask]))

        def each_row(begin: ir.Value, stop: ir.Value, found: list[Callable[[ir.Value], ir.Value]]) -> None:
            if not several:
                put(none, 0, found[0](first))
                return
            with _each(builder, begin, stop, constant(1)) as y:
                line = builder.gep(first, [builder.mul(y, x_row)])
                put(y, 0, found[0](line))
                with builder.if_then(builder.icmp_signed("<", starts[1], count)):
                    put(y, 1, found[1](line))

        for outside in ((none, begin), (stop, rows)) if several else ():
            each_row(*outside, [lambda line: ir.Constant(vector, None)] * vectors)
        end = builder.append_basic_block("rows.end")
        ways = {1: beside, 2: every_second, None: far}
        blocks = {step: builder.append_basic_block("rows") for step in ways}
        choose = builder.switch(x_step, blocks[None])
        for step, way in ways.items():
            if step is not None:
                choose.add_case(constant(step), blocks[step])
            builder.position_at_end(blocks[step])
            each_row(begin, stop, [way(place) for place in starts])
            builder.branch(end)
        builder.position_at_end(end)
    return context.get_dummy_value()


# --- products of narrow numbers ---------------------------------------------------------------------------------------


def _emit_piece(name: str, context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """A call of the function of `tile_dot_text` with this name: a pointer and the offset behind it become an address, and
    the strides behind that bytes."""
    arguments: list[ir.Value] = []
    numbers = iter(integers(context, builder, signature, values))
    size = 0
    for value in numbers:
        if isinstance(value.type, ir.PointerType):
            size = value.type.pointee.width // 8 if isinstance(value.type.pointee, ir.IntType) else 4
            arguments.append(builder.bitcast(builder.gep(value, [next(numbers)]), POINTER))
        else:
            arguments.append(builder.mul(value, constant(size)) if size else value)
    function = declare(builder.module, name, ir.VoidType(), [a.type for a in arguments])
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
    (rows, columns, depth, a, a_offset, a_row, b, b_offset, b_line, c, c_offset, c_row, more, *scale) = integers(
        context, builder, signature, values)

    def place(pointer: ir.Value, offset: ir.Value) -> ir.Value:
        return builder.bitcast(builder.gep(pointer, [offset]), POINTER)

    def stride(value: ir.Value, size: int = size) -> ir.Value:
        return builder.mul(value, constant(size))

    factors = [place(*scale[:2]), stride(scale[2])] if scale else [ir.Constant(POINTER, None), constant(0)]
    arguments = [columns, depth, place(a, a_offset), stride(a_row), place(b, b_offset),
                 stride(b_line, tile_lines.KINDS[kind][1]), place(c, c_offset), stride(c_row), more, *factors]
    lanes, registers = tile.tile_for(size).lanes, tile.vector_unit()[1]
    end = builder.append_basic_block("lines.end")
    choose = builder.switch(rows, end)
    for height in range(1, tile_lines.HIGHEST + 1):
        kernel = tile_lines.LineKernel(height, tile_lines.lines_at_once(height, registers), lanes, 8 * size, kind,
                                       bool(scale))
        block = builder.append_basic_block(f"lines.{height}")
        choose.add_case(constant(height), block)
        builder.position_at_end(block)
        builder.call(declare(builder.module, kernel.name, ir.VoidType(), [v.type for v in arguments]), arguments)
        builder.branch(end)
    builder.position_at_end(end)
    return context.get_dummy_value()


# --- calling other kernels, and panels on the stack -----------------------------------------------------------------


def _emit_invoke(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    args, place, *items = integers(context, builder, signature, values)
    block = builder.gep(args, [place])
    kind = ir.FunctionType(ir.VoidType(), [args.type, I64, I64, I64])
    builder.call(builder.inttoptr(builder.load(block), kind.as_pointer()), [block, *items])
    return context.get_dummy_value()


def _emit_invoke_on(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    args, place, count, number, memory, *items = integers(context, builder, signature, values)
    with builder.goto_entry_block():
        block = builder.alloca(I64, tile.MOST_ARGUMENTS + 1)
    copy = declare(builder.module, "llvm.memcpy.p0.p0.i64", ir.VoidType(), [POINTER, POINTER, I64, I1])
    size = builder.mul(builder.add(count, constant(1)), constant(8))
    source = builder.gep(args, [place])
    builder.call(copy, [*[builder.bitcast(p, POINTER) for p in (block, source)], size, ir.Constant(I1, 0)])
    builder.store(builder.ptrtoint(memory, I64), builder.gep(block, [number]))
    kind = ir.FunctionType(ir.VoidType(), [args.type, I64, I64, I64])
    builder.call(builder.inttoptr(builder.load(source), kind.as_pointer()), [block, *items])
    return context.get_dummy_value()


def _emit_make_panel(several: bool, context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    """`tile.make_panel`, or with `several` `tile.make_panels`."""
    nbytes = tile.BLOCK_OF_B * element_bytes(values[0].type.pointee) if several else tile.PANEL_BYTES
    with builder.goto_entry_block():
        buffer = builder.alloca(ir.ArrayType(I8, nbytes))
    buffer.align = 64
    return builder.bitcast(buffer, values[0].type)


def _emit_multiply_block(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    (args, place, rows, columns, depth, depth_block, panel_rows, a, a_offset, a_panel, a_row, a_step, b, b_offset, b_panel,
     b_step, c, c_offset, c_row, more) = integers(context, builder, signature, values)
    several = builder.zext(builder.icmp_signed(">", b_panel, constant(0)), I64)
    numbers = tile.core_block(rows, columns, depth, depth_block, panel_rows, a_panel, a_row, a_step, b_panel, b_step, c_row,
                              more, several)
    _call_for_one(builder, args, place, ((a, a_offset), (b, b_offset), (c, c_offset)), numbers)
    return context.get_dummy_value()


def _emit_pack_block(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    args, place, rows, depth, x, x_offset, x_row, x_step, o, o_offset, width = integers(context, builder, signature, values)
    _call_for_one(builder, args, place, ((x, x_offset), (o, o_offset)),
                  tile.packed_block(rows, depth, x_row, x_step, width))
    return context.get_dummy_value()


def _call_for_one(builder: ir.IRBuilder, args: ir.Value, place: ir.Value, operands: tuple[tuple[ir.Value, ir.Value], ...],
                  numbers: list[Any]) -> None:
    """Run the one item that the kernel whose address is ``args[place]`` has for these pointers, offsets and integers."""
    pointers = [builder.ptrtoint(builder.gep(p, [offset]), I64) for p, offset in operands]
    words = [constant(0), *pointers, *[constant(n) if isinstance(n, int) else n for n in numbers]]
    with builder.goto_entry_block():
        block = builder.alloca(I64, len(words))
    for k, word in enumerate(words):
        builder.store(word, builder.gep(block, [constant(k)]))
    kernel = builder.load(builder.gep(args, [place]))
    kind = ir.FunctionType(ir.VoidType(), [args.type, I64, I64, I64])
    builder.call(builder.inttoptr(kernel, kind.as_pointer()), [block, constant(0), constant(1), constant(0)])


teach(tile.multiply_tile, partial(_emit_multiply, ""))
teach(tile.multiply_placed, partial(_emit_multiply, "placed"))
teach(tile.multiply_ahead, partial(_emit_multiply, "ahead"))
teach(tile.multiply_low, partial(_emit_multiply, "low"))
teach(tile.transpose_tile, _emit_transpose)
teach(tile.transpose_block, _emit_transpose_block)
teach(tile.gather_run, partial(_emit_gather, False))
teach(tile.gather_rows, partial(_emit_gather, True))
for _name, _function in tile_transform.NAMES.items():
    teach(_function, _transform(_name), (lambda *_: types.int64) if _name in tile_transform.WATCHED else None)
teach(tile.invoke, _emit_invoke)
teach(tile.invoke_on, _emit_invoke_on)
teach(tile.make_panel, partial(_emit_make_panel, False), lambda like: like)
teach(tile.make_panels, partial(_emit_make_panel, True), lambda like: like)
teach(tile.multiply_block, _emit_multiply_block)
teach(tile.pack_block, _emit_pack_block)
teach(tile_dot.multiply_pairs, partial(_emit_piece, "multiply_pairs"))
teach(tile_dot.multiply_quads, partial(_emit_piece, "multiply_quads"))
teach(tile_dot.balance_panel, partial(_emit_piece, "balance_panel"))
teach(tile_dot.interleave_steps, partial(_emit_move, "interleave_steps"))
teach(tile_dot.transpose_groups, partial(_emit_move, "transpose_groups"))
teach(tile_lines.multiply_lines, _emit_lines)
teach(tile_lines.multiply_scaled_lines, _emit_lines)
