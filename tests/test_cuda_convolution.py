"""Convolutions on a GPU with what follows them, on the PTX interpreter against float64, and their machine code."""

import re
from functools import cache

import gpu_programs
import numpy as np
import pytest
from canonical import build, inputs_of
from cuda_launching import lower_node, run
from ptx import PtxError, sass
from test_cuda_matmul import TOLERANCE
from test_gpu_execution import assert_same

from jitgrad import ops
from jitgrad.codegen import cuda_implicit, cuda_templates, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.codegen.cuda_product import Products
from jitgrad.dtypes import bfloat16, float16, float32, float64
from jitgrad.errors import ShapeError
from jitgrad.ir import evaluate
from jitgrad.ir.types import TensorType
from jitgrad.nn import functional as F
from jitgrad.ops import convolution_output_shape
from jitgrad.transforms.fuse import fuse

FORWARD, IMAGE, WEIGHTS = ops.convolution, ops.convolution_input_grad, ops.convolution_weight_grad
TF32 = 2 ** -9                                      # of the largest result: factors have 10 bits behind the point
BOTH = ((1, 1), (1, 1))
NONE = ((0, 0), (0, 0))
CASES = {
    "3x3": ((2, 10, 5, 7), (12, 10, 3, 3), (1, 1), BOTH, (1, 1), 1),
    "stride": ((1, 8, 6, 7), (9, 8, 3, 3), (2, 2), BOTH, (1, 1), 1),
    "stride, dilation, groups": ((1, 16, 9, 8), (16, 8, 2, 3), (2, 3), ((1, 2), (0, 2)), (2, 2), 2),
    "downsample": ((2, 8, 6, 5), (8, 8, 1, 1), (2, 2), NONE, (1, 1), 1),
    "planes": ((2, 8, 4, 8), (16, 8, 1, 1), (1, 1), NONE, (1, 1), 1),
    "odd planes": ((2, 9, 3, 5), (8, 9, 1, 1), (1, 1), NONE, (1, 1), 1),
    "two channels": ((2, 2, 5, 7), (12, 2, 3, 3), (1, 2), BOTH, (2, 1), 1),
    "lines": ((2, 8, 9), (8, 8, 3), (1,), ((1, 2),), (2,), 1),
    "volumes": ((1, 8, 3, 4, 4), (8, 8, 2, 1, 3), (1, 2, 1), ((1, 0), (0, 0), (1, 1)), (1, 1, 1), 1),
    "parts": ((2, 8, 7, 9), (8, 8, 1, 1), (1, 1), NONE, (1, 1), 1),
    "taps": ((2, 32, 5, 7), (36, 32, 3, 3), (1, 1), BOTH, (1, 1), 1),
    "taps, stride": ((1, 32, 6, 7), (32, 32, 3, 3), (2, 2), BOTH, (1, 1), 1),
    "taps, dilation, groups": ((1, 44, 9, 8), (48, 22, 2, 3), (2, 3), ((1, 2), (0, 2)), (2, 2), 2),
    "taps of volumes": ((1, 32, 3, 4, 4), (32, 32, 2, 1, 3), (1, 2, 1), ((1, 0), (0, 0), (1, 1)), (1, 1, 1), 1),
    "three channels": ((2, 3, 9, 8), (12, 3, 5, 3), (2, 1), ((2, 1), (1, 1)), (1, 1), 1),
    "a tap, odd planes": ((2, 32, 3, 5), (32, 32, 1, 1), (1, 1), NONE, (1, 1), 1),
    "depthwise": ((2, 5, 6, 7), (10, 1, 3, 3), (2, 1), ((1, 0), (1, 2)), (1, 2), 5),
}


def attributes(op, case):
    """Shapes of the two operands, and the attributes."""
    image, weights, stride, padding, dilation, groups = case
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    made = convolution_output_shape(image, weights, stride, padding, dilation)
    return {FORWARD: ((image, weights), attrs), IMAGE: ((made, weights), {**attrs, "input_shape": image}),
            WEIGHTS: ((image, made), {**attrs, "weight_shape": weights})}[op]


def lower(op, case, dtype, aligned=True, tf32=False):
    shapes, attrs = attributes(op, case)
    return lower_cuda(op, tuple([TensorType(dtype, shape) for shape in shapes]), attrs, (), aligned, Products(tf32))


def product_of(lowered):
    """The launch among others that multiplies."""
    (launch,) = [launch for launch in lowered.launches if launch.name.startswith("convolution")]
    return launch


def turned(lowered):
    """How many operands are turned first."""
    return sum(launch.name.startswith("turn_planes") for launch in lowered.launches)


def check(op, case, dtype, schedule="random", aligned=True, tf32=False):
    """The op on the interpreter, against float64; what it gave."""
    shapes, attrs = attributes(op, case)
    random = np.random.default_rng(0)
    arrays = [random.uniform(-1, 1, shape).astype(dtype.numpy) for shape in shapes]
    types = op.result_types(tuple([TensorType(dtype, shape) for shape in shapes]), attrs)
    (found,) = run(lower(op, case, dtype, aligned, tf32), arrays, types, schedule=schedule, skew=0 if aligned else 1)
    exact = op.eager(*[a.astype(np.float64) for a in arrays], **attrs)
    assert found.dtype == dtype.numpy and found.shape == exact.shape
    limit = (TF32 if tf32 else TOLERANCE[dtype.short]) * max(1, np.abs(exact).max(initial=0))
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=0, atol=limit)
    return found


# ---- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "op", "dtype"), [
    ("3x3", FORWARD, float32), ("stride", IMAGE, float32),
    ("two channels", FORWARD, bfloat16), ("two channels", WEIGHTS, float16), ("stride, dilation, groups", IMAGE, float64),
    ("downsample", IMAGE, float32), ("planes", FORWARD, bfloat16), ("planes", WEIGHTS, bfloat16), ("lines", IMAGE, float32),
    ("volumes", IMAGE, float16),
], ids=lambda v: getattr(v, "short", getattr(v, "name", v)))
def test_products(name, op, dtype):
    lowered = lower(op, CASES[name], dtype)
    assert "direct" not in product_of(lowered).name and not turned(lowered)
    check(op, CASES[name], dtype)


@pytest.mark.parametrize(("name", "op", "dtype"), [
    ("taps", FORWARD, bfloat16), ("taps, stride", WEIGHTS, float32), ("taps, dilation, groups", FORWARD, bfloat16),
    ("taps, dilation, groups", IMAGE, float32), ("taps of volumes", FORWARD, float32), ("three channels", FORWARD, bfloat16),
    ("a tap, odd planes", FORWARD, float32),
], ids=lambda v: getattr(v, "short", getattr(v, "name", v)))
def test_products_over_operands_that_are_turned(name, op, dtype):
    """With channels last there are as many launches more as there are operands that were otherwise; float32 as TF32."""
    tf32 = dtype is float32
    assert 1 <= turned(lower(op, CASES[name], dtype, tf32=tf32)) <= 2
    check(op, CASES[name], dtype, tf32=tf32)


def test_float32_is_rounded_where_that_is_allowed():
    exact, rounded = [product_of(lower(FORWARD, CASES["taps"], float32, tf32=tf32)).source for tf32 in (False, True)]
    assert "tf32" not in exact and "multiply_tf32(" in rounded


@pytest.mark.parametrize("op", [FORWARD, IMAGE, WEIGHTS], ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=lambda d: d.short)
def test_few_channels_are_computed_one_by_one(op, dtype):
    (launch,) = lower(op, CASES["depthwise"], dtype).launches
    assert "direct" in launch.name
    assert check(op, CASES["depthwise"], dtype).tobytes() == check(op, CASES["depthwise"], dtype, "reversed").tobytes()


def test_operands_at_odd_addresses():
    check(FORWARD, CASES["planes"], bfloat16, aligned=False)
    check(FORWARD, CASES["a tap, odd planes"], bfloat16, aligned=False)


@pytest.mark.parametrize("schedule", ["reversed", "interleaved"])
def test_schedules_agree(schedule):
    """The interpreter reports races."""
    case = CASES["3x3"]
    assert check(IMAGE, case, bfloat16, schedule).tobytes() == check(IMAGE, case, bfloat16).tobytes()
    op, case = (IMAGE if schedule == "reversed" else WEIGHTS), CASES["taps, stride"]
    assert check(op, case, bfloat16, schedule).tobytes() == check(op, case, bfloat16).tobytes()


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=lambda d: d.short)
def test_parts_of_the_pixels_are_added_up_in_order(dtype, monkeypatch):
    monkeypatch.setattr(cuda_implicit, "SLICES", 1)
    *_, first, second = lower(WEIGHTS, CASES["parts"], dtype).launches
    assert first.grid > 1 and first.name.startswith("convolution_weight_grad") and "sum" in second.name
    assert check(WEIGHTS, CASES["parts"], dtype).tobytes() == check(WEIGHTS, CASES["parts"], dtype, "reversed").tobytes()


def test_large_tiles(monkeypatch):
    monkeypatch.setattr(cuda_implicit, "ENOUGH", 1)
    case = ((1, 8, 6, 24), (100, 8, 1, 3), (1, 1), NONE, (1, 1), 1)
    assert product_of(lower(FORWARD, case, bfloat16)).threads == 256
    check(FORWARD, case, bfloat16)


def test_flat_tiles(monkeypatch):
    """64 rows and 128 columns."""
    monkeypatch.setattr(cuda_implicit, "ENOUGH", 1)
    case = ((2, 16, 9, 13), (40, 16, 2, 2), (1, 1), NONE, (1, 1), 1)
    for op, dtype in ((FORWARD, bfloat16), (WEIGHTS, float32)):
        launch = product_of(lower(op, case, dtype, tf32=True))
        assert (launch.threads, launch.grid) == (128, 2 if op is FORWARD else 1)
        check(op, case, dtype, tf32=dtype is float32)


def test_indices_of_64_bits(monkeypatch):
    """With a low bound on what is large, since nothing here can hold two thousand million elements."""
    monkeypatch.setattr(cuda_templates, "WIDE", 100)
    for op, name, dtype in ((FORWARD, "stride", float32), (WEIGHTS, "depthwise", float32),
                            (WEIGHTS, "taps, stride", bfloat16)):
        assert lower(op, CASES[name], dtype).launches[0].wide
        check(op, CASES[name], dtype)


@pytest.mark.parametrize(("op", "image", "weights"), [
    (FORWARD, (2, 0, 3, 3), (8, 0, 3, 3)), (WEIGHTS, (0, 3, 4, 4), (8, 3, 3, 3))],
    ids=lambda v: getattr(v, "name", None))
def test_sums_of_nothing_are_zeros(op, image, weights):
    assert not check(op, (image, weights, (1, 1), NONE, (1, 1), 1), bfloat16).any()


def test_an_empty_result_is_no_launch():
    assert lower(FORWARD, ((0, 8, 4, 4), (8, 8, 3, 3), (1, 1), NONE, (1, 1), 1), float32).launches == ()


# ---- what follows ------------------------------------------------------------------------------------------------------


def normalized(op, case):
    """Scale and shift of channels, an activation, and a residual behind it: as in a network that is being used."""
    shapes, attrs = attributes(op, case)
    made = (case[0] if op is IMAGE else convolution_output_shape(*case[:5]))

    def along_channels(v):
        return ops.broadcast_to(ops.reshape(v, shape=(1, made[1], *(1,) * (len(made) - 2))), shape=made)

    def program(x, w, scale, shift, residual):
        y = ops.add(ops.mul(op(x, w, **attrs), along_channels(scale)), along_channels(shift))
        return ops.relu(ops.add(y, residual))

    return [*shapes, made[1:2], made[1:2], made], program


@pytest.mark.parametrize(("op", "name", "dtype"), [
    (FORWARD, "3x3", bfloat16), (IMAGE, "stride", float32), (FORWARD, "depthwise", float16)],
    ids=lambda v: getattr(v, "short", getattr(v, "name", v)))
def test_what_follows_is_part_of_the_kernel(op, name, dtype):
    shapes, program = normalized(op, CASES[name])
    graph, wide = build(shapes, program, dtype), build(shapes, program, float64)
    (node,) = fuse(graph, narrow=True).nodes
    assert node.attrs["template"] == "convolution"
    lowered, arrays = lower_node(node), inputs_of(graph)
    assert len(lowered.launches) == 1 + turned(lowered)
    values = dict(zip(graph.inputs, arrays, strict=True))
    (found,) = run(lowered, [values[v] for v in node.inputs], [node.output.type], schedule="random")
    (exact,) = evaluate(wide, [np.asarray(a, np.float64) for a in arrays])
    limit = 4 * TOLERANCE[dtype.short] * np.abs(exact).max()
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=0, atol=limit)


def test_convolutions_of_16_bit_floats_stay_alone_on_the_cpu():
    shapes, program = normalized(FORWARD, CASES["3x3"])
    assert "convolution" in [node.op.name for node in fuse(build(shapes, program, bfloat16)).nodes]


def test_a_result_over_an_operand_of_what_follows():
    case = CASES["3x3"]
    shapes, attrs = attributes(FORWARD, case)
    made = convolution_output_shape(*case[:5])
    graph = build([*shapes, made], lambda x, w, r: ops.add(ops.convolution(x, w, **attrs), r))
    (node,) = fuse(graph).nodes
    values = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    arrays, place = [values[v] for v in node.inputs], node.inputs.index(graph.inputs[2])
    (apart,) = run(lower_node(node), arrays, [node.output.type])
    (together,) = run(lower_node(node, ((0, place),)), arrays, [node.output.type], shared=((0, place),), schedule="random")
    assert apart.tobytes() == together.tobytes()


# ---- text and machine code ---------------------------------------------------------------------------------------------


def source_of(op, case, dtype):
    return re.sub(r" *#.*", "", product_of(lower(op, case, dtype)).source)


@pytest.mark.parametrize("op", [FORWARD, IMAGE, WEIGHTS], ids=lambda op: op.name)
def test_a_new_shape_gives_the_same_text(op):
    one = ((2, 8, 6, 7), (9, 8, 3, 3), (2, 2), BOTH, (1, 1), 1)
    other = ((3, 24, 11, 6), (20, 24, 3, 5), (3, 2), ((2, 0), (1, 4)), (2, 1), 1)
    assert source_of(op, one, float32) == source_of(op, other, float32)


@pytest.mark.parametrize("number", [0])
def test_no_barrier_can_be_spared(number):
    """Each of them left out is a race, or memory that was never written, and found."""
    case = CASES["planes"]
    lowered = lower(IMAGE, case, bfloat16)
    (launch,) = lowered.launches
    places = [m.start() for m in re.finditer(r"\bbarrier\(\)", launch.source)]
    assert len(places) == 4
    broken = launch.source[:places[number]] + "pass" + launch.source[places[number] + len("barrier()"):]
    object.__setattr__(launch, "source", broken)
    shapes, attrs = attributes(IMAGE, case)
    types = IMAGE.result_types(tuple([TensorType(bfloat16, shape) for shape in shapes]), attrs)
    with pytest.raises(PtxError):
        run(lowered, [np.ones(shape, bfloat16.numpy) for shape in shapes], types, schedule="random")


LOOP = {FORWARD: 136, IMAGE: 136, WEIGHTS: 160}
"""Instructions of the loop that has 32 products on tensor cores, at most: some 12 read factors and 32 multiply; single
elements that were gathered took 540 to 920 in all."""


@cache
def large(op, dtype):
    return source_of(op, ((32, 256, 28, 28), (256, 256, 3, 3), (1, 1), BOTH, (1, 1), 1), dtype)


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("architecture", "op", "dtype"), [
    ("sm_80", FORWARD, bfloat16), ("sm_90", IMAGE, bfloat16), ("sm_90", WEIGHTS, bfloat16), ("sm_100", WEIGHTS, float32)],
    ids=lambda v: getattr(v, "short", getattr(v, "name", v)))
def test_machine_code(architecture, op, dtype):
    """Nothing is spilled; what lies in order is read 16 bytes at a time, and results are written so."""
    cubin = toolchain.link([compile_ptx(large(op, dtype), architecture)], architecture)
    sass.assert_no_spills(cubin)
    ((name, used),) = cubin.kernels.items()
    assert used.registers * 256 <= 65_536
    labelled = toolchain.disassemble(cubin, labels=True)[name]
    listing = [line for line in labelled if not line.endswith(":")]
    sass.assert_no_double(listing)
    codes = sass.opcodes(listing)
    assert {code for code in codes if code.startswith("STG")} == {"STG.E.128"}
    if dtype is float32:
        assert codes["FFMA"] >= 64 and any("LDG.E.128" in code for code in codes)
        return
    sass.assert_tensor_cores(listing)
    assert not any(code.startswith("LDG.") for code in codes)
    loop = sass.opcodes(sass.innermost_loop(labelled, "HMMA"))
    assert loop["HMMA.16816.F32.BF16"] == 32 and loop.total() <= LOOP[op]
    assert sum(count for code, count in loop.items() if code.startswith("LDGSTS") and "128" in code) == 4
    assert not any(code.startswith("STS") for code in loop)


# ---- networks on a stand-in --------------------------------------------------------------------------------------------


def test_a_residual_block_runs_no_convolution_on_the_host(executing):
    """A basic block of ResNet that halves its image, forward and backward, compiled."""
    ours, step = gpu_programs.residual_block("cuda", compiled=True)
    theirs, _ = gpu_programs.residual_block("cpu")
    assert_same(ours, theirs, 5e-4)
    names = [entry.name for entry in step.plan.plan.host_entries]
    assert not [name for name in names if "convolution" in name], names
    assert sum(count for name, count in executing.launches.items() if name.startswith("convolution")) >= 9
    assert "convolution" not in str(step.explain(times=False)).partition("by way of the host")[2].partition("\n")[0]


def test_bad_shapes_are_errors_that_say_why(executing):
    x, w = gpu_programs.tensor("cuda", 1, 8, 4, 4), gpu_programs.tensor("cuda", 8, 8, 5, 5)
    with pytest.raises(ShapeError, match="the kernel is larger than the padded input"):
        F.conv2d(x, w)
    with pytest.raises(ShapeError, match=r"channels do not fit 3 group\(s\)"):
        F.conv2d(x, w, padding=2, groups=3)
