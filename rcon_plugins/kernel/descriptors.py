"""Make descriptors of no path: counters, pipes, files in memory, sockets, processes. execve(2) closes all of them.

Each failure is a `KernelError` with the remedy: this process or the machine has no descriptor or no memory left.
"""

from __future__ import annotations

import errno
import os
import posix
from typing import Any

from rcon_plugins.errors import KernelError, fork_refused


def event_counter() -> int:
    """Return a counter that starts at 0 and can be polled: eventfd(2). Reading it does not block.

    Raises `KernelError`.
    """
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise KernelError.from_oserror(error, path="eventfd") from None


def pipe(*, blocking: bool = True) -> tuple[int, int]:
    """Return the ends of a new pipe, to read and to write: pipe2(2). Raises `KernelError`."""
    try:
        return os.pipe2(os.O_CLOEXEC if blocking else os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError.from_oserror(error, path="pipe") from None


def memory_file(name: str) -> int:
    """Return an empty file in memory, memfd_create(2). ``/proc/<pid>/fd`` shows its name. Raises `KernelError`."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC)
    except OSError as error:
        raise KernelError.from_oserror(error, path="memfd_create") from None


def socket_pair(kind: int, module: Any) -> tuple[Any, Any]:
    """Return two connected Unix sockets: socketpair(2). Raises `KernelError`.

    ``module`` makes them: `socket`, which gevent replaces, or `_socket`, which it does not.
    """
    try:
        ends: tuple[Any, Any] = module.socketpair(module.AF_UNIX, kind)
    except OSError as error:
        raise KernelError.from_oserror(error, path="socketpair") from None
    return ends


def of_process(pid: int) -> int:
    """Return a descriptor of a process, pidfd_open(2). Raises `KernelError`; ESRCH: it is gone.

    While the kernel takes an ended process apart, it has a number and no leader any more. The errno is that of a number
    of a thread then: EINVAL, in newer kernels ENOENT.
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            error = ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        raise KernelError.from_oserror(error, path=f"pidfd_open({pid})") from None


def fork_beside(*pipe: int) -> int:
    """Call fork(2). If it fails, close these descriptors, which are for the child, and raise KernelError.

    Not for a process with other threads, or that runs code of others: see `process.fork`.
    """
    try:
        return posix.fork()
    except OSError as error:
        for descriptor in pipe:
            posix.close(descriptor)
        raise fork_refused(error) from None
