"""The lease of a running task that is acknowledged late: it prevents a second delivery from running the task twice.

A broker delivers a message again when the worker that had it died, but also while that worker still runs the task: at
the end of Redis' visibility timeout, or when the connection broke. So a run keeps a lease in the result backend, if
that stores keys and values. The lease names the process that runs the task, and the time of its last heartbeat. A
worker that receives the message again finds

- a live lease: the duplicate waits until the run ends, and runs the task only if the run is lost;
- a lost lease: the process is gone, or its heartbeat stopped. The worker runs the task;
- a finished lease: the task was done. The worker ignores the duplicate.

A run that takes less than a second stores a lease only if its deaths are counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import msgspec
from celery import states
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from kombu.utils.encoding import bytes_to_str as _bytes_to_str

from rcon_celery.retry import redelivery
from rcon_plugins.errors import ConfinementError, thread_not_started
from rcon_plugins.tree.presence import Presence

_log = logging.getLogger("rcon")
bytes_to_str: Any = _bytes_to_str  # has no types

#: A run that takes longer than this many seconds stores its lease. The lease is kept as long as results are. If these
#: are kept for ever, it is kept for so many seconds.
_SHORT_RUN: Final = 1.0
KEPT: Final = 24 * 3600
#: The interval of heartbeats, and how long a lease lives after the last one, seconds. The clocks of workers may differ
#: by the difference of the two.
_HEARTBEAT, _LIFETIME = 5.0, 20.0
#: How long a duplicate waits before it looks at the lease again, seconds.
_DUPLICATE_WAIT: Final = 10.0
#: A duplicate is lost if it has not come back so many seconds after it was due.
_DUPLICATE_LOST: Final = 3600.0
#: How long a task waits for a result backend that cannot be reached, and the interval of its tries, seconds.
_BACKEND_WAIT, _BACKEND_INTERVAL = 20.0, 1.0
#: How long to wait for the claims of other workers to the same run, if claiming is not atomic; seconds.
_CLAIM_SETTLES: Final = 1.0
#: How long to wait for the end of the heartbeat thread, seconds.
_JOIN: Final = 5.0


class StoredLease(msgspec.Struct, frozen=True):
    """A lease as the result backend stores it.

    ``lost`` is the number of earlier runs that never ended. ``heartbeat`` is in seconds, by the clock of the worker.
    """

    lost: int
    process: Presence
    heartbeat: float
    finished: bool = False

    def is_fresh(self) -> bool:
        """Return whether the last heartbeat is recent."""
        return time.time() <= self.heartbeat + _LIFETIME


class WaitingDuplicate(msgspec.Struct, frozen=True):
    """The one duplicate that waits for the end of a run. All other duplicates of the message are ignored."""

    number: str
    due: float


class Lease:
    """The lease of one delivery of a task. ``lost`` is the number of earlier runs that never ended."""

    def __init__(self, task: Any, heartbeat: Heartbeat, *, counts_deaths: bool, redelivered: bool) -> None:
        """Read the lease of an earlier delivery. Raises `Ignore` or `Reject` if the task must not run."""
        self._task = task
        self._heartbeat = heartbeat
        self._store_at_once = counts_deaths
        self._name = f"rcon-lease-{redelivery.message_id(task)}"
        self._duplicate: str | None = getattr(task.request, redelivery.DUPLICATE, None)
        #: Whether the message was delivered before.
        self.redelivered = redelivered or self._duplicate is not None
        #: Whether the result backend can store leases.
        self.is_stored = isinstance(task.backend, BaseKeyValueStoreBackend)
        self.lost = 0
        self._began = self._written_at = 0.0
        self._lock = threading.Lock()
        self._written = self._ended = False
        self._claim_suffix: str | None = None
        if self.is_stored and (counts_deaths or self.redelivered):
            self._with_backend(self._inspect)
        elif counts_deaths and self.redelivered:
            self.lost = 1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease while the ``with`` block runs the task."""
        if not self.is_stored:
            yield
            return
        self._began = time.monotonic()
        if self._store_at_once:
            self._with_backend(partial(self._write, finished=False))
        self._heartbeat.add(self)
        finished = False
        try:
            yield
            finished = True
        except Reject:
            raise  # the task requests another delivery, which is not a death
        except Exception:
            finished = True
            raise
        finally:
            self._heartbeat.remove(self)
            with self._lock:
                self._ended = True
            try:
                self._release(finished=finished)
            except Exception as error:  # noqa: BLE001 - each backend raises its own; the task's result stays valid
                _log.warning(
                    "rcon: %s[%s] ended, but its lease in the result backend could not be updated: %s",
                    self._task.name,
                    self._task.request.id,
                    error,
                )

    def renew(self) -> bool:
        """Write a heartbeat if one is due; return whether it was. Runs in the heartbeat thread."""
        now = time.monotonic()
        if now < (self._written_at + _HEARTBEAT if self._written else self._began + _SHORT_RUN):
            return False
        with self._lock:
            if not self._ended:
                self._write(finished=False)
        return True

    def delete(self) -> None:
        """Remove the lease from the result backend."""
        if self.is_stored:
            self._task.backend.delete(self._key())

    def _inspect(self) -> None:
        before = _decoded(self._task.backend.get(self._key()), StoredLease)
        if before is not None:
            if before.finished and self.redelivered and self._was_done(before):
                raise self._ignore_duplicate("it has already finished")
            live = (
                self._may_live(before)
                if self.redelivered
                else not before.process.has_gone() and before.is_fresh()
            )
            if live and self.redelivered:
                raise self._wait(before)
            if not live and (self.redelivered or not before.finished):
                self.lost = before.lost + 1
            # Otherwise it is another message with an id that was used before.
        if self.redelivered and not self._claim(before):
            raise self._wait(before)
        self._store_at_once = True  # there may be a lease to overwrite

    def _may_live(self, before: StoredLease) -> bool:
        """Return whether the run, or Celery's handling of its result, may still be under way.

        An old heartbeat counts as stopped only if a second read finds the same one: the backend may have been
        unreachable, or the clocks may have changed.
        """
        if before.process.has_gone():
            return False
        return before.is_fresh() or (
            not before.finished
            and getattr(self._task.request, redelivery.LAST_HEARTBEAT, None) != before.heartbeat
        )

    def _with_backend(self, act: Callable[[], object]) -> None:
        """Call ``act``, which uses the result backend. Retry for a while if the backend is unreachable.

        Raises `Reject` if it stays unreachable: the task has not begun, and another exception would become its result.
        """
        deadline = time.monotonic() + _BACKEND_WAIT
        while True:
            try:
                act()
                return
            except (Ignore, Reject, SoftTimeLimitExceeded):
                raise
            except Exception as error:
                # Each backend raises exceptions of its own.
                if time.monotonic() >= deadline:
                    _log.warning(
                        "rcon: %s[%s] sent back to its queue: the result backend was unreachable for %.0f seconds, "
                        "so another worker may be running it: %s",
                        self._task.name,
                        self._task.request.id,
                        _BACKEND_WAIT,
                        error,
                    )
                    raise Reject(str(error), requeue=True) from error
            time.sleep(_BACKEND_INTERVAL)

    def _claim(self, before: StoredLease | None) -> bool:
        """Return whether this delivery may run the task, if several find the same lost lease at the same time."""
        backend, number = self._task.backend, os.urandom(8).hex()
        self._claim_suffix = f"-claim-{before.heartbeat if before is not None else 0}"
        key = self._key(self._claim_suffix)
        if is_redis(backend):
            return bool(backend.client.set(key, number, nx=True, ex=int(_LIFETIME)))
        # Other backends have no atomic claim: wait until each delivery had time to write; the last writer wins.
        self._store(key, number)
        time.sleep(_CLAIM_SETTLES)
        return bool(bytes_to_str(backend.get(key)) == number)

    def _was_done(self, before: StoredLease) -> bool:
        """Return whether Celery has also finished with the task: it stores the result last."""
        if self._task.request.ignore_result or self._task.ignore_result:
            return not before.process.has_gone()
        state = self._task.backend.get_task_meta(self._task.request.id)["status"]
        return state in states.READY_STATES or state == states.RETRY

    def _wait(self, before: StoredLease | None) -> Exception:
        """Send the message again as the waiting duplicate, unless there is one. Return the exception to raise."""
        backend, key, now = self._task.backend, self._key("-duplicate"), time.time()
        waiting = _decoded(backend.get(key), WaitingDuplicate)
        if waiting is not None and waiting.number != self._duplicate and now < waiting.due + _DUPLICATE_LOST:
            return self._ignore_duplicate("it is running, and another duplicate waits for its end")
        number = os.urandom(8).hex()
        self._store(key, _encoded(WaitingDuplicate(number, now + _DUPLICATE_WAIT)))
        last_heartbeat = before.heartbeat if before is not None else None
        redelivery.send_duplicate(self._task, number, _DUPLICATE_WAIT, last_heartbeat)
        _log.log(
            logging.INFO if self._duplicate is not None else logging.WARNING,
            "rcon: %s[%s] was delivered again while it is running; the duplicate waits for its end",
            self._task.name,
            self._task.request.id,
        )
        return _ignore("it is running already")

    def _ignore_duplicate(self, why: str) -> Exception:
        _log.warning(
            "rcon: %s[%s] was delivered again and is ignored: %s", self._task.name, self._task.request.id, why
        )
        return _ignore(why)

    def _release(self, *, finished: bool) -> None:
        if self._written:
            if finished and time.monotonic() > self._began + _SHORT_RUN:
                self._write(finished=True)
            else:
                self.delete()
        if self._claim_suffix is not None:
            self._task.backend.delete(self._key(self._claim_suffix))

    def _key(self, suffix: str = "") -> Any:
        """Return a key of the result backend, as text or bytes, whichever the backend accepts."""
        return self._task.backend.key_t(self._name + suffix)

    def _store(self, key: Any, text: str) -> None:
        """Store a text under a key of the result backend, not for ever."""
        backend = self._task.backend
        backend.set(key, text)
        if not backend.expires:
            backend.expire(key, KEPT)  # without an effect in backends where nothing expires

    def _write(self, *, finished: bool) -> None:
        self._written = True
        lease = StoredLease(self.lost, self._heartbeat.process(), time.time(), finished)
        self._store(self._key(), _encoded(lease))
        self._written_at = time.monotonic()


class Heartbeat:
    """The thread that renews all leases of this process. It starts with the first lease."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._process: Presence | None = None
        self._idle = self._stopping = self._failing = False

    def process(self) -> Presence:
        """Return the identity of this process, in a form that another worker can check."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = Presence.here()
        return self._process

    def add(self, lease: Lease) -> None:
        """Renew this lease from now on. Raises `ConfinementError` if the thread for it cannot be started."""
        with self._changed:
            if self._thread is None or self._pid != os.getpid():
                self._stopping = False
                thread = threading.Thread(target=self._run, name="rcon-heartbeat", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # at a limit on processes, which counts threads
                    refused = thread_not_started(thread.name, error)
                    raise ConfinementError(f"the lease of a task cannot be renewed: {refused}") from None
                self._pid, self._thread = os.getpid(), thread
            self._leases.add(lease)
            if self._idle:
                self._changed.notify()

    def remove(self, lease: Lease) -> None:
        """Stop renewing this lease."""
        with self._changed:
            self._leases.discard(lease)

    def stop(self) -> None:
        """End the thread. Call it before this process forks. The next lease starts another thread."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._stopping = True
            self._changed.notify()
        if thread is not None and self._pid == os.getpid():
            thread.join(_JOIN)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._leases and not self._stopping:
                    self._idle = True
                    self._changed.wait()
                self._idle = False
                self._changed.wait_for(lambda: self._stopping, _SHORT_RUN / 2)
                if self._stopping:
                    return
                leases = list(self._leases)
            for lease in leases:
                self._renew(lease)

    def _renew(self, lease: Lease) -> None:
        try:
            if lease.renew():
                self._failing = False
        except Exception as error:  # noqa: BLE001 - each backend raises its own; it may be reachable again soon
            if not self._failing:
                _log.warning(
                    "rcon: the leases of running tasks cannot be renewed in the result backend: %s", error
                )
            self._failing = True


def _ignore(why: str) -> Exception:
    error: Exception = Ignore(why)
    return error


def _encoded(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def is_redis(backend: Any) -> bool:
    """Return whether results are in Redis, without importing its backend: the package may not be installed."""
    module = sys.modules.get("celery.backends.redis")
    return module is not None and isinstance(backend, module.RedisBackend)


def _decoded(data: Any, kind: type[Any]) -> Any:
    """Return the value that the backend stored under a key; None if it is not a value of this kind."""
    try:
        return None if data is None else msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError:
        return None
