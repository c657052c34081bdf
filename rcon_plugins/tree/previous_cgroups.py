"""Where processes came from that were taken into a group, kept so that they can be put back, whoever does it.

By whom they were taken is written down in a file for each instance, beside the other things that do not outlast a
boot: ``/run/rcon/<instance>.json`` for root, else in the user's own runtime directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, proc
from rcon_plugins.kernel.cgroup import Cgroup, mounts
from rcon_plugins.tree.survey import INSTANCE_NAME

#: How long processes that go on forking are moved again, seconds.
_SECONDS = 2.0
#: What is said of a place that takes no process (any more): the one above it is tried.
_NO_PLACE = frozenset({errno.ENOENT, errno.ENODEV, errno.EBUSY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSPC})

#: By mount point the path of a cgroup: where a process is, in all hierarchies that matter.
Place = Mapping[str, str]


class Origins(NamedTuple):
    """By process (pid and start time) where it was. One that was forked since goes where the first was."""

    places: dict[tuple[int, int], Place]

    def of(self, pid: int) -> Place:
        """Where a process is to go back to."""
        started = proc.start_time(pid)
        known = None if started is None else self.places.get((pid, started))
        return known or next(iter(self.places.values()), {})


def place_of(pid: int, group: Cgroup) -> Place:
    """Where a process is, in the hierarchies of ``group``. Raises KernelError, ESRCH where it has ended."""
    text = proc.membership(pid)
    if text is None:
        raise KernelError(f"process {pid} has ended", errno=errno.ESRCH)
    membership = mounts.parse_membership(text)
    found = {}
    for mount in group.mounts:
        path = mounts.membership(mount, membership)
        if path is None:
            raise KernelError(
                f"process {pid} is outside of what {mount.path} shows",
                errno=errno.EXDEV,
                path=mount.path,
                hint="run rcon where it can be seen, outside of the container",
            )
        found[mount.path] = path
    return found


def stranger(group: Cgroup) -> int | None:
    """The uid of another user that has any of this cgroup; None where all of it is this user's.

    Whoever may make cgroups in a group that holds it to limits may make one that looks like what was taken. What is
    put back leaves these limits, so that nothing is that is not this user's own.
    """
    found = {uid for one in group.directories if (uid := files.owner_of(one)) is not None} - {os.geteuid()}
    return min(found, default=None)


def restore(group: Cgroup, origins: Origins, pids: Iterable[int] | None = None) -> list[int]:
    """Move processes out of ``group``, and what they fork meanwhile, to where they were; those that stay.

    ``pids``: only these. A place that is gone, or takes no processes any more, is replaced by the next above it.
    Raises KernelError.
    """
    deadline = time.monotonic() + _SECONDS
    wanted = None if pids is None else set(pids)
    while True:
        inside = {pid for pid in group.processes(subtree=True) if wanted is None or pid in wanted}
        if not inside or time.monotonic() > deadline:
            return sorted(inside)
        for pid in inside - {0}:  # 0 is one of a PID namespace that cannot be seen from here
            put_back_one(pid, group, origins.of(pid))


def put_back_one(pid: int, group: Cgroup, origin: Place) -> None:
    """Move one process to its place in each hierarchy. One that ended meanwhile is fine. Raises KernelError.

    Where this user may not (v1 lets it take what is its own from anywhere, and put it only where it may write), it is
    left in the base of the group, whose limits are not ours.
    """
    base = _base_of(group)
    for mount in group.mounts:
        path = origin.get(mount.path, "/")
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
                if error.errno not in _NO_PLACE or path == "/":
                    raise
                path = path.rpartition("/")[0] or "/"


def _base_of(group: Cgroup) -> str:
    """The cgroup that the instance of a group was made in."""
    parts = group.path.split("/")
    instances = [index for index, part in enumerate(parts) if INSTANCE_NAME.fullmatch(part)]
    return "/".join(parts[: max(instances, default=1)]) or "/"


_HINT = (
    "where processes came from is kept there: as an ordinary user, set XDG_RUNTIME_DIR to a directory of this user's "
    "own"
)


def save(instance: str, origins: Origins) -> None:
    """Write them down; whatever happens, those of before are there or these. Raises KernelError."""
    path = _path(instance)
    new = f"{path}.new"
    told = [{"pid": pid, "started": started, "at": dict(at)} for (pid, started), at in origins.places.items()]
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(told).encode())
        finally:
            os.close(descriptor)
        os.rename(new, path)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path, hint=_HINT) from None


def check_room() -> None:
    """That something could be written down here, without doing it. Raises KernelError."""
    folder = _folder()
    there = folder
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        refused = OSError(errno.EACCES, os.strerror(errno.EACCES))
        raise KernelError.from_oserror(refused, path=folder, hint=_HINT)


def load(instance: str) -> Origins:
    """What was written down; nothing where that is gone, so that they go to the root of the tree."""
    try:
        with open(_path(instance), "rb") as file:
            told = json.loads(file.read())
        return Origins({(int(one["pid"]), int(one["started"])): dict(one["at"]) for one in told})
    except (OSError, ValueError, KeyError, TypeError):
        return Origins({})


def forget(instance: str) -> None:
    """Remove what was written down."""
    for path in (_path(instance), f"{_path(instance)}.new"):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _path(instance: str) -> str:
    return f"{_folder()}/{instance}.json"


def _folder() -> str:
    uid = os.geteuid()
    if uid == 0:
        return "/run/rcon"
    return f"{os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{uid}'}/rcon"
