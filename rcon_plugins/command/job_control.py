"""Standing between a shell and one command: signals, stopping and going on, as if nobody stood there.

The command keeps the process group that its caller was given, which is the terminal's foreground group where there is
one: job control and the keys of the terminal reach it as ever. The caller steps out of that group, so that a signal to
the whole group reaches the command once and not twice; what is sent to the caller alone it hands on. When the command
stops, the caller joins the group again and stops too, which is what a shell looks at; when the shell lets the group
go on, both do. Sources: setpgid(2), sigwaitinfo(2), termios(3), credentials(7).

All of it acts on the calling process, and is meant for one thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import signal
import time
from collections.abc import Iterable

from rcon_plugins.errors import KernelError
from rcon_plugins.kernel import proc
from rcon_plugins.kernel.proc import inherited_descriptors

#: Never blocked: a fault of this very process, or not to be had.
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
#: What a terminal sends to its whole foreground group: the command has it already.
_OF_THE_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_STOPS = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
#: Python ignores these at its start, and what is ignored stays so through execve(2).
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_FROM_THE_KERNEL = 0x80  # SI_KERNEL, asm-generic/siginfo.h


class Caller:
    """The process that stands between. Signals are blocked from its making on, and wait until `wait` takes them."""

    def __init__(self) -> None:
        self._blocked = signal.valid_signals() - _OWN
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        self._pid = os.getpid()
        self._group = os.getpgrp()
        self._session = os.getsid(0)
        self._child = 0
        self._deadline: float | None = None
        # Where they are ignored nobody is told how a child ended, or that it did.
        self._ignores_children = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
        if self._ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def become_child(self) -> None:
        """In the new process, last of all before execve(2): take signals as the caller was given them."""
        for number in _IGNORED_BY_PYTHON:
            signal.signal(number, signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def go_back(self) -> None:
        """Take signals again as before, in the group as before: there is no other for the terminal to listen to."""
        if os.getpgrp() != self._group:
            self._join_group()
        if self._ignores_children:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def forget_signals(self) -> None:
        """Drop those that came when there was nobody left to hand them to."""
        while signal.sigtimedwait(self._blocked, 0) is not None:
            pass

    def stand_aside(self, child: int, keep: Iterable[int] = ()) -> None:
        """In the caller, once ``child`` is there: leave it the group, and all open files but 2 and those of ``keep``.

        Else a reader at the other end of a pipe would wait for us after the command closed its side.
        """
        self._child = child
        kept = {2, *keep}
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in {0, 1} - kept:
            os.dup2(null, standard)
        for descriptor in inherited_descriptors():
            if descriptor not in kept:
                os.close(descriptor)
        os.close(null)
        self._leave_group()

    def wait(self, deadline: float | None = None) -> int | None:
        """Until the command ends: its wait status; None when ``deadline`` (`time.monotonic`) comes first.

        Meanwhile signals are handed on, and the command's stops are followed, but not beyond ``deadline``.
        Raises KernelError where somebody else was told how it ended.
        """
        self._deadline = deadline
        while True:
            patience = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
            info = signal.sigtimedwait(self._blocked, patience)
            if info is None:
                if deadline is not None and time.monotonic() >= deadline:
                    return None
            elif info.si_signo != signal.SIGCHLD:
                self._hand_on(info)
                continue
            status = self._look()
            if status is not None:
                return status
            if self._is_late():
                return None  # before anything that came meanwhile lets a stopped command go on

    def _look(self) -> int | None:
        """What has become of the command; its wait status if it has ended."""
        while True:
            try:
                found, status = posix.waitpid(self._child, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                raise KernelError(
                    "how the command ended is lost", errno=errno.ECHILD, path="waitpid"
                ) from None
            if found == 0:
                return None
            if not os.WIFSTOPPED(status):
                return int(status)
            self._stop_too(os.WSTOPSIG(status))

    def _hand_on(self, info: signal.struct_siginfo) -> None:
        number = info.si_signo
        if info.si_code == _FROM_THE_KERNEL and number in _OF_THE_TERMINAL | {signal.SIGWINCH}:
            return
        # A terminal that goes away tells the leader of its session only.
        if info.si_code == _FROM_THE_KERNEL and number == signal.SIGHUP and self._session != self._pid:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._child, number)

    # -- the process group ------------------------------------------------------------------------

    def _leave_group(self) -> None:
        """Out of the command's group: into one of our own, or, where we lead the job, into the shell's."""
        if self._session == self._pid:
            return  # the leader of a session cannot
        with contextlib.suppress(PermissionError, ProcessLookupError):
            if self._group != self._pid:
                os.setpgid(0, 0)
            elif (shells := os.getpgid(os.getppid())) != self._group:
                os.setpgid(0, shells)

    def _join_group(self) -> None:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(0, self._group)

    def _stop_too(self, number: int) -> None:
        """The command has stopped: so do we, that the shell sees it; and with the shell's leave both go on."""
        theirs = os.getpgid(self._child)
        terminal = _open_terminal()
        try:
            foreground = None if terminal is None else os.tcgetpgrp(terminal)
            self._join_group()
            if proc.is_stopped(self._child):
                self._stop_until_deadline(number)
            if self._is_late():
                return  # nobody has let the job go on: the terminal is the shell's
            if terminal is not None and foreground == theirs != self._group:
                # A shell that runs in the command and had the terminal gets it back.
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
        """Stop, and have it go on when it is time for the command to end: that is not the command's to say."""
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
        """Stop this process. By the same signal, which the shell may tell; does nothing in an orphaned group."""
        if number in _STOPS and signal.getsignal(number) == signal.SIG_DFL:
            os.kill(self._pid, number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})  # and here it is
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        else:
            os.kill(self._pid, signal.SIGSTOP)


def _open_terminal() -> int | None:
    try:
        return os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None
