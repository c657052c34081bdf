"""Work that runs in the calling thread, which is in the cgroup during a block."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from rcon_plugins.confinement.admission.base import Finished, Host, LocalAdmission
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Usage

if TYPE_CHECKING:
    from rcon_plugins.executors.inline import InlineExecutor

_Result = TypeVar("_Result")


class InlineHost(Host, Protocol):
    """A confinement that threads enter."""

    def enter(self) -> InlineExecutor | None:
        """Move the calling thread into the cgroup. Return the executor that moves it out again; None without a cgroup.

        Raises `KernelError` if the thread cannot be moved.
        """


class InlineAdmission(LocalAdmission):
    """Admission of work that runs in threads of this process, while they are in the cgroup of their confinement."""

    host: InlineHost
    _cpu_seconds = 0.0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Confine the calling thread during the block. Use it as often as the work needs.

        Raises `KernelError` on entry if the thread cannot be moved. The block does not run then.
        """
        executor = self.host.enter()
        began = time.thread_time()
        try:
            yield
        finally:
            self._leave(executor, began)

    def call(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        # Not in `entered`, which would cost each request another five calls.
        executor = self.host.enter()
        began = time.thread_time()
        try:
            self.ran = True
            return function(*arguments)
        finally:
            self._leave(executor, began)

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        return self.outcome or self._conclude(ending, self._usage(), detail=detail)

    def abort(self, detail: str) -> Outcome:
        return self.outcome or self._conclude("aborted", self._usage(), detail=detail)

    def refuse(self, detail: str) -> Outcome:
        return self.outcome or self._conclude("refused", self._usage(), detail=f"{self.work.name}: {detail}")

    def _leave(self, executor: InlineExecutor | None, began: float) -> None:
        """Count the CPU time of the calling thread since it entered, and move it out again."""
        self._cpu_seconds += time.thread_time() - began
        if executor is not None:
            executor.leave()

    def _usage(self) -> Usage:
        return Usage(wall_seconds=time.monotonic() - self._started, cpu_seconds=self._cpu_seconds)
