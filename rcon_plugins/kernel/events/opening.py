"""Open the sources of a cgroup's events. Refuse, with the reason, events that its hierarchy cannot report."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from rcon_plugins.errors import ControllerUnavailable, KernelError
from rcon_plugins.kernel import files
from rcon_plugins.kernel.cgroup.resources import CPU_PERIOD_MICROSECONDS
from rcon_plugins.kernel.events import sources
from rcon_plugins.kernel.events.event import KINDS, Kind, Pressure
from rcon_plugins.kernel.events.sources import Gone, Levels, Source

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup

#: v1 writes "no limit" as the largest number of pages.
_UNLIMITED = 2**62


class _Opening:
    """The open sources of one watch."""

    def __init__(self, cgroup: Cgroup, optional: bool) -> None:
        self.cgroup = cgroup
        self.path = cgroup.path
        #: Leave out events that cannot be reported: the caller named no kinds.
        self.optional = optional
        self.sources: list[Source] = []
        self._branches = list(zip(cgroup.mounts, cgroup.directories, strict=True))
        self.unified = next((directory for mount, directory in self._branches if mount.version == 2), None)

    def v1(self, controller: str) -> str | None:
        """Return the directory in the v1 hierarchy of a controller, by the kernel's name."""
        return next(
            (d for mount, d in self._branches if mount.version == 1 and controller in mount.controllers), None
        )

    def v2(self, name: str) -> str | None:
        """Return the directory on v2 if it has the file ``name``."""
        directory = self.unified
        return directory if directory is not None and files.is_file(directory, name) else None

    def open(self, make: Callable[[], Source | None]) -> None:
        """Open a source and keep it; leave an optional one out if it is unavailable."""
        with contextlib.ExitStack() as lenient:
            if self.optional:
                lenient.enter_context(contextlib.suppress(ControllerUnavailable))
            made = make()
            if made is not None:
                self.sources.append(made)

    def lacks(self, kind: str, controller: str) -> ControllerUnavailable:
        """Return the error for a cgroup without that controller."""
        return ControllerUnavailable(
            f"{self.path} cannot report {kind}: it has no {controller} controller",
            errno=errno.ENOENT,
            path=self.path,
            hint="Hierarchy.refusals() names what is missing, and the remedy",
        )


def open_sources(
    cgroup: Cgroup,
    kinds: Collection[str] | None,
    thresholds: Collection[int],
    needs: Collection[int],
    pressure: Collection[Pressure],
) -> list[Source]:
    """Open the sources of ``kinds`` of events of an existing cgroup. None opens all kinds that it can report.

    Raises ControllerUnavailable, with the reason, for a named kind that the cgroup cannot report. Raises ValueError.
    Raises KernelError (ENOENT: there is no such cgroup).
    """
    unknown = set(kinds or ()) - set(KINDS)
    if unknown:
        raise ValueError(
            f"unknown kind of event: {', '.join(sorted(unknown))} (choose from {', '.join(KINDS)})"
        )
    if any(threshold <= 0 for threshold in (*thresholds, *needs)):
        raise ValueError(f"thresholds are bytes of memory, more than 0: {sorted((*thresholds, *needs))}")
    missing = next((directory for directory in cgroup.directories if not files.is_directory(directory)), None)
    if missing is not None and not cgroup.exists():
        raise KernelError(
            f"there is no {missing}", errno=errno.ENOENT, path=missing, hint="create() it first"
        )
    wanted: frozenset[str] = frozenset(KINDS if kinds is None else kinds)
    opening = _Opening(cgroup, optional=kinds is None)
    try:
        _memory(opening, wanted, tuple(thresholds), tuple(needs))
        if "pids_limit" in wanted:
            opening.open(lambda: _pids(opening))
        if "cpu_throttled" in wanted:
            opening.open(lambda: _cpu(opening))
        for one in pressure:
            opening.sources.append(_pressure(opening, one))
        # Always: this source also detects that the cgroup was removed.
        opening.sources.append(_populated(opening, "empty" in wanted))
    except Gone as gone:
        _close(opening.sources)
        raise KernelError(f"{cgroup.path} was removed", errno=errno.ENOENT, path=cgroup.path) from gone
    except BaseException:
        _close(opening.sources)
        raise
    return opening.sources


def _close(opened: list[Source]) -> None:
    for source in opened:
        source.close()


def _memory(
    opening: _Opening, wanted: frozenset[str], thresholds: tuple[int, ...], needs: tuple[int, ...]
) -> None:
    kinds = wanted & {"memory_high", "memory_limit", "oom_kill"}
    if not kinds and not thresholds and not needs:
        return
    there, one = opening.v2("memory.events"), opening.v1("memory")
    if there is not None:
        _memory_v2(opening, there, kinds)
        if thresholds or needs:
            opening.sources.append(sources.PolledUsage(opening.path, there, thresholds, needs))
    elif one is not None:
        _memory_v1(opening, one, kinds)
        for threshold in thresholds:
            opening.sources.append(sources.Threshold(opening.path, one, threshold))
        for threshold in needs:
            opening.sources.append(sources.Threshold(opening.path, one, threshold, of_need=True))
    elif thresholds or needs or not opening.optional:
        raise opening.lacks("memory_usage" if thresholds or needs else min(kinds), "memory")


def _memory_v2(opening: _Opening, there: str, kinds: frozenset[str]) -> None:
    path = opening.path
    if not kinds:
        return
    limits = {"memory_high": "memory.high", "memory_limit": "memory.max", "oom_kill": "memory.max"}
    numbers = sources.Numbers(there, "memory.current", *{limits[kind] for kind in kinds})
    opening.sources.append(numbers)

    def levels(name: str) -> Levels:
        return lambda: (numbers.read(name), numbers.read("memory.current"))

    own: dict[str, tuple[Kind, Levels]] = {}
    if "memory_high" in kinds:
        own["high"] = ("memory_high", levels("memory.high"))
    if "memory_limit" in kinds:
        own["max"] = ("memory_limit", levels("memory.max"))
    if own:
        # Kernel 5.2. The other file also counts the limits of the cgroups below.
        name = "memory.events.local" if files.is_file(there, "memory.events.local") else "memory.events"
        opening.open(lambda: sources.Counters(path, there, name, own))
    if "oom_kill" in kinds:
        # The kernel counts a kill in the cgroup of the victim, and in those above.
        killed: dict[str, tuple[Kind, Levels]] = {"oom_kill": ("oom_kill", levels("memory.max"))}
        opening.open(lambda: sources.Counters(path, there, "memory.events", killed))


def _memory_v1(opening: _Opening, one: str, kinds: frozenset[str]) -> None:
    path = opening.path

    def levels() -> tuple[float | None, float | None]:
        return _number(one, "memory.limit_in_bytes"), _number(one, "memory.usage_in_bytes")

    if "memory_high" in kinds and not opening.optional:
        raise ControllerUnavailable(
            f"{path} cannot report memory_high: cgroup v1 has none",
            path=one,
            hint="use a threshold of memory usage, or boot with cgroup v2",
        )
    deaths: sources.PolledCounters | None = None
    if "oom_kill" in kinds:
        deaths = sources.PolledCounters(path, "oom_kill", one, "memory.oom_control", "oom_kill", levels)
        opening.sources.append(deaths)
    if kinds & {"memory_limit", "oom_kill"}:
        opening.sources.append(sources.OutOfMemory(path, one, levels, deaths, "memory_limit" in kinds))


def _pids(opening: _Opening) -> Source | None:
    there, one = opening.v2("pids.events"), opening.v1("pids")
    directory = there or one
    if directory is None:
        raise opening.lacks("pids_limit", "pids")

    def levels() -> tuple[float | None, float | None]:
        return _number(directory, "pids.max"), _number(directory, "pids.current")

    if there is not None and files.is_file(there, "pids.events.local"):  # kernel 6.11
        keys: dict[str, tuple[Kind, Levels]] = {"max": ("pids_limit", levels)}
        return sources.Counters(opening.path, there, "pids.events.local", keys)
    # Earlier kernels and v1 count a refused fork in the cgroup of the forking process. v1 does not notify of it.
    return sources.PolledCounters(opening.path, "pids_limit", directory, "pids.events", "max", levels)


def _cpu(opening: _Opening) -> Source | None:
    there, one = opening.v2("cpu.max"), opening.v1("cpu")
    directory = there or one
    if directory is None:
        raise opening.lacks("cpu_throttled", "cpu")
    return sources.Throttling(opening.path, directory, lambda: _quota(directory))


def _pressure(opening: _Opening, pressure: Pressure) -> Source:
    if opening.unified is None:
        raise ControllerUnavailable(
            f"{opening.path} cannot report pressure: cgroup v1 does not measure it",
            path=opening.path,
            hint="mount cgroup2 too (it may be without controllers), or boot with cgroup v2",
        )
    return sources.Stall(opening.path, opening.unified, pressure)


def _populated(opening: _Opening, wanted: bool) -> Source:
    if opening.unified is not None and files.is_file(opening.unified, "cgroup.events"):
        return sources.Populated(opening.path, opening.unified, wanted)
    # Use a directory with all processes of the cgroup: not that of IO, see V1Branch.entry_directory.
    directory = next(
        (d for d in opening.cgroup.directories if "/blkio/" not in d), opening.cgroup.directories[0]
    )
    return sources.PolledPopulated(opening.path, directory, wanted)


def _number(directory: str, name: str) -> int | None:
    text = files.read_if_there(directory, name)
    if text is None or text == "max":
        return None
    number = int(text)
    return None if number >= _UNLIMITED else number


def _quota(directory: str) -> float | None:
    """Return the CPU quota in CPUs."""
    text = files.read_if_there(directory, "cpu.max")
    if text is not None:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    one = int(files.read_if_there(directory, "cpu.cfs_quota_us") or -1)
    period = files.read_if_there(directory, "cpu.cfs_period_us") or str(CPU_PERIOD_MICROSECONDS)
    return None if one < 0 else one / int(period)
