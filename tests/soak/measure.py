"""What a server has at a quiet moment: memory, descriptors, threads, processes, cgroups; and how much may be added."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from tests.processes import children, family, instance_directories


class Figures(NamedTuple):
    """Of one moment. Memory is that of the server's own processes (PSS, MiB), as are descriptors and threads."""

    memory: float
    descriptors: int
    threads: int
    processes: int
    cgroups: int


#: How much each figure may grow from the first measurement to a later one: a share, and so much more.
BOUNDS = Figures(memory=40.0, descriptors=200, threads=16, processes=16, cgroups=120)
SHARE = 0.25


def measure(server: int) -> Figures:
    """Return the figures of a server, by its pid."""
    own = own_processes(server)
    return Figures(
        memory=sum(map(_memory, own)),
        descriptors=sum(_entries(f"/proc/{pid}/fd") for pid in own),
        threads=sum(_entries(f"/proc/{pid}/task") for pid in own),
        processes=len(family(server)),
        cgroups=sum(1 for directory in instance_directories(server) for _ in os.walk(directory)),
    )


def own_processes(server: int) -> list[int]:
    """Return the master, the workers or pool processes, and their fork servers."""
    workers = children(server)
    return [server, *workers, *(pid for worker in workers for pid in children(worker))]


def grown(first: Figures, now: Figures) -> list[str]:
    """Return the figures that have grown beyond their bound."""
    found = []
    for name, before, after, more in zip(Figures._fields, first, now, BOUNDS, strict=True):
        bound = before * (1 + SHARE) + more
        if after > bound:
            found.append(f"{name} grew from {before:.0f} to {after:.0f}; the bound is {bound:.0f}")
    return found


def _memory(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _entries(path: str) -> int:
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path(path).iterdir())
    return 0
