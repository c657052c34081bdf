"""Read events from their sources: descriptors that the kernel makes ready, and files that are polled.

A source belongs to one watch. Only the watcher's thread calls `take`, which raises `Gone` when the cgroup was removed.
"""

from __future__ import annotations

import errno
import os
import posix
import time
from collections.abc import Callable, Iterator, Mapping

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.attempts import Attempts
from rcon_plugins.kernel.cgroup.meter import value_of
from rcon_plugins.kernel.cgroup.need import need
from rcon_plugins.kernel.cgroup.swap import CHARGED_AHEAD
from rcon_plugins.kernel.cgroup.v1 import count_notices, open_notice
from rcon_plugins.kernel.events.event import POLLED_SECONDS, Event, Kind, Pressure
from rcon_plugins.kernel.syscalls import POLLIN, POLLPRI

#: Return the current limit and usage of a cgroup.
Levels = Callable[[], tuple[float | None, float | None]]

#: The time for which the thread polls after a notification, seconds. v2 notifies of changes to a file at most every
#: 10 ms (cgroup_file_notify).
_AFTER_V2 = 0.02


class Hurry:
    """The pauses between polls after a notification: 1 ms, 2, 4 ..., for so many ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._pause = seconds

    def begin(self) -> None:
        """Start again: the kernel has notified."""
        self._pause = 0.001

    def next(self) -> float | None:
        """Return the seconds until the next poll; None at the end."""
        pause, self._pause = self._pause, self._pause * 2
        return pause if pause < self._seconds else None


class Gone(Exception):
    """Raised when the cgroup of a source was removed."""


class Source:
    """One source of events. The watcher polls ``descriptor`` for ``mask``, and reads at ``due`` in any case."""

    descriptor = -1
    mask = POLLPRI
    due: float | None = None
    #: Whether the descriptor was ready; set before each `take`.
    ready = False
    #: Whether the removal of a cgroup below loses its counts since the last `take`.
    sums_below = False

    def __init__(self) -> None:
        #: The failed reads since the last one that succeeded. Meanwhile the descriptor is not polled.
        self.attempts = Attempts()

    def try_again(self) -> None:
        """Note that `take` failed, and have it called again after a pause."""
        self.due = self.attempts.due

    def take(self) -> Iterator[Event]:
        """Yield the events since the last call. Raises `Gone`."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the descriptors. Calling it again does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            posix.close(descriptor)  # gevent's os.close() waits for an event loop unless the file is regular

    def pread(self) -> bytes:
        """Return the content of the file, which also clears its notification. Raises `Gone`, OSError."""
        try:
            return os.pread(self.descriptor, 4096, 0)
        except OSError as error:
            if not files.gone(error):
                raise
            raise Gone from error


class Numbers(Source):
    """Open files of one number each, so that an event need not wait for opening them. Yields no events."""

    def __init__(self, directory: str, *names: str) -> None:
        super().__init__()
        self._open: dict[str, int] = {}
        try:
            for name in names:
                self._open[name] = files.open_file(directory, name)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> int | None:
        """Return the number. Return None for "max", and if the cgroup is gone. Raises OSError."""
        try:
            text = os.pread(self._open[name], 64, 0)
        except KeyError:  # closed
            return None
        except OSError as error:
            if not files.gone(error):
                raise
            return None
        return None if text == b"max\n" else int(text)

    def take(self) -> Iterator[Event]:
        """Yield nothing."""
        return iter(())

    def close(self) -> None:
        """Close the files. Calling it again does nothing."""
        while self._open:
            posix.close(self._open.popitem()[1])


class Counters(Source):
    """A flat keyed file of counters that notifies of changes (v2): ``memory.events``, ``pids.events``."""

    def __init__(
        self, cgroup: str, directory: str, name: str, keys: Mapping[str, tuple[Kind, Levels]]
    ) -> None:
        super().__init__()
        self._cgroup = cgroup
        self._keys = keys
        self.descriptor = files.open_file(directory, name)
        try:
            data = self.pread()
        except BaseException:
            self.close()
            raise
        self._last = {key: value_of(data, key.encode()) or 0 for key in keys}
        self._hurry = Hurry(_AFTER_V2)

    def take(self) -> Iterator[Event]:
        data = self.pread()
        now = time.monotonic()
        if self.ready:
            self._hurry.begin()
        pause = self._hurry.next()
        self.due = None if pause is None else now + pause
        for key, (kind, levels) in self._keys.items():
            total = value_of(data, key.encode()) or 0
            count = total - self._last[key]
            limit, usage = levels() if count > 0 else (None, None)  # may fail: then nothing is counted yet
            self._last[key] = total
            if count > 0:
                yield Event(kind, self._cgroup, now, count, total, limit, usage)


class PolledCounters(Source):
    """The sum of a counter over a cgroup and all below it. Polled."""

    sums_below = True

    def __init__(self, cgroup: str, kind: Kind, directory: str, name: str, key: str, levels: Levels) -> None:
        super().__init__()
        self._cgroup = cgroup
        self._kind = kind
        self._directory = directory
        self._name = name
        self._key = key.encode()
        self._levels = levels
        self._last = self._read()
        self._hurry = Hurry(POLLED_SECONDS)
        self.due = time.monotonic() + POLLED_SECONDS

    def _read(self) -> dict[str, int]:
        found = {}
        for directory in files.subtree(self._directory):
            text = files.read_if_there(directory, self._name)
            if text is not None:
                found[directory] = value_of(text.encode(), self._key) or 0
        return found

    def hurry(self) -> None:
        """Poll at once and soon again, because the counter is about to change."""
        self._hurry.begin()
        self.due = 0.0

    def take(self) -> Iterator[Event]:
        now = time.monotonic()
        found = self._read()
        if not found:
            raise Gone
        # A new cgroup counts from zero. Counts of a cgroup that was removed between two polls are lost; who removes one
        # calls `Watch.look` before.
        count = sum(max(0, total - self._last.get(directory, 0)) for directory, total in found.items())
        limit, usage = self._levels() if count > 0 else (None, None)
        self._last = found
        if count > 0:
            yield Event(self._kind, self._cgroup, now, count, sum(found.values()), limit, usage)
        self.due = now + (self._hurry.next() or POLLED_SECONDS)


class Throttling(Source):
    """How often, and for how long, the CPU quota throttled threads (``cpu.stat``). Polled."""

    def __init__(self, cgroup: str, directory: str, quota: Callable[[], float | None]) -> None:
        super().__init__()
        self._cgroup = cgroup
        self._directory = directory
        self._quota = quota
        self._times, self._seconds = self._read()
        self.due = time.monotonic() + POLLED_SECONDS

    def _read(self) -> tuple[int, float]:
        text = files.read_if_there(self._directory, "cpu.stat")
        if text is None:
            raise Gone
        data = text.encode()
        microseconds = value_of(data, b"throttled_usec")
        nanoseconds = value_of(data, b"throttled_time")  # v1
        seconds = (nanoseconds or 0) / 1e9 if microseconds is None else microseconds / 1e6
        return value_of(data, b"nr_throttled") or 0, seconds

    def take(self) -> Iterator[Event]:
        now = time.monotonic()
        times, seconds = self._read()
        count, held = times - self._times, seconds - self._seconds
        self._times, self._seconds = times, seconds
        self.due = now + POLLED_SECONDS
        if count > 0:
            yield Event("cpu_throttled", self._cgroup, now, count, times, self._quota(), held)


class PolledUsage(Source):
    """Thresholds of memory usage on v2. Polled, because the kernel has none. ``needs`` are thresholds of `need`."""

    def __init__(
        self, cgroup: str, directory: str, thresholds: tuple[int, ...], needs: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self._cgroup = cgroup
        self._directory = directory
        self._above = dict.fromkeys(
            sorted({(one, False) for one in thresholds} | {(one, True) for one in needs}), False
        )
        self.due = 0.0

    def take(self) -> Iterator[Event]:
        now = time.monotonic()
        text = files.read_if_there(self._directory, "memory.current")
        if text is None:
            raise Gone
        usage = int(text)
        self.due = now + POLLED_SECONDS
        for one, was_above in self._above.items():
            threshold, of_need = one
            above = usage >= threshold and (not of_need or need(self._directory, usage) >= threshold)
            self._above[one] = above
            if above and not was_above:
                yield Event("memory_usage", self._cgroup, now, 1, None, threshold, usage)


class Populated(Source):
    """Whether any process is in the cgroup or below (``cgroup.events`` on v2 and the v2 side of a hybrid)."""

    def __init__(self, cgroup: str, directory: str, wanted: bool) -> None:
        super().__init__()
        self._cgroup = cgroup
        self._directory = directory
        self._wanted = wanted
        # The kernel notifies late of a change right after a notification, or never if the cgroup is removed before.
        self._hurry = Hurry(_AFTER_V2)
        self._hurry.begin()
        self.due = 0.0
        self.descriptor = files.open_file(directory, "cgroup.events")
        try:
            self._last = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> tuple[int, int]:
        data = self.pread()
        return value_of(data, b"populated") or 0, value_of(data, b"frozen") or 0

    def take(self) -> Iterator[Event]:
        now = time.monotonic()
        try:
            state = self._read()
        except Gone:
            # Only an empty cgroup can be removed.
            if self._last[0] and self._wanted:
                yield Event("empty", self._cgroup, now)
            raise
        # A notification without a change: a process entered and left in between.
        left = self._last[0] or (self.ready and state == self._last)
        self._last = state
        if self.ready:
            self._hurry.begin()
        # The kernel does not notify of the removal either.
        pause = self._hurry.next() or (None if state[0] else POLLED_SECONDS)
        self.due = None if pause is None else now + pause
        if left and not state[0] and self._wanted:
            yield Event("empty", self._cgroup, now)


class Stall(Source):
    """A pressure trigger: ``cpu.pressure``, ``memory.pressure``, ``io.pressure`` (v2, Linux 5.2)."""

    def __init__(self, cgroup: str, directory: str, pressure: Pressure) -> None:
        super().__init__()
        pressure.check()
        self._cgroup = cgroup
        self._directory = directory
        self._pressure = pressure
        name = f"{pressure.resource}.pressure"
        path = f"{directory}/{name}"
        try:
            self.descriptor = files.open_file(directory, name, os.O_RDWR | os.O_NONBLOCK)
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP) and files.is_directory(directory):
                raise ControllerUnavailable(
                    f"this kernel has no {name} for {cgroup}",
                    errno=error.errno,
                    path=path,
                    hint="boot Linux 5.2 or newer with CONFIG_PSI and psi=1",
                ) from None
            if error.errno == errno.EPERM:
                raise ControllerUnavailable(
                    f"this process may not watch {name} of {cgroup}",
                    errno=errno.EPERM,
                    path=path,
                    hint="before Linux 6.4 pressure triggers need CAP_SYS_RESOURCE",
                ) from None
            raise
        try:
            os.write(self.descriptor, f"{pressure.trigger}\0".encode())
        except OSError as error:
            self.close()
            raise files.failure(error, path, pressure.trigger) from None

    def take(self) -> Iterator[Event]:
        if not files.is_directory(self._directory):
            raise Gone
        if not self.ready:
            return
        now = time.monotonic()
        pressure = self._pressure
        yield Event(
            "pressure",
            self._cgroup,
            now,
            limit=pressure.stall,
            usage=self._average(),
            resource=pressure.resource,
            share=pressure.share,
        )

    def _average(self) -> float | None:
        for line in self.pread().decode().splitlines():
            share, average, *_ = line.split()
            if share == self._pressure.share:
                return float(average.partition("=")[2]) / 100
        return None


# -- cgroup v1 only: Documentation/admin-guide/cgroup-v1/memory.rst, chapters 9 and 10


class _EventFd(Source):
    """A notification of v1's memory controller, through an eventfd (cgroup-v1/memory.rst)."""

    mask = POLLIN

    def __init__(self, cgroup: str, directory: str, name: str, argument: str = "") -> None:
        super().__init__()
        self._cgroup = cgroup
        self._directory = directory
        self.descriptor = open_notice(directory, name, argument)

    def count(self) -> int:
        """Return how often the kernel notified. The removal of the cgroup notifies, too: raises `Gone`."""
        count = count_notices(self.descriptor)
        if not files.is_directory(self._directory):
            raise Gone
        return count


class Threshold(_EventFd):
    """A threshold of memory usage on v1. The kernel notifies of crossings up and down.

    ``of_need`` makes it a threshold of `need`.
    """

    def __init__(self, cgroup: str, directory: str, threshold: int, of_need: bool = False) -> None:
        super().__init__(cgroup, directory, "memory.usage_in_bytes", str(threshold))
        self._threshold = threshold
        self._of_need = of_need
        self._above = False
        self._reached = False
        self._first = True
        self.due = 0.0  # usage may be above already

    def try_again(self) -> None:
        super().try_again()
        self._first = True  # the notices are taken already

    def take(self) -> Iterator[Event]:
        crossings = self.count()
        now = time.monotonic()
        usage = int(files.read_if_there(self._directory, "memory.usage_in_bytes") or 0)
        first, self._first, self.due = self._first, False, None
        upwards = crossings // 2 if self._above else (crossings + 1) // 2
        self._above = self._is_above(usage, crossings)
        if first:
            upwards = max(upwards, int(self._above))
        if self._of_need:
            upwards = self._in_need(now, usage)
        if upwards:
            yield Event("memory_usage", self._cgroup, now, upwards, None, self._threshold, usage)

    def _is_above(self, usage: int, crossings: int) -> bool:
        """Return whether usage is above the threshold; if it is a little below, by what the kernel notified.

        The kernel counts what it has charged ahead on each CPU. A CPU that turns to another cgroup gives that back. The
        kernel notifies of that late, or never if usage soon rises again. Then it does not notify of the rise either.
        """
        if usage >= self._threshold:
            return True
        return usage >= self._threshold - CHARGED_AHEAD and self._above != bool(crossings % 2)

    def _in_need(self, now: float, usage: int) -> int:
        if self._above:
            # The kernel does not notify of changes of the page cache.
            self.due = now + POLLED_SECONDS
        reached = self._above and need(self._directory, usage) >= self._threshold
        news, self._reached = reached and not self._reached, reached
        return int(news)


class OutOfMemory(_EventFd):
    """Out-of-memory notifications of v1: usage reached the limit, reclaim did not suffice, and a kill follows."""

    def __init__(
        self, cgroup: str, directory: str, levels: Levels, deaths: PolledCounters | None, wanted: bool
    ) -> None:
        super().__init__(cgroup, directory, "memory.oom_control")
        self._levels = levels
        self._wanted = wanted
        self._deaths = deaths
        self._hits = self._read_hits()
        #: The notices that no event has reported.
        self._notices = 0

    def _read_hits(self) -> int:
        names = ("memory.failcnt", "memory.memsw.failcnt")
        return sum(int(files.read_if_there(self._directory, name) or 0) for name in names)

    def _peak(self) -> int:
        return int(files.read_if_there(self._directory, "memory.max_usage_in_bytes") or 0)

    def take(self) -> Iterator[Event]:
        self._notices += self.count()
        now = time.monotonic()
        if self._deaths is not None:
            self._deaths.hurry()
        hits, (limit, usage) = self._read_hits(), self._levels()
        # A cgroup above at its limit notifies here, too. By now the processes may be dead. With swap_max 0 the kernel
        # counts no hits (6.18), and the peak decides.
        reached = limit is not None and (hits > self._hits or self._peak() >= 0.95 * limit)
        count, self._notices, self._hits, self.due = self._notices, 0, hits, None
        if self._wanted and count and reached:
            yield Event("memory_limit", self._cgroup, now, count, None, limit, usage)


class PolledPopulated(Source):
    """Whether any process is in the cgroup or below, if only v1 is mounted. Polled."""

    def __init__(self, cgroup: str, directory: str, wanted: bool) -> None:
        super().__init__()
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
