"""A reload that would end in no server: it is refused, the old workers go on serving, and the log says why."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.directories import let_others_read
from tests.integrations.gunicorn.server import HERE, Gunicorn, Load
from tests.integrations.gunicorn.test_killed import SETTINGS as FREE
from tests.processes import until

SETTINGS = 'executor_started = "served:started"\n' + FREE
REFUSED = "rcon: the reload is refused, the old workers go on: "
RAISED = "executor_started 'served:started' raised RuntimeError: no database"
REASON = f"policy free: no executor process can serve: {RAISED}"
SYNC = ("--worker-class", "sync", "--workers", "2")
CLASSES = {
    "sync": SYNC,
    "gthread": ("--worker-class", "gthread", "--workers", "2", "--threads", "4"),
    "gevent": ("--worker-class", "gevent", "--workers", "2"),
    "user": (*SYNC, "--user", "www-data", "--group", "www-data"),
}
APP = """
import sys
sys.path.insert(0, {here!r})
from application import app

def started():
    {started}
"""
WORKS, FAILS = "pass", 'raise RuntimeError("no database")'


def write_app(directory: Path, started: str) -> None:
    """Write the application. Workers have the code that there was when they loaded it."""
    (directory / "served.py").write_text(APP.format(here=str(HERE), started=started))


def gunicorn(directory: Path, *arguments: str, settings: str = SETTINGS, started: str = WORKS) -> Gunicorn:
    let_others_read(directory)
    write_app(directory, started)
    return Gunicorn(directory, settings, *arguments, "--pythonpath", str(directory), app="served:app")


def wait_until_all_serve(server: Gunicorn, workers: int = 2) -> list[int]:
    """Wait until each worker has an executor process of its own. Return the workers."""

    def serving() -> set[str]:
        leaves = [leaf for cgroup in server.instance() for leaf in (cgroup / "work").glob("free/*-*")]
        return {leaf.name.partition("-")[0] for leaf in leaves} & {str(pid) for pid in server.workers()}

    with Load(server):
        until(lambda: len(serving()) == workers)
    return server.workers()


def reload_succeeds(server: Gunicorn, before: list[int]) -> None:
    """Reload, and wait for new workers."""
    server.signal(signal.SIGHUP)
    until(lambda: len(server.workers()) == 2 and not set(before) & set(server.workers()))
    wait_until_all_serve(server)


def reload_refused(server: Gunicorn) -> str:
    """Reload, and return the line about its refusal."""
    before = server.log().count(REFUSED)
    server.signal(signal.SIGHUP)
    until(lambda: server.log().count(REFUSED) > before)
    return server.log().rpartition(REFUSED)[2].splitlines()[0]


@pytest.mark.parametrize("arguments", CLASSES.values(), ids=CLASSES)
def test_what_refuses_every_request_refuses_a_reload(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with gunicorn(tmp_path, *arguments) as server:
        before = wait_until_all_serve(server)
        with Load(server, clients=2) as load:
            load.wait_for_answers(5)
            write_app(tmp_path, FAILS)
            assert reload_refused(server) == REASON
            load.wait_for_answers(10)
            assert server.workers() == before
            write_app(tmp_path, WORKS)
            reload_succeeds(server, before)  # nothing stays of the refusal
            load.wait_for_answers(10)
        assert set(load.answers) == {200}, server.log()
        assert not load.unconfined
        assert "gunicorn makes another" not in server.log()
    assert server.process.returncode == 0
    assert not server.cgroups()
    assert "Traceback" not in server.log()


def test_the_master_goes_on_at_once(tmp_path: Path) -> None:
    """gunicorn waits for the end of old workers, for up to its graceful timeout: there is none to wait for."""
    with gunicorn(tmp_path, *SYNC, "--graceful-timeout", "50") as server:
        before = wait_until_all_serve(server)
        write_app(tmp_path, FAILS)
        reload_refused(server)
        began = time.monotonic()
        write_app(tmp_path, WORKS)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: before[0] not in server.workers() and len(server.workers()) == 2)
        assert time.monotonic() - began < 25
        assert wait_until_all_serve(server)


def test_each_reload_is_refused_anew_and_the_number_of_workers_stays(tmp_path: Path) -> None:
    with gunicorn(tmp_path, *SYNC) as server:
        server.signal(signal.SIGTTIN)
        until(lambda: len(server.workers()) == 3)
        before = wait_until_all_serve(server, 3)
        write_app(tmp_path, FAILS)
        reload_refused(server)
        reload_refused(server)
        assert server.workers() == before
        server.signal(signal.SIGTTOU)
        until(lambda: len(server.workers()) == 2)
        write_app(tmp_path, WORKS)
        reload_succeeds(server, before)
        assert server.get("/free/who").json()["confined"]


def test_a_worker_that_dies_after_a_refusal_is_replaced_once_that_is_possible(tmp_path: Path) -> None:
    with gunicorn(tmp_path, *SYNC) as server:
        killed, other = wait_until_all_serve(server)
        write_app(tmp_path, FAILS)
        reload_refused(server)
        os.kill(killed, signal.SIGKILL)
        until(lambda: "gunicorn makes another in 0.5 s" in server.log())
        assert other in server.workers()
        assert server.status("/free/who") == 200
        write_app(tmp_path, WORKS)
        wait_until_all_serve(server)
        assert other in server.workers()


def test_settings_with_which_no_worker_can_serve_are_refused_alone(tmp_path: Path) -> None:
    """New workers, with what else is new, serve with the old settings."""
    with gunicorn(tmp_path, *SYNC, settings=FREE, started=FAILS) as server:
        before = wait_until_all_serve(server)
        server.settings.write_text(SETTINGS)
        reload_succeeds(server, before)
        assert server.get("/free/who").json()["confined"]
        assert f"rcon: the new settings are refused, the old ones stay: {REASON}" in server.log()
        assert REFUSED not in server.log()


#: Applications that cannot be loaded, and what the log says.
UNLOADABLE = {
    "def app(:\n": "SyntaxError: ",
    "import absent\n": "ModuleNotFoundError: No module named 'absent'",
    "import os\nos._exit(3)\n": "a worker on trial ended before it could serve",
}


def test_an_application_that_cannot_be_loaded_refuses_a_reload(tmp_path: Path) -> None:
    """gunicorn itself would end: "App failed to load"."""
    with gunicorn(tmp_path, *SYNC, settings=FREE) as server:
        before = wait_until_all_serve(server)
        for new, says in UNLOADABLE.items():
            (tmp_path / "served.py").write_text(new)
            assert says in reload_refused(server)
            assert server.workers() == before
            assert server.status("/free/who") == 200
        write_app(tmp_path, WORKS)
        reload_succeeds(server, before)
