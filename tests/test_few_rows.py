"""Products of a few rows with weights that are read where they lie, and weights that are kept as narrow numbers."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from launching import address, run
from test_gemm import check, random, region, transposed

import jitgrad as jg
from jitgrad import config, dtypes, nn, ops
from jitgrad.codegen.kernel import Function
from jitgrad.codegen.matmul import lower_matmul
from jitgrad.codegen.sharing import shareable
from jitgrad.ir import evaluate
from jitgrad.kernels.cpu import gemm, gemm_rows, tile, tile_lines
from jitgrad.ops.region import region as region_op
from jitgrad.transforms import prologue

RANDOM = np.random.default_rng(2)
SIZES = [(1, 32, 2), (1, 33, 1000), (2, 40, 7), (3, 127, 70), (4, 768, 65), (5, 95, 31), (6, 100, 48), (7, 4001, 9),
         (8, 1600, 33), (11, 200, 64), (16, 1900, 17), (24, 391, 50)]
NARROW = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "i8": np.int8}


def names(lowered):
    return [launch.name for launch in lowered.launches]


def narrow(kind, *shape):
    return RANDOM.integers(-127, 128, shape).astype(np.int8) if kind == "i8" else random(*shape).astype(NARROW[kind])


def linear(x, w):
    return ops.matmul(x, transposed(w))


@pytest.mark.parametrize("m, k, n", SIZES)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_every_number_of_rows_and_awkward_size(m, k, n, dtype):
    lowered, _ = check(linear, random(m, k, dtype=dtype), random(n, k, dtype=dtype), launches=1)
    assert names(lowered) == [f"lines_{'f32' if dtype is np.float32 else 'f64'}"] and not lowered.scratch


@pytest.mark.parametrize("m, k, n", [(1, 500, 33), (4, 768, 65), (7, 4001, 9), (16, 300, 17)])
@pytest.mark.parametrize("kind", ("bf16", "f16"))
def test_halves_are_read_in_place(m, k, n, kind):
    x, w = random(m, k).astype(NARROW[kind]), random(n, k).astype(NARROW[kind])
    lowered, (got,) = check(linear, x, w, launches=1, tolerance=1)
    cores = [a.name for a in lowered.launches[0].arguments if isinstance(a, Function)]      # of a kernel that rounds
    assert cores == [f"lines_{kind}_f32"]
    np.testing.assert_allclose(got.astype("d"), x.astype("d") @ w.T.astype("d"), atol=1e-4 * k ** .5,
                               rtol=0.51 * float(ml_dtypes.finfo(got.dtype).eps))


@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize("kind", ("f32", *NARROW))
@pytest.mark.parametrize("scale", (None, (5, 1), (1, 1), (5, 50)))
def test_the_text_means_the_same_as_plain_python(plain, kind, scale):
    x, w = random(3, 50), random(5, 50) if kind == "f32" else narrow(kind, 5, 50)

    def f(x, w, *factors):
        wide = w if kind == "f32" else ops.cast(w, dtype=dtypes.float32)
        for factor in factors:
            wide = ops.mul(wide, ops.broadcast_to(factor, shape=(5, 50)))
        return linear(x, wide)

    lowered, _ = check(f, x, w, *([] if scale is None else [random(*scale)]), plain=plain, tolerance=1e-3)
    in_place = scale != (5, 50) and (kind != "f32" or scale is None)
    assert (len(lowered.launches) == 1) == in_place


def test_a_view_a_stride_and_a_batch_of_rows():
    def f(x, w):
        return linear(ops.slice(x, start=(1, 2), stop=(4, 202), step=(1, 2)),
                      ops.slice(w, start=(3, 5), stop=(40, 105), step=(2, 1)))
    lowered, _ = check(f, random(5, 210), random(41, 120), launches=1)
    assert names(lowered) == ["lines_f32"]
    lowered, _ = check(linear, random(2, 3, 1, 64), random(2, 3, 100, 64), launches=1)      # attention's next token
    assert names(lowered) == ["lines_f32"]


@pytest.mark.parametrize("m, k, n", [(25, 2048, 64), (8, 64, 512), (4, 768, 1), (1, 7, 64)])
def test_many_rows_short_sums_and_one_column_go_the_other_way(m, k, n):
    lowered, _ = check(linear, random(m, k), random(n, k))
    assert names(lowered)[-1] == "gemm_f32"


@pytest.mark.parametrize("plain", (False, True))
def test_bias_and_activation_follow_in_the_same_kernel(plain):
    def f(x, w, b):
        z = linear(x, w)
        return ops.relu(ops.add(z, ops.broadcast_to(ops.reshape(b, shape=(1, 70)), shape=z.shape)))
    check(f, random(3, 60), random(70, 60), random(70), launches=1, plain=plain)


def test_nan_and_infinity_reach_only_their_rows_and_columns():
    x, w = np.ones((6, 200), "f"), np.ones((70, 200), "f")
    x[4, 199], w[66, 3] = np.nan, np.inf                # where the last vector is not whole
    _, (z,) = check(linear, x, w)
    assert np.isnan(z[4]).all() and np.isinf(z[np.arange(6) != 4, 66]).all()
    assert np.isfinite(np.delete(np.delete(z, 4, 0), 66, 1)).all()


@pytest.mark.parametrize("kind", ("f32", *NARROW))
def test_memory_behind_the_operands_is_not_read(kind):
    """What lies around a weight is NaN or the largest number: none of it may reach a sum."""
    rows, k = 9, 71
    dtype = np.dtype(NARROW.get(kind, np.float32))
    around = np.full(rows * k + 64, 127 if kind == "i8" else np.nan).astype(dtype)
    around[:rows * k] = np.ones(rows * k, dtype)

    def f(x, w):
        w = ops.reshape(ops.slice(w, start=(0,), stop=(rows * k,), step=(1,)), shape=(rows, k))
        return linear(x, w if kind == "f32" else ops.cast(w, dtype=dtypes.float32))
    _, (z,) = check(f, np.ones((2, k), "f"), around)
    assert (z == k).all()


def test_results_do_not_depend_on_how_items_are_handed_out_or_on_other_rows():
    x, w = random(5, 4000), random(300, 4000)
    results = [check(linear, x, w, pieces=n, tolerance=1e-3)[1][0] for n in (1, 2, 7)]
    assert all(np.array_equal(results[0], r) for r in results)
    for first in (7, 120):                          # a column's sums are the same whichever others are beside it
        _, (part,) = check(linear, x, w[first:first + 40], tolerance=1e-3)
        assert np.array_equal(part, results[0][:, first:first + 40])


@pytest.mark.parametrize("m, k, n", [(1, 768, 768), (1, 4096, 1024), (4, 768, 3072), (8, 1024, 1024), (24, 1024, 512)])
def test_accuracy_against_float64(m, k, n):
    x, w = random(m, k), random(n, k)
    exact = x.astype("d") @ w.T.astype("d")
    _, (z,) = check(linear, x, w, tolerance=1e-3)
    assert np.abs(z - exact).mean() <= 1.5 * np.abs(x @ w.T - exact).mean()


@pytest.mark.parametrize("bits, registers", [(256, 16), (128, 16), (128, 32)])
@pytest.mark.parametrize("kind", ("f64", "f32", *NARROW))
def test_narrower_vector_units(monkeypatch, bits, registers, kind):
    monkeypatch.setattr(tile, "vector_unit", lambda: (bits, registers))
    monkeypatch.setattr(tile, "tile_for", tile.tile_for.__wrapped__)
    for module in (gemm, gemm_rows):
        monkeypatch.setattr(module, "tile_for", tile.tile_for)
    address.cache_clear()                           # the number of registers is not in the text
    dtype = np.float64 if kind == "f64" else np.float32
    for m, k, n in ((1, 45, 19), (3, 70, 33), (8, 131, 10), (13, 210, 6)):
        x = random(m, k, dtype=dtype)
        if kind in NARROW:
            check(lambda x, w: linear(x, ops.cast(w, dtype=dtypes.float32)), x, narrow(kind, n, k), launches=1,
                  tolerance=2e-3)
        else:
            check(linear, x, random(n, k, dtype=dtype), launches=1)
    address.cache_clear()


@pytest.mark.parametrize("registers", (16, 32))
def test_sums_and_factors_fit_into_the_registers(registers):
    for rows in range(1, tile_lines.HIGHEST + 1):
        lines = tile_lines.lines_at_once(rows, registers)
        assert lines >= 1 and rows * lines + lines + 1 <= max(registers, rows + 2)


# --- weights that are kept narrow -------------------------------------------------------------------------------------

FORMS = {
    "column": lambda w, s: w.float() * s[:, None],
    "turned": lambda w, s: s[:, None] * w.to(jg.float32),
    "behind": lambda w, s: (w.float().T * s).T,
    "number": lambda w, s: w.float() * 0.0123,
    "tensor": lambda w, s: w.float() * s[0],
    "cast": lambda w, s: w.float(),
}


@pytest.mark.parametrize("kind, form", list(itertools.product(NARROW, FORMS)))
def test_narrow_weights_become_wide_in_the_kernel(kind, form):
    """One kernel, no memory beside operands and result, and the very weights that eager mode makes."""
    x, w, scale, bias = jg.randn(3, 200), jg.from_numpy(narrow(kind, 90, 200)), jg.rand(90), jg.randn(90)
    plain = jg.compile(lambda x, w, b: nn.functional.linear(x, w, b).relu())
    wide = FORMS[form](w, scale)

    @jg.compile
    def layer(x, w, s, b):
        return nn.functional.linear(x, FORMS[form](w, s), b).relu()

    got = layer(x, w, scale, bias)
    assert np.array_equal(got.numpy(), plain(x, wide, bias).numpy())
    assert len(layer.kernels) == 1 and layer.plan.memory.arena == 0


def test_the_wide_weights_are_never_in_memory():
    x, w, scale = jg.randn(1, 1024), jg.randint(-127, 128, (512, 1024), dtype=jg.int8), jg.rand(512, 1)
    layer = jg.compile(lambda x, w, s: x @ (w.float() * s).T)
    layer(x, w, scale)
    held = x.numpy().nbytes + w.numpy().nbytes + scale.numpy().nbytes + 4 * 512
    assert layer.plan.memory.peak < 1.01 * held < 4 * w.numpy().nbytes


def test_weights_that_are_used_twice_are_made_once():
    w = jg.randint(-127, 128, (40, 600), dtype=jg.int8)

    @jg.compile
    def twice(x, y, w):
        wide = w.float()
        return x @ wide.T, y @ wide.T

    x, y = jg.randn(2, 600), jg.randn(3, 600)
    for got, factor in zip(twice(x, y, w), (x, y), strict=True):
        np.testing.assert_allclose(got.numpy(), factor.numpy() @ w.numpy().T.astype("f"), rtol=1e-3, atol=1e-2)
    assert [k.name for k in twice.kernels] == ["fused_cast_f32", "lines_f32"]


@pytest.mark.parametrize("shape", [(64,), (70, 64)])
def test_factors_that_change_along_the_depth_are_multiplied_before(shape):
    x, w, scale = jg.randn(2, 64), jg.randint(-127, 128, (70, 64), dtype=jg.int8), jg.rand(*shape)
    for times in (lambda w, s: w.float() * s, lambda w, s: s * w.float()):
        got = jg.compile(lambda x, w, s, times=times: x @ times(w, s).T)(x, w, scale)
        np.testing.assert_allclose(got.numpy(), x.numpy() @ (w.numpy() * scale.numpy()).T, rtol=1e-4, atol=1e-3)


def test_a_result_does_not_take_the_place_of_factors_that_are_still_read():
    """The sums of a deep product come in several parts, and each reads the factors."""
    x, w, s = random(1, 30_000), narrow("i8", 40, 30_000), random(1, 40)

    def f(x, w, s):
        wide = ops.mul(ops.cast(w, dtype=dtypes.float32), ops.broadcast_to(ops.permute(s, axes=(1, 0)), shape=w.shape))
        return linear(x, wide)
    body = region(f, x, w, s)
    types = tuple(v.type for v in body.inputs)
    assert (0, 2) not in shareable(region_op, types, {"body": body, "template": "matmul"})
    (got,) = run(lower_matmul(body), [x, w, s], [v.type for v in body.outputs])
    np.testing.assert_allclose(got, evaluate(body, [x, w, s])[0], rtol=1e-3, atol=0.5)


def test_gradients_pass_through_narrow_weights():
    x, w, scale = jg.randn(3, 200), jg.randint(-127, 128, (20, 200), dtype=jg.int8), jg.rand(20, 1)
    x.requires_grad_()
    scale.requires_grad_()

    @jg.compile
    def step(x, w, s):
        loss = (x @ (w.float() * s).T).square().sum()
        return jg.autograd.grad(loss, [x, s])

    gx, gs = step(x, w, scale)
    wide = w.numpy().astype("d")
    weight, rows = wide * scale.detach().numpy(), x.detach().numpy().astype("d")
    g = 2 * rows @ weight.T
    for got, exact in ((gx, g @ weight), (gs, ((g.T @ rows) * wide).sum(1, keepdims=True))):
        np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_the_kernel_and_the_pass_agree_on_how_many_rows_are_few():
    assert prologue.FEW_ROWS == gemm_rows.FEW


def test_the_same_without_a_compiler():
    x, w, scale = jg.randn(2, 50), jg.randint(-127, 128, (6, 50), dtype=jg.int8), jg.rand(6, 1)
    with config.scope(plain=True):
        got = jg.compile(lambda x, w, s: x @ (w.float() * s).T)(x, w, scale)
    np.testing.assert_allclose(got.numpy(), x.numpy() @ (w.numpy() * scale.numpy()).T, rtol=1e-4, atol=1e-3)


def test_against_torch():
    torch = pytest.importorskip("torch")
    x, w, scale = random(4, 300), narrow("i8", 120, 300), random(120, 1)
    wanted = torch.from_numpy(x) @ (torch.from_numpy(w).float() * torch.from_numpy(scale)).T
    got = jg.compile(lambda x, w, s: x @ (w.float() * s).T)(*map(jg.from_numpy, (x, w, scale)))
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-2)
