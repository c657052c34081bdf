"""Instances whose owner is dead: what is left of them, and the end of it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, proc
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.tree.survey import INSTANCE_NAME

#: How long processes in a host/, which are ending in most cases, are waited for.
_HOST_SECONDS = 1.0


def collect(hierarchy: Hierarchy, base: str) -> list[str]:
    """Remove what instances below ``base`` left whose owner is dead; one sentence for each.

    What runs in their ``work/`` is killed. What runs in their ``host/``, a server's own processes, never:
    it gets a second to end, then the instance is left for the next time. Nor what is in their ``taken/``: it is put
    back to where it was. Everything else below ``base`` is left alone. Raises KernelError only where ``base``
    cannot be read.
    """
    report = []
    for path in _of_the_dead(hierarchy, base):
        try:
            done = _collect_one(hierarchy, path)
        except KernelError as error:
            done = f"left for the next time: {error}"
        report.append(f"{path.rpartition('/')[2]}: {done}")
    return report


def work_of_the_dead(hierarchy: Hierarchy, base: str) -> list[Cgroup]:
    """``work/`` of each instance below ``base`` whose owner is dead and in which something runs still."""
    found = []
    for path in _of_the_dead(hierarchy, base):
        work = hierarchy.cgroup(f"{path}/work")
        running = work.processes(subtree=True)
        if running and 0 not in running:  # 0 is one of a PID namespace that cannot be seen from here
            found.append(work)
    return found


def _of_the_dead(hierarchy: Hierarchy, base: str) -> Iterator[str]:
    """The paths of the instances below ``base`` whose owner is dead. Raises KernelError."""
    for name in hierarchy.cgroup(base).children():
        match = INSTANCE_NAME.fullmatch(name)
        if match and not proc.is_alive(int(match[1]), int(match[2])):
            yield f"{base.rstrip('/')}/{name}"


def _collect_one(hierarchy: Hierarchy, path: str) -> str:
    root = hierarchy.cgroup(path)
    work, host = hierarchy.cgroup(f"{path}/work"), hierarchy.cgroup(f"{path}/host")
    if has_unseen(hierarchy, path):
        return UNSEEN
    work.kill()
    work.delete()
    if (uid := stranger_in_taken(hierarchy, path)) is not None:
        return taken_by(uid)
    if staying := give_back(hierarchy, path):
        return f"left for the next time: processes {staying} that were taken cannot be put back"
    staying = processes_leave(host)
    if staying:
        return f"left for the next time: processes {staying} of its server still run"
    host.delete()
    root.delete()
    return "removed"


#: What becomes of a tree that `has_unseen`.
UNSEEN = "left alone: it has processes of a PID namespace that cannot be seen from here"


def has_unseen(hierarchy: Hierarchy, path: str) -> bool:
    """Whether there are processes in the instance at ``path`` that have no number here. Raises KernelError."""
    return 0 in hierarchy.cgroup(path).processes(subtree=True)


def taken_by(uid: int) -> str:
    """What becomes of a tree with processes of another user in its ``taken/``."""
    return f"left alone: what is in taken/ is of uid {uid}, who can say where it was: rcon gc as that user"


def stranger_in_taken(hierarchy: Hierarchy, path: str) -> int | None:
    """The uid of another user whose processes are in ``taken/`` of the instance at ``path``; None where there are none.

    They are not put back: see :func:`~rcon_plugins.tree.previous_cgroups.stranger`. Raises KernelError.
    """
    taken = hierarchy.cgroup(f"{path}/taken")
    if not taken.processes(subtree=True):
        return None
    from rcon_plugins.tree import previous_cgroups

    return previous_cgroups.stranger(taken)


def give_back(hierarchy: Hierarchy, path: str) -> list[int]:
    """Put what is in ``taken/`` of the instance at ``path`` back to where it was; those that stay. KernelError."""
    taken = hierarchy.cgroup(f"{path}/taken")
    if not any(files.is_directory(directory) for directory in taken.directories):
        return []
    from rcon_plugins.tree import previous_cgroups

    instance = path.rpartition("/")[2]
    staying = previous_cgroups.restore(taken, previous_cgroups.load(instance))
    if not staying:
        taken.delete()
        previous_cgroups.forget(instance)
    return staying


def processes_leave(host: Cgroup) -> list[int]:
    """Wait a moment for the processes in ``host``; those that stay."""
    deadline = time.monotonic() + _HOST_SECONDS
    while staying := host.processes(subtree=True):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return staying
