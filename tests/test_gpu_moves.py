"""Moves between devices inside of compiled functions: they are parts of the plans, sealed, with gradients. On a stand-in
that carries kernels out."""

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn
from jitgrad.errors import DeviceError


def data(*shape, seed=0):
    return jg.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def same_as_eager(compiled, make, calls=5, sealed=3):
    """Every call gives what the function gives eagerly, on the same devices; the last calls are sealed."""
    for k in range(calls):
        results, expected = (run(*make(k)) for run in (compiled, compiled.function))
        for got, want in zip(*(x if isinstance(x, tuple) else (x,) for x in (results, expected)), strict=True):
            assert got.device == want.device and got.requires_grad == want.requires_grad
            np.testing.assert_allclose(got.numpy(force=True), want.numpy(force=True), rtol=2e-5, atol=1e-6)
    assert compiled.statistics.sealed_calls == sealed, compiled.explain(times=False).summary()


def test_a_result_for_the_cpu(executing):
    @jg.compile(fullgraph=True)
    def step(x):
        y = x * 2 + 1
        return y.cpu(), y, y.sum().to("cpu")

    same_as_eager(step, lambda k: (data(4, 5, seed=k).cuda(),))
    assert len(step.graphs) == 1


def test_a_batch_that_comes_from_the_cpu(executing):
    @jg.compile(fullgraph=True)
    def step(x, index):
        x = x.to("cuda", non_blocking=True)
        return x.exp(), x, x.T, x[index.cuda()], x.is_cuda and x.sum()

    same_as_eager(step, lambda k: (data(4, 5, seed=k), jg.arange(3)))
    assert len(step.graphs) == 1
    batch = data(4, 5)
    result = step(batch, jg.arange(3))[1]
    batch.zero_()                                           # the plan has a copy
    assert result.abs().sum().item() > 0


def test_parts_of_a_batch_and_memory_that_is_not_dense(executing):
    @jg.compile
    def step(x, y):
        return x.cuda() + y.cuda().T

    same_as_eager(step, lambda k: (data(6, 4, seed=k)[::2], data(4, 6, seed=k)[:, 3:]))


def test_there_and_back_and_on_the_cpu_in_between(executing):
    @jg.compile
    def step(x):
        y = (x.cuda() * 2).cpu()
        return (y + x).cuda() - 1, y.cuda().cpu()

    same_as_eager(step, lambda k: (data(4, 5, seed=k),))
    assert [c.location.device for c in step.statistics.compilations] == ["cuda:0", "cpu", "cuda:0"]


def test_a_branch_on_what_was_brought_home(executing):
    @jg.compile
    def step(x):
        y = x.cuda() * 2
        total = y.sum().cpu()
        return y + 1 if total > 0 else total - y.cpu()

    for k in range(6):
        x = data(4, 5, seed=k % 2) + (k % 2) - 0.5
        np.testing.assert_allclose(step(x).cpu().numpy(), step.function(x).cpu().numpy(), rtol=1e-5)
    assert step.statistics.sealed_calls >= 2


def test_two_gpus(executing):
    @jg.compile
    def step(x, y):
        return (x * 2).to(y.device) + y

    same_as_eager(step, lambda k: (data(3, 7, seed=k).cuda(0), data(3, 7).cuda(1)))


def test_values_before_a_change_on_the_cpu_are_those_that_were_moved(executing):
    @jg.compile
    def step(x):
        before = x.cuda()
        x.add_(1)
        return before * 2, x.cuda()

    for k in range(5):
        x = data(9, seed=k)
        old = x.clone()
        before, after = step(x)
        np.testing.assert_array_equal(before.cpu().numpy(), 2 * old.numpy())
        np.testing.assert_array_equal(after.cpu().numpy(), old.numpy() + 1)
        np.testing.assert_array_equal(x.numpy(), old.numpy() + 1)


class Scale(nn.Module):
    """As small as a layer can be."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(data(6, seed=9))

    def forward(self, x):
        return (x * self.weight).tanh()


def test_a_training_step_on_batches_of_the_cpu(executing):
    """The usual step: the model is on the GPU, the batch comes from a loader, the loss goes home."""
    device = jg.device("cuda")

    def course(compiled):
        model = Scale().to(device)
        optimizer = jg.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x, t):
            x, t = x.to(device), t.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = (model(x) - t).square().mean()
            loss.backward()
            optimizer.step()
            return loss.cpu(), loss.detach().to("cpu"), loss

        run = jg.compile(step, fullgraph=True) if compiled else step
        results = [run(data(8, 6, seed=k), data(8, 6, seed=k + 1)) for k in range(5)]
        assert [loss.is_cuda for loss in results[-1]] == [False, False, True]
        assert [loss.requires_grad for loss in results[-1]] == [True, False, True]
        return [[loss.item() for loss in losses] for losses in results], run

    (ours, run), (eager, _) = course(True), course(False)
    np.testing.assert_allclose(ours, eager, rtol=1e-5)
    assert run.statistics.sealed_calls == 3 and len(run.graphs) == 1


@pytest.mark.parametrize("where", ["model", "weight"])
def test_gradients_go_through_a_move(executing, where):
    """Home behind a model on the GPU, and to the GPU with a weight that stays on the CPU; first and second order."""
    layer = Scale()
    if where == "model":
        layer.cuda()

    def step(x):
        if where == "model":
            return layer(x.cuda()).cpu()
        return (x.cuda() * layer.weight.cuda()).tanh()

    compiled = jg.compile(step)
    found = []
    for run in (step, compiled):
        y = run(data(3, 6))
        first, = jg.autograd.grad((y * y).sum(), [layer.weight], create_graph=True)
        second, = jg.autograd.grad((first * first).sum(), [layer.weight])
        found.append([y, first, second])
        for k in range(1 if run is step else 4):
            layer.weight.grad = None
            y = run(data(3, 6, seed=k))
            (y * y).sum().backward()
            assert layer.weight.grad.device == first.device == second.device == layer.weight.device
            if k == 0:
                found[-1].append(layer.weight.grad)
    for eager, ours in zip(*[[t.numpy(force=True) for t in tensors] for tensors in found], strict=True):
        np.testing.assert_allclose(ours, eager, rtol=1e-4, atol=1e-5)
    assert compiled.statistics.sealed_calls == 3


def test_parameters_on_the_cpu_are_updated_by_gradients_from_the_gpu(executing):
    courses = []
    for compiled in (False, True):
        layer = Scale()
        optimizer = jg.optim.SGD(layer.parameters(), lr=0.01)

        def step(x):
            optimizer.zero_grad()                                                       # noqa: B023
            y = (x.cuda() * layer.weight.cuda()).tanh().cpu()                           # noqa: B023
            loss = (y * x).sum()
            loss.backward()
            optimizer.step()                                                            # noqa: B023
            return loss

        run = jg.compile(step) if compiled else step
        courses.append([run(data(8, 6, seed=k)).item() for k in range(4)])
    np.testing.assert_allclose(*courses, rtol=1e-5)


def test_operands_on_different_devices_name_the_line(executing):
    @jg.compile
    def step(x, y):
        moved = x.cuda() * 2
        return moved + y                                                                # this line

    line = step.function.__code__.co_firstlineno + 3
    for _ in range(2):
        with pytest.raises(DeviceError, match=rf"add: operands .* cpu and cuda:0: .*test_gpu_moves.py:{line}\).*\.to\("):
            step(data(4), data(4))


def test_the_current_gpu_is_asked_on_every_call(executing):
    @jg.compile
    def step(x):
        return x.cuda() + 1

    for _ in range(4):
        for index in (0, 1):
            with jg.cuda.device(index):
                assert step(data(5)).get_device() == index
    assert step.statistics.sealed_calls >= 4
