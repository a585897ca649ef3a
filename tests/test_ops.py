"""Every primitive, on every sample: the record is complete, its type rule tells the truth, its reference computes what
the op means, its gradient agrees with differences to second order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from samples import SAMPLES, Sample, random, whole

from jitgrad import dtypes, ops
from jitgrad.errors import DivisionByZeroError, DTypeError, OutOfRangeError, ShapeError
from jitgrad.ir import REGISTRY, Graph, GraphBuilder, TensorType, evaluate, parse_type, verify
from jitgrad.transforms.autodiff import split, vjp

ALL = [sample for samples in SAMPLES.values() for sample in samples]
SMOOTH = [s for s in ALL if s.smooth and s.op.differentiable and s.inputs]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")


def as_tuple(result: Any) -> tuple[np.ndarray, ...]:
    return tuple(map(np.asarray, result if isinstance(result, tuple) else (result,)))


# ---- records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_record_is_complete(op):
    assert getattr(ops, op.name) is op, "not exported by jitgrad.ops"
    assert SAMPLES.get(op.name), "no samples"
    assert op.doc, "no doc"
    assert op.spell or op.kind != "elementwise", "no spelling in a kernel"
    assert op.identity is not None or op.name not in ("sum", "prod")


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_type_rule_tells_the_truth(sample):
    before = [x.copy() for x in sample.inputs]
    results = as_tuple(sample.op.eager(*sample.inputs, **sample.attrs))
    types = sample.op.result_types(sample.types, sample.attrs)
    assert tuple((dtypes.from_numpy(r.dtype), r.shape) for r in results) == tuple((t.dtype, t.shape) for t in types)
    for x, y in zip(before, sample.inputs, strict=True):
        np.testing.assert_array_equal(x, y, err_msg="an operand was changed")
    verify(sample.graph())


# ---- values ----------------------------------------------------------------------------------------------------

WIDE = {"f": np.float64, "V": np.float64, "c": np.complex128, "i": np.int64, "u": np.int64, "b": np.bool_}


@pytest.mark.parametrize("sample", [s for s in ALL if s.reference], ids=str)
def test_reference_computes_what_the_op_means(sample):
    results = as_tuple(sample.op.eager(*sample.inputs, **sample.attrs))
    expected = sample.reference(*[x.astype(WIDE[x.dtype.kind]) for x in sample.inputs])
    for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        if want is not None:
            compare(got, np.asarray(want))


def compare(got: np.ndarray, want: np.ndarray) -> None:
    """Equal to a few units in the last place of `got`'s dtype; what overflows in that dtype is inf."""
    want = want.astype(got.dtype)
    if got.dtype.kind in "biu":
        np.testing.assert_array_equal(got, want)
        return
    tolerance = {2: 2e-2 if got.dtype.kind == "V" else 3e-3, 4: 3e-6, 8: 1e-13 if got.dtype.kind == "f" else 3e-6}
    wide = WIDE[got.dtype.kind]
    limit = tolerance.get(got.dtype.itemsize, 1e-13)
    np.testing.assert_allclose(got.astype(wide), want.astype(wide), rtol=limit, atol=limit * 0.1)


@pytest.mark.parametrize("name", [n for n, op in REGISTRY.items() if op.view])
def test_views_share_memory(name):
    for sample in SAMPLES[name]:
        (x,) = sample.inputs
        result = sample.op.eager(x, **sample.attrs)
        if result.size and (name != "reshape" or x.flags.c_contiguous):
            assert np.shares_memory(result, x), sample


# ---- gradients -------------------------------------------------------------------------------------------------


def widened(sample: Sample) -> list[np.ndarray]:
    """The operands with the precision that differences need."""
    wide = {"f": np.float64, "V": np.float64, "c": np.complex128}
    return [x.astype(wide.get(x.dtype.kind, x.dtype)) for x in sample.inputs]


def wide_graph(sample: Sample, inputs: list[np.ndarray]) -> Graph:
    body = sample.attrs.get("body")
    if isinstance(body, Graph):
        sample = Sample(sample.name, sample.inputs, {**sample.attrs, "body": in_float64(body)})
    return sample.graph(inputs)


def in_float64(body: Graph) -> Graph:
    builder = GraphBuilder(body.name)
    mapped = {v: builder.input(TensorType(dtypes.float64, v.shape)) for v in body.inputs}
    with builder:
        for node in body.nodes:
            mapped[node.output] = node.op(*[mapped[v] for v in node.inputs], **node.attrs)
    return builder.build([mapped[v] for v in body.outputs])


def differentiable(values: Any) -> list[int]:
    return [k for k, v in enumerate(values) if v.type.dtype.is_differentiable]


def direction(x: np.ndarray, seed: int) -> np.ndarray:
    return random(*x.shape, dtype=dtypes.from_numpy(x.dtype), low=-1, high=1, seed=seed)


def check_gradient(graph: Graph, inputs: list[np.ndarray], order: int, wrt: list[int] | None = None) -> None:
    """Along a random direction of the inputs, the outputs, weighed at random, change as the gradients say."""
    wrt = differentiable(graph.inputs) if wrt is None else wrt
    joint = vjp(graph, wrt)
    if not joint.seeds:
        return
    verify(joint.graph)
    outputs = evaluate(graph, inputs)
    seeds = [direction(np.asarray(outputs[k]), 10 + k) for k in joint.seeds]
    results = evaluate(joint.graph, [*inputs, *seeds])
    steps = {k: direction(inputs[k], 20 + k) for k in wrt}
    inner = sum(float(np.real(np.vdot(results[p], steps[k]))) for k, p in zip(wrt, joint.gradients, strict=True)
                if p is not None)
    np.testing.assert_allclose(inner, difference(graph, inputs, steps, joint.seeds, seeds), rtol=2e-5, atol=2e-6)
    check_halves(joint, inputs, seeds, results)
    if order > 1:
        wanted = [p for p in joint.gradients if p is not None]
        gradient = joint.graph.replace(outputs=tuple(joint.graph.outputs[p] for p in wanted))
        more = [len(graph.inputs) + k for k in range(len(seeds))]
        check_gradient(gradient, [*inputs, *seeds], order - 1, [*wrt, *more])


def difference(graph: Graph, inputs: list[np.ndarray], steps: dict[int, np.ndarray], of: tuple[int, ...],
               weights: list[np.ndarray]) -> float:
    """Central difference of the weighed outputs, with Richardson's correction."""

    def along(h: float) -> float:
        ends = []
        for sign in (1, -1):
            moved = [x + sign * h * steps[k] if k in steps else x for k, x in enumerate(inputs)]
            outputs = evaluate(graph, moved)
            ends.append(sum(float(np.real(np.vdot(w, outputs[k]))) for k, w in zip(of, weights, strict=True)))
        return (ends[0] - ends[1]) / (2 * h)

    return (4 * along(1e-4) - along(2e-4)) / 3


def check_halves(joint: Any, inputs: list[np.ndarray], seeds: list[np.ndarray], results: Any) -> None:
    """Forward and backward graph together compute what the joint graph does."""
    halves = split(joint)
    verify(halves.forward)
    verify(halves.backward)
    forward = evaluate(halves.forward, inputs)
    saved = forward[joint.outputs:len(forward) - len(halves.forward.writes)]
    for value, k in zip(saved, halves.saved_inputs, strict=True):
        assert k is None or value is inputs[k]
    for got, want in zip(evaluate(halves.backward, [*saved, *seeds]), results[joint.outputs:], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sample", SMOOTH, ids=str)
def test_gradient_is_the_derivative_to_second_order(sample):
    inputs = widened(sample)
    order = 1 if sample.name == "prod" and not np.all(inputs[0]) else 2
    check_gradient(wide_graph(sample, inputs), inputs, order)


# ---- errors ----------------------------------------------------------------------------------------------------

WRONG = [
    (ops.matmul, ("f32[8, 3]", "f32[4, 2]"), {}, ShapeError, r"matmul: inner dimensions differ: f32\[8, 3\] @ f32\[4"),
    (ops.matmul, ("f32[8, 3]", "f64[3, 2]"), {}, DTypeError, "differ in dtype"),
    (ops.add, ("f32[3]", "f32[4]"), {}, ShapeError, r"add: operands differ in shape: f32\[3\] and f32\[4\]"),
    (ops.add, ("f32[3]", "i64[3]"), {}, DTypeError, "operands differ in type"),
    (ops.exp, ("i64[3]",), {}, DTypeError, "exp: needs floating-point, complex operands, got i64"),
    (ops.sum, ("f32[3]",), {"axes": (1,)}, ShapeError, "axis 1 is not among the 1 dimensions"),
    (ops.max, ("f32[0, 2]",), {"axes": (0,)}, ShapeError, "max: of no elements has no value"),
    (ops.reshape, ("f32[3]",), {"shape": (2,)}, ShapeError, "has 3 elements"),
    (ops.permute, ("f32[3, 4]",), {"axes": (0, 0)}, ShapeError, "no permutation"),
    (ops.broadcast_to, ("f32[3]",), {"shape": (4,)}, ShapeError, "does not broadcast"),
    (ops.slice, ("f32[3]",), {"start": (0,), "stop": (4,), "step": (1,)}, ShapeError, "do not lie in"),
    (ops.pad, ("f32[3]",), {"low": (-1,), "high": (0,)}, ShapeError, "one amount >= 0"),
    (ops.concat, ("f32[3, 2]", "f32[3, 3]"), {"axis": 0}, ShapeError, "differ outside of axis 0"),
    (ops.take, ("f32[3]", "f32[2]"), {"axis": 0}, DTypeError, "indices are i32 or i64"),
    (ops.where, ("f32[3]", "f32[3]", "f32[3]"), {}, DTypeError, "needs bool operands"),
    (ops.gather, ("f32[3, 2]", "i64[4, 3]"), {"axis": 0}, ShapeError, "does not lie in"),
]


@pytest.mark.parametrize("op, types, attrs, kind, message", WRONG, ids=lambda x: getattr(x, "name", None))
def test_wrong_operands_are_explained(op, types, attrs, kind, message):
    with pytest.raises(kind, match=message):
        op.result_types(tuple(parse_type(t) for t in types), attrs)


@pytest.mark.parametrize("name", ["floor_divide", "remainder", "fmod"])
def test_integer_division_by_zero(name):
    with pytest.raises(DivisionByZeroError, match="integer division by zero"):
        REGISTRY[name].eager(whole([1, 2]), whole([1, 0]))


@pytest.mark.parametrize("index", [4, -1])
def test_index_out_of_range(index):
    x, place = random(4), whole([0, index])
    for call in (lambda: ops.take.eager(x, place, axis=0), lambda: ops.gather.eager(x, place, axis=0),
                 lambda: ops.index_add.eager(x, place, x[:2], axis=0),
                 lambda: ops.scatter.eager(x, place, x[:2], axis=0),
                 lambda: ops.scatter_add.eager(x, place, x[:2], axis=0),
                 lambda: ops.index_update.eager(x, place, x[:2], axis=0)):
        with pytest.raises(OutOfRangeError, match=f"index {index} is out of range for a dimension of size 4"):
            call()


# ---- random bits -----------------------------------------------------------------------------------------------


def test_philox_known_answer():
    """The known-answer vectors of the authors' library: counter and key all zero, and all ones."""
    zero = ops.random_bits.eager(np.int64(0), np.int64(0), shape=(4,))
    assert [hex(v) for v in zero] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_random_bits_do_not_depend_on_the_shape():
    bits = ops.random_bits.eager(np.int64(5), np.int64(9), shape=(3, 7))
    np.testing.assert_array_equal(bits.reshape(-1)[:10], ops.random_bits.eager(np.int64(5), np.int64(9), shape=(10,)))
