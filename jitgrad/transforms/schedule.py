"""Which parts of a plan run side by side.

In: `Task`s in the order of the program, with the memory that the memory plan has given them. Out: groups of tasks, which
run one after the other; the tasks of one group do not depend on each other, so several threads can carry them out at
once. That is for small tasks: large ones have work for all threads by themselves.

A small task moves up into the first group that it may belong to: behind everything that writes what it reads or
writes, and behind everything that reads what it writes. Nothing moves across a barrier, which may fail or leave jitgrad. So
every task finds in its memory what it would have found there, and results are the same to the last bit.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jitgrad.transforms.memory import Slot

LARGE = 100_000                         # estimated ns: such a task stays alone, unless it is in one piece
WORTH = 15_000                          # estimated ns that two threads must save
PIECES = 16                             # of a group, or more if it has more tasks

Group = tuple[tuple[int, int], ...]
"""The numbers of the tasks, and into how many pieces each one's items are cut."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One launch: the slots that it only reads and those that it writes, its items, and an estimate of the ns that it takes
    on one thread. A `barrier` keeps its place."""

    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    items: int
    work: float
    barrier: bool = False

    @property
    def is_small(self) -> bool:
        return not self.barrier and self.items > 0 and (self.items == 1 or self.work < LARGE)


def schedule(tasks: Sequence[Task]) -> tuple[Group, ...]:
    """All tasks, each in one group. Where nothing is to be gained, they are alone and in their order."""
    alone = tuple([((number, 1),) for number in range(len(tasks))])
    if sum(task.is_small for task in tasks) < 2:
        return alone
    groups = [tuple(_cut(group, tasks)) for group in _gather(tasks)]
    if all(len(group) == 1 for group in groups):
        return alone
    return tuple(groups)


def _gather(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """Groups of independent tasks that are worth it; the tasks of any others one by one."""
    groups: list[list[int]] = []
    joined: list[int] = []                                  # the groups of small tasks, ascending
    memory, floor = _Memory(), 0
    for number, task in enumerate(tasks):
        place = len(groups)
        if task.barrier:
            floor = place + 1
        else:
            earliest = max(floor, memory.free_from(task))
            if task.is_small:
                k = bisect.bisect_left(joined, earliest)
                place = joined[k] if k < len(joined) else place
            memory.use(task, place)
        if place == len(groups):
            groups.append([])
            if task.is_small:
                joined.append(place)
        groups[place].append(number)
    for group in groups:
        if _saved([tasks[number] for number in group]) >= WORTH:
            yield group
        else:
            yield from ([number] for number in group)


def _saved(group: Sequence[Task]) -> float:
    """The ns that two threads save when these tasks run side by side: those in several pieces they share anyway."""
    one_by_one = sum(task.work / min(task.items, 2) for task in group if task.items)
    return one_by_one - max(sum(task.work for task in group) / 2, max(task.work / max(task.items, 1) for task in group))


def _cut(group: Sequence[int], tasks: Sequence[Task]) -> list[tuple[int, int]]:
    """Pieces that take about equally long, as far as there are items; the longest ones first, the last ones then fill up
    the threads."""
    if len(group) == 1:
        return [(group[0], 1)]
    whole = sum(tasks[number].work for number in group)
    pieces = {n: max(1, min(tasks[n].items, round(PIECES * tasks[n].work / whole))) for n in group}
    return sorted(pieces.items(), key=lambda pair: -tasks[pair[0]].work / pair[1])


class _Memory:
    """In which groups memory is used, as far as tasks have been placed."""

    def __init__(self) -> None:
        self.arena = _Lines()
        self.others: dict[tuple[str, int], _Lines] = {}

    def _places(self, task: Task) -> Iterator[tuple[_Lines, int, int, bool]]:
        for slots, writes in ((task.reads, False), (task.writes, True)):
            for slot in slots:
                if slot.space == "arena" and slot.nbytes:
                    yield self.arena, slot.index, slot.index + slot.nbytes, writes
                elif slot.space in ("input", "output"):     # constants are only read
                    key = slot.space, slot.index
                    if key not in self.others:
                        self.others[key] = _Lines()
                    yield self.others[key], 0, 1, writes

    def free_from(self, task: Task) -> int:
        """The first group in which the task can run."""
        return max([lines.free_from(begin, end, writes) for lines, begin, end, writes in self._places(task)], default=0)

    def use(self, task: Task, group: int) -> None:
        """The task is in that group."""
        for lines, begin, end, writes in self._places(task):
            lines.use(begin, end, writes, group)


class _Lines:
    """Pieces of one memory: where each begins, the last group that writes it, and the last one that reads it."""

    def __init__(self) -> None:
        self.begins = [0]
        self.marks = [(-1, -1)]

    def free_from(self, begin: int, end: int, writes: bool) -> int:
        """The group behind the last one that must come before a use of these bytes."""
        first = bisect.bisect_right(self.begins, begin) - 1
        last = bisect.bisect_left(self.begins, end)
        return 1 + max(max(written, read) if writes else written for written, read in self.marks[first:last])

    def use(self, begin: int, end: int, writes: bool, group: int) -> None:
        """These bytes are used in `group`."""
        first, last = self._cut(begin), self._cut(end)
        if writes:
            self.begins[first:last], self.marks[first:last] = [begin], [(group, -1)]
        else:
            self.marks[first:last] = [(written, max(read, group)) for written, read in self.marks[first:last]]

    def _cut(self, place: int) -> int:
        """The number of the piece that begins at `place`."""
        k = bisect.bisect_left(self.begins, place)
        if k == len(self.begins) or self.begins[k] != place:
            self.begins.insert(k, place)
            self.marks.insert(k, self.marks[k - 1])
        return k
