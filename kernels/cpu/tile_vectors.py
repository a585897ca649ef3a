"""What the code that is written for `kernels.cpu.tile` is written with: vectors, intrinsics, and how Numba learns of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import lower_builtin, type_callable

from jitgrad import config

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = I8.as_pointer()


def constant(n: int) -> ir.Constant:
    return ir.Constant(I64, n)


def declare(module: ir.Module, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, ir.FunctionType(result, arguments), name)


def suffix(element: ir.Type, lanes: int) -> str:
    """How the name of a vector intrinsic ends."""
    return f"v{lanes}{'f32' if element == ir.FloatType() else 'f64'}"


def masked_load(module: ir.Module, vector: ir.VectorType) -> ir.Function:
    return declare(module, f"llvm.masked.load.{suffix(vector.element, vector.count)}.p0", vector,
                    [POINTER, I32, ir.VectorType(I1, vector.count), vector])


def masked_store(module: ir.Module, vector: ir.VectorType) -> ir.Function:
    return declare(module, f"llvm.masked.store.{suffix(vector.element, vector.count)}.p0", ir.VoidType(),
                    [vector, POINTER, I32, ir.VectorType(I1, vector.count)])


def where_all(builder: ir.IRBuilder, mask: ir.Value, access: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """What ``access(mask)`` gives, a masked load, gather or store. A processor without masks takes lane by lane, and a
    branch each: there the mask that has all lanes comes as a constant, and the access is an ordinary one."""
    if config.processor().masks:
        return access(mask)
    bits = ir.IntType(mask.type.count)
    everything = builder.icmp_unsigned("==", builder.bitcast(mask, bits), ir.Constant(bits, -1))
    ends = []
    with builder.if_else(everything) as branches:
        for branch, lanes in zip(branches, (ir.Constant(mask.type, [1] * mask.type.count), mask), strict=True):
            with branch:
                ends.append((access(lanes), builder.block))
    if isinstance(ends[0][0].type, ir.VoidType):
        return ends[0][0]
    result = builder.phi(ends[0][0].type)
    for value, block in ends:
        result.add_incoming(value, block)
    return result


def element_bytes(element: ir.Type) -> int:
    return 4 if element == ir.FloatType() else 8


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A vector with `value` in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(I32, lanes), None))


def integers(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> list[ir.Value]:
    """All arguments, integers as int64."""
    return [context.cast(builder, v, t, types.int64) if isinstance(t, types.Integer) else v
            for v, t in zip(values, signature.args, strict=True)]


def teach(function: Callable[..., Any], emit: Callable[..., ir.Value], result: Any = None) -> None:
    """`emit` writes the code of `function`, which returns nothing, or what ``result(*types)`` says."""
    count = function.__code__.co_argcount
    names = ", ".join(function.__code__.co_varnames[:count])
    namespace: dict[str, Any] = {"result": result or (lambda *_: types.none)}
    exec(f"def typing(context):\n def typer({names}):\n  return result({names})\n return typer", namespace)
    type_callable(function)(namespace["typing"])
    lower_builtin(function, *[types.Any] * count)(emit)
