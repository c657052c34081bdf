"""The fork server: the single-threaded process that alone makes executor processes.

It is forked from the host after the application is loaded and before other threads serve, so that forking never
meets threads. It runs no application code. It reaps the executor processes and tells the host how each ended. When
the host ends, however that happened, it kills all that the host's executor processes started, and ends too.

Host and fork server talk over a ``SOCK_SEQPACKET`` pair. The host sends a `SpawnOrder` (with one end of the new
executor's channel), a `KillOrder` or a `SignalOrder`; the fork server sends an `ExitReport`. Both ends are this
project's own code, so orders are pickled; an exit report is a fixed record.
"""

from __future__ import annotations

import _socket  # the real thing, whatever a cooperative library made of `socket`
import array
import contextlib
import errno
import gc
import os
import pickle
import posix
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from rcon_plugins.errors import ConfinementError, KernelError
from rcon_plugins.executors.channel import Channel, ChannelClosed, Frame
from rcon_plugins.kernel import process
from rcon_plugins.kernel.proc import other_threads
from rcon_plugins.kernel.syscalls import poll_readable
from rcon_plugins.tree.locks import entering

if TYPE_CHECKING:
    import pluggy

    from rcon_plugins.kernel.capability import Identity
    from rcon_plugins.settings.policy import Policy
    from rcon_plugins.tree.instance import Instance

#: What an executor process does with each work: called with the work's first frame.
Service = Callable[[Channel, Frame], None]

#: First frame of a new executor process, and last after each work: it is confined and waits for work. Payload: its pid.
READY = 1
#: First frame of a new executor process: it could not be confined. Payload: why, as text.
FAILED = 2
#: First frame of a new executor process: its confinement has as many processes as it may. Payload: in words.
FULL = 3
PID = struct.Struct("!i")
_EXIT_REPORT = struct.Struct("!qii")
_LARGEST_BIRTH = 128 * 1024

_EXIT_NOT_CONFINED = 71
_EXIT_SERVICE_RAISED = 70


class SpawnOrder(NamedTuple):
    """Make an executor process in the cgroup ``work/<name>/<leaf>``, for one policy and the rest of its life.

    ``identity``: who it will be; None keeps the server's user and groups.
    """

    number: int
    name: str
    leaf: str
    policy: Policy
    identity: Identity | None = None


class KillOrder(NamedTuple):
    """End an executor process, by its pid: it may have left its cgroup."""

    number: int


class SignalOrder(NamedTuple):
    """Send an executor process a signal that its service expects, by its pid."""

    number: int
    signal: int


class ExitReport(NamedTuple):
    """An executor process ended with a wait status; or, with pid 0, was never born: ``status`` is an errno."""

    number: int
    pid: int
    status: int


class ForkServer:
    """The fork server's own side. `run` never returns."""

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
        self._children: dict[int, tuple[SpawnOrder, int]] = {}  # by pidfd
        #: Rings when a child ends; and what rings it.
        self._sigchld_read, self._sigchld_write = -1, -1

    def run(self) -> NoReturn:
        """Serve until the host is gone; then end all there is, and exit."""
        status = 1
        self._pid = os.getpid()
        try:
            # Not in the terminal's foreground group: an interrupt is the host's to act on, not ours.
            os.setsid()
            process.take_default_signals()
            self._host_pidfd = os.pidfd_open(self._host)
            self._leave_the_servers_things()
            process.join_new_session_keyring()
            self._sigchld_read, self._sigchld_write = process.open_sigchld_pipe()
            gc.collect()
            gc.freeze()  # what is here now stays shared with every executor process
            self._serve()
            status = 0
        except BaseException:  # noqa: BLE001 - the end of this process: say why, whatever it was
            traceback.print_exc()
        finally:
            try:
                self._instance.sweep(f"{self._host}-")
            except BaseException:  # noqa: BLE001 - as above; the next start removes what is left
                traceback.print_exc()
            os._exit(status)

    def _leave_the_servers_things(self) -> None:
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
        while True:
            ready = poll_readable((control, host, self._sigchld_read, *self._children), None)
            ended = ready & self._children.keys()
            for pidfd in ended:
                self._reap(pidfd)
            if ended or self._sigchld_read in ready:
                process.drain(self._sigchld_read)
                # Work can make children of ours that are none of our executors (clone(2), CLONE_PARENT).
                process.reap_unknown_children({pid for _, pid in self._children.values()})
            if host in ready:
                return
            if control in ready and not self._take_order():
                return

    def _take_order(self) -> bool:
        """Make or end one executor process; False when the host has closed its side."""
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                _LARGEST_BIRTH, _socket.CMSG_SPACE(array.array("i").itemsize), _socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # closed while something we told was still unread
            return False
        if not data:
            return False
        order = pickle.loads(data)  # noqa: S301 - from our own host, never from an executor process
        if isinstance(order, KillOrder):
            self._signal(order.number, signal.SIGKILL)
        elif isinstance(order, SignalOrder):
            self._signal(order.number, order.signal)
        elif not ancillary:
            self._tell(ExitReport(order.number, 0, errno.EMFILE))  # there was no room for the descriptor
        else:
            self._spawn(order, array.array("i", ancillary[0][2])[0])
        return True

    def _spawn(self, birth: SpawnOrder, channel_end: int) -> None:
        # gevent's os.close() waits for an event loop, which runs nowhere here; posix.close() is the real one.
        try:
            fault = self._prepare(birth.policy)
            pid = process.fork()
            if pid == 0:
                self._become_executor(birth, channel_end, fault)
            try:
                self._children[os.pidfd_open(pid)] = (birth, pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)  # our own child, not yet reaped: the number is still its own
                posix.waitpid(pid, 0)
                raise
        except OSError as error:
            self._tell(ExitReport(birth.number, 0, error.errno or errno.EIO))
        finally:
            posix.close(channel_end)

    def _prepare(self, policy: Policy) -> BaseException | None:
        """Have plugins prepare a birth; what went wrong is the new process's to tell."""
        try:
            self._hook.rcon_prepare(policy=policy)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
            return error
        return None

    def _signal(self, executor: int, number: int) -> None:
        for pidfd, (birth, pid) in self._children.items():
            if birth.number == executor:
                with contextlib.suppress(KernelError):  # the host kills its cgroup besides
                    process.kill(
                        pidfd, pid, birth.identity.uid if birth.identity is not None else None, number
                    )

    def _reap(self, pidfd: int) -> None:
        birth, pid = self._children.pop(pidfd)
        posix.close(pidfd)
        _, status = posix.waitpid(pid, 0)
        self._tell(ExitReport(birth.number, pid, status))

    def _tell(self, death: ExitReport) -> None:
        # The host may be gone by now: the loop sees that by itself.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._control.send(_EXIT_REPORT.pack(*death))

    def _become_executor(self, birth: SpawnOrder, channel_end: int, fault: BaseException | None) -> NoReturn:
        try:
            self._control.close()
            for pidfd in (self._host_pidfd, *self._children):
                posix.close(pidfd)
            os.setsid()
            process.close_sigchld_pipe(self._sigchld_read, self._sigchld_write)
            for renew in self._after_fork:
                renew()
            end = socket.socket(fileno=channel_end)
            end.setblocking(True)
            run_executor(Channel(end), birth, self._pid, self._instance, self._hook, self._service, fault)
        except BaseException:  # noqa: BLE001 - the end of this process: say why, whatever it was
            traceback.print_exc()
        finally:
            os._exit(_EXIT_SERVICE_RAISED)


def run_executor(
    channel: Channel,
    birth: SpawnOrder,
    server: int,
    instance: Instance,
    hook: pluggy.HookRelay,
    service: Service,
    fault: BaseException | None = None,
) -> NoReturn:
    """The life of an executor process: get confined for good, say so, serve one work after the other, end.

    ``fault``: why it cannot be confined, known before it was made.

    A fork that confined code made may come back here through the service: it ends at once, in silence.
    """
    me = os.getpid()
    try:
        if fault is not None:
            raise fault
        if not _enter(birth, instance):
            channel.send(
                (FULL, f"{birth.policy.pids} processes and threads are running, which is the most".encode())
            )
            os._exit(_EXIT_NOT_CONFINED)
        process.replace_with_closed_socket(instance.locks)
        hook.rcon_drop(policy=birth.policy, place="process", identity=birth.identity)
        if birth.identity is not None:
            process.join_new_session_keyring()
        process.die_with_parent(server)
        _be_alone()
    except BaseException as error:  # noqa: BLE001 - whatever it was: the host is told and nothing runs
        with contextlib.suppress(ChannelClosed):  # the host ends, and took the cgroup away just now
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
        if birth.policy.leave_children and os.getpid() == me:
            _let_threads_go_on()
    except BaseException:  # noqa: BLE001 - the end of this process: say why, whatever it was
        if os.getpid() == me:
            traceback.print_exc()
    finally:
        if os.getpid() == me:
            _flush()
        os._exit(status)


def _let_threads_go_on() -> None:
    """Wait for the threads that work has left, as Python does at its exit. The host may end them before."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()


def _be_alone() -> None:
    """Make sure that no other thread of this process still has what this one gave up. Raises `ConfinementError`."""
    if threads := other_threads():
        raise ConfinementError(
            f"a library started threads while the process was being made, which still have the server's privileges: "
            f"{', '.join(threads)}; have it start them at first use, not in a fork hook (os.register_at_fork)"
        )


def _enter(birth: SpawnOrder, instance: Instance) -> bool:
    """Enter the leaf; False where the confinement is full. The kernel counts who moves in, and does not refuse it.

    One at a time, in all workers of the server, so that no two take the last place. Source: cgroup-v2.rst, pids.
    """
    leaf, pids = instance.executor_cgroup(birth.name, birth.leaf), birth.policy.pids
    if pids is None:
        leaf.enter_process()
        return True
    together = instance.policy_cgroup(birth.name)
    with entering(instance.locks, birth.name):
        if (together.read().pids_current or 0) >= pids:
            return False
        leaf.enter_process()
        return (together.read().pids_current or 0) <= pids


def read_exit_report(data: bytes) -> ExitReport:
    """A death from its record."""
    return ExitReport(*_EXIT_REPORT.unpack(data))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
