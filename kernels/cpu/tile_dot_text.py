"""Pieces of products of narrow numbers (`tile_dot`) as LLVM text, for x86 with vectors of 512 bits.

The micro-kernel is that of `tile_text` with another step: one instruction multiplies 16 groups of B by a group of A in all
lanes and adds the members up. Elements of a group fill a word of 32 bits, and panels are made of words: 16 rows are
transposed as words, or the steps of a group are zipped into words. Names say what is to be defined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from jitgrad.kernels.cpu.tile_dot import BIAS
from jitgrad.kernels.cpu.tile_text import MicroKernel, exchanged_halves

LANES = 16                                      # words of a vector
WORDS = f"<{LANES} x i32>"
INSTRUCTIONS = {"bf16": ("llvm.x86.avx512bf16.dpbf16ps.512", "<32 x bfloat>"),
                "i8": ("llvm.x86.avx512.vpdpbusd.512", "<64 x i8>")}

_MULTIPLY = re.compile(r"dot_(\d+)x(\d+)_v(\d+)(bf16|i8)(_masked)?")
_MOVE = re.compile(r"(zip_steps|transpose_groups)_(\d+)(_biased)?")
_BALANCE = re.compile(r"balance_(\d+)")


@dataclass(frozen=True, slots=True)
class DotKernel(MicroKernel):
    """The micro-kernel for pairs of ``bf16`` or for quads of ``i8``; lanes and bits are those of a sum. Panels of B are
    as wide as the tile, so only C is masked. The line that corrects quads is added at the end."""

    short: str = "bf16"

    @property
    def name(self) -> str:
        return f"dot_{self.rows}x{self.vectors}_v{self.lanes}{self.short}{'_masked' if self.masked else ''}"

    @property
    def suffix(self) -> str:
        return f"v{self.lanes}{'f32' if self.short == 'bf16' else 'i32'}"

    @property
    def element(self) -> str:
        return "float" if self.short == "bf16" else "i32"

    def _step(self) -> list[str]:
        instruction, groups = INSTRUCTIONS[self.short]
        lines = []
        for j in range(self.vectors):
            lines += [f"  %b{j}.place = getelementptr {WORDS}, ptr %b.here, i64 {j}",
                      f"  %b{j} = load {groups}, ptr %b{j}.place, align 1"]
        for i in range(self.rows):
            lines += [*self._place_in_a(i), f"  %a{i}.one = load i32, ptr %a{i}.place, align 1",
                      *self._splat(f"%a{i}.words", "i32", f"%a{i}.one"),
                      f"  %a{i} = bitcast {WORDS} %a{i}.words to {groups}"]
            lines += [f"  %next{i}.{j} = call {self.vector} @{instruction}({self.vector} %sum{i}.{j}, "
                      f"{groups} %a{i}, {groups} %b{j})" for j in range(self.vectors)]
        return lines

    def _finish(self, i: int, j: int) -> list[str]:
        if self.short == "bf16":
            return [self._store(f"%end{i}.{j}", f"%c{i}.{j}", j)]
        head = [] if i else ["  %head.step = sub i64 0, %b_step", "  %head = getelementptr i8, ptr %b, i64 %head.step"]
        line = [] if i else [f"  %head{j}.place = getelementptr {WORDS}, ptr %head, i64 {j}",
                             f"  %head{j} = load {WORDS}, ptr %head{j}.place, align 1"]
        return [*(head if j == 0 else []), *line, f"  %whole{i}.{j} = add {WORDS} %end{i}.{j}, %head{j}",
                self._store(f"%whole{i}.{j}", f"%c{i}.{j}", j)]

    def declarations(self) -> list[str]:
        instruction, groups = INSTRUCTIONS[self.short]
        return [f"declare {self.vector} @{instruction}({self.vector}, {groups}, {groups})",
                *MicroKernel.declarations(self)[1:]]


# --- panels ---------------------------------------------------------------------------------------------------------

ZIP_PARAMETERS = ("count", "steps", "x", "x_step", "o")
GROUPS_PARAMETERS = ("rows", "steps", "x", "x_row", "o", "o_row")
BALANCE_PARAMETERS = ("depth", "b", "b_step")
"""Those of the functions of `tile_dot`, with addresses for pointers and offsets, and strides in bytes; `depth` counts
groups, and `steps` of `transpose_groups` elements."""


def _head(name: str, parameters: Iterable[str]) -> str:
    listed = ", ".join(f"{'ptr' if p in ('x', 'o', 'b') else 'i64'} %{p}" for p in parameters)
    return f"define void @{name}({listed}) noinline nounwind {{"


def _first(name: str, count: str, lanes: int) -> list[str]:
    """``name``: the lanes below `count`, which is 64 at most."""
    numbers = ", ".join(f"i8 {k}" for k in range(lanes))
    return [f"  {name}.count = trunc i64 {count} to i8",
            f"  {name}.lane = insertelement <{lanes} x i8> poison, i8 {name}.count, i32 0",
            f"  {name}.counts = shufflevector <{lanes} x i8> {name}.lane, <{lanes} x i8> poison, "
            f"<{lanes} x i32> zeroinitializer",
            f"  {name} = icmp ult <{lanes} x i8> <{numbers}>, {name}.counts"]


def _biased(name: str, value: str, biased: bool) -> str:
    """``name``: words `value`, every byte 128 higher if `biased`."""
    word = sum(BIAS << 8 * k for k in range(4)) if biased else 0
    return f"  {name} = xor {WORDS} {value}, splat (i32 {word})"


def zip_text(group: int, biased: bool) -> str:
    """Up to four runs of up to 16 elements become the members of 16 words."""
    bits, lanes = 32 // group, f"<{LANES} x i{32 // group}>"
    lines = [*_first("%wanted", "%count", LANES), f"  %word0 = add {WORDS} zeroinitializer, zeroinitializer"]
    for t in range(group):
        lines += [f"  %is{t} = icmp slt i64 {t}, %steps", f"  %all{t} = select i1 %is{t}, i64 %count, i64 0",
                  *_first(f"%mask{t}", f"%all{t}", LANES),
                  f"  %offset{t} = mul i64 %x_step, {t}", f"  %from{t} = getelementptr i8, ptr %x, i64 %offset{t}",
                  f"  %run{t} = call {lanes} @llvm.masked.load.v{LANES}i{bits}.p0(ptr %from{t}, i32 1, "
                  f"<{LANES} x i1> %mask{t}, {lanes} zeroinitializer)",
                  f"  %wide{t} = zext {lanes} %run{t} to {WORDS}",
                  f"  %moved{t} = shl {WORDS} %wide{t}, splat (i32 {t * bits})",
                  f"  %word{t + 1} = or {WORDS} %word{t}, %moved{t}"]
    lines += [_biased("%made", f"%word{group}", biased),
              f"  call void @llvm.masked.store.v{LANES}i32.p0({WORDS} %made, ptr %o, i32 1, <{LANES} x i1> %wanted)"]
    return "\n".join([_head(f"zip_steps_{group}{'_biased' * biased}", ZIP_PARAMETERS), *lines, "  ret void", "}"])


def groups_text(group: int, biased: bool) -> str:
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
    return "\n".join([_head(f"transpose_groups_{group}{'_biased' * biased}", GROUPS_PARAMETERS), *lines, "  ret void",
                      "}"])


def balance_text(vectors: int) -> str:
    """The line in front of a panel of quads, `vectors` wide."""
    instruction, groups = INSTRUCTIONS["i8"]
    name, body, end = _head(f"balance_{vectors}", BALANCE_PARAMETERS), [], []
    phis = [f"  %sum{j} = phi {WORDS} [ zeroinitializer, %entry ], [ %next{j}, %loop ]" for j in range(vectors)]
    for j in range(vectors):
        body += [f"  %b{j}.place = getelementptr {WORDS}, ptr %here, i64 {j}",
                 f"  %b{j} = load {groups}, ptr %b{j}.place, align 1",
                 f"  %next{j} = call {WORDS} @{instruction}({WORDS} %sum{j}, {groups} splat (i8 {BIAS}), {groups} %b{j})"]
        end += [f"  %total{j} = phi {WORDS} [ zeroinitializer, %entry ], [ %next{j}, %loop ]"]
    stores = [line for j in range(vectors) for line in (
        f"  %negative{j} = sub {WORDS} zeroinitializer, %total{j}",
        f"  %to{j} = getelementptr {WORDS}, ptr %head, i64 {j}",
        f"  store {WORDS} %negative{j}, ptr %to{j}, align 1")]
    return "\n".join([
        name, "entry:", "  %back = sub i64 0, %b_step", "  %head = getelementptr i8, ptr %b, i64 %back",
        "  %any = icmp sgt i64 %depth, 0", "  br i1 %any, label %loop, label %done",
        "loop:", *phis, "  %left = phi i64 [ %depth, %entry ], [ %left.next, %loop ]",
        "  %here = phi ptr [ %b, %entry ], [ %next, %loop ]", *body, "  %left.next = sub i64 %left, 1",
        "  %next = getelementptr i8, ptr %here, i64 %b_step", "  %again = icmp sgt i64 %left.next, 0",
        "  br i1 %again, label %loop, label %done", "done:", *end, *stores, "  ret void", "}"])


def _declarations() -> list[str]:
    """Those of the intrinsics that panels are made with."""
    loads = [(LANES * many, 32 // group) for group in (2, 4) for many in (1, group)]
    return [f"declare <{n} x i{bits}> @llvm.masked.load.v{n}i{bits}.p0(ptr, i32, <{n} x i1>, <{n} x i{bits}>)"
            for n, bits in loads] + [
        f"declare void @llvm.masked.store.v{LANES}i32.p0({WORDS}, ptr, i32, <{LANES} x i1>)",
        *DotKernel(1, 1, LANES, 32, True, "i8").declarations()]


def definitions(names: Iterable[str]) -> str:
    """The module that defines those of `names` that are pieces of this file; "" if there are none."""
    kernels = [DotKernel(*[int(n) for n in found.groups()[:3]], 32, found[5] is not None, found[4])
               for found in map(_MULTIPLY.fullmatch, names) if found]
    texts = [(zip_text if found[1] == "zip_steps" else groups_text)(int(found[2]), found[3] is not None)
             for found in map(_MOVE.fullmatch, names) if found]
    texts += [balance_text(int(found[1])) for found in map(_BALANCE.fullmatch, names) if found]
    texts += [k.text() for k in kernels]
    declared = [line for k in kernels for line in k.declarations()] + _declarations()
    return "\n".join([*dict.fromkeys(declared), *texts]) if texts else ""
