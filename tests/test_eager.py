"""Eager execution at size: blocks and threads give what NumPy gives at once; updates of many tensors are one pass."""

from __future__ import annotations

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional as F
from jitgrad import dtypes, ops
from jitgrad.errors import DivisionByZeroError
from jitgrad.functional.foreach import foreach
from jitgrad.ops import blocks

LARGE = blocks.PASS + blocks.SHARED + 7            # several threads, and a last block that is not full


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request, monkeypatch):
    monkeypatch.setattr(blocks, "_limit", lambda: request.param)


def large(dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(LARGE) * 9 + 1).astype(dtype)


@pytest.mark.parametrize(("op", "reference", "arguments"), [
    (ops.add, np.add, [large(), large(seed=1)]),
    (ops.sqrt, np.sqrt, [large()]),
    (ops.sigmoid, lambda x: 1 / (1 + np.exp(-x)), [large()]),
    (ops.lt, np.less, [large(), large(seed=1)]),
    (ops.where, np.where, [large() > 5, large(), large(seed=1)]),
    (ops.mul, np.multiply, [large("int64"), large("int64", 1)]),
    (ops.mul, np.multiply, [large()[::-1], large()]),
    (ops.mul, np.multiply, [np.broadcast_to(np.float32(3), (LARGE,)), large()]),
    (ops.mul, np.multiply, [np.broadcast_to(np.float32(3), (LARGE,))] * 2),
], ids=["add", "sqrt", "sigmoid", "lt", "where", "int", "strided", "one value", "only one value"])
def test_large_elementwise(op, reference, arguments):
    result = op(*[jg.from_numpy(x) if x.flags.writeable else jg.Tensor(x) for x in arguments]).numpy()
    expected = reference(*arguments)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)
    assert result.flags.writeable
    assert not any(np.shares_memory(result, x) for x in arguments)


def test_large_shapes_are_kept():
    x = jg.from_numpy(large()[:LARGE - LARGE % 8].reshape(-1, 8))
    assert (x * x).shape == x.shape


def test_a_failure_in_a_block_is_raised():
    x, y = large("int64"), large("int64", 1)
    y[-1] = 0
    with pytest.raises(DivisionByZeroError):
        jg.from_numpy(x) // jg.from_numpy(y)


def test_nothing_warns(recwarn):
    assert (jg.from_numpy(large()) / 0).isinf().all()
    assert not recwarn.list


def formula(rate, p, g, scale):
    g = g * scale
    return p - rate * g, g * g, p


@pytest.mark.parametrize("sizes", [(3, 4, 0, 5), (LARGE, 3, 5), ((), (), ()), ((2, 3), (4,), ())],
                         ids=["small", "large", "scalars", "shapes"])
@pytest.mark.parametrize("scales", ["equal", "different"])
def test_foreach(sizes, scales):
    rng = np.random.default_rng(0)
    shapes = [(n,) if isinstance(n, int) else n for n in sizes]
    p, g = ([np.asarray(rng.normal(size=s), np.float32) for s in shapes] for _ in range(2))
    scale = [np.array(2.0 if scales == "equal" else 2.0 + k, np.float32) for k in range(len(shapes))]
    before = [x.copy() for x in p]
    results = foreach(formula, [0.5], [[jg.from_numpy(x) for x in xs] for xs in (p, g, scale)])
    for k, (new, square, same) in enumerate(zip(*results)):
        scaled = g[k] * scale[k]
        for got, expected in ((new, p[k] - np.float32(0.5) * scaled), (square, scaled * scaled), (same, p[k])):
            assert got.shape == p[k].shape
            assert got.dtype is dtypes.float32
            np.testing.assert_array_equal(got.numpy(), expected)
        assert not np.shares_memory(same.numpy(), p[k])
        np.testing.assert_array_equal(p[k], before[k])


def test_choosing_between_one_element_and_another_at_size():
    mask = np.arange(LARGE) % 3 == 0
    found = jg.where(jg.tensor(mask), jg.tensor(2.0).expand(LARGE), jg.tensor(-1.0).expand(LARGE))
    np.testing.assert_array_equal(found.numpy(), np.where(mask, 2.0, -1.0))
    x = jg.tensor(np.where(mask, 30.0, 1.0), requires_grad=True)
    F.softplus(x).sum().backward()                     # the gradient of a sum is one element for all
    np.testing.assert_allclose(x.grad.numpy(), 1 / (1 + np.exp(-x.detach().numpy())), 1e-12)
