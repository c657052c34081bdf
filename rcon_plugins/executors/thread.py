"""The ``thread`` executor: a waiting thread of this process that keeps one identity and one cgroup until it ends.

In Linux, identity, capabilities and membership in a threaded cgroup belong to threads. The thread never regains
privileges or leaves its cgroup, so a request costs one hand-over to it. It guards against accidents and does not
contain malicious code: docs/howto/identity.md lists what it shares with other threads, memory above all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from rcon_plugins.errors import ConcurrencyLimitExceeded, ConfinementError, KernelError
from rcon_plugins.executors.executor import Key
from rcon_plugins.kernel import descriptors, threads
from rcon_plugins.kernel.process import unshare_directory_and_umask

LOGGER = logging.getLogger("rcon")

#: How long a new thread may take to be confined, seconds.
READY_SECONDS = 10.0
#: How long `close` waits until all threads have ended, seconds.
CLOSE_SECONDS = 2.0

_ENDED = "the executor thread ended"
_Result = TypeVar("_Result")


class _Signal:
    """Wakes the one thread that waits for it, now or later. Uses a pipe, which takes two descriptors.

    One write costs more than releasing a lock, but the whole hand-over costs less. A thread that releases a lock holds
    the GIL, so the other thread wakes and waits again for the GIL. A pipe is written without the GIL. The writer
    usually waits next, so the kernel runs the reader on the same CPU. Measured in a gthread worker: 10 switches per
    request instead of 14.
    """

    __slots__ = ("_reading", "_writing")

    def __init__(self) -> None:
        """Make the pipe. Raises `KernelError` if there are no descriptors left."""
        self._reading, self._writing = descriptors.pipe()

    def __del__(self) -> None:
        if hasattr(self, "_writing"):
            os.close(self._reading)
            os.close(self._writing)

    def give(self) -> None:
        """Wake the waiting thread. Call it once for each `wait`."""
        os.write(self._writing, b"\0")

    def wait(self) -> None:
        """Wait for `give`."""
        os.read(self._reading, 1)

    def wait_for(self, seconds: float) -> bool:
        """Wait for `give`, for so many seconds at most. Return whether it was called."""
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return False
        self.wait()
        return True


class ThreadExecutor:
    """One thread that serves one confinement and identity all its life. Made by `ThreadExecutors`.

    One unit of work at a time owns it: `call` is not thread-safe.
    """

    def __init__(self, key: Key, prepare: Callable[[], object]) -> None:
        self.key = key
        #: Whether a call is under way. Stays true if its caller left the call: the thread cannot be used again then.
        self.busy = False
        #: Whether the thread ended or never began, so that it takes no calls.
        self.ended = False
        self.cpu_seconds = 0.0
        #: Confines the thread. Called in it, once, before anything else.
        self.prepare = prepare
        self._begin = _Signal()
        self._done = _Signal()
        self._ending = False
        self._job: Callable[[], object] | None = None
        #: The result and the exception of a finished call, until its caller takes them.
        self._outcome: tuple[object, BaseException | None] | None = None
        self._thread = threading.Thread(target=self._live, name=f"rcon-{key[0]}", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until it is confined. Raises the error if it cannot be; call `end` then."""
        try:
            threads.start(self._thread)
        except KernelError:
            self.ended = True
            raise
        if not self._done.wait_for(READY_SECONDS):
            self.ended = not self._thread.is_alive()
            raise ConfinementError(f"a thread was not confined within {READY_SECONDS:g} s")
        try:
            self._take_outcome()
        except BaseException:
            self.join(CLOSE_SECONDS)
            raise

    def call(self, job: Callable[[], _Result]) -> _Result:
        """Run ``job`` in the thread and wait for it. Return its result, or raise what it raised.

        Raises `ConfinementError` if the thread ended, or ends before the job is done, which happens if other code sets
        an exception in the thread. If an exception of a signal handler cuts the wait short, ``busy`` stays true, and
        the thread takes no more calls.
        """
        if self.busy:
            raise ConfinementError("the executor thread is busy with an earlier call, which its caller left")
        if self.ended:
            raise ConfinementError(_ENDED)
        self.busy = True
        self._job = job
        try:
            self._begin.give()
            self._done.wait()
        except OSError as error:
            raise ConfinementError(f"the executor thread cannot be reached: {error}") from error
        self.busy = False
        return self._take_outcome()  # type: ignore[return-value]

    def _take_outcome(self) -> object:
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            raise ConfinementError(_ENDED)
        result, error = outcome
        if error is not None:
            try:
                raise error
            finally:
                outcome = error = None  # avoid a reference cycle
        return result

    def end(self) -> None:
        """Tell the thread to end after the call under way. Does not wait."""
        self._ending = True
        self._begin.give()

    def join(self, timeout: float) -> bool:
        """Wait for so many seconds at most until the thread has ended. Return whether it has."""
        return threads.join(self._thread, timeout)

    @property
    def is_gone(self) -> bool:
        """Whether the thread has left its cgroup."""
        return self.ended and threads.has_ended(self._thread)

    def _live(self) -> None:
        try:
            if self._confine():
                self._serve()
        finally:
            # Wake the caller whatever ended the thread. Make no other calls here: each might raise.
            self.ended = True
            self._done.give()

    def _confine(self) -> bool:
        try:
            # A thread shares its working directory and umask with the process unless it calls unshare(2).
            unshare_directory_and_umask()
            self.prepare()
        except Exception as error:  # noqa: BLE001 - whatever it is: `start` raises it and nothing runs
            self._outcome = None, error
            return False
        self._outcome = None, None
        self._done.give()
        return True

    def _serve(self) -> None:
        while True:
            self._begin.wait()
            job, self._job = self._job, None
            if self._ending or job is None:
                return
            began = time.thread_time()
            outcome: tuple[object, BaseException | None]
            try:
                outcome = job(), None
            except BaseException as error:  # noqa: BLE001 - raised again in the caller
                outcome = None, error
            finally:
                del job
            self.cpu_seconds += time.thread_time() - began
            self._outcome = outcome
            del outcome  # do not keep it while the thread waits
            self._done.give()


class ThreadExecutors:
    """At most ``most`` executor threads for all confinements. Thread-safe.

    A thread serves one confinement and identity until it ends, so a request can only take a waiting thread of the same
    confinement and identity. When the bound is reached, the least recently used waiting thread is ended. A thread whose
    caller left a call counts until it ends.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._closed = False
        #: The threads that count towards the bound.
        self._all: set[ThreadExecutor] = set()
        #: Threads that were told to end while they waited, or ended by themselves: they may still be in their cgroup.
        self._ending: set[ThreadExecutor] = set()
        #: Waiting threads by confinement and identity, the least recently used first.
        self._waiting: OrderedDict[Key, list[ThreadExecutor]] = OrderedDict()

    def take(self, key: Key, prepare: Callable[[], object]) -> ThreadExecutor:
        """Return a confined, waiting thread. Start one if none waits; it calls ``prepare`` to confine itself.

        Raises `ConcurrencyLimitExceeded` if every thread is busy, `ConfinementError` after `close`, and what
        ``prepare`` raises.
        """
        with self._lock:
            if self._closed:
                raise ConfinementError("the executor threads were closed")
            waiting = self._waiting.get(key)
            while waiting:
                executor = waiting.pop()
                if not waiting:
                    del self._waiting[key]
                if not executor.ended:
                    return executor
            spare = self._make_room()
            executor = ThreadExecutor(key, prepare)
            self._all.add(executor)
        try:
            executor.start()
            if spare is not None:
                # It has descriptors until it ends. On a busy machine, many that were told to end would still have them.
                spare.join(CLOSE_SECONDS)
        except BaseException:
            executor.end()  # if the wait was cut short, the thread may still live, and counts until it ends
            if executor.is_gone:
                with self._lock:
                    self._all.discard(executor)
            raise
        if spare is not None:
            with self._lock:
                self._forget_gone()
        return executor

    def give_back(self, executor: ThreadExecutor) -> None:
        """Let a thread wait for the next request. End it instead if its caller left a call, or after `close`."""
        with self._lock:
            if not (executor.busy or executor.ended or self._closed):
                self._waiting.setdefault(executor.key, []).append(executor)
                self._waiting.move_to_end(executor.key)
                return
        if executor.busy:
            LOGGER.warning(
                "a thread of %s is still busy with a call that its caller left; it is not used again",
                executor.key[0],
            )
        executor.end()

    def serves(self, name: str) -> bool:
        """Return whether a thread of a confinement has not ended."""
        with self._lock:
            self._forget_gone()
            return any(one.key[0] == name and not one.is_gone for one in (*self._all, *self._ending))

    def forget(self, name: str) -> None:
        """End the waiting threads of a confinement that is no longer kept, for all identities."""
        with self._lock:
            keys = [key for key in self._waiting if key[0] == name]
            ending = [executor for key in keys for executor in self._waiting.pop(key)]
            self._all.difference_update(ending)
            self._ending.update(ending)
        _end(ending)
        with self._lock:
            self._forget_gone()

    def close(self) -> None:
        """End all waiting threads, and start no more. A busy thread ends after its call, or with the process."""
        with self._lock:
            self._closed = True
            ending = [executor for some in self._waiting.values() for executor in some]
            self._waiting.clear()
            self._all = {one for one in self._all.difference(ending) if not one.is_gone}
        _end(ending)

    def _forget_gone(self) -> None:
        """Forget the threads that were told to end and have ended. Call it with the lock held."""
        self._ending = {executor for executor in self._ending if not executor.is_gone}

    def _make_room(self) -> ThreadExecutor | None:
        """Make room for one more thread. Return the waiting one that was told to end for it; None if none had to.

        Call it with the lock held.
        """
        ended = {executor for executor in self._all if executor.ended}
        self._all -= ended
        self._ending |= ended
        self._forget_gone()
        if len(self._all) < self._most:
            return None
        while self._waiting:
            key, waiting = next(iter(self._waiting.items()))
            spare = waiting.pop(0)
            if not waiting:
                del self._waiting[key]
            if spare in self._all:  # else it ended while it waited, and did not count
                self._all.discard(spare)
                self._ending.add(spare)
                spare.end()
                return spare
        raise ConcurrencyLimitExceeded(
            f"all {self._most} executor threads of this server process are busy; "
            "raise the setting `threads` to allow more",
            limit="threads",
        )


def _end(executors: list[ThreadExecutor]) -> None:
    for executor in executors:
        executor.end()
    deadline = time.monotonic() + CLOSE_SECONDS
    for executor in executors:
        with contextlib.suppress(RuntimeError):  # a thread that ends itself, at the interpreter's end
            executor.join(deadline - time.monotonic())
