"""Device memory, lent and taken back in the order of streams.

`allocate(nbytes, stream)` gives a `Memory`, which goes back to its GPU's `Pool` when nothing refers to it any more. A
block that was given back is lent again to the same stream at once: what was enqueued before it reads it first. The pool
asks the driver for large segments, lends parts of them (the smallest free one that is large enough) and joins
neighbours that are free. When the driver has no memory left, idle segments go back to it before an error is raised.

The sizes are those that PyTorch's allocator uses: blocks are multiples of 512 bytes; up to 1 MiB they are parts of
segments of 2 MiB, up to 10 MiB of segments of 20 MiB, larger ones have segments of their own.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from contextlib import suppress
from ctypes import c_size_t, c_uint64
from typing import Any

from jitgrad.errors import DeviceError
from jitgrad.runtime.cuda import driver, streams
from jitgrad.runtime.cuda.driver import OUT_OF_MEMORY, SUCCESS, Gpu
from jitgrad.runtime.cuda.streams import Event, Stream

MIB = 1 << 20
ROUND = 512                                     # blocks are multiples of this
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
MEDIUM, MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
LARGE_ROUND = 2 * MIB


class Counter:
    """A quantity: what it is now, its peak, and all that was ever added and taken away."""

    __slots__ = ("added", "current", "peak", "taken")

    def __init__(self) -> None:
        self.current = self.peak = self.added = self.taken = 0

    def add(self, amount: int) -> None:
        self.current += amount
        self.added += amount
        self.peak = max(self.peak, self.current)

    def take(self, amount: int) -> None:
        self.current -= amount
        self.taken += amount


class Block:
    """A part of a segment: free, or lent. `before` and `behind` are its neighbours in the segment."""

    __slots__ = ("address", "before", "behind", "free", "gpu_stream", "others", "size")

    def __init__(self, address: int, size: int, gpu_stream: int):
        self.address, self.size, self.gpu_stream = address, size, gpu_stream
        self.before: Block | None = None
        self.behind: Block | None = None
        self.free = True
        self.others: list[Stream] = []          # other streams that use it

    @property
    def is_segment(self) -> bool:
        return self.before is None and self.behind is None


class Memory:
    """Memory that is lent as long as this object lives: `nbytes` at `address` on `gpu`."""

    __slots__ = ("__weakref__", "_block", "_pool", "address", "gpu", "nbytes")

    def __init__(self, pool: Pool, block: Block | None, nbytes: int):
        self._pool, self._block, self.gpu, self.nbytes = pool, block, pool.gpu, nbytes
        self.address = 0 if block is None else block.address

    def record_stream(self, stream: Stream) -> None:
        """`stream` uses it, too: it is not lent again before that work is done."""
        if self._block is not None and stream.handle != self._block.gpu_stream and stream not in self._block.others:
            self._block.others.append(stream)

    def __del__(self) -> None:
        block = getattr(self, "_block", None)
        if block is not None:
            self._pool.take_back(block)


class Pool:
    """The memory of one GPU that this process holds."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.allocated, self.reserved = Counter(), Counter()             # bytes
        self.allocations, self.segments = Counter(), Counter()           # how many
        self.retries = self.failures = 0
        self._free: dict[tuple[int, bool], list[tuple[int, int, Block]]] = {}    # (stream, small) -> by size, address
        self._streams: dict[int, list[Stream]] = {}       # by handle, once for each segment that is theirs: while a stream
                                                          # lives, the driver calls no other one by its handle
        self._waiting: list[tuple[Block, list[Event]]] = []
        self._returned: deque[Block] = deque()            # given back, but not yet entered
        self._lock = threading.Lock()

    def allocate(self, nbytes: int, stream: Stream) -> Memory:
        """`nbytes` for work in `stream`; OutOfMemoryError when the GPU has no more."""
        if nbytes == 0:
            return Memory(self, None, 0)
        size = -(-nbytes // ROUND) * ROUND
        with self._lock:
            self._settle()
            self._reclaim()
            block = self._best(size, stream.handle) or self._new_segment(size, stream, nbytes)
            self._split(block, size)
            block.free = False
            self.allocated.add(block.size)
            self.allocations.add(1)
            return Memory(self, block, nbytes)

    def take_back(self, block: Block) -> None:
        """A block that nobody refers to any more. Python's collector may call this anywhere, in the middle of `allocate`,
        too: then, and while another thread is at it, the block is only noted."""
        self._returned.append(block)
        self.settle()

    def settle(self) -> Pool:
        """Enter what was given back, if nobody is at work on this pool; the pool itself."""
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()
        return self

    def empty_cache(self) -> None:
        """Give idle segments back to the driver."""
        with self._lock:
            self._settle()
            self._empty()

    def _empty(self) -> None:
        for _, events in self._waiting:
            for event in events:
                event.synchronize()
        self._reclaim()
        self.gpu.activate()
        for blocks in self._free.values():
            for entry in [entry for entry in blocks if entry[2].is_segment]:
                blocks.remove(entry)
                self.gpu.driver.call("cuMemFree_v2", entry[2].address)
                self.reserved.take(entry[0])
                self.segments.take(1)
                self._streams[entry[2].gpu_stream].pop()

    def _settle(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self.allocated.take(block.size)
            self.allocations.take(1)
            if not block.others:
                self._release(block)
                continue
            with suppress(DeviceError):                   # a driver that is gone has taken the memory along
                self._waiting.append((block, [stream.record_event() for stream in block.others]))
            block.others = []

    def reset_peaks(self) -> None:
        """Let all peaks begin again from what is now."""
        for counter in (self.allocated, self.reserved, self.allocations, self.segments):
            counter.peak = counter.current

    def information(self) -> tuple[int, int]:
        """Free and total bytes of the GPU, by the driver."""
        free, total = c_size_t(), c_size_t()
        self.gpu.activate().driver.call("cuMemGetInfo_v2", free, total)
        return free.value, total.value

    def _best(self, size: int, stream: int) -> Block | None:
        """The smallest free block of that stream that is large enough. Small blocks come from small segments."""
        entries = self._free.get((stream, size <= SMALL), [])
        at = bisect.bisect_left(entries, size, key=lambda entry: entry[0])
        if at == len(entries):
            return None
        if size > MEDIUM and entries[at][0] > size + MEDIUM_SEGMENT:
            return None                                   # far too large: better a segment of the right size
        return entries.pop(at)[2]

    def _new_segment(self, size: int, stream: Stream, nbytes: int) -> Block:
        whole = SMALL_SEGMENT if size <= SMALL else MEDIUM_SEGMENT if size < MEDIUM \
            else -(-size // LARGE_ROUND) * LARGE_ROUND
        address = self._ask(whole)
        if address is None:
            self.retries += 1
            self._settle()
            self._empty()
            address = self._ask(whole)
        if address is None:
            self.failures += 1
            raise self._out_of_memory(nbytes)
        self.reserved.add(whole)
        self.segments.add(1)
        self._streams.setdefault(stream.handle, []).append(stream)
        return Block(address, whole, stream.handle)

    def _ask(self, size: int) -> int | None:
        address = c_uint64()
        code = self.gpu.activate().driver.status("cuMemAlloc_v2", address, size)
        if code not in (SUCCESS, OUT_OF_MEMORY):
            raise self.gpu.driver.error(code, "cuMemAlloc_v2")
        return address.value if code == SUCCESS else None

    def _out_of_memory(self, nbytes: int) -> driver.DriverError:
        free, total = self.information()
        idle = self.reserved.current - self.allocated.current
        return self.gpu.driver.error(
            OUT_OF_MEMORY, "cuMemAlloc_v2", f"{self.gpu.device} has no memory for {amount(nbytes)}: of {amount(total)} "
            f"{amount(free)} are free; jitgrad has {amount(self.allocated.current)} in use and holds "
            f"{amount(idle)} in parts too small", "Use smaller batches, or delete tensors that are not needed any more")

    def _split(self, block: Block, size: int) -> None:
        """Cut what `size` does not need off `block`, where it is worth it."""
        rest = block.size - size
        if rest < ROUND or (size > SMALL and rest <= SMALL):
            return
        remainder = Block(block.address + size, rest, block.gpu_stream)
        remainder.before, remainder.behind = block, block.behind
        if block.behind is not None:
            block.behind.before = remainder
        # The remainder belongs to the list of its segment's kind, whatever its own size.
        block.behind, block.size = remainder, size
        self._enter(remainder, small=size <= SMALL)

    def _release(self, block: Block) -> None:
        """Make a block free, joined with free neighbours."""
        small = self._in_small_segment(block)
        for neighbour in (block.before, block.behind):
            if neighbour is not None and neighbour.free:
                self._leave(neighbour, small)
                block = _join(neighbour, block) if neighbour is block.before else _join(block, neighbour)
        self._enter(block, small)

    def _in_small_segment(self, block: Block) -> bool:
        first = last = block
        while first.before is not None:
            first = first.before
        while last.behind is not None:
            last = last.behind
        return last.address + last.size - first.address <= SMALL_SEGMENT

    def _enter(self, block: Block, small: bool) -> None:
        block.free = True
        bisect.insort(self._free.setdefault((block.gpu_stream, small), []), (block.size, block.address, block),
                      key=lambda entry: entry[:2])

    def _leave(self, block: Block, small: bool) -> None:
        entries = self._free[block.gpu_stream, small]
        del entries[bisect.bisect_left(entries, (block.size, block.address), key=lambda entry: entry[:2])]

    def _reclaim(self) -> None:
        """Free the blocks whose work in other streams is done."""
        waiting, self._waiting = self._waiting, []
        for block, events in waiting:
            if all(event.query() for event in events):
                self._release(block)
            else:
                self._waiting.append((block, events))


def _join(first: Block, second: Block) -> Block:
    """Two neighbours as one block."""
    first.size += second.size
    first.behind = second.behind
    if second.behind is not None:
        second.behind.before = first
    return first


_lock = threading.Lock()


def pool(index: int | None = None) -> Pool:
    """The pool of a GPU, of this thread's current one by default."""
    gpu = driver.gpu(index)
    with _lock:
        if gpu.pool is None:
            gpu.pool = Pool(gpu)
        found: Pool = gpu.pool
    return found.settle()


def allocate(nbytes: int, stream: Stream | None = None) -> Memory:
    """`nbytes` on the GPU of `stream`, by default the current one."""
    stream = stream or streams.current_stream()
    return pool(stream.gpu.index).allocate(nbytes, stream)


def statistics(pool: Pool) -> dict[str, Any]:
    """PyTorch's names for what a pool counts."""
    found: dict[str, Any] = {}
    for name, counter in {"allocated_bytes": pool.allocated, "reserved_bytes": pool.reserved,
                          "allocation": pool.allocations, "segment": pool.segments}.items():
        found |= {f"{name}.all.current": counter.current, f"{name}.all.peak": counter.peak,
                  f"{name}.all.allocated": counter.added, f"{name}.all.freed": counter.taken}
    return found | {"num_alloc_retries": pool.retries, "num_ooms": pool.failures}


def amount(nbytes: int) -> str:
    """Bytes for people: ``1.50 GiB``."""
    value, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{nbytes} bytes" if unit == "bytes" else f"{value:.2f} {unit}"
