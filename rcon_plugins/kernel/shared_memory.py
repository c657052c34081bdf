"""Find memory that programs left: files in ``/dev/shm`` (shm_overview(7)) and segments of System V (svipc(7))."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

_DIRECTORY = "/dev/shm"  # noqa: S108
#: The most entries that are looked at: anybody can make more.
_MOST = 10_000


class Left(NamedTuple):
    """A file or a segment, its owner, and its memory in bytes. Its owner chose the name: escape it."""

    name: str
    uid: int
    size: int


def left_by(uids: Collection[int], since: float) -> list[Left]:
    """Return what belongs to these users and was made, or changed in size, after ``since`` (seconds since the epoch).

    Looks at the 10,000 first entries of each kind, and only at this process's own namespaces.
    """
    return [*_files_of(uids, since), *_segments_of(uids, since)]


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


def _segments_of(uids: Collection[int], since: float) -> list[Left]:
    try:
        table = files.read_if_there("/proc/sysvipc", "shm") or ""
    except KernelError:
        return []
    header, *lines = table.splitlines() or [""]
    names = header.split()
    found = []
    for line in lines[:_MOST]:
        fields = dict(zip(names, line.split(), strict=False))
        if int(fields["cuid"]) in uids and int(fields["ctime"]) >= int(since):
            found.append(
                Left(
                    f"segment {fields['shmid']}", int(fields["cuid"]), int(fields.get("rss", fields["size"]))
                )
            )
    return found
