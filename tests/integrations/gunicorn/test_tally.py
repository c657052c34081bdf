"""What gunicorn's workers count: it outlives executors, workers, reloads and the server."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rcon_plugins.cli.rcon import run_main
from rcon_plugins.tally.reader import Counts, read_directory
from tests.integrations.gunicorn.server import Gunicorn
from tests.processes import until

SETTINGS = """
[policy.free]
per = "host"
memory = "256M"
each = { timeout = "1s" }

[[route]]
path = "/free/**"
policy = "free"
"""
INLINE = """
[policy.inline]
isolation = "inline"
cpu = "90%"

[[route]]
path = "/inline/**"
policy = "inline"
"""
KEY = "localhost"


def directory_of(server: Gunicorn) -> Path:
    return Path("/run/rcon", server.cgroups()[0].name)


def counts(directory: Path, policy: str = "free", key: str | None = KEY) -> Counts:
    found = read_directory(str(directory))
    assert found is not None
    its = found.of(policy, key)
    assert its is not None
    return its


@pytest.mark.parametrize(
    "arguments",
    [
        ("--worker-class", "sync", "--workers", "2"),
        ("--worker-class", "gthread", "--workers", "2", "--threads", "4"),
        ("--worker-class", "gevent", "--workers", "2"),
        ("--worker-class", "sync", "--workers", "2", "--user", "65534", "--group", "65534"),
    ],
    ids=["sync", "gthread", "gevent", "user"],
)
def test_totals_go_on_after_executors_workers_and_the_server(
    tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if "--user" in arguments:
        tmp_path.chmod(0o777)
    with Gunicorn(tmp_path, SETTINGS, *arguments) as server:
        directory = directory_of(server)
        for _ in range(4):
            assert server.get("/free/who", Host=KEY).status == 200
        assert server.get("/free/sleep?seconds=9", Host=KEY).status == 504
        assert server.get("/nowhere", Host=KEY).status == 421
        until(lambda: counts(directory).under_way == 0)
        found = counts(directory)
        assert (found.begun, found.endings["ok"], found.endings["timeout"], found.lost) == (5, 4, 1, 0)
        assert counts(directory, "", None).refusals["unroutable"] == 1
        assert run_main(["ls"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if f"(pid {server.pid})" in line]
        (line,) = [line for line in lines if line.startswith("unroutable: ")]
        assert line.startswith("unroutable: 1 request or task that no route names, refused by ")
        files = sorted(one.name for one in directory.iterdir())
        assert files == ["0", "1"]
        owner = 65534 if "--user" in arguments else os.geteuid()
        assert {(one.stat().st_uid, one.stat().st_mode & 0o777) for one in directory.iterdir()} == {
            (owner, 0o640)
        }

        before = set(server.workers())
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(server.workers()) - before) == 2)
        until(server.is_booted)
        server.wait_until_served()
        server.signal(signal.SIGHUP)  # a reload: new workers again
        until(lambda: not before & set(server.workers()) and server.status("/free/who") == 200)
        assert counts(directory).endings["timeout"] == 1
        assert counts(directory).begun >= 5

        capsys.readouterr()
        assert run_main(["ls", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert server.get("/free/who", Host=KEY).status == 200
        mine = [row for row in rows if row["instance"] == directory.name and row["key"] == KEY]
        assert [row["tally"]["endings"]["timeout"] for row in mine] in ([], [1])
    assert counts(directory).endings["timeout"] == 1
    assert (directory / "ended").exists()
    (directory / "read").touch()
    assert run_main(["gc", "--below", "/rcon"]) in (0, 1)
    assert not directory.exists()


def test_requests_in_the_workers_own_thread_are_counted(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, SETTINGS + INLINE, "--worker-class", "sync", "--workers", "1") as server:
        directory = directory_of(server)
        for _ in range(3):
            assert server.get("/inline/who", Host=KEY).status == 200
        until(lambda: counts(directory, "inline", None).under_way == 0)
        found = counts(directory, "inline", None)
        assert (found.begun, found.endings["ok"], found.spawns) == (3, 3, 0)
        assert found.cpu_seconds is not None


MANY = """
[policy.free]
per = "host"
each = { timeout = "60s" }

[policy.brief]
per = "host"
each = { timeout = "1s" }

[policy.inline]
isolation = "inline"
pids = 200

[[route]]
path = "/free/**"
policy = "free"

[[route]]
path = "/brief/**"
policy = "brief"

[[route]]
path = "/inline/**"
policy = "inline"
"""
WITHOUT_INLINE = MANY.replace('isolation = "inline"\npids = 200', 'each = { timeout = "60s" }')


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (("--worker-class", "gthread", "--threads", "16"), MANY),
        (("--worker-class", "gevent"), WITHOUT_INLINE),
    ],
    ids=["gthread", "gevent"],
)
def test_requests_that_end_at_the_same_time_are_counted_each(
    tmp_path: Path, arguments: tuple[str, ...], settings: str
) -> None:
    """All in one worker, which has one file: twelve clients, five kinds of requests."""
    paths = ["/free/who", "/free/fail", "/brief/sleep?seconds=60", "/inline/who", "/nowhere"]
    with Gunicorn(tmp_path, settings, "--workers", "1", *arguments) as server:
        directory = directory_of(server)
        with ThreadPoolExecutor(12) as clients:
            statuses = list(clients.map(lambda path: server.get(path, Host=KEY).status, paths * 24))
        assert statuses == [200, 500, 504, 200, 421] * 24
        until(lambda: counts(directory).under_way == counts(directory, "brief").under_way == 0)
        free, brief, inline = counts(directory), counts(directory, "brief"), counts(directory, "inline", None)
        assert (free.begun, free.endings["ok"], free.endings["error"]) == (48, 24, 24)
        assert (brief.begun, brief.endings["timeout"]) == (24, 24)
        assert (inline.begun, inline.endings["ok"]) == (24, 24)
        for one in (free, brief, inline):
            assert (one.under_way, one.lost, sum(one.refusals.values())) == (0, 0, 0)
        assert counts(directory, "", None).refusals["unroutable"] == 24
        assert sorted(one.name for one in directory.iterdir()) == ["0"]
