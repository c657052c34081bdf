"""Processes and cgroups of the program under test, seen from outside."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

#: After so many seconds without an answer, a test counts as hung.
PATIENCE = 60.0  # an emulated machine is slow


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until ``true()`` returns True. Raises AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come true within {seconds:g} s")
        time.sleep(0.02)


def has_reaped(pid: int) -> bool:
    """Whether a process has reaped a child that ran: the page faults of its children are counted then."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[8]) > 0


def children(pid: int) -> list[int]:
    """Return the living children of a process, forked by any of its threads."""
    found: list[int] = []
    for task in entries(Path(f"/proc/{pid}/task")):
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return sorted(child for child in found if alive(child))


def family(pid: int) -> list[int]:
    """Return a process and all its descendants, each before its children."""
    found = [pid] if alive(pid) else []
    for child in children(pid):
        found += family(child)
    return found


def alive(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used, those of threads that have ended included.

    The clock counts nanoseconds (clock_getcpuclockid(3); its number is that of the kernel's ``CPUCLOCK_SCHED``).
    ``/proc/<pid>/stat`` counts ticks of 10 ms: over a few processes they add up to the tolerance of a quota.
    """
    return time.clock_gettime((~pid << 3) | 2)


def cpu_seconds_of_family(pid: int) -> float:
    """Return the CPU seconds of a process and all its descendants, those that have ended included.

    What a process has waited for is counted in ticks of 10 ms.
    """
    seconds = 0.0
    for one in family(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            seconds += cpu_seconds(one) + sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")
    return seconds


def instance_directories(*pids: int) -> list[Path]:
    """Return the directories of the instances that these processes made, in each hierarchy."""
    heads = tuple(f"rcon-{pid}-" for pid in pids)
    return [
        Path(directory, name)
        for directory, names, _ in os.walk(CGROUPS)
        for name in names
        if name.startswith(heads)
    ]


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory that may be removed meanwhile, as cgroups are. `Path.glob` would raise then."""
    with contextlib.suppress(OSError):
        return list(directory.iterdir())
    return []


def executor_pids(instances: Iterable[Path], policy: str = "") -> list[int]:
    """Return the pids in the cgroups of executors, of those policies whose name begins with ``policy``."""
    found: set[int] = set()
    for instance in instances:
        for group in entries(instance / "work"):
            for leaf in entries(group) if group.name.startswith(policy) else ():
                with contextlib.suppress(OSError):
                    found.update(map(int, (leaf / "cgroup.procs").read_text().split()))
    return sorted(found)
