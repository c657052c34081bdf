"""The thread of the host that watches over its executor processes: their deaths, and their deadlines.

Threads that serve work only ever wait on their own channel. The supervisor makes sure that this wait ends: it kills
the whole cgroup of an executor process that died or overran its deadline, after which nobody holds the other end of
the channel and the waiting thread reads an end of file.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable


class Supervisor:
    """One thread, waiting for a descriptor, a deadline or a job. Thread-safe.

    ``on_readable`` is called in the thread when ``descriptor`` can be read; it returns False to end the thread.
    Names of modules are looked up when used, so that under gevent the thread is a greenlet and yields.
    """

    def __init__(self, descriptor: int, on_readable: Callable[[], bool]) -> None:
        self._descriptor = descriptor
        self._on_readable = on_readable
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], object]] = deque()
        self._deadlines: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="rcon-supervisor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> None:
        """Have ``job`` called in the thread, soon."""
        self._jobs.append(job)
        self._wake_up()

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Have ``action`` called in the thread at ``when`` (`time.monotonic`) or shortly after.

        There is no taking back: an action finds out for itself whether it is still wanted. So the usual case, a
        work that ends in time, costs one push on a heap, and no wake-up as long as an earlier deadline stands.
        """
        with self._lock:
            earliest = not self._deadlines or when < self._deadlines[0][0]
            heapq.heappush(self._deadlines, (when, next(self._order), action))
        if earliest:
            self._wake_up()

    def close(self, timeout: float = 10.0) -> None:
        """End the thread, after the jobs submitted so far, and wait for it."""
        self._ending = True
        self._wake_up()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        with self._lock:
            wake, self._wake = self._wake, -1
        os.close(wake)

    def _wake_up(self) -> None:
        with self._lock:
            if self._wake >= 0:  # else it was closed under a work that is just being ended
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(self._patience())}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._descriptor in ready and not self._on_readable():
                poll.unregister(self._descriptor)
            self._act_on_deadlines()
            while self._jobs:
                self._do(self._jobs.popleft())
            if self._ending:
                return

    def _patience(self) -> float | None:
        """Milliseconds to the next deadline; None for ever."""
        with self._lock:
            if not self._deadlines:
                return None
            return max(0.0, (self._deadlines[0][0] - time.monotonic()) * 1000 + 1)

    def _act_on_deadlines(self) -> None:
        while True:
            with self._lock:
                if not self._deadlines or self._deadlines[0][0] > time.monotonic():
                    return
                action = heapq.heappop(self._deadlines)[2]
            self._do(action)

    @staticmethod
    def _do(action: Callable[[], object]) -> None:
        try:
            action()
        except Exception:  # noqa: BLE001 - one failed action must not end the watch over all the others
            traceback.print_exc()
