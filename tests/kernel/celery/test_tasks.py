"""What a confined task is promised, on the cgroups of this machine, with real workers and a real Redis.

Workers take long to start in an emulated machine, so there are two of them, and the last test kills the first.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import TaskRevokedError

from rcon_celery import outcome_of
from rcon_plugins.errors import Killed, MemoryLimitExceeded, PidsLimitExceeded, TimeLimitExceeded
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.sessions import SETTINGS, Session, Sessions
from tests.integrations.celery.test_deaths import begins, never_two_at_once, nothing_runs, restore
from tests.processes import alive, until

pytestmark = pytest.mark.timeout(600)  # an emulated machine is slow

MIB = 2**20
#: A task ``heavy`` takes most of it.
BUDGET = """
[budget]
memory = "1200M"
wait = "60s"
"""


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    directory = tmp_path_factory.mktemp("celery")
    with RedisServer(directory) as server:
        yield Sessions(server, directory)


@pytest.fixture(scope="module")
def session(sessions: Sessions) -> Iterator[Session]:
    with sessions(concurrency=1) as opened:
        yield opened


@pytest.mark.smoke
@pytest.mark.each_layout
def test_each_ending_raises_its_exception(session: Session) -> None:
    processes = session.worker.children()
    assert session.get("where")["confined"]
    error = session.error("hog", MemoryLimitExceeded)
    assert str(error).startswith("hog: memory limit 64M reached (peak 6")
    assert error.usage is not None
    session.error("hang", TimeLimitExceeded)
    session.error("fork", PidsLimitExceeded)
    assert session.error("die", Killed, "kill").signal == signal.SIGKILL
    assert session.get("where")["confined"]
    assert session.worker.children() == processes
    assert "WorkerLostError" not in session.worker.log()


@pytest.mark.each_layout
def test_orphans_of_a_task_are_adopted_and_reaped(session: Session) -> None:
    assert session.get("orphans") == {"adopted by": "the fork server", "reaped": True}


@pytest.mark.once
@pytest.mark.each_layout
def test_soft_limits(session: Session) -> None:
    assert (
        session.get("soft_memory")
        == "cleaned up: soft_memory: memory_soft reached; return before the memory limit kills the task"
    )
    assert session.get("soft_time") == "cleaned up"


@pytest.mark.each_layout
def test_a_grace(session: Session, tmp_path: Path) -> None:
    """The program that the task started tidies up after SIGTERM, and the next task finds its place in the pool."""
    path = tmp_path / "said"
    result = session.send("hang_tidily", str(path))
    with pytest.raises(TimeLimitExceeded, match="wall time limit 2s reached; ended within the grace of 1m"):
        session.wait(result)
    assert path.read_text() == "tidy\n"
    outcome = outcome_of(result)
    assert outcome is not None
    assert (outcome.ending, outcome.needed_kill) == ("timeout", False)
    assert session.get("where")["confined"]


@pytest.mark.each_layout
def test_each_retry_has_more_memory(session: Session) -> None:
    result = session.send("retried", 100 * MIB)
    assert session.wait(result) == 100 * MIB
    assert len(session.log("retried")) == 2
    outcome = outcome_of(result)
    assert outcome is not None
    assert 100 * MIB < (outcome.usage.memory_peak or 0) <= 128 * MIB


def test_processes_end_with_their_task(session: Session) -> None:
    pid = session.get("leaving")
    until(lambda: not alive(pid))
    left = session.get("leaving_on_purpose")
    try:
        session.get("where")
        assert alive(left)
        assert "/work/" in Path(f"/proc/{left}/cgroup").read_text()
    finally:
        session.end(left)


@pytest.mark.usefixtures("machine_budget")
def test_killed_tasks_run_again(session: Session, sessions: Sessions, tmp_path: Path) -> None:
    """Revoke a task, kill its worker, and start another one with a budget: nothing is left behind."""
    gate = tmp_path / "gate"
    revoked = session.send("stay", "revoked")
    until(lambda: bool(session.log("revoked")))
    revoked.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        session.wait(revoked)
    nothing_runs(session, "revoked")
    result = session.send("late", "late", str(gate))
    until(lambda: len(begins(session, "late")) == 1)
    everybody, directories = session.worker.family(), session.worker.cgroups()
    os.kill(session.worker.pid, signal.SIGKILL)
    session.worker.process.wait()
    until(lambda: not any(map(alive, everybody)))
    with sessions(concurrency=2, settings=SETTINGS + BUDGET, url=session.url) as again:
        assert directories
        assert not any(path.exists() for path in directories)
        restore(again)
        until(lambda: len(begins(again, "late")) == 2)
        gate.touch()
        assert again.wait(result) == "done"
        never_two_at_once(again, "late")
        # Two tasks that do not fit into the budget together: one waits, though the pool has room.
        heavy = [again.send("heavy", number, 0.5) for number in range(2)]
        assert sorted(again.wait(one) for one in heavy) == [[0, 0], [1, 0]]
        assert [line.split()[0] for line in again.log("heavy")] == ["begins", "ends"] * 2
