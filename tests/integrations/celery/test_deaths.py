"""Processes are killed while tasks run: no task is lost, none runs twice at once, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from celery.result import AsyncResult

from rcon_plugins.errors import ConfinementError, Killed
from tests.integrations.celery.producers import closing
from tests.integrations.celery.sessions import Session, Sessions
from tests.integrations.celery.worker import READY
from tests.processes import alive, children, family, until


def fork_server(process: int) -> int:
    """Return the pid of the fork server of a process, its only child."""
    (server,) = children(process)
    return server


def begins(session: Session, name: str) -> list[list[str]]:
    return [line.split()[1:] for line in session.log(name) if line.startswith("begins")]


def never_two_at_once(session: Session, name: str) -> None:
    """Check that no run wrote to the log after a later run began to."""
    order = [line.split()[0] for line in session.log(f"{name}:beat")]
    runs = [pid for number, pid in enumerate(order) if number == 0 or order[number - 1] != pid]
    assert len(runs) == len(set(runs)), runs


class Gate:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        self.path.write_text("")


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def run_late_and_kill(session: Session, gate: Gate, name: str, kill: Callable[[], object]) -> None:
    """Send `late`, kill a process while it runs, and check that it runs again to its end, confined each time."""
    result = session.send("late", name, str(gate.path))
    until(lambda: len(begins(session, name)) == 1)
    first = int(begins(session, name)[0][0])
    kill()
    until(lambda: len(begins(session, name)) == 2)
    assert not alive(first)
    gate.open()
    assert result.get(timeout=60) == "done"
    assert [confined for _, confined in begins(session, name)] == ["True", "True"]
    assert sum(line.startswith("ends") for line in session.log(name)) == 1
    never_two_at_once(session, name)


def test_pool_process_killed(sessions: Sessions, gate: Gate) -> None:
    with sessions(concurrency=2) as session:

        def kill() -> None:
            executor = int(begins(session, "pool")[0][0])
            (process,) = [pid for pid in session.worker.children() if executor in family(pid)]
            os.kill(process, signal.SIGKILL)

        run_late_and_kill(session, gate, "pool", kill)


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_fork_server_killed(sessions: Sessions, gate: Gate, pool: str) -> None:
    with sessions(pool=pool, concurrency=1) as session:
        (process,) = session.worker.children() if pool == "prefork" else [session.worker.pid]
        run_late_and_kill(session, gate, "server", lambda: os.kill(fork_server(process), signal.SIGKILL))
        assert alive(process)
        assert session.get("where")["confined"]


def test_fork_servers_killed_over_and_over(sessions: Sessions) -> None:
    """No task is lost, one about to begin neither."""
    with sessions(concurrency=2) as session:
        pool = session.worker.children()
        assert session.get("numbered", -1) == -1
        results: list[AsyncResult[int]] = []
        for kill in range(8):
            five = [session.send("numbered", 5 * kill + number) for number in range(5)]
            # Each kill hits another moment of the five tasks.
            until(lambda five=five: any(result.ready() for result in five))  # type: ignore[misc]
            time.sleep(0.01 * kill)
            for process in pool:
                for server in children(process):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(server, signal.SIGKILL)
            results += five
        assert [session.wait(result) for result in results] == list(range(40))
        assert sorted(session.worker.children()) == sorted(pool)


def test_threads_pool_exits_when_its_fork_server_is_killed(sessions: Sessions) -> None:
    """No other fork server can be made, so the worker finishes its tasks and exits."""
    with sessions(pool="threads") as session:
        assert session.get("where")["confined"]
        os.kill(fork_server(session.worker.pid), signal.SIGKILL)
        until(lambda: session.worker.process.poll() is not None)
        assert session.worker.process.returncode == 0
        assert "this worker finishes its tasks and exits" in session.worker.log()


def test_fork_server_killed_without_late_acknowledgement(sessions: Sessions) -> None:
    with sessions(concurrency=1) as session:
        result = session.send("stay", "early")
        until(lambda: bool(session.log("early")))
        (process,) = session.worker.children()
        os.kill(fork_server(process), signal.SIGKILL)
        with pytest.raises(Killed):
            result.get(timeout=60)
        assert session.get("where")["confined"]
        assert session.worker.children() == [process]


@pytest.mark.parametrize(
    ("pool", "names"), [("prefork", "a"), ("threads", "ab"), ("solo", "a"), ("gevent", "ab")]
)
def test_worker_killed(sessions: Sessions, gate: Gate, pool: str, names: str) -> None:
    """All its processes end, and unacknowledged messages come back after the visibility timeout."""
    with sessions(pool=pool, concurrency=len(names)) as session:
        results = [session.send("late", name, str(gate.path)) for name in names]
        until(lambda: all(begins(session, name) for name in names))
        first = {int(begins(session, name)[0][0]) for name in names}
        everybody, directories = session.worker.family(), session.worker.cgroups()
        assert len(first) == len(names)
        assert first < set(everybody)
        assert directories
        os.kill(session.worker.pid, signal.SIGKILL)
        session.worker.process.wait()
        until(lambda: not any(map(alive, everybody)))
        with sessions(pool=pool, concurrency=len(names), url=session.url) as again:
            assert not any(path.exists() for path in directories)
            restore(again)
            until(lambda: all(len(begins(again, name)) == 2 for name in names))
            gate.open()
            assert [result.get(timeout=60) for result in results] == ["done"] * len(names)
            for name in names:
                never_two_at_once(again, name)
                assert [confined for _, confined in begins(again, name)] == ["True", "True"]
                assert sum(line.startswith("ends") for line in again.log(name)) == 1


def restore(session: Session) -> None:
    """Restore unacknowledged messages, as Redis' transport does after the visibility timeout."""
    with session.app.connection_for_write() as connection:
        channel = connection.default_channel
        for tag in channel.client.zrange(channel.unacked_index_key, 0, -1):
            channel.qos.restore_by_tag(tag.decode())


def nothing_runs(session: Session, name: str) -> None:
    until(lambda: not any(alive(int(pid)) for line in session.log(name) for pid in line.split()))


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_revoked(sessions: Sessions, number: str, pool: str) -> None:
    with sessions(pool=pool, concurrency=1) as session:
        result = session.send("stay_retried", "revoked")
        until(lambda: bool(session.log("revoked")))
        result.revoke(terminate=True, signal=number)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
        nothing_runs(session, "revoked")
        assert session.get("where")["confined"]
        session.worker.stop()
        assert result.state == "REVOKED"
        assert len(session.log("revoked")) == 1


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_revoked_while_others_run(sessions: Sessions, gate: Gate, pool: str) -> None:
    """Only its own body is killed. A task that has not begun does not begin."""
    with sessions(pool=pool, concurrency=2) as session:
        kept = session.send("late", "kept", str(gate.path))
        result = session.send("stay", "revoked")
        until(lambda: bool(session.log("revoked")) and len(begins(session, "kept")) == 1)
        waiting = session.send("stay", "waiting")
        reserved = session.app.control.inspect()
        until(
            lambda: any(
                one["id"] == waiting.id for some in (reserved.reserved() or {}).values() for one in some
            )
        )
        waiting.revoke(terminate=True)
        result.revoke(terminate=True)
        for one in (result, waiting):
            with pytest.raises(TaskRevokedError):
                one.get(timeout=60)
        nothing_runs(session, "revoked")
        gate.open()
        assert kept.get(timeout=60) == "done"
        assert session.log("waiting") == []
        assert session.get("where")["confined"]


def test_hard_time_limit_of_celery(sessions: Sessions) -> None:
    with sessions(concurrency=1) as session:
        with pytest.raises(TimeLimitExceeded):
            session.get("stay_limited", "limited")
        nothing_runs(session, "limited")
        assert session.get("where")["confined"]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_warm_shutdown_waits(sessions: Sessions, gate: Gate, pool: str) -> None:
    with sessions(pool=pool, concurrency=1) as session:
        result = session.send("late", "warm", str(gate.path))
        until(lambda: len(begins(session, "warm")) == 1)
        directories = session.worker.cgroups()
        session.worker.signal(signal.SIGTERM)
        time.sleep(0.5)
        assert alive(int(begins(session, "warm")[0][0]))
        gate.open()
        assert session.worker.stop() == 0
        assert result.get(timeout=10) == "done"
        assert not any(path.exists() for path in directories)


@pytest.mark.parametrize("pool", ["threads", "gevent", "solo"])
def test_cold_shutdown_returns_a_task_that_is_acknowledged_late(
    sessions: Sessions, gate: Gate, pool: str
) -> None:
    with sessions(pool=pool, concurrency=1) as session:
        result = session.send("late", "cold", str(gate.path))
        until(lambda: len(begins(session, "cold")) == 1)
        session.worker.signal(signal.SIGQUIT)
        until(lambda: session.worker.process.poll() is not None)
        assert not alive(int(begins(session, "cold")[0][0]))
        gate.open()
        with sessions(pool=pool, concurrency=1, url=session.url) as other:
            restore(other)
            assert result.get(timeout=60) == "done"


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "solo"])
def test_cold_shutdown(sessions: Sessions, pool: str) -> None:
    """Of a worker that is an interpreter of its own, as it is with a variable of Python."""
    with sessions(pool=pool, concurrency=1, PYTHONFAULTHANDLER="1") as session:
        session.send("stay", "cold")
        until(lambda: bool(session.log("cold")))
        directories, everybody = session.worker.cgroups(), session.worker.family()
        session.worker.signal(signal.SIGQUIT)
        with contextlib.suppress(AssertionError):
            until(lambda: session.worker.process.poll() is not None)
        nothing_runs(session, "cold")
        assert not any(map(alive, everybody))
        assert not any(path.exists() for path in directories)


def test_restarted_by_hangup(sessions: Sessions) -> None:
    """It restarts in the same process, and leaves no cgroup behind."""
    with sessions(concurrency=1) as session:
        assert session.get("where")["confined"]
        before = session.worker.cgroups()
        session.worker.signal(signal.SIGHUP)
        until(lambda: session.worker.log().count(READY) == 2)
        assert session.get("where")["confined"]
        assert session.worker.cgroups() == before


def test_pool_process_replaced(sessions: Sessions) -> None:
    """A pool's process that served its tasks ends, and its executor processes with it."""
    with sessions("--max-tasks-per-child", "2", concurrency=1) as session:
        served: list[Any] = [session.get("where") for _ in range(6)]
        assert all(each["confined"] for each in served)
        assert len({each["pid"] for each in served}) == 3
        until(lambda: len(session.executors()) <= 1)


#: Makes the check that each process of the pool does at its start fail, as long as a file is there.
FAULTY = """
import os
from pathlib import Path
import billiard
from rcon_plugins.confinement.plan import Plan
from rcon_plugins.errors import ConfinementError
from rcon_plugins.hookspecs import hookimpl

check_process = Plan.check_process

def check_process_or_fail(self):
    if billiard.current_process().name != "MainProcess" and Path(os.environ["FAULT"]).exists():
        raise ConfinementError("the test says so")
    check_process(self)

Plan.check_process = check_process_or_fail

@hookimpl
def rcon_policies():
    return []
"""


def test_pool_process_tries_its_start_again(sessions: Sessions, tmp_path: Path) -> None:
    """It loses no task that is acknowledged late, and confines tasks once it can."""
    fault, gate, info = tmp_path / "fault", tmp_path / "gate", tmp_path / "faulty-1.dist-info"
    fault.touch()
    gate.touch()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[rcon_plugins]\nfaulty = faulty\n")
    (tmp_path / "faulty.py").write_text(FAULTY)
    settings = 'unmatched = "allow"\nplugins = ["faulty"]\n[policy.small]\nmemory = "1G"\n'
    environ = {"PYTHONPATH": str(tmp_path), "FAULT": str(fault)}
    worker, app, url = sessions.make(settings=settings, concurrency=1, **environ)
    with closing(app), worker, contextlib.closing(Session(worker, app, url)) as session:
        result = session.send("late", "faulty", str(gate))
        with pytest.raises(ConfinementError, match="the test says so"):
            session.get("where")
        assert not begins(session, "faulty")
        fault.unlink()
        assert session.wait(result) == "done"
        assert begins(session, "faulty")[0][1] == "True"
        assert session.get("where")["confined"]
