"""Run rcon as a shell does: `rcon("run", "--memory", "64M", "--", "true")`, alone or as a job on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pkgutil
import pty
import select
import signal
import tempfile
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rcon_plugins
from tests.commands import become_rcon
from tests.processes import entries

# Load all modules once here, not again in each fork: on the emulated machine that takes seconds.
for _module in pkgutil.walk_packages(rcon_plugins.__path__, "rcon_plugins."):
    importlib.import_module(_module.name)

#: A command that takes so many MiB at once, as its only buffer. A shell would take minutes in an emulated machine.
#: Where it is to be killed, begin with `exec`: a shell that sees it die says "Killed".
ALLOCATE = "dd if=/dev/zero of=/dev/null bs={}M count=1 status=none"
MOUNTS = Path("/sys/fs/cgroup")
PATIENCE = 60.0


class Done(NamedTuple):
    """The result of rcon. `status` is as in Popen: negative for the signal that ended rcon itself."""

    status: int
    out: str
    err: str
    report: dict[str, Any]


def rcon(*arguments: str | Path, before: Callable[[], object] | None = None, cwd: str = "/") -> Done:
    """Run rcon in a fork of this process. If the first argument is ``"run"``, read the report of --json, too."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        words = [str(argument) for argument in arguments]
        if words[0] == "run" and "--json" not in words:
            words[1:1] = ["--json", str(report)]
        paths = [Path(folder, name) for name in ("out", "err")]
        pid = os.fork()
        if pid == 0:
            become_rcon(words, paths, before, cwd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert left_by(pid) == []
        told = json.loads(report.read_text()) if report.exists() and report.read_text() else {}
        out, err = (path.read_text(errors="replace") for path in paths)
        return Done(status, out, err, told)


def left_by(pid: int) -> list[Path]:
    """Return the directories, in any hierarchy, that the rcon process with this pid made."""
    places = [MOUNTS, *(path for path in MOUNTS.iterdir() if path.is_dir())]
    trees = [tree for place in places for tree in entries(place / "rcon")]
    return [tree for tree in trees if tree.name.startswith(f"rcon-{pid}-")]


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait until the condition is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
    return found


class Terminal:
    """A session on a pseudo-terminal. Its leader controls a job like a shell, on orders from the test."""

    def __init__(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        self._orders, orders = os.pipe()
        self._orders_in = orders
        self.events, events = os.pipe()
        self.text = ""
        self.job = 0
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.master)
                os.setsid()
                fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
                for number in range(3):
                    os.dup2(slave, number)
                self._be_shell(list(words), self._orders, events)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(98)
        os.close(slave)
        os.close(events)

    @staticmethod
    def _be_shell(words: list[str], orders: int, events: int) -> None:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        job = os.fork()
        if job == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpid())
            for number in (signal.SIGTTOU, signal.SIGTTIN, signal.SIGTSTP):
                signal.signal(number, signal.SIG_DFL)
            become_rcon(words, [])
        with contextlib.suppress(PermissionError):  # the job has done so itself
            os.setpgid(job, job)
        os.write(events, f"job {job}\n".encode())
        while True:
            _, status = os.waitpid(job, os.WUNTRACED)
            os.tcsetpgrp(0, os.getpgrp())
            if not os.WIFSTOPPED(status):
                os.write(events, f"ended {os.waitstatus_to_exitcode(status)}\n".encode())
                os._exit(0)
            os.write(events, f"stopped {os.WSTOPSIG(status)}\n".encode())
            os.read(orders, 1)
            os.tcsetpgrp(0, job)
            os.killpg(job, signal.SIGCONT)
            os.write(events, b"continued\n")

    def type(self, text: str) -> None:
        """Type text, as at a keyboard."""
        os.write(self.master, text.encode())

    def foreground(self) -> None:
        """Continue the stopped job in the foreground."""
        os.write(self._orders_in, b"x")
        assert self.event() == "continued"

    def wait_for(self, text: str, seconds: float = PATIENCE) -> str:
        """Wait until the terminal shows the text. Return what it has shown since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                raise TimeoutError(f"the terminal never showed {text!r}, but {self.text!r}")
            self.text += self._read()
        before, _, self.text = self.text.partition(text)
        return before + text

    def rest(self) -> str:
        """Return the remaining output, until all processes have closed the terminal."""
        while piece := self._read():
            self.text += piece
        return self.text

    def _read(self) -> str:
        try:
            return os.read(self.master, 65536).decode(errors="replace")
        except OSError:  # EIO: the other side is closed
            return ""

    def event(self, seconds: float = PATIENCE) -> str:
        """Return the next event of the shell: ``job PID``, ``stopped SIGNAL``, ``continued``, ``ended STATUS``."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.events], [], [], seconds)[0]:
                raise TimeoutError(f"the shell saw nothing of the job; the terminal shows {self.text!r}")
            line += os.read(self.events, 1)
        return line.decode().strip()

    def close(self) -> None:
        """Wait for the shell to end, and close all descriptors."""
        os.waitpid(self.pid, 0)
        for descriptor in (self.master, self.events, self._orders, self._orders_in):
            os.close(descriptor)


@contextlib.contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    """Run rcon as a job on a terminal. Kill it if the test fails."""
    made = Terminal(*words)
    job = made.job = int(made.event().split()[1])
    try:
        yield made
    except BaseException:
        for pid in (job, made.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job, signal.SIGKILL)
        raise
    finally:
        made.close()
