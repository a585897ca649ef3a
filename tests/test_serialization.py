"""save and load: nested values, shared memory, whole training states, damaged files, and other programs' files."""

import io
import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy

import jitgrad as jg
from jitgrad import dtypes, nn, optim
from jitgrad.nn.parameter import Parameter
from jitgrad.safetensors import FileFormatError
from jitgrad.serialization import load, save


def round_trip(value):
    file = io.BytesIO()
    save(value, file)
    file.seek(0)
    return load(file)


def weights():
    return {"a.weight": jg.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3)), "b": jg.from_numpy(np.array(3))}


def test_plain_values_come_back():
    value = {"a": [1, 2.5, True, None, "text", (1, (2,))], 3: {4, 5}, (1, "k"): b"\x00\xff", "c": 1 + 2j,
             "inf": float("inf"), "big": 2 ** 80, "dtype": dtypes.bfloat16, "empty": [{}, [], ()]}
    assert round_trip(value) == value
    assert np.isnan(round_trip(float("nan")))


@pytest.mark.parametrize("dtype", [d for d in dtypes.ALL if d is not dtypes.complex128], ids=lambda d: d.name)
def test_every_dtype_comes_back(dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype.numpy)
    back = round_trip([jg.from_numpy(x) for x in (array, np.asarray(array[0, 0]), array[:, :0], array.T)])
    assert [t.shape for t in back] == [(2, 3), (), (2, 0), (3, 2)] and all(t.dtype is dtype for t in back)
    np.testing.assert_array_equal(back[0].numpy(), array)
    np.testing.assert_array_equal(back[3].numpy(), array.T)


def test_kinds_of_arrays_come_back():
    p = Parameter(np.ones(2, np.float32))
    back = round_trip({"p": p, "again": p, "frozen": Parameter(np.ones(2), False), "n": np.arange(3), "s": np.int16(7)})
    assert type(back["p"]) is Parameter and back["p"].requires_grad and back["p"] is back["again"]
    assert not back["frozen"].requires_grad and type(back["n"]) is np.ndarray and type(back["s"]) is np.int16


@pytest.mark.cpu
def test_shared_memory_is_shared_again():
    base = jg.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    back = round_trip({"row": base[1], "base": base, "alias": base.detach(), "columns": base.t()[1:3]})
    back["base"].zero_()
    assert not any(t.numpy().any() for t in back.values()) and back["columns"].shape == (2, 3)
    net = nn.Linear(3, 3)
    tied = nn.Sequential(net, net)
    state = round_trip(tied.state_dict())
    assert np.shares_memory(state["0.weight"].numpy(), state["1.weight"].numpy())


def test_a_training_state_goes_on_as_if_nothing_had_happened(tmp_path):
    def build():
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        optimizer = optim.Adam(net.parameters(), lr=0.05, amsgrad=True)
        return net, optimizer, optim.lr_scheduler.StepLR(optimizer, 2)

    def train(net, optimizer, schedule):
        x = jg.from_numpy(np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32))
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
            schedule.step()

    first, second = build(), build()
    train(*first)
    save({"epoch": 3, "parts": [part.state_dict() for part in first]}, tmp_path / "run.jg")
    checkpoint = load(tmp_path / "run.jg", map_location="cpu", weights_only=True)
    for part, state in zip(second, checkpoint["parts"]):
        part.load_state_dict(state)
    train(*first)
    train(*second)
    for a, b in zip(first[0].state_dict().values(), second[0].state_dict().values()):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_state_dicts_are_plain_safetensors_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save(weights(), path)
    arrays = safetensors.numpy.load_file(path)
    assert sorted(arrays) == ["a.weight", "b"]
    np.testing.assert_array_equal(arrays["a.weight"], np.arange(6).reshape(2, 3))
    safetensors.numpy.save_file({"w": np.ones((2, 2), np.float16)}, path)
    back = load(path)
    assert back["w"].dtype is dtypes.float16 and back["w"].tolist() == [[1, 1], [1, 1]]


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model"
    save(weights(), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save({"other": jg.from_numpy(np.zeros(1000))}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_is_not_data_is_refused():
    with pytest.raises(TypeError, match=r"a Linear at 'model' cannot be saved as data.*Save its state_dict\(\)"):
        save({"model": nn.Linear(1, 1)}, io.BytesIO())
    with pytest.raises(TypeError, match=r"a function at 'f\.0'"):
        save({"f": [round_trip]}, io.BytesIO())
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        save(loop, io.BytesIO())


def damaged(change):
    file = io.BytesIO()
    save(weights(), file)
    return io.BytesIO(change(file.getvalue()))


def with_header(change):
    """The file with its header changed by `change`, a function of the parsed JSON."""
    def apply(content):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8:8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length:]
    return apply


DAMAGES = {
    "empty": lambda c: b"", "short": lambda c: c[:5], "cut header": lambda c: c[:40], "cut data": lambda c: c[:-3],
    "more data": lambda c: c + b"x", "flipped bit": lambda c: c[:-1] + bytes([c[-1] ^ 1]),
    "text": lambda c: b"this is no such file at all", "huge length": lambda c: b"\xff" * 8 + c[8:],
    "list as header": lambda c: struct.pack("<Q", 2) + b"[]",
    "unknown dtype": with_header(lambda h: h["b"].update(dtype="F77")),
    "negative size": with_header(lambda h: h["a.weight"].update(shape=[-2, -3])),
    "wrong shape": with_header(lambda h: h["a.weight"].update(shape=[2, 4])),
    "overlap": with_header(lambda h: h["b"].update(data_offsets=h["a.weight"]["data_offsets"][:1] * 2, shape=[0])),
    "no structure": with_header(lambda h: h["__metadata__"].pop("structure")),
    "missing tensor": with_header(lambda h: h["__metadata__"].update(structure='{"tensor":"zzz"}')),
    "unknown kind": with_header(lambda h: h["__metadata__"].update(structure='{"code":"zzz"}')),
    "beyond container": with_header(lambda h: h["__metadata__"].update(
        shared='{"s":{"in":"b","offset":9,"shape":[2],"stride":[1]}}')),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_with_a_reason(name):
    with pytest.raises(FileFormatError, match=r"load: .*(damaged|malformed)"):
        load(damaged(DAMAGES[name]))


def test_files_of_other_kinds():
    with pytest.raises(FileFormatError, match=r"torch\.save"):
        load(io.BytesIO(b"PK\x03\x04" + b"0" * 50))
    with pytest.raises(FileFormatError, match="format 9"):
        load(damaged(with_header(lambda h: h["__metadata__"].update(jitgrad="9"))))
