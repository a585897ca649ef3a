"""Kernel -> text of one Python function in the dialect of `jitgrad.kernels.cuda`: what one thread does.

Parameters are plain: pointers, then sizes; annotations give their types and the number of threads of a block. Values are
spelled as on the CPU. Index arithmetic is cast step by step to the type of an index, int32 as a rule, since Numba would
compute it in int64, which takes a GPU twice as many instructions; no index is negative, so division is unsigned.
"""

from __future__ import annotations

import ast
from functools import lru_cache

from jitgrad.codegen.emit_cpu import Spelling, commented, dtype_name
from jitgrad.codegen.kernel import Accumulate, Kernel, Let, Load, Loop, Statement, Store, When


def emit_cuda(kernel: Kernel, threads: int, wide: bool = False) -> str:
    """The text of `kernel` for blocks of `threads` threads; `wide`: with indices in int64."""
    numbers = {operand.name: k for k, operand in enumerate((*kernel.operands, *kernel.tables))}
    kind = "i64" if wide else "i32"
    parameters = ["args: pointer[i64]"] if may_fail(kernel.body) else []
    parameters += [f"{operand.name}: {'box_map' if operand.is_map else f'pointer[{dtype_name(operand.dtype)}]'}"
                   for operand in kernel.operands]
    parameters += [f"{size}: {kind}" for size in kernel.sizes]
    lines = [f"def {kernel.name}({', '.join(parameters)}) -> block[{threads}]:"]
    lines += [commented(f"    # {operand.name}", operand.type) for operand in kernel.operands if operand.type]
    lines.extend(CudaSpelling(numbers, kind).block(kernel.body, "    "))
    return "\n".join(lines) + "\n"


def may_fail(body: list[Statement]) -> bool:
    """True when some statement sets the error word."""
    return any((isinstance(s, Let) and s.value.startswith("fail(")) or (isinstance(s, Loop | When) and may_fail(s.body))
               for s in body)


class CudaSpelling(Spelling):
    """Statements as lines. `kind`: the type of an index."""

    def __init__(self, numbers: dict[str, int], kind: str):
        super().__init__(numbers)
        self.kind = kind

    def head(self, statement: Loop | When) -> str:
        if isinstance(statement, When):
            return f"if {statement.condition}:"
        return f"for {statement.index} in range({self.index(statement.start)}, {self.index(statement.stop)}):"

    def line(self, statement: Let | Load | Store | Accumulate) -> str:
        if isinstance(statement, Load):
            place = f"{statement.operand}, {self.index(statement.index)}"
            if statement.lanes > 1:
                return f"{statement.name} = load_lanes({place}, {statement.lanes}, {self.tag(statement.operand)})"
            return f"{statement.name} = load({place}, {self.tag(statement.operand)})"
        if isinstance(statement, Store):
            place = f"{statement.operand}, {self.index(statement.index)}"
            if statement.lanes > 1:
                return f"store_lanes({place}, ({statement.value}), {self.tag(statement.operand)})"
            return f"store({place}, {statement.value}, {self.tag(statement.operand)})"
        return super().line(statement)

    def let(self, statement: Let) -> str:
        if statement.dtype is None and statement.name != "_":
            return f"{statement.name} = {self.index(statement.value)}"
        return super().let(statement)

    def index(self, text: str) -> str:
        return index_text(text, self.kind)


@lru_cache(maxsize=4096)
def index_text(text: str, kind: str) -> str:
    """Index arithmetic with every step cast to `kind`."""
    return ast.unparse(_Typed(kind).visit(ast.parse(text, mode="eval")))


class _Typed(ast.NodeTransformer):
    def __init__(self, kind: str):
        self.kind = kind

    def cast(self, node: ast.expr) -> ast.expr:
        return _call(self.kind, node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(node.op, ast.FloorDiv | ast.Mod):
            return _call("quotient" if isinstance(node.op, ast.FloorDiv) else "rest", left, right)
        return self.cast(ast.BinOp(left, node.op, right))

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.cast(node) if type(node.value) is int else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        if node.func.id in ("min", "max"):
            return self.cast(_call(node.func.id, *[self.visit(a) for a in node.args]))
        return self.cast(node) if node.func.id in ("thread", "block") else node


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])
