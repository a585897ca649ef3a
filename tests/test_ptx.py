"""The PTX interpreter: threads, warps, memory, and what it has to find in wrong kernels.

The texts are written by hand, so that all of this runs without any of NVIDIA's packages; kernels as the compiler writes
them are in test_cuda_toolchain.py, instructions one by one in test_ptx_instructions.py."""

import numpy as np
import pytest
from ptx import (
    SCHEDULES,
    Deadlock,
    Garbage,
    Machine,
    Misaligned,
    OutOfBounds,
    PtxError,
    Race,
    Uninitialized,
    Unsupported,
    execute,
    machine,
)
from ptx.parse import parse
from ptx.writing import kernel

# --- control flow and warps --------------------------------------------------------------------------------------------

def test_loops_of_different_lengths_and_nested_branches_come_together():
    """The Collatz length of every thread's number, then a sum over the warp."""
    text = kernel("""
add.u32 %r2, %r0, 1;
mov.u32 %r3, 0;
LOOP:
setp.eq.u32 %p1, %r2, 1;
@%p1 bra DONE;
and.b32 %r4, %r2, 1;
setp.eq.u32 %p2, %r4, 0;
@%p2 bra EVEN;
mad.lo.u32 %r2, %r2, 3, 1;
bra NEXT;
EVEN:
shr.u32 %r2, %r2, 1;
NEXT:
add.u32 %r3, %r3, 1;
bra LOOP;
DONE:
shfl.sync.bfly.b32 %r5, %r3, 1, 31, -1;
mad.wide.u32 %rd2, %r0, 8, %rd0;
st.global.v2.u32 [%rd2], {%r3, %r5};""", ("u64",))

    def length(n):
        return 0 if n == 1 else 1 + length(n // 2 if n % 2 == 0 else 3 * n + 1)

    out = execute(text, 1, 128, [Garbage((128, 2), np.uint32)])[0]
    expected = np.array([length(n + 1) for n in range(128)])
    assert (out[:, 0] == expected).all() and (out[:, 1] == expected[np.arange(128) ^ 1]).all()


def test_a_function_of_the_module_is_called():
    declarations = """
.func (.param .b32 result) twice_plus(.param .b32 x, .param .b32 y)
{ .reg .b32 %r<3>; ld.param.b32 %r0, [x]; ld.param.b32 %r1, [y]; setp_done: mad.lo.u32 %r2, %r0, 2, %r1;
  st.param.b32 [result+0], %r2; ret; }"""
    call = """{{ .param .b32 param0; st.param.b32 [param0+0], {0}; .param .b32 param1; st.param.b32 [param1+0], 7;
.param .b32 retval0; call.uni (retval0), twice_plus, (param0, param1); ld.param.b32 {1}, [retval0+0]; }}"""
    text = kernel(call.format("%r0", "%r5") + call.format("%r5", "%r6") + """
mad.wide.u32 %rd2, %r0, 4, %rd0;
st.global.u32 [%rd2], %r6;""", ("u64",), declarations)
    assert (execute(text, 1, 64, [Garbage(64, np.uint32)])[0] == 4 * np.arange(64) + 21).all()


def test_votes_and_reductions_of_a_warp():
    text = kernel("""
and.b32 %r2, %r0, 4;
setp.ne.u32 %p1, %r2, 0;
vote.sync.ballot.b32 %r3, %p1, -1;
vote.sync.any.pred %p2, %p1, -1;
vote.sync.all.pred %p3, %p1, -1;
selp.u32 %r4, 2, 0, %p2;
selp.u32 %r5, 1, 0, %p3;
or.b32 %r4, %r4, %r5;
redux.sync.add.u32 %r6, %r0, -1;
activemask.b32 %r7;
mad.wide.u32 %rd2, %r0, 16, %rd0;
st.global.v4.u32 [%rd2], {%r3, %r4, %r6, %r7};""", ("u64",))
    out = execute(text, 1, 64, [Garbage((64, 4), np.uint32)])[0]
    assert (out[:, 0] == 0xF0F0F0F0).all() and (out[:, 1] == 2).all() and (out[:, 3] == 0xFFFFFFFF).all()
    assert (out[:32, 2] == 496).all() and (out[32:, 2] == 496 + 32 * 32).all()


def test_segments_of_a_shuffle():
    text = kernel("""
shfl.sync.down.b32 %r2|%p1, %r0, 1, 6175, -1;
selp.u32 %r3, 1, 0, %p1;
mad.wide.u32 %rd2, %r0, 8, %rd0;
st.global.v2.u32 [%rd2], {%r2, %r3};""", ("u64",))                          # 0x181f: segments of 8 lanes
    out = execute(text, 1, 32, [Garbage((32, 2), np.uint32)])[0]
    lane = np.arange(32)
    inside = lane % 8 < 7
    assert (out[:, 0] == np.where(inside, lane + 1, lane)).all() and (out[:, 1] == inside).all()


def test_positions_in_three_dimensions():
    moves = "".join(f"mov.u32 %r{2 + k}, %{name}.{axis};\n" for k, (name, axis) in enumerate(
        (name, axis) for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"))
    stores = "".join(f"st.global.u32 [%rd2+{4 * k}], %r{2 + k};\n" for k in range(12))
    text = kernel(moves + """
mad.lo.u32 %r20, %r4, %r9, %r3;
mad.lo.u32 %r20, %r20, %r8, %r2;
mad.lo.u32 %r21, %r7, %r12, %r6;
mad.lo.u32 %r21, %r21, %r11, %r5;
mad.lo.u32 %r20, %r21, 24, %r20;
mad.wide.u32 %rd2, %r20, 48, %rd0;
""" + stores, ("u64",))
    out = execute(text, (3, 2, 2), (4, 3, 2), [Garbage((2, 2, 3, 2, 3, 4, 12), np.uint32)])[0]
    z, y, x, c, b, a = np.indices(out.shape[:-1])
    for k, expected in enumerate((a, b, c, x, y, z, 4, 3, 2, 3, 2, 2)):
        assert (out[..., k] == expected).all()


# --- memory: what has to be found --------------------------------------------------------------------------------------

def test_atomics_count_every_thread():
    text = kernel("""
and.b32 %r2, %r0, 3;
mad.wide.u32 %rd2, %r2, 4, %rd0;
red.global.add.u32 [%rd2], 1;
atom.global.max.u32 %r3, [%rd0+16], %r0;
atom.global.cas.b32 %r4, [%rd0+20], 7, 9;
red.global.add.f32 [%rd0+24], 0f3F000000;""", ("u64",))
    out = execute(text, 4, 64, [np.array([0, 0, 0, 0, 0, 7, 0], np.uint32)])[0]
    assert out[:6].tolist() == [64] * 4 + [63, 9] and out[6:].view(np.float32)[0] == 128


def test_out_of_bounds():
    text = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nst.global.u32 [%rd2+8], %r0;", ("u64",))
    with pytest.raises(OutOfBounds, match=r"k, line \d+: st.global.u32 \[%rd2\+8\], %r0: thread \(30, 0, 0\) of block "
                                          r"\(0, 0, 0\) .*writes 4 bytes of argument 0 \(128 bytes\) at byte 128"):
        execute(text, 1, 32, [np.zeros(32, np.uint32)])
    with pytest.raises(OutOfBounds, match="4 bytes before its begin"):
        execute(text.replace("+8]", "+-4]"), 1, 32, [np.zeros(32, np.uint32)])
    with pytest.raises(OutOfBounds, match="belongs to no buffer"):
        execute(text.replace("%rd0;\nst", "8;\nst"), 1, 32, [np.zeros(32, np.uint32)])
    shared = kernel("mov.u32 %r2, s;\nmad.lo.u32 %r2, %r0, 4, %r2;\nst.shared.u32 [%r2], %r0;", ("u64",),
                    ".shared .align 4 .b8 s[64];")
    with pytest.raises(OutOfBounds, match=r"thread \(16, 0, 0\).*writes 4 bytes of shared memory \(64 bytes\) at byte 64"):
        execute(shared, 1, 32, [np.zeros(1)])


def test_misaligned():
    text = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.u64 %rd3, [%rd2];", ("u64",))
    with pytest.raises(Misaligned, match=r"thread \(1, 0, 0\).*at byte 4, address 0x\w+, no multiple of 8"):
        execute(text, 1, 2, [np.zeros(32, np.uint32)])


def test_uninitialized():
    text = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.u32 %r2, [%rd2];\nst.global.u32 [%rd2], %r2;", ("u64",))
    with pytest.raises(Uninitialized, match=r"reads 4 bytes of argument 0 \(128 bytes\) at byte 0, which were never"):
        execute(text, 1, 32, [Garbage(32, np.uint32)])
    half = kernel("shl.b32 %r2, %r0, 1;\nmad.wide.u32 %rd2, %r2, 4, %rd0;\nst.global.u32 [%rd2], %r0;", ("u64",))
    with pytest.raises(Uninitialized, match=r"argument 0 \(128 bytes\): element 1 was never written, nor 15 others"):
        execute(half, 1, 16, [Garbage(32, np.uint32)])
    assert execute(half, 1, 16, [Garbage(32, np.uint32, partial=True)])[0][2] == 1
    for space, declaration in (("shared", ".shared .align 4 .b8 s[128];"), ("local", "")):
        inner = ".local .align 4 .b8 s[128];\n" if space == "local" else ""
        text = kernel(f"{inner}mov.u64 %rd2, s;\nld.{space}.u32 %r2, [%rd2+4];", ("u64",), declaration)
        with pytest.raises(Uninitialized, match=f"reads 4 bytes of {space} memory .* at byte 4"):
            execute(text, 1, 32, [np.zeros(1)])


def test_local_memory_is_each_thread_s_own():
    text = kernel("""
.local .align 8 .b8 depot[16];
mov.u64 %rd2, depot;
cvta.local.u64 %rd3, %rd2;
st.u32 [%rd3+4], %r0;
ld.local.u32 %r2, [%rd2+4];
mad.wide.u32 %rd4, %r0, 4, %rd0;
st.global.u32 [%rd4], %r2;""", ("u64",))
    assert (execute(text, 2, 32, [Garbage(32, np.uint32)], races=False)[0] == np.arange(32)).all()


def test_constants_are_read_only():
    table = ".const .align 4 .u32 t[4] = {10, 20, 0x1e, 40};"
    text = kernel("mov.u64 %rd2, t;\nld.const.u32 %r2, [%rd2+8];\nmad.wide.u32 %rd3, %r0, 4, %rd0;\n"
                  "st.global.u32 [%rd3], %r2;", ("u64",), table)
    assert (execute(text, 1, 8, [Garbage(8, np.uint32)])[0] == 30).all()
    with pytest.raises(OutOfBounds, match=r"writes t .*, which is constant"):
        execute(kernel("mov.u64 %rd2, t;\nst.u32 [%rd2], %r0;", ("u64",), table), 1, 8, [np.zeros(1)])


EXCHANGE = """
mov.u32 %r2, s;
mad.lo.u32 %r3, %r0, 4, %r2;
st.shared.u32 [%r3], %r0;
BARRIER
xor.b32 %r4, %r0, DISTANCE;
mad.lo.u32 %r5, %r4, 4, %r2;
ld.shared.u32 %r6, [%r5];
mad.wide.u32 %rd2, %r0, 4, %rd0;
st.global.u32 [%rd2], %r6;"""


def exchange(distance, barrier):
    body = EXCHANGE.replace("BARRIER", barrier).replace("DISTANCE", str(distance))
    return kernel(body, ("u64",), ".shared .align 4 .b8 s[512];")


@pytest.mark.parametrize("distance, barrier, good", [
    (32, "bar.sync 0;", True), (32, "barrier.sync 0;", True), (32, "bar.warp.sync -1;", False), (32, "", False),
    (1, "bar.warp.sync -1;", True), (1, "", False), (0, "", True)])
def test_a_race_is_found_where_a_barrier_is_missing(distance, barrier, good):
    arguments = [Garbage(128, np.uint32)]
    if good:
        assert (execute(exchange(distance, barrier), 1, 128, arguments)[0] == np.arange(128) ^ distance).all()
    else:
        with pytest.raises(Race, match=r"reads shared memory .* where a write by thread .* has no barrier in between"):
            execute(exchange(distance, barrier), 1, 128, arguments)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_who_read_before_a_barrier_does_not_race(barrier):
    """All read one place; behind the barrier one of them reads it again and writes it."""
    body = """
setp.eq.u32 %p1, %r0, 5;
mov.u32 %r2, 7;
@%p1 st.shared.u32 [s], %r2;
BARRIER
ld.shared.u32 %r3, [s];
BARRIER
@%p1 ld.shared.u32 %r3, [s];
@%p1 st.shared.u32 [s], %r0;
mad.wide.u32 %rd2, %r0, 4, %rd0;
st.global.u32 [%rd2], %r3;"""
    threads = 64 if barrier.startswith("bar.sync") else 32
    text = kernel(body.replace("BARRIER", barrier), ("u64",), ".shared .align 4 .b8 s[4];")
    assert (execute(text, 1, threads, [Garbage(threads, np.uint32)])[0] == 7).all()
    without = body.replace("BARRIER", barrier, 1).replace("BARRIER", "")
    with pytest.raises(Race, match=r"writes shared memory .* where a read by several threads"):
        execute(kernel(without, ("u64",), ".shared .align 4 .b8 s[4];"), 1, threads, [Garbage(threads, np.uint32)])


def test_schedules_show_a_missing_barrier_without_the_detector():
    with pytest.raises(PtxError, match="never written"):
        execute(exchange(32, ""), 1, 128, [Garbage(128, np.uint32)], races=False, schedules=["together", "in order"])
    last = kernel("st.global.u32 [%rd0], %r0;", ("u64",))
    with pytest.raises(PtxError, match="array 0 differs between the schedules 'in order' and 'reversed'"):
        execute(last, 1, 64, [Garbage(1, np.uint32)], races=False, schedules=["in order", "reversed"])


def test_blocks_race_in_global_memory():
    text = kernel("mov.u32 %r2, %ctaid.x;\nmad.wide.u32 %rd2, %r0, 4, %rd0;\nst.global.u32 [%rd2], %r2;", ("u64",))
    with pytest.raises(Race, match=r"writes argument 0 .* where a write of the same instruction by thread"):
        execute(text, 2, 1, [Garbage(1, np.uint32)])
    execute(text, 1, 32, [Garbage(32, np.uint32)])
    copy = kernel("mad.wide.u32 %rd2, %r0, 2, %rd0;\nst.global.u8 [%rd2], %r0;\nst.global.u8 [%rd2+1], %r0;", ("u64",))
    execute(copy, 1, 32, [Garbage(64, np.uint8)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deadlocks(schedule):
    half = kernel("setp.lt.u32 %p1, %r0, 16;\n@%p1 bra SKIP;\nbar.sync 0;\nSKIP:\nbar.sync 0;", ("u64",))
    with pytest.raises(Deadlock, match="lanes of one warp wait at different barriers"):
        execute(half, 1, 32, [np.zeros(1)], schedules=[schedule])
    gone = kernel("setp.lt.u32 %p1, %r0, 3;\n@%p1 ret;\nshfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;", ("u64",))
    with pytest.raises(Deadlock, match=r"shfl.sync.*waits for ever: .* 3 have ended"):
        execute(gone, 1, 32, [np.zeros(1)], schedules=[schedule])
    absent = kernel("setp.lt.u32 %p1, %r0, 16;\n@%p1 bra END;\n"
                    "shfl.sync.bfly.b32 %r2, %r0, 16, 31, 0xffff0000;\nEND:", ("u64",))
    with pytest.raises(Deadlock, match=r"reads lane 0, which is not in the mask"):
        execute(absent, 1, 32, [np.zeros(1)], schedules=[schedule])


def test_a_kernel_that_does_not_end(monkeypatch):
    monkeypatch.setattr(machine, "LIMIT", 1000)
    with pytest.raises(Deadlock, match="still runs after 1000 instructions"):
        execute(kernel("AGAIN: bra AGAIN;", ("u64",)), 1, 32, [np.zeros(1)])


def test_threads_that_have_ended_do_not_hold_up_a_barrier():
    text = kernel("setp.ge.u32 %p1, %r0, 40;\n@%p1 ret;\nbar.sync 0;\nmad.wide.u32 %rd2, %r0, 4, %rd0;\n"
                  "st.global.u32 [%rd2], %r0;", ("u64",))
    assert (execute(text, 1, 64, [Garbage(40, np.uint32)])[0] == np.arange(40)).all()


def test_what_is_unknown_is_said():
    with pytest.raises(Unsupported, match=r"no meaning is known of wgmma.fence.sync.aligned"):
        execute(kernel("wgmma.fence.sync.aligned;", ("u64",)), 1, 32, [np.zeros(1)])
    with pytest.raises(TypeError, match="k takes 1 arguments, 2 came"):
        execute(kernel("", ("u64",)), 1, 32, [np.zeros(1), 3])
    with pytest.raises(ValueError, match="'sideways' is none of"):
        execute(kernel("", ("u64",)), 1, 32, [np.zeros(1)], schedules=["sideways"])


def test_a_block_is_no_larger_than_the_kernel_was_made_for():
    text = kernel("", ("u64",)).replace(")\n{", ")\n.maxntid 64, 1, 1\n.minnctapersm 2\n{")
    execute(text, 1, (16, 4), [np.zeros(1)])
    with pytest.raises(PtxError, match=r"k was made for blocks of at most 64 threads, not for \(65, 1, 1\)"):
        execute(text, 1, 65, [np.zeros(1)])


def test_a_machine_keeps_its_memory_between_launches():
    text = kernel("mad.wide.u32 %rd2, %r0, 4, %rd0;\nld.global.u32 %r2, [%rd2];\nadd.u32 %r2, %r2, %r1;\n"
                  "st.global.u32 [%rd2], %r2;", ("u64", "u32"))
    gpu = Machine(text)
    x = gpu.put(np.arange(8, dtype=np.uint32), "x", skew=4)
    for step in range(3):
        gpu.launch(1, 8, [x, step])
    assert (gpu.get(x) == np.arange(8) + 3).all()


def test_parsing_keeps_scopes_and_lines_apart():
    text = kernel("{ .reg .pred q; setp.eq.u32 q, %r0, 1; }\n{ .reg .f32 q; mov.f32 q, 0f00000000; } // here\n"
                  "/* none\n*/ A: bra A;")
    module = parse(text)
    code = module.kernels["k"].code
    assert [i.operands[0] for i in code if i.opcode[0] in ("setp", "mov")][1:] == ["q", "q'"]
    assert module.kernels["k"].labels["A"] == len(code) - 2
    assert all(i.text in text.split("\n")[i.line - 1] for i in code)
