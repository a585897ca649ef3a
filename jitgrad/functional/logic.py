"""Comparisons, tests, logic and bits, elementwise, with PyTorch's names and meaning.

Operands are tensors or numbers that broadcast; comparisons give bools, bitwise functions keep integers and bools.
"""

from __future__ import annotations

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, complain
from jitgrad.functional.core import Operand, Tensor, as_float, as_operand, cast, describe, matched
from jitgrad.functional.elementwise import add, mul
from jitgrad.ir.op import Op
from jitgrad.ops.builders import full

__all__ = [
    "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor",
    "eq", "ge", "greater", "greater_equal", "gt", "isclose", "isfinite", "isinf", "isnan", "le", "less",
    "less_equal", "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "ne", "not_equal",
]

# comparisons

def eq(input: Operand, other: Operand) -> Tensor:
    """``input == other``."""
    return ops.eq(*matched("eq", input, other))


def ne(input: Operand, other: Operand) -> Tensor:
    """``input != other``."""
    return ops.ne(*matched("ne", input, other))


def lt(input: Operand, other: Operand) -> Tensor:
    """``input < other``."""
    return ops.lt(*matched("lt", input, other))


def le(input: Operand, other: Operand) -> Tensor:
    """``input <= other``."""
    return ops.le(*matched("le", input, other))


def gt(input: Operand, other: Operand) -> Tensor:
    """``input > other``."""
    return ops.gt(*matched("gt", input, other))


def ge(input: Operand, other: Operand) -> Tensor:
    """``input >= other``."""
    return ops.ge(*matched("ge", input, other))


not_equal, less, less_equal, greater, greater_equal = ne, lt, le, gt, ge


def isclose(input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """``|input - other| <= atol + rtol * |other|``, elementwise; infinities are close to themselves."""
    x, y = matched("isclose", input, other)
    close = ops.eq(x, y)
    if x.dtype.category != "f":
        x, y = as_float(x), as_float(y)
    near = le(ops.abs(ops.sub(x, y)), add(mul(ops.abs(y), rtol), atol))
    close = ops.bitwise_or(close, ops.bitwise_and(ops.isfinite(y), near))
    if equal_nan:
        close = ops.bitwise_or(close, ops.bitwise_and(ops.isnan(x), ops.isnan(y)))
    return close


# tests

def isnan(input: Tensor) -> Tensor:
    """True where `input` is not a number."""
    return _float_test(ops.isnan, input)


def isinf(input: Tensor) -> Tensor:
    """True where `input` is infinite."""
    return _float_test(ops.isinf, input)


def isfinite(input: Tensor) -> Tensor:
    """True where `input` is neither infinite nor NaN."""
    input = as_operand(input)
    if input.dtype.category in "fc":
        return ops.isfinite(input)
    return full(input.shape, True, dtypes.bool_)


def _float_test(op: Op, input: Tensor) -> Tensor:
    input = as_operand(input)
    return op(input) if input.dtype.category in "fc" else full(input.shape, False, dtypes.bool_)


# logic

def _truth(x: Operand) -> Tensor:
    return cast(as_operand(x), dtypes.bool_)


def logical_not(input: Tensor) -> Tensor:
    """True where `input` is zero."""
    return ops.logical_not(_truth(input))


def logical_and(input: Operand, other: Operand) -> Tensor:
    """True where both are nonzero."""
    return ops.bitwise_and(*matched("logical_and", _truth(input), _truth(other)))


def logical_or(input: Operand, other: Operand) -> Tensor:
    """True where either is nonzero."""
    return ops.bitwise_or(*matched("logical_or", _truth(input), _truth(other)))


def logical_xor(input: Operand, other: Operand) -> Tensor:
    """True where exactly one is nonzero."""
    return ops.bitwise_xor(*matched("logical_xor", _truth(input), _truth(other)))


def _integral(op: str, x: Tensor) -> Tensor:
    if x.dtype.category in "fc":
        raise complain(DTypeError, op, f"needs integers or bools, got {describe(x)}", fix="Did you mean x.long()?")
    return x


def _bitwise(op: Op, input: Operand, other: Operand) -> Tensor:
    x, y = matched(op.name, input, other)
    return op(_integral(op.name, x), y)


def bitwise_not(input: Tensor) -> Tensor:
    """Every bit flipped; for bools, not."""
    return ops.bitwise_not(_integral("bitwise_not", as_operand(input)))


def bitwise_and(input: Operand, other: Operand) -> Tensor:
    """``input & other``."""
    return _bitwise(ops.bitwise_and, input, other)


def bitwise_or(input: Operand, other: Operand) -> Tensor:
    """``input | other``."""
    return _bitwise(ops.bitwise_or, input, other)


def bitwise_xor(input: Operand, other: Operand) -> Tensor:
    """``input ^ other``."""
    return _bitwise(ops.bitwise_xor, input, other)


def bitwise_left_shift(input: Operand, other: Operand) -> Tensor:
    """``input << other``."""
    return _bitwise(ops.shift_left, input, other)


def bitwise_right_shift(input: Operand, other: Operand) -> Tensor:
    """``input >> other``."""
    return _bitwise(ops.shift_right, input, other)
