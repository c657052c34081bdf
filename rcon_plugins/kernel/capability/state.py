"""Read the ids and the capability sets of a thread (proc_pid_status(5), capabilities(7), credentials(7))."""

from __future__ import annotations

import errno
import os
import posix
import re
import threading
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel.capability.sets import Capabilities
from rcon_plugins.kernel.syscalls import PR_GET_SECUREBITS, syscall

SECBIT_NOROOT = 1 << 0
SECBIT_NOROOT_LOCKED = 1 << 1
SECBIT_NO_SETUID_FIXUP = 1 << 2
SECBIT_NO_SETUID_FIXUP_LOCKED = 1 << 3
SECBIT_KEEP_CAPS = 1 << 4
SECBIT_KEEP_CAPS_LOCKED = 1 << 5
SECBIT_NO_CAP_AMBIENT_RAISE = 1 << 6  # Linux 4.3
SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED = 1 << 7


_FIELDS = re.compile(rb"^(Cap\w+|NoNewPrivs|Uid|Gid|Groups):(.*)$", re.MULTILINE)


class Ids(NamedTuple):
    """The four user ids of a thread, or its four group ids."""

    real: int
    effective: int
    saved: int
    fs: int

    @classmethod
    def all(cls, number: int) -> Ids:
        """Return four times the same id."""
        return cls(number, number, number, number)


class State(NamedTuple):
    """The identity and the capability sets of one thread.

    ``securebits`` is None unless the thread is the calling one: the kernel shows a thread its own securebits alone.
    ``groups`` are the supplementary groups, in ascending order. Ids are those of the caller's user namespace.
    """

    permitted: Capabilities
    effective: Capabilities
    inheritable: Capabilities
    ambient: Capabilities
    bounding: Capabilities
    securebits: int | None
    no_new_privs: bool
    uids: Ids
    gids: Ids
    groups: tuple[int, ...]


def read_state(tid: int | None = None) -> State:
    """Return the state of the calling thread, or of the thread ``tid``. A pid stands for the main thread.

    Needs no privilege. Where ``/proc`` is mounted with ``hidepid``, other users' processes are invisible. Raises
    `KernelError`: ESRCH if there is no such thread, or it has ended.
    """
    own = tid is None or tid == threading.get_native_id()
    path = "/proc/thread-self/status" if own else f"/proc/{tid}/status"
    return parse_status(_read(path, tid), read_securebits() if own else None)


def read_securebits() -> int:
    """Return the securebits of the calling thread, as ``SECBIT_*`` flags: prctl(PR_GET_SECUREBITS)."""
    return syscall("prctl", PR_GET_SECUREBITS)


def parse_status(text: bytes, securebits: int | None = None) -> State:
    """Parse the text of a ``/proc/PID/status``, which lacks the securebits. Raises `KeyError`, `ValueError`."""
    # The name of the program comes first; the kernel escapes newlines in it. Other lines are left alone: each new
    # process reads this twice.
    fields = dict(_FIELDS.findall(text))
    return State(
        permitted=_capabilities(fields[b"CapPrm"]),
        effective=_capabilities(fields[b"CapEff"]),
        inheritable=_capabilities(fields[b"CapInh"]),
        ambient=_capabilities(fields[b"CapAmb"]),
        bounding=_capabilities(fields[b"CapBnd"]),
        securebits=securebits,
        no_new_privs=fields[b"NoNewPrivs"].strip() == b"1",
        uids=_ids(fields[b"Uid"]),
        gids=_ids(fields[b"Gid"]),
        groups=tuple(sorted([int(group) for group in fields[b"Groups"].split()])),
    )


def _read(path: str, tid: int | None) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            while part := os.read(descriptor, 65536):
                parts.append(part)
        finally:
            posix.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH) and tid is not None:
            raise KernelError(
                f"no process or thread has the id {tid}", errno=errno.ESRCH, path=path
            ) from None
        raise KernelError.from_oserror(error, path=path, hint="mount proc at /proc") from None
    return b"".join(parts)


def _capabilities(text: bytes) -> Capabilities:
    return Capabilities(int(text, 16))


def _ids(text: bytes) -> Ids:
    return Ids(*map(int, text.split()))
