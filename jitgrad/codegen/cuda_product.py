"""What a GPU may do about a matrix product beside computing it in float32 by a kernel of ours: TF32, and a library. What is
allowed about convolutions and attention is said here, too; their parts of it are `cuda_convolved` and `cuda_attended`.

In goes a region around a product, whose factors are read through strides; out comes the `Product` that a library would be
asked for, with as much of what follows it as the library can do: a bias along the columns, then relu, or gelu by its
approximation with tanh (the library has no other). `choose_way` says what computes it. Unless it is measured, large products
go to the library where it does all of the region; a kernel of ours takes those that it can spare a pass over memory, and
all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from jitgrad.codegen.choice import Choice, is_measured
from jitgrad.dtypes import DType, float32, float64
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.products import DTYPES, Attended, Convolved, Laid, Product

OWN, LIBRARY, APART = "our kernel", "the library", "the library, then a kernel"

LARGE = 1 << 27
"""Multiplications from which a product is the library's: as many as 512 x 512 x 512 matrices need."""

WORTH_ASKING = 1 << 20
"""And those from which it is worth measuring."""


@dataclass(frozen=True, slots=True)
class Products:
    """What is allowed: `tf32`, that factors in float32 are rounded to TF32; `library`, which says whether a library can
    compute a product, and None where there is none; `convolving` and `attending` the same for convolutions and attention,
    with the memory that they need; `always`, that these are the library's wherever it can. `identity`: which libraries those
    are, and on which GPU."""

    tf32: bool = False
    library: Callable[[Product], bool] | None = None
    identity: str = ""
    convolving: Callable[[Convolved], Convolved | None] | None = None
    attending: Callable[[Attended], Attended | None] | None = None
    always: bool = False
    numbers: Mapping[int, float] = field(default_factory=dict)
    """Of the node that is lowered: which operands are constants, and their values."""

    @property
    def key(self) -> str:
        """What lowering depends on, as text."""
        return f"{'tf32 ' * self.tf32}{'always ' * self.always}{self.identity}"

    @property
    def leave_choices(self) -> bool:
        """Whether there is something to measure."""
        return self.library is not None or (not self.always and (self.convolving or self.attending) is not None)


EXACT = Products()
"""Float32, and no library."""


@dataclass(frozen=True, slots=True)
class Following:
    """What follows a product, where a library can do it: `bias`, a value of the body with one number per column, and the
    name of an activation."""

    bias: Value | None
    activation: str


def choose_way(asked: Product | None, whole: bool, allowed: Products) -> str:
    """OWN, LIBRARY or APART. `asked`: what the library would be asked for; `whole`: that is all that is to be done."""
    library = allowed.library
    return OWN if asked is None or library is None else choose("product", asked.work, whole, lambda: library(asked))


def choose(question: str, work: int, whole: bool, accepts: Callable[[], bool]) -> str:
    """The same for anything of so many multiplications; `accepts`: whether the library can do it, which is asked last."""
    if work < WORTH_ASKING:
        return OWN
    usual, other = (LIBRARY, OWN) if whole and work >= LARGE else (OWN, LIBRARY if whole else APART)
    if (usual is OWN and not is_measured()) or not accepts():
        return OWN
    return Choice(question, {usual: usual, other: other}).take()


# ---- where the factors lie -------------------------------------------------------------------------------------------


def asked_for(dtype: DType, allowed: Products, batch: tuple[int, ...], sizes: tuple[int, int, int], a: Matrices,
              b: Matrices, follows: Following | None) -> Product | None:
    """The product of `sizes` m, n, k, as a library would be asked for it; None where it cannot be."""
    m, n, k = sizes
    laid_a, laid_b = lay(a, m, k), lay(b, k, n)
    if laid_a is None or laid_b is None or len(batch) > 1 or not k or dtype.short not in DTYPES:
        return None
    bias, activation = (follows.bias is not None, follows.activation) if follows else (False, "")
    return Product(dtype.short, allowed.tf32 and dtype.short == "f32", m, n, k, batch[0] if batch else 1, laid_a, laid_b,
                   bias, activation)


def lay(matrices: Matrices, rows: int, columns: int) -> Laid | None:
    """Matrices of which neighbours of a row, or of a column, lie beside each other, without overlaps; else None."""
    stride = matrices.batch[0] if matrices.batch else 0
    if (matrices.column == 1 or columns == 1) and (matrices.row >= columns or rows == 1):
        return Laid(False, matrices.row if rows > 1 else columns, stride, matrices.first)
    if (matrices.row == 1 or rows == 1) and (matrices.column >= rows or columns == 1):
        return Laid(True, matrices.column if columns > 1 else rows, stride, matrices.first)
    return None


# ---- what follows ----------------------------------------------------------------------------------------------------


def following(body: Graph, node: Node, numbers: Mapping[int, float]) -> Following | None:
    """What follows the product `node` in `body`, where a library can do all of it."""
    made = node.output.type
    if len(body.outputs) != 1 or (body.outputs[0].dtype, body.outputs[0].type.size) != (made.dtype, made.size):
        return None
    spelled = _Spelling(body, node, numbers)
    activation = _ACTIVATIONS.get(spelled.text(body.outputs[0]) or "")
    if activation is None or (node.output.dtype is float64 and (activation or spelled.bias)):
        return None
    return Following(spelled.bias, activation)


def _call(name: str, *operands: str, commutative: bool = True) -> str:
    return f"{name}({', '.join(sorted(operands) if commutative else operands)})"


def _number(value: float) -> str:
    return repr(float(np.float32(value)))


def _gelu_by_tanh() -> str:
    cubed = _call("mul", _call("mul", _call("mul", "x", "x"), "x"), _number(0.044715))
    inner = _call("mul", _call("add", "x", cubed), _number((2 / np.pi) ** 0.5))
    return _call("mul", _call("mul", _number(0.5), "x"), _call("add", _number(1), _call("tanh", inner)))


_ACTIVATIONS = {"x": "", _call("relu", "x"): "relu", _gelu_by_tanh(): "gelu"}


class _Spelling:
    """A body as text, in which x is the product, with its bias if it has one. Casts between the product's type and float32
    are left out: a library computes in float32 and rounds once."""

    def __init__(self, body: Graph, node: Node, numbers: Mapping[int, float]):
        self.product, self.producers = node.output, body.producers()
        self.bias: Value | None = None
        self.sum: Value | None = None                       # of the product and its bias
        self.numbers = {body.inputs[k]: number for k, number in numbers.items()}
        self.known: dict[Value, str | None] = {}
        for other in body.nodes:
            if self.sum is None and other.op.name == "add":
                self._find_bias(other)

    def _find_bias(self, node: Node) -> None:
        for one, other in (node.inputs, node.inputs[::-1]):
            if self.moved(one) is self.product:
                self.bias = self._along_columns(other)
                self.sum = node.output if self.bias is not None else None

    def _along_columns(self, value: Value) -> Value | None:
        """What `value` repeats for every row: one number per column."""
        spread = self.producers.get(value)
        if spread is None or spread.op.name != "broadcast_to":
            return None
        source, columns = spread.inputs[0], self.product.shape[-1]
        lies_there = source.shape and source.shape[-1] == columns == value.shape[-1] and source.type.size == columns
        return self.moved(source) if lies_there and source.dtype is self.product.dtype else None

    def moved(self, value: Value) -> Value:
        """The same elements in the same order, where they were made."""
        while value in self.producers and self.producers[value].op.name == "reshape":
            value = self.producers[value].inputs[0]
        return value

    def text(self, value: Value) -> str | None:
        """None where there is something that no activation has."""
        if value not in self.known:
            self.known[value] = self._text(value)
        return self.known[value]

    def _text(self, value: Value) -> str | None:
        if value in self.numbers:
            return _number(self.numbers[value])
        if value is (self.sum or self.product):
            return "x"
        node = self.producers.get(value)
        if node is None or node is self.producers.get(self.product):
            return None
        if node.op.name in ("reshape", "broadcast_to"):
            return self.text(node.inputs[0])
        if node.op.name == "cast":
            kept = {value.dtype, node.inputs[0].dtype} <= {self.product.dtype, float32} and self.product.dtype is not float64
            return self.text(node.inputs[0]) if kept else None
        operands = [self.text(v) for v in node.inputs]
        if None in operands or node.op.kind != "elementwise" or node.attrs:
            return None
        return _call(node.op.name, *[t for t in operands if t is not None], commutative=node.op.commutative)
