"""Teaches Numba what `kernels.cpu.scalar` and the scalar functions built on it mean in machine code.

Importing this module is all there is to do; it is the only one here that needs Numba, and it is imported when a kernel
is compiled, never before. Every function object keeps its plain Python meaning; Numba gets

* one LLVM instruction or intrinsic for each name of `scalar` that stands for one,
* for every function marked with `scalar` its LLVM code, always inlined, with no flags on its arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import lower_builtin, type_callable

from jitgrad.kernels.cpu import math, picking, scalar
from jitgrad.kernels.cpu.frontend import Emit, Function, teach, teach_calls
from jitgrad.kernels.cpu.intrinsics import tag_scope

CONTRACT = ("contract",)
NO_OPERAND = 64                                 # the table of 2/pi counts as an operand that no kernel has


def instruction(function: Callable[..., Any], arity: int, result: Callable[..., Any], emit: Emit) -> None:
    """`function` of `arity` arguments has the type ``result(*argument types)``, and `emit` writes its code."""
    names = ", ".join("abc"[:arity])
    namespace: dict[str, Any] = {"result": result}
    exec(f"def typing(context):\n def typer({names}):\n  return result({names})\n return typer", namespace)
    type_callable(function)(namespace["typing"])
    lower_builtin(function, *[types.Any] * arity)(emit)


def llvm_intrinsic(name: str) -> Emit:
    """Code that calls ``llvm.<name>`` on floats of any width; integers pass unchanged."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        if isinstance(signature.return_type, types.Integer):
            return values[0]
        kind = values[0].type
        function = builder.module.declare_intrinsic(f"llvm.{name}", [kind], ir.FunctionType(kind, [kind] * len(values)))
        return builder.call(function, values)

    return emit


def first(*arguments: Any) -> Any:
    """The result has the type of the first argument."""
    return types.unliteral(arguments[0])


def _cast_all(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> list[ir.Value]:
    return [context.cast(builder, value, kind, signature.return_type) for value, kind in zip(values, signature.args)]


def _select(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    condition = context.cast(builder, values[0], signature.args[0], types.boolean)
    x, y = [context.cast(builder, v, t, signature.return_type) for v, t in zip(values[1:], signature.args[1:])]
    return builder.select(condition, x, y)


def _like(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    return context.cast(builder, values[1], signature.args[1], signature.return_type)


def _multiply_add(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    x, y, z = _cast_all(context, builder, signature, values)
    return builder.fadd(builder.fmul(x, y, flags=CONTRACT), z, flags=CONTRACT)


def _horner(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    x, table = values
    coefficients = [context.cast(builder, builder.extract_value(table, i), types.float64, signature.return_type)
                    for i in range(len(signature.args[1]))]
    total = coefficients[0]
    for c in coefficients[1:]:
        total = builder.fadd(builder.fmul(total, x, flags=CONTRACT), c, flags=CONTRACT)
    return total


def _bitcast(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    return builder.bitcast(values[0], context.get_value_type(signature.return_type))


def _to_int(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    return builder.fptosi(values[0], context.get_value_type(signature.return_type))


def _clamp(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    x, low, high = _cast_all(context, builder, signature, values)
    raised = builder.select(builder.fcmp_ordered(">", x, low), x, low)
    return builder.select(builder.fcmp_ordered("<", raised, high), raised, high)


def _power(builder: ir.IRBuilder, n: ir.Value) -> ir.Value:
    bias, places, kind = (127, 23, ir.FloatType()) if n.type.width == 32 else (1023, 52, ir.DoubleType())
    exponent = builder.add(n, ir.Constant(n.type, bias))
    return builder.bitcast(builder.shl(exponent, ir.Constant(n.type, places)), kind)


def _power_of_two(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    return _power(builder, values[0])


def _scale(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    x, n = values
    kind = ir.FunctionType(x.type, [x.type, n.type])
    return builder.call(get_or_insert_function(builder.module, kind, f"jitgrad_scale_{signature.return_type}"), values)


def scale_text(instruction: bool) -> str:
    """What kernels that call `scale` are linked with: LLVM's own, where the processor has an `instruction` for it, or two
    multiplications."""
    text = _SCALE_BY_INSTRUCTION if instruction else _SCALE_IN_TWO
    return (text.format(kind="float", width=32, bias=127, places=23)
            + text.format(kind="double", width=64, bias=1023, places=52))


_SCALE_BY_INSTRUCTION = """
declare {kind} @llvm.ldexp.f{width}.i{width}({kind}, i{width})
define {kind} @jitgrad_scale_float{width}({kind} %x, i{width} %n) alwaysinline {{
  %y = call {kind} @llvm.ldexp.f{width}.i{width}({kind} %x, i{width} %n)
  ret {kind} %y
}}
"""

_SCALE_IN_TWO = """
define {kind} @jitgrad_scale_float{width}({kind} %x, i{width} %n) alwaysinline {{
  %near = ashr i{width} %n, 1
  %far = sub i{width} %n, %near
  %a = add i{width} %near, {bias}
  %b = add i{width} %far, {bias}
  %c = shl i{width} %a, {places}
  %d = shl i{width} %b, {places}
  %e = bitcast i{width} %c to {kind}
  %f = bitcast i{width} %d to {kind}
  %g = fmul {kind} %x, %e
  %y = fmul {kind} %g, %f
  ret {kind} %y
}}
"""


def _two_over_pi(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    kind = ir.ArrayType(ir.DoubleType(), len(scalar.TWO_OVER_PI))
    table = builder.module.globals.get("jitgrad.two_over_pi")
    if table is None:
        table = ir.GlobalVariable(builder.module, kind, "jitgrad.two_over_pi")
        table.global_constant, table.linkage = True, "internal"
        table.initializer = ir.Constant(kind, [float(c) for c in scalar.TWO_OVER_PI])
    piece = builder.load(builder.gep(table, [ir.Constant(ir.IntType(64), 0), values[0]], inbounds=True))
    tag_scope(builder, piece, NO_OPERAND, NO_OPERAND + 1)
    return piece


def _abs(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    kind = signature.return_type
    if isinstance(kind, types.Float):
        return llvm_intrinsic("fabs")(context, builder, signature, values)
    zero = ir.Constant(values[0].type, 0)
    negative = builder.icmp_signed("<", values[0], zero) if kind.signed else ir.Constant(ir.IntType(1), 0)
    return builder.select(negative, builder.sub(zero, values[0]), values[0])


def _bit_width(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
    return ir.Constant(values[0].type, values[0].type.width)


def _teach_instructions() -> None:
    as_int = {types.float32: types.int32, types.float64: types.int64}
    as_float = {types.int32: types.float32, types.int64: types.float64}
    instruction(scalar.select, 3, lambda c, x, y: types.unliteral(x), _select)
    instruction(scalar.like, 2, first, _like)
    instruction(scalar.multiply_add, 3, first, _multiply_add)
    instruction(scalar.horner, 2, first, _horner)
    instruction(scalar.bits, 1, as_int.get, _bitcast)
    instruction(scalar.from_bits, 1, as_float.get, _bitcast)
    instruction(scalar.to_int, 1, as_int.get, _to_int)
    for name, llvm in {"sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "round": "rint", "trunc": "trunc"}.items():
        instruction(getattr(scalar, name), 1, first, llvm_intrinsic(llvm))
    instruction(scalar.copysign, 2, first, llvm_intrinsic("copysign"))
    instruction(scalar.abs, 1, first, _abs)
    instruction(scalar.clamp, 3, first, _clamp)
    instruction(scalar.power_of_two, 1, as_float.get, _power_of_two)
    instruction(scalar.scale, 2, first, _scale)
    instruction(scalar.two_over_pi, 1, {types.int64: types.float64}.get, _two_over_pi)
    instruction(scalar.bit_width, 1, first, _bit_width)
    instruction(scalar.permutes, 0, lambda: types.boolean, picking.emit_permutes)
    teach_calls(scalar.pick, picking.define_pick, literal=True)


# --- functions that are made of instructions ------------------------------------------------------------------------

def _teach_functions() -> None:
    for function in scalar.SCALARS.values():
        teach(function, lambda kind, function=function: function)
    for function, *bodies in scalar.DISPATCHERS.values():
        teach(function, functools.partial(_body, *bodies))


def _body(single: Function, double: Function, whole: Function, kind: types.Type) -> Function:
    if isinstance(kind, types.Integer | types.Boolean):
        return whole
    return single if kind == types.float32 else double


assert math.NAMES, "the scalar functions must be defined before Numba learns them"
_teach_instructions()
_teach_functions()
