"""The loop that carries out a plan, and the loop of the threads that help it: two kernels like all others.

`run` walks the entries of one frame (a plan's memory for one call) and returns to Python when the plan is done, at an
entry for Python, at an error, about every tenth of a second, or when it wants threads that do not exist yet. An entry
that takes long enough is published in the pool as a job: its items are handed out in chunks by an atomic counter, and a
thread that is late holds up only the chunk that it took. `worker` is what each thread of the pool runs. A worker that
finds itself on the processor of the thread that it helps goes to another one: some schedulers leave both where the one
was woken by the other, for longer than a step takes, while the next processor is idle.

Small kernels that do not depend on each other are one entry: `side_by_side` carries out a table of them, and its items are
pieces of theirs.

All state is int64 words in memory that Python allocates; the constants below are their places. Text is made by
`source`, which puts the numbers in for the names.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jitgrad.kernels.cpu.intrinsics import (
        address,
        call_kernel,
        call_system,
        fetch_add,
        nanoseconds,
        peek,
        poke,
        relax,
        swap_if_equal,
    )

# A frame. Its first words are the context that every kernel gets as args[0]; `fail` writes the error word.
ERROR_CODE, ERROR_ITEM, ERROR_VALUE, ERROR_LOCK = range(4)
STATUS, POSITION, ENTRIES, COUNT, POINTERS, OBJECTS, PATCHES, PATCH_COUNT, POOL, LIMIT = range(4, 14)
FRAME_WORDS = 16

# Why `run` returned.
DONE, HOST, ERROR, PAUSE, START = range(5)

# How `run` is called (its last argument): again, with the addresses of memory in the frame, or with a row of array objects.
RESUME, ADDRESSES, ARRAYS = range(3)

# An entry: function (0: for Python), argument block, items, and the measured cost in ns on one thread.
FUNCTION, BLOCK, ITEMS, COST = range(0, 32, 8)
ENTRY_BYTES = 32

# A row of the table of `side_by_side`: function, argument block, items, and into how many pieces they are cut.
PART_FUNCTION, PART_BLOCK, PART_ITEMS, PART_PIECES = range(0, 32, 8)
PART_BYTES = 32

# A patch: word to write (its address), pointer to take, offset to add.
PATCH_BYTES = 24

# The pool, in bytes; what different threads write is on different cache lines.
# A ticket is generation << 32 | next chunk.
TICKET, FINISHED, SLEEPERS, OWNER, WAITING = range(0, 320, 64)
JOB_FUNCTION, JOB_BLOCK, JOB_ITEMS, JOB_GRAIN, JOB_CHUNKS, JOB_LIMIT = range(320, 368, 8)
STOP, WORKERS, STARTED, CLOCK, SYSCALL, FUTEX, DATA_OFFSET = range(384, 440, 8)
# Where threads run: the C function that says so, the number of the call that moves one, the processor of who published
# the last job, and all processors of the process but that one, a bit each.
PROCESSOR, MOVE, CALLER, ELSEWHERE = range(448, 480, 8)
ELSEWHERE_BYTES = 128
POOL_BYTES = ELSEWHERE + ELSEWHERE_BYTES

CLOSED = 0x7FFFFFFF                     # a chunk number that no job has
FUTEX_WAIT, FUTEX_WAKE = 128, 129       # private to the process
SPIN = 200_000                          # ns of waiting before a thread sleeps, between plans …
BUSY = 250_000                          # … and within one: waking a thread takes as long as a small product
WORTH = 15_000                          # ns on one thread above which an entry is shared
SLICE = 100_000_000                     # ns after which Python gets a chance to see Ctrl-C
CHUNKS_PER_THREAD = 8                   # at least, if there are as many items …
CHUNK = 50_000                          # … and more if each has so many ns to do: one that is late holds up less


def run(args: Any, begin: int, arrays: int, mode: int) -> None:
    """Carry out entries from `begin` on of the frame `args`; `arrays` is where the references to the arrays are."""
    pool = args[POOL]
    if mode != RESUME:
        args[ERROR_CODE] = 0
        pointers = args[POINTERS]
        if mode == ARRAYS:
            data_offset = peek(pool + DATA_OFFSET)
            for k in range(args[OBJECTS]):
                poke(pointers + 8 * k, peek(peek(arrays + 8 * k) + data_offset))
        patches = args[PATCHES]
        for k in range(args[PATCH_COUNT]):
            patch = patches + PATCH_BYTES * k
            place = peek(pointers + 8 * peek(patch + 8)) + peek(patch + 16)
            if peek(peek(patch)) != place:                  # other threads have these lines in their caches
                poke(peek(patch), place)
    entries = args[ENTRIES]
    count = args[COUNT]
    limit = args[LIMIT]
    clock = peek(pool + CLOCK)
    started = 0
    owner = False
    status = DONE
    position = begin
    while position < count:
        entry = entries + ENTRY_BYTES * position
        function = peek(entry + FUNCTION)
        if function == 0:
            status = HOST
            break
        block = peek(entry + BLOCK)
        items = peek(entry + ITEMS)
        if items == 1:
            call_kernel(function, block, 0, 1, 0)
            timed = (position & 15) == 15
        elif limit > peek(pool + WORKERS) + 1:
            status = START
            break
        else:
            timed = True
            known = peek(entry + COST)
            cost = known
            begun = nanoseconds(clock)
            if started == 0:
                started = begun
            share = min(items, max(CHUNKS_PER_THREAD * limit, cost // CHUNK))
            grain = (items + share - 1) // share
            shared = limit > 1 and (known == 0 or known > WORTH)    # 0: never measured
            if shared and not owner:
                owner = swap_if_equal(pool + OWNER, 0, 1)
            if shared and owner:
                ticket = peek(pool + TICKET)
                generation = ticket >> 32
                poke(pool + TICKET, (generation << 32) | CLOSED)
                chunks = (items + grain - 1) // grain
                poke(pool + JOB_FUNCTION, function)
                poke(pool + JOB_BLOCK, block)
                poke(pool + JOB_ITEMS, items)
                poke(pool + JOB_GRAIN, grain)
                poke(pool + JOB_CHUNKS, chunks)
                poke(pool + JOB_LIMIT, limit)
                poke(pool + FINISHED, 0)
                caller = call_system(peek(pool + PROCESSOR), 0, 0, 0, 0, 0) & CLOSED
                if caller != peek(pool + CALLER):
                    word = pool + ELSEWHERE + 8 * (peek(pool + CALLER) >> 6)
                    poke(word, peek(word) | 1 << (peek(pool + CALLER) & 63))
                    word = pool + ELSEWHERE + 8 * (caller >> 6)
                    poke(word, peek(word) & ~(1 << (caller & 63)))
                    poke(pool + CALLER, caller)
                fetch_add(pool + TICKET, (((generation + 1) & CLOSED) << 32) - ((generation << 32) | CLOSED))
                if peek(pool + SLEEPERS) > 0:
                    call_system(peek(pool + SYSCALL), peek(pool + FUTEX), pool + TICKET + 4, FUTEX_WAKE, CLOSED, 0)
                ticket = peek(pool + TICKET)
                while (ticket & CLOSED) < chunks:
                    if swap_if_equal(pool + TICKET, ticket, ticket + 1):
                        low = (ticket & CLOSED) * grain
                        taking = nanoseconds(clock)
                        call_kernel(function, block, low, min(low + grain, items), 0)
                        if cost == 0:
                            cost = (nanoseconds(clock) - taking) * chunks
                        fetch_add(pool + FINISHED, 1)
                    ticket = peek(pool + TICKET)
                waited = nanoseconds(clock)
                finished = peek(pool + FINISHED)
                while finished < chunks:
                    if nanoseconds(clock) - waited > BUSY:
                        fetch_add(pool + WAITING, 1)
                        call_system(peek(pool + SYSCALL), peek(pool + FUTEX), pool + FINISHED, FUTEX_WAIT, finished, 0)
                        fetch_add(pool + WAITING, -1)
                    relax()
                    finished = peek(pool + FINISHED)
                taken = (nanoseconds(clock) - begun) * limit
                poke(entry + COST, min(taken, (7 * cost + taken) >> 3) if known else cost)  # what took less is less
            else:
                call_kernel(function, block, 0, items, 0)
                poke(entry + COST, max(1, (cost + nanoseconds(clock) - begun) >> 1))
        position += 1
        if args[ERROR_CODE] != 0:
            position -= 1
            status = ERROR
            break
        if timed:
            moment = nanoseconds(clock)
            if started == 0:
                started = moment
            if moment - started > SLICE and position < count:
                status = PAUSE
                break
    if owner:
        poke(pool + OWNER, 0)
    args[STATUS] = status
    args[POSITION] = position


def side_by_side(args: Any, begin: int, end: int, thread: int) -> None:
    """Carry out pieces of kernels that do not depend on each other. After the context `args` has how many kernels there are,
    then the table."""
    row = address(args) + 16
    first = 0
    for _ in range(args[1]):
        items = peek(row + PART_ITEMS)
        pieces = peek(row + PART_PIECES)
        low = max(begin - first, 0) * items // pieces
        high = min(end - first, pieces) * items // pieces
        if low < high:
            call_kernel(peek(row + PART_FUNCTION), peek(row + PART_BLOCK), low, high, thread)
        first += pieces
        row += PART_BYTES


def worker(args: Any, begin: int, end: int, thread: int) -> None:
    """Take chunks of published jobs until the pool stops. `args` is the pool; the thread numbers itself."""
    pool = address(args)
    me = fetch_add(pool + STARTED, 1) + 1
    clock = peek(pool + CLOCK)
    idle_since = 0
    while peek(pool + STOP) == 0:
        ticket = peek(pool + TICKET)
        chunk = ticket & CLOSED
        chunks = peek(pool + JOB_CHUNKS)
        function = peek(pool + JOB_FUNCTION)
        block = peek(pool + JOB_BLOCK)
        items = peek(pool + JOB_ITEMS)
        grain = peek(pool + JOB_GRAIN)
        low = chunk * grain
        if chunk < chunks and me < peek(pool + JOB_LIMIT):
            if swap_if_equal(pool + TICKET, ticket, ticket + 1):        # so all that was read is of this job
                if call_system(peek(pool + PROCESSOR), 0, 0, 0, 0, 0) & CLOSED == peek(pool + CALLER):
                    call_system(peek(pool + SYSCALL), peek(pool + MOVE), 0, ELSEWHERE_BYTES, pool + ELSEWHERE, 0)
                call_kernel(function, block, low, min(low + grain, items), me)
                if fetch_add(pool + FINISHED, 1) + 1 == chunks and peek(pool + WAITING) > 0:
                    call_system(peek(pool + SYSCALL), peek(pool + FUTEX), pool + FINISHED, FUTEX_WAKE, 1, 0)
            idle_since = 0
        elif idle_since == 0:
            idle_since = nanoseconds(clock)
        elif nanoseconds(clock) - idle_since < (BUSY if peek(pool + OWNER) != 0 else SPIN):
            for _ in range(8):
                relax()
        else:
            fetch_add(pool + SLEEPERS, 1)
            if peek(pool + STOP) == 0:
                call_system(peek(pool + SYSCALL), peek(pool + FUTEX), pool + TICKET + 4, FUTEX_WAIT, ticket >> 32, 0)
            fetch_add(pool + SLEEPERS, -1)
            idle_since = 0


def wake(args: Any, begin: int, end: int, thread: int) -> None:
    """Wake every thread of the pool `args`, so that it sees STOP. The generation changes, so that one
    who is about to sleep does not."""
    pool = address(args)
    fetch_add(pool + TICKET, 1 << 32)
    call_system(peek(pool + SYSCALL), peek(pool + FUTEX), pool + TICKET + 4, FUTEX_WAKE, CLOSED, 0)


@cache
def source(name: str) -> str:
    """The text of kernel `run`, `side_by_side`, `worker` or `wake`, with numbers in place of this module's constants. It is
    cut out of this file: parsing and unparsing took longer than all else that a process does for its first kernel."""
    file = Path(__file__).read_text()
    begin = file.index(f"\ndef {name}(") + 1
    head, rest = file[begin:file.index("\n\n\n", begin)].split("\n", 1)
    body = rest.split('"""', 2)[2]                          # without the docstring
    text = re.sub(r": Any|: int| -> None", "", head) + body
    return re.sub(r"\b[A-Z][A-Z_]+\b", lambda word: str(globals().get(word[0], word[0])), text)
