"""Matrix products of float32: squares, the products of the MLP and GPT steps with their gradients, odd sizes, batches.

Every library writes to memory that is there already, but for JAX, which has no such thing. In the names ``T`` marks an
operand that is the transpose of a contiguous array, as in the gradients of a linear layer.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.kernels.case import Arrays, Call, Case
from jitgrad import ops
from jitgrad.dtypes import float32
from jitgrad.ir import GraphBuilder, TensorType, Value
from jitgrad.limits import Limit
from jitgrad.ops.contraction import transposed
from jitgrad.plans import compile_graph
from jitgrad.runtime.plan import Plan


@dataclass(frozen=True, slots=True)
class Product:
    """[batch, m, k] @ [batch, k, n], without batch if it is 0. `side`, left or right, is the operand that is the
    transpose of its array. `pairs` ** 2 products are made of so many left and as many right operands."""

    m: int
    k: int
    n: int
    side: str = ""
    batch: int = 0
    pairs: int = 1

    @property
    def name(self) -> str:
        times = f"{self.pairs ** 2} times " if self.pairs > 1 else f"{self.batch} of " if self.batch else ""
        left, right = ("T " if self.side == "left" else ""), (" T" if self.side == "right" else "")
        return f"{times}{self.m}x{self.k} {left}@ {self.k}x{self.n}{right}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n * max(self.batch, 1) * self.pairs ** 2

    def operands(self, random: np.random.Generator) -> list[np.ndarray]:
        """All left arrays, then all right ones."""
        batch = (self.batch,) if self.batch else ()
        left = (*batch, self.k, self.m) if self.side == "left" else (*batch, self.m, self.k)
        right = (*batch, self.n, self.k) if self.side == "right" else (*batch, self.k, self.n)
        return [random.standard_normal(shape, dtype=np.float32) for shape in (left, right) for _ in range(self.pairs)]

    def outputs(self) -> list[np.ndarray]:
        """Memory for the results."""
        shape = (self.batch, self.m, self.n) if self.batch else (self.m, self.n)
        return [np.zeros(shape, np.float32) for _ in range(self.pairs ** 2)]

    def case(self) -> Case:
        """What is measured."""
        return Case(self.name, self.operands, {"jitgrad": self.in_plan, "NumPy": self.in_numpy,
                                               "PyTorch": self.in_torch, "JAX": self.in_jax}, self.operations)

    def factors(self, given: Any) -> list[tuple[Any, Any]]:
        """The two factors of every product, for arrays of any library with a transpose ``mT``."""
        left = [x.mT if self.side == "left" else x for x in given[:self.pairs]]
        right = [y.mT if self.side == "right" else y for y in given[self.pairs:]]
        return [(x, y) for x in left for y in right]

    def in_plan(self, arrays: Arrays) -> Call:
        """jitgrad: all products in one plan, called by address."""
        builder = GraphBuilder("matmul")
        values = [builder.input(TensorType(float32, array.shape)) for array in arrays]
        with builder:
            turned = [_turned(v, self.side == ("left" if k < self.pairs else "right")) for k, v in enumerate(values)]
            plan = compile_graph(builder.build([ops.matmul(x, y) for x in turned[:self.pairs]
                                                for y in turned[self.pairs:]]))
        assert isinstance(plan, Plan)
        outputs = self.outputs()
        call = Limit(plan, [*arrays, *outputs], self.operations)

        def run() -> list[np.ndarray]:
            call()
            return outputs

        return run

    def in_numpy(self, arrays: Arrays) -> Call:
        outputs, factors = self.outputs(), self.factors(arrays)
        return lambda: [np.matmul(x, y, out=out) for (x, y), out in zip(factors, outputs)]

    def in_torch(self, arrays: Arrays) -> Call:
        torch = importlib.import_module("torch")
        outputs = [torch.from_numpy(out) for out in self.outputs()]
        factors = self.factors([torch.from_numpy(array) for array in arrays])
        return lambda: [torch.matmul(x, y, out=out) for (x, y), out in zip(factors, outputs)]

    def in_jax(self, arrays: Arrays) -> Call:
        jax = importlib.import_module("jax")
        products = jax.jit(lambda *given: [x @ y for x, y in self.factors(given)])
        given = [jax.numpy.asarray(array) for array in arrays]
        return lambda: jax.block_until_ready(products(*given))


def _turned(x: Value, turn: bool) -> Any:
    return transposed(x) if turn else x


def linear(rows: int, inputs: int, outputs: int) -> list[Product]:
    """A linear layer's product, and those of the gradients of its input and of its weight."""
    return [Product(rows, inputs, outputs, "right"), Product(rows, outputs, inputs),
            Product(outputs, rows, inputs, "left")]


def cases() -> list[Case]:
    """In the order of the table."""
    squares = [Product(64, 64, 64, pairs=10), *[Product(n, n, n) for n in (256, 512, 1024, 2048, 4096)]]
    mlp = [p for inputs, outputs in ((784, 512), (512, 512), (512, 10)) for p in linear(128, inputs, outputs)]
    gpt = [p for inputs, outputs in ((256, 768), (256, 256), (256, 1024), (1024, 256))
           for p in linear(1024, inputs, outputs)]
    odd = [Product(1000, 777, 333), Product(129, 65, 257), Product(333, 1000, 777, "right"),
           Product(777, 333, 1000, "left"), Product(1, 1000, 777), Product(31, 1031, 7)]
    batches = [Product(128, 32, 128, "right", 64), Product(128, 128, 32, "", 64), Product(77, 33, 101, "", 13)]
    return [product.case() for product in (*squares, *mlp, *dict.fromkeys(gpt), *odd, *batches)]
