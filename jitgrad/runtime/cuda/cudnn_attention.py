"""Attention as cuDNN is asked for it: a graph of products, sums and elementwise operations, which it knows as one kernel.

    drawn = draw(library, attended)

In goes an `Attended`, out come the operations of its `Drawn`. Tensors are [batch, heads, rows, columns] and lie where they
are: heads that are evenly spaced in memory are those of one batch. The graphs are those that NVIDIA's cudnn-frontend asks
for, in its file node/scaled_dot_product_flash_attention.h, since the library knows a graph by its operations: even the
product with 1 is one.

Of two that it knows for gradients this is the one whose sums have an order: the gradient of the scores is written to the
workspace, and that of the queries is a product with it. In the other one blocks of keys add to it as they come. The
logarithm of a softmax's denominator is natural, in float32, one number a query, as our kernels have it: either gradient may
follow either forward pass.
"""

from __future__ import annotations

import ctypes as c
import itertools
import math
from collections.abc import Sequence

from jitgrad.products import ATTENDED, Attended
from jitgrad.runtime.cuda.cudnn_descriptors import (
    DATA_TYPE,
    DESCRIPTOR,
    INT64,
    POINTWISE_MODE,
    REDUCTION_KIND,
    TYPES,
    Cudnn,
    Descriptor,
    Drawn,
    dense,
    describe_tensor,
)
from jitgrad.runtime.cuda.driver import Gpu

OLDEST = 91002                                  # the version from which on answers are right where we ask
ONLY_WHOLE_TILES = 91500                        # up to this one gradients want keys in tiles of so many
TILE = 128
WIDEST, WIDEST_ON_HOPPER = 128, 256             # columns of a row
MOST = 65535                                    # heads: they may be a dimension of a grid of blocks

# cudnnBackendDescriptorType_t
POINTWISE, POINTWISE_OPERATION, PRODUCT, PRODUCT_OPERATION, REDUCTION, REDUCTION_OPERATION = 0, 13, 18, 19, 21, 22
RESHAPE_OPERATION = 31

# cudnnPointwiseMode_t, cudnnReduceTensorOp_t
ADD, MUL, DIV, SUB, EXP, LOG, NOT_BELOW, INDEX, SELECT = 0, 1, 6, 9, 13, 15, 303, 501, 601
SUM, MAX = 0, 3

# cudnnBackendAttributeName_t
_MODE, _COMPUTED_IN, _AXIS = 0, 1, 9                                                       # of what is elementwise
_POINTWISE, _X, _B, _Y, _T = 750, 751, 752, 753, 758                                       # … of its operation
_PRODUCT_COMPUTED_IN, _PRODUCT_A, _PRODUCT_B, _PRODUCT_C, _PRODUCT = 1500, 1520, 1521, 1522, 1523
_REDUCTION_KIND, _REDUCTION_COMPUTED_IN, _REDUCED_X, _REDUCED_Y, _REDUCTION = 1600, 1601, 1610, 1611, 1612
_RESHAPED_X, _RESHAPED_Y = 2200, 2201

_Q, _K, _V, _OUT, _LSE, _G, _DQ, _DK, _DV, _DOTS, _HIDDEN, _ONE = range(1, 13)             # how we number tensors
_VIRTUAL = 100                                                                             # … and those that are nowhere
_CALLED_WITH = {ATTENDED[0]: (_Q, _K, _V, _OUT, _LSE), ATTENDED[1]: (_G, _Q, _K, _V, _OUT, _LSE, _DQ, _DK, _DV)}
_VALUES = {_HIDDEN: c.c_float(-math.inf), _ONE: c.c_float(1)}


def is_known(library: Cudnn, gpu: Gpu, asked: Attended) -> bool:
    """Whether NVIDIA says, in the frontend, that such attention is right, and gradients the same in every run. On GPUs after
    Hopper they would need another way."""
    widest = WIDEST_ON_HOPPER if gpu.major == 9 else WIDEST
    known = library.version >= OLDEST and gpu.major >= 8 and max(asked.width, asked.values) <= widest
    if not known or asked.width % 8 or asked.values % 8 or max(asked.groups // asked.together, asked.heads) > MOST:
        return False
    if asked.kind == ATTENDED[0]:
        return True
    whole = asked.keys % TILE == 0 or library.version > ONLY_WHOLE_TILES
    return gpu.major <= 9 and whole and (asked.queries, asked.keys) != (1, 1)


def draw(library: Cudnn, asked: Attended) -> Drawn:
    """The graph of operations that computes it. It may be finalized without a GPU."""
    sketch = _Sketch(library, asked)
    if asked.kind == ATTENDED[0]:
        sketch.forward()
    else:
        sketch.gradient()
    beside = {_DOTS: 4 * math.prod(asked.sums)} if asked.kind == ATTENDED[1] else {}
    values = {number: _VALUES[number] for number in sketch.numbers if number in _VALUES}
    begins = tuple([2 * first for first, *_ in asked.places])
    return Drawn(sketch.operations, _CALLED_WITH[asked.kind], begins, beside, values)


class _Tensor:
    """A tensor that was described."""

    def __init__(self, described: Descriptor, sizes: Sequence[int], pitches: Sequence[int]):
        self.described, self.sizes, self.pitches = described, list(sizes), list(pitches)


class _Sketch:
    """The operations of a graph, in order."""

    def __init__(self, library: Cudnn, asked: Attended):
        self.library, self.asked = library, asked
        self.operations: list[Descriptor] = []
        self.numbers: list[int] = []
        self.fresh = itertools.count(_VIRTUAL)
        self.batch = asked.groups // asked.together
        self.lying = dict(zip(_CALLED_WITH[asked.kind], zip(asked.shapes, asked.places, strict=True), strict=True))

    # ---- tensors

    def tensor(self, number: int, turned: bool = False) -> _Tensor:
        """An operand or result in memory; `turned`: with its rows as columns."""
        (count, rows, columns), (_, inner, outer, within, row) = self.lying[number]
        heads = count // self.batch
        sizes, pitches = [self.batch, heads, rows, columns], [outer, within] if inner > 1 else [outer * heads, outer]
        if turned:
            return self._tensor(number, self.asked.dtype, [*sizes[:2], columns, rows], [*pitches, 1, row])
        return self._tensor(number, self.asked.dtype, sizes, [*pitches, row, 1])

    def sums(self, number: int) -> _Tensor:
        """One number for each query."""
        sizes = (self.batch, self.asked.heads // self.batch, self.asked.queries, 1)
        return self._tensor(number, "f32", sizes, dense(sizes))

    def virtual(self, dtype: str, sizes: Sequence[int], pitches: Sequence[int] = ()) -> _Tensor:
        return self._tensor(next(self.fresh), dtype, sizes, pitches or dense(sizes))

    def number(self, number: int) -> _Tensor:
        return self._tensor(number, "f32", (1, 1, 1, 1), (1, 1, 1, 1))

    def _tensor(self, number: int, dtype: str, sizes: Sequence[int], pitches: Sequence[int]) -> _Tensor:
        self.numbers.append(number)
        described = describe_tensor(self.library, number, dtype, sizes, pitches, virtual=number >= _VIRTUAL,
                                    value=number in _VALUES)
        return _Tensor(described, sizes, pitches)

    # ---- operations

    def _operation(self, kind: int, parts: dict[int, Descriptor | _Tensor | None]) -> None:
        made = Descriptor(self.library, kind)
        for attribute, part in parts.items():
            if part is not None:
                made.set(attribute, DESCRIPTOR, part.described if isinstance(part, _Tensor) else part)
        self.operations.append(made.finalize())

    def elementwise(self, mode: int, x: _Tensor, b: _Tensor | None = None, t: _Tensor | None = None, *,
                    to: _Tensor | None = None, dtype: str = "f32", computed_in: str = "f32",
                    axis: int | None = None) -> _Tensor:
        """Of x, or x and b; for SELECT x where t holds, else b; for INDEX the position along an axis of x."""
        what = Descriptor(self.library, POINTWISE)
        what.set(_MODE, POINTWISE_MODE, mode)
        what.set(_COMPUTED_IN, DATA_TYPE, TYPES[computed_in])
        if axis is not None:
            what.set(_AXIS, INT64, axis)
        y = to or self.virtual(dtype, x.sizes)
        self._operation(POINTWISE_OPERATION, {_POINTWISE: what.finalize(), _X: x, _B: b, _Y: y, _T: t})
        return y

    def product(self, a: _Tensor, b: _Tensor, to: _Tensor | None = None) -> _Tensor:
        """Summed in float32."""
        what = Descriptor(self.library, PRODUCT)
        what.set(_PRODUCT_COMPUTED_IN, DATA_TYPE, TYPES["f32"])
        c = to or self.virtual("f32", (*a.sizes[:3], b.sizes[3]))
        self._operation(PRODUCT_OPERATION, {_PRODUCT_A: a, _PRODUCT_B: b, _PRODUCT_C: c, _PRODUCT: what.finalize()})
        return c

    def reduced(self, kind: int, x: _Tensor, to: _Tensor | None = None) -> _Tensor:
        """Rows to one number, or to what `to` has."""
        what = Descriptor(self.library, REDUCTION)
        what.set(_REDUCTION_KIND, REDUCTION_KIND, kind)
        what.set(_REDUCTION_COMPUTED_IN, DATA_TYPE, TYPES["f32"])
        y = to or self.virtual("f32", (*x.sizes[:3], 1))
        self._operation(REDUCTION_OPERATION, {_REDUCED_X: x, _REDUCED_Y: y, _REDUCTION: what.finalize()})
        return y

    def transposed(self, x: _Tensor) -> _Tensor:
        """x with rows as columns, in the type of the operands."""
        order = (0, 1, 3, 2)
        y = self.virtual(self.asked.dtype, [x.sizes[k] for k in order], [x.pitches[k] for k in order])
        self._operation(RESHAPE_OPERATION, {_RESHAPED_X: x, _RESHAPED_Y: y})
        return y

    # ---- attention

    def masked(self, scores: _Tensor) -> _Tensor:
        """-inf for keys behind a query's position."""
        if not self.asked.causal:
            return scores
        row, column = [self.elementwise(INDEX, scores, dtype="i32", axis=axis) for axis in (2, 3)]
        seen = self.elementwise(NOT_BELOW, row, column, dtype="bool", computed_in="bool")
        return self.elementwise(SELECT, scores, self.number(_HIDDEN), seen)

    def forward(self) -> None:
        q, k, v, out = self.tensor(_Q), self.tensor(_K, turned=True), self.tensor(_V), self.tensor(_OUT)
        scores = self.masked(self.product(q, k))
        top = self.reduced(MAX, scores)
        raised = self.elementwise(EXP, self.elementwise(SUB, scores, top))
        total = self.reduced(SUM, raised)
        self.elementwise(ADD, top, self.elementwise(LOG, total), to=self.sums(_LSE))
        self.product(self.elementwise(DIV, raised, total, dtype=self.asked.dtype), v, to=out)

    def gradient(self) -> None:
        q, g, out = self.tensor(_Q), self.tensor(_G), self.tensor(_OUT)
        k, v = self.tensor(_K, turned=True), self.tensor(_V, turned=True)
        lse, dots = self.sums(_LSE), self.sums(_DOTS)
        self.elementwise(MUL, self.reduced(SUM, self.elementwise(MUL, g, out)), self.number(_ONE), to=dots)
        weights = self.elementwise(EXP, self.masked(self.elementwise(SUB, self.product(q, k), lse)))
        self.summed_over_heads(self.transposed(weights), g, self.tensor(_DV))
        slopes = self.elementwise(MUL, self.elementwise(SUB, self.product(g, v), dots), weights)
        self.summed_over_heads(self.transposed(slopes), q, self.tensor(_DK))
        self.product(slopes, self.transposed(k), to=self.tensor(_DQ))

    def summed_over_heads(self, a: _Tensor, b: _Tensor, to: _Tensor) -> None:
        """A product whose heads are added where they share what it is a gradient of."""
        if self.asked.heads == self.asked.groups:
            self.product(a, b, to=to)
        else:
            each = self.virtual(self.asked.dtype, (*a.sizes[:3], b.sizes[3]))
            self.reduced(SUM, self.product(a, b, to=each), to=to)
