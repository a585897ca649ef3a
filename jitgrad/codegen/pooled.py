"""Kernels that call compiled ones item by item, and pool whole planes in between: a generated text around them.

Planes are what a convolution makes, and what the gradient in its weights reads. `kernel.Blocks` says which of them belong
to an item. Behind the item of a convolution its planes are pooled (`codegen.epilogue`); in front of an item of the gradient
in the weights, the gradient of what was pooled is spread over the planes that it reads. If nobody else needs these planes,
they lie in memory that each thread has of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jitgrad.codegen.call import lower_call
from jitgrad.codegen.emit_cpu import emit
from jitgrad.codegen.kernel import Blocks, Buffer, Function, Launch, Lowered, Operand, Private
from jitgrad.codegen.templates import kernel_name
from jitgrad.codegen.writer import Writer
from jitgrad.ir.axes import Axes
from jitgrad.ir.graph import Graph, Node, Value
from jitgrad.kernels.cpu.tile import MOST_ARGUMENTS

OWN = Buffer(-1)                                # stands for memory that each thread has of its own
MOST = 1 << 19                                  # bytes of an item's planes for which the second cache has room


@dataclass(frozen=True, slots=True)
class Planes:
    """A value of which an item has whole planes, of `span` elements from the first to the last, and its memory; where that
    is `OWN`, `private` is meant."""

    value: Value
    memory: Buffer
    span: int
    private: Private


def span_of_item(value: Value, blocks: Blocks | None) -> int:
    """How many elements of `value` lie between the begin of an item's planes and their end; 0 where items have no whole
    planes, or so many that no cache has room for them."""
    images, channels = (blocks and blocks.planes) or (0, 0)
    span = ((images - 1) * value.shape[1] + channels) * math.prod(value.shape[2:])
    return span if images and span * value.dtype.itemsize <= MOST else 0


def lower_pool(node: Node, memory: dict[Value, Buffer]) -> Launch:
    """The launch of a window op: its items are rows or planes."""
    lowered = lower_call(node)
    assert lowered is not None
    (made,) = lowered.launches
    return with_memory(made, [memory[v] for v in (*node.inputs, *node.outputs)])


def with_memory(made: Launch, memory: Sequence[Buffer]) -> Launch:
    """`made` with ``memory[k]`` in the place of buffer number k."""
    return replace(made, arguments=tuple([memory[a.index] if isinstance(a, Buffer) else a for a in made.arguments]))


@dataclass
class Calls:
    """The calls in a kernel that `writer` writes. The loop over items is open, and what `blocks` locates is known."""

    writer: Writer
    blocks: Blocks
    planes: Planes | None
    called: dict[str, Launch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """With `planes` come `channels` and, of those that are the thread's own, a pointer to where all would begin."""
        if self.planes is None:
            return
        value, writer = self.planes.value, self.writer
        writer.size("channels", value.shape[1])
        if self.planes.memory == OWN:
            own = writer.operand(OWN, value.dtype, f"{value.type}, what an item has of it")
            writer.size("own_size", self.planes.span)
            writer.size("plane_size", math.prod(value.shape[2:]))
            first = "batch" if self.blocks.locates("batch") else "first_batch"
            writer.let("planes", f"advance({own}, thread * own_size - ({first} * channels + first_row) * plane_size)")
            writer.tables[OWN] = Operand("planes", value.dtype)
            writer.table_level = len(writer.levels) - 1

    def call(self, launch: Launch, begin: str, end: str) -> None:
        """Items `begin` … `end` of a compiled kernel."""
        place, count = self.writer.size(f"call_{len(self.called)}", 0), len(launch.arguments)
        self.called[place] = launch
        call = f"invoke(args, {place}, "
        if OWN in launch.arguments:
            assert count <= MOST_ARGUMENTS and launch.arguments.count(OWN) == 1
            call = f"invoke_on(args, {place}, {count}, {launch.arguments.index(OWN) + 1}, planes, "
        self.writer.let("_", f"{call}{begin}, {end}, thread)")

    def pool(self, pools: Sequence[Launch]) -> None:
        """Launches of window ops, for the item's planes."""
        if self.planes is None:
            return
        writer, image = self.writer, "batch" if self.blocks.locates("batch") else "image"
        if image == "image":
            writer.open(image, "first_batch", "last_batch")
        for k, launch in enumerate(pools):
            lines = writer.size(f"lines_{k}", launch.items // math.prod(self.planes.value.shape[:2]))
            self.call(launch, *[f"({image} * channels + {row}) * {lines}" for row in ("first_row", "last_row")])
        writer.close(image == "image")

    def launch(self, name: str, items: int) -> Launch:
        """The finished kernel. The compiled kernels' addresses and their arguments stand behind its own."""
        place, behind = 1 + len(self.writer.operands) + len(self.writer.sizes), list[Function | Buffer | Private | int]()
        for called, launch in self.called.items():
            self.writer.sizes[called] = place + len(behind)
            behind += [Function(launch.name, launch.source), *launch.arguments]
        kernel, arguments = self.writer.kernel(name)
        given = [self.planes.private if a == OWN and self.planes else a for a in (*arguments, *behind)]
        return Launch(name, emit(kernel), items, tuple(given))


def lower_pool_gradient(body: Graph, shared: Sequence[tuple[int, int]] = ()) -> Lowered | None:
    """The launches of a region of the gradient in a convolution's weights, whose other operand is the gradient of what was
    pooled: this is spread over the planes that an item reads, in memory of the thread's own."""
    pool, node = body.nodes
    alone, value = lower_call(node), pool.output
    if alone is None or not alone.launches:
        return alone
    first, *others = alone.launches
    span = span_of_item(value, first.blocks)
    memory = {v: Buffer(k) for k, v in enumerate((*body.inputs, *body.outputs))}
    scratch = [Buffer(len(memory) + k) for k in range(len(alone.scratch) + 1)]
    memory[value] = OWN if span else scratch[-1]
    made = [with_memory(launch, [memory[v] for v in (*node.inputs, *node.outputs)] + scratch) for launch in (first, *others)]
    spread = lower_pool(pool, memory)
    if not span:
        return replace(alone, launches=(spread, *made), scratch=(*alone.scratch, value.type.nbytes))
    planes = Planes(value, OWN, span, Private(len(alone.private)))
    made[0] = spread_and_read(kernel_name(body).removeprefix("fused_"), spread, made[0], planes)
    return replace(alone, launches=tuple(made), private=(*alone.private, span * value.dtype.itemsize))


def spread_and_read(name: str, spread: Launch, read: Launch, planes: Planes) -> Launch:
    """The kernel that runs `spread` for an item's planes, and then the item of `read`."""
    writer, blocks = Writer(Axes(), {}, {}), read.blocks
    assert blocks is not None
    for size, value in blocks.sizes.items():
        writer.size(size, value)
    writer.open("item", "begin", "end")
    for place, expression in blocks.locate:
        writer.let(place, expression)
    calls = Calls(writer, blocks, planes)
    calls.pool([spread])
    calls.call(read, "item", "item + 1")
    return calls.launch(name, read.items)


def spreads_in_cache(body: Graph) -> bool:
    """Whether `lower_pool_gradient` makes one kernel of both."""
    pool, node = body.nodes
    alone = lower_call(node)
    return alone is not None and bool(alone.launches) and span_of_item(pool.output, alone.launches[0].blocks) > 0
