"""Find the owner of a path of which an untrusted user may have chosen a part.

The module opens no file for reading: its descriptors are O_PATH, which needs no permission on the file itself.
Sources: openat2(2), open(2), symlink(7), path_resolution(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import posix
import stat
from collections import deque
from functools import cache
from typing import NamedTuple

from rcon_plugins.errors import KernelError

_OPENAT2 = 437  # newer than Linux 5.0: the same number on x86_64 and aarch64
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08

_LINKS = 40  # the most links in one path, as in the kernel
_DEPTH = 100  # the most directories held open while links are followed


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


#: Any user, in `Owner.movers`.
ANYBODY = -1

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


class Owner(NamedTuple):
    """The owner and group of a file, and how far they show which user put it there.

    ``names`` is the number of its hard links, 1 for a directory. ``open_to_all``: every user may write to it.
    ``movers`` are the users who could make symbolic links lead to it: the owners of the links, and of the directories
    that contain them. Root and the owner of the directory of the search are trusted and left out. `ANYBODY` is included
    if other users could have put or moved a link of these two.
    """

    uid: int
    gid: int
    names: int = 1
    open_to_all: bool = False
    movers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, status: os.stat_result, movers: frozenset[int] = frozenset()) -> Owner:
        names = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        return cls(status.st_uid, status.st_gid, names, bool(status.st_mode & stat.S_IWOTH), movers)


@cache
def overflow_uid() -> int:
    """Return the uid that the kernel shows for users who are not mapped into this user namespace.

    NFS squashes to the same number by default. Source: proc_sys_kernel(5), ``overflowuid``.
    """
    return _overflow("uid")


@cache
def overflow_gid() -> int:
    """Return the gid that the kernel shows for groups that are not mapped here: proc_sys_kernel(5), ``overflowgid``."""
    return _overflow("gid")


def _overflow(kind: str) -> int:
    try:
        with open(f"/proc/sys/kernel/overflow{kind}", "rb") as file:
            return int(file.read())
    except OSError:
        return 65534  # the kernel's default: /proc/sys may be hidden from a container


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def open_directory(path: str) -> int:
    """Open a directory with O_PATH, following links. Raises `KernelError`."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None


def open_beneath(directory: int, path: str) -> int:
    """Open ``path`` beneath a directory with O_PATH, without following links; openat2(2), Linux 5.6.

    Raises `KernelError`: ELOOP for a link, EXDEV for a path that leads out or is absolute, ENOSYS before Linux 5.6,
    and the errors of open(2).
    """
    how = _OpenHow(
        os.O_PATH | os.O_CLOEXEC,
        0,
        _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS,
    )
    name = _encoded(path)
    descriptor: int = _libc().syscall(
        _OPENAT2, ctypes.c_int(directory), name, ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how))
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        raise KernelError.from_oserror(OSError(number, os.strerror(number)), path=path)
    return descriptor


def owner(path: str) -> Owner:
    """Return the owner of the file at ``path``, following links. Raises `KernelError`."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    return Owner.of(status)


def owner_beneath(directory: int, path: str) -> Owner:
    """Return the owner of ``path`` beneath a directory. No ``..`` and no link may lead out of it.

    Follows links within one by one; `Owner.movers` are the users who may have put or moved them. Raises `KernelError`:
    ELOOP for too many links, EXDEV for a path that leads out, and the errors of open(2).
    """
    movers: frozenset[int] = frozenset()
    try:
        descriptor = open_beneath(directory, path)
    except KernelError as error:
        if error.errno != errno.ELOOP:
            raise
        descriptor, movers = _follow(directory, path)
    try:
        return Owner.of(os.fstat(descriptor), movers)
    finally:
        posix.close(descriptor)


def _follow(directory: int, path: str) -> tuple[int, frozenset[int]]:
    """Open ``path`` beneath the directory with O_PATH. Return its descriptor and the `Owner.movers` of its links.

    Opens each part in the directory before it, so that a rename meanwhile does not lead elsewhere.
    """
    parts = deque(path.split("/"))
    top = os.fstat(directory)
    trusted = frozenset({0, top.st_uid} - {overflow_uid()})
    way: list[int] = []
    above = [top]  # the status of the directory, and of each on the way
    movers: frozenset[int] = frozenset()
    links = 0
    try:
        while parts:
            part = parts.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if not way:
                    raise _error(errno.EXDEV, path)
                posix.close(way.pop())
                above.pop()
                continue
            if len(way) >= _DEPTH:
                raise _error(errno.ENAMETOOLONG, path)
            descriptor = os.open(
                _encoded(part), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way[-1] if way else directory
            )
            way.append(descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISLNK(status.st_mode):
                above.append(status)
                continue
            links += 1
            if links > _LINKS:
                raise _error(errno.ELOOP, path)
            movers |= _movers(status, above, trusted)
            target = os.readlink("", dir_fd=descriptor)
            posix.close(way.pop())
            if target.startswith("/"):
                raise _error(errno.EXDEV, path)
            parts.extendleft(reversed(target.split("/")))
        return (way.pop() if way else os.dup(directory)), movers
    except KernelError:
        raise
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    finally:
        for descriptor in way:
            posix.close(descriptor)


def _movers(link: os.stat_result, above: list[os.stat_result], trusted: frozenset[int]) -> frozenset[int]:
    """Return the untrusted users who may have put the link where it is.

    A user who may write to a directory without the sticky bit can rename everything in it, and so move a link together
    with the directories that contain it. All these directories count, up to one of the link's owner: moving that one
    moves files of the same owner, with or without a link.
    """
    movers = {link.st_uid}
    loose = link.st_nlink > 1  # another user may have chosen one of its names, see protected_hardlinks
    for directory in reversed(above):
        movers.add(directory.st_uid)
        if link.st_uid not in trusted:
            if directory.st_uid == link.st_uid:
                break
        elif directory.st_uid in trusted and not directory.st_mode & stat.S_ISVTX:
            loose = loose or bool(directory.st_mode & _WRITABLE)
    return frozenset(movers - trusted | ({ANYBODY} if loose else set()))


def _error(number: int, path: str) -> KernelError:
    return KernelError.from_oserror(OSError(number, os.strerror(number)), path=path)


def _encoded(path: str) -> bytes:
    """Return the bytes of a path. Raises `KernelError` EINVAL for text that cannot be one."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise _error(errno.EINVAL, path) from None
    if b"\0" in encoded:
        raise _error(errno.EINVAL, path)
    return encoded
