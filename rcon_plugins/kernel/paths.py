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


#: In `Found.movers`: no single user.
ANYBODY = -1

_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


class Found(NamedTuple):
    """Whose a file is: its owner, its group, and what else bears upon whether that says who put it there.

    ``names`` is the number of its hard links, 1 for a directory. ``open_to_all``: everybody may write to it. ``movers``
    are those who decided that symbolic links led to it: their owners, and the owners of the directories that the links
    lie in. Of these not root and the owner of the directory below which it was looked for, who may put there what they
    like; but `ANYBODY` where one of theirs could have been put or moved there by others.
    """

    uid: int
    gid: int
    names: int = 1
    open_to_all: bool = False
    movers: frozenset[int] = frozenset()

    @classmethod
    def of(cls, status: os.stat_result, movers: frozenset[int] = frozenset()) -> Found:
        names = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        return cls(status.st_uid, status.st_gid, names, bool(status.st_mode & stat.S_IWOTH), movers)


@cache
def overflow_uid() -> int:
    """The uid that stands for owners without one here: proc_sys_kernel(5), ``overflowuid``.

    So the kernel shows who is not mapped into this user namespace; NFS squashes to the same number by default.
    """
    return _overflow("uid")


@cache
def overflow_gid() -> int:
    """The gid that stands for groups without one here: proc_sys_kernel(5), ``overflowgid``."""
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
    return Found.of(status)


def owner_beneath(directory: int, path: str) -> Found:
    """Whose ``path`` beneath a directory is; no ``..`` and no link leads out of that directory.

    Links within are followed, one after the other, and those told who may have put or moved them: they are not always
    those who may say where a link leads. Raises `KernelError`: ELOOP for too many links, EXDEV for a path that leads
    out, and what open(2) says.
    """
    movers: frozenset[int] = frozenset()
    try:
        descriptor = open_beneath(directory, path)
    except KernelError as error:
        if error.errno != errno.ELOOP:
            raise
        descriptor, movers = _follow(directory, path)
    try:
        return Found.of(os.fstat(descriptor), movers)
    finally:
        os.close(descriptor)


def _follow(directory: int, path: str) -> tuple[int, frozenset[int]]:
    """An O_PATH descriptor of ``path`` beneath the directory, and the `Found.movers` of the links on the way.

    Part after part, each opened in the directory before it, so that nothing renamed meanwhile leads elsewhere.
    """
    parts = deque(path.split("/"))
    top = os.fstat(directory)
    trusted = frozenset({0, top.st_uid} - {overflow_uid()})
    way: list[int] = []
    above = [top]  # what is known of the directory, and of each on the way
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
                os.close(way.pop())
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
            os.close(way.pop())
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
            os.close(descriptor)


def _movers(link: os.stat_result, above: list[os.stat_result], trusted: frozenset[int]) -> frozenset[int]:
    """Who, of those that are not trusted, may have put the link where it is.

    Whoever may write to a directory renames what is in it, whosever that is, where it has no sticky bit; and the
    directories that a link lies in with it. So all of them count, up to one that is the link's owner's: who moves that
    moves what shows the same owner without any link.
    """
    movers = {link.st_uid}
    loose = link.st_nlink > 1  # one of its names is where somebody else wanted it, see protected_hardlinks
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
    """The bytes of a path. Raises `KernelError` EINVAL for what no path can be."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise _error(errno.EINVAL, path) from None
    if b"\0" in encoded:
        raise _error(errno.EINVAL, path)
    return encoded
