"""The terminal as a full screen: taken over while a command runs, and restored however the command ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rcon_plugins.kernel import descriptors

#: The signals that end the command. Each raises `Ended` in the main thread.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
#: The signals that `Screen.wait` returns by name: the size has changed; the user pressed Ctrl-Z.
_REPORTED = {signal.SIGWINCH: "resize", signal.SIGTSTP: "suspend"}
_KEYS = {b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down"}
_KEYS |= {b"\x1b[5~": "page up", b"\x1b[6~": "page down"}


class Ended(Exception):
    """Raised when a signal ends the command, or the terminal is gone. ``number`` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def is_available() -> bool:
    """Return whether standard output is a terminal that can show a full screen."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


class Screen:
    """Standard output as a full screen: no cursor, no echo, keys one at a time. For the main thread.

    A context manager that restores the terminal: after an exception, SIGTERM and SIGHUP too, and while the command is
    suspended.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, emoji=False, markup=False)
        self._keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._mode: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._signals_read = self._signals_write = -1

    @property
    def size(self) -> tuple[int, int]:
        """The columns and lines of the terminal, now."""
        return os.get_terminal_size(sys.stdout.fileno())

    def draw(self, renderable: Any) -> None:
        """Show ``renderable`` on the whole screen. Raises `Ended` where the terminal is gone."""
        width, height = self.size
        try:
            options = self._console.options.update_dimensions(width, height)
            self._console.update_screen(renderable, options=options)
        except OSError:
            raise Ended(signal.SIGHUP) from None

    def wait(self, seconds: float) -> list[str]:
        """Return the keys pressed and the signals received, as soon as there are any; none after ``seconds``.

        A letter is itself; the others are ``up``, ``down``, ``page up``, ``page down``, ``resize`` and ``suspend``.
        Raises `Ended` where the terminal is gone.
        """
        waited_for = [self._signals_read] if self._keyboard is None else [self._signals_read, self._keyboard]
        ready, _, _ = select.select(waited_for, [], [], max(0.0, seconds))
        happened = []
        if self._signals_read in ready:
            numbers = os.read(self._signals_read, 64)
            happened += [_REPORTED[signal.Signals(one)] for one in set(numbers) if one in set(_REPORTED)]
        if self._keyboard is not None and self._keyboard in ready:
            happened += self._keys(self._keyboard)
        return happened

    def _keys(self, keyboard: int) -> Iterator[str]:
        try:
            data = os.read(keyboard, 64)
        except OSError:
            data = b""
        if not data:
            raise Ended(signal.SIGHUP)
        return _split(data)

    def suspend(self) -> None:
        """Restore the terminal, stop this process as a shell expects, and take the terminal again when continued."""
        self._leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._enter()

    def __enter__(self) -> Screen:
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _enter(self) -> None:
        try:
            self._signals_read, self._signals_write = descriptors.pipe(blocking=False)
            signal.set_wakeup_fd(self._signals_write, warn_on_full_buffer=False)
            for number in _ENDING:
                self._handlers[number] = signal.signal(number, _end)
            for reported in _REPORTED:
                self._handlers[reported] = signal.signal(reported, _nothing)
            if self._keyboard is not None:
                self._mode = termios.tcgetattr(self._keyboard)
                tty.setcbreak(self._keyboard)
            self._console.set_alt_screen(True)
            self._console.show_cursor(False)
        except BaseException:
            self._leave()
            raise

    def _leave(self) -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)  # restoring must not be interrupted
        try:
            with contextlib.suppress(OSError):  # the terminal is gone
                self._console.show_cursor(True)
                self._console.set_alt_screen(False)
        finally:
            if self._mode is not None and self._keyboard is not None:
                with contextlib.suppress(termios.error):
                    termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._mode)
                self._mode = None
            signal.set_wakeup_fd(-1)
            for handled, handler in self._handlers.items():
                signal.signal(handled, handler)
            self._handlers.clear()
            for descriptor in (self._signals_read, self._signals_write):
                if descriptor >= 0:
                    os.close(descriptor)
            self._signals_read = self._signals_write = -1


def seconds_until(deadline: float) -> float:
    """Return the seconds from now to ``deadline`` (of `time.monotonic`), at least 0."""
    return max(0.0, deadline - time.monotonic())


def _split(data: bytes) -> Iterator[str]:
    while data:
        for code, name in _KEYS.items():
            if data.startswith(code):
                yield name
                data = data[len(code) :]
                break
        else:
            if not data.startswith(b"\x1b"):
                yield chr(data[0])
            data = data[1:]


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise Ended(number)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: Python writes the number to the wake-up descriptor."""
