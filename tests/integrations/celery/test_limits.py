"""How a confined task ends, with which message, and that nothing of it is left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from rcon_plugins.errors import (
    ConfinementError,
    Killed,
    LimitExceeded,
    MemoryLimitExceeded,
    PidsLimitExceeded,
    TimeLimitExceeded,
)
from rcon_plugins.work import Usage
from tests.integrations.celery.limited import Unspeakable
from tests.integrations.celery.sessions import Session, Sessions
from tests.processes import alive, until

POOLS = ("prefork", "threads", "solo", "gevent")


@pytest.fixture(scope="module", params=POOLS)
def session(sessions: Sessions, request: pytest.FixtureRequest) -> Iterator[Session]:
    """A worker with each pool; its processes must be the same ones at the end."""
    with sessions(pool=request.param, concurrency=2) as opened:
        before = opened.worker.children() if request.param == "prefork" else []
        yield opened
        assert "WorkerLostError" not in opened.worker.log()
        if before:
            assert set(before) <= set(opened.worker.children())


def test_task_runs_in_its_own_cgroup(session: Session) -> None:
    where = session.get("where")
    assert where["confined"]
    assert where["pid"] not in (session.worker.pid, *session.worker.children())


def test_memory(session: Session) -> None:
    error = session.error("hog", MemoryLimitExceeded)
    assert str(error).startswith("hog: memory limit 64M reached (peak 6")
    assert (error.policy, error.limit) == ("hog", "each.memory")
    assert isinstance(error.usage, Usage)
    assert error.usage.memory_peak is not None
    assert error.usage.memory_peak <= 64 * 2**20


def test_time(session: Session) -> None:
    error = session.error("hang", TimeLimitExceeded)
    assert str(error) == "hang: wall time limit 1s reached"
    assert error.usage is not None
    assert error.usage.wall_seconds >= 1


def test_pids(session: Session) -> None:
    error = session.error("fork", PidsLimitExceeded)
    assert error.limit == "each.pids"
    named = "fork: pids limit 8 reached: no more processes or threads could be started"
    assert str(error) == f"{named} (BlockingIOError: [Errno 11] Resource temporarily unavailable)"


@pytest.mark.parametrize(
    ("how", "message", "number"),
    [
        ("exit", "die: process exited with status 3", None),
        ("abort", "die: process ended by SIGABRT (Aborted)", 6),
        ("kill", "die: process ended by SIGKILL (Killed)", 9),
    ],
)
def test_killed(session: Session, how: str, message: str, number: int | None) -> None:
    error = session.error("die", Killed, how)
    assert str(error) == message
    assert error.signal == number
    assert isinstance(error.usage, Usage)


def test_a_death_can_be_retried(session: Session) -> None:
    session.error("hog_again", MemoryLimitExceeded)
    assert session.log("hog_again") == ["run", "run"]


def test_a_memory_error_does_not_end_the_worker(session: Session) -> None:
    error = session.error("no_memory", MemoryLimitExceeded)
    assert str(error) == "no_memory: MemoryError: "


def test_each_retry_is_confined(session: Session) -> None:
    assert session.get("retrying") == []
    assert session.log("retrying") == ["True None"] * 4
    assert session.get("retrying", headers={"tenant": "a"}) == ["tenant"]
    assert session.log("retrying")[4:] == ["True {'tenant': 'a'}"] * 4


@pytest.mark.parametrize("name", ["rcon_stage", "rcon_outcome", "is_eager", "called_directly", "rcon"])
def test_no_message_evades_confinement(session: Session, name: str) -> None:
    """The sender of a task controls the attributes of its request."""
    assert session.get("where", headers={name: True})["confined"]


def test_soft_memory(session: Session) -> None:
    assert (
        session.get("soft_memory")
        == "cleaned up: soft_memory: memory_soft reached; return before the memory limit kills the task"
    )


def test_soft_time(session: Session) -> None:
    assert session.get("soft_time") == "cleaned up"


def test_a_task_that_ignores_its_soft_limit_is_killed(session: Session) -> None:
    session.error("hang_deaf", TimeLimitExceeded)


def test_processes_end_with_their_task(session: Session) -> None:
    pid = session.get("leaving")
    until(lambda: not alive(pid))


def test_leave_children(session: Session) -> None:
    pid = session.get("leaving_on_purpose")
    try:
        # By then another process of the pool knows that the first task ended.
        again = session.get("leaving_on_purpose")
        assert alive(pid)
        assert alive(again)
        assert "/work/" in Path(f"/proc/{pid}/cgroup").read_text()
    finally:
        session.end(pid)
        session.end(again)
    session.error("leaving_on_purpose", ValueError, True)
    failed = int(session.log("left")[-1])
    until(lambda: not alive(failed))


def test_a_process_serves_many_or_one(session: Session) -> None:
    session.get("where")
    kept = {session.get("where")["pid"] for _ in range(6)}
    assert len(kept) <= 2
    fresh = [session.get("fresh")["pid"] for _ in range(4)]
    assert len(set(fresh)) == 4


def test_task_has_no_descriptor_of_the_worker(session: Session) -> None:
    """Sockets without a peer stand in for sockets. With gevent the executor has an event loop of its own.

    The one pipe is that of its own output, by the descriptors 1, 2 and one for log records.
    """
    found = session.get("files")
    assert found
    for not_for_tasks in ("TCP", "landlock", "pidfd", "pymp-", "/sys/fs/cgroup"):
        assert not [name for name in found if not_for_tasks in name], found
    pipes = [name for name in found if "pipe:" in name]
    assert len(pipes) == 3, found
    assert len(set(pipes)) == 1, found
    everybody = session.worker.family()
    readers = [modes(pid, pipes[0]) for pid in set(everybody) - set(session.executors())]
    # The process that reads it, and none that could write to it.
    assert {mode for found in readers for mode in found} == {os.O_RDONLY}, (readers, found)


def modes(pid: int, link: str) -> list[int]:
    """Return how a process has opened a file, by its descriptors. Processes and descriptors may end meanwhile."""
    found, entries = [], []
    ended = contextlib.suppress(FileNotFoundError, ProcessLookupError)
    with ended:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    for entry in entries:
        with ended:
            if str(entry.readlink()) == link:
                text = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
                found.append(int(text.split("flags:")[1].split()[0], 8) & os.O_ACCMODE)
    return found


def test_concurrency_makes_tasks_wait(session: Session) -> None:
    results = [session.send("one_at_a_time") for _ in range(3)]
    spans = sorted(result.get(timeout=60) for result in results)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_a_map_runs_under_the_policy_of_its_task(session: Session) -> None:
    task = session.app.tasks["double"]
    assert session.wait(task.map([1, 2]).apply_async()) == [[2, True], [4, True]]
    assert session.wait(task.starmap([(1,), (2,)]).apply_async()) == [[2, True], [4, True]]
    assert session.wait(task.chunks([(i,) for i in range(4)], 2).group().apply_async()) == [
        [[0, True], [2, True]],
        [[4, True], [6, True]],
    ]


@pytest.mark.parametrize("mapper", ["celery.map", "celery.starmap"])
def test_no_map_evades_confinement(session: Session, mapper: str) -> None:
    """A map of a task's bare name is confined, and a map of a map is refused."""
    item: Any = 4 if mapper == "celery.map" else [4]
    assert session.wait(session.app.send_task(mapper, ("double", [item]))) == [[8, True]]
    inner = {"task": "plain", "args": [], "kwargs": {"task": "double", "it": []}, "options": {}}
    for named in ({**inner, "task": "celery.map"}, {**inner, "subtask_type": "xmap"}):
        with pytest.raises(ConfinementError, match="map the task itself"):
            session.wait(session.app.send_task(mapper, (named, [["double", [4]]])))


def test_soft_time_limit_of_a_waiting_task(sessions: Sessions) -> None:
    """Celery's own soft time limit ends a task that has not begun, with its own exception."""
    with sessions(concurrency=2) as one:
        before = one.send("one_at_a_time", 3.0)
        until(lambda: bool(one.log("one_at_a_time")))
        with pytest.raises(SoftTimeLimitExceeded):
            one.get("one_at_a_time", soft_time_limit=1)
        one.wait(before)
        assert len(one.log("one_at_a_time")) == 1
        one.get("one_at_a_time")


def test_soft_limit_before_the_task_begins(sessions: Sessions) -> None:
    with sessions(concurrency=1, RCON_TEST_SLOW_START="2") as one, pytest.raises(SoftTimeLimitExceeded):
        one.get("not_begun")


def test_an_exception_without_a_message(session: Session) -> None:
    """The task fails with it, and releases its slot: one may run at a time."""
    for _ in range(2):
        with pytest.raises(Unspeakable):
            session.get("unspeakable")


def test_a_task_without_a_policy_is_not_confined(session: Session) -> None:
    assert not session.get("plain")["confined"]


def test_classes_of_errors() -> None:
    assert issubclass(MemoryLimitExceeded, LimitExceeded)
    assert issubclass(SoftTimeLimitExceeded, Exception)


def test_the_state_of_the_process_is_restored(sessions: Sessions, tmp_path: Path) -> None:
    """The next task finds its directory, umask and alarm, and gets its soft limit."""
    with sessions(concurrency=1) as session:
        pid, directory, umask, _ = session.get("untidy", "look")
        left = tmp_path / "left"
        left.mkdir()
        assert session.get("untidy", "change", str(left))[0] == pid
        left.rmdir()
        assert session.get("untidy", "wait") == [pid, directory, umask, "yes", "soft limit"]
