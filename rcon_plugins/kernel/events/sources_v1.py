"""Sources of events that only cgroup v1 has: notices of its memory controller, and a look at who is there.

Source: Documentation/admin-guide/cgroup-v1/memory.rst, chapter 9 and 10.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.notices import open_notice, rings_of
from rcon_plugins.kernel.events.event import POLLED_SECONDS, Event
from rcon_plugins.kernel.events.sources import Gone, Levels, PolledCounters, Source, need
from rcon_plugins.kernel.syscalls import POLLIN


class _EventFd(Source):
    """A notice of v1's memory controller, through an eventfd (cgroup-v1/memory.rst)."""

    mask = POLLIN

    def __init__(self, cgroup: str, directory: str, name: str, argument: str = "") -> None:
        self._cgroup = cgroup
        self._directory = directory
        self.descriptor = open_notice(directory, name, argument)

    def rings(self) -> int:
        """How often it was rung. The removal of the cgroup rings too: raises `Gone`."""
        count = rings_of(self.descriptor)
        if not files.is_directory(self._directory):
            raise Gone
        return count


class Threshold(_EventFd):
    """A threshold of memory usage on v1: rung when it is crossed, up or down. ``of_need``: of what `need` says."""

    def __init__(self, cgroup: str, directory: str, threshold: int, of_need: bool = False) -> None:
        super().__init__(cgroup, directory, "memory.usage_in_bytes", str(threshold))
        self._threshold = threshold
        self._of_need = of_need
        self._above = False
        self._reached = False
        self._first = True
        self.due = 0.0  # it may be there already

    def take(self) -> Iterator[Event]:
        crossings = self.rings()
        now = time.monotonic()
        usage = int(files.read_if_there(self._directory, "memory.usage_in_bytes") or 0)
        first, self._first, self.due = self._first, False, None
        upwards = crossings // 2 if self._above else (crossings + 1) // 2
        self._above = usage >= self._threshold
        if first:
            upwards = max(upwards, int(self._above))
        if self._of_need:
            upwards = self._in_need(now, usage)
        if upwards:
            yield Event("memory_usage", self._cgroup, now, upwards, None, self._threshold, usage)

    def _in_need(self, now: float, usage: int) -> int:
        if self._above:
            # Of what the page cache is of it, the kernel does not tell.
            self.due = now + POLLED_SECONDS
        reached = self._above and need(self._directory, usage) >= self._threshold
        news, self._reached = reached and not self._reached, reached
        return int(news)


class WantOfMemory(_EventFd):
    """v1: usage ran into the limit and reclaim does not suffice; what comes next is a kill."""

    def __init__(
        self, cgroup: str, directory: str, levels: Levels, deaths: PolledCounters | None, wanted: bool
    ) -> None:
        super().__init__(cgroup, directory, "memory.oom_control")
        self._levels = levels
        self._wanted = wanted
        self._deaths = deaths
        self._hits = self._read_hits()

    def _read_hits(self) -> int:
        names = ("memory.failcnt", "memory.memsw.failcnt")
        return sum(int(files.read_if_there(self._directory, name) or 0) for name in names)

    def _peak(self) -> int:
        return int(files.read_if_there(self._directory, "memory.max_usage_in_bytes") or 0)

    def take(self) -> Iterator[Event]:
        count = self.rings()
        now = time.monotonic()
        if self._deaths is not None:
            self._deaths.hurry()
        hits = self._read_hits()
        rose, self._hits = hits > self._hits, hits
        limit, usage = self._levels()
        # A cgroup above that is in want rings here too. By now what ran may be dead, and where swap_max is 0 nothing is
        # counted (6.18): the peak tells then.
        if self._wanted and count and limit is not None and (rose or self._peak() >= 0.95 * limit):
            yield Event("memory_limit", self._cgroup, now, count, None, limit, usage)


class PolledPopulated(Source):
    """Whether anybody is here or below, where only v1 is mounted; looked at from time to time."""

    def __init__(self, cgroup: str, directory: str, wanted: bool) -> None:
        self._cgroup = cgroup
        self._directory = directory
        self._wanted = wanted
        self._populated = False
        self.due = 0.0

    def take(self) -> Iterator[Event]:
        now = time.monotonic()
        self.due = now + POLLED_SECONDS
        here = files.subtree(self._directory)
        if not here:
            raise Gone
        populated = self._wanted and any(files.read_if_there(one, "cgroup.procs") for one in here)
        left, self._populated = self._populated and not populated, populated
        if left:
            yield Event("empty", self._cgroup, now)
