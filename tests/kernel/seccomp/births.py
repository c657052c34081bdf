"""Ways to start a process in another cgroup v2 without a write: clone3(2) with CLONE_INTO_CGROUP, in each ABI.

Run as a program, it prints the result of each way as JSON.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import struct
import sys
from pathlib import Path

INTO_CGROUP = 0x200000000
SIGCHLD = 17
NUMBER = 435
X32 = 0x40000000
_MAP_32BIT = 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def root() -> str:
    """Return the mount point of cgroup v2."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return path
    raise FileNotFoundError("no cgroup v2 is mounted")


def ways() -> tuple[str, ...]:
    """Return the ABIs of this machine: the arguments of `born_in`."""
    return ("native", "x32", "i386") if platform.machine() == "x86_64" else ("native",)


def born_in(cgroup: str, way: str = "native") -> str:
    """Start a child in a cgroup, by the system calls of one ABI. Return the child's v2 path, or the errno's name."""
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    reading, writing = os.pipe()
    try:
        arguments = struct.pack("11Q", INTO_CGROUP, 0, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, directory)
        pid = _clone3(arguments, way)
        if pid == 0:
            os.write(writing, Path("/proc/self/cgroup").read_bytes())
            os._exit(0)
        os.close(writing)
        writing = -1
        if pid < 0:
            return errno.errorcode[-pid]
        told = os.read(reading, 65536).decode()
        os.waitpid(pid, 0)
        return next(line[3:] for line in told.splitlines() if line.startswith("0::"))
    finally:
        for descriptor in (directory, reading, writing):
            if descriptor >= 0:
                os.close(descriptor)


def _clone3(arguments: bytes, way: str) -> int:
    """Return the pid, 0 in the child, or the negative errno."""
    if way == "i386":
        return _by_int_0x80(arguments)
    result = int(
        _libc.syscall(ctypes.c_long(NUMBER | (X32 if way == "x32" else 0)), arguments, len(arguments))
    )
    return -ctypes.get_errno() if result < 0 else result


def requested(file: int, request: int) -> dict[str, str]:
    """Make a request of a file by ioctl(2), in each ABI. Return the errno's name, or ``0``."""
    native, x32 = (16, 514 | X32) if platform.machine() == "x86_64" else (29, 0)
    found = {"native": _name(_libc.syscall(ctypes.c_long(native), file, ctypes.c_long(request), None))}
    if platform.machine() == "x86_64":
        found["x32"] = _name(_libc.syscall(ctypes.c_long(x32), file, ctypes.c_long(request), None))
        result = _through_int_0x80(54, file, request)
        found["i386"] = errno.errorcode[-result] if result < 0 else "0"
    return found


def _name(result: int) -> str:
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "0"


def _by_int_0x80(arguments: bytes) -> int:
    """Call clone3 through the table of 32-bit programs, from this 64-bit one: its arguments lie below 4 GiB."""
    return _through_int_0x80(NUMBER, arguments, len(arguments))


def _through_int_0x80(number: int, first: bytes | int, second: int) -> int:
    """Call a system call of 32-bit programs. Bytes are passed by their address."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_32BIT
    access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    low = _libc.mmap(None, ctypes.c_size_t(4096), access, flags, -1, ctypes.c_long(0))
    # push rbx; mov eax, edi; mov ebx, esi; mov ecx, edx; int 0x80; pop rbx; ret
    code = bytes.fromhex("53 89f8 89f3 89d1 cd80 5b c3")
    ctypes.memmove(low, code, len(code))
    if isinstance(first, bytes):
        ctypes.memmove(low + 64, first, len(first))
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint)(low)
    return int(call(number, low + 64 if isinstance(first, bytes) else first, second))


def all_ways(cgroup: str) -> dict[str, str]:
    """Return the result of each way."""
    return {way: born_in(cgroup, way) for way in ways()}


if __name__ == "__main__":
    print(json.dumps(all_ways(sys.argv[1] if len(sys.argv) > 1 else root())))
