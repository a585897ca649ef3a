"""Derived operations beside NumPy, gradients beside differences, and what must hold of random numbers, promotion,
errors.

(`test_against_torch.py` holds the wide table beside PyTorch, where that is installed.)"""

from __future__ import annotations

import math

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional as F
from jitgrad import errors
from jitgrad.functional import core, random
from jitgrad.functional.foreach import foreach

RNG = np.random.default_rng(0)
ARRAYS = {"x": RNG.normal(size=(2, 3, 4)), "y": RNG.normal(size=(3, 4)) + 0.1, "p": RNG.uniform(0.1, 0.9, (2, 3, 4)),
          "m": RNG.normal(size=(4, 5)), "v": RNG.normal(size=4), "s": np.array(0.7), "e": np.zeros((0, 3))}


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def log_softmax(x):
    below = x - x.max(1, keepdims=True)
    return below - np.log(np.exp(below).sum(1, keepdims=True))


def erf(x):
    return np.vectorize(math.erf)(x)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def cross_entropy(x, target):
    logs = np.log(softmax(x, 1))
    return -logs[np.arange(len(x)), target].mean()


TARGET = np.array([1, 0, 2])

# ours, NumPy's: over x[2, 3, 4], y[3, 4], p (in 0.1 … 0.9), m[4, 5], v[4], s[]
SAME = [line.split(" ~ ") for line in """
x + y ~ x + y
x - 2 ~ x - 2
2 / p ~ 2 / p
x % 0.7 ~ x % 0.7
p ** y ~ p ** y
x // y ~ x // y
x.abs().sqrt() ~ np.sqrt(np.abs(x))
jg.maximum(x, y) ~ np.maximum(x, y)
jg.where(x > 0, x, y) ~ np.where(x > 0, x, y)
x.clamp(-0.5, 0.5) ~ x.clip(-0.5, 0.5)
x.lerp(y, 0.25) ~ x + 0.25 * (y - x)
jg.logaddexp(x, y) ~ np.logaddexp(x, y)
jg.hypot(x, y) ~ np.hypot(x, y)
jg.logaddexp2(x, y) ~ np.logaddexp2(x, y)
jg.sinc(x) ~ np.sinc(x)
jg.deg2rad(x) ~ np.deg2rad(x)
jg.ldexp(x, y) ~ x * 2 ** y
jg.polar(p, x).imag ~ p * np.sin(x)
jg.complex(x, p).angle() ~ np.angle(x + 1j * p)
(x > 0).long().cummax(2).values ~ np.maximum.accumulate(x > 0, 2) * 1
x.cummax(1).values ~ np.maximum.accumulate(x, 1)
x.logcumsumexp(2) ~ np.logaddexp.accumulate(x, 2)
x.quantile(0.3, 1) ~ np.quantile(x, 0.3, 1)
x.nanquantile(0.7) ~ np.nanquantile(x, 0.7)
jg.cov(m) ~ np.cov(m)
jg.corrcoef(m) ~ np.corrcoef(m)
jg.histogram(x, 4).hist ~ np.histogram(x, 4)[0] * 1.0
jg.vander(v) ~ np.vander(v)
jg.vander(v * 0.0, 3) ~ np.vander(v * 0.0, 3)
jg.trapezoid(x, v) ~ ((x[..., 1:] + x[..., :-1]) / 2 * np.diff(v)).sum(-1)
jg.gradient(m, dim=1, edge_order=2)[0] ~ np.gradient(m, axis=1, edge_order=2)
jg.column_stack([v, m]) ~ np.column_stack([v, m])
jg.dstack([y, y]) ~ np.dstack([y, y])
(m @ m.T).matrix_power(5) ~ np.linalg.matrix_power(m @ m.T, 5)
jg.chain_matmul(y, m, m.T, v[:, None]) ~ y @ m @ m.T @ v[:, None]
x.clone().sin_().square_() ~ np.sin(x) ** 2
p.clone().log_().hypot_(p) ~ np.hypot(np.log(p), p)
jg.nextafter(x, s) ~ np.nextafter(x, s)
x.scatter_reduce(2, (x * 0).long(), x, "prod")[..., 0] ~ x[..., 0] * x.prod(2)
x.scatter_reduce(2, (x * 0).long()[..., :3], x, "amax", include_self=False)[..., 0] ~ x[..., :3].max(2)
x.sum() ~ x.sum()
x.sum((0, 2), keepdim=True) ~ x.sum((0, 2), keepdims=True)
e.sum(0) ~ e.sum(0)
e.prod() ~ np.array(1.0)
x.mean(1) ~ x.mean(1)
x.var(1) ~ x.var(1, ddof=1)
x.std((0, 1), correction=0) ~ x.std((0, 1))
x.max(1).values ~ x.max(1)
x.max(1).indices ~ x.argmax(1)
x.amin((0, 1)) ~ x.min((0, 1))
x.argmin(2) ~ x.argmin(2)
x.prod(1) ~ x.prod(1)
(x > 0).any(1) ~ (x > 0).any(1)
(x > 0).all() ~ (x > 0).all()
x.norm() ~ np.sqrt((x ** 2).sum())
x.norm(3, 1) ~ (np.abs(x) ** 3).sum(1) ** (1 / 3)
x.logsumexp(1) ~ np.log(np.exp(x).sum(1))
(x + 1000).logsumexp(1) ~ np.log(np.exp(x).sum(1)) + 1000
x.cumsum(1) ~ x.cumsum(1)
x.cumprod(2) ~ x.cumprod(2)
x.sort(1).values ~ np.sort(x, 1)
x.argsort(2, descending=True) ~ np.argsort(-x, 2)
x.topk(2).values ~ np.sort(x, -1)[..., :1:-1]
x.median(1).values ~ np.sort(x, 1)[:, 1]
x.reshape(4, -1) ~ x.reshape(4, -1)
x.permute(2, 0, 1) ~ x.transpose(2, 0, 1)
x.movedim(0, -1) ~ np.moveaxis(x, 0, -1)
x.flip(0, 2) ~ np.flip(x, (0, 2))
x.roll(1, 2) ~ np.roll(x, 1, 2)
y.repeat(2, 3) ~ np.tile(y, (2, 3))
x.repeat_interleave(2, 1) ~ np.repeat(x, 2, 1)
m.tril(-1) ~ np.tril(m, -1)
m.triu(1) ~ np.triu(m, 1)
v.diag(-2) ~ np.diag(v, -2)
m.diag(1) ~ np.diag(m, 1)
jg.cat([x, x], 1) ~ np.concatenate([x, x], 1)
jg.stack([y, y], -1) ~ np.stack([y, y], -1)
F.pad(x, (1, 2, 0, 1), value=3.0) ~ np.pad(x, ((0, 0), (0, 1), (1, 2)), constant_values=3.0)
F.pad(x, (2, 1), mode="reflect") ~ np.pad(x, ((0, 0), (0, 0), (2, 1)), mode="reflect")
x @ m ~ x @ m
v @ m ~ v @ m
y @ v ~ y @ v
x @ x.mT ~ x @ x.swapaxes(1, 2)
jg.outer(v, v) ~ np.outer(v, v)
jg.kron(y, m) ~ np.kron(y, m)
jg.tensordot(x, y, 2) ~ np.tensordot(x, y, 2)
jg.einsum("bij,kj->bik", x, y) ~ np.einsum("bij,kj->bik", x, y)
jg.einsum("bij,jk,b->ki", x, m, x[:, 0, 0]) ~ np.einsum("bij,jk,b->ki", x, m, x[:, 0, 0])
jg.einsum("...ij->...ji", x) ~ np.einsum("...ij->...ji", x)
jg.einsum("ii", m[:, :4]) ~ np.einsum("ii", m[:, :4])
F.softmax(x, 1) ~ softmax(x, 1)
F.log_softmax(x * 300, 1) ~ log_softmax(x * 300)
F.layer_norm(x, (4,)) ~ layer_norm(x)
F.layer_norm(x, (4,), v, v) ~ layer_norm(x) * v + v
F.gelu(x) ~ x * 0.5 * (1 + erf(x / np.sqrt(2)))
F.silu(x) ~ x / (1 + np.exp(-x))
F.softplus(x) ~ np.log1p(np.exp(x))
F.elu(x) ~ np.where(x > 0, x, np.expm1(x))
F.leaky_relu(x, 0.1) ~ np.where(x > 0, x, 0.1 * x)
F.mse_loss(x, p) ~ ((x - p) ** 2).mean()
F.cross_entropy(y, jg.from_numpy(TARGET)) ~ cross_entropy(y, TARGET)
F.binary_cross_entropy(p, p) ~ -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
F.binary_cross_entropy_with_logits(x, p) ~ (np.log1p(np.exp(-x)) + (1 - p) * x).mean()
F.linear(x, m.T, m[0]) ~ x @ m + m[0]
F.normalize(x, dim=2) ~ x / np.sqrt((x ** 2).sum(2, keepdims=True))
F.embedding(jg.from_numpy(TARGET), y) ~ y[TARGET]
F.avg_pool1d(x, 2) ~ x.reshape(2, 3, 2, 2).mean(3)
F.max_pool1d(x, 2) ~ x.reshape(2, 3, 2, 2).max(3)
F.adaptive_avg_pool2d(x, 1) ~ x.mean((1, 2), keepdims=True)
F.scaled_dot_product_attention(x, x, x) ~ softmax(x @ x.swapaxes(1, 2) / 2, 2) @ x
F.interpolate(x, scale_factor=2) ~ np.repeat(x, 2, 2)
""".strip().splitlines()]


@pytest.mark.parametrize(("ours", "numpys"), SAME, ids=[a for a, _ in SAME])
def test_values(ours, numpys):
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 2e-4)):
        arrays = {name: np.asarray(a, dtype) for name, a in ARRAYS.items()}
        result = eval(ours, globals(), {name: jg.from_numpy(a) for name, a in arrays.items()})
        expected = np.asarray(eval(numpys, globals(), {k: a.astype(np.float64) for k, a in arrays.items()}))
        assert result.shape == expected.shape
        np.testing.assert_allclose(result.numpy(), expected, tolerance, tolerance)


NOT_SMOOTH = ("//", "%", "arg", "indices", "any", "all")


@pytest.mark.parametrize("code", [a for a, _ in SAME if not any(word in a for word in NOT_SMOOTH)])
def test_gradients(code):
    """Along a random direction the gradient of a weighted sum is its slope."""
    def total(shift):
        tensors = {k: jg.tensor(a + shift * np.cos(np.arange(a.size)).reshape(a.shape)) for k, a in ARRAYS.items()}
        for t in tensors.values():
            t.requires_grad_()
        out = eval(code, globals(), tensors)
        return (out * jg.from_numpy(np.sin(1.0 + np.arange(out.numel())).reshape(out.shape))).sum(), tensors

    value, tensors = total(0.0)
    if not value.requires_grad:
        return
    value.backward()
    slope = sum((t.grad.numpy() * np.cos(np.arange(t.numel())).reshape(t.shape)).sum()
                for t in tensors.values() if t.grad is not None)
    step = 1e-6
    numeric = (total(step)[0].item() - total(-step)[0].item()) / (2 * step)
    np.testing.assert_allclose(slope, numeric, 1e-5, 1e-6)


# promotion

@pytest.mark.parametrize(("expression", "dtype"), [
    ("jg.ones(2, dtype=jg.int32) + 1", jg.int32), ("jg.ones(2, dtype=jg.int32) + 1.5", jg.float32),
    ("jg.ones(2, dtype=jg.float16) + 1.5", jg.float16), ("jg.ones(2, dtype=jg.float16) + jg.tensor(1.5)", jg.float16),
    ("jg.tensor(1, dtype=jg.int32) + jg.ones(2, dtype=jg.int8)", jg.int8),
    ("jg.tensor(1.5) + jg.arange(3)", jg.float32),
    ("jg.tensor(1.5, dtype=jg.float64) * jg.ones(2)", jg.float32), ("jg.arange(3) / 2", jg.float32),
    ("jg.arange(3) == 2.5", jg.bool), ("jg.arange(3).float() + jg.arange(3.0, dtype=jg.float64)", jg.float64),
    ("jg.ones(2, dtype=jg.float16) + jg.ones(2, dtype=jg.bfloat16)", jg.float32), ("jg.arange(3) + True", jg.int64),
    ("jg.ones(2, dtype=jg.bool) + 1", jg.int64), ("jg.ones(3, dtype=jg.bool).sum()", jg.int64),
    ("jg.ones(3, dtype=jg.uint8).cumsum(0)", jg.int64), ("jg.ones(3, dtype=jg.int32).exp()", jg.float32),
    ("jg.ones(2) + np.float64(1)", jg.float32), ("np.float64(2) * jg.ones(2)", jg.float32)])
def test_promotion(expression, dtype):
    assert eval(expression).dtype is dtype


def test_numbers_wrap_into_integers():
    assert (jg.ones(1, dtype=jg.uint8) + 300).tolist() == [45]
    assert jg.full((1,), -1, dtype=jg.uint8).tolist() == [255]


# integers

def test_integer_division():
    a, b = jg.tensor([7, -7, 7, -7]), jg.tensor([2, 2, -2, -2])
    assert (a // b).tolist() == [3, -4, -4, 3]
    assert (a % b).tolist() == [1, 1, -1, -1]
    assert jg.fmod(a, b).tolist() == [1, -1, 1, -1]
    assert jg.div(a, b, rounding_mode="trunc").tolist() == [3, -3, -3, 3]
    with pytest.raises(errors.DivisionByZeroError):
        a // 0


# gradients where the formula has a bend: PyTorch's

@pytest.mark.parametrize("code, points, slopes", [
    ("F.softplus(x)", [0.0, -0.0, 30.0], [0.5, 0.5, 1]), ("F.softplus(x, 3)", [0.0], [0.5]), ("F.mish(x)", [0.0], [0.6]),
    ("F.elu(x)", [0.0, 2.0], [1, 1]), ("F.elu(x, 0.3)", [0.0, 2.0], [0.3, 1]), ("F.celu(x, 2)", [0.0, 1.0], [1, 1]),
    ("F.selu(x)", [0.0, 1.0], [1.7580993408473766, 1.0507009873554805]),
    ("F.relu6(x)", [-1.0, 0.0, 3.0, 6.0, 7.0], [0, 0, 1, 0, 0]), ("F.hardtanh(x)", [-1.0, 0.0, 1.0], [0, 1, 0]),
    ("F.hardtanh(x, -2, 0.5)", [-2.0, -1.0, 0.5], [0, 1, 0]), ("F.hardsigmoid(x)", [-3.0, 0.0, 3.0], [0, 1 / 6, 0]),
    ("F.hardswish(x)", [-3.0, 0.0, 3.0, 4.0], [0, 0.5, 1, 1])])
def test_gradients_at_the_bends(code, points, slopes):
    def slope(x):
        return jg.autograd.grad(eval(code, {"F": F, "x": x}).sum(), x)[0]

    x = jg.tensor(points, dtype=jg.float64, requires_grad=True)
    with jg.config.scope(plain=True):
        compiled = jg.compile(slope)(x)
    for found in (slope(x), compiled):
        np.testing.assert_allclose(found.numpy(), slopes, 1e-12)


def test_activations_of_what_is_not_finite():
    x = jg.tensor([math.nan, math.inf, -math.inf, 1e4, -1e4])
    for function, known in ((F.softplus, [math.inf, 0, 1e4, 0]), (F.elu, [math.inf, -1, 1e4, -1]),
                            (F.celu, [math.inf, -1, 1e4, -1]), (F.relu6, [6, 0, 6, 0])):
        np.testing.assert_allclose(function(x).numpy(), [math.nan, *known])


# medians and quantiles: PyTorch's

NAN, INF = math.nan, math.inf


def eagerly_and_compiled(function, x):
    with jg.config.scope(plain=True):
        compiled = jg.compile(function)(x)
    return function(x), compiled


@pytest.mark.parametrize("line, median, place, nanmedian, nanplace", [
    ([1, NAN, 2, NAN], NAN, 1, 1, 0), ([NAN, 3, 1, 2], NAN, 0, 2, 3), ([NAN, NAN], NAN, 0, NAN, 0),
    ([4, 3, 1, 2], 2, 3, 2, 3), ([1, INF, INF], INF, 1, INF, 1), ([NAN], NAN, 0, NAN, 0)])
def test_medians_of_lines_with_nan(line, median, place, nanmedian, nanplace):
    x = jg.tensor([line, line], dtype=jg.float32)
    for name, value, index in (("median", median, place), ("nanmedian", nanmedian, nanplace)):
        for found in eagerly_and_compiled(lambda x, name=name: (getattr(x[0], name)(), *getattr(x, name)(1)), x):
            np.testing.assert_array_equal(found[0].numpy(), np.float32(value))
            np.testing.assert_array_equal(found[1].numpy(), np.float32([value, value]))
            assert found[2].tolist() == [index, index]


def test_gradient_of_a_median_is_shared_by_its_equals():
    x = jg.tensor([2.0, 2.0, 1.0, 2.0], requires_grad=True)
    for found in eagerly_and_compiled(lambda x: jg.autograd.grad(x.median(), x)[0], x):
        np.testing.assert_allclose(found.numpy(), [1 / 3, 1 / 3, 0, 1 / 3], 1e-6)
    x = jg.tensor([NAN, 1.0, 3.0, 1.0], requires_grad=True)
    for found in eagerly_and_compiled(lambda x: jg.autograd.grad(x.nanmedian(), x)[0], x):
        assert found.tolist() == [0, 0.5, 0, 0.5]


@pytest.mark.parametrize("line, share, value, midpoint", [
    ([-INF, 1, 2, 3], 0.3, -INF, -INF), ([-INF, 1, 2, 3], 0.1, NAN, -INF), ([-INF, 1, 2, 3], 0.7, 2.1, 2.5),
    ([-INF, -INF, 1, 2], 0.5, -INF, -INF), ([1, 2, INF, INF], 0.5, NAN, NAN), ([1, 2, 3, INF], 0.7, INF, NAN),
    ([1, 2, 3, INF], 0.9, NAN, NAN), ([1, 2, 3, INF], 0.3, 1.9, 1.5), ([1, 2, 4, 8], 1.0, 8, 8)])
def test_quantiles_of_lines_with_infinities(line, share, value, midpoint):
    x = jg.tensor([line, line], dtype=jg.float32)
    for found in eagerly_and_compiled(lambda x: x.quantile(share, 1), x):
        np.testing.assert_allclose(found.numpy(), [value, value], 1e-6)
    np.testing.assert_allclose(x.quantile(share, 1, interpolation="midpoint").numpy(), [midpoint, midpoint])
    np.testing.assert_allclose(x.nanquantile(share, 1).numpy(), [value, value], 1e-6)


# losses and masks

def test_ignored_targets_touch_nothing():
    x = jg.randn(3, 4, requires_grad=True)
    loss = F.cross_entropy(x, jg.tensor([1, -100, 2]))
    loss.backward()
    assert x.grad[1].abs().sum() == 0
    np.testing.assert_allclose(loss.item(), F.cross_entropy(x[[0, 2]], jg.tensor([1, 2])).item(), 1e-6)
    with pytest.raises(errors.OutOfRangeError):
        F.cross_entropy(x, jg.tensor([1, 4, 2]))


def test_softmax_of_hidden_rows():
    mask = jg.tensor([[True, False], [False, False]])
    x = jg.randn(2, 2)
    out = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    np.testing.assert_allclose(out[0].numpy(), x[0].numpy(), 1e-6)
    assert out[1].tolist() == [0, 0]


def test_half_precision_reduces_in_float32():
    x = jg.full((4096,), 0.1, dtype=jg.float16)
    assert abs(x.sum().item() - 409.5) < 0.5
    assert abs(x.mean().item() - 0.1) < 1e-4
    assert x.softmax(0).dtype is jg.float16


def test_batch_norm_moves_running_statistics():
    x, mean, var = jg.randn(8, 3, 4), jg.zeros(3), jg.ones(3)
    F.batch_norm(x, mean, var, training=True, momentum=0.1)
    a = x.numpy()
    np.testing.assert_allclose(mean.numpy(), 0.1 * a.mean((0, 2)), 1e-5)
    np.testing.assert_allclose(var.numpy(), 0.9 + 0.1 * a.var((0, 2), ddof=1), 1e-5)


# sums with a product

@pytest.mark.parametrize("code, shape", [
    ("jg.addmm(z, a, a, beta=0)", (3,)), ("jg.addmv(z, a, a[0], beta=0)", (3,)),
    ("jg.addr(z, a[0], a[1], beta=0.0)", (3, 3)), ("jg.baddbmm(z, a[None], a[None], beta=0)", (1, 3, 3)),
    ("jg.addbmm(z, a[None], a[None], beta=0)", (3, 3))])
def test_what_counts_zero_times_has_a_gradient_of_zeros(code, shape):
    a, z = jg.tensor(ARRAYS["m"][:3, :3]), jg.full(shape, math.nan, dtype=jg.float64, requires_grad=True)

    def step(z):
        y = eval(code, {"jg": jg, "a": a, "z": z})
        return y, jg.autograd.grad(y.sum(), z)[0]

    for y, slope in eagerly_and_compiled(step, z):
        np.testing.assert_allclose(y.detach().numpy(), eval(code, {"jg": jg, "a": a, "z": z.detach().nan_to_num()}).numpy())
        np.testing.assert_array_equal(slope.numpy(), np.zeros(shape))


# random numbers

def test_random_numbers_repeat():
    jg.manual_seed(1)
    first = jg.rand(5), jg.randn(5), jg.randperm(5)
    jg.manual_seed(1)
    for a, b in zip(first, (jg.rand(5), jg.randn(5), jg.randperm(5))):
        assert a.tolist() == b.tolist()
    generator = random.Generator().manual_seed(1)
    assert jg.rand(5, generator=generator).tolist() == first[0].tolist()
    assert jg.rand(5, generator=generator).tolist() != first[0].tolist()


def test_random_numbers_do_not_depend_on_the_shape():
    drawn = [jg.rand(n, generator=random.Generator().manual_seed(3)).tolist() for n in (7, 20)]
    assert drawn[0] == drawn[1][:7]


@pytest.mark.parametrize("dtype", [jg.float32, jg.float64, jg.float16, jg.bfloat16])
def test_distributions(dtype):
    jg.manual_seed(0)
    u, z = jg.rand(20000, dtype=dtype).double(), jg.randn(20000, dtype=dtype).double()
    assert u.min().item() >= 0 and u.max().item() < 1
    assert abs(u.mean().item() - 0.5) < 0.01 and abs(u.var().item() - 1 / 12) < 0.005
    assert abs(z.mean().item()) < 0.03 and abs(z.var().item() - 1) < 0.05
    assert bool(z.isfinite().all())


def test_other_distributions():
    jg.manual_seed(0)
    drawn = jg.randint(-2, 5, (7000,))
    assert set(drawn.tolist()) == set(range(-2, 5))
    assert max(abs(count - 1000) for count in jg.bincount(drawn + 2).tolist()) < 150
    assert sorted(jg.randperm(100).tolist()) == list(range(100))
    assert abs(jg.bernoulli(jg.full((10000,), 0.3)).mean().item() - 0.3) < 0.02
    weights = jg.tensor([0.0, 1.0, 3.0])
    counts = jg.bincount(weights.multinomial(8000, replacement=True), minlength=3).tolist()
    assert counts[0] == 0 and abs(counts[2] - 6000) < 200
    assert sorted(weights[1:].multinomial(2).tolist()) == [0, 1]
    assert abs(jg.empty(10000).exponential_(2.0).mean().item() - 0.5) < 0.03


def test_dropout():
    jg.manual_seed(0)
    x = jg.ones(1000, requires_grad=True)
    y = F.dropout(x, 0.25)
    assert set(np.round(y.detach().numpy(), 5)) == {0, np.float32(1.33333)}
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), y.detach().numpy())
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 1.0).sum() == 0
    assert F.dropout2d(jg.ones(4, 8, 3, 3), 0.5).flatten(2).std(2).max() == 0


# foreach

def test_foreach_is_the_formula_for_every_group():
    def formula(rate, p, g):
        return p - rate * g, (1 - rate) * g

    ps, gs = [jg.randn(3, 2), jg.randn(4), jg.randn(2, dtype=jg.float64)], [jg.randn(3, 2), jg.randn(4),
                                                                             jg.randn(2, dtype=jg.float64)]
    moved, scaled = foreach(formula, [0.1], [ps, gs])
    for p, g, a, b in zip(ps, gs, moved, scaled):
        assert a.dtype is p.dtype and b.dtype is g.dtype
        np.testing.assert_allclose(a.numpy(), (p - 0.1 * g).numpy(), 1e-6)
        np.testing.assert_allclose(b.numpy(), (0.9 * g).numpy(), 1e-6)


def test_foreach_computes_half_precision_in_float32():
    def formula(eps, v):
        return v / ((v * v).sqrt() + eps)

    v = jg.full((2,), 1e-4, dtype=jg.float16)
    assert foreach(formula, [1e-12], [[v]])[0][0].tolist() == [1.0, 1.0]


# counting, special functions

def test_polygamma_is_the_derivative_of_digamma():
    x, step = jg.linspace(0.5, 4, 9, dtype=jg.float64), 1e-6
    for run in (jg.polygamma, jg.compile(jg.polygamma)):
        for n in range(3):
            slope = (run(n, x + step) - run(n, x - step)) / (2 * step)
            np.testing.assert_allclose(run(n + 1, x).numpy(), slope.numpy(), rtol=1e-7)


def test_histc_is_the_histogram_of_numpy():
    x = RNG.normal(size=(40, 5)).astype(np.float32)
    for given, limits in (((6,), None), ((5, -1, 2), (-1, 2))):
        wanted = np.histogram(x, given[0], limits)[0]
        for run in (jg.histc, jg.compile(jg.histc)):
            found = run(jg.tensor(x), *given)
            assert found.dtype is jg.float32 and found.tolist() == wanted.tolist()
    assert jg.histc(jg.full((4,), 3.0), 3).tolist() == [0, 4, 0] and jg.histc(jg.ones(0), 3).tolist() == [0, 0, 0]


def test_unique_gives_elements_slices_places_and_counts():
    x = jg.tensor([[2, 0], [1, 5], [2, 0], [1, 4]])
    values, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    assert values.tolist() == [0, 1, 2, 4, 5] and counts.tolist() == [2, 2, 2, 1, 1]
    assert values[inverse].tolist() == x.tolist()
    rows, inverse, counts = x.unique(return_inverse=True, return_counts=True, dim=0)
    assert rows.tolist() == [[1, 4], [1, 5], [2, 0]] and inverse.tolist() == [2, 1, 2, 0] and counts.tolist() == [1, 1, 2]
    assert len(jg.tensor([math.nan, 1, math.nan]).unique()) == 3


# errors

@pytest.mark.parametrize(("expression", "kind", "words"), [
    ("jg.ones(2, 3) + jg.ones(4)", RuntimeError, r"add: the shapes \[2, 3\] and \[4\] do not broadcast"),
    ("jg.ones(2, 3) @ jg.ones(2, 3)", errors.ShapeError,
     r"matmul: inner dimensions differ: f32\[2, 3\] @ f32\[2, 3\].*x @ w.mT"),
    ("jg.ones(2, 3) @ jg.ones(3, 2).double()", errors.DTypeError, "differ in dtype"),
    ("jg.ones(2, 3).sum(2)", IndexError, r"dimension out of range \(expected to be in \[-2, 1\], but got 2\)"),
    ("jg.ones(2, 3)[2]", IndexError, "index 2 is out of range for dimension 0 with size 2"),
    ("jg.ones(2, 3)[0, 0, 0]", IndexError, "too many indices"),
    ("jg.ones(2, 3)[jg.tensor([0, 2])]", errors.OutOfRangeError, "index 2"),
    ("jg.ones(2, 3)[jg.tensor([0, 1]), jg.tensor([0, 3])]", errors.OutOfRangeError, "out of range"),
    ("jg.ones(2, 3)[::-1]", ValueError, "flip"), ("jg.ones(2, 3).reshape(4)", RuntimeError, "6 elements"),
    ("jg.ones(2, 3).T.view(6)", RuntimeError, "Use reshape"),
    ("jg.arange(3).mean()", errors.DTypeError, r"x.float\(\)"),
    ("jg.ones(2) + 'a'", TypeError, "got str"), ("jg.ones(2) + np.ones(2)", TypeError, "from_numpy"),
    ("jg.zeros(2, -1)", RuntimeError, "negative"), ("jg.ones(0).max()", RuntimeError, "nothing"),
    ("F.dropout(jg.ones(2), 1.5)", ValueError, "between 0 and 1"), ("jg.tensor([[1], [1, 2]])", ValueError, "length"),
    ("jg.where(jg.ones(2), 1, 2)", errors.DTypeError, "condition"), ("F.mse_loss(jg.ones(2), jg.ones(2), 'x')",
                                                                    errors.ShapeError, "reduction"),
    ("jg.ones(2).to('cuda')", errors.DeviceError, "cpu")])
def test_errors(expression, kind, words):
    with pytest.raises(kind, match=words):
        eval(expression)


def test_public_names_exist():
    assert not [name for name in jg.functional.__all__ if not hasattr(jg, name)]
    assert core.from_array is not None


# compiled

def derived(x, y, m):
    """Functions that are made of many others: values, and places."""
    x = x * 2
    x.hypot_(y)
    return [x.scatter_reduce(1, (y.abs() * 10).long() % 3, y, "amax"), x.cummax(2).values, x.quantile(0.3, 1), m.cov()]


def test_compiled_functions_are_the_same():
    def step(x, y, m):
        results = derived(x, y, m)
        total = sum((r * (k + 1)).mean() for k, r in enumerate(results) if r.is_floating_point())
        return [*results, *jg.autograd.grad(total, (x, y, m))]

    given = [jg.tensor(a).requires_grad_() for a in (ARRAYS["x"], ARRAYS["p"], ARRAYS["m"])]
    with jg.config.scope(plain=True):                          # no machine code: this is about what is recorded
        compiled = jg.compile(step, fullgraph=True)(*given)
    for ours, eager in zip(compiled, step(*given), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), eager.detach().numpy(), 1e-9, 1e-9)
