"""Work that runs in an executor thread of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from rcon_plugins.confinement.admission.base import Finished, Host, LocalAdmission
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.thread import ThreadExecutor, ThreadExecutors
    from rcon_plugins.work import Work

_Result = TypeVar("_Result")


class ThreadAdmission(LocalAdmission):
    """Admission of work that runs in a thread of this process, which stays confined until it ends."""

    def __init__(
        self,
        host: Host,
        work: Work,
        reservation: Reservation,
        threads: ThreadExecutors,
        executor: ThreadExecutor,
    ) -> None:
        """``executor`` was taken from ``threads``, and is returned there when the work is concluded."""
        super().__init__(host, work, reservation)
        self._threads = threads
        self._executor = executor
        self._context: Context | None = None
        self._cpu_before = executor.cpu_seconds

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Call ``function`` in the executor thread and wait for it. Raise what it raises.

        All calls of one unit of work share a copy of the first caller's context (`contextvars`). They see what the
        serving thread had set and what an earlier call set, as in one thread; no other work sees it.

        After the conclusion it may still be called, for cleanup: it runs in another thread of the same kind then.
        Raises `ConfinementError` if the executor thread ended, or if no thread is available.
        """
        if self.outcome is None:
            self.ran = True
            return self._call_in(self._executor, function, arguments)
        executor = self._threads.take(self._executor.key, self._executor.prepare)
        try:
            return self._call_in(executor, function, arguments)
        finally:
            self._threads.give_back(executor)

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        return self.outcome or self._give_back(ending, detail)

    def abort(self, detail: str) -> Outcome:
        return self.outcome or self._give_back("aborted", detail)

    def refuse(self, detail: str) -> Outcome:
        return self.outcome or self._give_back("refused", f"{self.work.name}: {detail}")

    def _call_in(
        self, executor: ThreadExecutor, function: Callable[..., _Result], arguments: tuple[object, ...]
    ) -> _Result:
        context = self._context
        if context is None:
            context = self._context = copy_context()
        try:
            return executor.call(partial(context.run, function, *arguments))
        finally:
            if (
                executor.busy
            ):  # a caller left its call, which still runs in this context, so no other call can enter it
                self._context = context.copy()

    def _give_back(self, ending: Finished | Literal["aborted", "refused"], detail: str) -> Outcome:
        executor = self._executor
        usage = Usage(
            wall_seconds=time.monotonic() - self._started,
            cpu_seconds=executor.cpu_seconds - self._cpu_before,
        )
        self._threads.give_back(executor)
        return self._conclude(ending, usage, detail=detail)
