"""Run a command on a pseudo-terminal, and read its screen and modes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAKEN, GIVEN_BACK = b"\x1b[?1049h", b"\x1b[?1049l"
NO_CURSOR, CURSOR = b"\x1b[?25l", b"\x1b[?25h"
#: The code that runs ``rcon`` with the arguments.
MAIN = "from rcon_plugins.cli.rcon import main; main()"


class Terminal:
    """A command on a pseudo-terminal, as the leader of its session."""

    def __init__(self, program: str, *arguments: str, lines: int = 24, columns: int = 80) -> None:
        self.master, self._slave = pty.openpty()
        self.resize(lines, columns)
        self.before = termios.tcgetattr(self._slave)
        self.said = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if not ready:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.said += data
        return bool(data)

    def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said[-2000:]
            self.read(0.1)

    def shows(self, text: str) -> bool:
        return any(text in line for line in self.screen())

    def screen(self) -> list[str]:
        """Return the current lines. Each line is written after a move of the cursor to its beginning."""
        lines: dict[int, str] = {}
        for number, text in re.findall(
            r"\x1b\[(\d+);1H([^\x1b]*(?:\x1b\[[0-9;]*m[^\x1b]*)*)", self.said.decode(errors="replace")
        ):
            lines[int(number)] = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
        return [lines.get(number, "") for number in range(1, max(lines, default=0) + 1)]

    def keys(self, text: str) -> None:
        os.write(self.master, text.encode())

    def status(self) -> int:
        self.until(lambda: self.process.poll() is not None)
        while self.read(0.1):
            pass
        return self.process.returncode

    def is_clean(self) -> bool:
        """Return whether the screen, the cursor and the modes are as before."""
        return (
            self.said.count(TAKEN) == self.said.count(GIVEN_BACK) > 0
            and self.said.rindex(GIVEN_BACK) > self.said.rindex(TAKEN)
            and self.said.rindex(CURSOR) > self.said.rindex(NO_CURSOR)
            and termios.tcgetattr(self._slave) == self.before
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for descriptor in (self.master, self._slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def terminal(*arguments: str, program: str = MAIN, **size: int) -> Iterator[Terminal]:
    made = Terminal(program, *arguments, **size)
    try:
        yield made
    finally:
        made.close()
