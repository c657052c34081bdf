"""Work that runs in the calling thread, which is in the cgroup during a block."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rcon_plugins.confinement.admission.base import Finished, Host, LocalAdmission
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.inline import InlineExecutor
    from rcon_plugins.work import Work

_Result = TypeVar("_Result")


class InlineAdmission(LocalAdmission):
    """Admission of work that runs in threads of this process, inside `entered` blocks."""

    def __init__(
        self, host: Host, work: Work, reservation: Reservation, enter: Callable[[], InlineExecutor | None]
    ) -> None:
        """``enter`` moves the calling thread into the cgroup, and returns the executor that moves it out again."""
        super().__init__(host, work, reservation)
        self._enter = enter
        self._cpu_seconds = 0.0

    def entered(self) -> _Stay:
        """Return a context manager that confines the calling thread. Use it as often as the work needs.

        Raises `KernelError` on entry if the thread cannot be moved. The block does not run then.
        """
        return _Stay(self, self._enter)

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        with self.entered():
            self.ran = True
            return function(*arguments)

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        return self.outcome or self._conclude(ending, self._usage(), detail=detail)

    def abort(self, detail: str) -> Outcome:
        return self.outcome or self._conclude("aborted", self._usage(), detail=detail)

    def add_cpu_time(self, seconds: float) -> None:
        """Add the CPU time of one block."""
        self._cpu_seconds += seconds

    def _usage(self) -> Usage:
        return Usage(wall_seconds=time.monotonic() - self._started, cpu_seconds=self._cpu_seconds)


class _Stay:
    """Context manager that keeps one thread in the cgroup of a confinement for one block."""

    __slots__ = ("_admission", "_cpu", "_enter", "_executor")

    def __init__(self, admission: InlineAdmission, enter: Callable[[], InlineExecutor | None]) -> None:
        self._admission = admission
        self._enter = enter
        self._executor: InlineExecutor | None = None
        self._cpu = 0.0

    def __enter__(self) -> None:
        self._executor = self._enter()
        self._cpu = time.thread_time()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._admission.add_cpu_time(time.thread_time() - self._cpu)
        if self._executor is not None:
            self._executor.leave()
