"""Work that runs in an executor thread of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from rcon_plugins.confinement.admission.base import Admission, Finished, Host
from rcon_plugins.outcome import Outcome
from rcon_plugins.usage import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.confinement import ThreadedConfinement
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.thread import ThreadExecutor, ThreadExecutors
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.work import Work

_Result = TypeVar("_Result")


class ThreadAdmission(Admission):
    """Work that runs in a thread of this process that is confined for good: whatever is given to `call`."""

    isolation = "thread"
    confinement: ThreadedConfinement

    def __init__(
        self,
        host: Host,
        work: Work,
        confinement: ThreadedConfinement,
        reservation: Reservation,
        identity: Identity | None,
        threads: ThreadExecutors,
    ) -> None:
        super().__init__(host, work, confinement, reservation)
        self._identity = identity
        self._threads = threads
        self._executor = self._take()
        self._context: Context | None = None
        self._before = self._executor.cpu_seconds
        #: Whether any of the work ran.
        self.ran = False

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Call ``function`` in the executor thread and wait for it. Raises what it raises.

        All calls of one work share a copy of the context (`contextvars`) that its first caller has: they find what the
        serving thread had set, and what a call before set, as in one thread; no other work finds it.

        After the work was concluded too, for what is left to be closed: in a thread of the same kind. Raises
        `ConfinementError` where the executor thread ended, or where there are none any more.
        """
        if self._outcome is None:
            self.ran = True
            return self._call_in(self._executor, function, arguments)
        executor = self._take()
        try:
            return self._call_in(executor, function, arguments)
        finally:
            self._threads.give_back(executor)

    def _call_in(
        self, executor: ThreadExecutor, function: Callable[..., _Result], arguments: tuple[object, ...]
    ) -> _Result:
        context = self._context
        if context is None:
            context = self._context = copy_context()
        try:
            return executor.call(partial(context.run, function, *arguments))
        finally:
            if executor.busy:  # the call was left, and goes on in this context, which nothing else can enter
                self._context = context.copy()

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        return self._outcome or self._give_back(ending, detail)

    def died(self) -> Outcome:
        raise TypeError("a thread does not die before its process")

    def abort(self, detail: str) -> Outcome:
        return self._outcome or self._give_back("aborted", detail)

    def _take(self) -> ThreadExecutor:
        key = (self.confinement.name, self._identity)
        return self._threads.take(key, partial(self.confinement.settle, self._identity))

    def _give_back(self, ending: Finished | Literal["aborted"], detail: str) -> Outcome:
        executor = self._executor
        usage = Usage(
            wall_seconds=time.monotonic() - self._started, cpu_seconds=executor.cpu_seconds - self._before
        )
        self._threads.give_back(executor)
        return self._conclude(ending, usage, detail=detail)
