"""Finding the syntax tree of a function that runs, and making sure that it is the one that runs."""

from __future__ import annotations

import ast
import builtins
import linecache
import types
from typing import Any

_parsed: dict[tuple[str, int], dict[tuple[int, str], list[tuple[Any, types.CodeType]]]] = {}


def function_syntax(function: types.FunctionType) -> tuple[Any, str]:
    """The syntax tree of a function and its file, or (None, file) when the source is not at hand, or is not that of
    the code that runs."""
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    key = code.co_filename, hash(tuple(lines))
    if key not in _parsed:
        _parsed[key] = _index_file("".join(lines), code.co_filename)
    candidates = _parsed[key].get((code.co_firstlineno, code.co_name), [])
    matching = [node for node, compiled in candidates if compiled.co_code == code.co_code
                and compiled.co_names == code.co_names and list(compiled.co_positions()) == list(code.co_positions())]
    return (matching[0] if len(matching) == 1 else None), code.co_filename


def _index_file(text: str, file: str) -> dict[tuple[int, str], list[tuple[Any, types.CodeType]]]:
    try:
        tree = ast.parse(text)
        top = builtins.compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    codes: dict[tuple[int, str], list[types.CodeType]] = {}
    stack = [top]
    while stack:
        code = stack.pop()
        codes.setdefault((code.co_firstlineno, code.co_name), []).append(code)
        stack.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    nodes: dict[tuple[int, str], list[Any]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            first = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
            nodes.setdefault((first, getattr(node, "name", "<lambda>")), []).append(node)
    return {place: [(_written_as(code, beside), code) for code in codes.get(place, [])] for place, beside in nodes.items()}


def _written_as(code: types.CodeType, beside: list[Any]) -> Any:
    """Which of the nodes that begin on one line, of one name, `code` was made from: where there are several, the shortest
    lambda whose body holds all of its instructions; None without column numbers (``-X no_debug_ranges``)."""
    if len(beside) == 1:
        return beside[0]
    places = [((first, column), (last, end)) for first, last, column, end in code.co_positions() if end]
    bodies = {node: ((node.body.lineno, node.body.col_offset), (node.body.end_lineno, node.body.end_col_offset))
              for node in beside if isinstance(node, ast.Lambda)}
    around = [node for node, (begin, finish) in bodies.items()
              if all(begin <= first and last <= finish for first, last in places)]
    return max(around, key=lambda node: bodies[node][0]) if places and around else None
