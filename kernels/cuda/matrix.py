"""Pieces of matrix products on tensor cores, for the text of GPU kernels: products of small matrices held by a warp,
matrices read from shared memory, copies from global to shared memory in the background.

`NAMES` is part of the vocabulary, as in `kernels.cuda.intrinsics`. Which element of a matrix lies in which lane is said in
NVIDIA's PTX ISA, sections "Matrix Fragments for mma.m16n8k16" and "ldmatrix". All 32 lanes take part in all of these but
in the copies.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from jitgrad.kernels.cuda.intrinsics import F32, I32, I64, VOID, Definition, Kind, assembly, global_address, types

NAMES: dict[str, Definition] = {}


def name(definition: Definition) -> Definition:
    """Enter a definition into this part of the vocabulary."""
    NAMES[definition.__name__] = definition
    return definition


def _tuple_type(kind: ir.Type, count: int) -> ir.Type:
    return ir.LiteralStructType([kind] * count)


def _elements(builder: ir.IRBuilder, value: ir.Value, count: int) -> list[ir.Value]:
    return [builder.extract_value(value, k) for k in range(count)]


def _returned(context: Any, builder: ir.IRBuilder, result: Kind, value: ir.Value) -> Any:
    return context.make_tuple(builder, result, _elements(builder, value, result.count))


# --- products ----------------------------------------------------------------------------------------------------------

def _define_product(title: str, shape: str, kind: str, words: int) -> None:
    """``title(a, b, c)``: a @ b + c for a (16, k), b (k, 8) and c (16, 8), accumulated in float32."""
    text = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32"
    left, right = words, words // 2
    places = [[f"${k}" for k in range(start, stop)] for start, stop in
              ((0, 4), (4, 4 + left), (4 + left, 4 + left + right), (4 + left + right, 8 + left + right))]
    instruction = f"{text} " + ", ".join("{" + ", ".join(group) + "}" for group in places) + ";"
    constraints = ",".join(["=f"] * 4 + ["r"] * (left + right) + ["f"] * 4)
    result = types.UniTuple(types.float32, 4)
    signature = result(types.UniTuple(types.uint32, left), types.UniTuple(types.uint32, right), result)

    def definition(typing: Any, a: Kind, b: Kind, c: Kind) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            operands = [element for value, count in zip(arguments, (left, right, 4))
                        for element in _elements(builder, value, count)]
            made = assembly(builder, instruction, _tuple_type(F32, 4), operands, constraints, effects=True)
            return _returned(context, builder, result, made)

        return signature, codegen

    definition.__name__ = title
    definition.__doc__ = f"``{title}(a, b, c)``: a @ b + c of {shape}, factors in {kind} as 32-bit words, sums in float32."
    name(definition)


_define_product("multiply_bf16", "m16n8k16", "bf16", 4)
_define_product("multiply_f16", "m16n8k16", "f16", 4)
_define_product("multiply_tf32", "m16n8k8", "tf32", 4)


# --- shared memory -----------------------------------------------------------------------------------------------------

@name
def shared_address(typing: Any, array: Kind) -> Any:
    """``shared_address(a)``: where a shared array begins, in bytes, as the instructions here take it."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, ir.PointerType(data.type.pointee, 3)), I32)

    return types.uint32(array), codegen


def _define_matrix_load(title: str, count: int, transposed: bool) -> None:
    places = ", ".join(f"${k}" for k in range(count))
    middle = ".trans" if transposed else ""
    instruction = f"ldmatrix.sync.aligned.m8n8.x{count}{middle}.shared.b16 {{{places}}}, [${count}];"
    constraints = ",".join(["=r"] * count + ["r", "~{memory}"])
    result = types.UniTuple(types.uint32, count)

    def definition(typing: Any, address: Kind) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            made = assembly(builder, instruction, _tuple_type(I32, count), list(arguments), constraints, effects=True)
            return _returned(context, builder, result, made)

        return result(types.uint32), codegen

    definition.__name__ = title
    definition.__doc__ = (f"``{title}(address)``: {count} matrices of 8 x 8 of 16 bits{', transposed' * transposed}; each "
                          "lane gives the address of one row of 16 bytes in shared memory.")
    name(definition)


_define_matrix_load("load_matrix_x2", 2, False)
_define_matrix_load("load_matrix_x4", 4, False)
_define_matrix_load("load_matrix_x2_transposed", 2, True)
_define_matrix_load("load_matrix_x4_transposed", 4, True)


# --- copies in the background ------------------------------------------------------------------------------------------

@name
def copy_async(typing: Any, address: Kind, p: Kind, index: Kind) -> Any:
    """``copy_async(address, p, i)``: 16 bytes from element i of p to `address` in shared memory, both multiples of 16."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        start = builder.ptrtoint(global_address(context, builder, arguments[1], arguments[2], signature.args[2]), I64)
        assembly(builder, "cp.async.cg.shared.global [$0], [$1], 16;", VOID, [arguments[0], start],
                 "r,l,~{memory}", effects=True)
        return context.get_dummy_value()

    return types.void(types.uint32, p, types.unliteral(index)), codegen


@name
def copy_commit(typing: Any) -> Any:
    """``copy_commit()``: the copies that this thread began since the last one are a group."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        assembly(builder, "cp.async.commit_group;", VOID, [], "~{memory}", effects=True)
        return context.get_dummy_value()

    return types.void(), codegen


@name
def copy_wait(typing: Any, pending: Kind) -> Any:
    """``copy_wait(n)``: wait until at most the n latest groups of this thread are under way. n is a constant."""
    if not isinstance(pending, types.IntegerLiteral):
        return None                                          # asked again with the types of constants
    instruction = f"cp.async.wait_group {pending.literal_value};"

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        assembly(builder, instruction, VOID, [], "~{memory}", effects=True)
        return context.get_dummy_value()

    return types.void(pending), codegen
