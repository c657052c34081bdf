"""Give the calling process mounts and shared memory of its own: unshare(2), mount_namespaces(7), ipc_namespaces(7).

Memory in a tmpfs, and in segments of System V, stays when the processes that wrote it have ended, and its charge moves
to a cgroup further up. In a namespace of its own it goes with the last process. The mounts of the cgroups are read-only
there, so that also chmod(2), chown(2) and setxattr(2), which Landlock does not know, are refused.

Mounts that the system makes or removes later appear and disappear there too; nothing spreads the other way (slave
mounts). All this takes CAP_SYS_ADMIN, effective.
"""

from __future__ import annotations

import errno
import os
import posix  # the real close: a cooperative library may have replaced that of `os`
import signal
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import NamedTuple, NoReturn

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors, fork_hooks, process
from rcon_plugins.kernel.capability import CAP_SYS_ADMIN, raise_capability, read_state
from rcon_plugins.kernel.cgroup.mounts import MountEntry, mount_table, parse_mountinfo
from rcon_plugins.kernel.files import gone, refused
from rcon_plugins.kernel.syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SLAVE,
    POLLPRI,
    Poll,
    mount,
    mount_read_only_below,
    poll_readable,
    unshare,
)

#: Where programs share memory: shm_open(3). It is made private whatever file system it is on.
_SHARED_MEMORY = "/dev/shm"  # noqa: S108
_CGROUPS = "/sys/fs/cgroup"
#: Directories that everybody may write to. They are made private where they are in memory.
_WRITABLE = ("/tmp", "/var/tmp", "/run/lock")  # noqa: S108
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
#: By the bits of statvfs(3), the flags of a mount that a remount must repeat: it would clear them.
_FLAGS = ((os.ST_NOSUID, MS_NOSUID), (os.ST_NODEV, MS_NODEV), (os.ST_NOEXEC, MS_NOEXEC))
_TRIAL_SECONDS = 10.0
#: With these errors the kernel, a container's filter or a security module says that the calls are not for this process.
#: Any other error, as of memory or descriptors, says nothing about that.
_CANNOT = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EOPNOTSUPP})


class MountChanges:
    """Tells whether the mounts of this process's namespace have changed. It keeps a file open: proc(5), mountinfo.

    Do not use it in a fork: one process would take the news from the other.
    """

    def __init__(self) -> None:
        try:
            self._file = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError.from_oserror(error, path="/proc/self/mountinfo") from None
        self._poll = Poll({self._file: POLLPRI})

    def happened(self) -> bool:
        """Return whether any mount has changed since it was made or last asked."""
        return bool(self._poll.wait(0))

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        descriptor, self._file = self._file, -1
        if descriptor >= 0:
            posix.close(descriptor)


class _Mount(NamedTuple):
    """A mount point, and the flags of its mount. For a tmpfs also the options that keep its owner and mode."""

    path: str
    flags: int
    options: str = ""


class View(NamedTuple):
    """What `enter` changes: the mounts of the cgroups, the directories in memory, and those of message queues.

    ``tops`` are the mounts that have all mounts of the cgroups below them, ``hidden`` the directories to hide.
    """

    cgroups: tuple[_Mount, ...]
    tops: tuple[str, ...]
    memory: tuple[_Mount, ...]
    queues: tuple[_Mount, ...]
    hidden: tuple[str, ...] = ()

    @classmethod
    def of(cls, table: str, hide: Iterable[str] = ()) -> View:
        """Return the view for a `mount_table`. Does not make a directory private that the process works in.

        ``hide`` are directories whose content is out of reach in the view.
        """
        entries = {entry.path: entry for entry in parse_mountinfo(table)}  # the last one hides those before
        memory = [_as_memory(path) for path in _directories_in_memory(entries)]
        cgroups = [entry.path for entry in entries.values() if entry.filesystem in ("cgroup", "cgroup2")]
        queues = [entry.path for entry in entries.values() if entry.filesystem == "mqueue"]
        tops = {_CGROUPS if _CGROUPS in entries and _is_below(path, _CGROUPS) else path for path in cgroups}
        return cls(
            tuple(map(_as_it_is, cgroups)),
            tuple(sorted(tops)),
            tuple(memory),
            tuple(map(_as_it_is, queues)),
            tuple(hide),
        )


def _is_below(path: str, directory: str) -> bool:
    return f"{path}/".startswith(f"{directory}/")


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        if not gone(error):
            raise KernelError.from_oserror(error, path="getcwd") from None
        return ""  # removed


def _directories_in_memory(entries: dict[str, MountEntry]) -> list[str]:
    """Return the directories to make private, without links. They need not be mount points: /run/lock may not be."""
    here = _working_directory()
    found: list[str] = []
    for name in (_SHARED_MEMORY, *_WRITABLE):
        try:
            path = os.path.realpath(name, strict=True)
        except OSError as error:
            if not (gone(error) or refused(error)):
                raise KernelError.from_oserror(error, path=name) from None
            continue  # not on this machine
        in_memory = _filesystem_of(path, entries) in _IN_MEMORY and not _is_below(here, path)
        if (name == _SHARED_MEMORY or in_memory) and not any(_is_below(path, other) for other in found):
            found.append(path)
    return found


def _filesystem_of(path: str, entries: dict[str, MountEntry]) -> str | None:
    """Return the type of the file system that a path without links is on."""
    while path not in entries and path != "/":
        path = os.path.dirname(path)
    return entries[path].filesystem if path in entries else None


def _as_memory(path: str) -> _Mount:
    try:
        status = os.stat(path)
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    options = f"mode={status.st_mode & 0o7777:o},uid={status.st_uid},gid={status.st_gid}"
    return _Mount(path, _flags_of(path) | MS_NOSUID | MS_NODEV, options)


def _as_it_is(path: str) -> _Mount:
    return _Mount(path, _flags_of(path))


def _flags_of(path: str) -> int:
    try:
        found = os.statvfs(path).f_flag
    except OSError as error:
        raise KernelError.from_oserror(error, path=path) from None
    return sum(flag for bit, flag in _FLAGS if found & bit)


def enter(view: View, *, private_memory: bool, size: int | None) -> None:
    """Move the calling process to a mount namespace of its own, in which the cgroups are mounted read-only.

    The hidden directories of the view are empty there, and read-only.

    With ``private_memory`` it gets an IPC namespace too, and empty file systems in memory on the directories of the
    view, each of at most ``size`` bytes (None: the kernel's default, half of the memory). The process must have one
    thread. Raises `KernelError`; the process must not go on then.
    """
    unshare(CLONE_NEWNS | (CLONE_NEWIPC if private_memory else 0))
    mount(None, "/", None, MS_REC | MS_SLAVE)
    _forbid_writing(view)
    for path in view.hidden:
        mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=755")
    if not private_memory:
        return
    bound = "" if size is None else f",size={size}"
    for path, flags, options in view.memory:
        mount("tmpfs", path, "tmpfs", flags, options + bound)
    for path, flags, _ in view.queues:
        mount("mqueue", path, "mqueue", flags)


def _forbid_writing(view: View) -> None:
    try:
        for path in view.tops:
            mount_read_only_below(path)
    except KernelError as error:
        if error.errno != errno.ENOSYS:  # before Linux 5.12
            raise
        for path, flags, _ in view.cgroups:
            mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)


def why_not() -> str | None:
    """Return why the calling process cannot give others namespaces of their own; None if it can.

    Tries it in a child process, once for this process and its forks. Raises `KernelError` if the trial fails for a
    reason that says nothing about that; the next call tries again.
    """
    if CAP_SYS_ADMIN not in read_state().permitted:
        return "the server lacks cap_sys_admin"
    return _trial()


@cache
def _trial() -> str | None:
    """Enter namespaces in a child. Return why they are not for this process, or None. Raises `KernelError`."""
    reading, writing = descriptors.pipe()
    try:
        with fork_hooks.left_out():
            child = process.fork()
            if child == 0:
                _enter_and_answer(writing)
        posix.close(writing)
        writing = -1
        answer = _answer_of(child, reading)
    finally:
        posix.close(reading)
        if writing >= 0:
            posix.close(writing)
    number, _, problem = answer.partition(b" ")
    if number == b"0":
        return None
    if not number:
        raise KernelError(
            "the trial of namespaces ended early",
            errno=errno.EIO,
            path="unshare",
            hint="start the server again",
        )
    code = int(number) if number.isdigit() else errno.EIO
    if code in _CANNOT:
        return problem.decode(errors="replace")
    raise KernelError(
        f"it is unknown whether this process can give namespaces: {problem.decode(errors='replace')}",
        errno=code,
        path="unshare",
        hint="start the server again; if the error is ENOSPC, raise the sysctls user.max_mnt_namespaces and "
        "user.max_ipc_namespaces",
    )


def _enter_and_answer(writing: int) -> NoReturn:
    """Enter namespaces, and write the errno and the problem: 0 for none, ? if it came before the attempt.

    The process ends whatever happens.
    """
    try:
        answer = b""
        try:
            raise_capability(CAP_SYS_ADMIN)
            view = View.of(mount_table())
        except KernelError as error:
            answer = f"? {error}".encode(errors="replace")[:4096]
        else:
            try:
                enter(view, private_memory=True, size=1 << 20)
                answer = b"0"
            except KernelError as error:
                answer = f"{error.errno or errno.EIO} {error}".encode(errors="replace")[:4096]
        os.write(writing, answer)
    finally:
        os._exit(0)


def _answer_of(child: int, reading: int) -> bytes:
    """Return what the child wrote; nothing without one in time. The child is gone then. Raises `KernelError`."""
    try:
        try:
            return os.read(reading, 4096) if poll_readable([reading], _TRIAL_SECONDS) else b""
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # it has answered, or hangs
            process.reap(child)
    except OSError as error:
        raise KernelError.from_oserror(error, path="trial of namespaces") from None
