"""Memory that expands: at the limit the work is slowed down or goes on, the limit is raised, up to a bound.

The bound, ``up_to``, is the cgroup's limit in the kernel from the start, so that nothing depends on the process that
raises: if it is late, or ends, work is slow (v2) or has more at once (v1), and never has more than ``up_to``. The
limit that grows is a mark below it (`rcon_plugins.kernel.events.memory_threshold`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.groups.events import Event
from rcon_plugins.kernel.cgroup import Resources, read_limits
from rcon_plugins.kernel.events import MemoryThreshold, Watcher, watcher_of_process
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.units import Size

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event as KernelEvent
    from rcon_plugins.settings.limits import Limits

LOGGER = logging.getLogger("rcon")


def expand(
    cgroup: Cgroup,
    memory: Memory,
    *,
    about: Event | None = None,
    on_event: Callable[[Event], Limits | None] | None = None,
    on_gone: Callable[[], object] | None = None,
    watcher: Watcher | None = None,
) -> Expansion:
    """Let the memory limit of an existing cgroup grow as ``memory`` says, until the `Expansion` is closed.

    Call it before the work begins. ``on_event`` is called in the watcher's thread each time that the limit is reached,
    with an event made after ``about``; where it returns limits with ``memory``, that is taken instead of what would
    be next. The watcher is that of the process unless one is given. Raises KernelError, ControllerUnavailable.
    """
    return Expansion(cgroup, memory, watcher or watcher_of_process(), about, on_event, on_gone)


class Expansion:
    """The memory limit of one cgroup, while it grows. Thread-safe. Made by `expand`.

    ``limit`` is the limit now, in bytes, ``times`` how often it was raised.
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
        self.limit = int(memory)
        self.times = 0
        self._about = about or Event.of_group(cgroup)
        self._on_event = on_event
        self._lock = threading.RLock()
        self._mark = MemoryThreshold(watcher, cgroup, self._reached, on_gone)
        self._bound(memory)
        self._mark.move(self.limit if memory.expands else None)

    @property
    def is_current(self) -> bool:
        """Whether the cgroup is still the one that was there at the beginning."""
        return self._mark.is_current

    @property
    def grew(self) -> bool:
        """Whether the limit is not the one to begin with."""
        return self.times > 0

    def take(self, memory: Memory) -> None:
        """Go on with another limit, which may expand in its turn. Raises KernelError."""
        with self._lock:
            self._bound(memory)
            self.memory = memory
            self.limit = int(memory)
            self.times += 1
            self._mark.move(self.limit if memory.expands else None)

    def reset(self) -> None:
        """Go back to the limit to begin with, unless what is in the cgroup still needs more. Raises KernelError."""
        with self._lock, self._mark.locked():
            if self.times and self.memory.expands and self._mark.need() < int(self.memory):
                self.limit = int(self.memory)
                self.times = 0
                self._mark.move(self.limit)

    def lift(self) -> None:
        """Leave the bound alone, which is the kernel's: nothing is slowed down below it. Raises KernelError."""
        with self._lock:
            self._mark.move(None)

    def close(self) -> None:
        """Raise it no more. Work above the limit stays slowed down on v2: close it when the work is over."""
        with self._lock:
            self._mark.close()

    def _bound(self, memory: Memory) -> None:
        if read_limits(self.cgroup).memory_max != int(memory.most):
            self.cgroup.configure(Resources(memory_max=int(memory.most)))

    def _reached(self, event: KernelEvent) -> None:
        """In the watcher's thread: the work needs what it may have."""
        with self._lock:
            if not self._is_news():
                return
            own = self._about.replaced(event, kind="memory_limit", bound=self.limit, next_bound=self._next())
        answer = self._ask(own)
        with self._lock:
            try:
                with self._mark.locked():
                    if answer is not None and answer.memory is not None:
                        self.take(answer.memory)
                    elif self._is_news():
                        self._grow()
            except KernelError as error:
                if self.cgroup.exists():
                    LOGGER.error("the memory limit of %s could not be raised: %s", self.cgroup.path, error)
                return
        LOGGER.info(
            "%s: memory limit raised from %s to %s", self.cgroup.path, Size(own.bound or 0), Size(self.limit)
        )

    def _is_news(self) -> bool:
        """Whether it is reached, and nobody has raised it meanwhile: other workers of a server see the same cgroup."""
        there = self._mark.stands_at()
        if there is None:
            return False
        if there > self.limit:
            while self.limit < min(there, self.memory.most):
                self._step()
            return False
        # Lower: somebody went back to the beginning.
        self.limit = there
        return self._mark.is_reached()

    def _ask(self, event: Event) -> Limits | None:
        if self._on_event is None:
            return None
        try:
            return self._on_event(event)
        except Exception:
            # What it would have said is not known; the work has to go on all the same.
            LOGGER.exception("a callback for events of %s failed", self.cgroup.path)
            return None

    def _next(self) -> int:
        return self.memory.after(self.limit)

    def _step(self) -> None:
        grown = self._next()
        self.times += grown > self.limit
        self.limit = grown

    def _grow(self) -> None:
        needed, most = self._mark.need(), int(self.memory.most)
        self._step()
        while self.limit < most and needed >= self.limit:
            self._step()
        # At the end only the bound is left: above it the kernel kills, and nothing is slowed down for ever.
        self._mark.move(self.limit if self.limit < most else None)
