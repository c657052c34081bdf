"""Who made a tree: a process, told from a later one with the same number by when it started."""

from __future__ import annotations

import contextlib
import errno
import os

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

_DEAD = frozenset("ZXx")


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (``proc(5)``, stat, field 22); None: it is dead.

    A zombie counts as dead.
    """
    fields = stat_fields(pid)
    return None if not fields or fields[0] in _DEAD else int(fields[19])


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal, as job control does (``proc(5)``, stat, state T)."""
    return stat_fields(pid)[:1] == ["T"]


def membership(pid: int) -> str | None:
    """The text of ``/proc/PID/cgroup``; None where the process has ended."""
    return None if start_time(pid) is None else _of_process(pid, "cgroup")


def stat_fields(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` from the third on, the state; none where there is no such process."""
    text = _of_process(pid, "stat")
    # The name, field 2, may hold spaces and brackets.
    return [] if text is None else text[text.rindex(")") + 2 :].split()


def lives(pid: int, started: int) -> bool:
    """Whether the process ``pid`` that started then lives.

    One in a PID namespace below ours is found too; there it calls itself by another number. One that this
    user may not look at (``hidepid``, see ``proc(5)``) is taken for the one that is meant.
    """
    return seen_as(pid, started) is not None or _is_hidden(pid)


def seen_as(pid: int, started: int) -> int | None:
    """The number that the process ``pid`` that started then has for us, see :func:`lives`; None: it is dead."""
    if start_time(pid) == started:
        return pid
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        status = _of_process(int(entry), "status") or ""
        numbers = next((line for line in status.splitlines() if line.startswith("NSpid:")), "").split()
        if str(pid) in numbers[2:] and start_time(int(entry)) == started:
            return int(entry)
    return None


def _is_hidden(pid: int) -> bool:
    if _of_process(pid, "stat") is None:
        try:
            os.kill(pid, 0)
        except OSError as error:
            return error.errno == errno.EPERM
    return False


def _of_process(pid: int, name: str) -> str | None:
    try:
        return files.read_if_there(f"/proc/{pid}", name)
    except KernelError as error:
        # It ended between the open and the read; or it may not be looked at.
        if error.errno in (errno.ESRCH, errno.EACCES, errno.EPERM):
            return None
        raise


def inherited_descriptors() -> list[int]:
    """The open descriptors above 2 that this process was given: what it opens itself is closed by execve(2)."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this very listing is gone
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
    return found
