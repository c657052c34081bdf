"""``rcon attach``: from its options to the group, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from rcon_plugins.builtin.plugins import limits_manager
from rcon_plugins.cli.base_option import named_base
from rcon_plugins.cli.exit import say
from rcon_plugins.cli.limit_options import limits_of, policy_keys
from rcon_plugins.cli.request import is_number
from rcon_plugins.cli.run.run import check_enforceable, named_group, resources_of
from rcon_plugins.command.run import group_name
from rcon_plugins.errors import KernelError, UnknownGroup
from rcon_plugins.groups.find import Group, find_group, find_groups
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.proc import read_process
from rcon_plugins.tree import attach as tree_attach

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.settings.memory import Memory

_MOST = 4194304  # PID_MAX_LIMIT, include/linux/threads.h


def attach(options: Mapping[str, Any]) -> int:
    """Take the processes, or let them go; the exit status. Raises `click.UsageError`, `RconError`."""
    words: tuple[str, ...] = options["what"]
    if options["release"]:
        return _release(words, options)
    pids = tuple(dict.fromkeys(_pid(word) for word in words))
    policy = limits_of(options)
    hook = limits_manager().hook
    hierarchy = Hierarchy.discover()
    check_enforceable(hierarchy, resources_of(hook, policy))
    try:
        tree_attach.check(pids, hierarchy)
        group = named_group(options["group"]) or _name(pids[0])
        request = tree_attach.AttachRequest(
            pids=pids,
            group=group,
            configure=partial(hook.rcon_configure_cgroup, limits=policy, policy=policy),
            children=options["children"],
            monitor=_growing(policy.memory),
        )
        left_behind = tree_attach.not_restorable(pids, hierarchy)
        attached = tree_attach.attach(request, hierarchy, named_base(options["cgroup"]))
    except tree_attach.AttachRefused as error:
        raise click.UsageError(str(error)) from None
    if policy.memory is not None:
        say(
            "rcon",
            "--memory: memory they have already stays where it was, and is not counted; what they add is",
        )
    if left_behind:
        say(
            "rcon",
            f"--release will leave {' '.join(map(str, left_behind))} in this user's own cgroup: "
            "only root can put processes back to where these were",
        )
    click.echo(f"{group}: {len(attached)} {'process' if len(attached) == 1 else 'processes'}")
    return 0


def _growing(memory: Memory | None) -> Callable[[Cgroup], Callable[[], object]] | None:
    """What lets the memory limit of a group grow; loaded only where one shall."""
    if memory is None or not memory.expands:
        return None
    from rcon_plugins.confinement.expansion import expand

    return lambda cgroup: expand(cgroup, memory).close


def _name(pid: int) -> str:
    found = read_process(pid)
    words = found.command.split() if found is not None else []
    return group_name(words[0] if words else "attached", pid)


def _pid(word: str) -> int:
    if not is_number(word) or not 0 < int(word[:20]) <= _MOST:
        raise click.UsageError(f"{word!r} is not the number of a process (ps -e lists them)")
    return int(word)


def _release(words: tuple[str, ...], options: Mapping[str, Any]) -> int:
    named = options["group"] is not None or options["cgroup"] is not None
    if policy_keys(options) or named or options["children"]:
        raise click.UsageError(
            "--release takes nothing but groups and processes (leave the other options out)"
        )
    known = [group for group in find_groups().groups if group.kind == "attached"]
    wanted = [_found(word, known) for word in words]
    for pid, group in wanted:
        try:
            if pid is None:
                tree_attach.release_group(group.cgroup, group.instance)
            else:
                tree_attach.release_process(pid, group.cgroup, group.instance)
        except KernelError as error:
            raise click.ClickException(str(error)) from None
    return 0


def _found(word: str, known: list[Group]) -> tuple[int | None, Group]:
    """A process and the group it was taken into, or a group."""
    if is_number(word):
        pid = _pid(word)
        for group in known:
            if pid in group.pids():
                return pid, group
        raise click.UsageError(f"{pid} is in no group that rcon attach made (rcon ls lists them)")
    try:
        return None, find_group(word, known)
    except UnknownGroup as error:
        raise click.UsageError(str(error)) from None
