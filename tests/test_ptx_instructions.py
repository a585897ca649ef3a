"""Instructions of the PTX interpreter, family by family, against NumPy and rational numbers.

The texts are written by hand, so that this runs without any of NVIDIA's packages."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from ptx import Garbage, execute
from ptx.writing import kernel

REGISTER = {"f32": "f32", "f64": "f64", "pred": "pred", "f16": "b16", "bf16": "b16"}
NUMPY = {"f32": np.float32, "f64": np.float64, "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "s64": np.int64,
         "u64": np.uint64, "b64": np.uint64, "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "s8": np.int8,
         "u8": np.uint8, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


def apply(line, sources, result, schedules=("together",)):
    """One instruction on arrays: ``{0}`` is its result, ``{1}``, ``{2}`` … are the sources, which are (type, array)."""
    count = len(sources[0][1])
    registers = [f".reg .{REGISTER.get(kind, 'b' + str(8 * max(2, np.dtype(NUMPY[kind]).itemsize)))} %v{k};"
                 for k, kind in enumerate([result, *[kind for kind, _ in sources]])]
    lines = [*registers, ".reg .u64 %a;", "cvt.u64.u32 %rd30, %r0;"]
    for k, (kind, _) in enumerate(sources, 1):
        size = np.dtype(NUMPY[kind]).itemsize
        plain = f"b{8 * size}" if kind in ("f16", "bf16") else kind
        lines += [f"mad.lo.u64 %a, %rd30, {size}, %rd{k};", f"ld.global.{plain} %v{k}, [%a];"]
    lines.append(line.format(*[f"%v{k}" for k in range(len(sources) + 1)]))
    size = np.dtype(NUMPY[result]).itemsize
    lines += [f"mad.lo.u64 %a, %rd30, {size}, %rd0;", f"st.global.b{8 * size} [%a], %v0;"]
    text = kernel("\n".join(lines), ("u64",) * (len(sources) + 1))
    arguments = [Garbage(count, NUMPY[result]), *[np.ascontiguousarray(values, NUMPY[kind]) for kind, values in sources]]
    return execute(text, 1, count, arguments, schedules=schedules)[0]


def random(kind, seed=0, count=256):
    """Numbers of all magnitudes, with the special ones in front."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(NUMPY[kind])
    if kind in ("f32", "f64", "f16", "bf16"):
        spread = {"f32": 40, "f64": 300, "f16": 6, "bf16": 40}[kind]
        values = rng.standard_normal(count) * np.exp2(rng.uniform(-spread, spread, count))
        values[:10] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 0.5, 1.5, 2.5]
        return rng.permuted(values.astype(dtype)) if seed else values.astype(dtype)
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()


def same(ours, expected):
    """Equal to the bit, but for which NaN it is."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    if ours.dtype.kind not in "iu":
        nan = np.isnan(expected)
        assert (np.isnan(ours) == nan).all()
        ours, expected = ours[~nan], expected[~nan]
    assert ours.tobytes() == expected.astype(ours.dtype).tobytes()


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


# --- arithmetic --------------------------------------------------------------------------------------------------------

def exact(function, *arrays, dtype=np.float32):
    """Elementwise, by rational numbers, rounded once to nearest even; for finite results only."""
    def one(*values):
        value = function(*[Fraction(float(v)) for v in values])
        return round_fraction(value, dtype)
    return np.array([one(*values) for values in zip(*arrays)], dtype)


def round_fraction(value, dtype):
    """The nearest number of a float type, ties to even."""
    if value == 0:
        return dtype(0)
    info = ml_dtypes.finfo(dtype)
    exponent = max(int(np.floor(np.log2(float(abs(value)) or 5e-324))), int(info.minexp))
    step = Fraction(2) ** (exponent - int(info.nmant))
    return dtype(float(round(value / step) * step))          # round() of a Fraction is to even


@pytest.mark.parametrize("kind", ["f32", "f64", "s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("name, function", [("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply)])
def test_sums_and_products(kind, name, function):
    a, b = random(kind, 1), random(kind, 2)
    plain = name.removesuffix(".lo") if kind[0] == "f" else name
    same(apply(f"{plain}.{kind} {{0}}, {{1}}, {{2}};", [(kind, a), (kind, b)], kind), function(a, b))


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_fma_rounds_once(kind, dtype):
    rng = np.random.default_rng(0)
    a, b = (dtype(1) + rng.integers(0, 4096, 256).astype(dtype) * np.finfo(dtype).eps for _ in range(2))
    c = -(a * b) * dtype(1) + np.where(rng.random(256) < 0.5, 0, rng.standard_normal(256)).astype(dtype)
    c[:64] *= dtype(2.0 ** -30)
    c[64:128] = np.spacing(a[64:128]) / 2
    result = apply(f"fma.rn.{kind} {{0}}, {{1}}, {{2}}, {{3}};", [(kind, a), (kind, b), (kind, c)], kind)
    same(result, exact(lambda x, y, z: x * y + z, a, b, c, dtype=dtype))
    special = apply(f"fma.rn.{kind} {{0}}, {{1}}, {{2}}, {{3}};", [(kind, [np.inf, 0, np.inf, -0.0]), (kind, [2, 3, 0, 1]),
                                                                  (kind, [1, np.nan, 1, -0.0])], kind)
    same(special, np.array([np.inf, np.nan, np.nan, -0.0], dtype))


def test_fma_of_float64_over_all_magnitudes():
    a, b, c = (random("f64", seed, 1024) for seed in (1, 2, 3))
    c[:400] = -(a * b)[:400] * (1 + np.random.default_rng(0).integers(-3, 4, 400) * 2.0 ** -52)
    keep = np.isfinite(a * b) & np.isfinite(c) & (np.abs(a * b) < 1e300)
    a, b, c = (v[keep] for v in (a, b, c))
    same(apply("fma.rn.f64 {0}, {1}, {2}, {3};", [("f64", a), ("f64", b), ("f64", c)], "f64"),
         [float(exact_value) if (exact_value := Fraction(x) * Fraction(y) + Fraction(z)) else x * y + z
          for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())])


def test_fma_on_a_tie_is_not_rounded_twice():
    """1 + 2**-23 + 2**-24 is a tie in float32; a part far below decides, which float64 cannot hold beside it."""
    a, b = np.float32(1 + 2.0 ** -23), np.float32(1)
    for sign in (1, -1):
        c = np.float32(2.0 ** -24 + sign * 2.0 ** -47)
        got = apply("fma.rn.f32 {0}, {1}, {2}, {3};", [("f32", [a]), ("f32", [b]), ("f32", [c])], "f32")
        assert got[0] == exact(lambda x, y, z: x * y + z, [a], [b], [c])[0]
    sources = [("f32", [1 + 2.0 ** -23]), ("f32", [2.0 ** -24]), ("f32", [1.0])]
    assert apply("fma.rn.f32 {0}, {1}, {2}, {3};", sources, "f32")[0] == np.float32(1 + 2.0 ** -23)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("name, function", [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b),
                                            ("mul", lambda a, b: a * b)])
def test_sixteen_bit_floats(kind, name, function):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(256).astype(NUMPY[kind]) for _ in range(2))
    b[:100] = (b[:100].astype(np.float32) * 2.0 ** -8).astype(b.dtype)
    got = apply(f"{name}.{kind} {{0}}, {{1}}, {{2}};", [(kind, a), (kind, b)], kind)
    same(got, exact(function, a, b, dtype=NUMPY[kind]))


def test_pairs_of_sixteen_bit_floats():
    a, b = (np.random.default_rng(k).standard_normal(512).astype(np.float16) for k in (0, 1))
    pairs = [(("b32"), v.view(np.uint32)) for v in (a, b)]
    same(apply("fma.rn.f16x2 {0}, {1}, {2}, {2};", pairs, "b32").view(np.float16),
         exact(lambda x, y: x * y + y, a, b, dtype=np.float16))
    same(apply("neg.f16x2 {0}, {1};", pairs[:1], "b32").view(np.float16), -a)


def test_flushing_and_saturating():
    tiny = np.array([2.0 ** -127, -2.0 ** -130, 1.0, 2.0 ** -126, -3.0, np.nan], np.float32)
    one = np.ones(6, np.float32)
    same(apply("mul.ftz.f32 {0}, {1}, {2};", [("f32", tiny), ("f32", one)], "f32"), [0.0, -0.0, 1, 2.0 ** -126, -3, np.nan])
    same(apply("mul.f32 {0}, {1}, {2};", [("f32", tiny), ("f32", one)], "f32"), tiny)
    same(apply("add.sat.f32 {0}, {1}, {2};", [("f32", tiny), ("f32", one)], "f32"),
         np.array([1, 1, 1, 1, 0, 0], np.float32))


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
def test_directed_roundings(rounding):
    a, b = (np.random.default_rng(k).standard_normal(256).astype(np.float32) for k in (0, 1))
    for name, function in (("add", lambda x, y: x + y), ("mul", lambda x, y: x * y)):
        got = apply(f"{name}.{rounding}.f32 {{0}}, {{1}}, {{2}};", [("f32", a), ("f32", b)], "f32")
        for x, y, z in zip(a, b, got):
            value, rounded = function(Fraction(float(x)), Fraction(float(y))), Fraction(float(z))
            down = rounding == "rm" or (rounding == "rz" and value > 0)
            next_one = Fraction(float(np.nextafter(z, np.float32(np.inf if down else -np.inf))))
            assert rounded <= value < next_one if down else next_one < value <= rounded


def test_minimum_and_maximum():
    a, b = random("f32", 1), random("f32", 2)
    sources = [("f32", np.append(a, [0.0, -0.0])), ("f32", np.append(b, [-0.0, 0.0]))]
    low = apply("min.f32 {0}, {1}, {2};", sources, "f32")
    high = apply("max.f32 {0}, {1}, {2};", sources, "f32")
    same(low, np.append(np.fmin(a, b), [-0.0, -0.0]))
    same(high, np.append(np.fmax(a, b), [0.0, 0.0]))
    same(apply("max.NaN.f32 {0}, {1}, {2};", [("f32", a), ("f32", b)], "f32"), np.maximum(a, b))
    x, y = random("s32", 1), random("s32", 2)
    same(apply("min.s32 {0}, {1}, {2};", [("s32", x), ("s32", y)], "s32"), np.minimum(x, y))
    same(apply("max.u32 {0}, {1}, {2};", [("s32", x), ("s32", y)], "u32"), np.maximum(x.view(np.uint32), y.view(np.uint32)))


def test_division_and_roots():
    a, b = random("f32", 1), random("f32", 2)
    same(apply("div.rn.f32 {0}, {1}, {2};", [("f32", a), ("f32", b)], "f32"), a / b)
    same(apply("rcp.rn.f32 {0}, {1};", [("f32", a)], "f32"), np.float32(1) / a)
    same(apply("sqrt.rn.f32 {0}, {1};", [("f32", a)], "f32"), np.sqrt(a))
    for kind in ("s32", "u32", "s64", "u64"):
        x, y = random(kind, 1), random(kind, 2) >> np.dtype(NUMPY[kind]).type(20)
        y[y == 0] = 3
        signs = [1 if (p < 0) == (q < 0) else -1 for p, q in zip(x, y)]
        quotient = np.array([sign * (abs(int(p)) // abs(int(q))) for sign, p, q in zip(signs, x, y)], object).astype(x.dtype)
        same(apply(f"div.{kind} {{0}}, {{1}}, {{2}};", [(kind, x), (kind, y)], kind), quotient)
        same(apply(f"rem.{kind} {{0}}, {{1}}, {{2}};", [(kind, x), (kind, y)], kind), x - quotient * y)


@pytest.mark.parametrize("name, function", [("ex2.approx", np.exp2), ("lg2.approx", np.log2), ("tanh.approx", np.tanh),
                                            ("sin.approx", np.sin), ("cos.approx", np.cos), ("rcp.approx", lambda x: 1 / x),
                                            ("rsqrt.approx", lambda x: x ** -0.5), ("sqrt.approx", np.sqrt)])
def test_approximations(name, function):
    x = np.abs(np.random.default_rng(0).standard_normal(256)).astype(np.float32) * 3
    same(apply(f"{name}.f32 {{0}}, {{1}};", [("f32", x)], "f32"), function(x.astype(np.float64)).astype(np.float32))


# --- integers ----------------------------------------------------------------------------------------------------------

def test_wide_and_high_products():
    for kind, wide in (("s32", "s64"), ("u32", "u64"), ("s16", "s32")):
        a, b = random(kind, 1), random(kind, 2)
        product = a.astype(NUMPY[wide]) * b.astype(NUMPY[wide])
        same(apply(f"mul.wide.{kind} {{0}}, {{1}}, {{2}};", [(kind, a), (kind, b)], wide), product)
        sources = [(kind, a), (kind, b), (wide, product)]
        same(apply(f"mad.wide.{kind} {{0}}, {{1}}, {{2}}, {{3}};", sources, wide), 2 * product)
    for kind in ("s32", "u32", "s64", "u64"):
        a, b = random(kind, 1), random(kind, 2)
        bits = 8 * a.itemsize
        high = np.array([int(x) * int(y) >> bits for x, y in zip(a, b)], object).astype(a.dtype)
        same(apply(f"mul.hi.{kind} {{0}}, {{1}}, {{2}};", [(kind, a), (kind, b)], kind), high)


@pytest.mark.parametrize("kind", ["b32", "b64", "b16"])
def test_bits(kind):
    a, b = random(kind, 1), random(kind, 2)
    pair = [(kind, a), (kind, b)]
    same(apply(f"and.{kind} {{0}}, {{1}}, {{2}};", pair, kind), a & b)
    same(apply(f"or.{kind} {{0}}, {{1}}, {{2}};", pair, kind), a | b)
    same(apply(f"xor.{kind} {{0}}, {{1}}, {{2}};", pair, kind), a ^ b)
    same(apply(f"not.{kind} {{0}}, {{1}};", pair[:1], kind), ~a)
    if kind != "b16":
        texts = [format(int(x), f"0{8 * a.itemsize}b") for x in a]
        same(apply(f"brev.{kind} {{0}}, {{1}};", pair[:1], kind), np.array([int(t[::-1], 2) for t in texts], a.dtype))
        same(apply(f"popc.{kind} {{0}}, {{1}};", pair[:1], "u32"), np.array([t.count("1") for t in texts], np.uint32))
        small = a >> (np.arange(256) % (8 * a.itemsize)).astype(a.dtype)
        zeros = np.array([8 * a.itemsize - int(x).bit_length() for x in small], np.uint32)
        same(apply(f"clz.{kind} {{0}}, {{1}};", [(kind, small)], "u32"), zeros)


def test_shifts_go_beyond_the_width():
    amount = np.arange(256, dtype=np.uint32) % 80
    for kind, bits in (("b32", 32), ("u64", 64), ("s32", 32), ("s64", 64)):
        a = random(kind, 1)
        down = np.array([int(x) >> min(int(n), bits) for x, n in zip(a, amount)], object).astype(a.dtype)
        right = "shr." + (kind if kind[0] != "b" else "u32")
        same(apply(f"{right} {{0}}, {{1}}, {{2}};", [(kind, a), ("u32", amount)], kind), down)
        plain = a.view(f"u{a.itemsize}")
        up = np.array([int(x) << int(n) & (1 << bits) - 1 for x, n in zip(plain, amount)], plain.dtype)
        same(apply(f"shl.b{bits} {{0}}, {{1}}, {{2}};", [(kind, a), ("u32", amount)], kind), up.view(a.dtype))
    a, b = random("b32", 1), random("b32", 2)
    joined = [int(y) << 32 | int(x) for x, y in zip(a, b)]
    same(apply("shf.r.wrap.b32 {0}, {1}, {2}, {3};", [("b32", a), ("b32", b), ("u32", amount)], "b32"),
         np.array([j >> int(n) % 32 & 0xFFFFFFFF for j, n in zip(joined, amount)], np.uint32))
    same(apply("shf.l.clamp.b32 {0}, {1}, {2}, {3};", [("b32", a), ("b32", b), ("u32", amount)], "b32"),
         np.array([(j << min(int(n), 32)) >> 32 & 0xFFFFFFFF for j, n in zip(joined, amount)], np.uint32))


def test_fields_of_bits():
    a, b = random("b32", 1), random("b32", 2)
    start, length = (np.random.default_rng(k).integers(0, 32, 256).astype(np.uint32) for k in (3, 4))
    fields = [int(x) >> int(s) & (1 << int(n)) - 1 for x, s, n in zip(a, start, length)]
    numbers = [("u32", start), ("u32", length)]
    same(apply("bfe.u32 {0}, {1}, {2}, {3};", [("u32", a), *numbers], "u32"), np.array(fields, np.uint32))
    signed = []
    for x, s, n in zip(a, start, length):
        bits = [int(x) >> min(int(s) + k, 31) & 1 for k in range(int(n))]
        sign = int(x) >> min(int(s) + int(n) - 1, 31) & 1 if n else 0
        signed.append(sum(bit << k for k, bit in enumerate(bits)) - (sign << int(n)) if n else 0)
    same(apply("bfe.s32 {0}, {1}, {2}, {3};", [("s32", a.view(np.int32)), *numbers], "s32"), np.array(signed, np.int32))
    masks = [((1 << int(n)) - 1 << int(s)) & 0xFFFFFFFF for s, n in zip(start, length)]
    same(apply("bfi.b32 {0}, {1}, {2}, {3}, {4};", [("b32", a), ("b32", b), *numbers], "b32"),
         np.array([int(y) & ~m | int(x) << int(s) & m for x, y, s, m in zip(a, b, start, masks)], np.uint32))
    same(apply("prmt.b32 {0}, {1}, {2}, 29952;", [("b32", a), ("b32", b)], "b32"),       # 0x7500
         a & 0xFF | (a & 0xFF) << 8 | (b >> 8 & 0xFF) << 16 | b >> 24 << 24)
    same(apply("prmt.b32 {0}, {1}, {2}, 65535;", [("b32", a), ("b32", b)], "b32"), (b.view(np.int32) >> 31).view(np.uint32))
    same(apply("lop3.b32 {0}, {1}, {2}, {3}, 202;", [("b32", a), ("b32", b), ("b32", start)], "b32"), a & b | ~a & start)


def test_sums_of_many_words_carry():
    text = kernel("""
mad.wide.u32 %rd2, %r0, 16, %rd0;
mad.wide.u32 %rd3, %r0, 16, %rd1;
ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd3];
add.cc.u32 %r6, %r2, %r4;
addc.u32 %r7, %r3, %r5;
sub.cc.u32 %r8, %r2, %r4;
subc.u32 %r9, %r3, %r5;
st.global.v4.u32 [%rd2], {%r6, %r7, %r8, %r9};""")
    x = random("u64", 1).reshape(-1, 2)
    out = execute(text, 1, len(x), [Garbage(x.shape, np.uint64), x])[0]
    assert (out[:, 0] == x[:, 0] + x[:, 1]).all() and (out[:, 1] == x[:, 0] - x[:, 1]).all()


# --- comparisons and conversions ---------------------------------------------------------------------------------------

ORDERED = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "eq": np.equal, "ge": np.greater_equal,
           "ne": lambda a, b: (a < b) | (a > b)}
UNORDERED = {"ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "equ": lambda a, b: ~((a < b) | (a > b)),
             "neu": np.not_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
             "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b)}


@pytest.mark.parametrize("kind, name, function", [
    *[(kind, *test) for kind in ("f32", "s32", "u32") for test in ORDERED.items()],
    *[("f32", *test) for test in UNORDERED.items()]])
def test_comparisons(kind, name, function):
    a, b = random(kind, 1), random(kind, 2)
    b[::5] = a[::5]
    line = f"{{{{ .reg .pred %q; setp.{name}.{kind} %q, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, %q; }}}}"
    same(apply(line, [(kind, a), (kind, b)], "u32"), function(a, b))


@pytest.mark.parametrize("target", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("rounding, function", [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)])
def test_floats_to_integers_saturate(target, rounding, function):
    info = np.iinfo(NUMPY[target])
    limits = np.array([2.0 ** 31, -2.0 ** 31, 2.0 ** 63, -2.0 ** 63, 2.0 ** 64, 127.5, 255.5, -0.5], np.float32)
    x = np.append(random("f32", 1), limits)
    limited = np.clip(x.astype(np.float64), -2.0 ** 70, 2.0 ** 70)
    expected = [0 if np.isnan(v) else min(max(int(function(v)), info.min), info.max) for v in limited]
    width = {"s16": "s16", "u8": "u16"}.get(target, target)
    got = apply(f"cvt.{rounding}.{target}.f32 {{0}}, {{1}};", [("f32", x)], width)
    same(got, np.array(expected, object).astype(NUMPY[width]))


@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["f32", "f64", "f16"])
def test_integers_to_floats_round_once(source, target):
    x = random(source, 1)
    if target == "f16":
        x >>= x.dtype.type(8 * x.itemsize - 14)                  # within its range
    expected = np.array([round_fraction(Fraction(int(v)), NUMPY[target]) for v in x], NUMPY[target])
    same(apply(f"cvt.rn.{target}.{source} {{0}}, {{1}};", [(source, x)], target), expected)


def test_integers_of_other_widths():
    for source in ("s32", "u32", "s16", "u16", "s64", "u64"):
        for target in ("s32", "u32", "s16", "u16", "s64", "u64"):
            x = random(source, 1)
            same(apply(f"cvt.{target}.{source} {{0}}, {{1}};", [(source, x)], target), x.astype(NUMPY[target]))
    x = random("s32", 1)
    same(apply("cvt.sat.u8.s32 {0}, {1};", [("s32", x >> 20)], "u16"), np.clip(x >> 20, 0, 255).astype(np.uint16))
    x = random("s8", 1)
    same(apply("cvt.s32.s8 {0}, {1};", [("s8", x)], "s32"), x.astype(np.int32))


def test_floats_of_other_widths():
    x = random("f64", 1)
    same(apply("cvt.rn.f32.f64 {0}, {1};", [("f64", x)], "f32"), x.astype(np.float32))
    x = random("f32", 1)
    same(apply("cvt.f64.f32 {0}, {1};", [("f32", x)], "f64"), x.astype(np.float64))
    for kind in ("f16", "bf16"):
        same(apply(f"cvt.rn.{kind}.f32 {{0}}, {{1}};", [("f32", x)], kind), x.astype(NUMPY[kind]))
        narrow = random(kind, 1)
        same(apply(f"cvt.f32.{kind} {{0}}, {{1}};", [(kind, narrow)], "f32"), narrow.astype(np.float32))
    y = random("f32", 2)
    packed = apply("cvt.rn.bf16x2.f32 {0}, {1}, {2};", [("f32", x), ("f32", y)], "b32").view(ml_dtypes.bfloat16)
    same(packed[1::2], x.astype(ml_dtypes.bfloat16))
    same(packed[::2], y.astype(ml_dtypes.bfloat16))
    z = np.array([1.5, 2.5, -0.5, -1.7, np.nan, 1e30], np.float32)
    same(apply("cvt.rni.f32.f32 {0}, {1};", [("f32", z)], "f32"), np.rint(z))
    same(apply("cvt.rmi.f32.f32 {0}, {1};", [("f32", z)], "f32"), np.floor(z))
    bits = np.array([0x3F800FFF, 0x3F801000, 0x3F802FFF, 0x3F803000], np.uint32)
    tf32 = apply("cvt.rna.tf32.f32 {0}, {1};", [("f32", bits.view(np.float32))], "b32")
    same(tf32, np.array([0x3F800000, 0x3F802000, 0x3F802000, 0x3F804000], np.uint32))


def test_a_narrow_value_is_extended_into_a_wide_register():
    x = np.array([-1, 5, -128, 127], np.int8)
    text = kernel("""
cvt.u64.u32 %rd2, %r0;
add.s64 %rd3, %rd1, %rd2;
ld.global.s8 %r2, [%rd3];
ld.global.u8 %r3, [%rd3];
mad.lo.u64 %rd4, %rd2, 8, %rd0;
st.global.v2.b32 [%rd4], {%r2, %r3};""")
    out = execute(text, 1, 4, [Garbage((4, 2), np.int32), x])[0]
    assert (out[:, 0] == x).all() and (out[:, 1] == x.view(np.uint8)).all()
