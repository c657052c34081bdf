"""Find the instances of all users in the visible cgroup tree, nested ones included."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

#: The name of an instance: the pid and the start time of its owner. A second one of the same process has a number.
INSTANCE_NAME = re.compile(r"rcon-([1-9][0-9]{0,9})-([0-9]{1,20})(?:-[0-9]{1,4})?")


class Survey(NamedTuple):
    """The paths of ``instances``, and the directories that could not be read."""

    instances: list[str]
    unreadable: list[str]


def survey(hierarchy: Hierarchy, below: str = "/", *, every: bool = False) -> Survey:
    """Walk the tree of one mount from ``below`` down: an instance is in every mount that carries limits.

    ``every``: walk all mounts. An instance that was removed in part may be left in one of them.
    """
    limiting = [*hierarchy.limit_mounts, hierarchy.mounts[-1]]
    found: set[str] = set()
    unreadable: set[str] = set()
    for mount in hierarchy.mounts if every else limiting[:1]:
        waiting = [below]
        while waiting:
            path = waiting.pop()
            try:
                names = files.subdirectories(mount.directory(path))
            except KernelError as error:
                unreadable.add(error.path or path)
                continue
            for name in names:
                child = f"{path.rstrip('/')}/{name}"
                waiting.append(child)
                if INSTANCE_NAME.fullmatch(name):
                    found.add(child)
    return Survey(sorted(found), sorted(unreadable))
