"""The names that the text of a GPU kernel may use besides scalar math: pointers, scalar and 128-bit accesses of global
memory, shuffles within a warp, single operations of the processor.

`NAMES` is the vocabulary: from a name to a definition, a function ``(typing, *types)`` that gives the signature of a call
and what writes its LLVM code. `codegen.cuda_toolchain` turns definitions into intrinsics of the compiler, so that this
file needs numba's types and llvmlite alone, and it is imported by the toolchain only.

bfloat16 and float16 are storage formats, as on the CPU: a load gives float32, a store rounds to nearest, ties to even.
All pointers point to global memory. Accesses of shared memory go through ``cuda.shared.array``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from llvmlite import ir

types: Any = import_module("numba.core.types")           # some versions of Numba have annotations, and some have not
Kind = Any
"""A type of Numba's."""

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, F64, VOID = ir.FloatType(), ir.DoubleType(), ir.VoidType()

Definition = Callable[..., Any]
NAMES: dict[str, Definition] = {}


class StorageFloat(types.Type):  # type: ignore[misc]
    """A 16-bit float format that exists in memory only; loaded and stored as float32."""


BF16, F16 = StorageFloat("cuda bf16"), StorageFloat("cuda f16")
ELEMENTS: dict[str, Kind] = {
    "f64": types.float64, "f32": types.float32, "i64": types.int64, "i32": types.int32, "i16": types.int16,
    "i8": types.int8, "u64": types.uint64, "u32": types.uint32, "u16": types.uint16, "u8": types.uint8,
    "bool": types.boolean, "bf16": BF16, "f16": F16}
"""What a kernel may point to, by the short name of its dtype."""


def name(definition: Definition) -> Definition:
    """Enter a definition into the vocabulary."""
    NAMES[definition.__name__] = definition
    return definition


def constant(value: int) -> ir.Constant:
    return ir.Constant(I32, value)


def assembly(builder: ir.IRBuilder, text: str, result: ir.Type, arguments: list[ir.Value], constraints: str,
             effects: bool = False) -> ir.Value:
    """One or more instructions of PTX. `effects`: it may be neither dropped nor moved."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effects), arguments)


# --- pointers --------------------------------------------------------------------------------------------------------

def pointee(element: Kind) -> Kind:
    """The type that a load gives and a store takes."""
    return types.float32 if isinstance(element, StorageFloat) else element


def global_address(context: Any, builder: ir.IRBuilder, base: ir.Value, index: ir.Value, index_type: Kind) -> Any:
    """The address of element `index`, known to lie in global memory. The index is widened from its own signedness."""
    position = context.cast(builder, index, index_type, types.int64)
    address = builder.gep(base, [position])
    return builder.addrspacecast(address, ir.PointerType(address.type.pointee, 1))


@name
def pointer_at(typing: Any, table: Kind, index: Kind, like: Kind) -> Any:
    """``pointer_at(table, k, p)``: address k of a table of int64 in global memory, as a pointer of the type of p."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address = global_address(context, builder, arguments[0], arguments[1], signature.args[1])
        return builder.inttoptr(builder.load(address, align=8), context.get_value_type(like))

    return like(table, types.unliteral(index), like), codegen


@name
def advance(typing: Any, base: Kind, count: Kind) -> Any:
    """``advance(p, n)``: the pointer n elements behind p."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.gep(arguments[0], [context.cast(builder, arguments[1], signature.args[1], types.int64)])

    return base(base, types.unliteral(count)), codegen


# --- loads and stores --------------------------------------------------------------------------------------------------

@name
def load(typing: Any, p: Kind, index: Kind) -> Any:
    """``load(p, i)``: element i."""
    element = p.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address = global_address(context, builder, arguments[0], arguments[1], signature.args[1])
        raw = builder.load(address, align=context.get_abi_sizeof(address.type.pointee))
        return from_memory(context, builder, raw, element)

    return pointee(element)(p, types.unliteral(index)), codegen


@name
def store(typing: Any, p: Kind, index: Kind, value: Kind) -> Any:
    """``store(p, i, v)``: write v, cast to the element type, to element i."""
    element = p.dtype

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address = global_address(context, builder, arguments[0], arguments[1], signature.args[1])
        number = context.cast(builder, arguments[2], signature.args[2], pointee(element))
        raw = to_memory(context, builder, number, element)
        builder.store(raw, address, align=context.get_abi_sizeof(raw.type))
        return context.get_dummy_value()

    return types.void(p, types.unliteral(index), types.unliteral(value)), codegen


@name
def load_vector(typing: Any, p: Kind, index: Kind, count: Kind) -> Any:
    """``load_vector(p, i, n)``: elements i … i + n - 1 as a tuple, in one access of n elements, at most 16 bytes. The
    address has to be a multiple of the size of the access. n is a constant, a power of two."""
    if not isinstance(count, types.IntegerLiteral):
        return None                                          # asked again with the types of constants
    element, n = p.dtype, count.literal_value
    result = types.UniTuple(pointee(element), n)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address = global_address(context, builder, arguments[0], arguments[1], signature.args[1])
        bits = 8 * context.get_abi_sizeof(address.type.pointee)
        words = load_words(builder, address, n * bits)
        raw = [field(builder, words, k, bits) for k in range(n)]
        kind = address.type.pointee
        values = [from_memory(context, builder, bitcast(builder, value, kind), element) for value in raw]
        return context.make_tuple(builder, result, values)

    return result(p, types.unliteral(index), count), codegen


@name
def store_vector(typing: Any, p: Kind, index: Kind, values: Kind) -> Any:
    """``store_vector(p, i, (a, b, …))``: write elements i, i + 1, … in one access, as `load_vector` reads them."""
    element, n = p.dtype, len(values)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address = global_address(context, builder, arguments[0], arguments[1], signature.args[1])
        bits = 8 * context.get_abi_sizeof(address.type.pointee)
        raw = []
        for k, kind in enumerate(values.types if hasattr(values, "types") else [values.dtype] * n):
            number = context.cast(builder, builder.extract_value(arguments[2], k), kind, pointee(element))
            raw.append(to_memory(context, builder, number, element))
        store_words(builder, address, raw, bits)
        return context.get_dummy_value()

    return types.void(p, types.unliteral(index), values), codegen


def word_type(total: int, bits: int = 0) -> ir.Type:
    """The type of the pieces of an access: words of 32 bits, or fewer bits where the whole is smaller."""
    return ir.IntType(min(max(bits, 32), total))


def load_words(builder: ir.IRBuilder, address: ir.Value, total: int) -> list[ir.Value]:
    """`total` bits at `address` as words, in one access."""
    kind = word_type(total)
    vector = ir.VectorType(kind, total // kind.width)
    loaded = builder.load(builder.bitcast(address, ir.PointerType(vector, 1)), align=total // 8)
    return [builder.extract_element(loaded, constant(k)) for k in range(vector.count)]


def store_words(builder: ir.IRBuilder, address: ir.Value, values: list[ir.Value], bits: int) -> None:
    """`values`, of `bits` bits each, at `address`, in one access."""
    total = bits * len(values)
    kind = word_type(total, bits)
    vector = ir.VectorType(kind, total // kind.width)
    packed = ir.Constant(vector, ir.Undefined)
    share = kind.width // bits
    for k in range(vector.count):
        word = ir.Constant(kind, 0)
        for part, value in enumerate(values[k * share:(k + 1) * share]):
            number = bitcast(builder, value, ir.IntType(bits))
            wide = builder.zext(number, kind) if bits < kind.width else number
            word = builder.or_(word, builder.shl(wide, ir.Constant(kind, part * bits))) if part else wide
        packed = builder.insert_element(packed, word, constant(k))
    builder.store(packed, builder.bitcast(address, ir.PointerType(vector, 1)), align=total // 8)


def field(builder: ir.IRBuilder, words: list[ir.Value], k: int, bits: int) -> ir.Value:
    """Number k of `bits` bits in a list of words, as an integer."""
    width = words[0].type.width
    if bits > width:
        low, high = (builder.zext(words[2 * k + part], I64) for part in (0, 1))
        return builder.or_(low, builder.shl(high, ir.Constant(I64, 32)))
    word, place = words[k * bits // width], k * bits % width
    return builder.trunc(builder.lshr(word, ir.Constant(word.type, place)), ir.IntType(bits)) if bits < width else word


def bitcast(builder: ir.IRBuilder, value: ir.Value, kind: ir.Type) -> ir.Value:
    return value if value.type == kind else builder.bitcast(value, kind)


def from_memory(context: Any, builder: ir.IRBuilder, raw: ir.Value, element: Kind) -> ir.Value:
    """The value that the bits of an element stand for."""
    if element == BF16:
        return builder.bitcast(builder.shl(builder.zext(raw, I32), constant(16)), F32)
    if element == F16:
        return assembly(builder, "cvt.f32.f16 $0, $1;", F32, [raw], "=f,h")
    return context.data_model_manager[element].from_data(builder, raw)


def to_memory(context: Any, builder: ir.IRBuilder, value: ir.Value, element: Kind) -> ir.Value:
    """The bits of an element that hold a value."""
    if isinstance(element, StorageFloat):
        format = "bf16" if element == BF16 else "f16"
        return assembly(builder, f"cvt.rn.{format}.f32 $0, $1;", I16, [value], "=h,f")
    return context.data_model_manager[element].as_data(builder, value)


# --- within a warp -----------------------------------------------------------------------------------------------------

def _define_shuffle(title: str, mode: str, clamp: int, text: str) -> None:
    """A shuffle of numbers of 32 or 64 bits among all 32 lanes. `clamp` is the instruction's last operand."""

    def definition(typing: Any, value: Kind, lane: Kind) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            where = context.cast(builder, arguments[1], signature.args[1], types.int32)
            whole = context.get_value_type(types.unliteral(value))
            bits = context.get_abi_sizeof(whole) * 8
            number = bitcast(builder, arguments[0], ir.IntType(bits))
            if bits == 32:
                return bitcast(builder, shuffle(builder, mode, clamp, number, where), whole)
            low = shuffle(builder, mode, clamp, builder.trunc(number, I32), where)
            high = builder.trunc(builder.lshr(number, ir.Constant(I64, 32)), I32)
            high = shuffle(builder, mode, clamp, high, where)
            joined = builder.or_(builder.zext(low, I64), builder.shl(builder.zext(high, I64), ir.Constant(I64, 32)))
            return bitcast(builder, joined, whole)

        return types.unliteral(value)(types.unliteral(value), types.unliteral(lane)), codegen

    definition.__name__, definition.__doc__ = title, text
    name(definition)


def shuffle(builder: ir.IRBuilder, mode: str, clamp: int, value: ir.Value, lane: ir.Value) -> ir.Value:
    """One ``shfl.sync``, by the compiler's own intrinsic, which it knows to be convergent."""
    kind = ir.FunctionType(I32, [I32] * 4)
    title = f"llvm.nvvm.shfl.sync.{mode}.i32"
    function = builder.module.globals.get(title) or ir.Function(builder.module, kind, title)
    return builder.call(function, [constant(-1), value, lane, constant(clamp)])


_define_shuffle("shuffle_xor", "bfly", 31, "``shuffle_xor(v, m)``: v of lane ``lane ^ m``. All 32 lanes take part.")
_define_shuffle("shuffle_down", "down", 31, "``shuffle_down(v, d)``: v of the lane d above; its own where there is none.")
_define_shuffle("shuffle_up", "up", 0, "``shuffle_up(v, d)``: v of the lane d below; its own where there is none.")
_define_shuffle("shuffle_from", "idx", 31, "``shuffle_from(v, k)``: v of lane k.")


# --- single operations -------------------------------------------------------------------------------------------------

def _define_approximation(title: str, instruction: str, text: str) -> None:
    def definition(typing: Any, x: Kind) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            number = context.cast(builder, arguments[0], signature.args[0], types.float32)
            return assembly(builder, f"{instruction}.f32 $0, $1;", F32, [number], "=f,f")

        return types.float32(types.unliteral(x)), codegen

    definition.__name__, definition.__doc__ = title, text
    name(definition)


# Errors are those of NVIDIA's PTX ISA, section "Floating Point Instructions".
_define_approximation("exp2_approximate", "ex2.approx", "2**x in float32, within 2 ulp.")
_define_approximation("log2_approximate", "lg2.approx", "log2(x) in float32; 2**-22 absolute near 1, relative elsewhere.")
_define_approximation("reciprocal_approximate", "rcp.approx", "1 / x in float32, within 1 ulp.")
_define_approximation("rsqrt_approximate", "rsqrt.approx", "1 / sqrt(x) in float32, relative error below 2**-22.4.")
_define_approximation("tanh_approximate", "tanh.approx",
                      "tanh(x) in float32, relative error below 2**-10.9: for 16-bit results.")


@name
def multiply_add(typing: Any, a: Kind, b: Kind, c: Kind) -> Any:
    """``multiply_add(a, b, c)``: a * b + c, rounded once; all three of one float type."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        values = [context.cast(builder, v, t, signature.return_type) for v, t in zip(arguments, signature.args)]
        return builder.fma(*values)

    return types.unliteral(a)(types.unliteral(a), types.unliteral(b), types.unliteral(c)), codegen
