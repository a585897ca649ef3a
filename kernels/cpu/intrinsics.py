"""The names that kernel text may use besides scalar math, as Numba intrinsics: pointers, loads and stores, casts,
accumulation that may reassociate, the error word, and the atomics that the tape is made of.

Kernel text is Python with explicit types. `NAMES` at the end is its namespace; `standins.NAMES` is the same vocabulary
for running the text as plain Python. Only the compiler imports this module, since it imports Numba.

Loads and stores take the number of their operand and the count of operands: they carry `alias.scope` and `noalias`
metadata, which tells LLVM that different operands never overlap. bfloat16 and float16 are storage formats: a load gives
float32, a store rounds to nearest even.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import alloca_once, gep_inbounds, get_or_insert_function
from numba.extending import models, register_model

from jitgrad.kernels.cpu.frontend import intrinsic, teach

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


class StorageFloat(types.Type):
    """A 16-bit float format that exists in memory only; loaded and stored as float32."""


@register_model(StorageFloat)
class _StorageFloatModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: types.Type):
        super().__init__(manager, frontend_type, I16)


# Casts. They double as the dtype argument of `pointer`.

def _make_cast(name: str, target: types.Type) -> Any:
    def cast(typing: Any, x: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            return _convert(context, builder, arguments[0], signature.args[0], target)

        return target(types.unliteral(x)), codegen

    cast.__name__ = name
    return intrinsic(cast)


def _convert(context: Any, builder: ir.IRBuilder, value: ir.Value, source: types.Type, target: types.Type) -> ir.Value:
    """`value` as `target`. Anything to bool is ``!= 0``; float to int out of range is what NumPy gives on x86: the
    lowest number of the 32-bit (64-bit for int64 and uint32) conversion, cut to the width."""
    if target == types.boolean and isinstance(source, types.Float):
        return builder.fcmp_unordered("!=", value, ir.Constant(value.type, 0.0))
    if isinstance(source, types.Float) and isinstance(target, types.Integer):
        return _float_to_int(builder, value, target)
    return context.cast(builder, value, source, target)


def _float_to_int(builder: ir.IRBuilder, value: ir.Value, target: types.Integer) -> ir.Value:
    wide = I64 if target in (types.int64, types.uint64, types.uint32) else I32
    limit = 2.0 ** (wide.width - 1)
    inside = builder.and_(builder.fcmp_ordered(">=", value, ir.Constant(value.type, -limit)),
                          builder.fcmp_ordered("<", value, ir.Constant(value.type, limit)))
    lowest = ir.Constant(wide, -(2 ** (wide.width - 1)))
    converted = builder.select(inside, builder.fptosi(value, wide), lowest)
    return builder.trunc(converted, ir.IntType(target.bitwidth)) if target.bitwidth < wide.width else converted


f64 = _make_cast("f64", types.float64)
f32 = _make_cast("f32", types.float32)
i64 = _make_cast("i64", types.int64)
i32 = _make_cast("i32", types.int32)
i16 = _make_cast("i16", types.int16)
i8 = _make_cast("i8", types.int8)
u64 = _make_cast("u64", types.uint64)
u32 = _make_cast("u32", types.uint32)
u8 = _make_cast("u8", types.uint8)
boolean = _make_cast("boolean", types.boolean)
bf16 = _make_cast("bf16", types.float32)
f16 = _make_cast("f16", types.float32)

BF16, F16 = StorageFloat("bf16"), StorageFloat("f16")
STORAGE = {f64: types.float64, f32: types.float32, i64: types.int64, i32: types.int32, i16: types.int16,
            i8: types.int8, u64: types.uint64, u32: types.uint32, u8: types.uint8, boolean: types.boolean,
            bf16: BF16, f16: F16}


# Pointers

@intrinsic
def pointer(typing: Any, args: types.Type, position: types.Type, dtype: types.Type) -> Any:
    """``pointer(args, k, dtype)``: argument k of the kernel as a pointer to elements of `dtype`."""
    result = types.CPointer(STORAGE[dtype.typing_key])

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        index = context.cast(builder, arguments[1], signature.args[1], types.int64)
        address = builder.load(builder.gep(arguments[0], [index]))
        return builder.inttoptr(address, context.get_value_type(result))

    return result(args, types.unliteral(position), dtype), codegen


@intrinsic
def advance(typing: Any, base: types.Type, count: types.Type) -> Any:
    """``advance(p, n)``: the pointer n elements behind p."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.gep(arguments[0], [context.cast(builder, arguments[1], signature.args[1], types.int64)])

    return base(base, types.unliteral(count)), codegen


def tag_scope(builder: ir.IRBuilder, instruction: Any, operand: int, count: int) -> None:
    """Say that `instruction` touches memory of this operand and of none of the `count` - 1 others."""
    module = builder.module
    domain = module.add_metadata(["jitgrad.domain"])
    scopes = [module.add_metadata([f"jitgrad.operand{k}", domain]) for k in range(count)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[operand]]))
    others = [scope for k, scope in enumerate(scopes) if k != operand]
    if others:
        instruction.set_metadata("noalias", module.add_metadata(others))


def kept(element: types.Type) -> types.Type:
    """What an element of memory is once it is loaded."""
    return types.float32 if isinstance(element, StorageFloat) else element


def from_memory(context: Any, builder: ir.IRBuilder, element: types.Type, raw: ir.Value) -> ir.Value:
    """The value of an element, from its bits in memory."""
    if element == BF16:
        return _bfloat_to_float(builder, raw)
    if element == F16:
        return _half_to_float(builder, raw)
    return context.data_model_manager[element].from_data(builder, raw)


def to_memory(context: Any, builder: ir.IRBuilder, element: types.Type, value: ir.Value, kind: types.Type) -> ir.Value:
    """The bits in memory of `value`, of type `kind`, as an element."""
    number = _convert(context, builder, value, kind, kept(element))
    if element == BF16:
        return _float_to_bfloat(builder, number)
    if element == F16:
        return _float_to_half(builder, number)
    return context.data_model_manager[element].as_data(builder, number)


@partial(intrinsic, literal=True)
def load(typing: Any, p: types.Type, index: types.Type, operand: types.Type, count: types.Type) -> Any:
    """``load(p, i, k, n)``: element i of operand k of n."""
    element = p.dtype
    result = kept(element)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        position = context.cast(builder, arguments[1], signature.args[1], types.int64)
        raw = builder.load(builder.gep(arguments[0], [position]))
        raw.align = context.get_abi_sizeof(raw.type)
        tag_scope(builder, raw, signature.args[2].literal_value, signature.args[3].literal_value)
        return from_memory(context, builder, element, raw)

    return result(p, types.unliteral(index), operand, count), codegen


@partial(intrinsic, literal=True)
def store(typing: Any, p: types.Type, index: types.Type, value: types.Type, operand: types.Type,
          count: types.Type) -> Any:
    """``store(p, i, v, k, n)``: write v, cast to the element type, to element i of operand k of n."""
    element = p.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        position = context.cast(builder, arguments[1], signature.args[1], types.int64)
        raw = to_memory(context, builder, element, arguments[2], signature.args[2])
        written = builder.store(raw, builder.gep(arguments[0], [position]))
        written.align = context.get_abi_sizeof(raw.type)
        tag_scope(builder, written, signature.args[3].literal_value, signature.args[4].literal_value)
        return context.get_dummy_value()

    return types.void(p, types.unliteral(index), types.unliteral(value), operand, count), codegen


# 16-bit floats, by integer arithmetic: no library call on any processor, and LLVM vectorizes it

@intrinsic
def prefetch(typing: Any, p: types.Type, index: types.Type) -> Any:
    """``prefetch(p, index)``: what lies there will be read soon. It may be outside of the operand."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        line = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [line, I32, I32, I32])
        place = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), line)
        builder.call(get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"),
                     [place, *[ir.Constant(I32, n) for n in (0, 3, 1)]])         # read, into all caches, data
        return context.get_dummy_value()

    return types.void(p, types.int64), codegen


def _int(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


def _bfloat_to_float(builder: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(raw, I32), _int(16)), F32)


def _float_to_bfloat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round to nearest, ties to even; a NaN stays one."""
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, _int(16)), _int(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _int(0x7FFF))), _int(16))
    quiet = builder.or_(builder.lshr(bits, _int(16)), _int(0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), I16)


def _half_to_float(builder: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """Exponent and mantissa moved to their float32 places, the exponent's bias corrected by an exact product."""
    wide = builder.zext(raw, I32)
    magnitude = builder.shl(builder.and_(wide, _int(0x7FFF)), _int(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, F32), ir.Constant(F32, 2.0 ** 112)), I32)
    special = builder.or_(magnitude, _int(0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, _int(0x7C00 << 13))
    sign = builder.shl(builder.and_(wide, _int(0x8000)), _int(16))
    return builder.bitcast(builder.or_(builder.select(is_special, special, scaled), sign), F32)


def _float_to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Round to nearest, ties to even. Below the smallest normal half the sum with 0.5 does the rounding, since its last
    place is the spacing of denormal halves (2**-24)."""
    bits = builder.bitcast(value, I32)
    magnitude = builder.and_(bits, _int(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _int(13)), _int(1))
    bias = _int((15 - 127 << 23) + 0xFFF)
    normal = builder.lshr(builder.add(builder.add(magnitude, bias), odd), _int(13))
    shifted = builder.fadd(builder.bitcast(magnitude, F32), ir.Constant(F32, 0.5))
    denormal = builder.sub(builder.bitcast(shifted, I32), _int(0x3F000000))
    finite = builder.select(builder.icmp_unsigned("<", magnitude, _int(113 << 23)), denormal, normal)
    is_nan = builder.icmp_unsigned(">", magnitude, _int(0x7F800000))
    special = builder.select(is_nan, _int(0x7E00), _int(0x7C00))
    is_special = builder.icmp_unsigned(">=", magnitude, _int(0x477FF000))
    sign = builder.and_(builder.lshr(bits, _int(16)), _int(0x8000))
    return builder.trunc(builder.or_(builder.select(is_special, special, finite), sign), I16)


# Accumulation. Only these operations may reassociate, so that a reduction becomes a vector loop.

def _make_reassociating(name: str, integer: Any, floating: Any) -> Any:
    def accumulate(typing: Any, accumulator: types.Type, value: types.Type) -> Any:
        kind = types.unliteral(accumulator)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            number = _convert(context, builder, arguments[1], signature.args[1], kind)
            if isinstance(kind, types.Float):
                return floating(builder, arguments[0], number)
            return integer(builder, arguments[0], number, getattr(kind, "signed", False))

        return kind(kind, types.unliteral(value)), codegen

    accumulate.__name__ = name
    return intrinsic(accumulate)


def _select_integer(comparison: str) -> Any:
    def pick(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, signed: bool) -> ir.Value:
        compare = builder.icmp_signed if signed else builder.icmp_unsigned
        return builder.select(compare(comparison, x, y), x, y)

    return pick


def _call_float(name: str) -> Any:
    """LLVM's `maximum` and `minimum`: a NaN wins, and the vectorizer knows them as reductions. Which of two zeros wins is
    nobody's concern."""

    def call(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        suffix = "f64" if x.type == F64 else "f32"
        function = get_or_insert_function(builder.module, ir.FunctionType(x.type, [x.type, x.type]),
                                          f"llvm.{name}.{suffix}")
        return builder.call(function, [x, y], fastmath=("nsz",))

    return call


reassociate_add = _make_reassociating("reassociate_add", lambda b, x, y, signed: b.add(x, y),
                                      lambda b, x, y: b.fadd(x, y, flags=("reassoc",)))
reassociate_mul = _make_reassociating("reassociate_mul", lambda b, x, y, signed: b.mul(x, y),
                                      lambda b, x, y: b.fmul(x, y, flags=("reassoc",)))
reassociate_max = _make_reassociating("reassociate_max", _select_integer(">"), _call_float("maximum"))
reassociate_min = _make_reassociating("reassociate_min", _select_integer("<"), _call_float("minimum"))


# The smaller and the larger of two integers, which Numba has for anything iterable, at length

def _make_extreme(name: str, comparison: str) -> Any:
    def extreme(typing: Any, x: types.Type, y: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            first, second = [context.cast(builder, value, kind, types.int64)
                             for value, kind in zip(arguments, signature.args, strict=True)]
            return builder.select(builder.icmp_signed(comparison, first, second), first, second)

        return types.int64(types.unliteral(x), types.unliteral(y)), codegen

    extreme.__name__ = name
    return intrinsic(extreme)


minimum_of_two, maximum_of_two = _make_extreme("min", "<"), _make_extreme("max", ">")


# Atomics and calls: what the tape is made of. Addresses are int64.

def _at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def peek(typing: Any, address: types.Type) -> Any:
    """``peek(a)``: the int64 at address a, read with acquire order."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.load_atomic(_at(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def poke(typing: Any, address: types.Type, value: types.Type) -> Any:
    """``poke(a, v)``: write the int64 v to address a with release order."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        builder.store_atomic(arguments[1], _at(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typing: Any, address: types.Type, value: types.Type) -> Any:
    """``fetch_add(a, v)``: add v to the int64 at a; what was there before."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.atomic_rmw("add", _at(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def swap_if_equal(typing: Any, address: types.Type, expected: types.Type, value: types.Type) -> Any:
    """``swap_if_equal(a, e, v)``: write v to address a if e is there; whether it was."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        result = builder.cmpxchg(_at(builder, arguments[0]), arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def relax(typing: Any) -> Any:
    """The processor's hint that this is a waiting loop; the compiler adds it for its target."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        hint = get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), []), "jitgrad_relax")
        builder.call(hint, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_kernel(typing: Any, function: types.Type, args: types.Type, begin: types.Type, end: types.Type,
                thread: types.Type) -> Any:
    """Call the kernel at address `function` for items begin … end of the argument block at address `args`."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def call_system(typing: Any, function: types.Type, a: types.Type, b: types.Type, c: types.Type, d: types.Type,
                e: types.Type) -> Any:
    """Call the C function at address `function` with five integers (those it does not take are ignored)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        kind = ir.FunctionType(I64, [I64] * 5)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * 6), codegen


@intrinsic
def nanoseconds(typing: Any, clock: types.Type) -> Any:
    """The monotonic clock; `clock` is the address of C's clock_gettime."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        moment = alloca_once(builder, ir.ArrayType(I64, 2))
        kind = ir.FunctionType(I32, [I32, moment.type])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [_int(1), moment])
        seconds, rest = (builder.load(gep_inbounds(builder, moment, 0, k)) for k in (0, 1))
        return builder.add(builder.mul(seconds, ir.Constant(I64, 1_000_000_000)), rest)

    return types.int64(types.int64), codegen


@intrinsic
def address(typing: Any, p: types.Type) -> Any:
    """The address that a pointer holds, as int64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.ptrtoint(arguments[0], I64)

    return types.int64(p), codegen


# The error word: ERROR_CODE, ERROR_ITEM, ERROR_VALUE and a lock, at the start of the context that args[0] points to.

def fail(args: Any, code: Any, item: Any, value: Any) -> None:
    """Record an error. Of several the one with the lowest item stays, and of one item's the first."""
    context = args[0]
    while not swap_if_equal(context + 24, 0, 1):
        pass
    if peek(context) == 0 or item < peek(context + 8):
        poke(context + 8, i64(item))
        poke(context + 16, i64(value))
        poke(context, i64(code))
    poke(context + 24, 0)


teach(fail, lambda kind: fail, inline=False)

NAMES: dict[str, Any] = {
    "pointer": pointer, "advance": advance, "load": load, "store": store, "prefetch": prefetch, "fail": fail,
    "address": address,
    "f64": f64, "f32": f32, "f16": f16, "bf16": bf16, "i64": i64, "i32": i32, "i16": i16, "i8": i8, "u64": u64,
    "u32": u32, "u8": u8, "boolean": boolean,
    "reassociate_add": reassociate_add, "reassociate_mul": reassociate_mul, "reassociate_max": reassociate_max,
    "reassociate_min": reassociate_min,
    "peek": peek, "poke": poke, "fetch_add": fetch_add, "swap_if_equal": swap_if_equal, "relax": relax,
    "min": minimum_of_two, "max": maximum_of_two, "nanoseconds": nanoseconds,
    "call_kernel": call_kernel, "call_system": call_system,
}
