"""Work that runs in an executor process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.confinement.admission.base import Admission, Finished, Host
from rcon_plugins.ending import (
    Bounds,
    Cause,
    End,
    LimitsInForce,
    Snapshot,
    explain_end,
    kills_between,
    pids_detail,
    pids_limit_hit,
    with_oom_kills,
)
from rcon_plugins.errors import KernelError
from rcon_plugins.executors.executor import SOFT_MEMORY, SOFT_TIME
from rcon_plugins.executors.oom import REASON as OOM_REASON
from rcon_plugins.executors.process import DEATH_SECONDS
from rcon_plugins.executors.records import RecordPipe
from rcon_plugins.kernel.cgroup import Reading, Resources
from rcon_plugins.kernel.events import watcher_of_process
from rcon_plugins.kernel.files import gone
from rcon_plugins.outcome import Outcome
from rcon_plugins.settings.memory import Memory
from rcon_plugins.settings.units import format_duration
from rcon_plugins.work import Usage

if TYPE_CHECKING:
    from rcon_plugins.confinement.queue import Reservation
    from rcon_plugins.executors.executor import Executor
    from rcon_plugins.executors.pool import ExecutorPool
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.kernel.events import Event, Watch
    from rcon_plugins.work import Work

#: How long aborted work may take to end by itself before it is killed, seconds.
ABORT_GRACE = 0.2
_LEFT_BEHIND = "the request or task left processes behind"
_KEEPS_MEMORY = "it keeps much of its memory limit"


class ProcessAdmission(Admission):
    """Work that runs in an executor process, at the other end of `channel`.

    At the deadline the supervisor kills and concludes the work itself, without waiting for the thread that serves it.
    It then calls ``on_deadline``, if set, in its own thread, to wake the serving thread.
    """

    def __init__(
        self, host: Host, work: Work, reservation: Reservation, pool: ExecutorPool, executor: Executor
    ) -> None:
        super().__init__(host, work, reservation)
        #: The channel to the executor process, which waits for the first frame of this work.
        self.channel = executor.channel
        self.on_deadline: Callable[[], object] | None = None
        self._pool = pool
        self._executor = executor
        self._own_memory: Memory | None = None
        self._warned = False
        #: The reason why the host stopped the work; None if it did not.
        self._cause: Cause | None = None
        #: When SIGKILL follows SIGTERM (`time.monotonic`), and whether it was needed. None: no grace has begun.
        self._grace_ends: float | None = None
        self._needed_kill: bool | None = None
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
        """Take an executor process from the pool, and set the limits and the deadline of this work.

        ``memory`` is in bytes and replaces ``each.memory`` for this work alone. Raises what `ExecutorPool.take` raises.
        Raises `KernelError` if a limit cannot be set, and kills the executor process.
        """
        executor = pool.take(host.name, host.policy, identity)
        admission = cls(host, work, reservation, pool, executor)
        try:
            admission._begin(memory)
        except BaseException:
            admission._settle()
            pool.discard(executor, "its limits could not be set")
            executor.channel.close()
            raise
        return admission

    def _begin(self, memory: int | None) -> None:
        executor, policy = self._executor, self.policy
        each = policy.each
        if policy.pids is not None and not executor.uses:
            self.host.pids_limit_hits = self._pids_limit_hits()
        seconds, action = each.timeout, self._time_out
        if each.timeout_soft is not None:
            seconds, action = each.timeout_soft, self._warn_of_time
        deadline = None if seconds is None else self._started + seconds
        self._before = executor.begin_work(deadline, action)
        if memory is not None:
            self._own_memory = Memory(memory)
            executor.leaf.configure(Resources(memory_max=memory, swap_max=each.swap))
        if each.memory_soft is not None:
            self._watch = watcher_of_process().add(
                executor.leaf, self._warn_of_memory, kinds=(), thresholds=(each.memory_soft,)
            )

    @property
    def group(self) -> Cgroup:
        """The cgroup of the confinement. The executor process's own cgroup is below it."""
        return self._executor.group

    @property
    def executor_pid(self) -> int:
        """The pid of the executor process."""
        return self._executor.pid

    def label_records(self, number: bytes, fields: Mapping[str, str]) -> None:
        """Have log records that the work sends with this number carry these fields, in the caller's context."""
        output = self._executor.output
        if isinstance(output, RecordPipe):
            output.label(number.hex(), fields)

    def leaves_threads(self) -> None:
        """Note that threads of the work still run in its process. They count as left behind, like processes."""
        self._threads_left = True

    def notify(self, number: int) -> None:
        """Send the work a signal that its service handles: `SOFT_TIME` or `SOFT_MEMORY`.

        The signal may arrive after this work, so the executor process serves no other work. Safe in a signal handler.
        """
        if not self._settled:
            self._warned = True
            self._pool.processes.notify(self._executor, number)

    def finish(self, ending: Finished = "ok", detail: str = "") -> Outcome:
        if self.outcome is not None:
            return self.outcome
        if not self._settle():
            return self.died()  # the deadline has just passed
        executor = self._executor
        try:
            reading = executor.end_work()
            unfit = self._why_unfit(reading)
        except KernelError as error:
            if gone(error):
                return self.died()
            # The work is done; only its usage is unknown, and whether it left processes behind.
            reading, unfit = Reading(), f"its cgroup could not be read: {error}"
        usage = self._usage(reading)
        if usage.oom_kills and executor.guarded:
            self._pool.processes.kill(executor, OOM_REASON)
            return self.died()  # what it answered after an OOM kill does not count
        left_behind = 0
        if unfit is None:
            self._pool.give_back(executor)
        elif unfit == _LEFT_BEHIND and ending == "ok" and self.policy.leave_children:
            self._pool.leave(executor)
        else:
            left_behind = self._left_behind() if unfit == _LEFT_BEHIND else 0
            self._replace(unfit)
        if ending == "ok" and not (usage.oom_kills or left_behind):
            return self._conclude(ending, usage, detail=detail)
        end = End(ending, "max_result" if ending == "result" else None, detail=detail)
        if ending == "error" and (hit := self._pids_limit_hit(reading)) is not None:
            bounds = Bounds(self.policy.each.pids, self.policy.pids)
            # Its own words: the exception, or the status that it answered with.
            own = f" ({detail})" if detail else ""
            end = End("pids", hit, detail=f"{self.work.name}: {pids_detail(hit, bounds)}{own}")
        if usage.oom_kills:
            detail = with_oom_kills(end.detail or f"{self.work.name}: ", usage.oom_kills, end.ending)
            end = end._replace(detail=detail)
        if left_behind and end.ending in ("ok", "error"):
            sentence = left_behind_detail(left_behind, self._threads_left, self.policy.leave_children)
            separator = "; " if end.detail else f"{self.work.name}: "
            end = end._replace(detail=f"{end.detail}{separator}{sentence}")
        return self._conclude(end.ending, usage, limit=end.limit, detail=end.detail, left_behind=left_behind)

    def _left_behind(self) -> int:
        """Return how many processes the work left behind and that still run; threads count as one."""
        try:
            others = len(self._executor.leaf.processes()) - 1
        except KernelError:
            others = 0  # the cgroup is gone
        return max(others, int(self._threads_left))

    def died(self) -> Outcome:
        """Conclude work whose channel is closed, by the way its executor process ended."""
        self._settle()
        executor = self._executor
        if self._grace_ends is not None:
            executor.channel.hang_up()  # a process that has handled SIGTERM and gone on ends now
            executor.ended.wait(max(0.0, self._grace_ends - time.monotonic()))
        if not executor.ended.wait(DEATH_SECONDS) and executor.kill_reason is None:
            self._cause = "protocol"
            self._pool.processes.kill(executor, "it violated the protocol")
            executor.ended.wait(DEATH_SECONDS)
        outcome = self._conclude_end()
        executor.channel.close()
        return outcome

    def abandon(self, detail: str) -> None:
        """Have the supervisor stop and conclude the work soon. For a host that cannot wait for that."""
        if self._settle():
            self._cause = "aborted"
            self._pool.processes.submit(partial(self._end_abandoned, detail))

    def _end_abandoned(self, detail: str) -> None:
        self._pool.processes.kill(self._executor, "the request or task was abandoned")
        self._conclude_end(detail)
        self._executor.channel.close()

    def abort(self, detail: str) -> Outcome:
        executor = self._executor
        if self._settle():
            self._cause = "aborted"
            executor.channel.refuse()
            if not executor.ended.wait(ABORT_GRACE):
                self._pool.processes.kill(executor, "the request or task was aborted")
        executor.ended.wait(DEATH_SECONDS)
        outcome = self._conclude_end(detail)
        executor.channel.close()
        return outcome

    def _settle(self) -> bool:
        """Mark the work as over. Return False if it already was."""
        with self._executor.lock:
            if self._settled:
                return False
            self._settled = True
            self._executor.deadline = None
        if self._watch is not None:
            self._watch.close()
        return True

    def _warn_of_time(self) -> None:
        """Signal the work that its soft time limit is reached. Called in the supervisor's thread."""
        if self.policy.each.timeout is not None:
            self._executor.set_deadline(self._started + self.policy.each.timeout, self._time_out)
        self.notify(SOFT_TIME)

    def _warn_of_memory(self, _: Event) -> None:
        """Signal the work that its soft memory limit is reached. Called in the watcher's thread."""
        self.notify(SOFT_MEMORY)

    def _time_out(self) -> None:
        """Kill the executor process at the deadline. Called in the supervisor's thread."""
        if not self._settle():
            return
        self._cause = "timeout"
        reason = "the request or task reached its time limit"
        if (grace := self.policy.each.grace) is None:
            self._pool.processes.kill(self._executor, reason)
        else:
            self._needed_kill, self._grace_ends = False, time.monotonic() + grace
            self._executor.set_deadline(self._grace_ends, self._end_grace)
            self._pool.processes.terminate(self._executor, reason)
        self._executor.when_ended(self._conclude_end)
        if self.on_deadline is not None:
            self.on_deadline()

    def _end_grace(self) -> None:
        """Kill what is left of work that was told to end. Called in the supervisor's thread."""
        try:
            self._needed_kill = self._executor.leaf.has_processes()
        except KernelError:
            self._needed_kill = True  # unknown
        self._pool.processes.kill(self._executor, "the grace of the task is over")

    def _replace(self, reason: str) -> None:
        """End the executor process, which must not serve again, and have its replacement spawned."""
        executor = self._executor
        self._pool.replace(executor, reason, in_order=reason != _LEFT_BEHIND)
        if reason in (_LEFT_BEHIND, _KEEPS_MEMORY):
            # Wait a short time, so that processes left by the work have ended before the work is reported as over, and
            # the next work has the memory of this one.
            executor.ended.wait(DEATH_SECONDS)
        executor.channel.close()

    def _why_unfit(self, reading: Reading) -> str | None:
        """Return why the executor process must not serve again; None if it may. Raises `KernelError`."""
        executor = self._executor
        if self._threads_left or (reading.pids_current != 1 and not executor.is_alone(reading)):
            return _LEFT_BEHIND
        if self._warned:
            return "it received a soft limit signal"
        if executor.outdated:
            return "the limits of its policy were changed"
        if executor.uses >= self.policy.max_uses:
            return "it served max_uses"
        if self._own_memory is not None or (executor.monitored is not None and executor.monitored.changed):
            return "its limits were changed for its last request or task"
        most = self._own_memory or self.policy.each.memory or self.policy.memory
        held = reading.memory_current
        if (
            most is not None
            and held is not None
            and self._pool.kept_memory.is_too_much(executor, held, most.limit)
        ):
            return _KEEPS_MEMORY
        return None

    def _conclude_end(self, detail: str = "") -> Outcome:
        """Conclude the work by the way it ended, unless it is concluded already."""
        with self._concluding:
            if self.outcome is not None:
                return self.outcome
            executor = self._executor
            self._pool.replace(executor, "it died")
            try:
                executor.reading = executor.read()
            except KernelError as error:
                if not gone(error):  # unknown; when it is gone, the last reading is the whole usage
                    executor.reading = Reading()
            reading = executor.reading
            if executor.ended.is_set() or self._cause is not None or executor.kill_reason == OOM_REASON:
                after = Snapshot(reading, Reading(memory_peak=self._group_peak()))
                timeout, grace = (
                    "" if seconds is None else format_duration(seconds)
                    for seconds in (self.policy.each.timeout, self.policy.each.grace)
                )
                limits = LimitsInForce(
                    self._memory_bounds(), timeout=timeout, grace=grace, cpu_time=self.policy.rlimits.cpu
                )
                end = explain_end(
                    Snapshot(self._before),
                    after,
                    executor.status,
                    limits,
                    cause=self._cause,
                    needed_kill=self._needed_kill,
                )
            else:
                end = End("killed", detail=f"{executor.pid} was killed and does not end")
            if end.ending != "aborted":
                how = end.detail if end.limit else f"process {end.detail}"
                detail = f"{self.work.name}: {how}"
            if end.ending == "memory":
                self._pool.kept_memory.reached_limit(executor)
            usage = self._usage(reading)
            if end.ending == "aborted":
                detail = with_oom_kills(detail, usage.oom_kills, end.ending)
            return self._conclude(
                end.ending,
                usage,
                limit=end.limit,
                signal_number=end.signal if end.ending == "killed" else None,
                detail=detail,
                needed_kill=end.needed_kill,
            )

    def _memory_limits(self) -> tuple[Memory | None, Memory | None]:
        """Return the current limits ``each.memory`` and ``memory``."""
        policy, monitored = self.host.policy, self._executor.monitored
        each, group = policy.each.memory, policy.memory
        if monitored is not None:
            each, group = monitored.memory("each.memory") or each, monitored.memory("memory") or group
        return self._own_memory or each, group

    def _memory_bounds(self) -> Bounds:
        each, group = self._memory_limits()
        return Bounds(
            None if each is None else each.most,
            None if group is None else group.most,
            "" if each is None else each.describe(),
            "" if group is None else group.describe(),
        )

    def _group_peak(self) -> int | None:
        try:
            return self._executor.group.read().memory_peak
        except KernelError:
            return None  # the last leaf is gone, and so is the group

    def _pids_limit_hit(self, reading: Reading) -> str | None:
        """Return the pids limit that refused a fork of this work, as the policy spells it; None without any."""
        policy, host = self.host.policy, self.host
        before, after = Snapshot(self._before), Snapshot(reading)
        if policy.pids is not None:
            # Since Linux 6.11 the kernel counts a hit in the cgroup that has the limit: that of the confinement.
            hits = self._pids_limit_hits()
            if host.pids_limit_hits is not None:
                before = before._replace(group=Reading(pids_limit_hits=host.pids_limit_hits))
                after = after._replace(group=Reading(pids_limit_hits=hits))
            host.pids_limit_hits = hits
        return pids_limit_hit(before, after, Bounds(policy.each.pids, policy.pids))

    def _pids_limit_hits(self) -> int | None:
        """Return the number of forks that the ``pids`` limit of the confinement refused; None if unknown."""
        try:
            return self._executor.group.read().pids_limit_hits
        except KernelError:
            return None  # its last leaf is gone, and so is the group

    def _usage(self, reading: Reading) -> Usage:
        before, peak, memory = self._before, reading.memory_peak, self.host.policy.memory
        if peak is not None and memory is not None and peak > memory.limit:
            # The limit is on the parent cgroup. The kernel charges pages here in batches before it refuses them.
            memory = self._memory_limits()[1] or memory
            peak = min(peak, memory.most)
        cpu, read, written = reading.cpu_seconds, reading.io_read_bytes, reading.io_write_bytes
        return Usage(
            wall_seconds=time.monotonic() - self._started,
            cpu_seconds=None if cpu is None else cpu - (before.cpu_seconds or 0),
            memory_peak=peak,
            swap_peak=reading.swap_peak,
            io_read_bytes=None if read is None else read - (before.io_read_bytes or 0),
            io_write_bytes=None if written is None else written - (before.io_write_bytes or 0),
            # The same reading again: the counters could not be read after the work.
            oom_kills=None if reading is before else kills_between(before, reading),
        )


def left_behind_detail(count: int, threads: bool, kept_after_success: bool) -> str:
    """Return the sentence for what a unit of work left behind and what was ended, with the way to keep it."""
    if threads:
        return "threads that it left behind were ended with its process; wait for them before the end"
    ended = (
        "1 process that it left behind was" if count == 1 else f"{count} processes that it left behind were"
    )
    remedy = "keeps them after a success alone" if kept_after_success else "in the policy keeps them"
    return f"{ended} ended; leave_children = true {remedy}"
