"""GPU kernel text -> PTX. Needs neither a GPU nor NVIDIA's packages: the front end is that of the CPU
(`kernels.cpu.frontend`), and LLVM writes the PTX.

In goes the text of one function whose annotations say what its parameters are and how many threads a block has:

    def fused_exp_f32(p0: pointer[f32], p1: pointer[f32], n_j: i32) -> block[256]:

Out comes the text of a PTX module with an entry of that name. Pointers are to global memory and disjoint from each other.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from jitgrad.codegen.cuda_direct import lower_directly
from jitgrad.codegen.cuda_unroll import UNROLLED
from jitgrad.codegen.native import explain
from jitgrad.errors import CompileError, complain
from jitgrad.kernels.cpu import native, picking
from jitgrad.kernels.cpu.frontend import lower_function
from jitgrad.kernels.cpu.intrinsics import STORAGE
from jitgrad.kernels.cuda import helpers, math, vocabulary

TRIPLE = "nvptx64-nvidia-cuda"

MAP: types.Type = types.CPointer(types.uint16)  # type: ignore[no-untyped-call]
"""What Numba takes a parameter ``box_map`` for: 128 bytes that come with the launch, at an address of their own. No text can
name such a pointer."""

NEAR = {"div.rn.f32": "div.full.f32", "rcp.rn.f32": "rcp.approx.f32", "sqrt.rn.f32": "sqrt.approx.f32"}
"""Instructions that the assembler carries out by calls, and less accurate ones of the same meaning that need none."""


@dataclass(frozen=True)
class Header:
    """The first line of kernel text. `parameters`: for each one Numba's type; `threads`: of a block."""

    name: str
    parameters: tuple[types.Type, ...]
    threads: int


def compile_ptx(source: str, arch: str = "sm_80") -> str:
    """The PTX of the kernel in `source` for `arch` (sm_80 and newer). CompileError, naming the kernel, when it cannot be
    compiled."""
    try:
        tree = ast.parse(source)
        header = read_header(tree)
    except (SyntaxError, AttributeError, KeyError, ValueError) as error:
        raise complain(CompileError, "kernel", f"the text is no GPU kernel: {error}") from None
    with global_compiler_lock:
        try:
            module = _lower(tree, header, arch)
        except Exception as error:
            raise explain(error, header.name, source) from None
        _optimize(module, arch)
        return without_calls(str(_machine(arch).emit_assembly(module)))


def without_calls(ptx: str) -> str:
    """Where warpgroups multiply, no instruction that is carried out by a call, for the assembler would make every product
    wait for the one before (its message C7509). Quotients in float32 are then within 2 units of the last place and roots
    within 1 instead of 1/2 (PTX ISA, "div", "rcp", "sqrt"); the factors of such a product have 16 bits."""
    if "wgmma." not in ptx:
        return ptx
    for exact, near in NEAR.items():
        ptx = ptx.replace(exact, near)
    return ptx


def read_header(tree: ast.Module) -> Header:
    """What the annotations of the one function say."""
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    threads: Any = function.returns
    return Header(function.name, tuple([_type_of(a.annotation) for a in function.args.args]), int(threads.slice.value))


def _type_of(annotation: Any) -> types.Type:
    if not isinstance(annotation, ast.Subscript) and annotation.id == "box_map":
        return MAP
    is_pointer = isinstance(annotation, ast.Subscript)
    element: Any = STORAGE[vocabulary.NAMES[(annotation.slice if is_pointer else annotation).id]]
    return types.CPointer(element) if is_pointer else element  # type: ignore[no-untyped-call]


@cache
def names_of_text() -> dict[str, Any]:
    """Every name that kernel text may use."""
    return {**math.NAMES, **vocabulary.NAMES, **helpers.NAMES}


def _lower(tree: ast.Module, header: Header, arch: str) -> llvm.ModuleRef:
    """The LLVM module, unoptimized, with the kernel's name as its only visible symbol."""
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    body = f"{header.name}_body"
    module: llvm.ModuleRef
    if ast.get_docstring(function) == UNROLLED:
        module = lower_directly(function, body, header.parameters)
    else:
        module = lower_function(function, header.parameters, names_of_text(), body)
    module.triple, module.data_layout = TRIPLE, str(_machine(arch).target_data)
    pieces = native.scale_text(instruction=False) + picking.declarations([], instruction=False)
    module.link_in(llvm.parse_assembly(_entry(header, body) + pieces))
    for item in [*module.functions, *module.global_variables]:
        if not item.is_declaration and item.name != header.name:
            item.linkage = "internal"
    for item in module.functions:
        if not item.is_declaration:
            item.add_function_attribute("convergent")       # it may have barriers and shuffles; LLVM finds out which do not
    return module


def _entry(header: Header, function: str) -> str:
    """The kernel: a call of `function`."""
    sizes: dict[types.Type, str] = {types.int32: "i32", types.int64: "i64"}
    kinds = [sizes.get(t, "ptr") for t in header.parameters]
    said = {MAP: ' byval([128 x i8]) align 64 "nvvm.grid_constant"'}
    parameters = ", ".join(f"{k}{said.get(t, ' noalias') if k == 'ptr' else ''} %a{n}"
                           for n, (k, t) in enumerate(zip(kinds, header.parameters, strict=True)))
    arguments = ", ".join([f"{k} %a{n}" for n, k in enumerate(kinds)])
    return f"""
declare void @"{function}"({", ".join(kinds)})
define ptx_kernel void @{header.name}({parameters}) "nvvm.maxntid"="{header.threads}" {{
  call void @"{function}"({arguments}) alwaysinline
  ret void
}}
"""


@cache
def _machine(arch: str) -> llvm.TargetMachine:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=arch, opt=3)


def _optimize(module: llvm.ModuleRef, arch: str) -> None:
    builder = llvm.create_pass_builder(_machine(arch), llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
