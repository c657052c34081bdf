"""Read statistics of a cgroup beyond its usage: pressure, throttling, kinds of memory, whether it is frozen.

The functions open file by file, and are for commands. On the hot path use
:class:`~rcon_plugins.kernel.cgroup.meter.Meter`.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import files

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup
    from rcon_plugins.kernel.cgroup.meter import Reading


class Stall(NamedTuple):
    """The time that processes waited: the ``share`` of the last ten seconds (0 to 1), and all ``seconds``.

    ``seconds`` counts since the cgroup was made.
    """

    share: float
    seconds: float


class Pressure(NamedTuple):
    """How long processes waited for a resource: at least one of them (``some``), or all at once (``full``).

    Linux 5.13 and later measure ``full`` of the CPU. Source: Documentation/accounting/psi.rst.
    """

    some: Stall | None = None
    full: Stall | None = None


class Statistics(NamedTuple):
    """Counters of a cgroup and all below it since it was made. None means not available here.

    ``cpu_periods`` counts the periods of 100 ms with runnable threads. ``cpu_throttled`` counts those in which the
    cgroup's own quota throttled it, for ``cpu_throttled_seconds`` in all. ``memory_high_hits`` counts how often
    ``memory_high`` throttled allocation. ``memory_anon`` is memory without a file, ``memory_file`` is page cache;
    these and ``swap_current`` are in bytes.
    """

    cpu_user_seconds: float | None = None
    cpu_system_seconds: float | None = None
    cpu_periods: int | None = None
    cpu_throttled: int | None = None
    cpu_throttled_seconds: float | None = None
    memory_high_hits: int | None = None
    memory_anon: int | None = None
    memory_file: int | None = None
    swap_current: int | None = None
    pids_peak: int | None = None


def read_statistics(cgroup: Cgroup) -> Statistics:
    """Return the statistics of an existing cgroup. Raises KernelError."""
    found: dict[str, float | int] = {}
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        # v1 takes precedence: on a hybrid, the v2 files have no controller behind them.
        found = (_of_v1(directory) if mount.version == 1 else _of_v2(directory)) | found
    return Statistics(**found)  # type: ignore[arg-type]


def read_usage(cgroup: Cgroup) -> Reading:
    """Return the usage of an existing cgroup, including OOM kills and refused forks in the cgroups below.

    v1 counts both only in the cgroup of the process; so does v2 before Linux 6.11 for refused forks. In these cases
    this adds the counts of all existing cgroups below. The counts of removed cgroups are lost. Raises KernelError.
    """
    reading = cgroup.read()
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        below = files.subtree(directory)[:-1]
        if mount.version == 1 and reading.oom_kills is not None and "memory" in mount.controllers:
            kills = sum(_keyed(leaf, "memory.oom_control").get("oom_kill", 0) for leaf in below)
            reading = reading._replace(oom_kills=reading.oom_kills + kills)
        counted = (
            reading.pids_limit_hits is not None and files.read_if_there(directory, "pids.events") is not None
        )
        if counted and files.read_if_there(directory, "pids.events.local") is None:
            hits = sum(_keyed(leaf, "pids.events").get("max", 0) for leaf in below)
            reading = reading._replace(pids_limit_hits=(reading.pids_limit_hits or 0) + hits)
    return reading


def read_pressure(cgroup: Cgroup) -> dict[str, Pressure]:
    """Return the pressure by ``cpu``, ``memory`` and ``io``; empty on v1 or with PSI off. Raises KernelError."""
    found = {}
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        if mount.version == 2:
            for name in ("cpu", "memory", "io"):
                text = _read_pressure(directory, f"{name}.pressure")
                if text:
                    found[name] = parse_pressure(text)
    return found


def parse_pressure(text: str) -> Pressure:
    """Parse a pressure file."""
    stalls = {}
    for line in text.splitlines():
        kind, *fields = line.split()
        named = dict(field.split("=", 1) for field in fields)
        stalls[kind] = Stall(float(named["avg10"]) / 100, int(named["total"]) / 1e6)
    return Pressure(stalls.get("some"), stalls.get("full"))


def is_frozen(cgroup: Cgroup) -> bool:
    """Return whether all processes of an existing cgroup are frozen. Raises KernelError."""
    for mount, directory in zip(cgroup.mounts, cgroup.directories, strict=True):
        if mount.version == 2 and "frozen 1" in _lines(directory, "cgroup.events"):
            return True
        if mount.version == 1 and files.read_if_there(directory, "freezer.state") == "FROZEN":
            return True
    return False


def _read_pressure(directory: str, name: str) -> str | None:
    try:
        return files.read_if_there(directory, name)
    except KernelError as error:
        # EOPNOTSUPP: the kernel was booted with psi=0, or cgroup.pressure is off.
        if error.errno != errno.EOPNOTSUPP:
            raise
        return None


def _of_v2(directory: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    cpu = _keyed(directory, "cpu.stat")
    _take(found, cpu, "user_usec", "cpu_user_seconds", 1e6)
    _take(found, cpu, "system_usec", "cpu_system_seconds", 1e6)
    _take(found, cpu, "nr_periods", "cpu_periods")
    _take(found, cpu, "nr_throttled", "cpu_throttled")
    _take(found, cpu, "throttled_usec", "cpu_throttled_seconds", 1e6)
    _take(found, _keyed(directory, "memory.events"), "high", "memory_high_hits")
    memory = _keyed(directory, "memory.stat")
    _take(found, memory, "anon", "memory_anon")
    _take(found, memory, "file", "memory_file")
    _number(found, directory, "memory.swap.current", "swap_current")
    _number(found, directory, "pids.peak", "pids_peak")  # kernel 6.1
    return found


def _of_v1(directory: str) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    cpu = _keyed(directory, "cpu.stat")
    _take(found, cpu, "nr_periods", "cpu_periods")
    _take(found, cpu, "nr_throttled", "cpu_throttled")
    _take(found, cpu, "throttled_time", "cpu_throttled_seconds", 1e9)
    times = _keyed(directory, "cpuacct.stat")
    ticks = os.sysconf("SC_CLK_TCK")
    _take(found, times, "user", "cpu_user_seconds", ticks)
    _take(found, times, "system", "cpu_system_seconds", ticks)
    memory = _keyed(directory, "memory.stat")
    _take(found, memory, "total_rss", "memory_anon")
    _take(found, memory, "total_cache", "memory_file")
    _take(found, memory, "total_swap", "swap_current")
    _number(found, directory, "pids.peak", "pids_peak")  # kernel 6.11
    return found


def _keyed(directory: str, name: str) -> dict[str, int]:
    pairs = (line.split() for line in _lines(directory, name))
    return {key: int(value) for key, value in pairs}


def _lines(directory: str, name: str) -> list[str]:
    return (files.read_if_there(directory, name) or "").splitlines()


def _take(
    found: dict[str, float | int], values: dict[str, int], key: str, name: str, divisor: float = 0
) -> None:
    if key in values:
        found[name] = values[key] / divisor if divisor else values[key]


def _number(found: dict[str, float | int], directory: str, file: str, name: str) -> None:
    if (text := files.read_if_there(directory, file)) is not None:
        found[name] = int(text)
