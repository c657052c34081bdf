"""The fork server: the single-threaded process that makes all executor processes.

The host forks it after the application is loaded and before other threads serve, so that no fork happens beside
threads. It runs no application code. It reaps the executor processes and reports to the host how each ended. When the
host ends, for any reason, it kills the executor processes and all processes that they started, and ends too.
For what the two say to each other see `orders`.
"""

from __future__ import annotations

import _socket  # the real one: gevent replaces `socket`
import array
import contextlib
import errno
import gc
import os
import posix
import signal
import socket
import time
import traceback
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NoReturn

from rcon_plugins.errors import ConfinementError, KernelError
from rcon_plugins.executors import orders
from rcon_plugins.executors.channel import Channel
from rcon_plugins.executors.inherited import InheritedFiles, replace_output
from rcon_plugins.executors.inside import EXIT_SERVICE_RAISED, Template, run_executor
from rcon_plugins.executors.orders import (
    LONGEST_ORDER,
    ExitReport,
    KillOrder,
    SignalOrder,
    SpawnOrder,
    has_own_user,
)
from rcon_plugins.kernel import descriptors, process
from rcon_plugins.kernel.attempts import FIRST_PAUSE, Attempts
from rcon_plugins.kernel.clone import Child, Cloner, CloneUnavailable
from rcon_plugins.kernel.proc import other_threads
from rcon_plugins.kernel.syscalls import poll_readable

if TYPE_CHECKING:
    from rcon_plugins.kernel.cgroup import Cgroup
    from rcon_plugins.settings.policy import Policy

#: The longest time until orphans are looked for, where no signal tells of their end, seconds.
_ORPHAN_SECONDS = 1.0
#: The most children to reap before the next order.
_MOST_REAPED = 64
#: How long to reap killed processes at the end: after the last one that ended, and at most. In seconds.
_LAST_SECONDS, _REAP_SECONDS = 0.5, 5.0
#: How long to try to send an exit report for which the kernel has no memory, in steps of 10 ms.
_REPORT_ATTEMPTS = 500


class ForkServer:
    """The fork server, in its own process. `run` never returns."""

    def __init__(
        self,
        control: _socket.socket,
        host: int,
        template: Template,
        server_files: Collection[int],
    ) -> None:
        self._control = control
        self._host = host
        self._template = template
        self._instance = template.instance
        self._server_files = server_files
        self._host_pidfd = -1
        self._pid = 0
        self._files: InheritedFiles | None = None
        self._cloner: Cloner | None = None
        self._children: dict[int, tuple[SpawnOrder, int]] = {}  # by pidfd
        #: The failed attempts to read an order. The first is printed.
        self._order_attempts = Attempts()
        #: A pipe. The handler of SIGCHLD writes to it, to wake `poll` up.
        self._sigchld_read, self._sigchld_write = -1, -1

    def run(self) -> NoReturn:
        """Serve until the host is gone; then kill the executor processes that are left, and exit."""
        status = 1
        self._pid = os.getpid()
        try:
            self._template.fork_hooks.clear_all()
            # Leave the terminal's foreground group, because only the host handles an interrupt.
            os.setsid()
            process.take_default_signals()
            self._host_pidfd = descriptors.of_process(self._host)
            self._close_server_files()
            process.open_missing_standard_files()
            self._files = InheritedFiles({self._instance.locks})
            process.join_new_session_keyring()
            process.adopt_orphans()
            self._sigchld_read, self._sigchld_write = process.open_sigchld_pipe()
            gc.freeze()  # objects that exist now stay shared with every executor process
            with contextlib.suppress(CloneUnavailable):
                self._cloner = Cloner()
            self._serve()
            status = 0
        except BaseException:  # noqa: BLE001 - this process ends: print the reason, whatever it is
            self._leave_child()
            traceback.print_exc()
        finally:
            try:
                self._instance.sweep(f"{self._host}-")
                self._reap_last()
            except BaseException:  # noqa: BLE001 - as above; the next start cleans up
                traceback.print_exc()
            os._exit(status)

    @staticmethod
    def _reap_last() -> None:
        """Reap what was killed. What is left goes to process 1, which in many containers reaps nothing."""
        until = time.monotonic() + _REAP_SECONDS
        deadline = time.monotonic() + _LAST_SECONDS
        while time.monotonic() < min(deadline, until):
            if list(process.reap_any(_MOST_REAPED)):
                deadline = time.monotonic() + _LAST_SECONDS
            elif not process.has_children():
                return
            else:
                time.sleep(0.001)

    def _leave_child(self) -> None:
        """End a child that came here because of an error: it must not go on as the fork server."""
        if os.getpid() != self._pid:
            os._exit(EXIT_SERVICE_RAISED)

    def _close_server_files(self) -> None:
        needed = {self._control.fileno(), self._host_pidfd, self._instance.locks}
        for descriptor in process.shared_descriptors("/memfd:rcon"):
            if descriptor not in needed:
                process.replace_with_closed_socket(descriptor)
        for descriptor in self._server_files:
            process.replace_with_closed_socket(descriptor)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        posix.close(null)

    def _serve(self) -> None:
        control, host = self._control.fileno(), self._host_pidfd
        if os.getppid() != self._host:
            return
        more = False
        #: Executors that ended but cannot be reaped yet, because a process that traces them has not let go of them.
        traced: set[int] = set()
        while True:
            # gevent keeps SIGCHLD for itself. So executors are watched by their pidfds too, and orphans are looked for
            # at intervals.
            watched = (control, host, self._sigchld_read, *(self._children.keys() - traced))
            ready = poll_readable(watched, 0 if more else _ORPHAN_SECONDS)
            if host in ready:
                return
            # Orders come first: confined code chooses how many children this process has.
            if control in ready and not self._take_order():
                return
            if ready - {control}:
                process.drain(self._sigchld_read)  # the signal comes with what a pidfd tells
            if more or not ready or ready - {control}:
                more = self._reap_some()
                if not ready:
                    traced.clear()  # try them again
                elif not more:
                    traced |= ready
                traced &= self._children.keys()

    def _take_order(self) -> bool:
        """Carry out one order. Return False when the host has closed its side."""
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                LONGEST_ORDER, _socket.CMSG_SPACE(2 * array.array("i").itemsize), _socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # closed before it read all reports
            return False
        except OSError:  # no memory: the host is there, and so is its order
            if self._order_attempts.failed():
                traceback.print_exc()
            time.sleep(FIRST_PAUSE)
            return True
        if not data:
            return False
        order = orders.unpack(data)
        if isinstance(order, KillOrder):
            self._signal(order.number, signal.SIGKILL)
            if order.cgroup is not None:
                with contextlib.suppress(KernelError):  # the host tries again
                    self._instance.executor_cgroup(*order.cgroup).kill_once()
        elif isinstance(order, SignalOrder):
            self._signal(order.number, order.signal)
        else:
            self._spawn(order, array.array("i", ancillary[0][2] if ancillary else b""))
        return True

    def _spawn(self, order: SpawnOrder, passed: Sequence[int]) -> None:
        """Fork an executor process. ``passed`` are the end of its channel and, with ``output``, its pipe."""
        # gevent's os.close() waits for an event loop, which runs nowhere here; posix.close() is the real one.
        try:
            if len(passed) != 1 + order.output:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # no descriptor was left for them
            fault = self._prepare(order.policy)
            leaf = self._instance.executor_cgroup(order.name, order.leaf)
            begins_there = fault is None and not self._is_full(order, leaf)
            # So that the collector of the new process does not look at what this one made since its start.
            gc.freeze()
            child, cloned = self._make_child(leaf.unified_directory if begins_there else None)
            if child.pid == 0:
                self._become_executor(order, leaf, passed, fault, cloned=cloned)
            self._children[child.pidfd] = (order, child.pid)
        except OSError as error:
            self._leave_child()
            self._report(ExitReport(order.number, 0, error.errno or errno.EIO))
        finally:
            for descriptor in passed:
                posix.close(descriptor)

    def _make_child(self, directory: str | None) -> tuple[Child, bool]:
        """Make a child, and return whether it began in the v2 cgroup of this directory. Raises `KernelError`."""
        if self._cloner is not None and directory is not None:
            try:
                return self._cloner.into(directory), True
            except CloneUnavailable:
                self._cloner = None
            except KernelError:
                self._leave_child()  # a forked process may move there, or tell the host why it cannot
        pid = process.fork()
        if pid == 0:
            return Child(0, 0), False
        try:
            return Child(pid, descriptors.of_process(pid)), False
        except OSError:
            os.kill(pid, signal.SIGKILL)  # a child not yet reaped: the pid is still its own
            posix.waitpid(pid, 0)
            raise

    def _is_full(self, order: SpawnOrder, leaf: Cgroup) -> bool:
        """Return whether the kernel would refuse a process in the confinement, and count that as a hit of its limit.

        The next failure of running work would be taken for one of that limit.
        """
        pids = order.policy.pids
        if self._cloner is None or pids is None or not leaf.counts_unified("pids"):
            return False
        with self._instance.policy_cgroup(order.name).meter({"pids"}) as meter:
            return (meter.read().pids_current or 0) >= pids

    def _prepare(self, policy: Policy) -> BaseException | None:
        """Call rcon_prepare. Return why the new process cannot be confined, which it reports; None if it can."""
        try:
            self._template.hook.rcon_prepare(policy=policy)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
            return error
        self._template.fork_hooks.clear()  # a plugin may have loaded a library
        if threads := other_threads():
            return ConfinementError(
                f"a library started threads in the fork server, where no executor process can be made then: "
                f"{', '.join(threads)}; configure it to start no threads after a fork, or at first use"
            )
        return None

    def _signal(self, executor: int, number: int) -> None:
        for pidfd, (order, pid) in self._children.items():
            if order.number == executor:
                with contextlib.suppress(KernelError):  # the host also kills the cgroup
                    process.kill(
                        pidfd, pid, order.identity.uid if order.identity is not None else None, number
                    )

    def _reap_some(self) -> bool:
        """Reap some children, and report those that are executors. Return whether there may be more.

        The others are orphans of confined code, which this process adopts, and what it made by CLONE_PARENT.
        """
        number = 0
        for pid, status in process.reap_any(_MOST_REAPED):
            number += 1
            if not process.has_ended(status):
                continue
            pidfd = next((one for one, (_, child) in self._children.items() if child == pid), None)
            if pidfd is not None:
                order, _ = self._children.pop(pidfd)
                posix.close(pidfd)
                self._report(ExitReport(order.number, pid, status))
        return number == _MOST_REAPED

    def _report(self, report: ExitReport) -> None:
        for attempts_left in reversed(range(_REPORT_ATTEMPTS)):
            try:
                self._control.send(report.pack())
                return
            except (BrokenPipeError, ConnectionResetError):
                return  # the host is gone: the loop sees that by itself
            except OSError as error:
                if error.errno not in (errno.ENOMEM, errno.ENOBUFS) or not attempts_left:
                    raise
            time.sleep(0.01)

    def _become_executor(
        self,
        order: SpawnOrder,
        leaf: Cgroup,
        passed: Sequence[int],
        fault: BaseException | None,
        *,
        cloned: bool,
    ) -> NoReturn:
        try:
            channel_end, *output = passed
            fault = self._replace_files(order, output) or fault
            self._control.close()
            for pidfd in (self._host_pidfd, *self._children):
                posix.close(pidfd)
            os.setsid()
            process.close_sigchld_pipe(self._sigchld_read, self._sigchld_write)
            for renew in self._template.after_fork:
                renew()
            if self._template.records is not None and output:
                self._template.records.enter(output[0])
            end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, channel_end)
            end.setblocking(True)
            clones = self._cloner is not None
            run_executor(
                Channel(end),
                order,
                leaf,
                self._template,
                self._pid,
                cloned=cloned,
                clones=clones,
                fault=fault,
            )
        except BaseException:  # noqa: BLE001 - this process ends: print the reason, whatever it is
            traceback.print_exc()
        finally:
            os._exit(EXIT_SERVICE_RAISED)

    def _replace_files(self, order: SpawnOrder, output: Sequence[int]) -> BaseException | None:
        """Take the server's files from this process if it has a pipe for its output. Return what went wrong.

        A process with the user of the server keeps all but standard output and error.
        """
        try:
            for pipe in output:
                if has_own_user(order) and self._files is not None:
                    self._files.replace(pipe, order.policy.keep_files)
                else:
                    replace_output(pipe, order.policy.keep_files)
                if self._template.records is None:
                    posix.close(pipe)
        except (OSError, KernelError) as error:
            return error
        return None
