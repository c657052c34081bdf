"""Record the previous cgroups of attached processes, so that any later process can move them back.

Each instance has a file that does not survive a reboot: ``/run/rcon/<instance>.json`` for root, and
``rcon/<instance>.json`` in the runtime directory of any other user.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posix
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, proc
from rcon_plugins.kernel.cgroup import Cgroup, mounts
from rcon_plugins.tree import runtime
from rcon_plugins.tree.base import ROOT_BASE
from rcon_plugins.tree.owner import INSTANCE_NAME

#: The time for which `restore` follows processes that keep forking, seconds.
_SECONDS = 2.0
#: Errors of a cgroup that accepts no processes or no longer exists. `restore_process` then tries the one above.
_UNUSABLE = frozenset({errno.ENOENT, errno.ENODEV, errno.EBUSY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC})

#: The cgroups of one process: the path in each hierarchy, by mount point.
Paths = Mapping[str, str]


class PreviousCgroups(NamedTuple):
    """The previous cgroups of each process, by its pid and start time."""

    by_process: dict[tuple[int, int], Paths]

    def of(self, pid: int) -> Paths:
        """Return the previous cgroups of a process. For one forked since, use those of the first recorded process."""
        started = proc.start_time(pid)
        known = None if started is None else self.by_process.get((pid, started))
        return known or next(iter(self.by_process.values()), {})


def cgroups_of(pid: int, group: Cgroup) -> Paths:
    """Return the cgroups of a process in the hierarchies of ``group``. Raises KernelError (ESRCH: it has ended)."""
    text = proc.membership(pid)
    if text is None:
        raise KernelError(f"process {pid} has ended", errno=errno.ESRCH)
    membership = mounts.parse_membership(text)
    found = {}
    for mount in group.mounts:
        path = mounts.membership(mount, membership)
        if path is None:
            raise KernelError(
                f"the cgroup of process {pid} cannot be seen below {mount.path}",
                errno=errno.EXDEV,
                path=mount.path,
                hint="run rcon outside of the container",
            )
        found[mount.path] = path
    return found


def other_owner(group: Cgroup) -> int | None:
    """Return the uid of another user who owns a directory of this cgroup; None if all are this user's.

    Move processes back only from cgroups that this user owns. Otherwise a user who may make cgroups in a group with
    limits could make one that looks attached, and moving its processes back would free them from these limits.
    """
    found = {uid for one in group.directories if (uid := files.owner_of(one)) is not None} - {os.geteuid()}
    return min(found, default=None)


def restore(group: Cgroup, previous: PreviousCgroups, pids: Iterable[int] | None = None) -> list[int]:
    """Move the processes of ``group``, and their new forks, back to their previous cgroups. Return those that stay.

    ``pids`` restricts this to these processes. If a cgroup is gone or accepts no processes, the next usable one above
    takes its place. Raises KernelError.
    """
    deadline = time.monotonic() + _SECONDS
    wanted = None if pids is None else set(pids)
    while True:
        inside = {pid for pid in group.processes(subtree=True) if wanted is None or pid in wanted}
        if not inside or time.monotonic() > deadline:
            return sorted(inside)
        for pid in inside - {0}:  # 0: a process of a PID namespace that cannot be seen from here
            restore_process(pid, group, previous.of(pid))


def restore_process(pid: int, group: Cgroup, paths: Paths) -> None:
    """Move one process to its cgroup in each hierarchy. Does nothing if the process has ended. Raises KernelError.

    On v1 a user may move own processes from any cgroup, but only to cgroups that the user may write. If the kernel
    refuses, the process goes to the base of the group, outside of its limits.
    """
    base = _base_of(group)
    # Without a record, stay below what holds for the base: it may be in a container, whose /run is another one.
    unknown = "/" if base == ROOT_BASE else base
    for mount in group.mounts:
        path = paths.get(mount.path, unknown)
        while True:
            try:
                files.write(mount.directory(path), "cgroup.procs", str(pid))
                break
            except KernelError as error:
                if error.errno == errno.ESRCH:
                    return
                if error.errno in (errno.EACCES, errno.EPERM) and path != base:
                    path = base
                    continue
                if error.errno not in _UNUSABLE or path == "/":
                    raise
                path = path.rpartition("/")[0] or "/"


def _base_of(group: Cgroup) -> str:
    """Return the cgroup that contains the instance of a group."""
    parts = group.path.split("/")
    instances = [index for index, part in enumerate(parts) if INSTANCE_NAME.fullmatch(part)]
    return "/".join(parts[: max(instances, default=1)]) or "/"


_HINT = (
    "rcon records there where attached processes came from; as an ordinary user, set XDG_RUNTIME_DIR to a directory "
    "of this user"
)


def save(instance: str, previous: PreviousCgroups) -> None:
    """Write the record, replacing the former one atomically. Raises KernelError."""
    path = _path(instance)
    new = f"{path}.new"
    entries = [
        {"pid": pid, "started": started, "at": dict(paths)}
        for (pid, started), paths in previous.by_process.items()
    ]
    try:
        runtime.make_folder()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(entries).encode())
        finally:
            posix.close(descriptor)
        os.rename(new, path)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path, hint=_HINT) from None


def check_writable() -> None:
    """Raise KernelError if no record could be written here. Writes nothing."""
    folder = runtime.folder()
    existing = folder
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        refused = OSError(errno.EACCES, os.strerror(errno.EACCES))
        raise KernelError.from_oserror(refused, path=folder, hint=_HINT)


def load(instance: str) -> PreviousCgroups:
    """Return the record; an empty one if it is missing or damaged. Processes then move to the base of their group.

    Raises KernelError if it cannot be read: then nobody knows yet where the processes belong.
    """
    path = _path(instance)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return PreviousCgroups({})
        raise KernelError.from_oserror(error, path=path, hint="try again") from None
    try:
        entries = json.loads(data)
        return PreviousCgroups({(int(one["pid"]), int(one["started"])): dict(one["at"]) for one in entries})
    except (ValueError, KeyError, TypeError):
        return PreviousCgroups({})


def forget(instance: str) -> None:
    """Remove the record."""
    for path in (_path(instance), f"{_path(instance)}.new"):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _path(instance: str) -> str:
    return f"{runtime.folder()}/{instance}.json"
