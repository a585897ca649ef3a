"""Every primitive on every sample, compiled: the kernels as plain Python with checked pointers give what NumPy gives, and so
do those of its gradient; a selection runs natively as well."""

import numpy as np
import pytest
from programs import plain_plan
from samples import SAMPLES

from jitgrad.ir import REGISTRY, Graph, evaluate
from jitgrad.plans import compile_graph
from jitgrad.transforms.autodiff import vjp

ALL = [sample for name, samples in SAMPLES.items() for sample in samples if name != "region"]
SMOOTH = [s for s in ALL if s.smooth and s.op.differentiable and s.inputs]
NATIVE_GRADIENTS = [next(s for s in SMOOTH if s.name == name) for name in sorted({s.name for s in SMOOTH})[::3]]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::numpy.exceptions.ComplexWarning")

RELATIVE = {1: 0.0, 2: 2e-2, 4: 2e-5, 8: 1e-12, 16: 1e-12}
"""By the size of an element in bytes; two float32 make a complex64."""


def gradient_graph(sample) -> Graph:
    """The gradients of all outputs with respect to all inputs that have one."""
    graph = sample.graph()
    joint = vjp(graph, [k for k, v in enumerate(graph.inputs) if v.dtype.is_differentiable])
    return joint.graph.replace(outputs=joint.graph.outputs[joint.outputs:])


def arguments(graph, sample):
    """The operands of the sample, then gradients for its outputs."""
    generator = np.random.default_rng(0)
    given = [np.array(x, order="C") for x in sample.inputs]
    return given + [np.array(generator.standard_normal(v.shape), v.dtype.numpy) for v in graph.inputs[len(given):]]


def check(graph, plan, arrays):
    with np.errstate(all="ignore"):
        expected = [np.asarray(x) for x in evaluate(graph, [x.copy() for x in arrays])]
    before = [x.copy() for x in arrays]
    for result, wanted in zip(plan.run(arrays), expected, strict=True):
        assert_close(result, wanted)
    for x, y in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(x, y, err_msg="an operand was changed")


def assert_close(x, y):
    assert x.dtype == y.dtype and x.shape == y.shape
    if y.dtype.kind in "biu":
        np.testing.assert_array_equal(x, y)
        return
    limit = 2e-5 if y.dtype == np.complex64 else RELATIVE[y.dtype.itemsize]
    wide = np.complex128 if y.dtype.kind == "c" else np.float64
    x, y = x.astype(wide), y.astype(wide)
    largest = np.max(np.abs(y[np.isfinite(y)]), initial=1.0) if y.size < 200 else 1.0
    np.testing.assert_allclose(x, y, rtol=limit, atol=limit * min(largest, 1e3))


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_plain_kernels_compute_what_numpy_computes(sample):
    graph = sample.graph()
    check(graph, plain_plan(graph), arguments(graph, sample))


@pytest.mark.parametrize("sample", SMOOTH, ids=str)
def test_plain_kernels_of_gradients(sample):
    graph = gradient_graph(sample)
    check(graph, plain_plan(graph), arguments(graph, sample))


@pytest.mark.parametrize("sample", NATIVE_GRADIENTS, ids=str)
def test_native_kernels_of_gradients(sample):
    graph = gradient_graph(sample)
    check(graph, compile_graph(graph), arguments(graph, sample))


def test_every_op_is_here():
    assert {s.name for s in ALL} == set(REGISTRY) - {"region"}
