"""Runs kernel text on arrays, natively or as plain Python, and gives back the error word."""

import numpy as np
from launching import address

from jitgrad.codegen.plain import run_plain
from jitgrad.runtime import native


def run_natively(source, name, args, begin, end):
    """Items begin … end with `args` (arrays and ints); the error word as (code, item, value), or None."""
    context = np.zeros(8, np.int64)
    addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in args]
    block = np.array([context.ctypes.data, *addresses], np.int64)
    native.function(address(source))(block.ctypes.data, begin, end, 0)
    return tuple(context[:3]) if context[0] else None


def run_as_python(source, name, args, begin, end):
    """The same, without a compiler; every access is checked."""
    return run_plain(source, name, args, begin, end)
