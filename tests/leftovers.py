"""Find processes and cgroups that a test run left behind. `tests/conftest.py` checks for them at the end of a run.

`supervise()` forks before the first test. The child goes on as pytest. The parent acts like the init process of a
container: it adopts orphans (PR_SET_CHILD_SUBREAPER, prctl(2)), reaps them immediately, and kills the remaining ones
when pytest has ended. So no process escapes the check by forking twice or by opening a session, and a killed test
leaves no processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PR_SET_CHILD_SUBREAPER = 36


def supervise() -> int:
    """Fork. Return only in the child, which goes on as pytest, with the pid of its supervisor."""
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor = os.getpid()
    become_subreaper()
    pid = os.fork()
    if pid == 0:
        return supervisor
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal also sends it to pytest
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
    """Reap every child that ends, until `pid` ends. Return its wait status."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            return status


def kill_descendants() -> list[str]:
    """Kill and reap all descendants of this process until none is left. Return the names of those that were alive."""
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
    """Return the living descendants of a process, with pid and command line. Leave out zombies."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # proc(5): the name is in brackets and may contain anything; state and ppid follow the last bracket.
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


def zombies() -> dict[int, int]:
    """Return the parents of all zombies, by pid."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state == "Z":
                    found[int(entry.name)] = int(parent)
    return found


def command_line(pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return text[:100] or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


def cgroups() -> set[Path]:
    """Return every cgroup of this machine, in any hierarchy, whose name begins with rcon."""
    # find(1), because os.walk recurses, and anybody may have made two thousand levels. Its status is 1 if a directory
    # was removed meanwhile.
    command = ["find", str(CGROUPS), "-type", "d", "-name", "rcon*"]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return {Path(line) for line in found.stdout.splitlines()}


def cgroups_left(before: set[Path], ours: set[int]) -> list[str]:
    """Return the cgroups that are new since `before`, except those of other servers that run beside the tests.

    A cgroup belongs to another server if it contains a living process that is not in `ours`, if its name has the pid of
    such a process (`rcon-<pid>-<starttime>`, `rcon-tests-<pid>`), or if it contains such a cgroup. Tiers that run side
    by side need this, too.
    """
    new = cgroups() - before
    return sorted(str(path) for path in new if path.parent not in new and not of_somebody_else(path, ours))


def of_somebody_else(path: Path, ours: set[int]) -> bool:
    inside = [path, *(Path(directory, name) for directory, names, _ in os.walk(path) for name in names)]
    for cgroup in inside:
        match = re.fullmatch(r"rcon(?:-[a-z]+)?-(\d+)(?:-\d+)?", cgroup.name)
        if match and int(match[1]) not in ours and Path("/proc", match[1]).exists():
            return True
        with contextlib.suppress(OSError):  # the cgroup is threaded and lists no processes, or is gone
            if {int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()} - ours:
                return True
    return False
