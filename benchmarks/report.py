"""What is shown and kept of the measurements: tables as text, results as JSON, and the words for numbers in them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a title; the first column is aligned to the left, the others to the right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows)]
        lines = ["  ".join(cell.ljust(width) if k == 0 else cell.rjust(width)
                           for k, (cell, width) in enumerate(zip(row, widths))) for row in [self.columns, *self.rows]]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(["", self.title, "", *lines, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        """The same for a page."""
        aligned = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in [self.columns, aligned, *self.rows]]
        return "\n".join([f"## {self.title}", "", *lines, "", *[f"- {note}" for note in self.notes], ""])


@dataclass(frozen=True, slots=True)
class Tables:
    """Several tables of one part."""

    tables: list[Table]

    def __str__(self) -> str:
        return "\n".join(map(str, self.tables))

    def markdown(self) -> str:
        """The same for a page."""
        return "\n".join(table.markdown() for table in self.tables)


def milliseconds(value: float | None) -> str:
    """Seconds as milliseconds with three figures."""
    return "–" if value is None else f"{1000 * value:.3g}" if value < 1 else f"{1000 * value:.0f}"


def microseconds(value: float | None) -> str:
    """Seconds as microseconds."""
    return "–" if value is None else f"{1e6 * value:.2f}"


def ratio(a: float | None, b: float | None) -> str:
    """How many times `a` is `b`."""
    return "–" if a is None or b is None else f"{a / b:.2f}x"


def target(value: float, limit: float, unit: str) -> str:
    """A figure beside what it must stay below."""
    return f"{value:.3g} {unit} ({'within' if value < limit else 'ABOVE'} {limit:g})"


def save(name: str, results: Any, folder: Path = RESULTS) -> Path:
    """Write the results of one part, with the machine that they come from, to `name`.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), name: results}, indent=1) + "\n")
    return path
