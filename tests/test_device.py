"""What a user says about devices, without a GPU and with two of the stand-in."""

import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn
from jitgrad.__main__ import information
from jitgrad.errors import DeviceError
from jitgrad.runtime.cuda import driver


@pytest.fixture
def no_driver(monkeypatch):
    def fail():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_open", fail)
    driver.disconnect()
    yield
    driver.disconnect()


# jg.device

@pytest.mark.parametrize(("made", "type", "index", "text"), [
    (lambda: jg.device("cuda:1"), "cuda", 1, "cuda:1"),
    (lambda: jg.device("cuda", 1), "cuda", 1, "cuda:1"),
    (lambda: jg.device(1), "cuda", 1, "cuda:1"),
    (lambda: jg.device("cuda"), "cuda", None, "cuda"),
    (lambda: jg.device("cpu"), "cpu", None, "cpu"),
    (lambda: jg.device("cpu:0"), "cpu", 0, "cpu:0"),
    (lambda: jg.device(jg.device("cuda:3")), "cuda", 3, "cuda:3"),
])
def test_a_device_has_type_and_index(made, type, index, text):
    device = made()
    assert (device.type, device.index, str(device)) == (type, index, text)
    assert eval(repr(device), {"device": jg.device}) == device
    with pytest.raises(AttributeError):
        device.index = 5
    assert pickle.loads(pickle.dumps(device)) == copy.deepcopy(device) == device


def test_devices_compare_by_type_and_index_and_never_with_texts():
    assert jg.device("cuda:1") == jg.device("cuda", 1) != jg.device("cuda")
    assert len({jg.device("cuda:1"), jg.device("cuda", 1), jg.device("cpu")}) == 2
    assert (jg.device("cpu") == "cpu") is False


def test_devices_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    for arguments in (("cuda:1",), ("cuda", 1), ("cuda",), ("cpu",), ("cpu", 0)):
        ours, theirs = jg.device(*arguments), torch.device(*arguments)
        assert (ours.type, ours.index, str(ours), repr(ours)) == (theirs.type, theirs.index, str(theirs), repr(theirs))
        assert (ours == str(ours)) == (theirs == str(theirs))


@pytest.mark.parametrize("given", [("gpu",), ("cuda:x",), ("",), ("cuda:1", 2), (-1,), (1.5,), (None,), ("cpu", -1),
                                   ("meta",)])
def test_what_is_no_device_is_refused(given):
    with pytest.raises(DeviceError, match=r"^device: "):
        jg.device(*given)


# without a driver

def test_without_a_driver_everything_answers(no_driver):
    assert not jg.cuda.is_available() and jg.cuda.device_count() == 0 and not jg.cuda.is_initialized()
    assert jg.cuda.memory_allocated() == jg.cuda.max_memory_reserved() == 0 and jg.cuda.memory_stats() == {}
    jg.cuda.empty_cache()
    assert jg.get_default_device() == jg.device("cpu") == jg.zeros(2).device
    x = jg.zeros(2)
    assert x.cpu() is x and x.to("cpu") is x and not x.is_cuda and x.get_device() == -1 and not x.is_pinned()


@pytest.mark.parametrize("use", [
    lambda: jg.zeros(2, device="cuda"), lambda: jg.ones(2).cuda(), lambda: jg.ones(2).to("cuda:0"),
    lambda: nn.Linear(2, 2).cuda(), lambda: nn.Linear(2, 2, device="cuda"), lambda: jg.cuda.current_device(),
    lambda: jg.cuda.get_device_name(), lambda: jg.cuda.synchronize(), lambda: jg.cuda.Stream(),
    lambda: jg.cuda.mem_get_info(), lambda: jg.cuda.set_device(0), lambda: jg.ones(2).pin_memory(), lambda: jg.cuda.init(),
])
def test_without_a_driver_errors_say_so(no_driver, use):
    with pytest.raises(DeviceError, match=r"no NVIDIA driver was found.*test_device.py:\d+.*is_available"):
        use()


def test_a_driver_without_a_gpu_is_told_apart(connect, monkeypatch):
    from cuda_standin import StandIn
    driver.disconnect()
    monkeypatch.setattr(driver, "_open", lambda: StandIn(gpus=0))
    assert not jg.cuda.is_available()
    with pytest.raises(DeviceError, match="finds no GPU"):
        jg.ones(2).cuda()


def test_the_report_for_bugs_names_gpus(standin):
    assert information()["gpus"] == "Stand-in (sm_90), Stand-in (sm_90)"


def test_the_report_for_bugs_says_why_there_is_no_gpu(no_driver):
    assert information()["gpus"] == "no NVIDIA driver was found on this machine"


def test_importing_looks_for_no_driver():
    text = ("import jitgrad as jg; from jitgrad.runtime.cuda import driver; jg.ones(2) + 1; "
            "print(driver._connection.driver, driver._connection.problem)")
    answer = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == "None None"


# with two GPUs

def test_questions_about_gpus(standin):
    assert jg.cuda.is_available() and jg.cuda.device_count() == 2 and not jg.cuda.is_initialized()
    assert jg.cuda.get_device_name("cuda:1") == "Stand-in" and jg.cuda.get_device_capability(1) == (9, 0)
    assert jg.cuda.is_bf16_supported()
    properties = jg.cuda.get_device_properties(0)
    assert properties.multi_processor_count == 132 and properties.total_memory == standin.memory
    assert jg.cuda.mem_get_info(1) == (standin.memory, standin.memory) and jg.cuda.is_initialized()
    with pytest.raises(DeviceError, match="no device cuda:2: there are cuda:0 … cuda:1"):
        jg.ones(1).to("cuda:2")
    with pytest.raises(DeviceError, match="cpu is no GPU"):
        jg.cuda.get_device_name("cpu")


def test_cuda_without_an_index_is_the_current_gpu(standin):
    assert jg.ones(1).cuda().device == jg.device("cuda:0")
    jg.cuda.set_device(1)
    assert jg.cuda.current_device() == 1 and jg.ones(1, device="cuda").get_device() == 1
    with jg.cuda.device(0):
        assert jg.ones(1).to("cuda").get_device() == 0
    assert jg.cuda.current_device() == 1
    found = []
    thread = threading.Thread(target=lambda: found.append(jg.cuda.current_device()))
    thread.start()
    thread.join()
    assert found == [0]                                            # each thread has its own


@pytest.mark.parametrize("make", [
    lambda **o: jg.zeros(2, 3, **o), lambda **o: jg.ones(3, **o), lambda **o: jg.full((2,), 7.5, **o),
    lambda **o: jg.tensor([1, 2], **o), lambda **o: jg.tensor(3.0, **o), lambda **o: jg.arange(5, **o),
    lambda **o: jg.eye(3, **o), lambda **o: jg.linspace(0, 1, 5, **o), lambda **o: jg.logspace(0, 1, 5, **o),
    lambda **o: jg.empty(4, **o), lambda **o: jg.tril_indices(3, 3, **o), lambda **o: jg.full((), 2, **o),
    lambda **o: jg.zeros(0, 3, **o), lambda **o: jg.zeros(2, dtype=jg.complex128, **o),
    lambda **o: jg.full((3,), 1.5, dtype=jg.bfloat16, **o), lambda **o: jg.full((3,), 1 << 40, **o),
    lambda **o: jg.scalar_tensor(2.0, **o), lambda **o: jg.as_tensor([1.0, 2.0], **o),
    lambda **o: jg.ones(2, 2, dtype=jg.bool, **o), lambda **o: jg.full((2,), -1, dtype=jg.int8, **o),
])
def test_creation_on_a_gpu(executing, make):
    plain, made = make(), make(device="cuda:1")
    with jg.device("cuda:1"):
        within = make()
    for x in (made, within):
        assert x.device == jg.device("cuda:1") and x.is_cuda and x.is_leaf
        assert (x.dtype, x.shape) == (plain.dtype, plain.shape) and x.is_contiguous()
        np.testing.assert_array_equal(x.cpu().numpy(), plain.numpy())


@pytest.mark.parametrize("draw", ["rand", "randn"])
def test_random_numbers_are_the_same_on_every_device(executing, draw):
    jg.cuda.manual_seed_all(3)
    on_gpu = getattr(jg, draw)(5, device="cuda")
    jg.manual_seed(3)
    np.testing.assert_allclose(on_gpu.cpu().numpy(), getattr(jg, draw)(5).numpy(), rtol=0 if draw == "rand" else 1e-5)


def test_likes_are_where_their_model_is(executing):
    x = jg.ones(2, 3, device="cuda:1", dtype=jg.float64)
    for like in (jg.zeros_like(x), jg.rand_like(x), jg.full_like(x, 2), x.new_ones(4), x.new_zeros(1, 1), jg.randn_like(x)):
        assert like.device == x.device and like.dtype is jg.float64
    assert jg.zeros_like(x, device="cpu").device.type == "cpu" == x.new_full((2,), 1, device="cpu").device.type
    assert jg.tensor(x).device == x.device and jg.tensor(x).data_ptr() != x.data_ptr() and jg.as_tensor(x) is x


def test_the_default_device(executing):
    jg.set_default_device("cuda")
    assert jg.get_default_device() == jg.device("cuda:0") and jg.zeros(1).is_cuda and nn.Linear(2, 2).weight.is_cuda
    with jg.device("cpu"):
        assert not jg.zeros(1).is_cuda
        with jg.device("cuda:1"):
            assert jg.zeros(1).get_device() == 1
        assert not jg.zeros(1).is_cuda
    assert jg.from_numpy(np.zeros(2)).device.type == "cpu"             # shares memory, so it stays where it is
    jg.set_default_device(None)
    assert jg.zeros(1).device == jg.device("cpu")


def test_to_takes_all_of_pytorchs_forms(standin):
    x = jg.arange(4)
    for moved in (x.to("cuda"), x.to(0), x.to(jg.device("cuda", 0)), x.to(device="cuda:0"), x.to(jg.ones(1, device="cuda")),
                  x.to("cuda", jg.float32), x.to("cuda", jg.float32, True), x.to("cuda", non_blocking=True), x.cuda(0)):
        jg.cuda.synchronize()
        assert moved.device == jg.device("cuda:0")
        np.testing.assert_array_equal(moved.cpu().numpy(), np.arange(4, dtype=moved.dtype.numpy))
    y = x.cuda()
    assert y.to("cuda:0") is y and y.cuda() is y and y.to("cuda:0", copy=True).data_ptr() != y.data_ptr()
    assert y.to("cpu", jg.float64).dtype is jg.float64                  # converted on the CPU, which can
    np.testing.assert_array_equal(y.to("cuda:1").to("cpu").numpy(), x.numpy())
    with pytest.raises(DeviceError, match="cpu is no GPU"):
        x.cuda("cpu")


def test_modules_move(standin):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 2), nn.MultiheadAttention(4, 2))
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    first = model[0].weight
    model[0].weight.grad = jg.ones(4, 3)
    assert model.cuda(1) is model and model[0].weight is first and first.grad.get_device() == 1
    assert {t.get_device() for t in model.state_dict().values()} == {1}
    model.cpu().to("cuda:0", jg.float64)
    assert model[1].running_mean.dtype is jg.float64 and model[1].num_batches_tracked.dtype is jg.int64
    assert {t.get_device() for t in model.state_dict().values()} == {0}
    model.cpu().float()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[name])


@pytest.mark.parametrize("make", [
    lambda **o: nn.Linear(2, 3, **o), lambda **o: nn.Bilinear(2, 3, 4, **o), lambda **o: nn.Conv2d(2, 3, 3, **o),
    lambda **o: nn.ConvTranspose1d(2, 3, 3, **o), lambda **o: nn.BatchNorm2d(3, **o),
    lambda **o: nn.InstanceNorm1d(3, affine=True, track_running_stats=True, **o), lambda **o: nn.LayerNorm(4, **o),
    lambda **o: nn.GroupNorm(2, 4, **o), lambda **o: nn.RMSNorm(4, **o), lambda **o: nn.Embedding(5, 2, **o),
    lambda **o: nn.LSTM(2, 3, proj_size=1, **o), lambda **o: nn.GRU(2, 3, **o), lambda **o: nn.GRUCell(2, 3, **o),
    lambda **o: nn.MultiheadAttention(4, 2, **o), lambda **o: nn.TransformerEncoderLayer(4, 2, 8, **o),
    lambda **o: nn.PReLU(3, **o), lambda **o: nn.LazyLinear(3, **o), lambda **o: nn.LazyConv2d(3, 3, **o),
    lambda **o: nn.LazyBatchNorm1d(**o), lambda **o: nn.RNN(2, 3, **o),
])
def test_layers_are_made_on_the_device_that_they_are_given(executing, make):
    jg.manual_seed(1)
    plain = make()
    jg.manual_seed(1)
    layer = make(device="cuda:1")
    assert layer.state_dict() and {t.get_device() for t in layer.state_dict().values()} == {1}
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        assert ours.shape == theirs.shape and ours.requires_grad == theirs.requires_grad
        np.testing.assert_allclose(ours.detach().cpu().numpy(), theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_optimizer_state_is_where_its_parameter_is(executing):
    weight = nn.Parameter(jg.ones(3).cuda())
    weight.grad = jg.ones(3, device="cuda")
    optimizer = jg.optim.Adam([weight])
    optimizer.step()
    assert {str(t.device) for t in optimizer.state[weight].values()} == {"cuda:0"}
    other = jg.optim.Adam([nn.Parameter(jg.ones(3))])
    other.load_state_dict(optimizer.state_dict())
    assert {str(t.device) for t in other.state[other.param_groups[0]["params"][0]].values()} == {"cpu"}


def test_generators_have_a_device(standin):
    assert jg.Generator().device == jg.device("cpu") and jg.Generator("cuda:1").device == jg.device("cuda:1")
    with pytest.raises(DeviceError):
        jg.Generator("gpu")


# errors of operands

def test_operands_on_different_devices(standin):
    x, y, z = jg.ones(3), jg.ones(3, device="cuda"), jg.ones(3, device="cuda:1")
    with pytest.raises(DeviceError, match=r"^add: operands are on different devices, cpu and cuda:0: .*f32\[3\]@cuda:0"
                                          r".*test_device.py:\d+.*\.to\('cuda:0'\)"):
        x + y
    with pytest.raises(DeviceError, match="mul: operands are on different devices, cuda:0 and cuda:1"):
        y * z


def test_operations_whose_results_depend_on_values(executing):
    y = jg.tensor([3.0, 0.0, 3.0], device="cuda")
    assert y.nonzero().tolist() == [[0], [2]] and y.nonzero().is_cuda
    assert y.unique().tolist() == [0, 3] and y.unique().is_cuda
    assert y[y > 1].tolist() == [3, 3] and y.long().bincount().tolist() == [1, 0, 0, 2]


def test_compiled_functions_move_with_their_module(executing):
    model = nn.Linear(3, 2)

    @jg.compile
    def step(x):
        return model(x).sum()

    x = jg.ones(4, 3)
    expected = [step(x).item() for _ in range(4)][-1]
    with pytest.raises(DeviceError, match="operands are on different devices, cpu and cuda:0"):
        step(x.cuda())
    model.cuda()
    for _ in range(4):
        assert step(x.cuda()).is_cuda and abs(step(x.cuda()).item() - expected) < 1e-5
    with pytest.raises(DeviceError, match="operands are on different devices, cpu and cuda:0"):
        step(x)
    model.cpu()
    assert step(x).item() == expected
    assert any("it ran on cpu, now it runs on cuda:0" in c.reason for c in step.statistics.compilations)


def test_a_compiled_function_that_goes_on_elsewhere_has_a_graph_for_each_device(executing):
    @jg.compile(fullgraph=True)
    def moves(x):
        return (x + 1).cuda() * 2

    for _ in range(3):
        assert moves(jg.ones(3)).tolist() == [4, 4, 4] and moves(jg.ones(3)).is_cuda
    assert len(moves.graphs) == 2 and moves.statistics.sealed_calls == 4

    @jg.compile
    def both(x, y):                                     # two graphs, one for each device
        return x + 1, y * 2

    for _ in range(3):
        a, b = both(jg.ones(3), jg.ones(2, device="cuda"))
        assert (a.tolist(), b.tolist(), a.is_cuda, b.is_cuda) == ([2, 2, 2], [2, 2], False, True)


def test_functions_that_ask_for_devices_are_sealed(executing):
    where = jg.device("cpu")

    @jg.compile
    def step(x, given):
        if x.is_cuda or x.device.type == "cuda":
            return x
        y = x.to(where) + jg.ones(3, device=x.device) + jg.zeros(3, device=jg.device("cpu", 0))
        return y if given is None or given.type == "cpu" else -y

    x = jg.ones(3)
    for _ in range(5):
        assert step(x, jg.device("cpu")).tolist() == [2, 2, 2]
    assert step.statistics.sealed_calls > 0, str(step.explain())
    assert step(x, jg.device("cuda")).tolist() == [-2, -2, -2] and step(x, None).tolist() == [2, 2, 2]
    assert step(x, jg.device("cpu")).tolist() == [2, 2, 2]
    where = jg.device("cuda")
    with pytest.raises(DeviceError, match="on different devices, cpu and cuda:0"):
        step(x, jg.device("cpu"))


def test_the_default_device_is_part_of_what_a_sealed_call_takes_for_granted(executing):
    @jg.compile
    def fresh(x):
        return x + jg.ones(3)

    x = jg.ones(3)
    for _ in range(4):
        fresh(x)
    with jg.device("cuda"):
        with pytest.raises(DeviceError, match="on different devices, cpu and cuda:0"):
            fresh(x)
        for _ in range(4):
            assert fresh(x.cuda()).tolist() == [2, 2, 2] and fresh(x.cuda()).is_cuda
