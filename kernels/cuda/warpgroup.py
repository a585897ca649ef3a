"""Products of four warps together, for the text of GPU kernels on sm_90a: both factors are read from shared memory while
the threads go on, the sums stay in registers.

`NAMES` is a part of the vocabulary. A *slice* of a factor is what a product takes of it: 64 steps of the depth, in rows of
128 bytes, in which the piece of 16 bytes number p of row r lies at place ``p ^ r % 8`` (the 128-byte swizzle). Along the
depth, row r has the 64 steps of row r of the factor. Across it, row r has 64 rows of the factor at step r, and 8,192 bytes
behind it begin the next 64 rows. See NVIDIA's PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate": matrix
descriptors, strides, the register fragments of D. All 128 threads of a warpgroup take part in all of these but the fence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba.core import types

from jitgrad.kernels.cpu.frontend import intrinsic
from jitgrad.kernels.cuda.matrix import F32, I32, I64, VOID, assembly

SWIZZLED = 1 << 62
EIGHT_ROWS, BLOCK = 1024, 8192
"""Bytes from eight rows of a slice to the next eight, and from 64 rows of a factor across the depth to the next 64."""

PRODUCTS, BESIDE, BELOW = 4, 2, 128
"""Instructions for a slice, each of 16 steps; how far apart these begin along the depth and across it, in 16 bytes."""


def _sums(count: int) -> Any:
    return types.UniTuple(types.float32, count)


def _packed(context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> ir.Value:
    return context.make_tuple(builder, kind, [builder.extract_value(value, k) for k in range(kind.count)])


def _tied(count: int) -> tuple[list[str], list[str]]:
    """Constraints of `count` float registers that go in and come out."""
    return ["=f"] * count, [str(k) for k in range(count)]


@partial(intrinsic, literal=True)
def zero_sums(typing: Any, count: types.Type) -> Any:
    """``zero_sums(n)``: n sums of a thread, all 0. A warpgroup has 64 rows of 2 * n columns."""
    kind = _sums(count.literal_value)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return context.make_tuple(builder, kind, [ir.Constant(F32, 0.0)] * kind.count)

    return kind(count), codegen


@intrinsic
def slice_at(typing: Any, address: types.Type) -> Any:
    """``slice_at(address)``: a slice in shared memory, as a product wants it to be named. The address is a multiple of
    1,024 bytes."""
    constant = SWIZZLED | EIGHT_ROWS >> 4 << 32 | BLOCK >> 4 << 16

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        where = context.cast(builder, arguments[0], signature.args[0], types.int32)
        place = builder.lshr(builder.and_(where, ir.Constant(I32, 0x3FFFF)), ir.Constant(I32, 4))
        return builder.or_(builder.zext(place, I64), ir.Constant(I64, constant))

    return types.int64(types.unliteral(address)), codegen


def _multiplication(name: str, kind: str) -> Any:
    def multiply(typing: Any, sums: types.Type, a: types.Type, b: types.Type, across_a: types.Type,
                 across_b: types.Type) -> Any:
        count, turned = sums.count, (across_a.literal_value, across_b.literal_value)
        shape = f"m64n{2 * count}k16"
        registers = "{" + ", ".join(f"${k}" for k in range(count)) + "}"
        steps = [BELOW if across else BESIDE for across in turned]
        text = ["{ .reg .b64 a, b; .reg .pred add;", f"mov.b64 a, ${count}; mov.b64 b, ${count + 1};",
                "setp.eq.u32 add, 0, 0;", "wgmma.fence.sync.aligned;"]
        for number in range(PRODUCTS):
            if number:
                text += [f"add.s64 a, a, {steps[0]};", f"add.s64 b, b, {steps[1]};"]
            text.append(f"wgmma.mma_async.sync.aligned.{shape}.f32.{kind}.{kind} {registers}, a, b, add, 1, 1, "
                        f"{turned[0]}, {turned[1]};")
        text.append("wgmma.commit_group.sync.aligned; }")
        outputs, inputs = _tied(count)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            operands = [*arguments[1:3], *[builder.extract_value(arguments[0], k) for k in range(count)]]
            made = assembly(builder, "\n\t".join(text), ir.LiteralStructType([F32] * count), operands,
                            ",".join([*outputs, "l", "l", *inputs, "~{memory}"]))
            return _packed(context, builder, sums, made)

        return sums(sums, types.int64, types.int64, across_a, across_b), codegen

    multiply.__name__ = name
    multiply.__doc__ = (f"``{name}(sums, a, b, across_a, across_b)``: begin to add the product of two slices in {kind} to "
                        "the sums, a group of its own. Across: 1 where a slice lies across the depth, else 0. What is in "
                        "the slices, and the sums, are nobody's until the group has been waited for.")
    return partial(intrinsic, literal=True)(multiply)


@partial(intrinsic, literal=True)
def products_wait(typing: Any, pending: types.Type) -> Any:
    """``products_wait(n)``: wait until at most the n latest groups of products are under way. n is a constant."""
    instruction = f"wgmma.wait_group.sync.aligned {pending.literal_value};"

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        assembly(builder, instruction, VOID, [], "~{memory}")
        return context.get_dummy_value()

    return types.void(pending), codegen


@intrinsic
def finished_sums(typing: Any, sums: types.Type) -> Any:
    """``finished_sums(sums)``: the sums, once all products are in them."""
    outputs, inputs = _tied(sums.count)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        operands = [builder.extract_value(arguments[0], k) for k in range(sums.count)]
        made = assembly(builder, "wgmma.wait_group.sync.aligned 0;", ir.LiteralStructType([F32] * sums.count), operands,
                        ",".join([*outputs, *inputs, "~{memory}"]))
        return _packed(context, builder, sums, made)

    return sums(sums), codegen


@intrinsic
def show_to_products(typing: Any) -> Any:
    """``show_to_products()``: what this thread wrote to shared memory is seen by products that begin behind the next
    barrier. Products read past the path of other accesses."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        assembly(builder, "fence.proxy.async.shared::cta;", VOID, [], "~{memory}")
        return context.get_dummy_value()

    return types.void(), codegen


NAMES: dict[str, Any] = {
    "zero_sums": zero_sums, "slice_at": slice_at, "products_wait": products_wait, "finished_sums": finished_sums,
    "show_to_products": show_to_products,
    "multiply_slices_bf16": _multiplication("multiply_slices_bf16", "bf16"),
    "multiply_slices_f16": _multiplication("multiply_slices_f16", "f16"),
}
