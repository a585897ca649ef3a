"""A Graph as the text of a Python function, for people and for golden files; `jitgrad.ir.parse` reads it back.

    def loss(a: f32[64, 784], b: f32[784, 10]) -> f32[]:
        c = matmul(a, b)                        # f32[64, 10]  train.py:31
        d = sum(c, axes=(0, 1))                 # f32[]        train.py:32
        return d

One assignment per node, behind it its types and the user's line. Attributes are keywords. A graph in an attribute is a
nested function above its node; its parameters are called like the node's operands where the two correspond. Writes
stand before the return as ``a[...] = d``. Names depend on the structure alone.
"""

from __future__ import annotations

import html
import keyword
import re
from collections.abc import Iterable, Iterator

from jitgrad.dtypes import DType
from jitgrad.errors import describe_location
from jitgrad.ir.graph import Graph, Node, Value, inner_graphs
from jitgrad.ir.types import TensorType

_WIDTH = 100            # a longer signature has one parameter per line
_COMMENT_COLUMN = 60    # comments stand at most this far to the right, when the statement allows


def print_graph(graph: Graph, title: str = "") -> str:
    """The text of `graph`; `title` stands above it as a comment."""
    lines = [f"# {title}"] if title else []
    return "\n".join(lines + _Printer(_op_names(graph)).function(graph, graph.name, {}))


def graph_html(graph: Graph, title: str = "") -> str:
    """The same text for a notebook: names of ops bold, comments grey."""
    return highlight(print_graph(graph, title))


def highlight(text: str) -> str:
    """HTML of printed graphs (and of any Python text this plain)."""
    lines = []
    for line in text.split("\n"):
        code, mark, comment = line.partition("#")
        code = re.sub(r"\b(def|return)\b", r'<span style="color:#a0a">\1</span>', html.escape(code, quote=False))
        code = re.sub(r"\b(\w+)\(", r"<b>\1</b>(", code)
        comment = f'<span style="color:#888">{html.escape(mark + comment, quote=False)}</span>' if mark else ""
        lines.append(code + comment)
    return '<pre style="line-height:1.3">' + "\n".join(lines) + "</pre>"


class _Printer:
    """The names given so far: every name in a printed program stands for one value, whatever its depth, and none is the
    name of an op that it uses."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.fresh: Iterator[str] = letter_names()

    def name(self) -> str:
        found = next(n for n in self.fresh if n not in self.taken)
        self.taken.add(found)
        return found

    def function(self, graph: Graph, name: str, operands: dict[int, str]) -> list[str]:
        """The lines of `graph` as a function called `name`; `operands` names some of its inputs by position."""
        names = {v: operands.get(i) or self.name() for i, v in enumerate(graph.inputs)}
        body: list[tuple[str, str]] = []            # statement, comment
        for node in graph.nodes:
            body += self.statements(node, names)
        body += [(f"{names[graph.inputs[i]]}[...] = {names[v]}", "written") for i, v in graph.writes]
        body.append((f"return {_values(names[v] for v in graph.outputs)}", ""))
        return _signature(graph, _identifier(name), names) + ["    " + line for line in _aligned(body)]

    def statements(self, node: Node, names: dict[Value, str]) -> list[tuple[str, str]]:
        """Nested functions for its graphs, then the assignment."""
        lines, functions = [], {}
        for attribute, inner in inner_graphs(node):
            functions[attribute] = self.function_name(inner)
            shared = _operand_names(node, inner, names)
            lines += [(line, "") for line in self.function(inner, functions[attribute], shared)]
        names.update((v, self.name()) for v in node.outputs)
        keywords = [f"{k}={functions[k] if k in functions else spell(v)}" for k, v in node.attrs.items()]
        call = f"{node.op.name}({', '.join([names[v] for v in node.inputs] + keywords)})"
        targets = ", ".join(names[v] for v in node.outputs)
        types = ", ".join(str(v.type) for v in node.outputs)
        place = describe_location(node.where)
        return [*lines, (f"{targets} = {call}" if targets else call, f"{types}  {place}" if place else types)]

    def function_name(self, graph: Graph) -> str:
        base = name = _identifier(graph.name)
        count = 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def _op_names(graph: Graph) -> set[str]:
    inside = [_op_names(inner) for node in graph.nodes for _, inner in inner_graphs(node)]
    return {node.op.name for node in graph.nodes}.union(*inside)


def letter_names() -> Iterator[str]:
    """a, b … z, aa, ab …, without Python's keywords."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    prefixes = [""]
    while True:
        names = [prefix + letter for prefix in prefixes for letter in letters]
        yield from (n for n in names if not keyword.iskeyword(n) and n not in ("inf", "nan"))
        prefixes = names


def spell(value: object) -> str:
    """An attribute as Python text that `parse_graph` understands."""
    if isinstance(value, DType):
        return value.short
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    if isinstance(value, tuple):
        if len(value) > 8 and len({spell(v) for v in value}) == 1:
            return f"({spell(value[0])},) * {len(value)}"
        return f"({', '.join(spell(v) for v in value)}{',' if len(value) == 1 else ''})"
    return repr(value)


def _signature(graph: Graph, name: str, names: dict[Value, str]) -> list[str]:
    parameters = [f"{names[v]}: {v.type}" for v in graph.inputs]
    result = _types(v.type for v in graph.outputs)
    line = f"def {name}({', '.join(parameters)}) -> {result}:"
    if len(line) <= _WIDTH:
        return [line]
    return [f"def {name}(", *[f"    {p}," for p in parameters], f") -> {result}:"]


def _operand_names(node: Node, inner: Graph, names: dict[Value, str]) -> dict[int, str]:
    """Names for the inputs of `inner` where they are the operands of its node, one by one."""
    if [v.type for v in inner.inputs] != [v.type for v in node.inputs]:
        return {}
    given: dict[int, str] = {}
    for i, v in enumerate(node.inputs):
        if names[v] not in given.values():
            given[i] = names[v]
    return given


def _aligned(lines: list[tuple[str, str]]) -> list[str]:
    """Statements with their comments in one column."""
    widths = [len(statement) for statement, comment in lines if comment and len(statement) <= _COMMENT_COLUMN]
    column = max(widths, default=0) + 3
    return [f"{statement.ljust(column - 1)} # {comment}" if comment else statement for statement, comment in lines]


def _values(names: Iterable[str]) -> str:
    return ", ".join(names) or "()"


def _types(types: Iterable[TensorType]) -> str:
    found = [str(t) for t in types]
    return found[0] if len(found) == 1 else f"({', '.join(found)})"


def _identifier(name: str) -> str:
    found = re.sub(r"\W", "_", name)
    return found if found.isidentifier() and not keyword.iskeyword(found) else f"graph_{found}"
