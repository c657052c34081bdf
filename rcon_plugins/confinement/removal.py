"""Remove the cgroups of confinements that nobody needs any more.

Whoever ends last removes: a confinement that is no longer kept, its last executor, or its last thread. The directory
stays only while another process of the server uses it, which then removes it.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import threads
from rcon_plugins.kernel.attempts import Attempts

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup

LOGGER = logging.getLogger("rcon")

#: EBUSY lingers for a moment after the last process has left. Log it after so many attempts, some 2 seconds.
_BUSY_ATTEMPTS = 8


class Removals:
    """Removes cgroups, and tries again where the kernel refuses. Thread-safe.

    A thread tries again at growing intervals (see `Attempts`). It runs only while a removal is pending. ``is_needed``
    returns whether a confinement is kept or used again. ``is_held`` returns whether a thread of this process still
    runs in it, which ends it later.
    """

    def __init__(self, is_needed: Callable[[str], bool], is_held: Callable[[str], bool]) -> None:
        self._is_needed = is_needed
        self._is_held = is_held
        self._changed = threading.Condition()
        self._pending: dict[str, tuple[Cgroup, Attempts]] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        #: The number of attempts that failed.
        self.failures = 0

    @property
    def pending(self) -> int:
        """The number of cgroups that could not be removed yet."""
        return len(self._pending)

    def remove(self, name: str, cgroup: Cgroup) -> None:
        """Remove the cgroup of a confinement, now or as soon as the kernel allows it. Does not wait."""
        attempts = Attempts()
        if self._try(name, cgroup, attempts):
            return
        with self._changed:
            if self._closed or name in self._pending:
                return
            self._pending[name] = cgroup, attempts
            if self._thread is None:
                self._start()
            else:
                self._changed.notify()

    def _start(self) -> None:
        """Start the thread; if that fails, the next removal tries again. Hold the lock."""
        thread = threading.Thread(target=self._run, name="rcon-removals", daemon=True)
        try:
            threads.start(thread)
        except KernelError as error:
            self.failures += 1
            LOGGER.error("rcon: %d cgroups wait for their removal: %s", len(self._pending), error)
            return
        self._thread = thread

    def close(self) -> None:
        """Stop trying. What is left is removed with the instance."""
        with self._changed:
            self._closed = True
            self._pending.clear()
            self._changed.notify()

    def _try(self, name: str, cgroup: Cgroup, attempts: Attempts) -> bool:
        """Try once. Return whether no other attempt is needed."""
        try:
            if cgroup.delete(timeout=0) or not self._is_held(name):
                return True
            attempts.failed()
        except KernelError as error:
            attempts.failed()
            self.failures += 1
            # The first other failure, or EBUSY that does not pass.
            if attempts.failures == (_BUSY_ATTEMPTS if error.errno == errno.EBUSY else 1):
                LOGGER.error("rcon: the cgroup of %s could not be removed; trying again: %s", name, error)
        return False

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    self._thread = None
                    return
                first = min(attempts.due for _, attempts in self._pending.values())
                if (pause := first - time.monotonic()) > 0:
                    self._changed.wait(pause)
                    continue
                due = [(name, *one) for name, one in self._pending.items() if one[1].is_due]
            for name, cgroup, attempts in due:
                if self._is_needed(name) or self._try(name, cgroup, attempts):
                    with self._changed:
                        self._pending.pop(name, None)
