"""Find the instances of all users in the visible cgroup tree, including nested ones, and the groups that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.tree.owner import INSTANCE_NAME

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.hierarchy import Hierarchy

#: The cgroup of a group that several commands share begins so: see `rcon_plugins.tree.shared`.
_SHARED = "rcon-in-"


class Survey(NamedTuple):
    """The paths of ``instances``, the names of ``shared`` groups by path, and the ``unreadable`` directories."""

    instances: list[str]
    unreadable: list[str]
    shared: dict[str, str]


def survey(hierarchy: Hierarchy, below: str = "/", *, every: bool = False) -> Survey:
    """Find the instances from ``below`` down in one mount: an instance is in every mount that carries limits.

    ``every``: search all mounts. An instance that was removed in part may remain in only some of them.
    """
    limiting = [*hierarchy.limit_mounts, hierarchy.mounts[-1]]
    found: set[str] = set()
    shared: dict[str, str] = {}
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
                elif (group := shared_name(name)) is not None:
                    shared[child] = group
    return Survey(sorted(found), sorted(unreadable), dict(sorted(shared.items())))


def shared_directory(name: str) -> str:
    """Return the name of the cgroup of a shared group."""
    return f"{_SHARED}{name}"


def shared_name(directory: str) -> str | None:
    """Return the name of the shared group whose cgroup has this name; None if it is no such cgroup."""
    return directory.removeprefix(_SHARED) or None if directory.startswith(_SHARED) else None
