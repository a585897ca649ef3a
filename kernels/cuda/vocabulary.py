"""The names that GPU kernel text may use besides scalar math, as intrinsics: threads and blocks, shared memory, shuffles,
accesses of several elements at once, and integer division that fits an index. Tensor cores have `matrix` and `warpgroup`.

Kernel text is Python with explicit types, as on the CPU, and the names that mean the same on both are the CPU's own:
casts, `load`, `store`, accumulation. The rest is here. A warp has 32 threads, of which all call a `shuffle` and all
threads of a block call a `barrier`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from jitgrad.kernels.cpu import intrinsics as cpu
from jitgrad.kernels.cpu.frontend import intrinsic, teach
from jitgrad.kernels.cpu.intrinsics import (
    STORAGE,
    address,
    from_memory,
    i64,
    kept,
    poke,
    swap_if_equal,
    tag_scope,
    to_memory,
)
from jitgrad.kernels.cuda import boxes, gather, math, matrix, warpgroup

I32, I64 = ir.IntType(32), ir.IntType(64)
GLOBAL, SHARED = 1, 3                           # address spaces
WHOLE_WARP, LAST_LANE = -1, 31


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments)


def _int(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


# Where a thread is

def _register(name: str, text: str, register: str) -> Any:
    def read(typing: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            return _call(builder, f"llvm.nvvm.read.ptx.sreg.{register}", I32)

        return types.int32(), codegen

    read.__name__, read.__doc__ = name, text
    return intrinsic(read)


thread = _register("thread", "``thread()``: the number of this thread in its block.", "tid.x")
block = _register("block", "``block()``: the number of this block in the grid.", "ctaid.x")


@intrinsic
def barrier(typing: Any) -> Any:
    """``barrier()``: what any thread of the block wrote before it, all of them read behind it."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _call(builder, "llvm.nvvm.barrier0", ir.VoidType())      # LLVM's old name, which newer versions translate
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def warp_barrier(typing: Any) -> Any:
    """``warp_barrier()``: `barrier` for the threads of one warp."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _call(builder, "llvm.nvvm.bar.warp.sync", ir.VoidType(), _int(WHOLE_WARP))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def multiply_add(typing: Any, a: types.Type, b: types.Type, c: types.Type) -> Any:
    """``multiply_add(a, b, c)``: a * b + c, rounded once; all three of the float type of c."""
    kind = types.unliteral(c)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.fma(*[context.cast(builder, value, given, kind)
                             for value, given in zip(arguments, signature.args, strict=True)])

    return kind(types.unliteral(a), types.unliteral(b), kind), codegen


@intrinsic
def quick_exp2(typing: Any, x: types.Type) -> Any:
    """``quick_exp2(x)``: 2 ** x in float32 by the one instruction that approximates it, to two units in the last place;
    below the smallest normal number it is 0."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        function = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        return builder.call(ir.InlineAsm(function, "ex2.approx.ftz.f32 $0, $1;", "=f,f"), arguments)

    return types.float32(types.float32), codegen


# Integers of an index: none is negative

def _make_division(name: str, text: str, emit: Any) -> Any:
    def divide(typing: Any, x: types.Type, y: types.Type) -> Any:
        kind = types.unliteral(x)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            return emit(builder, arguments[0], context.cast(builder, arguments[1], signature.args[1], kind))

        return kind(kind, types.unliteral(y)), codegen

    divide.__name__, divide.__doc__ = name, text
    return intrinsic(divide)


quotient = _make_division("quotient", "``quotient(x, y)``: x // y of the type of x.", lambda b, x, y: b.udiv(x, y))
rest = _make_division("rest", "``rest(x, y)``: x % y of the type of x.", lambda b, x, y: b.urem(x, y))


# Memory

@partial(intrinsic, literal=True)
def shared(typing: Any, number: types.Type, dtype: types.Type, count: types.Type) -> Any:
    """``shared(k, dtype, n)``: a pointer to array number k, of n elements, that all threads of a block share."""
    element = STORAGE[dtype.typing_key]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        pointer = context.get_value_type(signature.return_type)
        kind = ir.ArrayType(pointer.pointee, count.literal_value)
        array = ir.GlobalVariable(builder.module, kind, f"shared{number.literal_value}", SHARED)
        array.linkage, array.initializer = "internal", ir.Constant(kind, ir.Undefined)
        array.align = 16
        return builder.addrspacecast(builder.bitcast(array, ir.PointerType(pointer.pointee, SHARED)), pointer)

    return types.CPointer(element)(number, dtype, count), codegen


@intrinsic
def dynamic_shared(typing: Any, dtype: types.Type) -> Any:
    """``dynamic_shared(dtype)``: a pointer to the memory that all threads of a block share and whose size the launch says.
    It begins at a multiple of 1,024 bytes. A kernel that has it has no other `shared` memory."""
    result = types.CPointer(STORAGE[dtype.typing_key])

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        array = ir.GlobalVariable(builder.module, ir.ArrayType(ir.IntType(8), 0), "dynamic_shared", SHARED)
        array.linkage, array.align = "external", 1024
        pointer = context.get_value_type(result)
        return builder.addrspacecast(builder.bitcast(array, ir.PointerType(pointer.pointee, SHARED)), pointer)

    return result(dtype), codegen


@intrinsic
def pointer_at(typing: Any, place: types.Type, dtype: types.Type) -> Any:
    """``pointer_at(a, dtype)``: the address a, an int64, as a pointer to elements of `dtype` in global memory."""
    result = types.CPointer(STORAGE[dtype.typing_key])

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        pointer = context.get_value_type(result)
        return builder.addrspacecast(builder.inttoptr(arguments[0], ir.PointerType(pointer.pointee, GLOBAL)), pointer)

    return result(types.int64, dtype), codegen


def _vector_at(builder: ir.IRBuilder, base: ir.Value, position: ir.Value, lanes: int) -> ir.Value:
    kind = ir.VectorType(base.type.pointee, lanes)
    return builder.bitcast(builder.gep(base, [position]), kind.as_pointer())


@partial(intrinsic, literal=True)
def load_lanes(typing: Any, p: types.Type, index: types.Type, lanes: types.Type, operand: types.Type,
               count: types.Type) -> Any:
    """``load_lanes(p, i, lanes, k, n)``: elements i, i + 1 … of operand k of n as a tuple, read at once. The address is a
    multiple of the size of them all."""
    element, width = p.dtype, lanes.literal_value

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        position = context.cast(builder, arguments[1], signature.args[1], types.int64)
        raw = builder.load(_vector_at(builder, arguments[0], position, width))
        raw.align = width * context.get_abi_sizeof(arguments[0].type.pointee)
        tag_scope(builder, raw, operand.literal_value, count.literal_value)
        pieces = [from_memory(context, builder, element, builder.extract_element(raw, _int(k))) for k in range(width)]
        return context.make_tuple(builder, signature.return_type, pieces)

    return types.UniTuple(kept(element), width)(p, types.unliteral(index), lanes, operand, count), codegen


@partial(intrinsic, literal=True)
def store_lanes(typing: Any, p: types.Type, index: types.Type, values: types.Type, operand: types.Type,
                count: types.Type) -> Any:
    """``store_lanes(p, i, (a, b …), k, n)``: the counterpart of `load_lanes`."""
    element, kinds = p.dtype, list(values)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        position = context.cast(builder, arguments[1], signature.args[1], types.int64)
        vector = ir.Constant(ir.VectorType(arguments[0].type.pointee, len(kinds)), ir.Undefined)
        for k, kind in enumerate(kinds):
            raw = to_memory(context, builder, element, builder.extract_value(arguments[2], k), kind)
            vector = builder.insert_element(vector, raw, _int(k))
        written = builder.store(vector, _vector_at(builder, arguments[0], position, len(kinds)))
        written.align = len(kinds) * context.get_abi_sizeof(arguments[0].type.pointee)
        tag_scope(builder, written, operand.literal_value, count.literal_value)
        return context.get_dummy_value()

    return types.void(p, types.unliteral(index), values, operand, count), codegen


def _make_atomic(name: str, text: str) -> Any:
    def change(typing: Any, p: types.Type, index: types.Type, value: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            position = context.cast(builder, arguments[1], signature.args[1], types.int64)
            given = context.cast(builder, arguments[2], signature.args[2], p.dtype)
            builder.atomic_rmw(name, builder.gep(arguments[0], [position]), given, "monotonic")
            return context.get_dummy_value()

        return types.void(p, types.unliteral(index), types.unliteral(value)), codegen

    change.__name__ = f"atomic_{name}"
    change.__doc__ = f"``atomic_{name}(p, i, v)``: {text} is element i, an integer, from now on, whoever else does it."
    return intrinsic(change)


atomic_max = _make_atomic("max", "the larger of v and element i")
atomic_add = _make_atomic("add", "the sum of v and element i")


# Between the threads of a warp

@partial(intrinsic, literal=True)
def shuffle(typing: Any, value: types.Type, distance: types.Type) -> Any:
    """``shuffle(v, d)``: the v of the thread whose number differs in bit d, a power of two below 32."""
    kind = types.unliteral(value)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        given = context.cast(builder, arguments[0], signature.args[0], kind)
        size = max(32, 8 * context.get_abi_sizeof(given.type))
        bits = ir.IntType(8 * context.get_abi_sizeof(given.type)) if isinstance(kind, types.Float) else given.type
        wide = builder.zext(builder.bitcast(given, bits), ir.IntType(size)) if bits.width < size else (
            builder.bitcast(given, bits))
        words = [builder.trunc(builder.lshr(wide, ir.Constant(wide.type, 32 * k)), I32) for k in range(size // 32)]
        words = [_call(builder, "llvm.nvvm.shfl.sync.bfly.i32", I32, _int(WHOLE_WARP), word,
                       _int(distance.literal_value), _int(LAST_LANE)) for word in words]
        joined = builder.zext(words[0], ir.IntType(size))
        for k, word in enumerate(words[1:], 1):
            joined = builder.or_(joined, builder.shl(builder.zext(word, joined.type), ir.Constant(joined.type, 32 * k)))
        return builder.bitcast(builder.trunc(joined, bits) if bits.width < size else joined, given.type)

    return kind(types.unliteral(value), distance), codegen


# The error word: code, item, value, at the address of args

def fail(args: Any, code: Any, item: Any, value: Any) -> None:
    """Record an error. Of several the first in time stays."""
    if swap_if_equal(address(args), 0, code):
        poke(address(args) + 8, i64(item))
        poke(address(args) + 16, i64(value))


teach(fail, lambda kind: fail)
teach(math.is_better, lambda kind: math.is_better)

SAME = ("load", "store", "f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u64", "u32", "u8", "boolean", "min",
        "max", "reassociate_add", "reassociate_mul", "reassociate_max", "reassociate_min")
"""What means the same on both kinds of machine."""

NAMES: dict[str, Any] = {
    **{name: cpu.NAMES[name] for name in SAME},
    "thread": thread, "block": block, "barrier": barrier, "quotient": quotient, "rest": rest, "shared": shared,
    "pointer_at": pointer_at, "load_lanes": load_lanes, "store_lanes": store_lanes, "shuffle": shuffle, "fail": fail,
    "is_better": math.is_better, "warp_barrier": warp_barrier, "multiply_add": multiply_add, "atomic_max": atomic_max,
    "atomic_add": atomic_add, "quick_exp2": quick_exp2, "dynamic_shared": dynamic_shared, **matrix.NAMES,
    **warpgroup.NAMES, **boxes.NAMES, **gather.NAMES,
}
