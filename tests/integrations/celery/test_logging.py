"""What a task logs and prints is in the worker's log, whatever the worker's set-up, as in plain Celery."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import celery
import pytest
import redis

from tests.forks import ROOT
from tests.integrations.celery import logged
from tests.integrations.celery.producers import closing
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.worker import READY, Worker
from tests.processes import alive, until

PATIENCE = 60.0
POLICY = """
[policy.say]
each = { memory = "256M", timeout = "60s" }

[policy.tenant]
user = 20001
group = 20001
per = "task"
each = { memory = "256M", timeout = "60s" }

[[route]]
task = "say"
policy = "say"

[[route]]
task = "event"
policy = "say"

[[route]]
task = "*"
policy = "tenant"
"""
HEAD = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}: "


class Session(NamedTuple):
    """A worker, its producer, and its log."""

    worker: Worker
    app: celery.Celery
    client: redis.Redis
    path: Path

    def run(self, name: str, *args: Any) -> tuple[str, Any]:
        result = self.app.send_task(name, args)
        return result.id, result.get(timeout=PATIENCE)

    def log(self) -> str:
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def lines(self, word: str, count: int) -> list[str]:
        """Return the lines with a word, once there are so many."""
        until(lambda: sum(word in line for line in self.log().splitlines()) >= count, PATIENCE)
        time.sleep(0.3)
        return [line for line in self.log().splitlines() if word in line]

    def handled(self) -> list[Any]:
        found: Any = self.client.lrange("log:handled", 0, -1)
        return [json.loads(line) for line in found]


Opener = Callable[..., contextlib.AbstractContextManager[Session]]


@pytest.fixture(scope="module")
def opener(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    folder, numbers = tmp_path_factory.mktemp("logged"), itertools.count()

    @contextlib.contextmanager
    def open_session(
        *arguments: str,
        file: bool = False,
        confined: bool = True,
        setup: str = "",
        pool: str = "prefork",
    ) -> Iterator[Session]:
        directory, url = folder / str(next(numbers)), redis_server.database()
        directory.mkdir()
        environ = {logged.URL: url, logged.SETUP: setup}
        if confined:
            (directory / "rcon.toml").write_text(POLICY)
            environ[logged.POLICY] = str(directory / "rcon.toml")
        path = directory / ("file.log" if file else "w.log")
        if file:
            arguments = (*arguments, "--logfile", str(path))
        worker = Worker(directory, logged.__name__, *arguments, pool=pool, concurrency=1, environ=environ)
        app = celery.Celery("producer", broker=url, backend=url, set_as_current=False)
        with closing(app), contextlib.closing(redis.Redis.from_url(url)) as client:
            session = Session(worker, app, client, path)
            try:
                until(lambda: worker.process.poll() is not None or is_ready(session), PATIENCE)
                assert worker.process.poll() is None, worker.log()
                yield session
            finally:
                worker.stop()

    return open_session


def is_ready(session: Session) -> bool:
    return READY in session.log() or bool(session.app.control.ping(timeout=0.5))


def expected(word: str, task: str, process: str = r"[\w-]+") -> list[str]:
    """Return the patterns of the lines of ``say``, in Celery's own formats."""

    def plain(level: str, text: str) -> str:
        return f"{HEAD}{level}/{process}\\] {text} {word}"

    def of_task(level: str, text: str) -> str:
        return f"{HEAD}{level}/{process}\\] say\\[{task}\\]: {text} {word}"

    return [
        of_task("WARNING", "task logger"),
        plain("INFO", "own logger"),
        of_task("ERROR", "late logger"),
        plain("WARNING", "printed"),
        plain("WARNING", "error"),
        plain("INFO", "thread"),
        plain("ERROR", "exception"),
        f"ValueError: caught {word}",
    ]


@pytest.mark.parametrize("file", [False, True], ids=["console", "file"])
@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_all_that_a_task_logs_and_prints(opener: Opener, pool: str, file: bool) -> None:
    with opener(file=file, pool=pool) as session:
        task, _ = session.run("say", "purple")
        lines = session.lines("purple", 10)
        raw = [f"{HEAD}WARNING/[\\w-]+\\] written purple", f"{HEAD}WARNING/[\\w-]+\\] program purple"]
        for pattern in [*expected("purple", task), *raw]:
            assert [line for line in lines if re.fullmatch(pattern, line)], (pattern, lines)
        assert len(lines) == 10
        assert "Traceback (most recent call last):" in session.log()


@pytest.mark.parametrize("file", [False, True], ids=["console", "file"])
def test_plain_celery_logs_the_same(opener: Opener, file: bool) -> None:
    with opener(file=file, confined=False) as session:
        task, _ = session.run("say", "purple")
        lines = session.lines("purple", 8)
        for pattern in expected("purple", task):
            assert [line for line in lines if re.fullmatch(pattern, line)], (pattern, lines)


def test_detached(redis_server: RedisServer, tmp_path: Path) -> None:
    """``celery multi`` has no console: what is not in the log file is nowhere."""
    url = redis_server.database()
    (tmp_path / "rcon.toml").write_text(POLICY)
    environ = {**os.environ, "C_FORCE_ROOT": "1", logged.URL: url}
    environ[logged.POLICY] = str(tmp_path / "rcon.toml")
    program = str(Path(sys.executable).with_name("celery"))
    command = [program, "multi", "start", "a@test", "-A", logged.__name__, "-c1"]
    command += [f"--pidfile={tmp_path}/pid", f"--logfile={tmp_path}/log", "--loglevel=INFO"]
    path, app = tmp_path / "log", celery.Celery("producer", broker=url, backend=url, set_as_current=False)
    subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True)
    with closing(app):
        try:
            until(lambda: path.exists() and READY in path.read_text(), PATIENCE)
            result = app.send_task("say", ["purple"])
            result.get(timeout=PATIENCE)
            until(lambda: sum("purple" in line for line in path.read_text().splitlines()) >= 10, PATIENCE)
            lines = path.read_text().splitlines()
            for pattern in [*expected("purple", result.id), ".*written purple", ".*program purple"]:
                assert [line for line in lines if re.fullmatch(pattern, line)], (pattern, lines)
        finally:
            pid = int((tmp_path / "pid").read_text())
            os.kill(pid, signal.SIGTERM)
            until(lambda: not alive(pid), PATIENCE)


@pytest.mark.parametrize("file", [False, True], ids=["console", "file"])
def test_json(opener: Opener, file: bool) -> None:
    """All lines are JSON, with the fields of ``extra``, and those that say which task it was."""
    with opener(file=file, setup="json") as session:
        task, pid = session.run("say", "eins")
        forging, _ = session.run("forge", "zwei")
        records = [json.loads(line) for line in session.lines("eins", 9)]
        body = [each for each in records if each.get("rcon_policy") == "say"]
        assert len(body) == 9
        assert all("Task say" in each["text"] for each in records if each not in body)
        assert {each["task_id"] for each in body} == {task}
        (own,) = [each for each in body if each["msg"] == "own logger eins"]
        assert own["order"] == {"number": 7}
        assert own["customer"] == "eins"
        assert (own["name"], own["levelname"], own["funcName"]) == ("proj.orders", "INFO", "say")
        assert own["filename"] == "logged.py"
        assert own["process"] != pid
        (thread,) = [each for each in body if each["msg"] == "thread eins"]
        assert thread["threadName"] == "helper"
        (caught,) = [each for each in body if each["msg"] == "exception eins"]
        assert caught["exc_text"].endswith("ValueError: caught eins")
        forged = [json.loads(line) for line in session.lines("zwei", 6)]
        # A record with the number of no task of its own has no task.
        assert {each.get("task_name") for each in forged if "rcon_policy" in each} == {"forge", None}
        assert {each.get("task_id") for each in forged if "rcon_policy" in each} == {forging, None}
        assert not any(each["levelname"] == "X" or each["process"] == 1 for each in forged)


def test_structlog(opener: Opener) -> None:
    with opener(setup="structlog") as session:
        session.run("event", "purple")
        (line,) = session.lines("an event", 1)
        assert json.loads(line) == {"event": "an event", "word": "purple", "number": 7, "level": "info"}


def test_root_logger_that_is_not_hijacked(opener: Opener) -> None:
    with opener(setup="own") as session:
        session.run("say", "purple")
        lines = session.lines("purple", 10)
        assert "OWN INFO proj.orders own logger purple" in lines
        assert "OWN WARNING celery.redirected printed purple" in lines
        assert "OWN WARNING celery.redirected written purple" in lines


def test_other_handlers_run_in_the_pools_process(opener: Opener) -> None:
    with opener(setup="handlers") as session:
        (pool,) = session.worker.children()
        session.run("say", "purple")
        until(lambda: len(session.handled()) == 3, PATIENCE)
        assert session.handled() == [
            [pool, "INFO", "own logger purple"],
            [pool, "INFO", "thread purple"],
            [pool, "ERROR", "exception purple"],
        ]


def test_handler_of_opentelemetry(opener: Opener) -> None:
    """In the context of the task: its records belong to the trace."""
    with opener(setup="opentelemetry") as session:
        (pool,) = session.worker.children()
        trace = "5af0de5af0de5af0de5af0de5af0de55"
        headers = {"traceparent": f"00-{trace}-abcdef1234567890-01"}
        session.app.send_task("say", ["purple"], headers=headers).get(timeout=PATIENCE)
        until(lambda: len(session.handled()) == 3, PATIENCE)
        assert session.handled()[0] == [pool, "own logger purple", trace]


def test_sentry_gets_each_error_once(opener: Opener) -> None:
    with opener(setup="sentry") as session:
        session.run("say", "purple")
        until(lambda: len(session.handled()) == 2, PATIENCE)
        time.sleep(1)
        assert sorted(message for _, message in session.handled()) == ["exception %s", "late logger %s"]


def test_a_task_cannot_forge_lines(opener: Opener) -> None:
    with opener(file=True) as session:
        task, _ = session.run("forge", "purple")
        session.lines("purple", 7)
        log = session.log()
        for line in log.splitlines():
            if "other" in line or "purple" in line or "not a record" in line:
                shown = line.replace("Task forge", "")
                assert re.match(rf"({HEAD}\w+/[\w-]+\] (forge\[{task}\]: )?)?\[tenant forge\] ", shown) or (
                    f"[{task}]" in line
                ), line
        assert "\x1b" not in log
        assert "of another" not in log
        assert "[tenant forge] deep purple" in log or '[tenant forge] \\x1e{"name"' in log


def test_a_flood_is_bounded_and_counted(opener: Opener) -> None:
    with opener(file=True) as session:
        session.run("flood", 5000, 200)
        until(lambda: "dropped" in session.log(), PATIENCE)
        session.worker.stop()
        log = session.log()
        assert len(log) < 2 * (256 + 20 * 32) * 1024
        dropped = sum(
            int(number.replace(",", "")) for number in re.findall(r"… ([\d,]+) lines? dropped", log)
        )
        kept = len(re.findall(r"flood \d+ x", log))
        assert kept + dropped >= 5000
        assert kept > 500
