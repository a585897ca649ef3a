"""The runtime on the CUDA driver, with the stand-in: memory, streams, events, code, launches, graphs."""

import ctypes
import gc
import itertools
import os
import sys
import threading

import numpy as np
import pytest

import jitgrad as jg
from jitgrad.errors import DeviceError
from jitgrad.runtime.cuda import array, driver, launch, memory, pinned, streams
from jitgrad.runtime.cuda.launch import ConstantBlock, Copy, Launch, LaunchPlan, Slot
from jitgrad.runtime.cuda.module import Module

MIB = 1 << 20


# the driver

def test_every_function_of_the_driver_is_checked_and_named(standin):
    standin.fail["cuStreamCreateWithPriority"] = 719
    with pytest.raises(driver.DriverError, match=r"cuStreamCreateWithPriority failed: CUDA_ERROR_LAUNCH_FAILED \(said "
                                                 r"by the stand-in\)  \(test_cuda_runtime.py:\d+\)") as caught:
        jg.cuda.Stream()
    assert caught.value.code == 719 and caught.value.name == "CUDA_ERROR_LAUNCH_FAILED"


def test_the_stand_in_has_every_function_that_is_declared():
    from cuda_standin import StandIn
    assert [name for name in driver.PROTOTYPES if not hasattr(StandIn, f"_{name}")] == []


def test_a_driver_that_lacks_a_function_says_so_when_it_is_used(connect, monkeypatch):
    from cuda_standin import StandIn
    monkeypatch.delattr(StandIn, "_cuGraphLaunch")
    connect()
    x = jg.ones(3, device="cuda")
    plan = LaunchPlan([Copy(Slot(0), Slot(0), 4)], 1, driver.gpu())
    plan.bind([x.data_ptr()])
    plan.run()
    with pytest.raises(DeviceError, match=r"no function cuGraphLaunch.*Update the NVIDIA driver"):
        plan.replay()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_that_it_cannot_use_cuda(standin):
    x = jg.ones(3, device="cuda")
    calls = len(standin.calls)
    child = os.fork()
    if not child:
        try:
            jg.ones(3, device="cuda")
        except DeviceError as error:
            x = None                                   # gives nothing back to the parent's driver
            os._exit(0 if "forked" in str(error) and len(standin.calls) == calls else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert x.tolist() == [1, 1, 1]


# memory

def test_memory_is_used_again_by_the_same_stream(standin):
    x = jg.zeros(1000, device="cuda")
    first, calls = x.data_ptr(), standin.calls.count("cuMemAlloc_v2")
    del x
    y = jg.zeros(900, device="cuda")
    assert y.data_ptr() == first and standin.calls.count("cuMemAlloc_v2") == calls
    with jg.cuda.stream(jg.cuda.Stream()):
        assert jg.zeros(900, device="cuda").data_ptr() != first
        del y
        assert jg.zeros(900, device="cuda").data_ptr() != first            # of another stream


def test_statistics_and_peaks(standin):
    x = jg.zeros(1000, device="cuda")                                      # 4,000 bytes: 8 times 512
    y = jg.zeros(MIB, device="cuda")
    assert jg.cuda.memory_allocated() == 4096 + 4 * MIB and jg.cuda.memory_reserved() == 22 * MIB
    del y
    assert jg.cuda.memory_allocated() == 4096 and jg.cuda.max_memory_allocated() == 4096 + 4 * MIB
    assert jg.cuda.memory_allocated(1) == 0
    jg.cuda.reset_peak_memory_stats()
    assert jg.cuda.max_memory_allocated() == 4096 and jg.cuda.max_memory_reserved() == 22 * MIB
    found = jg.cuda.memory_stats()
    assert found["allocation.all.allocated"] == 2 and found["allocation.all.freed"] == 1
    assert found["segment.all.current"] == 2 and found["allocated_bytes.all.freed"] == 4 * MIB
    assert "4.00 KiB" in jg.cuda.memory_summary() and jg.cuda.mem_get_info()[0] == standin.memory - 22 * MIB
    jg.cuda.empty_cache()
    assert jg.cuda.memory_reserved() == 2 * MIB == standin.used[0] and x.tolist()[0] == 0
    del x
    jg.cuda.empty_cache()
    assert standin.used == [0, 0] and not standin.blocks


def test_free_neighbours_are_joined(standin):
    xs = [jg.zeros(64 << 10, device="cuda") for _ in range(8)]              # 8 times 256 KiB: one small segment
    places = [x.data_ptr() for x in xs]
    assert jg.cuda.memory_reserved() == 2 * MIB
    for k in (1, 3, 2):
        xs[k] = None
    assert jg.zeros(192 << 10, device="cuda").data_ptr() == places[1]      # 768 KiB in the hole of three
    assert jg.cuda.memory_reserved() == 2 * MIB


@pytest.mark.parametrize("seed", range(4))
def test_blocks_never_overlap_whatever_comes_and_goes(standin, seed):
    random = np.random.default_rng(seed)
    stream, held = streams.current_stream(0), []
    for _ in range(600):
        if held and random.random() < 0.5:
            held.pop(random.integers(len(held)))
        else:
            held.append(memory.allocate(int(random.choice([1, 700, 5000, MIB, 3 * MIB])), stream))
        spans = sorted((m.address, m.address + m.nbytes) for m in held)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    pool = memory.pool(0)
    assert pool.allocated.current == sum(m._block.size for m in held) <= pool.reserved.current
    held.clear()
    jg.cuda.empty_cache()
    assert standin.used[0] == pool.reserved.current == pool.allocated.current == 0


def test_out_of_memory_names_sizes_after_the_cache_is_emptied(connect):
    standin = connect(memory=64 * MIB)
    x = jg.zeros(8 * MIB, dtype=jg.uint8, device="cuda")
    y = jg.zeros(40 * MIB, dtype=jg.uint8, device="cuda")
    del y                                                                  # held, idle
    z = jg.zeros(44 * MIB, dtype=jg.uint8, device="cuda")                  # fits when it was given back
    assert jg.cuda.memory_stats()["num_alloc_retries"] == 1
    with pytest.raises(jg.cuda.OutOfMemoryError, match=r"cuda:0 has no memory for 1\.00 GiB: of 64\.00 MiB 0 bytes are "
                       r"free; jitgrad has 52\.00 MiB in use.*CUDA_ERROR_OUT_OF_MEMORY.*test_cuda_runtime.*smaller batches"):
        jg.zeros(256 * MIB, device="cuda")
    assert jg.cuda.memory_stats()["num_ooms"] == 1 and issubclass(jg.cuda.OutOfMemoryError, RuntimeError)
    assert len(x) + len(z) == 52 * MIB and standin.used[0] == 64 * MIB
    del z
    assert jg.zeros(44 * MIB, dtype=jg.uint8, device="cuda").is_cuda       # and one can go on


def test_memory_that_another_stream_uses_waits_for_it(standin):
    side = jg.cuda.Stream()
    x = jg.zeros(1000, device="cuda")
    place = x.data_ptr()
    x.record_stream(side)
    side.wait_stream(jg.cuda.current_stream())
    with jg.cuda.stream(side):
        reading = x.to("cpu", non_blocking=True)
    del x
    assert jg.zeros(1000, device="cuda").data_ptr() != place               # the copy has not been done
    side.synchronize()
    assert reading.numpy().sum() == 0
    assert place in [jg.zeros(1000, device="cuda").data_ptr() for _ in range(2)]


def test_memory_given_back_while_some_is_being_lent(standin, monkeypatch):
    """The collector may run anywhere: also between the choice of a block and its removal from the list."""
    pool, stream = memory.pool(0), streams.current_stream(0)
    held = [memory.allocate(1000, stream) for _ in range(4)]
    ask = pool._ask

    def collecting(size):
        held.clear()
        return ask(size)

    monkeypatch.setattr(pool, "_ask", collecting)
    large = memory.allocate(30 * MIB, stream)
    assert not held and pool.settle().allocated.current == large.nbytes
    monkeypatch.undo()
    block = pinned.allocate(100)
    pinned_pool = pinned.pool()
    with pinned_pool._lock:
        del block                                                          # does not wait for the lock
    assert pinned.allocate(100).capacity == 512 and standin.calls.count("cuMemHostAlloc") == 1


def test_memory_given_back_in_another_thread(standin):
    xs = [jg.zeros(10, device="cuda:1") for _ in range(100)]
    threads = [threading.Thread(target=lambda part=xs[k::4]: part.clear()) for k in range(4)]
    xs.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del threads, thread
    gc.collect()
    assert jg.cuda.memory_allocated(1) == 0


def test_pinned_memory_is_used_again_when_copies_from_it_are_done(standin):
    x = jg.ones(100).pin_memory()
    place = x.data_ptr()
    y = x.cuda(non_blocking=True)
    del x
    other = jg.zeros(100).pin_memory()
    assert other.data_ptr() != place                                       # the copy has not been done
    jg.cuda.synchronize()
    assert jg.zeros(100).pin_memory().data_ptr() == place and y.cpu().tolist() == [1] * 100
    del other
    jg.cuda.empty_cache()
    assert not standin.pinned


# streams and events

def test_copies_without_waiting_show_their_values_after_it(standin):
    source = jg.ones(4).pin_memory()
    x = source.cuda(non_blocking=True)
    source.fill_(2)                                                        # too early: the copy has not read it
    assert x.tolist() == [2] * 4
    target = x.to("cpu", non_blocking=True)
    assert target.is_pinned() and target.tolist() != [2] * 4
    jg.cuda.current_stream().synchronize()
    assert target.tolist() == [2] * 4


def test_events_order_streams(standin):
    first, second = jg.cuda.Stream(), jg.cuda.Stream(priority=-1)
    with jg.cuda.stream(first):
        x = jg.ones(4).pin_memory().cuda(non_blocking=True)
        event = first.record_event()
    assert not event.query() and not first.query() and second.query()
    second.wait_event(event)
    with jg.cuda.stream(second):
        assert jg.cuda.current_stream() == second
        y = x.clone()
    assert jg.cuda.current_stream() == jg.cuda.default_stream() != second
    second.synchronize()
    assert event.query() and [n for n in standin.log if n != "mark"] == ["wait", "upload", "copy"]
    assert y.tolist() == [1] * 4


def test_a_missing_wait_shows_as_stale_values(standin):
    side = jg.cuda.Stream()
    x = jg.zeros(4, device="cuda")
    jg.cuda.synchronize()
    with jg.cuda.stream(side):
        x.fill_(7)
    assert x.cpu().tolist() == [0] * 4                                     # the default stream did not wait
    jg.cuda.current_stream().wait_stream(side)
    assert x.cpu().tolist() == [7] * 4


def test_events_measure_time(standin):
    start, end = jg.cuda.Event(enable_timing=True), jg.cuda.Event(enable_timing=True)
    start.record()
    x = jg.zeros(4, device="cuda")
    x.fill_(1)
    end.record()
    with pytest.raises(DeviceError, match="has not been reached yet"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) == 3.0                                  # the stand-in's clock: one per action
    with pytest.raises(DeviceError, match="enable_timing=True"):
        jg.cuda.Event().elapsed_time(end)
    assert jg.cuda.Event().query() and start.device == jg.device("cuda:0")


def test_an_event_belongs_to_one_gpu(standin):
    event = jg.cuda.current_stream(0).record_event()
    with pytest.raises(DeviceError, match="the event belongs to cuda:0, the stream to cuda:1"):
        event.record(jg.cuda.current_stream("cuda:1"))
    with pytest.raises(DeviceError, match="cpu has no streams"):
        jg.cuda.Stream("cpu")
    jg.cuda.current_stream(1).wait_event(event)                            # but others may wait for it


def test_streams_and_events_go_back_to_the_driver(standin):
    stream = jg.cuda.Stream(1)
    assert stream.device == jg.device("cuda:1") and f"{stream.cuda_stream:#x}" in repr(stream)
    event = stream.record_event()
    del stream, event
    gc.collect()
    assert standin.calls.count("cuStreamDestroy_v2") == 1 == standin.calls.count("cuEventDestroy_v2")
    assert not standin.handles


def test_a_new_thread_needs_nothing_of_the_others(standin):
    """No context is current there."""
    x, event = jg.ones(4, device="cuda"), jg.cuda.Event(enable_timing=True)
    event.record()
    pinned.allocate(1 << 12)
    tried = {"pinned memory": lambda: pinned.pool().empty_cache(), "memory": jg.cuda.empty_cache, "values": x.tolist,
             "filling": x.zero_, "events": event.synchronize, "time": lambda: event.elapsed_time(event),
             "streams": lambda: jg.cuda.Stream(1).synchronize(), "waiting": jg.cuda.synchronize,
             "moves": lambda: x.to("cuda:1").cpu(), "pinning": lambda: jg.ones(3).pin_memory(), "views": lambda: x[1:].cpu()}
    failed = {}

    def attempt(name, action):
        try:
            action()
        except DeviceError as error:
            failed[name] = error

    for item in tried.items():
        thread = threading.Thread(target=attempt, args=item)
        thread.start()
        thread.join()
    assert not failed


def test_values_that_nobody_waits_for_come_from_the_stream_of_their_gpu(standin):
    """Pinned memory is asked for on the current GPU, which need not be theirs."""
    x = jg.arange(4.0).pin_memory().to("cuda:1", non_blocking=True)
    y = x.to("cpu", non_blocking=True)
    jg.cuda.synchronize(1)
    assert y.tolist() == [0, 1, 2, 3]


def test_a_stream_lives_as_long_as_memory_that_is_lent_in_its_order(standin):
    """Another one by the same handle would be lent what its work may still use."""
    stream = jg.cuda.Stream()
    lent = memory.allocate(512, stream)
    del stream, lent
    gc.collect()
    assert "cuStreamDestroy_v2" not in standin.calls and memory.pool().reserved.current
    jg.cuda.empty_cache()
    gc.collect()
    assert standin.calls.count("cuStreamDestroy_v2") == 1 and not memory.pool().reserved.current


# code and launches

@pytest.fixture
def code(standin):
    """A module with kernels add(x, y, out, n: i32) and scale(x, constants, n: i32) on float32."""
    def view(address, n):
        return np.frombuffer(standin.read(address, 4 * n), np.float32)

    def add(driver, x, y, out, n):
        driver.write(out, (view(x, n) + view(y, n)).tobytes())

    def scale(driver, x, constants, n):
        driver.write(x, (view(x, n) * view(constants, 1)).tobytes())

    standin.kernels.update(add=add, scale=scale)
    return Module(b"add/4 scale/3")


def three(n=4):
    return [jg.full((n,), float(k), device="cuda") for k in (1, 2, 0)]


def test_functions_know_what_they_need(standin, code):
    add = code.function("add")
    assert add is code.function("add") and add.registers == 32 and add.max_threads == 1024
    assert add.blocks_per_multiprocessor(256) == 8 and add.occupancy(256) == 1.0 and add.occupancy(256, 116736) == 0.25
    add.allow_shared(100 << 10)
    assert add.max_dynamic_shared_bytes == 100 << 10
    with pytest.raises(DeviceError, match="add: 300000 bytes of shared memory per block, but cuda:0 has 232448"):
        add.allow_shared(300_000)
    with pytest.raises(DeviceError, match=r"has no kernel sub.*CUDA_ERROR_NOT_FOUND"):
        code.function("sub")
    with pytest.raises(DeviceError, match=r"another kind of GPU than Stand-in, sm_90.*NO_BINARY"):
        Module(b"sm_80/1")
    standin.fail["cuModuleLoadData"] = 200
    with pytest.raises(DeviceError, match=r"the driver, of CUDA 13\.0, does not know such machine code.*Update the NVIDIA"):
        Module(b"add/4")
    standin.fail["cuModuleLoadData"] = 2
    with pytest.raises(DeviceError, match="machine code cannot be loaded"):
        Module(b"add/4")
    code.unload()


def test_a_plan_runs_its_entries_in_order(standin, code):
    x, y, out = three()
    n = np.int32(4)
    plan = LaunchPlan([Launch(code.function("add"), (1,), (4,), [Slot(0), Slot(1), Slot(2), n]),
                       Copy(Slot(1), Slot(2), 16),
                       Launch(code.function("add"), (1,), (4,), [Slot(0), Slot(1), Slot(2), n])], 3, driver.gpu())
    with pytest.raises(DeviceError, match="have not been bound"):
        plan.run()
    with pytest.raises(DeviceError, match="2 addresses for 3 slots"):
        plan.bind([0, 0])
    plan.bind([t.data_ptr() for t in (x, y, out)])
    plan.run()
    assert out.tolist() == [4] * 4                                          # 1 + (1 + 2)
    assert [name for name in standin.log if name in ("add", "copy")] == ["add", "copy", "add"]


def test_a_captured_plan_is_one_launch_and_follows_new_addresses(standin, code):
    x, y, out = three()
    add = Launch(code.function("add"), (1,), (4,), [Slot(0), Slot(1), Slot(1), np.int32(4)])
    plan = LaunchPlan([add] * 5, 2, driver.gpu())
    plan.bind([x.data_ptr(), y.data_ptr()])
    plan.replay()
    assert plan.is_captured and y.tolist() == [7] * 4                       # captured and run once: 2 + 5
    before = len(standin.calls)
    plan.replay()
    assert standin.calls[before:] .count("cuGraphLaunch") == 1 and "cuLaunchKernel" not in standin.calls[before:]
    assert y.tolist() == [12] * 4 and [n for n in standin.log if n == "add"] == ["add"] * 10
    plan.bind([x.data_ptr(), y.data_ptr()])
    assert plan.is_captured                                                 # the same addresses
    plan.bind([x.data_ptr(), out.data_ptr()])
    assert not plan.is_captured
    plan.replay()
    assert out.tolist() == [5] * 4 and y.tolist() == [12] * 4
    del plan, add
    gc.collect()
    assert standin.calls.count("cuGraphExecDestroy") == 2 == standin.calls.count("cuGraphDestroy")


@pytest.mark.parametrize("mode", ["ours", "thread-local"])
def test_what_the_collector_does_during_a_capture_leaves_it_alone(standin, code, monkeypatch, mode):
    """It gives memory back, for which events are asked whether they have come; in another mode that ends the capture."""
    x, y, _ = three()
    lent = []
    if mode == "ours":
        lent += [pinned.allocate(512), memory.allocate(2 << 20, jg.cuda.Stream())]
        for one in lent:
            one.record_stream(jg.cuda.Stream())
        del one
    else:
        monkeypatch.setattr(launch, "_RELAXED", 1)

    class Collects:
        def bind(self, addresses):
            pass

        def enqueue(self, stream):
            lent.clear()
            jg.ones(1 << 19, device="cuda")                                 # asks the driver for memory

    add = Launch(code.function("add"), (1,), (4,), [Slot(0), Slot(1), Slot(1), np.int32(4)])
    plan = LaunchPlan([add, Collects(), add], 2, driver.gpu())
    plan.bind([x.data_ptr(), y.data_ptr()])
    if mode == "ours":
        plan.replay()
        assert y.tolist() == [4] * 4 and not lent and standin.calls.count("cuGraphLaunch") == 1
    else:
        with pytest.raises(DeviceError, match=r"CAPTURE_(UNSUPPORTED|INVALIDATED)"):
            plan.replay()


def test_constants_change_from_replay_to_replay(standin, code):
    x = jg.ones(4, device="cuda")
    constants = ConstantBlock(4, driver.gpu(), depth=3)
    plan = LaunchPlan([Launch(code.function("scale"), (1,), (4,), [x._array, constants.address, np.int32(4)])], 0,
                      driver.gpu())
    for factor in (2, 3, 5, 7, 11):                                         # more than the ring is deep
        constants.write(np.float32(factor).tobytes())
        plan.replay()
    assert x.tolist() == [2 * 3 * 5 * 7 * 11] * 4
    with pytest.raises(DeviceError, match="8 bytes into a block of 4"):
        constants.write(bytes(8))


def test_constants_on_their_way_outlive_their_block(standin):
    """What they are copied from is not lent again before they are there."""
    block = ConstantBlock(4096, driver.gpu(), depth=2)
    block.write(b"\1" * 4096)
    memory_, used = block.memory, block._ring[0][0].address
    del block
    others = [pinned.allocate(4096) for _ in range(4)]
    assert used not in [one.address for one in others]
    for one in others:
        ctypes.memset(one.address, 7, 4096)
    jg.cuda.synchronize()
    assert standin.read(memory_.address, 4096) == b"\1" * 4096
    assert pinned.allocate(4096).address == used


def test_launches_that_cannot_be(standin, code):
    add = code.function("add")
    with pytest.raises(DeviceError, match=r"add: a grid of \(1, 1, 1\) blocks of \(32, 64, 1\) threads cannot be launched"):
        Launch(add, (1,), (32, 64), [])
    for grid in ((0,), (2**31,), (1, 2**16), (1, 1, 2**16)):
        with pytest.raises(DeviceError, match=r"cannot be launched: .*, a grid is at most \(2147483647, 65535"):
            Launch(add, grid, (32,), [])
    with pytest.raises(DeviceError, match="argument 0 has 16 bytes"):
        Launch(add, (1,), (32,), [np.complex128(1)])
    plan = LaunchPlan([Launch(add, (2,), (32,), [0, 0, 0, np.int32(0)])], 0, driver.gpu())
    standin.fail["cuLaunchKernel"] = 719
    with pytest.raises(DeviceError, match=r"add with a grid of \(2, 1, 1\) blocks of \(32, 1, 1\) threads: cuLaunchKernel "
                                          r"failed: CUDA_ERROR_LAUNCH_FAILED"):
        plan.run()
    entries = [Launch(add, (k,), (32,), [0, 0, 0, np.int32(0)], where=("train.py", k)) for k in (30, 31, 32)]
    standin.fail["cuLaunchKernel"] = [0, 719]                               # the second of three
    with pytest.raises(DeviceError, match=r"add with a grid of \(31, 1, 1\).*\(train.py:31\)"):
        LaunchPlan(entries, 0, driver.gpu()).run()
    standin.fail["cuLaunchKernel"] = 719
    with pytest.raises(DeviceError, match=r"train.py:32"):
        entries[2].enqueue(streams.current_stream())
    standin.fail["cuLaunchKernel"] = 719
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        plan.replay()                                                       # the capture is ended all the same
    assert all(type(h) is not list or h for h in standin.handles.values()) and not plan.is_captured


def test_two_gpus_have_streams_and_memory_of_their_own(standin, code):
    x = jg.ones(4, device="cuda:1")
    side = jg.cuda.Stream(1)
    side.wait_stream(jg.cuda.current_stream(1))
    with jg.cuda.stream(side):
        assert jg.cuda.current_device() == 1
        y = x.to("cuda:0")
    assert y.get_device() == 0 and y.tolist() == [1] * 4 and "peer" in standin.log
    assert jg.cuda.current_device() == 0


# arrays

@pytest.mark.parametrize("dtype", ["f4", "i8", "u1", "c16"])
def test_views_are_those_of_numpy(standin, dtype):
    random = np.random.default_rng(0)
    host = random.integers(0, 100, (4, 6, 5)).astype(dtype)
    views = [lambda a: a, lambda a: a.transpose((2, 0, 1)), lambda a: a[1:3, ::2, ::-1], lambda a: a.reshape((24, 5)),
             lambda a: a[::-1, 2:2, 1:4], lambda a: np.broadcast_to(a[0:1, :, :], (3, 6, 5)), lambda a: a[3:4, 5:6, 4:5],
             lambda a: a.transpose((1, 0, 2)).reshape((24, 5)), lambda a: a[:, ::-2, ::3].transpose((1, 0, 2))]
    on_gpu = array.moved(host, jg.device("cuda:0"))
    for view in views:
        ours, theirs = view(on_gpu), view(host)
        assert (ours.shape, ours.dtype, ours.size, ours.nbytes) == (theirs.shape, theirs.dtype, theirs.size, theirs.nbytes)
        np.testing.assert_array_equal(array.to_host(ours), theirs)
        np.testing.assert_array_equal(array.to_host(ours.copy()), theirs)
        if (theirs.size and theirs.flags.writeable and theirs.base is not None) or theirs is host:
            values = random.integers(0, 100, theirs.shape).astype(dtype)
            expected = host.copy()
            theirs[...] = values
            array.copy_into(ours, values)
            np.testing.assert_array_equal(array.to_host(on_gpu), host)
            host[...] = expected
            array.copy_into(on_gpu, host)


def test_numpy_cannot_read_device_memory(standin):
    x = array.moved(np.ones(3), jg.device("cuda:0"))
    with pytest.raises(DeviceError, match=r"cannot be read by NumPy.*x\.cpu"):
        np.asarray(x)
    with pytest.raises(TypeError):
        np.concatenate([x, x])


def test_pinned_memory_is_seen_through_views(standin):
    x = pinned.allocate(100).array((5, 5), np.dtype("f4"))
    assert pinned.owner(x) is pinned.owner(x[1:, ::2].T) is not None
    assert pinned.owner(np.zeros(3)) is None and sys.getrefcount(pinned.owner(x)) >= 2


def test_what_changes_is_read_when_a_graph_is_replayed(standin):
    """A copy from pinned memory in a graph reads it at each replay."""
    x, source = jg.zeros(2, device="cuda"), jg.ones(2).pin_memory()
    graph = launch.capture(lambda stream: driver.call("cuMemcpyHtoDAsync_v2", x.data_ptr(), source.data_ptr(), 8,
                                                      stream.handle), driver.gpu())
    for value in (3, 4):
        source.fill_(value)
        graph.launch(jg.cuda.current_stream())
        assert x.tolist() == [value] * 2


def test_arguments_are_laid_out_as_the_driver_reads_them(standin, code):
    entry = Launch(code.function("add"), (1,), (1,), [Slot(0, 8), np.float32(1.5), np.int32(-1), 7])
    entry.bind([100])
    words = [ctypes.string_at(entry._parameters[k], 8) for k in range(4)]
    assert int.from_bytes(words[0], "little") == 108 and words[1][:4] == np.float32(1.5).tobytes()
    assert words[2][:4] == b"\xff" * 4 and int.from_bytes(words[3], "little") == 7
