"""rcon top and its terminal: whatever ends it, the terminal is as before. Needs no root, and no groups."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.terminals import GIVEN_BACK, MAIN, NO_CURSOR, ROOT, TAKEN, Terminal, terminal


def test_terminals_of_other_sizes() -> None:
    with terminal("top", "--interval", "0.5", lines=8, columns=60) as it:
        it.until(lambda: it.shows("q quit"))
        assert len(it.screen()) == 8
        it.said = b""
        it.resize(30, 132)
        it.until(lambda: it.shows("OWNER") and it.shows("q quit"))
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
        it.until(lambda: it.shows("q quit"))
        end(it)
        assert it.status() == status
        assert it.is_clean()
        assert b"Traceback" not in it.said


def test_the_terminal_is_clean_after_a_crash() -> None:
    """The message comes after the terminal is restored, so that it can be read."""
    broken = (
        "from rcon_plugins.cli.top.top import top\n"
        "from rcon_plugins.groups.sample import Samples\n"
        "calls = []\n"
        "def source():\n"
        "    calls.append(1)\n"
        "    if len(calls) > 1: raise RuntimeError('on purpose')\n"
        "    return Samples([], [])\n"
        "top(source, interval=0.2)\n"
    )
    with terminal(program=broken) as it:
        assert it.status() == 1
        assert it.is_clean()
        assert it.said.index(b"RuntimeError: on purpose") > it.said.rindex(GIVEN_BACK)


def test_the_terminal_is_restored_while_suspended() -> None:
    with terminal("top", "--interval", "0.3") as it:
        it.until(lambda: it.shows("q quit"))
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


def test_a_closed_terminal_ends_it() -> None:
    with terminal("top") as it:
        it.until(lambda: it.shows("q quit"))
        os.close(it._slave)
        os.close(it.master)
        assert it.process.wait(60) == 128 + signal.SIGHUP


def test_interrupted_without_a_terminal() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, "top", "--json", "--interval", "0.1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_a_closed_pipe_ends_it() -> None:
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
    assert json.loads(first).keys() == {"time", "groups", "servers"}
    assert (status, done.stderr) == ("0", "")
