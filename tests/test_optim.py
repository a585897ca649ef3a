"""Optimizers against their formulas in NumPy and against PyTorch; schedules against PyTorch; groups and state dicts."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import changes, optim
from jitgrad.optim import lr_scheduler

SHAPES = [(4, 3), (7,), (2, 2, 2), ()]


def parameters(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jg.tensor(np.array(rng.standard_normal(s), dtype), requires_grad=True) for s in SHAPES]


def two_groups(params):
    return [{"params": params[:2], "lr": 0.05}, {"params": params[2:], "weight_decay": 0.1}]


def gradient(rng, param):
    return np.asarray(rng.standard_normal(param.shape), np.float32)


def values(params):
    return [p.detach().numpy().copy() for p in params]


# --- against formulas ------------------------------------------------------------------------------------------------

def test_sgd_with_momentum_follows_its_formula():
    params, rng = parameters(), np.random.default_rng(1)
    expected, buffers = values(params), [0.0] * len(params)
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        for k, p in enumerate(params):
            g = gradient(rng, p)
            p.grad = jg.from_numpy(g)
            buffers[k] = 0.9 * buffers[k] + g + 0.01 * expected[k]
            expected[k] = expected[k] - 0.1 * buffers[k]
        optimizer.step()
    for p, e in zip(params, expected):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-5, atol=1e-6)


def test_adam_follows_its_formula():
    params, rng = parameters(), np.random.default_rng(1)
    expected = [v.astype(np.float64) for v in values(params)]
    m, v = [0.0] * len(params), [0.0] * len(params)
    optimizer = optim.Adam(params, lr=0.01)
    for n in range(1, 6):
        for k, p in enumerate(params):
            g = gradient(rng, p)
            p.grad = jg.from_numpy(g)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g.astype(np.float64) ** 2
            expected[k] = expected[k] - 0.01 * (m[k] / (1 - 0.9 ** n)) / (np.sqrt(v[k] / (1 - 0.999 ** n)) + 1e-8)
        optimizer.step()
    for p, e in zip(params, expected):
        np.testing.assert_allclose(p.detach().numpy(), e, rtol=1e-5, atol=1e-6)


# --- against PyTorch -------------------------------------------------------------------------------------------------

CASES = [
    ("SGD", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"momentum": 0.9, "nesterov": True}), ("SGD", {"momentum": 0.5, "maximize": True}),
    ("Adam", {}), ("Adam", {"amsgrad": True}), ("Adam", {"betas": (0.5, 0.9), "maximize": True}),
    ("AdamW", {}), ("AdamW", {"amsgrad": True, "eps": 1e-3}), ("AdamW", {"foreach": True}), ("SGD", {"fused": True}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.1, "differentiable": False}),
    ("RMSprop", {"foreach": False, "capturable": False}), ("Adagrad", {"foreach": None}), ("Adamax", {"foreach": True}),
    ("Adamax", {}), ("RMSprop", {}), ("RMSprop", {"centered": True, "momentum": 0.9}), ("RMSprop", {"momentum": 0.5}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.1}), ("Adadelta", {}),
    ("NAdam", {}), ("NAdam", {"momentum_decay": 0.1, "decoupled_weight_decay": True}), ("RAdam", {}),
    ("RAdam", {"betas": (0.8, 0.9), "maximize": True}), ("ASGD", {}), ("ASGD", {"t0": 5, "lambd": 0.1}),
]


def torch_pair(name, options):
    torch = pytest.importorskip("torch")
    params = parameters()
    theirs = [torch.nn.Parameter(torch.tensor(p.detach().numpy())) for p in params]
    return torch, params, theirs, getattr(optim, name)(two_groups(params), **options), \
        getattr(torch.optim, name)(two_groups(theirs), **options)


def steps(torch, rng, count, params, theirs, ours, reference):
    for step in range(count):
        for k, (p, t) in enumerate(zip(params, theirs)):
            g = gradient(rng, p)
            absent = k == 1 and step % 3 == 0
            p.grad, t.grad = (None, None) if absent else (jg.from_numpy(g), torch.tensor(g))
        ours.step()
        reference.step()


def assert_equal_to_torch(params, theirs):
    for p, t in zip(params, theirs):
        np.testing.assert_allclose(p.detach().numpy(), t.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_twenty_steps_are_those_of_torch(name, options):
    torch, params, theirs, ours, reference = torch_pair(name, options)
    steps(torch, np.random.default_rng(2), 20, params, theirs, ours, reference)
    assert_equal_to_torch(params, theirs)


@pytest.mark.parametrize("options", [{}, {"etas": (0.3, 1.5), "step_sizes": (1e-3, 0.1), "maximize": True}], ids=str)
def test_rprop_is_that_of_torch(options):
    """It has no weight decay, which the groups of the others have."""
    torch = pytest.importorskip("torch")
    params = parameters()
    theirs = [torch.nn.Parameter(torch.tensor(p.detach().numpy())) for p in params]
    ours, reference = optim.Rprop(params, lr=0.05, **options), torch.optim.Rprop(theirs, lr=0.05, **options)
    steps(torch, np.random.default_rng(2), 20, params, theirs, ours, reference)
    assert_equal_to_torch(params, theirs)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_state_dicts_go_both_ways(name, options):
    torch, params, theirs, ours, reference = torch_pair(name, options)
    rng = np.random.default_rng(3)
    steps(torch, rng, 4, params, theirs, ours, reference)

    ours_again = getattr(optim, name)(two_groups(params), **options)
    ours_again.load_state_dict(reference.state_dict())
    state = ours.state_dict()
    state["state"] = {k: {n: torch.tensor(x.numpy()) for n, x in s.items()} for k, s in state["state"].items()}
    reference_again = getattr(torch.optim, name)(two_groups(theirs), **options)
    full = reference.state_dict()
    reference_again.load_state_dict({"state": state["state"], "param_groups": [
        {**theirs_group, **our_group} for theirs_group, our_group in zip(full["param_groups"], state["param_groups"])]})
    steps(torch, rng, 4, params, theirs, ours_again, reference_again)
    assert_equal_to_torch(params, theirs)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adamax", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam",
                                  "Rprop", "ASGD"])
def test_options_of_how_a_step_is_made(name):
    getattr(optim, name)(parameters(), foreach=True, fused=False, capturable=True, differentiable=False)
    with pytest.raises(ValueError, match="differentiable=True"):
        getattr(optim, name)(parameters(), differentiable=True)
    with pytest.raises(TypeError, match="no option 'mometum'"):
        getattr(optim, name)(parameters(), mometum=0.9)


SCHEDULES = [
    ("StepLR", {"step_size": 3}), ("MultiStepLR", {"milestones": [2, 5, 5]}), ("ExponentialLR", {"gamma": 0.9}),
    ("ConstantLR", {"factor": 0.5, "total_iters": 4}), ("LinearLR", {"start_factor": 0.2, "total_iters": 6}),
    ("PolynomialLR", {"total_iters": 7, "power": 2.0}), ("CosineAnnealingLR", {"T_max": 5, "eta_min": 0.001}),
    ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}), ("CosineAnnealingWarmRestarts", {"T_0": 4}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20}),
    ("OneCycleLR", {"max_lr": [0.5, 0.2], "total_steps": 20, "three_phase": True, "anneal_strategy": "linear"}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": [0.5, 0.3], "step_size_up": 3}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 2, "step_size_down": 5, "mode": "triangular2"}),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 4, "mode": "exp_range", "gamma": 0.9}),
    ("LambdaLR", {"lr_lambda": lambda epoch: 0.95 ** epoch}),
    ("MultiplicativeLR", {"lr_lambda": lambda epoch: 0.9}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULES, ids=lambda case: case if isinstance(case, str) else "-".join(case))
def test_schedules_are_those_of_torch(name, options):
    torch, _, _, ours, reference = torch_pair("SGD", {"momentum": 0.9})
    mine = getattr(lr_scheduler, name)(ours, **options)
    other = getattr(torch.optim.lr_scheduler, name)(reference, **options)
    for _ in range(19):
        np.testing.assert_allclose(mine.get_last_lr(), other.get_last_lr(), rtol=1e-12)
        for group, expected in zip(ours.param_groups, reference.param_groups):
            np.testing.assert_allclose(group["momentum"], expected["momentum"])
        reference.step()
        mine.step()
        other.step()


def test_sequential_schedule_is_that_of_torch():
    torch, _, _, ours, reference = torch_pair("SGD", {})

    def build(module, optimizer):
        parts = [module.LinearLR(optimizer, 0.1, total_iters=4), module.CosineAnnealingLR(optimizer, 6),
                 module.ExponentialLR(optimizer, 0.5)]
        return module.SequentialLR(optimizer, parts, [4, 10])

    mine, other = build(lr_scheduler, ours), build(torch.optim.lr_scheduler, reference)
    for _ in range(15):
        np.testing.assert_allclose(mine.get_last_lr(), other.get_last_lr(), rtol=1e-12)
        reference.step()
        mine.step()
        other.step()


@pytest.mark.parametrize("options", [{}, {"mode": "max", "threshold_mode": "abs"}, {"cooldown": 2, "min_lr": 0.01}],
                         ids=str)
def test_plateau_schedule_is_that_of_torch(options):
    torch, _, _, ours, reference = torch_pair("SGD", {})
    mine = lr_scheduler.ReduceLROnPlateau(ours, patience=1, **options)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, patience=1, **options)
    for metric in [1.0, 0.9, 0.9, 0.95, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.7, 0.7, 0.7, 0.7]:
        mine.step(jg.from_numpy(np.array(metric)))
        other.step(metric)
        assert [g["lr"] for g in ours.param_groups] == pytest.approx([g["lr"] for g in reference.param_groups])


def test_a_schedule_goes_on_from_its_state():
    optimizer = optim.SGD(parameters(), lr=0.1)
    schedule = lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        schedule.step()
    again_optimizer = optim.SGD(parameters(), lr=0.1)
    again = lr_scheduler.StepLR(again_optimizer, 2)
    again.load_state_dict(schedule.state_dict())
    again_optimizer.load_state_dict(optimizer.state_dict())
    schedule.step()
    again.step()
    assert again.get_last_lr() == schedule.get_last_lr() and again.last_epoch == 4


# --- groups ----------------------------------------------------------------------------------------------------------

def test_bad_groups_are_refused():
    params = parameters()
    with pytest.raises(ValueError, match="empty"):
        optim.SGD([])
    with pytest.raises(TypeError, match="single Tensor"):
        optim.SGD(params[0])
    with pytest.raises(ValueError, match="more than one place"):
        optim.SGD([params[0], params[0]])
    with pytest.raises(TypeError, match=r"params\[1\] is a int"):
        optim.SGD([params[0], 3])
    with pytest.raises(TypeError, match="order"):
        optim.SGD([{"params": set(params)}])
    with pytest.raises(ValueError, match="leaf"):
        optim.SGD([params[0] * 2])
    with pytest.raises(ValueError, match="lr must not be negative"):
        optim.Adam(params, lr=-1)
    with pytest.raises(ValueError, match="nesterov"):
        optim.SGD(params, nesterov=True)


def test_named_parameters_are_accepted():
    params = parameters()
    optimizer = optim.SGD([("a", params[0]), ("b", params[1])], lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    assert optimizer.param_groups[0]["params"] == params[:2] or optimizer.param_groups[0]["params"][0] is params[0]


def test_structure_changes_are_noted_and_numbers_are_not():
    params = parameters()
    optimizer = optim.SGD(params[:2], lr=0.1, momentum=0.9)
    group = optimizer.param_groups[0]

    def noted(change):
        before = changes.count
        change()
        return changes.count != before

    assert not noted(lambda: group.update(lr=0.2, weight_decay=0.0))
    assert noted(lambda: group.update(weight_decay=0.1))
    assert noted(lambda: group.update(momentum=0.0))
    assert noted(lambda: group.update(nesterov=True))
    assert noted(lambda: group["params"].append(params[2]))
    assert noted(lambda: optimizer.add_param_group({"params": params[3]}))
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 1]


def test_closure_result_and_zero_grad():
    (p, *_) = parameters()
    optimizer = optim.SGD([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    before = values([p])[0]
    loss = optimizer.step(closure)
    np.testing.assert_allclose(loss.item(), (before ** 2).sum(), rtol=1e-6)
    np.testing.assert_allclose(p.detach().numpy(), before * 0.8, rtol=1e-5)
    held = p.grad
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is held and not held.numpy().any()
    optimizer.zero_grad()
    assert p.grad is None


def test_mixed_dtypes_and_a_learning_rate_tensor():
    single, double = parameters()[:1], parameters(dtype=np.float64)[:1]
    optimizer = optim.Adam(single + double, lr=jg.from_numpy(np.array(0.1)))
    for p in single + double:
        p.grad = jg.from_numpy(np.ones(p.shape, p.dtype.numpy))
    optimizer.step()
    np.testing.assert_allclose(single[0].detach().numpy(), double[0].detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_state_dict_of_other_sizes_is_refused():
    small, large = optim.SGD(parameters()[:1]), optim.SGD(parameters())
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, the optimizer of \[4\]"):
        large.load_state_dict(small.state_dict())


def test_step_hooks():
    (p, *_) = parameters()
    optimizer, seen = optim.SGD([p], lr=0.1), []
    with optimizer.register_step_pre_hook(lambda *_: seen.append("before")):
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        optimizer.step()
    optimizer.step()
    assert seen == ["before", "after", "after"]


# --- averages of weights ---------------------------------------------------------------------------------------------

def swa_and_chain(module, utils, optimizer):
    return [utils.SWALR(optimizer, 0.3, 4), module.ChainedScheduler([module.ExponentialLR(optimizer, 0.9),
                                                                    module.ConstantLR(optimizer, 0.1, 3)])]


@pytest.mark.parametrize("which", [0, 1], ids=["SWALR", "ChainedScheduler"])
def test_schedules_without_options_are_those_of_torch(which):
    torch, _, _, ours, reference = torch_pair("SGD", {})
    mine = swa_and_chain(lr_scheduler, optim.swa_utils, ours)[which]
    other = swa_and_chain(torch.optim.lr_scheduler, torch.optim.swa_utils, reference)[which]
    for _ in range(8):
        reference.step()
        mine.step()
        other.step()
        np.testing.assert_allclose(mine.get_last_lr(), other.get_last_lr(), rtol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("average", ["default", "get_ema_multi_avg_fn", "get_ema_avg_fn", "get_swa_avg_fn"])
def test_averaged_model_is_that_of_torch(average, compiled):
    torch = pytest.importorskip("torch")
    model, theirs = jg.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def options(utils):
        name = "multi_avg_fn" if "multi" in average else "avg_fn"
        return {} if average == "default" else {name: getattr(utils, average)(*[0.9] * ("ema" in average))}

    mean = optim.swa_utils.AveragedModel(model, **options(optim.swa_utils))
    expected = torch.optim.swa_utils.AveragedModel(theirs, **options(torch.optim.swa_utils))
    assert list(mean.state_dict()) == list(expected.state_dict())
    rng = np.random.default_rng(0)
    update = jg.compile(lambda: mean.update_parameters(model)) if compiled else lambda: mean.update_parameters(model)
    for _ in range(4):
        for p, t in zip(model.parameters(), theirs.parameters()):
            values = rng.standard_normal(p.shape).astype(np.float32)
            with jg.no_grad():
                p.copy_(jg.from_numpy(values))
            t.data = torch.tensor(values)
        update()
        expected.update_parameters(theirs)
        assert_equal_to_torch(list(mean.parameters()), list(expected.parameters()))
    assert int(mean.n_averaged) == 4


def test_update_bn_takes_the_statistics_of_all_batches():
    model, data = jg.nn.Sequential(jg.nn.BatchNorm1d(3)), [jg.randn(5, 3) for _ in range(4)]
    model.eval()
    optim.swa_utils.update_bn([(x, None) for x in data], model)
    assert not model.training and model[0].momentum == 0.1
    means = np.mean([x.numpy().mean(0) for x in data], 0)
    np.testing.assert_allclose(model[0].running_mean.numpy(), means, rtol=1e-5, atol=1e-6)


# --- L-BFGS ----------------------------------------------------------------------------------------------------------

def rosenbrock(x):
    return ((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2).sum()


def minimized(make, optimizer, start, count):
    """What `count` steps from `start` lead to, and the loss before each."""
    x = make(np.array(start))
    used, losses = optimizer([x]), []
    x.requires_grad_(True)

    def closure():
        used.zero_grad()
        loss = rosenbrock(x)
        loss.backward()
        return loss

    for _ in range(count):
        losses.append(used.step(closure).item())
    return x.detach().numpy(), losses


@pytest.mark.parametrize("options", [{"lr": 1e-3, "max_iter": 4}, {"lr": 2e-3, "history_size": 2},
                                     {"line_search_fn": "strong_wolfe"}], ids=str)
def test_lbfgs_goes_where_that_of_torch_goes(options):
    torch = pytest.importorskip("torch")
    start = [-1.2, 1.0, 0.7, 1.3]
    ours = minimized(jg.from_numpy, lambda p: optim.LBFGS(p, **options), start, 3)
    theirs = minimized(torch.tensor, lambda p: torch.optim.LBFGS(p, **options), start, 3)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-7)


def test_lbfgs_finds_the_minimum_in_float64():
    x, losses = minimized(jg.from_numpy, lambda p: optim.LBFGS(p, line_search_fn="strong_wolfe"), [-1.2, 1.0], 4)
    np.testing.assert_allclose(x, 1, rtol=1e-4)
    assert losses[0] > 20 and losses[-1] < 1e-9


def test_lbfgs_says_what_it_needs():
    with pytest.raises(ValueError, match="needs a closure"):
        optim.LBFGS([jg.nn.Parameter(jg.zeros(2))]).step()
    with pytest.raises(ValueError, match="in one group"):
        optim.LBFGS([{"params": [jg.nn.Parameter(jg.zeros(2))]}, {"params": [jg.nn.Parameter(jg.zeros(2))]}])
    with pytest.raises(ValueError, match="strong_wolfe"):
        optim.LBFGS([jg.nn.Parameter(jg.zeros(2))], line_search_fn="armijo")
