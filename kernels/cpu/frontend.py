"""Numba as a front end alone: from a Python function and its argument types to an LLVM module, unoptimized.

A short list of Numba's passes turns plain functions (no closures, no generators, nothing to be rewritten) into LLVM IR
without wrappers and without Numba's own rounds of optimization. Whoever collects the modules optimizes once, at the
end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba.core import types
from numba.core.codegen import CPUCodeLibrary
from numba.core.compiler import CompilerBase, CompileResult, Flags, compile_extra
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target
from numba.core.typed_passes import (
    AnnotateTypes,
    IRLegalization,
    NativeLowering,
    NoPythonBackend,
    NopythonTypeInference,
    PreLowerStripPhis,
)
from numba.core.untyped_passes import FixupArgs, IRProcessing, ReconstructSSA, TranslateByteCode


def lower_function(function: Callable[..., Any], arguments: tuple[types.Type, ...],
                   result: types.Type | None = None, *, inline: bool = False) -> CompileResult:
    """`function` for these argument types; the module is in the result's ``library``. `inline`: always, by LLVM."""
    context = cpu_target.target_context
    flags = Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.forceinline = inline
    library = Library(context.codegen(), function.__name__)
    compiled = compile_extra(cpu_target.typing_context, context, function, arguments, result, flags, {},
                             library=library, pipeline_class=Pipeline)
    library.finalize()
    return compiled


class Pipeline(CompilerBase):  # type: ignore[misc]
    """The passes that plain functions need."""

    def define_pipelines(self) -> list[PassManager]:
        manager = PassManager("jitgrad")
        for step in (TranslateByteCode, FixupArgs, IRProcessing, ReconstructSSA, NopythonTypeInference,
                     PreLowerStripPhis, IRLegalization, AnnotateTypes, NativeLowering, NoPythonBackend):
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
