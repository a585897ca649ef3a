"""scaled_dot_product_attention: against the composition in NumPy, gradients to second order, dropout, half precision,
memory, what is refused."""

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
    for m in [np.tri(*scores.shape[-2:], dtype=bool)] * is_causal + [mask] * (mask is not None):
        scores = np.where(m, scores, -np.inf) if m.dtype == bool else scores + m
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300) @ v


SHAPES = {"one head": ((70, 16), (90, 16), (90, 8)), "batch and heads": ((2, 3, 150, 16),) * 3,
          "other lengths": ((2, 33, 16), (2, 300, 16), (2, 300, 24))}
MASKS = {"rows": (33, 40), "heads": (8, 33, 40), "batch": (2, 1, 33, 40), "keys": (2, 1, 1, 40), "full": (2, 8, 33, 40),
         "queries": (33, 1), "runs in turn": (2, 1, 8, 33, 40), "in between": (3, 1, 1, 40)}


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
    batch = (2, 8) if len(shape) < 5 and shape[0] != 3 else (2, 3, 8)
    q, k, v = data(*batch, 33, 16), data(*batch, 40, 16, seed=1), data(*batch, 40, 16, seed=2)
    mask = np.random.default_rng(0).random(shape) < 0.6
    if shape[-1] > 1:
        mask[..., 0, :] = False                       # those see nothing, and get zeros
    given = mask if kind == "bool" else np.where(mask, data(*shape, seed=5), np.float32(-np.inf))
    for is_causal in (False, True):
        found = F.scaled_dot_product_attention(jg.tensor(q), jg.tensor(k), jg.tensor(v), jg.tensor(given), 0.0, is_causal)
        np.testing.assert_allclose(found.numpy(), composed(q, k, v, given, is_causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
def test_a_query_that_sees_nothing_gets_zeros_and_gradients_of_zero(learned, compiled):
    q, k, v = [jg.tensor(data(2, 5, 4, seed=n), requires_grad=True) for n in range(3)]
    mask = jg.tensor(np.where(np.arange(5)[:, None] == 2, -np.inf, data(5, 5, seed=3)).astype("f"), requires_grad=learned)
    step = lambda q, k, v, m: (out := F.scaled_dot_product_attention(q, k, v, m), *jg.autograd.grad(out.sum(), (q, k, v)))
    out, *slopes = (jg.compile(step) if compiled else step)(q, k, v, mask)
    np.testing.assert_allclose(out.numpy(force=True), composed(*[x.numpy(force=True) for x in (q, k, v, mask)]), rtol=1e-4,
                               atol=1e-5)
    assert all(np.isfinite(s.numpy()).all() for s in slopes)
    np.testing.assert_array_equal(slopes[0].numpy()[:, 2], 0)


EXPANDED = {"of batch": ((1, 3), (1, 3)), "of heads": ((2, 1), (2, 1)), "one for all": ((1, 1), (1, 1)),
            "fewer dimensions": ((3,), (2, 3)), "of the value alone": ((2, 3), (2, 1))}


@pytest.mark.parametrize("written", [False, True], ids=["the function", "written out"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("batches", EXPANDED.values(), ids=EXPANDED)
def test_keys_that_many_heads_share_by_broadcasting(batches, compiled, written):
    """Expanded by the user as well: compiled attention reads them where they lie."""
    arrays = data(2, 3, 20, 16), data(*batches[0], 150, 16, seed=1), data(*batches[1], 150, 16, seed=2)
    q, k, v = [jg.tensor(a, requires_grad=True) for a in arrays]

    def step(q, k, v):
        scores = q @ k.transpose(-1, -2) / 4
        out = scores.softmax(-1) @ v if written else F.scaled_dot_product_attention(q, k, v)
        again = F.scaled_dot_product_attention(q, k.expand(2, 3, 150, 16), v.expand(2, 3, 150, 16))
        slopes = [jg.autograd.grad((x * x).sum(), (q, k, v)) for x in (out, again)]
        return out, again, *slopes[0], *slopes[1]

    exact = composed(arrays[0], *[np.broadcast_to(a, (2, 3, 150, 16)) for a in arrays[1:]])
    out, again, *slopes = [t.numpy(force=True) for t in (jg.compile(step) if compiled else step)(q, k, v)]
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again, exact, rtol=1e-4, atol=1e-5)
    copies = [jg.tensor(np.broadcast_to(a, (2, 3, *a.shape[-2:])), requires_grad=True) for a in arrays]
    attended = F.scaled_dot_product_attention(*copies)
    for slope, other, array, whole in zip(slopes[:3], slopes[3:], arrays, jg.autograd.grad((attended ** 2).sum(), copies)):
        shared = tuple([k for k, n in enumerate((1,) * (4 - array.ndim) + array.shape) if n == 1])
        wanted = whole.numpy().sum(shared).reshape(array.shape)
        np.testing.assert_allclose(slope, wanted, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other, wanted, rtol=1e-3, atol=1e-5)


def test_no_keys_give_zeros():
    q, k = jg.ones(2, 3, 4), jg.ones(2, 0, 4)
    np.testing.assert_array_equal(F.scaled_dot_product_attention(q, k, k).numpy(), np.zeros((2, 3, 4)))


def test_grouped_queries():
    q, k, v = data(2, 8, 33, 16), data(2, 2, 40, 16, seed=1), data(2, 2, 40, 16, seed=2)
    found = F.scaled_dot_product_attention(jg.tensor(q), jg.tensor(k), jg.tensor(v), enable_gqa=True)
    np.testing.assert_allclose(found.numpy(), composed(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["all", "causal", "mask", "dropout", "mask, causal, dropout"])
def test_gradients_to_second_order(way):
    xs = [data(2, 3, 2, dtype=np.float64), data(1, 4, 2, seed=1, dtype=np.float64), data(1, 4, 3, seed=2, dtype=np.float64)]
    more = [jg.tensor(data(2, 1, 4, seed=3, dtype=np.float64))] if "mask" in way else []
    if "dropout" in way:
        more += [jg.tensor(5), jg.tensor(6), jg.tensor(0.3), jg.tensor(1 / 0.7, dtype=jg.float64)]
    directions = [data(*x.shape, seed=7 + n, dtype=np.float64) for n, x in enumerate(xs)]

    def total(*tensors):
        out, _ = jg.ops.attention(*tensors, *more, causal="causal" in way, zero=False)
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


@pytest.mark.cpu
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


# ---- dropout -----------------------------------------------------------------------------------------------------------


def written_out(q, k, v, mask=None, p=0.0):
    """The composition, on tensors: with an equal seed `F.dropout` drops the same weights."""
    times = q.shape[-3] // k.shape[-3]
    scores = q @ k.repeat_interleave(times, -3).mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1), p) @ v.repeat_interleave(times, -3)


def gradients(attend, arrays, g, compiled):
    """The result of `attend` after the same seed, and the gradients of its operands."""
    def step(*tensors):
        out = attend(*tensors)
        return out, *jg.autograd.grad((out * jg.tensor(g)).sum(), tensors)

    jg.manual_seed(11)
    tensors = [jg.tensor(x, requires_grad=True) for x in arrays]
    return [t.numpy(force=True) for t in (jg.compile(step) if compiled else step)(*tensors)]


DRAWN = np.random.default_rng(3)
RAGGED = [tuple(int(n) for n in DRAWN.integers(1, (3, 4, 140, 300, 40, 40))) for _ in range(4)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sizes", RAGGED, ids=map(str, RAGGED))
def test_dropout_is_that_of_the_composition(sizes, compiled):
    """Causal, with another mask, heads that share keys and dropout together, over several blocks of ragged sizes."""
    n, heads, length, source, width, values = sizes
    arrays = [data(n, 2 * heads, length, width), data(n, heads, source, width, seed=1),
              data(n, heads, source, values, seed=2)]
    g = data(n, 2 * heads, length, values, seed=3)
    seen = jg.tensor(np.tri(length, source, dtype=bool) & (data(length, source, seed=4) < 1.0))
    seen[:, 0] = True
    blockwise = gradients(lambda *x: F.scaled_dot_product_attention(*x, seen, 0.3, enable_gqa=True), arrays, g, compiled)
    expected = gradients(lambda *x: written_out(*x, seen, 0.3), [x.astype(np.float64) for x in arrays], g, False)
    for a, b in zip(blockwise, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_dropout_keeps_the_mean():
    """With the identity for values the weights themselves come out: 1 / S each before dropout."""
    q, k, v = jg.zeros(8, 300, 16), jg.zeros(8, 250, 16), jg.eye(250).expand(8, 250, 250)
    for p in (0.1, 0.75):
        weights = F.scaled_dot_product_attention(q, k, v, dropout_p=p).numpy() * 250
        kept = weights > 0
        np.testing.assert_allclose(weights[kept], 1 / (1 - p), rtol=1e-5)
        deviation = (p * (1 - p) / kept.size) ** 0.5
        assert abs(kept.mean() - (1 - p)) < 5 * deviation
        for axis in range(3):                         # nothing repeats along heads, queries or keys
            shifted = np.roll(kept, 1, axis)
            assert abs((kept & shifted).mean() - (1 - p) ** 2) < 10 * deviation


def test_dropout_of_everything_and_of_nothing():
    x = jg.tensor(data(2, 5, 4))
    assert not F.scaled_dot_product_attention(x, x, x, dropout_p=1.0).any()
    before = jg.get_rng_state()
    whole = F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)
    assert jg.get_rng_state() == before and jg.equal(whole, F.scaled_dot_product_attention(x, x, x))


def test_threads_change_no_bit():
    q, k, v = [jg.tensor(data(3, 333, 20, seed=n), requires_grad=True) for n in range(3)]

    @jg.compile
    def step(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True)
        return out, *jg.autograd.grad((out * out).sum(), (q, k, v))

    results = []
    for count in (1, 2, 5):
        jg.manual_seed(0)
        with jg.config.scope(num_threads=count):
            results.append([t.numpy(force=True) for t in step(q, k, v)])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.cpu
def test_memory_with_dropout_grows_as_the_length():
    """Twice as many tokens need twice the memory, in training as in the forward pass alone."""
    peaks = []
    for length in (512, 1024):
        step = jg.compile(lambda *x: jg.autograd.grad(F.scaled_dot_product_attention(*x, dropout_p=0.1).sum(), x))
        step(*[jg.tensor(data(2, length, 16, seed=n), requires_grad=True) for n in range(3)])
        peaks.append(step.plan.memory.peak)
        assert "attention_grad_f32" in [kernel.name for kernel in step.kernels]
    assert peaks[1] < 2.1 * peaks[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_layers_drop_in_the_kernel(compiled):
    """In training no kernel of a Transformer's layer has the matrix of scores, [2, 4, 70, 70]; compiled and eager drop
    the same weights."""
    layer = jg.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.25, batch_first=True)
    x = jg.tensor(data(2, 70, 32))

    def step(x):
        layer.zero_grad()
        out = layer(x)
        (out * out).sum().backward()
        return out

    results = []
    for function in (step, jg.compile(step)):
        jg.manual_seed(7)
        results.append([function(x).numpy(force=True), *[p.grad.numpy() for p in layer.parameters()]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    compiled = jg.compile(step)
    compiled(x)
    sizes = [v.type.size for node in compiled.plan.graph.nodes for v in node.outputs]
    assert max(sizes) < 2 * 4 * 70 * 70
    with pytest.raises(ValueError, match="probability"):
        F.scaled_dot_product_attention(x, x, x, dropout_p=1.5)


# ---- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [jg.float16, jg.bfloat16], ids=["f16", "bf16"])
def test_half_precision_is_rounded_once(dtype, compiled):
    wide = [jg.tensor(data(2, 90, 24, seed=n)).to(dtype) for n in range(3)]
    exact = composed(*[t.float().numpy() for t in wide], is_causal=True)
    tensors = [t.requires_grad_() for t in wide]

    def step(*tensors):
        out = F.scaled_dot_product_attention(*tensors, is_causal=True)
        return out, *jg.autograd.grad(out.float().sum(), tensors)

    compiled_step = jg.compile(step)
    out, *slopes = (compiled_step if compiled else step)(*tensors)
    assert out.dtype is dtype and all(s.dtype is dtype for s in slopes)
    unit = 2.0 ** (-10 if dtype is jg.float16 else -7)
    assert np.all(np.abs(out.float().numpy(force=True) - exact) <= 0.51 * unit * np.abs(exact) + 1e-5)
    again = [t.detach().float().requires_grad_() for t in wide]
    for mine, single in zip(slopes, step(*again)[1:], strict=True):
        single = single.numpy()
        np.testing.assert_allclose(mine.float().numpy(), single, rtol=unit, atol=unit * np.abs(single).max())
    if compiled and out.is_cpu:
        assert "attention_f32" in [kernel.name for kernel in compiled_step.kernels]


@pytest.mark.parametrize("call, message", [
    (lambda x, mask: F.scaled_dot_product_attention(x[0, 0], x, x), "at least 2 dimensions"),
    (lambda x, mask: F.scaled_dot_product_attention(x, jg.ones(3, 3, 4), jg.ones(3, 3, 4), enable_gqa=True), "same heads"),
    (lambda x, mask: F.scaled_dot_product_attention(x, jg.ones(3, 3, 4), jg.ones(3, 3, 4)), "attention.*broadcast"),
    (lambda x, mask: F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:2]), "the mask"),
    (lambda x, mask: F.scaled_dot_product_attention(x, x, x, dropout_p=-0.1), "probability"),
    (jg.compile(lambda x, mask: jg.ops.attention(x, x, x, mask, mask, causal=False, zero=False)), "the four of dropout"),
    (jg.compile(lambda x, mask: jg.ops.attention(x, x, x, mask, mask, x, x, causal=False, zero=False)), "key i64"),
    (lambda x, mask: jg.ops.attention(x, x[:, :2], x, causal=False, zero=False), "attention")])
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(jg.tensor(data(2, 3, 4)), jg.ones(3, 3, dtype=jg.bool))
