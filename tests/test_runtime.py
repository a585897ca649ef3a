"""Kernels made from text, plain and native; plans, their threads, host calls and errors."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jitgrad import config, objectfile
from jitgrad.codegen.plain import run_plain
from jitgrad.errors import CompileError, DivisionByZeroError, OutOfRangeError
from jitgrad.ir.types import TensorType, parse_type
from jitgrad.kernels.cpu import tape
from jitgrad.runtime import build, memory, native, threads
from jitgrad.runtime.memory import Arena, ArenaPool, size_class
from jitgrad.runtime.plan import Entry, HostCall, Output, Plan, PlanSpec
from jitgrad.runtime.spec import read_attr, write_attr

ADD = """
def add(args, begin, end, thread):
    x = pointer(args, 1, f32)
    y = pointer(args, 2, f32)
    o = pointer(args, 3, f32)
    n = args[4]
    for i in range(begin, end):
        for j in range(n):
            v0 = load(x, i * n + j, 0, 3)
            v1 = load(y, i * n + j, 1, 3)
            store(o, i * n + j, f32(v0 + v1), 2, 3)
"""

ROWS = """
def rows(args, begin, end, thread):
    x = pointer(args, 1, f32)
    o = pointer(args, 2, f32)
    n = args[3]
    for i in range(begin, end):
        total = f32(0)
        largest = load(x, i * n, 0, 2)
        for j in range(n):
            v = load(x, i * n + j, 0, 2)
            total = reassociate_add(total, f32(v * v))
            largest = reassociate_max(largest, v)
        store(o, i, f32(total + largest), 1, 2)
"""

PICK = """
def pick(args, begin, end, thread):
    x = pointer(args, 1, f32)
    index = pointer(args, 2, i64)
    o = pointer(args, 3, f32)
    n = args[4]
    for i in range(begin, end):
        k = load(index, i, 1, 3)
        if k < 0 or k >= n:
            fail(args, 1, i, k)
            k = i64(0)
        store(o, i, load(x, k, 0, 3), 2, 3)
"""

CONVERT = """
def convert(args, begin, end, thread):
    x = pointer(args, 1, SOURCE)
    o = pointer(args, 2, TARGET)
    for i in range(begin, end):
        store(o, i, TARGET(load(x, i, 0, 2)), 1, 2)
"""

THREADS = """
def who(args, begin, end, thread):
    o = pointer(args, 1, i64)
    n = args[2]
    for i in range(begin, end):
        total = i64(0)
        for j in range(n):
            total = i64((total ^ j) * 3)
        store(o, i, -1 if total == 987654321 else thread, 0, 1)
"""


def compile_all(sources):
    from jitgrad.codegen.native import compile_sources
    return compile_sources(sources)


build.set_compiler(compile_all)


def plan_of(types: list[str], outputs: list[str], *steps: tuple, arena: int = 0, constants: bytes = b"") -> Plan:
    """A plan whose outputs are fresh; a step is (text, items, arguments) or a HostCall."""
    entries, sources = [], {}
    for number, step in enumerate(steps):
        if isinstance(step, HostCall):
            entries.append(Entry(step.op, None, step, 1, (), number))
            continue
        text, items, arguments = step
        key = build.kernel_key(text)
        sources[key] = text
        entries.append(Entry(f"step{number}", key, None, items, arguments, number))
    spec = PlanSpec(tuple(map(parse_type, types)),
                    tuple(Output(parse_type(t), ("output", k)) for k, t in enumerate(outputs)),
                    (), constants, arena, tuple(entries), sources)
    return Plan(spec, build.kernels([(text, "test") for text in sources.values()]),
                [("train.py", number) for number in range(len(steps))])


def add_plan(rows: int, columns: int, items: int | None = None) -> Plan:
    kind = f"f32[{rows}, {columns}]"
    items = rows if items is None else items
    return plan_of([kind, kind], [kind],
                   (ADD, items, (("input", 0), ("input", 1), ("output", 0), rows * columns // max(items, 1))))


def run_native(text: str, arrays: list, items: int) -> tuple[int, int, int]:
    """Call a kernel directly; the error word."""
    context = np.zeros(16, np.int64)
    args = np.array([context.ctypes.data, *[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arrays]])
    native.function(build.kernel(text, "test"))(args.ctypes.data, 0, items, 0)
    return tuple(context[:3].tolist())


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


# Kernels: plain and native

def test_plain_and_native_agree():
    x, plain, compiled = random(5, 33), np.empty(5, np.float32), np.empty(5, np.float32)
    assert run_plain(ROWS, "rows", [x, plain, 33], 0, 5) is None
    run_native(ROWS, [x, compiled, 33], 5)
    np.testing.assert_allclose(plain, compiled, rtol=1e-6)
    np.testing.assert_allclose(compiled, (x * x).sum(1) + x.max(1), rtol=1e-6)


def test_plain_checks_every_access():
    x, o = np.zeros(4, np.float32), np.zeros(2, np.float32)
    with pytest.raises(IndexError, match=r"add, operand 3: element 2 of 2 \(float32\)"):
        run_plain(ADD, "add", [x, x, o, 4], 0, 1)
    with pytest.raises(TypeError, match="operand 1: read as float32, but it holds int32"):
        run_plain(ADD, "add", [x.astype(np.int32), x, x, 4], 0, 1)


def test_the_error_of_the_lowest_item_stays():
    x, o = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    index = np.array([1, 9, 2, -5])
    assert run_plain(PICK, "pick", [x, index, o, 4], 0, 4) == (1, 1, 9)
    assert run_native(PICK, [x, index, o, 4], 4) == (1, 1, 9)
    assert o.tolist() == [1, 0, 2, 0]


NUMBERS = [0.0, -0.0, 1.5, -1.5, 2.5, 255.7, 300.0, -129.0, 65504.0, 65519.9, 65520.0, 1e-8, 3e-8, 6.1e-5, 5.9e-5,
           1e10, -1e10, 3e38, np.inf, -np.inf, np.nan, 1 / 3, 2.0 ** -24, 2.0 ** -25, 2.0 ** -26, 1.00390625]


@pytest.mark.parametrize("target", ["f64", "i64", "i32", "i16", "i8", "u8", "u32", "boolean"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_casts_from_floats_are_those_of_numpy(source, target):
    kinds = {"f64": "f8", "f32": "f4", "i64": "i8", "i32": "i4", "i16": "i2", "i8": "i1", "u8": "u1", "u32": "u4",
             "boolean": "?"}
    x = np.array(NUMBERS, kinds[source])
    with np.errstate(all="ignore"):
        expected = np.array([x[k:k + 1].astype(kinds[target])[0] for k in range(x.size)])
    text = CONVERT.replace("SOURCE", source).replace("TARGET", target)
    for run in (lambda o: run_plain(text, "convert", [x, o], 0, x.size), lambda o: run_native(text, [x, o], x.size)):
        o = np.empty(x.size, kinds[target])
        run(o)
        np.testing.assert_array_equal(o, expected)


@pytest.mark.parametrize("name, kind", [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_16_bit_floats(name, kind):
    x = np.concatenate([np.array(NUMBERS, np.float32), random(4096) * np.exp2(random(4096) * 12)]).astype(np.float32)
    narrow = np.empty(x.size, kind)
    run_native(CONVERT.replace("SOURCE", "f32").replace("TARGET", name), [x, narrow], x.size)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(narrow.astype(np.float32), x.astype(kind).astype(np.float32))
    every = np.arange(1 << 16, dtype=np.uint16).view(kind)
    wide = np.empty(every.size, np.float32)
    run_native(CONVERT.replace("SOURCE", name).replace("TARGET", "f32"), [every, wide], every.size)
    np.testing.assert_array_equal(wide, every.astype(np.float32))


def test_vector_width_and_named_targets():
    from jitgrad.codegen import native as compiler
    for level, register in {"x86-64": "xmm", "x86-64-v3": "ymm", "x86-64-v4": "zmm", "aarch64": ".4s"}.items():
        assert register in compiler.assembly(ROWS, "rows", compiler.named_target(level))
    with pytest.raises(CompileError, match="x86-64-v3, x86-64-v4, znver4, aarch64"):
        compiler.named_target("v5")


def test_many_operands_vectorize():
    from jitgrad.codegen import native as compiler
    n = 34
    lines = ["def many(args, begin, end, thread):", "    n = args[35]"]
    lines += [f"    p{k} = pointer(args, {k + 1}, f32)" for k in range(n)]
    lines += ["    for i in range(n):", "        s = load(p0, i, 0, 34)"]
    lines += [f"        s = f32(s + load(p{k}, i, {k}, 34))" for k in range(1, 24)]
    lines += [f"        store(p{k}, i, f32(s * f32({k})), {k}, 34)" for k in range(24, n)]
    assert "zmm" in compiler.assembly("\n".join(lines), "many", compiler.named_target("x86-64-v4"))


def test_compile_errors_name_the_kernel_and_show_no_numba_traceback():
    from jitgrad.codegen.native import compile_source
    for text in ("def broken(args, begin, end, thread):\n    return nobody(args)\n", "x = (", "x = 1"):
        with pytest.raises(CompileError, match="broken_kernel: ") as caught:
            compile_source(text, "broken_kernel")
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


# Object files

def test_a_damaged_or_foreign_object_is_refused_before_it_is_loaded():
    from jitgrad.codegen.native import compile_source, named_target
    whole = compile_source(ADD, "add")
    assert native.load(whole, "add")
    for size in (0, 3, 40, 64, 300, len(whole) - 1):
        with pytest.raises(CompileError, match="add: its object code cannot be loaded"):
            native.load(whole[:size], "add")
    with pytest.raises(CompileError, match="another processor"):
        native.load(compile_source(ADD, "add", named_target("aarch64")), "add")


def emitted(text, target=None):
    """The object file of LLVM text for a target, this machine if there is none."""
    from llvmlite import binding as llvm

    from jitgrad.codegen import native as compiler
    target = target or compiler.host_target()
    module = llvm.parse_assembly(text)
    module.triple = target.triple
    return compiler._emit(module, target)


@pytest.mark.parametrize("text, problem", [
    ("declare void @unheard_of()\ndefine void @kernel() {\n call void @unheard_of()\n ret void\n}", "unheard_of"),
    ("@count = global i64 1\ndefine i64 @kernel() {\n %n = load i64, ptr @count\n ret i64 %n\n}", "variables"),
    ("@zeros = global [9 x i64] zeroinitializer\ndefine ptr @kernel() {\n ret ptr @zeros\n}", "variables|type"),
    ("define void @other() {\n ret void\n}", "does not define 'kernel'")])
def test_what_an_object_may_not_have(text, problem):
    with pytest.raises(CompileError, match=f"odd: its object code cannot be loaded: .*({problem})"):
        native.load(emitted(text), "odd")


REACHING = """
@table = internal constant [4 x double] [double 8.0, double 27.0, double 64.0, double 125.0]
@bytes = internal constant [5 x i8] c"\\01\\02\\03\\04\\05"
declare double @cbrt(double)
define internal double @inner(double %x, i64 %k) noinline {
  %p = getelementptr [5 x i8], ptr @bytes, i64 0, i64 %k
  %b = load i8, ptr %p
  %n = uitofp i8 %b to double
  %r = fmul double %x, %n
  ret double %r
}
define void @kernel(ptr %args, i64 %begin, i64 %end, i64 %thread) {
  %p = getelementptr [4 x double], ptr @table, i64 0, i64 %begin
  %x = load double, ptr %p
  %root = call double @cbrt(double %x)
  %y = call double @inner(double %root, i64 %end)
  %z = fadd double %y, 0x400921FB54442D18
  store double %z, ptr %args
  ret void
}
"""


def test_code_reaches_its_constants_its_functions_and_those_outside():
    result = np.zeros(1)
    call = native.function(native.load(emitted(REACHING), "reaching"))
    for i, k in ((0, 1), (3, 4)):
        call(result.ctypes.data, i, k, 0)
        assert result[0] == (i + 2) * (k + 1) + np.pi


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
def test_code_cannot_be_overwritten():
    address = native.load(emitted(REACHING), "reaching")
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split()
        first, last = [int(x, 16) for x in span.split("-")]
        if first <= address < last:
            assert permissions.startswith("r-x")
            return
    raise AssertionError("not mapped")


BASE, OUTSIDE = 0x7F12_3456_7000, 0x7FFF_1111_2228


def test_relocations_of_the_other_processor():
    """The addresses that patched instructions of ARMv8 name, read back out of them."""
    from jitgrad.codegen.native import named_target
    file = objectfile.check(emitted(REACHING, named_target("aarch64")), "aarch64")
    memory = file.placed_at(BASE, {"cbrt": OUTSIDE}.__getitem__)
    pages, kinds = {}, set()
    for r in file.relocations:
        word, place = int.from_bytes(memory[r.place:r.place + 4], "little"), BASE + r.place
        opcode = word >> 24
        if opcode & 0x9F == 0x90:                                               # ADRP
            number = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
            number -= (number >> 20) << 21
            pages[word & 31] = (place & -4096) + number * 4096
            kinds.add("page")
        elif opcode in (0x94, 0x14):                                            # BL, B
            number = word & 0x3FFFFFF
            reached = place + 4 * (number - ((number >> 25) << 26))
            if r.target == "cbrt":                                              # by a bridge
                bridge = memory[reached - BASE:reached - BASE + 16]
                assert bridge[:8] == bytes.fromhex("5000005800021fd6")          # ldr x16, 8; br x16
                assert int.from_bytes(bridge[8:], "little") == OUTSIDE
            else:
                assert reached == BASE + r.target + r.addend
            kinds.add("branch" if isinstance(r.target, int) else "outside")
        elif opcode in (0x91, 0xFD, 0x39, 0x3D):                                # ADD, LDR of a double, of a byte
            size = 3 if opcode == 0xFD else 0
            reached = pages[word >> 5 & 31] + ((word >> 10 & 0xFFF) << size)
            assert reached == BASE + r.target + r.addend
            kinds.add("in page")
        else:                                                                   # a distance between two places
            assert place + int.from_bytes(memory[r.place:r.place + 4], "little", signed=True) == BASE + r.target + r.addend
    assert {"page", "in page", "outside"} <= kinds


def test_what_does_not_reach_is_refused():
    from jitgrad.codegen.native import named_target
    file = objectfile.check(emitted(REACHING, named_target("aarch64")), "aarch64")
    branch = next(r for r in file.relocations if r.target == "cbrt")
    far = replace(file, relocations=(replace(branch, addend=1 << 28),))
    with pytest.raises(objectfile.ObjectError, match="does not reach"):
        far.placed_at(BASE, lambda name: OUTSIDE)
    with pytest.raises(objectfile.ObjectError, match="there is no 'cbrt'"):
        file.placed_at(BASE, lambda name: 0)


def test_damaged_object_files_are_refused_or_read():
    """Of bytes that are not what they were, reading says so, or makes what can be placed; it never fails otherwise."""
    rng, whole, refused = np.random.default_rng(0), emitted(REACHING), 0
    for _ in range(3000):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            file = objectfile.check(bytes(data), native.platform.machine())
            assert len(file.placed_at(BASE, lambda name: OUTSIDE)) == file.size
            assert 0 <= file.entry < len(file.contents)
        except objectfile.ObjectError:
            refused += 1
    assert 300 < refused < 3000


# Plans

def test_a_plan_computes_and_survives_json():
    plan = add_plan(8, 16)
    x = random(8, 16)
    assert PlanSpec.from_json(plan.spec.to_json()) == plan.spec
    np.testing.assert_array_equal(plan.run([x, x])[0], x + x)


def test_execute_works_on_addresses():
    plan, x, o = add_plan(2, 2), random(2, 2), np.empty((2, 2), np.float32)
    plan.pointers[:] = [x.ctypes.data, x.ctypes.data, o.ctypes.data]
    plan.execute()
    np.testing.assert_array_equal(o, x + x)


def test_arena_constants_and_outputs_that_share_memory():
    constants = np.full(4, 10, np.float32).tobytes()
    kind = parse_type("f32[4]")
    key = build.kernel_key(ADD)
    entries = (Entry("one", key, None, 1, (("input", 0), ("constant", 0), ("arena", 64), 4)),
               Entry("two", key, None, 1, (("arena", 64), ("input", 0), ("output", 0), 4)),
               Entry("three", key, None, 1, (("output", 1), ("output", 1), ("output", 1), 4)))
    flat, square = kind, parse_type("f32[2, 2]")
    spec = PlanSpec((kind,), (Output(flat, ("output", 0)), Output(square, ("output", 0)), Output(kind, ("input", 0)),
                              Output(kind, ("constant", 0)), Output(kind, ("arena", 64))), (), constants, 128, entries)
    plan, x = Plan(spec, build.kernels([(ADD, "add")])), random(4)
    first, view, same, ten, inner = plan.run([x])
    np.testing.assert_allclose(first, 2 * (2 * x + 10), rtol=1e-6)
    assert np.shares_memory(first, view) and view.shape == (2, 2)
    assert same is x and ten.tolist() == [10] * 4
    np.testing.assert_array_equal(inner, x + np.float32(10))
    assert ten.flags.writeable and not np.shares_memory(inner, plan.run([x])[4])


def test_empty_values():
    plan = add_plan(0, 4, items=0)
    assert plan.run([np.empty((0, 4), np.float32)] * 2)[0].shape == (0, 4)


@pytest.mark.parametrize("change", [
    {"arena": -1}, {"written": [3]}, {"inputs": ["f32[4"]}, {"outputs": [["f32[4]", ["heap", 0]]]}, {"sources": None},
    {"outputs": [["f32[4000]", ["constant", 0]]]}, {"constants": "?"}, {"written": [True]}, {"entries": [{}]}])
def test_json_that_is_no_plan_is_refused(change):
    import json
    data = json.loads(add_plan(2, 2).spec.to_json())
    with pytest.raises(ValueError):
        PlanSpec.from_json(json.dumps({**data, **change}))


def test_a_place_outside_of_memory_is_refused():
    spec = add_plan(2, 2).spec
    for arguments in ((("arena", 0), ("input", 7)), (("constant", 1),), (1 << 63,)):
        with pytest.raises(ValueError, match="not a plan"):
            replace(spec, entries=(replace(spec.entries[0], arguments=arguments),))


def test_attributes_survive_json():
    from jitgrad import dtypes
    attrs = {"a": (1, (2.5, -0.0)), "b": None, "c": True, "d": dtypes.bfloat16, "e": 1 + 2j, "f": "x",
             "g": TensorType(dtypes.float32, (2, 3)), "h": float("inf")}
    assert read_attr(write_attr(attrs)) == attrs
    assert np.isnan(read_attr(write_attr(float("nan"))))
    with pytest.raises(TypeError):
        write_attr({1})


# Errors and host calls

def test_an_error_stops_the_plan_before_later_entries():
    kind, index = "f32[4]", "i64[4]"
    plan = plan_of([kind, index], [kind, kind],
                   (PICK, 4, (("input", 0), ("input", 1), ("output", 0), 4)),
                   (ADD, 1, (("input", 0), ("input", 0), ("input", 0), 4)))
    x = random(4)
    before = x.copy()
    with pytest.raises(OutOfRangeError, match=r"step0: index 7 is out of range  \(train.py:0\)"):
        plan.run([x, np.array([0, 7, 1, 8])])
    np.testing.assert_array_equal(x, before)
    plan.run([x, np.array([0, 1, 2, 3])])
    np.testing.assert_array_equal(x, before + before)


def test_division_by_zero():
    text = "def divide(args, begin, end, thread):\n    fail(args, 2, begin, 0)\n"
    with pytest.raises(DivisionByZeroError, match="integer division by zero"):
        plan_of([], [], (text, 1, ())).run([])


def test_host_calls_run_between_kernels():
    kind = parse_type("f32[4]")
    host = HostCall("exp", {}, ((("arena", 0), kind),), ((("arena", 64), kind),))
    plan = plan_of(["f32[4]"], ["f32[4]"],
                   (ADD, 1, (("input", 0), ("input", 0), ("arena", 0), 4)), host,
                   (ADD, 1, (("arena", 64), ("input", 0), ("output", 0), 4)), arena=128)
    assert PlanSpec.from_json(plan.spec.to_json()) == plan.spec
    x = random(4)
    np.testing.assert_allclose(plan.run([x])[0], np.exp(x + x) + x, rtol=1e-6)


def test_an_exception_in_a_host_call_leaves_the_plan_usable():
    from jitgrad import dtypes
    host = HostCall("reshape", {"shape": (3,)}, ((("input", 0), parse_type("f32[4]")),),
                    ((("output", 0), parse_type("f32[3]")),))
    plan = plan_of(["f32[4]"], ["f32[3]"], host)
    for _ in range(3):
        with pytest.raises(ValueError):
            plan.run([random(4)])
    assert len(plan._idle) == 1 and dtypes.float32


# Threads

def test_results_do_not_depend_on_the_number_of_threads():
    x = random(512, 2048)
    plan = plan_of(["f32[512, 2048]"], ["f32[512]"], (ROWS, 512, (("input", 0), ("output", 0), 2048)))
    results = []
    for count in (1, 2, 3, 7):
        with config.scope(num_threads=count):
            results += [plan.run([x])[0] for _ in range(5)]
    assert all(np.array_equal(results[0], r) for r in results)


def test_threads_share_an_entry_that_takes_long():
    plan = plan_of([], ["i64[64]"], (THREADS, 64, (("output", 0), 200_000)))
    with config.scope(num_threads=2):
        seen = set().union(*[plan.run([])[0].tolist() for _ in range(5)])
    assert seen == {0, 1}
    with config.scope(num_threads=1):
        assert set(plan.run([])[0].tolist()) == {0}


def test_short_entries_stay_on_the_callers_thread():
    plan = plan_of([], ["i64[8]"], (THREADS, 8, (("output", 0), 10)))
    with config.scope(num_threads=2):
        plan.run([])                                  # the first run is shared, to see how long it takes
        alone = [set(plan.run([])[0].tolist()) == {0} for _ in range(60)]
    assert sum(alone) >= 30                           # but for those before which another program held up a thread


def arena_plan(n: int) -> Plan:
    """(x + y) + y by way of the arena, less y by way of a host call."""
    kind = parse_type(f"f32[{n}]")
    host = HostCall("sub", {}, ((("output", 0), kind), (("input", 1), kind)), ((("output", 0), kind),))
    return plan_of([str(kind)] * 2, [str(kind)],
                   (ADD, 1, (("input", 0), ("input", 1), ("arena", 0), n)),
                   (ADD, 1, (("arena", 0), ("input", 1), ("output", 0), n)), host, arena=4 * n)


def test_many_python_threads_run_plans_at_once():
    plans = [add_plan(64, 512), add_plan(32, 4096), add_plan(2, 2), arena_plan(64), arena_plan(1 << 15)]
    failures = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(40):
            plan = plans[generator.integers(len(plans))]
            x = generator.integers(-99, 99, plan.spec.inputs[0].shape).astype(np.float32)
            if not np.array_equal(plan.run([x, x])[0], x + x):
                failures.append(seed)

    with config.scope(num_threads=2):
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_stopped_threads_start_again():
    plan, x = add_plan(256, 4096), random(256, 4096)
    with config.scope(num_threads=3):
        for _ in range(3):
            np.testing.assert_array_equal(plan.run([x, x])[0], x + x)
            plan.run([x, x])
            threads.stop()
            assert threads._word(tape.WORKERS).value == 0


def in_child(code: str, **environment: str) -> str:
    """Run `code` in another process with this process's cache; what it printed."""
    setting = {**os.environ, "JITGRAD_CACHE": str(config.current().cache), **environment}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=setting, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORK = """
import os, numpy as np, threading
from jitgrad import config
from jitgrad.runtime import threads
from jitgrad.runtime.plan import PlanSpec, load_plan
plan = load_plan(PlanSpec.from_json(open(%r).read()))
x = np.ones((256, 4096), np.float32)
config.update(num_threads=2)
busy = True
def work():
    while busy: plan.run([x, x])
other = threading.Thread(target=work); other.start()
for _ in range(5):
    plan.run([x, x])
    child = os.fork()
    if child == 0:
        good = all((plan.run([x, x])[0] == 2).all() for _ in range(5))
        os._exit(0 if good and len(threads._handles) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
busy = False
other.join()
print("done")
"""


def test_fork_while_threads_run(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(add_plan(256, 4096).spec.to_json())
    assert in_child(FORK % str(file)) == "done"


def test_a_warm_process_needs_neither_numba_nor_llvmlite(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(add_plan(8, 8).spec.to_json())
    assert in_child(f"""
        import sys
        import jitgrad.runtime.plan as runtime
        import numpy as np
        plan = runtime.load_plan(runtime.PlanSpec.from_json(open({str(file)!r}).read()))
        x = np.ones((8, 8), np.float32)
        assert (plan.run([x, x])[0] == 2).all()
        assert not {{"numba", "llvmlite"}} & set(sys.modules)
        print("warm")""") == "warm"


def test_what_llvm_says_of_this_machine_is_kept(tmp_path):
    """Asked once, found by the next process; what is damaged is asked again."""
    code = """
        import sys
        from jitgrad import config, processors
        from jitgrad.runtime import cache
        found = config.processor()
        print("llvmlite" in sys.modules, found == processors._ask())"""
    env = {"JITGRAD_CACHE": str(tmp_path / "cache")}
    assert in_child(code, **env) == "True True"
    assert in_child(code, **env) == "False True"
    file, = (tmp_path / "cache" / "processors").glob("??/*")
    file.write_bytes(file.read_bytes()[:-3])
    assert in_child(code, **env) == "True True"


def test_the_interpreter_ends_while_a_thread_is_in_a_plan(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(add_plan(256, 4096).spec.to_json())
    assert in_child(f"""
        import threading, time, numpy as np
        from jitgrad.runtime.plan import PlanSpec, load_plan
        plan = load_plan(PlanSpec.from_json(open({str(file)!r}).read()))
        x = np.ones((256, 4096), np.float32)
        def work():
            while True: plan.run([x, x])
        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
        print("end")""") == "end"


def test_a_long_plan_can_be_interrupted():
    import signal
    step = (THREADS, 4, (("output", 0), 20_000_000))
    plan = plan_of([], ["i64[4]"], *[step] * 100)
    with config.scope(num_threads=1), pytest.raises(KeyboardInterrupt):
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        plan.run([])


def test_number_of_threads_comes_from_the_settings():
    with config.scope(num_threads=5):
        assert threads.limit() == 5
    assert 1 <= threads.available() <= (os.cpu_count() or 1)


# Arenas

def test_idle_arenas_are_shared_up_to_a_limit():
    pool = ArenaPool(limit=3000)
    first, second = pool.lend(1024), pool.lend(1024)
    assert first is not second and first.address % 64 == 0
    pool.give_back(first)
    assert pool.lend(1024) is first
    for arena in (first, second, Arena(2048)):
        pool.give_back(arena)
    assert pool.idle_bytes <= 3000
    pool.clear()
    assert pool.idle_bytes == 0


def test_a_larger_idle_arena_serves_where_none_of_the_size_is_idle():
    pool = ArenaPool()
    small, large, huge = Arena(1024), Arena(2048), Arena(1 << 20)
    for arena in (large, huge):
        pool.give_back(arena)
    assert pool.lend(1024) is large and pool.idle_bytes == huge.size
    assert pool.lend(1024).size == 1024                     # the huge one is left to those that need it
    for arena in (large, small):
        pool.give_back(arena)
    assert pool.lend(1024) is small and pool.lend(1024) is large
    assert pool.lend(4096).size == 4096                     # never a smaller one
    pool.give_back(huge)
    assert pool.idle_bytes == 2 * huge.size


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="arenas grow on Linux")
def test_an_arena_that_grows_keeps_its_pages():
    resource = pytest.importorskip("resource")
    pool = ArenaPool()
    arena = pool.lend(2 * memory.LARGE)
    arena.bytes[:] = 7
    pool.give_back(arena)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    larger = pool.lend(3 * memory.LARGE)
    assert larger is arena and len(larger.bytes) == larger.size == 3 * memory.LARGE and larger.address % 64 == 0
    assert (larger.bytes[:2 * memory.LARGE] == 7).all()
    larger.bytes[:] = 8
    new = memory.LARGE // mmap.PAGESIZE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1.5 * new
    pool.give_back(larger)
    assert pool.idle_bytes == larger.size and pool.lend(64 * memory.LARGE) is not arena


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="arenas grow on Linux")
def test_an_arena_that_somebody_looks_at_does_not_grow():
    pool = ArenaPool()
    arena = pool.lend(memory.LARGE)
    held = arena.bytes[5:9]
    held[:] = 3
    pool.give_back(arena)
    other = pool.lend(2 * memory.LARGE)
    other.bytes[:] = 0
    assert other is not arena and (held == 3).all() and (arena.bytes[5:9] == 3).all()
    assert pool.lend(memory.LARGE) is arena


def test_size_classes_waste_little():
    for nbytes in (1, 64, 65, 1000, 4097, 123_456_789):
        assert nbytes <= size_class(nbytes) < max(nbytes + 64, nbytes * 1.126)
        assert size_class(size_class(nbytes)) == size_class(nbytes)


FAULTS = """
import resource
import numpy as np
import jitgrad
def work():
    arrays = [np.ones(1 << 20) for _ in range(16)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts faults of pages")
def test_freed_memory_is_kept():
    """128 MiB are freed and taken again, in pages of 4 KiB or of 2 MiB."""
    def faults(**environment):
        return int(subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True,
                                  env={**os.environ, **environment}).stdout)

    if not memory.keep_freed_memory():
        pytest.skip("the C library is not glibc, or is told by its own variables")
    assert faults() < 100
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > 100          # the user's own word
