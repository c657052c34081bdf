"""What happens to groups: memory, processes, CPU, pressure, emptiness; for loops and callbacks.

::

    with rcon_plugins.watch("nightly") as events:
        for event in events:
            print(event.kind, event.usage)

The kernel's side is `rcon_plugins.kernel.events`; docs/howto/events.md has all kinds of events.
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

#: What a policy calls the limit that an event is about.
_LIMITS: dict[Kind, str] = {
    "memory_high": "memory_high",
    "memory_limit": "memory",
    "oom_kill": "memory",
    "memory_usage": "memory",
    "pids_limit": "pids",
    "cpu_throttled": "cpu",
}
#: As many events wait to be taken; then the oldest is dropped.
_MOST_WAITING = 10_000


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a group.

    ``group`` is its name, ``cgroup`` its path, ``policy`` and ``key`` those it belongs to ("" and None where they
    are not known). ``limit`` is the limit it is about as a policy spells it (``each.memory``; "" where it is about
    none), ``bound`` what that is, ``usage`` what was used when it was noticed: bytes of memory; processes and threads;
    CPUs, and the seconds for which threads were held back; for ``pressure`` the seconds of the trigger, and the share
    of the last ten seconds, 0 to 1. ``count`` is how often it happened since it was last told, ``total`` since
    the group was made. Where the limit expands, ``next_bound`` is what it becomes.
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
    #: Of ``pressure``: what is short; and whether some or all of the threads were waiting for it.
    resource: Literal["cpu", "memory", "io"] | None = None
    share: Literal["some", "full"] | None = None
    #: When it was noticed: seconds of `time.time`.
    time: float = 0.0

    @classmethod
    def of_group(
        cls, cgroup: Cgroup, *, group: str = "", policy: str = "", key: str | None = None, limit: str = ""
    ) -> Event:
        """What all events of a group have in common; ``limit`` is ``"each."`` for those of a single work."""
        return cls(
            kind="empty", group=group or cgroup.name, cgroup=cgroup.path, policy=policy, key=key, limit=limit
        )

    def replaced(self, event: KernelEvent, **more: Any) -> Event:
        """What the kernel told, of the group that this event is about."""
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
        """One object, all of its keys, on one line without its end."""
        return msgspec.json.encode(self)


class Events:
    """The events of one group, as they come: iterate, which waits for the next, or ask `get`. Made by `watch`.

    The iteration ends when the group is removed, or when another thread closes this. At most 10,000 events
    wait to be taken; ``dropped`` counts those that were lost for want of room.
    """

    def __init__(self, callback: Callable[[Event], object] | None) -> None:
        self.dropped = 0
        self._callback = callback
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._close: Callable[[], object] = lambda: None

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event, waiting for it ``timeout`` seconds; None when there is none, or will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended, timeout)
            return self._waiting.popleft() if self._waiting else None

    @property
    def ended(self) -> bool:
        """Whether there will be no more than those that wait to be taken."""
        return self._ended

    def close(self) -> None:
        """Hear no more. Again is harmless."""
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

    def _tell(self, event: Event) -> None:
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
    """Tell what happens to a group from now on, until it is closed (it is a context manager) or the group is gone.

    ``group`` is the name of one as ``rcon ls`` shows it, or a `Cgroup`. Without a ``callback`` iterate over what
    is returned; a callback is called in the watcher's thread, one event at a time, and should not take long.
    ``kinds`` are the kinds of events wanted, all that the machine can tell where not given; ``thresholds`` (bytes) ask
    for ``memory_usage``, ``pressure`` for that. Raises ControllerUnavailable for what was asked for by name and
    cannot be told on this machine, `UnknownGroup`, KernelError, ValueError. One thread watches all groups of a process;
    it runs while one is watched.
    """
    about, cgroup = _about(group)
    events = Events(callback)
    opened = (watcher or watcher_of_process()).add(
        cgroup,
        lambda event: events._tell(about.replaced(event)),  # noqa: SLF001 - made here
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
    # Imported here: who watches a cgroup of its own needs no survey of the machine.
    from rcon_plugins.groups.find import find_group

    found = find_group(group)
    about = Event.of_group(found.cgroup, group=found.name, policy=found.policy or "", key=found.key)
    return about, found.cgroup
