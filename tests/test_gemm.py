"""Matrix products: the core for all layouts and sizes, and regions of a product with what follows it."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from launching import address, run

from jitgrad import dtypes, ops
from jitgrad.codegen.matmul import lower_matmul
from jitgrad.dtypes import from_numpy
from jitgrad.ir import GraphBuilder, TensorType, evaluate
from jitgrad.kernels.cpu import gemm, tile

RANDOM = np.random.default_rng(0)
SIZES = [(1, 1, 1), (2, 3, 1), (1, 7, 40), (13, 17, 31), (14, 16, 32), (15, 33, 33), (28, 5, 64), (29, 400, 63),
         (97, 53, 101), (32, 64, 10), (200, 385, 129)]


def random(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def type_of(array):
    return TensorType(from_numpy(array.dtype), array.shape)


def region(function, *arrays):
    """The body of a region: `function` of values traced over the types of `arrays`."""
    builder = GraphBuilder("region")
    inputs = [builder.input(type_of(a)) for a in arrays]
    with builder:
        outputs = function(*inputs)
    return builder.build(outputs if isinstance(outputs, tuple) else (outputs,))


def check(function, *arrays, shared=(), launches=None, tolerance=None, plain=False, pieces=1):
    body = region(function, *arrays)
    lowered = lower_matmul(body, shared)
    wanted = evaluate(body, arrays)
    if launches is not None:
        assert len(lowered.launches) == launches
    got = run(lowered, [a.copy() for a in arrays], [v.type for v in body.outputs], shared=shared, plain=plain,
              pieces=pieces)
    for x, y in zip(got, wanted, strict=True):
        limit = tolerance or {"float64": 1e-12, "float32": 2e-4}.get(x.dtype.name, 5e-2)
        np.testing.assert_allclose(x.astype("d"), y.astype("d"), rtol=limit, atol=limit)
    return lowered, got


def transposed(x):
    n = len(x.shape)
    return ops.permute(x, axes=(*range(n - 2), n - 1, n - 2))


@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("left, right", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_every_transpose_and_awkward_size(m, k, n, left, right, dtype):
    a, b = random(*(k, m) if left else (m, k), dtype=dtype), random(*(n, k) if right else (k, n), dtype=dtype)
    check(lambda x, y: ops.matmul(transposed(x) if left else x, transposed(y) if right else y), a, b)


@pytest.mark.parametrize("left, right", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_tall_items_copy_several_panels_of_the_right_operand(left, right, dtype):
    m, k, n = 300, 600, 1001
    a, b = random(*(k, m) if left else (m, k), dtype=dtype), random(*(n, k) if right else (k, n), dtype=dtype)
    lowered, _ = check(lambda x, y: ops.matmul(transposed(x) if left else x, transposed(y) if right else y), a, b,
                       pieces=3)
    integers = dict(zip(gemm.ARGUMENTS, lowered.launches[-1].arguments[3:]))
    assert integers["b_copies"] and integers["span"] > gemm.element_tile(from_numpy(a.dtype).short).columns


@pytest.mark.parametrize("m, k, n", [(0, 3, 4), (3, 4, 0), (0, 0, 0)])
def test_an_empty_result_has_no_work(m, k, n):
    assert not lower_matmul(region(ops.matmul, random(m, k), random(k, n))).launches


def test_a_product_over_nothing_is_zero():
    check(ops.matmul, random(5, 0), random(0, 40))


@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize("right", (False, True))
def test_the_text_means_the_same_as_plain_python(plain, right):
    y = random(19, 6) if right else random(6, 19)
    check(lambda x, y: ops.matmul(x, transposed(y) if right else y), random(15, 6), y, plain=plain)


def test_batches_and_broadcast_operands():
    x, y = random(2, 3, 20, 41), random(2, 3, 41, 50)
    check(ops.matmul, x, y, launches=1)
    check(lambda x, y: ops.matmul(x, ops.broadcast_to(y, shape=(2, 3, 41, 50))), x, random(2, 1, 41, 50), launches=1)
    check(lambda x, y: ops.matmul(ops.broadcast_to(x, shape=(2, 3, 20, 41)), y), random(1, 1, 20, 41), y, launches=1)


def test_a_batch_with_one_right_operand_is_one_tall_product():
    def linear(x, w):
        return ops.matmul(x, ops.broadcast_to(ops.reshape(w, shape=(1, 30, 40)), shape=(7, 30, 40)))
    lowered, _ = check(linear, random(7, 5, 30), random(30, 40), launches=1)
    assert lowered.launches[0].arguments[3] == 35


def test_heads_of_attention_are_read_in_place():
    def scores(q, k):                               # [batch, time, heads, size] -> [batch, heads, time, time]
        split = [ops.permute(ops.reshape(x, shape=(2, 9, 3, 8)), axes=(0, 2, 1, 3)) for x in (q, k)]
        return ops.matmul(split[0], transposed(split[1]))
    check(scores, random(2, 9, 24), random(2, 9, 24), launches=1)       # the transposed one panel by panel


def test_slices_and_flips_are_read_in_place():
    def f(x, y):
        left = ops.slice(x, start=(1, 2), stop=(20, 30), step=(2, 1))
        return ops.matmul(left, ops.flip(y, axes=(0,)))
    check(f, random(21, 31), random(28, 12), launches=1)


def test_an_operand_that_must_be_computed_gets_a_kernel():
    check(lambda x, y: ops.matmul(ops.exp(x), y), random(6, 7), random(7, 8), launches=2)
    check(lambda x, y: ops.matmul(ops.reshape(ops.permute(x, axes=(1, 0)), shape=(4, 12)), y), random(6, 8),
          random(12, 8), launches=2)


def test_rows_a_page_apart_are_read_in_place_a_few_at_a_time():
    check(ops.matmul, random(200, 1024), random(1024, 1024), launches=1)


def test_nan_and_infinity_reach_only_their_rows_and_columns():
    x, y = np.ones((40, 9), "f"), np.ones((9, 70), "f")
    x[17, 3], y[5, 66] = np.nan, np.inf
    _, (z,) = check(ops.matmul, x, y)
    assert np.isnan(z[17]).all() and np.isinf(z[np.arange(40) != 17, 66]).all()
    assert np.isfinite(np.delete(np.delete(z, 17, 0), 66, 1)).all()


def test_results_do_not_depend_on_how_items_are_handed_out():
    x, y = random(150, 200), random(200, 170)
    results = [check(ops.matmul, x, y, pieces=n)[1][0] for n in (1, 2, 7)]
    assert all(np.array_equal(results[0], r) for r in results)


def test_accuracy_against_float64():
    x, y = random(64, 1500), random(1500, 64)
    exact = x.astype("d") @ y.astype("d")
    _, (z,) = check(ops.matmul, x, y, tolerance=1e-3)
    theirs = np.abs(x @ y - exact)
    assert np.abs(z - exact).mean() < 2 * theirs.mean() and np.abs(z - exact).max() < 4 * theirs.max()


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16))
@pytest.mark.parametrize("right", (False, True))
def test_halves_accumulate_in_float32(dtype, right):
    a, b = random(33, 300).astype(dtype), random(*(40, 300) if right else (300, 40)).astype(dtype)
    _, (z,) = check(lambda x, y: ops.matmul(x, transposed(y) if right else y), a, b, tolerance=0.3)
    exact = a.astype("d") @ (b.T if right else b).astype("d")
    assert np.abs(z.astype("d") - exact).max() < np.abs(exact).max() * float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize("bits, registers", [(256, 16), (128, 16), (128, 32)])
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_narrower_vector_units(monkeypatch, bits, registers, dtype):
    monkeypatch.setattr(tile, "vector_unit", lambda: (bits, registers))
    monkeypatch.setattr(tile, "tile_for", tile.tile_for.__wrapped__)
    monkeypatch.setattr(gemm, "tile_for", tile.tile_for)
    address.cache_clear()                           # the number of registers is not in the text
    for m, k, n in ((14, 16, 32), (33, 20, 37), (1, 5, 1)):
        check(ops.matmul, random(m, k, dtype=dtype), random(k, n, dtype=dtype))
        check(lambda x, y: ops.matmul(x, transposed(y)), random(m, k, dtype=dtype), random(n, k, dtype=dtype))


# --- what follows the product ---------------------------------------------------------------------------------------


def bias(x, w, b):
    z = ops.matmul(x, w)
    return ops.add(z, ops.broadcast_to(ops.reshape(b, shape=(1, *b.shape)), shape=z.shape))


@pytest.mark.parametrize("plain", (False, True))
def test_bias_and_relu_are_one_kernel(plain):
    m = 17 if plain else 150
    check(lambda x, w, b: ops.relu(bias(x, w, b)), random(m, 12), random(12, 40), random(40), launches=1, plain=plain)


def test_every_intermediate_can_be_an_output():
    def f(x, w, b):
        z = ops.matmul(x, w)
        y = ops.add(z, ops.broadcast_to(ops.reshape(b, shape=(1, 40)), shape=(30, 40)))
        return z, y, ops.tanh(y), ops.gt(y, z)
    lowered, _ = check(f, random(30, 12), random(12, 40), random(40), launches=1)
    assert not lowered.scratch


def test_a_residual_updated_in_place():
    lowered, _ = check(lambda x, w, r: ops.add(ops.matmul(x, w), r), random(30, 12), random(12, 40), random(30, 40),
                       shared=((0, 2),), launches=1)
    assert len(lowered.scratch) == 1


def test_an_epilogue_over_batches():
    def scaled(x, y, mask):
        return ops.mul(ops.matmul(x, y), ops.broadcast_to(mask, shape=(2, 3, 20, 37)))
    check(scaled, random(2, 3, 20, 41), random(2, 3, 41, 37), random(1, 1, 20, 37), launches=1)


def test_a_result_stored_in_another_order():
    def merge(x, y):                                # [batch, heads, time, size] -> [batch, time, heads * size]
        z = ops.permute(ops.matmul(x, y), axes=(0, 2, 1, 3))
        return ops.reshape(ops.relu(z), shape=(2, 20, 3 * 16))
    check(merge, random(2, 3, 20, 21), random(2, 3, 21, 16), launches=1)


def test_columns_split_into_heads():
    def project(x, w):                              # [time, width] -> [heads, time, size]
        return ops.permute(ops.reshape(ops.neg(ops.matmul(x, w)), shape=(20, 3, 16)), axes=(1, 0, 2))
    check(project, random(20, 21), random(21, 48), launches=1)


def test_halves_with_an_epilogue_round_once():
    a, b, c = (random(*s).astype(ml_dtypes.bfloat16) for s in ((20, 30), (30, 40), (40,)))
    check(lambda x, w, b: ops.relu(bias(x, w, b)), a, b, c, tolerance=0.2)


def test_an_epilogue_in_another_type():
    check(lambda x, w: ops.cast(ops.matmul(x, w), dtype=dtypes.float64), random(9, 30), random(30, 40), launches=1,
          tolerance=1e-4)
