"""Pieces of products of narrow numbers (`tile_dot`) as LLVM text, for x86 with vectors of 512 bits.

The micro-kernel is like that of `tile_text`: one instruction multiplies 16 groups of B by a group of A in all lanes and
adds up the members. Elements of a group fill a word of 32 bits, and panels are made of words: 16 rows are
transposed as words, or the steps of a group are zipped into words. Names say what is to be defined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jitgrad.kernels.cpu.tile_dot import BIAS
from jitgrad.kernels.cpu.tile_text import exchanged_halves
from jitgrad.kernels.cpu.vector_text import attributes

LANES = 16                                      # words of a vector
WORDS = f"<{LANES} x i32>"
INSTRUCTIONS = {"bf16": ("llvm.x86.avx512bf16.dpbf16ps.512", "<32 x bfloat>"),
                "i8": ("llvm.x86.avx512.vpdpbusd.512", "<64 x i8>")}

GROUPS = {"bf16": 2, "i8": 4}
PIECES = {"bf16": "multiply_pairs", "i8": "multiply_quads"}
HEIGHTS, VECTORS = (14, 8, 4, 2, 1), 2
"""Rows and columns of micro-kernels: those of `tile.tile_for` on these processors, and parts of them."""

DOT_PARAMETERS = ("columns", "depth", "a", "a_row", "a_step", "b", "b_step", "c", "c_row", "accumulate")
"""Those of `tile_dot.multiply_pairs`, with addresses for pointers and offsets, strides in bytes, and for a micro-kernel a
depth that counts groups."""

_MOVE = re.compile(r"(interleave_steps|transpose_groups)_(\d+)(_biased)?")

_DOT = """\
define internal void @{name}({parameters}) {attributes} {{
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


def _kind(parameter: str) -> str:
    return "ptr" if parameter in ("a", "b", "c", "x", "o") else "i64"


def _listed(parameters: Iterable[str]) -> str:
    return ", ".join(f"{_kind(p)} %{p}" for p in parameters)


def _splat(name: str, kind: str, value: str, lanes: int) -> list[str]:
    """``name``: `value` in all lanes."""
    return [f"  {name}.lane = insertelement <{lanes} x {kind}> poison, {kind} {value}, i32 0",
            f"  {name} = shufflevector <{lanes} x {kind}> {name}.lane, <{lanes} x {kind}> poison, "
            f"<{lanes} x i32> zeroinitializer"]


def _first(name: str, count: str, lanes: int) -> list[str]:
    """``name``: the lanes below `count`, which is 64 at most."""
    numbers = ", ".join(f"i8 {k}" for k in range(lanes))
    return [f"  {name}.count = trunc i64 {count} to i8", *_splat(f"{name}.counts", "i8", f"{name}.count", lanes),
            f"  {name} = icmp ult <{lanes} x i8> <{numbers}>, {name}.counts"]


@dataclass(frozen=True, slots=True)
class DotKernel:
    """The micro-kernel for pairs of ``bf16`` or quads of ``i8``: exactly `rows` rows, and columns up to `columns` in
    `vectors` vectors. Panels of B are filled up to the tile's width, so only C is masked."""

    short: str
    rows: int
    vectors: int

    @property
    def name(self) -> str:
        return f"dot_{self.short}_{self.rows}x{self.vectors}"

    @property
    def group(self) -> int:
        return GROUPS[self.short]

    @property
    def vector(self) -> str:
        return f"<{LANES} x {'float' if self.short == 'bf16' else 'i32'}>"

    @property
    def suffix(self) -> str:
        """How the names of LLVM's vector intrinsics end."""
        return f"v{LANES}{'f32' if self.short == 'bf16' else 'i32'}"

    def text(self) -> str:
        """The function's definition."""
        cells = [(i, j) for i in range(self.rows) for j in range(self.vectors)]
        return _DOT.format(
            attributes=attributes(), name=self.name, parameters=_listed(DOT_PARAMETERS),
            entry="\n".join([*self._masks(), *[line for i, j in cells for line in self._place_in_c(i, j)]]),
            continue_="\n".join([f"  %old{i}.{j} = call {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr %c{i}.{j}, "
                                 f"i32 4, <{LANES} x i1> %mask{j}, {self.vector} zeroinitializer)" for i, j in cells]),
            begin=self._phis(cells, "start", ("zeroinitializer", "entry"), ("%old{cell}", "continue")),
            loop="\n".join([self._phis(cells, "sum", ("%start{cell}", "begin"), ("%next{cell}", "loop")), *self._step()]),
            done="\n".join([self._phis(cells, "end", ("%start{cell}", "begin"), ("%next{cell}", "loop")),
                            *self._balance(cells), *[self._store(i, j) for i, j in cells]]))

    def _masks(self) -> list[str]:
        """``%mask{j}``: which lanes of vector j are below `columns`."""
        lines = []
        for j in range(self.vectors):
            lines += [f"  %rest{j} = sub i64 %columns, {j * LANES}",
                      f"  %some{j} = call i64 @llvm.smax.i64(i64 %rest{j}, i64 0)",
                      f"  %few{j} = call i64 @llvm.smin.i64(i64 %some{j}, i64 {LANES})",
                      *_first(f"%mask{j}", f"%few{j}", LANES)]
        return lines

    def _place_in_c(self, i: int, j: int) -> list[str]:
        return [f"  %c{i}.{j}.row = mul i64 %c_row, {i}", f"  %c{i}.{j}.offset = add i64 %c{i}.{j}.row, {j * LANES * 4}",
                f"  %c{i}.{j} = getelementptr i8, ptr %c, i64 %c{i}.{j}.offset"]

    def _phis(self, cells: list[tuple[int, int]], name: str, *arriving: tuple[str, str]) -> str:
        return "\n".join(f"  %{name}{i}.{j} = phi {self.vector} " + ", ".join(
            f"[ {value.format(cell=f'{i}.{j}')}, %{block} ]" for value, block in arriving) for i, j in cells)

    def _step(self) -> list[str]:
        """One group of the depth: that of B in registers, and each row's of A in all lanes."""
        instruction, members = INSTRUCTIONS[self.short]
        lines = [line for j in range(self.vectors) for line in (
            f"  %b{j}.place = getelementptr {WORDS}, ptr %b.here, i64 {j}",
            f"  %b{j} = load {members}, ptr %b{j}.place, align 1")]
        for i in range(self.rows):
            lines += [f"  %a{i}.place = getelementptr i8, ptr %a.here, i64 {4 * i}",
                      f"  %a{i}.one = load i32, ptr %a{i}.place, align 1",
                      *_splat(f"%a{i}.words", "i32", f"%a{i}.one", LANES),
                      f"  %a{i} = bitcast {WORDS} %a{i}.words to {members}"]
            lines += [f"  %next{i}.{j} = call {self.vector} @{instruction}({self.vector} %sum{i}.{j}, "
                      f"{members} %a{i}, {members} %b{j})" for j in range(self.vectors)]
        return lines

    def _balance(self, cells: list[tuple[int, int]]) -> list[str]:
        """``%whole{i}.{j}``: sums of quads plus the line in front of B."""
        if self.short == "bf16":
            return []
        lines = ["  %back = sub i64 0, %b_step", "  %head = getelementptr i8, ptr %b, i64 %back"]
        for j in range(self.vectors):
            lines += [f"  %head{j}.place = getelementptr {WORDS}, ptr %head, i64 {j}",
                      f"  %head{j} = load {WORDS}, ptr %head{j}.place, align 1"]
        return lines + [f"  %whole{i}.{j} = add {WORDS} %end{i}.{j}, %head{j}" for i, j in cells]

    def _store(self, i: int, j: int) -> str:
        value = "end" if self.short == "bf16" else "whole"
        return (f"  call void @llvm.masked.store.{self.suffix}.p0({self.vector} %{value}{i}.{j}, ptr %c{i}.{j}, i32 4, "
                f"<{LANES} x i1> %mask{j})")

    def declarations(self) -> list[str]:
        """Those of the intrinsics that the text calls."""
        instruction, members = INSTRUCTIONS[self.short]
        return [f"declare {self.vector} @{instruction}({self.vector}, {members}, {members})",
                f"declare {self.vector} @llvm.masked.load.{self.suffix}.p0(ptr, i32, <{LANES} x i1>, {self.vector})",
                f"declare void @llvm.masked.store.{self.suffix}.p0({self.vector}, ptr, i32, <{LANES} x i1>)",
                "declare i64 @llvm.smax.i64(i64, i64)", "declare i64 @llvm.smin.i64(i64, i64)"]


def multiply_text(short: str) -> list[str]:
    """The function of the piece, and its micro-kernels: rows are taken in the largest portions that fit."""
    kernels = [DotKernel(short, rows, vectors) for vectors in (1, VECTORS) for rows in HEIGHTS]
    lines = [f"define void @{PIECES[short]}({_listed(('rows', *DOT_PARAMETERS))}) {attributes()} {{", "entry:",
             f"  %steps = add i64 %depth, {GROUPS[short] - 1}", f"  %groups = sdiv i64 %steps, {GROUPS[short]}",
             f"  %narrow = icmp sle i64 %columns, {LANES}", "  br label %head", "head:",
             "  %left = phi i64 [ %rows, %entry ], [ %left.next, %advance ]",
             "  %a.here = phi ptr [ %a, %entry ], [ %a.next, %advance ]",
             "  %c.here = phi ptr [ %c, %entry ], [ %c.next, %advance ]", f"  br label %test{HEIGHTS[0]}"]
    for rows, smaller in zip(HEIGHTS, [f"test{n}" for n in HEIGHTS[1:]] + ["end"], strict=True):
        lines += [f"test{rows}:", f"  %fits{rows} = icmp sge i64 %left, {rows}",
                  f"  br i1 %fits{rows}, label %choose{rows}, label %{smaller}",
                  f"choose{rows}:", f"  br i1 %narrow, label %take{rows}x1, label %take{rows}x{VECTORS}"]
    for kernel in kernels:
        given = {"depth": "groups", "a": "a.here", "c": "c.here"}
        arguments = ", ".join(f"{_kind(p)} %{given.get(p, p)}" for p in DOT_PARAMETERS)
        lines += [f"take{kernel.rows}x{kernel.vectors}:", f"  call void @{kernel.name}({arguments})", "  br label %advance"]
    taken = ", ".join(f"[ {k.rows}, %take{k.rows}x{k.vectors} ]" for k in kernels)
    lines += ["advance:", f"  %taken = phi i64 {taken}", "  %left.next = sub i64 %left, %taken",
              "  %a.bytes = mul i64 %taken, %a_row", "  %a.next = getelementptr i8, ptr %a.here, i64 %a.bytes",
              "  %c.bytes = mul i64 %taken, %c_row", "  %c.next = getelementptr i8, ptr %c.here, i64 %c.bytes",
              "  br label %head", "end:", "  ret void", "}"]
    return [*kernels[0].declarations(), *[k.text() for k in kernels], "\n".join(lines)]


# --- panels ---------------------------------------------------------------------------------------------------------

INTERLEAVE_PARAMETERS = ("count", "steps", "x", "x_step", "o", "o_step")
TRANSPOSE_PARAMETERS = ("rows", "steps", "x", "x_row", "o", "o_row")
BALANCE_PARAMETERS = ("columns", "depth", "b", "b_step")
"""Those of the functions of `tile_dot`, with addresses for pointers and offsets, and strides in bytes."""


def _head(name: str, parameters: Iterable[str]) -> str:
    return f"define void @{name}({_listed(parameters)}) {attributes()} {{"


def _biased(name: str, value: str, biased: bool) -> str:
    """``name``: words `value`, every byte 128 higher if `biased`."""
    word = sum(BIAS << 8 * k for k in range(4)) if biased else 0
    return f"  {name} = xor {WORDS} {value}, splat (i32 {word})"


def interleave_text(group: int, biased: bool) -> str:
    """Of up to 16 elements side by side in each of `steps` lines, `group` lines at a time become the members of words."""
    bits, lanes = 32 // group, f"<{LANES} x i{32 // group}>"
    lines = []
    for t in range(group):
        lines += [f"  %is{t} = icmp slt i64 {t}, %left",
                  f"  %mask{t} = select i1 %is{t}, <{LANES} x i1> %wanted, <{LANES} x i1> zeroinitializer",
                  f"  %offset{t} = mul i64 %x_step, {t}", f"  %from{t} = getelementptr i8, ptr %x.here, i64 %offset{t}",
                  f"  %run{t} = call {lanes} @llvm.masked.load.v{LANES}i{bits}.p0(ptr %from{t}, i32 1, "
                  f"<{LANES} x i1> %mask{t}, {lanes} zeroinitializer)",
                  f"  %wide{t} = zext {lanes} %run{t} to {WORDS}",
                  f"  %moved{t} = shl {WORDS} %wide{t}, splat (i32 {t * bits})",
                  f"  %word{t} = or {WORDS} {f'%word{t - 1}' if t else 'zeroinitializer'}, %moved{t}"]
    head = _head(f"interleave_steps_{group}{'_biased' * biased}", INTERLEAVE_PARAMETERS)
    return "\n".join([
        head, "entry:", *_first("%wanted", "%count", LANES), f"  %x_group = mul i64 %x_step, {group}",
        "  %any = icmp sgt i64 %steps, 0", "  br i1 %any, label %loop, label %done",
        "loop:", "  %left = phi i64 [ %steps, %entry ], [ %left.next, %loop ]",
        "  %x.here = phi ptr [ %x, %entry ], [ %x.next, %loop ]", "  %o.here = phi ptr [ %o, %entry ], [ %o.next, %loop ]",
        *lines, _biased("%made", f"%word{group - 1}", biased),
        f"  call void @llvm.masked.store.v{LANES}i32.p0({WORDS} %made, ptr %o.here, i32 1, <{LANES} x i1> %wanted)",
        f"  %left.next = sub i64 %left, {group}", "  %x.next = getelementptr i8, ptr %x.here, i64 %x_group",
        "  %o.next = getelementptr i8, ptr %o.here, i64 %o_step", "  %again = icmp sgt i64 %left.next, 0",
        "  br i1 %again, label %loop, label %done", "done:", "  ret void", "}"])


def transpose_text(group: int, biased: bool) -> str:
    """16 rows of up to 16 words, transposed. Lines of words that hold no step are stored first, to the place of the last
    one that does."""
    bits, count = 32 // group, LANES * group
    lines = ["  %last = sub i64 %rows, 1", "  %final = sub i64 %steps, 1", f"  %bottom = sdiv i64 %final, {group}",
             *_first("%mask", "%steps", count)]
    for i in range(LANES):
        lines += [f"  %inside{i} = icmp slt i64 {i}, %last", f"  %row{i} = select i1 %inside{i}, i64 {i}, i64 %last",
                  f"  %offset{i} = mul i64 %row{i}, %x_row", f"  %from{i} = getelementptr i8, ptr %x, i64 %offset{i}",
                  f"  %line{i} = call <{count} x i{bits}> @llvm.masked.load.v{count}i{bits}.p0(ptr %from{i}, i32 1, "
                  f"<{count} x i1> %mask, <{count} x i{bits}> zeroinitializer)",
                  f"  %words{i} = bitcast <{count} x i{bits}> %line{i} to {WORDS}",
                  _biased(f"%v{i}.{LANES}", f"%words{i}", biased)]
    lines += exchanged_halves(LANES, WORDS)
    for j in reversed(range(LANES)):
        lines += [f"  %within{j} = icmp slt i64 {j}, %bottom", f"  %at{j} = select i1 %within{j}, i64 {j}, i64 %bottom",
                  f"  %place{j} = mul i64 %o_row, %at{j}", f"  %to{j} = getelementptr i8, ptr %o, i64 %place{j}",
                  f"  store {WORDS} %v{j}.1, ptr %to{j}, align 1"]
    head = _head(f"transpose_groups_{group}{'_biased' * biased}", TRANSPOSE_PARAMETERS)
    return "\n".join([head, *lines, "  ret void", "}"])


def balance_text() -> str:
    """The line in front of a panel of quads."""
    instruction, members = INSTRUCTIONS["i8"]
    numbers = range(VECTORS)
    phis = [f"  %{name}{j} = phi {WORDS} [ zeroinitializer, %entry ], [ %next{j}, %loop ]"
            for name in ("sum", "total") for j in numbers]
    body = [line for j in numbers for line in (
        f"  %b{j}.place = getelementptr {WORDS}, ptr %here, i64 {j}",
        f"  %b{j} = load {members}, ptr %b{j}.place, align 1",
        f"  %next{j} = call {WORDS} @{instruction}({WORDS} %sum{j}, {members} splat (i8 {BIAS}), {members} %b{j})")]
    stores = [line for j in numbers for line in (
        f"  %negative{j} = sub {WORDS} zeroinitializer, %total{j}",
        f"  %to{j} = getelementptr {WORDS}, ptr %line, i64 {j}", f"  store {WORDS} %negative{j}, ptr %to{j}, align 1")]
    return "\n".join([
        _head("balance_panel", BALANCE_PARAMETERS), "entry:", "  %back = sub i64 0, %b_step",
        "  %line = getelementptr i8, ptr %b, i64 %back", "  %steps = add i64 %depth, 3", "  %groups = sdiv i64 %steps, 4",
        "  %any = icmp sgt i64 %groups, 0", "  br i1 %any, label %loop, label %done",
        "loop:", *phis[:VECTORS], "  %left = phi i64 [ %groups, %entry ], [ %left.next, %loop ]",
        "  %here = phi ptr [ %b, %entry ], [ %next, %loop ]", *body, "  %left.next = sub i64 %left, 1",
        "  %next = getelementptr i8, ptr %here, i64 %b_step", "  %again = icmp sgt i64 %left.next, 0",
        "  br i1 %again, label %loop, label %done", "done:", *phis[VECTORS:], *stores, "  ret void", "}"])


def _declarations() -> list[str]:
    """Those of the intrinsics that panels are made with."""
    loads = [(LANES * many, 32 // group) for group in GROUPS.values() for many in (1, group)]
    return [*[f"declare <{n} x i{bits}> @llvm.masked.load.v{n}i{bits}.p0(ptr, i32, <{n} x i1>, <{n} x i{bits}>)"
              for n, bits in loads], *DotKernel("i8", 1, 1).declarations()]


def definitions(names: Iterable[str]) -> str:
    """The module that defines those of `names` that are pieces of this file; "" if there are none."""
    wanted = set(names)
    texts = [line for short, piece in PIECES.items() if piece in wanted for line in multiply_text(short)]
    texts += [(interleave_text if found[1] == "interleave_steps" else transpose_text)(int(found[2]), found[3] is not None)
              for found in map(_MOVE.fullmatch, sorted(wanted)) if found]
    texts += [balance_text()] if "balance_panel" in wanted else []
    return "\n".join(dict.fromkeys([*_declarations(), *texts])) if texts else ""
