"""What each task finds that runs in a process where others ran before it: put back where those changed it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping


class ProcessState:
    """The working directory, umask, signal mask and alarm of this process as they are now, and some of its handlers.

    What else a task leaves behind stays, as in a process of Celery's own pool: environment, handlers of other signals,
    modules, open files.
    """

    def __init__(self, handlers: Mapping[signal.Signals, Callable[..., object]]) -> None:
        """``handlers`` are those that are always to be there, by signal."""
        self._handlers = handlers
        self._directory = _directory()
        self._umask = os.umask(0o777)
        os.umask(self._umask)
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._alarm = signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0)

    def restore(self) -> None:
        """Put it back, in microseconds. In the main thread."""
        os.umask(self._umask)
        if _directory() != self._directory:
            try:
                os.chdir(self._directory or "/")
            except OSError:  # it has been removed, or is no more for this user
                os.chdir("/")
        if not self._alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def _directory() -> str | None:
    """The working directory; None where it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - before each task, and pathlib is slow
    except OSError:
        return None
