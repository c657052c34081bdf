"""Measure what the tenants use, from outside the server: read the kernel's files while the load runs."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rcon_plugins.kernel.cgroup import Cgroup, Hierarchy, Meter
from rcon_plugins.tree.base import find_base
from rcon_plugins.tree.group_names import cgroup_name

_PAGE = os.sysconf("SC_PAGE_SIZE")
_EVERY = 0.025


@dataclass
class Used:
    """The usage of one tenant, or of a whole server, while the load ran. None is "not seen"."""

    memory: int | None = None
    processes: int | None = None
    cpu: list[tuple[float, float]] = field(default_factory=list)

    def add(self, memory: int | None, processes: int | None, cpu_seconds: float | None) -> None:
        """Add one reading."""
        if memory is not None:
            self.memory = max(self.memory or 0, memory)
        if processes is not None:
            self.processes = max(self.processes or 0, processes)
        if cpu_seconds is not None:
            self.cpu.append((time.monotonic(), cpu_seconds))

    def cpu_share(self, start: float, end: float) -> float | None:
        """Return the CPU seconds used per second between two moments of the monotonic clock."""
        window = [(moment, used) for moment, used in self.cpu if start <= moment <= end]
        if len(window) < 2 or window[-1][0] == window[0][0]:
            return None
        return (window[-1][1] - window[0][1]) / (window[-1][0] - window[0][0])


def tenant_cgroups(server: int, base: str | None) -> dict[str, Cgroup]:
    """Return the cgroup of each tenant in the server whose master has the pid ``server``."""
    hierarchy = Hierarchy.discover()
    base = find_base(hierarchy, base)
    hierarchy = hierarchy.narrowed(base)
    instance = next(name for name in hierarchy.cgroup(base).children() if name.startswith(f"rcon-{server}-"))
    return {
        tenant: hierarchy.cgroup(f"{base.rstrip('/')}/{instance}/work/{cgroup_name(policy, key)}")
        for tenant, policy, key in (
            ("steady", "tenant", "steady.example"),
            ("cpu-hog", "cpu-hog", None),
            ("memory-hog", "memory-hog", None),
            ("fork-bomb", "fork-bomb", None),
        )
    }


class Observer(Protocol):
    """Reads the usage once, when `look` is called."""

    def look(self) -> None: ...


class Watch:
    """Calls an observer forty times a second, in a thread of its own, while the ``with`` block runs."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            self._observer.look()


class Confined:
    """Reads the cgroup of each tenant, which holds its requests in all workers."""

    def __init__(self, cgroups: dict[str, Cgroup]) -> None:
        self._cgroups = cgroups
        self._meters: dict[str, Meter] = {}
        self.used = {tenant: Used() for tenant in cgroups}

    def look(self) -> None:
        for tenant, cgroup in self._cgroups.items():
            used = self.used[tenant]
            try:
                meter = self._meters.get(tenant)
                if meter is None:
                    meter = self._meters[tenant] = cgroup.meter()
                reading = meter.read()
            except OSError:  # the first request makes the cgroup
                used.add(None, None, 0.0)
                continue
            used.add(reading.memory_peak, reading.pids_current, reading.cpu_seconds)

    def close(self) -> None:
        """Close the kernel's files."""
        for meter in self._meters.values():
            meter.close()


class Unconfined:
    """Reads all processes whose command line contains a mark, and subtracts what they used at first.

    From outside, nobody can see which tenant a thread or a page of a gunicorn worker belongs to, so this measures the
    server as a whole. Memory is that of the first processes: the processes that they fork share it.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._first: set[str] = set()
        self._memory, self._processes = self._take(first=True)
        self.used = Used()

    def look(self) -> None:
        memory, processes = self._take()
        self.used.add(max(0, memory - self._memory), max(0, processes - self._processes), None)

    def _take(self, *, first: bool = False) -> tuple[int, int]:
        pages = processes = 0
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):  # the process has ended
                if self._mark in Path(entry.path, "cmdline").read_bytes():
                    processes += 1
                    if first:
                        self._first.add(entry.name)
                    if entry.name in self._first:
                        statm = Path(entry.path, "statm").read_text().split()
                        pages += int(statm[1]) - int(statm[2])
        return pages * _PAGE, processes
