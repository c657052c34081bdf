"""``rcon attach``: move running processes into a group with limits, and release them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from rcon_plugins.builtin.plugins import limits_manager
from rcon_plugins.cli.exit import BadUsage, Refused, say
from rcon_plugins.cli.limit_options import limits_of, policy_keys
from rcon_plugins.cli.options import named_base
from rcon_plugins.cli.request import is_number
from rcon_plugins.cli.run.execution import check_enforceable, named_group
from rcon_plugins.cli.run.policy import resources_of
from rcon_plugins.command.run import group_name
from rcon_plugins.errors import KernelError, UnknownGroup
from rcon_plugins.groups.find import Group, find_group, find_groups
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.proc import read_process
from rcon_plugins.tree import attach as tree_attach

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.settings.memory import Memory

_HIGHEST_PID = 4194304  # PID_MAX_LIMIT, include/linux/threads.h


def attach(options: Mapping[str, Any]) -> int:
    """Move the processes of the options, or release them; return the exit status. Raises `BadUsage`, `RconError`."""
    words: tuple[str, ...] = options["what"]
    if options["release"]:
        return _release(words, options)
    pids = tuple(dict.fromkeys(_pid(word) for word in words))
    policy = limits_of(options)
    hook = limits_manager().hook
    hierarchy = Hierarchy.discover()
    resources = resources_of(hook, policy)
    check_enforceable(hierarchy, resources)
    try:
        tree_attach.check(pids, hierarchy)
        group = named_group(options["group"]) or _name(pids[0])
        request = tree_attach.AttachRequest(
            pids=pids,
            group=group,
            resources=resources,
            children=options["children"],
            monitor=_expanding(policy.memory),
        )
        left_behind = tree_attach.not_restorable(pids, hierarchy)
        attached = tree_attach.attach(request, hierarchy, named_base(options["cgroup"]))
    except tree_attach.AttachRefused as error:
        raise BadUsage(str(error)) from None
    if policy.memory is not None:
        say(
            "rcon",
            "note: --memory counts only memory that the processes allocate from now on",
        )
    if left_behind:
        say(
            "rcon",
            f"note: --release will leave {' '.join(map(str, left_behind))} in a cgroup of this user: "
            "only root can move them back to their previous cgroups",
        )
    click.echo(f"{group}: {len(attached)} {'process' if len(attached) == 1 else 'processes'}")
    return 0


def _expanding(memory: Memory | None) -> Callable[[Cgroup], Callable[[], object]] | None:
    """Return what expands the memory limit of a group; None for a limit that does not expand."""
    if memory is None or not memory.expands:
        return None
    from rcon_plugins.confinement.expansion import expand

    return lambda cgroup: expand(cgroup, memory).close


def _name(pid: int) -> str:
    found = read_process(pid)
    words = found.command.split() if found is not None else []
    return group_name(words[0] if words else "attached", pid)


def _pid(word: str) -> int:
    if not is_number(word) or not 0 < int(word[:20]) <= _HIGHEST_PID:
        raise BadUsage(f"{word!r} is not the pid of a process (ps -e lists them)")
    return int(word)


def _release(words: tuple[str, ...], options: Mapping[str, Any]) -> int:
    named = options["group"] is not None or options["cgroup"] is not None
    if policy_keys(options) or named or options["children"]:
        raise BadUsage("--release takes only groups and processes (leave out the other options)")
    known = [group for group in find_groups().groups if group.kind == "attached"]
    wanted = [_found(word, known) for word in words]
    for pid, group in wanted:
        try:
            if pid is None:
                tree_attach.release_group(group.cgroup, group.instance)
            else:
                tree_attach.release_process(pid, group.cgroup, group.instance)
        except KernelError as error:
            raise Refused(str(error)) from None
    return 0


def _found(word: str, known: list[Group]) -> tuple[int | None, Group]:
    """Return a process and its group, or no process and the group of that name."""
    if is_number(word):
        pid = _pid(word)
        for group in known:
            if pid in group.pids():
                return pid, group
        raise BadUsage(f"process {pid} is in no group of rcon attach (rcon ls lists the groups)")
    try:
        return None, find_group(word, known)
    except UnknownGroup as error:
        raise BadUsage(str(error)) from None
