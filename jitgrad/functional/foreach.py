"""`foreach`: one elementwise program over many groups of tensors, as a single node.

This is how an optimizer updates all parameters at once: its formula is written once, over single elements with ordinary
operators, and traced once for each combination of dtypes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.errors import ShapeError, complain
from jitgrad.functional import autocast, elementwise, logic
from jitgrad.functional.core import HALF, Operand, Tensor, as_operand, cast
from jitgrad.functional.methods import TensorMethods
from jitgrad.ir.graph import Graph, GraphBuilder, Value
from jitgrad.ir.interpreter import interpret, state
from jitgrad.ir.op import Op
from jitgrad.ir.types import TensorType


def _of_two(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    """A method of two operands; a number takes the dtype of an element that it meets."""

    def method(self: Scalar, other: Any) -> Any:
        x, y = self, other
        if isinstance(other, Scalar) and self.weak != other.weak:
            x, y = (cast(x, y.dtype), y) if self.weak else (x, cast(y, x.dtype))
        return function(y, x) if reflected else function(x, y)

    return method


class Scalar(TensorMethods):
    """A 0-d value of the program that is being traced, with the operators and methods of a Tensor: an element, or
    (`weak`) a number, which is float64 until it meets an element."""

    __slots__ = ("value", "weak")

    def __init__(self, value: Value, weak: bool = False):
        self.value = value
        self.weak = weak

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> DType:
        return self.value.dtype

    def number(self) -> Scalar:
        """This element as a number."""
        return Scalar(cast(self, dtypes.float64).value, weak=True)

    def integer_power(self, n: Scalar) -> Scalar:
        """This number to the power of an element that is a whole number."""
        return ops.integer_power(self, Scalar(cast(n, dtypes.int64).value, weak=True))

    def where(self, x: Any, y: Any) -> Any:
        """`x` if this bool holds, otherwise `y`."""
        return elementwise.where(self, x, y)

    __add__, __radd__ = _of_two(elementwise.add), _of_two(elementwise.add, True)
    __sub__, __rsub__ = _of_two(elementwise.sub), _of_two(elementwise.sub, True)
    __mul__, __rmul__ = _of_two(elementwise.mul), _of_two(elementwise.mul, True)
    __truediv__, __rtruediv__ = _of_two(elementwise.div), _of_two(elementwise.div, True)
    __pow__, __rpow__ = _of_two(elementwise.pow), _of_two(elementwise.pow, True)
    __lt__, __le__, __gt__, __ge__ = (_of_two(logic.lt), _of_two(logic.le), _of_two(logic.gt),
                                      _of_two(logic.ge))
    maximum, minimum = _of_two(elementwise.maximum), _of_two(elementwise.minimum)


class _BodyTracer:
    """The interpreter that appends what is done with Scalars to a graph. What comes of numbers alone is a number."""

    def __init__(self, builder: GraphBuilder):
        self.builder = builder

    def run(self, op: Op, inputs: tuple[Scalar, ...], attrs: dict[str, Any]) -> Any:
        result = self.builder.run(op, tuple([x.value for x in inputs]), attrs)
        return Scalar(result, weak=all(x.weak for x in inputs))


@functools.lru_cache(maxsize=256)
def _trace(body: Callable[..., Any], shared: int, types: tuple[DType, ...]) -> Graph:
    """`body` as a graph over `shared` numbers and 0-d elements of those dtypes. Where all floats are half precision it
    computes in float32 and rounds its results."""
    rounded = types[0] if types[0] in HALF and dtypes.float32 not in types else None
    builder = GraphBuilder(body.__name__)
    numbers = [Scalar(builder.input(TensorType(dtypes.float64, ())), weak=True) for _ in range(shared)]
    elements = [Scalar(builder.input(TensorType(t, ()))) for t in types]
    with interpret(_BodyTracer(builder)), autocast.region(autocast.USUAL):
        if rounded:
            elements = [cast(x, dtypes.float32) if x.dtype in HALF else x for x in elements]
        result = body(*numbers, *elements)
        results = result if isinstance(result, tuple) else (result,)
        if rounded:
            results = tuple([r if r.weak else cast(r, rounded) for r in results])
    return builder.build([r.value for r in results])


def foreach(body: Callable[..., Any], shared: Sequence[Operand],
            lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """``body(*shared, *operands)`` for each group of operands: ``lists[j][i]`` is operand j of group i.

    `body` takes `Scalar`s and returns one or a tuple of them; the result has one list for each, with an entry per
    group, of the shape of operand 0. Another operand has that shape or is 0-d. `shared` are numbers (or 0-d tensors
    that count as numbers). `body` is traced once per combination of dtypes, so it must depend on nothing but its
    arguments."""
    results: list[list[Any]] = []
    for operands, attrs, members in _by_dtype(body, shared, lists):
        outputs = ops.foreach(*operands, **attrs)
        results = results or [[None] * len(lists[0]) for _ in attrs["body"].outputs]
        for k, value in enumerate(outputs):
            results[k // len(members)][members[k % len(members)]] = value
    return results


def foreach_(body: Callable[..., Any], shared: Sequence[Operand], written: Sequence[Sequence[Tensor]],
             read: Sequence[Sequence[Tensor]] = ()) -> None:
    """`foreach` over ``[*written, *read]`` whose results replace the contents of `written`, in their memory."""
    for operands, attrs, members in _by_dtype(body, shared, [*written, *read]):
        targets = [tensors[i] for tensors in written for i in members]
        state.current.rewrite(ops.foreach, operands, attrs, targets)  # type: ignore[union-attr]


def _by_dtype(body: Callable[..., Any], shared: Sequence[Operand],
              lists: Sequence[Sequence[Tensor]]) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Any], list[int]]]:
    """For each combination of dtypes: the op's operands and attributes, and which groups they are."""
    groups = len(lists[0])
    if any(len(other) != groups for other in lists):
        raise complain(ShapeError, "foreach", f"lists differ in length: {[len(other) for other in lists]}")
    numbers = [cast(as_operand(s, dtypes.float64), dtypes.float64) for s in shared]
    kinds: dict[tuple[DType, ...], list[int]] = {}
    for i in range(groups):
        kinds.setdefault(tuple([operands[i].dtype for operands in lists]), []).append(i)
    for types, members in kinds.items():
        attrs = {"body": _trace(body, len(numbers), types), "groups": len(members), "shared": len(numbers)}
        yield (*numbers, *[operands[i] for operands in lists for i in members]), attrs, members
