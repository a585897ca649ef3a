"""The words of GPU kernel text, by small kernels written by hand: text -> PTX -> machine code, without a GPU. What comes out
is carried out by the interpreter and looked at. Kernels of regions are in test_cuda_codegen.py."""

import ml_dtypes
import numpy as np
import pytest
from ptx import Garbage, Machine, Misaligned, OutOfBounds, PtxError, Race, execute, sass

from jitgrad.codegen import cuda_toolchain as toolchain
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.errors import CompileError

needs_linker = pytest.mark.skipif(not toolchain.is_available(), reason="nvJitLink is not installed")
needs_disassembler = pytest.mark.skipif(toolchain._disassembler() is None or not toolchain.is_available(),
                                        reason="nvdisasm or nvJitLink is not installed")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NUMPY = {"f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64, "i16": np.int16, "i8": np.int8,
         "u8": np.uint8, "u32": np.uint32, "boolean": np.bool_, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def add_text(count, dtype="f32", name="add"):
    """z = x + y, `count` elements per thread."""
    a, b, sums = (", ".join(text.format(k) for k in range(count)) for text in ("a{}", "b{}", "f32(a{0} + b{0})"))
    return f"""
def {name}(x: pointer[{dtype}], y: pointer[{dtype}], z: pointer[{dtype}], n: i32) -> block[32]:
    i = i32(i32(i32(block() * i32(32)) + thread()) * i32({count}))
    if i < n:
        {a} = load_lanes(x, i, {count}, 0, 3)
        {b} = load_lanes(y, i, {count}, 1, 3)
        store_lanes(z, i, ({sums}), 2, 3)
"""


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- compiling and linking ---------------------------------------------------------------------------------------------

def test_equal_kernels_have_equal_text():
    assert compile_ptx(product_text()) == compile_ptx(product_text())
    assert ".entry product(" in compile_ptx(product_text())


@needs_linker
def test_many_kernels_are_linked_at_once_and_keep_their_shared_memory_apart():
    cubin = toolchain.link([compile_ptx(text) for text in (product_text(), product_text(name="other"), add_text(4))],
                           "sm_80")
    assert set(cubin.kernels) == {"product", "other", "add"}
    assert cubin.kernels["product"].shared == 16 * 24 * 2 + 16 * 8 * 2
    assert cubin.kernels["add"].shared == 0
    assert all(0 < used.registers <= 255 for used in cubin.kernels.values())
    assert cubin.code[:4] == b"\x7fELF"


@needs_linker
@pytest.mark.parametrize("architecture", ["sm_90a", "sm_100a", "sm_120"])
def test_other_architectures(architecture):
    text = compile_ptx(add_text(4), architecture)
    assert f".target {architecture}\n" in text
    sass.assert_no_spills(toolchain.link([text], architecture))


@needs_linker
def test_what_cannot_be_linked_is_an_error():
    with pytest.raises(CompileError, match="no architecture 'sm_12'"):
        toolchain.link([compile_ptx(add_text(4))], "sm_12")
    with pytest.raises(CompileError, match=r"not to be assembled for sm_80: .*rett.*\(add\)"):
        toolchain.link([compile_ptx(add_text(4)).replace("ret;", "rett;")], "sm_80")


@needs_linker
def test_the_packages_are_part_of_what_a_result_depends_on():
    assert {"numba", "llvmlite"} <= set(toolchain.versions())


def test_without_the_library_the_error_names_the_fix(monkeypatch):
    def refuse(name):
        raise OSError(name)

    monkeypatch.setattr(toolchain.ctypes, "CDLL", refuse)
    toolchain._linker.cache_clear()
    try:
        assert not toolchain.is_available()
        with pytest.raises(CompileError, match=r"nvJitLink is not installed.*pip install 'jitgrad\[cuda\]'"):
            toolchain.link([""], "sm_80")
    finally:
        toolchain._linker.cache_clear()


def test_results_are_not_contracted_unless_asked():
    text = "def f(x: pointer[f32], y: pointer[f32]) -> block[1]:\n    store(y, 0, {}, 1, 2)\n"
    a, b, c = (f"load(x, {k}, 0, 2)" for k in range(3))
    plain = compile_ptx(text.format(f"f32(f32({a} * {b}) + {c})"))
    assert "fma" not in plain
    x = np.array([1 + 2.0 ** -12, 1 + 2.0 ** -12, -1 - 2.0 ** -11], np.float32)
    assert execute(plain, 1, 1, [x, Garbage(1, np.float32)])[1][0] == x[0] * x[1] + x[2] == 0
    single = compile_ptx(text.format(f"multiply_add({a}, {b}, {c})"))
    assert execute(single, 1, 1, [x, Garbage(1, np.float32)])[1][0] == 2.0 ** -24


# --- accesses ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", NUMPY)
def test_every_element_type_is_loaded_and_stored_alone_and_in_vectors(dtype):
    count = 16 // np.dtype(NUMPY[dtype]).itemsize
    values = ", ".join(f"v{k}" for k in range(count))
    text = f"""
def copy(x: pointer[{dtype}], one: pointer[{dtype}], many: pointer[{dtype}]) -> block[64]:
    i = thread()
    store(one, i, load(x, i, 0, 3), 1, 3)
    if i < i32({64 // count}):
        {values} = load_lanes(x, i32(i * i32({count})), {count}, 0, 3)
        store_lanes(many, i32(i * i32({count})), ({values}), 2, 3)
"""
    x = (numbers(64) * 50).astype(np.int64).astype(NUMPY[dtype])
    _, one, many = execute(compile_ptx(text), 1, 64, [x, Garbage(64, x.dtype), Garbage(64, x.dtype)])
    assert one.tobytes() == many.tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sixteen_bit_floats_are_computed_in_float32_and_rounded_once(dtype):
    x, y = (numbers(512, seed).astype(NUMPY[dtype]) for seed in (0, 1))
    out = execute(compile_ptx(add_text(8, dtype)), 2, 32, [x, y, Garbage(512, x.dtype), 512])[2]
    assert out.tobytes() == (x.astype(np.float32) + y.astype(np.float32)).astype(x.dtype).tobytes()


def test_a_vector_beyond_the_end_or_not_aligned_is_found():
    ptx = compile_ptx(add_text(4))
    x = numbers(30)
    with pytest.raises(OutOfBounds, match=r"ld.global.*v4.*thread \(7, 0, 0\) .*argument \d \(120 bytes\) at byte 112"):
        execute(ptx, 1, 32, [x, x, Garbage(30, np.float32), 30])
    machine = Machine(ptx)
    buffers = [machine.put(numbers(32), "x", skew=4), machine.put(numbers(32), "y"), machine.empty(32, np.float32)]
    with pytest.raises(Misaligned, match=r"reads 16 bytes of x \(128 bytes\) at byte 0, address .*no multiple of 16"):
        machine.launch(1, 32, [*buffers, 32])


@pytest.mark.parametrize("dtype", ["f32", "i32", "f64", "i64"])
def test_shuffles(dtype):
    text = f"""
def exchange(x: pointer[{dtype}], out: pointer[{dtype}]) -> block[32]:
    i = thread()
    store(out, i, shuffle(load(x, i, 0, 2), 4), 1, 2)
"""
    x = (numbers(32) * 1e6).astype(NUMPY[dtype])
    assert (execute(compile_ptx(text), 1, 32, [x, Garbage(32, x.dtype)])[1] == x[np.arange(32) ^ 4]).all()


@pytest.mark.parametrize(("word", "threads"), [("barrier", 64), ("warp_barrier", 32)])
def test_barriers_and_what_happens_without_them(word, threads):
    text = f"""
def turn(x: pointer[f32], y: pointer[f32]) -> block[{threads}]:
    tile = shared(0, f32, {threads})
    i = thread()
    store(tile, i, load(x, i, 0, 3), 2, 3)
    {word}()
    store(y, i, load(tile, i32(i32({threads - 1}) - i), 2, 3), 1, 3)
"""
    x = numbers(threads)
    out = execute(compile_ptx(text), 1, threads, [x, Garbage(threads, np.float32)])[1]
    assert (out == x[::-1]).all()
    broken = text.replace(f"{word}()", "pass")
    with pytest.raises(Race, match="has no barrier in between"):
        execute(compile_ptx(broken), 1, threads, [x, Garbage(threads, np.float32)])


def between_conditions(word):
    """A word for all threads of a warp between two conditions that some of them meet."""
    return f"""
def between(x: pointer[f32], out: pointer[f32], n: i32) -> block[32]:
    tile = shared(0, f32, 32)
    lane = thread()
    store(tile, lane, f32(lane), 2, 3)
    warp_barrier()
    a = f32(0)
    if lane < n:
        a = load(x, lane, 0, 3)
    {word}
    b = f32(0)
    if lane < n:
        b = f32(load(x, lane, 0, 3) + f32(found))
        store(out, lane, f32(a + b), 1, 3)
"""


@pytest.mark.parametrize(("word", "instruction"), [
    ("found, _ = load_matrix_x2(shared_address(tile))", "ldmatrix.sync"),
    ("found = shuffle(i32(lane * 3), 4)", "shfl.sync"), ("_, found = scan_warp(f32(lane * 2))", "shfl.sync")])
def test_what_a_warp_does_together_stays_outside_of_conditions(word, instruction):
    """LLVM would join the two conditions and give either way a copy of what stands between them."""
    ptx = compile_ptx(between_conditions(word), "sm_90a")
    assert ptx.count(instruction) == (5 if "scan" in word else 1)
    x = numbers(32)
    out = execute(ptx, 1, 32, [x, np.zeros(32, np.float32), 7])[1]
    rows = np.tile(np.arange(4, dtype=np.float32).view(np.int32), 8)         # all eight rows are the first one of the tile
    wanted = rows if "matrix" in word else np.full(32, 992) if "scan" in word else (np.arange(32) ^ 4) * 3
    np.testing.assert_allclose(out[:7], (x + (x + wanted.astype(np.float32)))[:7], rtol=1e-6)


# --- tensor cores ------------------------------------------------------------------------------------------------------

def product_text(dtype="bf16", name="product"):
    """(16, depth) @ (depth, 8) by one warp, through shared memory."""
    return f"""
def {name}(a: pointer[{dtype}], b: pointer[{dtype}], c: pointer[f32], depth: i32) -> block[32]:
    to_a = shared_address(shared(0, i16, {16 * 24}))
    to_b = shared_address(shared(1, i16, {16 * 8}))
    lane = thread()
    sums = (f32(0), f32(0), f32(0), f32(0))
    for step in range(quotient(depth, 16)):
        k = i32(step * 16)
        row = i32(lane >> 1)
        half = i32(lane & 1)
        copy_async(i32(to_a + i32(i32(row * 24) + i32(half * 8)) * 2), a, i32(row * depth + k + half * 8), 16)
        if lane < 16:
            copy_async(i32(to_b + lane * 16), b, i32(k + lane) * 8, 16)
        copy_commit()
        copy_wait(0)
        warp_barrier()
        left = load_matrix_x4(i32(to_a + i32((lane & 15) * 24 + (lane >> 4) * 8) * 2))
        right = load_matrix_x2_transposed(i32(to_b + (lane & 15) * 16))
        sums = multiply_{dtype}(left, right, sums)
        warp_barrier()
    place = i32((lane >> 2) * 8 + (lane & 3) * 2)
    c0, c1, c2, c3 = sums
    store_lanes(c, place, (c0, c1), 2, 3)
    store_lanes(c, i32(place + 64), (c2, c3), 2, 3)
"""


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_product_through_shared_memory_on_tensor_cores(dtype):
    a, b = numbers((16, 64)).astype(NUMPY[dtype]), numbers((64, 8), 1).astype(NUMPY[dtype])
    c = execute(compile_ptx(product_text(dtype)), 1, 32, [a, b, Garbage((16, 8), np.float32), 64])[2]
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("line, error", [("        copy_wait(0)\n", "never written or are still being copied"),
                                         ("        warp_barrier()\n        left", "no barrier in between")])
def test_what_a_product_forgets_is_found(line, error):
    ptx = compile_ptx(product_text().replace(line, "        left" if "left" in line else ""))
    a, b = np.ones((16, 32), ml_dtypes.bfloat16), np.ones((32, 8), ml_dtypes.bfloat16)
    with pytest.raises(PtxError, match=error):
        execute(ptx, 1, 32, [a, b, Garbage((16, 8), np.float32), 32])


def test_a_product_of_tf32():
    text = """
def product(a: pointer[i32], b: pointer[i32], c: pointer[f32]) -> block[32]:
    lane = thread()
    left = (load(a, lane, 0, 3), load(a, lane + 32, 0, 3), load(a, lane + 64, 0, 3), load(a, lane + 96, 0, 3))
    c0, c1, c2, c3 = multiply_tf32(left, (load(b, lane, 1, 3), load(b, lane + 32, 1, 3)), (f32(0), f32(0), f32(0), f32(0)))
    store(c, lane, c0, 2, 3)
    store(c, lane + 32, c1, 2, 3)
    store(c, lane + 64, c2, 2, 3)
    store(c, lane + 96, c3, 2, 3)
"""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 8)).astype(np.float32), rng.integers(-8, 8, (8, 8)).astype(np.float32)
    group, member = np.arange(32) // 4, np.arange(32) % 4
    held_a = np.stack([a[group, member], a[group + 8, member], a[group, member + 4], a[group + 8, member + 4]])
    held_b = np.stack([b[member, group], b[member + 4, group]])
    c = execute(compile_ptx(text), 1, 32, [held_a.view(np.int32), held_b.view(np.int32), Garbage((4, 32), np.float32)])[2]
    expected = a @ b
    assert (c == np.stack([expected[group + 8 * (k // 2), 2 * member + k % 2] for k in range(4)])).all()


def test_part_of_a_copy_is_filled_with_zeros():
    text = """
def part(x: pointer[bf16], y: pointer[bf16], n: i32) -> block[32]:
    tile = shared(0, i16, 256)
    lane = thread()
    copy_async(i32(shared_address(tile) + lane * 16), x, lane * 8, max(0, min(16, (n - lane * 8) * 2)))
    copy_commit()
    copy_wait(0)
    for k in range(8):
        store(pointer_as(y, i16), lane * 8 + k, load(tile, lane * 8 + k, 2, 3), 1, 3)
"""
    x = numbers(200).astype(ml_dtypes.bfloat16)[:196]
    y = execute(compile_ptx(text), 1, 32, [x, Garbage(256, x.dtype), 196])[1]
    assert (y[:196] == x).all() and not y[196:].any()


# --- machine code ------------------------------------------------------------------------------------------------------

@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    texts = [add_text(4, name="add_f32"), add_text(8, "bf16", "add_bf16"), product_text()]
    cubin = toolchain.link([compile_ptx(text, architecture) for text in texts], architecture)
    listing = toolchain.disassemble(cubin)
    assert set(listing) >= set(cubin.kernels) == {"add_f32", "add_bf16", "product"}
    sass.assert_no_spills(cubin)
    for name in ("add_f32", "add_bf16"):
        sass.assert_wide(listing[name])
        sass.assert_no_double(listing[name])
    sass.assert_tensor_cores(listing["product"])


@needs_disassembler
def test_the_assertions_on_machine_code_can_fail():
    double = "def f(x: pointer[f32]) -> block[32]:\n    store(x, 0, load(x, 0, 0, 1) * 0.1, 0, 1)\n"
    wasteful = "def g(x: pointer[f32]) -> block[1024]:\n"
    wasteful += "".join(f"    v{k} = load(x, {k}, 0, 1)\n" for k in range(200)) + "    barrier()\n"
    wasteful += "".join(f"    store(x, {k}, v{199 - k}, 0, 1)\n" for k in range(200))
    cubin = toolchain.link([compile_ptx(double), compile_ptx(wasteful)], "sm_80")
    listing = toolchain.disassemble(cubin)
    with pytest.raises(AssertionError, match="not 128 bits wide"):
        sass.assert_wide(listing["f"])
    with pytest.raises(AssertionError, match="float64"):
        sass.assert_no_double(listing["f"])
    with pytest.raises(AssertionError, match="no product on tensor cores"):
        sass.assert_tensor_cores(listing["f"])
    with pytest.raises(AssertionError, match="g on sm_80"):
        sass.assert_no_spills(cubin)
