"""``rcon freeze``, ``rcon thaw`` and ``rcon kill``: suspend, resume and kill the processes of a group."""

from __future__ import annotations

import json
import os
import time

import click

from rcon_plugins.cli.columns import printable
from rcon_plugins.cli.exit import BadUsage
from rcon_plugins.cli.options import seconds_of
from rcon_plugins.errors import KernelError
from rcon_plugins.groups.find import Group
from rcon_plugins.kernel.files import gone, refused

#: How long to wait for killed processes to end, in seconds.
_KILL_SECONDS = 10.0
#: How long to wait before the next look at a group in its grace, in seconds.
_PAUSE = 0.01


def freeze(group: Group) -> int:
    """Suspend all processes of a group, and wait until they are. Raises BadUsage, KernelError."""
    pids = _processes_of(group, "frozen")
    group.cgroup.freeze()
    label = printable(group.label)
    click.echo(f"{label}: {_counted(len(pids))} frozen (rcon thaw {label} resumes them)")
    return 0


def thaw(group: Group) -> int:
    """Resume the processes of a group. Raises BadUsage, KernelError."""
    pids = _processes_of(group, "thawed")
    group.cgroup.thaw()
    click.echo(f"{printable(group.label)}: {_counted(len(pids))} resumed")
    return 0


def kill(group: Group, grace: str | None, as_json: bool) -> int:
    """Kill all processes of a group, wait until they have ended, and print them. Raises BadUsage, KernelError.

    ``grace`` is the text of ``--grace``: how long the processes may take to end after SIGTERM.
    """
    seconds = None if grace is None else seconds_of("grace", grace)
    _processes_of(group, "killed")
    killed = group.processes()
    needed_kill = None if seconds is None else _let_end(group, seconds)
    try:
        group.cgroup.kill(_KILL_SECONDS)
    except KernelError as error:
        if not gone(error):
            raise
    if as_json:
        processes = [{"pid": one.pid, "uid": one.uid, "command": one.command} for one in killed]
        data = {"group": group.label, "killed": processes, "needed_kill": needed_kill}
        click.echo(json.dumps(data, indent=2))
        return 0
    how = {None: "killed", True: f"ended or killed after {grace}", False: f"ended within {grace}"}[
        needed_kill
    ]
    click.echo(f"{printable(group.label)}: {_counted(len(killed))} {how}")
    for process in killed:
        click.echo(f"  {process.pid}  {printable(process.command)}")
    return 0


def _let_end(group: Group, seconds: float) -> bool:
    """Tell the processes of a group to end, and wait so long at most. Return whether any is left to be killed."""
    until = time.monotonic() + seconds
    try:
        try:
            group.cgroup.terminate(seconds)
        except KernelError as error:
            if not refused(error):
                raise
            # SIGKILL by cgroup.kill may end whoever this user may not signal.
        while left := group.cgroup.has_processes():
            if time.monotonic() >= until:
                break
            time.sleep(_PAUSE)
    except KernelError as error:
        if not gone(error):
            raise
        return False
    return left


def _processes_of(group: Group, done: str) -> list[int]:
    """Return the pids of a group. Raises BadUsage for a group of threads, and for the group of this very command."""
    if group.kind == "host":
        raise BadUsage(
            f"{group.label} holds threads of a server, which cannot be {done} without the server: "
            f"limit them with rcon set, or stop the server, pid {group.owner.pid}"
        )
    pids = group.pids()
    if os.getpid() in pids:
        raise BadUsage(
            f"{group.label} holds this rcon itself, which would be {done} too: run it outside the group"
        )
    return pids


def _counted(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"
