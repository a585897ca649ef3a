"""What libraries are asked for: data that lowering writes, plans store, and the bindings of the libraries read.

A `Product` is ``activation(A @ B + bias)`` for a batch of matrices. Its result is dense, row by row. Sizes, pitches and
strides are in elements. A `Convolved` is a convolution, or one of its gradients; images, weights and results are dense. An
`Attended` is attention or its gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ACTIVATIONS = ("", "relu", "gelu")
"""What can follow; "gelu" is the approximation by tanh."""

DTYPES = ("f32", "f64", "bf16", "f16")
"""Of factors, bias and result, by their short names."""

WORKSPACE = 32 << 20
"""Bytes that the library may use while it computes a product, as NVIDIA advises for its newer GPUs."""

SLACK = 256
"""Bytes in addition, so that the workspace can begin at a multiple of this."""


@dataclass(frozen=True, slots=True)
class Laid:
    """Where matrices lie: `pitch` from row to row, or from column to column if neighbours of a column lie beside each other
    (`turned`); `stride` from matrix to matrix, 0 if all are one; `first`, where the first one begins."""

    turned: bool
    pitch: int
    stride: int
    first: int

    def end(self, batch: int, rows: int, columns: int) -> int:
        """Elements up to the end of the last matrix."""
        lines, length = (columns, rows) if self.turned else (rows, columns)
        return self.first + (batch - 1) * self.stride + (lines - 1) * self.pitch + length


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products of m x k with k x n matrices. `bias`: n numbers are added to every row. `tf32`: float32 may be
    rounded to TF32."""

    dtype: str
    tf32: bool
    m: int
    n: int
    k: int
    batch: int
    a: Laid
    b: Laid
    bias: bool = False
    activation: str = ""

    @property
    def work(self) -> int:
        """Multiplications."""
        return self.batch * self.m * self.n * self.k


KINDS = ("convolution", "convolution_input_grad", "convolution_weight_grad")
"""What a `Convolved` computes: the names of our ops. Their operands are image and weights, the result's gradient and
weights, image and the result's gradient."""

CONVOLVED_DTYPES = ("f32", "bf16", "f16")

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Convolved:
    """A convolution of images [N, C, *sizes] with weights [O, C / groups, *kernel] that gives [N, O, *out], in the direction
    of its kind. `low`, `high`: the padding on both sides. `tf32`: float32 may be rounded to TF32. `workspace`: the bytes of
    memory that the library needs meanwhile, as far as that is known."""

    kind: str
    dtype: str
    tf32: bool
    image: Ints
    weights: Ints
    result: Ints
    stride: Ints
    low: Ints
    high: Ints
    dilation: Ints
    workspace: int = 0

    @property
    def shapes(self) -> tuple[Ints, Ints, Ints]:
        """Of both operands, and of what is computed."""
        image, weights, result = self.image, self.weights, self.result
        return {KINDS[0]: (image, weights, result), KINDS[1]: (result, weights, image),
                KINDS[2]: (image, result, weights)}[self.kind]

    @property
    def groups(self) -> int:
        return self.image[1] // self.weights[1]

    @property
    def work(self) -> int:
        """Multiplications."""
        return prod(self.result) * prod(self.weights[1:])


ATTENDED = ("attention", "attention_grad")
"""What an `Attended` computes: the names of our ops. Its operands and results are theirs, in their order."""

ATTENDED_DTYPES = ("bf16", "f16")


@dataclass(frozen=True, slots=True)
class Attended:
    """softmax(q k^T) v, or its gradient, without mask and dropout, for q[heads, queries, width], k[groups, keys, width] and
    v[groups, keys, values], where `heads` is a multiple of `groups`. With `causal` query i sees keys 0 … i. `workspace`: the
    bytes of memory that the library needs meanwhile, as far as that is known. `laid`: for each operand and result of three
    dimensions the five numbers that say where it lies, those of `ir.strides.Heads`; nothing where all are dense."""

    kind: str
    dtype: str
    causal: bool
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    values: int
    workspace: int = 0
    laid: Ints = ()

    @property
    def shapes(self) -> tuple[Ints, ...]:
        """Of operands and results, the logarithms of the softmax's denominators among them: they alone are float32."""
        q, k = (self.heads, self.queries, self.width), (self.groups, self.keys, self.width)
        v, out, lse = (self.groups, self.keys, self.values), (self.heads, self.queries, self.values), self.sums
        return (q, k, v, out, lse) if self.kind == ATTENDED[0] else (out, q, k, v, out, lse, q, k, v)

    @property
    def places(self) -> tuple[Ints, ...]:
        """Where each of them lies, as in `laid`."""
        given = iter([self.laid[k:k + 5] for k in range(0, len(self.laid), 5)])
        return tuple([next(given) if self.laid and len(shape) == 3 else (0, 1, prod(shape[1:]), 0, shape[-1])
                      for shape in self.shapes])

    @property
    def ends(self) -> Ints:
        """Elements up to the end of each of them."""
        return tuple([first + (-(-shape[0] // inner) - 1) * outer + (inner - 1) * within + (prod(shape[1:-1]) - 1) * row
                      + shape[-1] if len(shape) == 3 else prod(shape)
                      for shape, (first, inner, outer, within, row) in zip(self.shapes, self.places, strict=True)])

    @property
    def together(self) -> int:
        """How many heads of keys lie in one batch, within which heads are evenly spaced; 0 where operands do not agree."""
        repeats = self.heads // self.groups
        found = {inner if shape[0] == self.groups else inner / repeats
                 for shape, (_, inner, *_) in zip(self.shapes, self.places, strict=True) if inner > 1}
        one = found.pop() if found else 1
        return 0 if found or one % 1 or self.groups % one else int(one)

    @property
    def sums(self) -> Ints:
        """The shape of what there is one number of for each query."""
        return self.heads, self.queries

    @property
    def work(self) -> int:
        """Multiplications: two products, five of a gradient."""
        scores = self.heads * self.queries * self.keys // (1 + self.causal)
        first, second = (1, 1) if self.kind == ATTENDED[0] else (3, 2)
        return scores * (first * self.width + second * self.values)
