"""The tutorials do what they say: each file is written, each command run, each output compared, in the page's order.

A file is a block whose first line is a comment with its name. A ``text`` or ``json`` block after a command is what that
prints; ``…`` stands for what differs from run to run. A comment before a block says how it is run:

- ``install``: not at all; the virtual environment of the tests has all of it.
- ``server``: in the background, until the page ends.
- ``restart``: after the server has been ended and started again.
- ``any status``: the exit status may be another than 0.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integrations.celery.redis_server import RedisServer, free_port
from tests.processes import instance_directories

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorial"
FENCE = re.compile(
    r"(?:^<!-- (?P<note>[\w ]+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
NOTES = {"", "install", "server", "restart", "any status"}
PATIENCE = 60.0


class Step(NamedTuple):
    note: str
    language: str
    text: str
    prints: str | None


def steps(page: str) -> list[Step]:
    found = [(m["note"] or "", m["language"], m["text"]) for m in FENCE.finditer(page)]
    following = [*found[1:], ("", "", "")]
    return [
        Step(*block, after[2] if after[1] in ("text", "json") else None)
        for block, after in zip(found, following, strict=True)
        if block[1] not in ("text", "json")
    ]


class Server:
    """The server of a tutorial, as a reader starts and ends it."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], ready: str) -> None:
        self._command, self._folder, self._environment = command, folder, environment
        self._ready = ready
        self._log = folder / "server.log"

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec env {self._command}"],
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while self._ready not in self.log():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def label(self, group: str) -> str:
        """The name of one of its groups, also where a server of another test has a group of that name."""
        return f"{instance_directories(self._process.pid)[0].name}/{group}"

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """As Ctrl-C does, to the whole job."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
        self._process.wait(PATIENCE)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the user nobody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="tutorial-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def follow(page: str, folder: Path, ready: str) -> list[Step]:
    """Do what the page says; return the commands that were run."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "120",
    }
    server: Server | None = None
    done = []
    try:
        for step in steps(page):
            assert step.note in NOTES, step
            if step.language in ("python", "toml"):
                name = re.match(r"# ([\w.]+)\n", step.text)
                assert name is not None, f"no file name in its first line: {step.text}"
                (folder / name[1]).write_text(step.text)
                continue
            assert step.language == "sh", step
            if step.note == "install":
                continue
            if step.note == "server":
                server = Server(step.text.strip(), folder, environment, ready)
                server.start()
                done.append(step)
                continue
            if step.note == "restart":
                assert server is not None
                server.stop()
                server.start()
            text = step.text
            if server is not None and (named := re.match(r"rcon set (\w+)", text)):
                text = text.replace(named[0], f"rcon set {server.label(named[1])}")
            run = subprocess.run(
                ["bash", "-ec", text],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            log = server.log() if server is not None else ""
            assert run.returncode == 0 or step.note == "any status", (step.text, run.stdout, run.stderr, log)
            if step.prints is not None:
                assert_prints(run.stdout, step.prints, log)
            done.append(step)
    finally:
        if server is not None:
            server.stop()
    return done


def assert_prints(printed: str, expected: str, log: str) -> None:
    """Each expected line is there, in this order; the groups of other tests may stand between.

    Where another server has a group of the same name, rcon puts the instance before both names.
    """
    lines = iter(re.sub(r"^rcon-\d+-\d+/", "", printed, flags=re.MULTILINE).splitlines() or [""])
    for line in expected.splitlines():
        pattern = re.sub(r"(?:\\ )+", r"\\s+", re.escape(line).replace("…", ".*"))
        assert any(re.fullmatch(pattern, one.rstrip()) for one in lines), (line, printed, log)


@pytest.mark.timeout(240)
def test_flask(folder: Path) -> None:
    page = (TUTORIALS / "flask.md").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{free_port()}")
    done = follow(page, folder, "Booting worker")
    assert len(done) >= 9


@pytest.mark.timeout(240)
def test_celery(folder: Path) -> None:
    with RedisServer(folder) as redis:
        page = (TUTORIALS / "celery.md").read_text().replace("localhost:6379", f"127.0.0.1:{redis.port}")
        done = follow(page, folder, "celery@" + socket.gethostname() + " ready")
    assert len(done) >= 4
