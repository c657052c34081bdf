"""Read and write the kernel's files: a directory, a name in it, one unbuffered read or write.

Every open is ``O_CLOEXEC | O_NOFOLLOW``, below a directory that was itself opened without following a link. Every
failure is a :class:`~rcon_plugins.errors.KernelError` with the path, the value and a hint. The module uses no buffered
Python files: they can hide the error of a write (``cgroups(7)``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import posix
import stat
import time
from collections.abc import Iterable, Iterator

from rcon_plugins.errors import KernelError

#: The bytes per read(2): more than any file here has. Reading continues to the end of the file in any case.
_CHUNK = 65536
#: The number of links of a cgroup directory without children.
_LINKS_WITHOUT_CHILDREN = 2
#: How long to wait for a lock, seconds. Who holds one only writes a few files.
_LOCK_SECONDS = 0.1
#: The longest path for one system call, in characters of up to four bytes.
_LONGEST_PATH = 1000

_HINTS = {
    errno.EROFS: "this cgroup file system is mounted read-only; start a container with its own writable cgroup: "
    "docker run --cgroupns=private --security-opt writable-cgroups=true, or podman run "
    "--cgroupns=private --security-opt unmask=/sys/fs/cgroup",
    errno.EACCES: "only the owner of this cgroup may do this: run as root, or delegate the cgroup to this user",
    errno.EPERM: "only the owner of this cgroup may do this: run as root, or delegate the cgroup to this user",
    errno.ENOENT: "the cgroup is gone, or its controller is not enabled here",
    errno.ENODEV: "the cgroup is gone, or the value names no device",
    errno.ENOSPC: "a limit on the number of cgroups is reached (cgroup.max.descendants, cgroup.max.depth), or a "
    "v1 cpuset has no cpus or mems yet",
    errno.EBUSY: "a process, a child cgroup or a limit below this cgroup prevents it",
}


#: Only these say that a cgroup, its file or a process is gone. Any other error says nothing about it: try again.
_GONE = frozenset({errno.ENOENT, errno.ENODEV, errno.ESRCH})
#: These say that this process may not do it, so that trying again brings the same.
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.EDEADLK, errno.EOPNOTSUPP})
#: The kernel could not look: these say nothing about what was asked for.
_UNANSWERED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


def unanswered(error: OSError) -> bool:
    """Return whether an error is one of this process or machine, as a lack of descriptors or memory, and no answer."""
    return error.errno in _UNANSWERED


def gone(error: OSError) -> bool:
    """Return whether an error says that the cgroup, file or process no longer exists."""
    return error.errno in _GONE


def refused(error: OSError) -> bool:
    """Return whether an error says that the kernel would refuse the call again."""
    return error.errno in _REFUSED


def failure(error: OSError, path: str, value: str | None = None, hint: str | None = None) -> KernelError:
    """Return ``error`` with the path, the value written (None for a read) and the remedy."""
    return KernelError.from_oserror(
        error, path=path, value=value, hint=hint or _HINTS.get(error.errno or 0) or None
    )


def open_file(directory: str, name: str, flags: int = os.O_RDONLY) -> int:
    """Open the file ``name`` in ``directory`` and return its descriptor.

    Raises KernelError (ENOENT, EACCES, EROFS ...).
    """
    try:
        at = _open_directory(directory)
    except OSError as error:
        raise failure(error, f"{directory}/{name}") from None
    try:
        return _open_in(at, directory, name, flags)
    finally:
        posix.close(at)  # gevent's os.close() waits for an event loop unless the file is regular


def are_empty(directory: str, names: Iterable[str]) -> bool:
    """Return whether all these files have no content, or do not exist. Raises KernelError."""
    try:
        with Directory(directory) as opened:
            return all(map(opened.is_empty, names))
    except KernelError as error:
        if not gone(error):
            raise
        return True


def _open_in(at: int, directory: str, name: str, flags: int) -> int:
    if not name or "/" in name:
        raise ValueError(f"not the name of a kernel file: {name!r}")
    try:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=at)
    except OSError as error:
        raise failure(error, f"{directory}/{name}") from None


class Directory:
    """A directory that is open in a ``with`` block, for several of its files.

    The classes here stand for generators as context managers, which take twice as long. A new process opens a hundred
    files.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._at = -1

    def __enter__(self) -> Directory:
        """Open it. Raises KernelError (ENOENT ...)."""
        try:
            self._at = _open_directory(self._path)
        except OSError as error:
            raise failure(error, self._path) from None
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        posix.close(self._at)

    def open(self, name: str, flags: int) -> int:
        """Open a file in it, as :func:`open_file` does."""
        return _open_in(self._at, self._path, name, flags)

    def is_empty(self, name: str) -> bool:
        """Return whether a file has no content, or does not exist. Raises KernelError."""
        try:
            fd = self.open(name, os.O_RDONLY)
            try:
                return not os.read(fd, 1)
            finally:
                posix.close(fd)
        except OSError as error:
            if gone(error):
                return True
            raise failure(error, f"{self._path}/{name}") from None

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name. Raises KernelError."""
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self._at, follow_symlinks=False).st_mode)
        except OSError as error:
            if gone(error):
                return False
            raise failure(error, f"{self._path}/{name}") from None

    def write(self, name: str, value: str) -> None:
        """Write a file in it, as :func:`write` does."""
        path = f"{self._path}/{name}"
        try:
            fd = self.open(name, os.O_WRONLY)
        except KernelError as error:
            raise failure(error, path, value) from None
        _write_all(fd, path, value)


def _open_directory(directory: str, flags: int = os.O_RDONLY) -> int:
    """Open ``directory``, however long its path is. Raises OSError."""
    flags |= os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    if len(directory) <= _LONGEST_PATH:
        return os.open(directory, flags)
    with _Parent(directory) as (at, name):
        return os.open(name, flags, dir_fd=at)


class _Parent:
    """Gives (fd, path relative to it) for a directory. The last part of the path is not opened.

    The kernel accepts paths of at most 4096 bytes, but the owner of a delegated cgroup may nest deeper.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._at: int | None = None

    def __enter__(self) -> tuple[int | None, str]:
        """Open all above it where the path is long. Raises OSError."""
        directory = self._directory
        try:
            while len(directory) > _LONGEST_PATH:
                cut = directory.rindex("/", 0, _LONGEST_PATH)
                first, directory = directory[:cut], directory[cut + 1 :]
                step = os.open(
                    first, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._at
                )
                self._close()
                self._at = step
        except BaseException:
            self._close()
            raise
        return self._at, directory

    def __exit__(self, *_: object) -> None:
        """Close what is open."""
        if self._at is not None:
            self._close()

    def _close(self) -> None:
        if self._at is not None:
            posix.close(self._at)
            self._at = None


def read(directory: str, name: str) -> str:
    """Return the whole text of a kernel file, without the last newline. Raises KernelError."""
    return _read_to_the_end(open_file(directory, name), f"{directory}/{name}")


def read_own(name: str, *, thread: bool = False) -> str:
    """Return the text of a file of ``/proc/self``, or of ``/proc/thread-self`` (``proc(5)``). Raises KernelError."""
    # These two are links; everything else is opened without following one.
    path = f"/proc/{'thread-self' if thread else 'self'}/{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise failure(error, path) from None
    return _read_to_the_end(fd, path)


def _read_to_the_end(fd: int, path: str) -> str:
    try:
        chunks = []
        while chunk := os.read(fd, _CHUNK):
            chunks.append(chunk)
    except OSError as error:
        raise failure(error, path) from None
    finally:
        posix.close(fd)
    return b"".join(chunks).decode("utf-8", "surrogateescape").removesuffix("\n")


def read_if_there(directory: str, name: str) -> str | None:
    """Return the text like :func:`read`; None if the file or its directory does not exist."""
    try:
        return read(directory, name)
    except KernelError as error:
        if not gone(error):
            raise
    return None


def read_those_there(directory: str, names: Iterable[str]) -> dict[str, str]:
    """Return the texts of the files that exist, by name, as :func:`read_if_there` does."""
    found: dict[str, str] = {}
    try:
        with Directory(directory) as opened:
            for name in names:
                try:
                    found[name] = _read_to_the_end(opened.open(name, os.O_RDONLY), f"{directory}/{name}")
                except KernelError as error:
                    if not gone(error):
                        raise
    except KernelError as error:
        if not gone(error):
            raise
    return found


def may_write(directory: str, name: str) -> bool:
    """Return whether this process may write a kernel file. Opens it, and writes nothing.

    Raises KernelError for an error that does not say so, which access(2) would hide.
    """
    try:
        descriptor = open_file(directory, name, os.O_WRONLY)
    except KernelError as error:
        if gone(error) or refused(error):
            return False
        raise
    posix.close(descriptor)
    return True


def write(directory: str, name: str, value: str, hint: str | None = None) -> None:
    """Write ``value`` to a kernel file in one ``write(2)``. Raises KernelError."""
    try:
        fd = open_file(directory, name, os.O_WRONLY)
    except KernelError as error:
        raise failure(error, f"{directory}/{name}", value, hint) from None
    _write_all(fd, f"{directory}/{name}", value, hint)


def _write_all(fd: int, path: str, value: str, hint: str | None = None) -> None:
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise failure(error, path, value, hint) from None
    finally:
        posix.close(fd)


def write_patiently(directory: str, name: str, value: str, seconds: float = 1.0) -> None:
    """Write like :func:`write`; repeat it for at most ``seconds`` while the kernel returns EBUSY.

    EBUSY lingers for a moment after the last process has left a cgroup.
    """
    deadline = time.monotonic() + seconds
    pause = 0.001
    while True:
        try:
            return write(directory, name, value)
        except KernelError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def make_directory(directory: str) -> bool:
    """Make one directory; return whether it is new. Raises KernelError (ENOENT: no parent)."""
    try:
        with _Parent(directory) as (at, path):
            os.mkdir(path, 0o755, dir_fd=at)
    except FileExistsError:
        return False
    except OSError as error:
        raise failure(error, directory) from None
    return True


def remove_directory(directory: str) -> bool:
    """Remove one cgroup; return False if it is busy. One that is gone already counts as removed."""
    try:
        with _Parent(directory) as (at, path):
            os.rmdir(path, dir_fd=at)
    except OSError as error:
        if gone(error):
            return True
        # Some v1 kernels return ENOTEMPTY for child cgroups.
        if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise failure(error, directory) from None
    return True


def is_directory(directory: str) -> bool:
    """Return whether ``directory`` is an existing directory, not a link to one. Raises KernelError."""
    status = _status(directory)
    return status is not None and stat.S_ISDIR(status.st_mode)


def identity(directory: str) -> int | None:
    """Return the inode of ``directory``, which a later one of the same name does not have; None without it.

    Raises KernelError.
    """
    status = _status(directory)
    return None if status is None else status.st_ino


def owner_of(directory: str) -> int | None:
    """Return the uid of the owner of a cgroup: its maker, or the user it was delegated to; None if it is gone.

    Raises KernelError.
    """
    status = _status(directory)
    return None if status is None else status.st_uid


def is_file(directory: str, name: str) -> bool:
    """Return whether there is a kernel file ``name`` in ``directory``. Raises KernelError."""
    status = _status(f"{directory}/{name}")
    return status is not None and stat.S_ISREG(status.st_mode)


def _status(path: str) -> os.stat_result | None:
    """Return the status of a path, without a descriptor for all but the longest; None if nothing is there."""
    try:
        with _Parent(path) as (at, name):
            return os.lstat(name) if at is None else os.stat(name, dir_fd=at, follow_symlinks=False)
    except OSError as error:
        if gone(error) or error.errno == errno.ENOTDIR:
            return None
        raise failure(error, path) from None


@contextlib.contextmanager
def locked(directory: str, seconds: float = _LOCK_SECONDS) -> Iterator[None]:
    """Hold an advisory lock on a directory, flock(2), in the block. Raises KernelError (ENOENT).

    Wait for it for so many ``seconds``, then go on without it: every user who may read the directory, such as confined
    code, can hold the lock as long as it likes.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise failure(error, directory) from None
    try:
        deadline = time.monotonic() + seconds
        while not _try_lock(descriptor, directory) and time.monotonic() < deadline:
            time.sleep(0.002)
        yield
    finally:
        posix.close(descriptor)


def _try_lock(descriptor: int, directory: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise failure(error, directory) from None
    return True


def subdirectories(directory: str) -> list[str]:
    """Return the names of the child cgroups; none if the directory is gone."""
    try:
        if is_childless(directory):
            return []
        at = _open_directory(directory)
        try:
            with os.scandir(at) as entries:
                return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        finally:
            posix.close(at)
    except OSError as error:
        if gone(error):
            return []
        raise failure(error, directory) from None


def is_childless(directory: str) -> bool:
    """Return whether one call shows that a cgroup has no child cgroups. Most have none."""
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    # Each child counts as a link to its parent: fs/kernfs/inode.c.
    return stat.S_ISDIR(status.st_mode) and status.st_nlink == _LINKS_WITHOUT_CHILDREN


def subtree(directory: str) -> list[str]:
    """Return ``directory`` and all directories below it, the deepest first."""
    if is_childless(directory):
        return [directory]
    found = [directory] if is_directory(directory) else []
    for here in found:
        found.extend(f"{here}/{name}" for name in subdirectories(here))
    return found[::-1]


def change_owner(directory: str, name: str | None, uid: int, gid: int) -> bool:
    """chown ``directory`` itself (``name`` None) or a file in it; return False if there is no such file."""
    path = directory if name is None else f"{directory}/{name}"
    try:
        os.chown(path, uid, gid, follow_symlinks=False)
    except OSError as error:
        if gone(error):
            return False
        raise failure(error, path) from None
    return True
