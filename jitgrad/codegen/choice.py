"""What a lowering may do in several ways: which is best depends on the machine, and can be measured.

A lowering asks a `Choice`: a question, and its candidates by short names, the usual one first. It gets the usual one,
unless it runs inside of `answering`, which brings answers by question and notes what is asked. Whoever measures
(`jitgrad.tuning`) finds out in this way what there is to choose, and lowers a node once for each candidate. Every candidate
gives the same result up to rounding: sums may be taken in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Answers:
    """The names that are wanted, by question, and the candidates of every question that was asked, in order."""

    wanted: Mapping[str, str]
    asked: dict[str, list[str]] = field(default_factory=dict)


_answers: ContextVar[Answers | None] = ContextVar("jitgrad answers", default=None)


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """One question. A node may ask it several times, of parts of it: an answer then holds for those that have it."""

    question: str
    candidates: Mapping[str, T]

    def take(self) -> T:
        """The candidate that is wanted, or the usual one: the first."""
        usual = next(iter(self.candidates))
        answers = _answers.get()
        if answers is None:
            return self.candidates[usual]
        names = answers.asked.setdefault(self.question, [])
        names += [name for name in self.candidates if name not in names]
        wanted = answers.wanted.get(self.question, usual)
        return self.candidates[wanted if wanted in self.candidates else usual]


def is_measured() -> bool:
    """Whether somebody asks what there is to choose: only then candidates matter that are not the usual ones."""
    return _answers.get() is not None


@contextmanager
def answering(wanted: Mapping[str, str]) -> Iterator[Answers]:
    """Lowerings in here get what is `wanted`; an answer that is no candidate is as good as none."""
    answers = Answers(wanted)
    token = _answers.set(answers)
    try:
        yield answers
    finally:
        _answers.reset(token)


def usual_first(candidates: Mapping[str, T], usual: T) -> dict[str, T]:
    """The candidates in order, but `usual`, which is one of them, before all others; of equal ones the first."""
    names: dict[T, str] = {}
    for name, value in candidates.items():
        names.setdefault(value, name)
    return {names[value]: value for value in [usual, *[v for v in names if v != usual]]}
