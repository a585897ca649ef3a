"""Pieces of contractions as LLVM text: the micro-kernel, which keeps a tile of C in registers while a loop over the depth
adds outer products of a column of A and a row of B to it, and the transpose of a square block.

There is one function for each of a few shapes (`Tile.forms`). The text is as it should run, so it is linked into a kernel
after LLVM's passes, which would take half of the kernel's compile time and find nothing to do. `tile_native` writes the
calls; names say what is to be defined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PARAMETERS = ("columns", "depth", "a", "a_rows", "a_step", "b", "b_step", "c", "c_row", "accumulate")
"""Those of `tile.multiply_tile` without `rows`, with addresses for pointers and offsets, and strides in bytes. `a_rows`
points to the odd multiples of A's row stride: read from memory they stay independent of each other, and the loop
addresses each row by a base, one of them and a scale; LLVM would else walk from row to row, and wait for each addition."""

POINTERS = frozenset(("a", "a_rows", "b", "c"))

_MULTIPLY = re.compile(r"multiply_(\d+)x(\d+)_v(\d+)f(\d+)(_masked)?")
_TRANSPOSE = re.compile(r"transpose_v(\d+)f(\d+)")

_DEFINITION = """\
define void @{name}({parameters}) noinline nounwind {{
entry:
{entry}
  %more = icmp ne i64 %accumulate, 0
  br i1 %more, label %continue, label %begin
continue:
{continue_}
  br label %begin
begin:
{begin}
  %any = icmp sgt i64 %depth, 0
  br i1 %any, label %loop, label %done
loop:
  %left = phi i64 [ %depth, %begin ], [ %left.next, %loop ]
  %a.here = phi ptr [ %a, %begin ], [ %a.next, %loop ]
  %b.here = phi ptr [ %b, %begin ], [ %b.next, %loop ]
{loop}
  %left.next = sub i64 %left, 1
  %a.next = getelementptr i8, ptr %a.here, i64 %a_step
  %b.next = getelementptr i8, ptr %b.here, i64 %b_step
  %again = icmp sgt i64 %left.next, 0
  br i1 %again, label %loop, label %done
done:
{done}
  ret void
}}
"""


@dataclass(frozen=True, slots=True)
class MicroKernel:
    """One shape: exactly `rows` rows and `vectors` vectors of `lanes` elements of `bits` bits; if `masked`, elements
    from `columns` on are neither read nor written."""

    rows: int
    vectors: int
    lanes: int
    bits: int
    masked: bool

    @property
    def name(self) -> str:
        return f"multiply_{self.rows}x{self.vectors}_{self.suffix}{'_masked' if self.masked else ''}"

    @property
    def suffix(self) -> str:
        """How the names of LLVM's vector intrinsics end."""
        return f"v{self.lanes}f{self.bits}"

    @property
    def element(self) -> str:
        return "float" if self.bits == 32 else "double"

    @property
    def vector(self) -> str:
        return f"<{self.lanes} x {self.element}>"

    def text(self) -> str:
        """The function's definition."""
        cells = [(i, j) for i in range(self.rows) for j in range(self.vectors)]
        return _DEFINITION.format(
            name=self.name, parameters=", ".join(f"{'ptr' if p in POINTERS else 'i64'} %{p}" for p in PARAMETERS),
            entry="\n".join([*self._masks(), *self._odd_multiples(), *self._places_in_c(cells)]),
            continue_="\n".join([self._load(f"%old{i}.{j}", f"%c{i}.{j}", j) for i, j in cells]),
            begin="\n".join([self._phi(f"%start{i}.{j}", ("zeroinitializer", "entry"), (f"%old{i}.{j}", "continue"))
                             for i, j in cells]),
            loop="\n".join([*[self._phi(f"%sum{i}.{j}", (f"%start{i}.{j}", "begin"), (f"%next{i}.{j}", "loop"))
                              for i, j in cells], *self._step()]),
            done="\n".join([line for i, j in cells for line in (
                self._phi(f"%end{i}.{j}", (f"%start{i}.{j}", "begin"), (f"%next{i}.{j}", "loop")),)]
                + [self._store(f"%end{i}.{j}", f"%c{i}.{j}", j) for i, j in cells]))

    def _masks(self) -> list[str]:
        """``%mask{j}``: which lanes of vector j are inside of `columns`."""
        if not self.masked:
            return []
        kind = f"<{self.lanes} x i32>"
        numbers = [", ".join(f"i32 {j * self.lanes + lane}" for lane in range(self.lanes)) for j in range(self.vectors)]
        return ["  %count = trunc i64 %columns to i32", *self._splat("%counts", "i32", "%count"),
                *[f"  %mask{j} = icmp slt {kind} <{numbers[j]}>, %counts" for j in range(self.vectors)]]

    def _odd_multiples(self) -> list[str]:
        return [line for odd in range(1, self.rows, 2) for line in (
            f"  %odd{odd}.place = getelementptr i64, ptr %a_rows, i64 {odd // 2}",
            f"  %odd{odd} = load i64, ptr %odd{odd}.place")]

    def _places_in_c(self, cells: Iterable[tuple[int, int]]) -> list[str]:
        return [line for i, j in cells for line in (
            f"  %c{i}.{j}.row = mul i64 %c_row, {i}",
            f"  %c{i}.{j}.offset = add i64 %c{i}.{j}.row, {j * self.lanes * self.bits // 8}",
            f"  %c{i}.{j} = getelementptr i8, ptr %c, i64 %c{i}.{j}.offset")]

    def _step(self) -> list[str]:
        """One outer product: a row of B in registers, and each element of the column of A in all lanes."""
        lines = []
        for j in range(self.vectors):
            lines += [f"  %b{j}.place = getelementptr {self.vector}, ptr %b.here, i64 {j}",
                      self._load(f"%b{j}", f"%b{j}.place", j)]
        for i in range(self.rows):
            scale = i & -i
            offset = f"%a{i}.offset" if i else "0"
            if i:
                lines.append(f"  {offset} = mul i64 %odd{i // scale}, {scale}")
            lines += [f"  %a{i}.place = getelementptr i8, ptr %a.here, i64 {offset}",
                      f"  %a{i}.one = load {self.element}, ptr %a{i}.place",
                      *self._splat(f"%a{i}", self.element, f"%a{i}.one")]
            lines += [f"  %next{i}.{j} = call {self.vector} @llvm.fma.{self.suffix}({self.vector} %a{i}, "
                      f"{self.vector} %b{j}, {self.vector} %sum{i}.{j})" for j in range(self.vectors)]
        return lines

    def _phi(self, name: str, *arriving: tuple[str, str]) -> str:
        return f"  {name} = phi {self.vector} " + ", ".join(f"[ {value}, %{block} ]" for value, block in arriving)

    def _splat(self, name: str, kind: str, value: str) -> list[str]:
        vector = f"<{self.lanes} x {kind}>"
        return [f"  {name}.one_lane = insertelement {vector} poison, {kind} {value}, i32 0",
                f"  {name} = shufflevector {vector} {name}.one_lane, {vector} poison, <{self.lanes} x i32> zeroinitializer"]

    def _load(self, name: str, place: str, j: int) -> str:
        if not self.masked:
            return f"  {name} = load {self.vector}, ptr {place}, align {self.bits // 8}"
        return (f"  {name} = call {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr {place}, i32 {self.bits // 8}, "
                f"<{self.lanes} x i1> %mask{j}, {self.vector} zeroinitializer)")

    def _store(self, value: str, place: str, j: int) -> str:
        if not self.masked:
            return f"  store {self.vector} {value}, ptr {place}, align {self.bits // 8}"
        return (f"  call void @llvm.masked.store.{self.suffix}.p0({self.vector} {value}, ptr {place}, "
                f"i32 {self.bits // 8}, <{self.lanes} x i1> %mask{j})")

    def declarations(self) -> list[str]:
        """Those of the intrinsics that the text calls."""
        mask = f"<{self.lanes} x i1>"
        return [f"declare {self.vector} @llvm.fma.{self.suffix}({self.vector}, {self.vector}, {self.vector})",
                f"declare {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr, i32, {mask}, {self.vector})",
                f"declare void @llvm.masked.store.{self.suffix}.p0({self.vector}, ptr, i32, {mask})"]


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
    head = f"define void @transpose_v{lanes}f{bits}({parameters}) noinline nounwind {{"
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
    kernels = [MicroKernel(*[int(n) for n in match.groups()[:4]], masked=match[5] is not None)
               for match in map(_MULTIPLY.fullmatch, names) if match]
    transposes = [transpose_text(int(match[1]), int(match[2])) for match in map(_TRANSPOSE.fullmatch, names) if match]
    return "\n".join([*dict.fromkeys(line for k in kernels for line in k.declarations()), *[k.text() for k in kernels],
                      *transposes])
