"""What runs at each call of the kernel: tell the collector of it, or fail as the collector says.

A touch point is more than a call in the source: also in which process, and for what (`purpose`).

The collector is a socket in the abstract name space: it can be reached by any user, in any mount namespace, and
needs no descriptor that would have to be inherited.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.report import simplify
from tests.faults.sites import PREPARED

_NUMBERS = {
    "x86_64": {116: "setgroups", 117: "setresuid", 119: "setresgid", 125: "capget", 126: "capset", 157: "prctl",
               165: "mount", 250: "keyctl", 272: "unshare", 273: "set_robust_list", 274: "get_robust_list",
               317: "seccomp"},
    "aarch64": {40: "mount", 90: "capget", 91: "capset", 97: "unshare", 99: "set_robust_list",
                100: "get_robust_list", 147: "setresuid", 149: "setresgid", 159: "setgroups", 167: "prctl",
                219: "keyctl", 277: "seccomp"},
}[os.uname().machine]  # fmt: skip
_NUMBERS |= {435: "clone3", 442: "mount_setattr", 444: "landlock_create_ruleset", 445: "landlock_add_rule",
             446: "landlock_restrict_self"}  # fmt: skip


class Point(NamedTuple):
    """A touch point: the call in the source, the kind of process, and for what."""

    site: str
    role: str
    purpose: str


class Setup:
    """What to do in this process and its forks. Set by the worker before each case."""

    address: bytes = b""
    #: The pid of the process that has the manager.
    host: int = 0
    #: Tell of each call.
    recording: bool = False
    #: The touch point that may fail.
    point: Point | None = None


def touch(site: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a function that reaches the kernel, or let it fail."""
    armed = Setup.point
    if Setup.recording or (armed is not None and armed.site == site):
        here = Point(site, _role(), _purpose(site, function, arguments, keywords))
        if Setup.recording or here == armed:
            number = ask(f"{here.site}\t{here.role}\t{here.purpose}")
            if number:
                return _fail(site, number)
    return function(*arguments, **keywords)


def ask(text: str) -> int:
    """Tell the collector something, and return its answer: an errno, or 0."""
    if not Setup.address:
        return 0
    collector = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        collector.connect(Setup.address)
        collector.send(text.encode(errors="replace"))
        return int(collector.recv(16) or b"0")
    except OSError:
        return 0
    finally:
        collector.close()


def _fail(site: str, number: int) -> Any:
    """Fail as the function itself does when the kernel returns this errno."""
    call = site.rsplit(":", 1)[1].partition("#")[0]
    if _is_system_call(site):
        ctypes.set_errno(number)
        return -1
    if call == "os.access" or (call.startswith("os.path.") and call != "os.path.realpath"):
        return False
    if call.endswith("hread.start") or call == "_thread.start_new_thread":
        raise RuntimeError("can't start new thread")
    if call.startswith(("pwd.", "grp.")):
        if number == errno.ENOMEM:
            raise MemoryError
        raise KeyError("not found")
    error = OSError(number, os.strerror(number))
    if call.startswith("descriptors."):
        from rcon_plugins.errors import KernelError

        raise KernelError.from_oserror(error, path=call)
    raise error


def _is_system_call(site: str) -> bool:
    return site.startswith("kernel.syscalls:") or site.endswith(PREPARED)


def _role() -> str:
    me = os.getpid()
    if me == Setup.host:
        return "host"
    return "fork server" if os.getppid() == Setup.host else "executor"


def _purpose(
    site: str, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> str:
    if _is_system_call(site):
        return _system_call(site, arguments)
    call = site.rsplit(":", 1)[1]
    first = arguments[0] if arguments else getattr(function, "__self__", None)
    if isinstance(first, (str, os.PathLike)) or (isinstance(first, bytes) and call.startswith("os.")):
        path = os.fsdecode(first)
        if not path.startswith("/") and isinstance(at := keywords.get("dir_fd"), int):
            path = f"{_target(at)}/{path}"
        return _kind(site, path) + _writes(call, arguments)
    if isinstance(first, threading.Thread):
        return simplify(first.name)
    if isinstance(first, int) and not isinstance(first, bool) and call.split(".")[-1] in _OF_DESCRIPTORS:
        return _kind(site, _target(first))
    return ""


_OF_DESCRIPTORS = {"read", "write", "pread", "fstat", "flock", "lockf", "fcntl", "dup2", "dup", "scandir", "fstatvfs",
                   "lseek", "eventfd_read", "eventfd_write", "readv"}  # fmt: skip


def _writes(call: str, arguments: tuple[Any, ...]) -> str:
    flags = arguments[1] if call == "os.open" and len(arguments) > 1 else 0
    return " to write" if isinstance(flags, int) and flags & os.O_ACCMODE else ""


def _target(descriptor: int) -> str:
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            return "pipe" if stat.S_ISFIFO(mode) else "socket"
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


def _system_call(site: str, arguments: tuple[Any, ...]) -> str:
    plain = [one.value if isinstance(one, ctypes._SimpleCData) else one for one in arguments]
    first: Any = plain[0] if plain else ""
    if site.endswith("_syscall()"):
        name = _NUMBERS.get(first, str(first))
        return f"{name}({plain[1]})" if name in ("prctl", "keyctl") else name
    if isinstance(first, int) and "poll" not in site.lower() and "mmap" not in site and "connect" not in site:
        return str(first)
    if "mount" in site:
        return os.fsdecode(plain[1] or b"")
    return ""


def _kind(site: str, path: str) -> str:
    """Return for what a path is opened. What lies beside the cgroups is all the same to Landlock's rules."""
    if site.startswith(("kernel.landlock:_allow", "kernel.landlock:_add")):
        return "beside the cgroups"
    return simplify(path)
