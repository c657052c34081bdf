"""Make the system calls that Python's standard library lacks, through ctypes.

The return value decides whether a call failed, never errno alone: errno may be left over from an earlier call.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

from rcon_plugins.errors import CapabilityError, KernelError

#: prctl(2): send this process a signal when the thread that forked it ends.
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_LOWER = 3

#: unshare(2): give the thread its own working directory, root directory and umask.
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000

#: mount(2).
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_SLAVE = 1 << 19

#: mmap(2): the same numbers on all machines.
PROT_READ = 0x1
PROT_WRITE = 0x2
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
_MADV_DONTFORK = 10

# The numbers by machine. The functions of these names in glibc change every thread of the process, or do not exist.
_NUMBERS = {
    "x86_64": {
        "setgroups": 116,
        "setresuid": 117,
        "setresgid": 119,
        "capget": 125,
        "capset": 126,
        "prctl": 157,
        "mount": 165,
        "keyctl": 250,
        "unshare": 272,
        "set_robust_list": 273,
        "get_robust_list": 274,
        "seccomp": 317,
    },
    "aarch64": {
        "mount": 40,
        "capget": 90,
        "capset": 91,
        "unshare": 97,
        "set_robust_list": 99,
        "get_robust_list": 100,
        "setresuid": 147,
        "setresgid": 149,
        "setgroups": 159,
        "prctl": 167,
        "keyctl": 219,
        "seccomp": 277,
    },
}

# Since Linux 5.0 a new system call has the same number on both.
_SINCE_5 = {
    "clone3": 435,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}

#: poll(2): the same numbers on all machines. The kernel always reports POLLERR and POLLHUP.
POLLIN = 0x001
POLLPRI = 0x002
POLLOUT = 0x004
_POLLERR = 0x008
_POLLHUP = 0x010

_ZEROS = (0,) * 5


#: struct pollfd: fd, events, revents.
_POLL_FD = struct.Struct("ihh")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def _number(name: str) -> int:
    """Return the number of a system call on this machine. Raises `KernelError` (ENOSYS) if it is not known."""
    machine = os.uname().machine
    if machine not in _NUMBERS or ctypes.sizeof(ctypes.c_long) != 8:
        raise KernelError(
            f"the number of the system call {name} is not known here for {machine or 'this machine'}",
            errno=errno.ENOSYS,
            path=name,
            hint="run a 64-bit Python on x86_64 or aarch64",
        )
    return _SINCE_5[name] if name in _SINCE_5 else _NUMBERS[machine][name]


def syscall(name: str, *arguments: Any) -> int:
    """Call ``name`` without the C library's wrapper, for the calling thread alone, and return the result.

    An argument is an integer, which is passed as long, bytes, None, an array or ``byref``. Adds zeros up to five
    arguments. Raises `KernelError` whose path is the name of the call.
    """
    result = int(_syscall()(_number(name), *arguments, *_ZEROS[len(arguments) :]))
    if result == -1:
        raise failed(name)
    return result


def prepared(name: str, *arguments: Any) -> Callable[[], int]:
    """Return a function that makes a system call later, as `syscall` does. It returns -1 on an error: see `failed`.

    No other thread of Python runs during the call, and no code of Python: a new process would copy the memory that the
    code touches. Raises `KernelError` (ENOSYS).
    """
    return partial(_syscall_holding_gil(), _number(name), *arguments, *_ZEROS[len(arguments) :])


def failed(name: str) -> KernelError:
    """Return the error of a system call that has just returned -1."""
    number = ctypes.get_errno()
    return KernelError(f"{name}: {os.strerror(number)}", errno=number, path=name)


def unprivileged(error: KernelError, what: str) -> CapabilityError:
    """Return the error for a thread that may not use ``what``, because it has neither no_new_privs nor CAP_SYS_ADMIN.

    ``error`` is that of `syscall`. Source: seccomp(2), landlock_restrict_self(2).
    """
    return CapabilityError(
        f"the kernel refuses {what} for this thread",
        errno=error.errno or 0,
        path=error.path,
        hint="set no_new_privs first, or hold CAP_SYS_ADMIN",
    )


@cache
def _syscall() -> Any:
    return _with_arguments(_libc()["syscall"])  # a new object: setting its types affects no other user


@cache
def _syscall_holding_gil() -> Any:
    return _with_arguments(ctypes.PyDLL(None, use_errno=True)["syscall"])


def _with_arguments(function: Any) -> Any:
    """Have a function take what `syscall` passes. So ctypes converts it in C, in a fifth of the time."""
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, *[ctypes.c_void_p] * len(_ZEROS))
    return function


def prctl(option: int, argument: int) -> None:
    """Call prctl(2) with one argument. The option decides whether it acts on the calling thread or process.

    Raises `KernelError` if the kernel refuses.
    """
    if _libc().prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise KernelError(
            f"prctl({option}, {argument}): {os.strerror(number)}", errno=number, path=f"prctl({option})"
        )


def unshare(flags: int) -> None:
    """Call unshare(2): give the calling thread its own copies of the resources in ``flags``. Raises `KernelError`."""
    syscall("unshare", flags)


def map_memory(start: int, length: int, protection: int, flags: int, descriptor: int, offset: int) -> int:
    """Call mmap(2), and return the address. ``start`` is it with MAP_FIXED, and else 0. Raises `KernelError`."""
    call = _libc()["mmap"]
    call.restype = ctypes.c_void_p
    call.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    address = call(start, length, protection, flags, descriptor, offset)
    if address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise KernelError(f"mmap: {os.strerror(number)}", errno=number, path="mmap")
    return int(address)


def unmap_memory(start: int, length: int) -> None:
    """Call munmap(2). Nothing may use the memory any more. Raises `KernelError`."""
    _memory_call("munmap", start, length)


def keep_from_forks(start: int, length: int) -> None:
    """Leave memory of this process out of its later forks: madvise(2), MADV_DONTFORK. Raises `KernelError`."""
    _memory_call("madvise", start, length, _MADV_DONTFORK)


def _memory_call(name: str, start: int, length: int, *more: int) -> None:
    call = _libc()[name]
    if call(ctypes.c_void_p(start), ctypes.c_size_t(length), *map(ctypes.c_int, more)) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"{name}: {os.strerror(number)}", errno=number, path=name)


def words_at(start: int, count: int) -> memoryview:
    """Return memory of this process as ``count`` words of 64 bits. It must stay mapped while the view is used."""
    return memoryview((ctypes.c_uint64 * count).from_address(start)).cast("B").cast("Q")


def read_memory(start: int, length: int) -> bytes:
    """Return a copy of this process's memory, which must be mapped."""
    return ctypes.string_at(start, length)


def write_memory(start: int, content: bytes) -> None:
    """Write to this process's memory, which must be mapped."""
    ctypes.memmove(start, content, len(content))


_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
# struct mount_attr: attr_set, attr_clr, propagation, userns_fd. Made here, because it is used in each new process.
_READ_ONLY = struct.pack("4Q", MS_RDONLY, 0, 0, 0)


def mount_read_only_below(path: str) -> None:
    """Make the mount at ``path``, and all mounts below it, read-only: mount_setattr(2), Linux 5.12.

    Other flags stay. Raises `KernelError`.
    """
    syscall("mount_setattr", _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, _READ_ONLY, len(_READ_ONLY))


def mount(source: str | None, target: str, filesystem: str | None, flags: int, options: str = "") -> None:
    """Call mount(2), for the mount namespace of the calling thread. Raises `KernelError`."""
    names = [None if name is None else os.fsencode(name) for name in (source, target, filesystem)]
    try:
        syscall("mount", *names, flags, options.encode())
    except KernelError as error:
        number = error.errno or 0
        raise KernelError(f"mount {target}: {os.strerror(number)}", errno=number, path=target) from None


def disconnect(descriptor: int) -> None:
    """Reset a TCP connection at once: connect(2) with AF_UNSPEC. Threads that wait for it get an error.

    The kernel drops unsent data, and sends no end of the connection. Raises `KernelError`: EINVAL for other kinds of
    sockets, EBUSY while a thread waits on kernels that then refuse (6.4 to 6.6).
    """
    nowhere = bytes(16)  # a sockaddr, whose family is AF_UNSPEC
    if _libc().connect(ctypes.c_int(descriptor), nowhere, ctypes.c_uint(len(nowhere))) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"connect: {os.strerror(number)}", errno=number, path="connect")


def poll_readable(descriptors: Iterable[int], timeout: float | None) -> set[int]:
    """Return the descriptors that are readable or at their end within ``timeout`` seconds. See `poll`."""
    ready = poll(dict.fromkeys(descriptors, POLLIN), timeout)
    return {descriptor for descriptor, what in ready.items() if what & (POLLIN | _POLLHUP | _POLLERR)}


def poll(wanted: Mapping[int, int], timeout: float | None) -> dict[int, int]:
    """Call poll(2) for up to ``timeout`` seconds. ``wanted`` gives the events of each descriptor.

    See `Poll`. Raises `KernelError`.
    """
    return Poll(wanted).wait(timeout)


class Poll:
    """Call poll(2) on a fixed set of descriptors. ``wanted`` gives the events of each.

    This is the real system call: a library such as gevent may have replaced `select.poll`.
    """

    def __init__(self, wanted: Mapping[int, int]) -> None:
        self._count = len(wanted)
        packed = b"".join([_POLL_FD.pack(fd, mask, 0) for fd, mask in wanted.items()])
        self._entries = (ctypes.c_char * len(packed)).from_buffer_copy(packed)
        self._call = _libc().poll

    def wait(self, timeout: float | None) -> dict[int, int]:
        """Return the events by descriptor, waiting up to ``timeout`` seconds (None: without limit).

        An interrupted call returns nothing. Raises `KernelError`.
        """
        milliseconds = -1 if timeout is None else max(0, math.ceil(timeout * 1000))
        count = self._call(self._entries, ctypes.c_ulong(self._count), milliseconds)
        if count < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:  # a signal handler ran
                return {}
            raise KernelError(f"poll: {os.strerror(number)}", errno=number, path="poll")
        if not count:
            return {}
        return {fd: revents for fd, _, revents in _POLL_FD.iter_unpack(self._entries) if revents}
