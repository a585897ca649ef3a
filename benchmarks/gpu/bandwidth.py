"""What is limited by memory: an elementwise chain, softmax, norms, cross entropy, Adam; forward, and both ways.

Bytes are those of operands and results, read or written once: what a contender keeps between the two ways counts against
it. Working sets are several times as large as a GPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jitgrad as jg
from benchmarks.gpu.bench import Bench, Call
from benchmarks.gpu.case import COMPILED, EAGER, OURS, Case, Compiler, Way, applied

ELEMENTS = 1 << 27                             # of the operand whose shape says the rows
PARAMETERS = (12, 768, 50_304, 1024)           # GPT-2: layers, width, vocabulary, tokens
DTYPES = {"bfloat16": jg.bfloat16, "float32": jg.float32}


def chain(lib: Any, x: Any, y: Any) -> Any:
    """Eight elementwise operations."""
    return (x * lib.sigmoid(x) + y) * lib.tanh(y) - lib.exp(-x * x)


def softmax(lib: Any, x: Any) -> Any:
    return lib.nn.functional.softmax(x, -1)


def layer_norm(lib: Any, x: Any, weight: Any, bias: Any) -> Any:
    return lib.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def rms_norm(lib: Any, x: Any, weight: Any) -> Any:
    return lib.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-5)


def cross_entropy(lib: Any, x: Any, labels: Any) -> Any:
    return lib.nn.functional.cross_entropy(x, labels)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A function of rows. `operands`: how many of the rows' shape, and of their width, it has."""

    name: str
    function: Callable[..., Any]
    operands: tuple[int, int]

    def cases(self, rows: int, width: int, dtype: str, ranks: tuple[int, int]) -> list[Case]:
        """Forward, and both ways."""
        full, narrow = self.operands
        size = DTYPES[dtype].itemsize
        forward = size * ((full + 1) * rows * width + narrow * width)
        both = forward + size * ((full + 1) * rows * width + narrow * width)
        wanted, name = range(full + narrow), f"{self.name}, {rows}x{width} {dtype}"
        return [Case(name, partial(self.make, rows, width, dtype, False), applied(self.function), forward, True,
                     kind=dtype, rank=ranks[0]),
                Case(f"{name}, both ways", partial(self.make, rows, width, dtype, True), applied(self.function, wanted),
                     both, True, kind=dtype, rank=ranks[1])]

    def make(self, rows: int, width: int, dtype: str, gradient: bool, bench: Bench) -> list[Any]:
        """The operands, and a gradient of the result."""
        full, narrow = self.operands
        shapes = [(rows, width)] * full + [(width,)] * narrow + [(rows, width)] * gradient
        return [bench.normal(*shape, dtype=DTYPES[dtype]) for shape in shapes]


KERNELS = (Kernel("chain", chain, (2, 0)), Kernel("softmax", softmax, (1, 0)), Kernel("layer norm", layer_norm, (1, 2)),
           Kernel("RMS norm", rms_norm, (1, 1)))


def labelled(rows: int, classes: int, dtype: str, gradient: bool, bench: Bench) -> list[Any]:
    """Logits and labels, and a gradient of the loss."""
    labels = jg.randint(0, classes, (rows,), device=bench.device)
    logits = bench.normal(rows, classes, dtype=DTYPES[dtype])
    return [logits, labels, *[jg.ones((), dtype=DTYPES[dtype], device=bench.device)] * gradient]


def entropy_cases(rows: int, classes: int, dtype: str, ranks: tuple[int, int]) -> list[Case]:
    """The loss; with its gradient in the logits."""
    once = DTYPES[dtype].itemsize * rows * classes
    name = f"cross entropy, {rows}x{classes} {dtype}"
    return [Case(name, partial(labelled, rows, classes, dtype, False), applied(cross_entropy), once + 8 * rows, True,
                 kind=dtype, rank=ranks[0]),
            Case(f"{name}, both ways", partial(labelled, rows, classes, dtype, True), applied(cross_entropy, [0]),
                 2 * once + 8 * rows, True, kind=dtype, rank=ranks[1])]


def parameter_shapes(layers: int, width: int, vocabulary: int, tokens: int) -> list[tuple[int, ...]]:
    """Of a GPT: 148 for 12 layers."""
    block: list[tuple[int, ...]] = [(width,)] * 4
    for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        block += [(outputs, inputs), (outputs,)]
    return [(vocabulary, width), (tokens, width), *block * layers, (width,), (width,)]


def adam(lib: Any, compiler: Compiler, tensors: Sequence[Any], **options: Any) -> Call:
    """The optimizer's step; the first half of the tensors are parameters, the other their gradients."""
    parameters = [lib.nn.Parameter(tensor.clone()) for tensor in tensors[:len(tensors) // 2]]
    for parameter, gradient in zip(parameters, tensors[len(parameters):]):
        parameter.grad = gradient
    optimizer = lib.optim.Adam(parameters, lr=1e-3, **options)

    def step() -> None:
        optimizer.step()

    return compiler(step)


def adam_case(sizes: tuple[int, int, int, int]) -> Case:
    """One update of all parameters of a GPT."""
    shapes = parameter_shapes(*sizes)
    elements = sum(math.prod(shape) for shape in shapes)
    ways = {"jitgrad": OURS, "PyTorch": EAGER, "PyTorch, fused": Way("torch", make=partial(adam, fused=True)),
            "torch.compile": COMPILED}
    return Case(f"Adam, {len(shapes)} tensors, {elements:,} numbers",
                lambda bench: [bench.normal(*shape) for shape in shapes * 2], adam, 7 * 4 * elements, True, ways, None, 0)


def cases(small: bool = False) -> list[Case]:
    """In the order of the table."""
    elements = 1 << 9 if small else ELEMENTS
    widths = (24, 40) if small else (4096, 1024, 32_768)
    vocabularies = ((3, 50),) if small else ((8192, 50_304), (16_384, 32_768), (8192, 50_257))
    found = []
    for width in widths:
        for kernel in KERNELS:
            ranks = (1, 0 if kernel.name != "chain" else 1) if width == widths[0] else (2, 1)
            found += kernel.cases(elements // width, width, "bfloat16", ranks)
    for kernel in KERNELS:
        found += kernel.cases(elements // widths[0], widths[0], "float32", (2, 2))
    for place, (rows, classes) in enumerate(vocabularies):
        found += entropy_cases(rows, classes, "bfloat16", (1, 0) if not place else (2, 2))
    found += entropy_cases(*vocabularies[0], "float32", (2, 1))
    return [*found, adam_case((1, 8, 20, 6) if small else PARAMETERS)]
