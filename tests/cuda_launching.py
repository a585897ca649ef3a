"""Carries out what lowering for a GPU made, on the PTX interpreter. For tests of kernels."""

from functools import cache

import numpy as np
from ptx import parse
from ptx.boxes import encode
from ptx.machine import launch as launch_module
from ptx.memory import Memory

from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.codegen.kernel import BoxMap, Buffer, ErrorWord, Table


@cache
def module_of(source, arch="sm_80"):
    return parse(compile_ptx(source, arch))


def lower_node(node, shared=(), aligned=True, arch="sm_80"):
    return lower_cuda(node.op, tuple([v.type for v in node.inputs]), node.attrs, shared, aligned, arch=arch)


def run(lowered, inputs, types, *, shared=(), schedule="together", skew=0, failure=(0, 0, 0),
        arch="sm_80"):
    """The outputs of `lowered` for arrays `inputs`. Outputs and scratch start as garbage; outputs that share an input's
    memory lie in it. All buffers but scratch begin `skew` elements behind a round address. `failure` is what the error word
    must say."""
    memory, home = Memory(), dict(shared)

    def put(array, name, garbage=False):
        return memory.add(array, name, garbage=garbage, skew=skew * array.dtype.itemsize)

    buffers = [put(np.asarray(x), f"input {k}") for k, x in enumerate(inputs)]
    results = [buffers[home[k]] if k in home else put(np.empty(t.shape, t.dtype.numpy), f"output {k}", True)
               for k, t in enumerate(types)]
    buffers += [*results, *[memory.add(np.empty(n // 8, np.int64), "scratch", garbage=True)
                           for n in map(round_up, lowered.scratch)]]
    word = memory.add(np.zeros(3, np.int64), "error word")
    for entry in lowered.launches:
        arguments = [argument_of(a, buffers, word, memory) for a in entry.arguments]
        launch_module(module_of(entry.source, arch), entry.name, memory, (entry.grid, 1, 1), (entry.threads, 1, 1),
                      arguments, dynamic=entry.dynamic, schedule=schedule, seed=0, wave=16384)
    assert tuple(word.array()) == failure
    return [result.array() for result in results]


def round_up(size):
    return -(-size // 8) * 8


def argument_of(argument, buffers, word, memory):
    if isinstance(argument, Buffer):
        return buffers[argument.index]
    if isinstance(argument, BoxMap):
        return encode(buffers[argument.buffer.index].address + argument.start, argument.sizes, argument.pitch, argument.box)
    if isinstance(argument, Table):
        numbers = [buffers[e.index].address if isinstance(e, Buffer) else e for e in argument.entries]
        return memory.add(np.array(numbers, np.int64), "table")
    return word if isinstance(argument, ErrorWord) else argument


def carry_out(graph, arrays, aligned=True, schedule="together", arch="sm_80"):
    """The results of a fused graph, its regions by their GPU kernels; operands do not begin at round addresses unless they
    are `aligned`. Library ops run as they do eagerly."""
    environment = dict(zip(graph.inputs, arrays, strict=True))
    for node in graph.nodes:
        inputs = [np.asarray(environment[v], v.dtype.numpy).reshape(v.shape) for v in node.inputs]
        if node.op.kind in ("foreach", "region") or node.op.name == "matmul":
            results = run(lower_node(node, (), aligned, arch), inputs, [v.type for v in node.outputs], schedule=schedule,
                          skew=0 if aligned else 1, arch=arch)
        else:
            found = node.op.eager(*inputs, **node.attrs)
            results = found if node.op.kind == "region" else [found]
        environment.update(zip(node.outputs, map(np.asarray, results), strict=True))
    return [environment[v] for v in graph.results]
