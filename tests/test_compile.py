"""What `compile` means: a decorated function behaves as the undecorated one, on every call.

Each program is run twice, decorated and not, from equal starts, for ten calls, and everything that it can be observed by
(results, Tensors, attributes, containers, exceptions) is compared after each call."""

import copy
import gc
import itertools
import math
import random
import threading
import time
import types

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn, optim
from jitgrad.errors import AutogradError, CompileError, OutOfRangeError


def frozen(x):
    """What is observed of `x` now; Tensors as copies of their arrays."""
    if isinstance(x, jg.Tensor):
        return x.detach().numpy().copy()
    if isinstance(x, (list, tuple)):
        return [frozen(y) for y in x]
    return x


def same(a, b, path="result"):
    """Assert that two observations are equal: arrays and floats closely, all else exactly."""
    a, b = frozen(a), frozen(b)
    assert a.__class__ is b.__class__, (path, type(a), type(b))   # a traced number says that it is a number
    if isinstance(a, np.ndarray):
        assert a.shape == b.shape and a.dtype == b.dtype, path
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=path)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6, nan_ok=True), path
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{k}]")
    else:
        assert a == b, path


def observe(program, calls):
    observations = []
    for n in range(calls):
        jg.manual_seed(n), random.seed(n), np.random.seed(n)
        observations.append(frozen(attempt(program, n)))
    return observations


def check(make, calls=10):
    """`make(decorate)` builds a fresh program: a function of the call's number that returns what can be observed."""
    expected, got = observe(make(lambda f: f), calls), observe(make(jg.compile), calls)
    for n, (a, b) in enumerate(zip(expected, got)):
        assert not (isinstance(a, list) and a and isinstance(a[0], str) and a[0] == "raised"), a
        same(b, a, f"call {n + 1}")


def attempt(function, n):
    try:
        return function(n)
    except Exception as error:
        return ("raised", type(error).__name__)


def tensor(*shape, seed=0):
    return jg.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# --- twenty programs with effects ---------------------------------------------------------------------------------------

FACTOR = 2.0
COUNT = 0


def scaled(h):
    return h * FACTOR


def list_that_grows(decorate):
    seen, x = [], tensor(4)

    @decorate
    def step(n):
        h = x * n
        seen.append(h)
        return h.sum()

    return lambda n: (step(float(n)), list(seen))


def dict_refilled_between_calls(decorate):
    batch = {}

    @decorate
    def step():
        return (batch["x"] * 2).sum()

    def call(n):
        batch["x"] = tensor(3, seed=n)
        return step()

    return call


def counter_in_a_global(decorate):
    global COUNT
    COUNT = 0
    x = tensor(3)

    @decorate
    def step():
        global COUNT
        COUNT += 1
        return x * COUNT

    return lambda n: (step(), COUNT)


def global_changed_between_calls(decorate):
    x = tensor(3)

    @decorate
    def step():
        return scaled(x)

    def call(n):
        global FACTOR
        FACTOR = 2.0 if n < 5 else 3.0
        return step()

    return call


def closure_changed_between_calls(decorate):
    scale, x = 1.0, tensor(3)

    @decorate
    def step():
        return x * scale

    def call(n):
        nonlocal scale
        scale = 1.0 if n < 4 else float(n)
        return step()

    return call


def closure_written(decorate):
    total, x = 0, tensor(3)

    @decorate
    def step():
        nonlocal total
        total += 1
        return x + total

    return lambda n: (step(), total)


def attribute_of_a_foreign_object(decorate):
    settings, x = types.SimpleNamespace(scale=1.0, calls=0), tensor(3)

    @decorate
    def step():
        settings.calls += 1
        return x * settings.scale

    def call(n):
        settings.scale = 1.0 + n // 4
        return step(), settings.calls

    return call


def attribute_only_read(decorate):
    settings, x = types.SimpleNamespace(scale=1.0), tensor(3)

    @decorate
    def step():
        return x * settings.scale

    def call(n):
        settings.scale = 1.0 + n // 4
        return step()

    return call


def clock(decorate):
    x, seen = tensor(3), []

    @decorate
    def step():
        seen.append(time.perf_counter())
        return x + 1

    return lambda n: (step(), all(a < b for a, b in itertools.pairwise(seen)), len(seen))


def python_random(decorate):
    x = tensor(3)

    @decorate
    def step():
        return x * random.random()

    return lambda n: step()


def numpy_random(decorate):
    x = tensor(3)

    @decorate
    def step():
        return x + np.random.rand()

    return lambda n: step()


def numpy_generator(decorate):
    x, generator = tensor(3), np.random.default_rng(0)

    @decorate
    def step():
        return x + float(generator.normal())

    return lambda n: step()


def an_iterator(decorate):
    numbers, x = iter(range(100)), tensor(3)

    @decorate
    def step():
        return x * next(numbers)

    return lambda n: step()


def loader_iterator(decorate):
    batches = iter([tensor(3, seed=k) for k in range(20)])

    @decorate
    def step():
        return next(batches) * 2

    return lambda n: step()


def try_and_except(decorate):
    table, x = {3: 1.5, 7: 2.5}, tensor(3)

    @decorate
    def step(n):
        try:
            return x * table[n]
        except KeyError:
            return x

    return lambda n: step(n)


def early_return(decorate):
    x = tensor(3)

    @decorate
    def step(flag, n):
        if flag:
            return x * n
        y = x + n
        return y * 2

    return lambda n: step(n % 2 == 0, n)


def branch_on_a_value(decorate):
    @decorate
    def step(x):
        h = x * 2
        if h.mean() > 0:
            return h.relu()
        return h.exp()

    return lambda n: step(tensor(5, seed=n))


def prints_the_loss(decorate):
    log = []

    @decorate
    def step(x):
        loss = (x * x).mean()
        log.append(f"{loss.item():.4f}")
        return loss * 2

    return lambda n: (step(tensor(5, seed=n)), list(log))


def math_of_a_number(decorate):
    x = tensor(3)

    @decorate
    def step(tau):
        return x * math.sqrt(tau)

    return lambda n: step(1.0 + n // 3)


def number_decides_a_branch(decorate):
    log, x = [], tensor(3)

    @decorate
    def step(n, lr):
        if n % 4 == 0:
            log.append(n)
        return x * lr * n

    return lambda n: (step(n, 0.1 * n), list(log))


def an_exception_leaves(decorate):
    x = tensor(3)

    @decorate
    def step(n):
        x.add_(1)
        if n == 5:
            raise ValueError("five")
        return x * 2

    return lambda n: (attempt(lambda k: step(k), n), x.clone())


def default_argument_that_grows(decorate):
    x = tensor(3)

    @decorate
    def step(history=[]):  # noqa: B006
        history.append(1)
        return x * len(history)

    return lambda n: step()


def function_redefined(decorate):
    x = tensor(3)
    namespace = types.SimpleNamespace(f=lambda h: h * 2)

    @decorate
    def step():
        return namespace.f(x)

    def call(n):
        if n == 5:
            namespace.f = lambda h: h * 3
        return step()

    return call


def reads_while_it_goes_on(decorate):
    @decorate
    def step(x):
        total = 0.0
        for k in range(3):
            x = x * 0.5 + k
            total += float(x.sum())
        return x, total

    return lambda n: step(tensor(4, seed=n))


def numbers_in_the_result(decorate):
    @decorate
    def step(x, lr):
        return (x * lr).sum(), lr * 2, x.shape[0], "ok", None

    return lambda n: step(tensor(2 + n % 3, seed=n), 0.5 + n)


EFFECTS = [list_that_grows, dict_refilled_between_calls, counter_in_a_global, global_changed_between_calls,
           closure_changed_between_calls, closure_written, attribute_of_a_foreign_object, attribute_only_read, clock,
           python_random, numpy_random, numpy_generator, an_iterator, loader_iterator, try_and_except, early_return,
           branch_on_a_value, prints_the_loss, math_of_a_number, number_decides_a_branch, an_exception_leaves,
           default_argument_that_grows, function_redefined, reads_while_it_goes_on, numbers_in_the_result]


@pytest.mark.parametrize("program", EFFECTS, ids=lambda p: p.__name__)
def test_effects(program):
    check(program)


# --- memory ---------------------------------------------------------------------------------------------------------------

def writes_through_a_view(decorate):
    x = tensor(4, 6)

    @decorate
    def step():
        x[:, 0] = 1
        x.t().add_(1)
        x[1:3, ::2].mul_(2)
        return x.sum()

    return lambda n: (step(), x.clone())


def numpy_alias(decorate):
    array = np.arange(6, dtype=np.float32)
    w = jg.from_numpy(array)

    @decorate
    def step():
        w.mul_(1.5)
        return w[2:4]

    return lambda n: (step().clone(), float(array[3]))


def arguments_that_overlap(decorate):
    @decorate
    def step(a, row):
        a.add_(1)
        return row * 2

    def call(n):
        a = tensor(3, 4, seed=n)
        return step(a, a[0] if n % 2 else tensor(4, seed=n)), a

    return call


def hidden_state(decorate):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)
            self.register_buffer("hidden", jg.zeros(2, 3))

        def forward(self, x):
            self.hidden = (self.cell(x) + self.hidden).tanh().detach()
            return self.hidden * 2

    jg.manual_seed(0)
    net = Recurrent()

    @decorate
    def step(x):
        with jg.no_grad():
            return net(x)

    return lambda n: (step(tensor(2, 3, seed=n)), net.hidden.clone())


def old_gradient_is_left_alone(decorate):
    w = tensor(3).requires_grad_()
    kept = []

    @decorate
    def step(x):
        w.grad = None
        (w * x).sum().backward()

    def call(n):
        before = None if w.grad is None else (w.grad, w.grad.clone())
        step(tensor(3, seed=n))
        if before:
            kept.append(bool((before[0] == before[1]).all()))
        return w.grad, list(kept)

    return call


def gradients_accumulate(decorate):
    w = tensor(3).requires_grad_()

    @decorate
    def step(x):
        (w * x).sum().backward()

    def call(n):
        if n == 4:
            w.grad = None
        step(tensor(3, seed=n))
        return w.grad.clone()

    return call


def same_object_returned(decorate):
    @decorate
    def step(x, y):
        return x, y + 1

    def call(n):
        x, y = tensor(3, seed=n), tensor(3)
        a, b = step(x, y)
        return a is x, b

    return call


def views_share_memory(decorate):
    @decorate
    def step(x):
        y = x * 2
        return y, y.t(), y[0]

    def call(n):
        y, t, row = step(tensor(3, 4, seed=n))
        y.add_(1)
        return y, t, row

    return call


@pytest.mark.parametrize("program", [writes_through_a_view, numpy_alias, arguments_that_overlap, hidden_state,
                                     old_gradient_is_left_alone, gradients_accumulate, same_object_returned,
                                     views_share_memory], ids=lambda p: p.__name__)
def test_memory(program):
    check(program)


# --- gradients across the edge ------------------------------------------------------------------------------------

def network(seed=0):
    jg.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def gradients_of(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def two_forwards_one_backward(decorate):
    net = network()
    call_net = decorate(net)

    def call(n):
        net.zero_grad()
        a, b = call_net(tensor(3, 4, seed=n)), call_net(tensor(3, 4, seed=n + 100))
        (a.sum() + (b * b).sum()).backward()
        return a, b, gradients_of(net)

    return call


def loss_and_backward_outside(decorate):
    net = network()
    call_net, optimizer = decorate(net), optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def call(n):
        optimizer.zero_grad()
        loss = ((call_net(tensor(3, 4, seed=n)) - 1) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss, list(net.parameters())

    return call


def eager_encoder_compiled_head(decorate):
    encoder, head = network(1), nn.Linear(2, 1)
    optimizer = optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)

    @decorate
    def head_step(h, y):
        loss = ((head(h) - y) ** 2).mean()
        loss.backward()
        return loss

    def call(n):
        if n == 0:
            jg.manual_seed(3)
            head.reset_parameters()
        optimizer.zero_grad()
        loss = head_step(encoder(tensor(3, 4, seed=n)), tensor(3, 1, seed=n + 7))
        optimizer.step()
        return loss, list(encoder.parameters())

    return call


def gan_step(decorate):
    generator, critic = network(1), nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    jg.manual_seed(2)
    for p in critic.parameters():
        with jg.no_grad():
            p.uniform_(-0.5, 0.5)
    opt_g, opt_c = optim.Adam(generator.parameters(), lr=1e-2), optim.Adam(critic.parameters(), lr=1e-2)

    @decorate
    def step(z, real):
        fake = generator(z)
        loss_c = critic(fake.detach()).mean() - critic(real).mean()
        opt_c.zero_grad()
        loss_c.backward()
        opt_c.step()
        loss_g = -critic(fake).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        return loss_c, loss_g

    return lambda n: (*step(tensor(3, 4, seed=n), tensor(3, 2, seed=n + 50)), list(generator.parameters()),
                      list(critic.parameters()))


def create_graph_through_a_call(decorate):
    net = network()
    call_net = decorate(net)

    def call(n):
        net.zero_grad()
        x = tensor(3, 4, seed=n).requires_grad_()
        (g,) = jg.autograd.grad(call_net(x).sum(), x, create_graph=True)
        (g ** 2).sum().backward()
        return g, gradients_of(net)

    return call


def gradient_accumulation(decorate):
    net = network()
    optimizer = optim.SGD(net.parameters(), lr=0.1)

    @decorate
    def step(x, last):
        (net(x) ** 2).mean().backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()

    return lambda n: (step(tensor(3, 4, seed=n), n % 3 == 2), gradients_of(net), list(net.parameters()))


def detached_part(decorate):
    net = network()
    call_net = decorate(lambda x: (net(x).detach() * net(x)).sum())

    def call(n):
        net.zero_grad()
        call_net(tensor(3, 4, seed=n)).backward()
        return gradients_of(net)

    return call


@pytest.mark.parametrize("program", [two_forwards_one_backward, loss_and_backward_outside, eager_encoder_compiled_head,
                                     gan_step, create_graph_through_a_call, gradient_accumulation, detached_part],
                         ids=lambda p: p.__name__)
def test_edge(program):
    check(program)


def test_second_backward_is_the_same_error():
    net = jg.compile(network())
    loss = net(tensor(3, 4)).sum()
    loss.backward()
    with pytest.raises(AutogradError, match="second time"):
        loss.backward()


def test_backward_after_a_parameter_changed_is_an_error():
    w = tensor(3).requires_grad_()
    loss = jg.compile(lambda: (w * w).sum())()
    with jg.no_grad():
        w.add_(1)
    with pytest.raises(AutogradError, match="in place"):
        loss.backward()


# --- sealing, recompiles, numbers ---------------------------------------------------------------------------------

def training(seed=0, optimizer=optim.AdamW, **options):
    net = network(seed)
    opt = optimizer(net.parameters(), **{"lr": 1e-2, **options})
    criterion = nn.CrossEntropyLoss()

    @jg.compile
    def step(x, y):
        opt.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        opt.step()
        return loss

    return net, opt, step


def labels(n, seed=0):
    return jg.from_numpy(np.random.default_rng(seed).integers(0, 2, n))


def test_a_plain_training_step_is_sealed():
    _, _, step = training()
    for n in range(6):
        step(tensor(8, 4, seed=n), labels(8, n))
    assert step.statistics.sealed_calls >= 3, step.statistics.replayed_because
    assert len(step.statistics.compilations) == 1


class Network(nn.Module):
    """What real models have: convolutions, batch norm, dropout, a list of blocks, attributes, modes."""

    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Dropout(0.1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(2)])
        self.head, self.scale = nn.Linear(width * 9, 10), 1.0

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = x + block(x)
        x = self.drop(nn.functional.max_pool2d(x, 2).flatten(1))
        if self.training:
            x = x * self.scale
        return self.head(x)


class Trainer:
    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.criterion = model, optimizer, nn.CrossEntropyLoss()

    @jg.compile
    def step(self, x, y):
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss


def test_usual_training_code_is_sealed():
    model, criterion = Network(), nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    functional = nn.functional

    @jg.compile
    def everything(x, y):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        out = model(x)
        loss = criterion(out, y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.detach(), "accuracy": (out.argmax(1) == y).float().mean(), "norm": norm}

    @jg.compile
    def read_at_the_end(x, y):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    @jg.compile
    def as_arguments(model, optimizer, x, y):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    @jg.compile
    @jg.no_grad()
    def evaluate(x, y):
        return (model(x).argmax(1) == y).float().mean()

    @jg.compile
    def by_hand(x, y):
        params = list(model.parameters())
        gradients = jg.autograd.grad(criterion(model(x), y), params)
        with jg.no_grad():
            for p, g in zip(params, gradients):
                p -= 0.01 * g
        return gradients[0].norm()

    @jg.compile
    def moving_average():
        with jg.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name].mul_(0.99).add_(value, alpha=0.01)

    compiled_model, trainer = jg.compile(model), Trainer(model, optimizer)

    def outside(x, y):
        optimizer.zero_grad()
        criterion(compiled_model(x), y).backward()
        optimizer.step()

    for n in range(5):
        x, y = tensor(8, 1, 6, 6, seed=n), jg.from_numpy(np.random.default_rng(n).integers(0, 10, 8))
        everything(x, y), read_at_the_end(x, y), as_arguments(model, optimizer, x, y), evaluate(x, y), by_hand(x, y)
        outside(x, y), trainer.step(x, y), moving_average()
    for function in (everything, read_at_the_end, as_arguments, evaluate, by_hand, moving_average,
                     type(compiled_model)._compiled_call, Trainer.step):
        assert function.statistics.sealed_calls == 3, (function, function.statistics.replayed_because)


def test_scheduler_changes_lr_and_betas_without_a_recompile():
    _, opt, step = training()
    reference, opt2, _ = training()
    criterion = nn.CrossEntropyLoss()
    for n in range(60):
        for o in (opt, opt2):
            o.param_groups[0]["lr"] = 1e-2 / (n + 1)
            o.param_groups[0]["betas"] = (0.9 - n / 1000, 0.99)
        x, y = tensor(8, 4, seed=n), labels(8, n)
        step(x, y)
        opt2.zero_grad()
        criterion(reference(x), y).backward()
        opt2.step()
    assert len(step.statistics.compilations) == 1
    assert step.statistics.sealed_calls >= 57
    same(list(opt.param_groups[0]["params"]), list(reference.parameters()))


def test_traced_numbers_cost_no_recompile():
    x = tensor(10)

    @jg.compile
    def step(i, tau, scale):
        y = x[i] * tau
        return y + 1 if scale > 1 else y / scale

    for n in range(12):
        same(step(n % 10, 0.5 * n, 1.5 if n % 4 else 0.5), x[n % 10] * (0.5 * n) + 1 if n % 4
             else x[n % 10] * (0.5 * n) / 0.5)
    assert len(step.statistics.compilations) == 2
    assert step.statistics.sealed_calls >= 6, step.statistics.replayed_because
    with pytest.raises(OutOfRangeError, match=r"index 20 .*test_compile.py"):
        step(20, 1.0, 2.0)


def test_no_garbage_is_collected_while_a_step_is_recorded():
    seen = []

    @jg.compile
    def step(x):
        seen.append(gc.isenabled())
        y = x * 2
        if y.sum() > 0:
            seen.append(gc.isenabled())               # a cut: what follows may take long
        return y

    for _ in range(2):
        step(jg.ones(3))
        assert gc.isenabled()
    assert seen == [False, True] * 2
    failing = jg.compile(lambda x: x + seen.missing)
    with pytest.raises(AttributeError, match="missing"):
        failing(jg.ones(3))
    assert gc.isenabled()


def test_train_eval_train_finds_its_plan_again():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    step = jg.compile(lambda x: net(x).detach())
    x = tensor(8, 4)
    for _ in range(3):
        for mode in (True, False):
            net.train(mode)
            for _ in range(3):
                jg.manual_seed(1)
                got = step(x)
                jg.manual_seed(1)
                same(got, net(x).detach())
    assert len(step.statistics.compilations) == 2


def test_fullgraph_makes_a_read_an_error():
    @jg.compile(fullgraph=True)
    def step(x):
        y = x * 2
        return y if y.sum() > 0 else -y

    with pytest.raises(CompileError, match=r"fullgraph.*test_compile.py"):
        step(tensor(3))


def test_generators_and_coroutines_are_refused():
    def numbers():
        yield 1

    with pytest.raises(CompileError, match="generator"):
        jg.compile(numbers)


def test_wrong_mode_is_refused():
    with pytest.raises(CompileError, match="max-autotune"):
        jg.compile(lambda x: x, mode="fastest")


def test_every_recompile_has_a_reason():
    step = jg.compile(lambda x: x * 2)
    step(tensor(3))
    step(tensor(4))
    reasons = [c.reason for c in step.statistics.compilations]
    assert reasons[0] == "first call" and "f32[3]" in reasons[1] and "f32[4]" in reasons[1]


def test_compiled_module_keeps_its_class():
    net = network()
    compiled = jg.compile(net)
    assert isinstance(compiled, nn.Sequential) and isinstance(compiled, type(net))
    assert list(compiled.state_dict()) == list(net.state_dict())
    compiled.eval()
    assert not net.training
    clone = copy.deepcopy(compiled)
    same(clone(tensor(3, 4)).detach(), net(tensor(3, 4)).detach())
    with jg.no_grad():
        clone[0].weight.zero_()
    assert float(net[0].weight.abs().sum()) > 0


def test_methods_are_compiled_per_instance():
    class Scale:
        def __init__(self, k):
            self.k = k

        @jg.compile
        def __call__(self, x):
            return x * self.k

        @jg.compile
        def apply(self, x):
            return x * self.k

    two, three = Scale(2.0), Scale(3.0)
    for _ in range(4):
        same(two.apply(tensor(3)), tensor(3) * 2)
        same(three.apply(tensor(3)), tensor(3) * 3)


def test_compiled_inside_compiled_is_inlined():
    inner = jg.compile(lambda x: x * 2)
    outer = jg.compile(lambda x: inner(x) + 1)
    same(outer(tensor(3)), tensor(3) * 2 + 1)
    assert inner.statistics.calls == 0


def test_func_grad_of_a_compiled_function_and_inside_of_one():
    f = jg.compile(lambda x: (x ** 3).sum())
    same(jg.func.grad(f)(tensor(3)), 3 * tensor(3) ** 2)
    g = jg.compile(lambda x: jg.func.grad(lambda y: (y ** 3).sum())(x))
    for _ in range(3):
        same(g(tensor(3)), 3 * tensor(3) ** 2)


def test_index_out_of_range_leaves_parameters_alone():
    embedding = nn.Embedding(5, 3)
    opt = optim.SGD(embedding.parameters(), lr=0.1)

    @jg.compile
    def step(index):
        opt.zero_grad()
        embedding(index).sum().backward()
        opt.step()

    good, bad = jg.tensor([0, 1, 4]), jg.tensor([0, 1, 5])
    for index in (good, good, good, bad):
        before = embedding.weight.detach().clone()
        if index is bad:
            with pytest.raises(OutOfRangeError):
                step(index)
            assert bool((embedding.weight == before).all())
        else:
            step(index)


def test_several_threads_call_one_function():
    step = jg.compile(lambda x: (x * 2 + 1).sum())
    wrong = []

    def work(seed):
        for n in range(30):
            x = tensor(50, seed=seed * 100 + n)
            if abs(float(step(x)) - float((x * 2 + 1).sum())) > 1e-3:
                wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_a_prefetch_thread_works_eagerly_meanwhile():
    results = []

    @jg.compile
    def step(x):
        worker = threading.Thread(target=lambda: results.append(float((tensor(3) * 2).sum())))
        worker.start()
        worker.join()
        return x * 2

    same(step(tensor(3)), tensor(3) * 2)
    assert results == [pytest.approx(float((tensor(3) * 2).sum()))]


def test_random_numbers_are_those_of_eager():
    f = lambda x: (nn.functional.dropout(x, 0.3), jg.rand(3), jg.randn(2))
    compiled = jg.compile(f)
    jg.manual_seed(5)
    expected = [f(tensor(20)) for _ in range(5)]
    jg.manual_seed(5)
    same(expected, [compiled(tensor(20)) for _ in range(5)])
    assert compiled.statistics.sealed_calls >= 2, compiled.statistics.replayed_because


def test_disabled_runs_the_plain_function():
    step = jg.compile(lambda x: x * 2)
    with jg.config.scope(disable=True):
        same(step(tensor(3)), tensor(3) * 2)
    assert step.statistics.calls == 0


@pytest.mark.parametrize("kind", ["sealed", "replayed", "edge"])
def test_calls_leave_nothing_behind(kind):
    net, log = network(), []
    optimizer, forward = optim.Adam(net.parameters()), jg.compile(net) if kind == "edge" else net

    def body(x):
        if kind == "replayed":
            log.append(1)
        optimizer.zero_grad()
        loss = (forward(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss

    step = body if kind == "edge" else jg.compile(body)
    x = tensor(8, 4)
    for _ in range(5):
        step(x)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(o, jg.Tensor) for o in gc.get_objects())
        for _ in range(10):
            step(x)
        assert sum(isinstance(o, jg.Tensor) for o in gc.get_objects()) <= before + 2
    finally:
        gc.enable()
