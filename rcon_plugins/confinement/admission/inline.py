"""Work that runs in threads of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rcon_plugins.confinement.admission.base import Admission, Finished, Host
from rcon_plugins.outcome import Outcome
from rcon_plugins.usage import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.confinement import ThreadedConfinement
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.inline import InlineExecutor
    from rcon_plugins.work import Work


_Result = TypeVar("_Result")


class InlineAdmission(Admission):
    """Work that runs in threads of this process, inside `entered` blocks."""

    isolation = "inline"
    confinement: ThreadedConfinement

    def __init__(
        self, host: Host, work: Work, confinement: ThreadedConfinement, reservation: Reservation
    ) -> None:
        super().__init__(host, work, confinement, reservation)
        self._cpu_seconds = 0.0
        #: Whether any of the work ran.
        self.ran = False

    def entered(self) -> _Stay:
        """A context manager: inside it the calling thread is confined. May be used again for the same work.

        Raises `KernelError` on entering where the thread cannot be moved; the block does not run then.
        """
        return _Stay(self)

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Call ``function`` confined, in the calling thread. Raises what it raises; ``ran`` tells if it was called."""
        with self.entered():
            self.ran = True
            return function(*arguments)

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        return self._outcome or self._conclude(ending, self._usage(), detail=detail)

    def died(self) -> Outcome:
        raise TypeError("inline work has no executor that could die")

    def abort(self, detail: str) -> Outcome:
        return self._outcome or self._conclude("aborted", self._usage(), detail=detail)

    def spent(self, cpu_seconds: float) -> None:
        """Count CPU time of a stay."""
        self._cpu_seconds += cpu_seconds

    def _usage(self) -> Usage:
        return Usage(wall_seconds=time.monotonic() - self._started, cpu_seconds=self._cpu_seconds)


class _Stay:
    """A thread's stay in the cgroup of a confinement."""

    __slots__ = ("_admission", "_cpu", "_executor")

    def __init__(self, admission: InlineAdmission) -> None:
        self._admission = admission
        self._executor: InlineExecutor | None = None
        self._cpu = 0.0

    def __enter__(self) -> None:
        self._executor = self._admission.confinement.enter()
        self._cpu = time.thread_time()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admission.spent(time.thread_time() - self._cpu)
        if self._executor is not None:
            self._executor.leave()
