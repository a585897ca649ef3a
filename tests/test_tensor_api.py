"""Methods of Tensor: indexing and assignment beside NumPy, in-place forms, views that share memory, conversions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import jitgrad as jg
from jitgrad import errors

ROWS, COLUMNS = np.array([1, 0, -1]), np.array([2, 0, 1])

KEYS = [
    "0", "-1", "0, 1", "..., 0", "1:", ":, ::2", "None", ":, None, 1", "0, ..., 1:3", "1, 1, 1", "ROWS",
    ":, COLUMNS", "ROWS, COLUMNS", "ROWS, :, COLUMNS", "ROWS[:, None], COLUMNS", "..., COLUMNS", "x > 0",
    "x[:, :, 0] > 0", ":, [True, False, True]", "[0, 1]", "[[0, 1], [1, 0]]", "1:, COLUMNS", "0, COLUMNS",
    ":, COLUMNS, 1:3", "np.array(1)", "None, ROWS", "2:2", ":, COLUMNS, None",
]


def key_for(code, x, tensors):
    """The key, with index arrays as Tensors if asked for."""
    wrap = jg.from_numpy if tensors else (lambda a: a)
    scope = {"ROWS": wrap(ROWS), "COLUMNS": wrap(COLUMNS), "x": x, "np": np}
    return eval(f"K[{code}]", {"K": _Key()}, scope)


class _Key:
    def __getitem__(self, key):
        return key


def example():
    return np.random.default_rng(0).normal(size=(2, 3, 4))


@pytest.mark.parametrize("code", KEYS)
def test_indexing(code):
    a = example()
    t = jg.from_numpy(a)
    expected = a[key_for(code, a, False)]
    result = t[key_for(code, t, True)]
    assert result.shape == expected.shape
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize("code", KEYS)
@pytest.mark.parametrize("value", ["number", "tensor", "row"])
def test_assignment(code, value):
    a, t = example(), jg.from_numpy(example())
    ours, numpys = key_for(code, t, True), key_for(code, a, False)
    shape = a[numpys].shape
    new = {"number": np.float64(7), "tensor": np.random.default_rng(1).normal(size=shape),
           "row": np.arange(shape[-1] if shape else 1.0).reshape(shape[-1:])}[value]
    if "ROWS" in code and value != "number" and "[:, None]" not in code:
        new = np.broadcast_to(np.float64(3), np.shape(new)).copy()       # equal indices: the order must not matter
    a[numpys] = new
    t[ours] = 7.0 if value == "number" else jg.from_numpy(np.asarray(new))
    np.testing.assert_array_equal(t.numpy(), a)


@pytest.mark.parametrize("code", ["0", ":, 1", ":, COLUMNS", "[0, 1], :, [2, 0]", "x > 0", ":, ::2"])
def test_gradient_of_assignment(code):
    x, new = jg.from_numpy(example()).requires_grad_(), jg.tensor(2.0, dtype=jg.float64, requires_grad=True)
    y = x * 1
    y[key_for(code, y, True)] = new
    (y * y).sum().backward()
    mask = np.ones((2, 3, 4))
    mask[key_for(code, example(), False)] = 0
    np.testing.assert_allclose(x.grad.numpy(), 2 * example() * mask)
    np.testing.assert_allclose(new.grad.item(), 4 * (mask == 0).sum())


@st.composite
def keys(draw):
    parts = []
    for size in (4, 5, 3)[:draw(st.integers(0, 3))]:
        kind = draw(st.sampled_from(["int", "slice", "none", "array"]))
        if kind == "int":
            parts.append(draw(st.integers(-size, size - 1)))
        elif kind == "slice":
            start, stop = draw(st.none() | st.integers(-7, 7)), draw(st.none() | st.integers(-7, 7))
            parts.append(slice(start, stop, draw(st.none() | st.integers(1, 3))))
        elif kind == "none":
            parts += [None, slice(None)]
        else:
            parts.append(np.array(draw(st.lists(st.integers(-size, size - 1), min_size=2, max_size=2))))
    return tuple(parts)


@settings(max_examples=150, deadline=None)
@given(keys())
def test_any_key(key):
    # Beside an array NumPy counts an integer as an array too; PyTorch selects with it first.
    if any(isinstance(k, np.ndarray) for k in key):
        key = tuple(slice(abs(k), abs(k) + 1) if isinstance(k, int) else k for k in key)
    a = np.arange(60.0).reshape(4, 5, 3)
    try:
        expected = a[key]
    except IndexError:
        return
    t = jg.from_numpy(a.copy())
    ours = tuple(jg.from_numpy(k) if isinstance(k, np.ndarray) else k for k in key)
    np.testing.assert_array_equal(t[ours].numpy(), expected)
    a[key] = -1.0
    t[ours] = -1.0
    np.testing.assert_array_equal(t.numpy(), a)


# in place

IN_PLACE = [
    "add_(2)", "sub_(y)", "mul_(y)", "div_(2)", "pow_(2)", "clamp_(0, 1)", "neg_()", "exp_()", "relu_()",
    "sigmoid_()", "zero_()", "fill_(3)", "copy_(y)", "floor_()", "addcmul_(y, y, value=2)", "lerp_(y, 0.5)",
    "masked_fill_(x > 0, 1)", "tril_()", "hypot_(y)", "eq_(x)", "ge_(0)", "deg2rad_()", "atan2_(y)", "sinh_()",
    "renorm_(2, 0, 1.0)", "copysign_(-y)",
]


@pytest.mark.parametrize("code", IN_PLACE)
def test_in_place_forms(code):
    a = example()
    x, y = jg.from_numpy(a), jg.from_numpy(np.abs(example()[0]) + 1)
    pure = {"zero_()": "x * 0", "fill_(3)": "x * 0 + 3", "copy_(y)": "x * 0 + y"}
    pure = pure.get(code, "x." + code.replace("_(", "(", 1))
    expected = eval(pure, {}, {"x": x, "y": y}).numpy().copy()
    memory = x.data_ptr()
    assert eval("x." + code, {}, {"x": x, "y": y}) is x
    assert x.data_ptr() == memory
    np.testing.assert_allclose(x.numpy(), expected)


def test_augmented_assignment_keeps_the_object():
    x = z = jg.ones(3)
    x += 1
    x *= 2
    assert z is x and z.tolist() == [4, 4, 4]
    n = jg.ones(3, dtype=jg.int64)
    with pytest.raises(errors.DTypeError):
        n += 0.5
    with pytest.raises(errors.ShapeError):
        n += jg.ones(2, 3, dtype=jg.int64)


def test_views_share_memory():
    x = jg.zeros(2, 3)
    x.t()[1].add_(1)
    x.view(-1)[0] = 5
    x[:, 2:].fill_(7)
    x.unsqueeze(0).expand(1, 2, 3).select(2, 1).mul_(3)
    assert x.tolist() == [[5, 3, 7], [0, 3, 7]]
    with pytest.raises(errors.ShapeError):
        jg.zeros(1, 3).expand(2, 3).add_(1)


def test_view_and_contiguous():
    x = jg.arange(6).reshape(2, 3)
    assert x.T.contiguous().view(6).tolist() == [0, 3, 1, 4, 2, 5]
    assert x.contiguous() is x and x[:, 1].contiguous().is_contiguous()
    with pytest.raises(errors.ShapeError):
        x.T.view(6)
    assert x[:, :2].view(2, 1, 2).shape == (2, 1, 2)
    assert x.view(3, -1).shape == (3, 2) and x.view_as(x.T).shape == (3, 2)


# conversions and attributes

def test_dtypes():
    x = jg.tensor([1.7, -1.7])
    assert x.long().tolist() == [1, -1] and x.bool().tolist() == [True, True] and x.float() is x
    assert [getattr(x, n)().dtype for n in ("double", "half", "bfloat16", "int", "short", "char")] == [
        jg.float64, jg.float16, jg.bfloat16, jg.int32, jg.int16, jg.int8]
    assert x.to(jg.float64).dtype is jg.float64 and x.to(x.device) is x
    assert x.to(jg.ones(1, dtype=jg.int8)).dtype is jg.int8
    assert x.to(jg.float32, copy=True) is not x and x.type() is jg.float32 and x.type_as(jg.arange(1)).dtype is jg.int64


def test_sizes():
    x = jg.zeros(2, 3)
    assert (x.size(), x.size(-1), x.dim(), x.ndim, x.numel(), len(x), x.shape) == ((2, 3), 3, 2, 2, 6, 2, (2, 3))
    assert x.T.shape == x.mT.shape == (3, 2) and [row.shape for row in x] == [(3,), (3,)]
    assert (1 in jg.arange(3)) and (5 not in jg.arange(3)) and (x == None) is False  # noqa: E711
    with pytest.raises(TypeError):
        len(jg.tensor(1))


def test_random_fills():
    jg.manual_seed(0)
    x = jg.empty(4000)
    assert abs(x.normal_(2.0, 0.5).mean().item() - 2) < 0.05 and abs(x.std().item() - 0.5) < 0.05
    assert x.uniform_(-1, 1).min().item() >= -1 and abs(x.mean().item()) < 0.05
    assert set(jg.empty(100).bernoulli_(0.5).tolist()) == {0, 1}
    assert jg.empty(100, dtype=jg.int64).random_(5).max().item() == 4


@pytest.mark.cpu
def test_memory_is_shared_with_numpy():
    array = np.arange(3.0)
    shared = jg.from_numpy(array)
    assert shared.numpy() is array
    shared.add_(1)
    assert array.tolist() == [1, 2, 3] and jg.as_tensor(array).numpy() is array
    assert jg.tensor(array).numpy() is not array


def test_creation():
    assert jg.tensor([[1, 2], [3, 4]]).dtype is jg.int64 and jg.tensor([1, 2.5]).dtype is jg.float32
    assert jg.tensor([True]).dtype is jg.bool and jg.tensor([]).dtype is jg.float32
    assert jg.tensor(np.float64(1)).dtype is jg.float64
    assert jg.tensor([jg.tensor(1.0), jg.tensor(2.0)]).tolist() == [1, 2]
    assert jg.tensor([1.0, 2.0], requires_grad=True).requires_grad and jg.zeros(2, requires_grad=True).is_leaf
    assert jg.arange(1, 2, 0.25).tolist() == [1, 1.25, 1.5, 1.75] and jg.arange(5, 0, -2).tolist() == [5, 3, 1]
    assert jg.linspace(0, 1, 3).tolist() == [0, 0.5, 1] and jg.eye(2).tolist() == [[1, 0], [0, 1]]
    assert jg.full((2,), 3).dtype is jg.int64 and jg.zeros(2, 0).shape == (2, 0) and jg.ones(()).shape == ()
    assert jg.tril_indices(2, 2).tolist() == [[0, 1, 1], [0, 0, 1]]


def test_dlpack_shares_memory():
    array = np.arange(6.0).reshape(2, 3)
    x = jg.from_dlpack(array)
    np.testing.assert_array_equal(np.from_dlpack(x), array)
    array[0, 0] = 7
    assert x[0, 0].item() == 7
    with pytest.raises(errors.DTypeError, match="does not speak DLPack"):
        jg.from_dlpack([1.0])


def test_offsets_and_storage():
    x = jg.arange(12.0).reshape(3, 4)
    assert (x.storage_offset(), x[1].storage_offset(), x[1:, 2:].storage_offset(), x.T[1].storage_offset()) == (0, 4, 6, 1)
    assert not (x.is_sparse or x.is_quantized or x.is_meta)


def test_python_functions_of_elements():
    x = jg.tensor([[1, 2], [3, 4]])
    assert x.T.apply_(lambda v: 10 * v).tolist() == [[10, 30], [20, 40]] and x.tolist() == [[10, 20], [30, 40]]
    assert x.map_(jg.tensor([1, 2]), lambda v, w: v + w).tolist() == [[11, 22], [31, 42]]
    with pytest.raises(errors.AutogradError, match="no gradient"):
        (jg.ones(2, requires_grad=True) * 2).apply_(abs)


def test_in_place_forms_raise_versions():
    for change in (lambda t: t.eq_(1), jg.exp_, jg.cos_, lambda t: t.put_(jg.tensor([0]), jg.tensor([5.0]))):
        x = jg.ones(3, requires_grad=True) * 2
        y = x * x
        change(x)
        with pytest.raises(errors.AutogradError, match="changed in place"):
            y.sum().backward()
