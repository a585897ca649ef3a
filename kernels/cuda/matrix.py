"""Pieces of matrix products on tensor cores, for the text of GPU kernels: products of small matrices held by a warp,
matrices read from shared memory, copies from global to shared memory in the background. Each is one instruction of PTX.

`NAMES` is a part of the vocabulary. Which element of a matrix lies in which thread is said in NVIDIA's PTX ISA, sections
"Matrix Fragments for mma.m16n8k16" and "ldmatrix". All 32 threads of a warp take part in all of these but in the copies.
Addresses of shared memory are int32, in bytes. None of the instructions is older than sm_80.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from jitgrad.kernels.cpu.frontend import intrinsic
from jitgrad.kernels.cpu.intrinsics import STORAGE

I32, I64, F32, VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
GLOBAL, SHARED = 1, 3                           # address spaces


def assembly(builder: ir.IRBuilder, text: str, result: ir.Type, arguments: list[ir.Value], constraints: str) -> ir.Value:
    """An instruction of PTX, which stays where it is among others of its kind. It is convergent: LLVM must not give threads
    that come there together a copy each, behind a condition, since many of these a warp carries out as a whole."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), arguments, attrs=("convergent",))


def _places(first: int, count: int) -> str:
    return "{" + ", ".join(f"${k}" for k in range(first, first + count)) + "}"


def _as_tuple(context: Any, builder: ir.IRBuilder, result: Any, value: ir.Value) -> ir.Value:
    return context.make_tuple(builder, result, [builder.extract_value(value, k) for k in range(result.count)])


def _words(kind: ir.Type, count: int) -> ir.Type:
    return ir.LiteralStructType([kind] * count)


# Products

def _product(name: str, shape: str, kind: str) -> Any:
    instruction = (f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
                   f"{_places(0, 4)}, {_places(4, 4)}, {_places(8, 2)}, {_places(10, 4)};")
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    sums = types.UniTuple(types.float32, 4)
    taken = types.UniTuple(types.int32, 4), types.UniTuple(types.int32, 2), sums

    def multiply(typing: Any, a: types.Type, b: types.Type, c: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            operands = [builder.extract_value(value, k) for value, held in zip(arguments, taken, strict=True)
                        for k in range(held.count)]
            return _as_tuple(context, builder, sums,
                             assembly(builder, instruction, _words(F32, 4), operands, constraints))

        return sums(*taken), codegen

    multiply.__name__ = name
    multiply.__doc__ = f"``{name}(a, b, c)``: a @ b + c of {shape}, factors in {kind} as 32-bit words, sums in float32."
    return intrinsic(multiply)


def _packing(name: str, kind: str) -> Any:
    def pack(typing: Any, low: types.Type, high: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            function = ir.FunctionType(I32, [F32, F32])
            return builder.call(ir.InlineAsm(function, f"cvt.rn.{kind}x2.f32 $0, $2, $1;", "=r,f,f"), arguments)

        return types.int32(types.float32, types.float32), codegen

    pack.__name__ = name
    pack.__doc__ = f"``{name}(x, y)``: two float32 rounded to {kind}, in one 32-bit word, x in its lower half."
    return intrinsic(pack)


@intrinsic
def tf32(typing: Any, x: types.Type) -> Any:
    """``tf32(x)``: x, a float32 or its 32 bits, rounded to TF32 as a 32-bit word: to nearest, ties away from zero."""
    kind = types.unliteral(x)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        asked = ir.FunctionType(I32, [F32])
        return builder.call(ir.InlineAsm(asked, "cvt.rna.tf32.f32 $0, $1;", "=r,f"), [builder.bitcast(arguments[0], F32)])

    return types.int32(kind), codegen


# Shared memory

@intrinsic
def shared_address(typing: Any, p: types.Type) -> Any:
    """``shared_address(p)``: where in shared memory p points to."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        near = builder.addrspacecast(arguments[0], ir.PointerType(arguments[0].type.pointee, SHARED))
        return builder.ptrtoint(near, I32)

    return types.int32(p), codegen


@intrinsic
def pointer_as(typing: Any, p: types.Type, dtype: types.Type) -> Any:
    """``pointer_as(p, dtype)``: the same address as a pointer to elements of `dtype`."""
    result = types.CPointer(STORAGE[dtype.typing_key])

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.bitcast(arguments[0], context.get_value_type(result))

    return result(p, dtype), codegen


def _matrix_load(name: str, count: int, transposed: bool) -> Any:
    instruction = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16 {_places(0, count)}, [${count}];"
    constraints = ",".join(["=r"] * count + ["r", "~{memory}"])
    result = types.UniTuple(types.int32, count)

    def load_matrix(typing: Any, address: types.Type) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            where = context.cast(builder, arguments[0], signature.args[0], types.int32)
            return _as_tuple(context, builder, result,
                             assembly(builder, instruction, _words(I32, count), [where], constraints))

        return result(types.unliteral(address)), codegen

    load_matrix.__name__ = name
    load_matrix.__doc__ = (f"``{name}(address)``: {count} matrices of 8 x 8 of 16 bits{', transposed' * transposed}; each "
                           "thread gives the address of one row of 16 bytes.")
    return intrinsic(load_matrix)


# Copies in the background

@intrinsic
def copy_async(typing: Any, address: types.Type, p: types.Type, index: types.Type, size: types.Type) -> Any:
    """``copy_async(address, p, i, n)``: n bytes, at most 16, from element i of p in global memory to `address`, and zeros
    behind them up to 16 bytes. Both are multiples of 16 bytes."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        where, _, index, size = [context.cast(builder, value, kind, wanted) for value, kind, wanted in zip(
            arguments, signature.args, (types.int32, p, types.int64, types.int32), strict=True)]
        start = builder.addrspacecast(builder.gep(arguments[1], [index]),
                                      ir.PointerType(arguments[1].type.pointee, GLOBAL))
        assembly(builder, "cp.async.cg.shared.global [$0], [$1], 16, $2;", VOID,
                 [where, builder.ptrtoint(start, I64), size], "r,l,r,~{memory}")
        return context.get_dummy_value()

    return types.void(types.unliteral(address), p, types.unliteral(index), types.unliteral(size)), codegen


@intrinsic
def copy_commit(typing: Any) -> Any:
    """``copy_commit()``: the copies that this thread began since the last one are a group."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        assembly(builder, "cp.async.commit_group;", VOID, [], "~{memory}")
        return context.get_dummy_value()

    return types.void(), codegen


@partial(intrinsic, literal=True)
def copy_wait(typing: Any, pending: types.Type) -> Any:
    """``copy_wait(n)``: wait until at most the n latest groups of this thread are under way. n is a constant."""
    instruction = f"cp.async.wait_group {pending.literal_value};"

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        assembly(builder, instruction, VOID, [], "~{memory}")
        return context.get_dummy_value()

    return types.void(pending), codegen


NAMES: dict[str, Any] = {
    "multiply_bf16": _product("multiply_bf16", "m16n8k16", "bf16"),
    "multiply_f16": _product("multiply_f16", "m16n8k16", "f16"),
    "multiply_tf32": _product("multiply_tf32", "m16n8k8", "tf32"), "tf32": tf32,
    "pack_bf16": _packing("pack_bf16", "bf16"), "pack_f16": _packing("pack_f16", "f16"),
    "shared_address": shared_address, "pointer_as": pointer_as,
    "load_matrix_x2": _matrix_load("load_matrix_x2", 2, False),
    "load_matrix_x4": _matrix_load("load_matrix_x4", 4, False),
    "load_matrix_x2_transposed": _matrix_load("load_matrix_x2_transposed", 2, True),
    "load_matrix_x4_transposed": _matrix_load("load_matrix_x4_transposed", 4, True),
    "copy_async": copy_async, "copy_commit": copy_commit, "copy_wait": copy_wait,
}
