"""Executor processes, seen from the host: birth, deadline, death. See `fork_server` for the other side."""

from __future__ import annotations

import _socket  # the real thing, whatever a cooperative library made of `socket`
import array
import errno
import itertools
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rcon_plugins.errors import ConfinementError, KernelError, PidsLimitExceeded
from rcon_plugins.executors.channel import Channel, ChannelClosed
from rcon_plugins.executors.fork_server import (
    FAILED,
    FULL,
    PID,
    READY,
    Birth,
    Death,
    ForkServer,
    Service,
    read_death,
)
from rcon_plugins.executors.supervisor import Supervisor
from rcon_plugins.kernel import process

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.instance import Instance
    from rcon_plugins.kernel.cgroup import Cgroup, Meter, Reading
    from rcon_plugins.policy import Policy

LOGGER = logging.getLogger("rcon")

#: How long the host waits for what the kernel does in milliseconds, before it calls it an error. Seconds.
PATIENCE = 30.0
#: How often a leaf is tried to be made while other workers remove what holds it.
_ATTEMPTS = 20


class Executor:
    """The host's side of one executor process, which serves one policy (and key) all its life.

    ``reading`` is the last that was read of its leaf cgroup, ``status`` its wait status once it ended (None if nobody
    could tell), ``fate`` why the host killed it.
    """

    def __init__(
        self, number: int, name: str, policy: Policy, leaf: Cgroup, meter: Meter, channel: Channel
    ) -> None:
        self.number = number
        self.name = name
        self.policy = policy
        self.leaf = leaf
        self.meter = meter
        self.channel = channel
        self.pid = 0
        self.works = 0
        self.reading: Reading = meter.read()
        self.status: int | None = None
        self.fate: str | None = None
        self.ended = threading.Event()

    def is_alone(self, reading: Reading) -> bool:
        """Whether the executor process is the only one left in its leaf: the work left nothing running."""
        if reading.pids_current == 1:
            return True
        # More than one task: its own threads are its own affair, other processes are not.
        return self.leaf.processes() == [self.pid]


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
    ) -> None:
        self._instance = instance
        self._hook = hook
        self._on_end = on_end
        self._on_lost = on_lost
        self._host = os.getpid()
        self._numbers = itertools.count()
        self._living: dict[int, Executor] = {}
        self._lost = False
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

    def start(self, service: Service, after_fork: Sequence[Callable[[], object]] = ()) -> None:
        """Fork the fork server from the calling process, which had best have no other threads, and watch over it.

        ``after_fork`` is called in each new executor process, for what a library must renew after a fork.
        """
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        pid = process.fork()
        if pid == 0:
            ours.close()
            ForkServer(theirs, self._host, self._instance, self._hook, service, after_fork).run()
        theirs.close()
        self._server = pid
        self._control = ours
        self._supervisor = Supervisor(ours.fileno(), self._hear)
        self._supervisor.start()

    def birth(self, name: str, policy: Policy) -> Executor:
        """Have an executor process made in a new leaf of ``work/<name>``; it may not be ready yet.

        Raises `KernelError` where the leaf cannot be made or limited, `ConfinementError` without a fork server.
        """
        control = self._control
        if control is None or not self.usable:
            raise ConfinementError("the fork server has ended; restart the server process")
        number = next(self._numbers)
        birth = Birth(number, name, f"{self._host}-{number}", policy)
        leaf = self._make_leaf(name, birth.leaf, policy)
        meter: Meter | None = None
        try:
            meter = leaf.meter()
            ours, theirs = socket.socketpair()
        except BaseException:
            if meter is not None:
                meter.close()
            leaf.delete()
            raise
        executor = Executor(number, name, policy, leaf, meter, Channel(ours))
        self._living[number] = executor
        try:
            descriptors = array.array("i", [theirs.fileno()])
            control.sendmsg(
                [pickle.dumps(tuple(birth))],
                [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)],
            )
        except OSError as error:
            self._finish(executor, None)
            raise ConfinementError(f"the fork server cannot be reached: {error}") from error
        finally:
            theirs.close()
        self.at(time.monotonic() + PATIENCE, lambda: self._give_up(executor))
        return executor

    def wait_ready(self, executor: Executor) -> None:
        """Wait until the new executor process is confined.

        Raises `ConfinementError` with its own words if it could not be, `PidsLimitExceeded` if its confinement is full;
        it is gone then.
        """
        try:
            frame = executor.channel.receive()
        except ChannelClosed as error:
            self.wait_end(executor)
            reason = executor.fate or (
                f"it was ended by signal {os.WTERMSIG(executor.status)} before its first work"
                if executor.status is not None and os.WIFSIGNALED(executor.status)
                else "it ended before its first work"
            )
            raise ConfinementError(f"no executor process could be made: {reason}") from error
        if frame.kind == FULL:
            self.wait_end(executor)
            raise PidsLimitExceeded(frame.payload.decode(errors="replace"), limit="pids")
        if frame.kind == FAILED:
            self.wait_end(executor)
            raise ConfinementError(frame.payload.decode(errors="replace"))
        if frame.kind != READY:
            self.kill(executor, "protocol")
            raise ConfinementError(f"the executor process began with a frame of kind {frame.kind}")
        (executor.pid,) = PID.unpack(frame.payload)

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Have ``action`` called by the supervisor at ``when`` (`time.monotonic`)."""
        if self._supervisor is not None:
            self._supervisor.at(when, action)

    def submit(self, job: Callable[[], object]) -> None:
        """Have ``job`` called by the supervisor soon: what must not keep a request waiting."""
        if self._supervisor is not None:
            self._supervisor.submit(job)

    def kill(self, executor: Executor, fate: str) -> None:
        """Kill the executor process and all it started. Its death is told as any other."""
        if executor.fate is None:
            executor.fate = fate
        if not executor.ended.is_set():
            executor.leaf.kill()

    def wait_end(self, executor: Executor, timeout: float = PATIENCE) -> bool:
        """Wait until the executor process has ended, its cgroup is gone and ``status`` is known."""
        return executor.ended.wait(timeout)

    def close(self) -> None:
        """End all executor processes and the fork server. Nothing of them is left when it returns."""
        if self._control is None or os.getpid() != self._host:
            return
        self._closing = True
        control, self._control = self._control, None
        if self._supervisor is not None:
            self._supervisor.close()
        for executor in list(self._living.values()):
            self._finish(executor, None)
            executor.channel.close()
        control.close()  # tells the fork server to end itself, and whatever there should still be
        if not self._lost and process.reap(self._server, PATIENCE) is None:
            LOGGER.error("the fork server %d does not end; killing it", self._server)
            os.kill(self._server, signal.SIGKILL)
            process.reap(self._server)
        self._instance.sweep(f"{self._host}-")

    def _make_leaf(self, name: str, leaf_name: str, policy: Policy) -> Cgroup:
        """Make ``work/<name>/<leaf>`` with all limits in force.

        Until there is a leaf in it, another worker of the server, which has no use for it any more, may remove
        ``work/<name>``, and the limits with it: so they are written again once the leaf holds it in place.
        """
        together, leaf = self._instance.together(name), self._instance.leaf(name, leaf_name)
        configure = partial(self._hook.rcon_configure_cgroup, policy=policy)
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                for cgroup in (together, leaf):
                    cgroup.create()
                    configure(cgroup=together, limits=policy)
                configure(cgroup=leaf, limits=policy.each)
                break
            except KernelError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV) or not attempts_left:
                    leaf.delete()
                    raise
        return leaf

    def _give_up(self, executor: Executor) -> None:
        if executor.pid == 0 and not executor.ended.is_set():
            self.kill(executor, f"it was not ready within {PATIENCE:g} s")

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
                self._bury_server()
            return False
        self._bury(read_death(data))
        return True

    def _bury(self, death: Death) -> None:
        executor = self._living.get(death.number)
        if executor is None:
            return
        if death.pid == 0:
            executor.fate = f"fork: {os.strerror(death.status)}"
            self._finish(executor, None)
        else:
            self._finish(executor, death.status)

    def _bury_server(self) -> None:
        self._lost = True
        LOGGER.error(
            "the fork server %d ended; work that needs a process is refused from now on", self._server
        )
        process.reap(self._server)
        for executor in list(self._living.values()):
            self._finish(executor, None)
        if self._on_lost is not None:
            self._on_lost()

    def _finish(self, executor: Executor, status: int | None) -> None:
        """The executor process ended: end what it started, read the last of its cgroup, remove that."""
        if self._living.pop(executor.number, None) is None:
            return
        executor.status = status
        try:
            executor.leaf.kill()
            executor.reading = executor.meter.read()
            executor.meter.close()
            executor.leaf.delete()
        except KernelError as error:
            LOGGER.error("the cgroup of an executor process could not be removed: %s", error)
        finally:
            executor.ended.set()
            self._on_end(executor)
