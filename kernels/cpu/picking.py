"""`permutes` and `pick` in machine code: numbers out of tables of 16, by AVX-512's instruction that permutes a register.

LLVM's vectorizer would make a gather of a table in memory. So a kernel calls a function that is declared and not defined
until LLVM's passes have run, and that says which functions do the same for vectors: the vectorizer calls those. Their
definitions, one instruction each, are linked and inlined behind the passes. Where the processor has no such instruction
`permutes` is false, and no call of `pick` outlives the passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function

from jitgrad.kernels.cpu.scalar import PIECES

PREFIX = "jitgrad_pick_"
KEPT = "jitgrad_picks"                          # keeps the declarations for vectors while LLVM's passes run
LANES = (4, 8, 16)
PURE = "nounwind willreturn memory(none)"


def define_pick(typing: Any, table: types.Type, row: types.Type, k: types.Type) -> Any:
    """The signature of ``pick(table, row, k)`` for constants `table` and `row`, and what writes its code."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        name = f"{PREFIX}{signature.args[0].literal_value}_{signature.args[1].literal_value}"
        function = get_or_insert_function(builder.module, ir.FunctionType(ir.FloatType(), [ir.IntType(32)]), name)
        vectors = ",".join(f"_ZGV_LLVM_N{n}v_{name}({name}_{n})" for n in LANES)
        set.update(function.attributes, {PURE, f'"vector-function-abi-variant"="{vectors}"'})    # llvmlite knows no such
        return builder.call(function, [context.cast(builder, arguments[2], signature.args[2], types.int32)])

    return types.float32(table, row, types.unliteral(k)), codegen


def emit_permutes(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
    """The code of ``permutes()``."""
    return builder.call(get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(1), []), "jitgrad_permutes"), [])


def declarations(names: Iterable[str], instruction: bool) -> str:
    """What a kernel is linked with before LLVM's passes run; `names` are those of all functions that it calls."""
    text = f"define i1 @jitgrad_permutes() alwaysinline {{ ret i1 {str(instruction).lower()} }}\n"
    vectors = [(f"{name}_{n}", n) for name in sorted(names) if name.startswith(PREFIX) for n in LANES]
    if instruction and vectors:
        text += "".join(f"declare <{n} x float> @{name}(<{n} x i32>) {PURE}\n" for name, n in vectors)
        kept = ", ".join(f"ptr @{name}" for name, _ in vectors)
        text += f"@{KEPT} = global [{len(vectors)} x ptr] [{kept}]\n"
    return text


def settle(module: llvm.ModuleRef, builder: llvm.PassBuilder) -> None:
    """Behind LLVM's passes: define what is called, inline it, and drop the rest."""
    kept = [variable for variable in module.global_variables if variable.name == KEPT]
    if not kept:
        return
    names = {"_".join(f.name.split("_")[:4]) for f in module.functions if f.name.startswith(PREFIX)}
    module.link_in(llvm.parse_assembly(definitions(sorted(names))))
    for item in [*kept, *[f for f in module.functions if f.name.startswith(PREFIX)]]:
        item.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, builder)


def definitions(names: Iterable[str]) -> str:
    """Of the functions with these names, and of theirs for vectors."""
    text = "declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)\n"
    for name in names:
        table, row = map(int, name.removeprefix(PREFIX).split("_"))
        numbers = ", ".join(str(ir.Constant(ir.FloatType(), value)) for value in PIECES[table][row])
        text += _SCALAR.format(name=name, numbers=numbers)
        for n in LANES:
            wide, narrow = [", ".join(f"i32 {k % n}" for k in range(count)) for count in (16, n)]
            text += _VECTOR.format(name=name, numbers=numbers, n=n, wide=wide, narrow=narrow)
    return text


_SCALAR = """
@{name}_row = private constant [16 x float] [{numbers}]
define float @{name}(i32 %k) alwaysinline {{
  %place = and i32 %k, 15
  %p = getelementptr inbounds [16 x float], ptr @{name}_row, i32 0, i32 %place
  %y = load float, ptr %p
  ret float %y
}}
"""

_VECTOR = """
define <{n} x float> @{name}_{n}(<{n} x i32> %k) alwaysinline {{
  %places = shufflevector <{n} x i32> %k, <{n} x i32> poison, <16 x i32> <{wide}>
  %all = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <{numbers}>, <16 x i32> %places)
  %y = shufflevector <16 x float> %all, <16 x float> poison, <{n} x i32> <{narrow}>
  ret <{n} x float> %y
}}
"""
