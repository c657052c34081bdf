"""What dead owners left in the cgroup tree, anywhere in it, and its removal."""

from __future__ import annotations

import os
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, proc
from rcon_plugins.kernel.cgroup import Hierarchy
from rcon_plugins.kernel.cgroup.branch import check_path
from rcon_plugins.tree.base import remove_root_base
from rcon_plugins.tree.dead import collect, has_unseen, stranger_in_taken
from rcon_plugins.tree.survey import INSTANCE_NAME, survey


class Left(NamedTuple):
    """The tree of a dead owner: its ``path``, the ``pid`` its owner had, and the processes that are in it still.

    ``work`` will be killed, ``taken`` put back to where they were, ``host`` left alone, and the tree with them.
    ``unseen``: nothing of that will be done, for want of knowing what runs there (a PID namespace). ``stranger`` is the
    uid of another user whose processes are in ``taken``: these are left alone, and the tree with them.
    """

    path: str
    pid: int
    work: list[int]
    taken: list[int]
    host: list[int]
    unseen: bool = False
    stranger: int | None = None

    @property
    def stays(self) -> bool:
        """Whether the tree will be there after that."""
        return self.unseen or self.stranger is not None or bool(self.host)


class Collected(NamedTuple):
    """What became of a tree: whether it is gone, and how or why not, in words."""

    path: str
    removed: bool
    said: str


def find(hierarchy: Hierarchy, below: str = "/") -> list[Left]:
    """The trees of dead owners in the visible tree, from ``below`` down. Raises KernelError, ValueError.

    What is inside of the work of a dead owner goes with that, whoever made it, and is not told by itself. Where this
    user may not look there is nothing of its own either.
    """
    found: list[Left] = []
    for path in survey(hierarchy, check_path(below), every=True).instances:
        match = INSTANCE_NAME.fullmatch(path.rpartition("/")[2])
        if match is None or any(path.startswith(f"{left.path}/work/") for left in found):
            continue
        if not proc.is_alive(int(match[1]), int(match[2])):
            inside = {
                kind: [
                    pid
                    for pid in hierarchy.cgroup(f"{path}/{kind}").processes(subtree=True)
                    if pid != os.getpid()
                ]
                for kind in ("work", "taken", "host")
            }
            found.append(
                Left(
                    path,
                    int(match[1]),
                    **inside,
                    unseen=has_unseen(hierarchy, path),
                    stranger=stranger_in_taken(hierarchy, path),
                )
            )
    return found


def remove(hierarchy: Hierarchy, below: str = "/") -> list[Collected]:
    """Remove the trees of dead owners; what became of each. See :func:`~rcon_plugins.tree.dead.collect`.

    Living owners' are never touched. Raises KernelError where the tree cannot be read.
    """
    report = []
    left = find(hierarchy, below)
    for base in sorted({_base_of(one.path) for one in left}):
        try:
            said = dict(line.split(": ", 1) for line in collect(hierarchy, base))
        except KernelError as error:
            said = dict.fromkeys((one.path.rpartition("/")[2] for one in left), str(error))
        for one in left:
            if _base_of(one.path) == base:
                gone = not any(files.is_directory(mount.directory(one.path)) for mount in hierarchy.mounts)
                report.append(
                    Collected(one.path, gone, said.get(one.path.rpartition("/")[2], "removed meanwhile"))
                )
    for base in {_base_of(one.path) for one in report}:
        remove_root_base(hierarchy, base)
    return report


def _base_of(path: str) -> str:
    return path.rpartition("/")[0] or "/"
