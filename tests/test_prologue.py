"""Elementwise ops in front of a product of many rows: computed where the factor is packed, to the same bits."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from launching import run
from test_gemm import random, region, transposed

import jitgrad as jg
from jitgrad import config, dtypes, ops
from jitgrad.codegen.matmul import lower_matmul
from jitgrad.ir import evaluate
from jitgrad.kernels.cpu import gemm, tile_dot

RANDOM = np.random.default_rng(3)
SIZES = [(25, 40, 33), (60, 1, 7), (29, 600, 70), (300, 257, 100), (64, 64, 1)]
NARROW = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "i8": np.int8}


def narrow(kind, *shape):
    return RANDOM.integers(-127, 128, shape).astype(np.int8) if kind == "i8" else random(*shape).astype(NARROW[kind])


def names(lowered):
    return [launch.name for launch in lowered.launches]


def same_bits(f, make, x, y, *more, plain=False, apart=False):
    """Checks that the region of f(x, make(y, *more)) has the bits of the region of f over what `make` gives, and no kernel
    in front of it that stores that, or one if it is to be computed `apart`."""
    body = region(lambda x, y, *more: f(x, make(y, *more)), x, y, *more)
    lowered = lower_matmul(body)
    assert any(name.startswith("fused_") for name in names(lowered)) == apart, names(lowered)
    made = region(make, y, *more)
    wide = np.ascontiguousarray(evaluate(made, [y, *more])[0])
    (wanted,) = run(lower_matmul(region(f, x, wide)), [x, wide], [v.type for v in body.outputs])
    for pieces in (1, 3):
        (got,) = run(lowered, [x, y, *more], [v.type for v in body.outputs], plain=plain, pieces=pieces)
        assert np.array_equal(got.view("u1"), wanted.view("u1"))


def dequantized(w, scale):
    """Numbers of any narrow type, with a factor for each row."""
    return ops.mul(ops.cast(w, dtype=dtypes.float32), ops.broadcast_to(scale, shape=w.shape))


def linear(x, w):
    return ops.matmul(x, transposed(w))


@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("right", (False, True))
def test_the_second_factor_has_the_bits_of_one_that_was_computed_first(m, k, n, kind, right):
    f = linear if right else ops.matmul
    w = narrow(kind, n, k) if right else narrow(kind, k, n)
    same_bits(f, dequantized, random(m, k), w, random(w.shape[0], 1))


@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("left", (False, True))
def test_the_first_factor_has_the_bits_of_one_that_was_computed_first(m, k, n, left):
    def f(y, x):
        return ops.matmul(transposed(x) if left else x, y)
    same_bits(f, ops.relu, random(k, n), random(k, m) if left else random(m, k))


@pytest.mark.parametrize("left, right", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("dtype", (np.float32, np.float64, ml_dtypes.bfloat16, np.float16))
@pytest.mark.parametrize("pairs", (False, True))
def test_both_factors_of_every_type(left, right, dtype, pairs, monkeypatch):
    if pairs and not tile_dot.has_dot("bf16"):
        pytest.skip("needs AVX512-BF16")
    monkeypatch.setattr(gemm, "has_dot", lambda short: pairs and short == "bf16")
    x, y = random(70, 45).astype(dtype), random(45, 60).astype(dtype)
    x, y = np.ascontiguousarray(x.T) if left else x, np.ascontiguousarray(y.T) if right else y

    def f(a, b):
        return ops.matmul(transposed(a) if left else a, transposed(b) if right else b)
    body = region(lambda a, b: f(ops.abs(a), ops.mul(b, b)), x, y)
    (got,) = run(lower_matmul(body), [x, y], [v.type for v in body.outputs])
    (wanted,) = run(lower_matmul(region(f, np.abs(x), y * y)), [np.abs(x), y * y], [v.type for v in body.outputs])
    assert np.array_equal(got.view("u1"), wanted.view("u1"))


@pytest.mark.parametrize("kind", NARROW)
def test_the_plain_form_means_the_same(kind):
    x, w, scale = (RANDOM.integers(-8, 8, shape).astype("f") for shape in ((30, 67), (35, 67), (35, 1)))
    same_bits(linear, dequantized, x, w.astype(NARROW[kind]), scale, plain=True)


def test_what_is_special_stays_special():
    w = random(40, 64)
    w[3, 5], w[7, 9], w[11, 2] = np.nan, np.inf, -0.0
    same_bits(linear, lambda w: ops.mul(w, w), random(50, 64), w)


def test_operands_in_several_orders():
    """The larger one says in which order elements are computed."""
    x, w, bias = random(50, 64), random(64, 40), random(40, 1)

    def make(w, bias):
        return ops.add(transposed(w), ops.broadcast_to(bias, shape=(40, 64)))
    same_bits(linear, make, x, w, bias)


def test_batches_of_rows_and_of_matrices():
    w, scale = narrow("i8", 40, 64), random(40, 1)

    def spread_out(w):
        return ops.broadcast_to(ops.reshape(w, shape=(1, 64, 40)), shape=(3, 64, 40))

    def spread(x, w):
        return ops.matmul(x, spread_out(transposed(w)))
    same_bits(spread, dequantized, random(3, 20, 64), w, scale)
    same_bits(lambda y, x: spread(x, y), ops.relu, random(40, 64), random(3, 20, 64))
    x, y = random(3, 30, 64), random(3, 64, 40)
    same_bits(lambda x, y: ops.matmul(x, y), lambda y: ops.mul(y, y), x, y, apart=True)


def test_programs_have_no_kernel_in_front():
    x, w = jg.randn(64, 600), jg.randint(-127, 128, (40, 600), dtype=jg.int8)
    scale, zero = jg.rand(40, 1), jg.randint(-9, 9, (40, 1), dtype=jg.int8)
    for f in (lambda x, w, s, z: x @ w.float().T, lambda x, w, s, z: x @ (w.float() * s).T,
              lambda x, w, s, z: x @ ((w.float() - z.float()) * s).T, lambda x, w, s, z: (x * 2).relu() @ w.float().T,
              lambda x, w, s, z: x.reshape(2, 32, 600) @ (w.reshape(40, 6, 100).float() * s[:, :, None]).reshape(40, 600).T):
        compiled = jg.compile(f)
        got = compiled(x, w, scale, zero).numpy()
        with config.scope(disable=True):
            wanted = f(x, w, scale, zero).numpy()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
        kernels = [k.name for k in compiled.kernels]
        assert len(kernels) <= 3 and not any(name.startswith("fused") for name in kernels), kernels


def test_what_is_read_twice_is_computed_once():
    x, y, w = jg.randn(40, 60), jg.randn(50, 60), jg.randint(-127, 128, (30, 60), dtype=jg.int8)
    compiled = jg.compile(lambda x, y, w: (x @ w.float().T, y @ w.float().T))
    compiled(x, y, w)
    assert [k.name for k in compiled.kernels].count("fused_cast_f32") == 1


def test_gradients_and_numbers_of_threads():
    x, w, scale = jg.randn(70, 200), jg.randint(-127, 128, (40, 200), dtype=jg.int8), jg.rand(40, 1)
    x.requires_grad_()
    scale.requires_grad_()

    def step(x, w, s):
        return jg.autograd.grad((x.relu() @ (w.float() * s).T).square().sum(), [x, s])
    results = []
    for threads in (1, 2):
        with config.scope(num_threads=threads):
            results.append([g.numpy() for g in jg.compile(step)(x, w, scale)])
    assert all(map(np.array_equal, *results))
    for got, wanted in zip(results[0], step(x, w, scale), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-3, atol=1e-3 * np.abs(wanted.numpy()).max())


def test_against_torch():
    torch = pytest.importorskip("torch")
    x, w, scale = random(128, 300), narrow("i8", 120, 300), random(120, 1)
    wanted = torch.from_numpy(x) @ (torch.from_numpy(w).float() * torch.from_numpy(scale)).T
    got = jg.compile(lambda x, w, s: x @ (w.float() * s).T)(*map(jg.from_numpy, (x, w, scale)))
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-2)
