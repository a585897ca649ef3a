"""Attention inside of a block, compiled: it reads parts of one product, and writes their gradient, where they lie."""

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional as F


def data(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def mixed(x, heads, is_causal, scale=None, split=False):
    """What a transformer's block does with its product [batch, tokens, 3 * width], in both usual ways."""
    batch, tokens, width = x.shape[0], x.shape[1], x.shape[2] // 3
    if split:
        q, k, v = [part.view(batch, tokens, heads, width // heads).transpose(1, 2) for part in x.split(width, dim=2)]
    else:
        q, k, v = x.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2).reshape(batch, tokens, width)


def block(heads, is_causal, scale=None, split=False):
    """A function of x, weight, bias and what comes in backward: the result, and the gradients of the first three."""
    def run(x, weight, bias, g):
        out = mixed(x @ weight + bias, heads, is_causal, scale, split)
        return out, *jg.autograd.grad((out * g).sum(), (x, weight, bias))

    return run


def operands(batch, tokens, width, dtype):
    shapes = (batch, tokens, 16), (16, 3 * width), (3 * width,), (batch, tokens, width)
    arrays = [data(*shape, seed=k).astype(dtype) for k, shape in enumerate(shapes)]
    return [jg.tensor(a, requires_grad=k < 3) for k, a in enumerate(arrays)]


def in_float64(x, weight, bias, g, heads, is_causal, scale=None):
    """The same by NumPy, gradients included."""
    x, weight, bias, g = [t.numpy(force=True).astype(np.float64) for t in (x, weight, bias, g)]
    batch, tokens, width = g.shape
    product = x @ weight + bias
    q, k, v = product.reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scale = (width // heads) ** -0.5 if scale is None else scale
    scores = q @ k.swapaxes(-1, -2) * scale
    if is_causal:
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    dout = g.reshape(batch, tokens, heads, -1).swapaxes(1, 2)
    dweights = dout @ v.swapaxes(-1, -2)
    slopes = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * scale
    gradients = np.stack([slopes @ k, slopes.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dout])
    joined = gradients.transpose(1, 3, 0, 2, 4).reshape(product.shape)
    return (out.swapaxes(1, 2).reshape(g.shape), joined @ weight.T,
            np.einsum("bti,btj->ij", x, joined), joined.sum((0, 1)))


CASES = {"short": (4, 64, 6, 48), "one token": (9, 1, 2, 16), "odd": (3, 71, 3, 15), "long": (2, 300, 4, 32),
         "few heads": (1, 260, 2, 16)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_block(case, is_causal, dtype):
    batch, tokens, heads, width = case
    given = operands(batch, tokens, width, dtype)
    for scale, split in ((None, False), (-0.3, False), (-0.3, True), (1.0, True)):
        function = block(heads, is_causal, scale, split)
        compiled = jg.compile(function)
        wanted = in_float64(*given, heads, is_causal, scale)
        for found, exact in zip(compiled(*given), wanted, strict=True):
            tolerance = 1e-4 if dtype is np.float32 else 1e-12
            np.testing.assert_allclose(found.numpy(force=True), exact, rtol=tolerance, atol=tolerance * np.abs(exact).max())


@pytest.mark.cpu
@pytest.mark.parametrize("split", [False, True], ids=["reshaped", "split"])
def test_nothing_is_copied(split):
    """The parts of the product are read, and all results written where they are wanted, by attention itself."""
    compiled = jg.compile(block(6, False, None, split))
    compiled(*operands(4, 64, 48, np.float32))
    names = [k.name for step in compiled.plan.steps for k in step.kernels]
    assert {"attention_f32", "attention_grad_f32"} <= set(names)
    assert not [n for n in names if n.startswith(("fused_slice", "fused_permute", "copy", "fused_mul", "fused_add_f32"))]
    kinds = [step.kind for step in compiled.plan.steps]
    assert "concat" not in kinds
    assert kinds.count("attention") == 2


@pytest.mark.cpu
def test_any_number_of_threads_gives_the_same():
    given = operands(4, 130, 48, np.float32)
    compiled = jg.compile(block(6, True))
    found = []
    for threads in (1, 2, 3):
        with jg.config.scope(num_threads=threads):
            found.append([t.numpy(force=True) for t in compiled(*given)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_parts_that_others_read_too():
    """A query that is also a result, gradients that are also results: they are made as well."""
    def function(x, g):
        parts = x.reshape(4, 10, 3, 6, 8).permute(2, 0, 3, 1, 4)
        q, k, v = [p * 1.0 for p in parts.unbind(0)]
        out = F.scaled_dot_product_attention(q, k, v)
        dq, dk, dv = jg.autograd.grad((out * g).sum(), (q, k, v))
        return out, q, dk, jg.stack([dq, dk, dv])

    x, g = jg.tensor(data(4, 10, 144).astype("f"), requires_grad=True), jg.tensor(data(4, 6, 10, 8, seed=1).astype("f"))
    for found, wanted in zip(jg.compile(function)(x, g), function(x, g), strict=True):
        np.testing.assert_allclose(found.numpy(force=True), wanted.numpy(force=True), rtol=1e-4, atol=1e-5)


def test_dropout_and_mask_with_parts_in_place():
    """With both behind them the operands still are what they are, and what is dropped stays the same."""
    def function(x, mask, g):
        q, k, v = x.reshape(4, 10, 3, 6, 8).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.3)
        return out, *jg.autograd.grad((out * g).sum(), (x,))

    x, g = jg.tensor(data(4, 10, 144).astype("f"), requires_grad=True), jg.tensor(data(4, 6, 10, 8, seed=1).astype("f"))
    mask, compiled = jg.tensor(data(4, 6, 10, 10, seed=2).astype("f")), jg.compile(function)
    for run in (compiled, compiled, function):
        jg.manual_seed(3)
        found = [t.numpy(force=True) for t in run(x, mask, g)]
        for a, b in zip(found, [t.numpy(force=True) for t in (jg.manual_seed(3), function(x, mask, g))[1]], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_against_torch():
    torch = pytest.importorskip("torch")
    given = operands(4, 64, 48, np.float32)
    theirs = [torch.tensor(t.numpy(force=True), requires_grad=t.requires_grad) for t in given]
    x, weight, bias, g = theirs
    q, k, v = (x @ weight + bias).reshape(4, 64, 3, 6, 8).permute(2, 0, 3, 1, 4).unbind(0)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(g.shape)
    wanted = out, *torch.autograd.grad((out * g).sum(), (x, weight, bias))
    for found, one in zip(jg.compile(block(6, True))(*given), wanted, strict=True):
        np.testing.assert_allclose(found.numpy(force=True), one.detach().numpy(), rtol=1e-3, atol=1e-3)
