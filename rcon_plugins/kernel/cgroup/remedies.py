"""What would give a process a part of the cgroup tree: the commands, and the lines of a unit.

Steps are separated by ``; ``, each to be copied.
"""

from __future__ import annotations

import errno
import itertools
import os
import pwd
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.branch import levels
from rcon_plugins.kernel.cgroup.mounts import is_systemds

if TYPE_CHECKING:
    from rcon_plugins.errors import DelegationError
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy
    from rcon_plugins.kernel.cgroup.mounts import Mount


def remedy(
    hierarchy: Hierarchy,
    path: str,
    own: str | None,
    number: int = errno.EACCES,
    asked: DelegationError | None = None,
) -> str:
    """The commands or unit lines after which there is a base.

    ``path`` is the base that was tried, ``own`` where this process is, ``number`` what the kernel said, and
    ``asked`` what systemd answered, if it was asked.
    """
    if number == errno.EROFS:
        return writable(hierarchy.limit_mounts)
    if number == errno.EBUSY:
        return (
            "a cgroup that has processes passes no controllers on: let the server be the only process of the "
            'container (CMD ["gunicorn", ...] without a shell), or set cgroup = "..." to one without processes'
        )
    if hierarchy.layout == "v2" and is_systemds():
        return _from_systemd(hierarchy, own or "", asked)
    used = hierarchy.cgroup(path).mounts
    commands = [command for mount in used for command in _by_hand(hierarchy, mount, path)]
    return f'run the server as root, or as root once: {"; ".join(commands)}; and set cgroup = "{path}"'


def writable(mounts: Iterable[Mount]) -> str:
    """What makes hierarchies writable that are mounted read-only."""
    return (
        "in a container, start it with a writable cgroup of its own: "
        "docker run --cgroupns=private --security-opt writable-cgroups=true ...; "
        "or podman run --cgroupns=private --security-opt unmask=/sys/fs/cgroup ...; "
        "or, where neither is known, docker run --privileged --cgroupns=private ...; outside of one: "
        + "; ".join(f"mount -o remount,rw {mount.path}" for mount in mounts)
    )


def _from_systemd(hierarchy: Hierarchy, own: str, asked: DelegationError | None) -> str:
    delegate = f"[Service] Delegate={' '.join(sorted(hierarchy.controllers)) or 'yes'}"
    user = "" if os.geteuid() == 0 else "--user "
    unit = next((part for part in reversed(own.split("/")) if part.endswith(".service")), None)
    if unit is not None and not unit.startswith("user@"):
        its = "--user " if "/user@" in own else ""
        steps = f"systemctl {its}edit {unit}: {delegate}"
    else:
        steps = f"in the unit of the server: {delegate}"
    if asked is not None and asked.hint:
        steps += f"; or for a scope of its own: {asked.hint}"
    return f"{steps}; or start it with: systemd-run {user}--scope -p Delegate=yes COMMAND"


def _by_hand(hierarchy: Hierarchy, mount: Mount, path: str) -> list[str]:
    """What root does once, so that this user can have ``path`` in one hierarchy."""
    user = user_name()
    directory = mount.directory(path)
    if mount.version == 1:
        chown = f"chown {user} {directory} {directory}/tasks {directory}/cgroup.procs"
        return [f"mkdir -p {directory} && {chown}", *_fill_cpuset(mount, path)]
    commands = []
    server = f"{directory}/server"
    passed = [name for name in sorted(mount.controllers) if hierarchy.mount_of(name) == mount]
    enable = " ".join(f"+{name}" for name in passed)
    if enable:
        above = [mount.directory(level) for level in levels(path)[:-1]]
        if len(above) > 1:
            commands.append(f"mkdir -p {above[-1]}")
        commands += [f"echo '{enable}' > {one}/cgroup.subtree_control" for one in above]
    commands.append(
        f"mkdir -p {server} && chown {user} {directory} {directory}/cgroup.procs "
        f"{directory}/cgroup.subtree_control {server} {server}/cgroup.procs "
        f"{server}/cgroup.threads {server}/cgroup.subtree_control"
    )
    # Who may not write above can only be moved within.
    commands.append(f"echo PID-OF-THE-SHELL-THAT-STARTS-IT > {server}/cgroup.procs")
    return commands


def _fill_cpuset(mount: Mount, path: str) -> list[str]:
    """A new v1 cpuset is empty, and nothing can enter an empty one (cgroup-v1/cpusets.rst).

    One that is there already may be new when the commands are typed: root's own goes with the last that uses it.
    """
    if "cpuset" not in mount.controllers:
        return []
    above = [mount.directory(level) for level in levels(path)]
    return [
        f"cat {parent}/{name} > {child}/{name}"
        for parent, child in itertools.pairwise(above)
        for name in ("cpuset.cpus", "cpuset.mems")
        if not (files.read_if_there(child, name) or "").strip()
        or (child == above[-1] and files.owner_of(child) != os.geteuid())
    ]


def user_name() -> str:
    """The name of the effective user, or its number."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
