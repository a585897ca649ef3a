"""Rows of windows as LLVM text: weighted sums over them, and sums of products with another row, of some taps at once.

What goes in: an image whose rows lie anywhere, and how far windows and taps are from each other; what comes out: a sum for
each window, or for each tap. Four rows of windows are done at once, a vector of columns of each, so that a weight is
fetched once for all of them and additions need not wait for each other; the rows that are left over follow one by one.
Where a tap meets no column of the image, its lanes are masked out. `kernels.cpu.tile` says what the functions mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jitgrad.kernels.cpu.tile_lines import below, splat
from jitgrad.kernels.cpu.vector_text import VectorText, attributes

TAPS = 3
"""The most taps of a row that one function knows: more are done by several calls."""

ROWS = (4, 1)
"""How many rows of windows are done at once: as many as there are, then what is left."""

PARAMETERS = {
    "weighted_rows": ("rows", "count", "down", "tall", "tall_step", "wide_step", "apart", "low", "high", "x", "w", "w_tall",
                      "w_wide", "o", "o_row", "accumulate"),
    "dot_rows": ("rows", "count", "down", "wide_step", "apart", "low", "high", "x", "g", "g_row", "o")}
"""Those of the functions. Strides are in bytes, but for `apart`: columns from one tap to the next."""

POINTERS = frozenset(("x", "w", "o", "g"))

_NAME = re.compile(r"(weighted_rows|dot_rows)_(\d)x(\d)_v(\d+)f(\d+)")


@dataclass(frozen=True, slots=True)
class WindowKernel(VectorText):
    """The function `kind` for `wide` taps of a row and windows that are `across` columns from each other, 1 or 2."""

    kind: str
    wide: int
    across: int
    lanes: int
    bits: int

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.wide}x{self.across}_{self.suffix}"

    @property
    def mask(self) -> str:
        return f"<{self.lanes} x i1>"

    def text(self) -> str:
        """The function's definition."""
        parameters = ", ".join(f"{'ptr' if p in POINTERS else 'i64'} %{p}" for p in PARAMETERS[self.kind])
        body = self._weighted() if self.kind == "weighted_rows" else self._dotted()
        return "\n".join([f"define void @{self.name}({parameters}) {attributes()} {{", "entry:", *self._ends(), *body,
                          "done:", "  ret void", "}"])

    def declarations(self) -> Iterator[str]:
        """Those of the intrinsics that the text calls."""
        vector, mask = self.vector, self.mask
        yield f"declare {vector} @llvm.fmuladd.{self.suffix}({vector}, {vector}, {vector})"
        yield f"declare {vector} @llvm.masked.load.{self.suffix}.p0(ptr, i32, {mask}, {vector})"
        yield f"declare void @llvm.masked.store.{self.suffix}.p0({vector}, ptr, i32, {mask})"
        yield f"declare {self.element} @llvm.vector.reduce.fadd.{self.suffix}({self.element}, {vector})"

    # --- the two functions ----------------------------------------------------------------------------------------------

    def _weighted(self) -> Iterator[str]:
        """For rows of windows, for vectors of columns, for rows of taps: add up; then store."""
        yield "  %adds.all = icmp ne i64 %accumulate, 0"
        yield from splat("%adds", "i1", "%adds.all", self.lanes)
        yield f"  br label %head{ROWS[0]}"
        came = "entry"
        for rows in ROWS:
            b, sums = f"%b{rows}", [f"%b{rows}.sum{r}" for r in range(rows)]
            yield from self._head(rows, came, "o")
            yield f"columns{rows}:"
            yield from self._columns(rows, f"store{rows}")
            yield f"  {b}.to = getelementptr i8, ptr {b}.o, i64 {b}.bytes"
            yield f"  {b}.old = and {self.mask} {b}.wanted, %adds"
            for r, total in enumerate(sums):
                yield from self._line(f"{b}.to{r}", f"{b}.to", "o_row", r)
                yield self._load(f"{total}.first", f"{b}.to{r}", f"{b}.old")
            yield f"  br label %tall{rows}"
            yield f"tall{rows}:"
            for name, kind, first in ((f"{b}.j", "i64", "0"), (f"{b}.w", "ptr", "%w"), (f"{b}.xj", "ptr", f"{b}.at"),
                                      *[(total, self.vector, f"{total}.first") for total in sums]):
                yield f"  {name} = phi {kind} [ {first}, %columns{rows} ], [ {name}.next, %taps{rows} ]"
            yield f"  {b}.some = icmp slt i64 {b}.j, %tall"
            yield f"  br i1 {b}.some, label %taps{rows}, label %store{rows}"
            yield f"taps{rows}:"
            for k in range(self.wide):
                yield f"  {b}.w{k}.offset = mul i64 %w_wide, {k}"
                yield f"  {b}.w{k}.place = getelementptr i8, ptr {b}.w, i64 {b}.w{k}.offset"
                yield f"  {b}.w{k}.one = load {self.element}, ptr {b}.w{k}.place"
                yield from splat(f"{b}.w{k}", self.element, f"{b}.w{k}.one", self.lanes)
                for r, total in enumerate(sums):
                    before, after = (total if k == 0 else f"{total}.{k}"), f"{total}.{k + 1}"
                    yield from self._value(f"{b}.v{r}.{k}", b, f"{b}.xj", r, k)
                    yield from self._add(after if k < self.wide - 1 else f"{total}.next", f"{b}.v{r}.{k}", f"{b}.w{k}",
                                         before, f"{b}.inside{k}")
            yield f"  {b}.j.next = add i64 {b}.j, 1"
            yield f"  {b}.w.next = getelementptr i8, ptr {b}.w, i64 %w_tall"
            yield f"  {b}.xj.next = getelementptr i8, ptr {b}.xj, i64 %tall_step"
            yield f"  br label %tall{rows}"
            yield f"store{rows}:"
            for r, total in enumerate(sums):
                yield (f"  call void @llvm.masked.store.{self.suffix}.p0({self.vector} {total}, ptr {b}.to{r}, "
                       f"i32 {self.bits // 8}, {self.mask} {b}.wanted)")
            yield f"  br i1 {b}.more, label %columns{rows}, label %next{rows}"
            yield from self._next(rows, "o", "o_row")
            came = f"after{rows}"
        yield "  br label %done"

    def _dotted(self) -> Iterator[str]:
        """For rows of windows, for vectors of columns: add up, for each tap. Sums of several rows become those of one."""
        yield f"  br label %head{ROWS[0]}"
        came, firsts = "entry", ["zeroinitializer"] * self.wide
        for rows in ROWS:
            b, cells = f"%b{rows}", [(r, k) for r in range(rows) for k in range(self.wide)]
            yield from self._head(rows, came, "g", [
                (f"{b}.all{r}.{k}", self.vector, firsts[k] if r == 0 else "zeroinitializer", f"{b}.sum{r}.{k}.next")
                for r, k in cells])
            yield f"columns{rows}:"
            for r, k in cells:
                yield (f"  {b}.sum{r}.{k} = phi {self.vector} [ {b}.all{r}.{k}, %rows{rows} ], "
                       f"[ {b}.sum{r}.{k}.next, %columns{rows} ]")
            yield from self._columns(rows, f"columns{rows}")
            yield f"  {b}.from = getelementptr i8, ptr {b}.g, i64 {b}.bytes"
            for r in range(rows):
                yield from self._line(f"{b}.from{r}", f"{b}.from", "g_row", r)
                yield self._load(f"{b}.g{r}", f"{b}.from{r}", f"{b}.wanted")
                for k in range(self.wide):
                    yield from self._value(f"{b}.v{r}.{k}", b, f"{b}.at", r, k)
                    yield from self._add(f"{b}.sum{r}.{k}.next", f"{b}.v{r}.{k}", f"{b}.g{r}", f"{b}.sum{r}.{k}",
                                         f"{b}.inside{k}")
            yield f"  br i1 {b}.more, label %columns{rows}, label %next{rows}"
            yield from self._next(rows, "g", "g_row")
            for r, k in cells[self.wide:]:
                before = f"{b}.all0.{k}" if r == 1 else f"{b}.fold{r - 1}.{k}"
                yield f"  {b}.fold{r}.{k} = fadd {self.vector} {before}, {b}.all{r}.{k}"
            came = f"after{rows}"
            firsts = [f"{b}.all0.{k}" if rows == 1 else f"{b}.fold{rows - 1}.{k}" for k in range(self.wide)]
        for k, total in enumerate(firsts):
            yield f"  %o{k} = getelementptr {self.element}, ptr %o, i64 {k}"
            yield f"  %o{k}.old = load {self.element}, ptr %o{k}"
            yield (f"  %o{k}.sum = call reassoc {self.element} @llvm.vector.reduce.fadd.{self.suffix}({self.element} -0.0, "
                   f"{self.vector} {total})")
            yield f"  %o{k}.new = fadd {self.element} %o{k}.old, %o{k}.sum"
            yield f"  store {self.element} %o{k}.new, ptr %o{k}"
        yield "  br label %done"

    # --- rows, columns, and what is at one tap ---------------------------------------------------------------------------

    def _head(self, rows: int, came: str, other: str, more: Iterable[tuple[str, str, str, str]] = ()) -> Iterator[str]:
        """The head of the loop over rows of windows, `rows` at once: ``.y``, and where they are in the image and in `other`.
        `more`: name, type, first and following value of what it has besides."""
        b, first = f"%b{rows}", rows == ROWS[0]
        if not first:
            yield f"  br label %head{rows}"
        yield f"head{rows}:"
        start = {"y": "0", "x": "%x", other: f"%{other}"} if first else {n: f"%b{ROWS[0]}.{n}" for n in ("y", "x", other)}
        phis = [(f"{b}.{n}", "i64" if n == "y" else "ptr", value, f"{b}.{n}.next") for n, value in start.items()]
        for name, kind, begin, following in (*phis, *more):
            yield f"  {name} = phi {kind} [ {begin}, %{came} ], [ {following}, %next{rows} ]"
        yield f"  {b}.y.next = add i64 {b}.y, {rows}"
        yield f"  {b}.enough = icmp sle i64 {b}.y.next, %rows"
        yield f"  br i1 {b}.enough, label %rows{rows}, label %after{rows}"
        yield f"rows{rows}:"
        yield f"  br label %columns{rows}"

    def _next(self, rows: int, other: str, other_step: str) -> Iterator[str]:
        """On to the next rows; and the beginning of what comes behind them all."""
        b = f"%b{rows}"
        yield f"next{rows}:"
        for name, step in (("x", "down"), (other, other_step)):
            yield f"  {b}.{name}.step = mul i64 %{step}, {rows}"
            yield f"  {b}.{name}.next = getelementptr i8, ptr {b}.{name}, i64 {b}.{name}.step"
        yield f"  br label %head{rows}"
        yield f"after{rows}:"

    def _columns(self, rows: int, end: str) -> Iterator[str]:
        """The head of the loop over vectors of columns, which ends with the block `end`: which there are (``.wanted``),
        those of tap k inside of the image (``.inside{k}``), where they begin in the image (``.at``) and elsewhere
        (``.bytes``), and whether there are `more`."""
        b, size = f"%b{rows}", self.bits // 8
        yield f"  {b}.c = phi i64 [ 0, %rows{rows} ], [ {b}.c.next, %{end} ]"
        yield f"  {b}.c.next = add i64 {b}.c, {self.lanes}"
        yield f"  {b}.more = icmp slt i64 {b}.c.next, %count"
        yield f"  {b}.left = sub i64 %count, {b}.c"
        yield from below(f"{b}.wanted", f"{b}.left", self.lanes)
        yield f"  {b}.bytes = mul i64 {b}.c, {size}"
        yield f"  {b}.x_bytes = mul i64 {b}.c, {size * self.across}"
        yield f"  {b}.at = getelementptr i8, ptr {b}.x, i64 {b}.x_bytes"
        yield f"  {b}.column = mul i64 {b}.c, {self.across}"
        for k in range(self.wide):
            for half in range(self.across):
                name = f"{b}.there{k}.{half}"
                yield f"  {name}.tap = mul i64 %apart, {k}"
                yield f"  {name}.first = add i64 {b}.column, {name}.tap"
                yield f"  {name}.behind = sub i64 {name}.first, %low"
                yield from self._within(name, f"{name}.behind", half * self.lanes, 1, f"%span{k}")
            if self.across == 1:
                yield f"  {b}.inside{k} = and {self.mask} {b}.there{k}.0, {b}.wanted"
            else:
                yield from self._within(f"{b}.inside{k}", f"{b}.there{k}.0.behind", 0, self.across, f"%span{k}")

    def _ends(self) -> Iterator[str]:
        """``%span{k}``: how many columns from `low` on tap k may read: to `high`, and to those of the last window."""
        yield "  %windows = sub i64 %count, 1"
        yield f"  %last = mul i64 %windows, {self.across}"
        for k in range(self.wide):
            span = f"%span{k}"
            yield f"  {span}.tap = mul i64 %apart, {k}"
            yield f"  {span}.last = add i64 %last, {span}.tap"
            yield f"  {span}.end = add i64 {span}.last, 1"
            yield f"  {span}.early = icmp slt i64 {span}.end, %high"
            yield f"  {span}.stop = select i1 {span}.early, i64 {span}.end, i64 %high"
            yield f"  {span}.all = sub i64 {span}.stop, %low"
            yield f"  {span}.any = icmp sgt i64 {span}.all, 0"
            yield f"  {span}.wide = select i1 {span}.any, i64 {span}.all, i64 0"
            yield f"  {span}.one = trunc i64 {span}.wide to i32"
            yield from splat(span, "i32", f"{span}.one", self.lanes)

    def _within(self, name: str, first: str, more: int, step: int, span: str) -> Iterator[str]:
        """`name`: which of the numbers first + more + lane * step are from 0 on and below `span`."""
        words = f"<{self.lanes} x i32>"
        numbers = ", ".join(f"i32 {more + lane * step}" for lane in range(self.lanes))
        yield f"  {name}.word = trunc i64 {first} to i32"
        yield from splat(f"{name}.words", "i32", f"{name}.word", self.lanes)
        yield f"  {name}.numbers = add {words} {name}.words, <{numbers}>"
        yield f"  {name} = icmp ult {words} {name}.numbers, {span}"

    def _line(self, name: str, place: str, step: str, number: int) -> Iterator[str]:
        """`name`: `place` in the row with this number."""
        yield f"  {name}.down = mul i64 %{step}, {number}"
        yield f"  {name} = getelementptr i8, ptr {place}, i64 {name}.down"

    def _load(self, name: str, place: str, mask: str) -> str:
        return (f"  {name} = call {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr {place}, i32 {self.bits // 8}, "
                f"{self.mask} {mask}, {self.vector} zeroinitializer)")

    def _value(self, name: str, b: str, place: str, row: int, k: int) -> Iterator[str]:
        """`name`: what the windows of a row have at tap k, of those at `place`."""
        yield f"  {name}.right = mul i64 %wide_step, {k}"
        yield f"  {name}.tap = getelementptr i8, ptr {place}, i64 {name}.right"
        yield from self._line(f"{name}.place", f"{name}.tap", "down", row)
        if self.across == 1:
            yield self._load(name, f"{name}.place", f"{b}.inside{k}")
            return
        yield self._load(f"{name}.near", f"{name}.place", f"{b}.there{k}.0")
        yield f"  {name}.beyond = getelementptr i8, ptr {name}.place, i64 {self.lanes * self.bits // 8}"
        yield self._load(f"{name}.far", f"{name}.beyond", f"{b}.there{k}.1")
        numbers = ", ".join(f"i32 {2 * lane}" for lane in range(self.lanes))
        yield (f"  {name} = shufflevector {self.vector} {name}.near, {self.vector} {name}.far, "
               f"<{self.lanes} x i32> <{numbers}>")

    def _add(self, name: str, x: str, y: str, total: str, inside: str) -> Iterator[str]:
        """`name`: `total`, and x * y where it is inside."""
        vector = self.vector
        yield f"  {name}.sum = call {vector} @llvm.fmuladd.{self.suffix}({vector} {x}, {vector} {y}, {vector} {total})"
        yield f"  {name} = select {self.mask} {inside}, {vector} {name}.sum, {vector} {total}"


def definitions(names: Iterable[str]) -> str:
    """The module that defines those of `names` that are pieces of this file; "" if there are none."""
    kernels = [WindowKernel(match[1], *[int(n) for n in match.groups()[1:]])
               for match in map(_NAME.fullmatch, names) if match]
    return "\n".join([*dict.fromkeys(line for k in kernels for line in k.declarations()), *[k.text() for k in kernels]])
