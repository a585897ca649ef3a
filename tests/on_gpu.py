"""``pytest --device cuda``: the tests of the CPU with a GPU as the default device, on real hardware where there is some,
else on the stand-in that carries kernels out.

What a test says stays: "cuda" is the default device, what comes from NumPy goes there, and what a test reads with
``.numpy()`` or ``np.asarray`` is copied down. `SUITES` are the files that are about what a user computes. In them a
test that is about the CPU itself (threads, native kernels, memory that is shared with NumPy) has the mark `cpu` and is
skipped. So is, on the stand-in, what takes it longer than `LIMIT` seconds of the processor's time. ``--cases N`` takes
the first N cases of each test."""

import importlib.util
import signal
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
from cuda_executing import Executing, hand_through

import jitgrad as jg
from jitgrad import devices
from jitgrad.runtime.cuda import code, driver
from jitgrad.tensor import Tensor

SUITES = ("amp", "amp_dtypes", "attention", "autodiff", "autograd", "bad_input", "branching_programs", "checkpoint",
          "compile", "conv", "data", "eager", "functional", "grad_scaler", "nn", "ops", "optim", "recurrent", "sealing",
          "serialization", "tensor_api", "windows", "against_torch", "windows_against_torch")
LIMIT = 10
OWN_DEVICE = {"connect", "standin", "executing", "no_driver", "gpu"}          # fixtures of tests that choose one themselves


class TooSlow(Exception):
    """A test takes the stand-in too long."""


class OnGpu:
    """The plugin. While it is registered the default device is "cuda", from before the first test file is read."""

    def __init__(self, cases):
        self.cases, self.standin = cases, None
        if not driver.available():
            if importlib.util.find_spec("torch") is not None:
                importlib.import_module("torch")            # stopped in the middle of it, no other test could import it
            self.standin = Executing(gpus=1, memory=1 << 34)
            driver.connect(self.standin)
            code.set_compiler(code._compile, hand_through)
        devices.set_default_device("cuda")
        read_and_made_by_numpy()

    def pytest_collection_modifyitems(self, config, items):
        chosen, taken = [], Counter()
        for item in items:
            name = item.path.stem.removeprefix("test_"), getattr(item, "originalname", item.name)
            taken[name] += 1
            if name[0] in SUITES and not OWN_DEVICE & set(item.fixturenames) and not item.get_closest_marker("gpu") \
                    and taken[name] <= self.cases:
                chosen.append(item)
                if item.get_closest_marker("cpu"):
                    item.add_marker(pytest.mark.skip(reason="is about the CPU"))
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        devices.set_default_device("cuda")
        jg.set_autocast_dtype("cuda", jg.bfloat16)          # what regions on the CPU begin with
        if self.standin is None:
            return (yield)
        try:
            with limited(LIMIT) as clock:
                return (yield)
        except Exception:
            if clock.passed:
                pytest.skip(f"takes the stand-in longer than {LIMIT} s")
            raise
        finally:
            problems, self.standin.problems[:] = list(self.standin.problems), []
            for queue in self.standin.queues() if clock.passed else ():
                queue.captured, queue.done = None, len(queue.actions)     # what was begun has lost its memory
            assert clock.passed or not problems, problems


class Clock:
    passed = False


@contextmanager
def limited(seconds):
    """`TooSlow` wherever the program is when it has used the processor for so many seconds: what else the machine does has
    no part in it. Its ``passed`` says so where that was swallowed."""
    clock = Clock()

    def stop(*_):
        clock.passed = True
        signal.setitimer(signal.ITIMER_PROF, 1)             # whoever swallows it gets another one
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield clock
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def read_and_made_by_numpy():
    """Let tests, but not what they test, read by NumPy what is on a GPU, and let what comes from NumPy go to the default
    device."""
    given, plain = Tensor.numpy, jg.from_numpy

    def numpy(self, *, force=False):
        ours = sys._getframe(1).f_globals["__name__"].startswith("jitgrad.")
        return given(self if ours or force else self.cpu(), force=force)

    def __array__(self, dtype=None, copy=None):
        ours = sys._getframe(1).f_globals["__name__"].startswith("jitgrad.")
        found = given(self if ours else self.cpu())
        return found.astype(dtype) if dtype is not None and found.dtype != dtype else found

    def from_numpy(array):
        return plain(array).to(jg.get_default_device())

    Tensor.numpy, Tensor.__array__, jg.from_numpy = numpy, __array__, from_numpy
