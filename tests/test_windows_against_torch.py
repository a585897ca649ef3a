"""Convolution, pooling, normalization, padding and resampling of every rank beside PyTorch's: equal values and gradients, or
an error in both. Skipped where PyTorch is not installed."""

import pytest
from test_against_torch import check, check_gradient, expressions, numbers, run

import jitgrad as jg

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SHAPES = {"l": (2, 4, 9), "w": (2, 4, 7, 8), "v": (2, 4, 5, 6, 7), "b": (6,),
          "k1": (6, 2, 3), "k2": (6, 2, 3, 2), "k3": (6, 2, 3, 2, 3), "t1": (4, 3, 3), "t2": (4, 3, 3, 2),
          "t3": (4, 3, 3, 2, 3), "g2": (2, 3, 5, 2), "g3": (2, 3, 2, 4, 3), "h2": (2, 2, 3), "h3": (2, 3, 4),
          "col": (2, 24, 12), "c": (4,), "d": (4,)}
NAMES = list(SHAPES)

CONVOLUTION = """
F.conv3d(v, k3, b, groups=2) | F.conv3d(v, k3, groups=2, padding="same") | F.conv3d(v, k3, groups=2, padding="valid")
F.conv3d(v, k3, b, (2, 1, 2), (1, 0, 2), (1, 2, 1), 2) | F.conv3d(v[0], k3, groups=2) | F.conv1d(l, k1, b, 2, 1, 1, 2)
F.conv2d(w, k2, b, (2, 1), 1, (1, 2), 2) | F.conv3d(v, k3) | F.conv3d(v, k3, c, groups=2) | F.conv3d(w, k3, groups=2)
F.conv3d(v, k3, groups=2, padding="same", stride=2) | F.conv3d(v, k3, groups=2, padding="full")
F.conv3d(v[:, :, :1], k3, groups=2) | F.conv2d(w, k3, groups=2) | F.conv3d(v, k3, groups=2, stride=(1, 2))
F.conv3d(v, k3, groups=2, stride=0) | F.conv_transpose3d(v, t3) | F.conv_transpose3d(v, t3, None, 2, 1, 1)
F.conv_transpose3d(v[1], t3, dilation=(1, 2, 2)) | F.conv_transpose3d(v, t3, b, (2, 1, 3), (1, 0, 1), (1, 0, 2), 2)
F.conv_transpose1d(l, t1, b, 2, 1, 1, 2) | F.conv_transpose2d(w, t2, b, 2, 1, 1, 2)
F.conv_transpose1d(l, t1, b, dilation=3, output_padding=2) | F.conv_transpose2d(w, t2, b, 1, 1, 2, 2, 3)
F.conv_transpose2d(w, t2, b, (2, 1), (0, 1), (3, 2), 2, (4, 3)) | F.conv_transpose2d(w[0], t2, None, 2, 4, 4, 2, 5)
F.conv_transpose1d(l, t1, output_padding=1) | F.conv_transpose1d(l, t1, padding=20) | F.conv_transpose3d(v, k3)
F.unfold(w, (2, 3), 2, (1, 0), (2, 1)) | F.unfold(w[0], 3) | F.unfold(w, 9) | F.fold(col, (4, 5), (2, 3))
F.fold(col[..., :6], (3, 5), (2, 3)) | F.fold(col, (6, 7), (2, 3), (2, 1), 1, (2, 2)) | F.fold(col, (5, 4), 2)
F.fold(col[0], (5, 4), 2) | F.fold(F.unfold(w, (3, 2), 2, 1, 2), (7, 8), (3, 2), 2, 1, 2)
"""

POOLING = """
F.max_pool3d(v, 2) | F.max_pool3d(v, (2, 3, 3), (1, 2, 3), 1) | F.max_pool3d(v, 3, 2, 1, 1, True, True)
F.max_pool3d(v[0], 2) | F.max_pool3d(v, 2, 1, 0, (2, 1, 3)) | F.max_pool3d(v[0], 2, return_indices=True)
F.max_pool3d(v, 4, 3, 2, return_indices=True) | F.max_pool1d(l, 3, 2, 1, 2, return_indices=True) | F.max_pool1d(l[0], 2)
F.max_pool3d(v, 8) | F.max_pool3d(v, 2, padding=2) | F.max_pool3d(w[0], 2) | F.max_pool2d(w, (2, 2, 2))
F.max_pool3d(v, 2, 0) | F.max_pool2d(w, 3, ceil_mode=True) | F.avg_pool3d(v, 2)
F.avg_pool3d(v, (2, 3, 3), (1, 2, 3), 1) | F.avg_pool3d(v, 3, 2, 1, True, False) | F.avg_pool3d(v[0], 2)
F.avg_pool3d(v, 3, 2, 1, True, True) | F.avg_pool3d(v, 3, 2, 1, divisor_override=5) | F.avg_pool1d(l, 4, 3, 2, True)
F.avg_pool2d(w, 3, 2, 1, True, divisor_override=-2) | F.avg_pool2d(w, 2, divisor_override=0)
F.avg_pool2d(w, (3, 1), (2, 3)) | F.adaptive_avg_pool3d(v, 1) | F.adaptive_avg_pool3d(v, (5, 3, 7))
F.adaptive_avg_pool3d(v, (2, 4, 3)) | F.adaptive_avg_pool3d(v[0], 3) | F.adaptive_avg_pool3d(v, (None, 2, None))
F.adaptive_avg_pool1d(l, 4) | F.adaptive_avg_pool2d(w, (1, 2, 3)) | F.adaptive_avg_pool1d(l, (4,))
F.adaptive_max_pool3d(v, 1) | F.adaptive_max_pool3d(v, (2, 4, 3)) | F.adaptive_max_pool1d(l[0], 2)
F.adaptive_max_pool3d(v, (2, 4, 3), return_indices=True) | F.adaptive_max_pool2d(w, (3, 5), True)
F.adaptive_max_pool1d(l, 4, True) | F.adaptive_max_pool2d(w, (7, 4), True) | F.adaptive_max_pool2d(w, (None, 3))
F.adaptive_max_pool2d(w[:, :, :0], 2) | F.max_unpool1d(*F.max_pool1d(l, 2, return_indices=True), 2)
F.max_unpool2d(*F.max_pool2d(w, 2, return_indices=True), 2)
F.max_unpool2d(*F.max_pool2d(w, 2, return_indices=True), 2, output_size=(7, 8)) | F.max_unpool2d(w, w.long()[:1], 2)
F.max_unpool2d(*F.max_pool2d(w, 2, return_indices=True), 2, output_size=w.size())
F.max_unpool3d(*F.max_pool3d(v, 2, return_indices=True), 2, output_size=v.shape)
F.max_unpool3d(*F.max_pool3d(v[0], 2, return_indices=True), 2, output_size=(5, 6, 7))
F.max_unpool2d(*F.max_pool2d(w, 3, 2, return_indices=True), 3, 2, output_size=(7, 8))
F.max_unpool2d(*F.max_pool2d(w, 2, return_indices=True), 2, output_size=(9, 8))
F.max_unpool2d(*F.max_pool2d(w, 3, 2, 1, return_indices=True), 3, 2, 1) | F.lp_pool1d(l, 2, 3)
F.lp_pool1d(l.abs(), 3, 2, 1, True) | F.lp_pool2d(w, 2, (3, 2), 2) | F.lp_pool3d(v, 2, 2)
F.lp_pool3d(v.abs(), 1.5, 2, 3, True)
"""

RESAMPLING = """
F.interpolate(l, 5, mode="linear") | F.interpolate(l, (13,), mode="linear", align_corners=True) | F.interpolate(w)
F.interpolate(l, scale_factor=1.7, mode="linear")
F.interpolate(l, scale_factor=1.7, mode="linear", recompute_scale_factor=True)
F.interpolate(w, (5, 11), mode="bicubic") | F.interpolate(w, (5, 11), mode="bicubic", align_corners=True)
F.interpolate(w, scale_factor=(2, 0.6), mode="bicubic") | F.interpolate(w, (3, 20), mode="bilinear", antialias=True)
F.interpolate(w, (3, 20), mode="bicubic", antialias=True)
F.interpolate(w, scale_factor=0.4, mode="bicubic", antialias=True)
F.interpolate(w, (3, 20), mode="bilinear", antialias=True, align_corners=True) | F.interpolate(w, 3, 2.0)
F.interpolate(w, scale_factor=0.4, mode="bilinear", antialias=True) | F.interpolate(v, (3, 8, 7), mode="trilinear")
F.interpolate(v, (3, 8, 9), mode="trilinear", align_corners=True) | F.interpolate(v, scale_factor=2)
F.interpolate(v, (3, 8, 9)) | F.interpolate(v, (3, 8, 9), mode="nearest-exact")
F.interpolate(v, (3, 8, 9), mode="area") | F.interpolate(l, (4,), mode="area")
F.interpolate(v, scale_factor=(1.5, 2, 0.7), mode="trilinear") | F.interpolate(v, scale_factor=(1.5, 2, 0.7))
F.interpolate(w, (3, 1), mode="bilinear", align_corners=True) | F.interpolate(w, 1, mode="bicubic", align_corners=True)
F.interpolate(l, 4, mode="bilinear") | F.interpolate(v, 4, mode="bicubic") | F.interpolate(w, 4, align_corners=True)
F.interpolate(v, 4, mode="trilinear", antialias=True) | F.interpolate(w, scale_factor=(1, 2, 3))
F.interpolate(w, (1, 2, 3)) | F.interpolate(w, 0) | F.upsample(w, scale_factor=2) | F.interpolate(c, 4)
F.interpolate(w, 3, mode="cubic") | F.affine_grid(h2, (2, 3, 4, 5))
F.affine_grid(h2, (2, 3, 4, 5), align_corners=True) | F.affine_grid(h3, (2, 3, 4, 5, 1))
F.affine_grid(h3, (2, 3, 4, 1, 3), True) | F.affine_grid(h2, (3, 3, 4, 5)) | F.grid_sample(w, g3)
F.grid_sample(w[:1], g2) | F.grid_sample(w[:, :, :1, :1], g2, padding_mode="reflection", align_corners=True)
F.grid_sample(w, g2, "linear") | F.grid_sample(v, g3, "bicubic")
F.grid_sample(w, F.affine_grid(h2, (2, 4, 3, 3), False), align_corners=False) | F.pixel_shuffle(w, 2)
F.channel_shuffle(v, 2) | F.channel_shuffle(l, 3) | F.pixel_unshuffle(v[..., :6], 2) | F.pixel_shuffle(c, 2)
""" + "\n".join(f'F.grid_sample({x}, {grid} * 0.6, "{mode}", "{padding}", {corners})'
                for x, grid, modes in (("w", "g2", ("bilinear", "nearest", "bicubic")), ("v", "g3", ("bilinear", "nearest")))
                for mode in modes for padding in ("zeros", "border", "reflection") for corners in (True, False))

NORMALIZATION = """
F.instance_norm(v) | F.instance_norm(l, weight=c, bias=d)
F.instance_norm(l, c.detach(), d.detach().abs(), d, c, False) | F.group_norm(v, 2)
F.batch_norm(v, c.detach(), d.detach().abs(), d, c) | F.instance_norm(w, use_input_stats=False)
F.instance_norm(v[0, :, 0, 0]) | F.instance_norm(l[:, :, :1]) | F.instance_norm(l, weight=b) | F.batch_norm(v, c, b)
F.batch_norm(v, None, None, training=True) | F.local_response_norm(v, 3) | F.local_response_norm(l, 2, 0.1, 0.5, 2)
F.local_response_norm(c, 2) | F.pad(v, (1, 2, 0, 1, 2, 1), mode="replicate")
F.pad(v, (1, 2, 0, 1, 2, 1), mode="reflect") | F.pad(l, (9, 0), mode="reflect")
F.pad(v, (1, 2, 0, 1, 2, 1), mode="circular") | F.pad(v, (1, 2, 0, 1, 2, 1), value=2) | F.pad(v, (-1, 0, 2, -2))
"""

TABLES = {"convolution": CONVOLUTION, "pooling": POOLING, "resampling": RESAMPLING, "normalization": NORMALIZATION}
EXPRESSIONS = [pytest.param(code, id=f"{name}-{code}") for name, table in TABLES.items() for code in expressions(table)]


def operands(dtype):
    return [numbers(shape, dtype, seed=k) for k, shape in enumerate(SHAPES.values())]


def evaluate(code):
    return lambda t, *tensors: eval(code, {}, {"t": t, "F": t.nn.functional, **dict(zip(NAMES, tensors))})


@pytest.mark.parametrize("code", EXPRESSIONS)
def test_values_and_gradients(code):
    given = operands("float64")
    check(evaluate(code), *given, note=code)
    if run(evaluate(code), torch, [p[1] for p in given])[1] is None:
        check_gradient(evaluate(code), *given, note=code)


@pytest.mark.parametrize("code", EXPRESSIONS)
def test_other_dtypes(code):
    check(evaluate(code), *operands("float32"), note=code)
    if "grid" not in code:                           # in bfloat16 a place is off by more than an element
        check(evaluate(code), *operands("bfloat16"), note=code, may_differ_in_failing=True)


def test_nearest_neighbours_of_many_sizes():
    x = numbers((1, 1, 40))
    for n in range(1, 41):
        for target in range(1, 60, 2):
            check(lambda t, x, n=n, size=target: t.nn.functional.interpolate(x[..., :n], size), x, note=f"{n} to {target}")


def test_running_statistics_of_instance_norm():
    def moved(t, x, mean, var):
        mean, var = mean.clone(), var.clone()
        out = t.nn.functional.instance_norm(x, mean, var, momentum=0.3)
        return out, mean, var

    check(moved, numbers((3, 4, 5, 6, 7)), numbers((4,)), numbers((4,), low=0.5, seed=2))


def test_the_last_of_equal_places_is_kept():
    """Windows that overlap find one maximum several times; putting it back does not add it up."""
    x = jg.arange(5.0).reshape(1, 1, 5)
    values, indices = jg.nn.functional.max_pool1d(x, 3, 1, return_indices=True)
    assert indices.tolist() == [[[2, 3, 4]]]
    again = jg.nn.functional.max_pool1d(x.flip(2), 2, 1, 1, return_indices=True)
    assert jg.nn.functional.max_unpool1d(*again, 2, 1, 1, output_size=(5,)).tolist() == [[[4.0, 3.0, 2.0, 1.0, 0.0]]]
    assert values.tolist() == [[[2.0, 3.0, 4.0]]]
