"""Ops that compute every element of the result from the elements at the same place of the operands.

Operands have one shape and (but for `where`) one dtype. `eager` is a NumPy ufunc wherever one has the right meaning,
so eager mode pays nothing on top of it; for 0-d operands it may give a NumPy scalar. Derivatives that are zero almost
everywhere (sign, floor, …) are zero gradients, as in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.dtypes import DType
from jitgrad.errors import DivisionByZeroError, DTypeError, complain
from jitgrad.ir.op import Op, register
from jitgrad.ir.types import TensorType
from jitgrad.ops import special
from jitgrad.ops.builders import conjugate, full_like, ones_like, times, zeros_like
from jitgrad.ops.derived import derived
from jitgrad.ops.record import (
    MAY_FAIL,
    binary,
    choose,
    keep_dtype,
    predicate,
    require_category,
    require_same,
    same_type,
    unary,
)

__all__ = ["abs", "acos", "acosh", "add", "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and", "bitwise_not",
           "bitwise_or", "bitwise_xor", "cast", "ceil", "complex", "conj", "copysign", "cos", "cosh", "digamma", "div",
           "eq", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "floor_divide", "fmod", "ge", "gt", "imag",
           "integer_power", "isfinite", "isinf", "isnan", "le", "lgamma", "log", "log1p", "log2", "log10",
           "logical_not", "lt", "maximum", "minimum", "mul", "ne", "neg", "polygamma", "pow", "real",
           "real_counterpart", "reciprocal", "relu", "remainder", "round", "rsqrt", "shift_left", "shift_right",
           "sigmoid", "sign", "sin", "sinh", "sqrt", "sub", "tan", "tanh", "trunc", "where"]

# ---- one operand -----------------------------------------------------------------------------------------------

neg: Op = unary("neg", np.negative, spell="-{0}", categories="uifc", vjp=lambda g: ops.neg(g), exact=True, doc="-x")
sign: Op = unary("sign", np.sign, categories="uif", vjp=lambda g: zeros_like(g), doc="-1, 0 or 1; nan for nan")
floor: Op = unary("floor", np.floor, categories="uif", vjp=lambda g: zeros_like(g), doc="Largest integer <= x.")
ceil: Op = unary("ceil", np.ceil, categories="uif", vjp=lambda g: zeros_like(g), doc="Smallest integer >= x.")
round: Op = unary("round", keep_dtype(np.rint), categories="uif", vjp=lambda g: zeros_like(g),
                  doc="Nearest integer, halves to even.")
trunc: Op = unary("trunc", np.trunc, categories="uif", vjp=lambda g: zeros_like(g), doc="x without its fraction.")

exp: Op = unary("exp", np.exp, vjp=lambda g, out: times(g, out), doc="e ** x")
exp2: Op = unary("exp2", np.exp2, categories="f", doc="2 ** x",
                 vjp=lambda g, out: ops.mul(g, ops.mul(out, full_like(out, math.log(2.0)))))
expm1: Op = unary("expm1", np.expm1, vjp=lambda g, out: ops.add(g, times(g, out)),
                  doc="e ** x - 1, accurate near 0")
log: Op = unary("log", np.log, vjp=lambda g, x: ops.div(g, conjugate(x)), doc="Natural logarithm.")
log2: Op = unary("log2", np.log2, categories="f", doc="Logarithm to base 2.",
                 vjp=lambda g, x: ops.div(g, ops.mul(x, full_like(x, math.log(2.0)))))
log10: Op = unary("log10", np.log10, categories="f", doc="Logarithm to base 10.",
                  vjp=lambda g, x: ops.div(g, ops.mul(x, full_like(x, math.log(10.0)))))
log1p: Op = unary("log1p", np.log1p, doc="log(1 + x), accurate near 0",
                  vjp=lambda g, x: ops.div(g, conjugate(ops.add(x, ones_like(x)))))
sqrt: Op = unary("sqrt", np.sqrt, vjp=lambda g, out: ops.div(g, conjugate(ops.add(out, out))), exact=True,
                doc="Square root.")
rsqrt: Op = unary("rsqrt", lambda x: np.reciprocal(np.sqrt(x)), doc="1 / sqrt(x)",
                  vjp=lambda g, out: times(ops.mul(g, full_like(g, -0.5)), ops.mul(out, ops.mul(out, out))))
reciprocal: Op = unary("reciprocal", np.reciprocal, doc="1 / x",
                       vjp=lambda g, out: ops.neg(times(g, ops.mul(out, out))))

sin: Op = unary("sin", np.sin, vjp=lambda g, x: times(g, ops.cos(x)), doc="Sine of radians.")
cos: Op = unary("cos", np.cos, vjp=lambda g, x: ops.neg(times(g, ops.sin(x))), doc="Cosine of radians.")
tan: Op = unary("tan", np.tan, vjp=lambda g, out: times(g, ops.add(ops.mul(out, out), ones_like(out))),
                doc="Tangent of radians.")
asin: Op = unary("asin", np.arcsin, vjp=lambda g, x: times(g, ops.rsqrt(_one_minus_square(x))), doc="Inverse of sin.")
acos: Op = unary("acos", np.arccos, vjp=lambda g, x: ops.neg(times(g, ops.rsqrt(_one_minus_square(x)))),
                 doc="Inverse of cos.")
atan: Op = unary("atan", np.arctan, vjp=lambda g, x: ops.div(g, conjugate(ops.add(ops.mul(x, x), ones_like(x)))),
                 doc="Inverse of tan.")
sinh: Op = unary("sinh", np.sinh, vjp=lambda g, x: times(g, ops.cosh(x)), doc="Hyperbolic sine.")
cosh: Op = unary("cosh", np.cosh, vjp=lambda g, x: times(g, ops.sinh(x)), doc="Hyperbolic cosine.")
tanh: Op = unary("tanh", np.tanh, vjp=lambda g, out: ops.sub(g, times(g, ops.mul(out, out))), doc="Hyperbolic tangent.")
asinh: Op = unary("asinh", np.arcsinh, doc="Inverse of sinh.",
                  vjp=lambda g, x: times(g, ops.rsqrt(ops.add(ops.mul(x, x), ones_like(x)))))
acosh: Op = unary("acosh", np.arccosh, doc="Inverse of cosh.",
                  vjp=lambda g, x: times(g, ops.mul(ops.rsqrt(ops.sub(x, ones_like(x))),
                                                    ops.rsqrt(ops.add(x, ones_like(x))))))
atanh: Op = unary("atanh", np.arctanh, vjp=lambda g, x: ops.div(g, conjugate(_one_minus_square(x))),
                  doc="Inverse of tanh.")


@derived(lambda out, g: choose(out <= 0, np.broadcast_to(g.dtype.type(0), g.shape), g))
def _where_positive(out: Any, g: Any) -> Any:
    """g where out > 0 or out is nan, else 0."""
    zero = zeros_like(g)
    return ops.where(ops.le(out, zero), zero, g)


sigmoid: Op = unary("sigmoid", keep_dtype(lambda x: 1 / (1 + np.exp(-x))), doc="1 / (1 + e ** -x)",
                    vjp=lambda g, out: times(g, ops.sub(out, ops.mul(out, out))))
relu: Op = unary("relu", keep_dtype(lambda x: np.maximum(x, 0)), categories="uif", doc="max(x, 0); nan stays nan",
                 exact=True, vjp=lambda g, out: _where_positive(out, g))


erf: Op = unary("erf", special.erf, categories="f", doc="Error function.",
                vjp=lambda g, x: ops.mul(g, _erf_slope(x)))
erfc: Op = unary("erfc", special.erfc, categories="f", doc="1 - erf(x), accurate where that is small",
                 vjp=lambda g, x: ops.neg(ops.mul(g, _erf_slope(x))))
erfinv: Op = unary("erfinv", special.erfinv, categories="f", doc="Inverse of erf.",
                   vjp=lambda g, out: ops.div(g, _erf_slope(out)))
lgamma: Op = unary("lgamma", special.lgamma, categories="f", doc="Logarithm of |gamma(x)|.",
                   vjp=lambda g, x: ops.mul(g, ops.digamma(x)))
digamma: Op = unary("digamma", special.digamma, categories="f", doc="Derivative of lgamma.",
                    vjp=lambda g, x: ops.mul(g, ops.polygamma(x, n=1)))
polygamma: Op = register(Op("polygamma", ("x",), same_type("polygamma", "f"), special.polygamma, "elementwise",
                            vjp=(lambda g, x, n: ops.mul(g, ops.polygamma(x, n=n + 1)),), spell="polygamma({0}, i64({n}))",
                            doc="Derivative of order n >= 1 of digamma."))


def _erf_slope(x: Any) -> Any:
    """The derivative of erf: 2 / sqrt(pi) exp(-x²)."""
    return ops.mul(full_like(x, 2.0 / math.sqrt(math.pi)), ops.exp(ops.neg(ops.mul(x, x))))


def _one_minus_square(x: Any) -> Any:
    """1 - x², as a product: exact near x = ±1, where the derivatives that use it are large."""
    one = ones_like(x)
    return ops.mul(ops.sub(one, x), ops.add(one, x))


def _infer_abs(x: TensorType) -> TensorType:
    require_category("abs", x.dtype, "uifc")
    return x.with_dtype(real_counterpart(x.dtype))


def real_counterpart(dtype: DType) -> DType:
    """The dtype of the real part of values of `dtype`."""
    return {dtypes.complex64: dtypes.float32, dtypes.complex128: dtypes.float64}.get(dtype, dtype)


def _abs_gradient(g: Any, x: Any) -> Any:
    if not x.dtype.is_complex:
        return ops.mul(g, ops.sign(x))
    size = ops.abs(x)
    safe = ops.where(ops.eq(size, zeros_like(size)), ones_like(size), size)
    return ops.mul(ops.cast(ops.div(g, safe), dtype=x.dtype), x)


abs: Op = register(Op("abs", ("x",), _infer_abs, np.absolute, "elementwise", vjp=(_abs_gradient,), spell="abs",
                      exact=True, doc="Absolute value; of a complex operand its real magnitude."))

conj: Op = unary("conj", np.conjugate, categories="c", vjp=lambda g: ops.conj(g), doc="Complex conjugate.")


def _infer_part(name: str) -> Callable[..., TensorType]:
    def infer(x: TensorType) -> TensorType:
        require_category(name, x.dtype, "c")
        return x.with_dtype(real_counterpart(x.dtype))

    return infer


real: Op = register(Op("real", ("x",), _infer_part("real"), lambda x: x.real.copy(), "elementwise", spell="real",
                       vjp=(lambda g, x_type: ops.cast(g, dtype=x_type.dtype),), doc="Real part of a complex operand."))
imag: Op = register(Op("imag", ("x",), _infer_part("imag"), lambda x: x.imag.copy(), "elementwise", spell="imag",
                       vjp=(lambda g: ops.complex(zeros_like(g), g),), doc="Imaginary part of a complex operand."))


def _infer_complex(x: TensorType, y: TensorType) -> TensorType:
    require_same("complex", x, y)
    if x.dtype not in _COMPLEX_OF:
        raise complain(DTypeError, "complex", f"parts are f32 or f64, got {x.dtype.short}")
    return x.with_dtype(_COMPLEX_OF[x.dtype])


_COMPLEX_OF = {dtypes.float32: dtypes.complex64, dtypes.float64: dtypes.complex128}


def _complex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    out = np.empty(np.shape(x), np.result_type(x.dtype, np.complex64))
    out.real, out.imag = x, y
    return out


complex: Op = register(Op("complex", ("x", "y"), _infer_complex, _complex, "elementwise", spell="complex",
                          vjp=(lambda g: ops.real(g), lambda g: ops.imag(g)), doc="x + i y of two real operands"))

isnan: Op = predicate("isnan", ("x",), np.isnan, categories="fc", doc="True where x is nan.")
isinf: Op = predicate("isinf", ("x",), np.isinf, categories="fc", doc="True where x is infinite.")
isfinite: Op = predicate("isfinite", ("x",), np.isfinite, categories="fc", doc="True where x is neither inf nor nan.")
logical_not: Op = unary("logical_not", np.logical_not, spell="not {0}", categories="b", doc="not x, of bool")
bitwise_not: Op = unary("bitwise_not", np.invert, categories="bui", doc="All bits flipped; of bool: not x.")


def _infer_cast(x: TensorType, *, dtype: DType) -> TensorType:
    return x.with_dtype(dtype)


def _cast(x: np.ndarray, *, dtype: DType) -> np.ndarray:
    if x.dtype.kind == "c" and dtype.category in "uif":
        x = x.real
    return x.astype(dtype.numpy)


cast: Op = register(Op("cast", ("x",), _infer_cast, _cast, "elementwise", spell="{0}",
                       vjp=(lambda g, x_type: ops.cast(g, dtype=x_type.dtype),),
                       doc="x as `dtype`; to bool: x != 0; complex to real: the real part. Every kernel statement "
                           "casts its result to the value's type, so the spelling is the operand itself."))

# ---- two operands ----------------------------------------------------------------------------------------------

add: Op = binary("add", np.add, spell="{0} + {1}", categories="buifc", commutative=True, doc="x + y; of bool: or",
                 exact=True, vjp=(lambda g: g, lambda g: g))
sub: Op = binary("sub", np.subtract, spell="{0} - {1}", exact=True, doc="x - y",
                 vjp=(lambda g: g, lambda g: ops.neg(g)))
mul: Op = binary("mul", np.multiply, spell="{0} * {1}", categories="buifc", commutative=True, doc="x * y; of bool: and",
                 exact=True, vjp=(lambda g, y: times(g, y), lambda g, x: times(g, x)))
div: Op = binary("div", np.divide, spell="{0} / {1}", categories="fc", exact=True, doc="x / y",
                 vjp=(lambda g, y: ops.div(g, conjugate(y)),
                      lambda g, out, y: ops.neg(ops.mul(g, conjugate(ops.div(out, y))))))


def _checked(name: str, function: Any) -> Any:
    """`function`, but integer division by zero is an error rather than zero."""

    def eager(x: np.ndarray, y: np.ndarray) -> Any:
        if y.dtype.kind in "iu" and not y.all():
            raise complain(DivisionByZeroError, name, "integer division by zero")
        return function(x, y)

    return eager


def _power(x: np.ndarray, y: np.ndarray) -> Any:
    if x.dtype.kind != "i":
        return np.power(x, y)
    # An integer to a negative power is the integer part of the fraction: ±1 for ±1, otherwise 0.
    sign = np.where(y % 2 == 0, x * x, x)
    return np.where(y < 0, np.where(np.absolute(x) == 1, sign, 0), np.power(x, np.maximum(y, 0))).astype(x.dtype)


def _power_base_gradient(g: Any, x: Any, y: Any) -> Any:
    zero = zeros_like(x)
    slope = ops.mul(y, ops.pow(x, ops.sub(y, ones_like(y))))
    return times(g, ops.where(ops.eq(y, zero), zero, slope))


def _power_exponent_gradient(g: Any, out: Any, x: Any, y: Any) -> Any:
    zero = zeros_like(x)
    at_zero = ops.eq(x, zero)
    if not x.dtype.is_complex:
        at_zero = ops.bitwise_and(at_zero, ops.ge(y, zero))
    return times(g, ops.where(at_zero, zero, ops.mul(out, ops.log(x))))


floor_divide: Op = binary("floor_divide", _checked("floor_divide", np.floor_divide), categories="uif", effects=MAY_FAIL,
                          doc="Largest integer <= x / y; integers: DivisionByZeroError where y is 0.")
remainder: Op = binary("remainder", _checked("remainder", np.remainder), categories="uif", effects=MAY_FAIL,
                       vjp=(lambda g: g, lambda g, x, y: ops.neg(ops.mul(g, ops.floor_divide(x, y)))),
                       doc="x - y * floor(x / y), the sign of y; integers: DivisionByZeroError where y is 0.")
fmod: Op = binary("fmod", _checked("fmod", np.fmod), categories="uif", effects=MAY_FAIL,
                  vjp=(lambda g: g, lambda g, x, y: ops.neg(ops.mul(g, ops.trunc(ops.div(x, y))))),
                  doc="x - y * trunc(x / y), the sign of x; integers: DivisionByZeroError where y is 0.")
pow: Op = binary("pow", _power, vjp=(_power_base_gradient, _power_exponent_gradient), doc="x ** y")


def _infer_integer_power(x: TensorType, n: TensorType) -> TensorType:
    require_category("integer_power", x.dtype, "f")
    require_same("integer_power", x.with_dtype(dtypes.int64), n)
    return x


def _integer_power_gradient(g: Any, x: Any, n: Any) -> Any:
    zero = zeros_like(x)
    exponent = ops.cast(n, dtype=x.dtype)
    slope = ops.mul(exponent, ops.integer_power(x, ops.sub(n, ones_like(n))))
    return ops.mul(g, ops.where(ops.eq(exponent, zero), zero, slope))


integer_power: Op = register(Op(
    "integer_power", ("x", "n"), _infer_integer_power, keep_dtype(lambda x, n: np.power(x.astype(np.float64), n)),
    "elementwise", vjp=(_integer_power_gradient, None), spell="integer_power",
    doc="x ** n of a float and an int64, by squaring: a kernel of a few instructions, where pow is long."))


def _share_of_extreme(g: Any, chosen: Any, other: Any, compare: Any) -> Any:
    """The gradient of maximum or minimum in `chosen`: all where it wins, half where both are equal."""
    tie = ops.where(ops.eq(chosen, other), ops.mul(g, full_like(g, 0.5)), g)
    return ops.where(compare(chosen, other), zeros_like(g), tie)


# Not commutative to the last bit: of 0.0 and -0.0, which are equal, one of the two operands is taken.
maximum: Op = binary("maximum", np.maximum, categories="buif", doc="The larger one; nan if one is.",
                     vjp=(lambda g, x, y: _share_of_extreme(g, x, y, ops.lt),
                          lambda g, x, y: _share_of_extreme(g, y, x, ops.lt)))
minimum: Op = binary("minimum", np.minimum, categories="buif", doc="The smaller one; nan if one is.",
                     vjp=(lambda g, x, y: _share_of_extreme(g, x, y, ops.gt),
                          lambda g, x, y: _share_of_extreme(g, y, x, ops.gt)))


def _over_square_radius(g: Any, x: Any, y: Any) -> Any:
    """g / (x² + y²), but g at the origin, so that the gradient of atan2 is 0 there."""
    square = ops.add(ops.mul(x, x), ops.mul(y, y))
    return ops.div(g, ops.where(ops.eq(square, zeros_like(x)), ones_like(x), square))


atan2: Op = binary("atan2", np.arctan2, categories="f", doc="Angle of the point (y, x): x is the height.",
                   vjp=(lambda g, x, y: ops.mul(y, _over_square_radius(g, x, y)),
                        lambda g, x, y: ops.neg(ops.mul(x, _over_square_radius(g, x, y)))))
copysign: Op = binary("copysign", np.copysign, categories="f", doc="|x| with the sign of y",
                      vjp=(lambda g, x, out: ops.mul(g, ops.mul(ops.sign(x), ops.sign(out))), lambda g: zeros_like(g)))

bitwise_and: Op = binary("bitwise_and", np.bitwise_and, spell="{0} & {1}", categories="bui", commutative=True,
                         doc="x & y")
bitwise_or: Op = binary("bitwise_or", np.bitwise_or, spell="{0} | {1}", categories="bui", commutative=True, doc="x | y")
bitwise_xor: Op = binary("bitwise_xor", np.bitwise_xor, spell="{0} ^ {1}", categories="bui", commutative=True,
                         doc="x ^ y")
shift_left: Op = binary("shift_left", np.left_shift, categories="ui", doc="x << y; 0 when y is beyond the width")
shift_right: Op = binary("shift_right", np.right_shift, categories="ui", doc="x >> y, keeping the sign")

eq: Op = predicate("eq", ("x", "y"), np.equal, spell="{0} == {1}", categories="buifc", commutative=True, doc="x == y")
ne: Op = predicate("ne", ("x", "y"), np.not_equal, spell="{0} != {1}", categories="buifc", commutative=True,
                   doc="x != y")
lt: Op = predicate("lt", ("x", "y"), np.less, spell="{0} < {1}", doc="x < y")
le: Op = predicate("le", ("x", "y"), np.less_equal, spell="{0} <= {1}", doc="x <= y")
gt: Op = predicate("gt", ("x", "y"), np.greater, spell="{0} > {1}", doc="x > y")
ge: Op = predicate("ge", ("x", "y"), np.greater_equal, spell="{0} >= {1}", doc="x >= y")

# ---- three operands --------------------------------------------------------------------------------------------


def _infer_where(condition: TensorType, x: TensorType, y: TensorType) -> TensorType:
    require_category("where", condition.dtype, "b")
    require_same("where", x, y)
    require_same("where", x.with_dtype(dtypes.bool_), condition)
    return x


where: Op = register(Op(
    "where", ("condition", "x", "y"), _infer_where, choose, "elementwise", spell="({1} if {0} else {2})",
    vjp=(None, lambda g, condition: ops.where(condition, g, zeros_like(g)),
         lambda g, condition: ops.where(condition, zeros_like(g), g)),
    doc="x where condition holds, otherwise y."))
