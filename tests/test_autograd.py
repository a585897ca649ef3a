"""The tape: accumulation, modes, higher orders, hooks, custom functions, in-place history, who owns a gradient, and what
is let go when."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import autograd
from jitgrad.errors import AutogradError
from jitgrad.hooks import RemovableHandle


def leaf(*values: float, dtype=jg.float64) -> jg.Tensor:
    return jg.tensor(list(values), dtype=dtype, requires_grad=True)


def number(value: float) -> jg.Tensor:
    return jg.tensor(value, dtype=jg.float64, requires_grad=True)


def values(x: jg.Tensor) -> list[float]:
    return x.detach().tolist()


def share(*tensors: jg.Tensor) -> bool:
    first, second = (t.data_ptr() for t in tensors)
    return first == second


# ---- accumulation ----------------------------------------------------------------------------------------------


def test_backward_accumulates():
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    assert values(x.grad) == [2, 4]
    before = x.grad
    (3 * x).sum().backward()
    assert values(x.grad) == [5, 7]
    assert x.grad is before, "an existing gradient is added to in place"
    x.grad = None
    x.sum().backward()
    assert values(x.grad) == [1, 1]


def test_a_value_used_several_times_gets_the_sum():
    x = leaf(3.0)
    y = x * x
    (y * y + y + x).sum().backward()
    assert values(x.grad) == [4 * 27 + 2 * 3 + 1]


def test_backward_with_a_gradient_and_several_roots():
    x = leaf(1.0, 2.0)
    (x * x).backward(jg.tensor([1.0, 10.0], dtype=jg.float64))
    assert values(x.grad) == [2, 40]
    x.grad = None
    autograd.backward([x.sum(), (2 * x).sum()])
    assert values(x.grad) == [3, 3]


def test_backward_into_chosen_inputs():
    x, y = leaf(2.0), leaf(3.0)
    (x * y).sum().backward(inputs=[y])
    assert x.grad is None
    assert values(y.grad) == [2]


@pytest.mark.parametrize(("start", "message"), [
    (lambda x: (x * x).backward(), "single element"),
    (lambda x: x.detach().sum().backward(), "does not require gradients"),
    (lambda x: (x * x).backward(jg.ones(3)), "the gradient given is"),
], ids=["many elements", "no history", "wrong shape"])
def test_what_backward_refuses(start, message):
    with pytest.raises(AutogradError, match=message):
        start(leaf(1.0, 2.0))


def test_grad_leaves_grad_alone():
    x, y = leaf(2.0), leaf(3.0)
    dx, dy = autograd.grad((x * x * y).sum(), [x, y])
    assert (values(dx), values(dy)) == ([12], [4])
    assert x.grad is None
    assert y.grad is None


def test_grad_of_an_intermediate_value():
    x = leaf(2.0)
    y = x * x
    z = y * y
    assert values(autograd.grad(z.sum(), y)[0]) == [8]


def test_grad_of_what_was_not_used():
    x, y = leaf(2.0), leaf(3.0)
    with pytest.raises(AutogradError, match="not used"):
        autograd.grad(x.sum(), [y])
    assert autograd.grad(x.sum(), [x, y], allow_unused=True)[1] is None
    with pytest.raises(AutogradError, match="does not require gradients"):
        autograd.grad(x.sum(), [y.detach()])


@pytest.mark.parametrize(("f", "derivatives"), [
    (lambda x: x * x * x * x, (32, 48, 48)),
    (lambda x: x.exp(), (np.exp(2),) * 3),
    (lambda x: x.sin(), (np.cos(2), -np.sin(2), -np.cos(2))),
    (lambda x: 1 / x, (-1 / 4, 2 / 8, -6 / 16)),
    (lambda x: x.tanh(), (1 - np.tanh(2)**2, -2 * np.tanh(2) * (1 - np.tanh(2)**2),
                          (1 - np.tanh(2)**2) * (6 * np.tanh(2)**2 - 2))),
], ids=["power", "exp", "sin", "reciprocal", "tanh"])
def test_to_third_order(f, derivatives):
    x = number(2.0)
    y = f(x)
    for expected in derivatives:
        y, = autograd.grad(y, x, create_graph=True)
        assert y.item() == pytest.approx(expected)


def test_double_backward_through_grad():
    x = leaf(2.0, 3.0)
    g, = autograd.grad((x ** 3).sum(), x, create_graph=True)
    (g * g).sum().backward()
    np.testing.assert_allclose(values(x.grad), [4 * 9 * 8, 4 * 9 * 27])      # d (3x²)² = 36 x³


DERIVED = {
    "linear": lambda x: jg.nn.functional.linear(x, x[:2].sin(), x[0, :2]) * x[:, :2],
    "softmax": lambda x: jg.softmax(x, 1) * x,
    "log_softmax": lambda x: jg.log_softmax(x, 1) * x,
    "gelu": lambda x: jg.nn.functional.gelu(x) * x,
    "gelu tanh": lambda x: jg.nn.functional.gelu(x, "tanh") * x,
    "silu": lambda x: jg.nn.functional.silu(x) * x,
    "layer_norm": lambda x: jg.nn.functional.layer_norm(x, (3,), x[0], x[1]) * x,
    "relu": lambda x: (x * x * x).relu(),
    "cross_entropy": lambda x: jg.nn.functional.cross_entropy(x, jg.tensor([0, -100, 2]), ignore_index=-100),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_operations_agree_with_their_definitions(name, monkeypatch):
    """In value and in gradients to third order, eagerly in one step and as primitives."""

    def derivatives() -> list[np.ndarray]:
        x = jg.tensor(np.random.default_rng(0).normal(size=(3, 3)), requires_grad=True)
        found, y = [], DERIVED[name](x)
        for _ in range(3):
            found.append(y.detach().numpy().copy())
            y, = autograd.grad((y * y.detach().cos()).sum(), x, create_graph=True)
        x.grad = None
        DERIVED[name](x).sum().backward()
        return [*found, y.detach().numpy(), x.grad.numpy()]

    at_once = derivatives()
    monkeypatch.setattr(type(jg.ir.interpreter.state.current), "carries_out", lambda *_: False)
    for got, expected in zip(at_once, derivatives(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


# ---- modes -----------------------------------------------------------------------------------------------------


def test_no_grad_and_enable_grad():
    x = leaf(1.0)
    with autograd.no_grad():
        assert not (x * 2).requires_grad
        with autograd.enable_grad():
            assert (x * 2).requires_grad
        assert not autograd.is_grad_enabled()
    assert autograd.is_grad_enabled()


@pytest.mark.parametrize("decorate", [jg.no_grad, jg.no_grad(), jg.inference_mode, jg.inference_mode()],
                         ids=["bare", "called", "inference", "inference called"])
def test_modes_decorate_functions(decorate):
    @decorate
    def double(x: jg.Tensor) -> jg.Tensor:
        """Twice."""
        return x * 2

    assert double.__name__ == "double"
    assert not double(leaf(1.0)).requires_grad
    assert not double(leaf(1.0)).requires_grad, "a second call"
    assert autograd.is_grad_enabled()


def test_modes_are_left_after_an_exception():
    with pytest.raises(ZeroDivisionError), jg.no_grad():
        raise ZeroDivisionError
    assert autograd.is_grad_enabled()


def test_inference_mode():
    with jg.inference_mode():
        assert autograd.is_inference_mode_enabled()
        assert not autograd.is_grad_enabled()
        with jg.inference_mode(False):
            assert not autograd.is_inference_mode_enabled()
            assert (leaf(1.0) * 2).requires_grad
    assert not autograd.is_inference_mode_enabled()


def test_set_grad_enabled():
    with autograd.set_grad_enabled(False):
        assert not autograd.is_grad_enabled()
    assert autograd.is_grad_enabled()
    autograd.set_grad_enabled(False)
    assert not autograd.is_grad_enabled()
    autograd.set_grad_enabled(True)
    assert autograd.is_grad_enabled()

    @autograd.set_grad_enabled(False)
    def double(x: jg.Tensor) -> jg.Tensor:
        return x * 2

    assert autograd.is_grad_enabled(), "decorating switches nothing"
    assert not double(leaf(1.0)).requires_grad
    assert autograd.is_grad_enabled()


def test_modes_belong_to_a_thread():
    seen = []
    with jg.no_grad():
        thread = threading.Thread(target=lambda: seen.append(autograd.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_detach():
    x = leaf(1.0, 2.0)
    y = x.detach()
    assert not y.requires_grad
    assert share(x, y)
    z = x * x
    assert values(autograd.grad((z.detach() * x).sum(), x)[0]) == [1, 4]


# ---- hooks -----------------------------------------------------------------------------------------------------


def test_hooks_see_and_replace_gradients():
    x = leaf(1.0, 2.0)
    y = x * 3
    seen = []
    y.register_hook(lambda g: seen.append(values(g)))
    y.register_hook(lambda g: g * 10)
    x.register_hook(lambda g: g + 1)
    y.sum().backward()
    assert seen == [[1, 1]]
    assert values(x.grad) == [31, 31]


def test_a_hook_can_be_removed():
    x = leaf(1.0)
    y = x * 3
    for tensor in (x, y):
        handle = tensor.register_hook(lambda g: g * 100)
        assert isinstance(handle, RemovableHandle)
        handle.remove()
        handle.remove()
        with tensor.register_hook(lambda g: g * 100):
            pass
    y.sum().backward()
    assert values(x.grad) == [3]


def test_a_removed_hook_is_the_one_that_was_registered():
    x = leaf(1.0)

    def double(g: jg.Tensor) -> jg.Tensor:
        return g * 2

    first = x.register_hook(double)
    x.register_hook(double)
    first.remove()
    first.remove()
    x.sum().backward()
    assert values(x.grad) == [2]


def test_hooks_run_before_grad_collects():
    x = leaf(1.0)
    y = x * 2
    y.register_hook(lambda g: g * 5)
    z = (y * 3).sum()
    assert values(autograd.grad(z, y, retain_graph=True)[0]) == [15]
    x.register_hook(lambda g: g * 7)
    assert values(autograd.grad(z, x)[0]) == [2 * 15 * 7]


def test_a_hook_on_a_node():
    x = leaf(1.0)
    y = x * 2
    seen = []
    y.grad_fn.register_hook(lambda gradients: seen.append([values(g) for g in gradients]))
    y.sum().backward()
    assert seen == [[[1]]]


def test_a_hook_needs_a_gradient():
    with pytest.raises(AutogradError, match="does not require gradients"):
        jg.ones(2).register_hook(print)


def test_retain_grad():
    x = leaf(1.0, 2.0)
    y = x * 2
    y.retain_grad()
    y.retain_grad()
    assert y.retains_grad
    (y * y).sum().backward()
    assert values(y.grad) == [4, 8]
    assert values(x.grad) == [8, 16]


# ---- custom functions ------------------------------------------------------------------------------------------


class Cube(autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return 3 * x * x * g


class Scale(autograd.Function):
    @staticmethod
    def forward(x, factor):
        return x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


def test_custom_function():
    x = leaf(2.0)
    y = Cube.apply(x)
    assert y.grad_fn.name == "CubeBackward"
    y.sum().backward()
    assert values(x.grad) == [12]
    assert not Cube.apply(x.detach()).requires_grad


def test_custom_function_to_third_order():
    y = x = number(2.0)
    y = Cube.apply(x)
    for expected in (12, 12, 6):
        y, = autograd.grad(y, x, create_graph=True)
        assert y.item() == expected


def test_custom_function_with_setup_context():
    x = leaf(1.0)
    Scale.apply(x, 4.0).sum().backward()
    assert values(x.grad) == [4]


def test_custom_function_with_several_outputs():
    class Split(autograd.Function):
        @staticmethod
        def forward(ctx, x):
            signs = x.sign()
            ctx.mark_non_differentiable(signs)
            ctx.save_for_backward(signs)
            return x.abs(), signs, x + 1

        @staticmethod
        def backward(ctx, size, signs, third):
            assert values(third) == [0, 0], "a gradient that did not arrive is zero"
            saved, = ctx.saved_tensors
            return size * saved

    x = leaf(-1.0, 2.0)
    size, signs, _ = Split.apply(x)
    assert size.requires_grad
    assert not signs.requires_grad
    size.sum().backward()
    assert values(x.grad) == [-1, 1]


def test_custom_function_without_materialized_gradients():
    class Two(autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x + 0, x + 1

        @staticmethod
        def backward(ctx, first, second):
            assert first is None
            return second * 5

    x = leaf(1.0)
    Two.apply(x)[1].sum().backward()
    assert values(x.grad) == [5]


def test_needs_input_grad():
    seen = []

    class Product(autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, g):
            seen.append(ctx.needs_input_grad)
            x, y = ctx.saved_tensors
            return g * y, g * x

    x, y = leaf(2.0), jg.tensor([3.0], dtype=jg.float64)
    Product.apply(x, y).sum().backward()
    assert seen == [(True, False)]
    assert y.grad is None


def test_an_input_returned_is_a_new_tensor():
    class Same(autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, g):
            return g * 2

    x = leaf(1.0)
    y = Same.apply(x)
    assert y is not x
    y.sum().backward()
    assert values(x.grad) == [2]


def test_custom_function_with_too_few_gradients():
    class Short(autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, g):
            return g

    with pytest.raises(AutogradError, match="returned 1 gradients for 2 inputs"):
        Short.apply(leaf(1.0), leaf(1.0)).sum().backward()


# ---- a second walk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [lambda x: (x * x).sum(), lambda x: Cube.apply(x).sum()], ids=["op", "function"])
def test_a_second_backward(f):
    x = leaf(3.0)
    y = f(x)
    y.backward(retain_graph=True)
    once = values(x.grad)[0]
    y.backward()
    assert values(x.grad) == [2 * once]
    with pytest.raises(AutogradError, match=r"second time.*retain_graph=True"):
        y.backward()


# ---- in place --------------------------------------------------------------------------------------------------


def test_a_saved_value_changed_in_place():
    x = leaf(1.0, 2.0)
    y = x.exp()
    z = (y * y).sum()
    y.add_(1)
    with pytest.raises(AutogradError, match=r"mul.*f64\[2\].*changed in place.*version 1, expected 0"):
        z.backward()


def test_a_saved_value_changed_through_a_view_or_an_alias():
    for change in (lambda y: y[0].zero_(), lambda y: y.detach().zero_(), lambda y: y.data.add_(1)):
        x = leaf(1.0, 2.0)
        y = x * 1
        z = (y * y).sum()
        change(y)
        with pytest.raises(AutogradError, match="changed in place"):
            z.backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_leaf_copied_into_a_tensor_gets_its_gradient(compiled):
    def copied(x, w):
        y = jg.zeros(2, dtype=jg.float64)
        y.copy_(x)
        z = w * 1
        z[:] = x
        return y.mul_(3) + z * w

    def gradients(x, w):
        return jg.autograd.grad(copied(x, w).sum(), [x, w])

    run = jg.compile(gradients) if compiled else gradients
    assert [g.tolist() for g in run(leaf(1.0, 2.0), leaf(5.0, 7.0))] == [[8.0, 10.0], [1.0, 2.0]]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_factor_changed_in_place_is_kept_for_the_other_ones_gradient(compiled):
    def multiplied(x, w):
        y = x * 1
        y.mul_(w)
        y *= y.sigmoid()
        return y[:1] @ w[:1] + y.sum()

    def reference(x, w):
        y = x * w
        y = y * y.sigmoid()
        return y[:1] @ w[:1] + y.sum()

    results = []
    for function in (multiplied, reference):
        def gradients(x, w, function=function):
            return jg.autograd.grad(function(x, w), [x, w])

        run = jg.compile(gradients) if compiled else gradients
        results.append([g.numpy() for g in run(leaf(1.0, 2.0), leaf(5.0, 7.0))])
    for mine, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-12)


def test_a_change_of_what_nothing_reads_is_fine():
    x = leaf(1.0, 2.0)
    y = x * 3
    y.add_(1)
    y.sum().backward()
    assert values(x.grad) == [3, 3]


def test_detect_anomaly_names_the_line():
    x = leaf(1.0, 2.0)
    with autograd.detect_anomaly():
        y = x.exp()
        z = (y * y).sum()                       # the line
        line = test_detect_anomaly_names_the_line.__code__.co_firstlineno + 4
        y.add_(1)
        with pytest.raises(AutogradError, match=f"test_autograd.py:{line}"):
            z.backward()


def test_detect_anomaly_finds_nan():
    x = leaf(0.0)
    with autograd.detect_anomaly(), pytest.raises(AutogradError, match=r"contains NaN.*x\.sqrt"):
        (x.sqrt() * 0).sum().backward()


def test_a_region_assigned():
    x, v = jg.tensor(np.ones((2, 2)), requires_grad=True), leaf(5.0, 6.0)
    y = x * 2
    y[:, 0] = v
    (y * jg.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=jg.float64)).sum().backward()
    assert values(x.grad) == [[0, 4], [0, 8]]
    assert values(v.grad) == [1, 3]


def test_a_transposed_view_changed():
    x = jg.tensor(np.ones((2, 3)), requires_grad=True)
    z = x * 2
    y = z.t()
    y.mul_(jg.tensor(np.arange(6.0).reshape(3, 2)))
    z.sum().backward()
    assert values(x.grad) == [[0, 4, 8], [2, 6, 10]]


def test_a_base_changed_after_its_view_was_made():
    x = leaf(1.0, 2.0, 3.0)
    z = x * 1
    view = z[1:]
    z.mul_(4)
    view.sum().backward()
    assert values(x.grad) == [0, 4, 4]


def test_a_chain_of_views():
    x = jg.tensor(np.ones((2, 3)), requires_grad=True)
    z = x * 1
    row = z.t()[1:][1]                          # column 2 of z
    row.mul_(7)
    other = z.reshape(6)[2:]
    other.add_(1)
    assert values(z) == [[1, 1, 8], [2, 2, 8]]
    (z * z.detach()).sum().backward()
    assert values(x.grad) == [[1, 1, 56], [2, 2, 56]]


def test_what_was_constant_gets_a_history():
    buffer, x = jg.zeros(3, dtype=jg.float64), leaf(2.0)
    buffer[1:2] = x * x
    assert buffer.requires_grad
    buffer.sum().backward()
    assert values(x.grad) == [4]


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x[0].zero_(), lambda x: x.t().mul_(2)],
                         ids=["itself", "element", "view"])
def test_a_leaf_changed_in_place(change):
    x = jg.tensor(np.ones((2, 2)), requires_grad=True)
    with pytest.raises(AutogradError, match="leaf"):
        change(x)
    with jg.no_grad():
        change(x)


def test_an_expanded_tensor_changed_in_place():
    with pytest.raises(RuntimeError, match="share one memory location"):
        jg.zeros(1).expand(3).add_(1)


# ---- who owns a gradient ---------------------------------------------------------------------------------------


def test_two_leaves_never_share_a_gradient():
    for f in (lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x.reshape(2) + y.reshape(2)):
        x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
        f(x, y).sum().backward()
        assert not share(x.grad, y.grad)
        x.grad.zero_()
        assert values(y.grad) != [0, 0]
        x.grad = y.grad = None
        f(x, y).sum().backward(inputs=[x, y])
        assert not share(x.grad, y.grad)


def test_a_gradient_is_not_the_one_given():
    x, given = leaf(1.0, 2.0), jg.ones(2, dtype=jg.float64)
    (x + 0).backward(given)
    assert not share(x.grad, given)
    array = np.ones(2)
    y = leaf(1.0, 2.0)
    (y + 0).backward(jg.from_numpy(array))
    assert not np.shares_memory(y.grad.numpy(), array)


def test_a_gradient_is_not_a_saved_value():
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    (x * y).backward(jg.ones(2, dtype=jg.float64), retain_graph=True)
    assert not share(x.grad, y)
    assert not share(y.grad, x)


@pytest.mark.parametrize("intermediate", [False, True])
def test_a_gradient_is_not_what_a_hook_kept(intermediate):
    x, kept = leaf(1.0, 2.0), []
    y = x + 0
    (y if intermediate else x).register_hook(kept.append)
    (y * 2).sum().backward()
    assert not share(x.grad, kept[0])


def test_a_gradient_is_not_what_a_hook_returned():
    x, mine = leaf(1.0, 2.0), jg.ones(2, dtype=jg.float64)
    x.register_hook(lambda g: mine)
    (x * 2).sum().backward()
    assert not share(x.grad, mine)


def test_a_gradient_is_not_what_a_function_kept():
    kept = []

    class Keep(autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 0

        @staticmethod
        def backward(ctx, g):
            kept.append(g * 2)
            return kept[0]

    x = leaf(1.0, 2.0)
    Keep.apply(x).sum().backward()
    assert not share(x.grad, kept[0])


@pytest.mark.cpu
def test_a_fresh_gradient_is_kept_without_a_copy(monkeypatch):
    """The counts that `own` compares with: a gradient that only the walk knows is adopted."""
    made = []
    original = jg.ops.mul.eager
    monkeypatch.setattr(jg.ops.mul, "eager", lambda *xs: made.append(id(r := original(*xs))) or r)
    x = leaf(1.0, 2.0)
    (x * 3).sum().backward()
    assert id(x.grad.numpy()) == made[-1]


# ---- functional forms ------------------------------------------------------------------------------------------


def test_functional_grad():
    x = jg.tensor([1.0, 2.0])
    value, gradient = jg.func.value_and_grad(lambda x: (x * x).sum())(x)
    assert value.item() == 5
    assert values(gradient) == [2, 4]
    assert not gradient.requires_grad
    both = jg.func.grad(lambda x, y: (x * y).sum(), argnums=(0, 1))(x, 3 * x)
    assert [values(g) for g in both] == [[3, 6], [1, 2]]
    gradient, aux = jg.func.grad(lambda x: ((x * x).sum(), "aux"), has_aux=True)(x)
    assert aux == "aux"


def test_functional_grad_nests():
    f = lambda x: x * x * x * x
    grad = jg.func.grad
    x = jg.tensor(2.0, dtype=jg.float64)
    assert [grad(f)(x).item(), grad(grad(f))(x).item(), grad(grad(grad(f)))(x).item()] == [32, 48, 48]
    assert not grad(grad(f))(x).requires_grad
    assert not grad(lambda x: grad(lambda y: x * y * y)(x.detach()))(x).requires_grad


def test_perturbations_are_not_confused():
    grad, one = jg.func.grad, jg.tensor(1.0)
    assert grad(lambda x: x * grad(lambda y: x + y)(one))(one).item() == 1
    assert grad(lambda x: x * grad(lambda y: x * y)(one))(one).item() == 2
    assert grad(lambda x: grad(lambda y: x * y * y)(x))(jg.tensor(3.0)).item() == 12
    assert grad(lambda x: grad(lambda y: x * y * y)(x.detach()))(jg.tensor(3.0)).item() == 6


def test_vjp():
    x = jg.tensor([1.0, 2.0])
    outputs, pull = jg.func.vjp(lambda x: {"square": x * x, "twice": x + x}, x)
    assert values(outputs["square"]) == [1, 4]
    gradient, = pull({"square": jg.ones(2), "twice": jg.ones(2)})
    assert values(gradient) == [4, 6]
    second, = pull({"square": jg.zeros(2), "twice": jg.ones(2)})
    assert values(second) == [2, 2]


def test_vjp_inside_grad():
    def f(x: jg.Tensor) -> jg.Tensor:
        _, pull = jg.func.vjp(lambda y: y * y * y, x)
        return pull(jg.ones(()))[0]              # 3 x²

    assert jg.func.grad(f)(jg.tensor(2.0)).item() == 12


def test_functional_grad_wants_a_number():
    with pytest.raises(AutogradError, match="0-d"):
        jg.func.grad(lambda x: x * 2)(jg.ones(2))


# ---- what is let go --------------------------------------------------------------------------------------------


def test_backward_lets_saved_memory_go():
    x = leaf(1.0, 2.0)
    y = x.exp()
    z = (y * x.sin()).sum()
    array = weakref.ref(y._forced())
    del y
    assert array() is not None, "saved"
    z.backward()
    assert array() is None, "released at once, though z still has its history"


@pytest.mark.parametrize("f", [lambda x: x.exp(), lambda x: x * x, lambda x: jg.softmax(x, 0), Cube.apply],
                         ids=["exp", "mul", "softmax", "function"])
def test_a_result_that_is_dropped_leaves_nothing(f):
    gc.collect()
    gc.disable()
    try:
        x = leaf(1.0, 2.0)
        y = f(x)
        node = weakref.ref(y.grad_fn)
        array = weakref.ref(y.numpy(force=True))
        del y
        assert node() is None
        assert array() is None
    finally:
        gc.enable()


def test_a_gradient_of_higher_order_leaves_no_cycles():
    gc.collect()
    gc.disable()
    try:
        x = leaf(1.0, 2.0)
        y = x.exp()
        g, = autograd.grad(y.sum(), x, create_graph=True)
        node = weakref.ref(y.grad_fn)
        del y, g
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("step", [lambda x: x + 1, lambda x: x.view(1), lambda x: x.mul_(1)],
                         ids=["ops", "views", "in place"])
def test_deep_graphs(step):
    x = leaf(1.0)
    y = x * 1
    for _ in range(20_000):
        y = step(y)
    y.sum().backward()
    assert values(x.grad) == [1]
    del y                                        # nor may letting go of it overflow the stack


def test_a_deep_graph_that_is_only_dropped():
    y = leaf(1.0)
    for _ in range(20_000):
        y = y.sin()
    del y


# ---- gradients of slices, which eager execution adds up in place ----------------------------------------------------

SLICING = {
    "halves": lambda x: (x[:3] * 2, x[3:] * 3),
    "overlapping": lambda x: (x[:4] * 2, x[2:] * x[2:], x[1:5, ::2]),
    "steps": lambda x: (x[::2] * 2, x[1::3].exp(), x[:, 4]),
    "the whole as well": lambda x: (x.sin(), x[2] * 2, x[2] * 3, x * x),
    "slices of slices": lambda x: (x[1:][1:, :3] * x[2:, 1:4],),
    "unbind": lambda x: tuple(row * k for k, row in enumerate(x.unbind(0))),
    "chunks": lambda x: tuple(part.cos() for part in x.chunk(2, 1)),
    "a slice used twice": lambda x: (lambda part: (part * 2, part * part))(x[1:4]),
}


@pytest.mark.parametrize("name", SLICING)
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "result"])
def test_gradients_of_slices(name, leaf):
    values = np.random.default_rng(0).normal(size=(6, 7))

    def loss(x):
        return sum([(part * (k + 1)).sum() for k, part in enumerate(SLICING[name](x if leaf else x.tanh()))])

    x = jg.tensor(values, requires_grad=True)
    out = loss(x)
    out.backward(retain_graph=True)
    first = x.grad.clone()
    out.backward()                                           # again, onto what is there
    np.testing.assert_array_equal(x.grad.numpy(), 2 * first.numpy())
    recorded, = jg.autograd.grad(loss(x), x, create_graph=True)
    np.testing.assert_allclose(first.numpy(), recorded.detach().numpy(), rtol=1e-12)
    h = 1e-6
    for place in ((0, 0), (2, 3), (5, 6), (3, 4)):
        moved = [values.copy(), values.copy()]
        moved[0][place] += h
        moved[1][place] -= h
        difference = (loss(jg.tensor(moved[0])) - loss(jg.tensor(moved[1]))).item() / (2 * h)
        np.testing.assert_allclose(first.numpy()[place], difference, rtol=1e-6, atol=1e-7)


def test_gradients_of_slices_leave_alone_what_others_know():
    x = jg.ones(4, requires_grad=True)
    middle = x * 1
    seen = []
    middle.register_hook(lambda g: seen.append(g))
    start = jg.full((4,), 5.0)
    jg.autograd.backward([middle, middle[1:3].sum()], [start, None])
    assert start.tolist() == [5] * 4 and seen[0].tolist() == x.grad.tolist() == [5, 6, 6, 5]
    whole = jg.ones(4, requires_grad=True)
    whole[:2].sum().backward()
    before = whole.grad
    kept = before.tolist()
    jg.autograd.grad(whole[1:].sum(), whole)
    assert before.tolist() == kept == [1, 1, 0, 0]


def test_hooks_after_accumulation():
    w = jg.ones(2, requires_grad=True)
    seen = []
    handle = w.register_post_accumulate_grad_hook(lambda t: seen.append((t is w, t.grad.tolist())))
    (w * 3).sum().backward()
    (w * jg.tensor([1.0, 2.0])).sum().backward()
    jg.autograd.grad((w * 3).sum(), w)                              # nothing is accumulated
    handle.remove()
    w.sum().backward()
    assert seen == [(True, [3, 3]), (True, [4, 5])]
    for tensor in (w * 2, jg.ones(2)):
        with pytest.raises(AutogradError, match="no leaf"):
            tensor.register_post_accumulate_grad_hook(print)


def test_a_step_in_a_hook_eager_and_compiled():
    def trained(wrap):
        w = jg.ones(3, requires_grad=True)
        optimizer = jg.optim.SGD([w], lr=0.1)

        def descend(leaf):
            optimizer.step()
            leaf.grad = None

        w.register_post_accumulate_grad_hook(descend)
        step = wrap(lambda x: (w * x).sum().backward())
        for k in range(3):
            step(jg.tensor([1.0, 2.0, k]))
        return w.detach().tolist(), w.grad

    assert trained(lambda f: f) == trained(jg.compile) and trained(jg.compile)[1] is None


# --- checking gradients ----------------------------------------------------------------------------------------------

def float64(*shape, seed=0):
    return jg.tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


class WrongCube(jg.autograd.Function):
    """x³, with a gradient that is wrong by `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x * x * ctx.factor, None


def test_gradcheck_finds_what_is_right():
    x, w = float64(3, 4), float64(4, 2, seed=1)
    assert jg.autograd.gradcheck(lambda x, w: (jg.tanh(x @ w), x.sum(0)), (x, w))
    assert jg.autograd.gradgradcheck(lambda x, w: jg.tanh(x @ w), (x, w))
    assert jg.autograd.gradcheck(lambda x: WrongCube.apply(x, 1.0), x)
    assert jg.autograd.gradgradcheck(lambda x: WrongCube.apply(x, 1.0), x)


def test_gradcheck_names_what_is_wrong():
    with pytest.raises(jg.autograd.GradcheckError, match="output 0 in input 0: the gradient of element 0 in element 0"):
        jg.autograd.gradcheck(lambda x: WrongCube.apply(x, 1.1), float64(2))
    assert not jg.autograd.gradcheck(lambda x: WrongCube.apply(x, 1.1), float64(2), raise_exception=False)
    with pytest.raises(ValueError, match="requires gradients"):
        jg.autograd.gradcheck(lambda x: x, jg.ones(2))


def test_set_detect_anomaly_switches_at_once_and_for_a_block():
    x = jg.tensor(np.array([-1.0], np.float32), requires_grad=True)
    with pytest.raises(AutogradError), jg.autograd.set_detect_anomaly(True):
        (jg.sqrt(x) * 0).sum().backward()
    (jg.sqrt(x) * 0).sum().backward()                   # restored
    switched = jg.autograd.set_detect_anomaly(True)
    with pytest.raises(AutogradError):
        (jg.sqrt(x) * 0).sum().backward()
    with switched:
        pass
    (jg.sqrt(x) * 0).sum().backward()
