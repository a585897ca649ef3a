"""What is measured on a GPU: families of cases, the most important of each first, and the tables of their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.gpu import attention, bandwidth, convolutions, first, launches, products, steps
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.case import Result
from benchmarks.kernels.run import rates_table
from benchmarks.report import Table
from benchmarks.steps import GPU_STEPS

RATES = ("jitgrad eager", "jitgrad", "jitgrad, tuned", "jitgrad, own kernel", "jitgrad, own kernels", "PyTorch",
         "PyTorch, fused", "PyTorch, cuBLASLt's epilogue", "PyTorch, channels last", "torch.compile")
TERA, GIGA = 1e12, 1e9


class Measured(Protocol):
    """Something with a name that is measured by itself; those of rank 0 come first."""

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    def run(self, bench: Bench) -> Result: ...


@dataclass(frozen=True, slots=True)
class Family:
    """Cases of one kind: small or not -> all of them; results by name -> tables."""

    cases: Callable[[bool], Sequence[Measured]]
    tables: Callable[[Mapping[str, Result]], list[Table]]


def _rates(title: str, limit: str = "", unit: float = TERA) -> Callable[[Mapping[str, Result]], list[Table]]:
    return lambda results: [rates_table(title, results, RATES, limit, unit)]


FAMILIES: dict[str, Family] = {
    "launches": Family(launches.cases, lambda results: [launches.table(results)]),
    "steps": Family(steps.cases, lambda results: [steps.table(results), steps.more(results)]),
    "bandwidth": Family(bandwidth.cases, _rates("limited by memory, GB/s", "a copy", GIGA)),
    "products": Family(products.cases, _rates("matrix products, TFLOP/s")),
    "attention": Family(attention.cases, _rates("attention, TFLOP/s")),
    "convolutions": Family(convolutions.cases, _rates("convolutions, TFLOP/s")),
    "first": Family(first.cases, lambda results: [first.table(results)]),
}


@dataclass(frozen=True, slots=True)
class Job:
    """A case of a family."""

    family: str
    case: Measured

    @property
    def key(self) -> str:
        return f"{self.family}: {self.case.name}"


def jobs(names: Sequence[str] = (), small: bool = False) -> list[Job]:
    """The cases of the families, and the training steps, of those names; all without names. SystemExit for others."""
    unknown = set(names) - set(FAMILIES) - set(GPU_STEPS)
    if unknown:
        raise SystemExit(f"a GPU has no part and no step called {', '.join(sorted(unknown))}; there are "
                         f"{', '.join([*FAMILIES, *GPU_STEPS])}")
    wanted = set(names) & set(GPU_STEPS)
    found = [Job(name, case) for name, family in FAMILIES.items() for case in family.cases(small)
             if not names or name in names or (name == "steps" and case.name in wanted)]
    return sorted(found, key=lambda job: job.case.rank)


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Of all families that have results."""
    return [table for name, family in FAMILIES.items() if results.get(name) for table in family.tables(results[name])]
