"""Wait in one thread for the events of all watched cgroups of a process."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import posix
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import descriptors, files, threads
from rcon_plugins.kernel.attempts import Attempts
from rcon_plugins.kernel.events.event import Event, Pressure
from rcon_plugins.kernel.events.opening import open_sources
from rcon_plugins.kernel.events.sources import Gone, Source
from rcon_plugins.kernel.syscalls import POLLIN, Poll

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup.cgroup import Cgroup

LOGGER = logging.getLogger("rcon")

#: The interval of polling under a cooperative library, whose event loop has no priority events, seconds.
COOPERATIVE_SECONDS = 0.01
#: The most watches that may wait for the thread to close them. With more, `Watcher.add` waits.
_MOST_CLOSING = 256


class Watch:
    """One watched cgroup. ``gone``: the cgroup was removed, and no more events come."""

    def __init__(
        self,
        watcher: Watcher,
        cgroup: Cgroup,
        callback: Callable[[Event], object],
        on_gone: Callable[[], object] | None,
        opened: list[Source],
    ) -> None:
        self.cgroup = cgroup
        self.gone = False
        self.closed = False
        self._watcher = watcher
        self._callback = callback
        self._on_gone = on_gone
        self.sources = opened
        #: Held while sources are read.
        self.looking = threading.Lock()
        self._identity = _identity(cgroup)

    def __repr__(self) -> str:
        return f"<Watch {self.cgroup.path}>"

    def close(self) -> None:
        """Stop watching. Does not wait: a callback may still run in the thread. Calling it again does nothing."""
        self._watcher.remove(self)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def look(self) -> None:
        """Report what the kernel counted until now in cgroups below. Call it before removing one of them."""
        self._take([source for source in self.sources if source.sums_below])

    def finish(self) -> None:
        """Report the events until now, then close. Call it before removing the cgroup."""
        self._take(self.sources)
        self.close()

    def _take(self, sources: Iterable[Source]) -> None:
        """Read these sources now, in the calling thread, and have the watcher's thread report the events."""
        events: list[Event] = []
        with self.looking:
            if not self.closed:
                for source in sources:
                    source.ready = False
                    # Gone or failed: no events.
                    with contextlib.suppress(Gone, OSError, ValueError):
                        events.extend(source.take())
        for event in events:
            self._watcher.submit(partial(self._callback, event))

    @property
    def is_current(self) -> bool:
        """Whether the cgroup is still the same one, not a later one of that name."""
        return not self.closed and self._identity == _identity(self.cgroup)

    # -- in the thread ------------------------------------------------------------------------

    def read(self, source: Source) -> bool:
        """Read a source, and call the callback with its events. Return whether reading began or ceased to fail."""
        events: list[Event] = []
        ended = False
        with self.looking:
            if self.closed:
                return False
            failed_before = source.attempts.failures > 0
            if failed_before:
                source.due = None  # was that of the next attempt
            try:
                events.extend(source.take())  # also the events before a failure
                if failed_before:
                    source.attempts = Attempts()
            except Gone:
                ended = True
            except ValueError as error:
                ended = True
                LOGGER.error("%s is no longer watched: %s", self.cgroup.path, error)
            except OSError as error:
                ended = files.gone(error)
                if not ended:
                    if source.attempts.failed():
                        LOGGER.error("%s cannot be watched now; trying again: %s", self.cgroup.path, error)
                    source.try_again()
        for event in events:
            if not self.closed:
                _do(partial(self._callback, event))
        if ended:
            self._end()
        return failed_before is not (source.attempts.failures > 0)

    def _end(self) -> None:
        self.gone = True
        self.close()
        if self._on_gone is not None:
            _do(self._on_gone)


class Watcher:
    """One thread that reports the events of any number of cgroups. Thread-safe.

    The thread runs while a cgroup is watched. It belongs to the process that made it. A fork has neither the thread nor
    the watches, and `add` raises there. Callbacks run in the thread, one at a time; a slow one delays the others. Under
    gevent the thread is a greenlet that polls every `COOPERATIVE_SECONDS`.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()
        self._closing: list[Watch] = []
        self._jobs: deque[Callable[[], object]] = deque()
        self._wake = -1
        #: The current thread, and the last one, which may still be ending.
        self._thread: threading.Thread | None = None
        self._last: threading.Thread | None = None

    def add(
        self,
        cgroup: Cgroup,
        callback: Callable[[Event], object],
        *,
        kinds: Collection[str] | None = None,
        thresholds: Collection[int] = (),
        needs: Collection[int] = (),
        pressure: Collection[Pressure] = (),
        on_gone: Callable[[], object] | None = None,
    ) -> Watch:
        """Call ``callback`` with each event of an existing cgroup, until the watch is closed or the cgroup is removed.

        ``kinds`` are the kinds to report; None means all that the cgroup can report. ``thresholds`` (bytes) add
        ``memory_usage`` events. So do ``needs``, which are thresholds of memory beyond unmapped page cache.
        ``pressure`` adds pressure events. ``on_gone`` is called once if the cgroup is removed before the watch is
        closed. Raises ControllerUnavailable, with the reason, for a named kind that cannot be reported here. Raises
        KernelError, ValueError.
        """
        if os.getpid() != self._pid:
            raise KernelError(
                f"this process is a fork of process {self._pid}, to which the watcher belongs",
                path=cgroup.path,
                hint="make a Watcher() in each process",
            )
        self._let_it_close()
        watch = Watch(
            self, cgroup, callback, on_gone, open_sources(cgroup, kinds, thresholds, needs, pressure)
        )
        try:
            with self._lock:
                if self._thread is None:
                    self._start()
                else:
                    os.eventfd_write(self._wake, 1)
                self._watches.add(watch)
        except BaseException:
            _close(watch)
            raise
        return watch

    def _start(self) -> None:
        """Start the thread, which waits for the lock. Hold it. Raises KernelError."""
        self._wake = descriptors.event_counter()
        thread = threading.Thread(target=self._run, name="cgroup-events", daemon=True)
        try:
            threads.start(thread)
        except BaseException:
            posix.close(self._wake)
            self._wake = -1
            raise
        self._thread = self._last = thread

    def submit(self, job: Callable[[], object]) -> None:
        """Call ``job`` in the thread, soon; do nothing if no cgroup is watched."""
        with self._lock:
            if self._thread is not None and os.getpid() == self._pid:
                self._jobs.append(job)
                os.eventfd_write(self._wake, 1)

    def remove(self, watch: Watch) -> None:
        """Remove a watch. The thread closes its descriptors soon."""
        if os.getpid() != self._pid:  # a fork has neither the thread nor the holder of a lock
            watch.closed = True
            for source in watch.sources:
                source.close()
            return
        with self._lock:
            if watch.closed:
                return
            watch.closed = True
            self._watches.discard(watch)
            self._closing.append(watch)
            os.eventfd_write(self._wake, 1)

    def close(self, timeout: float = 10.0) -> None:
        """Close all watches, and wait for the thread to end."""
        if os.getpid() != self._pid:
            return
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                watches, thread = list(self._watches), self._last
            for watch in watches:
                watch.close()
            if thread is None or thread is threading.current_thread() or not thread.is_alive():
                return
            if time.monotonic() > deadline:
                return
            # Repeat: a running callback may have added a watch meanwhile.
            thread.join(0.05)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _let_it_close(self) -> None:
        deadline = time.monotonic() + 1.0
        while len(self._closing) > _MOST_CLOSING and threading.current_thread() is not self._thread:
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)

    # -- in the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        wake = self._wake
        while True:
            with self._lock:
                closing, self._closing = self._closing, []
                jobs, self._jobs = self._jobs, deque()
                watched = [(source, watch) for watch in self._watches for source in watch.sources]
                if not watched:
                    self._thread = None
                    self._wake = -1
            for job in jobs:
                _do(job)
            # Close only here, while nothing is polled: the number of a closed descriptor may be reused at once.
            for watch in closing:
                _close(watch)
            if not watched:
                posix.close(wake)
                return
            wanted = {
                source.descriptor: source.mask
                for source, _ in watched
                if source.descriptor >= 0 and not source.attempts.failures
            }
            waiting = _Waiting({**wanted, wake: POLLIN})
            # add, remove and submit wake the thread; until then nothing changes.
            while not self._wait_once(waiting, wake, watched):
                pass

    def _wait_once(self, waiting: _Waiting, wake: int, watched: list[tuple[Source, Watch]]) -> bool:
        """Wait once, and report the events. Return whether the descriptors to wait for have changed."""
        dues = [source.due for source, _ in watched if source.due is not None]
        try:
            ready = waiting.wait(min(dues) if dues else None)
        except OSError as error:
            LOGGER.error("the watcher of cgroups cannot wait for events; trying again: %s", error)
            time.sleep(1)
            return True
        woken = wake in ready
        if woken:
            os.eventfd_read(wake)
        now = time.monotonic()
        for source, watch in watched:
            source.ready = source.descriptor in ready
            if (source.ready or (source.due is not None and source.due <= now)) and not watch.closed:
                woken = watch.read(source) or woken
        return woken


class _OfProcess:
    """The watcher that a program shares.

    A new child calls `forget`: another thread may have held the lock at the fork.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again with no watcher and a free lock."""
        self.lock = threading.Lock()
        self.watcher: Watcher | None = None


_of_process = _OfProcess()
os.register_at_fork(after_in_child=_of_process.forget)


def watcher_of_process() -> Watcher:
    """Return the watcher that the whole program shares. The first call makes it; a fork makes a new one."""
    with _of_process.lock:
        if _of_process.watcher is None:
            _of_process.watcher = Watcher()
        return _of_process.watcher


class _Waiting:
    """poll(2) on descriptors that stay the same until a watch is added or removed."""

    def __init__(self, wanted: dict[int, int]) -> None:
        self._poll: select.poll | None = None
        # A cooperative library removes select.poll, or replaces it by one that would not wake up for these files.
        if getattr(getattr(select, "poll", None), "__module__", "") == "select":
            self._poll = select.poll()
            for descriptor, mask in wanted.items():
                self._poll.register(descriptor, mask)
        else:
            self._system = Poll(wanted)

    def wait(self, until: float | None) -> dict[int, int]:
        """Wait until ``until`` (`time.monotonic`), and return the ready descriptors. Raises KernelError, OSError."""

        def remaining() -> float | None:
            return None if until is None else max(0.0, until - time.monotonic())

        if self._poll is not None:
            rest = remaining()
            return dict(self._poll.poll(None if rest is None else math.ceil(rest * 1000)))
        while True:
            ready = self._system.wait(0)
            rest = remaining()
            if ready or rest == 0:
                return ready
            time.sleep(COOPERATIVE_SECONDS if rest is None else min(COOPERATIVE_SECONDS, rest))


def _identity(cgroup: Cgroup) -> int | None:
    return files.identity(cgroup.directories[0])


def _close(watch: Watch) -> None:
    with watch.looking:
        for source in watch.sources:
            source.close()


def _do(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception:
        # One failed callback must not end the other watches.
        LOGGER.exception("a callback for events of a cgroup failed")
