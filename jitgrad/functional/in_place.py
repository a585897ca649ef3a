"""In-place forms: the result of a function becomes the contents of its first operand.

Here are how that is done (`store`, `in_place`) and the forms of functions that are seldom used so; the others stand
beside their functions in `methods`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jitgrad import dtypes, ops
from jitgrad.errors import DTypeError, ShapeError, complain
from jitgrad.functional import arithmetic, complex_numbers, elementwise, linalg, logic, scattering
from jitgrad.functional.core import Tensor, broadcast_shape, describe
from jitgrad.functional.shape import clone
from jitgrad.ops.builders import broadcast


def store(x: Tensor, value: Tensor) -> Tensor:
    """Overwrite `x` with `value`, converted to its dtype (but not to a lower category) and broadcast to its shape."""
    if value.dtype is not x.dtype:
        if not dtypes.can_cast(value.dtype, x.dtype):
            raise complain(DTypeError, "in-place operation", f"the result is {describe(value)}, which cannot be stored "
                                                             f"into {describe(x)}", fix="Use the out-of-place form")
        value = ops.cast(value, dtype=x.dtype)
    if value.shape != x.shape:
        if len(value.shape) > len(x.shape) or broadcast_shape("in-place operation", value.shape,
                                                                          x.shape) != x.shape:
            raise complain(ShapeError, "in-place operation",
                           f"the result is {describe(value)}, which does not fit into {describe(x)}",
                           fix="Use the out-of-place form")
        value = broadcast(value, x.shape)
    return x._assign(value)


def in_place(function: Callable[..., Tensor], read_by: str = "") -> Callable[..., Tensor]:
    """The in-place form of a function: its result becomes the contents of its first operand. Autocast leaves it alone. Where
    gradients are asked for that read this operand (`read_by`: those of "all" operands, or of "others"), the function works
    on a copy of it."""
    function = getattr(function, "uncast", function)

    @functools.wraps(function)
    def method(self: Tensor, *args: Any, **options: Any) -> Tensor:
        asking = {"": (), "others": args, "all": (self, *args)}[read_by]
        copies = any(getattr(x, "requires_grad", False) for x in asking)
        return store(self, function(clone(self) if copies else self, *args, **options))

    method.__name__ = method.__qualname__ = function.__name__ + "_"
    method.__doc__ = f"In-place form of `{function.__name__}`."
    return method


def reading(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`in_place` of a function whose gradients read its first operand."""
    return in_place(function, read_by="all")


def reading_for_others(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`in_place` of a function like a product, in which the gradient of an operand reads the other one."""
    return in_place(function, read_by="others")


class InPlaceMethods:
    """What `TensorMethods` inherits."""

    # one operand
    asin_, acos_, atan_ = reading(elementwise.asin), reading(elementwise.acos), reading(elementwise.atan)
    arcsin_, arccos_, arctan_ = asin_, acos_, atan_
    sinh_, cosh_ = reading(elementwise.sinh), reading(elementwise.cosh)
    asinh_, acosh_, atanh_ = reading(elementwise.asinh), reading(elementwise.acosh), reading(elementwise.atanh)
    arcsinh_, arccosh_, arctanh_ = asinh_, acosh_, atanh_
    erfc_, digamma_, lgamma_ = reading(elementwise.erfc), reading(elementwise.digamma), reading(elementwise.lgamma)
    logit_, sgn_ = reading(elementwise.logit), in_place(elementwise.sgn)
    negative_, fix_ = in_place(elementwise.neg), in_place(elementwise.trunc)
    deg2rad_, rad2deg_ = in_place(arithmetic.deg2rad), in_place(arithmetic.rad2deg)
    sinc_, conj_physical_ = reading(arithmetic.sinc), in_place(complex_numbers.conj)

    # two operands
    atan2_, copysign_, hypot_ = (reading(elementwise.atan2), reading(elementwise.copysign),
                                 reading(elementwise.hypot))
    arctan2_, xlogy_, heaviside_ = atan2_, reading(elementwise.xlogy), reading(elementwise.heaviside)
    gcd_, lcm_, ldexp_ = in_place(arithmetic.gcd), in_place(arithmetic.lcm), reading(arithmetic.ldexp)
    nextafter_, float_power_ = reading(arithmetic.nextafter), reading(arithmetic.float_power)
    addmv_, baddbmm_, addbmm_ = in_place(linalg.addmv), in_place(linalg.baddbmm), in_place(linalg.addbmm)
    addr_ = in_place(linalg.addr)

    # comparisons and bits
    eq_, ne_, lt_, le_ = in_place(logic.eq), in_place(logic.ne), in_place(logic.lt), in_place(logic.le)
    gt_, ge_ = in_place(logic.gt), in_place(logic.ge)
    not_equal_, less_, less_equal_, greater_, greater_equal_ = ne_, lt_, le_, gt_, ge_
    bitwise_and_, bitwise_or_ = in_place(logic.bitwise_and), in_place(logic.bitwise_or)
    bitwise_xor_, bitwise_not_ = in_place(logic.bitwise_xor), in_place(logic.bitwise_not)
    bitwise_left_shift_ = in_place(logic.bitwise_left_shift)
    bitwise_right_shift_ = in_place(logic.bitwise_right_shift)
    __ilshift__, __irshift__ = bitwise_left_shift_, bitwise_right_shift_

    # places
    scatter_reduce_, index_reduce_ = reading(scattering.scatter_reduce), reading(scattering.index_reduce)
    put_, renorm_ = in_place(scattering.put), reading(linalg.renorm)
