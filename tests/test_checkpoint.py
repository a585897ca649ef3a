"""Gradient checkpointing and the memory budget: the same gradients, and less memory, eager and compiled."""

import gc
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn
from jitgrad.errors import AutogradError, CheckpointError, CompileError
from jitgrad.ir import evaluate
from jitgrad.transforms.rematerialize import rematerialize
from jitgrad.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop


def mlp(layers=6, width=64, dropout=0.1):
    jg.manual_seed(1)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout),
                                         nn.Linear(4 * width, width), nn.Tanh()) for _ in range(layers)])


def plainly(block, x):
    return block(x)


def gradients(model, x, run):
    """Loss and gradients with every block of `model` called by `run`."""
    jg.manual_seed(7)
    x = x.detach().requires_grad_()
    h = x
    for block in model:
        h = run(block, h)
    loss = (h * h).sum()
    model.zero_grad()
    loss.backward()
    return [loss.detach().numpy(), x.grad.numpy(), *[p.grad.numpy().copy() for p in model.parameters()]]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


def training_step(model, optimizer, run, **options):
    @jg.compile(**options)
    def step(x):
        optimizer.zero_grad()
        h = x
        for block in model:
            h = run(block, h)
        loss = (h * h).mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


# ---- eager -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True, None])
def test_gradients_and_dropout_masks_are_those_without(reentrant):
    model, x = mlp(), jg.randn(8, 64)
    expected = gradients(model, x, plainly)
    assert_same(gradients(model, x, lambda block, h: checkpoint(block, h, use_reentrant=reentrant)), expected)
    with set_checkpoint_early_stop(False):
        assert_same(gradients(model, x, checkpoint), expected)


def test_the_stream_of_random_numbers_goes_on_where_it_was():
    model, x = mlp(), jg.randn(8, 64)
    gradients(model, x, plainly)
    after = jg.get_rng_state()
    gradients(model, x, checkpoint)
    assert jg.get_rng_state() == after


def test_without_preserved_state_the_second_run_draws_anew():
    x = jg.ones(64, requires_grad=True)
    for preserve in (True, False):
        y = checkpoint(lambda x: nn.functional.dropout(x, 0.5), x, preserve_rng_state=preserve)
        before = jg.get_rng_state()
        (g,) = jg.autograd.grad(y.sum(), [x])
        assert (jg.get_rng_state() == before) is preserve
        assert np.array_equal(g.numpy(), y.detach().numpy()) is preserve


def test_peak_memory_falls():
    model, x = mlp(layers=12, width=128, dropout=0.0), jg.randn(512, 128)

    def peak(run):
        gradients(model, x, run)
        gc.collect()
        tracemalloc.start()
        try:
            gradients(model, x, run)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    kept = peak(plainly)
    assert peak(checkpoint) < 0.6 * kept
    four = peak(lambda block, h: h if block is not model[0] else checkpoint_sequential(model, 4, h))
    assert four < 0.7 * kept


def test_captured_tensors_get_their_gradients():
    w, x = jg.randn(4, 4, requires_grad=True), jg.randn(3, 4)
    h = jg.tanh(x @ w)

    def inside(scale):
        return (h * jg.sigmoid(h @ w)) * scale

    expected = jg.autograd.grad(inside(2.0).sum(), [w], retain_graph=True)[0]
    found = jg.autograd.grad(checkpoint(inside, 2.0).sum(), [w])[0]
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_nested_checkpoints():
    model, x = mlp(4), jg.randn(8, 64)
    expected = gradients(model, x, plainly)

    def inner(block, h):
        return checkpoint(lambda h: checkpoint(block, h) * 1.0, h)

    assert_same(gradients(model, x, inner), expected)
    runs = []

    def counted(block):
        def run(h):
            runs.append(block)
            return block(h)
        return run

    x.requires_grad_()
    pair = checkpoint(lambda h: checkpoint(counted(model[1]), checkpoint(counted(model[0]), h)), x)
    pair.sum().backward()
    assert 4 <= len(runs) <= 6                        # twice each, and once more inside of the outer second run at most


def test_several_outputs_and_other_values():
    x = jg.randn(3, 4, requires_grad=True)

    def function(x, *, scale, parts):
        y = jg.exp(x) * scale
        return {"y": y, "n": 3, "z": (jg.sin(y) * parts[0], "text")}

    out = checkpoint(function, x, scale=0.5, parts=[jg.full((4,), 2.0), None])
    assert out["n"] == 3 and out["z"][1] == "text"
    (out["y"].sum() + out["z"][0].sum()).backward()
    other = x.detach().requires_grad_()
    expected = function(other, scale=0.5, parts=[jg.full((4,), 2.0)])
    (expected["y"].sum() + expected["z"][0].sum()).backward()
    np.testing.assert_array_equal(x.grad.numpy(), other.grad.numpy())


def test_what_wants_no_gradient_stays_so():
    x = jg.randn(3)
    assert not checkpoint(jg.exp, x).requires_grad
    x.requires_grad_()
    with jg.no_grad():
        assert not checkpoint(jg.exp, x).requires_grad
    detached = checkpoint(lambda x: jg.exp(x).detach(), x)
    assert not detached.requires_grad


def test_higher_orders():
    x = jg.tensor([0.3, -0.7, 1.1], dtype=jg.float64, requires_grad=True)

    def function(x):
        return jg.sin(x * x) * jg.exp(x)

    def third(f):
        g = jg.autograd.grad(f(x).sum(), [x], create_graph=True)[0]
        h = jg.autograd.grad(g.sum(), [x], create_graph=True)[0]
        return jg.autograd.grad(h.sum(), [x])[0].numpy()

    np.testing.assert_array_equal(third(lambda x: checkpoint(function, x)), third(function))


def test_backward_twice_and_a_gradient_inside():
    x = jg.randn(5, requires_grad=True)
    y = checkpoint(lambda x: jg.exp(jg.sin(x)), x).sum()
    y.backward(retain_graph=True)
    once = x.grad.numpy().copy()
    y.backward()
    np.testing.assert_array_equal(x.grad.numpy(), 2 * once)
    with pytest.raises(AutogradError, match="second time"):
        y.backward()

    def with_gradient(x):
        y = jg.exp(x) * x
        (g,) = jg.autograd.grad(y.sum(), [x], create_graph=True)
        return jg.sin(g) * y

    x = jg.randn(5, requires_grad=True)
    found = jg.autograd.grad(checkpoint(with_gradient, x).sum(), [x])[0]
    np.testing.assert_array_equal(found.numpy(), jg.autograd.grad(with_gradient(x).sum(), [x])[0].numpy())


def test_custom_functions_and_compiled_calls_inside():
    class Cube(jg.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x * x * x
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return g * 3 * y / x

    compiled = jg.compile(lambda x: jg.exp(jg.sin(x)) * x)
    x = jg.rand(6, requires_grad=True) + 0.5
    for function in (Cube.apply, compiled, lambda x: compiled(Cube.apply(x)) * x):
        for _ in range(4):                            # the compiled call is recorded, then sealed
            found = jg.autograd.grad(checkpoint(function, x).sum(), [x], retain_graph=True)[0]
            expected = jg.autograd.grad(function(x).sum(), [x], retain_graph=True)[0]
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6)


def test_contexts_of_both_runs():
    entered = []

    @contextmanager
    def noting(name):
        entered.append(name)
        yield

    x = jg.randn(3, requires_grad=True)
    y = checkpoint(jg.exp, jg.sin(x), context_fn=lambda: (noting("first"), noting("second")))
    assert entered == ["first"]
    y.sum().backward()
    assert entered == ["first", "second"]


def test_sequential():
    model, x = mlp(5, dropout=0.0), jg.randn(8, 64)
    x.requires_grad_()
    expected = jg.autograd.grad(model(x).sum(), [x, *model.parameters()])
    for functions in (model, list(model)):
        for segments in (1, 2, 5):
            y = checkpoint_sequential(functions, segments, x)
            for a, b in zip(jg.autograd.grad(y.sum(), [x, *model.parameters()]), expected):
                np.testing.assert_array_equal(a.numpy(), b.numpy())
    with pytest.raises(CheckpointError, match="6 segments of 5 functions"):
        checkpoint_sequential(model, 6, x)


# ---- errors ------------------------------------------------------------------------------------------------------


def test_a_function_that_does_other_things_is_an_error():
    calls = []

    def moody(x):
        calls.append(1)
        return jg.sin(x) if len(calls) % 2 else jg.exp(x)

    x = jg.randn(3, requires_grad=True)
    with pytest.raises(CheckpointError, match=r"did other things when it ran again: ExpBackward of f32\[3\].*SinBackward"):
        checkpoint(moody, x).sum().backward()
    with pytest.raises(CheckpointError, match=r"line \d+ of .*test_checkpoint"):
        checkpoint(moody, x, debug=True).sum().backward()
    calls.clear()

    def shorter(x):
        calls.append(1)
        return jg.sin(jg.sin(x)) if len(calls) == 1 else jg.sin(x)

    with pytest.raises(CheckpointError, match="ended before"):
        checkpoint(shorter, x).sum().backward()


def test_bad_arguments():
    with pytest.raises(CheckpointError, match="needs a function, got int"):
        checkpoint(3, jg.ones(2))
    with pytest.raises(CheckpointError, match="determinism_check='all'"):
        checkpoint(jg.exp, jg.ones(2), determinism_check="all")


def test_an_input_that_was_changed_is_an_error():
    x = jg.randn(3, requires_grad=True)
    h = x * 2
    y = checkpoint(jg.exp, h)
    with jg.no_grad():
        h.add_(1)
    with pytest.raises(CheckpointError, match="changed in place"):
        y.sum().backward()


# ---- compiled ----------------------------------------------------------------------------------------------------


def test_a_compiled_step_seals_and_computes_the_same():
    x = jg.randn(16, 64)
    found = {}
    for run in (plainly, checkpoint):
        model = mlp()
        optimizer = jg.optim.SGD(model.parameters(), lr=0.1)
        step = training_step(model, optimizer, run)
        jg.manual_seed(3)
        losses = [step(x).item() for _ in range(5)]
        assert step.statistics.sealed_calls >= 2
        found[run] = [np.array(losses), *[p.detach().numpy().copy() for p in model.parameters()], jg.get_rng_state()]
    assert_same(found[checkpoint][-1:], found[plainly][-1:])
    for a, b in zip(found[checkpoint], found[plainly]):                 # fused otherwise, sums have another order
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_peak_memory_of_the_plan_falls():
    x = jg.randn(256, 64)
    memory = {}
    for run in (plainly, checkpoint):
        model = mlp(layers=10)
        step = training_step(model, jg.optim.SGD(model.parameters(), lr=0.1), run)
        step(x)
        memory[run] = step.plan.memory
    assert memory[checkpoint].arena < 0.4 * memory[plainly].arena
    assert memory[checkpoint].peak < memory[plainly].peak


def test_backward_outside_of_the_compiled_call():
    model, x = mlp(dropout=0.2), jg.randn(512, 64)

    def forward(x, run):
        for block in model:
            x = run(block, x)
        return (x * x).sum()

    found, saved = {}, {}
    for run in (plainly, checkpoint):
        compiled = jg.compile(lambda x, run=run: forward(x, run))
        for _ in range(4):
            jg.manual_seed(5)
            model.zero_grad()
            loss = compiled(x)
            saved[run] = sum(t.tensor_type.nbytes for t in loss.grad_fn.saved)
            loss.backward()
        assert compiled.statistics.sealed_calls >= 1
        found[run] = [loss.detach().numpy(), *[p.grad.numpy().copy() for p in model.parameters()]]
    for a, b in zip(found[checkpoint], found[plainly]):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    assert saved[checkpoint] < 0.4 * saved[plainly]


def test_a_recorded_first_run_is_repeated_outside_and_the_other_way_round():
    """Where the call's history is more than its graph (a detach on the way), the tape of the recording stays."""
    model, x = mlp(2, dropout=0.0), jg.randn(8, 64)
    block = model[0]

    @jg.compile
    def inner(h):
        return block(h)

    def forward(x):
        h = checkpoint(inner, x)
        return (h * h.detach()).sum()

    parameters = list(block.parameters())
    expected = jg.autograd.grad(forward(x), parameters)
    compiled = jg.compile(forward)
    for a, b in zip(jg.autograd.grad(compiled(x), parameters), expected):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)

    @jg.compile
    def back(loss):
        return jg.autograd.grad(loss, parameters)

    for a, b in zip(back(forward(x)), expected):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


class Holder:
    """Something with a method that is checkpointed; `seen` grows where `noisy`."""

    seen: list[int] = []

    def quiet(self, x):
        return jg.exp(x)

    def noisy(self, x):
        Holder.seen.append(1)
        return jg.exp(x)


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_effects_of_what_is_checkpointed_happen_on_every_call(noisy, in_list):
    holder, x = Holder(), jg.randn(3)
    method = holder.noisy if noisy else holder.quiet
    steps = [method, jg.sin]

    @jg.compile
    def one(x):
        return checkpoint(method, x)

    @jg.compile
    def several(x):
        return checkpoint_sequential(steps, 1, x)

    compiled = several if in_list else one
    Holder.seen.clear()
    for _ in range(5):
        compiled(x)
    assert len(Holder.seen) == (5 if noisy else 0)
    assert (compiled.statistics.sealed_calls == 0) is noisy, compiled.statistics.replayed_because


def test_batch_statistics_are_counted_twice_eager_and_compiled():
    for compiled in (False, True):
        norm = nn.BatchNorm1d(4)
        x = jg.randn(8, 4, requires_grad=True)

        def step(x, norm=norm):
            y = checkpoint(norm, x).sum()
            y.backward()
            return y

        (jg.compile(step) if compiled else step)(x)
        assert norm.num_batches_tracked.item() == 2


# ---- the memory budget -------------------------------------------------------------------------------------------


def step_graph(layers=6):
    model = mlp(layers, dropout=0.1)
    step = training_step(model, jg.optim.SGD(model.parameters(), lr=0.1), plainly)
    x = jg.randn(64, 64)
    step(x)
    return step.graphs[0]


def test_less_memory_for_a_lower_budget_and_the_same_results():
    x, found, arenas = jg.randn(256, 64), [], []
    for budget in (1, 0.5, 0.3, 0):
        model = mlp(layers=8)
        step = training_step(model, jg.optim.Adam(model.parameters(), lr=0.01), plainly, memory_budget=budget)
        jg.manual_seed(2)
        losses = [step(x).item() for _ in range(4)]
        assert step.statistics.sealed_calls >= 1
        arenas.append(step.plan.memory.arena)
        found.append([np.array(losses), *[p.detach().numpy() for p in model.parameters()]])
    assert arenas[1] < 0.9 * arenas[0] and arenas[2] < 0.7 * arenas[0] and arenas[3] < 0.5 * arenas[0]
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.2, 0.0])
def test_the_pass_keeps_every_value(budget):
    graph = step_graph(3)
    again = rematerialize(graph, budget)
    assert len(again.nodes) > len(graph.nodes)
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(v.shape).astype(v.dtype.numpy) if v.dtype.is_floating_point
              else np.array(3, v.dtype.numpy) for v in graph.inputs]
    for a, b in zip(evaluate(again, arrays), evaluate(graph, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.cpu
def test_a_budget_of_one_changes_nothing_and_others_are_refused():
    stages = {}
    for budget in (1.0, 0.5):
        f = jg.compile(lambda x: jg.exp(x).sum(), memory_budget=budget)
        f(jg.ones(3))
        stages[budget] = [stage.name for stage in f.plan.stages]
    assert stages[1.0] == ["trace", "attention", "volumes", "simplify", "cse", "dce", "fuse", "operands", "columns",
                           "pools", "update"]
    assert stages[0.5][6:8] == ["rematerialize", "fuse"]
    for wrong in (-0.1, 2, "half", True):
        with pytest.raises(CompileError, match="a fraction from 0 to 1"):
            jg.compile(jg.exp, memory_budget=wrong)


def test_old_gradients_go_before_new_ones_are_made():
    model = mlp(2, dropout=0.0)
    step = training_step(model, jg.optim.SGD(model.parameters(), lr=0.0), plainly)
    x = jg.randn(8, 64)
    for _ in range(4):
        step(x)
    old, count = model[0][0].weight.grad, step.statistics.sealed_calls
    kept = old.numpy().copy()
    step(x)
    assert step.statistics.sealed_calls == count + 1
    assert model[0][0].weight.grad is not old          # who holds the old one keeps it
    np.testing.assert_array_equal(old.numpy(), kept)
    np.testing.assert_array_equal(model[0][0].weight.grad.numpy(), kept)


def test_like_pytorch():
    torch = pytest.importorskip("torch")
    from torch.utils import checkpoint as theirs
    w, x = np.random.default_rng(0).standard_normal((2, 4, 4))

    def gradients_of(lib, module):
        a = lib.tensor(w, requires_grad=True)
        b = lib.tensor(x, requires_grad=True)

        def f(h):
            return lib.tanh(h @ a) * h

        y = module.checkpoint(f, b, use_reentrant=False)
        z = module.checkpoint_sequential([f, f, f], 2, y, use_reentrant=False)
        z.sum().backward()
        return a.grad.numpy(), b.grad.numpy()

    for a, b in zip(gradients_of(jg, jg.utils.checkpoint), gradients_of(torch, theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-12)
