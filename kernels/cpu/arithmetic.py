"""Signs, comparisons, roundings, divisions and shifts of floats and integers, with the rules of NumPy and PyTorch.

Every function works on each numeric type and returns the type of its first argument, unless it says otherwise. An
integer divided by zero gives 0 in here; a kernel writes ``if y == 0: fail(args, 2, item, 0)`` before such a division.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.logarithmic import INFINITY, NAN, pow_f32, pow_f64
from jitgrad.kernels.cpu.scalar import (
    Scalar,
    abs,
    bit_width,
    bits,
    by_type,
    copysign,
    f32,
    f64,
    floor,
    i32,
    i64,
    like,
    scalar,
    scale,
    select,
    sqrt,
)

EXPONENT = 0x7FF0000000000000                  # the bit pattern of infinity


@scalar
def sign(x: Scalar) -> Scalar:
    """-1, 0 or 1; NaN for NaN."""
    zero = like(x, 0)
    return select(x > zero, like(x, 1), select(x < zero, like(x, -1), select(x != x, x, zero)))


@scalar
def relu(x: Scalar) -> Scalar:
    """x where it is positive, else 0; NaN for NaN."""
    return select(x <= like(x, 0), like(x, 0), x)


@scalar
def maximum(x: Scalar, y: Scalar) -> Scalar:
    """The larger one; NaN if either is NaN."""
    return select((x > y) | (x != x), x, y)


@scalar
def minimum(x: Scalar, y: Scalar) -> Scalar:
    """The smaller one; NaN if either is NaN."""
    return select((x < y) | (x != x), x, y)


@scalar
def goes_before(x: Scalar, y: Scalar, descending: Scalar) -> Scalar:
    """True when a stable sort must put x, which stands behind y, before y. NaN is larger than every number."""
    up = (x < y) | ((y != y) & (x == x))
    down = (x > y) | ((x != x) & (y == y))
    return select(descending != 0, down, up)


@scalar
def order_f32(x: Scalar) -> Scalar:
    pattern = bits(x)
    signed = pattern ^ ((pattern >> i32(31)) & i32(0x7FFFFFFF))
    return select(x != x, i32(0x7FFFFFFF), select(x == f32(0.0), i32(0), i32(signed)))


@scalar
def order_f64(x: Scalar) -> Scalar:
    pattern = bits(x)
    signed = pattern ^ ((pattern >> i64(63)) & i64(0x7FFFFFFFFFFFFFFF))
    return select(x != x, i64(0x7FFFFFFFFFFFFFFF), select(x == f64(0.0), i64(0), i64(signed)))


@scalar
def order_whole(x: Scalar) -> Scalar:
    """An integer with the order of x among its like: NaN above all, both zeros alike."""
    return x


order = by_type("order", order_f32, order_f64, order_whole)


@scalar
def rsqrt(x: Scalar) -> Scalar:
    """1 / sqrt(x)."""
    return like(x, 1) / sqrt(x)


@scalar
def reciprocal(x: Scalar) -> Scalar:
    """1 / x."""
    return like(x, 1) / x


@scalar
def isnan(x: Scalar) -> Scalar:
    """True for NaN."""
    return x != x


@scalar
def isinf(x: Scalar) -> Scalar:
    """True for either infinity."""
    return abs(x) == like(x, INFINITY)


@scalar
def isfinite(x: Scalar) -> Scalar:
    """True for everything but NaN and the infinities."""
    return abs(x) < like(x, INFINITY)


@scalar
def bitwise_not(x: Scalar) -> Scalar:
    """All bits flipped; of a bool: not x."""
    return x ^ like(x, -1)


@scalar
def shift_left(x: Scalar, y: Scalar) -> Scalar:
    """x * 2**y without its high bits; 0 for y negative or beyond the width."""
    inside = (y >= like(y, 0)) & (y < bit_width(y))
    return select(inside, like(x, x << select(inside, y, like(y, 0))), like(x, 0))


@scalar
def shift_right(x: Scalar, y: Scalar) -> Scalar:
    """floor(x / 2**y); 0 or -1 for y negative or beyond the width."""
    inside = (y >= like(y, 0)) & (y < bit_width(y))
    beyond = select(x < like(x, 0), like(x, -1), like(x, 0))
    return select(inside, like(x, x >> select(inside, y, like(y, 0))), beyond)


# --- division of integers -----------------------------------------------------------------------------------------


@scalar
def safe_divisor(y: Scalar) -> Scalar:
    """y, but 1 for 0 and for -1: the divisors that the machine's instruction traps on."""
    minus_one = (y == like(y, -1)) & (y < like(y, 0))
    return select((y == like(y, 0)) | minus_one, like(y, 1), y)


@scalar
def floor_divide_whole(x: Scalar, y: Scalar) -> Scalar:
    q = like(x, x // safe_divisor(y))
    q = select((y < like(y, 0)) & (y == like(y, -1)), like(x, like(x, 0) - x), q)
    return select(y == like(y, 0), like(x, 0), q)


@scalar
def remainder_whole(x: Scalar, y: Scalar) -> Scalar:
    return like(x, x % safe_divisor(y))


@scalar
def fmod_whole(x: Scalar, y: Scalar) -> Scalar:
    r = remainder_whole(x, y)
    wrong = (r != like(x, 0)) & ((x < like(x, 0)) != (r < like(x, 0)))
    return select(wrong, like(x, r - y), r)


@scalar
def pow_whole(x: Scalar, y: Scalar) -> Scalar:
    """x ** y modulo 2**width; a negative power is the integer part of the fraction."""
    result, base, n = like(x, 1), x, y
    while n > like(y, 0):
        if (n & like(y, 1)) != like(y, 0):
            result = like(x, result * base)
        base = like(x, base * base)
        n = like(y, n >> like(y, 1))
    unit = select((y & like(y, 1)) == like(y, 0), like(x, x * x), x)
    small = (x == like(x, 1)) | (x == like(x, -1))
    return select(y < like(y, 0), select(small, unit, like(x, 0)), result)


@scalar
def integer_power(x: Scalar, n: Scalar) -> Scalar:
    """x ** n of a float and an int64, by squaring: tiny code, and exact where the products are."""
    result, base = like(x, 1), select(n < i64(0), like(x, 1) / x, x)
    while n != i64(0):
        if (n & i64(1)) != i64(0):
            result = result * base
        base = base * base
        n = i64(i64(n + select(n < i64(0), i64(1), i64(0))) >> i64(1))
    return result


# --- division of floats -------------------------------------------------------------------------------------------


@scalar
def fmod_f64(x: Scalar, y: Scalar) -> Scalar:
    """x - y * trunc(x / y), exactly: long division of the mantissas, ten bits at a time."""
    a, b = bits(abs(x)), bits(abs(y))
    broken = (a >= i64(EXPONENT)) | (b > i64(EXPONENT)) | (b == i64(0))
    a_exponent, b_exponent = exponent_field(a), exponent_field(b)
    divisor = select(broken, i64(1), mantissa(b))
    rest, places = i64(mantissa(a) % divisor), i64(a_exponent - b_exponent)
    while places > i64(0):
        step = select(places < i64(10), places, i64(10))
        rest, places = i64(i64(rest << step) % divisor), i64(places - step)
    r = select(a < b, x, copysign(scale(f64(rest), i64(b_exponent - i64(1075))), x))
    return select(broken, f64(NAN), r)


@scalar
def exponent_field(pattern: Scalar) -> Scalar:
    """The exponent of a positive float64's bit pattern, counted so that denormal numbers have 1."""
    field = i64(pattern >> i64(52))
    return select(field == i64(0), i64(1), field)


@scalar
def mantissa(pattern: Scalar) -> Scalar:
    """The significand of a positive float64's bit pattern as an integer below 2**53."""
    hidden = select(pattern < i64(1 << 52), i64(0), i64(1 << 52))
    return i64(i64(pattern & i64((1 << 52) - 1)) | hidden)


@scalar
def fmod_f32(x: Scalar, y: Scalar) -> Scalar:
    return f32(fmod_f64(f64(x), f64(y)))


fmod = by_type("fmod", fmod_f32, fmod_f64, fmod_whole)


@scalar
def remainder_float(x: Scalar, y: Scalar) -> Scalar:
    """x - y * floor(x / y): fmod, moved to the sign of y."""
    r, zero = fmod(x, y), like(x, 0.0)
    wrong = (r != zero) & ((r < zero) != (y < zero))
    return select(wrong, r + y, select(r == zero, copysign(r, y), r))


@scalar
def floor_divide_float(x: Scalar, y: Scalar) -> Scalar:
    """floor(x / y), in the steps of Python, NumPy and PyTorch, so that roundings fall alike; x / y for y = 0."""
    r, zero = fmod(x, y), like(x, 0.0)
    wrong = (r != zero) & ((r < zero) != (y < zero))
    q = (x - r) / y - select(wrong, like(x, 1.0), zero)
    whole = floor(q)
    whole = select(q - whole > like(x, 0.5), whole + like(x, 1.0), whole)
    return select(y == zero, x / y, select(q == zero, copysign(zero, x / y), whole))


remainder = by_type("remainder", remainder_float, remainder_float, remainder_whole)
floor_divide = by_type("floor_divide", floor_divide_float, floor_divide_float, floor_divide_whole)
pow = by_type("pow", pow_f32, pow_f64, pow_whole)
