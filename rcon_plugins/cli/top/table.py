"""The table of ``rcon top``: its columns, what it can be sorted by, and the three shapes it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rcon_plugins.cli.columns import (
    NOT_TOLD,
    count,
    cut,
    cut_left,
    percent,
    printable,
    short_command,
    size,
    table,
)
from rcon_plugins.cli.top.rows import Row

#: What a terminal says below the table.
LEGEND = "WAIT: % of time, for cpu/memory/io   HITS: of memory/pids limits, OOM kills"


class Column(NamedTuple):
    """``width`` is for the widest that is likely; ``sort`` names the key it is sorted by."""

    head: str
    width: int
    sort: str
    cell: Callable[[Row], str]


class Sort(NamedTuple):
    """A key to sort by: its letter on the keyboard, what the last line calls it, what is compared (the most first)."""

    letter: str
    label: str
    of: Callable[[Row], float]


def _wait(row: Row) -> str:
    return "/".join(_short(row.pressure.get(name)) for name in ("cpu", "memory", "io"))


def _short(share: float | None) -> str:
    return NOT_TOLD if share is None else f"{share * 100:.0f}"


def _hits(row: Row) -> str:
    return f"{count(row.memory_hits)}/{count(row.pids_hits)}/{count(row.oom_kills)}"


COLUMNS = (
    Column("CPU%", 5, "cpu", lambda row: percent(row.cpu)),
    Column("THR%", 4, "throttled", lambda row: percent(row.throttled)),
    Column("MEM", 5, "memory", lambda row: size(row.memory)),
    Column("MEM%", 4, "share", lambda row: _short(row.memory_share)),
    Column("READ/s", 6, "read", lambda row: size(row.read)),
    Column("WRITE/s", 7, "write", lambda row: size(row.written)),
    Column("PIDS", 4, "pids", lambda row: count(row.pids)),
    Column("WAITc/m/i", 9, "pressure", _wait),
    Column("HITSm/p/k", 9, "hits", _hits),
)

SORTS = {
    "cpu": Sort("c", "cpu", lambda row: row.cpu or 0),
    "throttled": Sort("t", "thr", lambda row: row.throttled or 0),
    "memory": Sort("m", "mem", lambda row: row.memory or 0),
    "share": Sort("%", "of", lambda row: row.memory_share or 0),
    "read": Sort("r", "read", lambda row: row.read or 0),
    "write": Sort("w", "write", lambda row: row.written or 0),
    "pids": Sort("p", "pids", lambda row: row.pids or 0),
    "pressure": Sort(
        "s", "wait", lambda row: max([share or 0 for share in row.pressure.values()], default=0)
    ),
    "hits": Sort("l", "hits", lambda row: row.hits),
    "name": Sort("n", "name", lambda _: 0),
}


def ordered(rows: Iterable[Row], by: str, backwards: bool = False) -> list[Row]:
    """The most first, and what is equal by name."""
    named = sorted(rows, key=lambda row: row.name)
    found = sorted(named, key=lambda row: -SORTS[by].of(row))
    return found[::-1] if backwards else found


def summary(rows: Sequence[Row], by: str, interval: float) -> str:
    """The line above the table."""
    cpu = sum(row.cpu or 0 for row in rows)
    memory = sum(row.memory or 0 for row in rows)
    groups = f"{len(rows)} group{'' if len(rows) == 1 else 's'}"
    nodes = {row.node for row in rows} - {None}
    if nodes:
        groups += f" of {len(nodes)} worker{'' if len(nodes) == 1 else 's'}"
    return f"{groups}, cpu {percent(cpu)} %, memory {size(memory)}; sorted by {by}, every {interval:g} s"


def as_text(rows: Sequence[Row]) -> str:
    """Columns as wide as they need to be, with the owner at the end."""
    heads = ("GROUP", *(f">{column.head}" for column in COLUMNS), "OWNER")
    cells = [[row.name, *(column.cell(row) for column in COLUMNS), short_command(row.owner)] for row in rows]
    return table(heads, cells)


def as_json(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    return {
        "group": row.name,
        "owner": row.owner,
        "node": row.node,
        "cpu": row.cpu,
        "throttled": row.throttled,
        "memory": row.memory,
        "memory_limit": row.memory_limit,
        "read": row.read,
        "write": row.written,
        "pids": row.pids,
        "pids_limit": row.pids_limit,
        "pressure": dict(row.pressure),
        "hits": {"memory": row.memory_hits, "pids": row.pids_hits, "oom_kills": row.oom_kills},
        "new_hits": row.new_hits,
    }


def shown(rows: Sequence[Row], by: str, title: str, first: int, width: int, height: int) -> Any:
    """What a terminal of this size shows, from row ``first`` on: something that rich prints."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    columns = _fitting(width)
    wide = width >= _WITH_OWNER
    name_width = width - _columns_width(columns)
    if wide:
        name_width = min(max([len(row.name) for row in rows], default=0) + 1, name_width - _LEAST_OWNER)
    made = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="reverse", collapse_padding=True
    )
    made.add_column(Text("GROUP"), no_wrap=True, width=name_width, overflow="ellipsis")
    for column in columns:
        head = Text(column.head, style="bold underline" if column.sort == by else "")
        made.add_column(head, justify="right", no_wrap=True, width=column.width)
    if wide:
        made.add_column(Text("OWNER"), no_wrap=True, width=width - name_width - _columns_width(columns) - 1)
    room = max(1, height - 4)
    names = _names(rows, name_width)
    for row, name in list(zip(rows, names, strict=True))[first : first + room]:
        cells = [Text(column.cell(row), style=_style(column, row)) for column in columns]
        owner = [Text(printable(short_command(row.owner)), style="dim")] if wide else []
        made.add_row(Text(name), *cells, *owner)
    left = len(rows) - first - room
    below = f"{left} more below (arrow keys)" if left > 0 else LEGEND
    keys = " ".join(f"{sort.letter}:{sort.label}" for sort in SORTS.values())
    filler = [Text("")] * max(0, room - len(rows) + first)
    return Group(
        Text(f"rcon top: {title}", style="bold", no_wrap=True, overflow="ellipsis"),
        made,
        *filler,
        Text(below, style="dim", no_wrap=True, overflow="ellipsis"),
        Text(f"q:quit R:turn {keys}", style="dim", no_wrap=True, overflow="ellipsis"),
    )


#: From this width on the owner is shown, in so many columns at least.
_WITH_OWNER, _LEAST_OWNER = 110, 20
_LEAST_NAME = 12


def _names(rows: Sequence[Row], width: int) -> list[str]:
    """Their names, as much of them as fits: the end, or the beginning where more of them differ in that."""
    whole = [printable(row.name) for row in rows]
    if all(len(name) <= width for name in whole):
        return whole
    ends = [_of_worker(row, width) if row.node else cut_left(printable(row.name), width) for row in rows]
    beginnings = [
        end if row.node else cut(name, width) for row, name, end in zip(rows, whole, ends, strict=True)
    ]
    return max(ends, beginnings, key=lambda names: len(set(names)))


def _of_worker(row: Row, width: int) -> str:
    """As much of the name of a worker, and of a group of its own, as fits."""
    node = printable(row.node or "").removeprefix("celery@")
    group = printable(row.name[len(row.node or "") + 1 :])
    group = cut_left(group, width - 1 - min(len(node), max(width // 3, 1)))
    return f"{cut_left(node, width - 1 - len(group))}/{group}"


def _columns_width(columns: Sequence[Column]) -> int:
    return sum(column.width + 1 for column in columns)


def _fitting(width: int) -> list[Column]:
    """The columns that leave room for the name; of a narrow terminal the last ones are left out."""
    left = width - _LEAST_NAME
    found = []
    for column in COLUMNS:
        left -= column.width + 1
        if left < 0:
            break
        found.append(column)
    return found


def _style(column: Column, row: Row) -> str:
    share = row.memory_share or 0
    if column.sort == "share" and share >= 0.9:
        return "bold red"
    if column.sort == "share" and share >= 0.75:
        return "yellow"
    if column.sort == "hits" and row.new_hits:
        return "bold red"
    if column.sort == "throttled" and (row.throttled or 0) >= 0.5:
        return "yellow"
    return ""
