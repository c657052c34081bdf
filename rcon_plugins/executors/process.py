"""Executor processes, seen from the host: birth, deadline, death. See `fork_server` for the other side."""

from __future__ import annotations

import _socket  # the real thing, whatever a cooperative library made of `socket`
import array
import contextlib
import errno
import itertools
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import ConfinementError, KernelError, PidsLimitExceeded
from rcon_plugins.executors.channel import Channel, ChannelClosed, ChannelTimeout
from rcon_plugins.executors.executor import Executor
from rcon_plugins.executors.fork_server import (
    FULL,
    PID,
    READY,
    ForkServer,
    KillOrder,
    Service,
    SignalOrder,
    SpawnOrder,
    read_exit_report,
)
from rcon_plugins.executors.leaf import make_leaf
from rcon_plugins.executors.supervisor import Supervisor
from rcon_plugins.kernel import process

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.executors.monitor import Monitor
    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.settings.limits import Limits
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

LOGGER = logging.getLogger("rcon")

#: How long a new executor process may take to be ready, seconds.
READY_SECONDS = 10.0
#: How long somebody who waits for the end of an executor waits for it, seconds. It may take longer.
DEATH_SECONDS = 1.0
#: How long the end of all may take when the host closes, seconds.
CLOSE_SECONDS = 10.0
#: After how long those that still live are killed again, seconds.
KILL_AGAIN_SECONDS = 0.2


class ProcessExecutors:
    """All executor processes of one host process, and their fork server. Thread-safe.

    ``on_end`` is called, in the supervisor's thread, with each executor that ended; ``on_lost`` once if the fork
    server ended before the host closed it: no more executor processes can be made then, and the host had best be
    replaced.
    """

    def __init__(
        self,
        instance: Instance,
        hook: pluggy.HookRelay,
        *,
        on_end: Callable[[Executor], object],
        on_lost: Callable[[], object] | None = None,
        monitor: Monitor,
        current: Callable[[Policy], Policy] = lambda policy: policy,
    ) -> None:
        self._monitor = monitor
        self._current = current
        self._instance = instance
        self._hook = hook
        self._on_end = on_end
        self._on_lost = on_lost
        self._host = os.getpid()
        self._numbers = itertools.count()
        self._living: dict[int, Executor] = {}
        #: Those that were killed or ended by themselves, until they are gone. The supervisor's own.
        self._dying: dict[int, Executor] = {}
        self._alarms = threading.Lock()
        self._lost = False
        #: It does not take orders: known to who gave one before the supervisor hears of it.
        self._control_broken = False
        self._closing = False
        self._server = 0
        self._control: _socket.socket | None = None
        self._supervisor: Supervisor | None = None

    @property
    def server_pid(self) -> int:
        """The pid of the fork server."""
        return self._server

    @property
    def usable(self) -> bool:
        """Whether executor processes can be made."""
        return self._control is not None and not self._lost and not self._closing

    @property
    def lost(self) -> bool:
        """Whether the fork server ended before its time."""
        return self._lost or self._control_broken

    def start(
        self,
        service: Service,
        after_fork: Sequence[Callable[[], object]] = (),
        server_files: Sequence[int] = (),
    ) -> None:
        """Fork the fork server from the calling process, which had best have no other threads, and watch over it.

        ``after_fork`` is called in each new executor process, for what a library must renew after a fork;
        ``server_files`` are descriptors of the server's own files, which confined code must not have.
        """
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        pid = process.fork()
        if pid == 0:
            ours.close()
            hook, instance = self._hook, self._instance
            ForkServer(theirs, self._host, instance, hook, service, after_fork, server_files).run()
        theirs.close()
        self._server = pid
        self._control = ours
        self._supervisor = Supervisor(ours.fileno(), self._hear, self._reap_exited)
        self._supervisor.start()

    def birth(self, name: str, policy: Policy, identity: Identity | None) -> Executor:
        """Have an executor process made in a new leaf of ``work/<name>``; it may not be ready yet.

        Raises `KernelError` where the leaf cannot be made or limited, `ConfinementError` without a fork server.
        """
        if not self.usable:
            raise ConfinementError("the fork server has ended; restart the server process")
        policy = self._current(policy)
        number = next(self._numbers)
        birth = SpawnOrder(number, name, f"{self._host}-{number}", policy, identity)
        leaf = make_leaf(self._instance, self._hook, birth, self._limits(name, policy))
        with contextlib.ExitStack() as undo:
            undo.callback(leaf.delete)
            meter = leaf.meter()
            undo.callback(meter.close)
            ours, theirs = socket.socketpair()
            undo.callback(theirs.close)
            undo.callback(ours.close)
            group = self._instance.policy_cgroup(name)
            executor = Executor(number, name, policy, identity, group, leaf, meter, Channel(ours))
            executor.monitored = self._monitor.watch(executor)
            undo.pop_all()
        self._living[number] = executor
        try:
            if (now := self._current(policy)) is not policy:
                self.change({now.name: now})  # what was written just now may be what was so before
                birth = birth._replace(policy=now)
                make_leaf(self._instance, self._hook, birth, self._limits(name, now))
            self._order(birth, theirs.fileno())
        except OSError as error:
            self._control_broken = self._control_broken or isinstance(
                error, BrokenPipeError | ConnectionResetError
            )
            executor.told = True
            self.kill(executor, "never born")
            executor.channel.close()
            raise ConfinementError(f"the fork server cannot be reached: {error}") from error
        finally:
            theirs.close()
        return executor

    def _limits(self, name: str, policy: Policy) -> Limits:
        return self._monitor.limits(name, policy)

    def change(self, policies: Mapping[str, Policy]) -> list[Executor]:
        """These policies are otherwise now: those made by what was before, of which each does at most one more work."""
        old = [one for one in list(self._living.values()) if one.policy.name in policies]
        for executor in old:
            executor.policy, executor.stale = policies[executor.policy.name], True
            if executor.monitored is not None:
                executor.monitored.change(policies)
        self._monitor.change(policies)
        return old

    def wait_ready(self, executor: Executor) -> None:
        """Wait until the new executor process is confined.

        Raises `ConfinementError` with its own words if it could not be, `PidsLimitExceeded` if its confinement is full;
        it is gone then.
        """
        try:
            frame = executor.channel.receive_within(READY_SECONDS)
        except ChannelClosed as error:
            if isinstance(error, ChannelTimeout):
                self.kill(executor, f"it was not ready within {READY_SECONDS:g} s")
            executor.ended.wait(DEATH_SECONDS)
            reason = executor.fate or (
                f"it was ended by signal {os.WTERMSIG(executor.status)} before its first work"
                if executor.status is not None and os.WIFSIGNALED(executor.status)
                else "it ended before its first work"
            )
            raise ConfinementError(f"no executor process could be made: {reason}") from error
        if frame.kind == READY:
            (executor.pid,) = PID.unpack(frame.payload)
            return
        self.kill(executor, "could not be confined")
        executor.ended.wait(DEATH_SECONDS)
        reason = frame.payload.decode(errors="replace")
        raise PidsLimitExceeded(reason, limit="pids") if frame.kind == FULL else ConfinementError(reason)

    def arm(self, executor: Executor, when: float, action: Callable[[], object]) -> None:
        """Have ``action`` called by the supervisor at ``when`` (`time.monotonic`), unless disarmed before.

        An executor has one alarm, which is set again when it rings too early: so a work that ends in time costs no
        wake-up, and what is kept does not grow with the number of works.
        """
        with self._alarms:
            executor.deadline = (when, action)
            if executor.alarm is None or executor.alarm > when:
                self._set_alarm(executor, when)

    def disarm(self, executor: Executor) -> None:
        """The work is over: its deadline is none any more."""
        executor.deadline = None

    def submit(self, job: Callable[[], object], when: float | None = None) -> None:
        """Have ``job`` called by the supervisor soon, or at ``when``: what must not keep a request waiting."""
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.submit(job) if when is None else supervisor.at(when, job)

    def kill(self, executor: Executor, fate: str) -> None:
        """Kill the executor process and all it started. Does not wait: ``executor.ended`` tells when it is gone.

        Whoever waits for the executor at its channel reads an end of file at once, whatever becomes of it.
        """
        if executor.fate is None:
            executor.fate = fate
        if executor.ended.is_set():
            return
        try:
            self._kill_once(executor)
        except KernelError as error:
            LOGGER.error("%s could not be killed, and will be tried again: %s", executor.leaf.path, error)
        executor.channel.hang_up()
        self.submit(partial(self._watch, executor))

    def notify(self, executor: Executor, number: int) -> None:
        """Send the executor process a signal that its service expects. Does not wait."""
        with contextlib.suppress(OSError):
            self._order(SignalOrder(executor.number, number))

    def close(self) -> None:
        """End all executor processes and the fork server. Nothing of them is left when it returns."""
        if self._control is None or os.getpid() != self._host:
            return
        self._closing = True
        if self._supervisor is not None:
            self._supervisor.close()
        for executor in list(self._living.values()):
            executor.told = True  # nobody listens any more
            self.kill(executor, "the server ends")
            self._watch(executor)
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._reap_exited() is not None and time.monotonic() < deadline:
            time.sleep(0.005)
        control, self._control = self._control, None
        control.close()  # tells the fork server to end itself, and whatever there should still be
        if not self._lost and process.reap(self._server, CLOSE_SECONDS) is None:
            LOGGER.error("the fork server %d does not end; killing it", self._server)
            os.kill(self._server, signal.SIGKILL)
            process.reap(self._server)
        self._instance.sweep(f"{self._host}-")

    def _order(self, order: SpawnOrder | KillOrder | SignalOrder, *descriptors: int) -> None:
        """Tell the fork server what to do. Raises OSError; never waits for a fork server that does not listen."""
        control = self._control
        if control is None:
            raise BrokenPipeError(errno.EPIPE, "closed")
        rights = array.array("i", descriptors)
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if descriptors else []
        control.sendmsg([pickle.dumps(order)], ancillary, _socket.MSG_DONTWAIT)

    def _kill_once(self, executor: Executor) -> None:
        executor.killed_at = time.monotonic()
        # By its cgroup, with all it started; and by its number too: it might have left the cgroup.
        with contextlib.suppress(OSError):
            self._order(KillOrder(executor.number))
        executor.leaf.kill_once()

    def _set_alarm(self, executor: Executor, when: float) -> None:
        executor.alarm = when
        if self._supervisor is not None:
            self._supervisor.at(when, self._ring, executor)

    def _ring(self, executor: Executor) -> None:
        with self._alarms:
            executor.alarm = None
            if executor.deadline is None:
                return
            when, action = executor.deadline
            if when > time.monotonic():
                self._set_alarm(executor, when)
                return
        action()

    def _hear(self) -> bool:
        """Take one message of the fork server; False when there will be no more."""
        control = self._control
        if control is None:
            return False
        try:
            data = control.recv(64, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            if not self._closing:
                self._lose_server()
            return False
        death = read_exit_report(data)
        executor = self._living.get(death.number)
        if executor is not None:
            executor.told = True
            if death.pid == 0:
                executor.fate = f"fork: {os.strerror(death.status)}"
            else:
                executor.status = death.status
            self._watch(executor)
        return True

    def _lose_server(self) -> None:
        self._lost = True
        LOGGER.error(
            "the fork server %d ended; work that needs a process is refused from now on", self._server
        )
        process.reap(self._server)
        for executor in list(self._living.values()):
            executor.told = True
            self.kill(executor, executor.fate or "the fork server ended")
            self._watch(executor)
        if self._on_lost is not None:
            self._on_lost()

    def _watch(self, executor: Executor) -> None:
        """See an executor that is dying to its end."""
        if executor.number in self._living:
            self._dying[executor.number] = executor

    def _reap_exited(self) -> float | None:
        """See how far those that are dying are; when to look again, in seconds."""
        for executor in list(self._dying.values()):
            if self._is_gone(executor):
                self._dying.pop(executor.number)
                self._living.pop(executor.number)
                self._on_end(executor)
                for action in executor.end():
                    action()
        if not self._dying:
            return None
        return 0.005 if min(executor.dies() for executor in self._dying.values()) < 1 else 0.1

    def _is_gone(self, executor: Executor) -> bool:
        """Whether the executor process has ended, with all it started; its cgroup is removed then."""
        late = time.monotonic() > executor.killed_at + KILL_AGAIN_SECONDS
        try:
            lingering = (executor.told or late) and bool(executor.leaf.processes(subtree=True))
            if lingering or not executor.told:
                if not (executor.told and executor.spared and executor.fate is None):
                    self._kill_again(executor, late)
                return False
            if executor.monitored is not None:
                executor.monitored.finish()
            executor.shut()
            executor.leaf.delete(timeout=0)
        except KernelError as error:
            if error.errno == errno.EBUSY and executor.dies() < CLOSE_SECONDS:
                return False
            if executor.leaf.exists():
                LOGGER.error("the cgroup of an executor process could not be removed: %s", error)
        return True

    def _kill_again(self, executor: Executor, late: bool) -> None:
        if late:
            self._kill_once(executor)
        if executor.dies() > CLOSE_SECONDS and not executor.complained:
            executor.complained = True
            LOGGER.error(
                "%s was killed and does not end: a process in it waits inside the kernel, or left the cgroup",
                executor.leaf.path,
            )
