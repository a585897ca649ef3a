"""Large products of 16-bit floats by warpgroups (sm_90a), their slices fetched by the copy engine or copied by threads: on
the PTX interpreter against float64, what is found when a fence or a wait is missing, machine code, and launches."""

import re
from dataclasses import replace

import numpy as np
import pytest
from canonical import build, gelu, inputs_of
from cuda_launching import argument_of, carry_out, lower_node, run
from ptx import PtxError, parse, sass
from ptx.machine import launch as launch_module
from ptx.memory import Memory
from test_cuda_matmul import FOLLOWED, LAYOUTS, TOLERANCE, exact, product_of, turned

import jitgrad as jg
from jitgrad import ops
from jitgrad.codegen import cuda_boxes, cuda_matmul, cuda_templates, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_boxes import map_of
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.codegen.kernel import BoxMap, Buffer
from jitgrad.dtypes import bfloat16, float16
from jitgrad.errors import DeviceError
from jitgrad.gpu_plans import compile_for
from jitgrad.kernels.cpu.gemm import Matrices
from jitgrad.runtime.cuda import code, driver, module
from jitgrad.runtime.spec import Boxes, PlanSpec
from jitgrad.transforms.fuse import fuse

ARCH = "sm_90a"


@pytest.fixture
def always(monkeypatch):
    """Large tiles for every size."""
    monkeypatch.setattr(cuda_matmul, "ENOUGH", 1)


@pytest.fixture
def copying(always, monkeypatch):
    """The same, and threads copy."""
    monkeypatch.setattr(cuda_boxes, "map_of", lambda *_: None)


def check(graph, schedule="together", tolerance=None):
    arrays = inputs_of(graph)
    found = carry_out(fuse(graph), arrays, True, schedule, ARCH)
    for x, y, value in zip(found, exact(graph, arrays), graph.results, strict=True):
        assert x.dtype == value.dtype.numpy and x.shape == y.shape
        limit = tolerance or TOLERANCE[value.dtype.short]
        np.testing.assert_allclose(x.astype(np.float64), y, rtol=0, atol=limit * max(1, np.abs(y).max()))


def launch_of(graph, arch=ARCH, aligned=True):
    (launch,) = lower_node(product_of(graph) if len(graph.nodes) > 1 else graph.nodes[0], (), aligned, arch).launches
    return launch


def uses_warpgroups(launch):
    assert ("multiply_slices_" in launch.source) == (launch.dynamic > 0)
    return launch.dynamic > 0


def uses_engine(launch):
    assert ("fetch_box" in launch.source) != ("copy_async" in launch.source)
    return "fetch_box" in launch.source


EVERY = {
    "rows": LAYOUTS["rows"],
    "columns": LAYOUTS["columns"],
    "along the depth": lambda m, k, n: ([(m, k), (n, k)], lambda x, y: ops.matmul(x, turned(y, 1, 0))),
    "across the depth": lambda m, k, n: ([(k, m), (k, n)], lambda x, y: ops.matmul(turned(x, 1, 0), y)),
}


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "m", "k", "n", "schedule"), [
    ("rows", 77, 136, 264, "together"), ("columns", 136, 72, 144, "reversed"), ("along the depth", 35, 200, 131, "together"),
    ("across the depth", 72, 77, 232, "random")])
def test_layouts(always, layout, m, k, n, schedule):
    """Sizes that are multiples of 16 bytes where memory runs along, and else of nothing; one column tile and several, of
    128 and of 256 columns."""
    graph = build(*EVERY[layout](m, k, n), bfloat16)
    assert uses_warpgroups(launch_of(graph)) and uses_engine(launch_of(graph))
    check(graph, schedule)


@pytest.mark.parametrize(("layout", "m", "k", "n", "schedule"), [
    ("rows", 72, 72, 232, "random"), ("columns", 136, 72, 120, "together"), ("along the depth", 77, 136, 131, "reversed"),
    ("across the depth", 72, 77, 264, "together")])
def test_layouts_that_threads_copy(copying, layout, m, k, n, schedule):
    graph = build(*EVERY[layout](m, k, n), bfloat16)
    assert uses_warpgroups(launch_of(graph)) and not uses_engine(launch_of(graph))
    check(graph, schedule)


def test_columns_of_a_tile(always):
    assert [cuda_matmul.columns_of(n, 1) for n in (100, 128, 224, 256, 300, 384, 512, 1000, 4096)] == [
        128, 128, 256, 256, 128, 128, 256, 256, 256]


@pytest.mark.parametrize("schedule", ["in order", "interleaved"])
def test_schedules_agree(always, schedule):
    """More slices than there are stages."""
    check(build([(72, 328), (328, 120)], ops.matmul, bfloat16), schedule)


@pytest.mark.parametrize("schedule", ["in order", "random"])
def test_schedules_agree_where_threads_copy(copying, schedule):
    check(build([(40, 328), (328, 120)], ops.matmul, bfloat16), schedule)


def test_half_precision_and_little_depth(always):
    check(build([(40, 8), (8, 136)], ops.matmul, float16))
    check(build([(1, 72), (72, 136)], ops.matmul, float16))


def test_sums_of_nothing_are_zeros(always):
    graph = build([(8, 0), (0, 8)], ops.matmul, bfloat16)
    assert uses_warpgroups(launch_of(graph))
    (x,) = carry_out(graph, inputs_of(graph), arch=ARCH)
    assert x.shape == (8, 8) and not x.any()


@pytest.mark.parametrize("name", ["bias and gelu", "residual"])
def test_what_follows_is_part_of_the_kernel(always, name):
    graph = build(*FOLLOWED[name], bfloat16)
    assert uses_warpgroups(launch_of(graph))
    check(graph, "random", 2 ** -7)


def test_batches(always):
    shapes = [(3, 24, 40), (24, 40)]
    graph = build(shapes, lambda x, y: ops.matmul(turned(x, 0, 2, 1), ops.broadcast_to(
        ops.reshape(y, shape=(1, 24, 40)), shape=(3, 24, 40))), bfloat16)
    assert not uses_engine(launch_of(graph))
    check(graph)


def test_rows_of_a_batch_are_rows(always):
    """One matrix for all of a batch of rows is a plain product; the copy engine can fetch both."""
    graph = build([(2, 40, 72), (72, 136)], lambda x, w: ops.matmul(x, ops.broadcast_to(ops.reshape(
        w, shape=(1, 72, 136)), shape=(2, 72, 136))), bfloat16)
    assert uses_engine(launch_of(graph))
    check(graph)


def test_what_the_copy_engine_can_fetch():
    rows = Matrices((), 72, 1, 16)
    assert map_of(Buffer(3), rows, (40, 64), True, 128) == BoxMap(Buffer(3), 32, (64, 40), 144, (64, 128))
    assert map_of(Buffer(3), Matrices((), 1, 72, 0), (40, 64), False, 128) == BoxMap(Buffer(3), 0, (40, 64), 144, (64, 64))
    assert map_of(Buffer(3), Matrices((), 0, 1, 0), (1, 63), True, 256) == BoxMap(Buffer(3), 0, (63, 1), 128, (64, 256))
    assert map_of(Buffer(3), Matrices((800,), 72, 1, 0), (40, 64), True, 128) is None
    assert map_of(Buffer(3), Matrices((), 0, 1, 0), (40, 64), True, 128) is None
    assert map_of(Buffer(3), rows, (40, 0), True, 128) is None


# ---- which kernel ----------------------------------------------------------------------------------------------------


def test_other_architectures_small_products_and_odd_strides_have_the_kernel_of_warps(monkeypatch):
    large = build([(2048, 1024), (1024, 2048)], ops.matmul, bfloat16)
    assert uses_warpgroups(launch_of(large)) and launch_of(large).grid == 128
    assert not any(uses_warpgroups(launch_of(large, arch)) for arch in ("sm_80", "sm_90", "sm_100a"))
    assert not uses_warpgroups(launch_of(large, aligned=False))
    odd = build([(2048, 1025), (1025, 2048)], ops.matmul, bfloat16)
    assert not uses_warpgroups(launch_of(odd))
    assert not uses_warpgroups(launch_of(build([(512, 512)] * 2, ops.matmul, bfloat16)))
    assert not uses_warpgroups(launch_of(build([(2048, 1024), (1024, 2048)], ops.matmul)))
    monkeypatch.setattr(cuda_templates, "WIDE", 100)
    assert not uses_warpgroups(launch_of(large))


def test_a_new_shape_gives_the_same_text(always):
    first, second = (launch_of(build([(m, k), (k, n)], ops.matmul, bfloat16)) for m, k, n in (
        (2048, 512, 2048), (136, 1000, 4096)))
    assert re.sub(" *#.*", "", first.source) == re.sub(" *#.*", "", second.source) and first.dynamic == second.dynamic


# ---- what is found ---------------------------------------------------------------------------------------------------


SHAPES = [(40, 328), (328, 72)]


def broken(change, text="source", schedule="random"):
    """A product after `change` of the kernel's text, or of its PTX."""
    (node,) = build(SHAPES, ops.matmul, bfloat16).nodes
    lowered = lower_node(node, (), True, ARCH)
    (launch,) = lowered.launches
    arrays = inputs_of(build(SHAPES, ops.matmul, bfloat16))
    if text == "source":
        changed = change(launch.source)
        assert changed != launch.source
        return run(replace(lowered, launches=(replace(launch, source=changed),)), arrays, [node.output.type],
                   schedule=schedule, arch=ARCH)
    ptx = compile_ptx(launch.source, ARCH)
    assert change(ptx) != ptx
    memory = Memory()
    buffers = [memory.add(x, f"input {k}") for k, x in enumerate(arrays)]
    buffers.append(memory.add(np.empty(node.output.shape, node.output.dtype.numpy), "output", garbage=True))
    launch_module(parse(change(ptx)), launch.name, memory, (launch.grid, 1, 1), (launch.threads, 1, 1),
                  [argument_of(a, buffers, None, memory) for a in launch.arguments], dynamic=launch.dynamic,
                  schedule=schedule, seed=0, wave=16384)
    return buffers[-1].array()


def without(word, number=0):
    def change(text):
        place = [m.start() for m in re.finditer(re.escape(word), text)][number]
        return text[:place] + "pass" + text[place + len(word):]

    return change


@pytest.mark.parametrize(("change", "error"), [
    (without("show_to_products()"), "written without a fence.proxy.async since"),
    (without("copy_wait(1)"), "never written or still being copied"),
    (without("barrier()", 0), "still being copied|fence.proxy.async|no barrier in between"),
    (without("barrier()", 1), "no barrier in between|overwritten while a product read it|fence.proxy.async"),
    (without("barrier()", 2), "no barrier in between|never written"),
    (without("products_wait(1)"), "still being copied|overwritten while a product read it"),
    (lambda text: text.replace("finished_sums(sums)", "sums"), "to which a product still adds")])
def test_what_a_kernel_that_copies_forgets_is_found(copying, change, error):
    with pytest.raises(PtxError, match=error):
        broken(change)


@pytest.mark.parametrize(("change", "error"), [
    (without("show_to_products()"), "initialized without a fence.proxy.async since"),
    (without("barrier()", 0), "nobody has initialized|no barrier in between"),
    (without("barrier()", 1), "no barrier in between|still being copied|overwritten while a product|never come"),
    (without("barrier()", 2), "no barrier in between|overwritten while a product read it|fence.proxy.async"),
    (without("barrier()", 3), "no barrier in between|never written"),
    (lambda text: re.sub(r"arrival_wait\(.*\)", "pass", text), "never written or still being copied"),
    (lambda text: re.sub(r"arrival_expect\(.*\)", "pass", text), "waits for bytes that never come"),
    (without("products_wait(1)"), "still being copied|overwritten while a product read it"),
    (lambda text: text.replace("finished_sums(sums)", "sums"), "to which a product still adds")])
def test_what_a_kernel_with_the_copy_engine_forgets_is_found(always, change, error):
    with pytest.raises(PtxError, match=error):
        broken(change, schedule="reversed")


def test_a_missing_fence_of_sums_is_found(always):
    with pytest.raises(PtxError, match=r"written since the last wgmma\.fence"):
        broken(lambda text: text.replace("wgmma.fence.sync.aligned;", ""), "ptx")


def test_too_little_shared_memory_is_found(always):
    graph = build(SHAPES, ops.matmul, bfloat16)
    lowered = lower_node(graph.nodes[0], (), True, ARCH)
    less = replace(lowered, launches=(replace(lowered.launches[0], dynamic=65536),))
    with pytest.raises(PtxError, match=r"writes \d+ bytes of shared memory \(65536 bytes\) at byte"):
        run(less, inputs_of(graph), [graph.nodes[0].output.type], arch=ARCH)


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize(("layout", "columns", "engine"), [
    *[(layout, 4096, True) for layout in EVERY], ("rows", 640, True), ("rows", 4096, False), ("columns", 4096, False)])
def test_machine_code(layout, columns, engine, monkeypatch):
    """All products of a slice are under way at once, which the assembler gives up where it sees a call: the quotient in
    gelu would be one. Nothing is spilled; accesses are 16 bytes wide."""
    if not engine:
        monkeypatch.setattr(cuda_boxes, "map_of", lambda *_: None)
    shapes, product = EVERY[layout](4096, 1024, columns)
    graph = build([*shapes, (columns,)], lambda x, w, b: gelu(ops.add(product(x, w), along(b, (4096, columns)))), bfloat16)
    launch = launch_of(graph)
    cubin = toolchain.link([compile_ptx(launch.source, ARCH)], ARCH)
    sass.assert_no_spills(cubin)
    ((name, used),) = cubin.kernels.items()
    assert used.registers * launch.threads <= 65_536 and used.shared + launch.dynamic <= 232_448
    listing = toolchain.disassemble(cubin)[name]
    sass.assert_no_double(listing)
    sass.assert_tensor_cores(listing)
    codes = sass.opcodes(listing)
    products = {code: count for code, count in codes.items() if code.startswith("HGMMA")}
    assert products == {f"HGMMA.64x{256 if columns == 4096 else 128}x16.F32.BF16": 4}
    assert codes["WARPGROUP.ARRIVE"] == 1 and codes["WARPGROUP.DEPBAR.LE"] == 2
    assert {code for code in codes if code.startswith("STG")} == {"STG.E.128"}
    copies = {code for code in codes if code.startswith(("LDGSTS", "UTMALDG"))}
    assert copies == {"UTMALDG.2D"} if engine else copies and all("128" in code.split(".") for code in copies)
    assert not any(code.startswith("CALL") for code in codes)


def along(b, shape):
    return ops.broadcast_to(ops.reshape(b, shape=(1, shape[1])), shape=shape)


# ---- launches --------------------------------------------------------------------------------------------------------


def test_a_plan_asks_for_shared_memory(always, executing):
    """From end to end on the stand-in, whose driver refuses a launch that did not ask."""
    x = jg.randn(40, 72, generator=jg.Generator().manual_seed(0)).bfloat16()
    w = jg.randn(72, 136, generator=jg.Generator().manual_seed(1)).bfloat16()
    function = jg.compile(lambda x, w: jg.relu(x @ w))
    wanted = jg.relu(x.float() @ w.float()).numpy()
    for sign in (1, -1, 1, -1):                              # later calls are captured, with operands elsewhere
        found = function(sign * x.cuda(), sign * w.cuda())
        np.testing.assert_allclose(found.float().cpu().numpy(), wanted, rtol=2 ** -8, atol=2 ** -6)
    assert 131104 in executing.allowed.values() and "cuTensorMapEncodeTiled" in executing.calls
    plan = compile_for(build([(40, 72), (72, 136)], ops.matmul, bfloat16), driver.gpu())
    (entry,) = plan.spec.entries
    assert entry.dynamic == 131104 and [a.sizes for a in entry.arguments if isinstance(a, Boxes)] == [(72, 40), (136, 72)]
    assert PlanSpec.from_json(plan.spec.to_json()) == plan.spec


def test_a_launch_that_does_not_ask_is_refused(always, executing, monkeypatch):
    monkeypatch.setattr(module.Function, "allow_shared", lambda self, nbytes: None)
    x = jg.ones(40, 72, device="cuda").bfloat16()
    with pytest.raises(DeviceError, match="cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE"):
        x @ x.T


def test_architectures_of_gpus(executing, monkeypatch):
    gpu = driver.gpu()
    assert code.architecture(gpu) == ARCH
    for major, minor, name in ((8, 0, "sm_80"), (8, 7, "sm_86"), (9, 1, "sm_90"), (10, 0, "sm_100"), (10, 3, "sm_100")):
        monkeypatch.setattr(gpu, "major", major)
        monkeypatch.setattr(gpu, "minor", minor)
        assert code.architecture(gpu) == name
