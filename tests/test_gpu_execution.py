"""Execution on a GPU from end to end, on a stand-in that carries kernels out by the PTX interpreter, and on a real one where
there is one: eager ops, compiled functions, training, random numbers, errors, captured graphs, the cache."""

import os
import subprocess
import sys

import numpy as np
import pytest
from gpu_programs import OPTIMIZERS, PROGRAMS, tensor, training
from samples import SAMPLES
from test_compiled_ops import assert_close

import jitgrad as jg
from jitgrad import config, gpu_plans, nn
from jitgrad.dtypes import float32
from jitgrad.errors import DivisionByZeroError, OutOfRangeError
from jitgrad.ir import TensorType, evaluate
from jitgrad.nn import functional as F
from jitgrad.runtime.cuda import code, driver, plan as gpu_plan
from jitgrad.runtime.spec import Entry, Output, PlanSpec

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")


def assert_same(ours, theirs, tolerance=2e-5):
    """Results on a GPU are there, and are those of the CPU: within `tolerance`, on real hardware five times as much."""
    assert len(ours) == len(theirs)
    if driver.gpu().name != "Stand-in":
        tolerance *= 5
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.is_cuda and not b.is_cuda and a.dtype is b.dtype and a.shape == b.shape, k
        x, y = a.detach().cpu().numpy(), b.detach().numpy()
        if b.dtype.is_floating_point:
            limit = {2: 2e-2, 4: tolerance, 8: 1e-11}[b.dtype.itemsize]
            np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=limit, atol=limit, err_msg=str(k))
        else:
            np.testing.assert_allclose(x, y, rtol=tolerance, err_msg=str(k))


# eager

@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_give_what_they_give_on_the_cpu(gpu, name):
    assert_same(PROGRAMS[name]("cuda"), PROGRAMS[name]("cpu"))
    assert gpu is None or gpu.launches


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_eagerly(gpu, optimizer):
    assert_same(training("cuda", optimizer)[0], training("cpu", optimizer)[0], 2e-4)


def test_dropout_masks_are_those_of_the_cpu_to_the_bit(gpu):
    found = []
    for device in ("cpu", "cuda"):
        for run in (lambda x: F.dropout(x, 0.5), jg.compile(lambda x: F.dropout(x, 0.5))):
            jg.manual_seed(11)
            found.append([run(jg.ones(100, device=device)).tolist() for _ in range(4)])
    assert found[0] == found[1] == found[2] == found[3]


CREATED = {
    "rand": lambda device: jg.rand(70, device=device),
    "bfloat16": lambda device: jg.rand(9, dtype=jg.bfloat16, device=device),
    "float64": lambda device: jg.rand(9, dtype=jg.float64, device=device),
    "randn": lambda device: jg.randn(7, device=device),
    "randint": lambda device: jg.randint(-5, 1 << 40, (9,), device=device),
    "randperm": lambda device: jg.randperm(40, device=device),
    "arange": lambda device: jg.arange(3, 20, 2, device=device),
    "linspace": lambda device: jg.linspace(0, 1, 7, device=device),
    "eye": lambda device: jg.eye(3, 5, device=device),
    "full": lambda device: jg.full((5, 3), 7, device=device),
    "uniform_": lambda device: jg.zeros(9, device=device).uniform_(1, 2),
    "normal_": lambda device: jg.zeros(9, device=device).normal_(),
    "like": lambda device: jg.rand_like(jg.ones(5, device=device)),
    "bernoulli_": lambda device: jg.zeros(70, device=device).bernoulli_(0.3),
    "exponential_": lambda device: jg.zeros(9, device=device).exponential_(2.0),
    "init": lambda device: nn.init.trunc_normal_(jg.zeros(9, device=device)),
}


@pytest.mark.parametrize("name", CREATED)
def test_tensors_are_made_by_kernels_where_they_are_wanted(gpu, name):
    jg.manual_seed(5)
    wanted = [CREATED[name]("cpu") for _ in range(2)]
    jg.manual_seed(5)
    found = [CREATED[name]("cuda") for _ in range(2)]
    for a, b in zip(found, wanted, strict=True):
        assert a.is_cuda and a.dtype is b.dtype
        if name in ("randn", "normal_", "exponential_", "init"):                # these go through log, cos and erfinv
            np.testing.assert_allclose(a.cpu().numpy(), b.numpy(), rtol=1e-5, atol=1e-6)
        else:
            assert a.cpu().numpy().tobytes() == b.numpy().tobytes()
    assert gpu is None or gpu.launches


def test_a_default_device_is_where_tensors_are_made(gpu):
    with jg.device("cuda"):
        assert jg.rand(3).is_cuda and jg.arange(3).tolist() == [0, 1, 2] and (gpu is None or gpu.launches)


def test_masks_are_looked_at_where_they_are(executing):
    """Only how many places there are is read, the range of a histogram, and whether an index was wrong (24 bytes)."""
    for shape in ((5, 7), (3, 0), (4,)):
        x = tensor("cpu", *shape)
        y = x.cuda()
        assert_same([y[y > 0], y.nonzero(), *jg.where(y > 0), y.masked_select(y < 1)],
                    [x[x > 0], x.nonzero(), *jg.where(x > 0), x.masked_select(x < 1)])
    y = tensor("cuda", 40)
    executing.downloads.clear()
    made = [y[y > 0], y.nonzero(), y.unique(), *jg.unique(y, return_inverse=True, return_counts=True), y.histc(5),
            y.long().abs().bincount(), F.one_hot(y.long().abs())]
    assert all(result.is_cuda for result in made) and set(executing.downloads) <= {4, 8, 24}


def test_numbers_of_the_cpu_may_stand_beside_tensors_of_a_gpu(gpu):
    x = tensor("cuda", 4)
    scale = jg.tensor(2.0)
    assert_same([x * scale, scale - x, jg.compile(lambda x, s: x * s)(x, scale)],
                [y for y in (tensor("cpu", 4) * 2, 2 - tensor("cpu", 4), tensor("cpu", 4) * 2)])


def test_second_gpu_and_streams(executing):
    x = tensor("cuda:1", 5)
    side = jg.cuda.Stream("cuda:1")
    side.wait_stream(jg.cuda.current_stream(1))
    run = jg.compile(lambda x: (x * 2).sum())
    with jg.cuda.stream(side):
        results = [run(x) for _ in range(4)]
    jg.cuda.current_stream(1).wait_stream(side)
    for y in (*results, (x * 2).sum()):
        assert y.get_device() == 1
        np.testing.assert_allclose(y.item(), (tensor("cpu", 5) * 2).sum().item(), rtol=1e-6)


def test_constants_of_a_plan_wait_for_every_stream_that_reads_them(executing):
    """They were allocated in the order of the first one."""
    double = jg.compile(lambda x: x.sort()[0] * jg.tensor(np.float32(2)))
    x, side = tensor("cuda", 5), jg.cuda.Stream()
    double(x)
    with jg.cuda.stream(side):
        double(x)
    (block,) = {plan.constants.owner._block for plan in gpu_plans._plans.values() if plan.constants is not None}
    assert block.others == [side]


FIRST = {name: samples[0] for name, samples in SAMPLES.items() if name != "region"}


def pytest_generate_tests(metafunc):
    """A sample of every op; all samples with ``--gpu-samples``."""
    if "sample" in metafunc.fixturenames:
        chosen = FIRST.values()
        if metafunc.config.getoption("--gpu-samples"):
            chosen = [s for name, samples in SAMPLES.items() if name != "region" for s in samples]
        metafunc.parametrize("sample", list(chosen), ids=str)


def test_ops_give_what_numpy_gives(gpu, sample):
    graph = sample.graph()
    with np.errstate(all="ignore"):
        expected = [np.asarray(x) for x in evaluate(graph, [np.array(x) for x in sample.inputs])]
    operands = [jg.Tensor(np.array(x)).cuda() for x in sample.inputs]
    results = sample.op(*operands, **sample.attrs)
    for result, wanted in zip(results if isinstance(results, tuple) else (results,), expected, strict=True):
        assert result.is_cuda or not operands
        assert_close(result.cpu().numpy(), wanted)


# errors

def test_an_index_out_of_range_names_the_line_and_changes_nothing(gpu):
    table = tensor("cuda", 5, 3)
    wrong = jg.tensor([1, 7], device="cuda")
    with pytest.raises(OutOfRangeError, match=r"7.*test_gpu_execution.py"):
        table[wrong]

    @jg.compile
    def update(p, index):
        picked = p[index]                                                     # this line
        p += 1
        return picked

    before = table.tolist()
    assert update(table.clone(), jg.tensor([1, 2], device="cuda")).tolist() == [before[1], before[2]]
    line = update.function.__code__.co_firstlineno + 2
    with pytest.raises(OutOfRangeError, match=rf"7.*test_gpu_execution.py:{line}"):
        update(table, wrong)
    assert table.tolist() == before


def test_a_division_by_zero_names_the_line(gpu):
    x, zero = jg.arange(6, device="cuda"), jg.zeros(6, dtype=jg.int64, device="cuda")

    @jg.compile
    def divide(x, y):
        return (x + 1) // y                                                   # this line

    assert divide(x, zero + 2).tolist() == [0, 1, 1, 2, 2, 3]
    for run, line in ((divide, divide.function.__code__.co_firstlineno + 2), (lambda x, y: x // y, None)):
        with pytest.raises(DivisionByZeroError, match=rf"test_gpu_execution.py:{line or ''}"):
            run(x, zero)
    assert divide(x, zero + 1).tolist() == [1, 2, 3, 4, 5, 6]                  # the error is gone


# compiled

@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_training_compiled_is_sealed_and_the_same(gpu, optimizer):
    ours, step = training("cuda", optimizer, compiled=True, steps=6)
    theirs, _ = training("cpu", optimizer, compiled=True, steps=6)
    assert_same(ours, theirs, 5e-4)
    assert step.statistics.sealed_calls >= 3, step.explain(times=False).summary()


def test_a_step_without_host_entries_is_one_launch(gpu):
    jg.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5)).cuda()
    optimizer = jg.optim.AdamW(model.parameters(), lr=0.1)

    @jg.compile
    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    losses = []
    for k in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)                       # an argument of the graph, not a part of it
        losses.append(step(tensor("cuda", 6, 8, seed=k)))
        gpu.calls.clear() if gpu and k == 6 else None
    plan = step.plan.plan
    assert step.statistics.sealed_calls > 3 and not plan.host_entries and plan.is_captured
    assert gpu is None or (gpu.calls.count("cuGraphLaunch") == 1 and "cuLaunchKernel" not in gpu.calls)
    values = [loss.item() for loss in losses]
    assert len(set(values)) == 8                                              # none was overwritten by a later call
    jg.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(8), nn.Dropout(0.5))
    optimizer = jg.optim.AdamW(plain.parameters(), lr=0.1)
    model = plain
    again = []
    for k in range(8):
        optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
        again.append(step.function(tensor("cpu", 6, 8, seed=k)).item())
    np.testing.assert_allclose(values, again, rtol=1e-4)


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
def test_results_belong_to_whoever_has_them(gpu, mode):
    run = jg.compile(lambda x: ((x + 1).softmax(0), x.sum()), mode=mode)
    inputs = [tensor("cuda", 9, seed=k) for k in range(7)]
    results = [run(x) for x in inputs]
    assert run.plan.plan.is_captured is (mode == "default")
    for x, (soft, total) in zip(inputs, results, strict=True):
        np.testing.assert_allclose(soft.cpu().numpy(), (x.cpu() + 1).softmax(0).numpy(), rtol=1e-5)
        np.testing.assert_allclose(total.item(), x.cpu().sum().item(), rtol=1e-4, atol=1e-6)


def test_compiled_functions_write_in_place_through_views(gpu):
    @jg.compile
    def change(x, y):
        x[:, 1] += 1
        y.mul_(2)
        return x.sum() + y.sum()

    for device in ("cpu", "cuda"):
        x, whole = jg.zeros(3, 4, device=device), jg.ones(2, 5, device=device)
        for _ in range(5):
            change(x, whole.T)
            change(x, whole[1])
        assert x.tolist() == [[0, 10, 0, 0]] * 3
        assert whole.tolist() == [[2 ** 5] * 5, [2 ** 10] * 5]


def test_gradients_cross_the_edge_of_a_compiled_call(gpu):
    inner = jg.compile(lambda x, w: (x * w).tanh())
    found = {}
    for device in ("cpu", "cuda"):
        for _ in range(4):
            x, w = tensor(device, 4, 3).requires_grad_(), tensor(device, 3, seed=1).requires_grad_()
            inner(x, w).square().sum().backward()
        found[device] = [x.grad, w.grad]
    assert_same(found["cuda"], found["cpu"])


def test_branches_on_values_and_items(gpu):
    @jg.compile
    def step(x):
        if x.sum() > 0:
            return (x * 2).sum().item()
        return (x - 1).sum().item()

    for k in range(6):
        x = tensor("cuda", 5, seed=k)
        np.testing.assert_allclose(step(x), step.function(x.cpu()), rtol=1e-5)


def test_explain_lists_what_runs_on_the_host(gpu):
    weight = tensor("cuda", 4, 4)
    run = jg.compile(lambda x: ((x * 1j).abs() + 1).tanh())                   # no kernels know complex numbers
    run(weight)
    shown = str(run.explain(times=False))
    assert "by way of the host" in shown and "abs" in shown
    assert "abs" in [entry.name for entry in run.plan.plan.host_entries]
    kernels = jg.compile(lambda x: (x + 1).tanh())
    kernels(weight)
    (kernel,) = kernels.kernels
    assert "block[256]" in kernel.source and not kernels.plan.plan.host_entries
    assert "fused_add_tanh_f32" in kernels.plan.print_stages() or "region" in kernels.plan.print_stages()


def test_verify_and_compare_look_at_gpus(gpu):
    weight = tensor("cuda", 6, 3)
    run = jg.compile(lambda x: (x @ weight).softmax(1))
    assert "0 of" in str(jg.verify(run, tensor("cuda", 2, 6))) or jg.verify(run, tensor("cuda", 2, 6)).divergences == ()
    assert weight.is_cuda


@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_precision(gpu, compiled):
    jg.manual_seed(2)
    model = nn.Linear(6, 4).cuda()
    optimizer, scaler = jg.optim.SGD(model.parameters(), lr=0.1), jg.amp.GradScaler(init_scale=1024.0, growth_interval=2)
    kinds = []

    def step(x):
        optimizer.zero_grad()
        with jg.autocast("cuda"):
            y = model(x)
            loss = y.softmax(1).square().sum()
        kinds.append((y.dtype, loss.dtype))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    run = jg.compile(step) if compiled else step
    losses = [run(tensor("cuda", 5, 6)).item() for _ in range(6)]
    assert set(kinds) == {(jg.float16, jg.float32)} and losses[-1] < losses[0]
    assert scaler.get_scale() == 1024.0 * 8 and model.weight.dtype is jg.float32
    before = model.weight.tolist()
    run(tensor("cuda", 5, 6) * float("inf"))                                  # the step is left out
    assert model.weight.tolist() == before and scaler.get_scale() == 512.0 * 8


# the cache

def test_a_warm_start_compiles_nothing(executing, tmp_path):
    with config.scope(cache=tmp_path):
        x = tensor("cuda", 5, 3)
        expected = (x.softmax(1) * 2).tolist()
        linked = code.linked
        gpu_plans.clear_plans()
        code.forget()
        code.set_compiler(None, None)
        assert (x.softmax(1) * 2).tolist() == expected and code.linked == linked


WARM = """
import sys
from cuda_executing import Executing, hand_through
import jitgrad as jg
from jitgrad import gpu_plans
from jitgrad.runtime.cuda import code, driver
driver.connect(Executing())
code.set_compiler(gpu_plans._compile, hand_through)
x = jg.arange(12.0).reshape(3, 4).cuda()
run = jg.compile(lambda x: (x * 2).softmax(1).sum(0))
print(run(x).tolist(), (x + 1).tolist(), code.linked)
print([m for m in ("numba", "cuda") if m in sys.modules])
"""


def test_a_second_process_loads_no_compiler(tmp_path):
    environment = {**os.environ, "JITGRAD_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    cold, warm = [subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True,
                                 env=environment).stdout.splitlines() for _ in range(2)]
    assert cold[0].rpartition(" ")[0] == warm[0].rpartition(" ")[0]
    assert cold[0].endswith(" 2") and cold[1] == "['numba']" and warm[0].endswith(" 0") and warm[1] == "[]"


def test_plans_of_gpus_are_stored_as_data(executing):
    run = jg.compile(lambda x, y: (x * y).sum(0))
    run(tensor("cuda", 5, 3), tensor("cuda", 3))
    spec = run.plan.plan.spec
    assert PlanSpec.from_json(spec.to_json()) == spec and all(entry.threads for entry in spec.entries)


def test_importing_looks_for_no_gpu_and_loads_no_compiler():
    text = """
import sys, jitgrad
from jitgrad.runtime.cuda import driver
print([m for m in ("numba", "llvmlite", "cuda") if m in sys.modules], driver.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_explain_times_kernels_by_events(executing):
    """The clock of the stand-in: a millisecond for everything in the queue, so two from one mark to the next."""
    table = tensor("cuda", 8, 3)

    @jg.compile
    def step(x):
        return (x + 1).tanh().sum(), (x * 1j).abs()

    step(table)
    view = step.explain().plans[0]
    hosts, kernels = ([s for s in view.steps if bool(s.kernels) is k] for k in (False, True))
    assert hosts[-1].name == "abs" and all(host.seconds > 0 for host in hosts)
    for kernel in kernels:
        assert kernel.seconds == pytest.approx(2e-3 * len(kernel.kernels))
        assert kernel.share_of_peak == pytest.approx((kernel.bytes_read + kernel.bytes_written) / kernel.seconds
                                                     / kernel.bandwidth)
    started, done = view.call
    assert 0 < started <= done
    shown = str(view)
    assert " GB/s" in shown and "of copy" in shown and "cuda:0, Stand-in: a copy moves" in shown
    assert f"a call: {sum(len(k.kernels) for k in kernels)} launches" in shown and f"{len(hosts)} steps of NumPy's" in shown
    assert "GB/s" not in str(step.explain(times=False))


def test_the_receipt_of_a_function_on_a_gpu(executing):
    weight = tensor("cuda", 6, seed=1)
    run = jg.compile(lambda x: (x.cuda() * weight).tanh().cpu())
    receipt = jg.compare(run, tensor("cpu", 3, 6), seconds=0.01)
    assert receipt.sealed and receipt.difference < 4 and receipt.memory_eager > 0
    assert receipt.first_cold > receipt.compiled > 0
    assert jg.verify(run, tensor("cpu", 3, 6)).ok


def test_verify_finds_what_kernels_of_a_gpu_do_wrong(executing, monkeypatch):
    """It is the GPU's kernels that are looked at: one that adds 2 instead of 1 is found, at its line."""
    given = code._compile
    monkeypatch.setattr(code, "_compile", lambda texts, arch: given(
        [text.replace("+ v0)", "+ f32(v0 + v0))") for text in texts], arch))
    found = jg.verify(lambda x: (x + 1).tanh(), tensor("cuda", 3, 11))
    assert not found.ok and found.divergences[0].side == "compiled" and found.divergences[0].op == "add"


def test_a_plan_is_captured_only_where_that_saves_something(executing):
    """A graph computes results in memory of the plan, from where they are copied: not for one launch, nor large results."""
    one, many = jg.compile(lambda x: x * 2), jg.compile(lambda x, y: (x @ y) @ y)
    x = jg.ones(8, 8, device="cuda")
    for _ in range(4):
        single, double = one(x), many(x, x)
    assert not one.plan.plan.is_captured and single.tolist() == [[2] * 8] * 8
    assert many.plan.plan.is_captured and double.tolist() == [[64] * 8] * 8
    small, large = ([TensorType(float32, (n,))] for n in (gpu_plan.COPIED // 4, gpu_plan.COPIED))
    assert [gpu_plan._is_worth_capturing(specification(2, types)) for types in (small, large)] == [True, False]


def specification(launches, results):
    outputs = tuple([Output(t, ("output", k)) for k, t in enumerate(results)])
    return PlanSpec((), outputs, (), b"", 0, (Entry("a", "ab" * 32, None, 1, ()),) * launches, {})


def mixed(device):
    """Loss and gradients of two layers under autocast, whose GELU and cross entropy are in float32."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 24)).to(device)
    for k, parameter in enumerate(model.parameters()):
        parameter.data.copy_(tensor(device, *parameter.shape, seed=k) * 0.3)
    parameters = list(model.parameters())

    @jg.compile
    def step(x, y):
        with jg.autocast(device, dtype=jg.bfloat16):
            loss = F.cross_entropy(model(x), y)
        return [loss, *jg.autograd.grad(loss, parameters)]

    return step, step(tensor(device, 12, 16, seed=9), jg.arange(12).to(device))


def test_what_is_elementwise_is_computed_again_rather_than_stored(executing):
    """Between products nothing in float32 is in memory: neither exponentials nor what GELU's gradient reads."""
    step, ours = mixed("cuda")
    for found, wanted in zip(ours, mixed("cpu")[1], strict=True):
        np.testing.assert_allclose(found.detach().cpu().numpy(), wanted.detach().numpy(), rtol=0.05, atol=0.01)
    stored = [v for linked in step.plan.build.linked.steps for v in linked.step.node.outputs]
    wide = [v for v in stored if v.dtype is float32 and v.type.size in (12 * 32, 12 * 24)]
    assert wide == [] and [v.type.size for v in stored if v.dtype is jg.bfloat16].count(12 * 24) == 2
