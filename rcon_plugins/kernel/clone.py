"""Make a process that begins in a cgroup v2: clone3(2) with CLONE_INTO_CGROUP, Linux 5.7.

A process that is forked and then moves waits for an RCU grace period of the kernel, some 15 ms. On v2 the limit of
``pids`` does not refuse a move. At that limit clone3 fails, and it takes no longer than a fork.

The C library has no function for this call. So this module does what the C library's fork(2) does beside the call, for
a process with a single thread:

- The child's thread id is where the library keeps it, and the kernel clears it at the thread's end
  (CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID; PR_GET_TID_ADDRESS in prctl(2)).
- The child keeps the list of robust mutexes, which the kernel forgets: get_robust_list(2).
- Python's own functions after a fork run in the child (`PyOS_AfterFork_Child`).

``pthread_atfork`` handlers do not run. Those of libraries ran when this process was forked, and nothing has used the
libraries since. Before 1.1.1d OpenSSL needs such a handler: all children would have the same random numbers.
"""

from __future__ import annotations

import _imp
import ctypes
import errno
import os
import posix
import signal
import struct
import sys
from functools import partial
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import process
from rcon_plugins.kernel.proc import is_single_threaded
from rcon_plugins.kernel.syscalls import failed, prctl, prepared, syscall

_PR_GET_TID_ADDRESS = 40

_CLONE_PIDFD = 0x1000
_CLONE_CHILD_CLEARTID = 0x200000
_CLONE_CHILD_SETTID = 0x1000000
_CLONE_INTO_CGROUP = 0x200000000

_EXIT_NO_CHILD = 72
#: It looks at its pid before it gives random numbers. Source: CVE-2019-1549.
_OPENSSL_1_1_1D = 0x1010104F

#: The answers that say that this is not for this process: an old kernel, or a filter of a container.
_NOT_HERE = frozenset({errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.E2BIG})


#: struct clone_args, version 2 (Linux 5.7): flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
#: set_tid, set_tid_size, cgroup.
_ARGUMENTS = struct.Struct("11Q")


class CloneUnavailable(KernelError):
    """No process can begin in a cgroup here. Fork it, and let it move."""


class Child(NamedTuple):
    """A new process, seen from its parent; in the child both are 0."""

    pid: int
    pidfd: int


class Cloner:
    """Makes children of the calling process, which has a single thread and was forked by the C library."""

    def __init__(self) -> None:
        """Look up what `into` needs. Raises `CloneUnavailable` where this C library or machine is not known."""
        if getattr(sys.modules.get("_ssl"), "OPENSSL_VERSION_NUMBER", _OPENSSL_1_1_1D) < _OPENSSL_1_1_1D:
            raise CloneUnavailable("OpenSSL is older than 1.1.1d", errno=errno.ENOSYS, path="clone3")
        address, head, length = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        try:
            prctl(_PR_GET_TID_ADDRESS, ctypes.addressof(address))
            syscall("get_robust_list", 0, ctypes.byref(head), ctypes.byref(length))
        except KernelError as error:
            raise _unavailable(error) from None
        # The GNU C library of a forked process keeps the thread id there. Other libraries, and a process that was
        # executed, have something else there.
        tid = ctypes.c_int.from_address(address.value).value if address.value else 0
        if tid != os.getpid() or not is_single_threaded():
            raise CloneUnavailable(
                "the thread id of this C library is not known", errno=errno.ENOSYS, path="clone3"
            )
        self._tid_address = address.value
        self._keep_robust_list = prepared("set_robust_list", head.value, length.value)
        self._pidfd = ctypes.c_int(-1)
        self._after_fork = ctypes.pythonapi.PyOS_AfterFork_Child
        self._after_fork.restype = None

    def into(self, directory: str) -> Child:
        """Make a child in the cgroup of this directory. Return in both processes, as `process.fork` does.

        Raises `CloneUnavailable` if that is so for good. Raises `KernelError`: EAGAIN at a limit on processes, ENOENT
        without the cgroup, EACCES if this process may not move others there, EBUSY and EOPNOTSUPP if no process may be
        in it.
        """
        try:
            cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError.from_oserror(error, path=directory) from None
        arguments = _ARGUMENTS.pack(
            _CLONE_INTO_CGROUP | _CLONE_PIDFD | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID,
            ctypes.addressof(self._pidfd), self._tid_address, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup,
        )  # fmt: skip
        try:
            pid = process.fork(partial(self._clone, arguments))
        except KernelError as error:
            if error.errno in _NOT_HERE:
                raise _unavailable(error) from None
            raise
        finally:
            posix.close(cgroup)
        return Child(pid, self._pidfd.value if pid else 0)

    def _clone(self, arguments: bytes) -> int:
        """Call clone3. Raises `KernelError`."""
        # The GIL stays held, so that no other thread can run between the call and the child's first instruction.
        clone3 = prepared("clone3", arguments, len(arguments))
        pid = clone3()
        if pid == -1:
            raise failed("clone3")
        if pid == 0:
            try:
                if self._keep_robust_list() == -1:
                    raise failed("set_robust_list")
                _imp.acquire_lock()  # which the next call releases
                self._after_fork()
            except BaseException:  # noqa: BLE001 - the child must not go on as its parent
                os._exit(_EXIT_NO_CHILD)
        return pid


def _unavailable(error: KernelError) -> CloneUnavailable:
    return CloneUnavailable(error.problem, errno=error.errno or 0, path=error.path)
