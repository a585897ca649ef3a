"""GPU lowering of recurrent layers: pack the recurrent weights, then the steps.

Products of the input with its weights, and gradients of weights, are products for all steps at once and no part of these
ops. What is left is a chain of small products, for which there are these ways:

- Where the packed weights stay in the first cache of a multiprocessor (`CACHED`), one launch makes all steps: a block has
  some rows of the batch and all units, so no block ever waits for another, and a step costs a few barriers. What a
  block reads of the weights per step it reads from that cache.
- Larger ones do not fit, and reading them from the second cache once per block and step would take longer than a launch.
  Then there is a launch for each step, in which every multiprocessor has a tile of rows and units.

Where a step's product is so large that a launch counts for little, it is a kernel of its own (`cuda_matmul`), 16-bit floats
on tensor cores, and the rest of the step is another one behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jitgrad import ops
from jitgrad.codegen.call import Call
from jitgrad.codegen.cuda_call import blocks_for, gpu_launch, is_wide, kernel_text, lowers_on_gpu
from jitgrad.codegen.cuda_index import filled
from jitgrad.codegen.cuda_matmul import lower_matmul
from jitgrad.codegen.cuda_steps import GATES, WARP, Form, Steps
from jitgrad.codegen.kernel import Buffer, CudaLaunch, CudaLowered
from jitgrad.dtypes import DType, float32
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.op import REGISTRY
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cuda import recurrence
from jitgrad.ops.recurrence import OPERANDS, RESULTS

CACHED = 160 << 10
"""Bytes of packed weights that stay in the first cache of a multiprocessor, of 192 KiB and more, beside shared memory."""

MULTIPROCESSORS = 128
"""Blocks that keep a GPU busy."""

APART = 1 << 27
"""Multiplications of a step from which on 16-bit floats are multiplied on tensor cores."""

CARRYING = ("lstm", "gru", "lstm_grad", "gru_grad")


def lower(call: Call, name: str, aligned: bool) -> CudaLowered:
    """The launches of the op with this name. Where there are no steps, gradients of what they begin with are 0."""
    weights, result = call.inputs[OPERANDS[name].index("w")], call.outputs[0]
    if not result.size:
        return CudaLowered(tuple([filled(call.output(k), t, 0) for k, t in enumerate(call.outputs) if t.size]))
    form = choose(name, weights.dtype, result.shape[1], weights.shape[1], bool(call.attrs.get("relu")), aligned)
    return _Lowering(call, name, form).lower()


class _Lowering:
    """One op on its way: the memory of its operands by name, and the scratch memory that it needs."""

    def __init__(self, call: Call, name: str, form: Form):
        self.call, self.form = call, form
        operands, unread = OPERANDS[name], REGISTRY[name].unread
        self.buffers = {key: call.input(k) for k, key in enumerate(operands) if k not in unread}
        self.buffers.update({key: call.output(k) for k, key in enumerate(RESULTS[name])})
        self.dtypes = {"carry": float32, "products": form.sum_dtype}
        self.scratch: list[int] = []
        self.weights = call.inputs[operands.index("w")]
        self.steps, self.batch = call.outputs[0].shape[:2]
        self.hidden, self.wide = self.weights.shape[1], is_wide(call)
        self.last = self.steps + 1 if form.backward else self.steps
        if name in CARRYING and form.dtype.itemsize == 2:
            self.new("carry", self.batch * self.hidden * 4)

    def new(self, name: str, nbytes: int) -> Buffer:
        self.scratch.append(nbytes)
        self.buffers[name] = self.call.scratch(len(self.scratch) - 1)
        return self.buffers[name]

    def lower(self) -> CudaLowered:
        launches = self.with_products_apart() if self.form.given else self.with_products()
        return CudaLowered(tuple(launches), tuple(self.scratch))

    def make(self, parts: Iterable[tuple[int, int]], tiles: int) -> list[CudaLaunch]:
        """Launches for parts of the steps, of blocks with so many `tiles` of units."""
        row_tiles = -(-self.batch // self.form.rows)
        return Steps(self.form, self.buffers, self.dtypes).launches(
            parts, row_tiles * (packed_shape(self.form, self.hidden)[0] // tiles), self.wide, steps=self.steps,
            batch=self.batch, hidden=self.hidden, row_tiles=row_tiles, tiles=tiles)

    def with_products(self) -> list[CudaLaunch]:
        tiles, depth, elements = packed_shape(self.form, self.hidden)
        pack = self.pack(self.buffers["w"], tiles * depth * elements, depth)
        cached = is_cached(self.form, self.hidden)
        parts = [(0, self.last)] if cached else [(n, n + 1) for n in range(self.last)]
        return [pack, *self.make(parts, tiles if cached else 1)]

    def pack(self, w: Buffer, elements: int, padded_depth: int) -> CudaLaunch:
        """The launch that packs the weights, which are `w` in what follows."""
        form, (rows, hidden) = self.form, self.weights.shape
        packed = self.new("w", elements * form.dtype.itemsize)
        steps = (0, 1, hidden) if form.backward else (hidden * hidden, hidden, 1)        # gate, unit, depth
        source = kernel_text(recurrence.pack_weights, self.wide, T=form.dtype.short)
        return gpu_launch(source, blocks_for(elements), w, packed, elements, form.lanes, rows if form.backward else hidden,
                          padded_depth, form.gates, form.units, hidden, *steps, wide=self.wide,
                          alignment=form.dtype.itemsize)

    def with_products_apart(self) -> list[CudaLaunch]:
        """A product and a cell in turn; the cell leaves a copy of what is multiplied next always in the same place."""
        form, w = self.form, self.buffers.pop("w")
        rows = self.weights.shape[0]
        depth, columns = (rows, self.hidden) if form.backward else (self.hidden, rows)
        latest = self.new("latest", self.batch * depth * form.dtype.itemsize)
        products = self.new("products", self.batch * columns * form.sum_dtype.itemsize)
        multiply = product(form, self.batch, depth, columns)
        again = _with_buffers(multiply, (latest, w, products))
        first = [] if form.backward else [_with_buffers(multiply, (self.buffers["h0"], w, products))]
        cells = self.make([(n, n + 1) for n in range(self.last)], 1)
        return [*first, cells[0], *[launch for cell in cells[1:] for launch in (again, cell)]]


def product(form: Form, batch: int, depth: int, columns: int) -> CudaLaunch:
    """States [batch, depth] times the weights, sums as they are."""
    builder = GraphBuilder("product")
    states = builder.input(TensorType(form.dtype, (batch, depth)))
    w = builder.input(TensorType(form.dtype, (depth, columns) if form.backward else (columns, depth)))
    with builder:
        made = ops.matmul(states, w if form.backward else ops.permute(w, axes=(1, 0)))
        body = builder.build([made if form.sum_dtype is form.dtype else ops.cast(made, dtype=form.sum_dtype)])
    lowered = lower_matmul(body, (), form.aligned)
    (launch,) = lowered.launches
    assert isinstance(launch, CudaLaunch), "no library was allowed"
    return launch


def _with_buffers(launch: CudaLaunch, places: tuple[Buffer, ...]) -> CudaLaunch:
    return replace(launch, arguments=tuple([places[a.index] if isinstance(a, Buffer) else a for a in launch.arguments]))


def choose(name: str, dtype: DType, batch: int, hidden: int, relu: bool, aligned: bool) -> Form:
    """How many rows a block has, and how many units a lane: few rows as long as that gives more multiprocessors something to
    do; as many units as there are, or as leave something to do for all multiprocessors."""
    kind, backward = name.removesuffix("_grad"), name.endswith("_grad")

    def form(units: int, rows: int, given: bool = False) -> Form:
        return Form(kind, backward, dtype, rows, units, relu, given, aligned)

    if pays_apart(dtype, batch, GATES[kind] * hidden, hidden):
        return form(1, 8, True)
    units = 1
    if kind == "rnn" or backward:
        units = next(u for u in (4, 2, 1) if u == 1 or hidden > WARP * u // 2)
    cached = is_cached(form(units, 4), hidden)
    few = cached and batch <= 4 * MULTIPROCESSORS
    rows = 4 if dtype.itemsize == 8 or batch <= 4 or few else 8
    while not cached and units > 1 and -(-batch // rows) * -(-hidden // (WARP * units)) < MULTIPROCESSORS:
        units //= 2
    return form(units, rows)


def pays_apart(dtype: DType, batch: int, rows: int, hidden: int) -> bool:
    """Whether the product of a step is so large that a kernel of its own makes it faster: on tensor cores, or in tiles that
    are large and enough for all multiprocessors."""
    if dtype.itemsize == 2:
        return batch * rows * hidden >= APART
    return -(-batch // 128) * -(-hidden // 128) >= MULTIPROCESSORS


def packed_shape(form: Form, hidden: int) -> tuple[int, int, int]:
    """Packed weights: tiles of units, the depth in whole warps, the elements of a warp."""
    depth = hidden * GATES[form.kind] if form.backward else hidden
    return -(-hidden // (WARP * form.units)), -(-depth // WARP) * WARP, WARP * form.lanes


def is_cached(form: Form, hidden: int) -> bool:
    tiles, depth, elements = packed_shape(form, hidden)
    return tiles * depth * elements * form.dtype.itemsize <= CACHED


@lowers_on_gpu("rnn")
def lower_rnn(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, "rnn", aligned)


@lowers_on_gpu("rnn_grad")
def lower_rnn_grad(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, "rnn_grad", aligned)


@lowers_on_gpu("lstm")
def lower_lstm(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, "lstm", aligned)


@lowers_on_gpu("lstm_grad")
def lower_lstm_grad(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, "lstm_grad", aligned)


@lowers_on_gpu("gru")
def lower_gru(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, "gru", aligned)


@lowers_on_gpu("gru_grad")
def lower_gru_grad(call: Call, aligned: bool) -> CudaLowered | None:
    return lower(call, "gru_grad", aligned)
