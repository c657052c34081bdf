"""Tables of plain text, and numbers and names as people read them."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from unicodedata import east_asian_width

from rcon_plugins.kernel.cgroup import MAX, IoMax, Resources
from rcon_plugins.settings.limit_table import CGROUP_LIMITS, IO_LIMITS, Limit
from rcon_plugins.settings.units import written

#: What stands for a value that the kernel does not tell.
NOT_TOLD = "-"
_GAP = "  "
_PYTHON = re.compile(r"(?:.*/)?python[0-9.]*")
_WATCHER = "/rcon_plugins/tree/attach_watcher.py"
#: Options of Python's that take no word after them, and say nothing of what it runs.
_PLAIN_OPTIONS = frozenset(
    {"-B", "-E", "-I", "-O", "-OO", "-P", "-S", "-b", "-d", "-q", "-s", "-u", "-v", "-x"}
)
_UNITS = ("", "K", "M", "G", "T", "P")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Columns, each as wide as its widest cell; the last is cut to ``width``, where there is one.

    Heads that begin with ``>`` align to the right.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    names = [head.removeprefix(">") for head in heads]
    widths = [max(map(columns_of, column)) for column in zip(names, *cells, strict=True)]
    lines = []
    for row in [names, *cells]:
        padded = [
            f"{' ' * (most - columns_of(cell))}{cell}" if head.startswith(">") else
            f"{cell}{' ' * (most - columns_of(cell))}"
            for head, cell, most in zip(heads, row, widths, strict=True)
        ]  # fmt: skip
        line = _GAP.join(padded).rstrip()
        lines.append(line if width is None else cut(line, width))
    return "\n".join(lines)


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None where it is none, and nothing is to be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def printable(text: str) -> str:
    """``text`` with a ``?`` for all that could do something to a terminal, or that it could not encode."""
    return "".join(one if one.isprintable() and not "\ud800" <= one <= "\udfff" else "?" for one in text)


def short_command(words: str) -> str:
    """A command line as people know it: without the folder of its program, and without the Python that runs that.

    ``/opt/site/bin/python /opt/site/bin/gunicorn app:app`` is ``gunicorn app:app``; what watches over a group that
    ``rcon attach`` made is that.
    """
    first, *rest = words.split(" ")
    if not first.startswith(("/", "./", "../")) and not _PYTHON.fullmatch(first):
        return words
    program = first.rpartition("/")[2]
    while _PYTHON.fullmatch(program) and rest and rest[0] in _PLAIN_OPTIONS:
        del rest[0]
    if _PYTHON.fullmatch(program) and rest and rest[0].startswith("/"):
        script = rest.pop(0)
        if script.endswith(_WATCHER):
            return "rcon attach"
        program = script.rpartition("/")[2]
    return " ".join([program or first, *rest])


def columns_of(text: str) -> int:
    """The columns that a terminal takes for it."""
    return sum(2 if east_asian_width(one) in "WF" else 1 for one in text)


def cut(text: str, width: int) -> str:
    """As much of it as fits, with a mark where something is missing."""
    if columns_of(text) <= width:
        return text
    kept, left = "", width - 1
    for one in text:
        left -= columns_of(one)
        if left < 0:
            break
        kept += one
    return f"{kept}…"


def cut_left(text: str, width: int) -> str:
    """As much of its end as fits: of names that begin alike."""
    return cut(text[::-1], width)[::-1]


def size(number: float | None) -> str:
    """Bytes in at most five characters: ``512K``, ``1.5G``; 1024-based, as limits are written."""
    if number is None:
        return NOT_TOLD
    value, place = float(number), 0
    while value >= 999.5 and place < len(_UNITS) - 1:
        value, place = value / 1024, place + 1
    digits = f"{value:.1f}" if place and value < 9.95 else f"{value:.0f}"
    return f"{digits.removesuffix('.0')}{_UNITS[place]}"


def seconds(number: float | None) -> str:
    """CPU seconds: ``0.25``, ``12.3``, ``4520``."""
    if number is None:
        return NOT_TOLD
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def count(number: int | None) -> str:
    """A number, or that there is none."""
    return NOT_TOLD if number is None else str(number)


def percent(share: float | None) -> str:
    """0.314 is ``31``; small ones keep a digit: ``3.1``."""
    if share is None:
        return NOT_TOLD
    return f"{share * 100:.1f}" if 0 < share < 0.0995 else f"{share * 100:.0f}"


def limits_in_words(limits: Resources) -> list[str]:
    """The limits in force, with the names of their options: ``["cpu 30%", "memory 64M"]``."""
    found = _in_words(CGROUP_LIMITS, limits)
    for device, most in sorted(limits.io.items()):
        found += [f"{text} on {device}" for text in _in_words(IO_LIMITS, most)]
    return found


def _in_words(rows: Sequence[Limit], limits: Resources | IoMax) -> list[str]:
    return [
        f"{row.name} {written(row.unit, value)}"
        for row in rows
        if (value := getattr(limits, row.field)) not in (None, MAX, row.default)
    ]


def limits_as_json(limits: Resources) -> dict[str, object]:
    """The limits by the keys of a policy: a number, ``"max"`` for no limit, null where the kernel has no such limit.

    ``cpu`` in CPUs, sizes in bytes, ``io`` by device.
    """
    devices = {str(device): _as_json(IO_LIMITS, most) for device, most in sorted(limits.io.items())}
    return {**_as_json(CGROUP_LIMITS, limits), "io": devices}


def _as_json(rows: Sequence[Limit], limits: Resources | IoMax) -> dict[str, object]:
    values = {row.key: getattr(limits, row.field) for row in rows}
    return {key: str(MAX) if value is MAX else value for key, value in values.items()}
