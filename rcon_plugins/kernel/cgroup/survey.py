"""Where in the visible tree the instances are: everybody's, nested ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.cgroup import files
from rcon_plugins.kernel.cgroup.delegation import limit_mounts
from rcon_plugins.kernel.cgroup.names import INSTANCE_NAME

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy


class Survey(NamedTuple):
    """The paths of ``instances``, and the directories that could not be looked into."""

    instances: list[str]
    unreadable: list[str]


def survey(hierarchy: Hierarchy) -> Survey:
    """Walk the whole tree of one mount: an instance is in each in which limits are set."""
    mount = next(iter(limit_mounts(hierarchy)), hierarchy.mounts[-1])
    found: list[str] = []
    unreadable = []
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        try:
            names = files.subdirectories(mount.directory(path))
        except KernelError as error:
            unreadable.append(error.path or path)
            continue
        for name in names:
            child = f"{path.rstrip('/')}/{name}"
            waiting.append(child)
            if INSTANCE_NAME.fullmatch(name):
                found.append(child)
    return Survey(sorted(found), sorted(unreadable))
