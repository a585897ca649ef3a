"""Pieces of contractions as LLVM text: the micro-kernel, which keeps a tile of C in registers while a loop over the depth
adds outer products of a column of A and a row of B to it, and the transpose of a square block.

There is one function for each of a few shapes (`Tile.forms`). The text is as it should run, so it is linked into a kernel
after LLVM's passes, which would take half of the kernel's compile time and find nothing to do. `tile_native` writes the
calls; names say what is to be defined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jitgrad.kernels.cpu.tile_transform import transform_text
from jitgrad.kernels.cpu.vector_text import VectorText, attributes

PARAMETERS = ("columns", "depth", "a", "a_rows", "a_step", "b", "b_step", "c", "c_row", "accumulate")
"""Those of `tile.multiply_tile` without `rows`, with addresses for pointers and offsets, and strides in bytes. `a_rows`
points to the odd multiples of A's row stride: read from memory they stay independent of each other, and the loop
addresses each row by a base, one of them and a scale; LLVM would else walk from row to row, and wait for each addition.
Of `tile.multiply_placed`, `b_step` is the address of the places."""

AHEAD = ("x", "x_step", "y", "y_step")
"""Those that `tile.multiply_ahead` has besides."""

POINTERS = frozenset(("a", "a_rows", "b", "c", "x", "y"))

_MULTIPLY = re.compile(r"multiply_(\d+)x(\d+)_v(\d+)f(\d+)(?:_(masked|clamped))?(?:_(rows|steps))?(_placed|_ahead)?")
_TRANSPOSE = re.compile(r"transpose_v(\d+)f(\d+)")
_TRANSFORM = re.compile(r"(winograd_\w+)_v(\d+)f(\d+)")

UNROLLED = 4
"""Steps of the depth in one turn of the loop where A is adjacent."""

TURNS = "turns"                                 # the name of that loop

_DEFINITION = """\
define void @{name}({parameters}) {attributes} {{
entry:
{entry}
  br label %begin
begin:
{begin}
{loops}
  %more = icmp ne i64 %accumulate, 0
  br i1 %more, label %add, label %finish
add:
{add}
  br label %finish
finish:
{finish}
  ret void
}}
"""

_LOOP = """\
  %{name}.any = icmp sge i64 %{before}.left, {steps}
  br i1 %{name}.any, label %{name}, label %{after}
{name}:
{arriving}
{body}
  %{name}.left.next = sub i64 %{name}.left, {steps}
  %{name}.again = icmp sge i64 %{name}.left.next, {steps}
  br i1 %{name}.again, label %{name}, label %{after}
{after}:
{leaving}"""

@dataclass(frozen=True, slots=True)
class MicroKernel(VectorText):
    """One shape: exactly `rows` rows and `vectors` vectors of `lanes` elements of `bits` bits. With an `edge`, `columns`
    ends inside of the last vector, and elements from there on are neither read nor written: "masked" is for processors that
    have instructions for it; "clamped" reads and writes a last vector that ends at the last column, or, where the first
    vector is the last one, element by element, the last of them several times.

    `adjacent` says of A what lies side by side in memory, "rows" or "steps" ("": neither has to). Then an instruction can
    multiply with an element of A where it lies, at a fixed distance from a register; with an index register beside it,
    the processor would take it apart again. Every second row does so. Without, each row takes one instruction more, and a
    core that serves two threads cannot bring in so many; with all of them, there are more loads than its ports can do.
    `placed`: a table says where the rows of B are. `ahead`: where A is adjacent, each turn of the loop fetches an element
    of x and one of y into the second cache. A core waits for memory that the loop itself reaches as fast as it multiplies;
    spread over all of the loop's turns, what comes next costs nothing."""

    rows: int
    vectors: int
    lanes: int
    bits: int
    edge: str
    adjacent: str = ""
    placed: bool = False
    ahead: bool = False

    @property
    def name(self) -> str:
        kinds = self.edge, self.adjacent, "placed" if self.placed else "ahead" if self.ahead else ""
        return "_".join([f"multiply_{self.rows}x{self.vectors}", self.suffix, *filter(None, kinds)])

    @property
    def parameters(self) -> tuple[str, ...]:
        return PARAMETERS + AHEAD * self.ahead

    @property
    def cells(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.rows) for j in range(self.vectors)]

    def text(self) -> str:
        """The function's definition."""
        loops = [("begin", TURNS, "rest", UNROLLED), ("rest", "single", "done", 1)] if self.adjacent else \
            [("begin", "single", "done", 1)]
        return _DEFINITION.format(
            attributes=attributes(),
            name=self.name, parameters=", ".join(f"{'ptr' if p in POINTERS else 'i64'} %{p}" for p in self.parameters),
            entry="\n".join([*self._edges(), *self._odd_multiples(), *self._places_in_c(), *self._first_places(),
                             *["  %places = inttoptr i64 %b_step to ptr"] * self.placed]),
            begin="\n".join([f"  %begin.{name} = phi {kind} [ {first}, %entry ]" for kind, name, first in self._first()]),
            loops="\n".join([self._loop(*loop) for loop in loops]),
            add="\n".join([line for i, j in self.cells for line in (
                self._load(f"%old{i}.{j}", f"%c{i}.{j}", j),
                f"  %new{i}.{j} = fadd {self.vector} %old{i}.{j}, %done.sum{i}.{j}")]),
            finish="\n".join([line for i, j in self.cells for line in (
                f"  %all{i}.{j} = phi {self.vector} [ %done.sum{i}.{j}, %done ], [ %new{i}.{j}, %add ]",)]
                + [self._store(f"%all{i}.{j}", f"%c{i}.{j}", j) for i, j in self.cells]))

    @property
    def bases(self) -> range:
        """Rows of A that have a register of their own; the others are found from it."""
        return range(0, self.rows, 2 if self.adjacent == "steps" else self.rows)

    def _first_places(self) -> list[str]:
        """``%first{i}``: where those rows begin."""
        return [line for i in self.bases for line in (
            f"  %first{i}.offset = mul i64 %odd1, {i}" if i else "",
            f"  %first{i} = getelementptr i8, ptr %a, i64 {f'%first{i}.offset' if i else 0}") if line]

    def _first(self) -> list[tuple[str, str, str]]:
        """What the loops carry: type, name, and value at first."""
        return [("i64", "left", "%depth"), ("ptr", "b", "%places" if self.placed else "%b"),
                *[("ptr", f"a{i}", f"%first{i}") for i in self.bases],
                *[("ptr", p, f"%{p}") for p in AHEAD[::2] if self.ahead],
                *[(self.vector, f"sum{i}.{j}", "zeroinitializer") for i, j in self.cells]]

    def _loop(self, before: str, name: str, after: str, steps: int) -> str:
        """From block `before`, the loop `name`, which does so many `steps` in a turn while they are left, and the head of
        block `after`."""
        carried = [(kind, what) for kind, what, _ in self._first()]
        return _LOOP.format(
            name=name, before=before, after=after, steps=steps,
            body="\n".join([line for step in range(steps) for line in self._step(name, step, steps)]),
            arriving="\n".join([f"  %{name}.{what} = phi {kind} [ %{before}.{what}, %{before} ], "
                                f"[ %{name}.{what}.next, %{name} ]" for kind, what in carried]),
            leaving="\n".join([f"  %{after}.{what} = phi {kind} [ %{before}.{what}, %{before} ], "
                               f"[ %{name}.{what}.next, %{name} ]" for kind, what in carried]))

    def _edges(self) -> list[str]:
        """``%mask``: which lanes of the last vector are inside of `columns`. Or ``%edge{n}``: the bytes from the first
        column to lane n of the last vector, as far as there are columns."""
        first, size = (self.vectors - 1) * self.lanes, self.bits // 8
        if self.edge == "masked":
            numbers = ", ".join(f"i32 {first + lane}" for lane in range(self.lanes))
            return ["  %count = trunc i64 %columns to i32", *self._splat("%counts", "i32", "%count"),
                    f"  %mask = icmp slt <{self.lanes} x i32> <{numbers}>, %counts"]
        if self.edge == "clamped" and first:
            return [f"  %edge.first = sub i64 %columns, {self.lanes}", f"  %edge0 = mul i64 %edge.first, {size}"]
        if self.edge == "clamped":
            return ["  %edge.last = sub i64 %columns, 1", *[line for n in range(self.lanes) for line in (
                f"  %edge{n}.within = icmp slt i64 {n}, %edge.last",
                f"  %edge{n}.column = select i1 %edge{n}.within, i64 {n}, i64 %edge.last",
                f"  %edge{n} = mul i64 %edge{n}.column, {size}")]]
        return []

    def _ends(self, j: int) -> bool:
        """Whether the columns end inside of vector j."""
        return bool(self.edge) and j == self.vectors - 1

    def _distance(self, j: int) -> str:
        """Bytes from the first column to vector j."""
        return "%edge0" if self.edge == "clamped" and self._ends(j) else str(j * self.lanes * self.bits // 8)

    def _odd_multiples(self) -> list[str]:
        return [line for odd in range(1, max(self.rows, 2), 2) for line in (
            f"  %odd{odd}.place = getelementptr i64, ptr %a_rows, i64 {odd // 2}",
            f"  %odd{odd} = load i64, ptr %odd{odd}.place")]

    def _places_in_c(self) -> list[str]:
        """Where the cells of C are. They are fetched while the loop runs: C is often not in any cache. A row that does not
        begin with a line ends in one more."""
        fetch = "  call void @llvm.prefetch.p0(ptr {}, i32 1, i32 3, i32 1)".format
        last = self.lanes * self.bits // 8 - 1
        return [line for i, j in self.cells for line in (
            f"  %c{i}.{j}.row = mul i64 %c_row, {i}",
            f"  %c{i}.{j}.offset = add i64 %c{i}.{j}.row, {self._distance(j)}",
            f"  %c{i}.{j} = getelementptr i8, ptr %c, i64 %c{i}.{j}.offset", fetch(f"%c{i}.{j}"),
            *[line for line in (f"  %c{i}.end = getelementptr i8, ptr %c{i}.{j}, i64 {last}", fetch(f"%c{i}.end"))
              if j == self.vectors - 1 and not self.edge])]

    def _step(self, loop: str, step: int, steps: int) -> list[str]:
        """One outer product, step number `step` of a turn of `steps`: a row of B in registers, and each element of the
        column of A in all lanes."""
        here, lines = f"%{loop}.{step}", []

        def state(what: str, number: int) -> str:
            return f"%{loop}.{what}" if number == 0 else f"%{loop}.{what}.{'next' if number == steps else number}"

        def move(what: str, distance: str, first: int = step) -> None:
            old, new = state(what, first), state(what, step + 1)
            free = f"{new}.free" if self.adjacent else new
            lines.append(f"  {free} = getelementptr i8, ptr {old}, i64 {distance}")
            if self.adjacent:                   # LLVM shall not derive it from another register
                lines.append(f'  {new} = call ptr asm "", "=r,0"(ptr {free})')

        move("b", "8" if self.placed else "%b_step")
        row = state("b", step)
        if self.placed:
            row = f"{here}.row"
            lines += [f"  {row}.number = load i64, ptr {state('b', step)}",
                      f"  {row} = getelementptr {self.element}, ptr %b, i64 {row}.number"]
        for j in range(self.vectors):
            lines += [f"  {here}.b{j}.place = getelementptr i8, ptr {row}, i64 {self._distance(j)}",
                      self._load(f"{here}.b{j}", f"{here}.b{j}.place", j)]
        for i in range(self.rows):
            a, place = f"{here}.a{i}", f"{here}.a{i}.place"
            lines += self._place_in_a(place, i, step, state)
            embedded = self.adjacent and i % 2 == 0
            if not embedded:
                lines += [f"  {a}.one = load {self.element}, ptr {place}", *self._splat(a, self.element, f"{a}.one")]
            for j in range(self.vectors):
                old, new, b = state(f"sum{i}.{j}", step), state(f"sum{i}.{j}", step + 1), f"{here}.b{j}"
                lines.append(self._embedded(new, place, b, old) if embedded else
                             f"  {new} = call {self.vector} @llvm.fmuladd.{self.suffix}({self.vector} {a}, "
                             f"{self.vector} {b}, {self.vector} {old})")
        for i in self.bases:
            if self.adjacent != "steps":
                move(f"a{i}", "%a_step")
            elif step == steps - 1:
                move(f"a{i}", str(steps * self.bits // 8), 0)
        return lines + self._fetch(loop, step, steps)

    def _fetch(self, loop: str, step: int, steps: int) -> list[str]:
        """What is fetched ahead in a turn: at its first step from x, in its middle from y."""
        lines = []
        for k, p in enumerate(AHEAD[::2] if self.ahead else ()):
            if loop == TURNS and step == k * steps // 2:
                lines.append(f"  call void @llvm.prefetch.p0(ptr %{loop}.{p}, i32 0, i32 2, i32 1)")
            if step == steps - 1:
                distance = f"%{p}_step" if loop == TURNS else "0"
                lines.append(f"  %{loop}.{p}.next = getelementptr i8, ptr %{loop}.{p}, i64 {distance}")
        return lines

    def _place_in_a(self, place: str, i: int, step: int, state: Callable[[str, int], str]) -> list[str]:
        """Where row `i` of A is at a step of a turn."""
        if self.adjacent == "rows":
            return [f"  {place} = getelementptr i8, ptr {state('a0', step)}, i64 {i * self.bits // 8}"]
        if self.adjacent == "steps":
            base = f"{place}.base"
            return [f"  {base} = getelementptr i8, ptr {state(f'a{i & -2}', 0)}, i64 {'%odd1' if i % 2 else 0}",
                    f"  {place} = getelementptr i8, ptr {base}, i64 {step * self.bits // 8}"]
        offset, scale = f"{place}.offset", i & -i
        return [f"  {offset} = mul i64 {f'%odd{i // scale}, {scale}' if i else '0, 0'}",
                f"  {place} = getelementptr i8, ptr {state('a0', step)}, i64 {offset}"]

    def _embedded(self, new: str, place: str, b: str, old: str) -> str:
        """`new` = `old` + element at `place` * `b`, in one instruction."""
        mnemonic = "vfmadd231ps" if self.bits == 32 else "vfmadd231pd"
        return (f'  {new} = call {self.vector} asm "{mnemonic} $2{{1to{self.lanes}}}, $1, $0", "=v,v,*m,0"('
                f"{self.vector} {b}, ptr elementtype({self.element}) {place}, {self.vector} {old})")

    def _splat(self, name: str, kind: str, value: str) -> list[str]:
        vector = f"<{self.lanes} x {kind}>"
        return [f"  {name}.one_lane = insertelement {vector} poison, {kind} {value}, i32 0",
                f"  {name} = shufflevector {vector} {name}.one_lane, {vector} poison, <{self.lanes} x i32> zeroinitializer"]

    def _load(self, name: str, place: str, j: int) -> str:
        if self._ends(j) and self.edge == "masked":
            return (f"  {name} = call {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr {place}, i32 {self.bits // 8}, "
                    f"<{self.lanes} x i1> %mask, {self.vector} zeroinitializer)")
        if self._ends(j) and j == 0:
            return "\n".join([line for n in range(self.lanes) for line in (
                f"  {name}.place{n} = getelementptr i8, ptr {place}, i64 %edge{n}",
                f"  {name}.one{n} = load {self.element}, ptr {name}.place{n}",
                f"  {name if n == self.lanes - 1 else f'{name}.{n}'} = insertelement {self.vector} "
                f"{f'{name}.{n - 1}' if n else 'poison'}, {self.element} {name}.one{n}, i32 {n}")])
        return f"  {name} = load {self.vector}, ptr {place}, align {self.bits // 8}"

    def _store(self, value: str, place: str, j: int) -> str:
        if self._ends(j) and self.edge == "masked":
            return (f"  call void @llvm.masked.store.{self.suffix}.p0({self.vector} {value}, ptr {place}, "
                    f"i32 {self.bits // 8}, <{self.lanes} x i1> %mask)")
        if self._ends(j) and j == 0:                    # from the last lane on, so that the last column's own stays
            return "\n".join([line for n in reversed(range(self.lanes)) for line in (
                f"  {place}.place{n} = getelementptr i8, ptr {place}, i64 %edge{n}",
                f"  {value}.one{n} = extractelement {self.vector} {value}, i32 {n}",
                f"  store {self.element} {value}.one{n}, ptr {place}.place{n}")])
        return f"  store {self.vector} {value}, ptr {place}, align {self.bits // 8}"

    def declarations(self) -> list[str]:
        """Those of the intrinsics that the text calls."""
        mask = f"<{self.lanes} x i1>"
        return [f"declare {self.vector} @llvm.fmuladd.{self.suffix}({self.vector}, {self.vector}, {self.vector})",
                f"declare {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr, i32, {mask}, {self.vector})",
                f"declare void @llvm.masked.store.{self.suffix}.p0({self.vector}, ptr, i32, {mask})",
                "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"]


TRANSPOSE_PARAMETERS = ("rows", "x", "x_row", "o", "o_row")
"""Those of `tile.transpose_tile` without `lanes`, with addresses for pointers and offsets, and strides in bytes."""


def transpose_text(lanes: int, bits: int) -> str:
    """The function that transposes a block of `lanes` x `lanes` elements of `bits` bits: halves of pairs of lines are
    exchanged, then quarters, and so on."""
    kind = f"<{lanes} x {'float' if bits == 32 else 'double'}>"
    lines = ["  %last = sub i64 %rows, 1"]
    for i in range(lanes):
        lines += [f"  %inside{i} = icmp slt i64 {i}, %last", f"  %row{i} = select i1 %inside{i}, i64 {i}, i64 %last",
                  f"  %offset{i} = mul i64 %row{i}, %x_row", f"  %from{i} = getelementptr i8, ptr %x, i64 %offset{i}",
                  f"  %v{i}.{lanes} = load {kind}, ptr %from{i}, align {bits // 8}"]
    lines += exchanged_halves(lanes, kind)
    for j in range(lanes):
        lines += [f"  %place{j} = mul i64 %o_row, {j}", f"  %to{j} = getelementptr i8, ptr %o, i64 %place{j}",
                  f"  store {kind} %v{j}.1, ptr %to{j}, align {bits // 8}"]
    parameters = ", ".join(f"{'ptr' if p in ('x', 'o') else 'i64'} %{p}" for p in TRANSPOSE_PARAMETERS)
    head = f"define void @transpose_v{lanes}f{bits}({parameters}) {attributes()} {{"
    return "\n".join([head, *lines, "  ret void", "}"])


def exchanged_halves(lanes: int, kind: str) -> list[str]:
    """From lines ``%v{i}.{lanes}`` of a square block, vectors of type `kind`, to those of its transpose, ``%v{j}.1``."""
    lines = []
    step = lanes // 2
    while step:
        for i in range(lanes):
            if not i & step:
                pair = f"{kind} %v{i}.{2 * step}, {kind} %v{i + step}.{2 * step}"
                for line, shift in ((i, 0), (i + step, step)):
                    numbers = [j + shift if not j & step else lanes + j - step + shift for j in range(lanes)]
                    mask = ", ".join(f"i32 {n}" for n in numbers)
                    lines.append(f"  %v{line}.{step} = shufflevector {pair}, <{lanes} x i32> <{mask}>")
        step //= 2
    return lines


def definitions(names: Iterable[str]) -> str:
    """The module that defines those of `names` that are pieces of this file; "" if there are none."""
    kernels = [MicroKernel(*[int(n) for n in match.groups()[:4]], edge=match[5] or "", adjacent=match[6] or "",
                           placed=match[7] == "_placed", ahead=match[7] == "_ahead")
               for match in map(_MULTIPLY.fullmatch, names) if match]
    transposes = [transpose_text(int(match[1]), int(match[2])) for match in map(_TRANSPOSE.fullmatch, names) if match]
    transforms = [transform_text(match[1], int(match[2]), int(match[3]))
                  for match in map(_TRANSFORM.fullmatch, names) if match]
    return "\n".join([*dict.fromkeys(line for k in kernels for line in k.declarations()), *[k.text() for k in kernels],
                      *transposes, *transforms])
