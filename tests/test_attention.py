"""scaled_dot_product_attention: against the composition in NumPy, gradients to second order, memory, what is refused."""

import tracemalloc

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional as F


def data(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def composed(q, k, v, mask=None, is_causal=False, scale=None):
    """The definition, in float64."""
    q, k, v = [x.astype(np.float64) for x in (q, k, v)]
    times = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    if times > 1:
        k, v = np.repeat(k, times, -3), np.repeat(v, times, -3)
    scores = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = np.tri(*scores.shape[-2:], dtype=bool)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) @ v


SHAPES = {"one head": ((70, 16), (90, 16), (90, 8)), "batch and heads": ((2, 3, 150, 16),) * 3,
          "other lengths": ((2, 33, 16), (2, 300, 16), (2, 300, 24))}
MASKS = {"rows": (33, 40), "heads": (8, 33, 40), "batch": (2, 1, 33, 40), "keys": (2, 1, 1, 40), "full": (2, 8, 33, 40),
         "queries": (33, 1)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values(shapes, is_causal, compiled):
    function = jg.compile(F.scaled_dot_product_attention) if compiled else F.scaled_dot_product_attention
    q, k, v = [data(*shape, seed=n) for n, shape in enumerate(shapes)]
    for scale in (None, 0.3):
        found = function(jg.tensor(q), jg.tensor(k), jg.tensor(v), is_causal=is_causal, scale=scale)
        np.testing.assert_allclose(found.numpy(), composed(q, k, v, is_causal=is_causal, scale=scale), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks(shape, kind):
    q, k, v = data(2, 8, 33, 16), data(2, 8, 40, 16, seed=1), data(2, 8, 40, 16, seed=2)
    mask = np.random.default_rng(0).random(shape) < 0.6
    if shape[-1] > 1 and kind == "bool":
        mask[..., 0, :] = False                       # those see nothing, and get zeros
    given = mask if kind == "bool" else data(*shape, seed=5)
    found = F.scaled_dot_product_attention(jg.tensor(q), jg.tensor(k), jg.tensor(v), attn_mask=jg.tensor(given))
    np.testing.assert_allclose(found.numpy(), composed(q, k, v, given), rtol=1e-4, atol=1e-5)


def test_grouped_queries():
    q, k, v = data(2, 8, 33, 16), data(2, 2, 40, 16, seed=1), data(2, 2, 40, 16, seed=2)
    found = F.scaled_dot_product_attention(jg.tensor(q), jg.tensor(k), jg.tensor(v), enable_gqa=True)
    np.testing.assert_allclose(found.numpy(), composed(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["all", "causal", "mask"])
def test_gradients_to_second_order(way):
    xs = [data(2, 3, 2, dtype=np.float64), data(1, 4, 2, seed=1, dtype=np.float64), data(1, 4, 3, seed=2, dtype=np.float64)]
    mask = [data(2, 1, 4, seed=3, dtype=np.float64)] if way == "mask" else []
    directions = [data(*x.shape, seed=7 + n, dtype=np.float64) for n, x in enumerate(xs)]

    def total(*tensors):
        out, _ = jg.ops.attention(*tensors, *map(jg.tensor, mask), causal=way == "causal", zero=False)
        return (out * out.cos()).sum()

    def slope(*arrays):
        tensors = [jg.tensor(a, requires_grad=True) for a in arrays]
        found = jg.autograd.grad(total(*tensors), tensors, create_graph=True)
        return tensors, sum((g * jg.tensor(d)).sum() for g, d in zip(found, directions, strict=True))

    def moved(amount):
        return [x + amount * d for x, d in zip(xs, directions, strict=True)]

    step = 1e-5
    tensors, along = slope(*xs)
    values = [float(total(*map(jg.tensor, moved(amount)))) for amount in (step, -step)]
    assert float(along) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    second = jg.autograd.grad(along, tensors)
    curvature = sum(float((g * jg.tensor(d)).sum()) for g, d in zip(second, directions, strict=True))
    difference = (float(slope(*moved(step))[1]) - float(slope(*moved(-step))[1])) / (2 * step)
    assert curvature == pytest.approx(difference, rel=1e-5)


def test_gradients_are_those_of_the_composition():
    """Compiled, over several blocks of queries and keys, with heads that share keys."""
    q, k, v, g = data(4, 130, 16), data(2, 200, 16, seed=1), data(2, 200, 16, seed=2), data(4, 130, 16, seed=3)

    def gradients(attend):
        tensors = [jg.tensor(x, requires_grad=True) for x in (q, k, v)]
        (attend(*tensors) * jg.tensor(g)).sum().backward()
        return [t.grad.numpy() for t in tensors]

    def written_out(q, k, v):
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = q @ k.mT * 0.25
        scores = jg.where(jg.ones(130, 200, dtype=jg.bool).tril(), scores, float("-inf"))
        return scores.softmax(-1) @ v

    blockwise = jg.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    for a, b in zip(gradients(blockwise), gradients(written_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_memory_is_linear_in_the_length():
    """The scores of 2,048 tokens alone would be eight times as much as all operands and results."""
    def step(q, k, v):
        return jg.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))

    tensors = [jg.tensor(data(4, 2048, 32, seed=n), requires_grad=True) for n in range(3)]
    compiled = jg.compile(step)
    compiled(*tensors)
    nbytes = sum(t.numpy(force=True).nbytes for t in tensors)
    assert compiled.plan.memory.peak < 6 * nbytes
    tracemalloc.start()
    step(*tensors)
    assert tracemalloc.get_traced_memory()[1] < 10 * nbytes      # in NumPy, by blocks of 512 queries
    tracemalloc.stop()


def test_a_mask_that_wants_a_gradient_gets_one():
    q, mask = jg.tensor(data(3, 4)), jg.tensor(data(3, 3, seed=1), requires_grad=True)
    (F.scaled_dot_product_attention(q, q, q, attn_mask=mask) ** 2).sum().backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0


@pytest.mark.parametrize("call, message", [
    (lambda x, mask: F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=True), "either attn_mask"),
    (lambda x, mask: F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:2]), "the mask"),
    (lambda x, mask: jg.ops.attention(x, x[:, :2], x, causal=False, zero=False), "attention")])
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(jg.tensor(data(2, 3, 4)), jg.ones(3, 3, dtype=jg.bool))
