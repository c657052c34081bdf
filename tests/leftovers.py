"""What a test run must not leave behind: processes and cgroups. `tests/conftest.py` checks it at the end of a run.

`supervise()` splits the process in two before the first test. The child goes on as pytest. The parent does what a
good init does for its container: orphans come to it (PR_SET_CHILD_SUBREAPER, prctl(2)), it reaps them at once, and
when pytest has ended it kills what is still there. So no process gets away from the check by forking twice or by
opening a session, and a test that is killed leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PR_SET_CHILD_SUBREAPER = 36


def supervise() -> int:
    """Returns in the child, which is pytest from here on, with the pid of its supervisor."""
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor = os.getpid()
    become_subreaper()
    pid = os.fork()
    if pid == 0:
        return supervisor
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to pytest as well
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: os.kill(pid, number))
    status = reap_until(pid)
    killed = kill_descendants()
    if killed:
        os.write(2, f"killed what the tests left running: {', '.join(killed)}\n".encode())
    code = os.waitstatus_to_exitcode(status)
    os._exit(128 - code if code < 0 else code or bool(killed))


def become_subreaper() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(number)}")


def reap_until(pid: int) -> int:
    """Reap every child that ends, until this one does; return its wait status."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return status


def kill_descendants() -> list[str]:
    """Kill and reap everything below this process until nothing is left; return what had been alive."""
    names: list[str] = []
    while alive := descendants(os.getpid()):
        names += [name for name in alive.values() if name not in names]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return names


def descendants(ancestor: int) -> dict[int, str]:
    """The living processes below a process, and what they are: pid and command line. Zombies do not count."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # proc(5): the name is in brackets and may hold anything; state and ppid follow the last bracket.
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents[int(entry.name)] = int(parent)
    found: dict[int, str] = {}
    for pid in parents:
        line, seen = pid, set[int]()
        while line in parents and line not in seen:
            seen.add(line)
            line = parents[line]
            if line == ancestor:
                found[pid] = f"{pid} {command_line(pid)}"
                break
    return found


def command_line(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return text[:100] or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def cgroups() -> set[Path]:
    """Every cgroup of this machine, in any hierarchy, whose name begins with rcon."""
    return {
        Path(directory, name)
        for directory, names, _ in os.walk(CGROUPS)
        for name in names
        if name.startswith("rcon")
    }


def cgroups_left(before: set[Path], ours: set[int]) -> list[str]:
    """Cgroups that are there and were not before, except those of somebody else's server running beside the tests.

    Such a cgroup has a process in it that is alive and none of ours, or a name with the pid of such a process
    (`rcon-<pid>-<starttime>`, `rcon-tests-<pid>`), or such a cgroup in it. Tiers that run side by side need this, too.
    """
    new = cgroups() - before
    return sorted(str(path) for path in new if path.parent not in new and not of_somebody_else(path, ours))


def of_somebody_else(path: Path, ours: set[int]) -> bool:
    inside = [path, *(Path(directory, name) for directory, names, _ in os.walk(path) for name in names)]
    for cgroup in inside:
        match = re.fullmatch(r"rcon(?:-[a-z]+)?-(\d+)(?:-\d+)?", cgroup.name)
        if match and int(match[1]) not in ours and Path("/proc", match[1]).exists():
            return True
        with contextlib.suppress(OSError):  # a threaded one lists no processes; others have gone meanwhile
            if {int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()} - ours:
                return True
    return False
