"""Kernel -> text of one Python function in the dialect of `jitgrad.kernels.cpu`: ordinary loops over scalars.

The same text runs natively (through Numba) and as plain Python. Every computed value is cast to its type, since Numba
would compute ``int32 + int32`` in int64. Comments say where in the user's program a statement comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jitgrad.codegen.kernel import Accumulate, Kernel, Let, Load, Loop, Statement, Store, When
from jitgrad.dtypes import DType
from jitgrad.errors import describe_location


def emit(kernel: Kernel) -> str:
    """The text of `kernel`."""
    lines = [f"def {kernel.name}(args, begin, end, thread):"]
    for k, operand in enumerate(kernel.operands, 1):
        lines.append(commented(f"    {operand.name} = pointer(args, {k}, {dtype_name(operand.dtype)})", operand.type))
    for k, size in enumerate(kernel.sizes, 1 + len(kernel.operands)):
        lines.append(f"    {size} = args[{k}]")
    numbers = {operand.name: k for k, operand in enumerate((*kernel.operands, *kernel.tables))}
    lines.extend(Spelling(numbers).block(kernel.body, "    "))
    return "\n".join(lines) + "\n"


def dtype_name(dtype: DType) -> str:
    """The name of a dtype (and of its cast) in kernel text."""
    return "boolean" if dtype.category == "b" else dtype.short


def commented(line: str, comment: str) -> str:
    return f"{line:<60}  # {comment}" if comment else line


class Spelling:
    """Statements as lines. `numbers`: the position of every operand among all of them."""

    def __init__(self, numbers: dict[str, int]):
        self.numbers = numbers

    def block(self, body: Iterable[Statement], indent: str) -> Iterator[str]:
        for statement in body:
            if isinstance(statement, Loop | When):
                yield indent + self.head(statement)
                yield from self.block(statement.body, indent + "    ")
            else:
                yield indent + self.line(statement)

    def head(self, statement: Loop | When) -> str:
        if isinstance(statement, When):
            return f"if {statement.condition}:"
        start = "" if statement.start == "0" else f"{statement.start}, "
        return f"for {statement.index} in range({start}{statement.stop}):"

    def line(self, statement: Let | Load | Store | Accumulate) -> str:
        if isinstance(statement, Let):
            return self.let(statement)
        if isinstance(statement, Load):
            return f"{statement.name} = load({statement.operand}, {statement.index}, {self.tag(statement.operand)})"
        if isinstance(statement, Store):
            place = f"{statement.operand}, {statement.index}, {statement.value}"
            return f"store({place}, {self.tag(statement.operand)})"
        return f"{statement.name} = reassociate_{statement.how}({statement.name}, {statement.value})"

    def let(self, statement: Let) -> str:
        if statement.dtype is None:
            line = statement.value if statement.name == "_" else f"{statement.name} = {statement.value}"
        else:
            line = f"{statement.name} = {dtype_name(statement.dtype)}({statement.value})"
        comment = "  ".join(filter(None, (statement.note, describe_location(statement.where))))
        return commented(line, comment)

    def tag(self, operand: str) -> str:
        return f"{self.numbers[operand]}, {len(self.numbers)}"
