"""Numbers as PTX has them: types, exact float arithmetic with every rounding, and conversions.

Registers are unsigned integers of 16, 32 or 64 bits, or bools for predicates; `TYPES` gives the NumPy type under which
an instruction looks at them. 16-bit floats are handled as float64 in here and as bits in registers. Float32 and float16
results are computed in float64 with *rounding to odd*, which keeps what the final rounding needs to know, and rounded
once (S. Boldo and G. Melquiond, *Emulation of FMA and correctly rounded sums*, 2008); so every operation is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

TYPES = {
    "f32": np.float32, "f64": np.float64, "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16,
    "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64,
    "b64": np.uint64, "pred": np.bool_, "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
    "tf32": np.uint32}
"""The NumPy type of each PTX type; those of 16-bit floats are their bits."""

NARROW = ("f16", "bf16")
Array = np.ndarray


def size_of(kind: str) -> int:
    """Bytes of an element."""
    return int(np.dtype(TYPES[kind]).itemsize)


def unsigned(size: int) -> type:
    return {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[size]


# --- rounding ----------------------------------------------------------------------------------------------------------

def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    total = a + b
    virtual = total - a
    error = (a - (total - virtual)) + (b - virtual)
    return make_odd(total, error)


def make_odd(total: Array, error: Array) -> Array:
    """`total` rounded to odd, for an exact result ``total + error``."""
    total = np.asarray(total, np.float64)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    fix = even & (error != 0) & np.isfinite(error) & np.isfinite(total)
    return np.where(fix, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total) if np.any(fix) else total


def to_single(x: Array, rounding: str = "rn") -> Array:
    """float64 to float32: rn to nearest even, rz toward zero, rm down, rp up."""
    y = np.asarray(x).astype(np.float32)
    if rounding == "rn":
        return y
    back = y.astype(np.float64)
    low, high = np.float32(-np.inf), np.float32(np.inf)
    down = np.where((back > x) & ((rounding == "rm") | ((rounding == "rz") & (x > 0))), np.nextafter(y, low), y)
    up = (back < x) & ((rounding == "rp") | ((rounding == "rz") & (x < 0)))
    return np.where(up, np.nextafter(y, high), down).astype(np.float32)


def flush(x: Array) -> Array:
    """Subnormal numbers as zeros of the same sign, as ``.ftz`` asks; what is no float stays as it is."""
    x = np.asarray(x)
    if x.dtype.kind != "f":
        return x
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


# --- narrow floats -----------------------------------------------------------------------------------------------------

def widen(bits: Array, kind: str) -> Array:
    """The float64 values of 16-bit floats given as bits."""
    if kind == "f16":
        return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float64)
    shifted = np.ascontiguousarray(np.asarray(bits).astype(np.uint32) << np.uint32(16))
    return shifted.view(np.float32).astype(np.float64)


def narrow(x: Array, kind: str, rounding: str = "rn") -> Array:
    """Bits of 16-bit floats, rounded once from float64."""
    x = np.asarray(x, np.float64)
    if kind == "f16":
        return _narrow_half(x, rounding)
    single = x.astype(np.float32)
    single = _odd_single(x, single)
    bits = np.ascontiguousarray(single).view(np.uint32)
    if rounding == "rn":
        kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    elif rounding == "rz":
        kept = bits >> np.uint32(16)
    else:
        raise ValueError(rounding)
    return np.where(np.isnan(x), np.uint16(0x7FFF), kept.astype(np.uint16))


def _odd_single(x: Array, y: Array) -> Array:
    """float64 to float32, rounded to odd, so that a second rounding to fewer bits is right."""
    y = np.asarray(y, np.float32)
    error = x - y.astype(np.float64)
    even = (np.ascontiguousarray(y).view(np.uint32) & np.uint32(1)).reshape(y.shape) == 0
    fix = even & (error != 0) & np.isfinite(error)
    toward = np.where(error > 0, np.float32(np.inf), np.float32(-np.inf))
    return np.where(fix, np.nextafter(y, toward), y).astype(np.float32)


def _narrow_half(x: Array, rounding: str) -> Array:
    y = x.astype(np.float16)
    if rounding == "rz":
        y = np.where(np.abs(y.astype(np.float64)) > np.abs(x), np.nextafter(y, np.float16(0)), y).astype(np.float16)
    elif rounding != "rn":
        raise ValueError(rounding)
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.ascontiguousarray(y).view(np.uint16).reshape(y.shape))


# --- arithmetic --------------------------------------------------------------------------------------------------------

def float_add(a: Array, b: Array, kind: str, rounding: str) -> Array:
    if kind == "f64" or (kind == "f32" and rounding == "rn"):
        return a + b
    return to_single(odd_sum(a.astype(np.float64), b.astype(np.float64)), rounding)


def float_multiply(a: Array, b: Array, kind: str, rounding: str) -> Array:
    if kind == "f64" or (kind == "f32" and rounding == "rn"):
        return a * b
    return to_single(a.astype(np.float64) * b.astype(np.float64), rounding)


def float_multiply_add(a: Array, b: Array, c: Array, kind: str, rounding: str) -> Array:
    """a * b + c, rounded once."""
    if kind == "f64":
        return double_multiply_add(*np.broadcast_arrays(a, b, c))
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    if rounding == "rn":
        total = np.asarray(product + addend)
        halfway = total.view(np.uint64) & np.uint64(0x1FFFFFFF) == np.uint64(0x10000000)
        if not (halfway | (np.abs(total) < 2.0 ** -126)).any():      # then rounding twice is rounding once
            return total.astype(np.float32)
    return to_single(odd_sum(product, addend), rounding)


def double_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64, rounded once: by exact products where no part leaves the range, else by rational numbers."""
    high = a * b
    low = _product_error(a, b, high)
    top, rest = _two_sum(c, low)
    sum_high, sum_low = _two_sum(high, top)
    result = sum_high + odd_sum(rest, sum_low)
    values = np.stack([np.abs(a), np.abs(b), np.abs(high)])
    safe = ((values == 0) | ((values > 2.0 ** -480) & (values < 2.0 ** 480))).all(0) & (np.abs(c) < 2.0 ** 900)
    safe &= (high != 0) | (a == 0) | (b == 0)
    plain = ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c)
    result = np.where(plain | (high == 0) & safe, a * b + c, result)
    for k in np.flatnonzero(~safe & ~plain):
        result.reshape(-1)[k] = _rational(a.reshape(-1)[k], b.reshape(-1)[k], c.reshape(-1)[k])
    return result


def _rational(a: float, b: float, c: float) -> float:
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return float(a) * float(b) + float(c)
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _product_error(a: Array, b: Array, product: Array) -> Array:
    """a * b - product, exactly (T. J. Dekker, 1971)."""
    def split(x: Array) -> tuple[Array, Array]:
        scaled = x * 134217729.0
        high = scaled - (scaled - x)
        return high, x - high

    a_high, a_low = split(a)
    b_high, b_low = split(b)
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def minimum(a: Array, b: Array, nan: bool) -> Array:
    """The lesser; -0 is less than +0. A NaN is left out, or with `nan` passed on."""
    chosen = np.minimum(a, b) if nan else np.fmin(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), chosen)


def maximum(a: Array, b: Array, nan: bool) -> Array:
    chosen = np.maximum(a, b) if nan else np.fmax(a, b)
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), chosen)


ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


# --- conversions -------------------------------------------------------------------------------------------------------

def float_to_integer(x: Array, kind: str, rounding: str) -> Array:
    """To the nearest representable integer; a NaN is 0."""
    target = np.dtype(TYPES[kind])
    limits = np.iinfo(target)
    x = ROUND[rounding](np.asarray(x, np.float64))
    inside = np.where(np.isnan(x) | (x < float(limits.min)) | (x >= float(limits.max)), 0.0, x).astype(target)
    low = np.where(x < float(limits.min), target.type(limits.min), inside)
    return np.where(x >= float(limits.max), target.type(limits.max), low)


def integer_to_float(x: Array, kind: str, rounding: str) -> Array:
    """Rounded once; 64-bit integers are split so that no bit is lost on the way."""
    if kind == "f64" and rounding == "rn":
        return x.astype(np.float64)
    if x.dtype.itemsize < 4:
        x = x.astype(np.int32)
    low = (x & x.dtype.type(0xFFFF)).astype(np.float64)
    high = (x - (x & x.dtype.type(0xFFFF))).astype(np.float64)
    return to_single(odd_sum(high, low), rounding) if kind == "f32" else odd_sum(high, low)


def tensor_float(x: Array) -> Array:
    """float32 to the bits of tf32, to nearest, ties away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)
