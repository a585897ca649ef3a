"""Copies of boxes, cuts of a matrix, from global to shared memory by the processor's copy engine, for the text of GPU
kernels on sm_90 and later: one thread begins them, all can wait for them.

`NAMES` is a part of the vocabulary. What a matrix is (where it begins, its sizes, its pitch, the size of a box, the swizzle
of 128 bytes) is said by a *map*, a parameter ``box_map``. Whatever of a box lies outside of its matrix arrives as zeros. An
*arrival* is 8 bytes of shared memory that count the bytes which have come. See NVIDIA's PTX ISA, "cp.async.bulk.tensor" and
"mbarrier". Addresses of shared memory are int32, in bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from jitgrad.kernels.cpu.frontend import intrinsic
from jitgrad.kernels.cuda.matrix import I64, VOID, assembly

FETCH = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def _instruction(name: str, text: str, count: int, doc: str) -> Any:
    """A word of `count` int32 arguments that is these instructions."""
    constraints = ",".join(["r"] * count + ["~{memory}"])

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        given = [context.cast(builder, value, kind, types.int32)
                 for value, kind in zip(arguments, signature.args, strict=True)]
        assembly(builder, text, VOID, given, constraints)
        return context.get_dummy_value()

    def one(typing: Any, address: types.Type) -> Any:
        return types.void(types.unliteral(address)), codegen

    def two(typing: Any, address: types.Type, number: types.Type) -> Any:
        return types.void(types.unliteral(address), types.unliteral(number)), codegen

    word = one if count == 1 else two
    word.__name__, word.__doc__ = name, doc
    return intrinsic(word)


@intrinsic
def fetch_box(typing: Any, address: types.Type, p: types.Type, arrival: types.Type, x: types.Type, y: types.Type) -> Any:
    """``fetch_box(address, map, arrival, x, y)``: begin to copy a box to `address`, a multiple of 1,024 bytes. Its first
    element is number x of line y."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        to, _, when, *place = [context.cast(builder, value, kind, p if k == 1 else types.int32)
                               for k, (value, kind) in enumerate(zip(arguments, signature.args, strict=True))]
        assembly(builder, f"{FETCH} [$0], [$1, {{$3, $4}}], [$2];", VOID,
                 [to, builder.ptrtoint(arguments[1], I64), when, *place], "r,l,r,r,r,~{memory}")
        return context.get_dummy_value()

    return types.void(*[kind if kind is p else types.unliteral(kind) for kind in (address, p, arrival, x, y)]), codegen


NAMES: dict[str, Any] = {
    "fetch_box": fetch_box,
    "arrival_begin": _instruction(
        "arrival_begin", "mbarrier.init.shared::cta.b64 [$0], 1;", 1,
        "``arrival_begin(address)``: from now on there is an arrival, for those who know it: other threads behind a "
        "barrier, copies behind `show_to_products`."),
    "arrival_expect": _instruction(
        "arrival_expect", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", 2,
        "``arrival_expect(address, n)``: it is complete when n bytes have come, and begins anew."),
    "arrival_wait": _instruction(
        "arrival_wait", "{ .reg .pred come;\n\tagain${:uid}:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 come, [$0], $1;\n\t@!come bra again${:uid}; }", 2,
        "``arrival_wait(address, k % 2)``: until it has been complete for the time k, counted from 0. What came is seen by "
        "this thread and its products."),
}
