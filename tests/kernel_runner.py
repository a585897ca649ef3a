"""Runs kernel text on arrays, natively or as plain Python, for tests."""

from functools import cache

import numpy as np

from jitgrad.codegen.native import compile_source
from jitgrad.codegen.plain import run_plain
from jitgrad.runtime import native


@cache
def compiled(source, name):
    return native.function(native.load(compile_source(source, name), name))


def run_natively(source, name, args, begin, end):
    """Items begin … end with `args` (arrays and ints); the error word as (code, item, value), or None."""
    context = np.zeros(8, np.int64)
    addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in args]
    block = np.array([context.ctypes.data, *addresses], np.int64)
    compiled(source, name)(block.ctypes.data, begin, end, 0)
    return tuple(context[:3]) if context[0] else None


def run_as_python(source, name, args, begin, end):
    """The same, without a compiler; every access is checked."""
    return run_plain(source, name, args, begin, end)
