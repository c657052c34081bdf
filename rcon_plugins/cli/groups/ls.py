"""``rcon ls``: all groups of this machine, with their limits and usage."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from typing import Any

import click

from rcon_plugins.cli.columns import (
    UNKNOWN,
    count,
    limits_as_json,
    limits_in_words,
    printable,
    seconds,
    short_command,
    size,
    table,
    terminal_width,
)
from rcon_plugins.cli.exit import say
from rcon_plugins.errors import KernelError
from rcon_plugins.groups.find import FoundGroups, Group, find_groups
from rcon_plugins.groups.sample import limit_hits
from rcon_plugins.kernel.files import gone

_HEADS = ("GROUP", ">PROCS", ">MEMORY", ">CPU TIME", ">HITS", "LIMITS", ">PID", "OWNER")
#: What stands for the command of an owner that cannot be read, by whether the owner is alive.
_OWNERS = {True: "?", False: "(has ended)", None: "(unknown)"}


def ls(as_json: bool) -> int:
    """Print the table or the JSON, and on standard error which cgroups this user cannot read."""
    found = find_groups()
    rows = []
    for group in found.groups:
        try:
            rows.append(group_data(group))
        except KernelError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                found.unreadable.append(error.path or group.cgroup.path)
            elif not gone(error):
                raise
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif rows:
        click.echo(table(_HEADS, [_cells(row) for row in rows], terminal_width()))
    else:
        click.echo("no groups")
    if not as_json:
        click.echo("".join(f"{line}\n" for line in _unroutable(found)), nl=False)
    _report_unreadable(found)
    return 0


def group_data(group: Group) -> dict[str, Any]:
    """Return a group as ``rcon ls --json`` shows it. Raises KernelError, also where the group has gone meanwhile."""
    limits, usage, tally = group.limits(), group.usage(), group.tally()
    return {
        **name_data(group),
        "limits": limits_as_json(limits),
        "limits_in_words": limits_in_words(limits),
        "processes": len(group.pids()),
        "frozen": group.is_frozen(),
        "hits": limit_hits(usage, tally),
        "unroutable": group.unroutable(),
        "usage": usage._asdict(),
        "tally": None if tally is None else tally.to_data(),
    }


def name_data(group: Group) -> dict[str, Any]:
    """Return the names of a group, and its owner, for JSON."""
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
    cpu = usage["cpu_seconds"]
    return [
        row["group"],
        f"{row['processes']}{' frozen' if row['frozen'] else ''}",
        size(usage["memory_current"]),
        UNKNOWN if cpu is None else f"{seconds(cpu)} s",
        count(row["hits"]),
        ", ".join(row["limits_in_words"]) or UNKNOWN,
        str(owner["pid"]),
        short_command(owner["command"] or "") or _OWNERS[owner["alive"]],
    ]


def _unroutable(found: FoundGroups) -> Iterator[str]:
    """Yield a line for each server that refused requests or tasks which no route names. It may have no group."""
    for server in found.servers():
        if server.unroutable:
            command = short_command(server.owner.command or "") or _OWNERS[server.owner.alive]
            noun = "request or task" if server.unroutable == 1 else "requests or tasks"
            yield printable(
                f"unroutable: {server.unroutable} {noun} that no route names, "
                f"refused by {command} (pid {server.owner.pid})"
            )


def _report_unreadable(found: FoundGroups) -> None:
    if found.unreadable:
        first, more = found.unreadable[0], len(found.unreadable) - 1
        others = f" and {more} more" if more else ""
        say("rcon", f"note: this user cannot read the cgroup {first}{others} (run rcon ls as root)")
