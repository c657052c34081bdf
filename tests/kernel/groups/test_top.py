"""rcon top, on a terminal of its own and without one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.instance import Instance
from rcon_plugins.kernel.cgroup import Resources
from tests.kernel.cgroup.helpers import MIB, eventually, running

ROOT = Path(__file__).parents[3]
TAKEN, GIVEN_BACK = b"\x1b[?1049h", b"\x1b[?1049l"
NO_CURSOR, CURSOR = b"\x1b[?25l", b"\x1b[?25h"
MAIN = "from rcon_plugins.cli.rcon import main; main()"


class Terminal:
    """A command on a pseudo-terminal, as its session's leader."""

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
        """The lines as they are now: each is written after a move of the cursor to its beginning."""
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
        """Whether the screen, the cursor and the modes are as before."""
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


@pytest.fixture
def busy(instance: Instance, own: str) -> Iterator[str]:
    """The name of a group with a process that keeps a CPU busy, as far as its quota lets it."""
    together = instance.together(f"{own}~busy").create()
    together.configure(Resources(cpu_quota=0.2, memory_max=64 * MIB))
    with running(instance.leaf(f"{own}~busy", "1").create(), _burn):
        eventually(lambda: (together.read().memory_current or 0) > 16 * MIB, 60)
        yield f"{own}~busy"


def _burn() -> None:
    held = bytearray(16 * MIB)
    held[::4096] = b"x" * len(held[::4096])
    while True:
        pass


def test_a_live_table(busy: str) -> None:
    with terminal("top", "--interval", "0.5") as it:
        it.until(lambda: re.search(rf"{busy} +[1-9][0-9.]* +\d", "\n".join(it.screen())))
        lines = it.screen()
        assert len(lines) == 24
        assert max(map(len, lines)) <= 80
        assert "sorted by cpu" in lines[0]
        assert lines[1].split()[:3] == ["GROUP", "CPU%", "THR%"]
        assert lines[-1].startswith("q:quit ")
        it.keys("m")
        it.until(lambda: it.shows("sorted by memory"))
        it.keys("q")
        assert it.status() == 0
        assert it.is_clean()


def test_other_sizes(busy: str) -> None:
    with terminal("top", "--interval", "0.5", lines=8, columns=60) as it:
        it.until(lambda: it.shows("q:quit"))
        assert len(it.screen()) == 8
        it.said = b""
        it.resize(30, 132)
        it.until(lambda: it.shows("OWNER") and it.shows("q:quit"))
        it.until(lambda: len(it.screen()) == 30)
        it.said = TAKEN + NO_CURSOR + it.said
        it.keys("q")
        assert it.status() == 0
        assert it.is_clean()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda it: it.keys("\x03"), 0),
        (lambda it: os.kill(it.process.pid, signal.SIGINT), 0),
        (lambda it: os.kill(it.process.pid, signal.SIGTERM), 128 + signal.SIGTERM),
        (lambda it: os.kill(it.process.pid, signal.SIGHUP), 128 + signal.SIGHUP),
    ],
    ids=["Ctrl-C", "INT", "TERM", "HUP"],
)
def test_the_terminal_is_clean_after(end: Callable[[Terminal], object], status: int) -> None:
    with terminal("top") as it:
        it.until(lambda: it.shows("q:quit"))
        end(it)
        assert it.status() == status
        assert it.is_clean()
        assert b"Traceback" not in it.said


def test_the_terminal_is_clean_after_a_crash() -> None:
    """And the message comes after that, where it can be read."""
    broken = (
        "from rcon_plugins.cli import top\n"
        "calls = []\n"
        "def source():\n"
        "    calls.append(1)\n"
        "    if len(calls) > 1: raise RuntimeError('on purpose')\n"
        "    return []\n"
        "top.top(source, interval=0.2)\n"
    )
    with terminal(program=broken) as it:
        assert it.status() == 1
        assert it.is_clean()
        assert it.said.index(b"RuntimeError: on purpose") > it.said.rindex(GIVEN_BACK)


def test_the_terminal_is_given_back_while_it_is_suspended() -> None:
    with terminal("top", "--interval", "0.3") as it:
        it.until(lambda: it.shows("q:quit"))
        os.kill(it.process.pid, signal.SIGTSTP)
        it.until(
            lambda: "T" in Path(f"/proc/{it.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        )
        it.read(0.1)
        assert it.is_clean()
        os.kill(it.process.pid, signal.SIGCONT)
        it.until(lambda: it.said.count(TAKEN) == 2 and not it.is_clean())
        it.keys("q")
        assert it.status() == 0
        assert it.is_clean()


def test_a_terminal_that_goes_away_ends_it() -> None:
    with terminal("top") as it:
        it.until(lambda: it.shows("q:quit"))
        os.close(it._slave)
        os.close(it.master)
        assert it.process.wait(60) == 128 + signal.SIGHUP


def test_plain_tables_without_a_terminal(busy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["top", "--interval", "0.5", "--iterations", "2", "--sort", "name"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    first, second = out.removesuffix("\n\n").split("\n\n")
    for table in (first, second):
        heading, _, *lines = table.splitlines()
        assert "sorted by name, every 0.5 s" in heading
        (line,) = [line.split() for line in lines if line.startswith(f"{busy} ")]
        assert 0 < float(line[1]) < 50  # CPU%, of a quota of 20 %
        assert line[3].endswith("M")
    with terminal(
        "top",
        "--iterations",
        "1",
        "--interval",
        "0.2",
        program=f"import os; os.environ['TERM'] = 'dumb'; {MAIN}",
    ) as it:
        assert it.status() == 0
        assert b"\x1b" not in it.said
        assert b"GROUP" in it.said


def test_an_object_for_each_refresh(busy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["top", "--json", "--interval", "1", "--iterations", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert lines[1]["time"] > lines[0]["time"]
    for one in lines:
        (found,) = [group for group in one["groups"] if group["group"] == busy]
        assert 0 < found["cpu"] < 0.5
        assert found["memory"] > 16 * MIB
        assert found["memory_limit"] == 64 * MIB
        assert 0 <= found["throttled"] <= 1


def test_a_reader_that_has_enough() -> None:
    done = subprocess.run(
        f"{sys.executable} -c '{MAIN}' top --json --interval 0.1 | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    first, status = done.stdout.splitlines()
    assert json.loads(first).keys() == {"time", "groups"}
    assert (status, done.stderr) == ("0", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sort", "colour"], "'colour' is not one of"),
        (["--interval", "0"], "0.0 is not in the range"),
        (["--interval", "soon"], "'soon' is not a valid float"),
        (["--iterations", "0"], "0 is not in the range"),
    ],
)
def test_bad_usage(arguments: list[str], says: str, capsys: Any) -> None:
    assert run_main(["top", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
