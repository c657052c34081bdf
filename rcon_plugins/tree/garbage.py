"""Find and remove the cgroup trees of dead owners.

An owner in a PID namespace that cannot be seen from here is neither alive nor dead: `Owner.is_alive` is None. Its tree
stays, also without processes: on v1 a server that serves nothing has none in it. Only the user of ``rcon gc
--unknown`` can decide that the owner has ended, or an ``rcon gc`` in the PID namespace of the machine, which sees all
processes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy
from rcon_plugins.kernel.cgroup.branch import check_path
from rcon_plugins.tree.base import remove_root_base
from rcon_plugins.tree.owner import Owner
from rcon_plugins.tree.survey import shared_name, survey

#: The time that `wait_until_empty` waits for processes, seconds. In most cases they are about to end.
_HOST_SECONDS = 1.0


class Garbage(NamedTuple):
    """The tree of a dead owner: its ``path``, the ``pid`` of the owner, and the processes still in it.

    `collect_garbage` kills the processes in ``work``, moves those in ``attached`` back to their previous cgroups, and
    never touches those in ``host``. ``unseen``: the tree contains processes of a PID namespace that cannot be seen from
    here. ``other_uid`` is the uid of another user who owns ``attached``. The tree stays with processes in ``host``,
    with ``unseen``, and with ``other_uid``. ``known`` is False if it is unknown whether the owner is dead.
    """

    path: str
    pid: int
    work: list[int]
    attached: list[int]
    host: list[int]
    unseen: bool = False
    other_uid: int | None = None
    known: bool = True

    @property
    def stays(self) -> bool:
        """Whether `collect_garbage` will not remove the tree, although its owner is dead."""
        return self.known and (self.unseen or self.other_uid is not None or bool(self.host))

    @property
    def in_use(self) -> list[int]:
        """The processes in the tree."""
        return [*self.work, *self.attached, *self.host]


#: The result for a tree: removed, or the reason why it stays.
State = Literal[
    "removed", "unseen", "other_user", "not_restored", "host_runs", "unknown_owner", "in_use", "failed"
]


class Collected(NamedTuple):
    """The result for one tree. ``processes``, another user's ``uid`` or ``error`` tell why it stays."""

    path: str
    state: State
    processes: tuple[int, ...] = ()
    uid: int | None = None
    error: str = ""

    @property
    def removed(self) -> bool:
        """Whether the tree is gone."""
        return self.state == "removed"

    @property
    def message(self) -> str:
        """The result as a sentence, with the remedy."""
        match self.state:
            case "removed":
                return "removed"
            case "unseen":
                return "kept: it contains processes of a PID namespace that cannot be seen from here"
            case "other_user":
                return (
                    f"kept: attached/ belongs to uid {self.uid}, and only that user knows where its processes came "
                    "from: run rcon gc as that user"
                )
            case "not_restored":
                return f"kept: processes {list(self.processes)} cannot be moved back to where they came from"
            case "host_runs":
                return f"kept: processes {list(self.processes)} of its server still run"
            case "unknown_owner":
                return (
                    "kept: its owner is in a PID namespace that cannot be seen from here: run rcon gc outside of "
                    "containers, or rcon gc --unknown if that server has ended"
                )
            case "in_use":
                return f"kept: processes {list(self.processes)} run in it, and whether its owner lives is unknown"
            case "failed":
                return f"kept: {self.error}"


def find_garbage(hierarchy: Hierarchy, below: str = "/") -> list[Garbage]:
    """Return the trees of dead and unknown owners in the visible tree, from ``below`` down.

    A tree inside the ``work/`` of a dead owner is removed with that one and not listed. Skips directories that this
    user may not read: they contain nothing of this user. Raises KernelError, ValueError.
    """
    found: list[Garbage] = []
    for path in survey(hierarchy, check_path(below), every=True).instances:
        owner = Owner.of(path.rpartition("/")[2])
        if owner is None or any(other.known and path.startswith(f"{other.path}/work/") for other in found):
            continue
        alive = owner.is_alive()
        if not alive:
            work, attached, host = (
                [
                    one
                    for one in hierarchy.cgroup(f"{path}/{kind}").processes(subtree=True)
                    if one != os.getpid()
                ]
                for kind in ("work", "attached", "host")
            )
            unseen, other_uid = _has_unseen(hierarchy, path), _other_owner(hierarchy, path)
            found.append(Garbage(path, owner.pid, work, attached, host, unseen, other_uid, alive is False))
    return found


def collect_garbage(hierarchy: Hierarchy, below: str = "/", *, unknown: bool = False) -> list[Collected]:
    """Remove the trees of dead owners from ``below`` down; see `collect`. Raises KernelError, ValueError.

    Trees of living owners are never touched. ``unknown``: remove also those of unknown owners that have no process.
    """
    report = []
    garbage = find_garbage(hierarchy, below)
    for base in sorted({_base_of(tree.path) for tree in garbage}):
        paths = [tree.path for tree in garbage if _base_of(tree.path) == base]
        try:
            done = {one.path: one for one in collect(hierarchy, base, unknown=unknown)}
        except KernelError as error:
            done = {path: Collected(path, "failed", error=str(error)) for path in paths}
        kept = {tree.path for tree in garbage if not tree.known and not unknown}
        # A tree that is not in the report was removed by another process meanwhile.
        report += [
            done.get(path, Collected(path, "unknown_owner" if path in kept else "removed")) for path in paths
        ]
    for path in survey(hierarchy, below, every=True).shared:
        _remove_shared(hierarchy, path)
    for base in {_base_of(one.path) for one in report}:
        remove_root_base(hierarchy, base)
    return report


def collect(hierarchy: Hierarchy, base: str, *, unknown: bool = False) -> list[Collected]:
    """Remove the trees of dead owners directly below ``base``. Return one result for each tree.

    Kills processes in ``work/``, and moves processes in ``attached/`` back to their previous cgroups. Never kills
    processes in ``host/``, which belong to the server itself: they get a second to end, otherwise the tree stays until
    the next start. ``unknown``: removes also the trees of unknown owners, if they have no process. Does the same in
    groups that commands share, and removes those without any tree. Touches nothing else below ``base``. Raises
    KernelError only if ``base`` cannot be read.
    """
    report = []
    for name in hierarchy.cgroup(base).children():
        if shared_name(name) is not None:
            shared = f"{base.rstrip('/')}/{name}"
            report += collect(hierarchy, shared, unknown=unknown)
            _remove_shared(hierarchy, shared)
    for path, alive in _instances(hierarchy, base):
        if alive is False or (alive is None and unknown):
            try:
                report.append(_collect_one(hierarchy, path, known=alive is False))
            except KernelError as error:
                report.append(Collected(path, "failed", error=str(error)))
    return report


def running_work(hierarchy: Hierarchy, base: str) -> list[Cgroup]:
    """Return ``work/`` of each dead owner's tree directly below ``base`` in which processes still run."""
    found = []
    for path, alive in _instances(hierarchy, base):
        if alive is not False:
            continue
        work = hierarchy.cgroup(f"{path}/work")
        running = work.processes(subtree=True)
        if running and 0 not in running:  # 0: a process of a PID namespace that cannot be seen from here
            found.append(work)
    return found


def wait_until_empty(cgroup: Cgroup) -> list[int]:
    """Wait up to a second for the processes in ``cgroup`` to end. Return those that still run."""
    deadline = time.monotonic() + _HOST_SECONDS
    while running := cgroup.processes(subtree=True):
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    return running


def _base_of(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _instances(hierarchy: Hierarchy, base: str) -> Iterator[tuple[str, bool | None]]:
    """Yield the path of each instance directly below ``base``, and whether its owner is alive. Raises KernelError."""
    for name in hierarchy.cgroup(base).children():
        if (owner := Owner.of(name)) is not None:
            yield f"{base.rstrip('/')}/{name}", owner.is_alive()


def _collect_one(hierarchy: Hierarchy, path: str, *, known: bool) -> Collected:
    if _has_unseen(hierarchy, path):
        return Collected(path, "unseen")
    if not known and (running := hierarchy.cgroup(path).processes(subtree=True)):
        return Collected(path, "in_use", tuple(running))
    work, host = hierarchy.cgroup(f"{path}/work"), hierarchy.cgroup(f"{path}/host")
    work.kill()
    work.delete()
    if (uid := _other_owner(hierarchy, path)) is not None:
        return Collected(path, "other_user", uid=uid)
    if remaining := _restore_attached(hierarchy, path):
        return Collected(path, "not_restored", tuple(remaining))
    if running := wait_until_empty(host):
        return Collected(path, "host_runs", tuple(running))
    host.delete()
    hierarchy.cgroup(path).delete()
    return Collected(path, "removed")


def _remove_shared(hierarchy: Hierarchy, path: str) -> None:
    """Remove a shared group in which no command has an instance. A command that makes it just now makes it again."""
    with contextlib.suppress(KernelError):  # left to the next start
        hierarchy.cgroup(path, shared=True).delete(timeout=0)


def _has_unseen(hierarchy: Hierarchy, path: str) -> bool:
    """Return whether the instance contains processes that have no number in this PID namespace. Raises KernelError."""
    return 0 in hierarchy.cgroup(path).processes(subtree=True)


def _other_owner(hierarchy: Hierarchy, path: str) -> int | None:
    """Return the uid of another user who owns a populated ``attached/``; None if there is none. Raises KernelError.

    The caller must not move its processes: see `previous_cgroups.other_owner`.
    """
    attached = hierarchy.cgroup(f"{path}/attached")
    if not attached.has_processes():
        return None
    from rcon_plugins.tree import previous_cgroups

    return previous_cgroups.other_owner(attached)


def _restore_attached(hierarchy: Hierarchy, path: str) -> list[int]:
    """Move the processes in ``attached/`` back to their previous cgroups. Return the rest. Raises KernelError."""
    attached = hierarchy.cgroup(f"{path}/attached")
    if not any(files.is_directory(directory) for directory in attached.directories):
        return []
    from rcon_plugins.tree import previous_cgroups

    instance = path.rpartition("/")[2]
    remaining = previous_cgroups.restore(attached, previous_cgroups.load(instance))
    if not remaining:
        attached.delete()
        previous_cgroups.forget(instance)
    return remaining
