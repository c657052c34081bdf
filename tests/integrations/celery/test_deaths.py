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
from tests.integrations.celery.office import Office, Offices
from tests.integrations.celery.producers import closing
from tests.integrations.celery.worker import READY
from tests.processes import alive, children, family, until


def fork_server(process: int) -> int:
    """Return the pid of the fork server of a process, its only child."""
    (server,) = children(process)
    return server


def begins(office: Office, name: str) -> list[list[str]]:
    return [line.split()[1:] for line in office.log(name) if line.startswith("begins")]


def never_two_at_once(office: Office, name: str) -> None:
    """Check that no run wrote to the log after a later run began to."""
    order = [line.split()[0] for line in office.log(f"{name}:beat")]
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


def run_late_and_kill(office: Office, gate: Gate, name: str, kill: Callable[[], object]) -> None:
    """Send `late`, kill a process while it runs, and check that it runs again to its end, confined each time."""
    result = office.send("late", name, str(gate.path))
    until(lambda: len(begins(office, name)) == 1)
    first = int(begins(office, name)[0][0])
    kill()
    until(lambda: len(begins(office, name)) == 2)
    assert not alive(first)
    gate.open()
    assert result.get(timeout=60) == "done"
    assert [confined for _, confined in begins(office, name)] == ["True", "True"]
    assert sum(line.startswith("ends") for line in office.log(name)) == 1
    never_two_at_once(office, name)


def test_pool_process_killed(offices: Offices, gate: Gate) -> None:
    with offices(concurrency=2) as office:

        def kill() -> None:
            executor = int(begins(office, "pool")[0][0])
            (process,) = [pid for pid in office.worker.children() if executor in family(pid)]
            os.kill(process, signal.SIGKILL)

        run_late_and_kill(office, gate, "pool", kill)


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_fork_server_killed(offices: Offices, gate: Gate, pool: str) -> None:
    with offices(pool=pool, concurrency=1) as office:
        (process,) = office.worker.children() if pool == "prefork" else [office.worker.pid]
        run_late_and_kill(office, gate, "server", lambda: os.kill(fork_server(process), signal.SIGKILL))
        assert alive(process)
        assert office.get("where")["confined"]


def test_fork_servers_killed_over_and_over(offices: Offices) -> None:
    """No task is lost, one about to begin neither."""
    with offices(concurrency=2) as office:
        pool = office.worker.children()
        assert office.get("numbered", -1) == -1
        results: list[AsyncResult[int]] = []
        for kill in range(8):
            five = [office.send("numbered", 5 * kill + number) for number in range(5)]
            # Each kill hits another moment of the five tasks.
            until(lambda five=five: any(result.ready() for result in five))  # type: ignore[misc]
            time.sleep(0.01 * kill)
            for process in pool:
                for server in children(process):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(server, signal.SIGKILL)
            results += five
        assert [office.wait(result) for result in results] == list(range(40))
        assert sorted(office.worker.children()) == sorted(pool)


def test_fork_server_killed_beside_threads(offices: Offices) -> None:
    """No other fork server can be made, so the worker finishes its tasks and exits."""
    with offices(pool="threads") as office:
        assert office.get("where")["confined"]
        os.kill(fork_server(office.worker.pid), signal.SIGKILL)
        until(lambda: office.worker.process.poll() is not None)
        assert office.worker.process.returncode == 0
        assert "this worker finishes its tasks and exits" in office.worker.log()


def test_fork_server_killed_without_late_acknowledgement(offices: Offices) -> None:
    with offices(concurrency=1) as office:
        result = office.send("stay", "early")
        until(lambda: bool(office.log("early")))
        (process,) = office.worker.children()
        os.kill(fork_server(process), signal.SIGKILL)
        with pytest.raises(Killed):
            result.get(timeout=60)
        assert office.get("where")["confined"]
        assert office.worker.children() == [process]


@pytest.mark.parametrize(
    ("pool", "names"), [("prefork", "a"), ("threads", "ab"), ("solo", "a"), ("gevent", "ab")]
)
def test_worker_killed(offices: Offices, gate: Gate, pool: str, names: str) -> None:
    """All its processes end, and unacknowledged messages come back after the visibility timeout."""
    with offices(pool=pool, concurrency=len(names)) as office:
        results = [office.send("late", name, str(gate.path)) for name in names]
        until(lambda: all(begins(office, name) for name in names))
        first = {int(begins(office, name)[0][0]) for name in names}
        everybody, directories = office.worker.family(), office.worker.cgroups()
        assert len(first) == len(names)
        assert first < set(everybody)
        assert directories
        os.kill(office.worker.pid, signal.SIGKILL)
        office.worker.process.wait()
        until(lambda: not any(map(alive, everybody)))
        with offices(pool=pool, concurrency=len(names), url=office.url) as again:
            assert not any(path.exists() for path in directories)
            restore(again)
            until(lambda: all(len(begins(again, name)) == 2 for name in names))
            gate.open()
            assert [result.get(timeout=60) for result in results] == ["done"] * len(names)
            for name in names:
                never_two_at_once(again, name)
                assert [confined for _, confined in begins(again, name)] == ["True", "True"]
                assert sum(line.startswith("ends") for line in again.log(name)) == 1


def restore(office: Office) -> None:
    """Restore unacknowledged messages, as Redis' transport does after the visibility timeout."""
    with office.app.connection_for_write() as connection:
        channel = connection.default_channel
        for tag in channel.client.zrange(channel.unacked_index_key, 0, -1):
            channel.qos.restore_by_tag(tag.decode())


def nothing_runs(office: Office, name: str) -> None:
    until(lambda: not any(alive(int(pid)) for line in office.log(name) for pid in line.split()))


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_revoked(offices: Offices, number: str) -> None:
    with offices(concurrency=1) as office:
        result = office.send("stay", "revoked")
        until(lambda: bool(office.log("revoked")))
        result.revoke(terminate=True, signal=number)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=60)
        nothing_runs(office, "revoked")
        assert office.get("where")["confined"]


def test_hard_time_limit_of_celery(offices: Offices) -> None:
    with offices(concurrency=1) as office:
        with pytest.raises(TimeLimitExceeded):
            office.get("stay_limited", "limited")
        nothing_runs(office, "limited")
        assert office.get("where")["confined"]


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_warm_shutdown_waits(offices: Offices, gate: Gate, pool: str) -> None:
    with offices(pool=pool, concurrency=1) as office:
        result = office.send("late", "warm", str(gate.path))
        until(lambda: len(begins(office, "warm")) == 1)
        directories = office.worker.cgroups()
        office.worker.signal(signal.SIGTERM)
        time.sleep(0.5)
        assert alive(int(begins(office, "warm")[0][0]))
        gate.open()
        assert office.worker.stop() == 0
        assert result.get(timeout=10) == "done"
        assert not any(path.exists() for path in directories)


def test_cold_shutdown(offices: Offices) -> None:
    with offices(concurrency=1) as office:
        office.send("stay", "cold")
        until(lambda: bool(office.log("cold")))
        directories, everybody = office.worker.cgroups(), office.worker.family()
        office.worker.signal(signal.SIGQUIT)
        with contextlib.suppress(AssertionError):
            until(lambda: office.worker.process.poll() is not None)
        nothing_runs(office, "cold")
        assert not any(map(alive, everybody))
        assert not any(path.exists() for path in directories)


def test_restarted_by_hangup(offices: Offices) -> None:
    """It restarts in the same process, and leaves no cgroup behind."""
    with offices(concurrency=1) as office:
        assert office.get("where")["confined"]
        before = office.worker.cgroups()
        office.worker.signal(signal.SIGHUP)
        until(lambda: office.worker.log().count(READY) == 2)
        assert office.get("where")["confined"]
        assert office.worker.cgroups() == before


def test_pool_process_replaced(offices: Offices) -> None:
    """A pool's process that served its tasks ends, and its executor processes with it."""
    with offices("--max-tasks-per-child", "2", concurrency=1) as office:
        served: list[Any] = [office.get("where") for _ in range(6)]
        assert all(each["confined"] for each in served)
        assert len({each["pid"] for each in served}) == 3
        until(lambda: len(office.executors()) <= 1)


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


def test_pool_process_that_cannot_start_at_first(offices: Offices, tmp_path: Path) -> None:
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
    worker, app, url = offices.make(settings=settings, concurrency=1, **environ)
    with closing(app), worker:
        office = Office(worker, app, url)
        result = office.send("late", "faulty", str(gate))
        with pytest.raises(ConfinementError, match="the test says so"):
            office.get("where")
        assert not begins(office, "faulty")
        fault.unlink()
        assert office.wait(result) == "done"
        assert begins(office, "faulty")[0][1] == "True"
        assert office.get("where")["confined"]
