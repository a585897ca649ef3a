"""Kernel text -> object code. The only module that needs Numba; imported when a kernel is in no cache.

In goes the text of one Python function ``(args, begin, end, thread)`` in the dialect of `jitgrad.kernels.cpu`; out
comes an ELF object whose symbol `kernel` is ``void kernel(int64 *args, int64 begin, int64 end, int64 thread)``.

The front end (`kernels.cpu.frontend`) turns text into LLVM IR by Numba's types and operators, without Numba's passes. LLVM
optimizes once, for the exact processor of this machine or for a named level, and with full-width vectors.
"""

from __future__ import annotations

import ast
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from jitgrad import config, objectfile, processors
from jitgrad.errors import CompileError, complain
from jitgrad.kernels.cpu import (
    intrinsics,
    math,
    native,
    picking,
    tile,
    tile_dot,
    tile_dot_text,
    tile_lines,
    tile_maxima_native,
    tile_native,
    tile_text,
    tile_window_native,
    tile_window_text,
)
from jitgrad.kernels.cpu.frontend import lower_function
from jitgrad.processors import Processor

# Importing these is what teaches Numba the names of math and tile.
TEACHERS = (native, tile_native, tile_window_native, tile_maxima_native)
ARGUMENTS = (types.CPointer(types.int64), types.int64, types.int64, types.int64)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Target:
    """A processor: LLVM's triple, its name for the model, and a feature list such as ``+avx2,-prefer-256-bit``."""

    triple: str
    cpu: str
    features: str


def host_target() -> Target:
    """Exactly this machine, or the processor that the settings name instead of it."""
    return _target(config.processor())


def named_target(name: str) -> Target:
    """One of `processors.NAMED`."""
    if name not in processors.NAMED:
        raise complain(CompileError, "target", f"{name!r} is not one of {', '.join(processors.NAMED)}")
    return _target(processors.find(name))


def _target(processor: Processor) -> Target:
    return Target(processor.triple, processor.model, processor.options)


def compile_source(source: str, name: str, target: Target | None = None) -> bytes:
    """Object code of the one function in `source`. CompileError, naming the kernel, when it cannot be compiled."""
    target = target or _host()
    with global_compiler_lock:
        try:
            module = _lower(_define(source, name), target)
        except CompileError:
            raise
        except Exception as error:
            raise explain(error, name, source) from None
        data = _emit(module, target)
    try:
        objectfile.check(data, target.triple.split("-")[0])
    except objectfile.ObjectError as error:
        raise complain(CompileError, name, f"the compiled kernel cannot be used: {error}") from None
    return data


def compile_sources(sources: Iterable[tuple[str, str]], target: Target | None = None) -> list[bytes]:
    """`compile_source` for each ``(source, name)``."""
    return [compile_source(source, name, target) for source, name in sources]


def assembly(source: str, name: str, target: Target | None = None) -> str:
    """The assembly text of a kernel: for looking at it, and for tests that ask for vector instructions."""
    target = target or _host()
    with global_compiler_lock:
        module = _lower(_define(source, name), target)
        _optimize(module, target)
        return str(_machine(target).emit_assembly(module))


# Text -> LLVM module

def _define(source: str, name: str) -> ast.FunctionDef:
    """The function that `source` defines."""
    try:
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise complain(CompileError, name, f"kernel text is not Python: {error}") from None
    if len(functions) != 1:
        raise complain(CompileError, name, f"kernel text must define one function, it defines {len(functions)}")
    return functions[0]


@cache
def vocabulary() -> dict[str, Any]:
    """Every name that kernel text may use: scalar math, the pieces of contractions, and the intrinsics."""
    return {**math.NAMES, **tile.NAMES, **tile_dot.NAMES, **tile_lines.NAMES, **intrinsics.NAMES}


def _lower(function: ast.FunctionDef, target: Target) -> llvm.ModuleRef:
    """The LLVM module of `function`, unoptimized, with `kernel` as its only visible symbol."""
    module = lower_function(function, ARGUMENTS, vocabulary(), objectfile.SYMBOL)
    module.triple = target.triple
    module.data_layout = str(_machine(target).target_data)
    wide = "+avx512f" in target.features.split(",")
    pieces = _RELAX[target.triple.split("-")[0]] + native.scale_text(wide)
    pieces += picking.declarations([function.name for function in module.functions], wide)
    module.link_in(llvm.parse_assembly(pieces))
    for item in [*module.functions, *module.global_variables]:
        if not item.is_declaration and item.name not in (objectfile.SYMBOL, picking.KEPT):
            item.linkage = "internal"
    return module


# The processor's hint for waiting loops.
_RELAX = {
    "x86_64": """
declare void @llvm.x86.sse2.pause()
define void @jitgrad_relax() alwaysinline { call void @llvm.x86.sse2.pause() ret void }
""",
    "aarch64": """
declare void @llvm.aarch64.hint(i32)
define void @jitgrad_relax() alwaysinline { call void @llvm.aarch64.hint(i32 1) ret void }
""",
}


# LLVM module -> object code

@cache
def _host() -> Target:
    return host_target()


@cache
def _machine(target: Target) -> llvm.TargetMachine:
    if target.triple.startswith(platform.machine()):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        llvm.initialize_native_asmparser()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    found = llvm.Target.from_triple(target.triple)
    return found.create_target_machine(cpu=target.cpu, features=target.features, opt=3, reloc="pic",
                                       codemodel="default")


def _optimize(module: llvm.ModuleRef, target: Target) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = llvm.create_pass_builder(_machine(target), options)
    builder.getModulePassManager().run(module, builder)
    picking.settle(module, builder)
    _link_text(module)


def _link_text(module: llvm.ModuleRef) -> None:
    """Functions that are written as LLVM text; there is nothing to optimize in them."""
    wanted = {function.name for function in module.functions if function.is_declaration}
    for pieces in (tile_text, tile_dot_text, tile_lines, tile_window_text):
        text = pieces.definitions(sorted(wanted))
        if text:
            module.link_in(llvm.parse_assembly(text))
    for function in module.functions:
        if function.name in wanted and not function.is_declaration:
            function.linkage = "internal"


def _emit(module: llvm.ModuleRef, target: Target) -> bytes:
    _optimize(module, target)
    return bytes(_machine(target).emit_object(module))


def explain(error: Exception, name: str, source: str) -> CompileError:
    """A CompileError with the gist of the message; the whole of it and the text go into notes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Failed in", "File ", "def ", "-", "^"))]
    gist = telling[0] if telling else type(error).__name__
    problem = complain(CompileError, name, f"the kernel cannot be compiled: {gist}")
    problem.add_note("\n".join(lines))
    problem.add_note(source)
    assert isinstance(problem, CompileError)
    return problem
