"""Sealed calls see every change around them: after each one the next call does what the undecorated function does."""

import copy
import types

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn, optim
from jitgrad.errors import AutogradError
from jitgrad.functional.random import default_generator
from jitgrad.tree import flatten


def tensor(*shape, seed=0):
    return jg.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.extra = [nn.Tanh()]
        self.scale = 1.0
        self.drop = nn.Dropout(0.0)
        self.register_buffer("shift", jg.zeros(2))

    def forward(self, x):
        h = self.first(x).relu()
        for layer in self.extra:
            h = layer(h)
        return self.drop(self.second(h)) * self.scale + self.shift


class World:
    """A model, an optimizer, and a step over them in the shape that users give it."""

    def __init__(self):
        jg.manual_seed(0)
        self.net = Net()
        self.opt = optim.Adam([{"params": self.net.first.parameters()},
                               {"params": self.net.second.parameters(), "lr": 1e-2}])
        self.settings = types.SimpleNamespace(weight=1.0)
        self.table = {"target": tensor(3, 2, seed=9)}
        self.criterion = nn.MSELoss()
        net, opt, settings, table, world = self.net, self.opt, self.settings, self.table, self

        def step(x):
            opt.zero_grad()
            loss = world.criterion(net(x), table["target"]) * settings.weight
            loss.backward()
            opt.step()
            return loss

        self.step = step

    def observe(self):
        return [p.detach().numpy().copy() for p in self.net.parameters()] + \
               [None if p.grad is None else p.grad.numpy().copy() for p in self.net.parameters()]


def replace_a_layer(w):
    jg.manual_seed(5)
    w.net.second = nn.Linear(6, 2)


def freeze(w):
    w.net.first.weight.requires_grad_(False)


def reset_gradients(w):
    w.net.zero_grad()


def keep_a_gradient(w):
    w.net.first.weight.grad = tensor(6, 4, seed=3)


def load_model(w):
    w.net.load_state_dict({k: v * 0.5 for k, v in w.net.state_dict().items()})


def load_optimizer(w):
    state = copy.deepcopy(w.opt.state_dict())
    for entry in state["state"].values():
        entry["exp_avg"] = entry["exp_avg"] * 2
    w.opt.load_state_dict(state)


def swap_data(w):
    w.net.first.weight.data = tensor(6, 4, seed=4)


def other_target(w):
    w.table["target"] = tensor(3, 2, seed=8)


def broadcast_target(w):
    w.table["target"] = tensor(1, 2, seed=8)


def another_setting(w):
    w.settings.weight = 3.0


def grow_the_list(w):
    w.net.extra.append(nn.ReLU())


def number_of_the_module(w):
    w.net.scale = 2.5


def dropout_on_and_off(w):
    w.net.drop.p = 0.5


def evaluation_mode(w):
    w.net.eval()


def other_criterion(w):
    w.criterion = nn.L1Loss()


def new_learning_rate(w):
    w.opt.param_groups[0]["lr"] = 0.1


def weight_decay_appears(w):
    w.opt.param_groups[1]["weight_decay"] = 0.1


def group_added(w):
    w.extra = nn.Parameter(tensor(2, seed=6))
    w.net.bias2 = w.extra
    w.opt.add_param_group({"params": [w.extra]})


def buffer_replaced(w):
    w.net.shift = tensor(2, seed=7)


def buffer_changed_in_place(w):
    w.net.shift.add_(1)


def hook_registered(w):
    w.net.second.register_forward_hook(lambda module, args, out: out * 2)


def hook_on_a_parameter(w):
    w.net.second.weight.register_hook(lambda g: g * 2)


def tied(w):
    w.net.second.weight = nn.Parameter(w.net.first.weight.detach()[:2].repeat(1, 2)[:, :6].clone())


CHANGES = [replace_a_layer, freeze, reset_gradients, keep_a_gradient, load_model, load_optimizer, swap_data, other_target,
           broadcast_target, another_setting, grow_the_list, number_of_the_module, dropout_on_and_off, evaluation_mode,
           other_criterion, new_learning_rate, weight_decay_appears, group_added, buffer_replaced,
           buffer_changed_in_place, hook_registered, hook_on_a_parameter, tied]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_is_seen(change):
    plain, compiled = World(), World()
    step = jg.compile(compiled.step)
    for n in range(10):
        if n == 5:
            assert step.statistics.sealed_calls >= 2, step.statistics.replayed_because
            change(plain)
            change(compiled)
        x = tensor(3, 4, seed=n)
        jg.manual_seed(n)
        expected = float(plain.step(x))
        jg.manual_seed(n)
        assert float(step(x)) == pytest.approx(expected, rel=1e-4, abs=1e-6), n
        for a, b in zip(compiled.observe(), plain.observe(), strict=True):
            assert (a is None) == (b is None), n
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5, err_msg=str(n))


def test_modes_of_gradients_have_forms_of_their_own():
    net = Net()
    forward = jg.compile(lambda x: net(x))
    x = tensor(3, 4)
    for _ in range(4):
        assert forward(x).requires_grad
    with jg.no_grad():
        for _ in range(4):
            assert not forward(x).requires_grad
    out = forward(x)
    out.sum().backward()
    assert net.first.weight.grad is not None
    assert forward.statistics.sealed_calls >= 4


def test_default_dtype_is_part_of_the_form():
    make = jg.compile(lambda x: x.double() + jg.full((3,), 0.5))
    for _ in range(4):
        assert make(tensor(3)).dtype is jg.float64
    plain = jg.compile(lambda x: jg.zeros(3) + x.double().sum() * 0)
    for dtype in (jg.float32, jg.float64, jg.float32):
        jg.set_default_dtype(dtype)
        try:
            for _ in range(3):
                assert plain(tensor(3)).dtype is dtype
        finally:
            jg.set_default_dtype(jg.float32)


def test_an_argument_of_another_kind():
    f = jg.compile(lambda x, k=None: x * 2 if k is None else x * k)
    for _ in range(3):
        assert float(f(tensor(3)).sum()) == pytest.approx(float((tensor(3) * 2).sum()))
        assert float(f(tensor(3), 3).sum()) == pytest.approx(float((tensor(3) * 3).sum()))
        assert float(f(tensor(3), tensor(3)).sum()) == pytest.approx(float((tensor(3) ** 2).sum()))
        assert f(jg.tensor([1, 2]), True).dtype is jg.int64
        assert float(f(tensor(4)[::2], k=2.5).sum()) == pytest.approx(float((tensor(4)[::2] * 2.5).sum()))


# --- values that are read ----------------------------------------------------------------------------------------------

def two_in_a_row(x, y):
    loss, accuracy = ((x - y) ** 2).mean(), (x > y).float().mean()
    return loss.item(), accuracy.item()


def with_work_between(x, y):
    return {"loss": ((x - y) ** 2).mean().item(), "doubled": x * 2, "above": (x > y).sum().item()}


def in_another_order(x, y):
    first, second = (x - y).mean().item(), (x * y).sum().item()
    return second, first


def through_a_helper(x, y):
    return [total(x), total(y), total(x * y)]


def total(x):
    return x.sum().item()


def chosen_by_value(x, y):
    first, second = (x - y).mean().item(), (x * y).sum().item()
    return first if first > 0 else 0.0, second


def computed_with(x, y):
    first, second = (x - y).mean().item(), (x * y).sum().item()
    return first + 1, round(second, 3)


def one_of_several(x, y):
    first, second = (x - y).mean().item(), (x * y).sum().item()
    return second, second * (first > 0)


def converted(x, y):
    return float((x - y).sum()), int(x.argmax())


@pytest.mark.parametrize("function, seals", [
    (two_in_a_row, True), (with_work_between, True), (in_another_order, True), (through_a_helper, True),
    (chosen_by_value, False), (computed_with, False), (one_of_several, False), (converted, False)])
def test_values_that_are_returned(function, seals):
    """Several may be read anywhere and returned; whatever else is done with one keeps the call replayed."""
    compiled = jg.compile(function)
    for seed in range(9):
        x, y = tensor(4, 3, seed=2 * seed), tensor(4, 3, seed=2 * seed + 1)
        wanted, found = [], []
        assert flatten(function(x, y), wanted) == flatten(compiled(x, y), found)
        assert [type(leaf) for leaf in found] == [type(leaf) for leaf in wanted]
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5)
    assert (compiled.statistics.sealed_calls >= 5) == seals, compiled.statistics.replayed_because


# --- branches on values ------------------------------------------------------------------------------------------------

class Programs:
    """Steps with state whose way depends on values. Each gets the number of the call's data and a Tensor."""

    def __init__(self):
        jg.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.optimizer = jg.optim.AdamW(self.model.parameters(), lr=0.01)
        self.total = jg.zeros(())
        self.calls = jg.zeros((), dtype=jg.int64)
        self.memory = nn.Module()
        self.memory.register_buffer("last", jg.zeros(4, 3))
        self.table = jg.arange(12.0).reshape(4, 3)

    def either(self, x):
        y = x * 2
        return y + 1 if y.mean() > 0 else y - 1

    def nested(self, x):
        if x.sum() > 0:
            return x * 3 if x[0, 0] > 0 else x.exp()
        y = x.relu()
        return -y if (y > 1).any() else y

    def counted(self, x):
        self.calls.add_(1)
        if x.mean() > 0:
            self.total.add_(x.sum())
        else:
            self.total.mul_(0.5)
        self.calls.add_(10)
        return self.total + 1

    def loop(self, x):
        y, n = x.abs() + 0.1, 0
        while y.max() > 0.2:
            y = y * 0.5
            n += 1
        return y, n

    def times(self, x):
        n = int((x > 0).sum() % 3)
        y = x
        for _ in range(n):
            y = y + x
        return y, n

    def index(self, x):
        return self.table[int(x[0].argmax())] * x

    def skipping_step(self, x):
        self.optimizer.zero_grad()
        loss = (self.model(x) ** 2).mean()
        loss.backward()
        norm = sum((p.grad ** 2).sum() for p in self.model.parameters()) ** 0.5
        if norm > 1.5:
            return loss.detach(), False
        self.optimizer.step()
        return loss.detach(), True

    def before_backward(self, x):
        self.optimizer.zero_grad()
        loss = (self.model(x) ** 2).mean()
        if loss > 0.6:
            loss = loss * 0.1
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def random(self, x):
        y = nn.functional.dropout(x, 0.5)
        if y.sum() > 0:
            y = y + jg.rand(4, 3)
        return y * jg.randn(3)

    def rebound(self, x):
        old = self.memory.last
        self.memory.last = old * 0.5 + x
        if self.memory.last.sum() > 0:
            self.memory.last = self.memory.last - 1
        return old, self.memory.last * 2

    def value_of_one_branch(self, x):
        y = x.sum()
        if y > 0:
            return y.item()
        return 0.0

    def kept_without_history(self, x):
        y = self.model(x)
        if y.mean() > 0:
            y = y * 2
        self.memory.last = (y * self.memory.last).detach()
        return y.detach(), self.memory.last

    def flag_only(self, x):
        if self.calls > 2:
            self.calls.zero_()
        self.calls.add_(1)
        return x * self.calls

    def checked(self, x):
        y = x.softmax(-1)
        if not jg.isfinite(y).all():
            raise ValueError("not finite")
        return y.log()

    def state(self):
        found = [self.total, self.calls, self.memory.last, *self.model.parameters()]
        found += [p.grad for p in self.model.parameters() if p.grad is not None]
        found += [v for p in self.model.parameters() for _, v in sorted(self.optimizer.state.get(p, {}).items())]
        return [np.asarray(t.detach() if isinstance(t, jg.Tensor) else t) for t in found]


BRANCHING = [name for name, member in vars(Programs).items() if callable(member) and name not in ("__init__", "state")]


@pytest.mark.parametrize("name", BRANCHING)
def test_a_branch_on_a_value_is_sealed(name):
    eager, other = Programs(), Programs()
    compiled = jg.compile(getattr(other, name))
    for call in range(30):
        x = tensor(4, 3, seed=call % 11)
        wanted, found = [], []
        jg.manual_seed(call)
        structure = flatten(getattr(eager, name)(x), wanted)
        after = default_generator.offset
        jg.manual_seed(call)
        assert flatten(compiled(x), found) == structure
        assert default_generator.offset == after
        for a, b in zip(wanted, found, strict=True):
            assert type(a) is type(b)
            np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=2e-5, atol=1e-6)
        for a, b in zip(eager.state(), other.state(), strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-5)
    assert compiled.statistics.sealed_calls >= 15, compiled.statistics.replayed_because


def test_nothing_runs_twice_when_a_new_branch_is_taken():
    """In-place changes, random draws and versions happen once, although the body starts again from the top."""
    counter = jg.zeros(())

    @jg.compile
    def step(x):
        counter.add_(1)
        noise = jg.rand(())
        if x.sum() > 0:
            counter.add_(100)
            if x.sum() > 10:
                counter.mul_(2)
        return noise

    draws = []
    for call, (value, wanted) in enumerate([(-1, 1), (-1, 2), (-1, 3), (-1, 4), (1, 105), (1, 206), (20, 614), (1, 715),
                                            (20, 1632), (-1, 1633)]):
        version = counter._version
        draws.append(float(step(jg.tensor(float(value)))))
        assert float(counter) == wanted, call
        assert counter._version - version == 1 + (value > 0) + (value > 10)
    assert len(set(draws)) == len(draws)
    assert step.statistics.sealed_calls == 6, step.statistics.replayed_because


def test_what_fails_after_a_decision_fails_as_in_the_body():
    table = jg.arange(6.0)

    def step(x, index):
        if x.sum() > 0:
            return table[index] * x.sum()
        return x.sum()

    compiled = jg.compile(step)
    for _ in range(4):
        compiled(jg.ones(2), jg.tensor([1, 2]))
    assert compiled.statistics.sealed_calls
    with pytest.raises(IndexError, match="test_sealing"):
        compiled(jg.ones(2), jg.tensor([1, 7]))
    np.testing.assert_array_equal(compiled(jg.ones(2), jg.tensor([1, 2])).numpy(), [2, 4])
    assert float(compiled(-jg.ones(2), jg.tensor([1, 7]))) == -2


def test_int_of_a_value_that_is_no_int():
    def step(x):
        return x * int(x.sum())

    compiled = jg.compile(step)
    for _ in range(4):
        np.testing.assert_array_equal(compiled(jg.ones(2)).numpy(), [2, 2])
    assert compiled.statistics.sealed_calls
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            compiled(jg.tensor([1.0, float("nan")]))


def test_many_outcomes_are_replayed():
    """A value that is another one on each call: right, and not one branch for each."""
    compiled = jg.compile(lambda x: (x * int(x.sum()), int(x.sum())))
    for call in (*[1] * 4, *range(100)):
        y, n = compiled(jg.full((2,), float(call)))
        assert n == 2 * call
        np.testing.assert_array_equal(y.numpy(), [call * n, call * n])
    (forms,) = compiled._sealed.values()
    assert forms[0].stages < 40


def test_a_branch_on_a_value_and_a_traced_number():
    def step(x, scale):
        y = x * scale
        if y.sum() > 0 and scale > 2:
            return y * scale
        return y

    compiled = jg.compile(step)
    for call in range(40):
        x, scale = tensor(3, seed=call % 7), float(call % 4)
        np.testing.assert_allclose(compiled(x, scale).numpy(), step(x, scale).numpy(), rtol=1e-6)
    assert compiled.statistics.sealed_calls > 20, compiled.statistics.replayed_because


def test_an_attribute_that_is_bound_anew():
    """The next call starts from what the last one bound."""
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("h", jg.zeros(3))

        def forward(self, x):
            self.h = self.h * 0.5 + x
            return self.h * 2

    eager, compiled = Memory(), jg.compile(Memory())
    for _ in range(8):
        np.testing.assert_array_equal(compiled(jg.ones(3)).numpy(), eager(jg.ones(3)).numpy())
    np.testing.assert_array_equal(compiled.h.numpy(), eager.h.numpy())
    assert type(compiled)._compiled_call.statistics.sealed_calls


def test_an_attribute_that_changes_its_shape():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("h", jg.arange(6.0).reshape(2, 3))

        def forward(self, x):
            self.h = self.h.T.contiguous() + x
            return self.h.sum(0)

    eager, compiled = Memory(), jg.compile(Memory())
    for _ in range(12):
        np.testing.assert_array_equal(compiled(jg.ones(())).numpy(), eager(jg.ones(())).numpy())


def test_a_returned_value_of_a_tensor_that_changes_afterwards():
    def step(x):
        total, mean = x.sum(), x.mean()
        before, other = total.item(), mean.item()
        total.add_(1)
        return before, other, total.item()

    compiled = jg.compile(step)
    for _ in range(6):
        assert compiled(jg.ones(3)) == (3.0, 1.0, 4.0)


def test_a_transposed_view_and_its_base():
    """One is not taken for the other, although they begin and end at the same addresses."""
    base = jg.arange(6.0).reshape(2, 3)
    view = base.T
    compiled = jg.compile(lambda: (view + 1, base * 2))
    for _ in range(4):
        one, other = compiled()
        np.testing.assert_array_equal(one.numpy(), base.numpy().T + 1)
        np.testing.assert_array_equal(other.numpy(), base.numpy() * 2)


def test_an_attribute_that_becomes_an_argument():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", jg.zeros(3))

        def forward(self, x):
            change = x - self.last
            self.last = x.detach()
            return change

    module, compiled = Memory(), jg.compile(Memory())
    for call in range(8):
        x = tensor(3, seed=call)
        np.testing.assert_array_equal(compiled(x).numpy(), module(x).numpy())
        np.testing.assert_array_equal(compiled.last.numpy(), module.last.numpy())
    assert type(compiled)._compiled_call.statistics.sealed_calls


def test_a_detached_result_beside_one_with_a_history():
    net = nn.Linear(3, 2)

    @jg.compile
    def call(x):
        y = net(x)
        return y, y.detach()

    for seed in range(6):
        y, detached = call(tensor(4, 3, seed=seed))
        assert y.requires_grad and not detached.requires_grad
        np.testing.assert_array_equal(y.detach().numpy(), detached.numpy())


@pytest.mark.parametrize(("returned", "seals"), [
    (lambda one, two, w: one + two, True),
    (lambda one, two, w: {"square": one * one, "one": one, "parts": jg.stack([one, two])[:1]}, True),
    (lambda one, two, w: one + w.sum(), False)], ids=("sum", "product and parts", "with a leaf"))
def test_results_made_of_losses_that_have_gone_back(returned, seals):
    """Nothing is left of the history of a sum of losses, as GANs return it; but a leaf may still be reached."""
    def trained(decorate):
        net = nn.Linear(4, 3)
        net.load_state_dict({"weight": tensor(3, 4, seed=1), "bias": tensor(3, seed=2)})
        optimizer = optim.SGD(net.parameters(), lr=0.1)

        @decorate
        def step(x):
            optimizer.zero_grad()
            one, two = net(x).square().mean(), net(x).abs().mean()
            (one + two).backward()
            optimizer.step()
            return returned(one, two, net.weight)

        leaves = []
        for k in range(5):
            flatten(step(tensor(5, 4, seed=k)), leaves)
        return step, leaves

    step, found = trained(jg.compile)
    for ours, theirs in zip(found, trained(lambda function: function)[1], strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=1e-5)
        assert ours.requires_grad and ours.grad_fn.name == theirs.grad_fn.name
        with pytest.raises(AutogradError, match="second time"):
            ours.sum().backward()
    assert bool(step.statistics.sealed_calls) is seals, step.statistics.replayed_because


def test_a_view_whose_history_is_made_again():
    """After the cut the view is captured, and its history, which needs the root, is renewed on the way."""
    def step(a, w):
        view = a.view(3, 1).squeeze(1)
        a.sub_(w)
        if a.sum() > -100:
            a.add_(view.relu())
            a.add_(view.relu())
        return a.detach()

    compiled = jg.compile(step)
    for seed in range(4):
        w = tensor(3, seed=seed).requires_grad_()
        np.testing.assert_allclose(compiled(tensor(3), w).numpy(), step(tensor(3), w).numpy(), rtol=1e-6)


def test_attributes_that_share_memory_in_some_calls():
    """A decision that is new comes in a call whose attributes are one memory, which they were not when it was sealed."""
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", jg.ones(2))
            self.register_buffer("b", jg.ones(2) * 2)

        def forward(self, x):
            y = (self.a * self.b).sum()
            n = int(x.sum())
            if n == 0:
                self.a = self.b.detach()
            else:
                self.b = self.b + x
            return y * n

    module, compiled = Memory(), jg.compile(Memory())
    for n in (1, 1, 1, 1, 0, 2, 0, 3, 1, 0, 1, 2, 0, 0, 5):
        x = jg.full((2,), n / 2)
        np.testing.assert_array_equal(compiled(x).numpy(), module(x).numpy())
        np.testing.assert_array_equal(compiled.a.numpy(), module.a.numpy())
        np.testing.assert_array_equal(compiled.b.numpy(), module.b.numpy())
    assert type(compiled)._compiled_call.statistics.sealed_calls


def test_lambdas_on_one_line_are_told_apart():
    double, triple, more = [jg.compile(f) for f in (lambda x: x * 2, lambda x: x * 3, (lambda k: lambda x: x + k)(4))]
    x = tensor(3)
    for compiled, expected in ((double, x.numpy() * 2), (triple, x.numpy() * 3), (more, x.numpy() + 4)):
        for _ in range(4):
            np.testing.assert_array_equal(compiled(x).numpy(), expected)
        assert compiled.statistics.sealed_calls >= 2, compiled.statistics.replayed_because


class Doubled:
    """Something to call that is no function."""

    def __call__(self, x):
        return x * 2

    def __repr__(self):
        return "pages of numbers"


def test_the_reason_for_replaying_names_what_is_called_and_prints_no_values():
    doubled = Doubled()
    step = jg.compile(lambda x: doubled(x))
    for _ in range(4):
        step(tensor(3))
    assert step.statistics.sealed_calls == 0
    assert "calls an object of type Doubled, which is not known" in step.explain(times=False).summary()
