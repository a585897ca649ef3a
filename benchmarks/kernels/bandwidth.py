"""Kernels whose time is that of reading and writing memory: normalizations, losses, activations, scans, sorting, indexing,
transposes and the optimizer; forward, and forward with backward, in sizes round and odd.

Bytes are those of operands and results, read or written once, so that what a library keeps between forward and backward
counts against it. Results are new arrays in each call, as users have them; Adam works in place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.kernels.case import Arrays, Call, Case, makers

Shape = tuple[int, ...]
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of jitgrad and PyTorch, and of JAX and NumPy where they have it, on operands of the given sizes.

    operands    (random generator, *shape) -> arrays
    function    must be the only lambda on its line, or its source cannot be found, and calls are replayed
    wanted      operands that get a gradient; () for no backward
    result      shape -> the shape of the result, where that is not `shape`
    comparable  see `Case`
    """

    name: str
    shapes: Sequence[Shape]
    operands: Function
    function: Function
    jax: Function
    numpy: Function | None = None
    wanted: Sequence[int] = (0,)
    result: Callable[..., Shape] = lambda *shape: shape
    comparable: bool = True

    def cases(self) -> list[Case]:
        """Forward and, where it has gradients, forward and backward, for every shape."""
        found = []
        for shape in self.shapes:
            name = f"{self.name}, {'x'.join(map(str, shape))}"
            found.append(Case(name, partial(self.make, shape), makers(self.function, self.jax, self.numpy),
                              comparable=self.comparable))
            if self.wanted:
                found.append(Case(f"{name}, both ways", partial(self.make_with_gradient, shape),
                                  makers(self.function, self.jax, wanted=self.wanted), comparable=self.comparable))
        return found

    def make(self, shape: Shape, random: np.random.Generator) -> list[np.ndarray]:
        """The operands."""
        return list(self.operands(random, *shape))

    def make_with_gradient(self, shape: Shape, random: np.random.Generator) -> list[np.ndarray]:
        """The operands, and a gradient of the result."""
        return [*self.make(shape, random), normal(random, *self.result(*shape))]


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Random numbers as float32."""
    return np.asarray(random.standard_normal(shape), np.float32)


def one(random: np.random.Generator, *shape: int) -> Arrays:
    """One array of normal numbers."""
    return [normal(random, *shape)]


def distinct(random: np.random.Generator, *shape: int) -> Arrays:
    """Rows without equal numbers, so that every order of them is one order."""
    rows = np.broadcast_to(np.arange(shape[-1], dtype=np.float32), shape)
    return [random.permuted(rows, axis=-1)]


def scaled(random: np.random.Generator, *shape: int) -> Arrays:
    """An array and a weight for its last axis."""
    return [normal(random, *shape), normal(random, shape[-1])]


def affine(random: np.random.Generator, *shape: int) -> Arrays:
    """An array, and weight and bias for its last axis."""
    return [*scaled(random, *shape), normal(random, shape[-1])]


def channels(random: np.random.Generator, *shape: int) -> Arrays:
    """NCHW, and weight and bias for its channels."""
    return [normal(random, *shape), normal(random, shape[1]), normal(random, shape[1])]


def labelled(random: np.random.Generator, rows: int, classes: int) -> Arrays:
    """Logits and labels."""
    return [normal(random, rows, classes), random.integers(0, classes, rows)]


def indexed(random: np.random.Generator, rows: int, width: int, count: int) -> Arrays:
    """A table and indices into it."""
    return [normal(random, rows, width), random.integers(0, rows, count)]


# ---- what JAX and NumPy do not have by one name -------------------------------------------------------------------------


def parts() -> Any:
    """The layers of the JAX side of the training steps."""
    return importlib.import_module("benchmarks.steps.jax_parts")


def jax_layer_norm(_: Any, x: Any, weight: Any, bias: Any) -> Any:
    return parts().layer_norm({"n.weight": weight, "n.bias": bias}, "n", x)


def jax_rms_norm(jax: Any, x: Any, weight: Any) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def jax_batch_norm(_: Any, x: Any, weight: Any, bias: Any) -> Any:
    p = {"n.weight": weight, "n.bias": bias, "n.running_mean": weight, "n.running_var": weight}
    return parts().batch_norm(p, "n", x, {})


def jax_dropout(jax: Any, x: Any) -> Any:
    """The key is made of the data: of a constant one XLA would make the mask while it compiles."""
    key = jax.lax.bitcast_convert_type(x.ravel()[:2], jax.numpy.uint32)
    return jax.numpy.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


def jax_sort(jax: Any, x: Any) -> Any:
    return jax.lax.sort((x, jax.lax.broadcasted_iota(jax.numpy.int32, x.shape, x.ndim - 1)), num_keys=1)


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.exp(x - x.max(-1, keepdims=True))
    result /= result.sum(-1, keepdims=True)
    return result


def numpy_sort(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(x, -1)
    return np.take_along_axis(x, order, -1), order


# ---- the list ---------------------------------------------------------------------------------------------------


KERNELS = (
    Kernel("softmax", [(4096, 1024), (1000, 777)], one, lambda lib, x: lib.nn.functional.softmax(x, -1),
           lambda jax, x: jax.nn.softmax(x), numpy_softmax),
    Kernel("layer norm", [(4096, 768), (1000, 777)], affine,
           lambda lib, x, w, b: lib.nn.functional.layer_norm(x, x.shape[-1:], w, b, 1e-5), jax_layer_norm,
           wanted=(0, 1, 2)),
    Kernel("RMS norm", [(4096, 768), (1000, 777)], scaled,
           lambda lib, x, w: lib.nn.functional.rms_norm(x, x.shape[-1:], w, 1e-5), jax_rms_norm, wanted=(0, 1)),
    Kernel("batch norm, training", [(32, 64, 32, 32), (33, 31, 17, 19)], channels,
           lambda lib, x, w, b: lib.nn.functional.batch_norm(x, None, None, w, b, True), jax_batch_norm,
           wanted=(0, 1, 2)),
    Kernel("cross entropy", [(1024, 32768), (511, 50257)], labelled,
           lambda lib, x, y: lib.nn.functional.cross_entropy(x, y),
           lambda _, x, y: parts().cross_entropy(x, y),
           result=lambda rows, classes: ()),
    Kernel("GELU", [(1 << 22,), (1000003,)], one, lambda lib, x: lib.nn.functional.gelu(x),
           lambda jax, x: jax.nn.gelu(x, approximate=False)),
    Kernel("dropout of a tenth", [(1 << 22,), (1000003,)], one, lambda lib, x: lib.nn.functional.dropout(x, 0.1, True),
           jax_dropout, comparable=False),
    Kernel("cumsum of rows", [(1024, 4096), (777, 1001)], one, lambda lib, x: lib.cumsum(x, -1),
           lambda jax, x: jax.numpy.cumsum(x, -1), lambda x: np.cumsum(x, -1)),
    Kernel("cumsum of columns", [(4096, 1024), (1001, 777)], one, lambda lib, x: lib.cumsum(x, 0),
           lambda jax, x: jax.numpy.cumsum(x, 0), lambda x: np.cumsum(x, 0)),
    Kernel("sort", [(1 << 20,), (1024, 1024), (333, 777)], distinct, lambda lib, x: tuple(lib.sort(x, -1)), jax_sort,
           numpy_sort, wanted=()),
    Kernel("10 largest", [(1024, 4096), (333, 7777)], distinct, lambda lib, x: tuple(lib.topk(x, 10)),
           lambda jax, x: jax.lax.top_k(x, 10), wanted=()),
    Kernel("transpose", [(2048, 2048), (1001, 777)], one, lambda lib, x: x.mT.contiguous(),
           lambda jax, x: x.mT,
           lambda x: np.ascontiguousarray(x.mT), wanted=()),
    Kernel("heads before tokens", [(32, 512, 12, 64), (7, 333, 5, 31)], one,
           lambda lib, x: x.permute(0, 2, 1, 3).contiguous(),
           lambda jax, x: x.transpose(0, 2, 1, 3),
           lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)), wanted=()),
)


def embeddings(rows: int, width: int, count: int) -> list[Case]:
    """`count` rows out of a table of `rows`, forward and the gradient of the table, which is dense."""
    def function(lib: Any, table: Any, index: Any) -> Any:
        return lib.nn.functional.embedding(index, table)

    def jax_function(_: Any, table: Any, index: Any) -> Any:
        return table[index]

    def with_gradient(random: np.random.Generator) -> Arrays:
        return [*indexed(random, rows, width, count), normal(random, count, width)]

    name, index, taken, table = f"{count} of {rows} rows of {width}", 8 * count, 4 * count * width, 4 * rows * width
    return [Case(f"embedding, {name}", lambda random: indexed(random, rows, width, count),
                 makers(function, jax_function, lambda table, index: np.take(table, index, 0)), moved=index + 2 * taken),
            Case(f"embedding's gradient, {name}", with_gradient,
                 makers(function, jax_function, wanted=(0,), result=False), moved=index + taken + table)]


def adam(count: int, size: int) -> Case:
    """One update of `count` parameters of `size` numbers."""
    def operands(random: np.random.Generator) -> Arrays:
        return [normal(random, size) for _ in range(2 * count)]

    made = {"jitgrad": lambda arrays: adam_in("jitgrad", arrays), "PyTorch": lambda arrays: adam_in("torch", arrays),
            "JAX": jax_adam}
    return Case(f"Adam, {count} times {size}", operands, made, moved=7 * 4 * count * size, comparable=False)


def adam_in(package: str, arrays: Arrays) -> Call:
    """The optimizer's step: compiled by jitgrad, fused into one kernel in PyTorch."""
    lib = importlib.import_module(package)
    tensors = [lib.from_numpy(array.copy()) for array in arrays]
    parameters = [lib.nn.Parameter(tensor) for tensor in tensors[:len(tensors) // 2]]
    for parameter, gradient in zip(parameters, tensors[len(parameters):]):
        parameter.grad = gradient
    optimizer = lib.optim.Adam(parameters, lr=1e-3, **({} if package == "jitgrad" else {"fused": True}))

    def step() -> None:
        optimizer.step()

    compiled: Call = lib.compile(step) if package == "jitgrad" else step
    return compiled


def jax_adam(arrays: Arrays) -> Call:
    jax = importlib.import_module("jax")
    start, update = parts().adam(lr=1e-3)
    given = [jax.numpy.array(array) for array in arrays]
    parameters, gradients = given[:len(given) // 2], given[len(given) // 2:]
    held = [parameters, start(parameters)]
    jitted = jax.jit(lambda p, state, g: update(p, g, state), donate_argnums=(0, 1))

    def step() -> None:
        held[:] = jax.block_until_ready(jitted(*held, gradients))

    return step


def cases() -> list[Case]:
    """In the order of the table."""
    return [*[case for kernel in KERNELS for case in kernel.cases()],
            *embeddings(50257, 256, 8192), *embeddings(3001, 77, 999),
            adam(100, 1 << 16), adam(1000, 1001)]
