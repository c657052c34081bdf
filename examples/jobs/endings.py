"""The table at the end of the demonstration."""

from __future__ import annotations

import os
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rcon_plugins import Usage

_HEADS = ("job", "with", "sent", "is to end", "ended", "cpu", "memory", "time", "")
_NUMBERS = (2, 5, 6, 7)


@dataclass
class Row:
    """All jobs of one kind."""

    task: str
    what: str
    expected: str
    ended: Counter[str] = field(default_factory=Counter)
    usages: list[Usage] = field(default_factory=list)

    def add(self, ended: str, usage: Usage | None) -> None:
        """Count one more."""
        self.ended[ended] += 1
        if usage is not None:
            self.usages.append(usage)

    @property
    def count(self) -> int:
        """How many there were."""
        return self.ended.total()

    @property
    def good(self) -> bool:
        """Whether each ended as it should, and it is known what it used."""
        return set(self.ended) == {self.expected} and len(self.usages) == self.count

    def cells(self) -> tuple[str, ...]:
        """The cells of its line: CPU time and wall time in the middle, memory at the most."""
        cpu = [usage.cpu_seconds for usage in self.usages if usage.cpu_seconds is not None]
        memory = [usage.memory_peak for usage in self.usages if usage.memory_peak is not None]
        wall = [usage.wall_seconds for usage in self.usages]
        return (
            self.task,
            self.what,
            str(self.count),
            self.expected,
            "  ".join(f"{count} x {how}" for how, count in sorted(self.ended.items())),
            f"{statistics.median(cpu):.2f} s" if cpu else "-",
            f"{max(memory) / 2**20:.0f} MiB" if memory else "-",
            f"{statistics.median(wall):.2f} s" if wall else "-",
            "✓" if self.good else "✗",
        )


def write(rows: list[Row], out: TextIO) -> None:
    """Write the table; in colour where it goes to a terminal."""
    colour = out.isatty() and "NO_COLOR" not in os.environ
    lines = [_HEADS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    for number, line in enumerate(lines):
        text = "  " + "  ".join(
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text = text.rstrip()
        if colour and number:
            text = text[:-1] + (
                f"\033[32m{text[-1]}\033[0m" if rows[number - 1].good else f"\033[31m{text[-1]}\033[0m"
            )
        print(text, file=out)
        if number == 0:
            print("  " + "─" * (sum(widths) + 2 * (len(widths) - 1)), file=out)


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)
