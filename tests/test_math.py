"""Scalar functions of kernels: accuracy against a wider type, special values, vector code, plain Python = native."""

import math as python_math
import re

import numpy as np
import pytest
from kernel_runner import run_as_python, run_natively

from jitgrad import config
from jitgrad.codegen.native import assembly
from jitgrad.kernels.cpu import math as kernel_math, pieces
from jitgrad.kernels.cpu.tile import vector_unit

RANDOM = np.random.default_rng(0)
SHORT = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f64", np.dtype(np.int64): "i64", np.dtype(np.int32): "i32",
         np.dtype(np.uint8): "u8", np.dtype(np.bool_): "boolean", np.dtype(np.uint32): "u32", np.dtype(np.int8): "i8"}
FLOATS = [np.float32, np.float64]


def kernel(function, kinds, result):
    """The text of a kernel that applies `function` to each element of its operands."""
    count = len(kinds) + 1
    pointers = "".join(f"    x{k} = pointer(args, {k + 1}, {kind})\n" for k, kind in enumerate(kinds))
    values = ", ".join(f"load(x{k}, i, {k}, {count})" for k in range(len(kinds)))
    return (f"def apply_{function}(args, begin, end, thread):\n{pointers}    o = pointer(args, {count}, {result})\n"
            f"    for i in range(begin, end):\n        store(o, i, {function}({values}), {count - 1}, {count})\n")


def apply(function, *operands, execute=run_natively, result=None):
    operands = [np.ascontiguousarray(x) for x in operands]
    out = np.empty(operands[0].shape, result or operands[0].dtype)
    text = kernel(function, [SHORT[x.dtype] for x in operands], SHORT[out.dtype])
    execute(text, f"apply_{function}", [*operands, out], 0, out.size)
    return out


def uniform(low, high, count=4000):
    return RANDOM.uniform(low, high, count)


def spread(low, high, signs=True, count=4000):
    """Magnitudes spread evenly over powers of ten."""
    return np.exp(uniform(np.log(low), np.log(high), count)) * (RANDOM.choice([-1.0, 1.0], count) if signs else 1.0)


def scalars(function):
    return lambda x: np.array([function(float(v)) for v in x], np.longdouble)


# function -> (reference in a wider type, arguments, mean and largest error in units in the last place, f32 then f64)
ACCURACY = {
    "exp": (np.exp, uniform(-86, 86), (0.30, 1.2), (0.30, 1.2)),
    "exp2": (np.exp2, uniform(-120, 120), (0.30, 1.2), (0.30, 1.2)),
    "expm1": (np.expm1, spread(1e-8, 20), (0.30, 1.8), (0.32, 2.0)),
    "log": (np.log, spread(1e-30, 1e30, False), (0.30, 1.2), (0.30, 1.2)),
    "log2": (np.log2, spread(1e-3, 1e3, False), (0.30, 1.0), (0.30, 1.0)),
    "log10": (np.log10, spread(1e-3, 1e3, False), (0.30, 1.0), (0.30, 1.0)),
    "log1p": (np.log1p, spread(1e-8, 0.99), (0.30, 1.0), (0.30, 1.2)),
    "sqrt": (np.sqrt, spread(1e-30, 1e30, False), (0.26, 0.51), (0.26, 0.51)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), spread(1e-30, 1e30, False), (0.38, 1.6), (0.38, 1.6)),
    "sin": (np.sin, spread(1e-5, 1e37), (0.27, 0.6), (0.28, 1.2)),
    "cos": (np.cos, spread(1e-5, 1e37), (0.27, 0.6), (0.28, 1.2)),
    "tan": (np.tan, spread(1e-5, 1e37), (0.27, 0.6), (0.28, 1.3)),
    "asin": (np.arcsin, uniform(-1, 1), (0.27, 0.6), (0.38, 2.5)),
    "acos": (np.arccos, uniform(-1, 1), (0.27, 0.6), (0.32, 1.5)),
    "atan": (np.arctan, spread(1e-4, 1e4), (0.27, 0.6), (0.30, 2.0)),
    "sinh": (np.sinh, spread(1e-4, 50), (0.27, 0.6), (0.32, 1.8)),
    "cosh": (np.cosh, uniform(-50, 50), (0.27, 0.6), (0.34, 1.8)),
    "tanh": (np.tanh, spread(1e-3, 10), (0.30, 1.6), (0.30, 1.6)),
    "asinh": (np.arcsinh, spread(1e-4, 1e10), (0.27, 0.6), (0.36, 1.8)),
    "acosh": (np.arccosh, 1 + spread(1e-6, 1e10, False), (0.27, 0.6), (0.36, 2.2)),
    "atanh": (np.arctanh, uniform(-0.9999, 0.9999), (0.27, 0.6), (0.34, 1.8)),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), uniform(-30, 30), (0.42, 2.6), (0.55, 2.6)),
    "erf": (scalars(python_math.erf), spread(1e-3, 6), (0.30, 1.2), (0.40, 2.5)),
    "erfc": (scalars(python_math.erfc), uniform(-3, 9), (0.30, 0.6), (0.50, 3.5)),
    "lgamma": (scalars(python_math.lgamma), uniform(3, 200), (0.30, 0.6), (0.90, 6.0)),
    "exp_of_score": (np.exp, uniform(-87, 87), (0.30, 1.2), (0.30, 1.2)),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy(name, dtype):
    reference, arguments, *limits = ACCURACY[name]
    x = arguments.astype(dtype)
    exact = reference(x.astype(np.float64 if dtype is np.float32 else np.longdouble))
    unit = np.spacing(np.abs(exact).astype(dtype)).astype(exact.dtype)
    error = np.abs(apply(name, x) - exact) / unit
    mean, largest = limits[FLOATS.index(dtype)]
    assert error.mean() < mean
    assert error.max() < largest


def same_values(got, expected, tolerance=1e-6):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=0)
    zero = expected == 0
    np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(expected[zero]))


NUMPY_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh",
               "atanh": "arctanh", "abs": "absolute", "round": "rint"}
LIKE_NUMPY = ["exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin", "cos", "tan", "asin", "acos",
              "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "abs", "sign", "floor", "ceil", "round",
              "trunc", "reciprocal"]


def special(dtype):
    info = np.finfo(dtype)
    magnitudes = [0.0, info.smallest_subnormal, info.smallest_normal / 4, info.smallest_normal, 0.5, 1.0, 1.5, 2.5,
                  88.0, 89.5, 104.5, 709.9, 746.0, 1e6, info.max, np.inf]
    return np.array([s * m for m in magnitudes for s in (1, -1)] + [np.nan]).astype(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", LIKE_NUMPY)
def test_special_values_are_those_of_numpy(name, dtype):
    x = special(dtype)
    with np.errstate(all="ignore"):
        expected = getattr(np, NUMPY_NAMES.get(name, name))(x.astype(np.longdouble)).astype(dtype)
    same_values(apply(name, x), expected)


TWO_OPERANDS = ["maximum", "minimum", "copysign", "atan2", "pow", "fmod", "remainder", "floor_divide"]


@pytest.mark.parametrize("name", TWO_OPERANDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_two_operands_are_those_of_numpy(name, dtype):
    some = [0.0, 0.3, 1.0, 2.0, 3.0, 7.5, 1e10, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal, np.inf]
    values = np.array([s * v for v in some for s in (1, -1)] + [np.nan]).astype(dtype)
    x, y = (a.ravel() for a in np.meshgrid(values, values))
    x, y = np.concatenate([x, spread(1e-3, 1e3).astype(dtype)]), np.concatenate([y, spread(1e-2, 10).astype(dtype)])
    with np.errstate(all="ignore"):
        if name in ("atan2", "pow"):
            wide = {"atan2": np.arctan2, "pow": np.power}[name](x.astype(np.longdouble), y.astype(np.longdouble))
            expected = wide.astype(dtype)
        else:
            expected = getattr(np, name)(x, y)
    got = apply(name, x, y)
    if name in ("maximum", "minimum"):
        np.testing.assert_array_equal(got, expected)
    else:
        same_values(got, expected, 2e-7 if dtype is np.float32 else 1e-15)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int8, np.uint8])
@pytest.mark.parametrize("name", ["floor_divide", "remainder", "fmod", "shift_left", "shift_right", "maximum", "pow"])
def test_integers(name, dtype):
    info = np.iinfo(dtype)
    values = np.array([0, 1, 2, 3, 7, 31, 100, info.min, info.max, info.max - 1] +
                      ([-1, -2, -3, -7] if info.min else []), dtype)
    x, y = (a.ravel() for a in np.meshgrid(values, values))
    if name == "pow":
        x, y = x[y >= 0], y[y >= 0]
    with np.errstate(all="ignore"):
        renamed = {"shift_left": "left_shift", "shift_right": "right_shift", "pow": "power"}
        expected = getattr(np, renamed.get(name, name))(x, y)
    np.testing.assert_array_equal(apply(name, x, y), expected)
    np.testing.assert_array_equal(apply(name, x, y, execute=run_as_python), expected)


def test_negative_integer_powers_are_truncated():
    x, y = np.array([2, 1, -1, -1, 3]), np.array([-1, -5, -2, -3, -2])
    np.testing.assert_array_equal(apply("pow", x, y), [0, 1, 1, -1, 0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_predicates(dtype):
    x = special(dtype)
    for name in ("isnan", "isinf", "isfinite"):
        np.testing.assert_array_equal(apply(name, x, result=np.bool_), getattr(np, name)(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_functions_at_special_values(dtype):
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan], dtype)
    same_values(apply("erf", x), np.array([0, -0.0, 1, -1, np.nan]))
    same_values(apply("erfc", x), np.array([1, 1, 0, 2, np.nan]))
    same_values(apply("sigmoid", x), np.array([0.5, 0.5, 1, 0, np.nan]))
    same_values(apply("erfinv", np.array([0, 1, -1, 1.5, np.nan], dtype)),
                np.array([0, np.inf, -np.inf, np.nan, np.nan]))
    same_values(apply("relu", x), np.array([0, 0, np.inf, 0, np.nan]))
    same_values(apply("lgamma", np.array([0, -1, -2.5, 1, 2, np.inf], dtype)),
                np.array([np.inf, np.inf, -0.056243716497674054, 0, 0, np.inf]))
    same_values(apply("digamma", np.array([0, -0.0, -1, 1, np.inf, -0.5], dtype)),
                np.array([-np.inf, np.inf, np.nan, -0.5772156649015329, np.inf, 0.03648997397857652]))


def test_inverse_and_recurrence():
    x = uniform(-0.999, 0.999)
    np.testing.assert_allclose(apply("erf", apply("erfinv", x)), x, rtol=4e-15)
    t = uniform(0.1, 30)
    np.testing.assert_allclose(apply("digamma", t + 1) - apply("digamma", t), 1 / t, rtol=2e-12)


@pytest.mark.parametrize("n", [1, 2, 11])
def test_polygamma(n):
    text = kernel("polygamma", ["{0}"], "{0}").replace("load(x0, i, 0, 2)", f"load(x0, i, 0, 2), i64({n})")
    for dtype, limit in ((np.float64, 3e-16 * (n + 8)), (np.float32, 1e-7)):
        x = np.concatenate([uniform(0.05, 60, 500), -uniform(0.05, 0.95, 9), [np.inf, np.nan]]).astype(dtype)
        expected = zeta_by_sums(n, x)
        for execute in (run_natively, run_as_python):
            k = None if execute is run_natively else 12
            out = np.empty_like(x[::k])
            execute(text.format(SHORT[x.dtype]), "apply_polygamma", [x[::k].copy(), out], 0, out.size)
            np.testing.assert_allclose(out, expected[::k].astype(dtype), rtol=limit)


def zeta_by_sums(n, x):
    """polygamma by 2,000 terms and what is left of the integral behind them (NIST DLMF 25.11.5, to 3 terms)."""
    wide = x.astype(np.longdouble)
    y = np.where(wide < 0, 1 - wide, wide)
    with np.errstate(all="ignore"):
        total = sum((y + k) ** -(n + np.longdouble(1)) for k in range(2000))
        z = y + 2000
        total += z ** -n / np.longdouble(n) + z ** -(n + 1) / 2 + (n + 1) * z ** -(n + 2) / 12
        factorial = np.prod(np.arange(1, n + 1).astype(np.longdouble))
        positive = (-1) ** (n + 1) * factorial * total
        return np.where(wide < 0, (np.pi / np.sin(np.pi * wide)) ** 2 - total if n == 1 else np.nan, positive)


FLOAT_FUNCTIONS = sorted(set(ACCURACY) | set(LIKE_NUMPY) | {"erfinv", "digamma", "relu"})


@pytest.mark.parametrize("name", FLOAT_FUNCTIONS)
def test_plain_python_agrees(name):
    for dtype in FLOATS:
        x = np.array([0.3, 0.9, 0.04, 1.7, 20.0]).astype(dtype)
        got = apply(name, x, execute=run_as_python)
        np.testing.assert_allclose(got, apply(name, x), rtol=8 * np.finfo(dtype).eps)


VECTORIZED = ["exp", "exp2", "exp_of_score", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "sin", "cos", "sqrt", "relu",
              "floor", "round", "sinh", "atan", "erfc", "erfinv", "digamma", "lgamma"]


@pytest.mark.parametrize("name", VECTORIZED)
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_vector_code(name, kind):
    features = config.processor().features
    if "sse2" in features and "sse4.1" not in features:
        pytest.skip("SSE2 has no instruction that rounds to whole numbers: the C library does it")
    text = assembly(kernel(name, [kind], kind), name)
    assert "call" not in text
    assert {512: "zmm", 256: "ymm", 128: "mm"}[vector_unit()[0]] in text


@pytest.mark.parametrize(("by_pieces", "reference"), [(pieces.erf_by_pieces, python_math.erf),
                                                      (pieces.tanh_by_pieces, python_math.tanh)], ids=["erf", "tanh"])
def test_pieces_as_plain_python(by_pieces, reference):
    """What processors with AVX-512 compute, and others do not."""
    x = np.concatenate([spread(1e-3, 12, count=1500), uniform(-5, 5, 1500)]).astype(np.float32)
    exact = scalars(reference)(x)
    error = np.abs([by_pieces(v) for v in x] - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert error.mean() < 0.35
    assert error.max() < 1.6
    for value, wanted in ((np.inf, 1), (-np.inf, -1), (np.nan, np.nan), (0.0, 0.0), (-0.0, -0.0), (1e30, 1), (1e-42, None)):
        y = by_pieces(np.float32(value))
        same_values(np.array([y]), np.array([np.float32(reference(value)) if wanted is None else wanted]), 1e-3)


@pytest.mark.parametrize("name", ["erf", "tanh"])
def test_pieces_are_picked_by_one_instruction(name):
    if "avx512f" not in config.processor().features:
        pytest.skip("a processor with AVX-512")
    text = assembly(kernel(name, ["f32"], "f32"), name)
    assert re.search(r"vperm(d|ps)\s.*zmm", text)
    assert "gather" not in text and "call" not in text


@pytest.mark.parametrize("name", ["erf", "tanh", "exp", "sigmoid"])
def test_a_result_does_not_depend_on_its_place(name):
    """The last elements of an array are computed one by one, or by shorter vectors."""
    x = spread(1e-3, 12, count=77).astype(np.float32)
    whole = apply(name, x)
    for count in (1, 3, 4, 7, 15, 17, 30, 63):
        np.testing.assert_array_equal(apply(name, x[:count]), whole[:count])


def test_every_op_spelled_by_a_function_has_it():
    from jitgrad.ir import REGISTRY
    spelled = {op.spell for op in REGISTRY.values() if op.kind == "elementwise" and (op.spell or "").isidentifier()}
    assert spelled - {"complex", "conj", "real", "imag"} <= set(kernel_math.NAMES)
