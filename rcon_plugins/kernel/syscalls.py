"""The system calls that Python's standard library lacks, through ctypes.

A call is judged by its return value, never by errno alone (errno may be left over from before).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache

from rcon_plugins.errors import KernelError

#: prctl(2): the signal this process gets when the thread that forked it ends.
PR_SET_PDEATHSIG = 1

#: unshare(2): a working directory, root directory and umask of its own.
CLONE_FS = 0x00000200

_POLLIN = 0x001
_POLLHUP = 0x010
_POLLERR = 0x008


class _PollFd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument, for the calling thread or process as the option says.

    Raises `KernelError` when the kernel refuses.
    """
    if _libc().prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise KernelError(
            f"prctl({option}, {argument}): {os.strerror(number)}", errno=number, path=f"prctl({option})"
        )


def unshare(flags: int) -> None:
    """unshare(2): let the calling thread no longer share what ``flags`` say. Raises `KernelError`."""
    if _libc().unshare(ctypes.c_int(flags)) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"unshare({flags:#x}): {os.strerror(number)}", errno=number, path="unshare")


def poll_readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
    """poll(2): which descriptors can be read, or are at their end, within ``timeout`` seconds.

    The real system call, for processes that must not depend on what a library such as gevent has made of
    `select.poll`. An interrupted call is an empty answer. Raises `KernelError`.
    """
    wanted = list(descriptors)
    array = (_PollFd * len(wanted))(*(_PollFd(descriptor, _POLLIN, 0) for descriptor in wanted))
    milliseconds = -1 if timeout is None else max(0, int(timeout * 1000))
    count = _libc().poll(array, ctypes.c_ulong(len(wanted)), milliseconds)
    if count < 0:
        number = ctypes.get_errno()
        if number == 4:  # EINTR: a signal handler ran
            return set()
        raise KernelError(f"poll: {os.strerror(number)}", errno=number, path="poll")
    return {entry.fd for entry in array if entry.revents & (_POLLIN | _POLLHUP | _POLLERR)}
