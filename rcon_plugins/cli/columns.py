"""Tables of plain text, and numbers, names and limits as people read them."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from unicodedata import east_asian_width

from rcon_plugins.kernel.cgroup import MAX, IoMax, Resources
from rcon_plugins.settings.limit_table import CGROUP_LIMITS, IO_LIMITS, Limit
from rcon_plugins.settings.units import format_value

#: Shown for a value that the kernel does not report.
UNKNOWN = "-"
_GAP = "  "
#: A text column is not cut below this many characters.
_NARROWEST = 12
_PAGE_WIDTH = 100
_PYTHON = re.compile(r"(?:.*/)?python[0-9.]*")
_WATCHER = "/rcon_plugins/tree/attach_watcher.py"
#: Options of the Python interpreter that take no value and do not say what it runs.
_PLAIN_OPTIONS = frozenset(
    {"-B", "-E", "-I", "-O", "-OO", "-P", "-S", "-b", "-d", "-q", "-s", "-u", "-v", "-x"}
)
_UNITS = ("", "K", "M", "G", "T", "P")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return the rows in columns, below their heads. A head that begins with ``>`` aligns its column to the right.

    Each column is as wide as its widest cell. Where the lines would be longer than ``width``, the text columns are cut:
    the last one first, the first one last.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    names = [head.removeprefix(">") for head in heads]
    widths = [max(map(columns_of, column)) for column in zip(names, *cells, strict=True)]
    if width is not None:
        _shrink(widths, [head.startswith(">") for head in heads], width)
    lines = []
    for row in [names, *cells]:
        padded = [
            _padded(cut(cell, most), most, right=head.startswith(">"))
            for head, cell, most in zip(heads, row, widths, strict=True)
        ]
        line = _GAP.join(padded).rstrip()
        lines.append(line if width is None else cut(line, width))
    return "\n".join(lines)


def _shrink(widths: list[int], numeric: Sequence[bool], width: int) -> None:
    """Reduce the widths of text columns until a line fits into ``width``, or all are at their narrowest."""
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    text = [column for column in range(1, len(widths)) if not numeric[column]]
    for columns in (text[-1:], text[:-1], [0]):
        while excess > 0 and any(widths[column] > _NARROWEST for column in columns):
            widths[max(columns, key=widths.__getitem__)] -= 1
            excess -= 1


def _padded(text: str, width: int, *, right: bool) -> str:
    space = " " * (width - columns_of(text))
    return f"{space}{text}" if right else f"{text}{space}"


def paragraph(label: str, text: str) -> str:
    """Return ``text`` after ``label``, in lines of a page; words and paths stay whole, so that they can be copied."""
    return textwrap.fill(
        text,
        _PAGE_WIDTH,
        initial_indent=label,
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def terminal_width() -> int | None:
    """Return the columns of the terminal on standard output; None where it is no terminal, so that nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def printable(text: str) -> str:
    """Return ``text`` with a ``?`` for each character that could control the terminal or cannot be encoded."""
    return "".join(one if one.isprintable() and not "\ud800" <= one <= "\udfff" else "?" for one in text)


def short_command(words: str) -> str:
    """Return a command line as people know it: without the program's folder, and without the Python that runs it.

    ``/opt/site/bin/python /opt/site/bin/gunicorn app:app`` becomes ``gunicorn app:app``. The process that watches a
    group of ``rcon attach`` becomes ``rcon attach``.
    """
    first, *rest = words.split(" ")
    if not first.startswith(("/", "./", "../")) and not _PYTHON.fullmatch(first):
        return words
    program = first.rpartition("/")[2]
    while _PYTHON.fullmatch(program) and rest and rest[0] in _PLAIN_OPTIONS:
        del rest[0]
    if _PYTHON.fullmatch(program) and rest and "/" in rest[0] and not rest[0].startswith("-"):
        script = rest.pop(0)
        if script.endswith(_WATCHER):
            return "rcon attach"
        program = script.rpartition("/")[2]
    return " ".join([program or first, *rest])


def columns_of(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes."""
    return sum(2 if east_asian_width(one) in "WF" else 1 for one in text)


def cut(text: str, width: int) -> str:
    """Return ``text``, cut to ``width`` columns with an ellipsis where it is longer."""
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
    """Return ``text``, cut at its beginning: for names that begin alike."""
    return cut(text[::-1], width)[::-1]


def size(number: float | None) -> str:
    """Return bytes in at most five characters: ``512K``, ``1.5G``; 1024-based, as limits are written."""
    if number is None:
        return UNKNOWN
    value, power = float(number), 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1024, power + 1
    digits = f"{value:.1f}" if power and value < 9.95 else f"{value:.0f}"
    return f"{digits.removesuffix('.0')}{_UNITS[power]}"


def seconds(number: float | None) -> str:
    """Return seconds with fitting digits: ``0.25``, ``12.3``, ``4520``."""
    if number is None:
        return UNKNOWN
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def count(number: int | None) -> str:
    """Return a number as text, or ``-`` where it is unknown."""
    return UNKNOWN if number is None else str(number)


def percent(share: float | None) -> str:
    """Return a share in percent: 0.314 is ``31%``. Small ones keep a digit: ``3.1%``."""
    if share is None:
        return UNKNOWN
    return f"{share * 100:.1f}%" if 0 < share < 0.0995 else f"{share * 100:.0f}%"


def limits_in_words(limits: Resources) -> list[str]:
    """Return the limits in force, with the names of their options: ``["cpu 30%", "memory 64M"]``."""
    found = _in_words(CGROUP_LIMITS, limits)
    for device, most in sorted(limits.io.items()):
        found += [f"{text} on {device}" for text in _in_words(IO_LIMITS, most)]
    return found


def _in_words(rows: Sequence[Limit], limits: Resources | IoMax) -> list[str]:
    return [
        f"{row.name} {format_value(row.unit, value)}"
        for row in rows
        if (value := getattr(limits, row.field)) not in (None, MAX, row.default)
    ]


def limits_as_json(limits: Resources) -> dict[str, object]:
    """Return the limits by the keys of a policy.

    A number, ``"max"`` for no limit, or null where the kernel has no such limit; ``cpu`` in CPUs, sizes in bytes,
    ``io`` by device.
    """
    devices = {str(device): _as_json(IO_LIMITS, most) for device, most in sorted(limits.io.items())}
    return {**_as_json(CGROUP_LIMITS, limits), "io": devices}


def _as_json(rows: Sequence[Limit], limits: Resources | IoMax) -> dict[str, object]:
    values = {row.key: getattr(limits, row.field) for row in rows}
    return {key: str(MAX) if value is MAX else value for key, value in values.items()}
