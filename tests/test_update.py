"""Optimizer updates in the kernels of the products that make the gradients."""

from itertools import pairwise

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import config, nn, pipeline
from jitgrad.plans import clear_plans
from jitgrad.runtime.build import kernel_key
from jitgrad.transforms import update

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}), ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"lr": 0.1, "maximize": True}), ("Adam", {"weight_decay": 0.1}), ("Adam", {"amsgrad": True}), ("AdamW", {}),
    ("Adamax", {}), ("RMSprop", {"momentum": 0.5, "centered": True}), ("Adagrad", {}), ("Adadelta", {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.fixture
def small(monkeypatch, folder):
    """Updates of small parameters are fused, too, so that kernels can run as plain Python. Plans made under such limits
    stay in a cache of their own."""
    for name in ("LEAST_ROWS", "LEAST_SIZE", "LEAST_DEPTH"):
        monkeypatch.setattr(update, name, 1)
    clear_plans()
    with config.scope(cache=folder):
        yield
    clear_plans()


def make_model(sizes, dtype=jg.float32, seed=0):
    jg.manual_seed(seed)
    layers = [layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def make_step(model, optimizer, compiled, **zero):
    def step(x, y):
        optimizer.zero_grad(**zero)
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss
    return jg.compile(step) if compiled else step


def train(compiled, sizes=(5, 7, 3), rows=6, name="SGD", options=None, dtype=jg.float32, count=3):
    model = make_model(sizes, dtype)
    optimizer = getattr(jg.optim, name)(model.parameters(), **(options or {"lr": 0.1}))
    step = make_step(model, optimizer, compiled)
    rng = np.random.default_rng(1)
    for _ in range(count):
        step(jg.tensor(rng.standard_normal((rows, sizes[0])), dtype=dtype),
             jg.tensor(rng.standard_normal((rows, sizes[-1])), dtype=dtype))
    return step, model, optimizer


def values_of(model, optimizer):
    """Parameters, their gradients, and the optimizer's state."""
    found = [*model.parameters(), *[p.grad for p in model.parameters()]]
    for p in model.parameters():
        found += [v for _, v in sorted(optimizer.state[p].items())]
    return [np.asarray(v.detach().numpy()) for v in found]


def kinds(step):
    return [view.kind for view in step.plan.steps]


def assert_same(first, second, exact=False):
    for a, b in zip(values_of(*first), values_of(*second), strict=True):
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


# ---- which updates are fused --------------------------------------------------------------------------------------


def large_step(name="SGD", batch=256, sizes=(128, 512, 512, 10)):
    return train(True, sizes, batch, name, count=2)[0]


def test_large_weights_are_updated_by_their_products():
    step = large_step()
    assert kinds(step).count("update") == 2                 # 512x128 and 512x512; 10x512 has few rows
    (rest,) = [s for s in step.plan.build.stages[-1].graph.nodes if s.op.kind == "foreach"]
    assert rest.attrs["groups"] == 4                        # the last weight and the biases
    assert not [e.name for e in step.plan.build.spec.entries if e.name.startswith("fused_copy")]    # all in place


def test_sums_of_few_terms_and_small_parameters_stay_together():
    assert "update" not in kinds(large_step(batch=128))
    assert "update" not in kinds(large_step(sizes=(16, 512, 256, 10)))


def test_equal_layers_share_one_kernel():
    few, many = large_step("AdamW", sizes=(512, 512, 512)), large_step("AdamW", sizes=(512,) * 7)
    assert (kinds(few).count("update"), kinds(many).count("update")) == (2, 6)
    kernels = [{entry.kernel for entry in step.plan.build.spec.entries} for step in (few, many)]
    assert kernels[0] == kernels[1]


def test_the_kernel_reads_and_writes_in_one_loop():
    step = large_step("AdamW")
    texts = [k.source for k in step.kernels if "sqrt" in k.source and "invoke" in k.source]
    assert len(texts) == 2 and len(set(map(kernel_key, texts))) == 1
    assert texts[0].count("for element in range(first_row * n, last_row * n)") == 1 and "for column" not in texts[0]


def test_clipping_by_the_norm_of_all_gradients_needs_them_first(small):
    model = make_model((5, 7, 3))
    optimizer = jg.optim.SGD(model.parameters(), lr=0.1)

    @jg.compile
    def step(x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    step(jg.randn(6, 5))
    assert "update" not in kinds(step)


@pytest.mark.parametrize("compiled", (False, True))
def test_tied_weights_are_updated_when_their_gradients_are_added(small, compiled):
    jg.manual_seed(0)
    layer = nn.Linear(5, 5, bias=False)
    optimizer = jg.optim.SGD(layer.parameters(), lr=0.1)

    def step(x):
        optimizer.zero_grad()
        layer(layer(x).tanh()).square().sum().backward()
        optimizer.step()

    before = layer.weight.detach().numpy().copy()
    run = jg.compile(step) if compiled else step
    run(jg.ones(3, 5))
    np.testing.assert_allclose(layer.weight.detach().numpy(), before - 0.1 * layer.weight.grad.numpy(), rtol=1e-5,
                               atol=1e-6)


def test_a_weight_that_its_own_product_reads(small):
    results = []
    for compiled in (False, True):
        jg.manual_seed(0)
        w = nn.Parameter(jg.randn(4, 4))
        optimizer = jg.optim.SGD([w], lr=0.1)

        def step(x, w=w, optimizer=optimizer):
            optimizer.zero_grad()
            ((x * w.detach()).mT @ w).sum().backward()
            optimizer.step()

        (jg.compile(step) if compiled else step)(jg.ones(4, 4))
        results.append(w.detach().numpy())
    np.testing.assert_allclose(*results, rtol=1e-5)


# ---- what they compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", (False, True))
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=lambda case: str(case))
def test_every_optimizer_does_what_it_does_eagerly(small, name, options, plain):
    with config.scope(plain=plain):
        step, *fused = train(True, name=name, options=options)
        assert kinds(step).count("update") == 2 if not plain else True
    assert_same(fused, train(False, name=name, options=options)[1:])


@pytest.mark.parametrize("name", ("SGD", "AdamW", "Adamax"))
@pytest.mark.parametrize("dtype", (jg.float32, jg.float64))
def test_to_the_last_bit_as_without_fusing(small, monkeypatch, tmp_path, name, dtype):
    step, *fused = train(True, (33, 70, 17), 40, name, {"lr": 0.1}, dtype)
    assert kinds(step).count("update") == 2
    monkeypatch.setattr(pipeline, "PASSES", tuple(p for p in pipeline.PASSES if p[0] != "update"))
    clear_plans()
    with config.scope(cache=tmp_path):
        other, *apart = train(True, (33, 70, 17), 40, name, {"lr": 0.1}, dtype)
    assert "update" not in kinds(other)
    assert_same(fused, apart, exact=True)


def test_half_precision_is_rounded_before_it_is_used(small):
    step, *_ = train(True, name="SGD", dtype=jg.bfloat16)
    assert "update" not in kinds(step)


def test_a_learning_rate_that_changes_needs_no_new_kernel(small):
    found = []
    for compiled in (False, True):
        model = make_model((5, 7, 3))
        optimizer = jg.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = jg.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step = make_step(model, optimizer, compiled)
        for _ in range(4):
            step(jg.ones(6, 5), jg.ones(6, 3))
            schedule.step()
        found.append((model, optimizer))
    assert kinds(step).count("update") == 2 and len(step.graphs) == 1
    assert_same(*found)


def test_gradients_that_the_function_drops(small):
    found = []
    for compiled in (False, True):
        model = make_model((5, 7, 3))
        optimizer = jg.optim.Adam(model.parameters(), lr=0.1)

        def step(x, model=model, optimizer=optimizer):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = jg.compile(step) if compiled else step
        for _ in range(3):
            run(jg.ones(6, 5))
        assert all(p.grad is None for p in model.parameters())
        found.append([p.detach().numpy() for p in model.parameters()])
    assert kinds(run).count("update") == 2
    assert not [v for v in run.plan.build.stages[-1].graph.outputs if v.shape]
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_that_add_up_over_calls(small):
    found = []
    for compiled in (False, True):
        model = make_model((5, 7, 3))
        optimizer = jg.optim.SGD(model.parameters(), lr=0.05)

        def step(x, last, model=model, optimizer=optimizer):
            model(x).square().sum().backward()
            if last:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)

        run = jg.compile(step) if compiled else step
        for k in range(7):
            run(jg.full((6, 5), 0.1 * k), k % 3 == 2)
        found.append((model, optimizer))
    assert_same(*found)


def test_old_and_new_contents_read_beside_the_update(small):
    found = []
    for compiled in (False, True):
        model, average = make_model((5, 7, 3)), make_model((5, 7, 3))
        optimizer = jg.optim.SGD(model.parameters(), lr=0.1)

        def step(x, model=model, average=average, optimizer=optimizer):
            old = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            with jg.no_grad():
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    a.mul_(0.9).add_(p, alpha=0.1)
            return [p - o for p, o in zip(model.parameters(), old, strict=True)]

        run = jg.compile(step) if compiled else step
        moved = [run(jg.ones(6, 5)) for _ in range(3)][-1]
        found.append([p.detach().numpy() for p in (*model.parameters(), *average.parameters(), *moved)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=4e-6)


def test_groups_with_options_of_their_own(small):
    found = []
    for compiled in (False, True):
        model = make_model((5, 7, 3))
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "weight_decay": 0.5}]
        optimizer = jg.optim.AdamW(groups, lr=0.01)
        step = make_step(model, optimizer, compiled)
        for _ in range(3):
            step(jg.ones(6, 5), jg.ones(6, 3))
        found.append((model, optimizer))
    assert kinds(step).count("update") == 2
    assert_same(*found)


def test_an_index_out_of_range_leaves_parameters_alone(small):
    table, layer = nn.Embedding(10, 5), nn.Linear(5, 7)
    parameters = [*table.parameters(), *layer.parameters()]
    optimizer = jg.optim.SGD(parameters, lr=0.1)

    @jg.compile
    def step(words):
        optimizer.zero_grad()
        layer(table(words)).square().sum().backward()
        optimizer.step()

    step(jg.tensor([1, 2, 3]))
    assert "update" in kinds(step)
    assert not [e.name for e in step.plan.build.spec.entries if "copy" in e.name]       # tables, too, change in place
    before = [p.detach().numpy().copy() for p in parameters]
    with pytest.raises(IndexError, match="out of range"):
        step(jg.tensor([1, 12, 3]))
    for p, old in zip(parameters, before, strict=True):
        np.testing.assert_array_equal(p.detach().numpy(), old)
    step(jg.tensor([1, 2, 3]))
    assert not np.array_equal(layer.weight.detach().numpy(), before[1])


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(small, seed):
    rng = np.random.default_rng(seed)
    sizes = tuple(int(n) for n in rng.integers(1, 40, rng.integers(2, 5)))
    name, options = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]
    rows = int(rng.integers(1, 40))
    dtype = jg.float64 if seed % 2 else jg.float32
    with config.scope(plain=seed % 8 == 0, check=True):
        _, *fused = train(True, sizes, rows, name, options, dtype)
    _, *eager = train(False, sizes, rows, name, options, dtype)
    for a, b in zip(values_of(*fused), values_of(*eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
