"""A test double for the manager that needs no cgroups: real processes, real channels, no limits.

It behaves like the real manager towards a host: an executor waits for the first frame of a request and returns to the
pool when the request is finished; `died` and `abort` report its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from rcon_plugins.confinement.admission import ProcessAdmission, ThreadAdmission
from rcon_plugins.confinement.queue import Reservation
from rcon_plugins.ending import Ending
from rcon_plugins.executors.channel import Channel, ChannelClosed, Frame
from rcon_plugins.executors.thread import ThreadExecutors
from rcon_plugins.outcome import Outcome
from rcon_plugins.work import Work

GRACE = 0.5


class Executor:
    """A forked process that serves one request after the other."""

    def __init__(self, service: Callable[[Channel, Frame], None], foreign: list[Executor]) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                for other in foreign:
                    other.channel.close()
                self._serve(service, Channel(theirs))
            finally:
                os._exit(0)
        theirs.close()

    def _serve(self, service: Callable[[Channel, Frame], None], channel: Channel) -> None:
        try:
            while True:
                service(channel, channel.receive())
        except ChannelClosed:
            return
        except BaseException:
            traceback.print_exc(file=sys.stderr)

    def stop(self, grace: float = 0.0) -> int:
        """Wait for the end of the process, and kill it after the grace period. Return the wait status."""
        watch = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        if not poll.poll(grace * 1000):
            os.kill(self.pid, signal.SIGKILL)
        os.close(watch)
        self.channel.close()
        return os.waitpid(self.pid, 0)[1]


class Admission:
    """One request that may run, in the calling thread."""

    policy = SimpleNamespace(name="double")
    key = None
    name = "double"

    def __init__(self, manager: Manager, executor: Executor | None, work: Work) -> None:
        self._manager = manager
        self._executor = executor
        self.work = work
        self.outcome: Outcome | None = None
        self.depth = 0
        self.ran = False

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self._manager.inside += 1
        try:
            yield
        finally:
            self._manager.inside -= 1

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        with self.entered():
            self.ran = True
            return function(*arguments)

    def finish(self, ending: Ending = "ok", detail: str = "") -> Outcome:
        if self.outcome is None:
            self._settle(self._manager.verdict(Outcome(ending=ending, policy="double", detail=detail)))
            if self._executor is not None:
                self._manager.give_back(self._executor)
        assert self.outcome is not None
        return self.outcome

    def died(self) -> Outcome:
        if self.outcome is None:
            assert self._executor is not None
            status = self._executor.stop()
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            dead = Outcome(ending="killed", policy="double", signal=number, detail=f"wait status {status}")
            self._settle(self._manager.verdict(dead))
        assert self.outcome is not None
        return self.outcome

    def abort(self, detail: str) -> Outcome:
        if self.outcome is None:
            if self._executor is not None:
                self._executor.channel.refuse()
                self._executor.stop(GRACE)
            self._settle(self._manager.verdict(Outcome(ending="aborted", policy="double", detail=detail)))
        assert self.outcome is not None
        return self.outcome

    def refuse(self, detail: str) -> Outcome:
        self._settle(Outcome(ending="refused", policy="double", detail=detail))
        assert self.outcome is not None
        return self.outcome

    def _settle(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._manager.outcomes.append(outcome)


class InProcess(Admission, ProcessAdmission):  # type: ignore[misc]
    """One request that may run, in a forked process."""

    def __init__(self, manager: Manager, executor: Executor, work: Work) -> None:
        super().__init__(manager, executor, work)
        self.channel = executor.channel


class Manager:
    """Admits every request, one at a time."""

    def __init__(self, isolation: str = "process") -> None:
        self.isolation = isolation
        self.inside = 0
        self.outcomes: list[Outcome] = []
        self.verdict: Callable[[Outcome], Outcome] = lambda outcome: outcome
        self.refuse: Exception | None = None
        self.works: list[Work] = []
        self._service: Any = None
        self._idle: list[Executor] = []
        self._threads = ThreadExecutors(16)
        self._lock = threading.Lock()

    def start(self, service: Callable[[Channel, Frame], None]) -> None:
        self._service = service
        if self.isolation == "process":
            self._idle.append(Executor(service, []))

    def admit(self, work: Work) -> Any:  # an Admission, or for threads a real ThreadAdmission
        self.works.append(work)
        if self.refuse is not None:
            raise self.refuse
        if self.isolation == "inline":
            return Admission(self, None, work)
        if self.isolation == "thread":
            host: Any = SimpleNamespace(
                policy=Admission.policy, key=None, name="double", conclude=self._conclude
            )
            thread = self._threads.take(("double", None), lambda: None)
            return ThreadAdmission(host, work, Reservation(), self._threads, thread)
        with self._lock:
            executor = self._idle.pop() if self._idle else Executor(self._service, self._idle)
        return InProcess(self, executor, work)

    def _conclude(self, admission: ThreadAdmission) -> None:
        """Record the outcome of an admission of a thread."""
        assert admission.outcome is not None
        self.outcomes.append(self.verdict(admission.outcome))

    def give_back(self, executor: Executor) -> None:
        with self._lock:
            self._idle.append(executor)

    def close(self) -> None:
        self._threads.close()
        while self._idle:
            executor = self._idle.pop()
            executor.channel.close()
            executor.stop(1.0)

    def wait_for_outcome(self, timeout: float = 5.0) -> Outcome:
        """Return the next outcome. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while not self.outcomes:
            if time.monotonic() > end:
                raise TimeoutError("no work was settled")
            time.sleep(0.005)
        return self.outcomes.pop(0)
