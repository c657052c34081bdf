"""Retry with more memory, a bound on deaths, and leases: no task is redelivered for ever, none runs twice at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rcon_celery import confined, outcome_of
from rcon_celery.retry.attempt import RetryPolicy
from rcon_plugins.errors import Killed, MemoryLimitExceeded, SettingsError
from rcon_plugins.settings.policy import Policy
from tests.integrations.celery import limited
from tests.integrations.celery.redis_server import RedisServer
from tests.integrations.celery.sessions import Session, Sessions
from tests.integrations.celery.test_deaths import begins, fork_server, never_two_at_once, restore
from tests.integrations.celery.test_start import refused
from tests.processes import family, until

MIB = 2**20


def dead_letters(session: Session) -> list[dict[str, Any]]:
    """Return the headers of the messages in the queue ``dead``."""
    messages: Any = session.redis.lrange("dead", 0, -1)
    return [json.loads(message)["headers"] for message in messages]


def test_each_retry_has_more_memory(sessions: Sessions) -> None:
    with sessions() as session:
        result = session.send("retried", 200 * MIB)
        assert session.wait(result) == 200 * MIB
        assert len(session.log("retried")) == 3  # with 64, 128 and 256 MiB
        outcome = outcome_of(result)
        assert outcome is not None
        assert 200 * MIB < (outcome.usage.memory_peak or 0) <= 256 * MIB
        # The next task begins with the limit of the policy again.
        assert session.get("retried", MIB) == MIB
        assert session.get("retried", 100 * MIB) == 100 * MIB
        assert len(session.log("retried")) == 3 + 1 + 2


def test_a_retry_may_return_a_large_result(sessions: Sessions) -> None:
    with sessions() as session:
        assert len(session.get("retried", 0, 70 * MIB)) == 70 * MIB


def test_a_retry_by_the_task_itself_is_no_death(sessions: Sessions) -> None:
    """The next attempt may begin before the one that sent it ended."""
    with sessions(concurrency=3) as session:
        results = [session.send("retrying_late") for _ in range(6)]
        assert [session.wait(result) for result in results] == [20] * 6


def test_no_more_memory_than_up_to(sessions: Sessions) -> None:
    with sessions() as session:
        error = session.error("retried", MemoryLimitExceeded, 2000 * MIB)
        assert "memory limit 512M reached" in str(error)
        assert len(session.log("retried")) == 4  # 64, 128, 256, 512
        assert dead_letters(session) == []


def test_too_many_deaths(sessions: Sessions) -> None:
    """The task fails and goes to the dead-letter queue: the message counts the deaths."""
    with sessions() as session:
        result = session.send("retried_in_vain", 900 * MIB)
        with pytest.raises(MemoryLimitExceeded, match="128M"):
            session.wait(result)
        assert len(session.log("retried_in_vain")) == 2
        (letter,) = dead_letters(session)
        assert letter["id"] == result.id
        assert result.children == []  # else it would be its own descendant
        assert letter["task"] == "retried_in_vain"
        assert letter["rcon_deaths"] == 2
        assert "memory limit 128M reached" in letter["rcon_reason"]


def test_deaths_of_workers_are_counted(sessions: Sessions, tmp_path: Path) -> None:
    """A message with which one worker after the other dies is not redelivered for ever."""
    with sessions(concurrency=1) as session:
        result = session.send("retried_late", "counted", str(tmp_path / "gate"))
        until(lambda: len(session.log("counted")) == 1)
        os.kill(session.worker.pid, signal.SIGKILL)
        session.worker.process.wait()
        with sessions(concurrency=1, url=session.url) as second:
            restore(second)
            until(lambda: len(second.log("counted")) == 2)
            os.kill(second.worker.pid, signal.SIGKILL)
            second.worker.process.wait()
        with sessions(concurrency=1, url=session.url) as third:
            restore(third)
            with pytest.raises(Killed, match="2 times"):
                session.wait(result)
            assert len(third.log("counted")) == 2
            (letter,) = dead_letters(third)
            assert letter["id"] == result.id
            # A task that ends leaves no lease.
            gate = tmp_path / "open"
            gate.touch()
            assert third.get("retried_late", "well", str(gate)) == "done"
            until(lambda: not session.redis.keys("rcon-lease-*"))


def test_deaths_of_workers_are_counted_without_a_backend(sessions: Sessions, tmp_path: Path) -> None:
    """Only the redelivered flag of the broker tells of them."""

    def open_another(url: str | None = None) -> Session:
        session = later.enter_context(sessions(concurrency=1, url=url, RCON_TEST_NO_BACKEND="1"))
        restore(session)
        return session

    def die(session: Session, runs: int) -> None:
        until(lambda: len(session.log("unkept")) == runs)
        os.kill(session.worker.pid, signal.SIGKILL)
        session.worker.process.wait()

    with contextlib.ExitStack() as later:
        first = open_another()
        first.send("retried_late", "unkept", str(tmp_path / "gate"))
        die(first, 1)
        second = open_another(first.url)
        die(second, 2)
        third = open_another(first.url)
        until(lambda: bool(dead_letters(third)))
        (letter,) = dead_letters(third)
        assert (letter["rcon_deaths"], letter["rcon_lost"]) == (0, 2)
        assert "the process that ran it ended 2 times" in letter["rcon_reason"]
        assert len(third.log("unkept")) == 2


def test_a_dead_letter_is_run_again_and_dies_for_good(sessions: Sessions) -> None:
    """A worker that takes tasks from its own dead-letter queue does not send them there again."""
    with sessions("-Q", "celery,dead", concurrency=1) as session:
        session.send("retried_in_vain", 900 * MIB)
        until(lambda: "is not sent there again" in session.worker.log())
        assert len(session.log("retried_in_vain")) == 2 + 2
        assert session.get("where")["confined"]
        assert len(session.log("retried_in_vain")) == 2 + 2
        assert dead_letters(session) == []


def test_a_task_replaced_by_itself_is_no_death(sessions: Sessions) -> None:
    """The next task of the same id may begin before the one that sent it ended."""
    with sessions(concurrency=3) as session:
        results = [session.send("replacing_late", 12) for _ in range(6)]
        assert [session.wait(result) for result in results] == ["done"] * 6


@pytest.mark.parametrize("name", ["late", "retried_late"])
def test_redelivered_while_it_runs(sessions: Sessions, tmp_path: Path, name: str) -> None:
    """After Redis' visibility timeout: that is no death, and the task does not run twice."""
    gate = tmp_path / "gate"
    with sessions(concurrency=2, **{limited.VISIBILITY: "2"}) as session:
        result = session.send(name, "slow", str(gate))
        until(lambda: "was delivered again while it is running" in session.worker.log())
        gate.touch()
        assert session.wait(result) == "done"
        until(lambda: "was delivered again and is ignored: it has already finished" in session.worker.log())
        assert len(begins(session, "slow")) == 1
        assert session.get("where")["confined"]


def leases(session: Session) -> dict[str, dict[str, Any]]:
    """Return the leases in the result backend."""
    keys: Any = session.redis.keys("rcon-lease-*-0-0-0")
    found: dict[str, Any] = {key: session.redis.get(key) for key in keys}
    return {key: json.loads(lease) for key, lease in found.items() if lease}


def test_a_lease_expires_even_if_results_do_not(sessions: Sessions, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with sessions(concurrency=1, RCON_TEST_KEPT="1") as session:
        result = session.send("late", "late", str(gate))
        until(lambda: bool(leases(session)))
        time.sleep(1.2)  # longer than a run whose lease is removed at its end
        gate.touch()
        assert session.wait(result) == "done"
        until(lambda: [lease["finished"] for lease in leases(session).values()] == [True])
        keys: Any = session.redis.keys("rcon-*")
        assert keys
        assert all(0 < int(str(session.redis.ttl(key))) <= 24 * 3600 for key in keys)


def change_leases(session: Session, **changes: Any) -> None:
    for key, lease in leases(session).items():
        session.redis.set(key, json.dumps({**lease, **changes}))


def test_one_missed_heartbeat_is_no_death(sessions: Sessions, tmp_path: Path) -> None:
    """The backend was unreachable, or a clock changed: the run is not lost for that."""
    gate = tmp_path / "gate"
    with sessions(concurrency=2, RCON_TEST_VISIBILITY="2") as session:
        result = session.send("late", "late", str(gate))

        def is_redelivered() -> bool:
            change_leases(session, heartbeat=time.time() - 1000)
            return len(begins(session, "late")) > 1 or "again while it is running" in session.worker.log()

        until(is_redelivered)
        gate.touch()
        assert session.wait(result) == "done"
        assert len(begins(session, "late")) == 1


def test_run_lost_on_another_machine(sessions: Sessions, tmp_path: Path) -> None:
    """A run whose process cannot be checked is lost once its heartbeat was found stopped twice."""
    gate = tmp_path / "gate"
    with sessions(concurrency=1) as session:
        result = session.send("late", "far", str(gate))
        until(lambda: len(begins(session, "far")) == 1 and bool(leases(session)))
        os.kill(session.worker.pid, signal.SIGKILL)
        session.worker.process.wait()
        change_leases(session, heartbeat=time.time() - 1000, process=["another machine", 1, 1])
        with sessions(concurrency=1, url=session.url) as second:
            restore(second)
            until(lambda: len(begins(second, "far")) == 2)
            assert "was delivered again while it is running" in second.worker.log()
            gate.touch()
            assert second.wait(result) == "done"


def test_the_backend_is_unreachable_at_the_start(sessions: Sessions, tmp_path: Path) -> None:
    """The task waits for the backend, in its process and then in its queue."""
    gate = tmp_path / "gate"
    with (
        RedisServer(tmp_path) as backend,
        sessions(concurrency=1, RCON_TEST_BACKEND=backend.database()) as session,
    ):
        backend.process.kill()
        backend.process.wait()
        session.send("retried_late", "begun", str(gate), ignore_result=True)
        until(lambda: "sent back to its queue" in session.worker.log())
        assert session.log("begun") == []
        backend.begin()
        until(lambda: len(session.log("begun")) == 1)
        gate.touch()
        until(lambda: " succeeded in " in session.worker.log())


def test_a_soft_time_limit_while_the_backend_is_unreachable(sessions: Sessions, tmp_path: Path) -> None:
    """Celery's own soft time limit ends a task that waits for the backend."""
    with (
        RedisServer(tmp_path) as backend,
        sessions(concurrency=1, RCON_TEST_BACKEND=backend.database()) as session,
    ):
        backend.process.kill()
        backend.process.wait()
        session.send("retried_late", "begun", "", ignore_result=True, soft_time_limit=2)
        until(lambda: "SoftTimeLimitExceeded" in session.worker.log())
        assert "sent back to its queue" not in session.worker.log()
        assert session.log("begun") == []


def test_the_broker_is_unreachable_after_a_death(
    sessions: Sessions, redis_server: RedisServer, tmp_path: Path
) -> None:
    """The task cannot be retried, and fails with the error of its death."""
    gate = tmp_path / "gate"
    with RedisServer(tmp_path) as broker:
        results = redis_server.database()
        with sessions(url=broker.database(), RCON_TEST_BACKEND=results) as session:
            result = session.send("retried", 200 * MIB, 0, str(gate))
            until(lambda: len(session.log("retried")) == 1)
            broker.process.kill()
            broker.process.wait()
            gate.touch()
            with pytest.raises(MemoryLimitExceeded, match="64M"):
                session.wait(result)


@pytest.mark.parametrize("backend", ["redis", "files"])
def test_run_lost_while_duplicates_wait(sessions: Sessions, tmp_path: Path, backend: str) -> None:
    """Of several copies of the waiting duplicate exactly one runs."""
    gate, results = tmp_path / "gate", tmp_path / "results"
    results.mkdir()
    environ = {limited.VISIBILITY: "2"} | (
        {limited.BACKEND: f"file://{results}"} if backend == "files" else {}
    )
    with sessions(concurrency=2, **environ) as session:
        result = session.send("late", "slow", str(gate))
        until(lambda: "was delivered again while it is running" in session.worker.log())
        ((executor, _),) = begins(session, "slow")
        (process,) = [pid for pid in session.worker.children() if int(executor) in family(pid)]
        os.kill(process, signal.SIGKILL)
        until(lambda: len(begins(session, "slow")) >= 2)
        until(
            lambda: session.worker.log().count("it is running, and another duplicate waits for its end") >= 3
        )
        gate.touch()
        assert session.wait(result) == "done"
        assert len(begins(session, "slow")) == 2
        never_two_at_once(session, "slow")


def test_a_task_that_rejects_itself_is_no_death(sessions: Sessions) -> None:
    """It begins at once at each redelivery."""
    with sessions(concurrency=1) as session:
        result = session.send("rejecting_late", 6)
        assert session.wait(result) == "done"
        assert len(session.log("rejecting_late")) == 6
        assert "waits" not in session.worker.log()


@pytest.mark.parametrize(("name", "most"), [("retried_late", 2), ("late", 10)])
def test_fork_server_killed_at_each_delivery(
    sessions: Sessions, tmp_path: Path, name: str, most: int
) -> None:
    with sessions(concurrency=1) as session:
        result = session.send(name, "poison", str(tmp_path / "gate"))
        (process,) = session.worker.children()

        def kill(runs: int) -> None:
            until(lambda: len(begins(session, "poison")) == runs)
            os.kill(fork_server(process), signal.SIGKILL)

        for runs in range(1, most + 1):
            kill(runs)
        with pytest.raises(Killed, match=f"the process that ran it ended {most} times; not retried"):
            session.wait(result)
        assert len(begins(session, "poison")) == most
        assert len(dead_letters(session)) == (name == "retried_late")
        assert session.get("where")["confined"]
        assert session.worker.children() == [process]


TRIES = """
unmatched = "allow"

[policy.small]
each = { memory = "64M", timeout = "60s" }
on_memory = { expand = "2x", up_to = "512M" }
max_deaths = 4
dead_letter = "dead"

[[route]]
task = "eat"
policy = "small"
"""


def test_retry_keys_in_a_policy(sessions: Sessions) -> None:
    """They hold for tasks without a decorator."""
    with sessions(settings=TRIES) as session:
        assert session.get("eat", 200 * MIB) == 200 * MIB
        assert len(session.log("eat")) == 3  # with 64, 128 and 256 MiB
        error = session.error("eat", MemoryLimitExceeded, 2000 * MIB)
        assert "memory limit 512M reached" in str(error)
        assert len(session.log("eat")) == 3 + 4
        (letter,) = dead_letters(session)
        assert (letter["task"], letter["rcon_deaths"]) == ("eat", 4)
        (answer,) = session.app.control.broadcast("rcon", reply=True, timeout=10, limit=1)
        limits = answer["w@test"]["policies"]["small"]
        assert limits["on_memory"] == {"expand": "2x", "up_to": "512M"}
        assert (limits["max_deaths"], limits["dead_letter"]) == (4, "dead")


def test_a_task_overrides_the_retry_keys_of_its_policy(sessions: Sessions) -> None:
    with sessions(settings=TRIES) as session:
        assert "memory limit 128M" in str(session.error("eat_twice", MemoryLimitExceeded, 2000 * MIB))
        assert len(session.log("eat_twice")) == 2
        assert [letter["task"] for letter in dead_letters(session)] == ["eat_twice"]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"512M"', '"512MB"', "policy.small.on_memory.up_to: '512MB' is not a size"),
        (
            '"64M"',
            '"512M"',
            "policy.small.on_memory.up_to: 512M is not above each.memory = 512M (name more, or leave on_memory out)",
        ),
    ],
)
def test_wrong_retry_keys_in_a_policy(sessions: Sessions, old: str, new: str, error: str) -> None:
    assert error in refused(sessions, settings=TRIES.replace(old, new))


def test_memory_of_each_attempt() -> None:
    policy = Policy.make("small", each={"memory": "64M"}, on_memory={"expand": "2x", "up_to": "300M"})
    retry_policy = RetryPolicy.of(policy, None)
    assert retry_policy is not None
    assert retry_policy.most_deaths == 3
    given = [retry_policy.memory(policy, deaths) for deaths in range(5)]
    assert given == [None, 128 * MIB, 256 * MIB, 300 * MIB, 300 * MIB]
    assert retry_policy.memory(Policy.make("free", pids=1), 2) is None
    assert RetryPolicy.of(Policy.make("free", pids=1), None) is None


def test_keys_of_a_task_override_those_of_its_policy() -> None:
    policy = Policy.make("small", max_deaths=5, dead_letter="dead")
    own = RetryPolicy.make({"max_deaths": 2, "on_memory": {"expand": "2x", "up_to": "300M"}})
    retry_policy = RetryPolicy.of(policy, own)
    assert retry_policy is not None
    assert (retry_policy.most_deaths, retry_policy.dead_letter) == (2, "dead")
    assert retry_policy.on_memory is not None
    assert RetryPolicy.of(Policy.make("free", pids=1), own) == own


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_deaths": 0}, "max_deaths"),
        ({"max_deaths": "many"}, "max_deaths"),
        ({"on_memory": {"expand": "0.5x", "up_to": "1G"}}, "on_memory.expand"),
        ({"on_memory": {"expand": "2x"}}, "on_memory: the key 'up_to' is missing"),
        ({"on_memory": {"expand": "2x", "up_to": "1GB"}}, "on_memory.up_to"),
    ],
)
def test_wrong_keywords(keywords: dict[str, Any], message: str) -> None:
    """Beside the name of a policy, and beside limits."""
    with pytest.raises(SettingsError, match=f"^@confined.*{message}"):
        confined("small", **keywords)
    with pytest.raises(SettingsError, match=f"^@confined: {message}"):
        confined(memory="64M", **keywords)
