"""The table at the end of the demonstration: what was expected of each kind of job, how it ended, and what it used."""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rcon_plugins import Usage

_COLUMNS = ("task", "input", "jobs", "expected", "result", "CPU time", "peak memory", "wall time", "")
_RIGHT_ALIGNED = (2, 5, 6, 7)
LEGEND = "CPU time and wall time: median of the jobs; peak memory: the largest"


@dataclass
class Row:
    """All jobs of one kind."""

    task: str
    input: str
    expected: str
    results: Counter[str] = field(default_factory=Counter)
    usages: list[Usage] = field(default_factory=list)

    def add(self, result: str, usage: Usage | None) -> None:
        """Count one job."""
        self.results[result] += 1
        if usage is not None:
            self.usages.append(usage)

    @property
    def count(self) -> int:
        """The number of jobs."""
        return self.results.total()

    @property
    def as_expected(self) -> bool:
        """Whether each job ended as expected and its usage is known."""
        return set(self.results) == {self.expected} and len(self.usages) == self.count

    def cells(self) -> tuple[str, ...]:
        """The cells of its line in the table."""
        cpu = [usage.cpu_seconds for usage in self.usages if usage.cpu_seconds is not None]
        memory = [usage.memory_peak for usage in self.usages if usage.memory_peak is not None]
        wall = [usage.wall_seconds for usage in self.usages]
        return (
            self.task,
            self.input,
            str(self.count),
            self.expected,
            "  ".join(f"{count} x {result}" for result, count in sorted(self.results.items())),
            f"{statistics.median(cpu):.2f} s" if cpu else "-",
            f"{max(memory) / 2**20:.0f} MiB" if memory else "-",
            f"{statistics.median(wall):.2f} s" if wall else "-",
            "✓" if self.as_expected else "✗",
        )


def write(rows: list[Row], out: TextIO) -> None:
    """Write the table; in colour on a terminal."""
    colour = out.isatty() and "NO_COLOR" not in os.environ
    lines = [_COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    for number, line in enumerate(lines):
        text = "  " + "  ".join(
            cell.rjust(width) if column in _RIGHT_ALIGNED else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text = text.rstrip()
        if colour and number:
            code = 32 if rows[number - 1].as_expected else 31
            text = f"{text[:-1]}\033[{code}m{text[-1]}\033[0m"
        print(text, file=out)
        if number == 0:
            print("  " + "─" * (sum(widths) + 2 * (len(widths) - 1)), file=out)
    print(f"  {LEGEND}", file=out)


def say(text: str) -> None:
    """Show progress on standard error."""
    print(text, file=sys.stderr, flush=True)
