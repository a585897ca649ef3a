"""The linear maps of Winograd's convolution on vectors of channels, as plain Python and as LLVM text.

A convolution of 3x3 makes 2x2 results of 4x4 elements with 16 multiplications instead of 36: both factors are mapped
into a space where it is a product element by element, and the product is mapped back (Lavin and Gray, "Fast Algorithms
for Convolutional Neural Networks", 2016, F(2x2, 3x3); the gradient in the weights is F(3x3, 2x2) with the same maps
turned around). Each map is O = L X L^T for a small matrix L, done for many channels at once.

F(4x4, 3x3) takes 36 multiplications instead of 144. Its maps add up more, and take differences of more, so that errors are
two to four times those of a direct sum, with the points at which it evaluates polynomials: 0, 2/3, -2/3, 3/2, -3/2 and
infinity. The usual ones, 1 and 2 in place of 2/3 and 3/2, double them (Barabasz et al., "Error Analysis and Improving the
Accuracy of Winograd Convolution for Deep Neural Networks", 2018). L is a product of matrices there: first come sums of even
and of odd terms, which a point and its negative share.

With a stride of two there is a product with even elements, of two taps, and one with odd elements, of one tap. Two results
of the former, F(2, 2), take three multiplications, of the latter two: 25 instead of 36 in two dimensions. With elements d
and taps g they are (d0 - d2) g0, d1 g1, d2 (g0 + g2), d3 g1 and (d4 - d2) g2; one result is the sum of the first three, the
other one of the last three. The gradient in the image is this turned around: it spreads 3x3 elements over 4x4.

One side of a map may reach over the edge of an image. Elements outside are read from, or written to, a spare place.

Infinities become NaN where a map takes differences, so a map whose results are final says whether one is not finite.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jitgrad.kernels.cpu.vector_text import attributes

Pointer = Any                                   # a typed pointer of kernel text
Matrix = tuple[tuple[float, ...], ...]
Stages = tuple[Matrix, ...]

_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_WEIGHT = ((1, 0, 0), (.5, .5, .5), (.5, -.5, .5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

_NEAR, _FAR = 2 / 3, 3 / 2                      # points of F(4x4, 3x3), beside 0 and infinity: these and their negatives
_NEAR_2, _FAR_2 = _NEAR ** 2, _FAR ** 2
_NEAR_SHARE, _FAR_SHARE = 1 / (2 * _NEAR_2 * (_NEAR_2 - _FAR_2)), 1 / (2 * _FAR_2 * (_FAR_2 - _NEAR_2))
_PAIRS = ((1, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0), (0, 1, -1, 0, 0, 0), (0, 0, 0, 1, 1, 0), (0, 0, 0, 1, -1, 0),
          (0, 0, 0, 0, 0, 1))                   # sum and difference of what belongs to a point and to its negative

_LARGE_INPUT = (
    ((1, 0, -_NEAR_2 - _FAR_2, 0, 1, 0), (0, 0, -_FAR_2, 0, 1, 0), (0, -_FAR_2, 0, 1, 0, 0),
     (0, 0, -_NEAR_2, 0, 1, 0), (0, -_NEAR_2, 0, 1, 0, 0), (0, 1, 0, -_NEAR_2 - _FAR_2, 0, 1)),
    ((1, 0, 0, 0, 0, 0), (0, 1, _NEAR, 0, 0, 0), (0, 1, -_NEAR, 0, 0, 0), (0, 0, 0, 1, _FAR, 0), (0, 0, 0, 1, -_FAR, 0),
     (0, 0, 0, 0, 0, 1)))
_LARGE_OUTPUT = (_PAIRS, (
    (1, 1, 0, 1, 0, 0), (0, 0, _NEAR, 0, _FAR, 0), (0, _NEAR_2, 0, _FAR_2, 0, 0),
    (0, 0, _NEAR ** 3, 0, _FAR ** 3, 1)))
_LARGE_WEIGHT = (
    ((1, 0, 0), (_NEAR_SHARE, 0, _NEAR_SHARE * _NEAR_2), (0, _NEAR_SHARE * _NEAR, 0),
     (_FAR_SHARE, 0, _FAR_SHARE * _FAR_2), (0, _FAR_SHARE * _FAR, 0), (0, 0, 1)), _PAIRS)

_STRIDED_INPUT = ((1, 0, -1, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, -1, 0, 1))
_STRIDED_WEIGHT = ((1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1))
_STRIDED_OUTPUT = ((1, 1, 0), (0, 1, 1))                                        # of the sums of products 0 and 1, 2, 3 and 4

_SPREAD_INPUT = ((1, -1, 0), (0, 1, 0), (0, -1, 1), (1, 0, 0))
_SPREAD_OUTPUT = ((0, 0, 0, 1, 0), (1, 1, 0, 0, 0), (0, 0, 0, 0, 1), (0, 1, 1, 0, 0))


def _transposed(stages: Stages) -> Stages:
    return tuple([tuple(zip(*matrix, strict=True)) for matrix in reversed(stages)])


MAPS: dict[str, tuple[Stages, str]] = {
    "winograd_input": ((_INPUT,), "x"),
    "winograd_weight": ((_WEIGHT,), "x"),
    "winograd_output": ((_OUTPUT,), "o"),
    "winograd_output_grad": (_transposed((_OUTPUT,)), "x"),
    "winograd_weight_grad": (_transposed((_WEIGHT,)), "o"),
    "winograd_large_input": (_LARGE_INPUT, "x"),
    "winograd_large_weight": (_LARGE_WEIGHT, "x"),
    "winograd_large_output": (_LARGE_OUTPUT, "o"),
    "winograd_large_output_grad": (_transposed(_LARGE_OUTPUT), "x"),
    "winograd_large_weight_grad": (_transposed(_LARGE_WEIGHT), "o"),
    "winograd_strided_input": ((_STRIDED_INPUT,), "x"),
    "winograd_strided_weight": ((_STRIDED_WEIGHT,), "x"),
    "winograd_strided_output": ((_STRIDED_OUTPUT,), "o"),
    "winograd_strided_output_grad": (_transposed((_STRIDED_OUTPUT,)), "x"),
    "winograd_strided_weight_grad": (_transposed((_STRIDED_WEIGHT,)), "o"),
    "winograd_spread_input": ((_SPREAD_INPUT,), "x"),
    "winograd_spread_weight": ((_STRIDED_WEIGHT,), "x"),                        # of taps that are turned around
    "winograd_spread_output": ((_SPREAD_OUTPUT,), "o"),
}
"""By name: the matrices whose product L is, the first to be applied first, and which side may reach over an edge."""

WATCHED = frozenset([name for name in MAPS if name.endswith("_output")])
"""Those that return whether any result may not be finite, as 1 or 0, and surely 1 if one is not; the others return
nothing."""

PARAMETERS = ("count", "x", "x_row", "x_column", "o", "o_row", "o_column", "row_low", "row_high", "column_low",
              "column_high", "spare")
"""Those of the functions with addresses for pointers and offsets, and strides in bytes."""

POINTERS = frozenset(("x", "o", "spare"))


def _plain(name: str, stages: Stages, ragged: str) -> Callable[..., int | None]:
    """The map `name` as a loop over channels."""

    def transform(count: int, x: Pointer, x_offset: int, x_row: int, x_column: int, o: Pointer, o_offset: int, o_row: int,
                  o_column: int, row_low: int, row_high: int, column_low: int, column_high: int, spare: int) -> int | None:
        def place(offset: int, row: int, column: int, i: int, j: int, side: str) -> int:
            inside = row_low <= i < row_high and column_low <= j < column_high
            return offset + i * row + j * column if inside or side != ragged else spare

        outputs, inputs = range(len(stages[-1])), range(len(stages[0][0]))
        odd = False
        for c in range(count):
            half = [_mapped(stages, [x[place(x_offset, x_row, x_column, i, j, "x") + c] for i in inputs]) for j in inputs]
            for i in outputs:
                for j, result in enumerate(_mapped(stages, [column[i] for column in half])):
                    o[place(o_offset, o_row, o_column, i, j, "o") + c] = result
                    odd |= bool(result - result != 0)
        return int(odd) if name in WATCHED else None

    transform.__name__ = name
    watched = """ Returned is 1 if an element of O is not finite, else 0; natively 1, too, if the sum of the elements of a
    channel is not.""" if name in WATCHED else ""
    transform.__doc__ = f"""O = L X L^T of {name}, for `count` channels: element (i, j) of X is at ``x[x_offset + i * x_row
    + j * x_column + channel]``, of O likewise. On the side {ragged} only elements with row_low <= i < row_high and
    column_low <= j < column_high are there; the others are at `spare`.{watched}"""
    return transform


def _mapped(stages: Stages, values: list[Any]) -> list[Any]:
    """The product of all `stages` with the vector of `values`."""
    for matrix in stages:
        values = [_combined(row, values, type(values[0])(0)) for row in matrix]
    return values


def _combined(row: tuple[float, ...], values: list[Any], zero: Any) -> Any:
    """The sum of `values` times the numbers of `row`, of which most are 0, 1 or -1."""
    total = None
    for factor, value in zip(row, values, strict=True):
        if factor:
            scaled = value if abs(factor) == 1 else value * type(value)(abs(factor))
            if total is None:
                total = scaled if factor > 0 else -scaled
            else:
                total = total + scaled if factor > 0 else total - scaled
    return zero if total is None else total


NAMES: dict[str, Callable[..., Any]] = {name: _plain(name, *how) for name, how in MAPS.items()}


# --- LLVM text ------------------------------------------------------------------------------------------------------


def transform_text(name: str, lanes: int, bits: int) -> str:
    """The function ``{name}_v{lanes}f{bits}``; `count` is a multiple of `lanes`."""
    stages, ragged = MAPS[name]
    sides = {"x": range(len(stages[0][0])), "o": range(len(stages[-1]))}
    vector, watched = f"<{lanes} x {'float' if bits == 32 else 'double'}>", name in WATCHED
    lines = [*_inside(sides[ragged])]
    for side, grid in sides.items():
        lines += _places(side, grid, side == ragged)
    head = ["  %more = icmp sgt i64 %count, 0", "  br i1 %more, label %loop, label %done", "loop:",
            "  %at = phi i64 [ 0, %entry ], [ %next, %loop ]"]
    if watched:
        head.append(f"  %odd = phi {vector} [ zeroinitializer, %entry ], [ %odd.next, %loop ]")
    body: list[str] = []
    for j in sides["x"]:
        for i in sides["x"]:
            body += [f"  %from{i}.{j} = getelementptr i8, ptr %x{i}.{j}, i64 %at",
                     f"  %v{i}.{j} = load {vector}, ptr %from{i}.{j}, align {bits // 8}"]
        body += _map(f"h{j}", stages, [f"%v{i}.{j}" for i in sides["x"]], vector)
    for i in sides["o"]:
        body += _map(f"r{i}", stages, [f"%h{j}.{i}" for j in sides["x"]], vector)
        for j in sides["o"]:
            body += [f"  %to{i}.{j} = getelementptr i8, ptr %o{i}.{j}, i64 %at",
                     f"  store {vector} %r{i}.{j}, ptr %to{i}.{j}, align {bits // 8}"]
    if watched:
        body += _watch([f"%r{i}.{j}" for i in sides["o"] for j in sides["o"]], vector)
    tail = [f"  %next = add i64 %at, {lanes * bits // 8}", f"  %reached = mul i64 %count, {bits // 8}",
            "  %again = icmp slt i64 %next, %reached", "  br i1 %again, label %loop, label %done", "done:",
            *(_watched(lanes, vector) if watched else ["  ret void"]), "}"]
    parameters = ", ".join(f"{'ptr' if p in POINTERS else 'i64'} %{p}" for p in PARAMETERS)
    return "\n".join([f"define {'i64' if watched else 'void'} @{name}_v{lanes}f{bits}({parameters}) {attributes()} {{",
                      "entry:", *lines, *head, *body, *tail])


def _watch(results: list[str], vector: str) -> Iterator[str]:
    """``%odd.next``: `%odd`, and NaN in every lane in which one of `results` is not finite: neither is their sum then, and
    times 0 it is NaN. A sum that overflows is taken for such a number, too. Only the last step waits for the one before."""
    for k in range(1, len(results)):
        yield f"  %odd.{k} = fadd {vector} {results[0] if k == 1 else f'%odd.{k - 1}'}, {results[k]}"
    last = f"%odd.{len(results) - 1}"
    yield f"  %odd.nothing = fmul contract {vector} {last}, zeroinitializer"
    yield f"  %odd.next = fadd contract {vector} %odd, %odd.nothing"


def _watched(lanes: int, vector: str) -> Iterator[str]:
    """Return whether any lane of `%odd` is NaN."""
    yield f"  %odd.last = phi {vector} [ zeroinitializer, %entry ], [ %odd.next, %loop ]"
    yield f"  %odd.lanes = fcmp uno {vector} %odd.last, zeroinitializer"
    yield f"  %odd.bits = bitcast <{lanes} x i1> %odd.lanes to i{lanes}"
    yield f"  %odd.any = icmp ne i{lanes} %odd.bits, 0"
    yield "  %odd.found = zext i1 %odd.any to i64"
    yield "  ret i64 %odd.found"


def _inside(grid: range) -> Iterator[str]:
    """``%row{i}``, ``%column{j}``: whether that row or column of the ragged side is there."""
    for axis in ("row", "column"):
        for i in grid:
            yield f"  %{axis}{i}.above = icmp sle i64 %{axis}_low, {i}"
            yield f"  %{axis}{i}.below = icmp sgt i64 %{axis}_high, {i}"
            yield f"  %{axis}{i} = and i1 %{axis}{i}.above, %{axis}{i}.below"


def _places(side: str, grid: range, ragged: bool) -> Iterator[str]:
    """``%{side}{i}.{j}``: the address of that element's first channel."""
    for i in grid:
        for j in grid:
            cell = f"%{side}{i}.{j}"
            yield f"  {cell}.down = mul i64 %{side}_row, {i}"
            yield f"  {cell}.right = mul i64 %{side}_column, {j}"
            yield f"  {cell}.offset = add i64 {cell}.down, {cell}.right"
            yield f"  {cell}{'.there' if ragged else ''} = getelementptr i8, ptr %{side}, i64 {cell}.offset"
            if ragged:
                yield f"  {cell}.inside = and i1 %row{i}, %column{j}"
                yield f"  {cell} = select i1 {cell}.inside, ptr {cell}.there, ptr %spare"


def _map(name: str, stages: Stages, values: list[str], vector: str) -> Iterator[str]:
    """``%{name}.{k}``: as `_mapped`."""
    for number, matrix in enumerate(stages, 1):
        prefix = name if number == len(stages) else f"{name}.stage{number}"
        for k, row in enumerate(matrix):
            yield from _combine(f"{prefix}.{k}", row, values, vector)
        values = [f"%{prefix}.{k}" for k in range(len(matrix))]


def _combine(name: str, row: tuple[float, ...], values: list[str], vector: str) -> Iterator[str]:
    """``%{name}``: as `_combined`."""
    terms = [(factor, value) for factor, value in zip(row, values, strict=True) if factor]
    total = ""
    for k, (factor, value) in enumerate(terms):
        here, last = f"%{name}.step{k}", k == len(terms) - 1
        result = f"%{name}" if last else here
        if abs(factor) != 1:
            yield f"  {here}.scaled = fmul contract {vector} {value}, {_splat(abs(factor), vector)}"
            value = f"{here}.scaled"
        if total:
            yield f"  {result} = {'fadd' if factor > 0 else 'fsub'} contract {vector} {total}, {value}"
        elif factor < 0:
            yield f"  {result} = fneg {vector} {value}"
        elif last:
            yield f"  {result} = bitcast {vector} {value} to {vector}"
        else:
            result = value
        total = result


def _splat(number: float, vector: str) -> str:
    """A constant, of float32 rounded to it: LLVM takes no other."""
    element, lanes = vector.split()[-1][:-1], int(vector[1:].split()[0])
    rounded = float(np.float32(number)) if element == "float" else number
    return "<" + ", ".join([f"{element} 0x{struct.pack('>d', rounded).hex()}"] * lanes) + ">"
