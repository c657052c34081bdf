"""Job control between a shell and one command: signals, stop and continue, as if the shell had run the command itself.

The command keeps the process group of the caller. If there is a terminal, that is its foreground group, so job control
and the keys of the terminal reach the command as usual. The caller leaves that group, so that a signal to the whole
group reaches the command once. The caller forwards signals that are sent to it alone. When the command stops, the
caller joins the group again and stops too, because the shell watches the caller. When the shell continues the group,
both continue.
Sources: setpgid(2), sigwaitinfo(2), termios(3), credentials(7).

This module acts on the calling process. Use it from one thread only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import signal
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.proc import inherited_descriptors

if TYPE_CHECKING:
    from resource import struct_rusage

#: Signals that are never blocked: faults of this process, and signals that the kernel does not let it block.
_OWN = frozenset(
    getattr(signal, name)
    for name in (
        "SIGKILL",
        "SIGSTOP",
        "SIGSEGV",
        "SIGBUS",
        "SIGFPE",
        "SIGILL",
        "SIGABRT",
        "SIGTRAP",
        "SIGSYS",
    )
)
#: Signals that a terminal sends to its whole foreground group. The command gets them itself.
_OF_THE_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_STOPS = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
#: Python ignores these at its start, and an ignored signal stays ignored through execve(2).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
#: How long another part of this process may take to reap its own child, seconds.
_DOUBT_SECONDS = 1.0
#: How long to wait at the end for killed orphans, seconds.
_LAST_SECONDS = 0.5
#: The most orphans of the command to reap before the next signal.
_MOST_REAPED = 64
_FROM_THE_KERNEL = 0x80  # SI_KERNEL, asm-generic/siginfo.h


class Caller:
    """The process between shell and command. Blocks signals when it is made; `wait` receives them."""

    def __init__(self) -> None:
        self._blocked = signal.valid_signals() - _OWN
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        self._pid = os.getpid()
        self._group = os.getpgrp()
        self._session = os.getsid(0)
        self._child = 0
        self._is_orphan: Callable[[int], bool] | None = None
        #: An ended child that another part of this process should reap, and until when it may; pid 0 for none.
        self._doubtful = 0, 0.0
        self._deadline: float | None = None
        #: The largest resident set of a process that this one has reaped, or that a reaped one has; bytes.
        self.rss_peak = 0
        #: The CPU time of the command and of what it waited for, seconds, also from before it entered its cgroup.
        self.cpu_seconds = 0.0
        # With SIGCHLD ignored, the kernel reaps children itself and wait() never reports how they ended.
        self._ignores_children = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
        if self._ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def become_child(self) -> None:
        """Restore the signals that the caller was started with. Call it in the new process, right before execve(2)."""
        for number in _IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def go_back(self) -> None:
        """Restore the signals and the process group that the caller had."""
        if self._is_orphan is not None:
            _adopt_orphans(False)
            self._is_orphan = None
        if os.getpgrp() != self._group:
            self._join_group()
        if self._ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def forget_signals(self) -> None:
        """Discard pending signals that arrived after the command ended."""
        while signal.sigtimedwait(self._blocked, 0) is not None:
            pass

    def leave_group_to(self, child: int) -> None:
        """Leave the process group to ``child``. Call it in the caller, before the command is executed.

        Later, a signal to the whole group could reach the command twice: from its sender, and forwarded by the caller.
        """
        self._child = child
        self._leave_group()

    def close_descriptors(self, keep: Iterable[int] = ()) -> None:
        """Close all descriptors except 2 and ``keep``. Call it in the caller, once the command is executed.

        If the caller kept a pipe open, its reader would go on waiting after the command closed its own end.
        """
        kept = {2, *keep}
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in {0, 1} - kept:
            os.dup2(null, standard)
        for descriptor in inherited_descriptors():
            if descriptor not in kept:
                os.close(descriptor)
        os.close(null)

    def wait(self, deadline: float | None = None) -> int | None:
        """Wait until the command ends. Return its wait status; None when ``deadline`` (`time.monotonic`) comes first.

        Meanwhile forward signals, and stop when the command stops, but not beyond ``deadline``. Raises KernelError
        if another part of the process reaped the command.
        """
        self._deadline = deadline
        more = False
        while True:
            patience = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if more:
                patience = 0.0  # signals come first
            elif self._doubtful[0]:
                patience = min(patience, _DOUBT_SECONDS)
            info = signal.sigtimedwait(self._blocked, patience)
            if info is None:
                if deadline is not None and time.monotonic() >= deadline:
                    return None
            elif info.si_signo != signal.SIGCHLD:
                self._forward(info)
                continue
            status = self._look()
            if status is not None:
                return status
            more = self.reap_orphans() == _MOST_REAPED
            if self._is_late():
                return None  # do not take pending signals: they might continue a stopped command

    def adopt_orphans(self, is_orphan: Callable[[int], bool]) -> None:
        """Become the parent of the command's descendants whose parent ends, and reap them in `wait`.

        ``is_orphan`` is called with the pid of an ended child other than the command, and returns whether it is one of
        them. Raises `KernelError`.
        """
        _adopt_orphans(True)
        self._is_orphan = is_orphan

    def reap_orphans(self) -> int:
        """Reap at most `_MOST_REAPED` of the adopted processes that have ended. Return how many."""
        if self._is_orphan is None:
            return 0
        for reaped in range(_MOST_REAPED):
            try:
                ended = posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT)
            except ChildProcessError:
                return reaped
            if ended is None or ended.si_pid == self._child or not self._may_reap(ended.si_pid):
                return reaped
            self._note(posix.wait4(ended.si_pid, 0)[2])
        return _MOST_REAPED

    def reap_last_orphans(self) -> None:
        """Reap the adopted processes when all of them were killed: some may not have ended yet.

        Wait until none ends any more for a short time: a busy machine takes its time for many.
        """
        if self._is_orphan is None:
            return
        deadline = time.monotonic() + _LAST_SECONDS
        while time.monotonic() < deadline:
            if self.reap_orphans():
                deadline = time.monotonic() + _LAST_SECONDS
                continue
            try:
                ended = posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT)
            except ChildProcessError:
                return  # none is left
            if ended is None:
                time.sleep(0.001)
            elif not self._may_reap(ended.si_pid):
                return  # another part of this process reaps its own child

    def _may_reap(self, pid: int) -> bool:
        """Return whether an ended child is an orphan, or nobody else has reaped it for a while.

        It hides the orphans behind it. An orphan that left its group is told by that alone.
        """
        now = time.monotonic()
        if (
            self._is_orphan is None
            or self._is_orphan(pid)
            or (self._doubtful[0] == pid and now >= self._doubtful[1])
        ):
            self._doubtful = 0, 0.0
            return True
        if self._doubtful[0] != pid:
            self._doubtful = pid, now + _DOUBT_SECONDS
        return False

    def _look(self) -> int | None:
        """Return the wait status of the command if it has ended. Stop too if it has stopped."""
        while True:
            try:
                found, status, usage = posix.wait4(self._child, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                raise KernelError(
                    "the exit status of the command is lost: another part of this process reaped it",
                    errno=errno.ECHILD,
                    path="waitpid",
                ) from None
            if found == 0:
                return None
            if not os.WIFSTOPPED(status):
                self._note(usage)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
                return int(status)
            self._stop_too(os.WSTOPSIG(status))

    def _note(self, usage: struct_rusage) -> None:
        self.rss_peak = max(self.rss_peak, usage.ru_maxrss * 1024)

    def _forward(self, info: signal.struct_siginfo) -> None:
        number = info.si_signo
        if info.si_code == _FROM_THE_KERNEL and number in _OF_THE_TERMINAL | {signal.SIGWINCH}:
            return
        # A terminal that hangs up signals the leader of its session only.
        if info.si_code == _FROM_THE_KERNEL and number == signal.SIGHUP and self._session != self._pid:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._child, number)

    # -- the process group ------------------------------------------------------------------------

    def _leave_group(self) -> None:
        """Leave the command's group. Join the shell's group if the caller leads the job, else make a new group."""
        if self._session == self._pid:
            return  # the leader of a session cannot leave
        with contextlib.suppress(PermissionError, ProcessLookupError):
            if self._group != self._pid:
                os.setpgid(0, 0)
            elif (shells := os.getpgid(os.getppid())) != self._group:
                os.setpgid(0, shells)

    def _join_group(self) -> None:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(0, self._group)

    def _stop_too(self, number: int) -> None:
        """Stop in the same way as the command, so that the shell sees it. Continue the command with this process."""
        theirs = os.getpgid(self._child)
        terminal = _open_terminal()
        try:
            foreground = None if terminal is None else os.tcgetpgrp(terminal)
            self._join_group()
            if proc.is_stopped(self._child):
                self._stop_until_deadline(number)
            if self._is_late():
                return  # the shell has not continued the job: the terminal still belongs to the shell
            if terminal is not None and foreground == theirs != self._group:
                # Give the terminal back to a shell inside the command that had it.
                with contextlib.suppress(OSError):
                    os.tcsetpgrp(terminal, theirs)
        finally:
            if terminal is not None:
                os.close(terminal)
            self._leave_group()
        if proc.is_stopped(self._child) and theirs != self._group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(theirs, signal.SIGCONT)

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _stop_until_deadline(self, number: int) -> None:
        """Stop this process. A helper process continues it at the deadline, which also holds for a stopped command."""
        if self._deadline is None:
            self._stop(number)
            return
        from rcon_plugins.kernel import process  # loads ctypes

        alarm = posix.fork()
        if alarm == 0:
            try:
                process.die_with_parent(self._pid)
                os.setpgid(0, 0)
                time.sleep(max(0.0, self._deadline - time.monotonic()))
                os.kill(self._pid, signal.SIGCONT)
            finally:
                os._exit(0)
        self._stop(number)
        os.kill(alarm, signal.SIGKILL)
        posix.waitpid(alarm, 0)

    def _stop(self, number: int) -> None:
        """Stop this process by the same signal, which the shell may report. Do nothing in an orphaned process group."""
        if number in _STOPS and signal.getsignal(number) == signal.SIG_DFL:
            os.kill(self._pid, number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # delivered here
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        else:
            os.kill(self._pid, signal.SIGSTOP)


def _adopt_orphans(adopt: bool) -> None:
    """Do as `rcon_plugins.kernel.process.adopt_orphans` does; that module loads slowly. Raises `KernelError`."""
    from rcon_plugins.kernel.syscalls import PR_SET_CHILD_SUBREAPER, prctl  # loads ctypes

    prctl(PR_SET_CHILD_SUBREAPER, int(adopt))


def _open_terminal() -> int | None:
    try:
        return os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None
