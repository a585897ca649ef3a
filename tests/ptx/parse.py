"""PTX text -> kernels as lists of instructions.

In goes a module as NVIDIA's compilers write it, inline assembly included; out comes a `Module` with its kernels, each with
parameters, registers, shared and local variables, instructions and the positions of labels. Calls of functions of the
same module are replaced by their bodies, so the machine knows no calls. Nothing is checked here that the assembler checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ptx.errors import Unsupported
from ptx.values import size_of, unsigned


@dataclass(frozen=True, slots=True)
class Instruction:
    """``@!%p1 add.rn.f32 %f1, %f2, %f3`` is a guard (``%p1``, True), an opcode in parts, and operands."""

    guard: tuple[str, bool] | None
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    line: int
    text: str


@dataclass(slots=True)
class Variable:
    """A variable of the module or a function: its place in its space is given out when it is loaded."""

    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None


@dataclass(slots=True)
class Kernel:
    """One entry. `registers` and `parameters` map names to types; `labels` maps names to positions in `code`. Its
    blocks have at most `max_threads` threads."""

    name: str
    parameters: dict[str, str]
    max_threads: int = 1024
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Module:
    kernels: dict[str, Kernel]
    variables: dict[str, Variable]


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    entry: bool
    results: tuple[str, ...]
    parameters: dict[str, str]
    directives: str
    body: str
    line: int


def parse(text: str) -> Module:
    """The kernels and variables of a module."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    functions, rest = _functions(text)
    variables = {v.name: v for statement in rest.split(";") for v in _variables(statement)}
    kernels = {f.name: _Builder(functions).build(f) for f in functions.values() if f.entry}
    return Module(kernels, variables)


def split_operands(text: str) -> list[str]:
    """A list at its commas, but not those within braces, brackets or parentheses."""
    found, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*found, last] if last else found


_HEAD = re.compile(r"\.(entry|func)\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])")


def _functions(text: str) -> tuple[dict[str, _Function], str]:
    """The functions that have a body, and what is left of the text."""
    found: dict[str, _Function] = {}
    rest, position = [], 0
    while head := _HEAD.search(text, position):
        rest.append(text[position:head.start()])
        position = head.end()
        if head.group(6) == "{":
            position = _closing(text, head.end())
            results = tuple(_parameters(head.group(2) or ""))
            found[head.group(3)] = _Function(head.group(3), head.group(1) == "entry", results,
                                             _parameters(head.group(4) or ""), head.group(5),
                                             text[head.end():position - 1], text[:head.end()].count("\n") + 1)
    rest.append(text[position:])
    return found, re.sub(r"\.(visible|extern|weak|common)\s+", "", " ".join(rest))


def _closing(text: str, position: int) -> int:
    """Behind the brace that closes the one before `position`."""
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
    return position


def _parameters(text: str) -> dict[str, str]:
    found = {}
    for part in split_operands(text):
        match = re.search(r"\.(\w+)\s+(?:\.ptr\b[^%\w]*(?:\.\w+\s+)*(?:\d+\s+)?)?([\w$]+)(?:\[\d+\])?$", part)
        assert match, part
        kind = re.findall(r"\.([a-z]+\d+)\b", part)[0]
        found[match.group(2)] = "map" if part.endswith("[128]") else kind
    return found


_VARIABLE = re.compile(r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)"
                       r"\s*(?:=\s*(.*))?$", re.S)


def _variables(statement: str) -> Iterator[Variable]:
    match = _VARIABLE.search(statement.strip())
    if not match:
        return
    space, align, kind, name, dimensions, data = match.groups()
    element = size_of(kind)
    count = int(np.prod([int(n or 0) for n in re.findall(r"\[(\d*)\]", dimensions)] or [1]))
    content = None
    if space in ("global", "const"):
        numbers = [int(n, 0) for n in re.findall(r"-?\b(?:0x[0-9a-fA-F]+|\d+)\b", data or "")]
        mask = (1 << 8 * element) - 1
        filled = np.zeros(count, unsigned(element))
        filled[:len(numbers)] = [n & mask for n in numbers]
        content = filled.tobytes()
    yield Variable(name, space, int(align or element), element * count, content)


class _Builder:
    """Flattens the body of a kernel, and of the functions that it calls, into one list."""

    def __init__(self, functions: dict[str, _Function]):
        self.functions = functions
        self.copies = 0

    def build(self, function: _Function) -> Kernel:
        sizes = re.search(r"\.maxntid\s+([\d\s,]+)", function.directives)
        limit = int(np.prod([int(n) for n in sizes.group(1).split(",")])) if sizes else 1024
        self.kernel = Kernel(function.name, function.parameters, limit)
        self.insert(function, {}, "", None)
        return self.kernel

    def insert(self, function: _Function, names: dict[str, str], suffix: str, end: str | None) -> None:
        """Append the body. `names` are replaced, own names get `suffix`, ``ret`` becomes a jump to `end`."""
        scopes: list[dict[str, str]] = [names]
        for text, line in _statements(function.body, function.line):
            if text == "{":
                scopes.append({})
            elif text == "}":
                scopes.pop()
            elif text.endswith(":"):
                label = self.rename(text[:-1], scopes) + suffix
                self.kernel.labels[label] = len(self.kernel.code)
            elif text.startswith(".reg"):
                self.declare(text, scopes, suffix)
            elif text.startswith("."):
                self.variable(text, scopes, suffix)
            else:
                self.instruction(text, line, scopes, suffix, end)

    def rename(self, text: str, scopes: list[dict[str, str]]) -> str:
        for scope in reversed(scopes):
            if text in scope:
                return scope[text]
        return text

    def declare(self, text: str, scopes: list[dict[str, str]], suffix: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S)
        assert match, text
        kind = match.group(1)
        for item in split_operands(match.group(2)):
            many = re.match(r"(%?[\w$]+)<(\d+)>", item)
            for name in [f"{many.group(1)}{k}" for k in range(int(many.group(2)))] if many else [item]:
                own = name + suffix
                while own in self.kernel.registers:
                    own += "'"
                scopes[-1][name] = own
                self.kernel.registers[own] = kind

    def variable(self, text: str, scopes: list[dict[str, str]], suffix: str) -> None:
        """A shared or local variable, or a ``.param`` for a call, which is no more than a name."""
        parameter = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)", text)
        if parameter:
            self.copies += 1
            scopes[-1][parameter.group(1)] = f"{parameter.group(1)}#{self.copies}"
        for variable in _variables(text):
            scopes[-1][variable.name] = variable.name = variable.name + suffix
            self.kernel.variables[variable.name] = variable

    def instruction(self, text: str, line: int, scopes: list[dict[str, str]], suffix: str, end: str | None) -> None:
        text = " ".join(text.split())
        match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", text)
        assert match, text
        guard = (self.rename(match.group(2), scopes), match.group(1) == "!") if match.group(2) else None
        opcode = tuple(match.group(3).replace("::", "_").split("."))
        if opcode[0] == "call":
            self.call(match.group(4), guard, text, scopes)
            return
        if opcode[0] == "ret" and end:
            opcode, operands = ("bra", "uni"), (end,)
        elif opcode[0] == "bra":
            operands = (self.rename(match.group(4), scopes) + suffix,)
        else:
            renamed = re.sub(r"[%$A-Za-z_][\w$]*", lambda m: self.rename(m.group(), scopes), match.group(4))
            operands = tuple(split_operands(renamed))
        self.kernel.code.append(Instruction(guard, opcode, operands, line, text))

    def call(self, operands: str, guard: tuple[str, bool] | None, text: str, scopes: list[dict[str, str]]) -> None:
        parts = split_operands(operands)
        results = split_operands(parts.pop(0).strip("()")) if parts[0].startswith("(") else []
        function = self.functions.get(parts[0])
        if function is None or guard:
            raise Unsupported(f"{text}: only functions of the same module can be called, without a condition")
        given = split_operands(parts[1].strip("()")) if len(parts) > 1 else []
        names = {inner: self.rename(outer, scopes)
                 for inner, outer in [*zip(function.parameters, given), *zip(function.results, results)]}
        self.copies += 1
        end = f"end of call {self.copies}"
        self.insert(function, names, f"~{self.copies}", end)
        self.kernel.labels[end] = len(self.kernel.code)


def _statements(body: str, line: int) -> Iterator[tuple[str, int]]:
    """Statements without their semicolons, labels with their colons, and the braces of scopes; each with its line."""
    start, position, depth = 0, 0, 0
    while position < len(body):
        character = body[position]
        current = body[start:position].strip()
        if character in "{}" and depth == 0 and not current:
            yield character, line + body[:position].count("\n")
            start = position + 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        elif character == ";":
            if current:
                yield current, line + body[:start + len(body[start:]) - len(body[start:].lstrip())].count("\n")
            start = position + 1
        elif character == ":" and body[position + 1:position + 2] != ":" and re.fullmatch(r"[\w$%]+", current):
            yield current + ":", line
            start = position + 1
        position += 1


def is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text))


def number_bits(text: str, kind: str) -> int:
    """The bits of a literal, cut to the width of a type."""
    if text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        if kind == "f64":
            return int(np.uint32(bits).view(np.float32).astype(np.float64).view(np.uint64))
        return bits
    if text[:2] in ("0d", "0D"):
        return int(text[2:], 16)
    if kind == "pred":
        return int(text, 0) & 1
    return int(text.rstrip("U"), 0) & ((1 << 8 * size_of(kind)) - 1)


