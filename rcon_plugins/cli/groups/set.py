"""``rcon set``: change the limits of a running group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from rcon_plugins.builtin.plugins import limits_manager
from rcon_plugins.cli.columns import (
    UNKNOWN,
    cut,
    limits_as_json,
    limits_in_words,
    printable,
    short_command,
    size,
)
from rcon_plugins.cli.exit import BadUsage, say
from rcon_plugins.cli.limit_options import limits_of, policy_keys
from rcon_plugins.confinement.isolation import resources_of
from rcon_plugins.errors import KernelError
from rcon_plugins.groups.find import Group
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.cgroup import MAX, Hierarchy, IoMax, Resources, change_limits, device_of
from rcon_plugins.kernel.cgroup.statistics import read_usage
from rcon_plugins.settings.limit_table import BY_KEY, FLAG_OF_FIELD, OPTIONS
from rcon_plugins.settings.limit_text import IO_KEYS, removes
from rcon_plugins.settings.units import format_value


def set_limits(group: Group, options: Mapping[str, Any], as_json: bool) -> int:
    """Write the limits of the options, all or none, and print the limits in force afterwards."""
    # The kernel's own counters: what a server counted is read once, and only when work has ended.
    before, usage = group.limits(), read_usage(group.cgroup)
    wanted = _resources(options, before)
    _check(group, wanted)
    change_limits(group.cgroup, wanted, gather=not group.is_of_server())
    after = group.limits()
    notes = [
        *_reclaim_note(group, wanted, usage.memory_current, usage.oom_kills),
        *_shared_memory_note(group, before, wanted),
        *_server_note(group),
    ]
    if as_json:
        data = {
            "group": group.label,
            "before": limits_as_json(before),
            "limits": limits_as_json(after),
            "notes": notes,
        }
        click.echo(json.dumps(data, indent=2))
        return 0
    click.echo(f"{printable(group.label)}: {', '.join(limits_in_words(after)) or 'no limits'}")
    for note in notes:
        say("rcon", f"note: {printable(note)}")
    return 0


def _resources(options: Mapping[str, Any], before: Resources) -> Resources:
    """Return the limits to write. Raises BadUsage."""
    given = {option.key: value for option in OPTIONS if (value := options.get(option.key)) is not None}
    if not given:
        raise BadUsage("no limit given: for example --memory 512M, or --memory max for no limit")
    if "expand" in given or "up_to" in given:
        raise BadUsage("--expand works only with rcon run, rcon attach or in a policy: they watch the group")
    removed = {name: BY_KEY[name].field for name, value in given.items() if removes(name, value)}
    removed_io = {name: field for name, field in removed.items() if name in IO_KEYS}
    kept = {name: value for name, value in given.items() if name not in removed}
    if removed_io and not kept.keys() & IO_KEYS:
        kept.pop("device", None)
    for name in [BY_KEY[name].needs for name in kept] + (["memory"] if "swap" in kept else []):
        # A limit that needs another is checked against the one in force. cgroup v1 limits swap only with memory.
        value = getattr(before, BY_KEY[name].field) if name and name not in given else None
        if isinstance(value, float | int):
            kept[name] = format_value(BY_KEY[name].unit, value)
    policy = limits_of(kept)
    try:
        wanted = resources_of(limits_manager().hook, policy, policy)
        for field in removed_io.values():
            wanted = _without_io_limit(wanted, field, options.get("device"))
    except KernelError as error:
        raise BadUsage(f"--device: {error}") from None
    return wanted.replaced(**{field: MAX for name, field in removed.items() if name not in removed_io})


def _without_io_limit(wanted: Resources, field: str, named: str | None) -> Resources:
    devices = policy_keys({"read": "1", "device": named})["io"]
    if not isinstance(devices, dict):
        raise BadUsage("--device is missing: name a path on the disk, or MAJOR:MINOR")
    (device,) = map(device_of, devices)
    most = wanted.io.get(device, IoMax())._replace(**{field: MAX})
    return wanted.replaced(io={**wanted.io, device: most})


def _check(group: Group, wanted: Resources) -> None:
    """Raise BadUsage for a limit that cannot be enforced in this group."""
    threaded = group.kind == "host"
    here = Hierarchy.discover().where(group.cgroup.path)
    if here is None:
        raise BadUsage(f"group {group.label} has ended (rcon ls lists the groups)")
    missing = wanted.controllers() - here.controllers
    if threaded and missing:
        raise BadUsage(
            f"{group.label} holds threads of a server, for which only {', '.join(sorted(here.controllers))} can be "
            f"limited, not {', '.join(sorted(missing))}: change the policy of the server, pid {group.owner.pid}"
        )
    for refusal in here.refusals(wanted, threaded=threaded):
        raise BadUsage(f"{FLAG_OF_FIELD[refusal.limit]}: {refusal.reason} ({refusal.remedy})")


def _reclaim_note(group: Group, wanted: Resources, used: int | None, killed_before: int | None) -> list[str]:
    """Return what the kernel did with memory in use beyond the new limit."""
    limit = wanted.memory_max
    if not isinstance(limit, int) or used is None or used <= limit:
        return []
    killed = (read_usage(group.cgroup).oom_kills or 0) - (killed_before or 0)
    end = f"killed {killed} process{'' if killed == 1 else 'es'}" if killed else "killed no process"
    return [f"{size(used)} of memory was in use: the kernel reclaimed what it could and {end}"]


def _shared_memory_note(group: Group, before: Resources, wanted: Resources) -> list[str]:
    """Say that ``/dev/shm`` of executor processes does not grow with their memory."""
    was, limit = before.memory_max, wanted.memory_max
    if not isinstance(was, int) or limit is None or (isinstance(limit, int) and limit <= was):
        return []
    theirs = {proc.ipc_namespace(pid) for pid in group.pids()} - {None, proc.ipc_namespace(group.owner.pid)}
    return ["the size of /dev/shm stays as it is for the processes that run now"] if theirs else []


def _server_note(group: Group) -> list[str]:
    if not group.is_of_server():
        return []
    command = cut(short_command(group.owner.command or UNKNOWN), 60)
    server = f"the group belongs to a server, pid {group.owner.pid} ({command})"
    return [f"{server}, which may write the limits of its policy again: change the policy to keep these"]
