"""Options of the test command, the stand-in for a GPU, and the tests that need a real one (``pytest -m gpu``)."""

import gc
import shutil

import pytest
from cuda_executing import Executing, hand_through
from cuda_standin import StandIn
from on_gpu import OnGpu

from jitgrad import config, devices, gpu_ops, gpu_plans
from jitgrad.runtime.cuda import array as device_memory, code, driver


def pytest_addoption(parser):
    group = parser.getgroup("jitgrad")
    group.addoption("--programs", type=int, default=2160, metavar="N",
                    help="how many random programs test_programs.py draws (default: 2160)")
    group.addoption("--gpu-samples", action="store_true", help="run every sample of every op on the stand-in of a GPU")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu",
                    help="cuda: the tests of what users compute, with a GPU as the default device (on_gpu.py)")
    group.addoption("--cases", type=int, default=1 << 30, metavar="N",
                    help="with --device cuda: the first N cases of each test")
    group.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        config.pluginmanager.register(OnGpu(config.getoption("--cases")))


def pytest_collection_modifyitems(items):
    real = [item for item in items if item.get_closest_marker("gpu")]
    if real and not driver.available():
        for item in real:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {driver.why_not()}"))


@pytest.fixture
def collected():
    """What a test has made and left in cycles is collected; what thousands of tests left before it is not looked at."""
    gc.freeze()
    yield gc.collect
    gc.unfreeze()


@pytest.fixture
def connect(collected):
    """``connect(gpus=2)`` puts a stand-in in the place of the CUDA driver until the test ends."""
    made = []

    device_memory.install_gather(None)                      # this one has no kernels

    def connected(**options):
        made.append(StandIn(**options))
        driver.connect(made[-1])
        return made[-1]

    yield connected
    collected()
    device_memory.install_gather(gpu_ops.gather)
    driver.disconnect()
    devices.set_default_device(None)
    assert [problem for standin in made for problem in standin.problems] == []


@pytest.fixture
def standin(connect):
    """Two GPUs of the stand-in."""
    return connect(gpus=2)


@pytest.fixture
def executing(collected):
    """Two GPUs of a stand-in that carries kernels out."""
    made = Executing(gpus=2)
    driver.connect(made)
    code.set_compiler(code._compile, hand_through)
    yield made
    collected()
    gpu_plans.clear_plans()
    code.forget()
    code.set_compiler(gpu_plans._compile, gpu_plans._link)
    driver.disconnect()
    devices.set_default_device(None)
    assert made.problems == []


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request):
    """For what users see of a GPU: the stand-in that carries kernels out, and a real one where there is one (None)."""
    return request.getfixturevalue("executing") if request.param == "stand-in" else None


@pytest.fixture(scope="module")
def _folder_of_module(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def kernels_of_module(_folder_of_module):
    """A cache for all tests of a module: no plan and no decision comes from another test; kernels may."""
    for kind in ("plans", "choices"):
        shutil.rmtree(_folder_of_module / kind, ignore_errors=True)
    with config.scope(cache=_folder_of_module):
        yield
