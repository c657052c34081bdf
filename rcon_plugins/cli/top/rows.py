"""Rates of groups, from one sample to the next. Where the samples come from is somebody else's business."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rcon_plugins.groups.sample import Sample
from rcon_plugins.kernel.cgroup import Reading


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group between two samples. None is "not told", or "not yet": a rate takes two samples.

    ``cpu`` in CPUs, ``throttled`` the share of periods at whose end it had to wait for its CPU quota; ``memory`` in
    bytes and as a share of its limit; ``read`` and ``written`` in bytes a second; ``pressure`` the share of the last
    ten seconds that some of it waited for cpu, memory or io. Of limit hits, the sum and how many are new.
    """

    name: str
    owner: str
    cpu: float | None = None
    throttled: float | None = None
    memory: int | None = None
    memory_limit: int | None = None
    read: float | None = None
    written: float | None = None
    pids: int | None = None
    pids_limit: int | None = None
    pressure: Mapping[str, float | None]
    memory_hits: int | None = None
    pids_hits: int | None = None
    oom_kills: int | None = None
    new_hits: int = 0
    node: str | None = None

    @property
    def memory_share(self) -> float | None:
        """Of its limit; None where it has none."""
        if self.memory is None or not self.memory_limit:
            return None
        return self.memory / self.memory_limit

    @property
    def hits(self) -> int:
        """Of all limits that are not of the CPU."""
        return (self.memory_hits or 0) + (self.pids_hits or 0) + (self.oom_kills or 0)


class Rates:
    """Remembers the samples of last time."""

    def __init__(self) -> None:
        self._last: dict[str, Sample] = {}

    def rows(self, samples: Iterable[Sample]) -> list[Row]:
        """A row for each sample."""
        now = {sample.id: sample for sample in samples}
        found = [_row(sample, self._last.get(name)) for name, sample in now.items()]
        self._last = now
        return found


def _row(now: Sample, before: Sample | None) -> Row:
    reading, limits, statistics = now.reading, now.limits, now.statistics
    throttled = None
    if before is not None:
        periods = _more(statistics.cpu_periods, before.statistics.cpu_periods)
        waited = _more(statistics.cpu_throttled, before.statistics.cpu_throttled)
        throttled = waited / periods if waited is not None and periods else None
    return Row(
        name=now.name,
        node=now.node,
        owner=now.owner,
        cpu=_rate(now, before, lambda one: one.cpu_seconds),
        throttled=throttled,
        memory=reading.memory_current,
        memory_limit=limits.memory_max if isinstance(limits.memory_max, int) else None,
        read=_rate(now, before, lambda one: one.io_read_bytes),
        written=_rate(now, before, lambda one: one.io_write_bytes),
        pids=reading.pids_current,
        pids_limit=limits.pids_max if isinstance(limits.pids_max, int) else None,
        pressure={
            name: told.some.share if told.some is not None else None for name, told in now.pressure.items()
        },
        memory_hits=reading.memory_limit_hits,
        pids_hits=reading.pids_limit_hits,
        oom_kills=reading.oom_kills,
        new_hits=0 if before is None else max(0, _hits(reading) - _hits(before.reading)),
    )


def _hits(reading: Reading) -> int:
    return (reading.memory_limit_hits or 0) + (reading.pids_limit_hits or 0) + (reading.oom_kills or 0)


def _more(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else max(0, now - before)


def _rate(now: Sample, before: Sample | None, of: Callable[[Reading], float | None]) -> float | None:
    if before is None or now.when <= before.when:
        return None
    more = _more(of(now.reading), of(before.reading))
    return None if more is None else more / (now.when - before.when)
