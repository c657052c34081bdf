"""How a confined task ends, in its own words, and what is left of it: nothing."""

from __future__ import annotations

import itertools
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
from rcon_plugins.usage import Usage
from tests.integrations.celery.limited import Unspeakable
from tests.integrations.celery.office import Office, Offices
from tests.processes import alive, until

POOLS = ("prefork", "threads", "solo", "gevent")


@pytest.fixture(scope="module", params=POOLS)
def office(offices: Offices, request: pytest.FixtureRequest) -> Iterator[Office]:
    """A worker with each kind of pool, which has to be the same one in the end."""
    with offices(pool=request.param, concurrency=2) as opened:
        before = opened.worker.children() if request.param == "prefork" else []
        yield opened
        assert "WorkerLostError" not in opened.worker.log()
        if before:
            assert set(before) <= set(opened.worker.children())


def test_runs_in_a_cgroup_of_its_own(office: Office) -> None:
    where = office.get("where")
    assert where["confined"]
    assert where["pid"] not in (office.worker.pid, *office.worker.children())


def test_memory(office: Office) -> None:
    error = office.error("hog", MemoryLimitExceeded)
    assert str(error).startswith("hog: memory limit 64M reached, peak 6")
    assert (error.policy, error.limit) == ("hog", "each.memory")
    assert isinstance(error.usage, Usage)
    assert error.usage.memory_peak is not None
    assert error.usage.memory_peak <= 64 * 2**20


def test_time(office: Office) -> None:
    error = office.error("hang", TimeLimitExceeded)
    assert str(error) == "hang: wall time limit 1s reached"
    assert error.usage is not None
    assert error.usage.wall_seconds >= 1


def test_pids(office: Office) -> None:
    error = office.error("fork", PidsLimitExceeded)
    assert (error.limit, str(error).partition(":")[0]) == ("each.pids", "BlockingIOError")


@pytest.mark.parametrize(
    ("how", "told", "number"),
    [
        ("exit", "die: its process ended with exit status 70", None),
        ("abort", "die: its process was ended by a signal: Aborted", 6),
        ("kill", "die: its process was ended by a signal: Killed", 9),
    ],
)
def test_killed(office: Office, how: str, told: str, number: int | None) -> None:
    error = office.error("die", Killed, how)
    assert str(error) == told
    assert error.signal == number
    assert isinstance(error.usage, Usage)


def test_a_death_can_be_retried(office: Office) -> None:
    office.error("hog_again", MemoryLimitExceeded)
    assert office.log("hog_again") == ["run", "run"]


def test_a_memory_error_does_not_end_the_worker(office: Office) -> None:
    error = office.error("no_memory", MemoryLimitExceeded)
    assert str(error) == "no_memory: MemoryError: "


def test_each_try_is_confined(office: Office) -> None:
    assert office.get("retrying") == []
    assert office.log("retrying") == ["True None"] * 4
    assert office.get("retrying", headers={"tenant": "a"}) == ["tenant"]
    assert office.log("retrying")[4:] == ["True {'tenant': 'a'}"] * 4


@pytest.mark.parametrize("name", ["rcon_stage", "rcon_outcome", "is_eager", "called_directly", "rcon"])
def test_no_message_gets_around_it(office: Office, name: str) -> None:
    """Whoever sends a task says what is on its request."""
    assert office.get("where", headers={name: True})["confined"]


def test_soft_memory(office: Office) -> None:
    assert office.get("soft_memory") == "cleaned up: soft_memory: its memory is nearly used up"


def test_soft_time(office: Office) -> None:
    assert office.get("soft_time") == "cleaned up"


def test_who_does_not_listen_is_killed(office: Office) -> None:
    office.error("hang_deaf", TimeLimitExceeded)


def test_what_it_started_ends_with_it(office: Office) -> None:
    pid = office.get("leaving")
    until(lambda: not alive(pid))


def test_left_on_purpose(office: Office) -> None:
    pid = office.get("leaving_on_purpose")
    try:
        again = office.get(
            "leaving_on_purpose"
        )  # another process of the pool has long been told of the first's end
        assert alive(pid)
        assert alive(again)
        assert "/work/" in Path(f"/proc/{pid}/cgroup").read_text()
    finally:
        office.end(pid)
        office.end(again)
    office.error("leaving_on_purpose", ValueError, True)
    failed = int(office.log("left")[-1])
    until(lambda: not alive(failed))


def test_a_process_serves_many_or_one(office: Office) -> None:
    office.get("where")
    kept = {office.get("where")["pid"] for _ in range(6)}
    assert len(kept) <= 2
    fresh = [office.get("fresh")["pid"] for _ in range(4)]
    assert len(set(fresh)) == 4


def test_no_descriptor_of_the_worker(office: Office) -> None:
    """Sockets without a peer are in their places. An event loop of its own is one of gevent's executor."""
    found = office.get("files")
    assert found
    for not_for_tasks in ("TCP", "pipe:", "landlock", "pidfd", "pymp-", "/sys/fs/cgroup"):
        assert not [name for name in found if not_for_tasks in name], found


def test_waits_for_its_turn(office: Office) -> None:
    results = [office.send("one_at_a_time") for _ in range(3)]
    spans = sorted(result.get(timeout=60) for result in results)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_map_is_the_task_it_maps(office: Office) -> None:
    task = office.app.tasks["double"]
    assert office.wait(task.map([1, 2]).apply_async()) == [[2, True], [4, True]]
    assert office.wait(task.starmap([(1,), (2,)]).apply_async()) == [[2, True], [4, True]]
    assert office.wait(task.chunks([(i,) for i in range(4)], 2).group().apply_async()) == [
        [[0, True], [2, True]],
        [[4, True], [6, True]],
    ]


@pytest.mark.parametrize("mapper", ["celery.map", "celery.starmap"])
def test_whatever_is_mapped_is_confined(office: Office, mapper: str) -> None:
    """By its bare name too; and not by a map that is mapped."""
    item: Any = 4 if mapper == "celery.map" else [4]
    assert office.wait(office.app.send_task(mapper, ("double", [item]))) == [[8, True]]
    inner = {"task": "plain", "args": [], "kwargs": {"task": "double", "it": []}, "options": {}}
    for named in ({**inner, "task": "celery.map"}, {**inner, "subtask_type": "xmap"}):
        with pytest.raises(ConfinementError, match="map the task itself"):
            office.wait(office.app.send_task(mapper, (named, [["double", [4]]])))


def test_a_soft_limit_of_celery_while_it_waits(offices: Offices) -> None:
    """It is the pool's, and names itself; the task has not begun."""
    with offices(concurrency=2) as one:
        before = one.send("one_at_a_time", 3.0)
        until(lambda: bool(one.log("one_at_a_time")))
        with pytest.raises(SoftTimeLimitExceeded):
            one.get("one_at_a_time", soft_time_limit=1)
        one.wait(before)
        assert len(one.log("one_at_a_time")) == 1
        one.get("one_at_a_time")


def test_a_soft_limit_before_it_begins(offices: Offices) -> None:
    with offices(concurrency=1, RCON_TEST_SLOW_START="2") as one, pytest.raises(SoftTimeLimitExceeded):
        one.get("not_begun")


def test_an_exception_that_cannot_say_what_it_is(office: Office) -> None:
    """It is the task's failure, which holds on to nothing: one may run at a time."""
    for _ in range(2):
        with pytest.raises(Unspeakable):
            office.get("unspeakable")


def test_others_are_as_ever(office: Office) -> None:
    assert not office.get("plain")["confined"]


def test_all_errors_tell_of_a_task() -> None:
    assert issubclass(MemoryLimitExceeded, LimitExceeded)
    assert issubclass(SoftTimeLimitExceeded, Exception)


def test_what_a_task_leaves_behind(offices: Offices, tmp_path: Path) -> None:
    """Not its directory, umask and alarm; and the next in its process is told of its soft limit."""
    with offices(concurrency=1) as office:
        pid, directory, umask, _ = office.get("untidy", "look")
        left = tmp_path / "left"
        left.mkdir()
        assert office.get("untidy", "change", str(left))[0] == pid
        left.rmdir()
        assert office.get("untidy", "wait") == [pid, directory, umask, "yes", "told"]
