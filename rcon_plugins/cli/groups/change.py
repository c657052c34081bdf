"""``rcon set``, ``freeze``, ``thaw`` and ``kill``: what is done to a group while it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import click

from rcon_plugins.builtin.plugins import limits_manager
from rcon_plugins.cli.columns import (
    NOT_TOLD,
    cut,
    limits_as_json,
    limits_in_words,
    printable,
    short_command,
    size,
)
from rcon_plugins.cli.exit import say
from rcon_plugins.cli.limit_options import limits_of, policy_keys
from rcon_plugins.confinement.isolation import asked_resources
from rcon_plugins.errors import KernelError
from rcon_plugins.groups.find import Group, is_gone
from rcon_plugins.kernel.cgroup import MAX, Hierarchy, IoMax, Resources, change_limits, device_of
from rcon_plugins.settings.limit_table import BY_KEY, FLAG_OF_FIELD, OPTIONS
from rcon_plugins.settings.limit_words import IO_KEYS, removes
from rcon_plugins.settings.units import written

#: How long processes that were killed are waited for, in seconds.
_KILL_SECONDS = 10.0


def set_limits(group: Group, options: Mapping[str, Any], as_json: bool) -> int:
    """Write the limits that the options ask for, all of them or none, and print what is in force then."""
    before, usage = group.limits(), group.usage()
    wanted = _asked_for(options, before)
    _check(group, wanted)
    change_limits(group.cgroup, wanted, gather=not group.is_of_server())
    after = group.limits()
    notes = [*_squeezed(group, wanted, usage.memory_current, usage.oom_kills), *_rewritten(group)]
    if as_json:
        told = {
            "group": group.label,
            "before": limits_as_json(before),
            "limits": limits_as_json(after),
            "notes": notes,
        }
        click.echo(json.dumps(told, indent=2))
        return 0
    click.echo(f"{printable(group.label)}: {', '.join(limits_in_words(after)) or 'no limits'}")
    for note in notes:
        say("rcon", f"note: {printable(note)}")
    return 0


def _asked_for(options: Mapping[str, Any], before: Resources) -> Resources:
    """The limits as the kernel has them. Raises click.UsageError; nothing is written."""
    given = {option.key: value for option in OPTIONS if (value := options.get(option.key)) is not None}
    if not given:
        raise click.UsageError("say what to set: --memory 512M, or --memory max for no limit")
    if "expand" in given or "up_to" in given:
        raise click.UsageError(
            "--expand needs somebody who watches: use it with rcon run or rcon attach, or in a policy"
        )
    removed = {name: BY_KEY[name].field for name, value in given.items() if removes(name, value)}
    removed_io = {name: field for name, field in removed.items() if name in IO_KEYS}
    kept = {name: value for name, value in given.items() if name not in removed}
    if removed_io and not kept.keys() & IO_KEYS:
        kept.pop("device", None)
    for name in [BY_KEY[name].needs for name in kept] + (["memory"] if "swap" in kept else []):
        # the limit in force is what the new one is checked against; v1 limits swap only together with memory
        value = getattr(before, BY_KEY[name].field) if name and name not in given else None
        if isinstance(value, float | int):
            kept[name] = written(BY_KEY[name].unit, value)
    policy = limits_of(kept)
    try:
        wanted = asked_resources(limits_manager().hook, policy, policy)
        for field in removed_io.values():
            wanted = _without_io_limit(wanted, field, options.get("device"))
    except KernelError as error:
        raise click.UsageError(f"--device: {error}") from None
    return wanted.replaced(**{field: MAX for name, field in removed.items() if name not in removed_io})


def _without_io_limit(wanted: Resources, field: str, named: str | None) -> Resources:
    devices = policy_keys({"read": "1", "device": named})["io"]
    if not isinstance(devices, dict):
        raise click.UsageError("--device: say which")
    (device,) = map(device_of, devices)
    most = wanted.io.get(device, IoMax())._replace(**{field: MAX})
    return wanted.replaced(io={**wanted.io, device: most})


def _check(group: Group, wanted: Resources) -> None:
    """Raise click.UsageError for what cannot be enforced in this group."""
    threaded = group.kind == "host"
    here = Hierarchy.discover().where(group.cgroup.path)
    if here is None:
        raise click.UsageError(f"{group.label} has gone meanwhile (rcon ls)")
    missing = wanted.controllers() - here.controllers
    if threaded and missing:
        raise click.UsageError(
            f"the threads of {group.label} have limits of {', '.join(sorted(here.controllers))} only, not of "
            f"{', '.join(sorted(missing))}: change the policy of its server, pid {group.owner.pid}"
        )
    for refusal in here.refusals(wanted, threaded=threaded):
        raise click.UsageError(f"{FLAG_OF_FIELD[refusal.limit]}: {refusal.reason} ({refusal.remedy})")


def _squeezed(group: Group, wanted: Resources, used: int | None, killed_before: int | None) -> list[str]:
    """What happened to memory that was in use beyond the new limit."""
    limit = wanted.memory_max
    if not isinstance(limit, int) or used is None or used <= limit:
        return []
    killed = (group.usage().oom_kills or 0) - (killed_before or 0)
    end = (
        f"killed {killed} process{'' if killed == 1 else 'es'} that did not fit"
        if killed
        else "killed nothing"
    )
    return [f"{size(used)} of memory were in use: the kernel took back what it could, and {end}"]


def _rewritten(group: Group) -> list[str]:
    if not group.is_of_server():
        return []
    command = cut(short_command(group.owner.command or NOT_TOLD), 60)
    server = f"the group is of a server, pid {group.owner.pid} ({command})"
    again = "may write the limits of its policy again when it starts work in it"
    return [f"{server}, which {again}: change the policy to keep these"]


def freeze(group: Group) -> int:
    """Stop all processes of a group, and wait until they are. Raises KernelError."""
    pids = _of_processes(group, "frozen")
    group.cgroup.freeze()
    click.echo(
        f"{printable(group.label)}: {_counted(len(pids))} frozen, until rcon thaw {printable(group.label)}"
    )
    return 0


def thaw(group: Group) -> int:
    """Let the processes of a group go on. Raises KernelError."""
    pids = _of_processes(group, "thawed")
    group.cgroup.thaw()
    click.echo(f"{printable(group.label)}: {_counted(len(pids))} going on")
    return 0


def kill(group: Group, as_json: bool) -> int:
    """End all processes of a group, wait until they have, and say which. Raises KernelError."""
    _of_processes(group, "killed")
    ended = group.processes()
    try:
        group.cgroup.kill(_KILL_SECONDS)
    except KernelError as error:
        if not is_gone(error):
            raise
    if as_json:
        found = [{"pid": one.pid, "uid": one.uid, "command": one.command} for one in ended]
        click.echo(json.dumps({"group": group.label, "ended": found}, indent=2))
        return 0
    click.echo(f"{printable(group.label)}: {_counted(len(ended))} ended")
    for process in ended:
        click.echo(f"  {process.pid}  {printable(process.command)}")
    return 0


def _of_processes(group: Group, done: str) -> list[int]:
    """Its processes, if it is one of processes, and this one is none of them. Raises click.UsageError."""
    if group.kind == "host":
        raise click.UsageError(
            f"{group.label} is a group of threads of a server, which cannot be {done} without it: limit them with rcon "
            f"set, or stop the server, pid {group.owner.pid}"
        )
    pids = group.pids()
    if os.getpid() in pids:
        raise click.UsageError(
            f"{group.label} holds this very command, which would be {done} too: do it from outside"
        )
    return pids


def _counted(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"
