"""GPU kernels of ops that have their own, on the PTX interpreter: all samples of these ops against what NumPy gives, under
different schedules of warps, with operands that do not begin at round addresses, and in place."""

import numpy as np
import pytest
from cuda_launching import run
from samples import SAMPLES
from test_compiled_ops import assert_close

from jitgrad import pipeline
from jitgrad.codegen.cuda_call import GPU_ANY_TYPE, GPU_IN_PLACE, GPU_LIBRARY
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.errors import CompileError
from jitgrad.ir import evaluate

LONG = ("attention", "attention_grad")
"""Ops whose kernels take the interpreter long, and have tests of their own: of their samples one in seven."""

CASES = [sample for name in sorted(GPU_LIBRARY) for sample in SAMPLES[name][::7 if name in LONG else 1]]


def results(sample, shared=(), aligned=True, schedule="together"):
    """What the kernels give; None where there are none for these operands."""
    (node,) = sample.graph().nodes
    types = tuple([v.type for v in node.inputs])
    try:
        lowered = lower_cuda(node.op, types, node.attrs, shared, aligned)
    except CompileError:
        return None
    inputs = [np.array(x) for x in sample.inputs]
    return run(lowered, inputs, [v.type for v in node.outputs], shared=shared, schedule=schedule, skew=0 if aligned else 1)


@pytest.mark.parametrize(("aligned", "schedule"), [(True, "random"), (False, "reversed")])
@pytest.mark.parametrize("sample", CASES, ids=str)
def test_samples(sample, aligned, schedule):
    found = results(sample, (), aligned, schedule)
    if found is not None:
        with np.errstate(all="ignore"):
            wanted = evaluate(sample.graph(), [np.array(x) for x in sample.inputs])
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, np.asarray(theirs))


@pytest.mark.parametrize("sample", [s for s in CASES if s.op.name in GPU_IN_PLACE], ids=str)
def test_in_place(sample):
    found = results(sample, ((0, 0),))
    if found is not None:
        wanted = evaluate(sample.graph(), [np.array(x) for x in sample.inputs])
        assert_close(found[0], np.asarray(wanted[0]))


@pytest.mark.parametrize("name", sorted(GPU_LIBRARY))
def test_every_op_has_kernels_for_some_sample(name):
    assert any(results(sample) is not None for sample in SAMPLES[name])


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_only_complex_numbers_are_left_to_the_host(name):
    """Scalars of kernels are real. Ops that carry elements about without a look at them take complex ones, too."""
    for sample in SAMPLES[name]:
        graph = sample.graph()
        by_numpy = [entry.name for entry in pipeline.build_for_gpu(graph, "sm_90a").spec.entries if entry.host is not None]
        values = [v for node in graph.nodes for v in (*node.inputs, *node.outputs)]
        assert not by_numpy or (any(v.dtype.is_complex for v in values) and name not in GPU_ANY_TYPE), (sample, by_numpy)
