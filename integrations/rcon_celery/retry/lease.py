"""The runs of tasks that are acknowledged late, as other deliveries of their messages have to know of them.

A broker delivers a message again when the worker died that had it; but also while that still runs the task: when
Redis' visibility timeout is over, or when the connection broke. So a run is noted in the result backend, where that is
a store of keys and values: by which process, and when that last said so. Whoever gets the message again finds there

- a run that is under way: it lets the message wait until that is over, and runs the task only if that is lost;
- one that is lost, since its process has gone, or has said nothing for so long: it runs the task;
- one that is over: the task was done.

What takes less than a second is noted only for tasks whose deaths are counted, and costs the others nothing.
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
from rcon_plugins.tree.presence import Presence

_log = logging.getLogger("rcon")
bytes_to_str: Any = _bytes_to_str  # has no types

#: A run that takes so long is noted, and after its end it still is: as long as results are, seconds.
_LASTING: Final = 1.0
#: How often a run says that it is under way, and after how long without that it is lost, seconds. The clocks of
#: workers may differ by what is between the two.
_BEAT, _VALID = 5.0, 20.0
#: How long a message waits before it looks again whether the other run is over, seconds.
_PAUSE: Final = 10.0
#: So long after its time a message that waits is taken for lost, seconds.
_LATE: Final = 3600.0
#: How long a task waits in its process for a backend that cannot be reached, and how often it looks, seconds.
_PATIENCE, _LOOK = 20.0, 1.0
#: How long several may take to write what one of them is to read, seconds.
_SETTLED: Final = 1.0
#: How long the thread may take to come to its end, seconds.
_STOP: Final = 5.0


class Run(msgspec.Struct, frozen=True):
    """What is noted of a run. ``lost`` runs before it never came to an end; ``beat`` is by the clock of its machine."""

    lost: int
    by: Presence
    beat: float
    over: bool = False

    def is_fresh(self) -> bool:
        """Whether it was said just now."""
        return time.time() <= self.beat + _VALID


class WaitingDuplicate(msgspec.Struct, frozen=True):
    """The one message that waits for the end of a run, among all that are the same."""

    number: str
    due: float


class Lease:
    """One message of a task that is acknowledged late, delivered here. ``lost``: how many runs never came to an end."""

    def __init__(self, task: Any, pulse: Heartbeat, *, counts: bool) -> None:
        """``counts``: its deaths are counted. Raises `Ignore` where it must not be run, or not now."""
        self._task = task
        self._pulse = pulse
        self._counts = counts
        self._name = f"rcon-runs-{redelivery.identity(task)}"
        self._number: str | None = getattr(task.request, redelivery.HEIR, None)
        self.again = redelivery.is_redelivered(task) or self._number is not None
        #: Whether the backend can keep what is noted.
        self.is_noted = isinstance(task.backend, BaseKeyValueStoreBackend)
        self.lost = 0
        self._began = self._said = 0.0
        self._lock = threading.Lock()
        self._written = self._over = False
        self._claimed: str | None = None
        if self.is_noted and (counts or self.again):
            self._patiently(self._look)
        elif counts and self.again:
            self.lost = 1

    def _look(self) -> None:
        before = _decoded(self._task.backend.get(self._key()), Run)
        if before is not None:
            if before.over and self.again and self._was_done(before):
                raise self._superfluous("it was done before")
            lives = self._lives(before) if self.again else not before.by.has_gone() and before.is_fresh()
            if lives and self.again:
                raise self._wait(before)
            if not lives and (self.again or not before.over):
                self.lost = before.lost + 1
            # Else another message, with an id that somebody uses again.
        if self.again and not self._claim(before):
            raise self._wait(before)
        self._counts = True  # it is known, or there is something to be overwritten

    def _lives(self, before: Run) -> bool:
        """Whether the run may still be under way, or what Celery does after it.

        Where nobody has said so for long, that has to be seen twice: the backend may have been gone, or clocks changed.
        """
        if before.by.has_gone():
            return False
        return before.is_fresh() or (
            not before.over and getattr(self._task.request, redelivery.SEEN, None) != before.beat
        )

    def _patiently(self, act: Callable[[], object]) -> None:
        """Do something with the backend, and give it time to come back. Raises `Reject` where it does not.

        The task has not begun: what it was told by then would pass for its own end.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                act()
                return
            except (Ignore, Reject, SoftTimeLimitExceeded):
                raise
            except Exception as error:
                # Backends and brokers raise what they like.
                if time.monotonic() >= until:
                    _log.warning(
                        "rcon: %s[%s]: whether it runs elsewhere cannot be told, and it goes back to its queue: %s",
                        self._task.name,
                        self._task.request.id,
                        error,
                    )
                    raise Reject(str(error), requeue=True) from error
            time.sleep(_LOOK)

    def _claim(self, before: Run | None) -> bool:
        """Whether this is the one that runs it, of several that come at the same time and find the same.

        As those do that waited beyond the visibility timeout, which are several by then.
        """
        backend, number = self._task.backend, os.urandom(8).hex()
        self._claimed = f"-claim-{before.beat if before is not None else 0}"
        key = self._key(self._claimed)
        if _is_redis(backend):
            return bool(backend.client.set(key, number, nx=True, ex=int(_VALID)))
        # Nothing is at once with other backends: of several the last one counts, when each has had its time to write.
        backend.set(key, number)
        time.sleep(_SETTLED)
        return bool(bytes_to_str(backend.get(key)) == number)

    def _was_done(self, before: Run) -> bool:
        """Whether what comes after the body was done too: Celery stores the result last."""
        if self._task.request.ignore_result or self._task.ignore_result:
            return not before.by.has_gone()
        state = self._task.backend.get_task_meta(self._task.request.id)["status"]
        return state in states.READY_STATES or state == states.RETRY

    def _wait(self, before: Run | None) -> Exception:
        """Let the message wait, if no other of the same does. What to raise."""
        backend, key, now = self._task.backend, self._key("-heir"), time.time()
        heir = _decoded(backend.get(key), WaitingDuplicate)
        if heir is not None and heir.number != self._number and now < heir.due + _LATE:
            return self._superfluous("it runs, and another message waits for its end")
        number = os.urandom(8).hex()
        backend.set(key, _encoded(WaitingDuplicate(number, now + _PAUSE)))
        redelivery.send_heir(self._task, number, _PAUSE, before.beat if before is not None else None)
        told = _log.info if self._number is not None else _log.warning
        told(
            "rcon: %s[%s] was delivered again while it runs; the message waits",
            self._task.name,
            self._task.request.id,
        )
        return _ignored("it runs already")

    def _superfluous(self, why: str) -> Exception:
        _log.warning("rcon: %s[%s] was delivered again; %s", self._task.name, self._task.request.id, why)
        return _ignored(why)

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Note the run, as long as it is under way."""
        if not self.is_noted:
            yield
            return
        self._began = time.monotonic()
        if self._counts:
            self._patiently(partial(self._write, over=False))
        self._pulse.add(self)
        ended = False
        try:
            yield
            ended = True
        except Reject:
            raise  # the task has its message delivered again, which is no death
        except Exception:
            ended = True
            raise
        finally:
            self._pulse.remove(self)
            with self._lock:
                self._over = True
            try:
                self._conclude(ended=ended)
            except Exception as error:  # noqa: BLE001 - of any backend; what the task did counts all the same
                _log.warning("rcon: %s: the result backend cannot be told of its end: %s", self._name, error)

    def _conclude(self, *, ended: bool) -> None:
        if self._written:
            if ended and time.monotonic() > self._began + _LASTING:
                self._write(over=True)
            else:
                self.forget()
        if self._claimed is not None:
            self._task.backend.delete(self._key(self._claimed))

    def say(self) -> bool:
        """In the thread that does so: that it is under way, where that is to be said by now; whether it was."""
        now = time.monotonic()
        if now < (self._said + _BEAT if self._written else self._began + _LASTING):
            return False
        with self._lock:
            if not self._over:
                self._write(over=False)
        return True

    def forget(self) -> None:
        """Leave no note of it."""
        if self.is_noted:
            self._task.backend.delete(self._key())

    def _key(self, suffix: str = "") -> Any:
        """Where the backend keeps it: some want text, and some bytes."""
        return self._task.backend.key_t(self._name + suffix)

    def _write(self, *, over: bool) -> None:
        self._written = True
        run = Run(self.lost, self._pulse.presence(), time.time(), over)
        self._task.backend.set(self._key(), _encoded(run))
        self._said = time.monotonic()


class Heartbeat:
    """The one thread of a process that says of all its runs that they are under way. It is made when it is needed."""

    def __init__(self) -> None:
        self._runs: set[Lease] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._presence: Presence | None = None
        self._idle = self._stopping = self._failing = False

    def presence(self) -> Presence:
        """This process."""
        if self._presence is None or self._presence.pid != os.getpid():
            self._presence = Presence.here()
        return self._presence

    def add(self, run: Lease) -> None:
        """A run begins."""
        with self._changed:
            self._runs.add(run)
            if self._thread is None or self._pid != os.getpid():
                self._stopping = False
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._beat, name="rcon-pulse", daemon=True)
                self._thread.start()
            elif self._idle:
                self._changed.notify()

    def remove(self, run: Lease) -> None:
        """A run has ended."""
        with self._changed:
            self._runs.discard(run)

    def stop(self) -> None:
        """End the thread, before this process forks; the next run makes another."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._stopping = True
            self._changed.notify()
        if thread is not None and self._pid == os.getpid():
            thread.join(_STOP)

    def _beat(self) -> None:
        while True:
            with self._changed:
                while not self._runs and not self._stopping:
                    self._idle = True
                    self._changed.wait()
                self._idle = False
                self._changed.wait_for(lambda: self._stopping, _LASTING / 2)
                if self._stopping:
                    return
                runs = list(self._runs)
            for run in runs:
                self._say(run)

    def _say(self, run: Lease) -> None:
        try:
            if run.say():
                self._failing = False
        except Exception as error:  # noqa: BLE001 - a backend raises what it likes; it may be there again soon
            if not self._failing:
                _log.warning("rcon: the result backend cannot be told of tasks that run: %s", error)
            self._failing = True


def _ignored(why: str) -> Exception:
    error: Exception = Ignore(why)
    return error


def _encoded(what: msgspec.Struct) -> str:
    return msgspec.json.encode(what).decode()


def _is_redis(backend: Any) -> bool:
    """Whether results are in Redis; found without an import, which takes a package that only its users have."""
    module = sys.modules.get("celery.backends.redis")
    return module is not None and isinstance(backend, module.RedisBackend)


def _decoded(data: Any, kind: type[Any]) -> Any:
    """What is in the backend; None where nothing of that kind is."""
    try:
        return None if data is None else msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError:
        return None
