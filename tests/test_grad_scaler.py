"""`GradScaler`: skipped steps, growth, several optimizers, clipping, accumulation, penalties; eager, compiled, PyTorch."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn

HERE = jg.get_default_device().type
RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.standard_normal((14, 8, 16)).astype(np.float32)
CLASSES = RANDOM.integers(0, 4, (14, 8))
FIRST, SECOND = (RANDOM.standard_normal(shape).astype(np.float32) / 4 for shape in ((32, 16), (4, 32)))
OVERFLOWS = (0, 5, 10)
OPTIMIZERS = {
    "SGD": lambda library, params: library.optim.SGD(params, lr=0.1),
    "momentum": lambda library, params: library.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda library, params: library.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda library, params: library.optim.AdamW(params, lr=0.01),
    "RMSprop": lambda library, params: library.optim.RMSprop(params, lr=0.01, eps=0.1, momentum=0.5,
                                                               centered=True),   # without eps it divides noise by noise
    "Adagrad": lambda library, params: library.optim.Adagrad(params, lr=0.01),
    "Adadelta": lambda library, params: library.optim.Adadelta(params),
    "Adamax": lambda library, params: library.optim.Adamax(params, lr=0.01),
}

NAMES = [name for name, kind in vars(jg.optim).items() if isinstance(kind, type) and name not in (*OPTIMIZERS, "Optimizer")
         and issubclass(kind, jg.optim.Optimizer) and kind.step is jg.optim.Optimizer.step]
OPTIMIZERS.update({name: lambda library, params, name=name: getattr(library.optim, name)(params) for name in NAMES})


def train(library, optimizer, lower="float16", clip=True, compiled=False, steps=14):
    """The same training with either library: what each step gives, the parameters at the end, and the step."""
    model = library.nn.Sequential(library.nn.Linear(16, 32), library.nn.ReLU(), library.nn.Linear(32, 4))
    with library.no_grad():
        for layer, weight in ((model[0], FIRST), (model[2], SECOND)):
            layer.weight.copy_(library.tensor(weight))
            layer.bias.zero_()
    descent = OPTIMIZERS[optimizer](library, model.parameters())
    scaler = library.amp.GradScaler("cpu", init_scale=2.0 ** 10, growth_interval=3)
    criterion = library.nn.CrossEntropyLoss()

    def step(x, y, factor):
        descent.zero_grad()
        with library.autocast(HERE if library is jg else "cpu", dtype=getattr(library, lower)):
            loss = criterion(model(x), y)
        scaler.scale(loss * factor).backward()
        if clip:
            scaler.unscale_(descent)
            library.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(descent)
        scaler.update()
        return loss

    run = library.compile(step, fullgraph=True) if compiled else step
    course = []
    for k in range(steps):
        factor = library.tensor(float("inf") if k in OVERFLOWS else 1.0)
        loss = run(library.tensor(INPUTS[k]), library.tensor(CLASSES[k]), factor)
        course.append((loss.item(), scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))
    return np.array(course), [p.detach().numpy() for p in model.parameters()], run


def assert_equal_course(ours, theirs, tolerance):
    np.testing.assert_array_equal(ours[0][:, 1:], theirs[0][:, 1:])
    np.testing.assert_allclose(ours[0][:, 0], theirs[0][:, 0], rtol=tolerance, atol=tolerance)
    for a, b in zip(ours[1], theirs[1]):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_pytorch(optimizer, clip):
    torch = pytest.importorskip("torch")
    assert_equal_course(train(jg, optimizer, clip=clip), train(torch, optimizer, clip=clip), 2e-2)


@pytest.mark.parametrize("lower", ["float16", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_compiled_step_is_one_sealed_plan(optimizer, lower):
    eager, compiled = train(jg, optimizer, lower), train(jg, optimizer, lower, compiled=True)
    assert_equal_course(compiled, eager, 4e-2)
    step = compiled[2]
    assert len(step.graphs) == 1 and not step.statistics.cuts
    assert step.statistics.sealed_calls == 12


def test_float16_trains():
    losses = train(jg, "Adam", steps=14)[0][:, 0]
    assert np.isfinite(losses).all()
    assert losses[-3:].mean() < losses[:3].mean()


def stepping(compiled, optimizer="Adam", enabled=True):
    """A parameter, its optimizer, a scaler, and a step whose gradient is `slope` everywhere."""
    weight = jg.zeros(5, requires_grad=True)
    descent = OPTIMIZERS[optimizer](jg, [weight])
    scaler = jg.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2, enabled=enabled)

    def step(slope):
        descent.zero_grad()
        scaler.scale((weight * slope).sum()).backward()
        scaler.step(descent)
        scaler.update()

    return weight, descent, scaler, jg.compile(step) if compiled else step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(optimizer, bad, compiled):
    weight, descent, scaler, step = stepping(compiled, optimizer)
    for _ in range(4):
        step(jg.tensor(1.0))
    before = weight.detach().numpy().copy()
    state = {name: value.numpy().copy() for name, value in descent.state[weight].items()}
    scale = scaler.get_scale()
    step(jg.tensor(bad))
    np.testing.assert_array_equal(weight.detach().numpy(), before)
    for name, value in state.items():
        np.testing.assert_array_equal(descent.state[weight][name].numpy(), value)
    assert scaler.get_scale() == scale / 2
    step(jg.tensor(1.0))
    assert (weight.detach().numpy() != before).all()


def test_a_compiled_first_step_may_be_skipped():
    weight, descent, _, step = stepping(compiled=True)
    step(jg.tensor(float("nan")))
    assert not weight.detach().numpy().any() and float(descent.state[weight]["step"]) == 0
    step(jg.tensor(1.0))
    np.testing.assert_allclose(weight.detach().numpy(), -0.01, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_growth_and_backoff(compiled):
    _, _, scaler, step = stepping(compiled)
    scales = []
    for k in range(8):
        step(jg.tensor(float("inf") if k == 5 else 1.0))
        scales.append(scaler.get_scale())
    assert scales == [4, 8, 8, 16, 16, 8, 8, 16]
    scaler.set_growth_factor(3.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(1)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (3.0, 0.25, 1)
    step(jg.tensor(1.0))
    assert scaler.get_scale() == 48
    step(jg.tensor(float("inf")))
    assert scaler.get_scale() == 12


def test_a_scale_does_not_become_infinite():
    _, _, scaler, step = stepping(compiled=False)
    step(jg.tensor(1.0))
    scaler.update(2.0 ** 127)
    scaler.set_growth_interval(1)
    step(jg.tensor(2.0 ** -20))
    assert scaler.get_scale() == 2.0 ** 127


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_two_optimizers_one_update(compiled):
    """One overflows: only its own step is skipped, and the scale shrinks."""
    one, other = (jg.zeros(3, requires_grad=True) for _ in range(2))
    first, second = jg.optim.SGD([one], lr=1.0), jg.optim.Adam([other], lr=1.0)
    scaler = jg.amp.GradScaler("cpu", init_scale=4.0)

    def step(slope):
        first.zero_grad()
        second.zero_grad()
        for loss in scaler.scale([(one * slope).sum(), other.sum()]):
            loss.backward()
        scaler.step(first)
        scaler.step(second)
        scaler.update()

    run = jg.compile(step) if compiled else step
    for _ in range(3):
        run(jg.tensor(1.0))
    run(jg.tensor(float("nan")))
    np.testing.assert_array_equal(one.detach().numpy(), -3.0)
    np.testing.assert_allclose(other.detach().numpy(), -4.0, rtol=1e-5)
    assert scaler.get_scale() == 2.0
    if compiled:
        assert run.statistics.sealed_calls == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_accumulate_before_they_are_unscaled(compiled):
    weight = jg.zeros(3, requires_grad=True)
    descent = jg.optim.SGD([weight], lr=1.0)
    scaler = jg.amp.GradScaler("cpu", init_scale=256.0)

    def step(parts):
        descent.zero_grad()
        for k in range(4):
            with jg.autocast(HERE):
                loss = (weight * parts[k]).sum() / 4
            scaler.scale(loss).backward()
        scaler.step(descent)
        scaler.update()

    run = jg.compile(step) if compiled else step
    for _ in range(4):
        run(jg.tensor([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_array_equal(weight.detach().numpy(), -10.0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient_penalty(compiled):
    """The recipe of PyTorch's manual; the scale is read by Python, so the compiled step is replayed, and right."""
    weight = jg.tensor([3.0, 4.0], requires_grad=True)
    descent = jg.optim.SGD([weight], lr=0.5)
    scaler = jg.amp.GradScaler("cpu", init_scale=64.0)

    def step(x):
        descent.zero_grad()
        loss = (weight * weight * x).sum()
        (scaled,) = jg.autograd.grad(scaler.scale(loss), [weight], create_graph=True)
        gradient = scaled * (1.0 / scaler.get_scale())
        scaler.scale(loss + gradient.square().sum()).backward()
        scaler.step(descent)
        scaler.update()

    run = jg.compile(step) if compiled else step
    expected = np.array([3.0, 4.0])
    for _ in range(4):
        run(jg.tensor(0.1))
        expected = expected - 0.5 * (0.2 * expected + 0.08 * expected)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_disabled(compiled):
    weight, _, scaler, step = stepping(compiled, "SGD", enabled=False)
    loss = weight.sum()
    assert scaler.scale(loss) is loss and not scaler.is_enabled()
    assert scaler.get_scale() == 1.0 and scaler.state_dict() == {}
    scaler.load_state_dict({})
    for _ in range(4):
        step(jg.tensor(1.0))
    np.testing.assert_allclose(weight.detach().numpy(), -0.4, rtol=1e-6)


def test_state_dict_round_trip():
    _, _, scaler, step = stepping(compiled=False)
    for _ in range(5):
        step(jg.tensor(1.0))
    state = scaler.state_dict()
    assert state == {"scale": 16.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "_growth_tracker": 1}
    for used in (False, True):                        # loaded before the first scale(), and after
        _, _, other, other_step = stepping(compiled=used)
        if used:
            for _ in range(4):
                other_step(jg.tensor(float("inf")))
        other.load_state_dict(state)
        assert other.state_dict() == state
        other_step(jg.tensor(1.0))
        assert other.get_scale() == 32.0


def test_state_dict_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0)
    ours = jg.amp.GradScaler("cpu")
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == theirs.state_dict()


def test_a_step_in_parts_is_not_sealed():
    """What one compiled function unscales, another one steps with: Python's part must run each time."""
    weight = jg.zeros(3, requires_grad=True)
    descent = jg.optim.SGD([weight], lr=1.0)
    scaler = jg.amp.GradScaler("cpu", init_scale=4.0)

    @jg.compile
    def backward(slope):
        descent.zero_grad()
        scaler.scale((weight * slope).sum()).backward()
        scaler.unscale_(descent)

    @jg.compile
    def finish():
        scaler.step(descent)
        scaler.update()

    for slope in (1.0, 1.0, 1.0, float("inf"), 1.0, 1.0):
        backward(jg.tensor(slope))
        finish()
    np.testing.assert_array_equal(weight.detach().numpy(), -5.0)
    assert scaler.get_scale() == 2.0
    assert backward.statistics.sealed_calls == finish.statistics.sealed_calls == 0
    assert "GradScaler" in backward.statistics.replayed_because


class Halving(jg.optim.Optimizer):
    """An optimizer of a user's own, with ops where ours have formulas."""

    def __init__(self, params):
        super().__init__(params, {})

    def _update(self, group, params):
        for p in params:
            p.mul_(0.5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_optimizer_of_the_users_own(compiled):
    weight = jg.ones(3, requires_grad=True)
    descent = Halving([weight])
    scaler = jg.amp.GradScaler("cpu", init_scale=4.0)

    def step(slope):
        descent.zero_grad()
        scaler.scale((weight * slope).sum()).backward()
        scaler.step(descent)
        scaler.update()

    run = jg.compile(step) if compiled else step
    for slope in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        run(jg.tensor(slope))
    np.testing.assert_array_equal(weight.detach().numpy(), 0.125)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_hooks_run_only_with_a_step(compiled):
    weight, descent, _, step = stepping(compiled)
    seen = []
    descent.register_step_post_hook(lambda *_: seen.append(float(weight.detach()[0])))
    for slope in (1.0, float("inf"), 1.0):
        step(jg.tensor(slope))
    assert len(seen) == 2


def test_the_receipt_restores_the_scale():
    _, _, scaler, step = stepping(compiled=True)
    step(jg.tensor(1.0))
    before = scaler.state_dict()
    jg.compare(step, jg.tensor(1.0), seconds=0.01)
    assert scaler.state_dict() == before


def descended(optimizer, dtype, compiled):
    """A parameter after a few steps toward zero, and the state of its optimizer."""
    weight = jg.tensor([0.25, -0.125, 0.0625]).to(dtype).requires_grad_()
    descent = OPTIMIZERS[optimizer](jg, [weight])

    def step():
        descent.zero_grad()
        (weight.float() ** 2).sum().backward()
        descent.step()

    run = jg.compile(step) if compiled else step
    for _ in range(4):
        run()
    assert weight.dtype is dtype and weight.grad.dtype is dtype
    return weight.detach().float().numpy(), descent.state[weight]


@pytest.mark.parametrize("dtype", [jg.bfloat16, jg.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_with_half_precision_parameters(optimizer, dtype):
    """State of the parameter's shape is in its dtype, as in PyTorch; results those of float32 but for rounding."""
    exact, _ = descended(optimizer, jg.float32, False)
    for compiled in (False, True):
        weight, state = descended(optimizer, dtype, compiled)
        assert all(value.dtype is (dtype if value.ndim else jg.float32) for value in state.values())
        np.testing.assert_allclose(weight, exact, rtol=2e-2, atol=2e-3)


def test_bad_input():
    weight, descent, scaler, step = stepping(compiled=False)
    for method, arguments in ((scaler.unscale_, [descent]), (scaler.step, [descent]), (scaler.update, [])):
        with pytest.raises(AssertionError, match=r"Call scale\(loss\) before it"):
            method(*arguments)
    step(jg.tensor(1.0))
    with pytest.raises(AssertionError, match="no gradients were looked at"):
        scaler.update()
    scaler.unscale_(descent)
    with pytest.raises(RuntimeError, match=r"has been called for this optimizer since the last update\(\)"):
        scaler.unscale_(descent)
    with pytest.raises(RuntimeError, match=r"after update\(\)"):
        scaler.__getstate__()
    scaler.step(descent)
    with pytest.raises(RuntimeError, match=r"is called after step\(\)"):
        scaler.unscale_(descent)
    with pytest.raises(RuntimeError, match="since the last update"):
        scaler.step(descent)
    scaler.update()
    with pytest.raises(RuntimeError, match="closures"):
        scaler.step(descent, closure=lambda: None)
    descent.zero_grad()
    with pytest.raises(AssertionError, match="no parameter of the optimizer has a gradient"):
        scaler.step(descent)
    with pytest.raises(AssertionError, match="no gradients were looked at"):
        scaler.update()
    with pytest.raises(ValueError, match="iterable of Tensors, not a float"):
        scaler.scale(1.0)
    with pytest.raises(AssertionError, match="new_scale is a number or a Tensor"):
        scaler.update("2")
    with pytest.raises(AssertionError, match="requires no gradient"):
        scaler.update(weight)
    with pytest.raises(RuntimeError, match="the state dict is empty"):
        scaler.load_state_dict({})


def test_bad_options():
    with pytest.raises(AssertionError, match=r"growth_factor must be above 1, got 1\.0"):
        jg.amp.GradScaler("cpu", growth_factor=1.0)
    with pytest.raises(AssertionError, match=r"backoff_factor must be below 1, got 1\.5"):
        jg.amp.GradScaler("cpu", backoff_factor=1.5)
    with pytest.raises(RuntimeError, match="'tpu' is none of"):
        jg.amp.GradScaler("tpu")


@pytest.mark.cpu
def test_without_a_gpu_the_default_scaler_does_nothing():
    with pytest.warns(UserWarning, match="no GPU"):
        assert not jg.amp.GradScaler().is_enabled()


def test_the_scale_lies_where_the_loss_is():
    scaler = jg.amp.GradScaler("cpu")
    loss = jg.ones(1, requires_grad=True).sum()
    assert scaler.scale(loss).device == scaler._scale.device == loss.device


def test_gradients_in_float16_are_refused():
    weight = jg.ones(3, dtype=jg.float16, requires_grad=True)
    descent = jg.optim.SGD([weight])
    scaler = jg.amp.GradScaler("cpu")
    scaler.scale(weight.float().sum()).backward()
    with pytest.raises(ValueError, match="cannot unscale gradients in float16"):
        scaler.step(descent)


def test_kernels_of_a_scaled_step():
    """The optimizer stays one kernel, and so do unscaling and the new scale."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    descent = jg.optim.SGD(model.parameters(), lr=0.1)
    scaler = jg.amp.GradScaler("cpu")

    @jg.compile(fullgraph=True)
    def step(x):
        descent.zero_grad()
        with jg.autocast(HERE, dtype=jg.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(descent)
        scaler.update()
        return loss

    for k in range(3):
        step(jg.tensor(INPUTS[k]))
    assert step.statistics.sealed_calls == 1
    assert str(step.explain(times=False)).count("\nforeach_") == 3


def test_a_scaled_step_is_verified():
    """Values in float32 that were float16 on the way may be off by what float16 rounds away."""
    weight, _, scaler, step = stepping(compiled=True)

    def mixed(x):
        with jg.autocast(HERE, dtype=jg.float16):
            out = x @ x.mT
        return scaler.scale(out.float().sum() * weight.detach()[0])

    assert jg.verify(mixed, jg.tensor(INPUTS[0]))
    assert not jg.verify(lambda x: (x + 1e8) - 1e8, jg.tensor(INPUTS[0]))
    assert jg.verify(step, jg.tensor(1.0))


class Trainer:
    """As many write it: everything is an attribute."""

    def __init__(self):
        self.model = nn.Linear(16, 4)
        self.descent = jg.optim.SGD(self.model.parameters(), lr=0.1)
        self.scaler = jg.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)

    @jg.compile
    def step(self, x):
        self.descent.zero_grad()
        with jg.autocast(HERE, dtype=jg.bfloat16):
            loss = self.model(x).float().square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.descent)
        self.scaler.update()
        return loss


def test_a_scaler_that_is_an_attribute():
    one, other = Trainer(), Trainer()
    for k in range(4):
        one.step(jg.tensor(INPUTS[k]))
    for _ in range(3):
        other.step(jg.tensor(INPUTS[0]))
    assert (one.scaler.get_scale(), other.scaler.get_scale()) == (64.0, 32.0)
    assert vars(Trainer)["step"].statistics.sealed_calls == 2 + 1


def test_a_scaler_that_is_an_argument():
    weight = jg.zeros(3, requires_grad=True)
    descent = jg.optim.SGD([weight], lr=1.0)

    @jg.compile
    def step(scaler):
        descent.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.step(descent)
        scaler.update()

    scalers = [jg.amp.GradScaler("cpu", init_scale=scale, growth_interval=1) for scale in (4.0, 16.0)]
    for _ in range(4):
        for scaler in scalers:
            step(scaler)
    assert [scaler.get_scale() for scaler in scalers] == [64.0, 256.0]
    np.testing.assert_array_equal(weight.detach().numpy(), -8.0)
