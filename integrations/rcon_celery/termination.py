"""Kill the body of one task when Celery terminates or cancels it, with pools that run tasks in the worker's process.

Celery's own pools kill the process of a task (prefork) or a greenlet (gevent), or refuse (threads). A confined body has
a process of its own, whatever the pool. So a task's class gets a `Request` that has this process killed. ``Request`` is
a documented attribute of a task's class.

The thread or greenlet that waits for the body then ends its task without a result of its own: Celery has stored the
state, ``REVOKED`` or ``RETRY``, by then.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Final, Protocol

from billiard.common import TERM_SIGNAME
from celery.exceptions import Ignore, Reject
from celery.platforms import signals as _signals
from celery.utils.imports import symbol_by_name

from rcon_plugins.confinement.admission import ProcessAdmission
from rcon_plugins.errors import on_one_line

#: How many tasks that have not begun can be terminated at a time, the last ones.
_MOST_WAITING: Final = 10_000


class RunningTasks:
    """The bodies that run in executor processes of this process, by the id of the task. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, ProcessAdmission | None] = {}
        #: The exception that ends each task that was killed, or is not to begin.
        self._killed: OrderedDict[str, Exception] = OrderedDict()

    def kill(self, task_id: str, ending: Exception) -> bool:
        """Kill the body of a task, or have it not begin, and have ``ending`` raised in its place. Does not wait.

        Return False if the body runs in a thread of this process, where nothing can kill it.
        """
        with self._lock:
            admission = self._running.get(task_id)
            if admission is None and task_id in self._running:
                return False
            self._killed[task_id] = ending
            while len(self._killed) > _MOST_WAITING:
                self._killed.popitem(last=False)
        if admission is not None:
            admission.abandon(on_one_line(str(ending)))
        return True

    @contextlib.contextmanager
    def running(self, task_id: str, admission: ProcessAdmission | None) -> Iterator[None]:
        """Run a body in the ``with`` block. ``admission`` is None for one that has no process.

        Raises the exception of `kill` in its place if it was killed, also before it began, or when it just ended.
        """
        with self._lock:
            self._running[task_id] = admission
            ending = self._killed.get(task_id)
        try:
            if ending is not None and admission is not None:
                admission.abort("the task was terminated before it began")
            if ending is None:
                yield
        except Exception:
            if task_id not in self._killed:
                raise
        finally:
            with self._lock:
                self._running.pop(task_id, None)
                ending = self._killed.pop(task_id, None)
        if ending is not None:
            raise ending


class Kills(Protocol):
    """The installation whose tasks are confined."""

    def kill(self, task: Any, task_id: str, ending: Exception) -> bool:
        """Kill the body of a task if this process runs it in an executor process; return whether it does."""


class _Killing:
    """What a `Request` of Celery does differently for a confined task."""

    _kills: Kills

    def terminate(self: Any, pool: Any, signal: Any = None) -> None:
        """End the task, which was revoked. Its process is killed, whatever the signal."""
        if not self._kills.kill(self.task, self.id, Ignore("it was revoked")):
            super().terminate(pool, signal)  # type: ignore[misc]
        elif self.time_start:
            self._announce_revoked("terminated", True, _signals.signum(signal or TERM_SIGNAME), False)
        else:
            self._terminate_on_ack = pool, signal

    def cancel(self: Any, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """End the task, because the worker shuts down or lost its broker."""
        ending = (
            Reject("it was cancelled", requeue=True) if self.task.acks_late else Ignore("it was cancelled")
        )
        if not self._kills.kill(self.task, self.id, ending):
            super().cancel(pool, signal, emit_retry)  # type: ignore[misc]
        elif self.time_start:
            self._announce_cancelled(emit_retry=emit_retry)


def killing_request(base: object, kills: Kills) -> type:
    """Return the class of a task's requests, made from the task's own."""
    own = symbol_by_name(base)
    if issubclass(own, _Killing):
        return type(own.__name__, (own,), {"_kills": kills})
    return type(own.__name__, (_Killing, own), {"_kills": kills})
