"""Reload, recycling, more and fewer workers, another user, another program: with requests under way."""

from __future__ import annotations

import grp
import os
import pwd
import re
import signal
import time
from pathlib import Path

import pytest

from tests.integrations.gunicorn.server import Gunicorn, Load
from tests.processes import alive, instance_directories, until

SETTINGS = """
[policy.free]
memory = "256M"
pids = 64

[[route]]
path = "/free/**"
policy = "free"
"""

SYNC = ("--worker-class", "sync", "--workers", "2")
GTHREAD = ("--worker-class", "gthread", "--workers", "2", "--threads", "4")
GEVENT = ("--worker-class", "gevent", "--workers", "2")

CLASSES = pytest.mark.parametrize("arguments", [SYNC, GTHREAD, GEVENT], ids=["sync", "gthread", "gevent"])


def assert_clean(server: Gunicorn) -> None:
    assert server.stop() == 0, server.log()
    assert not server.cgroups()
    assert "Traceback" not in server.log()


@CLASSES
def test_reload_under_load_fails_no_request(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with Gunicorn(tmp_path, SETTINGS, *arguments) as server:
        before = set(server.workers())
        with Load(server) as load:
            load.wait_for_answers(20)
            server.signal(signal.SIGHUP)
            until(lambda: not before & set(server.workers()))
            load.wait_for_answers(20)
        assert set(load.answers) == {200}, server.log()
        assert not load.unconfined
        assert_clean(server)


def test_reload_reads_the_settings_again_and_keeps_the_old_if_they_are_wrong(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, SETTINGS, *SYNC) as server:
        assert server.get("/other/who").status == 421

        def reload(settings: str) -> None:
            before = set(server.workers())
            server.settings.write_text(settings)
            server.signal(signal.SIGHUP)
            until(lambda: len(set(server.workers()) - before) == 2 and not before & set(server.workers()))

        reload(SETTINGS + '[policy.default]\nmemory = "64M"\n')
        assert server.get("/other/who").json()["confined"]
        reload('[policy.default]\nmemory = "64 potatoes"\n')
        assert server.get("/other/who").json()["confined"]
        assert server.get("/free/who").json()["confined"]
        complaint = [line for line in server.log().splitlines() if "the old ones stay" in line]
        assert len(complaint) == 1
        assert "policy.default.memory" in complaint[0]
        # a policy that a thread can carry: the server has to live in its instance from now on
        reload(SETTINGS + "[policy.default]\npids = 4096\n")
        who = server.get("/other/who").json()
        assert who["confined"]
        assert who["pid"] in server.workers()
        assert_clean(server)


def test_hooks_in_a_configuration_file_of_the_site(tmp_path: Path) -> None:
    """It is executed anew at a reload, which makes new Hooks; its own hooks keep running."""
    settings = tmp_path / "rcon.toml"
    config = tmp_path / "gunicorn.conf.py"
    config.write_text(
        f"""
from rcon_gunicorn import Hooks

workers = 2
raw_env = ["TEST_VERSION=1"]

def post_worker_init(worker):
    worker.log.info("their own hook")

def on_exit(server):
    server.log.info("their own end")

Hooks({str(settings)!r}).install(globals())
"""
    )
    with Gunicorn(tmp_path, SETTINGS, config=str(config)) as server:
        assert server.get("/free/who").json()["version"] == "1"
        before = set(server.workers())
        # Of another length: byte code of a file of the same length and second would be taken for current.
        config.write_text(config.read_text().replace("TEST_VERSION=1", "TEST_VERSION=22"))
        server.signal(signal.SIGHUP)
        until(lambda: len(server.workers()) == 2 and not before & set(server.workers()))
        who = server.get("/free/who").json()
        assert who["confined"]
        assert who["version"] == "22"
        assert_clean(server)
        assert server.log().count("their own hook") == 5  # the worker on trial is one, too
        assert server.log().count("their own end") == 1


@CLASSES
def test_recycled_workers_fail_no_request(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with Gunicorn(tmp_path, SETTINGS, *arguments, "--max-requests", "15") as server:
        with Load(server, clients=2) as load:
            until(lambda: server.log().count("Autorestarting worker") >= 3)
            load.wait_for_answers(5)
        assert set(load.answers) == {200}, server.log()
        assert not load.unconfined
        assert_clean(server)


def test_more_and_fewer_workers(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, SETTINGS, *SYNC) as server, Load(server) as load:
        load.wait_for_answers(5)
        server.signal(signal.SIGTTIN)
        until(lambda: len(server.workers()) == 3)
        load.wait_for_answers(10)
        server.signal(signal.SIGTTOU)
        until(lambda: len(server.workers()) == 2)
        load.wait_for_answers(10)
    assert set(load.answers) == {200}, server.log()
    assert not load.unconfined
    assert not server.cgroups()


@pytest.mark.parametrize("arguments", [SYNC, GTHREAD], ids=["sync", "gthread"])
def test_another_user_and_group(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    uid, gid = pwd.getpwnam("www-data").pw_uid, grp.getgrnam("www-data").gr_gid
    light = "[policy.default]\npids = 4096\n"
    more = ("--user", "www-data", "--group", "www-data")
    with Gunicorn(tmp_path, SETTINGS + light, *arguments, *more) as server:
        for path in ("/free/who", "/light/who"):
            who = server.get(path).json()
            assert (who["uid"], who["gid"], who["confined"]) == (uid, gid, True)
        assert server.get("/free/allocate?mib=400").status == 503
        for directory in server.cgroups():
            # what bounds the workers' user is not that user's to change
            for name in ("memory.limit_in_bytes", "memory.max", "pids.max", "cgroup.kill"):
                file = directory / name
                assert not file.exists() or file.stat().st_uid == 0
        assert_clean(server)


def test_another_program_takes_over(tmp_path: Path) -> None:
    """USR2: a second master beside the first, with cgroups of its own; the first then ends."""
    pidfile = tmp_path / "pid"
    # gunicorn itself cannot do it with an inherited socket
    with Gunicorn(tmp_path, SETTINGS, *SYNC, "--pid", str(pidfile), inherit=False) as server:
        with Load(server) as load:
            load.wait_for_answers(5)
            server.signal(signal.SIGUSR2)
            second_file = Path(f"{pidfile}.2")
            until(second_file.exists)
            second = int(second_file.read_text())
            until(lambda: len(instance_directories(second)) > 0)
            load.wait_for_answers(20)
            server.signal(signal.SIGTERM)
            server.process.wait(20)
            load.wait_for_answers(20)
        try:
            assert set(load.answers) == {200}, server.log()
            assert not load.unconfined
            assert not server.cgroups()
            assert instance_directories(second)
        finally:
            os.kill(second, signal.SIGTERM)
            until(lambda: not alive(second))
        assert not instance_directories(second)
        assert "Traceback" not in server.log()


def test_a_worker_that_gunicorn_times_out_leaves_nothing(tmp_path: Path) -> None:
    with Gunicorn(tmp_path, SETTINGS, "--worker-class", "sync", "--timeout", "1") as server:
        assert server.status("/free/sleep?seconds=8") in ("cut", 500, 503)
        until(lambda: server.status("/free/who") == 200)
        until(lambda: len(server.executors()) <= 1)
        assert "WORKER TIMEOUT" in server.log()


def test_lines_reach_the_error_log_also_after_it_is_reopened(tmp_path: Path) -> None:
    log = tmp_path / "error.log"
    with Gunicorn(tmp_path, SETTINGS, *SYNC, "--error-logfile", str(log)) as server:
        for round_ in (1, 2):
            server.get("/elsewhere/who", Host=f"round{round_}.example")  # one line for each host and minute
            until(lambda: "rcon: unroutable" in log.read_text())
            line = next(line for line in log.read_text().splitlines() if "rcon: unroutable" in line)
            assert re.match(r"\[[^]]+\] \[\d+\] \[WARNING\] rcon: unroutable request_id=[0-9a-f]{32} ", line)
            if round_ == 1:
                log.rename(tmp_path / "error.log.1")
                server.signal(signal.SIGUSR1)
                until(log.exists)
                time.sleep(0.5)  # each worker reopens when it gets around to it
