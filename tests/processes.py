"""Processes and cgroups of what is under test, as they are seen from outside."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

#: No answer within so many seconds is a hang.
PATIENCE = 60.0  # an emulated machine is slow


def until(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait until it is true. Raises AssertionError when it does not come true."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"it did not come true within {seconds:g} s")
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The living children of a process, whichever of its threads made them."""
    found: list[int] = []
    for task in _directories(Path(f"/proc/{pid}/task")):
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return sorted(child for child in found if alive(child))


def family(pid: int) -> list[int]:
    """A process and all below it, each before its children."""
    found = [pid] if alive(pid) else []
    for child in children(pid):
        found += family(child)
    return found


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def instance_directories(pid: int) -> list[Path]:
    """Where the cgroups of the instance that this process made are, in each hierarchy."""
    return [
        Path(directory, name)
        for directory, names, _ in os.walk(CGROUPS)
        for name in names
        if name.startswith(f"rcon-{pid}-")
    ]


def _directories(path: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from path.iterdir()
