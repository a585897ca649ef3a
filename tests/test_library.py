"""Hand-written kernels against the NumPy reference of their op: natively, as plain Python, and in place."""

import numpy as np
import pytest
from kernel_runner import run_as_python, run_natively

from jitgrad import ops
from jitgrad.codegen import library
from jitgrad.codegen.call import IN_PLACE
from jitgrad.codegen.kernel import Buffer
from jitgrad.dtypes import from_numpy
from jitgrad.ir.types import TensorType

RANDOM = np.random.default_rng(0)


def floats(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def places(high, *shape, dtype=np.int64):
    return RANDOM.integers(0, high, shape).astype(dtype)


def window(count_include_pad=True, ceil_mode=False):
    return {"kernel": (3, 2), "stride": (2, 1), "padding": ((1, 1), (0, 1)), "count_include_pad": count_include_pad,
            "ceil_mode": ceil_mode}


IMAGE = floats(2, 3, 7, 6)
SAMPLES = [
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
    ("max_pool2d", (IMAGE,), {"kernel": (3, 2), "stride": (2, 2), "padding": ((1, 1), (1, 1)), "dilation": (1, 2),
                              "ceil_mode": False}),
    ("max_pool2d", (np.array([[[[1, np.nan], [3, 4]]]], "f"),),
     {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0)), "dilation": (1, 1), "ceil_mode": False}),
    ("max_pool2d_grad", (floats(2, 3, 2, 2), places(12, 2, 3, 2, 2)), {"input_shape": (2, 3, 3, 4)}),
    ("max_pool2d_gather", (floats(2, 3, 3, 4), places(12, 2, 3, 2, 2)), {}),
    ("avg_pool2d", (IMAGE,), window()),
    ("avg_pool2d", (IMAGE,), window(False, True)),
    ("avg_pool2d_grad", (floats(2, 3, 4, 6),), {"input_shape": IMAGE.shape, **window()}),
    ("avg_pool2d_grad", (floats(2, 3, 4, 6),), {"input_shape": IMAGE.shape, **window(False)}),
]
SAMPLES = [sample for sample in SAMPLES if hasattr(ops, sample[0])]
NAMES = [f"{name}-{i}" for i, (name, _, _) in enumerate(SAMPLES)]


def type_of(array):
    return TensorType(from_numpy(array.dtype), array.shape)


def lower(name, inputs, attrs, shared=()):
    op = getattr(ops, name)
    lowered = library.lower(op, tuple(type_of(x) for x in inputs), attrs, shared)
    assert lowered is not None
    return lowered, op.result_types(tuple(type_of(x) for x in inputs), attrs)


def buffers(lowered, inputs, types):
    """Memory of inputs, outputs and scratch; what no kernel writes is garbage."""
    outputs = [np.full(t.shape, 77).astype(t.dtype.numpy) for t in types]
    return [np.array(x) for x in inputs] + outputs + [np.full(n, 99, np.uint8) for n in lowered.scratch]


def run(lowered, memory, execute):
    failures = []
    for entry in lowered.launches:
        args = [memory[a.index] if isinstance(a, Buffer) else a for a in entry.arguments]
        middle = entry.items // 2
        failures += [execute(entry.source, entry.name, args, *span) for span in ((middle, entry.items), (0, middle))]
    return [f for f in failures if f]


def check(name, inputs, attrs, execute):
    lowered, types = lower(name, inputs, attrs)
    memory = buffers(lowered, inputs, types)
    assert run(lowered, memory, execute) == []
    expected = getattr(ops, name).eager(*inputs, **attrs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for given, got, want in zip(types, memory[len(inputs):], expected, strict=False):
        assert got.shape == given.shape
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "inputs", "attrs"), SAMPLES, ids=NAMES)
def test_plain_kernel_gives_what_eager_gives(name, inputs, attrs):
    check(name, inputs, attrs, run_as_python)


@pytest.mark.parametrize(("name", "inputs", "attrs"), SAMPLES, ids=NAMES)
def test_native_kernel_gives_what_eager_gives(name, inputs, attrs):
    check(name, inputs, attrs, run_natively)


@pytest.mark.parametrize(("name", "inputs", "attrs"), [s for s in SAMPLES if s[0] in IN_PLACE])
def test_in_place(name, inputs, attrs):
    lowered, types = lower(name, inputs, attrs, ((0, 0),))
    memory = buffers(lowered, inputs, types)
    assert run(lowered, memory, run_natively) == []
    np.testing.assert_allclose(memory[0], getattr(ops, name).eager(*inputs, **attrs), rtol=1e-6)
    assert (memory[len(inputs)] == 77).all()


@pytest.mark.parametrize("execute", [run_as_python, run_natively])
@pytest.mark.parametrize("name", ["take", "index_add", "gather", "scatter_add"])
def test_index_out_of_range_is_reported(name, execute):
    if not hasattr(ops, name):
        pytest.skip("no such op")
    index = np.array([1, 0, 9, 2])
    x, source = floats(3), floats(4)
    inputs = (x, index) if name in ("take", "gather") else (x, index, source)
    lowered, types = lower(name, inputs, {"axis": 0})
    failures = run(lowered, buffers(lowered, inputs, types), execute)
    assert [(f[0], f[2]) for f in failures] == [(1, 9)]
