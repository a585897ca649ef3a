"""What each instruction that works on the registers of one thread computes: opcode -> `Operation`.

An operation is a function of NumPy arrays, one element per lane, with the types of its sources and its result. Whatever
has a rounding in PTX is rounded once. Approximations (``ex2.approx``, ``rcp.approx`` …) are computed in float64 and rounded:
a processor may be less accurate, by what the PTX ISA says of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx import values
from ptx.errors import Unsupported
from ptx.values import NARROW, TYPES, Array

ROUNDINGS = ("rn", "rz", "rm", "rp")


@dataclass(frozen=True, slots=True)
class Operation:
    compute: Callable[..., Array]
    sources: tuple[str, ...]
    result: str


def decode(opcode: tuple[str, ...]) -> Operation:
    """The operation of an opcode given in its parts. Unsupported where there is none."""
    name, kind = opcode[0], opcode[-1]
    maker = MAKERS.get(name)
    made = maker(opcode, kind) if maker and kind in TYPES else None
    if made is None:
        raise Unsupported(f"no meaning is known of {'.'.join(opcode)}")
    return made


def is_float(kind: str) -> bool:
    return kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


def rounding_of(opcode: tuple[str, ...]) -> str:
    return next((part for part in opcode if part in ROUNDINGS), "rn")


# --- floats ------------------------------------------------------------------------------------------------------------

def finish(opcode: tuple[str, ...], compute: Callable[..., Array]) -> Callable[..., Array]:
    """With ``.ftz``, ``.sat`` and ``.relu`` applied."""
    if "ftz" in opcode:
        inner = compute
        compute = lambda *x: values.flush(inner(*[values.flush(v) for v in x]))
    if "sat" in opcode:
        before = compute
        compute = lambda *x: _saturate(before(*x))
    return compute


def _saturate(x: Array) -> Array:
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, x.dtype.type(0), x.dtype.type(1)))


def narrow_operation(compute: Callable[..., Array], kind: str, count: int) -> Operation:
    """An operation on 16-bit floats, or on pairs of them, from its meaning in float64."""
    base = kind.removesuffix("x2")

    def single(*x: Array) -> Array:
        return values.narrow(compute(*[values.widen(v, base) for v in x]), base)

    def double(*x: Array) -> Array:
        low = single(*[np.asarray(v & np.uint32(0xFFFF)).astype(np.uint16) for v in x])
        high = single(*[np.asarray(v >> np.uint32(16)).astype(np.uint16) for v in x])
        return low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)

    return Operation(double if kind.endswith("x2") else single, (kind,) * count, kind)


def float_operation(opcode: tuple[str, ...], kind: str, count: int, wide: Callable[..., Array],
                    compute: Callable[..., Array]) -> Operation:
    if kind.removesuffix("x2") in NARROW:
        return narrow_operation(wide, kind, count)
    return Operation(finish(opcode, compute), (kind,) * count, kind)


def add(opcode: tuple[str, ...], kind: str) -> Operation:
    sign = -1 if opcode[0] == "sub" else 1
    if is_float(kind):
        rounding = rounding_of(opcode)
        return float_operation(opcode, kind, 2, lambda a, b: values.odd_sum(a, sign * b),
                               lambda a, b: values.float_add(a, -b if sign < 0 else b, kind, rounding))
    if "sat" in opcode:
        limits = np.iinfo(TYPES[kind])
        return Operation(lambda a, b: np.clip(a.astype(np.int64) + sign * b.astype(np.int64), limits.min,
                                              limits.max).astype(TYPES[kind]), (kind, kind), kind)
    return Operation(np.add if sign > 0 else np.subtract, (kind, kind), kind)


def multiply(opcode: tuple[str, ...], kind: str) -> Operation:
    if is_float(kind):
        rounding = rounding_of(opcode)
        return float_operation(opcode, kind, 2, lambda a, b: a * b,
                               lambda a, b: values.float_multiply(a, b, kind, rounding))
    result, product = _product(opcode, kind)
    return Operation(product, (kind, kind), result)


def multiply_add(opcode: tuple[str, ...], kind: str) -> Operation:
    if is_float(kind):
        rounding = rounding_of(opcode)
        return float_operation(opcode, kind, 3, lambda a, b, c: values.odd_sum(a * b, c),
                               lambda a, b, c: values.float_multiply_add(a, b, c, kind, rounding))
    result, product = _product(opcode, kind)
    return Operation(lambda a, b, c: product(a, b) + c, (kind, kind, result), result)


def _product(opcode: tuple[str, ...], kind: str) -> tuple[str, Callable[[Array, Array], Array]]:
    """The low half, the high half or the whole of an integer product."""
    size = values.size_of(kind)
    if "wide" in opcode:
        result = f"{kind[0]}{16 * size}"
        return result, lambda a, b: a.astype(TYPES[result]) * b.astype(TYPES[result])
    if "hi" in opcode:
        return kind, lambda a, b: high_product(a, b, kind)
    return kind, np.multiply


def high_product(a: Array, b: Array, kind: str) -> Array:
    bits = 8 * values.size_of(kind)
    if bits < 64:
        wide = np.dtype(f"{kind[0].replace('s', 'i')}8")
        return (a.astype(wide) * b.astype(wide) >> wide.type(bits)).astype(TYPES[kind])
    x, y = np.broadcast_arrays(a, b)
    exact = [int(p) * int(q) >> 64 & (1 << 64) - 1 for p, q in zip(x.reshape(-1), y.reshape(-1))]
    return np.array(exact, np.uint64).reshape(x.shape).view(TYPES[kind])


def divide(opcode: tuple[str, ...], kind: str) -> Operation:
    if is_float(kind):
        return float_operation(opcode, kind, 2, np.divide, np.divide)
    if kind[0] == "u":
        return Operation(lambda a, b: np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, 1, b).astype(a.dtype)),
                         (kind, kind), kind)
    return Operation(_divide_signed, (kind, kind), kind)


def _divide_signed(a: Array, b: Array) -> Array:
    """Toward zero."""
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    floor = a // safe
    exact = floor * safe == a
    truncated = np.where(~exact & ((a < 0) != (safe < 0)), floor + a.dtype.type(1), floor)
    return np.where(b == 0, a.dtype.type(-1), truncated)


def remainder(opcode: tuple[str, ...], kind: str) -> Operation:
    def compute(a: Array, b: Array) -> Array:
        return np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b).astype(a.dtype)))

    return Operation(compute, (kind, kind), kind)


def negate(opcode: tuple[str, ...], kind: str) -> Operation:
    flip = {"f16": 0x8000, "bf16": 0x8000, "f16x2": 0x80008000, "bf16x2": 0x80008000}.get(kind)
    if flip is not None:
        pattern = TYPES[kind](flip)
        other = TYPES[kind](~flip & (0xFFFFFFFF if "x2" in kind else 0xFFFF))
        return Operation((lambda a: a ^ pattern) if opcode[0] == "neg" else (lambda a: a & other), (kind,), kind)
    return Operation(finish(opcode, np.negative if opcode[0] == "neg" else np.abs), (kind,), kind)


def extreme(opcode: tuple[str, ...], kind: str) -> Operation:
    choose = values.minimum if opcode[0] == "min" else values.maximum
    if is_float(kind):
        nan = "NaN" in opcode
        return float_operation(opcode, kind, 2, lambda a, b: choose(a, b, nan), lambda a, b: choose(a, b, nan))
    return Operation(np.minimum if opcode[0] == "min" else np.maximum, (kind, kind), kind)


def _in_double(function: Callable[[Array], Array]) -> Callable[[tuple[str, ...], str], Operation]:
    """A function of one float, computed in float64."""
    def make(opcode: tuple[str, ...], kind: str) -> Operation:
        def compute(x: Array) -> Array:
            result = function(x.astype(np.float64))
            if kind == "f64" and "approx" in opcode:             # a start for Newton's method: its upper half alone
                return (result.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
            return values.to_single(result, rounding_of(opcode)) if kind == "f32" else result

        return float_operation(opcode, kind, 1, function, compute)
    return make


# --- comparisons -------------------------------------------------------------------------------------------------------

def _or_nan(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "ltu": _or_nan(np.less), "leu": _or_nan(np.less_equal), "gtu": _or_nan(np.greater), "geu": _or_nan(np.greater_equal),
    "equ": _or_nan(np.equal), "neu": np.not_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b)}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare(opcode: tuple[str, ...], kind: str) -> Operation:
    """``setp`` gives a predicate, its second result is made by the machine; ``set`` a number."""
    test = COMPARE[opcode[1]]
    if kind in NARROW:
        inner = test
        test = lambda a, b: inner(values.widen(a, kind), values.widen(b, kind))
    if "ftz" in opcode:
        plain = test
        test = lambda a, b: plain(values.flush(a), values.flush(b))
    if opcode[0] == "set":
        result = opcode[-2]
        one = TYPES[result](1.0) if result == "f32" else TYPES[result](-1 if result[0] == "s" else 0xFFFFFFFF)
        return Operation(lambda a, b: np.where(test(a, b), one, TYPES[result](0)), (kind, kind), result)
    combine = COMBINE.get(opcode[2])
    if combine:
        return Operation(lambda a, b, p: combine(test(a, b), p), (kind, kind, "pred"), "pred")
    return Operation(test, (kind, kind), "pred")


def select(opcode: tuple[str, ...], kind: str) -> Operation:
    return Operation(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind)


def test_property(opcode: tuple[str, ...], kind: str) -> Operation:
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x), "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny)}
    return Operation(tests[opcode[1]], (kind,), "pred")


# --- integers and bits -------------------------------------------------------------------------------------------------

def logic(opcode: tuple[str, ...], kind: str) -> Operation:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[opcode[0]]
    return Operation(function, (kind, kind), kind)


def logic_three(opcode: tuple[str, ...], kind: str) -> Operation:
    """``lop3``: the table's bit for every combination of three bits."""
    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for k in range(8):
            if int(table) >> k & 1:
                result = result | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return Operation(compute, (kind, kind, kind, "u32"), kind)


def shift(opcode: tuple[str, ...], kind: str) -> Operation:
    bits = 8 * values.size_of(kind)
    left, signed = opcode[0] == "shl", kind[0] == "s"

    def compute(x: Array, amount: Array) -> Array:
        within = np.minimum(amount, np.uint32(bits - 1)).astype(x.dtype)
        moved = np.left_shift(x, within) if left else np.right_shift(x, within)
        return moved if signed and not left else np.where(amount >= bits, x.dtype.type(0), moved)

    return Operation(compute, (kind, "u32"), kind)


def funnel_shift(opcode: tuple[str, ...], kind: str) -> Operation:
    def compute(low: Array, high: Array, amount: Array) -> Array:
        n = (np.minimum(amount, 32) if "clamp" in opcode else amount & np.uint32(31)).astype(np.uint64)
        joined = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        if opcode[1] == "l":
            return ((joined << n) >> np.uint64(32)).astype(np.uint32)
        return (joined >> n).astype(np.uint32)

    return Operation(compute, (kind, kind, "u32"), kind)


def count_bits(x: Array) -> Array:
    return np.bitwise_count(x).astype(np.uint32)


def leading_zeros(x: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    filled = x
    for step in (1, 2, 4, 8, 16, 32)[:5 + (bits == 64)]:
        filled = filled | filled >> x.dtype.type(step)
    return np.uint32(bits) - count_bits(filled)


def counting(opcode: tuple[str, ...], kind: str) -> Operation:
    return Operation(count_bits if opcode[0] == "popc" else leading_zeros, (kind,), "u32")


def find_bit(opcode: tuple[str, ...], kind: str) -> Operation:
    """``bfind``: position of the highest bit that is not a sign bit; all ones where there is none."""
    def compute(x: Array) -> Array:
        bits = 8 * x.dtype.itemsize
        plain = np.where(x < 0, ~x, x).astype(values.unsigned(x.dtype.itemsize))
        zeros = leading_zeros(plain)
        place = zeros if "shiftamt" in opcode else np.uint32(bits - 1) - zeros
        return np.where(plain == 0, np.uint32(0xFFFFFFFF), place)

    return Operation(compute, (kind,), "u32")


def reverse_bits(opcode: tuple[str, ...], kind: str) -> Operation:
    def compute(x: Array) -> Array:
        size = x.dtype.itemsize
        octets = np.ascontiguousarray(x).reshape(-1, 1).view(np.uint8)[:, ::-1]
        bits = np.unpackbits(octets, axis=1, bitorder="little").reshape(-1, size, 8)[:, :, ::-1]
        packed = np.packbits(bits.reshape(-1, size * 8), axis=1, bitorder="little")
        return np.ascontiguousarray(packed).view(x.dtype).reshape(x.shape)

    return Operation(compute, (kind,), kind)


def _ones(count: Array) -> Array:
    """Numbers of 64 bits whose lowest `count` bits are set."""
    below = (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(count >= 64, ~np.uint64(0), below)


def extract_bits(opcode: tuple[str, ...], kind: str) -> Operation:
    bits = 8 * values.size_of(kind)

    def compute(x: Array, position: Array, length: Array) -> Array:
        start, count = (position & np.uint32(0xFF)).astype(np.int64), (length & np.uint32(0xFF)).astype(np.int64)
        plain = x.view(values.unsigned(x.dtype.itemsize)).astype(np.uint64)
        field = np.where(start < bits, plain >> np.minimum(start, 63).astype(np.uint64), np.uint64(0))
        field = field & _ones(count)
        if kind[0] == "s":
            top = np.minimum(start + count - 1, bits - 1)
            negative = (plain >> np.maximum(top, 0).astype(np.uint64) & np.uint64(1) == 1) & (count > 0)
            field = np.where(negative, field | ~_ones(np.minimum(count, np.maximum(bits - start, 0))), field)
        return field.astype(values.unsigned(bits // 8)).view(TYPES[kind])

    return Operation(compute, (kind, "u32", "u32"), kind)


def insert_bits(opcode: tuple[str, ...], kind: str) -> Operation:
    bits = 8 * values.size_of(kind)

    def compute(x: Array, y: Array, position: Array, length: Array) -> Array:
        start, count = position & np.uint32(0xFF), np.minimum(length & np.uint32(0xFF), np.uint32(bits))
        shifted = np.where(start < bits, _ones(count) << np.minimum(start, 63).astype(np.uint64), np.uint64(0))
        moved = x.astype(np.uint64) << np.minimum(start, 63).astype(np.uint64)
        return (y.astype(np.uint64) & ~shifted | moved & shifted).astype(TYPES[kind])

    return Operation(compute, (kind, kind, "u32", "u32"), kind)


def permute(opcode: tuple[str, ...], kind: str) -> Operation:
    """``prmt``: four bytes chosen from eight, each perhaps as its sign alone."""
    if len(opcode) > 2:
        raise Unsupported(f"{'.'.join(opcode)}: modes of prmt")

    def compute(a: Array, b: Array, control: Array) -> Array:
        joined = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        result = np.zeros(joined.shape, np.uint32)
        for k in range(4):
            choice = (control >> np.uint32(4 * k)).astype(np.uint64)
            octet = (joined >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)).astype(np.uint32)
            octet = np.where(choice & np.uint64(8), np.where(octet & 0x80, np.uint32(0xFF), np.uint32(0)), octet)
            result |= octet << np.uint32(8 * k)
        return result

    return Operation(compute, (kind, kind, "u32"), kind)


# --- conversions -------------------------------------------------------------------------------------------------------

def convert(opcode: tuple[str, ...], source: str) -> Operation:
    target = opcode[-2]
    if target in ("bf16x2", "f16x2"):
        half = target[:-2]
        return Operation(lambda a, b: _pack(a, b, half, opcode), (source, source), "b32")
    if target == "tf32":
        return Operation(values.tensor_float, (source,), "b32")
    if is_float(source):
        return Operation(lambda x: _from_float(x, source, target, opcode), (source,), target)
    return Operation(lambda x: _from_integer(x, target, opcode), (source,), target)


def _pack(a: Array, b: Array, half: str, opcode: tuple[str, ...]) -> Array:
    high, low = (values.narrow(_relu(np.asarray(v, np.float64), opcode), half, rounding_of(opcode)) for v in (a, b))
    return high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)


def _relu(x: Array, opcode: tuple[str, ...]) -> Array:
    return np.where(x < 0, 0.0, x) if "relu" in opcode else x


def _from_float(x: Array, source: str, target: str, opcode: tuple[str, ...]) -> Array:
    wide = values.widen(x, source) if source in NARROW else x
    if "ftz" in opcode and source == "f32":
        wide = values.flush(wide)
    rounding = next((part for part in opcode if part in values.ROUND), None)
    if not is_float(target):
        return values.float_to_integer(wide, target, rounding or "rzi")
    wide = wide.astype(np.float64)
    if rounding:
        wide = np.copysign(values.ROUND[rounding](wide), wide)
    wide = _relu(_saturate(wide) if "sat" in opcode else wide, opcode)
    if target in NARROW:
        return values.narrow(wide, target, rounding_of(opcode))
    result = values.to_single(wide, rounding_of(opcode)) if target == "f32" else wide
    return values.flush(result) if "ftz" in opcode and target == "f32" else result


def _from_integer(x: Array, target: str, opcode: tuple[str, ...]) -> Array:
    if is_float(target):
        single = values.integer_to_float(x, "f64" if target in NARROW else target, rounding_of(opcode))
        return values.narrow(single, target, rounding_of(opcode)) if target in NARROW else single
    if "sat" in opcode:
        limits = np.iinfo(TYPES[target])
        low, high = max(limits.min, int(np.iinfo(x.dtype).min)), min(limits.max, int(np.iinfo(x.dtype).max))
        x = np.clip(x, x.dtype.type(low), x.dtype.type(high))
    return x.astype(TYPES[target])


Maker = Callable[[tuple[str, ...], str], Operation]
MAKERS: dict[str, Maker] = {
    "add": add, "sub": add, "mul": multiply, "mad": multiply_add, "fma": multiply_add, "div": divide, "rem": remainder,
    "neg": negate, "abs": negate, "min": extreme, "max": extreme,
    "rcp": _in_double(lambda x: 1.0 / x), "sqrt": _in_double(np.sqrt), "rsqrt": _in_double(lambda x: 1.0 / np.sqrt(x)),
    "ex2": _in_double(np.exp2), "lg2": _in_double(np.log2), "tanh": _in_double(np.tanh), "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "copysign": lambda opcode, kind: Operation(lambda sign, size: np.copysign(size, sign), (kind, kind), kind),
    "setp": compare, "set": compare, "selp": select, "testp": test_property,
    "and": logic, "or": logic, "xor": logic, "lop3": logic_three,
    "not": lambda opcode, kind: Operation(np.invert, (kind,), kind), "cnot": lambda opcode, kind: Operation(
        lambda x: (x == 0).astype(x.dtype), (kind,), kind),
    "shl": shift, "shr": shift, "shf": funnel_shift, "popc": counting, "clz": counting, "bfind": find_bit,
    "brev": reverse_bits, "bfe": extract_bits, "bfi": insert_bits, "prmt": permute, "cvt": convert,
    "sad": lambda opcode, kind: Operation(lambda a, b, c: c + np.where(a < b, b - a, a - b), (kind,) * 3, kind)}
