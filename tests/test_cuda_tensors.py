"""Tensors in the memory of a GPU, with the stand-in: reading, writing, views, gradients, exchange with other libraries."""

import copy
import io
import pickle

import numpy as np
import pytest

import jitgrad as jg
from jitgrad import nn
from jitgrad.data import DataLoader, TensorDataset
from jitgrad.errors import AutogradError, DeviceError, DTypeError
from jitgrad.runtime.cuda import dispatch, dlpack, driver
from jitgrad.runtime.cuda.array import DeviceArray, copy_into, empty, to_host


def pair(*shape, dtype=jg.float32):
    """The same values on the CPU and on a GPU."""
    x = jg.arange(int(np.prod(shape))).reshape(*shape).to(dtype)
    return x, x.cuda()


# reading

def test_values_are_read_back(standin):
    x, y = pair(2, 3)
    assert y.tolist() == x.tolist() and y[1, 2].item() == 5.0 and float(y[0, 1]) == 1.0 and int(y[1, 0]) == 3
    assert bool(y[0, 0]) is False and [t.item() for t in y[0]] == [0, 1, 2] and f"{y[1, 1]:.2f}" == "4.00"
    assert repr(y) == "tensor([[0., 1., 2.],\n        [3., 4., 5.]], device='cuda:0')"
    np.testing.assert_array_equal(y.numpy(force=True), x.numpy())
    assert len(y) == 2 and y.nbytes == 24 and y.element_size() == 4 and y.data_ptr() != x.data_ptr()
    assert str(y.tensor_type) == "f32[2, 3]@cuda:0" and y.device_name == "cuda:0" and not y.is_cpu


@pytest.mark.parametrize("dtype", [jg.float64, jg.float16, jg.bfloat16, jg.complex64, jg.int64, jg.int8, jg.uint8, jg.bool])
def test_every_dtype_goes_there_and_back(standin, dtype):
    x = jg.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    y = x.cuda().to("cuda:1").cpu()
    assert y.dtype is dtype and y.tolist() == x.tolist()
    assert repr(x.cuda()).count("device='cuda:0'") == 1


def test_reading_waits_for_the_current_stream(standin):
    x = jg.ones(3).pin_memory().cuda(non_blocking=True)                      # queued only
    y = x.clone()
    assert "copy" not in standin.log
    assert y.tolist() == [1, 1, 1] and standin.log[-1] == "download"


def test_numpy_is_refused_with_the_way_out(standin):
    _, y = pair(2)
    for read in (lambda: y.numpy(), lambda: np.asarray(y)):
        with pytest.raises(DeviceError, match=r"numpy: NumPy cannot read f32\[2\]@cuda:0 .*x\.cpu\(\)\.numpy\(\)"):
            read()
    with pytest.raises(TypeError):                                           # what PyTorch raises
        y.numpy()
    assert not hasattr(y, "__array_interface__")


# views and writing

VIEWS = [lambda t: t.T, lambda t: t[1:], lambda t: t[:, ::2], lambda t: t.reshape(3, 2), lambda t: t.view(-1),
         lambda t: t[0], lambda t: t.unsqueeze(1), lambda t: t.transpose(0, 1)[1:].unsqueeze(0), lambda t: t[1, 1:],
         lambda t: t.permute(1, 0)[::2], lambda t: t.squeeze(), lambda t: t.detach()]


@pytest.mark.parametrize("number", range(len(VIEWS)))
def test_views_share_memory_and_writing_through_them_shows(standin, number):
    view = VIEWS[number]
    x, y = pair(2, 3)
    ours, theirs = view(y), view(x)
    assert (ours.shape, ours.stride(), ours.is_contiguous()) == (theirs.shape, theirs.stride(), theirs.is_contiguous())
    assert ours.tolist() == theirs.tolist() and ours.device == y.device and ours._is_view() == theirs._is_view()
    for change in (lambda t: t.fill_(9), lambda t: t.zero_(),
                   lambda t: t.copy_(jg.arange(t.numel()).reshape(t.shape).float())):
        version = y._version
        change(ours), change(theirs)
        assert y.tolist() == x.tolist() and y._version == version + 1
    assert ours.contiguous().tolist() == theirs.tolist() and ours.clone().tolist() == theirs.tolist()
    assert ours.clone().data_ptr() != ours.data_ptr()
    assert ours.clone().stride() == theirs.clone().stride()


def test_views_point_into_their_root(standin):
    x, y = pair(4, 5)
    assert y[1:, 2].data_ptr() - y.data_ptr() == 28 == x[1:, 2].data_ptr() - x.data_ptr()
    assert y.T.reshape(20).data_ptr() != y.data_ptr() and y.T.reshape(20).tolist() == x.T.reshape(20).tolist()
    assert not y.T.reshape(20)._is_view() and y.reshape(20)._is_view()
    place = y.data_ptr()
    row = y[2]
    del y
    assert jg.zeros(4, 5, device="cuda").data_ptr() != place and row.tolist() == x[2].tolist()     # a view keeps it alive


def test_a_tensor_is_copied_onto_a_part_of_itself(standin):
    x, y = pair(6)
    for t in (x, y):
        t[1:].copy_(t[:-1].clone() if t is x else t[:-1])
        t.copy_(t)
    assert y.tolist() == x.tolist() == [0, 0, 1, 2, 3, 4]


def test_expanded_tensors_are_not_written(standin):
    y = jg.ones(1, 3, device="cuda").expand(4, 3)
    assert y.stride() == (0, 1) and y.tolist() == [[1] * 3] * 4 and y.contiguous().stride() == (3, 1)
    with pytest.raises(RuntimeError, match="share one memory location"):
        y.fill_(2)


def test_copies_between_devices_and_dtypes(standin):
    y = jg.zeros(2, 3, device="cuda")
    y.copy_(jg.tensor([1, 2, 3]))                                             # converted and broadcast on the way
    assert y.tolist() == [[1, 2, 3]] * 2
    x = jg.zeros(2, 3, dtype=jg.float64)
    x.copy_(y)
    assert x.tolist() == [[1, 2, 3]] * 2
    z = jg.zeros(3, 2, device="cuda:1")
    z.T.copy_(y)
    assert z.tolist() == [[1, 1], [2, 2], [3, 3]]
    y.data = jg.ones(5)
    assert y.device.type == "cpu" and y.shape == (5,)


def test_random_filling_on_a_gpu(executing):
    for fill in (lambda t: t.normal_(), lambda t: t.uniform_(-1, 1), lambda t: t.bernoulli_(0.3)):
        x, y = jg.zeros(50), jg.zeros(50, device="cuda")
        jg.manual_seed(5)
        fill(x)
        jg.manual_seed(5)
        fill(y)
        assert y.is_cuda
        np.testing.assert_allclose(y.tolist(), x.tolist(), rtol=1e-5, atol=1e-6)      # normal numbers go through log and cos


def test_a_failed_copy_is_an_error_and_changes_nothing(standin):
    _, y = pair(3)
    jg.cuda.synchronize()
    standin.fail["cuMemcpyHtoDAsync_v2"] = 700
    with pytest.raises(DeviceError, match="ILLEGAL_ADDRESS"):
        y.copy_(jg.tensor([7.0, 8.0, 9.0]))
    assert y.tolist() == [0, 1, 2]


# gradients

def test_gradients_go_back_to_where_values_came_from(standin):
    w = jg.ones(3, requires_grad=True)
    y = w.cuda()
    assert y.requires_grad and not y.is_leaf and repr(y).endswith("device='cuda:0', grad_fn=<_MoveBackward>)")
    y.to("cuda:1").reshape(1, 3).backward(jg.tensor([[1.0, 2.0, 3.0]], device="cuda:1"))
    assert w.grad.device == jg.device("cpu") and w.grad.tolist() == [1, 2, 3]
    scalar = jg.tensor(2.0, requires_grad=True)
    scalar.cuda().backward()                                                  # starts with a one on the GPU
    assert scalar.grad.item() == 1.0


def test_a_leaf_on_a_gpu_gets_its_gradient_there(standin):
    w = jg.ones(3, device="cuda", requires_grad=True)
    (w.cpu() * jg.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert w.is_leaf and w.grad.device == w.device and w.grad.tolist() == [1, 2, 3]
    given = jg.ones(3, device="cuda")
    v = jg.zeros(3, device="cuda", requires_grad=True)
    v.reshape(3).backward(given)
    given.fill_(5)
    assert v.grad.tolist() == [1, 1, 1]                                       # a copy of its own


def test_a_gradient_on_another_device_is_refused(standin):
    y = jg.ones(3, requires_grad=True).cuda()
    with pytest.raises(DeviceError, match=r"the gradient given is f32\[3\] for an output f32\[3\]@cuda:0"):
        y.backward(jg.ones(3))


def test_a_leaf_that_requires_gradients_is_not_changed(standin):
    w = jg.ones(3, device="cuda", requires_grad=True)
    with pytest.raises(AutogradError, match="a leaf that requires gradients"):
        w.fill_(2)
    with jg.no_grad():
        w.copy_(jg.zeros(3))
    assert w.tolist() == [0, 0, 0] and w._version == 1


# what eager execution asks for

def test_kernels_are_asked_for_in_one_place(standin):
    """`dispatch.install` is where whoever has kernels answers; here NumPy does, by way of the host."""
    asked = []

    def run(op, arrays, attrs, gpu):
        asked.append(op.name)
        with jg.cuda.device(gpu.index):
            host = [to_host(a) if type(a) is DeviceArray else a for a in arrays]
        results = op.eager(*host, **attrs)
        made = []
        for result in results if op.outputs > 1 else (results,):
            made.append(empty(np.shape(result), np.asarray(result).dtype, gpu))
            copy_into(made[-1], np.asarray(result))
        return tuple(made) if op.outputs > 1 else made[0]

    before = dispatch.install(run)
    try:
        model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
        plain.load_state_dict(model.state_dict())
        model.cuda()
        x = jg.arange(12.0).reshape(4, 3)
        for net, inputs in ((plain, x), (model, x.cuda())):
            (net(inputs).tanh() * 2 + 1).sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert ours.grad.is_cuda
            np.testing.assert_allclose(ours.grad.cpu().numpy(), theirs.grad.numpy(), rtol=1e-6)
        assert {"tanh", "sum"} <= set(asked)
        y = x.cuda().to("cuda:1")
        y += 1
        assert y.get_device() == 1 and y.tolist() == (x + 1).tolist() and y.sort()[1].get_device() == 1
    finally:
        dispatch.install(before)


# other libraries

def test_dlpack_shares_memory(standin):
    x, y = pair(2, 3, dtype=jg.bfloat16)
    for source in (y, y.T, y[:, 1]):
        assert source.__dlpack_device__() == (2, 0)
        other = jg.from_dlpack(source)
        assert other.data_ptr() == source.data_ptr() and other.dtype is jg.bfloat16
        assert other.stride() == source.stride() and other.tolist() == source.tolist()
    other = jg.from_dlpack(y)
    del y
    before = jg.cuda.memory_allocated()
    assert before and other.tolist() == x.tolist()
    del other, source
    assert jg.cuda.memory_allocated() == 0                                    # the last one gave it back
    y = x.cuda()
    assert y.__dlpack__(copy=True) is not None and y.__dlpack__(dl_device=(2, 0), max_version=(1, 0)) is not None
    with pytest.raises(DeviceError, match="asked for on device"):
        y.__dlpack__(dl_device=(1, 0))
    with pytest.raises(AutogradError, match="requires gradients"):
        jg.ones(2, device="cuda", requires_grad=True).__dlpack__()
    assert x.__dlpack_device__() == (1, 0) and jg.from_dlpack(x.float()).device.type == "cpu"


def test_a_capsule_is_used_once_and_one_that_is_not_used_gives_back(standin):
    _, y = pair(3)

    class Once:
        def __init__(self, capsule):
            self.capsule = capsule

        def __dlpack__(self, **_):
            return self.capsule

        def __dlpack_device__(self):
            return 2, 0

    source = Once(y.__dlpack__())
    jg.from_dlpack(source)
    with pytest.raises(DeviceError, match="used already"):
        jg.from_dlpack(source)
    elsewhere = y.__dlpack__(stream=-1)
    dlpack.pointer_to(elsewhere).contents.tensor.device_id = 7
    with pytest.raises(DeviceError, match="there is no device cuda:7"):
        jg.from_dlpack(Once(elsewhere))
    unused = y.__dlpack__(stream=-1)
    del y, source, elsewhere                                                  # nobody has taken that one, either
    assert jg.cuda.memory_allocated() > 0
    del unused
    assert jg.cuda.memory_allocated() == 0


@pytest.mark.parametrize("named", [{"stream": 1}, {"stream": 2}, {"stream": None}, {}])
def test_dlpack_orders_streams(standin, named):
    side = jg.cuda.Stream()
    with jg.cuda.stream(side):
        y = jg.ones(3).pin_memory().cuda(non_blocking=True)
        y.__dlpack__(**named)                                                 # the default stream waits for ours
    assert y.tolist() == [1, 1, 1] and "wait" in standin.log


def test_dlpack_orders_no_streams_when_it_is_told_so(standin):
    with jg.cuda.stream(jg.cuda.Stream()):
        y = jg.ones(3).cuda()
        y.__dlpack__(stream=-1)
        assert "cuStreamWaitEvent" not in standin.calls
        with pytest.raises(DeviceError, match="stream 0 may be"):
            y.__dlpack__(stream=0)


class Foreign:
    """An array of another library."""

    def __init__(self, source, **changed):
        self.source, self.__cuda_array_interface__ = source, {**source.__cuda_array_interface__, **changed}


def test_the_cuda_array_interface(standin):
    x, y = pair(2, 3)
    described = y.__cuda_array_interface__
    assert described["data"] == (y.data_ptr(), False) and described["shape"] == (2, 3) and described["typestr"] == "<f4"
    assert described["strides"] is None and y.T.__cuda_array_interface__["strides"] == (4, 12)
    assert not hasattr(x, "__cuda_array_interface__") and not hasattr(y.requires_grad_(), "__cuda_array_interface__")
    shared = jg.as_tensor(Foreign(y.detach().T))
    assert shared.data_ptr() == y.data_ptr() and shared.tolist() == x.T.tolist()
    empty = jg.as_tensor(Foreign(jg.empty(0, 3, device="cuda")))
    assert empty.shape == (0, 3) and empty.get_device() == 0
    with pytest.raises(DTypeError, match="a Foreign with a mask"):
        jg.as_tensor(Foreign(y.detach(), mask=y.detach()))
    with pytest.raises(DeviceError, match="is no memory of a GPU"):
        jg.as_tensor(Foreign(y.detach(), data=(x.data_ptr(), False)))


def test_an_interface_is_on_the_gpu_of_its_memory_and_waited_for(standin):
    side = jg.cuda.Stream(1)
    with jg.cuda.stream(side):
        x = jg.arange(6.0).pin_memory().to("cuda:1", non_blocking=True)
    shared = jg.as_tensor(Foreign(x, stream=side.cuda_stream))
    assert shared.get_device() == 1 and jg.cuda.current_device() == 0
    assert shared.tolist() == list(range(6)) and "wait" in standin.log


# pinned memory, loaders, files

def test_pinned_tensors(standin):
    x = jg.arange(6.0).reshape(2, 3)
    y = x.pin_memory()
    assert not x.is_pinned() and y.is_pinned() and y.pin_memory() is y and y[1:].is_pinned() and y.tolist() == x.tolist()
    assert y.device == jg.device("cpu")
    with pytest.raises(DeviceError, match="only memory of the CPU can be pinned"):
        y.cuda().pin_memory()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_pins_what_it_gives(standin, workers):
    data = TensorDataset(jg.arange(10.0), jg.arange(10))
    for k, (x, y) in enumerate(DataLoader(data, batch_size=4, pin_memory=True, num_workers=workers)):
        assert x.is_pinned() and y.is_pinned() and x.tolist() == list(range(4 * k, min(4 * k + 4, 10)))
        assert x.cuda(non_blocking=True).tolist() == x.tolist()
    assert not any(x.is_pinned() for x, _ in DataLoader(data))


def test_saving_and_loading(standin):
    state = {"weight": jg.ones(2, 3, device="cuda:1"), "p": nn.Parameter(jg.zeros(2).cuda()), "step": jg.tensor(3)}
    file = io.BytesIO()
    jg.save(state, file)
    for location, devices in ((None, ("cuda:1", "cuda:0", "cpu")), ("cpu", ("cpu",) * 3), (jg.device(1), ("cuda:1",) * 3),
                              ({"cuda:1": "cuda:0"}, ("cuda:0", "cuda:0", "cpu"))):
        file.seek(0)
        loaded = jg.load(file, map_location=location)
        assert tuple(str(t.device) for t in loaded.values()) == devices
        assert isinstance(loaded["p"], nn.Parameter) and loaded["weight"].tolist() == [[1] * 3] * 2
    file.seek(0)
    with pytest.raises(DeviceError, match="map_location"):
        jg.load(file, map_location=lambda storage, place: storage)


def test_loading_what_was_saved_on_a_gpu_without_one(standin, monkeypatch):
    file = io.BytesIO()
    jg.save({"x": jg.ones(2, device="cuda")}, file)
    driver.disconnect()

    def fail():
        raise OSError

    monkeypatch.setattr(driver, "_open", fail)
    file.seek(0)
    with pytest.raises(DeviceError, match="no GPU can be used"):
        jg.load(file)
    file.seek(0)
    assert jg.load(file, map_location="cpu")["x"].tolist() == [1, 1]


def test_state_dicts_go_between_devices(standin):
    here, there = nn.Linear(3, 2), nn.Linear(3, 2).cuda()
    there.load_state_dict(here.state_dict())
    assert there.weight.is_cuda and there.weight.tolist() == here.weight.tolist()
    here.load_state_dict({name: value.clone().fill_(4) for name, value in there.state_dict().items()})
    assert here.weight.device.type == "cpu" and here.bias.tolist() == [4, 4]


def test_copying_and_pickling(standin):
    y = jg.ones(2, 2, device="cuda:1", requires_grad=True)
    other = copy.deepcopy(y)
    assert other.device == y.device and other.data_ptr() != y.data_ptr() and other.requires_grad
    restored = pickle.loads(pickle.dumps(y))
    assert restored.device == y.device and restored.tolist() == y.tolist() and restored.requires_grad
