"""The ``thread`` executor: a waiting thread of this process that has taken its identity and its cgroup for good.

Identity and capabilities belong to threads in Linux, and so does a place in a threaded cgroup. A thread that dropped
for good never needs to come back, so a work costs one hand-over to it and nothing else. What it shares with the other
threads - memory above all - is listed in docs/identity.md: it bounds mistakes, not code that means harm.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError
from rcon_plugins.kernel.process import own_directory_and_umask

if TYPE_CHECKING:
    from rcon_plugins.kernel.capability import Identity

LOGGER = logging.getLogger("rcon")

#: How long a new thread may take to be confined, seconds.
READY_SECONDS = 10.0
#: How long the end of all may take when the host closes, seconds.
CLOSE_SECONDS = 2.0

_Result = TypeVar("_Result")
#: A confinement by name, and who its work is.
Key = tuple[str, "Identity | None"]


class ThreadExecutor:
    """One thread that serves one confinement and identity all its life. Made by `ThreadExecutors`.

    One work at a time owns it: `call` is not thread-safe.
    """

    def __init__(self, key: Key, prepare: Callable[[], object]) -> None:
        self.key = key
        #: Whether a call is under way, which its caller may have left: the thread cannot be used again then.
        self.busy = False
        self.cpu_seconds = 0.0
        self._prepare = prepare
        # Bare locks: a hand-over is two of them, and anything more costs more than the work's own run.
        self._begin = _thread.allocate_lock()
        self._begin.acquire()
        self._done = _thread.allocate_lock()
        self._done.acquire()
        self._ending = False
        self._job: Callable[[], object] | None = None
        self._result: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name=f"rcon-{key[0]}", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until it is confined. Raises what kept it from being so; it is gone then."""
        self._thread.start()
        if not self._done.acquire(timeout=READY_SECONDS):
            self.end()
            raise ConfinementError(f"a thread was not confined within {READY_SECONDS:g} s")
        error, self._error = self._error, None
        if error is not None:
            self._thread.join(CLOSE_SECONDS)
            raise error

    def call(self, job: Callable[[], _Result]) -> _Result:
        """Run ``job`` in the thread and wait for it: its result, or what it raised.

        Where the wait is cut short, by an exception from a signal handler, ``busy`` stays true.
        """
        self.busy = True
        self._job = job
        self._begin.release()
        self._done.acquire()
        self.busy = False
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            try:
                raise error
            finally:
                error = None  # or it would be a reference cycle
        return result  # type: ignore[return-value]

    def end(self) -> None:
        """Have the thread end, once it has done what it does. Does not wait. Called once."""
        self._ending = True
        with contextlib.suppress(RuntimeError):  # a call that nobody waits for has just begun
            self._begin.release()

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(max(0.0, timeout))
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            # A thread shares its working directory and umask with the process unless it says otherwise (unshare(2)).
            own_directory_and_umask()
            self._prepare()
        except BaseException as error:  # noqa: BLE001 - whatever it was: the caller is told and nothing runs
            self._error = error
            self._done.release()
            return
        self._done.release()
        while True:
            self._begin.acquire()
            job, self._job = self._job, None
            if self._ending or job is None:
                return
            began = time.thread_time()
            try:
                self._result = job()
            except BaseException as error:  # noqa: BLE001 - the work's own, and its caller's to deal with
                self._error = error
            finally:
                del job
            self.cpu_seconds += time.thread_time() - began
            self._done.release()


class ThreadExecutors:
    """At most ``most`` executor threads of all confinements together. Thread-safe.

    A thread serves one confinement and identity for life, so a waiting one can only be taken for its own. Where the
    bound is reached, a waiting thread of those that were used longest ago makes room.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._all: set[ThreadExecutor] = set()
        #: Waiting threads by confinement and identity, those used longest ago first.
        self._waiting: OrderedDict[Key, list[ThreadExecutor]] = OrderedDict()

    def take(self, key: Key, prepare: Callable[[], object]) -> ThreadExecutor:
        """A confined, waiting thread; makes one where none waits. ``prepare`` is called in a new one, to confine it.

        Raises `ConcurrencyLimitExceeded` when every thread is at work, and what ``prepare`` raises.
        """
        with self._lock:
            waiting = self._waiting.get(key)
            if waiting:
                executor = waiting.pop()
                if not waiting:
                    del self._waiting[key]
                return executor
            self._make_room()
            executor = ThreadExecutor(key, prepare)
            self._all.add(executor)
        try:
            executor.start()
        except BaseException:
            self._lose(executor)
            raise
        return executor

    def give_back(self, executor: ThreadExecutor) -> None:
        """Put a thread back to wait for the next work; or, where its last call was left alone, let it end."""
        with self._lock:
            if not executor.busy and executor in self._all:
                self._waiting.setdefault(executor.key, []).append(executor)
                self._waiting.move_to_end(executor.key)
                return
        LOGGER.warning(
            "a thread of %s is still at work that nobody waits for; it is not used again", executor.key[0]
        )
        self._lose(executor)
        executor.end()

    def forget(self, name: str) -> None:
        """End the waiting threads of a confinement that is no longer kept, whatever their identity."""
        with self._lock:
            keys = [key for key in self._waiting if key[0] == name]
            ending = [executor for key in keys for executor in self._waiting.pop(key)]
            self._all.difference_update(ending)
        _end(ending)

    def close(self) -> None:
        """End all waiting threads. One that is at work ends after it, or with the process."""
        with self._lock:
            ending = [executor for some in self._waiting.values() for executor in some]
            self._waiting.clear()
            self._all.clear()
        _end(ending)

    def _make_room(self) -> None:
        if len(self._all) < self._most:
            return
        if not self._waiting:
            raise ConcurrencyLimitExceeded(
                f"all {self._most} executor threads of this server process are at work; "
                "the setting `threads` says how many there may be",
                limit="threads",
            )
        key, waiting = next(iter(self._waiting.items()))
        spare = waiting.pop(0)
        if not waiting:
            del self._waiting[key]
        self._all.discard(spare)
        spare.end()

    def _lose(self, executor: ThreadExecutor) -> None:
        with self._lock:
            self._all.discard(executor)


def _end(executors: list[ThreadExecutor]) -> None:
    for executor in executors:
        executor.end()
    deadline = time.monotonic() + CLOSE_SECONDS
    for executor in executors:
        with contextlib.suppress(RuntimeError):  # a thread that ends itself, at the interpreter's end
            executor.join(deadline - time.monotonic())
