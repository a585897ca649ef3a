"""Carries out what lowering made, without a plan: natively, or as plain Python. For tests of kernels."""

import math
from functools import cache
from itertools import pairwise

import numpy as np

from jitgrad.codegen.kernel import Buffer, Function, Private
from jitgrad.codegen.native import compile_source
from jitgrad.codegen.plain import define, run_plain
from jitgrad.runtime import native


@cache
def address(source):
    return native.load(compile_source(source, "kernel"), "kernel")


def run(lowered, inputs, types, *, shared=(), plain=False, pieces=1):
    """The outputs of `lowered` for arrays `inputs`. Outputs and scratch start as garbage, and nothing may be written behind
    them; the items of each launch are done in `pieces` calls, the last ones first. Outputs that share an input's memory are
    that array."""
    outputs = [inputs[dict(shared)[k]] if k in dict(shared) else garbage(t.dtype.numpy, t.shape)
               for k, t in enumerate(types)]
    memory = [*inputs, *outputs, *[garbage(np.dtype("u1"), (n,)) for n in lowered.scratch]]
    private = [garbage(np.dtype("u1"), (n,)) for n in lowered.private]
    for launch in lowered.launches:
        bounds = np.linspace(0, launch.items, pieces + 1).astype(int)
        for begin, end in reversed(list(pairwise(bounds))):
            (run_as_python if plain else run_native)(launch, memory, int(begin), int(end), private)
    for array in memory[len(inputs):]:
        assert array.base is None or (array.base[array.nbytes:] == 0xA5).all()
    return outputs


def garbage(dtype, shape, behind=256):
    """An array of garbage, with so many more bytes of it behind."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.full(size + behind, 0xA5, "u1")[:size].view(dtype).reshape(shape)


def run_as_python(launch, memory, begin, end, private=()):
    arguments = [memory[a.index] if isinstance(a, Buffer) else private[a.index] if isinstance(a, Private)
                 else define(a.source, a.name) if isinstance(a, Function) else a for a in launch.arguments]
    assert run_plain(launch.source, launch.name, arguments, begin, end) is None


def run_native(launch, memory, begin, end, private=()):
    context = np.zeros(8, np.int64)
    arguments = [memory[a.index].ctypes.data if isinstance(a, Buffer) else private[a.index].ctypes.data
                 if isinstance(a, Private) else address(a.source) if isinstance(a, Function) else a
                 for a in launch.arguments]
    block = np.array([context.ctypes.data, *arguments], np.int64)
    native.function(address(launch.source))(block.ctypes.data, begin, end, 0)
    assert not context[:4].any()
