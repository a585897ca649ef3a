"""Convolution and its gradients against the NumPy reference of their ops."""

import itertools

import numpy as np
import pytest
from launching import run

from jitgrad import config, ops, precision
from jitgrad.codegen import library, planes, winograd
from jitgrad.codegen.choice import answering
from jitgrad.dtypes import from_numpy
from jitgrad.ir import GraphBuilder, TensorType, evaluate
from jitgrad.kernels.cpu.gemm import element_tile
from jitgrad.plans import compile_graph
from jitgrad.transforms.fuse import fuse

RANDOM = np.random.default_rng(0)


def case(images=2, channels=3, height=9, width=8, out=5, kernel=(3, 3), stride=(1, 1), padding=((0, 0), (0, 0)),
         dilation=(1, 1), groups=1):
    return ((images, channels, height, width), (out, channels // groups, *kernel),
            {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups})


SAME = ((1, 1), (1, 1))
CASES = {
    "plain": case(),
    "same": case(padding=SAME),
    "one by one": case(kernel=(1, 1)),
    "strided": case(stride=(2, 2), padding=SAME),
    "uneven": case(kernel=(2, 3), stride=(2, 1), padding=((0, 1), (2, 1)), dilation=(1, 2)),
    "dilated": case(dilation=(2, 2), padding=((2, 2), (2, 2))),
    "stride that leaves a rest": case(height=10, width=11, stride=(3, 3)),
    "groups": case(channels=6, out=4, groups=2, padding=SAME),
    "depthwise": case(channels=7, out=14, groups=7, padding=SAME),
    "one dimension": case(height=1, width=60, kernel=(1, 5), padding=((0, 0), (2, 2))),
    "many channels": case(channels=70, height=6, width=7, out=33, padding=SAME),
    "many positions": case(images=3, channels=2, height=30, width=31, out=17, padding=SAME),
    "patches": case(channels=3, height=8, width=12, out=20, kernel=(4, 4), stride=(4, 4)),
    "patches of rows, in groups": case(channels=4, height=6, width=5, out=6, kernel=(2, 1), stride=(2, 1), groups=2),
    "patches that leave a rest": case(channels=3, height=9, width=9, out=6, kernel=(4, 4), stride=(4, 4)),
    "larger padding than image": case(height=2, width=2, kernel=(5, 5), padding=((3, 3), (3, 3))),
}


def volume(images=2, channels=3, size=(5, 6, 7), out=5, kernel=(3, 3, 3), stride=(1, 1, 1), padding=((1, 1),) * 3,
           dilation=(1, 1, 1)):
    return ((images, channels, *size), (out, channels, *kernel),
            {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1})


VOLUMES = {
    "volume": volume(),
    "strided volume": volume(channels=17, out=16, stride=(2, 2, 2)),
    "uneven volume": volume(size=(6, 5, 9), kernel=(2, 1, 3), stride=(1, 2, 3), padding=((0, 1), (0, 0), (2, 1)),
                            dilation=(2, 1, 1)),
    "volume of many channels": volume(images=1, channels=32, size=(4, 4, 4), out=33),
    "large volume": volume(images=1, channels=4, size=(9, 30, 31), out=8),
}

MAPPED = {
    "same": case(images=2, channels=32, height=8, width=8, out=48, padding=SAME),
    "no padding": case(images=2, channels=32, height=5, width=9, out=32),
    "odd": case(images=3, channels=64, height=7, width=7, out=32, padding=SAME),
    "uneven padding": case(images=2, channels=32, height=9, width=6, out=32, padding=((2, 1), (0, 2))),
    "several images in a part": case(images=20, channels=48, height=3, width=4, out=80, padding=SAME),
    "parts of an image": case(images=1, channels=32, height=64, width=63, out=32, padding=SAME),
    "deep": case(images=3, channels=512, height=4, width=4, out=512, padding=SAME),
    "large pieces": case(images=2, channels=32, height=15, width=17, out=48, padding=SAME),
    "large pieces of several images": case(images=30, channels=48, height=5, width=4, out=80, padding=SAME),
    "large pieces, deep": case(images=30, channels=512, height=4, width=4, out=112, padding=SAME),
    "weights mapped where they are needed": case(images=3, channels=512, height=4, width=4, out=528, padding=SAME),
    "images mapped for several blocks": case(images=3, channels=32, height=8, width=7, out=192, padding=SAME),
    "parts mapped for several blocks": case(images=1, channels=128, height=24, width=24, out=192, padding=SAME),
    "one piece": case(images=1, channels=32, height=1, width=2, out=32, padding=SAME),
    "stride of two": case(images=3, channels=32, height=9, width=8, out=48, padding=SAME, stride=(2, 2)),
    "stride of two, uneven padding": case(channels=32, height=11, width=12, out=32, padding=((1, 2), (3, 0)), stride=(2, 2)),
    "stride of two, several small images": case(images=37, channels=48, height=4, width=4, out=64, padding=SAME,
                                                stride=(2, 2)),
    "stride of two, parts of an image": case(images=1, channels=32, height=120, width=121, out=32, padding=SAME,
                                             stride=(2, 2)),
    "stride of two, deep": case(images=3, channels=256, height=4, width=4, out=512, padding=SAME, stride=(2, 2)),
    "stride of two, one piece": case(images=1, channels=32, height=1, width=2, out=32, padding=SAME, stride=(2, 2)),
}
"""Those that are done by Winograd's maps."""

BY_TAPS = {
    "kernel of two by three": case(images=3, channels=32, height=9, width=8, out=48, kernel=(2, 3), padding=SAME,
                                   stride=(2, 2)),
    "several small images": case(images=17, channels=48, height=4, width=4, out=64, kernel=(3, 2), padding=SAME,
                                 stride=(2, 2)),
    "several small images, one by one": case(images=64, channels=48, height=4, width=4, out=64, kernel=(1, 1),
                                             stride=(2, 2)),
    "one by one, with channels last": case(images=3, channels=32, height=9, width=8, out=48, kernel=(1, 1)),
    "uneven kernel": case(images=3, channels=32, height=10, width=11, out=48, kernel=(2, 3), stride=(3, 1),
                   padding=((0, 1), (2, 1)), dilation=(1, 2)),
    "parts of a large image": case(images=2, channels=32, height=60, width=61, out=32, kernel=(5, 5),
                                   padding=((2, 2), (2, 2))),
    "sequence": case(images=2, channels=32, height=1, width=160, out=32, kernel=(1, 9), stride=(1, 4),
                          padding=((0, 0), (4, 4))),
    "nearly only padding": case(channels=32, height=2, width=2, out=32, kernel=(5, 5), padding=((3, 3), (3, 3))),
    "dilation": case(channels=32, height=8, width=8, out=32, padding=((2, 2), (2, 2)), dilation=(2, 2)),
}
"""Those that are done tap by tap, with channels last."""

DEPTHWISE = {
    "row of several vectors": case(channels=5, height=6, width=41, out=5, groups=5, padding=SAME),
    "two results per channel": case(channels=6, out=12, groups=6, padding=SAME, kernel=(2, 3)),
    "stride of two": case(images=3, channels=8, height=9, width=38, out=8, groups=8, padding=SAME, stride=(2, 2)),
    "stride and dilation": case(channels=4, height=11, width=40, out=8, groups=4, kernel=(3, 2), stride=(3, 2),
                                padding=((2, 0), (1, 3)), dilation=(2, 3)),
    "stride beyond the kernel": case(channels=4, height=9, width=9, out=4, groups=4, kernel=(1, 2), stride=(3, 4)),
    "sequence": case(channels=4, height=1, width=70, out=4, groups=4, kernel=(1, 4), padding=((0, 0), (3, 0))),
    "nearly only padding": case(channels=4, height=2, width=2, out=4, groups=4, kernel=(5, 5), padding=((3, 3), (3, 3))),
    "seven by seven": case(channels=4, height=15, width=19, out=8, groups=4, kernel=(7, 7), padding=((3, 3), (3, 3))),
    "many rows of few columns": case(images=1, channels=4, height=150, width=7, out=4, groups=4, padding=SAME,
                                     stride=(2, 2)),
    "stride across alone": case(channels=4, height=9, width=40, out=4, groups=4, kernel=(3, 5), padding=SAME, stride=(1, 2)),
    "stride down alone": case(channels=4, height=18, width=17, out=4, groups=4, kernel=(5, 3), padding=SAME, stride=(3, 1)),
}
"""Those of one channel in each group."""

PLANES = {
    "four channels each": case(images=3, channels=12, height=14, width=14, out=12, groups=3, padding=SAME),
    "several tiles": case(images=2, channels=8, height=19, width=33, out=10, groups=2, padding=SAME),
    "more results than a tile has rows": case(channels=6, height=5, width=9, out=48, groups=3, padding=SAME),
    "stride of two": case(images=2, channels=8, height=13, width=37, out=16, groups=2, padding=SAME, stride=(2, 2)),
    "one by one, strided": case(images=2, channels=12, height=9, width=8, out=8, groups=4, kernel=(1, 1), stride=(2, 2)),
    "stride, dilation, uneven padding": case(channels=9, height=11, width=20, out=6, groups=3, kernel=(3, 2), stride=(3, 2),
                                             padding=((2, 0), (1, 3)), dilation=(2, 3)),
    "stride beyond the kernel": case(channels=4, height=9, width=9, out=6, groups=2, kernel=(1, 2), stride=(3, 4)),
    "a row, and what is beyond it": case(channels=4, height=1, width=70, out=4, groups=2, kernel=(1, 4),
                                         padding=((0, 0), (3, 0))),
    "more padding than image": case(channels=4, height=2, width=2, out=6, groups=2, kernel=(5, 5), padding=((3, 3), (3, 3))),
}
"""Those of few channels in each group."""


def type_of(array):
    return TensorType(from_numpy(array.dtype), array.shape)


def check(op, inputs, attrs, **how):
    types = tuple(type_of(x) for x in inputs)
    lowered = library.lower(op, types, attrs)
    assert lowered is not None
    (got,) = run(lowered, list(inputs), op.result_types(types, attrs), **how)
    wanted = op.eager(*inputs, **attrs)
    limit = 1e-11 if got.dtype == np.float64 else 5e-4
    np.testing.assert_allclose(got, wanted, rtol=limit, atol=limit)
    return got


def operands(shape_x, shape_w, attrs, dtype):
    x, w = (RANDOM.standard_normal(s).astype(dtype) for s in (shape_x, shape_w))
    y = ops.convolution.result_types((type_of(x), type_of(w)), attrs)[0]
    return x, w, RANDOM.standard_normal(y.shape).astype(dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_convolution_and_both_gradients(name, dtype):
    shape_x, shape_w, attrs = CASES[name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)
    check(ops.convolution, (x, w), attrs)
    check(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs})
    check(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs})


def kernels(op, inputs, attrs):
    return [launch.name for launch in library.lower(op, tuple(type_of(x) for x in inputs), attrs).launches]


@pytest.fixture(autouse=True)
def allowed(request, monkeypatch):
    """Large pieces, whose results are less exact, in the tests that are about them."""
    if "large" in request.node.name:
        monkeypatch.setattr(precision, "_precision", "high")


@pytest.mark.parametrize(("name", "how"), [*[(name, "winograd") for name in MAPPED],
                                           *[(name, "taps") for name in (*BY_TAPS, *VOLUMES)],
                                           *[(name, "depthwise") for name in DEPTHWISE],
                                           *[(name, "planes") for name in PLANES]])
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_channels_last_and_both_gradients(name, how, dtype):
    shape_x, shape_w, attrs = {"winograd": MAPPED, "taps": {**BY_TAPS, **VOLUMES}, "depthwise": DEPTHWISE,
                               "planes": PLANES}[how][name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)
    for op, inputs, more in ((ops.convolution, (x, w), {}), (ops.convolution_input_grad, (g, w), {"input_shape": shape_x}),
                             (ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w})):
        assert any(how in kernel for kernel in kernels(op, inputs, {**more, **attrs}))
        results = [check(op, inputs, {**more, **attrs}, pieces=n) for n in (1, 3)]
        assert np.array_equal(*results)


FIRST = {
    "one channel": case(images=9, channels=1, height=8, width=28, out=9, padding=SAME),
    "one channel, no padding": case(images=3, channels=1, height=12, width=28, out=6, kernel=(5, 5)),
    "three channels, half the size": case(images=2, channels=3, height=15, width=50, out=5, kernel=(7, 7), stride=(2, 2),
                                          padding=((3, 3), (3, 3))),
    "wider than the image": case(images=3, channels=2, height=3, width=20, out=3, kernel=(3, 9), padding=((1, 1), (4, 4)),
                                 dilation=(2, 1)),
    "far apart": case(channels=2, height=4, width=18, out=3, kernel=(1, 3), padding=((0, 0), (20, 20)), dilation=(1, 20)),
}
"""Those of images of few channels."""


def check_on_planes(op, inputs, attrs):
    assert any("planes" in kernel for kernel in kernels(op, inputs, attrs))
    results = [check(op, inputs, attrs, pieces=n) for n in (1, 3)]
    assert np.array_equal(*results)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("part", [1 << 16, 1 << 10])
def test_few_channels(name, dtype, part, monkeypatch):
    """All rows at once, and some at a time."""
    monkeypatch.setattr(planes, "PART", part)
    shape_x, shape_w, attrs = FIRST[name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)
    weights = {"weight_shape": shape_w}
    for op, inputs, more in ((ops.convolution, (x, w), {}), (ops.convolution_weight_grad, (x, g), weights)):
        check_on_planes(op, inputs, {**more, **attrs})


LAST = {
    "three results": case(images=2, channels=64, height=9, width=32, out=3, padding=SAME),
    "one result, large kernel": case(images=3, channels=10, height=12, width=45, out=1, kernel=(9, 9),
                                     padding=((4, 4), (4, 4))),
    "seven results, no padding": case(channels=40, height=7, width=34, out=7),
    "dilation, uneven padding": case(images=2, channels=48, height=9, width=30, out=2, kernel=(2, 3), dilation=(1, 2),
                                     padding=((1, 0), (2, 2))),
}
"""Those of few results of many channels."""


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("part", [1 << 16, 1 << 6])
def test_few_results(name, dtype, part, monkeypatch):
    """And the gradient in the image of the convolution the other way around, which is one, too."""
    monkeypatch.setattr(planes, "PART", part)
    shape_x, shape_w, attrs = LAST[name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)
    calls = [(ops.convolution, (x, w), {})]
    if attrs["padding"] == SAME:
        calls.append((ops.convolution_input_grad, (x, np.ascontiguousarray(w.swapaxes(0, 1))), {"input_shape": g.shape}))
    for op, inputs, more in calls:
        check_on_planes(op, inputs, {**more, **attrs})


def test_many_channels_are_summed_up_as_exactly_as_by_numpy():
    shape_x, shape_w, attrs = case(images=2, channels=512, height=16, width=32, out=3, padding=SAME)
    x, w, _ = operands(shape_x, shape_w, attrs, np.float32)
    exact = ops.convolution.eager(x.astype(np.float64), w.astype(np.float64), **attrs)
    ours, numpy = [np.abs(y - exact) for y in (check(ops.convolution, (x, w), attrs), ops.convolution.eager(x, w, **attrs))]
    assert ours.mean() < 1.5 * numpy.mean() and ours.max() < 4 * numpy.max()


PRODUCTS = {
    "one tap": case(images=3, channels=130, height=5, width=6, out=260, kernel=(1, 1)),
    "stride of two": case(images=5, channels=128, height=7, width=8, out=256, kernel=(1, 1), stride=(2, 2)),
    "strides that leave a rest": case(images=2, channels=192, height=9, width=8, out=176, kernel=(1, 1), stride=(3, 2)),
    "patches": case(images=3, channels=3, height=8, width=12, out=20, kernel=(4, 4), stride=(4, 4)),
    "uneven patches of many channels": case(channels=160, height=6, width=6, out=288, kernel=(2, 3), stride=(2, 3)),
    "padding": case(channels=192, height=5, width=5, out=192, kernel=(1, 1), stride=(2, 2), padding=((0, 2), (0, 1))),
}
"""Those whose weights' gradient is one product, if there is no padding."""


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_weights_gradients_that_are_products(name, dtype):
    shape_x, shape_w, attrs = PRODUCTS[name]
    x, w, g = operands(shape_x, shape_w, attrs, dtype)
    attributes = {"weight_shape": shape_w, **attrs}
    assert kernels(ops.convolution_weight_grad, (x, g), attributes)[-1].startswith("gemm") == (name != "padding")
    results = [check(ops.convolution_weight_grad, (x, g), attributes, pieces=n) for n in (1, 3)]
    assert np.array_equal(*results)
    check(ops.convolution, (x, w), attrs)
    check(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs})


@pytest.mark.parametrize(("shapes", "on_planes"), [
    (case(channels=8, height=20, width=20, out=8, groups=2, padding=SAME), True),
    (case(channels=130, height=5, width=5, out=130, groups=2, padding=SAME), False),        # many channels in a group
    (case(images=1, channels=4, height=400, width=400, out=4, groups=2, padding=SAME), True),       # some rows at a time
    (case(images=1, channels=2, height=700, width=4, out=128, groups=2, padding=SAME), False),      # beyond the cache
    (case(channels=3, height=20, width=28, out=8, padding=SAME), True),
    (case(channels=8, height=20, width=28, out=3, padding=SAME), True),
    (case(channels=8, height=20, width=28, out=3, kernel=(1, 1)), False),           # nothing is gathered twice
    (case(images=1, channels=600, height=5, width=600, out=3, padding=SAME), False),
    (case(channels=8, height=20, width=20, out=8, padding=SAME), False)])
def test_planes_are_for_groups_that_fit_into_the_cache(shapes, on_planes):
    shape_x, shape_w, attrs = shapes
    types = tuple([TensorType(from_numpy(np.dtype("f4")), shape) for shape in (shape_x, shape_w)])
    names = [launch.name for launch in library.lower(ops.convolution, types, attrs).launches]
    assert ("convolve_planes_f32" in names) == on_planes


@pytest.mark.parametrize("shapes", (
    case(images=1, channels=4, height=3, width=4, out=8, groups=4, padding=SAME, stride=(2, 1)),
    case(images=1, channels=4, height=3, width=4, out=6, groups=2, padding=SAME, stride=(2, 2)),
    case(images=1, channels=32, height=2, width=3, out=32, padding=SAME),
    case(images=1, channels=32, height=2, width=3, out=32, padding=SAME, stride=(2, 2)),
    case(images=1, channels=32, height=2, width=3, out=32, kernel=(2, 1), padding=SAME, stride=(2, 2)),
    volume(images=1, channels=2, size=(3, 2, 4), out=3, stride=(2, 1, 2))))
def test_channels_last_means_the_same_as_plain_python(shapes):
    shape_x, shape_w, attrs = shapes
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    check(ops.convolution, (x, w), attrs, plain=True)
    check(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs}, plain=True)
    check(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs}, plain=True)


@pytest.mark.parametrize("shapes", (
    case(images=1, channels=32, height=2, width=1, out=16, padding=SAME),
    case(images=1, channels=32, height=4, width=6, out=16, padding=SAME)))
@pytest.mark.parametrize("blocks", (1, 0))
def test_large_pieces_and_own_weights_mean_the_same_as_plain_python(shapes, blocks, monkeypatch):
    monkeypatch.setattr(winograd, "OWN_PIECES", blocks)             # that map images themselves, or all share what is mapped
    monkeypatch.setattr(winograd, "MAPPED", 0)                      # large pieces, where there is no rest of one
    monkeypatch.setattr(winograd, "ITEMS", 1)                       # weights that are mapped where they are needed
    monkeypatch.setattr(winograd, "OWN_CHANNELS", 64)               # bytes: 16 of them at a time
    shape_x, shape_w, attrs = shapes
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    shared = blocks == 0 and winograd.shares(element_tile("f32"))
    assert len(kernels(ops.convolution, (x, w), attrs)) == 1 + shared
    check(ops.convolution, (x, w), attrs, plain=True)
    check(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs}, plain=True)
    check(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs}, plain=True)


def test_the_gradient_of_a_strided_convolution_without_padding_goes_tap_by_tap():
    shape_x, shape_w, attrs = case(channels=32, height=9, width=9, out=32, stride=(2, 2))
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    assert "winograd_strided_f32" in kernels(ops.convolution, (x, w), attrs)
    assert "add_taps_f32" in kernels(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs})
    check(ops.convolution, (x, w), attrs)
    check(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs})
    check(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs})


@pytest.mark.parametrize(("pieces", "size", "stride", "mean", "largest"), (
    ("small", 6, 1, 1.6, 4), ("small", 24, 1, 1.5, 4), ("strided", 12, 2, 1.5, 4), ("large", 24, 1, 5, 8)))
@pytest.mark.parametrize("channels", (64, 512))
def test_mapped_convolution_is_as_accurate_as_a_direct_one(channels, pieces, size, stride, mean, largest):
    """But for large pieces, which have to be allowed: their errors are several times as large. (Sums of 72 products, as a
    gradient in the weights of images of 6x6 has, hardly err at all when they are made directly.)"""
    shape_x, shape_w, attrs = case(images=2, channels=channels, height=size, width=size, out=64, padding=SAME,
                                   stride=(stride, stride))
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    for op, inputs, more in ((ops.convolution, (x, w), {}), (ops.convolution_input_grad, (g, w), {"input_shape": shape_x}),
                             (ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w})):
        attributes = {**more, **attrs}
        exact = op.eager(*[array.astype(np.float64) for array in inputs], **attributes)
        ours = np.abs(check(op, inputs, attributes) - exact)
        direct = np.abs(op.eager(*inputs, **attributes) - exact)
        assert any(("winograd_large" in kernel) == (pieces == "large") for kernel in kernels(op, inputs, attributes))
        assert ours.mean() < mean * direct.mean() and ours.max() < largest * direct.max(), op.name


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("out", (16, 64))
def test_few_channels_are_mapped_as_accurately_as_by_the_implicit_product(out, stride):
    shape_x, shape_w, attrs = case(images=2, channels=16, height=6 * stride, width=6 * stride, out=out, padding=SAME,
                                   stride=(stride, stride))
    random = np.random.default_rng(0)
    x, w, g = (random.standard_normal((8, *s)).astype(np.float32) for s in (shape_x, shape_w, (2, out, 6, 6)))
    for op, inputs, more in ((ops.convolution, (x, w), {}), (ops.convolution_input_grad, (g, w), {"input_shape": shape_x}),
                             (ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w})):
        attributes, ours, direct = {**more, **attrs}, [], []
        for drawn in zip(*inputs, strict=True):
            exact = op.eager(*[array.astype(np.float64) for array in drawn], **attributes)
            assert any("winograd" in kernel for kernel in kernels(op, drawn, attributes))
            ours.append(np.abs(check(op, drawn, attributes) - exact))
            with answering({"algorithm": "implicit product"}):
                assert not any("winograd" in kernel for kernel in kernels(op, drawn, attributes))
                direct.append(np.abs(check(op, drawn, attributes) - exact))
        assert np.mean(ours) < 1.5 * np.mean(direct) and np.max(ours) < 4 * np.max(direct), op.name


def followed(builder, value, *, gradient):
    """Bias, activation, scale and residual behind a convolution; behind its gradient in the image, the gradient of an
    activation. The inputs that these take are appended to those of `builder`."""
    rest, scale = builder.input(value.type), builder.input(value.type.with_shape((value.shape[1],)))
    wide = ops.broadcast_to(ops.reshape(scale, shape=(1, value.shape[1], *(1,) * (len(value.shape) - 2))), shape=value.shape)
    if gradient:
        return [ops.where(ops.le(rest, ops.full_like(rest, 0.0)), ops.full_like(rest, 0.0), ops.add(value, rest))]
    before = ops.add(value, wide)
    return [before, ops.add(ops.mul(ops.relu(before), wide), rest)]


@pytest.mark.parametrize(("cases", "name"), [(cases, name) for cases in (CASES, MAPPED, BY_TAPS, VOLUMES, DEPTHWISE)
                                             for name in cases])
@pytest.mark.parametrize("gradient", (False, True))
def test_what_follows_is_part_of_the_kernel(cases, name, gradient):
    shape_x, shape_w, attrs = cases[name]
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    first, op, more = ((g, ops.convolution_input_grad, {"input_shape": shape_x}) if gradient else (x, ops.convolution, {}))
    builder = GraphBuilder("block")
    inputs = [builder.input(type_of(a)) for a in (first, w)]
    with builder:
        graph = builder.build(followed(builder, op(*inputs, **more, **attrs), gradient=gradient))
    assert [n.attrs.get("template") for n in fuse(graph).nodes if n.op.name != "constant"] == ["convolution"]
    arrays = [first, w, *[RANDOM.standard_normal(v.shape).astype("f") for v in graph.inputs[2:]]]
    for wanted, got in zip(evaluate(graph, arrays), compile_graph(graph).run(arrays), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    if name in ("plain", "groups", "one piece", "nearly only padding"):
        with config.scope(plain=True):
            for wanted, got in zip(evaluate(graph, arrays), compile_graph(graph).run(arrays), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_each_thread_has_memory_of_its_own():
    shape_x, shape_w, attrs = MAPPED["several images in a part"]
    x, w, _ = operands(shape_x, shape_w, attrs, np.float32)
    builder = GraphBuilder("convolution")
    operand_x, operand_w = [builder.input(type_of(a)) for a in (x, w)]
    with builder:
        plan = compile_graph(builder.build([ops.convolution(operand_x, operand_w, **attrs)]))
    with config.scope(num_threads=1):
        (alone,) = plan.run([x, w])
    for count in (2, 5, 3):
        with config.scope(num_threads=count):
            for _ in range(5):
                assert np.array_equal(plan.run([x, w])[0], alone)


@pytest.mark.parametrize("stride", (1, 2))
def test_the_text_means_the_same_as_plain_python(stride):
    shape_x, shape_w, attrs = case(channels=2, height=4, width=5, out=3, padding=SAME, stride=(stride, stride))
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    check(ops.convolution, (x, w), attrs, plain=True)
    check(ops.convolution_input_grad, (g, w), {"input_shape": shape_x, **attrs}, plain=True)
    check(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs}, plain=True)


def test_results_do_not_depend_on_how_items_are_handed_out():
    shape_x, shape_w, attrs = case(images=5, height=20, width=21, padding=SAME)
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    for op, inputs, more in ((ops.convolution, (x, w), {}),
                             (ops.convolution_input_grad, (g, w), {"input_shape": shape_x}),
                             (ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w})):
        results = [check(op, inputs, {**more, **attrs}, pieces=n) for n in (1, 3)]
        assert np.array_equal(*results)


@pytest.mark.parametrize("channels", (1, 32))
def test_nan_stays_in_reach_of_its_taps(channels):
    shape_x, shape_w, attrs = case(images=1, channels=channels, height=9, width=9, out=channels, padding=SAME)
    x, w = np.ones(shape_x, "f"), np.ones(shape_w, "f")
    x[0, 0, 4, 4] = np.nan
    y = check(ops.convolution, (x, w), attrs)[0, 0]
    reach = {(4 + i, 4 + j) for i, j in itertools.product((-1, 0, 1), repeat=2)}
    assert {(int(i), int(j)) for i, j in np.argwhere(np.isnan(y))} == reach


@pytest.mark.parametrize("stride", (1, 2))
def test_depthwise_taps_beyond_the_edge_are_left_out(stride):
    shape_x, shape_w, attrs = case(images=1, channels=4, height=20, width=21, out=4, groups=4, padding=SAME,
                                   stride=(stride, stride))
    x, w, g = operands(shape_x, shape_w, attrs, np.float32)
    w[1, 0, 0, 0], g[0, 2, -1, 0] = np.inf, -np.inf
    y = native(ops.convolution, (x, w), attrs)
    lost = np.zeros(y.shape, bool)
    lost[0, 1, 1:, 1:] = True                                   # the tap meets no row above, and no column before
    np.testing.assert_array_equal(~np.isfinite(y), lost)
    taps = native(ops.convolution_weight_grad, (x, g), {"weight_shape": shape_w, **attrs})
    lost = np.zeros(taps.shape, bool)
    lost[2, 0, :2 if stride == 1 else 3, 1:] = True
    np.testing.assert_array_equal(~np.isfinite(taps), lost)


def native(op, inputs, attrs):
    types = tuple([type_of(x) for x in inputs])
    return run(library.lower(op, types, attrs), list(inputs), op.result_types(types, attrs))[0]


def test_nothing_to_do_goes_to_the_host():
    x, w = TensorType(from_numpy("f4"), (0, 3, 8, 8)), TensorType(from_numpy("f4"), (4, 3, 3, 3))
    assert library.lower(ops.convolution, (x, w), CASES["plain"][2]) is None


# ---- volumes in groups, which are sums of convolutions of images --------------------------------------------------------

GROUPED_VOLUMES = {
    "depthwise": ((2, 6, 5, 7, 8), (6, 1, 3, 3, 3), {"padding": ((1, 1),) * 3, "groups": 6}),
    "strided": ((2, 8, 6, 7, 9), (4, 4, 3, 2, 3), {"stride": (2, 1, 2), "padding": ((1, 0), (0, 1), (1, 1)), "groups": 2}),
    "dilated": ((1, 6, 9, 5, 6), (9, 2, 3, 1, 2), {"dilation": (2, 1, 3), "groups": 3}),
    "of one layer": ((3, 4, 1, 6, 6), (4, 2, 1, 3, 3), {"padding": ((0, 0), (1, 1), (1, 1)), "groups": 2}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", GROUPED_VOLUMES)
def test_volumes_in_groups(name, dtype):
    image, weight, given = GROUPED_VOLUMES[name]
    attrs = {"stride": (1, 1, 1), "padding": ((0, 0),) * 3, "dilation": (1, 1, 1), **given}
    x, w = [RANDOM.standard_normal(shape).astype(dtype) for shape in (image, weight)]
    g = RANDOM.standard_normal(ops.convolution.eager(x, w, **attrs).shape).astype(dtype)
    for op, operands, more in ((ops.convolution, (x, w), {}), (ops.convolution_input_grad, (g, w), {"input_shape": image}),
                               (ops.convolution_weight_grad, (x, g), {"weight_shape": weight})):
        builder = GraphBuilder(op.name)
        values = [builder.input(TensorType(from_numpy(a.dtype), a.shape)) for a in operands]
        plan = compile_graph(builder.build([builder.run(op, tuple(values), {**attrs, **more})]))
        assert not [entry for entry in plan.spec.entries if entry.host]
        wide = op.eager(*[a.astype(np.float64) for a in operands], **attrs, **more)
        (found,) = plan.run(list(operands))
        assert found.dtype == dtype and found.shape == wide.shape
        np.testing.assert_allclose(found, wide, rtol=0, atol=np.finfo(dtype).eps * 30 * np.abs(wide).max())
