"""Processes as others see them: who they are and what they run (``proc(5)``)."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files, proc

_PF_KTHREAD = 0x00200000


class Process(NamedTuple):
    """``command`` is the command line with spaces between the words, or, of a kernel thread, ``[name]``.

    ``uid`` is the effective one; ``state`` a letter such as R, S, D, T or Z; ``memory`` what it has in RAM, in bytes
    (shared pages count for each process), None where it has none; ``threads`` how many it has.
    """

    pid: int
    uid: int
    state: str
    threads: int
    memory: int | None
    command: str


def look_at(pid: int) -> Process | None:
    """A process; None where there is none, or it cannot be seen (``hidepid``). Raises KernelError."""
    status = _read(pid, "status")
    if status is None:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    resident = fields.get("VmRSS", "").split()
    return Process(
        pid=pid,
        uid=int(fields["Uid"].split()[1]),
        state=fields["State"].split()[0],
        threads=int(fields["Threads"]),
        memory=int(resident[0]) * 1024 if resident else None,
        command=command_line(pid) or f"[{fields['Name'].strip()}]",
    )


def command_line(pid: int) -> str | None:
    """The words of a command with spaces between; None where that cannot be told. Raises KernelError.

    Its owner may have written anything there: show it with care.
    """
    text = _read(pid, "cmdline")
    return text.rstrip("\0").replace("\0", " ") if text else None


def process_of(thread: int) -> int | None:
    """The pid of the process that a thread belongs to; None where it has ended. Raises KernelError."""
    for line in (_read(thread, "status") or "").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    return None


def is_kernel_thread(pid: int) -> bool:
    """Whether it is a thread of the kernel (stat, flags, PF_KTHREAD in include/linux/sched.h)."""
    fields = proc.stat_fields(pid)
    return bool(fields) and bool(int(fields[6]) & _PF_KTHREAD)


def parents() -> dict[int, int]:
    """By process the one that started it, or that took it over; of all that can be seen."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := proc.stat_fields(int(entry))):
            found[int(entry)] = int(fields[1])
    return found


def _read(pid: int, name: str) -> str | None:
    try:
        return files.read_if_there(f"/proc/{pid}", name)
    except KernelError as error:
        # It ended between the open and the read; or another user's, in a process namespace that hides them.
        if error.errno not in (errno.ESRCH, errno.EACCES, errno.EPERM):
            raise
        return None
