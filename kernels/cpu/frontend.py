"""Kernel text and its vocabulary -> an LLVM module, unoptimized.

Types, operators and their meaning in machine code are Numba's (`contexts`); the functions are read and written here
(`inference`, `lowering`), since Numba's own passes take several times as long for what kernels are made of. A call is an
intrinsic, which writes its code, or a call of a function that is written into the same module.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import lower_builtin

from jitgrad.kernels.cpu.contexts import refresh
from jitgrad.kernels.cpu.lowering import Form, form_of

Function = Callable[..., Any]
Emit = Callable[[Any, ir.IRBuilder, Any, Any], Any]


def lower_function(tree: ast.FunctionDef, arguments: tuple[types.Type, ...], names: Mapping[str, Any],
                   symbol: str) -> llvm.ModuleRef:
    """The module of a function for these types of arguments, without a result, under the name `symbol`; `names`: all that it
    may use."""
    refresh()
    module = ir.Module(symbol)
    Form(tree, arguments, names, symbol).write(module)
    return parse(module)


def parse(module: ir.Module) -> llvm.ModuleRef:
    """A module as LLVM has it."""
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return parsed


def intrinsic(definition: Function, *, literal: bool = False) -> Function:
    """The function ``f(…)`` for kernel text that `definition` makes: ``definition(typing, *types)`` gives the signature
    of a call and what writes its code. `literal`: integer arguments that are constants have literal types."""

    def stub(*arguments: Any) -> Any:
        raise TypeError(f"{definition.__name__} has no meaning outside of a kernel")

    stub.__name__, stub.__doc__ = definition.__name__, definition.__doc__
    teach_calls(stub, definition, literal=literal)
    return stub


_emits: dict[Function, dict[tuple[types.Type, ...], Emit]] = {}


def teach_calls(function: Function, definition: Function, *, literal: bool) -> None:
    """Calls of `function` are what `definition` makes of them, as for `intrinsic`."""
    emits = _emits.setdefault(function, {})         # of two teachers, one may give the type and the other the code

    class Template(AbstractTemplate):  # type: ignore[misc]
        key = function
        prefer_literal = literal

        def generic(self, arguments: Any, keywords: Any) -> Any:
            signature, emit = definition(self.context, *arguments)
            emits[signature.args] = emit
            return signature

    def write(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        return emits[signature.args](context, builder, signature, values)

    infer_global(function, types.Function(Template))
    lower_builtin(function, types.VarArg(types.Any))(write)


def teach(function: Function, choose: Callable[[types.Type], Function], *, inline: bool = True) -> None:
    """A call of `function` is a call of the body that `choose` gives for the type of the first argument; the body is
    written into the module of the kernel, and inlined by LLVM."""

    def definition(typing: Any, *arguments: types.Type) -> Any:
        kinds = tuple([types.unliteral(a) for a in arguments])
        form = form_of(choose(kinds[0]), kinds)

        def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
            made = builder.call(form.write(builder.module, ("alwaysinline",) if inline else ()), values)
            return context.get_dummy_value() if form.result == types.none else made

        return form.result(*kinds), emit

    teach_calls(function, definition, literal=False)
