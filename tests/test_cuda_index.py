"""Index, sort, scan and movement kernels of GPUs beyond the samples of ops: sizes that need several blocks, pieces and
passes, units of 16 bytes, results that are the CPU's to the bit, several schedules, and machine code."""

import re

import ml_dtypes
import numpy as np
import pytest
from cuda_launching import carry_out, run
from ptx import sass
from samples import SAMPLES

import jitgrad as jg
from jitgrad import ops
from jitgrad.codegen import cuda_index, cuda_scan, cuda_sort, cuda_toolchain as toolchain
from jitgrad.codegen.cuda_lower import lower_cuda
from jitgrad.codegen.cuda_native import compile_ptx
from jitgrad.dtypes import float32, from_numpy, int64
from jitgrad.ir.graph import GraphBuilder
from jitgrad.ir.types import TensorType
from jitgrad.kernels.cuda import helpers
from jitgrad.transforms.fuse import fuse

rng = np.random.default_rng(0)
BF16 = ml_dtypes.bfloat16


def lowered(op, arrays, attrs, shared=(), aligned=True):
    return lower_cuda(op, types_of(arrays), attrs, shared, aligned)


def types_of(arrays):
    return tuple([TensorType(from_numpy(x.dtype), x.shape) for x in arrays])


def on_gpu(op, *arrays, shared=(), aligned=True, schedule="together", failure=(0, 0, 0), **attrs):
    """The results of the kernels of an op on the interpreter, and their lowering."""
    made = lowered(op, arrays, attrs, shared, aligned)
    found = run(made, [np.array(x) for x in arrays], op.result_types(types_of(arrays), attrs), shared=shared,
                schedule=schedule, skew=0 if aligned else 1, failure=failure)
    return found, made


def check(op, *arrays, **options):
    """The same bits as the op's reference gives."""
    found, made = on_gpu(op, *arrays, **options)
    attrs = {k: v for k, v in options.items() if k not in ("shared", "aligned", "schedule")}
    wanted = op.eager(*arrays, **attrs)
    for ours, theirs in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert ours.shape == theirs.shape
        assert ours.tobytes() == np.ascontiguousarray(theirs).tobytes()
    return made


# ---- movement ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, BF16, np.float32, np.complex128], ids=str)
@pytest.mark.parametrize(("aligned", "inner"), [(True, 16), (True, 5), (False, 16)])
def test_concat_pad_and_slice_update(dtype, aligned, inner):
    x, y = [rng.integers(0, 9, (3, n, inner)).astype(dtype) for n in (4, 7)]
    options = {"aligned": aligned, "schedule": "reversed"}
    check(ops.concat, x, y, y[:, :0], axis=1, **options)
    check(ops.pad, y, low=(1, 0, 0), high=(0, 2, 0), **options)
    check(ops.pad, x, low=(0, 0, 3), high=(1, 0, 1), **options)
    check(ops.slice_update, y, x[:2, :3], start=(1, 2, 0), step=(1, 2, 1), **options)
    check(ops.slice_update, y, x[:, :, :2], start=(0, 1, 1), step=(1, 1, 2), **options)


def test_a_thread_carries_16_bytes():
    x = np.zeros((4, 8), BF16)
    whole = lowered(ops.concat, (x, x), {"axis": 0}).launches[1]
    odd = lowered(ops.concat, (x[:, :7].copy(),) * 2, {"axis": 0}).launches[1]
    assert whole.arguments[3] == 4 and re.search(r"load_lanes\(x, i32\(item \* 2\), 2,", whole.source)
    assert odd.arguments[3] == 7                            # 28 elements of which four are a unit of 8 bytes


# ---- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.int64], ids=str)
def test_take_of_long_rows(dtype, aligned):
    x = rng.integers(0, 99, (2, 50, 24)).astype(dtype)
    check(ops.take, x, rng.integers(0, 50, (9, 3)), axis=1, aligned=aligned)


def sums_in_order(x, index, source):
    """What `index_add` along axis 0 is to the bit: one position after the other."""
    out = np.array(x)
    for row, values in zip(index, source, strict=True):
        out[row] += values
    return out


@pytest.mark.parametrize(("rows", "count", "inner", "schedule"), [
    (7, 70, 5, "random"), (7, 70, 5, "reversed"), (300, 40, 3, "interleaved"), (3, 2100, 1, "together")])
def test_index_add_is_in_the_order_of_the_index(rows, count, inner, schedule):
    x, source = rng.normal(size=(rows, inner)).astype("f"), rng.normal(size=(count, inner)).astype("f")
    index = rng.integers(0, rows, count)
    for shared in ((), ((0, 0),))[:1 if count > 1000 else 2]:
        (found,), _ = on_gpu(ops.index_add, x, index, source, axis=0, shared=shared, schedule=schedule)
        assert found.tobytes() == sums_in_order(x, index, source).tobytes()


@pytest.mark.parametrize(("dtype", "rows", "count", "inner", "kernel"), [
    (np.int32, 9, 700, 1, "count_few"), (np.int32, 9, 5, 1, "count_rows"), (np.int32, 7, 70, 3, "count_rows"),
    (np.int64, 9, 700, 1, "count_rows")], ids=str)
@pytest.mark.parametrize("schedule", ["random", "reversed"])
def test_integers_are_added_in_any_order(dtype, rows, count, inner, kernel, schedule):
    """To the bit: sums wrap around."""
    shape = (rows, inner) if inner > 1 else (rows,)
    x, source = [rng.integers(0, np.iinfo(dtype).max, (n, *shape[1:]), dtype) for n in (rows, count)]
    index = rng.integers(0, rows, count).astype(np.int32)
    made = check(ops.index_add, x, index, source, axis=0, schedule=schedule, aligned=False)
    assert made.launches[-1].name.startswith(kernel)
    along = np.broadcast_to(index.reshape(-1, *[1] * (len(shape) - 1)), source.shape).astype(np.int64)
    check(ops.scatter_add, x, along, source, axis=0, schedule=schedule)


def test_index_add_is_what_the_compiled_kernel_of_the_cpu_gives():
    x, index, source = [np.asarray(a) for a in (rng.normal(size=(2, 9, 4)).astype("f"), rng.integers(0, 9, 60),
                                                rng.normal(size=(2, 60, 4)).astype("f"))]
    (found,), _ = on_gpu(ops.index_add, x, index, source, axis=1)
    theirs = jg.compile(lambda x, index, source: x.index_add(1, index, source))(*map(jg.from_numpy, (x, index, source)))
    assert found.tobytes() == theirs.numpy().tobytes()


@pytest.mark.parametrize("schedule", ["random", "reversed"])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.complex64], ids=str)
def test_the_last_of_equal_indices_is_kept(dtype, schedule):
    x, source = [rng.integers(0, 99, (n, 8)).astype(dtype) for n in (5, 600)]
    index = rng.integers(0, 5, 600).astype(np.int32)
    check(ops.index_update, x, index, source, axis=0, schedule=schedule)
    check(ops.index_update, x, index, source, axis=0, schedule=schedule, shared=((0, 0),))


# ---- elements ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_and_scatter(axis):
    x = rng.normal(size=(5, 6, 7)).astype("f")
    shape = [4, 5, 6]
    shape[axis] = 9
    index = rng.integers(0, x.shape[axis], shape)
    source = rng.normal(size=shape).astype("f")
    check(ops.gather, x, index, axis=axis)
    check(ops.scatter, x, index, source, axis=axis, schedule="reversed")
    check(ops.scatter_add, x, index, source, axis=axis, schedule="reversed")


@pytest.mark.parametrize("schedule", ["random", "reversed"])
def test_scatter_add_of_long_lines_is_in_order(schedule):
    """Many positions for few lines: they are sorted by place."""
    x, source = np.zeros((3, 10), "f"), rng.normal(size=(3, 50)).astype("f")
    index = rng.integers(0, 10, (3, 50))
    assert index.shape[1] > cuda_index.FEW
    assert len(check(ops.scatter_add, x, index, source, axis=1, schedule=schedule).launches) > 3


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int64], ids=str)
@pytest.mark.parametrize("op", [ops.index_add, ops.index_update, ops.scatter, ops.scatter_add, ops.gather, ops.take],
                         ids=lambda op: op.name)
def test_an_index_out_of_range_is_reported(op, dtype):
    index, x = np.array([1, 4, 2, 0]), np.zeros(4, dtype)
    arrays = (x, index) if op.name in ("gather", "take") else (x, index, np.ones(4, dtype))
    made = lowered(op, arrays, {"axis": 0})
    (type_,) = op.result_types(types_of(arrays), {"axis": 0})
    with pytest.raises(AssertionError):
        run(made, list(arrays), [type_])
    run(made, list(arrays), [type_], shared=(), failure=(1, 1, 4)) if op.name not in ("gather", "take") else None


# ---- order -------------------------------------------------------------------------------------------------------------


def special(count, dtype):
    """Many equal values; of floats nan of both signs, infinities and both zeros."""
    x = rng.integers(-20, 20, count).astype(dtype)
    if np.dtype(dtype).kind not in "iub":
        x[rng.integers(0, count, count // 8)] = rng.choice(np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0], dtype),
                                                           count // 8)
    return x


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(("shape", "axis", "schedule"), [
    ((3, 40), 1, "random"), ((37, 5, 3), 1, "reversed"), ((2100, 2), 0, "together"), ((4100,), 0, "together")])
def test_sort(shape, axis, schedule, descending):
    x = special(np.prod(shape), np.float32).reshape(shape)
    options = {"axis": axis, "descending": descending}
    check_order(on_gpu(ops.sort, x, stable=True, **options, schedule=schedule)[0], ops.sort.eager(x, stable=True, **options))
    for k in (3, 40):
        if k <= shape[axis] and descending:
            check_order(on_gpu(ops.topk, x, k=k, **options)[0], ops.topk.eager(x, k=k, **options))


def check_order(found, wanted):
    """Values may be another nan, or the other zero, only if the order is wrong: both are looked up at their places."""
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(found[0].view(f"u{found[0].itemsize}"),
                                  np.ascontiguousarray(wanted[0]).view(f"u{found[0].itemsize}"))


@pytest.mark.parametrize("dtype", [np.float64, np.int64], ids=str)
def test_sort_of_numbers_of_64_bits_in_pieces(dtype):
    x = special(2100, dtype) if dtype is np.float64 else rng.integers(-9, 9, 2100) << 58
    check_order(on_gpu(ops.sort, x, axis=0, descending=True, stable=True)[0],
                ops.sort.eager(x, axis=0, descending=True, stable=True))


def test_topk_in_rounds_keeps_the_order_of_equals():
    x = rng.integers(0, 4, 6200).astype(np.int32)
    found, made = on_gpu(ops.topk, x, axis=0, k=600, descending=True)
    assert [launch.grid for launch in made.launches] == [4, 1, 3]
    check_order(found, ops.topk.eager(x, axis=0, k=600, descending=True))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(("shape", "axis", "schedule"), [((4100,), 0, "random"), ((2100, 3), 0, "reversed")])
def test_long_lines_of_bools_are_parted(shape, axis, schedule, descending):
    """By a running sum in place of sorting; the order of equals is kept."""
    for x in (rng.random(shape) < 0.3, np.ones(shape, np.bool_), np.zeros(shape, np.bool_)):
        made = check(ops.sort, x, axis=axis, descending=descending, stable=True, schedule=schedule, aligned=False)
        assert made.launches[-1].name == "write_parted_i32"
        check(ops.topk, x, axis=axis, k=50, descending=descending)


def test_blocks_are_small_where_there_would_be_few():
    short = lowered(ops.sort, (np.zeros((64, 100), "f"),), {"axis": 1, "descending": False, "stable": True}).launches[0]
    many = lowered(ops.sort, (np.zeros((9999, 100), "f"),), {"axis": 1, "descending": False, "stable": True}).launches[0]
    assert short.grid == 32 and many.grid == 625
    assert cuda_sort.SPAN == helpers.SPAN


# ---- running sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [ops.cumsum, ops.cumprod], ids=lambda op: op.name)
@pytest.mark.parametrize(("shape", "axis"), [((2, 700), 1), ((600, 2), 0), ((5, 200), 1), ((40, 7), 1), ((3, 9, 11), 1)])
def test_scans(op, shape, axis):
    x = 1 + rng.normal(size=shape) / 100 if op is ops.cumprod else rng.normal(size=shape)
    (found,), _ = on_gpu(op, x.astype("f"), axis=axis, schedule="interleaved")
    wanted = op.eager(x.astype("f").astype(float), axis=axis)
    np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=2e-6 * np.abs(wanted).max())


def test_scans_of_integers_wrap_around():
    check(ops.cumsum, rng.integers(-100, 100, (2, 1500)).astype(np.int8), axis=1)
    check(ops.cumprod, rng.integers(1, 9, (2, 600)).astype(np.uint32), axis=1)


def test_a_scan_of_totals_is_in_pieces_itself(monkeypatch):
    monkeypatch.setattr(cuda_scan, "PIECE", 128)
    x = rng.integers(-9, 9, 128 * 130).astype(np.int32)
    made = check(ops.cumsum, x, axis=0)
    assert [launch.name.partition("_i")[0] for launch in made.launches] == [
        "piece_totals", "piece_totals", "scan_columns", "scan_pieces", "scan_pieces"]


@pytest.mark.parametrize(("lines", "size", "wide"), [(1, 7 * 10**8, False), (1, 8 * 10**8, True), (3, 4 * 10**8, False),
                                                     (3, 7 * 10**8, True), (1500, 2**20, False)])
def test_where_distances_are_doubled_indices_are_wide_earlier(lines, size, wide):
    """Merging asks for the end of the second of two pieces, however far behind the last line that would be."""
    sorting = lower_cuda(ops.sort, (TensorType(float32, (lines, size)),),
                         {"axis": 1, "descending": False, "stable": True}).launches
    merging = [launch for launch in sorting if "merge_pieces" in launch.name]
    assert len(merging) == (size - 1).bit_length() - 11 and all(launch.wide == wide for launch in merging)
    if lines == 1:
        operands = [TensorType(float32, (8, 1)), TensorType(int64, (size,)), TensorType(float32, (size, 1))]
        adding = lower_cuda(ops.index_add, tuple(operands), {"axis": 0}).launches
        assert adding[-1].name.startswith("add_rows") and adding[-1].wide == wide


def test_scans_of_nothing():
    assert lowered(ops.cumsum, (np.zeros((3, 0), "f"),), {"axis": 1}).launches == ()
    assert lowered(ops.sort, (np.zeros((3, 0), "f"),), {"axis": 1, "descending": False, "stable": True}).launches == ()
    (found,), _ = on_gpu(ops.index_add, np.ones((3, 2), "f"), np.zeros(0, np.int64), np.zeros((0, 2), "f"), axis=0)
    assert found.tolist() == [[1, 1]] * 3


# ---- machine code ------------------------------------------------------------------------------------------------------

KERNELS = {
    "take": (ops.take, (np.zeros((9, 64), BF16), np.zeros(5, np.int64)), {"axis": 0}, ["LDG.E.128", "STG.E.128"]),
    "concat": (ops.concat, (np.zeros((9, 64), BF16),) * 2, {"axis": 1}, ["LDG.E.128", "STG.E.128"]),
    "index_update": (ops.index_update, (np.zeros((9, 64), BF16), np.zeros(5, np.int64), np.zeros((5, 64), BF16)),
                     {"axis": 0}, ["ATOMG.E.MAX.S32", "LDG.E.128"]),
    "index_add": (ops.index_add, (np.zeros((9, 64), "f"), np.zeros(5, np.int64), np.zeros((5, 64), "f")), {"axis": 0},
                  ["LDS", "FADD"]),
    "topk": (ops.topk, (np.zeros((2, 3000), "f"),), {"axis": 1, "k": 20, "descending": True}, ["LDS", "STS"]),
    "cumsum": (ops.cumsum, (np.zeros((2, 3000), "f"),), {"axis": 1}, ["SHFL.BFLY"]),
    "parted": (ops.sort, (np.zeros(3000, np.bool_),), {"axis": 0, "descending": True, "stable": True}, ["SHFL.BFLY"]),
    "counted": (ops.index_add, (np.zeros(9, np.int32), np.zeros(500, np.int32), np.zeros(500, np.int32)), {"axis": 0},
                ["ATOMS.ADD", "ATOMG.E.ADD"]),
    "counts": (ops.index_add, (np.zeros(9, np.int64), np.zeros(5, np.int64), np.zeros(5, np.int64)), {"axis": 0},
               ["ATOMG.E.ADD.64"]),
}


@pytest.mark.skipif(not toolchain.is_available() or toolchain._disassembler() is None,
                    reason="nvJitLink or nvdisasm is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_machine_code(architecture):
    """Nothing is spilled; rows move 16 bytes at a time; nothing depends on the order of atomic sums, which only
    integers have."""
    chosen = KERNELS if architecture == "sm_90" else ["take", "topk", "cumsum"]
    for op, arrays, attrs, wanted in [KERNELS[name] for name in chosen]:
        found = set()
        for source in dict.fromkeys(launch.source for launch in lowered(op, arrays, attrs).launches):
            cubin = toolchain.link([compile_ptx(source, architecture)], architecture)
            sass.assert_no_spills(cubin)
            for listing in toolchain.disassemble(cubin).values():
                sass.assert_no_double(listing)
                found |= set(sass.opcodes(listing))
        for word in wanted:
            assert any(code.startswith(word) for code in found), (op.name, word, sorted(found))
        floats = "F" if op is ops.index_add and arrays[0].dtype.kind == "i" else "(ADD|F)"
        assert not [code for code in found if re.match(rf"(ATOM|RED)\S*\.{floats}", code)]


# ---- products of integers ----------------------------------------------------------------------------------------------


INTEGERS = [s for s in SAMPLES["matmul"] if s.inputs[0].dtype in (np.uint8, np.int64)]


@pytest.mark.parametrize("sample", [*INTEGERS, *SAMPLES["int_matmul"]], ids=str)
def test_products_of_integers(sample):
    """Sums wrap around as on the CPU."""
    check(sample.op, *map(np.asarray, sample.inputs))


def test_a_product_of_bytes_with_what_follows():
    x, y = [rng.integers(-128, 128, shape).astype(np.int8) for shape in ((9, 30), (30, 21))]

    def function(x, y):
        product = ops.int_matmul(x, y)
        return ops.add(product, product)

    builder = GraphBuilder("quantized")
    inputs = [builder.input(t) for t in types_of((x, y))]
    with builder:
        graph = builder.build([function(*inputs)])
    (found,) = carry_out(fuse(graph), [x, y])
    np.testing.assert_array_equal(found, 2 * (x.astype(np.int32) @ y.astype(np.int32)))
