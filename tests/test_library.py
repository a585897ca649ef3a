"""Hand-written kernels against the NumPy reference of their op: natively, as plain Python, and in place."""

import launching
import numpy as np
import pytest
import samples
from kernel_runner import run_as_python, run_natively

from jitgrad.codegen import library
from jitgrad.codegen.call import IN_PLACE, LIBRARY
from jitgrad.codegen.kernel import Buffer
from jitgrad.dtypes import from_numpy
from jitgrad.ir import REGISTRY, TensorType

RANDOM = np.random.default_rng(0)


def floats(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def places(high, *shape, dtype=np.int64):
    return RANDOM.integers(0, high, shape).astype(dtype)


def window(count_include_pad=True, ceil_mode=False):
    return {"kernel": (3, 2), "stride": (2, 1), "padding": ((1, 1), (0, 1)), "count_include_pad": count_include_pad,
            "divisor": 0, "ceil_mode": ceil_mode}


def pooling(kernel, stride, padding, dilation):
    return {"kernel": kernel, "stride": stride, "padding": tuple((p, p) for p in padding), "dilation": dilation}


def gradient_of_maxima(shape, *windows, ceil_mode=True):
    """A gradient, and the taps of maxima."""
    best, taps = REGISTRY["max_pool"].eager(floats(*shape), **pooling(*windows), ceil_mode=ceil_mode)
    return floats(*best.shape), taps


POOLED = [
    ((1, 2, 4, 70), (2, 2), (2, 2), (0, 0), (1, 1)),            # several vectors, the last one begins earlier
    ((1, 2, 5, 67), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 1, 6, 41), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1, 7, 90), (3, 4), (3, 5), (1, 2), (2, 1)),
    ((1, 1, 9, 40), (2, 3), (2, 2), (1, 1), (3, 3)),            # taps that miss some columns
    ((1, 1, 9, 40), (1, 1), (3, 2), (0, 0), (1, 1)),            # rows and columns of no window
    ((1, 1, 30, 24), (17, 16), (3, 2), (4, 4), (1, 1)),         # more taps than a byte can tell
    ((1, 1, 9, 5, 9), (3, 2, 2), (2, 1, 2), (1, 1, 1), (1, 2, 1)),
    ((3, 2, 13, 27), (3, 3), (2, 2), (1, 1), (1, 1)),           # rows narrower than a vector
    *[((2, 3, 3 * n + 1, size), (n, n), (n, n), (0, 0), (1, 1))    # windows that tile the plane, one after another
      for n in (1, 2, 3, 4, 5) for size in (7, 28, 69)],
    ((2, 2, 5, 4, 7), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    ((3, 2, 45), (4,), (4,), (0,), (1,)),
]
IMAGE = floats(2, 3, 7, 6)
MORE = [
    ("take", (floats(5, 4, 3), places(4, 6, 2)), {"axis": 1}),
    ("take", (floats(7), places(7, 9, dtype=np.int32)), {"axis": 0}),
    ("index_add", (floats(3, 5, 2), places(5, 8), floats(3, 8, 2)), {"axis": 1}),
    ("index_add", (places(9, 4, 3), places(4, 6), places(9, 6, 3)), {"axis": 0}),
    ("index_update", (floats(3, 5, 2), places(5, 8), floats(3, 8, 2)), {"axis": 1}),
    ("gather", (floats(4, 5, 3), places(5, 2, 7, 3)), {"axis": 1}),
    ("scatter", (floats(4, 5, 3), places(5, 2, 7, 3), floats(2, 7, 3)), {"axis": 1}),
    ("scatter_add", (floats(4, 5, 3), places(5, 4, 7, 3), floats(4, 7, 3)), {"axis": 1}),
    ("cumsum", (floats(4, 100, 3),), {"axis": 1}),
    ("cumsum", (places(9, 6, 50),), {"axis": 1}),
    ("cumprod", (floats(2, 9),), {"axis": 1}),
    ("cumprod", (floats(9, 70),), {"axis": 0}),
    ("sort", (floats(3, 61),), {"axis": 1, "descending": False, "stable": True}),
    ("sort", (places(5, 50, 3),), {"axis": 0, "descending": True, "stable": True}),
    ("sort", (np.array([[3, np.nan, 1, np.nan, -np.inf, 2]], "f"),), {"axis": 1, "descending": False, "stable": True}),
    ("sort", (np.array([[3, np.nan, 1, np.nan, -np.inf, 2]], "f"),), {"axis": 1, "descending": True, "stable": True}),
    ("topk", (floats(3, 61),), {"axis": 1, "k": 7, "descending": True}),
    ("topk", (places(5, 50, 3),), {"axis": 0, "k": 5, "descending": False}),
    ("topk", (np.array([[3, np.nan, 1, np.nan, -np.inf, 2, 3]], "f"),), {"axis": 1, "k": 4, "descending": True}),
    ("topk", (np.array([[3, np.nan, 1, np.nan, -np.inf, 2, 3]], "f"),), {"axis": 1, "k": 6, "descending": False}),
    ("permute", (floats(70, 50),), {"axes": (1, 0)}),
    ("permute", (floats(3, 33, 4, 40),), {"axes": (2, 3, 0, 1)}),
    ("permute", (floats(3, 4, 5).astype(np.float16),), {"axes": (1, 0, 2)}),
    ("broadcast_to", (floats(3, 1, 5),), {"shape": (3, 4, 5)}),
    ("slice", (floats(9, 8),), {"start": (1, 0), "stop": (8, 7), "step": (2, 3)}),
    ("flip", (floats(4, 5, 3),), {"axes": (0, 2)}),
    ("reshape", (floats(4, 5),), {"shape": (2, 10)}),
    ("pad", (floats(3, 4),), {"low": (1, 0), "high": (2, 3)}),
    ("concat", (floats(2, 3), floats(2, 4), floats(2, 1)), {"axis": 1}),
    ("slice_update", (floats(6, 7), floats(2, 3)), {"start": (1, 0), "step": (2, 3)}),
    ("random_bits", (np.array(2**40 + 5), np.array(2**33 + 1)), {"shape": (7, 9)}),
    ("max_pool", (IMAGE,), {"kernel": (3, 2), "stride": (2, 2), "padding": ((1, 1), (1, 1)), "dilation": (1, 2),
                              "ceil_mode": False}),
    ("max_pool", (np.array([[[[1, np.nan], [3, 4]]]], "f"),),
     {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "ceil_mode": False}),
    *[("max_pool", (floats(2, 2, 7, 41) * [1, -np.inf][k == 2],), {"kernel": (3, 3), "stride": (1, k), "dilation": (2, 1),
                                                                  "padding": ((1, 0), (1, 1)), "ceil_mode": False})
      for k in (1, 2, 3)],
    *[row for shape, kernel, stride, padding, dilation in POOLED for row in (
        ("max_pool", (floats(*shape),), {**pooling(kernel, stride, padding, dilation), "ceil_mode": True}),
        ("max_pool_grad", gradient_of_maxima(shape, kernel, stride, padding, dilation),
         {"input_shape": shape, **pooling(kernel, stride, padding, dilation)}))],
    *[("max_pool_grad", gradient_of_maxima(shape, *windows, ceil_mode=False), {"input_shape": shape, **pooling(*windows)})
      for shape in ((2, 3, 7, 29), (2, 1, 9, 68))               # rows and columns behind the last window
      for windows in (((2, 3), (2, 3), (0, 0), (1, 1)), ((4, 2), (4, 2), (0, 0), (1, 1)))],
    ("avg_pool", (IMAGE,), window()),
    ("avg_pool", (IMAGE,), window(False, True)),
    ("avg_pool_grad", (floats(2, 3, 4, 6),), {"input_shape": IMAGE.shape, **window()}),
    ("avg_pool_grad", (floats(2, 3, 4, 6),), {"input_shape": IMAGE.shape, **window(False)}),
]


def rows():
    """The samples of the table whose ops have hand-written kernels, and more of our own."""
    table = [(s.name, s.inputs, s.attrs) for name in LIBRARY for s in samples.SAMPLES.get(name, ())]
    for name, inputs, attrs in table + MORE:
        inputs = tuple(np.array(x, order="C") for x in inputs)
        if library.lower(REGISTRY[name], tuple(type_of(x) for x in inputs), attrs) is not None:
            yield name, inputs, attrs


def type_of(array):
    return TensorType(from_numpy(array.dtype), array.shape)


def lower(name, inputs, attrs, shared=()):
    op, types = REGISTRY[name], tuple(type_of(x) for x in inputs)
    lowered = library.lower(op, types, attrs, shared)
    assert lowered is not None
    return lowered, op.result_types(types, attrs)


SAMPLES = list(rows())
NAMES = [f"{name}-{i}" for i, (name, _, _) in enumerate(SAMPLES)]
IN_PLACE_SAMPLES = [s for s in SAMPLES if s[0] in IN_PLACE]


def close(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if got.dtype.kind in "iub":
        np.testing.assert_array_equal(got, expected)
    else:
        tolerance = {2: 2e-2, 4: 1e-5, 8: 1e-12}[got.dtype.itemsize]
        np.testing.assert_allclose(got.astype("f8"), expected.astype("f8"), rtol=tolerance, atol=tolerance)


def check(name, inputs, attrs, *, plain):
    lowered, types = lower(name, inputs, attrs)
    results = launching.run(lowered, [np.array(x) for x in inputs], types, plain=plain, pieces=3)
    with np.errstate(all="ignore"):
        expected = REGISTRY[name].eager(*inputs, **attrs)
    for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        close(got, want)


@pytest.mark.parametrize(("name", "inputs", "attrs"), SAMPLES, ids=NAMES)
def test_native_kernel_gives_what_eager_gives(name, inputs, attrs):
    check(name, inputs, attrs, plain=False)


@pytest.mark.parametrize(("name", "inputs", "attrs"), SAMPLES, ids=NAMES)
def test_plain_kernel_gives_what_eager_gives(name, inputs, attrs):
    check(name, inputs, attrs, plain=True)


@pytest.mark.parametrize(("name", "inputs", "attrs"), IN_PLACE_SAMPLES, ids=[s[0] for s in IN_PLACE_SAMPLES])
def test_in_place(name, inputs, attrs):
    shared = (IN_PLACE[name],)
    lowered, types = lower(name, inputs, attrs, shared)
    results = launching.run(lowered, [np.array(x) for x in inputs], types, shared=shared)
    expected = REGISTRY[name].eager(*inputs, **attrs)
    for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        close(got, want)


ORDERED = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]


@pytest.mark.parametrize("plain", [False, True], ids=["native", "plain"])
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dtype", ORDERED)
def test_sort_keeps_the_order_of_equals(dtype, descending, plain):
    """Lines short and long (those are sorted by digits), with NaN of either sign, both zeros, infinities and denormals."""
    for size in (3, 150):
        x = 30 * floats(size, 4)
        x[::3, 0] = 7
        if np.dtype(dtype).kind == "f":
            special = [np.nan, -0.0, np.inf, 0.0, -np.nan, -np.inf, 0.0, -0.0, 6e-8, -6e-8, np.nan]
            x[:len(special), 1] = special[:size]
        x = (abs(x) if dtype == "uint8" else x).astype(dtype)
        lowered, types = lower("sort", (x,), {"axis": 0, "descending": descending, "stable": True})
        values, indices = launching.run(lowered, [x], types, plain=plain, pieces=2)
        order = (size - 1 - np.argsort(x[::-1], 0, kind="stable"))[::-1] if descending else np.argsort(x, 0, kind="stable")
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(values, np.take_along_axis(x, order, 0))
        assert indices.dtype == np.int64
        for kept in (1, size // 3, size):
            lowered, types = lower("topk", (x,), {"axis": 0, "k": kept, "descending": descending})
            values, indices = launching.run(lowered, [x], types, plain=plain)
            np.testing.assert_array_equal(indices, order[:kept])
            np.testing.assert_array_equal(values, np.take_along_axis(x, order[:kept], 0))


@pytest.mark.parametrize("execute", [run_as_python, run_natively])
@pytest.mark.parametrize("name", ["take", "index_add", "gather", "scatter_add"])
def test_index_out_of_range_is_reported(name, execute):
    index = np.array([1, 0, 9, 2])
    x, source = floats(3), floats(4)
    inputs = (x, index) if name in ("take", "gather") else (x, index, source)
    lowered, types = lower(name, inputs, {"axis": 0})
    memory = [*inputs, *(np.zeros(t.shape, t.dtype.numpy) for t in types)]
    memory += [np.zeros(n, "u1") for n in lowered.scratch]
    failures = []
    for entry in lowered.launches:
        args = [memory[a.index] if isinstance(a, Buffer) else a for a in entry.arguments]
        failures.append(execute(entry.source, entry.name, args, 0, entry.items))
    assert [(f[0], f[2]) for f in failures if f] == [(1, 9)]
