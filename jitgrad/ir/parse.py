"""The text of a printed Graph back into the Graph: the inverse of `jitgrad.ir.printer`.

The text is Python but for its types, which are put in quotes; then Python's own parser reads it. Types behind
assignments are not read: they follow from the ops. Lines of the user's program (``# f32[4]  train.py:31``) are.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from jitgrad import dtypes
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value, Where
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import parse_type

_TYPE = re.compile(r"\b[a-z]+\d*\[[\d, ]*\](?:@[\w:]+\b)?")
_WHERE = re.compile(r"#.*\s\s(\S.*):(\d+)$")
_CONSTANTS: dict[str, Any] = {"nan": float("nan"), "inf": float("inf"), **dtypes.BY_SHORT}


def parse_graph(text: str) -> Graph:
    """The graph whose printed form is `text`. ValueError with the line number for anything else."""
    quoted = _quote_types(text)
    try:
        statements = ast.parse(quoted).body
    except SyntaxError as error:
        raise ValueError(f"parse_graph: line {error.lineno}: {error.msg}") from None
    if len(statements) != 1 or not isinstance(statements[0], ast.FunctionDef):
        raise ValueError("parse_graph: the text is not one function")
    return _Parser(text.split("\n")).function(statements[0])


def _quote_types(text: str) -> str:
    """`text` with the types in its signatures as string literals; elsewhere they stand in comments only."""
    lines, inside = [], False
    for line in text.split("\n"):
        inside = inside or line.lstrip().startswith("def ")
        lines.append(_TYPE.sub(lambda match: repr(match[0]), line) if inside else line)
        inside = inside and not line.rstrip().endswith(":")
    return "\n".join(lines)


class _Parser:
    def __init__(self, lines: list[str]):
        self.lines = lines          # comments are in here only

    def function(self, definition: ast.FunctionDef) -> Graph:
        builder = GraphBuilder(definition.name)
        names: dict[str, Any] = {}              # values and nested graphs
        for parameter in definition.args.args:
            names[parameter.arg] = builder.input(parse_type(_literal(parameter.annotation)))
        writes: list[tuple[int, Value]] = []
        for statement in definition.body:
            if isinstance(statement, ast.FunctionDef):
                names[statement.name] = self.function(statement)
            elif isinstance(statement, ast.Return):
                return builder.build([names[n] for n in _names(statement.value)], writes)
            elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Subscript):
                (target,) = _names(statement.targets[0].value)
                (source,) = _names(statement.value)
                writes.append((builder.inputs.index(names[target]), names[source]))
            else:
                self.node(statement, names, builder)
        raise ValueError(f"parse_graph: line {definition.lineno}: {definition.name} does not return")

    def node(self, statement: ast.stmt, names: dict[str, Any], builder: GraphBuilder) -> None:
        """Append the node that an assignment (or a bare call) stands for."""
        call = getattr(statement, "value", None)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in REGISTRY:
            raise ValueError(f"parse_graph: line {statement.lineno}: neither an op nor a write")
        op = REGISTRY[call.func.id]
        try:
            inputs = tuple([names[n] for argument in call.args for n in _names(argument)])
            attrs = {k.arg or "": _attribute(k.value, names) for k in call.keywords}
        except KeyError as error:
            raise ValueError(f"parse_graph: line {statement.lineno}: {error.args[0]} is not assigned") from None
        outputs = tuple([builder.value(t) for t in op.result_types(tuple([v.type for v in inputs]), attrs)])
        targets = _names(statement.targets[0]) if isinstance(statement, ast.Assign) else []
        if len(targets) != len(outputs):
            raise ValueError(f"parse_graph: line {statement.lineno}: {op.name} has {len(outputs)} outputs")
        names.update(zip(targets, outputs))
        builder.nodes.append(Node(op, inputs, attrs, outputs, self.where(statement)))

    def where(self, statement: ast.stmt) -> Where:
        match = _WHERE.search(self.lines[(statement.end_lineno or statement.lineno) - 1].rstrip())
        return (match[1], int(match[2])) if match else None


def _names(expression: ast.expr | None) -> list[str]:
    """``a`` or ``a, b`` as a list of names."""
    elements = expression.elts if isinstance(expression, ast.Tuple) else [expression]
    return [element.id for element in elements if isinstance(element, ast.Name)]


def _literal(expression: ast.expr | None) -> str:
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        return expression.value
    raise ValueError("parse_graph: a parameter has no type")


def _attribute(expression: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a keyword: what `printer.spell` writes, or the name of a nested function."""
    match expression:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=elements):
            return tuple([_attribute(e, names) for e in elements])
        case ast.Name(id=name):
            return _CONSTANTS[name] if name in _CONSTANTS else names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_attribute(operand, names)
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            return _attribute(left, names) * _attribute(right, names)
        case ast.Call(func=ast.Name(id="complex"), args=[real, imaginary]):
            return complex(_attribute(real, names), _attribute(imaginary, names))
    raise ValueError(f"parse_graph: line {expression.lineno}: not the value of an attribute")
