"""Statements for one element -> statements for several elements of one thread, its lanes.

What goes in: the statements of an innermost loop, written by the `Writer` as for the CPU, and where the lanes lie. What
comes out: the same statements, those that differ from element to element once per lane; loads and stores of elements that
lie behind each other become one access. An accumulator is one variable that takes up lane after lane.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from jitgrad.codegen.kernel import Accumulate, Let, Load, Loop, Statement, Store, When
from jitgrad.dtypes import DType

NAME = re.compile(r"\b[A-Za-z_]\w*")


@dataclass(frozen=True)
class Chunk:
    """`width` elements from element `first` on (a variable); they exist where the variable `guard`, if any, is true."""

    first: str
    width: int
    guard: str = ""


@dataclass
class Lanes:
    """`variable`: the loop's variable. `accumulators`: names that have a value already and get another one. `dtypes`: what
    operands are once they are loaded, for chunks with a guard. `varying`: names with a value per lane."""

    variable: str
    chunks: list[Chunk]
    accumulators: set[str] = field(default_factory=set)
    dtypes: Mapping[str, DType] = field(default_factory=dict)
    varying: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.varying.add(self.variable)
        self.numbers = [range(sum(c.width for c in self.chunks[:m]), sum(c.width for c in self.chunks[:m + 1]))
                        for m in range(len(self.chunks))]

    @property
    def count(self) -> int:
        return sum(chunk.width for chunk in self.chunks)

    def differs(self, *texts: str) -> bool:
        return any(name in self.varying for text in texts for name in NAME.findall(text))

    def name(self, name: str, lane: int) -> str:
        return f"{name}_{lane}" if self.count > 1 or name == self.variable else name

    def at(self, text: str, lane: int) -> str:
        """`text` for one lane."""
        return NAME.sub(lambda m: self.name(m[0], lane) if m[0] in self.varying else m[0], text)

    # ---- statements

    def widen(self, body: Iterable[Statement]) -> list[Statement]:
        """The statements of all lanes; in front of them the positions of the lanes, as far as they are used."""
        rest, made = list(body), list[Statement]()
        counts = Counter(s.name for s in rest if isinstance(s, Let))
        self.accumulators |= {name for name, count in counts.items() if count > 1}
        while rest:
            updates = self.updates(rest)
            made += self.in_turn(rest[:updates]) if updates else self.one(rest[0])
            rest = rest[updates or 1:]
        return [*self.positions(made), *made]

    def updates(self, body: list[Statement]) -> int:
        """How many statements at the beginning of `body` update accumulators from a lane, or prepare that."""
        count = 0
        for k, statement in enumerate(body):
            if not isinstance(statement, Let) or not self.differs(statement.value):
                break
            if statement.name in self.accumulators:
                count = k + 1
            elif not self.accumulators.intersection(NAME.findall(statement.value)):
                break
            else:
                self.varying.add(statement.name)
        return count

    def in_turn(self, body: list[Statement]) -> list[Statement]:
        """All statements of a lane, then all of the next: it starts from what the one before has left."""
        lets = [statement for statement in body if isinstance(statement, Let)]
        return self.guarded([[Let(self.at(s.name, lane), s.dtype, self.at(s.value, lane)) for s in lets]
                             for lane in range(self.count)])

    def positions(self, made: list[Statement]) -> Iterator[Statement]:
        used = set(NAME.findall(" ".join(map(repr, made))))
        for chunk, numbers in zip(self.chunks, self.numbers, strict=True):
            for k, lane in enumerate(numbers):
                if self.name(self.variable, lane) in used:
                    yield Let(self.name(self.variable, lane), None, f"{chunk.first} + {k}" if k else chunk.first)

    def one(self, statement: Statement) -> list[Statement]:
        if isinstance(statement, Load):
            return self.load(statement)
        if isinstance(statement, Store):
            return self.store(statement)
        if isinstance(statement, Let):
            return self.let(statement)
        if isinstance(statement, Accumulate):
            return self.guarded([[Accumulate(statement.name, statement.how, self.at(statement.value, lane))]
                                 for lane in range(self.count)]) if self.differs(statement.value) else [statement]
        assert isinstance(statement, When), "a loop inside of lanes"
        return self.when(statement)

    def load(self, statement: Load) -> list[Statement]:
        if not self.differs(statement.index):
            return [statement]
        self.varying.add(statement.name)
        made: list[Statement] = []
        for chunk, numbers in zip(self.chunks, self.numbers, strict=True):
            names = [self.name(statement.name, lane) for lane in numbers]
            if is_contiguous(statement.index, self.variable):
                place = self.at(statement.index, numbers[0])
                loads = [Load(", ".join(names), statement.operand, place, chunk.width)]
            else:
                loads = [Load(name, statement.operand, self.at(statement.index, lane))
                         for name, lane in zip(names, numbers, strict=True)]
            made += load_where(chunk.guard, loads, names, self.dtypes) if chunk.guard else loads
        return made

    def store(self, statement: Store) -> list[Statement]:
        if not self.differs(statement.index):
            return [statement]
        if not is_contiguous(statement.index, self.variable):
            return self.guarded([[Store(statement.operand, self.at(statement.index, lane), self.at(statement.value, lane))]
                                 for lane in range(self.count)])
        made: list[Statement] = []
        for chunk, numbers in zip(self.chunks, self.numbers, strict=True):
            values = ", ".join(self.at(statement.value, lane) for lane in numbers)
            made += _under(chunk.guard, [Store(statement.operand, self.at(statement.index, numbers[0]), values,
                                               chunk.width)])
        return made

    def let(self, statement: Let) -> list[Statement]:
        if not self.differs(statement.value):
            return [statement]
        self.varying.add(statement.name)
        return [Let(self.name(statement.name, lane), statement.dtype, self.at(statement.value, lane),
                    statement.where if lane == 0 else None, statement.note if lane == 0 else "")
                for lane in range(self.count)]

    def when(self, statement: When) -> list[Statement]:
        if not self.differs(statement.condition):
            return [When(statement.condition, [new for inner in statement.body for new in self.one(inner)])]
        return self.guarded([[When(self.at(statement.condition, lane),
                                   [_renamed(self, inner, lane) for inner in statement.body])]
                             for lane in range(self.count)])

    def guarded(self, by_lane: list[list[Statement]]) -> list[Statement]:
        """The statements of all lanes, each only where its lane exists."""
        made: list[Statement] = []
        for chunk, numbers in zip(self.chunks, self.numbers, strict=True):
            made += _under(chunk.guard, [s for lane in numbers for s in by_lane[lane]])
        return made


def _renamed(lanes: Lanes, statement: Statement, lane: int) -> Statement:
    assert isinstance(statement, Let), "only checks depend on a lane"
    return Let(statement.name, statement.dtype, lanes.at(statement.value, lane))


def load_where(guard: str, loads: list[Load], names: Iterable[str], dtypes: Mapping[str, DType]) -> list[Statement]:
    """`loads` where `guard` is true, zeros elsewhere: no thread reads what belongs to another one, which may write it."""
    dtype = dtypes[loads[0].operand]
    zero = "False" if dtype.category == "b" else "0"
    return [*[Let(name, dtype, zero) for name in names], When(guard, list(loads))]


def _under(guard: str, body: list[Statement]) -> list[Statement]:
    return [When(guard, body)] if guard else body


def is_contiguous(index: str, variable: str) -> bool:
    """True when the elements at successive values of `variable` lie behind each other."""
    return index == variable or index.endswith(f" + {variable}")


def replace(body: list[Statement], placeholder: Loop, statements: list[Statement]) -> None:
    """Put `statements` where the loop `placeholder` stands."""
    (k,) = [k for k, statement in enumerate(body) if statement is placeholder]
    body[k:k + 1] = statements
