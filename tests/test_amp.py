"""Mixed precision as users have it: regions, the scaler, training, and the same compiled."""

import copy
import pickle
import threading

import numpy as np
import pytest

import jitgrad as jg
import jitgrad.nn.functional as F
from jitgrad import nn
from jitgrad.functional import autocast as casting
from jitgrad.utils.checkpoint import checkpoint

HERE, ELSEWHERE = ("cpu", "cuda") if jg.get_default_device().type == "cpu" else ("cuda", "cpu")
HALF = pytest.mark.parametrize("lower", [jg.bfloat16, jg.float16], ids=["bf16", "f16"])


@pytest.fixture
def x():
    return jg.tensor(np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))


@pytest.fixture
def w():
    return jg.tensor(np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32), requires_grad=True)


# regions

def test_a_region_has_a_dtype_and_an_end(x, w):
    assert not jg.is_autocast_enabled(HERE)
    with jg.autocast(HERE):
        assert jg.is_autocast_enabled(HERE) and not jg.is_autocast_enabled(ELSEWHERE)
        assert F.linear(x, w).dtype is jg.bfloat16
    with jg.autocast(HERE, dtype=jg.float16):
        assert jg.get_autocast_dtype(HERE) is jg.float16
        assert F.linear(x, w).dtype is jg.float16
    assert jg.get_autocast_dtype(HERE) is jg.bfloat16
    assert F.linear(x, w).dtype is jg.float32


def test_regions_nest(x, w):
    with jg.autocast(HERE):
        with jg.autocast(HERE, enabled=False):
            assert F.linear(x, w).dtype is jg.float32
            with jg.autocast(HERE, dtype=jg.float16):
                assert F.linear(x, w).dtype is jg.float16
        assert F.linear(x, w).dtype is jg.bfloat16


def test_a_region_ends_with_an_exception(x, w):
    with pytest.raises(KeyError), jg.autocast(HERE):
        raise KeyError
    assert F.linear(x, w).dtype is jg.float32
    with jg.autocast(HERE):
        with pytest.raises(jg.errors.ShapeError):
            F.linear(x, w[:, :3])
        assert F.linear(x, w).dtype is jg.bfloat16


def test_decorator(x, w):
    @jg.autocast(HERE, dtype=jg.float16)
    def product(depth):
        return product(depth - 1) if depth else F.linear(x, w)

    assert product(3).dtype is jg.float16
    assert not jg.is_autocast_enabled(HERE)


def test_settings_belong_to_a_thread(x, w):
    found = []
    with jg.autocast(HERE):
        thread = threading.Thread(target=lambda: found.append((F.linear(x, w).dtype, jg.is_autocast_enabled(HERE))))
        thread.start()
        thread.join()
    assert found == [(jg.float32, False)]


def test_switches(x, w):
    jg.set_autocast_dtype(HERE, jg.float16)
    jg.set_autocast_enabled(HERE, True)
    try:
        assert F.linear(x, w).dtype is jg.float16
        jg.set_autocast_dtype(HERE, jg.bfloat16)
        assert F.linear(x, w).dtype is jg.bfloat16
    finally:
        jg.set_autocast_enabled(HERE, False)
        jg.set_autocast_dtype(HERE, jg.bfloat16)
    assert F.linear(x, w).dtype is jg.float32


@HALF
def test_values_and_gradients(x, w, lower):
    with jg.autocast(HERE, dtype=lower):
        out = F.linear(x, w)
        loss = F.mse_loss(out, jg.zeros(4, 5))
    loss.backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    exact = x.numpy().astype(np.float64) @ w.detach().numpy().T.astype(np.float64)
    np.testing.assert_allclose(out.detach().float().numpy(), exact, **tolerance)
    np.testing.assert_allclose(w.grad.numpy(), 2 / 20 * exact.T @ x.numpy(), **tolerance)
    assert loss.dtype is jg.float32 and w.grad.dtype is jg.float32


# casts of parameters

def test_a_parameter_is_cast_once_per_region(x, w):
    with jg.autocast(HERE):
        F.linear(x, w)
        (first,) = [cast for _, _, cast in casting.state.kept.values()]
        F.linear(x, w)
        assert [cast for _, _, cast in casting.state.kept.values()] == [first]
        with jg.autocast(HERE, enabled=False), jg.autocast(HERE):
            assert len(casting.state.kept) == 1
        jg.clear_autocast_cache()
        assert not casting.state.kept
    assert casting.state.kept is None
    with jg.autocast(HERE, cache_enabled=False):
        assert not jg.is_autocast_cache_enabled()
        F.linear(x, w)
        assert not casting.state.kept


def test_kept_casts_follow_changes_in_place(x, w):
    with jg.autocast(HERE):
        before = F.linear(x, w)
        with jg.no_grad():
            w.mul_(2.0)
        after = F.linear(x, w)
    np.testing.assert_array_equal(2 * before.detach().float().numpy(), after.detach().float().numpy())


def test_kept_casts_have_a_history(x, w):
    with jg.autocast(HERE):
        with jg.no_grad():
            F.linear(x, w)
        for _ in range(2):                            # the second walk back goes through a cast of its own
            F.linear(x, w).sum().backward()
    with jg.autocast(HERE):
        F.linear(x, w).sum().backward()
    expected = np.broadcast_to(3 * x.bfloat16().float().numpy().sum(0), (5, 8))
    np.testing.assert_allclose(w.grad.numpy(), expected, rtol=3e-2, atol=3e-2)


def test_checkpointed_function_runs_again_in_its_region(x, w):
    seen = []

    def block(v):
        out = F.linear(v, w)
        seen.append(out.dtype)
        return out.relu()

    with jg.autocast(HERE):
        out = checkpoint(block, x, use_reentrant=False)
    out.sum().backward()
    assert seen == [jg.bfloat16, jg.bfloat16] and w.grad.dtype is jg.float32


# custom functions

class Product(jg.autograd.Function):
    @staticmethod
    @jg.amp.custom_fwd(device_type=HERE)
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    @jg.amp.custom_bwd(device_type=HERE)
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        Product.seen = jg.is_autocast_enabled(HERE), (g @ b.mT).dtype
        return g @ b.mT, a.mT @ g


class Exact(Product):
    @staticmethod
    @jg.amp.custom_fwd(device_type=HERE, cast_inputs=jg.float32)
    def forward(ctx, a, b):
        Exact.seen = jg.is_autocast_enabled(HERE)
        ctx.save_for_backward(a, b)
        return a @ b


def test_custom_function_goes_back_as_it_came(x):
    a, b = (jg.randn(3, 3, requires_grad=True) for _ in range(2))
    with jg.autocast(HERE):
        out = Product.apply(a, b)
    assert out.dtype is jg.bfloat16
    out.sum().backward()
    assert Product.seen == (True, jg.bfloat16) and a.grad.dtype is jg.float32
    Product.apply(a, b).sum().backward()
    assert Product.seen == (False, jg.float32)


def test_custom_function_with_cast_inputs():
    a = jg.randn(3, 3, requires_grad=True)
    with jg.autocast(HERE):
        out = Exact.apply(a.bfloat16(), a)
    assert out.dtype is jg.float32 and Exact.seen is False
    out.sum().backward()
    assert Product.seen == (False, jg.float32)


# bad input

def test_bad_input(w):
    with pytest.raises(RuntimeError, match="device_type='tpu' is none of 'cpu', 'cuda'"):
        jg.autocast("tpu")
    with pytest.raises(ValueError, match="device_type is a string"):
        jg.autocast(jg.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16 or float16, not jitgrad.float64"):
        region = jg.autocast(HERE, dtype=jg.float64)
    with region:
        assert not jg.is_autocast_enabled(HERE)
    with pytest.raises(TypeError, match="neither bfloat16 nor float16"):
        jg.set_autocast_dtype(HERE, jg.float32)
    with pytest.raises(ValueError, match="device_type is a string"):
        jg.amp.custom_fwd(lambda ctx: None, device_type=0)


@pytest.mark.cpu
def test_without_a_gpu_a_region_on_one_casts_nothing():
    with pytest.warns(UserWarning, match="no GPU"):
        region = jg.autocast("cuda")
    with region:
        assert not jg.is_autocast_enabled("cuda")


def test_float32_matmul_precision(x, w):
    assert jg.get_float32_matmul_precision() == "highest"
    exact = F.linear(x, w).detach().numpy()
    compiled = jg.compile(lambda a: a @ a.mT)
    for _ in range(3):
        compiled(x)
    assert compiled.statistics.sealed_calls == 1
    try:
        for precision in ("high", "medium"):
            jg.set_float32_matmul_precision(precision)
            assert jg.get_float32_matmul_precision() == precision
            limit = 2.0 ** -8 if x.is_cuda else 0             # a CPU has no TF32
            np.testing.assert_allclose(F.linear(x, w).detach().numpy(), exact, rtol=limit, atol=4 * limit)
        compiled(x)
        assert compiled.statistics.sealed_calls == 1  # another setting: not the same call
    finally:
        jg.set_float32_matmul_precision("highest")
    with pytest.raises(RuntimeError, match="'fast' is none of 'highest', 'high', 'medium'"):
        jg.set_float32_matmul_precision("fast")


# compiled

def test_autocast_state_is_guarded(x, w):
    @jg.compile
    def product(v):
        return F.linear(v, w.detach())

    for _ in range(3):
        for region, dtype in ((None, jg.float32), (jg.bfloat16, jg.bfloat16), (jg.float16, jg.float16)):
            if region is None:
                assert product(x).dtype is dtype
                continue
            with jg.autocast(HERE, dtype=region):
                assert product(x).dtype is dtype
    assert product.statistics.sealed_calls == 3       # of each state two calls are replayed


@HALF
def test_region_inside_of_a_compiled_function(x, w, lower):
    @jg.compile(fullgraph=True)
    def loss(v):
        with jg.autocast(HERE, dtype=lower):
            out = F.linear(v, w).relu()
        return (out.float() ** 2).sum()

    for _ in range(4):
        w.grad = None
        loss(x).backward()
    compiled = w.grad.numpy()
    w.grad = None
    loss.function(x).backward()
    np.testing.assert_allclose(compiled, w.grad.numpy(), rtol=3e-2, atol=3e-2)
    assert loss.statistics.sealed_calls == 2


def test_region_around_compiled_calls_keeps_nothing_lazy(x, w):
    @jg.compile
    def product(v):
        return F.linear(v, w).sum()

    with jg.autocast(HERE):
        eager = F.linear(x, w).sum()
        for _ in range(4):
            w.grad = None
            out = product(x)
            out.backward()
    np.testing.assert_allclose(float(out), float(eager), rtol=2e-2)
    assert w.grad.dtype is jg.float32 and product.statistics.sealed_calls == 2


def test_a_switch_inside_of_a_function_keeps_it_replayed(x, w):
    def product(v):
        jg.set_autocast_enabled(HERE, True)
        return F.linear(v, w.detach())

    compiled = jg.compile(product)
    try:
        for _ in range(4):
            jg.set_autocast_enabled(HERE, False)
            assert compiled(x).dtype is jg.bfloat16 and jg.is_autocast_enabled(HERE)
    finally:
        jg.set_autocast_enabled(HERE, False)
    assert compiled.statistics.sealed_calls == 0


def test_casts_are_part_of_other_kernels():
    """Two layers: the input and the weight that is read twice are cast once; the other weight, biases, activations and
    gradients inside of products."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

    @jg.compile
    def step(v):
        for p in model.parameters():
            p.grad = None
        with jg.autocast(HERE):
            out = model(v)
        out.float().square().sum().backward()

    step(jg.randn(32, 64))
    names = [line.name for line in step.plan.steps] if hasattr(step.plan, "steps") else [k.name for k in step.kernels]
    text = str(step.explain(times=False))
    assert text.count("fused_cast_bf16") == 2, names
    assert text.count("matmul_") == 5


def test_kept_casts_of_tied_weights_are_one_in_the_graph(x):
    w = jg.randn(8, 8, requires_grad=True)

    @jg.compile
    def twice(v):
        with jg.autocast(HERE):
            return F.linear(F.linear(v, w), w).sum()

    twice(x).backward()
    assert str(twice.graphs[0]).count("cast(") == 2   # of x and of w


# copies

def test_a_scaler_is_copied_and_pickled_as_numbers(x, w):
    scaler = jg.amp.GradScaler(HERE, init_scale=8.0)
    scaler.scale(x)
    for other in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        assert other.state_dict() == scaler.state_dict()
        np.testing.assert_array_equal(other.scale(x).numpy(), 8 * x.numpy())
        assert other._scale is not scaler._scale


def test_decorated_layers_are_sealed(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 3)

        @jg.autocast(HERE, dtype=jg.float16)
        def forward(self, v):
            return self.layer(v)

    net = Net()
    compiled = jg.compile(lambda v: net(v).sum())
    for _ in range(4):
        assert compiled(x).dtype is jg.float16
    assert compiled.statistics.sealed_calls == 2


def test_switches_that_a_function_asks_for(x, w):
    @jg.compile
    def product(v):
        if jg.is_autocast_enabled(HERE):
            return F.linear(v, w.detach()) * 2
        return F.linear(v, w.detach())

    for _ in range(4):
        plain = product(x)
        with jg.autocast(HERE):
            doubled = product(x)
    np.testing.assert_allclose(doubled.float().numpy(), 2 * plain.numpy(), rtol=3e-2, atol=3e-2)


@HALF
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(layer, lower):
    net = layer(8, 6)
    v = jg.tensor(np.random.default_rng(2).standard_normal((3, 2, 8)).astype(np.float32))
    exact, _ = net(v)
    with jg.autocast(HERE, dtype=lower):
        out, _ = net(v)
    out.float().sum().backward()
    assert all(p.grad.dtype is jg.float32 for p in net.parameters())
    np.testing.assert_allclose(out.detach().float().numpy(), exact.detach().numpy(), atol=3e-2)
