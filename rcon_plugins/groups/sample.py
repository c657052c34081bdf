"""A sample of a group as plain data, for those who watch it from another machine."""

from __future__ import annotations

from typing import Any

import msgspec

from rcon_plugins.errors import ConfinementError
from rcon_plugins.groups.find import Sample
from rcon_plugins.kernel.cgroup import Reading, Resources
from rcon_plugins.kernel.cgroup.statistics import Pressure, Stall, Statistics


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a group. Sizes in bytes, times in seconds; None is "not told here", of a limit also "none".

    ``when`` is of the clock of the machine that the group is on, which only goes forward while that is up.
    ``pressure`` is the share of the last ten seconds for which some of it waited, by resource.
    """

    when: float
    cpu_seconds: float | None = None
    cpu_periods: int | None = None
    cpu_throttled: int | None = None
    memory: int | None = None
    memory_peak: int | None = None
    memory_limit: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pids: int | None = None
    pids_limit: int | None = None
    pressure: dict[str, float] = {}
    memory_limit_hits: int | None = None
    pids_limit_hits: int | None = None
    oom_kills: int | None = None


def as_data(sample: Sample) -> dict[str, Any]:
    """The fields of `Told`, as anything carries them."""
    reading, limits, statistics = sample.reading, sample.limits, sample.statistics
    told = Told(
        when=sample.when,
        cpu_seconds=reading.cpu_seconds,
        cpu_periods=statistics.cpu_periods,
        cpu_throttled=statistics.cpu_throttled,
        memory=reading.memory_current,
        memory_peak=reading.memory_peak,
        memory_limit=limits.memory_max if isinstance(limits.memory_max, int) else None,
        io_read_bytes=reading.io_read_bytes,
        io_write_bytes=reading.io_write_bytes,
        pids=reading.pids_current,
        pids_limit=limits.pids_max if isinstance(limits.pids_max, int) else None,
        pressure={
            name: stalled.some.share for name, stalled in sample.pressure.items() if stalled.some is not None
        },
        memory_limit_hits=reading.memory_limit_hits,
        pids_limit_hits=reading.pids_limit_hits,
        oom_kills=reading.oom_kills,
    )
    found: dict[str, Any] = msgspec.to_builtins(told)
    return found


def of_data(data: object, *, id: str, name: str, owner: str, node: str) -> Sample:  # noqa: A002 - a sample's own word
    """The sample that `as_data` told of, as far as that goes. Raises `ConfinementError` where ``data`` is none."""
    try:
        told = msgspec.convert(data, Told)
    except msgspec.ValidationError as error:
        raise ConfinementError(f"{name}: what was told of it is no sample: {error}") from None
    return Sample(
        id=id,
        name=name,
        owner=owner,
        node=node,
        when=told.when,
        reading=Reading(
            cpu_seconds=told.cpu_seconds,
            memory_current=told.memory,
            memory_peak=told.memory_peak,
            io_read_bytes=told.io_read_bytes,
            io_write_bytes=told.io_write_bytes,
            pids_current=told.pids,
            oom_kills=told.oom_kills,
            memory_limit_hits=told.memory_limit_hits,
            pids_limit_hits=told.pids_limit_hits,
        ),
        limits=Resources(memory_max=told.memory_limit, pids_max=told.pids_limit),
        statistics=Statistics(cpu_periods=told.cpu_periods, cpu_throttled=told.cpu_throttled),
        pressure={name: Pressure(some=Stall(share, 0.0)) for name, share in told.pressure.items()},
    )
