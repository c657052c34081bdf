"""A terminal taken over for as long as a command shows something on it, and given back as it was, whatever ends it."""

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

#: What ends the command from outside; it raises `Ended` wherever the program is.
_ENDING = (signal.SIGTERM, signal.SIGHUP)
#: What is told by `Screen.wait`: the size has changed; the user wants the shell for a while, and is back.
_TOLD = {signal.SIGWINCH: "resize", signal.SIGTSTP: "suspend"}
_KEYS = {b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down"}
_KEYS |= {b"\x1b[5~": "page up", b"\x1b[6~": "page down"}


class Ended(Exception):
    """Raised by a signal that ends the command, or because the terminal is gone."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def can_be_taken() -> bool:
    """Whether standard output is a terminal that can do more than print."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


class Screen:
    """Standard output as a screen: no cursor, no echo, keys one at a time. Of the main thread.

    Used as a context manager. The terminal is as before after it: left by an exception, SIGTERM or SIGHUP too, and
    while the command is suspended.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, emoji=False, markup=False)
        self._keyboard = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._mode: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._sigchld_read = self._ringer = -1

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        return os.get_terminal_size(sys.stdout.fileno())

    def draw(self, renderable: Any) -> None:
        """Show it in place of what is there. Raises `Ended` where the terminal is gone."""
        width, height = self.size
        try:
            options = self._console.options.update_dimensions(width, height)
            self._console.update_screen(renderable, options=options)
        except OSError:
            raise Ended(signal.SIGHUP) from None

    def wait(self, seconds: float) -> list[str]:
        """Keys pressed and other things that happened, as soon as there are any; none after ``seconds``.

        Letters are themselves; ``up``, ``down``, ``page up``, ``page down``, ``resize``, ``suspend``. Raises `Ended`
        where the terminal is gone.
        """
        asked = [self._sigchld_read] if self._keyboard is None else [self._sigchld_read, self._keyboard]
        ready, _, _ = select.select(asked, [], [], max(0.0, seconds))
        happened = []
        if self._sigchld_read in ready:
            numbers = os.read(self._sigchld_read, 64)
            happened += [_TOLD[signal.Signals(one)] for one in set(numbers) if one in set(_TOLD)]
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
        """Give the terminal back, stop as the shell expects it of a job, and take the terminal again when continued."""
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
            self._sigchld_read, self._ringer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(self._ringer, warn_on_full_buffer=False)
            for number in _ENDING:
                self._handlers[number] = signal.signal(number, _end)
            for told in _TOLD:
                self._handlers[told] = signal.signal(told, _nothing)
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
            signal.signal(number, signal.SIG_IGN)  # what follows is to be done whole
        try:
            with contextlib.suppress(OSError):  # the terminal is gone: nothing to put back
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
            for descriptor in (self._sigchld_read, self._ringer):
                if descriptor >= 0:
                    os.close(descriptor)
            self._sigchld_read = self._ringer = -1


def wait_until(deadline: float) -> float:
    """Seconds from now to ``deadline`` (monotonic), at least none."""
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
    """The number goes to the wake-up descriptor."""
