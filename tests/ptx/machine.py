"""Carries out kernels: grids of blocks of warps of lanes, each instruction at once for all lanes that are at it.

A launch is done in waves of blocks. The threads of a wave are divided into *groups* that a schedule takes turns with: all
threads in one group (``together``, the fastest), or one group for each warp rank (warp 0 of every block, warp 1 of every
block, …): ``in order`` and ``reversed`` run one warp as far as it gets, ``random`` and ``interleaved`` change after every
instruction. Blocks never wait for each other, so running theirs side by side leaves nothing out.

Within a group the lanes at the lowest position run first; the others wait for them there, which is how diverging lanes come
together again. Instructions for a whole warp (``shfl.sync``, ``bar.warp.sync``, ``mma.sync`` …) run once all lanes of their
mask have arrived. Lanes that wait for ever are a `Deadlock`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ptx import access, boxes, registers, warp, warpgroup
from ptx.errors import Deadlock, PtxError, Unsupported
from ptx.memory import Buffer, Memory
from ptx.operations import decode
from ptx.parse import Instruction, Kernel, Module, is_number, number_bits
from ptx.shadow import Who
from ptx.values import TYPES, size_of, unsigned

SCHEDULES = ("together", "in order", "reversed", "random", "interleaved")
DONE = np.iinfo(np.int32).max
LIMIT = 5_000_000                             # instructions of one wave, each for a group of lanes; then it hardly ends
Lanes = Any                                   # a slice, or an array, of places of threads in ascending order
Step = Callable[[Lanes], None]
NOTHING = ("membar", "fence", "nanosleep", "prefetch", "prefetchu", "griddepcontrol", "pmevent")


class Group:
    """Threads that run side by side. `position` is where they all are, or None when they are at different places."""

    def __init__(self, threads: Lanes):
        self.threads = threads
        self.position: int | None = 0


class Wave:
    """Some blocks of a launch while they run."""

    def __init__(self, kernel: Kernel, module: Module, memory: Memory, parameters: dict[str, int],
                 grid: tuple[int, int, int], block: tuple[int, int, int], blocks: np.ndarray, dynamic: int,
                 schedule: str, seed: int):
        self.kernel, self.module, self.memory, self.schedule = kernel, module, memory, schedule
        self.parameters = parameters
        self.block_size = int(np.prod(block))
        self.count = len(blocks) * self.block_size
        self.random = np.random.default_rng(seed)
        self.registers = {name: np.zeros(self.count, np.bool_ if kind == "pred" else unsigned(size_of(kind)))
                          for name, kind in kernel.registers.items()}
        self.carry = np.zeros(self.count, np.uint64)
        self.place_threads(grid, block, blocks)
        self.place_variables(dynamic, len(blocks))
        self.position = np.zeros(self.count, np.int32)
        self.waiting = np.zeros(self.count, np.bool_)
        self.syncing = np.zeros(self.count, np.bool_)
        self.barriers = np.zeros(self.count, np.int32)
        self.warp_barriers = np.zeros(self.count, np.int32)
        self.now: Instruction = kernel.code[0]
        self.executed = 0
        self.copies: list[Any] = []
        self.copy_groups = np.zeros(self.count, np.int64)
        sums = warpgroup.sums_of(kernel.code)
        self.products = warpgroup.Products(self, sums) if sums else None
        self.arrivals = boxes.Arrivals(self)
        self.grid, self.block = grid, block
        self.groups = self.make_groups()
        self.steps = [self.decode(instruction) for instruction in kernel.code]

    # --- where everything is ------------------------------------------------------------------------------------------

    def place_threads(self, grid: tuple[int, int, int], block: tuple[int, int, int], blocks: np.ndarray) -> None:
        """Warps of one rank lie side by side, so that a group of them is a slice; the lanes of a warp do, too."""
        number = np.arange(self.count)
        thread = number[np.argsort(number % self.block_size // 32, kind="stable")]
        self.row = thread // self.block_size                         # block within the wave
        self.rank = thread % self.block_size                         # thread within the block
        self.lane = self.rank % 32
        self.block_number = blocks[self.row]
        warps = -(-self.block_size // 32)
        self.warp = (self.block_number * warps + self.rank // 32).astype(np.int32)
        self.thread_number = (self.block_number * self.block_size + self.rank).astype(np.int32)
        self.whole_warps = self.block_size % 32 == 0
        special: dict[str, np.ndarray] = {"%laneid": self.lane, "%warpid": self.rank // 32}
        for prefix, number, sizes in (("%tid", self.rank, block), ("%ctaid", self.block_number, grid)):
            special[prefix + ".x"] = number % sizes[0]
            special[prefix + ".y"] = number // sizes[0] % sizes[1]
            special[prefix + ".z"] = number // (sizes[0] * sizes[1])
        for prefix, sizes in (("%ntid", block), ("%nctaid", grid)):
            for axis, size in zip("xyz", sizes):
                special[f"{prefix}.{axis}"] = np.array(size)
        for name, mask in (("lt", (1 << self.lane) - 1), ("le", (2 << self.lane) - 1), ("eq", 1 << self.lane),
                           ("ge", 0xFFFFFFFF & ~((1 << self.lane) - 1)), ("gt", 0xFFFFFFFF & ~((2 << self.lane) - 1))):
            special[f"%lanemask_{name}"] = mask
        self.special = {name: value.astype(np.uint32) for name, value in special.items()}

    def place_variables(self, dynamic: int, blocks: int) -> None:
        """Offsets of shared and local variables; an array without a size is the dynamic shared memory, behind all others."""
        variables = {**self.module.variables, **self.kernel.variables}
        used = " ".join(operand for i in self.kernel.code for operand in i.operands)
        self.symbols: dict[str, int] = {}
        ends = {"shared": 0, "local": 0}
        for variable in sorted(variables.values(), key=lambda v: v.size == 0):
            if variable.space in ends and variable.name in used:
                start = -(-ends[variable.space] // variable.align) * variable.align
                self.symbols[variable.name] = start
                ends[variable.space] = start + variable.size
        self.symbols |= {name: self.parameters[name] for name, kind in self.kernel.parameters.items() if kind == "map"}
        for buffer in self.memory.buffers:
            self.symbols.setdefault(buffer.name, buffer.address)
        self.memory.launch(ends["shared"] + dynamic, ends["local"], blocks, self.count)

    def make_groups(self) -> list[Group]:
        if self.schedule == "together":
            return [Group(slice(0, self.count))]
        ends = np.append(0, np.cumsum(np.bincount(self.rank // 32)))
        groups = [Group(slice(int(start), int(end))) for start, end in pairwise(ends)]
        return groups[::-1] if self.schedule == "reversed" else groups

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until all threads have ended."""
        active = list(self.groups)
        turn = 0
        while active:
            if self.schedule == "random":
                turn = int(self.random.integers(len(active)))
            moved, rounds = self.advance(active[turn % len(active)]), 1
            while moved and self.schedule in ("together", "in order", "reversed"):
                if self.arrivals.give_way():
                    turn += 1
                    break
                moved = self.advance(active[turn % len(active)])
            while not moved and rounds < len(active):                # this one cannot go on, but another may
                turn += 1
                moved, rounds = self.advance(active[turn % len(active)]), rounds + 1
            if not moved:
                active = [g for g in active if (self.position[g.threads] != DONE).any()]
                if active and not self.release():
                    self.report_deadlock()
                turn = 0
            elif self.schedule == "interleaved":
                turn += 1

    def advance(self, group: Group) -> bool:
        """One instruction for those lanes of a group that are furthest behind; False when all wait or have ended."""
        if group.position is not None:
            position, lanes = group.position, group.threads
        else:
            found = self.furthest_behind(group)
            if found is None:
                return False
            position, lanes = found
        instruction = self.now = self.kernel.code[position]
        self.executed += 1
        if self.executed > LIMIT:
            self.fail(Deadlock, 0, f"still runs after {LIMIT} instructions", lanes)
        if instruction.opcode[0] == "bra":
            self.branch(group, instruction, position, lanes)
        elif instruction.opcode[0] in ("ret", "exit", "trap", "bar", "barrier"):
            self.stop(group, instruction, position, lanes)
        elif is_warp_wide(instruction):
            self.converge(group, instruction, position, lanes)
        else:
            self.perform(instruction, position, lanes)
            self.move(group, lanes, position + 1)
        return True

    def furthest_behind(self, group: Group) -> tuple[int, Lanes] | None:
        places = np.where(self.waiting[group.threads], DONE, self.position[group.threads])
        position = int(places.min())
        if position == DONE:
            return None
        here = places == position
        if here.all():
            group.position = position
            return position, group.threads
        return position, self.numbers(group.threads)[here]

    def perform(self, instruction: Instruction, position: int, lanes: Lanes) -> None:
        if instruction.guard:
            lanes = self.guarded(instruction.guard, lanes)
            if lanes is not None:
                self.steps[position](lanes)
        else:
            self.steps[position](lanes)

    def guarded(self, guard: tuple[str, bool], lanes: Lanes) -> Lanes | None:
        """The lanes whose predicate lets them take part."""
        truth = self.registers[guard[0]][lanes] != guard[1]
        if truth.all():
            return lanes
        chosen = self.numbers(lanes)[truth]
        return chosen if len(chosen) else None

    def move(self, group: Group, lanes: Lanes, position: int) -> None:
        if group.position is None:
            self.position[lanes] = position
        else:
            group.position = position

    def branch(self, group: Group, instruction: Instruction, position: int, lanes: Lanes) -> None:
        target = self.kernel.labels[instruction.operands[0]]
        if instruction.guard:
            truth = self.registers[instruction.guard[0]][lanes] != instruction.guard[1]
            if not truth.all():
                if truth.any():
                    group.position = None
                    self.position[lanes] = np.where(truth, target, position + 1)
                    return
                target = position + 1
        self.move(group, lanes, target)

    def stop(self, group: Group, instruction: Instruction, position: int, lanes: Lanes) -> None:
        """The end of a thread, or a barrier."""
        if instruction.opcode[1:] and instruction.opcode[1] == "warp":
            self.converge(group, instruction, position, lanes)
            return
        group.position = None
        self.position[lanes] = position + 1
        if instruction.guard:
            guarded = self.guarded(instruction.guard, lanes)
            if guarded is None:
                return
            lanes = guarded
        if instruction.opcode[0] in ("bar", "barrier"):
            if instruction.opcode[-1] not in ("sync", "aligned") or len(instruction.operands) > 1:
                raise Unsupported(f"{instruction.text}: only barriers of all threads of a block are known")
            self.waiting[lanes] = True
            self.position[lanes] = position
        elif instruction.opcode[0] == "trap":
            self.fail(PtxError, 0, "the kernel gave up", lanes)
        else:
            self.position[lanes] = DONE

    def release(self) -> bool:
        """Let blocks go on of which all threads wait at a barrier. False when there is none."""
        blocks = int(self.row.max()) + 1
        barred = self.waiting & ~self.syncing
        elsewhere = ~barred & (self.position != DONE)
        ready = (np.bincount(self.row[elsewhere], minlength=blocks) == 0)[self.row]
        lanes = np.flatnonzero(ready & self.waiting)
        self.check_barrier(lanes)
        self.waiting[lanes] = False
        self.position[lanes] += 1
        self.barriers[ready] += 1
        return len(lanes) > 0

    def check_barrier(self, lanes: np.ndarray) -> None:
        """``bar.sync`` wants all lanes of a warp at the same instruction."""
        first = np.flatnonzero(np.diff(self.warp[lanes], prepend=-1))
        size = np.diff(np.append(first, len(lanes)))
        apart = self.position[lanes] != np.repeat(self.position[lanes[first]], size)
        if apart.any():
            lane = int(np.argmax(apart))
            self.now = self.kernel.code[int(self.position[lanes[lane]])]
            self.fail(Deadlock, lane, "lanes of one warp wait at different barriers", lanes)

    def report_deadlock(self) -> None:
        waiting = np.flatnonzero(self.waiting)
        lane = int(waiting[0])
        self.now = self.kernel.code[int(self.position[lane])]
        others = np.flatnonzero((self.row == self.row[lane]) & (self.position != self.position[lane]))
        ended = int((self.position[others] == DONE).sum())
        self.fail(Deadlock, 0, f"waits for ever: of the {self.block_size} threads of its block {len(others) - ended} are "
                               f"elsewhere and {ended} have ended", waiting)

    def converge(self, group: Group, instruction: Instruction, position: int, lanes: Lanes) -> None:
        """An instruction of whole warps: it runs where all lanes of the mask are here; others wait for the rest."""
        if isinstance(lanes, slice) and self.whole_warps and instruction.guard is None:
            self.steps[position](lanes)
            self.move(group, lanes, position + 1)
            return
        if group.position is not None:
            self.position[group.threads] = position
            group.position = None
        here = np.flatnonzero((self.position == position) & (self.syncing | self.flags(lanes)))
        if instruction.guard:
            passing = self.registers[instruction.guard[0]][here] == instruction.guard[1]
            self.position[here[passing]] += 1
            here = here[~passing]
        if len(here) == 0:
            return
        complete = self.complete(here, instruction)
        self.waiting[here] = self.syncing[here] = ~complete
        chosen = here[complete]
        if len(chosen):
            self.steps[position](chosen)
            self.position[chosen] = position + 1

    def flags(self, lanes: Lanes) -> np.ndarray:
        found = np.zeros(self.count, np.bool_)
        found[lanes] = True
        return found

    def complete(self, here: np.ndarray, instruction: Instruction) -> np.ndarray:
        """For each lane here, whether all lanes of its mask are here, too. A warp barrier does not wait for ended ones."""
        present = np.zeros(self.count, np.uint64)
        arrived = self.flags(here)
        if instruction.opcode[0] == "bar":
            arrived |= self.position == DONE
        base = np.arange(self.count) - self.lane
        numbers = np.flatnonzero(arrived)
        np.bitwise_or.at(present, base[numbers], np.uint64(1) << self.lane[numbers].astype(np.uint64))
        mask = self.mask_of(instruction, here).astype(np.uint64)
        if instruction.opcode[0] in ("bar", "activemask"):           # a warp that is cut short by the end of its block
            size = np.minimum(32, self.block_size - (self.rank[here] - self.lane[here])).astype(np.uint64)
            mask = mask & ((np.uint64(1) << size) - np.uint64(1))
        return (mask & ~present[base[here]]) == 0

    def mask_of(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        if instruction.opcode[0] in ("shfl", "vote", "bar", "redux", "match"):
            return np.broadcast_to(self.reader(instruction.operands[-1], "u32")(lanes), lanes.shape)
        if instruction.opcode[0] == "activemask":
            return np.zeros(lanes.shape, np.uint32)
        return np.full(lanes.shape, 0xFFFFFFFF, np.uint32)

    # --- operands -----------------------------------------------------------------------------------------------------

    def numbers(self, lanes: Lanes) -> np.ndarray:
        """Places of lanes as numbers."""
        return np.arange(lanes.start, lanes.stop) if isinstance(lanes, slice) else lanes

    def reader(self, text: str, kind: str) -> Callable[[Lanes], np.ndarray]:
        """What gives an operand's values as `kind` (a type of PTX) for the lanes that ask."""
        target = TYPES[kind]
        if text.startswith("!"):
            inner = self.reader(text[1:], kind)
            return lambda lanes: ~inner(lanes)
        if text.startswith("-") and not is_number(text):
            inner = self.reader(text[1:], kind)
            return lambda lanes: -inner(lanes)
        register = self.registers.get(text)
        if register is not None:
            if self.products and text in self.products.flying:
                return warpgroup.guarded_reader(self, text, lambda lanes: register[lanes].view(target))
            if register.dtype.itemsize == np.dtype(target).itemsize:
                return lambda lanes: register[lanes].view(target)
            plain = np.bool_ if kind == "pred" else unsigned(np.dtype(target).itemsize)
            return lambda lanes: register[lanes].astype(plain).view(target)
        if text in self.special:
            special = self.special[text]
            if special.ndim:
                return lambda lanes: special[lanes].astype(unsigned(size_of(kind))).view(target)
            constant = special.astype(unsigned(size_of(kind))).view(target)
        elif text == "WARP_SZ":
            constant = np.array(32, target)
        elif is_number(text):
            bits = number_bits(text, kind)
            constant = np.array(bits, np.bool_ if kind == "pred" else unsigned(size_of(kind))).view(target)
        else:
            constant = np.array(self.address_of(text), np.uint64).astype(unsigned(size_of(kind))).view(target)
        return lambda lanes: constant

    def address_of(self, text: str) -> int:
        """A variable, perhaps with an offset."""
        name, _, offset = text.partition("+")
        if name not in self.symbols:
            raise Unsupported(f"{text} is no register, number or variable that the interpreter knows")
        return self.symbols[name] + int(offset or 0)

    def writer(self, text: str, kind: str) -> Callable[[Lanes, np.ndarray], None]:
        """What stores values of `kind` into a register; in a wider register they are extended."""
        if text == "_":
            return lambda lanes, values: None
        register = self.registers[text]
        size = 1 if kind == "pred" else size_of(kind)
        width = register.dtype.itemsize

        def same(lanes: Lanes, values: np.ndarray) -> None:
            register[lanes] = values.view(register.dtype)

        def other(lanes: Lanes, values: np.ndarray) -> None:
            wide = values.view(TYPES[kind]).astype(np.dtype(f"i{width}" if kind[0] == "s" else f"u{width}"))
            register[lanes] = wide.view(register.dtype)

        write = same if width == size else other
        return warpgroup.guarded_writer(self, text, write) if self.products and text in self.products.flying else write

    # --- decoding -----------------------------------------------------------------------------------------------------

    def decode(self, instruction: Instruction) -> Step:
        """What carries out one instruction for some lanes."""
        background = warpgroup.decode(self, instruction)
        if background is not None:
            return background
        if instruction.opcode[0] in (*NOTHING, "bra", "ret", "exit", "trap", "bar", "barrier"):
            if instruction.opcode[:2] == ("bar", "warp"):
                return warp.barrier(self, instruction)
            return lambda lanes: None
        for special in (boxes.decode, access.decode, warp.decode, registers.decode):
            step = special(self, instruction)
            if step is not None:
                return step
        return self.plain(instruction)

    def plain(self, instruction: Instruction) -> Step:
        """An instruction on the registers of each thread."""
        operation = decode(instruction.opcode)
        sources = [self.reader(text, kind) for text, kind in zip(instruction.operands[1:], operation.sources, strict=True)]
        results = instruction.operands[0].split("|")
        put = self.writer(results[0], operation.result)
        second = self.writer(results[1], "pred") if len(results) > 1 else None

        def step(lanes: Lanes) -> None:
            value = operation.compute(*[source(lanes) for source in sources])
            put(lanes, value)
            if second:
                second(lanes, ~value)

        return step

    # --- reporting ----------------------------------------------------------------------------------------------------

    def who(self, lanes: Lanes, atomic: bool = False) -> Who:
        return Who(self.thread_number[lanes], self.warp[lanes], self.block_number[lanes], self.barriers[lanes],
                   self.warp_barriers[lanes], atomic)

    def fail(self, error: type[PtxError], lane: int, problem: str, lanes: Lanes) -> None:
        """Raise `error` about the lane with this number among `lanes`."""
        thread = int(self.numbers(lanes)[lane])
        tid, block = ([int(np.broadcast_to(self.special[f"{name}.{axis}"], self.count)[thread]) for axis in "xyz"]
                      for name in ("%tid", "%ctaid"))
        raise error(f"{self.kernel.name}, line {self.now.line}: {self.now.text}: thread {tuple(tid)} of block "
                    f"{tuple(block)} (schedule: {self.schedule}): {problem}")


def is_warp_wide(instruction: Instruction) -> bool:
    name = instruction.opcode[0]
    return (name in ("shfl", "vote", "mma", "wgmma", "ldmatrix", "redux", "activemask")
            or instruction.opcode[:2] == ("bar", "warp"))


def launch(module: Module, name: str, memory: Memory, grid: tuple[int, int, int], block: tuple[int, int, int],
           arguments: list[Buffer | int | float], *, dynamic: int, schedule: str, seed: int, wave: int) -> int:
    """Run a whole grid; returns the number of instructions carried out, each counted once for all its lanes."""
    if schedule not in SCHEDULES:
        raise ValueError(f"{schedule!r} is none of {SCHEDULES}")
    kernel = module.kernels[name]
    if len(arguments) != len(kernel.parameters):
        raise TypeError(f"{name} takes {len(kernel.parameters)} arguments, {len(arguments)} came")
    if int(np.prod(block)) > kernel.max_threads:
        raise PtxError(f"{name} was made for blocks of at most {kernel.max_threads} threads, not for {block}")
    parameters = {}
    for (parameter, kind), value in zip(kernel.parameters.items(), arguments):
        if kind == "map":
            parameters[parameter] = memory.add(np.frombuffer(value, np.uint8), parameter, writable=False).address
            continue
        number = value.address if isinstance(value, Buffer) else value
        plain = np.array(number, TYPES[kind]) if kind[0] == "f" else np.array(
            int(number) & ((1 << 8 * size_of(kind)) - 1), unsigned(size_of(kind)))
        parameters[parameter] = int(plain.view(unsigned(size_of(kind))))
    memory.forget()
    blocks = np.arange(int(np.prod(grid)))
    if schedule == "reversed":
        blocks = blocks[::-1].copy()
    step = max(1, wave // int(np.prod(block)))
    executed = 0
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            running = Wave(kernel, module, memory, parameters, grid, block, blocks[start:start + step], dynamic,
                           schedule, seed + start)
            running.run()
            executed += running.executed
    return executed
