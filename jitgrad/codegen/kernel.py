"""The loop-level program. A fused region becomes one or more `Kernel`s; an emitter per target spells a Kernel as text.

    kernel    ::= Kernel(name, operands, sizes, body)
    operand   ::= Operand(name, dtype, type)                  a pointer argument, disjoint from all others
    statement ::= Loop(index, start, stop, body)              for index in range(start, stop)
                | Let(name, dtype, value, where, note)        name = dtype(value); dtype None: an index (int64)
                | Load(name, operand, index, lanes)           name = operand[index]
                | Store(operand, index, value, lanes)         operand[index] = value
                | Accumulate(name, how, value)                name = how(name, value); how "add": may reassociate
                | When(condition, body)                       if condition
    name, start, stop, index, value, condition                expressions of plain Python over names, as text

`sizes` are integer arguments: the text holds no number of the user's. Work items ``begin … end`` are names that every
CPU kernel knows. On the GPU a load or store may take several `lanes`, elements behind each other: then the name (value) is
as many names with commas between them. Then what lowering hands to the pipeline: `Launch`es, for the GPU `CudaLaunch`es
(text and arguments), over `Buffer`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Union

from jitgrad.dtypes import DType
from jitgrad.ir.graph import Where
from jitgrad.products import Attended, Convolved, Product

Statement = Union["Loop", "Let", "Load", "Store", "Accumulate", "When"]


@dataclass(frozen=True, slots=True)
class Operand:
    """A pointer argument, or the map of a matrix (`BoxMap`). `type` says, in the text's comment, what it points to."""

    name: str
    dtype: DType
    type: str = ""
    is_map: bool = False


@dataclass(slots=True)
class Loop:
    index: str
    start: str
    stop: str
    body: list[Statement] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Let:
    name: str
    dtype: DType | None
    value: str
    where: Where = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    operand: str
    index: str
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class Store:
    operand: str
    index: str
    value: str
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class Accumulate:
    name: str
    how: str
    value: str


@dataclass(slots=True)
class When:
    condition: str
    body: list[Statement] = field(default_factory=list)


@dataclass(slots=True)
class Kernel:
    """One function. Arguments: operands, then sizes; on the CPU behind ``begin, end, thread`` in the block ``args``.
    `tables`: operands whose pointers the body makes itself: from a table, or of memory that a block of threads shares."""

    name: str
    operands: tuple[Operand, ...]
    sizes: tuple[str, ...]
    body: list[Statement]
    tables: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Buffer:
    """The argument that points to memory number `index`: inputs first, then outputs, then scratch."""

    index: int


@dataclass(frozen=True, slots=True)
class BoxMap:
    """The argument that tells a GPU's copy engine of a matrix of 16-bit elements in `buffer`, `start` bytes behind its
    begin: `sizes` are elements of a line and lines, `pitch` bytes from line to line, `box` elements and lines of what is
    copied at once. Bytes are multiples of 16."""

    buffer: Buffer
    start: int
    sizes: tuple[int, int]
    pitch: int
    box: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Private:
    """The argument that points to private memory number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Function:
    """The argument that is the address of another kernel, which this one calls through ``invoke``. It is compiled and
    cached by itself, so that many kernels share it."""

    name: str
    source: str


Argument = Buffer | Private | Function | int


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Which block of its result an item of a launch makes. The dimensions of the result fall into those of batch, rows and
    columns: they end at `cuts`. `locate` are assignments over `item` and the names of `sizes`; the last ones give
    ``first_row, last_row, first_column, last_column`` and either ``batch`` or ``first_batch, last_batch``. With `whole_rows`
    an item has all columns, `n` of them. `planes`, of a convolution whose items have all columns, which are positions: of
    how many images an item has how many rows, channels, at most. (A launch of the gradient in a convolution's weights says
    the same of the gradient that it reads.)"""

    sizes: Mapping[str, int]
    locate: tuple[tuple[str, str], ...]
    cuts: tuple[int, int]
    whole_rows: bool = False
    planes: tuple[int, int] | None = None

    def locates(self, name: str) -> bool:
        return name in dict(self.locate)


@dataclass(frozen=True, slots=True)
class Launch:
    """One entry of the tape: `items` work items of the kernel with this text. `arguments` become ``args[1:]``. `blocks`, if
    known: what the items of the launch that makes a node's result are, for what follows it in the same kernel."""

    name: str
    source: str
    items: int
    arguments: tuple[Argument, ...]
    blocks: Blocks | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a node becomes: launches in order, the sizes in bytes of the scratch memory that they share, and of the private
    memory that each thread has for one item: of `private[k]` bytes there are as many as threads, one behind the other."""

    launches: tuple[Launch, ...]
    scratch: tuple[int, ...] = ()
    private: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """The argument that points to int64 numbers in device memory; a `Buffer` among them is the address of its memory."""

    entries: tuple[Buffer | int, ...]


@dataclass(frozen=True, slots=True)
class ErrorWord:
    """The argument that points to three int64 in device memory, zero before the launch: an error's code, item, value."""


@dataclass(frozen=True, slots=True)
class CudaLaunch:
    """One launch of the GPU kernel with this text: `grid` blocks of `threads` threads. Numbers among `arguments` are
    int32, int64 where `wide`. Pointers of arguments are multiples of `alignment` bytes. `dynamic`: bytes of shared memory
    of a block, beside what the text says."""

    name: str
    source: str
    grid: int
    threads: int
    arguments: tuple[Buffer | Table | BoxMap | ErrorWord | int, ...]
    alignment: int
    wide: bool
    dynamic: int = 0


@dataclass(frozen=True, slots=True)
class CudaLibraryCall:
    """What a library computes, in the place of a launch. `arguments`: operands, results, the library's workspace and, where
    a product has one, the bias."""

    name: str
    asked: Product | Convolved | Attended
    arguments: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class CudaLowered:
    """What a node becomes on a GPU: launches in order, and the sizes in bytes of the scratch memory that they share."""

    launches: tuple[CudaLaunch | CudaLibraryCall, ...]
    scratch: tuple[int, ...] = ()
