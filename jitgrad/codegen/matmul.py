"""The templates "matmul" and "update": one matrix product, the movement ops that feed it, the elementwise ops that follow
it.

What goes in: the body of a region with one `matmul`. Movement ops between the body's inputs and the product become
strides; elementwise ops are computed where the factor is packed (`codegen.prologue`), and what is neither by a kernel of
its own. What comes out: launches that pack operands where `gemm.arrange` says so, then one launch whose items are blocks of
the product; `codegen.epilogue` has what follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from jitgrad import dtypes
from jitgrad.codegen.blocking import choose_blocking
from jitgrad.codegen.call import Call, launch, lowers
from jitgrad.codegen.epilogue import Shared, WithEpilogue, restrict
from jitgrad.codegen.kernel import Blocks, Buffer, Launch, Lowered
from jitgrad.codegen.prologue import NOWHERE, Made, multiply_made, pack_made
from jitgrad.codegen.region import analyse
from jitgrad.codegen.templates import lower_map
from jitgrad.ir.graph import Graph, GraphBuilder, Node, Value
from jitgrad.ir.op import Op
from jitgrad.ir.strides import follow, steps_through
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cpu import gemm, gemm_pack, gemm_rows
from jitgrad.kernels.cpu.gemm import Arrangement, Form, Matrices, Packing
from jitgrad.kernels.cpu.gemm_rows import Lines
from jitgrad.ops.contraction import int_matmul, matmul


@lowers("matmul")
def lower_product(call: Call) -> Lowered:
    """The primitive alone."""
    return _lower_alone(call, matmul)


@lowers("int_matmul")
def lower_int_product(call: Call) -> Lowered:
    """The primitive alone."""
    return _lower_alone(call, int_matmul)


def _lower_alone(call: Call, op: Op) -> Lowered:
    builder = GraphBuilder(op.name)
    x, y = [builder.input(t) for t in call.inputs]
    return lower_matmul(builder.build([builder.run(op, (x, y), {})]))


def lower_matmul(body: Graph, shared: Shared = ()) -> Lowered:
    """The launches of a region around one matrix product. No output may share the memory of an operand of it."""
    return _lower_region(body, shared, whole_rows=False)


def lower_update(body: Graph, shared: Shared = ()) -> Lowered:
    """`lower_matmul` with items that are whole rows of the product, so that an epilogue runs through all that it reads in
    order."""
    return _lower_region(body, shared, whole_rows=True)


def _lower_region(body: Graph, shared: Shared, *, whole_rows: bool) -> Lowered:
    if any(v.type.size == 0 for v in body.outputs):
        return Lowered(())
    return _Lowering(body, dict(shared), whole_rows=whole_rows).lower()


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of the product where it lies: its memory, and strides of its batch dimensions, rows and columns. Those of
    one that is to be `made` are such as if the result of its last elementwise op were stored."""

    buffer: Buffer
    matrices: Matrices
    made: Made | None = None


@dataclass(frozen=True, slots=True)
class Widened:
    """A factor that becomes float32 where it is read: narrow numbers of type `short`, and what multiplies them."""

    narrow: Factor
    short: str
    scale: Factor | None


@dataclass
class _Lowering(WithEpilogue):
    """One region on its way."""

    whole_rows: bool = False

    def make(self, target: Buffer) -> Launch:
        x, y = self.node.inputs
        widened = None if self.whole_rows else self.widened(y)
        if widened is not None:
            return self.multiply_widened(self.stored(self.factor(x)), widened, target)
        return self.multiply(self.factor(x), self.factor(y, of_b=True), target)

    # ---- operands

    def factor(self, value: Value, of_b: bool = False) -> Factor:
        """`value` read through strides where that can be, else to be made, else computed into scratch memory."""
        chain, source = follow(self.producers, value)
        if source in self.body.inputs:
            return in_place(self.body, chain, source, value) or self.compute(value)
        matrices = strides_through(chain, source.type, value.type)
        return self.compute(value) if matrices is None else Factor(NOWHERE, matrices, Made(value, source, of_b))

    def stored(self, factor: Factor) -> Factor:
        """`factor` in memory."""
        return factor if factor.made is None else replace(factor, buffer=self.compute(factor.made.source).buffer, made=None)

    def widened(self, value: Value) -> Widened | None:
        """`value`, the second factor, as the narrow numbers that it is cast from (`transforms.prologue`), where there is a
        kernel for that."""
        chain, source = follow(self.producers, value)
        node, scale = self.producers.get(source), None
        if node is not None and node.op.name == "mul":
            for one, other in (node.inputs, node.inputs[::-1]):
                inner, wide = follow(self.producers, one)
                cast = self.producers.get(wide)
                if cast is not None and cast.op.name == "cast":
                    outer, factors = follow(self.producers, other)
                    scale = in_place(self.body, [*chain, *outer], factors, value)
                    if scale is None or scale.matrices.row != 0:
                        return None
                    chain, node = [*chain, *inner], cast
                    break
        if node is None or node.op.name != "cast" or value.dtype is not dtypes.float32:
            return None
        inner, source = follow(self.producers, node.inputs[0])
        narrow, short = in_place(self.body, [*chain, *inner], source, value), source.dtype.short
        m, n, k = *self.product.shape[-2:], value.shape[-2]
        fits = narrow is not None and len(value.shape) == 2 and gemm_rows.widens(short, m, n, k, narrow.matrices)
        return Widened(narrow, short, scale) if narrow is not None and fits else None

    def compute(self, value: Value) -> Factor:
        """A kernel that stores `value`, a function of the body's inputs."""
        before = restrict(self.body, [value])
        place = self.new_scratch(value.type.nbytes)
        region = analyse(before, [])
        region.outputs = [(v, index, place) for v, index, _ in region.outputs]
        self.launches += lower_map(region)
        matrices = strides_through([], value.type, value.type)
        assert matrices is not None
        return Factor(place, matrices)

    # ---- the product

    def multiply(self, a: Factor, b: Factor, target: Buffer) -> Launch:
        batch, m, n = self.product.shape[:-2], self.product.shape[-2], self.product.shape[-1]
        k = self.node.inputs[0].shape[-1]
        rows_of_batch = fold_rows(batch, m, a.matrices, b.matrices)
        if rows_of_batch is not None:
            a, b = replace(a, matrices=rows_of_batch[0]), replace(b, matrices=rows_of_batch[1])
            batch, m = (), math.prod(batch) * m
        batch, first, second = merge_batch(batch, a.matrices, b.matrices)
        if len(batch) > gemm.BATCH_DIMENSIONS:
            a, b = self.compute(self.node.inputs[0]), self.compute(self.node.inputs[1])
            batch, first, second = merge_batch(self.product.shape[:-2], a.matrices, b.matrices)
        form = gemm.form_for(self.node.inputs[0].dtype.short, self.dtype.short)
        few_rows = not self.whole_rows and gemm_rows.fits(form, m, n, k, second)
        if few_rows or batch or form.right not in gemm.FLOATS:
            a, b = self.stored(a), self.stored(b)
        if few_rows:
            lines = Lines(self.node.inputs[0].dtype.short, form.right, form.total)
            arranged = gemm_rows.arrange(lines, batch, m, n, k, first, second)
            return self.carry_out(gemm_rows.source(lines), arranged, (a.buffer, b.buffer, target))
        blocking = choose_blocking(form, batch, (m, n, k), first, second, self.whole_rows, a.made is not None)
        if b.made is not None:
            shared = m > blocking.high * blocking.panel_rows
            blocking = replace(blocking, read_b="packed" if shared else "copied")
        arranged = gemm.arrange(form, batch, m, n, k, first, second, blocking)
        left = self.pack(arranged.pack_a, a, form)
        if b.made is not None and arranged.pack_b is None:
            integers = dict(zip(gemm.ARGUMENTS, arranged.integers, strict=True))
            name, source, arguments = multiply_made(self.body, b.made, form, left, target, integers)
            return Launch(name, source, arranged.items, arguments, self.blocks(arranged))
        pointers = left, self.pack(arranged.pack_b, b, form, of_b=True), target
        core = form if arranged.pack_b is None else gemm.core_of_panels(form)
        return self.carry_out(gemm.core_source(core), arranged, pointers)

    def multiply_widened(self, a: Factor, b: Widened, target: Buffer) -> Launch:
        """The product of a few rows with weights that are read as they are kept."""
        lines = Lines("f32", b.short, "f32", scaled=b.scale is not None)
        m, n, k = *self.product.shape, self.node.inputs[0].shape[-1]
        made = gemm_rows.arrange(lines, (), m, n, k, a.matrices, b.narrow.matrices)
        scale = () if b.scale is None else (b.scale.buffer, b.scale.matrices.first, b.scale.matrices.column)
        return self.carry_out(gemm_rows.source(lines), made, (a.buffer, b.narrow.buffer, target), scale)

    def carry_out(self, source: str, made: Arrangement, pointers: tuple[Buffer, Buffer, Buffer],
                  more: tuple[Buffer | int, ...] = ()) -> Launch:
        """The launch of a core; `more`: arguments behind `gemm.ARGUMENTS`."""
        return launch(source, made.items, *pointers, *made.integers, *more, blocks=self.blocks(made))

    def blocks(self, made: Arrangement) -> Blocks:
        """Which blocks of the product its items are."""
        integers = dict(zip(gemm.ARGUMENTS, made.integers, strict=True))
        sizes = {name: integers[name] for name in ("m", "n", "rows_per_item", "row_blocks", "columns_per_item",
                                                   "column_blocks")}
        last = len(self.product.shape) - 1
        first_dimension = last - 1 if integers["m"] == self.product.shape[-2] else 0
        return Blocks(sizes, gemm.LOCATE_ITEM, (first_dimension, last), self.whole_rows)

    def pack(self, packing: Packing | None, factor: Factor, form: Form, of_b: bool = False) -> Buffer:
        """The memory that the core reads: packed panels, or the factor itself."""
        if packing is None:
            return factor.buffer
        panels = self.new_scratch(packing.elements * dtypes.BY_SHORT[form.left].itemsize)
        if factor.made is not None:
            self.launches.append(pack_made(self.body, factor.made, form, packing, panels))
        else:
            source = gemm_pack.pack_text(form, packing.kind, of_b)
            self.launches.append(launch(source, packing.items, factor.buffer, panels, *packing.integers))
        return panels


# --- operands as strides --------------------------------------------------------------------------------------------


def read_through(body: Graph, value: Value) -> Factor | None:
    """`value`, where it is an input of `body` behind movement ops that strides can say."""
    chain, source = follow(body.producers(), value)
    return in_place(body, chain, source, value)


def in_place(body: Graph, chain: Sequence[Node], source: Value, value: Value) -> Factor | None:
    """`source`, where it is an input of `body`, read through `chain` as `value` is; None where strides cannot say it."""
    matrices = strides_through(chain, source.type, value.type) if source in body.inputs else None
    return None if matrices is None else Factor(Buffer(body.inputs.index(source)), matrices)


def strides_through(chain: Sequence[Node], source: TensorType, result: TensorType) -> Matrices | None:
    """How `source`, contiguous, is read as `result` through the movement ops of `chain` (last one first): None when
    some dimension has no one stride."""
    found = steps_through(chain, source, result)
    if found is None:
        return None
    first, strides = found
    return Matrices(strides[:-2], strides[-2], strides[-1], first)


def fold_rows(batch: tuple[int, ...], m: int, a: Matrices, b: Matrices) -> tuple[Matrices, Matrices] | None:
    """A batch of products with one B is one product with more rows, where the rows of A are evenly spaced."""
    if not batch or any(stride for size, stride in zip(batch, b.batch, strict=True) if size > 1):
        return None
    spacing, sizes = (*a.batch, a.row), (*batch, m)
    long = [(stride, size) for stride, size in zip(spacing, sizes, strict=True) if size > 1] or [(a.row, 1)]
    if any(outer != size * inner for (outer, _), (inner, size) in pairwise(long)):
        return None
    return Matrices((), long[-1][0], a.column, a.first), Matrices((), b.row, b.column, b.first)


def merge_batch(batch: tuple[int, ...], a: Matrices, b: Matrices) -> tuple[tuple[int, ...], Matrices, Matrices]:
    """The same batch with fewer dimensions: neighbours that both operands hold evenly spaced become one."""
    merged: list[tuple[int, int, int]] = []
    for size, x, y in zip(batch, a.batch, b.batch, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * x and merged[-1][2] == size * y:
            merged[-1] = merged[-1][0] * size, x, y
        else:
            merged.append((size, x, y))
    sizes, xs, ys = zip(*merged, strict=True) if merged else ((), (), ())
    return sizes, Matrices(xs, a.row, a.column, a.first), Matrices(ys, b.row, b.column, b.first)


