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
                and compiled.co_names == code.co_names]
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
    found: dict[tuple[int, str], list[tuple[Any, types.CodeType]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            first = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
            place = first, getattr(node, "name", "<lambda>")
            if len(codes.get(place, [])) == 1:        # two lambdas on one line cannot be told apart
                found.setdefault(place, []).append((node, codes[place][0]))
    return found
