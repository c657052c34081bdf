"""Expand memory limits: when work reaches the limit, raise it, up to a bound.

The bound, ``up_to``, is the cgroup's limit in the kernel from the start. So safety does not depend on the process that
raises the limit. If that process is late or ends, work is slowed down (v2) or may use more at once (v1), but never
more than ``up_to``. The limit that grows is a threshold below it (`rcon_plugins.kernel.events.memory_threshold`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Self

from rcon_plugins.errors import KernelError
from rcon_plugins.groups.events import Event
from rcon_plugins.kernel import threads
from rcon_plugins.kernel.attempts import Attempts
from rcon_plugins.kernel.cgroup import Resources, keep_swap, read_limits
from rcon_plugins.kernel.events import MemoryThreshold, Watcher, watcher_of_process
from rcon_plugins.kernel.files import gone
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.units import format_size

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event as KernelEvent
    from rcon_plugins.settings.limits import Limits

LOGGER = logging.getLogger("rcon")
#: How long to wait in the watcher's own thread if no other can be started for it, seconds.
_WITHOUT_A_TIMER = 0.05


def expand(
    cgroup: Cgroup,
    memory: Memory,
    *,
    about: Event | None = None,
    on_event: Callable[[Event], Limits | None] | None = None,
    on_gone: Callable[[], object] | None = None,
    watcher: Watcher | None = None,
) -> Expansion:
    """Raise the memory limit of an existing cgroup as ``memory`` says, until the `Expansion` is closed.

    Call it before the work begins. ``on_event`` is called in the watcher's thread each time the limit is reached, with
    an event made from ``about``; if it returns limits with ``memory``, these replace the next step. ``on_gone`` is
    called once if the cgroup is removed first. ``watcher`` defaults to that of the process. Raises `KernelError`,
    `ControllerUnavailable`.
    """
    return Expansion(cgroup, memory, watcher or watcher_of_process(), about, on_event, on_gone).begin()


class Expansion:
    """The memory limit of one cgroup while it grows. Thread-safe. Made by `expand`.

    ``limit`` is the current limit in bytes. ``times`` is the number of times it was raised.
    """

    def __init__(
        self,
        cgroup: Cgroup,
        memory: Memory,
        watcher: Watcher,
        about: Event | None,
        on_event: Callable[[Event], Limits | None] | None,
        on_gone: Callable[[], object] | None,
    ) -> None:
        self.cgroup = cgroup
        self.memory = memory
        self.limit = memory.limit
        self.times = 0
        self._about = about or Event.of_group(cgroup)
        self._on_event = on_event
        self._watcher = watcher
        self._attempts = Attempts()
        self._lock = threading.RLock()
        self._threshold = MemoryThreshold(watcher, cgroup, self._reached, on_gone)

    def begin(self) -> Self:
        """Write the bound, and start watching the threshold; return self. Raises `KernelError`."""
        self._write_bound(self.memory)
        self._threshold.move(self.limit if self.memory.expands else None)
        return self

    @property
    def is_current(self) -> bool:
        """Whether the cgroup is still the one that `expand` was given."""
        return self._threshold.is_current

    @property
    def grew(self) -> bool:
        """Whether the limit was raised."""
        return self.times > 0

    def take(self, memory: Memory) -> None:
        """Set another limit, which may expand too. Raises `KernelError`."""
        with self._lock:
            self._write_bound(memory)
            self.memory = memory
            self.limit = memory.limit
            self.times += 1
            self._threshold.move(self.limit if memory.expands else None)

    def reset(self) -> None:
        """Set the first limit again, unless the cgroup still needs more. Raises `KernelError`."""
        with self._lock, self._threshold.locked():
            if self.times and self.memory.expands and self._threshold.need() < self.memory.limit:
                self.limit = self.memory.limit
                self.times = 0
                self._threshold.move(self.limit)

    def unthrottle(self) -> None:
        """Remove the threshold, so that work is no longer slowed down below the bound. Raises `KernelError`."""
        with self._lock:
            self._threshold.move(None)

    def close(self) -> None:
        """Stop raising the limit. Call it when the work is over: on v2, work above the limit stays slowed down."""
        with self._lock:
            self._threshold.close()

    def _write_bound(self, memory: Memory) -> None:
        now = read_limits(self.cgroup)
        if now.memory_max != memory.most:
            self.cgroup.configure(keep_swap(Resources(memory_max=memory.most), now))

    def _reached(self, event: KernelEvent) -> None:
        """Raise the limit after the work reached it. Called in the watcher's thread."""
        try:
            own = self._raise_limit(event)
        except KernelError as error:
            if not gone(error):
                self._try_again(event, error)
            return
        self._attempts = Attempts()
        if own is None:
            return
        LOGGER.info(
            "rcon: %s: memory limit raised from %s to %s",
            self.cgroup.path,
            format_size(int(own.bound or 0)),
            format_size(self.limit),
        )

    def _raise_limit(self, event: KernelEvent) -> Event | None:
        """Raise the limit if it is still reached. Return the event that was reported then. Raises `KernelError`."""
        with self._lock:
            if not self._is_still_reached():
                return None
            own = self._about.replaced(event, kind="memory_limit", bound=self.limit, next_bound=self._next())
        answer = self._ask(own)
        with self._lock, self._threshold.locked():
            if answer is not None and answer.memory is not None:
                self.take(answer.memory)
            elif self._is_still_reached():
                self._grow()
        return own

    def _try_again(self, event: KernelEvent, error: KernelError) -> None:
        if self._attempts.failed():
            LOGGER.error(
                "rcon: the memory limit of %s could not be raised; trying again: %s", self.cgroup.path, error
            )
        job = partial(self._watcher.submit, partial(self._reached, event))
        timer = threading.Timer(self._attempts.pause, job)
        timer.daemon = True
        try:
            threads.start(timer)
        except KernelError:
            time.sleep(_WITHOUT_A_TIMER)
            job()

    def _is_still_reached(self) -> bool:
        """Return whether the limit is reached and was not raised meanwhile by another worker of the server."""
        there = self._threshold.stands_at()
        if there is None:
            return False
        if there > self.limit:
            while self.limit < min(there, self.memory.most):
                self._step()
            return False
        # If lower: another worker has set the first limit again.
        self.limit = there
        return self._threshold.is_reached()

    def _ask(self, event: Event) -> Limits | None:
        if self._on_event is None:
            return None
        try:
            return self._on_event(event)
        except Exception:
            # Raise the limit as configured, so that the work can go on.
            LOGGER.exception("rcon: a callback for events of %s failed", self.cgroup.path)
            return None

    def _next(self) -> int:
        return self.memory.after(self.limit)

    def _step(self) -> None:
        grown = self._next()
        self.times += grown > self.limit
        self.limit = grown

    def _grow(self) -> None:
        needed, most = self._threshold.need(), self.memory.most
        self._step()
        while self.limit < most and needed >= self.limit:
            self._step()
        # At the bound, remove the threshold. The kernel kills above the bound; with a threshold, work would stay slow.
        self._threshold.move(self.limit if self.limit < most else None)
