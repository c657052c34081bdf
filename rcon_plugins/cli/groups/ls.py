"""``rcon ls`` and ``rcon stat``: the groups of this machine, and all about one of them."""

from __future__ import annotations

import errno
import json
from typing import Any

import click

from rcon_plugins.cli.columns import (
    NOT_TOLD,
    count,
    limits_as_json,
    limits_in_words,
    percent,
    printable,
    seconds,
    short_command,
    size,
    table,
    terminal_width,
)
from rcon_plugins.cli.exit import say
from rcon_plugins.errors import KernelError
from rcon_plugins.groups.find import FoundGroups, Group, Owner, find_groups, is_gone
from rcon_plugins.identity import userdb
from rcon_plugins.kernel.cgroup import Reading
from rcon_plugins.kernel.cgroup.statistics import Pressure, Stall

_HEADS = ("GROUP", ">PROCS", ">MEMORY", ">CPU-S", "LIMITS", ">OWNER", "COMMAND")


def ls(as_json: bool) -> int:
    """Print the table, or the JSON. Says on standard error what could not be looked into."""
    found = find_groups()
    rows = []
    for group in found.groups:
        try:
            rows.append(read_process(group))
        except KernelError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                found.unreadable.append(error.path or group.cgroup.path)
            elif not is_gone(error):
                raise
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        click.echo(table(_HEADS, [_cells(row) for row in rows], terminal_width()))
    else:
        click.echo("no groups")
    tell_unreadable(found)
    return 0


def tell_unreadable(found: FoundGroups) -> None:
    """One line on standard error, if there is something to say."""
    if found.unreadable:
        first, more = found.unreadable[0], len(found.unreadable) - 1
        also = f" and {more} more" if more else ""
        say("rcon", f"note: {first}{also} cannot be looked into; as root all can")


def read_process(group: Group) -> dict[str, Any]:
    """What ``ls`` says of a group, as JSON has it. Raises KernelError, also where it has gone meanwhile."""
    limits = group.limits()
    return {
        **name_of(group),
        "limits": limits_as_json(limits),
        "limits_in_words": limits_in_words(limits),
        "processes": len(group.pids()),
        "frozen": group.is_frozen(),
        "usage": group.usage()._asdict(),
    }


def name_of(group: Group) -> dict[str, Any]:
    """Which group it is, as JSON has it."""
    return {
        "group": group.label,
        "name": group.name,
        "kind": group.kind,
        "instance": group.instance,
        "cgroup": group.cgroup.path,
        "policy": group.policy,
        "key": group.key,
        "owner": {
            "pid": group.owner.pid,
            "alive": group.owner.alive,
            "uid": group.owner.uid,
            "command": group.owner.command,
        },
    }


def _cells(row: dict[str, Any]) -> list[str]:
    usage, owner = row["usage"], row["owner"]
    return [
        row["group"],
        f"{row['processes']}{' frozen' if row['frozen'] else ''}",
        size(usage["memory_current"]),
        seconds(usage["cpu_seconds"]),
        ", ".join(row["limits_in_words"]) or NOT_TOLD,
        str(owner["pid"]),
        short_command(owner["command"] or "") or ("?" if owner["alive"] else "(has ended)"),
    ]


def stat(group: Group, as_json: bool) -> int:
    """Print all about one group. Raises KernelError, also where it has gone meanwhile."""
    usage, statistics, pressure = group.usage(), group.statistics(), group.pressure()
    limits, processes = group.limits(), group.processes()
    if as_json:
        click.echo(
            json.dumps(
                {
                    **name_of(group),
                    "directories": group.cgroup.directories,
                    "frozen": group.is_frozen(),
                    "limits": limits_as_json(limits),
                    "usage": usage._asdict(),
                    "statistics": statistics._asdict(),
                    "pressure": {name: _pressure_as_json(told) for name, told in pressure.items()},
                    "processes": [process._asdict() for process in processes],
                },
                indent=2,
            )
        )
        return 0
    lines = [
        _line("group", group.label + ("" if group.policy is None else f" (policy {group.policy})")),
        _line("kind", _KINDS[group.kind]),
        _line("cgroup", group.cgroup.path),
        _line("owner", _owner(group.owner)),
        _line("limits", ", ".join(limits_in_words(limits)) or "none"),
        _line("frozen", "yes" if group.is_frozen() else "no"),
        "",
        *_usage_lines(usage, group),
    ]
    lines += _pressure_lines(pressure)
    lines.append("")
    if processes:
        rows = [
            [str(one.pid), user(one.uid), one.state, str(one.threads), size(one.memory), one.command]
            for one in processes
        ]
        heads = (">PID", "USER", "STATE", ">THREADS", ">MEMORY", "COMMAND")
        lines.append(table(heads, rows, terminal_width()))
    else:
        lines.append("no processes")
    click.echo("\n".join(lines))
    return 0


_KINDS = {
    "work": "work: processes, which end with their owner",
    "host": "host: threads of the server itself, which enter and leave",
    "attached": "attached: running processes that rcon attach moved here",
}


def user(uid: int | None) -> str:
    """The name of an account, or its number."""
    if uid is None:
        return NOT_TOLD
    account = userdb.user(uid)
    return str(uid) if account is None else account.name


def _owner(owner: Owner) -> str:
    if not owner.alive:
        return f"{owner.pid}, which has ended: the next start of a server, or rcon gc, removes the group"
    return f"{owner.pid} ({user(owner.uid)}) {owner.command or '?'}"


def _usage_lines(usage: Reading, group: Group) -> list[str]:
    statistics = group.statistics()
    limits = group.limits()
    cpu = f"{seconds(usage.cpu_seconds)} s"
    if statistics.cpu_user_seconds is not None:
        cpu += (
            f" (user {seconds(statistics.cpu_user_seconds)}, system {seconds(statistics.cpu_system_seconds)})"
        )
    memory = f"{size(usage.memory_current)}, peak {size(usage.memory_peak)}"
    if isinstance(limits.memory_max, int) and usage.memory_current is not None and limits.memory_max:
        memory += f", {percent(usage.memory_current / limits.memory_max)} % of its limit"
    if statistics.memory_anon is not None:
        memory += f" (anonymous {size(statistics.memory_anon)}, of files {size(statistics.memory_file)})"
    pids = count(usage.pids_current)
    if statistics.pids_peak is not None:
        pids += f", peak {statistics.pids_peak}"
    throttled = NOT_TOLD
    if statistics.cpu_periods is not None:
        throttled = (
            f"{count(statistics.cpu_throttled)} of {statistics.cpu_periods} periods,"
            f" {seconds(statistics.cpu_throttled_seconds)} s"
        )
    return [
        _line("cpu", cpu),
        _line("throttled", throttled),
        _line("memory", memory),
        _line("swap", size(statistics.swap_current)),
        _line("limit hits", f"memory {count(usage.memory_limit_hits)}, pids {count(usage.pids_limit_hits)}"),
        _line("slowed down", f"{count(statistics.memory_high_hits)} (at memory-high)"),
        _line("OOM kills", count(usage.oom_kills)),
        _line("io", f"read {size(usage.io_read_bytes)}, written {size(usage.io_write_bytes)}"),
        _line("pids", pids),
    ]


def _pressure_lines(pressure: dict[str, Pressure]) -> list[str]:
    if not pressure:
        return [_line("pressure", "the kernel does not tell (it takes cgroup v2, and a boot with psi=1)")]
    return [
        _line(f"{name} wait", f"{_stall(told.some)}; all at once {_stall(told.full)}")
        for name, told in pressure.items()
    ]


def _stall(stall: Stall | None) -> str:
    if stall is None:
        return NOT_TOLD
    return f"{percent(stall.share)} % of the last 10 s, {seconds(stall.seconds)} s in all"


def _pressure_as_json(pressure: Pressure) -> dict[str, object]:
    return {
        "some": None if pressure.some is None else pressure.some._asdict(),
        "full": None if pressure.full is None else pressure.full._asdict(),
    }


def _line(label: str, value: str) -> str:
    return f"{label:<13}{printable(value)}"
