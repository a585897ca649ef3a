"""THE table of samples: for every primitive, operands and attributes that all op tests run on.

`SAMPLES[name]` is a list of `Sample`. An elementwise op needs one row (`Elementwise`): where its operands lie, which
dtypes it takes, what it means in NumPy. From it come 0-d, empty, size-1 and non-contiguous operands, nan and inf, and
all dtypes. Other ops list their samples. `smooth` tells whether derivatives exist and can be compared with differences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jitgrad import dtypes, ops
from jitgrad.ir import REGISTRY, Graph, GraphBuilder, Op, TensorType
from jitgrad.ops.philox import philox_bits

FLOATS = (dtypes.float32, dtypes.float64, dtypes.bfloat16, dtypes.float16)
COMPLEX = (dtypes.complex64, dtypes.complex128)
INTEGERS = (dtypes.int64, dtypes.int32, dtypes.int16, dtypes.int8, dtypes.uint8)
BOOL = (dtypes.bool_,)
OF_CATEGORY = {"f": FLOATS, "c": COMPLEX, "i": INTEGERS, "b": BOOL}


@dataclass(frozen=True)
class Sample:
    """One application of an op to arrays. `reference` says what comes out, independently of the op: a function of the
    operands in float64 (complex128, int64, bool); an entry None in a tuple says nothing about that output."""

    name: str
    inputs: tuple[np.ndarray, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True
    reference: Callable[..., Any] | None = None

    @property
    def op(self) -> Op:
        return REGISTRY[self.name]

    @property
    def types(self) -> tuple[TensorType, ...]:
        return tuple(TensorType(dtypes.from_numpy(x.dtype), x.shape) for x in self.inputs)

    def graph(self, inputs: Iterable[np.ndarray] | None = None) -> Graph:
        """The op alone as a graph, for operands like these (or like `inputs`)."""
        builder = GraphBuilder(self.name)
        arrays = self.inputs if inputs is None else inputs
        values = [builder.input(TensorType(dtypes.from_numpy(x.dtype), x.shape)) for x in arrays]
        with builder:
            result = self.op(*values, **self.attrs)
        return builder.build(result if isinstance(result, tuple) else [result])

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.types))
        attrs = ", ".join(f"{k}={v}" for k, v in self.attrs.items() if not isinstance(v, Graph))
        return f"{self.name}({shown}{'; ' if attrs else ''}{attrs})"


# ---- operands --------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: dtypes.DType = dtypes.float32, low: float = -2.0, high: float = 2.0,
           seed: int = 0) -> np.ndarray:
    """Uniform in [low, high) for floats and both parts of complex numbers; whole numbers for integers."""
    generator = np.random.default_rng([seed, *shape])
    if dtype.category == "b":
        return generator.random(shape) < 0.5
    if dtype.is_integer:
        least = max(math.ceil(low), 0) if dtype.category == "u" else math.ceil(low)
        return generator.integers(least, max(least + 1, math.ceil(high)), shape).astype(dtype.numpy)
    x = generator.uniform(low, high, shape)
    return np.asarray(x + 1j * generator.uniform(low, high, shape) if dtype.is_complex else x).astype(dtype.numpy)


def whole(*values: Any) -> np.ndarray:
    """i64 operand."""
    return np.array(values[0] if len(values) == 1 else values, np.int64)


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 1e-40, 1e30, -3.7], np.float32)

# ---- elementwise rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elementwise:
    """low and high: where operands lie. categories: dtypes that the op takes. reference: what it means in NumPy,
    evaluated in float64 (complex128, int64)."""

    reference: Callable[..., Any] | None
    low: float = -2.0
    high: float = 2.0
    categories: str = "f"
    special: bool = True
    attrs: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True

    def samples(self, name: str) -> Iterator[Sample]:
        count = len(REGISTRY[name].operands)
        for category in self.categories:
            for dtype in OF_CATEGORY[category]:
                yield self._sample(name, [self._operand(dtype, k, 2, 3) for k in range(count)])
        first = OF_CATEGORY[self.categories[0]][0]
        for shape in ((), (0, 3), (1,), (1, 4, 1)):
            yield self._sample(name, [self._operand(first, k, *shape) for k in range(count)])
        yield self._sample(name, [self._operand(first, k, 6, 4).T[::2, ::-1] for k in range(count)])
        if self.special and "f" in self.categories:
            grid = np.meshgrid(*[SPECIAL] * count)
            yield self._sample(name, [np.ascontiguousarray(x.reshape(-1)) for x in grid], smooth=False)

    def _operand(self, dtype: dtypes.DType, k: int, *shape: int) -> np.ndarray:
        return random(*shape, dtype=dtype, low=self.low, high=self.high, seed=k)

    def _sample(self, name: str, inputs: list[np.ndarray], smooth: bool = True) -> Sample:
        return Sample(name, tuple(inputs), self.attrs, smooth and self.smooth, self.reference)


def _each(function: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of Python's math module on every element; nan where it raises."""

    def one(x: float) -> float:
        try:
            return function(x)
        except (ValueError, OverflowError):
            return math.inf

    return np.vectorize(one, otypes=[np.float64])


ELEMENTWISE: dict[str, Elementwise] = {
    "neg": Elementwise(lambda x: -x, categories="fci"),
    "abs": Elementwise(np.abs, categories="fci"),
    "sign": Elementwise(np.sign, categories="fi"),
    "floor": Elementwise(np.floor, categories="fi"),
    "ceil": Elementwise(np.ceil, categories="fi"),
    "round": Elementwise(np.rint, categories="fi"),
    "trunc": Elementwise(np.trunc, categories="fi"),
    "exp": Elementwise(np.exp, categories="fc"),
    "exp2": Elementwise(np.exp2),
    "expm1": Elementwise(np.expm1, categories="fc"),
    "log": Elementwise(np.log, 0.1, 4, categories="fc"),
    "log2": Elementwise(np.log2, 0.1, 4),
    "log10": Elementwise(np.log10, 0.1, 4),
    "log1p": Elementwise(np.log1p, -0.8, 4, categories="fc"),
    "sqrt": Elementwise(np.sqrt, 0.2, 4, categories="fc"),
    "rsqrt": Elementwise(lambda x: 1 / np.sqrt(x), 0.2, 4, categories="fc"),
    "reciprocal": Elementwise(lambda x: 1 / x, 0.3, 2, categories="fc"),
    "sin": Elementwise(np.sin, categories="fc"),
    "cos": Elementwise(np.cos, categories="fc"),
    "tan": Elementwise(np.tan, -1, 1, categories="fc"),
    "asin": Elementwise(np.arcsin, -0.9, 0.9, categories="fc"),
    "acos": Elementwise(np.arccos, -0.9, 0.9, categories="fc"),
    "atan": Elementwise(np.arctan, -0.8, 0.8, categories="fc"),
    "sinh": Elementwise(np.sinh, categories="fc"),
    "cosh": Elementwise(np.cosh, categories="fc"),
    "tanh": Elementwise(np.tanh, -1, 1, categories="fc"),
    "asinh": Elementwise(np.arcsinh, -0.8, 0.8, categories="fc"),
    "acosh": Elementwise(np.arccosh, 1.2, 4, categories="fc"),
    "atanh": Elementwise(np.arctanh, -0.9, 0.9, categories="fc"),
    "sigmoid": Elementwise(lambda x: 1 / (1 + np.exp(-x)), categories="fc"),
    "relu": Elementwise(lambda x: np.maximum(x, 0), categories="fi"),
    "erf": Elementwise(_each(math.erf)),
    "erfc": Elementwise(_each(math.erfc)),
    "erfinv": Elementwise(None, -0.95, 0.95),
    "lgamma": Elementwise(_each(math.lgamma), 0.2, 5, special=False),
    "digamma": Elementwise(None, 0.2, 5),
    "polygamma": Elementwise(None, 0.5, 5, attrs={"n": 2}),
    "conj": Elementwise(np.conjugate, categories="c"),
    "real": Elementwise(np.real, categories="c"),
    "imag": Elementwise(np.imag, categories="c"),
    "isnan": Elementwise(np.isnan, categories="fc"),
    "isinf": Elementwise(np.isinf, categories="fc"),
    "isfinite": Elementwise(np.isfinite, categories="fc"),
    "logical_not": Elementwise(np.logical_not, categories="b"),
    "bitwise_not": Elementwise(lambda x: ~x, categories="ib", smooth=False),
    "add": Elementwise(lambda x, y: x + y, categories="fcib"),
    "sub": Elementwise(lambda x, y: x - y, categories="fci"),
    "mul": Elementwise(lambda x, y: x * y, categories="fcib"),
    "div": Elementwise(lambda x, y: x / y, 0.3, 2, categories="fc"),
    "floor_divide": Elementwise(lambda x, y: x // y, 1, 9, categories="fi"),
    "remainder": Elementwise(np.remainder, 1, 9, categories="fi"),
    "fmod": Elementwise(np.fmod, 1, 9, categories="fi"),
    "pow": Elementwise(np.power, 0.3, 3, categories="fc"),
    "maximum": Elementwise(np.maximum, categories="fib"),
    "minimum": Elementwise(np.minimum, categories="fib"),
    "atan2": Elementwise(np.arctan2),
    "copysign": Elementwise(np.copysign),
    "bitwise_and": Elementwise(np.bitwise_and, categories="ib"),
    "bitwise_or": Elementwise(np.bitwise_or, categories="ib"),
    "bitwise_xor": Elementwise(np.bitwise_xor, categories="ib"),
    "shift_left": Elementwise(np.left_shift, 0, 5, categories="i"),
    "shift_right": Elementwise(np.right_shift, 0, 5, categories="i"),
    "eq": Elementwise(lambda x, y: x == y, categories="fcib"),
    "ne": Elementwise(lambda x, y: x != y, categories="fcib"),
    "lt": Elementwise(lambda x, y: x < y, categories="fib"),
    "le": Elementwise(lambda x, y: x <= y, categories="fib"),
    "gt": Elementwise(lambda x, y: x > y, categories="fib"),
    "ge": Elementwise(lambda x, y: x >= y, categories="fib"),
}

# ---- all other ops ---------------------------------------------------------------------------------------------


def _where_samples() -> Iterator[Sample]:
    for dtype in (*FLOATS, *COMPLEX, *INTEGERS, *BOOL):
        yield Sample("where", (random(2, 3) > 0, random(2, 3, dtype=dtype), random(2, 3, dtype=dtype, seed=1)),
                     reference=np.where)
    for shape in ((), (0,), (1, 1)):
        yield Sample("where", (random(*shape) > 0, random(*shape), random(*shape, seed=1)), reference=np.where)
    yield Sample("where", (SPECIAL > 0, SPECIAL, SPECIAL[::-1]), smooth=False, reference=np.where)


def _integer_power_samples() -> Iterator[Sample]:
    for dtype in FLOATS:
        yield Sample("integer_power", (random(2, 3, dtype=dtype, low=0.5, high=2), np.array([[-3, 0, 1], [2, 5, 11]])),
                     reference=np.power)
    for shape in ((), (0, 3), (1,)):
        yield Sample("integer_power", (random(*shape), np.full(shape, 3)), reference=np.power)
    x, n = (a.ravel() for a in np.meshgrid(SPECIAL, [-1001, -2, -1, 0, 1, 2, 3, 64]))
    yield Sample("integer_power", (x, n), smooth=False, reference=np.power)


def _complex_samples() -> Iterator[Sample]:
    for dtype, shape in ((dtypes.float32, (2, 3)), (dtypes.float64, (2, 3)), (dtypes.float32, ()),
                         (dtypes.float32, (0, 1))):
        yield Sample("complex", (random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)),
                     reference=lambda x, y: x + 1j * y)


def _cast_samples() -> Iterator[Sample]:
    for source in (*FLOATS, *INTEGERS, *BOOL, *COMPLEX):
        for target in (*FLOATS, *INTEGERS, *BOOL, *COMPLEX):
            exact = source in (dtypes.float64, dtypes.complex128) and target in (dtypes.float64, dtypes.complex128)
            yield Sample("cast", (random(2, 3, dtype=source, low=1, high=3),), {"dtype": target}, smooth=exact)
    yield Sample("cast", (random(dtype=dtypes.float64),), {"dtype": dtypes.float64})
    yield Sample("cast", (random(0, 2),), {"dtype": dtypes.int64})
    yield Sample("cast", (np.array([0.0, -0.0, np.nan, np.inf], np.float32),), {"dtype": dtypes.bool_}, smooth=False,
                 reference=lambda x: x != 0)


def _source_samples() -> Iterator[Sample]:
    for value, dtype in ((1.5, dtypes.float32), (math.nan, dtypes.float64), (-math.inf, dtypes.bfloat16),
                         (2, dtypes.int64), (True, dtypes.bool_), (1 + 2j, dtypes.complex64)):
        yield Sample("constant", (), {"value": value, "dtype": dtype}, reference=lambda value=value: np.array(value))
    for shape, axis in (((4,), 0), ((2, 3), 1), ((2, 3), 0), ((0, 2), 0), ((2, 0), 0)):
        for dtype in (dtypes.int64, dtypes.float32, dtypes.bfloat16):
            yield Sample("iota", (), {"shape": shape, "axis": axis, "dtype": dtype},
                         reference=lambda shape=shape, axis=axis: np.indices(shape)[axis])
    for shape in ((), (0,), (5,), (3, 4)):
        yield Sample("random_bits", (np.array(7), np.array(2 ** 40 + 3)), {"shape": shape})


def _movement_samples() -> Iterator[Sample]:
    for x in (random(2, 3), random(2, 3, dtype=dtypes.bfloat16), random(2, 3, dtype=dtypes.complex64),
              random(2, 3, dtype=dtypes.int32), random(2, 3, dtype=dtypes.bool_), random(6, 2).T[:, ::2]):
        yield Sample("reshape", (x,), {"shape": (3, 1, 2)}, reference=lambda x: np.reshape(x, (3, 1, 2)))
        yield Sample("permute", (x,), {"axes": (1, 0)}, reference=np.transpose)
        yield Sample("barrier", (x, random(2)), reference=lambda x, after: x)
        yield Sample("broadcast_to", (x[:1],), {"shape": (4, 3)}, reference=lambda x: np.broadcast_to(x, (4, 3)))
        yield Sample("slice", (x,), {"start": (0, 1), "stop": (2, 3), "step": (1, 1)}, reference=lambda x: x[:, 1:])
        yield Sample("slice", (x,), {"start": (0, 0), "stop": (2, 3), "step": (1, 2)}, reference=lambda x: x[:, ::2])
        yield Sample("flip", (x,), {"axes": (0, 1)}, reference=lambda x: x[::-1, ::-1])
        yield Sample("pad", (x,), {"low": (1, 0), "high": (0, 2)},
                     reference=lambda x: np.pad(x, ((1, 0), (0, 2))))
        yield Sample("concat", (x, x[:1]), {"axis": 0}, reference=lambda *xs: np.concatenate(xs, 0))
        yield Sample("slice_update", (x, x[:1, :2]), {"start": (1, 0), "step": (1, 2)},
                     reference=lambda x, u: np.concatenate(
                         [x[:1], np.stack([u[:, 0], x[1:, 1], u[:, 1]], 1)]))
    yield Sample("reshape", (random(),), {"shape": (1, 1)}, reference=lambda x: np.reshape(x, (1, 1)))
    yield Sample("reshape", (random(0, 3),), {"shape": (3, 0, 2)}, reference=lambda x: np.reshape(x, (3, 0, 2)))
    yield Sample("permute", (random(),), {"axes": ()}, reference=lambda x: x)
    yield Sample("permute", (random(2, 0, 3),), {"axes": (2, 0, 1)}, reference=lambda x: np.transpose(x, (2, 0, 1)))
    yield Sample("broadcast_to", (random(1, 2),), {"shape": (0, 2)}, reference=lambda x: np.broadcast_to(x, (0, 2)))
    yield Sample("broadcast_to", (random(1, 1),), {"shape": (1, 5)}, reference=lambda x: np.broadcast_to(x, (1, 5)))
    yield Sample("slice", (random(4),), {"start": (2,), "stop": (2,), "step": (1,)}, reference=lambda x: x[2:2])
    yield Sample("flip", (random(1, 3),), {"axes": ()}, reference=lambda x: x)
    yield Sample("pad", (random(0, 2),), {"low": (1, 0), "high": (1, 0)}, reference=lambda x: np.zeros((2, 2)))
    yield Sample("concat", (random(2, 0), random(2, 3), random(2, 1)), {"axis": 1},
                 reference=lambda *xs: np.concatenate(xs, 1))
    yield Sample("slice_update", (random(4), random(0)), {"start": (1,), "step": (1,)}, reference=lambda x, u: x)


def _reduction_samples() -> Iterator[Sample]:
    references = {"sum": np.sum, "prod": np.prod, "max": np.max, "min": np.min}
    for name, reference in references.items():
        category = "buif" if name in ("max", "min") else "buifc"
        taken = [d for d in (*FLOATS, *COMPLEX, *INTEGERS, *BOOL) if d.category in category]
        for dtype in taken:
            yield _reduced(name, reference, random(2, 3, 4, dtype=dtype), (0, 2))
        for x, axes in ((random(3, 4), (0,)), (random(3, 4), (1,)), (random(3, 4), ()), (random(), ()),
                        (random(1, 5), (0,)), (random(6, 8).T[::2], (1,)), (random(0, 3), (1,))):
            yield _reduced(name, reference, x, axes)
        yield _reduced(name, reference, SPECIAL.reshape(1, -1), (1,), smooth=False)
    for name in ("sum", "prod"):
        yield _reduced(name, references[name], random(0, 3), (0,))
        yield _reduced(name, references[name], random(2000, dtype=dtypes.bfloat16, low=0.99, high=1.0), (0,))
    yield _reduced("prod", np.prod, np.array([[2.0, 0.0, 3.0], [0.0, 0.0, 1.0]]), (1,))
    for name, reference in (("argmax", np.argmax), ("argmin", np.argmin)):
        for x in (random(3, 4), random(3, 4, dtype=dtypes.int32), random(3, 4, dtype=dtypes.bool_), random(3, 1),
                  random(3, 4, dtype=dtypes.bfloat16), random(8, 6).T[::2], SPECIAL.reshape(1, -1)):
            yield Sample(name, (x,), {"axis": 1}, reference=lambda x, f=reference: f(x, 1))
        yield Sample(name, (random(2, 0, 3),), {"axis": 0}, reference=lambda x, f=reference: f(x, 0))


def _reduced(name: str, reference: Any, x: np.ndarray, axes: tuple[int, ...], smooth: bool = True) -> Sample:
    return Sample(name, (x,), {"axes": axes}, smooth, lambda x: reference(x, axis=axes))


def _scan_samples() -> Iterator[Sample]:
    for name, reference in (("cumsum", np.cumsum), ("cumprod", np.cumprod)):
        for dtype in (*FLOATS, *COMPLEX, *INTEGERS):
            yield Sample(name, (random(3, 4, dtype=dtype),), {"axis": 1}, reference=lambda x, f=reference: f(x, 1))
        for x in (random(1, 3), random(0, 3), random(6, 4).T[:, ::-1]):
            yield Sample(name, (x,), {"axis": 0}, reference=lambda x, f=reference: f(x, 0))
        yield Sample(name, (SPECIAL,), {"axis": 0}, False, lambda x, f=reference: f(x, 0))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _recurrence_reference(kind: str, relu: bool) -> Callable[..., Any]:
    """One sequence, step and unit at a time, from the formulas in PyTorch's documentation."""

    def reference(gates: np.ndarray, w: np.ndarray, *others: np.ndarray) -> Any:
        bias, h, c = (others[0], others[1], None) if kind == "gru" else (None, others[0], others[-1])
        hs, cs = [], []
        for x in gates:
            products = np.einsum("bh,gh->bg", h, w)
            if kind == "rnn":
                h = np.maximum(x + products, 0) if relu else np.tanh(x + products)
            elif kind == "lstm":
                i, f, g, o = np.split(x + products, 4, axis=1)
                c = _logistic(f) * c + _logistic(i) * np.tanh(g)
                h = _logistic(o) * np.tanh(c)
            else:
                (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(x, 3, axis=1), np.split(products + bias, 3, axis=1)
                z = _logistic(x_z + h_z)
                h = (1 - z) * np.tanh(x_n + _logistic(x_r + h_r) * h_n) + z * h
            hs.append(h)
            cs.append(c)
        stacked = np.array(hs).reshape(len(gates), *others[-1].shape)
        return stacked if kind == "rnn" else (stacked, np.array(cs).reshape(stacked.shape), None) if kind == "lstm" \
            else (stacked, None)

    return reference


def _recurrence_samples() -> Iterator[Sample]:
    """What is kept for the gradient is no result of its own, so only rnn is compared with differences here; see
    test_recurrent.py for the others."""
    sizes = [(3, 2, 5), (1, 9, 3), (4, 17, 8), (2, 1, 1), (0, 2, 3), (2, 0, 3)]
    for dtype in (dtypes.float32, dtypes.float64, dtypes.bfloat16):
        for t, b, h in sizes if dtype is dtypes.float32 else sizes[:1]:
            for kind, g, relu in (("rnn", 1, False), ("rnn", 1, True), ("lstm", 4, False), ("gru", 3, False)):
                attrs = {"relu": relu} if kind == "rnn" else {}
                states = [random(b, h, dtype=dtype, seed=3), random(b, h, dtype=dtype, seed=4)][:2 if kind == "lstm" else 1]
                xs = [random(t, b, g * h, dtype=dtype), random(g * h, h, dtype=dtype, seed=1, low=-0.4, high=0.4),
                      *([random(g * h, dtype=dtype, seed=2)] if kind == "gru" else []), *states]
                made = REGISTRY[kind].eager(*xs, **attrs)
                kept = made if isinstance(made, tuple) else (made,)
                incoming = [random(t, b, h, dtype=dtype, seed=5 + k) for k in range(2 if kind == "lstm" else 1)]
                yield Sample(kind, tuple(xs), attrs, kind == "rnn" and not relu, _recurrence_reference(kind, relu))
                yield Sample(f"{kind}_grad", (*incoming, *xs, *kept), attrs, False)


def _attention_reference(causal: bool, zero: bool) -> Callable[..., Any]:
    """One query at a time."""

    def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: np.ndarray) -> Any:
        mask, draw = rest[0] if len(rest) % 4 else None, rest[-4:] if len(rest) >= 4 else ()
        factors = np.ones((*q.shape[:2], k.shape[1]))
        if draw:
            unit = (philox_bits(int(draw[0]), int(draw[1]), factors.shape) >> 8) / 2.0 ** 24
            factors = np.where(unit >= draw[2], draw[3].astype(float), 0.0)
        out, total = np.zeros((*q.shape[:2], v.shape[2])), np.zeros(q.shape[:2])
        for n, i in np.ndindex(*q.shape[:2]):
            group = n // (len(q) // len(k))
            scores = k[group] @ q[n, i]
            if mask is not None:
                period = mask.shape[1] if mask.ndim == 4 else 1
                own = mask.reshape(-1, *mask.shape[-2:])[n // (len(q) // len(mask)) * period + n % period]
                scores = scores + own[min(i, len(own) - 1)]
            if causal:
                scores = np.where(np.arange(len(scores)) <= i, scores, -np.inf)
            top = scores.max(initial=-np.inf)
            weights = np.exp(scores - top) if top > -np.inf else np.zeros_like(scores)
            out[n, i] = (weights * factors[n, i]) @ v[group] / (1.0 if zero and top == -np.inf else weights.sum())
            total[n, i] = np.log(weights.sum()) + (top if top > -np.inf else 0)
        return out, total

    return reference


def _attention_samples() -> Iterator[Sample]:
    """(N, L, G, S, E, V), and the mask's M, perhaps R, and rows: several blocks, heads that share keys, ragged sizes; all
    of them with dropout, too."""
    rows = [((2, 5, 2, 7, 4, 3), None), ((2, 58, 1, 130, 3, 33), None), ((2, 3, 2, 4, 4, 4), (1, 3)),
            ((4, 3, 2, 130, 2, 2), (2, 3)), ((8, 3, 4, 5, 2, 2), (2, 2, 3)), ((6, 2, 6, 5, 2, 2), (1, 3, 1)),
            ((2, 6, 1, 5, 4, 4), (2, 1)), ((1, 1, 1, 1, 1, 1), None),
            ((0, 2, 0, 3, 4, 4), None), ((2, 3, 2, 0, 4, 4), None)]
    for dtype in (dtypes.float32, dtypes.float64, dtypes.bfloat16):
        for (n, length, g, s, e, values), mask in rows if dtype is dtypes.float32 else rows[:1]:
            ways = [(False, False, False), (True, True, True), (True, False, False), (False, True, True)]
            for causal, zero, dropped in ways[:2] if length > 50 else ways:
                xs = [random(n, length, e, dtype=dtype, low=-0.5, high=0.5), random(g, s, e, dtype=dtype, seed=1),
                      random(g, s, values, dtype=dtype, seed=2)]
                if mask is not None:
                    added = random(*mask, s, dtype=dtype, seed=3)
                    added[..., 1::3] = -np.inf
                    added[..., 0, :] = -np.inf if zero else added[..., 0, :]
                    xs.append(added)
                if dropped:
                    p = np.array(0.4, np.float32)
                    scale = np.float32 if dtype.itemsize == 2 else dtype.numpy
                    xs += [np.array(2**40 + 5), np.array(2**33 + 1), p, np.array(1 / (1 - p), scale)]
                attrs = {"causal": causal, "zero": zero}
                made = REGISTRY["attention"].eager(*xs, **attrs)
                yield Sample("attention", tuple(xs), attrs, False, _attention_reference(causal, zero))
                g_out = random(n, length, values, dtype=dtype, seed=4)
                yield Sample("attention_grad", (g_out, *xs, *made), attrs, False)


def _matmul_samples() -> Iterator[Sample]:
    for dtype in (*FLOATS, *COMPLEX, dtypes.int64):
        yield Sample("matmul", (random(3, 4, dtype=dtype), random(4, 2, dtype=dtype)), reference=np.matmul)
    for x, y in ((random(2, 3, 4), random(2, 4, 5)), (random(1, 1), random(1, 1)), (random(3, 0), random(0, 2)),
                 (random(0, 3), random(3, 2)), (random(4, 3).T, random(5, 4).T), (random(0, 2, 3), random(0, 3, 2))):
        yield Sample("matmul", (x, y), reference=np.matmul)
    for dtype in (dtypes.uint8, dtypes.int8, dtypes.int16, dtypes.int32):
        yield Sample("matmul", (random(5, 7, dtype=dtype), random(7, 9, dtype=dtype)))
    for x, y in (((3, 5), (5, 4)), ((2, 3, 9), (2, 9, 40)), ((3, 0), (0, 2)), ((0, 3), (3, 2))):
        yield Sample("int_matmul", (random(*x, dtype=dtypes.int8, low=-128, high=128),
                                    random(*y, dtype=dtypes.int8, low=-128, high=128)), reference=np.matmul)


def _convolution_reference(x: np.ndarray, w: np.ndarray, *, stride: Any, padding: Any, dilation: Any,
                           groups: int) -> np.ndarray:
    """The definition, one output element at a time."""
    out = np.zeros(ops.convolution_output_shape(x.shape, w.shape, stride, padding, dilation), x.dtype)
    padded = np.pad(x, ((0, 0), (0, 0), *padding))
    per_group = w.shape[1]
    for b, c, *place in np.ndindex(*out.shape):
        first = c // (out.shape[1] // groups) * per_group
        window = padded[b, first:first + per_group]
        for axis, (i, s, d, k) in enumerate(zip(place, stride, dilation, w.shape[2:])):
            window = window.take(i * s + d * np.arange(k), axis + 1)
        out[(b, c, *place)] = np.sum(window * w[c])
    return out


def _convolution_samples() -> Iterator[Sample]:
    rows = [((2, 3, 5, 6), (4, 3, 3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
            ((1, 2, 5, 5), (2, 2, 3, 3), (2, 1), ((1, 1), (1, 0)), (1, 1), 1),
            ((2, 4, 6, 5), (4, 2, 2, 2), (1, 2), ((0, 1), (2, 0)), (2, 1), 2),
            ((1, 3, 4, 4), (3, 1, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 3),
            ((2, 3, 4, 4), (5, 3, 1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
            ((0, 1, 3, 3), (1, 1, 2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
            ((2, 4, 7), (6, 2, 3), (2,), ((1, 2),), (2,), 2),
            ((2, 1, 4), (3, 1, 1), (1,), ((0, 0),), (1,), 1),
            ((2, 3, 3, 4, 5), (4, 3, 2, 3, 1), (1, 1, 1), ((0, 0), (1, 0), (0, 0)), (1, 1, 1), 1),
            ((1, 4, 5, 4, 6), (2, 2, 2, 2, 3), (2, 1, 3), ((1, 1), (0, 2), (1, 0)), (2, 1, 1), 2),
            ((1, 2, 3, 3, 3), (4, 1, 3, 3, 3), (1, 1, 1), ((1, 1), (1, 1), (1, 1)), (1, 1, 1), 2),
            ((0, 1, 3, 3, 3), (1, 1, 2, 2, 2), (1, 1, 1), ((0, 0), (0, 0), (0, 0)), (1, 1, 1), 1)]
    for dtype in (dtypes.float32, dtypes.bfloat16, dtypes.float64):
        for x_shape, w_shape, stride, padding, dilation, groups in rows if dtype is dtypes.float32 else rows[1::8]:
            geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            x, w = random(*x_shape, dtype=dtype), random(*w_shape, dtype=dtype, seed=1)
            out_shape = ops.convolution_output_shape(x_shape, w_shape, stride, padding, dilation)
            g = random(*out_shape, dtype=dtype, seed=2)
            yield Sample("convolution", (x, w), geometry,
                         reference=lambda x, w, geometry=geometry: _convolution_reference(x, w, **geometry))
            yield Sample("convolution_input_grad", (g, w), {**geometry, "input_shape": x_shape})
            yield Sample("convolution_weight_grad", (x, g), {**geometry, "weight_shape": w_shape})


def _window_elements(shape: Any, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Iterator[Any]:
    """For every place of the result its window: (place, elements inside of the image, number of elements that count with
    padding), from the definition."""
    for place in np.ndindex(*out):
        taps = [[i * s - low + d * t for t in range(k)]
                for i, s, (low, _), d, k in zip(place, stride, padding, dilation, kernel)]
        inside = [[p for p in line if 0 <= p < n] for line, n in zip(taps, shape)]
        counted = math.prod(sum(p < n + high for p in line) for line, n, (_, high) in zip(taps, shape, padding))
        yield place, list(itertools.product(*inside)), counted


def _max_pool_reference(x: np.ndarray, *, kernel: Any, stride: Any, padding: Any, dilation: Any,
                        ceil_mode: bool) -> tuple[np.ndarray, np.ndarray]:
    types = ops.max_pool.result_types((TensorType(dtypes.float64, x.shape),), {
        "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode})
    values, taps = np.zeros(types[0].shape), np.zeros(types[0].shape, types[1].dtype.numpy)
    for place, elements, _ in _window_elements(x.shape[2:], values.shape[2:], kernel, stride, padding, dilation):
        window = np.stack([x[(..., *e)] for e in elements], -1)
        within = [[(at - i * s + low) // d for at, i, s, (low, _), d in zip(e, place, stride, padding, dilation)]
                  for e in elements]
        numbers = np.array([np.ravel_multi_index(tap, kernel) for tap in within])
        values[(..., *place)], taps[(..., *place)] = window.max(-1), numbers[window.argmax(-1)]
    return values, taps


def _avg_pool_reference(x: np.ndarray, *, kernel: Any, stride: Any, padding: Any, count_include_pad: bool, divisor: int,
                        ceil_mode: bool) -> np.ndarray:
    (type,) = ops.avg_pool.result_types((TensorType(dtypes.float64, x.shape),), {
        "kernel": kernel, "stride": stride, "padding": padding, "count_include_pad": count_include_pad,
        "divisor": divisor, "ceil_mode": ceil_mode})
    result, ones = np.zeros(type.shape), (1,) * len(kernel)
    for place, elements, counted in _window_elements(x.shape[2:], type.shape[2:], kernel, stride, padding, ones):
        total = np.sum([x[(..., *e)] for e in elements], 0)
        result[(..., *place)] = total / (divisor or (counted if count_include_pad else len(elements)))
    return result


def _pooling_samples() -> Iterator[Sample]:
    none, one = ((0, 0), (0, 0)), ((1, 1), (1, 1))
    rows = [((2, 2), (2, 2), none, False), ((3, 2), (2, 1), ((1, 1), (1, 0)), False), ((3, 3), (2, 2), one, True),
            ((2, 2), (3, 3), none, True)]
    for kernel, stride, padding, ceil_mode in rows:
        common = {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}
        for x in (random(2, 3, 6, 7), random(1, 2, 5, 5, dtype=dtypes.bfloat16), random(0, 1, 4, 4)):
            yield from _pooling_rows(x, common)
    others = [(random(2, 3, 9), (3,), (2,), ((1, 0),), False), (random(2, 1, 8), (3,), (2,), ((1, 1),), True),
              (random(2, 2, 4, 5, 6), (2, 2, 2), (2, 2, 2), ((0, 0),) * 3, False),
              (random(1, 2, 5, 4, 7), (3, 2, 3), (1, 2, 2), ((1, 1), (1, 0), (0, 1)), False),
              (random(1, 1, 4, 5, 4, dtype=dtypes.bfloat16), (3, 2, 2), (2, 2, 3), ((1, 1), (1, 0), (0, 1)), True),
              (random(2, 1, 5, 7, 7), (2, 4, 4), (1, 3, 3), ((0, 1), (2, 1), (1, 2)), True),
              (random(0, 1, 4, 4, 4), (2, 2, 2), (2, 2, 2), ((0, 0),) * 3, False)]
    for x, kernel, stride, padding, ceil_mode in others:
        yield from _pooling_rows(x, {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode})
    for x, dilation in ((random(1, 1, 6, 6), (2, 2)), (random(2, 1, 9), (3,)), (random(1, 2, 5, 6, 7), (2, 1, 3))):
        attrs = {"kernel": (2,) * len(dilation), "stride": (1,) * len(dilation), "padding": ((0, 1),) * len(dilation),
                 "dilation": dilation, "ceil_mode": False}
        yield _max_pool_sample(x, attrs)
        values, taps = ops.max_pool.eager(x, **attrs)
        where = {name: attrs[name] for name in attrs if name != "ceil_mode"}
        yield Sample("max_pool_grad", (values, taps), {"input_shape": x.shape, **where})
        yield Sample("max_pool_gather", (x, taps), where)
    x = random(1, 1, 4, 4)
    x[0, 0, 1, 2], x[0, 0, 3] = np.nan, -np.inf
    yield Sample("max_pool", (x,), {"kernel": (2, 2), "stride": (2, 2), "padding": none, "dilation": (1, 1),
                                    "ceil_mode": False}, smooth=False,
                 reference=lambda x: (x.reshape(1, 1, 2, 2, 2, 2).max((3, 5)), None))


def _max_pool_sample(x: np.ndarray, attrs: dict[str, Any]) -> Sample:
    return Sample("max_pool", (x,), attrs, reference=lambda x: _max_pool_reference(x, **attrs))


def _pooling_rows(x: np.ndarray, common: dict[str, Any]) -> Iterator[Sample]:
    maximum = {**common, "dilation": (1,) * len(common["kernel"])}
    values, taps = ops.max_pool.eager(x, **maximum)
    yield _max_pool_sample(x, maximum)
    where = {name: maximum[name] for name in ("kernel", "stride", "padding", "dilation")}
    yield Sample("max_pool_grad", (values, taps), {"input_shape": x.shape, **where})
    yield Sample("max_pool_gather", (x, taps), where)
    for count_include_pad, divisor in ((True, 0), (False, 0), (True, 3)):
        mean = {**common, "count_include_pad": count_include_pad, "divisor": divisor}
        yield Sample("avg_pool", (x,), mean, reference=lambda x, mean=mean: _avg_pool_reference(x, **mean))
        yield Sample("avg_pool_grad", (values,), {**mean, "input_shape": x.shape})


def _index_samples() -> Iterator[Sample]:
    for dtype in (dtypes.float32, dtypes.bfloat16, dtypes.complex64, dtypes.int32):
        x, rows = random(4, 3, dtype=dtype), random(2, 2, 3, dtype=dtype, seed=1)
        twice, once = whole([[3, 0], [3, 1]]), whole([[3, 0], [2, 1]])
        yield Sample("take", (x, twice), {"axis": 0}, reference=lambda x, i: x[i])
        yield Sample("index_add", (x, twice, rows), {"axis": 0}, reference=_added)
        yield Sample("index_update", (x, once, rows), {"axis": 0}, reference=_replaced)
        yield Sample("gather", (x, whole([[2, 1, 2], [0, 0, 3]])), {"axis": 0},
                     reference=lambda x, i: np.take_along_axis(x, i, 0))
        yield Sample("scatter_add", (x, whole([[2, 2, 2]]), rows[0, :1]), {"axis": 1}, reference=_added_along)
        yield Sample("scatter", (x, whole([[2, 0, 1]]), rows[0, :1]), {"axis": 1}, reference=_put_along)
    x = random(3, 4)
    yield Sample("take", (x, np.array(2, np.int32)), {"axis": 1}, reference=lambda x, i: x[:, 2])
    yield Sample("take", (x.T, whole([])), {"axis": 0}, reference=lambda x, i: x[:0])
    yield Sample("take", (random(0, 4), whole([1, 1])), {"axis": 1}, reference=lambda x, i: x[:, [1, 1]])
    yield Sample("index_add", (x, whole([]), random(3, 0)), {"axis": 1}, reference=lambda x, i, s: x)
    yield Sample("index_add", (x, np.array(1), random(3)), {"axis": 1},
                 reference=lambda x, i, s: x + s[:, None] * np.array([0, 1, 0, 0]))
    yield Sample("index_add", (random(5), whole([4, 4, 0]), random(3, seed=1)), {"axis": 0}, reference=_added)
    yield Sample("index_update", (x, np.array(1), random(3)), {"axis": 1})
    yield Sample("index_update", (random(3), whole([1, 1]), random(2)), {"axis": 0}, False, _replaced)
    for name, reference in (("gather", lambda x, i: x[:, :0]), ("scatter_add", lambda x, i, s: x),
                            ("scatter", lambda x, i, s: x)):
        empty = np.zeros((3, 0), np.int64)
        yield Sample(name, (x, empty, random(3, 0))[:2 if name == "gather" else 3], {"axis": 1}, reference=reference)


def _added(x: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    out = x.copy()
    np.add.at(out, index, source)
    return out


def _replaced(x: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    out = x.copy()
    out[index] = source
    return out


def _added_along(x: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    out = x.copy()
    for i, j in np.ndindex(*index.shape):
        out[i, index[i, j]] += source[i, j]
    return out


def _put_along(x: np.ndarray, index: np.ndarray, source: np.ndarray) -> np.ndarray:
    out = x.copy()
    for i, j in np.ndindex(*index.shape):
        out[i, index[i, j]] = source[i, j]
    return out


def _sort_samples() -> Iterator[Sample]:
    for descending in (False, True):
        for x in (random(3, 4), random(3, 4, dtype=dtypes.int32), random(3, 4, dtype=dtypes.bfloat16), random(3, 0),
                  random(3, 1), random(4, 6).T[:, ::-1], random(3, 4, dtype=dtypes.bool_)):
            yield Sample("sort", (x,), {"axis": 1, "descending": descending, "stable": True},
                         reference=lambda x, d=descending: (np.sort(x, 1)[:, ::-1] if d else np.sort(x, 1), None))
            if x.shape[1]:
                yield Sample("topk", (x,), {"axis": 1, "k": min(2, x.shape[1]), "descending": descending},
                             reference=lambda x, d=descending: (
                                 (np.sort(x, 1)[:, ::-1] if d else np.sort(x, 1))[:, :2], None))
        yield Sample("sort", (SPECIAL,), {"axis": 0, "descending": descending, "stable": True}, smooth=False)
        yield Sample("topk", (SPECIAL,), {"axis": 0, "k": 3, "descending": descending}, smooth=False)
        yield Sample("topk", (random(3, 4, 2),), {"axis": 1, "k": 0, "descending": descending})


def _foreach_samples() -> Iterator[Sample]:
    f32 = TensorType(dtypes.float32, ())
    builder = GraphBuilder("step")
    rate, p, g, scale = (builder.input(f32) for _ in range(4))
    with builder:
        moved = ops.sub(p, ops.mul(rate, ops.mul(g, scale)))
        body = builder.build([moved, ops.mul(g, g)])
    rate, one, two = np.array(0.1, np.float32), np.array(1.5, np.float32), np.array(-2.0, np.float32)
    tensors = (random(2, 3), random(4), random(2, 3, seed=1), random(4, seed=1))
    yield Sample("foreach", (rate, *tensors, one, two), {"body": body, "groups": 2, "shared": 1},
                 reference=lambda r, p, q, g, h, s, t: (p - r * g * s, q - r * h * t, g * g, h * h))
    yield Sample("foreach", (rate, random(0), random(0), one), {"body": body, "groups": 1, "shared": 1},
                 reference=lambda r, p, g, s: (p, g))


def _region_samples() -> Iterator[Sample]:
    builder = GraphBuilder("fused")
    x = builder.input(TensorType(dtypes.float32, (2, 3)))
    with builder:
        body = builder.build([ops.exp(ops.neg(x))])
    yield Sample("region", (random(2, 3),), {"body": body, "template": "map"}, smooth=False,
                 reference=lambda x: (np.exp(-x),))


def _check_samples() -> Iterator[Sample]:
    index = whole([2, 0, 1])
    for x, limit in ((index, whole([3, 3, 3])), (index[0], whole([3])[0]), (index[:0], index[:0])):
        yield Sample("check_index", (np.asarray(x), np.asarray(limit)), smooth=False, reference=lambda x, n: x)


FAMILIES = (_check_samples, _where_samples, _integer_power_samples, _complex_samples, _cast_samples, _source_samples,
            _movement_samples, _reduction_samples,
            _scan_samples, _recurrence_samples, _attention_samples, _matmul_samples, _convolution_samples,
            _pooling_samples, _index_samples, _sort_samples, _foreach_samples, _region_samples)


def _table() -> dict[str, list[Sample]]:
    table: dict[str, list[Sample]] = {}
    for name, row in ELEMENTWISE.items():
        table[name] = list(row.samples(name))
    for samples in FAMILIES:
        for sample in samples():
            table.setdefault(sample.name, []).append(sample)
    return table


SAMPLES: dict[str, list[Sample]] = _table()
