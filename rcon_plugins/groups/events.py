"""Events of groups, for loops and callbacks: memory, processes, CPU, pressure, and a group that becomes empty.

::

    with rcon_plugins.watch("nightly") as events:
        for event in events:
            print(event.kind, event.usage)

`rcon_plugins.kernel.events` detects them; docs/howto/events.md lists all kinds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from rcon_plugins.kernel.events import Kind, Pressure, watcher_of_process

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event as KernelEvent
    from rcon_plugins.kernel.events import Watcher

__all__ = ["Event", "Events", "Pressure", "watch"]

#: For each kind of event, the policy key of the limit concerned.
_LIMITS: dict[Kind, str] = {
    "memory_high": "memory_high",
    "memory_limit": "memory",
    "oom_kill": "memory",
    "memory_usage": "memory",
    "pids_limit": "pids",
    "cpu_throttled": "cpu",
}
#: The most events that wait for the reader. If there are more, the oldest is dropped.
_MOST_WAITING = 10_000


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a group.

    ``group`` is the name of the group, ``cgroup`` its path, ``policy`` and ``key`` those it belongs to ("" and None if
    unknown). ``limit`` is the policy key of the limit concerned (``each.memory``; "" if there is none), ``bound`` the
    value of that limit, ``usage`` the usage at the time of the event. Both are bytes of memory, or numbers of processes
    and threads. For ``cpu_throttled`` they are CPUs and the seconds for which threads were throttled; for ``pressure``
    the seconds of the trigger and the share of the last ten seconds, 0 to 1. ``count`` is the number of times since the
    last event, ``total`` the number since the group was made. If the limit expands, ``next_bound`` is its next value.
    """

    kind: Kind
    group: str
    cgroup: str
    policy: str = ""
    key: str | None = None
    limit: str = ""
    bound: float | None = None
    usage: float | None = None
    count: int = 1
    total: int | None = None
    next_bound: int | None = None
    #: For ``pressure``: the resource, and whether some or all threads waited for it.
    resource: Literal["cpu", "memory", "io"] | None = None
    share: Literal["some", "full"] | None = None
    #: The time of the event, as `time.time`.
    time: float = 0.0

    @classmethod
    def of_group(
        cls, cgroup: Cgroup, *, group: str = "", policy: str = "", key: str | None = None, limit: str = ""
    ) -> Event:
        """Return an event with the fields that all events of a group share.

        ``limit`` is ``"each."`` for a single request or task.
        """
        return cls(
            kind="empty", group=group or cgroup.name, cgroup=cgroup.path, policy=policy, key=key, limit=limit
        )

    def replaced(self, event: KernelEvent, **more: Any) -> Event:
        """Return this event with the values of the kernel's event and the fields ``more``."""
        kind: Kind = more.pop("kind", event.kind)
        name = _LIMITS.get(kind, "")
        news = {
            "kind": kind,
            "limit": f"{self.limit}{name}" if name else "",
            "bound": event.limit,
            "usage": event.usage,
            "count": event.count,
            "total": event.total,
            "resource": event.resource,
            "share": event.share,
            "time": time.time() - (time.monotonic() - event.when),
            **more,
        }
        return msgspec.structs.replace(self, **news)

    def to_json(self) -> bytes:
        """Return the event as one JSON object on one line, with all keys."""
        return msgspec.json.encode(self)


class Events:
    """The events of one group as they happen. Iterate, which waits for the next event, or call `get`. See `watch`.

    The iteration ends when the group is removed or another thread calls `close`. At most 10,000 events wait for the
    reader; ``dropped`` is the number of events lost.
    """

    def __init__(self, callback: Callable[[Event], object] | None) -> None:
        self.dropped = 0
        self._callback = callback
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._close: Callable[[], object] = lambda: None

    def get(self, timeout: float | None = None) -> Event | None:
        """Wait up to ``timeout`` seconds for the next event and return it; None without one, or after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended, timeout)
            return self._waiting.popleft() if self._waiting else None

    @property
    def ended(self) -> bool:
        """Whether no more events will be added to those that wait for the reader."""
        return self._ended

    def close(self) -> None:
        """Stop watching. Calling it again does nothing."""
        self._close()
        self._end()

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self, close: Callable[[], object]) -> None:
        self._close = close

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _add(self, event: Event) -> None:
        if self._callback is not None:
            self._callback(event)
            return
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(event)
            self._changed.notify()


def watch(
    group: str | Cgroup,
    callback: Callable[[Event], object] | None = None,
    *,
    kinds: Collection[str] | None = None,
    thresholds: Collection[int] = (),
    pressure: Collection[Pressure] = (),
    watcher: Watcher | None = None,
) -> Events:
    """Watch a group until the returned `Events`, a context manager, is closed or the group is removed.

    ``group`` is a name as ``rcon ls`` shows it, or a `Cgroup`. Without a ``callback``, iterate over the result. A
    callback is called in the watcher's thread, with one event at a time; it should return soon. ``kinds`` are the kinds
    of events wanted; the default is all that this machine can report. ``thresholds`` (bytes) add ``memory_usage``
    events, ``pressure`` adds pressure events. One thread watches all groups of a process, as long as there are any.
    Raises ControllerUnavailable for a named kind that this machine cannot report, `UnknownGroup`, KernelError,
    ValueError.
    """
    about, cgroup = _about(group)
    events = Events(callback)
    opened = (watcher or watcher_of_process()).add(
        cgroup,
        lambda event: events._add(about.replaced(event)),  # noqa: SLF001 - made here
        kinds=kinds,
        thresholds=thresholds,
        pressure=pressure,
        on_gone=events._end,  # noqa: SLF001
    )
    events._begin(opened.close)  # noqa: SLF001
    return events


def _about(group: str | Cgroup) -> tuple[Event, Cgroup]:
    if not isinstance(group, str):
        return Event.of_group(group), group
    # Import here, because watching a Cgroup does not need it.
    from rcon_plugins.groups.find import find_group

    found = find_group(group)
    about = Event.of_group(found.cgroup, group=found.name, policy=found.policy or "", key=found.key)
    return about, found.cgroup
