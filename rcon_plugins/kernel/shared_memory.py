"""Find memory that programs left: files in ``/dev/shm`` (shm_overview(7)) and what System V keeps (sysvipc(7))."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

_DIRECTORY = "/dev/shm"  # noqa: S108
#: The most entries that are looked at: anybody can make more.
_MOST = 10_000


class _Kind(NamedTuple):
    """A table in ``/proc/sysvipc`` (proc(5)), and its columns: number, size in units of bytes, times of changes."""

    name: str
    file: str
    number: str
    size: str
    otherwise: str
    unit: int
    times: tuple[str, ...]


_KINDS = (
    _Kind("segment", "shm", "shmid", "rss", "size", 1, ("ctime",)),
    _Kind("message queue", "msg", "msqid", "cbytes", "cbytes", 1, ("ctime", "stime")),
    _Kind(
        "semaphores", "sem", "semid", "nsems", "nsems", 64, ("ctime", "otime")
    ),  # struct sem: a cache line each
)


class Left(NamedTuple):
    """A file, or a segment, queue or set of semaphores of System V; its owner, and its memory in bytes.

    The owner of a file chose its name: escape it.
    """

    name: str
    uid: int
    size: int


def left_by(uids: Collection[int], since: float) -> list[Left]:
    """Return what belongs to these users and was made, or changed in size, after ``since`` (seconds since the epoch).

    Looks at the 10,000 first entries of each kind, and only at this process's own namespaces.
    """
    return [*_files_of(uids, since), *_kept_by_system_v(uids, since)]


def _files_of(uids: Collection[int], since: float) -> list[Left]:
    found = []
    try:
        with os.scandir(_DIRECTORY) as entries:
            for _, entry in zip(range(_MOST), entries, strict=False):
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # removed just now
                if status.st_uid in uids and status.st_ctime >= since:
                    found.append(Left(entry.path, status.st_uid, status.st_blocks * 512))
    except OSError:
        return found  # there is no such directory, or this user may not read it
    return found


def _kept_by_system_v(uids: Collection[int], since: float) -> list[Left]:
    return [left for kind in _KINDS for left in _of_kind(kind, uids, since)]


def _of_kind(kind: _Kind, uids: Collection[int], since: float) -> list[Left]:
    try:
        table = files.read_if_there("/proc/sysvipc", kind.file) or ""
    except KernelError:
        return []
    header, *lines = table.splitlines() or [""]
    names = header.split()
    found = []
    for line in lines[:_MOST]:
        fields = dict(zip(names, line.split(), strict=False))
        uid, changed = int(fields["cuid"]), max(int(fields[name]) for name in kind.times)
        if uid in uids and changed >= int(since):
            size = int(fields.get(kind.size) or fields[kind.otherwise]) * kind.unit
            found.append(Left(f"{kind.name} {fields[kind.number]}", uid, size))
    return found
