"""Kernel text -> PTX -> machine code, without a GPU; what comes out is carried out by the interpreter and looked at."""

import math

import ml_dtypes
import numpy as np
import pytest
from ptx import Garbage, Machine, Misaligned, OutOfBounds, PtxError, Race, execute, sass

from jitgrad.errors import CompileError

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from jitgrad.codegen import cuda_toolchain as toolchain

needs_disassembler = pytest.mark.skipif(toolchain._disassembler() is None, reason="nvdisasm is not installed")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NUMPY = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "i16": np.int16, "i8": np.int8,
         "u8": np.uint8, "u32": np.uint32, "bool": np.bool_, "bf16": ml_dtypes.bfloat16, "f16": np.float16}

ADD = """
def add(x, y, out, n):
    i = i32(i32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) * i32({count}))
    if i < n:
        a = load_vector(x, i, {count})
        b = load_vector(y, i, {count})
        store_vector(out, i, ({sums}))
"""


def add_text(count):
    return ADD.format(count=count, sums=", ".join(f"a[{k}] + b[{k}]" for k in range(count)) + ",")


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- compiling ---------------------------------------------------------------------------------------------------------

def test_equal_kernels_have_equal_text():
    first, second = (toolchain.compile_ptx(PRODUCT, "product", PRODUCT_TYPES) for _ in range(2))
    assert first == second
    assert ".entry product(" in first and "NumbaEnv" not in first


def test_many_kernels_are_linked_at_once_and_keep_their_shared_memory_apart():
    one = toolchain.compile_ptx(PRODUCT, "product", PRODUCT_TYPES, threads=32)
    two = toolchain.compile_ptx(PRODUCT, "other", PRODUCT_TYPES, threads=32)
    three = toolchain.compile_ptx(add_text(4), "add", ("f32*", "f32*", "f32*", "i32"))
    cubin = toolchain.link([one, two, three], "sm_80")
    assert set(cubin.kernels) == {"product", "other", "add"}
    assert cubin.kernels["product"].shared == 16 * 24 * 2 + 16 * 8 * 2
    assert cubin.kernels["add"].shared == 0
    assert all(0 < used.registers <= 255 for used in cubin.kernels.values())
    assert cubin.code[:4] == b"\x7fELF"


@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a", "sm_120"])
def test_other_architectures(architecture):
    text = toolchain.compile_ptx(add_text(4), "add", ("f32*", "f32*", "f32*", "i32"), architecture=architecture)
    assert f".target {architecture}\n" in text
    sass.assert_no_spills(toolchain.link([text], architecture))


def test_results_are_not_contracted_unless_asked():
    text = "def f(x, y):\n    store(y, 0, load(x, 0) * load(x, 1) + load(x, 2))\n"
    plain = toolchain.compile_ptx(text, "f", ("f32*", "f32*"))
    assert "mul.rn.f32" in plain and "fma" not in plain
    assert "fma.rn.f32" in toolchain.compile_ptx(text, "f", ("f32*", "f32*"), contract=True)
    x = np.array([1 + 2.0 ** -12, 1 + 2.0 ** -12, -1 - 2.0 ** -11], np.float32)
    assert execute(plain, 1, 1, [x, Garbage(1, np.float32)])[1][0] == x[0] * x[1] + x[2] == 0
    single = text.replace("load(x, 0) * load(x, 1) + load(x, 2)", "multiply_add(load(x, 0), load(x, 1), load(x, 2))")
    ptx = toolchain.compile_ptx(single, "f", ("f32*", "f32*"))
    assert execute(ptx, 1, 1, [x, Garbage(1, np.float32)])[1][0] == 2.0 ** -24


def test_errors_name_the_kernel():
    with pytest.raises(CompileError, match=r"wrong: the kernel cannot be compiled: .*unknown"):
        toolchain.compile_ptx("def f(x):\n    unknown(x)\n", "wrong", ("f32*",))
    with pytest.raises(CompileError, match="wrong: kernel text is not Python"):
        toolchain.compile_ptx("def f(x:\n", "wrong", ("f32*",))
    with pytest.raises(CompileError, match="must define one function, it defines 2"):
        toolchain.compile_ptx("def f(x):\n    pass\ndef g(x):\n    pass\n", "wrong", ("f32*",))
    with pytest.raises(CompileError, match="'f33' is no type of a parameter"):
        toolchain.compile_ptx("def f(x):\n    pass\n", "wrong", ("f33",))
    with pytest.raises(CompileError, match="no architecture 'sm_12'"):
        toolchain.compile_ptx("def f(x):\n    pass\n", "wrong", ("f32*",), architecture="sm_12")
    with pytest.raises(CompileError, match=r"not to be assembled for sm_80: .*rett.*\(f\)"):
        toolchain.link([toolchain.compile_ptx("def f(x):\n    pass\n", "f", ("f32*",)).replace("ret;", "rett;")], "sm_80")


def test_the_packages_are_part_of_what_a_result_depends_on():
    assert toolchain.is_available()
    versions = toolchain.versions()
    assert set(versions) >= {"numba", "numba-cuda", "cuda-bindings"}
    assert any("nvjitlink" in name for name in versions)


def test_a_python_function_can_be_called():
    def twice(x):
        return x + x

    text = "def f(x, y):\n    store(y, 0, twice(load(x, 0)))\n"
    ptx = toolchain.compile_ptx(text, "f", ("f32*", "f32*"), names={"twice": twice})
    assert execute(ptx, 1, 1, [np.array([1.5], np.float32), Garbage(1, np.float32)])[1][0] == 3


# --- accesses ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", NUMPY)
def test_every_element_type_is_loaded_and_stored_alone_and_in_vectors(dtype):
    size = np.dtype(NUMPY[dtype]).itemsize
    count = 16 // size
    text = f"""
def copy(x, one, many):
    i = i32(cuda.threadIdx.x)
    store(one, i, load(x, i))
    if i % {count} == 0:
        store_vector(many, i, load_vector(x, i, {count}))
"""
    x = (numbers(64) * 50).astype(np.int64).astype(NUMPY[dtype])
    ptx = toolchain.compile_ptx(text, "copy", (f"{dtype}*",) * 3)
    _, one, many = execute(ptx, 1, 64, [x, Garbage(64, x.dtype), Garbage(64, x.dtype)])
    assert one.tobytes() == many.tobytes() == x.tobytes()


def test_sixteen_bit_floats_are_computed_in_float32_and_rounded_once():
    for dtype in ("bf16", "f16"):
        x, y = (numbers(1024, seed).astype(NUMPY[dtype]) for seed in (0, 1))
        ptx = toolchain.compile_ptx(add_text(8), "add", (f"{dtype}*",) * 3 + ("i32",))
        out = execute(ptx, 2, 64, [x, y, Garbage(1024, x.dtype), 1024])[2]
        assert out.tobytes() == (x.astype(np.float32) + y.astype(np.float32)).astype(x.dtype).tobytes()


def test_a_vector_beyond_the_end_or_not_aligned_is_found():
    ptx = toolchain.compile_ptx(add_text(4), "add", ("f32*",) * 3 + ("i32",))
    x = numbers(30)
    with pytest.raises(OutOfBounds, match=r"ld.global.v4.*thread \(7, 0, 0\) .*argument 0 \(120 bytes\) at byte 112"):
        execute(ptx, 1, 32, [x, x, Garbage(30, np.float32), 30])
    machine = Machine(ptx)
    buffers = [machine.put(numbers(32), "x", skew=4), machine.put(numbers(32), "y"), machine.empty(32, np.float32)]
    with pytest.raises(Misaligned, match=r"reads 16 bytes of x \(128 bytes\) at byte 0, address .*no multiple of 16"):
        machine.launch(1, 32, [*buffers, 32])


def test_a_table_of_addresses():
    text = """
def fill(table, like, value):
    store(pointer_at(table, cuda.blockIdx.x, like), cuda.threadIdx.x, value)
"""
    machine = Machine(toolchain.compile_ptx(text, "fill", ("i64*", "f32*", "f32")))
    parts = [machine.empty(32, np.float32, f"part {k}") for k in range(3)]
    table = machine.put(np.array([part.address for part in parts]), "table")
    machine.launch(3, 32, [table, parts[0], 2.5])
    assert all((machine.get(part) == 2.5).all() for part in parts)


# --- shuffles and single operations ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["f32", "i32", "f64", "i64"])
def test_shuffles(dtype):
    text = """
def exchange(x, out):
    i = i32(cuda.threadIdx.x)
    v = load(x, i)
    store(out, i, shuffle_xor(v, 3))
    store(out, i + 32, shuffle_down(v, 5))
    store(out, i + 64, shuffle_up(v, 5))
    store(out, i + 96, shuffle_from(v, 7))
"""
    x = (numbers(32) * 1e6).astype(NUMPY[dtype])
    ptx = toolchain.compile_ptx(text, "exchange", (f"{dtype}*",) * 2)
    out = execute(ptx, 1, 32, [x, Garbage(128, x.dtype)])[1].reshape(4, 32)
    lane = np.arange(32)
    down, up = np.where(lane < 27, lane + 5, lane), np.where(lane > 4, lane - 5, lane)
    for k, source in enumerate((lane ^ 3, down, up, np.full(32, 7))):
        assert (out[k] == x[source]).all()


def test_approximations_are_near():
    text = """
def f(x, out, n):
    i = i32(cuda.threadIdx.x)
    v = load(x, i)
    store(out, i, exp2_approximate(v))
    store(out, i + n, log2_approximate(v))
    store(out, i + 2 * n, reciprocal_approximate(v))
    store(out, i + 3 * n, rsqrt_approximate(v))
    store(out, i + 4 * n, tanh_approximate(v))
"""
    x = np.abs(numbers(128)) + np.float32(0.01)
    ptx = toolchain.compile_ptx(text, "f", ("f32*", "f32*", "i32"))
    out = execute(ptx, 1, 128, [x, Garbage((5, 128), np.float32), 128])[1]
    wide = x.astype(np.float64)
    for row, expected in zip(out, (2 ** wide, np.log2(wide), 1 / wide, wide ** -0.5, np.tanh(wide))):
        np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-6)


# --- whole kernels -----------------------------------------------------------------------------------------------------

def softmax_text(columns, threads):
    """One block per row, the row in registers, sums over warps by shuffles and over the block through shared memory."""
    parts = range(columns // (4 * threads))
    lines = ["def softmax(x, out):", "    t = i32(cuda.threadIdx.x)",
             f"    base = i32(cuda.blockIdx.x) * i32({columns})", "    shared = cuda.shared.array(32, f32)"]
    lines += [f"    v{k} = load_vector(x, base + i32(t * 4 + {4 * threads * k}), 4)" for k in parts]

    def over_block(name, join):
        for distance in (16, 8, 4, 2, 1):
            lines.append(f"    {name} = {join.format(name, f'shuffle_xor({name}, {distance})')}")
        lines.extend(["    if t & 31 == 0:", f"        shared[t >> 5] = {name}", "    cuda.syncthreads()",
                      f"    {name} = shared[t & {threads // 32 - 1}]"])
        for distance in (16, 8, 4, 2, 1):
            if distance < threads // 32:
                lines.append(f"    {name} = {join.format(name, f'shuffle_xor({name}, {distance})')}")
        lines.append("    cuda.syncthreads()")

    elements = [f"v{k}[{j}]" for k in parts for j in range(4)]
    lines.append("    m = " + "max(" * (len(elements) - 1) + elements[0] + "".join(f", {e})" for e in elements[1:]))
    over_block("m", "max({}, {})")
    lines += [f"    e{k}_{j} = math.exp(v{k}[{j}] - m)" for k in parts for j in range(4)]
    lines.append("    s = " + " + ".join(f"e{k}_{j}" for k in parts for j in range(4)))
    over_block("s", "{} + {}")
    for k in parts:
        values = ", ".join(f"e{k}_{j} / s" for j in range(4))
        lines.append(f"    store_vector(out, base + i32(t * 4 + {4 * threads * k}), ({values}))")
    return "\n".join(lines)


def softmax_ptx(text, threads=256):
    return toolchain.compile_ptx(text, "softmax", ("f32*", "f32*"), names={"math": math}, threads=threads)


def test_softmax():
    x = numbers((8, 2048))
    out = execute(softmax_ptx(softmax_text(2048, 256)), 8, 256, [x, Garbage(x.shape, x.dtype)])[1]
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=2e-6)


@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_a_missing_barrier_is_a_race_and_makes_results_differ(barrier):
    lines = softmax_text(1024, 256).split("\n")
    del lines[[k for k, line in enumerate(lines) if "syncthreads" in line][barrier]]
    x = numbers((2, 1024))
    arguments = [x, Garbage(x.shape, x.dtype)]
    ptx = softmax_ptx("\n".join(lines))
    with pytest.raises(Race, match=r"shared memory \(128 bytes\) at byte .* has no barrier in between"):
        execute(ptx, 2, 256, arguments)
    with pytest.raises(PtxError, match=r"differs between the schedules|never written"):
        execute(ptx, 2, 256, arguments, races=False)


PRODUCT_TYPES = ("bf16*", "bf16*", "f32*", "i32")
PRODUCT = """
def product(a, b, c, depth):
    shared_a = cuda.shared.array((16, 24), u16)
    shared_b = cuda.shared.array((16, 8), u16)
    lane = i32(cuda.threadIdx.x)
    to_a = shared_address(shared_a)
    to_b = shared_address(shared_b)
    sums = (f32(0), f32(0), f32(0), f32(0))
    k = i32(0)
    while k < depth:
        row = i32(lane >> 1)
        half = i32(lane & 1)
        copy_async(u32(to_a + u32((row * 24 + half * 8) * 2)), a, row * depth + k + half * 8)
        if lane < 16:
            copy_async(u32(to_b + u32(lane * 16)), b, (k + lane) * 8)
        copy_commit()
        copy_wait(0)
        cuda.syncwarp()
        left = load_matrix_x4(u32(to_a + u32(((lane & 15) * 24 + (lane >> 4) * 8) * 2)))
        right = load_matrix_x2_transposed(u32(to_b + u32((lane & 15) * 16)))
        sums = multiply_bf16(left, right, sums)
        cuda.syncwarp()
        k = i32(k + 16)
    row = lane >> 2
    column = (lane & 3) * 2
    store_vector(c, row * 8 + column, (sums[0], sums[1]))
    store_vector(c, (row + 8) * 8 + column, (sums[2], sums[3]))
"""


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_product_through_shared_memory_on_tensor_cores(dtype):
    text = PRODUCT.replace("multiply_bf16", f"multiply_{dtype}")
    ptx = toolchain.compile_ptx(text, "product", (f"{dtype}*", f"{dtype}*", "f32*", "i32"), threads=32)
    a, b = numbers((16, 64)).astype(NUMPY[dtype]), numbers((64, 8), 1).astype(NUMPY[dtype])
    c = execute(ptx, 1, 32, [a, b, Garbage((16, 8), np.float32), 64])[2]
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("line, error", [("        copy_wait(0)\n", "never written or are still being copied"),
                                         ("        cuda.syncwarp()\n        left", "no barrier in between")])
def test_what_a_product_forgets_is_found(line, error):
    ptx = toolchain.compile_ptx(PRODUCT.replace(line, "        left" if "left" in line else ""), "product", PRODUCT_TYPES)
    a, b = np.ones((16, 32), ml_dtypes.bfloat16), np.ones((32, 8), ml_dtypes.bfloat16)
    with pytest.raises(PtxError, match=error):
        execute(ptx, 1, 32, [a, b, Garbage((16, 8), np.float32), 32])


def test_a_product_of_tf32():
    text = """
def product(a, b, c):
    lane = i32(cuda.threadIdx.x)
    left = (load(a, lane), load(a, lane + 32), load(a, lane + 64), load(a, lane + 96))
    sums = multiply_tf32(left, (load(b, lane), load(b, lane + 32)), (f32(0), f32(0), f32(0), f32(0)))
    for k in range(4):
        store(c, lane + 32 * k, sums[k])
"""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 8)).astype(np.float32), rng.integers(-8, 8, (8, 8)).astype(np.float32)
    group, member = np.arange(32) // 4, np.arange(32) % 4
    held_a = np.stack([a[group, member], a[group + 8, member], a[group, member + 4], a[group + 8, member + 4]])
    held_b = np.stack([b[member, group], b[member + 4, group]])
    ptx = toolchain.compile_ptx(text, "product", ("u32*", "u32*", "f32*"))
    c = execute(ptx, 1, 32, [held_a.view(np.uint32), held_b.view(np.uint32), Garbage((4, 32), np.float32)])[2]
    expected = a @ b
    assert (c == np.stack([expected[group + 8 * (k // 2), 2 * member + k % 2] for k in range(4)])).all()


# --- machine code ------------------------------------------------------------------------------------------------------

@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    texts = [toolchain.compile_ptx(add_text(4), "add_f32", ("f32*",) * 3 + ("i32",), threads=256),
             toolchain.compile_ptx(add_text(8), "add_bf16", ("bf16*",) * 3 + ("i32",), threads=256),
             softmax_ptx(softmax_text(4096, 256)),
             toolchain.compile_ptx(PRODUCT, "product", PRODUCT_TYPES, threads=32)]
    cubin = toolchain.link(texts, architecture)
    listing = toolchain.disassemble(cubin)
    assert set(listing) >= set(cubin.kernels) == {"add_f32", "add_bf16", "softmax", "product"}
    sass.assert_no_spills(cubin)
    for name in ("add_f32", "add_bf16", "softmax"):
        sass.assert_wide(listing[name])
        sass.assert_no_double(listing[name])
    sass.assert_tensor_cores(listing["product"])
    assert sass.opcodes(listing["softmax"])["BAR.SYNC.DEFER_BLOCKING"] == 4


@needs_disassembler
def test_the_assertions_on_machine_code_can_fail():
    scalar = toolchain.compile_ptx("def f(x):\n    store(x, 0, load(x, 0) * 0.1)\n", "f", ("f32*",))
    wasteful = "def g(x, y):\n" + "".join(f"    v{k} = load(x, {k})\n" for k in range(200))
    wasteful += "    cuda.syncthreads()\n" + "".join(f"    store(y, {k}, v{k})\n" for k in range(200))
    cubin = toolchain.link([scalar, toolchain.compile_ptx(wasteful, "g", ("f32*", "f32*"), threads=1024)], "sm_80")
    listing = toolchain.disassemble(cubin)
    with pytest.raises(AssertionError, match="not 128 bits wide"):
        sass.assert_wide(listing["f"])
    with pytest.raises(AssertionError, match="float64"):
        sass.assert_no_double(listing["f"])
    with pytest.raises(AssertionError, match="no product on tensor cores"):
        sass.assert_tensor_cores(listing["f"])
    with pytest.raises(AssertionError, match="g on sm_80"):
        sass.assert_no_spills(cubin)
