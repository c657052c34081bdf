"""The rows of ``rcon top``: samples of groups, of this machine or of Celery workers, and rates between two samples."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import NamedTuple

from rcon_plugins.cli.columns import printable
from rcon_plugins.cli.exit import BadUsage, Refused, say
from rcon_plugins.errors import KernelError, SettingsError
from rcon_plugins.groups.find import find_groups
from rcon_plugins.groups.sample import Sample, Samples, ServerSample
from rcon_plugins.kernel import threads
from rcon_plugins.kernel.cgroup import Reading
from rcon_plugins.kernel.files import gone
from rcon_plugins.tally.reader import Counts

#: Returns a sample of each group and server, as of now.
Source = Callable[[], Samples]


def local() -> Samples:
    """Return a sample of each group and server of this machine that this user can read.

    Raises KernelError without cgroups.
    """
    found = find_groups()
    groups = []
    for group in found.groups:
        try:
            groups.append(group.sample())
        except KernelError as error:
            if not gone(error) and error.errno not in (errno.EACCES, errno.EPERM):
                raise
            continue  # gone meanwhile, or not readable, which rcon ls reports
    servers = [
        ServerSample(instance=one.instance, owner=one.owner.command or "", unroutable=one.unroutable)
        for one in found.servers()
    ]
    return Samples(groups, servers)


def celery_workers(application: str) -> Source:
    """Return the source of all workers of ``celery -A application``.

    Raises BadUsage where there is no such application, and Refused where Celery is not installed.
    """
    try:
        # Imported by name: the core does not depend on an adapter.
        remote = import_module("rcon_celery.remote_control")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("celery", "kombu", "rcon_celery"):
            raise
        raise Refused(
            f"--celery: {error.name} is not installed here (pip install 'rcon-plugins[celery]')"
        ) from None
    try:
        app = remote.load(application)
    except SettingsError as error:
        raise BadUsage(f"--celery: {error}") from None
    source: Source = remote.Workers(app, lambda message: say("rcon", f"note: {printable(message)}")).samples
    return source


class Sampler:
    """Calls a source in a thread of its own, so that a slow one does not delay the keyboard.

    The methods are for the thread that made it.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._requests: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Samples | BaseException] = queue.SimpleQueue()
        self._since: float | None = None
        # A daemon thread: a source that does not return does not delay the exit.
        threads.start(threading.Thread(target=self._serve, name="rcon-samples", daemon=True))

    @property
    def waiting(self) -> float | None:
        """For how many seconds the source has been running; None while it is not."""
        return None if self._since is None else time.monotonic() - self._since

    def start(self) -> None:
        """Call the source, unless a call is under way."""
        if self._since is None:
            self._since = time.monotonic()
            self._requests.put(None)

    def result(self) -> Samples | None:
        """Return the samples, once; None while there are none yet. Raises what the source raised."""
        try:
            result = self._results.get_nowait()
        except queue.Empty:
            return None
        self._since = None
        if isinstance(result, BaseException):
            raise result
        return result

    def _serve(self) -> None:
        while True:
            self._requests.get()
            try:
                self._results.put(self._source())
            except BaseException as error:  # noqa: BLE001 - result() raises it
                self._results.put(error)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group between two samples. None is unknown; a rate is unknown until there are two samples.

    ``cpu`` is in CPUs; ``throttled`` the share of CPU periods in which the group waited for its quota; ``memory`` in
    bytes; ``read`` and ``written`` in bytes a second; ``pressure`` by resource (cpu, memory, io), the share of the last
    ten seconds in which some process waited for it. ``hits`` is as in `Sample`, ``new_hits`` those since the last
    sample. ``tally`` is what a server counted; None for a group of no server, and where it is unknown. ``nested``: the
    group lies in another one of the samples, whose usage includes that of this one.
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
    hits: int | None = None
    memory_hits: int | None = None
    pids_hits: int | None = None
    oom_kills: int | None = None
    new_hits: int = 0
    tally: Counts | None = None
    node: str | None = None
    nested: bool = False

    @property
    def memory_share(self) -> float | None:
        """The memory as a share of its limit; None without a limit."""
        if self.memory is None or not self.memory_limit:
            return None
        return self.memory / self.memory_limit

    @property
    def stalled(self) -> tuple[float, str] | None:
        """The highest pressure, and its resource; None where the kernel reports none."""
        known = [(share, name) for name, share in self.pressure.items() if share is not None]
        return max(known, key=lambda one: one[0]) if known else None


@dataclass(frozen=True, kw_only=True)
class ServerRow:
    """One server between two samples. ``new_unroutable`` are those since the last sample."""

    instance: str
    owner: str
    unroutable: int | None
    new_unroutable: int = 0
    node: str | None = None


class View(NamedTuple):
    """What one refresh shows."""

    rows: list[Row]
    servers: list[ServerRow]


class Rates:
    """Makes rows from samples, and remembers the samples for the next rates."""

    def __init__(self) -> None:
        self._last: dict[str, Sample] = {}
        self._last_servers: dict[tuple[str | None, str], ServerSample] = {}

    def view(self, samples: Samples) -> View:
        """Return a row for each group and for each server."""
        now = {(server.node, server.instance): server for server in samples.servers}
        servers = [_server_row(server, self._last_servers.get(name)) for name, server in now.items()]
        self._last_servers = now
        return View(self.rows(samples.groups), servers)

    def rows(self, samples: Iterable[Sample]) -> list[Row]:
        """Return a row for each sample."""
        now = {sample.id: sample for sample in samples}
        found = [
            replace(_row(sample, self._last.get(name)), nested=_is_nested(name, now))
            for name, sample in now.items()
        ]
        self._last = now
        return found


def _is_nested(path: str, known: Mapping[str, Sample]) -> bool:
    """Return whether a group lies in another one, whose usage includes its own."""
    while path := path.rpartition("/")[0]:
        if path in known:
            return True
    return False


def _row(now: Sample, before: Sample | None) -> Row:
    reading, limits, statistics = now.reading, now.limits, now.statistics
    throttled = None
    if before is not None:
        periods = _increase(statistics.cpu_periods, before.statistics.cpu_periods)
        waited = _increase(statistics.cpu_throttled, before.statistics.cpu_throttled)
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
            name: one.some.share if one.some is not None else None for name, one in now.pressure.items()
        },
        memory_hits=reading.memory_limit_hits,
        pids_hits=reading.pids_limit_hits,
        oom_kills=reading.oom_kills,
        hits=now.hits,
        new_hits=int(_increase(now.hits, None if before is None else before.hits) or 0),
        tally=now.tally,
    )


def _server_row(now: ServerSample, before: ServerSample | None) -> ServerRow:
    return ServerRow(
        instance=now.instance,
        owner=now.owner,
        unroutable=now.unroutable,
        new_unroutable=int(_increase(now.unroutable, None if before is None else before.unroutable) or 0),
        node=now.node,
    )


def _increase(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else max(0, now - before)


def _rate(now: Sample, before: Sample | None, of: Callable[[Reading], float | None]) -> float | None:
    if before is None or now.when <= before.when:
        return None
    increase = _increase(of(now.reading), of(before.reading))
    return None if increase is None else increase / (now.when - before.when)
