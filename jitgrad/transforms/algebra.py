"""Rewrite rules for arithmetic: identities that hold for every bit of every operand, infinities and -0.0 included.

What is missing is missing on purpose: ``x + 0.0`` turns -0.0 into 0.0, ``x * 0`` and ``x - x`` are NaN for infinities,
additions in another order round differently; only the order within one `sum` is free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jitgrad import ops
from jitgrad.dtypes import DType
from jitgrad.ir.graph import Value
from jitgrad.ir.op import Op
from jitgrad.transforms.rewrite import (
    Result,
    constant_value,
    elementwise_rule,
    full_like,
    is_constant,
    made_by,
    operand_of,
    rewriter,
    rule,
)

# ---- constants --------------------------------------------------------------------------------------------------


@elementwise_rule
def fold_constants(op: Op, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> Result:
    "An op of constants -> the constant that its reference gives."
    constants = [constant_value(v) for v in inputs]
    if op.effects or any(c is None for c in constants):
        return None
    (type,) = op.result_types(tuple([v.type for v in inputs]), attrs)
    with np.errstate(all="ignore"):
        result = np.asarray(op.eager(*constants, **attrs))
    return None if bool(result != result) else rewriter().full(type, result)        # a NaN stays where it was made


@elementwise_rule
def compute_before_broadcast(op: Op, inputs: tuple[Value, ...], attrs: Mapping[str, Any]) -> Result:
    "op(broadcast_to(x), constants) -> broadcast_to(op(x, constants)): fewer elements, the same arithmetic."
    small = {x.shape for v in inputs if (x := operand_of(v, "broadcast_to")) and constant_value(v) is None}
    if op.effects or len(small) != 1 or inputs[0].type.size == 0:
        return None
    (shape,) = small
    operands = []
    for v in inputs:
        constant, x = constant_value(v), operand_of(v, "broadcast_to")
        if constant is None and x is None:
            return None
        operands.append(x if constant is None else rewriter().full(v.type.with_shape(shape), constant))
    return ops.broadcast_to(op(*operands, **attrs), shape=inputs[0].shape)


# ---- sums and differences ---------------------------------------------------------------------------------------


@rule("add")
def drop_add_of_zero(x: Value, y: Value) -> Result:
    "x + (-0.0) -> x; for integers x + 0 -> x, for bool x or False -> x"
    zero = -0.0 if x.dtype.category in "fc" else 0
    if x.dtype.is_complex:
        return None
    return x if is_constant(y, zero) else y if is_constant(x, zero) else None


@rule("add")
def add_negated(x: Value, y: Value) -> Result:
    "x + (-y) -> x - y"
    if (negated := operand_of(y, "neg")) is not None:
        return ops.sub(x, negated)
    if (negated := operand_of(x, "neg")) is not None:
        return ops.sub(y, negated)
    return None


@rule("add")
def join_padded(x: Value, y: Value) -> Result:
    """pad(x) + pad(y), neighbours along an axis -> pad(concat(x + 0.0, y + 0.0)): the gradient of what was split. Adding 0.0
    is what padding did to a -0.0."""
    nodes = [node for v in (x, y) if (node := made_by(v, "pad"))]
    if len(nodes) < 2 or x.dtype.is_complex:
        return None
    first, second = sorted(nodes, key=lambda node: tuple(node.attrs["low"]))
    axes = {k for node in nodes for side in ("low", "high") for k, n in enumerate(node.attrs[side]) if n}
    if len(axes) != 1:
        return None
    (axis,) = axes
    if first.attrs["low"][axis] + first.inputs[0].shape[axis] != second.attrs["low"][axis]:
        return None
    joined = ops.concat(*[v for node in (first, second) for v in _with_zero_added(node.inputs[0], axis)], axis=axis)
    return ops.pad(joined, low=first.attrs["low"], high=second.attrs["high"])


def _with_zero_added(x: Value, axis: int) -> list[Value]:
    """The pieces that x + 0.0 is the concatenation of."""
    pieces, sums = made_by(x, "concat"), made_by(x, "add")
    if pieces is not None and pieces.attrs["axis"] == axis:
        return [v for piece in pieces.inputs for v in _with_zero_added(piece, axis)]
    done = sums is not None and any(is_constant(v, 0.0) for v in sums.inputs)
    return [x if done else ops.add(x, full_like(x, 0.0))]


@rule("sub")
def drop_subtract_of_zero(x: Value, y: Value) -> Result:
    "x - 0 -> x"
    return x if not x.dtype.is_complex and is_constant(y, 0.0) else None


@rule("sub")
def subtract_negated(x: Value, y: Value) -> Result:
    "x - (-y) -> x + y"
    negated = operand_of(y, "neg")
    return None if negated is None else ops.add(x, negated)


@rule("neg")
def drop_double_negation(x: Value) -> Result:
    "-(-x) -> x"
    return operand_of(x, "neg")


# ---- products ---------------------------------------------------------------------------------------------------


@rule("mul")
def drop_multiply_by_one(x: Value, y: Value) -> Result:
    "x * 1 -> x"
    if x.dtype.is_complex:
        return None
    return x if is_constant(y, 1) else y if is_constant(x, 1) else None


@rule("mul")
def multiply_negated(x: Value, y: Value) -> Result:
    "(-x) * (-y) -> x * y"
    a, b = operand_of(x, "neg"), operand_of(y, "neg")
    return None if a is None or b is None or x.dtype.is_complex else ops.mul(a, b)


@rule("div")
def drop_divide_by_one(x: Value, y: Value) -> Result:
    "x / 1 -> x"
    return x if not x.dtype.is_complex and is_constant(y, 1) else None


@rule("div")
def divide_negated(x: Value, y: Value) -> Result:
    "(-x) / (-y) -> x / y"
    a, b = operand_of(x, "neg"), operand_of(y, "neg")
    return None if a is None or b is None or x.dtype.is_complex else ops.div(a, b)


@rule("div")
def divide_by_power_of_two(x: Value, y: Value) -> Result:
    "x / 2**k -> x * 2**-k, where both are normal numbers"
    divisor = constant_value(y)
    if divisor is None or not x.dtype.is_floating_point:
        return None
    number = float(divisor)
    if number == 0 or not math.isfinite(number) or abs(math.frexp(number)[0]) != 0.5:
        return None
    normal = float(_float_info(x.dtype).smallest_normal)
    return ops.mul(x, full_like(y, 1 / number)) if min(abs(number), abs(1 / number)) >= normal else None


@rule("pow")
def drop_power_of_one(x: Value, y: Value) -> Result:
    "x ** 1 -> x"
    return x if not x.dtype.is_complex and is_constant(y, 1) else None


# ---- signs, extremes, rounding ----------------------------------------------------------------------------------


@rule("abs")
def absolute_of_negated(x: Value) -> Result:
    "|-x| -> |x|"
    negated = operand_of(x, "neg")
    return None if negated is None else ops.abs(negated)


def _drop_repeated(name: str) -> None:
    @rule(name)
    def drop_repeated(x: Value) -> Result:
        "An op whose results it does not change -> once"
        return x if made_by(x, name) and not x.dtype.is_complex else None


for _name in ("abs", "floor", "ceil", "round", "trunc", "relu", "sign"):
    _drop_repeated(_name)


@rule("maximum", "minimum", "bitwise_and", "bitwise_or")
def drop_of_equal_operands(x: Value, y: Value) -> Result:
    "maximum(x, x) -> x; x & x -> x"
    return x if x is y else None


@rule("maximum")
def drop_maximum_of_infinity(x: Value, y: Value) -> Result:
    "maximum(x, -inf) -> x"
    return x if is_constant(y, -math.inf) else y if is_constant(x, -math.inf) else None


@rule("minimum")
def drop_minimum_of_infinity(x: Value, y: Value) -> Result:
    "minimum(x, inf) -> x"
    return x if is_constant(y, math.inf) else y if is_constant(x, math.inf) else None


# ---- bits and choices -------------------------------------------------------------------------------------------


@rule("bitwise_or", "bitwise_xor")
def drop_bits_of_zero(x: Value, y: Value) -> Result:
    "x | 0 -> x; x ^ 0 -> x"
    return x if is_constant(y, 0) else y if is_constant(x, 0) else None


@rule("shift_left", "shift_right")
def drop_shift_by_zero(x: Value, y: Value) -> Result:
    "x << 0 -> x"
    return x if is_constant(y, 0) else None


@rule("logical_not")
def drop_double_not(x: Value) -> Result:
    "not not x -> x"
    return operand_of(x, "logical_not")


@rule("bitwise_not")
def drop_double_bitwise_not(x: Value) -> Result:
    "~~x -> x"
    return operand_of(x, "bitwise_not")


@rule("where")
def choose_known(condition: Value, x: Value, y: Value) -> Result:
    "where(True, x, y) -> x; where(c, x, x) -> x"
    if x is y or is_constant(condition, True):
        return x
    return y if is_constant(condition, False) else None


@rule("where")
def choose_by_negation(condition: Value, x: Value, y: Value) -> Result:
    "where(not c, x, y) -> where(c, y, x)"
    positive = operand_of(condition, "logical_not")
    return None if positive is None else ops.where(positive, y, x)


@rule("where")
def choose_before_pooling(condition: Value, x: Value, y: Value) -> Result:
    """where(y > c, max_pool_grad(g, taps), 0) -> max_pool_grad(where(o > c, g, 0), taps), with o, taps = max_pool(y), any
    comparison, and its branches either way around: at the tap that a window took its maximum from, y is that maximum.

    This is the gradient of an activation before a pooling layer, done on what was pooled."""
    kept, zero = (x, y) if is_constant(y, 0.0) else (y, x)
    gradient, test = made_by(kept, "max_pool_grad"), made_by(condition, "gt", "ge", "lt", "le", "eq", "ne")
    if gradient is None or test is None or not is_constant(zero, 0.0):
        return None
    pooled = made_by(gradient.inputs[1], "max_pool")
    bound = constant_value(test.inputs[1])
    if pooled is None or bound is None or pooled.inputs[0] is not test.inputs[0]:
        return None
    largest, incoming = pooled.outputs[0], gradient.inputs[0]
    chosen = test.op(largest, rewriter().full(largest.type, bound))
    nothing = full_like(incoming, 0.0)
    few = ops.where(chosen, incoming, nothing) if kept is x else ops.where(chosen, nothing, incoming)
    return ops.max_pool_grad(few, gradient.inputs[1], **gradient.attrs)


@rule("sum")
def sum_before_pooling(x: Value, axes: tuple[int, ...]) -> Result:
    """The sum of max_pool_grad(g, taps) over whole planes -> that of g, with taps = max_pool(y) by the same windows: each
    gives its gradient to one element of y. Only zeros are left out, and sums are taken in any order.

    This is the gradient of a bias before a pooling layer, of which most elements are such zeros."""
    gradient = made_by(x, "max_pool_grad")
    pooled = made_by(gradient.inputs[1], "max_pool") if gradient else None
    if gradient is None or pooled is None or not set(range(2, len(x.shape))) <= set(axes):
        return None
    windows, y, incoming = gradient.attrs, pooled.inputs[0], gradient.inputs[0]
    same = all(windows[name] == value for name, value in pooled.attrs.items() if name != "ceil_mode")
    numbers = [windows[name] for name in ("kernel", "stride", "padding", "dilation")]
    full = y.shape == x.shape and all(map(_has_elements, y.shape[2:], incoming.shape[2:], *numbers))
    return ops.sum(incoming, axes=axes) if same and full else None


def _has_elements(size: int, count: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> bool:
    """Each of `count` windows along one dimension has an element; one that is dilated may step across all of them."""
    return all(any(0 <= i * stride - padding[0] + k * dilation < size for k in range(kernel)) for i in range(count))


# ---- casts ------------------------------------------------------------------------------------------------------


@rule("cast")
def drop_cast_to_itself(x: Value, dtype: DType) -> Result:
    "cast(x, its own dtype) -> x"
    return x if x.dtype is dtype else None


@rule("cast")
def merge_casts(x: Value, dtype: DType) -> Result:
    "cast(cast(x, wider), dtype) -> cast(x, dtype), where the wider dtype holds every x"
    first = operand_of(x, "cast")
    if first is None or not holds(x.dtype, first.dtype):
        return None
    both_integers = dtype.category in "bui" and first.dtype.category in "bui"
    if dtype is first.dtype or dtype.category in "fb" or both_integers:
        return ops.cast(first, dtype=dtype)
    return None


def holds(wide: DType, narrow: DType) -> bool:
    """Every value of `narrow` is a value of `wide`."""
    if wide is narrow:
        return True
    kinds = wide.category, narrow.category
    if "c" in kinds or kinds[0] == "b":
        return False
    if narrow.category == "b":
        return True
    if wide.category == "f":
        return _significant_bits(narrow) <= _significant_bits(wide) and _top_exponent(narrow) <= _top_exponent(wide)
    if narrow.category == "f" or kinds == ("u", "i"):
        return False
    return np.can_cast(narrow.numpy, wide.numpy, "safe")


def _significant_bits(dtype: DType) -> int:
    if dtype.category == "f":
        return int(_float_info(dtype).nmant) + 1
    return 8 * dtype.itemsize - (dtype.category == "i")


def _top_exponent(dtype: DType) -> int:
    if dtype.category == "f":
        return int(math.frexp(float(_float_info(dtype).max))[1])
    return 8 * dtype.itemsize - (dtype.category == "i")


def _float_info(dtype: DType) -> Any:
    return ml_dtypes.finfo(dtype.numpy)     # type: ignore[no-untyped-call]
