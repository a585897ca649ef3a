"""Numba as a front end alone: from a Python function and its argument types to an LLVM module, unoptimized.

A short list of Numba's passes turns plain functions (no closures, no generators, nothing to be rewritten) into LLVM IR
without wrappers and without Numba's own rounds of optimization. Whoever collects the modules optimizes once, at the
end. Kernels are made of numbers, pointers, ranges and tuples: the two contexts in here know nothing else. Arrays,
strings, containers and their overloads of every operator would take most of the time of a compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase, CompileResult, Flags, compile_extra
from numba.core.compiler_machinery import PassManager
from numba.core.cpu import CPUContext
from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference
from numba.core.typing import BaseContext
from numba.core.typing.templates import AbstractTemplate, RegistryLoader, _TemplateTargetHelperMixin, infer_global
from numba.core.untyped_passes import FixupArgs, IRProcessing, TranslateByteCode
from numba.cpython import builtins, iterators, numbers, rangeobj, tupleobj
from numba.extending import lower_builtin

LOWERINGS = (builtins, iterators, numbers, rangeobj, tupleobj)       # importing them is what defines these types

Function = Callable[..., Any]
Emit = Callable[[Any, ir.IRBuilder, Any, Any], Any]


class Machine(CPUContext):  # type: ignore[misc]
    """How types and calls become LLVM IR."""

    def load_additional_registries(self) -> None:
        pass

    def post_lowering(self, module: ir.Module, library: Library) -> None:
        """Kernels allocate nothing, so the runtime of reference counts is not linked."""


class Typing(BaseContext):  # type: ignore[misc]
    """What types the results of calls have; each call with the same types is looked up once in a process."""

    def __init__(self) -> None:
        self.resolved: dict[tuple[types.Type, tuple[types.Type, ...]], Any] = {}
        super().__init__()

    def install_registry(self, registry: Any) -> None:
        """Take over all declarations but overloads written in Python, which are for other types."""
        loader = self._registries.setdefault(registry, RegistryLoader(registry))
        for template in filter(_is_plain, loader.new_registrations("functions")):
            self.insert_function(template(self))
        for template in filter(_is_plain, loader.new_registrations("attributes")):
            self.insert_attributes(template(self))
        for value, kind in loader.new_registrations("globals"):
            if isinstance(kind, types.Function) and not all(map(_is_plain, kind.templates)):
                continue
            known = self._lookup_global(value)
            if known is not None:
                self._remove_global(value)
                kind = known.augment(kind)
            self.insert_global(value, kind)

    def resolve_function_type(self, function: types.Type, arguments: Any, keywords: Any) -> Any:
        key = function, tuple(arguments)
        if key not in self.resolved:
            self.resolved[key] = super().resolve_function_type(function, arguments, keywords)
        return self.resolved[key]


def _is_plain(template: type) -> bool:
    return not issubclass(template, _TemplateTargetHelperMixin)


TYPING = Typing()
MACHINE = Machine(TYPING, "cpu")


def lower_function(function: Function, arguments: tuple[types.Type, ...],
                   result: types.Type | None = None, *, inline: bool = False) -> CompileResult:
    """`function` for these argument types; the module is in the result's ``library``. `inline`: always, by LLVM."""
    flags = Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.forceinline = inline
    library = Library(MACHINE.codegen(), function.__name__)
    compiled = compile_extra(TYPING, MACHINE, function, arguments, result, flags, {},
                             library=library, pipeline_class=Pipeline)
    library.finalize()
    return compiled


# --- teaching: what a function means that kernel text calls ---------------------------------------------------------

def intrinsic(definition: Function, *, literal: bool = False) -> Function:
    """The function ``f(…)`` for kernel text that `definition` makes: ``definition(typing, *types)`` gives the signature
    of a call and what writes its code. `literal`: integer arguments that are constants have literal types."""

    def stub(*arguments: Any) -> Any:
        raise TypeError(f"{definition.__name__} has no meaning outside of a kernel")

    stub.__name__, stub.__doc__ = definition.__name__, definition.__doc__
    teach_calls(stub, definition, literal=literal)
    return stub


def teach_calls(function: Function, definition: Function, *, literal: bool) -> None:
    """Calls of `function` are what `definition` makes of them, as for `intrinsic`."""
    emits: dict[tuple[types.Type, ...], Emit] = {}

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


@cache
def compiled(body: Function, arguments: tuple[types.Type, ...], inline: bool) -> CompileResult:
    """The LLVM module of a function for these types, made once in a process."""
    return lower_function(body, arguments, inline=inline)


def teach(function: Function, choose: Callable[[types.Type], Function], *, inline: bool = True) -> None:
    """A call of `function` is a call of the body that `choose` gives for the type of the first argument; the body is
    compiled when it is first needed, and inlined by LLVM."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        key = function

        def generic(self, arguments: Any, keywords: Any) -> Any:
            kinds = tuple([types.unliteral(a) for a in arguments])
            return compiled(choose(kinds[0]), kinds, inline).signature

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        made = compiled(choose(signature.args[0]), signature.args, inline)
        context.active_code_library.add_linking_library(made.library)
        return context.call_internal_no_propagate(builder, made.fndesc, signature, values)[1]

    infer_global(function, types.Function(Template))
    lower_builtin(function, types.VarArg(types.Any))(emit)


# --- Numba's parts ----------------------------------------------------------------------------------------------------

class Pipeline(CompilerBase):  # type: ignore[misc]
    """The passes that plain functions need. A variable has one type throughout, so there is no renaming to single
    assignments; LLVM does that for values."""

    def define_pipelines(self) -> list[PassManager]:
        manager = PassManager("jitgrad")
        for step in (TranslateByteCode, FixupArgs, IRProcessing, NopythonTypeInference, NativeLowering, NoPythonBackend):
            manager.add_pass(step, step.__name__)
        manager.finalize()
        return [manager]


class Library(CPUCodeLibrary):  # type: ignore[misc]
    """Collects LLVM modules; leaves optimizing and loading to its user."""

    def _optimize_functions(self, module: llvm.ModuleRef) -> None:
        pass

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalized = True

    def enable_object_caching(self) -> None:
        pass
