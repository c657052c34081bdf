"""A sample of one group, and its form as plain data for another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from rcon_plugins.errors import ConfinementError
from rcon_plugins.kernel.cgroup import Reading, Resources
from rcon_plugins.kernel.cgroup.statistics import Pressure, Stall, Statistics
from rcon_plugins.tally.reader import Counts


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The usage of one group at one moment. Compute rates from two samples.

    ``id`` identifies the group across samples. ``when`` is in seconds of a monotonic clock. ``node`` is the Celery
    worker that reported the sample; None for a group of this machine. ``tally`` is what a server counted, or None.
    """

    id: str
    name: str
    owner: str
    when: float
    reading: Reading
    limits: Resources = field(default_factory=Resources)
    statistics: Statistics = field(default_factory=Statistics)
    pressure: Mapping[str, Pressure] = field(default_factory=dict)
    tally: Counts | None = None
    node: str | None = None

    @property
    def hits(self) -> int | None:
        """How often limits were reached: see `limit_hits`."""
        return limit_hits(self.reading, self.tally)


@dataclass(frozen=True, kw_only=True)
class ServerSample:
    """How many requests or tasks one server had refused at one moment because no route names them; None is unknown.

    ``instance`` is the name of its instance, ``owner`` its command, and ``node`` as in `Sample`.
    """

    instance: str
    owner: str
    unroutable: int | None
    node: str | None = None


class Samples(NamedTuple):
    """The samples of all groups, and of all servers, at one moment. A server may have no group."""

    groups: list[Sample]
    servers: list[ServerSample]


def limit_hits(reading: Reading, tally: Counts | None) -> int | None:
    """Return how often limits of a group were reached; None if that is unknown.

    For a server: the requests or tasks that a limit ended or refused. For any other group: what the kernel counts, hits
    of the memory and pids limits and OOM kills.
    """
    if tally is not None:
        return tally.limit_hits
    counts = (reading.memory_limit_hits, reading.pids_limit_hits, reading.oom_kills)
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


class SampleData(msgspec.Struct, frozen=True, kw_only=True):
    """A sample as plain data. Sizes are in bytes, times in seconds. None means "not measured"; for a limit, "no limit".

    ``when`` is the time of a monotonic clock on the group's machine. ``pressure`` is, by resource, the share of the
    last ten seconds in which at least one thread waited.
    """

    when: float
    cpu_seconds: float | None = None
    cpu_periods: int | None = None
    cpu_throttled: int | None = None
    memory: int | None = None
    memory_peak: int | None = None
    swap_peak: int | None = None
    memory_limit: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pids: int | None = None
    pids_limit: int | None = None
    pressure: dict[str, float] = {}
    memory_limit_hits: int | None = None
    pids_limit_hits: int | None = None
    oom_kills: int | None = None
    tally: Counts | None = None


def to_data(sample: Sample) -> dict[str, Any]:
    """Return the fields of `SampleData`, as built-in types."""
    reading, limits, statistics = sample.reading, sample.limits, sample.statistics
    data = SampleData(
        when=sample.when,
        cpu_seconds=reading.cpu_seconds,
        cpu_periods=statistics.cpu_periods,
        cpu_throttled=statistics.cpu_throttled,
        memory=reading.memory_current,
        memory_peak=reading.memory_peak,
        swap_peak=reading.swap_peak,
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
        tally=sample.tally,
    )
    found: dict[str, Any] = msgspec.to_builtins(data)
    return found


def from_data(data: object, *, id: str, name: str, owner: str, node: str) -> Sample:  # noqa: A002 - the field's name
    """Return the sample from the ``data`` that `to_data` made. Raises `ConfinementError` for any other data."""
    try:
        received = msgspec.convert(data, SampleData)
    except msgspec.ValidationError as error:
        raise ConfinementError(f"{name}: {node} sent no valid sample: {error}") from None
    return Sample(
        id=id,
        name=name,
        owner=owner,
        node=node,
        when=received.when,
        reading=Reading(
            cpu_seconds=received.cpu_seconds,
            memory_current=received.memory,
            memory_peak=received.memory_peak,
            swap_peak=received.swap_peak,
            io_read_bytes=received.io_read_bytes,
            io_write_bytes=received.io_write_bytes,
            pids_current=received.pids,
            oom_kills=received.oom_kills,
            memory_limit_hits=received.memory_limit_hits,
            pids_limit_hits=received.pids_limit_hits,
        ),
        limits=Resources(memory_max=received.memory_limit, pids_max=received.pids_limit),
        statistics=Statistics(cpu_periods=received.cpu_periods, cpu_throttled=received.cpu_throttled),
        pressure={name: Pressure(some=Stall(share, 0.0)) for name, share in received.pressure.items()},
        tally=received.tally,
    )
