"""Pooling on a GPU, on the PTX interpreter: shapes larger than the samples', ties, NaN, errors; and the machine code."""

import numpy as np
import pytest
from cuda_launching import run
from ptx import sass

from jitgrad import ops
from jitgrad.codegen import cuda_toolchain as toolchain
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.dtypes import bfloat16, float16, float32, float64, from_numpy
from jitgrad.errors import CompileError
from jitgrad.ir import TensorType
from jitgrad.ops.window import tap_dtype

RESNET = {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))}
WINDOWS = {
    "overlapping": ((1, 3, 13, 17), RESNET),
    "beside each other": ((1, 3, 11, 18), {"kernel": (2, 2), "stride": (2, 2), "padding": ((0, 0), (0, 0))}),
    "large": ((1, 2, 13, 11), {"kernel": (7, 6), "stride": (3, 2), "padding": ((3, 2), (1, 3))}),
    "sequences": ((3, 5, 37), {"kernel": (5,), "stride": (3,), "padding": ((2, 1),)}),
    "volumes": ((1, 1, 7, 5, 9), {"kernel": (3, 2, 3), "stride": (2, 1, 2), "padding": ((1, 1), (0, 1), (1, 0))}),
}


def carry_out(op, arrays, attrs, schedule="together", failure=(0, 0, 0)):
    types = tuple([TensorType(from_numpy(x.dtype), x.shape) for x in arrays])
    return run(lower_cuda(op, types, attrs), arrays, op.result_types(types, attrs), schedule=schedule, failure=failure)


def values(shape, dtype):
    """Few different ones, so that there are ties, some of them NaN."""
    generator = np.random.default_rng(0)
    x = generator.integers(-9, 9, shape).astype(dtype.numpy)
    x[generator.random(shape) < 0.02] = np.nan
    return x


@pytest.mark.parametrize(("name", "dtype", "schedule"), [
    *[(name, float32, "random") for name in WINDOWS], ("overlapping", float64, "reversed"), ("volumes", bfloat16, "random"),
    ("large", float16, "reversed"), ("sequences", bfloat16, "in order")])
def test_maxima_are_those_of_numpy_to_the_bit(name, dtype, schedule):
    shape, window = WINDOWS[name]
    attrs = {**window, "dilation": (2,) * len(window["kernel"]), "ceil_mode": True}
    x = values(shape, dtype)
    found, taps = carry_out(ops.max_pool, [x], attrs, schedule)
    wanted, wanted_taps = ops.max_pool.eager(x, **attrs)
    np.testing.assert_array_equal(found.astype(float), wanted.astype(float))
    np.testing.assert_array_equal(taps, wanted_taps)


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_of_maxima(name):
    """Sums of whole numbers are equal."""
    shape, window = WINDOWS[name]
    for dilation in (1, 2):
        attrs = {**window, "dilation": (dilation,) * len(window["kernel"])}
        best, taps = ops.max_pool.eager(np.nan_to_num(values(shape, float32)), **attrs, ceil_mode=False)
        g = np.random.default_rng(1).integers(-9, 9, best.shape).astype(np.float32)
        wanted = ops.max_pool_grad.eager(g, taps, input_shape=shape, **attrs)
        (found,) = carry_out(ops.max_pool_grad, [g, taps], {"input_shape": shape, **attrs}, "random")
        np.testing.assert_array_equal(found, wanted)
        (again,) = carry_out(ops.max_pool_gather, [wanted, taps], attrs)
        np.testing.assert_array_equal(again, ops.max_pool_gather.eager(wanted, taps, **attrs))


@pytest.mark.parametrize(("name", "counted"), [
    *[(name, (False, 0)) for name in WINDOWS], ("overlapping", (True, 0)), ("large", (True, 5))])
def test_means_and_their_gradients(name, counted):
    shape, window = WINDOWS[name]
    attrs = {**window, "count_include_pad": counted[0], "divisor": counted[1], "ceil_mode": True}
    x = np.nan_to_num(values(shape, float32))
    (found,) = carry_out(ops.avg_pool, [x], attrs, "reversed")
    np.testing.assert_allclose(found, ops.avg_pool.eager(x, **attrs), rtol=1e-6, atol=1e-6)
    (back,) = carry_out(ops.avg_pool_grad, [found], {**attrs, "input_shape": shape}, "random")
    np.testing.assert_allclose(back, ops.avg_pool_grad.eager(found, **attrs, input_shape=shape), rtol=1e-5, atol=1e-6)


def test_indices_of_64_bits(monkeypatch):
    """With a low bound on what is large."""
    monkeypatch.setattr("jitgrad.codegen.cuda_call.WIDE", 100)
    attrs = {**RESNET, "dilation": (1, 1), "ceil_mode": False}
    x = values((2, 3, 9, 7), float32)
    assert lower_cuda(ops.max_pool, (TensorType(float32, x.shape),), attrs).launches[0].wide
    for found, wanted in zip(carry_out(ops.max_pool, [x], attrs), ops.max_pool.eager(x, **attrs), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_windows_of_nothing_but_padding_are_left_to_the_computer():
    with pytest.raises(CompileError, match="max_pool: there is no GPU kernel for it"):
        lower_cuda(ops.max_pool, (TensorType(float32, (2, 3, 0)),),
                   {"kernel": (2,), "stride": (1,), "padding": ((1, 1),), "dilation": (1,), "ceil_mode": False})
    empty = {"kernel": (2,), "stride": (1,), "padding": ((0, 0),), "dilation": (1,), "ceil_mode": False}
    assert lower_cuda(ops.max_pool, (TensorType(float32, (0, 3, 5)),), empty).launches == ()


def test_a_new_shape_gives_the_same_text():
    attrs = {**RESNET, "dilation": (1, 1), "ceil_mode": False}
    texts = {lower_cuda(ops.max_pool, (TensorType(float32, shape),), attrs).launches[0].source
             for shape in ((1, 1, 5, 5), (32, 64, 112, 112))}
    assert len(texts) == 1


def lowered_sources(dtype):
    """By name, what a ResNet's pooling layers become."""
    x, y = TensorType(dtype, (32, 64, 112, 112)), TensorType(dtype, (32, 64, 56, 56))
    taps, dilation, mean = y.with_dtype(tap_dtype((3, 3))), {"dilation": (1, 1)}, {"count_include_pad": False, "divisor": 0}
    calls = {ops.max_pool: ((x,), {**RESNET, **dilation, "ceil_mode": False}),
             ops.max_pool_grad: ((y, taps), {**RESNET, **dilation, "input_shape": x.shape}),
             ops.max_pool_gather: ((x, taps), {**RESNET, **dilation}),
             ops.avg_pool: ((x,), {**RESNET, **mean, "ceil_mode": False}),
             ops.avg_pool_grad: ((y,), {**RESNET, **mean, "ceil_mode": False, "input_shape": x.shape})}
    return {op.name: lower_cuda(op, *call).launches[0].source for op, call in calls.items()}


READS = {"max_pool": 9, "max_pool_grad": 8, "max_pool_gather": 2, "avg_pool": 9, "avg_pool_grad": 4}
"""Of global memory: a window, or the windows that an element may belong to, is read once, without a loop."""


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("architecture", "dtype"), [
    ("sm_80", float32), ("sm_90", bfloat16), ("sm_100", float32)])
def test_machine_code(architecture, dtype):
    for op, source in lowered_sources(dtype).items():
        cubin = toolchain.link([compile_ptx(source, architecture)], architecture)
        sass.assert_no_spills(cubin)
        ((name, used),) = cubin.kernels.items()
        assert used.registers <= 64                                     # four blocks of a multiprocessor
        listing = toolchain.disassemble(cubin)[name]
        sass.assert_no_double(listing)
        codes = sass.opcodes(listing)
        assert sum(count for code, count in codes.items() if code.startswith("LDG")) == READS[op], op
