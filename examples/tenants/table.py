"""The table at the end of the demonstration."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, TextIO

_HEADS = ("tenant", "limit", "confined", "measured", "requests", "answers", "p50", "p99", "")


@dataclass(frozen=True)
class Row:
    """One tenant, with or without confinement."""

    tenant: str
    limit: str
    confined: bool
    measured: str
    answers: Counter[str]
    p50: float | None
    p99: float | None
    #: Whether the limit held; None where there was none.
    held: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row for ``--json``."""
        row = asdict(self)
        row["answers"] = dict(self.answers)
        row["requests"] = self.answers.total()
        return row


def write(rows: list[Row], out: TextIO) -> None:
    """Write the table; in colour where it goes to a terminal."""
    colour = out.isatty() and "NO_COLOR" not in os.environ
    cells = [_HEADS, *(_cells(row, first=number % 2 == 0) for number, row in enumerate(rows))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
    rule = "  " + "─" * (sum(widths) + 2 * (len(widths) - 1))
    for number, line in enumerate(cells):
        text = "  " + "  ".join(
            cell.rjust(width) if column in (4, 6, 7) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        row = rows[number - 1] if number else None
        print(_paint(text.rstrip(), row) if colour else text.rstrip(), file=out)
        if number % 2 == 0:
            print(rule, file=out)


def _cells(row: Row, *, first: bool) -> tuple[str, ...]:
    return (
        row.tenant if first else "",
        row.limit if first else "",
        "yes" if row.confined else "no",
        row.measured,
        str(row.answers.total()),
        "  ".join(f"{count} x {answer}" for answer, count in sorted(row.answers.items())),
        _milliseconds(row.p50),
        _milliseconds(row.p99),
        {None: "", True: "✓", False: "✗"}[row.held],
    )


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


def _paint(text: str, row: Row | None) -> str:
    if row is None:
        return f"\033[1m{text}\033[0m"
    if not row.confined:
        return f"\033[2m{text}\033[0m"
    if row.held is None:
        return text
    return text[:-1] + (f"\033[32m{text[-1]}\033[0m" if row.held else f"\033[31m{text[-1]}\033[0m")


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)
