"""Work that runs in an executor process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

from rcon_plugins.confinement.admission.base import Admission, Finished, Host
from rcon_plugins.errors import KernelError
from rcon_plugins.executors.executor import SOFT_MEMORY, SOFT_TIME
from rcon_plugins.executors.process import DEATH_SECONDS, LOGGER
from rcon_plugins.kernel.cgroup import Resources
from rcon_plugins.kernel.events import watcher_of_process
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.memory import Memory
from rcon_plugins.usage import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.executors.pool import ExecutorPool
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup, Reading
    from rcon_plugins.kernel.events import Event, Watch
    from rcon_plugins.work import Work

_Number = TypeVar("_Number", int, float)

#: How long a work that is aborted has to end by itself before it is killed, seconds.
ABORT_GRACE = 0.2
#: An executor process that still holds this much of its own memory limit after a work is replaced.
_HEAVY = 0.5
_LEFT_BEHIND = "its work left processes behind"


class ProcessAdmission(Admission):
    """Work that runs in an executor process, at the other end of `channel`.

    On its deadline the supervisor ends and concludes the work by itself, whatever the thread that serves it is waiting
    for. ``on_deadline``, where set, is called then, in the supervisor's thread, to wake that thread up.
    """

    def __init__(
        self, host: Host, work: Work, reservation: Reservation, pool: ExecutorPool, executor: Executor
    ) -> None:
        super().__init__(host, work, reservation)
        #: The way to the executor process, which waits for the first frame of this work.
        self.channel = executor.channel
        self.on_deadline: Callable[[], object] | None = None
        self._pool = pool
        self._executor = executor
        self._own_memory: Memory | None = None
        self._warned = False
        #: Why the host stopped the work; None where it did not.
        self._cause: Literal["timeout", "aborted", "protocol"] | None = None
        self._threads_left = False
        self._watch: Watch | None = None
        self._settled = False
        self._concluding = threading.Lock()
        self._before = executor.reading

    @classmethod
    def begin(
        cls,
        host: Host,
        work: Work,
        reservation: Reservation,
        pool: ExecutorPool,
        identity: Identity | None,
        memory: int | None = None,
    ) -> ProcessAdmission:
        """Take an executor process of the pool, and set the limits and the deadline of this work.

        ``memory`` is in bytes and replaces ``each.memory`` for this work alone. Raises what `ExecutorPool.take` raises,
        and `KernelError` where a limit cannot be set; the executor process is ended then.
        """
        executor = pool.take(host.name, host.policy, identity)
        admission = cls(host, work, reservation, pool, executor)
        try:
            admission._set_limits(memory)
        except BaseException:
            admission._settle()
            pool.discard(executor, "the limits of its work could not be set")
            executor.channel.close()
            raise
        return admission

    def _set_limits(self, memory: int | None) -> None:
        executor, each = self._executor, self.policy.each
        if not executor.uses and self.policy.pids is not None:
            self.host.pids_limit_hits = self._pids_limit_hits()
        self._before = executor.begin_work()
        if memory is not None:
            self._own_memory = Memory(memory)
            executor.leaf.configure(Resources(memory_max=memory, swap_max=each.swap))
        if each.timeout_soft is not None:
            executor.set_deadline(self._started + each.timeout_soft, self._warn_of_time)
        else:
            self._set_deadline()
        if each.memory_soft is not None:
            self._watch = watcher_of_process().add(
                executor.leaf, self._warn_of_memory, kinds=(), thresholds=(each.memory_soft,)
            )

    @property
    def group(self) -> Cgroup:
        """The cgroup of the confinement, which holds the executor process's own."""
        return self._executor.group

    @property
    def executor_pid(self) -> int:
        """The pid of the executor process."""
        return self._executor.pid

    def leaves_threads(self) -> None:
        """Note that threads go on which the work started in its process: they are left behind, like processes."""
        self._threads_left = True

    def notify(self, number: int) -> None:
        """Send the work a signal that its service expects: `SOFT_TIME`, `SOFT_MEMORY`, or one between the two.

        It may come too late for this work, so the executor process serves no other. Safe in a signal handler.
        """
        if not self._settled:
            self._warned = True
            self._pool.processes.notify(self._executor, number)

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        if self.outcome is not None:
            return self.outcome
        if not self._settle():
            return self.died()  # it ran into its deadline just now
        executor = self._executor
        try:
            reading = executor.read()
            unfit = self._why_unfit(reading)
        except KernelError:
            return self.died()  # its cgroup is gone or cannot be read: the executor cannot serve again
        executor.reading = reading
        if unfit is None:
            self._pool.give_back(executor)
        elif unfit == _LEFT_BEHIND and ending == "ok" and self.policy.leave_children:
            self._pool.leave(executor)
        else:
            self._replace(unfit)
        if ending == "error" and self._hit_pids_limit(reading):
            return self._conclude(
                "pids",
                self._usage(reading),
                limit=self._limit("pids"),
                detail=detail or f"{self.work.name}: no more processes or threads may be started",
            )
        limit = "max_result" if ending == "result" else None
        return self._conclude(ending, self._usage(reading), limit=limit, detail=detail)

    def died(self) -> Outcome:
        """Conclude work whose channel is closed: find out how its executor process ended."""
        self._settle()
        executor = self._executor
        if not executor.ended.wait(DEATH_SECONDS) and executor.kill_reason is None:
            self._cause = "protocol"
            self._pool.processes.kill(executor, "it broke the protocol")
            executor.ended.wait(DEATH_SECONDS)
        outcome = self._conclude_end()
        executor.channel.close()
        return outcome

    def abandon(self, detail: str) -> None:
        """Have the supervisor stop the work soon, and conclude it. For a host that has no time to wait for that."""
        if self._settle():
            self._cause = "aborted"
            self._pool.processes.submit(partial(self._end_abandoned, detail))

    def _end_abandoned(self, detail: str) -> None:
        self._pool.processes.kill(self._executor, "its work was abandoned")
        self._conclude_end(detail)
        self._executor.channel.close()

    def abort(self, detail: str) -> Outcome:
        executor = self._executor
        if self._settle():
            self._cause = "aborted"
            executor.channel.refuse()
            if not executor.ended.wait(ABORT_GRACE):
                self._pool.processes.kill(executor, "its work was aborted")
        executor.ended.wait(DEATH_SECONDS)
        outcome = self._conclude_end(detail)
        executor.channel.close()
        return outcome

    def _settle(self) -> bool:
        """Settle that the work is over. Return False if that was settled before."""
        with self._executor.lock:
            if self._settled:
                return False
            self._settled = True
            self._executor.deadline = None
        if self._watch is not None:
            self._watch.close()
        return True

    def _set_deadline(self) -> None:
        if self.policy.each.timeout is not None:
            self._executor.set_deadline(self._started + self.policy.each.timeout, self._time_out)

    def _warn_of_time(self) -> None:
        """In the supervisor: the soft time limit is reached."""
        self._set_deadline()
        self.notify(SOFT_TIME)

    def _warn_of_memory(self, _: Event) -> None:
        """In the watcher's thread: the soft memory limit is reached."""
        self.notify(SOFT_MEMORY)

    def _time_out(self) -> None:
        """In the supervisor: the deadline has come."""
        if not self._settle():
            return
        self._cause = "timeout"
        self._pool.processes.kill(self._executor, "its work reached its time limit")
        self._executor.when_ended(self._conclude_end)
        if self.on_deadline is not None:
            self.on_deadline()

    def _replace(self, reason: str) -> None:
        """End the executor process, which must not serve again, and have its successor made."""
        executor = self._executor
        self._pool.replace(executor, reason)
        if reason == _LEFT_BEHIND:
            # What the work started ends before anybody learns that the work is over, if that is soon.
            executor.ended.wait(DEATH_SECONDS)
        executor.channel.close()

    def _why_unfit(self, reading: Reading) -> str | None:
        """Why the executor process must not serve again; None if it may. Raises `KernelError`."""
        executor = self._executor
        if self._threads_left or not executor.is_alone(reading):
            return _LEFT_BEHIND
        if self._warned:
            return "it was warned of a limit"
        if executor.outdated:
            return "the limits of its policy were changed"
        if executor.uses >= self.policy.max_uses:
            return "it served max_uses"
        if self._own_memory is not None or (executor.monitored is not None and executor.monitored.changed):
            return "its limits were changed for its last work"
        most = self._own_memory or self.policy.each.memory or self.policy.memory
        held = reading.memory_current
        if most is not None and held is not None and held > _HEAVY * most:
            return "it holds much of its memory limit"
        return None

    def _conclude_end(self, detail: str = "") -> Outcome:
        """Find out how the work ended, and conclude it, unless that was done before."""
        with self._concluding:
            if self.outcome is not None:
                return self.outcome
            executor, work = self._executor, self.work.name
            self._pool.replace(executor, "it died")
            usage = self._usage(self._last_reading())
            if self._cause == "timeout":
                limit = f"wall time limit {self.policy.each.timeout} reached"
                return self._conclude("timeout", usage, limit="each.timeout", detail=f"{work}: {limit}")
            if self._cause == "aborted":
                return self._conclude("aborted", usage, detail=detail)
            if _rose(self._before.oom_kills, executor.reading.oom_kills):
                return self._out_of_memory(usage)
            return self._killed(usage)

    def _last_reading(self) -> Reading:
        try:
            self._executor.reading = self._executor.read()
        except KernelError:
            # Its cgroup is gone: what was read last is all there is to be known.
            LOGGER.debug("%s cannot be read any more", self._executor.leaf.path)
        return self._executor.reading

    def _out_of_memory(self, usage: Usage) -> Outcome:
        limit = self._limit("memory")
        memory = self._memory(limit)
        bound = "of the machine" if memory is None else memory.describe()
        detail = f"memory limit {bound} reached, peak {_mebibytes(usage.memory_peak)}"
        return self._conclude("memory", usage, limit=limit, detail=f"{self.work.name}: {detail}")

    def _killed(self, usage: Usage) -> Outcome:
        executor, number = self._executor, None
        status = executor.status
        if self._cause == "protocol":
            how = "broke off the conversation"
        elif not executor.ended.is_set():
            how = f"({executor.pid}) was killed and does not end"
        elif status is None:
            how = "ended"
        elif os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            how = f"was ended by a signal: {signal.strsignal(number)}"
        else:
            how = f"ended with exit status {os.waitstatus_to_exitcode(status)}"
        detail = f"{self.work.name}: its process {how}"
        return self._conclude("killed", usage, signal_number=number, detail=detail)

    def _memory(self, limit: str) -> Memory | None:
        """The limit ``memory`` or ``each.memory`` that is in force."""
        monitored = self._executor.monitored
        if self._own_memory is not None and limit == "each.memory":
            return self._own_memory
        now = monitored.memory(limit) if monitored is not None else None
        policy = self.host.policy  # as it is now
        return now or (policy.each.memory if limit == "each.memory" else policy.memory)

    def _limit(self, name: Literal["memory", "pids"]) -> str:
        """The limit that was hit: that of the single work, or that of all together."""
        each: int | None
        together: int | None
        if name == "memory":
            of_each, of_all = self._memory("each.memory"), self._memory("memory")
            each = None if of_each is None else of_each.most
            together = None if of_all is None else of_all.most
        else:
            each, together = self.host.policy.each.pids, self.host.policy.pids
        if each is None:
            return name
        if together is None:
            return f"each.{name}"
        reading = self._executor.reading
        reached = reading.memory_peak if name == "memory" else reading.pids_limit_hits
        least = each * 0.95 if name == "memory" else (self._before.pids_limit_hits or 0) + 1
        return f"each.{name}" if reached is not None and reached >= least else name

    def _hit_pids_limit(self, reading: Reading) -> bool:
        if _rose(self._before.pids_limit_hits, reading.pids_limit_hits):
            return True
        if self.policy.pids is None:
            return False
        # Since 6.11 a hit is counted where the limit is: in the cgroup of all the work together.
        before, hits = self.host.pids_limit_hits, self._pids_limit_hits()
        self.host.pids_limit_hits = hits
        return before is not None and _rose(before, hits)

    def _pids_limit_hits(self) -> int | None:
        """Forks refused by the limit of all the work together; None if it cannot be told."""
        try:
            return self._executor.group.read().pids_limit_hits
        except KernelError:
            return None  # its last leaf is gone, and so is it

    def _usage(self, reading: Reading) -> Usage:
        before, peak, memory = self._before, reading.memory_peak, self._memory("memory")
        if peak is not None and memory is not None:
            # The limit is on the cgroup above: the kernel counts a batch of pages here before that refuses them.
            peak = min(peak, int(memory.most))
        return Usage(
            wall_seconds=time.monotonic() - self._started,
            cpu_seconds=_spent(before.cpu_seconds, reading.cpu_seconds),
            memory_peak=peak,
            io_read_bytes=_spent(before.io_read_bytes, reading.io_read_bytes),
            io_write_bytes=_spent(before.io_write_bytes, reading.io_write_bytes),
        )


def _rose(before: int | None, after: int | None) -> bool:
    return after is not None and after > (before or 0)


def _spent(before: _Number | None, after: _Number | None) -> _Number | None:
    if after is None:
        return None
    return after if before is None else after - before


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"
