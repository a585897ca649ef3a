"""Eager execution of large operands by compiled kernels: the same results as NumPy's, and only where it is meant."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config, native_ops, nn, ops
from jitgrad.errors import ShapeError
from jitgrad.nn import functional as F
from jitgrad.single import overlap

RANDOM = np.random.default_rng(0)


def random(*shape):
    return RANDOM.standard_normal(shape, dtype=np.float32)


def plans():
    info = native_ops._answer.cache_info()
    return info.hits + info.misses


def both_ways(function, *arrays):
    """Results and gradients of `function` by kernels, and by NumPy; and how many ops were carried out by kernels."""
    found = []
    for disable in (False, True):
        with config.scope(disable=disable):
            before = plans()
            inputs = [jg.tensor(a, requires_grad=True) for a in arrays]
            out = function(*inputs)
            (out * jg.tensor(np.cos(np.arange(out.numel(), dtype=np.float32)).reshape(out.shape))).sum().backward()
            found.append(([out.detach().numpy(), *[x.grad.numpy() for x in inputs]], plans() - before))
    return found


CASES = {
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), (8, 32, 17, 17), (32, 32, 3, 3)),
    "strided convolution": (lambda x, w: F.conv2d(x, w, stride=2), (8, 3, 64, 64), (16, 3, 5, 5)),
    "linear": (lambda x, w, b: F.linear(x, w, b), (300, 200), (100, 200), (100,)),
    "linear, three dimensions": (lambda x, w, b: F.linear(x, w, b), (3, 100, 200), (100, 200), (100,)),
    "product with a transpose": (lambda x, y: x.T @ y.mT, (300, 200), (100, 300)),
    "batched product": (lambda x, y: x @ y.transpose(1, 2), (8, 60, 70), (8, 80, 70)),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *[(2, 4, 70, 64)] * 3),
    "pooling": (lambda x: F.max_pool2d(x, 3, 2), (8, 16, 33, 33)),
    "gelu": (lambda x: F.gelu(x), (300, 301)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (301,), w, b), (300, 301), (301,), (301,)),
    "batch norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (8, 16, 33, 33), (16,), (16,)),
    "softmax": (lambda x: F.softmax(x, 1), (300, 301)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_numpy(name):
    function, *shapes = CASES[name]
    (ours, used), (numpys, unused) = both_ways(function, *[random(*shape) for shape in shapes])
    assert used > 0 and unused == 0
    for got, wanted in zip(ours, numpys, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def special_values():
    """Zeros of both signs, infinities, NaN, denormals, and numbers."""
    numbers = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 1.5, -2.5], np.float32)
    return np.resize(numbers, (600, 500)), np.resize(np.roll(np.tile(numbers, 2), 4), (500, 600)).T


@pytest.mark.parametrize(("x", "y"), [
    (random(600, 500), random(600, 500)), (random(600, 500), np.broadcast_to(random(500), (600, 500))),
    (random(500, 600).T, random(600, 500)), (random(600, 3, 500)[:, 1], random(600, 500)),
    (random(30, 500, 20).transpose(2, 0, 1), np.broadcast_to(random(30, 1), (20, 30, 500))),
    (np.broadcast_to(np.float32(2), (600, 500)), random(600, 500)),
    (random(600, 500)[::-1], random(600, 500)), special_values()],
    ids=["dense", "row", "transposed", "part", "three dimensions", "number", "reversed", "special"])
def test_exact_elementwise_ops_take_operands_as_they_lie(x, y):
    for op in (ops.add, ops.sub, ops.mul, ops.div, ops.neg, ops.abs, ops.sqrt, ops.relu):
        given = [jg.Tensor(x), jg.Tensor(y)][:len(op.operands)]
        with np.errstate(invalid="ignore"):
            wanted = op.eager(*[x, y][:len(op.operands)])
        for _ in range(3):                                   # NumPy makes the first one
            found = op(*given).numpy()
            np.testing.assert_array_equal(found, wanted)
            np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def test_small_operands_and_narrow_floats_go_to_numpy():
    before = plans()
    jg.randn(20, 30) @ jg.randn(30, 20)
    assert plans() == before
    x = np.ones((300, 300), np.float16)
    assert native_ops.carry_out(ops.matmul, [x, x], {}) is None


@pytest.mark.parametrize("shape", ((300, 400), (3, 4)), ids=("large", "small"))
@pytest.mark.parametrize("optimizer", (jg.optim.AdamW, jg.optim.SGD, jg.optim.RMSprop))
def test_an_optimizer_step_writes_in_place(optimizer, shape, monkeypatch):
    """To the last bit what NumPy gives, so that it does not matter when kernels take over."""
    monkeypatch.setattr(native_ops, "OFTEN", 1)
    weights = [random(*shape), random(shape[-1])]
    found = []
    for disable in (False, True):
        with config.scope(disable=disable):
            parameters = [nn.Parameter(jg.tensor(w)) for w in weights]
            memory = [p.data_ptr() for p in parameters]
            steps, before = optimizer(parameters, lr=0.1), plans()
            for k in range(3):
                for p in parameters:
                    p.grad = jg.tensor(np.sin(np.arange(p.numel(), dtype=np.float32) + k).reshape(p.shape))
                steps.step()
            assert (plans() > before) is not disable
            assert [p.data_ptr() for p in parameters] == memory
            found.append([p.detach().numpy().copy() for p in parameters])
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_operands_that_share_memory_are_not_rewritten_by_kernels():
    memory = random(2, 200, 300)
    spans = [(a.__array_interface__["data"][0], a.nbytes) for a in (memory[0], memory[1], memory)]
    assert not overlap(spans[:2]) and overlap(spans[1:]) and not overlap(spans[:1])


def test_wrong_operands_are_the_same_errors():
    with pytest.raises(ShapeError, match="inner dimensions differ"):
        jg.randn(300, 400) @ jg.randn(300, 400)
    with pytest.raises(ShapeError, match="larger than the padded input"):
        F.conv2d(jg.randn(8, 64, 9, 20), jg.randn(64, 64, 11, 11))
