"""The thread of the host that receives exit reports of executor processes and acts on deadlines.

Threads that serve work wait only on their own channel. The supervisor makes sure that this wait ends. It never blocks
on one executor, so an executor that ends slowly delays no other deadline.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from rcon_plugins.kernel import descriptors, threads
from rcon_plugins.kernel.attempts import FIRST_PAUSE, Attempts

LOGGER = logging.getLogger("rcon")

#: When this many deadlines are kept, drop those of executors that are gone.
_FEW = 1000


class Supervisor:
    """One thread that waits for a descriptor, a deadline, a job or the next round of chores. Thread-safe.

    The thread calls ``on_readable`` when ``descriptor`` can be read, until that returns False. It calls ``chores`` in
    each turn; ``chores`` returns the number of seconds until its next call at the latest, or None. Names of modules are
    looked up when used, so that under gevent the thread is a greenlet and yields.
    """

    def __init__(
        self,
        descriptor: int,
        on_readable: Callable[[], bool],
        chores: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._chores = chores
        self._lock = threading.Lock()
        self._wake = descriptors.event_counter()
        self._jobs: deque[Callable[[], object]] = deque()
        self._deadlines: list[tuple[float, int, Callable[..., object], weakref.ref[Any] | None]] = []
        self._limit = _FEW
        self._order = itertools.count()
        self._ending = False
        self._closed = False
        self._watched: dict[int, Callable[[], bool]] = {descriptor: on_readable}
        self._thread = threading.Thread(target=self._run, name="rcon-supervisor", daemon=True)
        #: The thread's own identifier, once it runs.
        self._ident = 0

    def watch(self, descriptor: int, on_readable: Callable[[], bool]) -> None:
        """Have the thread wait for one more descriptor, in the same way. Call it before `start`."""
        self._watched[descriptor] = on_readable

    def start(self) -> None:
        """Start the thread. Raises `KernelError`."""
        threads.start(self._thread)

    def submit(self, job: Callable[[], object]) -> None:
        """Have ``job`` called in the thread soon. After `close`, it is never called."""
        self._jobs.append(job)
        self._wake_up()

    def at(self, when: float, action: Callable[..., object], of: Any = None) -> None:
        """Have ``action`` called in the thread at ``when`` (`time.monotonic`) or shortly after.

        ``of`` is its argument, kept by a weak reference. If that object is gone by then, ``action`` is not called.
        """
        with self._lock:
            if len(self._deadlines) >= self._limit:
                # A deadline may be a day away, and thousands of executors may come and go before it.
                self._deadlines = [one for one in self._deadlines if one[3] is None or one[3]() is not None]
                heapq.heapify(self._deadlines)
                self._limit = max(_FEW, 2 * len(self._deadlines))
            earliest = not self._deadlines or when < self._deadlines[0][0]
            reference = None if of is None else weakref.ref(of)
            heapq.heappush(self._deadlines, (when, next(self._order), action, reference))
        if earliest:
            self._wake_up()

    def close(self, timeout: float = 10.0) -> None:
        """End the thread, after the jobs submitted so far, and wait for it."""
        self._ending = True
        try:
            self._wake_up()
            if self._thread.ident is not None and self._thread is not threading.current_thread():
                self._thread.join(timeout)
        finally:
            with self._lock:
                if not self._closed:
                    self._closed = True
                    os.close(self._wake)

    def _wake_up(self) -> None:
        if threading.get_ident() == self._ident:
            return  # it looks for jobs and deadlines before it waits again
        with self._lock:
            if not self._closed:  # otherwise the descriptor may belong to another file by now
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        self._ident = threading.get_ident()
        poll = select.poll()
        for descriptor in self._watched:
            poll.register(descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        again: float | None = None
        attempts = Attempts()
        while True:
            try:
                ready = {descriptor for descriptor, _ in poll.poll(self._timeout(again))}
            except OSError as error:  # no memory: deadlines must be kept all the same
                if attempts.failed():
                    LOGGER.error("the supervisor of executor processes cannot wait; trying again: %s", error)
                time.sleep(FIRST_PAUSE)
                ready = set()
            if self._wake in ready:
                self._do(partial(os.eventfd_read, self._wake))
            for descriptor, on_readable in self._watched.items():
                if descriptor in ready and self._do(on_readable) is False:
                    poll.unregister(descriptor)
            self._act_on_deadlines()
            # Do one job per turn, because exit reports and deadlines come first.
            if self._jobs:
                self._do(self._jobs.popleft())
            elif self._ending:
                return
            seconds = self._do(self._chores)
            again = seconds if isinstance(seconds, float) else None

    def _timeout(self, again: float | None) -> float | None:
        """Return the milliseconds until the next deadline, job or chores; None to wait for the descriptor alone."""
        if self._jobs or self._ending:
            return 0
        with self._lock:
            first = self._deadlines[0][0] - time.monotonic() if self._deadlines else None
        waits = [wait for wait in (first, again) if wait is not None]
        return max(0.0, min(waits) * 1000 + 1) if waits else None

    def _act_on_deadlines(self) -> None:
        while True:
            with self._lock:
                if not self._deadlines or self._deadlines[0][0] > time.monotonic():
                    return
                _, _, action, reference = heapq.heappop(self._deadlines)
            if reference is None:
                self._do(action)
            elif (of := reference()) is not None:
                self._do(partial(action, of))

    @staticmethod
    def _do(action: Callable[[], object]) -> object:
        try:
            return action()
        except Exception:
            # A failed action must not end the thread: all other executors need it.
            LOGGER.exception("the supervisor of executor processes failed in %r", action)
            return None
