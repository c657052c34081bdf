"""The table of ``rcon top``: its columns and sort keys, and the table as text, as JSON and as a screen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rcon_plugins.cli.columns import (
    UNKNOWN,
    count,
    cut,
    cut_left,
    percent,
    printable,
    short_command,
    size,
    table,
)
from rcon_plugins.cli.top.samples import Row, ServerRow, View

#: Below the table on a terminal.
LEGEND = "MEMORY: % of its limit  STALLED: % of the last 10 s  HITS: limits reached"
KEYS = "q quit  ? help  R reverse  arrows scroll  sort: c CPU  m MEMORY  l HITS  n name"
#: From this terminal width on, the owner is shown, in at least so many columns.
_WITH_OWNER, _LEAST_OWNER = 120, 20
_LEAST_NAME = 18


class Column(NamedTuple):
    """A column: ``width`` fits the widest likely cell, ``sort`` is the key it is sorted by, ``help`` explains it."""

    head: str
    width: int
    sort: str
    cell: Callable[[Row], str]
    help: str


class Sort(NamedTuple):
    """A sort key: its letter on the keyboard, what it sorts by, and the value compared (the highest first)."""

    letter: str
    label: str
    of: Callable[[Row], float]


def _memory(row: Row) -> str:
    return f"{size(row.memory)} {_whole_percent(row.memory_share):>4}"


def _whole_percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share * 100:.0f}%"


def _stalled(row: Row) -> str:
    if row.stalled is None:
        return UNKNOWN
    share, resource = row.stalled
    return f"{share * 100:.0f}% {resource[:3]}" if share >= 0.005 else "0%"


#: In the order of their importance: a narrow terminal leaves out the last ones.
COLUMNS = (
    Column("CPU", 5, "cpu", lambda row: percent(row.cpu), "CPU use; 100% is one CPU"),
    Column(
        "THROTTLED", 9, "throttled", lambda row: percent(row.throttled),
        "share of CPU periods in which it used up its quota and waited",
    ),
    Column("MEMORY", 10, "memory", _memory, "memory in use, and how much of its limit that is"),
    Column("PROCS", 5, "pids", lambda row: count(row.pids), "processes and threads"),
    Column(
        "STALLED", 8, "pressure", _stalled,
        "longest wait for cpu, memory or io, in % of the last 10 s",
    ),
    Column(
        "HITS", 4, "hits", lambda row: count(row.hits),
        "limits reached: requests that a limit ended or refused",
    ),
    Column("READ/s", 6, "read", lambda row: size(row.read), "bytes read from disks in a second"),
    Column("WRITE/s", 7, "write", lambda row: size(row.written), "bytes written to disks in a second"),
    Column("KILLS", 5, "hits", lambda row: count(row.oom_kills), "OOM kills, in total"),
)  # fmt: skip

SORTS = {
    "cpu": Sort("c", "CPU", lambda row: row.cpu or 0),
    "throttled": Sort("t", "THROTTLED", lambda row: row.throttled or 0),
    "memory": Sort("m", "MEMORY in use", lambda row: row.memory or 0),
    "share": Sort("%", "MEMORY, % of its limit", lambda row: row.memory_share or 0),
    "read": Sort("r", "READ/s", lambda row: row.read or 0),
    "write": Sort("w", "WRITE/s", lambda row: row.written or 0),
    "pids": Sort("p", "PROCS", lambda row: row.pids or 0),
    "pressure": Sort("s", "STALLED", lambda row: row.stalled[0] if row.stalled else 0),
    "hits": Sort("l", "HITS", lambda row: row.hits or 0),
    "name": Sort("n", "the name of the group", lambda _: 0),
}


def ordered(rows: Iterable[Row], by: str, backwards: bool = False) -> list[Row]:
    """Return the rows with the highest first, and equal ones by name."""
    named = sorted(rows, key=lambda row: row.name)
    found = sorted(named, key=lambda row: -SORTS[by].of(row))
    return found[::-1] if backwards else found


def summary(view: View, by: str, interval: float) -> str:
    """Return the line above the table."""
    rows = view.rows
    outer = [row for row in rows if not row.nested]
    cpu = sum(row.cpu or 0 for row in outer)
    memory = sum(row.memory or 0 for row in outer)
    groups = f"{len(rows)} group{'' if len(rows) == 1 else 's'}"
    nodes = {row.node for row in rows} - {None}
    if nodes:
        groups += f" of {len(nodes)} worker{'' if len(nodes) == 1 else 's'}"
    unroutable = _unroutable(view.servers)
    return f"{groups}, CPU {percent(cpu)}, memory {size(memory)}{unroutable}; sorted by {by}, every {interval:g} s"


def _unroutable(servers: Sequence[ServerRow]) -> str:
    """Return how many requests and tasks no route names; nothing if it is none, a dash if no server tells it."""
    known = [server.unroutable for server in servers if server.unroutable is not None]
    if sum(known):
        return f", unroutable {sum(known)}{' or more' if len(known) < len(servers) else ''}"
    return f", unroutable {UNKNOWN}" if len(known) < len(servers) else ""


def as_text(rows: Sequence[Row]) -> str:
    """Return the table as plain text, with the owner in the last column."""
    heads = ("GROUP", *(f">{column.head}" for column in COLUMNS), "OWNER")
    cells = [[row.name, *(column.cell(row) for column in COLUMNS), short_command(row.owner)] for row in rows]
    return table(heads, cells)


def as_json(row: Row) -> dict[str, Any]:
    """Return a row for JSON."""
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
        "hits": {
            "total": row.hits,
            "memory": row.memory_hits,
            "pids": row.pids_hits,
            "oom_kills": row.oom_kills,
        },
        "new_hits": row.new_hits,
        "tally": None if row.tally is None else row.tally.to_data(),
    }


def server_as_json(server: ServerRow) -> dict[str, Any]:
    """Return a server for JSON."""
    return {
        "instance": server.instance,
        "owner": server.owner,
        "node": server.node,
        "unroutable": server.unroutable,
        "new_unroutable": server.new_unroutable,
    }


def screen(rows: Sequence[Row], by: str, title: str, first: int, width: int, height: int) -> Any:
    """Return what a terminal of this size shows, from row ``first`` on, for rich to print."""
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
        head = Text(
            column.head, style="bold underline" if column.sort == by.replace("share", "memory") else ""
        )
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
    filler = [Text("")] * max(0, room - len(rows) + first)
    return Group(
        Text(f"rcon top: {title}", style="bold", no_wrap=True, overflow="ellipsis"),
        made,
        *filler,
        Text(below, style="dim", no_wrap=True, overflow="ellipsis"),
        Text(KEYS, style="reverse", no_wrap=True, overflow="ellipsis"),
    )


def help_screen() -> Any:
    """Return the screen that ``?`` shows, for rich to print."""
    from rich.text import Text

    columns = [f"  {column.head:<10} {column.help}" for column in COLUMNS]
    sorts = [f"  {sort.letter}   sort by {sort.label}" for sort in SORTS.values()]
    text = "\n".join(
        [
            "rcon top: help (q quits; any other key goes back)",
            "",
            *columns,
            "",
            *sorts,
            "  R   reverse the order",
        ]
    )
    return Text(text, no_wrap=True, overflow="ellipsis")


def _names(rows: Sequence[Row], width: int) -> list[str]:
    """Return the names cut to ``width``: at the beginning or at the end, whichever keeps more of them different."""
    whole = [printable(row.name) for row in rows]
    if all(len(name) <= width for name in whole):
        return whole
    ends = [_of_worker(row, width) if row.node else cut_left(printable(row.name), width) for row in rows]
    beginnings = [
        end if row.node else cut(name, width) for row, name, end in zip(rows, whole, ends, strict=True)
    ]
    return max(ends, beginnings, key=lambda names: len(set(names)))


def _of_worker(row: Row, width: int) -> str:
    """Return the name of a worker and its group, each cut at its beginning."""
    node = printable(row.node or "").removeprefix("celery@")
    group = printable(row.name[len(row.node or "") + 1 :])
    group = cut_left(group, width - 1 - min(len(node), max(width // 3, 1)))
    return f"{cut_left(node, width - 1 - len(group))}/{group}"


def _columns_width(columns: Sequence[Column]) -> int:
    return sum(column.width + 1 for column in columns)


def _fitting(width: int) -> list[Column]:
    """Return the first columns that fit and leave room for the name."""
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
    if column.sort == "memory" and share >= 0.9:
        return "bold red"
    if column.sort == "memory" and share >= 0.75:
        return "yellow"
    if column.sort == "hits" and row.new_hits:
        return "bold red"
    if column.sort == "throttled" and (row.throttled or 0) >= 0.5:
        return "yellow"
    return ""
