"""Executor processes, seen from the host: spawn them, kill them, and follow their end. See `fork_server`, too."""

from __future__ import annotations

import _socket  # the real one: gevent replaces `socket`
import array
import contextlib
import errno
import gc
import itertools
import logging
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from rcon_plugins.errors import ConfinementError, KernelError, PidsLimitExceeded, on_one_line
from rcon_plugins.executors import orders
from rcon_plugins.executors.channel import (
    CONFINED,
    FULL,
    READY,
    Channel,
    ChannelClosed,
    ChannelTimeout,
    Frame,
)
from rcon_plugins.executors.executor import USABLE, Executor, Monitored, State
from rcon_plugins.executors.fork_server import ForkServer
from rcon_plugins.executors.inside import CONFINED_RECORD, Service, Template, ending_of
from rcon_plugins.executors.oom import OomGuard
from rcon_plugins.executors.orders import (
    ExitReport,
    KillOrder,
    Order,
    SignalOrder,
    SpawnOrder,
    has_own_user,
)
from rcon_plugins.executors.output import Log, OutputPipe, OutputReader, standard_error
from rcon_plugins.executors.records import RecordLog, RecordReader
from rcon_plugins.executors.supervisor import Supervisor
from rcon_plugins.kernel import descriptors, fork_hooks, process
from rcon_plugins.kernel.attempts import FIRST_PAUSE, Attempts
from rcon_plugins.kernel.cgroup import Resources
from rcon_plugins.kernel.files import failure, gone
from rcon_plugins.settings.units import listed

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.settings.limits import Limits
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

LOGGER = logging.getLogger("rcon")

#: How long a new executor process may take to be ready, seconds.
READY_SECONDS = 10.0
#: How long a request waits for the end of an executor, seconds. The executor may take longer to end.
DEATH_SECONDS = 1.0
#: How long `terminate` signals processes that fork meanwhile, seconds. The supervisor serves no other deadline then.
TERMINATE_SECONDS = 0.1
#: How long an executor process that ends in order may take for it, seconds.
END_SECONDS = 2.0
#: How long `close` waits until all executors have ended, seconds.
CLOSE_SECONDS = 10.0
#: After so many seconds, kill executors that are still alive again.
KILL_AGAIN_SECONDS = 0.2
#: How many times to make a cgroup while other workers remove its parent.
_ATTEMPTS = 20
_NUMBER = re.compile(r"^Thread-\d+")
#: The most threads that the log names.
_MOST_NAMED = 10


class Monitor(Protocol):
    """Watches the cgroups of executors; see `rcon_plugins.confinement.monitor`."""

    def limits(self, name: str, policy: Policy) -> Limits:
        """Return the limits in force for all work of a confinement: the policy's, unless they were changed."""

    def change(self, policies: Mapping[str, Policy]) -> None:
        """Apply changed policies."""

    def watch(self, executor: Executor) -> Monitored | None:
        """Start watching a new executor, before its process is forked. Raises `KernelError`."""


class ProcessExecutors:
    """All executor processes of one host process, and their fork server. Thread-safe.

    ``on_end`` is called in the supervisor's thread with each executor that ended. ``on_lost`` is called once if the
    fork server ends before the host closes it. After that no executor process can be made, so replace the host.
    ``current`` returns a policy as it is now, ``key_of`` the key of the confinement of a name.
    """

    def __init__(
        self,
        instance: Instance,
        hook: pluggy.HookRelay,
        *,
        monitor: Monitor,
        on_end: Callable[[Executor], object],
        on_lost: Callable[[], object] | None = None,
        current: Callable[[Policy], Policy] = lambda policy: policy,
        key_of: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self._monitor = monitor
        self._key_of = key_of
        self._current = current
        self._instance = instance
        self._hook = hook
        self._on_end = on_end
        self._on_lost = on_lost
        self._host = os.getpid()
        self._numbers = itertools.count()
        #: Executors that have not ended, by number.
        self._living: dict[int, Executor] = {}
        #: The executors among these that were killed or have exited. Only the supervisor uses it, until `close`.
        self._ending: dict[int, Executor] = {}
        #: The number of kernel calls that failed for executors that were ending. Each was tried again.
        self.failures = 0
        self._lost = False
        #: Set when an order could not be sent, before the supervisor detects that the fork server ended.
        self._control_broken = False
        self._closing = False
        #: Whether the service has something to do when an executor process ends.
        self._ends_in_order = False
        self._report_attempts = Attempts()
        #: The names of the application's threads, until the log has told which of them executors lack.
        self._threads: Collection[str] = ()
        #: Whether the log says already that executors move into their cgroups.
        self._move_logged = False
        self._server = 0
        self._control: _socket.socket | None = None
        self._supervisor: Supervisor | None = None
        self._output = OutputReader()
        self._oom: OomGuard | None = None

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
        """Whether the fork server ended before the host closed it."""
        return self._lost or self._control_broken

    def start(
        self,
        service: Service,
        after_fork: Sequence[Callable[[], object]] = (),
        server_files: Sequence[int] = (),
        log: Log = standard_error,
        threads: Collection[str] = (),
    ) -> None:
        """Fork the fork server from the calling process, which should have no other threads, and start the supervisor.

        Each new executor process calls ``after_fork``, for libraries that need a call after a fork. ``server_files``
        are descriptors of the server's own files, which confined code must not have. ``log`` receives the output of
        executors with a user of their own; a `RecordLog` receives the log records and the output of all. ``threads``
        are the names of the application's threads, which do not exist in executors: the log says so, unless fork hooks
        start them again. Raises `KernelError`.

        The fork hooks of the application (`os.register_at_fork`) that a parent calls run here, and those for a child in
        each new executor process, when it is confined.
        """
        self._threads = threads
        self._ends_in_order = ending_of(service) is not None
        # The fork server cannot: finalizers and callbacks of the collector (`gc.callbacks`) are the application's code.
        gc.collect()
        # All that needs descriptors is made before the fork: after it, there would be a fork server to end.
        with contextlib.ExitStack() as undo:
            try:
                ours, theirs = descriptors.socket_pair(_socket.SOCK_SEQPACKET, _socket)
                undo.callback(ours.close)
                undo.callback(theirs.close)
                supervisor = Supervisor(ours.fileno(), self._receive_exit_report, self._reap)
                undo.callback(supervisor.close)
                oom = OomGuard(lambda: list(self._living.values()), self.kill)
                undo.callback(oom.close)
                with fork_hooks.postponed() as hooks:
                    collects = gc.isenabled()
                    pid = process.fork()
                    if pid == 0:
                        undo.pop_all()
                        ours.close()
                        template = Template(
                            self._instance,
                            self._hook,
                            service,
                            after_fork,
                            hooks,
                            collects,
                            log if isinstance(log, RecordLog) else None,
                        )
                        ForkServer(theirs, self._host, template, server_files).run()
            except OSError as error:
                raise failure(error, "the fork server") from error
            undo.pop_all()
        theirs.close()
        self._server, self._control = pid, ours
        self._output = RecordReader(log) if isinstance(log, RecordLog) else OutputReader(log)
        self._supervisor, self._oom = supervisor, oom
        try:
            oom.start(supervisor)
            supervisor.start()
        except BaseException:
            self.close()  # nobody else would end the fork server
            raise

    def count_usable(self) -> int:
        """Return the number of executors, not counting those that are ending."""
        return sum(executor.state in USABLE for executor in list(self._living.values()))

    def serves(self, name: str) -> bool:
        """Return whether an executor of a confinement has not ended."""
        return any(executor.name == name for executor in list(self._living.values()))

    def let_some_end(self, most: int) -> int:
        """Wait a short time while more than ``most`` executors are ending. Return how many still are."""
        deadline = time.monotonic() + DEATH_SECONDS
        while True:
            ending = [one for one in list(self._living.values()) if one.state not in USABLE]
            left = deadline - time.monotonic()
            if len(ending) <= most or left <= 0:
                return len(ending)
            ending[0].ended.wait(min(left, 0.05))

    def spawn(self, name: str, policy: Policy, identity: Identity | None) -> Executor:
        """Order an executor process in a new cgroup below ``work/<name>``. It may not be ready yet.

        Raises `KernelError` if the cgroup cannot be made or limited, `ConfinementError` without a fork server.
        """
        supervisor = self._supervisor
        if supervisor is None or not self.usable:
            raise ConfinementError("the fork server has ended; restart the server process")
        policy = self._current(policy)
        number = next(self._numbers)
        order = SpawnOrder(number, name, f"{self._host}-{number}", policy, identity)
        leaf = self._make_cgroup(order)
        with contextlib.ExitStack() as undo:
            undo.callback(leaf.delete)
            output = self._open_output(order)
            if output is not None:
                undo.callback(self._output.finish, output)
                undo.callback(output.close_writer)
                order = order._replace(output=True)
            meter = leaf.meter(memory_limit_hits=False)
            undo.callback(meter.close)
            ours, theirs = descriptors.socket_pair(socket.SOCK_STREAM, socket)
            undo.callback(theirs.close)
            undo.callback(ours.close)
            group = self._instance.policy_cgroup(name)
            executor = Executor(
                number, (name, identity), policy, group, leaf, meter, Channel(ours), supervisor
            )
            executor.monitored = self._monitor.watch(executor)
            executor.output = output
            if self._oom is not None:
                self._oom.add(executor)
            undo.pop_all()
        self._living[number] = executor
        try:
            if (now := self._current(policy)) is not policy:
                self.change({now.name: now})  # the limits were written before they were changed
                order = order._replace(policy=now)
                self._make_cgroup(order)
            self._send_order(order, theirs.fileno(), *([] if output is None else [output.writer]))
        except OSError as error:
            self._control_broken = self._control_broken or isinstance(
                error, BrokenPipeError | ConnectionResetError
            )
            executor.set_exited(None)
            self.kill(executor, "the fork server cannot be reached")
            executor.channel.close()
            raise ConfinementError(f"the fork server cannot be reached: {error}") from error
        finally:
            theirs.close()
            if output is not None:
                output.close_writer()
        return executor

    def _open_output(self, order: SpawnOrder) -> OutputPipe | None:
        """Return a pipe for the output of an executor; None if it keeps that of the server, whose user it has."""
        own_user = has_own_user(order)
        if not own_user and not isinstance(self._output, RecordReader):
            return None
        return self._output.open(order.name, order.policy.name, self._key_of(order.name), own_user=own_user)

    def _make_cgroup(self, order: SpawnOrder) -> Cgroup:
        """Make ``work/<name>/<leaf>`` and write all limits.

        Another worker of the server may remove an unused ``work/<name>``, and the limits with it, as long as it has no
        leaf. So write the limits after the leaf is made.
        """
        group = self._instance.policy_cgroup(order.name)
        leaf = self._instance.executor_cgroup(order.name, order.leaf)
        limits = self._monitor.limits(order.name, order.policy)
        resources = self._hook.rcon_resources
        whole = Resources.merged(resources(limits=limits, policy=order.policy))
        each = Resources.merged(resources(limits=order.policy.each, policy=order.policy))
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                leaf.create()
                group.configure(whole)
                leaf.configure(each)
                break
            except BaseException as error:
                if not (isinstance(error, KernelError) and gone(error)) or not attempts_left:
                    leaf.delete()
                    raise
        return leaf

    def change(self, policies: Mapping[str, Policy]) -> list[Executor]:
        """Apply changed policies. Return executors made under the old ones; each serves at most one more request."""
        outdated = [one for one in list(self._living.values()) if one.policy.name in policies]
        for executor in outdated:
            executor.policy, executor.outdated = policies[executor.policy.name], True
            if executor.monitored is not None:
                executor.monitored.change(policies)
        self._monitor.change(policies)
        return outdated

    def wait_ready(self, executor: Executor) -> None:
        """Wait until the new executor process is confined and ready for work.

        Raises `ConfinementError`, with the reason from the process, if it could not be confined or prepared. Raises
        `PidsLimitExceeded` if its confinement has as many processes as it may. The executor is killed in both cases.
        Raises `KernelError` if its usage cannot be read.
        """
        until = time.monotonic() + READY_SECONDS
        frame = self._first_frame(executor, until)
        if frame.kind == CONFINED:
            executor.pid, clones = CONFINED_RECORD.unpack(frame.payload)
            if not clones and executor.leaf.unified_directory is not None:
                self._log_move()
            frame = self._first_frame(executor, until)
            if frame.kind == READY:
                executor.set_ready()
                executor.read_start()
                self._log_threads(frame.payload)
                return
        self.kill(executor, "it could not be confined")
        executor.ended.wait(DEATH_SECONDS)
        reason = on_one_line(frame.payload.decode(errors="replace"))
        raise PidsLimitExceeded(reason, limit="pids") if frame.kind == FULL else ConfinementError(reason)

    def _first_frame(self, executor: Executor, until: float) -> Frame:
        """Return the next frame of a new executor process. Raises `ConfinementError`, and kills a late one."""
        try:
            return executor.channel.receive_within(max(0.0, until - time.monotonic()))
        except ChannelClosed as error:
            if isinstance(error, ChannelTimeout):
                self.kill(executor, f"it was not ready within {READY_SECONDS:g} s")
            executor.ended.wait(DEATH_SECONDS)
            reason = executor.kill_reason or (
                f"signal {os.WTERMSIG(executor.status)} ended it before it was ready"
                if executor.status is not None and os.WIFSIGNALED(executor.status)
                else "it ended before it was ready"
            )
            raise ConfinementError(f"no executor process could be made: {reason}") from error

    def _log_move(self) -> None:
        """Tell once that new processes take longer here."""
        if not self._move_logged:
            self._move_logged = True
            LOGGER.info(
                "rcon: a new executor process takes some 15 ms longer here, because it has to move into its cgroup: "
                "clone3(2) is refused, as by the seccomp profile of a container, or Linux is older than 5.7"
            )

    def _log_threads(self, there: bytes) -> None:
        """Tell once which threads of the application do not run in executors. ``there`` names those that do."""
        if not self._threads:
            return
        names = there.decode(errors="replace").split("\0")
        there_too = Counter(map(_without_number, names))
        missing = []
        for name in sorted(self._threads):
            if there_too[_without_number(name)]:
                there_too[_without_number(name)] -= 1
            else:
                missing.append(name)
        self._threads = ()
        if missing:
            LOGGER.warning(
                "rcon: threads that the application started while it was loaded do not run in executor processes: "
                '%s. Start them in each one: write executor_started = "module:function" in the settings',
                listed(list(map(repr, missing)), _MOST_NAMED),
            )

    def submit(self, job: Callable[[], object], when: float | None = None) -> None:
        """Have the supervisor call ``job`` soon, or at ``when``. For jobs that must not keep a request waiting."""
        supervisor = self._supervisor
        if supervisor is not None:
            supervisor.submit(job) if when is None else supervisor.at(when, job)

    def kill(self, executor: Executor, reason: str) -> None:
        """Kill the executor process and all processes it started. Do not wait: ``executor.ended`` is set in the end.

        A thread that waits on its channel reads an end of file immediately.
        """
        executor.set_killed(reason)
        if executor.state is State.ENDED:
            return
        try:
            self._kill_once(executor)
        except OSError as error:
            self._note_failure(executor, error)
        executor.channel.hang_up()
        self.submit(partial(self._await_end, executor))

    def terminate(self, executor: Executor, reason: str) -> None:
        """Send SIGTERM to the executor process and all processes it started. Do not wait: `kill` it after its grace."""
        executor.set_terminated(reason)
        try:
            executor.leaf.terminate(TERMINATE_SECONDS)
        except OSError as error:
            if not gone(error):
                self._note_failure(executor, error)

    def end(self, executor: Executor, reason: str) -> None:
        """End an executor process that has no work, with all processes that it started. Do not wait.

        If the service has something to do at the end, the process may take `END_SECONDS`; then it is killed.
        """
        if not self._ends_in_order:
            self.kill(executor, reason)
            return
        executor.set_killed(reason)
        if executor.state is State.ENDED:
            return
        executor.killed_at = time.monotonic() + END_SECONDS - KILL_AGAIN_SECONDS  # `_reap` kills it then
        executor.channel.hang_up()
        self.submit(partial(self._await_end, executor))

    def notify(self, executor: Executor, number: int) -> None:
        """Send the executor process a signal that its service handles. Does not wait."""
        with contextlib.suppress(OSError):
            self._send_order(SignalOrder(executor.number, number))

    def close(self) -> None:
        """End all executor processes and the fork server. All are gone when it returns."""
        if self._control is None or os.getpid() != self._host:
            return
        self._closing = True
        with contextlib.ExitStack() as last:  # run each step, even if an earlier one fails
            last.callback(self._instance.sweep, f"{self._host}-")
            last.callback(self._output.close)
            last.callback(self._end_server, self._control)
            if self._oom is not None:
                last.callback(self._oom.close)
            last.callback(self._end_executors)
            if self._supervisor is not None:
                last.callback(self._supervisor.close)

    def _end_executors(self) -> None:
        """End all executors. The supervisor, which receives the reports of their ends, has ended already."""
        if self._ends_in_order:
            self._let_waiting_end()
        for executor in list(self._living.values()):
            executor.attempts = Attempts()  # now
            executor.set_exited(None)
            self.kill(executor, "the server ends")
            self._await_end(executor)
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._reap() is not None and time.monotonic() < deadline:
            time.sleep(0.005)

    def _let_waiting_end(self) -> None:
        """Let executor processes that have no work end in order, for `END_SECONDS` at most."""
        now, living = time.monotonic(), list(self._living.values())
        ending = [one for one in living if one.killed_at > now]  # since before: see `end`
        for executor in living:
            if executor.state in (State.WAITING, State.RETURNING):
                executor.channel.hang_up()
                ending.append(executor)
        deadline = now + END_SECONDS
        with contextlib.suppress(OSError):  # what cannot be read is killed
            while any(one.leaf.processes() for one in ending) and time.monotonic() < deadline:
                time.sleep(0.005)

    def _end_server(self, control: _socket.socket) -> None:
        self._control = None
        control.close()  # the fork server then kills the remaining processes, and ends
        if not self._lost and process.reap(self._server, CLOSE_SECONDS) is None:
            LOGGER.error("the fork server %d does not end; killing it", self._server)
            os.kill(self._server, signal.SIGKILL)
            process.reap(self._server)

    def _send_order(self, order: Order, *passed: int) -> None:
        """Send the fork server an order. Raises OSError; never waits for a fork server that does not read."""
        control = self._control
        if control is None:
            raise BrokenPipeError(errno.EPIPE, "closed")
        rights = array.array("i", passed)
        ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if passed else []
        control.sendmsg([orders.pack(order)], ancillary, _socket.MSG_DONTWAIT)

    def _kill_once(self, executor: Executor) -> None:
        executor.killed_at = time.monotonic()
        # The cgroup with all in it; and the process by its pid, which may have left the cgroup.
        with contextlib.suppress(OSError):
            self._send_order(KillOrder(executor.number))
        try:
            executor.leaf.kill_once()
        except OSError as error:
            if not gone(error):
                # This process may have no descriptor left; the fork server has its own.
                with contextlib.suppress(OSError):
                    self._send_order(KillOrder(executor.number, (executor.name, executor.leaf.name)))
            raise

    def _receive_exit_report(self) -> bool:
        """Handle one message from the fork server. Return False when no more will come."""
        control = self._control
        if control is None:
            return False
        try:
            data = control.recv(64, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            data = b""
        except OSError as error:  # no answer: the fork server may well live
            if self._report_attempts.failed():
                LOGGER.error("the fork server %d cannot be heard; trying again: %s", self._server, error)
            self.failures += 1
            time.sleep(FIRST_PAUSE)
            return True
        if not data:
            if not self._closing:
                self._lose_server()
            return False
        report = ExitReport.unpack(data)
        executor = self._living.get(report.number)
        if executor is not None:
            if report.pid == 0:
                executor.set_exited(None, f"fork: {os.strerror(report.status)}")
            else:
                executor.set_exited(report.status)
            # What is left of it has no more time.
            executor.killed_at = min(executor.killed_at, time.monotonic())
            self._await_end(executor)
        return True

    def _lose_server(self) -> None:
        self._lost = True
        LOGGER.error(
            "the fork server %d ended; requests that need a process are refused from now on", self._server
        )
        process.reap(self._server)
        for executor in list(self._living.values()):
            executor.set_exited(None)
            self.kill(executor, "the fork server ended")
            self._await_end(executor)
        if self._on_lost is not None:
            self._on_lost()

    def _await_end(self, executor: Executor) -> None:
        """Have `_reap` finish an executor that was killed or has exited."""
        if executor.number in self._living:
            self._ending[executor.number] = executor

    def _reap(self) -> float | None:
        """Finish the executors that have ended. Return after how many seconds to look again; None without any left."""
        for executor in list(self._ending.values()):
            if self._finish_if_gone(executor):
                self._ending.pop(executor.number)
                self._living.pop(executor.number)
                if executor.output is not None:
                    self._output.finish(executor.output)
                self._on_end(executor)
                for action in executor.set_ended():
                    action()
        if not self._ending:
            return None
        youngest = max(executor.since for executor in self._ending.values())
        return 0.005 if time.monotonic() - youngest < 1 else 0.1

    def _finish_if_gone(self, executor: Executor) -> bool:
        """Return whether the executor process and all processes it started have ended. Remove its cgroup if so."""
        if not executor.attempts.is_due:
            return False
        late = time.monotonic() > executor.killed_at + KILL_AGAIN_SECONDS
        try:
            if not executor.exit_reported:
                self._kill_again(executor, late)
                return False
            if executor.leaf.has_processes():
                if executor.state is not State.LEFT:
                    self._kill_again(executor, late)
                return False
            if executor.monitored is not None:
                executor.monitored.finish()
            executor.close_meter()
            executor.leaf.delete(timeout=0)
        except OSError as error:
            # Its processes may live: only a cgroup without processes that is removed, or gone, is an end.
            busy = error.errno == errno.EBUSY and time.monotonic() - executor.since < CLOSE_SECONDS
            if not busy:
                self._note_failure(executor, error)
            return False
        return True

    def _note_failure(self, executor: Executor, error: OSError) -> None:
        """Count a failed kernel call, which is tried again at growing intervals. Log the first one of an executor."""
        self.failures += 1
        if executor.attempts.failed():
            LOGGER.error("%s could not be ended; trying again: %s", executor.leaf.path, error)

    def _kill_again(self, executor: Executor, late: bool) -> None:
        if late:
            self._kill_once(executor)
        if time.monotonic() - executor.since > CLOSE_SECONDS and not executor.hang_logged:
            executor.hang_logged = True
            LOGGER.error(
                "%s was killed and does not end: a process in it waits inside the kernel, or left the cgroup",
                executor.leaf.path,
            )


def _without_number(name: str) -> str:
    """Return the name of a thread without the number that Python gave: it is another one in each process."""
    return _NUMBER.sub("Thread", name)
