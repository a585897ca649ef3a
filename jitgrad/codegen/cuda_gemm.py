"""The loops of a matrix product on a GPU: a block of threads computes one tile of the result.

What goes in: a `Writer`, where the two factors lie (`Side`), and the `Tile`. What comes out: statements that leave the sums
of the tile in the registers of the threads, and statements that put a part of them into shared memory, where what follows
the product reads them row by row.

float32, float64 and integers are computed on CUDA cores: a thread has 16 / itemsize * 2 rows and as many columns, and while
it multiplies one pair of slices of the factors, the next pair is on its way into registers. bfloat16 and float16 are
computed on tensor cores, with float32 sums: three pairs of slices are in shared memory or on the way there, 16 bytes at a
time without registers in between; single elements wait in registers while a slice is multiplied. In shared memory a slice is
swizzled, so that the eight rows that a matrix load reads at once lie in different banks. Large tiles on sm_90a have
`cuda_warpgroup`.

Where TF32 is allowed (`jitgrad.precision`), float32 takes the way of the 16-bit floats: a row of a slice has as many bytes
and half as many elements, and what a warp has read is rounded to TF32 before it is multiplied. Matrix loads cannot
transpose elements of 32 bits, so a slice that lies step by step is read element by element, swizzled for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jitgrad.codegen.cuda_lanes import load_where
from jitgrad.codegen.cuda_templates import share
from jitgrad.codegen.kernel import BoxMap, Buffer, Let, Load, Operand, Statement, Store, When
from jitgrad.codegen.writer import Writer
from jitgrad.dtypes import DType, float32, int16, int32

PARTS = 2
"""A tile goes through shared memory in so many parts."""

STAGES = 3
"""Slices of each factor in shared memory on the way to tensor cores."""

SLICE = 64
"""Bytes of a row or column of a factor in one such slice; an instruction multiplies half of them."""

GROUP = 8
"""Rows of tiles that blocks go through column by column: what they read meanwhile stays in the second cache."""


@dataclass(frozen=True)
class Side:
    """A factor: A ("a"), whose outer dimension is that of rows, or B ("b"), where it is that of columns. `along_depth`:
    neighbours in its memory lie along the depth. `wide`: so that 16 bytes can be read at once.

    A thread fetches some *pieces* of each slice, 16 bytes that lie behind each other in shared memory. Here they lie behind
    each other in memory, too, or with a stride, `name`_outer or `name`_step; subclasses say where else."""

    name: str
    pointer: str
    dtype: DType
    along_depth: bool
    wide: bool

    @property
    def limit(self) -> str:
        """The size of the outer dimension."""
        return "m" if self.name == "a" else "n"

    @property
    def first(self) -> str:
        """Where the tile begins in the outer dimension."""
        return "first_row" if self.name == "a" else "first_column"

    def locate(self, writer: Writer, tile: Tile) -> None:
        """Where this thread's pieces of every slice begin: in the outer dimension, in the depth, in the first slice."""
        across = (tile.depth if self.along_depth else tile.extent(self.name)) // tile.lanes
        for c in tile.chunks(self.name):
            number, tag = f"(thread() + {c * tile.threads})", f"{self.name}{c}"
            line, column = f"{number} // {across}", f"{number} % {across} * {tile.lanes}"
            outer, step = (line, column) if self.along_depth else (column, line)
            writer.let(f"outer_{tag}", outer)
            writer.let(f"step_{tag}", step)
            writer.let(f"place_{tag}", f"{self.name}_start + {self.base(tag)}")
            writer.let(f"room_{tag}", f"{self.limit} - {self.first} - outer_{tag}")

    def base(self, tag: str) -> str:
        """What a piece has in front of it in every slice."""
        return f"({self.first} + outer_{tag}) * {self.name}_outer + step_{tag} * {self.name}_step"

    def advance(self, tag: str) -> str:
        """What the slice at step ``ahead`` of the depth adds to that."""
        return f"ahead * {self.name}_step"

    def find(self, writer: Writer, tile: Tile, tag: str) -> None:
        """Where a piece of the slice at ``ahead`` begins, and how many elements of it exist."""
        left, room = f"k - ahead - step_{tag}", f"room_{tag}"
        many, any_ = (left, room) if self.along_depth else (room, left)
        writer.let("from_", f"place_{tag} + {self.advance(tag)}")
        writer.let("there", f"max(0, min({many}, {tile.lanes})) if {any_} > 0 else 0")

    def go_on(self, writer: Writer, tile: Tile) -> None:
        """What is known of the slice that `find` is asked for next, where that is not ``ahead`` alone."""

    def load(self, writer: Writer, tile: Tile, c: int, names: list[str], pointer: str, dtype: DType) -> None:
        """Piece number `c` of the slice at ``ahead`` into variables, zeros where there are no elements. `pointer`, to
        elements of `dtype`, is the factor's."""
        self.find(writer, tile, f"{self.name}{c}")
        stride = f"{self.name}_step" if self.along_depth else f"{self.name}_outer"
        guarded = [([Load(", ".join(names), pointer, "from_", tile.lanes)], names)] if self.wide else [
            ([Load(name, pointer, f"from_ + {i} * {stride}")], [name]) for i, name in enumerate(names)]
        for i, (some, called) in enumerate(guarded):
            for statement in load_where(f"there > {i}", list(some), called, {pointer: dtype}):
                writer.emit(statement)


@dataclass(frozen=True)
class Tile:
    """`size` rows and `columns` columns of the result, computed by `threads` threads, `depth` steps at a time. It goes
    through shared memory in `parts` parts, which have `group` rows out of every `span`. `dtype`: of the factors; `tf32`:
    float32 on tensor cores."""

    dtype: DType
    size: int
    depth: int
    threads: int
    group: int
    span: int
    columns: int
    parts: int = PARTS
    tf32: bool = False

    @property
    def on_tensor_cores(self) -> bool:
        return self.tf32 or self.dtype.itemsize == 2

    @property
    def sum_dtype(self) -> DType:
        return float32 if self.on_tensor_cores else self.dtype

    @property
    def lanes(self) -> int:
        """Elements of an access of 16 bytes."""
        return 16 // self.dtype.itemsize

    def extent(self, side: str) -> int:
        """Rows of A in a slice, columns of B."""
        return self.size if side == "a" else self.columns

    def chunks(self, side: str) -> range:
        """The pieces of 16 bytes of a slice of A or B that a thread fetches, by number."""
        return range(self.extent(side) * self.depth // self.lanes // self.threads)

    @property
    def pitch(self) -> int:
        """From row to row of a part in shared memory."""
        return self.columns + 8

    @property
    def slice_pitch(self) -> int:
        """From step to step of a slice, on CUDA cores."""
        return self.size + self.lanes

    def slice_bytes(self, side: str) -> int:
        return self.extent(side) * self.depth * self.dtype.itemsize

    @property
    def stage_bytes(self) -> int:
        """Of a slice of both."""
        return self.slice_bytes("a") + self.slice_bytes("b")

    @property
    def shared_elements(self) -> int:
        slices = STAGES * self.stage_bytes // 4 if self.on_tensor_cores else 4 * self.depth * self.slice_pitch
        return max(slices, self.size // self.parts * self.pitch)


def tile_of(dtype: DType, large: bool, tf32: bool = False) -> Tile:
    """The tile for factors of `dtype`; a `large` one wherever there are enough of them for all multiprocessors. `tf32`:
    float32 may be rounded to TF32."""
    tf32 = tf32 and dtype is float32
    if tf32 or dtype.itemsize == 2:
        depth, size, threads = SLICE // dtype.itemsize, 128 if large else 64, 256 if large else 128
        return Tile(dtype, size, depth, threads, size // 4, size // 2, size, tf32=tf32)
    size = (32 if large else 16) * (16 // dtype.itemsize)
    return Tile(dtype, size, 8, 256 if large else 64, size // PARTS, size, size)


def flat_tile(dtype: DType) -> Tile:
    """64 rows and 128 columns, on tensor cores: a warp does as much as in a large tile, where there are few rows."""
    return Tile(dtype, 64, SLICE // dtype.itemsize, 128, 16, 32, 128, tf32=dtype is float32)


class Loops:
    """The product of one tile in the making. Names that the kernel knows: ``m, n, k``; ``first_row, first_column``, where
    the tile begins; ``a_start, b_start``, where the matrices of its batch begin; ``a_outer, a_step, b_outer, b_step``,
    strides along the outer dimension and along the depth. `origin`: the name of the first step of the depth, if that is not
    0; ``k`` is the end."""

    def __init__(self, writer: Writer, tile: Tile, a: Side, b: Side, origin: str = ""):
        self.writer, self.tile, self.sides, self.origin = writer, tile, (a, b), origin
        self.maps: dict[Operand, BoxMap] = {}                                      # operands beside those of the writer
        self.memory = self.share()

    def share(self) -> str:
        """The memory that the threads share, by name."""
        return share(self.writer, self.tile.sum_dtype, self.tile.shared_elements)

    @property
    def dynamic_bytes(self) -> int:
        """Of shared memory whose size the launch says."""
        return 0

    def write(self) -> None:
        """Everything up to the sums. No thread needs the shared memory any more."""
        raise NotImplementedError

    def place_part(self, part: int) -> list[Statement]:
        """Stores of the sums of a part into shared memory, row by row."""
        raise NotImplementedError

    def call(self, text: str) -> None:
        self.writer.emit(Let("_", None, text))

    def view(self, name: str, of: str) -> str:
        """`of`, an operand of 16-bit floats or shared memory, as 16-bit integers: bits that nobody computes with."""
        self.writer.tables[Buffer(-1 - len(self.writer.tables))] = Operand(name, int16)
        return self.writer.let(name, f"pointer_as({of}, i16)")

    def names(self, side: Side, c: int) -> list[str]:
        """The variables that hold a piece on its way."""
        return [f"v_{side.name}{c}_{i}" for i in range(self.tile.lanes)]

    def at(self, number: str) -> str:
        """The first step of a slice."""
        text = f"{number} * {self.tile.depth}"
        return f"{self.origin} + {text}" if self.origin else text

    @property
    def slices(self) -> str:
        total = f"k - {self.origin}" if self.origin else "k"
        return f"({total} + {self.tile.depth - 1}) // {self.tile.depth}"


# ---- CUDA cores ------------------------------------------------------------------------------------------------------


class Scalar(Loops):
    """float32 and float64, integers of 32 and 64 bits."""

    def write(self) -> None:
        writer, tile = self.writer, self.tile
        lanes, across = tile.lanes, tile.size // (2 * tile.lanes)
        for side in self.sides:
            side.locate(writer, tile)
        writer.let("x", f"thread() % {across} * {lanes}")
        writer.let("y", f"thread() // {across} * {lanes}")
        for i, j in self.sums():
            writer.emit(Let(f"c{i}_{j}", tile.dtype, "0"))
        writer.let("ahead", self.origin or "0")
        self.fetch()
        writer.let("into", "0")
        self.keep()
        self.call("barrier()")
        writer.open("slice", "0", self.slices)
        writer.let("out_of", f"slice % 2 * {2 * tile.depth * tile.slice_pitch}")
        writer.let("ahead", self.at("(slice + 1)"))
        self.fetch()
        self.multiply()
        writer.let("into", f"{2 * tile.depth * tile.slice_pitch} - out_of")
        self.keep()
        self.call("barrier()")
        writer.close()

    def sums(self) -> Iterator[tuple[int, int]]:
        return ((i, j) for i in range(2 * self.tile.lanes) for j in range(2 * self.tile.lanes))

    def fetch(self) -> None:
        """A slice of each factor, into registers: zeros where there are no elements."""
        for side in self.sides:
            for c in self.tile.chunks(side.name):
                side.load(self.writer, self.tile, c, self.names(side, c), side.pointer, side.dtype)

    def keep(self) -> None:
        """What was fetched, into shared memory, where it lies step by step."""
        tile = self.tile
        for number, side in enumerate(self.sides):
            for c in tile.chunks(side.name):
                tag, names = f"{side.name}{c}", self.names(side, c)
                place = (f"into + {number * tile.depth * tile.slice_pitch} + step_{tag} * {tile.slice_pitch} "
                         f"+ outer_{tag}")
                if not side.along_depth:
                    self.writer.emit(Store(self.memory, place, ", ".join(names), tile.lanes))
                    continue
                for i, name in enumerate(names):
                    self.writer.emit(Store(self.memory, f"{place} + {i * tile.slice_pitch}", name))

    def multiply(self) -> None:
        """One slice, step by step: what a thread reads of it, then all products."""
        writer, tile = self.writer, self.tile
        writer.open("step", "0", str(tile.depth))
        for number, (name, place) in enumerate((("a", "y"), ("b", "x"))):
            for half in range(2):
                names = ", ".join(f"{name}{half * tile.lanes + i}" for i in range(tile.lanes))
                first = number * tile.depth * tile.slice_pitch + half * tile.size // 2
                writer.emit(Load(names, self.memory, f"out_of + step * {tile.slice_pitch} + {place} + {first}", tile.lanes))
        for i, j in self.sums():
            if tile.dtype.is_floating_point:
                writer.let(f"c{i}_{j}", f"multiply_add(a{i}, b{j}, c{i}_{j})")
            else:
                writer.emit(Let(f"c{i}_{j}", tile.dtype, f"c{i}_{j} + a{i} * b{j}"))
        writer.close()

    def place_part(self, part: int) -> list[Statement]:
        tile, made = self.tile, list[Statement]()
        for i in range(tile.lanes):
            for half in range(2):
                names = [f"c{part * tile.lanes + i}_{half * tile.lanes + j}" for j in range(tile.lanes)]
                made.append(Store(self.memory, f"(y + {i}) * {tile.pitch} + x + {half * tile.size // 2}", ", ".join(names),
                                  tile.lanes))
        return made


# ---- tensor cores ----------------------------------------------------------------------------------------------------


class Tensor(Loops):
    """bfloat16 and float16, and float32 as TF32: every warp has `span` rows and a quarter (of 64 rows, a half) of the
    columns."""

    def __init__(self, writer: Writer, tile: Tile, a: Side, b: Side, origin: str = ""):
        super().__init__(writer, tile, a, b, origin)
        self.across = tile.threads // 32 * tile.span // tile.size                  # warps beside each other
        self.width = tile.columns // self.across
        self.bits = int32 if tile.tf32 else int16
        self.raw = {side.name: self.view(f"{side.name}_bits", side.pointer) for side in self.sides}
        if not all(side.wide for side in self.sides):
            self.pieces = self.view("pieces", self.memory)

    def view(self, name: str, of: str) -> str:
        """`of`, an operand or shared memory, as integers of the operands' size: bits that nobody computes with."""
        self.writer.tables[Buffer(-1 - len(self.writer.tables))] = Operand(name, self.bits)
        return self.writer.let(name, f"pointer_as({of}, {self.bits.short})")

    def write(self) -> None:
        writer, tile = self.writer, self.tile
        for side in self.sides:
            side.locate(writer, tile)
            for c in tile.chunks(side.name):
                self.locate_spot(side, f"{side.name}{c}")
        writer.let("memory", f"shared_address({self.memory})")
        self.locate_fragments()
        for i, j in self.sums():
            writer.let(f"c{i}_{j}", "(f32(0), f32(0), f32(0), f32(0))")
        writer.let("slices", self.slices)
        writer.let("into", "0")
        writer.let("out_of", "0")
        for early in range(STAGES - 1):
            self.copy(str(early))
            self.keep()
            self.turn("into")
        writer.open("slice", "0", "slices")
        self.call(f"copy_wait({STAGES - 2})")
        self.call("barrier()")
        self.copy(f"slice + {STAGES - 1}")
        for half in range(2):
            self.multiply(half)
        self.keep()
        self.turn("into")
        self.turn("out_of")
        writer.close()
        self.call("copy_wait(0)")
        self.call("barrier()")

    def turn(self, stage: str) -> None:
        """To the next one of the places for slices, by the name of where it begins, in bytes."""
        size = self.tile.stage_bytes
        self.writer.let(stage, f"{stage} + {size} if {stage} < {(STAGES - 1) * size} else 0")

    def sums(self) -> Iterator[tuple[int, int]]:
        return ((i, j) for i in range(self.tile.span // 16) for j in range(self.width // 8))

    # ---- slices on their way into shared memory

    def locate_spot(self, side: Side, tag: str) -> None:
        """Where a piece of 16 bytes goes, in bytes from where its slice begins."""
        lanes, line = self.tile.lanes, self.tile.extent(side.name) * self.tile.dtype.itemsize
        if side.along_depth:
            spot = f"outer_{tag} * {SLICE} + (step_{tag} // {lanes} ^ (outer_{tag} >> 1 & 3)) * 16"
        elif self.tile.tf32:
            spot = f"step_{tag} * {line} + (outer_{tag} // {lanes} ^ (step_{tag} & 3) * 2) * 16"
        else:
            spot = f"step_{tag} * {line} + (outer_{tag} // {lanes} ^ (step_{tag} & 7)) * 16"
        self.writer.let(f"spot_{tag}", spot)

    def copy(self, number: str) -> None:
        """Begin to copy slice `number`, if there is one: 16 bytes at a time go into shared memory by themselves, and are a
        group of copies in any case; single elements go into registers, from which `keep` takes them."""
        writer, tile = self.writer, self.tile
        writer.let("next_", number)
        writer.let("ahead", self.at("next_"))
        if wide := [side for side in self.sides if side.wide]:
            writer.enter(When("next_ < slices"))
            for side, tag in [(one, f"{one.name}{c}") for one in wide for c in tile.chunks(one.name)]:
                side.find(writer, tile, tag)
                self.call(f"copy_async(memory + {self.into(side)} + spot_{tag}, {self.raw[side.name]}, from_, "
                          f"there * {tile.dtype.itemsize})")
            for side in wide:
                side.go_on(writer, tile)
            writer.close()
        for side in self.sides:
            for c in () if side.wide else tile.chunks(side.name):
                side.load(writer, tile, c, self.names(side, c), self.raw[side.name], self.bits)
        self.call("copy_commit()")

    def into(self, side: Side) -> str:
        """Where the next slice of a factor begins, in bytes."""
        return "into" if side is self.sides[0] else f"into + {self.tile.slice_bytes('a')}"

    def keep(self) -> None:
        """What is in registers, into shared memory."""
        for side in self.sides:
            for c in () if side.wide else self.tile.chunks(side.name):
                place = f"({self.into(side)} + spot_{side.name}{c}) // {self.tile.dtype.itemsize}"
                self.writer.emit(Store(self.pieces, place, ", ".join(self.names(side, c)), self.tile.lanes))

    # ---- from there into registers, and the products

    def locate_fragments(self) -> None:
        """Which row of 16 bytes of the first fragment, 16 rows of 32 bytes, each lane names: lanes 0 … 7 those of the first
        matrix of 8 rows, and so on; of A the second matrix is the next one in the outer dimension, of B in the depth. In a
        slice of float32 that lies step by step: which element is the lane's own, as a place among all of shared memory."""
        writer, tile = self.writer, self.tile
        writer.let("lane", "thread() % 32")
        writer.let("warp", "thread() // 32")
        writer.let("warp_row", f"warp // {self.across} * {tile.span}")
        writer.let("warp_column", f"warp % {self.across} * {self.width}")
        for side, first, bits in zip(self.sides, ("warp_row", "warp_column"), ((3, 4), (4, 3)), strict=True):
            outer, deep = (f"(lane >> {bit} & 1)" for bit in bits)
            if side.along_depth:
                writer.let(f"line_{side.name}", f"{first} + {outer} * 8 + lane % 8")
                line = f"line_{side.name}"
                spot = f"{line} * {SLICE} + ({deep} ^ ({line} >> 1 & 3)) * 16"
            elif tile.tf32:
                spot = f"lane % 4 * {tile.extent(side.name)} + (({first} + lane // 4) ^ lane % 4 * 8)"
            else:
                line = f"({deep} * 8 + lane % 8) * {2 * tile.extent(side.name)}"
                spot = f"{line} + ((({first} >> 3) + {outer}) ^ (lane % 8)) * 16"
            writer.let(f"fragment_{side.name}", spot)

    def multiply(self, half: int) -> None:
        """Half of the depth: all fragments of the warp, then all products of two of them."""
        kind = "tf32" if self.tile.tf32 else self.tile.dtype.short
        for number, (side, size) in enumerate(zip(self.sides, (self.tile.span, self.width), strict=True)):
            for i in range(size // 16):
                self.load_fragment(side, number, i, half)
        for i, j in self.sums():
            a = ", ".join(f"a{i}_{w}" for w in range(4))
            b = ", ".join(f"b{j // 2}_{j % 2 * 2 + w}" for w in range(2))
            self.writer.let(f"c{i}_{j}", f"multiply_{kind}(({a}), ({b}), c{i}_{j})")

    def load_fragment(self, side: Side, number: int, i: int, half: int) -> None:
        tile, place, begin = self.tile, f"fragment_{side.name}", number * self.tile.slice_bytes("a")
        names = [f"{'raw_' * tile.tf32}{side.name}{i}_{w}" for w in range(4)]
        if tile.tf32 and not side.along_depth:
            self.load_elements(side, number, i, half)
        elif side.along_depth:
            fixed, turned = 16 * i * SLICE, half * SLICE // 2
            self.writer.let(", ".join(names),
                            f"load_matrix_x4(memory + out_of + {begin + fixed} + ({place} ^ {turned}))")
        else:
            fixed, turned = half * tile.slice_bytes(side.name) // 2, 32 * i
            self.writer.let(", ".join(names), "load_matrix_x4_transposed("
                            f"memory + out_of + {begin + fixed} + ({place} ^ {turned}))")
        for name in names if tile.tf32 else ():
            self.writer.let(name.removeprefix("raw_"), f"tf32({name})")

    def load_elements(self, side: Side, number: int, i: int, half: int) -> None:
        """The four elements of a fragment that a lane multiplies: words of A and of B are in another order, see
        `locate_fragments`. Each element by itself: 8 columns of 4 steps are in 32 banks."""
        tile, place = self.tile, f"fragment_{side.name}"
        for w in range(4):
            outer, deep = (w % 2, w // 2) if side.name == "a" else (w // 2, w % 2)
            fixed = number * tile.slice_bytes("a") // 4 + (half * tile.depth // 2 + 4 * deep) * tile.extent(side.name)
            self.writer.emit(Load(f"raw_{side.name}{i}_{w}", self.memory,
                                  f"out_of // 4 + {fixed} + ({place} ^ {16 * i + 8 * outer})"))

    def place_part(self, part: int) -> list[Statement]:
        """A thread has two neighbours of a row of every product, and two in the row 8 below."""
        tile, made = self.tile, list[Statement]()
        for f in range(tile.group // 16):
            for j in range(self.width // 8):
                names = [f"s{part}_{f}_{j}_{w}" for w in range(4)]
                made.append(Let(", ".join(names), None, f"c{part * tile.group // 16 + f}_{j}"))
                for half in range(2):
                    row = f"(warp // {self.across} * {tile.group} + lane // 4 + {f * 16 + half * 8})"
                    made.append(Store(self.memory, f"{row} * {tile.pitch} + warp_column + lane % 4 * 2 + {j * 8}",
                                      ", ".join(names[2 * half:2 * half + 2]), 2))
        return made


def write_place(writer: Writer, tile: Tile, batch: int) -> None:
    """Which tile of which product a block computes; `batch` dimensions of a batch."""
    if batch:
        writer.let("tile", "block() % (row_tiles * column_tiles)")
        writer.let("batch", "block() // (row_tiles * column_tiles)")
    else:
        writer.let("tile", "block()")
    writer.let("strip", f"column_tiles * {GROUP}")
    writer.let("top", f"tile // strip * {GROUP}")
    writer.let("height", f"min(row_tiles - top, {GROUP})")
    writer.let("first_row", f"(top + tile % strip % height) * {tile.size}")
    writer.let("first_column", f"tile % strip // height * {tile.columns}")
    rest = "batch"
    for d in reversed(range(batch)):
        writer.let(f"batch_{d}", f"{rest} % size_{d}" if d else rest)
        rest = f"{rest} // size_{d}"
    for name in ("a", "b"):
        terms = [f"batch_{d} * {name}_{d}" for d in range(batch)]
        writer.let(f"{name}_start", " + ".join([f"{name}_first", *terms]))


