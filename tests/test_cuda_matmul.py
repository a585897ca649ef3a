"""Matrix products on a GPU with what follows them, on the PTX interpreter against float64, and their machine code."""

import re
from functools import cache

import numpy as np
import pytest
from canonical import along_columns, build, gelu, inputs_of
from cuda_launching import carry_out, lower_node, run
from ptx import PtxError, sass

from jitgrad import ops
from jitgrad.codegen import cuda_matmul, cuda_templates, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.dtypes import bfloat16, complex64, float16, float32, float64
from jitgrad.errors import CompileError
from jitgrad.ir import evaluate
from jitgrad.ir.graph import Node
from jitgrad.ops.region import region
from jitgrad.transforms.columns import fuse_column_sums
from jitgrad.transforms.fuse import fuse

TOLERANCE = {"f64": 1e-13, "f32": 2e-6, "bf16": 2 ** -8, "f16": 2 ** -11}
"""Of the largest result: rounding of the result, and of sums in its type or in float32."""


def exact(graph, arrays):
    """The results in float64, from operands as they are in their own types."""
    wide = [np.asarray(a, np.float64) for a in arrays]
    again = build([a.shape for a in arrays], lambda *xs: replay(graph, xs), float64)
    return evaluate(again, wide)


def replay(graph, xs):
    environment = dict(zip(graph.inputs, xs, strict=True))
    for node in graph.nodes:
        attrs = {**node.attrs, "dtype": float64} if "dtype" in node.attrs else node.attrs
        environment[node.output] = node.op(*[environment[v] for v in node.inputs], **attrs)
    return [environment[v] for v in graph.results]


def check(graph, aligned=True, schedule="together", tolerance=None):
    """The fused graph on the interpreter; errors are measured by the largest result, and by what roundings of the operands
    of later operations add, at most `tolerance`."""
    arrays = inputs_of(graph)
    found = carry_out(fuse(graph), arrays, aligned, schedule)
    for x, y, value in zip(found, exact(graph, arrays), graph.results, strict=True):
        assert x.dtype == value.dtype.numpy and x.shape == y.shape
        limit = tolerance or TOLERANCE[value.dtype.short]
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=limit * max(1, np.abs(y).max()))


def turned(x, *axes):
    return ops.permute(x, axes=axes)


def cut(x):
    """All but the first column of a matrix: rows begin at odd places."""
    return ops.slice(x, start=(0, 1), stop=x.shape, step=(1, 1))


LAYOUTS = {
    "rows": lambda m, k, n: ([(m, k), (k, n)], lambda x, y: ops.matmul(x, y)),
    "columns": lambda m, k, n: ([(k, m), (n, k)], lambda x, y: ops.matmul(turned(x, 1, 0), turned(y, 1, 0))),
    "odd places": lambda m, k, n: ([(m, k + 1), (n, k + 1)], lambda x, y: ops.matmul(cut(x), turned(cut(y), 1, 0))),
    "odd columns": lambda m, k, n: ([(k, m + 1), (k, n + 1)], lambda x, y: ops.matmul(turned(cut(x), 1, 0), cut(y))),
}


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=lambda d: d.short)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    """Sizes that are multiples of an access and of nothing else; a result of several tiles."""
    shapes, function = LAYOUTS[layout](72, 40, 72)
    check(build(shapes, function, dtype))


@pytest.mark.parametrize(("layout", "dtype"), [("rows", float16), ("columns", float64)])
def test_other_floats(layout, dtype):
    shapes, function = LAYOUTS[layout](40, 24, 72)
    check(build(shapes, function, dtype))


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=lambda d: d.short)
@pytest.mark.parametrize(("m", "k", "n"), [(65, 33, 67), (1, 7, 1), (5, 100, 2)], ids=str)
def test_ragged_sizes(m, k, n, dtype):
    check(build([(m, k), (k, n)], ops.matmul, dtype))


@pytest.mark.parametrize(("schedule", "dtype"), [
    ("in order", bfloat16), ("random", bfloat16), ("reversed", bfloat16), ("interleaved", bfloat16), ("random", float32),
    ("reversed", float32)])
def test_schedules_agree(schedule, dtype):
    """More slices than there are buffers for them; the interpreter reports races."""
    check(build([(40, 136), (136, 72)], ops.matmul, dtype), schedule=schedule)


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=lambda d: d.short)
def test_large_tiles(dtype, monkeypatch):
    monkeypatch.setattr(cuda_matmul, "ENOUGH", 1)
    check(build([(136, 72), (72, 144)], ops.matmul, dtype), schedule="random")


def test_indices_of_64_bits(monkeypatch):
    """With a low bound on what is large, since nothing here can hold two thousand million elements."""
    monkeypatch.setattr(cuda_templates, "WIDE", 100)
    graph = build([(40, 24), (24, 72)], ops.matmul, bfloat16)
    assert lower_node(graph.nodes[0]).launches[0].wide
    check(graph)


def test_sums_of_nothing_are_zeros():
    (x,) = carry_out(build([(5, 0), (0, 7)], ops.matmul), [np.ones((5, 0), np.float32), np.ones((0, 7), np.float32)])
    assert x.shape == (5, 7) and not x.any()


def test_an_empty_result_is_no_launch():
    (node,) = build([(0, 5), (5, 7)], ops.matmul).nodes
    assert lower_node(node).launches == ()


# ---- batches -------------------------------------------------------------------------------------------------------


def heads(x, count):
    b, s, d = x.shape
    return turned(ops.reshape(x, shape=(b, s, count, d // count)), 0, 2, 1, 3)


BATCHES = {
    "plain": build([(3, 20, 24), (3, 24, 40)], ops.matmul),
    "one factor for all": build([(3, 20, 24), (24, 40)], lambda x, y: ops.matmul(
        x, ops.broadcast_to(ops.reshape(y, shape=(1, 24, 40)), shape=(3, 24, 40)))),
    "attention": build([(2, 20, 48), (2, 20, 48)], lambda q, k: ops.matmul(heads(q, 3), turned(heads(k, 3), 0, 1, 3, 2))),
    "many dimensions": build([(2, 2, 2, 2, 8, 9), (2, 2, 2, 2, 9, 8)], lambda x, y: ops.matmul(
        turned(x, 3, 1, 0, 2, 4, 5), y)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    check(BATCHES[name])


# ---- what follows --------------------------------------------------------------------------------------------------


def biased(x, w, b):
    y = ops.matmul(x, w)
    return ops.add(y, along_columns(b, y.shape))


FOLLOWED = {
    "bias and gelu": ([(40, 24), (24, 72), (72,)], lambda x, w, b: gelu(biased(x, w, b))),
    "residual": ([(40, 72), (72, 72), (72,)], lambda x, w, b: ops.add(biased(x, w, b), x)),
    "one column": ([(40, 24), (24, 1), (1,)], lambda x, w, b: ops.relu(biased(x, w, b))),
}


def product_of(graph):
    """The region around the product of a graph, once it is fused."""
    (node,) = [node for node in fuse(graph).nodes if node.attrs.get("template") == "matmul"]
    return node


@pytest.mark.parametrize(("name", "dtype"), [
    ("bias and gelu", float32), ("bias and gelu", bfloat16), ("residual", bfloat16), ("one column", float32)])
def test_what_follows_is_part_of_the_kernel(name, dtype):
    graph = build(*FOLLOWED[name], dtype)
    assert len(lower_node(product_of(graph)).launches) == 1
    check(graph, schedule="random", tolerance=None if dtype is float32 else 2 ** -7)


def both(x, w):
    y = ops.matmul(x, w)
    return [y, ops.relu(y)]


MOVED = {
    "several results": (1, [(40, 24), (24, 36)], both),
    "split into heads": (1, [(2, 20, 24), (24, 48)], lambda x, w: heads(ops.tanh(ops.matmul(x, ops.broadcast_to(
        ops.reshape(w, shape=(1, 24, 48)), shape=(2, 24, 48)))), 3)),
    "transposed result": (1, [(40, 24), (24, 36)], lambda x, w: turned(ops.relu(ops.matmul(x, w)), 1, 0)),
    "a factor that is no stride": (2, [(40, 24), (4, 6, 72)], lambda x, w: ops.matmul(
        x, ops.reshape(turned(w, 1, 0, 2), shape=(24, 72)))),
}


@pytest.mark.parametrize("name", MOVED)
def test_movement_around_a_product(name):
    """A whole graph as the body of one region; a factor that strides cannot say is computed by a kernel of its own."""
    count, *made = MOVED[name]
    graph = build(*made)
    arrays = inputs_of(graph)
    lowered = lower_cuda(region, tuple([v.type for v in graph.inputs]), {"body": graph, "template": "matmul"})
    assert len(lowered.launches) == count
    for x, y in zip(run(lowered, arrays, [v.type for v in graph.outputs]), exact(graph, arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE["f32"] * np.abs(y).max())


def test_sums_over_rows():
    """The gradient of a bias, from the kernel that makes the gradient of what it was added to."""
    def program(x, w, y):
        g = ops.mul(ops.matmul(x, w), y)
        return [g, ops.sum(g, axes=(0,))]

    graph = build([(70, 24), (24, 36), (70, 36)], program)
    (node,) = fuse_column_sums(fuse(graph)).nodes
    arrays = inputs_of(graph)
    found = run(lower_node(node), arrays, [v.type for v in node.outputs])
    for x, y in zip(found, exact(graph, arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE["f32"] * np.abs(y).max())


def test_an_update_in_place():
    """p -= rate * (x.T @ g), written over p, through the template that fusion chooses for it."""
    graph = build([(40, 24), (40, 72), (24, 72)], lambda x, g, p: ops.sub(
        p, ops.mul(ops.matmul(turned(x, 1, 0), g), ops.full((24, 72), 0.1, float32))))
    node = product_of(graph)
    node = Node(node.op, node.inputs, {**node.attrs, "template": "update"}, node.outputs, node.where)
    place = next(k for k, v in enumerate(node.inputs) if v.shape == (24, 72))
    values = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    arrays = [values.get(v, np.float32(0.1)) for v in node.inputs]
    (apart,) = run(lower_node(node), arrays, [node.output.type])
    (together,) = run(lower_node(node, ((0, place),)), arrays, [node.output.type], shared=((0, place),), schedule="random")
    assert apart.tobytes() == together.tobytes()
    np.testing.assert_allclose(apart, exact(graph, inputs_of(graph))[0], rtol=1e-5, atol=1e-5)


def test_complex_numbers_have_no_kernel():
    with pytest.raises(CompileError, match=r"there is no GPU kernel for a product of complex64.*keep this part on the CPU"):
        lower_node(build([(4, 5), (5, 6)], ops.matmul, complex64).nodes[0])


# ---- text ----------------------------------------------------------------------------------------------------------


def source_of(shapes, dtype, function=ops.matmul):
    (node,) = fuse(build(shapes, function, dtype)).nodes
    (launch,) = lower_node(node).launches
    return re.sub(r" *#.*", "", launch.source)


def test_a_new_shape_gives_the_same_text():
    for dtype in (float32, bfloat16):
        assert source_of([(40, 24), (24, 72)], dtype) == source_of([(64, 1000), (1000, 160)], dtype)


@pytest.mark.parametrize(("dtype", "number"), [
    (float32, 1), (bfloat16, 0), (bfloat16, 1), (bfloat16, 2), (bfloat16, 3)])
def test_no_barrier_can_be_spared(dtype, number):
    """Each of them left out is a race, or memory that was never written, and found."""
    (node,) = build([(40, 136), (136, 72)], ops.matmul, dtype).nodes
    lowered = lower_node(node)
    (launch,) = lowered.launches
    places = [m.start() for m in re.finditer(r"\bbarrier\(\)", launch.source)]
    assert len(places) == 4
    broken = launch.source[:places[number]] + "pass" + launch.source[places[number] + len("barrier()"):]
    object.__setattr__(launch, "source", broken)
    arrays = inputs_of(build([(40, 136), (136, 72)], ops.matmul, dtype))
    with pytest.raises(PtxError):
        run(lowered, arrays, [node.output.type], schedule="random")


# ---- machine code --------------------------------------------------------------------------------------------------


@cache
def large_source(dtype, turned_a):
    shapes = [(4096, 4096)] * 2 + [(4096,)]
    return source_of(shapes, dtype, lambda x, w, b: ops.relu(biased(turned(x, 1, 0) if turned_a else x, w, b)))


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("architecture", "turned_a"), [
    ("sm_80", False), ("sm_90", False), ("sm_90", True), ("sm_100", False)])
def test_machine_code(architecture, turned_a):
    """Nothing is spilled; operands are read and results written 16 bytes at a time; 16-bit floats use tensor cores, with
    copies that need no registers; float32 is computed in float32."""
    for dtype in (float32, bfloat16):
        cubin = toolchain.link([compile_ptx(large_source(dtype, turned_a), architecture)], architecture)
        sass.assert_no_spills(cubin)
        ((name, used),) = cubin.kernels.items()
        assert used.registers * 256 <= 65_536
        listing = toolchain.disassemble(cubin)[name]
        sass.assert_no_double(listing)
        codes = sass.opcodes(listing)
        assert {code for code in codes if code.startswith("STG")} == {"STG.E.128"}
        assert {code for code in codes if code.startswith("LDG.")} <= {"LDG.E.128.CONSTANT", "LDG.E.128"}
        if dtype is float32:
            assert codes["FFMA"] >= 64 and not any(code.startswith("HMMA") for code in codes)
        else:
            sass.assert_tensor_cores(listing)
            assert codes["HMMA.16816.F32.BF16"] == 32
            assert any(code.startswith("LDGSTS") and "128" in code for code in codes)
