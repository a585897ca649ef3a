"""Kernel text run as plain Python: what a kernel means, without a compiler.

In go the text of a kernel and its arguments (arrays for pointers, ints); the kernel writes into the arrays. Every
access is checked, floating-point warnings are off as in native code. Tests compare this form with the native one, and
text that a person has edited runs here before it runs natively.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad.errors import CompileError, complain
from jitgrad.kernels.cpu import math, standins, tile, tile_dot, tile_lines

Failure = tuple[int, int, int]


def run_plain(source: str, name: str, args: Sequence[np.ndarray | int], begin: int, end: int,
              thread: int = 0) -> Failure | None:
    """Run work items begin … end of the kernel in `source`; `args` are its arguments from ``args[1]`` on.

    The error word that the kernel set, as (code, item, value), or None. IndexError names kernel, operand and element
    of an access outside of an array."""
    block: Any = standins.Arguments(name, args)
    kernel = define(source, name)
    with np.errstate(all="ignore"):
        kernel(block, begin, end, thread)
    failure: Failure | None = block.error
    return failure


@lru_cache(maxsize=512)
def define(source: str, name: str) -> Callable[..., None]:
    """The function that `source` defines. Debuggers and tracebacks find its text."""
    file = f"<kernel {name}>"
    namespace: dict[str, Any] = {**math.NAMES, **tile.NAMES, **tile_dot.NAMES, **tile_lines.NAMES,
                                 **standins.NAMES}
    known = set(namespace)
    try:
        exec(compile(source, file, "exec"), namespace)
    except SyntaxError as error:
        raise complain(CompileError, name, f"kernel text is not Python: {error}") from None
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    defined = [value for key, value in namespace.items() if key not in known and key != "__builtins__"]
    if len(defined) != 1:
        raise complain(CompileError, name, f"kernel text must define one function, it defines {len(defined)}")
    return defined[0]  # type: ignore[no-any-return]
