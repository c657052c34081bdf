"""The fork server: the single-threaded process that makes all executor processes.

The host forks it after the application is loaded and before other threads serve, so that no fork happens beside
threads. It runs no application code. It reaps the executor processes and reports to the host how each ended. When the
host ends, for any reason, it kills the executor processes and all processes that they started, and ends too.

Host and fork server talk over a ``SOCK_SEQPACKET`` pair. The host sends a `SpawnOrder` (with one end of the new
executor's channel, and of the pipe for its output), a `KillOrder` or a `SignalOrder`; the fork server sends an
`ExitReport`. Both ends are this project's own code, so orders are pickled; an exit report is a fixed record.
"""

from __future__ import annotations

import _socket  # the real one: gevent replaces `socket`
import array
import contextlib
import errno
import gc
import logging
import os
import pickle
import posix
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from rcon_plugins.errors import ConfinementError, KernelError
from rcon_plugins.executors.channel import FAILED, FULL, READY, Channel, ChannelClosed, Frame
from rcon_plugins.executors.inherited import InheritedFiles
from rcon_plugins.kernel import descriptors, process
from rcon_plugins.kernel.attempts import FIRST_PAUSE, Attempts
from rcon_plugins.kernel.proc import other_threads
from rcon_plugins.kernel.syscalls import poll_readable
from rcon_plugins.tree.locks import entering

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

#: The function that serves one unit of work in an executor process. It is called with the first frame.
Service = Callable[[Channel, Frame], None]

PID = struct.Struct("!i")
_EXIT_REPORT = struct.Struct("!qii")
_MAX_ORDER = 128 * 1024
#: The longest time until orphans are looked for, where no signal tells of their end, seconds.
_ORPHAN_SECONDS = 1.0
#: The most children to reap before the next order.
_MOST_REAPED = 64
#: How long to reap killed processes at the end: after the last one that ended, and at most. In seconds.
_LAST_SECONDS, _REAP_SECONDS = 0.5, 5.0
#: How long to try to send an exit report for which the kernel has no memory, in steps of 10 ms.
_REPORT_ATTEMPTS = 500

_EXIT_NOT_CONFINED = 71
_EXIT_SERVICE_RAISED = 70


class SpawnOrder(NamedTuple):
    """Make an executor process in the cgroup ``work/<name>/<leaf>``. It serves one policy until it ends.

    ``identity`` is the user and groups that it changes to; None keeps those of the server. With ``output``, a pipe
    comes with the order that replaces the files of the server: see `InheritedFiles`.
    """

    number: int
    name: str
    leaf: str
    policy: Policy
    identity: Identity | None = None
    output: bool = False


class KillOrder(NamedTuple):
    """Kill an executor process by its pid, because it may have left its cgroup.

    With ``cgroup``, its name and leaf as in `SpawnOrder`, kill all in that too: the host could not.
    """

    number: int
    cgroup: tuple[str, str] | None = None


class SignalOrder(NamedTuple):
    """Send a signal, which its service handles, to an executor process by its pid."""

    number: int
    signal: int


class ExitReport(NamedTuple):
    """An executor process ended with a wait status. With pid 0 it could not be forked, and ``status`` is an errno."""

    number: int
    pid: int
    status: int


class ForkServer:
    """The fork server, in its own process. `run` never returns."""

    def __init__(
        self,
        control: _socket.socket,
        host: int,
        instance: Instance,
        hook: pluggy.HookRelay,
        service: Service,
        after_fork: Sequence[Callable[[], object]] = (),
        server_files: Sequence[int] = (),
    ) -> None:
        self._control = control
        self._host = host
        self._instance = instance
        self._hook = hook
        self._service = service
        self._after_fork = after_fork
        self._server_files = server_files
        self._host_pidfd = -1
        self._pid = 0
        self._files: InheritedFiles | None = None
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
            gc.collect()
            gc.freeze()  # objects that exist now stay shared with every executor process
            self._serve()
            status = 0
        except BaseException:  # noqa: BLE001 - this process ends: print the reason, whatever it is
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
            if self._sigchld_read in ready:
                process.drain(self._sigchld_read)
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
                _MAX_ORDER, _socket.CMSG_SPACE(2 * array.array("i").itemsize), _socket.MSG_CMSG_CLOEXEC
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
        order = pickle.loads(data)  # noqa: S301 - from our own host, never from an executor process
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
            pid = process.fork()
            if pid == 0:
                self._become_executor(order, passed, fault)
            try:
                self._children[descriptors.of_process(pid)] = (order, pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)  # a child not yet reaped: the pid is still its own
                posix.waitpid(pid, 0)
                raise
        except OSError as error:
            self._report(ExitReport(order.number, 0, error.errno or errno.EIO))
        finally:
            for descriptor in passed:
                posix.close(descriptor)

    def _prepare(self, policy: Policy) -> BaseException | None:
        """Call rcon_prepare. Return the exception it raised, which the new process reports."""
        try:
            self._hook.rcon_prepare(policy=policy)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
            return error
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
                self._control.send(_EXIT_REPORT.pack(*report))
                return
            except (BrokenPipeError, ConnectionResetError):
                return  # the host is gone: the loop sees that by itself
            except OSError as error:
                if error.errno not in (errno.ENOMEM, errno.ENOBUFS) or not attempts_left:
                    raise
            time.sleep(0.01)

    def _become_executor(
        self, order: SpawnOrder, passed: Sequence[int], fault: BaseException | None
    ) -> NoReturn:
        try:
            channel_end, *output = passed
            fault = self._replace_files(order.policy, output) or fault
            self._control.close()
            for pidfd in (self._host_pidfd, *self._children):
                posix.close(pidfd)
            os.setsid()
            process.close_sigchld_pipe(self._sigchld_read, self._sigchld_write)
            for renew in self._after_fork:
                renew()
            end = socket.socket(fileno=channel_end)
            end.setblocking(True)
            run_executor(Channel(end), order, self._pid, self._instance, self._hook, self._service, fault)
        except BaseException:  # noqa: BLE001 - this process ends: print the reason, whatever it is
            traceback.print_exc()
        finally:
            os._exit(_EXIT_SERVICE_RAISED)

    def _replace_files(self, policy: Policy, output: Sequence[int]) -> BaseException | None:
        """Take the server's files from this process if it has a pipe for its output. Return what went wrong."""
        try:
            for pipe in output:
                if self._files is not None:
                    self._files.replace(pipe, policy.keep_files)
                posix.close(pipe)
        except (OSError, KernelError) as error:
            return error
        return None


def run_executor(
    channel: Channel,
    order: SpawnOrder,
    server: int,
    instance: Instance,
    hook: pluggy.HookRelay,
    service: Service,
    fault: BaseException | None = None,
) -> NoReturn:
    """Run an executor process: drop privileges, report READY, serve one unit of work after the other, end.

    ``fault`` is why it cannot be confined, if that is known before the fork.

    A process that confined code forked may return here through the service. It ends immediately and prints nothing.
    """
    me = os.getpid()
    try:
        if fault is not None:
            raise fault
        if not _enter(order, instance):
            channel.send(
                (FULL, f"the pids limit of {order.policy.pids} processes and threads is reached".encode())
            )
            os._exit(_EXIT_NOT_CONFINED)
        process.replace_with_closed_socket(instance.locks)
        hook.rcon_drop(policy=order.policy, target="process", identity=order.identity)
        if order.identity is not None:
            process.join_new_session_keyring()
        process.die_with_parent(server)
        _check_alone()
    except BaseException as error:  # noqa: BLE001 - report any exception to the host, and run no work
        with contextlib.suppress(ChannelClosed):  # the host ends, and removed the cgroup just now
            channel.send((FAILED, f"{type(error).__name__}: {error}".encode(errors="replace")[:4096]))
        os._exit(_EXIT_NOT_CONFINED)
    status = _EXIT_SERVICE_RAISED
    try:
        channel.send((READY, PID.pack(me)))
        while True:
            service(channel, channel.receive())
            if os.getpid() != me:
                break
            _flush()
            channel.send((READY, PID.pack(me)))
    except ChannelClosed:
        status = 0
        if order.policy.leave_children and os.getpid() == me:
            _let_threads_go_on()
    except BaseException:  # noqa: BLE001 - this process ends: print any exception
        if os.getpid() == me:
            traceback.print_exc()
    finally:
        if os.getpid() == me:
            _flush()
        os._exit(status)


def _let_threads_go_on() -> None:
    """Wait for the threads that the work left running, as Python does at its exit. The host may kill them earlier."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()


def _check_alone() -> None:
    """Raise `ConfinementError` if other threads of this process still have the privileges that this thread dropped."""
    if threads := other_threads():
        raise ConfinementError(
            f"a library started threads in a fork hook, which still have the server's privileges: "
            f"{', '.join(threads)}; configure it to start threads at first use, not in os.register_at_fork"
        )


def _enter(order: SpawnOrder, instance: Instance) -> bool:
    """Enter the leaf. Return False if the confinement is full.

    The kernel counts processes that move in, but does not refuse them (cgroup-v2.rst, pids). So the workers of the
    server enter one at a time, under a lock.
    """
    leaf, pids = instance.executor_cgroup(order.name, order.leaf), order.policy.pids
    if pids is None:
        leaf.enter_process()
        return True
    group = instance.policy_cgroup(order.name)
    with entering(instance.locks, order.name):
        if (group.read().pids_current or 0) >= pids:
            return False
        leaf.enter_process()
        return (group.read().pids_current or 0) <= pids


def read_exit_report(data: bytes) -> ExitReport:
    """Return the exit report that a record encodes."""
    return ExitReport(*_EXIT_REPORT.unpack(data))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


# -- log files ------------------------------------------------------------------------------------

#: Keeps the removed handlers, because an unreferenced file object would close its descriptor and warn.
_removed_handlers: list[logging.Handler] = []


def open_log_files(loggers: Iterable[logging.Logger]) -> set[int]:
    """Return the descriptors of the files that these loggers write to, in this process.

    Executor processes must not have them: a process with a file open for writing may truncate it.
    """
    streams = [handler.stream for _, handler in _file_handlers(loggers)]
    return {stream.fileno() for stream in streams if stream is not None and not stream.closed}


def open_files_named(part: str) -> set[int]:
    """Return the descriptors of the files of this process that have ``part`` in their path. Raises OSError."""
    return {file.descriptor for file in process.open_files() if part in file.path}


def leaving_log_files(loggers: Iterable[logging.Logger]) -> Callable[[], None]:
    """Return a function for ``after_fork`` that makes these loggers write to standard error instead of files.

    In an executor process the handler's descriptor may belong to another file, or the handler may open its file again
    as the user of the work. The handlers are looked up here, because visiting every logger takes a new process a while.
    """
    return partial(_replace_handlers, list(_file_handlers(loggers)))


def _replace_handlers(found: Iterable[tuple[logging.Logger, logging.FileHandler]]) -> None:
    for logger, handler in found:
        # Not sys.stderr, which Celery replaces with a stream that writes to these loggers.
        substitute = logging.StreamHandler(sys.__stderr__)
        substitute.setLevel(handler.level)
        substitute.setFormatter(handler.formatter)
        for condition in handler.filters:
            substitute.addFilter(condition)
        logger.removeHandler(handler)
        logger.addHandler(substitute)
        _removed_handlers.append(handler)


def _file_handlers(loggers: Iterable[logging.Logger]) -> Iterator[tuple[logging.Logger, logging.FileHandler]]:
    for logger in loggers:
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                yield logger, handler
