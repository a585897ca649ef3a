"""Convolutions by Winograd's maps of numbers that are not finite, or too large for the maps: NaN and infinity are where the
definition has them, in all results, and every other result is what it would be without them: to the bit, but for those that
share a large piece with what is not finite."""

import itertools

import numpy as np
import pytest
from launching import run

import jitgrad as jg
from jitgrad import ops, precision
from jitgrad.codegen import library
from jitgrad.dtypes import from_numpy
from jitgrad.ir import TensorType

INF, NAN = np.inf, np.nan
GEOMETRIES = {
    "same": ((2, 16, 6, 7), ((1, 1), (1, 1)), 1),
    "no padding": ((2, 16, 6, 7), ((0, 0), (0, 0)), 1),
    "uneven padding": ((1, 32, 5, 6), ((2, 1), (0, 2)), 1),
    "parts of an image": ((1, 32, 64, 63), ((1, 1), (1, 1)), 1),
    "several images in a part": ((5, 16, 3, 4), ((1, 1), (1, 1)), 1),
    "more padding than image": ((1, 16, 1, 1), ((2, 2), (2, 2)), 1),
    "large pieces": ((2, 16, 16, 15), ((1, 1), (1, 1)), 1),
    "large pieces, uneven padding": ((1, 32, 20, 19), ((2, 1), (0, 2)), 1),
    "large pieces, several images in a part": ((7, 16, 8, 7), ((1, 1), (1, 1)), 1),
    "strided": ((2, 16, 8, 9), ((1, 1), (1, 1)), 2),
    "strided, uneven padding": ((1, 32, 8, 9), ((1, 2), (3, 0)), 2),
    "strided, parts of an image": ((1, 32, 112, 113), ((1, 1), (1, 1)), 2),
    "strided, several images in a part": ((35, 16, 3, 4), ((1, 1), (1, 1)), 2),
    "strided, more padding than image": ((1, 16, 1, 1), ((3, 3), (3, 3)), 2),
}
EACH_WAY = pytest.mark.parametrize("geometry", ("same", "large pieces", "strided"))
OUT = 32
PLACES = {"corner": (0, 0), "last corner": (-1, -1), "edge": (0, 2), "other edge": (2, -1), "inside": (2, 2)}
VALUES = {"inf": (INF,), "-inf": (-INF,), "nan": (NAN,), "both infinities": (INF, -INF), "inf and nan": (INF, NAN)}


@pytest.fixture(autouse=True)
def allowed(request, monkeypatch):
    """Large pieces, whose results are less exact, in the tests that are about them."""
    if "large" in request.node.name:
        monkeypatch.setattr(precision, "_precision", "high")


def operands(name, dtype=np.float32):
    """Image, weights, the result's gradient; and attributes."""
    shape, padding, stride = GEOMETRIES[name]
    if dtype == np.float64:                                     # of which fewer channels are multiplied directly
        shape = (shape[0], 32, *shape[2:])
    attrs = {"stride": (stride, stride), "padding": padding, "dilation": (1, 1), "groups": 1}
    random = np.random.default_rng(1)
    x, w = [random.standard_normal(s).astype(dtype) for s in (shape, (OUT, shape[1], 3, 3))]
    result = ops.convolution.result_types([TensorType(from_numpy(a.dtype), a.shape) for a in (x, w)], attrs)[0]
    return x, w, random.standard_normal(result.shape).astype(dtype), attrs


def steps(x, w, g, attrs):
    """Each of the three ops with its operands and attributes."""
    return ((ops.convolution, (x, w), attrs), (ops.convolution_input_grad, (g, w), {"input_shape": x.shape, **attrs}),
            (ops.convolution_weight_grad, (x, g), {"weight_shape": w.shape, **attrs}))


def carried_out(op, inputs, attrs, **how):
    types = tuple([TensorType(from_numpy(a.dtype), a.shape) for a in inputs])
    lowered = library.lower(op, types, attrs)
    assert any("winograd" in launch.name for launch in lowered.launches)
    return run(lowered, list(inputs), op.result_types(types, attrs), **how)[0]


def assert_as_defined(op, inputs, attrs, **how):
    """NaN and the infinities are those of the definition in float64; the rest is near to it. Returns the result."""
    found = carried_out(op, inputs, attrs, **how)
    with np.errstate(all="ignore"):
        exact = op.eager(*[a.astype(np.float64) for a in inputs], **attrs)
        wanted = exact.astype(found.dtype)
    for what in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(what(found), what(wanted), err_msg=f"{op.name}: {what.__name__}")
    finite = np.isfinite(wanted)
    size = np.abs(exact[finite]).max(initial=1e-30)
    np.testing.assert_allclose(found[finite] / size, exact[finite] / size, rtol=0, atol=np.finfo(found.dtype).eps * 300)
    return found


def placed(array, place, values):
    """`array` with `values` at that place of the first image, or row of weights, in one channel after the other."""
    array = array.copy()
    for k, value in enumerate(values):
        array[(0, 3 + k, *place)] = value
    return array


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", ("same", "no padding", "uneven padding", "large pieces, uneven padding", "strided",
                                  "strided, uneven padding"))
def test_what_is_not_finite_in_one_place(name, values, place):
    x, w, g, attrs = operands(name)
    for op, inputs, attributes in steps(*[placed(a, PLACES[place], VALUES[values]) for a in (x, w, g)], attrs):
        first, second = [{"x": x, "w": w, "gradient": g}[name] for name in op.operands]
        for chosen in ((inputs[0], second), (first, inputs[1]), inputs):
            assert_as_defined(op, chosen, attributes)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_is_not_finite_in_many_places(name, dtype):
    x, w, g, attrs = operands(name, dtype)
    random = np.random.default_rng(2)
    for array in (x, g):
        places = random.integers(0, array.size, 5)
        array.reshape(-1)[places] = (INF, -INF, NAN, INF, -INF)
    for pieces in (1, 3):
        for op, inputs, attributes in steps(x, w, g, attrs):
            assert_as_defined(op, inputs, attributes, pieces=pieces)
    w[3, 5, 2, 0], w[7, 1, 1, 1], w[9, 9, 0, 2] = INF, NAN, -INF
    for op, inputs, attributes in steps(x, w, g, attrs):
        assert_as_defined(op, inputs, attributes)


@pytest.mark.parametrize("value", (INF, -INF, NAN))
@EACH_WAY
def test_all_of_an_operand(geometry, value):
    x, w, g, attrs = operands(geometry)
    for full in itertools.product((False, True), repeat=3):
        arrays = [np.full_like(a, value) if all_of_it else a for a, all_of_it in zip((x, w, g), full, strict=True)]
        for op, inputs, attributes in steps(*arrays, attrs):
            assert_as_defined(op, inputs, attributes)


@EACH_WAY
def test_infinities_times_zero_are_nan(geometry):
    x, w, g, attrs = operands(geometry)
    w[:, 3] = 0
    w[4, :, 1, 2] = 0
    g[:, 5] = 0
    for op, inputs, attributes in steps(placed(x, (2, 2), (INF,)), w, g, attrs):
        assert_as_defined(op, inputs, attributes)


@pytest.mark.parametrize(("dtype", "large"), ((np.float32, 3e38), (np.float64, 1.7e308)))
@EACH_WAY
def test_large_numbers_overflow_only_where_the_result_does(geometry, dtype, large):
    x, w, g, attrs = operands(geometry, dtype)
    for array in (x, g):
        array[0, 3] = dtype(large) * np.sign(array[0, 3])
    small = dtype(1e-4)
    for op, inputs, attributes in (*steps(x, small * w, g, attrs)[:2], steps(x, w, small * np.sign(g), attrs)[2]):
        assert np.isfinite(assert_as_defined(op, inputs, attributes)).all()
    found = assert_as_defined(*steps(np.abs(x), np.ones_like(w), g, attrs)[0])
    assert np.isposinf(found[0]).all() and np.isfinite(found[1]).all()


@pytest.mark.parametrize("geometry", ("same", "strided"))
def test_results_that_are_finite_keep_their_bits(geometry):
    x, w, g, attrs = operands(geometry)
    for (op, clean, attributes), (_, inputs, _) in zip(steps(x, w, g, attrs), steps(
            placed(x, (2, 2), (INF,)), w, placed(g, (2, 2), (NAN,)), attrs), strict=True):
        before, after = carried_out(op, clean, attributes), carried_out(op, inputs, attributes)
        finite = np.isfinite(after)
        assert finite.any() and not finite.all() and np.array_equal(before[finite], after[finite])


@pytest.mark.parametrize("geometry", ("more padding than image", "strided, more padding than image"))
def test_plain_python_means_the_same(geometry):
    x, w, g, attrs = operands(geometry)
    w = w[:16]
    g = g[:, :16]
    w[2, 3, 2, 1], x[0, 2, 0, 0] = INF, -INF
    for op, inputs, attributes in steps(x, w, g, attrs):
        found = assert_as_defined(op, inputs, attributes, plain=True)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(carried_out(op, inputs, attributes)))


@EACH_WAY
def test_layers_give_what_pytorch_gives(geometry):
    torch = pytest.importorskip("torch")
    x, w, g, attrs = operands(geometry)
    stride = attrs["stride"]
    x, g = placed(x, (0, 0), (INF, -INF)), placed(g, (3, 3), (INF, NAN))

    @jg.compile
    def both(x, w, g):
        y = jg.nn.functional.conv2d(x, w, stride=stride, padding=1)
        return y, *jg.autograd.grad(y, [x, w], g)

    ours = both(jg.tensor(x, requires_grad=True), jg.tensor(w, requires_grad=True), jg.tensor(g))
    theirs = [torch.from_numpy(a.astype("f8")) for a in (x, w, g)]
    y = torch.nn.functional.conv2d(theirs[0].requires_grad_(), theirs[1].requires_grad_(), stride=stride,
                                   padding=1)
    for found, wanted in zip(ours, (y, *torch.autograd.grad(y, theirs[:2], theirs[2])), strict=True):
        found, wanted = found.detach().numpy(), wanted.detach().numpy()
        for what in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(what(found), what(wanted))
