"""The vector piece of products with few rows, as plain Python and as LLVM text: sums along lines that lie as they are.

What goes in: some rows of A, wide and padded, and a B of which each column is a line of memory, as the weight of a linear
layer is. What comes out: C = A @ B. A few rows of A and a few lines of B at a time are multiplied a vector of the depth
at once, each pair with a vector of sums, whose lanes are added up at the end. So B is read once, in order, and is nowhere
copied; lines of narrower numbers become wide on the way, and take a factor per line with them if they are scaled.

Sums are those of `lanes` partial sums, for each pair in the same order, so results depend on the depth alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jitgrad import config
from jitgrad.kernels.cpu.vector_text import VectorText, attributes

Pointer = Any                                   # a typed pointer of kernel text

HIGHEST = 8
"""The most rows of A that are multiplied at once."""

KINDS = {"f32": ("float", 4), "f64": ("double", 8), "bf16": ("i16", 2), "f16": ("half", 2), "i8": ("i8", 1)}
"""Of what a line may be made: LLVM's type in memory, and bytes."""

PARAMETERS = ("columns", "depth", "a", "a_row", "b", "b_line", "c", "c_row", "accumulate", "scale", "scale_step")
"""Those of `multiply_scaled_lines` without `rows`, with addresses for pointers and offsets, and strides in bytes."""

POINTERS = frozenset(("a", "b", "c", "scale"))

_NAME = re.compile(r"lines_(\d+)x(\d+)_v(\d+)f(\d+)_([a-z]+\d+)(_scaled)?")


# --- plain meanings -------------------------------------------------------------------------------------------------


def multiply_lines(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, b: Pointer, b_offset: int,
                   b_line: int, c: Pointer, c_offset: int, c_row: int, accumulate: int) -> None:
    """C[i, j] = (C[i, j] if accumulate else 0) + sum over d < depth of A[i, d] * B[j, d], for i < rows <= `HIGHEST` and
    j < columns.

    A[i, d] is ``a[a_offset + i * a_row + d]``, of the type of C, with zeros from the depth on to a whole number of vectors;
    B[j, d] is ``b[b_offset + j * b_line + d]``, of any of `KINDS`."""
    _multiply(rows, columns, depth, a, a_offset, a_row, b, b_offset, b_line, c, c_offset, c_row, accumulate, lambda j, x: x)


def multiply_scaled_lines(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, b: Pointer,
                          b_offset: int, b_line: int, c: Pointer, c_offset: int, c_row: int, accumulate: int,
                          scale: Pointer, scale_offset: int, scale_step: int) -> None:
    """`multiply_lines` with each B[j, d] multiplied by ``scale[scale_offset + j * scale_step]`` first, and rounded."""
    _multiply(rows, columns, depth, a, a_offset, a_row, b, b_offset, b_line, c, c_offset, c_row, accumulate,
              lambda j, x: x * scale[scale_offset + j * scale_step])


def _multiply(rows: int, columns: int, depth: int, a: Pointer, a_offset: int, a_row: int, b: Pointer, b_offset: int,
              b_line: int, c: Pointer, c_offset: int, c_row: int, accumulate: int,
              scaled: Callable[[int, Any], Any]) -> None:
    kind = c.memory.dtype.type
    for i in range(rows):
        for j in range(columns):
            total = c[c_offset + i * c_row + j] if accumulate else kind(0)
            for d in range(depth):
                total += a[a_offset + i * a_row + d] * scaled(j, kind(b[b_offset + j * b_line + d]))
            c[c_offset + i * c_row + j] = total


NAMES: dict[str, Callable[..., Any]] = {f.__name__: f for f in (multiply_lines, multiply_scaled_lines)}


# --- LLVM text --------------------------------------------------------------------------------------------------------


def lines_at_once(rows: int, registers: int) -> int:
    """How many lines of B are multiplied with so many rows of A: registers hold the sums, a vector of each line and one of
    A. More than four lines at once gain something with one row alone."""
    return max(min((registers - 2) // (rows + 1), 8 if rows == 1 else 4), 1)


@dataclass(frozen=True, slots=True)
class LineKernel(VectorText):
    """One shape: exactly `rows` rows of A, `lines` of B at a time, sums in vectors of `lanes` elements of `bits` bits."""

    rows: int
    lines: int
    lanes: int
    bits: int
    kind: str
    scaled: bool = False

    @property
    def name(self) -> str:
        return f"lines_{self.rows}x{self.lines}_v{self.lanes}f{self.bits}_{self.kind}{'_scaled' if self.scaled else ''}"

    @property
    def cells(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.rows) for j in range(self.lines)]

    @property
    def raw(self) -> str:
        """The type of a vector of B in memory."""
        return f"<{self.lanes} x {KINDS[self.kind][0]}>"

    def text(self) -> str:
        """The function's definition: a loop over groups of lines, in it one over whole vectors of the depth, and the rest
        of the depth under a mask."""
        sums = [f"%sum{i}.{j}" for i, j in self.cells]
        phis = [f"  {s} = phi {self.vector} [ zeroinitializer, %group ], [ {s}.next, %loop ]" for s in sums]
        ends = [f"  {s}.all = phi {self.vector} [ {s}.whole, %whole ], [ {s}.masked, %rest ]" for s in sums]
        wholes = [f"  {s}.whole = phi {self.vector} [ zeroinitializer, %group ], [ {s}.next, %loop ]" for s in sums]
        parameters = ", ".join(f"{'ptr' if p in POINTERS else 'i64'} %{p}" for p in PARAMETERS)
        return "\n".join([
            f"define void @{self.name}({parameters}) {attributes()} {{",
            "entry:", f"  %over = and i64 %depth, {self.lanes - 1}", "  %even = sub i64 %depth, %over",
            "  %last = sub i64 %columns, 1", "  %adds = icmp ne i64 %accumulate, 0",
            *below("%within", "%over", self.lanes),
            *[f"  %a{i}.step = mul i64 %a_row, {i}\n  %a{i} = getelementptr i8, ptr %a, i64 %a{i}.step"
              for i in range(self.rows)],
            "  br label %group",
            "group:", "  %column = phi i64 [ 0, %entry ], [ %column.next, %store ]",
            *[line for j in range(self.lines) for line in self._line(j)],
            "  %any = icmp sgt i64 %even, 0", "  br i1 %any, label %loop, label %whole",
            "loop:", "  %d = phi i64 [ 0, %group ], [ %d.next, %loop ]", *phis, *self._step("loop", "%d", "next"),
            f"  %d.next = add i64 %d, {self.lanes}", "  %again = icmp slt i64 %d.next, %even",
            "  br i1 %again, label %loop, label %whole",
            "whole:", *wholes, "  %some = icmp ne i64 %over, 0", "  br i1 %some, label %rest, label %store",
            "rest:", *self._step("rest", "%even", "masked"), "  br label %store",
            "store:", *ends, *self._results(),
            f"  %column.next = add i64 %column, {self.lines}", "  %more = icmp slt i64 %column.next, %columns",
            "  br i1 %more, label %group, label %done",
            "done:", "  ret void", "}"])

    def _line(self, j: int) -> Iterator[str]:
        """``%b{j}``: where line j of a group is, the last line instead of those that there are not; and its factor."""
        yield f"  %line{j}.wanted = add i64 %column, {j}"
        yield f"  %line{j}.there = icmp slt i64 %line{j}.wanted, %last"
        yield f"  %line{j} = select i1 %line{j}.there, i64 %line{j}.wanted, i64 %last"
        yield f"  %line{j}.offset = mul i64 %line{j}, %b_line"
        yield f"  %b{j} = getelementptr i8, ptr %b, i64 %line{j}.offset"
        if self.scaled:
            yield f"  %scale{j}.offset = mul i64 %line{j}, %scale_step"
            yield f"  %scale{j}.place = getelementptr i8, ptr %scale, i64 %scale{j}.offset"
            yield f"  %scale{j}.one = load {self.element}, ptr %scale{j}.place"
            yield from splat(f"%scale{j}", self.element, f"%scale{j}.one", self.lanes)

    def _step(self, block: str, d: str, result: str) -> Iterator[str]:
        """The sums with a vector of the depth added, from `d` on."""
        size, rest = KINDS[self.kind][1], block == "rest"
        yield f"  %{block}.bytes = mul i64 {d}, {size}"
        yield f"  %{block}.a_bytes = mul i64 {d}, {self.bits // 8}"
        for j in range(self.lines):
            name = f"%{block}.b{j}"
            yield f"  {name}.place = getelementptr i8, ptr %b{j}, i64 %{block}.bytes"
            yield from self._load(name, rest)
        for i in range(self.rows):
            a = f"%{block}.a{i}"
            yield f"  {a}.place = getelementptr i8, ptr %a{i}, i64 %{block}.a_bytes"
            yield f"  {a} = load {self.vector}, ptr {a}.place, align {self.bits // 8}"
            for j in range(self.lines):
                total = f"%sum{i}.{j}"
                yield (f"  {total}.{result} = call {self.vector} @llvm.fmuladd.v{self.lanes}f{self.bits}({self.vector} {a}, "
                       f"{self.vector} %{block}.b{j}, {self.vector} {total}{'.whole' if rest else ''})")

    def _load(self, name: str, masked: bool) -> Iterator[str]:
        """``{name}``: the vector of B at ``{name}.place``, wide and scaled."""
        size = KINDS[self.kind][1]
        raw = f"{name}.raw"
        if masked:
            yield (f"  {raw} = call {self.raw} @llvm.masked.load.{self._suffix}.p0(ptr {name}.place, i32 {size}, "
                   f"<{self.lanes} x i1> %within, {self.raw} zeroinitializer)")
        else:
            yield f"  {raw} = load {self.raw}, ptr {name}.place, align {size}"
        words, wide = f"<{self.lanes} x i32>", f"{name}.wide" if self.scaled else name
        if self.kind == "bf16":
            yield f"  {raw}.words = zext {self.raw} {raw} to {words}"
            yield f"  {raw}.high = shl {words} {raw}.words, splat (i32 16)"
            yield f"  {wide} = bitcast {words} {raw}.high to {self.vector}"
        elif self.kind == "f16" and not config.processor().halves:
            yield from self._widened_halves(wide, raw)
        elif self.kind == "f16":
            yield f"  {wide} = fpext {self.raw} {raw} to {self.vector}"
        elif self.kind == "i8":
            yield f"  {raw}.words = sext {self.raw} {raw} to {words}"
            yield f"  {wide} = sitofp {words} {raw}.words to {self.vector}"
        else:
            yield f"  {wide} = bitcast {self.raw} {raw} to {self.vector}"
        if self.scaled:
            yield f"  {name} = fmul {self.vector} {wide}, %scale{name.rpartition('.b')[2]}"

    def _widened_halves(self, wide: str, raw: str) -> Iterator[str]:
        """`wide`: the float16 numbers `raw` by integer arithmetic, where LLVM would call a function that is not there. Their
        exponent is moved by a product, which is exact for those too small to be normal; NaN and infinities keep theirs."""
        words, shorts = f"<{self.lanes} x i32>", f"<{self.lanes} x i16>"
        yield f"  {raw}.shorts = bitcast {self.raw} {raw} to {shorts}"
        yield f"  {raw}.words = zext {shorts} {raw}.shorts to {words}"
        yield f"  {raw}.size = and {words} {raw}.words, splat (i32 {0x7FFF})"
        yield f"  {raw}.moved = shl {words} {raw}.size, splat (i32 13)"
        yield f"  {raw}.tiny = bitcast {words} {raw}.moved to {self.vector}"
        yield f"  {raw}.scaled = fmul {self.vector} {raw}.tiny, splat (float 0x46F0000000000000)"
        yield f"  {raw}.bits = bitcast {self.vector} {raw}.scaled to {words}"
        yield f"  {raw}.special = icmp ugt {words} {raw}.size, splat (i32 {0x7BFF})"
        yield (f"  {raw}.full = select <{self.lanes} x i1> {raw}.special, {words} splat (i32 {0x7F800000}), "
               f"{words} zeroinitializer")
        yield f"  {raw}.positive = or {words} {raw}.bits, {raw}.full"
        yield f"  {raw}.high = shl {words} {raw}.words, splat (i32 16)"
        yield f"  {raw}.sign = and {words} {raw}.high, splat (i32 {-1 << 31})"
        yield f"  {raw}.signed = or {words} {raw}.positive, {raw}.sign"
        yield f"  {wide} = bitcast {words} {raw}.signed to {self.vector}"

    @property
    def _suffix(self) -> str:
        """How the name of the intrinsic that loads vectors of B ends."""
        kind = {"float": "f32", "double": "f64", "half": "f16"}.get(KINDS[self.kind][0], KINDS[self.kind][0])
        return f"v{self.lanes}{kind}"

    def _results(self) -> Iterator[str]:
        """The lanes of all sums added up, as many sums at once as there are lanes, and stored."""
        cells = self.cells
        for first in range(0, len(cells), self.lanes):
            group = cells[first:first + self.lanes]
            yield from self._added_up(f"%group{first}", [f"%sum{i}.{j}.all" for i, j in group])
            for i in sorted({i for i, _ in group}):
                members = [(n, j) for n, (row, j) in enumerate(group) if row == i]
                yield from self._stored(f"%group{first}", i, [n for n, _ in members], members[0][1])

    def _added_up(self, result: str, sums: list[str]) -> Iterator[str]:
        """`result`: in lane n all lanes of sum n together. Halves of a pair are exchanged and added, then quarters, and so
        on, which leaves half of the vectors each time."""
        step, width, sums = self.lanes, self.lanes, [*sums]
        sums += ["zeroinitializer"] * (width - len(sums))
        while step > 1:
            step //= 2
            merged = []
            for n in range(step):
                low, high = sums[n], sums[n + step]
                out = result if step == 1 else f"{result}.{step}.{n}"
                if low == high == "zeroinitializer":
                    merged.append(low)
                    continue
                for side, shift in (("kept", 0), ("moved", step)):
                    numbers = [lane + shift if not lane & step else width + lane - step + shift for lane in range(width)]
                    mask = ", ".join(f"i32 {number}" for number in numbers)
                    yield (f"  {out}.{side} = shufflevector {self.vector} {low}, {self.vector} {high}, "
                           f"<{width} x i32> <{mask}>")
                yield f"  {out} = fadd {self.vector} {out}.kept, {out}.moved"
                merged.append(out)
            sums = merged

    def _stored(self, sums: str, i: int, lanes: list[int], first: int) -> Iterator[str]:
        """The `lanes` of `sums` to row i of C, from line `first` of the group on, as far as there are columns."""
        count = len(lanes)
        name, kind = f"{sums}.row{i}", f"<{count} x {self.element}>"
        suffix, align = f"v{count}f{self.bits}", self.bits // 8
        yield (f"  {name} = shufflevector {self.vector} {sums}, {self.vector} poison, <{count} x i32> "
               f"<{', '.join(f'i32 {n}' for n in lanes)}>")
        yield f"  {name}.from = add i64 %column, {first}"
        yield f"  {name}.left = sub i64 %columns, {name}.from"
        yield from below(f"{name}.within", f"{name}.left", count)
        yield from splat(f"{name}.adds", "i1", "%adds", count)
        yield f"  {name}.old_ones = and <{count} x i1> {name}.within, {name}.adds"
        yield f"  {name}.down = mul i64 %c_row, {i}"
        yield f"  {name}.along = mul i64 {name}.from, {align}"
        yield f"  {name}.offset = add i64 {name}.down, {name}.along"
        yield f"  {name}.place = getelementptr i8, ptr %c, i64 {name}.offset"
        yield (f"  {name}.old = call {kind} @llvm.masked.load.{suffix}.p0(ptr {name}.place, i32 {align}, "
               f"<{count} x i1> {name}.old_ones, {kind} zeroinitializer)")
        yield f"  {name}.new = fadd {kind} {name}, {name}.old"
        yield (f"  call void @llvm.masked.store.{suffix}.p0({kind} {name}.new, ptr {name}.place, i32 {align}, "
               f"<{count} x i1> {name}.within)")

    def declarations(self) -> Iterator[str]:
        """Those of the intrinsics that the text calls."""
        mask = f"<{self.lanes} x i1>"
        yield f"declare {self.vector} @llvm.fmuladd.v{self.lanes}f{self.bits}({self.vector}, {self.vector}, {self.vector})"
        yield f"declare {self.raw} @llvm.masked.load.{self._suffix}.p0(ptr, i32, {mask}, {self.raw})"
        for count in range(1, self.lines + 1):
            kind, suffix, mask = f"<{count} x {self.element}>", f"v{count}f{self.bits}", f"<{count} x i1>"
            yield f"declare {kind} @llvm.masked.load.{suffix}.p0(ptr, i32, {mask}, {kind})"
            yield f"declare void @llvm.masked.store.{suffix}.p0({kind}, ptr, i32, {mask})"


def splat(name: str, kind: str, value: str, lanes: int) -> Iterator[str]:
    vector = f"<{lanes} x {kind}>"
    yield f"  {name}.lane = insertelement {vector} poison, {kind} {value}, i32 0"
    yield f"  {name} = shufflevector {vector} {name}.lane, {vector} poison, <{lanes} x i32> zeroinitializer"


def below(name: str, count: str, lanes: int) -> Iterator[str]:
    """`name`: which lanes have a number below `count`, an int64."""
    yield f"  {name}.count = trunc i64 {count} to i32"
    yield from splat(f"{name}.counts", "i32", f"{name}.count", lanes)
    numbers = ", ".join(f"i32 {lane}" for lane in range(lanes))
    yield f"  {name} = icmp slt <{lanes} x i32> <{numbers}>, {name}.counts"


def definitions(names: Iterable[str]) -> str:
    """The module that defines those of `names` that are pieces of this file; "" if there are none."""
    kernels = [LineKernel(*[int(n) for n in match.groups()[:4]], match[5], match[6] is not None)
               for match in map(_NAME.fullmatch, names) if match]
    return "\n".join([*dict.fromkeys(line for k in kernels for line in k.declarations()), *[k.text() for k in kernels]])
