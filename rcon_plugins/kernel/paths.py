"""Whose a path is, where part of the path was chosen by somebody who is not trusted.

Nothing here opens a file for reading: descriptors are of the kind O_PATH, which needs no permission on the file
itself. Sources: openat2(2), open(2), symlink(7), path_resolution(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections import deque
from functools import cache
from typing import NamedTuple

from rcon_plugins.errors import KernelError

_OPENAT2 = 437  # the same on all architectures that came to it after Linux 5.0: x86_64, aarch64
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08

_LINKS = 40  # as many as the kernel itself follows in one path
_DEPTH = 100  # directories held open while links are followed


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class Found(NamedTuple):
    """Whose a file is: its owner, its group, and ``links``, the owners of the symbolic links that led to it.

    Of the links not those of root and of the owner of the directory below which it was looked for, who may put there
    what they like.
    """

    uid: int
    gid: int
    links: frozenset[int] = frozenset()


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def open_directory(path: str) -> int:
    """An O_PATH descriptor of a directory, following links. Raises `KernelError`."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None


def open_beneath(directory: int, path: str) -> int:
    """An O_PATH descriptor of ``path`` beneath the directory, without following any link; openat2(2), Linux 5.6.

    Raises `KernelError`: ELOOP for a link, EXDEV for a path that leads out or is absolute, ENOSYS before Linux 5.6,
    and what open(2) says.
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


def owner(path: str) -> Found:
    """Whose the file at ``path`` is, following links. Raises `KernelError`."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    return Found(status.st_uid, status.st_gid)


def owner_beneath(directory: int, path: str) -> Found:
    """Whose ``path`` beneath a directory is; no ``..`` and no link leads out of that directory.

    Links within are followed, one after the other, and their owners told: who may put a link beneath the directory
    is not always who may say where it leads. Raises `KernelError`: ELOOP for too many of them, EXDEV for a path that
    leads out, and what open(2) says.
    """
    owners: frozenset[int] = frozenset()
    try:
        descriptor = open_beneath(directory, path)
    except KernelError as error:
        if error.errno != errno.ELOOP:
            raise
        descriptor, owners = _follow(directory, path)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if owners:
        owners -= {0, os.fstat(directory).st_uid}
    return Found(status.st_uid, status.st_gid, owners)


def _follow(directory: int, path: str) -> tuple[int, frozenset[int]]:
    """An O_PATH descriptor of ``path`` beneath the directory, and the owners of the links on the way.

    Part after part, each opened in the directory before it, so that nothing renamed meanwhile leads elsewhere.
    """
    parts = deque(path.split("/"))
    way: list[int] = []
    owners: list[int] = []
    try:
        while parts:
            part = parts.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if not way:
                    raise _error(errno.EXDEV, path)
                os.close(way.pop())
                continue
            if len(way) >= _DEPTH:
                raise _error(errno.ENAMETOOLONG, path)
            descriptor = os.open(
                _encoded(part), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=way[-1] if way else directory
            )
            way.append(descriptor)
            status = os.fstat(descriptor)
            if stat.S_ISLNK(status.st_mode):
                owners.append(status.st_uid)
                if len(owners) > _LINKS:
                    raise _error(errno.ELOOP, path)
                target = os.readlink("", dir_fd=descriptor)
                os.close(way.pop())
                if target.startswith("/"):
                    raise _error(errno.EXDEV, path)
                parts.extendleft(reversed(target.split("/")))
        return (way.pop() if way else os.dup(directory)), frozenset(owners)
    except KernelError:
        raise
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    finally:
        for descriptor in way:
            os.close(descriptor)


def _error(number: int, path: str) -> KernelError:
    return KernelError.from_oserror(OSError(number, os.strerror(number)), path=path)


def _encoded(path: str) -> bytes:
    """The bytes of a path. Raises `KernelError` EINVAL for what no path can be."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise _error(errno.EINVAL, path) from None
    if b"\0" in encoded:
        raise _error(errno.EINVAL, path)
    return encoded
