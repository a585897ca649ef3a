"""Products of narrow numbers: 16-bit floats, widened or in pairs, int8 summed up in int32, and integers that wrap around."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from launching import address, run, run_as_python, run_native
from test_gemm import SIZES, random, region, transposed

import jitgrad as jg
from jitgrad import config, nn, ops
from jitgrad.codegen.kernel import Buffer, Launch
from jitgrad.codegen.matmul import lower_matmul
from jitgrad.errors import DTypeError, ShapeError
from jitgrad.ir import evaluate
from jitgrad.kernels.cpu import gemm, gemm_pack, tile, tile_dot
from jitgrad.kernels.cpu.gemm import Matrices

HALVES = (ml_dtypes.bfloat16, np.float16)
BOTH = list(itertools.product((False, True), repeat=2))
RANDOM = np.random.default_rng(1)


def executes(feature):
    """True where the processor has the instructions of AVX-512 with this feature."""
    return tile.vector_unit()[0] == 512 and config.processor().features >= {"avx512bw", feature}


needs_bf16 = pytest.mark.skipif(not executes("avx512bf16"), reason="needs AVX512-BF16")


@pytest.fixture(params=["widened", pytest.param("pairs", marks=needs_bf16)])
def way(request, monkeypatch):
    """Both ways for bfloat16, whichever this processor is faster with."""
    monkeypatch.setattr(gemm, "has_dot", lambda short: short == "bf16" and request.param == "pairs")
    return request.param


@pytest.fixture(params=["loops", "quads"])
def bytes_way(request, monkeypatch):
    """int8 by plain loops and by dot products."""
    if request.param == "quads" and not tile_dot.has_dot("i8"):
        pytest.skip("needs AVX512-VNNI")
    monkeypatch.setattr(gemm, "has_dot", lambda short: request.param == "quads")
    return request.param


def whole_numbers(dtype, *shape):
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def product(x, y, left=False, right=False, op=ops.matmul, **options):
    """What the kernels make of op(x, y), with `left` and `right` of factors stored transposed."""
    body = region(lambda a, b: op(transposed(a) if left else a, transposed(b) if right else b), x, y)
    lowered = lower_matmul(body)
    (got,) = run(lowered, [x, y], [v.type for v in body.outputs], **options)
    (wanted,) = evaluate(body, [x, y])
    return got, wanted


def oriented(x, turned):
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)) if turned else x


def close(got, exact, k):
    """Each element is right to the rounding of its type; sums in float32 have errors of their own."""
    eps = float(ml_dtypes.finfo(got.dtype).eps)
    np.testing.assert_allclose(got.astype("d"), exact, rtol=0.51 * eps, atol=1e-6 * max(k, 1))


# --- 16-bit floats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, k, n", [*SIZES, (40, 2000, 70)])
@pytest.mark.parametrize("left, right", BOTH)
def test_bfloat16_of_every_orientation_and_awkward_size(way, m, k, n, left, right):
    x, y = random(m, k).astype(ml_dtypes.bfloat16), random(k, n).astype(ml_dtypes.bfloat16)
    got, _ = product(oriented(x, left), oriented(y, right), left, right)
    close(got, x.astype("d") @ y.astype("d"), k)


@pytest.mark.parametrize("m, k, n", [(13, 17, 31), (29, 400, 63), (200, 385, 129)])
@pytest.mark.parametrize("left, right", BOTH)
def test_float16_of_every_orientation(m, k, n, left, right):
    x, y = random(m, k).astype(np.float16), random(k, n).astype(np.float16)
    got, _ = product(oriented(x, left), oriented(y, right), left, right)
    close(got, x.astype("d") @ y.astype("d"), k)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("left, right", BOTH)
def test_the_plain_form_means_the_same(way, dtype, left, right):
    x, y = (RANDOM.integers(-8, 8, shape).astype(dtype) for shape in ((15, 67), (67, 35)))       # sums are exact
    x, y = oriented(x, left), oriented(y, right)
    got, wanted = product(x, y, left, right, plain=True)
    native, _ = product(x, y, left, right)
    assert np.array_equal(got, wanted) and np.array_equal(native, wanted)


@needs_bf16
def test_pairs_are_added_in_the_order_of_the_plain_form():
    form = gemm.Form("bf16", "bf16", "f32", "multiply_pairs", 2)
    x, y = random(15, 31).astype(ml_dtypes.bfloat16), random(31, 33).astype(ml_dtypes.bfloat16)
    made = gemm.arrange(form, (), 15, 33, 31, Matrices((), 31, 1), Matrices((), 33, 1))
    text, sums = gemm_pack.pack_text(form, made.pack_a.kind), []
    phases = [Launch(text[4:text.index("(")], text, made.pack_a.items, (Buffer(0), Buffer(2), *made.pack_a.integers)),
              Launch(form.name, gemm.core_source(form), made.items, (Buffer(2), Buffer(1), Buffer(3), *made.integers))]
    for carry_out in (run_native, run_as_python):
        memory = [x, y, np.zeros(made.pack_a.elements, ml_dtypes.bfloat16), np.zeros((15, 33), "f")]
        for phase in phases:
            carry_out(phase, memory, 0, phase.items)
        sums.append(memory[3])
    exact = x.astype("d") @ y.astype("d")
    np.testing.assert_allclose(sums[0], sums[1], atol=2e-6)         # a processor may round the sum of a pair once
    assert np.abs(sums[0] - exact).max() < 4 * np.abs(x.astype("f") @ y.astype("f") - exact).max()


def test_batches_and_broadcast_operands(way):
    x, y = random(2, 3, 20, 41).astype(ml_dtypes.bfloat16), random(2, 1, 41, 50).astype(ml_dtypes.bfloat16)
    for left, right in BOTH:
        stored = oriented(x, left), oriented(y, right)
        body = region(lambda a, b, left=left, right=right: ops.matmul(
            transposed(a) if left else a,
            ops.broadcast_to(transposed(b) if right else b, shape=(2, 3, 41, 50))), *stored)
        (got,) = run(lower_matmul(body), list(stored), [v.type for v in body.outputs])
        close(got, x.astype("d") @ y.astype("d"), 41)


def test_slices_and_steps_are_read_where_they_lie(way):
    x, y = random(21, 70).astype(ml_dtypes.bfloat16), random(140, 30).astype(ml_dtypes.bfloat16)
    def f(a, b):
        return ops.matmul(ops.slice(a, start=(1, 3), stop=(20, 70), step=(2, 2)),
                          ops.slice(b, start=(5, 1), stop=(39, 30), step=(1, 3)))
    body = region(f, x, y)
    (got,) = run(lower_matmul(body), [x, y], [v.type for v in body.outputs])
    close(got, x[1:20:2, 3::2].astype("d") @ y[5:39, 1::3].astype("d"), 34)


def test_nan_and_infinity_reach_only_their_rows_and_columns(way):
    x, y = np.ones((40, 9), ml_dtypes.bfloat16), np.ones((9, 70), ml_dtypes.bfloat16)
    x[17, 3], x[20, 8], y[5, 66] = np.nan, -np.inf, np.inf
    z = product(x, y)[0].astype("d")
    assert np.isnan(z[17]).all() and np.isnan(z[20, 66]) and (np.delete(z[20], 66) == -np.inf).all()
    assert (np.delete(z[:, 66], (17, 20)) == np.inf).all()
    assert (np.delete(np.delete(z, (17, 20), 0), 66, 1) == 9).all()


def test_a_sum_beyond_the_range_is_infinite_and_tiny_ones_are_small(way):
    big, tiny = np.full((4, 8), 3e38, ml_dtypes.bfloat16), np.full((8, 4), 1e-39, ml_dtypes.bfloat16)
    assert (product(big, np.full((8, 4), 2.0, ml_dtypes.bfloat16))[0].astype("d") == np.inf).all()
    z = product(np.ones((4, 8), ml_dtypes.bfloat16), tiny)[0].astype("d")      # dot products count denormals as 0
    assert ((z >= 0) & (z < 1e-38)).all()


def test_results_do_not_depend_on_how_items_are_handed_out(way):
    x, y = random(150, 201).astype(ml_dtypes.bfloat16), random(201, 170).astype(ml_dtypes.bfloat16)
    results = [product(x, y, pieces=n)[0] for n in (1, 2, 7)]
    assert all(np.array_equal(results[0], r) for r in results)


@pytest.mark.parametrize("dtype", HALVES)
def test_one_thread_and_two_give_the_same_bits(dtype):
    x, y = (jg.from_numpy(random(300, 300).astype(dtype)) for _ in range(2))
    results = []
    for threads in (1, 2):
        with config.scope(num_threads=threads):
            results.append(jg.compile(lambda a, b: (a @ b.mT + a).relu())(x, y).numpy())
    assert np.array_equal(*results)


def test_accuracy_beside_pytorch(way):
    torch = pytest.importorskip("torch")
    for m, k, n in ((64, 64, 64), (33, 1000, 65), (128, 4000, 32)):
        x, y = random(m, k).astype(ml_dtypes.bfloat16), random(k, n).astype(ml_dtypes.bfloat16)
        exact = x.astype("d") @ y.astype("d")
        ours = np.abs(product(x, y)[0].astype("d") - exact)
        their = torch.tensor(x.astype("f")).bfloat16() @ torch.tensor(y.astype("f")).bfloat16()
        theirs = np.abs(their.double().numpy() - exact)
        assert ours.mean() <= 1.5 * theirs.mean() and ours.max() <= 4 * theirs.max()


@pytest.mark.parametrize("bits, registers", [(256, 16), (128, 16)])
@pytest.mark.parametrize("dtype", HALVES)
def test_narrower_vector_units(monkeypatch, bits, registers, dtype):
    monkeypatch.setattr(tile, "vector_unit", lambda: (bits, registers))
    monkeypatch.setattr(tile, "tile_for", tile.tile_for.__wrapped__)
    monkeypatch.setattr(gemm, "tile_for", tile.tile_for)
    monkeypatch.setattr(gemm, "has_dot", lambda short: False)
    address.cache_clear()                           # the number of registers is not in the text
    for left, right in BOTH:
        x, y = random(33, 70).astype(dtype), random(70, 37).astype(dtype)
        got, _ = product(oriented(x, left), oriented(y, right), left, right)
        close(got, x.astype("d") @ y.astype("d"), 70)
    address.cache_clear()


def test_training_a_linear_layer_reads_and_writes_bfloat16():
    jg.manual_seed(0)
    layer = nn.Linear(40, 24).to(jg.bfloat16)
    x, target = jg.randn(33, 40).to(jg.bfloat16), jg.randn(33, 24).to(jg.bfloat16)

    @jg.compile
    def step(x, target):
        x = x.detach().requires_grad_()
        layer.zero_grad()
        loss = ((layer(x).relu() - target) ** 2).float().sum()
        loss.backward()
        return loss, x.grad, layer.weight.grad, layer.bias.grad

    _, *got = step(x, target)
    products = [k for k in step.kernels if k.name.startswith(("matmul", "gemm", "dot"))]
    assert len(products) == 3 and "matmul" in str(step.explain())
    w, b, a, t = (v.detach().float().numpy().astype("d") for v in (layer.weight, layer.bias, x, target))
    y = a @ w.T + b
    g = 2 * (np.maximum(y, 0) - t) * (y > 0)
    for ours, wanted in zip(got, (g @ w, g.T @ a, g.sum(0)), strict=True):
        np.testing.assert_allclose(ours.float().numpy(), wanted, atol=0.03 * np.abs(wanted).max())


# --- int8 summed up in int32 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, k, n", [*SIZES, (3, 0, 5), (40, 3100, 70), (300, 170, 300)])
@pytest.mark.parametrize("left, right", BOTH)
def test_bytes_are_summed_up_exactly(bytes_way, m, k, n, left, right):
    x, y = whole_numbers(np.int8, m, k), whole_numbers(np.int8, k, n)
    got, _ = product(oriented(x, left), oriented(y, right), left, right, op=ops.int_matmul)
    assert got.dtype == np.int32 and np.array_equal(got, x.astype("i4") @ y.astype("i4"))


@pytest.mark.parametrize("left, right", BOTH)
def test_the_plain_form_of_bytes_means_the_same(bytes_way, left, right):
    x, y = oriented(whole_numbers(np.int8, 15, 67), left), oriented(whole_numbers(np.int8, 67, 35), right)
    got, wanted = product(x, y, left, right, op=ops.int_matmul, plain=True)
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("low, high", [(-128, -128), (-128, 127), (127, 127)])
def test_bytes_at_the_ends_of_their_range(bytes_way, low, high):
    x, y = np.full((20, 1000), low, np.int8), np.full((1000, 40), high, np.int8)
    assert (product(x, y, op=ops.int_matmul)[0] == 1000 * low * high).all()


def test_sums_of_bytes_wrap_around_in_int32(bytes_way):
    x, y = np.full((2, 140_000), -128, np.int8), np.full((140_000, 3), -128, np.int8)
    assert (product(x, y, op=ops.int_matmul)[0] == 140_000 * 2**14 - 2**32).all()


def test_int_mm_is_scaled_back_in_the_same_kernel():
    a, b = (jg.from_numpy(whole_numbers(np.int8, *shape)) for shape in ((40, 70), (50, 70)))
    scale = jg.rand(50)

    @jg.compile
    def linear(a, b, scale):
        return (jg._int_mm(a, b.mT).to(jg.float32) * scale).relu()

    got = linear(a, b, scale)
    exact = a.numpy().astype("i4") @ b.numpy().T.astype("i4")
    np.testing.assert_array_equal(got.numpy(), np.maximum(exact.astype("f") * scale.numpy(), 0))
    assert sum(k.name.startswith("matmul") for k in linear.kernels) == 1
    assert all(k.name.startswith(("matmul", "pack")) for k in linear.kernels)


def test_int_mm_says_what_it_needs():
    a, b = jg.ones(3, 4, dtype=jg.int8), jg.ones(4, 2, dtype=jg.int8)
    assert jg._int_mm(a, b).dtype is jg.int32 and (jg._int_mm(a, b) == 4).all()
    with pytest.raises(DTypeError, match=r"must be int8, got f32\[3, 4\] @ i8\[4, 2\]"):
        jg._int_mm(a.float(), b)
    with pytest.raises(ShapeError, match="inner dimensions differ"):
        jg._int_mm(a, a)
    with pytest.raises(ShapeError, match="expected 2-d and 2-d operands"):
        jg._int_mm(jg.ones(2, 3, 4, dtype=jg.int8), b)


def test_int_mm_equals_pytorch():
    torch = pytest.importorskip("torch")
    x, y = whole_numbers(np.int8, 33, 65), whole_numbers(np.int8, 65, 24)
    theirs = torch._int_mm(torch.tensor(x), torch.tensor(y))
    for call in (jg._int_mm, jg.compile(lambda a, b: jg._int_mm(a, b))):
        ours = call(jg.from_numpy(x), jg.from_numpy(y))
        assert str(theirs.dtype) == f"torch.{ours.dtype.name}" and np.array_equal(ours.numpy(), theirs.numpy())


# --- integers in their own type ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.int16, np.int32, np.int64))
@pytest.mark.parametrize("left, right", BOTH)
def test_integers_wrap_around_in_their_own_type(dtype, left, right):
    for m, k, n in ((1, 1, 1), (13, 17, 31), (29, 400, 163), (200, 385, 129)):
        x, y = whole_numbers(dtype, m, k), whole_numbers(dtype, k, n)
        got, _ = product(oriented(x, left), oriented(y, right), left, right, plain=m * k * n < 8000)
        native, _ = product(oriented(x, left), oriented(y, right), left, right)
        assert np.array_equal(got, x @ y) and np.array_equal(native, x @ y)


def test_an_integer_product_is_one_kernel_with_what_follows():
    x, y, z = (jg.from_numpy(whole_numbers(np.int32, 2, 30, 30)) for _ in range(3))
    step = jg.compile(lambda x, y, z: x @ y.mT * 3 + z)
    wanted = x.numpy() @ y.numpy().swapaxes(1, 2) * np.int32(3) + z.numpy()
    assert np.array_equal(step(x, y, z).numpy(), wanted) and len(step.kernels) == 1


def test_integer_products_equal_pytorch():
    torch = pytest.importorskip("torch")
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.int64):
        x, y = whole_numbers(dtype, 3, 20, 33), whole_numbers(dtype, 33, 24)
        ours = jg.compile(lambda a, b: a @ b)(jg.from_numpy(x), jg.from_numpy(y))
        assert np.array_equal(ours.numpy(), (torch.tensor(x) @ torch.tensor(y)).numpy())
