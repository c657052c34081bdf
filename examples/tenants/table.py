"""The two tables at the end of the demonstration: what each limit did, and what the clients saw."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

_VERDICTS = {None: "", True: "✓", False: "✗"}
_COLOURS = {"✓": "\033[32m✓\033[0m", "✗": "\033[31m✗\033[0m"}


@dataclass(frozen=True)
class Visit:
    """What one phase measured of a tenant, and what its clients saw: answers by status, and latency in seconds."""

    measured: str
    answers: Counter[str]
    p50: float | None
    p99: float | None


@dataclass(frozen=True)
class Row:
    """One tenant, unconfined and confined. ``held``: whether its limit held."""

    tenant: str
    limit: str
    unconfined: Visit
    confined: Visit
    held: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the row for ``--json``."""
        row = asdict(self)
        for name, visit in (("unconfined", self.unconfined), ("confined", self.confined)):
            row[name]["answers"] = dict(visit.answers)
        return row


def write(rows: list[Row], out: TextIO) -> None:
    """Write both tables; in colour if ``out`` is a terminal."""
    limits = [("tenant", "limit", "unconfined", "confined", "")]
    limits += [
        (r.tenant, r.limit, r.unconfined.measured, r.confined.measured, _VERDICTS[r.held]) for r in rows
    ]
    _write(limits, out)
    print("\n  Answers, and the time that half and 99 % of them took at most:\n", file=out)
    clients = [("tenant", "unconfined", "", "confined", "")]
    for row in rows:
        clients.append((row.tenant, *_seen(row.unconfined), *_seen(row.confined)))
    _write(clients, out)


def _write(lines: Sequence[tuple[str, ...]], out: TextIO) -> None:
    """Write lines in columns, the first line as their heads."""
    colour = out.isatty() and "NO_COLOR" not in os.environ
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        text = "  " + "   ".join(cells).rstrip()
        if colour:
            text = (
                f"\033[1m{text}\033[0m" if number == 0 else f"{text[:-1]}{_COLOURS.get(text[-1], text[-1])}"
            )
        print(text, file=out)
        if number == 0:
            print("  " + "─" * (sum(widths) + 3 * (len(widths) - 1)), file=out)


def _seen(visit: Visit) -> tuple[str, str]:
    answers = ", ".join(f"{count} x {answer}" for answer, count in sorted(visit.answers.items()))
    return answers, f"{_milliseconds(visit.p50)} / {_milliseconds(visit.p99)}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.0f} ms"


def say(text: str) -> None:
    """Print progress on standard error."""
    print(text, file=sys.stderr, flush=True)
