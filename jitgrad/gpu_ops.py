"""Ops of eager execution on GPUs: every op, on arrays in device memory, is a plan of one node, made once and kept.

`run` is what `dispatch.install` is given: an op on arrays of one GPU, and numbers in the computer's memory. `rewrite` is
the same for an op whose results replace the contents of operands, `gather` copies an array whose elements lie in
another order, and `create` makes an array out of numbers alone: filled, counted, random. Operands that are transposed or
expanded are taken as they lie: the plan's graph begins with the movement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from jitgrad import movement
from jitgrad.devices import device
from jitgrad.dtypes import DType, from_numpy, get_default_dtype, int64
from jitgrad.errors import CompileError
from jitgrad.gpu_plans import compile_for
from jitgrad.ir.graph import Graph, GraphBuilder, Value, attrs_key
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType
from jitgrad.movement import Chain, dense_base
from jitgrad.runtime.cuda import array as device_memory, dispatch
from jitgrad.runtime.cuda.array import Array, DeviceArray, moved
from jitgrad.runtime.cuda.driver import Gpu, gpu as gpu_number
from jitgrad.single import Question, overlap


def run(op: Op, arrays: Sequence[Array], attrs: dict[str, Any], gpu: Gpu) -> Any:
    """The result of `op`, or a tuple of them."""
    taken = [operand(a, gpu) for a in arrays]
    plan = compile_for(_graph(Question(op, attrs), *_asked(taken, attrs), ()), gpu)
    results = [r if type(r) is DeviceArray else moved(r, gpu.device) for r in plan.run([base for base, _ in taken])]
    return results[0] if op.outputs == 1 else tuple(results)


def rewrite(op: Op, arrays: Sequence[Array], attrs: dict[str, Any], targets: Sequence[Array]) -> bool:
    """Replace the contents of `targets`, which are operands, by the results of `op`. False, and nothing has changed, where
    they are not in one piece or share memory."""
    places = {id(a): k for k, a in enumerate(arrays)}
    written = tuple([places.get(id(t), -1) for t in targets])
    if -1 in written or not all([type(t) is DeviceArray and t.flags.c_contiguous for t in targets]) or _share_memory(arrays):
        return False
    gpu = dispatch.common_gpu(op, arrays)
    taken = [operand(a, gpu) for a in arrays]
    compile_for(_graph(Question(op, attrs), *_asked(taken, attrs), written), gpu).run([base for base, _ in taken])
    return True


def gather(target: DeviceArray, source: DeviceArray) -> bool:
    """Copy `source` into the contiguous array `target` by a kernel; False where its elements lie too oddly."""
    found = _moved_base(source)
    if found is None:
        return False
    base, chain = found
    types = (_type(base), _type(target))
    try:
        plan = compile_for(_copy(types, chain), target.gpu)
    except CompileError:                                    # where nothing can be compiled, the host copies
        return False
    plan.run([base, target])
    return True


def create(make: Callable[..., Any], arguments: tuple[Any, ...], where: device) -> DeviceArray:
    """What ``make(*arguments)`` computes by ops that have no operands but numbers, on the GPU `where`. Its random draws are
    taken from their streams as they would be on the CPU. CompileError, and no draw is taken, where nothing can be
    compiled."""
    graph, draws = _created(make, arguments, repr(arguments), get_default_dtype())
    plan = compile_for(graph, gpu_number(where.index))
    (made,) = plan.run([np.array(number, np.int64) for generator, count in draws for number in generator.advance(count)])
    return made if type(made) is DeviceArray else moved(made, where)


class _Maker(GraphBuilder):
    """Records what `make` does; keys and offsets of random draws are inputs."""

    def __init__(self, name: str):
        super().__init__(name)
        self.draws: list[tuple[Any, int]] = []

    def draw(self, generator: Any, count: int) -> tuple[Value, Value]:
        """See `functional.random.next_offset`."""
        self.draws.append((generator, count))
        number = TensorType(int64, ())
        return self.input(number), self.input(number)


@lru_cache(maxsize=1024)
def _created(make: Callable[..., Any], arguments: tuple[Any, ...], text: str,
             default: DType) -> tuple[Graph, tuple[tuple[Any, int], ...]]:
    """The graph and its draws. `text` tells 0.0, -0.0 and 0 apart; `default`: the default dtype."""
    builder = _Maker(make.__name__)
    with builder:
        made = make(*arguments)
    return builder.build([made]), tuple(builder.draws)


# ---- operands ---------------------------------------------------------------------------------------------------------


def operand(array: Array, gpu: Gpu) -> tuple[Array, Chain]:
    """A dense array, or a number, and the movement that makes `array` of it."""
    if type(array) is DeviceArray:
        found = (array, ()) if array.flags.c_contiguous else _moved_base(array)
        return found or (array.copy(), ())
    if array.size == 0:
        return moved(array, gpu.device), ()
    number = array[(slice(0, 1),) * array.ndim].reshape(())
    return number, () if not array.ndim else (("reshape", (1,) * array.ndim), ("broadcast_to", array.shape))


def _moved_base(array: DeviceArray) -> tuple[DeviceArray, Chain] | None:
    """The dense array of which `array` is a transposed and expanded view; None when it is of none."""
    found = dense_base(array.shape, array.strides)
    if found is None:
        return None
    left = [(n, stride) for n, stride, gone in zip(array.shape, array.strides, found.gone, strict=True) if not gone]
    base = DeviceArray(array.owner, array.gpu, array.address, tuple([left[k][0] for k in found.order]),
                       tuple([left[k][1] for k in found.order]), array.dtype, True)
    return (base, found.chain) if base.flags.c_contiguous else None


def _share_memory(arrays: Sequence[Array]) -> bool:
    """Whether any two of them share device memory."""
    return overlap([(a.address, a.nbytes) for a in arrays if type(a) is DeviceArray])


# ---- graphs -----------------------------------------------------------------------------------------------------------


def _type(array: Array) -> TensorType:
    """What a graph knows of an operand: not where it is."""
    return TensorType(from_numpy(array.dtype), tuple(array.shape))


def _asked(taken: Sequence[tuple[Array, Chain]], attrs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([_type(base) for base, _ in taken]), tuple([chain for _, chain in taken]), attrs_key(attrs)


@lru_cache(maxsize=4096)
def _graph(question: Question, types: tuple[TensorType, ...], chains: tuple[Chain, ...], key: Any,
           written: tuple[int, ...]) -> Graph:
    return question.graph(types, chains, written)


@lru_cache(maxsize=1024)
def _copy(types: tuple[TensorType, TensorType], chain: Chain) -> Graph:
    builder = GraphBuilder("copy")
    source, _ = [builder.input(t) for t in types]
    with builder:
        return builder.build([], [(1, movement.moved(source, chain))])


dispatch.install(run)
device_memory.install_gather(gather)
