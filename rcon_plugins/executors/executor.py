"""One executor process, seen from the host: its states, and every transition between them.

An executor serves one policy (and key) as one identity all its life. Its `State` changes only here, under its lock:

=============  ==============================================  =========  ======================================
state          event (method)                                  next       thread
=============  ==============================================  =========  ======================================
(none)         made, just before its spawn order is sent       STARTING   of the request, or supervisor (a spare)
STARTING       READY received (`set_ready`)                    WAITING    of the request
WAITING        a unit of work begins (`begin_work`)            SERVING    of the request
SERVING        the work is over (`end_work`)                   RETURNING  of the request
RETURNING      READY received (`set_ready`)                    WAITING    of the next request
any of these   killed by the host (`set_killed`)               KILLED     any
any of these   the fork server reports its exit (`set_exited`) EXITED     supervisor
any of these   told to end, and has a grace (`set_terminated`) LEAVING    supervisor
SERVING        ends, but its children go on (`leave_children`) LEAVING    of the request
LEAVING        the fork server reports its exit (`set_exited`) LEFT       supervisor
LEAVING        killed by the host (`set_killed`)               KILLED     any
LEFT           killed by the host (`set_killed`)               EXITED     any
KILLED         the fork server reports its exit (`set_exited`) EXITED     supervisor
EXITED, LEFT   its cgroup is empty and removed (`set_ended`)   ENDED      supervisor
=============  ==============================================  =========  ======================================

An event that the table does not list for a state changes nothing. So a killed executor stays killed, even if the thread
that serves work on it calls another method meanwhile.
"""

from __future__ import annotations

import enum
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from rcon_plugins.errors import KernelError
from rcon_plugins.executors.channel import READY, Channel, ChannelClosed, ChannelTimeout
from rcon_plugins.kernel.attempts import Attempts
from rcon_plugins.kernel.files import gone
from rcon_plugins.kernel.proc import thread_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rcon_plugins.executors.output import OutputPipe
    from rcon_plugins.executors.supervisor import Supervisor
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup, Meter, Reading
    from rcon_plugins.settings.memory import Memory
    from rcon_plugins.settings.policy import Policy

#: Signals that warn work before its time limit or memory limit. Only for services that handle them.
SOFT_TIME = signal.SIGUSR1
SOFT_MEMORY = signal.SIGUSR2

#: The name of a confinement and the identity of its work. An executor process or thread serves one key all its life.
Key = tuple[str, "Identity | None"]


class State(enum.Enum):
    """The state of an executor. The table in this module's docstring lists the transitions."""

    # `enum` hashes the name instead, in Python; each request looks its executor's state up in a set.
    __hash__ = object.__hash__

    #: Ordered; not confined yet.
    STARTING = enum.auto()
    #: Confined; waits for work.
    WAITING = enum.auto()
    #: Serves a unit of work.
    SERVING = enum.auto()
    #: Its work is over; READY is not reported yet.
    RETURNING = enum.auto()
    #: Ends by itself, or in its grace; processes that its work started may go on.
    LEAVING = enum.auto()
    #: Has exited; processes that its work started go on in its cgroup, for good or in their grace.
    LEFT = enum.auto()
    #: Killed; its exit is not reported yet.
    KILLED = enum.auto()
    #: Has exited; processes that it started are being killed, and its cgroup is not removed yet.
    EXITED = enum.auto()
    #: Gone, with all processes that it started and its cgroup.
    ENDED = enum.auto()


#: An executor in one of these states may serve work now or later. It counts towards the bound on executor processes.
USABLE = frozenset({State.STARTING, State.WAITING, State.SERVING, State.RETURNING})
_EXIT_REPORTED = frozenset({State.LEFT, State.EXITED, State.ENDED})


class Monitored(Protocol):
    """The watched cgroup of one executor; see `rcon_plugins.confinement.monitor`."""

    @property
    def changed(self) -> bool:
        """Whether its limits differ from the policy's."""

    def memory(self, limit: str) -> Memory | None:
        """Return the limit ``memory`` or ``each.memory`` in force; None without one."""

    def change(self, policies: Mapping[str, Policy]) -> bool:
        """Apply changed policies. Return whether its own policy changed, so that its watch must be started again."""

    def finish(self) -> None:
        """Report the last events and stop watching, before the cgroup is removed."""


class Executor:
    """The host's side of one executor process."""

    def __init__(
        self,
        number: int,
        key: Key,
        policy: Policy,
        group: Cgroup,
        leaf: Cgroup,
        meter: Meter,
        channel: Channel,
        supervisor: Supervisor,
    ) -> None:
        self.number = number
        self.key = key
        self.name, self.identity = key
        self.policy = policy
        #: The cgroup of its confinement, and its own cgroup below that.
        self.group = group
        self.leaf = leaf
        self.channel = channel
        self.monitored: Monitored | None = None
        #: The pipe of its standard output and error; None if it has those of the server.
        self.output: OutputPipe | None = None
        self.state = State.STARTING
        #: The time when it entered its state (`time.monotonic`).
        self.since = time.monotonic()
        #: Its pid; 0 until it is confined.
        self.pid = 0
        #: The number of units of work it has served, including the one under way.
        self.uses = 0
        #: The memory of its own that its first work left in use, in bytes; 0 if that was little, or before.
        self.kept = 0
        #: Whether the limits of its policy changed since it was made. It serves at most one more unit of work then.
        self.outdated = False
        #: The first reason for which the host killed it; None if the host did not.
        self.kill_reason: str | None = None
        #: Its wait status; None until its exit is reported, or if it is unknown.
        self.status: int | None = None
        #: Set when it is gone, with all processes that it started and its cgroup.
        self.ended = threading.Event()
        #: Whether the host kills it after an OOM kill of one of its processes; see `rcon_plugins.executors.oom`.
        self.guarded = False
        #: The time when it was last killed (`time.monotonic`).
        self.killed_at = 0.0
        #: The failed kernel calls while it was being ended.
        self.attempts = Attempts()
        #: Whether it is logged already that the process does not end.
        self.hang_logged = False
        #: The usage of its cgroup when it was ready for its first work, after its last work, or at its end.
        self.reading: Reading = meter.read()
        #: The deadline of the work under way and its action; None without a deadline, or when the work is over.
        self.deadline: tuple[float, Callable[[], object]] | None = None
        #: Guards the state, the meter, the callbacks, and whether the work under way is settled. Held for a short time.
        self.lock = threading.Lock()
        self._meter: Meter | None = meter
        self._exit_callbacks: list[Callable[[], object]] = []
        self._supervisor = supervisor
        #: The time at which the supervisor checks the deadline next.
        self._alarm: float | None = None

    # -- transitions ------------------------------------------------------------------------------

    def set_ready(self) -> None:
        """Note READY: it waits for work."""
        with self.lock:
            if self.state in (State.STARTING, State.RETURNING):
                self.state, self.since = State.WAITING, time.monotonic()

    def read_start(self) -> None:
        """Take the reading from which its first work counts: its start, and what the application did then, is no part.

        Raises `KernelError`, but not if the cgroup is gone: whoever uses the executor learns that it died.
        """
        with self.lock:
            try:
                if self._meter is not None:
                    self._meter.reset_peak()
                    self.reading = self._meter.read()
            except KernelError as error:
                if not gone(error):
                    raise

    def begin_work(self, deadline: float | None, action: Callable[[], object]) -> Reading:
        """Count one more use, and reset the memory peak if the kernel can. Return the usage before the work.

        At ``deadline`` (`time.monotonic`) the supervisor calls ``action``, as `set_deadline` says.
        """
        with self.lock:
            if self.uses and self._meter is not None:
                self._meter.reset_peak()
            self.uses += 1
            if self.state is State.WAITING:
                self.state, self.since = State.SERVING, time.monotonic()
            if deadline is not None:
                self._deadline_at(deadline, action)
        return self.reading

    def end_work(self) -> Reading:
        """Note that the work is over. Return the usage of its cgroup. Raises `KernelError`."""
        with self.lock:
            if self.state is State.SERVING:
                self.state, self.since = State.RETURNING, time.monotonic()
            if self._meter is not None:
                self.reading = self._meter.read()
        return self.reading

    def leave_children(self) -> None:
        """Let the process end by itself, and let processes that its work started go on."""
        self._change(dict.fromkeys(USABLE, State.LEAVING))

    def set_terminated(self, reason: str) -> None:
        """Note the reason for which the host told it and all processes that it started to end. They have a grace."""
        with self.lock:
            self.kill_reason = self.kill_reason or reason
        self.leave_children()

    def set_killed(self, reason: str) -> None:
        """Note the reason for which the host kills it and all processes that it started. Keep the first reason."""
        with self.lock:
            self.kill_reason = self.kill_reason or reason
        self._change({**dict.fromkeys(USABLE | {State.LEAVING}, State.KILLED), State.LEFT: State.EXITED})

    def set_exited(self, status: int | None, problem: str | None = None) -> None:
        """Note the end of the process. ``status`` is None if unknown. ``problem`` is why it could not be forked."""
        self.status = status if self.status is None else self.status
        self.kill_reason = self.kill_reason or problem
        self._change({**dict.fromkeys(USABLE | {State.KILLED}, State.EXITED), State.LEAVING: State.LEFT})

    def set_ended(self) -> list[Callable[[], object]]:
        """Note that its processes and its cgroup are gone, and set ``ended``. Return the callbacks to call now."""
        with self.lock:
            self._enter(State.ENDED)
            self.ended.set()
            callbacks, self._exit_callbacks = self._exit_callbacks, []
        return callbacks

    def _change(self, transitions: Mapping[State, State]) -> None:
        with self.lock:
            if (following := transitions.get(self.state)) is not None:
                self._enter(following)

    def _enter(self, state: State) -> None:
        """Enter a state. Call it with the lock held."""
        self.state = state
        self.since = time.monotonic()

    # -- questions --------------------------------------------------------------------------------

    @property
    def exit_reported(self) -> bool:
        """Whether the fork server reported the end of the process, or can no longer report it."""
        return self.state in _EXIT_REPORTED

    def is_alone(self, reading: Reading) -> bool:
        """Return whether the executor process is the only process in its cgroup. Raises `KernelError`.

        ``reading`` is the usage of the cgroup now. Threads of the process count in it, as do those that a library
        starts in each executor. They are counted elsewhere too, so that they cost no second file. Code that ends and
        starts threads meanwhile can hide a process of its own so; it could leave a thread as well.
        """
        if reading.pids_current is not None and reading.pids_current == thread_count(self.pid):
            return True
        return self.leaf.processes() == [self.pid]

    def is_back(self, seconds: float) -> bool | None:
        """Return whether it waits for work, after so many seconds at most. None: not yet; False: it never will.

        False if it died, or if code of an earlier request still sends.
        """
        if self.state is not State.RETURNING:
            return self.channel.quiet
        try:
            frame = self.channel.receive_last(seconds)
        except ChannelTimeout:
            return None
        except ChannelClosed:
            return False
        if frame.kind != READY:
            return False
        self.set_ready()
        return True

    def read(self) -> Reading:
        """Return the usage of its cgroup; the last reading once it has ended. Raises `KernelError`."""
        with self.lock:
            return self.reading if self._meter is None else self._meter.read()

    def had_oom_kill(self) -> bool:
        """Return whether the OOM killer ended one of its processes since its last work, and the host has to kill it.

        Raises `KernelError` if that cannot be read.
        """
        if not self.guarded or self.state not in USABLE:
            return False
        with self.lock:
            try:
                kills = None if self._meter is None else self._meter.oom_kills()
            except KernelError as error:
                if not gone(error):
                    raise
                return False
            return kills is not None and kills > (self.reading.oom_kills or 0)

    def close_meter(self) -> None:
        """Take the last reading and close the meter. Raises `KernelError`; the next call reads again then."""
        with self.lock:
            meter = self._meter
            if meter is None:
                return
            try:
                self.reading = meter.read()
            except KernelError as error:
                if not gone(error):
                    raise
            self._meter = None
            meter.close()

    def when_ended(self, action: Callable[[], object]) -> None:
        """Have the supervisor call ``action`` when the executor has ended. If it has ended already, call it now."""
        with self.lock:
            if self.state is not State.ENDED:
                self._exit_callbacks.append(action)
                return
        action()

    # -- deadline ---------------------------------------------------------------------------------

    def set_deadline(self, when: float, action: Callable[[], object]) -> None:
        """Have the supervisor call ``action`` at ``when`` (`time.monotonic`), unless ``deadline`` is None by then.

        An executor has one alarm, which is set again when it comes too early. So work that ends in time costs no
        wake-up, and the supervisor's memory does not grow with the number of requests.
        """
        with self.lock:
            self._deadline_at(when, action)

    def _deadline_at(self, when: float, action: Callable[[], object]) -> None:
        """Set the deadline and, if it comes first, the alarm. Call it with the lock held."""
        self.deadline = (when, action)
        if self._alarm is None or self._alarm > when:
            self._set_alarm(when)

    def _set_alarm(self, when: float) -> None:
        self._alarm = when
        self._supervisor.at(when, Executor._ring, self)

    def _ring(self) -> None:
        """Act on the deadline if it has come, else set the alarm again. Called in the supervisor's thread."""
        with self.lock:
            self._alarm = None
            if self.deadline is None:
                return
            when, action = self.deadline
            if when > time.monotonic():
                self._set_alarm(when)
                return
        action()
