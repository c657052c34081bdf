"""The result of a task is bounded, and threads that run on after it delay no other task."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcon_celery import outcome_of
from rcon_plugins.errors import ResultTooLarge
from tests.integrations.celery.sessions import Session, Sessions
from tests.processes import alive, until

MIB = 2**20


@pytest.fixture(scope="module")
def session(sessions: Sessions) -> Iterator[Session]:
    with sessions.of_one_process() as opened:
        yield opened


@pytest.mark.parametrize("how", ["return", "raise", "retry"])
def test_a_result_above_max_result(session: Session, how: str) -> None:
    pid, _ = session.get("lengthy", "return", MIB // 2)
    result = session.send("lengthy", how, 3 * MIB)
    with pytest.raises(ResultTooLarge) as caught:
        session.wait(result)
    error = caught.value
    assert re.match(r"lengthy: its result has [36]\.0 MiB, above max_result = 1M: return less, ", str(error))
    assert (error.limit, error.policy) == ("max_result", "lengthy")
    assert error.usage is not None
    outcome = outcome_of(result)
    assert outcome is not None
    assert outcome.ending == "result"
    # The executor process serves the next task.
    assert session.get("lengthy", "return", 1)[1] == "x"
    assert alive(pid)


def test_a_large_result_that_is_ignored(session: Session) -> None:
    result = session.send("lengthy", "return", 3 * MIB, ignore_result=True)
    until(lambda: f"lengthy[{result.id}] succeeded" in session.worker.log())


def test_threads_end_with_their_task(session: Session, tmp_path: Path) -> None:
    for _ in range(2):
        pid = session.get("threads", "wait", str(tmp_path / "never"))
        assert session.get("threads", "") != pid
        until(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def test_threads_with_leave_children(session: Session, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    pid = session.get("threads_on_purpose", str(gate))
    other = session.get("threads_on_purpose", str(gate))
    assert other != pid
    assert alive(pid)
    gate.touch()
    until(lambda: not alive(pid) and not alive(other))
    assert (tmp_path / "gate-done").exists()


@pytest.mark.parametrize("how", ["daemon", "pool"])
def test_threads_of_libraries_stay(session: Session, how: str, tmp_path: Path) -> None:
    """Daemon threads and idle thread pools stay for the next task."""
    gate = tmp_path / "gate"
    pid = session.get("threads", how, str(gate))
    session.get("threads", "")
    assert alive(pid)
    gate.touch()


def test_a_process_that_does_not_return_delays_no_task(session: Session) -> None:
    """It sent its answer and runs on: the next task gets another process."""
    assert session.get("hostile_on", "value") == 1
    assert session.get("hostile_on", "") is None
